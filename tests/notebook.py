"""The tutorial as a notebook: the page's text, and its commands and programs as cells.

python tests/notebook.py    # write docs/tutorial.ipynb from docs/tutorial.md
"""

import json
import re
from typing import Any

from pages import ROOT, steps_of

PAGE, NOTEBOOK = ROOT / "docs" / "tutorial.md", ROOT / "docs" / "tutorial.ipynb"
_BLOCK = re.compile(r"(^```\w+\n.*?^```$)", re.MULTILINE | re.DOTALL)


def notebook_of(page: str) -> dict[str, Any]:
    """The notebook (nbformat 4.5) of a page, to be opened from the folder that the page lies in."""
    cells = [_code("%cd -q ..", "")]
    for part in _BLOCK.split(page):
        if part.startswith("```"):
            cells += [_code(*_cell(step.kind, step.text, step.shown)) for step in steps_of(part)]
        elif part.strip():
            cells.append({"cell_type": "markdown", "metadata": {}, "source": part.strip()})
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(kind: str, text: str, shown: str) -> tuple[str, str]:
    if kind == "console":
        return f"%%sh\n{' '.join(text.split())}", shown
    if kind == "python":
        return text.rstrip(), ""
    name, _, body = text.partition("\n")
    return f"%%writefile {name.removeprefix('# ')}\n{body}", ""


def _code(source: str, shown: str) -> dict[str, Any]:
    shown = shown.rstrip("\n")
    outputs = [{"output_type": "stream", "name": "stdout", "text": shown}] if shown else []
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {},
        "outputs": outputs,
        "source": source,
    }


def text_of(notebook: dict[str, Any]) -> str:
    """The file, the same for the same notebook."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(text_of(notebook_of(PAGE.read_text("utf-8"))), encoding="utf-8")
