"""Neighbours of very many adapters for a terminal: families, near-duplicates, who is nearest."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from lora_merge.analysis.neighbours.nearest import Neighbours
from lora_merge.cli.views.format import shorten
from lora_merge.cli.views.grid import grid
from lora_merge.printing import short_names

# Lines of each part; --json has all.
_MOST = 12
# So many adapters are shown one by one.
_FEW = 24


def neighbours_view(found: Neighbours, *, width: int, plain: bool) -> RenderableType:
    """Everything on a screen."""
    names = short_names(found.adapters)
    parts: list[RenderableType] = [*_families(found, names, width), Text("")]
    if found.duplicates:
        parts += [Text("near-duplicates (cosine 0.99 or more, through neighbours):", style="bold")]
        parts += _listed([_members(group, names, width) for group in found.duplicates])
        parts.append(Text(""))
    if len(names) <= _FEW:
        parts.append(_each(found, names, width, plain))
    else:
        rows = [(names[i], names[j], _cosine(c)) for i, j, c in found.closest(_MOST)]
        room = max((width - 12) // 2, 8)
        cells = [[shorten(a, room), shorten(b, room), c] for a, b, c in rows]
        parts.append(grid(["closest", "", "cosine"], cells, left=(0, 1), gap=2, plain=plain))
        parts.append(Text("neighbours of each adapter: --json", style="dim"))
    parts.append(Text(_sure(found), style="dim"))
    return Group(*parts)


def _families(found: Neighbours, names: Sequence[str], width: int) -> list[RenderableType]:
    sizes = found.family_sizes()
    several = [(family, size) for family, size in sizes if size > 1]
    alone = len(sizes) - len(several)
    head = f"{len(several)} families of adapters linked by cosines of 0.2 or more"
    lines = []
    for family, _ in several:
        group = [i for i, other in enumerate(found.families) if other == family]
        lines.append(_members(group, names, width))
    rest = f"{alone} adapters resemble none" if alone != 1 else "1 adapter resembles none"
    return [Text(head, style="bold"), *_listed(lines), Text(rest)]


def _listed(lines: Sequence[str]) -> list[RenderableType]:
    shown: list[RenderableType] = [Text(f"  {line}") for line in lines[:_MOST]]
    if len(lines) > _MOST:
        shown.append(Text(f"  and {len(lines) - _MOST} more; --json has all", style="dim"))
    return shown


def _members(group: Sequence[int], names: Sequence[str], width: int) -> str:
    head = f"{len(group)}: "
    return head + shorten(" ".join(names[i] for i in group[:64]), max(width - len(head) - 3, 8))


def _each(found: Neighbours, names: Sequence[str], width: int, plain: bool) -> RenderableType:
    room = max(min(24, width // 3), 8)
    rows = []
    for name, near in zip(names, found.neighbours, strict=True):
        text = ", ".join(f"{names[j]} {_cosine(cosine)}" for j, cosine in near)
        rows.append([shorten(name, room), shorten(text, max(width - room - 3, 8))])
    return grid(["adapter", "nearest, with the cosine"], rows, left=(0, 1), gap=2, plain=plain)


def _cosine(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # adding 0 turns -0 into 0


def _sure(found: Neighbours) -> str:
    if not found.missed:
        return "cosines of all pairs were measured"
    return (
        f"cosines are measured; candidates were chosen by sketches (standard error "
        f"{found.error:.3f}): who is not named has a cosine of about {found.missed:.2f} at most"
    )
