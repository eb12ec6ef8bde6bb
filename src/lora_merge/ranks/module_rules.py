"""Rank rules of one module: singular values → how many to keep. All are minimal: one less fails.

A rule sees values relative to the largest, so that it cannot depend on an adapter's scale, except
`fixed` and the two absolute rules reproduced from other tools.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_merge.ranks.measures import entropy_rank, rank_at_energy

ModuleRule = Callable[[Tensor, float], int]

_FLAT = 1e-9


def fixed(values: Tensor, value: float) -> int:
    """The same rank everywhere."""
    return int(value)


def energy(values: Tensor, value: float) -> int:
    """Smallest k that keeps a share of sum s^2."""
    return rank_at_energy(values, value)


def nuclear(values: Tensor, value: float) -> int:
    """Smallest k that keeps a share of sum s."""
    return rank_at_energy(values.sqrt(), value)


def ratio(values: Tensor, value: float) -> int:
    """Values larger than the first divided by `value`."""
    return int((values * value > values[0]).sum())


def elbow(values: Tensor, value: float = 0.0) -> int:
    """Cut at the knee: the point farthest below the chord from the first value to the last.

    (Satopaa et al. 2011.) The knee i is the first value after the bend. It is dropped where it
    lies beyond a cliff (the step down to it is steeper than the step after it) and kept where the
    curve is smooth: (10, 9, 1, .9, .8) keeps 2, (8, 4, 2, 1) keeps 2. Without a bend nothing is
    cut.
    """
    size = values.numel()
    drop = float(values[0] - values[-1])
    if size < 3 or drop <= _FLAT * float(values[0]):
        return size
    x = torch.arange(size, dtype=values.dtype) / (size - 1)
    below = (1 - x) - (values - values[-1]) / drop
    knee = int(below.argmax())
    if float(below[knee]) <= _FLAT:
        return size
    before = float(values[knee - 1])
    after = float(values[knee + 1]) if knee + 1 < size else 0.0
    cliff = before * after > float(values[knee]) ** 2 * (1 + _FLAT)
    return knee if cliff else knee + 1


def effective(values: Tensor, value: float = 0.0) -> int:
    """The Roy-Vetterli effective rank, rounded up."""
    return math.ceil(entropy_rank(values / values.sum()) * (1 - _FLAT))


def soka(values: Tensor, value: float) -> int:
    """The smaller of the energy and the elbow rank (after SoKA, arXiv 2506.15251)."""
    return min(energy(values, value), max(elbow(values), 1))


def threshold(values: Tensor, value: float) -> int:
    """Values of at least `value` times the first (the heavy-tail cut of WeLore)."""
    return int((values >= value * values[0]).sum())


def full(values: Tensor, value: float = 0.0) -> int:
    """Everything."""
    return values.numel()


def kohya_fro(values: Tensor, value: float) -> int:
    """`sv_fro` of sd-scripts: share of the Frobenius norm (not its square), plus one."""
    return rank_at_energy(values, value**2) + 1


def kohya_cumulative(values: Tensor, value: float) -> int:
    """`sv_cumulative` of sd-scripts: share of sum s, plus one."""
    return nuclear(values, value) + 1


def kohya_ratio(values: Tensor, value: float) -> int:
    """`sv_ratio` of sd-scripts: values above the first divided by `value`, plus one."""
    return ratio(values, value) + 1


def lycoris_quantile(values: Tensor, value: float) -> int:
    """`quantile` of LyCORIS: running sums of s below the share, so one fewer than minimal."""
    return int((values.cumsum(0) < value * values.sum()).sum())


def lycoris_ratio(values: Tensor, value: float) -> int:
    """`ratio` of LyCORIS: values above a share of the first."""
    return int((values > value * values[0]).sum())


def lycoris_threshold(values: Tensor, value: float) -> int:
    """`threshold` of LyCORIS: values above an absolute number."""
    return int((values > value).sum())


# Rule (`rule.KINDS`) → what it does to one module; budget and match look at all modules together.
RULES: dict[str, ModuleRule] = {
    "fixed": fixed,
    "energy": energy,
    "nuclear": nuclear,
    "ratio": ratio,
    "elbow": elbow,
    "erank": effective,
    "soka": soka,
    "full": full,
    "welore": threshold,
    "kohya-fro": kohya_fro,
    "kohya-cumulative": kohya_cumulative,
    "kohya-ratio": kohya_ratio,
    "lycoris-quantile": lycoris_quantile,
    "lycoris-ratio": lycoris_ratio,
    "lycoris-threshold": lycoris_threshold,
    "peft": energy,
}
