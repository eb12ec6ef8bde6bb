"""Shards of a base model, copied with room for new tensors and edited in place."""

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType

from torch import Tensor

from lora_merge.errors import OutputError
from lora_merge.files.checkpoint import TensorPlace, read_places
from lora_merge.files.header import header_bytes, header_text
from lora_merge.files.tensor_file import DTYPES
from lora_merge.files.tensor_stream import tensor_bytes, write_at

_COPY_BYTES = 1 << 24


class ShardEditor:
    """Overwrites tensors of a copied shard. Use as a context manager; leaving it flushes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("r+b")

    def read(self, place: TensorPlace, start: int, count: int) -> Tensor:
        """`count` entries from flat index `start`, as stored, shape (count,)."""
        return place.read(self._file, start, count)

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
    return read_places(target)


def _copy_with_header(
    source: Path,
    target: Path,
    new: Mapping[str, tuple[str, tuple[int, ...]]],
    prefix: str,
    dropped: frozenset[str],
) -> None:
    with source.open("rb") as old, target.open("wb") as file:
        header = json.loads(header_text(old))
        data = old.tell()
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
        head = header_bytes(table)
        file.write(head)
        for first, last, _ in kept:
            old.seek(data + first)
            for start in range(first, last, _COPY_BYTES):
                file.write(old.read(min(_COPY_BYTES, last - start)))
        file.truncate(len(head) + end)
