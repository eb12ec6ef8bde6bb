"""Arguments of what makes and writes mixtures: append, import, export."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lora_merge.api.arguments.looking import BaseNames
from lora_merge.options import LARGEST_SEED, Needed, argument, option
from lora_merge.planning import OUT, Folder

if TYPE_CHECKING:
    from lora_merge.adapters.access.adapter_like import AdaptersLike
    from lora_merge.api.mixture_like import MixtureLike
    from lora_merge.mixture.insight.usage import Usage

Kind = Literal["experts", "static", "xlora"]


@dataclass(frozen=True)
class AppendExperts(BaseNames):
    """Arguments of `append_experts`."""

    mixture: Annotated["MixtureLike", Needed("what there is")]
    adapters: Annotated["AdaptersLike", Needed("new experts, as `open_adapters` takes them")]
    _: KW_ONLY
    names: Sequence[str] | None = argument(None, "their names")
    seed: int = option(
        0, "of the rows of modules that no expert touched before", low=0, high=LARGEST_SEED
    )


@dataclass(frozen=True)
class FreshMixture:
    """Arguments of `fresh_mixture`."""

    base: Annotated[
        Folder,
        Needed("base model: a directory or a Hub id, of which the config is read", ("--base",)),
    ]
    rank: Annotated[int, Needed("of every expert in every linear module")]
    preset: str = argument("smora", "the gate")
    _: KW_ONLY
    names: Sequence[str] = argument(("fresh",), "one per expert")
    seed: int = option(0, "of what is drawn")
    hidden_size: int | None = argument(
        None, "width of the base model's hidden state (X-LoRA), where modules do not tell"
    )
    settings: Mapping[str, Any] | None = argument(None, "of the gate, such as top_k")


@dataclass(frozen=True)
class ImportMixture:
    """Arguments of `import_mixture`."""

    checkpoint: Annotated[Folder, Needed("directory (X-LoRA) or file (MeteoRA)")]
    experts: "AdaptersLike" = argument(
        (), "references to its adapters in its order, where they are elsewhere"
    )
    _: KW_ONLY
    base: Folder | None = argument(None, "base model, for X-LoRA's order of layers")
    top_k: int | None = argument(None, "MeteoRA's, which no checkpoint records")
    temperature: float | None = argument(None, "the same")
    allow_pickle: bool = argument(False, "read X-LoRA's classifier from a `.pt` file")


@dataclass(frozen=True)
class Export:
    """Arguments of `export`."""

    mixture: Annotated["MixtureLike", Needed("the mixture, or its directory")]
    out: Annotated[Folder, Needed("directory to make", OUT)]
    to: Annotated[
        Kind,
        Needed(
            "experts: one LoRA folder per expert; static: one LoRA, the gate held still; xlora: "
            "PEFT's X-LoRA layout, as PEFT 0.19 and earlier read it",
            ("--to",),
        ),
    ]
    _: KW_ONLY
    weights: "Sequence[float] | Usage | None" = argument(
        None,
        "for static: one per expert, or the usage whose mean weights they are; default: 1 / N each",
    )
    rank: int | None = option(None, "for static: largest rank", low=1, unset="all, which is exact")
    base: "Folder | None" = option(
        None, "for xlora: base model, whose class tells the order of layers"
    )
    force: bool = option(False, "replace an output that lora-merge wrote")
