"""Merge one stack from a method's name, for tests."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_merge.adapters.rank_stack import RankStack
from lora_merge.merge.methods.method import Job
from lora_merge.merge.methods.registry import find_method
from lora_merge.merge.pipeline import finish, merge_stack
from lora_merge.merge.recipe.recipe import Semantics
from lora_merge.options import parse_options


def merge_one(
    stack: RankStack,
    method: str,
    *,
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    semantics: Mapping[str, Any] | None = None,
    seed: int = 0,
    as_stack: bool = False,
) -> Any:
    """The merged delta of a stack (or the stack itself); `rank` None keeps everything."""
    chosen = find_method(method)
    count = max(stack.adapters) + 1
    job = Job(
        module="layers.0.proj",
        rank=rank,
        weights=torch.tensor(weights or [1.0] * count, dtype=torch.float64),
        seed=seed,
        statistics=made_up_statistics(stack) if chosen.needs else {},
    )
    shared = parse_options(Semantics, semantics or {}, "a merge")
    merged = merge_stack(stack, job, chosen, chosen.parse(parameters or {}), shared)
    result = finish(merged, rank).stack
    return result if as_stack else result.delta()


def task_inputs(stack: RankStack) -> dict[int, Tensor]:
    """Inputs of each adapter's task, (d_in, n): a function of its delta alone."""
    random = torch.Generator().manual_seed(0)
    size = stack.d_in
    noise = torch.randn(size, 3 * size, generator=random, dtype=torch.float64)
    inputs = {}
    for owner in stack.adapters:
        delta = stack.of_adapter(owner).delta().double()
        square = delta.mT @ delta
        scale = square.trace().clamp_min(1e-12)
        inputs[owner] = (torch.eye(size, dtype=torch.float64) + size * square / scale) @ noise
    return inputs


def made_up_statistics(stack: RankStack) -> dict[str, Tensor]:
    """What `collect_statistics` would have found on `task_inputs`."""
    found: dict[str, Tensor] = {"owner": stack.owner}
    for owner, x in task_inputs(stack).items():
        z = stack.down.double() @ x
        found[f"x.{owner}"] = x @ x.mT / x.shape[1]
        found[f"z.{owner}"] = z @ z.mT / x.shape[1]
    return found
