"""Sums of very many units against dense float64 decompositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge.linalg.unit_sums import estimated_square, leading_units

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def units(count: int, m: int, n: int, *, seed: int = 0, decay: float = 1.0) -> Factors:
    random = torch.Generator().manual_seed(seed)
    up, down = torch.randn(m, count, generator=random), torch.randn(count, n, generator=random)
    return up, decay ** torch.arange(count, dtype=torch.float64), down


def dense(factors: Factors) -> torch.Tensor:
    up, scale, down = factors
    return (up.double() * scale) @ down.double()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 300),
    rank=st.integers(1, 12),
    decay=st.sampled_from([1.0, 0.97, 0.5]),
    shape=st.sampled_from([(90, 70), (40, 200), (200, 8)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_cut_is_a_projection_with_the_energy_of_the_exact_one(
    seed, count, rank, decay, shape, dtype
):
    up, scale, down = units(count, *shape, seed=seed, decay=decay)
    factors = up.to(dtype), scale, down.to(dtype)
    delta = dense(factors)
    found = leading_units(*factors, rank)
    best = float(torch.linalg.svdvals(delta)[:rank].square().sum())
    kept = float(found.s.square().sum())
    assert (1 - 1e-3) * best <= kept <= (1 + 1e-5) * best
    frame = found.u.double()
    size = torch.eye(len(found.s)).double()
    torch.testing.assert_close(frame.mT @ frame, size, atol=1e-5, rtol=0)
    wanted, close = delta @ found.vh.double().mT, 1e-5 * float(delta.norm())
    torch.testing.assert_close(frame * found.s, wanted, atol=close, rtol=0)


@given(seed=st.integers(0, 200), count=st.sampled_from([20, 400]))
def test_norms_are_right_within_their_errors(seed, count):
    factors = units(count, 80, 60, seed=seed)
    exact = float(dense(factors).square().sum())
    found = leading_units(*factors, 4)
    for square, error in ((found.square, found.error), estimated_square(*factors)):
        assert abs(square - exact) <= 6 * error + 1e-5 * exact
        assert error < 0.2 * exact


def test_what_the_search_holds_is_not_estimated():
    """A sum of low rank, however many units it is made of: nothing is left to guess."""
    up, scale, down = units(3, 80, 60)
    many = up.repeat(1, 700), scale.repeat(700), down.repeat(700, 1)
    found = leading_units(*many, 3)
    exact = float(dense(many).square().sum())
    assert found.square == pytest.approx(exact, rel=1e-5)
    assert found.error < 1e-5 * exact


def test_nothing_has_norm_zero():
    up, scale, down = units(40, 30, 20)
    found = leading_units(up, 0 * scale, down, 4)
    assert (float(found.s.sum()), found.square, found.error) == (0.0, 0.0, 0.0)
    assert estimated_square(up, 0 * scale, down) == (0.0, 0.0)


def test_equal_inputs_give_equal_bits():
    one, other = (leading_units(*units(400, 80, 60), 5) for _ in range(2))
    assert torch.equal(one.u, other.u) and torch.equal(one.vh, other.vh)
    assert (one.square, one.error) == (other.square, other.error)
