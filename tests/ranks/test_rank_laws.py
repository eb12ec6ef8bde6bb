"""Laws that every spectrum, rule and stack obeys, whatever is in the adapters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import random_stack
from lora_merge.analysis.pairs.overlap import pair_tables
from lora_merge.linalg.core_svd import core_svd
from lora_merge.ranks.choose import choose_ranks

ranks = st.lists(st.integers(1, 5), min_size=1, max_size=4)
decaying = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


def values_of(stack) -> torch.Tensor:
    return core_svd(stack.up * stack.scale, stack.down).values


@given(ranks=ranks, seed=st.integers(0, 1000), d_out=st.integers(2, 30), d_in=st.integers(2, 30))
def test_a_stack_has_the_spectrum_of_the_sum(ranks, seed, d_out, d_in):
    scales = [(-1.5) ** i for i in range(len(ranks))]
    stack = random_stack(ranks, d_out, d_in, scales=scales, seed=seed)
    dense = torch.linalg.svdvals(stack.delta())
    values = values_of(stack)
    size = min(len(values), len(dense))
    torch.testing.assert_close(values[:size], dense[:size], rtol=0, atol=1e-10 * float(dense[0]))
    order = torch.randperm(stack.num_units, generator=torch.Generator().manual_seed(seed))
    shuffled = core_svd((stack.up * stack.scale)[:, order], stack.down[order]).values
    torch.testing.assert_close(shuffled, values, rtol=0, atol=1e-10 * float(dense[0]))


@given(seed=st.integers(0, 1000), rank=st.integers(1, 5))
def test_an_adapter_minus_itself_has_rank_zero_beside_its_own_size(seed, rank):
    one = random_stack([rank], seed=seed, scales=[1.0])
    up = torch.cat([one.up, -one.up], 1)
    nothing = core_svd(up, torch.cat([one.down, one.down])).values
    assert float(nothing[0]) < 1e-13 * float(values_of(one)[0])


@given(seed=st.integers(0, 1000), one=st.integers(1, 4), two=st.integers(1, 4))
def test_weyl_and_the_triangle_inequalities(seed, one, two):
    stack = random_stack([one, two], seed=seed)
    first, second = (values_of(stack.of_adapter(i)) for i in (0, 1))
    both = values_of(stack)
    padded = torch.zeros(len(both), dtype=torch.float64)
    padded[: len(first)] = first
    slack = 1e-9 * float(both[0])
    assert bool((both <= padded + second[0] + slack).all())
    assert float(both.sum()) <= float(first.sum() + second.sum()) + slack
    norm = torch.linalg.vector_norm
    assert float(norm(both)) <= float(norm(first) + norm(second)) + slack


@given(values=decaying, low=st.floats(0.05, 1), high=st.floats(0.05, 1))
@pytest.mark.parametrize("kind", ["energy", "nuclear", "soka", "peft"])
def test_share_rules_are_monotone_and_within_bounds(kind, values, low, high):
    low, high = sorted((low, high))
    picked = [
        choose_ranks({"m": values}, {"m": 1}, f"{kind}:{level}").ranks["m"] for level in (low, high)
    ]
    assert 1 <= picked[0] <= picked[1] <= len(values)


@given(values=decaying, level=st.floats(0.05, 0.999), scale=st.floats(1e-3, 1e3))
@pytest.mark.parametrize("kind", ["energy", "nuclear", "elbow", "erank", "welore", "full"])
def test_relative_rules_do_not_see_the_scale(kind, values, level, scale):
    rule = kind if kind in ("elbow", "erank", "full") else f"{kind}:{level}"

    def pick(spectrum):
        return choose_ranks({"m": spectrum}, {"m": 1}, rule).ranks["m"]

    scale = 2.0 ** round(torch.tensor(scale).log2().item())  # exact, so that ties stay ties
    assert pick(values) == pick(values * scale)


@given(values=decaying, level=st.floats(0.05, 0.999))
def test_nuclear_ranks_are_minimal(values, level):
    rank = choose_ranks({"m": values}, {"m": 1}, f"nuclear:{level}").ranks["m"]
    total = float(values.sum())
    assert float(values[:rank].sum()) >= level * total * (1 - 1e-12)
    if rank > 1:
        assert float(values[: rank - 1].sum()) < level * total * (1 + 1e-12)


@given(seed=st.integers(0, 500), share=st.floats(0.2, 1), step=st.sampled_from([1, 2, 4]))
def test_budgets_keep_prefixes_and_multiples(seed, share, step):
    random = torch.Generator().manual_seed(seed)
    spectra = {
        f"m{i}": torch.rand(8, generator=random, dtype=torch.float64).sort(descending=True).values
        for i in range(4)
    }
    costs = {name: 3 + i for i, name in enumerate(spectra)}
    budget = f"budget:x{max(share, step / 8)}"
    for exact in (False, True):
        plan = choose_ranks(spectra, costs, budget, round_to=step, exact=exact)
        assert plan.parameters <= max(share, step / 8) * plan.parameters_before
        assert all(rank % step == 0 or rank == 1 for rank in plan.ranks.values())


@given(seed=st.integers(0, 500), rank=st.integers(1, 5))
def test_subspaces_do_not_depend_on_the_factors_that_span_them(seed, rank):
    stack = random_stack([rank, rank], 20, 18, seed=seed)
    random = torch.Generator().manual_seed(seed)
    gauge = torch.randn(rank, rank, generator=random, dtype=torch.float64) + 3 * torch.eye(rank)
    a, b = stack.of_adapter(0), stack.of_adapter(1)
    changed = type(stack).of(
        [
            (torch.linalg.solve(gauge, a.down), a.up @ gauge, float(a.scale[0])),
            (b.down, b.up, float(b.scale[0])),
        ]
    )
    one, two = (pair_tables(s, 2, samples=10, seed=0, angles=True) for s in (stack, changed))
    for name in ("products", "overlap_in", "overlap_out", "cosine_in", "cosine_out"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-6, atol=1e-7)


def test_orthogonal_spaces_do_not_overlap_and_a_rotated_basis_overlaps_fully():
    identity = torch.eye(6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    stack = random_stack([1]).of(
        [
            (identity[:2], identity[:, :2], 1.0),
            (identity[2:4], identity[:, 2:4], 1.0),
            (rotation @ identity[:2], identity[:, :2] @ rotation, 1.0),
        ]
    )
    got = pair_tables(stack, 3, samples=10, seed=0, angles=True)
    assert float(got.overlap_in[0, 1]) == pytest.approx(0, abs=1e-12)
    assert float(got.overlap_out[0, 2]) == pytest.approx(1)
    assert float(got.cosine_in[0, 2]) == pytest.approx(1)
