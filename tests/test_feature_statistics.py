"""Moments: what they are, that parts merge to the whole, every library."""

from __future__ import annotations

import numpy as np
import pytest

from subquad._feature_statistics import Moments, moments_of

EPSILON = np.finfo(float).eps


def rows(n, d=4, seed=0, heads=(), offset=0.0):
    return np.random.default_rng(seed).normal(size=(*heads, n, d)) + offset


def assert_same(a, b, scale=1.0):
    assert a.count == b.count
    # Sums of at most a hundred products, in other orders.
    bound = 100 * EPSILON * scale
    np.testing.assert_allclose(a.mean, b.mean, rtol=bound, atol=bound)
    np.testing.assert_allclose(a.scatter, b.scatter, rtol=bound, atol=100 * bound)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("heads", [(), (3,), (2, 3)])
def test_moments_are_means(heads, diagonal):
    x = rows(30, heads=heads, offset=2.0)
    moments = moments_of(x, diagonal)
    assert moments.is_diagonal == diagonal and moments.count == 30
    apart = x - x.mean(-2, keepdims=True)
    covariance = np.swapaxes(apart, -1, -2) @ apart / 30
    second = np.swapaxes(x, -1, -2) @ x / 30
    if diagonal:
        covariance, second = (
            np.diagonal(m, axis1=-2, axis2=-1) for m in (covariance, second)
        )
    np.testing.assert_allclose(moments.mean, x.mean(-2), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, covariance, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(moments.second_moment, second, rtol=1e-12)
    if not diagonal:
        assert_same(moments.to_diagonal(), moments_of(x, True))
    scaled = moments.scaled(0.3)
    assert_same(scaled, moments_of(0.3 * x, diagonal))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("heads", [(), (2,)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_parts_merge_to_the_whole(offset, heads, diagonal):
    x = rows(41, heads=heads, offset=offset)
    parts = [
        moments_of(x[..., a:b, :], diagonal)
        for a, b in ((0, 1), (1, 18), (18, 18), (18, 41))
    ]
    whole = moments_of(x, diagonal)
    # Rounding of the means counts by their size, in the scatter squared but cancelled.
    scale = max(offset, 1.0)
    left = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    right = parts[0].merge(parts[1].merge(parts[2].merge(parts[3])))
    for merged in (left, right):
        assert_same(merged, whole, scale)
    assert_same(parts[1].merge(parts[3]), parts[3].merge(parts[1]), scale)


def test_far_from_the_origin_nothing_cancels():
    x = rows(50, offset=1e8)
    whole = moments_of(x[:20], False).merge(moments_of(x[20:], False))
    # Rows are rounded to 1e-8; squares about the origin would keep no digit.
    np.testing.assert_allclose(
        whole.covariance, np.cov((x - 1e8).T, bias=True), atol=1e-7
    )


@pytest.mark.parametrize("diagonal", [False, True])
def test_no_rows(diagonal):
    empty = moments_of(rows(0, heads=(2,)), diagonal)
    assert empty.count == 0
    assert np.all(empty.covariance == 0) and np.all(empty.second_moment == 0)
    other = moments_of(rows(5, heads=(2,)), diagonal)
    for merged in (empty.merge(other), other.merge(empty)):
        assert_same(merged, other)
    assert empty.merge(empty).count == 0
    assert moments_of(rows(5, heads=(0,)), diagonal).mean.shape == (0, 4)


def test_one_row():
    moments = moments_of(rows(1), False)
    assert np.all(moments.covariance == 0)
    np.testing.assert_allclose(moments.second_moment, rows(1).T @ rows(1), rtol=1e-15)


@pytest.mark.parametrize("heads", [(), (3,)])
def test_every_library(xp, heads):
    x = rows(30, heads=heads, offset=0.5).astype(np.float32)
    moments = moments_of(xp.asarray(x), False)
    assert isinstance(moments, Moments)
    exact = moments_of(x.astype(float), False)
    unit = float(np.finfo(np.float32).eps)
    # Thirty rounded products of numbers below 4.
    np.testing.assert_allclose(moments.mean, exact.mean, atol=30 * unit)
    np.testing.assert_allclose(moments.scatter, exact.scatter, atol=30 * 16 * unit * 30)
    assert moments.mean.dtype == moments.scatter.dtype == np.float64


def test_strided_rows():
    x = rows(40, d=8)
    for view in (x[::-2, ::2], x[:, ::-1], x.T[:8].T, np.broadcast_to(x[:1], (40, 8))):
        assert_same(moments_of(view, False), moments_of(view.copy(), False))
