"""Cluster, merge, gate and analyse LoRA adapters, rank by rank.

Names are resolved on first use (PEP 562), so that `lora-merge --help` never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_merge._version import __version__

if TYPE_CHECKING:
    from lora_merge.adapters.adapter import Adapter as Adapter
    from lora_merge.adapters.measured.activations import collect_statistics as collect_statistics
    from lora_merge.adapters.measured.spectra import adapter_spectra as adapter_spectra
    from lora_merge.adapters.rank_stack import RankStack as RankStack
    from lora_merge.analysis.compare import compare as compare
    from lora_merge.errors import LoraMergeError as LoraMergeError
    from lora_merge.evaluation.evaluate import evaluate as evaluate
    from lora_merge.merge.api import merge as merge
    from lora_merge.merge.api import run_recipe as run_recipe
    from lora_merge.mixture.mixture import Mixture as Mixture
    from lora_merge.mixture.runtime.attach import load_mixture as load_mixture
    from lora_merge.mixture.training.train import train_gate as train_gate
    from lora_merge.ranks.choose import choose_ranks as choose_ranks

_PUBLIC = {
    "Adapter": "lora_merge.adapters.adapter",
    "LoraMergeError": "lora_merge.errors",
    "Mixture": "lora_merge.mixture.mixture",
    "RankStack": "lora_merge.adapters.rank_stack",
    "adapter_spectra": "lora_merge.adapters.measured.spectra",
    "choose_ranks": "lora_merge.ranks.choose",
    "collect_statistics": "lora_merge.adapters.measured.activations",
    "compare": "lora_merge.analysis.compare",
    "run_recipe": "lora_merge.merge.api",
    "evaluate": "lora_merge.evaluation.evaluate",
    "load_mixture": "lora_merge.mixture.runtime.attach",
    "train_gate": "lora_merge.mixture.training.train",
}
_MODULES = ("merge",)  # callable modules

__all__ = [
    "Adapter",
    "LoraMergeError",
    "Mixture",
    "RankStack",
    "__version__",
    "adapter_spectra",
    "choose_ranks",
    "collect_statistics",
    "compare",
    "evaluate",
    "load_mixture",
    "merge",
    "run_recipe",
    "train_gate",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
