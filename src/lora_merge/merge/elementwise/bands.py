"""Deltas of a stack in bands and blocks of rows, made from the factors whenever they are wanted."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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


def blocks_of(
    stack: RankStack,
    weights: Sequence[float],
    *,
    keys: Sequence[int] = (),
    block_rows: int | None = None,
    rule: Rule | None = None,
) -> Callable[[], Iterator[Block]]:
    """The deltas of a stack in blocks of rows, made from the factors whenever they are asked for.

    Args:
        stack: The adapters of one module.
        weights: Weight of each adapter, indexed by owner; those of weight 0 are left out.
        keys: Mask key of each adapter, indexed by owner.
        block_rows: Rows of a block; default: one band.
        rule: Tells whether keys are needed.

    Raises:
        MethodError: If they are, and there are none.
    """
    owners = tuple(owner for owner in stack.adapters if weights[owner] != 0)
    if rule is not None and rule.is_random and not keys:
        raise MethodError("this rule draws random numbers", "pass one mask key per adapter")
    parts = [Factors.of(stack, owner) for owner in owners]
    present = tuple(float(weights[owner]) for owner in owners)
    used_keys = tuple(keys[owner] if keys else 0 for owner in owners)
    step = block_rows or band_rows(stack)

    def blocks() -> Iterator[Block]:
        for row in range(0, stack.d_out, step):
            stop = min(row + step, stack.d_out)
            x = stack.up.new_empty(len(parts), stop - row, stack.d_in)
            for part, rows in zip(parts, x, strict=True):
                part.rows(row, rows)
            yield Block(x, present, used_keys, owners, row)

    return blocks


@dataclass(frozen=True, eq=False)
class Factors:
    """One adapter's factors with the scaling in `up`, and the height of the bands they make."""

    up: Tensor
    down: Tensor
    step: int

    @classmethod
    def of(cls, stack: RankStack, owner: int) -> "Factors":
        """Those of one adapter of a stack."""
        part = stack.of_adapter(owner)
        up = (part.up * part.scale.to(part.up.dtype)).contiguous()
        return cls(up, part.down.contiguous(), band_rows(stack))

    def rows(self, start: int, out: Tensor) -> None:
        """Fill `out` with rows of the delta, computed in whole bands: one rounding for each row."""
        stop = start + out.shape[0]
        for first in range(start - start % self.step, stop, self.step):
            band = self.up[first : first + self.step]
            if first >= start and first + band.shape[0] <= stop:
                torch.mm(band, self.down, out=out[first - start : first - start + band.shape[0]])
            else:
                low, high = max(start, first), min(stop, first + self.step)
                out[low - start : high - start] = (band @ self.down)[low - first : high - first]


def band_rows(stack: RankStack) -> int:
    """Rows of a band where the stack is."""
    return BAND_ROWS.get(stack.up.device.type, BAND_ROWS["cuda"])
