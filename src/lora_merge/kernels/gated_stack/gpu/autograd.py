"""Gradients of the gated stack from x, the units before the gate, and the gate.

With v = dy up^T and z = g u = g (down x):

    dup = z^T dy     dg = sum of u v over the weight's units (and its tokens)     du = g v
    dx = du down     ddown = du^T x

Kept beside the inputs are u and g, T (R + C) entries; z only where `up` is trained.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_merge.kernels.gated_stack.layout import join_columns


def keep_shrink(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keep what `shrink_backward` needs."""
    x, down, weights, columns, members, _ = inputs
    needs_down, needs_weights = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
    ctx.members = members
    ctx.save_for_backward(
        x if needs_down else None, down, weights, columns, output[2] if needs_weights else None
    )


def shrink_backward(ctx: Any, dz: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Gradients of x, `down` and the weights from that of the gated units, shape (T, M R)."""
    x, down, weights, columns, u = ctx.saved_tensors
    needs_x, needs_down, needs_weights, *_rest = ctx.needs_input_grad
    tokens, units = dz.shape
    rows, count = weights.shape
    share = tokens // rows if rows else 0
    wide = torch.promote_types(dz.dtype, torch.float32)
    joined = join_columns(columns, count // ctx.members, ctx.members)
    dx = ddown = dweights = None
    if needs_x or needs_down:
        g = weights.to(wide).index_select(1, joined)
        du = (dz.to(wide).reshape(rows, share, units) * g[:, None]).reshape(tokens, units)
        du = du.to(dz.dtype)
        dx = du @ down if needs_x else None
        ddown = du.mT @ x if needs_down else None
    if needs_weights:
        each = (dz.to(wide) * u.to(wide)).reshape(rows, share, units).sum(dim=1)
        # A product, where index_add would add in an order that a GPU does not promise.
        dweights = (each @ functional.one_hot(joined, count).to(wide)).to(weights.dtype)
    return dx, ddown, dweights, None, None, None


def keep_expand(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what `expand_backward` needs."""
    _, z, up, _ = inputs
    ctx.dtype = z.dtype
    needs_z, needs_up = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
    ctx.save_for_backward(z if needs_up else None, up if needs_z else None)


def expand_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of y, z and `up` from that of the output, shape (T, d_out)."""
    z, up = ctx.saved_tensors
    needs_y, needs_z, needs_up, _ = ctx.needs_input_grad
    inner = dy.to(ctx.dtype)
    dz = inner @ up.mT if needs_z else None
    dup = z.mT @ inner if needs_up else None
    return dy if needs_y else None, dz, dup, None
