"""Gradients: finite differences, brute force, torch and JAX."""

from __future__ import annotations

import numpy as np
import pytest

import _feature_formulas as features
import _oracle_factors as factors
import subquad as sq
from _arrays import to_numpy
from _oracle import (
    assert_within,
    gamma,
    gaussian_log_normalizer,
    gaussian_vjp,
    log_normalizer,
    log_normalizer_vjp,
    sum_to,
)

DTYPES = [np.float32, np.float64]


def differences(f, arrays, grad, h=1e-4):
    """Directional derivatives of sum(grad * f) along every axis, fourth order."""
    out = []
    for which, a in enumerate(arrays):
        g = np.zeros(a.shape)
        for at in np.ndindex(a.shape):

            def value(step, which=which, at=at):
                moved = [b.astype(np.longdouble) for b in arrays]
                moved[which][at] += step
                return (grad * f(*moved)).sum()

            g[at] = float(
                (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
            )
        out.append(g)
    return out


def check_vjp(got, grad, x, y, lw=None, excluded=None):
    """Against brute force within its error bound, every shape that of its input."""
    inputs = [x, y] if lw is None else [x, y, lw]
    expected = log_normalizer_vjp(grad, x, y, lw, excluded)
    for a, (value, bound), given in zip(got, expected, inputs, strict=False):
        a = to_numpy(a)
        assert a.shape == given.shape
        assert a.dtype == given.dtype
        assert_within(a, sum_to(value, given.shape), sum_to(bound, given.shape) * 2)


def case(rng, n, m, d, dtype=np.float64, scale=1.0):
    x = (scale * rng.standard_normal((n, d))).astype(dtype)
    y = (scale * rng.standard_normal((m, d))).astype(dtype)
    lw = rng.standard_normal(m).astype(dtype)
    grad = rng.standard_normal(n).astype(dtype)
    return x, y, lw, grad


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("exclude", [False, True])
def test_finite_differences(weighted, exclude):
    rng = np.random.default_rng(0)
    x, y, lw, grad = case(rng, 5, 6, 3)
    index = np.array([2, -1, 0, 5, 2]) if exclude else None
    options = {"self_index": index, "self_term": "exclude"} if exclude else {}
    arrays = [x, y]
    if weighted:
        options["log_weights"] = lw
        arrays.append(lw)
    expected = differences(
        lambda x, y, lw=None: log_normalizer(x, y, lw, index), arrays, grad
    )
    got = sq.vjp.log_normalizer(grad, x, y, **options)
    for a, b in zip(got, expected, strict=False):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)
    check_vjp(got, grad, x, y, lw if weighted else None, index)


@pytest.mark.parametrize("diagonal", [False, True])
def test_gaussian_finite_differences(diagonal):
    rng = np.random.default_rng(1)
    arrays = [
        rng.standard_normal((4, 3)),
        rng.standard_normal(2),
        rng.standard_normal((2, 3)),
        rng.standard_normal((2, 3, 2)) / 2,
    ]
    options = {}
    if diagonal:
        arrays.append(rng.random((2, 3)))
        options["diagonal"] = arrays[-1]
    grad = rng.standard_normal(4)
    expected = differences(gaussian_log_normalizer, arrays, grad)
    got = sq.vjp.gaussian_log_normalizer(grad, *arrays[:4], **options)
    brute = gaussian_vjp(grad, *arrays)
    for a, b, c in zip(got, expected, brute, strict=False):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)
        np.testing.assert_allclose(a, c.astype(float), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, m, d",
    [
        (0, 3, 2),
        (3, 0, 2),
        (1, 1, 1),
        (1, 33, 3),
        (33, 1, 3),
        (7, 13, 31),
        (12, 32, 64),
        (13, 33, 65),
        (48, 47, 100),
        (97, 130, 33),
        (130, 515, 5),
        (515, 130, 5),
        (23, 37, 600),
        (1, 3000, 4),
        (3000, 1, 4),
    ],
    ids=str,
)
def test_shapes(n, m, d, dtype):
    rng = np.random.default_rng(n + m + d)
    x, y, lw, grad = case(rng, n, m, d, dtype, scale=1 / d**0.25)
    check_vjp(sq.vjp.log_normalizer(grad, x, y), grad, x, y)
    index = rng.integers(-1, m, n)
    lw[::4] = -np.inf
    got = sq.vjp.log_normalizer(
        grad, x, y, log_weights=lw, self_index=index, self_term="exclude"
    )
    check_vjp(got, grad, x, y, lw, index)


def test_sizes_beyond_every_block():
    rng = np.random.default_rng(2)
    x, y, lw, grad = case(rng, 700, 1300, 70, scale=0.3)
    index = rng.integers(-1, 1300, 700)
    options = {"log_weights": lw, "self_index": index, "self_term": "exclude"}
    got = sq.vjp.log_normalizer(grad, x, y, **options)
    check_vjp(got, grad, x, y, lw, index)
    out = sq.log_normalizer(x, y, **options)
    again = sq.vjp.log_normalizer(grad, x, y, out=out, **options)
    for a, b in zip(got, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "bx, by, bw",
    [
        ((2,), (2,), (2,)),
        ((2,), (), ()),
        ((), (2,), ()),
        ((), (), (2,)),
        ((1,), (2,), (1,)),
        ((2, 1), (3,), (2, 3)),
        ((2, 3), (1, 3), (3,)),
        ((0,), (1,), ()),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_sum_what_was_stretched(bx, by, bw, dtype):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((*bx, 9, 4)).astype(dtype)
    y = rng.standard_normal((*by, 11, 4)).astype(dtype)
    lw = rng.standard_normal((*bw, 11)).astype(dtype)
    batch = np.broadcast_shapes(bx, by, bw)
    grad = rng.standard_normal((*batch, 9)).astype(dtype)
    index = rng.integers(-1, 11, 9)
    got = sq.vjp.log_normalizer(
        grad, x, y, log_weights=lw, self_index=index, self_term="exclude"
    )
    check_vjp(got, grad, x, y, lw, index)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(
    "bx, bm",
    [((2,), (2,)), ((2,), ()), ((), (2,)), ((2, 1), (3,)), ((0,), ())],
    ids=str,
)
def test_gaussian_batches_sum_what_was_stretched(bx, bm, diagonal):
    rng = np.random.default_rng(4)
    arrays = [
        rng.standard_normal((*bx, 9, 4)),
        rng.standard_normal((*bm, 3)),
        rng.standard_normal((*bm, 3, 4)),
        rng.standard_normal((*bm, 3, 4, 5)) / 2,
    ]
    options = {}
    if diagonal:
        arrays.append(rng.random((*bm, 3, 4)))
        options["diagonal"] = arrays[-1]
    grad = rng.standard_normal((*np.broadcast_shapes(bx, bm), 9))
    got = sq.vjp.gaussian_log_normalizer(grad, *arrays[:4], **options)
    expected = gaussian_vjp(grad, *arrays)
    for a, b, given in zip(got, expected, arrays, strict=False):
        assert a.shape == given.shape
        np.testing.assert_allclose(
            a, sum_to(b, given.shape).astype(float), rtol=1e-11, atol=1e-12
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, k, d, r",
    [
        (1, 1, 1, 1),
        (13, 5, 33, 33),
        (65, 13, 7, 3),
        (33, 2, 64, 64),
        (300, 3, 100, 17),
        (19, 40, 5, 0),
        (0, 2, 3, 3),
    ],
    ids=str,
)
def test_gaussian_shapes(n, k, d, r, dtype):
    rng = np.random.default_rng(n + k + d + r)
    arrays = [
        rng.standard_normal((n, d)) / d**0.5,
        rng.standard_normal(k),
        rng.standard_normal((k, d)),
        rng.standard_normal((k, d, r)) / max(r, 1) ** 0.5,
        rng.random((k, d)),
    ]
    arrays = [a.astype(dtype) for a in arrays]
    arrays[1][1::3] = -np.inf
    grad = rng.standard_normal(n).astype(dtype)
    got = sq.vjp.gaussian_log_normalizer(grad, *arrays[:4], diagonal=arrays[4])
    expected = gaussian_vjp(grad, *arrays)
    for a, b in zip(got, expected, strict=False):
        assert a.dtype == dtype
        size = max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(
            a,
            b.astype(float),
            rtol=0,
            atol=256 * np.finfo(dtype).eps * size * max(n, 1) ** 0.5,
        )
        # An empty component moves nothing.
    for a in got[1:]:
        assert (a[1::3] == 0).all()


def test_on_every_library(xp):
    rng = np.random.default_rng(5)
    x, y, lw, grad = case(rng, 9, 11, 4)
    index = rng.integers(-1, 11, 9)
    got = sq.vjp.log_normalizer(
        xp.asarray(grad),
        xp.asarray(x),
        xp.asarray(y),
        log_weights=xp.asarray(lw),
        self_index=xp.asarray(index),
        self_term="exclude",
    )
    for a in got:
        assert type(a) is xp.array_type()
    check_vjp(got, grad, x, y, lw, index)
    arrays = [
        rng.standard_normal((9, 4)),
        rng.standard_normal(3),
        rng.standard_normal((3, 4)),
        rng.standard_normal((3, 4, 2)),
    ]
    got = sq.vjp.gaussian_log_normalizer(xp.asarray(grad), *map(xp.asarray, arrays))
    for a, b in zip(got, gaussian_vjp(grad, *arrays), strict=False):
        assert type(a) is xp.array_type()
        np.testing.assert_allclose(to_numpy(a), b.astype(float), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_masked_keys_have_no_gradient(xp, value):
    rng = np.random.default_rng(6)
    x, y, lw, grad = case(rng, 37, 41, 5)
    masked = [0, 8, 40]
    lw[masked] = -np.inf
    y[masked] = value
    got = sq.vjp.log_normalizer(
        xp.asarray(grad), xp.asarray(x), xp.asarray(y), log_weights=xp.asarray(lw)
    )
    gx, gy, glw = (to_numpy(a) for a in got)
    assert (gy[masked] == 0).all()
    assert (glw[masked] == 0).all()
    y[masked] = 0
    check_vjp((gx, gy, glw), grad, x, y, lw)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pairs_that_are_left_out_have_no_influence(xp, value):
    index = np.full(37, -1)
    index[[3, 30]] = 8

    def gradients(x, y, lw, grad):
        arrays = [xp.asarray(a) for a in (grad, x, y)]
        found = sq.vjp.log_normalizer(
            *arrays,
            log_weights=xp.asarray(lw),
            self_index=xp.asarray(index),
            self_term="exclude",
        )
        return [to_numpy(a) for a in found]

    # A key has none on the rows that leave it out,
    x, y, lw, grad = case(np.random.default_rng(7), 37, 41, 5)
    y[8, 2] = value
    gx = gradients(x, y, lw, grad)[0]
    y[8], lw[8] = 0, -np.inf
    (expected, error), _, _ = log_normalizer_vjp(grad, x, y, lw)
    assert_within(gx[index == 8], expected[index == 8], error[index == 8])
    # nor has a row on the key that it leaves out.
    x, y, lw, grad = case(np.random.default_rng(7), 37, 41, 5)
    x[3, 1] = value
    gy = gradients(x, y, lw, grad)[1]
    kept = np.arange(37) != 3
    _, (expected, error), _ = log_normalizer_vjp(
        grad[kept], x[kept], y, lw, excluded=index[kept]
    )
    assert_within(gy[8], expected[8], error[8])


def test_rows_of_infinite_sum(xp):
    # A score of +inf makes inf - inf of its pair; the row's other pairs have weight 0.
    rng = np.random.default_rng(8)
    x, y, lw, grad = case(rng, 37, 41, 5)
    x[5, 1] = np.inf
    got = sq.vjp.log_normalizer(
        xp.asarray(grad), xp.asarray(x), xp.asarray(y), log_weights=xp.asarray(lw)
    )
    gx, gy, glw = (to_numpy(a) for a in got)
    rising = y[:, 1] > 0
    kept = np.arange(37) != 5
    expected = log_normalizer_vjp(grad[kept], x[kept], y, lw)
    assert np.isnan(gx[5]).all()
    assert np.isnan(gy[rising]).all() and np.isnan(glw[rising]).all()
    assert_within(gx[kept], *expected[0])
    for found, (value, error) in zip((gy, glw), expected[1:], strict=True):
        assert_within(found[~rising], value[~rising], error[~rising])


def test_rows_that_attend_nothing_have_no_gradient(xp):
    rng = np.random.default_rng(7)
    x, y, lw, grad = case(rng, 4, 1, 3)
    index = np.array([0, -1, 0, 0])
    got = sq.vjp.log_normalizer(
        xp.asarray(grad),
        xp.asarray(x),
        xp.asarray(y),
        log_weights=xp.asarray(lw),
        self_index=xp.asarray(index),
        self_term="exclude",
    )
    gx, gy, glw = (to_numpy(a) for a in got)
    assert (gx[[0, 2, 3]] == 0).all()
    np.testing.assert_allclose(gx[1], grad[1] * y[0])
    np.testing.assert_allclose(gy[0], grad[1] * x[1])
    np.testing.assert_allclose(glw[0], grad[1])
    lw[:] = -np.inf
    got = sq.vjp.log_normalizer(
        xp.asarray(grad), xp.asarray(x), xp.asarray(y), log_weights=xp.asarray(lw)
    )
    for a in got:
        assert (to_numpy(a) == 0).all()
    got = sq.vjp.gaussian_log_normalizer(
        xp.asarray(grad),
        xp.asarray(x),
        xp.asarray(np.full(2, -np.inf)),
        xp.asarray(np.ones((2, 3))),
        xp.asarray(np.ones((2, 3, 1))),
    )
    for a in got:
        if a is not None:
            assert (to_numpy(a) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores(dtype):
    rng = np.random.default_rng(8)
    x, y, _lw, grad = case(rng, 20, 30, 6, dtype, scale=400.0)
    got = sq.vjp.log_normalizer(grad, x, y)
    for a in got[:2]:
        assert np.isfinite(a).all()
    if dtype == np.float64:
        check_vjp(got, grad, x, y)


def test_gradient_of_the_weights_is_the_softmax():
    rng = np.random.default_rng(9)
    x, y, lw, _ = case(rng, 1, 50, 4)
    _, _, glw = sq.vjp.log_normalizer(np.ones(1), x, y, log_weights=lw)
    s = x[0] @ y.T + lw
    p = np.exp(s - s.max())
    np.testing.assert_allclose(glw, p / p.sum(), rtol=1e-13)
    np.testing.assert_allclose(glw.sum(), 1, rtol=1e-14)


def test_strided_gradients():
    rng = np.random.default_rng(10)
    x, y, lw, grad = case(rng, 45, 53, 17)
    expected = sq.vjp.log_normalizer(grad, x, y, log_weights=lw)
    got = sq.vjp.log_normalizer(
        np.repeat(grad, 2)[::2],
        np.asfortranarray(x),
        y[::-1].copy()[::-1],
        log_weights=np.repeat(lw, 3)[::3],
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    ones = sq.vjp.log_normalizer(np.broadcast_to(1.0, 45), x, y)
    for a, b in zip(
        ones[:2], sq.vjp.log_normalizer(np.ones(45), x, y)[:2], strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("threads", [2, 3])
def test_thread_count_changes_nothing(threads):
    rng = np.random.default_rng(11)
    x, y, lw, grad = case(rng, 700, 900, 17)
    with sq.num_threads(1):
        expected = sq.vjp.log_normalizer(grad, x, y, log_weights=lw)
    with sq.num_threads(threads):
        got = sq.vjp.log_normalizer(grad, x, y, log_weights=lw)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_torch_gradcheck():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(12)
    x, y, lw, _ = case(rng, 5, 6, 3)
    x, y, lw = (torch.from_numpy(a).requires_grad_() for a in (x, y, lw))
    index = torch.tensor([2, -1, 0, 5, 2])

    def f(x, y, lw):
        return sq.log_normalizer(
            x, y, log_weights=lw, self_index=index, self_term="exclude"
        )

    assert torch.autograd.gradcheck(f, (x, y, lw))
    stacked = torch.stack([x, 2 * x]).detach().requires_grad_()
    assert torch.autograd.gradcheck(f, (stacked, y, lw))
    assert torch.autograd.gradcheck(lambda x: sq.log_normalizer(x, x), (x,))


def test_torch_gradcheck_of_the_gaussian():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(13)
    arrays = [
        rng.standard_normal((4, 3)),
        rng.standard_normal(2),
        rng.standard_normal((2, 3)),
        rng.standard_normal((2, 3, 2)) / 2,
    ]
    tensors = tuple(torch.from_numpy(a).requires_grad_() for a in arrays)
    assert torch.autograd.gradcheck(sq.gaussian_log_normalizer, tensors)
    diagonal = torch.from_numpy(rng.random((2, 3))).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *a: sq.gaussian_log_normalizer(*a[:-1], diagonal=a[-1]),
        (*tensors, diagonal),
    )


def test_jax_grad_of_the_reference():
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    rng = np.random.default_rng(14)
    x, y, lw, grad = case(rng, 9, 11, 4)
    lw[3] = -np.inf
    index = rng.integers(-1, 11, 9)

    def f(x, y, lw):
        out = sq.log_normalizer(
            x,
            y,
            log_weights=lw,
            self_index=jnp.asarray(index),
            self_term="exclude",
        )
        return (jnp.asarray(grad) * out).sum()

    theirs = jax.grad(f, (0, 1, 2))(*map(jnp.asarray, (x, y, lw)))
    check_vjp(theirs, grad, x, y, lw, index)
    jitted = jax.jit(jax.grad(f, (0, 1, 2)))(*map(jnp.asarray, (x, y, lw)))
    for a, b in zip(jitted, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)

    arrays = [
        rng.standard_normal((9, 4)),
        np.array([0.5, -np.inf, 1.0]),
        rng.standard_normal((3, 4)),
        rng.standard_normal((3, 4, 2)),
    ]

    def g(*a):
        return (jnp.asarray(grad) * sq.gaussian_log_normalizer(*a)).sum()

    theirs = jax.grad(g, (0, 1, 2, 3))(*map(jnp.asarray, arrays))
    for a, b in zip(theirs, gaussian_vjp(grad, *arrays), strict=True):
        np.testing.assert_allclose(a, b.astype(float), rtol=1e-11, atol=1e-13)


def test_jax_transformations():
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(15)
    x = jax.numpy.asarray(rng.standard_normal((3, 9, 4)))
    y = jax.numpy.asarray(rng.standard_normal((11, 4)))
    expected = sq.log_normalizer(x, y)
    out = jax.jit(sq.log_normalizer)(x, y)
    np.testing.assert_allclose(out, expected, rtol=1e-13)
    out = jax.vmap(sq.log_normalizer, (0, None))(x, y)
    np.testing.assert_allclose(out, expected, rtol=1e-13)
    tangent = jax.jvp(lambda x: sq.log_normalizer(x, y), (x,), (x,))[1]
    gx = sq.vjp.log_normalizer(np.ones((3, 9)), np.asarray(x), np.asarray(y))[0]
    np.testing.assert_allclose(tangent, (gx * np.asarray(x)).sum(-1), rtol=1e-10)


# --------------------------------------------------------------------------- features


def check_features_vjp(got, grad, given, antithetic, library=None):
    """Against the formulas within their error bound, every shape that of its input."""
    inputs = features.public([given.x, *given[1:]])
    expected = features.log_features_vjp(grad, given, antithetic)
    values, bounds = map(features.public, expected)
    for a, value, bound, array in zip(got, values, bounds, inputs, strict=True):
        if library is not None:
            assert type(a) is library.array_type()
        a = to_numpy(a)
        assert a.shape == array.shape
        assert a.dtype == array.dtype
        # What was stretched is summed once more.
        assert_within(a, sum_to(value, array.shape), 2 * sum_to(bound, array.shape))


def features_grad(given, antithetic, batch=(), seed=1):
    m = (2 if antithetic else 1) * given.projection.shape[-2]
    shape = (*batch, given.x.shape[-2], m)
    return np.random.default_rng(seed).standard_normal(shape).astype(given.dtype)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("form", ["all with diagonal", "all with factor"])
def test_features_finite_differences(form, antithetic):
    given = features.case(form, n=3, m=2, d=3, r=2)
    places = [place for place, a in enumerate(given) if a is not None]
    grad = features_grad(given, antithetic)

    def moved(*arrays):
        complete = list(given)
        for place, array in zip(places, arrays, strict=True):
            complete[place] = array
        return features.log_features(features.Case(*complete), antithetic)[0]

    expected = differences(moved, [given[place] for place in places], grad)
    got = given.call(sq.vjp.log_features, lambda a: a, grad, antithetic=antithetic)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("form", features.FORMS)
def test_features_on_every_library(xp, form, antithetic):
    given = features.case(form)
    grad = features_grad(given, antithetic)
    got = given.call(sq.vjp.log_features, xp.asarray, grad, antithetic=antithetic)
    check_features_vjp(got, grad, given, antithetic, xp)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["all with diagonal", "all with factor"])
@pytest.mark.parametrize(
    "n, m, d, r",
    [
        (0, 5, 4, 3),
        (5, 0, 4, 3),
        (5, 4, 0, 2),
        (1, 1, 1, 0),
        (13, 33, 65, 7),
        (97, 130, 33, 40),
        (300, 7, 5, 2),
    ],
    ids=str,
)
def test_features_shapes(n, m, d, r, form, dtype):
    given = features.case(form, n=n, m=m, d=d, r=r, dtype=dtype)
    for antithetic in (False, True):
        grad = features_grad(given, antithetic)
        got = given.call(sq.vjp.log_features, lambda a: a, grad, antithetic=antithetic)
        check_features_vjp(got, grad, given, antithetic)


@pytest.mark.parametrize("form", ["all with diagonal", "all with factor"])
@pytest.mark.parametrize(
    "bx, bp",
    [((2,), (2,)), ((2,), ()), ((), (2,)), ((2, 1), (3,)), ((0,), ())],
    ids=str,
)
def test_features_batches_sum_what_was_stretched(bx, bp, form):
    given = features.case(form, bx=bx, bp=bp)
    grad = features_grad(given, True, np.broadcast_shapes(bx, bp))
    got = given.call(sq.vjp.log_features, lambda a: a, grad, antithetic=True)
    check_features_vjp(got, grad, given, True)


def test_features_where_the_bias_alone_has_batches(xp):
    given = features.case("all with factor")
    batched = given._replace(bias=np.stack([given.bias, 2 * given.bias]))
    grad = features_grad(batched, True, (2,))
    got = batched.call(sq.vjp.log_features, xp.asarray, grad, antithetic=True)
    check_features_vjp(got, grad, batched, True)


def test_strided_gradients_of_features():
    given = features.case("all with factor", n=13, m=9, d=7)
    grad = features_grad(given, True)
    for change in (
        lambda a: np.flip(np.flip(a).copy()),
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    ):
        got = given.call(sq.vjp.log_features, change, grad, antithetic=True)
        check_features_vjp(got, grad, given, True)
    ones = np.broadcast_to(1.0, grad.shape)
    got = given.call(sq.vjp.log_features, lambda a: a, ones, antithetic=True)
    check_features_vjp(got, ones, given, True)


def test_features_types_of_gradients():
    given = features.case("all with diagonal", dtype=np.float32)
    grad = features_grad(given, False)
    half = given._replace(x=given.x.astype(np.float16))
    got = half.call(sq.vjp.log_features, lambda a: a, grad)
    assert [a.dtype for a in got] == [np.float16] + [np.float32] * 5
    wide = given._replace(bias=given.bias.astype(np.float64))
    got = wide.call(sq.vjp.log_features, lambda a: a, grad)
    assert [a.dtype for a in got] == [np.float32] * 2 + [np.float64] + [np.float32] * 3


def test_transform_is_its_own_reverse(xp):
    x = np.random.default_rng(0).standard_normal((3, 16))
    grad = np.cos(x)
    (got,) = sq.vjp.hadamard_transform(xp.asarray(grad), xp.asarray(x))
    assert type(got) is xp.array_type()
    assert_within(to_numpy(got), *features.hadamard_transform(grad))
    (got,) = sq.vjp.hadamard_transform(
        xp.asarray(grad.astype(np.float32)), xp.asarray(x.astype(np.float32))
    )
    assert to_numpy(got).dtype == np.float32


# ---------------------------------------------------------------------------- factors


def factor_case(n, rows, d, bv=(), bx=(), dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    k = len(rows[0]) if rows else 3
    values = rng.standard_normal((*bv, len(rows), n, k)) / max(k, 1) ** 0.5
    x = rng.standard_normal((*bx, n, d))
    grad = rng.standard_normal((*np.broadcast_shapes(bv, bx), n, d))
    return values.astype(dtype), x.astype(dtype), grad.astype(dtype)


def split(values):
    return [values[..., m, :, :] for m in range(values.shape[-3])]


def check_within(got, value, bound, given, library=None):
    if library is not None:
        assert type(got) is library.array_type()
    got = to_numpy(got)
    assert got.shape == given.shape
    assert got.dtype == given.dtype
    # A sum over batches adds roundings of its own.
    assert_within(got, sum_to(value, given.shape), sum_to(bound, given.shape) * 2)


def check_product_vjp(got, grad, values, x, rows, *, library=None, **options):
    chain = factors.Chain(split(values), x, rows, **options)
    found, bounds = chain.gradients(grad)
    if rows:
        stacked = np.stack(found[:-1], -3), np.stack(bounds[:-1], -3)
        check_within(got[0], *stacked, values, library)
    else:
        assert to_numpy(got[0]).shape == values.shape
    check_within(got[1], found[-1], bounds[-1], x, library)


@pytest.mark.parametrize("residual", factors.RESIDUALS)
@pytest.mark.parametrize("transpose", [False, True])
def test_product_finite_differences(residual, transpose):
    rows = [(0, 1, 7), (0, -2, 3)]
    values, x, grad = factor_case(5, rows, 2)
    segments = np.array([0, 0, 0, 1, 1])
    for circular, ids in ((True, None), (False, None), (True, segments)):
        flags = {"residual": residual, "circular": circular, "transpose": transpose}

        def product(values, x, ids=ids, flags=flags):
            chain = factors.Chain(split(values), x, rows, segments=ids, **flags)
            return chain.product()[0]

        expected = differences(product, [values, x], grad)
        got = sq.vjp.sparse_factor_product(
            grad, values, x, pattern=rows, segment_ids=ids, **flags
        )
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)
        check_product_vjp(got, grad, values, x, rows, segments=ids, **flags)


@pytest.mark.parametrize("residual", factors.RESIDUALS)
@pytest.mark.parametrize("transpose", [False, True])
def test_products_on_every_library(xp, residual, transpose):
    rows = [factors.chord(4)] * 3
    values, x, grad = factor_case(9, rows, 3, bv=(2, 1), bx=(3,))
    flags = {"residual": residual, "transpose": transpose}
    got = sq.vjp.sparse_factor_product(
        xp.asarray(grad), xp.asarray(values), xp.asarray(x), **flags
    )
    check_product_vjp(got, grad, values, x, rows, library=xp, **flags)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, m, k, d",
    [
        (1, 1, 1, 1),
        (2, 3, 4, 1),
        (31, 4, 6, 5),
        (64, 2, 7, 33),
        (129, 3, 8, 40),
        (0, 2, 3, 4),
        (5, 0, 3, 4),
        (5, 2, 0, 4),
        (5, 2, 3, 0),
    ],
    ids=str,
)
def test_products_shapes(n, m, k, d, dtype):
    rows = [factors.chord(k)] * m
    values, x, grad = factor_case(n, rows, d, bx=(2,), dtype=dtype)
    for residual in factors.RESIDUALS:
        for circular in (True, False):
            flags = {"residual": residual, "circular": circular}
            got = sq.vjp.sparse_factor_product(grad, values, x, **flags)
            check_product_vjp(got, grad, values, x, rows, **flags)


@pytest.mark.parametrize(
    "bv, bx",
    [((2,), (2,)), ((2,), ()), ((), (3,)), ((2, 1), (3,)), ((1,), (2, 3)), ((0,), ())],
    ids=str,
)
def test_products_batches_sum_what_was_stretched(bv, bx):
    rows = [factors.cdil(3, m) for m in range(2)]
    values, x, grad = factor_case(9, rows, 2, bv=bv, bx=bx)
    for residual in factors.RESIDUALS:
        for transpose in (False, True):
            flags = {"residual": residual, "transpose": transpose}
            got = sq.vjp.sparse_factor_product(grad, values, x, pattern="cdil", **flags)
            check_product_vjp(got, grad, values, x, rows, **flags)


@pytest.mark.parametrize("residual", factors.RESIDUALS)
def test_intermediates_that_are_given(xp, residual):
    rows = [factors.chord(4)] * 3
    values, x, grad = factor_case(9, rows, 3, bv=(2,))
    arrays = (xp.asarray(values), xp.asarray(x))
    kept = sq.sparse_factor_product(
        *arrays, residual=residual, return_intermediates=True
    )
    got = sq.vjp.sparse_factor_product(
        xp.asarray(grad),
        *arrays,
        residual=residual,
        out=kept.out,
        intermediates=kept.intermediates,
    )
    check_product_vjp(got, grad, values, x, rows, residual=residual, library=xp)
    if xp.name == "numpy":
        again = sq.vjp.sparse_factor_product(grad, *arrays, residual=residual)
        for a, b in zip(got, again, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("residual", factors.RESIDUALS)
@pytest.mark.parametrize("transpose", [False, True])
def test_gradients_of_factors_in_a_list(residual, transpose):
    rows = [factors.chord(2), factors.chord(5), factors.chord(1)]
    values = [
        factor_case(8, [row], 3, bv=(2, 1), seed=m)[0][..., 0, :, :]
        for m, row in enumerate(rows)
    ]
    _, x, grad = factor_case(8, rows, 3, bv=(2, 1), bx=(3,))
    options = {"residual": residual, "transpose": transpose}
    got, gx = sq.vjp.sparse_factor_product(grad, values, x, **options)
    found, bounds = factors.Chain(values, x, rows, **options).gradients(grad)
    for a, value, bound, given in zip(
        [*got, gx], found, bounds, [*values, x], strict=True
    ):
        check_within(a, value, bound, given)


@pytest.mark.parametrize("transpose", [False, True])
def test_gradients_of_what_is_left_out(xp, transpose):
    """Nothing passes through terms beyond an end, whatever they hold."""
    rows = [(1, -2)]
    values, x, grad = factor_case(6, rows, 2)
    ids = np.array([0, 0, 0, 1, 1, 1])
    options = {"circular": False, "transpose": transpose}
    chain = factors.Chain(split(values), x, rows, segments=ids, **options)
    (g_values, gx), (b_values, bx) = chain.gradients(grad)
    values[0, [2, 5], 0] = np.nan
    values[0, [0, 1, 3, 4], 1] = np.inf
    got = sq.vjp.sparse_factor_product(
        *map(xp.asarray, (grad, values, x)),
        pattern=rows,
        segment_ids=xp.asarray(ids),
        **options,
    )
    check_within(got[0], g_values[None], b_values[None], values)
    check_within(got[1], gx, bx, x)


def test_nan_in_a_gradient_stays_where_it_is_linked():
    rows = [(0, 1)]
    values, x, grad = factor_case(6, rows, 2)
    grad[2, 1] = np.nan
    got = sq.vjp.sparse_factor_product(grad, values, x, pattern=rows)
    check_product_vjp(got, grad, values, x, rows)
    assert np.isnan(got[0]).sum() == 2
    assert np.isnan(got[1]).sum() == 2


@pytest.mark.parametrize("residual", factors.RESIDUALS)
@pytest.mark.parametrize("circular", [True, False])
def test_products_against_torch(residual, circular):
    """Its autograd of gathers and sums, in float64."""
    torch = pytest.importorskip("torch")
    n, m = 31, 4
    rows = [factors.cdil(5, factor) for factor in range(m)]
    values, x, grad = factor_case(n, rows, 5, bv=(2, 1), bx=(3,))
    a = torch.from_numpy(values).requires_grad_()
    b = torch.from_numpy(x).requires_grad_()
    v = b
    for factor, row in enumerate(rows):
        place, inside = factors.places(factors.runs(n), row, circular)
        kept = a[..., factor, :, :] * torch.from_numpy(inside)
        gathered = v[..., torch.from_numpy(place), :]
        added = {"none": 0.0, "step": v, "input": b}[residual]
        v = (kept[..., None] * gathered).sum(-2) + added
    expected = torch.autograd.grad(v, (a, b), torch.from_numpy(grad))
    options = {"pattern": "cdil", "residual": residual, "circular": circular}
    got = sq.vjp.sparse_factor_product(grad, values, x, **options)
    for found, truth in zip(got, expected, strict=True):
        # Far above gamma(4 · 7 + 5) of entries whose sizes add up to a few hundred.
        scale = np.abs(truth.numpy()).max()
        np.testing.assert_allclose(found, truth.numpy(), rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_gradient_of_a_product(threads):
    values, x, grad = factor_case(
        600, [factors.chord(8)] * 3, 33, bx=(3,), dtype=np.float32
    )
    for residual in factors.RESIDUALS:
        with sq.num_threads(1):
            expected = sq.vjp.sparse_factor_product(grad, values, x, residual=residual)
        with sq.num_threads(threads):
            got = sq.vjp.sparse_factor_product(grad, values, x, residual=residual)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_strided_gradients_of_products():
    rows = [factors.chord(5)] * 3
    values, x, grad = factor_case(21, rows, 7, bv=(2,), bx=(2,))
    expected = sq.vjp.sparse_factor_product(grad, values, x, residual="input")
    for change in (
        lambda a: np.flip(np.flip(a).copy()),
        lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        np.asfortranarray,
    ):
        got = sq.vjp.sparse_factor_product(
            *map(change, (grad, values, x)), residual="input"
        )
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def network_case(n, d, h, k, m, bx=(), bw=(), dtype=np.float64):
    rng = np.random.default_rng(n + d + h)
    shapes = [(m, h, d), (m, h), (m, k, h), (m, k)]
    scales = [max(d, 1) ** -0.5, 1, max(h, 1) ** -0.5, 1]
    weights = tuple(
        (rng.standard_normal((*bw, *shape)) * scale).astype(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )
    x = rng.standard_normal((*bx, n, d)).astype(dtype)
    grad = rng.standard_normal((*np.broadcast_shapes(bx, bw), m, n, k)).astype(dtype)
    return grad, x, weights


def check_networks_vjp(got, grad, x, weights, library=None):
    gx, g_weights = got
    assert isinstance(g_weights, sq.FactorWeights)
    found, bounds = factors.Networks(x, weights).gradients(grad)
    for a, value, bound, given in zip(
        (gx, *g_weights), found, bounds, (x, *weights), strict=True
    ):
        check_within(a, value, bound, given, library)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, d, h, k, m",
    [
        (1, 1, 1, 1, 1),
        (5, 3, 7, 4, 2),
        (33, 32, 32, 6, 3),
        (130, 65, 33, 17, 1),
        (0, 3, 4, 5, 2),
        (4, 3, 0, 5, 2),
        (4, 3, 4, 0, 2),
        (4, 3, 4, 5, 0),
    ],
    ids=str,
)
def test_networks_shapes(n, d, h, k, m, dtype):
    grad, x, weights = network_case(n, d, h, k, m, dtype=dtype)
    got = sq.vjp.factor_values(grad, x, weights)
    check_networks_vjp(got, grad, x, weights)


def test_gradients_of_networks_on_every_library(xp):
    grad, x, weights = network_case(9, 4, 6, 5, 2, bx=(3,), bw=(2, 1))
    got = sq.vjp.factor_values(
        xp.asarray(grad), xp.asarray(x), tuple(map(xp.asarray, weights))
    )
    check_networks_vjp(got, grad, x, weights, xp)


@pytest.mark.parametrize("bx, bw", [((2,), ()), ((), (3,)), ((2, 1), (3,))], ids=str)
def test_networks_batches_sum_what_was_stretched(bx, bw):
    grad, x, weights = network_case(7, 3, 5, 4, 2, bx=bx, bw=bw)
    check_networks_vjp(sq.vjp.factor_values(grad, x, weights), grad, x, weights)
    # Of the weights some may be of a batch, and some not.
    mixed = tuple(w[0] if bw and i % 2 else w for i, w in enumerate(weights))
    check_networks_vjp(sq.vjp.factor_values(grad, x, mixed), grad, x, mixed)


def test_networks_against_torch():
    torch = pytest.importorskip("torch")
    grad, x, weights = network_case(13, 5, 7, 4, 3, bx=(2,))
    arrays = [torch.from_numpy(a).requires_grad_() for a in (x, *weights)]
    a, weight_in, bias_in, weight_out, bias_out = arrays
    z = a[:, None] @ weight_in.mT + bias_in[:, None]
    out = torch.nn.functional.gelu(z) @ weight_out.mT + bias_out[:, None]
    expected = torch.autograd.grad(out, arrays, torch.from_numpy(grad))
    gx, g_weights = sq.vjp.factor_values(grad, x, weights)
    for found, truth in zip((gx, *g_weights), expected, strict=True):
        scale = np.abs(truth.numpy()).max()
        np.testing.assert_allclose(found, truth.numpy(), rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_sparse_matrices_on_every_library(xp, scale):
    rng = np.random.default_rng(0)
    indptr = np.array([0, 3, 3, 8, 12])
    indices = rng.integers(0, 5, 12)
    data, x = rng.standard_normal(12), rng.standard_normal((2, 5, 3))
    addend, grad = rng.standard_normal((4, 3)), rng.standard_normal((2, 4, 3))
    arrays = [xp.asarray(a) for a in (grad, data, indices, indptr, x)]
    got = sq.vjp.csr_product(*arrays, addend=xp.asarray(addend), scale=scale)
    row = np.repeat(np.arange(4), np.diff(indptr))
    dense = factors.csr_dense(data, indices, indptr, 5)
    sizes = factors.csr_dense(np.abs(data), indices, indptr, 5)
    error = gamma(20, np.float64)
    dots = grad[:, row] * x[:, indices] * np.longdouble(scale)
    expected = [
        (dots.sum((0, 2)), np.abs(dots).sum((0, 2)), data),
        (scale * dense.T @ grad, sizes.T @ np.abs(grad), x),
        (grad, np.abs(grad), addend),
    ]
    for found, (value, size, given) in zip(got, expected, strict=True):
        check_within(found, value, (error * size).astype(float), given, xp)
    assert len(sq.vjp.csr_product(*arrays)) == 2


def test_a_sparse_matrix_without_entries():
    none, indptr = np.zeros(0), np.zeros(4, int)
    g_data, gx = sq.vjp.csr_product(
        np.ones((3, 2)), none, none.astype(int), indptr, np.ones((5, 2))
    )
    assert g_data.shape == (0,)
    np.testing.assert_array_equal(gx, np.zeros((5, 2)))


def test_types_of_gradients_of_factors():
    values, x, grad = factor_case(8, [factors.chord(4)] * 2, 3)
    got = sq.vjp.sparse_factor_product(
        grad.astype(np.float32), values.astype(np.float16), x.astype(np.float32)
    )
    assert [a.dtype for a in got] == [np.float16, np.float32]
