"""Deltas beside the base model, for a terminal."""

from statistics import median

from rich.console import Group, RenderableType
from rich.text import Text

from lora_merge.adapters.module_names import labels, place_of
from lora_merge.analysis.beside_base import BaseRelation, BaseReport
from lora_merge.cli.views.format import number, shorten
from lora_merge.cli.views.grid import grid

_LEGEND = (
    "medians by kind of module; W: base weight, D: delta; amplif.: |D|F / |U^T W V|F, how "
    "much D strengthens directions W already has; intruders: leading directions of W + D that "
    "resemble none of W's (of 10 per module)"
)


def base_view(report: BaseReport, adapter: str, *, plain: bool) -> RenderableType:
    """Relative norms, amplification and intruders by kind of module."""
    kinds: dict[str, list[BaseRelation]] = {}
    places = {r.module: place_of(r.module.partition("[")[0]) for r in report.relations}
    names = labels(places.values())
    for relation in report.relations:
        place = places[relation.module]
        kinds.setdefault(names[place.stack, place.kind], []).append(relation)
    rows = [_row(shorten(kind, 28), members) for kind, members in kinds.items()]
    parts: list[RenderableType] = [Text(f"\n{adapter} beside its base model", style="bold")]
    if rows:
        heads = ["module", "count", "|D|F/|W|F", "largest", "|D|2/|W|2", "amplif.", "intruders"]
        if all(relation.intruders is None for relation in report.relations):
            heads, rows = heads[:-1], [row[:-1] for row in rows]
        parts.append(grid(heads, rows, plain=plain))
        parts.append(Text(_LEGEND, style="dim"))
    if report.missing:
        first = report.missing[0]
        parts.append(
            Text(f"- {len(report.missing)} modules have no weight there: {first}", style="red")
        )
    return Group(*parts)


def _row(kind: str, members: list[BaseRelation]) -> list[str]:
    amplified = [m.amplification for m in members if m.amplification is not None]
    counted = [m.intruders for m in members if m.intruders is not None]
    return [
        kind,
        str(len(members)),
        _percent(median(m.relative for m in members)),
        _percent(max(m.relative for m in members)),
        _percent(median(m.relative_spectral for m in members)),
        number(median(amplified)) if amplified else "-",
        str(sum(counted)) if counted else "-",
    ]


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.1f} %"
