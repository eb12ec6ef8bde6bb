"""LoRA-LEGO refitted: against plain dense least squares, its limits, and what it says of itself."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import merge_one

from builders import random_stack
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.merge.methods.method import Job, Outcome
from lora_merge.merge.methods.registry import find_method

ranks = st.lists(st.integers(1, 5), min_size=2, max_size=4)
seeds = st.integers(0, 500)
few = settings(max_examples=25)


def outcome(stack: RankStack, k: int, method: str = "lego-refit", **parameters: Any) -> Outcome:
    chosen = find_method(method)
    weights = torch.ones(max(stack.adapters) + 1, dtype=torch.float64)
    return chosen.combine(stack, Job("layers.0", k, weights, 0), chosen.parse(parameters))


def objective(stack: RankStack, x: np.ndarray, ridge: float = 0.01) -> float:
    """sum_i |D_i^T (X - D_i)|^2 / |D_i|^2 plus the pull to the sum, on dense float64 matrices."""
    deltas = [stack.of_adapter(i).delta().double().numpy() for i in stack.adapters]
    metrics = [d @ d.T / np.sum(d * d) for d in deltas]
    # The mean eigenvalue is that of the directions which the adapters have.
    size = np.linalg.matrix_rank(np.concatenate(deltas, axis=1), tol=1e-9)
    pull = ridge * np.trace(sum(metrics)) / size
    off = x - sum(deltas)
    return sum(np.sum((x - d) * (h @ (x - d))) for d, h in zip(deltas, metrics, strict=True)) + (
        pull * float(np.sum(off * off))
    )


@given(ranks=ranks, k=st.integers(1, 6), seed=seeds)
@few
def test_each_half_solved_for_minimises_the_objective(ranks, k, seed) -> None:
    """No small step of the half that was solved for last makes the objective smaller."""
    stack = random_stack(ranks, 24, 20, seed=seed)
    k = min(k, stack.num_units)
    result = outcome(stack, k, beta=0.0).stack
    up, down = (result.up * result.scale).double().numpy(), result.down.double().numpy()
    here = objective(stack, up @ down)
    random = np.random.default_rng(seed)
    for _ in range(5):
        step = 1e-3 * random.standard_normal(up.shape) * np.abs(up).max()
        # Only directions that the adapters have: the ridge holds there.
        basis = np.linalg.svd(stack.up.double().numpy(), full_matrices=False)[0]
        step = basis @ (basis.T @ step)
        assert objective(stack, (up + step) @ down) >= here * (1 - 1e-6)


@given(ranks=ranks, seed=seeds)
@few
def test_with_a_unit_for_every_unit_it_is_wudi_iso(ranks, seed) -> None:
    stack = random_stack(ranks, 24, 20, seed=seed)
    whole = merge_one(stack, "wudi-iso").double()
    mine = merge_one(stack, "lego-refit", rank=stack.num_units).double()
    assert float((mine - whole).norm()) <= 1e-5 * float(whole.norm())


@given(ranks=ranks, k=st.integers(1, 6), seed=seeds)
@few
def test_a_round_more_is_never_worse_and_the_best_cut_never_better_than_the_bound(
    ranks, k, seed
) -> None:
    stack = random_stack(ranks, 24, 20, seed=seed)
    k = min(k, stack.num_units)

    def reached(method: str, **parameters: Any) -> float:
        merged = merge_one(stack, method, rank=k, parameters={"beta": 0.0, **parameters})
        return objective(stack, merged.double().numpy())

    up, one, five = (
        reached("lego-refit", refit="up"),
        reached("lego-refit", rounds=1),
        reached("lego-refit", rounds=5),
    )
    best = reached("wudi-iso")
    slack = 1e-5 * abs(up)
    assert best - slack <= five <= one + slack <= up + 2 * slack


@pytest.mark.parametrize("method", ["lego", "lego-refit"])
@given(ranks=ranks, k=st.integers(1, 8), seed=seeds)
@few
def test_every_unit_is_named_once(method, ranks, k, seed) -> None:
    stack = random_stack(ranks, 24, 20, seed=seed)
    k = min(k, stack.num_units)
    found = outcome(stack, k, method)
    members = [m for cluster in found.details["clusters"] for m in cluster]
    assert len(found.details["clusters"]) == k == found.stack.num_units
    assert sorted((m[0], m[1]) for m in members) == [
        (owner, j) for owner, rank in enumerate(ranks) for j in range(rank)
    ]
    for owner in stack.adapters:
        assert sum(m[5] for m in members if m[0] == owner) == pytest.approx(
            1, abs=1e-3 * len(ranks)
        )
    assert [len(c) for c in found.details["clusters"]] == found.details["cluster_sizes"]


def test_the_cosine_of_a_member_is_that_of_the_two_matrices() -> None:
    stack = random_stack([3, 2], 24, 20, seed=1)
    found = outcome(stack, 2, "lego")
    for c, cluster in enumerate(found.details["clusters"]):
        unit = found.stack.units(torch.tensor([c])).delta().double()
        for owner, j, sign, cosine, kept, _ in cluster:
            own = stack.of_adapter(owner).units(torch.tensor([j])).delta().double()
            inner = float((own * unit).sum() / (own.norm() * unit.norm()))
            assert abs(inner) == pytest.approx(cosine, abs=2e-4)
            assert sign == (1 if inner >= 0 else -1)
            done = float((own * found.stack.delta().double()).sum() / own.square().sum())
            assert done == pytest.approx(kept, abs=2e-4)
