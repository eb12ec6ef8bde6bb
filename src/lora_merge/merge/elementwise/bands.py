"""Deltas of a stack in bands and tiles of bands, made from the factors whenever they are wanted."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.merge.elementwise.blocks import Block
from lora_merge.merge.elementwise.rule import Rule

# Matrix products are always made for these bands, whatever the blocks, because the rounding of a
# product may depend on its shape. 64 rows of a 4096-wide delta fill half of an L2 cache; a GPU
# wants more at a time.
BAND_ROWS = {"cpu": 64, "cuda": 2048}
# A block of all adapters together is about so large on a CPU, cut into tiles of its columns: larger
# ones leave the cache, and of 64 adapters a merge then waits for memory (23 ns an entry, not 4).
TILE_BYTES = 16 << 20
_LEAST_COLUMNS = 256


def blocks_of(
    stack: RankStack,
    weights: Sequence[float],
    *,
    keys: Sequence[int] = (),
    block_rows: int | None = None,
    rule: Rule | None = None,
) -> Callable[[], Iterator[Block]]:
    """The deltas of a stack in blocks, made from the factors whenever they are asked for.

    Blocks go from left to right, then down; their columns are all of a row where the rule wants it.

    Args:
        stack: The adapters of one module.
        weights: Weight of each adapter, indexed by owner; those of weight 0 are left out.
        keys: Mask key of each adapter, indexed by owner.
        block_rows: Rows of a block; default: one band.
        rule: Tells whether keys are needed, and whole rows.

    Raises:
        MethodError: If they are, and there are none.
    """
    owners = tuple(owner for owner in stack.adapters if weights[owner] != 0)
    if rule is not None and rule.is_random and not keys:
        raise MethodError("this rule draws random numbers", "pass one mask key per adapter")
    parts = [Factors.of(stack, owner) for owner in owners]
    present = tuple(float(weights[owner]) for owner in owners)
    used_keys = tuple(keys[owner] if keys else 0 for owner in owners)
    step = max(min(block_rows or band_rows(stack), stack.d_out), 1)
    wide = stack.d_in if rule is not None and rule.needs_rows else tile_columns(stack, len(parts))

    def blocks() -> Iterator[Block]:
        memory = stack.up.new_empty(len(parts) * step * wide)
        for row in range(0, stack.d_out, step):
            height = min(step, stack.d_out - row)
            for column in range(0, stack.d_in, wide):
                shape = (len(parts), height, min(wide, stack.d_in - column))
                x = memory[: prod(shape)].view(shape)
                for part, tile in zip(parts, x, strict=True):
                    part.tile(row, column, tile)
                yield Block(x, present, used_keys, owners, row, column)

    return blocks


def tile_columns(stack: RankStack, count: int) -> int:
    """Columns of a tile for so many adapters; all of them on a GPU."""
    if stack.up.device.type != "cpu":
        return stack.d_in
    one = count * BAND_ROWS["cpu"] * stack.up.dtype.itemsize
    wide = max(TILE_BYTES // max(one, 1) // _LEAST_COLUMNS, 1) * _LEAST_COLUMNS
    return max(min(wide, stack.d_in), 1)


@dataclass(frozen=True, eq=False)
class Factors:
    """One adapter's factors with the scaling in `up`, and the height of the bands they make."""

    up: Tensor
    down: Tensor
    step: int

    @classmethod
    def of(cls, stack: RankStack, owner: int) -> "Factors":
        """Those of one adapter of a stack."""
        start, stop = (int(end) for end in torch.searchsorted(stack.owner, _ends(stack, owner)))
        up, scale = stack.up[:, start:stop], stack.scale[start:stop]
        return cls(
            (up * scale.to(up.dtype)).contiguous(),
            stack.down[start:stop].contiguous(),
            band_rows(stack),
        )

    def tile(self, start: int, column: int, out: Tensor) -> None:
        """Fill `out` with a part of the delta, in whole bands: one rounding for each row."""
        stop, down = start + out.shape[0], self.down[:, column : column + out.shape[1]]
        for first in range(start - start % self.step, stop, self.step):
            band = self.up[first : first + self.step]
            if first >= start and first + band.shape[0] <= stop:
                torch.mm(band, down, out=out[first - start : first - start + band.shape[0]])
            else:
                low, high = max(start, first), min(stop, first + self.step)
                out[low - start : high - start] = (band @ down)[low - first : high - first]


def _ends(stack: RankStack, owner: int) -> Tensor:
    return torch.tensor([owner, owner + 1], device=stack.owner.device)


def band_rows(stack: RankStack) -> int:
    """Rows of a band where the stack is."""
    return BAND_ROWS.get(stack.up.device.type, BAND_ROWS["cuda"])
