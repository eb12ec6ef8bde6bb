"""What PEFT's LoRA config can ask for that is not scaling * B @ A, and what to do about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_merge.adapters.config import AdapterConfig
from lora_merge.errors import AdapterError


@dataclass(frozen=True)
class Variant:
    """One field of a LoRA config that changes what the tensors mean.

    Attributes:
        why: What it changes, in words.
        remedy: What the user can do; only what a test has tried.
        present: Whether a value of the field asks for it.
    """

    why: str
    remedy: str
    present: Callable[[Any], bool] = bool


# What turns any change of weights into a LoRA, at a rank and an error that are stated.
TAKE_THE_DIFFERENCE = (
    "merge it into its base model (peft: merge_and_unload, then save_pretrained) and take the "
    "difference as a LoRA: lora-merge extract --base BASE --tuned MERGED --rank R --no-denoise"
)
# PEFT's types that change no weight of the base, or not always.
NO_WEIGHTS = frozenset((
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT",
    "CPT", "CARTRIDGE", "POLY", "XLORA", "LILY", "SHADOW", "TRAINABLE_TOKENS", "NONE", "MISSING",
))  # fmt: skip
_NONE_YET = "leave this adapter out"

VARIANTS: dict[str, Variant] = {
    "use_dora": Variant("DoRA rescales the base weight", TAKE_THE_DIFFERENCE),
    "use_qalora": Variant("QA-LoRA pools its input", TAKE_THE_DIFFERENCE),
    "use_bdlora": Variant("BD-LoRA keeps block-diagonal factors", TAKE_THE_DIFFERENCE),
    "alora_invocation_tokens": Variant("aLoRA is active on part of the sequence only", _NONE_YET),
    "kasa_config": Variant("KaSA adds a diagonal between A and B", TAKE_THE_DIFFERENCE),
    "monteclora_config": Variant("MonteCLoRA samples its factors", TAKE_THE_DIFFERENCE),
    "velora_config": Variant("VeLoRA changes the factors' layout", TAKE_THE_DIFFERENCE),
    "arrow_config": Variant("Arrow is a router over adapters, not one adapter", _NONE_YET),
    "layer_replication": Variant(
        "replicated layers do not exist in the base model's files", _NONE_YET
    ),
    "trainable_token_indices": Variant(
        "trained token rows are stored beside the factors", _NONE_YET
    ),
}

# Initialisations that subtract B @ A from the base weight before training.
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_variants(config: AdapterConfig, adapter: str) -> None:
    """Refuse what is not scaling * B @ diag(gate) @ A.

    Raises:
        AdapterError: Naming the field, why it matters, and a remedy.
    """
    if config.raw.get("enable_lora") is not None:
        raise AdapterError(
            f"{adapter}: a MergedLinear adapter of PEFT < 0.3 (enable_lora is set): its B is the "
            "kernel of a grouped convolution, not a matrix",
            "retrain it, or convert each enabled block to a LoRA of its own",
        )
    for key, variant in VARIANTS.items():
        if variant.present(config.raw.get(key)):
            raise AdapterError(
                f"{adapter}: {key} is set: {variant.why}, so it is not scaling * B @ A",
                variant.remedy,
            )
    init = str(config.init).lower()
    if init.startswith(_MUTATING_INITS):
        raise AdapterError(
            f"{adapter}: init_lora_weights is {init!r}: the adapter belongs to a base model that "
            "this initialisation changed",
            "save it again in PEFT with path_initial_model_for_weight_conversion",
        )
