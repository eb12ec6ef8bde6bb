"""Elementwise rules in the coordinates of KnOTS and Core Space, against dense bases."""

import hashlib
from collections.abc import Sequence

import pytest
import torch
from dense import core_space, iso_cts, knots
from merging import merge_one
from torch import Tensor

from builders import random_stack
from lora_merge.adapters.rank_stack import RankStack
from lora_merge.linalg.random_bits import mask_key
from lora_merge.merge.elementwise.combine import merge_tensor
from lora_merge.merge.elementwise.rule import preset

WEIGHTS = (0.7, 1.3, -0.4)


def deltas_of(stack: RankStack) -> list[Tensor]:
    return [stack.of_adapter(owner).delta() for owner in stack.adapters]


def keys_of(stack: RankStack) -> list[int]:
    """What a mask is drawn from: seed, module, the bytes of A, B and the scaling."""
    keys = []
    for owner in stack.adapters:
        part = stack.of_adapter(owner)
        content = hashlib.blake2b(digest_size=16)
        for tensor in (part.down, part.up, part.scale):
            content.update(tensor.contiguous().numpy().tobytes())
        keys.append(mask_key(0, "layers.0.proj", f"{content.hexdigest()} 0"))
    return keys


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("rule", ["ties", "dare-ties", "magnitude", "breadcrumbs", "sce"])
@pytest.mark.parametrize("space", ["aligned", "core"])
@pytest.mark.parametrize("shape", [(14, 11), (30, 40)], ids=["R-above-d", "R-below-d"])
def test_a_rule_in_a_space_is_the_rule_on_dense_coordinates(
    rule: str, space: str, shape: tuple[int, int]
) -> None:
    stack = random_stack((4, 6, 5), *shape)
    deltas = deltas_of(stack)
    factors = [(p.down, p.up) for p in map(stack.of_adapter, stack.adapters)]
    left, x, right = knots(deltas) if space == "aligned" else core_space(deltas, factors)
    chosen = preset(rule, scope="tensor", density=0.4)
    # Signs of basis vectors are free, and no rule sees them.
    expected = left @ merge_tensor(chosen, torch.stack(x), WEIGHTS, keys=keys_of(stack)) @ right
    merged = merge_one(
        stack,
        rule,
        weights=WEIGHTS,
        parameters={"density": 0.4, **({} if rule == "sce" else {"scope": "tensor"})},
        semantics={"space": space, "basis": "stacks"},  # as the authors have it
    )
    close(merged, expected)


@pytest.mark.parametrize(
    ("name", "rule", "space"),
    [
        ("knots-ties", "ties", "aligned"),
        ("knots-dare-ties", "dare-ties", "aligned"),
        ("core-ties", "ties", "core"),
        ("core-dare-ties", "dare-ties", "core"),
    ],
)
def test_presets_are_a_rule_and_a_space(name: str, rule: str, space: str) -> None:
    stack = random_stack((4, 6, 5), 30, 40)
    parameters = {"scope": "tensor", "density": 0.3}
    close(
        merge_one(stack, name, weights=WEIGHTS, parameters=parameters),
        merge_one(stack, rule, weights=WEIGHTS, parameters=parameters, semantics={"space": space}),
    )


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
@pytest.mark.parametrize("rank", [6, 10])
def test_iso_cts_agrees_with_dense_code(weights: Sequence[float], rank: int) -> None:
    stack = random_stack((4, 6, 5), 30, 40)
    close(
        merge_one(stack, "iso-cts", rank=rank, weights=weights),
        iso_cts(deltas_of(stack), weights, rank),
    )
