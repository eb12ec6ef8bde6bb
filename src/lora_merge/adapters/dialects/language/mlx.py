"""mlx-lm: both factors transposed, one scale for the whole file, used as it is."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.dialects.dialect import Claims, Dialect, Header
from lora_merge.adapters.dialects.full_rank.dora import dora
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.language.stacked import experts_apart
from lora_merge.adapters.dialects.spelling import canonical
from lora_merge.adapters.forms import Form, ModuleSpec
from lora_merge.adapters.units import Recipe, Units
from lora_merge.errors import AdapterError
from lora_merge.files.documents import validated

_FACTOR = re.compile(r"^(?P<module>.+)\.(?P<part>lora_a|lora_b|m)$")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


@dataclass(frozen=True)
class _Parameters:
    scale: float | None = None


@dataclass(frozen=True)
class _Said:
    """What mlx-lm's config says of the scaling."""

    lora_parameters: _Parameters = _Parameters()


def _recognises(header: Header) -> bool:
    said = header.config is not None and "fine_tune_type" in header.config.raw
    return said or any(key.endswith(".lora_a") for key in header.entries)


def _claim(header: Header) -> Claims:
    raw = {} if header.config is None else header.config.raw
    kind = raw.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(
            f"{header.adapter}: fine_tune_type is {kind!r}, no low-rank change of the weights",
            "leave this adapter out",
        )
    scaling = _scale(header)
    keys: dict[str, dict[str, str]] = {}
    for key in sorted(header.entries):
        match = _FACTOR.match(canonical(key))
        if match is not None:
            keys.setdefault(match["module"], {})[match["part"]] = key
    modules = {
        name: _module(Group(header, name, parts), scaling) for name, parts in sorted(keys.items())
    }
    if not modules:
        raise AdapterError(f"{header.adapter}: no lora_a in the file", "name the adapter's file")
    model = raw.get("model")
    return Claims(AdapterConfig(base_model=str(model) if model else None, r=None), modules)


def _scale(header: Header) -> float:
    """`lora_parameters.scale`, which is no alpha: it is not divided by the rank."""
    raw = {} if header.config is None else header.config.raw
    what = f"{header.adapter}: adapter_config.json"
    scale = validated(_Said, raw, what, "correct it", error=AdapterError).lora_parameters.scale
    if scale is None:
        raise AdapterError(
            f"{header.adapter}: no scale in adapter_config.json, so the scaling is unknown",
            "put mlx-lm's own adapter_config.json beside the file",
        )
    if not isfinite(scale) or abs(scale) >= 1e15:
        raise AdapterError(f"{header.adapter}: no usable scale ({scale})", "correct it")
    return scale


def _module(group: Group, scaling: float) -> ModuleSpec:
    a, b = group.shape("lora_a", 2, 3), group.shape("lora_b", 2, 3)
    form: Form = "linear"
    units: Callable[..., Units] = _turned
    experts = 1
    if len(a) == 3:
        experts, rank, d_in = a
        d_out = b[-2]
        group.check(b == (experts, d_out, rank))
        form, units = "experts", experts_apart
    else:
        (d_in, rank), d_out = a, b[-1]
        group.check(b == (rank, d_out))
        if group.module.rpartition(".")[2] in _EMBEDDINGS:
            form = "embedding"
    keys = (group.keys["lora_a"], group.keys["lora_b"])
    plain = ModuleSpec(
        name=group.module,
        form=form,
        d_out=d_out,
        d_in=d_in,
        rank=rank,
        scaling=scaling,
        dtype=group.dtype(*keys),
        recipe=Recipe(keys, units),
        num_experts=experts,
    )
    if "m" not in group:
        return plain
    if form != "linear":
        group.refuse(f"DoRA of {form}", "leave this module out")
    return dora(group, plain, "m")


def _turned(a: Tensor, b: Tensor) -> Units:
    return a.mT.contiguous(), b.mT.contiguous()


MLX = Dialect("mlx", "mlx-lm", _recognises, _claim)
