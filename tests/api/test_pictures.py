"""Spectra and comparisons as files: what a command writes is what the function writes."""

from pathlib import Path

import pytest

import lora_merge
from builders import save_adapter
from lora_merge.cli.app import run
from lora_merge.errors import ArgumentError, OutputError


@pytest.fixture
def here(tmp_path: Path) -> list[str]:
    return [str(save_adapter(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]


def test_the_command_writes_what_the_functions_write(here: list[str], tmp_path: Path) -> None:
    found = [lora_merge.spectra(one) for one in here]
    lora_merge.draw(found, tmp_path / "f.svg", metric="k95")
    lora_merge.write_csv(found, tmp_path / "f.csv")
    lora_merge.draw(lora_merge.compare(here), tmp_path / "f.png")
    files = [f"--{kind}={tmp_path / f'c.{kind}'}" for kind in ("svg", "csv")]
    assert run(["spectra", *here, "--metric", "k95", *files]) == 0
    assert run(["compare", *here, "--png", str(tmp_path / "c.png")]) == 0
    for kind in ("svg", "csv", "png"):
        assert (tmp_path / f"c.{kind}").read_bytes() == (tmp_path / f"f.{kind}").read_bytes(), kind


def test_one_spectrum_is_a_list_of_one(here: list[str], tmp_path: Path) -> None:
    one = lora_merge.spectra(here[0])
    first = lora_merge.write_csv(one, tmp_path / "one.csv").read_bytes()
    assert first == lora_merge.write_csv([one], str(tmp_path / "list.csv")).read_bytes()


def test_what_is_no_picture_is_refused_and_nothing_written(here: list[str], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    one = lora_merge.spectra(here[0])
    with pytest.raises(OutputError, match=r"end it in \.svg or \.png"):
        lora_merge.draw(one, tmp_path / "a.pdf")
    for wrong in ("a", [], [one, 3], lora_merge.compare(here)):
        with pytest.raises(ArgumentError, match="give what `spectra` returns"):
            lora_merge.write_csv(wrong, tmp_path / "a.csv")
    assert sorted(tmp_path.iterdir()) == before
