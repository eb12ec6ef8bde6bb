"""Every method once more, on dense float64 matrices and from the papers' formulas: the oracles.

Nothing here imports the methods. `deltas` are the adapters' dense deltas, weights not folded in.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Deltas = Sequence[Tensor]


def weighted(deltas: Deltas, weights: Sequence[float]) -> list[Tensor]:
    return [w * d for d, w in zip(deltas, weights, strict=True)]


def total(deltas: Deltas, weights: Sequence[float]) -> Tensor:
    return torch.stack(weighted(deltas, weights)).sum(dim=0)


def mean(deltas: Deltas, weights: Sequence[float]) -> Tensor:
    return total(deltas, weights) / sum(weights)


def truncated(x: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def slerp(deltas: Deltas, weights: Sequence[float]) -> Tensor:
    first, second = (d.flatten() for d in deltas)
    t = weights[1] / sum(weights)
    angle = torch.arccos(first @ second / first.norm() / second.norm())
    mixed = torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second
    return (mixed / torch.sin(angle)).reshape(deltas[0].shape)


def multislerp(deltas: Deltas, weights: Sequence[float]) -> Tensor:
    """mergekit's steps, tangent space and all."""
    share = np.array(weights) / sum(weights)
    flat = torch.stack([d.flatten() for d in deltas])
    norms = flat.norm(dim=1)
    units = flat / norms[:, None]
    w = torch.tensor(share)
    centre = (w[:, None] * units).sum(dim=0)
    centre = centre / centre.norm()
    tangent = units - (units @ centre)[:, None] * centre
    step = (w[:, None] * tangent).sum(dim=0)
    length = step.norm()
    direction = torch.cos(length) * centre + torch.sinc(length / np.pi) * step
    return (direction * (w * norms).sum()).reshape(deltas[0].shape)


def karcher(deltas: Deltas, weights: Sequence[float]) -> Tensor:
    w = torch.tensor(np.array(weights) / sum(weights))
    flat = torch.stack([d.flatten() for d in deltas])
    norms = flat.norm(dim=1)
    units = flat / norms[:, None]
    place = (w[:, None] * units).sum(dim=0)
    place = place / place.norm()
    for _ in range(200):
        cosine = (units @ place).clamp(-1, 1)
        angle = torch.arccos(cosine)
        logs = (units - cosine[:, None] * place) * (angle / torch.sin(angle))[:, None]
        step = (w[:, None] * logs).sum(dim=0)
        if step.norm() < 1e-14:
            break
        place = torch.cos(step.norm()) * place + torch.sin(step.norm()) * step / step.norm()
    return (place * (w * norms).sum()).reshape(deltas[0].shape)


def model_stock(deltas: Deltas, weights: Sequence[float]) -> Tensor:
    flat = [d.flatten() for d in deltas]
    cosines = [
        float(a @ b / a.norm() / b.norm()) for i, a in enumerate(flat) for b in flat[i + 1 :]
    ]
    cosine, count = float(np.mean(cosines)), len(deltas)
    t = min(max(count * cosine / (1 + (count - 1) * cosine), 0), 1) if cosine > 0 else 0.0
    return t * mean(deltas, weights)


def polar(x: Tensor, rank: int) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u[:, :rank] @ vh[:rank]


def tsv(deltas: Deltas, weights: Sequence[float]) -> Tensor:
    """TSV-M with each task's numerical rank instead of d / N."""
    lefts, values, rights = [], [], []
    for delta in weighted(deltas, weights):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        rank = int((s > 1e-9 * s[0]).sum())
        lefts.append(u[:, :rank])
        values.append(s[:rank])
        rights.append(vh[:rank])
    left, right = torch.cat(lefts, dim=1), torch.cat(rights)
    left = polar(left, int(torch.linalg.matrix_rank(left)))
    right = polar(right, int(torch.linalg.matrix_rank(right)))
    return left @ torch.diag(torch.cat(values)) @ right


def dc_merge(
    deltas: Deltas, weights: Sequence[float], smoothing: str = "flat", density: float | None = None
) -> Tensor:
    """DC-Merge, step by step, each task's numerical rank for the authors' 16."""
    lefts, rights, smooth, ranks = [], [], [], []
    for delta in weighted(deltas, weights):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        r = int((s > 1e-9 * s[0]).sum())
        ratio = {"flat": 1.0, "linear": min(5.0, float(s[0] / s[r - 1]))}.get(smoothing)
        line = s[:r] if ratio is None else torch.linspace(ratio, 1, r, dtype=s.dtype)
        smooth.append((u[:, :r] * (line * s[:r].sum() / line.sum())) @ vh[:r])
        lefts.append(u[:, :r])
        rights.append(vh[:r])
        ranks.append(r)
    left, right = torch.cat(lefts, dim=1), torch.cat(rights)
    left = polar(left, int(torch.linalg.matrix_rank(left)))
    right = polar(right, int(torch.linalg.matrix_rank(right)))
    cores = []
    for delta, r in zip(smooth, ranks, strict=True):
        core = left.mT @ delta @ right.mT
        count = r if density is None else max(int(density * core.numel()), 1)
        bound = core.abs().flatten().sort(descending=True).values[count - 1]
        cores.append(torch.where(core.abs() >= bound, core, 0.0))
    stacked = torch.stack(cores)
    agree = stacked.sign() == stacked.sum(dim=0).sign()
    merged = (stacked * agree).sum(dim=0) / (agree & (stacked != 0)).sum(dim=0).clamp(min=1)
    mask = torch.block_diag(*[torch.ones(r, r, dtype=merged.dtype) for r in ranks])
    return left @ (merged * mask) @ right


def esm(
    deltas: Deltas,
    weights: Sequence[float],
    inputs: Sequence[Tensor],
    each: int | None = None,
    power: float = 2.0,
    spread: float = 0.15,
) -> Tensor:
    """ESM of one module from the inputs themselves, without the scaling between modules."""
    parts = weighted(deltas, weights)
    mean_norm = torch.stack([d.norm() for d in parts]).mean()
    lefts, rights = [], []
    for delta, x in zip(parts, inputs, strict=True):
        shift = (delta @ x).mT  # a row per token, as in the authors' hooks
        _, s, vh = torch.linalg.svd(shift, full_matrices=False)
        k = min(int((s > 1e-9 * s[0]).sum()), each or len(s))
        variance = s[:k] ** 2 / (len(shift) - 1)
        along = (variance / variance.mean()) ** spread
        along = along / along.mean()
        lefts.append(vh[:k].mT * along)
        rights.append(along[:, None] * (vh[:k] @ delta) * (delta.norm() / mean_norm) ** power)
    left, right = torch.cat(lefts, dim=1), torch.cat(rights)
    columns = right.norm(dim=0)
    right = right * (columns / columns.mean()) ** power
    both = []
    for x in (left, right):
        rank = int(torch.linalg.matrix_rank(x))
        both.append(polar(x, rank) * torch.linalg.svdvals(x).mean())
    return both[0] @ both[1]


def iso_c(deltas: Deltas, weights: Sequence[float], rank: int | None = None) -> Tensor:
    u, s, vh = torch.linalg.svd(total(deltas, weights), full_matrices=False)
    size = int((s > 1e-9 * s[0]).sum())
    size = min(size, rank or size)
    return s[:size].mean() * u[:, :size] @ vh[:size]


def iso_cts(deltas: Deltas, weights: Sequence[float], rank: int, common: float = 0.8) -> Tensor:
    """The common directions of the sum, then each task's own beyond them; one singular value."""
    u, s, vh = torch.linalg.svd(total(deltas, weights), full_matrices=False)
    own = min(max(round((1 - common) * rank / len(deltas)), 1), rank // len(deltas))
    shared = rank - own * len(deltas)
    lefts, values, rights = [u[:, :shared]], [s[:shared]], [vh[:shared]]
    for delta in weighted(deltas, weights):
        rest = delta - u[:, :shared] @ u[:, :shared].mT @ delta
        task_u, task_s, task_vh = torch.linalg.svd(rest, full_matrices=False)
        lefts.append(task_u[:, :own])
        values.append(task_s[:own])
        rights.append(task_vh[:own])
    left, right = polar(torch.cat(lefts, dim=1), rank), polar(torch.cat(rights), rank)
    return torch.cat(values).mean() * left @ right


def knots(deltas: Deltas) -> tuple[Tensor, list[Tensor], Tensor]:
    """(left, coordinates, right) of KnOTS: the left singular basis of [D_1 ... D_N]."""
    u, s, _ = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    u = u[:, s > 1e-9 * s[0]]
    return u, [u.mT @ d for d in deltas], torch.eye(deltas[0].shape[1], dtype=u.dtype)


def core_space(
    deltas: Deltas, factors: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """(left, coordinates, right) of Core Space, from the unscaled (A_i, B_i)."""
    u, s, _ = torch.linalg.svd(torch.cat([b for _, b in factors], dim=1), full_matrices=False)
    u = u[:, s > 1e-9 * s[0]]
    _, t, vh = torch.linalg.svd(torch.cat([a for a, _ in factors]), full_matrices=False)
    vh = vh[t > 1e-9 * t[0]]
    return u, [u.mT @ d @ vh.mT for d in deltas], vh


def wudi_loss(x: Tensor, deltas: Deltas, side: str) -> Tensor:
    loss = x.new_zeros(())
    for delta in deltas:
        product = (x - delta) @ delta.mT if side == "input" else delta.mT @ (x - delta)
        loss = loss + product.square().sum() / delta.square().sum()
    return loss


def wudi_output(
    deltas: Deltas, weights: Sequence[float], ridge: float, beta: float, rank: int | None = None
) -> Tensor:
    """The normal equations on the outputs, cut in their metric, singular values flattened."""
    parts = weighted(deltas, weights)
    metrics = [d @ d.mT / d.square().sum() for d in parts]
    size = int(torch.linalg.matrix_rank(torch.cat(parts, dim=1)))
    pull = ridge * float(sum(h.trace() for h in metrics)) / size * torch.eye(len(parts[0])).double()
    wanted = torch.stack([(h + pull) @ d for h, d in zip(metrics, parts, strict=True)]).sum(dim=0)
    values, vectors = torch.linalg.eigh(torch.stack(metrics).sum(dim=0) + pull)
    root = vectors @ values.sqrt().diag() @ vectors.mT
    x = torch.linalg.solve(root, truncated(torch.linalg.solve(root, wanted), rank or size))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    keep = s > 1e-9 * s[0]
    flat = s[keep] ** (1 - beta)
    return (u[:, keep] * (flat * s.norm() / flat.norm())) @ vh[keep]


def pico(ups: Sequence[Tensor]) -> list[Tensor]:
    """Scaled B_i after the calibration."""
    u, s, _ = torch.linalg.svd(torch.cat(list(ups), dim=1), full_matrices=False)
    share = s**2 / (s**2).sum()
    alpha = 1 / (1 + (len(ups) - 1) * share)
    return [b + u @ torch.diag(alpha - 1) @ u.mT @ b for b in ups]


def svc(merged: Tensor, deltas: Deltas, alpha: float = 0.1) -> Tensor:
    u, s, vh = torch.linalg.svd(merged, full_matrices=False)
    result = torch.zeros_like(merged)
    for j in range(int((s > 1e-9 * s[0]).sum())):
        terms = []
        for delta in deltas:
            ours, theirs = u[:, j] @ merged, u[:, j] @ delta
            terms.append(max(alpha, float(ours @ theirs / theirs.square().sum())))
        result += s[j] * len(deltas) / sum(terms) * torch.outer(u[:, j], vh[j])
    return result


def robustmerge(
    factors: Sequence[tuple[Tensor, Tensor]], density: float = 0.2, quantile: float = 0.8
) -> Tensor:
    """From (A_i, weight * scaling * B_i) pairs of one rank."""

    def prune(x: Tensor) -> Tensor:
        keep = max(int(density * x.numel()), 1)
        bound = x.abs().flatten().sort(descending=True).values[keep - 1]
        return torch.where(x.abs() >= bound, x, 0.0)

    pruned = [(prune(a), b) for a, b in factors]
    scales = []
    for (a, _), (kept, _) in zip(factors, pruned, strict=True):
        left = kept.abs().sum(dim=1)
        ratio = torch.where(left > 0, a.abs().sum(dim=1) / left.clamp_min(1e-300), 0.0)
        scales.append(ratio.clamp_min(float(torch.quantile(ratio, quantile))))
    norm = torch.stack(scales).sum(dim=0)
    up = sum(prune(b) * (s / norm) for (_, b), s in zip(factors, scales, strict=True))
    down = sum(a for a, _ in pruned)
    assert isinstance(up, Tensor) and isinstance(down, Tensor)
    return up @ down
