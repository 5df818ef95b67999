"""Scans and attention on a GPU, beside torch and flash-linear-attention, and a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import cuda
from benchmarks.gpu import Call, Problem, finish, host, limits, summary
from benchmarks.registry import Case, Check, Options, Peer, register

ROUNDS = 5
_SHAPES = (((4096, 16384), -1), ((16384, 4096), 0), ((1, 1 << 26), -1))


def _shapes_of(options: Options) -> list[tuple[tuple[int, int], int]]:
    """Return shapes and axes to run; a size of the command line is a shape."""
    if not options.sizes:
        return list(_SHAPES)
    return [((s.n, s.d or 64), axis) for s in options.sizes for axis in (-1, 0)]


def _scan_problem(place: cuda.Place, shape: tuple[int, int]) -> Problem:
    def make() -> Any:
        generator = np.random.default_rng(0)
        return tuple(
            place.tensor(generator.standard_normal(shape, np.float32)) for _ in range(2)
        )

    return Problem(place, make)


def _lanes(array: Any, axis: int) -> Any:
    """Return the first million entries of the first lanes of a tensor."""
    return host((array if axis else array.T)[:4, : 1 << 20])


def _scan_truth(x: Any) -> Any:
    top = x.max(axis=1, keepdims=True)
    return np.log(np.cumsum(np.exp(x - top), axis=1)) + top


def _check_scan(problem: Problem, axis: int) -> Callable[[Any], Check]:
    def check(result: Any) -> Check:
        truth = _scan_truth(_lanes(problem.arrays[0], axis))
        error = np.abs(_lanes(result, axis) - truth)
        ulp = np.spacing(np.maximum(np.abs(truth), 16).astype(np.float32))
        return Check(float((error / ulp).max()), 2.0, "in ulp of max(|y|, 16)")

    return check


def _check_copy(problem: Problem) -> Callable[[Any], Check]:
    return lambda result: Check(
        float((result - problem.arrays[0]).abs().max()), 0.0, "a copy"
    )


def _scan_ours(axis: int) -> Callable[[Any], Call]:
    import subquad

    return lambda arrays: lambda: subquad.logcumsumexp(arrays[0], axis=axis)


def _scan_torch(place: cuda.Place, axis: int) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        torch = place.torch()
        return lambda: torch.logcumsumexp(arrays[0], axis)

    return setup


@register("gpu_logcumsumexp", summary=summary, rounds=ROUNDS)
def logcumsumexp(options: Options) -> Iterable[Case]:
    """On a GPU: log-cumulative sums, float32: torch, and a copy."""
    place = options.device

    def cases() -> Iterator[Case]:
        for shape, axis in _shapes_of(options):
            problem = _scan_problem(place, shape)
            size = float(np.prod(shape))
            yield Case(
                f"{shape[0]}x{shape[1]} axis {axis} float32",
                [
                    problem.peer("subquad torch", _scan_ours(axis)),
                    problem.peer("torch", _scan_torch(place, axis)),
                    problem.peer(
                        "copy",
                        lambda arrays: lambda: arrays[0].clone(),
                        check=_check_copy(problem),
                    ),
                ],
                _check_scan(problem, axis),
                limit=limits(place, moved=8.0 * size, exps=2.0 * size),
                overlap=True,
                values={"shape": list(shape), "axis": axis},
            )

    return finish(place, cases())


def _check_gradient(problem: Problem, axis: int) -> Callable[[Any], Check]:
    def check(result: Any) -> Check:
        x, grad = problem.arrays
        x, grad = (a[:, : 1 << 16] if axis else a[: 1 << 16].T for a in (x, grad))
        x, grad = host(x[:4]), host(grad[:4])
        if problem.arrays[0].shape[axis] > x.shape[1]:
            return Check(0.0, 0.0, "not compared: too long")
        tail = np.cumsum((grad * np.exp(-_scan_truth(x)))[:, ::-1], axis=1)[:, ::-1]
        truth = np.exp(x) * tail
        error = np.abs(_lanes(result, axis) - truth).max() / np.abs(truth).max()
        return Check(float(error), 2e-6, "of the largest")

    return check


def _reverse_ours(axis: int) -> Callable[[Any], Call]:
    import subquad

    return lambda arrays: (
        lambda: subquad.vjp.logcumsumexp(arrays[1], arrays[0], axis=axis)[0]
    )


def _reverse_torch(place: cuda.Place, axis: int) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        torch = place.torch()
        leaf = arrays[0].clone().requires_grad_()
        y = torch.logcumsumexp(leaf, axis)
        return lambda: torch.autograd.grad(y, leaf, arrays[1], retain_graph=True)[0]

    return setup


@register("gpu_logcumsumexp_vjp", summary=summary, rounds=ROUNDS)
def logcumsumexp_vjp(options: Options) -> Iterable[Case]:
    """On a GPU: the reverse of log-cumulative sums alone, float32: torch."""
    place = options.device

    def cases() -> Iterator[Case]:
        for shape, axis in _shapes_of(options):
            problem = _scan_problem(place, shape)
            size = float(np.prod(shape))
            yield Case(
                f"{shape[0]}x{shape[1]} axis {axis} float32",
                [
                    problem.peer("subquad torch", _reverse_ours(axis)),
                    problem.peer("torch", _reverse_torch(place, axis)),
                ],
                _check_gradient(problem, axis),
                limit=limits(place, moved=12.0 * size, exps=2.0 * size),
                overlap=True,
                values={"shape": list(shape), "axis": axis},
            )

    return finish(place, cases())


# -------- attention


def _attention_sizes(
    options: Options, default: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int, int]]:
    """Return (heads, n, d) to run; a size of the command line is n and d."""
    found = [(2, size.n, size.d or 64) for size in options.sizes]
    return found or list(default)


def _attention_problem(place: cuda.Place, heads: int, n: int, d: int) -> Problem:
    def make() -> Any:
        generator = np.random.default_rng(0)
        return tuple(
            place.tensor(generator.standard_normal((heads, n, d), np.float32))
            for _ in range(4)
        )

    return Problem(place, make)


def _check_attention(problem: Problem, tolerance: float) -> Callable[[Any], Check]:
    """Compare a few rows of the first head with float64."""

    def check(result: Any) -> Check:
        q, k, v, _ = (host(a[0]) for a in problem.arrays)
        found = host(result[0])
        error = 0.0
        for t in np.linspace(0, len(q) - 1, 8).astype(int):
            score = q[t] + k[: t + 1]
            weight = np.exp(score - score.max()).sum(axis=1)
            y = weight @ v[: t + 1] / weight.sum()
            error = max(error, float(np.abs(found[t] - y).max()))
        return Check(error / float(np.abs(v).max()), tolerance, "of max |v|")

    return check


def _attention_ours(arrays: Any) -> Call:
    import subquad

    q, k, v, _ = arrays
    return lambda: subquad.linear_attention(q, k, v, causal=True)


def _attention_fla(arrays: Any) -> Call:
    """The features themselves, which their values allow here."""
    from fla.ops.linear_attn import chunk_linear_attn

    q, k, v = (a.transpose(0, 1)[None].contiguous() for a in arrays[:3])
    q, k = q.exp(), k.exp()

    def call() -> Any:
        y, _ = chunk_linear_attn(q, k, v, scale=1.0, normalize=True)
        return y[0].transpose(0, 1)

    return call


@register("gpu_causal_attention", summary=summary, rounds=ROUNDS)
def causal_attention(options: Options) -> Iterable[Case]:
    """On a GPU: causal linear attention, float32: flash-linear-attention's chunks."""
    place = options.device

    def cases() -> Iterator[Case]:
        default = (16, 16384, 64), (1, 65536, 64), (64, 1024, 64)
        for heads, n, d in _attention_sizes(options, default):
            problem = _attention_problem(place, heads, n, d)
            work = heads * n * (4.0 * d * d + 64 * 2.0 * d)
            yield Case(
                f"heads={heads} n={n} d={d} float32",
                [
                    problem.peer("subquad torch", _attention_ours),
                    problem.peer(
                        "flash-linear-attention, chunks",
                        _attention_fla,
                        # Its products are in TF32, its features not shifted.
                        check=_check_attention(problem, 1e-2),
                    ),
                ],
                _check_attention(problem, 2e-6),
                limit=limits(
                    place,
                    flops=work,
                    exps=2.0 * heads * n * d,
                    moved=16.0 * heads * n * d,
                ),
                overlap=True,
                work=work,
                values={"heads": heads, "n": n, "d_k": d, "d_v": d},
            )

    return finish(place, cases())


def _reverse_attention_ours(arrays: Any) -> Call:
    import subquad

    q, k, v, grad = arrays
    y = subquad.linear_attention(q, k, v, causal=True)
    return lambda: subquad.vjp.linear_attention(grad, q, k, v, causal=True, out=y)


def _reverse_attention_fla(place: cuda.Place) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        from fla.ops.linear_attn import chunk_linear_attn

        torch = place.torch()
        q, k, v, grad = (a.transpose(0, 1)[None].contiguous() for a in arrays)
        leaves = [a.requires_grad_() for a in (q.exp(), k.exp(), v.clone())]
        y, _ = chunk_linear_attn(*leaves, scale=1.0, normalize=True)
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    return setup


@register("gpu_causal_attention_vjp", summary=summary, rounds=ROUNDS)
def causal_attention_vjp(options: Options) -> Iterable[Case]:
    """On a GPU: the reverse of causal attention alone, float32."""
    place = options.device

    def finite(result: Any) -> Check:
        missing = sum((~a.isfinite()).sum() for a in result[:3])
        return Check(float(missing), 0.0, "only finite")

    def cases() -> Iterator[Case]:
        for heads, n, d in _attention_sizes(options, [(16, 16384, 64)]):
            problem = _attention_problem(place, heads, n, d)
            work = heads * n * (12.0 * d * d + 64 * 5.0 * d)
            yield Case(
                f"heads={heads} n={n} d={d} float32",
                [
                    problem.peer("subquad torch", _reverse_attention_ours),
                    problem.peer(
                        "flash-linear-attention, chunks", _reverse_attention_fla(place)
                    ),
                ],
                finite,
                limit=limits(place, flops=work, moved=36.0 * heads * n * d),
                overlap=True,
                work=work,
                values={"heads": heads, "n": n, "d_k": d, "d_v": d},
            )

    return finish(place, cases())


def _step_ours(arrays: Any) -> Call:
    """Tokens for a batch of states, as decoding does it."""
    import subquad

    q, k, v = (a[:, 0].contiguous() for a in arrays[:3])
    states, d = q.shape
    state = [subquad.AttentionState.init((states,), d, d, like=q)]

    def call() -> Any:
        y, state[0] = state[0].step(q, k, v)
        return y, v

    return call


@register("gpu_attention_step", rounds=ROUNDS)
def attention_step(options: Options) -> Iterable[Case]:
    """On a GPU: one token for a batch of 64 x 64 states."""
    place = options.device

    def check(result: Any) -> Check:
        # Every token of a stream is the same here: so is their mean.
        return Check(float((result[0] - result[1]).abs().max()), 1e-5)

    def cases() -> Iterator[Case]:
        sizes = [(s.n, s.d or 64) for s in options.sizes] or [(512, 64), (4096, 64)]
        for states, d in sizes:
            problem = _attention_problem(place, states, 1, d)
            peers: list[Peer] = [problem.peer("subquad torch", _step_ours)]
            yield Case(f"{states} states", peers, check, values={"states": states})

    return finish(place, cases())
