"""`lora-merge spectra` as a user sees it, at fixed width and without colour."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from builders import SHAPES, adapter_parts, save_adapter, save_parts
from lora_merge.cli.app import cli
from lora_merge.cli.app import run as main
from lora_merge.errors import AdapterError, MethodError, SourceError


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["spectra", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


LAYERS = {f"model.layers.{n}.{kind}": (32, 24) for n in range(6) for kind in ("q_proj", "up_proj")}


def test_one_screen_at_80_columns(tmp_path):
    folder = save_adapter(tmp_path / "a", r=16, shapes=LAYERS)
    text = run(folder, "--width", 80)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 40
    for said in ("q_proj", "up_proj", "0-1", "all modules", "95 % of the energy needs rank"):
        assert said in text
    assert "0123456789 = " in text and "--budget x0.5" in text


@pytest.mark.parametrize("width", [60, 80, 132])
def test_no_line_is_wider_than_asked(tmp_path, width):
    long = {f"base.encoder.block.{n}.layer.attention.SelfAttention.q": (8, 8) for n in range(90)}
    folder = save_adapter(tmp_path / "a", r=4, shapes=long)
    other = save_adapter(tmp_path / "b", r=2, shapes=long)
    for arguments in ([folder], [folder, other], [folder, "--top", 5], [folder, "--module", "0.*"]):
        assert max(map(len, run(*arguments, "--width", width).splitlines())) <= width


def test_a_long_name_is_cut_in_the_middle_not_broken_over_lines(tmp_path):
    folder = save_adapter(tmp_path / ("long-" * 20) / "checkpoint-1000", r=4, shapes=SHAPES)
    first = run(folder, "--width", 80).splitlines()[0]
    assert first.startswith(str(folder)[:20]) and first.endswith("/checkpoint-1000")
    assert "…" in first and len(first) == 80


def test_tables_are_not_broken_on_a_narrow_terminal(tmp_path):
    layers = {f"model.layers.{n}.mlp.down_proj.long_name": (20, 20) for n in range(6)}
    text = run(save_adapter(tmp_path / "a", r=16, shapes=layers), "--width", 60)
    rules = [line for line in text.splitlines() if set(line) == {"─"}]
    assert len(rules) == 3 and min(map(len, rules)) > 40


def test_one_module_in_full(tmp_path):
    folder = save_adapter(tmp_path / "a", r=5)
    text = run(folder, "--module", "0.*.q_proj", "--width", 80)
    assert "24 x 16, rank 5, scaling 1.6" in text
    assert "energy:0.95" in text and "elbow" in text and "100.0 %" in text
    assert sum(line.lstrip()[:1].isdigit() for line in text.splitlines()) == 6


def test_several_adapters_share_a_scale(tmp_path):
    folders = [save_adapter(tmp_path / name, r=r, seed=r) for name, r in (("x", 2), ("y", 6))]
    text = run(*folders, "--width", 80)
    assert text.count("95 % of the energy needs rank") == 2
    assert text.count("0123456789 = ") == 1


def test_sorted_and_cut(tmp_path):
    text = run(save_adapter(tmp_path / "a"), "--sort", "frobenius", "--top", 2)
    assert "2 of 4 modules, by frobenius" in text


def test_json_is_strict_and_csv_is_written(tmp_path):
    config, tensors = adapter_parts()
    key = f"base_model.model.{next(iter(SHAPES))}.lora_A.weight"
    tensors[key] = torch.full_like(tensors[key], float("inf"))
    folder = save_parts(tmp_path / "a", config, tensors)
    document = json.loads(
        run(folder, "--json", "--csv", tmp_path / "s.csv"),
        parse_constant=lambda name: pytest.fail(f"{name} in JSON"),
    )
    modules = document["adapters"][0]["modules"]
    assert [m["status"] for m in modules].count("not finite") == 1
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 1 + 3 * 4
    text = run(folder)
    assert "NaN or infinite entries" in text
    assert "nan" not in text.replace("NaN", "")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["missing/adapter"], SourceError),
        (["{folder}", "--module", "zzz"], MethodError),
        (["{folder}/empty"], (SourceError, AdapterError)),
    ],
)
def test_bad_input(tmp_path, arguments, error, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = save_adapter(tmp_path / "a")
    (folder / "empty").mkdir()
    (folder / "empty" / "adapter_model.safetensors").write_bytes(b"")
    result = CliRunner().invoke(
        cli, ["spectra", *(a.format(folder=folder) for a in arguments)], catch_exceptions=True
    )
    assert isinstance(result.exception, error)
    assert result.exception.remedy
    assert result.stdout == ""


def test_real_adapters_show(shared):
    for folder in (
        "arena/adapters/sst2",
        "adapters/distilgpt2/r8",
        "adapters/open-calm-1b/r1-fp16",
    ):
        text = run(shared / folder, "--width", 80)
        assert "all modules" in text and max(map(len, text.splitlines())) <= 80


def test_beside_the_base_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "assets"))
    (tmp_path / "base").mkdir()
    weights = {f"{name}.weight": torch.randn(shape) for name, shape in SHAPES.items()}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    folder = save_adapter(tmp_path / "a", shapes={**SHAPES, "lm_head": (30, 16)})  # a tied head
    options = ["--base", tmp_path / "base", "--intruders"]
    text = run(folder, *options, "--width", 80)
    assert "amplif." in text and "1 modules have no weight there: lm_head" in text
    assert max(map(len, text.splitlines())) <= 80
    document = json.loads(run(folder, *options, "--json"))
    assert len(document["adapters"][0]["base"]["modules"]) == 4


def test_pictures_are_written(tmp_path):
    folder = save_adapter(tmp_path / "a")
    run(folder, "--svg", tmp_path / "a.svg", "--html", tmp_path / "a.html")
    assert (tmp_path / "a.svg").read_text().lstrip().startswith("<?xml")
    page = (tmp_path / "a.html").read_text()
    assert "<table>" in page and "Interference" not in page


def test_a_bare_file_needs_its_alpha(tmp_path):
    folder = save_adapter(tmp_path / "a", r=4, alpha=8)
    norm = json.loads(run(folder, "--json"))["adapters"][0]["frobenius"]
    (folder / "adapter_config.json").unlink()
    file = folder / "adapter_model.safetensors"
    bare = json.loads(run(file, "--alpha", 8, "--json"))["adapters"][0]["frobenius"]
    assert bare == norm
    rslora = json.loads(run(file, "--alpha", 8, "--rslora", "--json"))["adapters"][0]["frobenius"]
    assert rslora == pytest.approx(2 * norm)


@pytest.mark.parametrize("option", ["--csv", "--svg", "--png", "--html"])
def test_a_file_that_cannot_be_written_is_told_before_reading(tmp_path, capsys, option):
    assert main(["spectra", "nowhere", option, str(tmp_path / "no" / "file")]) == 1
    assert "no does not exist" in capsys.readouterr().err
