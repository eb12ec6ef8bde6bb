"""The clusters of a merge as a page: who shares units with whom, and every unit's members."""

from collections.abc import Sequence
from html import escape

from lora_merge.files.pages.html_page import Cell, html_page, html_table
from lora_merge.merge.clusters.members import Cluster, ClusterSums, by_kind, by_module, sharing
from lora_merge.printing import short_names

_FOOTER = (
    "A unit of the result is made of its members, units of the adapters (of singular units the "
    "largest is 0; % of the adapter's energy in the module). Alone: of units with members of one "
    "adapter only. Alike: mean cosine of the members with their unit. Lost: share of the members' "
    "energy that the result no longer does; a unit that is lost whole was too small for its rank."
)


def clusters_page(clusters: Sequence[Cluster], adapters: Sequence[str]) -> str:
    """The page as HTML; needs no script.

    Args:
        clusters: Of all modules; one at least.
        adapters: The adapters' names, by index.
    """
    names = short_names(adapters)
    body = (
        "<section><h2>By kind of module</h2>\n"
        + html_table(
            ("kind", "units", "members", "alone", "alike", "lost"),
            [(kind, *_cells(sums)) for kind, sums in by_kind(clusters).items()],
        )
        + "</section>\n<section><h2>Who shares units with whom, by energy</h2>\n"
        + html_table(
            ("adapter", *names, "alone", "lost"),
            [
                (
                    names[i],
                    *(_share(s) if j != i else "" for j, s in enumerate(one.shared)),
                    _share(one.alone),
                    _share(one.lost),
                )
                for i, one in enumerate(sharing(clusters, len(names)))
            ],
        )
        + "</section>\n<section><h2>Every module</h2>\n"
        + "".join(_module(name, parts, names) for name, parts in by_module(clusters).items())
        + "</section>\n"
    )
    lead = f"{len(clusters)} units of {len(adapters)} adapters: {', '.join(names)}"
    return html_page("Clusters of rank-one units", lead, body, footer=_FOOTER)


def _module(name: str, clusters: Sequence[Cluster], names: Sequence[str]) -> str:
    sums = ClusterSums.of(clusters)
    rows = [
        (
            str(cluster.unit),
            Cell(
                ", ".join(
                    f"{'-' if m.sign < 0 else ''}{names[m.adapter]} {m.unit} ({m.energy:.0%})"
                    for m in cluster.members
                ),
                numeric=False,
            ),
            f"{cluster.similarity:.2f}",
            _share(cluster.lost),
        )
        for cluster in clusters
    ]
    return (
        f"<details><summary><b>{escape(name)}</b>: {sums.units} units, {100 * sums.lost:.1f} % "
        f"lost</summary>{html_table(('unit', 'members', 'alike', 'lost'), rows)}</details>\n"
    )


def _cells(sums: ClusterSums) -> tuple[Cell | str, ...]:
    alike = f"{sums.alike:.2f}"
    return str(sums.units), f"{sums.members:.1f}", _share(sums.alone), alike, _share(sums.lost)


def _share(value: float) -> Cell:
    return Cell(f"{100 * value:.1f} %", heat=value)
