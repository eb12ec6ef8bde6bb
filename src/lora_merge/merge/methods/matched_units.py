"""Methods that match or re-weight single rank units: RobustMerge and aligned averaging.

They see A and B as stored, so a change of factors (A -> G A, B -> B G^-1) changes the answer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.merge.calibrate import shares
from lora_merge.merge.methods.method import Job, Outcome, equal_ranks
from lora_merge.options import option

_RESIZE = "resize the adapters to one rank first, or use a method on deltas"


@dataclass(frozen=True)
class RobustMergeOptions:
    """Parameters of `robustmerge`."""

    density: float = option(0.2, "share of entries kept in each factor", above=0, high=1)
    quantile: float = option(
        0.8, "the direction scales are clamped from below at this quantile", low=0, high=1
    )
    cross_terms: bool = option(
        True, "sum A and B apart as the authors do; without, sum each adapter's B diag(s) A"
    )


def robustmerge(stack: RankStack, job: Job, options: RobustMergeOptions) -> Outcome:
    """RobustMerge (Zeng et al., NeurIPS 2025): pruned factors, weak directions scaled up.

    s_i[j] = |A_i[j]|_1 / |pruned A_i[j]|_1, clamped, then normalised over adapters per rank index:
    A* = sum_i A~_i, B* = sum_i B~_i diag(s_i). The scaling and the weight of an adapter go into its
    B. The authors' factor 2 on both factors is left to the scale of the merge.

    Raises:
        MethodError: If ranks differ.
    """
    count, rank = equal_ranks(stack, f"robustmerge at {job.module}", _RESIZE)
    down = stack.down.unflatten(0, (count, rank))
    up = stack.up.unflatten(1, (count, rank)).movedim(1, 0)
    kept_down, kept_up = _largest(down, options.density), _largest(up, options.density)
    whole, left = down.abs().sum(dim=2).double(), kept_down.abs().sum(dim=2).double()
    # A row that pruning emptied has no finite scale and nothing left to scale.
    ratio = torch.where(left > 0, whole / left, 0.0)
    floor = torch.quantile(ratio, options.quantile, dim=1, keepdim=True)
    ratio = torch.maximum(ratio, floor)
    ratio = ratio / ratio.sum(dim=0).clamp_min(1e-300)
    factor = (stack.scale * job.weights[stack.owner]).unflatten(0, (count, rank)) * ratio
    scaled = kept_up * factor[:, None, :].to(up.dtype)
    if options.cross_terms:
        return Outcome(RankStack.single(scaled.sum(dim=0), kept_down.sum(dim=0)))
    return Outcome(
        RankStack(
            kept_down.flatten(0, 1),
            scaled.movedim(0, 1).flatten(1),
            torch.ones_like(stack.scale),
            stack.owner,
        )
    )


def aligned_mean(stack: RankStack, job: Job, options: object) -> Outcome:
    """Average rank units after matching them (what M-SMoE, arXiv 2310.01334, does to neurons).

    Units of each adapter are assigned to those of the adapter with the largest weight, maximising
    sum of <a_j, a_k> <b_j, b_k>, which does not depend on signs; weights are usage frequencies.

    Raises:
        MethodError: If ranks differ or the weights add up to 0.
    """
    count, rank = equal_ranks(stack, f"aligned-mean at {job.module}", _RESIZE)
    share = shares(stack, job)
    root = stack.scale.abs().sqrt()
    norm_up, norm_down = stack.gram_up.diagonal().sqrt(), stack.gram_down.diagonal().sqrt()
    alive = (norm_up > 0) & (norm_down > 0)
    balance = torch.where(alive, (norm_up / norm_down.clamp_min(1e-300)).sqrt(), 0.0)
    to_down = root * balance
    to_up = torch.where(alive, root * stack.scale.sign() / balance.clamp_min(1e-300), 0.0)
    reference = int(share.abs().argmax())
    places = range(reference * rank, (reference + 1) * rank)
    mix = torch.zeros(2, rank, stack.num_units, dtype=torch.float64, device=stack.down.device)
    for adapter in range(count):
        own = range(adapter * rank, (adapter + 1) * rank)
        match, sign = _match(stack, to_down, to_up, list(places), list(own))
        index = torch.tensor([own[j] for j in match], device=mix.device)
        rows = torch.arange(rank, device=mix.device)
        mix[0, rows, index] = share[adapter] * sign * to_down[index]
        mix[1, rows, index] = share[adapter] * sign * to_up[index]
    down = mix[0].to(stack.down.dtype) @ stack.down
    up = stack.up @ mix[1].mT.to(stack.up.dtype)
    return Outcome(RankStack.single(up, down))


def _match(
    stack: RankStack, to_down: Tensor, to_up: Tensor, places: list[int], own: list[int]
) -> tuple[list[int], Tensor]:
    """Which own unit belongs to each place, and the sign it joins with."""
    from scipy.optimize import linear_sum_assignment  # 0.8 s to import, for this alone

    a = to_down[places][:, None] * stack.gram_down[places][:, own] * to_down[own]
    b = to_up[places][:, None] * stack.gram_up[places][:, own] * to_up[own]
    _, match = linear_sum_assignment((a * b).cpu().numpy(), maximize=True)
    chosen = torch.tensor(match, device=a.device)
    rows = torch.arange(len(places), device=a.device)
    sign = torch.where(a[rows, chosen] + b[rows, chosen] < 0, -1.0, 1.0).to(torch.float64)
    return match.tolist(), sign


def _largest(x: Tensor, density: float) -> Tensor:
    """The share of largest entries of each x[i], the rest zero."""
    flat = x.flatten(1)
    keep = max(int(density * flat.shape[1]), 1)
    bound = flat.abs().topk(keep, dim=1).values[:, -1]
    return torch.where(x.abs() >= bound[:, None, None], x, 0.0)
