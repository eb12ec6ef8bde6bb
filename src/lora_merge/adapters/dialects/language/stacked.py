"""Experts that a file keeps in 3-D tensors, expert first."""

from torch import Tensor

from lora_merge.adapters.units import Units


def experts_apart(a: Tensor, b: Tensor) -> Units:
    """(E, r, in) and (E, out, r) in PEFT's layout: A expert-major, B with the expert fastest."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
