"""Many adapters in, one out: clustering, and the table of methods; `merge` is in its room."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from lora_merge.adapters.access.adapter_like import AdaptersLike
from lora_merge.adapters.in_memory import MadeAdapter
from lora_merge.arguments import checked
from lora_merge.files.header import DTypeName
from lora_merge.merge.api import merge
from lora_merge.merge.methods.lego_options import LegoOptions
from lora_merge.merge.methods.method import Method
from lora_merge.merge.methods.registry import methods as table
from lora_merge.merge.report import MergeReport


def _of_merge(word: str, value: Any) -> str:
    if word in {spec.name for spec in fields(LegoOptions)}:
        return f"pass options=LegoOptions({word}={value!r})"
    return "merge(adapters, method='lego', ...) has all of merge's arguments"


@checked(_of_merge)
def cluster(
    adapters: AdaptersLike,
    rank: int,
    *,
    options: LegoOptions | None = None,
    weights: Sequence[Any] | None = None,
    scale: float | Literal["auto"] = "auto",
    dtype: DTypeName | None = None,
    ranks: Literal["uniform", "per-module"] = "uniform",
    extras: Literal["average", "first", "drop", "error"] = "average",
    seed: int = 0,
    accept_base_models: bool = False,
    base: str | Path | None = None,
    jobs: int | None = None,
    device: str = "auto",
) -> MadeAdapter[MergeReport]:
    """Cluster the rank-wise units of all adapters into one adapter (LoRA-LEGO, arXiv 2409.16167).

    Args:
        adapters: What `open_adapters` takes.
        rank: Rank of the result: k of the k-means.
        options: The published procedure, or a variant of it (the method `lego`); default: singular
            units, refitted (`lego-refit`), as the command does.
        weights: One per adapter, as for `merge`.
        scale: As for `merge`.
        dtype: Output dtype; default: the inputs'.
        ranks: One rank for all modules, or "per-module".
        extras: What becomes of tensors that are not low-rank factors.
        seed: Seed of all randomness.
        accept_base_models: Cluster adapters of different base models.
        base: The base model's directory, as for `merge`.
        jobs: Worker threads.
        device: Where to compute.

    Returns:
        The adapter of clusters, with its `report`.

    Raises:
        LoraMergeError: If the adapters or the request do not fit.

    Examples:
        >>> import lora_merge
        >>> made = lora_merge.cluster("examples/adapters/*", 16,
        ...                           options=lora_merge.LegoOptions(units="normalized"))
        >>> made.ranks()
        Counter({16: 14})
    """
    given = {spec.name: getattr(options, spec.name) for spec in fields(options)} if options else {}
    return merge(
        adapters,
        method="lego" if options else "lego-refit",
        rank=rank,
        weights=weights,
        parameters=given,
        scale=scale,
        dtype=dtype,
        ranks=ranks,
        extras=extras,
        seed=seed,
        accept_base_models=accept_base_models,
        base=base,
        jobs=jobs,
        device=device,
    )


@checked()
def methods() -> Mapping[str, Method]:
    """Every merge method by name, those of other packages too.

    Examples:
        >>> import lora_merge
        >>> [p.name for p in lora_merge.methods()["ties"].parameters()][:1]
        ['density']
    """
    return table()
