"""`lora_merge.merge` and `lora_merge.run_recipe`: adapters in, an adapter out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lora_merge.adapters.access.adapter_like import AdaptersLike
from lora_merge.adapters.access.coerce import open_adapters
from lora_merge.adapters.config import RankLayout
from lora_merge.adapters.in_memory import MadeAdapter
from lora_merge.arguments import checked
from lora_merge.errors import MethodError
from lora_merge.files.header import DTypeName
from lora_merge.files.targets import check_target
from lora_merge.merge.auto.scale import with_scale
from lora_merge.merge.methods.registry import methods
from lora_merge.merge.plan import MergePlan, plan_merge
from lora_merge.merge.recipe.read import as_recipe, open_recipe
from lora_merge.merge.recipe.recipe import (
    AdapterItem,
    Anchor,
    ExtrasPolicy,
    Normalize,
    Recipe,
    RestoreNorm,
    Smooth,
    Space,
)
from lora_merge.merge.report import MergeReport
from lora_merge.merge.run import run_in_memory, run_plan
from lora_merge.merge.shards.join import join
from lora_merge.merge.shards.shard import run_shard


def _of_methods(word: str, value: Any) -> str:
    """What to do with a method's parameter that was given as an argument."""
    having = [m.name for m in methods().values() if word in {p.name for p in m.parameters()}]
    if not having:
        return ""
    names = ", ".join(having[:4]) + (", ..." if len(having) > 4 else "")
    return f"it is a parameter of {names}: parameters={{{word!r}: {value!r}}}"


@checked(_of_methods)
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
    normalize: Normalize | None = None,
    scale: float | Literal["auto"] = "auto",
    norm_equalise: bool = False,
    restore_norm: RestoreNorm = "none",
    pico: bool = False,
    svc: bool = False,
    space: Space | None = None,
    basis: Anchor = "deltas",
    smooth: Smooth = "none",
    statistics: str | None = None,
    seed: int = 0,
    dtype: DTypeName | None = None,
    ranks: RankLayout = "uniform",
    extras: ExtrasPolicy = "average",
    accept_base_models: bool = False,
    base_model: str | None = None,
    rename: tuple[str, ...] = (),
    base: str | Path | None = None,
) -> MadeAdapter[MergeReport]:
    """Merge adapters into one.

    Args:
        adapters: What `open_adapters` takes.
        method: Name of a method (`lora-merge methods`).
        rank: Rank of the result, or a rank rule such as "energy:0.95"; default: the method's.
        weights: One per adapter: numbers, lists over the layers, or lists of {filter, value}.
        parameters: Parameters of the method. Those of how an adapter is sparsified (density, ...)
            may be lists over the layers or of {filter, value}, too.
        own_parameters: One mapping per adapter: such parameters for it alone.
        strict: Raise if the cut to a rank loses more than half of the result.
        jobs: Worker threads.
        device: Where to compute.
        normalize: Divide the weights by their "sum" or "abs-sum", or not ("none"); default: the
            method's.
        scale: Factor on the merged delta; 1 is every method as published, "auto" is decided from
            the adapters and the method, and 1 for exact methods and where weights are given.
        norm_equalise: Bring every adapter to the mean norm first.
        restore_norm: Bring the result to the "mean" or "weighted-mean" norm of the adapters.
        pico: Shrink shared output directions before the merge.
        svc: Shrink directions counted several times after the merge.
        space: Where an elementwise rule works; default: where the method says.
        basis: Core bases, of the "deltas", or of the factors' "stacks" as published.
        smooth: Flatten every adapter's singular values first: "flat" or "linear" (DC-Merge).
        statistics: File of `collect_statistics`, for methods that need one.
        seed: Seed of all randomness.
        dtype: Output dtype; default: the inputs'.
        ranks: One rank for all modules, or "per-module".
        extras: What becomes of tensors that are not low-rank factors.
        accept_base_models: Merge adapters of different base models.
        base_model: The base model that one of the adapters must have, if given.
        rename: Changes of module names, FROM=TO, done on every adapter that has such names.
        base: The base model's directory: names are checked against it, and forms that depend on
            its weights are read.

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
    opened = open_adapters(adapters, rename=rename, base=base)
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
        normalize=normalize,
        scale=scale,
        norm_equalise=norm_equalise,
        restore_norm=restore_norm,
        pico=pico,
        svc=svc,
        space=space,
        basis=basis,
        smooth=smooth,
        statistics=statistics,
        seed=seed,
        dtype=dtype,
        ranks=ranks,
        extras=extras,
        accept_base_models=accept_base_models,
        base_model=base_model,
        rename=tuple(rename),
        base=None if base is None else str(base),
    )
    plan = with_scale(plan_merge(recipe, opened), device=device)
    return run_in_memory(plan, strict=strict, jobs=jobs, device=device)


def plan_recipe(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    allow_pickle: bool = False,
    device: str = "cpu",
) -> MergePlan:
    """Open a recipe's adapters and decide everything about the merge, from headers.

    Args:
        recipe: A recipe, whose references are taken as they are; or its YAML file or the same as
            plain data, in which a glob stands for the adapters it matches.
        allow_pickle: Load `.bin` files, with weights_only=True.
        device: Where a few modules are merged if the scale is "auto"; all else is from headers.

    Returns:
        What `merge.run.run_plan` executes.

    Raises:
        RecipeError: If the recipe cannot be read or does not fit its adapters.
        LoraMergeError: If the adapters or the request do not fit.
    """
    recipe = as_recipe(recipe)
    plan = plan_merge(recipe, open_recipe(recipe, allow_pickle=allow_pickle))
    return with_scale(plan, device=device)


@checked()
def run_recipe(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    force: bool = False,
    strict: bool = False,
    resume: bool = False,
    allow_pickle: bool = False,
    jobs: int | None = None,
    device: str = "auto",
    on_plan: Callable[[MergePlan], None] | None = None,
    on_module: Callable[[object], None] | None = None,
) -> MergeReport:
    """Run a recipe into an adapter directory: weights, config, card and the resolved recipe.

    Args:
        recipe: A recipe, its YAML file (`lora_merge.yaml` beside a merged adapter makes the same
            bytes again), or the same as plain data.
        out: The directory to make; it appears whole or not at all.
        force: Replace an adapter directory that is there.
        strict: Raise if the cut to a rank loses more than half of the result.
        resume: Keep what is done beside `out` (`OUT.shards`), and go on from what is there.
        allow_pickle: Load `.bin` files, with weights_only=True.
        jobs: Worker threads.
        device: Where to compute.
        on_plan: Called with the plan, before anything is computed.
        on_module: Called after each module.

    Returns:
        What the merge did to each module.

    Raises:
        LoraMergeError: If recipe, adapters and request do not fit together, or nothing can be
            written there; nothing is left behind.

    Examples:
        >>> import lora_merge
        >>> adapters = [{"adapter": "examples/adapters/*"}]
        >>> recipe = {"merge_method": "ties", "rank": 8, "adapters": adapters}
        >>> lora_merge.run_recipe(recipe, "merged").total().rank
        (8, 8)
    """
    recipe, out = as_recipe(recipe), Path(out)
    if resume:
        run_shard(
            recipe,
            out,
            "1/1",
            force=force,
            resume=True,
            allow_pickle=allow_pickle,
            jobs=jobs,
            device=device,
            on_plan=lambda plan, _: on_plan(plan) if on_plan else None,
            on_module=on_module,
        )
        return join(out, force=force, strict=strict, jobs=jobs)
    named = [item.adapter for item in recipe.adapters]
    named += [recipe.statistics] if recipe.statistics else []
    check_target(out, force=force, inputs=[Path(path) for path in named if Path(path).exists()])
    plan = plan_recipe(recipe, allow_pickle=allow_pickle, device=device)
    if on_plan:
        on_plan(plan)
    return run_plan(
        plan, out, force=force, strict=strict, jobs=jobs, device=device, on_module=on_module
    )
