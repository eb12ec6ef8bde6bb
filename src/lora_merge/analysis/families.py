"""Group adapters by the cosine of their deltas, which no change of factors can alter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lora_merge.errors import MethodError

Algorithm = Literal["agglomerative", "spectral"]

# Above this cosine adapters have something in common; unrelated ones have less in any real model.
RELATED = 0.2


@dataclass(frozen=True)
class Tree:
    """Average-linkage tree of N adapters over the distance 1 - cosine.

    Attributes:
        merges: N - 1 pairs of nodes; node N + k is made by merge k.
        heights: Distance at which each pair is joined.
        order: Leaves in the order in which branches do not cross.
    """

    merges: tuple[tuple[int, int], ...]
    heights: tuple[float, ...]
    order: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "merges": [list(pair) for pair in self.merges],
            "heights": list(self.heights),
            "order": list(self.order),
        }


def tree_of(cosine: Tensor) -> Tree:
    """Join the two closest groups until one is left (average linkage).

    Args:
        cosine: Similarities, shape (N, N).
    """
    # scikit-learn's linkage is this function; importing it alone takes a quarter of the time.
    from scipy.cluster.hierarchy import linkage

    distances = _distances(cosine)
    joined = linkage(distances[np.triu_indices(len(cosine), 1)], method="average")
    merges = tuple((int(a), int(b)) for a, b, _, _ in joined)
    heights = tuple(float(height) for _, _, height, _ in joined)
    return Tree(merges, heights, tuple(_leaves(merges, len(cosine))))


def cluster_adapters(
    cosine: Tensor, groups: int | None = None, *, algorithm: Algorithm = "agglomerative"
) -> list[int]:
    """Group number of every adapter, numbered in the adapters' order.

    Args:
        cosine: Similarities, shape (N, N).
        groups: How many; default: the number with the best silhouette, but no group whose members
            are unrelated: adapters that resemble none are groups of their own.
        algorithm: Average linkage over 1 - cosine, or spectral clustering of the positive cosines.

    Raises:
        MethodError: If there are not so many adapters.
    """
    count = len(cosine)
    if groups is not None and not 1 <= groups <= count:
        raise MethodError(f"{groups} groups of {count} adapters", f"give 1 to {count}")
    if groups is None:
        found = _related(cosine, _fit(cosine, _best_count(cosine, algorithm), algorithm))
    else:
        found = list(_fit(cosine, groups, algorithm))
    first: dict[int, int] = {}
    return [first.setdefault(label, len(first)) for label in found]


def _fit(cosine: Tensor, groups: int, algorithm: Algorithm) -> Sequence[int]:
    from sklearn.cluster import AgglomerativeClustering, SpectralClustering

    count = len(cosine)
    if groups in (1, count):
        return [0] * count if groups == 1 else list(range(count))
    if algorithm == "spectral":
        affinity = np.clip(cosine.numpy(), 1e-6, 1.0)
        model = SpectralClustering(groups, affinity="precomputed", random_state=0)
        return [int(x) for x in model.fit_predict(affinity)]
    model = AgglomerativeClustering(groups, metric="precomputed", linkage="average")
    return [int(x) for x in model.fit_predict(_distances(cosine))]


def _best_count(cosine: Tensor, algorithm: Algorithm) -> int:
    from sklearn.metrics import silhouette_score

    count, distances = len(cosine), _distances(cosine)
    best, chosen = 0.1, 1
    for groups in range(2, min(count, 12)):
        labels = _fit(cosine, groups, algorithm)
        if len(set(labels)) < 2:
            continue
        score = float(silhouette_score(distances, labels, metric="precomputed"))
        if score > best + 1e-9:
            best, chosen = score, groups
    return chosen


def _related(cosine: Tensor, labels: Sequence[int]) -> list[int]:
    """The groups, each taken apart where its members are not alike on average."""
    from scipy.cluster.hierarchy import fcluster, linkage

    found, parts = list(labels), 0
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        inside = [1]
        if len(members) > 1:
            distances = _distances(cosine[members][:, members])
            joined = linkage(distances[np.triu_indices(len(members), 1)], method="average")
            inside = fcluster(joined, 1 - RELATED, criterion="distance").tolist()
        for member, part in zip(members, inside, strict=True):
            found[member] = parts + int(part)
        parts += max(inside)
    return found


def _distances(cosine: Tensor) -> NDArray[np.float64]:
    distances: NDArray[np.float64] = np.clip(1 - cosine.numpy(), 0, 2)
    np.fill_diagonal(distances, 0)
    return (distances + distances.T) / 2


def _leaves(merges: Sequence[tuple[int, int]], count: int) -> list[int]:
    members = {leaf: [leaf] for leaf in range(count)}
    for index, (a, b) in enumerate(merges):
        members[count + index] = members.pop(a) + members.pop(b)
    return next(iter(members.values()))
