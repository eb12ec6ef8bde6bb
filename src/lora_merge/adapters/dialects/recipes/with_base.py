"""Deltas that are low-rank only together with the base weight W, which is met in products alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_merge.adapters.dialects.recipes.units import Units, joined, precise, scaled
from lora_merge.adapters.units import BaseWeight


def householder(u: Tensor, *, orthogonal: bool, base: BaseWeight) -> Units:
    """HRA: W (R - I), R a chain of Householder reflections, in compact WY form (2405.17484).

    R = (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T) = I - U T U^T with T upper triangular, T_jj = 2 and
    T_{<j, j} = -2 T_{<j, <j} U_{<j}^T u_j; so the delta is -(W U) T U^T.

    Args:
        u: Unnormalised reflection vectors, shape (d_in, r).
        orthogonal: Vectors are made orthogonal first (Gram-Schmidt); then T = 2 I.
        base: W.
    """
    u = precise(u).double()
    r = u.shape[1]
    if orthogonal:
        u = torch.linalg.qr(u).Q
        t = 2 * torch.eye(r, dtype=u.dtype)
    else:
        u = u / u.norm(dim=0)
        products = u.mT @ u
        t = 2 * torch.eye(r, dtype=u.dtype)
        for j in range(1, r):
            t[:j, j] = -2 * t[:j, :j] @ products[:j, j]
    return Units((t @ u.mT).float(), -base.times(u.float()))


def right_path(of_base: Units, of_itself: Units, *, base: BaseWeight) -> Units:
    """LyCORIS GLoRA: b1 b2 + W a1 a2 (arXiv 2306.07967).

    Args:
        of_base: a1 a2, k units of shape (d_in, d_in).
        of_itself: b1 b2, units of shape (d_out, d_in).
        base: W.
    """
    return joined([of_itself, Units(of_base.a, base.times(of_base.b))])


def removed(left: Tensor, right: Tensor, injected: Tensor | None, *, base: BaseWeight) -> Units:
    """DEFT: left (injected - right^T W); PaRa has nothing injected.

    Args:
        left: Shape (d_out, r).
        right: Shape (d_out, r).
        injected: Shape (r, d_in), or None.
        base: W.
    """
    a = -base.transposed_times(right).mT
    return Units(a if injected is None else a + precise(injected), left)


def difference(trained: Units, initial: Units) -> Units:
    """PiSSA, OLoRA, CorDA, LoRA-GA: what training changed, B A - B0 A0, twice the units."""
    return joined([trained, scaled(initial, -1.0)])


def tail_removed(units: Units, rank: int, *, base: BaseWeight) -> Units:
    """KaSA: the units, and W's `rank` smallest singular triplets taken away (2412.06071).

    Args:
        units: s B diag(d) A.
        rank: How many triplets PEFT cuts off.
        base: W, needed whole for its smallest triplets.
    """
    u, s, vh = torch.linalg.svd(base.dense(), full_matrices=False)
    keep = s.shape[0] - rank
    return joined([units, Units(-s[keep:, None] * vh[keep:], u[:, keep:])])


def network(
    down: Tensor,
    up: Tensor,
    encoders: Sequence[Tensor],
    decoders: Sequence[Tensor],
    activation: Callable[[Tensor], Tensor],
    *,
    base: BaseWeight,
) -> Units:
    """PEANuT: a small network over W's columns, whose last layer is linear (arXiv 2410.01870).

    Args:
        down: First layer, shape (r, d_out).
        up: Last layer, shape (d_out, r).
        encoders: Hidden layers, each (r, r); their inputs are added back by the decoders.
        decoders: As many, each (r, r).
        activation: Between all layers but the last.
        base: W.
    """
    hidden = activation(base.transposed_times(precise(down).mT))
    kept = []
    for encoder in encoders:
        kept.append(hidden)
        hidden = activation(hidden @ precise(encoder).mT)
    for decoder in decoders:
        hidden = activation(hidden @ precise(decoder).mT) + kept.pop()
    return Units(hidden.mT, precise(up))
