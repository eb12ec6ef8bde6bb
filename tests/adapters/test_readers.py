"""What readers do with an adapter, predicted from its headers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from builders import adapter_parts, save_adapter, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.adapter import save_adapter as write
from lora_merge.adapters.formats.readers import READERS, predict
from lora_merge.adapters.formats.table import FORMATS
from lora_merge.cli.app import run


def opened(folder: Path, extra: Any = None, **parts: Any) -> Adapter:
    config, tensors = adapter_parts(**parts)
    return Adapter.from_pretrained(save_parts(folder, config, {**tensors, **(extra or {})}))


def effects(adapter: Adapter, reader: str) -> list[str]:
    return [finding.effect for finding in predict(adapter, reader)]


@pytest.mark.parametrize("reader", ["peft", "vllm", "sglang", "llama.cpp"])
def test_a_plain_adapter_is_fine(reader: str, tmp_path: Path) -> None:
    assert effects(opened(tmp_path / "a"), reader) == []


def test_llama_cpp_misreads_scalings_that_the_portable_layout_repairs(tmp_path: Path) -> None:
    for name, fields in (
        ("rslora", {"use_rslora": True}),
        ("alphas", {"alpha_pattern": {"q_proj": 3}}),
    ):
        adapter = opened(tmp_path / name, **fields)
        assert effects(adapter, "llama.cpp") == ["misreads"]
        adapter.save_pretrained(tmp_path / f"{name}2")
        assert effects(Adapter.from_pretrained(tmp_path / f"{name}2"), "llama.cpp") == []


def test_servers_refuse_whole_modules_and_biases(tmp_path: Path) -> None:
    whole = {"base_model.model.score.weight": torch.ones(2, 16)}
    saved = opened(tmp_path / "a", whole, modules_to_save=["score"])
    assert effects(saved, "vllm") == ["refuses"] and effects(saved, "llama.cpp") == ["misreads"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    biased = opened(tmp_path / "b", {key: torch.ones(24)}, lora_bias=True)
    assert effects(biased, "vllm") == ["refuses"]


def test_a_rank_above_the_servers_default_names_the_setting(tmp_path: Path) -> None:
    (finding,) = predict(opened(tmp_path / "a", r=24), "vllm")
    assert finding.effect == "asks" and "--max-lora-rank 24" in finding.remedy


def test_every_written_format_is_fine_for_its_reader(tmp_path: Path) -> None:
    source = Adapter.from_pretrained(save_adapter(tmp_path / "a", alpha=3))
    for name in ("peft", "mlx"):
        write(source, tmp_path / name, file_format=FORMATS[name])
        assert effects(Adapter.from_pretrained(tmp_path / name), name) == []
    assert effects(source, "mlx") == ["refuses"] and effects(source, "diffusers") == ["drops"]
    tensors = {f"lora_unet_x.lora_{h}.weight": torch.ones(4, 4) for h in ("down", "up")}
    save_file(tensors, tmp_path / "k.safetensors")
    kohya = Adapter.from_pretrained(tmp_path / "k.safetensors")
    assert effects(kohya, "comfyui") == [] and effects(kohya, "vllm") == ["refuses"]


def test_the_command_names_every_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(save_adapter(tmp_path / "a", use_rslora=True))
    for name in READERS:
        assert run(["info", source, "--target", name, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["target"] == name and isinstance(said["findings"], list)
    assert run(["info", source, "--target", "llama.cpp"]) == 0
    assert "misreads the scaling" in capsys.readouterr().out
