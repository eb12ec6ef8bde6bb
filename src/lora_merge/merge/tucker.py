"""Compress then merge: the two subspaces of a given rank that hold most of every adapter."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_merge.adapters import RankStack
from lora_merge.merge.method import Job, Outcome, single
from lora_merge.merge.options import option
from lora_merge.merge.spectral import (
    IsoOptions,
    TsvOptions,
    iso_c,
    truncated_svd,
    tsv,
    weighted_parts,
)


@dataclass(frozen=True)
class CtmOptions:
    """Parameters of `ctm`."""

    inner: Literal["task-arithmetic", "iso-c", "tsv"] = option(
        "task-arithmetic", "what merges the adapters inside the shared subspaces"
    )
    beta: float = option(
        0.25, "1 lets each adapter count by its norm, 0 counts all alike", low=0, high=1
    )
    iterations: int = option(100, "largest number of alternating steps", low=1)
    # The published 1e-6 holds 0.05 % more energy and takes seven times as long (R = 64, rank 16).
    tolerance: float = option(1e-4, "stop when the share of energy held grows by less", above=0)


def compress_then_merge(stack: RankStack, job: Job, options: CtmOptions) -> Outcome:
    """CtM (ICML 2026): Tucker-2 by alternating eigenvectors, then merge r x r coordinates.

    The result has the rank asked for by construction: nothing is cut off after the merge.
    """
    parts = [part.delta() for part in weighted_parts(stack, job)]
    norms = torch.stack([part.norm() for part in parts])
    wanted = options.beta * norms + (1 - options.beta) * norms.mean()
    scaled = torch.stack(
        [p * (w / n if n > 0 else 0.0) for p, w, n in zip(parts, wanted, norms, strict=True)]
    )
    rank = job.rank or stack.num_units
    left, right, held = tucker2(scaled, rank, options.iterations, options.tolerance)
    inner = torch.stack([left.mT @ part @ right for part in parts])
    merged = _merge_inside(inner, job, options)
    return Outcome(single(left @ merged, right.mT), energy=held)


def tucker2(
    x: Tensor, rank: int, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, float]:
    """Orthonormal U, V that maximise sum_i |U^T X_i V|^2 (HOOI, De Lathauwer et al. 2000).

    Args:
        x: Shape (N, p, q), float64.
        rank: Columns of U and of V, where x has so many.
        iterations: Largest number of steps.
        tolerance: Stop when the share of energy held grows by less.

    Returns:
        U (p, rank), V (q, rank) and the share of energy held.
    """
    total = float(x.square().sum())
    right = _leading(torch.einsum("npq,npr->qr", x, x), rank)
    held = 0.0
    left = right
    for _ in range(iterations):
        y = x @ right
        left = _leading(torch.einsum("npk,nqk->pq", y, y), rank)
        z = left.mT @ x
        right = _leading(torch.einsum("nkp,nkq->pq", z, z), rank)
        before, held = held, float((z @ right).square().sum()) / total if total else 1.0
        if held - before <= tolerance:
            break
    return left, right, held


def _merge_inside(inner: Tensor, job: Job, options: CtmOptions) -> Tensor:
    """Merge (N, k, k) coordinates into one (k, k)."""
    if options.inner == "task-arithmetic":
        return inner.sum(dim=0)
    triplets = [truncated_svd(part, None) for part in inner]
    small = RankStack.of([(s[:, None] * vh, u, 1.0) for u, s, vh in triplets])
    ones = torch.ones(len(triplets), dtype=torch.float64, device=inner.device)
    inside = Job(job.module, None, ones, job.seed, "core")
    if options.inner == "iso-c":
        return iso_c(small, inside, IsoOptions()).stack.delta()
    return tsv(small, inside, TsvOptions()).stack.delta()


def _leading(x: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, shape (p, rank)."""
    vectors: Tensor = torch.linalg.eigh(x).eigenvectors
    return vectors[:, -rank:].flip(1)
