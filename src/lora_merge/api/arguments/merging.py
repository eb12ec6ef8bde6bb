"""Arguments of `cluster`."""

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated

from lora_merge.merge.methods.lego_options import LegoOptions
from lora_merge.merge.recipe.arguments import AnyMerge
from lora_merge.options import Needed, argument

if TYPE_CHECKING:
    from lora_merge.adapters.access.adapter_like import AdaptersLike


@dataclass(frozen=True)
class Cluster(AnyMerge):
    """Arguments of `cluster`."""

    adapters: Annotated["AdaptersLike", Needed("what `open_adapters` takes")]
    rank: Annotated[int, Needed("rank of the result: k of the k-means")]
    _: KW_ONLY
    options: LegoOptions | None = argument(
        None,
        "the published procedure, or a variant of it (the method `lego`); default: singular units, "
        "refitted (`lego-refit`), as the command does",
    )
