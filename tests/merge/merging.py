"""Merge one stack from a method's name, for tests."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_merge.adapters import RankStack
from lora_merge.merge.method import Job
from lora_merge.merge.options import parse_options
from lora_merge.merge.pipeline import Semantics, finish, merge_stack
from lora_merge.merge.registry import find_method


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
        rank=rank if chosen.makes_rank else None,
        weights=torch.tensor(weights or [1.0] * count, dtype=torch.float64),
        seed=seed,
        names=tuple(f"adapter-{i}" for i in range(count)),
    )
    shared = parse_options(Semantics, semantics or {}, "a merge")
    merged = merge_stack(stack, job, chosen, chosen.parse(parameters or {}), shared)
    result = finish(merged, rank).stack
    return result if as_stack else result.delta()
