"""Metrics of spectra, to show and to sort by; apart, because `--help` needs no torch."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lora_merge.ranks.measures import Measures

Metric = Literal["frobenius", "spectral", "stable", "erank", "k95", "top1"]
# Metric → how to read it off a module's measures; shown in heat maps and used for sorting.
METRICS: dict[str, Callable[["Measures"], float]] = {
    "frobenius": lambda m: m.frobenius,
    "spectral": lambda m: m.spectral,
    "stable": lambda m: m.stable_rank,
    "erank": lambda m: m.effective_rank,
    "k95": lambda m: float(m.ranks_at[0.95]),
    "top1": lambda m: m.top1_share,
}
LOG_METRICS = ("frobenius", "spectral")
METRIC_LABELS = {
    "frobenius": "Frobenius norm of the delta",
    "spectral": "largest singular value",
    "stable": "stable rank",
    "erank": "effective rank (Roy-Vetterli)",
    "k95": "rank for 95 % of the energy",
    "top1": "energy share of the first direction",
}
