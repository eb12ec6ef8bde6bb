"""A whole group where base weights, `down` and the gate's rows are one matrix.

few tokens    [W_1; W_2; down; gate] x  ->  y_1, y_2, u, scores  ->  y_m + (g u) up_m   2 launches
many tokens   [down; gate] x  ->  u, scores  ->  z = g u  ->  z up_m  ->  z up_m + W_m x
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack.base_matrix import FEW_TOKENS, Joined
from lora_merge.kernels.gated_stack.layout import Layout


def has_pieces(gate: Tensor, dtype: torch.dtype) -> bool:
    """Whether a gate beside factors of another dtype can be cut up without loss, and summed so."""
    wide_sums = not gate.is_cuda or torch.__version__ >= "2.8"  # mm's out_dtype
    return gate.dtype == torch.float32 and dtype == torch.bfloat16 and wide_sums


def gate_pieces(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """Gate rows as rows of another dtype that add up to them.

    Args:
        gate: float32, shape (n, d_in).
        dtype: bfloat16, three of which hold a float32 number, or that of `gate`.

    Returns:
        The largest parts of all rows, then the next, shape (n, d_in) or (3 n, d_in).
    """
    if gate.dtype == dtype:
        return gate
    pieces, rest = [], gate
    for _ in range(3):
        pieces.append(rest.to(dtype))
        rest = rest - pieces[-1]
    return torch.cat(pieces)


class JoinedStack:
    """What runs a joined group; made once, called for every token.

    Args:
        joined: The modules, alike and without border; gate rows of bfloat16 are `gate_pieces`.
        layout: Units and weights.
        scores: M n, scores of all modules, which may stand in pieces.
        rule: How scores become weights; None if they are given at every call.
        bias: For the selection alone, shape (M n,).
    """

    def __init__(
        self,
        joined: Joined,
        layout: Layout,
        *,
        scores: int = 0,
        rule: Rule | None = None,
        bias: Tensor | None = None,
    ) -> None:
        from lora_merge.kernels.gated_stack.gpu import _launch

        assert joined.up is not None
        self.launch, self.up = _launch, joined.up
        self.layout, self.rule, self.bias = layout, rule, bias
        # Scores of half precision modules stay float32, or rounding would choose other experts.
        self.wide = rule is not None and joined.matrix.dtype != torch.float32
        width = joined.outputs[-1]
        self.rows, self.rest = joined.padded, joined.padded[width:]
        self.rows_t, self.rest_t = self.rows.mT, self.rest.mT
        self.widths = tuple(b - a for a, b in pairwise(joined.outputs))
        self.pairs = [(w.mT, up) for w, up in zip(joined.weights, joined.ups, strict=True)]
        self.splits = [width, joined.num_units, joined.scores]
        self.splits.append(len(joined.padded) - sum(self.splits))
        self.scores = scores
        # Of what the kernel reads, the product before it makes y, u and scores alone.
        self.early = _launch.overlaps(joined.up.device)

    def __call__(self, x: Tensor, weights: Tensor | None = None) -> list[Tensor]:
        """Every output without the module's bias.

        Args:
            x: Shape (T, d_in).
            weights: Without a rule, shape (T', M C), T' dividing T.

        Returns:
            Of each module, flat, T d_out entries.
        """
        return self._few(x, weights) if len(x) <= FEW_TOKENS else self._many(x, weights)

    def _few(self, x: Tensor, weights: Tensor | None) -> list[Tensor]:
        """One product for all, then gate and expand of all modules in one kernel."""
        both = self._product(x, self.rows, self.rows_t)
        y, u, scores, _ = both.split_with_sizes(self.splits, dim=1)
        scores = self._pieces(scores) if weights is None else weights[None]
        tiles = self.launch.gate_expand_tiles(len(x), self.splits[0], self.up.element_size())
        out = self.launch.gate_expand(
            y, u[None], scores, self.up, self.widths, self.layout.columns, tiles, self.up.dtype,
            rule=self.rule, bias=self.bias, early=self.early,
        )  # fmt: skip
        return [*out.split_with_sizes([len(x) * width for width in self.widths])]

    def _many(self, x: Tensor, weights: Tensor | None) -> list[Tensor]:
        """Units and scores as one product, the gate, and each module's product onto its experts'.

        The base's product is long arithmetic, behind which it reads what the experts wrote; the
        other way round, y would be read and written once more with nothing to hide behind.
        """
        both = self._product(x, self.rest, self.rest_t)
        u, scores, _ = both.split_with_sizes(self.splits[1:], dim=1)
        scores = self._pieces(scores) if weights is None else weights[None]
        z, _, _ = self.launch.gate(
            u[None], scores, self.layout, x.dtype, rule=self.rule, bias=self.bias
        )
        parts = z.split(self.layout.num_units, dim=1)
        return [
            torch.mm(part, up).addmm_(x, weight).flatten()
            for (weight, up), part in zip(self.pairs, parts, strict=True)
        ]

    def _product(self, x: Tensor, rows: Tensor, rows_t: Tensor) -> Tensor:
        """Products of tokens with rows; the sums stay float32 where there are scores among them."""
        if not self.wide:
            return functional.linear(x, rows)
        if x.is_cuda:
            return torch.mm(x, rows_t, out_dtype=torch.float32)
        return functional.linear(x.float(), rows.float())

    def _pieces(self, scores: Tensor) -> Tensor:
        """Scores as the pieces that add up to them, shape (pieces, T, M n)."""
        shape = self.splits[2] // self.scores, len(scores), self.scores
        return scores.as_strided(shape, (self.scores, scores.stride(0), 1))
