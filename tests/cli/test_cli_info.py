"""`lora-merge info`: what is said of one adapter and of several."""

import json
from pathlib import Path

import pytest
import torch

from builders import adapter_parts, save_adapter, save_parts
from lora_merge.cli.app import run


def test_info_says_format_alpha_verdict_and_what_is_not_low_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tensors = adapter_parts(alpha=6, modules_to_save=["norm"], use_rslora=True)
    for layer in range(2):
        tensors[f"base_model.model.model.layers.{layer}.norm.weight"] = torch.ones(16)
    folder = str(save_parts(tmp_path / "a", config, tensors))
    assert run(["info", folder, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["dialect"], said["alpha"], said["rslora"]) == ("PEFT LoRA", 6, True)
    assert {(m["verdict"], m["dtype"], m["scaling"]) for m in said["modules"]} == {
        ("exact", "F32", 3)
    }
    assert said["extras"] == [f"model.layers.{layer}.norm.weight" for layer in range(2)]
    assert run(["info", folder]) == 0
    shown = capsys.readouterr().out
    for words in ("PEFT LoRA", "6 (rsLoRA)", "exact", "F32", "model.layers.*.norm.weight (2)"):
        assert words in shown


def test_info_takes_several_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(save_adapter(tmp_path / name, r=r)) for name, r in (("a", 2), ("b", 3))]
    assert run(["info", *folders, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["adapters"]
    assert [one["name"] for one in said] == folders
    assert [one["modules"][0]["rank"] for one in said] == [2, 3]
    assert run(["info", *folders]) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert all(folder in shown for folder in folders)
