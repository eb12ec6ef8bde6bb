"""The first step of every elementwise rule: which entries of one adapter are kept."""

import numpy as np
import torch
from torch import Tensor

from lora_merge.linalg.random_bits import keep_threshold, random_bits
from lora_merge.merge.elementwise.blocks import Block, Statistics
from lora_merge.merge.elementwise.rule import Rule


def sparsify(rule: Rule, block: Block, index: int, statistics: Statistics) -> Tensor:
    """One adapter's entries of a block with the dropped ones set to 0.

    "della" divides each survivor by its keep probability where the rule says so; factors that are
    the same for all entries of an adapter are left to the sum.

    Returns:
        A new tensor, shape (rows, columns).
    """
    x, owner = block.x[index], block.owners[index]
    rule = rule.of(owner)
    if rule.sparsify == "variance":
        if rule.density >= 1:
            return x.clone()
        variance = block.x.var(dim=0, unbiased=False)
        return variance.ge_(statistics.variance).mul_(x)
    if rule.sparsify == "della" and rule.density < 1:
        return _della(rule, x, block.keys[index], block.row)
    part = drop(rule, block, index)
    if rule.magnitude_density >= 1:
        return part.clone() if part is x else part
    if rule.scope == "row":
        return _within_rows(rule, part)
    kept = _at_least(part, statistics.low[owner])
    high = statistics.high[owner]
    return kept if high == float("inf") else kept.abs().le_(high).mul_(kept)


def drop(rule: Rule, block: Block, index: int) -> Tensor:
    """The random step before magnitudes are ranked; the block's own entries if there is none."""
    x, rule = block.x[index], rule.of(block.owners[index])
    if rule.sparsify != "random" or rule.density >= 1:
        return x
    shape = (x.shape[0], x.shape[1])
    bits = random_bits(block.keys[index], block.row, shape, column=block.column, device=x.device)
    return bits.lt_(keep_threshold(rule.density)).to(x.dtype).mul_(x)


def magnitude_ranks(rule: Rule, count: int) -> list[int]:
    """Ranks (1 = largest) of the smallest and the largest magnitude that is kept of `count`.

    "outliers" first sets aside the int(gamma * n) largest, as many as leave int(density * n) to
    keep. (The published slice [n_bottom : -n_top] keeps nothing where n_top is 0.) Entries equal to
    a threshold are all kept: who comes first among equals is not the input's to say.
    """
    keep = int(rule.magnitude_density * count)
    if rule.sparsify != "outliers":
        return [keep]
    top = min(int(rule.gamma * count), count - keep)
    return [top + keep if keep else 0, min(top + 1, count)]


def _at_least(part: Tensor, low: float) -> Tensor:
    """Entries of magnitude `low` or more; the others 0."""
    if low <= 0:
        return part.clone()
    if low == float("inf"):
        return torch.zeros_like(part)
    below = torch.nextafter(torch.tensor(low, dtype=part.dtype), torch.tensor(0.0).to(part.dtype))
    return torch.nn.functional.hardshrink(part, float(below))  # keeps what is larger than `below`


def _within_rows(rule: Rule, part: Tensor) -> Tensor:
    """Rank magnitudes in each row on its own."""
    columns = part.shape[1]
    magnitude = part.abs()
    if magnitude.device.type == "cpu":
        ordered = torch.from_numpy(np.sort(magnitude.numpy(), axis=1))
    else:
        ordered = magnitude.sort(dim=1).values
    nothing = torch.full_like(part[:, :1], torch.inf)
    limits = [
        ordered[:, columns - rank : columns - rank + 1] if rank > 0 else nothing
        for rank in magnitude_ranks(rule, columns)
    ]
    kept = magnitude.ge(limits[0])
    if len(limits) > 1:
        kept.logical_and_(magnitude.le(limits[1]))
    return kept.to(part.dtype).mul_(part)


def _della(rule: Rule, x: Tensor, key: int, row: int) -> Tensor:
    """MagPrune: keep with a probability that grows linearly with the entry's rank in its row.

    Equal magnitudes rank by column. A row of one column is kept with probability `density`.
    """
    columns = x.shape[1]
    order = _order_in_rows(x.abs())
    steps = torch.arange(columns, dtype=torch.float64) / max(columns - 1, 1)
    if columns == 1:
        steps.fill_(0.5)
    probability = rule.density - rule.epsilon + 2 * rule.epsilon * steps
    limits = keep_threshold(probability)
    factor = 1 / probability if rule.rescale == "probability" else torch.ones_like(probability)
    bits = random_bits(key, row, (x.shape[0], columns), device=x.device)
    kept = bits.gather(1, order).lt_(limits.to(x.device)).to(x.dtype)
    kept.mul_(factor.to(x.device, x.dtype))
    return torch.empty_like(x).scatter_(1, order, kept).mul_(x)


def _order_in_rows(magnitude: Tensor) -> Tensor:
    """Columns of each row by magnitude, ascending, equals by column; int64, shape (rows, columns).

    On a CPU, numpy sorts (bit pattern, column) packed into one integer 14 times faster than torch
    sorts with indices; the patterns of non-negative floats are ordered as the floats are.
    """
    if magnitude.device.type != "cpu" or magnitude.dtype != torch.float32:
        return magnitude.sort(dim=1, stable=True).indices
    packed = magnitude.view(torch.int32).numpy().astype(np.int64) << 32
    packed |= np.arange(packed.shape[1])
    packed.sort(axis=1)
    return torch.from_numpy(packed & 0xFFFFFFFF)
