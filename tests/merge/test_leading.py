"""Cuts that look for leading directions alone, beside those by the whole decomposition."""

from typing import Any

import pytest
import torch
from merging import merge_one

import lora_merge
from builders import make_adapter, random_stack
from lora_merge.adapters.adapter import Adapter
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
