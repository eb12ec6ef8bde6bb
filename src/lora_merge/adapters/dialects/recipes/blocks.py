"""Deltas stored in blocks: block-diagonal factors, grids of sub-blocks, tiles."""

import torch
from torch import Tensor

from lora_merge.adapters.dialects.recipes.units import Units, precise


def block_diagonal(blocks: Tensor, count: int) -> Tensor:
    """Put `count` blocks, stored one below the other, on a diagonal (BD-LoRA).

    Args:
        blocks: Shape (rows, columns); block i is rows i * rows / count and on.
        count: Number of blocks.

    Returns:
        Shape (rows, count * columns), zero off the blocks.
    """
    wide: Tensor = torch.block_diag(*precise(blocks).chunk(count))
    return wide


def grid(a: Tensor, b: Tensor) -> Units:
    """Units of GraLoRA: one low-rank product per cell of a k x k grid (arXiv 2505.20355).

    Cell (j, n), output block j and input block n, is (a[n][:, cell j] @ b[j][cell n, :])^T, where
    cell i of the r units is i * r / k and on.

    Args:
        a: Shape (k, in / k, r).
        b: Shape (k, r, out / k).

    Returns:
        k * r units of shape (out, in); each touches one cell only.
    """
    k, width, r = a.shape
    height, q = b.shape[2], r // k
    full_a = precise(a).new_zeros(k, k, q, k, width)
    full_b = precise(b).new_zeros(k, height, k, k, q)
    cells_a = precise(a).reshape(k, width, k, q)  # input block, column, output block, unit
    cells_b = precise(b).reshape(k, k, q, height)  # output block, input block, unit, row
    for j in range(k):
        for n in range(k):
            full_a[j, n, :, n] = cells_a[n, :, j].mT
            full_b[j, :, j, n] = cells_b[j, n].mT
    return Units(full_a.reshape(k * r, k * width), full_b.reshape(k * height, k * r))


def tiled(block: Tensor, d_out: int, d_in: int) -> Units:
    """Units of MiSS: one block repeated along the input (arXiv 2409.15371).

    Input i meets row i mod r of the block, so A is 0 and 1 and B the block transposed.

    Args:
        block: Shape (r, d_out), or (r, m) with m dividing d_out, then repeated along the output.
        d_out: Rows of the weight.
        d_in: Columns of the weight.
    """
    r, width = block.shape
    a = torch.arange(d_in).remainder(r) == torch.arange(r)[:, None]
    b = precise(block).repeat(1, d_out // width).mT
    return Units(a.to(b.dtype), b)


def pooled(a: Tensor, group: int) -> Tensor:
    """A of QA-LoRA as it acts on the input (arXiv 2309.14717).

    PEFT takes the mean of each group of inputs and multiplies it by the number of groups.

    Args:
        a: Shape (r, groups).
        group: Inputs pooled into one.

    Returns:
        Shape (r, groups * group).
    """
    return (precise(a) * (a.shape[1] / group)).repeat_interleave(group, dim=1)
