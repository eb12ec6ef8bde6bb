"""The table in docs/kernels.md is what the result files say."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import kernel_table

    yield kernel_table
    for name in ("kernel_table", "kernel_cases"):
        sys.modules.pop(name, None)


def document(device: str, **rows: dict[str, float]) -> dict[str, Any]:
    def timing(median: float) -> dict[str, float]:
        return {"median": median, "low": median * 0.98, "high": median * 1.02, "rounds": 9}

    return {
        "device": device, "layers": 32, "small": False, "cores": None, "dtype": "bfloat16",
        "versions": {"torch": "2.13"},
        "rows": [
            {
                "case": {"name": name.replace("_", "-")},
                "ratios": {n: r for n, r in ratios.items() if r},
                "seconds": {n: timing(r) for n, r in ratios.items() if r},
                "errors": {n: "RuntimeError: no" for n, r in ratios.items() if not r},
            }
            for name, ratios in rows.items()
        ],
    }  # fmt: skip


def test_the_page_is_up_to_date(tables: Any) -> None:
    text = tables.PAGE.read_text()
    assert tables.page(text, tables.documents()) == text, "run benchmarks/kernel_table.py"


def test_every_case_has_a_row_measured_or_not(tables: Any) -> None:
    lines = tables.table([]).splitlines()
    assert len(lines) == 2 + len(tables.CASES) + 2
    assert all("not measured" in line for line in lines[2:-2])
    assert "**No number here was measured on a GPU yet.**" in lines


def test_a_row_shows_the_best_first_and_what_failed(tables: Any) -> None:
    found = document(
        "nvidia-h200",
        decode_1_dense={"eager": 1.3, "triton": 1.12, "concat": 0.0},
        against_xlora={"base": 40.0, "eager": 18.0, "triton": 22.0},
    )
    text = tables.table([found])
    assert (
        "| ≤ 1.09 | **triton 1.12** ± 2 % (89 % of the ceiling), eager 1.30, concat failed |"
        in text
    )
    assert "| ≥ 10 | **triton 22.00** ± 2 %, eager 18.00 |" in text
    assert "No number" not in text


def test_files_of_tiny_shapes_are_left_out(tables: Any, tmp_path: Path) -> None:
    import json

    small = {**document("cpu"), "small": True}
    (tmp_path / "kernels-cpu-small.json").write_text(json.dumps(small))
    (tmp_path / "kernels-cpu.json").write_text(json.dumps(document("cpu")))
    assert [d["small"] for d in tables.documents(tmp_path)] == [False]
