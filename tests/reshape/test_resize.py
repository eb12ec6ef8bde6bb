"""Resized adapters: Eckart-Young, laws of truncation, what PEFT computes from the files."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from builders import SHAPES, Tiny, adapter_parts, delta, save_adapter, save_parts
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.measured.spectra import adapter_spectra
from lora_merge.errors import AdapterError, MethodError, OutputError
from lora_merge.ranks.choose import choose_ranks
from lora_merge.reshape.resize import cast_error, plan_resize, truncated


def best(dense: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def run(source: Path, out: Path, rule: str, *, dtype=None, layout="per-module", **options):
    adapter = Adapter.from_pretrained(source)
    spectra = adapter_spectra(adapter, keep_cores=True)
    plan = choose_ranks(spectra.by_module, spectra.costs, rule, before=spectra.ranks, **options)
    return plan_resize(adapter, spectra, plan, dtype=dtype, layout=layout).run(out).report


@pytest.mark.parametrize("rule", ["2", "energy:0.8", "budget:x0.5", "full", "elbow"])
@pytest.mark.parametrize("layout", ["per-module", "uniform"])
def test_every_delta_is_the_best_of_its_rank(tmp_path, rule, layout):
    source = save_adapter(tmp_path / "a", r=6, alpha=9)
    report = run(source, tmp_path / "out", rule, layout=layout)
    before, after = (Adapter.from_pretrained(p) for p in (source, tmp_path / "out"))
    for module in report.modules:
        dense = delta(before, module.name)
        expected = best(dense, module.rank)
        norm = float(torch.linalg.matrix_norm(dense))
        torch.testing.assert_close(delta(after, module.name), expected, rtol=0, atol=3e-6 * norm)
        error = float(torch.linalg.matrix_norm(dense - expected))
        assert module.truncation == pytest.approx(error, rel=1e-6, abs=1e-7 * norm)
        assert module.frobenius == pytest.approx(norm)
    ranks = {s.rank for s in after.modules.values()}
    assert len(ranks) == 1 if layout == "uniform" else ranks == set(report.plan.ranks.values())


@given(
    seed=st.integers(0, 1000),
    r=st.integers(1, 8),
    alpha=st.sampled_from([4, -4]),
    one=st.integers(1, 8),
    two=st.integers(1, 8),
)
def test_truncating_twice_is_truncating_once(tmp_path_factory, seed, r, alpha, one, two):
    folder = tmp_path_factory.mktemp("laws")
    source = save_adapter(folder / "a", r=r, alpha=alpha, seed=seed)
    small, large = sorted((min(one, r), min(two, r)))
    run(source, folder / "large", str(large))
    run(folder / "large", folder / "twice", str(small))
    run(source, folder / "once", str(small))
    run(folder / "once", folder / "again", str(small))
    twice, once, again = (Adapter.from_pretrained(folder / n) for n in ("twice", "once", "again"))
    original = Adapter.from_pretrained(source)
    for name in SHAPES:
        dense = delta(original, name)
        bound = 1e-5 * float(torch.linalg.matrix_norm(dense))
        expected = best(dense, small)
        gap = torch.linalg.svdvals(dense)
        if small < r and float(gap[small - 1] - gap[small]) < 0.02 * float(gap[0]):
            continue  # the best approximation is hardly unique
        for result in (twice, once, again):
            distance = float(torch.linalg.matrix_norm(delta(result, name) - expected))
            assert distance < 20 * bound


def test_no_other_matrix_of_the_rank_is_closer(tmp_path):
    source = save_adapter(tmp_path / "a", r=5)
    report = run(source, tmp_path / "out", "2")
    adapter = Adapter.from_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    for module in report.modules:
        dense = delta(adapter, module.name)
        for _ in range(5):
            basis = torch.randn(dense.shape[0], 2, generator=generator, dtype=torch.float64)
            basis = torch.linalg.qr(basis).Q
            other = torch.linalg.matrix_norm(dense - basis @ (basis.mT @ dense))
            assert module.truncation <= float(other)


@pytest.mark.parametrize(
    ("dtype", "bound", "typical"), [("BF16", 1.2e-2, 2.3e-3), ("F16", 1.5e-3, 3e-4)]
)
def test_cast_error_is_measured_apart(tmp_path, dtype, bound, typical):
    source = save_adapter(tmp_path / "a", r=6)
    report = run(source, tmp_path / "out", "full", dtype=dtype)
    assert report.truncation < 1e-7
    assert report.cast == pytest.approx(typical, rel=0.3)
    before, after = (Adapter.from_pretrained(p) for p in (source, tmp_path / "out"))
    for module in report.modules:
        change = torch.linalg.matrix_norm(delta(after, module.name) - delta(before, module.name))
        assert module.cast == pytest.approx(float(change), rel=1e-2)
        assert module.cast < bound * module.frobenius


def test_cast_error_of_what_fits_is_zero(tmp_path):
    adapter = Adapter.from_pretrained(save_adapter(tmp_path / "a"))
    module = adapter_spectra(adapter, keep_cores=True).modules[0]
    a, b = adapter.read(module.module)
    stack = truncated(module, b, a, 2)
    assert cast_error(stack, torch.float32) == 0
    assert cast_error(stack, torch.bfloat16) > 0


def test_output_keeps_the_dtype_and_the_extras(tmp_path):
    config, tensors = adapter_parts(r=4, dtype=torch.bfloat16, modules_to_save=["head"])
    tensors["base_model.model.head.weight"] = torch.arange(6.0).reshape(2, 3)
    source = save_parts(tmp_path / "a", config, tensors)
    report = run(source, tmp_path / "out", "2")
    assert report.dtype == "BF16"
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(
        written["base_model.model.head.weight"], tensors["base_model.model.head.weight"]
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]


def test_dropped_modules_leave_the_file_and_the_config(tmp_path):
    config, tensors = adapter_parts(r=4)
    dead = next(iter(SHAPES))
    key = f"base_model.model.{dead}.lora_B.weight"
    tensors[key] = tensors[key] * 0
    source = save_parts(tmp_path / "a", config, tensors)
    run(source, tmp_path / "out", "energy:0.9", min_rank=0)
    after = Adapter.from_pretrained(tmp_path / "out")
    assert set(after.modules) == set(SHAPES) - {dead}
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert not any(dead == t or dead.endswith("." + t) for t in targets)
    with_dead = run(source, tmp_path / "kept", "energy:0.9")
    assert with_dead.plan.ranks[dead] == 1


def test_a_planned_rank_is_the_rank_found_afterwards(tmp_path):
    source = save_adapter(tmp_path / "a", r=8)
    report = run(source, tmp_path / "out", "budget:x0.6")
    again = adapter_spectra(Adapter.from_pretrained(tmp_path / "out"))
    for module in again.modules:
        assert module.spec.rank == report.plan.ranks[module.module]
        assert module.measures.numerical_rank == module.spec.rank
    assert report.plan.parameters <= 0.6 * report.plan.parameters_before


def test_nothing_is_written_for_bad_input(tmp_path):
    config, tensors = adapter_parts()
    key = f"base_model.model.{next(iter(SHAPES))}.lora_A.weight"
    tensors[key][0, 0] = float("nan")
    source = save_parts(tmp_path / "a", config, tensors)
    with pytest.raises(AdapterError, match="lora_A has 1 NaN"):
        run(source, tmp_path / "out", "2")
    good = save_adapter(tmp_path / "b")
    with pytest.raises(OutputError):
        run(good, good, "2")
    zero = {k: v * 0 for k, v in adapter_parts()[1].items()}
    with pytest.raises(MethodError, match="no module would be left"):
        run(save_parts(tmp_path / "z", config, zero), tmp_path / "out", "energy:0.9", min_rank=0)
    assert not (tmp_path / "out").exists()


def peft_deltas(folder: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    model = PeftModel.from_pretrained(Tiny(), folder)
    layers = dict(model.base_model.model.named_modules())
    return {name: layers[name].get_delta_weight("default").double() for name in SHAPES}


@pytest.mark.parametrize("layout", ["per-module", "uniform"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_the_result_and_computes_the_same(tmp_path, layout, use_rslora):
    source = save_adapter(
        tmp_path / "a",
        r=6,
        alpha=12,
        use_rslora=use_rslora,
        task_type=None,
        rank_pattern={"layers.0.mlp.up_proj": 3},
    )
    report = run(source, tmp_path / "out", "energy:0.9", layout=layout)
    assert len(set(report.plan.ranks.values())) > 1
    before, after = peft_deltas(source), peft_deltas(tmp_path / "out")
    for name in SHAPES:
        expected = best(before[name], report.plan.ranks[name])
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-5)
    # A runtime that ignores both patterns (vLLM) takes alpha / r for every module.
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in SHAPES:
        stem = f"base_model.model.{name}.lora_"
        product = scale * written[f"{stem}B.weight"] @ written[f"{stem}A.weight"]
        torch.testing.assert_close(product.double(), after[name], rtol=0, atol=1e-5)


def special_forms() -> tuple[dict, dict[str, torch.Tensor]]:
    """A convolution, an embedding and three experts, rank 4 each."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    stem = "base_model.model."
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["conv", "embed"],
        "target_parameters": ["mlp.experts.up"],
        "peft_version": "0.19.0",
    }
    return config, {
        f"{stem}conv.lora_A.weight": normal(4, 3, 5, 5),
        f"{stem}conv.lora_B.weight": normal(8, 4, 1, 1),
        f"{stem}embed.lora_embedding_A": normal(4, 30),
        f"{stem}embed.lora_embedding_B": normal(12, 4),
        f"{stem}layers.0.mlp.experts.lora_A.weight": normal(12, 9),
        f"{stem}layers.0.mlp.experts.lora_B.weight": normal(10, 12),
    }


@pytest.mark.parametrize("rule", ["full", "2", "budget:x0.6"])
def test_convolutions_embeddings_and_experts_resize_too(tmp_path, rule):
    from lora_merge.adapters.alignment import align, read_stacks

    config, tensors = special_forms()
    source = save_parts(tmp_path / "a", config, tensors)
    report = run(source, tmp_path / "out", rule)
    before, after = (align([Adapter.from_pretrained(p)]) for p in (source, tmp_path / "out"))
    assert len(before.modules) == len(after.modules) == 3
    for one, two in zip(before.modules, after.modules, strict=True):
        assert one.first.geometry == two.first.geometry
        rank = report.plan.ranks[one.name]
        for old, new in zip(read_stacks(before, one), read_stacks(after, two), strict=True):
            expected = best(old.delta().double(), rank)
            torch.testing.assert_close(new.delta().double(), expected, rtol=0, atol=1e-4)
