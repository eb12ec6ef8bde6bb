"""Arguments of what runs a mixture over texts: usage, describe, novelty, train."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from lora_merge.mixture.training.settings import TrainSettings
from lora_merge.options import Needed, argument, option
from lora_merge.planning import OUT, Folder, Progress

if TYPE_CHECKING:
    from lora_merge.api.mixture_like import Base, Data, MixtureLike
    from lora_merge.mixture.insight.usage import Usage as Seen
    from lora_merge.mixture.training.data import Dataset

_MIXTURE = Needed("the mixture, or its directory; it stays as it is")
_BASE = Needed("base model: a directory or a Hub id, in Python a loaded model, too", ("--base",))
_DATA = Needed("JSON lines, in Python rows that were read, too", ("--data",))


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a base model is loaded, and what becomes of rows."""

    device: str = option("auto", "auto, cpu, cuda or cuda:1")
    tokenizer: Any = argument(None, "of a loaded model")
    on_data: "Callable[[Dataset], None] | None" = argument(
        None, "called with the rows that can be used, and what is wrong with the others"
    )


@dataclass(frozen=True, kw_only=True)
class TextOptions(ModelOptions):
    """How texts are run through it."""

    max_length: int = option(512, "longer rows are cut", low=2)
    batch_size: int = option(8, "rows of one pass", low=1)


@dataclass(frozen=True)
class Texts(TextOptions):
    """A mixture, its base model, and texts for them."""

    mixture: Annotated["MixtureLike", _MIXTURE]
    base: Annotated["Base", _BASE]
    data: Annotated["Data", _DATA]


@dataclass(frozen=True)
class Usage(Texts):
    """Arguments of `usage`."""

    by_label: bool = argument(False, "count the rows that name an expert apart, too, in `labels`")


@dataclass(frozen=True)
class Consolidate(TextOptions):
    """Arguments of `consolidate`."""

    mixture: Annotated["MixtureLike", _MIXTURE]
    usage: "Seen | None" = argument(
        None, "from `usage`, on text that matters; default: measured with `base` on `data`"
    )
    _: KW_ONLY
    base: "Base | None" = argument(None, _BASE.about)
    data: "Data | None" = argument(None, _DATA.about)
    experts: int = option(1, "how many remain", low=1)
    rank: int | None = option(
        None, "largest rank of each", low=1, unset="their members' ranks together, without error"
    )
    out: Folder | None = option(
        None, "directory to make", flags=OUT, unset="the result stays in memory"
    )
    force: bool = option(False, "replace an output that lora-merge wrote")


@dataclass(frozen=True)
class Describe(Texts):
    """Arguments of `describe`."""

    _: KW_ONLY
    rank: int = option(8, "width of the autoencoder", low=1)
    modules: Sequence[str] | None = argument(
        None, "whose inputs; default: those already described, or one per layer"
    )


@dataclass(frozen=True)
class Novelty(Texts):
    """Arguments of `novelty`."""

    _: KW_ONLY
    threshold: float = option(1.5, "deviations above an expert's own texts that are strange")


@dataclass(frozen=True)
class Train(ModelOptions):
    """Arguments of `train`."""

    mixture: Annotated["MixtureLike", _MIXTURE]
    base: Annotated["Base", _BASE]
    data: Annotated["Data", _DATA]
    settings: TrainSettings | None = argument(None, "how to train")
    _: KW_ONLY
    evaluation: "Data" = argument((), "rows whose loss is reported")
    max_length: int = option(1024, "longer rows are cut", low=2)
    strict: bool = option(False, "refuse the data if any row is bad")
    shard: bool = option(False, "spread the base over processes (FSDP)")
    work: str | os.PathLike[str] | None = argument(
        None, "directory for the checkpoint; default: none is kept"
    )
    resume: bool = option(False, "go on from the checkpoint, to the weights of an unbroken run")
    on_step: Callable[[Mapping[str, Any]], None] | None = argument(
        None, "called with every step's metrics"
    )
    progress: Progress | None = argument(
        None, "called after each step with what is done and how many steps that has"
    )
