"""Deltas that are products of smaller matrices: Hadamard, Kronecker and Tucker."""

import torch
from torch import Tensor

from lora_merge.adapters.dialects.recipes.units import Units, precise


def khatri_rao(first: Units, second: Units) -> Units:
    """Units of the entrywise product of two low-rank matrices (LoHa, arXiv 2108.06098).

    (b1 a1) * (b2 a2) has the k1 * k2 units whose halves are entrywise products of a row of a1 with
    one of a2, and of a column of b1 with one of b2.

    Args:
        first: k1 units of shape (m, n).
        second: k2 units of the same shape.
    """
    a = first.a[:, None, :] * second.a[None, :, :]
    b = first.b[:, :, None] * second.b[:, None, :]
    return Units(a.flatten(0, 1), b.flatten(1))


def kronecker(first: Units, second: Units) -> Units:
    """Units of kron(b1 a1, b2 a2) = kron(b1, b2) kron(a1, a2) (LoKr, arXiv 2309.14859).

    A factor that is stored whole comes as `split(matrix)`, so each side has the fewest units its
    shape allows; k1 * k2 units together.

    Args:
        first: k1 units of the outer factor, shape (p, q).
        second: k2 units of the inner factor, shape (m, n).

    Returns:
        Units of shape (p * m, q * n).
    """
    return Units(_kron(first.a, second.a), _kron(first.b, second.b))


def _kron(x: Tensor, y: Tensor) -> Tensor:
    """torch.kron, which fails on some transposed tensors with an axis of one entry."""
    product = x[:, None, :, None] * y[None, :, None, :]
    return product.reshape(x.shape[0] * y.shape[0], x.shape[1] * y.shape[1])


def kronecker_truncated(first: Units, second: Units, rank: int) -> Units:
    """The best approximation of `kronecker(first, second)` of a rank.

    The singular values of a Kronecker product are all products of its factors' singular values,
    so the two small SVDs suffice and the product is never formed.
    """
    u1, s1, v1 = torch.linalg.svd(first.delta().double(), full_matrices=False)
    u2, s2, v2 = torch.linalg.svd(second.delta().double(), full_matrices=False)
    values, order = torch.outer(s1, s2).flatten().sort(descending=True, stable=True)
    values, order = values[:rank], order[:rank]
    i, j = order // len(s2), order % len(s2)
    root = values.sqrt()
    b = (u1[:, None, i] * u2[None, :, j]).flatten(0, 1) * root
    a = (v1[i, :, None] * v2[j, None, :]).flatten(1) * root[:, None]
    dtype = torch.promote_types(first.a.dtype, second.a.dtype)
    return Units(a.to(dtype), b.to(dtype))


def kronecker_values(first: Units, second: Units) -> Tensor:
    """All singular values of `kronecker(first, second)`, descending, float64."""
    values = torch.outer(
        torch.linalg.svdvals(first.delta().double()), torch.linalg.svdvals(second.delta().double())
    )
    return values.flatten().sort(descending=True).values


def tucker(core: Tensor, out_factor: Tensor, in_factor: Tensor) -> Units:
    """Units of a convolution in Tucker form (LoCon's `lora_mid`, the `t` of LoHa and LoKr).

    delta[o, i, ...] = sum over m, n of out_factor[o, m] core[m, n, ...] in_factor[n, i].

    Args:
        core: Shape (m, n, *kernel).
        out_factor: Shape (d_out, m).
        in_factor: Shape (n, in).

    Returns:
        m units of shape (d_out, in * prod(kernel)).
    """
    core, in_factor = precise(core), precise(in_factor)
    a = torch.einsum("mn...,ni->mi...", core, in_factor)
    return Units(a.flatten(1), precise(out_factor))
