"""Whole parameters in a PEFT file: which tensors are biases or modules saved whole, by what rule.

A tensor that none of these rules names is no part of the adapter: PEFT would not load it.
"""

from collections.abc import Callable, Container, Iterable
from math import prod

from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.forms import ExtraSpec
from lora_merge.adapters.module_names import WRAPPED, unwrapped
from lora_merge.errors import AdapterError

# What PEFT saves where the vocabulary was resized, without a word in the config.
VOCABULARY = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out")
# What its task models save by themselves.
_HEADS = {
    "SEQ_CLS": ("score", "classifier"),
    "TOKEN_CLS": ("score", "classifier"),
    "QUESTION_ANS": ("qa_outputs",),
}


def whole_parameters(
    config: AdapterConfig | None, modules: Container[str]
) -> Callable[[str, str], bool]:
    """The test for whole parameters: (canonical name, name in the file) → whether it is one.

    Args:
        config: The adapter's config; None knows only what the names say.
        modules: Names of the adapted modules.
    """
    saved = () if config is None else config.modules_to_save
    task = "" if config is None else (config.task_type or "")
    bias = "none" if config is None else config.bias
    named = (*saved, *_HEADS.get(task, ()), *VOCABULARY)

    def is_whole(name: str, key: str) -> bool:
        module, _, leaf = name.rpartition(".")
        if module != unwrapped(module):  # the adapted module itself, below PEFT's wrapper
            module = unwrapped(module)
            if leaf != "bias":
                return _is_below(module, named)
        if leaf == "bias" and (bias == "all" or (bias == "lora_only" and module in modules)):
            return True
        if ".modules_to_save." in key:
            return True
        if module in modules:
            return False
        return _is_below(module, named)

    return is_whole


def check_whole(extra: ExtraSpec, adapter: str) -> None:
    """Refuse what a sharded run saves of a whole parameter: nothing, or a flat piece.

    Raises:
        AdapterError: Naming it.
    """
    module, _, leaf = extra.name.removesuffix(".weight").rpartition(".")
    vocabulary = extra.name.endswith(".weight") and (leaf in VOCABULARY or module in VOCABULARY)
    if prod(extra.shape) == 0 or (vocabulary and len(extra.shape) != 2):
        raise AdapterError(
            f"{adapter}: {extra.name} is {list(extra.shape)}, empty or flat",
            "it was probably saved from a sharded run; gather the shards before saving",
        )


def lost_biases(config: AdapterConfig, extras: Container[str], modules: Iterable[str]) -> list[str]:
    """A note where biases were trained and PEFT did not save them."""
    stored = ("bias", f"{WRAPPED}.bias")
    if config.bias == "none" or any(f"{m}.{leaf}" in extras for m in modules for leaf in stored):
        return []
    return [
        f"bias is {config.bias!r} and the file holds no bias of the base (PEFT 0.10 to 0.19 did "
        "not save them): if the base has any, those that were trained are lost"
    ]


def _is_below(module: str, names: tuple[str, ...]) -> bool:
    """Whether a module is one of the named ones or stands below one.

    PEFT compares ends of names as text, so "classifier" finds "pre_classifier" too.
    """
    parts = module.split(".")
    return any(part.endswith(names) for part in parts) or any(
        f".{name}." in f".{module}." for name in names
    )
