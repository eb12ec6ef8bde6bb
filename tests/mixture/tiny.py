"""Tiny models with random weights, and adapters that fit them."""

import string
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from builders import make_adapter, save_adapter
from lora_merge.adapters.adapter import Adapter
from lora_merge.mixture.mixture import Mixture

VOCABULARY = 61
LETTERS = ["<unk>", "<s>", "</s>", *string.ascii_lowercase, " "]


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **config: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            **config,
        }
    )
    return LlamaForCausalLM(settings).to(dtype).eval()


def letters_model(folder: Path) -> LlamaForCausalLM:
    """A Llama saved with a tokenizer that has a token for each letter."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = llama(vocab_size=len(LETTERS), eos_token_id=2, pad_token_id=None)
    model.save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return model


def shapes_of(model: nn.Module, *leaves: str) -> dict[str, tuple[int, int]]:
    return {
        name: (m.nf, m.nx) if isinstance(m, Conv1D) else (m.out_features, m.in_features)
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, Conv1D))
        and name.count(".") > 2  # inside a layer: no head, no pooler
        and (not leaves or name.rpartition(".")[2] in leaves)
    }


def experts_for(model: nn.Module, ranks: tuple[int, ...] = (4, 8, 3)) -> list[Adapter]:
    """Experts of different ranks and scalings; the last one leaves some modules out."""
    full = shapes_of(model)
    some = dict(list(full.items())[::2])
    last = len(ranks) - 1
    return [
        make_adapter(
            f"expert{i}", r=r, alpha=4.0 + 3 * i, seed=i, shapes=some if i == last else full
        )
        for i, r in enumerate(ranks)
    ]


def saved_experts(folder: Path, model: nn.Module, ranks: tuple[int, ...] = (4, 4, 4)) -> list[str]:
    shapes = shapes_of(model)
    return [
        str(save_adapter(folder / f"expert{i}", r=r, alpha=2 * r, seed=10 + i, shapes=shapes))
        for i, r in enumerate(ranks)
    ]


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=random)


def sharp(model: nn.Module, preset: str, **settings: object) -> Mixture:
    """A mixture whose gate says something else for every token."""
    mixture = Mixture(experts_for(model), preset, hidden_size=32, **settings)
    random = torch.Generator().manual_seed(7)
    for name, tensor in mixture.gate.items():
        if not name.endswith("prototype"):
            mixture.gate[name] = torch.randn(tensor.shape, generator=random) * 2
    return mixture


def wild() -> nn.Module:
    """A Llama whose padding looks like any other token."""
    model = llama()
    torch.manual_seed(9)
    model.model.embed_tokens.weight.data[0] = torch.randn(32)
    return model


def in_threads(jobs: list[Callable[[], Tensor]]) -> list[Tensor | BaseException]:
    found: list[Tensor | BaseException] = [RuntimeError("did not run")] * len(jobs)

    def work(place: int) -> None:
        try:
            found[place] = jobs[place]()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
