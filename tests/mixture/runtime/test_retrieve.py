"""Experts chosen by the prompt, and experts that run without the others."""

from pathlib import Path

import pytest
import torch
from tiny import experts_for, llama, sharp, tokens
from torch import Tensor

from lora_merge.errors import LoraMergeError, MethodError
from lora_merge.mixture.append import append_experts
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture
from lora_merge.mixture.runtime.call import bank
from lora_merge.mixture.training.data import DataError, Example
from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.mixture.training.train import train_gate

MODEL = llama(num_hidden_layers=1, initializer_range=0.2)
TEN = experts_for(MODEL, (2, 3, 2, 4, 2, 2, 2, 2, 2, 2))


def words(expert: int, length: int, seed: int) -> Tensor:
    """A text of words that only this expert's texts have."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(2 + 5 * expert, 7 + 5 * expert, (length,), generator=random)


def row(expert: int, seed: int, skipped: int = 0) -> Example:
    return Example(tuple(words(expert, 12, seed).tolist()), skipped, expert)


def fitted(count: int = 3) -> Mixture:
    start = Mixture(TEN[:count], "retrieve", hidden_size=32)
    assert not start.spec.trained
    return train_gate(MODEL, start, [row(e, 10 * e + n) for e in range(count) for n in range(3)])


def chosen(handle, ids: Tensor, **inputs: Tensor) -> list[int]:
    """Which expert each row's tokens got, in the first module."""
    with torch.no_grad(), handle.watch() as seen:
        MODEL(ids, **inputs)
    rows = next(iter(seen.modules.values())).last
    assert bool(((rows == 1).sum(1) == 1).all()) and bool((rows.sum(1) == 1).all())
    return rows.argmax(1).tolist()


def test_the_prompt_finds_its_expert_also_after_a_file(tmp_path: Path) -> None:
    mixture = fitted()
    mixture.save_pretrained(tmp_path / "mix")
    handle = load_mixture(MODEL, tmp_path / "mix")
    batch = torch.stack([words(e, 9, 99 + e) for e in (2, 0, 1)])
    assert chosen(handle, batch) == [2, 0, 1]
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[:, :5] = 0  # padding that looks like another expert's text
    padded = torch.cat([words(0, 5, 1), words(1, 9, 5)])[None]
    assert chosen(handle, padded, attention_mask=mask) == [1]
    places = torch.cat([torch.arange(6), torch.arange(8)])[None]
    packed = torch.cat([words(2, 6, 3), words(1, 8, 4)])[None]
    assert chosen(handle, packed, position_ids=places) == [2] * 6 + [1] * 8
    handle.detach()


def test_rows_are_read_as_the_gate_will_see_them() -> None:
    start = Mixture(TEN[:2], "retrieve", hidden_size=32)
    prompt = [
        Example((*words(e, 6, e).tolist(), *words(1 - e, 9, 5).tolist()), 6, e) for e in (0, 1)
    ]
    parts = [
        Example((*words(0, 4, 1).tolist(), *words(1, 5, 2).tolist()), 0, -1, (0,) * 4 + (1,) * 5)
    ]
    for rows in (prompt, parts):
        handle = load_mixture(MODEL, train_gate(MODEL, start, rows))
        assert chosen(handle, torch.stack([words(e, 9, 7) for e in (0, 1)])) == [0, 1]
        handle.detach()
    with pytest.raises(DataError, match="no row names expert1"):
        train_gate(MODEL, start, [row(0, 1)])
    with pytest.raises(MethodError, match="whatever the experts are"):
        train_gate(MODEL, start, [row(0, 1), row(1, 1)], TrainSettings(train_experts=True))
    with pytest.raises(MethodError, match="once per prompt"):
        Mixture(TEN[:2], "retrieve", hidden_size=32, granularity="module")


def test_experts_come_with_their_texts() -> None:
    handle = load_mixture(MODEL, fitted(3))
    with pytest.raises(MethodError, match="texts of 1, there are those of 0") as caught:
        handle.add(TEN[3])
    assert "give texts" in caught.value.remedy
    handle.add(TEN[3], texts=[[words(3, 9, 1), words(3, 7, 2)]])
    batch = torch.stack([words(e, 9, 50 + e) for e in (3, 1, 0, 2)])
    assert chosen(handle, batch) == [3, 1, 0, 2]
    handle.remove("expert0")
    assert chosen(handle, batch[[0, 1, 3]]) == [2, 0, 1]
    handle.detach()
    arrow = load_mixture(MODEL, Mixture(TEN[:2], "arrow"))
    with pytest.raises(MethodError, match="none if it is not"):
        arrow.add(TEN[3], texts=[[words(3, 9, 1)]])
    arrow.detach()
    assert not append_experts(fitted(2), TEN[2]).spec.trained


@torch.no_grad()
@pytest.mark.parametrize("general", [False, True])
def test_few_of_many_experts_run_without_the_others(
    monkeypatch: pytest.MonkeyPatch, general: bool
) -> None:
    """The same numbers up to rounding, from modules with the named experts alone."""
    mixture = Mixture(TEN, "arrow", general=TEN[:1] if general else [])
    handle = load_mixture(MODEL, mixture)
    asked = ["expert7", {"expert2": 0.5, "expert9": -1.0}, None]
    found = {}
    for few in (8, 99):
        monkeypatch.setattr(bank, "_FEW", few)
        with handle.requests(*asked):
            ran = handle.switch.now().bank
            found[few] = MODEL(tokens(3)).logits
        assert len(ran.names) == (3 if few == 8 else 10)
    torch.testing.assert_close(found[8], found[99], atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(bank, "_FEW", 8)
    with handle.requests("expert7"):
        first = handle.switch.now().bank
    with handle.requests("expert7"):
        assert handle.switch.now().bank is first  # kept ready
        alone = MODEL(tokens(1)).logits
    handle.double()
    MODEL.double()
    with handle.requests("expert7"):
        assert handle.switch.now().bank is not first
        torch.testing.assert_close(MODEL(tokens(1)).logits, alone.double(), atol=1e-4, rtol=1e-4)
    MODEL.float()
    next(iter(handle.groups.parameters())).requires_grad_()
    with handle.requests("expert7"):
        assert len(handle.switch.now().bank.names) == 10  # a copy would get no gradient
    handle.detach()


@torch.no_grad()
def test_a_retrieved_expert_runs_alone_and_generates_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle = load_mixture(MODEL, fitted(10))
    ids = torch.stack([words(e, 9, 50 + e) for e in (4, 8)])
    assert chosen(handle, ids) == [4, 8]
    found = {}
    for few in (8, 99):
        monkeypatch.setattr(bank, "_FEW", few)
        out = MODEL.generate(ids, max_new_tokens=6, do_sample=False)
        found[few] = out, MODEL(ids).logits
    assert torch.equal(found[8][0], found[99][0])
    torch.testing.assert_close(found[8][1], found[99][1], atol=1e-5, rtol=1e-5)
    assert list(handle.bank._alone) == [(4, 8)]
    handle.detach()


def test_what_has_no_text_is_refused() -> None:
    handle = load_mixture(MODEL, sharp(MODEL, "retrieve"))
    with pytest.raises(LoraMergeError, match="decides its weights before it runs"):
        MODEL.model.layers[0].mlp.up_proj(torch.randn(1, 3, 32))
    handle.detach()
