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


needs_a_kernel = pytest.mark.skipif(
    not all(map(find_spec, ("nbclient", "ipykernel"))), reason="needs the extra docs"
)


@needs_a_kernel
@pytest.mark.filterwarnings("default")
def test_results_and_progress_show_themselves_in_a_kernel() -> None:
    import nbformat
    from nbclient import NotebookClient

    cells = [
        "import lora_merge; opened = lora_merge.open_adapters('examples/adapters/*'); opened[0]",
        "lora_merge.spectra(opened[0])",
        "lora_merge.compare(opened)",
        "lora_merge.merge(opened, scale=1).report",
        # A step that takes longer than a bar waits to be drawn.
        "import time; from lora_merge.planning import counted\n"
        "step = counted(None, '<b>merging', 3)\n"
        "for _ in range(3): time.sleep(0.3); step()",
        "lora_merge.spectra(opened[0], progress=lambda *_: None)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    pictures: list[str] = []

    class Client(NotebookClient):
        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            if cell_index == 4 and "data" in msg["content"]:
                pictures.append(msg["content"]["data"].get("text/html", ""))
            return super().process_message(msg, cell, cell_index)

    Client(notebook, timeout=240, resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = [cell.outputs[-1].data["text/html"] for cell in notebook.cells]
    assert shown[0].startswith("<table>") and "<details>" in shown[1]
    assert "cosine" in shown[2] and "model.layers.0.mlp.down_proj" in shown[3]
    bars = [text for text in pictures if "<progress" in text]
    assert 'value="1" max="3"' in bars[0] and "&lt;b&gt;merging" in bars[0]
    assert pictures[-1] == "" == shown[4]  # gone when all is done
    assert len(notebook.cells[5].outputs) == 1


@needs_a_kernel
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
