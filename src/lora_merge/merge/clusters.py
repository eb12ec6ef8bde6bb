"""What the clusters of a LoRA-LEGO merge are made of: summed up, and written beside the recipe."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from lora_merge.merge.report import ModuleReport

_LEGEND = """\
# What each unit of the result was made of; nothing reads this. Units stand in order, separated by
# commas. 2:0 is unit 0 of adapter 2 of this list, both counted from 0 (of singular units the
# largest is 0); -2:0 joined with its sign turned.
"""


@dataclass(frozen=True)
class Member:
    """A unit of an adapter in a cluster.

    Attributes:
        adapter: Index of the adapter.
        unit: Which of its units; of singular units 0 is the largest.
        sign: -1 where it points against the unit of the result.
        cosine: How alike it is to that unit, 0 to 1.
        kept: Share of it that the whole result still does; above 1 where others add to it.
        energy: Share of its adapter's energy in this module.
    """

    adapter: int
    unit: int
    sign: int
    cosine: float
    kept: float
    energy: float


@dataclass(frozen=True)
class Cluster:
    """A unit of the result and its members.

    Attributes:
        module: Where.
        unit: Index of the unit of the result.
        members: What was put into it, the largest first.
    """

    module: str
    unit: int
    members: tuple[Member, ...]

    @property
    def adapters(self) -> tuple[int, ...]:
        """Whose units these are."""
        return tuple(sorted({m.adapter for m in self.members}))

    @property
    def similarity(self) -> float:
        """Mean cosine of the members with the unit, by energy."""
        return _mean(self.members, [m.cosine for m in self.members])

    @property
    def lost(self) -> float:
        """Share of the members' energy that the result no longer does."""
        return _mean(self.members, [1 - min(max(m.kept, 0.0), 1.0) for m in self.members])

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "similarity": self.similarity, "lost": self.lost}


def clusters_of(modules: Sequence[ModuleReport]) -> list[Cluster]:
    """All clusters that a merge reported; none for other methods."""
    return [
        Cluster(name, index, tuple(sorted((Member(*m) for m in members), key=lambda m: -m.energy)))
        for name, parts in _reported(modules)
        for index, members in enumerate(parts)
    ]


def clusters_text(modules: Sequence[ModuleReport], names: Sequence[str]) -> str:
    """The section `units` of `lora_merge.yaml`; "" where there were no clusters."""
    lines = {
        module: ", ".join(
            " ".join(f"{'-' if m[2] < 0 else ''}{m[0]}:{m[1]}" for m in members)
            for members in parts
        )
        for module, parts in _reported(modules)
    }
    if not lines:
        return ""
    data = {"units": {"adapters": list(names), "modules": lines}}
    return _LEGEND + yaml.safe_dump(data, sort_keys=False, width=100)


def _reported(modules: Sequence[ModuleReport]) -> Iterator[tuple[str, list[list[list[Any]]]]]:
    """Module or expert → members by unit, where these are still the units of the result."""
    for module in modules:
        experts = module.said("clusters")
        for expert, parts in enumerate(experts):
            if len(parts) <= module.rank:
                yield (f"{module.name}[{expert}]" if len(experts) > 1 else module.name), parts


def _mean(members: Sequence[Member], values: Sequence[float]) -> float:
    total = sum(m.energy for m in members)
    weighted = sum(m.energy * value for m, value in zip(members, values, strict=True))
    return weighted / total if total > 0 else 0.0
