"""Give an adapter's modules the names they have in another class of the same base model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_merge.adapters.adapter import Adapter
from lora_merge.errors import AdapterError


@dataclass(frozen=True)
class Rename:
    """One change of names: whole components at the front of a path.

    Attributes:
        old: The path that is replaced.
        new: What stands there instead; empty takes the path away.
    """

    old: str
    new: str

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.old}={self.new}"

    def of(self, name: str) -> str:
        """The new name; names that do not begin with the path stay."""
        if name == self.old and self.new:
            return self.new
        if not name.startswith(self.old + "."):
            return name
        return f"{self.new}{name.removeprefix(self.old)}".removeprefix(".")


def parse_renames(texts: Sequence[str]) -> tuple[Rename, ...]:
    """FROM=TO, as --rename and a recipe's `rename` take it.

    Raises:
        AdapterError: If a text has no "=" or nothing before it.
    """
    renames = []
    for text in texts:
        old, separator, new = text.partition("=")
        if not separator or not old.strip("."):
            raise AdapterError(
                f"rename {text!r} is no FROM=TO", "write e.g. --rename layers=model.layers"
            )
        renames.append(Rename(old.strip().strip("."), new.strip().strip(".")))
    return tuple(renames)


def rename_all(adapters: Sequence[Adapter], texts: Sequence[str]) -> list[Adapter]:
    """Rename the modules of adapters; each adapter takes the changes that fit its names.

    Args:
        adapters: The adapters.
        texts: FROM=TO, in the order in which they are done.

    Raises:
        AdapterError: If a change fits no adapter, or makes one name of two.
    """
    for change in parse_renames(texts):
        changed = [renamed(adapter, change) for adapter in adapters]
        if all(one is other for one, other in zip(changed, adapters, strict=True)):
            raise AdapterError(
                f"rename {change}: no adapter has a module below {change.old!r}",
                f"their modules are named like {next(iter(adapters[0].modules))}",
            )
        adapters = changed
    return list(adapters)


def renamed(adapter: Adapter, change: Rename) -> Adapter:
    """An adapter with one change of names done; itself, if none of its names changes.

    Raises:
        AdapterError: If two names become one.
    """
    names = {name: change.of(name) for name in (*adapter.modules, *adapter.extras)}
    if all(old == new for old, new in names.items()):
        return adapter
    owners: dict[str, str] = {}
    for old, new in names.items():
        if owners.setdefault(new, old) != old:
            raise AdapterError(
                f"{adapter.name}: rename {change} gives {owners[new]} and {old} one name",
                "both are there, so they are two modules",
            )
    modules = {names[n]: replace(s, name=names[n]) for n, s in adapter.modules.items()}
    extras = {names[n]: replace(e, name=names[n]) for n, e in adapter.extras.items()}
    return replace(
        adapter, modules=dict(sorted(modules.items())), extras=dict(sorted(extras.items()))
    )
