"""The gated stack in plain PyTorch: shrink, gate, expand, for any device and any base.

    y + up^T (g * (down x))        down (R, d_in), up (R, d_out), g one weight per unit

Two matrix products per module whatever the number of experts, and never a loop over them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def shrink_linear(x: Tensor, rows: Tensor) -> Tensor:
    """Inner products of every token with every row.

    Args:
        x: Tokens, shape (..., d_in).
        rows: Shape (n, d_in).

    Returns:
        Shape (T, n), T the number of tokens.
    """
    return functional.linear(x.reshape(-1, x.shape[-1]), rows)


def shrink_embedding(ids: Tensor, rows: Tensor) -> Tensor:
    """The same for a lookup: a token is a one-hot vector, so its products are a column of `rows`.

    Args:
        ids: Token ids, any shape.
        rows: Shape (n, vocabulary).

    Returns:
        Shape (T, n).
    """
    return functional.embedding(ids.reshape(-1), rows.mT)


def shrink_conv(
    x: Tensor, rows: Tensor, *, kernel: tuple[int, ...], how: dict[str, object]
) -> Tensor:
    """The same for a convolution: a token is a patch.

    Args:
        x: Input, shape (B, channels, *space).
        rows: Shape (n, channels * prod(kernel)).
        kernel: Kernel shape.
        how: stride, padding and dilation of the base module.

    Returns:
        Shape (T, n), T = B * prod(output space), the batch slowest.
    """
    convolve: Callable[..., Tensor] = (
        functional.conv1d,
        functional.conv2d,
        functional.conv3d,
    )[len(kernel) - 1]
    out = convolve(x, rows.reshape(rows.shape[0], -1, *kernel), **how)
    return out.movedim(1, -1).reshape(-1, rows.shape[0])


def gate_units(u: Tensor, weights: Tensor, block: int | None, columns: Tensor | None) -> Tensor:
    """Multiply every unit by its weight.

    Args:
        u: Shrunk tokens, shape (T, R).
        weights: Shape (T', C) with T' = T (one row per token), a divisor of T (one row per
            sequence) or 1.
        block: Units per weight if all weights cover equally many, in order; else None.
        columns: Otherwise the column of `weights` that each unit takes, int64, shape (R,); None if
            the weights are per unit already.

    Returns:
        Shape (T, R), in the dtype of `u`.
    """
    if weights.dtype != u.dtype:
        weights = weights.to(u.dtype)
    tokens, rows = u.shape[0], weights.shape[0]
    if columns is not None:
        weights = weights.index_select(1, columns)
    elif block is not None:
        count = weights.shape[1]
        grouped = u.view(rows, tokens // max(rows, 1), count, block)
        return (grouped * weights.view(rows, 1, count, 1)).view(u.shape)
    if rows == tokens or rows == 1:
        return u * weights
    return (u.view(rows, tokens // rows, u.shape[1]) * weights[:, None, :]).view(u.shape)


def expand(y: Tensor, z: Tensor, up: Tensor, *, in_place: bool = False) -> Tensor:
    """Add the gated units' outputs to the base module's output.

    Args:
        y: Output of the base module, shape (..., d_out).
        z: Gated units, shape (T, R); may be a column slice of a wider tensor.
        up: Rows of every B^T with the scaling folded in, shape (R, d_out).
        in_place: Write into `y`; only where nobody else holds it and no gradient is recorded.

    Returns:
        Shape and dtype of `y`. Zero weights give `y` back, bit for bit.
    """
    flat = y.reshape(-1, y.shape[-1])
    if flat.dtype != up.dtype:
        return (flat + torch.mm(z, up).to(flat.dtype)).view(y.shape)
    if in_place and y.is_contiguous():
        flat.addmm_(z, up)
        return y
    return torch.addmm(flat, z, up).view(y.shape)
