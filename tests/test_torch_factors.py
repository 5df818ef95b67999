"""Sparse factors in torch: derivatives, operators, compile, vmap, what is kept."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import subquad as sq

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.autograd import gradcheck, gradgradcheck  # noqa: E402

from _oracle import assert_within  # noqa: E402
from _oracle_factors import RESIDUALS, Chain  # noqa: E402
from test_torch_scans import looped  # noqa: E402

# torch deprecates its own decorators in modules that are imported late.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

# Wraps, an offset beyond the length, one that is met again modulo 5.
OFFSETS = ((0, 1, 7), (2, -1, -3), (0, 5, 1))
SEGMENTS = torch.tensor([4, 4, 1, 1, 1])
M, N, K, D, H = 3, 5, 3, 2, 4


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def product(**options):
    return functools.partial(
        sq.sparse_factor_product, **{"pattern": OFFSETS, **options}
    )


def chain(bv=(), bx=(), grad=False, dtype=torch.float64):
    arrays = normal(*bv, M, N, K, dtype=dtype), normal(*bx, N, D, seed=1, dtype=dtype)
    return tuple(a.requires_grad_(grad) for a in arrays)


def networks(bx=(), bw=(), grad=False, dtype=torch.float64):
    shapes = ((*bx, N, D), (*bw, 2, H, D), (*bw, 2, H), (*bw, 2, K, H), (*bw, 2, K))
    found = [normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    return tuple(a.requires_grad_(grad) for a in found)


def values_of(x, *weights):
    return sq.factor_values(x, weights)


INDICES = torch.tensor([1, 0, 1, 4, 2, 2])
INDPTR = torch.tensor([0, 3, 3, 6])


def matrix(bx=(), ba=(), grad=False, dtype=torch.float64):
    """Entries, rows and an addend: columns repeat, a row is empty."""
    found = (normal(6), normal(*bx, N, D, seed=1), normal(*ba, 3, D, seed=2))
    return tuple(a.to(dtype).requires_grad_(grad) for a in found)


def rows_of(data, x, addend, structure=torch.int64):
    structure = INDICES.to(structure), INDPTR.to(structure)
    return sq.csr_product(data, *structure, x, addend=addend, scale=0.5)


SETTINGS = [
    {"residual": "none"},
    {"residual": "step", "segment_ids": SEGMENTS},
    {"residual": "input", "circular": False},
    {"residual": "step", "recompute": True},
    {"residual": "input", "transpose": True},
    {"residual": "none", "transpose": True, "circular": False},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_derivatives_of_products(options):
    function, arrays = product(**options), chain(grad=True)
    fast = {"fast_mode": True}
    assert gradcheck(function, arrays, check_forward_ad=True, **fast)
    assert gradgradcheck(function, arrays, check_fwd_over_rev=True, **fast)


@pytest.mark.parametrize("options", SETTINGS[1:5:3], ids=str)
@pytest.mark.parametrize("bv, bx", [((2,), ()), ((), (2,)), ((2, 1), (3,))], ids=str)
def test_derivatives_of_what_was_stretched(bv, bx, options):
    function, arrays = product(**options), chain(bv, bx, grad=True)
    assert gradcheck(function, arrays, fast_mode=True)
    assert gradgradcheck(function, arrays, fast_mode=True)


def test_derivatives_of_networks():
    for batches in ((), ((2,), ()), ((), (2,))):
        arrays = networks(*batches, grad=True)
        assert gradcheck(values_of, arrays, fast_mode=True)
        assert gradgradcheck(values_of, arrays, fast_mode=True)
    arrays = networks(grad=True)
    assert gradcheck(values_of, arrays, check_forward_ad=True, fast_mode=True)


def test_derivatives_of_sparse_matrices():
    for batches in ((), ((2,), ()), ((), (2,)), ((2, 1), (3,))):
        arrays = matrix(*batches, grad=True)
        assert gradcheck(rows_of, arrays, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(rows_of, arrays, fast_mode=True)


def test_third_derivatives():
    for function, arrays in (
        (product(residual="step"), chain(grad=True)),
        (rows_of, matrix(grad=True)),
    ):

        def first(*given, function=function):
            out = (function(*given) ** 3).sum()
            return torch.autograd.grad(out, given, create_graph=True)

        assert gradgradcheck(first, arrays, fast_mode=True)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_derivatives_of_intermediates(residual):
    function = product(residual=residual, return_intermediates=True)
    arrays = chain((2,), grad=True)
    assert gradcheck(function, arrays, fast_mode=True)
    out, kept = function(*(a.detach() for a in arrays))
    theirs, others = function(*arrays)
    torch.testing.assert_close(theirs, out)
    torch.testing.assert_close(others, kept)
    assert kept.shape == (2, M - 1, N, D)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_definition(options, dtype):
    arrays = chain((2,), (), grad=True, dtype=dtype)
    grad = normal(2, N, D, seed=5, dtype=dtype)
    out = product(**options)(*arrays)
    out.backward(grad)
    given = {k: v for k, v in options.items() if k not in ("recompute", "segment_ids")}
    if "segment_ids" in options:
        given["segments"] = SEGMENTS.numpy()
    values, x = (a.detach().numpy() for a in arrays)
    oracle = Chain(list(np.moveaxis(values, -3, 0)), x, OFFSETS, **given)
    assert_within(out.detach().numpy(), *oracle.product())
    (*found, of_x), (*bounds, x_bound) = oracle.gradients(grad.numpy())
    of_values = arrays[0].grad.numpy()
    assert_within(of_values, np.stack(found, -3), np.stack(bounds, -3))
    # The sum over batches rounds once more.
    assert_within(arrays[1].grad.numpy(), of_x.sum(0), 2 * x_bound.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_and_kernels_agree_exactly(dtype):
    """A gradient that is asked for changes no bit of results, nor does NumPy."""
    for function, make in (
        *((product(**options), chain) for options in SETTINGS[:3:2]),
        (values_of, networks),
        (rows_of, matrix),
    ):
        plain = function(*make(dtype=dtype))
        taped = function(*make(grad=True, dtype=dtype))
        torch.testing.assert_close(plain, taped.detach(), rtol=0, atol=0)
        if function is not rows_of:
            arrays = [a.numpy() for a in make(dtype=dtype)]
            np.testing.assert_array_equal(plain.numpy(), function(*arrays))


def test_indices_of_either_type():
    arrays = matrix(grad=True)
    out = rows_of(*arrays)
    other = rows_of(*arrays, structure=torch.int32)
    torch.testing.assert_close(other, out, rtol=0, atol=0)
    gradients = (torch.autograd.grad(o.sum(), arrays) for o in (out, other))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# --------------------------------------------------------------------- what is kept


def kept_by(function, *arrays):
    """Shapes of what a call keeps for its reverse."""
    seen = []

    def pack(tensor):
        if not tensor.dtype.is_floating_point:
            return tensor
        seen.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*arrays)
    return [shape for shape in seen if shape != (0,)]


def test_what_a_product_keeps():
    values, x = chain()
    taped = [a.clone().requires_grad_() for a in (values, x)]
    function, again = product(), product(recompute=True)
    inputs, steps = [(M, N, K), (N, D)], (M - 1, N, D)
    assert kept_by(function, *taped) == [*inputs, steps]
    assert kept_by(function, taped[0], x) == [*inputs, steps]
    assert kept_by(again, *taped) == inputs
    # The values alone tell how a gradient passes to x.
    assert kept_by(function, values, taped[1]) == inputs[:1]
    assert kept_by(function, values, x) == []
    with torch.no_grad():
        assert kept_by(function, *taped) == []
    backwards = product(transpose=True)
    assert kept_by(backwards, *taped) == inputs


def test_what_networks_and_matrices_keep():
    arrays = networks(grad=True)
    assert kept_by(values_of, *arrays) == [tuple(a.shape) for a in arrays]
    data, x, addend = matrix()
    assert kept_by(rows_of, data, x.requires_grad_(), addend) == [(6,)]
    assert kept_by(rows_of, data.requires_grad_(), x, addend) == [(6,), (N, D)]


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_one_input(recompute):
    function = product(residual="step", recompute=recompute)
    every = chain(grad=True)
    function(*every).sin().sum().backward()
    for place in range(2):
        arrays = chain()
        arrays[place].requires_grad_()
        function(*arrays).sin().sum().backward()
        torch.testing.assert_close(arrays[place].grad, every[place].grad)
        assert arrays[1 - place].grad is None


def test_what_requires_a_gradient():
    for function, make in ((product(), chain), (values_of, networks)):
        arrays = make(grad=True)
        assert function(*arrays).requires_grad
        assert not function(*(a.detach() for a in arrays)).requires_grad
        with torch.no_grad():
            assert not function(*arrays).requires_grad
        with torch.inference_mode():
            assert not function(*arrays).requires_grad


def test_a_given_transpose_is_taken():
    from subquad._backends import torch as backend

    data, x, addend = matrix(grad=True)
    structure = (INDICES, INDPTR)
    other = sq.csr_transpose(data.detach(), *structure, N)
    call = lambda data, x: backend.csr_product(data, *structure, x, addend, 2.0, other)
    for arrays in ((data, x), (data.detach(), x)):
        assert gradcheck(call, arrays, fast_mode=True)
        assert gradgradcheck(call, arrays, fast_mode=True)


# ------------------------------------------------------------------------- operators


def operators():
    """What the functions and their derivatives put on the dispatcher."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "subquad":
                seen.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Spy():
        for function, arrays in (
            *((product(**options), chain((2,), grad=True)) for options in SETTINGS),
            (product(), (chain()[0], chain(grad=True)[1])),
            (values_of, networks((2,), grad=True)),
            (rows_of, matrix((2,), grad=True)),
        ):
            wanted = [a for a in arrays if a.requires_grad]
            out = function(*arrays)
            g = torch.autograd.grad((out**2).sum(), wanted, create_graph=True)
            sum((part**2).sum() for part in g).backward()
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
        "sparse_factor_product",
        "sparse_factor_product_vjp",
        "factor_values",
        "factor_values_vjp",
        "csr_product",
        "csr_product_gradient_of_data",
    }
    checked: dict[str, set] = {}
    for func, args, kwargs in seen:
        kinds = checked.setdefault(func.name(), set())
        kind = tuple(a is None for a in args)
        if kind in kinds:
            continue
        # This is slow: functions meet it once, gradients in the tests that compile.
        is_done = kinds or not func.name().endswith(("product", "values"))
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
    def f(x, *weights):
        values = sq.factor_values(x, weights)
        out = sq.sparse_factor_product(values, x.sin(), residual="step")
        return sq.csr_product(x.flatten()[:6], INDICES, INDPTR, out)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    ours, theirs = networks(grad=True), networks(grad=True)
    out, expected = compiled(*ours), f(*theirs)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*ours), f(*ours))


def test_compile_with_dynamic_shapes():
    compiled = torch.compile(
        product(), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n in (5, 9):
        values, x = normal(M, n, K), normal(n, D)
        torch.testing.assert_close(compiled(values, x), product()(values, x))


def test_compile_of_transforms():
    values, x = chain()
    total = lambda values, x: product(residual="step")(values, x).sin().sum()
    gradient = torch.func.grad(total, (0, 1))
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values, x), gradient(values, x))


# ------------------------------------------------------------------------------ vmap


def mapped(arrays, dims):
    return [
        a if dim is None else torch.movedim(torch.stack([a, 2 * a, -a]), 0, dim)
        for a, dim in zip(arrays, dims, strict=True)
    ]


def check_vmap(function, arrays, dims):
    arrays = mapped(arrays, dims)

    def gradients(*given):
        places = tuple(range(len(given)))
        return torch.func.grad(lambda *a: function(*a).sin().sum(), places)(*given)

    for call in (function, gradients):
        out = torch.vmap(call, dims)(*arrays)
        out = out if isinstance(out, tuple) else (out,)
        for a, b in zip(out, looped(call, dims, arrays), strict=True):
            torch.testing.assert_close(a, b)
    ours, theirs = ([a.clone().requires_grad_() for a in arrays] for _ in range(2))
    torch.vmap(function, dims)(*ours).sin().sum().backward()
    looped(function, dims, theirs)[0].sin().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("options", SETTINGS[1:5], ids=str)
@pytest.mark.parametrize("dims", [(0, 1), (2, None), (None, 0)], ids=str)
def test_vmap_of_products(dims, options):
    check_vmap(product(**options), chain((2,)), dims)


@pytest.mark.parametrize("dims", [(0, 1, 0, 2, 1), (0, *(None,) * 4)], ids=str)
def test_vmap_of_networks(dims):
    check_vmap(values_of, networks(), dims)


@pytest.mark.parametrize(
    "dims", [(0, 1, 2), (None, 0, None), (None, None, 0), (0, None, None)], ids=str
)
def test_vmap_of_sparse_matrices(dims):
    check_vmap(rows_of, matrix((2,)), dims)


def test_vmap_over_segments():
    values, x = chain()
    segments = torch.stack([SEGMENTS, SEGMENTS * 0])
    call = lambda s: product(segment_ids=s)(values, x)
    expected = torch.stack([call(s) for s in segments])
    torch.testing.assert_close(torch.vmap(call)(segments), expected)


def test_functional_transforms():
    values, x = chain()

    def dense(values, x):
        """The same by matrices."""
        for m, row in enumerate(OFFSETS):
            matrix = sum(
                values[m, :, k, None] * torch.eye(N, dtype=x.dtype).roll(o, 1)
                for k, o in enumerate(row)
            )
            x = matrix @ x + x
        return x

    ours = product(residual="step")
    torch.testing.assert_close(ours(values, x), dense(values, x))
    for place in (0, 1):
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            found, expected = (transform(f, place)(values, x) for f in (ours, dense))
            torch.testing.assert_close(found, expected)
    total = lambda f: lambda v: f(v, x).sin().sum()
    hessians = [torch.func.hessian(total(f))(values) for f in (ours, dense)]
    torch.testing.assert_close(*hessians)


# ------------------------------------------------------------------------- the rest


def test_strides_and_what_cannot_be_written():
    values, x = chain((2,), (2,))
    for function, arrays in (
        (product(residual="step"), (values, x)),
        (values_of, networks((2,))),
        (rows_of, matrix((2,), (2,))),
    ):
        expected = function(*arrays)
        turned = [
            torch.stack([a, a], -1).transpose(0, -2).clone().transpose(0, -2)[..., 1]
            for a in arrays
        ]
        torch.testing.assert_close(function(*turned), expected)
        taped = [a.clone().requires_grad_() for a in turned]
        torch.testing.assert_close(function(*taped).detach(), expected)
    stretched = x[:, :1].expand(2, N, D)
    out = product()(values, stretched)
    torch.testing.assert_close(out, product()(values, stretched.clone()))


def test_nothing():
    for shapes in (((0, 5, 3), (5, 2)), ((2, 0, 3), (0, 2)), ((2, 5, 0), (5, 2))):
        values, x = (normal(*shape).requires_grad_() for shape in shapes)
        offsets = [[0, 1, 2][: shapes[0][2]]] * shapes[0][0]
        pattern = np.array(offsets, np.int64).reshape(shapes[0][0], shapes[0][2])
        out = sq.sparse_factor_product(values, x, pattern=pattern)
        out.sum().backward()
        assert out.shape == x.shape
        assert values.grad.shape == values.shape
        torch.testing.assert_close(
            x.grad, torch.ones_like(x) if shapes[0][0] == 0 else torch.zeros_like(x)
        )


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    meta = lambda *shape: torch.empty(shape, device="meta")
    values, x = meta(2, M, N, K), meta(N, D)
    out, kept = product(return_intermediates=True)(values, x)
    assert (out.shape, kept.shape) == ((2, N, D), (2, M - 1, N, D))
    weights = (meta(M, H, D), meta(M, H), meta(M, K, H), meta(M, K))
    assert sq.factor_values(x, weights).shape == (M, N, K)
    out = sq.csr_product(meta(6), INDICES.to("meta"), INDPTR.to("meta"), x)
    assert out.shape == (3, D)
    with FakeTensorMode():
        values = torch.empty(2, M, N, K, requires_grad=True)
        x = torch.empty(N, D, requires_grad=True)
        product()(values, x).sum().backward()
        assert (values.grad.shape, x.grad.shape) == (values.shape, x.shape)


def test_autocast_leaves_types_and_gradients_alone():
    for function, make in (
        (product(residual="step"), chain),
        (values_of, networks),
        (rows_of, matrix),
    ):
        found = []
        for is_on in (False, True):
            arrays = make(grad=True, dtype=torch.float32)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
                out = function(*arrays)
                out.square().sum().backward()
            found.append([out, *(a.grad for a in arrays)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_half_precision():
    arrays = [a.bfloat16().requires_grad_() for a in chain(dtype=torch.float32)]
    out = product()(*arrays)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(a.grad.dtype == torch.bfloat16 for a in arrays)
