"""What elementwise merging passes around: blocks of rows, and facts about all of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """A tile of n adapters' tensors; adapters of weight 0 are left out.

    Attributes:
        x: Entries, float32 or float64, shape (n, rows, columns). Not changed by who gets it, and
            only there until the next block comes: its memory is used again.
        weights: Weight of each of the n adapters.
        keys: Mask key of each (`masks.mask_key`); unused by rules that draw nothing.
        owners: Index of each in the whole merge, 0 <= owner < N; decides whose statistics apply.
        row: Index of the first row in the whole tensor.
        column: Index of the first column; 0 and all columns for rules that rank within rows.
    """

    x: Tensor
    weights: tuple[float, ...]
    keys: tuple[int, ...]
    owners: tuple[int, ...]
    row: int = 0
    column: int = 0


# Calls its argument with every block, in any order, perhaps from several threads; the same blocks
# every time.
Sweep = Callable[[Callable[[Block], None]], None]


def in_turn(blocks: Callable[[], Iterable[Block]]) -> Sweep:
    """A sweep over blocks that come one after the other."""

    def sweep(visit: Callable[[Block], None]) -> None:
        for block in blocks():
            visit(block)

    return sweep


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a rule must know of all entries before it can merge the first one.

    Attributes:
        low: Smallest magnitude that is kept, by owner; 0 where nothing is cut.
        high: Largest magnitude that is kept, by owner.
        rescale: Factor that restores the L1 norm, by owner.
        energy: Share of the squared norm, by owner (SCE).
        variance: Smallest variance of a position that is kept (SCE).
        vote: Elected + signs less elected - signs over all entries, from these statistics; called
            only where a vote is exactly tied and the rule asks for the majority. (It is handed the
            statistics because holding them would be a cycle, which keeps a module's factors in
            memory until the next garbage collection.)
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    rescale: tuple[float, ...]
    energy: tuple[float, ...]
    variance: float = 0.0
    vote: Callable[["Statistics"], int] = field(default=lambda _: 0)

    @cached_property
    def majority(self) -> float:
        """+1 or -1: the sign that most votes elected."""
        return 1.0 if self.vote(self) >= 0 else -1.0
