"""Experts written in the layout that is asked for: loaded by PEFT, and the same delta each time."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_merge
from builders import adapter_parts, save_adapter, save_base, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.errors import AdapterError

E, H, I, R = 3, 16, 12, 2  # noqa: E741 - as in the papers
STEM = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Qwen 3 MoE on disk, an adapter of its experts by PEFT, and the logits with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=H, intermediate_size=I, moe_intermediate_size=I, num_experts=E,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, decoder_sparse_step=1, tie_word_embeddings=False,
    )  # fmt: skip
    with warnings.catch_warnings():  # whichever test asks for it first
        warnings.simplefilter("ignore")
        Qwen3MoeForCausalLM(config).eval().save_pretrained(folder / "base")
        model = Qwen3MoeForCausalLM.from_pretrained(folder / "base")
        named = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        wrapped = get_peft_model(
            model, LoraConfig(r=R, lora_alpha=6, target_modules=["q_proj"], target_parameters=named)
        )
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                nn.init.normal_(weight, std=0.3)
        wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
        ids = torch.arange(12)[None]
        with torch.no_grad():
            logits = wrapped.eval()(ids).logits
    return folder, ids, logits


def logits_with(folder: Path, adapter: Path, ids: Tensor) -> Tensor:
    from peft import PeftModel
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter).eval()(ids).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["per-expert", "stacked"])
def test_peft_loads_every_layout_as_the_same_model(
    layout: str, models: Any, tmp_path: Path
) -> None:
    folder, ids, want = models
    base = folder / "base"
    lora_merge.convert(folder / "adapter", tmp_path / "there", experts=layout, base=base)
    there = Adapter.from_pretrained(tmp_path / "there")
    assert (f"{STEM}.2.up_proj" in there.modules) == (layout == "per-expert")
    torch.testing.assert_close(logits_with(folder, tmp_path / "there", ids), want)
    back = tmp_path / "back"
    lora_merge.convert(tmp_path / "there", back, experts="stacked", base=base)
    torch.testing.assert_close(logits_with(folder, back, ids), want)


def stacked_file(folder: Path, version: str = "0.21.2") -> Path:
    stem = f"base_model.model.{STEM}"
    tensors = {
        f"{stem}.base_layer.lora_A.weight": torch.randn(E * R, H),
        f"{stem}.base_layer.lora_B.weight": torch.randn(2 * I, E * R),
        f"{stem}.lora_A.weight": torch.randn(E * R, I),
        f"{stem}.lora_B.weight": torch.randn(H, E * R),
    }
    config, _ = adapter_parts(
        r=R, target_modules=[], peft_version=version,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    return save_parts(folder, config, tensors)


def same_deltas(one: Adapter, other: Adapter) -> None:
    assert one.modules.keys() == other.modules.keys()
    for name in one.modules:
        for ours, theirs in zip(one.stacks(name), other.stacks(name), strict=True):
            torch.testing.assert_close(ours.delta(), theirs.delta(), rtol=1e-4, atol=1e-5)


def test_the_old_orientation_has_the_shapes_that_peft_0_18_writes(models: Any, tmp_path) -> None:
    """E=2, H=8, I=3, r=2 in NVIDIA-NeMo/Automodel#3592: A of gate_up (4, 2 I), B (H, 4)."""
    base = models[0] / "base"
    source = stacked_file(tmp_path / "a")
    lora_merge.convert(source, tmp_path / "old", experts="stacked-0.18", base=base)
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    assert config["peft_version"] == "0.18.1"
    stem = f"base_model.model.{STEM}"
    entries = lora_merge.open_adapter(tmp_path / "old", base=base).tensors.entries()
    shapes = {name.removeprefix(stem): shape for name, (_, shape) in entries.items()}
    assert shapes[".base_layer.lora_A.weight"] == (E * R, 2 * I)
    assert shapes[".base_layer.lora_B.weight"] == (H, E * R)
    assert shapes[".lora_A.weight"] == (E * R, H) and shapes[".lora_B.weight"] == (I, E * R)
    back = lora_merge.open_adapter(tmp_path / "old", base=base)
    same_deltas(back, Adapter.from_pretrained(source))
    with pytest.raises(AdapterError, match=r"PEFT 0\.18"):
        lora_merge.plan_convert(source, experts="stacked-0.18")


@pytest.mark.parametrize("layout", ["per-expert", "stacked", "stacked-0.18"])
def test_a_merge_is_written_in_the_layout_that_is_asked_for(
    layout: str, models: Any, tmp_path: Path
) -> None:
    """Inputs in two layouts; the sum is exact, and the recipe beside it makes the same bytes."""
    base = models[0] / "base"
    one = stacked_file(tmp_path / "one")
    lora_merge.convert(models[0] / "adapter", tmp_path / "two", experts="per-expert", base=base)
    recipe = {
        "merge_method": "cat", "adapters": [str(one), str(tmp_path / "two")],
        "base": str(base), "experts": layout, "accept_base_models": True,
    }  # fmt: skip
    lora_merge.run_recipe(recipe, tmp_path / "out")
    lora_merge.run_recipe(tmp_path / "out" / "lora_merge.yaml", tmp_path / "again")
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config.get("target_parameters") is not None) == (layout != "per-expert")
    if layout != "per-expert":
        assert config["peft_version"] == {"stacked": "0.19.0"}.get(layout, "0.18.1")
    made = lora_merge.open_adapter(tmp_path / "out", base=base)
    plain = lora_merge.merge(
        [one, tmp_path / "two"], method="cat", experts="stacked", base=base, accept_base_models=True
    )
    lora_merge.convert(made, tmp_path / "back", experts="stacked", base=base)
    back = Adapter.from_pretrained(tmp_path / "back")
    for name in back.modules:
        for ours, theirs in zip(back.stacks(name), plain.stacks(name), strict=True):
            torch.testing.assert_close(ours.delta(), theirs.delta(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixtral", [False, True])
def test_mlx_has_experts_apart_and_gives_them_back(mixtral: bool, tmp_path: Path) -> None:
    source = stacked_file(tmp_path / "a")
    base = tmp_path / "base"
    if mixtral:
        held = {f"{STEM}.gate_up_proj": (E, 2 * I, H), f"{STEM}.down_proj": (E, H, I)}
        save_base(base, held, model_type="mixtral")
    options = {"base": base} if mixtral else {}
    made = lora_merge.convert(source, tmp_path / "mlx", to="mlx", **options)
    place = "block_sparse_moe" if mixtral else "mlp"
    assert set(made.modules) == {
        f"model.layers.0.{place}.switch_mlp.{part}"
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    opened = Adapter.from_pretrained(tmp_path / "mlx")
    whole = Adapter.from_pretrained(source).stacks(f"{STEM}.gate_up_proj")
    up = opened.stacks(f"model.layers.0.{place}.switch_mlp.up_proj")
    for one, both in zip(up, whole, strict=True):
        torch.testing.assert_close(one.delta(), both.delta()[I:], rtol=1e-4, atol=1e-5)
    back = lora_merge.convert(tmp_path / "mlx", tmp_path / "peft", to="peft")
    leaf = "w3" if mixtral else "up_proj"
    name = f"model.layers.0.{place}.experts.1.{leaf}"
    torch.testing.assert_close(back.stacks(name)[0].delta(), up[1].delta(), rtol=1e-4, atol=1e-5)


def test_what_has_no_layout_is_named(tmp_path: Path) -> None:
    apart = save_adapter(tmp_path / "apart", shapes={f"{STEM}.1.up_proj": (I, H)})
    with pytest.raises(AdapterError) as refusal:
        lora_merge.plan_convert(apart, experts="stacked")
    assert "--base" in refusal.value.remedy
    plain = save_adapter(tmp_path / "plain")
    assert lora_merge.plan_convert(plain, experts="per-expert").report().modules
