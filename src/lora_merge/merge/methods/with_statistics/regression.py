"""Least squares over collected inputs: RegMean and SSR."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.merge.methods.method import Job, Outcome
from lora_merge.options import option


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of tensors of one shape."""
    first, *rest = tensors
    total = first.clone()
    for tensor in rest:
        total += tensor
    return total


@dataclass(frozen=True)
class RegMeanOptions:
    """Parameters of `regmean`."""

    off_diagonal: float = option(
        0.9, "factor on the off-diagonal entries of the input Grams", low=0, high=1
    )
    ridge: float = option(1e-6, "ridge relative to the mean diagonal entry", above=0)


@dataclass(frozen=True)
class SsrOptions:
    """Parameters of `ssr`."""

    ridge: float = option(1e-4, "ridge relative to the mean diagonal entry", above=0)


def regmean(stack: RankStack, job: Job, options: RegMeanOptions) -> Outcome:
    """RegMean (Jin et al., ICLR 2023): min_X sum_i E_i |(X - D_i) x|^2 over collected inputs.

    X = sum_i D_i G_i (sum_i G_i)^-1: every B_i stays and A_i becomes A_i G_i S^-1.
    """
    grams = {i: needed(job, f"x.{i}", "regmean") for i in stack.adapters}
    shrunk = {
        i: options.off_diagonal * g + (1 - options.off_diagonal) * torch.diag(g.diagonal())
        for i, g in grams.items()
    }
    metric = sum_of(shrunk.values())
    ridge = options.ridge * metric.diagonal().mean()
    down = torch.cat(
        [
            stack.down[stack.owner == i].to(g) @ g + ridge * stack.down[stack.owner == i].to(g)
            for i, g in shrunk.items()
        ]
    )
    metric = metric + ridge * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    routed = torch.linalg.solve(metric, down.mT).mT.to(stack.down.dtype)
    weighted = stack.weighted(job.weights)
    return Outcome(RankStack(routed, weighted.up, weighted.scale, weighted.owner))


def ssr(stack: RankStack, job: Job, options: SsrOptions) -> Outcome:
    """SSR-Merge (ICML 2026): a router between A_c and B_c from R-dimensional statistics.

    With z = A_c x, the router Q (sum_k Z_k + ridge)^-1 predicts from all z what the active
    adapter's own z is; Q's rows of adapter k are those of Z_k. A stays, B becomes B Q (...)^-1.
    """
    moments = moments_of(stack, job, "ssr")
    total = sum_of(moments.values())
    ridge = options.ridge * total.diagonal().mean()
    own = torch.cat([z[stack.owner == i] for i, z in moments.items()])
    identity = torch.eye(len(total), dtype=total.dtype, device=total.device)
    router = torch.linalg.solve(total + ridge * identity, (own + ridge * identity).mT).mT
    weighted = stack.weighted(job.weights)
    up = (weighted.up.to(router) * weighted.scale) @ router
    return Outcome(RankStack.single(up.to(stack.up.dtype), stack.down))


def moments_of(stack: RankStack, job: Job, method: str) -> dict[int, Tensor]:
    """Mean of z z^T over each adapter's inputs, z = A_c x in the stack's order of units, float64.

    Raises:
        MethodError: If they were not collected.
    """
    owner = needed(job, "owner", method).to(stack.owner.device)
    present = torch.isin(owner, stack.owner)
    # The file may number the adapters otherwise; inside an adapter the order is the same.
    order = torch.argsort(owner[present], stable=True)
    found = {i: needed(job, f"z.{i}", method)[present][:, present] for i in stack.adapters}
    return {i: z[order][:, order] for i, z in found.items()}


def needed(job: Job, key: str, method: str) -> Tensor:
    """One tensor of a module's statistics.

    Raises:
        MethodError: If it was not collected.
    """
    if key not in job.statistics:
        extra = " with inputs=True" if key.startswith("x") else ""
        raise MethodError(
            f"method {method} needs statistics of what {job.module} sees, and there are none",
            f"make them with lora_merge.collect_statistics{extra} and give the file as statistics",
        )
    return job.statistics[key]
