"""What holds for one call and no other: threads, requests, checkpointing, padding, heads."""

from collections.abc import Callable

import pytest
import torch
from tiny import in_threads, llama, sharp, tokens, wild
from torch import Tensor

from lora_merge.errors import MethodError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
GREEDY = {"max_new_tokens": 6, "do_sample": False}


# -- threads -------------------------------------------------------------------------------------


def test_every_thread_has_its_own_requests_gate_and_mixture() -> None:
    model = llama()
    first = load_mixture(model, sharp(model, "request"), name="first")
    second = load_mixture(model, sharp(model, "xlora"), name="second")
    third = load_mixture(model, sharp(model, "meteora", memory=0.8), name="third")
    ids = tokens(1)

    def named(expert: str | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with first.selected(), first.requests(expert):
                return model.generate(ids, **GREEDY)

        return run

    def by(handle: object, seed: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with handle.selected():
                return model.generate(tokens(1, 5 + seed, seed), **GREEDY)

        return run

    def base() -> Tensor:
        with third.disabled():
            return model.generate(ids, **GREEDY)

    jobs = [named(e) for e in ("expert0", "expert1", None)] + [base]
    jobs += [by(handle, seed) for seed, handle in enumerate((second, third) * 4)]
    alone = [job() for job in jobs]
    for one, other in zip(alone, in_threads(jobs), strict=True):
        assert isinstance(other, Tensor), other
        assert torch.equal(one, other)
    assert len({tuple(t[0].tolist()) for t in alone[:4]}) == 3  # no request is the base
    assert torch.equal(alone[2], alone[3])
    assert model.mixture is third and third.switch.running == 0


def test_a_block_is_over_for_the_next_call() -> None:
    model = llama()
    handle = load_mixture(model, sharp(model, "arrow"))
    before = model(tokens()).logits
    with handle.requests("expert0", None):
        assert not torch.equal(model(tokens()).logits, before)
        with handle.disabled():
            base = model(tokens()).logits
        row = model(tokens()).logits
    assert torch.equal(row[1], base[1]) and not torch.equal(row[0], base[0])
    with pytest.raises(MethodError, match="3 rows"), handle.requests("expert0", None):
        model(tokens(3))
    assert torch.equal(model(tokens()).logits, before)  # nor does an error leave anything behind


def test_a_call_that_was_interrupted_leaves_nothing_behind() -> None:
    model = llama()
    handle = load_mixture(model, sharp(model, "xlora"))
    expected = model(tokens()).logits

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    stop = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens())
    stop.remove()
    assert torch.equal(model(tokens()).logits, expected)
    assert handle.switch.running == 0


# -- inactive ------------------------------------------------------------------------------------


def test_an_inactive_mixture_has_no_hook_in_the_modules() -> None:
    model = llama()
    handle = load_mixture(model, sharp(model, "meteora"))
    target = model.model.layers[0].mlp.up_proj
    seen: list[int] = []
    target.register_forward_hook(lambda m, a, y: seen.append(1))  # somebody else's, after ours
    order = list(target._forward_hooks)
    mixed = model(tokens()).logits
    with handle.disabled():
        assert list(target._forward_hooks) == order[1:]
        base = model(tokens()).logits
    assert list(target._forward_hooks) == order
    handle.set_gate(weights=[0.0, 0.0, 0.0])
    assert list(target._forward_hooks) == order[1:]
    assert torch.equal(model(tokens()).logits, base)
    handle.set_gate()
    assert torch.equal(model(tokens()).logits, mixed)
    other = load_mixture(model, sharp(model, "arrow"), name="other")
    assert len(target._forward_hooks) == 2  # only the active one's and somebody else's
    other.detach()
    assert torch.equal(model(tokens()).logits, mixed) and seen


# -- rows and requests ---------------------------------------------------------------------------


def test_requests_are_those_of_the_rows_or_refused() -> None:
    model = llama()
    handle = load_mixture(model, sharp(model, "request"))
    handle.set_gate(requests=["expert0", "expert1"])
    with pytest.raises(MethodError, match="4 rows, and there are requests for 2") as caught:
        model(tokens(4))  # guidance puts the rows side by side, beams repeat each: who knows
    assert "guidance" in caught.value.remedy
    handle.set_gate(requests=["expert0", "expert1", "expert2", None])
    for shape in ((1, 4), (2, 2), (2, 5)):
        with pytest.raises(MethodError, match="requests for 4"):
            model(tokens(*shape))
    handle.set_gate(requests=["expert0", None])
    beams = model.generate(tokens(2), num_beams=3, num_return_sequences=2, **GREEDY)
    for row, name in enumerate(("expert0", None)):
        with handle.requests(name):
            one = model.generate(
                tokens(2)[row : row + 1], num_beams=3, num_return_sequences=2, **GREEDY
            )
        assert torch.equal(beams[2 * row : 2 * row + 2], one)


# -- checkpointing -------------------------------------------------------------------------------


def gradients(preset: str, mode: str, checkpointing: bool, **settings: object) -> Tensor:
    model = wild()
    handle = load_mixture(model, sharp(model, preset, **settings))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if handle.mixture.spec.is_learned:
        trained = handle.train_gate_only()
    else:
        model.requires_grad_(False)
        trained = [group.down for group in handle.parts]
        for parameter in trained:
            parameter.requires_grad_(True)
    one, two, mask = tokens(2, 7, 1), tokens(2, 7, 2), torch.ones(2, 7, dtype=torch.int64)
    left = mask.clone()
    left[0, :3] = 0
    if mode == "two calls":
        (model(one, labels=one).loss + 0.5 * model(two, labels=two).loss).backward()
    elif mode == "another mask":
        loss = model(one, labels=one, attention_mask=left).loss
        model(two, labels=two, attention_mask=mask)
        loss.backward()
    elif mode == "requests left":
        with handle.requests("expert1", None):
            loss = model(one, labels=one).loss
        with handle.requests(None, "expert2"):
            loss = loss + model(two, labels=two).loss
        loss.backward()
    else:
        handle.set_gate(weights=[1.0, 0.0, 0.0])
        loss = model(one, labels=one).loss
        handle.set_gate()
        loss.backward()
    return torch.cat([p.grad.flatten() for p in trained if p.grad is not None])


@pytest.mark.parametrize(
    ("preset", "mode", "settings"),
    [
        ("meteora", "two calls", {"memory": 0.8}),
        ("xlora", "two calls", {}),
        ("recall", "another mask", {}),
        ("meteora", "another mask", {"memory": 0.8}),
        ("request", "requests left", {}),
        ("constant", "gate changed", {}),
    ],
)
def test_checkpointing_computes_again_what_was(preset: str, mode: str, settings: dict) -> None:
    plain = gradients(preset, mode, checkpointing=False, **settings)
    again = gradients(preset, mode, checkpointing=True, **settings)
    assert float(plain.abs().max()) > 0
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


def test_a_block_that_the_caller_checkpoints_himself() -> None:
    """Outside of a call nobody can tell the gate, unless it was one throughout."""
    from torch.utils.checkpoint import checkpoint

    model = llama()
    handle = load_mixture(model, sharp(model, "meteora"))
    (weight, *_) = handle.train_gate_only()
    ids = tokens()

    def loss() -> Tensor:
        logits = checkpoint(lambda: model(ids, use_cache=False).logits, use_reentrant=False)
        return logits.square().sum()

    loss().backward()
    expected, weight.grad = weight.grad, None
    model(ids, use_cache=False).logits.square().sum().backward()
    torch.testing.assert_close(weight.grad, expected)
    handle.set_gate(temperature=2.0)
    before = loss()
    handle.set_gate()
    with pytest.raises(MethodError, match="computed again"):
        before.backward()


# -- masks and documents -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize(
    ("preset", "settings"), [("meteora", {"memory": 0.8}), ("sequence", {"top_k": 1})]
)
def test_encoder_and_decoder_have_their_own_tokens(kind: str, preset: str, settings: dict) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 32, "vocab_size": 61, "pad_token_id": 0, "eos_token_id": None}
    if kind == "t5":
        config = transformers.T5Config(
            d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0, **sizes
        )
        model = transformers.T5ForConditionalGeneration(config).eval()
    else:
        config = transformers.BartConfig(
            encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, decoder_start_token_id=2,
            forced_eos_token_id=None, max_position_embeddings=32, **sizes,
        )  # fmt: skip
        model = transformers.BartForConditionalGeneration(config).eval()
    shared = model.get_input_embeddings().weight.data
    shared.copy_(torch.randn_like(shared))
    load_mixture(model, sharp(model, preset, **settings))
    ids, mask = tokens(2, 9, 3), torch.ones(2, 9, dtype=torch.int64)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    left = mask.clone()
    left[0, 5:] = 0
    model(input_ids=ids, attention_mask=left, decoder_input_ids=ids)  # another call's mask
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    alone = model.generate(ids[:1, :5], attention_mask=mask[:1, :5], **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=left, **GREEDY)[:1], alone)
    decoder = tokens(2, 9, 4)  # exactly as long as the padded encoder
    both = model(input_ids=ids, attention_mask=left, decoder_input_ids=decoder).logits[0]
    one = model(
        input_ids=ids[:1, :5], attention_mask=mask[:1, :5], decoder_input_ids=decoder[:1]
    ).logits[0]
    torch.testing.assert_close(both, one, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("told_by", ["positions", "mask", "lengths"])
@pytest.mark.parametrize(
    ("preset", "settings"),
    [("meteora", {}), ("recall", {}), ("meteora", {"memory": 0.9}), ("sequence", {})],
)
def test_packed_documents_do_not_leak(preset: str, settings: dict, told_by: str) -> None:
    model = wild()
    load_mixture(model, sharp(model, preset, **settings))
    one, two = tokens(1, 6, 1), tokens(1, 5, 2)
    both = torch.cat([one, two], dim=1)
    places = torch.cat([torch.arange(6), torch.arange(5)])[None]
    given: dict[str, Tensor] = {"position_ids": places}
    if told_by != "positions":
        document = (torch.arange(11) >= 6).long()
        mask = (document[:, None] == document) & torch.ones(11, 11).tril().bool()
        given["attention_mask"] = mask[None, None]
        if told_by == "lengths":
            given["cu_seq_lens_q"] = torch.tensor([0, 6, 11])
        else:
            given["position_ids"] = torch.arange(11)[None]
    packed = model(both, use_cache=False, **given).logits[0]
    alone = torch.cat([model(part, use_cache=False).logits[0] for part in (one, two)])
    if told_by == "mask":  # the model itself rotates by other places: first documents agree
        packed, alone = packed[:6], alone[:6]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("preset", "settings"), [("meteora", {"memory": 0.8}), ("sequence", {})])
def test_modules_that_read_flattened_tokens(preset: str, settings: dict) -> None:
    """OPT's fc1 and fc2 read (rows * tokens, width)."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61,
        max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.2, do_layer_norm_before=True,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    load_mixture(model, sharp(model, preset, **settings))
    ids = tokens(3)
    alone = torch.cat([model(ids[i : i + 1]).logits for i in range(3)])
    torch.testing.assert_close(model(ids).logits, alone, rtol=1e-4, atol=1e-4)


# -- heads ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("preset", "settings"),
    [("xlora", {}), ("recall", {}), ("meteora", {"memory": 0.8}), ("sequence", {}), ("arrow", {})],
)
def test_an_adapted_head_sees_the_last_token_and_knows_of_all(preset: str, settings: dict) -> None:
    from tiny import shapes_of

    from builders import make_adapter

    model = wild()
    shapes = {**shapes_of(model), "lm_head": (61, 32)}
    adapters = [make_adapter(f"expert{i}", r=3, seed=i, shapes=shapes) for i in range(3)]
    mixture = Mixture(adapters, preset, hidden_size=32, **settings)
    random = torch.Generator().manual_seed(7)
    for name, tensor in mixture.gate.items():
        if not name.endswith("prototype"):
            mixture.gate[name] = torch.randn(tensor.shape, generator=random) * 2
    load_mixture(model, mixture)
    ids = tokens(2)
    whole = model(ids).logits
    for kept in (1, 4, torch.tensor([2, 5])):
        some = model(ids, logits_to_keep=kept).logits
        places = kept if isinstance(kept, Tensor) else torch.arange(9)[-kept:]
        torch.testing.assert_close(some, whole[:, places], rtol=1e-4, atol=1e-5)
    steps = model.generate(ids, output_logits=True, return_dict_in_generate=True, **GREEDY)
    torch.testing.assert_close(steps.logits[0], whole[:, -1], rtol=1e-4, atol=1e-5)
    assert torch.equal(steps.sequences, model.generate(ids, use_cache=False, **GREEDY))
