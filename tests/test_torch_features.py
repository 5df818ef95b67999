"""Random features in torch: derivatives of any order, operators, compile, vmap."""

from __future__ import annotations

import numpy as np
import pytest

import subquad as sq
from _feature_formulas import FORMS, Case, case

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.autograd import gradcheck, gradgradcheck  # noqa: E402

from test_torch_scans import looped  # noqa: E402

# torch deprecates its own decorators in modules that are imported late.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

SMALL = {"n": 3, "m": 2, "d": 4, "r": 2}


def on_torch(given, grad=False):
    """The arrays of a case that are given, and what makes a case of others."""
    places = [place for place, a in enumerate(given) if a is not None]
    arrays = tuple(torch.from_numpy(given[i]).requires_grad_(grad) for i in places)

    def again(found):
        complete = [None] * 7
        for place, array in zip(places, found, strict=True):
            complete[place] = array
        return Case(*complete)

    return arrays, again


def tensors_of(form, grad=False, **options):
    return on_torch(case(form, **{**SMALL, **options}), grad)


def calls(form, **options):
    """Both forms of the logarithms, and the trigonometric features, of tensors."""
    arrays, again = tensors_of(form, **options)
    return arrays, {
        "single": lambda *a: again(a).call(sq.log_features),
        "pairs": lambda *a: again(a).call(sq.log_features, antithetic=True),
        "trigonometric": lambda *a: again(a).call(sq.trigonometric_features),
    }


KINDS = ["single", "pairs", "trigonometric"]
FULL = ["all with diagonal", "all with factor"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_derivatives(form, kind):
    arrays, functions = calls(form, grad=True)
    options = {"fast_mode": True}
    assert gradcheck(functions[kind], arrays, check_forward_ad=True, **options)
    assert gradgradcheck(functions[kind], arrays, check_fwd_over_rev=True, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bx, bp", [((2,), ()), ((), (2,)), ((2, 1), (3,))], ids=str)
def test_derivatives_of_what_was_stretched(bx, bp, kind):
    for form in FULL:
        arrays, functions = calls(form, grad=True, bx=bx, bp=bp)
        assert gradcheck(functions[kind], arrays, fast_mode=True)
        assert gradgradcheck(functions[kind], arrays, fast_mode=True)


def test_third_derivatives():
    arrays, functions = calls("all with factor", grad=True)

    def first(*given):
        out = functions["pairs"](*given)
        return torch.autograd.grad((out**3).sum(), given, create_graph=True)

    assert gradgradcheck(first, arrays, fast_mode=True)


@pytest.mark.parametrize("antithetic", [False, True])
def test_derivatives_of_the_exponentials(antithetic):
    from subquad._backends import torch as backend

    arrays, again = tensors_of("all with factor", grad=True)

    def features(*given):
        return backend.log_features(*again(given), antithetic, True)

    assert gradcheck(features, arrays, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(features, arrays, fast_mode=True)


def test_derivatives_of_the_transform():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(sq.hadamard_transform, x, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(sq.hadamard_transform, x, fast_mode=True)


@pytest.mark.parametrize("place", range(6))
def test_gradients_of_one_input(place):
    arrays, functions = calls("all with factor")
    every, _ = calls("all with factor", grad=True)
    functions["pairs"](*every).square().sum().backward()
    arrays[place].requires_grad_()
    functions["pairs"](*arrays).square().sum().backward()
    for i, (array, other) in enumerate(zip(arrays, every, strict=True)):
        assert (array.grad is not None) == (i == place)
        if i == place:
            torch.testing.assert_close(array.grad, other.grad)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", FULL)
def test_operators_and_kernels_agree_exactly(form, dtype):
    """A gradient that is asked for changes no bit of the logarithms, nor does NumPy."""
    given = case(form, n=37, m=19, d=11, dtype=dtype)
    arrays, again = on_torch(given)
    taped, _ = on_torch(given, grad=True)
    call = lambda a: again(a).call(sq.log_features, antithetic=True)
    plain = call(arrays)
    torch.testing.assert_close(plain, call(taped).detach(), rtol=0, atol=0)
    expected = given.call(sq.log_features, antithetic=True)
    np.testing.assert_array_equal(plain.numpy(), expected)
    x = torch.from_numpy(given.x[:, :8].copy())
    expected = sq.hadamard_transform(x.numpy())
    np.testing.assert_array_equal(sq.hadamard_transform(x).numpy(), expected)
    taped = sq.hadamard_transform(x.requires_grad_())
    np.testing.assert_array_equal(taped.detach().numpy(), expected)


def test_what_requires_a_gradient():
    arrays, functions = calls("all with factor", grad=True)
    for kind in KINDS:
        assert functions[kind](*arrays).requires_grad
        assert not functions[kind](*(a.detach() for a in arrays)).requires_grad
        with torch.no_grad():
            assert not functions[kind](*arrays).requires_grad
        with torch.inference_mode():
            assert not functions[kind](*arrays).requires_grad


def operators():
    """What the features and their derivatives put on the dispatcher."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "subquad":
                seen.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Spy():
        for form in FORMS:
            arrays, functions = calls(form, grad=True, bx=(2,))
            for kind in KINDS:
                out = functions[kind](*arrays)
                (g,) = torch.autograd.grad((out**2).sum(), arrays[0], create_graph=True)
                (g**2).sum().backward()
        x = torch.randn(3, 8, requires_grad=True)
        sq.hadamard_transform(x).square().sum().backward()
    return seen


UTILITIES = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def test_opcheck():
    seen = operators()
    names = {func.name().partition("::")[2] for func, _, _ in seen}
    assert names == {
        "log_features",
        "log_features_gradient_of_rows",
        "trigonometric_features",
        "hadamard_transform",
    }
    checked: dict[str, set] = {}
    for func, args, kwargs in seen:
        kinds = checked.setdefault(func.name(), set())
        kind = tuple(a is None for a in args)
        if kind in kinds:
            continue
        # This is slow: functions meet it once, gradients in the tests that compile.
        is_done = kinds or func.name().endswith("rows")
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
    def f(x, projection, bias, factor, shift, linear):
        options = {"shift": shift, "linear": linear}
        parameters = (projection, bias, factor)
        logs = sq.log_features(2 * x, *parameters, antithetic=True, **options)
        waves = sq.trigonometric_features(x, *parameters, **options)
        return logs.square() + waves, sq.hadamard_transform(x).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    ours, _ = tensors_of("all with factor", grad=True)
    theirs, _ = tensors_of("all with factor", grad=True)
    out, expected = compiled(*ours), f(*theirs)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b)
    sum(a.sum() for a in out).backward()
    sum(a.sum() for a in expected).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*ours)[0], f(*ours)[0])


def test_compile_with_dynamic_shapes():
    compiled = torch.compile(
        sq.log_features, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n, m in ((3, 2), (5, 4), (8, 3)):
        arrays, _ = tensors_of("diagonal", n=n, m=m)
        torch.testing.assert_close(compiled(*arrays), sq.log_features(*arrays))


# Which of x, projection, bias, the form, shift and linear are mapped, and where.
DIMS = [
    (0, 0, 0, 0, 0, 0),
    (1, None, None, None, None, None),
    (None, 2, None, None, None, None),
    (None, None, 1, None, None, None),
    (None, None, None, 0, None, None),
    (None, None, None, None, 1, None),
    (None, None, None, None, None, 0),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FULL)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_vmap_is_a_loop(dims, form, kind):
    one, functions = calls(form, bx=(2,))
    function = functions[kind]
    arrays = [
        a if dim is None else torch.movedim(torch.stack([a, 2 * a, -a]), 0, dim)
        for a, dim in zip(one, dims, strict=True)
    ]

    def gradients(*given):
        places = tuple(range(len(given)))
        return torch.func.grad(lambda *a: function(*a).sin().sum(), places)(*given)

    for call in (function, gradients):
        out = torch.vmap(call, dims)(*arrays)
        out = out if isinstance(out, tuple) else (out,)
        for a, b in zip(out, looped(call, dims, arrays), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_gradients_through_vmap(dims):
    one, functions = calls("all with factor")

    def arrays():
        return [
            (a if dim is None else torch.movedim(torch.stack([a, 2 * a, -a]), 0, dim))
            .clone()
            .requires_grad_()
            for a, dim in zip(one, dims, strict=True)
        ]

    ours, theirs = arrays(), arrays()
    call = functions["pairs"]
    torch.vmap(call, dims)(*ours).sin().sum().backward()
    looped(call, dims, theirs)[0].sin().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_vmap_of_the_transform():
    x = torch.randn(3, 8, 4, dtype=torch.float64)
    out = torch.vmap(sq.hadamard_transform, 1, 1)(x)
    torch.testing.assert_close(out, sq.hadamard_transform(x))
    out = torch.vmap(sq.hadamard_transform, 2, 2)(x)
    expected = sq.hadamard_transform(x.movedim(1, 2)).movedim(1, 2)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("form", FULL)
def test_functional_transforms(form):
    arrays, functions = calls(form)
    ours = functions["pairs"]
    x, projection, bias, quadratic, shift, linear = arrays

    def theirs(x):
        z = x - shift
        row = z @ linear
        if form == "all with factor":
            row = row - (z @ quadratic.T).square().sum(-1) / 2
        else:
            row = row - (z.square() @ quadratic) / 2
        t = z @ projection.T
        return torch.cat([t + bias, bias - t], -1) + row[:, None]

    f = lambda x: ours(x, *arrays[1:])
    torch.testing.assert_close(f(x), theirs(x))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(f)(x), transform(theirs)(x))
    total = lambda h: lambda x: h(x).sin().sum()
    hessians = [torch.func.hessian(total(h))(x) for h in (f, theirs)]
    torch.testing.assert_close(*hessians)
    moved = [torch.func.jvp(h, (x,), (x.sin(),))[1] for h in (f, theirs)]
    torch.testing.assert_close(*moved)


def test_compile_of_transforms():
    arrays, functions = calls("all with factor")
    total = lambda x: functions["pairs"](x, *arrays[1:]).sin().sum()
    compiled = torch.compile(
        torch.func.grad(total), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(arrays[0]), torch.func.grad(total)(arrays[0]))


def test_half_precision():
    given = case("all with diagonal", dtype=np.float32)
    arrays, again = on_torch(given)
    halves = [a.bfloat16().requires_grad_() for a in arrays]
    out = again(halves).call(sq.log_features, antithetic=True)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert all(a.grad.dtype == torch.bfloat16 for a in halves)


def test_16_bit_points_reach_the_operators():
    """As tensors on CUDA do, which are not widened before."""
    from subquad._backends import torch as backend

    arrays, again = tensors_of("all with diagonal", dtype=np.float32)
    x = arrays[0].half().requires_grad_()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        out = backend.log_features(*again([x, *arrays[1:]]), True, False)
        assert out.dtype == torch.float32
        (gx,) = torch.autograd.grad(out.sum(), x)
        assert gx.dtype == torch.float16


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, projection = torch.empty(2, 5, 3, device="meta"), torch.empty(7, 3)
    projection, bias = projection.to("meta"), torch.empty(7, device="meta")
    out = sq.log_features(x, projection, bias, None, antithetic=True)
    assert out.shape == (2, 5, 14)
    assert sq.trigonometric_features(x, projection, bias, None).shape == (2, 5, 14)
    assert sq.hadamard_transform(torch.empty(3, 8, device="meta")).shape == (3, 8)
    with FakeTensorMode():
        arrays, again = tensors_of("none")
        arrays = [torch.empty(a.shape, requires_grad=True) for a in arrays]
        out = again(arrays).call(sq.log_features)
        out.sum().backward()
        assert all(a.grad.shape == a.shape for a in arrays)


def test_autocast_leaves_the_type_alone():
    arrays, functions = calls("all with factor", dtype=np.float32)
    for kind in KINDS:
        expected = functions[kind](*arrays)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(functions[kind](*arrays), expected)


def test_autocast_leaves_gradients_alone():
    every = [calls("all with factor", grad=True, dtype=np.float32) for _ in range(2)]
    for is_on, (arrays, functions) in enumerate(every):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(is_on)):
            functions["pairs"](*arrays).sum().backward()
    for a, b in zip(every[0][0], every[1][0], strict=True):
        torch.testing.assert_close(a.grad, b.grad)
