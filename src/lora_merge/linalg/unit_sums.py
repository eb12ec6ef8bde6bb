"""The norm and the leading directions of a sum of very many units, in time that grows with R.

The inner products of all units cost (m + n) R^2, so beyond `LARGEST_GRAM` units the sum
M = up diag(scale) down is only multiplied with a few vectors. A cut to a rank is an exact
projection even so; the norm of what it leaves out is estimated with random signs (Hutchinson 1990;
the part that is known is taken out first, as in Hutch++, Meyer et al., SOSA 2021), and its standard
error is measured.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from lora_merge.linalg.factors import thin_qr, thin_svd
from lora_merge.linalg.random_bits import mask_key, random_bits
from lora_merge.linalg.range_finder import krylov

# From here on the inner products of all units cost more than eight sweeps of 32 columns, which is
# what a flat spectrum needs; measured with 4096 + 4096 rows in float32: 270 ms against 280 ms.
LARGEST_GRAM = 1536
_OVERSAMPLE = 16
_PROBES = 32
_MAX_SWEEPS = 12
# Share of the energy kept by which the last sweep of a cut still raised it.
_TOLERANCE = 4e-4
# Rows of a float32 copy at a time, where factors are stored in half precision.
_BLOCK = 2048


@dataclass(frozen=True, eq=False)
class LeadingUnits:
    """The cut of a sum to a rank.

    Attributes:
        u: Shape (m, k), float32, orthonormal columns.
        s: float64, descending, shape (k,).
        vh: Shape (k, n).
        square: Squared Frobenius norm of the sum, an estimate but for the part that was found.
        error: Its standard error.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    square: float
    error: float


def leading_units(up: Tensor, scale: Tensor, down: Tensor, rank: int) -> LeadingUnits:
    """The leading singular triplets of `up @ diag(scale) @ down`.

    The search multiplies bfloat16 factors as what they are, where the CPU can; what comes out is
    projected in float32. The first guess is a function of the shape alone.

    Args:
        up: Shape (m, R).
        scale: float64, shape (R,).
        down: Shape (R, n).
        rank: k.
    """
    product = _Sum(up, scale, down, product_dtype(up, down))
    start = _signs(down.shape[1], min(rank + _OVERSAMPLE, *product.shape), "start", up.device)

    def enough(gained: float, energy: float) -> bool:
        return gained <= _TOLERANCE * energy

    found = krylov(product.sweep, start, rank, enough, _MAX_SWEEPS)
    right = thin_qr(found.basis @ found.vectors[:, -(rank + _OVERSAMPLE) :].float())[0]
    probes = _signs(len(right), _PROBES, "probes", up.device)
    reached = _Sum(up, scale, down, torch.float32).times(torch.cat([right, probes], dim=1))
    left, rest = reached.split([right.shape[1], _PROBES], dim=1)
    square, error = _mean_square(rest - left @ (right.mT @ probes))
    u, s, vh = thin_svd(left, right.mT)
    square += float(s.square().sum())
    return LeadingUnits(u[:, :rank], s[:rank], vh[:rank], square, error)


def estimated_square(up: Tensor, scale: Tensor, down: Tensor) -> tuple[float, float]:
    """Squared Frobenius norm of `up @ diag(scale) @ down`, and the standard error of it."""
    probes = _signs(down.shape[1], 2 * _PROBES, "probes", up.device)
    return _mean_square(_Sum(up, scale, down, torch.float32).times(probes))


@dataclass(frozen=True, eq=False)
class _Sum:
    """M = up diag(scale) down as what it does to vectors, its factors cast block by block."""

    up: Tensor
    scale: Tensor
    down: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def times(self, right: Tensor) -> Tensor:
        """M right, (m, l), float32."""
        met = times(self.down, right, self.dtype) * self.scale[:, None].float()
        return times(self.up, met, self.dtype)

    def sweep(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """M right, and M^T of that."""
        reached = self.times(right)
        met = transposed_times(self.up, reached, self.dtype) * self.scale[:, None].float()
        return reached, transposed_times(self.down, met, self.dtype)


def times(factor: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor @ x`, multiplied in a dtype, returned in float32; `factor` is cast part by part."""
    x = x.to(dtype)
    return torch.cat([(part.to(dtype) @ x).float() for part in factor.split(_BLOCK)])


def transposed_times(factor: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor.mT @ x`, the same way."""
    total = torch.zeros(factor.shape[1], x.shape[1], device=x.device)
    x = x.to(dtype)
    for part, rows in zip(factor.split(_BLOCK), x.split(_BLOCK), strict=True):
        total += part.to(dtype).mT @ rows
    return total


def product_dtype(up: Tensor, down: Tensor) -> torch.dtype:
    """bfloat16 where both factors are, and the CPU multiplies it (twice as fast as float32)."""
    half = up.dtype == down.dtype == torch.bfloat16
    # Not public: a torch that has it not multiplies in float32.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    quick = up.device.type == "cpu" and supported()
    return torch.bfloat16 if half and quick else torch.float32


def _signs(rows: int, columns: int, what: str, device: torch.device) -> Tensor:
    """Random signs, float32, shape (rows, columns); the same in every run."""
    bits = random_bits(mask_key(0, "units", what), 0, (rows, columns), device=device)
    return torch.where(bits < 0, -1.0, 1.0)


def _mean_square(columns: Tensor) -> tuple[float, float]:
    """Mean of the squared norms of columns, and its standard error."""
    squares = torch.linalg.vector_norm(columns, dim=0, dtype=torch.float64).square()
    return float(squares.mean()), float(squares.std()) / sqrt(len(squares))
