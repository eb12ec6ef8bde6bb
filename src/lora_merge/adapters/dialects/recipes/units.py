"""A delta as its units, and the operations that keep it one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_merge.linalg.core_svd import core_svd


class Units(NamedTuple):
    """Rank-one units of one weight delta, `b @ a`.

    Attributes:
        a: Shape (k, d_in); a convolution's kernel positions are columns, fastest last.
        b: Shape (d_out, k).
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """How many units there are, an upper bound of the delta's rank."""
        return self.a.shape[0]

    def delta(self) -> Tensor:
        """The whole delta, shape (d_out, d_in). For tests and small modules."""
        return self.b @ self.a


def product(a: Tensor, b: Tensor) -> Units:
    """Stored factors of a linear layer or convolution, in float32 at least.

    Args:
        a: Shape (k, d_in) or (k, in, *kernel).
        b: Shape (d_out, k) or (d_out, k, 1, ...).
    """
    return Units(precise(a).flatten(1), precise(b).reshape(b.shape[0], -1))


def precise(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is stored so; products of 16-bit numbers are exact there."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def transposed(units: Units) -> Units:
    """Units of the transposed delta (a base that stores (in, out) weights, an embedding)."""
    return Units(units.b.mT, units.a.mT)


def scaled(units: Units, factor: Tensor | float) -> Units:
    """Each unit times a factor of its own, shape (k,), or all times one number.

    The factor goes onto A: folding it keeps B's bits.
    """
    if isinstance(factor, Tensor):
        factor = factor.to(units.a.dtype).reshape(-1, 1)
    return Units(units.a * factor, units.b)


def with_core(units: Units, core: Tensor) -> Units:
    """`b @ core @ a`: LoRA-XS, TinyLoRA, SVFit.

    Args:
        units: The frozen bases, k units.
        core: Shape (k, k).
    """
    return Units(core.to(units.a.dtype) @ units.a, units.b)


def joined(parts: Sequence[Units]) -> Units:
    """The sum of several deltas of one weight: their units side by side."""
    return Units(torch.cat([p.a for p in parts]), torch.cat([p.b for p in parts], dim=1))


def split(matrix: Tensor) -> Units:
    """A matrix kept whole as its units: the smaller side times an identity, min(m, n) units."""
    rows, columns = matrix.shape
    eye = torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
    return Units(eye, matrix) if columns <= rows else Units(matrix, eye)


def truncated(units: Units, rank: int) -> Units:
    """The best approximation of a rank, in balanced singular units, from the factors alone."""
    left, right = core_svd(units.b, units.a).truncate(rank)
    return Units(right.to(units.a.dtype) @ units.a, units.b @ left.to(units.b.dtype))


def rows(units: Units, start: int, stop: int) -> Units:
    """The same units seen from rows start..stop of the delta (a part of a fused weight)."""
    return Units(units.a, units.b[start:stop])


def columns(units: Units, start: int, stop: int) -> Units:
    """The same units seen from columns start..stop of the delta."""
    return Units(units.a[:, start:stop], units.b)
