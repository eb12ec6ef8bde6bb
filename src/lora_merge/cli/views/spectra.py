"""Spectra for a terminal: the overview of one adapter, several side by side, a list of modules."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from lora_merge.adapters.measured.spectra import AdapterSpectra, ModuleSpectrum
from lora_merge.analysis.advice import (
    Advice,
    Group,
    advise,
    group_modules,
    single_groups,
    sort_modules,
    total_group,
)
from lora_merge.cli.shared.table import middle
from lora_merge.cli.views.format import dashed, number, shorten
from lora_merge.cli.views.glyphs import common_floor, median_profile, sparkline
from lora_merge.cli.views.grid import grid, room_for
from lora_merge.cli.views.heat_map import adapter_map, kind_map
from lora_merge.printing import short_names

# Columns that a name and a sparkline get at least; a narrow terminal loses the spectral norm.
_LEAST_LABEL, _LEAST_LINE = 14, 4
_LEGEND = (
    "medians over a row's modules; {norm}F, {norm}2: Frobenius and spectral norm of the delta; "
    "stable: {norm}F^2 / {norm}2^2; erank: Roy-Vetterli, exp(entropy of s / sum s); k: rank that "
    "holds 90, 95, 99 % of the energy (sum s^2); spectrum: log s, lowest block {floor} s_1"
)


def overview(spectra: AdapterSpectra, *, width: int, metric: str, plain: bool) -> RenderableType:
    """One adapter on one screen."""
    groups, total = group_modules(spectra), total_group(spectra)
    return Stack(
        _header(spectra, width),
        group_table(groups, total, width=width, plain=plain),
        kind_map(spectra, width=width, metric=metric),
        advice_view(advise(spectra), width=width, plain=plain),
    )


def several(
    all_spectra: Sequence[AdapterSpectra], *, width: int, metric: str, plain: bool
) -> RenderableType:
    """Several adapters: a row each, on shared scales, and what rank each needs."""
    titles = short_names([s.adapter for s in all_spectra])
    totals = [
        replace(total_group(s), label=title) for s, title in zip(all_spectra, titles, strict=True)
    ]
    parts: list[RenderableType] = [
        group_table(totals, None, width=width, plain=plain),
        adapter_map(all_spectra, width=width, metric=metric),
    ]
    for title, spectra in zip(titles, all_spectra, strict=True):
        advice = advise(spectra)
        parts.append(Text(title, style="bold"))
        parts.append(Padding(Text(advice.headline), (0, 0, 0, 2), expand=False))
        parts.extend(_remarks(advice))
    return Stack(*parts)


def module_list(
    modules: Sequence[ModuleSpectrum], *, sort: str, top: int | None, width: int, plain: bool
) -> RenderableType:
    """Modules one by one, sorted."""
    ordered = sort_modules(modules, sort)[:top]
    table = group_table(single_groups(ordered), None, width=width, plain=plain)
    count = Text(f"{len(ordered)} of {len(modules)} modules, by {sort}", style="dim")
    return Stack(table, count) if len(ordered) < len(modules) else table


def group_table(
    groups: Sequence[Group], total: Group | None, *, width: int, plain: bool
) -> RenderableType:
    """Rows of numbers and a sparkline each, sparklines on one scale."""
    rows = [*groups, *([total] if total else [])]
    norm = "|D|" if plain else "‖Δ‖"
    with_layers = any(g.layers for g in groups)
    heads = ["layer"] * with_layers + ["r", f"{norm}F", f"{norm}2", "stable", "erank"]
    heads += ["k90", "95", "99"]
    cells = [_cells(group, with_layers) for group in rows]
    if room_for(heads, cells, width) < _LEAST_LABEL + _LEAST_LINE + 1:
        spectral = heads.index(f"{norm}2")
        for row in (heads, *cells):
            del row[spectral]
    room = room_for(heads, cells, width) - 1
    longest, rank = max(len(g.label) for g in rows), max(g.rank[1] for g in groups)
    label = min(longest, max(room - min(rank, 16), _LEAST_LABEL))
    length = max(_LEAST_LINE, min(rank, 32, room - label))
    profiles = [median_profile([m.values for m in g.modules], length) for g in rows]
    floor = common_floor(profiles)
    lines: list[list[str | Text]] = [
        [
            Text(shorten(group.label, label), style="" if group.ranks_at else "red"),
            *numbers,
            Text(sparkline(profile, floor, ascii_only=plain), style="cyan"),
        ]
        for group, numbers, profile in zip(rows, cells, profiles, strict=True)
    ]
    heads = ["module", *heads, "spectrum" if length >= 8 else "log s"[:length]]
    ruled = [len(groups)] if total else []
    table = grid(heads, lines, left=(0, len(heads) - 1), ruled=ruled, plain=plain)
    legend = _LEGEND.format(norm=norm, floor=f"{10**floor:.2g}")
    return Stack(table, Text(legend, style="dim"), Text(""))


def advice_view(advice: Advice, *, width: int, plain: bool) -> RenderableType:
    """The sentence, the ways to shrink, and the option of `resize` that does each."""
    parts: list[RenderableType] = [Text(advice.headline, style="bold")]
    if advice.options:
        rows: list[list[str | Text]] = [
            [
                option.text,
                f"{100 * option.energy:.1f} %",
                f"{100 * option.parameters:.0f} %",
                dashed(option.ranks),
                Text(option.flag, style="cyan"),
            ]
            for option in advice.options
        ]
        heads = ["keep", "energy", "parameters", "rank", "lora-merge resize ..."]
        table = grid(heads, rows, left=(0, 4), gap=2, plain=plain)
        if max(map(len, table.plain.splitlines())) > width:  # the options say it too
            rows, heads = [row[1:] for row in rows], heads[1:]
            table = grid(heads, rows, left=(3,), gap=2, plain=plain)
        parts.append(table)
        warning = "energy stands in for quality: measure the task after resizing"
        parts.append(Text(warning, style="dim"))
    return Stack(*parts, *_remarks(advice))


def _cells(group: Group, with_layers: bool) -> list[str]:
    cells = [dashed(group.layers) if group.layers else ""] * with_layers + [dashed(group.rank)]
    if not group.ranks_at:
        return [*cells, "NaN/inf", *[""] * 6]
    cells += [number(group.frobenius), number(group.spectral)]
    cells += [f"{group.stable_rank:.1f}", f"{group.effective_rank:.1f}"]
    return cells + [str(group.ranks_at[level]) for level in (0.9, 0.95, 0.99)]


def _remarks(advice: Advice) -> list[RenderableType]:
    return [Padding(Text(f"- {remark}"), (0, 0, 0, 2), expand=False) for remark in advice.remarks]


def _header(spectra: AdapterSpectra, width: int) -> Text:
    specs = spectra.specs.values()
    parameters = sum(s.num_parameters for s in specs)
    dtypes = ", ".join(sorted({s.dtype for s in specs}))
    text = Text(middle(spectra.adapter, width), style="bold")
    if spectra.base_model:
        base = f"  for {spectra.base_model}"
        apart = "" if len(text) + len(base) <= width else "\n"
        text.append(apart + middle(base, width), style="not bold")
    text.append(
        f"\n{len(spectra.modules)} modules, {parameters:,} parameters ({dtypes}), "
        f"all deltas together: Frobenius norm {number(spectra.frobenius)}\n",
        style="not bold",
    )
    return text
