"""Tokens that are each decided alone, by the quick way, against the one that everything can go."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import llama, shapes_of, tokens

from builders import make_adapter
from lora_merge.kernels import gated_stack
from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack.gate import kept_of_one
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.runtime.call.in_force import InForce
from lora_merge.mixture.runtime.wrapped.prepared import Prepared

ONE = torch.tensor([[7]])
CASES = {
    "constant": {"weights": (0.2, 0.0, 0.0, 1.3)},
    "request": {},
    "arrow": {"top_k": 1},
    "meteora": {"top_k": 2},
    "phatgoose": {"top_k": 3, "null_expert": True},
    "smora": {"top_k": 4, "scale": 1.5},
    "xlora": {"top_k": 2},
}


def attached(preset: str, layout: str = "stack", **config: object) -> torch.nn.Module:
    model = llama(dtype=torch.float64, attention_bias=True, **config)
    shapes = shapes_of(model)
    experts = [make_adapter(f"expert{i}", r=4, seed=i, shapes=shapes) for i in range(4)]
    mixture = Mixture(experts, preset, **CASES[preset])
    random = torch.Generator().manual_seed(7)
    for name, tensor in mixture.gate.items():
        mixture.gate[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=random)
    load_mixture(model, mixture, layout=layout)
    if preset == "request":
        model.mixture.set_gate(requests=["expert2"])
    return model


def logits(model: torch.nn.Module, ids: torch.Tensor, *, quick: bool = True) -> torch.Tensor:
    """Of a call, whose tokens may be decided alone or may not."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if not quick:
            patch.setattr(InForce, "decides_each_alone", property(lambda gate: False))
        return model(ids).logits


@pytest.mark.parametrize("layout", ["stack", "rows"])
@pytest.mark.parametrize("preset", list(CASES))
def test_the_quick_way_is_the_same(
    preset: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ran = attached(preset, layout), []
    original = Prepared.of_products
    monkeypatch.setattr(Prepared, "of_products", lambda *a: ran.append(1) or original(*a))
    for ids in (ONE, tokens(1, 5), tokens(3, 1)):
        expected = logits(model, ids, quick=False)
        assert not ran
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-6, atol=1e-6)
        if ids is ONE:
            assert len(ran) == 8  # q with k and v, o, gate with up, down, twice
        ran.clear()


@pytest.mark.parametrize("layout", ["stack", "rows"])
def test_what_was_prepared_follows_what_it_was_made_of(layout: str) -> None:
    model = attached("meteora", layout)
    before = logits(model, ONE)
    group = model.mixture.parts[0]
    with torch.no_grad():
        group.up0.mul_(2.0)  # as an optimizer would
    trained = logits(model, ONE)
    assert not torch.equal(trained, before)
    group.up0.data = group.up0.data / 2  # as somebody might
    torch.testing.assert_close(logits(model, ONE), before)
    group.rank_gates = torch.nn.Parameter(torch.zeros(len(group.down), dtype=torch.float64))
    without = logits(model, ONE)
    torch.testing.assert_close(without, logits(model, ONE, quick=False))
    assert not torch.equal(without, before)
    group.rank_gates = None
    copy = model.double().to(torch.float32)
    torch.testing.assert_close(logits(copy, ONE).double(), before, rtol=1e-4, atol=1e-4)


def test_experts_without_a_weight_are_not_read() -> None:
    model = attached("constant")
    for group in model.mixture.parts:
        block = group.block
        for up in group._ups:
            up.data[block : 3 * block] = torch.nan  # experts 1 and 2
    assert bool(logits(model, ONE).isfinite().all())


def test_a_look_at_the_gate_takes_the_long_way() -> None:
    model = attached("arrow")
    expected = logits(model, ONE)
    with model.mixture.watch() as seen:
        torch.testing.assert_close(logits(model, ONE), expected)
    assert seen.rows()


@given(
    scores=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=7, unique=True),
    rule=st.builds(
        Rule,
        value=st.sampled_from(
            ["softmax", "softmax_all", "softmax_twice", "sigmoid", "raw", "binary"]
        ),
        top_k=st.none() | st.integers(1, 8),
        temperature=st.sampled_from([0.5, 1.0, 3.0]),
        factor=st.sampled_from([1.0, 2.5]),
        null_score=st.none() | st.just(0.25),
    ),
)
def test_numbers_decide_as_tensors_do(scores: list[float], rule: Rule) -> None:
    expected = gated_stack.weights_of(torch.tensor(scores, dtype=torch.float64), rule)
    weights = torch.zeros_like(expected)
    for place, weight in kept_of_one(scores, rule):
        weights[place] = weight
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)
