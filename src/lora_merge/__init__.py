"""Cluster, merge, gate and analyse LoRA adapters, rank by rank.

Names are resolved on first use (PEP 562), so that `lora-merge --help` never imports torch.
docs/api.md says what is stable.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_merge._version import __version__

if TYPE_CHECKING:
    from lora_merge.adapters.access.adapter_like import AdapterLike as AdapterLike
    from lora_merge.adapters.access.adapter_like import AdaptersLike as AdaptersLike
    from lora_merge.adapters.access.coerce import open_adapter as open_adapter
    from lora_merge.adapters.access.coerce import open_adapters as open_adapters
    from lora_merge.adapters.adapter import Adapter as Adapter
    from lora_merge.adapters.in_memory import MadeAdapter as MadeAdapter
    from lora_merge.adapters.measured.activations import collect_statistics as collect_statistics
    from lora_merge.adapters.rank_stack import RankStack as RankStack
    from lora_merge.api.looking import choose_ranks as choose_ranks
    from lora_merge.api.looking import compare as compare
    from lora_merge.api.looking import group as group
    from lora_merge.api.looking import info as info
    from lora_merge.api.looking import judge as judge
    from lora_merge.api.looking import neighbours as neighbours
    from lora_merge.api.looking import plan_compare as plan_compare
    from lora_merge.api.looking import plan_neighbours as plan_neighbours
    from lora_merge.api.looking import spectra as spectra
    from lora_merge.api.looking import spectra_beside_base as spectra_beside_base
    from lora_merge.api.merging import cluster as cluster
    from lora_merge.api.merging import methods as methods
    from lora_merge.api.mixing import append_experts as append_experts
    from lora_merge.api.mixing import export as export
    from lora_merge.api.mixing import fresh_mixture as fresh_mixture
    from lora_merge.api.mixing import import_mixture as import_mixture
    from lora_merge.api.mixing import train as train
    from lora_merge.api.packing import check_library as check_library
    from lora_merge.api.packing import pack as pack
    from lora_merge.api.pictures import draw as draw
    from lora_merge.api.pictures import write_csv as write_csv
    from lora_merge.api.reporting import report as report
    from lora_merge.api.reshaping import convert as convert
    from lora_merge.api.reshaping import extract as extract
    from lora_merge.api.reshaping import fuse as fuse
    from lora_merge.api.reshaping import plan_convert as plan_convert
    from lora_merge.api.reshaping import plan_extract as plan_extract
    from lora_merge.api.reshaping import plan_fuse as plan_fuse
    from lora_merge.api.reshaping import plan_resize as plan_resize
    from lora_merge.api.reshaping import resize as resize
    from lora_merge.api.texts import consolidate as consolidate
    from lora_merge.api.texts import describe as describe
    from lora_merge.api.texts import novelty as novelty
    from lora_merge.api.texts import usage as usage
    from lora_merge.api.tuning import check_kernels as check_kernels
    from lora_merge.api.tuning import tune as tune
    from lora_merge.errors import AdapterError as AdapterError
    from lora_merge.errors import AlignmentError as AlignmentError
    from lora_merge.errors import ArgumentError as ArgumentError
    from lora_merge.errors import LoraMergeError as LoraMergeError
    from lora_merge.errors import LoraMergeWarning as LoraMergeWarning
    from lora_merge.errors import MethodError as MethodError
    from lora_merge.errors import OutputError as OutputError
    from lora_merge.errors import SourceError as SourceError
    from lora_merge.evaluation.evaluate import evaluate as evaluate
    from lora_merge.evaluation.search import search as search
    from lora_merge.evaluation.soup import soup as soup
    from lora_merge.evaluation.sweep import sweep as sweep
    from lora_merge.merge.api import merge as merge
    from lora_merge.merge.api import plan_merge as plan_merge
    from lora_merge.merge.api import plan_recipe as plan_recipe
    from lora_merge.merge.api import run_recipe as run_recipe
    from lora_merge.merge.arrive import arrive as arrive
    from lora_merge.merge.methods.lego_options import LegoOptions as LegoOptions
    from lora_merge.merge.shards.join import join as join
    from lora_merge.merge.shards.shard import run_shard as run_shard
    from lora_merge.mixture.mixture import Mixture as Mixture
    from lora_merge.mixture.runtime.attach import load_mixture as load_mixture
    from lora_merge.mixture.training.data import Example as Example
    from lora_merge.mixture.training.settings import TrainSettings as TrainSettings

# Name → module; each is loaded when it is first asked for.
_PUBLIC = {
    "Adapter": "lora_merge.adapters.adapter",
    "AdapterError": "lora_merge.errors",
    "AdapterLike": "lora_merge.adapters.access.adapter_like",
    "AdaptersLike": "lora_merge.adapters.access.adapter_like",
    "AlignmentError": "lora_merge.errors",
    "ArgumentError": "lora_merge.errors",
    "Example": "lora_merge.mixture.training.data",
    "LegoOptions": "lora_merge.merge.methods.lego_options",
    "LoraMergeError": "lora_merge.errors",
    "LoraMergeWarning": "lora_merge.errors",
    "MadeAdapter": "lora_merge.adapters.in_memory",
    "MethodError": "lora_merge.errors",
    "Mixture": "lora_merge.mixture.mixture",
    "OutputError": "lora_merge.errors",
    "RankStack": "lora_merge.adapters.rank_stack",
    "SourceError": "lora_merge.errors",
    "TrainSettings": "lora_merge.mixture.training.settings",
    "append_experts": "lora_merge.api.mixing",
    "arrive": "lora_merge.merge.arrive",
    "check_kernels": "lora_merge.api.tuning",
    "check_library": "lora_merge.api.packing",
    "choose_ranks": "lora_merge.api.looking",
    "cluster": "lora_merge.api.merging",
    "collect_statistics": "lora_merge.adapters.measured.activations",
    "compare": "lora_merge.api.looking",
    "consolidate": "lora_merge.api.texts",
    "convert": "lora_merge.api.reshaping",
    "pack": "lora_merge.api.packing",
    "plan_compare": "lora_merge.api.looking",
    "plan_neighbours": "lora_merge.api.looking",
    "plan_convert": "lora_merge.api.reshaping",
    "describe": "lora_merge.api.texts",
    "draw": "lora_merge.api.pictures",
    "evaluate": "lora_merge.evaluation.evaluate",
    "export": "lora_merge.api.mixing",
    "extract": "lora_merge.api.reshaping",
    "plan_extract": "lora_merge.api.reshaping",
    "fresh_mixture": "lora_merge.api.mixing",
    "fuse": "lora_merge.api.reshaping",
    "plan_fuse": "lora_merge.api.reshaping",
    "group": "lora_merge.api.looking",
    "import_mixture": "lora_merge.api.mixing",
    "info": "lora_merge.api.looking",
    "join": "lora_merge.merge.shards.join",
    "judge": "lora_merge.api.looking",
    "load_mixture": "lora_merge.mixture.runtime.attach",
    "methods": "lora_merge.api.merging",
    "neighbours": "lora_merge.api.looking",
    "novelty": "lora_merge.api.texts",
    "open_adapter": "lora_merge.adapters.access.coerce",
    "open_adapters": "lora_merge.adapters.access.coerce",
    "report": "lora_merge.api.reporting",
    "resize": "lora_merge.api.reshaping",
    "plan_resize": "lora_merge.api.reshaping",
    "plan_merge": "lora_merge.merge.api",
    "plan_recipe": "lora_merge.merge.api",
    "run_recipe": "lora_merge.merge.api",
    "run_shard": "lora_merge.merge.shards.shard",
    "search": "lora_merge.evaluation.search",
    "soup": "lora_merge.evaluation.soup",
    "spectra": "lora_merge.api.looking",
    "spectra_beside_base": "lora_merge.api.looking",
    "sweep": "lora_merge.evaluation.sweep",
    "train": "lora_merge.api.mixing",
    "tune": "lora_merge.api.tuning",
    "usage": "lora_merge.api.texts",
    "write_csv": "lora_merge.api.pictures",
}
_MODULES = ("merge",)  # callable modules
__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterLike",
    "AdaptersLike",
    "AlignmentError",
    "ArgumentError",
    "Example",
    "LegoOptions",
    "LoraMergeError",
    "LoraMergeWarning",
    "MadeAdapter",
    "MethodError",
    "Mixture",
    "OutputError",
    "RankStack",
    "SourceError",
    "TrainSettings",
    "__version__",
    "append_experts",
    "arrive",
    "check_kernels",
    "check_library",
    "choose_ranks",
    "cluster",
    "collect_statistics",
    "compare",
    "consolidate",
    "convert",
    "describe",
    "draw",
    "evaluate",
    "export",
    "extract",
    "fresh_mixture",
    "fuse",
    "group",
    "import_mixture",
    "info",
    "join",
    "judge",
    "load_mixture",
    "merge",
    "methods",
    "neighbours",
    "novelty",
    "open_adapter",
    "open_adapters",
    "pack",
    "plan_compare",
    "plan_convert",
    "plan_extract",
    "plan_fuse",
    "plan_merge",
    "plan_neighbours",
    "plan_recipe",
    "plan_resize",
    "report",
    "resize",
    "run_recipe",
    "run_shard",
    "search",
    "soup",
    "spectra",
    "spectra_beside_base",
    "sweep",
    "train",
    "tune",
    "usage",
    "write_csv",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
