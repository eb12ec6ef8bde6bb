"""The house's table: names that give way in the middle, then columns of numbers."""

from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_LEAST = 16  # columns that a name keeps


def middle(text: str, width: int) -> str:
    """A name in a width: what is left out stands in the middle, nearer to its start."""
    if len(text) <= width:
        return text
    head = (width - 1) // 3
    return f"{text[:head]}…{text[head - width + 1 :]}"


@dataclass(frozen=True)
class _Name:
    """A name without spaces, never broken over lines."""

    text: Text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        size = self.text.cell_len
        return Measurement(min(size, _LEAST, options.max_width), min(size, options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = middle(self.text.plain, options.max_width)
        yield self.text if shown == self.text.plain else Text(shown, style=self.text.style)


class _Named(Table):
    """A table whose first column holds names."""

    def add_row(self, *renderables: RenderableType | None, **options: object) -> None:
        first, *others = renderables
        if isinstance(first, str):
            first = Text.from_markup(first)
        if isinstance(first, Text) and " " not in first.plain.strip():
            super().add_row(_Name(first), *others, **options)  # type: ignore[arg-type]
        else:  # a sentence breaks between its words
            super().add_row(first, *others, **options)  # type: ignore[arg-type]


def table(first: str, *others: str) -> Table:
    """A table of a text column, then columns of numbers."""
    grid = _Named(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column(first)
    for name in others:
        grid.add_column(name, justify="right", no_wrap=True)
    return grid
