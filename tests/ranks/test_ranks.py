"""Rank rules: reference values, off-by-one facts of other tools, and the laws of allocation."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge.errors import MethodError
from lora_merge.ranks.budget import Choice, cut_at_threshold, optimise, water_fill
from lora_merge.ranks.choose import choose_ranks
from lora_merge.ranks.rule import RankRule, parse_rule, rule_names


def spectrum(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rank_of(rule: str, *values: float, **options: int) -> int:
    plan = choose_ranks({"m": spectrum(*values)}, {"m": 10}, rule, **options)
    return plan.ranks["m"]


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        ("2", 2),
        ("99", 4),
        ("full", 4),
        ("energy:0.9", 3),
        ("energy:0.81", 2),  # sd-scripts' sv_fro 0.9 without its one more
        ("peft:0.9", 3),
        ("energy:1", 4),
        ("nuclear:0.65", 2),
        ("nuclear:0.75", 3),
        ("ratio:2", 2),  # strictly above 4 / 2
        ("ratio:1.5", 2),
        ("erank", 4),
        ("kohya-cumulative:0.65", 3),
        ("kohya-cumulative:0.75", 4),
        ("kohya-fro:0.9", 3),
        ("kohya-ratio:2", 3),
        ("kohya-ratio:1.5", 3),
        ("lycoris-quantile:0.65", 1),
        ("lycoris-quantile:0.75", 2),
        ("lycoris-ratio:0.5", 2),
        ("lycoris-threshold:2.5", 2),
        ("welore:0.5", 3),
    ],
)
def test_rules_on_4321(rule, rank):
    assert rank_of(rule, 4, 3, 2, 1) == rank


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ((10, 9, 1, 0.9, 0.8), 2),
        ((8, 4, 2, 1), 2),
        ((5, 5, 5, 5), 4),
        ((4, 3, 2, 1), 4),
        ((2, 1), 2),
        ((100, 1, 0.9, 0.8), 1),
    ],
)
def test_elbow(values, rank):
    assert rank_of("elbow", *values) == rank


def test_soka_takes_the_smaller():
    assert rank_of("soka:0.999", 10, 9, 1, 0.9, 0.8) == 2
    assert rank_of("soka:0.5", 10, 9, 1, 0.9, 0.8) == 1


def test_welore_prunes_the_light_tail():
    assert rank_of("welore:0.15", 10, 9, 1, 0.9, 0.8) == 2


@pytest.mark.parametrize(
    "text",
    [
        *rule_names(),
        "16",
        "budget:x0.5",
        "budget:120000",
        "match:4",
        "energy:0.99999999",
        "1234567",
    ],
)
def test_rules_round_trip(text):
    if text in ("fixed", "budget", "match"):
        with pytest.raises(MethodError, match="needs a number"):
            parse_rule(text)
        return
    rule = parse_rule(text)
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    [
        "",
        "enrgy:0.9",
        "energy:1.5",
        "energy:nan",
        "energy:x",
        "budget:x2",
        "budget:-1",
        "-3",
        "elbow:3",
        "fixed:2.5",
        "budget:10.5",
        "ratio:0.5",
        "match:0",
    ],
)
def test_bad_rules_are_refused(text):
    with pytest.raises(MethodError) as caught:
        parse_rule(text)
    assert caught.value.remedy


def test_zero_modules_keep_one_rank_or_none():
    spectra = {"zero": spectrum(0, 0, 0), "one": spectrum(2, 1, 0)}
    costs = {"zero": 5, "one": 7}
    for rule in ("energy:0.9", "elbow", "erank", "nuclear:0.9", "budget:x0.5", "welore:x0.9"):
        kept = choose_ranks(spectra, costs, rule)
        assert kept.ranks["zero"] == 1
        assert choose_ranks(spectra, costs, rule, min_rank=0).ranks["zero"] == 0
        json.dumps(kept.to_dict(), allow_nan=False)
    assert choose_ranks(spectra, costs, "full").ranks == {"zero": 1, "one": 2}


def test_non_finite_values_are_named():
    with pytest.raises(MethodError, match="m: "):
        choose_ranks({"m": spectrum(1, float("nan"))}, {"m": 1}, "energy")


def test_rounding_and_caps():
    assert rank_of("3", *range(20, 0, -1), round_to=8) == 8
    assert rank_of("energy:1", *range(20, 0, -1), round_to=8) == 20
    assert rank_of("energy:1", *range(20, 0, -1), max_rank=5) == 5
    assert rank_of("1", *range(20, 0, -1), min_rank=4) == 4


# The knapsack: c = (5, 18), spectra (3, 1) and (4, 3), smallest rank 0.
KNAPSACK = {"a": spectrum(3, 1), "b": spectrum(4, 3)}


@pytest.mark.parametrize(
    ("budget", "ranks", "loss"),
    [(18, (0, 1), 19), (23, (1, 1), 10), (28, (2, 1), 9), (41, (1, 2), 1), (46, (2, 2), 0)],
)
def test_exact_budget_on_the_knapsack(budget, ranks, loss):
    plan = choose_ranks(KNAPSACK, {"a": 5, "b": 18}, f"budget:{budget}", min_rank=0, exact=True)
    assert tuple(plan.ranks.values()) == ranks
    assert plan.certificate.loss == pytest.approx(loss)
    assert plan.certificate.gap == 0


def test_water_filling_states_how_far_off_it_may_be():
    plan = choose_ranks(KNAPSACK, {"a": 5, "b": 18}, "budget:18", min_rank=0)
    # density: a1 9/5, b1 16/18, b2 1/2, a2 1/5; b1 does not fit beside a1, a2 does
    assert plan.ranks == {"a": 2, "b": 0}
    assert plan.certificate.loss == pytest.approx(25)
    assert plan.certificate.lower_bound == pytest.approx(26 - 16 / 18 * 13)
    assert plan.certificate.lower_bound <= 19


def test_density_greedy_counter_example():
    spectra = {"a": spectrum(2.1**0.5), "b": spectrum(3.0**0.5)}
    greedy = choose_ranks(spectra, {"a": 2, "b": 3}, "budget:3", min_rank=0)
    best = choose_ranks(spectra, {"a": 2, "b": 3}, "budget:3", min_rank=0, exact=True)
    assert greedy.certificate.loss == pytest.approx(3.0)
    assert best.certificate.loss == pytest.approx(2.1)
    assert greedy.certificate.lower_bound <= 2.1


def test_squared_errors_are_not_the_sum_of_errors():
    """Water-filling minimises sum of squares: 1.90 of unsquared error where 1.353 is possible."""
    spectra = {"a": spectrum(1, 1), "b": spectrum(1.01, 0.9)}
    plan = choose_ranks(spectra, {"a": 1, "b": 1}, "budget:2", min_rank=0)
    assert plan.ranks == {"a": 1, "b": 1}
    errors = [float(v[plan.ranks[n] :].square().sum().sqrt()) for n, v in spectra.items()]
    assert sum(errors) == pytest.approx(1.90)


def test_the_dynamic_programme_needs_no_convexity():
    tables = {"a": (2**0.5, 1.0, 0.0), "b": ((1.01**2 + 0.81) ** 0.5, 0.9, 0.0)}
    choices = [Choice(n, (0, 1, 2), 1, np.array(t)) for n, t in tables.items()]
    ranks, certificate = optimise(choices, 2)
    assert certificate.loss == pytest.approx(1.3528, abs=1e-4)
    assert ranks == {"a": 2, "b": 0} or ranks == {"a": 0, "b": 2}


def random_problem(seed: int, count: int) -> tuple[dict, dict]:
    generator = np.random.default_rng(seed)
    spectra, costs = {}, {}
    for index in range(count):
        size = int(generator.integers(1, 5))
        values = np.sort(generator.exponential(size=size) * 10 ** generator.uniform(-2, 2))[::-1]
        spectra[f"m{index}"] = torch.from_numpy(values.copy())
        costs[f"m{index}"] = int(generator.integers(1, 12))
    return spectra, costs


def brute_force(spectra, costs, budget):
    best = float("inf")
    for ranks in itertools.product(*(range(len(v) + 1) for v in spectra.values())):
        if sum(c * k for c, k in zip(costs.values(), ranks, strict=True)) <= budget:
            loss = sum(float((v[k:] ** 2).sum()) for v, k in zip(spectra.values(), ranks))  # noqa: B905
            best = min(best, loss)
    return best


@given(seed=st.integers(0, 10_000), count=st.integers(1, 4), share=st.floats(0.05, 1))
@settings(max_examples=80, deadline=None)
def test_budget_laws(seed, count, share):
    spectra, costs = random_problem(seed, count)
    budget = int(share * sum(costs[n] * len(v) for n, v in spectra.items()))
    truth = brute_force(spectra, costs, budget)
    rule = RankRule("budget", budget, "parameters")
    exact = choose_ranks(spectra, costs, rule, min_rank=0, exact=True)
    greedy = choose_ranks(spectra, costs, rule, min_rank=0)
    scale = sum(float((v**2).sum()) for v in spectra.values())
    assert exact.certificate.loss == pytest.approx(truth, abs=1e-9 * scale)
    assert exact.parameters <= budget and greedy.parameters <= budget
    assert greedy.certificate.lower_bound <= truth + 1e-9 * scale
    assert greedy.certificate.loss <= truth + greedy.certificate.gap + 1e-9 * scale
    backwards = dict(reversed(list(spectra.items())))
    assert choose_ranks(backwards, costs, rule, min_rank=0).ranks == greedy.ranks
    more = RankRule("budget", budget + 3, "parameters")
    assert choose_ranks(spectra, costs, more, min_rank=0, exact=True).certificate.loss <= (
        exact.certificate.loss + 1e-9 * scale
    )


@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), share=st.floats(0.05, 1))
@settings(max_examples=50, deadline=None)
def test_equal_costs_make_water_filling_optimal(seed, count, share):
    spectra, _ = random_problem(seed, count)
    costs = dict.fromkeys(spectra, 7)
    rule = RankRule("budget", int(share * 7 * sum(map(len, spectra.values()))), "parameters")
    greedy = choose_ranks(spectra, costs, rule, min_rank=0).certificate
    exact = choose_ranks(spectra, costs, rule, min_rank=0, exact=True).certificate
    assert greedy.loss == pytest.approx(exact.loss)


@given(seed=st.integers(0, 10_000), uniform=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_match_is_no_worse_and_no_larger_than_uniform(seed, uniform):
    spectra, costs = random_problem(seed, 4)
    plan = choose_ranks(spectra, costs, f"match:{uniform}", min_rank=0)
    loss = sum(float((v[plan.ranks[n] :] ** 2).sum()) for n, v in spectra.items())
    allowed = sum(float((v[uniform:] ** 2).sum()) for v in spectra.values())
    assert loss <= allowed * (1 + 1e-9)
    assert plan.parameters <= sum(costs[n] * min(uniform, len(v)) for n, v in spectra.items())


def test_weights_decide_who_is_served():
    spectra = {"big": spectrum(100, 90), "small": spectrum(1, 0.9)}
    costs = {"big": 1, "small": 1}
    absolute = choose_ranks(spectra, costs, "budget:2", min_rank=0)
    weights = {n: 1 / float((v**2).sum()) for n, v in spectra.items()}
    relative = choose_ranks(spectra, costs, "budget:2", min_rank=0, weights=weights)
    assert absolute.ranks == {"big": 2, "small": 0}
    assert relative.ranks == {"big": 1, "small": 1}


def test_one_threshold_for_a_budget():
    spectra = {"a": spectrum(10, 9, 1), "b": spectrum(2, 1.9, 1.8)}
    plan = choose_ranks(spectra, {"a": 1, "b": 1}, "welore:5")
    assert plan.ranks == {"a": 2, "b": 3}
    assert plan.threshold == pytest.approx(0.9)
    for name, values in spectra.items():
        assert plan.ranks[name] == int((values >= plan.threshold * values[0]).sum())


def test_equal_values_stand_or_fall_together():
    choices = [Choice(n, (0, 1, 2), 1, np.array([2.0, 1.0, 0.0])) for n in "ab"]
    values = {n: np.array([1.0, 1.0]) for n in "ab"}
    assert cut_at_threshold(values, choices, 3)[0] == {"a": 0, "b": 0}
    assert cut_at_threshold(values, choices, 4)[0] == {"a": 2, "b": 2}


def test_a_budget_below_the_smallest_ranks_is_refused():
    with pytest.raises(MethodError, match="below the smallest ranks"):
        choose_ranks(KNAPSACK, {"a": 5, "b": 18}, "budget:10")


def test_plan_reports_energy_and_parameters():
    plan = choose_ranks(KNAPSACK, {"a": 5, "b": 18}, "1", before={"a": 4, "b": 4})
    assert plan.parameters == 23 and plan.parameters_before == 92
    assert plan.modules["a"].energy == pytest.approx(0.9)
    assert plan.energy == pytest.approx((9 + 16) / 35)


def test_a_whole_model_is_allocated_exactly_in_seconds():
    generator = np.random.default_rng(0)
    spectra, costs = {}, {}
    for layer in range(32):
        for name, cost in (("q", 8192), ("k", 5120), ("gate", 18432), ("down", 18432)):
            decay = np.exp(-np.arange(16) * generator.uniform(0.05, 1))
            spectra[f"{layer}.{name}"] = torch.from_numpy(decay * generator.exponential())
            costs[f"{layer}.{name}"] = cost
    greedy = choose_ranks(spectra, costs, "budget:x0.33").certificate
    exact = choose_ranks(spectra, costs, "budget:x0.33", exact=True).certificate
    assert exact.unit == 1024
    assert greedy.lower_bound <= exact.loss <= greedy.loss
    assert greedy.gap < 5e-3 * exact.loss


def test_water_fill_ignores_worthless_steps():
    choice = Choice("m", (0, 1, 2), 3, np.array([1.0, 0.0, 0.0]))
    assert water_fill([choice], 100)[0] == {"m": 1}
