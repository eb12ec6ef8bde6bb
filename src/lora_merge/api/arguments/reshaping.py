"""Arguments of what makes one adapter from one: resize, extract, fuse, convert.

Of several bases the last one's keywords come first.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from lora_merge.adapters.access.opening import BaseOptions, OpenOptions
from lora_merge.options import Needed, argument, option
from lora_merge.planning import OUT, Folder, Running, Telling
from lora_merge.ranks.options import RankOptions
from lora_merge.ranks.rule import RankRule
from lora_merge.reshape.options import (
    ConvertOptions,
    ExtractOptions,
    FuseOptions,
    ResizeOptions,
)

if TYPE_CHECKING:
    from lora_merge.adapters.access.adapter_like import AdaptersLike
    from lora_merge.adapters.measured.spectra import AdapterSpectra
    from lora_merge.ranks.choose import RankPlan

_ADAPTER = "one adapter, as `open_adapter` takes it"
_RULE = (
    "a rank, or a rule: energy:0.95, elbow, budget:x0.5, match:4, full, ... (`lora-merge resize "
    "--help` has them all)"
)


@dataclass(frozen=True)
class ChooseRanks(BaseOptions, RankOptions):
    """Arguments of `choose_ranks`."""

    adapter: Annotated["AdaptersLike | AdapterSpectra", Needed(f"{_ADAPTER}, or its spectra")]
    rule: RankRule | str | int = argument("energy:0.95", _RULE)


@dataclass(frozen=True)
class PlanResize(Telling, BaseOptions, ResizeOptions):
    """Arguments of `plan_resize`."""

    adapter: Annotated["AdaptersLike", Needed(_ADAPTER)]
    ranks: "RankPlan | RankRule | str | int" = argument(
        "energy:0.95",
        f"a plan of `choose_ranks` (made with the same adapter); {_RULE}; or prune-gates, which "
        "drops units of gate zero (AdaLoRA, SoRA)",
    )


@dataclass(frozen=True)
class Resize(Running, PlanResize):
    """Arguments of `resize`."""

    out: Folder | None = option(
        None, "directory to make", flags=OUT, unset="the result stays in memory"
    )


@dataclass(frozen=True)
class PlanConvert(BaseOptions, ConvertOptions):
    """Arguments of `plan_convert`."""

    adapter: Annotated["AdaptersLike", Needed(_ADAPTER)]


@dataclass(frozen=True)
class Convert(Running, PlanConvert):
    """Arguments of `convert`."""

    out: Folder | None = option(
        None, "directory to make", flags=OUT, unset="the result stays in memory"
    )


@dataclass(frozen=True)
class PlanExtract(ExtractOptions):
    """Arguments of `plan_extract`."""

    base: Annotated[Folder, Needed("directory of the base model, in safetensors", ("--base",))]
    tuned: Annotated[Folder, Needed("directory of the fine-tuned model", ("--tuned",))]
    rule: RankRule | str | int = argument(
        "energy:0.95", f"{_RULE}; energies are of the whole difference"
    )


@dataclass(frozen=True)
class Extract(Running, PlanExtract):
    """Arguments of `extract`."""

    out: Folder | None = option(
        None, "directory to make", flags=OUT, unset="the result stays in memory"
    )


@dataclass(frozen=True)
class PlanFuse(OpenOptions, FuseOptions):
    """Arguments of `plan_fuse`."""

    adapter: Annotated["AdaptersLike", Needed(_ADAPTER)]
    base: Annotated[Folder, Needed("directory of the base model, in safetensors", ("--base",))]


@dataclass(frozen=True)
class Fuse(Running, PlanFuse):
    """Arguments of `fuse`."""

    out: Annotated[Folder, Needed("directory to make", OUT)]
