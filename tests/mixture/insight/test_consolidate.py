"""Grouping, merging and cutting experts against dense algebra."""

from pathlib import Path

import pytest
import torch
from tiny import experts_for, llama, shapes_of, tokens

import lora_merge
from builders import make_adapter
from lora_merge.errors import MethodError
from lora_merge.mixture.insight.consolidate import consolidate, group_experts
from lora_merge.mixture.insight.usage import Usage
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def used(model: torch.nn.Module, mixture: Mixture, **gate: object) -> Usage:
    handle = load_mixture(model, mixture)
    if gate:
        handle.set_gate(**gate)
    with torch.no_grad(), handle.watch() as usage:
        model(tokens(3, 8))
    handle.detach()
    return usage


def delta(mixture: Mixture, expert: int, module: str) -> torch.Tensor:
    adapter = mixture.experts[expert].adapter
    a, b = adapter.read(module)
    return adapter.modules[module].scaling * b.double() @ a.double()


@pytest.mark.parametrize("preset", ["arrow", "spectr", "meteora", "xlora", "request"])
def test_as_many_experts_as_before_is_the_same_mixture(preset: str) -> None:
    model = llama()
    mixture = Mixture(experts_for(model), preset)
    usage = used(model, mixture, **({"weights": [0.5, 0.3, 0.2]} if preset == "request" else {}))
    result = consolidate(mixture, usage, experts=3)
    assert sorted(len(g) for g in result.groups) == [1, 1, 1] and result.error == 0.0
    outputs = []
    for one in (mixture, result.mixture):
        handle = load_mixture(model, one)
        if preset == "request":
            handle.set_gate(weights={"expert1": 1.0, "expert0": 0.5})
        outputs.append(model(tokens()).logits)
        handle.detach()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_experts_that_speak_together_are_merged_by_usage() -> None:
    model = llama()
    shapes = shapes_of(model)
    adapters = [make_adapter(f"e{i}", r=3, seed=i, shapes=shapes) for i in range(4)]
    mixture = Mixture(adapters, "request")
    rows = [{"e0": 0.6, "e1": 0.2}, {"e2": 0.3, "e3": 0.1}, None]
    usage = used(model, mixture, requests=rows)
    assert group_experts(usage, 2) == [[0, 1], [2, 3]]
    result = consolidate(mixture, usage, experts=2)
    assert result.groups == (("e0", "e1"), ("e2", "e3"))
    for module in mixture.modules:
        for place, (first, second) in enumerate(((0, 1), (2, 3))):
            expected = 0.75 * delta(mixture, first, module) + 0.25 * delta(mixture, second, module)
            got = delta(result.mixture, place, module)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # On such text the two mixtures are one and the same function.
    outputs = []
    for one, requests in ((mixture, rows), (result.mixture, [{"e0": 0.8}, {"e2": 0.4}, None])):
        handle = load_mixture(model, one)
        handle.set_gate(requests=requests)
        outputs.append(model(tokens(3, 8)).logits)
        handle.detach()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_the_cut_is_the_best_of_its_rank() -> None:
    model = llama()
    mixture = Mixture(experts_for(model), "arrow")
    usage = used(model, mixture)
    whole = consolidate(mixture, usage, experts=1)
    small = consolidate(mixture, usage, experts=1, rank=4)
    lost = total = 0.0
    for module in mixture.modules:
        values = torch.linalg.svdvals(delta(whole.mixture, 0, module))
        lost, total = lost + float((values[4:] ** 2).sum()), total + float((values**2).sum())
        difference = delta(small.mixture, 0, module) - delta(whole.mixture, 0, module)
        assert float(difference.norm()) == pytest.approx(float(values[4:].norm()), rel=1e-3)
    assert small.error == pytest.approx((lost / total) ** 0.5, rel=1e-3) and small.error > 0.1
    assert max(small.mixture.experts[0].adapter.ranks()) == 4


def test_learned_gates_go_on_from_their_means() -> None:
    model = llama()
    for preset in ("meteora", "xlora", "phatgoose"):
        mixture = Mixture(experts_for(model), preset)
        result = consolidate(mixture, used(model, mixture), experts=2)
        assert not result.mixture.spec.trained
        load_mixture(model, result.mixture).detach()


def test_general_knowledge_is_subtracted_from_groups_too() -> None:
    """Equal weights: three task experts less a general one, or two groups less the same."""
    model = llama()
    tasks = experts_for(model, (4, 8, 3))
    general = make_adapter("general", r=2, seed=9, shapes=shapes_of(model))
    mixture = Mixture(tasks, "arrow", general=[general], top_k=3, temperature=1e9)
    result = consolidate(mixture, used(model, mixture), experts=2)
    small = result.mixture
    assert [e.name for e in small.experts if e.general] == ["general"]
    assert [len(group) for group in result.groups] == [2, 1]
    handle = load_mixture(model, small.with_gate(small.gate, top_k=2))
    handle.detach()
    full = [m.name for m in mixture.alignment.modules if len(m.specs) == 4]
    for module in full:
        pair = [mixture.names.index(name) for name in result.groups[0]]
        expected = sum(delta(mixture, e, module) for e in pair) / 2
        torch.testing.assert_close(delta(small, 0, module), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(delta(small, 2, module), delta(mixture, 3, module))


def test_what_cannot_be_grouped_is_said() -> None:
    model = llama()
    mixture = Mixture(experts_for(model), "arrow")
    usage = used(model, mixture)
    with pytest.raises(MethodError, match="4 of 3 experts"):
        consolidate(mixture, usage, experts=4)
    with pytest.raises(MethodError, match="another mixture"):
        consolidate(Mixture(experts_for(model)[:2], "arrow"), usage, experts=1)
    smora = Mixture(experts_for(model), "smora")
    with pytest.raises(MethodError, match="single ranks"):
        consolidate(smora, used(model, smora), experts=1)


def test_the_public_call_refuses_before_the_model_runs(tmp_path):
    """What can be said from the mixture alone costs no pass over texts."""
    mixture = Mixture(str(EXAMPLES / "adapters" / "*"))
    with pytest.raises(lora_merge.ArgumentError, match="base and data to measure it"):
        lora_merge.consolidate(mixture, experts=2)
    for many in (4, 0):
        with pytest.raises(MethodError):
            lora_merge.consolidate(mixture, base="nowhere", data=[], experts=many)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("mine")
    with pytest.raises(lora_merge.OutputError):
        lora_merge.consolidate(mixture, base="nowhere", data=[], out=tmp_path / "there")
