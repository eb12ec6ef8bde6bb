"""Tensors that no rule claims: what they look like, in words, and what to do."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from lora_merge.adapters.dialects.dialect import Header
from lora_merge.adapters.dialects.peft_variants import TAKE_THE_DIFFERENCE
from lora_merge.adapters.dialects.spelling import canonical
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.errors import AdapterError


@dataclass(frozen=True)
class Look:
    """One kind of tensor that is known by its name.

    Attributes:
        pattern: Found in the tensor's name.
        what: What it is.
        remedy: What the user can do.
    """

    pattern: re.Pattern[str]
    what: str
    remedy: str


_CONVERT = "convert it to a PEFT LoRA first"
_OUT = "leave this adapter out"
_MERGE = TAKE_THE_DIFFERENCE

LOOKS: tuple[Look, ...] = tuple(
    Look(re.compile(pattern), what, remedy)
    for pattern, what, remedy in (
        (r"\.lora_(down|up)\.weight$|\.alpha$", "kohya (lora_down / lora_up / alpha)", _CONVERT),
        (r"\.hada_w|\.lokr_w|\.oft_", "LyCORIS (LoHa, LoKr or OFT)", _CONVERT),
        (
            r"lora_magnitude_vector|\.dora_scale$|\.magnitude$|\.m$",
            "DoRA's magnitude",
            TAKE_THE_DIFFERENCE,
        ),
        (r"_lora\.(down|up)\.weight$", "an old diffusers attention processor", _CONVERT),
        (
            r"\.adapter\.linear_(in|out)\.",
            "Megatron-Bridge's own adapter",
            "export it to PEFT there (save_hf_adapter), and name that",
        ),
        (r"\.coefficients$", "NOLA's coefficients of random bases, which seeds alone tell", _OUT),
        (r"\.s2$", "S2FT's rows of a permuted weight, whose place is not stored", _OUT),
        (r"\.lora_diag$", "KaSA's diagonal between A and B", _OUT),
        (r"\.lora_(route|gate|router)\b", "the gate of a mixture of LoRAs", _OUT),
        (r"\.reshape_weight$", "the shape a ComfyUI LoRA pads its weight to", _OUT),
        (r"\.diff(_b)?$", "a dense difference of weights", _OUT),
        (r"trainable_tokens", "trained rows of an embedding", _OUT),
    )
)


def looks_like(key: str) -> Look | None:
    """What a tensor's name says of it, None if nothing."""
    return next((look for look in LOOKS if look.pattern.search(key)), None)


def refuse_unclaimed(
    header: Header,
    keys: Sequence[str],
    *,
    modules: Mapping[str, ModuleSpec] | None = None,
    whole: bool = False,
) -> NoReturn:
    """Name a tensor that no rule claims and what it looks like.

    Args:
        header: The file.
        keys: The tensors, at least one unless `whole`.
        modules: What was understood, to say which module a tensor belongs to.
        whole: Whether nothing of the file was understood.

    Raises:
        AdapterError: Always.
    """
    for key in keys:
        look = looks_like(key)
        if look is not None:
            raise AdapterError(
                f"{header.adapter}: {key} looks like {look.what}, which is no part of a plain LoRA",
                look.remedy,
            )
    if whole:
        names = ", ".join(list(keys)[:3]) or "none"
        raise AdapterError(
            f"{header.adapter}: no LoRA module found (its tensors: {names})",
            "expected names like base_model.model.<module>.lora_A.weight",
        )
    name = canonical(keys[0])
    owner = next((m for m in modules or {} if name.startswith(m + ".")), None)
    where = f"below the adapted module {owner}" if owner else "of no adapted module"
    raise AdapterError(
        f"{header.adapter}: no rule says what {keys[0]} is ({len(keys)} such tensors; it stands "
        f"{where})",
        "if its module was trained and saved whole, name it in modules_to_save of "
        "adapter_config.json; otherwise take the tensor out of the file",
    )
