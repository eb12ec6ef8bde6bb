"""Methods on singular vectors: TSV-Merge, DC-Merge, Iso-C, Iso-CTS, and the SVC calibration.

All commute with rotations, so they run on core coordinates. The published codes work on dense
d x d matrices of full rank; a merged LoRA has rank R at most, and everything here is restricted to
the directions that exist. (Dense, TSV-M and Iso keep arbitrary null-space vectors.)
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.merge.methods.method import Job, Outcome
from lora_merge.merge.recipe.recipe import Smooth
from lora_merge.options import option

# Singular values below this fraction of the largest are rounding of float32 inputs.
RTOL = 1e-6


@dataclass(frozen=True)
class TsvOptions:
    """Parameters of `tsv`."""

    keep: Literal["all", "share"] = option(
        "all", "singular triplets of each adapter: all, or its share of the rank asked for"
    )


@dataclass(frozen=True)
class DcMergeOptions:
    """Parameters of `dc-merge`."""

    smoothing: Smooth = option(
        "flat", "each adapter's singular values, their sum kept: all equal, a line, or as they are"
    )
    density: float | None = option(
        None,
        "share of each adapter's R x R coordinates that is kept (the authors' code: 0.001)",
        low=0,
        high=1,
        unset="as many as it has singular values, what 0.001 is for eight of rank 16",
    )


@dataclass(frozen=True)
class IsoOptions:
    """Parameters of `iso-c`."""

    beta: float = option(
        1.0, "1 makes all singular values equal, 0 leaves them (geometric between)", low=0, high=1
    )


@dataclass(frozen=True)
class IsoCtsOptions:
    """Parameters of `iso-cts`."""

    common: float = option(
        0.8, "share of the directions that are common; the rest is split by task", low=0, high=1
    )
    beta: float = option(1.0, "1 makes all singular values equal, 0 leaves them", low=0, high=1)


def tsv(stack: RankStack, job: Job, options: TsvOptions) -> Outcome:
    """TSV-Merge (Gargiulo et al., CVPR 2025, arXiv 2412.00081).

    The adapters' singular vectors side by side, replaced by their polar factors: the nearest
    orthonormal sets, so that tasks no longer interfere.
    """
    limit = None
    if options.keep == "share" and job.rank is not None:
        limit = max(-(-job.rank // len(stack.adapters)), 1)
    all_units = triplets(stack.weighted(job.weights), limit)
    return Outcome(RankStack.single(polar(all_units.up), polar(all_units.down), all_units.scale))


def dc_merge(stack: RankStack, job: Job, options: DcMergeOptions) -> Outcome:
    """DC-Merge (CVPR 2026, arXiv 2603.06242): smoothed spectra, merged in a cover of all spaces.

    With U, V the polar factors of all adapters' singular vectors side by side (as in `tsv`) and
    D_i the smoothed adapters, the coordinates M_i = U^T D_i V lose all but their largest entries;
    TIES elects a sign for each entry and averages what agrees; entries between two adapters'
    directions are dropped; the result is U M V^T.
    """
    # A flat adapter has no singular vectors of its own any more: those from before count.
    parts = smoothed(triplets(stack.weighted(job.weights)), options.smoothing)
    left, right = polar(parts.up), polar(parts.down)
    total, largest = _zeros(parts), 0.0
    kept = []
    for owner in parts.adapters:
        own = parts.of_adapter(owner)
        inside = (left.mT @ (own.up * own.scale)) @ (own.down @ right.mT)
        share = options.density
        count = own.num_units if share is None else int(share * inside.numel())
        bound = inside.abs().flatten().topk(min(max(count, 1), inside.numel())).values[-1]
        kept.append(torch.where(inside.abs() >= (1 - RTOL) * bound, inside, 0.0))
        total += kept[-1]
        largest = max(largest, float(inside.abs().max()))
    signs = torch.where(total.abs() > RTOL * largest, total.sign(), 0.0)
    agreeing = [torch.where(x.sign() == signs, x, 0.0) for x in kept]
    counted = sum((x != 0 for x in agreeing), _zeros(parts)).clamp_min(1)
    merged = sum(agreeing, _zeros(parts)) / counted
    merged = torch.where(parts.owner[:, None] == parts.owner, merged, 0.0)
    return Outcome(RankStack.single(left @ merged, right))


def _zeros(parts: RankStack) -> Tensor:
    return parts.scale.new_zeros(parts.num_units, parts.num_units)


def iso_c(stack: RankStack, job: Job, options: IsoOptions) -> Outcome:
    """Iso-C (Marczak et al., ICML 2025, arXiv 2502.04959): the sum with a flat spectrum."""
    u, s, vh = truncated_svd(stack.weighted(job.weights).delta(), None)
    kept = s[: job.rank]
    result = RankStack.single(u[:, : len(kept)], vh[: len(kept)], flatten(kept, options.beta))
    return Outcome(result, energy=share_of_energy(kept, s))


def iso_cts(stack: RankStack, job: Job, options: IsoCtsOptions) -> Outcome:
    """Iso-CTS: common directions of the sum, then each task's own beyond them, spectrum flat.

    Every task gets at least one direction of its own where the rank allows it.
    """
    weighted = stack.weighted(job.weights)
    u, s, vh = truncated_svd(weighted.delta(), None)
    count = len(stack.adapters)
    budget = min(job.rank or stack.num_units, min(stack.d_out, stack.d_in))
    own = min(max(round((1 - options.common) * budget / count), 1), budget // count)
    common = min(max(budget - own * count, 0), s.numel())
    beyond = weighted.up - u[:, :common] @ (u[:, :common].mT @ weighted.up)
    floor = RTOL * float(weighted.norm())
    rest = RankStack(weighted.down, beyond, weighted.scale, weighted.owner)
    tasks = triplets(rest, own, floor=floor)
    left = polar(torch.cat([u[:, :common], tasks.up], dim=1))
    right = polar(torch.cat([vh[:common], tasks.down]))
    values = torch.cat([s[:common], tasks.scale])
    return Outcome(RankStack.single(left, right, flatten(values, options.beta)))


def svc(result: RankStack, stack: RankStack, weights: Tensor, alpha: float = 0.1) -> RankStack:
    """Shrink each direction that the merge counts several times (SVC, arXiv 2602.05536).

    With s_j^i = <u_j^T M, u_j^T D_i> / |u_j^T D_i|^2, sigma_j is multiplied by
    N / sum_i max(alpha, s_j^i).

    Args:
        result: A merge M in core coordinates.
        stack: The adapters D_i in the same coordinates.
        weights: Weight of each adapter.
        alpha: Floor on the projections.
    """
    u, s, vh = truncated_svd(result.delta(), None)
    if not s.numel():
        return result
    rows = s[:, None] * vh
    total = torch.zeros_like(s)
    adapters = stack.adapters
    for owner in adapters:
        part = stack.of_adapter(owner).weighted(weights)
        task = (u.mT @ (part.up * part.scale)) @ part.down
        size = task.square().sum(dim=1)
        # A task that is absent from a direction says nothing against it.
        share = torch.where(size > RTOL**2 * s[0] ** 2, (rows * task).sum(dim=1) / size, 1.0)
        total += share.clamp_min(alpha)
    return RankStack.single(u, vh, s * len(adapters) / total)


def smoothed(parts: RankStack, how: Smooth) -> RankStack:
    """Each adapter's singular values made more equal, their sum kept (DC-Merge, arXiv 2603.06242).

    Args:
        parts: Singular triplets of every adapter.
        how: "flat" makes them equal; "linear" a line from rho = min(5, largest / smallest) to 1.
    """
    if how == "none":
        return parts
    values = parts.scale.clone()
    for owner in parts.adapters:
        own = parts.owner == owner
        before = parts.scale[own]
        rho = min(5.0, float(before[0] / before[-1])) if how == "linear" else 1.0
        line = torch.linspace(rho, 1.0, len(before), dtype=before.dtype, device=before.device)
        values[own] = line * (before.sum() / line.sum())
    return RankStack(parts.down, parts.up, values, parts.owner)


def triplets(stack: RankStack, limit: int | None = None, *, floor: float = 0.0) -> RankStack:
    """Each adapter's singular triplets as its units: orthonormal vectors, values as scale.

    No adapter is ever formed as a matrix, so N adapters cost R^2 numbers and not N R^2.

    Args:
        stack: The adapters, float64.
        limit: Triplets of each adapter at most.
        floor: Singular values up to this size count as zero.
    """
    ups, downs, values, owners = [], [], [], []
    for owner in stack.adapters:
        part = stack.of_adapter(owner)
        u, s, vh = _nonzero(*part.svd(), limit, floor)
        ups.append(u)
        downs.append(vh)
        values.append(s)
        owners.append(torch.full((len(s),), owner, device=s.device))
    return RankStack(torch.cat(downs), torch.cat(ups, dim=1), torch.cat(values), torch.cat(owners))


def truncated_svd(
    x: Tensor, rank: int | None, *, floor: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD without the directions that are numerically zero, cut at a rank.

    Args:
        x: Shape (m, n), float64.
        rank: Largest rank; None keeps all.
        floor: Singular values up to this size count as zero, too.

    Returns:
        u (m, k), s (k,), vh (k, n).
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return _nonzero(u, s, vh, rank, floor)


def _nonzero(
    u: Tensor, s: Tensor, vh: Tensor, rank: int | None, floor: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The singular directions that are not numerically zero, up to a rank."""
    size = int((s > torch.clamp(RTOL * s[:1], min=floor)).sum())
    size = size if rank is None else min(size, rank)
    return u[:, :size], s[:size], vh[:size]


def polar(x: Tensor) -> Tensor:
    """The partial isometry nearest to x: u v^T over its nonzero singular values."""
    u, _, vh = truncated_svd(x, None)
    return u @ vh


def share_of_energy(kept: Tensor, values: Tensor) -> float:
    """Energy of the kept singular values over that of all; 1 of nothing."""
    total = float(values.square().sum())
    return float(kept.square().sum()) / total if total > 0 else 1.0


def flattened(stack: RankStack, beta: float) -> RankStack:
    """The same directions and norm with a flatter spectrum, as Iso-C's."""
    u, s, vh = _nonzero(*stack.svd(), None)
    values = flatten(s, beta)
    return RankStack.single(u, vh, values * (s.norm() / values.norm()) if len(s) else values)


def flatten(values: Tensor, beta: float) -> Tensor:
    """Singular values moved towards their mean: geometric between them (0) and it (1)."""
    return values ** (1 - beta) * values.mean() ** beta if values.numel() else values
