"""`lora_merge.merge`: adapters in, an adapter out, all in memory."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_merge._version import __version__
from lora_merge.adapters.access.coerce import AdaptersLike, open_adapters
from lora_merge.adapters.in_memory import MadeAdapter, MemoryWriter
from lora_merge.adapters.writer import RankLayout
from lora_merge.arguments import checked
from lora_merge.errors import MethodError
from lora_merge.merge.calibrate import RestoreNorm
from lora_merge.merge.clusters import clusters_text
from lora_merge.merge.executor import execute, settle
from lora_merge.merge.extras import ExtrasPolicy
from lora_merge.merge.methods.method import Normalize, Space
from lora_merge.merge.methods.registry import methods
from lora_merge.merge.methods.spaces import Anchor
from lora_merge.merge.recipe.recipe import (
    RECIPE_NAME,
    AdapterItem,
    Recipe,
    plan_recipe,
    resolved_recipe,
)
from lora_merge.merge.report import MergeReport
from lora_merge.merge.save import card_of, finish_report


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
    scale: float = 1.0,
    norm_equalise: bool = False,
    restore_norm: RestoreNorm = "none",
    pico: bool = False,
    svc: bool = False,
    space: Space | None = None,
    basis: Anchor = "stacks",
    statistics: str | None = None,
    seed: int = 0,
    dtype: str | None = None,
    ranks: RankLayout = "uniform",
    extras: ExtrasPolicy = "average",
    accept_base_models: bool = False,
    base_model: str | None = None,
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
        scale: Factor on the merged delta.
        norm_equalise: Bring every adapter to the mean norm first.
        restore_norm: Bring the result to the "mean" or "weighted-mean" norm of the adapters.
        pico: Shrink shared output directions before the merge.
        svc: Shrink directions counted several times after the merge.
        space: Where an elementwise rule works; default: where the method says.
        basis: Core bases, of the "stacks" or of the "deltas".
        statistics: File of `collect_statistics`, for methods that need one.
        seed: Seed of all randomness.
        dtype: Output dtype; default: the inputs'.
        ranks: One rank for all modules, or "per-module".
        extras: What becomes of tensors that are not low-rank factors.
        accept_base_models: Merge adapters of different base models.
        base_model: The base model that one of the adapters must have, if given.

    Returns:
        The merged adapter with its `report`; `save_pretrained` and `push_to_hub` write it with
        card and recipe, `to_peft` puts it into a live model.

    Raises:
        LoraMergeError: If the adapters or the request do not fit.

    Example:
        >>> import lora_merge
        >>> merged = lora_merge.merge("examples/adapters/*", method="ties", rank=8,
        ...                           parameters={"density": 0.5})
        >>> merged.report.total().rank
        (8, 8)
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
        normalize=normalize,
        scale=scale,
        norm_equalise=norm_equalise,
        restore_norm=restore_norm,
        pico=pico,
        svc=svc,
        space=space,
        basis=basis,
        statistics=statistics,
        seed=seed,
        dtype=dtype,
        ranks=ranks,
        extras=extras,
        accept_base_models=accept_base_models,
        base_model=base_model,
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
    members = clusters_text(modules, [a.name for a in plan.alignment.adapters])
    texts = {
        RECIPE_NAME: text + (members if plan.units_survive else ""),
        "README.md": card_of(plan, text),
    }
    return MadeAdapter.of(writer.adapter("merged"), report, texts=texts, notes=report.notes)
