"""Streaming in delta space: the same bits for any block, the dense result, the optimal cut."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import random_stack
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.merge.elementwise.bands import blocks_of
from lora_merge.merge.elementwise.blocks import in_turn
from lora_merge.merge.elementwise.combine import measure, merge_tensor
from lora_merge.merge.elementwise.delta import merge_delta
from lora_merge.merge.elementwise.rule import preset, rule_names
from lora_merge.merge.elementwise.thresholds import guess_thresholds

KEYS = (11, 22, 33)
WEIGHTS = (1.0, -0.5, 1.9)
COMPATS = ("authors", "peft", "mergekit")


def deltas(stack: RankStack) -> torch.Tensor:
    return torch.stack([stack.of_adapter(i).delta() for i in stack.adapters])


def rule_of(name, compat="authors", **changes):
    return preset(name, compat=compat, scope="tensor", **changes)


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("name", rule_names())
def test_the_full_rank_result_is_that_of_the_dense_deltas(name, compat):
    stack = random_stack(d_out=75, d_in=33)
    merged = merge_delta(stack, rule_of(name, compat), WEIGHTS, rank=None, keys=KEYS)
    expected = merge_tensor(rule_of(name, compat), deltas(stack), WEIGHTS, keys=KEYS)
    torch.testing.assert_close(merged.stack.delta(), expected)
    assert merged.retained == 1.0
    assert merged.norm == pytest.approx(float(expected.norm()))


@given(
    name=st.sampled_from(rule_names()),
    compat=st.sampled_from(COMPATS),
    block_rows=st.integers(1, 200),
    keep_bytes=st.sampled_from([0, 1 << 30]),
    shape=st.sampled_from([(150, 40), (64, 31), (129, 70), (7, 300)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_block_height_gives_the_bits_of_the_whole_matrix(
    name, compat, block_rows, keep_bytes, shape, dtype
):
    stack = random_stack(d_out=shape[0], d_in=shape[1], dtype=dtype)
    rule = rule_of(name, compat)
    whole = merge_delta(stack, rule, WEIGHTS, rank=5, keys=KEYS, block_rows=10_000)
    streamed = merge_delta(
        stack, rule, WEIGHTS, rank=5, keys=KEYS, block_rows=block_rows, keep_bytes=keep_bytes
    )
    assert torch.equal(streamed.stack.up, whole.stack.up)
    assert torch.equal(streamed.stack.down, whole.stack.down)
    assert (streamed.norm, streamed.retained) == (whole.norm, whole.retained)


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("name", rule_names())
@pytest.mark.parametrize("columns", [7, 32])
def test_tiles_give_the_result_of_the_dense_deltas(name, compat, columns, monkeypatch):
    for module in ("bands", "delta"):
        monkeypatch.setattr(
            f"lora_merge.merge.elementwise.{module}.tile_columns", lambda *_: columns
        )
    stack = random_stack(d_out=75, d_in=33)
    merged = merge_delta(stack, rule_of(name, compat), WEIGHTS, rank=None, keys=KEYS)
    expected = merge_tensor(rule_of(name, compat), deltas(stack), WEIGHTS, keys=KEYS)
    torch.testing.assert_close(merged.stack.delta(), expected)
    cut = merge_delta(stack, rule_of(name, compat), WEIGHTS, rank=4, keys=KEYS, keep_bytes=0)
    kept = torch.linalg.svdvals(expected)[:4].square().sum() / expected.square().sum()
    assert cut.retained == pytest.approx(float(kept), abs=1e-4)


@pytest.mark.parametrize("name", ["ties", "dare", "breadcrumbs", "sce"])
@pytest.mark.parametrize("rank", [1, 6, 20])
def test_the_cut_is_the_best_there_is_and_its_residual_exact(name, rank):
    stack = random_stack((8, 8, 8), d_out=210, d_in=150)
    full = merge_delta(stack, rule_of(name), WEIGHTS, rank=None, keys=KEYS).stack.delta()
    merged = merge_delta(stack, rule_of(name), WEIGHTS, rank=rank, keys=KEYS)
    values = torch.linalg.svdvals(full)
    best = float(values[:rank].square().sum() / values.square().sum())
    left_out = float((full - merged.stack.delta()).square().sum() / values.square().sum())
    assert merged.stack.num_units == rank
    assert merged.retained == pytest.approx(1 - left_out, abs=1e-9)
    assert best - 2e-3 < merged.retained <= best + 1e-12


def test_a_low_rank_merge_is_found_exactly():
    stack = random_stack((3, 4, 2), d_out=90, d_in=70)
    merged = merge_delta(stack, rule_of("dare", density=1.0), WEIGHTS, rank=9)
    expected = stack.weighted(torch.tensor(WEIGHTS, dtype=torch.float64)).delta()
    torch.testing.assert_close(merged.stack.delta(), expected)
    assert merged.retained == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["ties", "dare-ties", "breadcrumbs"])
def test_guessed_thresholds_change_nothing_but_the_time(name, monkeypatch):
    stack = random_stack((4, 4, 4), d_out=400, d_in=400, dtype=torch.float32)
    rule = rule_of(name)
    sweep = in_turn(blocks_of(stack, WEIGHTS, keys=KEYS))
    brackets = guess_thresholds(rule, stack, WEIGHTS)
    assert set(brackets) == {0, 1, 2}
    slow = measure(rule, sweep, 3)
    monkeypatch.setattr(
        "lora_merge.linalg.order_statistics._radix_search", None
    )  # the guesses must hit
    quick = measure(rule, sweep, 3, brackets=brackets)
    assert (quick.low, quick.high) == (slow.low, slow.high)
    for owner, matrix in enumerate(deltas(stack)):
        if name == "ties":
            order = matrix.abs().flatten().sort(descending=True).values
            assert slow.low[owner] == pytest.approx(float(order[int(0.2 * 160_000) - 1]), rel=1e-6)


def test_global_thresholds_are_those_of_all_modules_together():
    small, large = random_stack(d_out=20, d_in=9, seed=1), random_stack(d_out=31, d_in=12, seed=2)
    large = large.weighted(torch.full((3,), 3.0, dtype=torch.float64))
    rule = preset("ties", density=0.3)
    parts = [blocks_of(stack, WEIGHTS) for stack in (small, large)]
    statistics = measure(rule, in_turn(lambda: chain.from_iterable(p() for p in parts)), 3)
    together = torch.cat([deltas(s).flatten(1) for s in (small, large)], dim=1)[:, None]
    expected = merge_tensor(rule_of("ties", density=0.3), together, WEIGHTS).flatten()
    found = [
        merge_delta(stack, rule, WEIGHTS, rank=None, statistics=statistics).stack.delta().flatten()
        for stack in (small, large)
    ]
    torch.testing.assert_close(torch.cat(found), expected)


def test_a_global_rule_without_statistics_is_refused():
    with pytest.raises(MethodError, match="all modules"):
        merge_delta(random_stack(), preset("ties"), WEIGHTS, rank=2)


@pytest.mark.parametrize("name", ["ties", "dare", "sce"])
def test_absent_adapters_and_adapters_of_weight_zero_are_the_same(name):
    stack = random_stack((3, 4, 2), d_out=30, d_in=20)
    present = stack.units(stack.owner != 1)
    merged = merge_delta(stack, rule_of(name), (1.0, 0.0, 1.9), rank=4, keys=KEYS)
    absent = merge_delta(present, rule_of(name), WEIGHTS, rank=4, keys=KEYS)
    assert torch.equal(merged.stack.up, absent.stack.up)
    assert torch.equal(merged.stack.down, absent.stack.down)


@pytest.mark.parametrize("rank", [3, None])
def test_no_weight_left_is_a_delta_of_zeros(rank):
    merged = merge_delta(random_stack(), rule_of("ties"), (0.0, 0.0, 0.0), rank=rank)
    assert (merged.norm, merged.retained, merged.stack.norm()) == (0.0, 1.0, 0.0)
    zeros = random_stack(scales=[1e-300, 1e-300, 1e-300])
    zeros = merge_delta(zeros.weighted(torch.zeros(3).double()), rule_of("ties"), WEIGHTS, rank=2)
    assert (zeros.norm, zeros.retained, zeros.stack.norm()) == (0.0, 1.0, 0.0)


@given(rank=st.integers(1, 6), seed=st.integers(0, 20))
def test_the_gauge_of_the_factors_does_not_matter(rank, seed):
    stack = random_stack((3, 4, 2), d_out=30, d_in=20, seed=seed)
    random = torch.Generator().manual_seed(seed)
    parts = []
    for owner in stack.adapters:
        part = stack.of_adapter(owner)
        turn = torch.linalg.qr(
            torch.randn(part.num_units, part.num_units, generator=random).double()
        ).Q
        parts.append((turn.mT @ part.down * 2, part.up @ turn / 2, float(part.scale[0])))
    rule = rule_of("ties")
    merged = merge_delta(stack, rule, WEIGHTS, rank=None).stack.delta()
    turned = merge_delta(RankStack.of(parts), rule, WEIGHTS, rank=None).stack.delta()
    torch.testing.assert_close(turned, merged)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", rule_names())
def test_a_gpu_gives_the_same_masks_and_the_same_result_within_rounding(name):
    stack = random_stack(d_out=300, d_in=200, dtype=torch.float32)
    on_gpu = RankStack(*(t.cuda() for t in (stack.down, stack.up, stack.scale, stack.owner)))
    for rank in (None, 5):
        ours = merge_delta(stack, rule_of(name), WEIGHTS, rank=rank, keys=KEYS)
        theirs = merge_delta(on_gpu, rule_of(name), WEIGHTS, rank=rank, keys=KEYS)
        difference = (theirs.stack.delta().cpu() - ours.stack.delta()).norm()
        # An entry within rounding of a threshold or of a tied vote may fall on the other side.
        assert difference < 0.02 * ours.norm
        assert theirs.retained == pytest.approx(ours.retained, abs=1e-3)
