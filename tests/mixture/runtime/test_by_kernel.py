"""A mixture's modules on another implementation than the plain one."""

import pytest
import torch
from tiny import experts_for, llama, tokens

from lora_merge.errors import MethodError
from lora_merge.kernels.gated_stack import dispatch, reference
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture


def test_a_model_can_run_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """LORA_MERGE_KERNELS reaches a mixture's modules, whatever its gate."""
    model = llama(num_hidden_layers=1)
    load_mixture(model, Mixture(experts_for(model, (2, 3, 1)), "arrow", top_k=2))
    ids = tokens(1, 3)
    seen = []
    expand = reference.expand
    monkeypatch.setattr(reference, "expand", lambda *a: seen.append(a) or expand(*a))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        assert not seen
        monkeypatch.setenv(dispatch.VARIABLE, "reference")
        slow = model(input_ids=ids).logits
    assert seen
    torch.testing.assert_close(slow, plain, rtol=1e-4, atol=1e-4)


def test_concat_is_chosen_when_a_mixture_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "concat")
    model = llama(num_hidden_layers=1)
    weight = model.model.layers[0].mlp.down_proj.weight
    mixture = Mixture(experts_for(model, (2, 3, 1)), "arrow")
    load_mixture(model, mixture)
    assert not weight.is_contiguous()
    model.mixture.detach()
    load_mixture(model, mixture, layout="stack")
    assert weight.is_contiguous()


def test_names_that_are_none_are_refused_at_attaching(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(num_hidden_layers=1)
    mixture = Mixture(experts_for(model, (2, 3, 1)), "arrow")
    with pytest.raises(MethodError, match="layout is 'diagonal'"):
        load_mixture(model, mixture, layout="diagonal")
    monkeypatch.setenv(dispatch.VARIABLE, "fastest")
    with pytest.raises(MethodError, match="LORA_MERGE_KERNELS is 'fastest'"):
        load_mixture(model, mixture)
    assert not hasattr(model, "mixture")
