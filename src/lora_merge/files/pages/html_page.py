"""A page in one file: it opens from a disk, asks no network for anything, and escapes every name.

Its policy (Content-Security-Policy) allows no request at all, so it says nothing to anyone either.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from lora_merge._version import __version__
from lora_merge.files.atomic import atomic_file
from lora_merge.files.targets import MARK, check_file

# Control characters, which names of directories may hold, as the pictures of them.
SHOWN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: What it says, escaped when it is written.
        heat: How dark it is drawn, 0 to 1; None for an ordinary cell.
        numeric: Whether it stands at the right.
    """

    text: str
    heat: float | None = None
    numeric: bool = True

    def html(self) -> str:
        """The element."""
        if self.heat is not None:
            share = round(100 * min(max(self.heat, 0.0), 1.0))
            colour = f"color-mix(in srgb, #0072b2 {share // 2}%, transparent)"
            return f'<td style="background:{colour}">{escape(self.text)}</td>'
        return f"<td{'' if self.numeric else ' class=text'}>{escape(self.text)}</td>"


def html_table(heads: Sequence[str], rows: Iterable[Sequence[Cell | str]]) -> str:
    """A table whose first column names its rows."""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in heads)
    body = ""
    for name, *cells in rows:
        shown = "".join((c if isinstance(c, Cell) else Cell(c)).html() for c in cells)
        text = name.text if isinstance(name, Cell) else name
        body += f"<tr><th scope=row>{escape(text)}</th>{shown}</tr>\n"
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def html_page(
    title: str, lead: str, body: str, *, footer: str = "", script: str = "", data: Any = None
) -> str:
    """The whole page.

    Args:
        title: Plain text.
        lead: A line below it, plain text.
        body: The content, as HTML.
        footer: What the numbers are, as plain text.
        script: JavaScript, run when everything is there.
        data: What the script reads from the element `data`, JSON-ready, without NaN.
    """
    style = files(__package__).joinpath("html_page.css").read_text("utf-8")
    # "</script>" and "<!--" in a name would end or change the element.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    scripts = (
        f'<script type="application/json" id="data">{text}</script>\n<script>\n{script}</script>\n'
        if script
        else ""
    )
    title = escape(title)
    page = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{MARK}">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n"
        f"<body>\n<header><h1>{title}</h1><p>{escape(lead)}</p></header>\n<main>\n{body}</main>\n"
        f"<footer>lora-merge {escape(__version__)}. {escape(footer)}</footer>\n"
        f"{scripts}</body>\n</html>\n"
    )
    return page.translate(SHOWN)


def check_page(path: Path | None) -> None:
    """Refuse a page that could not be written, before anything is measured for it.

    Raises:
        OutputError: If its directory cannot be written, or the file is somebody else's.
    """
    if path is not None:
        check_file(path, MARK.encode())


def write_html(text: str, path: Path) -> int:
    """Write a page; only one that lora-merge wrote is replaced.

    Returns:
        Its size in bytes.

    Raises:
        OutputError: If the file cannot be written.
    """
    data = text.encode()
    with atomic_file(path, mark=MARK.encode()) as staging:
        staging.write_bytes(data)
    return len(data)
