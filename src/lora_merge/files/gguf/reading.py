"""Tensors in a GGUF file, read through the `gguf` package."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lora_merge.errors import AdapterError, LoraMergeError
from lora_merge.files.inputs import note_input
from lora_merge.files.tensor_file import DTYPES, refuse_pointer

if TYPE_CHECKING:
    from gguf import GGUFReader

Entries = Mapping[str, tuple[str, tuple[int, ...]]]

# What llama.cpp computes with; other types are blocks of integers, dequantised when they are read.
_FLOATS = {"F64": "F64", "F32": "F32", "F16": "F16", "BF16": "BF16"}
# A list longer than this is a vocabulary: the file is a model.
_LONGEST_LIST = 1 << 12


def require_gguf() -> None:
    """Check that the `gguf` package is there.

    Raises:
        LoraMergeError: If it is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise LoraMergeError(
            "GGUF files need the gguf package, which is not installed",
            "pip install 'lora-merge[gguf]'",
        ) from error


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: ggml's type, offset and bytes in the file."""

    kind: int
    offset: int
    size: int


class GGUFFile:
    """A GGUF file as a source of tensors; opening reads the header alone.

    Shapes are PyTorch's, rows first. Quantised tensors count as F32 and are dequantised.

    Args:
        path: The file.
        adapter: The adapter's name, for messages.

    Raises:
        AdapterError: If it is damaged, cut off or written for a big-endian machine.
        LoraMergeError: If `gguf` is not installed.
    """

    def __init__(self, path: Path, adapter: str) -> None:
        require_gguf()
        self.path = path
        self.adapter = adapter
        refuse_pointer(path, adapter)
        note_input(path)
        self._entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._places: dict[str, _Place] = {}
        try:
            self._metadata = self._header(_open(path))
        except (ValueError, LookupError, OSError, OverflowError, MemoryError, TypeError) as error:
            raise AdapterError(
                f"{adapter}: {path} is not a readable GGUF file: {error}", "download it again"
            ) from error

    def _header(self, reader: "GGUFReader") -> dict[str, str]:
        """Note every tensor's place, and give the keys and values as text."""
        if reader.endianess.name != "LITTLE":
            raise ValueError("it is big-endian")
        for tensor in reader.tensors:
            kind = tensor.tensor_type
            shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
            self._entries[tensor.name] = (_FLOATS.get(kind.name, "F32"), shape)
            self._places[tensor.name] = _Place(
                int(kind), int(tensor.data_offset), int(tensor.n_bytes)
            )
        return {
            name: str(field.contents())
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.") and len(field.data) <= _LONGEST_LIST
        }

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        """A copy, or what comes out of a pickle, opens the file by itself."""
        return GGUFFile, (self.path, self.adapter)

    def entries(self) -> Entries:
        """Name → (dtype code, shape)."""
        return self._entries

    def metadata(self) -> Mapping[str, str]:
        """The file's keys and values, as text."""
        return self._metadata

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        place = self._places[name]
        code, shape = self._entries[name]
        try:
            data = np.fromfile(self.path, np.uint8, place.size, offset=place.offset)
        except OSError as error:
            raise AdapterError(
                f"{self.adapter}: cannot read {name} from {self.path}: {error}", "get it again"
            ) from error
        if len(data) != place.size:
            raise AdapterError(
                f"{self.adapter}: {self.path} ends before {name} does", "it changed; get it again"
            )
        kind = _kind_name(place.kind)
        if kind in _FLOATS:
            return torch.from_numpy(data).view(DTYPES[code]).view(shape)
        return torch.from_numpy(_dequantised(data, place.kind, shape, name, self.adapter))


def _kind_name(kind: int) -> str:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind).name


def _dequantised(
    data: np.ndarray[Any, Any], kind: int, shape: tuple[int, ...], name: str, adapter: str
) -> np.ndarray[Any, Any]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        rows = data.reshape(*shape[:-1], -1)
        return dequantize(rows, GGMLQuantizationType(kind)).astype(np.float32).reshape(shape)
    except (NotImplementedError, ValueError) as error:
        raise AdapterError(
            f"{adapter}: {name} is of ggml's type {_kind_name(kind)}, which is not read",
            "convert the adapter with --outtype f16",
        ) from error


def _open(path: Path) -> "GGUFReader":
    """The package's reader, which takes no length from the header on trust."""
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, *rest, **named)

    return Bounded(path)
