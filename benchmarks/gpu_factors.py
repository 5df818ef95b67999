"""Sparse factors on a GPU, beside torch.roll compiled, torch's networks, and a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from benchmarks import cuda, factors
from benchmarks.gpu import (
    EPS32,
    IN_TF32,
    IN_THREE_TERMS,
    Allowance,
    Call,
    Problem,
    finish,
    host,
    limits,
    some_rows,
    summary,
)
from benchmarks.registry import Case, Check, Options, Skip, register

ROUNDS = 5
_SIZES = (4096, 16384)
_BATCH = 4
_D = 64


def _sizes_of(options: Options) -> list[tuple[int, int]]:
    """Return rows and channels to run."""
    return [(s.n, s.d or _D) for s in options.sizes] or [(n, _D) for n in _SIZES]


def _copy(arrays: Any) -> Call:
    return lambda: arrays[1].clone()


def _is_copy(result: Any) -> Check:
    del result
    return Check(0.0, 0.0, "a copy of the rows")


# -------- products


def _chain_problem(place: cuda.Place, chain: Any) -> Problem:
    """Make values, x and a gradient."""

    def make() -> Any:
        return tuple(place.tensor(a) for a in (chain.values, chain.x, chain.grad))

    return Problem(place, make)


def _checked(check: Callable[[Any], Check]) -> Callable[[Any], Check]:
    """Compare on the host."""

    def on_host(result: Any) -> Check:
        arrays = [host(a) for a in (result if isinstance(result, tuple) else (result,))]
        return check(arrays if isinstance(result, tuple) else arrays[0])

    return on_host


def _inference(place: cuda.Place, formula: Callable[..., Any]) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        torch = place.torch()
        values, x, _ = arrays

        def call() -> Any:
            with torch.no_grad():
                return formula(torch, values, x)

        return call

    return setup


def _training(place: cuda.Place, formula: Callable[..., Any]) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        torch = place.torch()
        leaves = [a.clone().requires_grad_() for a in arrays[:2]]

        def call() -> Any:
            y = formula(torch, *leaves)
            return torch.autograd.grad(y, leaves, arrays[2])

        return call

    return setup


def _compiled(
    chain: Any, run: Callable[[Callable[..., Any]], Callable[[Any], Call]]
) -> Callable[[Any], Call]:
    """Compile when the peer is set up, before anything is timed."""

    def setup(arrays: Any) -> Call:
        if not arrays[1].is_cuda:
            raise Skip("not compiled for the CPU in the place of a device")
        call = run(chain.compiled())(arrays)
        call()
        return call

    return setup


def _product_cases(options: Options, *, training: bool) -> Iterator[Case]:
    place = options.device
    for n, d in _sizes_of(options):
        for pattern in ("chord", "cdil"):
            for batch in (_BATCH, 1):
                c = factors._Chain(pattern, batch, n, d)
                problem = _chain_problem(place, c)

                def run(
                    formula: Callable[..., Any], place: cuda.Place = place
                ) -> Callable[[Any], Call]:
                    return (_training if training else _inference)(place, formula)

                peers = [problem.peer("subquad torch", run(c.ours))]
                peers.append(problem.peer("torch.compile roll", _compiled(c, run)))
                peers.append(problem.peer("torch roll", run(c.rolled)))
                if not training:
                    peers.append(problem.peer("copy", _copy, check=_is_copy))
                moved = c.kept_bytes + c.reverse_bytes if training else c.fused_bytes
                yield Case(
                    c.name,
                    peers,
                    _checked(c.check_training if training else c.check),
                    limit=limits(place, moved=moved),
                    overlap=True,
                    work=(3 if training else 1) * c.flops,
                    values=c.values_of_case(),
                )


@register("gpu_sparse_factor_product", summary=summary, rounds=ROUNDS)
def sparse_factor_product(options: Options) -> Iterable[Case]:
    """On a GPU: products of sparse factors, float32: torch.roll, compiled, a copy."""
    return finish(options.device, _product_cases(options, training=False))


@register("gpu_sparse_factor_product_training", summary=summary, rounds=ROUNDS)
def sparse_factor_product_training(options: Options) -> Iterable[Case]:
    """On a GPU: products of sparse factors forward and in reverse, float32."""
    return finish(options.device, _product_cases(options, training=True))


# -------- networks of values


def _values_ours(arrays: Any) -> Call:
    import subquad

    return lambda: subquad.factor_values(arrays[0], tuple(arrays[1:]))


def _values_torch(place: cuda.Place, rounded: bool) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        torch = place.torch()

        def call() -> Any:
            with cuda.tf32(torch, rounded), torch.no_grad():
                return factors._separate(torch, arrays[0], arrays[1:])

        return call

    return setup


def _check_values(p: Any, allowed: Allowance) -> Callable[[Any], Check]:
    """Compare some rows of the last sequence."""

    def check(result: Any) -> Check:
        rows = some_rows(p.x_shape[1])
        truth = factors._true_values(p.x[-1, rows], p.weights)
        found = (
            np.stack([host(a[-1])[rows] for a in result])
            if isinstance(result, list)
            else host(result[-1])[:, rows]
        )
        error = float(np.abs(found - truth).max())
        inner, outer = (
            float(np.linalg.norm(p.weights[i], axis=-1).max()) for i in (0, 2)
        )
        d, h = p.x.shape[-1], p.h
        size = inner * float(np.linalg.norm(p.x[-1, rows], axis=-1).max())
        # What the hidden layer is wrong by, as the second one passes it on, and its
        # own product.
        norms = outer * math.sqrt(h) * (1 + size)
        return Check(error, 16 * EPS32 * norms + allowed.error(d + h, norms, size))

    return check


@register("gpu_factor_values", summary=summary, rounds=ROUNDS)
def factor_values(options: Options) -> Iterable[Case]:
    """On a GPU: values of factors, float32: torch's separate networks."""
    place = options.device

    def cases() -> Iterator[Case]:
        for n, d in _sizes_of(options):
            p = factors._Networks("chord", _BATCH, n, d)
            problem = Problem(
                place, lambda p=p: tuple(place.tensor(a) for a in (p.x, *p.weights))
            )
            moved = 4.0 * (math.prod(p.x_shape) + math.prod(p.shape))
            yield Case(
                p.name,
                [
                    problem.peer("subquad torch", _values_ours),
                    problem.peer("torch networks", _values_torch(place, False)),
                    problem.peer(
                        "torch networks, TF32 factors",
                        _values_torch(place, True),
                        check=_check_values(p, IN_TF32),
                    ),
                ],
                _check_values(p, IN_THREE_TERMS),
                limit=limits(place, flops=p.flops, moved=moved),
                overlap=True,
                work=p.flops,
                values={"n": n, "d": d, "batch": _BATCH},
            )

    return finish(place, cases())


# -------- compressed rows


def _csr_ours(arrays: Any) -> Call:
    import subquad

    data, indices, indptr, x = arrays
    return lambda: subquad.csr_product(data, indices, indptr, x)


def _csr_torch(place: cuda.Place) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        data, indices, indptr, x = arrays
        n = len(indptr) - 1
        matrix = factors._csr(place.torch(), indptr, indices, data, (n, len(x)))
        return lambda: matrix @ x

    return setup


def _csr_cupy(place: cuda.Place) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        cupy = place.cupy()
        import cupyx.scipy.sparse

        data, indices, indptr, x = (cupy.from_dlpack(a) for a in arrays)
        shape = (len(indptr) - 1, len(x))
        matrix = cupyx.scipy.sparse.csr_matrix((data, indices, indptr), shape)
        return lambda: matrix @ x

    return setup


@register("gpu_csr_product", summary=summary, rounds=ROUNDS)
def csr_product(options: Options) -> Iterable[Case]:
    """On a GPU: a sparse matrix times dense rows, float32: torch, CuPy."""
    place = options.device

    def cases() -> Iterator[Case]:
        for n in tuple(s.n for s in options.sizes) or (32768, 524288):
            # Drawn when a peer needs it: the cases alone are listed at once.
            walks: list[Any] = []
            for d in (32, 128):

                def walk(n: int = n, d: int = d, walks: list[Any] = walks) -> Any:
                    if not walks:
                        walks.append(factors.random_graph(n))
                    return factors._Walk(walks[0], d)

                def make(walk: Callable[[], Any] = walk) -> Any:
                    w = walk()
                    a = w.matrix
                    parts = (a.data, a.indices, a.indptr, w.x)
                    return tuple(place.tensor(part) for part in parts)

                problem = Problem(place, make)
                nnz = 14.0 * n
                yield Case(
                    f"n={n} d={d} float32",
                    [
                        problem.peer("subquad torch", _csr_ours),
                        problem.peer("torch CSR", _csr_torch(place)),
                        problem.peer("cupy CSR", _csr_cupy(place), "cupy"),
                    ],
                    lambda result, walk=walk: walk().check(host(result)),
                    # Rows that are gathered; what comes from the cache is quicker.
                    limit=limits(place, moved=nnz * (8 + 4.0 * d) + 4.0 * n * d),
                    overlap=True,
                    values={"n": n, "d": d},
                )

    return finish(place, cases())
