"""Mixing by factors whose values networks make: its parts, torch's modules, groups."""

from __future__ import annotations

import numpy as np
import pytest

import subquad as sq
from _arrays import to_numpy
from _oracle import assert_within
from _oracle_factors import RESIDUALS, Chain, Networks, cdil, chord
from subquad import _paramixer

N, D, H, M = 23, 5, 8, 4


def weights_of(m=M, k=5, d=D, h=H, bw=(), dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(m, h, d), (m, h), (m, k, h), (m, k)]
    return sq.FactorWeights(
        *((rng.standard_normal((*bw, *s)) / 2).astype(dtype) for s in shapes)
    )


def rows_of(n=N, d=D, d_v=3, bx=(), bv=(), dtype=np.float64, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*bx, n, d)).astype(dtype)
    return x, rng.standard_normal((*bv, n, d_v)).astype(dtype)


def expected(x, v, weights, rows, **options):
    """By the definitions, and a bound: values are wrong by theirs, and then mixed."""
    values, errors = Networks(x, weights).values()
    factors = [values[..., m, :, :] for m in range(len(rows))]
    chain = Chain(factors, v, rows, **options)
    chain.dtype = np.result_type(x, v, *weights)
    out, bound = chain.product()
    sizes = [np.abs(factor) for factor in factors]
    grown = [a + errors[..., m, :, :] for m, a in enumerate(sizes)]
    largest, _ = Chain(grown, np.abs(v), rows, **options).product()
    usual, _ = Chain(sizes, np.abs(v), rows, **options).product()
    # The bound of the product is that of slightly larger values.
    return out, (2 * bound + (largest - usual)).astype(float)


def set_group(monkeypatch, n_factors, itemsize=8, k=5, n=N, batch=1):
    monkeypatch.setattr(
        _paramixer, "_GROUP_BYTES", n_factors * batch * n * k * itemsize
    )


@pytest.mark.parametrize("residual", RESIDUALS)
def test_on_every_library(xp, residual):
    x, v = rows_of(bx=(2, 1), bv=(3,))
    weights = weights_of(bw=(2, 1))
    ids = np.arange(N) // 9
    given = [xp.asarray(a) for a in (x, v)]
    out = sq.paramixer(*given, tuple(map(xp.asarray, weights)), residual=residual)
    assert type(out) is xp.array_type()
    rows = [chord(5)] * M
    assert_within(to_numpy(out), *expected(x, v, weights, rows, residual=residual))
    out = sq.paramixer(
        *given,
        tuple(map(xp.asarray, weights)),
        pattern="cdil",
        residual=residual,
        circular=False,
        segment_ids=xp.asarray(ids),
    )
    options = {"residual": residual, "circular": False, "segments": ids}
    rows = [cdil(5, m) for m in range(M)]
    assert_within(to_numpy(out), *expected(x, v, weights, rows, **options))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_is_a_product_of_its_values(residual, dtype):
    x, v = rows_of(dtype=dtype)
    weights = weights_of(dtype=dtype)
    out = sq.paramixer(x, v, weights, residual=residual)
    values = sq.factor_values(x, weights)
    np.testing.assert_array_equal(
        out, sq.sparse_factor_product(values, v, residual=residual)
    )
    assert out.dtype == dtype


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("residual", ["none", "step"])
def test_groups_change_nothing(monkeypatch, residual, size):
    x, v = rows_of(bv=(2,))
    weights = weights_of()
    calls = []

    def counted(*arrays):
        calls.append(arrays[1].shape[-3])
        return factor_values(*arrays)

    whole = sq.paramixer(x, v, weights, pattern="cdil", residual=residual)
    from subquad._backends import compiled

    factor_values = compiled.factor_values
    monkeypatch.setattr(compiled, "factor_values", counted)
    set_group(monkeypatch, size)
    out = sq.paramixer(x, v, weights, pattern="cdil", residual=residual)
    assert calls == [size] * (M // size) + [M % size] * (M % size > 0)
    np.testing.assert_array_equal(out, whole)
    # A byte less, and one factor less makes a group.
    monkeypatch.setattr(_paramixer, "_GROUP_BYTES", _paramixer._GROUP_BYTES - 1)
    calls.clear()
    out = sq.paramixer(x, v, weights, pattern="cdil", residual=residual)
    assert calls[0] == max(size - 1, 1)
    np.testing.assert_array_equal(out, whole)


def test_groups_of_the_input_residual(xp, monkeypatch):
    """Where not all factors fit they come one by one, and the input is added here."""
    x, v = rows_of()
    weights = weights_of()
    given = (xp.asarray(x), xp.asarray(v), tuple(map(xp.asarray, weights)))
    truth = expected(x, v, weights, [chord(5)] * M, residual="input")
    for size in (3, 4):
        set_group(monkeypatch, size)
        out = sq.paramixer(*given, residual="input")
        assert_within(to_numpy(out), *truth)


def test_a_group_counts_batches(monkeypatch):
    """Those of the values: rows that are mixed may have more."""
    x, v = rows_of(bx=(3, 1), bv=(7,))
    weights = weights_of(bw=(3, 1))
    call, _, _ = _paramixer.network_arguments(x, weights, v)
    set_group(monkeypatch, 2, batch=3)
    assert _paramixer._group_size(call, M) == 2


def test_nothing():
    x, v = rows_of()
    for residual in RESIDUALS:
        out = sq.paramixer(x, v, weights_of(m=0), residual=residual)
        np.testing.assert_array_equal(out, v)
        assert not np.shares_memory(out, v)
        out = sq.paramixer(x[:0], v[:0], weights_of(), residual=residual)
        assert out.shape == (0, 3)
    stretched = sq.paramixer(np.stack([x, x]), v, weights_of(m=0))
    np.testing.assert_array_equal(stretched, np.stack([v, v]))


def test_types(xp):
    """The result is of the type of v; 16-bit arrays compute in float32."""
    x, v = rows_of(dtype=np.float32)
    weights = weights_of()
    given = [xp.asarray(a) for a in (x, v)]
    out = to_numpy(sq.paramixer(*given, tuple(map(xp.asarray, weights))))
    assert out.dtype == np.float32
    truth, bound = expected(x, v, weights, [chord(5)] * M, residual="step")
    assert_within(out, truth, bound + np.abs(truth).astype(float) * 2.0**-24)
    if xp.name == "array_api_strict":
        return
    half = v.astype(np.float16)
    single = tuple(w.astype(np.float32) for w in weights)
    arrays = [xp.asarray(a) for a in (x, half)]
    out = to_numpy(sq.paramixer(*arrays, tuple(map(xp.asarray, single))))
    assert out.dtype == np.float16
    wide = half.astype(np.float32)
    truth, bound = expected(x, wide, single, [chord(5)] * M, residual="step")
    rounded = np.maximum(np.abs(truth).astype(float) * 2.0**-11, 2.0**-25)
    assert_within(out.astype(float), truth, bound + rounded * (1 + 2.0**-10))


def test_weights_are_those_of_torch_modules():
    """One Linear-GELU-Linear for each factor, and a roll for each link."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    k = len(sq.chord_offsets(N))
    m = k - 1
    networks = [
        torch.nn.Sequential(
            torch.nn.Linear(D, H), torch.nn.GELU(), torch.nn.Linear(H, k)
        ).double()
        for _ in range(m)
    ]
    x, v = (torch.from_numpy(a).requires_grad_() for a in rows_of())
    y = v
    for network in networks:
        values = network(x)
        y = y + sum(
            values[:, link, None] * torch.roll(y, -offset, 0)
            for link, offset in enumerate(chord(k))
        )
    weights = sq.FactorWeights(
        *(
            torch.stack([getattr(network[place], name) for network in networks])
            for place, name in (
                (0, "weight"),
                (0, "bias"),
                (2, "weight"),
                (2, "bias"),
            )
        )
    )
    out = sq.paramixer(x, v, weights)
    # Far above the roundings of 5 factors of 6 links, of values of size 1.
    scale = y.detach().abs().max().item()
    torch.testing.assert_close(out, y, rtol=0, atol=1e-12 * scale)
    parameters = [p for network in networks for p in network.parameters()]
    grad = torch.from_numpy(np.random.default_rng(2).standard_normal(y.shape))
    expected = torch.autograd.grad(y, [x, v, *parameters], grad)
    found = torch.autograd.grad(out, [x, v, *parameters], grad)
    for a, b in zip(found, expected, strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_gradients_in_groups(monkeypatch, residual):
    torch = pytest.importorskip("torch")
    x, v = rows_of()
    arrays = [torch.from_numpy(a).requires_grad_() for a in (x, v, *weights_of())]

    def gradients(**options):
        out = sq.paramixer(*arrays[:2], arrays[2:], residual=residual, **options)
        return torch.autograd.grad(out.square().sum(), arrays)

    whole = gradients()
    for size in (1, 3):
        set_group(monkeypatch, size)
        for recompute in (False, True):
            parts = gradients(recompute=recompute)
            for a, b in zip(parts, whole, strict=True):
                scale = b.abs().max().item()
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * scale)


def test_gradients_in_jax():
    """Of the same numbers as torch's, through jit."""
    torch = pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    x, v = rows_of()
    given = (x, v, *weights_of())
    arrays = [torch.from_numpy(a).requires_grad_() for a in given]
    out = sq.paramixer(*arrays[:2], arrays[2:]).square().sum()
    expected = torch.autograd.grad(out, arrays)

    def loss(x, v, *weights):
        return (sq.paramixer(x, v, weights) ** 2).sum()

    found = jax.jit(jax.grad(loss, argnums=tuple(range(6))))(
        *map(jax.numpy.array, given)
    )
    for a, b in zip(found, expected, strict=True):
        scale = b.abs().max().item()
        np.testing.assert_allclose(np.asarray(a), b.numpy(), rtol=0, atol=1e-12 * scale)
