"""QR, SVD and Grams of factors against dense float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.linalg.factors import (
    CONDITION_FOR_BASIS,
    cholesky,
    gram,
    orthonormal_basis,
    singular_values,
    thin_qr,
    thin_svd,
)

sizes = st.integers(1, 24)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def graded(m: int, n: int, decades: float, dtype: torch.dtype) -> torch.Tensor:
    """m x n with singular values from 1 down to 10^-decades."""
    u, _ = torch.linalg.qr(normal(m, n, seed=1))
    v, _ = torch.linalg.qr(normal(n, n, seed=2))
    return (u * torch.logspace(0, -decades, n, dtype=torch.float64) @ v).to(dtype)


@given(rows=sizes, width=st.integers(1, 3000), others=sizes)
def test_gram_is_the_matrix_of_inner_products(rows: int, width: int, others: int) -> None:
    x, y = normal(rows, width, dtype=torch.float32), normal(others, width, seed=1)
    torch.testing.assert_close(gram(x), x.double() @ x.double().T, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(gram(x, y), x.double() @ y.T, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(("precise", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows", [128, 129, 300])
def test_the_triangle_of_a_large_gram_is_the_whole(rows, precise, rtol):
    x = normal(2, rows, 2500, dtype=torch.float32)
    products = gram(x, precise=precise)
    length = torch.linalg.vector_norm(x.double(), dim=2)
    error = (products - x.double() @ x.double().mT) / (length[..., None] * length[:, None])
    assert float(error.abs().max()) < rtol


@given(m=sizes, n=sizes, batch=st.sampled_from([(), (2,), (2, 3)]))
def test_thin_qr_reconstructs_with_orthonormal_columns(
    m: int, n: int, batch: tuple[int, ...]
) -> None:
    x = normal(*batch, m, n, dtype=torch.float32)
    q, r = thin_qr(x)
    eye = torch.eye(min(m, n)).expand(*batch, -1, -1)
    torch.testing.assert_close(q @ r, x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q.mT @ q, eye, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decades", [0, 2, 3.5, 5, 7])
def test_thin_qr_stays_orthogonal_however_ill_conditioned(decades: float) -> None:
    q, _ = thin_qr(graded(300, 12, decades, torch.float32))
    assert (q.T @ q - torch.eye(12)).abs().max() < 2e-6


def test_thin_qr_of_a_rank_deficient_matrix_takes_householder() -> None:
    x = normal(50, 3) @ normal(3, 6, seed=1)
    q, r = thin_qr(x)
    torch.testing.assert_close(q @ r, x)
    torch.testing.assert_close(q.T @ q, torch.eye(6, dtype=torch.float64))


@given(m=sizes, n=sizes, r=sizes)
def test_thin_svd_is_the_svd_of_the_product(m: int, n: int, r: int) -> None:
    up, down = normal(m, r), normal(r, n, seed=1)
    u, s, vh = thin_svd(up, down)
    torch.testing.assert_close(u * s @ vh, up @ down, rtol=1e-9, atol=1e-9)
    expected = torch.linalg.svdvals(up @ down)[: len(s)]
    torch.testing.assert_close(s, expected, rtol=1e-9, atol=1e-9 * float(expected[0]))
    torch.testing.assert_close(singular_values(up, down), s, rtol=1e-9, atol=1e-9 * float(s[0]))


@given(m=sizes, n=sizes, r=sizes, flip=st.booleans())
def test_thin_svd_fixes_the_signs(m: int, n: int, r: int, flip: bool) -> None:
    sign = -1.0 if flip else 1.0
    u, _, _ = thin_svd(sign * normal(m, r), sign * normal(r, n, seed=1))
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("decades", [2, 4, 6])
def test_smallest_singular_value_is_right_to_a_millionth_of_the_largest(decades: float) -> None:
    up, down = graded(256, 16, decades, torch.float32), torch.linalg.qr(normal(64, 16))[0].T
    exact = torch.linalg.svdvals(up.double() @ down)
    found = singular_values(up, down.float())
    assert (found - torch.linalg.svdvals(up.double() @ down.float().double())[:16]).abs().max() < (
        1e-12
    )
    assert abs(float(found[-1] - exact[15])) < 1e-6 * float(exact[0])


@given(m=sizes, n=sizes, rank=st.integers(0, 5))
def test_orthonormal_basis_spans_the_columns(m: int, n: int, rank: int) -> None:
    rank = min(rank, m, n)
    x = normal(m, rank) @ normal(rank, n, seed=1) if rank else torch.zeros(m, n).double()
    basis = orthonormal_basis(x)
    assert basis.shape == (m, rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(basis @ (basis.T @ x), x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_not_refused(dtype: torch.dtype) -> None:
    up, down = normal(20, 3, dtype=dtype), normal(3, 9, seed=1, dtype=dtype)
    u, s, vh = thin_svd(up, down)
    assert u.dtype == torch.float32
    torch.testing.assert_close(u * s.float() @ vh, up.float() @ down.float(), rtol=1e-4, atol=1e-4)


@given(rows=st.integers(1, 12), decades=st.floats(0, 6), batch=st.sampled_from([(), (3,)]))
def test_a_cholesky_factor_says_how_far_it_can_be_trusted(rows, decades, batch) -> None:
    x = graded(40, rows, decades if rows > 1 else 0, torch.float64).mT.expand(*batch, -1, -1)
    lower, condition = cholesky(gram(x))
    torch.testing.assert_close(lower @ lower.mT, gram(x), rtol=0, atol=1e-12)
    true = float(torch.linalg.cond(x.double()).max())
    assert condition <= 1.01 * true  # an estimate from below,
    assert condition >= true**0.5 / 10  # and never blind


def test_what_has_no_cholesky_factor_is_never_trusted() -> None:
    x = normal(3, 50)
    flat = torch.cat([x, x])
    assert cholesky(gram(torch.stack([normal(6, 50), flat])))[1] > CONDITION_FOR_BASIS
    assert not cholesky(gram(x * torch.nan))[1] <= CONDITION_FOR_BASIS
