"""Small dense algebra on factors. Knows tensors, not adapters."""

from lora_merge.linalg.factors import (
    gram,
    orthonormal_basis,
    singular_values,
    thin_qr,
    thin_svd,
)
from lora_merge.linalg.kmeans import KMeansResult, kmeans

__all__ = [
    "KMeansResult",
    "gram",
    "kmeans",
    "orthonormal_basis",
    "singular_values",
    "thin_qr",
    "thin_svd",
]
