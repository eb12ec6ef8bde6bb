"""A base model's directory: its safetensors shards, and editing a copy of them in place."""

import json
import os
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters import DTYPES
from lora_merge.adapters.stream import tensor_bytes, write_at
from lora_merge.errors import OutputError, SourceError

# Weights in other formats: a fused copy would leave them stale, so they stay behind.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".ckpt")

_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: shard, dtype code, shape, offset in the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model directory, opened by its headers.

    Attributes:
        folder: The directory.
        shards: File names of its safetensors shards, in name order.
        index: Name of its index file, None for a single file.
        tensors: Every tensor's place, by name.
    """

    folder: Path
    shards: tuple[str, ...]
    index: str | None
    tensors: Mapping[str, TensorPlace]

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Its `config.json`; empty where there is none."""
        path = self.folder / "config.json"
        loaded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return loaded if isinstance(loaded, dict) else {}

    @cached_property
    def licence(self) -> str | None:
        """The licence that its model card names."""
        card = self.folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        head = text.split("---")[1] if text.startswith("---") and text.count("---") > 1 else ""
        found = re.search(r"^license:\s*(\S+)\s*$", head, re.MULTILINE)
        return found[1] if found else None

    def other_files(self) -> list[Path]:
        """Relative paths of everything that is not weights: tokenizer, configs, code, licence."""
        weights = {*self.shards, self.index}
        found = []
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in name.parts)
            stale = name.suffix in _OTHER_WEIGHTS or name.suffix == ".safetensors"
            stale |= name.name.endswith(".index.json")
            if path.is_file() and not hidden and not stale and str(name) not in weights:
                found.append(name)
        return found

    @property
    def num_bytes(self) -> int:
        """Size of the shards."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a model directory.

    Raises:
        SourceError: If it holds no complete safetensors checkpoint.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such directory", "give the base model's directory")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    index = indices[0].name if len(indices) == 1 else None
    if len(indices) > 1 or (index is None and len(files) > 1):
        several = [path.name for path in indices] or files
        raise SourceError(
            f"{folder}: several checkpoints: {', '.join(several[:4])}",
            "keep one of them in a directory of its own",
        )
    if index is not None:
        files = _indexed(folder, index)
    elif not files:
        raise SourceError(
            f"{folder}: no safetensors weights in this directory",
            "download the safetensors files, or convert with "
            "save_pretrained(safe_serialization=True)",
        )
    tensors: dict[str, TensorPlace] = {}
    for name in files:
        tensors |= _places(folder / name)
    return Checkpoint(folder, tuple(files), index, tensors)


class ShardEditor:
    """Overwrites tensors of a copied shard. Use as a context manager; leaving it flushes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("r+b")

    def read(self, place: TensorPlace, start: int, count: int) -> Tensor:
        """`count` entries from flat index `start`, as stored, shape (count,)."""
        dtype = DTYPES[place.dtype]
        buffer = bytearray(count * dtype.itemsize)
        done = 0
        while done < len(buffer):
            offset = place.offset + start * dtype.itemsize + done
            part = os.pread(self._file.fileno(), len(buffer) - done, offset)
            if not part:
                raise SourceError(
                    f"{self.path.name} is shorter than its header says", "get it again"
                )
            buffer[done : done + len(part)] = part
            done += len(part)
        return torch.frombuffer(buffer, dtype=dtype)

    def write(self, place: TensorPlace, start: int, tensor: Tensor) -> None:
        """Overwrite entries from flat index `start`; the tensor has the place's dtype."""
        offset = place.offset + start * DTYPES[place.dtype].itemsize
        write_at(self._file, tensor_bytes(tensor), offset)

    def __enter__(self) -> "ShardEditor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def copy_shard(
    source: Path,
    target: Path,
    *,
    new: Mapping[str, tuple[str, tuple[int, ...]]],
    prefix: str = "",
    dropped: frozenset[str] = frozenset(),
) -> dict[str, TensorPlace]:
    """Copy a shard, with room for new tensors at its end.

    The stored bytes are copied as they are; only the header changes, and only if it must.

    Args:
        source: The shard.
        target: The file to make.
        new: Tensors to make room for: name → (dtype code, shape). They hold zeros.
        prefix: Put before the name of every stored tensor (new ones have theirs).
        dropped: Names of stored tensors that are left out.

    Returns:
        The place of every tensor in the copy.
    """
    try:
        if not new and not prefix and not dropped:
            shutil.copyfile(source, target)
        else:
            _copy_with_header(source, target, new, prefix, dropped)
    except OSError as error:
        raise OutputError(
            f"cannot write {target.name}: {error.strerror}", "free space or choose another -o"
        ) from error
    return _places(target)


def _copy_with_header(
    source: Path,
    target: Path,
    new: Mapping[str, tuple[str, tuple[int, ...]]],
    prefix: str,
    dropped: frozenset[str],
) -> None:
    with source.open("rb") as old, target.open("wb") as file:
        (length,) = struct.unpack("<Q", old.read(8))
        header = json.loads(old.read(length))
        table = {"__metadata__": header.pop("__metadata__")} if "__metadata__" in header else {}
        kept = [(*entry["data_offsets"], name) for name, entry in header.items()]
        kept = sorted(part for part in kept if part[2] not in dropped)
        end = 0
        for first, last, name in kept:
            place = {"data_offsets": [end, end + last - first]}
            table[prefix + name] = {**header[name], **place}
            end += last - first
        for name, (code, shape) in new.items():
            start, end = end, end + prod(shape) * DTYPES[code].itemsize
            table[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        for first, last, _ in kept:
            old.seek(8 + length + first)
            for start in range(first, last, _COPY_BYTES):
                file.write(old.read(min(_COPY_BYTES, last - start)))
        file.truncate(8 + len(text) + end)


def _indexed(folder: Path, index: str) -> list[str]:
    try:
        table = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(table.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{folder / index} is no index of shards", "get it again") from error
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise SourceError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing ({missing[0]}, ...)",
            "finish the download",
        )
    return files


def _places(path: Path) -> dict[str, TensorPlace]:
    """Every tensor of a safetensors file, from its header."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size
            header: Any = json.loads(file.read(length)) if length < size else None
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        places = {
            name: TensorPlace(
                path.name,
                str(entry["dtype"]),
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
            )
            for name, entry in entries.items()
        }
        end = max((e["data_offsets"][1] for e in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, struct.error) as error:
        raise SourceError(f"{path} is not a readable safetensors file", "get it again") from error
    if 8 + length + end != size:
        raise SourceError(
            f"{path} is {size} bytes long, its header says {8 + length + end}", "get it again"
        )
    return places
