"""torch: registered operators, compile, vmap, views and modes."""

from __future__ import annotations

import numpy as np
import pytest

import subquad as sq
from _oracle import check_gaussian, check_log_normalizer

torch = pytest.importorskip("torch", reason="torch is not installed")

# torch deprecates its own decorators in modules that are imported late.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def tensors(*shapes, seed=0, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(seed)
    out = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    return [a.requires_grad_(grad) for a in out]


def case(seed=0, grad=False, dtype=torch.float64):
    return tensors((9, 4), (11, 4), (11,), seed=seed, grad=grad, dtype=dtype)


def mixture(seed=0, grad=False):
    return tensors((9, 4), (3,), (3, 4), (3, 4, 2), seed=seed, grad=grad)


def naive(x, y, lw=None):
    s = x @ y.mT
    return torch.logsumexp(s if lw is None else s + lw[..., None, :], -1)


def naive_gaussian(x, lc, means, factors):
    m = x @ means.mT
    v = ((x[..., None, :, :] @ factors) ** 2).sum(-1).mT
    return torch.logsumexp(lc[..., None, :] + m + v / 2, -1)


def operators():
    """The operators that the two public functions put on the dispatcher."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "subquad":
                seen.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    x, y, lw = case(grad=True)
    index = torch.tensor([0, 1, -1, 2, 3, 4, 5, 10, -1])
    with Spy():
        sq.log_normalizer(x, y).sum().backward()
        sq.log_normalizer(
            x, y, log_weights=lw, self_index=index, self_term="exclude"
        ).sum().backward()
        sq.gaussian_log_normalizer(*mixture(grad=True)).sum().backward()
    return seen


def test_functions_are_operators_of_the_dispatcher():
    names = {func.name() for func, _, _ in operators()}
    assert any("gaussian" in name for name in names)
    assert len(names) >= 4  # two functions, two reverses


def test_opcheck():
    for func, args, kwargs in operators():
        detached = [
            a.detach().requires_grad_(a.requires_grad)
            if isinstance(a, torch.Tensor)
            else a
            for a in args
        ]
        torch.library.opcheck(func, tuple(detached), kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values(dtype):
    x, y, lw = case(dtype=dtype)
    out = sq.log_normalizer(x, y, log_weights=lw)
    assert type(out) is torch.Tensor
    assert out.dtype == dtype
    check_log_normalizer(out.numpy(), x.numpy(), y.numpy(), lw.numpy())


def test_autograd_matches_plain_torch():
    ours, theirs = case(grad=True), case(grad=True)
    sq.log_normalizer(ours[0], ours[1], log_weights=ours[2]).square().sum().backward()
    naive(*theirs).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
    ours, theirs = mixture(grad=True), mixture(grad=True)
    sq.gaussian_log_normalizer(*ours).square().sum().backward()
    naive_gaussian(*theirs).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_of_one_input(which):
    arrays = case()
    arrays[which].requires_grad_()
    out = sq.log_normalizer(arrays[0], arrays[1], log_weights=arrays[2])
    assert out.requires_grad
    out.sum().backward()
    for i, a in enumerate(arrays):
        assert (a.grad is not None) == (i == which)
    theirs = case()
    theirs[which].requires_grad_()
    naive(*theirs).sum().backward()
    torch.testing.assert_close(arrays[which].grad, theirs[which].grad)


def test_requires_grad_is_not_lost():
    x, y, _ = case(grad=True)
    assert sq.log_normalizer(x, y.detach()).requires_grad
    assert sq.log_normalizer(x.detach(), y).requires_grad
    assert not sq.log_normalizer(x.detach(), y.detach()).requires_grad
    with torch.no_grad():
        assert not sq.log_normalizer(x, y).requires_grad
    with torch.inference_mode():
        out = sq.log_normalizer(x, y)
        assert not out.requires_grad
    torch.testing.assert_close(out.clone(), naive(x, y).detach())
    parameter = torch.nn.Parameter(x.detach().clone())
    out = sq.log_normalizer(parameter, y.detach())
    assert type(out) is torch.Tensor
    assert out.requires_grad
    out.sum().backward()
    assert parameter.grad is not None
    with torch.no_grad():
        assert not sq.log_normalizer(parameter, y).requires_grad


def test_same_tensor_twice():
    (x, _, _), (z, _, _) = case(grad=True), case(grad=True)
    sq.log_normalizer(x, x).sum().backward()
    naive(z, z).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_estimator_is_differentiable_in_the_queries():
    x, y, _ = case()
    est = sq.GaussianNormalizer(2, random_state=0).fit(y)
    x.requires_grad_()
    out = est.log_normalizer(x)
    assert out.requires_grad
    assert torch.autograd.gradcheck(est.log_normalizer, (x,))


def test_non_contiguous():
    x, y, _ = case()
    expected = sq.log_normalizer(x, y)
    wide = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    for a in (
        wide,
        x.T.contiguous().T,
        x[None].expand(3, -1, -1)[1],
        x.flip(0).flip(0),
    ):
        torch.testing.assert_close(sq.log_normalizer(a, y), expected, rtol=0, atol=0)
    expanded = x[:1].expand(9, -1)
    out = sq.log_normalizer(expanded, y)
    torch.testing.assert_close(out, expected[:1].expand(9))


def test_negated_and_conjugated_views():
    """The imaginary part of a conjugate is a view that only looks negated."""
    x, y, _ = case()
    conjugate = torch.complex(y, x[:1].expand(11, -1) * 0 + y).conj()
    assert conjugate.is_conj()
    view = conjugate.imag
    assert view.is_neg()
    torch.testing.assert_close(sq.log_normalizer(x, view), naive(x, -y))
    queries = torch.view_as_complex(torch.stack([x, x], -1)).conj().imag
    assert queries.is_neg()
    torch.testing.assert_close(sq.log_normalizer(queries, y), naive(-x, y))
    queries = queries.detach().requires_grad_()
    sq.log_normalizer(queries, y).sum().backward()
    other = (-x).requires_grad_()
    naive(other, y).sum().backward()
    torch.testing.assert_close(queries.grad, other.grad)


def test_torch_and_numpy_do_not_mix():
    x, y, lw = case()
    for call in (
        lambda: sq.log_normalizer(x, y.numpy()),
        lambda: sq.log_normalizer(x.numpy(), y),
        lambda: sq.log_normalizer(x, y, log_weights=lw.numpy()),
    ):
        with pytest.raises(TypeError, match=r"(?is)(?=.*numpy)(?=.*torch)"):
            call()


def test_meta_device():
    x, y, _ = (a.to("meta") for a in case())
    out = sq.log_normalizer(x, y)
    assert out.device.type == "meta"
    assert out.shape == (9,)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 1, 9, 4, requires_grad=True)
        y, lw = torch.empty(3, 11, 4), torch.empty(11)
        index = torch.zeros(9, dtype=torch.int64)
        out = sq.log_normalizer(
            x, y, log_weights=lw, self_index=index, self_term="exclude"
        )
        assert out.shape == (2, 3, 9)
        assert out.dtype == torch.float32
        assert out.requires_grad
        out.sum().backward()
        assert x.grad.shape == x.shape
        half = sq.log_normalizer(x.detach().half(), y.half())
        assert half.dtype == torch.float32
        out = sq.gaussian_log_normalizer(
            torch.empty(5, 9, 4),
            torch.empty(3),
            torch.empty(3, 4),
            torch.empty(3, 4, 2),
        )
        assert out.shape == (5, 9)


def test_compile_without_graph_breaks():
    def f(x, y, lw, index):
        return sq.log_normalizer(
            2 * x, y, log_weights=lw, self_index=index, self_term="exclude"
        ).square()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    index = torch.arange(9)
    ours, theirs = case(grad=True), case(grad=True)
    out, expected = compiled(*ours, index), f(*theirs, index)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compile_of_the_gaussian():
    compiled = torch.compile(
        lambda *a: sq.gaussian_log_normalizer(*a) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    ours, theirs = mixture(grad=True), mixture(grad=True)
    out, expected = compiled(*ours), naive_gaussian(*theirs) + 1
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compile_with_dynamic_shapes():
    compiled = torch.compile(
        sq.log_normalizer, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n, m in [(5, 7), (9, 11), (13, 3)]:
        x, y = tensors((n, 4), (m, 4))
        torch.testing.assert_close(compiled(x, y), naive(x, y))


def test_compile_to_code():
    import shutil

    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler for inductor")
    x, y, _ = case(dtype=torch.float32)

    def f(x, y):
        return torch.tanh(sq.log_normalizer(x + 1, y)) * 2

    out = torch.compile(f, fullgraph=True)(x, y)
    torch.testing.assert_close(out, f(x, y))


def test_vmap():
    x, y, lw = tensors((3, 9, 4), (3, 11, 4), (3, 11))
    expected = naive(x, y, lw)
    f = lambda x, y, lw: sq.log_normalizer(x, y, log_weights=lw)
    torch.testing.assert_close(torch.vmap(f)(x, y, lw), expected)
    out = torch.vmap(f, (0, None, None))(x, y[0], lw[0])
    torch.testing.assert_close(out, naive(x, y[0], lw[0]))
    out = torch.vmap(f, (None, 1, 0))(x[0], y.transpose(0, 1), lw)
    torch.testing.assert_close(out, naive(x[0], y, lw))
    out = torch.vmap(f, (2, 0, None), out_dims=1)(x.permute(1, 2, 0), y, lw[0])
    torch.testing.assert_close(out, naive(x, y, lw[0]).T)
    twice = torch.vmap(torch.vmap(f, (0, None, None)), (None, 0, 0))(x, y, lw)
    torch.testing.assert_close(twice, naive(x, y[:, None], lw[:, None]))


def test_vmap_over_batches_of_different_rank():
    """A mapped argument may have batch dimensions that another lacks."""
    x, y = tensors((5, 2, 9, 4), (5, 11, 4))
    out = torch.vmap(sq.log_normalizer)(x, y)
    torch.testing.assert_close(out, naive(x, y[:, None]))


def test_vmap_of_the_gaussian():
    x, lc, means, factors = mixture()
    many = torch.stack([x, 2 * x, -x])
    out = torch.vmap(lambda a: sq.gaussian_log_normalizer(a, lc, means, factors))(many)
    torch.testing.assert_close(out, naive_gaussian(many, lc, means, factors))


def test_functional_gradients():
    x, y, lw = case()
    f = lambda x, y, lw: sq.log_normalizer(x, y, log_weights=lw).sum()
    g = lambda x, y, lw: naive(x, y, lw).sum()
    ours = torch.func.grad(f, (0, 1, 2))(x, y, lw)
    theirs = torch.func.grad(g, (0, 1, 2))(x, y, lw)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    rows = torch.vmap(torch.func.grad(f), (0, None, None))(x[:, None], y, lw)
    torch.testing.assert_close(rows[:, 0], theirs[0])
    jacobian = torch.func.jacrev(lambda x: sq.log_normalizer(x, y))(x)
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda x: naive(x, y))(x))


def test_forward_mode_is_right_or_refused():
    """A dual number must not lose its tangent in silence."""
    x, y, _ = case()
    t = torch.ones_like(x)
    try:
        value, tangent = torch.func.jvp(lambda x: sq.log_normalizer(x, y), (x,), (t,))
    except (NotImplementedError, RuntimeError):
        return
    expected = torch.func.jvp(lambda x: naive(x, y), (x,), (t,))
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(tangent, expected[1])


def test_double_backward_is_right_or_refused():
    ours, theirs = case(grad=True), case(grad=True)
    out = sq.log_normalizer(ours[0], ours[1]).square().sum()
    try:
        (g,) = torch.autograd.grad(out, ours[0], create_graph=True)
        (second,) = torch.autograd.grad(g.square().sum(), ours[0])
    except (NotImplementedError, RuntimeError):
        return
    (g,) = torch.autograd.grad(
        naive(theirs[0], theirs[1]).square().sum(), theirs[0], create_graph=True
    )
    (expected,) = torch.autograd.grad(g.square().sum(), theirs[0])
    torch.testing.assert_close(second, expected)


def test_modes_see_the_call():
    """Under a function mode or a dispatch mode nothing goes round the dispatcher."""
    x, y, _ = case()
    calls = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.name())
            return func(*args, **(kwargs or {}))

    with Mode():
        out = sq.log_normalizer(x, y)
    assert any(name.startswith("subquad::") for name in calls)
    torch.testing.assert_close(out, naive(x, y))


def test_autocast_leaves_the_type_alone():
    x, y, _ = case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sq.log_normalizer(x, y)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, naive(x, y))


def test_bfloat16_gradients_come_back_in_bfloat16():
    x, y, _ = case(dtype=torch.bfloat16, grad=True)
    out = sq.log_normalizer(x, y)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    z = x.detach().float().requires_grad_()
    naive(z, y.detach().float()).sum().backward()
    torch.testing.assert_close(x.grad, z.grad.bfloat16(), rtol=2**-7, atol=1e-3)


def test_tensor_subclasses():
    class Tagged(torch.Tensor):
        pass

    x, y, _ = case()
    out = sq.log_normalizer(x.as_subclass(Tagged), y)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), naive(x, y))


def test_gaussian_values():
    arrays = mixture()
    out = sq.gaussian_log_normalizer(*arrays)
    check_gaussian(out.numpy(), *[a.numpy() for a in arrays])


def test_masked_and_empty():
    x, y, lw = case(grad=True)
    with torch.no_grad():
        lw[3] = -torch.inf
        y[3] = torch.nan
    out = sq.log_normalizer(x, y, log_weights=lw)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(x.grad).all()
    assert (y.grad[3] == 0).all()
    empty = sq.log_normalizer(x, y[:0])
    assert (empty == -torch.inf).all()
    (g,) = torch.autograd.grad(empty.sum(), x)
    assert (g == 0).all()


def test_deep_copies_and_pickles_of_a_fitted_estimator():
    import copy
    import pickle

    x, y, _ = case()
    est = sq.GaussianNormalizer(2, random_state=0).fit(y)
    for twin in (copy.deepcopy(est), pickle.loads(pickle.dumps(est))):
        np.testing.assert_array_equal(twin.log_normalizer(x), est.log_normalizer(x))
