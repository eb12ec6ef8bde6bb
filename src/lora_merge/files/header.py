"""The header of a safetensors file, believed only where it fits the file."""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lora_merge.errors import SourceError

# The dtypes that factors are written in, as people and torch call them, and their codes.
DTypeName = Literal["float64", "float32", "float16", "bfloat16"]
CODES: dict[str, str] = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_LARGEST = 100_000_000  # bytes of a header, safetensors' own limit
_MOST_DIMENSIONS = 16
_ALIGNMENT = 8
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor: dtype code, shape, and its first and last byte (exclusive) behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class FileHeader:
    """A header.

    Attributes:
        entries: Every tensor by name.
        metadata: Its text metadata.
        data: Where in the file the tensors begin.
        text: The JSON as it stands there.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data: int
    text: str


def code_of(name: DTypeName | None) -> str | None:
    """A dtype's code, None of None."""
    return None if name is None else CODES[name]


def header_text(file: BinaryIO) -> bytes:
    """The JSON of an open file's header, as it stands there; behind it the data begin.

    Raises:
        ValueError: If its length does not fit the file.
        struct.error: If the file is shorter than a length.
    """
    (length,) = struct.unpack("<Q", file.read(8))
    if not 2 <= length <= min(_LARGEST, os.fstat(file.fileno()).st_size - 8):
        raise ValueError("a length that does not fit")
    return file.read(length)


def header_bytes(table: Mapping[str, object]) -> bytes:
    """A file's head: length and JSON, padded so that tensors behind it are aligned."""
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> FileHeader:
    """Read a header and hold it against the file.

    Raises:
        SourceError: If it is damaged, or tensors overlap, leave gaps, or have another size than
            their dtype and shape say.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                raise SourceError(
                    f"{path} is a GGUF file of llama.cpp, not safetensors",
                    "name the directory that it was converted from; an adapter's own file ends in "
                    ".gguf",
                )
            file.seek(0)
            size = path.stat().st_size
            raw = header_text(file)
        text = raw.decode("utf-8")
        entries, metadata = parse_header(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise SourceError(
            f"{path} is not a readable safetensors file ({error})", "get it again"
        ) from error
    except OSError as error:
        raise SourceError(
            f"{path} is not a readable safetensors file: {error.strerror}", "get it again"
        ) from error
    place = 0
    for name, entry in sorted(entries.items(), key=lambda one: (one[1].start, one[1].end)):
        if entry.start != place:
            raise SourceError(
                f"{path} is damaged: {name} begins at byte {entry.start} of the data, where "
                f"{place} is expected: tensors overlap, or leave gaps",
                "get it again",
            )
        place = entry.end
    if 8 + len(raw) + place != size:
        raise SourceError(
            f"{path} is {size} bytes long, its header says {8 + len(raw) + place}", "get it again"
        )
    return FileHeader(entries, metadata, 8 + len(raw), text)


def parse_header(text: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """(tensors, metadata) of a header's JSON; nothing is held against a file.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: If it is none.
    """
    raw = json.loads(text)
    metadata = raw.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is no text")
    return {name: _entry(name, one) for name, one in raw.items()}, metadata


def _entry(name: str, raw: Any) -> Entry:
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    name.encode()
    numbers = [*shape, *offsets]
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or len(offsets) != 2:
        raise ValueError(f"{name:.80}: shape and offsets are no whole numbers")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name:.80}: {len(shape)} dimensions")
    start, end = offsets
    if dtype not in _BITS:
        raise ValueError(f"{name:.80}: unknown dtype {dtype!r:.20}")
    if prod(shape) * _BITS[dtype] != 8 * (end - start):
        raise ValueError(f"{name:.80}: {end - start} bytes for {dtype} {shape}")
    return Entry(dtype, tuple(shape), start, end)
