"""Which unit takes which weight, and what the shrink hands to the expand."""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TypeAlias

import torch
from torch import Tensor

from lora_merge.kernels.gate_rule import Rule

WORD = 32  # units per word of a bitmask


@dataclass(frozen=True, eq=False)
class Layout:
    """The units of one module, or of several alike that share their input (q, k, v).

    Attributes:
        columns: Weight that each unit of one module takes, int64, shape (R,), values in 0..C-1.
        num_weights: C, weights of one module.
        block: Units per weight if all weights cover equally many, in order; else None.
        members: M, modules that are shrunk together; units and weights of one stand side by side.
        outputs: Their d_out added up, which the dispatch table is asked with.
    """

    columns: Tensor
    num_weights: int
    block: int | None = None
    members: int = 1
    outputs: int = 0

    @property
    def num_units(self) -> int:
        """R, units of one module."""
        return self.columns.shape[0]

    @property
    def num_words(self) -> int:
        """Words of one module's bitmask."""
        return -(-self.num_units // WORD)

    @property
    def widths(self) -> tuple[int, int]:
        """Units and weights of all members."""
        return self.members * self.num_units, self.members * self.num_weights

    @cached_property
    def joined(self) -> Tensor:
        """Weight of each unit among those of all members, int64, shape (M R,)."""
        return join_columns(self.columns, self.num_weights, self.members)

    @cached_property
    def segments(self) -> tuple[Tensor, int] | None:
        """Where the units of each weight stand, if they stand side by side.

        Asked for the first time it reads `columns`, unless there is a `block`.

        Returns:
            The first unit and the number of units of each weight, int32, shape (C, 2), and the
            largest number; None if some weight's units lie apart.
        """
        if self.block is not None:
            runs = [(column, self.block) for column in range(self.num_weights)]
        else:
            runs = [(column, len(list(run))) for column, run in groupby(self.columns.tolist())]
        places, start = {}, 0
        for column, length in runs:
            places[column] = (start, length)
            start += length
        if len(places) < len(runs):
            return None
        rows = [places.get(column, (0, 0)) for column in range(self.num_weights)]
        widest = max((length for _, length in rows), default=0)
        return torch.tensor(rows, dtype=torch.int32, device=self.columns.device), widest


def join_columns(columns: Tensor, num_weights: int, members: int) -> Tensor:
    """Weight of each unit among those of all members, int64, shape (M R,)."""
    starts = torch.arange(members, device=columns.device) * num_weights
    return (starts[:, None] + columns).flatten()


@dataclass(frozen=True, eq=False)
class Places:
    """Which token and expert grouped units belong to, for one module.

    Tokens stand in blocks of one expert, once for each of the k experts that they keep.

    Attributes:
        order: Tokens of the blocks, int32, shape (k, B, tokens of a block); undefined after a
            block's last.
        blocks: Expert of each block and how many tokens it has, int32, shape (k, B, 2). Expert C
            has the tokens that keep fewer than k experts, expert -1 nobody.
        weights: Of every token, float32, shape (k, T); NaN where its scores are not numbers.
        segments: First unit and number of units of each expert, int32, shape (C, 2).
        num_units: R.
    """

    order: Tensor
    blocks: Tensor
    weights: Tensor
    segments: Tensor
    num_units: int


@dataclass(frozen=True, eq=False)
class Units:
    """Gated units of some tokens, for one module.

    Attributes:
        z: g * (down x), shape (T, R); may be a column slice of a wider tensor. Grouped, shape (k,
            B, tokens of a block, a power of two not below the largest rank), undefined where no
            unit stands.
        words: Bit r % 32 of word r // 32 says whether unit r of a token is not zero, int32, shape
            (T, ceil(R / 32)); None if nobody counted, or most are.
        implementation: What made them, and should expand them.
        places: Of grouped units.
    """

    z: Tensor
    words: Tensor | None = None
    implementation: str = "eager"
    places: Places | None = None


@dataclass(frozen=True, eq=False)
class Ungated:
    """Units of few tokens before their gate, for one module: gate and expand then run as one.

    Attributes:
        parts: Pieces that add up to down x, shape (split, T, R); columns of a wider tensor.
        scores: Pieces that add up to the scores, shape (split', T, n); without a rule the weights
            themselves, shape (1, T', C).
        columns: Weight that each unit takes, int64, shape (R,).
        dtype: Of the tokens, and of the factors.
        rule: How scores become weights.
        bias: For the selection alone, shape (n,).
    """

    parts: Tensor
    scores: Tensor
    columns: Tensor
    dtype: torch.dtype
    rule: Rule | None = None
    bias: Tensor | None = None

    def members(self, count: int) -> "list[Ungated]":
        """Those of each member, where the attributes hold all members' side by side."""
        parts, scores = self.parts.chunk(count, dim=2), self.scores.chunk(count, dim=2)
        biases = [None] * count if self.bias is None else self.bias.chunk(count)
        rest = self.columns, self.dtype, self.rule
        return [Ungated(p, s, *rest, b) for p, s, b in zip(parts, scores, biases, strict=True)]


Shrunk: TypeAlias = Units | Ungated


def split_members(
    z: Tensor, words: Tensor | None, layout: Layout, implementation: str
) -> list[Shrunk]:
    """Units of each member, as views."""
    r, w = layout.num_units, layout.num_words
    return [
        Units(
            z[:, m * r : (m + 1) * r],
            None if words is None else words[:, m * w : (m + 1) * w],
            implementation,
        )
        for m in range(layout.members)
    ]
