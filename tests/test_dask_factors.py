"""Sparse factors of Dask arrays: chunks of any shape, nothing computed early."""

from __future__ import annotations

import numpy as np
import pytest

import subquad as sq
from _oracle import assert_within, sum_to
from _oracle_factors import RESIDUALS, Chain, Networks, csr_dense
from test_dask import lazy, run_on_a_cluster

__all__ = ["lazy"]

dask = pytest.importorskip("dask", reason="dask is not installed")
da = pytest.importorskip("dask.array", reason="dask.array is not installed")

OFFSETS = ((0, 1, 4), (2, -1, -3), (0, 9, 1))
SEGMENTS = np.array([2, 2, 2, 5, 5, 0, 0, 0, 0, 0, 7])
M, N, K, D, H = 3, 11, 3, 5, 4

# The chunks of rows and of channels.
CHUNKS = [((11,), (5,)), ((4, 1, 6), (5,)), ((11,), (2, 3)), ((1,) * 11, (1, 1, 3))]
BATCHES = [((), ()), ((3,), ()), ((), (2,)), ((2, 1), (3,))]


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def cut(a, *last):
    """An array in chunks, batches of one matrix each."""
    return da.from_array(a, chunks=(*(1,) * (a.ndim - len(last)), *last))


def oracle(values, x, **options):
    return Chain(list(np.moveaxis(values, -3, 0)), x, OFFSETS, **options)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("rows, channels", CHUNKS, ids=str)
def test_chunks(rows, channels, residual, lazy):
    values, x = normal(M, N, K), normal(N, D, seed=1)
    grad = normal(N, D, seed=2)
    options = {"residual": residual, "circular": residual != "step"}
    a, b = cut(values, (2, 1), rows, (1, 2)), cut(x, rows, channels)
    with lazy():
        out = sq.sparse_factor_product(a, b, pattern=OFFSETS, **options)
        back = sq.sparse_factor_product(
            a, b, pattern=OFFSETS, transpose=True, **options
        )
        found = sq.vjp.sparse_factor_product(
            cut(grad, rows, D), a, b, pattern=OFFSETS, **options
        )
    assert isinstance(out, da.Array)
    # Rows are whole, and channels keep their chunks.
    assert out.chunks == ((N,), channels)
    expected = oracle(values, x, **options)
    assert_within(out.compute(), *expected.product())
    transposed = oracle(values, x, transpose=True, **options)
    assert_within(back.compute(), *transposed.product())
    check_gradients(found, expected, grad, values, x)


def check_gradients(found, expected, grad, values, x):
    (*of_values, of_x), (*bounds, x_bound) = expected.gradients(grad)
    pairs = ((np.stack(of_values, -3), np.stack(bounds, -3)), (of_x, x_bound))
    for a, (value, bound), array in zip(found, pairs, (values, x), strict=True):
        assert isinstance(a, da.Array)
        assert a.shape == array.shape
        assert a.dtype == array.dtype
        # The sums over chunks and batches round once more.
        assert_within(
            a.compute(), sum_to(value, array.shape), 2 * sum_to(bound, array.shape)
        )


@pytest.mark.parametrize("bv, bx", BATCHES[1:], ids=str)
def test_batches(bv, bx, lazy):
    values, x = normal(*bv, M, N, K), normal(*bx, N, D, seed=1)
    grad = normal(*np.broadcast_shapes(bv, bx), N, D, seed=2)
    a, b, g = cut(values, M, 4, K), cut(x, 6, 2), cut(grad, 5, 3)
    segments = da.from_array(SEGMENTS, chunks=4)
    options = {"pattern": OFFSETS, "residual": "step", "segment_ids": segments}
    with lazy():
        out, kept = sq.sparse_factor_product(a, b, return_intermediates=True, **options)
        found = sq.vjp.sparse_factor_product(g, a, b, intermediates=kept, **options)
        again = sq.vjp.sparse_factor_product(g, a, b, **options)
    expected = oracle(values, x, residual="step", segments=SEGMENTS)
    assert_within(out.compute(), *expected.product())
    assert_within(kept.compute(), *expected.intermediates())
    check_gradients(found, expected, grad, values, x)
    check_gradients(again, expected, grad, values, x)


@pytest.mark.parametrize(
    "bx, bw, rows, channels",
    [
        *(((), (), *chunks) for chunks in CHUNKS),
        *((*batches, *CHUNKS[1]) for batches in BATCHES[1:]),
    ],
    ids=str,
)
def test_networks(bx, bw, rows, channels, lazy):
    x = normal(*bx, N, D)
    shapes = ((2, H, D), (2, H), (2, K, H), (2, K))
    weights = [normal(*bw, *s, seed=i + 1) for i, s in enumerate(shapes)]
    batch = np.broadcast_shapes(bx, bw)
    grad = normal(*batch, 2, N, K, seed=7)
    a = cut(x, rows, channels)
    others = [cut(w, *s) for w, s in zip(weights, shapes, strict=True)]
    others[0] = others[0].rechunk({-1: channels, -2: (1, 3)})
    with lazy():
        out = sq.factor_values(a, others)
        gx, found = sq.vjp.factor_values(cut(grad, 1, 5, 2), a, others)
    assert out.chunks[-3:] == ((2,), rows, (K,))
    expected = Networks(x, weights)
    assert_within(out.compute(), *expected.values())
    values, bounds = expected.gradients(grad)
    arrays = (x, *weights)
    for g, value, bound, array in zip(
        (gx, *found), values, bounds, arrays, strict=True
    ):
        assert g.shape == array.shape
        assert_within(
            g.compute(), sum_to(value, array.shape), 2 * sum_to(bound, array.shape)
        )


DATA = normal(7, seed=3)
INDICES, INDPTR = np.array([1, 0, 1, 10, 2, 2, 5]), np.array([0, 3, 3, 6, 7])


def dense():
    return csr_dense(DATA, INDICES, INDPTR, N).astype(float)


@pytest.mark.parametrize(
    "bx, ba, rows, channels",
    [
        *(((2,), None, *chunks) for chunks in CHUNKS),
        *((*batches, *CHUNKS[2]) for batches in BATCHES),
    ],
    ids=str,
)
def test_sparse_matrices(bx, ba, rows, channels, lazy):
    x = normal(*bx, N, D)
    addend = None if ba is None else normal(*ba, 4, D, seed=1)
    batch = np.broadcast_shapes(bx, ba or ())
    grad = normal(*batch, 4, D, seed=2)
    structure = [da.from_array(p, chunks=3) for p in (DATA, INDICES, INDPTR)]
    lazily = None if addend is None else cut(addend, 2, 4)
    options = {"addend": lazily, "scale": 0.5}
    with lazy():
        out = sq.csr_product(*structure, cut(x, rows, channels), **options)
        found = sq.vjp.csr_product(
            cut(grad, 3, 2), *structure, cut(x, rows, channels), **options
        )
        turned = sq.csr_transpose(*structure, N)
    matrix = dense()
    # Sums of at most three terms of order one, a handful of batches: 1e-13 is
    # hundreds of roundings.
    close = {"rtol": 0, "atol": 1e-13}
    expected = 0.5 * matrix @ x + (0 if addend is None else addend)
    assert out.chunks[-2:] == ((4,), channels)
    np.testing.assert_allclose(out.compute(), expected, **close)
    through = sum_to(0.5 * matrix.T @ grad, x.shape)
    np.testing.assert_allclose(found[1].compute(), through, **close)
    of_entries = 0.5 * np.einsum("...ic,...jc->...ij", grad, x)
    of_entries = of_entries.sum(tuple(range(of_entries.ndim - 2)))
    owners = np.repeat(np.arange(4), np.diff(INDPTR))
    np.testing.assert_allclose(found[0].compute(), of_entries[owners, INDICES], **close)
    if addend is not None:
        expected = sum_to(grad, addend.shape)
        np.testing.assert_allclose(found[2].compute(), expected, **close)
    for a, b in zip(turned, sq.csr_transpose(DATA, INDICES, INDPTR, N), strict=True):
        np.testing.assert_array_equal(a.compute(), b)


def test_matrices_of_the_host(lazy):
    """As those of a chain: they travel with the tasks."""
    from subquad._backends import dask as backend

    x = normal(2, N, D)
    a = cut(x, 4, 2)
    other = sq.csr_transpose(DATA, INDICES, INDPTR, N)
    given = (DATA, INDICES.astype(np.int32), INDPTR.astype(np.int32))
    with lazy():
        out = backend.csr_product(*given, a, None, 1.0, other)
        _, gx, _ = backend.csr_product_vjp(
            out, *given, a, None, 1.0, other, (False, True, False)
        )
    expected = dense() @ x
    np.testing.assert_allclose(out.compute(), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(gx.compute(), dense().T @ expected, rtol=0, atol=1e-12)


def test_paramixer(lazy):
    x, v = normal(N, D), normal(N, 2, seed=1)
    shapes = ((4, H, D), (4, H), (4, K, H), (4, K))
    weights = [normal(*s, seed=i + 2) for i, s in enumerate(shapes)]
    with lazy():
        out = sq.paramixer(
            cut(x, 4, 2), cut(v, 3, 1), [da.from_array(w) for w in weights]
        )
    # The same kernels: the sums of rows are in one order.
    np.testing.assert_array_equal(out.compute(), sq.paramixer(x, v, weights))


def test_small_graphs():
    """The number of tasks grows with the chunks of channels, not with rows."""
    x = da.zeros((4096, 64), chunks=(512, 16))
    values = da.zeros((12, 4096, 13), chunks=(12, 512, 13))
    out = sq.sparse_factor_product(values, x)
    assert out.chunks == ((4096,), (16,) * 4)
    assert len(out.__dask_graph__()) < 150


def test_on_two_processes(tmp_path):
    pytest.importorskip("distributed", reason="distributed is not installed")
    run_on_a_cluster(
        tmp_path,
        """
        values = np.random.default_rng(1).standard_normal((3, 90, 4))
        out = sq.sparse_factor_product(da.from_array(values, chunks=(3, 40, 4)), a)
        np.testing.assert_array_equal(
            out.compute(), sq.sparse_factor_product(values, x)
        )
        """,
    )
