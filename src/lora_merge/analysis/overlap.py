"""All pairs of adapters on one module, from the Grams of their stacked factors.

With U_i, V_i the singular vectors of adapter i, everything comes from the cross products
U_i^T U_j and V_i^T V_j, which are r x r blocks of the whitened Grams: no basis of length d and no
dense delta is formed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_merge.adapters import RankStack
from lora_merge.linalg import gram

# Up to so many units, everything is float64; beyond, products are float32 (those of Grams in chunks
# that are summed in float64), and directions below 1e-3 of an adapter's largest are left out of
# subspaces.
_EXACT_UNITS = 256
_CHUNK = 4096
_SHORTEST_SQUARE = 1e-24
# Squarings that bring out a matrix's largest eigenvalue: what one competitor can hide of it is less
# than 1 / (e 2^k) = 1e-4.
_SQUARINGS = 12
_BLOCK = 256


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
    owners = list(stack.adapters)
    positions, mask = _layout(stack, owners)
    exact = stack.num_units <= _EXACT_UNITS
    gram_up = _blocks(gram(stack.up.mT) if exact else _fast_gram(stack.up.mT), positions, mask)
    gram_down = _blocks(gram(stack.down) if exact else _fast_gram(stack.down), positions, mask)
    # A diagonal is a sum of squares: finite only if every entry is.
    squares = torch.einsum("iaia->", gram_up) + torch.einsum("iaia->", gram_down)
    if not bool(torch.isfinite(squares)):
        raise FloatingPointError("the factors are not finite")
    scale = torch.stack([stack.scale[p[0]] for p in positions])
    products = (gram_up * gram_down).sum((1, 3)) * scale[:, None] * scale
    values, to_up, to_down = _cores(gram_up, gram_down, scale)
    keep = values > (1e-7 if exact else 1e-3) * values[:, :1]
    precise = torch.float64 if exact else torch.float32
    cross_up = _cross(to_up * keep[:, None, :], gram_up, precise)
    cross_down = _cross(to_down * keep[:, None, :], gram_down, precise)
    kept = keep.sum(1)
    smaller = torch.minimum(kept[:, None], kept)
    larger = torch.maximum(kept[:, None], kept)
    values = values * keep
    signs = _signs(stack, positions, mask, samples, seed)
    # A mean of squared cosines, over at least one.
    fewest = smaller.clamp_min(1)
    cosines_of = _principal_cosines if exact or angles else _largest_cosines
    cosines_up, cosines_down = cosines_of(cross_up), cosines_of(cross_down)

    def spread(table: Tensor) -> Tensor:
        full = torch.zeros(count, count, *table.shape[2:], dtype=torch.float64)
        index = torch.tensor(owners)
        full[index[:, None], index] = table.to(torch.float64)
        return full

    nuclear = values.sum(1)
    return PairTables(
        products=spread(products),
        overlap_out=spread((cross_up.square().sum((2, 3)) / fewest).clamp(0, 1)),
        overlap_in=spread((cross_down.square().sum((2, 3)) / fewest).clamp(0, 1)),
        chance_out=spread((larger / stack.d_out).clamp(max=1)),
        chance_in=spread((larger / stack.d_in).clamp(max=1)),
        dimensions=spread(smaller),
        cosine_out=spread(cosines_up[..., 0]),
        cosine_in=spread(cosines_down[..., 0]),
        interference=spread(_interference(cross_up, cross_down, values.to(precise))),
        chance_interference=spread(_chance_interference(kept, values, stack.d_out * stack.d_in)),
        nuclear=spread(nuclear[:, None] + nuclear),
        conflicts=spread(signs[0]),
        samples=spread(signs[1]),
        conflict_mass=spread(signs[2]),
        mass=spread(signs[3]),
        factor_a=spread(_factor_products(gram_down, mask)),
        factor_b=spread(_factor_products(gram_up, mask)),
        unit_match=spread(_unit_match(gram_up, gram_down, mask)),
        present=spread(torch.ones(len(owners), len(owners))),
        total_interference=_total_interference(cross_up, cross_down, values.to(precise)),
        total_nuclear=float(nuclear.sum()),
        angles_out=spread(cosines_up) if angles else None,
        angles_in=spread(cosines_down) if angles else None,
    )


def _layout(stack: RankStack, owners: list[int]) -> tuple[list[Tensor], Tensor]:
    """Unit indices of each adapter, and which slots of the padded layout are real."""
    positions = [(stack.owner == owner).nonzero().squeeze(1) for owner in owners]
    widest = max(len(p) for p in positions)
    mask = torch.zeros(len(owners), widest, dtype=torch.bool)
    for row, index in zip(mask, positions, strict=True):
        row[: len(index)] = True
    return positions, mask


def _blocks(matrix: Tensor, positions: list[Tensor], mask: Tensor) -> Tensor:
    """An R x R matrix as (N, r, N, r), zero where an adapter has fewer units than r."""
    count, width = mask.shape
    if bool(mask.all()):
        return matrix.reshape(count, width, count, width)
    slots = mask.reshape(-1).nonzero().squeeze(1)
    padded = matrix.new_zeros(count * width, count * width)
    index = torch.cat(positions)
    padded[slots[:, None], slots] = matrix[index[:, None], index]
    return padded.reshape(count, width, count, width)


def _fast_gram(x: Tensor) -> Tensor:
    """Gram of many rows: float32 products of the upper triangle, summed in float64.

    Rows so short that float32 would lose their squares are a reason to take float64 throughout.
    """
    rows, width = x.shape
    total = torch.zeros(rows, rows, dtype=torch.float64)
    for start in range(0, width, _CHUNK):
        part = x[:, start : start + _CHUNK].to(torch.float32)
        for row in range(0, rows, _BLOCK):
            total[row : row + _BLOCK, row:] += part[row : row + _BLOCK] @ part[row:].mT
    for row in range(0, rows, _BLOCK):
        below = row + _BLOCK
        total[below:, row:below] = total[row:below, below:].mT
    short = total.diagonal() < _SHORTEST_SQUARE
    return gram(x) if bool(x[short].any()) else total


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
    squares = cross[i, j].mT @ cross[i, j]
    power = squares
    for _ in range(_SQUARINGS):
        trace = power.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)
        power = power / trace[:, None, None]
        power = power @ power
    trace = power.diagonal(dim1=1, dim2=2).sum(1)
    largest = cross.new_zeros(count, count, 1)
    found = (squares * power).sum((1, 2)) / trace.clamp_min(1e-30)
    largest[i, j, 0] = largest[j, i, 0] = found.clamp(0, 1).sqrt()
    return largest


def _interference(cross_up: Tensor, cross_down: Tensor, values: Tensor) -> Tensor:
    """Pairwise: block [i, i] of the pair's matrix is (U_i^T U_j) S_j (V_j^T V_i)."""
    there = (cross_up * values[None, :, None, :]) @ cross_down.mT
    sums = there.abs().sum((2, 3), dtype=torch.float64)
    sums = sums + sums.mT
    return sums - torch.diag(sums.diagonal())


def _chance_interference(kept: Tensor, values: Tensor, entries: int) -> Tensor:
    """Mean of `_interference` for random subspaces: k_i^2 sums of |S_j| Gaussian entries."""
    norms = torch.linalg.vector_norm(values, dim=1)
    one: Tensor = math.sqrt(2 / math.pi / entries) * kept[:, None].square() * norms
    return one + one.mT - torch.diag(2 * one.diagonal())


def _total_interference(cross_up: Tensor, cross_down: Tensor, values: Tensor) -> float:
    count, width = values.shape
    size = count * width
    # Blocks of one adapter with itself are the identity exactly.
    others = 1 - torch.eye(count, dtype=values.dtype)[:, None, :, None]
    scaled = cross_up * values[None, :, None, :]
    up = (scaled.permute(0, 2, 1, 3) * others).reshape(size, size)
    down = (cross_down.permute(0, 2, 1, 3) * others).reshape(size, size)
    return float((up @ down).abs().sum(dtype=torch.float64))


def _signs(
    stack: RankStack, positions: list[Tensor], mask: Tensor, samples: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(conflicts, samples, conflict mass, mass) of every pair, at entries drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(stack.d_out, (samples,), generator=generator)
    columns = torch.randint(stack.d_in, (samples,), generator=generator)
    precise = torch.promote_types(stack.up.dtype, torch.float32)
    up, down = stack.up[rows].to(precise), stack.down[:, columns].mT.to(precise)
    units = up * down * stack.scale.to(precise)
    count, width = mask.shape
    if bool(mask.all()):  # the units of an adapter stand together
        entries = units.reshape(samples, count, width).sum(2).mT.contiguous()
    else:
        entries = torch.stack([units[:, index].sum(1) for index in positions])
    sign, size = entries.sign(), entries.abs()
    both = sign.abs() @ sign.abs().mT  # whole numbers: exact in any float
    agree = sign @ sign.mT
    conflicts = (both - agree) / 2
    conflict_mass, mass = torch.zeros(count, count), torch.zeros(count, count)
    for i in range(count):
        smaller = torch.minimum(size[i], size)
        mass[i] = smaller.sum(1)
        conflict_mass[i] = (smaller * (sign[i] * sign < 0)).sum(1)
    return conflicts, both, conflict_mass, mass


def _factor_products(blocks: Tensor, mask: Tensor) -> Tensor:
    """sum_a <row a of i, row a of j>: raw factors, meaningful for equal ranks only."""
    ranks = mask.sum(1)
    products = torch.einsum("iaja->ij", blocks)
    return torch.where(ranks[:, None] == ranks, products, 0.0)


def _unit_match(gram_up: Tensor, gram_down: Tensor, mask: Tensor) -> Tensor:
    """How well each unit of i is found among those of j (for i = j: among the others)."""
    norms = torch.einsum("iaia->ia", gram_up) * torch.einsum("iaia->ia", gram_down)
    length = norms.clamp_min(1e-300).sqrt()
    match = (gram_up * gram_down).abs() / (length[:, :, None, None] * length)
    count, width = mask.shape
    for i in range(count):
        match[i, torch.arange(width), i, torch.arange(width)] = 0
    best = match.amax(3).clamp(0, 1)
    return best.mean(1) * width / mask.sum(1)[:, None]
