"""All pairs of adapters on one module, from the Grams of their stacked factors.

With U_i, V_i the singular vectors of adapter i, everything comes from the cross products
U_i^T U_j and V_i^T V_j, which are r x r blocks of the whitened Grams: no basis of length d and no
dense delta is formed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.linalg.factors import gram

# Up to so many units, everything is float64; beyond, products are float32 (those of Grams in chunks
# that are summed in float64), and directions below 1e-3 of an adapter's largest are left out of
# subspaces.
EXACT_UNITS = 256
_SHORTEST_SQUARE = 1e-24
# Numbers of a module that are worked on at a time, where there are many units.
_PART = 1 << 18
# How often eighth powers are taken to bring out a matrix's largest eigenvalue: what one competitor
# can hide of it is less than 1 / (e 8^4) = 1e-4.
_POWERS = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class PairMeasures:
    """What is measured of pairs in a module and averaged over several, float64, shape (N, N).

    Attributes:
        overlap_out: ||U_i^T U_j||_F^2 / min(k_i, k_j), mean squared cosine of principal angles.
        overlap_in: The same of the input directions V.
        chance_out: What random subspaces of these sizes would show: max(k_i, k_j) / d_out.
        chance_in: The same for d_in.
        dimensions: min(k_i, k_j), how many principal angles there are.
        cosine_out: Largest principal cosine of the output spaces; of more than 256 units to 1e-4,
            unless all are kept.
        cosine_in: Largest principal cosine of the input spaces.
        unit_match: Mean over units of i of the best |cos(a, a') cos(b, b')| among units of j; for
            i = j, of the others among its own.
        angles_out: All principal cosines of the output spaces of one module, descending, shape
            (N, N, K), zero beyond `dimensions`; None where not asked for.
        angles_in: The same of the input spaces.
    """

    overlap_out: Tensor
    overlap_in: Tensor
    chance_out: Tensor
    chance_in: Tensor
    dimensions: Tensor
    cosine_out: Tensor
    cosine_in: Tensor
    unit_match: Tensor
    angles_out: Tensor | None = None
    angles_in: Tensor | None = None


AVERAGED = tuple(f.name for f in fields(PairMeasures) if not f.name.startswith("angles"))


@dataclass(frozen=True, eq=False, kw_only=True)
class PairTables(PairMeasures):
    """Tables over all pairs of N adapters in a module; zero where one is absent.

    Attributes:
        products: <D_i, D_j>, deltas with scaling.
        interference: Singular task interference of the pair, ||(U^T U - I) S (V^T V - I)||_1.
        chance_interference: What random subspaces with these spectra would show.
        nuclear: Sum of both nuclear norms, what normalises the interference.
        conflicts: Sampled entries whose signs differ.
        samples: Sampled entries that are non-zero in both.
        conflict_mass: Sum of min(|D_i|, |D_j|) over conflicts.
        mass: Sum of min(|D_i|, |D_j|) over all samples.
        factor_a: <A_i, A_j>, raw factors of equal rank (0 otherwise).
        factor_b: <B_i, B_j>.
        present: 1 where both adapters have the module.
        total_interference: The interference of all adapters together.
        total_nuclear: Sum of all nuclear norms.
    """

    products: Tensor
    interference: Tensor
    chance_interference: Tensor
    nuclear: Tensor
    conflicts: Tensor
    samples: Tensor
    conflict_mass: Tensor
    mass: Tensor
    factor_a: Tensor
    factor_b: Tensor
    present: Tensor
    total_interference: float
    total_nuclear: float


NUM_TABLES = len(fields(PairTables)) - 4
_SUMMED = [f.name for f in fields(PairTables) if not f.name.startswith(("total", "angles"))]


class PairSums:
    """The sums of several modules' tables; what they are, see `PairTables`."""

    def __init__(self) -> None:
        self.modules = 0
        self.tables: dict[str, Tensor] = {}
        self.interference = self.nuclear = 0.0

    def add(self, tables: PairTables) -> None:
        """Take in one module."""
        for name in _SUMMED:
            table: Tensor = getattr(tables, name)
            if name in self.tables:
                self.tables[name] += table
            else:
                self.tables[name] = table.clone()
        self.modules += 1
        self.interference += tables.total_interference
        self.nuclear += tables.total_nuclear


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
    exact = stack.num_units <= EXACT_UNITS
    (gram_up, own_up), (gram_down, own_down) = (
        _grams(x, mask, exact) for x in (stack.up.mT, stack.down)
    )
    # A diagonal is a sum of squares: finite only if every entry is.
    if not bool(torch.isfinite(own_up.sum() + own_down.sum())):
        raise FloatingPointError("the factors are not finite")
    scale = stack.scale[ranks.cumsum(0) - 1]
    squares = torch.einsum("iaa,iaa->ia", own_up, own_down)
    inner, unit_match = _unit_tables(gram_up, gram_down, squares, ranks)
    factor_a, factor_b = _factor_products(gram_down, ranks), _factor_products(gram_up, ranks)
    values, to_up, to_down = _cores(own_up, own_down, scale)
    keep = values > (1e-7 if exact else 1e-3) * values[:, :1]
    precise = torch.float64 if exact or _rounds_float32() else torch.float32
    cross_up = _cross(to_up * keep[:, None, :], gram_up, precise)
    del gram_up  # of many units, these numbers are what memory goes into
    cross_down = _cross(to_down * keep[:, None, :], gram_down, precise)
    del gram_down
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
        products=spread(inner * scale[:, None] * scale),
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
        factor_a=spread(factor_a),
        factor_b=spread(factor_b),
        unit_match=spread(unit_match),
        present=spread(torch.ones(len(owners), len(owners))),
        total_interference=everyone,
        total_nuclear=float(nuclear.sum()),
        angles_out=spread(cosines_up) if angles else None,
        angles_in=spread(cosines_down) if angles else None,
    )


def _rounds_float32() -> bool:
    """Whether products of float32 are rounded to bfloat16: wherever AMX may, exact for Grams."""
    allowed = torch.get_float32_matmul_precision() == "medium"
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # torch 2.9 does not tell
    return allowed and (capabilities is None or bool(capabilities().get("amx_bf16")))


def _grams(x: Tensor, mask: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """The R x R Gram of the units as (N, r, N, r), and its diagonal blocks (N, r, r) in float64.

    Of many units the former is kept in float32. Rows so short that float32 would lose their squares
    are a reason to take float64 throughout.
    """
    products = gram(x, precise=torch.float64 if exact else torch.float32)
    short = products.diagonal() < _SHORTEST_SQUARE
    if not exact and bool(x[short].any()):
        products, exact = gram(x), True
    whole = _blocks(products, mask)
    index = torch.arange(len(mask))
    return whole if exact else whole.to(torch.float32), whole[index, :, index, :]


def _parts(count: int, size: int) -> Iterator[slice]:
    """Adapters in slices, for numbers of which each adapter has so many."""
    step = max(_PART // size, 1)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _blocks(matrix: Tensor, mask: Tensor) -> Tensor:
    """An R x R matrix as (N, r, N, r), zero where an adapter has fewer units than r."""
    if not bool(mask.all()):
        slots = mask.flatten().nonzero().squeeze(1)
        padded = matrix.new_zeros(mask.numel(), mask.numel())
        padded[slots[:, None], slots] = matrix
        matrix = padded
    return matrix.reshape(*mask.shape, *mask.shape)


def _cores(own_up: Tensor, own_down: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values (N, r) and the matrices that make U_i of B_i and V_i of A_i^T, (N, r, r)."""
    root_up, root_down = _square_root(own_up), _square_root(own_down)
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
    size = torch.einsum("iaia->ia", blocks).double().amax(1).clamp_min(1e-300).sqrt()
    to_basis = (to_basis * size[:, None, None]).to(precise)
    cross = to_basis.new_empty(count, count, width, width)
    for part in _parts(count, width * count * width):
        scaled = (blocks[part] / (size[part, None] * size)[:, None, :, None]).to(precise)
        left = to_basis[part].mT @ scaled.flatten(2)
        left = left.unflatten(2, (count, width)).transpose(1, 2)
        torch.matmul(left, to_basis, out=cross[part])
    return cross


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
    found = cross.new_empty(len(i))
    for part in _parts(len(i), cross[0, 0].numel()):
        half = cross[i[part], j[part]]
        squares = half.mT @ half
        power = squares
        for _ in range(_POWERS):
            power = torch.linalg.matrix_power(power / _traces(power), 8)
        found[part] = (squares * (power / _traces(power))).sum((1, 2))
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
    columns = (cross_down * others).transpose(1, 2).reshape(size, size)
    one = torch.empty(len(values), len(values), dtype=torch.float64)
    everyone = 0.0
    for part in _parts(len(values), size * values.shape[1]):
        up = cross_up[part] * (others[part] * values[:, None, :])
        down = cross_down[part] * others[part]
        one[part] = (up @ down.mT).abs().sum((2, 3), dtype=torch.float64)
        rows = up.transpose(1, 2).reshape(-1, size)
        everyone += float((rows @ columns).abs().sum(dtype=torch.float64))
    return one + one.mT, everyone


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
    owner = torch.arange(len(ranks)).repeat_interleave(ranks)
    both, agreed, apart, opposed = torch.zeros(4, len(ranks), len(ranks), dtype=torch.float64)
    norms = torch.zeros(len(ranks), dtype=torch.float64)
    for part in _parts(samples, stack.num_units):
        up, down = stack.up[rows[part]].double(), stack.down.mT[columns[part]].double()
        entries = up.new_zeros(len(ranks), len(up))
        entries.index_add_(0, owner, (up * down * stack.scale).mT)
        sign, size = entries.sign(), entries.abs()
        both += sign.abs() @ sign.abs().mT
        agreed += sign @ sign.mT
        norms += size.sum(1)
        apart += torch.cdist(size, size, p=1)
        opposed += torch.cdist(entries, entries, p=1)
    conflicts = (both - agreed) / 2
    # |x| + |y| - ||x| - |y|| is twice the smaller of |x| and |y|; |x - y| is more than ||x| - |y||
    # where the signs differ, by the same. Rounding may leave less than nothing.
    mass = (norms[:, None] + norms - apart).clamp_min(0) / 2
    conflict_mass = (opposed - apart).clamp_min(0) / 2
    return conflicts, both, torch.minimum(conflict_mass, mass), mass


def _factor_products(blocks: Tensor, ranks: Tensor) -> Tensor:
    """sum_a <row a of i, row a of j>: raw factors, meaningful for equal ranks only."""
    products = torch.einsum("iaja->ij", blocks).double()
    return torch.where(ranks[:, None] == ranks, products, 0.0)


def _unit_tables(up: Tensor, down: Tensor, squares: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products of adapters without their scalings, and how well units find a match.

    Args:
        up: Inner products of all columns of B, shape (N, r, N, r), zero where there is none.
        down: Those of all rows of A.
        squares: Squared norms of the units, float64, shape (N, r).
        ranks: Units of each adapter, int64, shape (N,).

    Returns:
        Two tables, float64, shape (N, N): sums of units' inner products; how well each unit of i is
        found among those of j (for i = j: among the others), on average.
    """
    count, width = up.shape[:2]
    length = squares.clamp_min(1e-300).sqrt()
    inner, best = (torch.empty(count, count, dtype=torch.float64) for _ in range(2))
    for part in _parts(count, width * count * width):
        units = up[part].double() * down[part]
        inner[part] = units.sum((1, 3))
        match = units.abs_().div_(length)
        match.flatten(2).flatten(0, 1).diagonal(part.start * width).zero_()
        found = (match.amax(3) / length[part][:, :, None]).clamp_(0, 1)
        best[part] = found.sum(1) / ranks[part, None]
    return inner, best
