"""Write a GGUF file tensor by tensor, in any order, in the memory of one tensor."""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy as np
from torch import Tensor

from lora_merge.errors import LoraMergeError
from lora_merge.files.gguf.reading import Entries, require_gguf
from lora_merge.files.tensor_file import DTYPES
from lora_merge.files.tensor_stream import cast_to, tensor_bytes, write_at


class GGUFStream:
    """A GGUF file whose header is known before its tensors; the counterpart of SafetensorsStream.

    Use as a context manager; leaving it flushes the file to disk and checks that every tensor was
    written.

    Args:
        path: The file to create.
        entries: Name → (safetensors dtype code, shape) of every tensor there will be.
        metadata: Keys and texts; `general.architecture` among them.
    """

    def __init__(self, path: Path, entries: Entries, metadata: Mapping[str, str]) -> None:
        self._entries = entries
        self._missing = set(entries)
        head, self._offsets, size = gguf_header(entries, metadata)
        self._file = path.open("wb")
        try:
            write_at(self._file, head, 0)
            self._file.truncate(size)
        except (LoraMergeError, OSError):
            self._file.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place, cast to the announced dtype. Safe from several threads.

        Raises:
            OutputError: If the dtype cannot hold it, or the system refuses.
        """
        code, shape = self._entries[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: {tuple(tensor.shape)} is not the announced {shape}")
        write_at(self._file, tensor_bytes(cast_to(tensor, code, name)), self._offsets[name])
        self._missing.discard(name)

    def __enter__(self) -> "GGUFStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"never written: {sorted(self._missing)[:3]}")


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
