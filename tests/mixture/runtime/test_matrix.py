"""Every preset under everything people run a model with: the float64 loop, or a stated refusal.

The loop is always given a whole text, one row at a time, without padding and without a cache. The
whole cross product of models is `pytest -m whole`. Elsewhere: encoders, pictures and diffusion
(test_matrix_encoders.py), MoE experts (test_moe.py), `torch.compile` (test_models.py). Offloaded
caches are missing: transformers runs them on accelerators alone.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from loop import Loop
from tiny import VOCABULARY, in_threads, sharp, tokens
from torch import Tensor, nn

from lora_merge.errors import MethodError
from lora_merge.mixture.gates.gate import PRESETS
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
GREEDY = {"max_new_tokens": 5, "do_sample": False}
REQUESTS = ["expert0", "expert2"]
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0, "initializer_range": 0.2, "head_dim": 8,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"state_size": 8},
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_n_groups": 1, "mamba_expand": 1, "mamba_chunk_size": 16,
    },
}  # fmt: skip


@cache
def base(kind: str) -> nn.Module:
    """A tiny model in float64 whose padding looks like any other token."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **MORE[kind]})
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    if kind == "qwen3_moe":
        model.set_experts_implementation("eager")  # the fast one knows no float64
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = torch.randn(32)
    return model


def settings_of(preset: str) -> dict[str, Any]:
    if preset == "constant":
        return {"weights": (0.7, -0.4, 1.1)}
    return {"memory": 0.7} if preset == "meteora" else {}


@dataclass(eq=False)
class Case:
    """A mixture in a model, and the loop's answers."""

    kind: str
    preset: str
    mixture: Mixture
    loop: Loop
    looped: nn.Module

    def attached(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        model = copy.deepcopy(base(self.kind)).to(dtype)
        load_mixture(model, self.mixture)
        if self.preset == "request":
            model.mixture.set_gate(requests=REQUESTS)
        return model

    def expected(self, ids: Tensor, row: int, **options: Any) -> Tensor:
        """What the loop writes after one row."""
        self.loop.prompt = ids.shape[1]
        self.loop.requests = [(0, 2)[row]]
        with torch.no_grad():
            return self.looped.generate(ids, use_cache=False, **{**GREEDY, **options})

    @property
    def remembers(self) -> bool:
        return self.mixture.spec.memory > 0


@cache
def case(kind: str, preset: str) -> Case:
    model = base(kind)
    mixture = sharp(model, preset, **settings_of(preset))
    looped = copy.deepcopy(model)
    return Case(kind, preset, mixture, Loop(looped, model, mixture), looped)


def one_by_one(one: Case, **options: Any) -> Callable[[nn.Module, list[Tensor]], list[Tensor]]:
    """Every row by itself."""

    def run(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
        found = []
        for number, ids in enumerate(rows):
            if one.preset == "request":
                model.mixture.set_gate(requests=[REQUESTS[number]])
            found.append(model.generate(ids, **GREEDY, **options))
        return found

    return run


def left_padded(one: Case, **options: Any) -> Callable[[nn.Module, list[Tensor]], list[Tensor]]:
    """All rows at once, padded to one length."""

    def run(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
        longest = max(ids.shape[1] for ids in rows)
        pads = [longest - ids.shape[1] for ids in rows]
        both = torch.cat([nn.functional.pad(i, (n, 0)) for i, n in zip(rows, pads, strict=True)])
        mask = torch.ones_like(both)
        for row, pad in enumerate(pads):
            mask[row, :pad] = 0
        out = model.generate(both, attention_mask=mask, **GREEDY, **options)
        several = len(out) // len(rows)
        return [out[r * several : (r + 1) * several, pads[r] :] for r in range(len(rows))]

    return run


def right_padded(one: Case) -> Callable[[nn.Module, list[Tensor]], list[Tensor]]:
    """The loop's texts, padded on the right: the model has to agree with every next token."""

    def run(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
        texts = [one.expected(ids, row) for row, ids in enumerate(rows)]
        longest = max(text.shape[1] for text in texts)
        both = torch.cat([nn.functional.pad(t, (0, longest - t.shape[1])) for t in texts])
        mask = torch.ones_like(both)
        for row, text in enumerate(texts):
            mask[row, text.shape[1] :] = 0
        next_tokens = model(both, attention_mask=mask).logits.argmax(-1)
        found = []
        for row, (ids, text) in enumerate(zip(rows, texts, strict=True)):
            start, stop = ids.shape[1] - 1, text.shape[1] - 1
            found.append(torch.cat([ids, next_tokens[row : row + 1, start:stop]], dim=1))
        return found

    return run


def continued(one: Case, *, turns: bool) -> Callable[[nn.Module, list[Tensor]], list[Tensor]]:
    """The beginning is in the cache: put there by a call, or by an earlier turn."""

    def run(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
        found = []
        for number, ids in enumerate(rows):
            if one.preset == "request":
                model.mixture.set_gate(requests=[REQUESTS[number]])
            if turns:
                cut = 1 + ids.shape[1] - GREEDY["max_new_tokens"]
                out = model.generate(
                    ids[:, :cut], return_dict_in_generate=True, **GREEDY
                ).past_key_values
                out.crop(-(GREEDY["max_new_tokens"] - 1))
            else:
                out = model(ids[:, :3], use_cache=True).past_key_values
            found.append(model.generate(ids, past_key_values=out, **GREEDY))
        return found

    return run


def threaded(one: Case) -> Callable[[nn.Module, list[Tensor]], list[Tensor]]:
    """Each row in a thread of its own, three times over."""

    def run(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
        def job(number: int) -> Callable[[], Tensor]:
            def work() -> Tensor:
                with torch.no_grad():
                    if one.preset != "request":
                        return model.generate(rows[number], **GREEDY)
                    with model.mixture.requests(REQUESTS[number]):
                        return model.generate(rows[number], **GREEDY)

            return work

        found = in_threads([job(n) for n in range(len(rows))] * 3)
        for place, out in enumerate(found):
            assert isinstance(out, Tensor), out
            assert torch.equal(out, found[place % len(rows)])
        return found[: len(rows)]

    return run


SITUATIONS: dict[str, Callable[[Case], Any]] = {
    "plain": one_by_one,
    "no cache": lambda one: one_by_one(one, use_cache=False),
    "left padding": left_padded,
    "right padding": right_padded,
    "static cache": lambda one: left_padded(
        one, cache_implementation="static", disable_compile=True
    ),
    "beams": lambda one: left_padded(one, num_beams=3),
    "chunked prefill": lambda one: one_by_one(one, prefill_chunk_size=2),
    "prefix reuse": lambda one: continued(one, turns=False),
    "second turn": lambda one: continued(one, turns=True),
    "prompt lookup": lambda one: one_by_one(one, prompt_lookup_num_tokens=2),
    "threads": threaded,
}
PIECES = ("chunked prefill", "prefix reuse", "second turn")


def refusal(one: Case, situation: str) -> str | None:
    """Why a preset cannot run so, as the error says it."""
    if one.mixture.spec.sequence and situation in PIECES:
        return "decides once for a whole prompt"
    if one.remembers and situation in ("prompt lookup", "second turn"):
        return "cannot forget"
    if one.mixture.spec.sequence and situation == "right padding":
        return "nothing"
    return None


class Bare:
    """No mixture: what the base does in a situation."""

    preset, mixture, remembers = "", None, False

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def expected(self, ids: Tensor, row: int, **options: Any) -> Tensor:
        with torch.no_grad():
            return base(self.kind).generate(ids, use_cache=False, **{**GREEDY, **options})


@cache
def refused_by_base(kind: str, situation: str) -> bool:
    """Whether the base itself gives other tokens in a situation, or none."""
    bare: Any = Bare(kind)
    if situation == "threads":
        return False
    rows = [tokens(1, 5, 1), tokens(1, 8, 2)]
    beams = {"num_beams": 3} if situation == "beams" else {}
    try:
        with torch.no_grad():
            found = SITUATIONS[situation](bare)(copy.deepcopy(base(kind)), rows)
    except Exception:
        return True
    pairs = zip(
        found, [bare.expected(ids, row, **beams) for row, ids in enumerate(rows)], strict=True
    )
    return not all(torch.equal(one, other) for one, other in pairs)


def check(one: Case, situation: str) -> None:
    rows = [tokens(1, 5, 1), tokens(1, 8, 2)]
    why = refusal(one, situation)
    if why == "nothing":  # a text by itself is all prompt: the loop has written another one
        return
    run, model = SITUATIONS[situation](one), one.attached()
    with torch.no_grad():
        if why is not None:
            with pytest.raises(MethodError, match=why):
                run(model, rows)
            return
        found = run(model, rows)
    beams = {"num_beams": 3} if situation == "beams" else {}
    for row, ids in enumerate(rows):
        assert torch.equal(found[row], one.expected(ids, row, **beams)), (row, situation)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_llama_under_everything(preset: str, situation: str) -> None:
    check(case("llama", preset), situation)


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
def test_the_loop_says_something(preset: str) -> None:
    """Or nothing here would prove anything."""
    one, ids = case("llama", preset), tokens(1, 8, 2)
    written = [one.expected(ids, row)[0, 8:].tolist() for row in range(2)]
    alone = base("llama").generate(ids, **GREEDY)[0, 8:].tolist()
    assert alone not in written
    assert preset != "request" or written[0] != written[1]


@pytest.mark.parametrize("kind", [kind for kind in MORE if kind != "llama"])
@pytest.mark.parametrize("preset", ["meteora", "sequence", "xlora", "request"])
def test_other_models_with_padding_and_beside_their_caches(kind: str, preset: str) -> None:
    one = case(kind, preset)
    stateful = kind in ("mamba", "falcon_h1")
    for situation in ("plain",) if stateful else ("left padding", "prompt lookup"):
        check(one, situation)


# What the base itself cannot do so, by kind: transformers says so, or gives other tokens.
@pytest.mark.whole
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", [kind for kind in MORE if kind != "llama"])
def test_everything(kind: str, preset: str, situation: str) -> None:
    one = case(kind, preset)
    if refused_by_base(kind, situation):
        pytest.skip(f"{kind} by itself gives something else with {situation}")
    check(one, situation)


@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_under_checkpointing(preset: str) -> None:
    """Of the loop, computed plainly."""
    one = case("llama", preset)
    ids = tokens(2, 6, 3)
    one.loop.prompt, one.loop.requests = None, [0, 2]
    gradients = []
    for model in (one.looped, one.attached()):
        if model is not one.looped:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=inputs, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits.square().sum(), inputs)
        gradients.append(gradient)
    ours, theirs = gradients[1], gradients[0]
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_is_near(preset: str) -> None:
    """Gates that are mild and keep everything, so that rounding can flip nothing."""
    one = case("llama", preset)
    mild = {
        name: t if name.endswith("prototype") else 0.05 * t for name, t in one.mixture.gate.items()
    }
    keep = {"top_k": None} if one.mixture.spec.top_k else {}
    mixture, ids, found = one.mixture.with_gate(mild, **keep), tokens(2, 6, 3), {}
    for dtype in (torch.float64, torch.bfloat16):
        model = copy.deepcopy(base("llama")).to(dtype)
        load_mixture(model, mixture)
        if preset == "request":
            model.mixture.set_gate(requests=REQUESTS)
        mixed = model(ids).logits
        assert mixed.dtype == dtype
        with model.mixture.disabled():
            found[dtype] = mixed.double(), model(ids).logits.double()
    (exact, exact_base), (near, near_base) = found.values()
    rounding = (near_base - exact_base).norm()
    assert (near - exact).norm() < 0.05 * (exact - exact_base).norm() + 2 * rounding
