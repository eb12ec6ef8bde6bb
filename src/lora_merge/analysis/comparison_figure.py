"""A comparison as a figure of matplotlib (the `plot` extra)."""

from typing import TYPE_CHECKING

import numpy as np

from lora_merge.analysis.compare import Comparison
from lora_merge.analysis.families import Tree, tree_of
from lora_merge.analysis.pairs.matrices import divide
from lora_merge.files.pages.pictures import figure_class
from lora_merge.printing import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

_MOST_NUMBERS = 12  # adapters up to which every cell has room for its number


def draw_comparison(comparison: Comparison) -> "Figure":
    """The tree of the adapters, their cosines and their interference, in the order of the tree.

    Cosines are drawn on the whole scale from -1 to 1, whatever they are; interference from 0.

    Args:
        comparison: Of two adapters or more; two have no tree.

    Raises:
        LoraMergeError: If matplotlib is not installed.
    """
    total, names = comparison.total, short_names(comparison.adapters)
    tree = tree_of(total.cosine) if len(names) > 2 else None
    order = list(tree.order) if tree else list(range(len(names)))
    side = 1.6 + 0.42 * max(4, len(names))
    figure = figure_class()(figsize=(2.6 * bool(tree) + 2 * side + 1.6, side), layout="constrained")
    widths = ([1] if tree else []) + [side / 2.2] * 2
    axes = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    shown = [n if len(n) <= 28 else f"{n[:13]}…{n[-14:]}" for n in (names[i] for i in order)]
    if tree:
        _draw_tree(axes.pop(0), tree, shown)
    times = divide(total.interference, total.chance_interference)
    highest = max(2.0, float(times.fill_diagonal_(0).max()))
    panels = (
        ("cosine of the deltas", total.cosine, "RdBu_r", (-1.0, 1.0)),
        ("interference, times chance", times, "cividis", (0.0, highest)),
    )
    for index, (title, values, colours, limits) in enumerate(panels):
        _draw_matrix(axes[index], values[order][:, order], title, colours, limits)
        axes[index].set_xticks(range(len(shown)), shown, rotation=40, ha="right")
        axes[index].set_yticks(range(len(shown)), shown if index or not tree else [""] * len(shown))
    return figure


def _draw_matrix(
    axes: "Axes", values: "Tensor", title: str, colours: str, limits: tuple[float, float]
) -> None:
    image = axes.imshow(values.numpy(), cmap=colours, vmin=limits[0], vmax=limits[1])
    axes.set_title(title, fontsize=10)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    count = len(values)
    if count > _MOST_NUMBERS:
        return
    for row in range(count):
        for column in range(count):
            value = float(values[row, column])
            red, green, blue, _ = image.to_rgba(np.array([value]))[0]
            ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            text = f"{value + 0.0:.2f}".replace("-0.00", "0.00")
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)


def _draw_tree(axes: "Axes", tree: Tree, names: list[str]) -> None:
    """Leaves at the right, beside the rows of the first matrix."""
    height = dict.fromkeys(range(len(names)), 0.0)
    place = {leaf: float(row) for row, leaf in enumerate(tree.order)}
    for index, ((a, b), top) in enumerate(zip(tree.merges, tree.heights, strict=True)):
        corners = [(height[a], place[a]), (top, place[a]), (top, place[b]), (height[b], place[b])]
        axes.plot(*np.array(corners).T, color="#0072B2")
        node = len(names) + index
        height[node], place[node] = top, (place[a] + place[b]) / 2
    axes.set_xlim(max(1.0, *tree.heights) * 1.05, 0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.yaxis.tick_right()
    axes.set_xlabel("1 - cosine")
    axes.set_title("average linkage", fontsize=10)
    for edge in ("top", "left"):
        axes.spines[edge].set_visible(False)
