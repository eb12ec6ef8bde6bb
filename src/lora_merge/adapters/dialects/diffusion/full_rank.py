"""What kohya's kin store beside or instead of low-rank factors: full rank, read to be cut.

| form | tensors | delta |
| --- | --- | --- |
| DoRA | those of a LoRA, LoHa or LoKr, and dora_scale | scale (W + D) / its norms - W |
| full | diff | diff |
| IA3 | weight, on_input | rows or columns of W times weight |

DoRA's norms are those of output rows where the scale is (out, 1, ...), and of input channels where
it is (1, in, ...): LyCORIS's `weight_decompose`. ComfyUI divides by the norms of W alone and
computes something else.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod

from torch import Tensor

from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes.units import Units, precise, split
from lora_merge.adapters.forms import ModuleSpec
from lora_merge.adapters.units import BaseWeight, Recipe

SCALES = ("dora_scale", "magnitude", "magnitude_vector")
_CUT = "cut it and see the error: lora-merge convert --base DIR --energy 0.95 (or --rank)"


def refuse_unasked(group: Group, why: str, remedy: str = _CUT) -> None:
    """Refuse a change of full rank that nobody asked to cut."""
    if group.header.rank is None:
        group.refuse(f"{why}, so its change has full rank", remedy)


def dora(group: Group, spec: ModuleSpec) -> ModuleSpec:
    """A module whose weight with its low-rank change is brought to trained norms."""
    part = next(part for part in SCALES if part in group)
    refuse_unasked(group, "DoRA rescales the sum of base weight and delta")
    shape = group.shape(part)
    positions = prod(spec.kernel)
    inputs = len(shape) > 1 and shape[0] == 1 and spec.d_out > 1
    wanted = spec.d_in // positions if inputs else spec.d_out
    group.check(prod(shape) == wanted)
    units = partial(_dora, spec.recipe.units, spec.scaling, positions if inputs else 0)
    return _whole(group, spec, (*spec.recipe.keys, group.keys[part]), units)


def _dora(
    make: Callable[..., tuple[Tensor, Tensor]],
    scaling: float,
    positions: int,
    *tensors: Tensor,
    base: BaseWeight,
) -> Tensor:
    a, b = (precise(x).flatten(1) for x in make(*tensors[:-1]))
    scale, w = precise(tensors[-1]).flatten(), base.dense()
    moved = w + scaling * b @ a
    if not positions:
        turned: Tensor = moved * (scale / moved.norm(dim=1))[:, None]
        return turned - w
    by_input = moved.view(len(moved), -1, positions)
    norms = by_input.pow(2).sum(dim=(0, 2)).sqrt()
    back: Tensor = (by_input * (scale / norms)[None, :, None]).view(w.shape)
    return back - w


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


def _whole(
    group: Group, spec: ModuleSpec, keys: tuple[str, ...], delta: Callable[..., Tensor]
) -> ModuleSpec:
    """A module whose delta is made with the base and taken apart again."""
    ones = (1,) * len(spec.kernel)
    units = partial(_taken_apart, delta, spec.kernel, ones)
    return replace(
        spec,
        rank=min(spec.d_out, spec.d_in),
        scaling=1.0,
        recipe=Recipe(keys, units, "approximate", needs_base=True),
    )


def _taken_apart(
    delta: Callable[..., Tensor],
    kernel: tuple[int, ...],
    ones: tuple[int, ...],
    *tensors: Tensor,
    **base: object,
) -> Units:
    units = split(delta(*tensors, **base))
    if not kernel:
        return units
    a = units.a.reshape(len(units.a), -1, *kernel)
    return Units(a, units.b.reshape(*units.b.shape, *ones))
