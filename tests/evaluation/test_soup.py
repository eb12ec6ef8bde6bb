"""Greedy soups: the published steps with a score that is known, and the command."""

import json
from pathlib import Path

import pytest
import torch

import lora_merge
from builders import save_parts
from lora_merge.cli.app import run
from lora_merge.errors import MethodError
from lora_merge.evaluation.bench import open_bench
from lora_merge.evaluation.options import BenchOptions
from lora_merge.evaluation.soup import soup

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE, DATA = EXAMPLES / "base", EXAMPLES / "data" / "test.jsonl"
UPPER = EXAMPLES / "adapters" / "upper"
SETTINGS = {"base": BASE, "data": DATA, "metric": "loss", "batch_size": 64}


def jittered(folder: Path, seed: int, size: float) -> str:
    """The adapter with noise in it, as a checkpoint has."""
    random = torch.Generator().manual_seed(seed)
    adapter = lora_merge.open_adapter(UPPER)
    tensors = {}
    for name, spec in adapter.modules.items():
        a, b = adapter.read(name)
        noise = torch.randn(b.shape, generator=random) * b.float().std() * size
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = a.float()
        tensors[f"{key}.lora_B.weight"] = b.float() + noise
        assert spec.rank == a.shape[0]
    config = json.loads((UPPER / "adapter_config.json").read_text())
    return str(save_parts(folder, config, tensors))


def test_each_stays_only_if_the_mean_is_no_worse(tmp_path: Path) -> None:
    names = [jittered(tmp_path / f"checkpoint-{i}", i, s) for i, s in enumerate((0.2, 0.2, 3.0))]
    found = soup(names, **SETTINGS)
    alone = [one.alone for one in found.ingredients]
    assert alone == sorted(alone)
    assert found.ingredients[-1].adapter == names[2] and not found.ingredients[-1].kept
    best = alone[0]
    for one in found.ingredients[1:]:
        assert one.kept == (one.stirred <= best)
        best = one.stirred if one.kept else best
    inside = [one.adapter for one in found.ingredients if one.kept]
    assert [item.adapter for item in found.recipe.adapters] == inside


def test_its_scores_are_those_that_evaluate_gives(tmp_path: Path) -> None:
    names = [jittered(tmp_path / f"checkpoint-{i}", i, 0.3) for i in range(2)]
    found = soup(names, held_out=0.5, **SETTINGS)
    lora_merge.run_recipe(found.recipe, tmp_path / "soup")
    lines = [json.loads(line) for line in DATA.read_text().splitlines()]
    bench = open_bench(BenchOptions(base=BASE, data=DATA, metric="loss", batch_size=64))
    held = bench.rows.split(0.5, 0)[1].rows
    places = [bench.rows.rows.index(row) for row in held]
    text = tmp_path / "held.jsonl"
    text.write_text("".join(json.dumps(lines[i]) + "\n" for i in places))
    measured = lora_merge.evaluate(
        [str(tmp_path / "soup")], cache=False, **{**SETTINGS, "data": text}
    )
    assert measured.lines[1].scores["all"] == pytest.approx(found.held_out["soup"], rel=1e-4)


def test_one_is_no_soup() -> None:
    with pytest.raises(MethodError, match="soup of one"):
        soup(UPPER, **SETTINGS)


def test_the_command_writes_the_mean_of_those_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [jittered(tmp_path / f"checkpoint-{i}", i, 0.3) for i in range(2)]
    where = ["--base", str(BASE), "--data", str(DATA), "--metric", "loss", "--batch-size", "64"]
    out = tmp_path / "soup"
    assert run(["soup", str(tmp_path / "checkpoint-*"), *where, "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kept = [one["adapter"] for one in found["ingredients"] if one["kept"]]
    assert kept and set(kept) <= set(names) and found["recipe"]["merge_method"] == "mean"
    assert (out / "adapter_model.safetensors").is_file()
