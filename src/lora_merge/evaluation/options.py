"""What scoring on rows takes; plain data, from which the commands are made."""

import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal

from lora_merge.merge.recipe.recipe import Recipe
from lora_merge.options import LARGEST_SEED, Needed, argument, option
from lora_merge.planning import Progress

# Given what a model said to prompts, a number.
Judge = Callable[[list[dict[str, str]]], float]
Sampler = Literal["tpe", "cmaes", "random"]
_BASE = Needed("base model: a directory or a Hub id", ("--base",))
_DATA = Needed("JSON lines, see `lora-merge evaluate --help`", ("--data",))


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and how the model runs."""

    base: Annotated[str | os.PathLike[str], _BASE]
    data: Annotated[str | os.PathLike[str], _DATA]
    metric: str | Judge = option(
        "auto", "loss, accuracy, exact-match, or command:PROGRAM; in Python a function, too"
    )
    max_length: int = option(1024, "rows with more tokens are refused", low=2)
    batch_size: int = option(16, "texts in one pass", low=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    progress: Progress | None = argument(
        None, "called after each step with what is done and how many steps that has"
    )


@dataclass(frozen=True)
class Evaluate(BenchOptions):
    """Arguments of `evaluate`."""

    subjects: Annotated[
        Any,
        Needed(
            "adapters (what `open_adapters` takes) and mixtures (directories or `Mixture`), one or "
            "several"
        ),
    ]
    _: KW_ONLY
    cache: bool = option(True, "take what was measured before of the same files, rows and metric")


@dataclass(frozen=True)
class Search(BenchOptions):
    """Arguments of `search`."""

    recipe: Annotated[
        Recipe | dict[str, Any] | str | os.PathLike[str],
        Needed("where to start, as for `run_recipe`"),
    ]
    _: KW_ONLY
    trials: int = option(50, "how many trials the study shall have in all", low=1)
    over: Sequence[str] = argument(("scale", "weights"), "what may vary, of `search_space.OVER`")
    methods: Sequence[str] = argument((), "methods to choose from, if `over` names `method`")
    pareto: bool = option(
        False, "one objective per task, not their mean; the front's best mean wins"
    )
    held_out: float = option(0.3, "share of the rows that no trial sees", above=0, below=1)
    sampler: Sampler = option("tpe", "Optuna's")
    seed: int = option(0, "of sampler and split", low=0, high=LARGEST_SEED)
    study: str | os.PathLike[str] | None = argument(
        None, "SQLite file to keep the study in; default: in memory"
    )
    worker: int = option(
        0, "another number for each process that shares a study, to try different things", low=0
    )
    on_trial: Callable[[Any], None] | None = argument(None, "called with each `Trial`")


@dataclass(frozen=True)
class MakeSoup(BenchOptions):
    """Arguments of `soup`."""

    adapters: Annotated[
        Any, Needed("checkpoints of a run or runs of one task: what `open_adapters` takes")
    ]
    _: KW_ONLY
    rank: int | str | None = argument(
        None, "rank of the means, or a rule; default: the largest of the adapters'"
    )
    held_out: float = option(0.3, "share of the rows that choose nothing", above=0, below=1)
    seed: int = option(0, "of the split", low=0, high=LARGEST_SEED)
