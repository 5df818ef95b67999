"""Every operation once, on small arrays of odd sizes, for compute-sanitizer.

``compute-sanitizer --tool memcheck python tools/sanitize_cases.py``. The library that
owns the arrays allocates each of them for itself, so that an access beyond one is seen.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

# torch, too, is to ask CUDA for every array.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import numpy as np

Case = tuple[str, Callable[[], Any]]
Move = Callable[[Any], Any]

# Below and above a block of rows, a block of keys and a step of the inner dimension.
SHAPES = ((1, 1, 1), (37, 70, 5), (131, 265, 33), (3, 700, 65), (150, 1, 128))
# n, d, components and labels; the last rows are more than shared memory holds.
EMBEDDINGS = (
    (1, 1, 1, 1),
    (37, 5, 3, 4),
    (131, 33, 2, 0),
    (66, 130, 1, 2),
    (19, 1950, 1, 0),
)
MIXTURES = ((1, 1, 1, 1), (37, 3, 5, 0), (131, 5, 33, 7), (66, 2, 65, 65))


def mover(library: str) -> tuple[Move, Callable[[], None]]:
    """Return what brings NumPy arrays to a library, and what waits for its results."""
    if library == "cupy":
        import cupy

        cupy.cuda.set_allocator(None)
        return cupy.asarray, cupy.cuda.Device().synchronize
    if library == "torch":
        import torch

        return lambda a: torch.from_numpy(a).cuda(), torch.cuda.synchronize
    return np.asarray, lambda: None


def available() -> str:
    """Return the library to use: CuPy starts fewest kernels of its own."""
    try:
        import cupy  # noqa: F401
    except ImportError:
        return "torch"
    return "cupy"


def exact_cases(move: Move) -> Iterator[Case]:
    """The exact sum and its reverse, with every option."""
    import subquad

    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        for n, m, d in SHAPES:

            def draw(*shape: int, dtype: Any = dtype) -> Any:
                return move(rng.standard_normal(shape).astype(dtype))

            x, y, lw, grad = draw(n, d), draw(m, d), draw(m), draw(n)
            index = move(rng.integers(-1, m, n))
            name = f"n={n} m={m} d={d} {np.dtype(dtype).name}"
            options = {"log_weights": lw, "self_index": index, "self_term": "exclude"}
            yield (
                f"log_normalizer {name}",
                lambda x=x, y=y: subquad.log_normalizer(x, y),
            )
            yield (
                f"log_normalizer, options {name}",
                lambda x=x, y=y, o=options: subquad.log_normalizer(x, y, **o),
            )
            yield (
                f"vjp.log_normalizer {name}",
                lambda g=grad, x=x, y=y, o=options: subquad.vjp.log_normalizer(
                    g, x, y, **o
                ),
            )
        x, y = draw(2, 19, 7), draw(3, 1, 23, 7)
        yield (
            f"log_normalizer, batches {np.dtype(dtype).name}",
            lambda x=x, y=y: subquad.log_normalizer(x, y),
        )
        wide, tall = draw(60, 21), draw(9, 90)
        yield (
            f"log_normalizer, strides {np.dtype(dtype).name}",
            lambda x=wide, y=tall: subquad.log_normalizer(x[::3, 1::2][:, :9], y.T),
        )
    half = [move(rng.standard_normal((s, 40)).astype(np.float16)) for s in (70, 130)]
    yield "log_normalizer, float16", lambda: subquad.log_normalizer(*half)
    empty = move(np.zeros((0, 4), np.float32))
    some = move(np.zeros((5, 4), np.float32))
    yield "log_normalizer, no keys", lambda: subquad.log_normalizer(some, empty)


def gaussian_cases(move: Move) -> Iterator[Case]:
    """The mixture of Gaussians and its reverse."""
    import subquad

    rng = np.random.default_rng(1)
    for dtype in (np.float32, np.float64):
        for n, k, d, r in MIXTURES:
            shapes = ((n,), (n, d), (k,), (k, d), (k, d, r))
            grad, *arrays = (
                move(rng.standard_normal(shape).astype(dtype) / 4) for shape in shapes
            )
            diagonal = move(rng.random((k, d)).astype(dtype))
            name = f"n={n} k={k} d={d} r={r} {np.dtype(dtype).name}"
            for options in ({}, {"diagonal": diagonal}):
                kind = "diagonal " if options else ""
                yield (
                    f"gaussian_log_normalizer {kind}{name}",
                    lambda a=arrays, o=options: subquad.gaussian_log_normalizer(
                        *a, **o
                    ),
                )
                yield (
                    f"vjp.gaussian_log_normalizer {kind}{name}",
                    lambda g=grad, a=arrays, o=options: (
                        subquad.vjp.gaussian_log_normalizer(g, *a, **o)
                    ),
                )


def estimator_cases(move: Move) -> Iterator[Case]:
    """What an estimator is fitted with: assignment, sums, scatter, samples."""
    rng = np.random.default_rng(2)
    keys = rng.standard_normal((301, 17))
    index = move(np.arange(37))
    for dtype in (np.float32, np.float64):
        y, x = move(keys.astype(dtype)), move(keys[:37].astype(dtype))
        for kind in ("full", "diag", "low_rank"):
            yield (
                f"GaussianNormalizer {kind} {np.dtype(dtype).name}",
                functools.partial(fit_and_evaluate, y, x, index, kind),
            )


def fit_and_evaluate(y: Any, x: Any, index: Any, kind: Any) -> None:
    """Fit to `y` and evaluate `x`, its first rows, with and without own terms."""
    import subquad

    estimator = subquad.GaussianNormalizer(
        3,
        covariance_type=kind,
        rank=2 if kind == "low_rank" else None,
        control_samples=20,
        max_iter=2,
        random_state=0,
    ).fit(y)
    estimator.log_normalizer(x)
    estimator.log_normalizer(x, self_index=index, self_term="exclude")
    estimator.error_estimate(x)
    estimator.error_bound(x)


def embedding_cases(move: Move) -> Iterator[Case]:
    """A step of an embedding, with a matrix and without one."""
    from subquad import _dispatch

    rng = np.random.default_rng(3)
    for dtype in (np.float32, np.float64):
        for n, d, k, c in EMBEDDINGS:

            def draw(*shape: int, dtype: Any = dtype) -> Any:
                return move(rng.standard_normal(shape).astype(dtype))

            rows = rng.standard_normal((n, d)).astype(dtype)
            x = move(rows / np.linalg.norm(rows, axis=1, keepdims=True))
            backend: Any = _dispatch.backend_for(x=x)
            # One row has more elements than one warp adds up.
            lengths = rng.integers(0, 5, n)
            lengths[n // 2] = 600
            starts = np.concatenate(([0], np.cumsum(lengths)))
            components = (draw(k), draw(k, d), symmetric(draw(k, d, d)))
            own = None
            if c:
                labels = move(rng.integers(0, c, n))
                own = (labels, draw(c, d), symmetric(draw(c, d, d)))
            null = (draw(n), draw(d))
            name = f"embedding_step n={n} d={d} k={k} c={c} {np.dtype(dtype).name}"
            for index in (np.int32, np.int64):
                columns = rng.integers(0, n, starts[-1]).astype(index)
                matrix = draw(len(columns)), move(columns), move(starts.astype(index))
                yield (
                    f"{name} {np.dtype(index).name}",
                    lambda b=backend, x=x, m=matrix, a=components, o=own, f=null: (
                        b.embedding_step(x, m, x, 0.5, a, o, f, 0.5)
                    ),
                )
            yield (
                f"{name}, rows given",
                lambda b=backend, x=x: b.embedding_step(
                    x, None, x, 0.5, None, None, None, 0.5
                ),
            )


def symmetric(a: Any) -> Any:
    """Return the symmetric part of each matrix, in memory of its own."""
    return (a + a.swapaxes(1, 2)) / 2


def main() -> int:
    """Run the cases and name each before it starts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", choices=("cupy", "torch", "numpy"))
    parser.add_argument("--only", default="", help="cases whose name has this")
    options = parser.parse_args()
    move, wait = mover(options.library or available())
    count = 0
    for cases in (exact_cases, gaussian_cases, estimator_cases, embedding_cases):
        for name, call in cases(move):
            if options.only in name:
                print(f"case {name}", flush=True)
                call()
                wait()
                count += 1
    print(f"{count} cases")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
