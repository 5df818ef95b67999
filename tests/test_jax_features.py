"""JAX: random features as primitives over the compiled kernels."""

from __future__ import annotations

import numpy as np
import pytest

import subquad as sq
from _feature_formulas import Case, case
from subquad import _dispatch
from subquad._backends import jax_targets
from subquad._reference import features as reference

jax = pytest.importorskip("jax", reason="jax is not installed")
jnp = jax.numpy

if jax_targets.problem():
    pytest.skip(jax_targets.problem(), allow_module_level=True)

from test_jax import calls, close  # noqa: E402

DTYPES = [np.float32, np.float64]
FULL = ["all with diagonal", "all with factor"]
KINDS = ["single", "pairs", "trigonometric"]
HANDLERS = {
    "single": "log_features",
    "pairs": "log_features",
    "trigonometric": "trigonometric_features",
}


def on_jax(given):
    """The arrays of a case that are given, and what makes a case of others."""
    places = [place for place, a in enumerate(given) if a is not None]

    def again(found):
        complete = [None] * 7
        for place, array in zip(places, found, strict=True):
            complete[place] = array
        return Case(*complete)

    return tuple(jnp.asarray(given[i]) for i in places), again


def functions_of(again):
    """Public functions of arrays, and the same by the reference."""

    def split(arrays):
        return again(arrays)

    return {
        "single": (
            lambda *a: split(a).call(sq.log_features),
            lambda *a: reference.log_features(*split(a), False, False),
        ),
        "pairs": (
            lambda *a: split(a).call(sq.log_features, antithetic=True),
            lambda *a: reference.log_features(*split(a), True, False),
        ),
        "trigonometric": (
            lambda *a: split(a).call(sq.trigonometric_features),
            lambda *a: reference.trigonometric_features(*split(a)),
        ),
    }


def setting(form, kind, **options):
    """Arrays, a public function of them, and its reference."""
    arrays, again = on_jax(case(form, **options))
    return arrays, *functions_of(again)[kind]


def summed(function):
    return lambda *arrays: jnp.sin(function(*arrays)).sum()


def every_place(arrays):
    return tuple(range(len(arrays)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["none", *FULL])
def test_values_are_those_of_numpy(form, kind, dtype):
    given = case(form, dtype=dtype)
    _, again = on_jax(given)
    function = functions_of(again)[kind][0]
    expected = function(*(a for a in given if a is not None))
    arrays, _ = on_jax(given)
    close(function(*arrays), expected, rtol=0)
    close(jax.jit(function)(*arrays), expected, rtol=0)
    assert calls(function, *arrays) == [HANDLERS[kind]]


def test_transform():
    x = np.random.default_rng(0).standard_normal((3, 16))
    expected = sq.hadamard_transform(x)
    close(jax.jit(sq.hadamard_transform)(x), expected, rtol=0)
    assert calls(sq.hadamard_transform, jnp.asarray(x)) == ["hadamard_transform"]
    grad = jax.jit(
        jax.grad(lambda x: (jnp.arange(16.0) * sq.hadamard_transform(x))[0].sum())
    )
    found = grad(jnp.asarray(x))
    close(found[0], sq.hadamard_transform(np.arange(16.0)), rtol=0)
    assert not np.asarray(found[1:]).any()
    assert calls(grad, jnp.asarray(x))[-1] == "hadamard_transform"
    value, tangent = jax.jvp(sq.hadamard_transform, (jnp.asarray(x),), (jnp.sin(x),))
    close(value, expected, rtol=0)
    close(tangent, sq.hadamard_transform(np.sin(x)))
    for axes in ((0, 0), (1, 1)):
        mapped = jax.vmap(jax.vmap(sq.hadamard_transform, 0), *axes)
        stack = jnp.stack([jnp.asarray(x), jnp.cos(x)], axes[0])
        close(mapped(stack), sq.hadamard_transform(stack))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("form", ["none", *FULL])
def test_gradients_are_those_of_numpy(form, antithetic, dtype):
    given = case(form, dtype=dtype)
    arrays, again = on_jax(given)
    function = functions_of(again)["pairs" if antithetic else "single"][0]
    grad = np.cos(np.asarray(function(*arrays)))
    expected = given.call(sq.vjp.log_features, lambda a: a, grad, antithetic=antithetic)
    pulled = lambda g, *a: jax.vjp(function, *a)[1](g)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    found = jax.jit(pulled)(jnp.asarray(grad), *arrays)
    close(list(found), list(expected), rtol=tolerance)
    # Of all gradients, the one of x has a kernel.
    assert calls(pulled, jnp.asarray(grad), *arrays)[-1] == "log_features_vjp"
    found = given.call(sq.vjp.log_features, jnp.asarray, grad, antithetic=antithetic)
    close(list(found), list(expected), rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FULL)
def test_derivatives_are_those_of_the_reference(form, kind):
    arrays, ours, theirs = setting(form, kind, bx=(2, 1), bp=(3,))
    places = every_place(arrays)
    found, expected = (
        jax.jit(jax.grad(summed(f), places))(*arrays) for f in (ours, theirs)
    )
    close(found, expected)
    directions = tuple(jnp.cos(a) for a in arrays)
    found, expected = (
        jax.jit(lambda a, t, f=f: jax.jvp(f, a, t))(arrays, directions)
        for f in (ours, theirs)
    )
    close(found, expected)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_derivatives_of_second_order(kind):
    arrays, ours, theirs = setting("all with factor", kind, n=3, m=2, d=2)

    def change(f):
        """Along a direction, of the gradient and of the gradient's own gradient."""
        places = every_place(arrays)
        gradient = jax.grad(summed(f), places)
        directions = tuple(jnp.cos(a) for a in arrays)
        forward = jax.jvp(gradient, arrays, directions)[1]
        again = jax.grad(
            lambda *a: sum((g * jnp.cos(g)).sum() for g in gradient(*a)), places
        )
        return forward, again(*arrays)

    found, expected = (jax.jit(lambda f=f: change(f))() for f in (ours, theirs))
    close(found, expected)


@pytest.mark.parametrize("place", [0, 3, 4])
def test_gradients_of_one_input(place):
    arrays, ours, theirs = setting("all with factor", "pairs")
    found, expected = (
        jax.jit(jax.grad(summed(f), place))(*arrays) for f in (ours, theirs)
    )
    close(found, expected)


@pytest.mark.parametrize("antithetic", [False, True])
def test_exponentials(antithetic):
    arrays, again = on_jax(case("all with factor"))
    backend = _dispatch.backend_for(x=arrays[0])
    ours = lambda *a: backend.log_features(*again(a), antithetic, True)
    theirs = lambda *a: reference.log_features(*again(a), antithetic, True)
    directions = tuple(jnp.cos(a) for a in arrays)

    def everything(f):
        gradients = jax.grad(summed(f), every_place(arrays))(*arrays)
        return gradients, *jax.jvp(f, arrays, directions)

    found, expected = (jax.jit(lambda f=f: everything(f))() for f in (ours, theirs))
    close(found, expected)


# Which of x, projection, bias, the form, shift and linear are mapped, and where.
AXES = [
    (0, 0, 0, 0, 0, 0),
    (1, None, None, None, None, None),
    (None, 2, None, None, None, None),
    (None, None, 1, None, None, None),
    (None, None, None, 0, None, None),
    (None, None, None, None, 1, None),
    (None, None, None, None, None, 0),
]


@pytest.mark.parametrize(
    "axes, kind", [*((a, "pairs") for a in AXES), (AXES[0], "trigonometric")], ids=str
)
def test_vmap_is_a_loop(axes, kind):
    one, ours, theirs = setting("all with factor", kind, bx=(2,))
    arrays = [
        a if axis is None else jnp.stack([a, 2 * a, -a], axis)
        for a, axis in zip(one, axes, strict=True)
    ]

    def looped(call):
        parts = [
            call(
                *(
                    a if axis is None else jnp.take(a, i, axis=axis)
                    for a, axis in zip(arrays, axes, strict=True)
                )
            )
            for i in range(3)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    places = every_place(arrays)
    for make in (lambda f: f, lambda f: jax.grad(summed(f), places)):
        found = jax.jit(jax.vmap(make(ours), axes))(*arrays)
        expected = jax.jit(lambda make=make: looped(make(theirs)))()
        close(found, expected)
    total = lambda f: lambda *a: jnp.sin(jax.vmap(f, axes)(*a)).sum()
    found, expected = (
        jax.jit(jax.grad(total(f), places))(*arrays) for f in (ours, theirs)
    )
    close(found, expected)


def test_half_precision():
    given = case("all with diagonal", dtype=np.float32)
    arrays, again = on_jax(given)
    function = functions_of(again)["pairs"][0]
    for dtype in (jnp.bfloat16, jnp.float16):
        x = arrays[0].astype(dtype)
        out = jax.jit(function)(x, *arrays[1:])
        assert out.dtype == jnp.float32
        close(out, function(x.astype(jnp.float32), *arrays[1:]), rtol=0)
        gx = jax.grad(summed(function))(x, *arrays[1:])
        assert gx.dtype == dtype
        out = sq.hadamard_transform(x)
        assert out.dtype == jnp.float32


def test_nothing():
    arrays, ours, _ = setting("all with factor", "pairs", n=0)
    assert jax.jit(ours)(*arrays).shape == (0, 10)
    gradients = jax.grad(summed(ours), every_place(arrays))(*arrays)
    assert not any(np.asarray(g).any() for g in gradients)


def test_without_64_bit_types():
    with jax.enable_x64(False):
        arrays, ours, theirs = setting("all with factor", "pairs", dtype=np.float32)
        close(ours(*arrays), theirs(*arrays), rtol=1e-5)
