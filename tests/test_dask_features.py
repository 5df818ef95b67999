"""Random features of Dask arrays: chunks of any shape, nothing computed early."""

from __future__ import annotations

import numpy as np
import pytest

import subquad as sq
from _feature_formulas import (
    Case,
    case,
    hadamard_transform,
    log_features,
    log_features_vjp,
    public,
    trigonometric_features,
)
from _oracle import assert_within, sum_to
from test_dask import lazy, run_on_a_cluster

__all__ = ["lazy"]

dask = pytest.importorskip("dask", reason="dask is not installed")
da = pytest.importorskip("dask.array", reason="dask.array is not installed")

FULL = ["all with diagonal", "all with factor"]

# The chunks of rows, of features and of dimensions.
CHUNKS = [
    ((17,), (6,), (5,)),
    ((5, 1, 11), (6,), (5,)),
    ((17,), (2, 3, 1), (5,)),
    ((8, 9), (5, 1), (1, 4)),
    ((1,) * 17, (6,), (3, 2)),
]


def cut(given, rows, features, dimensions):
    """The arrays of a case in chunks, batches of one matrix each."""

    def chunked(a, *last):
        return da.from_array(a, chunks=(*(1,) * (a.ndim - len(last)), *last))

    x, projection, bias, diagonal, factor, shift, linear = given
    return Case(
        chunked(x, rows, dimensions),
        chunked(projection, features, dimensions),
        chunked(bias, features),
        None if diagonal is None else chunked(diagonal, dimensions),
        None if factor is None else chunked(factor, 2, dimensions),
        chunked(shift, dimensions),
        chunked(linear, dimensions),
    )


def sizes(form, **options):
    return case(form, n=17, m=6, d=5, r=4, **options)


@pytest.mark.parametrize("form", FULL)
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_chunks(chunks, form, lazy):
    given = sizes(form)
    arrays = cut(given, *chunks)
    with lazy():
        logs = arrays.call(sq.log_features, antithetic=True)
        waves = arrays.call(sq.trigonometric_features)
    for out, expected in (
        (logs, log_features(given, True)),
        (waves, trigonometric_features(given)),
    ):
        assert isinstance(out, da.Array)
        # Rows keep their chunks, and features are whole.
        assert out.chunks == (chunks[0], (12,))
        assert out.dtype == np.float64
        assert_within(out.compute(), *expected)


@pytest.mark.parametrize("form", FULL)
@pytest.mark.parametrize("bx, bp", [((3,), ()), ((), (2,)), ((2, 1), (3,))], ids=str)
def test_batches(bx, bp, form, lazy):
    given = sizes(form, bx=bx, bp=bp)
    arrays = cut(given, (8, 9), 6, 5)
    grad = np.random.default_rng(1).standard_normal(
        (*np.broadcast_shapes(bx, bp), 17, 12)
    )
    chunked = da.from_array(grad, chunks=(*(1,) * (grad.ndim - 2), 10, 7))
    with lazy():
        out = arrays.call(sq.log_features, antithetic=True)
        found = arrays.call(sq.vjp.log_features, lambda a: a, chunked, antithetic=True)
    assert_within(out.compute(), *log_features(given, True))
    check_gradients(found, grad, given, True)


def check_gradients(found, grad, given, antithetic):
    inputs = [given.x, given.projection, given.bias]
    inputs += [given.quadratic, given.shift, given.linear]
    values, bounds = map(public, log_features_vjp(grad, given, antithetic))
    for a, value, bound, array in zip(found, values, bounds, inputs, strict=True):
        assert isinstance(a, da.Array)
        assert a.shape == array.shape
        assert a.dtype == array.dtype
        assert_within(
            a.compute(), sum_to(value, array.shape), 2 * sum_to(bound, array.shape)
        )


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("form", FULL)
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_gradients(chunks, form, antithetic, lazy):
    given = sizes(form)
    arrays = cut(given, *chunks)
    grad = np.random.default_rng(1).standard_normal((17, 12 if antithetic else 6))
    chunked = da.from_array(grad, chunks=(4, 5))
    with lazy():
        found = arrays.call(
            sq.vjp.log_features, lambda a: a, chunked, antithetic=antithetic
        )
    check_gradients(found, grad, given, antithetic)


@pytest.mark.parametrize("chunks", [((6,), (8,)), ((1, 5), (3, 5)), ((2, 4), (1,) * 8)])
def test_transform(chunks, lazy):
    x = np.random.default_rng(0).standard_normal((6, 8))
    with lazy():
        out = sq.hadamard_transform(da.from_array(x, chunks=chunks))
    assert out.chunks == (chunks[0], (8,))
    assert_within(out.compute(), *hadamard_transform(x))


def test_types_of_blocks(lazy):
    given = sizes("all with factor", dtype=np.float32)
    arrays = cut(given, (8, 9), 6, 5)
    with lazy():
        out = arrays.call(sq.log_features)
        transform = sq.hadamard_transform(arrays.x[:, :4].astype(np.float16))
    assert out.dtype == out.compute().dtype == np.float32
    assert transform.dtype == transform.compute().dtype == np.float32


def test_sizes_that_are_not_known():
    given = sizes("all with diagonal")
    arrays = cut(given, (8, 9), 6, 5)
    kept = arrays.x[arrays.x[:, 0] > -100]
    assert np.isnan(kept.shape[0])
    out = arrays._replace(x=kept).call(sq.log_features)
    assert_within(out.compute(), *log_features(given))


def test_small_graphs():
    """The number of tasks grows with the chunks of rows, not with rows or features."""
    x = da.zeros((100_000, 8), chunks=(10_000, 4))
    projection, bias = da.zeros((256, 8), chunks=(16, 8)), da.zeros(256, chunks=16)
    out = sq.log_features(x, projection, bias, da.ones(8))
    assert out.chunks[0] == (10_000,) * 10
    assert len(out.__dask_graph__()) < 150


def test_on_two_processes(tmp_path):
    pytest.importorskip("distributed", reason="distributed is not installed")
    run_on_a_cluster(
        tmp_path,
        """
        rng = np.random.default_rng(1)
        whole = [rng.standard_normal(s) for s in ((7, 6), 7, 6)]
        lazy = [da.from_array(p) for p in whole]
        out = sq.log_features(a, *lazy, antithetic=True).compute()
        np.testing.assert_allclose(
            out, sq.log_features(x, *whole, antithetic=True), rtol=1e-12
        )
        """,
    )
