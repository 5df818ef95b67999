"""Compiled primitives against the reference, at sizes that cross the kernels' blocks.

Blocks: 128 rows of a scatter, 2048 rows of a component's part, 4096 of a sum's, 1024 of
an assignment, 480 keys, 96 keys of the reverse, 48 samples; 12 (6) rows and up to 32
columns of a tile.
"""

import numpy as np
import pytest

from subquad._backends import compiled
from subquad._reference import normalizers as reference

# Relative to the size of the sums: sqrt(length) roundings of each type, with room.
TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}
DTYPES = [np.float32, np.float64]


def wide(array):
    return None if array is None else array.astype(np.float64)


def assert_close(found, expected, dtype):
    scale = np.max(np.abs(expected), initial=1e-300)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(1, 1, 1), (7, 3, 5), (9000, 1, 33), (20000, 4, 13), (300, 2, 130)],
)
def test_component_statistics(n, k, d, weighted, dtype):
    rng = np.random.default_rng(0)
    y = (rng.standard_normal((n, d)) + 3).astype(dtype)
    labels = rng.integers(0, k, n)
    weights = None
    if weighted:
        weights = rng.random(n).astype(dtype)
        weights[::5] = 0
    counts, sums = compiled.component_sums(y, labels, weights, k)
    expected = reference.component_sums(wide(y), labels, wide(weights), k)
    np.testing.assert_allclose(counts, expected[0], rtol=1e-12)
    np.testing.assert_allclose(sums, expected[1], rtol=1e-11)
    means = sums / np.where(counts > 0, counts, 1.0)[:, None]
    for diagonal in (False, True):
        found = compiled.component_scatter(y, labels, weights, means, diagonal)
        expected = reference.component_scatter(
            wide(y), labels, wide(weights), means, diagonal
        )
        assert_close(found[0], expected[0], dtype)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 3), (2500, 300, 20), (40, 4000, 50)])
def test_nearest_centroids(n, k, d, dtype):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, d)).astype(dtype)
    centroids = rng.standard_normal((k, d)).astype(dtype)
    offsets = rng.standard_normal(k).astype(dtype)
    labels, score = compiled.nearest_centroids(x, centroids, offsets)
    truth = wide(x) @ wide(centroids).T + offsets
    assert_close(score, truth.max(axis=1), dtype)
    assert_close(truth[np.arange(n), labels], truth.max(axis=1), dtype)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_radius_is_nan_where_a_row_is(diagonal):
    # Rows after the one of NaN, in its own part of the component and in later ones.
    y = np.ones((5000, 3))
    y[7] = np.nan
    labels, means = np.zeros(5000, np.int64), np.zeros((2, 3))
    _, radii = compiled.component_scatter(y, labels, None, means, diagonal)
    np.testing.assert_array_equal(radii, [np.nan, 0])


def test_the_lowest_index_wins_ties():
    x = np.ones((40, 3))
    labels, _ = compiled.nearest_centroids(x, np.ones((30, 3)), np.zeros(30))
    np.testing.assert_array_equal(labels, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_diagonal", [False, True])
@pytest.mark.parametrize(
    ("batch", "n", "k", "d", "r"),
    [((), 5000, 3, 17, 17), ((2,), 700, 13, 40, 5), ((), 40, 2, 300, 20)],
)
def test_gaussian_reverse(batch, n, k, d, r, with_diagonal, dtype):
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((*batch, n, d)) / d**0.5).astype(dtype)
    log_counts = rng.standard_normal((*batch, k)).astype(dtype)
    means = rng.standard_normal((*batch, k, d)).astype(dtype)
    factors = (rng.standard_normal((*batch, k, d, r)) / d**0.5).astype(dtype)
    diagonal = rng.random((*batch, k, d)).astype(dtype) if with_diagonal else None
    grad = rng.standard_normal((*batch, n)).astype(dtype)
    arrays = (x, log_counts, means, factors, diagonal)
    log_z = reference.gaussian_log_normalizer(*map(wide, arrays), None)
    needs = (True, True, True, True, with_diagonal)
    found = compiled.gaussian_log_normalizer_vjp(
        grad, *arrays, log_z.astype(dtype), needs
    )
    expected = reference.gaussian_log_normalizer_vjp(
        wide(grad), *map(wide, arrays), log_z, needs
    )
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("scale_of_x", [0.5, 3.0, 40.0])
def test_sample_residuals(scale_of_x, quadratic, dtype):
    rng = np.random.default_rng(3)
    n, d = 300, 20
    sizes = [2, 1, 150, 0, 48, 12]
    k, s = len(sizes), sum(sizes)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    x = (scale_of_x * rng.standard_normal((n, d)) / d**0.5).astype(dtype)
    deviations = rng.standard_normal((s, d)).astype(dtype)
    weights = (rng.random(s) + 0.1).astype(dtype)
    variance = (scale_of_x**2 * rng.random((n, k))).astype(dtype)
    scale = (1 / (0.5 + rng.random((n, k)))).astype(dtype)
    shift = (0.1 * rng.standard_normal((n, k))).astype(dtype)
    excluded = rng.integers(-1, s, n)
    found = compiled.sample_residuals(
        x, deviations, weights, offsets, variance, scale, shift, excluded, quadratic
    )
    expected = reference.sample_residuals(
        *map(wide, (x, deviations, weights)),
        offsets,
        *map(wide, (variance, scale, shift)),
        excluded,
        quadratic,
    )
    # Scores up to 5 times the scale of x, whose roundings the exponentials carry over.
    eps = float(np.finfo(dtype).eps)
    atol = 64 * eps * (1 + 5 * scale_of_x) ** 2
    # 1 + delta cancels where it comes near 0: its logarithm, and its sign, are then
    # rounding.
    sound = ~(expected[0] < -2) & ~np.isnan(expected[0])
    assert sound.mean() > 0.3
    np.testing.assert_allclose(
        found[0][sound], expected[0][sound], rtol=16 * eps, atol=8 * atol
    )
    np.testing.assert_array_equal(np.isinf(found[1]), np.isinf(expected[1]))
    some = ~np.isinf(expected[1])
    wrong = np.abs(found[1][some] - expected[1][some])
    # A spread errs by the rounding of the terms, which are of size 1 where it is small.
    assert np.all(wrong <= 8 * atol * np.maximum(1.0, np.exp(-expected[1][some])))
    cubes = np.max(np.abs(expected[2]))
    np.testing.assert_allclose(found[2], expected[2], rtol=0, atol=64 * eps * cubes)
