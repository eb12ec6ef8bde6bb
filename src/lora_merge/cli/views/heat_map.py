"""Layer x module heat maps: a digit and a colour per cell, readable without either."""

import math
from collections.abc import Mapping, Sequence

from rich.text import Text

from lora_merge.adapters.measured.spectra import AdapterSpectra
from lora_merge.adapters.module_names import Place, labels
from lora_merge.analysis.metrics import LOG_METRICS, METRICS
from lora_merge.cli.views.format import number, shorten
from lora_merge.cli.views.glyphs import RAMP, level
from lora_merge.printing import short_names

METRIC_NAMES = {
    "frobenius": "Frobenius norm",
    "spectral": "largest singular value",
    "stable": "stable rank",
    "erank": "effective rank (Roy-Vetterli)",
    "k95": "rank for 95 % of the energy",
    "top1": "share of the energy in the first direction",
}
Row = Mapping[int | None, float]


def kind_map(spectra: AdapterSpectra, *, width: int, metric: str) -> Text:
    """Layers across, kinds of modules down."""
    found = _by_place(spectra, metric)
    names = labels(m.place for m in spectra.modules)
    rows = {
        name: row
        for key, name in names.items()
        if (row := {p.layer: v for p, v in found.items() if (p.stack, p.kind) == key})
        and None not in row
    }
    return heat_map(rows, f"{METRIC_NAMES[metric]} by layer", width, log=metric in LOG_METRICS)


def adapter_map(all_spectra: Sequence[AdapterSpectra], *, width: int, metric: str) -> Text:
    """Layers across, adapters down; a cell is the largest of its layer's modules."""
    rows: dict[str, dict[int | None, float]] = {}
    titles = short_names([s.adapter for s in all_spectra])
    for title, spectra in zip(titles, all_spectra, strict=True):
        row = rows.setdefault(title, {})
        for place, value in _by_place(spectra, metric).items():
            row[place.layer] = max(value, row.get(place.layer, value))
    title = f"{METRIC_NAMES[metric]} by layer, the largest of its modules"
    return heat_map(rows, title, width, log=metric in LOG_METRICS)


def heat_map(rows: Mapping[str, Row], title: str, width: int, *, log: bool) -> Text:
    """Cells on one scale; nothing where there are fewer than two layers.

    Args:
        rows: Label → layer → value.
        title: Said above.
        width: Columns there are; neighbouring layers share a cell if they do not fit.
        log: Whether the scale is logarithmic.
    """
    layers = sorted({n for row in rows.values() for n in row if n is not None})
    shown = [v for row in rows.values() for v in row.values() if not log or v > 0]
    if not shown or len(layers) < 2:
        return Text("")
    low, high = min(shown), max(shown)
    label = min(max(map(len, rows)), max(14, width // 3))
    room = width - label - 1
    size = max(1, min(4, room // len(layers)))
    columns = _columns(layers, room // size)
    text = Text(f"{title}\n", style="bold")
    text.append(" " * (label + 1) + _ruler(columns, size) + "\n", style="not bold dim")
    for name, row in rows.items():
        text.append(f"{shorten(name, label):<{label}} ", style="not bold")
        for column in columns:
            values = [row[n] for n in column if n in row]
            text.append_text(_cell(values, low, high, log, size))
        text.append("\n")
    for step in range(10):
        text.append(str(step), style=_style(step))
    notes = f" = {number(low)} to {number(high)}{', log scale' if log else ''}"
    if any(len(column) > 1 for column in columns):
        notes += "; a cell shows the largest of its layers"
    if any(n not in row for row in rows.values() for n in layers):
        notes += "; . not adapted"
    return text.append(notes + "\n", style="not bold dim")


def _by_place(spectra: AdapterSpectra, metric: str) -> dict[Place, float]:
    """Metric by place; of several experts, the largest."""
    found: dict[Place, float] = {}
    for module in spectra.finite:
        if module.measures:
            value = METRICS[metric](module.measures)
            found[module.place] = max(value, found.get(module.place, value))
    return found


def _columns(layers: Sequence[int], room: int) -> list[list[int]]:
    """Layers by column; neighbours share one where the terminal is too narrow."""
    per = max(1, math.ceil(len(layers) / max(room, 1)))
    return [list(layers[i : i + per]) for i in range(0, len(layers), per)]


def _ruler(columns: Sequence[Sequence[int]], size: int) -> str:
    """Layer numbers over their columns, as many as fit apart."""
    line = ""
    for index in range(0, len(columns), max(1, -(-4 // size))):
        line = line.ljust(index * size) + str(columns[index][0]).center(min(size, 3))
    return line.rstrip()


def _cell(values: Sequence[float], low: float, high: float, log: bool, size: int) -> Text:
    if not values:
        return Text(".".center(size), style="not bold dim")
    value = max(values)
    if log and value <= 0:
        return Text("-".center(size), style="not bold dim")
    step = level(value, low, high, log=log)
    return Text(str(step).center(size), style=_style(step))


def _style(step: int) -> str:
    return f"not bold {'white' if step < 5 else 'black'} on {RAMP[step]}"
