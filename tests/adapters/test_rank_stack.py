"""The rank stack against dense matrices."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import random_stack
from lora_merge.adapters.rank_stack import RankStack

ranks = st.lists(st.integers(1, 6), min_size=1, max_size=5)
sides = st.integers(1, 20)
seeds = st.integers(0, 1000)
weight = st.floats(-2, 2)


def dense(stack: RankStack, owner: int) -> torch.Tensor:
    at = stack.owner == owner
    return (stack.up[:, at] * stack.scale[at]) @ stack.down[at]


@given(ranks=ranks, d_out=sides, d_in=sides, seed=seeds)
def test_delta_is_the_sum_of_the_adapters(
    ranks: list[int], d_out: int, d_in: int, seed: int
) -> None:
    stack = random_stack(ranks, d_out, d_in, seed=seed)
    total = sum(dense(stack, i) for i in range(len(ranks)))
    torch.testing.assert_close(stack.delta(), total)
    middle = d_out // 2
    blocks = torch.cat([stack.rows(0, middle), stack.rows(middle, d_out)])
    torch.testing.assert_close(blocks, stack.delta())


@given(ranks=ranks, d_out=sides, d_in=sides, seed=seeds)
def test_products_and_norms_are_those_of_the_deltas(
    ranks: list[int], d_out: int, d_in: int, seed: int
) -> None:
    stack = random_stack(ranks, d_out, d_in, seed=seed)
    deltas = torch.stack([dense(stack, i) for i in range(len(ranks))]).flatten(1)
    torch.testing.assert_close(stack.adapter_products(), deltas @ deltas.T, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(stack.norm(), float(stack.delta().norm()), atol=1e-8, rtol=1e-8)
    other = random_stack((2,), d_out, d_in, seed=seed + 1)
    product = float((stack.delta() * other.delta()).sum())
    torch.testing.assert_close(stack.inner(other), product, atol=1e-8, rtol=1e-8)


@given(ranks=ranks, seed=seeds, data=st.data())
def test_weights_multiply_deltas_and_cancel(
    ranks: list[int], seed: int, data: st.DataObject
) -> None:
    stack = random_stack(ranks, seed=seed)
    weights = torch.tensor(
        data.draw(st.lists(weight, min_size=len(ranks), max_size=len(ranks))), dtype=torch.float64
    )
    total = sum(w * dense(stack, i) for i, w in enumerate(weights))
    torch.testing.assert_close(stack.weighted(weights).delta(), total)
    twice = RankStack.of(
        [(stack.down, stack.up, s) for s in (1.0, -1.0)]
    )  # the same adapter with +1 and -1
    assert twice.norm() < 1e-6 * max(1.0, stack.norm())


@given(ranks=ranks, seed=seeds)
def test_weighted_stack_shares_grams_already_computed(ranks: list[int], seed: int) -> None:
    stack = random_stack(ranks, seed=seed)
    known = stack.gram_up
    weighted = stack.weighted(torch.full((len(ranks),), 3.0, dtype=torch.float64))
    assert weighted.gram_up is known
    torch.testing.assert_close(weighted.norm(), 3 * stack.norm())


@given(ranks=ranks, seed=seeds)
def test_slices_put_together_again_are_the_stack(ranks: list[int], seed: int) -> None:
    stack = random_stack(ranks, seed=seed)
    parts = [stack.of_adapter(i) for i in stack.adapters]
    again = RankStack.joined(parts)
    assert torch.equal(again.down, stack.down)
    assert torch.equal(again.up, stack.up)
    assert torch.equal(again.scale, stack.scale)
    assert torch.equal(again.owner, stack.owner)


@given(ranks=ranks, seed=seeds, scale=st.sampled_from([2.0, -0.3, 1e-4, 1e4]))
def test_balanced_factors_are_the_same_delta(ranks: list[int], seed: int, scale: float) -> None:
    stack = random_stack(ranks, scales=[scale] * len(ranks), seed=seed)
    a, b = stack.balanced()
    torch.testing.assert_close(b @ a, stack.delta())
    ratio = (a.norm(dim=1) / b.norm(dim=0)).log2().abs()
    assert (ratio <= 1.001).all()


@given(seed=seeds, power=st.integers(-6, 6))
def test_balancing_keeps_every_bit_for_powers_of_two(seed: int, power: int) -> None:
    stack = random_stack((4,), scales=[2.0**power], seed=seed, dtype=torch.float32)
    a, b = stack.balanced()
    again = RankStack.of([(a, b, 1.0)])
    assert torch.equal(again.delta(), stack.delta())


@given(ranks=ranks, seed=seeds)
def test_turning_and_scaling_do_to_the_stack_what_they_do_to_the_delta(
    ranks: list[int], seed: int
) -> None:
    stack = random_stack(ranks, seed=seed)
    torch.testing.assert_close(stack.transposed().delta(), stack.delta().mT)
    torch.testing.assert_close(stack.scaled(-3.0).delta(), -3 * stack.delta())
    alone = RankStack.single(stack.up, stack.down, stack.scale)
    assert torch.equal(alone.delta(), stack.delta()) and alone.adapters == (0,)


@given(seed=seeds, power=st.sampled_from([-100, -70, 70, 100]))
def test_balancing_keeps_units_whose_squares_leave_float32(seed: int, power: int) -> None:
    one = random_stack((3,), seed=seed, dtype=torch.float32)
    lopsided = RankStack.single(one.up * 2.0**power, one.down * 2.0**-power)
    a, b = lopsided.balanced()
    expected = RankStack.single(one.up, one.down).delta()
    torch.testing.assert_close(b @ a, expected)


def test_zero_units_stay_zero() -> None:
    stack = random_stack((3,))
    stack.up[:, 1] = 0
    a, b = stack.balanced()
    assert torch.isfinite(a).all()
    torch.testing.assert_close(b @ a, stack.delta())
