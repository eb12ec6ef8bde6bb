"""X-LoRA: PEFT's logits, exact with two KV caches, and the labelled approximations."""

import copy
from pathlib import Path

import pytest
import torch
from peft_xlora import ours_from, peft_xlora
from tiny import experts_for, llama, saved_experts, tokens

from lora_merge.errors import MethodError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    "ignore:.*enable_softmax_topk:UserWarning",
    "ignore:.*gradient_checkpointing_enable:FutureWarning",
)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {"granularity": "model"}),
        ({"layerwise_scalings": True}, {}),
        ({"layerwise_scalings": True, "top_k_lora": 2}, {"top_k": 2}),
        (
            {"layerwise_scalings": True, "top_k_lora": 2, "enable_softmax_topk": True},
            {"top_k": 2, "value": "softmax_twice"},
        ),
        (
            {"layerwise_scalings": True, "softmax_temperature": 0.3, "xlora_depth": 3,
             "xlora_size": 24},
            {"temperature": 0.3, "depth": 3, "width": 24},
        ),
        (
            {"enable_softmax": False, "global_scaling_weight": 1.5},
            {"granularity": "model", "value": "raw", "scale": 1.5},
        ),
        ({"layerwise_scalings": True, "scaling_pass_value": 1 / 3}, {"bypass": False}),
    ],
    ids=["global", "layerwise", "top-k", "twice", "deep", "raw", "adapters-on"],
)  # fmt: skip
def test_logits_are_pefts(tmp_path: Path, theirs: dict, ours: dict) -> None:
    paths = saved_experts(tmp_path, llama())
    reference = peft_xlora(paths, **theirs)
    mixture = ours_from(reference, paths, **ours)
    model = llama()
    load_mixture(model, mixture)
    ids = tokens()
    logits = model(ids).logits
    with model.mixture.disabled():
        assert (logits - model(ids).logits).abs().max() > 0.05
    torch.testing.assert_close(logits, reference(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    written = reference.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), written)


def sharp(model: torch.nn.Module, **settings: object) -> Mixture:
    """An X-LoRA mixture whose gate changes a lot from token to token."""
    mixture = Mixture(experts_for(model), "xlora", **settings)
    for name in mixture.gate:
        mixture.gate[name] = mixture.gate[name] * 12
    return mixture


def test_the_first_pass_runs_no_expert_and_the_cache_does_not_grow_twice() -> None:
    model = llama()
    load_mixture(model, sharp(model))
    calls = []
    for group in model.mixture.groups:
        original = group.add
        group.add = lambda *a, f=original, **k: (calls.append(1), f(*a, **k))[1]
    out = model(tokens(2, 6), use_cache=True)
    assert len(calls) == 14
    assert out.past_key_values.get_seq_length() == 6
    twin = out.past_key_values.__dict__["lora_merge_companions"]["default"].twin
    assert twin.get_seq_length() == 6
    mixed, base = (c.layers[1].keys for c in (out.past_key_values, twin))
    assert not torch.equal(mixed, base)
    with model.mixture.disabled():
        torch.testing.assert_close(model(tokens(2, 6)).past_key_values.layers[1].keys, base)


@torch.no_grad()
def test_a_copied_prefix_cache_continues_exactly() -> None:
    model = llama()
    load_mixture(model, sharp(model))
    ids = tokens(1, 10)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    other = copy.deepcopy(cache)
    whole = model(ids).logits[:, 6:]
    for prefix in (cache, other):
        rest = model(ids[:, 6:], past_key_values=prefix).logits
        torch.testing.assert_close(rest, whole, rtol=1e-4, atol=1e-4)


def test_a_cropped_cache_continues_exactly() -> None:
    model = llama()
    load_mixture(model, sharp(model))
    ids = tokens(1, 10)
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-4)
    assert cache.get_seq_length() == 6
    rest = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 6:], rtol=1e-4, atol=1e-4)


def test_static_cache_and_sampling() -> None:
    model = llama()
    load_mixture(model, sharp(model))
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(tokens(), **options)
    assert torch.equal(
        plain,
        model.generate(tokens(), cache_implementation="static", disable_compile=True, **options),
    )
    several = model.generate(tokens(1), num_return_sequences=3, do_sample=True, max_new_tokens=4)
    assert several.shape == (3, 13)


def test_a_foreign_cache_is_refused() -> None:
    model = llama()
    cache = model(tokens(), use_cache=True).past_key_values
    load_mixture(model, sharp(model))
    with pytest.raises(MethodError, match="filled while the mixture was not active"):
        model(tokens(2, 1), past_key_values=cache)


def test_beams_carry_both_caches() -> None:
    model = llama()
    load_mixture(model, sharp(model))
    options = {"max_new_tokens": 8, "num_beams": 4, "do_sample": False}
    ids = tokens(3, 7)
    assert torch.equal(
        model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    )


def test_freezing_and_lagging_skip_the_first_pass() -> None:
    model = llama()
    load_mixture(model, sharp(model))
    body_calls = []
    forward = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *a, **k: (body_calls.append(1), forward(*a, **k))[1]
    options = {"max_new_tokens": 9, "do_sample": False}
    exact = model.generate(tokens(), **options)
    assert len(body_calls) == 18
    body_calls.clear()
    model.mixture.set_gate(freeze_after=3)
    frozen = model.generate(tokens(), **options)
    assert len(body_calls) == 2 * 4 + 5
    assert torch.equal(frozen[:, :13], exact[:, :13])
    body_calls.clear()
    model.mixture.set_gate(lagged=True)
    model.generate(tokens(), **options)
    assert len(body_calls) == 2 + 8
    model.mixture.set_gate()
    assert torch.equal(model.generate(tokens(), **options), exact)


def test_encoders_run_it_too() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=61,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    base = model(tokens()).logits
    load_mixture(model, sharp(model))
    assert not torch.equal(model(tokens()).logits, base)
    model.mixture.detach()
    assert torch.equal(model(tokens()).logits, base)


def test_a_body_that_another_library_wrapped() -> None:
    """accelerate replaces `forward` by a partial when it offloads."""
    import functools

    model = llama()
    load_mixture(model, sharp(model))
    ids = tokens()
    expected = model(ids).logits
    old = model.model.forward
    model.model.forward = functools.update_wrapper(functools.partial(old), old)
    torch.testing.assert_close(model(ids).logits, expected)
    assert model(ids).past_key_values.get_seq_length() == 9


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("use_cache", [False, True])
def test_compiled_with_both_passes(use_cache: bool) -> None:
    """One graph without a cache; with one, making its twin breaks the graph and changes nothing."""
    model = llama(num_hidden_layers=1)
    load_mixture(model, sharp(model))
    expected = model(tokens(), use_cache=use_cache).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=not use_cache, backend="aot_eager")
    out = compiled(tokens(), use_cache=use_cache)
    torch.testing.assert_close(out.logits, expected)
    if use_cache:
        more = compiled(tokens(2, 1), past_key_values=out.past_key_values).logits
        whole = model(torch.cat([tokens(), tokens(2, 1)], dim=1)).logits[:, -1:]
        torch.testing.assert_close(more, whole, rtol=1e-4, atol=1e-4)


def test_reentrant_checkpointing_is_refused_with_the_remedy() -> None:
    model = llama()
    load_mixture(model, sharp(model))
    model.mixture.train_gate_only()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(MethodError, match="once for every block") as caught:
        model(tokens(), labels=tokens(), use_cache=False)
    assert '"use_reentrant": False' in caught.value.remedy
    model.eval()  # where nothing is checkpointed it runs
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(bool(p.grad.any()) for p in model.mixture.classifier.parameters())


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_an_encoder_with_a_decoder_is_refused_at_once(family: str) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {
        "T5": {"d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4},
        "Bart": {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48},
    }[family]
    config = getattr(transformers, f"{family}Config")(d_model=32, vocab_size=61, **sizes)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    mixture = Mixture(experts_for(model), "xlora", hidden_size=32)
    with pytest.raises(MethodError, match="has an encoder and a decoder"):
        load_mixture(model, mixture)
    assert not hasattr(model, "mixture") and not any(m._forward_hooks for m in model.modules())
    alone = getattr(transformers, f"{family}Model")(config).get_encoder()
    load_mixture(alone, Mixture(experts_for(alone), "xlora", hidden_size=32))
    assert torch.isfinite(alone(tokens()).last_hidden_state).all()
