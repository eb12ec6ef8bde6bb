"""`lora_merge.pack` and `check_library`: many adapters in one directory, stored by module."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_merge.adapters.access.coerce import open_adapters
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.library.index import Library, is_library, open_library, parse_tags
from lora_merge.adapters.library.pack import append_to, damages, pack_into
from lora_merge.api.arguments.packing import Pack
from lora_merge.arguments import checked, takes
from lora_merge.errors import OutputError, SourceError
from lora_merge.files.targets import check_target
from lora_merge.planning import counted
from lora_merge.printing import Report, Summary, short_names


@dataclass(frozen=True, repr=False)
class PackReport(Report):
    """What was packed.

    Attributes:
        out: The library.
        added: Names of the adapters that were packed now.
        total: Adapters in the library.
        modules: Modules that they change.
        num_bytes: Bytes of the added adapters' tensors.
    """

    out: Path
    added: tuple[str, ...]
    total: int
    modules: int
    num_bytes: int

    def summary(self) -> Summary:
        """How many of what."""
        named = ", ".join(self.added[:4]) + (", ..." if self.added[4:] else "")
        return Summary(
            f"Library {self.out}",
            (
                ("added", f"{len(self.added)} ({named}), {self.num_bytes / 1e6:.1f} MB"),
                ("holds", f"{self.total} adapters of {self.modules} modules"),
                ("use", f"{self.out}, {self.out}:{self.added[0]}, {self.out}[tag=value]"),
            ),
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row per adapter that was added."""
        return [{"adapter": f"{self.out}:{name}"} for name in self.added]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "schema": 1,
            "out": str(self.out),
            "added": list(self.added),
            "total": self.total,
            "modules": self.modules,
            "bytes": self.num_bytes,
        }


@takes(Pack)
def pack(given: Pack) -> PackReport:
    """Pack adapters into a library: a directory with one file per module, whatever their number.

    Whatever takes adapters takes the library (all of its adapters), `LIBRARY:name` and
    `LIBRARY[tag=value]`. An adapter's file and config are kept byte by byte.

    Raises:
        LoraMergeError: If an adapter has no safetensors file, a name is taken, or nothing can be
            written there; what was there is as it was.

    Examples:
        >>> import lora_merge
        >>> report = lora_merge.pack("examples/adapters/*", "pool", tags=["kind=text"])
        >>> report.added
        ('double', 'reverse', 'upper')
        >>> [a.name for a in lora_merge.open_adapters("pool[kind=text]")][:1]
        ['pool:double']
    """
    out, tags = Path(given.out), given.tags
    if given.append and not is_library(out):
        raise OutputError(f"{out} is no library to add to", "leave --append out to make one")
    if not given.append:
        check_target(out, force=given.force)
    opened = open_adapters(given.adapters)
    named = _names(opened) if given.names is None else list(given.names)
    if len(named) != len(opened):
        raise OutputError(f"{len(named)} names for {len(opened)} adapters", "give one per adapter")
    pairs = [f"{k}={v}" for k, v in tags.items()] if isinstance(tags, Mapping) else list(tags)
    said, step = parse_tags(pairs), counted(given.progress, "packing", len(opened))
    if given.append:
        library = append_to(opened, named, out, tags=said, on_adapter=step)
    else:
        library = pack_into(opened, named, out, tags=said, force=given.force, on_adapter=step)
    return _report(library, out, tuple(named))


@checked()
def check_library(library: str | Path) -> list[str]:
    """Read every byte of a library and hold it against what was packed.

    Args:
        library: Its directory.

    Returns:
        What is damaged, in words; nothing if all is well.

    Raises:
        SourceError: If it is no library, or its index is damaged.

    Examples:
        >>> import lora_merge
        >>> report = lora_merge.pack("examples/adapters/*", "checked")
        >>> lora_merge.check_library("checked")
        []
    """
    folder = Path(library)
    if not is_library(folder):
        raise SourceError(f"{library} is no library", "make one: lora-merge pack ADAPTER... -o DIR")
    return list(damages(open_library(folder)))


def _report(library: Library, out: Path, added: tuple[str, ...]) -> PackReport:
    every = library.adapters.values()
    modules = {column for one in every for column in one.layout.columns.values() if column}
    sizes = [library.adapters[name].layout.entries.values() for name in added]
    num_bytes = sum(entry.end - entry.start for entries in sizes for entry in entries)
    return PackReport(out, added, len(every), len(modules), num_bytes)


def _names(adapters: Sequence[Adapter]) -> list[str]:
    """What tells adapters apart in what they were called."""
    given = []
    for adapter in adapters:
        member = adapter.source.member if adapter.source else None
        given.append(adapter.name if member is None else member.packed.name)
    plain = [name.removesuffix(".safetensors").removeprefix("hf://") for name in given]
    return [re.sub(r"[^\w.+/-]+", "-", name).strip("-/") for name in short_names(plain)]
