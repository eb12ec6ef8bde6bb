"""Spectra as figures of matplotlib (the `plot` extra)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_merge.adapters.measured.spectra import AdapterSpectra, ModuleSpectrum
from lora_merge.adapters.module_names import labels
from lora_merge.analysis.metrics import LOG_METRICS, METRIC_LABELS, METRICS
from lora_merge.files.pages.pictures import figure_class
from lora_merge.ranks.measures import tail_energy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind eyes; line styles repeat the distinction.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")


def draw(spectra: Sequence[AdapterSpectra], metric: str = "frobenius") -> "Figure":
    """One row per adapter: heat map, spectra by kind of module, energy curves; shared scales.

    Raises:
        LoraMergeError: If matplotlib is not installed.
    """
    figure_of = figure_class()
    rows = len(spectra)
    figure = figure_of(figsize=(14, 0.6 + 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False, width_ratios=(1.25, 1, 1))
    norm = _shared_norm(spectra, metric)
    for row, one in zip(axes, spectra, strict=True):
        image = _heat_map(row[0], one, metric, norm)
        if image is not None:
            _colour_scale(figure, image, row[0], METRIC_LABELS[metric])
        row[0].set_title(one.adapter if len(one.adapter) < 48 else "…" + one.adapter[-46:])
        _curves(row[1], one, energy=False)
        _curves(row[2], one, energy=True)
    for column in (1, 2):
        _share_limits([row[column] for row in axes])
    return figure


def _heat_map(axes: "Axes", spectra: AdapterSpectra, metric: str, norm: Any) -> Any:
    names = labels(m.place for m in spectra.modules)
    layers = sorted({m.place.layer for m in spectra.finite if m.place.layer is not None})
    kinds = list(dict.fromkeys(names.values()))
    grid = np.full((len(kinds), max(len(layers), 1)), np.nan)
    for module in spectra.finite:
        if module.measures is None or module.status != "ok":
            continue
        row = kinds.index(names[module.place.stack, module.place.kind])
        column = layers.index(module.place.layer) if module.place.layer is not None else 0
        grid[row, column] = np.nanmax([grid[row, column], METRICS[metric](module.measures)])
    if np.isnan(grid).all():
        axes.text(0.5, 0.5, "nothing to show", ha="center", transform=axes.transAxes)
        return None
    image = axes.imshow(grid, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(kinds)), kinds)
    step = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), step), [str(n) for n in layers[::step]])
    axes.set_xlabel("layer")
    return image


def _colour_scale(figure: "Figure", image: Any, axes: "Axes", label: str) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator

    bar = figure.colorbar(image, ax=axes, label=label)
    if isinstance(image.norm, LogNorm):  # 0.5, not 5 x 10^-1
        bar.locator = LogLocator(subs=(1, 2, 5))
        bar.formatter = FuncFormatter(lambda value, _: f"{value:g}")
        bar.minorticks_off()


def _curves(axes: "Axes", spectra: AdapterSpectra, *, energy: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    names = labels(m.place for m in spectra.modules)
    kinds: dict[str, list[ModuleSpectrum]] = {}
    for module in spectra.finite:
        if module.status == "ok":
            kinds.setdefault(names[module.place.stack, module.place.kind], []).append(module)
    for index, (kind, members) in enumerate(kinds.items()):
        table = _table(members, energy)
        x = np.arange(1, table.shape[1] + 1)
        colour, dashes = _COLOURS[index % 7], _STYLES[index // 7 % 4]
        axes.plot(x, np.median(table, axis=0), label=kind, color=colour, linestyle=dashes)
        if len(members) > 2:
            low, high = np.quantile(table, (0.1, 0.9), axis=0)
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("i (rank)" if energy else "i")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    if energy:
        axes.set_ylabel("energy in the first i (% of sum s²)")
        axes.axhline(95, color="black", linewidth=0.8, linestyle=":", label="95 %")
        axes.legend(*([part[-1:] for part in axes.get_legend_handles_labels()]), loc="lower right")
        axes.set_title("median energy curve")
    else:
        axes.set_ylabel("s_i / s_1 (log scale)")
        axes.set_yscale("log")
        axes.set_title("median spectrum, 10-90 % band")
        if kinds:
            axes.legend(fontsize="x-small")


def _table(members: Sequence[ModuleSpectrum], energy: bool) -> "np.ndarray[Any, Any]":
    """Curves of several modules as rows; values below 1e-6 of the first are drawn there."""
    size = max(len(m.values) for m in members)
    table = torch.zeros(len(members), size, dtype=torch.float64)
    for row, module in zip(table, members, strict=True):
        values = module.values
        if energy:
            row[:] = 100.0
            row[: len(values)] = 100 * (1 - tail_energy(values)[1:] / values.square().sum())
        else:
            row[: len(values)] = values / values[0]
    return (table if energy else table.clamp_min(1e-6)).numpy()


def _shared_norm(spectra: Sequence[AdapterSpectra], metric: str) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    shown = [METRICS[metric](m.measures) for s in spectra for m in s.finite if m.measures]
    shown = [v for v in shown if v > 0]
    if not shown:
        return Normalize(0, 1)
    low, high = min(shown), max(shown)
    if metric in LOG_METRICS and high > low:
        return LogNorm(low, high)
    return Normalize(low, high if high > low else low + 1)


def _share_limits(axes: Sequence["Axes"]) -> None:
    for get, put in (("get_xlim", "set_xlim"), ("get_ylim", "set_ylim")):
        limits = [getattr(a, get)() for a in axes]
        for a in axes:
            getattr(a, put)(min(low for low, _ in limits), max(high for _, high in limits))
