"""Adapters extracted from checkpoints that differ by a known low-rank change."""

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from test_resize import peft_deltas

from builders import SHAPES, save_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.cli.app import cli
from lora_merge.errors import MethodError, OutputError
from lora_merge.files.checkpoint import open_checkpoint
from lora_merge.reshape.extract import plan_extract
from lora_merge.reshape.options import ExtractOptions


@pytest.fixture
def models(tmp_path):
    """(base, tuned, changes): rank-2 changes, plus every kind of tensor that is no LoRA's."""
    generator = torch.Generator().manual_seed(0)
    base, tuned, changes = {}, {}, {}
    for name, (d_out, d_in) in SHAPES.items():
        weight = torch.randn(d_out, d_in, generator=generator)
        up = torch.randn(d_out, 2, generator=generator)
        change = up @ torch.randn(2, d_in, generator=generator) * 0.1
        base[f"{name}.weight"], tuned[f"{name}.weight"] = weight, weight + change
        changes[name] = tuned[f"{name}.weight"].double() - weight.double()
    base["model.norm.weight"], tuned["model.norm.weight"] = torch.ones(16), torch.ones(16) * 1.5
    base["model.embed_tokens.weight"] = torch.ones(10, 16)
    tuned["model.embed_tokens.weight"] = torch.ones(12, 16)
    base["model.still.weight"] = tuned["model.still.weight"] = torch.ones(4, 4)
    tuned["model.extra.bias"] = torch.zeros(3)
    for folder, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        save_file(dict(tensors), tmp_path / folder / "model.safetensors")
    return tmp_path / "base", tmp_path / "tuned", changes


def run(models, out, rule="energy:0.9999", **options):
    base, tuned, _ = models
    return extract(open_checkpoint(base), open_checkpoint(tuned), out, rule, **options)


def extract(base, tuned, out, rule="energy:0.95", **options):
    return plan_extract(base, tuned, rule, ExtractOptions(**options)).run(out).report


@pytest.mark.parametrize("layout", ["uniform", "per-module"])
def test_a_low_rank_change_is_found_exactly_and_peft_agrees(models, tmp_path, layout):
    report = run(models, tmp_path / "out", denoise=False, layout=layout)
    assert set(report.plan.ranks.values()) == {2}
    for name, delta in peft_deltas(tmp_path / "out").items():
        torch.testing.assert_close(delta, models[2][name], rtol=0, atol=2e-5)


def test_nothing_is_dropped_in_silence(models, tmp_path):
    coverage = {c.name: c for c in run(models, tmp_path / "out", denoise=False).coverage}
    assert coverage["model.norm.weight"].what == "left out"
    assert coverage["model.norm.weight"].change == pytest.approx(0.5)
    assert coverage["model.embed_tokens.weight"].what == "resized"
    assert coverage["model.extra.bias"].what == "new"
    assert coverage["model.still.weight"].what == "unchanged"
    extracted = coverage[f"{next(iter(SHAPES))}.weight"]
    assert extracted.what == "extracted" and 0 < extracted.change < 1


def test_a_change_of_nothing_has_no_relative_size(tmp_path):
    for folder, tensor in (("base", torch.zeros(6, 4)), ("tuned", torch.ones(6, 4))):
        (tmp_path / folder).mkdir()
        save_file({"layer.weight": tensor}, tmp_path / folder / "model.safetensors")
    models = (tmp_path / "base", tmp_path / "tuned", None)
    (only,) = run(models, tmp_path / "out", denoise=False).coverage
    assert (only.what, only.change) == ("extracted", None)


def test_energy_is_that_of_the_whole_difference(models, tmp_path):
    report = run(models, tmp_path / "out", "1", denoise=False)
    for name, module in report.plan.modules.items():
        values = torch.linalg.svdvals(models[2][name])
        expected = float(values[0] ** 2 / values.square().sum())
        assert module.energy == pytest.approx(expected, rel=1e-5)
        assert module.frobenius == pytest.approx(float(torch.linalg.matrix_norm(models[2][name])))


def test_rank_limit_leaves_a_residual_that_counts(models, tmp_path):
    report = run(models, tmp_path / "out", "energy:0.99", max_rank=1, denoise=False)
    assert set(report.plan.ranks.values()) == {1}
    assert report.plan.energy < 0.99


def test_rounding_noise_is_cut_at_the_threshold(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 384, generator=generator) * 0.02
    u = torch.linalg.qr(torch.randn(256, 6, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(384, 6, generator=generator)).Q
    change = (u * torch.linspace(0.02, 0.01, 6)) @ v.mT
    name = "model.layers.0.mlp.up_proj.weight"
    models = []
    for folder, tensor in (("base", weight), ("tuned", weight.bfloat16().float() + change)):
        (tmp_path / folder).mkdir()
        save_file({name: tensor.bfloat16()}, tmp_path / folder / "model.safetensors")
        models.append(open_checkpoint(tmp_path / folder))
    capped = extract(*models, tmp_path / "out", "energy:0.999", max_rank=40)
    assert list(capped.plan.ranks.values()) == [6]
    assert len(capped.capped) == 1
    noisy = extract(*models, tmp_path / "all", "energy:0.999", max_rank=40, denoise=False)
    assert list(noisy.plan.ranks.values()) == [40]


def test_refusals(models, tmp_path):
    base, tuned, _ = models
    same = open_checkpoint(base)
    with pytest.raises(MethodError, match="no weight differs"):
        extract(same, same, tmp_path / "out")
    with pytest.raises(OutputError):
        extract(same, open_checkpoint(tuned), base)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_gpt2s_transposed_weights_are_extracted_as_peft_reads_them(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=8, vocab_size=20)
    base, tuned = (transformers.GPT2LMHeadModel(config) for _ in range(2))
    tuned.load_state_dict(base.state_dict())
    changes = {}
    with torch.no_grad():
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            weight = tuned.get_submodule(f"transformer.h.0.{name}").weight  # (in, out)
            change = torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1]) * 0.1
            changes[f"transformer.h.0.{name}"] = change
            weight += change
    for model, folder in ((base, "base"), (tuned, "tuned")):
        model.save_pretrained(tmp_path / folder)
    opened = [open_checkpoint(tmp_path / folder) for folder in ("base", "tuned")]
    report = extract(*opened, tmp_path / "out", "energy:0.9999", denoise=False)
    assert set(report.plan.ranks.values()) == {2}
    assert Adapter.from_pretrained(tmp_path / "out").config.fan_in_fan_out
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    layers = dict(loaded.base_model.model.named_modules())
    for name, change in changes.items():
        found = layers[name].get_delta_weight("default")
        torch.testing.assert_close(found, change, rtol=0, atol=1e-5)
    ids = torch.arange(6)[None]
    expected = tuned.eval()(ids).logits
    torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=0, atol=1e-4)


def test_not_finite_tensors_are_named(models, tmp_path):
    base, tuned, _ = models
    from safetensors.torch import load_file

    tensors = load_file(tuned / "model.safetensors")
    name = f"{next(iter(SHAPES))}.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tuned / "model.safetensors")
    report = extract(open_checkpoint(base), open_checkpoint(tuned), tmp_path / "out", "2")
    assert {c.name for c in report.coverage if c.what == "not finite"} == {name}


def test_what_was_extracted_goes_with_adapters_of_that_base(models, tmp_path, monkeypatch):
    """PEFT names a base by the path that it was loaded from."""
    base, tuned, _ = models
    monkeypatch.chdir(base.parent.parent)
    named = base.relative_to(base.parent.parent)
    shapes = {"model.layers.0.mlp.up_proj": SHAPES["model.layers.0.mlp.up_proj"]}
    save_adapter(tmp_path / "a", shapes=shapes, base_model_name_or_path=str(named))
    for arguments in (
        ["extract", "--base", named, "--tuned", tuned, "-o", tmp_path / "x", "--rank", 2],
        ["compare", tmp_path / "x", tmp_path / "a"],
    ):
        result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output


def test_command_line(models, tmp_path):
    base, tuned, _ = models
    arguments = ["extract", "--base", base, "--tuned", tuned, "-o", tmp_path / "out", "--rank", 2]
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0
    assert "resized: 1 tensors (model.embed_tokens.weight)" in result.stdout
    assert "left out: 1 tensors, change up to 50 % (model.norm.weight)" in result.stdout
    adapter = Adapter.from_pretrained(tmp_path / "out")
    assert set(adapter.modules) == set(SHAPES) and adapter.config.base_model == "base"
