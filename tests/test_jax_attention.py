"""JAX: linear attention as primitives over the compiled kernels."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import subquad as sq
from subquad._backends import jax_targets

jax = pytest.importorskip("jax", reason="jax is not installed")
jnp = jax.numpy

if jax_targets.problem():
    pytest.skip(jax_targets.problem(), allow_module_level=True)

from test_jax import calls, close, in_subprocess  # noqa: E402

DTYPES = [np.float32, np.float64]
INF = np.inf
N, D_K, D_V = 6, 3, 2
RUNS = np.array([0, 0, 0, 4, 4, 1])
KEPT = np.array([True, True, False, True, True, True])


def like(array, values):
    """Constants in the library of an array."""
    return values if isinstance(array, np.ndarray) else jnp.asarray(values)


def ones(array):
    return like(array, np.ones(array.shape, array.dtype))


def parts(result):
    """The arrays of a named tuple of results, states taken apart."""
    if not isinstance(result, tuple):
        return [result]
    found = []
    for part in result:
        if isinstance(part, (sq.AttentionState, sq.LogAttentionState)):
            arrays = (getattr(part, name) for name in type(part).field_names())
            found += [array for array in arrays if array is not None]
        else:
            found.append(part)
    return found


# The arguments of each: names of the arrays after q, k and v, and options.
CASES = {
    "plain": ((), {}),
    "causal": ((), {"causal": True}),
    "decay and state": (
        ("log_decay", "state"),
        {"causal": True, "return_state": True, "return_log_normalizer": True},
    ),
    "mask and state": (
        ("state",),
        {"key_mask": KEPT, "return_state": True, "empty": "nan"},
    ),
    "segments": (
        ("log_decay", "state"),
        {"segment_ids": RUNS, "causal": True, "return_log_normalizer": True},
    ),
}


def split(name, arrays):
    """Keyword arguments of a case, of its arrays after q, k and v."""
    names, options = CASES[name]
    options = dict(options)
    rest = list(arrays)
    for one in ("key_mask", "segment_ids"):
        if one in options:
            options[one] = like(arrays[0], options[one])
    if "log_decay" in names:
        options["log_decay"] = rest.pop(3)
    return rest, options


def linear(name, *arrays):
    rest, options = split(name, arrays)
    if len(rest) > 3:
        options["state"] = sq.AttentionState(*rest[3:])
    return parts(sq.linear_attention(*rest[:3], **options))


def logs(name, *arrays):
    rest, options = split(name, arrays)
    options.pop("empty", None)
    if len(rest) > 3:
        sign = ones(rest[3])
        options["state"] = sq.LogAttentionState(rest[3], sign, rest[4])
    return parts(sq.log_linear_attention(*rest[:3], **options))


def reverse(of_logs, name, grads, *arrays):
    """Gradients by the public reverse, those of states taken apart."""
    rest, options = split(name, arrays)
    options = {
        key: value
        for key, value in options.items()
        if key in ("causal", "log_decay", "key_mask", "segment_ids")
    }
    grads = list(grads)
    grad = [grads.pop(0), None, None]
    if of_logs:
        grads.pop(0)
    if CASES[name][1].get("return_log_normalizer"):
        grad[1] = grads.pop(0)
    if len(rest) > 3:
        sign = ones(rest[3]) if of_logs else None
        kind = sq.LogAttentionState if of_logs else sq.AttentionState
        state = (rest[3], sign, rest[4]) if of_logs else rest[3:]
        options["state"] = kind(*state)
        if grads:
            grad[2] = kind(*grads)
    function = sq.vjp.log_linear_attention if of_logs else sq.vjp.linear_attention
    found = parts(function(tuple(grad), *rest[:3], **options))
    if of_logs and len(rest) > 3:
        del found[-2]
    return found


FUNCTIONS = {False: linear, True: logs}


def state_before(rng, of_logs, dtype, batch):
    """A state of four tokens."""
    k = rng.standard_normal((*batch, 4, D_K)).astype(dtype)
    v = 1.0 + rng.random((*batch, 4, D_V)).astype(dtype)
    state = sq.AttentionState.init(batch, D_K, D_V, like=k).update(k, v)
    if not of_logs:
        return [state.key_sums, state.value_sums]
    state = state.to_log()
    return [state.log_numerator, state.log_denominator]


def case(of_logs, name, dtype=np.float64, batch=(), seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(N, D_K), (N, D_K), (N, D_V)]
    if "log_decay" in CASES[name][0]:
        shapes.append((N, D_K))
    arrays = [rng.standard_normal((*batch, *shape)).astype(dtype) for shape in shapes]
    if "log_decay" in CASES[name][0]:
        arrays[3] = -np.abs(arrays[3])
    if "state" in CASES[name][0]:
        arrays += state_before(rng, of_logs, dtype, batch)
    return tuple(arrays)


def ways(of_logs, name, seed=1):
    """Directions to move the arrays of a case in.

    A state's scale stays, and so does what rounding took, which cannot be large.
    """
    rng = np.random.default_rng(seed)
    found = [rng.standard_normal(a.shape) for a in case(of_logs, name)]
    if not of_logs and "state" in CASES[name][0]:
        found[-2][..., (0, 1, 3), :] = 0.0
        found[-1][..., 1, :, :] = 0.0
    return tuple(map(jnp.asarray, found))


def on_jax(arrays):
    return tuple(map(jnp.asarray, arrays))


def cotangents(results):
    return [
        np.cos(np.arange(a.size) + 1.0).reshape(a.shape).astype(a.dtype)
        for a in results
    ]


def smooth(of_logs, name):
    """A number that depends on all that results stand for."""
    function = functools.partial(FUNCTIONS[of_logs], name)

    def f(*arrays):
        results = function(*arrays)
        total = 0.0
        if "return_state" in CASES[name][1]:
            if of_logs:
                number, sign, denominator = results[-3:]
                numbers = [sign * jnp.exp(number), denominator]
                results = results[:-3]
            else:
                state = sq.AttentionState(*results[-2:])
                scale = jnp.exp(state.log_scale)
                numbers = [
                    scale[:, None] * state.numerator,
                    scale * state.denominator,
                    state.log_decay,
                ]
                results = results[:-2]
            results = [*results, *numbers]
        for place, result in enumerate(results):
            weights = jnp.cos(jnp.arange(result.size) + place).reshape(result.shape)
            total = total + (weights * jnp.sin(result)).sum()
        return total

    return f


both = pytest.mark.parametrize("of_logs", FUNCTIONS, ids=["linear", "log"])
cases = pytest.mark.parametrize("name", CASES)


def handler(of_logs):
    return "log_linear_attention" if of_logs else "linear_attention"


# ------------------------------------------------------------------------------ values


@both
@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_those_of_numpy(dtype, name, of_logs):
    function = functools.partial(FUNCTIONS[of_logs], name)
    arrays = case(of_logs, name, dtype)
    arrays[1][3, 1] = -INF
    expected = function(*arrays)
    found = jax.jit(function)(*arrays)
    close(found, expected, rtol=0)
    close(function(*on_jax(arrays)), expected, rtol=0)
    assert calls(function, *arrays) == [handler(of_logs)]

    grads = cotangents(expected)
    pull = lambda g, *a: jax.vjp(function, *a)[1](g)
    expected = reverse(of_logs, name, grads, *arrays)
    found = list(jax.jit(pull)(grads, *arrays))
    close(found, expected, rtol=0)
    names = calls(pull, list(map(jnp.asarray, grads)), *arrays)
    assert names[-1] == f"{handler(of_logs)}_vjp"
    assert len(names) == (1 if of_logs else 2)
    public = functools.partial(reverse, of_logs, name)
    close(public(list(map(jnp.asarray, grads)), *on_jax(arrays)), expected, rtol=0)


def test_rows_that_attend_nothing():
    q, k, v = case(False, "causal")
    k[:2] = -INF
    v[1] = np.nan
    for empty, value in (("zero", 0.0), ("nan", np.nan)):
        f = lambda q, k, v, e=empty: sq.linear_attention(
            q, k, v, causal=True, empty=e, return_log_normalizer=True
        )
        y, log_z = jax.jit(f)(q, k, v)
        np.testing.assert_array_equal(y[:2], np.full((2, 2), value))
        np.testing.assert_array_equal(log_z[:2], [-INF, -INF])
        pull = jax.vjp(f, *on_jax((q, k, v)))[1]
        found = pull(type(f(q, k, v))(jnp.ones_like(y), jnp.ones_like(log_z)))
        assert all(np.isfinite(g).all() for g in found)
        assert not np.asarray(found[0][:2]).any()


def test_batches_broadcast():
    q, k, v = case(False, "causal")
    q = np.stack([q, -q, 2 * q])[:, None]
    v = np.stack([v, 2 * v])
    f = lambda q, k, v: sq.linear_attention(q, k, v, causal=True)
    expected = f(q, k, v)
    assert expected.shape == (3, 2, N, D_V)
    close(jax.jit(f)(q, k, v), expected, rtol=0)
    grad = cotangents([expected])[0]
    found = jax.jit(lambda g, *a: jax.vjp(f, *a)[1](g))(grad, q, k, v)
    close(found, sq.vjp.linear_attention(grad, q, k, v, causal=True), rtol=0)


def test_sixteen_bits():
    arrays = [jnp.asarray(a).astype(jnp.bfloat16) for a in case(False, "causal")]
    y = jax.jit(lambda *a: sq.linear_attention(*a, causal=True))(*arrays)
    assert y.dtype == jnp.bfloat16
    loss = lambda *a: sq.linear_attention(*a, causal=True).sum()
    assert jax.jit(jax.grad(loss))(*arrays).dtype == jnp.bfloat16


def test_signs():
    q, k, log_v = case(True, "causal")
    sign = np.where(log_v > 0, 1.0, -1.0)
    f = lambda q, k, v, s: sq.log_linear_attention(q, k, v, sign_v=s)[:2]
    expected = f(q, k, log_v, sign)
    found = jax.jit(f)(q, k, log_v, sign)
    close(found, expected, rtol=0)
    y = sq.linear_attention(q, k, sign * np.exp(log_v))
    close(found[1] * jnp.exp(found[0]), y, rtol=1e-14)
    loss = lambda *a: (jnp.cos(jnp.arange(12.0)).reshape(6, 2) * f(*a)[0]).sum()
    grad = np.cos(np.arange(12.0)).reshape(6, 2)
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, log_v, sign)
    expected = sq.vjp.log_linear_attention(grad, q, k, log_v, sign_v=sign)
    close(found, expected, rtol=0)


# --------------------------------------------------------------------------- gradients


@both
@cases
def test_forward_mode(name, of_logs):
    """Of finite differences, and of the reverse: (J t) g = t (J^T g)."""
    f = smooth(of_logs, name)
    arrays, along = on_jax(case(of_logs, name)), ways(of_logs, name)
    slope = jax.jit(lambda a, t: jax.jvp(f, a, t)[1])(arrays, along)
    compiled = jax.jit(f)
    step = 1e-5
    ahead, behind = (
        compiled(*(a + s * t for a, t in zip(arrays, along, strict=True)))
        for s in (step, -step)
    )
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-7)
    gradients = jax.jit(jax.grad(f, tuple(range(len(arrays)))))(*arrays)
    dot = sum((g * t).sum() for g, t in zip(gradients, along, strict=True))
    np.testing.assert_allclose(slope, dot, rtol=1e-12)


@both
def test_tangents_of_states_are_the_transpose_of_the_reverse(of_logs):
    name = "decay and state"
    function = functools.partial(FUNCTIONS[of_logs], name)
    arrays, along = on_jax(case(of_logs, name)), ways(of_logs, name)
    values, pushed = jax.jit(lambda a, t: jax.jvp(function, a, t))(arrays, along)
    pull = jax.jit(lambda a, g: jax.vjp(function, *a)[1](g))
    for place, result in enumerate(values):
        grads = [jnp.zeros_like(value) for value in values]
        grads[place] = jnp.asarray(cotangents([result])[0])
        if not of_logs and result.shape == (2, D_K, D_V):
            grads[place] = grads[place].at[1].set(grads[place][0])
        if not of_logs and result.shape == (5, D_K):
            grads[place] = grads[place].at[3].set(grads[place][2])
        dot = sum(
            (g * t).sum() for g, t in zip(pull(arrays, grads), along, strict=True)
        )
        np.testing.assert_allclose(
            (pushed[place] * grads[place]).sum(), dot, rtol=1e-11, atol=1e-13
        )


@both
def test_derivatives_of_derivatives(of_logs):
    name = "decay and state"
    f = smooth(of_logs, name)
    arrays, along = on_jax(case(of_logs, name)), ways(of_logs, name)
    gradient = jax.grad(f, (0, 1, 2, 3))

    def slope(a):
        return sum((g * t).sum() for g, t in zip(gradient(*a), along[:4], strict=True))

    step = 1e-5
    ahead, behind = (
        jax.jit(slope)(tuple(a + s * t for a, t in zip(arrays, along, strict=True)))
        for s in (step, -step)
    )
    second = (ahead - behind) / (2 * step)
    forward = jax.jit(lambda a: jax.jvp(slope, (a,), (along,))[1])(arrays)
    np.testing.assert_allclose(forward, second, rtol=1e-6)
    if of_logs:
        # The reverse of the reference's reverse is NaN there.
        return
    twice = jax.jit(jax.grad(slope))(arrays)
    dot = sum((g * t).sum() for g, t in zip(twice, along, strict=True))
    np.testing.assert_allclose(dot, second, rtol=1e-6)


# -------------------------------------------------------------------------------- vmap


@both
@pytest.mark.parametrize("which", ["all", "first", "last"])
def test_vmap_is_a_loop(which, of_logs):
    name = "decay and state"
    function = functools.partial(FUNCTIONS[of_logs], name)
    arrays = case(of_logs, name)
    where = {
        "all": (0,) * len(arrays),
        "first": (1, *(None,) * (len(arrays) - 1)),
        "last": (*(None,) * (len(arrays) - 1), 0),
    }[which]
    others = case(of_logs, name, seed=2)
    mapped = [
        a if axis is None else np.moveaxis(np.stack([a, b]), 0, axis)
        for a, b, axis in zip(arrays, others, where, strict=True)
    ]
    gradients = jax.grad(smooth(of_logs, name), tuple(range(len(arrays))))
    for one in (function, gradients):
        batched = jax.vmap(one, where)
        found = jax.jit(batched)(*mapped)
        expected = [
            one(
                *(
                    jnp.asarray(a if axis is None else np.take(a, i, axis))
                    for a, axis in zip(mapped, where, strict=True)
                )
            )
            for i in range(2)
        ]
        expected = jax.tree.map(lambda *a: np.stack(a), *expected)
        close(found, expected, rtol=1e-14)
        text = jax.jit(batched).lower(*mapped).as_text()
        assert "subquad_" in text and "stablehlo.while" not in text


def test_vmap_over_masks_and_segments():
    q, k, v = on_jax(case(False, "causal"))
    masks = jnp.asarray(np.stack([KEPT, ~KEPT]))
    f = lambda q, mask: sq.linear_attention(q, k, v, key_mask=mask)
    found = jax.jit(jax.vmap(f, (None, 0)))(q, masks)
    close(found, jnp.stack([f(q, mask) for mask in masks]), rtol=1e-15)
    ids = jnp.asarray(np.stack([RUNS, RUNS[::-1]]))
    g = lambda q, ids: sq.linear_attention(q, k, v, segment_ids=ids)
    found = jax.jit(jax.vmap(g, (None, 0)))(q, ids)
    close(found, jnp.stack([g(q, part) for part in ids]), rtol=1e-15)


def test_gradient_of_vmap_of_jit():
    arrays = case(False, "causal", batch=(2,))
    f = lambda *a: jnp.sin(sq.linear_attention(*a, causal=True)).sum()
    found = jax.grad(lambda *a: jax.vmap(jax.jit(f))(*a).sum(), (0, 1, 2))(*arrays)
    close(found, jax.grad(f, (0, 1, 2))(*on_jax(arrays)), rtol=1e-15)


# ------------------------------------------------------------------------------ states


def test_steps_in_a_loop():
    q, k, v, decay = on_jax(case(False, "decay and state")[:4])

    def step(state, token):
        y, state = state.step(*token[:3], token[3])
        return state, y

    def loop(q, k, v, decay):
        start = sq.AttentionState.init((), D_K, D_V, like=k)
        return jax.lax.scan(step, start, (q, k, v, decay))

    def at_once(q, k, v, decay):
        return sq.linear_attention(q, k, v, causal=True, log_decay=decay)

    last, found = jax.jit(loop)(q, k, v, decay)
    assert isinstance(last, sq.AttentionState) and last.recent_count is None
    close(found, at_once(q, k, v, decay), rtol=1e-15)
    state, y = step(
        sq.AttentionState.init((), D_K, D_V, like=k), (q[0], k[0], v[0], decay[0])
    )
    close(y, found[0], rtol=0)
    assert isinstance(state, sq.AttentionState)
    every = (0, 1, 2, 3)
    by_steps = jax.grad(lambda *a: jnp.sin(loop(*a)[1]).sum(), every)
    expected = jax.grad(lambda *a: jnp.sin(at_once(*a)).sum(), every)
    close(jax.jit(by_steps)(q, k, v, decay), expected(q, k, v, decay), rtol=1e-13)


def test_states_are_trees():
    k, v = on_jax(case(False, "plain", batch=(4,))[1:])
    update = lambda k, v: sq.AttentionState.init((), D_K, D_V, like=k).update(k, v)
    states = jax.jit(jax.vmap(update))(k, v)
    assert states.key_sums.shape == (4, 5, D_K)
    first, second = (jax.tree.map(lambda a, i=i: a[i], states) for i in range(2))
    merged = jax.jit(lambda a, b: a.merge(b))(first, second)
    whole = update(jnp.concatenate(k[:2]), jnp.concatenate(v[:2]))
    number = lambda s: s.numerator / s.denominator[:, None]
    close(number(merged), number(whole), rtol=1e-14)
    in_logs = jax.jit(lambda s: s.to_log())(whole)
    assert isinstance(in_logs, sq.LogAttentionState)
    back = jax.jit(sq.AttentionState.from_log)(in_logs)
    close(number(back), number(whole), rtol=1e-14)
    assert len(jax.tree.leaves(whole)) == 2

    def by_parts(k, v):
        a, b = (update(k[i], v[i]) for i in range(2))
        return jnp.sin(number(a.merge(b))).sum()

    def by_whole(k, v):
        whole = update(jnp.concatenate(k[:2]), jnp.concatenate(v[:2]))
        return jnp.sin(number(whole)).sum()

    for make in (
        lambda f: jax.grad(f, (0, 1)),
        lambda f: lambda *a: jax.jvp(f, a, a)[1],
    ):
        found = jax.jit(make(by_parts))(k, v)
        close(found, jax.jit(make(by_whole))(k, v), rtol=1e-12)


def test_a_log_state_in_a_loop():
    q, k, log_v = on_jax(case(True, "causal"))

    def step(state, token):
        found = sq.log_linear_attention(
            *(a[None] for a in token), causal=True, state=state, return_state=True
        )
        return found.state, (found.log_abs_y[0], found.sign_y[0])

    def loop(*tokens):
        start = sq.LogAttentionState.init((), D_K, D_V, like=k)
        return jax.lax.scan(step, start, tokens)[1]

    at_once = lambda *a: tuple(sq.log_linear_attention(*a, causal=True))
    close(jax.jit(loop)(q, k, log_v), at_once(q, k, log_v), rtol=1e-14)
    of = lambda f: jax.jit(jax.grad(lambda *a: jnp.sin(f(*a)[0]).sum(), (0, 1, 2)))
    close(of(loop)(q, k, log_v), of(at_once)(q, k, log_v), rtol=1e-13)


# ----------------------------------------------------------- settings and environments


def test_without_64_bit_types():
    code = """
        import functools
        import numpy as np
        import jax, jax.numpy as jnp
        import subquad as sq
        import test_jax_attention as attention
        assert not jax.config.jax_enable_x64
        for of_logs in (False, True):
            for name in ("mask and state", "segments"):
                function = functools.partial(attention.FUNCTIONS[of_logs], name)
                arrays = attention.case(of_logs, name, np.float32)
                expected = function(*arrays)
                attention.close(jax.jit(function)(*arrays), expected, 0)
                grads = attention.cotangents(expected)
                pull = lambda g, *a: jax.vjp(function, *a)[1](g)
                found = list(jax.jit(pull)(grads, *arrays))
                expected = attention.reverse(of_logs, name, grads, *arrays)
                attention.close(found, expected, 0)
                names = attention.calls(function, *arrays)
                assert names == [attention.handler(of_logs)]
            arrays = attention.on_jax(arrays)
            jax.jit(lambda a: jax.jvp(function, a, a)[1])(arrays)
        q, k, v = attention.on_jax(attention.case(False, "causal", np.float32))
        state = sq.AttentionState.init((), 3, 2, like=k)
        step = lambda s, t: s.step(*t)[::-1]
        state, y = jax.jit(lambda s, t: jax.lax.scan(step, s, t))(state, (q, k, v))
        expected = sq.linear_attention(q, k, v, causal=True)
        attention.close(y, expected, 1e-6)
    """
    in_subprocess(code, JAX_ENABLE_X64="0")


def test_the_reference_where_the_module_is_missing():
    code = """
        import sys
        sys.modules["subquad._jax"] = None
        import numpy as np
        import jax, jax.numpy as jnp
        import subquad as sq
        rng = np.random.default_rng(0)
        q, k, v = rng.standard_normal((3, 6, 3))
        f = lambda q, k, v: sq.linear_attention(q, k, v, causal=True)
        found = jax.jit(f)(*map(jnp.asarray, (q, k, v)))
        np.testing.assert_allclose(found, f(q, k, v), rtol=1e-13)
        state = sq.AttentionState.init((), 3, 3, like=found)
        step = lambda s, t: s.step(*t)[::-1]
        state, y = jax.lax.scan(step, state, tuple(map(jnp.asarray, (q, k, v))))
        np.testing.assert_allclose(y, f(q, k, v), rtol=1e-13)
    """
    in_subprocess(code)
