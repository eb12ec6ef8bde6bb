"""The tutorial's notebook says what the page says, and runs."""

import json
import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from notebook import NOTEBOOK, PAGE, notebook_of, text_of
from pages import ROOT, differences


def test_the_notebook_is_that_of_the_page() -> None:
    made = text_of(notebook_of(PAGE.read_text("utf-8")))
    assert NOTEBOOK.read_text("utf-8") == made, "python tests/notebook.py"


@pytest.mark.skipif(
    not all(map(find_spec, ("nbclient", "ipykernel"))), reason="needs the extra docs"
)
@pytest.mark.timeout(900)  # every command is a process of its own
@pytest.mark.filterwarnings("default")  # of Jupyter's own making
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "docs").mkdir()
    scripts = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.setenv("COLUMNS", "80")
    notebook = nbformat.from_dict(json.loads(NOTEBOOK.read_text("utf-8")))
    shown = [_printed(cell) for cell in notebook.cells]
    NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": str(tmp_path / "docs")}}
    ).execute()
    for before, cell in zip(shown, notebook.cells, strict=True):
        printed = _printed(cell)
        assert "Traceback" not in printed, cell.source
        assert not differences(before, printed), cell.source


def _printed(cell: Any) -> str:
    text = "".join(output.get("text", "") for output in cell.get("outputs", ()))
    return re.sub(r"\x1b\[[0-9;]*m", "", text)  # Jupyter wants colours
