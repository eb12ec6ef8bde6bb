"""What weights mean, and steps before and after any method: norms, Pico."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.merge.methods.method import Job
from lora_merge.merge.recipe.recipe import Normalize, RestoreNorm


def present_weights(weights: Tensor, present: Sequence[int], how: Normalize, module: str) -> Tensor:
    """Weights of one module's adapters, normalised over those that have the module.

    Args:
        weights: Weight of every adapter, float64, shape (N,).
        present: Indices of the adapters that have the module.
        how: Divide by nothing, the sum, or the sum of magnitudes.
        module: Name, for messages.

    Returns:
        Shape (N,); absent adapters have weight 0.

    Raises:
        MethodError: If the sum is zero.
    """
    kept = torch.zeros_like(weights)
    index = torch.tensor(list(present), dtype=torch.int64, device=weights.device)
    kept[index] = weights[index]
    if how == "none":
        return kept
    total = float(kept.sum() if how == "sum" else kept.abs().sum())
    if abs(total) < 1e-12 * float(kept.abs().sum()):
        raise MethodError(
            f"{module}: the weights add up to 0 and cannot be normalised to sum 1",
            "use --normalize none or abs-sum",
        )
    return kept / total


def shares(stack: RankStack, job: Job) -> Tensor:
    """Weights of the adapters that are present, with sum 1, float64, shape (n,).

    Raises:
        MethodError: If they add up to nothing.
    """
    weights = job.weights[torch.tensor(stack.adapters, device=job.weights.device)]
    total = float(weights.sum())
    if abs(total) < 1e-12 * float(weights.abs().sum()):
        raise MethodError(
            f"{job.module}: the weights add up to 0, so they are no shares",
            "give weights of one sign, or use task-arithmetic",
        )
    return weights / total


def adapter_norms(stack: RankStack) -> Tensor:
    """Frobenius norm of each adapter's delta, float64, indexed by owner; 0 for absent ones."""
    squares = torch.tensor(stack.adapter_squares(), dtype=torch.float64, device=stack.owner.device)
    return squares.clamp_min(0).sqrt()


def equalised(stack: RankStack) -> RankStack:
    """Every adapter scaled to the mean of the adapters' norms; zero adapters stay zero."""
    norms = adapter_norms(stack)
    present = norms[torch.tensor(stack.adapters, device=norms.device)]
    factor = torch.where(norms > 0, present.mean() / norms, 1.0)
    return stack.weighted(factor)


def wanted_norm(stack: RankStack, weights: Tensor, how: RestoreNorm) -> float | None:
    """The Frobenius norm a result is brought to, or None where it is left alone.

    Args:
        stack: The adapters.
        weights: Weight of each adapter.
        how: "mean" of their norms, or "weighted-mean" with |w_i| as shares.
    """
    if how == "none":
        return None
    present = torch.tensor(stack.adapters, device=stack.owner.device)
    norms = adapter_norms(stack)[present]
    if how == "mean":
        return float(norms.mean())
    share = weights[present].abs()
    return float((share * norms).sum() / share.sum().clamp_min(1e-300))


def pico(core: RankStack) -> RankStack:
    """Shrink what the adapters' outputs share (Pico, April 2026, github.com/yixuantt/Pico).

    [B_1 … B_N] = U S V^T with scalings absorbed, c_j = s_j^2 / sum s^2,
    B_i <- B_i + U diag(1 / (1 + (N - 1) c) - 1) U^T B_i. Directions that hold most of all outputs
    are shrunk towards 1/N, as if every adapter had them.

    Args:
        core: Units in core coordinates.
    """
    scaled = core.up * core.scale
    u, s, _ = torch.linalg.svd(scaled, full_matrices=False)
    energy = s.square()
    share = energy / energy.sum().clamp_min(1e-300)
    factor = 1 / (1 + (len(core.adapters) - 1) * share) - 1
    up = core.up + (u * factor) @ (u.mT @ core.up)
    return RankStack(core.down, up, core.scale, core.owner)
