"""The leading singular triplets of a sum of many units, searched for among their inner products.

Block Krylov iteration (Musco and Musco, NIPS 2015, algorithm 2) on M^T M with M = up diag(scale)
down. With the Grams of both halves known, a vector of the model's width is only ever a combination
of units, so a step costs R^2 numbers and not (m + n) R, and no R x R matrix is decomposed. The last
step is made on the vectors themselves: what comes out is an exact projection of M. Until then
float32 is enough: rounding costs the search what it costs a start that is a little worse.
"""

import torch
from torch import Tensor

from lora_merge.linalg.factors import thin_qr, thin_svd
from lora_merge.linalg.random_bits import mask_key, random_bits

_OVERSAMPLE = 16
# Directions of which so small a part of the square is new are rounding.
_NEW = 1e-4


def leading_triplets(
    up: Tensor,
    scale: Tensor,
    down: Tensor,
    gram_up: Tensor,
    gram_down: Tensor,
    rank: int,
    *,
    tolerance: float = 4e-4,
    max_sweeps: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of `up @ diag(scale) @ down`.

    Stops when a step adds less than `tolerance` of the energy that the triplets hold. The first
    guess is a function of the shape alone, so equal inputs give equal bits.

    Args:
        up: Shape (m, R), float32 or float64.
        scale: float64, shape (R,).
        down: Shape (R, n).
        gram_up: Inner products of the columns of `up`, float64, shape (R, R); their error is that
            of the search, not of the result.
        gram_down: Those of the rows of `down`.
        rank: k.
        tolerance: When to stop.
        max_sweeps: When to stop at the latest.

    Returns:
        u (m, k), s (k,) in float64, descending, vh (k, n); k is smaller where there is no more.
    """
    one, other = (g.diagonal().clamp_min(0).sqrt() for g in (gram_up, gram_down))
    # Units of length one: sizes that differ by orders of magnitude would drown the small ones.
    left_of, right_of = (torch.where(x > 0, 1 / x, 0.0) for x in (one, other))
    cosines_up, cosines_down = (
        (g * inverse[:, None]).mul_(inverse).float()
        for g, inverse in ((gram_up, left_of), (gram_down, right_of))
    )
    weight = scale * one * other
    weight = (weight / weight.abs().max().clamp_min(1e-300)).float()[:, None]
    width = min(rank + _OVERSAMPLE, len(scale))
    bits = random_bits(mask_key(0, "units", ""), 0, (len(scale), width), device=up.device)
    new = weight * (bits.float() / 2**31)
    basis = basis_gram = lifted = reached = new[:, :0]
    energy = 0.0
    for _ in range(max_sweeps):
        found = _orthonormal(new, cosines_down @ new, basis, basis_gram)
        if found is None:
            break
        new, new_gram = found
        out = weight * new_gram
        onward = cosines_up @ out
        basis, basis_gram = torch.cat([basis, new], dim=1), torch.cat([basis_gram, new_gram], dim=1)
        lifted, reached = torch.cat([lifted, out], dim=1), torch.cat([reached, onward], dim=1)
        values = torch.linalg.eigvalsh((lifted.mT @ reached).double())
        before, energy = energy, float(values[-rank:].clamp_min(0).sum())
        if energy - before <= tolerance * energy:
            break
        new = weight * onward
    if not basis.shape[1]:
        return thin_svd(up[:, :0], down[:0])
    vectors = torch.linalg.eigh((lifted.mT @ reached).double()).eigenvectors
    mix = right_of[:, None] * (basis.double() @ vectors[:, -rank:])
    right = thin_qr(down.mT @ mix.to(down.dtype))[0]
    left = up @ (scale[:, None].to(up.dtype) * (down @ right))
    return thin_svd(left, right.mT)


def _orthonormal(
    new: Tensor, new_gram: Tensor, basis: Tensor, basis_gram: Tensor
) -> tuple[Tensor, Tensor] | None:
    """What is new beside a basis, orthonormal in the metric, and the metric times it."""
    for _ in range(2):
        before = (new * new_gram).sum(dim=0).clamp_min(0)
        inner = basis.mT @ new_gram
        new, new_gram = new - basis @ inner, new_gram - basis_gram @ inner
        size = torch.where(before > 0, before.rsqrt(), 0.0)
        new, new_gram = new * size, new_gram * size
        values, vectors = torch.linalg.eigh((new.mT @ new_gram).double())
        kept = values > _NEW * values[-1:].clamp_min(_NEW)
        if not bool(kept.any()):
            return None
        mix = (vectors[:, kept] * values[kept].rsqrt()).float()
        new, new_gram = new @ mix, new_gram @ mix
    return new, new_gram
