"""All pairs of adapters on one module, from the Grams of their stacked factors.

With U_i, V_i the singular vectors of adapter i, everything comes from the cross products
U_i^T U_j and V_i^T V_j, which are r x r blocks of the whitened Grams: no basis of length d and no
dense delta is formed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.linalg.factors import gram

# Up to so many units, everything is float64; beyond, products are float32 (those of Grams in chunks
# that are summed in float64), and directions below 1e-3 of an adapter's largest are left out of
# subspaces.
_EXACT_UNITS = 256
_SHORTEST_SQUARE = 1e-24
# How often eighth powers are taken to bring out a matrix's largest eigenvalue: what one competitor
# can hide of it is less than 1 / (e 8^4) = 1e-4.
_POWERS = 4


@dataclass(frozen=True, eq=False)
class PairTables:
    """Tables over all pairs of N adapters, float64, shape (N, N); zero where one is absent.

    Attributes:
        products: <D_i, D_j>, deltas with scaling.
        overlap_out: ||U_i^T U_j||_F^2 / min(k_i, k_j), mean squared cosine of principal angles.
        overlap_in: The same of the input directions V.
        chance_out: What random subspaces of these sizes would show: max(k_i, k_j) / d_out.
        chance_in: The same for d_in.
        dimensions: min(k_i, k_j), how many principal angles there are.
        cosine_out: Largest principal cosine of the output spaces; of more than 256 units to 1e-4,
            unless all are kept.
        cosine_in: Largest principal cosine of the input spaces.
        interference: Singular task interference of the pair, ||(U^T U - I) S (V^T V - I)||_1.
        chance_interference: What random subspaces with these spectra would show.
        nuclear: Sum of both nuclear norms, what normalises the interference.
        conflicts: Sampled entries whose signs differ.
        samples: Sampled entries that are non-zero in both.
        conflict_mass: Sum of min(|D_i|, |D_j|) over conflicts.
        mass: Sum of min(|D_i|, |D_j|) over all samples.
        factor_a: <A_i, A_j>, raw factors of equal rank (0 otherwise).
        factor_b: <B_i, B_j>.
        unit_match: Mean over units of i of the best |cos(a, a') cos(b, b')| among units of j.
        present: 1 where both adapters have the module.
        total_interference: The interference of all adapters together.
        total_nuclear: Sum of all nuclear norms.
        angles_out: All principal cosines of the output spaces, descending, shape (N, N, K), zero
            beyond `dimensions`; None where not asked for.
        angles_in: The same of the input spaces.
    """

    products: Tensor
    overlap_out: Tensor
    overlap_in: Tensor
    chance_out: Tensor
    chance_in: Tensor
    dimensions: Tensor
    cosine_out: Tensor
    cosine_in: Tensor
    interference: Tensor
    chance_interference: Tensor
    nuclear: Tensor
    conflicts: Tensor
    samples: Tensor
    conflict_mass: Tensor
    mass: Tensor
    factor_a: Tensor
    factor_b: Tensor
    unit_match: Tensor
    present: Tensor
    total_interference: float
    total_nuclear: float
    angles_out: Tensor | None = None
    angles_in: Tensor | None = None


def pair_tables(
    stack: RankStack, count: int, *, samples: int, seed: int, angles: bool = False
) -> PairTables:
    """Compare all adapters of a stack.

    Args:
        stack: The module's units; owners index the adapters.
        count: N; adapters that own no unit are absent.
        samples: Entries of the deltas to sample for signs.
        seed: Of the sampling.
        angles: Keep all principal cosines, not only the largest.

    Raises:
        FloatingPointError: If the factors hold NaN or infinity.
    """
    ranks = torch.bincount(stack.owner, minlength=count)
    owners = ranks.nonzero().squeeze(1)
    ranks = ranks[owners]
    mask = torch.arange(int(ranks.max())) < ranks[:, None]  # which slots of the padded layout exist
    exact = stack.num_units <= _EXACT_UNITS
    gram_of = gram if exact else _fast_gram
    gram_up, gram_down = _blocks(gram_of(stack.up.mT), mask), _blocks(gram_of(stack.down), mask)
    # A diagonal is a sum of squares: finite only if every entry is.
    squares = torch.einsum("iaia->", gram_up) + torch.einsum("iaia->", gram_down)
    if not bool(torch.isfinite(squares)):
        raise FloatingPointError("the factors are not finite")
    scale = stack.scale[ranks.cumsum(0) - 1]
    units = gram_up * gram_down
    values, to_up, to_down = _cores(gram_up, gram_down, scale)
    keep = values > (1e-7 if exact else 1e-3) * values[:, :1]
    precise = torch.float64 if exact or _rounds_float32() else torch.float32
    cross_up = _cross(to_up * keep[:, None, :], gram_up, precise)
    cross_down = _cross(to_down * keep[:, None, :], gram_down, precise)
    kept = keep.sum(1)
    smaller = torch.minimum(kept[:, None], kept)
    larger = torch.maximum(kept[:, None], kept)
    values = values * keep
    signs = _signs(stack, ranks, samples, seed)
    # A mean of squared cosines, over at least one.
    fewest = smaller.clamp_min(1)
    cosines_of = _principal_cosines if exact or angles else _largest_cosines
    cosines_up, cosines_down = cosines_of(cross_up), cosines_of(cross_down)
    interference, everyone = _interference(cross_up, cross_down, values.to(precise))

    def spread(table: Tensor) -> Tensor:
        full = torch.zeros(count, count, *table.shape[2:], dtype=torch.float64)
        full[owners[:, None], owners] = table.to(torch.float64)
        return full

    nuclear = values.sum(1)
    return PairTables(
        products=spread(units.sum((1, 3)) * scale[:, None] * scale),
        overlap_out=spread((cross_up.square().sum((2, 3)) / fewest).clamp(0, 1)),
        overlap_in=spread((cross_down.square().sum((2, 3)) / fewest).clamp(0, 1)),
        chance_out=spread((larger / stack.d_out).clamp(max=1)),
        chance_in=spread((larger / stack.d_in).clamp(max=1)),
        dimensions=spread(smaller),
        cosine_out=spread(cosines_up[..., 0]),
        cosine_in=spread(cosines_down[..., 0]),
        interference=spread(interference),
        chance_interference=spread(_chance_interference(kept, values, stack.d_out * stack.d_in)),
        nuclear=spread(nuclear[:, None] + nuclear),
        conflicts=spread(signs[0]),
        samples=spread(signs[1]),
        conflict_mass=spread(signs[2]),
        mass=spread(signs[3]),
        factor_a=spread(_factor_products(gram_down, ranks)),
        factor_b=spread(_factor_products(gram_up, ranks)),
        unit_match=spread(_unit_match(units, ranks)),
        present=spread(torch.ones(len(owners), len(owners))),
        total_interference=everyone,
        total_nuclear=float(nuclear.sum()),
        angles_out=spread(cosines_up) if angles else None,
        angles_in=spread(cosines_down) if angles else None,
    )


def _rounds_float32() -> bool:
    """Whether products of float32 are rounded to bfloat16: wherever AMX may, exact for Grams."""
    allowed = torch.get_float32_matmul_precision() == "medium"
    return allowed and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _fast_gram(x: Tensor) -> Tensor:
    """Gram of many rows from float32 products.

    Rows so short that float32 would lose their squares are a reason to take float64 throughout.
    """
    products = gram(x, precise=torch.float32)
    short = products.diagonal() < _SHORTEST_SQUARE
    return gram(x) if bool(x[short].any()) else products


def _blocks(matrix: Tensor, mask: Tensor) -> Tensor:
    """An R x R matrix as (N, r, N, r), zero where an adapter has fewer units than r."""
    if not bool(mask.all()):
        slots = mask.flatten().nonzero().squeeze(1)
        padded = matrix.new_zeros(mask.numel(), mask.numel())
        padded[slots[:, None], slots] = matrix
        matrix = padded
    return matrix.reshape(*mask.shape, *mask.shape)


def _cores(gram_up: Tensor, gram_down: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values (N, r) and the matrices that make U_i of B_i and V_i of A_i^T, (N, r, r)."""
    index = torch.arange(len(scale))
    root_up = _square_root(gram_up[index, :, index, :])
    root_down = _square_root(gram_down[index, :, index, :])
    u, values, vh = torch.linalg.svd(root_up.mT @ root_down)
    inverse = torch.where(values > 1e-14 * values[:, :1], 1 / values.clamp_min(1e-300), 0.0)
    to_up = root_down @ vh.mT * (inverse * torch.sign(scale)[:, None])[:, None, :]
    to_down = root_up @ u * inverse[:, None, :]
    return values * scale.abs()[:, None], to_up, to_down


def _square_root(matrix: Tensor) -> Tensor:
    """Some L with L L^T = matrix, for singular matrices too, batched."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        factor: Tensor = lower
        return factor
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp_min(0).sqrt()[:, None, :]
    return root


def _cross(to_basis: Tensor, blocks: Tensor, precise: torch.dtype) -> Tensor:
    """U_i^T U_j of all pairs, shape (N, N, r, r), from factors' Grams and what makes U of them."""
    count, width = to_basis.shape[:2]
    # Factors of length one: neither half then leaves the range of float32.
    size = torch.einsum("iaia->ia", blocks).amax(1).clamp_min(1e-300).sqrt()
    to_basis = (to_basis * size[:, None, None]).to(precise)
    blocks = (blocks / (size[:, None] * size)[:, None, :, None]).to(precise)
    left = to_basis.mT @ blocks.reshape(count, width, count * width)
    return left.reshape(count, width, count, width).transpose(1, 2) @ to_basis


def _principal_cosines(cross: Tensor) -> Tensor:
    """Cosines of the principal angles of all pairs, descending, shape (N, N, r)."""
    count, _, width, _ = cross.shape
    i, j = torch.triu_indices(count, count)
    cosines = cross.new_zeros(count, count, width)
    cosines[i, j] = cosines[j, i] = torch.linalg.svdvals(cross[i, j]).clamp(0, 1)
    return cosines


def _largest_cosines(cross: Tensor) -> Tensor:
    """The first of the principal cosines, shape (N, N, 1), in a third of the time of all of them.

    Powers of a positive matrix turn into the projection on its leading eigenvectors.
    """
    count = len(cross)
    i, j = torch.triu_indices(count, count)
    half = cross[i, j]
    squares = half.mT @ half
    power = squares
    for _ in range(_POWERS):
        power = torch.linalg.matrix_power(power / _traces(power), 8)
    found = (squares * (power / _traces(power))).sum((1, 2))
    largest = cross.new_zeros(count, count, 1)
    largest[i, j, 0] = largest[j, i, 0] = found.clamp(0, 1).sqrt()
    return largest


def _traces(matrices: Tensor) -> Tensor:
    """Shape (P, 1, 1), above zero."""
    return matrices.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)[:, None, None]


def _interference(cross_up: Tensor, cross_down: Tensor, values: Tensor) -> tuple[Tensor, float]:
    """Singular task interference of every pair, (N, N) with zeros on its diagonal, and of all.

    Block [i, i] of a pair's matrix is (U_i^T U_j) S_j (V_j^T V_i); U_i^T U_i - I is zero exactly.
    """
    size = values.numel()
    others = 1 - torch.eye(len(values), dtype=values.dtype)[:, :, None, None]
    up, down = cross_up * (others * values[:, None, :]), cross_down * others
    one = (up @ down.mT).abs().sum((2, 3), dtype=torch.float64)
    rows, columns = (x.transpose(1, 2).reshape(size, size) for x in (up, down))
    return one + one.mT, float((rows @ columns).abs().sum(dtype=torch.float64))


def _chance_interference(kept: Tensor, values: Tensor, entries: int) -> Tensor:
    """Mean of `_interference` for random subspaces: k_i^2 sums of |S_j| Gaussian entries."""
    norms = torch.linalg.vector_norm(values, dim=1)
    one: Tensor = math.sqrt(2 / math.pi / entries) * kept[:, None].square() * norms
    return one + one.mT - torch.diag(2 * one.diagonal())


def _signs(
    stack: RankStack, ranks: Tensor, samples: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(conflicts, samples, conflict mass, mass) of every pair, at entries drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(stack.d_out, (samples,), generator=generator)
    columns = torch.randint(stack.d_in, (samples,), generator=generator)
    units = stack.up[rows].double() * stack.down.mT[columns].double() * stack.scale
    entries = units.new_zeros(len(ranks), samples)
    entries.index_add_(0, torch.arange(len(ranks)).repeat_interleave(ranks), units.mT)
    sign, size = entries.sign(), entries.abs()
    both = sign.abs() @ sign.abs().mT
    conflicts = (both - sign @ sign.mT) / 2
    # |x| + |y| - ||x| - |y|| is twice the smaller of |x| and |y|; |x - y| is more than ||x| - |y||
    # where the signs differ, by the same. Rounding may leave less than nothing.
    norms, apart = size.sum(1), torch.cdist(size, size, p=1)
    mass = (norms[:, None] + norms - apart).clamp_min(0) / 2
    conflict_mass = (torch.cdist(entries, entries, p=1) - apart).clamp_min(0) / 2
    return conflicts, both, torch.minimum(conflict_mass, mass), mass


def _factor_products(blocks: Tensor, ranks: Tensor) -> Tensor:
    """sum_a <row a of i, row a of j>: raw factors, meaningful for equal ranks only."""
    products = torch.einsum("iaja->ij", blocks)
    return torch.where(ranks[:, None] == ranks, products, 0.0)


def _unit_match(units: Tensor, ranks: Tensor) -> Tensor:
    """How well each unit of i is found among those of j (for i = j: among the others).

    Args:
        units: Inner products of all units, float64, shape (N, r, N, r), zero where there is none.
        ranks: Units of each adapter, int64, shape (N,).
    """
    length = torch.einsum("iaia->ia", units).clamp_min(1e-300).sqrt()
    match = units.abs() / length
    match.view(length.numel(), -1).fill_diagonal_(0)
    best = (match.amax(3) / length[:, :, None]).clamp(0, 1)
    return best.sum(1) / ranks[:, None]
