"""k-means on the primitives: seeded, restarted, trained on a sample of the rows."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _dispatch
from ._host import from_host, to_host

Array: TypeAlias = Any
Metric: TypeAlias = Literal["euclidean", "spherical"]
Float64: TypeAlias = npt.NDArray[np.float64]

# Sampling more rows than this for each cluster moves the centroids less than another
# seed does.
_ROWS_PER_CLUSTER = 256
# Above this many clusters seeding by distances would cost more than all iterations
# together.
_MOST_CLUSTERS_SEEDED_BY_DISTANCE = 256
_RESTARTS = 4
_TRIAL_ITERATIONS = 5
_MOST_CLUSTERS_RESTARTED = 64


def sample_rows(
    n_rows: int, n_clusters: int, generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return the indices of the rows that train centroids, at most 256 for each.

    Parameters
    ----------
    n_rows : int
    n_clusters : int
    generator : numpy.random.Generator

    Returns
    -------
    ndarray of int64, shape (min(n_rows, 256 * n_clusters),)
    """
    size = _ROWS_PER_CLUSTER * n_clusters
    if size >= n_rows:
        return np.arange(n_rows, dtype=np.int64)
    chosen = generator.choice(n_rows, size, replace=False, shuffle=False)
    return np.sort(chosen.astype(np.int64))


def train_centroids(
    rows: Array,
    n_clusters: int,
    /,
    *,
    weights: Array | None = None,
    metric: Metric = "euclidean",
    max_iter: int = 25,
    n_init: int | None = None,
    start: Float64 | None = None,
    generator: np.random.Generator,
) -> Float64:
    """Return the centroids of the best of several k-means runs on the given rows.

    Runs start from greedy k-means++ seeds; after five iterations the best goes on until
    no label changes. A cluster that loses its last row takes the row farthest from its
    centroid; where rows repeat and too few distinct ones are left, it keeps the
    centroid it had.

    Parameters
    ----------
    rows : array of float32 or float64, shape (n, d)
        Rows to train on, n >= 1; of any library but Dask.
    n_clusters : int
    weights : array of shape (n,), optional
        Positive weights of the rows.
    metric : {"euclidean", "spherical"}
        "spherical" compares directions: centroids have unit norm, and rows are taken as
        they are.
    max_iter : int
        Most iterations of a run.
    n_init : int, optional
        Number of runs. By default 4, or 1 for more than 64 clusters.
    start : ndarray of float64, shape (n_clusters, d), optional
        Centroids that a single run starts from, in place of seeds.
    generator : numpy.random.Generator
        Source of the seeds, used in an order that does not depend on the library of the
        rows.

    Returns
    -------
    ndarray of float64, shape (n_clusters, d)

    Notes
    -----
    Each iteration costs O(n d n_clusters) time and O(n) memory.
    """
    xp = _dispatch.namespace_of(rows)
    if metric == "euclidean":
        # Distances far from the origin would drown in the rounding of the norms.
        origin = to_host(xp.mean(rows, axis=0))
        rows = rows - from_host(origin, rows, rows.dtype)[None, :]
        norms = to_host(xp.sum(rows * rows, axis=1)).astype(np.float64)
    else:
        origin = np.zeros(rows.shape[1])
        norms = np.ones(rows.shape[0])
    host_weights = None if weights is None else to_host(weights).astype(np.float64)
    if start is not None:
        moved, _ = _run(
            rows, start - origin, weights, host_weights, norms, metric, max_iter
        )
        return moved + origin.astype(np.float64)
    if n_init is None:
        n_init = _RESTARTS if n_clusters <= _MOST_CLUSTERS_RESTARTED else 1
    # Runs that start badly stay behind: a few iterations tell which to go on with.
    trial_iter = max_iter if n_init == 1 else min(max_iter, _TRIAL_ITERATIONS)
    best_loss = math.inf
    best: Float64 | None = None
    for _ in range(n_init if n_clusters > 1 else 1):
        centroids = _seed(rows, n_clusters, host_weights, metric, generator)
        centroids, loss = _run(
            rows, centroids, weights, host_weights, norms, metric, trial_iter
        )
        if best is None or loss < best_loss:
            best, best_loss = centroids, loss
    assert best is not None
    if trial_iter < max_iter:
        best, _ = _run(
            rows,
            best,
            weights,
            host_weights,
            norms,
            metric,
            max_iter - trial_iter,
        )
    return best + origin.astype(np.float64)


def assign(
    rows: Array, centroids: Float64, /, *, metric: Metric = "euclidean"
) -> Array:
    """Return the nearest centroid of every row, the first of several.

    Parameters
    ----------
    rows : array of float32 or float64, shape (n, d)
    centroids : ndarray of float64, shape (n_clusters, d)
    metric : {"euclidean", "spherical"}

    Returns
    -------
    array of int64, shape (n,)
        In the library of the rows.
    """
    scaled, offsets = _scores(centroids, metric)
    backend = _dispatch.backend_for(rows=rows)
    labels, _ = backend.nearest_centroids(
        rows,
        from_host(scaled, rows, rows.dtype),
        from_host(offsets, rows, rows.dtype),
    )
    return labels


def _scores(centroids: Float64, metric: Metric) -> tuple[Float64, Float64]:
    """Return C and o such that the nearest centroid of x is argmax_c x.C_c + o_c."""
    if metric == "spherical":
        return centroids, np.zeros(len(centroids))
    # |x - g - e|^2 with the common part g taken out of the products: what is left of
    # them is as small as the distances.
    origin = np.mean(centroids, axis=0)
    apart = centroids - origin
    return apart, -(apart @ origin) - 0.5 * np.sum(apart * apart, axis=1)


def _run(
    rows: Array,
    centroids: Float64,
    weights: Array | None,
    host_weights: Float64 | None,
    norms: Float64,
    metric: Metric,
    max_iter: int,
) -> tuple[Float64, float]:
    backend = _dispatch.backend_for(rows=rows)
    n_clusters = len(centroids)
    previous: npt.NDArray[Any] | None = None
    for iteration in range(max_iter + 1):
        offsets = (
            -0.5 * np.sum(centroids * centroids, axis=1)
            if metric == "euclidean"
            else np.zeros(n_clusters)
        )
        labels, scores = backend.nearest_centroids(
            rows,
            from_host(centroids, rows, rows.dtype),
            from_host(offsets, rows, rows.dtype),
        )
        host_labels = to_host(labels)
        settled = previous is not None and np.array_equal(host_labels, previous)
        if settled or iteration == max_iter:
            break
        previous = host_labels
        counts, sums = backend.component_sums(rows, labels, weights, n_clusters)
        counts = to_host(counts).astype(np.float64)
        occupied = counts > 0
        moved = np.where(
            occupied[:, None],
            to_host(sums) / np.where(occupied, counts, 1.0)[:, None],
            centroids,
        )
        if metric == "spherical":
            moved = _directions(moved, centroids)
        if not np.all(occupied):
            _repair(rows, moved, occupied, norms, to_host(scores), metric)
        centroids = moved
    host_scores = to_host(scores).astype(np.float64)
    losses = norms - (2.0 * host_scores if metric == "euclidean" else host_scores)
    return centroids, float(np.average(losses, weights=host_weights))


def _directions(vectors: Float64, otherwise: Float64) -> Float64:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    whole = lengths > 0
    return np.where(whole, vectors / np.where(whole, lengths, 1.0), otherwise)


def _repair(
    rows: Array,
    centroids: Float64,
    occupied: npt.NDArray[np.bool_],
    norms: Float64,
    scores: npt.NDArray[Any],
    metric: Metric,
) -> None:
    """Move the centroids of empty clusters to the rows farthest from their own."""
    distances = norms - (2.0 if metric == "euclidean" else 1.0) * scores
    empty = np.flatnonzero(~occupied)
    # A stable sort, so that equally far rows are taken in their order on every machine.
    farthest = np.argsort(-distances, kind="stable")[: len(empty)]
    farthest = farthest[distances[farthest] > 0]
    chosen = _take(rows, farthest)
    if metric == "spherical":
        chosen = _directions(chosen, centroids[empty[: len(farthest)]])
    centroids[empty[: len(farthest)]] = chosen


def _take(rows: Array, indices: npt.NDArray[np.int64]) -> Float64:
    xp = _dispatch.namespace_of(rows)
    taken = xp.take(rows, from_host(indices, rows), axis=0)
    return to_host(taken).astype(np.float64)


def _seed(
    rows: Array,
    n_clusters: int,
    weights: Float64 | None,
    metric: Metric,
    generator: np.random.Generator,
) -> Float64:
    """Return rows as first centroids.

    Greedy k-means++ on a sample of the rows, or rows drawn at random where clusters are
    many.
    """
    n_rows = rows.shape[0]
    if n_clusters > _MOST_CLUSTERS_SEEDED_BY_DISTANCE:
        drawn = generator.choice(
            n_rows, n_clusters, replace=n_rows < n_clusters, shuffle=False
        )
        return _unit(_take(rows, drawn.astype(np.int64)), metric)
    size = min(n_rows, max(2048, 16 * n_clusters))
    indices = np.sort(
        generator.choice(n_rows, size, replace=False, shuffle=False)
    ).astype(np.int64)
    points = _unit(_take(rows, indices), metric)
    mass = np.ones(size) if weights is None else weights[indices]
    norms = np.sum(points * points, axis=1)
    n_trials = 2 + int(math.log(n_clusters))

    def distances(candidates: npt.NDArray[Any]) -> Float64:
        products = points[candidates] @ points.T
        apart = norms[candidates, None] + norms[None, :] - 2.0 * products
        distance: Float64 = np.maximum(apart, 0.0)
        return distance

    first = _draw(mass, 1, generator)
    chosen = [int(first[0])]
    nearest = distances(first)[0]
    while len(chosen) < n_clusters:
        candidates = _draw(mass * nearest, n_trials, generator)
        remaining = np.minimum(nearest, distances(candidates))
        best = int(np.argmin(remaining @ mass))
        chosen.append(int(candidates[best]))
        nearest = remaining[best]
    return points[chosen]


def _unit(points: Float64, metric: Metric) -> Float64:
    return _directions(points, points) if metric == "spherical" else points


def _draw(
    mass: Float64, size: int, generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw indices in proportion to the mass, or evenly where there is none."""
    total = np.cumsum(mass)
    uniform = generator.random(size)
    if not total[-1] > 0:
        return (uniform * len(mass)).astype(np.int64)
    drawn = np.searchsorted(total, uniform * total[-1], side="right")
    indices: npt.NDArray[np.int64] = np.minimum(drawn, len(mass) - 1).astype(np.int64)
    return indices
