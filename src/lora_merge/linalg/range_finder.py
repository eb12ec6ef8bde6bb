"""The leading singular triplets of a matrix M that is only seen by what it does to a few vectors.

Block Krylov iteration on M^T M (Musco and Musco, NIPS 2015, algorithm 2), one sweep over the matrix
per iteration: where singular values lie close together, as those of sparsified deltas do, it needs
a third of the sweeps of subspace iteration. Memory O((m + n) l q) for q sweeps of l columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import fsum

import torch
from torch import Tensor

from lora_merge.linalg.factors import gram, thin_qr, thin_svd

# Yields (first row, rows) of the matrix from top to bottom, the same bands at every call.
Bands = Callable[[], Iterator[tuple[int, Tensor]]]
# (n, l) vectors -> M times them, (m, l), and M^T times that, (n, l).
Sweep = Callable[[Tensor], tuple[Tensor, Tensor]]
# Columns beyond the rank: the last triplets asked for converge as fast as the gap to these.
_OVERSAMPLE = 16
# Matrices smaller than this, or ranks larger than that share of them, are decomposed whole.
_LEAST_SIZE, _LEAST_RATIO = 256, 6
# Share of the energy by which one more sweep would have to improve a cut.
CUT_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class LeadingSVD:
    """A truncated SVD and what it leaves out.

    Attributes:
        u: Shape (m, k), orthonormal columns.
        s: Singular values, float64, descending, shape (k,).
        vh: Shape (k, n), orthonormal rows.
        square: Squared Frobenius norm of the matrix.
        sweeps: How often the matrix was swept.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    square: float
    sweeps: int

    @property
    def residual(self) -> float:
        """Squared Frobenius norm of matrix - u s vh; exact, because u and vh are a projection."""
        return max(self.square - float(self.s.square().sum()), 0.0)


def leading_svd_in_bands(
    bands: Bands,
    num_rows: int,
    start: Tensor,
    rank: int,
    *,
    tolerance: float = 1e-5,
    max_sweeps: int = 8,
) -> LeadingSVD:
    """The leading singular triplets of a matrix given in bands of rows.

    Iterates until one more sweep raises the energy of the leading `rank` triplets by less than
    `tolerance` of the matrix's. The energy never falls from sweep to sweep, because the subspace
    only grows.

    Args:
        bands: The matrix M, shape (m, n).
        num_rows: m.
        start: First guess of the right subspace, shape (n, l), l >= rank; random columns in it make
            sure that no direction is missed.
        rank: k, at most min(m, n).
        tolerance: When to stop.
        max_sweeps: When to stop at the latest.
    """
    squares: list[float] = []

    def sweep(right: Tensor) -> tuple[Tensor, Tensor]:
        return _sweep(bands, num_rows, right, None if squares else squares)

    def enough(gained: float, energy: float) -> bool:
        return gained <= tolerance * fsum(squares)

    found = krylov(sweep, start, rank, enough, max_sweeps)
    # A few more than asked for: the Gram that chose them is blind to the smallest.
    chosen = found.vectors[:, -(rank + _OVERSAMPLE) :].to(start.dtype)
    u, s, vh = thin_svd(found.left @ chosen, (found.basis @ chosen).mT)
    return LeadingSVD(u[:, :rank], s[:rank], vh[:rank], fsum(squares), found.sweeps)


@dataclass(frozen=True, eq=False)
class Krylov:
    """What a block Krylov iteration found.

    Attributes:
        basis: Of the right subspace, orthonormal, shape (n, q).
        left: The matrix times it, shape (m, q).
        vectors: Eigenvectors of left^T left, values ascending, float64, shape (q, q).
        sweeps: How often the matrix was swept.
    """

    basis: Tensor
    left: Tensor
    vectors: Tensor
    sweeps: int


def krylov(
    sweep: Sweep,
    start: Tensor,
    rank: int,
    enough: Callable[[float, float], bool],
    max_sweeps: int,
) -> Krylov:
    """Iterate until a sweep adds little to the energy of the leading `rank` triplets.

    Args:
        sweep: The matrix.
        start: First guess of the right subspace, shape (n, l).
        rank: k.
        enough: (energy that the last sweep added, energy so far) -> whether to stop.
        max_sweeps: When to stop at the latest.
    """
    block = thin_qr(start)[0]
    basis = left = block[:, :0]
    energy, sweeps = 0.0, 0
    while True:
        reached, onward = sweep(block)
        sweeps += 1
        basis = torch.cat([basis, block], dim=1)
        left = torch.cat([left, reached], dim=1) if sweeps > 1 else reached
        values, vectors = torch.linalg.eigh(gram(left.mT))
        before, energy = energy, float(values[-rank:].clamp_min(0).sum())
        room = start.shape[0] - basis.shape[1]
        if enough(energy - before, energy) or room <= 0 or sweeps == max_sweeps:
            return Krylov(basis, left, vectors, sweeps)
        block = onward[:, :room]
        for _ in range(3):  # what is new may be rounding noise, which one pass leaves oblique
            block = _orthogonal_to(basis, block)


def is_worth_it(size: int, rank: int) -> bool:
    """Whether the leading triplets are found sooner than all: a matter of shapes alone.

    Args:
        size: Smaller side of the matrix.
        rank: Triplets that are wanted.
    """
    return size >= _LEAST_SIZE and _LEAST_RATIO * (rank + _OVERSAMPLE) <= size


def cut_svd(matrix: Tensor, rank: int | None, *, exact: bool = False) -> LeadingSVD:
    """The best approximation of a rank: the leading triplets alone where that is worth it.

    They keep the energy of the exact cut less about `CUT_TOLERANCE` of the matrix's.

    Args:
        matrix: Shape (m, n), float64.
        rank: Largest rank; None keeps all.
        exact: Decompose the whole matrix whatever the rank.
    """
    if rank is not None and not exact and is_worth_it(min(matrix.shape), rank):
        return leading_svd(matrix, rank, tolerance=CUT_TOLERANCE)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return LeadingSVD(u[:, :rank], s[:rank], vh[:rank], float(s.square().sum()), 0)


def leading_svd(
    matrix: Tensor, rank: int, *, sweeps: int = 12, seed: int = 0, tolerance: float = 1e-12
) -> LeadingSVD:
    """The leading singular triplets of a dense matrix, to rounding; seeded.

    Args:
        matrix: Shape (m, n), float32 or float64.
        rank: k; at most min(m, n) triplets are returned.
        sweeps: Krylov iterations at most; stops earlier where nothing is gained.
        seed: Of the first guess.
        tolerance: Share of the matrix's energy below which a sweep is the last.
    """
    m, n = matrix.shape
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(n, min(n, rank + _OVERSAMPLE), generator=random, dtype=matrix.dtype)

    def whole() -> Iterator[tuple[int, Tensor]]:
        yield 0, matrix

    return leading_svd_in_bands(
        whole, m, start.to(matrix.device), min(rank, m, n), tolerance=tolerance, max_sweeps=sweeps
    )


def _orthogonal_to(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns that span what `block` adds to `basis`."""
    return thin_qr(block - basis @ (basis.mT @ block))[0]


def _sweep(
    bands: Bands, num_rows: int, right: Tensor, squares: list[float] | None
) -> tuple[Tensor, Tensor]:
    """M right and M^T M right in one pass; adds the squared norm of each row to `squares`."""
    left = right.new_empty(num_rows, right.shape[1])
    onward = torch.zeros_like(right)
    for row, band in bands():
        part = left[row : row + band.shape[0]]
        torch.mm(band, right, out=part)
        onward.addmm_(band.mT, part)
        if squares is not None:
            squares += torch.linalg.vecdot(band, band).tolist()
    return left, onward
