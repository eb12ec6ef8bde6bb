"""The laws of recipes: each gives the units of the matrix that its definition gives densely."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_merge.adapters.dialects.recipes import blocks, gather, products, selection, with_base
from lora_merge.adapters.dialects.recipes.units import (
    Units,
    columns,
    joined,
    product,
    rows,
    scaled,
    split,
    transposed,
    truncated,
    with_core,
)

SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 2**16)
few = settings(max_examples=25, deadline=None)


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def units(g: torch.Generator, k: int, m: int, n: int) -> Units:
    return Units(randn(g, k, n), randn(g, m, k))


class Base:
    """A base weight that is whole in memory."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.shape = tuple(weight.shape)

    def times(self, x: Tensor) -> Tensor:
        return self.weight.to(x.dtype) @ x

    def transposed_times(self, x: Tensor) -> Tensor:
        return self.weight.to(x.dtype).mT @ x

    def dense(self) -> Tensor:
        return self.weight


def same(ours: Units, dense: Tensor, tolerance: float = 1e-10) -> None:
    assert ours.a.shape == (ours.b.shape[1], dense.shape[1])
    torch.testing.assert_close(ours.delta(), dense.to(ours.a.dtype), rtol=1e-5, atol=tolerance)


@few
@given(SEEDS, SIZES, SIZES, SIZES, SIZES)
def test_linear_operations(seed: int, k: int, m: int, n: int, c: int) -> None:
    g = noise(seed)
    one, two = units(g, k, m, n), units(g, c, m, n)
    factor, core = randn(g, k), randn(g, k, k)
    same(joined([one, two]), one.delta() + two.delta())
    same(transposed(one), one.delta().mT)
    same(scaled(one, -0.5), one.delta() * -0.5)
    same(scaled(one, factor), one.b @ torch.diag(factor) @ one.a)
    same(with_core(one, core), one.b @ core @ one.a)
    same(rows(one, m // 2, m), one.delta()[m // 2 :])
    same(columns(one, 0, n // 2 + 1), one.delta()[:, : n // 2 + 1])
    same(split(one.delta()), one.delta())
    assert split(one.delta()).rank == min(m, n)
    same(truncated(one, k), one.delta(), 1e-8)


@few
@given(SEEDS, SIZES, SIZES, SIZES, SIZES, SIZES, SIZES)
def test_hadamard_and_kronecker(
    seed: int, k1: int, k2: int, m: int, n: int, p: int, q: int
) -> None:
    g = noise(seed)
    one, two, other = units(g, k1, m, n), units(g, k2, m, n), units(g, k2, p, q)
    same(products.khatri_rao(one, two), one.delta() * two.delta())
    dense = torch.kron(one.delta(), other.delta())
    same(products.kronecker(one, other), dense)
    same(products.kronecker(split(one.delta()), other), dense)
    values = torch.linalg.svdvals(dense)
    ours = products.kronecker_values(one, other)
    known = min(len(ours), len(values))  # both leave out zeros, not the same ones
    torch.testing.assert_close(ours[:known], values[:known], atol=1e-10, rtol=1e-8)
    assert max(ours[known:].sum(), values[known:].sum()) < 1e-10
    for rank in {1, len(values)}:
        error = torch.linalg.matrix_norm(
            products.kronecker_truncated(one, other, rank).delta() - dense
        )
        torch.testing.assert_close(error, values[rank:].norm(), atol=1e-8, rtol=1e-6)


@few
@given(SEEDS, SIZES, SIZES, SIZES, SIZES)
def test_a_tucker_core_is_the_sum_that_defines_it(
    seed: int, m: int, n: int, o: int, i: int
) -> None:
    g = noise(seed)
    core, out_factor, in_factor = randn(g, m, n, 3, 2), randn(g, o, m), randn(g, n, i)
    dense = torch.einsum("mnkl,om,ni->oikl", core, out_factor, in_factor)
    same(products.tucker(core, out_factor, in_factor), dense.flatten(1))
    stored = product(randn(g, m, i, 3, 2), randn(g, o, m, 1, 1))
    assert stored.a.shape == (m, i * 6)


@few
@given(SEEDS, SIZES, SIZES, SIZES, st.integers(1, 3))
def test_blocks(seed: int, q: int, height: int, width: int, k: int) -> None:
    g = noise(seed)
    a, b = randn(g, k, width, k * q), randn(g, k, k * q, height)
    dense = torch.zeros(k * height, k * width, dtype=torch.float64)
    for j in range(k):
        for n in range(k):
            cell = a[n][:, j * q : (j + 1) * q] @ b[j][n * q : (n + 1) * q]
            dense[j * height : (j + 1) * height, n * width : (n + 1) * width] = cell.mT
    same(blocks.grid(a, b), dense)
    stored = randn(g, k * q, width)
    wide = blocks.block_diagonal(stored, k)
    assert wide.shape == (k * q, k * width)
    on_diagonal = wide.reshape(k, q, k, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    torch.testing.assert_close(on_diagonal.reshape(stored.shape), stored)
    assert wide.count_nonzero() == stored.count_nonzero()
    block = randn(g, q, height)
    repeats = torch.stack([block[i % q] for i in range(width)])  # input i meets row i mod q
    same(blocks.tiled(block, 2 * height, width), repeats.repeat(1, 2).mT)


@few
@given(SEEDS, SIZES, SIZES, SIZES)
def test_reflections_are_multiplied_out(seed: int, r: int, m: int, n: int) -> None:
    g = noise(seed)
    n = max(n, r)
    u, weight = randn(g, n, r), randn(g, m, n)
    turn = torch.eye(n, dtype=torch.float64)
    for column in (u / u.norm(dim=0)).mT:
        turn = turn @ (torch.eye(n, dtype=torch.float64) - 2 * torch.outer(column, column))
    ours = with_base.householder(u, orthogonal=False, base=Base(weight))
    same(ours, weight @ turn - weight, 1e-5)
    q = torch.linalg.qr(u).Q
    ours = with_base.householder(u, orthogonal=True, base=Base(weight))
    same(ours, -2 * weight @ q @ q.mT, 1e-5)


@few
@given(SEEDS, SIZES, SIZES, st.integers(1, 8))
def test_selected_rows_columns_and_entries(seed: int, m: int, n: int, count: int) -> None:
    g = noise(seed)
    row = torch.randint(m, (count,), generator=g)
    column = torch.randint(n, (count,), generator=g)
    values = randn(g, count)
    dense = torch.zeros(m, n, dtype=torch.float64)
    dense.index_put_((row, column), values, accumulate=True)
    ours = selection.entries_of(values, row, column, (m, n))
    same(ours, dense)
    assert ours.rank == min(row.unique().numel(), column.unique().numel())
    index = torch.randperm(m, generator=g)[: m // 2 + 1]
    picked = randn(g, len(index), n)
    dense = torch.zeros(m, n, dtype=torch.float64)
    dense[index] = picked
    same(selection.rows_of(picked, index, m), dense)
    same(selection.columns_of(picked.mT, index, m), dense.mT)


def test_units_of_a_shared_pair_are_its_slices() -> None:
    g = noise(0)
    a, b, d, scale = randn(g, 3, 9), randn(g, 8, 3), randn(g, 3), randn(g, 5)
    same(gather.frozen_pair(a, b, d, scale, 7), scale.diag() @ b[:5] @ d.diag() @ a[:, :7])
