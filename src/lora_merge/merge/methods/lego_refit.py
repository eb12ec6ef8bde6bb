"""Our form of LoRA-LEGO: cluster singular units by direction, then refit them to a merge target.

The published method (`lego`, arXiv 2409.16167) averages what falls into one cluster. Here a
cluster decides where its unit starts: the units are then solved for together, by least squares to
the target of `wudi-iso`, so that each does what is best for all adapters.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.linalg.factors import pivot_sign, thin_svd
from lora_merge.linalg.kmeans import KMeansResult, kmeans
from lora_merge.merge.methods.least_squares import Target, output_target
from lora_merge.merge.methods.lego import members_of
from lora_merge.merge.methods.method import Job, Outcome
from lora_merge.merge.methods.spaces import core_of
from lora_merge.merge.methods.spectral import RTOL, flatten, triplets, truncated_svd
from lora_merge.options import option


@dataclass(frozen=True)
class LegoRefitOptions:
    """Parameters of `lego-refit`."""

    compare: Literal["both", "down", "up"] = option(
        "both", "halves of the singular units whose directions are clustered"
    )
    importance: Literal["share", "size", "none"] = option(
        "share", "how much a unit counts: its share of its adapter's energy, its size, all alike"
    )
    refit: Literal["both", "up", "down"] = option(
        "both", "halves that are solved for; the other one stays the centroid's"
    )
    rounds: int = option(3, "times that both halves are solved for in turn", low=1)
    ridge: float = option(
        0.01, "pull of the target towards the plain sum, as in wudi with side=output", above=0
    )
    beta: float = option(
        0.25, "0 leaves the singular values of the result, 1 makes them equal", low=0, high=1
    )
    restarts: int = option(10, "k-means++ starts", low=1)


def lego_refit(stack: RankStack, job: Job, options: LegoRefitOptions) -> Outcome:
    """Cluster the adapters' singular units and refit the clusters' units.

    With X* the least-squares target, C the centroids' down halves and |.| the norm of the target's
    metric: U = argmin |U C - X*|, then D = argmin |U D - X*|, in rounds. Unit c is (D_c, U_c) and
    began as the centroid of cluster c.

    Args:
        stack: The adapters.
        job: Its rank is the number of clusters; None makes every unit its own.
        options: Parameters.

    Returns:
        The units; details: `cluster_sizes`, and `clusters` as `members_of` has them.
    """
    place = core_of(stack)
    assert place.right is not None
    parts = triplets(place.core.weighted(job.weights))
    count = min(job.rank or parts.num_units, parts.num_units)
    if count == 0:
        return Outcome(place.lift(RankStack.single(parts.up, parts.down)))
    # Orthogonal units have no sign relative to each other: that of their largest entry counts.
    sign = pivot_sign(place.right.lift(parts.down.mT))[0].to(parts.scale)
    parts = replace(parts, down=parts.down * sign[:, None], up=parts.up * sign)
    size = _sizes(parts, options.importance)
    found = _cluster(parts, size, count, options, job.rng())
    target = output_target(parts, options.ridge)
    members = torch.zeros(count, parts.num_units, dtype=size.dtype, device=size.device)
    members[found.labels, torch.arange(len(size), device=size.device)] = size * found.signs
    up, down = _refitted(parts, members, target, options)
    if len(parts.adapters) > 1:
        down = _flattened(up, down, options.beta)
    result = RankStack.single(up, down)
    energy = _energy_kept(target, up, down) if options.beta == 0 else 1.0
    sizes = torch.bincount(found.labels, minlength=count).tolist()
    products = (parts.up.mT @ up) * (parts.down @ down.mT)
    lengths = up.norm(dim=0) * down.norm(dim=1)
    clusters = members_of(parts, found.labels, products, torch.ones_like(size), lengths)
    return Outcome(
        place.lift(result), {"cluster_sizes": sizes, "clusters": clusters}, energy=energy
    )


def _sizes(parts: RankStack, importance: str) -> Tensor:
    """How long each unit is as a point to cluster, and in a centroid, float64, shape (R,)."""
    if importance == "none":
        return torch.ones_like(parts.scale)
    if importance == "size":
        return parts.scale
    norms = parts.scale.new_zeros(max(parts.adapters) + 1)
    norms = norms.index_add_(0, parts.owner, parts.scale.square()).sqrt()
    # sigma times its share of the adapter's norm: the length that the target's metric sees.
    return parts.scale.square() / norms[parts.owner]


def _cluster(
    parts: RankStack, size: Tensor, count: int, options: LegoRefitOptions, rng: np.random.Generator
) -> KMeansResult:
    """k-means on directions times sizes, blind to signs."""
    gram = size.new_zeros(len(size), len(size))
    if options.compare != "up":
        gram += parts.down @ parts.down.mT
    if options.compare != "down":
        gram += parts.up.mT @ parts.up
    gram = size[:, None] * gram * size
    # k-means++ draws by position: from the largest unit down, whatever the stack's order.
    order = parts.scale.argsort(descending=True, stable=True)
    found = kmeans(
        gram[order[:, None], order], count, rng=rng, restarts=options.restarts, sign_invariant=True
    )
    back = order.argsort().to(found.labels.device)
    return KMeansResult(found.labels[back], found.signs[back], found.inertia, found.iterations)


def _refitted(
    parts: RankStack, members: Tensor, target: Target, options: LegoRefitOptions
) -> tuple[Tensor, Tensor]:
    """Up (p, k) and down (k, q) of the clusters' units, nearest to the target."""
    if options.refit == "down":
        up = parts.up @ members.mT
        return up, _pinv(target.to_metric(up)) @ target.scaled
    down = members @ parts.down
    left = target.scaled @ _pinv(down)
    if options.refit == "both":
        for _ in range(options.rounds):
            down = _pinv(left) @ target.scaled
            left = target.scaled @ _pinv(down)
    return target.from_metric(left), down


def _pinv(x: Tensor) -> Tensor:
    """Pseudoinverse without the directions that are numerically zero."""
    u, s, vh = truncated_svd(x, None)
    inverse: Tensor = (vh.mT / s) @ u.mT
    return inverse


def _flattened(up: Tensor, down: Tensor, beta: float) -> Tensor:
    """`down` such that up @ down has flatter singular values, its norm kept, as Iso-C's."""
    if beta == 0:
        return down
    _, s, vh = thin_svd(up, down)
    alive = s > RTOL * s[:1]
    s, vh = s[alive], vh[alive]
    values = flatten(s, beta)
    ratio = values / s * (s.norm() / values.norm()) if s.numel() else s
    return ((down @ vh.mT) * ratio) @ vh


def _energy_kept(target: Target, up: Tensor, down: Tensor) -> float:
    """Share of the target's energy, in its metric, that the units hold."""
    whole = float(target.scaled.square().sum())
    kept = float((target.to_metric(up) @ down).square().sum())
    return min(kept / whole, 1.0) if whole > 0 else 1.0
