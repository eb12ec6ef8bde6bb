"""LoRA-XS, and LoRA-SB in its code: a trained r x r core between frozen A and B.

Key names of MohammadrezaBanaei/LoRA-XS: `lora_A.weight`, `lora_B.weight` and, beside them,
`default_lora_latent_mapping.weight`. The delta is scaling * B @ core @ A.
"""

import re

from torch import Tensor

from lora_merge.adapters.dialects.dialect import Claims, Dialect, Header
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.peft_variants import refuse_variants
from lora_merge.adapters.dialects.recipes.units import Units, precise
from lora_merge.adapters.dialects.spelling import canonical
from lora_merge.adapters.forms import ModuleSpec

_CORE = "lora_latent_mapping"
_PART = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_A|lora_B|(?:\w+_)?lora_latent_mapping)\.weight$"
)


def _recognises(header: Header) -> bool:
    return any(key.endswith(f"{_CORE}.weight") for key in header.entries)


def _claim(header: Header) -> Claims:
    config = header.said()
    refuse_variants(config, header.adapter)
    keys: dict[str, dict[str, str]] = {}
    for key in sorted(header.entries):
        match = _PART.match(canonical(key))
        if match is not None:
            part = _CORE if match["part"].endswith(_CORE) else match["part"]
            keys.setdefault(match["module"], {})[part] = key
    first = next(key for key in sorted(header.entries) if key.endswith(f"{_CORE}.weight"))
    modules = {
        name: _module(Group(header, name, parts), first) for name, parts in sorted(keys.items())
    }
    return Claims(config, modules)


def _module(group: Group, first: str) -> ModuleSpec:
    if "lora_A" not in group or "lora_B" not in group:
        group.refuse(
            f"the A and B of {group.keys.get(_CORE, first)} are not in the file; they were made "
            "from W by a randomised SVD",
            "save the adapter with its frozen A and B",
        )
    if _CORE not in group:
        group.refuse(
            f"it has no core, though {first} makes the file one of LoRA-XS",
            "save the adapter again, or leave that tensor out",
        )
    core = group.shape(_CORE, 2)
    (r, d_in), (d_out, columns) = group.shape("lora_A", 2), group.shape("lora_B", 2)
    if core != (columns, r):
        group.refuse(f"{group.keys[_CORE]} does not fit between B and A", "save the adapter again")
    return group.spec(
        ("lora_A", "lora_B", _CORE),
        _with_core,
        d_out=d_out,
        d_in=d_in,
        rank=columns,
        scaling=group.header.said().scaling_of(group.module, r),
    )


def _with_core(a: Tensor, b: Tensor, core: Tensor) -> Units:
    return Units(precise(core) @ precise(a), precise(b))


LORA_XS = Dialect("lora-xs", "LoRA-XS", _recognises, _claim)
