"""A whole group for few tokens in two launches: one product, then gate and expand as one kernel.

[W_1; W_2; down; gate] x  ->  y_1, y_2, u, scores  ->  y_m + (g u) up_m
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from lora_merge.kernels.gate_rule import Rule
from lora_merge.kernels.gated_stack.base_matrix import Joined


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
    """What runs a joined group of few tokens; made once, called for every token.

    Args:
        joined: The modules, alike and without border; gate rows of bfloat16 are `gate_pieces`.
        columns: Weight that each unit of one member takes, int64, shape (R,).
        scores: M n, scores of all modules, which may stand in pieces.
        rule: How scores become weights; None if they are given at every call.
        bias: For the selection alone, shape (M n,).
    """

    def __init__(
        self,
        joined: Joined,
        columns: Tensor,
        *,
        scores: int = 0,
        rule: Rule | None = None,
        bias: Tensor | None = None,
    ) -> None:
        from lora_merge.kernels.gated_stack.gpu import _launch

        assert joined.up is not None
        self.launch, self.tiles = _launch.gate_expand, _launch.gate_expand_tiles
        self.up, self.columns, self.rule, self.bias = joined.up, columns, rule, bias
        # Scores of half precision modules stay float32, or rounding would choose other experts.
        self.wide = rule is not None and joined.matrix.dtype != torch.float32
        self.rows, self.rows_t = joined.padded, joined.padded.mT
        self.widths = tuple(b - a for a, b in pairwise(joined.outputs))
        self.splits = [joined.outputs[-1], joined.num_units, joined.scores]
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
        tokens = x.shape[0]
        if not self.wide:
            both = functional.linear(x, self.rows)
        elif x.is_cuda:
            both = torch.mm(x, self.rows_t, out_dtype=torch.float32)
        else:
            both = functional.linear(x.float(), self.rows.float())
        y, u, scores, _ = both.split_with_sizes(self.splits, dim=1)
        if weights is not None:
            scores = weights[None]
        else:
            count = self.scores
            shape = self.splits[2] // count, tokens, count
            scores = scores.as_strided(shape, (count, scores.stride(0), 1))
        tiles = self.tiles(tokens, self.splits[0], self.up.element_size())
        out = self.launch(
            y, u[None], scores, self.up, self.widths, self.columns, tiles, self.up.dtype,
            rule=self.rule, bias=self.bias, early=self.early,
        )  # fmt: skip
        return [*out.split_with_sizes([tokens * width for width in self.widths])]
