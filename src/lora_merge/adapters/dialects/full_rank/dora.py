"""DoRA: the base weight with its low-rank change, brought to trained norms (arXiv 2402.09353).

Norms are those of output rows where the scale has one number per output, and of input channels
where it is (1, in, ...): LyCORIS's `weight_decompose` without `wd_on_out`. ComfyUI divides by the
norms of W alone and computes something else.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod

from torch import Tensor

from lora_merge.adapters.dialects.full_rank.asked import refuse_unasked
from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes.units import Units, precise, split
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.units import BaseWeight, Recipe
from lora_merge.files.tensor_file import widest_dtype


def dora(
    group: Group,
    spec: ModuleSpec,
    part: str,
    *,
    rows: Callable[[Tensor], Tensor] | None = None,
) -> ModuleSpec:
    """A module whose weight with its low-rank change is brought to trained norms.

    Args:
        group: The module.
        spec: Its low-rank change alone.
        part: The trained norms.
        rows: From the norms as stored to the order of the base's rows.
    """
    refuse_unasked(group, "DoRA rescales the sum of base weight and delta")
    shape = group.shape(part)
    positions = prod(spec.kernel)
    inputs = len(shape) > 1 and shape[0] == 1 and spec.d_out > 1
    group.check(prod(shape) == (spec.d_in // positions if inputs else spec.d_out))
    delta = partial(_dora, spec.recipe.units, spec.scaling, positions if inputs else 0, rows)
    return replace(
        spec,
        rank=min(spec.d_out, spec.d_in),
        scaling=1.0,
        dtype=widest_dtype((spec.dtype, group.dtype(group.keys[part]))),
        recipe=Recipe(
            (*spec.recipe.keys, group.keys[part]),
            partial(_taken_apart, delta, spec.kernel),
            "approximate",
            needs_base=True,
        ),
    )


def _dora(
    make: Callable[..., tuple[Tensor, Tensor]],
    scaling: float,
    positions: int,
    rows: Callable[[Tensor], Tensor] | None,
    *tensors: Tensor,
    base: BaseWeight,
) -> Tensor:
    a, b = (precise(x).flatten(1) for x in make(*tensors[:-1]))
    scale, w = precise(tensors[-1]).flatten(), base.dense()
    moved = w + scaling * b @ a
    if not positions:
        scale = scale if rows is None else rows(scale)
        turned: Tensor = moved * (scale / moved.norm(dim=1))[:, None]
        return turned - w
    by_input = moved.view(len(moved), -1, positions)
    norms = by_input.pow(2).sum(dim=(0, 2)).sqrt()
    back: Tensor = (by_input * (scale / norms)[None, :, None]).view(w.shape)
    return back - w


def _taken_apart(
    delta: Callable[..., Tensor], kernel: tuple[int, ...], *tensors: Tensor, **base: object
) -> Units:
    units = split(delta(*tensors, **base))
    if not kernel:
        return units
    ones = (1,) * len(kernel)
    a = units.a.reshape(len(units.a), -1, *kernel)
    return Units(a, units.b.reshape(*units.b.shape, *ones))
