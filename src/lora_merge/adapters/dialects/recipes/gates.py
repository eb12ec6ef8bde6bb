"""Factors with a gate on every unit."""

import torch
from torch import Tensor

from lora_merge.adapters.units import Units


def gated(a: Tensor, b: Tensor, gate: Tensor) -> Units:
    """Fold a factor per unit (AdaLoRA's `lora_E`, SoRA's `gate`) into A.

    In float32 at least: the product of two 16-bit numbers is exact there.
    """
    precise = torch.promote_types(a.dtype, torch.float32)
    factor = gate.reshape(-1, *[1] * (a.ndim - 1)).to(precise)
    return a.to(precise) * factor, b
