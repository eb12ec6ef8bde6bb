"""Merge N tensors entry by entry: TIES, DARE, DELLA, Breadcrumbs, SCE, magnitude pruning.

Works on any coordinates of the adapters (delta rows, KnOTS coordinates, cores, factors): a tensor
x of shape (N, rows, columns), whole or in blocks of rows. `statistics` looks at all entries first
(thresholds, norms), `combine` merges one block; the result does not depend on the blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lora_merge.merge.masks import keep_threshold, random_bits
from lora_merge.merge.order import Bracket, kth_largest
from lora_merge.merge.rule import Rule


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of n adapters' tensors; adapters of weight 0 are left out.

    Attributes:
        x: Entries, float, shape (n, rows, columns). Not changed.
        weights: Weight of each of the n adapters.
        keys: Mask key of each (`masks.mask_key`); unused by rules that draw nothing.
        owners: Index of each in the whole merge, 0 <= owner < N; decides whose statistics apply.
        row: Index of the first row in the whole tensor.
    """

    x: Tensor
    weights: tuple[float, ...]
    keys: tuple[int, ...]
    owners: tuple[int, ...]
    row: int = 0


Sweep = Callable[[], Iterator[Block]]


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a rule must know of all entries before it can merge the first one.

    Attributes:
        low: Smallest magnitude that is kept, by owner; 0 where nothing is cut.
        high: Largest magnitude that is kept, by owner.
        rescale: Factor that restores the L1 norm, by owner.
        energy: Share of the squared norm, by owner (SCE).
        variance: Smallest variance of a position that is kept (SCE).
        vote: Counts elected signs over all entries; called only if a vote is exactly tied.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    rescale: tuple[float, ...]
    energy: tuple[float, ...]
    variance: float = 0.0
    vote: Callable[[], int] = field(default=lambda: 0)

    @cached_property
    def majority(self) -> float:
        """+1 or -1: the sign that most votes elected."""
        return 1.0 if self.vote() >= 0 else -1.0


def trivial_statistics(count: int) -> Statistics:
    """Statistics of N adapters that cut and rescale nothing."""
    one = (1.0,) * count
    return Statistics((0.0,) * count, (float("inf"),) * count, one, one)


def merge_tensor(
    rule: Rule,
    x: Tensor,
    weights: Sequence[float] | Tensor,
    *,
    keys: Sequence[int] | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """Merge N whole tensors. Adapters of weight 0 are as good as absent.

    Args:
        rule: What to do.
        x: Shape (N, rows, columns), float32 or float64.
        weights: N weights.
        keys: N mask keys; needed by rules that draw random numbers.
        statistics: From `measure`, where they are known (scope "global"); default: those of `x`.

    Returns:
        Shape (rows, columns), the dtype of `x`.
    """
    raise NotImplementedError


def measure(rule: Rule, sweep: Sweep, count: int) -> Statistics:
    """Everything `combine` must know of all entries, in as few sweeps as possible.

    Args:
        rule: What will be done.
        sweep: Yields all blocks, every time it is called: those of one tensor for scope "tensor",
            those of all modules for scope "global".
        count: N, the number of owners.
    """
    raise NotImplementedError


def combine(rule: Rule, block: Block, statistics: Statistics) -> Tensor:
    """Merge one block; shape (rows, columns)."""
    raise NotImplementedError
