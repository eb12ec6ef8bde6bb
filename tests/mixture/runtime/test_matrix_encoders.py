"""Every preset in models without a decoder, and in one with both: the float64 loop, or a refusal.

The loop is given one row at a time, without padding; the model all rows at once.
"""

import copy
from collections.abc import Callable, Mapping
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
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "initializer_range": 0.2,
}  # fmt: skip
REQUESTS = ["expert0", "expert2"]
BEFORE = ("xlora", "recall", "retrieve")  # they decide before the model runs


def bert() -> Any:
    config = transformers.BertConfig(vocab_size=VOCABULARY, **SMALL)
    return transformers.BertForMaskedLM(config)


def vit() -> Any:
    config = transformers.ViTConfig(image_size=16, patch_size=4, **SMALL)
    return transformers.ViTForImageClassification(config)


def unet() -> Any:
    diffusers = pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12,
        attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip


def t5() -> Any:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY,
        decoder_start_token_id=0, initializer_factor=2.0, eos_token_id=None, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


KINDS: dict[str, Callable[[], Any]] = {"bert": bert, "vit": vit, "unet": unet, "t5": t5}


@cache
def base(kind: str) -> Any:
    """A model in float64 whose padding looks like any other token."""
    torch.manual_seed(0)
    return KINDS[kind]().double().eval()


def rows_of(kind: str) -> list[dict[str, Any]]:
    """Two inputs of one row each; of texts one is shorter."""
    random = torch.Generator().manual_seed(5)
    if kind == "vit":
        shape = (2, 1, 3, 16, 16)
        return [{"pixel_values": x} for x in torch.randn(shape, generator=random).double()]
    if kind == "unet":
        images = torch.randn(2, 1, 3, 8, 8, generator=random).double()
        texts = torch.randn(2, 1, 5, 12, generator=random).double()
        pairs = zip(images, texts, strict=True)
        return [
            {"sample": x, "timestep": torch.tensor([7]), "encoder_hidden_states": y}
            for x, y in pairs
        ]
    rows: list[dict[str, Any]] = [{"input_ids": tokens(1, 5, 1)}, {"input_ids": tokens(1, 8, 2)}]
    if kind == "t5":
        for number, row in enumerate(rows):
            row["decoder_input_ids"] = tokens(1, 4, 3 + number)
    return rows


def together(rows: list[dict[str, Any]], *, left: bool) -> dict[str, Any]:
    """All rows at once, texts padded to one length."""
    if "input_ids" not in rows[0]:
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    sizes = [row["input_ids"].shape[1] for row in rows]
    pads = [(max(sizes) - n, 0) if left else (0, max(sizes) - n) for n in sizes]

    def padded(tensors: list[Tensor]) -> Tensor:
        return torch.cat([nn.functional.pad(t, p) for t, p in zip(tensors, pads, strict=True)])

    both = {
        "input_ids": padded([row["input_ids"] for row in rows]),
        "attention_mask": padded([torch.ones_like(row["input_ids"]) for row in rows]),
    }
    if "decoder_input_ids" in rows[0]:
        both["decoder_input_ids"] = torch.cat([row["decoder_input_ids"] for row in rows])
    elif left:  # positions count from the first token
        both["position_ids"] = (both["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return both


def output_of(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """What a model makes of each row, without its padding."""
    out = model(**inputs)
    found: Tensor = out.logits if hasattr(out, "logits") else out.sample
    mask = None if "decoder_input_ids" in inputs else inputs.get("attention_mask")
    return [row if mask is None else row[mask[n].bool()] for n, row in enumerate(found)]


def mixture_of(kind: str, preset: str) -> Mixture:
    settings: dict[str, Any] = {"weights": (0.7, -0.4, 1.1)} if preset == "constant" else {}
    if preset == "meteora" and kind in ("bert", "t5"):
        settings["memory"] = 0.7
    return sharp(base(kind), preset, **settings)


def attached(kind: str, mixture: Mixture, dtype: torch.dtype = torch.float64) -> Any:
    model = copy.deepcopy(base(kind)).to(dtype)
    load_mixture(model, mixture)
    if mixture.spec.preset == "request":
        model.mixture.set_gate(requests=REQUESTS)
    return model


class RowLoop(Loop):
    """The loop for one row at a time, of whatever the model reads."""

    @property
    def batch(self) -> int:
        return 1


@cache
def expected(kind: str, preset: str) -> tuple[Mixture, list[Tensor], Any]:
    """The mixture, what the loop gives for every row, and the looped model."""
    mixture, looped = mixture_of(kind, preset), copy.deepcopy(base(kind))
    loop, found = RowLoop(looped, base(kind), mixture), []
    looped.loop = loop
    with torch.no_grad():
        for number, row in enumerate(rows_of(kind)):
            loop.requests = [(0, 2)[number]]
            found += output_of(looped, row)
    return mixture, found, looped


def refusal(kind: str, preset: str) -> str | None:
    """Why a preset cannot run in a kind of model, as the error says it."""
    if kind == "t5":
        return "an encoder and a decoder" if preset in BEFORE else None
    if kind == "unet" and preset in ("xlora", "recall"):
        return "gives no last hidden state"
    return "do not tell its tokens" if kind in ("vit", "unet") and preset == "retrieve" else None


def cells() -> list[tuple[str, str]]:
    return [(kind, preset) for kind in KINDS for preset in PRESETS]


def close(ours: list[Tensor], theirs: list[Tensor], most: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.double() - other).norm() < most * other.norm()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "preset"), cells())
def test_rows_padding_and_threads(kind: str, preset: str) -> None:
    why = refusal(kind, preset)
    rows = rows_of(kind)
    if why is not None:
        with pytest.raises(MethodError, match=why):
            output_of(attached(kind, mixture_of(kind, preset)), together(rows, left=False))
        return
    mixture, exact, _ = expected(kind, preset)
    model = attached(kind, mixture)
    for row, theirs in zip(rows, exact, strict=True):
        (alone,) = output_of(base(kind), row)
        assert (theirs - alone).norm() > 0.05 * alone.norm()
    most = 5e-3 if kind == "unet" else 1e-4  # float32 scores, over the many layers of a UNet
    for left in (False, True) if kind in ("bert", "t5") else (False,):
        close(output_of(model, together(rows, left=left)), exact, most)

    def job(number: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                if preset != "request":
                    return output_of(model, rows[number])[0]
                with model.mixture.requests(REQUESTS[number]):
                    return output_of(model, rows[number])[0]

        return run

    for place, found in enumerate(in_threads([job(0), job(1)] * 3)):
        assert isinstance(found, Tensor), found
        close([found], [exact[place % 2]], most)
    model.mixture.detach()
    for row in rows:
        assert torch.equal(output_of(model, row)[0], output_of(base(kind), row)[0])


@pytest.mark.parametrize(
    ("kind", "preset"), [c for c in cells() if not refusal(*c) and c[0] != "unet"]
)
def test_gradients_under_checkpointing(kind: str, preset: str) -> None:
    """Of the loop, computed plainly; both rows are padded to one length by nothing."""
    mixture, _, looped = expected(kind, preset)
    row, gradients = rows_of(kind)[1], []
    looped.loop.requests = [0]
    for model in (looped, attached(kind, mixture)):
        if model is not looped:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if preset == "request":
                model.mixture.set_gate(requests=[REQUESTS[0]])
        for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
            dropout.p = 0.0
        given = dict(row)
        if kind == "vit":
            source = given["pixel_values"] = given["pixel_values"].clone().requires_grad_()
        else:
            embed = model.get_input_embeddings()
            source = embed(given.pop("input_ids")).detach().requires_grad_()
            given["inputs_embeds"] = source
        (out,) = output_of(model, given)
        (gradient,) = torch.autograd.grad(out.square().sum(), source)
        gradients.append(gradient)
    close([gradients[1]], [gradients[0]], 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "vit", "t5"])
@pytest.mark.parametrize("preset", ["constant", "meteora", "spectr"])
def test_bfloat16_is_near(kind: str, preset: str) -> None:
    """Gates that are mild and keep everything, so that rounding can flip nothing."""
    mixture, found = mixture_of(kind, preset), {}
    mild = {name: 0.05 * tensor for name, tensor in mixture.gate.items()}
    mixture = mixture.with_gate(mild, **({"top_k": None} if mixture.spec.top_k else {}))
    row = rows_of(kind)[1]
    for dtype in (torch.float64, torch.bfloat16):
        model = attached(kind, mixture, dtype)
        given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in row.items()}
        (mixed,) = output_of(model, given)
        assert mixed.dtype == dtype
        with model.mixture.disabled():
            found[dtype] = mixed.double(), output_of(model, given)[0].double()
    (exact, exact_base), (near, near_base) = found.values()
    rounding = (near_base - exact_base).norm()
    assert (near - exact).norm() < 0.05 * (exact - exact_base).norm() + 2 * rounding
