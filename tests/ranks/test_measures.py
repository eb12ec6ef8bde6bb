"""Closed-form spectra, and the laws every spectrum obeys."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_merge.ranks.measures import measure, noise_tail, rank_at_energy, tail_energy

PHI = (1 + math.sqrt(5)) / 2
SHAPE = (64, 48)

# sigma: frobenius, nuclear, stable, effective, entropy of energy, participation, (sigma), condition
CLOSED = {
    (4, 3): (5, 7, 1.5625, 1.979626, 1.922100, 625 / 337, 49 / 25, 4 / 3),
    (PHI**2, PHI**-2): (7**0.5, 3, 1.021286, 1.464134, 1.106609, 49 / 47, 9 / 7, PHI**4),
    (4, 3, 2, 1): (30**0.5, 10, 1.875, 3.596115, 2.940198, 900 / 354, 10 / 3, 4),
    (8, 4, 2, 1): (85**0.5, 15, 1.328125, 3.117142, 2.062916, 1.653696, 2.647059, 8),
    (1, 1, 1, 1): (2, 4, 4, 4, 4, 4, 4, 1),
}

spectra = st.lists(st.floats(0, 1e3), min_size=1, max_size=16).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


def spectrum(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("values", "expected"), CLOSED.items(), ids=str)
def test_closed_forms(values, expected):
    m = measure(spectrum(*values), SHAPE)
    got = (
        m.frobenius,
        m.nuclear,
        m.stable_rank,
        m.effective_rank,
        m.entropy_rank_energy,
        m.participation_ratio,
        m.participation_sigma,
        m.condition,
    )
    assert got == pytest.approx(expected, rel=1e-6)
    assert m.spectral == values[0]


def test_zero_has_no_nan():
    m = measure(spectrum(0, 0, 0), SHAPE)
    assert m.stable_rank == m.effective_rank == m.numerical_rank == 0
    assert m.condition is None
    json.dumps(m.to_dict(), allow_nan=False)


def test_energies_of_4321():
    values = spectrum(4, 3, 2, 1)
    energies = 1 - tail_energy(values)[1:] / 30
    assert energies.tolist() == pytest.approx([16 / 30, 25 / 30, 29 / 30, 1])
    assert [rank_at_energy(values, t) for t in (0.5, 0.9, 0.95, 0.99, 1.0)] == [1, 3, 3, 4, 4]


def test_an_energy_level_hit_exactly_is_enough():
    assert rank_at_energy(spectrum(3, 1), 0.9) == 1
    assert rank_at_energy(spectrum(3, 1e-9), 1.0) == 2


@given(spectra)
def test_renyi_order_and_strict_json(values):
    m = measure(values, SHAPE)
    json.dumps(m.to_dict(), allow_nan=False)
    if m.frobenius == 0:
        return
    slack = 1 + 1e-9
    assert m.stable_rank * slack >= 1
    assert m.stable_rank <= m.participation_ratio * slack
    assert m.participation_ratio <= m.entropy_rank_energy * slack
    assert m.entropy_rank_energy <= m.effective_rank * slack
    assert m.stable_rank <= m.participation_sigma * slack
    assert m.participation_sigma <= m.effective_rank * slack
    assert m.effective_rank <= len(values) * slack
    assert m.frobenius <= m.nuclear * slack


@given(spectra, st.floats(1e-6, 1e6))
def test_shape_numbers_do_not_depend_on_scale(values, scale):
    one, two = measure(values, SHAPE), measure(values * scale, SHAPE)
    assert two.frobenius == pytest.approx(one.frobenius * scale)
    assert two.effective_rank == pytest.approx(one.effective_rank)
    assert two.stable_rank == pytest.approx(one.stable_rank)


@given(spectra, st.floats(0.01, 1), st.floats(0.01, 1))
def test_energy_rank_is_minimal_and_monotone(values, one, two):
    rank = rank_at_energy(values, one)
    kept = tail_energy(values)
    if float(kept[0]) > 0:
        assert float(kept[rank]) <= (1 - one + 1e-12) * float(kept[0])
        assert float(kept[rank - 1]) > (1 - one) * float(kept[0])
    low, high = sorted((one, two))
    assert rank_at_energy(values, low) <= rank_at_energy(values, high)


def test_slopes_of_exponential_and_power_law_decay():
    i = torch.arange(1, 13, dtype=torch.float64)
    assert measure(torch.exp(-0.7 * i), SHAPE).decay == pytest.approx(-0.7)
    assert measure(i**-1.5, SHAPE).power == pytest.approx(-1.5)


def test_random_factors_are_a_plateau_and_signal_is_not():
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(512, 16, generator=generator, dtype=torch.float64)
    down = torch.randn(16, 512, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(up @ down)[:16]
    assert noise_tail(values, (512, 512)) == 16
    planted = torch.cat([values[:4] * 50, values[4:]])
    assert noise_tail(planted, (512, 512)) == 12
    assert noise_tail(torch.logspace(0, -6, 16, dtype=torch.float64), (512, 512)) == 0


def test_rounding_to_bfloat16_does_not_count_as_rank():
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(400, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    down = torch.randn(16, 4, generator=generator) @ torch.randn(4, 300, generator=generator)
    values = torch.linalg.svdvals(up.bfloat16().double() @ down.bfloat16().double())[:16]
    assert measure(values, (400, 300), "F64").numerical_rank == 16
    assert measure(values, (400, 300), "BF16").numerical_rank == 4
