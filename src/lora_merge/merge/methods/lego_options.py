"""The variants of LoRA-LEGO; apart from it, because `lora-merge cluster --help` needs no torch."""

from dataclasses import dataclass
from typing import Literal

from lora_merge.options import option


@dataclass(frozen=True)
class LegoOptions:
    """The published procedure by default; every variant and gauge fix by name."""

    # Centroids always average the raw units.
    units: Literal["raw", "normalized"] = option(
        "raw", "cluster units as they are, or with each half at length one"
    )
    reweight_parameters: bool = option(
        True, "restore each centroid's largest entry to its members' mean (against norm decay)"
    )
    reweight_output: Literal["none", "single", "sum"] = option(
        "single", "scale by sqrt(mean rank / k) (as one adapter) or sqrt(R / k) (as their sum)"
    )
    # Otherwise units are clustered as stored, and a centroid's scale is its members' mean.
    fold_scale: bool = option(False, "put sqrt(|scale|) into both halves before clustering")
    balance: bool = option(False, "bring units to |a| = |b| first; (c a, b / c) is the same unit")
    sign_invariant: bool = option(False, "let (-a, -b), the same unit, join with its sign flipped")
    # Removes the remaining freedom A -> G A, B -> B G^-1.
    canonical: bool = option(False, "cluster each adapter's singular units instead")
    centroid: Literal["mean", "rank-one"] = option(
        "mean",
        "mean of the halves, or best rank-one matrix (implies fold_scale and balance)",
    )
    restarts: int = option(10, "k-means++ starts", low=1)
