"""LoRA-LEGO: cluster rank-wise units, let each centroid be a unit of the merged adapter.

Zhao et al., ICLR 2025, arXiv 2409.16167. Everything k-means needs is in the two R x R Grams of the
stack, so the clustering never touches vectors of the model's width.
"""

from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.linalg.kmeans import kmeans
from lora_merge.merge.methods.lego_options import LegoOptions
from lora_merge.merge.methods.method import Job, Outcome

# Singular values below this fraction of the largest are noise of the Gram (float64 squared).
_RANK_ONE_RTOL = 1e-7


@dataclass(frozen=True, eq=False)
class LegoResult:
    """The merged units and where they came from.

    Attributes:
        stack: k units, all with owner 0.
        labels: Cluster of each source unit, int64, shape (R,).
        mixes: Coefficients of the centroids' halves in the source units, float64, (down, up), each
            (k, R).
        source: The units that were clustered: the stack's own, or what replaced them (`canonical`).
    """

    stack: RankStack
    labels: Tensor
    mixes: tuple[Tensor, Tensor]
    source: RankStack

    @property
    def cluster_sizes(self) -> list[int]:
        """Members of each cluster."""
        return torch.bincount(self.labels, minlength=self.stack.num_units).tolist()


def lego(
    stack: RankStack, k: int, *, options: LegoOptions | None = None, rng: np.random.Generator
) -> LegoResult:
    """Merge a stack into k units by clustering.

    Args:
        stack: Units of all adapters, scale already multiplied by the adapters' weights.
        k: Rank of the result, at most R.
        options: Variant; default: as published.
        rng: Source of the k-means++ starts.

    Raises:
        MethodError: If k is not between 1 and R; says the largest k.
    """
    options = options or LegoOptions()
    if options.centroid == "rank-one":  # a matrix has no gauge, so neither may its members
        options = replace(options, fold_scale=True, balance=True)
    mean_rank = stack.num_units / max(len(stack.adapters), 1)
    if options.canonical:
        stack = _singular_units(stack)
    if not 1 <= k <= stack.num_units:
        raise MethodError(
            f"cannot cluster {stack.num_units} units into {k}",
            f"the largest rank here is {stack.num_units}",
        )
    to_down, to_up, scale = _gauge(stack, options)
    labels, signs = _assign(stack, to_down, to_up, k, options, rng)
    members = torch.zeros(k, stack.num_units, dtype=torch.float64, device=stack.down.device)
    members[labels, torch.arange(stack.num_units, device=labels.device)] = 1.0
    members /= members.sum(dim=1, keepdim=True)
    if options.centroid == "mean":
        down_mix = members * signs * to_down
        up_mix = members * signs * to_up
        scale = members @ scale
    else:
        down_mix, up_mix = _rank_one_mixes(stack, members)
        scale = members @ scale  # all 1: the scale is in the matrices
    down = down_mix.to(stack.down.dtype) @ stack.down
    up = stack.up @ up_mix.mT.to(stack.up.dtype)
    if options.reweight_parameters:
        factor = _peak_ratio(stack, to_down, to_up, members, down, up)
        scale = scale * factor.square()  # both halves grow by the factor
    if options.reweight_output != "none":
        reference = mean_rank if options.reweight_output == "single" else stack.num_units
        scale = scale * sqrt(reference / k)
    owner = torch.zeros(k, dtype=torch.int64, device=labels.device)
    return LegoResult(RankStack(down, up, scale, owner), labels, (down_mix, up_mix), stack)


def lego_units(stack: RankStack, job: Job, options: LegoOptions) -> Outcome:
    """`lego` as a row of the table of methods: at the rank asked for, saying who went where."""
    weighted = stack.weighted(job.weights)
    rank = min(job.rank or stack.num_units, stack.num_units)
    result = lego(weighted, rank, options=options, rng=job.rng())
    details = {"cluster_sizes": result.cluster_sizes, "clusters": _members(result)}
    return Outcome(result.stack, details, mixes=result.mixes if result.source is weighted else None)


def _members(result: LegoResult) -> list[list[list[Any]]]:
    """`members_of` from the source's Grams: no vector of the model's width is touched again."""
    (down_mix, up_mix), source, scale = result.mixes, result.source, result.stack.scale
    down, up = down_mix @ source.gram_down, up_mix @ source.gram_up
    squares = (down * down_mix).sum(dim=1) * (up * up_mix).sum(dim=1)
    norms = (source.gram_up.diagonal() * source.gram_down.diagonal()).clamp_min(0).sqrt()
    lengths = squares.clamp_min(0).sqrt() * scale.abs()
    return members_of(source, result.labels, (down * up).mT * scale, norms, lengths)


def members_of(
    units: RankStack, labels: Tensor, products: Tensor, norms: Tensor, lengths: Tensor
) -> list[list[list[Any]]]:
    """For each unit of a result, who went into it and what is left of that.

    Args:
        units: The units that were clustered.
        labels: Cluster of each, int64, shape (R,); cluster c is unit c of the result.
        products: <unit j without its scale, unit c of the result>, float64, shape (R, k).
        norms: Norm of each unit without its scale, shape (R,).
        lengths: Norm of each unit of the result, shape (k,).

    Returns:
        For each unit of the result its members as [adapter, which of its units, sign, cosine with
        the result's unit, share of the member that the whole result still does, share of the
        adapter's energy that the member is].
    """
    labels = labels.to(units.scale.device)
    own = products.gather(1, labels[:, None])[:, 0] * units.scale.sign()
    alike = own / (norms * lengths[labels]).clamp_min(1e-300)
    kept = products.sum(dim=1) / (units.scale * norms.square())
    energy = units.scale.square() * norms.square()
    total = energy.new_zeros(max(units.adapters, default=0) + 1)
    share = energy / total.index_add_(0, units.owner, energy)[units.owner].clamp_min(1e-300)
    numbers = torch.stack((alike.abs(), kept, share), dim=1)
    rounded = torch.where(numbers.isfinite(), numbers, 0.0).round(decimals=4).tolist()
    signs = torch.where(alike < 0, -1, 1).tolist()
    clusters: list[list[list[Any]]] = [[] for _ in range(len(lengths))]
    seen: dict[int, int] = {}
    # Lists, not tensors: one number of a tensor at a time took a tenth of a whole merge.
    members = zip(units.owner.tolist(), labels.tolist(), signs, rounded, strict=True)
    for owner, label, sign, row in members:
        place = seen[owner] = seen.get(owner, -1) + 1
        clusters[label].append([owner, place, sign, *row])
    return clusters


def _gauge(stack: RankStack, options: LegoOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Factors on each a_j and b_j that fix the unit's gauge, and the scale that remains."""
    one = torch.ones(stack.num_units, dtype=torch.float64, device=stack.down.device)
    to_down, to_up, scale = one, one, stack.scale
    if options.fold_scale:
        to_down = stack.scale.abs().sqrt()
        to_up = to_down * stack.scale.sign()
        scale = one
    if options.balance:
        norm_down = to_down * stack.gram_down.diagonal().sqrt()
        norm_up = to_up.abs() * stack.gram_up.diagonal().sqrt()
        alive = (norm_down > 0) & (norm_up > 0)
        ratio = torch.where(alive, (norm_up / norm_down).sqrt(), 0.0)  # a zero unit becomes [0; 0]
        to_down = to_down * ratio
        to_up = torch.where(alive, to_up / ratio, 0.0)
    return to_down, to_up, scale


def _assign(
    stack: RankStack,
    to_down: Tensor,
    to_up: Tensor,
    k: int,
    options: LegoOptions,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Cluster label and sign of every unit, int64 and float64, shape (R,)."""
    gram = _rescaled(stack.gram_down, to_down, options.units)
    gram += _rescaled(stack.gram_up, to_up, options.units)
    # k-means++ draws by position; sorting by size makes the draw independent of the stack's order.
    order = gram.diagonal().argsort(descending=True, stable=True)
    gram = gram[order[:, None], order]
    found = kmeans(
        gram,
        k,
        rng=rng,
        restarts=options.restarts,
        sign_invariant=options.sign_invariant,
    )
    labels, signs = torch.empty_like(order), torch.empty_like(to_down)
    labels[order] = found.labels.to(order.device)
    signs[order] = found.signs.to(order.device)
    return labels, signs


def _rank_one_mixes(stack: RankStack, members: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of the leading singular pair of each cluster's mean rank-one matrix.

    Returns (down, up) mixes, each (k, R): row c combines the units of cluster c, sqrt(sigma) each.
    """
    down_mix, up_mix = torch.zeros_like(members), torch.zeros_like(members)
    for cluster, row in enumerate(members):
        index = row.nonzero().flatten()
        weight = (stack.scale * row)[index]
        root_up, back_up = _root(stack.gram_up[index][:, index])
        root_down, back_down = _root(stack.gram_down[index][:, index])
        u, s, vh = torch.linalg.svd((root_up * weight) @ root_down.mT)
        up_mix[cluster, index] = s[0].sqrt() * (back_up @ u[:, 0])
        down_mix[cluster, index] = s[0].sqrt() * (back_down @ vh[0])
    return down_mix, up_mix


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(r, p) with r^T r = gram and x @ p orthonormal for the vectors x behind the Gram."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _RANK_ONE_RTOL**2 * values[-1:].clamp_min(0)
    size = torch.where(kept, values, 0.0).sqrt()
    inverse = torch.where(kept, 1 / size, 0.0)
    return size[:, None] * vectors.mT, vectors * inverse


def _peak_ratio(
    stack: RankStack, to_down: Tensor, to_up: Tensor, members: Tensor, down: Tensor, up: Tensor
) -> Tensor:
    """Mean largest entry of the members over the centroid's largest entry, shape (k,)."""
    wanted = members @ torch.maximum(
        to_down.abs() * _largest_entry(stack.down, 1), to_up.abs() * _largest_entry(stack.up, 0)
    )
    reached = torch.maximum(_largest_entry(down, 1), _largest_entry(up, 0))
    return torch.where(reached > 0, wanted / reached, 1.0)


def _largest_entry(x: Tensor, dim: int) -> Tensor:
    """Largest |x| along a dimension, float64; ten times faster here than vector_norm(inf)."""
    return torch.maximum(x.amax(dim), -x.amin(dim)).double()


def _singular_units(stack: RankStack) -> RankStack:
    """Each adapter's units replaced by its singular units, sqrt(sigma) in both halves."""
    factors = []
    owners = []
    for owner in stack.adapters:
        part = stack.of_adapter(owner)
        u, s, vh = part.svd()
        root = s.sqrt().to(u.dtype)
        factors.append((root[:, None] * vh, u * root, 1.0))
        owners.append(torch.full((len(s),), owner, device=stack.owner.device))
    merged = RankStack.of(factors)
    return RankStack(merged.down, merged.up, merged.scale, torch.cat(owners))


def _rescaled(gram: Tensor, factor: Tensor, units: str) -> Tensor:
    """The Gram of the vectors times their factors; at length one if `units` are normalized."""
    if units == "normalized":
        size = gram.diagonal().sqrt()
        factor = torch.where((factor != 0) & (size > 0), factor.sign() / size, 0.0)
    # In place: with a thousand units, Grams are what a worker's memory goes into.
    return gram.clone().mul_(factor[:, None]).mul_(factor)
