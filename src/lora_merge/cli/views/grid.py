"""Columns of text at exact widths: one space apart, so that dense tables fit 80 columns."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text


def grid(
    heads: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    left: Sequence[int] = (0,),
    gap: int = 1,
    ruled: Sequence[int] = (),
    plain: bool = False,
) -> Text:
    """Lines of a table.

    Args:
        heads: Column titles.
        rows: Cells; a `Text` keeps its style.
        left: Indices of columns that are aligned left; the others are aligned right.
        gap: Spaces between columns.
        ruled: Rows before which a rule is drawn.
        plain: Draw rules without line-drawing characters.
    """
    table = [[_text(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(cell_len(row[c].plain) for row in table) for c in range(len(heads))]
    line = ("-" if plain else "─") * (sum(widths) + gap * (len(widths) - 1))
    out = Text()
    for index, row in enumerate(table):
        if index - 1 in ruled or index == 1:
            out.append(line + "\n", style="dim")
        text = Text(style="bold" if index == 0 else "")
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - cell_len(cell.plain))
            if column:
                text.append(" " * gap)
            if column in left:
                text.append_text(cell).append(space)
            else:
                text.append(space).append_text(cell)
        text.rstrip()
        out.append_text(text).append("\n")
    out.rstrip()
    return out


def room_for(
    heads: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, gap: int = 1
) -> int:
    """Columns that remain of `width` beside these, counting the gap after each."""
    used = (max(map(cell_len, column)) + gap for column in zip(heads, *rows, strict=True))
    return width - sum(used)


def _text(cell: str | Text) -> Text:
    return cell.copy() if isinstance(cell, Text) else Text(cell)
