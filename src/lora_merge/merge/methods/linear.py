"""Weighted sums of deltas, and what PEFT calls linear."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.merge.methods.method import Job, Outcome, equal_ranks
from lora_merge.merge.methods.spaces import Basis
from lora_merge.options import option


def weighted_sum(stack: RankStack, job: Job, options: object) -> Outcome:
    """sum_i w_i Delta_i, exactly: the units side by side (concatenation is summation).

    Adapters that share a factor are summed in the other one, which is the same delta in fewer
    units: federated training with a frozen A (FFA-LoRA, arXiv 2403.12313), a shared A
    (HydraLoRA, arXiv 2404.19245), fixed B and A around a trained r x r (LoRA-SB, 2411.19557).
    """
    return Outcome(join_shared(stack.weighted(job.weights)))


def join_shared(stack: RankStack) -> RankStack:
    """The same delta with one set of units for all adapters whose A (or B) is the same tensor."""
    if len(stack.adapters) < 2:
        return stack
    groups = _equal_groups([stack.down[part] for part in _places(stack)])
    if len(groups) < len(stack.adapters):
        return RankStack.joined([_sum_up(stack, [stack.adapters[i] for i in g]) for g in groups])
    groups = _equal_groups([stack.up[:, part] for part in _places(stack)])
    if len(groups) < len(stack.adapters):
        turned = stack.transposed()
        parts = [_sum_up(turned, [stack.adapters[i] for i in g]) for g in groups]
        return RankStack.joined(parts).transposed()
    return stack


def _places(stack: RankStack) -> list[slice]:
    """Where each adapter's units are; owners do not decrease, so they are together."""
    ends = torch.bincount(stack.owner).cumsum(0).tolist()
    return [slice(ends[i - 1] if i else 0, ends[i]) for i in stack.adapters]


def linear_factors(stack: RankStack, job: Job, options: object) -> Outcome:
    """PEFT's `linear`: A and B averaged apart, which is not the average of the deltas.

    A* = sum_i sgn(c_i) sqrt|c_i| A_i, B* = sum_i sqrt|c_i| B_i with c_i = w_i s_i: N terms that are
    meant and N (N - 1) cross terms B_i A_j.

    Raises:
        MethodError: If the ranks differ.
    """
    shape = equal_ranks(
        stack, f"linear-factors at {job.module}", "use linear (on deltas, exact, any ranks)"
    )
    factor = stack.scale * job.weights[stack.owner]
    root = factor.abs().sqrt()
    down = (stack.down * (root * factor.sign())[:, None].to(stack.down.dtype)).unflatten(0, shape)
    up = (stack.up * root.to(stack.up.dtype)).unflatten(1, shape)
    return Outcome(RankStack.single(up.sum(dim=1), down.sum(dim=0)))


@dataclass(frozen=True)
class NpLoraOptions:
    """Parameters of `np-lora`."""

    mu: float = option(
        1.0, "0 is the sum; the larger, the less of the first is left where the second is", low=0
    )


def np_lora(stack: RankStack, job: Job, options: NpLoraOptions) -> Outcome:
    """NP-LoRA (arXiv 2511.11051): content beside style, D_c (I - mu / (1 + mu) V V^T) + D_s.

    V spans the rows of the style's delta: what the content does to the inputs that the style uses
    is shrunk by 1 / (1 + mu).

    Args:
        stack: Content (owner 0) and style (owner 1).
        job: Weights.
        options: How much is projected out.
    """
    stack = stack.weighted(job.weights)
    content, style = stack.of_adapter(0), stack.of_adapter(1)
    if not (content.num_units and style.num_units):
        return Outcome(stack)
    alive = style.units((style.scale != 0) & (style.gram_up.diagonal() > 0))
    basis = Basis.of(alive.down.mT, alive.gram_down, alive.down)
    inside = basis.lift(basis.coordinates_of(content.down.mT, content.down)).mT
    share = options.mu / (1 + options.mu)
    down = content.down - share * inside.to(content.down.dtype)
    return Outcome(RankStack.joined([replace(content, down=down), style]))


def _equal_groups(factors: list[Tensor]) -> list[list[int]]:
    """Indices of equal tensors together, in order of first appearance."""
    groups: list[list[int]] = []
    alike: dict[tuple[object, ...], list[list[int]]] = {}
    for index, factor in enumerate(factors):
        # Almost all differ in their first entries already.
        key = (factor.shape, *factor[:1, :8].flatten().tolist())
        for group in alike.setdefault(key, []):
            if torch.equal(factors[group[0]], factor):
                group.append(index)
                break
        else:
            groups.append([index])
            alike[key].append(groups[-1])
    return groups


def _sum_up(stack: RankStack, owners: list[int]) -> RankStack:
    """Adapters with one `down`: their scaled `up`s added."""
    parts = [stack.of_adapter(owner) for owner in owners]
    if len(parts) == 1:
        return parts[0]
    up = torch.stack([p.up.double() * p.scale for p in parts]).sum(dim=0)
    first = parts[0]
    up = up.to(torch.promote_types(first.up.dtype, torch.float32))
    return RankStack(first.down, up, torch.ones_like(first.scale), first.owner)
