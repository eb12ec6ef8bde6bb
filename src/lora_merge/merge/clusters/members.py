"""What the clusters of a LoRA-LEGO merge are made of: summed up, and written beside the recipe."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from textwrap import indent, wrap
from typing import Any

import yaml

from lora_merge.adapters.module_names import place_of
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


@dataclass(frozen=True)
class ClusterSums:
    """Several clusters taken together.

    Attributes:
        units: How many they are.
        members: Units in one, on average.
        alone: Share of them whose members are of one adapter.
        alike: Mean of their similarities.
        lost: Share of their members' energy that the result no longer does.
    """

    units: int
    members: float
    alone: float
    alike: float
    lost: float

    @staticmethod
    def of(clusters: Sequence[Cluster]) -> "ClusterSums":
        """Sum up; there must be one."""
        count = len(clusters)
        energies = [sum(m.energy for m in c.members) for c in clusters]
        lost = sum(e * c.lost for e, c in zip(energies, clusters, strict=True))
        return ClusterSums(
            units=count,
            members=sum(len(c.members) for c in clusters) / count,
            alone=sum(len(c.adapters) == 1 for c in clusters) / count,
            alike=sum(c.similarity for c in clusters) / count,
            lost=lost / sum(energies) if sum(energies) else 0.0,
        )


@dataclass(frozen=True)
class Sharing:
    """What becomes of one adapter's energy.

    Attributes:
        shared: Share of it in units that each adapter has members in; all of it for itself.
        alone: Share in units of its own.
        lost: Share that the result no longer does.
    """

    shared: tuple[float, ...]
    alone: float
    lost: float


def by_kind(clusters: Sequence[Cluster]) -> dict[str, ClusterSums]:
    """Kind of module → its clusters summed up, and all of them."""
    kinds: dict[str, list[Cluster]] = {}
    for cluster in clusters:
        kinds.setdefault(place_of(cluster.module.partition("[")[0]).part, []).append(cluster)
    sums = {kind: ClusterSums.of(members) for kind, members in kinds.items()}
    return {**sums, "all modules": ClusterSums.of(clusters)}


def by_module(clusters: Sequence[Cluster]) -> dict[str, list[Cluster]]:
    """Module (or expert) → its clusters, in order."""
    modules: dict[str, list[Cluster]] = {}
    for cluster in clusters:
        modules.setdefault(cluster.module, []).append(cluster)
    return modules


def sharing(clusters: Sequence[Cluster], adapters: int) -> list[Sharing]:
    """For each adapter how much of its energy sits in units with each other one, and is lost."""
    found = []
    for i in range(adapters):
        total = alone = lost = 0.0
        shared = [0.0] * adapters
        for cluster in clusters:
            own = sum(m.energy for m in cluster.members if m.adapter == i)
            if not own:
                continue
            total += own
            alone += own if cluster.adapters == (i,) else 0.0
            for j in cluster.adapters:
                shared[j] += own
            lost += sum(
                m.energy * (1 - min(max(m.kept, 0.0), 1.0))
                for m in cluster.members
                if m.adapter == i
            )
        scale = 1 / total if total else 0.0
        found.append(Sharing(tuple(s * scale for s in shared), alone * scale, lost * scale))
    return found


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
    head = yaml.safe_dump({"units": {"adapters": list(names)}}, sort_keys=False, width=100)
    body = "".join(f"    {json.dumps(name)}:\n{_folded(text)}" for name, text in lines.items())
    return f"{_LEGEND}{head}  modules:\n{body}"


def _folded(text: str) -> str:
    """A text of YAML on several lines; PyYAML takes twenty times as long, 2 % of a small merge."""
    lines = wrap(text, 92, break_long_words=False, break_on_hyphens=False)
    return indent("'" + "\n".join(lines) + "'\n", "      ")


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
