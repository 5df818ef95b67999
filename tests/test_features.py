"""Random features on every array library, against their formulas."""

from __future__ import annotations

import numpy as np
import pytest

import subquad as sq
from _arrays import to_numpy
from _feature_formulas import (
    FORMS,
    Case,
    case,
    exponentials,
    hadamard_transform,
    log_features,
    trigonometric_features,
)
from _oracle import assert_within
from subquad import _dispatch

DTYPES = [np.float32, np.float64]

# 12 rows and 32 columns make a tile of the kernels, and rows are shared out in tens.
SIZES = [
    (1, 1, 1, 1),
    (7, 5, 4, 3),
    (13, 33, 65, 7),
    (37, 47, 3, 0),
    (0, 5, 4, 3),
    (5, 0, 4, 3),
    (5, 4, 0, 2),
]


def check(found, expected, dtype, *, library=None):
    """The array of a library, of a type, within the bound."""
    if library is not None:
        assert type(found) is library.array_type()
    found = to_numpy(found)
    assert found.dtype == dtype
    assert_within(found, *expected)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logarithms(xp, form, antithetic, dtype):
    given = case(form, dtype=dtype)
    out = given.call(sq.log_features, xp.asarray, antithetic=antithetic)
    check(out, log_features(given, antithetic), dtype, library=xp)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_trigonometric(xp, form, dtype):
    given = case(form, dtype=dtype)
    out = given.call(sq.trigonometric_features, xp.asarray)
    check(out, trigonometric_features(given), dtype, library=xp)


@pytest.mark.parametrize("dtype", DTYPES)
def test_transform(xp, dtype):
    x = np.random.default_rng(0).standard_normal((3, 4, 32)).astype(dtype)
    check(
        sq.hadamard_transform(xp.asarray(x)), hadamard_transform(x), dtype, library=xp
    )


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_exponentials(xp, form, antithetic):
    """What estimators take in the place of logarithms."""
    given = case(form)
    arrays = [None if a is None else xp.asarray(a) for a in given]
    backend = _dispatch.backend_for(x=arrays[0])
    out = backend.log_features(*arrays, antithetic, True)
    check(out, exponentials(given, antithetic), np.float64, library=xp)


@pytest.mark.parametrize("form", ["all with diagonal", "all with factor"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(form, size, dtype):
    n, m, d, r = size
    given = case(form, n=n, m=m, d=d, r=r, dtype=dtype)
    for antithetic in (False, True):
        out = given.call(sq.log_features, antithetic=antithetic)
        check(out, log_features(given, antithetic), dtype)
    check(given.call(sq.trigonometric_features), trigonometric_features(given), dtype)


def test_sizes_beyond_every_block():
    for form in ("all with diagonal", "all with factor"):
        given = case(form, n=700, m=300, d=130, r=130, dtype=np.float32)
        out = given.call(sq.log_features, antithetic=True)
        check(out, log_features(given, True), np.float32)


@pytest.mark.parametrize("form", ["none", "all with diagonal", "all with factor"])
@pytest.mark.parametrize(
    "bx, bp",
    [((2,), (2,)), ((2,), ()), ((), (3,)), ((2, 1), (3,)), ((1,), (2, 3)), ((0,), ())],
    ids=str,
)
def test_batches(xp, form, bx, bp):
    given = case(form, bx=bx, bp=bp)
    out = given.call(sq.log_features, xp.asarray, antithetic=True)
    check(out, log_features(given, True), np.float64)
    out = given.call(sq.trigonometric_features, xp.asarray)
    check(out, trigonometric_features(given), np.float64)


def test_every_argument_has_a_batch_of_its_own():
    shared = case("all with factor")
    batched = case("all with factor", bx=(2,), bp=(2,), seed=1)
    for place in range(7):
        if batched[place] is None:
            continue
        given = Case(*shared[:place], batched[place], *shared[place + 1 :])
        if place == 1:
            # The rank of the projection tells a factor from a diagonal.
            given = given._replace(factor=batched.factor)
        if place == 4:
            given = given._replace(projection=batched.projection)
        out = given.call(sq.log_features)
        check(out, log_features(given), np.float64)


def test_a_quadratic_form_is_told_by_its_rank():
    given = case("none", d=3, m=3)
    form = np.random.default_rng(1).standard_normal((3, 3))
    expected = log_features(given._replace(factor=form))
    check(sq.log_features(*given[:3], form), expected, np.float64)
    heads = given._replace(projection=given.projection[None])
    expected = log_features(heads._replace(diagonal=form))
    check(sq.log_features(*heads[:3], form), expected, np.float64)


@pytest.mark.parametrize("form", ["all with diagonal", "all with factor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(form, dtype):
    given = case(form, n=13, m=9, d=7, dtype=dtype)
    expected = [
        given.call(sq.log_features, antithetic=True),
        given.call(sq.trigonometric_features),
    ]

    def reversed_memory(a):
        return np.flip(np.flip(a).copy())

    def every_other(a):
        return np.repeat(a, 2, axis=-1)[..., ::2]

    def read_only(a):
        a = a.copy()
        a.flags.writeable = False
        return a

    def unaligned(a):
        raw = np.zeros(a.nbytes + 1, np.uint8)[1:]
        odd = raw.view(dtype).reshape(a.shape)
        odd[...] = a
        return odd

    for change in (
        reversed_memory,
        every_other,
        np.asfortranarray,
        read_only,
        unaligned,
    ):
        moved = Case(*(None if a is None else change(a) for a in given))
        found = [
            moved.call(sq.log_features, antithetic=True),
            moved.call(sq.trigonometric_features),
        ]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_arguments_that_repeat_one_number():
    given = case("all with diagonal", n=5, m=4, d=3)
    one = given._replace(
        x=np.broadcast_to(given.x[:1], (5, 3)),
        projection=np.broadcast_to(given.projection[:, :1], (4, 3)),
        bias=np.broadcast_to(given.bias[:1], (4,)),
        shift=np.broadcast_to(given.shift[:1], (3,)),
    )
    check(one.call(sq.log_features), log_features(one), np.float64)


@pytest.mark.parametrize("function", [sq.log_features, sq.trigonometric_features])
def test_types(xp, function):
    given = case("all with factor")
    single = Case(*(None if a is None else a.astype(np.float32) for a in given))
    oracle = log_features if function is sq.log_features else trigonometric_features
    for place in (0, 1, 4, 6):
        mixed = list(single)
        mixed[place] = given[place]
        out = Case(*mixed).call(function, xp.asarray)
        wide = Case(*(None if a is None else a.astype(np.float64) for a in mixed))
        check(out, oracle(wide), np.float64)
    half = single._replace(x=single.x.astype(np.float16))
    narrow = Case(*(None if a is None else a.astype(np.float16) for a in given))
    for mixed in (half, narrow):
        if xp.name == "array_api_strict":
            continue
        out = mixed.call(function, xp.asarray)
        wide = Case(*(None if a is None else a.astype(np.float32) for a in mixed))
        check(out, oracle(wide), np.float32)


@pytest.mark.skip_xp_backend("array_api_strict", reason="has no float16")
def test_type_of_a_transform(xp):
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float16)
    out = sq.hadamard_transform(xp.asarray(x))
    check(out, hadamard_transform(x.astype(np.float32)), np.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", [sq.log_features, sq.trigonometric_features])
def test_what_is_not_finite_stays_in_its_rows_and_features(xp, function, value):
    clean = case("all with diagonal", n=5, m=6)
    expected = to_numpy(clean.call(function, xp.asarray))
    given = Case(*(None if a is None else a.copy() for a in clean))
    given.x[2, 1] = value
    given.projection[4, 0] = value
    out = to_numpy(given.call(function, xp.asarray))
    rows, features = np.arange(5) != 2, np.arange(expected.shape[1]) % 6 != 4
    kept = np.ix_(rows, features)
    np.testing.assert_allclose(out[kept], expected[kept], rtol=1e-14)
    assert not np.isfinite(out[2]).any()
    assert not np.isfinite(out[rows][:, 4]).any()
    if np.isnan(value):
        assert np.isnan(out[2]).all()
        assert np.isnan(out[:, 4]).all()


def test_features_of_weight_zero(xp):
    given = case("all with diagonal")
    given.bias[3] = -np.inf
    out = to_numpy(given.call(sq.log_features, xp.asarray, antithetic=True))
    assert (out[:, [3, 8]] == -np.inf).all()
    check(out, log_features(given, True), np.float64)
    out = to_numpy(given.call(sq.trigonometric_features, xp.asarray))
    assert (out[:, [3, 8]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_points(xp, dtype):
    """Where features overflow and vanish, their logarithms are still exact."""
    given = case("all with diagonal", dtype=dtype)
    huge = given._replace(x=(1e4 * given.x).astype(dtype))
    out = huge.call(sq.log_features, xp.asarray, antithetic=True)
    assert np.isfinite(to_numpy(out)).all()
    check(out, log_features(huge, True), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shift_costs_no_accuracy(xp, dtype):
    """Points far from the origin, near the shift: the difference is taken first."""
    given = case("all with factor", dtype=dtype)
    far = (given.shift + 1000).astype(dtype)
    moved = given._replace(x=(given.x + far).astype(dtype), shift=far)
    out = moved.call(sq.log_features, xp.asarray)
    # The bound knows of differences alone, not of the points.
    check(out, log_features(moved), dtype)


def test_pairs_are_odd(xp):
    """Without a row's term, pairs at the bias 0 are exactly the negatives."""
    given = case("shift", n=13, m=9, d=7, dtype=np.float32)
    given = given._replace(bias=np.zeros_like(given.bias))
    out = to_numpy(given.call(sq.log_features, xp.asarray, antithetic=True))
    np.testing.assert_array_equal(out[:, :9], -out[:, 9:])


def test_pairs_are_features_of_both_signs(xp):
    given = case("all with factor")
    both = given._replace(
        projection=np.concatenate([given.projection, -given.projection]),
        bias=np.concatenate([given.bias, given.bias]),
    )
    pairs = given.call(sq.log_features, xp.asarray, antithetic=True)
    # Either is within the bound of the truth.
    check(pairs, log_features(both), np.float64)


def test_estimates_of_the_softmax_kernel():
    """Unbiased: the mean of many independent features is the kernel."""
    rng = np.random.default_rng(0)
    d, m = 3, 100_000
    x, y = rng.standard_normal((4, d)) / 2, rng.standard_normal((5, d)) / 2
    projection, bias = rng.standard_normal((m, d)), np.full(m, -np.log(m) / 2)
    log_x, log_y = (sq.log_features(a, projection, bias, np.ones(d)) for a in (x, y))
    estimate, kernel = np.exp(log_x) @ np.exp(log_y).T, np.exp(x @ y.T)
    # The variance of one feature's product is (exp|x + y|² - 1) kernel².
    norms = ((x[:, None] + y) ** 2).sum(-1)
    deviation = kernel * np.sqrt(np.expm1(norms) / m)
    assert (np.abs(estimate - kernel) < 5 * deviation).all()


@pytest.mark.parametrize("threads", [2, 3])
def test_thread_count_changes_nothing(threads):
    given = case("all with factor", n=500, m=65, d=33, r=20)
    x = np.random.default_rng(0).standard_normal((500, 256))
    calls = (
        lambda: given.call(sq.log_features, antithetic=True),
        lambda: given.call(sq.trigonometric_features),
        lambda: sq.hadamard_transform(x),
    )
    for call in calls:
        with sq.num_threads(1):
            expected = call()
        with sq.num_threads(threads):
            np.testing.assert_array_equal(call(), expected)


# ------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 4, 8, 16, 64, 512, 4096])
@pytest.mark.parametrize("batch", [(), (3,), (0,)], ids=str)
def test_lengths_of_transforms(d, batch, dtype):
    x = np.random.default_rng(0).standard_normal((*batch, d)).astype(dtype)
    check(sq.hadamard_transform(x), hadamard_transform(x), dtype)


def test_transform_twice(xp):
    x = np.random.default_rng(0).standard_normal((5, 16))
    out = to_numpy(sq.hadamard_transform(sq.hadamard_transform(xp.asarray(x))))
    # Two transforms of 4 steps each, of numbers whose sizes add up to at most 16².
    np.testing.assert_allclose(out, 16 * x, rtol=0, atol=8 * 256 * 2.0**-52)


def test_transform_of_strided_rows():
    x = np.random.default_rng(0).standard_normal((6, 4, 32))
    expected = sq.hadamard_transform(x)
    for moved in (
        np.flip(np.flip(x).copy()),
        np.asfortranarray(x),
        np.repeat(x, 2, axis=-1)[..., ::2],
        np.moveaxis(np.moveaxis(x, 1, 0).copy(), 0, 1),
    ):
        np.testing.assert_array_equal(sq.hadamard_transform(moved), expected)
    one = np.broadcast_to(x[:1], x.shape)
    np.testing.assert_array_equal(sq.hadamard_transform(one)[3], expected[0])
    ones = sq.hadamard_transform(np.broadcast_to(1.0, (2, 8)))
    np.testing.assert_array_equal(ones, [[8.0] + [0.0] * 7] * 2)


def test_transform_leaves_its_input_alone(xp):
    for d in (1, 8):
        x = np.random.default_rng(0).standard_normal((2, d))
        given = xp.asarray(x)
        out = sq.hadamard_transform(given)
        assert out is not given
        np.testing.assert_array_equal(to_numpy(given), x)


def test_transform_of_nan_stays_in_its_row(xp):
    x = np.random.default_rng(0).standard_normal((3, 8))
    expected = to_numpy(sq.hadamard_transform(xp.asarray(x)))
    x[1, 3] = np.nan
    out = to_numpy(sq.hadamard_transform(xp.asarray(x)))
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(out[[0, 2]], expected[[0, 2]])
