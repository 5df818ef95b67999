"""Steps of embeddings on every array library, against their definition."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import subquad as sq
from _arrays import to_numpy
from _oracle import assert_within, epsilon, gamma
from _oracle_embedding import FORMS, Case, case, expected, unit
from subquad import _core, _dispatch
from subquad._backends import compiled
from subquad._reference import embedding as reference

pytestmark = pytest.mark.skip_xp_backend("dask", reason="refused")

DTYPES = [np.float32, np.float64]
BACKENDS = [
    pytest.param(compiled, id="compiled"),
    pytest.param(reference, id="reference"),
]
STEPS = (0.3, 1.0)

# A row, fewer and more rows than a tile of the kernels, and one column as well.
SIZES = [
    {"n": 1, "m": 1, "d": 1, "k": 1, "c": 1},
    {"n": 1, "m": 4, "d": 33, "k": 3, "c": 2},
    {"n": 13, "m": 1, "d": 1, "k": 3, "c": 2},
    {"n": 37, "m": 50, "d": 33, "k": 1, "c": 1},
    {"n": 0, "m": 4, "d": 5, "k": 3, "c": 2},
]


def call(given, step, backend=compiled):
    return backend.embedding_step(*given, step)


def on_library(xp, given, step):
    """The step of a library's backend; its arrays become NumPy's."""
    there = given.map(xp.asarray)
    backend = _dispatch.backend_for(x=there.x)
    found = backend.embedding_step(*there, step)
    for array in found:
        assert array is None or type(array) is xp.array_type()
    if step == 0:
        assert found[0] is there.x
    return [None if array is None else to_numpy(array) for array in found]


def check(found, given, step):
    """All results within their bounds, and rows of unit norm."""
    dtype = given.x.dtype
    out, _, log_z = found
    assert (log_z is None) == (given.components is None)
    for array, truth in zip(found, expected(given, step), strict=True):
        if truth is not None:
            assert array.dtype == dtype
            assert_within(array, *truth)
    if step != 0:
        check_norms(out)
    else:
        np.testing.assert_array_equal(out, given.x)


def leaves(given):
    """All arrays of a case, of whatever library."""
    groups = [part if isinstance(part, tuple) else (part,) for part in given]
    return [array for group in groups for array in group if hasattr(array, "shape")]


def check_norms(out):
    """Of d squares and their sum, half of whose error the root has, and a division."""
    norms = np.linalg.norm(out.astype(np.longdouble), axis=1)
    bound = gamma(out.shape[1] // 2 + 4, out.dtype)
    assert np.all(np.abs(norms - 1) <= bound)


# ----------------------------------------------------------------------------- values


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_step(xp, form, dtype):
    given = case(form, dtype=dtype)
    for step in (0.0, *STEPS):
        check(on_library(xp, given, step), given, step)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(size, dtype):
    for form in FORMS:
        for index in (np.int32, np.int64):
            given = case(form, dtype=dtype, index=index, **size)
            for step in STEPS:
                check(call(given, step), given, step)


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_types_of_indices(xp, index):
    given = case("all with links", index=index, dtype=np.float32)
    check(on_library(xp, given, 0.3), given, 0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["all with links", "all with rows"])
def test_sizes_beyond_every_block(form, dtype):
    given = case(form, n=200, m=300, d=70, k=5, c=4, dtype=dtype)
    check(call(given, 0.5), given, 0.5)


def test_no_rows(xp):
    for form in ("all with links", "all with rows"):
        out, attraction, log_z = on_library(xp, case(form, n=0), 0.3)
        assert out.shape == (0, 5)
        assert attraction.shape == log_z.shape == (0,)


def test_the_gradient_of_the_reference():
    """What the step is made of, as others take it."""
    for form in FORMS:
        given = case(form)
        found = reference.embedding_gradient(*given)
        out, attraction, log_z = reference.embedding_step(*given, 0.3)
        np.testing.assert_array_equal(found[1], attraction)
        if log_z is not None:
            np.testing.assert_array_equal(found[2], log_z)
        total = found[0]
        tangent = total - (total * given.x).sum(1, keepdims=True) * given.x
        moves = np.linalg.norm(tangent, axis=1) > 0
        turned = 0.91**0.5 * given.x[moves] - 0.3 * unit(tangent[moves])
        np.testing.assert_allclose(out[moves], turned, rtol=0, atol=1e-13)


# ---------------------------------------------------------------------- hard numbers


def test_a_component_without_keys_has_no_part(xp):
    """Its count is 0: whatever its mean, and with a covariance of 0."""
    given = case("components")
    counts, means, covariances = given.components
    means, covariances = means.copy(), covariances.copy()
    means[1] = 1e3 * given.x[0]
    covariances[1] = 0
    given = given._replace(components=(counts, means, covariances))
    found = on_library(xp, given, 0.3)
    check(found, given, 0.3)
    means[1] = 0
    again = on_library(xp, given, 0.3)
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_components_without_any_keys(backend):
    given = case("all with links")
    counts, means, covariances = given.components
    empty = (np.full_like(counts, -np.inf), means, covariances)
    out, attraction, log_z = call(given._replace(components=empty), 0.3, backend)
    expected = call(given._replace(components=None), 0.3, backend)
    assert_within(out, expected[0], 16 * epsilon(out.dtype))
    np.testing.assert_array_equal(attraction, expected[1])
    np.testing.assert_array_equal(log_z, -np.inf)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(xp, dtype):
    """No exponential overflows, whatever the logarithms are."""
    given = case("components", dtype=dtype)
    counts, means, covariances = given.components
    for components in (
        (counts, 1e4 * means, covariances),
        (counts, means, 1e4 * covariances),
        (counts - 1e4, means, covariances),
    ):
        components = tuple(array.astype(dtype) for array in components)
        changed = given._replace(components=components)
        check(on_library(xp, changed, 0.3), changed, 0.3)


@pytest.mark.parametrize("form", ["links", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitudes(xp, form, dtype):
    """Squares of gradients neither overflow nor vanish."""
    power = 30 if dtype == np.float32 else 200
    given = case(form, dtype=dtype)
    for scale in (10.0**power, 10.0**-power):
        changed = given._replace(scale=scale)
        check(on_library(xp, changed, 0.3), changed, 0.3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_no_tangent_stay(backend, dtype):
    given = case("links", dtype=dtype)
    _, _, indptr = given.matrix
    alone = np.diff(indptr) == 0
    assert 0 < alone.sum() < len(alone)
    for step in STEPS:
        out, attraction, _ = call(given, step, backend)
        np.testing.assert_array_equal(out[alone], given.x[alone])
        np.testing.assert_array_equal(attraction[alone], 0)

    # Along an axis all products are exact, and along the row itself nothing is left.
    x = np.concatenate([np.eye(4), -np.eye(4)]).astype(dtype)
    given = Case(x, None, 3 * x, 0.75, None, None, None)
    for step in STEPS:
        out, attraction, _ = call(given, step, backend)
        np.testing.assert_array_equal(out, x)
        np.testing.assert_array_equal(attraction, 2.25)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_dimension_has_no_tangent(backend, dtype):
    given = case("all with links", d=1, dtype=dtype)
    for step in STEPS:
        out, _, _ = call(given, step, backend)
        np.testing.assert_array_equal(out, given.x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_tangents_of_large_gradients(backend, dtype):
    """Along an axis a projection is exact, however little is beside it."""
    d = 33
    rng = np.random.default_rng(0)
    x = np.zeros((5, d), dtype)
    x[:, 4] = 1
    beside = rng.standard_normal((5, d)).astype(dtype)
    beside[:, 4] = 0
    for ratio in (1e-10, 1e-30):
        tangent = dtype(ratio) * beside
        given = Case(x, None, x - tangent, 1.0, None, None, None)
        out, _, _ = call(given, 0.3, backend)
        expected = 0.91**0.5 * x - 0.3 * unit(beside.astype(float))
        bound = 2 * gamma(d + 4, dtype)
        np.testing.assert_allclose(out, expected, rtol=0, atol=bound)
        check_norms(out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_rounding_leaves_along_a_row_is_taken_off(backend, dtype):
    """The tangent is 30 epsilons of the gradient in each direction, what a projection
    leaves along x at most gamma(d) of it: after a second projection that many of the
    tangent itself.
    """
    d = 33
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((50, d))).astype(dtype)
    beside = 30 * epsilon(dtype) * rng.standard_normal(x.shape)
    given = Case(x, None, (x + beside).astype(dtype), 3.0, None, None, None)
    for step in STEPS:
        out, _, _ = call(given, step, backend)
        check_norms(out)
        cosine = (out.astype(np.longdouble) * x).sum(1)
        np.testing.assert_allclose(
            cosine, (1 - step**2) ** 0.5, rtol=0, atol=4 * gamma(d + 4, dtype)
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["x", "rows", "data", "null"])
def test_what_is_not_finite_stays_where_it_is(xp, where, value):
    given = case("all with links")
    clean = on_library(xp, given, 0.3)
    _, indices, indptr = given.matrix
    row_of = np.repeat(np.arange(13), np.diff(indptr))
    changed = given.map(np.copy)
    if where == "x":
        changed.x[3, 2] = value
        bad = [3]
    elif where == "rows":
        changed.rows[indices[4], 2] = value
        bad = row_of[indices == indices[4]]
    elif where == "data":
        changed.matrix[0][4] = value
        bad = [row_of[4]]
    else:
        changed.null[0][5] = value
        bad = [5]
    found = on_library(xp, changed, 0.3)
    sound = np.ones(13, bool)
    sound[bad] = False
    assert np.isnan(found[0][bad]).all()
    if where != "null":
        assert not np.isfinite(found[1][bad]).any()
    if where == "x":
        assert not np.isfinite(found[2][bad]).any()
    for one, other in zip(found, clean, strict=True):
        np.testing.assert_array_equal(one[sound], other[sound])


# ---------------------------------------------------------------------------- memory


def reversed_memory(a):
    return np.flip(np.flip(a).copy())


def every_other(a):
    return np.repeat(a, 2, axis=-1)[..., ::2]


def every_other_row(a):
    return np.repeat(a, 2, axis=0)[1::2]


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def unaligned(a):
    odd = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    odd[...] = a
    return odd


@pytest.mark.parametrize(
    "change",
    [
        reversed_memory,
        every_other,
        every_other_row,
        np.asfortranarray,
        read_only,
        unaligned,
    ],
)
@pytest.mark.parametrize("form", ["all with links", "all with rows"])
def test_strides(form, change):
    for dtype, index in ((np.float32, np.int32), (np.float64, np.int64)):
        given = case(form, d=7, dtype=dtype, index=index)
        for step in (0.0, 0.3):
            check(call(given.map(change), step), given, step)


@pytest.mark.parametrize("form", ["all with links", "all with rows"])
def test_arguments_are_left_alone(xp, form):
    given = case(form).map(xp.asarray)
    kept = [to_numpy(array).copy() for array in leaves(given)]
    backend = _dispatch.backend_for(x=given.x)
    for step in (0.0, *STEPS):
        results = backend.embedding_step(*given, step)
        for result in results:
            to_numpy(result)
        for array, before in zip(leaves(given), kept, strict=True):
            np.testing.assert_array_equal(to_numpy(array), before)


def test_one_array_may_be_both_sides():
    given = case("links", n=9, m=9)
    expected = call(given._replace(rows=given.x.copy()), 0.3)
    for one, other in zip(
        call(given._replace(rows=given.x), 0.3), expected, strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("threads", [2, 3])
def test_thread_count_changes_nothing(threads):
    for form in ("all with links", "all with rows"):
        given = case(form, n=700, m=300, d=33, dtype=np.float32)
        with sq.num_threads(1):
            expected = call(given, 0.3)
        with sq.num_threads(threads):
            found = call(given, 0.3)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("value", [-1, 9])
def test_indices_out_of_range(value, index):
    """`_core` looks at them before it computes."""
    given = case("all with links", m=9, index=index)
    given.matrix[1][7] = value
    with pytest.raises(ValueError, match="indices"):
        call(given, 0.3)
    given = case("all with links", c=9)
    given.own[0][7] = value
    with pytest.raises(ValueError, match="labels"):
        call(given, 0.3)


# ------------------------------------------------------------------- instruction sets

SCRIPT = r"""
import sys
import numpy as np
import subquad as sq
from test_embedding_step import FORMS, call, case, check

assert sq.get_isa() == sys.argv[1], (sq.get_isa(), sys.argv[1])
for dtype in (np.float32, np.float64):
    for size in ({"n": 1, "d": 1}, {"n": 37, "d": 33, "k": 5}, {"n": 70, "d": 16}):
        for form in FORMS:
            given = case(form, dtype=dtype, index=np.int32, **size)
            for step in (0.0, 0.3, 1.0):
                check(call(given, step), given, step)
"""


@pytest.mark.parametrize("level", _core.isa_levels())
def test_every_level(level):
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, level],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "SUBQUAD_ISA": level,
            "SUBQUAD_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------- other libraries


def test_torch_without_gradients():
    """Results carry none, whatever asks for some, and inference makes no difference."""
    torch = pytest.importorskip("torch")
    given = case("all with links")
    expected = call(given, 0.3)
    there = given.map(torch.from_numpy)
    backend = _dispatch.backend_for(x=there.x)
    found = backend.embedding_step(*there._replace(x=there.x.requires_grad_()), 0.3)
    with torch.inference_mode():
        inside = given.map(lambda a: torch.from_numpy(a).clone())
        again = backend.embedding_step(*inside, 0.3)
    for results in (found, again):
        for one, other in zip(results, expected, strict=True):
            assert not one.requires_grad
            np.testing.assert_array_equal(one.numpy(), other)


def test_dask_arrays_are_refused():
    array = pytest.importorskip("dask.array")
    there = case("all with links").map(array.from_array)
    with pytest.raises(TypeError, match="no Dask arrays: each reads all rows"):
        _dispatch.backend_for(x=there.x).embedding_step(*there, 0.3)


@pytest.mark.parametrize("form", ["all with links", "all with rows"])
def test_jax_compiles_it(form):
    jax = pytest.importorskip("jax")
    for dtype in DTYPES:
        given = case(form, dtype=dtype)
        there = given.map(jax.numpy.asarray)
        backend = _dispatch.backend_for(x=there.x)

        @jax.jit
        def step(x, matrix, rows, *groups, backend=backend, scale=given.scale):
            return backend.embedding_step(x, matrix, rows, scale, *groups, 0.3)

        groups = there[4:]
        found = step(there.x, there.matrix, there.rows, *groups)
        check([np.asarray(array) for array in found], given, 0.3)
