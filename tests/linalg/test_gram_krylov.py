"""The leading triplets from Grams alone, against dense float64 decompositions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.linalg.factors import gram
from lora_merge.linalg.gram_krylov import leading_triplets

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def units(count: int, m: int, n: int, *, seed: int = 0, decay: float = 1.0) -> Factors:
    random = torch.Generator().manual_seed(seed)
    up = torch.randn(m, count, generator=random, dtype=torch.float64)
    down = torch.randn(count, n, generator=random, dtype=torch.float64)
    return up, decay ** torch.arange(count, dtype=torch.float64), down


def leading(factors: Factors, rank: int, precise: torch.dtype = torch.float64, **options):
    up, scale, down = factors
    grams = gram(up.mT, precise=precise), gram(down, precise=precise)
    return leading_triplets(up, scale, down, *grams, rank, **options)


def kept(factors: Factors, rank: int) -> float:
    up, scale, down = factors
    return float(torch.linalg.svdvals((up * scale) @ down)[:rank].square().sum())


@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 120),
    rank=st.integers(1, 12),
    decay=st.sampled_from([1.0, 0.97, 0.5]),
    shape=st.sampled_from([(90, 70), (40, 200), (200, 8)]),
    precise=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_energy_is_that_of_the_exact_cut(seed, count, rank, decay, shape, precise):
    factors = units(count, *shape, seed=seed, decay=decay)
    u, s, vh = leading(factors, rank, precise)
    best = kept(factors, rank)
    # A start in which the wanted directions are weak may stop early; within 0.1 % of the energy.
    assert (1 - 1e-3) * best <= float(s.square().sum()) <= (1 + 1e-12) * best
    up, scale, down = factors
    torch.testing.assert_close(u.mT @ u, torch.eye(len(s)).double(), atol=1e-9, rtol=0)
    # An exact projection of the sum, whatever directions were found.
    delta = (up * scale) @ down
    torch.testing.assert_close(u * s, delta @ vh.mT, atol=1e-9 * float(delta.norm()), rtol=0)


@given(seed=st.integers(0, 100))
def test_copies_negations_and_zeros_do_not_disturb_it(seed):
    up, scale, down = units(30, 50, 60, seed=seed, decay=0.9)
    zero = torch.zeros_like(down)
    factors = (
        torch.cat([up, up, -up[:, :5], up], dim=1),
        torch.cat([scale, 2 * scale, scale[:5], scale]),
        torch.cat([down, down, down[:5], zero]),
    )
    _, s, _ = leading(factors, 4)
    assert float(s.square().sum()) == pytest.approx(kept(factors, 4), rel=1e-3)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_units_of_very_different_sizes_keep_their_place(factor):
    up, scale, down = units(60, 50, 60)
    down[:30] *= factor
    up[:, :30] /= factor
    _, s, _ = leading((up, scale, down), 6)
    assert float(s.square().sum()) == pytest.approx(kept((up, scale, down), 6), rel=1e-3)


def test_nothing_has_no_directions_and_little_has_few():
    up, scale, down = units(40, 50, 60)
    u, s, vh = leading((up, 0 * scale, down), 4)
    assert (u.shape, s.shape, vh.shape) == ((50, 0), (0,), (0, 60))
    one = (up[:, :1].expand(-1, 40).contiguous(), scale, down)
    assert float(leading(one, 4)[1].square().sum()) == pytest.approx(kept(one, 4), rel=1e-6)


def test_equal_inputs_give_equal_bits():
    first, second = (leading(units(80, 50, 60), 5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
