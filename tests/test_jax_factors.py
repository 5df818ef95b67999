"""JAX: sparse factors as primitives over the compiled kernels."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import subquad as sq
from _oracle_factors import places, runs
from subquad._backends import jax_targets
from subquad._reference import factors as reference

jax = pytest.importorskip("jax", reason="jax is not installed")
jnp = jax.numpy

if jax_targets.problem():
    pytest.skip(jax_targets.problem(), allow_module_level=True)

from test_jax import calls, close  # noqa: E402

DTYPES = [np.float32, np.float64]
OFFSETS = ((0, 1, 7), (2, -1, -5))
SEGMENTS = np.array([4, 4, 1, 1, 1])
M, N, K, D, H = 2, 5, 3, 2, 4
INDICES, INDPTR = np.array([1, 0, 1, 4, 2, 2]), np.array([0, 3, 3, 6])


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def product(**options):
    return functools.partial(
        sq.sparse_factor_product, **{"pattern": OFFSETS, **options}
    )


def by_matrices(
    values, x, *, residual="none", circular=True, transpose=False, segment_ids=None
):
    """The same by a dense matrix, made of where each term takes its row."""
    sequences, whole = runs(N, segment_ids), jnp.eye(N)
    out = whole
    for m, row in enumerate(OFFSETS):
        place, inside = places(sequences, row, circular)
        picked = jnp.asarray(np.eye(N)[place] * inside[..., None], values.dtype)
        added = {"none": 0, "step": out, "input": whole}[residual]
        out = jnp.einsum("...ik,ikj->...ij", values[..., m, :, :], picked) @ out + added
    return (out.mT if transpose else out) @ x


def chain(bv=(), bx=(), dtype=np.float64):
    return normal(*bv, M, N, K, dtype=dtype), normal(*bx, N, D, seed=1, dtype=dtype)


def networks(bx=(), bw=(), dtype=np.float64):
    shapes = ((*bx, N, D), (*bw, 2, H, D), (*bw, 2, H), (*bw, 2, K, H), (*bw, 2, K))
    return tuple(normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))


def values_of(x, *weights):
    return sq.factor_values(x, weights)


def matrix(bx=(), ba=(), dtype=np.float64):
    shapes = ((6,), (*bx, N, D), (*ba, 3, D))
    return tuple(normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))


def structure_for(array):
    if isinstance(array, np.ndarray):
        return INDICES, INDPTR
    return jnp.asarray(INDICES), jnp.asarray(INDPTR)


def rows_of(data, x, addend):
    return sq.csr_product(data, *structure_for(data), x, addend=addend, scale=0.5)


def rows_by_matrix(data, x, addend):
    rows = np.eye(3)[:, np.repeat(np.arange(3), np.diff(INDPTR))]
    columns = jnp.asarray(np.eye(N)[INDICES], data.dtype)
    dense = jnp.asarray(rows, data.dtype) @ (data[:, None] * columns)
    return 0.5 * dense @ x + addend


def on_jax(arrays):
    return tuple(map(jnp.asarray, arrays))


SETTINGS = [
    {"residual": "none"},
    {"residual": "step", "segment_ids": SEGMENTS},
    {"residual": "input", "circular": False},
    {"residual": "input", "transpose": True},
]


def for_jax(options):
    found = dict(options)
    if "segment_ids" in found:
        found["segment_ids"] = jnp.asarray(SEGMENTS)
    return found


# A public function, the same otherwise, and what makes its arrays.
CASES = {
    **{
        name: (
            lambda *a, o=options: product(**for_jax(o))(*a),
            lambda *a, o=options: by_matrices(*a, **o),
            chain,
        )
        for name, options in zip(
            ("product", "segments", "ends", "transpose"), SETTINGS, strict=True
        )
    },
    "networks": (values_of, lambda *a: reference.factor_values(*a), networks),
    "matrices": (rows_of, rows_by_matrix, matrix),
}


def summed(function):
    return lambda *arrays: jnp.sin(function(*arrays)).sum()


def every_place(arrays):
    return tuple(range(len(arrays)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_products_are_those_of_numpy(options, dtype):
    arrays = chain((2,), dtype=dtype)
    function = product(**for_jax(options))
    expected = product(**options)(*arrays)
    close(function(*on_jax(arrays)), expected, rtol=0)
    close(jax.jit(function)(*arrays), expected, rtol=0)
    assert calls(function, *on_jax(arrays)) == ["sparse_factor_product"]
    grad = np.cos(expected)
    found = jax.jit(lambda g, *a: jax.vjp(function, *a)[1](g))(grad, *on_jax(arrays))
    expected = sq.vjp.sparse_factor_product(grad, *arrays, pattern=OFFSETS, **options)
    # One kernel, of intermediates that are kept here and computed anew there.
    close(list(found), list(expected), rtol=1e-6 if dtype == np.float32 else 1e-14)
    given = (jnp.asarray(grad), *on_jax(arrays))
    again = sq.vjp.sparse_factor_product(*given, pattern=OFFSETS, **for_jax(options))
    close(list(again), list(expected), rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_networks_and_matrices_are_those_of_numpy(dtype):
    for function, make in ((values_of, networks), (rows_of, matrix)):
        arrays = make((2,), dtype=dtype)
        expected = function(*arrays)
        close(function(*on_jax(arrays)), expected, rtol=0)
        close(jax.jit(function)(*on_jax(arrays)), expected, rtol=0)


def test_kernels_of_derivatives():
    def of_gradient(function, arrays, places):
        return calls(jax.grad(summed(function), places), *on_jax(arrays))

    forward, reverse = "sparse_factor_product", "sparse_factor_product_vjp"
    assert of_gradient(product(), chain(), (0, 1)) == [forward, reverse]
    # The values alone tell how a gradient passes to x.
    assert of_gradient(product(), chain(), (1,)) == [forward, forward]
    turned = of_gradient(product(transpose=True), chain(), (0, 1))
    assert turned == [forward, reverse, forward]
    found = of_gradient(values_of, networks(), (0, 1, 2, 3, 4))
    assert found == ["factor_values", "factor_values_vjp"]
    found = of_gradient(rows_of, matrix(), (0, 1, 2))
    assert found == ["csr_product", "csr_product_vjp", "csr_product"]
    moved = lambda v, x, t: jax.jvp(lambda x: product()(v, x), (x,), (t,))
    values, x = on_jax(chain())
    assert calls(moved, values, x, x) == [forward, forward]


@pytest.mark.parametrize("recompute", [False, True])
def test_what_a_reverse_keeps(recompute):
    """Intermediates leave the forward kernel only to be kept."""
    shape = f"tensor<{M - 1}x{N}x{D}xf64>"

    def text(function, *arrays):
        return jax.jit(function).lower(*on_jax(arrays)).as_text()

    call = product(recompute=recompute)
    assert shape not in text(call, *chain())
    assert shape not in text(jax.grad(summed(call), 1), *chain())
    kept = shape in text(jax.grad(summed(call)), *chain())
    assert kept == (not recompute)


@pytest.mark.parametrize(
    "name, batches",
    [
        *((name, ((), ())) for name in CASES),
        *((name, ((2, 1), (3,))) for name in ("product", "networks", "matrices")),
    ],
    ids=str,
)
def test_derivatives_of_first_order(name, batches):
    ours, theirs, make = CASES[name]
    arrays = on_jax(make(*batches))
    places = every_place(arrays)
    directions = tuple(jnp.cos(a) for a in arrays)

    def everything(f):
        return jax.grad(summed(f), places)(*arrays), jax.jvp(f, arrays, directions)

    close(*(jax.jit(lambda f=f: everything(f))() for f in (ours, theirs)))


@pytest.mark.parametrize("name", ["product", "networks", "matrices"])
def test_derivatives_of_second_order(name):
    ours, theirs, make = CASES[name]
    arrays = on_jax(make())

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

    close(*(jax.jit(lambda f=f: change(f))() for f in (ours, theirs)))


@pytest.mark.parametrize("residual", ["step", "input"])
def test_derivatives_of_intermediates(residual):
    values, x = on_jax(chain((2,)))
    function = product(residual=residual, return_intermediates=True)
    flags = (residual, True, False, True, False)
    other = lambda v, x: reference.sparse_factor_product(v, x, None, OFFSETS, *flags)
    total = lambda f: lambda v, x: sum(jnp.sin(part).sum() for part in f(v, x))

    def everything(f):
        return list(f(values, x)), jax.grad(total(f), (0, 1))(values, x)

    close(*(jax.jit(lambda f=f: everything(f))() for f in (function, other)))


@pytest.mark.parametrize(
    "name, first, others",
    [
        ("product", 0, 1),
        ("product", None, 0),
        ("transpose", 0, None),
        ("networks", 0, None),
        ("matrices", None, 0),
        ("matrices", 0, None),
    ],
)
def test_vmap_is_a_loop(name, first, others):
    ours, theirs, make = CASES[name]
    one = on_jax(make((2,)) if name != "networks" else make())
    axes = (first, *(others for _ in one[1:]))
    arrays = [
        a if axis is None else jnp.stack([a, 2 * a, -a], min(axis, a.ndim))
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
    total = lambda f: lambda *a: jnp.sin(jax.vmap(f, axes)(*a)).sum()
    found = jax.jit(
        lambda: (
            jax.vmap(ours, axes)(*arrays),
            jax.vmap(jax.grad(summed(ours), places), axes)(*arrays),
            jax.grad(total(ours), places)(*arrays),
        )
    )()
    expected = jax.jit(
        lambda: (
            looped(theirs),
            looped(jax.grad(summed(theirs), places)),
            jax.grad(total(theirs), places)(*arrays),
        )
    )()
    close(found, expected)


def test_vmap_over_segments():
    values, x = on_jax(chain())
    segments = jnp.stack([jnp.asarray(SEGMENTS), jnp.zeros(N, int)])
    call = lambda s: product(segment_ids=s)(values, x)
    expected = jnp.stack([call(s) for s in segments])
    close(jax.vmap(call)(segments), expected, rtol=0)


def test_a_given_transpose_is_taken():
    from subquad._backends import jax as backend

    data, x, addend = on_jax(matrix())
    structure = structure_for(data)
    other = sq.csr_transpose(data, *structure, N)

    def total(data, x, other):
        out = backend.csr_product(data, *structure, x, addend, 2.0, other)
        return jnp.sin(out).sum()

    found = jax.jit(jax.grad(lambda x: total(data, x, other)))(x)
    close(found, jax.grad(lambda x: total(data, x, None))(x))
    text = jax.jit(jax.grad(lambda x: total(data, x, other))).lower(x).as_text()
    assert "stablehlo.sort" not in text


def test_indices_of_either_type():
    data, x, _ = on_jax(matrix())
    expected = sq.csr_product(data, *structure_for(data), x)
    narrow = [a.astype(jnp.int32) for a in structure_for(data)]
    close(sq.csr_product(data, *narrow, x), expected, rtol=0)


def test_nothing():
    for shapes in (((0, 5, 3), (5, 2)), ((2, 0, 3), (0, 2)), ((2, 5, 0), (5, 2))):
        values, x = (jnp.asarray(normal(*shape)) for shape in shapes)
        pattern = np.zeros((shapes[0][0], shapes[0][2]), np.int64)
        call = lambda v, x, p=pattern: sq.sparse_factor_product(v, x, pattern=p)
        out = jax.jit(call)(values, x)
        assert out.shape == x.shape
        grads = jax.jit(jax.grad(lambda v, x, f=call: f(v, x).sum(), (0, 1)))(values, x)
        assert grads[0].shape == values.shape
        np.testing.assert_array_equal(grads[1], 1.0 if shapes[0][0] == 0 else 0.0)


def test_half_precision():
    arrays = [a.astype(jnp.bfloat16) for a in on_jax(chain(dtype=np.float32))]
    out = jax.jit(product())(*arrays)
    assert out.dtype == jnp.bfloat16
    grads = jax.grad(lambda *a: product()(*a).sum(), (0, 1))(*arrays)
    assert all(g.dtype == jnp.bfloat16 for g in grads)


def test_without_64_bit_types():
    with jax.enable_x64(False):
        for name in ("product", "networks", "matrices"):
            ours, theirs, make = CASES[name]
            arrays = on_jax(make(dtype=np.float32))
            # Sums of a dozen terms: some roundings of single precision.
            close(ours(*arrays), theirs(*arrays), rtol=1e-5)
            found, expected = (jax.grad(summed(f))(*arrays) for f in (ours, theirs))
            close(found, expected, rtol=1e-5)


def test_paramixer():
    x, v = normal(N, D), normal(N, 3, seed=1)
    weights = networks()[1:]
    call = lambda x, v, *weights: sq.paramixer(x, v, weights)
    arrays = (x, v, *weights)
    close(jax.jit(call)(*on_jax(arrays)), call(*arrays), rtol=1e-14)
    # The pattern of three links is 0, 1, 2.
    offsets = ((0, 1, 2),) * 2

    def in_two_steps(x, v, *weights):
        values = reference.factor_values(x, *weights)
        flags = ("step", True, False, False, False)
        return reference.sparse_factor_product(values, v, None, offsets, *flags)[0]

    given = on_jax(arrays)
    found, expected = (
        jax.jit(jax.grad(summed(f), (0, 2)))(*given) for f in (call, in_two_steps)
    )
    close(found, expected)
