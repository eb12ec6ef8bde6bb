"""Small dense algebra on factors. Knows tensors, not adapters."""

from lora_merge.linalg.core import CoreSVD, core_svd
from lora_merge.linalg.factors import (
    frobenius,
    gram,
    orthonormal_basis,
    pivot_sign,
    singular_values,
    thin_qr,
    thin_svd,
)
from lora_merge.linalg.kmeans import KMeansResult, kmeans
from lora_merge.linalg.range_finder import LeadingSVD, leading_svd, leading_svd_in_bands

__all__ = [
    "CoreSVD",
    "KMeansResult",
    "LeadingSVD",
    "core_svd",
    "frobenius",
    "gram",
    "kmeans",
    "leading_svd",
    "leading_svd_in_bands",
    "orthonormal_basis",
    "pivot_sign",
    "singular_values",
    "thin_qr",
    "thin_svd",
]
