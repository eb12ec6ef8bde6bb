"""Scores that remember: against the plain recursion, and exact beside a KV cache."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import experts_for, llama, tokens
from torch import Tensor

from lora_merge.errors import MethodError
from lora_merge.mixture.gates.memory import accumulate, evidence
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

PRESETS = ("meteora", "xlora", "smora", "arrow", "spectr", "phatgoose")


def recursion(scores: Tensor, memory: float, keep: Tensor, before: Tensor) -> Tensor:
    """Token by token, as the definition says."""
    rows, state = [], before.clone()
    for t in range(scores.shape[1]):
        state = memory * state + scores[:, t] * keep[:, t, None]
        rows.append(state)
    return torch.stack(rows, dim=1)


@given(
    st.integers(1, 3), st.integers(1, 600), st.floats(0, 0.99), st.integers(0, 1000), st.booleans()
)
def test_sums_are_the_recursion(
    batch: int, length: int, memory: float, seed: int, going_on: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, length, 2, generator=random, dtype=torch.float64)
    keep = torch.rand(batch, length, generator=random) < 0.8
    before = torch.randn(batch, 2, generator=random, dtype=torch.float64) * going_on
    got = accumulate(scores, memory, keep, before if going_on else None)
    torch.testing.assert_close(got, recursion(scores, memory, keep, before))
    torch.testing.assert_close(evidence(accumulate(scores, memory), memory), scores)
    cut = length // 2
    if cut:
        head = accumulate(scores[:, :cut], memory, keep[:, :cut], before)
        tail = accumulate(scores[:, cut:], memory, keep[:, cut:], head[:, -1])
        torch.testing.assert_close(torch.cat([head, tail], dim=1), got)


def remembering(preset: str) -> Mixture:
    mixture = Mixture(experts_for(llama()), preset, memory=0.8)
    if preset == "phatgoose":
        random = torch.Generator().manual_seed(0)
        for name, rows in mixture.gate.items():
            mixture.gate[name] = torch.randn(rows.shape, generator=random)
    return mixture


@pytest.mark.parametrize("preset", PRESETS)
def test_the_kv_cache_keeps_what_was_seen(preset: str) -> None:
    model = llama()
    load_mixture(model, remembering(preset))
    ids = tokens(batch=2, length=8)
    ids[1, :3] = 0
    mask = (ids != 0).long()
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    alone = model.generate(ids[1:, 3:], attention_mask=mask[1:, 3:], max_new_tokens=8)
    assert torch.equal(alone[0, 5:], cached[1, 8:])  # padding adds nothing
    beams = {**options, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


@pytest.mark.parametrize("preset", ["meteora", "xlora"])
def test_a_cache_that_the_model_makes_is_followed(preset: str) -> None:
    model = llama()
    load_mixture(model, remembering(preset))
    ids = tokens(2, 10)
    first = model(ids[:, :6], use_cache=True)
    second = model(ids[:, 6:], past_key_values=first.past_key_values)
    whole = model(ids).logits[:, 6:]
    torch.testing.assert_close(second.logits, whole, rtol=1e-4, atol=1e-5)
    with model.mixture.disabled():
        base = model(ids).logits[:, 6:]
    assert not torch.allclose(whole, base, atol=1e-3)


@pytest.mark.parametrize("preset", ["meteora", "xlora"])
def test_tokens_cannot_be_taken_back(preset: str) -> None:
    model = llama()
    load_mixture(model, remembering(preset))
    cache = model(tokens(), use_cache=True).past_key_values
    with pytest.raises(MethodError, match="cannot forget"):
        cache.crop(4)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [("arrow", {"memory": 1.0}), ("sequence", {"memory": 0.5}), ("request", {"memory": 0.5})],
)
def test_memory_that_means_nothing_is_refused(preset: str, settings: dict) -> None:
    with pytest.raises(MethodError, match=r"memory 1\.0|no scores per token to remember"):
        Mixture(experts_for(llama()), preset, **settings)


def test_memory_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    compiled = torch.compile(accumulate, fullgraph=True, backend="eager")
    scores, before = torch.randn(2, 9, 3), torch.randn(2, 3)
    torch.testing.assert_close(
        compiled(scores, 0.8, None, before), accumulate(scores, 0.8, None, before)
    )
