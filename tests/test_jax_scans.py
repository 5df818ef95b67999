"""JAX: scans as primitives over the compiled kernels."""

from __future__ import annotations

import numpy as np
import pytest

import subquad as sq
from subquad import _dispatch
from subquad._backends import jax_targets

jax = pytest.importorskip("jax", reason="jax is not installed")
jnp = jax.numpy

if jax_targets.problem():
    pytest.skip(jax_targets.problem(), allow_module_level=True)

from test_jax import calls, close, in_subprocess  # noqa: E402

DTYPES = [np.float32, np.float64]
INF = np.inf
RUNS = np.array([0, 0, 3, 3, 3, 1, 1])
SHAPE = (7, 3)
LANES = (3,)


def like(array, values):
    """Segments in the library of an array."""
    return values if isinstance(array, np.ndarray) else jnp.asarray(values)


def parts(result):
    """The arrays of a named tuple of results, states taken apart."""
    if not isinstance(result, tuple):
        return [result]
    found = []
    for part in result:
        if isinstance(part, sq.LogSumExpState):
            found += [part.log_sum, part.remainder]
        else:
            found.append(part)
    return found


# Of each: the function of its arrays, its gradients, and the shapes of the arrays.


def total(x):
    return parts(sq.logcumsumexp(x, axis=0))


def total_vjp(grads, x):
    return [sq.vjp.logcumsumexp(grads[0], x, axis=0)]


def runs(x, log_sum, remainder, **options):
    state = sq.LogSumExpState(log_sum, remainder)
    options = {"segment_ids": like(x, RUNS), "exclusive": True, **options}
    return parts(sq.logcumsumexp(x, axis=0, state=state, return_state=True, **options))


def runs_vjp(grads, x, log_sum, remainder, **options):
    state = sq.LogSumExpState(log_sum, remainder)
    options = {"segment_ids": like(x, RUNS), "exclusive": True, **options}
    gx, g_state = sq.vjp.logcumsumexp(
        (grads[0], grads[1]), x, axis=0, state=state, **options
    )
    # What rounding took from a logarithm counts as the logarithm does.
    return [gx, parts((g_state,))[0], parts((g_state,))[0]]


def backwards(x, log_sum, remainder):
    options = {"segment_ids": None, "exclusive": False, "reverse": True}
    return runs(x, log_sum, remainder, **options)


def backwards_vjp(grads, x, log_sum, remainder):
    options = {"segment_ids": None, "exclusive": False, "reverse": True}
    return runs_vjp(grads, x, log_sum, remainder, **options)


def signed(x, sign):
    return parts(sq.signed_logcumsumexp(x, sign, axis=0, reverse=True))


def signed_vjp(grads, x, sign):
    return list(sq.vjp.signed_logcumsumexp(grads[0], x, sign, axis=0, reverse=True))


def recurrence(log_a, log_b):
    return [sq.log_linear_recurrence(log_a, log_b, axis=0)]


def recurrence_vjp(grads, log_a, log_b):
    return list(sq.vjp.log_linear_recurrence(grads[0], log_a, log_b, axis=0))


def long_recurrence(log_a, log_b, state):
    ids = like(log_a, RUNS)
    return [
        sq.log_linear_recurrence(
            log_a, log_b, axis=0, state=state, reverse=True, segment_ids=ids
        )
    ]


def long_recurrence_vjp(grads, log_a, log_b, state):
    return list(
        sq.vjp.log_linear_recurrence(
            grads[0],
            log_a,
            log_b,
            axis=0,
            state=state,
            reverse=True,
            segment_ids=like(log_a, RUNS),
        )
    )


SCANS = {
    "total": (total, total_vjp, [SHAPE]),
    "runs": (runs, runs_vjp, [SHAPE, LANES, LANES]),
    "backwards": (backwards, backwards_vjp, [SHAPE, LANES, LANES]),
    "signed": (signed, signed_vjp, [SHAPE, SHAPE]),
    "recurrence": (recurrence, recurrence_vjp, [SHAPE, SHAPE]),
    "recurrence in runs": (
        long_recurrence,
        long_recurrence_vjp,
        [SHAPE, SHAPE, LANES],
    ),
}
HANDLERS = {
    "total": "logcumsumexp",
    "runs": "logcumsumexp",
    "backwards": "logcumsumexp",
    "signed": "signed_logcumsumexp",
    "recurrence": "log_linear_recurrence",
    "recurrence in runs": "log_linear_recurrence",
}


def case(name, dtype=np.float64, batch=(), seed=0):
    rng = np.random.default_rng(seed)
    arrays = [
        rng.standard_normal((*batch, *shape)).astype(dtype) for shape in SCANS[name][2]
    ]
    if len(arrays) == 3 and "recurrence" not in name:
        arrays[2] *= np.finfo(dtype).eps
    if name == "signed":
        # Sums that do not cancel, or derivatives of second order are huge.
        arrays[1] = 1.0 + 0.3 * arrays[1]
    return tuple(arrays)


def on_jax(arrays):
    return tuple(map(jnp.asarray, arrays))


def cotangents(results):
    """Gradients of results: none of signs and remainders, which are constants."""
    return [
        np.cos(np.arange(a.size) + 1.0).reshape(a.shape).astype(a.dtype)
        for a in results
    ]


def loss(function, weights):
    weights = [jnp.asarray(weight) for weight in weights]

    def f(*arrays):
        found = function(*arrays)
        return sum((w * jnp.sin(a)).sum() for w, a in zip(weights, found, strict=True))

    return f


def smooth(name):
    """A number that depends on all results that have derivatives."""
    function = SCANS[name][0]
    shapes = jax.eval_shape(function, *on_jax(case(name)))
    weights = cotangents([np.zeros(s.shape) for s in shapes])
    if name == "runs":
        # The first of each run is -inf.
        firsts = np.r_[True, RUNS[1:] != RUNS[:-1]]
        firsts[0] = False
        weights[0][firsts] = 0.0

        def safe(*arrays):
            out, *state = function(*arrays)
            return [jnp.where(jnp.isfinite(out), out, 0.0), *state]

        return loss(safe, weights)
    return loss(function, weights)


# ------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCANS)
def test_values_are_those_of_numpy(name, dtype):
    function = SCANS[name][0]
    arrays = case(name, dtype)
    arrays[0][2, 0] = -INF
    arrays[0][4, 1] = 100.0
    expected = function(*arrays)
    compiled = jax.jit(function)
    for found in (function(*on_jax(arrays)), compiled(*on_jax(arrays))):
        close(found, expected, rtol=0)
        assert all(a.dtype == dtype for a in found)
    assert calls(function, *on_jax(arrays)) == [HANDLERS[name]]


def test_the_axis_and_lanes():
    x = case("total")[0].reshape(7, 1, 3)
    for axis in range(3):
        found = jax.jit(lambda x, axis=axis: sq.logcumsumexp(x, axis=axis))(x)
        close(found, sq.logcumsumexp(x, axis=axis), rtol=0)
    close(sq.logcumsumexp(jnp.float64(2.0)), np.asarray(2.0), rtol=0)


def test_infinities():
    x = np.array([-INF, -INF, 1.0, INF, 2.0, np.nan, 3.0])
    for options in ({}, {"reverse": True}, {"exclusive": True}):
        found = jax.jit(lambda x, o=options: sq.logcumsumexp(x, **o))(x)
        np.testing.assert_array_equal(found, sq.logcumsumexp(x, **options))


def test_nothing_to_sum():
    x, lanes = np.zeros((0, 3)), np.arange(3.0)
    state = sq.LogSumExpState(jnp.asarray(lanes), jnp.zeros(3))
    out, after = jax.jit(
        lambda x: sq.logcumsumexp(x, axis=0, state=state, return_state=True)
    )(x)
    assert out.shape == (0, 3)
    close(after.log_sum, lanes, rtol=0)
    assert jax.jit(sq.logcumsumexp)(np.zeros((3, 0))).shape == (3, 0)


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCANS)
def test_gradients_are_those_of_numpy(name, dtype):
    function, reverse, _ = SCANS[name]
    arrays = case(name, dtype)
    arrays[0][2, 0] = -INF
    grads = cotangents(function(*arrays))
    found = jax.jit(lambda g, *a: jax.vjp(function, *a)[1](g))(grads, *arrays)
    close(list(found), reverse(grads, *arrays), rtol=0)
    pulled = lambda *a: jax.vjp(function, *a)[1](list(map(jnp.asarray, grads)))
    assert calls(pulled, *on_jax(arrays)) == [f"{HANDLERS[name]}_vjp"]
    close(
        reverse(list(map(jnp.asarray, grads)), *on_jax(arrays)),
        reverse(grads, *arrays),
        rtol=0,
    )


@pytest.mark.parametrize("name", SCANS)
def test_forward_mode(name):
    """Of finite differences, and of the reverse: (J t) g = t (J^T g)."""
    f = smooth(name)
    arrays = on_jax(case(name))
    ways = on_jax(case(name, seed=1))
    slope = jax.jit(lambda a, t: jax.jvp(f, a, t)[1])(arrays, ways)
    compiled = jax.jit(f)
    step = 1e-5
    ahead, behind = (
        compiled(*(a + s * t for a, t in zip(arrays, ways, strict=True)))
        for s in (step, -step)
    )
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-7)
    gradients = jax.jit(jax.grad(f, tuple(range(len(arrays)))))(*arrays)
    dot = sum((g * t).sum() for g, t in zip(gradients, ways, strict=True))
    np.testing.assert_allclose(slope, dot, rtol=1e-12)


@pytest.mark.parametrize("name", SCANS)
def test_derivatives_of_derivatives(name):
    f = smooth(name)
    arrays = on_jax(case(name))
    ways = on_jax(case(name, seed=1))
    every = tuple(range(len(arrays)))
    gradient = jax.grad(f, every)

    def along(a):
        return sum((g * t).sum() for g, t in zip(gradient(*a), ways, strict=True))

    forward = jax.jit(lambda a: jax.jvp(lambda *a: gradient(*a), a, ways)[1])(arrays)
    of_x = lambda x: along((x, *arrays[1:]))
    of_all = lambda x: jax.grad(along)(arrays)
    # In the weights the reverse of the reference's reverse is NaN.
    reverse = jax.jit(jax.grad(of_x) if name == "signed" else of_all)(arrays[0])
    compiled = jax.jit(gradient)
    step = 1e-5
    ahead, behind = (
        compiled(*(a + s * t for a, t in zip(arrays, ways, strict=True)))
        for s in (step, -step)
    )
    expected = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
    close(forward, expected, rtol=1e-7)
    close(reverse, expected[0] if name == "signed" else expected, rtol=1e-7)


def test_a_gradient_in_the_state_alone():
    x, log_sum, remainder = on_jax(case("runs"))

    def last(s, x):
        state = sq.LogSumExpState(s, remainder)
        return sq.logcumsumexp(x, axis=0, state=state)[-1].sum()

    found = jax.grad(last)(log_sum, x)
    expected = jnp.exp(log_sum - sq.logcumsumexp(x, axis=0, state=log_sum)[-1])
    close(found, expected, rtol=1e-14)
    # A final state alone, whose sums have gradients and nothing else has.
    final = lambda x: sq.LogSumExpState.init((3,), like=x).update(x, axis=0).log_sum
    close(jax.grad(lambda x: final(x).sum())(x), jnp.exp(x - final(x)), rtol=1e-14)


# -------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize("axes", ["all", "first", "last", "none of the first"])
@pytest.mark.parametrize("name", SCANS)
def test_vmap_is_a_loop(name, axes):
    function = SCANS[name][0]
    count = len(SCANS[name][2])
    if axes == "all":
        where = (0,) * count
    elif axes == "first" or count == 1:
        where = (0, *(None,) * (count - 1))
    elif axes == "last":
        where = (*(None,) * (count - 1), -1)
    else:
        where = (None, *(0,) * (count - 1))
    arrays = [
        a if axis is None else np.moveaxis(np.stack([a, 2 * a]), 0, axis)
        for a, axis in zip(case(name), where, strict=True)
    ]
    if name == "signed":
        arrays[1] = np.abs(arrays[1])

    def gradients(*a):
        return jax.grad(
            lambda *a: sum(jnp.sin(r).sum() for r in function(*a) if r.ndim < 3),
            tuple(range(count)),
        )(*a)

    if name == "runs":
        gradients = jax.grad(smooth("runs"), (0, 1, 2))
    for one in (function, gradients):
        mapped = jax.vmap(one, where)
        found = jax.jit(mapped)(*on_jax(arrays))
        slices = [
            [
                a if axis is None else np.take(a, i, axis)
                for a, axis in zip(arrays, where, strict=True)
            ]
            for i in range(2)
        ]
        expected = [one(*on_jax(part)) for part in slices]
        expected = jax.tree.map(lambda *a: np.stack(a), *expected)
        close(found, expected, rtol=1e-14)
        text = jax.jit(mapped).lower(*on_jax(arrays)).as_text()
        assert "subquad_" in text and "stablehlo.while" not in text


def test_gradients_of_vmap_and_vmap_of_jvp():
    x = jnp.asarray(case("total", batch=(2,))[0])
    f = lambda x: jnp.sin(sq.logcumsumexp(x, axis=0)).sum()
    mapped = lambda x: jax.vmap(jax.jit(f))(x).sum()
    expected = jnp.stack([jax.grad(f)(part) for part in x])
    close(jax.jit(jax.grad(mapped))(x), expected, rtol=1e-14)
    pushed = jax.vmap(lambda t: jax.jvp(f, (x[0],), (t,))[1])(x)
    close(pushed, (expected[0] * x).sum((1, 2)), rtol=1e-13)


def test_vmap_over_segments():
    x = jnp.asarray(case("total")[0])
    ids = jnp.asarray(np.stack([RUNS, RUNS[::-1]]))
    f = lambda x, ids: sq.logcumsumexp(x, axis=0, segment_ids=ids)
    found = jax.jit(jax.vmap(f, (None, 0)))(x, ids)
    close(found, jnp.stack([f(x, part) for part in ids]), rtol=0)


# ------------------------------------------------------------------------------ states


def test_states_are_trees():
    x = jnp.asarray(case("total", batch=(4,))[0])
    start = sq.LogSumExpState.init(LANES, like=x)

    def step(state, part):
        state = state.update(part, axis=0)
        return state, state.finalize()

    last, sums = jax.jit(lambda s, x: jax.lax.scan(step, s, x))(start, x)
    assert isinstance(last, sq.LogSumExpState)
    flat = x.reshape(28, 3)
    expected = sq.logcumsumexp(np.asarray(flat), axis=0)[6::7]
    close(sums, expected, rtol=3e-16)
    close(last.merge(start).finalize(), expected[-1], rtol=3e-16)

    def through(x):
        return (jnp.arange(3.0) * jax.lax.scan(step, start, x)[0].finalize()).sum()

    found = jax.jit(jax.grad(through))(x).reshape(28, 3)
    weights = np.arange(3.0) * np.exp(flat - expected[-1])
    close(found, weights, rtol=1e-14)
    states = jax.vmap(lambda x: sq.LogSumExpState.init(LANES, like=x).update(x, 0))(x)
    assert states.log_sum.shape == (4, 3)
    merged = jax.jit(lambda s: s[0].merge(s[1]).merge(s[2].merge(s[3])))(states)
    close(merged.finalize(), expected[-1], rtol=3e-16)


def test_a_recurrence_step_by_step():
    log_a, log_b = on_jax(case("recurrence"))

    def step(state, ab):
        out, state = sq.log_linear_recurrence(
            ab[0][None], ab[1][None], axis=0, state=state, return_state=True
        )
        return state, out[0]

    def all_steps(log_a, log_b):
        return jax.lax.scan(step, jnp.full(3, -INF), (log_a, log_b))[1]

    f = lambda a, b: jnp.sin(all_steps(a, b)).sum()
    g = lambda a, b: jnp.sin(sq.log_linear_recurrence(a, b, axis=0)).sum()
    found = jax.jit(jax.value_and_grad(f, (0, 1)))(log_a, log_b)
    close(found, jax.value_and_grad(g, (0, 1))(log_a, log_b), rtol=1e-13)


# ----------------------------------------------------------- settings and environments


def test_without_64_bit_types():
    code = """
        import numpy as np
        import jax, jax.numpy as jnp
        import subquad as sq
        import test_jax_scans as scans
        assert not jax.config.jax_enable_x64
        for name, (function, reverse, _) in scans.SCANS.items():
            arrays = scans.case(name, np.float32)
            expected = function(*arrays)
            found = jax.jit(function)(*scans.on_jax(arrays))
            scans.close(found, expected, 0)
            grads = scans.cotangents(expected)
            pull = lambda g, *a: jax.vjp(function, *a)[1](g)
            found = list(jax.jit(pull)(grads, *arrays))
            scans.close(found, reverse(grads, *arrays), 0)
            assert scans.calls(function, *arrays) == [scans.HANDLERS[name]]
            jax.jit(lambda a: jax.jvp(function, a, a)[1])(scans.on_jax(arrays))
        state = sq.LogSumExpState.init((3,), like=jnp.zeros(1))
        state = jax.jit(lambda s, x: s.update(x, axis=0))(state, arrays[0])
        assert state.log_sum.dtype == np.float32
    """
    in_subprocess(code, JAX_ENABLE_X64="0")


def test_states_are_trees_where_the_module_is_missing():
    code = """
        import sys
        sys.modules["subquad._jax"] = None
        import jax, jax.numpy as jnp
        import subquad as sq
        x = jnp.linspace(-1, 1, 6).reshape(2, 3)
        state = sq.LogSumExpState.init((2,), like=x)
        state = jax.jit(lambda s, x: s.update(x))(state, x)
        assert abs(jnp.exp(state.finalize()) - jnp.exp(x).sum(1)).max() < 1e-6
    """
    in_subprocess(code)


def test_several_devices():
    code = """
        import numpy as np
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        import subquad as sq
        from test_jax import calls, close
        x = np.random.default_rng(0).standard_normal((8, 5))
        expected = sq.logcumsumexp(x)
        loss = lambda x: jnp.sin(sq.logcumsumexp(x)).sum()
        gradient = jax.grad(loss)(jnp.asarray(x))
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,))
            a = jax.device_put(x, NamedSharding(mesh, P("rows")))
            out = jax.jit(sq.logcumsumexp)(a)
            close(out, expected)
            close(jax.jit(jax.grad(loss))(a), gradient)
        f = jax.shard_map(
            sq.logcumsumexp, mesh=mesh, in_specs=P("rows"), out_specs=P("rows")
        )
        assert calls(f, a) == ["logcumsumexp"]
        sharded = lambda x: jnp.sin(f(x)).sum()
        close(jax.jit(jax.grad(sharded))(a), gradient)
    """
    in_subprocess(code, XLA_FLAGS="--xla_force_host_platform_device_count=4")


def test_the_backend_has_every_primitive():
    backend = _dispatch.backend_for(x=jnp.zeros(1))
    names = [name for name in dir(_dispatch.Backend) if not name.startswith("_")]
    assert not [name for name in names if not hasattr(backend, name)]
    assert not getattr(backend, "has_attention_step", False)
