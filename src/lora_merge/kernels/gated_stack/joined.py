"""A whole group for few tokens in two launches: one product, then gate and expand as one kernel.

[W_1; W_2; down; gate] x  ->  y_1, y_2, u, scores  ->  y_m + (g u) up_m
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from lora_merge.kernels.gated_stack import fused
from lora_merge.kernels.gated_stack.concat import Joined
from lora_merge.kernels.gated_stack.gate import Rule
from lora_merge.kernels.gated_stack.layout import Ungated


def gate_pieces(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """Gate rows as rows of another dtype that add up to them.

    Args:
        gate: float32, shape (n, d_in).
        dtype: bfloat16, three of which hold a float32 number, or that of `gate`.

    Returns:
        The largest parts of all rows, then the next, shape (n, d_in) or (3 n, d_in).
    """
    if gate.dtype == dtype:
        return gate
    pieces, rest = [], gate
    for _ in range(3):
        pieces.append(rest.to(dtype))
        rest = rest - pieces[-1]
    return torch.cat(pieces)


def joined_stack(
    x: Tensor,
    joined: Joined,
    columns: Tensor,
    *,
    rule: Rule | None = None,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
) -> list[Tensor]:
    """A whole group for few tokens: one product, and one kernel that gates and expands.

    Args:
        x: Shape (T, d_in).
        joined: The modules, alike and without border; gate rows of bfloat16 are `gate_pieces`.
        columns: Weight that each unit of one member takes, int64, shape (R,).
        rule: How scores become weights.
        bias: For the selection alone, shape (M n,).
        weights: Instead of rule and bias, shape (T', M C), T' dividing T.

    Returns:
        Every output without the module's bias, shape (T, d_out), contiguous.
    """
    assert joined.up is not None
    rows, half = joined.rows, rule is not None and joined.matrix.dtype != torch.float32
    if not half:
        both = functional.linear(x, rows)
    elif x.is_cuda:
        both = torch.mm(x, rows.mT, out_dtype=torch.float32)  # or the scores would be rounded
    else:
        both = functional.linear(x.float(), rows.float())
    y, u, scores = both.split_with_sizes(
        [joined.outputs[-1], joined.num_units, joined.scores], dim=1
    )
    if weights is not None:
        pieces = weights[None]
    else:
        pieces = scores.unflatten(1, (3 if half else 1, -1)).movedim(1, 0)
    widths = tuple(b - a for a, b in pairwise(joined.outputs))
    units = Ungated(u[None], pieces, columns, rule, bias)
    out = fused.gate_expand(y, units, joined.up, widths)
    return [part.view(len(x), -1) for part in out.split([len(x) * width for width in widths])]
