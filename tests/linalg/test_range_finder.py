"""Leading singular triplets of a banded matrix against a dense float64 SVD."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.linalg.range_finder import leading_svd_in_bands


def bands_of(matrix: torch.Tensor, step: int):
    def bands():
        bands.sweeps += 1
        for row in range(0, matrix.shape[0], step):
            yield row, matrix[row : row + step]

    bands.sweeps = 0
    return bands


def matrix_of(values: torch.Tensor, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    size = len(values)
    u = torch.linalg.qr(torch.randn(rows, size, generator=random, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, size, generator=random, dtype=torch.float64)).Q
    return u * values @ v.mT


def start_of(columns: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(columns, width, generator=torch.Generator().manual_seed(9)).to(dtype)


SPECTRA = {
    "fast": 0.5 ** torch.arange(60, dtype=torch.float64),
    "slow": 1 / (1 + torch.arange(60, dtype=torch.float64)),
    "flat tail": torch.cat([torch.full((12,), 3.0), torch.full((48,), 1.0)]).double(),
    "flat": torch.linspace(1.01, 1.0, 60, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(90, 70), (60, 200)])
def test_the_energy_is_that_of_the_best_cut(name, shape):
    matrix = matrix_of(SPECTRA[name], *shape)
    bands = bands_of(matrix, 16)
    found = leading_svd_in_bands(bands, shape[0], start_of(shape[1], 16), 8)
    best = float(SPECTRA[name][:8].square().sum())
    total = float(SPECTRA[name].square().sum())
    assert found.sweeps == bands.sweeps
    assert found.square == pytest.approx(total)
    assert best - 1e-4 * total < float(found.s.square().sum()) <= best * (1 + 1e-12)
    rebuilt = found.u * found.s @ found.vh
    assert found.residual == pytest.approx(float((matrix - rebuilt).square().sum()), rel=1e-9)
    for frame in (found.u, found.vh.mT):
        torch.testing.assert_close(frame.mT @ frame, torch.eye(8, dtype=torch.float64))


@given(rank=st.integers(1, 5), width=st.integers(5, 9), seed=st.integers(0, 50))
def test_a_matrix_of_low_rank_comes_back_whole(rank, width, seed):
    """Blocks beyond the rank are noise; they may not spoil the basis."""
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        matrix = matrix_of(torch.linspace(2, 1, rank).double(), 30, 20, seed).to(dtype)
        found = leading_svd_in_bands(bands_of(matrix, 7), 30, start_of(20, width, dtype), 5)
        rebuilt = found.u * found.s.to(dtype) @ found.vh
        torch.testing.assert_close(rebuilt, matrix, rtol=close, atol=close)


def test_small_and_zero_matrices_end():
    for shape in ((1, 1), (3, 40), (40, 3)):
        matrix = torch.ones(shape, dtype=torch.float64)
        found = leading_svd_in_bands(
            bands_of(matrix, 2), shape[0], start_of(shape[1], min(shape)), 1
        )
        torch.testing.assert_close(found.u * found.s @ found.vh, matrix)
    zero = leading_svd_in_bands(bands_of(torch.zeros(9, 9), 4), 9, start_of(9, 4, torch.float32), 2)
    assert (zero.square, zero.residual, float(zero.s.sum())) == (0.0, 0.0, 0.0)
