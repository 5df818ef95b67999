"""Linear attention against weights of all pairs, in every library."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import subquad as sq
from _arrays import to_numpy
from _oracle import assert_within, epsilon, sum_to
from _oracle_scans import (
    linear_attention,
    linear_attention_vjp,
    linear_attention_vjp_size,
    log_linear_attention,
    log_linear_attention_vjp,
    log_linear_attention_vjp_size,
    logcumsumexp,
)

DTYPES = [np.float32, np.float64]
INF, NAN = np.inf, np.nan
OPTIONS = ["plain", "causal", "decay", "resets", "mask", "segments", "everything"]


def make(rng, n, d_k=3, d_v=2, batch=(), dtype=np.float64, scale=1.0):
    q, k = (scale * rng.standard_normal((*batch, n, d_k)) for _ in range(2))
    v = rng.standard_normal((*batch, n, d_v))
    return tuple(a.astype(dtype) for a in (q, k, v))


def options_of(name, rng, n, d_k=3, dtype=np.float64):
    """Options of a call by the name of what they try."""
    decay = -rng.random((n, d_k)).astype(dtype)
    options = {}
    if name in ("causal", "decay", "resets", "everything"):
        options["causal"] = True
    if name in ("decay", "resets", "everything"):
        if name != "decay":
            decay[rng.random((n, d_k)) < 0.05] = -INF
        options["log_decay"] = decay
    if name in ("mask", "everything"):
        options["key_mask"] = rng.random(n) < 0.8
    if name in ("segments", "everything"):
        options["segment_ids"] = np.arange(n) // 37 % 3
    return options


def of_oracle(options):
    """The same options under the oracle's names."""
    options = dict(options)
    if "segment_ids" in options:
        options["segments"] = options.pop("segment_ids")
    return options


def in_library(xp, options):
    return {
        key: xp.asarray(value) if isinstance(value, np.ndarray) else value
        for key, value in options.items()
    }


def exponents_error(*arrays):
    """Error of a sum of exponents in float64, and of what is made of them."""
    sizes = [np.max(np.abs(a[np.isfinite(a)]), initial=0) for a in arrays]
    return 4 * epsilon(np.float64) * float(sum(sizes))


def check_y(y, log_z, q, k, v, options, *, state_error=0.0):
    """Values to 2e-6 of the largest (float32), logarithms to 2 ulp."""
    expected, expected_z = linear_attention(q, k, v, **of_oracle(options))
    y, log_z = to_numpy(y), to_numpy(log_z)
    decay = options.get("log_decay", np.zeros(1))
    lost = exponents_error(q, k, len(k) * np.where(np.isfinite(decay), decay, 0))
    largest = np.max(np.abs(v[np.isfinite(v)]), initial=0)
    relative = 16 * epsilon(y.dtype) + lost + state_error
    assert_within(y, expected, relative * largest)
    check_logs(log_z, expected_z, lost + state_error)


def check_logs(out, expected, lost=0.0, count=2):
    size = np.where(np.isfinite(expected), np.abs(expected), 0).astype(float)
    unit = np.spacing(np.maximum(size, 16.0).astype(out.dtype)).astype(float)
    assert_within(out, expected, count * unit + lost)


# ------------------------------------------------------------------------ forward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_in_every_library(xp, name, dtype):
    rng = np.random.default_rng(0)
    q, k, v = make(rng, 90, batch=(2,), dtype=dtype)
    options = options_of(name, rng, 90, dtype=dtype)
    y, log_z = sq.linear_attention(
        *map(xp.asarray, (q, k, v)),
        return_log_normalizer=True,
        **in_library(xp, options),
    )
    assert type(y) is xp.array_type()
    assert to_numpy(y).dtype == to_numpy(log_z).dtype == dtype
    check_y(y, log_z, q, k, v, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "n, d_k, d_v",
    [
        (1, 1, 1),
        (2, 1, 3),
        (31, 16, 8),
        (63, 5, 1),
        (64, 64, 64),
        (65, 33, 17),
        (129, 3, 65),
        (300, 16, 8),
        (7, 0, 3),
        (7, 3, 0),
        (0, 3, 2),
    ],
    ids=str,
)
def test_shapes(n, d_k, d_v, causal, dtype):
    rng = np.random.default_rng(n)
    q, k, v = make(rng, n, d_k, d_v, dtype=dtype)
    options = {"causal": causal}
    y, log_z = sq.linear_attention(q, k, v, return_log_normalizer=True, **options)
    assert y.shape == (n, d_v) and log_z.shape == (n,)
    check_y(y, log_z, q, k, v, options)


@pytest.mark.parametrize("n_q, n", [(0, 5), (5, 0), (1, 300), (130, 7)])
def test_rows_and_keys_of_different_numbers(xp, n_q, n):
    rng = np.random.default_rng(1)
    q, _, _ = make(rng, n_q)
    _, k, v = make(rng, n)
    y, log_z = sq.linear_attention(
        *map(xp.asarray, (q, k, v)), return_log_normalizer=True
    )
    check_y(y, log_z, q, k, v, {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "causal", "decay", "resets", "segments"])
@pytest.mark.parametrize("scale", [4, 30, 1e3, 1e4])
def test_exponents_of_any_size(scale, name, dtype):
    rng = np.random.default_rng(2)
    q, k, v = make(rng, 200, 8, 5, dtype=dtype, scale=scale)
    options = options_of(name, rng, 200, 8, dtype)
    if "log_decay" in options:
        options["log_decay"] = options["log_decay"] * dtype(scale / 10)
    y, log_z = sq.linear_attention(q, k, v, return_log_normalizer=True, **options)
    check_y(y, log_z, q, k, v, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["jumps", "ramp", "fall", "spikes", "offset"])
def test_keys_that_rise_and_fall(shape, dtype):
    rng = np.random.default_rng(3)
    q, k, v = make(rng, 200, 4, 3, dtype=dtype)
    t = np.arange(200)[:, None]
    k = (
        k
        + {
            "jumps": np.array([-1e4, 0.0, 1e4])[t // 67],
            "ramp": 3.0 * t,
            "fall": -31.0 * t,
            "spikes": np.where(t % 50 == 7, 400.0, 0.0),
            "offset": np.full((200, 1), 1e5),
        }[shape]
    )
    k = k.astype(dtype)
    for causal in (False, True):
        options = {"causal": causal}
        y, log_z = sq.linear_attention(q, k, v, return_log_normalizer=True, **options)
        check_y(y, log_z, q, k, v, options)


@pytest.mark.parametrize(
    "batches",
    [((2, 1), (3,), (2, 3)), ((4,), (1,), (1,)), ((), (2,), ()), ((1,), (1,), (0,))],
    ids=str,
)
def test_batches_broadcast(xp, batches):
    rng = np.random.default_rng(4)
    n = 20
    q, k, v = (make(rng, n, batch=batch)[place] for place, batch in enumerate(batches))
    options = options_of("everything", rng, n)
    batch = np.broadcast_shapes(*batches)
    options["key_mask"] = rng.random((*batch, n)) < 0.8
    y = sq.linear_attention(*map(xp.asarray, (q, k, v)), **in_library(xp, options))
    full = (np.broadcast_to(a, (*batch, *a.shape[-2:])) for a in (q, k, v))
    expected, _ = linear_attention(*full, **of_oracle(options))
    assert to_numpy(y).shape == expected.shape
    np.testing.assert_allclose(to_numpy(y), expected.astype(float), atol=1e-13)


@pytest.mark.parametrize("shape", [(), (3,), (40, 1), (1, 3), (2, 1, 1, 3)], ids=str)
def test_decays_broadcast(xp, shape):
    rng = np.random.default_rng(5)
    q, k, v = make(rng, 40)
    decay = -rng.random(shape)
    y = sq.linear_attention(
        *map(xp.asarray, (q, k, v)), causal=True, log_decay=xp.asarray(decay)
    )
    full = np.broadcast_to(decay, (*shape[:-2], 40, 3))
    expected, _ = linear_attention(q, k, v, causal=True, log_decay=full)
    np.testing.assert_allclose(to_numpy(y), expected.astype(float), atol=1e-13)


def test_rows_that_attend_nothing(xp):
    rng = np.random.default_rng(6)
    q, k, v = make(rng, 6)
    k[:2] = -INF
    v[:2] = NAN
    q[4] = -INF
    for empty, value in (("zero", 0.0), ("nan", NAN)):
        y, log_z = sq.linear_attention(
            *map(xp.asarray, (q, k, v)),
            causal=True,
            return_log_normalizer=True,
            empty=empty,
        )
        y, log_z = to_numpy(y), to_numpy(log_z)
        np.testing.assert_array_equal(y[[0, 1, 4]], np.full((3, 2), value))
        np.testing.assert_array_equal(log_z[[0, 1, 4]], -INF)
        expected, _ = linear_attention(q, k, v, causal=True)
        np.testing.assert_allclose(y[[2, 3, 5]], expected[[2, 3, 5]].astype(float))
    nothing = xp.asarray(np.zeros(6, bool))
    y = sq.linear_attention(*map(xp.asarray, (q, k, v)), key_mask=nothing)
    np.testing.assert_array_equal(to_numpy(y), 0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_removed_key_counts_for_nothing(xp, causal):
    rng = np.random.default_rng(7)
    q, k, v = make(rng, 12)
    mask = np.ones(12, bool)
    mask[[3, 7]] = False
    expected = sq.linear_attention(q, k, v, key_mask=mask, causal=causal)
    k[3], v[3], k[7], v[7] = NAN, INF, INF, NAN
    y = sq.linear_attention(
        *map(xp.asarray, (q, k, v)), key_mask=xp.asarray(mask), causal=causal
    )
    np.testing.assert_allclose(to_numpy(y), expected, rtol=1e-12)


@pytest.mark.parametrize("where", ["k", "v", "q", "v=inf"])
def test_nan_reaches_what_attends_it(xp, where):
    rng = np.random.default_rng(8)
    n, at = 150, 70
    q, k, v = make(rng, n)
    clean = sq.linear_attention(q, k, v, causal=True)
    {"k": k, "v": v, "q": q, "v=inf": v}[where][at, 0] = INF if "inf" in where else NAN
    y = to_numpy(sq.linear_attention(*map(xp.asarray, (q, k, v)), causal=True))
    np.testing.assert_allclose(y[:at], clean[:at], rtol=1e-12, atol=1e-14)
    if where == "q":
        assert np.isnan(y[at]).all()
        np.testing.assert_allclose(y[at + 1 :], clean[at + 1 :], rtol=1e-12, atol=1e-14)
    elif where == "k":
        assert np.isnan(y[at:]).all()
    else:
        np.testing.assert_array_equal(y[at:, 0], INF if "inf" in where else NAN)
        np.testing.assert_allclose(y[at:, 1], clean[at:, 1], rtol=1e-12, atol=1e-14)
    # Nothing crosses a border, and what is forgotten is gone.
    segments = (np.arange(n) > at).astype(int)
    decay = np.where(np.arange(n)[:, None] == at + 1, -INF, 0.0)
    for options in ({"segment_ids": segments}, {"log_decay": decay}):
        later = sq.linear_attention(
            *map(xp.asarray, (q, k, v)), causal=True, **in_library(xp, options)
        )
        expected = sq.linear_attention(
            q[at + 1 :], k[at + 1 :], v[at + 1 :], causal=True
        )
        np.testing.assert_allclose(
            to_numpy(later)[at + 1 :], expected, rtol=1e-12, atol=1e-14
        )


def test_invariances():
    rng = np.random.default_rng(9)
    q, k, v = make(rng, 100, 6, 4)
    for options in ({}, {"causal": True}):
        y = sq.linear_attention(q, k, v, **options)

        def same(*arrays, offset=0.0, y=y, options=options):
            moved = sq.linear_attention(*arrays, **options)
            np.testing.assert_allclose(moved, y + offset, rtol=0, atol=2e-13)

        c = rng.standard_normal(6)
        same(q + rng.standard_normal((100, 1)), k, v)
        same(q - c, k + c, v)
        same(q, k + 3.0, v)
        same(q, k, v + np.arange(4), offset=np.arange(4))
        assert (y >= v.min(0) - 1e-14).all() and (y <= v.max(0) + 1e-14).all()
        ones = sq.linear_attention(q, k, np.ones((100, 1)), **options)
        np.testing.assert_allclose(ones, 1, rtol=0, atol=1e-15)


def test_types_of_results(xp):
    rng = np.random.default_rng(10)
    q, k, v = make(rng, 10, dtype=np.float32)
    half = v.astype(np.float16)
    y, log_z, state = sq.linear_attention(
        xp.asarray(q),
        xp.asarray(k),
        xp.asarray(v.astype(np.float64)),
        return_log_normalizer=True,
        return_state=True,
    )
    assert to_numpy(y).dtype == to_numpy(log_z).dtype == np.float64
    assert to_numpy(state.key_sums).dtype == np.float64
    y, log_z = sq.linear_attention(
        xp.asarray(q.astype(np.float64)),
        xp.asarray(k),
        xp.asarray(v),
        return_log_normalizer=True,
    )
    assert (to_numpy(y).dtype, to_numpy(log_z).dtype) == (np.float32, np.float64)
    try:
        half = xp.asarray(half)
    except TypeError:
        return
    y, log_z = sq.linear_attention(
        xp.asarray(q), xp.asarray(k), half, return_log_normalizer=True
    )
    assert (to_numpy(y).dtype, to_numpy(log_z).dtype) == (np.float16, np.float32)
    expected, _ = linear_attention(q, k, to_numpy(half))
    assert_within(to_numpy(y), expected, 2e-3)
    out = sq.log_linear_attention(half, half, half)
    assert to_numpy(out.log_abs_y).dtype == to_numpy(out.sign_y).dtype == np.float32


def test_inputs_of_any_layout():
    rng = np.random.default_rng(11)
    q, k, v = make(rng, 40, 4, 6, batch=(2,))
    decay = -rng.random((2, 40, 4))
    expected = sq.linear_attention(q, k, v, causal=True, log_decay=decay)

    def odd(a):
        wide = np.zeros((*a.shape[:-2], 2 * a.shape[-1], a.shape[-2]))
        view = np.swapaxes(wide, -1, -2)[..., ::-1, ::-2]
        view[...] = a
        return view

    found = sq.linear_attention(
        odd(q), odd(k), odd(v), causal=True, log_decay=odd(decay)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)


def test_memory_does_not_grow_with_features_times_values():
    rng = np.random.default_rng(12)
    q, k, v = make(rng, 65536, 64, 64, dtype=np.float32)
    outputs = v.nbytes
    sq.linear_attention(q[:64], k[:64], v[:64], causal=True)
    tracemalloc.start()
    try:
        sq.linear_attention(q, k, v, causal=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - outputs < 64 << 20


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1, 30, 1e3])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name, scale, dtype):
    rng = np.random.default_rng(13)
    n, d_k, d_v = 150, 6, 4
    q, k, v = make(rng, n, d_k, d_v, dtype=dtype, scale=scale)
    options = options_of(name, rng, n, d_k, dtype)
    gy = rng.standard_normal((n, d_v)).astype(dtype)
    gz = rng.standard_normal(n).astype(dtype)
    found = sq.vjp.linear_attention((gy, gz), q, k, v, **options)
    arguments = (gy, gz, q, k, v)
    expected = linear_attention_vjp(*arguments, **of_oracle(options))
    sizes = linear_attention_vjp_size(*arguments, **of_oracle(options))
    check_gradients(found, expected, sizes, (q, k), options, dtype)


def check_gradients(found, expected, sizes, arrays, options, dtype):
    # Sums over 64 tokens at a time, in whatever order, and exponents in float64.
    decay = options.get("log_decay", np.zeros((1, 1)))
    finite = np.where(np.isfinite(decay), decay, 0)
    lost = exponents_error(*map(np.asarray, arrays), np.abs(finite).sum(0))
    relative = 64 * epsilon(dtype) + 4 * lost
    assert len(found) == 3 + ("log_decay" in options)
    for place, gradient in enumerate(found):
        value = expected[place]
        if place == 3:
            value = np.where(decay == -INF, 0, value)
        # A factor of a weight may underflow where the weight, e^30 times it, would not.
        lowest = 100 * np.exp(30.0) * float(np.finfo(dtype).tiny)
        bound = relative * sizes[place] + lowest
        assert_within(to_numpy(gradient), value, bound.astype(float))


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_in_every_library(xp, name):
    rng = np.random.default_rng(14)
    n, batch = 80, (2,)
    q, k, v = make(rng, n, batch=batch)
    q, v = q[0], v[:1]
    options = options_of(name, rng, n)
    gy, gz = rng.standard_normal((2, n, 2)), rng.standard_normal((2, n))
    found = sq.vjp.linear_attention(
        (xp.asarray(gy), xp.asarray(gz)),
        *map(xp.asarray, (q, k, v)),
        **in_library(xp, options),
    )
    expected = linear_attention_vjp(gy, gz, q, k, v, **of_oracle(options))
    for place, given in enumerate((q, k, v, options.get("log_decay"))[: len(found)]):
        value = sum_to(expected[place], given.shape)
        value = np.where(given == -INF, 0, value) if place == 3 else value
        assert type(found[place]) is xp.array_type()
        assert to_numpy(found[place]).shape == given.shape
        np.testing.assert_allclose(
            to_numpy(found[place]), value.astype(float), rtol=0, atol=1e-11
        )


@pytest.mark.parametrize("causal", [False, True])
def test_sums_of_gradients(causal):
    rng = np.random.default_rng(15)
    q, k, v = make(rng, 120, 5, 3)
    gy = rng.standard_normal((120, 3))
    gq, gk, gv = sq.vjp.linear_attention(gy, q, k, v, causal=causal)
    np.testing.assert_allclose(gq.sum(-1), 0, atol=1e-13)
    np.testing.assert_allclose(gq.sum(0), gk.sum(0), atol=1e-12)
    np.testing.assert_allclose(gk.sum(), 0, atol=1e-12)
    np.testing.assert_allclose(gv.sum(0), gy.sum(0), atol=1e-12)
    # Values that are moved by a constant change nothing but rounding.
    moved = sq.vjp.linear_attention(gy, q, k, v + 1000.0, causal=causal)
    for one, other in zip((gq, gk, gv), moved, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-11)


def test_rows_that_attend_nothing_have_no_gradients(xp):
    rng = np.random.default_rng(16)
    q, k, v = make(rng, 8)
    k[:3], v[:3] = -INF, NAN
    found = sq.vjp.linear_attention(
        xp.asarray(np.ones((8, 2))), *map(xp.asarray, (q, k, v)), causal=True
    )
    expected = sq.vjp.linear_attention(
        np.ones((5, 2)), q[3:], k[3:], v[3:], causal=True
    )
    for gradient, value in zip(found, expected, strict=True):
        np.testing.assert_array_equal(to_numpy(gradient)[:3], 0)
        np.testing.assert_allclose(to_numpy(gradient)[3:], value, atol=1e-14)


def logs_of_state(state):
    """What a state stands for, whatever its scale."""
    return np.log(np.abs(state.numerator)) + state.log_scale[..., None], (
        np.log(state.denominator) + state.log_scale
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_states_by_differences(xp, name):
    rng = np.random.default_rng(17)
    n = 7
    before = make(rng, 5)
    q, k, v = make(rng, n)
    # Sums that cancel have logarithms whose differences say little.
    v, before[2][:] = v + 4, before[2] + 4
    options = options_of(name, rng, n)
    if "segment_ids" in options:
        options["segment_ids"] = np.arange(n) // 4
    start = sq.AttentionState.init((), 3, 2).update(*before[1:])
    gy, gz = rng.standard_normal((n, 2)), rng.standard_normal(n)
    g_num, g_den = rng.standard_normal((3, 2)), rng.standard_normal(3)
    g_decay = rng.standard_normal(3)
    decay = options.pop("log_decay", None)
    other = {} if decay is None else {"log_decay": decay}

    def value(q, k, v, key_sums, value_sums, log_decay=None):
        y, log_z, state = sq.linear_attention(
            q,
            k,
            v,
            state=sq.AttentionState(key_sums, value_sums),
            return_state=True,
            return_log_normalizer=True,
            **options,
            **({} if log_decay is None else {"log_decay": log_decay}),
        )
        log_num, log_den = logs_of_state(state)
        total = (gy * y).sum() + (gz * log_z).sum()
        total += (g_num * log_num).sum() + (g_den * log_den).sum()
        return total + (g_decay * np.where(forgotten, 0, state.log_decay)).sum()

    forgotten = np.zeros(3, bool)
    if decay is not None:
        forgotten = (decay == -INF).any(0)
    result = sq.linear_attention(
        q, k, v, state=start, return_state=True, **options, **other
    ).state
    grads = sq.AttentionState(
        np.zeros((5, 3)), np.stack([g_num / result.numerator, np.zeros((3, 2))])
    )
    grads.key_sums[2] = g_den / result.denominator
    grads.key_sums[4] = np.where(forgotten, 0, g_decay)
    found = sq.vjp.linear_attention(
        (
            xp.asarray(gy),
            xp.asarray(gz),
            sq.AttentionState(*map(xp.asarray, (grads.key_sums, grads.value_sums))),
        ),
        *map(xp.asarray, (q, k, v)),
        state=sq.AttentionState(*map(xp.asarray, (start.key_sums, start.value_sums))),
        **in_library(xp, {**options, **other}),
    )
    arrays = [q, k, v, start.key_sums, start.value_sums]
    gradients = [*found[:3], found[-1].key_sums, found[-1].value_sums]
    if decay is not None:
        arrays.append(decay)
        gradients.append(found[3])
    for which, gradient in enumerate(gradients):
        expected = derivative(value, arrays, which)
        if which == 3:
            # The scale is a constant, and what rounding took from a sum is as good as
            # the sum; a difference is no such thing, and need not be looked at.
            expected[:2] = 0
            expected[3] = expected[2]
        if which == 4:
            expected[1] = expected[0]
        if which == 5:
            expected[decay == -INF] = 0
        np.testing.assert_allclose(to_numpy(gradient), expected, rtol=0, atol=2e-9)


def derivative(f, arrays, which, h=1e-3):
    """Derivative of a number in each entry of an array, of fourth order."""
    out = np.zeros(arrays[which].shape)
    for at in np.ndindex(out.shape):

        def value(step, at=at):
            moved = [a.copy() for a in arrays]
            moved[which][at] += step
            return f(*moved)

        out[at] = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (
            12 * h
        )
    return out


# ------------------------------------------------------------------------- states


def parts_of(options, span):
    cut = dict(options)
    for name in ("log_decay", "key_mask"):
        if name in cut:
            cut[name] = cut[name][span]
    return cut


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["causal", "decay", "resets", "mask"])
@pytest.mark.parametrize("scale", [1, 100])
def test_any_split_equals_one_pass(xp, name, scale, dtype):
    rng = np.random.default_rng(18)
    n = 150
    q, k, v = make(rng, n, dtype=dtype, scale=scale)
    options = options_of(name, rng, n, dtype=dtype)
    options["causal"] = True
    whole = sq.linear_attention(
        *map(xp.asarray, (q, k, v)), return_state=True, **in_library(xp, options)
    )
    state, parts = None, []
    for span in np.split(np.arange(n), [1, 2, 40, 40, 77]):
        y, state = sq.linear_attention(
            *(xp.asarray(a[span]) for a in (q, k, v)),
            state=state,
            return_state=True,
            **in_library(xp, parts_of(options, span)),
        )
        parts.append(to_numpy(y))
    largest = float(np.abs(v).max())
    bound = 2 * epsilon(dtype) * largest + exponents_error(q, k) * largest
    assert_within(np.concatenate(parts), to_numpy(whole.y), bound)
    same_state(state, whole.state, dtype, exponents_error(q, k))


def same_state(state, other, dtype, lost=0.0, largest=4.0):
    """Two states that stand for the same sums.

    Numerators may cancel: they are compared as what they are of the denominators, up to
    `largest`, a bound on the values.
    """
    one, two = state.to_log(), other.to_log()
    z_one, z_two = to_numpy(one.log_denominator), to_numpy(two.log_denominator)
    check_logs(z_one, z_two, 20 * lost, count=8)
    present = z_two > -INF
    sums = []
    for log, z in ((one, z_one), (two, z_two)):
        value = to_numpy(log.log_numerator).astype(float)[present]
        sign = to_numpy(log.sign_numerator).astype(float)[present]
        sums.append(sign * np.exp(value - z[present][..., None]))
    unit = np.spacing(np.maximum(np.abs(z_two[present]), 16.0)).astype(float)
    bound = (16 * unit + 20 * lost)[..., None] * largest
    assert_within(sums[0], sums[1], np.broadcast_to(bound, sums[0].shape))
    np.testing.assert_allclose(
        to_numpy(state.log_decay), to_numpy(other.log_decay), rtol=1e-5
    )


@pytest.mark.skip_xp_backend(
    "dask", reason="every graph holds the tokens before it: 70 times all of them"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["causal", "decay", "resets"])
def test_token_by_token(xp, name, dtype):
    rng = np.random.default_rng(19)
    n = 70
    q, k, v = make(rng, n, batch=(2,), dtype=dtype, scale=3)
    options = options_of(name, rng, n, dtype=dtype)
    decay = options.get("log_decay")
    whole = sq.linear_attention(
        *map(xp.asarray, (q, k, v)), return_state=True, **in_library(xp, options)
    )
    state = sq.AttentionState.init((2,), 3, 2, like=xp.asarray(q))
    for t in range(n):
        before = [to_numpy(a).copy() for _, a in state._arrays()]
        y, after = state.step(
            *(xp.asarray(a[:, t]) for a in (q, k, v)),
            None if decay is None else xp.asarray(decay[t]),
        )
        # What it was is left as it was.
        for old, (_, new) in zip(before, state._arrays(), strict=True):
            np.testing.assert_array_equal(old, to_numpy(new))
        state = after
        expected = to_numpy(whole.y)[:, t]
        assert type(y) is xp.array_type()
        assert_within(to_numpy(y), expected, 16 * epsilon(dtype) * np.abs(v).max())
    same_state(state, whole.state, dtype, exponents_error(q, k))
    folded = state.finalize()
    assert folded.recent_keys is None
    same_state(folded, whole.state, dtype, exponents_error(q, k))


def test_a_step_of_a_row_that_attends_nothing(xp):
    like = xp.asarray(np.zeros(3))
    nothing = xp.asarray(np.full(3, -INF))
    state = sq.AttentionState.init((), 3, 3, like=like)
    for empty, value in (("zero", 0.0), ("nan", NAN)):
        y, _ = state.step(like, nothing, like, empty=empty)
        np.testing.assert_array_equal(to_numpy(y), value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["causal", "decay", "resets"])
def test_merge(xp, name, dtype):
    rng = np.random.default_rng(20)
    n = 60
    _, k, v = make(rng, n, dtype=dtype, scale=10)
    decay = options_of(name, rng, n, dtype=dtype).get("log_decay")
    start = sq.AttentionState.init((), 3, 2, like=xp.asarray(k))

    def state_of(span):
        return start.update(
            xp.asarray(k[span]),
            xp.asarray(v[span]),
            None if decay is None else xp.asarray(decay[span]),
        )

    a, b, c = map(state_of, np.split(np.arange(n), [13, 14]))
    whole = state_of(np.arange(n))
    lost = exponents_error(k)
    same_state(a.merge(b).merge(c), whole, dtype, lost)
    same_state(sq.AttentionState.merge(a, b.merge(c)), whole, dtype, lost)
    same_state(start.merge(whole), whole, dtype, lost)
    same_state(whole.merge(start), whole, dtype, lost)
    assert type(a.merge(b).key_sums) is xp.array_type()


def test_merge_with_recent_tokens(xp):
    rng = np.random.default_rng(21)
    q, k, v = (xp.asarray(a) for a in make(rng, 40))
    start = sq.AttentionState.init((), 3, 2, like=q)
    parts = []
    for span in (range(25), range(25, 40)):
        state = start
        for t in span:
            _, state = state.step(q[t, :], k[t, :], v[t, :])
        parts.append(state)
    same_state(parts[0].merge(parts[1]), start.update(k, v), np.float64)


def test_states_in_logarithms(xp):
    rng = np.random.default_rng(22)
    n = 30
    q, k, v = make(rng, n, scale=50)
    whole = sq.linear_attention(
        *map(xp.asarray, (q, k, v)), causal=True, return_state=True
    )
    logs = whole.state.to_log()
    # The latent state of the paper: cumulative sums of exponentials.
    expected = logcumsumexp(k, 0)[-1]
    check_logs(to_numpy(logs.log_denominator), expected)
    total = np.exp(k - expected.astype(float)).T @ v
    np.testing.assert_array_equal(to_numpy(logs.sign_numerator), np.sign(total))
    again = sq.AttentionState.from_log(logs)
    same_state(again, whole.state, np.float64, exponents_error(k))
    more = [xp.asarray(a) for a in make(rng, 5, scale=50)]
    one = sq.linear_attention(*more, causal=True, state=again)
    two = sq.linear_attention(*more, causal=True, state=whole.state)
    np.testing.assert_allclose(to_numpy(one), to_numpy(two), rtol=0, atol=1e-12)


def test_states_are_kept_and_picked(tmp_path, xp):
    rng = np.random.default_rng(23)
    q, k, v = (xp.asarray(a) for a in make(rng, 5, batch=(3,)))
    state = sq.AttentionState.init((3,), 3, 2, like=q)
    for t in range(5):
        _, state = state.step(q[:, t, :], k[:, t, :], v[:, t, :])
    state.save(tmp_path / "state.npz")
    again = sq.AttentionState.load(tmp_path / "state.npz", like=q)
    y, _ = state.step(q[:, 0, :], k[:, 0, :], v[:, 0, :])
    for other in (again, again.take(xp.asarray(np.arange(3)))):
        found, _ = other.step(q[:, 0, :], k[:, 0, :], v[:, 0, :])
        np.testing.assert_array_equal(to_numpy(found), to_numpy(y))
    # A beam of two from the last sequence, and one from the first.
    beam = state.take(xp.asarray(np.array([2, 2, 0])))
    found, _ = beam.step(q[:, 0, :], k[:, 0, :], v[:, 0, :])
    expected, _ = state[2].step(q[0, 0, :], k[0, 0, :], v[0, 0, :])
    np.testing.assert_allclose(to_numpy(found)[0], to_numpy(expected), rtol=1e-13)


@pytest.mark.parametrize("name", ["segments", "everything"])
def test_segments_are_sequences_of_their_own(xp, name):
    rng = np.random.default_rng(24)
    n = 90
    q, k, v = make(rng, n)
    options = options_of(name, rng, n)
    options["segment_ids"] = np.repeat([1, 0, 1, 3], [30, 1, 40, 19])
    before = make(rng, 4)
    start = sq.AttentionState.init((), 3, 2).update(*before[1:])
    found = sq.linear_attention(
        *map(xp.asarray, (q, k, v)),
        state=sq.AttentionState(*map(xp.asarray, (start.key_sums, start.value_sums))),
        return_state=True,
        **in_library(xp, options),
    )
    del options["segment_ids"]
    for place, span in enumerate(np.split(np.arange(n), [30, 31, 71])):
        y, state = sq.linear_attention(
            q[span],
            k[span],
            v[span],
            state=start if place == 0 else None,
            return_state=True,
            **parts_of(options, span),
        )
        np.testing.assert_allclose(
            to_numpy(found.y)[span], y, rtol=0, atol=1e-13 * np.abs(v).max()
        )
    same_state(found.state, state, np.float64)


# --------------------------------------------------------------- values in logarithms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scale", [1, 30, 1e3, 1e4])
def test_log_attention(scale, signed, name, dtype):
    rng = np.random.default_rng(25)
    n = 100
    q, k, _ = make(rng, n, 4, 3, dtype=dtype, scale=scale)
    log_v = (scale * rng.standard_normal((n, 3))).astype(dtype)
    log_v[::9, 1] = -INF
    sign = rng.choice([-1, 1], (n, 3)) if signed else None
    options = options_of(name, rng, n, 4, dtype)
    out = sq.log_linear_attention(
        q, k, log_v, sign_v=sign, return_log_normalizer=True, **options
    )
    check_log_attention(out, q, k, log_v, sign, options)


def check_log_attention(out, q, k, log_v, sign, options):
    expected = log_linear_attention(q, k, log_v, sign, **of_oracle(options))
    log_y, sign_y, log_z = (to_numpy(a) for a in out[:3])
    decay = options.get("log_decay", np.zeros((1, 1)))
    finite = np.abs(np.where(np.isfinite(decay), decay, 0)).sum(0)
    lost = exponents_error(q, k, log_v, finite)
    with np.errstate(all="ignore"):
        ratio = np.where(expected[3] == -INF, 0, np.exp(expected[3] - expected[0]))
    bound = (16 * epsilon(log_y.dtype) + lost) * ratio
    # Where terms cancel, what is left is rounding.
    sure = bound < 0.1
    assert sure.mean() > 0.95
    unit = np.where(np.isfinite(expected[0]), np.abs(expected[0]), 0).astype(float)
    unit = np.spacing(np.maximum(unit, 16).astype(log_y.dtype)).astype(float)
    bound = (2 * unit + bound).astype(float)
    assert_within(log_y[sure], expected[0][sure], bound[sure])
    np.testing.assert_array_equal(sign_y[sure], expected[1][sure].astype(float))
    check_logs(log_z, expected[2], lost)


@pytest.mark.parametrize("name", OPTIONS)
def test_log_attention_in_every_library(xp, name):
    rng = np.random.default_rng(26)
    n = 80
    q, k, log_v = make(rng, n, batch=(2,), scale=20)
    sign = rng.choice([-1, 1], (n, 2))
    options = options_of(name, rng, n)
    out = sq.log_linear_attention(
        *map(xp.asarray, (q, k, log_v)),
        sign_v=xp.asarray(sign),
        return_log_normalizer=True,
        return_state=True,
        **in_library(xp, options),
    )
    assert type(out.log_abs_y) is type(out.sign_y) is xp.array_type()
    assert isinstance(out.state, sq.LogAttentionState)
    check_log_attention(out, q, k, log_v, np.broadcast_to(sign, log_v.shape), options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_that_a_factored_form_loses(dtype):
    k = np.array([[0.0], [-200.0], [-200.0]], dtype)
    log_v = np.array([[-110.0], [0.0], [0.0]], dtype)
    out = sq.log_linear_attention(np.zeros((3, 1), dtype), k, log_v, causal=True)
    np.testing.assert_allclose(out.log_abs_y[:, 0], -110, rtol=1e-6)
    scale = dtype(1e4)
    out = sq.log_linear_attention(
        np.zeros((3, 1), dtype), k * scale, log_v * scale, causal=True
    )
    np.testing.assert_allclose(out.log_abs_y[:, 0], -1.1e6, rtol=1e-6)


def test_values_of_zero_and_values_that_cancel(xp):
    zeros = xp.asarray(np.zeros((2, 1)))
    log_v = np.array([[0.0, -INF, 3.0], [0.0, -INF, -INF]])
    sign = np.array([[1, 1, -1], [-1, 1, 1]])
    out = sq.log_linear_attention(
        zeros, zeros, xp.asarray(log_v), sign_v=xp.asarray(sign)
    )
    half = 3 - np.log(2)
    np.testing.assert_allclose(to_numpy(out.log_abs_y), [[-INF, -INF, half]] * 2)
    np.testing.assert_array_equal(to_numpy(out.sign_y), [[0, 0, -1]] * 2)
    found = sq.vjp.log_linear_attention(
        xp.asarray(np.ones((2, 3))),
        zeros,
        zeros,
        xp.asarray(log_v),
        sign_v=xp.asarray(sign),
    )
    np.testing.assert_allclose(to_numpy(found[2]), [[0, 0, 2], [0, 0, 0]], atol=1e-15)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("scale", [1, 30, 1e3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_log_attention(scale, name, signed, dtype):
    rng = np.random.default_rng(27)
    n = 90
    q, k, _ = make(rng, n, 4, 3, dtype=dtype, scale=scale)
    log_v = (scale * rng.standard_normal((n, 3))).astype(dtype)
    log_v[::9, 1] = -INF
    sign = rng.choice([-1, 1], (n, 3)) if signed else None
    options = options_of(name, rng, n, 4, dtype)
    gy = rng.standard_normal((n, 3)).astype(dtype)
    gz = rng.standard_normal(n).astype(dtype)
    arguments = (gy, gz, q, k, log_v, sign)
    sizes = log_linear_attention_vjp_size(*arguments, **of_oracle(options))
    found = sq.vjp.log_linear_attention((gy, gz), q, k, log_v, sign_v=sign, **options)
    expected = log_linear_attention_vjp(*arguments, **of_oracle(options))
    largest = np.max(np.abs(log_v[np.isfinite(log_v)]))
    check_gradients(found, expected, sizes, (q, k, largest), options, dtype)
    assert (found[2][log_v == -INF] == 0).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_log_states_by_differences(xp, name):
    rng = np.random.default_rng(28)
    n = 6
    before, (q, k, log_v) = make(rng, 4), make(rng, n)
    options = options_of(name, rng, n)
    if "segment_ids" in options:
        options["segment_ids"] = np.arange(n) // 4
    sign = rng.choice([-1, 1], (n, 2))
    start = sq.AttentionState.init((), 3, 2).update(*before[1:]).to_log()
    gy, gz = rng.standard_normal((n, 2)), rng.standard_normal(n)
    g_num, g_den = rng.standard_normal((3, 2)), rng.standard_normal(3)
    decay = options.pop("log_decay", None)
    other = {} if decay is None else {"log_decay": decay}

    def value(q, k, log_v, log_num, log_den, log_decay=None):
        log_y, _, log_z, state = sq.log_linear_attention(
            q,
            k,
            log_v,
            sign_v=sign,
            state=sq.LogAttentionState(log_num, start.sign_numerator, log_den),
            return_state=True,
            return_log_normalizer=True,
            **options,
            **({} if log_decay is None else {"log_decay": log_decay}),
        )
        total = (gy * log_y).sum() + (gz * log_z).sum()
        return (
            total
            + (g_num * state.log_numerator).sum()
            + (g_den * state.log_denominator).sum()
        )

    found = sq.vjp.log_linear_attention(
        (
            xp.asarray(gy),
            xp.asarray(gz),
            sq.LogAttentionState(*map(xp.asarray, (g_num, g_num, g_den))),
        ),
        *map(xp.asarray, (q, k, log_v)),
        sign_v=xp.asarray(sign),
        state=sq.LogAttentionState(
            *map(
                xp.asarray,
                (start.log_numerator, start.sign_numerator, start.log_denominator),
            )
        ),
        **in_library(xp, {**options, **other}),
    )
    arrays = [q, k, log_v, start.log_numerator, start.log_denominator]
    state = found[-1]
    gradients = [*found[:3], state.log_numerator, state.log_denominator]
    if decay is not None:
        arrays.append(decay)
        gradients.append(found[3])
    for which, gradient in enumerate(gradients):
        expected = derivative(value, arrays, which, h=2e-4)
        if which == 5:
            expected[decay == -INF] = 0
        scale = 1 + np.abs(expected).max()
        np.testing.assert_allclose(
            to_numpy(gradient), expected, rtol=0, atol=1e-7 * scale
        )


def test_log_states_stream(xp):
    rng = np.random.default_rng(29)
    n = 60
    q, k, log_v = make(rng, n, scale=100)
    sign = rng.choice([-1, 1], (n, 2))
    decay = -rng.random((n, 3))
    arrays = (q, k, log_v)
    whole = sq.log_linear_attention(
        *map(xp.asarray, arrays),
        sign_v=xp.asarray(sign),
        causal=True,
        log_decay=xp.asarray(decay),
        return_state=True,
    )
    state = sq.LogAttentionState.init((), 3, 2, like=xp.asarray(q))
    for span in np.split(np.arange(n), [1, 20, 20, 43]):
        log_y, sign_y, state = sq.log_linear_attention(
            *(xp.asarray(a[span]) for a in arrays),
            sign_v=xp.asarray(sign[span]),
            causal=True,
            log_decay=xp.asarray(decay[span]),
            state=state,
            return_state=True,
        )
        expected = to_numpy(whole.log_abs_y)[span]
        np.testing.assert_allclose(to_numpy(log_y), expected, rtol=1e-11, atol=1e-9)
        np.testing.assert_array_equal(to_numpy(sign_y), to_numpy(whole.sign_y)[span])
    np.testing.assert_allclose(
        to_numpy(state.log_numerator), to_numpy(whole.state.log_numerator), rtol=1e-11
    )


# ------------------------------------------------------------------- what is refused


Q, K, V = np.zeros((4, 3)), np.zeros((4, 3)), np.zeros((4, 2))
STATE = sq.AttentionState(np.zeros((5, 3)), np.zeros((2, 3, 2)))
X = np.zeros((2, 4))


def refused(error, words, call):
    pattern = r"(?is)" + "".join(rf"(?=.*{word})" for word in words)
    with pytest.raises(error, match=pattern):
        call()


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex128])
def test_data_must_be_real_floating(dtype):
    name = np.dtype(dtype).name
    for place, argument in enumerate(("log_q", "log_k", "v")):
        arrays = [Q, K, V]
        arrays[place] = arrays[place].astype(dtype)
        refused(
            TypeError,
            [rf"\b{argument}\b", name],
            lambda arrays=arrays: sq.linear_attention(*arrays),
        )
    decay = np.zeros((4, 3), dtype)
    refused(
        TypeError,
        ["log_decay", name],
        lambda: sq.linear_attention(Q, K, V, causal=True, log_decay=decay),
    )


def test_options_must_be_of_their_kind():
    refused(
        TypeError,
        ["key_mask", "bool", "int64"],
        lambda: sq.linear_attention(Q, K, V, key_mask=np.ones(4, np.int64)),
    )
    refused(
        TypeError,
        ["segment_ids", "integers", "float64"],
        lambda: sq.linear_attention(Q, K, V, segment_ids=np.ones(4)),
    )
    refused(
        TypeError,
        ["sign_v", "bool"],
        lambda: sq.log_linear_attention(Q, K, V, sign_v=np.ones((4, 2), bool)),
    )
    refused(
        TypeError,
        ["causal", "'yes'"],
        lambda: sq.linear_attention(Q, K, V, causal="yes"),
    )
    refused(
        ValueError,
        ["empty", "zero", "nan", "'inf'"],
        lambda: sq.linear_attention(Q, K, V, empty="inf"),
    )
    refused(
        TypeError,
        ["state", "AttentionState", "ndarray"],
        lambda: sq.linear_attention(Q, K, V, state=np.zeros((5, 3))),
    )
    refused(
        ValueError,
        ["log_decay", "causal"],
        lambda: sq.linear_attention(Q, K, V, log_decay=np.zeros((4, 3))),
    )


@pytest.mark.parametrize("bad", [None, 1.0, [[1.0]]], ids=repr)
def test_data_must_be_arrays(bad):
    refused(TypeError, ["log_q"], lambda: sq.linear_attention(bad, K, V))
    refused(TypeError, ["log_k"], lambda: sq.linear_attention(Q, bad, V))
    refused(TypeError, [r"\bv\b"], lambda: sq.linear_attention(Q, K, bad))
    refused(TypeError, ["log_v"], lambda: sq.log_linear_attention(Q, K, bad))
    state = sq.AttentionState.init((), 3, 2)
    refused(TypeError, ["log_k"], lambda: state.step(Q[0], bad, V[0]))


def test_shapes_must_fit():
    call = sq.linear_attention
    refused(ValueError, ["log_q", "1 dim"], lambda: call(Q[0], K, V))
    refused(ValueError, ["log_k", "1 dim"], lambda: call(Q, K[0], V))
    refused(ValueError, [r"\bv\b", "1 dim"], lambda: call(Q, K, V[0]))
    refused(ValueError, ["log_q", "d_k = 3", "2"], lambda: call(Q[:, :2], K, V))
    refused(ValueError, [r"\bv\b", "n = 4", "3"], lambda: call(Q, K, V[:3]))
    refused(ValueError, ["log_q", "n = 4", "3"], lambda: call(Q[:3], K, V, causal=True))
    ids = np.zeros(4, int)
    refused(
        ValueError,
        ["log_q", "n = 4", "3"],
        lambda: call(Q[:3], K, V, segment_ids=ids),
    )
    refused(
        ValueError,
        ["segment_ids", "4", "3"],
        lambda: call(Q, K, V, segment_ids=ids[:3]),
    )
    refused(
        ValueError,
        ["key_mask", "4", "3"],
        lambda: call(Q, K, V, key_mask=np.ones(3, bool)),
    )
    refused(
        ValueError,
        ["log_decay", "4, 3"],
        lambda: call(Q, K, V, causal=True, log_decay=np.zeros((4, 2))),
    )
    refused(
        ValueError,
        ["log_k", "batch"],
        lambda: call(Q, np.zeros((2, 4, 3)), np.zeros((3, 4, 2))),
    )
    refused(
        ValueError,
        ["state.key_sums", "5, 3", "5, 4"],
        lambda: call(
            Q, K, V, state=sq.AttentionState(np.zeros((5, 4)), STATE.value_sums)
        ),
    )
    refused(
        ValueError,
        ["state.value_sums", "2, 3, 2"],
        lambda: call(
            Q, K, V, state=sq.AttentionState(STATE.key_sums, np.zeros((3, 2)))
        ),
    )
    refused(
        ValueError,
        ["state", "batch"],
        lambda: call(
            np.zeros((2, 4, 3)), K, V, state=sq.AttentionState.init((3,), 3, 2)
        ),
    )
    refused(
        ValueError,
        ["other", "5, 3", "5, 4"],
        lambda: STATE.merge(sq.AttentionState.init((), 4, 2)),
    )
    number = np.array(0.0)
    refused(ValueError, ["log_q", "number"], lambda: STATE.step(number, K[0], V[0]))
    refused(ValueError, ["grad", "4, 2"], lambda: sq.vjp.linear_attention(Q, Q, K, V))
    refused(
        ValueError,
        ["out", "4, 2"],
        lambda: sq.vjp.linear_attention(V, Q, K, V, out=V[:2]),
    )
    refused(TypeError, ["grad"], lambda: sq.vjp.linear_attention(None, Q, K, V))


def test_libraries_must_not_be_mixed():
    strict = pytest.importorskip("array_api_strict")
    for place in range(3):
        arrays = [Q, K, V]
        arrays[place] = strict.asarray(arrays[place])
        refused(
            TypeError,
            ["numpy", "array_api_strict"],
            lambda arrays=arrays: sq.linear_attention(*arrays),
        )
    state = sq.AttentionState.init((), 3, 2, like=strict.asarray(Q))
    refused(
        TypeError,
        ["state.key_sums", "array_api_strict"],
        lambda: sq.linear_attention(Q, K, V, state=state),
    )
