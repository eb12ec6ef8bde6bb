"""A whole difference of weights (`diff`): full rank, read to be cut."""

from math import prod

from torch import Tensor

from lora_merge.adapters.dialects.full_rank.asked import refuse_unasked
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes.units import Units, precise, split
from lora_merge.adapters.forms import ModuleSpec


def dense(group: Group) -> ModuleSpec:
    """A whole difference of weights."""
    refuse_unasked(
        group,
        "a dense difference of weights",
        "cut it and see the error: lora-merge convert --energy 0.95 (or --rank)",
    )
    shape = group.shape("diff")
    return group.spec(
        ("diff",),
        _split,
        d_out=shape[0],
        d_in=prod(shape[1:]),
        rank=min(shape[0], prod(shape[1:])),
        kernel=shape[2:],
        verdict="approximate",
    )


def _split(diff: Tensor) -> Units:
    return split(precise(diff).flatten(1))
