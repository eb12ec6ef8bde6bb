"""The tutorial and the guides: every command in them runs, and prints what they show."""

from pathlib import Path

import pytest

from pages import ROOT, differences, run_step, steps_of, workplace

PAGES = [ROOT / "docs" / "tutorial.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_shows_what_its_commands_print(page: Path, tmp_path: Path) -> None:
    steps = steps_of(page.read_text(encoding="utf-8"))
    assert steps
    with workplace(tmp_path):
        for step in steps:
            printed = run_step(step)
            if step.kind == "console":
                found = differences(step.shown, printed)
                assert not found, f"{step.text}\nif that is meant: python tests/pages.py {page}"


def test_words_and_numbers_that_differ_are_seen() -> None:
    assert not differences("rank 8  99.3 %\n", "rank 8   98.7 %")
    assert differences("rank 8", "rang 8")
    assert differences("merged 99.3 %", "merged 85.3 %")
    assert differences("norm 0.69", "norm 0.75")
    assert not differences("a 1\nb 2", "note\na 1\nb 2")
    assert differences("a 1\nb 2", "b 2\na 1")


def test_a_block_that_no_test_runs_is_an_error() -> None:
    with pytest.raises(AssertionError, match="runs in no test"):
        steps_of("```sh\nrm -r /\n```\n")
