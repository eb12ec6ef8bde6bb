"""Copies of models, files of caches, other dtypes, offloaded, compiled and wrapped bases."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from tiny import experts_for, llama, sharp, tokens

from lora_merge.errors import LoraMergeWarning, MethodError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
GREEDY = {"max_new_tokens": 6, "do_sample": False}

# -- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["meteora", "xlora"])
def test_a_copy_of_a_model_is_its_own(preset: str, tmp_path) -> None:
    model = llama()
    base = model(tokens()).logits
    sharp(model, preset).save_pretrained(tmp_path / "mix")
    load_mixture(model, tmp_path / "mix")
    mixed = model(tokens()).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    average = torch.optim.swa_utils.AveragedModel(model).module
    for other in (copy.deepcopy(model), average, torch.load(file, weights_only=False)):
        assert torch.equal(other(tokens()).logits, mixed)
        other.mixture.set_gate(weights=[0.0, 0.0, 0.0])
        assert torch.equal(other(tokens()).logits, base)
        assert torch.equal(model(tokens()).logits, mixed)
        other.mixture.set_gate()
        model.mixture.set_gate(weights=[1.0, 0.0, 0.0])
        assert torch.equal(other(tokens()).logits, mixed)
        model.mixture.set_gate()
        assert other.generate(tokens(), **GREEDY).shape == (2, 15)
        other.mixture.detach()
        assert torch.equal(other(tokens()).logits, base)
    assert torch.equal(model(tokens()).logits, mixed)


@torch.no_grad()
@pytest.mark.parametrize(
    ("preset", "settings"), [("xlora", {}), ("meteora", {"memory": 0.8}), ("sequence", {})]
)
def test_a_cache_comes_back_from_a_file(preset: str, settings: dict) -> None:
    model = llama()
    load_mixture(model, sharp(model, preset, **settings))
    ids = tokens(1, 7)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    again = pickle.loads(pickle.dumps(cache))
    expected = model(ids[:, 6:], past_key_values=cache).logits
    assert torch.equal(model(ids[:, 6:], past_key_values=again).logits, expected)
    with model.mixture.disabled():
        cache = model(ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(MethodError, match="filled while the mixture was not active"):
        model(ids[:, 6:], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["meteora", "arrow", "smora", "recall"])
def test_gates_stay_float32_when_the_model_becomes_half(preset: str) -> None:
    after, before = llama(), llama().to(torch.bfloat16)
    mixture = sharp(after, preset)
    load_mixture(after, mixture)
    after.to(torch.bfloat16)
    load_mixture(before, mixture)
    assert torch.equal(after(tokens()).logits, before(tokens()).logits)
    for name, tensor in before.mixture.gate_tensors().items():
        assert torch.equal(after.mixture.gate_tensors()[name], tensor)


# -- where weights lie, and what modules are called -----------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("preset", ["constant", "arrow", "meteora", "sequence", "xlora"])
def test_an_offloaded_base(preset: str) -> None:
    from accelerate import cpu_offload

    plain, first, then = llama(), llama(), llama()
    mixture = sharp(plain, preset)
    for model in (plain, then):
        load_mixture(model, mixture)
    for model in (first, then):
        cpu_offload(model, execution_device=torch.device("cpu"))
    load_mixture(first, mixture)
    expected = plain(tokens()).logits
    for model in (first, then):
        assert torch.equal(model(tokens()).logits, expected)
        assert model.model.layers[0].mlp.up_proj.weight.is_meta


def test_a_model_that_was_compiled_before() -> None:
    model = llama(num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        base = compiled(tokens(), use_cache=False).logits
        handle = load_mixture(compiled, sharp(model, "meteora"))
        mixed = model(tokens(), use_cache=False).logits
        assert not torch.allclose(mixed, base, atol=1e-3)
        torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, mixed)
        with handle.disabled():
            torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, base)
        torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, mixed)
        handle.detach()
        torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, base)


def test_names_of_wrappers_and_of_models_that_see(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model
    from tiny import shapes_of
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    from builders import make_adapter

    wrapped = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    plain = llama()
    mixture = sharp(plain, "xlora")
    load_mixture(plain, mixture)
    load_mixture(wrapped.eval(), mixture)  # its B is zero, so it is its base
    torch.testing.assert_close(wrapped(tokens()).logits, plain(tokens()).logits)

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(hidden_size=32, intermediate_size=48, vocab_size=61, **sizes)
    sees = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, image_size=8, patch_size=4, **sizes
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=sees, text_config=text, image_token_index=60)
    ).eval()
    names = {n: s for n, s in shapes_of(model, "q_proj").items() if "language_model" in n}
    found = []
    for old in ("model.language_model.", "language_model.model.", "model."):
        shapes = {n.replace("model.language_model.", old): s for n, s in names.items()}
        experts = [make_adapter(f"e{i}", seed=i, shapes=shapes) for i in range(2)]
        handle = load_mixture(model, Mixture(experts, "constant"))
        found.append(model(input_ids=tokens()).logits)
        handle.detach()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    vision = {n: s for n, s in shapes_of(model, "q_proj").items() if "vision" in n}
    experts = [make_adapter(f"e{i}", seed=i, shapes={**names, **vision}) for i in range(2)]
    with pytest.raises(MethodError, match="reads no text"):
        load_mixture(model, Mixture(experts, "xlora", hidden_size=32))
    assert not hasattr(model, "mixture")


def test_a_module_that_was_replaced_is_missed() -> None:
    model = llama()
    handle = load_mixture(model, sharp(model, "meteora"))
    layer = model.model.layers[1].mlp
    mixed, old = model(tokens()).logits, layer.up_proj
    layer.up_proj = torch.nn.Sequential(old)  # wrapped: its hook still runs
    assert torch.equal(model(tokens()).logits, mixed)
    layer.up_proj = torch.nn.Linear(32, 48, bias=False)
    with pytest.raises(MethodError, match="up_proj of a LlamaMLP was replaced by a Linear"):
        model(tokens())
    with handle.disabled():
        model(tokens())
    handle.detach()


def test_an_untrained_gate_says_so_once() -> None:
    model = llama()
    load_mixture(model, sharp(model, "xlora"))
    with pytest.warns(LoraMergeWarning, match="xlora gate has not been trained"):
        model.generate(tokens(), **GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(tokens(), **GREEDY)
        model.mixture.detach()
        for preset in ("arrow", "meteora"):
            handle = load_mixture(model, sharp(model, preset), name=preset)
            handle.set_gate(weights=[1.0, 0.0, 0.0])
            model.generate(tokens(), **GREEDY)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = tokens(1, 12, index)[0]
        return {"input_ids": row, "labels": row}


def test_a_trainers_checkpoint_holds_the_gate(tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    def train(**options: object) -> list[torch.Tensor]:
        model = llama()
        handle = load_mixture(model, Mixture(experts_for(model), "meteora"))
        settings = TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
            save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
            logging_strategy="no",
        )  # fmt: skip
        trained = handle.train_gate_only()
        Trainer(model=model, args=settings, train_dataset=Rows()).train(**options)
        return [p.detach().clone() for p in trained]

    whole = train()
    resumed = train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one, other)


def test_a_scheduler_that_packs_requests_is_refused_where_the_caller_hears_it() -> None:
    rows, model = [tokens(1, n, n)[0].tolist() for n in (7, 5)], llama()
    for preset, more in (("xlora", {}), ("meteora", {"memory": 0.8}), ("sequence", {})):
        handle = load_mixture(model, sharp(model, preset, **more))
        with pytest.raises(MethodError, match="whose tokens"):
            model.generate_batch(inputs=rows, progress_bar=False)
        handle.detach()
    handle = load_mixture(model, sharp(model, "request"))
    with handle.requests("expert0", "expert1"), pytest.raises(MethodError, match="whose tokens"):
        model.generate_batch(inputs=rows, progress_bar=False)
    handle.detach()
    assert "init_continuous_batching" not in model.__dict__ and "generate" not in model.__dict__
