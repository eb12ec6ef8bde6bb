"""The experts that a pass runs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_merge.mixture.runtime.call.modules import Modules

_FEW = 8  # experts that are run together even if one alone acts
_KEPT = 16  # sets of experts that are kept ready to run by themselves

Places = Mapping[str, tuple[Modules, int]]


@dataclass(frozen=True, eq=False)
class Bank:
    """A mixture's experts as they are in a model at one time; another set of them is another bank.

    A gate in force names its bank, so calls and blocks that have begun keep the experts they began
    with while others are added and removed.

    Attributes:
        names: Of the gated experts, in the order of the gate's columns.
        places: Name of a wrapped module -> its group and its place there.
        index: What chooses experts by a prompt, or None.
        narrow: Makes groups of some experts alone, by their numbers; None where nobody can.
        marks: What tells each expert from another of its name: a hash, or its file's size and time.
    """

    names: tuple[str, ...]
    places: Places
    index: Any = None
    narrow: Callable[["Bank", tuple[int, ...]], Iterable[Modules] | None] | None = None
    marks: tuple[str, ...] = ()
    _alone: dict[tuple[int, ...], "Bank"] = field(default_factory=dict)

    def may_narrow(self, active: int) -> bool:
        """Whether so many experts would run much faster without the others."""
        return self.narrow is not None and len(self.names) >= max(_FEW, 2 * active)

    def alone(self, active: tuple[int, ...]) -> "Bank | None":
        """These experts alone, in this order; None if they are too many to be worth it.

        The last few such sets are kept, so memory is that of a few more copies of their experts.
        """
        if self.narrow is None or not self.may_narrow(len(active)):
            return None
        found = self._alone.get(active)
        if found is None:
            groups = self.narrow(self, active)
            if groups is None:
                return None
            names = tuple(self.names[e] for e in active)
            marks = tuple(self.marks[e] for e in active)
            found = Bank(names, groups_by_name(groups), marks=marks)
            while len(self._alone) >= _KEPT:
                self._alone.pop(next(iter(self._alone)), None)
            self._alone[active] = found
        return found

    @property
    def identities(self) -> tuple[tuple[str, str], ...]:
        """Name and mark of each expert."""
        return tuple(zip(self.names, self.marks, strict=True))

    @cached_property
    def groups(self) -> list[Modules]:
        """All modules, each group once."""
        return list({id(group): group for group, _ in self.places.values()}.values())

    def settle(self) -> None:
        """Have all modules look at what does not change inside a call."""
        for group in self.groups:
            group.settle()

    def forget(self) -> None:
        """What runs has been moved or changed: copies of it are none any more."""
        self._alone.clear()


def groups_by_name(groups: Iterable[Modules]) -> Places:
    """Each module's group and its place there."""
    pairs = ((group, place) for group in groups for place in range(len(group.names)))
    return {group.names[place]: (group, place) for group, place in pairs}
