"""`lora-merge cluster`: its default, the published form, what it explains and records."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import lora_merge
from builders import SHAPES, delta, save_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.cli.app import run
from lora_merge.merge.methods.lego_options import LegoOptions


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    return [str(save_adapter(tmp_path / n, seed=i)) for i, n in enumerate("abc")]


def recipe_of(out: Path) -> dict:
    return yaml.safe_load((out / "lora_merge.yaml").read_text())


def test_the_default_is_refitted_and_names_the_members_of_every_unit(three, tmp_path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert run(["cluster", *three, "--rank", "4", "-o", str(out)]) == 0
    recipe = recipe_of(out)
    assert recipe["merge_method"] == "lego-refit"
    units = recipe["units"]
    assert sorted(Path(a).name for a in units["adapters"]) == ["a", "b", "c"]
    for text in units["modules"].values():
        members = [m.lstrip("-") for unit in text.split(", ") for m in unit.split()]
        assert len(text.split(", ")) == 4
        assert len(set(members)) == len(members) == 12
    assert run(["run", str(out / "lora_merge.yaml"), "-o", str(again)]) == 0
    for name in ("lora_merge.yaml", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.parametrize("flags", [["--as-published"], ["--balance"], ["--no-reweight-parameters"]])
def test_published_variants_are_the_published_method(three, tmp_path, flags) -> None:
    out, same = tmp_path / "out", tmp_path / "same"
    assert run(["cluster", *three, "--rank", "4", "-o", str(out), *flags]) == 0
    variant = {
        "--as-published": [],
        "--balance": ["-p", "balance=true"],
        "--no-reweight-parameters": ["-p", "reweight_parameters=false"],
    }[flags[0]]
    merge = ["merge", *three, "-M", "lego", "--scale", "1", "--rank", "4", "-o", str(same)]
    assert run([*merge, *variant]) == 0
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (same / name).read_bytes()


def test_explain_shows_who_is_in_a_unit_and_writes_nothing(three, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    command = ["cluster", *three, "--rank", "4", "-o", str(out), "--explain"]
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "shares units with" in shown and "lost" in shown and not out.exists()
    assert run([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    first = [c for c in document["clusters"] if c["module"] == document["clusters"][0]["module"]]
    assert sum(len(c["members"]) for c in first) == 12
    assert all(0 <= c["lost"] <= 1 and 0 <= c["similarity"] <= 1 for c in document["clusters"])


def test_clusters_have_a_page(three, tmp_path, capsys) -> None:
    page = tmp_path / "units.html"
    command = ["cluster", *three, "--rank", "4", "--html", str(page)]
    assert run(command) == 2  # it shows what --explain measures
    assert run([*command, "--explain"]) == 0
    text = page.read_text()
    assert text.count("<details>") == len(SHAPES) and "default-src 'none'" in text
    capsys.readouterr()
    assert run([*command, "--explain", "--json"]) == 0
    clusters = json.loads(capsys.readouterr().out)["clusters"]
    rows = text[text.index("Every module") :].count("<th scope=row>")
    assert rows == len(clusters)


def test_python_clusters_as_the_command_does(three, tmp_path) -> None:
    out = tmp_path / "out"
    for options, flags in ((None, []), (LegoOptions(balance=True), ["--balance"])):
        command = ["cluster", *three, "--rank", "4", "-o", str(out), "--force", *flags]
        assert run(command) == 0
        made = lora_merge.cluster(three, 4, options=options)
        written = Adapter.from_pretrained(out)
        for name in SHAPES:
            torch.testing.assert_close(delta(made, name), delta(written, name))
