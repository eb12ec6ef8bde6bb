"""ESM: merge along the directions in which each adapter moves a module's outputs.

The published method runs 32 unlabelled rows per task and takes the principal directions of x D_i^T.
For an adapter D = B A their covariance is B (A C A^T) B^T with C that of the inputs: the r x r
moments that `collect_statistics` stores are all it needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum
from threading import Lock

import torch
from torch import Tensor

from lora_merge.adapters.module_names import place_of
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.merge.methods.method import Job, Outcome, Survey
from lora_merge.merge.methods.spectral import RTOL, polar
from lora_merge.merge.methods.with_statistics.regression import moments_of
from lora_merge.options import option


@dataclass(frozen=True)
class EsmOptions:
    """Parameters of `esm`."""

    power: float = option(
        2.0, "how much larger than usual what is large gets: adapters, columns, modules", low=0
    )
    spread: float = option(
        0.15, "the same within an adapter, by the variance along each direction", low=0
    )


def esm(stack: RankStack, job: Job, options: EsmOptions) -> Outcome:
    """ESM (CVPR 2026, arXiv 2602.20208; arXiv 2606.19164).

    U_i: principal directions of the output shifts; V_i = U_i^T D_i, scaled by its norm and its
    columns' over the means (to `power`), both by the directions' variances (to `spread`). All side
    by side are replaced by their polar factors times the mean singular value, and multiplied.
    Last, a module's result is scaled by its norm over the mean of its kind (to `power`).

    Of a rank every adapter gets its share, as of the width in the authors' code.
    An adapter that is alone in a module stays as it is.

    Args:
        stack: The adapters.
        job: `statistics` has z; `shared` the factor of each module, from `module_factors`.
        options: Parameters.
    """
    weighted = stack.weighted(job.weights)
    if len(stack.adapters) < 2:
        return Outcome(weighted)
    result, held = _merged(weighted, job, options)
    factors: Mapping[str, float] = job.shared or {}
    dtype = torch.promote_types(stack.up.dtype, torch.float32)
    scale = result.scale * factors.get(job.module, 1.0)
    result = RankStack(result.down.to(dtype), result.up.to(dtype), scale, result.owner)
    return Outcome(result, energy=held)


def module_factors(survey: Survey, options: EsmOptions) -> dict[str, float]:
    """(norm / mean norm of the same kind of module in all layers) ** power, by module."""
    norms: dict[str, float] = {}
    lock = Lock()

    def take(stack: RankStack, job: Job) -> None:
        if len(stack.adapters) > 1:
            norm = _merged(stack.weighted(job.weights), job, options)[0].norm()
            with lock:
                norms[job.module] = norm

    survey(take)
    kinds: dict[tuple[str, str], list[float]] = {}
    for module in sorted(norms):
        kinds.setdefault(_kind(module), []).append(norms[module])
    means = {kind: fsum(found) / len(found) for kind, found in kinds.items()}
    return {m: _ratio(norm, means[_kind(m)]) ** options.power for m, norm in norms.items()}


def _kind(module: str) -> tuple[str, str]:
    place = place_of(module)
    return place.stack, place.kind


def _merged(weighted: RankStack, job: Job, options: EsmOptions) -> tuple[RankStack, float]:
    """The module's result, and the share of all outputs' variance that its directions hold."""
    shifts = {}
    for owner, moments in moments_of(weighted, job, "esm").items():
        mine = weighted.owner == owner
        own = weighted.units(mine)
        up = own.up.double() * own.scale
        shifts[owner] = _Shift(up, own.down.double(), *_directions(up, moments[mine][:, mine]))
    counts, held = _split(shifts, job.rank)
    lefts, rights, sizes = [], [], []
    for owner, shift in shifts.items():
        right = (shift.directions.mT @ shift.up) @ shift.down
        size = right.norm()
        kept = slice(counts[owner])
        along = _relative(shift.variance[kept]) ** options.spread
        along = _relative(along)
        lefts.append(shift.directions[:, kept] * along)
        rights.append(right[kept] * along[:, None] * size**options.power)
        sizes.append(float(size))
    mean = fsum(sizes) / len(sizes)
    left, right = torch.cat(lefts, dim=1), torch.cat(rights)
    if mean == 0:
        return RankStack.single(left, right), 1.0
    right = right / mean**options.power
    right = right * _relative(right.norm(dim=0)) ** options.power
    return RankStack.single(_even(left), _even(right)), held


@dataclass(frozen=True, eq=False)
class _Shift:
    """An adapter, and the directions (d_out, k) in which it moves outputs with their variance."""

    up: Tensor
    down: Tensor
    directions: Tensor
    variance: Tensor


def _split(shifts: Mapping[int, _Shift], rank: int | None) -> tuple[dict[int, int], float]:
    """How many directions of each adapter a rank has room for: one in turn, the largest first."""
    places = []
    for owner, shift in shifts.items():
        share = shift.variance / shift.variance.sum()
        places += [(turn, -value, owner) for turn, value in enumerate(share.tolist())]
    kept = sorted(places)[:rank]
    counts = {owner: sum(1 for _, _, other in kept if other == owner) for owner in shifts}
    return counts, fsum(-v for _, v, _ in kept) / max(fsum(-v for _, v, _ in places), 1e-300)


def _directions(up: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (d_out, k) and eigenvalues (k,) of up moments up^T, the largest first."""
    values, vectors = torch.linalg.eigh(moments)
    root = vectors * values.clamp_min(0).sqrt()
    q, r = torch.linalg.qr(up)
    u, s, _ = torch.linalg.svd(r @ root)
    kept = s > RTOL * s[:1]
    return q @ u[:, : len(s)][:, kept], s[kept].square()


def _even(x: Tensor) -> Tensor:
    """The polar factor times the mean singular value, over all that there could be."""
    even: Tensor = polar(x) * torch.linalg.svdvals(x).mean()
    return even


def _relative(x: Tensor) -> Tensor:
    """Nonnegative numbers over their mean; zeros stay zeros."""
    return x / x.mean().clamp_min(1e-300) if x.numel() else x


def _ratio(norm: float, mean: float) -> float:
    return norm / mean if mean > 0 else 1.0
