"""Principal angles between adapters' spaces on single modules, for a terminal."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from lora_merge.analysis.pairs.matrices import PairMatrices
from lora_merge.cli.views.format import shorten
from lora_merge.cli.views.glyphs import bar, share_line
from lora_merge.cli.views.grid import grid

if TYPE_CHECKING:
    from torch import Tensor

_MOST_PAIRS = 10


def degrees(cosine: "Tensor | float", plain: bool) -> str:
    """The angle of a cosine in whole degrees."""
    angle = math.degrees(math.acos(min(max(float(cosine), 0.0), 1.0)))
    return f"{angle:.0f}" if plain else f"{angle:.0f}°"


def angles_view(
    modules: Sequence[PairMatrices],
    hidden: int,
    pairs: Sequence[tuple[int, int]],
    names: Sequence[str],
    *,
    width: int,
    plain: bool,
) -> RenderableType:
    """Every angle of two adapters, or a line of cosines for each pair of several.

    Args:
        modules: Single modules, compared with `angles=True`.
        hidden: Further modules that are not shown.
        pairs: Indices of the pairs, the most telling first.
        names: Short names of the adapters.
        width: Columns.
        plain: Without block characters.
    """
    parts: list[RenderableType] = []
    for module in modules:
        parts.append(Text(f"principal angles of {shorten(module.label, width - 20)}", style="bold"))
        if not bool(module.dimensions[tuple(zip(*pairs, strict=True))].any()):
            parts += [Text("no two adapters have a space there"), Text("")]
        elif len(names) == 2:
            parts += [_all_angles(module, width, plain), Text("")]
        else:
            parts += [_profiles(module, pairs[:_MOST_PAIRS], names, width, plain), Text("")]
    if hidden > 0 or len(pairs) > _MOST_PAIRS:
        parts.append(Text("--json has the angles of all modules and pairs\n", style="dim"))
    return Group(*parts)


def _all_angles(module: PairMatrices, width: int, plain: bool) -> RenderableType:
    """One line per angle: input side, output side."""
    count = int(module.dimensions[0, 1])
    length = max(6, (width - 24) // 2)
    sides = [_cosines(module, side, (0, 1))[:count] for side in ("in", "out")]
    rows: list[list[str | Text]] = []
    for i, cosines in enumerate(zip(*sides, strict=True), 1):
        row: list[str | Text] = [str(i)]
        for cosine, colour in zip(cosines, ("cyan", "yellow"), strict=True):
            filled = bar(cosine, length, ascii_only=plain).ljust(length)
            row += [degrees(cosine, plain), Text(filled, style=colour)]
        rows.append(row)
    heads = ["i", "in", "cosine".ljust(length), "out", "cosine".ljust(length)]
    chance = ", ".join(
        f"{side} {float(overlap[0, 1]):.3f} (random spaces {float(expected[0, 1]):.3f})"
        for side, overlap, expected in _overlaps(module)
    )
    table = grid(heads, rows, left=(2, 4), plain=plain)
    return Group(table, Text(f"mean squared cosine: {chance}", style="dim"))


def _profiles(
    module: PairMatrices,
    pairs: Sequence[tuple[int, int]],
    names: Sequence[str],
    width: int,
    plain: bool,
) -> RenderableType:
    """Two lines per pair: smallest angle, overlap beside chance, all cosines as a line."""
    label = max(9, min(max(len(n) for n in names), (width - 42) // 2))
    rows = []
    for i, j in pairs:
        size = int(module.dimensions[i, j])
        if not size:
            continue
        for side, overlap, chance in _overlaps(module):
            cosines = _cosines(module, side, (i, j))[:size]
            first = side == "in"
            rows.append(
                [
                    shorten(names[i], label) if first else "",
                    shorten(names[j], label) if first else "",
                    side,
                    degrees(cosines[0], plain),
                    f"{float(overlap[i, j]):.3f}",
                    f"{float(chance[i, j]):.3f}",
                    share_line(cosines, 16, ascii_only=plain),
                ]
            )
    heads = ["pair", "", "", "least", "cos^2" if plain else "cos²", "chance", "cosines"]
    return grid(heads, rows, left=(0, 1, 2, 6), plain=plain)


def _cosines(module: PairMatrices, side: str, pair: tuple[int, int]) -> list[float]:
    table = module.angles_in if side == "in" else module.angles_out
    assert table is not None
    cosines: list[float] = table[pair].tolist()
    return cosines


def _overlaps(module: PairMatrices) -> tuple[tuple[str, "Tensor", "Tensor"], ...]:
    return (
        ("in", module.overlap_in, module.chance_in),
        ("out", module.overlap_out, module.chance_out),
    )
