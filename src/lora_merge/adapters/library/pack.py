"""Pack adapters into a library, add to one, and check one."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO

import torch

from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.library.index import (
    COLUMNS,
    INDEX,
    NAME,
    Layout,
    Library,
    Packed,
    column_file,
    open_library,
)
from lora_merge.adapters.library.tensors import Pieces
from lora_merge.adapters.references import Source
from lora_merge.errors import AdapterError, LoraMergeError, OutputError
from lora_merge.files.atomic import atomic_directory, lock_directory
from lora_merge.files.header import Entry, read_header
from lora_merge.files.stamp import foreign_entry, list_more
from lora_merge.files.tensor_file import DTYPES, refuse_non_finite
from lora_merge.files.tensor_stream import write_at

# Columns that are written at once: each is an open file, and 256 is a usual limit of a process.
_AT_ONCE = 64
_ALIGNMENT = 8


@dataclass(frozen=True, eq=False)
class _Item:
    """One adapter on its way into a library: its place there, and where it is now."""

    packed: Packed
    source: Source
    data: int


def pack_into(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    out: Path,
    *,
    tags: Mapping[str, str],
    force: bool = False,
    on_adapter: Callable[[], None] | None = None,
) -> Library:
    """Make a library of adapters; it appears whole or not at all.

    Args:
        adapters: Opened from safetensors files, or from libraries.
        names: Of each in the library.
        out: The directory to make.
        tags: What is said of all of them.
        force: Replace a directory that is ours.
        on_adapter: Called for each adapter that is read.

    Raises:
        LoraMergeError: If an adapter is no safetensors file or holds NaN, names are used twice, or
            the library cannot be written; nothing is left behind.
    """
    items = _items(adapters, names, "0001", 0, tags)
    needed = sum(sum(e.end - e.start for e in i.packed.layout.entries.values()) for i in items)
    inputs = [path for adapter in adapters for path in adapter.files]
    with atomic_directory(out, force=force, inputs=inputs, needed=needed) as folder:
        items = _write_columns(items, folder / COLUMNS / "0001", on_adapter)
        library = Library(folder, {item.packed.name: item.packed for item in items})
        _write_index(library)
    return open_library(out)


def append_to(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    out: Path,
    *,
    tags: Mapping[str, str],
    on_adapter: Callable[[], None] | None = None,
) -> Library:
    """Add adapters to a library; who reads it meanwhile sees it as it was, or with all of them.

    The arguments are those of `pack_into`.

    Raises:
        LoraMergeError: As there, and if a name is taken, or another run is adding to it.
    """
    try:
        lock = lock_directory(out)
    except BlockingIOError as error:
        raise OutputError(f"another run is adding to {out}", "wait until it has ended") from error
    try:
        library = open_library(out)
        taken = [name for name in names if name in library.adapters]
        if taken:
            raise OutputError(f"{out} holds an adapter {taken[0]} already", "give a --name")
        segment = f"{1 + max(int(one.segment) for one in library.adapters.values()):04}"
        place = out / COLUMNS / segment
        if place.exists():  # what a killed run left; no index has ever named it
            shutil.rmtree(place)
        items = _items(adapters, names, segment, 0, tags)
        with _taken_back_on_error(out, place):
            items = _write_columns(items, place, on_adapter)
            added = {item.packed.name: item.packed for item in items}
            extended = Library(out, {**library.adapters, **added})
            _write_index(extended)
            # All of them: a run that was killed here had listed none of its own.
            list_more(out, [INDEX], also=_columns_of(extended))
        return open_library(out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error}", "free space") from error
    finally:
        if lock is not None:
            os.close(lock)


def _columns_of(library: Library) -> Iterator[str]:
    """The files that an index names."""
    kinds = {(one.segment, id(one.layout)): one for one in library.adapters.values()}
    for one in kinds.values():
        for column in set(one.layout.columns.values()):
            yield f"{COLUMNS}/{one.segment}/{column_file(column)}"


@contextmanager
def _taken_back_on_error(out: Path, place: Path) -> Iterator[None]:
    """Leave a library as it was after an error: its index, and nothing of the new columns."""
    before = (out / INDEX).read_bytes()
    try:
        yield
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)  # before all else: the disk may be full
        if (out / INDEX).read_bytes() != before:
            _index_part(out).write_bytes(before)
            _index_part(out).replace(out / INDEX)
        _index_part(out).unlink(missing_ok=True)
        raise


def damages(library: Library) -> Iterator[str]:
    """What of a library is not as it was packed: every byte is read, and every adapter's SHA-256.

    Yields:
        One line per fault.
    """
    reason = foreign_entry(library.folder)
    if reason:
        yield reason
    groups: dict[int, list[Packed]] = {}
    for packed in library.adapters.values():
        groups.setdefault(id(packed.layout), []).append(packed)
    pieces = Pieces()
    for members in groups.values():
        digests = {one.name: hashlib.sha256(one.layout.head) for one in members}
        broken: dict[str, str] = {}
        for tensor in members[0].layout.entries:
            for one in members:
                try:
                    digests[one.name].update(pieces.read(library, one, tensor))
                except LoraMergeError as error:
                    broken.setdefault(one.name, error.message)
        for one in members:
            if one.name in broken:
                yield f"{one.name}: {broken[one.name]}"
            elif digests[one.name].hexdigest() != one.sha256:
                yield f"{one.name} is not what was packed: its SHA-256 is another"


def _items(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    segment: str,
    first: int,
    tags: Mapping[str, str],
) -> list[_Item]:
    """Where everything will be, from headers alone."""
    seen: dict[str, str] = {}
    layouts: dict[tuple[str, tuple[tuple[str, str], ...]], Layout] = {}
    items = []
    for number, (adapter, name) in enumerate(zip(adapters, names, strict=True), first):
        if not NAME.fullmatch(name):
            raise OutputError(
                f"{adapter.name}: {name!r} is no name in a library",
                "give a --name of letters, digits and _.+-/",
            )
        if name in seen:
            raise OutputError(
                f"{adapter.name} and {seen[name]} would both be {name}", "give each a --name"
            )
        seen[name] = adapter.name
        source = adapter.source
        if source is None or not source.has_safetensors:
            raise AdapterError(
                f"{adapter.name} is no safetensors file, and a library keeps files as they are",
                "lora-merge convert --to peft makes it one",
            )
        if source.member is not None:
            text, data = source.member.packed.layout.header, 0
        else:
            header = read_header(source.weights)
            text, data = header.text, header.data
        columns = _columns(adapter)
        layout = layouts.setdefault((text, tuple(columns.items())), Layout(text, columns))
        packed = Packed(
            name=name,
            segment=segment,
            number=number,
            layout=layout,
            sha256="",
            file=source.weights.name if source.member is None else source.member.packed.file,
            config=source.config_text,
            origin=source.ref,
            revision=source.revision if source.member is None else source.member.packed.revision,
            tags=dict(tags) if source.member is None else {**source.member.packed.tags, **tags},
        )
        items.append(_Item(packed, source, data))
    return items


def _columns(adapter: Adapter) -> dict[str, str]:
    """Every tensor's column: its (first) module, or "" of what belongs to none."""
    columns = dict.fromkeys(adapter.tensors.entries(), "")
    for module, spec in adapter.modules.items():
        for key in spec.keys:
            columns[key] = columns[key] or module
    return columns


def _write_columns(
    items: Sequence[_Item], place: Path, on_adapter: Callable[[], None] | None
) -> list[_Item]:
    """Write all columns, some at a time; the items with their files' SHA-256."""
    place.mkdir(parents=True)
    wanted: dict[str, dict[str, Entry]] = {}
    for item in items:
        for tensor, entry in item.packed.layout.entries.items():
            entries = wanted.setdefault(item.packed.layout.columns[tensor], {})
            entries[item.packed.key(tensor)] = entry
    names = sorted(wanted)
    done = list(items)
    for start in range(0, len(names), _AT_ONCE):
        with ExitStack() as open_files:
            columns = {
                name: _Column(open_files, place / column_file(name), name, wanted[name])
                for name in names[start : start + _AT_ONCE]
            }
            for index, item in enumerate(done):
                done[index] = _copy(item, columns)
                if on_adapter and not start:
                    on_adapter()
            for column in columns.values():
                column.file.flush()
                os.fsync(column.file.fileno())
    return done


class _Column:
    """A column's file, whose header is written first."""

    def __init__(
        self, open_files: ExitStack, path: Path, name: str, entries: Mapping[str, Entry]
    ) -> None:
        table: dict[str, object] = {"__metadata__": {"format": "pt", "module": name}}
        position, offsets = 0, {}

        def order(key: str) -> tuple[int, int]:
            # Wide dtypes first keeps tensors aligned to their items.
            entry = entries[key]
            return -(entry.end - entry.start) // max(prod(entry.shape), 1), int(key.split(":")[0])

        for key in sorted(entries, key=order):
            entry = entries[key]
            end = position + entry.end - entry.start
            table[key] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [position, end],
            }
            offsets[key], position = position, end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self.file: IO[bytes] = open_files.enter_context(path.open("wb"))
        write_at(self.file, struct.pack("<Q", len(text)) + text, 0)
        self.offsets = {key: 8 + len(text) + offset for key, offset in offsets.items()}
        if not position:
            return
        self.file.truncate(8 + len(text) + position)


def _copy(item: _Item, columns: Mapping[str, _Column]) -> _Item:
    """Copy what of an adapter belongs into these columns, byte by byte; hash it the first time.

    Raises:
        AdapterError: If an entry is NaN or infinite, or no file is what it says.
    """
    packed, layout = item.packed, item.packed.layout
    mine = [tensor for tensor in layout.entries if layout.columns[tensor] in columns]

    def put(tensor: str, data: bytes) -> None:
        module = layout.columns[tensor]
        dtype = DTYPES.get(layout.entries[tensor].dtype)
        if dtype is not None and data:
            values = torch.frombuffer(bytearray(data), dtype=dtype)
            refuse_non_finite(values, f"{packed.origin}: {module or 'no module'}: {tensor}")
        column = columns[module]
        write_at(column.file, data, column.offsets[packed.key(tensor)])

    origin = item.source.member
    if origin is not None:
        pieces = Pieces()
        for tensor in mine:
            put(tensor, pieces.read(origin.library, origin.packed, tensor))
        return replace(item, packed=replace(packed, sha256=origin.packed.sha256))
    with item.source.weights.open("rb") as file:
        if packed.sha256:
            for tensor in mine:
                entry = layout.entries[tensor]
                file.seek(item.data + entry.start)
                put(tensor, file.read(entry.end - entry.start))
            return item
        digest = hashlib.sha256(file.read(item.data))
        for tensor, entry in layout.entries.items():  # in the file's order: one pass, and the hash
            data = file.read(entry.end - entry.start)
            digest.update(data)
            if layout.columns[tensor] in columns:
                put(tensor, data)
    return replace(item, packed=replace(packed, sha256=digest.hexdigest()))


def _write_index(library: Library) -> None:
    part = _index_part(library.folder)
    with part.open("w", encoding="utf-8") as file:
        json.dump(library.to_json(), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(library.folder / INDEX)


def _index_part(folder: Path) -> Path:
    return folder / f".{INDEX}.part"
