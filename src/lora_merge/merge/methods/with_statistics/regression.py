"""Least squares over collected inputs: RegMean, our form of it, and SSR."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import fsum

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.linalg.factors import thin_svd
from lora_merge.merge.methods.method import Job, Outcome
from lora_merge.merge.methods.spectral import RTOL, flattened, share_of_energy
from lora_merge.options import option

# Beyond this the adapters' outputs cancel, which is no shrinkage that should be undone.
_MOST_RESTORED = 2.0


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
    ridge: float = option(
        1e-6, "pull towards the plain sum, relative to the mean diagonal entry", above=0
    )
    beta: float = option(
        0.0,
        "0 leaves the singular values of the result, 1 makes them equal (norm kept, not published)",
        low=0,
        high=1,
    )
    restore: bool = option(
        False,
        "make what the result does to the collected inputs as large as what each adapter does, "
        "module by module (not published)",
    )


@dataclass(frozen=True)
class SsrOptions:
    """Parameters of `ssr`."""

    ridge: float = option(1e-4, "ridge relative to the mean diagonal entry", above=0)


def regmean(stack: RankStack, job: Job, options: RegMeanOptions) -> Outcome:
    """RegMean (Jin et al., ICLR 2023): min_X sum_i E_i |(X - D_i) x|^2 over collected inputs.

    X = sum_i D_i G_i S^-1 with S = sum_i G_i: every B_i stays and A_i becomes A_i G_i S^-1. Of a
    rank, the X that loses least is the cut of X S^(1/2), not that of X (reduced-rank regression).
    """
    grams = {i: needed(job, f"x.{i}", "regmean") for i in stack.adapters}
    shrunk = {
        i: options.off_diagonal * g + (1 - options.off_diagonal) * torch.diag(g.diagonal())
        for i, g in grams.items()
    }
    metric = sum_of(shrunk.values())
    ridge = float(options.ridge * metric.diagonal().mean())
    metric.diagonal().add_(ridge)
    root = torch.linalg.cholesky(metric)
    own = {i: stack.down[stack.owner == i].double() for i in stack.adapters}
    seen = torch.cat([a @ shrunk[i] + ridge * a for i, a in own.items()])
    weighted = stack.weighted(job.weights)
    alone = len(stack.adapters) < 2 or not (options.beta or options.restore)
    if alone and (job.rank is None or job.rank >= stack.num_units):
        down = torch.cholesky_solve(seen.mT, root).mT.to(stack.down.dtype)
        return Outcome(replace(weighted, down=down))
    up = weighted.up.double() * weighted.scale
    # X L with S = L L^T has the singular values of X S^(1/2).
    left, values, right = thin_svd(up, torch.linalg.solve_triangular(root, seen.mT, upper=False).mT)
    kept = values[: job.rank]
    back = torch.linalg.solve_triangular(root.mT, right[: len(kept)].mT, upper=True).mT
    result = RankStack.single(left[:, : len(kept)], back, kept)
    if not alone:
        moved = fsum(_moved(weighted.of_adapter(i), grams[i]) for i in own)
        result = flattened(result, options.beta)
        if options.restore:
            result = result.scaled(_restoring(moved, _moved(result, sum_of(grams.values()))))
    dtype = stack.down.dtype
    final = RankStack(result.down.to(dtype), result.up.to(dtype), result.scale, result.owner)
    return Outcome(final, energy=share_of_energy(kept, values))


def _moved(part: RankStack, gram: Tensor) -> float:
    """Mean square of what a delta does to inputs with this second moment."""
    down = part.down.double()
    products = part.gram_up * (down @ gram @ down.mT)
    return float(part.scale @ products @ part.scale)


def _restoring(wanted: float, found: float) -> float:
    """Factor that makes up for what the regression shrank; what cancels stays cancelled."""
    return min((wanted / found) ** 0.5, _MOST_RESTORED) if found > RTOL**2 * wanted else 1.0


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
