"""SoRA: which single ranks are worth their cost (arXiv 2311.11696).

    y = W x + up . diag(r) . diag(g(x)) . down x          r starts at 1, one number per rank

The loss plus lambda * |r|_1 is minimised over r by proximal gradient: a gradient step, then the
soft threshold. At the optimum a rank is zero only if the loss would gain at most lambda per unit
of its r. Zero ranks are then left out of the factors and the others' r is folded into them, so that
the smaller experts are plain LoRA and the outputs stay what they were.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_merge.errors import MethodError
from lora_merge.mixture.mixture import Mixture
from lora_merge.mixture.runtime.wrapped.group import Group


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """argmin_v |v - values|^2 / 2 + threshold |v|_1, that is sign(v) max(|v| - threshold, 0)."""
    return values.sign() * (values.abs() - threshold).clamp_min(0)


def add_rank_gates(groups: Sequence[Group]) -> list[nn.Parameter]:
    """One trainable number per rank of every group, all ones."""
    for group in groups:
        group.rank_gates = nn.Parameter(torch.ones_like(group.down[:, 0], dtype=torch.float32))
    return [group.rank_gates for group in groups if group.rank_gates is not None]


@torch.no_grad()
def proximal_step(rank_gates: Sequence[Tensor], rate: float, penalty: float) -> None:
    """One step of proximal gradient descent, in place; takes the gradients.

    Gradients are cut at ten times the penalty: a rank that matters more than that stays anyway, and
    no batch can throw it far. Where the descent comes to rest, gradients are the penalty at most.
    """
    for values in rank_gates:
        if values.grad is not None:
            values -= rate * values.grad.clamp(-10 * penalty, 10 * penalty)
            values.grad = None
        values.copy_(soft_threshold(values, rate * penalty))


def check_prunable(mixture: Mixture) -> None:
    """Refuse gates whose weights would change if a rank went.

    Raises:
        MethodError: If the gate is computed from the experts' ranks.
    """
    if mixture.spec.granularity == "rank" or mixture.spec.signal == "spectrum":
        raise MethodError(
            f"the {mixture.spec.preset} gate is computed from the ranks themselves: without the "
            "pruned ones it would decide otherwise",
            "prune with a gate that weighs whole experts, such as meteora, xlora or arrow",
        )
