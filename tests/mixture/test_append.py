"""Growing a mixture: what was learned stays, to the bit."""

from pathlib import Path

import pytest
import torch
from tiny import experts_for, llama, tokens

from lora_merge.errors import MethodError
from lora_merge.mixture.append import append_experts
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture


@pytest.mark.parametrize("preset", ["arrow", "spectr", "request", "sequence"])
def test_untrained_gates_are_as_if_made_with_all_experts(preset: str) -> None:
    model = llama()
    experts = experts_for(model, (4, 8, 3, 5))
    grown = append_experts(Mixture(experts[:2], preset), experts[2:])
    whole = Mixture(experts, preset)
    assert grown.names == whole.names and grown.spec == whole.spec
    assert all(torch.equal(grown.gate[k], whole.gate[k]) for k in whole.gate)


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("preset", ["meteora", "smora", "xlora"])
def test_old_experts_keep_their_scores(preset: str, null: bool, tmp_path: Path) -> None:
    """Scores of the old experts are what they were; a new one scores zero until it is trained."""
    if preset == "smora" and null:
        pytest.skip("rank gates have no null expert")
    model = llama()
    experts = experts_for(model, (4, 8, 3))
    settings = {"value": "raw", "null_expert": null, "top_k": None}
    # The first two experts cover all modules, so that growing changes no module's place.
    before = Mixture([experts[0], experts[2]], preset)
    before = before.with_gate(before.gate, value="raw", top_k=None, trained=True)
    if null:
        before = Mixture([experts[0], experts[2]], preset, **settings)
        before = before.with_gate(before.gate, trained=True, top_k=None)
    after = append_experts(before, [experts[1]], names=["new"])
    assert after.names[-1] == "new" and not after.spec.trained
    load_mixture(model, before)
    with torch.no_grad():
        expected = model(tokens()).logits
        model.mixture.detach()
        load_mixture(model, after)
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    again = Mixture.from_pretrained(after.save_pretrained(tmp_path / "grown"))
    assert all(torch.equal(again.gate[k], after.gate[k]) for k in after.gate)


def test_a_new_expert_on_new_modules() -> None:
    from tiny import shapes_of

    from builders import make_adapter

    model = llama()
    narrow = make_adapter("narrow", seed=1, shapes=shapes_of(model, "q_proj"))
    wide = make_adapter("wide", seed=2, shapes=shapes_of(model, "q_proj", "v_proj"))
    for preset in ("meteora", "xlora", "smora"):
        grown = append_experts(Mixture([narrow], preset), [wide])
        assert len(grown.modules) == 4
        load_mixture(model, grown).detach()


def test_weights_are_not_guessed() -> None:
    model = llama()
    experts = experts_for(model)
    with pytest.raises(MethodError, match="one weight per expert"):
        append_experts(Mixture(experts[:2], "constant"), experts[2:])
