"""The gated stack and its base weights in one bordered matrix: one product where there were four.

                d_in       R_m
             [  W_1   |  up_1^T ]          few tokens:   [W_1; W_2; down; rows] x    one product
             [  W_2   |  up_2^T ]          many tokens:  [W_m | up_m^T] [x; z_m]     no second pass
    d_out    [  ...   |  ...    ]                                                    over y
    R + n    [  down  |    0    ]
             [  rows  |    0    ]

Both operands are views of the one matrix, and so are the weights and the experts: nothing is held
twice but the corner. For plain floating point weights of linear layers that share their input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from torch import Tensor
from torch.nn import functional

from lora_merge.kernels.gated_stack.eager import expand

FEW_TOKENS = 16  # up to here reading the weights is what a product costs, not multiplying
_ALIGN = 64  # bytes: the length of a row is a multiple, as fast kernels want it


@dataclass(frozen=True, eq=False)
class Bordered:
    """Weights, experts and gate rows of M modules with one input.

    Attributes:
        matrix: Shape (sum of d_out + R + n, d_in + width).
        d_in: Input width.
        outputs: Bounds of the modules' outputs among the rows, M + 1.
        units: R of each module.
        scores: n, gate rows of all modules together.
    """

    matrix: Tensor
    d_in: int
    outputs: tuple[int, ...]
    units: tuple[int, ...]
    scores: int

    @cached_property
    def rows(self) -> Tensor:
        """All that reads the input: every W, down and the gate's rows."""
        return self.matrix[:, : self.d_in]

    @cached_property
    def weights(self) -> list[Tensor]:
        """Every W_m, shape (d_out, d_in)."""
        return [self.rows[a:b] for a, b in pairwise(self.outputs)]

    @cached_property
    def splits(self) -> list[int]:
        """Widths of y_1 ... y_M, u and the scores in the product of `rows` with a token."""
        return [*(w.shape[0] for w in self.weights), sum(self.units), self.scores]

    @cached_property
    def down(self) -> Tensor:
        """Shape (R, d_in)."""
        return self.rows[self.outputs[-1] : self.outputs[-1] + sum(self.units)]

    @cached_property
    def gate(self) -> Tensor:
        """Shape (n, d_in)."""
        return self.rows[self.matrix.shape[0] - self.scores :]

    @cached_property
    def ups(self) -> list[Tensor]:
        """Every up_m, shape (R_m, d_out)."""
        columns = self.matrix[:, self.d_in :]
        bounds = pairwise(self.outputs)
        return [columns[a:b, :r].mT for (a, b), r in zip(bounds, self.units, strict=True)]


def border(
    weights: Sequence[Tensor], ups: Sequence[Tensor], down: Tensor, gate: Tensor | None
) -> Bordered:
    """Copy modules and their experts into one matrix.

    Args:
        weights: Every W_m, shape (d_out, d_in).
        ups: Every up_m, shape (R_m, d_out).
        down: Of all modules, shape (R, d_in).
        gate: Rows whose products with the input are wanted too, shape (n, d_in), or None.

    Returns:
        The matrix, in the dtype and on the device of `down`.
    """
    units = tuple(up.shape[0] for up in ups)
    outputs = tuple(accumulate((w.shape[0] for w in weights), initial=0))
    scores = 0 if gate is None else gate.shape[0]
    d_in, step = down.shape[1], max(1, _ALIGN // down.element_size())
    columns = -(-(d_in + max(units)) // step) * step
    matrix = down.new_zeros(outputs[-1] + down.shape[0] + scores, columns)
    bordered = Bordered(matrix, d_in, outputs, units, scores)
    for place, weight in zip(bordered.weights, weights, strict=True):
        place.copy_(weight)
    for place, up in zip(bordered.ups, ups, strict=True):
        place.copy_(up)
    bordered.down.copy_(down)
    if gate is not None:
        bordered.gate.copy_(gate)
    return bordered


def shrink_with_base(x: Tensor, bordered: Bordered) -> tuple[list[Tensor], Tensor, Tensor]:
    """Every base output, the units and the scores of some tokens, as one product.

    Args:
        x: Shape (T, d_in).
        bordered: The modules.

    Returns:
        Every y_m without bias, shape (T, d_out); u, shape (T, R); scores, shape (T, n): columns of
        one tensor that nobody else holds.
    """
    both = functional.linear(x, bordered.rows)
    *ys, u, scores = both.split_with_sizes(bordered.splits, dim=1)
    return ys, u, scores


def shrink_alone(x: Tensor, bordered: Bordered) -> tuple[Tensor, Tensor]:
    """Units (T, R) and scores (T, n) of many tokens, whose base outputs come with the expand."""
    both = functional.linear(x, bordered.rows[bordered.outputs[-1] :])
    u, scores = both.split_with_sizes(bordered.splits[-2:], dim=1)
    return u, scores


def expand_after(ys: Sequence[Tensor], zs: Sequence[Tensor], bordered: Bordered) -> list[Tensor]:
    """Add gated units to the outputs of `shrink_with_base`; the results are contiguous.

    Args:
        ys: Every y_m, shape (T, d_out).
        zs: Every z_m, shape (T, R_m).
        bordered: The modules.
    """
    return [expand(y, z, up, in_place=True) for y, z, up in zip(ys, zs, bordered.ups, strict=True)]


def expand_with_base(x: Tensor, zs: Sequence[Tensor], bordered: Bordered) -> list[Tensor]:
    """Base outputs and experts of every module in one product each, shape (T, d_out).

    Args:
        x: Shape (T, d_in).
        zs: Every z_m, shape (T, R_m).
        bordered: The modules.
    """
    both = x.new_empty(x.shape[0], bordered.d_in + max(bordered.units))
    both[:, : bordered.d_in] = x
    outs = []
    for (a, b), z in zip(pairwise(bordered.outputs), zs, strict=True):
        width = bordered.d_in + z.shape[1]
        both[:, bordered.d_in : width] = z
        outs.append(functional.linear(both[:, :width], bordered.matrix[a:b, :width]))
    return outs
