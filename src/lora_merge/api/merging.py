"""Many adapters in, one out: clustering, and the table of methods; `merge` is in its room."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from lora_merge.adapters.in_memory import MadeAdapter
from lora_merge.api.arguments.merging import Cluster
from lora_merge.arguments import checked, takes
from lora_merge.merge.api import merge
from lora_merge.merge.methods.lego_options import LegoOptions
from lora_merge.merge.methods.method import Method
from lora_merge.merge.methods.registry import methods as table
from lora_merge.merge.recipe.arguments import AnyMerge
from lora_merge.merge.report import MergeReport


def _of_merge(word: str, value: Any) -> str:
    if word in {spec.name for spec in fields(LegoOptions)}:
        return f"pass options=LegoOptions({word}={value!r})"
    return "merge(adapters, method='lego', ...) has all of merge's arguments"


@takes(Cluster, _of_merge)
def cluster(given: Cluster) -> MadeAdapter[MergeReport]:
    """Cluster the rank-wise units of all adapters into one adapter (LoRA-LEGO, arXiv 2409.16167).

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
    return merge(
        given.adapters,
        method="lego" if given.options else "lego-refit",
        rank=given.rank,
        parameters=asdict(given.options) if given.options else {},
        **{spec.name: getattr(given, spec.name) for spec in fields(AnyMerge)},
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
