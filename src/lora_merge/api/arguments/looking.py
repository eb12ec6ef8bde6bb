"""Arguments of what looks at adapters: info, spectra, compare, report."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated

from lora_merge.adapters.access.opening import BaseOptions, OpenOptions
from lora_merge.analysis.metrics import Metric
from lora_merge.options import LARGEST_SEED, Needed, argument, option
from lora_merge.planning import Folder, Telling

if TYPE_CHECKING:
    from lora_merge.adapters.access.adapter_like import AdaptersLike
    from lora_merge.adapters.measured.spectra import AdapterSpectra
    from lora_merge.analysis.compare import Comparison
    from lora_merge.analysis.pairs.matrices import PairMatrices

ADAPTER = "one adapter, as `open_adapter` takes it"
ADAPTERS = "the adapters, as `open_adapters` takes them"


@dataclass(frozen=True, kw_only=True)
class ModuleOptions:
    """Which modules are looked at."""

    modules: Sequence[str] = option(
        (),
        "only modules that match one of these patterns",
        flags=("--module",),
        metavar="GLOB",
    )
    jobs: int | None = argument(None, "worker threads")


@dataclass(frozen=True, kw_only=True)
class BaseNames:
    """Whether adapters may differ in what they say of their base model."""

    accept_base_models: bool = option(False, "accept adapters that name different base models")


@dataclass(frozen=True)
class Info(Telling, BaseOptions):
    """Arguments of `info`."""

    adapter: Annotated["AdaptersLike", Needed(ADAPTER)]


@dataclass(frozen=True)
class Spectra(Telling, BaseOptions, ModuleOptions):
    """Arguments of `spectra`."""

    adapter: Annotated["AdaptersLike", Needed(ADAPTER)]
    _: KW_ONLY
    keep_cores: bool = argument(
        False, "keep each module's r x r SVD, from which any truncation follows"
    )


SPECTRA = "what `spectra` found of an adapter, or several of these"


@dataclass(frozen=True)
class Draw:
    """Arguments of `draw`."""

    found: Annotated[
        "AdapterSpectra | Sequence[AdapterSpectra] | Comparison",
        Needed(f"{SPECTRA}, or what `compare` found"),
    ]
    path: Annotated[Folder, Needed("file to make: `.svg`, or `.png` at 144 dots per inch")]
    _: KW_ONLY
    metric: Metric = option("frobenius", "what the heat map of spectra shows")


@dataclass(frozen=True)
class WriteCsv:
    """Arguments of `write_csv`."""

    found: Annotated["AdapterSpectra | Sequence[AdapterSpectra]", Needed(SPECTRA)]
    path: Annotated[Folder, Needed("file to make")]


@dataclass(frozen=True)
class BesideBase(Telling, OpenOptions, ModuleOptions):
    """Arguments of `spectra_beside_base`."""

    adapter: Annotated["AdaptersLike", Needed(ADAPTER)]
    base: Annotated[Folder, Needed("directory of the base model, in safetensors")]
    _: KW_ONLY
    intruders: bool = option(False, "count intruder dimensions (arXiv 2410.21228), too")
    spectra: "AdapterSpectra | None" = argument(
        None, "the adapter's, with cores kept, where they were measured already"
    )


@dataclass(frozen=True)
class Compare(Telling, BaseOptions, BaseNames, ModuleOptions):
    """Arguments of `compare`."""

    adapters: Annotated["AdaptersLike", Needed(ADAPTERS)]
    _: KW_ONLY
    angles: bool = argument(
        False, "measure all principal cosines of every module, not only the largest"
    )
    per_module: bool = option(
        False, "keep every module's matrices, too: memory then grows with their number"
    )
    on_matrices: "Callable[[PairMatrices], None] | None" = argument(
        None, "called with every module's matrices, in order"
    )
    seed: int = option(0, "of the sampled sign conflicts", low=0, high=LARGEST_SEED)


@dataclass(frozen=True)
class Neighbours(Telling, BaseOptions, BaseNames, ModuleOptions):
    """Arguments of `neighbours`."""

    adapters: Annotated["AdaptersLike", Needed(ADAPTERS)]
    count: int = option(
        5, "neighbours of each adapter", flags=("--neighbours",), low=1, metavar="K"
    )


@dataclass(frozen=True)
class Report(Telling, BaseOptions, BaseNames, ModuleOptions):
    """Arguments of `report`."""

    adapters: Annotated["AdaptersLike", Needed(ADAPTERS)]
    out: Folder = option("report.html", "page to make", flags=("-o", "--out"))
    pairs: bool = argument(True, "compare the adapters, too")
    spectra: "Sequence[AdapterSpectra] | None" = argument(
        None, "the adapters', where they were measured already"
    )
    comparison: "Comparison | None" = argument(
        None, "of the adapters, where they were compared already"
    )
