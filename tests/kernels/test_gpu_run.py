"""The one command for a GPU: what it prints of failing tests, and that it keeps to its time."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_run

    yield gpu_run
    sys.modules.pop("gpu_run", None)


def test_a_failure_is_told_by_its_last_line(gpu_run: Any, tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text(
        "def test_good(): pass\n\n"
        "def test_bad(): raise RuntimeError('a log\\nPassManager::run failed')\n"
    )
    plugins = ["-p", "gpu_report", "-p", "no:cacheprovider"]
    apart = ["-c", "/dev/null", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *plugins, *apart, str(tmp_path / "test_two.py")]
    told = [line for line in gpu_run.lines_of(command, 60, {}) if line.startswith("REPORT")]
    assert told[0].split("\t")[1:3] == ["passed", "test_two.py::test_good"]
    assert told[1].split("\t")[1:] == ["failed", "test_two.py::test_bad", "PassManager::run failed"]


def test_a_part_is_cut_off_and_keeps_what_it_said(
    gpu_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", "import time; print('one', flush=True); time.sleep(60)"]
    start = time.monotonic()
    assert list(gpu_run.lines_of(command, 3, {})) == ["one"]
    assert time.monotonic() - start < 40
    assert "cut off after 3 s" in capsys.readouterr().out
