"""Adapters out of live PEFT models and into them, with the files PEFT writes as the oracle."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import experts_for, llama
from torch import Tensor, nn

import lora_merge
from builders import delta, make_adapter
from lora_merge.adapters.access.coerce import open_adapter, open_adapters
from lora_merge.adapters.adapter import Adapter
from lora_merge.errors import AlignmentError, LoraMergeError, MethodError, SourceError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def live(**config: object) -> PeftModel:
    """A model with two adapters of different ranks, random everywhere."""
    torch.manual_seed(3)
    settings = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **config}
    model = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, **settings), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=3, use_rslora=True, **settings))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 14)[None]).logits


def test_a_live_adapter_is_what_peft_writes(tmp_path: Path) -> None:
    model = live(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    opened = open_adapters(model)
    assert [a.name for a in opened] == ["one", "two"]
    for adapter in opened:
        stored = Adapter.from_pretrained(tmp_path / adapter.name)
        assert adapter.modules == stored.modules
        assert adapter.extras == stored.extras
        assert adapter.config.target_modules == stored.config.target_modules
        for name in adapter.modules:
            assert torch.equal(delta(adapter, name), delta(stored, name))


def test_an_opened_adapter_stays_when_training_goes_on() -> None:
    model = live()
    adapter = Adapter.from_peft(model, "one")
    name = next(iter(adapter.modules))
    before = delta(adapter, name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(delta(adapter, name), before)


def test_a_merge_of_live_adapters_goes_back_into_the_model() -> None:
    model = live()
    merged = lora_merge.merge(model, method="cat", weights=[0.5, 2.0])
    before = logits(model)
    assert merged.to_peft(model, "merged") is model
    assert torch.equal(logits(model), before)  # it waits until it is made active
    model.set_adapter("merged")
    ours = logits(model)
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "peft", combination_type="cat")
    model.set_adapter("peft")
    torch.testing.assert_close(ours, logits(model), rtol=1e-5, atol=1e-6)
    around = merged.to_peft(llama())  # a plain model gets PEFT around it
    torch.testing.assert_close(logits(around), ours, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for n, p in around.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_model_it_does_not_fit_stays_as_it_was(layers: int) -> None:
    adapter = experts_for(llama())[0]
    other = llama(num_hidden_layers=layers, hidden_size=32 if layers == 1 else 16)
    names = [name for name, _ in other.named_modules()]
    before = logits(other)
    with pytest.raises(AlignmentError, match="does not fit the model"):
        adapter.to_peft(other)
    assert [name for name, _ in other.named_modules()] == names
    assert torch.equal(logits(other), before)
    beside = get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AlignmentError, match="does not fit the model"):
        adapter.to_peft(beside, "new")
    assert list(beside.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["double", "train", "a.b", ""])
def test_names_that_would_break_a_model_are_refused(name: str) -> None:
    model = live()
    adapter = open_adapters(model)[0]
    with pytest.raises(MethodError, match="cannot call an adapter"):
        adapter.to_peft(model, name)
    assert list(model.peft_config) == ["one", "two"]


def test_taken_and_missing_names() -> None:
    model = live()
    with pytest.raises(MethodError, match="has an adapter 'one'"):
        Adapter.from_peft(model, "one").to_peft(model, "one")
    with pytest.raises(MethodError, match=r"no adapter 'three'\n  try: it has: one, two"):
        Adapter.from_peft(model, "three")
    with pytest.raises(SourceError, match=r"one adapter is wanted, not 2 \(one, two\)"):
        open_adapter(model)


def test_what_no_file_could_hold_is_refused_live_too() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(LoraMergeError, match=r"use_dora|DoRA"):
        open_adapters(model)


def test_everything_that_stands_for_adapters(tmp_path: Path) -> None:
    memory = make_adapter("memory")
    for name in ("b", "a"):
        memory.save_pretrained(tmp_path / name)
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    given = [memory, tmp_path / "b", f"{tmp_path}/*", model]
    names = ["memory", f"{tmp_path}/b", f"{tmp_path}/a", f"{tmp_path}/b", "default"]
    assert [a.name for a in open_adapters(given)] == names
    assert [a.name for a in open_adapters(iter(given))] == names
    assert open_adapters(memory) == [memory]
    assert open_adapter(tmp_path / "b").modules.keys() == memory.modules.keys()


@pytest.mark.parametrize("wrong", [3, None, b"bytes", {"a": 1}, [3], nn.Linear(2, 2), [llama]])
def test_what_stands_for_none(wrong: object) -> None:
    with pytest.raises(SourceError, match=r"is no adapter\n  try: give a path"):
        open_adapters(wrong)  # type: ignore[arg-type]


def test_an_adapter_prints_as_a_few_lines() -> None:
    adapter = make_adapter("<b>name</b>")
    assert repr(adapter).splitlines() == [
        "Adapter <b>name</b>",
        "  base model  tiny-base",
        "  modules     4, rank 4",
        f"  parameters  {adapter.num_parameters:,}, F32",
    ]
    assert "&lt;b&gt;name" in adapter._repr_html_()
    assert "<b>" not in adapter._repr_html_()
