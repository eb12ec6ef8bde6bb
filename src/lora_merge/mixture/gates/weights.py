"""Weights that follow from more than scores: how strongly an expert would act; one expert alone."""

from collections.abc import Sequence

import torch
from torch import Tensor


def strengths(scaled: Tensor, columns: Tensor | None, count: int) -> Tensor:
    """|Delta_e x| of every expert (or single rank), in SVD form: |S V^T x| needs no `up`.

    Args:
        scaled: Units times their singular values, shape (T, R).
        columns: Expert of each unit, int64, shape (R,); None for each rank alone.
        count: Experts.

    Returns:
        Shape (T, count), or (T, R).
    """
    energy = scaled.float().square()
    if columns is None:
        return energy.sqrt()
    total = energy.new_zeros(len(scaled), count).index_add(1, columns, energy)
    # The square root has no derivative at 0, where every expert's delta vanishes.
    return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()


def only_of(weights: Tensor, only: Tensor, experts: Sequence[int]) -> Tensor:
    """Weights with all but one expert's set to zero in each batch row.

    Args:
        weights: Shape (T', M, E).
        only: The expert that may act, int64, shape (B,).
        experts: The experts whose weights these are.
    """
    present = torch.tensor(experts, device=weights.device)
    alone = (only.to(weights.device)[:, None] == present).to(weights.dtype)
    rows = weights.view(len(alone), -1, *weights.shape[1:])
    return (rows * alone[:, None, None, :]).view(weights.shape)
