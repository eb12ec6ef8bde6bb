"""`lora_merge.pack` and `check_library`: many adapters in one directory, stored by module."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_merge.adapters.access.adapter_like import AdaptersLike
from lora_merge.adapters.access.coerce import open_adapters
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.library.index import Library, is_library, open_library, parse_tags
from lora_merge.adapters.library.pack import append_to, damages, pack_into
from lora_merge.arguments import checked
from lora_merge.errors import OutputError, SourceError
from lora_merge.files.targets import check_target
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


@checked()
def pack(
    adapters: AdaptersLike,
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    tags: Sequence[str] | Mapping[str, str] = (),
    append: bool = False,
    force: bool = False,
    on_plan: Callable[[int], None] | None = None,
    on_adapter: Callable[[], None] | None = None,
) -> PackReport:
    """Pack adapters into a library: a directory with one file per module, whatever their number.

    Whatever takes adapters takes the library (all of its adapters), `LIBRARY:name` and
    `LIBRARY[tag=value]`. An adapter's file and config are kept byte by byte.

    Args:
        adapters: What `open_adapters` takes; adapters of libraries, too.
        out: The library.
        names: Of each in the library; default: the part of its path that tells it from the others.
        tags: "name=value", said of all of them.
        append: Add to the library that is there.
        force: Replace the library that is there.
        on_plan: Called with the number of adapters before any is read.
        on_adapter: Called for each that was read.

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
    out = Path(out)
    if append and not is_library(out):
        raise OutputError(f"{out} is no library to add to", "leave --append out to make one")
    if not append:
        check_target(out, force=force)
    opened = open_adapters(adapters)
    named = _names(opened) if names is None else list(names)
    if len(named) != len(opened):
        raise OutputError(f"{len(named)} names for {len(opened)} adapters", "give one per adapter")
    pairs = [f"{k}={v}" for k, v in tags.items()] if isinstance(tags, Mapping) else list(tags)
    said = parse_tags(pairs)
    if on_plan:
        on_plan(len(opened))
    if append:
        library = append_to(opened, named, out, tags=said, on_adapter=on_adapter)
    else:
        library = pack_into(opened, named, out, tags=said, force=force, on_adapter=on_adapter)
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
