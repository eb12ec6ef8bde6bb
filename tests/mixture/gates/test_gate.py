"""Laws of the activations, over random scores, and of the table of presets."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.errors import MethodError
from lora_merge.kernels import gated_stack
from lora_merge.mixture.gates.gate import PRESETS, GateSpec, gate_spec

VALUES = ("softmax", "softmax_all", "softmax_twice", "sigmoid", "raw", "binary")


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, GateSpec]:
    """Distinct scores, so that the kept ones are unambiguous."""
    size, rows = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scores = torch.randn(rows, 2, size, generator=random, dtype=torch.float64) * 3
    spec = GateSpec(
        "meteora",
        "input",
        value=draw(st.sampled_from(VALUES)),
        top_k=draw(st.none() | st.integers(1, size)),
        temperature=draw(st.sampled_from([0.5, 1.0, 2.5])),
    )
    return scores, spec


def activate(scores: torch.Tensor, spec: GateSpec, bias: torch.Tensor | None = None):
    return gated_stack.weights_of(scores, spec.rule(scores.shape[-1]), bias)


@given(cases())
def test_exactly_the_largest_are_kept_with_their_values(case) -> None:
    scores, spec = case
    weights = activate(scores, spec)
    size = scores.shape[-1]
    top_k = min(spec.top_k or size, size)
    for row, out in zip(scores.flatten(0, 1).tolist(), weights.flatten(0, 1), strict=True):
        kept = sorted(range(size), key=lambda e: -row[e])[:top_k]
        everyone = torch.tensor(row) / spec.temperature
        part = torch.tensor([row[e] for e in kept])
        expected = {
            "softmax": torch.softmax(part / spec.temperature, 0),
            "softmax_all": torch.softmax(everyone, 0)[kept],
            "softmax_twice": torch.softmax(torch.softmax(everyone, 0)[kept], 0),
            "sigmoid": torch.sigmoid(part / spec.temperature),
            "raw": part,
            "binary": torch.ones(top_k),
        }[spec.value]
        torch.testing.assert_close(out[kept].float(), expected.float(), rtol=1e-4, atol=1e-6)
        assert all(out[e] == 0 for e in range(size) if e not in kept)


@given(cases(), st.integers(0, 1000))
def test_permuting_experts_permutes_weights(case, seed: int) -> None:
    scores, spec = case
    order = torch.randperm(scores.shape[-1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        activate(scores[..., order], spec), activate(scores, spec)[..., order]
    )


@given(cases())
def test_softmaxes_ignore_a_shift_and_sum_to_at_most_one(case) -> None:
    scores, spec = case
    if not spec.value.startswith("softmax"):
        return
    weights = activate(scores, spec)
    torch.testing.assert_close(activate(scores + 7.5, spec), weights)
    total = weights.sum(-1)
    assert (total <= 1 + 1e-9).all() and (weights >= 0).all()
    if spec.value != "softmax_all":
        torch.testing.assert_close(total, torch.ones_like(total))


@given(cases())
def test_the_bias_selects_and_does_not_weigh(case) -> None:
    scores, spec = case
    spec = replace(spec, value="raw", top_k=1)
    bias = torch.zeros(scores.shape[-1], dtype=scores.dtype)
    bias[-1] = 1e6
    weights = activate(scores, spec, bias if scores.shape[-1] > 1 else None)
    torch.testing.assert_close(weights[..., -1], scores[..., -1])
    assert not bool(weights[..., :-1].any())


def test_rank_gates_weigh_one_on_average() -> None:
    spec = gate_spec("smora", top_k=4)
    weights = activate(torch.randn(50, 1, 16), spec)
    torch.testing.assert_close(weights.sum(-1), torch.full((50, 1), 4.0))
    assert gate_spec("smora", scale=0.5).factor(16) == 0.5


def test_half_precision_scores_are_decided_in_float32() -> None:
    scores = torch.tensor([[[1.0, 1.0078125, 0.5]]], dtype=torch.bfloat16)
    weights = activate(scores, gate_spec("meteora", top_k=2))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights[0, 0, :2].sum(), torch.tensor(1.0))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_settings_survive_json(preset: str) -> None:
    spec = replace(gate_spec(preset, temperature=0.7), weights=(1.0, 2.5))
    assert GateSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"wings": 1}, "no setting 'wings'"),
        ({"value": "hard"}, "value is 'hard'"),
        ({"granularity": "rank", "null_expert": True}, "no null expert"),
        ({"depth": 0}, "depth 0"),
        ({"depth": 2}, "it has no depth"),
        ({"weights": (1.0, 2.0)}, "it has no weights"),
        ({"scale": float("inf")}, "scale inf"),
        ({"null_score": float("nan")}, "null_score nan"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        gate_spec("meteora", **settings)


def test_a_preset_in_a_file_is_a_name() -> None:
    for preset in (["meteora"], None, 3):
        with pytest.raises(MethodError, match="the gate's preset is"):
            GateSpec.from_json({**gate_spec("meteora").to_json(), "preset": preset})


def test_a_whole_model_signal_cannot_be_averaged_over_a_prompt() -> None:
    with pytest.raises(MethodError, match="averaged over a prompt"):
        gate_spec("xlora", sequence=True)
