"""A tree of adapters drawn with line characters."""

from collections.abc import Sequence

from rich.text import Text

from lora_merge.analysis.cluster import Tree
from lora_merge.cli._format import shorten

_LINES = dict.fromkeys("┐┘┤┬┴├┼", "+") | {"─": "-", "│": "|"}
_GOES_ON = {"┐": "┬", "┘": "┴", "│": "├", "┤": "┼", " ": "─"}


def dendrogram(tree: Tree, names: Sequence[str], width: int, *, plain: bool) -> Text:
    """Leaves on the left, joined to the right at a column that shows their distance."""
    count = len(names)
    label = min(max(map(len, names)), width // 2)
    room = max(10, width - label - 3)
    top = max(*tree.heights, 1e-12)
    canvas = [[" "] * (room + 1) for _ in range(count)]
    row: dict[int, int] = {leaf: index for index, leaf in enumerate(tree.order)}
    column: dict[int, int] = dict.fromkeys(range(count), 0)
    for index, ((a, b), height) in enumerate(zip(tree.merges, tree.heights, strict=True)):
        here = max(round(room * height / top), column[a] + 1, column[b] + 1)
        here = min(here, room)
        upper, lower = sorted((row[a], row[b]))
        for node in (a, b):
            for x in range(column[node], here):
                canvas[row[node]][x] = _GOES_ON.get(canvas[row[node]][x], "─")
        for y in range(upper + 1, lower):
            canvas[y][here] = "┤" if canvas[y][here] == "┘" else "│"
        canvas[upper][here], canvas[lower][here] = "┐", "┘"
        row[count + index] = (upper + lower) // 2
        column[count + index] = here
    text = Text("distance 1 - cosine, average linkage\n", style="bold")
    for index, leaf in enumerate(tree.order):
        line = "".join(canvas[index])
        if plain:
            line = "".join(_LINES.get(c, c) for c in line)
        text.append(f"{shorten(names[leaf], label):<{label}} {line.rstrip()}\n", style="not bold")
    scale = f"{'':<{label}} 0{f'{top:.3g}':>{room}}\n"
    return text.append(scale, style="not bold dim")
