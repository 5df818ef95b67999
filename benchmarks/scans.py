"""Scans: log-cumulative sums, their reverse, and log-linear recurrences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks.machine import seconds
from benchmarks.registry import Case, Check, Options, Peer, register

# Shape, axis, and whether the array is larger than any cache.
_SHAPES = (
    ((64, 4096), -1, False),
    ((4096, 64), 0, False),
    ((1, 1_000_000), -1, False),
    ((4096, 16384), -1, True),
    ((1, 1 << 26), -1, True),
)


def _name(shape: tuple[int, ...], axis: int) -> str:
    return f"{'x'.join(map(str, shape))} axis {axis} float32"


def _truth(x: Any, axis: int) -> Any:
    """Return the running log-sum-exp in float64, where x has no large spread."""
    wide = np.moveaxis(x.astype(float), axis, -1)
    top = wide.max(axis=-1, keepdims=True)
    return np.moveaxis(np.log(np.cumsum(np.exp(wide - top), axis=-1)) + top, -1, axis)


def _rows(x: Any, axis: int, count: int = 4) -> Any:
    """Return a few lanes of an array, and the last million entries of long ones."""
    lanes = np.moveaxis(np.asarray(x), axis, -1)
    return lanes[:count]


def _check_scan(x: Any, axis: int) -> Callable[[Any], Check]:
    def check(result: Any) -> Check:
        truth = _truth(_rows(x, axis), -1)
        error = np.abs(_rows(np.asarray(result, float), axis) - truth)
        ulp = np.spacing(np.maximum(np.abs(truth), 16.0).astype(np.float32))
        return Check(float((error / ulp).max()), 2.0, "in ulp of max(|y|, 16)")

    return check


def _subquad(x: Any, axis: int) -> Callable[[], Any]:
    """The kernel on outputs that were touched before, as torch's out= is."""
    from subquad import _core

    axis %= x.ndim
    out = np.zeros_like(x)
    lanes = x.size // x.shape[axis]
    size = _core.logcumsumexp_workspace(lanes, x.shape[axis], x.itemsize, 0)
    scratch = np.zeros(size, np.uint8)

    def call() -> Any:
        _core.logcumsumexp(
            x, None, None, None, axis, False, False, out, None, None, scratch, 0
        )
        return out

    return call


def _torch(x: Any, axis: int) -> Callable[[], Any]:
    import torch

    a = torch.from_numpy(x)
    out = torch.zeros_like(a)

    def call() -> Any:
        torch.logcumsumexp(a, axis, out=out)
        return out.numpy()

    return call


def _jax_cumlogsumexp(x: Any, axis: int) -> Callable[[], Any]:
    import jax

    a = jax.numpy.asarray(x)
    function = jax.jit(lambda a: jax.lax.cumlogsumexp(a, axis=axis % x.ndim))
    return lambda: np.asarray(function(a).block_until_ready())


def _jax_associative(x: Any, axis: int) -> Callable[[], Any]:
    import jax

    a = jax.numpy.asarray(x)
    function = jax.jit(
        lambda a: jax.lax.associative_scan(jax.numpy.logaddexp, a, axis=axis % x.ndim)
    )
    return lambda: np.asarray(function(a).block_until_ready())


def _numpy(x: Any, axis: int) -> Callable[[], Any]:
    out = np.zeros_like(x)
    return lambda: np.logaddexp.accumulate(x, axis=axis, out=out)


def _copy(x: Any) -> Callable[[], Any]:
    """What every scan must do at least; torch's is threaded."""
    import torch

    a = torch.from_numpy(x)
    out = torch.zeros_like(a)

    def call() -> Any:
        out.copy_(a)
        return out

    return call


def _is_copy(x: Any) -> Callable[[Any], Check]:
    return lambda result: Check(float(np.abs(result.numpy() - x).max()), 0.0, "a copy")


def _is_loose(check: Callable[[Any], Check], note: str) -> Callable[[Any], Check]:
    """Let a peer of lower accuracy be timed, and say how far off it is."""

    def loose(result: Any) -> Check:
        found = check(result)
        return Check(found.error, math.inf, note)

    return loose


def _cases(options: Options) -> Iterable[tuple[tuple[int, ...], int, bool]]:
    del options
    return _SHAPES


@register("logcumsumexp")
def logcumsumexp(options: Options) -> Iterable[Case]:
    """Log-cumulative sums, float32, warm outputs: torch, JAX, NumPy, and a copy."""
    for shape, axis, is_large in _cases(options):
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        check = _check_scan(x, axis)
        peers = [
            Peer("subquad", lambda x=x, axis=axis: _subquad(x, axis)),
            Peer("copy", lambda x=x: _copy(x), check=_is_copy(x), limit={}),
            Peer("torch", lambda x=x, axis=axis: _torch(x, axis)),
        ]
        if not is_large:
            loose = _is_loose(check, "in ulp of max(|y|, 16); not held to 2")
            peers += [
                Peer(
                    "jax associative_scan",
                    lambda x=x, axis=axis: _jax_associative(x, axis),
                    check=loose,
                ),
                Peer(
                    "numpy logaddexp.accumulate",
                    lambda x=x, axis=axis: _numpy(x, axis),
                    check=loose,
                ),
            ]
        if shape == (64, 4096):
            peers.append(
                Peer(
                    "jax cumlogsumexp",
                    lambda x=x, axis=axis: _jax_cumlogsumexp(x, axis),
                    check=loose,
                )
            )
        yield Case(
            _name(shape, axis),
            peers,
            check,
            # One exponential in, one logarithm out, which takes about as long.
            limit={"exp and log": seconds(2.0 * x.size, options.rates.exp(4))},
            values={"shape": list(shape), "axis": axis, "elements": x.size},
        )


def _subquad_vjp(x: Any, axis: int, grad: Any) -> Callable[[], Any]:
    from subquad import _core

    axis %= x.ndim
    out = np.zeros_like(x)
    lanes = x.size // x.shape[axis]
    size = _core.logcumsumexp_vjp_workspace(lanes, x.shape[axis], x.itemsize, 0)
    scratch = np.zeros(size, np.uint8)

    def call() -> Any:
        _core.logcumsumexp_vjp(
            x, None, None, None, axis, False, False, grad, None, out, None, scratch, 0
        )
        return out

    return call


def _torch_vjp(x: Any, axis: int, grad: Any) -> Callable[[], Any]:
    """The reverse alone: the forward is kept."""
    import torch

    a = torch.from_numpy(x).requires_grad_()
    g = torch.from_numpy(grad)
    y = torch.logcumsumexp(a, axis)
    return lambda: torch.autograd.grad(y, a, g, retain_graph=True)[0].numpy()


def _check_vjp(x: Any, axis: int, grad: Any) -> Callable[[Any], Check]:
    def check(result: Any) -> Check:
        rows = _rows(x, axis).astype(float)
        y = _truth(rows, -1)
        weighted = _rows(grad, axis).astype(float) * np.exp(-y)
        tail = np.cumsum(weighted[:, ::-1], axis=-1)[:, ::-1]
        truth = np.exp(rows) * tail
        error = np.abs(_rows(np.asarray(result, float), axis) - truth).max()
        return Check(float(error / np.abs(truth).max()), 2e-6, "of the largest")

    return check


@register("logcumsumexp_vjp")
def logcumsumexp_vjp(options: Options) -> Iterable[Case]:
    """The reverse of log-cumulative sums, float32: torch's reverse alone."""
    for shape, axis, is_large in _cases(options):
        if is_large:
            continue
        generator = np.random.default_rng(0)
        x = generator.standard_normal(shape, np.float32)
        grad = generator.standard_normal(shape, np.float32)
        yield Case(
            _name(shape, axis),
            [
                Peer("subquad", lambda x=x, a=axis, g=grad: _subquad_vjp(x, a, g)),
                Peer(
                    "torch",
                    lambda x=x, a=axis, g=grad: _torch_vjp(x, a, g),
                    check=_is_loose(_check_vjp(x, axis, grad), "not held to 2e-6"),
                ),
            ],
            _check_vjp(x, axis, grad),
            # The states of the blocks, and the entries again.
            limit={"exp": seconds(2.0 * x.size, options.rates.exp(4))},
            values={"shape": list(shape), "axis": axis, "elements": x.size},
        )


def _recurrence_truth(log_a: Any, log_b: Any) -> Any:
    log_h = np.full(log_a.shape[0], -np.inf)
    out = np.empty(log_a.shape)
    for t in range(log_a.shape[1]):
        log_h = np.logaddexp(log_h + log_a[:, t], log_b[:, t])
        out[:, t] = log_h
    return out


def _jax_recurrence(log_a: Any, log_b: Any) -> Callable[[], Any]:
    import jax

    def combine(left: Any, right: Any) -> Any:
        return left[0] + right[0], jax.numpy.logaddexp(left[1] + right[0], right[1])

    function = jax.jit(
        lambda a, b: jax.lax.associative_scan(combine, (a, b), axis=1)[1]
    )
    a, b = jax.numpy.asarray(log_a), jax.numpy.asarray(log_b)
    return lambda: np.asarray(function(a, b).block_until_ready())


def _torch_heinsen(log_a: Any, log_b: Any) -> Callable[[], Any]:
    """The published formula: A + logcumsumexp(log b - A), A the sum of log a."""
    import torch

    a, b = torch.from_numpy(log_a), torch.from_numpy(log_b)

    def call() -> Any:
        total = torch.cumsum(a, 1)
        return (total + torch.logcumsumexp(b - total, 1)).numpy()

    return call


@register("log_linear_recurrence")
def log_linear_recurrence(options: Options) -> Iterable[Case]:
    """Recurrences in logarithms, float32: Heinsen's formula in torch, JAX's scan."""
    import subquad

    for shape in ((64, 4096), (1, 1_000_000)):
        generator = np.random.default_rng(0)
        gates = generator.standard_normal(shape) + 4
        log_a = -np.log1p(np.exp(-gates)).astype(np.float32)
        log_b = generator.standard_normal(shape, np.float32)
        truth: list[Any] = []

        def check(
            result: Any, truth: Any = truth, a: Any = log_a, b: Any = log_b
        ) -> Check:
            if not truth:
                rows = a[:4, :20000].astype(float), b[:4, :20000].astype(float)
                truth.append(_recurrence_truth(*rows))
            error = np.abs(np.asarray(result, float)[:4, :20000] - truth[0]).max()
            return Check(float(error), 2e-6)

        loose = _is_loose(check, "not held to 2e-6")
        yield Case(
            _name(shape, -1),
            [
                Peer(
                    "subquad",
                    lambda a=log_a, b=log_b: (
                        lambda: subquad.log_linear_recurrence(a, b)
                    ),
                ),
                Peer(
                    "torch, Heinsen's formula",
                    lambda a=log_a, b=log_b: _torch_heinsen(a, b),
                    check=loose,
                ),
                Peer(
                    "jax associative_scan",
                    lambda a=log_a, b=log_b: _jax_recurrence(a, b),
                    check=loose,
                ),
            ],
            check,
            limit={"exp and log": seconds(2.0 * log_a.size, options.rates.exp(8))},
            values={"shape": list(shape), "elements": log_a.size},
        )
