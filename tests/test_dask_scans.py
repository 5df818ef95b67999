"""Dask: scans and attention in chunks of any shape, nothing computed early."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import subquad as sq
from test_dask import dask, lazy, run_on_a_cluster

da = dask.array
__all__ = ["lazy"]

INF, NAN = np.inf, np.nan
FLAGS = list(itertools.product([False, True], repeat=2))

# Of 23 entries along the scan.
ALONG = [
    (23,),
    (10, 13),
    (1, 1, 20, 1),
    (0, 5, 0, 0, 18, 0),
    (4,) * 5 + (3,),
    (1,) * 23,
]
CUTS = [
    ((10, 13), np.float64),
    ((0, 5, 0, 1, 17, 0), np.float64),
    ((1, 1, 20, 1), np.float32),
]
SEGMENTS = np.repeat([4, 4, 7, 1, 4], [1, 9, 6, 1, 6])


@pytest.fixture(autouse=True)
def one_thread():
    """Small tasks, faster without threads."""
    with dask.config.set(scheduler="synchronous"):
        yield


def chunked(array, **pieces):
    """A Dask array cut along some axes; the names tell axes from the end."""
    if array is None:
        return None
    chunks = [(size,) for size in array.shape]
    for name, sizes in pieces.items():
        axis = array.ndim - int(name[1:])
        if axis >= 0 and sum(sizes) == array.shape[axis]:
            chunks[axis] = sizes
    return da.from_array(array, chunks=tuple(chunks))


def check(lazy_array, expected, count=4, floor=16.0, scale=None, computed=None):
    """Equal NumPy's to units in the last place of a size; and the metadata is right."""
    expected = np.asarray(expected)
    assert isinstance(lazy_array, da.Array)
    assert lazy_array.shape == expected.shape
    assert lazy_array.dtype == expected.dtype
    assert lazy_array._meta.dtype == expected.dtype
    assert lazy_array._meta.ndim == expected.ndim
    found = lazy_array.compute() if computed is None else computed
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    for axis, sizes in enumerate(lazy_array.chunks):
        assert sum(sizes) == expected.shape[axis]
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    size = np.maximum(np.abs(expected[finite]), floor) if scale is None else scale
    unit = np.finfo(expected.dtype).eps * np.asarray(size, float)
    error = np.abs(found[finite].astype(float) - expected[finite].astype(float))
    assert (error <= count * unit).all(), (error / unit).max()


def scores(seed, *shape, dtype=np.float64, scale=3.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


# ------------------------------------------------------------------------------ scans


@pytest.mark.parametrize(
    "along, dtype", [*((along, np.float64) for along in ALONG), *CUTS[2:]], ids=str
)
@pytest.mark.parametrize("reverse, exclusive", FLAGS)
def test_logcumsumexp(along, reverse, exclusive, dtype, lazy):
    x = scores(0, 5, 23, 2, dtype=dtype, scale=40)
    x[0, 4:9] = -INF
    x[1, 7], x[2, 11] = INF, NAN
    state = scores(1, 5, 2, dtype=dtype)
    state[3] = -INF
    options = {"axis": 1, "reverse": reverse, "exclusive": exclusive}
    for segments, start in itertools.product((None, SEGMENTS), (None, state)):
        expected = sq.logcumsumexp(
            x, segment_ids=segments, state=start, return_state=True, **options
        )
        with lazy():
            found = sq.logcumsumexp(
                chunked(x, _2=along, _3=(2, 3)),
                segment_ids=chunked(segments, _1=(11, 12)),
                state=chunked(start, _2=(4, 1)),
                return_state=True,
                **options,
            )
        check(found.out, expected.out)
        check(found.state.log_sum, expected.state.log_sum)


def test_the_remainder_is_kept():
    """Many chunks are as accurate as one, where float32 sums would not be."""
    x = np.zeros(20_000, np.float32)
    _, state = sq.logcumsumexp(da.from_array(x, chunks=100), return_state=True)
    log_sum, remainder = (a.compute() for a in (state.log_sum, state.remainder))
    assert abs(float(log_sum) + float(remainder) - np.log(20_000)) < 1e-11


@pytest.mark.parametrize("along, dtype", CUTS, ids=str)
@pytest.mark.parametrize("reverse, exclusive", FLAGS)
def test_signed(along, reverse, exclusive, dtype, lazy):
    x = scores(2, 3, 23, dtype=dtype)
    x[1] = np.round(x[1])
    sign = np.sign(scores(3, 3, 23, dtype=dtype))
    sign[1, 12:] = -sign[1, :11]
    x[1, 12:] = x[1, :11]
    sign[0, 5] = 0
    options = {"axis": 1, "reverse": reverse, "exclusive": exclusive}
    grad = scores(4, 3, 23, dtype=dtype)
    expected = sq.signed_logcumsumexp(x, sign, **options)
    expected_grads = sq.vjp.signed_logcumsumexp(grad, x, sign, **options)
    arrays = [chunked(a, _1=along, _2=(1, 2)) for a in (grad, x, sign)]
    with lazy():
        found = sq.signed_logcumsumexp(*arrays[1:], **options)
        grads = sq.vjp.signed_logcumsumexp(*arrays, **options)
    # Where sums cancel, logarithms and gradients are as large as the loss of digits.
    lost = np.exp(np.max(np.abs(x)) - expected.log_abs.astype(float))
    kept = (lost < 1e6) & (expected.log_abs > -INF)
    wide = np.finfo(np.float64).eps * 32 * lost[kept]
    unit = np.finfo(dtype).eps * 4 * np.maximum(np.abs(expected.log_abs[kept]), 16)
    log_abs, signs = found.log_abs.compute(), found.sign.compute()
    assert log_abs.dtype == signs.dtype == dtype
    assert (log_abs[expected.log_abs == -INF] == -INF).all()
    assert (np.abs(log_abs[kept] - expected.log_abs[kept]) <= wide + unit).all()
    np.testing.assert_array_equal(signs[kept], expected.sign[kept])
    for one, other in zip(grads, expected_grads, strict=True):
        rows = [0, 2]
        worst = np.where(kept, lost, 1)[rows].max()
        tolerance = 64 * worst * np.finfo(np.float64).eps + 8 * np.finfo(dtype).eps
        size = np.abs(other[rows]).max()
        np.testing.assert_allclose(
            one.compute()[rows], other[rows], rtol=0, atol=tolerance * size
        )


@pytest.mark.parametrize("along, dtype", CUTS, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_recurrence(along, reverse, dtype, lazy):
    log_a, log_b = scores(5, 4, 23, dtype=dtype), scores(6, 4, 23, dtype=dtype)
    log_a[0] = -500.0
    log_a[1] += 500
    log_a[2, 9] = -INF
    log_b[3, 2:9] = -INF
    state = scores(7, 4, dtype=dtype)
    for segments, start in itertools.product((None, SEGMENTS), (None, state)):
        expected = sq.log_linear_recurrence(
            log_a,
            log_b,
            segment_ids=segments,
            state=start,
            reverse=reverse,
            return_state=True,
        )
        with lazy():
            found = sq.log_linear_recurrence(
                chunked(log_a, _1=(20, 3), _2=(3, 1)),
                chunked(log_b, _1=along),
                segment_ids=chunked(segments, _1=(11, 12)),
                state=chunked(start, _1=(2, 2)),
                reverse=reverse,
                return_state=True,
            )
        check(found.out, expected.out)
        check(found.state, expected.state)


@pytest.mark.parametrize("along, dtype", CUTS, ids=str)
@pytest.mark.parametrize("reverse, exclusive", FLAGS)
def test_gradients_of_scans(along, reverse, exclusive, dtype, lazy):
    x, grad = scores(8, 3, 23, dtype=dtype), scores(9, 3, 23, dtype=dtype)
    x[0, 3:7] = -INF
    x[1] += 1e4
    state, final = scores(10, 3, dtype=dtype), scores(11, 3, dtype=dtype)
    options = {"reverse": reverse, "exclusive": exclusive}
    for segments in (None, SEGMENTS):
        cut_segments = chunked(segments, _1=(11, 12))
        cut = {"_1": along, "_2": (1, 2)}
        expected = sq.vjp.logcumsumexp(
            (grad, sq.LogSumExpState(final, 0 * final)),
            x,
            state=state,
            segment_ids=segments,
            **options,
        )
        lanes = [chunked(a, _1=(2, 1)) for a in (state, final)]
        with lazy():
            found = sq.vjp.logcumsumexp(
                (chunked(grad, **cut), sq.LogSumExpState(lanes[1], 0 * lanes[1])),
                chunked(x, **cut),
                state=lanes[0],
                segment_ids=cut_segments,
                **options,
            )
        check_gradients(found, expected, dtype)
        if exclusive:
            continue
        expected = sq.vjp.log_linear_recurrence(
            grad, x, grad, state=state, segment_ids=segments, reverse=reverse
        )
        with lazy():
            found = sq.vjp.log_linear_recurrence(
                chunked(grad, **cut),
                chunked(x, **cut),
                chunked(grad, **cut),
                state=lanes[0],
                segment_ids=cut_segments,
                reverse=reverse,
            )
        check_gradients(found, expected, dtype, 1e4 if dtype == np.float64 else 64)


def check_gradients(found, expected, dtype, count=64):
    """Equal NumPy's to rounding of the largest, in float64 to that of exponents."""
    values = dask.compute(*found)
    for one, other, value in zip(found, expected, values, strict=True):
        largest = max(np.abs(other).max(initial=0), 1e-30)
        check(one, other, count, scale=largest, computed=value)


# -------------------------------------------------------------------------- attention


CASES = ["plain", "causal", "decay", "resets", "mask", "segments", "ordered", "all"]
N, D_K, D_V = 23, 3, 2


def attention_case(name, dtype, scale=2.0):
    q, k = (scores(s, 2, 3, N, D_K, dtype=dtype, scale=scale) for s in (20, 21))
    v = scores(22, 3, N, D_V, dtype=dtype)
    k[0, 1, 4:8] = -INF
    options = {"causal": name not in ("plain", "mask", "segments")}
    if name in ("decay", "resets", "all"):
        options["log_decay"] = -np.abs(scores(23, 3, N, D_K, dtype=dtype))
    if name in ("resets", "all"):
        options["log_decay"][1, 9] = options["log_decay"][2, 3:5, 1] = -INF
    if name in ("mask", "ordered", "all"):
        options["key_mask"] = np.random.default_rng(24).random((2, 1, N)) < 0.6
    if name in ("segments", "ordered", "all"):
        options["segment_ids"] = SEGMENTS
    before = (scores(25, 2, 3, 4, D_K, dtype=dtype, scale=scale), v[..., :4, :])
    return q, k, v, options, before


def lazy_options(options, along):
    return {
        name: value
        if isinstance(value, bool)
        else chunked(value, **{"_1": (11, 12)} if value.ndim < 2 else {"_1": along})
        if name != "log_decay"
        else chunked(value, _2=along)
        for name, value in options.items()
    }


def lazy_state(state):
    """A state cut along its batch."""
    return type(state)(
        **{name: chunked_batch(array) for name, array in state._arrays()}
    )


def chunked_batch(array):
    return da.from_array(array, chunks=(1, (1, 2), *array.shape[2:]))


def start_of(before, kind):
    state = sq.AttentionState.init((2, 3), D_K, D_V, like=before[0]).update(*before)
    return state if kind == "linear" else state.to_log()


def tolerance(q, k, dtype):
    """Units in the last place that rounding of the exponents explains."""
    finite = np.where(np.isfinite(k), np.abs(k), 0)
    return 8 * (4 + float(np.abs(q).max() + finite.max()))


@pytest.mark.parametrize("along, dtype", CUTS[1:], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_attention(name, along, dtype, lazy):
    q, k, v, options, before = attention_case(name, dtype)
    cut = {"_2": along, "_4": (1, 1), "_3": (1, 2)}
    for start in (None, start_of(before, "linear")):
        more = {"return_state": True, "return_log_normalizer": True, "empty": "nan"}
        expected = sq.linear_attention(q, k, v, state=start, **options, **more)
        with lazy():
            found = sq.linear_attention(
                chunked(q, **cut),
                chunked(k, **cut),
                chunked(v, _2=(20, 3), _1=(1, 1)),
                state=None if start is None else lazy_state(start),
                **lazy_options(options, along),
                **more,
            )
        count = tolerance(q, k, dtype)
        check(found.y, expected.y, count, floor=np.abs(v).max())
        check(found.log_z, expected.log_z, 4)
        assert found.state.key_sums.shape == expected.state.key_sums.shape
        one, two = (state.to_log() for state in (host(found.state), expected.state))
        np.testing.assert_allclose(
            one.log_denominator,
            two.log_denominator,
            atol=count * np.finfo(dtype).eps * 16,
        )
        ratio = np.exp(two.log_numerator - two.log_denominator[..., None])
        other = np.exp(one.log_numerator - two.log_denominator[..., None])
        unit = count * np.finfo(dtype).eps * np.abs(v).max()
        np.testing.assert_allclose(
            one.sign_numerator * other, two.sign_numerator * ratio, rtol=0, atol=unit
        )
        np.testing.assert_allclose(
            one_decay(found.state), expected.state.log_decay, rtol=1e-5
        )


def one_decay(state):
    return state.log_decay.compute()


def host(state):
    """A state with NumPy's arrays."""
    names, arrays = zip(*state._arrays(), strict=True)
    return type(state)(**dict(zip(names, dask.compute(*arrays), strict=True)))


@pytest.mark.parametrize("along, dtype", CUTS[1:], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_attention_in_logarithms(name, along, dtype, lazy):
    q, k, v, options, before = attention_case(name, dtype)
    log_v, sign_v = 20 * np.abs(v), np.sign(v)
    sign_v[0, 3] = 1
    cut = {"_2": along, "_4": (1, 1), "_3": (1, 2)}
    positive = np.ones_like(sign_v)
    for start, sign in ((None, positive), (start_of(before, "log"), sign_v)):
        more = {"return_state": True, "return_log_normalizer": True}
        expected = sq.log_linear_attention(
            q, k, log_v, sign_v=sign, state=start, **options, **more
        )
        with lazy():
            found = sq.log_linear_attention(
                chunked(q, **cut),
                chunked(k, **cut),
                chunked(log_v, _2=along),
                sign_v=chunked(sign, _2=along),
                state=None if start is None else lazy_state(start),
                **lazy_options(options, along),
                **more,
            )
        check(found.log_z, expected.log_z, 8)
        check(found.state.log_denominator, expected.state.log_denominator, 8)
        if sign is positive:
            check(found.log_abs_y, expected.log_abs_y, 8)
            check(found.sign_y, expected.sign_y, 0)
            check(found.state.log_numerator, expected.state.log_numerator, 8)
        else:
            for one, two in (
                (found.log_abs_y, expected.log_abs_y),
                (found.state.log_numerator, expected.state.log_numerator),
            ):
                assert one.dtype == two.dtype
                np.testing.assert_allclose(
                    one.compute(), two, atol=3e-3 if dtype == np.float32 else 1e-9
                )


@pytest.mark.parametrize("along, dtype", CUTS[1:], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["linear", "log"])
def test_gradients_of_attention(kind, name, along, dtype, lazy):
    q, k, v, options, before = attention_case(name, dtype, scale=1.0)
    grad_y = scores(30, 2, 3, N, D_V, dtype=dtype)
    grad_z = scores(31, 2, 3, N, dtype=dtype)
    start = start_of(before, kind)
    shapes = {name: array.shape for name, array in start._arrays()}
    grad_state = type(start)(
        **{
            name: scores(32 + place, *shape, dtype=dtype)
            for place, (name, shape) in enumerate(shapes.items())
        }
    )
    function = sq.vjp.linear_attention if kind == "linear" else vjp_of_logs
    cut = {"_2": along, "_4": (1, 1), "_3": (1, 2)}
    rows = {"_2": along, "_3": (2, 1)}
    for state in (None, start):
        final = None if state is None else grad_state
        expected = function((grad_y, grad_z, final), q, k, v, state=state, **options)
        with lazy():
            found = function(
                (
                    chunked(grad_y, **rows),
                    chunked(grad_z, _1=along),
                    None if state is None else lazy_state(final),
                ),
                chunked(q, **cut),
                chunked(k, **cut),
                chunked(v, _2=along),
                state=None if state is None else lazy_state(state),
                **lazy_options(options, along),
            )
        if state is not None:
            *found, last = found
            *expected, other = expected
            pairs = zip(last._arrays(), other._arrays(), strict=True)
            found += [a for (_, a), _ in pairs]
            pairs = zip(last._arrays(), other._arrays(), strict=True)
            expected = [*expected, *(a for _, (_, a) in pairs)]
        largest = max(np.abs(a).max() for a in expected)
        values = dask.compute(*found)
        for one, other, value in zip(found, expected, values, strict=True):
            check(one, other, 200, scale=largest, computed=value)


def vjp_of_logs(grad, q, k, v, **options):
    return sq.vjp.log_linear_attention(grad, q, k, v, **options)


def test_rows_and_keys_of_different_numbers(lazy):
    q, k = scores(40, 3, 11, D_K), scores(41, N, D_K)
    v, grad = scores(42, N, D_V), scores(43, 3, 11, D_V)
    arrays = [
        chunked(q, _2=(4, 0, 7), _3=(1, 2)),
        chunked(k, _2=(20, 3), _1=(2, 1)),
        chunked(v, _2=(1, 22)),
    ]
    with lazy():
        y = sq.linear_attention(*arrays)
        grads = sq.vjp.linear_attention(chunked(grad, _2=(10, 1)), *arrays)
    check(y, sq.linear_attention(q, k, v), 64)
    for one, two in zip(grads, sq.vjp.linear_attention(grad, q, k, v), strict=True):
        check(one, two, 64)


def test_no_tokens(lazy):
    nothing = [da.zeros((2, 0, width)) for width in (D_K, D_K, D_V)]
    with lazy():
        out, state = sq.linear_attention(*nothing, causal=True, return_state=True)
        rows = sq.linear_attention(da.zeros((2, 5, D_K)), *nothing[1:])
        sums, end = sq.logcumsumexp(da.zeros((0, 3)), axis=0, return_state=True)
    assert out.compute().shape == (2, 0, D_V)
    assert (state.key_sums.compute()[:, 0] == -INF).all()
    assert (rows.compute() == 0).all()
    assert sums.compute().shape == (0, 3)
    assert (end.log_sum.compute() == -INF).all()


def test_decays_of_chunks_are_not_rounded():
    """Sums of float32 decays cross chunks exactly: each feature has its own error."""
    n = 4000
    k = np.full((n, D_K), -INF, np.float32)
    k[:40] = scores(50, 40, D_K, dtype=np.float32)
    decay = np.linspace(-0.7, -0.3, n * D_K).reshape(n, D_K).astype(np.float32)
    q, v = 0 * decay, scores(51, n, D_V, dtype=np.float32)
    q[:] = -decay.astype(np.float64).cumsum(axis=0)
    found = sq.linear_attention(
        *(da.from_array(a, chunks=(500, -1)) for a in (q, k, v)),
        log_decay=da.from_array(decay, chunks=(500, -1)),
        causal=True,
    )
    q, k, v, decay = (a.astype(np.float64) for a in (q, k, v, decay))
    expected = sq.linear_attention(q, k, v, log_decay=decay, causal=True)
    check(found, expected.astype(np.float32), 8, floor=1.0)


def test_small_graphs():
    """Tasks grow with the chunks, and no chunk is smaller than it was."""
    x = da.zeros((100_000, 4), chunks=(10_000, 4))
    for out in (
        sq.logcumsumexp(x, axis=0),
        sq.log_linear_recurrence(x, x, axis=0),
        sq.linear_attention(x, x, x, causal=True),
        *sq.vjp.linear_attention(x, x, x, x, causal=True),
    ):
        assert out.chunks == x.chunks
        assert len(out.__dask_graph__()) < 600


def test_blocks_of_another_library():
    """Each block is computed by the backend of its own arrays."""
    strict = pytest.importorskip("array_api_strict")
    x = np.linspace(-3, 5, 12)
    blocks = da.from_array(x, chunks=5).map_blocks(strict.asarray, meta=np.empty(0))
    parts = dask.compute(*sq.logcumsumexp(blocks).to_delayed())
    assert all(type(part) is type(strict.asarray(1.0)) for part in parts)
    np.testing.assert_allclose(
        np.concatenate([np.asarray(part) for part in parts]),
        np.logaddexp.accumulate(x),
        rtol=1e-14,
    )


def test_scans_on_two_processes(tmp_path):
    pytest.importorskip("distributed", reason="distributed is not installed")
    run_on_a_cluster(
        tmp_path,
        """
        for axis in (0, 1):
            out = sq.logcumsumexp(b, axis=axis).compute()
            np.testing.assert_allclose(out, sq.logcumsumexp(y, axis=axis), atol=1e-14)
        out, _ = sq.vjp.log_linear_recurrence(b, b, b, axis=0)
        expected, _ = sq.vjp.log_linear_recurrence(y, y, y, axis=0)
        np.testing.assert_allclose(out.compute(), expected, rtol=1e-9, atol=1e-12)
        """,
    )


def test_attention_on_two_processes(tmp_path):
    pytest.importorskip("distributed", reason="distributed is not installed")
    run_on_a_cluster(
        tmp_path,
        """
        options = {"causal": True, "return_state": True}
        out, state = sq.linear_attention(b, b, b, log_decay=-abs(b), **options)
        expected, end = sq.linear_attention(y, y, y, log_decay=-abs(y), **options)
        np.testing.assert_allclose(out.compute(), expected, atol=1e-13)
        np.testing.assert_allclose(
            state.value_sums.sum(axis=0).compute(), end.value_sums.sum(axis=0)
        )
        for causal in (False, True):
            grads = sq.vjp.linear_attention(b, b, b, b, causal=causal)
            others = sq.vjp.linear_attention(y, y, y, y, causal=causal)
            for one, two in zip(grads, others):
                np.testing.assert_allclose(one.compute(), two, atol=1e-11)
        """,
    )
