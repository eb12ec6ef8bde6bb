"""llama.cpp's adapters: GGUF, with its own names of modules.

Scaling is alpha / rank of the tensor at hand; an alpha of 0 means no scaling
(`llama_adapter_lora_weight::get_scale`). Rows of q and k may be permuted, which depends on the
architecture: adapters of one architecture agree about it, and only other names undo it.
"""

import re

from torch import Tensor

from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.dialects.dialect import Claims, Dialect, Header
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.language.stacked import experts_apart
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.units import Recipe, Units
from lora_merge.errors import AdapterError

ARCHITECTURE = "general.architecture"
ALPHA = "adapter.lora.alpha"
BASE_MODEL = "general.base_model.0.name"
_FACTOR = re.compile(r"^(?P<module>.+)\.weight\.(?P<part>lora_[ab])$")


def _recognises(header: Header) -> bool:
    return ARCHITECTURE in header.metadata


def _claim(header: Header) -> Claims:
    said = header.metadata
    kinds = said.get("general.type", "model"), said.get("adapter.type", "lora")
    if kinds != ("adapter", "lora"):
        what = kinds[0] if kinds[0] != "adapter" else kinds[1]
        raise AdapterError(
            f"{header.adapter}: a GGUF file of type {what!r}, not a LoRA adapter",
            "name the adapter's own .gguf file",
        )
    if "adapter.alora.invocation_tokens" in said:
        raise AdapterError(
            f"{header.adapter}: aLoRA is active on part of the sequence only",
            "leave this adapter out",
        )
    alpha = _alpha(header)
    keys: dict[str, dict[str, str]] = {}
    ignored: dict[str, str] = {}
    for key in sorted(header.entries):
        match = _FACTOR.match(key)
        if match is not None:
            keys.setdefault(match["module"], {})[match["part"]] = key
        elif key.endswith("_norm.weight"):
            ignored[key] = "norms, which llama.cpp leaves out of adapters"
    if not keys:
        raise AdapterError(f"{header.adapter}: no lora_a in the file", "name the adapter's file")
    modules = {
        name: _module(Group(header, name, parts), alpha) for name, parts in sorted(keys.items())
    }
    config = AdapterConfig(base_model=said.get(BASE_MODEL), r=None, architecture=said[ARCHITECTURE])
    return Claims(config, modules, ignored=ignored)


def _alpha(header: Header) -> float:
    try:
        alpha = float(header.metadata.get(ALPHA, 0.0))
    except ValueError:
        alpha = float("nan")
    if not abs(alpha) < 1e15:
        raise AdapterError(f"{header.adapter}: no usable alpha ({alpha})", "correct it")
    return alpha


def _module(group: Group, alpha: float) -> ModuleSpec:
    a, b = group.shape("lora_a", 2, 3), group.shape("lora_b", 2, 3)
    group.check(len(a) == len(b))
    rank = b[-1]
    keys = (group.keys["lora_a"], group.keys["lora_b"])
    vocabulary = group.module == "token_embd"
    if vocabulary:
        group.check(len(a) == 2 and a[1] == rank)
    else:
        group.check(a[:-2] == b[:-2] and a[-2] == rank)
    recipe = Recipe(keys)
    if vocabulary or len(a) == 3:
        recipe = Recipe(keys, _vocabulary if vocabulary else experts_apart)
    return ModuleSpec(
        name=group.module,
        form="embedding" if vocabulary else "linear" if len(a) == 2 else "experts",
        d_out=b[-2],
        d_in=a[0] if vocabulary else a[-1],
        rank=rank,
        scaling=alpha / rank if alpha else 1.0,
        dtype=group.dtype(*keys),
        recipe=recipe,
        num_experts=a[0] if len(a) == 3 else 1,
    )


def _vocabulary(a: Tensor, b: Tensor) -> Units:
    """The embedding's A is stored as (vocabulary, r)."""
    return a.mT, b


GGUF = Dialect("gguf", "llama.cpp (GGUF)", _recognises, _claim, names_of_base=False)
