"""From command-line options to a recipe; every flag has its place there."""

from collections.abc import Iterable, Sequence
from typing import Any

import click

from lora_merge.adapters.references import expand
from lora_merge.merge.methods.registry import find_method
from lora_merge.merge.recipe.recipe import AdapterItem, Recipe

_RUN_OPTIONS = ("out", "force", "device", "jobs", "dry_run", "as_json", "allow_pickle")


def split_run_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take those options out of `arguments` that say how to run and not what to make."""
    return {name: arguments.pop(name) for name in _RUN_OPTIONS}


def parse_parameters(pairs: Sequence[str]) -> list[tuple[str, Any]]:
    """`name=value` arguments; values are YAML."""
    import yaml

    parameters = []
    for pair in pairs:
        name, separator, value = pair.partition("=")
        try:
            loaded = yaml.safe_load(value)
        except yaml.YAMLError:
            separator = ""
        if not separator:
            raise click.UsageError(f"-p {pair!r}: write NAME=VALUE")
        parameters.append((name.strip().replace("-", "_"), loaded))
    return parameters


def _shared_and_own(
    given: Iterable[tuple[str, Any]], count: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Parameters given once hold for all adapters; given once per adapter, each for its own."""
    values: dict[str, list[Any]] = {}
    for name, value in given:
        values.setdefault(name, []).append(value)
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, several in values.items():
        if len(several) == 1:
            shared[name] = several[0]
        elif len(several) == count:
            for mapping, value in zip(own, several, strict=True):
                mapping[name] = value
        else:
            raise click.UsageError(
                f"{name} is given {len(several)} times for {count} adapters; give it once for all, "
                "or once per adapter in their order"
            )
    return shared, own


def recipe_from(
    method: str,
    *,
    adapters: Sequence[str],
    weights: Sequence[Any],
    rank: int | str | None,
    parameters: Iterable[tuple[str, Any]],
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
        parameters: Parameters of the method; those at their default are left out, those given
            once per adapter are the adapters' own.
        alpha: lora_alpha of files without a config.
        rslora: Those files' scaling is alpha / sqrt(r).
        settings: Every other field of the recipe by name.
    """
    refs = expand(adapters)
    if weights and len(weights) != len(refs):
        raise click.UsageError(f"{len(weights)} weights (-w) for {len(refs)} adapters")
    shared, own = _shared_and_own(parameters, len(refs))
    if method != "auto":
        chosen = find_method(method)
        varying = {n for n in shared if n in chosen.per_adapter and isinstance(shared[n], list)}
        chosen.parse({n: v for n, v in shared.items() if n not in varying})
        defaults = chosen.parse({})
        shared = {n: v for n, v in shared.items() if n in varying or v != getattr(defaults, n)}
    rank = int(rank) if isinstance(rank, str) and rank.isdigit() else rank
    return Recipe(
        merge_method=method,
        adapters=tuple(
            AdapterItem(ref, weight, alpha=alpha, rslora=rslora, parameters=mapping)
            for ref, weight, mapping in zip(refs, weights or (1.0,) * len(refs), own, strict=True)
        ),
        rank=rank,
        parameters=shared,
        **settings,
    )
