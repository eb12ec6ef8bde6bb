"""Elementwise merges in delta space, streamed: the N deltas never exist, only bands of their rows.

Method: the threshold pass, the merge pass and the truncated SVD are sweeps over bands of rows that
are computed from the factors and dropped (thresholds: `order.py`; SVD: `linalg.range_finder`). The
merged matrix itself is kept between sweeps where it is small, and computed again where it is not;
the bits are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.linalg.factors import thin_qr
from lora_merge.linalg.random_bits import mask_key, random_bits
from lora_merge.linalg.range_finder import leading_svd_in_bands
from lora_merge.merge.elementwise.bands import (
    BAND_ROWS,
    TILE_BYTES,
    band_rows,
    blocks_of,
    tile_columns,
)
from lora_merge.merge.elementwise.blocks import Block, Statistics, in_turn
from lora_merge.merge.elementwise.combine import combine, measure
from lora_merge.merge.elementwise.rule import Rule
from lora_merge.merge.elementwise.thresholds import guess_thresholds

# A merged matrix up to this size is kept between sweeps: cheaper than merging again.
KEEP_BYTES = 256 << 20
# Columns beside the wanted rank in the search for the leading subspace.
_OVERSAMPLING = 16


@dataclass(frozen=True, eq=False)
class DeltaMerge:
    """A merged delta as a rank stack.

    Attributes:
        stack: One adapter of the asked rank (or full rank), owner 0.
        norm: Frobenius norm of the merged delta before it was cut to that rank.
        retained: Share of its squared norm that the stack holds, 0 to 1.
        sweeps: How often the merged delta was swept for the SVD.
    """

    stack: RankStack
    norm: float
    retained: float
    sweeps: int


def merge_delta(
    stack: RankStack,
    rule: Rule,
    weights: Sequence[float] | Tensor,
    *,
    rank: int | None,
    keys: Sequence[int] = (),
    seed: int = 0,
    statistics: Statistics | None = None,
    block_rows: int | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> DeltaMerge:
    """Merge the deltas of a stack entry by entry and return the best stack of some rank.

    Args:
        stack: The adapters of one module.
        rule: What to do with the entries.
        weights: Weight of each adapter, indexed by owner; 0 is as good as absent.
        rank: Rank of the result; None for the exact merged delta (full rank).
        keys: Mask key of each adapter, indexed by owner; needed by rules that draw.
        seed: Seeds the random part of the search for the leading subspace.
        statistics: Facts about all modules, for scope "global" (`measure` over their blocks).
        block_rows: Rows merged at a time; memory, not the result, depends on it.
        keep_bytes: Keep the merged delta in memory if it is no larger.

    Raises:
        MethodError: If the rule is global and there are no statistics, or draws without keys.
    """
    if rule.scope == "global" and rule.needs_thresholds and statistics is None:
        raise MethodError(
            "thresholds over all modules need a first pass over them",
            "use scope tensor, or pass the statistics of all modules",
        )
    weights = tuple(float(weight) for weight in weights)
    present = torch.tensor([weights[owner] != 0 for owner in stack.owner.tolist()])
    if not bool(present.any()):
        return DeltaMerge(_nothing(stack, rank), 0.0, 1.0, 0)
    if not bool(present.all()):
        stack = stack.units(present.to(stack.owner.device))
    blocks = blocks_of(stack, weights, keys=keys, block_rows=block_rows, rule=rule)
    whole = None
    one_block = stack.d_in <= tile_columns(stack, len(stack.adapters)) or rule.needs_rows
    if one_block and stack.d_out <= min(band_rows(stack), block_rows or stack.d_out):
        held = tuple(blocks())  # one block, or none of a core without directions: made only once
        blocks = partial(iter, held)
        whole = held[0] if held else None
    if statistics is None:
        brackets = guess_thresholds(rule, stack, weights, whole)
        statistics = measure(rule, in_turn(blocks), len(weights), brackets=brackets)
    bands = _Merged(stack, rule, blocks, statistics, keep_bytes)
    if rank is None or rank >= min(stack.d_out, stack.d_in):
        return _full(stack, bands)
    start = _first_guess(stack, weights, rank, seed)
    svd = leading_svd_in_bands(bands, stack.d_out, start, rank)
    root = svd.s.sqrt()
    merged = RankStack.single(svd.u * root.to(svd.u.dtype), root.to(svd.vh.dtype)[:, None] * svd.vh)
    retained = 1 - svd.residual / svd.square if svd.square > 0 else 1.0
    return DeltaMerge(merged, svd.square**0.5, retained, svd.sweeps)


def working_bytes(d_out: int, d_in: int, count: int) -> int:
    """About how much memory `merge_delta` takes beyond the stack, for so many adapters.

    The merged delta if it is kept, and a tile of each adapter with the copies that are made of it.
    """
    tile = min(4 * count * min(BAND_ROWS["cpu"], d_out) * d_in, TILE_BYTES)
    return min(4 * d_out * d_in, KEEP_BYTES) + 2 * tile


class _Merged:
    """The merged delta in bands; kept after the first sweep if it is small."""

    def __init__(
        self,
        stack: RankStack,
        rule: Rule,
        blocks: Callable[[], Iterator[Block]],
        statistics: Statistics,
        keep_bytes: int,
    ) -> None:
        self.rule, self.blocks, self.statistics = rule, blocks, statistics
        self.step = band_rows(stack)
        size = stack.d_out * stack.d_in * stack.up.dtype.itemsize
        self.keep = size <= keep_bytes
        self.kept: Tensor | None = None
        self.stack = stack

    def __call__(self) -> Iterator[tuple[int, Tensor]]:
        if self.keep and self.kept is None:
            self.kept = self.matrix()
        if self.kept is not None:
            for row in range(0, self.kept.shape[0], self.step):
                yield row, self.kept[row : row + self.step]
        else:
            yield from self._bands()

    def matrix(self) -> Tensor:
        """The whole merged delta."""
        whole = self.stack.up.new_empty(self.stack.d_out, self.stack.d_in)
        for row, rows in self._rows():
            whole[row : row + rows.shape[0]] = rows
        return whole

    def _rows(self) -> Iterator[tuple[int, Tensor]]:
        """The merged rows of one block after the other, put together from its tiles."""
        tiles: list[Tensor] = []
        for block in self.blocks():
            tiles.append(combine(self.rule, block, self.statistics))
            if block.column + block.x.shape[2] == self.stack.d_in:
                yield block.row, torch.cat(tiles, dim=1)
                tiles = []

    def _bands(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks regrouped into bands of fixed height."""
        waiting: list[Tensor] = []
        row = held = 0
        for _, merged in self._rows():
            waiting.append(merged)
            held += merged.shape[0]
            if held < self.step and row + held < self.stack.d_out:
                continue
            rows = torch.cat(waiting)
            last = row + held == self.stack.d_out
            whole = held if last else held - held % self.step
            for start in range(0, whole, self.step):
                yield row + start, rows[start : min(start + self.step, whole)]
            waiting, row, held = [rows[whole:]], row + whole, held - whole


def _first_guess(stack: RankStack, weights: Sequence[float], rank: int, seed: int) -> Tensor:
    """Right subspace to start from: that of the plain weighted sum, and random directions.

    The merged delta is not far from the sum, so this saves sweeps; what the sum lacks, the random
    columns find. Two steps of subspace iteration on the sum's factors are enough for a guess, in
    O((m + n) R l) where its SVD takes R^2 for R l.
    """
    width = min(rank + _OVERSAMPLING, stack.d_out, stack.d_in)
    key = mask_key(seed, "leading subspace", f"{stack.d_out} x {stack.d_in}")
    bits = random_bits(key, 0, (width, stack.d_in), device=stack.up.device)
    noise = bits.to(stack.down.dtype).mT / 2**31 / stack.d_in**0.5
    weighted = stack.weighted(torch.tensor(weights, dtype=torch.float64, device=stack.up.device))
    scale = weighted.scale.to(stack.up.dtype)[:, None]
    known = noise[:, : min(rank + _OVERSAMPLING // 2, width)]
    for _ in range(2):
        left = stack.up @ (scale * (stack.down @ known))
        known = thin_qr(stack.down.mT @ (scale * (stack.up.mT @ left)))[0]
    return torch.cat([known, noise[:, known.shape[1] :]], dim=1)


def _full(stack: RankStack, bands: _Merged) -> DeltaMerge:
    """The exact merged delta as (identity, delta), the identity on the smaller side."""
    matrix = bands.matrix()
    small = min(matrix.shape)
    identity = torch.eye(small, dtype=matrix.dtype, device=matrix.device)
    up, down = (identity, matrix) if matrix.shape[0] == small else (matrix, identity)
    return DeltaMerge(RankStack.single(up, down), float(matrix.double().norm()), 1.0, 1)


def _nothing(stack: RankStack, rank: int | None) -> RankStack:
    size = min(rank or stack.d_out, stack.d_out, stack.d_in)
    return RankStack.single(
        stack.up.new_zeros(stack.d_out, size), stack.down.new_zeros(size, stack.d_in)
    )
