"""Small dense algebra on factors. Knows tensors, not adapters."""

from lora_merge.linalg.core import CoreSVD, core_svd
from lora_merge.linalg.factors import (
    gram,
    orthonormal_basis,
    singular_values,
    thin_qr,
    thin_svd,
)
from lora_merge.linalg.kmeans import KMeansResult, kmeans
from lora_merge.linalg.randomized import LeadingSVD, leading_svd

__all__ = [
    "CoreSVD",
    "KMeansResult",
    "LeadingSVD",
    "core_svd",
    "gram",
    "kmeans",
    "leading_svd",
    "orthonormal_basis",
    "singular_values",
    "thin_qr",
    "thin_svd",
]
