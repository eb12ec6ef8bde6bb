"""How results print: a few lines that say what matters, a table in a notebook, a data frame."""

import html
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_merge.errors import LoraMergeError


@dataclass(frozen=True)
class Summary:
    """What matters of a result.

    Attributes:
        title: What it is.
        facts: Label and text, one line each.
    """

    title: str
    facts: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        width = max((len(label) for label, _ in self.facts), default=0)
        return "\n".join(
            [self.title, *(f"  {label:<{width}}  {text}" for label, text in self.facts)]
        )

    def to_html(self) -> str:
        """As a table; names from files are text, never markup."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for label, text in self.facts
        )
        return f"<table><caption>{html.escape(self.title)}</caption>{rows}</table>"


class Printed:
    """Something whose repr is its summary."""

    def summary(self) -> Summary:
        """What matters of it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary().to_html()


class Report(Printed):
    """A result of which `to_dict` gives everything, and `to_frame` the table.

    A notebook shows the summary, and the table's beginning when it is asked for.
    """

    def _repr_html_(self) -> str:
        return self.summary().to_html() + _folded(self.rows())

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, Any]]:
        """The table: one mapping per row."""
        raise NotImplementedError

    def to_frame(self) -> Any:
        """The table as a `pandas.DataFrame`.

        Raises:
            LoraMergeError: If pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ModuleNotFoundError as error:
            raise LoraMergeError(
                "a data frame needs pandas", "pip install pandas, or take rows()"
            ) from error
        return DataFrame(self.rows())


_SHOWN = 50  # rows in a notebook


def _folded(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table's beginning, folded away; values from files are text, never markup."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows[:_SHOWN] for name in row))
    lines = [[_cell(row.get(name)) for name in names] for row in rows[:_SHOWN]]
    head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    more = f", the first {_SHOWN}; to_frame() has all" if len(rows) > _SHOWN else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<details><summary>the table ({len(rows)} rows{more})</summary>{table}</details>"


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    if value is None or value == {}:
        return ""
    return html.escape(f"{value:.4g}" if type(value) is float else str(value))


def span(values: Collection[int], dash: str = " to ") -> str:
    """A range of whole numbers, or the one number it is; `dash` stands between the two."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}{dash}{high}"


def notes(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Facts of what else a user should know."""
    yield from (("note", line) for line in lines)


def short_names(names: Sequence[str]) -> list[str]:
    """Paths without the directories that all of them share."""
    parts = [name.rstrip("/").split("/") for name in names]
    if len(parts) == 1:
        return [parts[0][-1]]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return ["/".join(p) for p in parts]
