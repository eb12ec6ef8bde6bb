"""A tree of adapters drawn with line characters."""

from collections.abc import Sequence

from rich.text import Text

from lora_merge.analysis.families import Tree
from lora_merge.cli.views.format import shorten

# Which neighbours a cell is joined to, added up → its character.
_LEFT, _RIGHT, _UP, _DOWN = 1, 2, 4, 8
_LINES = " ───│┘└┴│┐┌┬│┤├┼"
_PLAIN = " ---|+++|+++|+++"


def dendrogram(tree: Tree, names: Sequence[str], width: int, *, plain: bool) -> Text:
    """Leaves on the left, joined to the right at a column that shows their distance."""
    count = len(names)
    label = min(max(map(len, names)), width // 2)
    room = max(10, width - label - 3)
    top = max(*tree.heights, 1e-12)
    joined = [[0] * (room + 1) for _ in range(count)]
    row = {leaf: index for index, leaf in enumerate(tree.order)}
    column = dict.fromkeys(range(count), 0)
    for index, ((a, b), height) in enumerate(zip(tree.merges, tree.heights, strict=True)):
        here = max(round(room * height / top), column[a], column[b])
        for node in (a, b):
            for x in range(column[node], here):
                joined[row[node]][x] |= _RIGHT
                joined[row[node]][x + 1] |= _LEFT
        upper, lower = sorted((row[a], row[b]))
        for y in range(upper, lower):
            joined[y][here] |= _DOWN
            joined[y + 1][here] |= _UP
        row[count + index] = (upper + lower) // 2
        column[count + index] = here
    characters = _PLAIN if plain else _LINES
    text = Text("distance 1 - cosine, average linkage\n", style="bold")
    for index, leaf in enumerate(tree.order):
        line = "".join(characters[cell] for cell in joined[index]).rstrip()
        text.append(f"{shorten(names[leaf], label):<{label}} {line}\n", style="not bold")
    scale = f"{'':<{label}} 0{f'{top:.3g}':>{room}}\n"
    return text.append(scale, style="not bold dim")
