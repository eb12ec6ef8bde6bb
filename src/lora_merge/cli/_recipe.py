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


def parse_parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """`name=value` arguments as parameters; values are YAML scalars."""
    import yaml

    parameters = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise click.UsageError(f"-p {pair!r}: write NAME=VALUE")
        parameters[name.strip().replace("-", "_")] = yaml.safe_load(value)
    return parameters


def recipe_from(
    method: str,
    *,
    adapters: Sequence[str],
    weights: Sequence[Any],
    rank: int | str | None,
    parameters: dict[str, Any],
    alpha: float | None,
    rslora: bool,
    **settings: Any,
) -> Recipe:
    """The recipe that a command line means.

    Args:
        method: Name of the method.
        adapters: References as given; globs may stand for many.
        weights: One per adapter, or none.
        rank: Rank or rank rule.
        parameters: Parameters of the method; those at their default are left out.
        alpha: lora_alpha of files without a config.
        rslora: Those files' scaling is alpha / sqrt(r).
        settings: Every other field of the recipe by name.
    """
    refs = expand(adapters)
    if weights and len(weights) != len(refs):
        raise click.UsageError(f"{len(weights)} weights (-w) for {len(refs)} adapters")
    if method != "auto":
        chosen = find_method(method)
        chosen.parse(parameters)
        defaults = chosen.parse({})
        parameters = {n: v for n, v in parameters.items() if v != getattr(defaults, n)}
    rank = int(rank) if isinstance(rank, str) and rank.isdigit() else rank
    return Recipe(
        merge_method=method,
        adapters=tuple(
            AdapterItem(ref, weight, alpha=alpha, rslora=rslora)
            for ref, weight in zip(refs, weights or (1.0,) * len(refs), strict=True)
        ),
        rank=rank,
        parameters=parameters,
        **settings,
    )
