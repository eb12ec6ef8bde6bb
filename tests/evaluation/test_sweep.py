"""Candidates for eyes: spread as promised, each the merge that its recipe says."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_merge
from lora_merge.cli.app import run
from lora_merge.errors import MethodError, OutputError
from lora_merge.evaluation.sweep import _line
from lora_merge.merge.recipe.recipe import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
ADAPTERS = [str(EXAMPLES / "adapters" / name) for name in ("double", "reverse", "upper")]


def recipe(**changes) -> dict:
    return {"merge_method": "svd", "adapters": ADAPTERS, "rank": 8, **changes}


def test_a_scale_goes_from_half_to_twice_in_equal_ratios(tmp_path: Path) -> None:
    found = lora_merge.sweep(recipe(scale=0.6), tmp_path / "look", count=5)
    scales = [candidate.values["scale"] for candidate in found.candidates]
    assert scales[0] == 0.6
    assert scales[1:] == pytest.approx([0.6 * 2**power for power in (-1, -1 / 3, 1 / 3, 1)])
    written = json.loads((tmp_path / "look" / "sweep.json").read_text())
    assert [c["values"]["scale"] for c in written["candidates"]] == scales


@given(count=st.integers(2, 40))
def test_no_scale_comes_twice(count: int) -> None:
    start = Recipe(merge_method="svd", adapters=(), scale=0.7)
    scales = [values["scale"] for values, _ in _line(start, count)]
    assert len(set(scales)) == count and min(scales) == pytest.approx(0.35)
    assert max(scales) == pytest.approx(1.4) or count == 2


def test_candidates_are_what_their_recipes_make(tmp_path: Path) -> None:
    look = tmp_path / "look"
    found = lora_merge.sweep(recipe(scale=0.6), look, count=4, over=["scale", "weights"], seed=3)
    again = lora_merge.sweep(
        recipe(scale=0.6), tmp_path / "again", count=4, over=["scale", "weights"], seed=3
    )
    assert [c.values for c in found.candidates] == [c.values for c in again.candidates]
    assert found.candidates[0].values == {
        "scale": 0.6, "weight.0": 1.0, "weight.1": 1.0, "weight.2": 1.0
    }  # fmt: skip
    assert len({str(c.values) for c in found.candidates}) == 4
    for candidate in found.candidates[::3]:
        file = look / candidate.name / "lora_merge.yaml"
        lora_merge.run_recipe(file, tmp_path / candidate.name)
        one, two = (
            (folder / candidate.name / "adapter_model.safetensors").read_bytes()
            for folder in (look, tmp_path)
        )
        assert one == two


def test_refusals_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="no choice for eyes"):
        lora_merge.sweep(recipe(), tmp_path / "look", count=1)
    with pytest.raises(MethodError, match="cannot vary"):
        lora_merge.sweep(recipe(), tmp_path / "look", over=["colour"])
    assert not (tmp_path / "look").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(OutputError):
        lora_merge.sweep(recipe(), tmp_path / "mine", force=True)


def test_the_command_names_what_differs(tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "look")
    command = ["sweep", *ADAPTERS, "--over", "method", "--methods", "svd,ties", "--count", "2"]
    assert run([*command, "-o", out]) == 0
    shown = capsys.readouterr().out
    assert "candidate-1" in shown and "method svd" in shown


def test_no_sweep_is_larger_than_eyes_can_take(tmp_path: Path) -> None:
    for how in ({"count": 1}, {"count": 10**9}, {"seed": -1}, {"seed": 2**70}):
        with pytest.raises(MethodError, match="from"):
            lora_merge.sweep(recipe(), tmp_path / "look", over=["scale", "weights"], **how)
    assert not (tmp_path / "look").exists()
