"""The leading part of a dense matrix's SVD, with a residual that says how good it is."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LeadingSVD:
    """Leading singular triples of a matrix.

    Attributes:
        u: Shape (m, k), orthonormal columns.
        values: Descending, float64, shape (k,).
        vh: Shape (k, n), orthonormal rows.
        residual: Frobenius norm of what the k triples leave, from ||M||^2 - sum s^2: exact.
    """

    u: Tensor
    values: Tensor
    vh: Tensor
    residual: float


def leading_svd(
    matrix: Tensor, rank: int, *, oversample: int = 16, iterations: int = 4, seed: int = 0
) -> LeadingSVD:
    """Randomised subspace iteration (Halko, Martinsson & Tropp 2011), seeded.

    A basis is made orthonormal between multiplications; errors concentrate at the last values, so
    as many again are computed and thrown away. Where the basis would span the smaller side, the
    exact SVD is taken.

    Args:
        matrix: Shape (m, n), float32 or float64.
        rank: k; at most min(m, n) triples are returned.
        oversample: Extra directions at least; 2 k + 10 in all if that is more.
        iterations: Multiplications by the matrix and its transpose.
        seed: Of the starting basis.
    """
    m, n = matrix.shape
    width = max(rank + oversample, 2 * rank + 10)
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    if width >= min(m, n):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        random = torch.Generator().manual_seed(seed)
        start = torch.randn(n, width, generator=random, dtype=matrix.dtype)
        basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
        for _ in range(iterations):
            basis = torch.linalg.qr(matrix.mT @ basis).Q
            basis = torch.linalg.qr(matrix @ basis).Q
        small, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
        u = basis @ small
    values = s[:rank].to(torch.float64)
    left = max(total - float(values.square().sum()), 0.0)
    return LeadingSVD(u[:, :rank], values, vh[:rank], left**0.5)
