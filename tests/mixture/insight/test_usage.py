"""Statistics of a gate against a count by hand."""

import pytest
import torch
from tiny import experts_for, llama, tokens

from lora_merge.adapters.module_names import kind_of, layer_of, natural
from lora_merge.errors import MethodError
from lora_merge.mixture.gates.gate import PRESETS
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.runtime.overhead import overhead


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "request"])
def test_weights_are_counted_token_by_token(preset: str) -> None:
    model = llama()
    mixture = Mixture(experts_for(model), preset)
    handle = load_mixture(model, mixture)
    with pytest.raises(MethodError, match="nothing was watched"):
        handle.usage()
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    with handle.watch() as usage:
        model(ids, attention_mask=mask)
        model(ids, attention_mask=mask)
    assert handle.usage() is usage and handle.switch.now().observe is None
    assert set(usage.modules) == set(mixture.modules)
    name = "model.layers.1.mlp.down_proj"
    entry = usage.modules[name]
    present = [i for i in range(3) if name in mixture.experts[i].adapter.modules]
    rows = entry.last
    if mixture.spec.granularity == "rank":
        owner = [e for e in present for _ in range(mixture.experts[e].adapter.modules[name].rank)]
        rows = torch.stack(
            [rows[:, [i for i, o in enumerate(owner) if o == e]].mean(1) for e in present], 1
        )
    if len(rows) == 12:
        rows = rows[mask.bool().flatten()]
        assert entry.tokens == 20
    expected = torch.zeros(3, dtype=torch.float64)
    expected[present] = rows.double().mean(0)
    torch.testing.assert_close(usage.mean_weights()[name], expected, rtol=1e-5, atol=1e-6)
    kept = torch.zeros(3, dtype=torch.float64)
    kept[present] = (rows != 0).double().mean(0)
    torch.testing.assert_close(entry.kept / entry.tokens, kept)
    assert 0 <= usage.entropy(name) <= 1
    assert set(usage.by(layer_of)) == {"layers.0", "layers.1"}
    assert set(usage.by(kind_of)) >= {"q_proj", "down_proj"}


def test_entropy_is_zero_for_one_hot_and_one_for_uniform() -> None:
    model = llama()
    handle = load_mixture(model, Mixture(experts_for(model), "constant"))
    name = "model.layers.0.mlp.down_proj"  # all three experts touch it
    for weights, expected in (([0, 1, 0], 0.0), ([0.2, 0.2, 0.2], 1.0)):
        handle.set_gate(weights=weights)
        with handle.watch() as usage:
            model(tokens())
        assert usage.entropy(name) == pytest.approx(expected, abs=1e-6)


def test_names_sort_as_people_count() -> None:
    assert natural(["layers.10", "layers.2"]) == ["layers.2", "layers.10"]
    assert natural(["net.out", "net.1", "net"]) == ["net", "net.1", "net.out"]
    assert layer_of("model.layers.3.mlp.up_proj") == "layers.3"
    assert layer_of("lm_head") == "lm_head"


def test_overhead_counts_what_is_there() -> None:
    model = llama()
    mixture = Mixture(experts_for(model), "meteora")
    handle = load_mixture(model, mixture)
    cost = overhead(mixture)
    assert cost.expert_parameters == sum(e.adapter.num_parameters for e in mixture.experts)
    assert cost.gate_parameters == sum(t.numel() for t in mixture.gate.values())
    assert cost.base_parameters == sum(
        model.get_submodule(n).weight.numel() for n in mixture.modules
    )
    held = sum(p.numel() * p.element_size() for p in handle.parameters())
    assert cost.bytes == held and handle.overhead() == cost
    assert cost.passes == 1 and overhead(Mixture(experts_for(model), "xlora")).passes == 2
