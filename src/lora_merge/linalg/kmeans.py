"""K-means on a Gram matrix: Lloyd's algorithm that never sees the vectors.

Every distance Lloyd needs is a combination of inner products, so R points of any dimension cost
O(R^2) per iteration once their Gram matrix is known. All restarts run as one batch. The steps are
those of scikit-learn's `KMeans` (Lloyd, greedy k-means++, relocation of empty clusters), which is
the oracle in the tests.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_merge.errors import MethodError

# Below this cosine a point has no sign relative to a centroid but that of rounding: it keeps its
# own. (The singular units of one adapter are orthogonal to each other.)
_ORTHOGONAL = 1e-9


@dataclass(frozen=True)
class KMeansResult:
    """A clustering of R points into k clusters.

    Attributes:
        labels: Cluster of each point, int64, shape (R,), values in 0..k-1.
        signs: +1 or -1 per point, float64, shape (R,): the sign with which a point joined its
            cluster. All +1 unless the clustering was sign-invariant.
        inertia: Sum of squared distances of the (signed) points to their centroid.
        iterations: Lloyd iterations until no label changed.
    """

    labels: Tensor
    signs: Tensor
    inertia: float
    iterations: int


def kmeans(
    gram: Tensor,
    num_clusters: int,
    *,
    rng: np.random.Generator,
    restarts: int = 10,
    max_iterations: int = 300,
    sign_invariant: bool = False,
    starts: Tensor | None = None,
) -> KMeansResult:
    """Cluster points that are known by their inner products.

    Args:
        gram: Inner products of the points, float64, shape (R, R); Lloyd's iterations run where it
            is, the starts are drawn on the CPU.
        num_clusters: k, between 1 and R.
        rng: Source of the k-means++ starts.
        restarts: Independent starts; the one with the least inertia wins.
        max_iterations: Bound on Lloyd iterations.
        sign_invariant: Treat x and -x as the same point: each point joins the nearest of +centroid
            and -centroid and is averaged with that sign.
        starts: Indices of the starting points, int64, shape (restarts, k), instead of k-means++.

    Raises:
        MethodError: If `num_clusters` is not between 1 and R.
    """
    size = gram.shape[0]
    if not 1 <= num_clusters <= size:
        raise MethodError(
            f"cannot make {num_clusters} clusters of {size} units",
            f"ask for a rank between 1 and {size}",
        )
    gram = gram.double()
    if starts is None:
        starts = _plus_plus(gram.cpu(), num_clusters, restarts, rng, sign_invariant)
    state = _Lloyd(gram, starts.to(gram.device), sign_invariant)
    iterations = 0
    while iterations < max_iterations and state.step():
        iterations += 1
    return state.best(iterations)


class _Lloyd:
    """All restarts of Lloyd's algorithm side by side; P = restarts, k clusters, R points."""

    def __init__(self, gram: Tensor, starts: Tensor, sign_invariant: bool) -> None:
        self.gram = gram
        self.sign_invariant = sign_invariant
        self.squares = gram.diagonal()
        # cross[p, c, j] = <centroid c of restart p, point j>; centre[p, c] = |centroid|^2
        self.cross = gram[starts]
        self.centre = self.squares[starts]
        self.labels = starts.new_full((starts.shape[0], gram.shape[0]), -1)
        self.signs = gram.new_ones(self.labels.shape)

    def step(self) -> bool:
        """Assign, then move the centroids. Returns whether any label changed."""
        reach = self.cross.abs() if self.sign_invariant else self.cross
        distance, labels = (self.centre[:, :, None] - 2 * reach).min(dim=1)  # less |point|^2
        if self.sign_invariant:
            chosen = self.cross.gather(1, labels[:, None]).squeeze(1)
            lengths = (self.squares * self.centre.gather(1, labels)).clamp_min(0).sqrt()
            signs = torch.where(chosen < -_ORTHOGONAL * lengths, -1.0, 1.0).double()
        else:
            signs = self.signs
        counts = self._fill_empty(labels, distance + self.squares)
        if torch.equal(labels, self.labels) and torch.equal(signs, self.signs):
            return False
        self.labels, self.signs = labels, signs
        members = torch.zeros_like(self.cross)
        members.scatter_(1, labels[:, None], signs[:, None])
        members /= counts[:, :, None]
        self.cross = members @ self.gram
        self.centre = (self.cross * members).sum(dim=2)
        return True

    def _fill_empty(self, labels: Tensor, distance: Tensor) -> Tensor:
        """Give each empty cluster the point farthest from its centroid; returns the counts."""
        counts = self.gram.new_zeros(labels.shape[0], self.cross.shape[1])
        counts.scatter_add_(1, labels, torch.ones_like(self.signs))  # whole numbers: exact
        for restart in (counts == 0).any(dim=1).nonzero().flatten().tolist():
            farthest = distance[restart].argsort(descending=True, stable=True).tolist()
            for cluster in (counts[restart] == 0).nonzero().flatten().tolist():
                point = next(j for j in farthest if counts[restart, labels[restart, j]] > 1)
                farthest.remove(point)
                counts[restart, labels[restart, point]] -= 1
                labels[restart, point] = cluster
                counts[restart, cluster] = 1
        return counts

    def best(self, iterations: int) -> KMeansResult:
        """The restart with the least inertia; the first of equals."""
        signed = self.signs * self.cross.gather(1, self.labels[:, None]).squeeze(1)
        own = self.centre.gather(1, self.labels)
        inertia = (self.squares - 2 * signed + own).clamp_min(0).sum(dim=1)
        winner = int(inertia.argmin())
        return KMeansResult(
            self.labels[winner], self.signs[winner], float(inertia[winner]), iterations
        )


def _plus_plus(
    gram: Tensor, k: int, restarts: int, rng: np.random.Generator, sign_invariant: bool
) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007; best of 2 + ln k trials, as scikit-learn).

    In numpy: these are many tiny operations, and torch hands over the interpreter lock at each,
    which stalls the other workers (measured: a third of the whole merge on two threads).

    Returns indices of the starting points, shape (restarts, k).
    """
    products = gram.numpy()
    size = products.shape[0]
    squares = products.diagonal()
    apart = np.abs(products) if sign_invariant else products.copy()
    apart *= -2  # in place from here: |x|^2 - 2 <x, y> + |y|^2
    apart += squares[:, None]
    apart += squares[None, :]
    np.maximum(apart, 0, out=apart)
    np.fill_diagonal(apart, 0)
    draws = rng.random((k, restarts, 2 + int(np.log(k))))
    starts = np.empty((restarts, k), dtype=np.int64)
    starts[:, 0] = draws[0, :, 0] * size
    nearest = apart[starts[:, 0]]  # (restarts, R): squared distance to the nearest start so far
    rows = np.arange(restarts)
    for step in range(1, k):
        cumulative = nearest.cumsum(axis=1)
        target = draws[step] * cumulative[:, -1:]
        candidate = (cumulative[:, None, :] <= target[:, :, None]).sum(axis=2)
        candidate = np.minimum(candidate, size - 1)  # a draw may round up to the total
        reduced = np.minimum(apart[candidate], nearest[:, None])  # (restarts, trials, R)
        choice = reduced.sum(axis=2).argmin(axis=1)
        starts[:, step] = candidate[rows, choice]
        nearest = reduced[rows, choice]
    return torch.from_numpy(starts)
