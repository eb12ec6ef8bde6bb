"""Any torch model: other architectures, module kinds, wrappers and compilers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import experts_for, llama, sharp, tokens
from torch import nn

from lora_merge.errors import AlignmentError
from lora_merge.mixture.gates.gate import PRESETS
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.attach import load_mixture

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=32)
    return GPT2LMHeadModel(config), {"input_ids": tokens()}


def bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(vocab_size=61, **SMALL)), {
        "input_ids": tokens()
    }


def t5() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=61,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), {
        "input_ids": tokens(2, 9),
        "decoder_input_ids": tokens(2, 5),
    }


def vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=16, patch_size=4, **SMALL)
    return ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


TARGETS = {
    gpt2: ["c_attn", "c_proj", "wte"],
    bert: ["query", "key", "value", "dense", "word_embeddings"],
    t5: ["q", "k", "v", "o", "wi", "wo"],
    vit: ["projection", "q_proj", "v_proj", "query", "value", "fc1", "dense"],
}


def peft_experts(build: Callable, folder: Path, ranks: tuple[int, ...] = (3, 5)) -> list[str]:
    """Adapters that PEFT itself made and saved, with weights that do something."""
    from peft import LoraConfig, get_peft_model

    paths = []
    for seed, rank in enumerate(ranks):
        torch.manual_seed(0)
        base = build()[0]
        leaves = {name.rpartition(".")[2] for name, _ in base.named_modules()}
        targets = [t for t in TARGETS[build] if t in leaves]
        assert targets
        fan = build is gpt2
        config = LoraConfig(
            r=rank, lora_alpha=7, target_modules=targets, fan_in_fan_out=fan, use_rslora=seed == 1
        )
        model = get_peft_model(base, config)
        torch.manual_seed(100 + seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder / f"expert{seed}")
        paths.append(str(folder / f"expert{seed}"))
    return paths


@pytest.mark.parametrize("build", list(TARGETS), ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_hot_is_peft_and_gates_run(build: Callable, tmp_path: Path) -> None:
    """Conv1D, embeddings, tied heads, cross-attention and patch convolutions."""
    from peft import PeftModel

    paths = peft_experts(build, tmp_path)
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    base = model(**inputs).logits
    load_mixture(model, Mixture(paths, "arrow", top_k=1))
    arrow = model(**inputs).logits
    assert not torch.allclose(arrow, base, atol=1e-3)
    for index in range(2):
        model.mixture.set_gate(weights=[float(i == index) for i in range(2)])
        torch.manual_seed(0)
        theirs = PeftModel.from_pretrained(build()[0], paths[index]).eval()
        expected = theirs(**inputs).logits
        assert not torch.allclose(expected, base, atol=1e-3)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=2e-5)
    for preset in ("meteora", "smora", "spectr"):
        handle = load_mixture(model, Mixture(paths, preset), name=preset)
        with torch.no_grad():
            assert torch.isfinite(model(**inputs).logits).all()
        handle.detach()
    model.mixture.detach()
    assert torch.equal(model(**inputs).logits, base)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_seq2seq_generates_with_its_caches(tmp_path: Path) -> None:
    paths = peft_experts(t5, tmp_path)
    model, inputs = t5()
    load_mixture(model.eval(), Mixture(paths, "meteora", top_k=1))
    options = {"max_new_tokens": 6, "do_sample": False}
    ids = inputs["input_ids"]
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_a_convolution_gates_every_patch() -> None:
    """Stride, padding and dilation; weights that vary over the image."""
    from builders import parse_config
    from lora_merge.adapters.adapter import build_adapter
    from lora_merge.files.tensor_file import TensorDict

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=1), nn.Conv2d(8, 4, 1))
    adapters = []
    for index in range(2):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0"]}
        tensors = {
            "base_model.model.0.lora_A.weight": torch.randn(2, 3, 3, 3),
            "base_model.model.0.lora_B.weight": torch.randn(8, 2, 1, 1),
        }
        name = f"conv{index}"
        adapters.append(build_adapter(name, parse_config(config, name), TensorDict(tensors)))
    mixture = Mixture(adapters, "arrow", top_k=1)
    x = torch.randn(2, 3, 9, 7)
    base = model[0](x)
    patches = nn.functional.unfold(x, 3, padding=1, stride=2).movedim(1, 2)  # (B, L, 27)
    expected = base.flatten(2).movedim(1, 2).clone()
    tops = [
        torch.linalg.svd(b.flatten(1) @ a.flatten(1)).Vh[0]
        for a, b in (adapter.read("0") for adapter in adapters)
    ]
    chosen = set()
    for row in range(2):
        for place in range(patches.shape[1]):
            patch = patches[row, place]
            best = max(range(2), key=lambda e: float((tops[e] @ patch).abs()))
            chosen.add(best)
            a, b = adapters[best].read("0")
            expected[row, place] += b.flatten(1) @ (a.flatten(1) @ patch)
    assert chosen == {0, 1}
    load_mixture(model, mixture)
    ours = model[0](x).flatten(2).movedim(1, 2)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


class Unet(nn.Module):
    """The parts of a diffusion model: convolutions, a skip, cross-attention to a text, a time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.to_q, self.to_out = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.to_k, self.to_v = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.time, self.conv_out = nn.Linear(4, 8), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        high = self.conv_in(x)
        low = self.down(torch.relu(high)) + self.time(time)[:, :, None, None]
        pixels = low.flatten(2).mT
        scores = self.to_q(pixels) @ self.to_k(text).mT
        pixels = pixels + self.to_out(scores.softmax(-1) @ self.to_v(text))
        low = pixels.mT.reshape(low.shape)
        return self.conv_out(torch.cat([high, nn.functional.interpolate(low, scale_factor=2)], 1))


@torch.no_grad()
@pytest.mark.parametrize("preset", ["arrow", "meteora", "smora", "spectr", "sequence"])
def test_a_diffusion_model(preset: str, tmp_path: Path) -> None:
    """A plain torch module without a config; one-hot is PEFT, gates differ by pixel and token."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def build() -> Unet:
        torch.manual_seed(0)
        return Unet().eval()

    targets = ["conv_in", "down", "to_q", "to_k", "to_v", "to_out", "time", "conv_out"]
    paths = []
    for index in range(2):
        adapter = get_peft_model(build(), LoraConfig(r=2 + index, target_modules=targets))
        torch.manual_seed(1 + index)
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        adapter.save_pretrained(tmp_path / str(index))
        paths.append(str(tmp_path / str(index)))
    inputs = torch.randn(2, 3, 8, 8), torch.randn(2, 4), torch.randn(2, 5, 8)
    model = build()
    base = model(*inputs)
    load_mixture(model, Mixture(paths, preset, **({"top_k": 1} if preset == "arrow" else {})))
    with model.mixture.watch() as usage:
        assert not torch.allclose(model(*inputs), base, atol=1e-3)
    if preset == "arrow":
        assert usage.modules["conv_out"].last.shape == (2 * 64, 2)
        assert usage.modules["to_k"].last.shape == (2 * 5, 2)
    model.mixture.set_gate(weights=[0.0, 1.0])
    theirs = PeftModel.from_pretrained(build(), paths[1]).eval()(*inputs)
    torch.testing.assert_close(model(*inputs), theirs, rtol=1e-4, atol=1e-5)
    model.mixture.detach()
    assert torch.equal(model(*inputs), base)


class Packed(nn.Module):
    """Stands for a quantised layer: no float weight, only a call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes.float() * self.scale).T


def test_a_base_that_can_only_be_called() -> None:
    model = llama()
    adapters = experts_for(model)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Packed(getattr(layer.mlp, name)))
    base = model(tokens()).logits
    load_mixture(model, Mixture(adapters, "meteora"))
    assert not torch.equal(model(tokens()).logits, base)
    model.mixture.detach()
    assert torch.equal(model(tokens()).logits, base)


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_compiles_as_one_graph(preset: str) -> None:
    model, ids = llama(num_hidden_layers=1), tokens()
    load_mixture(model, sharp(model, preset))
    if preset == "request":
        model.mixture.set_gate(requests=["expert0", "expert2"])
    expected = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    backend = "aot_eager" if preset == "meteora" else "eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)


def test_grouped_convolutions_and_wrong_kinds_are_refused() -> None:
    from builders import make_adapter

    adapter = make_adapter("e", shapes={"0": (8, 4)})
    for module, message in (
        (nn.Embedding(4, 8), "a linear layer's factors, but the model has a Embedding"),
        (nn.Linear(5, 8), "experts 8 x 4, the model 8 x 5"),
    ):
        with pytest.raises(AlignmentError, match=f"do not fit the model:\n.*{message}"):
            load_mixture(nn.Sequential(module), Mixture([adapter], "arrow"))
