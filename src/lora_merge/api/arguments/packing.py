"""Arguments of `pack`."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated

from lora_merge.options import Needed, argument, option
from lora_merge.planning import OUT, Folder, Telling

if TYPE_CHECKING:
    from lora_merge.adapters.access.adapter_like import AdaptersLike


@dataclass(frozen=True)
class Pack(Telling):
    """Arguments of `pack`."""

    adapters: Annotated[
        "AdaptersLike", Needed("what `open_adapters` takes; adapters of libraries, too")
    ]
    out: Annotated[Folder, Needed("library to make", OUT)]
    _: KW_ONLY
    append: bool = option(False, "add to the library that is there")
    names: Sequence[str] | None = argument(
        None,
        "of each in the library; default: the part of its path that tells it from the others",
    )
    tags: Sequence[str] | Mapping[str, str] = argument((), "NAME=VALUE, said of all of them")
    force: bool = option(False, "replace an output that lora-merge wrote")
