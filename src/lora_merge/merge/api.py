"""`lora_merge.merge`: adapters in, an adapter out, all in memory."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_merge._version import __version__
from lora_merge.adapters.access.coerce import AdaptersLike, open_adapters
from lora_merge.adapters.adapter import Adapter
from lora_merge.adapters.in_memory import MemoryWriter
from lora_merge.errors import MethodError
from lora_merge.merge.executor import execute, settle
from lora_merge.merge.recipe.recipe import (
    RECIPE_NAME,
    AdapterItem,
    Recipe,
    plan_recipe,
    resolved_recipe,
)
from lora_merge.merge.save import card_of, finish_report


def merge(
    adapters: AdaptersLike,
    *,
    method: str = "auto",
    rank: int | str | None = None,
    weights: Sequence[Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
    own_parameters: Sequence[Mapping[str, Any]] | None = None,
    strict: bool = False,
    jobs: int | None = None,
    device: str = "auto",
    **settings: Any,
) -> Adapter:
    """Merge adapters into one.

    Args:
        adapters: Opened adapters or references to them.
        method: Name of a method (`lora-merge methods`).
        rank: Rank of the result, or a rank rule such as "energy:0.95"; default: the method's.
        weights: One per adapter: numbers, lists over the layers, or lists of {filter, value}.
        parameters: Parameters of the method. Those of how an adapter is sparsified (density, ...)
            may be lists over the layers or of {filter, value}, too.
        own_parameters: One mapping per adapter: such parameters for it alone.
        strict: Raise if the cut to a rank loses more than half of the result.
        jobs: Worker threads.
        device: Where to compute.
        settings: Other fields of a recipe: scale, normalize, seed, dtype, ...

    Returns:
        The merged adapter; `save_pretrained` and `push_to_hub` write it with card and recipe.

    Raises:
        LoraMergeError: If the adapters or the request do not fit.
    """
    opened = open_adapters(adapters)
    values = [1.0] * len(opened) if weights is None else list(weights)
    own = [{}] * len(opened) if own_parameters is None else list(own_parameters)
    for what, given in (("weights", values), ("mappings in own_parameters", own)):
        if len(given) != len(opened):
            raise MethodError(
                f"{len(given)} {what} for {len(opened)} adapters", "give one per adapter"
            )
    recipe = Recipe(
        merge_method=method,
        adapters=tuple(
            AdapterItem(adapter.name, weight, parameters=dict(mapping))
            for adapter, weight, mapping in zip(opened, values, own, strict=True)
        ),
        rank=rank,
        parameters=dict(parameters or {}),
        **settings,
    )
    plan = plan_recipe(recipe, opened)
    with tempfile.TemporaryDirectory() as folder:
        if plan.measured:
            plan = settle(plan, Path(folder), jobs=jobs, device=device)
        writer = MemoryWriter(plan.output)
        modules = execute(plan, writer, jobs=jobs, device=device)
    report = finish_report(plan, modules, None, strict=strict)
    text = f"# made by lora-merge {__version__}\n"
    text += resolved_recipe(recipe, plan, opened).to_yaml()
    texts = {RECIPE_NAME: text, "README.md": card_of(plan, text)}
    return replace(writer.adapter("merged"), texts=texts, notes=report.notes)
