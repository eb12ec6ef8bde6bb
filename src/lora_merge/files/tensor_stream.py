"""Write a safetensors file tensor by tensor, in any order, in the memory of one tensor."""

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch
from torch import Tensor

from lora_merge.errors import NotFiniteError, OutputError
from lora_merge.files.header import header_bytes
from lora_merge.files.tensor_file import DTYPES

_STORED = {**DTYPES, "I64": torch.int64}
_CODES = {dtype: code for code, dtype in _STORED.items()}


def header_of(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The file's head (length and padded JSON), each tensor's offset in the file, and its size."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    position = 0
    # Wide dtypes first keeps every tensor aligned to its item size, as safetensors itself does.
    for name, (code, shape) in sorted(entries.items(), key=lambda e: (-_itemsize(e[1][0]), e[0])):
        end = position + prod(shape) * _itemsize(code)
        table[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
        offsets[name] = position
        position = end
    head = header_bytes(table)
    absolute = {name: len(head) + offset for name, offset in offsets.items()}
    return head, absolute, len(head) + position


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's entries as they stand in a file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def cast_to(tensor: Tensor, code: str, name: str) -> Tensor:
    """A tensor in the dtype it is stored in; the last gate before a file, so it lets no NaN pass.

    Args:
        tensor: What was computed.
        code: safetensors dtype code.
        name: What it is called, for the message.

    Raises:
        OutputError: If an entry is NaN or infinite, or beyond the dtype's range.
    """
    cast = tensor.to(_STORED[code])
    # A finite sum proves in one quick pass that every entry is finite; only if not, look at each.
    if not cast.is_floating_point() or bool(torch.isfinite(cast.sum(dtype=torch.float32))):
        return cast
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NotFiniteError(
            f"{name}: {bad} of {tensor.numel()} entries are NaN or infinite",
            "weights, scales and the adapters' alphas multiply: lower them",
        )
    if not bool(torch.isfinite(cast).all()):
        dtype = str(cast.dtype).removeprefix("torch.")
        raise OutputError(
            f"{name}: its largest entry, {float(tensor.abs().max()):.3g}, is beyond {dtype}",
            "write it as bfloat16 or float32",
        )
    return cast


def write_at(file: IO[bytes], data: bytes | memoryview, offset: int) -> None:
    """Write bytes at a place of an open file; moves no cursor, so threads may share the file.

    Raises:
        OutputError: If the system refuses, as it does on a full disk.
    """
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(file.fileno(), view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        raise OutputError(
            f"cannot write {Path(file.name).name}: {error.strerror}",
            "free space or choose another -o",
        ) from error


class TensorStream:
    """A file whose header is known before its tensors, which come in any order.

    Use as a context manager; leaving it flushes the file to disk and checks that every tensor was
    written.

    Args:
        path: The file to create.
        entries: Name → (safetensors dtype code, shape) of every tensor there will be.
        head: What the file begins with.
        offsets: Name → where the tensor stands in the file.
        padded: The file's size, where more than tensors must fill it.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[str, tuple[int, ...]]],
        head: bytes,
        offsets: Mapping[str, int],
        *,
        padded: int | None = None,
    ) -> None:
        self.path = path
        self._entries, self._offsets = entries, offsets
        self._missing = set(entries)
        self._file = path.open("wb")
        try:
            write_at(self._file, head, 0)
            if padded is not None:
                self._file.truncate(padded)
        except (OutputError, OSError):
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

    def __enter__(self) -> Self:
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


class SafetensorsStream(TensorStream):
    """A safetensors file, written tensor by tensor.

    Args:
        path: The file to create.
        entries: Name → (safetensors dtype code, shape) of every tensor there will be.
        metadata: Text metadata for the header.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        head, offsets, self.size = header_of(entries, metadata or {"format": "pt"})
        super().__init__(path, entries, head, offsets)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors that are in memory, each in its own dtype.

    Args:
        path: The file to create.
        tensors: Float tensors, or int64.
        metadata: Text metadata for the header.

    Raises:
        OutputError: If an entry is NaN or infinite, or the system refuses.
    """
    entries = {
        name: (_CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    with SafetensorsStream(path, entries, metadata) as stream:
        for name, tensor in tensors.items():
            stream.write(name, tensor)


def _itemsize(code: str) -> int:
    return _STORED[code].itemsize
