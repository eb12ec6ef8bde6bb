"""Arguments of what merges: merge, recipes, shards; plain data, of which the commands are made."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lora_merge.merge.recipe.recipe import ABOUT_SCALE, Recipe, RecipeOptions
from lora_merge.options import Needed, argument, option
from lora_merge.planning import OUT, Folder, Plan, Telling

if TYPE_CHECKING:
    from lora_merge.adapters.access.adapter_like import AdaptersLike

_RECIPE = Needed(
    "a recipe, its YAML file (`lora_merge.yaml` beside a merged adapter makes the same bytes "
    "again), or the same as plain data, in which a glob stands for the adapters it matches"
)


@dataclass(frozen=True, kw_only=True)
class Computing(Telling):
    """Where and how a merge computes."""

    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    jobs: int | None = option(None, "worker threads", low=1, unset="CPUs")
    on_plan: Callable[[Plan[Any]], None] | None = argument(
        None, "called with the plan, before anything is computed"
    )


@dataclass(frozen=True, kw_only=True)
class Strictness:
    """What is an error."""

    strict: bool = option(False, "fail if the cut to a rank loses over half of the result")


@dataclass(frozen=True, kw_only=True)
class AnyMerge(Computing, Strictness, RecipeOptions):
    """What a merge of any method takes."""

    scale: float | Literal["auto"] = option("auto", ABOUT_SCALE)
    weights: Sequence[Any] | None = argument(
        None,
        "one per adapter: numbers, lists over the layers, or lists of {filter, value}; default: 1",
    )

    def recipe_options(self) -> dict[str, Any]:
        """The fields that a recipe has under the same name."""
        said = {spec.name: getattr(self, spec.name) for spec in fields(RecipeOptions)}
        paths = {n: os.fspath(v) for n, v in said.items() if isinstance(v, os.PathLike)}
        return {**said, **paths, "rename": tuple(self.rename)}


@dataclass(frozen=True)
class Merge(AnyMerge):
    """Arguments of `merge` and `plan_merge`."""

    adapters: Annotated["AdaptersLike", Needed("what `open_adapters` takes")]
    _: KW_ONLY
    method: str = argument("auto", "name of a method (`lora-merge methods`)")
    rank: int | str | None = argument(
        None,
        'rank of the result, or a rank rule such as "energy:0.95"; default: the method\'s',
    )
    parameters: Mapping[str, Any] | None = argument(
        None,
        "parameters of the method; those of how an adapter is sparsified (density, ...) may be "
        "lists over the layers or of {filter, value}, too",
    )
    own_parameters: Sequence[Mapping[str, Any]] | None = argument(
        None, "one mapping per adapter: such parameters for it alone"
    )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a recipe's adapters are read."""

    allow_pickle: bool = option(False, "load .bin files (with weights_only=True)")


@dataclass(frozen=True)
class PlanRecipe(Reading, Strictness):
    """Arguments of `plan_recipe`."""

    recipe: Annotated[Recipe | Mapping[str, Any] | Folder, _RECIPE]
    _: KW_ONLY
    device: str = argument(
        "cpu", "where a few modules are merged if the scale is auto; all else is from headers"
    )


@dataclass(frozen=True, kw_only=True)
class RunningRecipe(Computing, Reading):
    """How a recipe is run."""

    force: bool = option(False, "replace an output that lora-merge wrote")
    resume: bool = option(
        False, "keep what is done beside the output (OUT.shards), and go on from what is there"
    )


@dataclass(frozen=True)
class RunRecipe(RunningRecipe, Strictness):
    """Arguments of `run_recipe`."""

    recipe: Annotated[Recipe | Mapping[str, Any] | Folder, _RECIPE]
    out: Folder | None = option(
        None, "directory to make", flags=OUT, unset="the result stays in memory"
    )
    _: KW_ONLY
    devices: str | None = option(
        None, "several devices of this machine, a process for each: cuda:0,cuda:1", unset="--device"
    )
    engine: Literal["local", "ray"] = option(
        "local", "where modules are merged: ray is a Ray cluster (extra `ray`)"
    )
    address: str | None = option(
        None, "of the Ray cluster; auto finds it", unset="one is started here"
    )


@dataclass(frozen=True)
class RunShard(RunningRecipe):
    """Arguments of `run_shard`."""

    recipe: Annotated[Recipe | Mapping[str, Any] | Folder, _RECIPE]
    out: Annotated[Folder, Needed("directory that `join` will make", OUT)]
    shard: Annotated[
        str, Needed("which of how many: 3/16; it lies in `OUT.shards/3-of-16`", ("--shard",))
    ]


@dataclass(frozen=True)
class Join(Telling, Strictness):
    """Arguments of `join`."""

    out: Annotated[Folder, Needed("directory that the shards, in `OUT.shards`, were made for")]
    _: KW_ONLY
    force: bool = option(False, "replace an output that lora-merge wrote")
    keep: bool = option(False, "leave OUT.shards where it is")
    jobs: int | None = option(None, "worker threads", low=1, unset="CPUs")
    on_plan: Callable[[Plan[Any]], None] | None = argument(
        None, "called with the plan, before anything is written"
    )


@dataclass(frozen=True)
class Arrive:
    """Arguments of `arrive`."""

    adapters: Annotated[
        "AdaptersLike",
        Needed("new ones, in their order, which matters; what `open_adapters` takes"),
    ]
    into: Annotated[Folder, Needed("directory of slots; made if it is not there", ("--into",))]
    _: KW_ONLY
    slots: Annotated[int, Needed("K, how many there may be", ("--slots",), low=1)]
    rank: int | None = option(
        None, "rank of merged slots", low=1, unset="the largest of slot and adapter"
    )
    threshold: float | None = option(
        None, "cosine from which an adapter joins a slot while others are free", low=-1, high=1
    )
    jobs: int | None = option(None, "worker threads", low=1, unset="CPUs")
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
