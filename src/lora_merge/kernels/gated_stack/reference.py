"""The specification of the gated stack: float64 and plain loops, which everything is tested by.

    y_t + sum over units j of  g_t[column_j] * <down_j, x_t> * up_j

A unit whose weight is exactly zero takes no part.
"""

import torch
from torch import Tensor

from lora_merge.kernels.gate_rule import Rule


def gated_units(x: Tensor, down: Tensor, weights: Tensor, columns: Tensor) -> Tensor:
    """Weigh every unit of every token.

    Args:
        x: Tokens, shape (T, d_in).
        down: Shape (R, d_in).
        weights: Shape (T', C); T' divides T, and a row serves T / T' tokens one after another.
        columns: Weight of each unit, shape (R,).

    Returns:
        float64, shape (T, R).
    """
    x, down, weights = x.double(), down.double(), weights.double()
    tokens, units = x.shape[0], down.shape[0]
    rows = []
    for t in range(tokens):
        g = weights[t * len(weights) // tokens]
        rows += [g[int(columns[j])] * torch.dot(down[j], x[t]) for j in range(units)]
    return torch.stack(rows).view(tokens, units) if rows else x.new_zeros(tokens, units)


def expand(y: Tensor, z: Tensor, up: Tensor) -> Tensor:
    """Add the units' outputs; a unit that is exactly zero takes no part.

    Args:
        y: Output of the base module, shape (T, d_out).
        z: Gated units, shape (T, R).
        up: Shape (R, d_out).

    Returns:
        float64, shape (T, d_out).
    """
    y, z, up = y.double(), z.double(), up.double()
    rows = []
    for t in range(z.shape[0]):
        row = y[t]
        for j in range(z.shape[1]):
            if z[t, j].detach() != 0:
                row = row + z[t, j] * up[j]
        rows.append(row)
    return torch.stack(rows) if rows else y


def gated_stack(
    x: Tensor, y: Tensor, down: Tensor, up: Tensor, weights: Tensor, columns: Tensor
) -> Tensor:
    """Both: shapes as above; float64, shape (T, d_out)."""
    return expand(y, gated_units(x, down, weights, columns), up)


def routed_weights(x: Tensor, rows: Tensor, rule: Rule, bias: Tensor | None = None) -> Tensor:
    """Weights made from the tokens themselves.

    Args:
        x: Tokens, shape (T, d_in).
        rows: Gate rows, whose products with a token are its scores, shape (n, d_in).
        rule: How scores become weights.
        bias: For the selection alone, shape (n,).

    Returns:
        float64, shape (T, C).
    """
    without_null = rows.shape[0] - rule.null_row
    each = [gate_weights(rows.double() @ token.double(), rule, bias) for token in x]
    return torch.stack(each) if each else x.new_zeros(0, without_null, dtype=torch.float64)


def gate_weights(scores: Tensor, rule: Rule, bias: Tensor | None = None) -> Tensor:
    """Weights of one token's experts.

    Args:
        scores: float64, shape (n,).
        rule: How scores become weights.
        bias: For the selection alone, shape (n,).

    Returns:
        float64, shape (n,), or (n - 1,) with a learned null expert.
    """
    if rule.absolute:
        scores = scores.abs()
    if rule.null_score is not None:
        scores = torch.cat([scores, scores.new_tensor([rule.null_score])])
    count = len(scores)
    tempered = scores / rule.temperature
    if rule.value in ("softmax_all", "softmax_twice"):
        scores = tempered.exp() / tempered.exp().sum()
    judged = (scores if bias is None else scores + bias).detach()
    order = sorted(range(count), key=lambda i: (-float(judged[i]), i))
    kept = sorted(order[: rule.top_k])
    weights = torch.zeros_like(scores)
    for i in kept:
        if rule.value == "softmax":
            value = tempered[i].exp() / tempered[kept].exp().sum()
        elif rule.value == "softmax_twice":
            value = scores[i].exp() / scores[kept].exp().sum()
        elif rule.value == "sigmoid":
            value = 1 / (1 + (-tempered[i]).exp())
        elif rule.value == "binary":
            value = torch.ones_like(scores[i])
        else:
            value = scores[i]
        weights = weights + rule.factor * value * torch.eye(count, dtype=scores.dtype)[i]
    without_null = rule.null_row or rule.null_score is not None
    return weights[:-1] if without_null else weights
