"""The noise threshold: constants of Gavish and Donoho, and ranks beside those of a full SVD."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.reshape import noise
from lora_merge.reshape.noise import known_noise_factor, median_factor, noise_rank


@pytest.mark.parametrize(
    ("beta", "known"), [(1, 2.309401), (0.5, 1.978599), (0.25, 1.758029), (2 / 7, 1.793632)]
)
def test_constants(beta, known):
    assert known_noise_factor(beta) == pytest.approx(known, abs=1e-6)
    cubic = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43  # the paper's approximation
    assert median_factor(beta) == pytest.approx(cubic, abs=0.02)


def test_the_square_case_has_the_papers_constant():
    assert median_factor(1) == pytest.approx(2.858, abs=5e-4)


def test_the_median_of_noise_is_where_it_is_said_to_be():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1600, generator=random, dtype=torch.float64)
    median = float(torch.linalg.svdvals(x).median()) / 40
    assert median == pytest.approx(known_noise_factor(0.25) / median_factor(0.25), rel=5e-3)


@given(
    seed=st.integers(0, 1000),
    small=st.integers(2, 24),
    large=st.integers(2, 24),
    signal=st.integers(0, 6),
    strength=st.floats(0, 30),
    keep=st.integers(1, 24),
)
def test_the_rank_is_that_of_the_full_spectrum(seed, small, large, signal, strength, keep):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    matrix = normal(small, large) + strength * normal(small, signal) @ normal(signal, large)
    values = torch.linalg.svdvals(matrix)
    threshold = median_factor(min(small, large) / max(small, large)) * values.median()
    leading, rest = values[:keep], values[keep:]
    found = noise_rank(matrix, leading, float(rest.square().sum()))
    assert found == int((leading > threshold).sum())


def test_a_clear_signal_costs_no_factorisation(monkeypatch):
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 4, generator=random) @ torch.randn(4, 80, generator=random)
    matrix = matrix + 1e-4 * torch.randn(60, 80, generator=random)
    values = torch.linalg.svdvals(matrix.double())
    monkeypatch.setattr(noise, "gram", lambda rows: pytest.fail("not needed"))
    assert noise_rank(matrix, values[:4], float(values[4:].square().sum())) == 4


def test_a_guess_that_holds_takes_two_counts(monkeypatch):
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(200, 5, generator=random) @ torch.randn(5, 300, generator=random)
    matrix = (matrix + torch.randn(200, 300, generator=random)).double()
    values = torch.linalg.svdvals(matrix)
    count, calls = noise._count_below, []
    monkeypatch.setattr(noise, "_count_below", lambda *a: calls.append(a) or count(*a))
    assert noise_rank(matrix, values[:64], float(values[64:].square().sum())) == 5
    assert len(calls) <= 2
