"""Where the thresholds of elementwise rules probably lie, from samples of the deltas' entries.

A guess decides how fast the exact thresholds are found (`order.py`), not what they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.linalg.order_statistics import EVERYTHING, Bracket, sample_brackets
from lora_merge.linalg.random_bits import mask_key, random_bits
from lora_merge.merge.elementwise.bands import Factors
from lora_merge.merge.elementwise.blocks import Block
from lora_merge.merge.elementwise.rule import Rule

# Entries sampled to guess thresholds: one of so many, but no fewer and no more than.
_SAMPLED_SHARE = 64
_STRIDE = 61  # between samples of a delta that is there: no divisor of a usual width
_SAMPLE = (1 << 10, 1 << 15)


def guess_thresholds(
    rule: Rule, stack: RankStack, weights: Sequence[float], whole: Block | None = None
) -> dict[int, list[Bracket]]:
    """Brackets for the rule's thresholds from a sample of each delta's entries.

    Args:
        rule: The rule.
        stack: The adapters.
        weights: Weight of each, by owner.
        whole: Their whole deltas, if they are there already.
    """
    low, high = _SAMPLE
    size = min(stack.d_out * stack.d_in // _SAMPLED_SHARE, high)
    if not rule.needs_thresholds or rule.scope != "tensor":
        return {}
    present = [owner for owner in stack.adapters if weights[owner] != 0]
    if size < low:
        return {owner: [EVERYTHING] * num_thresholds(rule, owner) for owner in present}
    if whole is not None:
        samples = {
            owner: _after_dropping(rule, owner, x.flatten()[::_STRIDE].abs())
            for owner, x in zip(whole.owners, whole.x, strict=True)
        }
    else:
        samples = sample_entries(rule, stack, size)
    return {owner: brackets_of(rule, owner, samples[owner]) for owner in present}


def sample_entries(rule: Rule, stack: RankStack, size: int) -> dict[int, Tensor]:
    """Magnitudes of each delta after random dropping, by owner, shape (size,).

    Entries are sampled at places that depend on the shape alone.
    """
    rows, columns = _places(stack, size)
    samples = {}
    for owner in stack.adapters:
        part = Factors.of(stack, owner)
        sample = torch.linalg.vecdot(part.up[rows], part.down.mT[columns]).abs_()
        samples[owner] = _after_dropping(rule, owner, sample)
    return samples


def _after_dropping(rule: Rule, owner: int, sample: Tensor) -> Tensor:
    """A sample of what a random rule leaves of the entries that were sampled; in place."""
    if rule.is_random:
        sample[: round((1 - rule.of(owner).density) * len(sample))] = 0
    return sample


def num_thresholds(rule: Rule, owner: int) -> int:
    """How many thresholds an adapter has: outliers are between two."""
    return 2 if rule.of(owner).sparsify == "outliers" else 1


def brackets_of(rule: Rule, owner: int, sample: Tensor) -> list[Bracket]:
    """Where an adapter's thresholds probably lie, from a sample of its magnitudes."""
    own = rule.of(owner)
    if own.sparsify != "outliers":
        return sample_brackets(sample, [own.magnitude_density])
    top = min(own.gamma, 1 - own.density)
    return sample_brackets(sample, [top + own.density, top])


def _places(stack: RankStack, size: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of sampled entries, int64, shape (size,) each."""
    key = mask_key(0, "sample", f"{stack.d_out} x {stack.d_in}")
    bits = random_bits(key, 0, (2, size), device=stack.up.device).long() + (1 << 31)
    return bits[0] * stack.d_out >> 32, bits[1] * stack.d_in >> 32
