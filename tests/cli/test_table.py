"""Names in tables: whole where there is room, else shortened in the middle, never broken."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lora_merge.cli.shared.table import middle, table

LONG = "runs/2026-11/llama-3-8b/summaries-and-questions/checkpoint-12000"


def printed(width: int, *names: str) -> list[str]:
    grid = table("adapter", "error", "norm")
    for name in names:
        grid.add_row(name, "12.5 %", "1.00")
    console = Console(file=io.StringIO(), width=width)
    console.print(grid)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_long_name_gives_way_in_its_middle(width: int) -> None:
    lines = printed(width, "short", LONG)
    assert len(lines) == 4 and max(map(len, lines)) <= width
    assert lines[-1].strip().startswith("runs/") and "checkpoint-12000" in lines[-1]
    assert ("…" in lines[-1]) == (len(LONG) > width - 16)
    assert all(line.endswith("1.00") for line in lines[2:])


def test_a_sentence_breaks_between_words() -> None:
    lines = printed(40, "ninety-five per cent of the energy of every module")
    words = " ".join(line.replace("12.5 %", "").replace("1.00", "") for line in lines[2:]).split()
    assert words == ["ninety-five", "per", "cent", "of", "the", "energy", "of", "every", "module"]


def test_markup_in_a_name_is_its_callers_to_escape() -> None:
    assert "layers[0]" in printed(60, r"layers\[0]")[-1]


@given(st.text(min_size=1, max_size=60), st.integers(3, 60))
def test_what_is_shortened_fits_and_keeps_both_ends(text: str, width: int) -> None:
    shown = middle(text, width)
    assert len(shown) == min(len(text), width)
    if len(text) > width:
        head, _, tail = shown.partition("…") if "…" not in text else (shown[:1], "", shown[-1:])
        assert text.startswith(head) and text.endswith(tail)
    else:
        assert shown == text
