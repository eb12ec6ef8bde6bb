"""The clusters of a merge for a terminal: by kind of module, by adapter, and one module in full."""

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from lora_merge.adapters.module_names import place_of
from lora_merge.cli.shared.output import percent, table
from lora_merge.merge.clusters import Cluster
from lora_merge.printing import short_names

_LEGEND = (
    "alone: units with members of one adapter only; alike: mean cosine of the members with their "
    "unit;\nlost: share of the members' energy that the result no longer does. A unit that is lost "
    "whole was too\nsmall for its rank: a larger --rank keeps it."
)


def clusters_data(clusters: Sequence[Cluster], adapters: Sequence[str]) -> dict[str, Any]:
    """All clusters as JSON values."""
    return {
        "schema": 1,
        "adapters": list(adapters),
        "clusters": [cluster.to_dict() for cluster in clusters],
    }


def clusters_view(
    clusters: Sequence[Cluster], adapters: Sequence[str], *, module: str | None = None
) -> list[RenderableType]:
    """Who shares units with whom, what is lost, and the module that loses most (or `module`)."""
    names = short_names(adapters)
    kinds: dict[str, list[Cluster]] = {}
    for cluster in clusters:
        kinds.setdefault(place_of(cluster.module.partition("[")[0]).part, []).append(cluster)
    by_kind = table("kind", "units", "members", "alone", "alike", "lost")
    for kind, members in [*kinds.items(), ("all modules", list(clusters))]:
        by_kind.add_row(escape(kind), *_row(members))
    by_module: dict[str, list[Cluster]] = {}
    for cluster in clusters:
        by_module.setdefault(cluster.module, []).append(cluster)
    worst = module or max(by_module, key=lambda name: _lost(by_module[name]))
    listing = table(f"units of {worst}", "alike", "lost")
    for cluster in by_module[worst]:
        who = ", ".join(
            f"{names[m.adapter]} {m.unit} ({m.energy:.0%})" for m in cluster.members[:6]
        )
        more = f" and {len(cluster.members) - 6} more" if len(cluster.members) > 6 else ""
        listing.add_row(
            Text(f"{cluster.unit}: {who}{more}"), f"{cluster.similarity:.2f}", percent(cluster.lost)
        )
    return [by_kind, _sharing(clusters, names), listing, _LEGEND]


def _sharing(clusters: Sequence[Cluster], names: Sequence[str]) -> RenderableType:
    """For each adapter how much of its energy sits in units with each other one, and is lost."""
    count = len(names)
    heads = [str(i + 1) for i in range(count)]
    grid = table("shares units with (by energy)", *heads, "alone", "lost")
    for i, name in enumerate(names):
        total = alone = lost = 0.0
        shared = [0.0] * count
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
        cells = ["-" if j == i else percent(shared[j] * scale) for j in range(count)]
        grid.add_row(
            f"{i + 1} {escape(name)}", *cells, percent(alone * scale), percent(lost * scale)
        )
    return grid


def _row(members: Sequence[Cluster]) -> list[str]:
    count = len(members)
    alone = sum(len(c.adapters) == 1 for c in members) / count
    alike = sum(c.similarity for c in members) / count
    size = sum(len(c.members) for c in members) / count
    return [str(count), f"{size:.1f}", percent(alone), f"{alike:.2f}", percent(_lost(members))]


def _lost(members: Sequence[Cluster]) -> float:
    energies = [sum(m.energy for m in c.members) for c in members]
    total = sum(energies)
    return sum(e * c.lost for e, c in zip(energies, members, strict=True)) / total if total else 0.0
