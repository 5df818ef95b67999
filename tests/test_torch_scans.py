"""Scans in torch: derivatives of any order, operators, compile, vmap, states."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import subquad as sq

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.autograd import gradcheck, gradgradcheck  # noqa: E402

# torch deprecates its own decorators in modules that are imported late.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

INF = float("inf")
SEGMENTS = torch.tensor([0, 0, 1, 1, 1])
OPTIONS = [
    {},
    {"reverse": True},
    {"exclusive": True},
    {"segment_ids": SEGMENTS},
    {"segment_ids": SEGMENTS, "reverse": True, "exclusive": True},
]
ONLY_RECURRENCE = [OPTIONS[0], OPTIONS[1], OPTIONS[3]]


def tensors(*shapes, seed=0, dtype=torch.float64, grad=False, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    out = [scale * torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    return [a.requires_grad_(grad) for a in out]


def finite(out):
    return torch.where(out.isinf(), 0.0, out)


def log_sums(options, x, state):
    result = sq.logcumsumexp(x, state=state, return_state=True, **options)
    return finite(result.out), result.state.log_sum


def log_abs(options, x, sign):
    return finite(sq.signed_logcumsumexp(x, sign, **options).log_abs)


def recurrence(options, log_a, log_b, state):
    result = sq.log_linear_recurrence(
        log_a, log_b, state=state, return_state=True, **options
    )
    return result.out, result.state


def all_calls():
    """Every scan with every kind of option."""
    calls = [(functools.partial(log_sums, o), [(2, 5), (2,)]) for o in OPTIONS]
    calls += [(functools.partial(log_abs, o), [(2, 5), (2, 5)]) for o in OPTIONS[:3]]
    return calls + [
        (functools.partial(recurrence, o), [(2, 5), (2, 5), (2,)])
        for o in ONLY_RECURRENCE
    ]


@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["random", "equal"])
@pytest.mark.parametrize("number", range(len(all_calls())))
def test_derivatives(number, scale):
    """Equal entries are where a maximum has no derivative: the sums have one."""
    call, shapes = all_calls()[number]
    arrays = tensors(*shapes, grad=True, scale=scale)
    if call.func is log_abs:
        sign = torch.tensor([[1, -0.5, 0, 2, 3], [1, 1, -3, 4, -7]])
        arrays[1] = sign.double().requires_grad_()
    options = {"fast_mode": True}
    assert gradcheck(call, arrays, check_forward_ad=True, **options)
    assert gradgradcheck(call, arrays, check_fwd_over_rev=True, **options)


@pytest.mark.parametrize("number", [4, 5, 10])
def test_third_derivatives(number):
    call, shapes = all_calls()[number]
    arrays = tensors(*(shape[1:] for shape in shapes), seed=1, grad=True)

    def first(*given):
        found = call(*given)
        found = found if isinstance(found, tuple) else (found,)
        return torch.autograd.grad(
            sum((out**2).sum() for out in found), given, create_graph=True
        )

    assert gradgradcheck(first, arrays, fast_mode=True)


def test_forward_mode_of_forward_mode():
    x, t, u = tensors((2, 5), (2, 5), (2, 5))

    def along(direction, function):
        return lambda x: torch.func.jvp(function, (x,), (direction,))[1]

    def check(ours, theirs):
        torch.testing.assert_close(
            along(u, along(t, ours))(x), along(u, along(t, theirs))(x)
        )

    check(lambda x: sq.logcumsumexp(x), lambda x: torch.logcumsumexp(x, -1))
    sign = torch.tensor([1.0, -0.5, 2.0, 2.0, -9.0], dtype=x.dtype)
    check(
        lambda x: sq.signed_logcumsumexp(x, sign * x).log_abs,
        lambda x: (sign * x * x.exp()).cumsum(-1).abs().log(),
    )

    def stepped(x):
        h, out = torch.zeros_like(x[:, 0]), []
        for i in range(x.shape[1]):
            h = torch.exp(x[:, i].sin()) * h + torch.exp(x[:, i])
            out.append(h.log())
        return torch.stack(out, -1)

    check(lambda x: sq.log_linear_recurrence(x.sin(), x), stepped)


def test_gradients_of_gradients_at_zeros():
    """An entry -inf takes no part in derivatives of any order."""
    (x,) = tensors((6,))
    x[2] = -INF
    x.requires_grad_()
    (g,) = torch.autograd.grad(sq.logcumsumexp(x).square().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x)
    assert torch.isfinite(h).all()
    assert g[2] == 0
    assert h[2] == 0
    y = x.detach()[[0, 1, 3, 4, 5]].requires_grad_()
    doubled = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0])
    (gy,) = torch.autograd.grad(
        (doubled * sq.logcumsumexp(y).square()).sum(), y, create_graph=True
    )
    torch.testing.assert_close(g[[0, 1, 3, 4, 5]], gy)
    (hy,) = torch.autograd.grad(gy.square().sum(), y)
    torch.testing.assert_close(h[[0, 1, 3, 4, 5]], hy)


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_gradients_of_some_inputs(which):
    calls = (
        (lambda x, s: sum(a.sum() for a in log_sums({}, x, s)), [(3, 5), (3,)]),
        (lambda x, s: log_abs({}, x, s).sum(), [(3, 5), (3, 5)]),
        (lambda a, b: recurrence({}, a, b, None)[0].sum(), [(3, 5), (3, 5)]),
    )
    for call, shapes in calls:
        arrays = tensors(*shapes)
        for i in which:
            arrays[i].requires_grad_()
        out = call(*arrays)
        assert out.requires_grad
        out.backward()
        every = tensors(*shapes, grad=True)
        call(*every).backward()
        for i, (array, other) in enumerate(zip(arrays, every, strict=True)):
            assert (array.grad is not None) == (i in which)
            if i in which:
                torch.testing.assert_close(array.grad, other.grad)


def test_what_requires_a_gradient():
    x, s = tensors((3, 5), (3,), grad=True)
    out = sq.logcumsumexp(x, state=s, return_state=True)
    assert out.out.requires_grad
    assert out.state.log_sum.requires_grad
    assert not out.state.remainder.requires_grad
    log_abs, sign = sq.signed_logcumsumexp(x, torch.ones_like(x))
    assert log_abs.requires_grad
    assert not sign.requires_grad
    assert not sq.logcumsumexp(x.detach()).requires_grad
    with torch.no_grad():
        assert not sq.logcumsumexp(x).requires_grad
    with torch.inference_mode():
        assert not sq.log_linear_recurrence(x, x).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_and_kernels_agree_exactly(dtype):
    """A gradient that is asked for changes no bit of the values, nor does NumPy."""
    x, y, s = tensors((3, 70), (3, 70), (3,), dtype=dtype)
    for call, arrays in (
        (functools.partial(log_sums, {}), (x, s)),
        (functools.partial(log_abs, {}), (x, y)),
        (functools.partial(recurrence, {}), (x, y, s)),
    ):
        plain = call(*arrays)
        taped = call(*(a.clone().requires_grad_() for a in arrays))
        plain, taped = (r if isinstance(r, tuple) else (r,) for r in (plain, taped))
        for a, b in zip(plain, taped, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b.detach(), rtol=0, atol=0)
    np.testing.assert_array_equal(
        sq.logcumsumexp(x).numpy(), sq.logcumsumexp(x.numpy())
    )
    np.testing.assert_array_equal(
        sq.log_linear_recurrence(x, y).numpy(),
        sq.log_linear_recurrence(x.numpy(), y.numpy()),
    )


def operators():
    """The operators that the scans and their derivatives put on the dispatcher."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "subquad":
                seen.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Spy():
        for call, shapes in all_calls():
            arrays = tensors(*shapes, grad=True)
            found = call(*arrays)
            found = found if isinstance(found, tuple) else (found,)
            total = sum((out**2).sum() for out in found)
            (g,) = torch.autograd.grad(total, arrays[0], create_graph=True)
            (g**2).sum().backward()
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
    scans = ("logcumsumexp", "signed_logcumsumexp", "log_linear_recurrence")
    assert names == {f"subquad::{s}{e}" for s in scans for e in ("", "_vjp", "_jvp")}
    checked: dict[str, set] = {}
    for func, args, kwargs in seen:
        kinds = checked.setdefault(func.name(), set())
        kind = tuple(a is None for a in args)
        if kind in kinds:
            continue
        # This is slow: functions meet it once, gradients in the tests that compile.
        is_done = kinds or func.name().endswith(("_vjp", "_jvp"))
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


def test_compile_without_graph_breaks():
    def f(x, y, s, segments):
        a = sq.logcumsumexp(2 * x, state=s, segment_ids=segments, return_state=True)
        b = sq.signed_logcumsumexp(x, y, axis=0)
        c = sq.log_linear_recurrence(x, y, state=s, reverse=True)
        return (a.out + b.log_abs + c).square(), a.state.log_sum, b.sign

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    ours = tensors((2, 5), (2, 5), (2,), grad=True)
    theirs = tensors((2, 5), (2, 5), (2,), grad=True)
    out, expected = compiled(*ours, SEGMENTS), f(*theirs, SEGMENTS)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b)
    (out[0].sum() + out[1].sum()).backward()
    (expected[0].sum() + expected[1].sum()).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_states_go_in_and_out_of_compiled_functions():
    compiled = torch.compile(
        lambda state, x: state.update(x), fullgraph=True, backend="aot_eager"
    )
    x, y = tensors((3, 5), (3, 4))
    state = sq.LogSumExpState.init((3,), like=x)
    state = compiled(compiled(state, x), y)
    expected = torch.logsumexp(torch.cat([x, y], 1), 1)
    torch.testing.assert_close(state.finalize(), expected)


def test_compile_with_dynamic_shapes():
    compiled = torch.compile(
        sq.logcumsumexp, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for shape in [(2, 5), (3, 7), (4, 3)]:
        (x,) = tensors(shape)
        torch.testing.assert_close(compiled(x), torch.logcumsumexp(x, -1))


def looped(call, dims, arrays):
    """What vmap stands for."""
    size = next(a.shape[d] for a, d in zip(arrays, dims, strict=True) if d is not None)
    found = [
        call(
            *(
                a if d is None else a.select(d, i)
                for a, d in zip(arrays, dims, strict=True)
            )
        )
        for i in range(size)
    ]
    if isinstance(found[0], torch.Tensor):
        return (torch.stack(found),)
    return tuple(torch.stack(column) for column in zip(*found, strict=True))


@pytest.mark.parametrize("number", range(len(all_calls())))
def test_vmap_is_a_loop(number):
    call, shapes = all_calls()[number]
    for dims in ([0] * len(shapes), [None, *[0] * (len(shapes) - 1)], [1]):
        dims = (dims + [None] * len(shapes))[: len(shapes)]
        arrays = [
            torch.movedim(torch.stack(tensors(*[s] * 3, seed=i)), 0, d)
            if d is not None
            else tensors(s, seed=i)[0]
            for i, (s, d) in enumerate(zip(shapes, dims, strict=True))
        ]

        def gradients(*given):
            def total(*given):
                found = call(*given)
                found = found if isinstance(found, tuple) else (found,)
                return sum((out**2).sum() for out in found)

            return torch.func.grad(total, tuple(range(len(given))))(*given)

        for function in (call, gradients):
            out = torch.vmap(function, tuple(dims))(*arrays)
            out = out if isinstance(out, tuple) else (out,)
            for a, b in zip(out, looped(function, dims, arrays), strict=True):
                torch.testing.assert_close(a, b)


def test_vmap_over_segments():
    (x,) = tensors((3, 5))
    segments = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 2]])
    call = lambda x, ids: sq.logcumsumexp(x, segment_ids=ids)
    out = torch.vmap(call)(x, segments)
    torch.testing.assert_close(out, looped(call, (0, 0), (x, segments))[0])


def test_functional_transforms():
    x, y = tensors((3, 5), (3, 5))
    f = lambda x: sq.logcumsumexp(x)
    g = lambda x: torch.logcumsumexp(x, -1)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(f)(x), transform(g)(x))
    total = lambda h: lambda x: (y * h(x).square()).sum()
    ours, theirs = (torch.func.hessian(total(h))(x) for h in (f, g))
    torch.testing.assert_close(ours, theirs)
    rows = torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(x)
    torch.testing.assert_close(rows, torch.func.grad(lambda x: g(x).square().sum())(x))


def test_states_are_trees():
    (x,) = tensors((3, 5))
    state = sq.LogSumExpState.init((3,), like=x).update(x)
    leaves, spec = torch.utils._pytree.tree_flatten(state)
    assert [leaf.shape for leaf in leaves] == [(3,), (3,)]
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert type(again) is sq.LogSumExpState
    assert again.remainder is state.remainder
    init = sq.LogSumExpState.init((), like=x)
    mapped = torch.vmap(lambda row: init.update(row))(x)
    torch.testing.assert_close(mapped.log_sum, state.log_sum, rtol=0, atol=0)
    sums = torch.vmap(lambda state, row: state.update(row))(mapped, x)
    torch.testing.assert_close(sums.log_sum, state.update(x).log_sum)


def test_half_precision():
    (x,) = tensors((3, 5), grad=True)
    half = x.detach().bfloat16().requires_grad_()
    out = sq.logcumsumexp(half)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.empty(2, 5, device="meta")
    out = sq.logcumsumexp(x, axis=0, return_state=True)
    assert out.out.shape == (2, 5)
    assert out.state.log_sum.shape == (5,)
    with FakeTensorMode():
        x = torch.empty(2, 5, requires_grad=True)
        out = sq.log_linear_recurrence(x, x)
        out.sum().backward()
        assert x.grad.shape == x.shape


def test_autocast_leaves_the_type_alone():
    (x,) = tensors((3, 5), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sq.logcumsumexp(x).dtype == torch.float32
