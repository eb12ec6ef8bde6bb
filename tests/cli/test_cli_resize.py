"""`lora-merge resize` as a user runs it."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from builders import SHAPES, save_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.cli.app import cli


def invoke(*arguments: object):
    return CliRunner().invoke(cli, ["resize", *map(str, arguments)], catch_exceptions=False)


def run(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ([], "energy:0.95"),
        (["--rank", 3], "3"),
        (["--energy", 0.8], "energy:0.8"),
        (["--nuclear", 0.8], "nuclear:0.8"),
        (["--ratio", 10], "ratio:10"),
        (["--elbow"], "elbow"),
        (["--erank"], "erank"),
        (["--soka", 0.9], "soka:0.9"),
        (["--welore", 0.1], "welore:0.1"),
        (["--welore", "x0.5"], "welore:x0.5"),
        (["--budget", "x0.5"], "budget:x0.5"),
        (["--budget", 300, "--exact"], "budget:300"),
        (["--match", 2], "match:2"),
        (["--full"], "full"),
        (["--rank", 3, "--nested"], "nested:3"),
        (["--energy", 0.9, "--compat", "kohya"], "kohya-fro:0.9"),
        (["--ratio", 10, "--compat", "lycoris"], "lycoris-ratio:0.1"),
    ],
)
def test_every_rule_plans_and_writes_what_it_planned(tmp_path, options, rule):
    folder = save_adapter(tmp_path / "a", r=6)
    planned = json.loads(run(folder, "--dry-run", "--json", *options))
    assert planned["plan"]["rule"] == rule
    assert not (tmp_path / "out").exists()
    done = json.loads(run(folder, "-o", tmp_path / "out", "--json", *options))
    assert done["plan"] == planned["plan"]
    after = Adapter.from_pretrained(tmp_path / "out")
    ranks = {name: m["rank"] for name, m in planned["plan"]["modules"].items()}
    assert {name: spec.rank for name, spec in after.modules.items()} == ranks
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size == planned["bytes"]


def test_the_plan_is_a_difference(tmp_path):
    text = run(save_adapter(tmp_path / "a", r=6), "--dry-run", "--rank", 2, "--list")
    assert "6 → 2" in text and "new rank by layer" in text
    assert text.count("6 → 2") == 2 + 1 + 4
    assert max(map(len, text.splitlines())) <= 80


def test_a_budget_prints_its_certificate(tmp_path):
    folder = save_adapter(tmp_path / "a", r=6)
    assert "above the optimum" in run(folder, "--dry-run", "--budget", "x0.43")
    assert "objective optimal" in run(folder, "--dry-run", "--budget", "x0.43", "--exact")


def test_the_report_keeps_the_errors_apart(tmp_path):
    folder = save_adapter(tmp_path / "a", r=6)
    text = run(folder, "-o", tmp_path / "out", "--dtype", "bfloat16", "--uniform")
    assert "truncation" in text and "rounding to BF16" in text
    assert "rank_pattern" not in text


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["-o", "x", "--rank", 2, "--energy", 0.5],
        ["-o", "x", "--elbow", "--compat", "kohya"],
        ["-o", "x", "--energy", 1.5],
        ["-o", "x", "--objective", "base-relative"],
        ["-o", "x", "--nested"],
    ],
)
def test_wrong_usage(tmp_path, options):
    result = invoke(save_adapter(tmp_path / "a"), *options)
    assert result.exit_code == 2
    assert not (tmp_path / "x").exists()


def test_a_budget_relative_to_the_base_serves_modules_of_small_weights(tmp_path):
    folder = save_adapter(tmp_path / "a", r=6)
    small = next(iter(SHAPES))
    weights = {
        f"{n}.weight": torch.ones(s) * (1e-3 if n == small else 1) for n, s in SHAPES.items()
    }
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    options = ["--dry-run", "--json", "--budget", "x0.5"]
    relative = [*options, "--objective", "base-relative", "--base", tmp_path / "base"]
    ranks = [
        json.loads(run(folder, *one))["plan"]["modules"][small]["rank"]
        for one in (options, relative)
    ]
    assert ranks[1] == 6 > ranks[0]


def test_real_adapters_shrink(shared, tmp_path):
    folder = shared / "adapters" / "roberta-base" / "checkpoint-500"
    report = json.loads(run(folder, "-o", tmp_path / "out", "--energy", 0.9, "--json"))
    assert report["plan"]["energy"] >= 0.9
    assert len(Adapter.from_pretrained(tmp_path / "out").extras) == len(
        Adapter.from_pretrained(folder).extras
    )
