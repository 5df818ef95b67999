"""Embeddings on a GPU: one epoch, and the whole fit of a graph, beside torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks import cuda, embedding
from benchmarks.factors import _csr
from benchmarks.gpu import Call, Problem, finish, host, limits, summary
from benchmarks.registry import Case, Check, Options, register

ROUNDS = 5
# Rows, their dimensions and components; the last ones are more than caches hold.
_SIZES = ((20703, 32, 1), (262144, 32, 1), (262144, 128, 1), (262144, 128, 8))
_NODES = (30000, 200000)


def _on_host(check: Callable[[Any], Check]) -> Callable[[Any], Check]:
    def checked(result: Any) -> Check:
        if isinstance(result, tuple):
            return check(tuple(host(a) for a in result))
        return check(host(result))

    return checked


# -------- one epoch


def _step(arrays: Any) -> Call:
    """Return the call of the primitive on arrays of any library."""
    from subquad import _dispatch

    matrix, x, rows, components = arrays
    backend: Any = _dispatch.backend_for(x=x)
    return lambda: backend.embedding_step(
        x, matrix, rows, 1.0, components, None, None, embedding._STEP
    )


def _step_cupy(place: cuda.Place) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        cupy = place.cupy()
        matrix, x, rows, components = arrays

        def moved(group: Any) -> Any:
            return group and tuple(cupy.from_dlpack(a) for a in group)

        return _step((moved(matrix), *moved((x, rows)), moved(components)))

    return setup


def _step_torch(place: cuda.Place) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        torch = place.torch()
        parts, x, rows, components = arrays
        matrix = None
        if parts is not None:
            data, indices, indptr = parts
            shape = (len(indptr) - 1, len(rows))
            matrix = _csr(torch, indptr, indices, data, shape)
        return lambda: embedding.torch_step(torch, x, matrix, rows, components)

    return setup


@register("gpu_embedding_step", summary=summary, rounds=ROUNDS)
def embedding_step(options: Options) -> Iterable[Case]:
    """On a GPU: one epoch of rows on the sphere, float32: torch."""
    place = options.device

    def cases() -> Iterator[Case]:
        sizes = [(s.n, s.d or 128, 1) for s in options.sizes] or _SIZES
        for n, d, k in sizes:
            # The products before the last of a walk come as rows without a matrix.
            for has_matrix in (True, False) if k == 1 else (True,):
                e = embedding._Epoch(n, d, k, has_matrix=has_matrix)

                def make(e: Any = e) -> Any:
                    parts = None
                    if e.has_matrix:
                        a = e.matrix
                        parts = tuple(
                            place.tensor(part) for part in (a.data, a.indices, a.indptr)
                        )
                    components = tuple(place.tensor(a) for a in e.components)
                    return parts, place.tensor(e.x), place.tensor(e.rows), components

                problem = Problem(place, make)
                nnz = 14.0 * n if has_matrix else 0.0
                components = "" if k == 1 else f" k={k}"
                given = "" if has_matrix else ", rows given"
                yield Case(
                    f"n={n} d={d}{components}{given} float32",
                    [
                        problem.peer("subquad torch", _step),
                        problem.peer("subquad cupy", _step_cupy(place), "cupy"),
                        problem.peer("torch", _step_torch(place)),
                    ],
                    _on_host(lambda result, e=e: e.check(result)),
                    # Rows that are gathered; what comes from the cache is quicker.
                    limit=limits(
                        place,
                        flops=2.0 * n * k * d**2,
                        moved=nnz * (8 + 4.0 * d) + (8.0 if nnz else 12.0) * n * d,
                    ),
                    overlap=True,
                    values={"n": n, "d": d, "k": k},
                )

    return finish(place, cases())


# -------- whole fits


def _fit_ours(
    f: embedding._Fit, chain_of: Callable[[Any], Any]
) -> Callable[[Any], Call]:
    def setup(start: Any) -> Call:
        from subquad.embedding import EDRep

        model = EDRep(
            embedding.DIM,
            max_iter=embedding.EPOCHS,
            learning_rate=embedding.RATE,
            init=start,
        )
        chain = chain_of(f.walk)
        return lambda: model.fit_transform(chain)

    return setup


def _chain(walk: Any) -> Any:
    import subquad

    return subquad.OperatorChain(
        [walk] * embedding.LENGTH, mean_of_partial_products=True
    )


def _fit_cupy(place: cuda.Place, f: embedding._Fit) -> Callable[[Any], Call]:
    def setup(start: Any) -> Call:
        cupy = place.cupy()
        import cupyx.scipy.sparse

        def on_device(walk: Any) -> Any:
            return _chain(cupyx.scipy.sparse.csr_matrix(walk))

        return _fit_ours(f, on_device)(cupy.from_dlpack(start))

    return setup


def _fit_torch(place: cuda.Place, f: embedding._Fit) -> Callable[[Any], Call]:
    """Run the same algorithm in a few lines of torch."""

    def setup(start: Any) -> Call:
        torch = place.torch()
        parts = (f.walk.indptr, f.walk.indices, f.walk.data)
        walk = _csr(torch, *(place.tensor(a) for a in parts), f.walk.shape)

        def call() -> Any:
            x = start
            for epoch in range(embedding.EPOCHS):
                step = embedding.RATE * (1 - epoch / embedding.EPOCHS)
                pull = walk @ x
                for _ in range(embedding.LENGTH - 1):
                    pull = walk @ (pull + x)
                mean = x.mean(dim=0)
                covariance = x.T @ x / len(x) - torch.outer(mean, mean)
                gradient = x @ covariance + 2 * mean - pull / embedding.LENGTH
                gradient -= (gradient * x).sum(dim=1, keepdim=True) * x
                gradient = torch.nn.functional.normalize(gradient, dim=1)
                x = math.sqrt(1 - step**2) * x - step * gradient
            return x

        return call

    return setup


@register("gpu_edrep", summary=summary, rounds=ROUNDS)
def edrep(options: Options) -> Iterable[Case]:
    """On a GPU: the whole embedding of a graph, float32: torch."""
    place = options.device

    def cases() -> Iterator[Case]:
        for n in tuple(s.n for s in options.sizes) or _NODES:
            f = embedding._Fit(n)
            problem = Problem(place, lambda f=f: place.tensor(f.start))
            yield Case(
                f"n={n} d={embedding.DIM} L={embedding.LENGTH} T={embedding.EPOCHS}",
                [
                    problem.peer("subquad cupy", _fit_cupy(place, f), "cupy"),
                    problem.peer("subquad torch", _fit_ours(f, _chain)),
                    problem.peer("torch", _fit_torch(place, f)),
                ],
                _on_host(lambda result, f=f: f.check(result)),
                values={"n": n},
            )

    return finish(place, cases())
