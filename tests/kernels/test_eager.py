"""Shrink, gate and expand against loops over tokens and units in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from lora_merge.kernels.gated_stack.eager import (
    expand,
    gate_units,
    shrink_conv,
    shrink_embedding,
    shrink_linear,
)


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


@given(
    st.integers(0, 5), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from([1, 3])
)
def test_a_stack_is_the_sum_of_its_experts(
    sequences: int, ranks: list[int], per_sequence: int
) -> None:
    """Experts of any ranks, weights per token or per sequence, one unit at a time."""
    tokens, units = sequences * per_sequence, sum(ranks)
    x, y = double(tokens, 6), double(tokens, 5, seed=1)
    down, up = double(units, 6, seed=2), double(units, 5, seed=3)
    weights = double(sequences, len(ranks), seed=4)
    owner = [e for e, rank in enumerate(ranks) for _ in range(rank)]
    expected = y.clone()
    for t in range(tokens):
        for j, e in enumerate(owner):
            expected[t] += weights[t // per_sequence, e] * (down[j] @ x[t]) * up[j]
    block = ranks[0] if len(set(ranks)) == 1 else None
    columns = None if block is not None else torch.tensor(owner)
    z = gate_units(shrink_linear(x, down), weights, block, columns)
    torch.testing.assert_close(expand(y, z, up), expected)
    # In blocks and by columns are two ways to say the same.
    by_column = gate_units(shrink_linear(x, down), weights, None, torch.tensor(owner))
    torch.testing.assert_close(z, by_column, rtol=0, atol=0)


def test_one_weight_per_unit_and_one_row_for_all() -> None:
    u = double(4, 3)
    each, one = double(4, 3, seed=1), double(1, 3, seed=2)
    torch.testing.assert_close(gate_units(u, each, None, None), u * each)
    torch.testing.assert_close(gate_units(u, one, None, None), u * one)


def test_an_embedding_is_a_product_with_a_one_hot_vector() -> None:
    ids = torch.tensor([[3, 0], [7, 3]])
    rows = double(5, 9)
    hot = functional.one_hot(ids.flatten(), 9).double()
    torch.testing.assert_close(shrink_embedding(ids, rows), hot @ rows.T)


@pytest.mark.parametrize("space", [(9,), (9, 7), (5, 4, 6)])
def test_a_convolution_is_a_product_with_patches(space: tuple[int, ...]) -> None:
    kernel = (3, 2, 2)[: len(space)]
    x = double(2, 4, *space)
    weight = double(5, 4, *kernel, seed=1)
    how = {"stride": 2, "padding": 1, "dilation": 1}
    got = shrink_conv(x, weight.flatten(1), kernel=kernel, how=how)
    padded = functional.pad(x, (1, 1) * len(space))
    sizes = [(n + 2 - k) // 2 + 1 for n, k in zip(space, kernel, strict=True)]
    patches = [
        padded[
            (row, slice(None), *(slice(2 * p, 2 * p + k) for p, k in zip(at, kernel, strict=True)))
        ]
        for row in range(2)
        for at in torch.cartesian_prod(*map(torch.arange, sizes)).view(-1, len(space)).tolist()
    ]
    torch.testing.assert_close(got, torch.stack(patches).flatten(1) @ weight.flatten(1).T)


def test_expand_keeps_shape_and_dtype_and_writes_only_where_it_may() -> None:
    y, z, up = double(2, 3, 5), double(6, 4, seed=1), double(4, 5, seed=2)
    before = y.clone()
    expected = y + (z @ up).view(y.shape)
    torch.testing.assert_close(expand(y, z, up), expected)
    assert torch.equal(y, before)
    half = expand(y.half(), z, up)
    assert half.dtype == torch.float16 and half.shape == y.shape
    written = expand(y, z, up, in_place=True)
    assert written is y
    torch.testing.assert_close(y, expected)
    assert torch.equal(expand(before, torch.zeros_like(z), up), before)


def test_nan_stays_in_its_row() -> None:
    x = double(4, 6)
    x[2, 1] = torch.nan
    z = gate_units(shrink_linear(x, double(3, 6, seed=1)), double(4, 3, seed=2), 1, None)
    out = expand(double(4, 5, seed=3), z, double(3, 5, seed=4))
    assert out.isnan().all(dim=1).tolist() == [False, False, True, False]
    assert not out[[0, 1, 3]].isnan().any()
