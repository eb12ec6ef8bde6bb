"""The index of a library: which adapters it holds, and in which file each of their tensors is.

    LIBRARY/library.json                    the index, replaced in one step
    LIBRARY/columns/0001/NAME.safetensors   one module's tensors of all adapters packed together

Files of columns are never changed: adding adapters makes a new directory of them, and a reader that
opened the index before goes on with what it knew. An adapter's file is kept whole: its header is in
the index (once for all adapters with the same one), its bytes are in the columns, and its SHA-256
holds for both.
"""

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from lora_merge.errors import SourceError
from lora_merge.files.documents import read_json, validated
from lora_merge.files.header import Entry, parse_header
from lora_merge.files.inputs import note_input
from lora_merge.files.names import fault_of

INDEX, COLUMNS = "library.json", "columns"
_KIND, _VERSION = "lora_merge_library", 1
NAME = re.compile(r"[\w.+-]+(/[\w.+-]+)*")
_FILTERED = re.compile(r"(?P<folder>.+)\[(?P<tags>[^\[\]]*=[^\[\]]*)\]")


@dataclass(frozen=True)
class Layout:
    """What adapters with the same header have in common.

    Attributes:
        header: The safetensors header, as it stood in their files.
        columns: Tensor → the name of its column: the module it belongs to, "" for all others.
    """

    header: str
    columns: Mapping[str, str]

    @property
    def head(self) -> bytes:
        """The beginning of their files, up to the first tensor."""
        text = self.header.encode()
        return struct.pack("<Q", len(text)) + text

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        """Its tensors, by their place in the file."""
        found = parse_header(self.header)[0]
        return dict(sorted(found.items(), key=lambda one: (one[1].start, one[1].end)))

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """What the file said beside its tensors."""
        return parse_header(self.header)[1]


@dataclass(frozen=True, kw_only=True)
class _Described:
    """What the index says of one adapter.

    Attributes:
        name: Its name there.
        segment: Directory of the columns that it is in.
        number: Its number in these.
        sha256: Of its weights' file.
        file: The name that this had.
        config: Text of its config, None where it had none.
        origin: Where it was packed from.
        revision: The commit, of adapters from the Hub.
        tags: What was said of it.
    """

    name: str
    segment: str
    number: int
    sha256: str
    file: str
    config: str | None = None
    origin: str = ""
    revision: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Packed(_Described):
    """One adapter of a library.

    Attributes:
        layout: Its header.
    """

    layout: Layout

    def key(self, tensor: str) -> str:
        """A tensor's name in its column's file."""
        return f"{self.number}:{tensor}"


@dataclass(frozen=True, kw_only=True)
class _Stored(_Described):
    """An adapter as the index has it: its layout by number."""

    layout: int


@dataclass(frozen=True)
class _Index:
    """The index as it stands in its file."""

    lora_merge_library: int
    layouts: list[Layout]
    adapters: list[_Stored]


@dataclass(frozen=True, eq=False)
class Library:
    """A library as it was when its index was read.

    Attributes:
        folder: Where it is.
        adapters: In the order in which they were packed.
    """

    folder: Path
    adapters: Mapping[str, Packed]

    def column(self, packed: Packed, tensor: str) -> Path:
        """The file that a tensor is in."""
        name = column_file(packed.layout.columns[tensor])
        return self.folder / COLUMNS / packed.segment / name

    def find(self, name: str, ref: str) -> Packed:
        """An adapter by its name.

        Raises:
            SourceError: If there is none; names the nearest.
        """
        if name not in self.adapters:
            from difflib import get_close_matches

            near = get_close_matches(name, self.adapters, n=1)
            folder = ref.rpartition(":")[0]
            remedy = f"did you mean {folder}:{near[0]}?" if near else f"lora-merge info {folder}"
            raise SourceError(f"{ref}: the library holds no {name}", remedy)
        return self.adapters[name]

    def to_json(self) -> dict[str, Any]:
        """The index as JSON values."""
        layouts: dict[tuple[Any, ...], int] = {}
        listed: list[dict[str, Any]] = []
        adapters = []
        for one in self.adapters.values():
            layout = one.layout
            key = (layout.header, *layout.columns.items())
            if key not in layouts:
                layouts[key] = len(listed)
                listed.append({"header": layout.header, "columns": dict(layout.columns)})
            told = {spec.name: getattr(one, spec.name) for spec in fields(Packed)}
            adapters.append({**told, "layout": layouts[key], "tags": dict(one.tags)})
        return {_KIND: _VERSION, "layouts": listed, "adapters": adapters}


@dataclass(frozen=True, eq=False)
class Member:
    """An adapter of a library, and the library."""

    library: Library
    packed: Packed


def is_library(path: Path) -> bool:
    """Whether a directory is one."""
    return (path / INDEX).is_file()


def open_library(folder: Path) -> Library:
    """Read a library's index, once for all who ask while it stays as it is.

    Raises:
        SourceError: If it is damaged.
    """
    note_input(folder)
    stat = (folder / INDEX).stat()
    return _read(folder.absolute(), (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=8)
def _read(folder: Path, identity: tuple[int, ...]) -> Library:
    path = folder / INDEX
    what = f"{path} is no index of a library"
    index = validated(_Index, read_json(path, str(folder)), what, "pack it again")
    try:
        if index.lora_merge_library != _VERSION:
            raise ValueError(f"version {index.lora_merge_library}")
        for layout in index.layouts:
            if layout.entries.keys() != layout.columns.keys():
                raise ValueError("a header that does not fit its columns")
        adapters = {}
        for one in index.adapters:
            packed = Packed(**{**vars(one), "layout": index.layouts[one.layout]})
            if not NAME.fullmatch(packed.name) or not re.fullmatch(r"\d{4,}", packed.segment):
                raise ValueError(f"the name {packed.name!r:.80}")
            if fault_of(packed.file) or "/" in packed.file:
                raise ValueError(f"the file {packed.file!r:.80}")
            adapters[packed.name] = packed
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise SourceError(f"{what}: {error}", "pack it again") from error
    return Library(folder, adapters)


def column_file(column: str) -> str:
    """Name of a column's file; modules' names may be longer than a file name can be."""
    readable = re.sub(r"[^\w.-]+", "_", column)[-80:] or "rest"
    digest = hashlib.blake2b(column.encode(), digest_size=8).hexdigest()
    return f"{readable}-{digest}.safetensors"


def in_library(ref: str) -> Member | None:
    """The adapter that `LIBRARY:name` stands for; None of other references.

    Raises:
        SourceError: If the library holds none of that name.
    """
    folder, colon, name = ref.rpartition(":")
    path = Path(folder).expanduser()
    if not colon or not folder or not is_library(path):
        return None
    library = open_library(path)
    return Member(library, library.find(name, ref))


def members(ref: str) -> list[str] | None:
    """`LIBRARY:name` of all that `LIBRARY` or `LIBRARY[tag=...]` stands for; None of others.

    Raises:
        SourceError: If no adapter has these tags.
    """
    match = _FILTERED.fullmatch(ref)
    folder = match["folder"] if match else ref.rstrip("/")
    if not folder or not is_library(Path(folder).expanduser()):
        return None
    library = open_library(Path(folder).expanduser())
    wanted = parse_tags(match["tags"].split(",")) if match else {}
    found = [
        f"{folder}:{one.name}"
        for one in library.adapters.values()
        if all(one.tags.get(tag) == value for tag, value in wanted.items())
    ]
    if not found:
        known = sorted(
            {f"{t}={v}" for one in library.adapters.values() for t, v in one.tags.items()}
        )
        raise SourceError(
            f"{ref}: no adapter of this library has these tags",
            f"there are: {', '.join(known[:8]) or 'none'}",
        )
    return found


def parse_tags(given: Sequence[str]) -> dict[str, str]:
    """Tags written as "name=value".

    Raises:
        SourceError: If one is not.
    """
    tags = {}
    for one in given:
        name, sign, value = (part.strip() for part in one.partition("="))
        if not sign or not NAME.fullmatch(name) or not NAME.fullmatch(value):
            raise SourceError(f"{one!r} is no tag", "write name=value, letters, digits and .+-/")
        tags[name] = value
    return tags
