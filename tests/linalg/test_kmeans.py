"""K-means on Grams against scikit-learn's KMeans on the vectors."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from lora_merge.errors import MethodError
from lora_merge.linalg.kmeans import kmeans


def points(count: int, width: int, seed: int, clumps: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, width))
    if clumps:
        x = 0.3 * x + 3 * rng.normal(size=(clumps, width))[rng.integers(clumps, size=count)]
    return x


def of(x: np.ndarray, k: int, *, seed: int = 0, **options: object):  # type: ignore[no-untyped-def]
    gram = torch.from_numpy(x @ x.T)
    return kmeans(gram, k, rng=np.random.default_rng(seed), **options)


@given(
    count=st.integers(2, 60),
    width=st.integers(1, 90),
    k=st.integers(1, 12),
    clumps=st.sampled_from([0, 3, 5]),
    seed=st.integers(0, 99),
)
def test_same_starts_give_scikit_learns_inertia(
    count: int, width: int, k: int, clumps: int, seed: int
) -> None:
    k = min(k, count)
    x = points(count, width, seed, clumps)
    starts = np.random.default_rng(seed + 1).choice(count, size=(1, k), replace=False)
    theirs = KMeans(k, init=x[starts[0]], n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(x)
    ours = of(x, k, starts=torch.from_numpy(starts))
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-6, abs=1e-9)


@given(seed=st.integers(0, 30), k=st.integers(2, 6))
def test_restarts_are_as_good_as_scikit_learns(seed: int, k: int) -> None:
    x = points(50, 20, seed, clumps=k)
    theirs = KMeans(k, n_init=10, random_state=seed).fit(x).inertia_
    assert of(x, k, seed=seed).inertia <= 1.02 * theirs


@given(count=st.integers(1, 30), k=st.integers(1, 30), seed=st.integers(0, 30))
def test_inertia_is_that_of_the_labels_and_no_cluster_is_empty(
    count: int, k: int, seed: int
) -> None:
    k = min(k, count)
    x = points(count, 7, seed)
    found = of(x, k, seed=seed)
    labels = found.labels.numpy()
    assert set(labels) == set(range(k))
    spread = sum(((x[labels == c] - x[labels == c].mean(0)) ** 2).sum() for c in range(k))
    assert found.inertia == pytest.approx(spread, rel=1e-9, abs=1e-9)


@given(seed=st.integers(0, 20))
def test_the_best_of_all_starts_is_the_global_optimum(seed: int) -> None:
    x = points(7, 3, seed)

    def spread(labels: tuple[int, ...]) -> float:
        at = np.array(labels)
        return sum(((x[at == c] - x[at == c].mean(0)) ** 2).sum() for c in set(labels))

    best = min(spread(labels) for labels in itertools.product(range(2), repeat=7))
    starts = torch.tensor(list(itertools.combinations(range(7), 2)))
    assert of(x, 2, starts=starts).inertia == pytest.approx(best)


@given(seed=st.integers(0, 20), k=st.integers(1, 5))
def test_sign_invariant_clusters_do_not_see_signs(seed: int, k: int) -> None:
    x = points(20, 6, seed, clumps=3)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=20)
    plain = of(x, k, seed=seed, sign_invariant=True)
    flipped = of(x * signs[:, None], k, seed=seed, sign_invariant=True)
    assert flipped.inertia == pytest.approx(plain.inertia, rel=1e-9)
    assert torch.equal(plain.labels, flipped.labels)


def test_a_vector_and_its_negative_are_one_point() -> None:
    x = np.array([[1.0, 2.0], [-1.0, -2.0], [5.0, -1.0]])
    found = of(x, 2, sign_invariant=True)
    assert found.labels[0] == found.labels[1] != found.labels[2]
    assert found.inertia == pytest.approx(0)


def test_duplicates_and_zeros_leave_no_cluster_empty() -> None:
    found = of(np.vstack([np.zeros((3, 4)), np.ones((3, 4))]), 4)
    assert set(found.labels.tolist()) == {0, 1, 2, 3}
    assert found.inertia == pytest.approx(0)


@pytest.mark.parametrize("k", [0, 4])
def test_impossible_numbers_of_clusters_are_refused(k: int) -> None:
    with pytest.raises(MethodError, match="3 units"):
        of(points(3, 2, 0), k)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sign_invariant", [False, True])
def test_a_gpu_finds_the_same_clusters(sign_invariant: bool) -> None:
    x = points(200, 30, 3, clumps=6)
    ours = of(x, 6, sign_invariant=sign_invariant)
    gram = torch.from_numpy(x @ x.T).cuda()
    theirs = kmeans(gram, 6, rng=np.random.default_rng(0), sign_invariant=sign_invariant)
    assert theirs.labels.is_cuda
    assert torch.equal(theirs.labels.cpu(), ours.labels)
    assert torch.equal(theirs.signs.cpu(), ours.signs)
    assert theirs.inertia == pytest.approx(ours.inertia)
