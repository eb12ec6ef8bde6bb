"""FLoRA: a Tucker core and one factor per mode of the weight (arXiv 2405.14739).

Key names of SJTU-DeepVisionLab/FLoRA, below a module's `flora_layer`: `param_G` of shape
(r_in, r_out, *r_kernel), `param_0 (in, r_in)`, `param_1 (out, r_out)`, and `param_2 (k, r_2)` and
on for a convolution. The delta is scale times the core multiplied by every factor, exactly of rank
r_out. The scale stands in the training script alone.
"""

import re
from math import prod

import torch
from torch import Tensor

from lora_merge.adapters.config import AdapterConfig
from lora_merge.adapters.dialects.dialect import Claims, Dialect, Header
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes.units import Units, precise
from lora_merge.adapters.dialects.spelling import canonical
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.errors import AdapterError

_PART = re.compile(r"^(?P<module>.+)\.flora_layer\.(?P<part>param_(?:G|\d))$")


def _recognises(header: Header) -> bool:
    return any(key.endswith(".flora_layer.param_G") for key in header.entries)


def _claim(header: Header) -> Claims:
    raw = {} if header.config is None else header.config.raw
    scale = raw.get("scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < 1e15:
        raise AdapterError(
            f"{header.adapter}: FLoRA's scale is not in the file",
            'put an adapter_config.json beside it: {"peft_type": "FLORA", "scale": 1.0}, with the '
            "scale of its training",
        )
    keys: dict[str, dict[str, str]] = {}
    for key in sorted(header.entries):
        match = _PART.match(canonical(key))
        if match is not None:
            keys.setdefault(match["module"], {})[match["part"]] = key
    modules = {
        name: _module(Group(header, name, parts), float(scale))
        for name, parts in sorted(keys.items())
    }
    base = raw.get("base_model_name_or_path")
    return Claims(AdapterConfig(base_model=str(base) if base else None, r=None), modules)


def _module(group: Group, scale: float) -> ModuleSpec:
    core = group.shape("param_G", 2, 4, 5)
    parts = tuple(f"param_{mode}" for mode in range(len(core)))
    sizes = []
    for part, rank in zip(parts, core, strict=True):
        size, columns = group.shape(part, 2)
        group.check(columns == rank)
        sizes.append(size)
    d_in, d_out, *kernel = sizes
    return group.spec(
        ("param_G", *parts),
        _units,
        d_out=d_out,
        d_in=d_in * prod(kernel),
        rank=core[1],
        scaling=scale,
        kernel=tuple(kernel),
    )


def _units(core: Tensor, *factors: Tensor) -> Units:
    inputs, outputs, *others = map(precise, factors)
    a = torch.tensordot(precise(core), inputs, dims=([0], [1])).movedim(-1, 1)  # r_out, in, ...
    for factor in others:  # each replaces the foremost mode of the kernel by its size, behind
        a = torch.tensordot(a, factor, dims=([2], [1]))
    return Units(a.reshape(len(a), -1), outputs)


FLORA = Dialect("flora", "FLoRA (a Tucker core)", _recognises, _claim)
