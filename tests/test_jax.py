"""JAX: primitives over the compiled kernels, and what JAX makes of them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import subquad as sq
from _cuda_double import DEVICE_ERROR, Recorder, compile_recorder
from _oracle import (
    assert_within,
    check_gaussian,
    check_log_normalizer,
    gaussian_vjp,
    log_normalizer_vjp,
)
from subquad import _dispatch
from subquad._backends import jax_targets
from subquad._reference import normalizers as reference

jax = pytest.importorskip("jax", reason="jax is not installed")
jnp = jax.numpy

if jax_targets.problem():
    pytest.skip(jax_targets.problem(), allow_module_level=True)

DTYPES = [np.float32, np.float64]
INDEX = np.array([0, 1, -1, 2, 3, 4, 5, 10, -1])


def normal(*shapes, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


def case(seed=0, dtype=np.float64):
    return normal((9, 4), (11, 4), (11,), seed=seed, dtype=dtype)


def mixture(seed=0, dtype=np.float64):
    *arrays, diagonal = normal(
        (9, 4), (3,), (3, 4), (3, 4, 2), (3, 4), seed=seed, dtype=dtype
    )
    return [*arrays, diagonal**2]


def exact(x, y, log_weights=None):
    return sq.log_normalizer(
        x,
        y,
        log_weights=log_weights,
        self_index=jnp.asarray(INDEX),
        self_term="exclude",
    )


def exact_by_reference(x, y, log_weights=None):
    return reference.log_normalizer(x, y, log_weights, jnp.asarray(INDEX))


def gaussian(x, log_counts, means, factors, diagonal=None):
    return sq.gaussian_log_normalizer(x, log_counts, means, factors, diagonal=diagonal)


def gaussian_by_reference(x, log_counts, means, factors, diagonal=None):
    return reference.gaussian_log_normalizer(
        x, log_counts, means, factors, diagonal, None
    )


FUNCTIONS = {
    "exact": (exact, exact_by_reference, case),
    "gaussian": (gaussian, gaussian_by_reference, mixture),
}


def close(found, expected, rtol=1e-10):
    """Compare trees of arrays, relative to the largest element of each."""
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        b = np.asarray(b, np.float64)
        scale = np.max(np.abs(b[np.isfinite(b)]), initial=1e-300)
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=rtol * scale)


def calls(function, *arrays):
    """The handlers that the compiled function calls, in order."""
    text = jax.jit(function).lower(*arrays).as_text()
    return [
        part.partition("(")[0].removeprefix("subquad_")
        for part in text.split("stablehlo.custom_call @")[1:]
        if part.startswith("subquad_")
    ]


def in_subprocess(code, **environment):
    """Run code that ends in an assertion or two; warnings are errors."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


# ------------------------------------------------------------------------------ values


def test_the_kernels_are_taken():
    x, y, _ = case()
    sq.log_normalizer(x, y)
    assert _dispatch.backend_for(x=x).__name__ == "subquad._backends.jax"
    assert jax_targets.status().startswith("compiled kernels (XLA FFI 0.")
    assert calls(sq.log_normalizer, x, y) == ["log_normalizer"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_exact_values(compiled, weighted, exclude, dtype):
    x, y, lw = case(dtype=dtype)
    lw = lw.at[2].set(-np.inf) if weighted else None
    index = jnp.asarray(INDEX) if exclude else None
    term = "exclude" if exclude else "include"

    def f(x, y, lw, index):
        return sq.log_normalizer(x, y, log_weights=lw, self_index=index, self_term=term)

    out = (jax.jit(f) if compiled else f)(x, y, lw, index)
    assert out.dtype == dtype
    check_log_normalizer(np.asarray(out), x, y, lw, INDEX if exclude else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_diagonal", [False, True])
def test_gaussian_values(with_diagonal, dtype):
    arrays = mixture(dtype=dtype)
    arrays[1] = arrays[1].at[1].set(-np.inf)
    if not with_diagonal:
        del arrays[4]
    check_gaussian(np.asarray(jax.jit(gaussian)(*arrays)), *arrays)


@pytest.mark.parametrize(
    ("x_batch", "y_batch", "w_batch"),
    [
        ((2,), (), ()),
        ((), (3,), (1,)),
        ((2, 1), (3,), ()),
        ((), (), (2,)),
        ((0,), (), ()),
    ],
)
def test_batches_broadcast(x_batch, y_batch, w_batch):
    x, y, lw = normal((*x_batch, 9, 4), (*y_batch, 11, 4), (*w_batch, 11))
    out = jax.jit(exact)(x, y, lw)
    check_log_normalizer(np.asarray(out), x, y, lw, INDEX)
    grad = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
    loss = lambda f: lambda *a: (grad * f(*a)).sum()
    found = jax.jit(jax.grad(loss(exact), (0, 1, 2)))(x, y, lw)
    expected = jax.jit(jax.grad(loss(exact_by_reference), (0, 1, 2)))(x, y, lw)
    close(found, expected)


def test_gaussian_batches_broadcast():
    arrays = normal((2, 1, 9, 4), (3,), (3, 3, 4), (1, 1, 3, 4, 2), (2, 1, 3, 4))
    arrays[4] = arrays[4] ** 2
    loss = lambda f: lambda *a: jnp.sin(f(*a)).sum()
    every = tuple(range(5))
    found = jax.jit(jax.value_and_grad(loss(gaussian), every))(*arrays)
    expected = jax.jit(jax.value_and_grad(loss(gaussian_by_reference), every))(*arrays)
    close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [(0, 3, 2), (3, 0, 2), (3, 4, 0), (0, 0, 0)])
def test_empty(shapes, dtype):
    n, m, d = shapes
    x, y, lw = normal((n, d), (m, d), (m,), dtype=dtype)
    f = lambda x, y, lw: sq.log_normalizer(x, y, log_weights=lw)
    check_log_normalizer(np.asarray(jax.jit(f)(x, y, lw)), x, y, lw)
    gradients = jax.jit(jax.grad(lambda *a: f(*a)[:1].sum(), (0, 1, 2)))(x, y, lw)
    assert [g.shape for g in gradients] == [x.shape, y.shape, lw.shape]
    assert all(np.isfinite(g).all() for g in gradients)


def test_infinities():
    x, y, lw = case()
    x = x.at[0].set(np.inf).at[1, 0].set(np.nan)
    y = y.at[3].set(np.nan)
    lw = lw.at[3].set(-np.inf).at[4].set(np.inf)
    f = lambda x, y, lw: sq.log_normalizer(x, y, log_weights=lw)
    out = jax.jit(f)(x, y, lw)
    np.testing.assert_array_equal(out, f(*map(np.asarray, (x, y, lw))))
    assert np.isnan(out[1]) and (out[2:] == np.inf).all()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64])
def test_indices_of_any_type(dtype):
    x, y, _ = case()
    index = np.arange(9).astype(dtype)
    f = lambda x, y, index: sq.log_normalizer(
        x, y, self_index=index, self_term="exclude"
    )
    out = jax.jit(f)(x, y, jnp.asarray(index))
    check_log_normalizer(np.asarray(out), x, y, None, index)


def test_indices_out_of_range_exclude_nothing_where_they_are_traced():
    x, y, _ = case()
    f = lambda x, y, index: sq.log_normalizer(
        x, y, self_index=index, self_term="exclude"
    )
    index = np.where(INDEX == 10, 11, np.where(INDEX == 0, -7, INDEX))
    out = jax.jit(f)(x, y, jnp.asarray(index))
    check_log_normalizer(
        np.asarray(out), x, y, None, np.where((index < 0) | (index > 10), -1, index)
    )
    with pytest.raises(ValueError, match="self_index must lie between -1"):
        f(x, y, jnp.asarray(index))


@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits_are_computed_in_float32(half):
    x, y, lw = (a.astype(half) for a in case())
    wide = [a.astype(jnp.float32) for a in (x, y, lw)]
    close(exact(x, y, lw), exact(*wide), rtol=0)
    loss = lambda *a: exact(*a).sum()
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(x, y, lw)
    expected = jax.grad(loss, (0, 1, 2))(*wide)
    close(found, [g.astype(half) for g in expected], rtol=0)
    value, tangent = jax.jvp(lambda x: exact(x, y, lw), (x,), (x,))
    assert value.dtype == tangent.dtype == jnp.float32
    expected = jax.jvp(lambda x: exact(x, *wide[1:]), wide[:1], wide[:1])[1]
    close(tangent, expected, rtol=1e-5)


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_gradients(dtype):
    x, y, lw = case(dtype=dtype)
    lw = lw.at[2].set(-np.inf)
    grad = np.cos(np.arange(9)).astype(dtype)
    loss = lambda x, y, lw: (jnp.asarray(grad) * exact(x, y, lw)).sum()
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(x, y, lw)
    expected = log_normalizer_vjp(grad, *map(np.asarray, (x, y, lw)), INDEX)
    for gradient, (value, bound) in zip(found, expected, strict=True):
        assert gradient.dtype == dtype
        assert_within(gradient, value, 2 * bound)
    assert calls(jax.grad(loss, (0, 1, 2)), x, y, lw) == [
        "log_normalizer",
        "log_normalizer_vjp",
    ]


def test_gaussian_gradients():
    arrays = mixture()
    grad = np.cos(np.arange(9))
    loss = lambda *a: (jnp.asarray(grad) * gaussian(*a)).sum()
    found = jax.jit(jax.grad(loss, tuple(range(5))))(*arrays)
    close(found, [g.astype(float) for g in gaussian_vjp(grad, *arrays)], rtol=1e-12)
    assert calls(jax.grad(loss), *arrays) == [
        "gaussian_log_normalizer",
        "gaussian_log_normalizer_vjp",
    ]


def test_the_public_reverse_is_the_kernel():
    x, y, lw = case()
    grad = jnp.cos(jnp.arange(9.0))
    f = lambda g, x, y, lw: sq.vjp.log_normalizer(g, x, y, lw)
    found = jax.jit(f)(grad, x, y, lw)
    close(found, f(*map(np.asarray, (grad, x, y, lw))), rtol=1e-14)
    assert calls(f, grad, x, y, lw) == ["log_normalizer", "log_normalizer_vjp"]
    arrays = mixture()
    g = lambda g, *a: sq.vjp.gaussian_log_normalizer(g, *a[:4], diagonal=a[4])
    found = jax.jit(g)(grad, *arrays)
    close(found, g(*map(np.asarray, (grad, *arrays))), rtol=1e-13)


@pytest.mark.parametrize("which", range(5))
def test_a_gradient_in_one_array_alone(which):
    for f, by_reference, make in FUNCTIONS.values():
        arrays = make()
        if which < len(arrays):
            loss = lambda f: lambda *a: jnp.sin(f(*a)).sum()
            found = jax.grad(loss(f), which)(*arrays)
            close(found, jax.jit(jax.grad(loss(by_reference), which))(*arrays))


# -------------------------------------------------------------------- transformations


def total(f):
    return lambda *a: jnp.sin(f(*a)).sum()


def scanned(f):
    def loss(x, *rest):
        step = lambda s, x: (s + jnp.sin(f(x, *rest)).sum(), s)
        return jax.lax.scan(step, 0.0, jnp.stack([x, 2 * x, -x]))[0]

    return loss


TRANSFORMS = {
    "jvp": lambda f, a: jax.jvp(f, a, tuple(map(jnp.cos, a))),
    "jvp of one": lambda f, a: jax.jvp(lambda y: f(a[0], y, *a[2:]), a[1:2], a[1:2]),
    "jit of jvp": lambda f, a: jax.jit(lambda *a: jax.jvp(f, a, a))(*a),
    "linearize": lambda f, a: jax.linearize(f, *a)[1](*a),
    "vjp": lambda f, a: jax.vjp(f, *a)[1](jnp.arange(9.0)),
    "jacfwd": lambda f, a: jax.jacfwd(f, (0, 1, 2))(*a),
    "jacrev": lambda f, a: jax.jacrev(f, (0, 1, 2))(*a),
    "hessian": lambda f, a: jax.hessian(total(f), (0, 1))(*a),
    "grad of grad": lambda f, a: jax.grad(
        lambda x: jnp.sin(jax.grad(total(f), 1)(x, *a[1:])).sum()
    )(a[0]),
    "jvp of grad": lambda f, a: jax.jvp(jax.jit(jax.grad(total(f), 1)), a, a),
    "checkpoint": lambda f, a: jax.grad(total(jax.checkpoint(f)), (0, 1))(*a),
    "scan": lambda f, a: jax.jit(jax.grad(scanned(f), (0, 1)))(*a),
    "cond": lambda f, a: jax.grad(
        lambda x: jax.lax.cond(x[0, 0] > 9, total(f), lambda *a: 0.0, x, *a[1:])
    )(a[0]),
    "vmap of jvp": lambda f, a: jax.vmap(
        lambda t: jax.jvp(f, a, (t, *map(jnp.zeros_like, a[1:])))[1]
    )(jnp.stack([a[0], -a[0]])),
    "no jit": lambda f, a: _without_jit(jax.value_and_grad(total(f)), a),
}


EAGER = ["jvp", "linearize", "vjp", "grad of grad", "no jit"]


def _without_jit(f, arrays):
    with jax.disable_jit():
        return f(*arrays)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transformations(name, transform):
    f, by_reference, make = FUNCTIONS[name]
    arrays = tuple(make())
    apply = TRANSFORMS[transform]
    # Compiled, the reference is one program instead of many.
    expected = jax.jit(lambda *a: apply(by_reference, a))(*arrays)
    close(jax.jit(lambda *a: apply(f, a))(*arrays), expected)
    if transform in EAGER:
        close(apply(f, arrays), expected)


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (1, 2, -1)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap(name, axes):
    f, by_reference, make = FUNCTIONS[name]
    arrays = make()
    axes = (*axes, *(None for _ in arrays[3:]))
    mapped = [
        a
        if axis is None
        else jnp.moveaxis(jnp.stack([a, 2 * a, -a]), 0, axis % (a.ndim + 1))
        for a, axis in zip(arrays, axes, strict=True)
    ]
    axes = [
        axis if axis is None else axis % (a.ndim + 1)
        for a, axis in zip(arrays, axes, strict=True)
    ]
    every = tuple(range(len(arrays)))
    for make_one in (
        lambda f: f,
        lambda f: jax.grad(total(f), every),
        lambda f: lambda *a: jax.vjp(f, *a)[1](jnp.arange(9.0)),
    ):
        one = jax.vmap(make_one(f), tuple(axes))
        found = jax.jit(one)(*mapped)
        expected = jax.vmap(make_one(by_reference), tuple(axes))
        close(found, jax.jit(expected)(*mapped))
        text = jax.jit(one).lower(*mapped).as_text()
        assert "subquad_" in text and "stablehlo.while" not in text


def test_vmap_of_vmap_and_gradients_through_it():
    x, y, lw = case()
    x = jnp.stack([x, 2 * x, -x])
    y = jnp.stack([y, -y])

    def twice(f):
        over_y = jax.vmap(f, (None, 0, None), out_axes=1)
        return jax.vmap(over_y, (0, None, None))

    every = (0, 1, 2)
    found = jax.jit(jax.value_and_grad(total(twice(exact)), every))(x, y, lw)
    expected = jax.value_and_grad(total(twice(exact_by_reference)), every)
    close(found, jax.jit(expected)(x, y, lw))
    close(twice(exact)(x, y, lw), jax.jit(twice(exact_by_reference))(x, y, lw))


def test_vmap_over_the_index():
    x, y, _ = case()
    x = jnp.stack([x, -x])
    index = jnp.asarray(np.stack([INDEX, INDEX[::-1]]))
    one = lambda x, i: sq.log_normalizer(x, y, self_index=i, self_term="exclude")
    by_reference = lambda x, i: reference.log_normalizer(x, y, None, i)
    close(jax.vmap(one)(x, index), jax.vmap(by_reference)(x, index))
    gradient = lambda f: jax.vmap(jax.grad(total(f)), (0, 0))
    close(jax.jit(gradient(one))(x, index), gradient(by_reference)(x, index))


def test_indices_have_no_gradient():
    x, y, _ = case()
    f = lambda x, i: sq.log_normalizer(x, y, self_index=i, self_term="exclude").sum()
    found = jax.grad(f, (0, 1), allow_int=True)(x, jnp.asarray(INDEX))
    assert found[1].dtype == jax.dtypes.float0
    close(found[0], jax.grad(lambda x: f(x, jnp.asarray(INDEX)))(x), rtol=0)


# ------------------------------------------------------------------- other primitives


def primitives(dtype=np.float64):
    """Arguments for every primitive that has no derivative of its own."""
    x, means, factors, diagonal, grad = normal(
        (9, 4), (3, 4), (3, 4, 2), (3, 4), (9,), dtype=dtype
    )
    labels = jnp.asarray([0, 2, 1, 0, 0, 2, 2, 1, 0])
    weights = jnp.abs(grad).at[1].set(0)
    wide = means.astype(float)
    component = jnp.asarray([0, -1, 2, 0, 1, 1, 0, 2, -1])
    counts, own_weight = jnp.full(3, 3.0, dtype), jnp.full(9, -1.0, dtype)
    deviations, scores = normal((7, 4), (9, 3), seed=1, dtype=dtype)
    own = (component, own_weight)
    gaussian = (x, counts, means, factors)
    residuals = (
        x,
        deviations,
        jnp.abs(deviations[:, 0]),
        jnp.asarray([0, 4, 4, 7]),
        scores**2,
        jnp.ones_like(scores),
    )
    excluded = jnp.asarray([0, -1, 6, 2, 3, 5, -1, 4, 1])
    return [
        ("gaussian_log_normalizer", (*gaussian, None, *own), {"include": False}),
        ("gaussian_log_normalizer", (*gaussian, diagonal**2, *own), {"include": True}),
        ("gaussian_score_moments", (x, means, factors, None), {}),
        ("gaussian_score_moments", (x, means, factors, diagonal**2), {}),
        ("nearest_centroids", (x, means, diagonal[:, 0]), {}),
        ("component_sums", (x, labels, None), {"k": 3}),
        ("component_sums", (x, labels, weights), {"k": 4}),
        ("component_scatter", (x, labels, None, wide), {"diagonal": False}),
        ("component_scatter", (x, labels, weights, wide), {"diagonal": True}),
        ("sample_residuals", (*residuals, None, None), {"quadratic": False}),
        ("sample_residuals", (*residuals, scores, excluded), {"quadratic": True}),
    ]


def call(backend, name, arrays, options):
    if name == "gaussian_log_normalizer":
        *mixture, component, weight = arrays
        return backend.gaussian_log_normalizer(
            *mixture, (component, weight, options["include"])
        )
    return getattr(backend, name)(*arrays, *options.values())


@pytest.mark.parametrize("place", range(11))
def test_primitives(place):
    name, arrays, options = primitives()[place]
    backend = _dispatch.backend_for(x=arrays[0])
    rtol = 1e-12
    expected = jax.jit(lambda *a: call(reference, name, a, options))(*arrays)
    f = lambda *arrays: call(backend, name, arrays, options)
    close(f(*arrays), expected, rtol)
    assert calls(f, *arrays) == [name]
    mapped = [None if a is None else jnp.stack([a, a]) for a in arrays]
    twice = jax.jit(jax.vmap(f))(*mapped)
    close(jax.tree.map(lambda a: a[1], twice), expected, rtol)


@pytest.mark.parametrize("place", range(11))
def test_derivatives_of_primitives_are_those_of_the_reference(place):
    name, arrays, options = primitives()[place]
    backend = _dispatch.backend_for(x=arrays[0])

    def loss(backend):
        def f(x):
            found = call(backend, name, (x, *arrays[1:]), options)
            if name == "sample_residuals":
                # The error is scaled by a maximum, whose gradient XLA may give as NaN.
                found = found[::2]
            return sum(
                jnp.sin(jnp.where(jnp.isfinite(a), a, 0)).sum()
                for a in jax.tree.leaves(found)
                if jnp.issubdtype(a.dtype, jnp.floating)
            )

        return f

    x = arrays[0]
    expected = jax.jit(jax.value_and_grad(loss(reference)))(x)
    close(jax.value_and_grad(loss(backend))(x), expected)


def test_errors_of_the_kernels_are_errors_of_xla():
    x = primitives()[0][1][0]
    backend = _dispatch.backend_for(x=x)
    message = r"INVALID_ARGUMENT: labels: expected values in \[0, 3\), got 7"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(backend.component_sums(x, jnp.full(9, 7), None, 3))


def test_estimator_is_differentiable_in_the_queries():
    x, y, _ = case()
    model = sq.GaussianNormalizer(2, random_state=0).fit(y)
    expected = sq.GaussianNormalizer(2, random_state=0).fit(np.asarray(y))
    close(model.log_normalizer(x), expected.log_normalizer(np.asarray(x)), 1e-12)
    step = 1e-6 * jnp.cos(jnp.arange(36.0)).reshape(9, 4)
    up, down = model.log_normalizer(x + step), model.log_normalizer(x - step)
    loss = lambda x: model.log_normalizer(x).sum()
    slope = (jax.jit(jax.grad(loss))(x) * step).sum()
    np.testing.assert_allclose(slope, (up - down).sum() / 2, rtol=1e-7)


# ----------------------------------------------------------- settings and environments


def test_without_64_bit_types():
    code = """
        import numpy as np
        import jax, jax.numpy as jnp
        import test_jax
        assert not jax.config.jax_enable_x64
        x, y, lw = test_jax.case(dtype=np.float32)
        assert test_jax.calls(test_jax.exact, x, y, lw) == ["log_normalizer"]
        for f, by_reference, make in test_jax.FUNCTIONS.values():
            arrays = make(dtype=np.float32)
            loss = lambda f: lambda *a: jnp.sin(f(*a)).sum()
            every = tuple(range(len(arrays)))
            found = jax.jit(jax.value_and_grad(loss(f), every))(*arrays)
            expected = jax.jit(jax.value_and_grad(loss(by_reference), every))(*arrays)
            test_jax.close(found, expected, 1e-4)
        for name, arrays, options in test_jax.primitives(np.float32):
            backend = test_jax._dispatch.backend_for(x=arrays[0])
            arrays = [None if a is None else jnp.asarray(a) for a in arrays]
            f = lambda *a: test_jax.call(backend, name, a, options)
            g = lambda *a: test_jax.call(test_jax.reference, name, a, options)
            test_jax.close(f(*arrays), jax.jit(g)(*arrays), 1e-4)
            assert test_jax.calls(f, *arrays) == [name]
        import subquad as sq
        sq.GaussianNormalizer(2, random_state=0).fit(y).log_normalizer(x)
    """
    in_subprocess(code, JAX_ENABLE_X64="0")


def test_falls_back_where_the_module_is_missing():
    code = """
        import sys
        sys.modules["subquad._jax"] = None
        import numpy as np
        import jax.numpy as jnp
        import subquad as sq
        from subquad import _dispatch
        from subquad._backends import jax_targets
        x = np.linspace(-1, 1, 12).reshape(4, 3)
        out = sq.log_normalizer(jnp.asarray(x), jnp.asarray(x))
        np.testing.assert_allclose(out, sq.log_normalizer(x, x), rtol=1e-12)
        backend = _dispatch.backend_for(x=out)
        assert backend.__name__ == "subquad._reference.primitives"
        assert jax_targets.status().startswith("array-API code (")
        assert "subquad._backends.jax" not in sys.modules
    """
    in_subprocess(code)


def test_falls_back_where_the_interface_is_too_old(monkeypatch):
    module = jax_targets._handlers()
    assert module.runtime_version() == jax_targets._version_of_jaxlib()
    monkeypatch.setattr(module, "VERSION", module.runtime_version() + 1)
    assert jax_targets.load() is None
    assert "built for version 0." in jax_targets.problem()
    assert jax_targets.status().startswith("array-API code (built for")
    with pytest.raises(ImportError, match="built for version"):
        jax_targets.register(jax)
    monkeypatch.setattr(module, "VERSION", 1)
    assert jax_targets.problem() == ""


def test_falls_back_where_handlers_are_refused():
    code = """
        import jax, jax.numpy as jnp
        def refuse(*arguments, **options):
            raise ValueError("no such platform")
        jax.ffi.register_ffi_target = refuse
        import subquad as sq
        from subquad._backends import jax_targets
        x = jnp.ones((3, 2))
        assert abs(sq.log_normalizer(x, x)[0] - 3.0986122886681098) < 1e-14
        assert jax_targets.problem() == "ValueError: no such platform"
    """
    in_subprocess(code)


def test_status_does_not_import_jax():
    code = """
        import sys
        from subquad._backends import jax_targets
        assert jax_targets.status().startswith("compiled kernels")
        assert "jax" not in sys.modules
    """
    in_subprocess(code)


def test_a_forked_child_computes():
    code = """
        import os, warnings
        import numpy as np
        import jax.numpy as jnp
        import subquad as sq
        x = np.random.default_rng(0).standard_normal((3000, 20))
        out = sq.log_normalizer(jnp.asarray(x), jnp.asarray(x)).block_until_ready()
        # JAX warns that its own threads do not exist in the child.
        warnings.simplefilter("ignore")
        child = os.fork()
        if child == 0:
            ok = np.allclose(sq.log_normalizer(x, x), out, rtol=1e-12)
            os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        sq.log_normalizer(jnp.asarray(x), jnp.asarray(x)).block_until_ready()
    """
    in_subprocess(code)


def test_several_devices():
    code = """
        import numpy as np
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        import subquad as sq
        from test_jax import calls, close
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((16, 4)), rng.standard_normal((12, 4))
        expected = jnp.asarray(sq.log_normalizer(x, y))
        loss = lambda x, y: jnp.sin(sq.log_normalizer(x, y)).sum()
        gradients = jax.grad(loss, (0, 1))(jnp.asarray(x), jnp.asarray(y))
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,))
            a = jax.device_put(x, NamedSharding(mesh, P("rows")))
            b = jax.device_put(y, NamedSharding(mesh, P()))
            for f in (sq.log_normalizer, jax.jit(sq.log_normalizer)):
                out = f(a, b)
                close(out, expected)
                assert out.sharding.spec == P("rows"), out.sharding
            close(jax.jit(jax.grad(loss, (0, 1)))(a, b), gradients)
        mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
        for checked in (True, False):
            f = jax.shard_map(
                sq.log_normalizer,
                mesh=mesh,
                in_specs=(P("rows"), P()),
                out_specs=P("rows"),
                check_vma=checked,
            )
            assert calls(f, x, y) == ["log_normalizer"]
            close(jax.jit(f)(x, y), expected)
            by_shards = lambda x, y: jnp.sin(f(x, y)).sum()
            close(jax.jit(jax.grad(by_shards, (0, 1)))(x, y), gradients)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((1,), ("rows",), (kind,), devices=jax.devices()[:1])
            a = jax.device_put(x, NamedSharding(mesh, P("rows")))
            b = jax.device_put(y, NamedSharding(mesh, P()))
            close(jax.jit(jax.grad(loss, (0, 1)))(a, b), gradients)
    """
    in_subprocess(code, XLA_FLAGS="--xla_force_host_platform_device_count=4")


# -------------------------------------------------------------- CUDA, without a GPU


def _struct(name, *fields):
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_HEAD = (("struct_size", ctypes.c_size_t), ("extension", ctypes.c_void_p))
_GET = _struct("Get", *_HEAD, ("ctx", ctypes.c_void_p), ("value", ctypes.c_void_p))
_GIVE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_GET))
# The functions of XLA_FFI_Api before and after those that a handler calls.
_API = _struct(
    "Api",
    *_HEAD,
    *(("version_size", ctypes.c_size_t), ("version_extension", ctypes.c_void_p)),
    *(("major", ctypes.c_int), ("minor", ctypes.c_int)),
    *(("internal", ctypes.c_void_p), ("error_create", ctypes.c_void_p)),
    ("before_stream", ctypes.c_void_p * 3),
    ("stream_get", ctypes.c_void_p),
    ("before_device", ctypes.c_void_p * 12),
    ("device_get", ctypes.c_void_p),
)
_ERROR = _struct("Error", *_HEAD, ("message", ctypes.c_char_p), ("code", ctypes.c_int))
_BUFFER = _struct(
    "Buffer",
    *_HEAD,
    *(("dtype", ctypes.c_int), ("data", ctypes.c_void_p)),
    *(("rank", ctypes.c_int64), ("dims", ctypes.POINTER(ctypes.c_int64))),
)
_LIST = _struct(
    "List",
    *_HEAD,
    *(("size", ctypes.c_int64), ("types", ctypes.POINTER(ctypes.c_int))),
    ("values", ctypes.POINTER(ctypes.c_void_p)),
)
_ATTRIBUTES = _struct(
    "Attributes",
    *_HEAD,
    *(("size", ctypes.c_int64), ("types", ctypes.POINTER(ctypes.c_int))),
    ("names", ctypes.POINTER(ctypes.c_void_p)),
    ("values", ctypes.POINTER(ctypes.c_void_p)),
)
_SPAN = _struct("Span", ("data", ctypes.c_char_p), ("size", ctypes.c_size_t))
_SCALAR = _struct("Scalar", ("dtype", ctypes.c_int), ("value", ctypes.c_void_p))
_FRAME = _struct(
    "Frame",
    *_HEAD,
    *(("api", ctypes.POINTER(_API)), ("ctx", ctypes.c_void_p), ("stage", ctypes.c_int)),
    *(("args", _LIST), ("rets", _LIST), ("attrs", _ATTRIBUTES)),
    ("future", ctypes.c_void_p),
)
_XLA_TYPES = {"uint8": 6, "float32": 11, "float64": 12, "int64": 5}
_S64 = _XLA_TYPES["int64"]


class Runtime:
    """What XLA gives to a handler on CUDA: a stream and a device."""

    def __init__(self, stream, device):
        self.errors = []
        self.alive = []

        def give_stream(get):
            get.contents.value = stream

        def give_device(get):
            get.contents.value = device

        def create(error):
            self.errors.append((error.contents.code, error.contents.message.decode()))
            return 1

        kinds = (
            _GIVE,
            _GIVE,
            ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ERROR)),
        )
        functions = [
            kind(f)
            for kind, f in zip(kinds, (give_stream, give_device, create), strict=True)
        ]
        addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in functions]
        self.alive += functions
        self.api = _API(
            stream_get=addresses[0], device_get=addresses[1], error_create=addresses[2]
        )

    def _pointers(self, values):
        self.alive += values
        addresses = [ctypes.addressof(value) for value in values]
        array = (ctypes.c_void_p * max(1, len(values)))(*addresses)
        types = (ctypes.c_int * max(1, len(values)))(*(3 for _ in values))
        self.alive += [array, types]
        return array, types

    def _buffers(self, arrays):
        buffers = [
            _BUFFER(
                dtype=_XLA_TYPES[array.dtype.name],
                data=array.ctypes.data,
                rank=array.ndim,
                dims=(ctypes.c_int64 * array.ndim)(*array.shape),
            )
            for array in arrays
        ]
        pointers, types = self._pointers(buffers)
        return _LIST(size=len(arrays), types=types, values=pointers)

    def run(self, handler, inputs=(), outputs=(), **attributes):
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_FRAME))(
            get(handler, None)
        )
        numbers = [ctypes.c_int64(value) for value in attributes.values()]
        self.alive += numbers
        scalars, types = self._pointers(
            [_SCALAR(_S64, ctypes.addressof(number)) for number in numbers]
        )
        spans = [_SPAN(name.encode(), len(name)) for name in attributes]
        names, _ = self._pointers(spans)
        frame = _FRAME(
            api=ctypes.pointer(self.api),
            args=self._buffers(inputs),
            rets=self._buffers(outputs),
            attrs=_ATTRIBUTES(
                size=len(numbers), types=types, names=names, values=scalars
            ),
        )
        return function(ctypes.pointer(frame))


def test_known_index_inside_a_traced_function():
    x, y = normal((4, 3), (6, 3))
    index = jnp.asarray(np.array([0, 5, -1, 2]))

    def left_out(x):
        return sq.log_normalizer(x, y, self_index=index, self_term="exclude")

    np.testing.assert_allclose(jax.jit(left_out)(x), left_out(x), rtol=1e-14)
    beyond = index + 3
    with pytest.raises(ValueError, match="self_index must lie between"):
        jax.jit(lambda x: sq.log_normalizer(x, y, self_index=beyond))(x)


def test_fitted_models_survive_a_traced_function():
    x, y = normal((4, 3), (60, 3))
    model = sq.GaussianNormalizer(2, random_state=0).fit(y)
    traced = jax.jit(model.log_normalizer)(x)
    np.testing.assert_allclose(model.log_normalizer(x), traced, rtol=1e-12)


def check_cuda_handlers(path):
    """Call the handlers for CUDA as XLA does; a recorder stands for the kernels."""
    handlers = jax_targets._handlers().handlers()
    recorder = Recorder(path)
    runtime = Runtime(stream=0x1234, device=1)
    assert not runtime.run(handlers["log_normalizer"]["CUDA"]["initialize"])
    assert recorder.prepared() == [1]
    x, y = np.ones((5, 4), np.float32), np.ones((7, 4), np.float32)
    index, out = np.zeros(5, np.int64), np.zeros(5, np.float32)
    scratch = np.zeros(64, np.uint8)
    execute = handlers["log_normalizer"]["CUDA"]["execute"]
    failed = runtime.run(
        execute, [x, y, index], [out, scratch], numbers=0, present=0b111011
    )
    assert not failed, runtime.errors
    (seen,) = recorder.calls()
    assert (seen.stream, seen.device_id) == (0x1234, 1)
    assert seen.function.endswith("log_normalizer")
    given = [x, y, None, index, out, scratch]
    for array, there in zip(given, seen.arrays, strict=True):
        assert (array is None) == (there is None)
        if array is not None:
            assert there.place == (1, 1)
            assert there.data == array.ctypes.data
            assert there.dtype == array.dtype.name
            assert there.shape == array.shape

    recorder.answer(DEVICE_ERROR, "out: the launch failed")
    assert runtime.run(execute, [x, y], [out, scratch], numbers=0, present=0b110011)
    assert runtime.errors.pop() == (14, "out: the launch failed")
    # Buffers that do not agree with what is said to be present.
    assert runtime.run(execute, [x, y], [out, scratch], numbers=0, present=0b111011)
    assert "present" in runtime.errors.pop()[1]


def test_handlers_for_cuda(tmp_path):
    path = tmp_path / "libsubquad_cuda.so"
    compile_recorder(path, sq.__version__)
    in_subprocess(
        f"import test_jax; test_jax.check_cuda_handlers({str(path)!r})",
        SUBQUAD_CUDA_LIBRARY=str(path),
    )
