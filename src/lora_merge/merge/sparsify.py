"""The first step of every elementwise rule: which entries of one adapter are kept."""

import torch
from torch import Tensor

from lora_merge.merge.blocks import Block, Statistics
from lora_merge.merge.masks import keep_threshold, random_bits
from lora_merge.merge.rule import Rule


def sparsify(rule: Rule, block: Block, index: int, statistics: Statistics) -> Tensor:
    """One adapter's entries of a block with the dropped ones set to 0.

    "della" divides each survivor by its keep probability where the rule says so; factors that are
    the same for all entries of an adapter are left to the sum.

    Returns:
        A new tensor, shape (rows, columns).
    """
    x = block.x[index]
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
    owner = block.owners[index]
    kept = _at_least(part, statistics.low[owner])
    high = statistics.high[owner]
    return kept if high == float("inf") else kept.abs().le_(high).mul_(kept)


def drop(rule: Rule, block: Block, index: int) -> Tensor:
    """The random step before magnitudes are ranked; the block's own entries if there is none."""
    x = block.x[index]
    if rule.sparsify != "random" or rule.density >= 1:
        return x
    bits = random_bits(block.keys[index], block.row, (x.shape[0], x.shape[1]), device=x.device)
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
    ordered = magnitude.sort(dim=1, descending=True).values
    limits = []
    for rank in magnitude_ranks(rule, columns):
        place = ordered[:, rank - 1 : rank] if rank > 0 else torch.full_like(part[:, :1], torch.inf)
        limits.append(place)
    kept = magnitude.ge(limits[0])
    if len(limits) > 1:
        kept.logical_and_(magnitude.le(limits[1]))
    return kept.to(part.dtype).mul_(part)


def _della(rule: Rule, x: Tensor, key: int, row: int) -> Tensor:
    """MagPrune: keep with a probability that grows linearly with the entry's rank in its row.

    Equal magnitudes rank by column. A row of one column is kept with probability `density`.
    """
    columns = x.shape[1]
    order = x.abs().sort(dim=1, stable=True).indices
    steps = torch.arange(columns, dtype=torch.float64) / max(columns - 1, 1)
    if columns == 1:
        steps.fill_(0.5)
    probability = rule.density - rule.epsilon + 2 * rule.epsilon * steps
    limits = torch.tensor([keep_threshold(p) for p in probability.tolist()], dtype=torch.int32)
    factor = 1 / probability if rule.rescale == "probability" else torch.ones_like(probability)
    bits = random_bits(key, row, (x.shape[0], columns), device=x.device)
    kept = bits.gather(1, order).lt_(limits.to(x.device)).to(x.dtype)
    kept.mul_(factor.to(x.device, x.dtype))
    return torch.empty_like(x).scatter_(1, order, kept).mul_(x)
