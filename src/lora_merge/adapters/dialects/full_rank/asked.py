"""Modules whose change has full rank: all their units, so that whoever cuts them knows the loss."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from lora_merge.adapters.dialects.grouping import Group
from lora_merge.adapters.dialects.recipes.units import Units, split
from lora_merge.adapters.forms import ModuleSpec

_CUT = "cut it and see the error: lora-merge convert --base DIR --energy 0.95 (or --rank)"


def refuse_unasked(group: Group, why: str, remedy: str = _CUT) -> None:
    """Refuse a change of full rank that nobody asked to cut.

    Raises:
        AdapterError: Naming the command that cuts it and tells the error.
    """
    if group.header.rank is None:
        group.refuse(f"{why}, so its change has full rank", remedy)


def dense_spec(
    group: Group,
    why: str,
    parts: tuple[str, ...],
    delta: Callable[..., Tensor],
    shape: tuple[int, int],
    *,
    kernel: tuple[int, ...] = (),
    needs_base: bool,
) -> ModuleSpec:
    """A module whose delta is made whole.

    Args:
        group: The module.
        why: Why it has full rank, for the refusal.
        parts: What `delta` takes.
        delta: Gives it, shape (d_out, d_in); with `needs_base` it takes `base`.
        shape: (d_out, d_in), kernel positions included.
        kernel: Kernel of a convolution.
        needs_base: Whether W takes part.
    """
    refuse_unasked(group, why)
    return group.spec(
        parts,
        partial(whole, delta),
        d_out=shape[0],
        d_in=shape[1],
        rank=min(shape),
        kernel=kernel,
        verdict="approximate",
        needs_base=needs_base,
    )


def whole(delta: Callable[..., Tensor], *tensors: Tensor, **base: object) -> Units:
    """All units of a delta that is made whole."""
    return split(delta(*tensors, **base))
