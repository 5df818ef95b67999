"""Gradients: finite differences, brute force, torch and JAX."""

from __future__ import annotations

import numpy as np
import pytest

import _feature_formulas as features
import subquad as sq
from _arrays import to_numpy
from _oracle import (
    assert_within,
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
