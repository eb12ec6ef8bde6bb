"""How scores become weights: softmax, sigmoid or as they are; of all, or of the top k."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lora_merge.kernels.gate_rule import Rule, Value


class Activation(Protocol):
    """What `activate` has to know of a gate; documented at `Rule`."""

    @property
    def value(self) -> Value: ...  # noqa: D102
    @property
    def top_k(self) -> int | None: ...  # noqa: D102
    @property
    def temperature(self) -> float: ...  # noqa: D102


def weights_of(scores: Tensor, rule: Rule, bias: Tensor | None = None) -> Tensor:
    """Weights of the experts, from the inner products of tokens and gate rows.

    Args:
        scores: Shape (..., n), of any floating dtype.
        rule: The gate.
        bias: As for `activate`.

    Returns:
        Weights without the null expert's, float32 or float64, shape (..., n) or (..., n - 1).
    """
    if rule.absolute:
        scores = scores.abs()
    if rule.null_score is not None:
        null = scores.new_full((*scores.shape[:-1], 1), rule.null_score)
        scores = torch.cat([scores, null], dim=-1)
    weights = activate(scores, rule, bias, factor=rule.factor)
    return weights[..., :-1] if rule.null_row or rule.null_score is not None else weights


def activate(
    scores: Tensor, rule: Activation, bias: Tensor | None = None, *, factor: float = 1.0
) -> Tensor:
    """Turn scores into weights.

    Args:
        scores: Shape (..., n); raised to float32 if it is half precision.
        rule: The gate.
        bias: Added to the scores for the selection alone, shape (..., n) or (n,): DeepSeek's
            balance without an auxiliary loss, as in SMoRA.
        factor: Multiplies every weight.

    Returns:
        Weights, shape (..., n), exactly zero outside the kept.
    """
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    size = scores.shape[-1]
    if rule.top_k is None or rule.top_k >= size:
        weights = _values(scores, rule)
        if rule.value == "softmax_twice":
            weights = torch.softmax(weights, dim=-1)
        return weights if factor == 1.0 else weights * factor
    kept, index = kept_of(scores, rule, bias)
    if factor != 1.0:
        kept = kept * factor
    return torch.zeros_like(scores).scatter_(-1, index, kept)


def kept_of(scores: Tensor, rule: Activation, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights of the top k scores alone, and their places; arguments as of `activate`.

    Returns:
        Both of shape (..., k).
    """
    assert rule.top_k is not None
    if rule.value in ("softmax_all", "softmax_twice"):
        scores = torch.softmax(scores / rule.temperature, dim=-1)
    if bias is None:
        kept, index = scores.topk(rule.top_k, dim=-1, sorted=False)
    else:
        index = (scores + bias).topk(rule.top_k, dim=-1, sorted=False).indices
        kept = scores.gather(-1, index)
    if rule.value == "softmax_twice":
        kept = torch.softmax(kept, dim=-1)
    elif rule.value != "softmax_all":
        kept = _values(kept, rule)
    return kept, index


def _values(scores: Tensor, rule: Activation) -> Tensor:
    """Weights of scores that are all kept."""
    if rule.value == "raw":
        return scores
    if rule.value == "binary":
        return torch.ones_like(scores)
    if rule.temperature != 1.0:
        scores = scores / rule.temperature
    return torch.sigmoid(scores) if rule.value == "sigmoid" else torch.softmax(scores, dim=-1)


def kept_of_one(scores: Sequence[float], rule: Rule) -> list[tuple[int, float]]:
    """The same as `weights_of` for one token: for a few scores, numbers are faster than tensors.

    Args:
        scores: One token's.
        rule: The gate.

    Returns:
        Place and weight of each score that is kept, without the null expert's.
    """
    values = [abs(score) for score in scores] if rule.absolute else scores
    if rule.null_score is not None:
        values = [*values, rule.null_score]
    size, how = len(values), rule.value
    kept: Sequence[int] = range(size)
    if rule.top_k is not None and rule.top_k < size:
        kept = sorted(kept, key=values.__getitem__, reverse=True)[: rule.top_k]
    if how in ("softmax_all", "softmax_twice"):
        values = _softmax(values, rule.temperature)
    chosen = [values[place] for place in kept]
    if how == "softmax":
        chosen = _softmax(chosen, rule.temperature)
    elif how == "softmax_twice":
        chosen = _softmax(chosen, 1.0)
    elif how == "sigmoid":
        chosen = [0.5 + 0.5 * math.tanh(value / rule.temperature / 2) for value in chosen]
    elif how == "binary":
        chosen = [1.0] * len(chosen)
    if rule.factor != 1.0:
        chosen = [value * rule.factor for value in chosen]
    pairs = list(zip(kept, chosen, strict=True))
    if rule.null_row or rule.null_score is not None:
        return [pair for pair in pairs if pair[0] != size - 1]
    return pairs


def _softmax(values: Sequence[float], temperature: float) -> list[float]:
    highest = max(values)
    powers = [math.exp((value - highest) / temperature) for value in values]
    total = sum(powers)
    return [power / total for power in powers]
