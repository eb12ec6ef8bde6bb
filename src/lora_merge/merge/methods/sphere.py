"""Geometry of N deltas as directions: slerp, multi-slerp, Karcher mean, Model Stock.

All of them are weighted sums whose coefficients depend on inner products alone, so an N x N matrix
decides everything and no delta is formed.
"""

from dataclasses import dataclass
from math import acos, sin

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.merge.calibrate import shares
from lora_merge.merge.methods.method import Job, Outcome
from lora_merge.options import option

# A length comes from squares that carry rounding of 1e-16, so below 1e-8 it is noise.
_VANISHING = 1e-7

# mergekit's bound: nearer than this to parallel, slerp and linear interpolation are one.
_PARALLEL = 0.9995


@dataclass(frozen=True)
class SlerpOptions:
    """Parameters of `slerp`."""

    t: float | None = option(
        None, "0 is the first adapter, 1 the second; by default from the weights", low=0, high=1
    )


@dataclass(frozen=True)
class KarcherOptions:
    """Parameters of `karcher`."""

    iterations: int = option(100, "largest number of iterations", low=1)
    tolerance: float = option(1e-10, "stop when the mean moves by less (radians)", above=0)


def slerp(stack: RankStack, job: Job, options: SlerpOptions) -> Outcome:
    """Along the great circle from one delta to the other (Shoemake 1985).

    Where only one of the two adapters has the module, it is taken with its weight's share.
    """
    share = shares(stack, job)
    if len(stack.adapters) > 2:
        raise MethodError(
            f"slerp is between two adapters, not {len(stack.adapters)}",
            "use karcher or multislerp for more",
        )
    if options.t is not None:
        places = torch.tensor([1 - options.t, options.t], dtype=torch.float64)
        share = places.to(share.device)[torch.tensor(stack.adapters)]
    if len(stack.adapters) == 1:
        return _combine(stack, share)
    products = _products(stack)
    norms = products.diagonal().sqrt()
    if not bool((norms > 0).all()):
        return _combine(stack, share)
    cosine = float(products[0, 1] / norms.prod())
    if abs(cosine) > _PARALLEL:
        return _combine(stack, share, angle=cosine)
    angle = acos(cosine)
    t = float(share[1])
    arc = [sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)]
    return _combine(stack, share.new_tensor(arc), angle=cosine)


def multislerp(stack: RankStack, job: Job, options: object) -> Outcome:
    """Multi-slerp of mergekit in its closed form: the weighted mean of directions, at mean norm.

    Its step on the tangent space at the normalised mean is zero by construction, so
    (sum w_i |Delta_i|) normalise(sum w_i Delta_i / |Delta_i|) is the whole result.
    """
    share, norms, cosines = _directions(stack, job)
    norm = (share * norms).sum()
    return _combine(stack, _per_norm(_unit(share, cosines, job), norms) * norm)


def karcher(stack: RankStack, job: Job, options: KarcherOptions) -> Outcome:
    """The intrinsic mean on the sphere of directions, at the weighted mean norm.

    The mean never leaves the span of the directions, so the iteration u <- exp_u(sum w_i log_u u_i)
    runs on N coefficients.
    """
    share, norms, cosines = _directions(stack, job)
    place = _unit(share, cosines, job)
    for _ in range(options.iterations):
        reach = (cosines @ place).clamp(-1, 1)
        angle = reach.acos()
        stretch = torch.where(angle > 1e-9, angle / angle.sin().clamp_min(1e-9), 1.0)
        # sum w_i log_u(u_i) = sum w_i stretch_i (u_i - reach_i u), as coefficients of the u_i
        step = share * stretch
        step = step - (step * reach).sum() * place
        length = float((step @ cosines @ step).clamp_min(0).sqrt())
        if length < options.tolerance:
            break
        place = torch.cos(step.new_tensor(length)) * place + sin(length) / length * step
        place = _unit(place, cosines, job)
    return _combine(stack, _per_norm(place, norms) * (share * norms).sum())


def model_stock(stack: RankStack, job: Job, options: object) -> Outcome:
    """The mean, shortened by the angle between the adapters (Jang et al. 2024, arXiv 2403.19522).

    t = N cos / (1 + (N - 1) cos) with the mean pairwise cosine. For adapters of different tasks the
    cosine is about 0 and so is t: it erases the merge. It is made for fine-tunings of one task.
    """
    share = shares(stack, job)
    count = len(stack.adapters)
    if count == 1:
        return _combine(stack, share)
    products = _products(stack)
    norms = products.diagonal().clamp_min(1e-300).sqrt()
    cosines = products / norms[:, None] / norms
    mean = float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))
    shrink = min(max(count * mean / (1 + (count - 1) * mean), 0.0), 1.0) if mean > 0 else 0.0
    outcome = _combine(stack, share * shrink, angle=mean)
    return Outcome(outcome.stack, {**outcome.details, "shrink": shrink})


def _products(stack: RankStack) -> Tensor:
    """Inner products of the adapters that are present, float64, shape (n, n)."""
    present = torch.tensor(stack.adapters, device=stack.owner.device)
    return stack.adapter_products()[present][:, present]


def _directions(stack: RankStack, job: Job) -> tuple[Tensor, Tensor, Tensor]:
    """Shares, norms and cosines of the adapters; a zero delta has no direction and cosine 0."""
    products = _products(stack)
    norms = products.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return shares(stack, job), norms, inverse[:, None] * products * inverse


def _unit(place: Tensor, cosines: Tensor, job: Job) -> Tensor:
    """Coefficients of the direction that these coefficients point in; zero if all deltas are.

    Raises:
        MethodError: If directions cancel.
    """
    length = float((place @ cosines @ place).clamp_min(0).sqrt())
    if length < _VANISHING:
        if not bool(cosines.any()):
            return place
        raise MethodError(
            f"{job.module}: the adapters' directions cancel, so they have no mean direction",
            "use task-arithmetic",
        )
    return place / length


def _per_norm(place: Tensor, norms: Tensor) -> Tensor:
    return torch.where(norms > 0, place / norms, 0.0)


def _combine(stack: RankStack, coefficients: Tensor, angle: float | None = None) -> Outcome:
    """sum_i c_i Delta_i over the adapters that are present."""
    count = int(stack.owner.max()) + 1
    weights = torch.zeros(count, dtype=torch.float64, device=stack.owner.device)
    weights[torch.tensor(stack.adapters, device=weights.device)] = coefficients
    details: dict[str, object] = {"coefficients": [float(c) for c in coefficients]}
    if angle is not None:
        details["cosine"] = angle
    return Outcome(stack.weighted(weights), details)
