"""Scans of exponentials against sums over all pairs, in every library."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

import subquad as sq
from _arrays import to_numpy
from _oracle import assert_within, epsilon
from _oracle_scans import (
    log_linear_recurrence,
    logcumsumexp,
    logcumsumexp_vjp,
    signed_logcumsumexp,
)

DTYPES = [np.float32, np.float64]
INF, NAN = np.inf, np.nan
FLAGS = [(False, False), (False, True), (True, False), (True, True)]


def ulps(values, dtype, floor=16.0):
    """Units in the last place of max(|values|, floor)."""
    size = np.where(np.isfinite(values), np.abs(values), 0).astype(np.float64)
    size = np.minimum(np.maximum(size, floor), float(np.finfo(dtype).max))
    return np.spacing(size.astype(dtype)).astype(np.float64)


def check(out, expected, count=2):
    """Assert that logarithms are right to units in the last place."""
    out = to_numpy(out)
    assert_within(out, expected, count * ulps(expected, out.dtype))


def rounded(rng, *shape, dtype=np.float64, scale=1.0, shift=0.0):
    return (scale * rng.standard_normal(shape) + shift).astype(dtype)


def hard(name, n, rng):
    """Inputs that shortcuts get wrong."""
    x = rng.standard_normal(n)
    if name == "wide":
        return 100 * x
    if name == "huge":
        return 1e4 * x
    if name == "shifted":
        return x + 1e4
    if name == "increasing":
        return np.linspace(0, 1e4, n)
    if name == "decreasing":
        return np.linspace(1e4, -1e4, n)
    if name == "alternating":
        return np.where(np.arange(n) % 2 == 0, 1e4, -1e4) + x
    if name == "holes":
        return np.where(rng.random(n) < 0.3, -INF, x)
    if name == "late":
        return np.where(np.arange(n) < n // 2, -INF, x)
    if name == "spikes":
        return np.where(np.arange(n) % 37 == 5, 150.0 + x, x)
    if name == "low":
        return np.full(n, -200.0)
    if name == "largest":
        return np.where(np.arange(n) % 3 == 0, 3e38, -3e38)
    assert name == "plain"
    return x


HARD = [
    "plain",
    "wide",
    "huge",
    "shifted",
    "increasing",
    "decreasing",
    "alternating",
    "holes",
    "late",
    "spikes",
    "low",
    "largest",
]


# ------------------------------------------------------------------- logcumsumexp


@pytest.mark.parametrize(
    "x, expected",
    [
        ([-INF, -INF, 1, 2], [-INF, -INF, 1, 2.3132616875]),
        ([-INF] * 3, [-INF] * 3),
        ([1, -INF, 2], [1, 1, 2.3132616875]),
        ([1, INF, 2], [1, INF, INF]),
        ([INF, -INF], [INF, INF]),
        ([INF, INF], [INF, INF]),
        ([1, NAN, 2], [1, NAN, NAN]),
        ([INF, NAN, 0], [INF, NAN, NAN]),
        ([3e38, 3e38], [3e38, 3e38]),
        ([0, 100], [0, 100]),
        ([0, 1, 2, 500], [0, 1.3132616875, 2.4076059644, 500]),
    ],
    ids=str,
)
def test_values_of_torch(xp, x, expected):
    for dtype in DTYPES:
        out = sq.logcumsumexp(xp.asarray(np.array(x, dtype)))
        assert type(out) is xp.array_type()
        out = to_numpy(out)
        assert out.dtype == dtype
        np.testing.assert_allclose(out, np.array(expected), rtol=3e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("n", [1, 2, 17, 300, 1500])
def test_hard_inputs(n, name, dtype):
    rng = np.random.default_rng(n)
    x = hard(name, n, rng).astype(dtype)
    check(sq.logcumsumexp(x), logcumsumexp(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse, exclusive", FLAGS)
@pytest.mark.parametrize(
    "shape, axis",
    [
        ((7,), 0),
        ((0,), -1),
        ((3, 0), 0),
        ((3, 0), 1),
        ((5, 33), 1),
        ((5, 33), 0),
        ((2, 65, 3), 1),
        ((2, 3, 20), -3),
        ((67, 40), -2),
        ((1, 1), 0),
    ],
    ids=str,
)
def test_shapes_axes_and_directions(xp, shape, axis, reverse, exclusive, dtype):
    rng = np.random.default_rng(sum(shape))
    x = rounded(rng, *shape, dtype=dtype, scale=5)
    options = {"reverse": reverse, "exclusive": exclusive}
    out = sq.logcumsumexp(xp.asarray(x), axis=axis, **options)
    assert type(out) is xp.array_type()
    assert to_numpy(out).dtype == dtype
    check(out, logcumsumexp(x, axis, **options))


def test_a_number_is_its_own_sum(xp):
    out = sq.logcumsumexp(xp.asarray(np.array(3.0)))
    assert to_numpy(out).shape == ()
    assert to_numpy(out) == 3.0
    out = sq.logcumsumexp(xp.asarray(np.array(3.0)), exclusive=True, axis=0)
    assert to_numpy(out) == -INF


@pytest.mark.parametrize("reverse, exclusive", FLAGS)
def test_segments_are_sequences_of_their_own(xp, reverse, exclusive):
    rng = np.random.default_rng(1)
    x = rounded(rng, 3, 40, scale=20)
    segments = np.repeat([5, 2, 5, 7], [7, 1, 12, 20])
    options = {"reverse": reverse, "exclusive": exclusive}
    state = rounded(rng, 3)
    result = sq.logcumsumexp(
        xp.asarray(x),
        segment_ids=xp.asarray(segments),
        state=xp.asarray(state),
        return_state=True,
        **options,
    )
    bounds = [0, 7, 8, 20, 40]
    runs = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    runs = runs[::-1] if reverse else runs
    expected = np.empty(x.shape, np.longdouble)
    for place, run in enumerate(runs):
        part = x[:, run]
        if place == 0:
            edges = (part, state[:, None]) if reverse else (state[:, None], part)
            values = logcumsumexp(np.concatenate(edges, axis=1), **options)
            expected[:, run] = values[:, :-1] if reverse else values[:, 1:]
        else:
            expected[:, run] = logcumsumexp(part, **options)
    check(result.out, expected)
    last = logcumsumexp(x[:, runs[-1]])[:, -1]
    check(result.state.finalize(), last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "wide", "increasing", "decreasing", "holes"])
def test_any_split_equals_one_pass(xp, name, dtype):
    rng = np.random.default_rng(2)
    x = hard(name, 90, rng).astype(dtype)
    whole = sq.logcumsumexp(xp.asarray(x), return_state=True)
    state, parts = None, []
    for part in np.split(x, [1, 2, 10, 10, 64]):
        out, state = sq.logcumsumexp(xp.asarray(part), state=state, return_state=True)
        parts.append(to_numpy(out))
    expected = to_numpy(whole.out)
    assert_within(np.concatenate(parts), expected, 2 * ulps(expected, dtype))
    assert_within(
        to_numpy(state.finalize()),
        to_numpy(whole.state.finalize()),
        2 * ulps(expected[-1], dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_entry_at_a_time_loses_nothing(dtype):
    rng = np.random.default_rng(3)
    x = rounded(rng, 4000, dtype=dtype)
    state = sq.LogSumExpState.init(like=x)
    for start in range(4000):
        state = state.update(x[start : start + 1])
    check(state.finalize(), logcumsumexp(x[None, :])[0, -1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_is_associative(xp, dtype):
    rng = np.random.default_rng(4)
    parts = [rounded(rng, 2, n, dtype=dtype, scale=9) for n in (1, 30, 7)]
    a, b, c = (
        sq.LogSumExpState.init((2,), like=xp.asarray(part)).update(xp.asarray(part))
        for part in parts
    )
    left, right = a.merge(b).merge(c), sq.LogSumExpState.merge(a, b.merge(c))
    expected = logcumsumexp(np.concatenate(parts, axis=1))[:, -1]
    for state in (left, right, c.merge(b.merge(a))):
        assert type(state.finalize()) is xp.array_type()
        check(state.finalize(), expected)
    empty = sq.LogSumExpState.init((2,), like=xp.asarray(parts[0]))
    np.testing.assert_array_equal(
        to_numpy(empty.merge(a).finalize()), to_numpy(a.finalize())
    )
    assert (to_numpy(empty.merge(empty).finalize()) == -INF).all()


def test_a_state_may_be_logarithms(xp):
    rng = np.random.default_rng(5)
    x, state = rounded(rng, 4, 6), rounded(rng, 4)
    out = sq.logcumsumexp(xp.asarray(x), state=xp.asarray(state))
    check(out, logcumsumexp(np.concatenate([state[:, None], x], axis=1))[:, 1:])
    out = sq.logcumsumexp(
        xp.asarray(x), state=xp.asarray(state), exclusive=True, axis=-1
    )
    check(out, logcumsumexp(np.concatenate([state[:, None], x], axis=1))[:, :-1])
    # One for all lanes.
    out = sq.logcumsumexp(xp.asarray(x), state=xp.asarray(state[:1]))
    start = np.broadcast_to(state[:1, None], (4, 1))
    check(out, logcumsumexp(np.concatenate([start, x], axis=1))[:, 1:])


def test_states_are_kept_in_files(tmp_path, xp):
    x = xp.asarray(np.arange(6.0).reshape(2, 3))
    state = sq.LogSumExpState.init((2,), like=x).update(x)
    state.save(tmp_path / "state.npz")
    again = sq.LogSumExpState.load(tmp_path / "state.npz", like=x)
    for name in ("log_sum", "remainder"):
        np.testing.assert_array_equal(
            to_numpy(getattr(again, name)), to_numpy(getattr(state, name))
        )
    np.testing.assert_array_equal(
        to_numpy(state[1].finalize()), to_numpy(state.finalize())[1]
    )
    with pytest.raises(ValueError, match="AttentionState"):
        sq.AttentionState.load(tmp_path / "state.npz")


@pytest.mark.parametrize("reverse, exclusive", FLAGS)
@pytest.mark.parametrize("name", [name for name in HARD if name != "largest"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(name, reverse, exclusive, dtype):
    rng = np.random.default_rng(6)
    x = hard(name, 300, rng).astype(dtype)
    grad = rounded(rng, 300, dtype=dtype)
    options = {"reverse": reverse, "exclusive": exclusive}
    (gx,) = sq.vjp.logcumsumexp(grad, x, **options)
    assert gx.dtype == dtype
    expected, bound = logcumsumexp_vjp(grad, x, **options)
    # What is below the smallest normal number may be rounded to 0.
    bound = epsilon(dtype) * bound + 2 * np.finfo(dtype).tiny * np.abs(grad).sum()
    assert_within(gx, expected, bound)
    assert (gx[x == -INF] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_do_not_see_shifts(dtype):
    rng = np.random.default_rng(7)
    x = np.round(rounded(rng, 500, scale=30) * 8) / 8
    grad = rounded(rng, 500, dtype=dtype)
    (expected,) = sq.vjp.logcumsumexp(grad, x.astype(dtype))
    for shift in (1e4, -1e4):
        (shifted,) = sq.vjp.logcumsumexp(grad, (x + shift).astype(dtype))
        np.testing.assert_array_equal(shifted, expected)
    total = float(np.sum(expected.astype(np.longdouble)))
    bound = 16 * epsilon(dtype) * np.abs(grad).sum() * 8
    assert abs(total - float(grad.astype(np.longdouble).sum())) < bound


def test_gradients_of_what_is_not_finite():
    ones = np.ones(3)
    for x in ([1.0, INF, 2.0], [1.0, NAN, 2.0]):
        (gx,) = sq.vjp.logcumsumexp(ones, np.array(x))
        np.testing.assert_array_equal(gx, [NAN, NAN, NAN])
        (gx,) = sq.vjp.logcumsumexp(np.array([1.0, 0, 0]), np.array(x))
        np.testing.assert_array_equal(gx, [1, 0, 0])
    (gx,) = sq.vjp.logcumsumexp(ones, np.array([-INF, -INF, 1.0]))
    np.testing.assert_array_equal(gx, [0, 0, 1])
    (gx,) = sq.vjp.logcumsumexp(ones, np.full(3, -INF))
    np.testing.assert_array_equal(gx, 0)
    # Where the sums are ties at the end of the range.
    (gx,) = sq.vjp.logcumsumexp(np.ones(2, np.float32), np.full(2, 3e38, np.float32))
    np.testing.assert_allclose(gx, [1.5, 0.5], rtol=1e-6)


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


@pytest.mark.parametrize("reverse, exclusive", FLAGS)
@pytest.mark.parametrize("segmented", [False, True])
def test_gradients_by_differences(xp, reverse, exclusive, segmented):
    rng = np.random.default_rng(8)
    x, start = rounded(rng, 2, 6), rounded(rng, 2)
    g, g_end = rounded(rng, 2, 6), rounded(rng, 2)
    segments = np.array([0, 0, 1, 1, 1, 4]) if segmented else None
    options = {"reverse": reverse, "exclusive": exclusive}

    def value(x, start):
        result = sq.logcumsumexp(
            x, state=start, segment_ids=segments, return_state=True, **options
        )
        out = np.where(np.isfinite(result.out), result.out, 0)
        return (g * out).sum() + (g_end * result.state.finalize()).sum()

    gx, g_state = sq.vjp.logcumsumexp(
        (xp.asarray(g), xp.asarray(g_end)),
        xp.asarray(x),
        state=xp.asarray(start),
        segment_ids=None if segments is None else xp.asarray(segments),
        **options,
    )
    assert type(gx) is xp.array_type()
    for which, found in enumerate((gx, g_state)):
        expected = derivative(value, (x, start), which)
        np.testing.assert_allclose(to_numpy(found), expected, rtol=0, atol=1e-9)


def test_gradients_of_states(xp):
    x = np.arange(6.0).reshape(2, 3)
    state = sq.LogSumExpState(
        xp.asarray(np.array([0.0, -INF])), xp.asarray(np.zeros(2))
    )
    _, found = sq.vjp.logcumsumexp(
        xp.asarray(np.ones((2, 3))), xp.asarray(x), state=state
    )
    assert isinstance(found, sq.LogSumExpState)
    total = 1 / np.cumsum(np.exp([0.0, 0, 1, 2]))[1:]
    np.testing.assert_allclose(to_numpy(found.log_sum), [total.sum(), 0], rtol=1e-12)
    np.testing.assert_array_equal(to_numpy(found.log_sum), to_numpy(found.remainder))


def test_half_types_come_back_as_float32(xp):
    x = np.array([0.0, 1.0, 50.0], np.float16)
    try:
        x = xp.asarray(x)
    except TypeError:
        pytest.skip(f"{xp.name} has no float16")
    out = sq.logcumsumexp(x)
    assert to_numpy(out).dtype == np.float32
    check(out, logcumsumexp(to_numpy(x)))
    assert to_numpy(sq.signed_logcumsumexp(x, x).sign).dtype == np.float32
    assert to_numpy(sq.log_linear_recurrence(x, x)).dtype == np.float32
    grad = xp.asarray(np.ones(3, np.float32))
    assert to_numpy(sq.vjp.logcumsumexp(grad, x)[0]).dtype == np.float16


def test_inputs_of_any_layout():
    rng = np.random.default_rng(9)
    base = rounded(rng, 30, 40)
    views = [base[::2, ::-3], base.T, base[:, 5:6], np.broadcast_to(base[0], (4, 40))]
    # Fields of a packed record are not aligned.
    record = np.zeros(40, np.dtype([("pad", "u1"), ("x", "f8")]))
    record["x"] = base[0]
    views.append(record["x"][None, :])
    for view in views:
        for axis in (0, 1):
            plain = np.ascontiguousarray(view)
            # Lanes side by side in memory are computed together, in another order.
            np.testing.assert_allclose(
                sq.logcumsumexp(view, axis=axis),
                sq.logcumsumexp(plain, axis=axis),
                rtol=0,
                atol=2 * np.spacing(16.0),
            )
            ones = np.broadcast_to(np.ones(1), view.shape)
            np.testing.assert_allclose(
                sq.vjp.logcumsumexp(ones, view, axis=axis)[0],
                sq.vjp.logcumsumexp(np.ones(view.shape), plain, axis=axis)[0],
                rtol=16 * np.finfo(float).eps,
            )


def test_memory_is_linear():
    x = np.random.default_rng(10).standard_normal((1, 1 << 18)).astype(np.float32)
    sq.logcumsumexp(x)
    tracemalloc.start()
    try:
        sq.logcumsumexp(x)
        sq.vjp.logcumsumexp(x, x)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * x.nbytes


# ------------------------------------------------------------------------- signed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse, exclusive", FLAGS)
@pytest.mark.parametrize("name", [name for name in HARD if name != "largest"])
def test_signed_sums(name, reverse, exclusive, dtype):
    rng = np.random.default_rng(11)
    n = 200
    x = hard(name, n, rng).astype(dtype)
    sign = rng.choice([-1, 0, 1], n)
    options = {"reverse": reverse, "exclusive": exclusive}
    out = sq.signed_logcumsumexp(x, sign, **options)
    expected, signs, size = signed_logcumsumexp(x, sign, **options)
    # What is left of terms that cancel is as right as float64 leaves it.
    with np.errstate(all="ignore"):
        lost = np.where(
            size == -INF, 0, 4 * n * epsilon(np.float64) * np.exp(size - expected)
        )
    sure = lost < 0.1
    assert sure.mean() > 0.8
    bound = 2 * ulps(expected, dtype) + 2 * lost
    assert_within(out.log_abs[sure], expected[sure], bound[sure].astype(float))
    np.testing.assert_array_equal(out.sign[sure], signs[sure].astype(dtype))
    assert out.sign.dtype == out.log_abs.dtype == dtype


def test_terms_that_cancel(xp):
    x = xp.asarray(np.array([2.0, 2.0, -5.0, 1.0, -INF, 0.0]))
    sign = xp.asarray(np.array([1, -1, -1, 0, 1, 0]))
    out = sq.signed_logcumsumexp(x, sign)
    assert type(out.sign) is xp.array_type()
    np.testing.assert_allclose(to_numpy(out.log_abs), [2, -INF, -5, -5, -5, -5])
    np.testing.assert_array_equal(to_numpy(out.sign), [1, 0, -1, -1, -1, -1])


def test_a_weight_of_zero_removes(xp):
    x = xp.asarray(np.array([NAN, 1.0, INF, 2.0]))
    sign = xp.asarray(np.array([0, 1, 0, 0]))
    out = sq.signed_logcumsumexp(x, sign)
    np.testing.assert_array_equal(to_numpy(out.log_abs), [-INF, 1, 1, 1])


def test_signs_are_weights(xp):
    rng = np.random.default_rng(12)
    x, w = rounded(rng, 3, 8, scale=3), rounded(rng, 8)
    out = sq.signed_logcumsumexp(xp.asarray(x), xp.asarray(w))
    total = np.cumsum(w * np.exp(x), axis=1)
    np.testing.assert_allclose(to_numpy(out.log_abs), np.log(np.abs(total)), atol=1e-12)
    np.testing.assert_array_equal(to_numpy(out.sign), np.sign(total))
    g = rounded(rng, 3, 8)

    def value(x, w):
        return (g * sq.signed_logcumsumexp(x, w).log_abs).sum()

    found = sq.vjp.signed_logcumsumexp(xp.asarray(g), xp.asarray(x), xp.asarray(w))
    for which, gradient in enumerate(found):
        expected = derivative(value, (x, w), which, h=1e-4)
        np.testing.assert_allclose(to_numpy(gradient), expected, rtol=1e-6, atol=1e-6)
    (gx,) = sq.vjp.signed_logcumsumexp(
        xp.asarray(g), xp.asarray(x), xp.asarray(np.ones(8, int))
    )
    (expected,) = sq.vjp.logcumsumexp(g, x)
    np.testing.assert_allclose(to_numpy(gx), expected, rtol=0, atol=1e-13)


def test_signs_that_cancel_pass_nothing_on():
    x = np.array([2.0, 2.0, 1.0])
    sign = np.array([1.0, -1.0, 1.0])
    gx, gsign = sq.vjp.signed_logcumsumexp(np.array([0.0, 5.0, 0.0]), x, sign)
    np.testing.assert_array_equal(gx, 0)
    np.testing.assert_array_equal(gsign, 0)


# --------------------------------------------------------------------- recurrences


def gates(name, n, rng):
    """Logarithms of factors that a cumulative sum of them cannot carry."""
    x = rng.standard_normal(n)
    if name == "decay":
        return -rng.uniform(30, 60, n)
    if name == "growth":
        return 0.5 + x
    if name == "resets":
        return np.where(rng.random(n) < 0.05, -INF, -np.logaddexp(0, -x))
    if name == "jumps":
        return 300 * x
    assert name == "gates"
    return -np.logaddexp(0, -4 - x)


GATES = ["gates", "decay", "growth", "resets", "jumps"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("n", [0, 1, 2, 33, 3000])
def test_recurrence(n, name, dtype):
    rng = np.random.default_rng(n + 1)
    a, b = gates(name, n, rng).astype(dtype), rounded(rng, n, dtype=dtype)
    b[::7] = -INF
    expected = log_linear_recurrence(a, b)
    # Each step rounds the logarithm in float64, and the result in its type.
    steps = n * epsilon(np.float64) * np.max(np.abs(expected[b > -INF]), initial=1)
    bound = 2 * ulps(expected, dtype) + float(steps)
    assert_within(sq.log_linear_recurrence(a, b), expected, bound)


@pytest.mark.parametrize("reverse", [False, True])
def test_recurrence_in_every_library(xp, reverse):
    rng = np.random.default_rng(13)
    a, b, start = rounded(rng, 3, 1), rounded(rng, 2, 3, 20), rounded(rng, 2, 3)
    out, last = sq.log_linear_recurrence(
        xp.asarray(a),
        xp.asarray(b),
        state=xp.asarray(start),
        reverse=reverse,
        return_state=True,
    )
    assert type(out) is xp.array_type()
    order = slice(None, None, -1) if reverse else slice(None)
    expected = log_linear_recurrence(np.broadcast_to(a, b.shape), b[..., order], start)[
        ..., order
    ]
    check(out, expected)
    np.testing.assert_array_equal(
        to_numpy(last), to_numpy(out)[..., 0 if reverse else -1]
    )


def test_factors_of_one_are_a_cumulative_sum(xp):
    x = rounded(np.random.default_rng(14), 50, scale=20)
    out = sq.log_linear_recurrence(xp.asarray(np.zeros(())), xp.asarray(x))
    check(out, logcumsumexp(x))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_recurrence_of_segments(xp, reverse):
    rng = np.random.default_rng(15)
    a, b, start = rounded(rng, 3, 20), rounded(rng, 3, 20), rounded(rng, 3)
    segments = np.repeat([0, 1, 0], [6, 9, 5])
    out = sq.log_linear_recurrence(
        xp.asarray(a),
        xp.asarray(b),
        state=xp.asarray(start),
        segment_ids=xp.asarray(segments),
        reverse=reverse,
    )
    runs = [slice(0, 6), slice(6, 15), slice(15, 20)]
    order = slice(None, None, -1) if reverse else slice(None)
    first = runs[-1] if reverse else runs[0]
    for run in runs:
        expected = log_linear_recurrence(
            a[:, run][:, order], b[:, run][:, order], start if run == first else None
        )[:, order]
        check(to_numpy(out)[:, run], expected)


def test_a_factor_of_zero_forgets_all():
    a = np.array([0.0, 0.0, -INF, 0.0])
    for before in (NAN, INF, -INF, 3.0):
        b = np.array([before, 1.0, 2.0, 1.0])
        out = sq.log_linear_recurrence(a, b)
        np.testing.assert_allclose(out[2:], [2, 2.31326169])
    # Before the first entry there is nothing to multiply.
    out = sq.log_linear_recurrence(np.array([NAN, 0.0]), np.zeros(2))
    np.testing.assert_allclose(out, [0, np.log(2)])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
def test_gradients_of_recurrences_by_differences(xp, reverse, segmented):
    rng = np.random.default_rng(16)
    a, b, start = rounded(rng, 2, 6), rounded(rng, 2, 6), rounded(rng, 2)
    g, g_end = rounded(rng, 2, 6), rounded(rng, 2)
    a[0, 2], b[1, 3] = -INF, -INF
    segments = np.array([0, 0, 0, 1, 1, 1]) if segmented else None

    def value(a, b, start):
        out, last = sq.log_linear_recurrence(
            a, b, state=start, reverse=reverse, segment_ids=segments, return_state=True
        )
        return (g * np.where(np.isfinite(out), out, 0)).sum() + (g_end * last).sum()

    found = sq.vjp.log_linear_recurrence(
        (xp.asarray(g), xp.asarray(g_end)),
        *map(xp.asarray, (a, b)),
        state=xp.asarray(start),
        reverse=reverse,
        segment_ids=None if segments is None else xp.asarray(segments),
    )
    for which, gradient in enumerate(found):
        expected = derivative(value, (a, b, start), which)
        np.testing.assert_allclose(to_numpy(gradient), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GATES)
def test_gradients_of_recurrences(name, dtype):
    rng = np.random.default_rng(17)
    n = 400
    a, b = gates(name, n, rng).astype(dtype), rounded(rng, n, dtype=dtype)
    g = rounded(rng, n, dtype=dtype)
    ga, gb = sq.vjp.log_linear_recurrence(g, a, b)
    y = log_linear_recurrence(a, b)
    a, b, g = (array.astype(np.longdouble) for array in (a, b, g))
    before = np.concatenate([[-INF], y[:-1]])
    p, q = np.exp(a + before - y), np.exp(b - y)
    p[a == -INF] = 0
    total, size = np.longdouble(0), np.longdouble(0)
    # A share errs by the rounding of the logarithms that it is a difference of.
    share = 16 * epsilon(dtype) + 4 * epsilon(np.float64) * float(np.abs(y).max())
    for t in range(n - 1, -1, -1):
        total, size = g[t] + total, abs(g[t]) + size
        bound = (share * size + share * 8).astype(float)
        assert_within(np.array([ga[t]]), np.array([p[t] * total]), bound)
        assert_within(np.array([gb[t]]), np.array([q[t] * total]), bound)
        total, size = p[t] * total, p[t] * size


def test_gradients_sum_over_what_was_broadcast(xp):
    rng = np.random.default_rng(18)
    a, b, start = rounded(rng, 1), rounded(rng, 4, 3, 5), rounded(rng, 3)
    g = rounded(rng, 4, 3, 5)
    found = sq.vjp.log_linear_recurrence(
        xp.asarray(g), xp.asarray(a), xp.asarray(b), state=xp.asarray(start)
    )
    full = sq.vjp.log_linear_recurrence(
        g,
        np.broadcast_to(a, b.shape).copy(),
        b,
        state=np.broadcast_to(start, (4, 3)).copy(),
    )
    np.testing.assert_allclose(to_numpy(found[0]), [full[0].sum()], rtol=1e-11)
    np.testing.assert_allclose(to_numpy(found[1]), full[1], atol=1e-13)
    np.testing.assert_allclose(to_numpy(found[2]), full[2].sum(0), atol=1e-13)


# -------------------------------------------------------------------- forward mode


@pytest.mark.parametrize("reverse, exclusive", FLAGS)
def test_forward_mode_is_the_transpose(reverse, exclusive):
    from subquad._reference import primitives

    rng = np.random.default_rng(19)
    x, tx, g = (rounded(rng, 3, 30, scale=s) for s in (20, 1, 1))
    start, t_start, g_end = (rounded(rng, 3) for _ in range(3))
    segments = np.repeat([0, 1], [17, 13])
    for s in (None, segments):
        options = (s, 1, reverse, exclusive)
        out, end = primitives.logcumsumexp_jvp(
            x, start, np.zeros(3), *options, tx, t_start
        )
        gx, gs = primitives.logcumsumexp_vjp(
            x, start, np.zeros(3), *options, g, g_end, (True, True)
        )
        left = (g * out).sum() + (g_end * end).sum()
        np.testing.assert_allclose(left, (gx * tx).sum() + (gs * t_start).sum())
        a, b = rounded(rng, 3, 30), rounded(rng, 3, 30)
        a[1, 7] = -INF
        out = primitives.log_linear_recurrence_jvp(
            a, b, start, s, 1, reverse, tx, b, t_start
        )
        ga, gb, gs = primitives.log_linear_recurrence_vjp(
            a, b, start, s, 1, reverse, g, (True, True, True)
        )
        right = (ga * tx).sum() + (gb * b).sum() + (gs * t_start).sum()
        np.testing.assert_allclose((g * out).sum(), right)
    sign, t_sign = rng.choice([-1.0, 0.5, 1.0], (3, 30)), rounded(rng, 3, 30)
    out = primitives.signed_logcumsumexp_jvp(x, sign, 1, reverse, exclusive, tx, t_sign)
    gx, gsign = primitives.signed_logcumsumexp_vjp(
        x, sign, 1, reverse, exclusive, g, (True, True)
    )
    right = (gx * tx).sum() + (gsign * t_sign).sum()
    np.testing.assert_allclose((g * out).sum(), right)


def test_forward_mode_below_the_maximum():
    from subquad._reference import primitives

    out, _ = primitives.logcumsumexp_jvp(
        np.array([0.0, 200.0]), None, None, None, 0, False, False, np.ones(2), None
    )
    np.testing.assert_array_equal(out, 1)


# ---------------------------------------------------------------- what is refused


X = np.zeros((3, 4))


def refused(error, words, call):
    pattern = r"(?is)" + "".join(rf"(?=.*{word})" for word in words)
    with pytest.raises(error, match=pattern):
        call()


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex128])
def test_data_must_be_real_floating(dtype):
    name, bad = np.dtype(dtype).name, X.astype(dtype)
    refused(TypeError, [r"\bx\b", name], lambda: sq.logcumsumexp(bad))
    refused(TypeError, [r"\bx\b", name], lambda: sq.signed_logcumsumexp(bad, X))
    refused(TypeError, ["log_a", name], lambda: sq.log_linear_recurrence(bad, X))
    refused(TypeError, ["log_b", name], lambda: sq.log_linear_recurrence(X, bad))
    state = np.zeros(3, dtype)
    refused(TypeError, ["state", name], lambda: sq.logcumsumexp(X, state=state))
    if dtype is not np.int64:
        refused(TypeError, ["sign", name], lambda: sq.signed_logcumsumexp(X, bad))
        ids = np.zeros(4, dtype)
        refused(
            TypeError,
            ["segment_ids", "integers", name],
            lambda: sq.logcumsumexp(X, segment_ids=ids),
        )


@pytest.mark.parametrize("bad", [None, 1.0, [[1.0]], "x"], ids=repr)
def test_data_must_be_arrays(bad):
    name = type(bad).__name__
    refused(TypeError, [r"\bx\b", name], lambda: sq.logcumsumexp(bad))
    refused(TypeError, ["sign", name], lambda: sq.signed_logcumsumexp(X, bad))
    refused(TypeError, ["log_a", name], lambda: sq.log_linear_recurrence(bad, X))
    refused(TypeError, ["log_b", name], lambda: sq.log_linear_recurrence(X, bad))
    refused(TypeError, ["grad", name], lambda: sq.vjp.logcumsumexp(bad, X))


def test_there_must_be_such_an_axis():
    for axis in (2, -3):
        for error in (IndexError, ValueError, np.exceptions.AxisError):
            refused(error, [str(axis)], lambda axis=axis: sq.logcumsumexp(X, axis=axis))
        refused(
            IndexError,
            [str(axis)],
            lambda axis=axis: sq.log_linear_recurrence(X, X, axis=axis),
        )
        refused(
            IndexError,
            [str(axis)],
            lambda axis=axis: sq.signed_logcumsumexp(X, X, axis=axis),
        )
    refused(TypeError, ["axis", "1.5"], lambda: sq.logcumsumexp(X, axis=1.5))
    refused(TypeError, ["axis", "None"], lambda: sq.logcumsumexp(X, axis=None))
    number = np.array(0.0)
    refused(IndexError, ["0"], lambda: sq.log_linear_recurrence(number, number))


def test_shapes_must_fit():
    refused(
        ValueError,
        ["state", r"\(3,\)", r"\(4,\)"],
        lambda: sq.logcumsumexp(X, state=np.zeros(4)),
    )
    refused(
        ValueError,
        ["state", r"\(3,\)", r"\(1, 3\)"],
        lambda: sq.logcumsumexp(X, state=sq.LogSumExpState.init((1, 3))),
    )
    refused(
        ValueError,
        ["sign", r"\(3, 4\)", r"\(3,\)"],
        lambda: sq.signed_logcumsumexp(X, np.zeros(3)),
    )
    refused(
        ValueError,
        ["log_a", "log_b", r"\(3, 4\)", r"\(3,\)"],
        lambda: sq.log_linear_recurrence(X, np.zeros(3)),
    )
    refused(
        ValueError,
        ["segment_ids", "4", "3"],
        lambda: sq.logcumsumexp(X, segment_ids=np.zeros(3, int)),
    )
    refused(
        ValueError, ["grad", r"\(3, 4\)"], lambda: sq.vjp.logcumsumexp(np.zeros(4), X)
    )
    refused(
        ValueError, ["grad", "2", "3"], lambda: sq.vjp.logcumsumexp((X, None, None), X)
    )


def test_options_must_be_of_their_kind():
    refused(TypeError, ["reverse", "1"], lambda: sq.logcumsumexp(X, reverse=1))
    refused(
        TypeError, ["exclusive", "None"], lambda: sq.logcumsumexp(X, exclusive=None)
    )
    with pytest.raises(TypeError):
        sq.logcumsumexp(x=X)
    with pytest.raises(TypeError):
        sq.logcumsumexp(X, -1)


def test_libraries_must_not_be_mixed():
    strict = pytest.importorskip("array_api_strict")
    state = strict.asarray(np.zeros(3))
    refused(
        TypeError,
        ["x is numpy", "state is array_api_strict"],
        lambda: sq.logcumsumexp(X, state=state),
    )
