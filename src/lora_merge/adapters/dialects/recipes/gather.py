"""Factors put together from something shared: a frozen pair, a bank, a vector, projections."""

import torch
from torch import Tensor

from lora_merge.adapters.dialects.recipes.units import Units, precise, with_core
from lora_merge.errors import AdapterError


def frozen_pair(shared_a: Tensor, shared_b: Tensor, d: Tensor, b: Tensor, d_in: int) -> Units:
    """VeRA: diag(b) B[:d_out] diag(d) A[:, :d_in] of one pair for all modules (arXiv 2310.11454).

    PVeRA's second half of A and d is the logarithm of a variance, used in training only; its mean
    is the first half (arXiv 2512.07703).

    Args:
        shared_a: Shape (r, largest d_in), or (2 r, largest d_in) of PVeRA.
        shared_b: Shape (largest d_out, r).
        d: Shape (r,), or (2 r,) of PVeRA.
        b: Shape (d_out,).
        d_in: Columns of this module's weight.
    """
    r = shared_b.shape[1]
    a = precise(shared_a[:r, :d_in]) * precise(d[:r])[:, None]
    return Units(a, precise(b)[:, None] * precise(shared_b[: b.shape[0]]))


def bank_weights(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The k largest logits' indices and softmax weights, each of shape (..., k)."""
    values, indices = precise(logits).topk(topk, dim=-1)
    return indices, values.softmax(dim=-1)


def bank_weights_saved(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same from `save_only_topk_weights`: all weights but the last, which completes the sum."""
    weights = precise(weights)
    return indices.long(), torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)


def vector_bank(bank: Tensor, of_a: tuple[Tensor, Tensor], of_b: tuple[Tensor, Tensor]) -> Units:
    """VB-LoRA: sub-vectors of both factors mixed from one bank (arXiv 2405.15179).

    Args:
        bank: Shape (n, v).
        of_a: Indices and weights, each (r, d_in / v, k).
        of_b: Indices and weights, each (d_out / v, r, k).
    """
    bank = precise(bank)
    a, b = ((bank[i] * w[..., None]).sum(-2) for i, w in (of_a, of_b))
    return Units(a.flatten(1), b.mT.reshape(-1, b.shape[1]))


def indexed(
    values: Tensor, index_a: Tensor, scale_a: Tensor, index_b: Tensor, scale_b: Tensor
) -> Units:
    """UniLoRA: every entry of both factors is an entry of one vector times a scale.

    Args:
        values: Shape (D,).
        index_a: Integers, shape (r, d_in).
        scale_a: Shape that broadcasts with it.
        index_b: Integers, shape (d_out, r).
        scale_b: Shape that broadcasts with it.
    """
    values = precise(values)
    a = values[index_a.long()] * precise(scale_a)
    return Units(a, values[index_b.long()] * precise(scale_b))


def tied_core(
    a: Tensor,
    b: Tensor,
    projections: Tensor,
    *vectors: Tensor,
    seed: int,
    modules: int,
    where: str,
) -> Units:
    """TinyLoRA: a core that is a weighted sum of fixed projections.

    Several modules may share one vector, in the order in which PEFT met them, which the file does
    not say; but PEFT draws a module's projections from a seed that counts in the same order.

    Args:
        a: Shape (r, d_in).
        b: Shape (d_out, r).
        projections: Shape (u, r, r).
        vectors: The weights of each group of modules, shape (u,).
        seed: `projection_seed`.
        modules: How many modules there are.
        where: Adapter and module, for the message.

    Raises:
        AdapterError: If no place in the order has these projections.
    """
    group = 0
    if len(vectors) > 1:
        size = max(1, modules // len(vectors))
        group = min(_place(projections, seed, modules, where) // size, len(vectors) - 1)
    core = torch.einsum("u,uij->ij", precise(vectors[group]), precise(projections))
    return with_core(Units(precise(a), precise(b)), core)


def _place(projections: Tensor, seed: int, modules: int, where: str) -> int:
    shape = tuple(projections.shape)
    for place in range(modules):
        drawn = torch.normal(
            0.0, shape[1] ** -0.5, shape, generator=torch.Generator().manual_seed(seed + place)
        )
        if torch.equal(drawn.to(projections.dtype), projections):
            return place
    raise AdapterError(
        f"{where}: its projections are not those of seed {seed}, so nothing says which of the "
        "trained vectors is this module's",
        "load it in PEFT and train or save it with weight_tying=1, one vector for all modules",
    )


def normalised(a: Tensor, b: Tensor, strength: Tensor, column_norms: Tensor) -> Units:
    """DeLoRA: units of equal norm, strength / r each, times the base's column norms (2503.18225).

    Args:
        a: Shape (r, d_in).
        b: Shape (d_out, r).
        strength: One number (`delora_lambda`).
        column_norms: Norms of the base weight's columns, shape (d_in,).
    """
    a, b = precise(a), precise(b)
    norms = a.norm(dim=1).clamp_min(1e-4) * b.norm(dim=0).clamp_min(1e-4)
    factor = precise(strength).reshape(()) / a.shape[0] / norms
    return Units(a * factor[:, None] * precise(column_norms), b)
