"""The laws of merging, each over every method it holds for, on random adapters of mixed ranks.

A method that breaks a law by design is named here with the reason; a new method must obey all.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import merge_one
from torch import Tensor
from torch.linalg import LinAlgError

from builders import random_stack
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.errors import MethodError, NotFiniteError
from lora_merge.merge.methods.method import Method
from lora_merge.merge.methods.registry import find_method, methods
from lora_merge.options import Parameter

ALL = sorted(methods())
# Parameters with which a method's own losses are off, so that what is left must be exact.
LOSSLESS: dict[str, dict[str, Any]] = {
    "iso-c": {"beta": 0.0},
    "core-iso": {"beta": 0.0},
    "iso-cts": {"beta": 0.0, "common": 1.0},
    "wudi": {"ridge": 1e-9},
    "ssr": {"ridge": 1e-9},
    "regmean-iso": {"ridge": 1e-9, "beta": 0.0, "restore": False},
    "wudi-iso": {"ridge": 1e-9, "beta": 0.0},
    "dc-merge": {"smoothing": "none"},
    "lego-refit": {"ridge": 1e-9, "beta": 0.0},
    **{name: {"density": 1.0} for name in ("dare", "della", "sce")},
    **{
        name: {"density": 1.0, "scope": "tensor"}
        for name in ("magnitude", "ties", "knots-ties", "core-ties")
    },
    "breadcrumbs": {"density": 1.0, "gamma": 0.0, "scope": "tensor"},
    **{
        name: {"density": 1.0, "trim": 1.0, "scope": "tensor"}
        for name in ("dare-ties", "knots-dare-ties", "core-dare-ties")
    },
}
PRUNES_FACTORS = {"robustmerge": "keeps a fifth of each factor's entries"}
EQUAL_RANKS = {"linear-factors", "robustmerge", "aligned-mean"}
# Weights are shares: multiplying all of them changes nothing.
SHARES = {"mean", "fedavg", "slerp", "multislerp", "karcher", "model-stock", "aligned-mean", "sce"}
# What they drop is drawn from the stored factors, of which one delta has many.
DRAWS = {"dare", "dare-ties", "della", "knots-dare-ties", "core-dare-ties"}
# A sum: N copies count N times. All others take copies for one adapter, whatever their number.
SUMS = {"cat", "svd", "task-arithmetic", "ctm", "magnitude", "breadcrumbs", "dare"}
SUMS |= {"iso-c", "core-iso"}
NOT_IDEMPOTENT = {
    "dc-merge": "drops what a copy has between its own directions and another's",
    "np-lora": "takes the second's inputs from the first",
    "iso-cts": "gives every copy directions of its own",
    "esm": "makes all directions of the result alike",
    "linear-factors": "has cross terms, which is its fault",
    **PRUNES_FACTORS,
}
NOT_ODD = {
    "np-lora": "takes the second's inputs from the first",
    "iso-cts": "gives every copy directions of its own",
    **dict.fromkeys(DRAWS, "drops other entries of every copy"),
    **dict.fromkeys(SHARES - {"sce"}, "refuses shares that add up to 0"),
}


# How long to look for the same result; whose code to agree with, which may be the same code; what
# to do with exact ties, which there are none of in other coordinates.
EFFORT = {"iterations", "tolerance", "restarts", "compat", "zero_sign"}


@dataclass(frozen=True)
class Case:
    """A random stack and what is merged with it."""

    stack: RankStack
    weights: tuple[float, ...]


def case_of(method: Method, seed: int, ranks: tuple[int, ...], d_out: int, d_in: int) -> Case:
    count = min(len(ranks), method.adapters[1] or len(ranks))
    ranks = ranks[:count]
    if method.name in EQUAL_RANKS:
        ranks = (ranks[0],) * count
    weights = (1.0, 0.5, 2.0, 1.5)[:count]
    return Case(random_stack(ranks, d_out, d_in, seed=seed), weights)


seeds = st.integers(0, 10_000)
rank_lists = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)
sizes = st.tuples(st.integers(6, 24), st.integers(6, 24))
# Every law runs for some thirty methods: few examples each are many together.
few = settings(max_examples=12)


def law(test: Callable[..., None]) -> Callable[..., None]:
    return few(given(seed=seeds, ranks=rank_lists, size=sizes)(test))


def lossless(name: str) -> dict[str, Any]:
    return LOSSLESS.get(name, {})


def tensor_scope(name: str) -> dict[str, Any]:
    return {key: value for key, value in lossless(name).items() if key == "scope"}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    distance = float((actual.double() - expected.double()).norm())
    assert distance <= tolerance * max(float(expected.double().norm()), 1e-9)


@pytest.mark.parametrize("name", [n for n in ALL if n not in PRUNES_FACTORS and n != "slerp"])
@law
def test_one_adapter_is_itself(name, seed, ranks, size) -> None:
    stack = random_stack(ranks[:1], *size, seed=seed)
    rank = stack.num_units if name == "lego" else None
    close(merge_one(stack, name, rank=rank, parameters=lossless(name)), stack.delta())


@law
def test_svd_at_full_rank_is_cat(seed, ranks, size) -> None:
    stack = random_stack(ranks, *size, seed=seed)
    close(merge_one(stack, "svd", rank=stack.num_units), merge_one(stack, "cat", rank=None), 1e-9)


@pytest.mark.parametrize("name", ALL)
@few
@given(seed=seeds, ranks=rank_lists, size=sizes, factor=st.sampled_from([0.25, 3.0]))
def test_weights_scale_the_result_or_are_shares(name, seed, ranks, size, factor) -> None:
    case = case_of(find_method(name), seed, ranks, *size)
    parameters = tensor_scope(name)
    once = merge_one(case.stack, name, rank=3, weights=case.weights, parameters=parameters)
    scaled = tuple(factor * w for w in case.weights)
    more = merge_one(case.stack, name, rank=3, weights=scaled, parameters=parameters)
    close(more, once if name in SHARES else factor * once)


@pytest.mark.parametrize("name", [n for n in ALL if find_method(n).gauge_free and n not in DRAWS])
@law
def test_only_the_deltas_matter(name, seed, ranks, size) -> None:
    """(B, A) and (B G, G^-1 A) are one adapter."""
    case = case_of(find_method(name), seed, ranks, *size)
    random = torch.Generator().manual_seed(seed + 1)
    factors = []
    for owner in case.stack.adapters:
        part = case.stack.of_adapter(owner)
        r = part.num_units
        turn = torch.linalg.qr(torch.randn(r, r, generator=random, dtype=torch.float64)).Q
        stretch = torch.logspace(-0.5, 0.5, r, dtype=torch.float64)
        gauge = turn * stretch
        factors.append(
            (torch.linalg.solve(gauge, part.down), part.up @ gauge, float(part.scale[0]))
        )
    arguments = {"weights": case.weights, "parameters": tensor_scope(name)}
    other = merge_one(RankStack.of(factors), name, rank=3, **arguments)
    close(other, merge_one(case.stack, name, rank=3, **arguments), 1e-5)


@pytest.mark.parametrize("name", [n for n in ALL if n != "np-lora"])  # content, then style
@law
def test_order_does_not_matter(name, seed, ranks, size) -> None:
    case = case_of(find_method(name), seed, ranks, *size)
    parts = [case.stack.of_adapter(owner) for owner in reversed(case.stack.adapters)]
    turned = RankStack.of([(p.down, p.up, float(p.scale[0])) for p in parts])
    parameters = tensor_scope(name)
    close(
        merge_one(turned, name, rank=3, weights=case.weights[::-1], parameters=parameters),
        merge_one(case.stack, name, rank=3, weights=case.weights, parameters=parameters),
    )


@pytest.mark.parametrize("name", [n for n in ALL if n not in NOT_IDEMPOTENT])
@law
def test_copies_of_an_adapter_are_the_adapter(name, seed, ranks, size) -> None:
    one = random_stack(ranks[:1], *size, seed=seed)
    count = min(3, find_method(name).adapters[1] or 3)
    copies = RankStack.of([(one.down, one.up, float(one.scale[0]))] * count)
    weights = (1 / count if name in SUMS else 1.0,) * count
    rank = one.num_units if name == "lego" else None
    merged = merge_one(copies, name, rank=rank, weights=weights, parameters=lossless(name))
    close(merged, one.delta(), 1e-5)


@pytest.mark.parametrize("name", [n for n in ALL if n not in NOT_ODD])
@law
def test_minus_one_takes_an_adapter_away(name, seed, ranks, size) -> None:
    one = random_stack(ranks[:1], *size, seed=seed)
    pair = RankStack.of([(one.down, one.up, 2.0), (one.down, one.up, 2.0)])
    rank = one.num_units if name == "lego" else None
    arguments = {"weights": (1.0, -1.0), "parameters": tensor_scope(name)}
    merged = merge_one(pair, name, rank=rank, **arguments)
    assert float(merged.norm()) <= 1e-6 * float(one.delta().norm())


@pytest.mark.parametrize("name", ["knots-ties", "core-ties", "ties"])
@law
def test_without_election_every_space_is_the_sum(name, seed, ranks, size) -> None:
    """KnOTS-TA is TA: without pruning and election, the coordinates cancel."""
    stack = random_stack(ranks, *size, seed=seed)
    parameters = {"density": 1.0, "elect": "none", "divide_by": "none", "scope": "tensor"}
    close(merge_one(stack, name, parameters=parameters), stack.delta())


@law
def test_ctm_at_full_rank_is_the_sum(seed, ranks, size) -> None:
    stack = random_stack(ranks, *size, seed=seed)
    close(merge_one(stack, "ctm", rank=stack.num_units), stack.delta())


@law
def test_lego_with_one_cluster_per_unit_is_the_sum(seed, ranks, size) -> None:
    stack = random_stack(ranks, *size, seed=seed)
    parameters = {"reweight_output": "sum", "reweight_parameters": False}
    merged = merge_one(stack, "lego", rank=stack.num_units, parameters=parameters)
    close(merged, stack.delta())


@pytest.mark.parametrize("name", ALL)
@few
@given(seed=seeds, ranks=rank_lists, size=sizes, rank=st.integers(1, 3))
def test_the_rank_asked_for_is_not_exceeded(name, seed, ranks, size, rank) -> None:
    case = case_of(find_method(name), seed, ranks, *size)
    rank = min(rank, case.stack.num_units)
    merged = merge_one(case.stack, name, rank=rank, parameters=tensor_scope(name), as_stack=True)
    assert merged.num_units <= rank
    assert bool(torch.isfinite(merged.delta()).all())


@pytest.mark.parametrize("name", ALL)
def test_no_parameter_is_ignored(name) -> None:
    """Each changes the result for some value, or is refused."""
    method = find_method(name)
    stack = case_of(method, 5, (5, 3, 4), 24, 21).stack
    for parameter in method.parameters():
        if parameter.name in EFFORT:
            continue
        seen = (
            _differs(stack, name, rank, {parameter.name: value})
            for rank in (None, 2)
            for value in _values(parameter)
        )
        taken = [differs for differs in seen if differs is not None]
        assert not taken or any(taken), parameter.name


def _values(parameter: Parameter) -> list[Any]:
    if "|" in parameter.kind:
        return parameter.kind.split(" or ")[0].split(" | ")
    if parameter.kind == "yes or no":
        return [True, False]
    return [1, 2, 5] if "whole" in parameter.kind else [0.0, 0.1, 0.4, 1.0]


def _differs(
    stack: RankStack, name: str, rank: int | None, parameters: dict[str, Any]
) -> bool | None:
    start = {
        **tensor_scope(name),
        **({"density": 0.5} if name == "sce" else {}),
    }  # it drops nothing
    weights = (1.0, 0.2, 4.0)[: len(stack.adapters)]
    try:
        changed = merge_one(
            stack, name, rank=rank, weights=weights, parameters={**start, **parameters}
        )
    except MethodError:
        return None
    before = merge_one(stack, name, rank=rank, weights=weights, parameters=start)
    return float((changed - before).norm()) > 1e-9 * float(before.norm())


@pytest.mark.parametrize("name", ALL)
def test_half_precision_inputs(name) -> None:
    case = case_of(find_method(name), 5, (4, 3, 2), 40, 33)
    exact = merge_one(case.stack, name, rank=4, parameters=lossless(name))
    # Where a sign is elected or an entry pruned, rounding decides the close calls.
    jumps = name in PRUNES_FACTORS or "ties" in name or name in ("della", "sce", "lego", "dc-merge")
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        rounded = RankStack(
            case.stack.down.to(dtype).float(),
            case.stack.up.to(dtype).float(),
            case.stack.scale,
            case.stack.owner,
        )
        merged = merge_one(rounded, name, rank=4, parameters=lossless(name))
        assert merged.dtype == torch.float32
        close(merged, exact, 20 * tolerance if jumps else tolerance)


@pytest.mark.parametrize("name", ALL)
def test_zero_adapters_do_no_harm(name) -> None:
    """A fresh LoRA has B = 0."""
    case = case_of(find_method(name), 5, (3, 3), 20, 16)
    first = case.stack.of_adapter(0)
    fresh = RankStack.of(
        [(first.down, first.up, 1.0), (first.down.flip(1), torch.zeros_like(first.up), 1.0)]
    )
    merged = merge_one(fresh, name, rank=3, parameters=tensor_scope(name))
    assert bool(torch.isfinite(merged).all())
    for scale in (0.0, 1.0):  # of alpha 0, and fresh
        both = RankStack.of([(first.down, (1 - scale) * first.up, scale)] * 2)
        merged = merge_one(both, name, rank=3, parameters=tensor_scope(name))
        assert float(merged.norm()) == 0


@pytest.mark.parametrize("weight", [1e20, 1e300])
@pytest.mark.parametrize("name", ALL)
def test_weights_beyond_the_range_end_as_the_executor_expects(name, weight) -> None:
    """With what it calls an overflow, by name of adapter and module, or with numbers."""
    case = case_of(find_method(name), 7, (3, 3), 20, 16)
    weights = (weight, *case.weights[1:])
    with contextlib.suppress(OverflowError, NotFiniteError, LinAlgError, MethodError):
        merge_one(case.stack, name, rank=3, weights=weights, parameters=tensor_scope(name))
