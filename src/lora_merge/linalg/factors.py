"""QR, SVD and Grams of tall factors; a product `up @ down` is never formed.

Half-precision inputs are raised to float32, which is exact. Grams are accumulated in float64:
they square the condition number, and float32 would lose singular values below 3e-4 of the largest.
"""

import torch
from torch import Tensor

# Bytes of each row in a chunk of a Gram. The chunk of a 64-row stack then stays in the CPU's cache:
# measured 2.4 ms for 64 x 14336 in float64, against 3.9 ms with four times as much.
_CHUNK_BYTES = 8192
# Rows of a block of a symmetric Gram, whose lower triangle is not computed: of 512 rows x 14336
# 31 ms in float32 instead of 44, and 109 ms in float64 instead of 165.
_BLOCK = 128
# Condition numbers up to which a Gram's Cholesky factor does what Householder QR would: for two
# passes of CholeskyQR, orthonormal columns to 1e-6 in float32;
CONDITION_FOR_BASIS = 1e4
# for singular values, 1e-13 of the largest, in a quarter of the time.
CONDITION_FOR_VALUES = 1e3


def gram(x: Tensor, y: Tensor | None = None, *, precise: torch.dtype = torch.float64) -> Tensor:
    """Inner products of the rows of `x` with those of `y`, accumulated in float64.

    Args:
        x: Rows, shape (..., R, d), any float dtype.
        y: Rows, shape (..., S, d); default: `x` itself.
        precise: Of the products within a chunk of columns; chunks are summed in float64.

    Returns:
        Shape (..., R, S), float64.
    """
    count = (x if y is None else y).shape[-2]
    total = torch.zeros(*x.shape[:-1], count, dtype=torch.float64, device=x.device)
    width = _CHUNK_BYTES // precise.itemsize
    for start in range(0, x.shape[-1], width):
        part = x[..., start : start + width].to(precise)
        if y is not None:
            total += part @ y[..., start : start + width].to(precise).mT
            continue
        for row in range(0, count, _BLOCK):
            below = row + _BLOCK
            total[..., row:below, row:] += part[..., row:below, :] @ part[..., row:, :].mT
    if y is None:
        for below in range(_BLOCK, count, _BLOCK):
            row = below - _BLOCK
            total[..., below:, row:below] = total[..., row:below, below:].mT
    return total


def cholesky(gram: Tensor) -> tuple[Tensor, float]:
    """Cholesky factor of a Gram, and how far it can be trusted.

    Args:
        gram: Of the rows of some x, shape (..., R, R), float64.

    Returns:
        L, lower triangular, gram = L L^T; and about the condition number of x, the largest of a
        batch: inf where the Gram is not positive definite.
    """
    lower, info = torch.linalg.cholesky_ex(gram)
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    condition = diagonal.amax(dim=-1) / diagonal.amin(dim=-1)
    condition = torch.where(info == 0, condition, torch.inf)
    return lower, float(condition.max()) if condition.numel() else 1.0


def frobenius(x: Tensor) -> float:
    """Frobenius norm of a tensor of any shape and float dtype, accumulated in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def thin_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Thin QR, `x = q @ r`: CholeskyQR2 where it is accurate, Householder elsewhere.

    CholeskyQR costs two Grams and two GEMMs, a third of Householder's time on a CPU, but needs a
    well-conditioned `x` (Yamamoto et al. 2015). The choice is made from the data, so equal inputs
    always take the same path.

    Args:
        x: Shape (..., m, n), any float dtype; m may be smaller than n.

    Returns:
        q of shape (..., m, min(m, n)) with orthonormal columns and r of shape (..., min(m, n), n),
        both float32 (float64 for a float64 `x`).
    """
    x = _at_least_float32(x)
    if x.shape[-2] >= x.shape[-1] > 0:
        first = _cholesky_qr(x)
        if first is not None:
            second = _cholesky_qr(first[0])
            if second is not None:
                r = second[1] @ first[1]
                return second[0], r.to(x.dtype)
    q, r = torch.linalg.qr(x)
    return q, r


def orthonormal_basis(x: Tensor, *, rtol: float | None = None) -> Tensor:
    """Orthonormal basis of the column space of `x`, columns ordered by singular value.

    Args:
        x: Shape (m, n), any float dtype.
        rtol: Directions whose singular value is below `rtol` times the largest are left out.
            Default: max(m, n) times the machine epsilon of the compute dtype.

    Returns:
        Shape (m, rank) in the compute dtype; rank 0 for a zero `x`.
    """
    q, r = thin_qr(x)
    u, s, _ = torch.linalg.svd(r.to(torch.float64), full_matrices=False)
    if rtol is None:
        rtol = max(x.shape) * torch.finfo(q.dtype).eps
    rank = int((s > rtol * s[:1]).sum()) if s.numel() else 0
    basis: Tensor = q @ u[:, :rank].to(q.dtype)
    return basis


def thin_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact thin SVD of `up @ down` from its factors, in O((m + n) R^2).

    The sign of each pair is fixed by making the entry of `u` that is largest in magnitude positive,
    so files are reproducible.

    Args:
        up: Shape (..., m, R).
        down: Shape (..., R, n).

    Returns:
        u (..., m, k), singular values s (..., k) in float64 and descending, vh (..., k, n), with
        k = min(m, n, R); u and vh in the compute dtype.
    """
    q_up, r_up = thin_qr(up)
    q_down, r_down = thin_qr(down.mT)
    core = r_up.to(torch.float64) @ r_down.to(torch.float64).mT
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    u = q_up @ u.to(q_up.dtype)
    vh = vh.to(q_down.dtype) @ q_down.mT
    sign = pivot_sign(u)
    return u * sign, s, vh * sign.mT


def singular_values(up: Tensor, down: Tensor) -> Tensor:
    """Singular values of `up @ down`, descending, float64, shape (..., min(m, n, R)).

    Both QRs run in float64 Householder form: the smallest value is right to about 1e-13 of the
    largest, which Grams (1e-8) and float32 (1e-6) are not.

    Args:
        up: Shape (..., m, R).
        down: Shape (..., R, n).
    """
    r_up = torch.linalg.qr(up.to(torch.float64), mode="r").R
    r_down = torch.linalg.qr(down.mT.to(torch.float64), mode="r").R
    values: Tensor = torch.linalg.svdvals(r_up @ r_down.mT)
    return values


def pivot_sign(u: Tensor) -> Tensor:
    """+1 or -1 per column, shape (..., 1, k): the sign of its entry of largest magnitude.

    Signs of singular pairs are arbitrary; multiplied by these, they are the same in every run.
    """
    if u.shape[-2] == 0:
        return u.new_ones((*u.shape[:-2], 1, u.shape[-1]))
    pivot = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True))
    return torch.where(pivot < 0, -1.0, 1.0).to(u.dtype)


def _cholesky_qr(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """One CholeskyQR pass, or None where `x` is too ill-conditioned for it."""
    lower, condition = cholesky(gram(x.mT))
    if not condition <= CONDITION_FOR_BASIS:  # NaN, too
        return None
    identity = torch.eye(x.shape[-1], dtype=lower.dtype, device=x.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return x @ inverse.mT.to(x.dtype), lower.mT


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
