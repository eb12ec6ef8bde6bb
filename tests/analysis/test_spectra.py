"""Spectra of adapters against the dense float64 SVD, and every status a module can have."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import SHAPES, adapter_parts, make_adapter
from lora_merge.adapters.adapter import Adapter, build_adapter
from lora_merge.adapters.config import parse_config
from lora_merge.adapters.measured.spectra import adapter_spectra, require_finite
from lora_merge.adapters.module_names import Place, labels, place_of
from lora_merge.analysis.advice import advise, group_modules, sort_modules
from lora_merge.analysis.export import spectra_document, write_csv
from lora_merge.analysis.metrics import METRICS
from lora_merge.errors import AdapterError, MethodError
from lora_merge.files.tensor_file import TensorDict

PHI = (1 + math.sqrt(5)) / 2
NAME = "model.layers.0.self_attn.q_proj"


def adapter_of(b: torch.Tensor, a: torch.Tensor, name: str = NAME, **config) -> Adapter:
    raw = {"peft_type": "LORA", "r": a.shape[0], "lora_alpha": a.shape[0], **config}
    key = f"base_model.model.{name}.lora_"
    tensors = TensorDict({f"{key}A.weight": a, f"{key}B.weight": b})
    return build_adapter("test", parse_config(raw, "test"), tensors)


def values_of(adapter: Adapter) -> list[float]:
    return adapter_spectra(adapter).modules[0].values.tolist()


def test_closed_form_factors():
    b, a = torch.tensor([[1.0, 1], [0, 1]]), torch.tensor([[1.0, 0], [1, 1]])
    assert values_of(adapter_of(b, a)) == pytest.approx([PHI**2, PHI**-2])
    assert values_of(adapter_of(b, a, lora_alpha=16)) == pytest.approx([8 * PHI**2, 8 * PHI**-2])
    rslora = values_of(adapter_of(b, a, lora_alpha=16, use_rslora=True))
    assert rslora == pytest.approx([16 / 2**0.5 * PHI**2, 16 / 2**0.5 * PHI**-2])
    b = torch.tensor([[1.0, 0], [0, 1], [0, 0]])
    a = torch.tensor([[3.0, 0, 0, 0], [0, 4, 0, 0]])
    assert values_of(adapter_of(b, a)) == pytest.approx([4, 3])


@given(
    d_out=st.integers(1, 40),
    d_in=st.integers(1, 40),
    r=st.integers(1, 16),
    alpha=st.sampled_from([1, 16, -3]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_values_are_those_of_the_dense_delta(d_out, d_in, r, alpha, dtype, seed):
    config, tensors = adapter_parts(
        r=r, alpha=alpha, seed=seed, shapes={NAME: (d_out, d_in)}, dtype=dtype
    )
    adapter = build_adapter("test", parse_config(config, "test"), TensorDict(tensors))
    a, b = adapter.read(NAME)
    dense = torch.linalg.svdvals(b.double() @ a.double() * (alpha / r))[: min(d_out, d_in, r)]
    values = adapter_spectra(adapter).modules[0].values
    torch.testing.assert_close(values, dense, rtol=0, atol=1e-11 * float(dense[0]))


@given(seed=st.integers(0, 1000), r=st.integers(1, 8), scale=st.floats(0.01, 100))
def test_gauge_permutation_padding_and_scale(seed, r, scale):
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(20, r, generator=generator, dtype=torch.float64)
    a = torch.randn(r, 15, generator=generator, dtype=torch.float64)
    gauge = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
    gauge = gauge * torch.logspace(0, 2, r, dtype=torch.float64)
    values = torch.tensor(values_of(adapter_of(b, a)), dtype=torch.float64)
    top = float(values[0])

    def same(other_b, other_a, times=1.0):
        other = torch.tensor(values_of(adapter_of(other_b, other_a)), dtype=torch.float64)
        torch.testing.assert_close(other[:r], values * times, rtol=0, atol=1e-9 * top * times)
        assert float(other[r:].abs().sum()) <= 1e-11 * top * times

    same(b @ gauge, torch.linalg.solve(gauge, a))
    order = torch.randperm(r, generator=generator)
    same(-b[:, order], a[order])
    same(torch.cat([b, b * 0], 1), torch.cat([a, a], 0))
    same(b * scale, a, scale)


@given(seed=st.integers(0, 100))
def test_energy_is_the_product_of_grams(seed):
    adapter = make_adapter(seed=seed)
    for module in adapter_spectra(adapter).modules:
        a, b = (x.double() for x in adapter.read(module.module))
        square = module.spec.scaling**2 * float(((b.mT @ b) * (a @ a.mT)).sum())
        assert float(module.values.square().sum()) == pytest.approx(square, rel=1e-9)
        bound = module.spec.scaling * float(
            torch.linalg.matrix_norm(b, 2) * torch.linalg.matrix_norm(a, 2)
        )
        assert float(module.values[0]) <= bound * (1 + 1e-9)


def test_smallest_value_in_float32_factors():
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(2048, 16, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(1024, 16, generator=generator, dtype=torch.float64)).Q
    planted = torch.logspace(0, -6, 16, dtype=torch.float64)
    b, a = (u * planted.sqrt()).float(), (planted.sqrt()[:, None] * v.mT).float()
    values = torch.tensor(values_of(adapter_of(b, a)), dtype=torch.float64)
    dense = torch.linalg.svdvals(
        torch.linalg.qr(b.double()).R @ torch.linalg.qr(a.double().mT).R.mT
    )
    assert float((values - dense).abs().max()) < 1e-12
    assert float((values - planted).abs().max()) < 1e-6


def test_patterns_experts_and_convolutions_use_their_own_rank():
    patterned = make_adapter(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6})
    module = adapter_spectra(patterned).modules[1]
    assert module.module.endswith("q_proj") and len(module.values) == 2
    a, b = patterned.read(module.module)
    dense = torch.linalg.svdvals(3 * b.double() @ a.double())[:2]
    torch.testing.assert_close(module.values, dense)
    conv_a, conv_b = torch.randn(3, 4, 5, 5), torch.randn(6, 3, 1, 1)
    conv = adapter_spectra(adapter_of(conv_b, conv_a)).modules[0]
    dense = torch.linalg.svdvals(conv_b.flatten(1).double() @ conv_a.flatten(1).double())[:3]
    torch.testing.assert_close(conv.values, dense)


def test_experts_are_measured_apart_and_ranked_together():
    name = "model.layers.0.mlp.experts"
    raw = {"r": 2, "lora_alpha": 2, "peft_version": "0.19.0"}
    a, b = torch.randn(6, 7), torch.randn(5, 6)
    adapter = adapter_of(b, a, name, target_parameters=["mlp.experts.up"], **raw)
    spectra = adapter_spectra(adapter)
    name += ".up"
    assert [m.name for m in spectra.modules] == [f"{name}[{e}]" for e in range(3)]
    for e, module in enumerate(spectra.modules):
        dense = b.reshape(5, 2, 3)[:, :, e].double() @ a.reshape(3, 2, 7)[e].double()
        torch.testing.assert_close(module.values, torch.linalg.svdvals(dense)[:2])
    together = spectra.by_module[name].square().sum()
    assert float(together) == pytest.approx(spectra.frobenius**2)
    assert spectra.costs[name] == 3 * 12


def test_every_status_is_said_and_nothing_is_nan():
    config, tensors = adapter_parts()
    keys = [f"base_model.model.{name}.lora_{half}.weight" for name in SHAPES for half in "BA"]
    tensors[keys[0]] = tensors[keys[0]] * 0
    tensors[keys[3]] = tensors[keys[3]] * 0
    tensors[keys[4]][0, 0] = float("nan")
    adapter = build_adapter("test", parse_config(config, "test"), TensorDict(tensors))
    spectra = adapter_spectra(adapter)
    status = {m.module: m.status for m in spectra.modules}
    names = list(SHAPES)
    assert status[names[0]] == "untrained"
    assert status[names[1]] == "zero"
    assert status[names[2]] == "not finite"
    assert status[names[3]] == "ok"
    text = json.dumps(spectra_document([spectra]), allow_nan=False)
    assert json.loads(text)["adapters"][0]["modules"][0]["name"] == names[1]
    assert len(advise(spectra).remarks) >= 3
    assert names[2] not in spectra.by_module
    with pytest.raises(AdapterError, match="lora_B has 1 NaN"):
        require_finite(spectra)


def test_large_finite_float16_values_are_finite():
    b, a = torch.full((300, 1), 60000.0).half(), torch.full((1, 300), 60000.0).half()
    module = adapter_spectra(adapter_of(b, a)).modules[0]
    assert module.status == "ok"
    assert float(module.values[0]) == pytest.approx(300 * float(b[0, 0]) * float(a[0, 0]))


def test_rank_beyond_the_sides_and_single_rows():
    wide = adapter_spectra(adapter_of(torch.randn(3, 8), torch.randn(8, 5))).modules[0]
    assert len(wide.values) == 3 and wide.measures.numerical_rank == 3
    row = adapter_spectra(adapter_of(torch.randn(1, 2), torch.randn(2, 9))).modules[0]
    assert len(row.values) == 1 and row.measures.stable_rank == 1


def test_patterns_select_and_an_unknown_one_is_refused():
    adapter = make_adapter()
    chosen = adapter_spectra(adapter, modules=["1.*.q_proj"]).modules
    assert [m.module for m in chosen] == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(MethodError, match="no module matches"):
        adapter_spectra(adapter, modules=["nothing"])


def test_jobs_do_not_change_a_bit():
    adapter = make_adapter(seed=3)
    one, many = (adapter_spectra(adapter, jobs=n) for n in (1, 4))
    for a, b in zip(one.modules, many.modules, strict=True):
        assert a.module == b.module and torch.equal(a.values, b.values)


def test_llama_3_8b_at_rank_16_has_so_many_parameters():
    shapes = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }
    layer = {f"model.layers.0.{name}": shape for name, shape in shapes.items()}
    adapter = make_adapter(r=16, shapes=layer, dtype=torch.bfloat16)
    spectra = adapter_spectra(adapter)
    assert sum(spectra.costs.values()) == 81_920
    assert 32 * adapter.num_parameters == 41_943_040


def test_groups_cover_all_modules_once():
    shapes = {f"model.layers.{n}.{k}": (8, 8) for n in range(9) for k in ("q", "mlp.up", "v")}
    spectra = adapter_spectra(make_adapter(shapes=shapes, r=2))
    groups = group_modules(spectra)
    assert sum(len(g.modules) for g in groups) == 27
    assert {g.layers for g in groups} == {(0, 2), (3, 5), (6, 8)}
    for metric in METRICS:
        values = [METRICS[metric](m.measures) for m in sort_modules(spectra.modules, metric)]
        assert values == sorted(values, reverse=True)


def test_advice_on_a_known_spectrum():
    u = torch.linalg.qr(torch.randn(64, 4, dtype=torch.float64)).Q
    b, a = u * torch.tensor([4.0, 3, 2, 1]).double(), torch.eye(4, 64, dtype=torch.float64)
    advice = advise(adapter_spectra(adapter_of(b, a)))
    assert advice.headline == "95 % of the energy needs rank 3 of 4: 75 % of the parameters"
    by_flag = {o.flag: o for o in advice.options}
    assert by_flag["--energy 0.95"].energy == pytest.approx(29 / 30)
    assert by_flag["--rank 3"].ranks == (3, 3)
    assert by_flag["--budget x0.5"].ranks == (2, 2)


def test_places_and_labels():
    assert place_of("model.layers.12.self_attn.q_proj") == Place(
        "model.layers", 12, "self_attn.q_proj"
    )
    assert place_of("lm_head").layer is None
    assert place_of("h.3.attn").stack == "h"
    assert place_of("model.layers.12.self_attn.q_proj").part == "self_attn.q_proj"
    assert place_of("model.layers.1.mlp.experts.7.up_proj").part == "up_proj"
    assert place_of("unet.down_blocks.1.attentions.0.to_q").part == "to_q"
    assert place_of("lm_head").part == "lm_head"
    kinds = ["attention.self.query", "attention.output.dense", "output.dense", "intermediate.dense"]
    names = labels(Place("l", 0, k) for k in kinds)
    assert set(names.values()) == {
        "query",
        "attention.output.dense",
        "output.dense",
        "intermediate.dense",
    }
    two = labels([Place("encoder.block", 0, "q"), Place("decoder.block", 0, "q")])
    assert set(two.values()) == {"encoder:q", "decoder:q"}


def test_csv_has_a_line_per_value(tmp_path):
    spectra = adapter_spectra(make_adapter(r=3))
    write_csv([spectra], tmp_path / "s.csv")
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * len(SHAPES)
    _, module, i, sigma, energy = lines[3].split(",")
    assert (module, i) == (spectra.modules[0].name, "3")
    assert float(sigma) == float(spectra.modules[0].values[2])
    assert float(energy) == 1.0
