"""Write a GGUF file tensor by tensor, in any order, in the memory of one tensor."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lora_merge.files.gguf.reading import Entries, require_gguf
from lora_merge.files.tensor_file import DTYPES
from lora_merge.files.tensor_stream import TensorStream


class GGUFStream(TensorStream):
    """A GGUF file, written tensor by tensor.

    Args:
        path: The file to create.
        entries: Name → (safetensors dtype code, shape) of every tensor there will be.
        metadata: Keys and texts; `general.architecture` among them.
    """

    def __init__(self, path: Path, entries: Entries, metadata: Mapping[str, str]) -> None:
        head, offsets, size = gguf_header(entries, metadata)
        super().__init__(path, entries, head, offsets, padded=size)


def gguf_header(entries: Entries, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The file's head, each tensor's offset in the file, and the file's size.

    Args:
        entries: Name → (safetensors dtype code, shape).
        metadata: Keys and values; `adapter.lora.alpha` is written as a number.
    """
    require_gguf()
    from gguf import GGMLQuantizationType, GGUFWriter

    said = dict(metadata)
    writer = GGUFWriter(None, said.pop("general.architecture"))
    for key, value in said.items():
        if key == "adapter.lora.alpha":
            writer.add_float32(key, float(value))
        else:
            writer.add_string(key, value)
    offsets: dict[str, int] = {}
    position = 0
    for name, (code, shape) in sorted(entries.items()):
        size = int(np.prod(shape)) * DTYPES[code].itemsize
        kind = GGMLQuantizationType[code]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
        offsets[name] = position
        position += GGUFWriter.ggml_pad(size, writer.data_alignment)
    with TemporaryDirectory() as folder:  # the package writes to files alone
        writer.write_header_to_file(Path(folder) / "head")
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = (Path(folder) / "head").read_bytes()
    head += bytes(-len(head) % writer.data_alignment)
    absolute = {name: len(head) + offset for name, offset in offsets.items()}
    return head, absolute, len(head) + position
