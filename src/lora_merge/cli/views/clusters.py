"""The clusters of a merge for a terminal: by kind of module, by adapter, and one module in full."""

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from lora_merge.cli.shared.output import percent
from lora_merge.cli.shared.table import table
from lora_merge.merge.clusters.members import Cluster, ClusterSums, by_kind, by_module, sharing
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
    kinds = table("kind", "units", "members", "alone", "alike", "lost")
    for kind, sums in by_kind(clusters).items():
        alone, lost = percent(sums.alone), percent(sums.lost)
        numbers = str(sums.units), f"{sums.members:.1f}", alone, f"{sums.alike:.2f}", lost
        kinds.add_row(escape(kind), *numbers)
    modules = by_module(clusters)
    worst = module or max(modules, key=lambda name: ClusterSums.of(modules[name]).lost)
    listing = table(f"units of {worst}", "alike", "lost")
    for cluster in modules[worst]:
        who = ", ".join(
            f"{names[m.adapter]} {m.unit} ({m.energy:.0%})" for m in cluster.members[:6]
        )
        more = f" and {len(cluster.members) - 6} more" if len(cluster.members) > 6 else ""
        listing.add_row(
            Text(f"{cluster.unit}: {who}{more}"), f"{cluster.similarity:.2f}", percent(cluster.lost)
        )
    return [kinds, _sharing(clusters, names), listing, _LEGEND]


def _sharing(clusters: Sequence[Cluster], names: Sequence[str]) -> RenderableType:
    heads = [str(i + 1) for i in range(len(names))]
    grid = table("shares units with (by energy)", *heads, "alone", "lost")
    for i, (name, one) in enumerate(zip(names, sharing(clusters, len(names)), strict=True)):
        cells = ["-" if j == i else percent(share) for j, share in enumerate(one.shared)]
        grid.add_row(f"{i + 1} {escape(name)}", *cells, percent(one.alone), percent(one.lost))
    return grid
