"""A KV cache belongs to the gate that filled it."""

import copy
import pickle

import pytest
import torch
from tiny import experts_for, llama, tokens

from lora_merge.errors import MethodError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

MODEL = llama(num_hidden_layers=1)
EXPERTS = experts_for(MODEL)


@torch.no_grad()
@pytest.mark.parametrize("by_file", [False, True])
def test_a_saved_prompt_goes_on_under_its_own_request_and_no_other(by_file: bool) -> None:
    handle = load_mixture(MODEL, Mixture(EXPERTS, "request"))
    prompt, more = tokens(1, 6), tokens(3, 4, 2)
    with handle.requests("expert0"):
        saved = MODEL(prompt, use_cache=True).past_key_values
    kept = pickle.dumps(saved)

    def again():
        cache = pickle.loads(kept) if by_file else copy.deepcopy(saved)
        cache.batch_repeat_interleave(3)
        return cache

    whole = torch.cat([prompt.expand(3, -1), more], dim=1)
    for names in (["expert0"], ["expert0"] * 3):
        with handle.requests(*names):
            found = MODEL(more, past_key_values=again()).logits
            torch.testing.assert_close(found, MODEL(whole).logits[:, 6:], atol=1e-5, rtol=1e-5)
    for names in (["expert1"], ["expert0", "expert1", "expert0"], [{"expert0": 0.5}]):
        with (
            handle.requests(*names),
            pytest.raises(MethodError, match="made under requests for expert0 1,") as caught,
        ):
            MODEL(more, past_key_values=again())
        assert "start from an empty cache" in caught.value.remedy
    with handle.disabled(), pytest.raises(MethodError, match="read under the base model"):
        MODEL(more, past_key_values=again())
    handle.add(EXPERTS[0], names=["fourth"])  # changes nothing for who asks for another
    with handle.requests("expert0"):
        MODEL(more, past_key_values=again())
    with handle.disabled():
        base = MODEL(prompt, use_cache=True).past_key_values
        MODEL(more[:1], past_key_values=copy.deepcopy(base))
    with handle.requests("expert0"), pytest.raises(MethodError, match="was not active"):
        MODEL(more[:1], past_key_values=base)
    assert handle.switch.running == 0
    handle.detach()


@torch.no_grad()
def test_another_gate_or_other_experts_are_refused() -> None:
    handle = load_mixture(MODEL, Mixture(EXPERTS, "arrow"))
    more = tokens(1, 4, 2)

    def refused(cache: object, said: str) -> None:
        with pytest.raises(MethodError, match=said):
            MODEL(more, past_key_values=cache)

    cache = MODEL(tokens(1), use_cache=True).past_key_values
    MODEL(more, past_key_values=copy.deepcopy(cache))
    handle.set_gate(top_k=1)
    refused(cache, "made under the arrow gate of expert0, expert1, expert2")
    handle.set_gate()
    handle.remove("expert2")
    refused(cache, "read under the arrow gate of expert0, expert1")
    handle.add(EXPERTS[2])
    MODEL(more, past_key_values=copy.deepcopy(cache))
    other = load_mixture(MODEL, Mixture(EXPERTS[:1], "arrow"), name="other")
    refused(cache, "made under the arrow gate of expert0, expert1, expert2")
    other.detach()
    cache.reset()
    handle.set_gate(weights={"expert1": 1.0})
    if cache.get_seq_length() == 0:
        MODEL(more, past_key_values=cache)
    handle.detach()
