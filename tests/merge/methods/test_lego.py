"""LoRA-LEGO against a plain float64 implementation, and the laws it keeps."""

import itertools
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from builders import random_stack
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError
from lora_merge.merge.methods.lego import LegoResult, lego
from lora_merge.merge.methods.lego_options import LegoOptions

VARIANTS = [
    dict(zip(("fold_scale", "balance", "sign_invariant", "canonical", "centroid"), v, strict=True))
    for v in itertools.product(*[[False, True]] * 4, ["mean", "rank-one"])
]
GAUGE_FREE = {"fold_scale": True, "balance": True, "sign_invariant": True, "canonical": True}
ranks = st.lists(st.integers(1, 5), min_size=1, max_size=4)
seeds = st.integers(0, 500)


def merge(stack: RankStack, k: int, seed: int = 0, **options: Any) -> LegoResult:
    return lego(stack, k, options=LegoOptions(**options), rng=np.random.default_rng(seed))


def plain_lego(stack: RankStack, labels: np.ndarray, options: LegoOptions) -> torch.Tensor:
    """The published procedure, written down plainly for given labels; scalings all equal.

    Centroids of the concatenated vectors [a; b], each scaled so that its largest entry is the mean
    of its members' largest entries, then sqrt(r / k) or sqrt(R / k) on the output.
    """
    m = torch.cat([stack.down, stack.up.T], dim=1).numpy()
    k = labels.max() + 1
    delta = np.zeros((stack.d_out, stack.d_in))
    for c in range(k):
        members = m[labels == c]
        centre = members.mean(axis=0)
        if options.reweight_parameters:
            centre = centre * np.abs(members).max(axis=1).mean() / np.abs(centre).max()
        a, b = centre[: stack.d_in], centre[stack.d_in :]
        delta += float(stack.scale[0]) * np.outer(b, a)
    reference = {
        "none": k,
        "single": stack.num_units / len(stack.adapters),
        "sum": stack.num_units,
    }[options.reweight_output]
    return torch.from_numpy(delta * sqrt(reference / k))


@given(
    ranks=ranks,
    k=st.integers(1, 8),
    seed=seeds,
    reweight=st.booleans(),
    output=st.sampled_from(["none", "single", "sum"]),
    units=st.sampled_from(["raw", "normalized"]),
)
def test_the_default_is_the_published_procedure(
    ranks: list[int], k: int, seed: int, reweight: bool, output: Any, units: Any
) -> None:
    stack = random_stack(ranks, scales=[1.5] * len(ranks), seed=seed)
    k = min(k, stack.num_units)
    options = LegoOptions(units=units, reweight_parameters=reweight, reweight_output=output)
    result = lego(stack, k, options=options, rng=np.random.default_rng(seed))
    expected = plain_lego(stack, result.labels.numpy(), options)
    torch.testing.assert_close(result.stack.delta(), expected, rtol=1e-9, atol=1e-9)
    assert sum(result.cluster_sizes) == stack.num_units


@pytest.mark.parametrize("units", ["raw", "normalized"])
def test_clusters_are_those_scikit_learn_finds(units: Any) -> None:
    """Well-separated units: every sensible k-means finds the same partition."""
    base = random_stack((5,), 30, 40, seed=1)
    noise = random_stack((5,) * 4, 30, 40, seed=2)
    parts = [
        (base.down + 0.05 * noise.of_adapter(i).down, base.up + 0.05 * noise.of_adapter(i).up, 1.0)
        for i in range(4)
    ]
    stack = RankStack.of(parts)
    a, b = stack.down, stack.up.T
    if units == "normalized":
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    theirs = KMeans(5, n_init=10, random_state=0).fit(torch.cat([a, b], dim=1)).labels_
    ours = merge(stack, 5, units=units).labels.numpy()
    same_theirs = theirs[:, None] == theirs
    assert (same_theirs == (ours[:, None] == ours)).all()


@given(ranks=ranks, seed=seeds, variant=st.sampled_from(VARIANTS))
def test_as_many_clusters_as_units_is_the_exact_sum(
    ranks: list[int], seed: int, variant: dict[str, Any]
) -> None:
    stack = random_stack(ranks, seed=seed)
    for weight in (1.0, -0.7):
        signed = stack.weighted(torch.full((len(ranks),), weight, dtype=torch.float64))
        merged = merge(signed, stack.num_units, reweight_output="sum", **variant)
        torch.testing.assert_close(merged.stack.delta(), signed.delta(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("output", ["none", "single", "sum"])
def test_one_adapter_at_its_own_rank_is_itself(variant: dict[str, Any], output: Any) -> None:
    stack = random_stack((4,), scales=[2.5])
    merged = merge(stack, 4, reweight_output=output, **variant)
    torch.testing.assert_close(merged.stack.delta(), stack.delta(), rtol=1e-7, atol=1e-7)


@given(copies=st.integers(2, 5), seed=seeds, variant=st.sampled_from(VARIANTS))
def test_copies_of_an_adapter_merge_to_the_adapter(
    copies: int, seed: int, variant: dict[str, Any]
) -> None:
    one = random_stack((3,), scales=[0.8], seed=seed)
    stack = RankStack.of([(one.down, one.up, 0.8)] * copies)
    merged = merge(stack, 3, **variant)
    assert sorted(merged.cluster_sizes) == [copies] * 3
    torch.testing.assert_close(merged.stack.delta(), one.delta(), rtol=1e-6, atol=1e-7)


@given(seed=seeds, data=st.data(), variant=st.sampled_from(VARIANTS))
def test_the_order_of_adapters_does_not_matter(
    seed: int, data: st.DataObject, variant: dict[str, Any]
) -> None:
    stack = random_stack((3, 4, 2), seed=seed)
    order = data.draw(st.permutations(range(3)))
    parts = [stack.of_adapter(i) for i in order]
    other = RankStack.of([(p.down, p.up, float(p.scale[0])) for p in parts])
    first, second = merge(stack, 4, seed=seed, **variant), merge(other, 4, seed=seed, **variant)
    torch.testing.assert_close(first.stack.delta(), second.stack.delta(), rtol=1e-6, atol=1e-8)


@given(seed=seeds, k=st.integers(1, 9))
def test_singular_units_remove_the_gauge(seed: int, k: int) -> None:
    stack = random_stack((3, 4, 2), 30, 20, seed=seed)
    random = torch.Generator().manual_seed(seed)
    parts = []
    for i in range(3):
        p = stack.of_adapter(i)
        g = torch.randn(p.num_units, p.num_units, generator=random, dtype=torch.float64)
        g += 3 * torch.eye(p.num_units, dtype=torch.float64)
        parts.append((torch.linalg.solve(g, p.down), p.up @ g, float(p.scale[0])))
    first = merge(stack, k, **GAUGE_FREE)
    second = merge(RankStack.of(parts), k, **GAUGE_FREE)
    torch.testing.assert_close(first.stack.delta(), second.stack.delta(), rtol=1e-5, atol=1e-6)


@given(seed=seeds, k=st.integers(1, 9), data=st.data())
def test_balance_and_sign_remove_each_units_own_gauge(
    seed: int, k: int, data: st.DataObject
) -> None:
    stack = random_stack((3, 4, 2), seed=seed)
    size = st.sampled_from([-4.0, -1.0, -0.2, 0.5, 3.0])
    factor = torch.tensor(data.draw(st.lists(size, min_size=9, max_size=9)), dtype=torch.float64)
    other = RankStack(stack.down * factor[:, None], stack.up / factor, stack.scale, stack.owner)
    options = {"fold_scale": True, "balance": True, "sign_invariant": True}
    first, second = merge(stack, k, **options), merge(other, k, **options)
    torch.testing.assert_close(first.stack.delta(), second.stack.delta(), rtol=1e-6, atol=1e-7)


@given(seed=seeds, k=st.integers(1, 6))
def test_rank_one_centroid_is_the_best_for_its_cluster(seed: int, k: int) -> None:
    stack = random_stack((3, 3), 12, 10, seed=seed)
    merged = merge(stack, k, centroid="rank-one", reweight_parameters=False, reweight_output="none")
    for cluster in range(k):
        members = stack.units(merged.labels == cluster)
        mean = members.delta() / members.num_units
        u, s, vh = torch.linalg.svd(mean)
        best = s[0] * torch.outer(u[:, 0], vh[0])
        found = merged.stack.units(torch.tensor([cluster])).delta()
        torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("zero", ["up", "down", "both"])
def test_zero_units_do_no_harm(variant: dict[str, Any], zero: str) -> None:
    stack = random_stack((3, 3))
    if zero != "down":
        stack.up[:, :3] = 0
    if zero != "up":
        stack.down[:3] = 0
    for k in (1, 3, 4):
        if variant["canonical"] and k > stack.num_units:
            continue
        merged = merge(stack, k, **variant).stack
        assert torch.isfinite(merged.delta()).all()


@given(seed=seeds, k=st.integers(1, 9), variant=st.sampled_from(VARIANTS))
def test_mixes_say_where_the_centroids_came_from(
    seed: int, k: int, variant: dict[str, Any]
) -> None:
    stack = random_stack((3, 4, 2), seed=seed)
    result = merge(stack, k, **variant)
    down_mix, up_mix = result.mixes
    torch.testing.assert_close(down_mix @ result.source.down, result.stack.down)
    torch.testing.assert_close(result.source.up @ up_mix.T, result.stack.up)
    assert (result.source is stack) == (not variant["canonical"])


@pytest.mark.parametrize("k", [0, 10])
def test_impossible_ranks_are_refused_with_the_largest(k: int) -> None:
    with pytest.raises(MethodError) as caught:
        merge(random_stack((3, 4, 2)), k)
    assert "9" in caught.value.remedy
