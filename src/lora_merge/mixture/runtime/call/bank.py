"""The experts that a pass runs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_merge.mixture.runtime.call.modules import Modules


@dataclass(frozen=True, eq=False)
class Bank:
    """A mixture's experts as they are in a model at one time; another set of them is another bank.

    A gate in force names its bank, so calls and blocks that have begun keep the experts they began
    with while others are added and removed.

    Attributes:
        names: Of the gated experts, in the order of the gate's columns.
        places: Name of a wrapped module -> its group and its place there.
    """

    names: tuple[str, ...]
    places: Mapping[str, tuple[Modules, int]]

    @classmethod
    def of(cls, names: Iterable[str], groups: Iterable[Modules]) -> "Bank":
        """The bank of these groups of modules."""
        pairs = ((group, place) for group in groups for place in range(len(group.names)))
        return cls(tuple(names), {group.names[place]: (group, place) for group, place in pairs})
