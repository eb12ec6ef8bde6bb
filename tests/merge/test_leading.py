"""Cuts that look for leading directions alone, beside those by the whole decomposition."""

from typing import Any

import pytest
import torch
from merging import merge_one

import lora_merge
from builders import make_adapter, random_stack
from lora_merge.adapters.adapter import Adapter
from lora_merge.merge.methods.linear import join_shared
from lora_merge.merge.plan import plan_merge
from lora_merge.merge.recipe.recipe import AdapterItem, Recipe

SHAPES = {"model.layers.0.mlp.up_proj": (300, 280)}
RANK = 4


def many() -> list[Adapter]:
    return [make_adapter(f"a{i}", seed=i, r=33, shapes=SHAPES, task_type=None) for i in range(8)]


def merged(method: str, **options: Any) -> Any:
    return lora_merge.merge(many(), method=method, rank=RANK, scale=1.0, **options)


@pytest.mark.parametrize("method", ["svd", "mean", "multislerp", "tsv", "wudi", "wudi-iso"])
def test_the_energy_is_within_a_thousandth_of_the_exact_cut(method: str) -> None:
    quick, exact = merged(method), merged(method, exact=True)
    ours, best = quick.report.total(), exact.report.total()
    assert ours.retained == pytest.approx(best.retained, rel=1e-3)
    assert ours.norm_ratio == pytest.approx(best.norm_ratio, rel=1e-3)
    assert ours.relative_error == pytest.approx(best.relative_error, rel=1e-3)


@pytest.mark.parametrize("method", ["svd", "wudi-iso"])
def test_the_bytes_do_not_depend_on_order(method: str) -> None:
    adapters = many()
    one, other = (
        lora_merge.merge(order, method=method, rank=RANK, scale=1.0)
        for order in (adapters, adapters[::-1])
    )
    (name,) = SHAPES
    assert all(torch.equal(a, b) for a, b in zip(one.read(name), other.read(name), strict=True))


def test_the_report_measures_the_sum_though_its_grams_are_coarse() -> None:
    stack = random_stack([16] * 17, d_out=260, d_in=270, seed=1, dtype=torch.float32)
    delta = stack.delta().double()
    coarse = stack.measured(torch.float32)
    assert coarse.norm() == pytest.approx(float(delta.norm()), rel=1e-5)
    result = merge_one(stack, "svd", rank=RANK).double()
    kept = torch.linalg.svdvals(delta)[:RANK].square().sum()
    assert float(result.square().sum()) == pytest.approx(float(kept), rel=1e-3)


def test_the_plan_says_where_it_searches_and_exact_does_not() -> None:
    def notes(count: int, **fields: Any) -> str:
        adapters = many()[:count]
        items = tuple(AdapterItem(a.name) for a in adapters)
        recipe = Recipe(merge_method="svd", adapters=items, rank=RANK, **fields)
        return " ".join(plan_merge(recipe, adapters).notes)

    assert "1 modules of up to 264 units are cut to rank 4 by a search" in notes(8)
    assert "--exact decomposes them" in notes(8)
    assert "search" not in notes(8, exact=True) and "search" not in notes(7)


def hundred(**fields: Any) -> list[Adapter]:
    shapes = {"model.layers.0.mlp.up_proj": (60, 50), "model.layers.0.mlp.down_proj": (50, 60)}
    return [
        make_adapter(f"a{i}", seed=i, r=16, shapes=shapes, task_type=None, **fields)
        for i in range(100)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["svd", "mean", "linear-factors", "ties", "cat"])
def test_the_norm_of_very_many_units_is_estimated_and_exact_measures_it(
    method: str, dtype: torch.dtype
) -> None:
    adapters = hundred(dtype=dtype)
    rank = {"cat": None, "linear-factors": 16}.get(method, RANK)
    quick, exact = (
        lora_merge.merge(adapters, method=method, rank=rank, scale=1.0, exact=how)
        for how in (False, True)
    )
    for ours, right in zip(quick.report.modules, exact.report.modules, strict=True):
        assert right.exact_norm_error == 0 < ours.exact_norm_error < 0.1 * right.exact_norm
        assert abs(ours.exact_norm - right.exact_norm) <= 5 * ours.exact_norm_error
        assert ours.adapter_norms == pytest.approx(right.adapter_norms, rel=1e-6)
        assert ours.norm == pytest.approx(right.norm, rel=0.1 if method == "cat" else 1e-3)
    assert "estimates" in " ".join(quick.report.notes)
    assert "estimates" not in " ".join(exact.report.notes)


def test_a_factor_that_many_share_is_summed_in_full_precision() -> None:
    stack = random_stack([3, 3, 2], seed=2, scales=[1, 1, 1], dtype=torch.bfloat16)
    stack.down[3:6] = stack.down[:3]
    joined = join_shared(stack)
    assert joined.num_units == 5
    exact = stack.up.double() @ stack.down.double()
    torch.testing.assert_close(joined.up.double() @ joined.down.double(), exact, atol=1e-5, rtol=0)


def test_exact_decomposes_what_is_written() -> None:
    (name,) = SHAPES
    exact = merged("svd", exact=True)
    (stack,) = exact.stacks(name)
    total = sum(a.stacks(name)[0].delta().double() for a in many())
    u, s, vh = torch.linalg.svd(total)
    best = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    torch.testing.assert_close(stack.delta().double(), best, atol=1e-5 * float(s[0]), rtol=0)
