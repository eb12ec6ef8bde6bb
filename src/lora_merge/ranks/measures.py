"""Numbers that describe one spectrum. Every definition is named, since several are in use.

A spectrum is a 1-D float64 tensor of singular values, descending. Reductions run in float64 and
tails are summed from small to large. The Renyi ordering holds for every spectrum:
1 <= stable_rank <= participation_ratio <= entropy_rank_energy <= effective_rank <= numerical_rank.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

ENERGY_LEVELS = (0.5, 0.9, 0.95, 0.99, 0.999)
# Unit roundoff of each storage dtype: rounding both factors moves a zero singular value by O(u^2).
_ROUNDOFF = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
_EPS = 2.0**-52


@dataclass(frozen=True)
class Measures:
    """What one spectrum is like; `None` where a number is not defined (never NaN).

    Attributes:
        frobenius: sqrt(sum s^2).
        nuclear: sum s.
        spectral: Largest singular value.
        stable_rank: frobenius^2 / spectral^2.
        effective_rank: exp(entropy of s / sum s) (Roy & Vetterli 2007).
        entropy_rank_energy: exp(entropy of s^2 / sum s^2).
        participation_ratio: (sum s^2)^2 / sum s^4.
        participation_sigma: (sum s)^2 / sum s^2.
        numerical_rank: Values above the tolerance.
        condition: Largest over smallest value above the tolerance.
        top1_share: Share of the energy in the first direction.
        spike: First over second value.
        decay: Least-squares slope of ln s_i over i (exponential decay), per rank.
        power: Least-squares slope of ln s_i over ln i (power-law decay).
        noise_tail: How many of the last values are as close together as those of a random matrix.
        ranks_at: Energy level → smallest rank that holds it.
    """

    frobenius: float
    nuclear: float
    spectral: float
    stable_rank: float
    effective_rank: float
    entropy_rank_energy: float
    participation_ratio: float
    participation_sigma: float
    numerical_rank: int
    condition: float | None
    top1_share: float
    spike: float | None
    decay: float | None
    power: float | None
    noise_tail: int
    ranks_at: dict[float, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; energy levels become strings."""
        data = asdict(self)
        data["ranks_at"] = {str(level): rank for level, rank in self.ranks_at.items()}
        return data


def measure(values: Tensor, shape: tuple[int, int], dtype: str = "F32") -> Measures:
    """Describe a spectrum.

    Args:
        values: Singular values, descending, float64, shape (k,).
        shape: (d_out, d_in) of the matrix: sets the tolerance and the noise test.
        dtype: safetensors code of the stored factors.
    """
    total = float(values.sum())
    if not total > 0:
        return Measures(0, 0, 0, 0, 0, 0, 0, 0, 0, None, 0, None, None, None, 0, zero_ranks())
    # Relative to the largest, so that squares and fourth powers neither overflow nor vanish.
    top = float(values[0])
    relative = values / top
    energy, sigma = relative.square(), relative
    sum_energy, sum_sigma = float(energy.sum()), float(sigma.sum())
    rank = numerical_rank(values, shape, dtype)
    alive = relative[:rank]
    return Measures(
        frobenius=top * math.sqrt(sum_energy),
        nuclear=total,
        spectral=top,
        stable_rank=sum_energy,
        effective_rank=entropy_rank(sigma / sum_sigma),
        entropy_rank_energy=entropy_rank(energy / sum_energy),
        participation_ratio=sum_energy**2 / float(energy.square().sum()),
        participation_sigma=sum_sigma**2 / sum_energy,
        numerical_rank=rank,
        condition=1.0 / float(alive[-1]),
        top1_share=1.0 / sum_energy,
        spike=1.0 / float(alive[1]) if rank > 1 else None,
        decay=_slope(torch.arange(1, rank + 1, dtype=torch.float64), alive.log()),
        power=_slope(torch.arange(1, rank + 1, dtype=torch.float64).log(), alive.log()),
        noise_tail=noise_tail(values[:rank], shape),
        ranks_at={level: rank_at_energy(values, level) for level in ENERGY_LEVELS},
    )


def zero_ranks() -> dict[float, int]:
    """The energy ranks of a zero matrix."""
    return dict.fromkeys(ENERGY_LEVELS, 0)


def tolerance(top: float, shape: tuple[int, int], dtype: str) -> float:
    """Below this, a singular value cannot be told from rounding.

    The larger of the float64 computation's error and the second-order effect of rounding both
    factors to their storage dtype (a rank-4 product stored as bf16 factors of rank 16 shows
    s_5 / s_1 about 1e-6).
    """
    roundoff = _ROUNDOFF.get(dtype, _ROUNDOFF["F32"])
    return top * max(max(shape) * _EPS, 4 * roundoff**2)


def numerical_rank(values: Tensor, shape: tuple[int, int], dtype: str) -> int:
    """Number of singular values above `tolerance`."""
    if not values.numel():
        return 0
    return int((values > tolerance(float(values[0]), shape, dtype)).sum())


def tail_energy(values: Tensor) -> Tensor:
    """Energy beyond rank k for k = 0..len, float64, shape (len + 1,), summed small to large."""
    tail = values.square().flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)])


def rank_at_energy(values: Tensor, level: float) -> int:
    """Smallest k whose first k values hold `level` of the energy; 0 for a zero spectrum."""
    tail = tail_energy(values)
    total = float(tail[0])
    # The slack is the rounding of `1 - level`; at level 1 the tail must vanish exactly.
    allowed = total * ((1 - level) + (2 * _EPS if level < 1 else 0.0))
    return int((tail > allowed).sum()) if total > 0 else 0


def entropy_rank(shares: Tensor) -> float:
    """exp(entropy) of numbers that add up to 1: how many equal ones would have as much of it."""
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


def noise_tail(values: Tensor, shape: tuple[int, int]) -> int:
    """Length of the longest tail that a random factor pair could have produced, 0 for none.

    The t values of a product of Gaussian factors lie within prod (1 + sqrt(t/d)) / (1 - sqrt(t/d))
    of one another, d the two sides (Bai-Yin). Advisory: a flat tail is no proof of noise. Tails of
    fewer than three values are not reported: any two neighbours are close.
    """
    size = values.numel()
    for length in range(min(size, min(shape) - 1), 2, -1):
        spread = 1.0
        for side in shape:
            root = math.sqrt(length / side)
            spread *= (1 + root) / (1 - root)
        if float(values[size - length]) <= spread * float(values[-1]):
            return length
    return 0


def _slope(x: Tensor, y: Tensor) -> float | None:
    if x.numel() < 2:
        return None
    centred = x - x.mean()
    return float((centred * (y - y.mean())).sum() / centred.square().sum())
