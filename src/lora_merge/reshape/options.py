"""What each change of one adapter can be told; plain data, from which the commands are made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_merge.adapters.config import ExpertLayout, RankLayout
from lora_merge.errors import ArgumentError
from lora_merge.files.header import DTypeName
from lora_merge.options import LARGEST_SEED, option
from lora_merge.ranks.options import RankOptions

Format = Literal["peft", "kohya", "diffusers", "comfyui", "mlx", "gguf"]


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(RankOptions):
    """How ranks are chosen, which units are kept, and how they are stored."""

    nested: bool = option(False, "keep the first units as stored (DyLoRA); needs one rank for all")
    layout: RankLayout = option(
        "per-module",
        "write rank_pattern where ranks differ, or pad with zeros to one rank",
        switch=True,
    )
    dtype: DTypeName | None = option(None, "dtype of the factors", unset="the adapter's")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Which format, where to cut what is of full rank, and how names are found."""

    to: Format | None = option(None, "format to write", unset="its own, or peft")
    rank: int | None = option(None, "cut every delta at this rank", low=1)
    energy: float | None = option(
        None, "cut every delta where this share of its squared norm is kept", above=0, high=1
    )
    experts: ExpertLayout | None = option(
        None,
        "layout of MoE experts: a module each, or one parameter as PEFT stores it since 0.19, or "
        "before",
        unset="as they are",
    )
    component: str | None = option(
        None, "part of a pipeline that PEFT's names belong to: unet, ..."
    )
    pipeline: str | None = option(
        None, "rename by diffusers' converter: StableDiffusionXL, Flux, ..."
    )
    dtype: DTypeName | None = option(None, "dtype of the factors", unset="the adapter's")

    def __post_init__(self) -> None:
        """Refuse two cuts."""
        if self.rank is not None and self.energy is not None:
            raise ArgumentError("rank and energy are two cuts", "give one of them")


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Which weights are taken, and how much of each."""

    max_rank: int = option(64, "triples computed per weight, and the largest rank", low=1)
    denoise: bool = option(True, "cap ranks at the noise threshold (Gavish-Donoho)")
    include: Sequence[str] = option(
        (),
        "patterns of modules to extract; default: every matrix but embeddings and heads",
        metavar="GLOB",
    )
    exclude: Sequence[str] = option((), "patterns of modules to leave out", metavar="GLOB")
    base_name: str | None = option(
        None,
        "name of the base model for the adapter's config",
        unset="its directory's path, or name if it is not below here",
    )
    layout: RankLayout = option(
        "uniform",
        "pad all modules to one rank, or write rank_pattern where ranks differ",
        switch=True,
    )
    dtype: DTypeName | None = option(None, "dtype of the factors", unset="the tuned model's")
    seed: int = option(0, "of the randomised SVD", low=0, high=LARGEST_SEED)


@dataclass(frozen=True, kw_only=True)
class FuseOptions:
    """How much of the adapter goes into the base."""

    weight: float = option(1.0, "scales the delta", flags=("-w", "--weight"))
