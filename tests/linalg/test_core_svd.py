"""core_svd against the dense float64 SVD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge.linalg.core_svd import core_svd


def factors(m: int, n: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    return up, torch.randn(rank, n, generator=generator, dtype=torch.float64)


@given(m=st.integers(1, 40), n=st.integers(1, 40), rank=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_values_and_vectors_are_those_of_the_dense_product(m, n, rank, seed):
    up, down = factors(m, n, rank, seed)
    core = core_svd(up, down)
    dense = torch.linalg.svdvals(up @ down)[: min(m, n, rank)]
    torch.testing.assert_close(core.values, dense, rtol=0, atol=1e-11 * float(dense[0]))
    left, right = core.truncate(len(dense))
    scale = float(dense[0])
    torch.testing.assert_close((up @ left) @ (right @ down), up @ down, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("decades", [2, 4, 6, 8])
def test_smallest_value_survives_a_random_gauge(decades):
    up, down = factors(300, 200, 8, 3)
    values = torch.logspace(0, -decades, 8, dtype=torch.float64)
    up, down = torch.linalg.qr(up).Q * values, torch.linalg.qr(down.mT).Q.mT
    gauge = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    core = core_svd(up @ gauge, torch.linalg.solve(gauge, down))
    assert float((core.values - values).abs().max()) < 1e-12


def test_truncation_is_eckart_young():
    up, down = factors(30, 25, 8, 5)
    core = core_svd(up, down)
    left, right = core.truncate(3)
    error = torch.linalg.matrix_norm(up @ down - (up @ left) @ (right @ down))
    torch.testing.assert_close(error, core.values[3:].square().sum().sqrt())


def test_rank_deficient_and_zero_factors():
    up, down = factors(30, 25, 4, 7)
    doubled = core_svd(torch.cat([up, up], 1), torch.cat([down, down]))
    torch.testing.assert_close(doubled.values[:4], 2 * core_svd(up, down).values)
    assert float(doubled.values[4]) < 1e-13 * float(doubled.values[0])
    zero = core_svd(up * 0, down)
    assert zero.values.tolist() == [0.0] * 4
    assert all(part.isfinite().all() for part in zero.truncate(4))
    assert core_svd(up[:, :0], down[:0]).values.shape == (0,)
