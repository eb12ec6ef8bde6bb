"""Data-weighted truncation against the dense whitened SVD, and moments recorded from PEFT."""

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from builders import SHAPES, Tiny, delta, make_adapter, save_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.measured.spectra import adapter_spectra
from lora_merge.analysis.weighted_spectra import (
    collect_moments,
    read_moments,
    weigh_spectra,
    weighted_core,
)
from lora_merge.cli.app import cli
from lora_merge.errors import AdapterError


def problem(seed: int, r: int, m: int = 20, n: int = 15, samples: int = 40):
    random = torch.Generator().manual_seed(seed)
    up = torch.randn(m, r, generator=random, dtype=torch.float64)
    down = torch.randn(r, n, generator=random, dtype=torch.float64)
    spread = torch.logspace(0, -1.5, n, dtype=torch.float64)
    x = torch.randn(samples, n, generator=random, dtype=torch.float64) * spread
    weights = torch.rand(m, generator=random, dtype=torch.float64) + 0.01
    return up, down, x, weights


@given(seed=st.integers(0, 1000), r=st.integers(2, 6), weigh=st.booleans(), few=st.booleans())
def test_no_rank_k_matrix_has_a_smaller_error_on_the_data(seed, r, weigh, few):
    samples = max(1, r - 1) if few else 40  # fewer samples than r: singular moments
    up, down, x, weights = problem(seed, r, samples=samples)
    rank = max(1, r // 2)
    h = x @ down.mT
    moment = h.mT @ h / len(x)
    row_weights = weights if weigh else torch.ones_like(weights)
    core = weighted_core(up, moment, weights if weigh else None)
    left, right = core.truncate(rank)
    outputs = x @ (up @ down).mT / len(x) ** 0.5 * row_weights.sqrt()
    small = x @ ((up @ left) @ (right @ down)).mT / len(x) ** 0.5 * row_weights.sqrt()
    best = torch.linalg.svdvals(outputs)
    error = float(torch.linalg.matrix_norm(outputs - small))
    assert error == pytest.approx(
        float(best[rank:].square().sum().sqrt()), abs=1e-6 * float(best[0])
    )
    size = min(len(best), len(core.values))
    torch.testing.assert_close(core.values[:size], best[:size], rtol=1e-6, atol=1e-7)


def test_white_data_through_orthonormal_rows_is_the_plain_svd():
    up, down, _, _ = problem(0, 4)
    down = torch.linalg.qr(down.mT).Q.mT
    core = weighted_core(up, 3 * torch.eye(4, dtype=torch.float64))
    plain = torch.linalg.svdvals(up @ down)[:4]
    torch.testing.assert_close(core.values, 3**0.5 * plain)


def record(folder, path, *, backward: bool):
    from peft import PeftModel

    model = PeftModel.from_pretrained(Tiny(), folder)
    layers = dict(model.base_model.model.named_modules())
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    with collect_moments(model, path):
        for name in SHAPES:
            for batch in x.split(20):
                inputs = batch.clone().requires_grad_(backward)
                output = layers[name](inputs)
                if backward:
                    (output * torch.arange(output.shape[1])).sum().backward()
    return x


def test_recorded_moments_are_those_of_the_factors(tmp_path):
    folder = save_adapter(tmp_path / "a", task_type=None)
    x = record(folder, tmp_path / "stats.safetensors", backward=True)
    moments = read_moments(tmp_path / "stats.safetensors")
    adapter = Adapter.from_pretrained(folder)
    for name in SHAPES:
        a, _ = adapter.read(name)
        h = (x @ a.mT).double()
        torch.testing.assert_close(moments.moments[name], h.mT @ h / 50, rtol=1e-5, atol=1e-6)
        fisher = torch.arange(SHAPES[name][0]).double().square()
        torch.testing.assert_close(moments.fisher[name], fisher)
    weighted = weigh_spectra(adapter, adapter_spectra(adapter, keep_cores=True), moments)
    for module in weighted.modules:
        outputs = x.double() @ delta(adapter, module.module).mT
        energy = float(outputs.square().sum()) / 50
        assert float(module.values.square().sum()) == pytest.approx(energy, rel=1e-5)


@pytest.mark.parametrize("option", ["--bottleneck", "--fisher"])
def test_resizing_by_data_beats_resizing_by_spectrum_on_it(tmp_path, option):
    folder = save_adapter(tmp_path / "a", r=6, task_type=None)
    stats = tmp_path / "stats.safetensors"
    x = record(folder, stats, backward=True).double()
    for out, options in (("plain", []), ("weighed", [option, stats])):
        arguments = ["resize", folder, "-o", tmp_path / out, "--rank", 2, *options]
        result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0
    before, plain, weighed = (
        Adapter.from_pretrained(tmp_path / name) for name in ("a", "plain", "weighed")
    )
    for name, (d_out, _) in SHAPES.items():
        weights = torch.arange(d_out).double() if option == "--fisher" else torch.ones(d_out)
        errors = [
            float(((x @ (delta(other, name) - delta(before, name)).mT) * weights).square().sum())
            for other in (plain, weighed)
        ]
        assert errors[1] <= errors[0] * (1 + 1e-6)


def test_wrong_statistics_are_refused(tmp_path):
    adapter = make_adapter(r=3)
    spectra = adapter_spectra(adapter, keep_cores=True)
    path = tmp_path / "stats.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(AdapterError, match="no bottleneck moments"):
        read_moments(path)
    save_file({f"{n}.bottleneck_moment": torch.eye(4).double() for n in SHAPES}, path)
    with pytest.raises(AdapterError, match="no moments of rank 3"):
        weigh_spectra(adapter, spectra, read_moments(path))
    save_file({f"{n}.bottleneck_moment": torch.eye(3).double() for n in SHAPES}, path)
    with pytest.raises(AdapterError, match="no Fisher weights"):
        weigh_spectra(adapter, spectra, read_moments(path), fisher=True)
    with pytest.raises(AdapterError, match="no LoRA named"), collect_moments(Tiny(), path):
        pass


def test_an_adalora_model_cannot_be_observed(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(target_modules=["0"], total_step=5)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    refused = pytest.raises(AdapterError, match="bare parameters")
    with refused, collect_moments(model, tmp_path / "s"):
        pass
    assert not (tmp_path / "s").exists()
