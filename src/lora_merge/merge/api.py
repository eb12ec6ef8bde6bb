"""`lora_merge.merge` and `lora_merge.run_recipe`: adapters in, an adapter out."""

from pathlib import Path
from typing import Any

from lora_merge.adapters.access.coerce import base_for, open_adapters
from lora_merge.adapters.identity.expert_choice import all_in_layout
from lora_merge.adapters.in_memory import MadeAdapter
from lora_merge.arguments import takes
from lora_merge.errors import MethodError
from lora_merge.files.targets import check_target
from lora_merge.machine.device import pick_device
from lora_merge.merge.auto.scale import with_scale
from lora_merge.merge.methods.registry import methods
from lora_merge.merge.plan import plan_merge as decide
from lora_merge.merge.recipe import arguments as takes_of
from lora_merge.merge.recipe.read import as_recipe, inputs_of, open_recipe
from lora_merge.merge.recipe.recipe import AdapterItem, Recipe
from lora_merge.merge.report import MergeReport
from lora_merge.merge.run import PlannedMerge
from lora_merge.merge.shards.parts import run_in_parts


def _of_methods(word: str, value: Any) -> str:
    """What to do with a method's parameter that was given as an argument."""
    having = [m.name for m in methods().values() if word in {p.name for p in m.parameters()}]
    if not having:
        return ""
    names = ", ".join(having[:4]) + (", ..." if len(having) > 4 else "")
    return f"it is a parameter of {names}: parameters={{{word!r}: {value!r}}}"


@takes(takes_of.Merge, _of_methods)
def plan_merge(given: takes_of.Merge) -> PlannedMerge:
    """Decide everything about a merge, from headers; the scale, if it is auto, from a few modules.

    Raises:
        LoraMergeError: If the adapters or the request do not fit.

    Examples:
        >>> import lora_merge
        >>> plan = lora_merge.plan_merge("examples/adapters/*", method="ties", rank=8)
        >>> len(plan.rows())
        14
    """
    return _plan_merge(given)


@takes(takes_of.Merge, _of_methods)
def merge(given: takes_of.Merge) -> MadeAdapter[MergeReport]:
    """Merge adapters into one.

    A scale of 1 is every method as published, "auto" is decided from the adapters and the method,
    and 1 for exact methods and where weights are given.

    Returns:
        The merged adapter with its `report`; `save_pretrained` and `push_to_hub` write it with
        card and recipe, `to_peft` puts it into a live model.

    Raises:
        LoraMergeError: If the adapters or the request do not fit.

    Examples:
        >>> import lora_merge
        >>> merged = lora_merge.merge("examples/adapters/*", method="ties", rank=8,
        ...                           parameters={"density": 0.5})
        >>> merged.report.total().rank
        (8, 8)
    """
    plan = _plan_merge(given)
    if given.on_plan:
        given.on_plan(plan)
    return plan.run(jobs=given.jobs, device=given.device, progress=given.progress)


def _plan_merge(given: takes_of.Merge) -> PlannedMerge:
    opened = open_adapters(given.adapters, rename=given.rename, base=given.base)
    base = None if given.base is None else base_for(given.base, tuple(given.rename))
    opened = all_in_layout(opened, given.experts, base)
    weights = [1.0] * len(opened) if given.weights is None else list(given.weights)
    own = [{}] * len(opened) if given.own_parameters is None else list(given.own_parameters)
    for what, values in (("weights", weights), ("mappings in own_parameters", own)):
        if len(values) != len(opened):
            raise MethodError(
                f"{len(values)} {what} for {len(opened)} adapters", "give one per adapter"
            )
    recipe = Recipe(
        merge_method=given.method,
        adapters=tuple(
            AdapterItem(adapter.name, weight, parameters=dict(mapping))
            for adapter, weight, mapping in zip(opened, weights, own, strict=True)
        ),
        rank=given.rank,
        parameters=dict(given.parameters or {}),
        **given.recipe_options(),
    )
    return PlannedMerge(with_scale(decide(recipe, opened), device=given.device), given.strict)


@takes(takes_of.PlanRecipe)
def plan_recipe(given: takes_of.PlanRecipe) -> PlannedMerge:
    """Open a recipe's adapters and decide everything about the merge, from headers.

    References in a `Recipe` are taken as they are; in a file or plain data a glob stands for the
    adapters it matches.

    Raises:
        RecipeError: If the recipe cannot be read or does not fit its adapters.
        LoraMergeError: If the adapters or the request do not fit.

    Examples:
        >>> import lora_merge
        >>> recipe = {"merge_method": "svd", "adapters": [{"adapter": "examples/adapters/*"}]}
        >>> lora_merge.plan_recipe(recipe).merge.method.name
        'svd'
    """
    recipe = as_recipe(given.recipe)
    plan = decide(recipe, open_recipe(recipe, allow_pickle=given.allow_pickle))
    return PlannedMerge(with_scale(plan, device=given.device), given.strict)


@takes(takes_of.RunRecipe)
def run_recipe(given: takes_of.RunRecipe) -> MadeAdapter[MergeReport]:
    """Run a recipe into an adapter directory: weights, config, card and the resolved recipe.

    The directory appears whole or not at all.

    Returns:
        The adapter, with the `report` of what the merge did to each module.

    Raises:
        LoraMergeError: If recipe, adapters and request do not fit together, or nothing can be
            written there; nothing is left behind.

    Examples:
        >>> import lora_merge
        >>> adapters = [{"adapter": "examples/adapters/*"}]
        >>> recipe = {"merge_method": "ties", "rank": 8, "adapters": adapters}
        >>> lora_merge.run_recipe(recipe, "merged").report.total().rank
        (8, 8)
    """
    pick_device(given.device)
    recipe = as_recipe(given.recipe)
    if given.resume or given.devices or given.address or given.engine != "local":
        return run_in_parts(recipe, given)
    if given.out is not None:
        check_target(Path(given.out), force=given.force, inputs=inputs_of(recipe))
    plan = plan_recipe(
        recipe, allow_pickle=given.allow_pickle, device=given.device, strict=given.strict
    )
    if given.on_plan:
        given.on_plan(plan)
    return plan.run(
        None if given.out is None else Path(given.out),
        force=given.force,
        jobs=given.jobs,
        device=given.device,
        progress=given.progress,
    )
