"""From command-line options to a recipe; every flag has its place there."""

from collections.abc import Sequence
from typing import Any

import click

from lora_merge.adapters import expand
from lora_merge.merge.recipe import AdapterItem, Recipe
from lora_merge.merge.registry import find_method

_RUN_OPTIONS = ("out", "force", "device", "jobs", "dry_run", "as_json", "allow_pickle")


def split_run_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take those options out of `arguments` that say how to run and not what to make."""
    return {name: arguments.pop(name) for name in _RUN_OPTIONS}


def recipe_from(
    method: str,
    *,
    adapters: Sequence[str],
    weights: Sequence[float],
    rank: int,
    parameters: dict[str, Any],
    alpha: float | None,
    rslora: bool,
    dtype: str | None,
    ranks: Any,
    extras: Any,
    seed: int,
) -> Recipe:
    """The recipe that a command line means; parameters at their default are left out."""
    refs = expand(adapters)
    if weights and len(weights) != len(refs):
        raise click.UsageError(f"{len(weights)} weights (-w) for {len(refs)} adapters")
    defaults = find_method(method).options()
    return Recipe(
        merge_method=method,
        adapters=tuple(
            AdapterItem(ref, weight, alpha=alpha, rslora=rslora)
            for ref, weight in zip(refs, weights or (1.0,) * len(refs), strict=True)
        ),
        rank=rank,
        parameters={n: v for n, v in parameters.items() if v != getattr(defaults, n)},
        seed=seed,
        dtype=dtype,
        ranks=ranks,
        extras=extras,
    )
