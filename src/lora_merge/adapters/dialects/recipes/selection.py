"""Deltas that touch few rows, columns or entries: exact as long as these are few."""

import torch
from torch import Tensor

from lora_merge.adapters.dialects.recipes.units import Units, precise, transposed


def rows_of(values: Tensor, index: Tensor, d_out: int) -> Units:
    """Selected rows of the weight (S2FT): one unit a row.

    Args:
        values: Shape (n, d_in).
        index: Row of each, shape (n,).
        d_out: Rows of the weight.
    """
    values = precise(values)
    b = values.new_zeros(d_out, values.shape[0])
    b[index.long(), torch.arange(values.shape[0])] = 1
    return Units(values, b)


def columns_of(values: Tensor, index: Tensor, d_in: int) -> Units:
    """Selected columns of the weight (PaCA): one unit a column, values of shape (d_out, n)."""
    return transposed(rows_of(values.mT, index, d_in))


def entries_of(values: Tensor, row: Tensor, column: Tensor, shape: tuple[int, int]) -> Units:
    """Selected entries (SHiRA): one unit for each row or column that is touched, the fewer.

    Args:
        values: Shape (n,).
        row: Shape (n,), integers.
        column: Shape (n,), integers.
        shape: (d_out, d_in).
    """
    if torch.unique(column).numel() < torch.unique(row).numel():
        return transposed(entries_of(values, column, row, (shape[1], shape[0])))
    touched, place = torch.unique(row.long(), return_inverse=True)
    dense = precise(values).new_zeros(touched.numel(), shape[1])
    dense.index_put_((place, column.long()), precise(values), accumulate=True)
    return rows_of(dense, touched, shape[0])
