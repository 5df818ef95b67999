"""k-means: what it converges to, its seeds, its empty clusters, every library."""

from __future__ import annotations

import numpy as np
import pytest

from _arrays import to_numpy
from subquad import _kmeans


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def blobs(n=600, k=4, d=5, spread=0.05, seed=0, dtype=np.float64):
    """Rows around k well separated centres, and which centre each is of."""
    rng = generator(seed)
    centers = 4 * np.eye(k, d) - 2
    labels = rng.integers(0, k, n)
    rows = centers[labels] + spread * rng.normal(size=(n, d))
    return rows.astype(dtype), labels


def distances(rows, centroids):
    rows, centroids = np.asarray(rows, float), np.asarray(centroids, float)
    return ((rows[:, None, :] - centroids) ** 2).sum(-1)


def same_partition(a, b) -> bool:
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


@pytest.mark.parametrize("metric", ["euclidean", "spherical"])
@pytest.mark.parametrize("seed", range(3))
def test_finds_separated_clusters(metric, seed):
    rows, labels = blobs()
    if metric == "spherical":
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    centroids = _kmeans.train_centroids(
        rows, 4, metric=metric, generator=generator(seed)
    )
    found = _kmeans.assign(rows, centroids, metric=metric)
    assert same_partition(found, labels)
    if metric == "spherical":
        np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-12)


def test_centroids_are_the_means_of_their_rows():
    rows = generator().normal(size=(400, 3))
    centroids = _kmeans.train_centroids(rows, 5, max_iter=500, generator=generator())
    labels = _kmeans.assign(rows, centroids)
    means = np.stack([rows[labels == a].mean(axis=0) for a in range(5)])
    np.testing.assert_allclose(centroids, means, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0, 1e3])
def test_assignment_is_to_the_nearest(dtype, offset):
    rng = generator()
    rows = (rng.normal(size=(500, 6)) + offset).astype(dtype)
    centroids = rng.normal(size=(7, 6)) + offset
    labels = _kmeans.assign(rows, centroids)
    squares = distances(rows, centroids)
    chosen = squares[np.arange(500), labels]
    # The scores are products of rows, as large as the offset, with differences of
    # centroids: each of the d products rounds once.
    eps = float(np.finfo(dtype).eps)
    apart = np.linalg.norm(centroids - centroids.mean(axis=0), axis=1).max()
    slack = 4 * (6 + 2) * eps * (np.linalg.norm(rows, axis=1).max() * apart + apart**2)
    assert labels.dtype == np.int64
    assert np.all(chosen <= squares.min(axis=1) + slack)


def test_far_from_the_origin():
    rows, labels = blobs(dtype=np.float32)
    centroids = _kmeans.train_centroids(
        rows + np.float32(1e4), 4, generator=generator()
    )
    found = _kmeans.assign(rows + np.float32(1e4), centroids)
    assert same_partition(found, labels)


def test_more_clusters_lose_less():
    rows = generator().normal(size=(500, 4))
    losses = []
    for k in (1, 2, 4, 8, 16, 64):
        centroids = _kmeans.train_centroids(rows, k, generator=generator())
        losses.append(distances(rows, centroids).min(axis=1).mean())
    assert np.all(np.diff(losses) < 0)


def test_restarts_are_no_worse():
    rows = generator().normal(size=(500, 4))

    def loss(n_init):
        centroids = _kmeans.train_centroids(
            rows, 8, n_init=n_init, generator=generator()
        )
        return distances(rows, centroids).min(axis=1).mean()

    # The first run of both starts from the same seeds.
    assert loss(6) <= loss(1)


def test_loss_never_rises_with_iterations():
    rows = generator().normal(size=(500, 4))
    losses = []
    for max_iter in range(1, 12):
        centroids = _kmeans.train_centroids(
            rows, 8, n_init=1, max_iter=max_iter, generator=generator()
        )
        losses.append(distances(rows, centroids).min(axis=1).mean())
    assert np.all(np.diff(losses) <= 1e-14)


def test_weights_are_repetitions():
    rng = generator()
    rows, _ = blobs(n=60, k=3, spread=0.5)
    weights = rng.integers(1, 4, 60)
    weighted = _kmeans.train_centroids(
        rows, 3, weights=weights.astype(float), generator=generator(1)
    )
    repeated = _kmeans.train_centroids(
        np.repeat(rows, weights, axis=0), 3, generator=generator(1)
    )
    order = np.lexsort(np.round(weighted, 6).T), np.lexsort(np.round(repeated, 6).T)
    np.testing.assert_allclose(weighted[order[0]], repeated[order[1]], atol=1e-12)


@pytest.mark.parametrize("metric", ["euclidean", "spherical"])
def test_repeated_rows_leave_clusters_empty(metric):
    rows = np.repeat(np.eye(2, 3), 10, axis=0)
    centroids = _kmeans.train_centroids(rows, 5, metric=metric, generator=generator())
    assert np.all(np.isfinite(centroids))
    labels = _kmeans.assign(rows, centroids, metric=metric)
    assert len(np.unique(labels)) == 2
    assert labels[0] != labels[-1]


def test_as_many_clusters_as_rows():
    rows = generator().normal(size=(12, 3))
    centroids = _kmeans.train_centroids(rows, 12, generator=generator())
    labels = _kmeans.assign(rows, centroids)
    assert sorted(labels) == list(range(12))


def test_empty_clusters_take_the_farthest_rows(monkeypatch):
    rows = np.concatenate([np.zeros((50, 2)), [[9.0, 0.0]], [[0.0, 7.0]]])

    def bad_seeds(rows, n_clusters, weights, metric, generator):
        # All seeds at one place: every cluster but one is empty.
        return np.zeros((n_clusters, 2))

    monkeypatch.setattr(_kmeans, "_seed", bad_seeds)
    centroids = _kmeans.train_centroids(rows, 3, generator=generator())
    assert sorted(map(tuple, np.round(centroids, 12) + 0.0)) == [
        (0.0, 0.0),
        (0.0, 7.0),
        (9.0, 0.0),
    ]


def test_many_clusters():
    rows = generator().normal(size=(2000, 3))
    centroids = _kmeans.train_centroids(rows, 300, max_iter=5, generator=generator())
    assert centroids.shape == (300, 3)
    assert len(np.unique(_kmeans.assign(rows, centroids))) > 290


@pytest.mark.parametrize("n, k, size", [(10, 1, 10), (300, 1, 256), (5000, 3, 768)])
def test_sample_of_rows(n, k, size):
    chosen = _kmeans.sample_rows(n, k, generator())
    assert chosen.dtype == np.int64
    assert len(chosen) == size == len(np.unique(chosen))
    assert np.all(np.diff(chosen) > 0)
    assert chosen[0] >= 0
    assert chosen[-1] < n
    np.testing.assert_array_equal(chosen, _kmeans.sample_rows(n, k, generator()))


@pytest.mark.skip_xp_backend("dask", reason="training rows are computed before")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_clusters_on_every_library(xp, dtype):
    rows, _ = blobs(dtype=dtype, spread=0.3)
    weights = generator(5).random(len(rows)).astype(dtype) + 0.5
    expected = _kmeans.train_centroids(rows, 4, weights=weights, generator=generator())
    found = _kmeans.train_centroids(
        xp.asarray(rows), 4, weights=xp.asarray(weights), generator=generator()
    )
    assert type(found) is np.ndarray
    assert found.dtype == np.float64
    bound = 1e-4 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
    labels = _kmeans.assign(xp.asarray(rows), expected)
    assert isinstance(labels, xp.array_type())
    np.testing.assert_array_equal(to_numpy(labels), _kmeans.assign(rows, expected))


def test_inputs_are_left_alone():
    rows = generator().normal(size=(100, 3))
    before = rows.copy()
    _kmeans.train_centroids(rows, 3, generator=generator())
    np.testing.assert_array_equal(rows, before)
