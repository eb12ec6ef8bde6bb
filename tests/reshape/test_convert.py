"""Conversions: the delta stays what it was, names change by rule, cuts are told."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from builders import adapter_parts, save_adapter, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.alignment import align, read_stacks
from lora_merge.cli.app import run
from lora_merge.errors import AdapterError, MethodError
from lora_merge.reshape.convert import plan_conversion
from lora_merge.reshape.options import ConvertOptions

SHAPES = {"down.0.attn.to_q": (24, 16), "mid.attn.to_k": (24, 16)}


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    alignment = align([adapter])
    return {m.name: next(read_stacks(alignment, m)).delta() for m in alignment.modules}


def converted(adapter: Adapter, out: Path, **options: Any) -> Adapter:
    base = options.pop("base", None)
    plan_conversion(adapter, ConvertOptions(**options), base=base).run(out)
    return Adapter.from_pretrained(out)


def kohya(folder: Path, seed: int = 0) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (d_out, d_in) in SHAPES.items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = torch.randn(4, d_in, generator=g)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(d_out, 4, generator=g)
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "a.safetensors")
    save_file(
        {f"{name}.weight": torch.zeros(*shape) for name, shape in SHAPES.items()},
        folder / "base.safetensors",
    )
    return Adapter.from_pretrained(folder / "a.safetensors")


@pytest.mark.parametrize("to", ["peft", "kohya", "diffusers", "comfyui", "mlx"])
def test_peft_to_any_format_and_back_is_the_same_delta(to: str, tmp_path: Path) -> None:
    adapter = Adapter.from_pretrained(
        save_adapter(tmp_path / "a", shapes=SHAPES, alpha=12, task_type=None)
    )
    component = "unet" if to in ("kohya", "diffusers") else None
    there = converted(adapter, tmp_path / "there", to=to, component=component)
    back = there
    if to in ("diffusers", "comfyui"):
        back = converted(there, tmp_path / "back", to="peft")
    want = deltas(adapter)
    got = deltas(back)
    if to == "kohya":
        got = {k.removeprefix("lora_unet_"): d for k, d in got.items()}
        want = {k.replace(".", "_"): d for k, d in want.items()}
    assert got.keys() == want.keys()
    for name, delta in want.items():
        torch.testing.assert_close(got[name], delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("to", "prefix"), [("peft", ""), ("diffusers", "unet."), ("comfyui", "diffusion_model.")]
)
def test_the_base_tells_where_the_dots_were(to: str, prefix: str, tmp_path: Path) -> None:
    from lora_merge.files.checkpoint import open_checkpoint

    adapter = kohya(tmp_path)
    with pytest.raises(AdapterError) as refusal:
        plan_conversion(adapter, ConvertOptions(to=to))
    assert "--base" in refusal.value.remedy
    base = open_checkpoint(tmp_path / "base.safetensors")
    there = converted(adapter, tmp_path / "there", to=to, base=base)
    assert set(there.modules) == {prefix + name for name in SHAPES}
    want = deltas(adapter)
    for name, delta in deltas(there).items():
        flat = "lora_unet_" + name.removeprefix(prefix).replace(".", "_")
        torch.testing.assert_close(delta, want[flat], rtol=1e-5, atol=1e-6)


def test_a_cut_is_the_best_one_and_its_error_is_told(tmp_path: Path) -> None:
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "a", alpha=12))
    report = plan_conversion(adapter, ConvertOptions(rank=2)).run(tmp_path / "two").report
    before, after = deltas(adapter), deltas(Adapter.from_pretrained(tmp_path / "two"))
    for module in report.modules:
        values = torch.linalg.svdvals(before[module.name].double())
        lost = (before[module.name] - after[module.name]).double().norm()
        assert module.rank == 2 and module.norm == pytest.approx(float(values.norm()))
        assert module.lost == pytest.approx(float(values[2:].norm()), rel=1e-4)
        assert float(lost) == pytest.approx(module.lost, rel=1e-3)
    assert 0 < report.error < 1


def test_an_energy_keeps_at_least_itself(tmp_path: Path) -> None:
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "a"))
    report = plan_conversion(adapter, ConvertOptions(energy=0.7)).run(tmp_path / "some").report
    assert all(1 - (m.lost / m.norm) ** 2 >= 0.7 for m in report.modules if m.norm)
    assert {m.rank for m in report.modules} <= {1, 2, 3}
    whole = plan_conversion(adapter, ConvertOptions(energy=1.0)).run(tmp_path / "all").report
    assert whole.error < 1e-6 and {m.rank for m in whole.modules} == {4}


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    config, tensors = adapter_parts(lora_bias=True, task_type=None)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"] = torch.ones(24)
    adapter = Adapter.from_pretrained(save_parts(tmp_path / "a", config, tensors))
    for to in ("kohya", "mlx", "diffusers"):
        with pytest.raises(AdapterError, match="bias on B"):
            plan_conversion(
                adapter, ConvertOptions(to=to, component=None if to == "mlx" else "unet")
            )
    with pytest.raises(AdapterError) as refusal:
        plan_conversion(Adapter.from_pretrained(tmp_path / "a"), ConvertOptions(to="diffusers"))
    assert "--component" in refusal.value.remedy
    with pytest.raises(MethodError):
        plan_conversion(adapter, ConvertOptions(to="nothing"))


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("component", [None, "unet", "transformer"])
def test_a_language_model_is_no_part_of_a_picture_model(to, component, tmp_path: Path) -> None:
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "a"))
    with pytest.raises(AdapterError, match="trained for CAUSAL_LM") as refusal:
        plan_conversion(adapter, ConvertOptions(to=to, component=component))
    assert "--component text_encoder" in refusal.value.remedy
    assert (
        plan_conversion(adapter, ConvertOptions(to=to, component="text_encoder")).output.num_bytes
        > 0
    )
    assert plan_conversion(adapter, ConvertOptions(to="mlx")).output.num_bytes > 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(save_adapter(tmp_path / "a", alpha=12))
    arguments = ["convert", source, "--to", "mlx", "--json"]
    assert run([*arguments, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["to"] == "mlx" and plan["out"] is None and not (tmp_path / "b").exists()
    assert run([*arguments, "-o", str(tmp_path / "b")]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["bytes"] == plan["bytes"] and {m["verdict"] for m in done["modules"]} == {"exact"}
    assert run(["convert", source, "-o", str(tmp_path / "c"), "--rank", "1"]) == 0
    assert "cutting lost" in capsys.readouterr().out
    assert run(["convert", source, "-o", str(tmp_path / "c")]) == 1  # exists
    assert run(["convert", source]) == 2


def test_diffusers_loads_what_is_written_for_it(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="pip install 'lora-merge[oracles]'")
    from peft.tuners.lora import LoraLayer

    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
        attention_head_dim=2,
    )  # fmt: skip
    shapes = {
        name: (m.out_features, m.in_features)
        for name, m in unet.named_modules()
        if name.endswith(("to_q", "to_out.0"))
    }
    adapter = Adapter.from_pretrained(
        save_adapter(tmp_path / "a", shapes=shapes, alpha=12, task_type=None)
    )
    converted(adapter, tmp_path / "out", to="diffusers", component="unet")
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, alphas, metadata = mixin.lora_state_dict(
            str(tmp_path / "out"),
            weight_name="pytorch_lora_weights.safetensors",
            return_lora_metadata=True,
        )
        mixin.load_lora_into_unet(
            state, network_alphas=alphas, unet=unet, adapter_name="x", metadata=metadata
        )
    want = deltas(adapter)
    loaded = {n: m for n, m in unet.named_modules() if isinstance(m, LoraLayer)}
    assert loaded.keys() == want.keys()
    for name, layer in loaded.items():
        torch.testing.assert_close(layer.get_delta_weight("x"), want[name], rtol=1e-5, atol=1e-6)
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.r"] == 4


def test_kohya_names_go_through_diffusers_converter(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="pip install 'lora-merge[oracles]'")
    from lora_merge.reshape.diffusers_names import through_diffusers

    g = torch.Generator().manual_seed(0)
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{flat}.lora_down.weight": torch.randn(4, 8, generator=g),
        f"{flat}.lora_up.weight": torch.randn(12, 4, generator=g),
        f"{flat}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = Adapter.from_pretrained(tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = through_diffusers(adapter, "StableDiffusion")
    assert list(there.modules) == [name] and there.dialect == "diffusers"
    torch.testing.assert_close(deltas(there)[name], deltas(adapter)[flat])
    with pytest.raises(MethodError, match="Nonsense"):
        through_diffusers(adapter, "Nonsense")
