"""Weights over the checkpoints of one run: averages that the end of the run counts more in."""

from lora_merge.errors import MethodError

_REMEDY = "write uniform, linear, last:K, ema:BETA (0.95), or power:SIGMA (0.2)"


def schedule_weights(schedule: str, count: int) -> list[float]:
    """Weights of ordered checkpoints, the oldest first, with sum 1.

    Args:
        schedule: "uniform" (a soup, arXiv 2203.05482); "linear": 1, 2, 3, ...; "last:K": the last K
            alike; "ema:BETA": what an exponential moving average with this decay would hold after
            seeing each once; "power:SIGMA": the profile t^gamma whose relative standard deviation
            is SIGMA (post-hoc EMA, Karras et al. 2024, arXiv 2312.02696, their sigma_rel).
        count: How many checkpoints.

    Raises:
        MethodError: If it is no such schedule.

    Examples:
        >>> schedule_weights("linear", 3)
        [0.16666666666666666, 0.3333333333333333, 0.5]
    """
    kind, _, text = schedule.partition(":")
    try:
        value = float(text) if text else None
    except ValueError:
        value = None
    if kind == "uniform" and not text:
        raw = [1.0] * count
    elif kind == "linear" and not text:
        raw = [float(t + 1) for t in range(count)]
    elif kind == "last" and value is not None and value >= 1 and value == int(value):
        raw = [1.0 if t >= count - value else 0.0 for t in range(count)]
    elif kind == "ema" and value is not None and 0 <= value < 1:
        raw = [(1 - value if t else 1.0) * value ** (count - 1 - t) for t in range(count)]
    elif kind == "power" and value is not None and 0 < value < 12**-0.5:
        gamma = _gamma(value)
        raw = [((t + 1) / count) ** gamma for t in range(count)]
    else:
        raise MethodError(f"{schedule!r} is no schedule of weights", _REMEDY)
    total = sum(raw)
    return [weight / total for weight in raw]


def _gamma(sigma: float) -> float:
    """The exponent with sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); sigma falls in it."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        found = (middle + 1) ** 0.5 / ((middle + 2) * (middle + 3) ** 0.5)
        low, high = (middle, high) if found > sigma else (low, middle)
    return low
