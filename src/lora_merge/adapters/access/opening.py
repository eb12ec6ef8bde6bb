"""How adapters are opened; plain data, from which the commands' options are made."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from lora_merge.options import Needed, argument, option

if TYPE_CHECKING:
    from lora_merge.adapters.access.adapter_like import AdaptersLike


@dataclass(frozen=True, kw_only=True)
class OpenOptions:
    """What files do not say, and what may be read; adapters that are open already stay as are."""

    alpha: float | None = option(None, "lora_alpha of .safetensors files without a config")
    rslora: bool = option(False, "those files' scaling is alpha / sqrt(r)")
    allow_pickle: bool = option(False, "load .bin files (with weights_only=True)")
    rename: Sequence[str] = option(
        (), "give modules below FROM the path TO, e.g. layers=model.layers", metavar="FROM=TO"
    )

    @property
    def opening(self) -> dict[str, Any]:
        """The options of `open_adapters`, by name."""
        return {
            "alpha": self.alpha,
            "rslora": self.rslora,
            "allow_pickle": self.allow_pickle,
            "rename": self.rename,
        }


@dataclass(frozen=True, kw_only=True)
class BaseOptions(OpenOptions):
    """The base model, too."""

    base: str | os.PathLike[str] | None = option(
        None, "base model's directory: checks names, tells what depends on its weights"
    )

    @property
    def opening(self) -> dict[str, Any]:
        """The options of `open_adapters`, by name."""
        return {**super().opening, "base": self.base}


@dataclass(frozen=True, kw_only=True)
class CutOptions(BaseOptions):
    """What else forms of full rank need."""

    rank: int | None = argument(
        None, "accept deltas of full rank, cut at this rank where a form can be cut as it is read"
    )


@dataclass(frozen=True)
class OpenAdapter(CutOptions):
    """Arguments of `open_adapter`."""

    adapter: Annotated["AdaptersLike", Needed("what stands for it, as `open_adapters` takes it")]


@dataclass(frozen=True)
class OpenAdapters(CutOptions):
    """Arguments of `open_adapters`."""

    adapters: Annotated[
        "AdaptersLike",
        Needed(
            "one or several of: a directory, a `.safetensors` file, a glob, a Hub reference "
            "(`user/repo@revision:subfolder`), an `Adapter`, or a live `PeftModel`, which stands "
            "for all of its adapters, in the order they were added"
        ),
    ]
