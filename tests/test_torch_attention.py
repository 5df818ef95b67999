"""Attention in torch: derivatives, operators, compile, vmap, states."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import subquad as sq

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.autograd import gradcheck, gradgradcheck  # noqa: E402

# torch deprecates its own decorators in modules that are imported late.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

SEGMENTS = torch.tensor([0, 0, 1, 1, 1])
MASK = torch.tensor([True, False, True, True, True])
OPTIONS = [
    {"causal": True},
    {},
    {"causal": True, "key_mask": MASK},
    {"causal": True, "segment_ids": SEGMENTS},
    {"segment_ids": SEGMENTS, "key_mask": MASK},
]


def tensors(*shapes, seed=0, dtype=torch.float64, grad=False, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    out = [scale * torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    return [a.requires_grad_(grad) for a in out]


def start():
    """A state of tokens before, whose sums are exact: rounding took nothing."""
    log_k, v = tensors((4, 2), (4, 3), seed=7)
    state = sq.AttentionState.init((), 2, 3, like=v).update(log_k, v)
    keys, values = state.key_sums.clone(), state.value_sums.clone()
    keys[1], keys[3], values[1] = 0, 0, 0
    return sq.AttentionState(keys, values)


def linear(options, q, k, v, decay, z, s):
    """All results, the sums of the state free of their scale, which has no gradient."""
    before = start()
    keys, values = before.key_sums, before.value_sums
    state = sq.AttentionState(
        torch.cat([keys[:2], z[None], keys[3:]]), torch.stack([s, values[1]])
    )
    y, log_z, after = sq.linear_attention(
        q,
        k,
        v,
        state=state,
        log_decay=decay if options.get("causal") else None,
        return_state=True,
        return_log_normalizer=True,
        **options,
    )
    unit = torch.exp(after.log_scale)
    return (
        y,
        log_z,
        unit * after.denominator,
        unit[..., None] * after.numerator,
        after.log_decay,
    )


def log_linear(options, q, k, log_v, decay, numerator, denominator):
    sign = torch.tensor([[1, 1, -1]]).expand(5, 3)
    y, _, log_z, after = sq.log_linear_attention(
        q,
        k,
        log_v,
        sign_v=sign,
        state=sq.LogAttentionState(numerator, sign[:2].double(), denominator),
        log_decay=decay if options.get("causal") else None,
        return_state=True,
        return_log_normalizer=True,
        **options,
    )
    return y, log_z, after.log_numerator, after.log_denominator


def case(call, scale=1.0, grad=True):
    """Queries, keys, values, decays and a state; equal exponents where scale is 0."""
    q, k, decay = tensors((2, 5, 2), (5, 2), (2, 5, 2), scale=scale)
    v, numerator = tensors((5, 3), (2, 3), seed=1)
    (z,) = tensors((2,), seed=2, scale=scale)
    state = (numerator, z) if call is log_linear else (start().key_sums[2], numerator)
    return [a.clone().requires_grad_(grad) for a in (q, k, v, decay, *state)]


CALLS = [linear, log_linear]


@pytest.mark.parametrize(
    ("number", "scale"),
    [(i, 1.0) for i in range(len(OPTIONS))] + [(0, 0.0), (4, 0.0)],
)
@pytest.mark.parametrize("call", CALLS)
def test_derivatives(call, number, scale):
    """Equal exponents are where a maximum has no derivative: the sums have one."""
    bound = functools.partial(call, OPTIONS[number])
    arrays = case(call, scale)
    checks = {"fast_mode": True}
    assert gradcheck(bound, arrays, check_forward_ad=True, **checks)
    assert gradgradcheck(bound, arrays, check_fwd_over_rev=True, **checks)


def naive(q, k, v):
    w = torch.exp(q) @ torch.exp(k).mT
    w = torch.tril(w)
    return (w / w.sum(-1, keepdim=True)) @ v


def test_second_derivatives_where_the_gradient_is_zero():
    """At a minimum of squares the gradient of y is 0, and its derivative is not."""
    q, k, v = tensors((5, 2), (5, 2), (5, 3))
    target = naive(q, k, v)

    def loss(function):
        return lambda v: (function(v) - target).square().sum()

    ours = torch.func.hessian(loss(lambda v: sq.linear_attention(q, k, v, causal=True)))
    theirs = torch.func.hessian(loss(lambda v: naive(q, k, v)))
    torch.testing.assert_close(ours(v), theirs(v))


def test_functional_transforms():
    q, k, v = tensors((5, 2), (5, 2), (5, 3))
    ours = lambda q, k, v: sq.linear_attention(q, k, v, causal=True)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        for a, b in zip(
            transform(ours, (0, 1, 2))(q, k, v),
            transform(naive, (0, 1, 2))(q, k, v),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    total = lambda f: lambda k: f(q, k, v).square().sum()
    torch.testing.assert_close(
        torch.func.hessian(total(ours))(k), torch.func.hessian(total(naive))(k)
    )


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("call", CALLS)
def test_gradients_of_one_input(call, which):
    arrays = case(call, grad=False)
    arrays[which].requires_grad_()
    total = sum(out.square().sum() for out in call({"causal": True}, *arrays))
    total.backward()
    every = case(call)
    sum(out.square().sum() for out in call({"causal": True}, *every)).backward()
    for i, array in enumerate(arrays):
        assert (array.grad is not None) == (i == which)
    torch.testing.assert_close(arrays[which].grad, every[which].grad)


def test_what_requires_a_gradient():
    q, k, v = tensors((5, 2), (5, 2), (5, 3), grad=True)
    assert sq.linear_attention(q, k, v).requires_grad
    assert not sq.linear_attention(q.detach(), k.detach(), v.detach()).requires_grad
    log_abs, sign = sq.log_linear_attention(q, k, v)
    assert log_abs.requires_grad
    assert not sign.requires_grad
    with torch.no_grad():
        assert not sq.linear_attention(q, k, v).requires_grad
    with torch.inference_mode():
        assert not sq.linear_attention(q, k, v).requires_grad


@pytest.mark.parametrize("number", range(len(OPTIONS)))
@pytest.mark.parametrize("call", CALLS)
def test_operators_and_kernels_agree_exactly(call, number):
    arrays = case(call, grad=False)
    plain = call(OPTIONS[number], *arrays)
    taped = call(OPTIONS[number], *case(call))
    for a, b in zip(plain, taped, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=0)


def test_agrees_with_numpy_exactly():
    for dtype in (torch.float32, torch.float64):
        q, k, v = tensors((2, 70, 4), (2, 70, 4), (2, 70, 3), dtype=dtype)
        host = [a.numpy() for a in (q, k, v)]
        out = sq.linear_attention(q, k, v, causal=True).numpy()
        expected = sq.linear_attention(*host, causal=True)
        assert out.dtype == expected.dtype
        np.testing.assert_array_equal(out, expected)
        for a, b in zip(
            sq.log_linear_attention(q, k, v),
            sq.log_linear_attention(*host),
            strict=True,
        ):
            np.testing.assert_array_equal(a.numpy(), b)


def operators():
    """The operators that attention and its derivatives put on the dispatcher."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "subquad":
                seen.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Spy():
        for call in CALLS:
            found = call(OPTIONS[0], *case(call))
            sum(out.square().sum() for out in found).backward()
        q, k, v = tensors((5, 2), (5, 2), (5, 3), grad=True)
        sq.linear_attention(q, k, v).sum().backward()
        sq.log_linear_attention(q, k, v, key_mask=MASK).log_abs_y.sum().backward()
    return seen


UTILITIES = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def test_opcheck():
    seen = operators()
    names = {func.name() for func, _, _ in seen}
    assert names == {
        f"subquad::{name}{end}"
        for name in ("linear_attention", "log_linear_attention")
        for end in ("", "_vjp")
    }
    checked: dict[str, set] = {}
    for func, args, kwargs in seen:
        kinds = checked.setdefault(func.name(), set())
        kind = tuple(a is None or a is True for a in args)
        if kind in kinds:
            continue
        # This is slow: functions meet it once, gradients in the tests that compile.
        is_done = kinds or not func.name().endswith("attention")
        skipped = ("test_aot_dispatch_dynamic",) if is_done else ()
        kinds.add(kind)
        detached = [
            a.detach().requires_grad_(a.requires_grad)
            if isinstance(a, torch.Tensor)
            else a
            for a in args
        ]
        utilities = [name for name in UTILITIES if name not in skipped]
        torch.library.opcheck(func, tuple(detached), kwargs, test_utils=utilities)


@pytest.mark.parametrize("call", CALLS)
def test_compile_without_graph_breaks(call):
    options = {"causal": True, "segment_ids": SEGMENTS}
    before = start()

    def f(q, k, v, decay, state):
        if call is linear:
            out = sq.linear_attention(
                2 * q, k, v, log_decay=decay, state=state, return_state=True, **options
            )
            return out.y, out.state.value_sums, out.state
        out = sq.log_linear_attention(
            2 * q, k, v, log_decay=decay, return_state=True, **options
        )
        return out.log_abs_y, out.state.log_denominator, state

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    ours, theirs = case(call)[:4], case(call)[:4]
    out, expected = compiled(*ours, before), f(*theirs, before)
    assert type(out[2]) is sq.AttentionState
    for a, b in zip(out[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b)
    (out[0].sum() + out[1].sum()).backward()
    (expected[0].sum() + expected[1].sum()).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compile_of_steps():
    compiled = torch.compile(
        lambda state, *token: state.step(*token), fullgraph=True, backend="aot_eager"
    )
    q, k, v = tensors((5, 2), (5, 2), (5, 3))
    state = sq.AttentionState.init((), 2, 3, like=v)
    for t in range(5):
        y, state = compiled(state, q[t], k[t], v[t])
    torch.testing.assert_close(y, naive(q, k, v)[-1])


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, None, 0), (None, 0, None)])
def test_vmap_is_a_loop(dims):
    shapes = [(2, 5, 2), (5, 2), (5, 3)]
    arrays = [
        torch.stack(tensors(*[s] * 3, seed=i), d) if d is not None else tensors(s)[0]
        for i, (s, d) in enumerate(zip(shapes, dims, strict=True))
    ]

    def values(q, k, v):
        out = sq.linear_attention(
            q, k, v, causal=True, return_state=True, return_log_normalizer=True
        )
        return out.y, out.log_z, out.state.key_sums, out.state.value_sums

    def logs(q, k, v):
        return tuple(sq.log_linear_attention(q, k, v, key_mask=MASK))

    def gradients(function):
        def total(*given):
            return sum(torch.sin(out).sum() for out in function(*given))

        return torch.func.grad(total, (0, 1, 2))

    for function in (values, logs, gradients(values), gradients(logs)):
        found = torch.vmap(function, dims)(*arrays)
        single = [
            function(
                *(
                    a if d is None else a.select(d, i)
                    for a, d in zip(arrays, dims, strict=True)
                )
            )
            for i in range(3)
        ]
        for a, column in zip(found, zip(*single, strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(column))


def test_states_are_trees():
    k, v = tensors((3, 5, 2), (3, 5, 3))
    state = sq.AttentionState.init((3,), 2, 3, like=v).update(k, v)
    leaves, spec = torch.utils._pytree.tree_flatten(state)
    assert [leaf.shape for leaf in leaves] == [(3, 5, 2), (3, 2, 2, 3)]
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert type(again) is sq.AttentionState
    assert again.recent_keys is None
    mapped = torch.vmap(lambda state, k, v: state.update(k, v))(state, k, v)
    torch.testing.assert_close(mapped.numerator, state.update(k, v).numerator)
    logs = torch.vmap(lambda state: state.to_log())(state)
    assert type(logs) is sq.LogAttentionState


def test_steps():
    """Token by token equals all at once, with gradients and without."""
    q, k, v = tensors((40, 2), (40, 2), (40, 3))
    plain = sq.AttentionState.init((), 2, 3, like=v)
    taped = plain
    given = [a.clone().requires_grad_() for a in (q, k, v)]
    rows, taped_rows = [], []
    for t in range(40):
        y, plain = plain.step(q[t], k[t], v[t])
        rows.append(y)
        y, taped = taped.step(*(a[t] for a in given))
        taped_rows.append(y)
    expected = naive(q, k, v)
    torch.testing.assert_close(torch.stack(rows), expected)
    torch.testing.assert_close(torch.stack(taped_rows).detach(), expected)
    other = [a.clone().requires_grad_() for a in (q, k, v)]
    torch.stack(taped_rows).sin().sum().backward()
    naive(*other).sin().sum().backward()
    for a, b in zip(given, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_steps_with_a_gradient_among_steps_without():
    """What a state holds beside its sums is counted once."""
    q, k, v = tensors((12, 2), (12, 2), (12, 3))
    state = sq.AttentionState.init((), 2, 3, like=v)
    token = None
    for t in range(12):
        given = [a[t] for a in (q, k, v)]
        if t == 5:
            given = token = [a.clone().requires_grad_() for a in given]
        y, state = state.step(*given)
    torch.testing.assert_close(y.detach(), naive(q, k, v)[-1])
    y.sum().backward()
    other = k.clone().requires_grad_()
    naive(q, other, v)[-1].sum().backward()
    torch.testing.assert_close(token[1].grad, other.grad[5])


def test_steps_leave_the_state_before_alone():
    q, k, v = tensors((2,), (2,), (3,))
    _, first = sq.AttentionState.init((), 2, 3, like=v).step(q, k, v)
    copies = [a.clone() for a in (first.key_sums, first.recent_keys)]
    first.step(q, k, v)
    first.step(q.clone().requires_grad_(), k, v)
    for a, b in zip((first.key_sums, first.recent_keys), copies, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_half_precision():
    q, k, v = (a.bfloat16().requires_grad_() for a in tensors((5, 2), (5, 2), (5, 3)))
    out = sq.linear_attention(q, k, v, causal=True)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {a.grad.dtype for a in (q, k, v)} == {torch.bfloat16}


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = (a.to("meta") for a in tensors((2, 5, 2), (5, 2), (5, 3)))
    out = sq.linear_attention(q, k, v, return_state=True, return_log_normalizer=True)
    assert out.y.shape == (2, 5, 3)
    assert out.log_z.shape == (2, 5)
    assert out.state.value_sums.shape == (2, 2, 2, 3)
    with FakeTensorMode():
        q = torch.empty(2, 5, 2, requires_grad=True)
        out = sq.log_linear_attention(q, torch.empty(5, 2), torch.empty(5, 3))
        out.log_abs_y.sum().backward()
        assert q.grad.shape == q.shape
