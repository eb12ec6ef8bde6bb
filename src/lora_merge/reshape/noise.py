"""How many singular values of a noisy matrix stand above its noise (Gavish and Donoho, 2014).

For Y = X + noise, m x n with m <= n and beta = m / n, values below omega(beta) times the median
singular value of Y are not worth keeping. The median is not computed: whether it lies below a
number follows from how many eigenvalues of Y Y^T do, which one factorisation tells (Sylvester's
law of inertia), and mostly not even that is needed.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lora_merge.linalg.factors import gram

_STEPS = 200_001  # of the numerical integral; the median is right to 1e-9


@cache
def median_factor(beta: float) -> float:
    """omega: the optimal threshold over the median singular value, noise unknown.

    Args:
        beta: Smaller over larger side, in (0, 1].
    """
    return known_noise_factor(beta) / math.sqrt(_marchenko_pastur_median(beta))


def known_noise_factor(beta: float) -> float:
    """lambda: the optimal threshold over sqrt(larger side) times the standard deviation of noise.

    Args:
        beta: Smaller over larger side, in (0, 1].
    """
    root = math.sqrt(beta**2 + 14 * beta + 1)
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))


def noise_rank(matrix: Tensor, leading: Tensor, residual: float) -> int:
    """How many of a matrix's leading singular values exceed the threshold; exact.

    Args:
        matrix: Shape (m, n), float32 or float64.
        leading: Its k largest singular values, descending, float64, shape (k,).
        residual: Sum of the squares of all others.
    """
    small, large = sorted(matrix.shape)
    omega, count = median_factor(small / large), leading.numel()
    reach = (small + 1) // 2  # so many values reach up to the median
    # Free of charge: the values from the median up, but for the leading ones, hold at most the
    # residual together and at least the median's square each.
    held = small - reach + 1 - count
    bound = omega * math.sqrt(residual / held) if held > 0 else math.inf
    low, high = int((leading > bound).sum()), count  # `low` exceed it, those from `high` on do not
    if low == high:
        return low
    products = gram(matrix if matrix.shape[0] == small else matrix.mT)

    def narrow(index: int) -> tuple[int, int]:
        exceeds = _count_below(products, float(leading[index]) / omega) >= reach
        return (index + 1, high) if exceeds else (low, index)

    # The first rank beyond which all may be noise of the size of what remains: mostly right, and
    # two counts prove it.
    remains = residual + leading.square().flip(0).cumsum(0).flip(0)
    noise = (remains / torch.arange(small, small - count, -1)).sqrt()
    guess = int((leading > known_noise_factor(small / large) * noise).cumprod(0).sum())
    for index in (guess - 1, guess):
        if low <= index < high:
            low, high = narrow(index)
    while low < high:
        low, high = narrow((low + high) // 2)
    return low


def _count_below(products: Tensor, value: float) -> int:
    """Singular values below `value`: negative eigenvalues of M M^T - value^2 (lower triangle)."""
    shifted = products.clone()
    shifted.diagonal().sub_(value**2)
    factor, pivots, _ = torch.linalg.ldl_factor_ex(shifted)
    single = pivots > 0
    # A 2 x 2 block of Bunch and Kaufman has one negative eigenvalue; its rows are marked negative.
    blocks = int((~single).sum()) // 2
    return blocks + int((factor.diagonal()[single] < 0).sum())


def _marchenko_pastur_median(beta: float) -> float:
    """Median of the eigenvalues of noise of variance 1, divided by the larger side."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # x = low + (high - low) sin^2 t makes the density smooth at both ends.
    t = np.linspace(0, math.pi / 2, _STEPS)
    x = low + (high - low) * np.sin(t) ** 2
    weight = (np.sin(t) * np.cos(t)) ** 2 / np.maximum(x, 1e-300)
    share = np.concatenate([[0.0], np.cumsum(weight[1:] + weight[:-1])])
    return float(np.interp(share[-1] / 2, share, x))
