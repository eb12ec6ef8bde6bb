"""The gated stack and its base weights in one matrix: one product where there were four.

                d_in       R_m
             [  W_1   |  up_1^T ]          few tokens:   [W_1; W_2; down; gate] x    one product
             [  W_2   |  up_2^T ]          many tokens:  [W_m | up_m^T] [x; z_m]     no second pass
    d_out    [  ...   |  ...    ]                                                    over y
    R + n    [  down  |    0    ]
             [  gate  |    0    ]

Both operands are views of the one matrix, and so are the weights and the experts: nothing is held
twice but the corner. Without the right border every W stays contiguous, and so does every up, which
a CPU reads faster. For plain floating point weights of linear layers that share their input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional

from lora_merge.kernels.gated_stack.eager import expand

FEW_TOKENS = 16  # up to here reading the weights is what a product costs, not multiplying
_ALIGN = 64  # bytes: the length of a row is a multiple, as fast kernels want it


@dataclass(frozen=True, eq=False)
class Joined:
    """Weights, experts and gate rows of M modules with one input.

    Attributes:
        matrix: Shape (sum of d_out + R + n and some rows of zeros, d_in + width), width 0 without
            the border.
        d_in: Input width.
        outputs: Bounds of the modules' outputs among the rows, M + 1.
        ups: Every up_m, shape (R_m, d_out); views of the border if there is one.
        up: Otherwise they are views of this, one after another, shape (sum of R_m d_out,).
        scores: n, gate rows of all modules together.
    """

    matrix: Tensor
    d_in: int
    outputs: tuple[int, ...]
    ups: tuple[Tensor, ...]
    scores: int
    up: Tensor | None = None

    @cached_property
    def num_units(self) -> int:
        """R, units of all modules together."""
        return sum(up.shape[0] for up in self.ups)

    @cached_property
    def rows(self) -> Tensor:
        """All that reads the input: every W, down and the gate's rows."""
        return self.padded[: self.outputs[-1] + self.num_units + self.scores]

    @cached_property
    def padded(self) -> Tensor:
        """The same with rows of zeros behind, so that rows of a product of it start aligned."""
        return self.matrix[:, : self.d_in]

    @cached_property
    def weights(self) -> list[Tensor]:
        """Every W_m, shape (d_out, d_in)."""
        return [self.rows[a:b] for a, b in pairwise(self.outputs)]

    @cached_property
    def splits(self) -> list[int]:
        """Widths of y_1 ... y_M, u and the scores in the product of `rows` with a token."""
        return [*(w.shape[0] for w in self.weights), self.num_units, self.scores]

    @cached_property
    def down(self) -> Tensor:
        """Shape (R, d_in)."""
        return self.rows[self.outputs[-1] : self.outputs[-1] + self.num_units]

    @cached_property
    def gate(self) -> Tensor:
        """Shape (n, d_in)."""
        return self.rows[self.rows.shape[0] - self.scores :]


def aligned(rows: int) -> int:
    """That many rows and at most 1 % more, a multiple of as large a power of two up to 64.

    Libraries read and write 16 bytes at once where the rows of a product are multiples of that.
    """
    fits = (n for step in (64, 32, 16, 8) if 100 * ((n := -(-rows // step) * step) - rows) <= rows)
    return next(fits, rows)


def join(
    weights: Sequence[Tensor],
    ups: Sequence[Tensor],
    down: Tensor,
    gate: Tensor | None,
    *,
    border: bool,
) -> Joined:
    """Copy modules and their experts into one matrix.

    Args:
        weights: Every W_m, shape (d_out, d_in).
        ups: Every up_m, shape (R_m, d_out).
        down: Of all modules, shape (R, d_in).
        gate: Rows whose products with the input are wanted too, shape (n, d_in), or None.
        border: Whether the ups go into the matrix as well; else they stand one after another.

    Returns:
        The matrix, in the dtype and on the device of `down`.
    """
    outputs = tuple(accumulate((w.shape[0] for w in weights), initial=0))
    scores = 0 if gate is None else gate.shape[0]
    columns = d_in = down.shape[1]
    if border:
        step = _ALIGN // down.element_size()
        columns = -(-(d_in + max(len(up) for up in ups)) // step) * step
    matrix = down.new_zeros(aligned(outputs[-1] + down.shape[0] + scores), columns)
    flat = None
    if border:
        places = zip(pairwise(outputs), ups, strict=True)
        ups = [matrix[a:b, d_in : d_in + len(up)].mT.copy_(up) for (a, b), up in places]
    else:
        flat = torch.cat([up.flatten() for up in ups])
        parts = flat.split([up.numel() for up in ups])
        ups = [part.view(up.shape) for part, up in zip(parts, ups, strict=True)]
    joined = Joined(matrix, d_in, outputs, tuple(ups), scores, flat)
    for place, weight in zip(joined.weights, weights, strict=True):
        place.copy_(weight)
    joined.down.copy_(down)
    if gate is not None:
        joined.gate.copy_(gate)
    return joined


def shrink_with_base(x: Tensor, joined: Joined) -> tuple[list[Tensor], Tensor, Tensor]:
    """Every base output, the units and the scores of some tokens, as one product.

    Args:
        x: Shape (T, d_in).
        joined: The modules.

    Returns:
        Every y_m without bias, shape (T, d_out); u, shape (T, R); scores, shape (T, n): columns of
        one tensor that nobody else holds.
    """
    both = functional.linear(x, joined.padded)[:, : joined.rows.shape[0]]
    *ys, u, scores = both.split_with_sizes(joined.splits, dim=1)
    return ys, u, scores


def shrink_alone(x: Tensor, joined: Joined) -> tuple[Tensor, Tensor]:
    """Units (T, R) and scores (T, n) of many tokens, whose base outputs come with the expand."""
    both = functional.linear(x, joined.rows[joined.outputs[-1] :])
    u, scores = both.split_with_sizes(joined.splits[-2:], dim=1)
    return u, scores


def expand_after(ys: Sequence[Tensor], zs: Sequence[Tensor], joined: Joined) -> list[Tensor]:
    """Add gated units to the outputs of `shrink_with_base`; the results are contiguous.

    Args:
        ys: Every y_m, shape (T, d_out).
        zs: Every z_m, shape (T, R_m).
        joined: The modules.
    """
    return [expand(y, z, up, in_place=True) for y, z, up in zip(ys, zs, joined.ups, strict=True)]


def expand_with_base(x: Tensor, zs: Sequence[Tensor], joined: Joined) -> list[Tensor]:
    """Base outputs and experts of every module in one product each, shape (T, d_out).

    Args:
        x: Shape (T, d_in).
        zs: Every z_m, shape (T, R_m).
        joined: The modules, with their border.
    """
    both = x.new_empty(x.shape[0], joined.matrix.shape[1])
    both[:, : joined.d_in] = x
    outs = []
    for (a, b), z in zip(pairwise(joined.outputs), zs, strict=True):
        width = joined.d_in + z.shape[1]
        both[:, joined.d_in : width] = z
        outs.append(functional.linear(both[:, :width], joined.matrix[a:b, :width]))
    return outs
