"""Random features on a GPU, beside torch, the matrix product alone, and a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from benchmarks import cuda
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
    unit_rows,
)
from benchmarks.registry import Case, Check, Options, register

ROUNDS = 5
# Rows, features, dimensions, rows of the factor (0: the form is diagonal), pairs.
_MAPS = (
    (65536, 256, 64, 0, True),
    (65536, 1024, 128, 0, False),
    (65536, 1024, 128, 128, False),
    (16384, 4096, 384, 0, True),
)
_TRANSFORMS = ((65536, 64), (65536, 1024), (16384, 4096), (64, 2**20))


def _maps_of(options: Options) -> list[tuple[int, int, int, int, bool]]:
    """Return what to run; a size of the command line is n and d."""
    if not options.sizes:
        return list(_MAPS)
    found = []
    for size in options.sizes:
        d = size.d or 64
        found += [(size.n, 4 * d, d, 0, True), (size.n, 4 * d, d, d, False)]
    return found


def _map_problem(
    place: cuda.Place, n: int, m: int, d: int, r: int, pairs: bool
) -> Problem:
    """Make x, projection, bias, quadratic, shift, linear and a gradient."""
    rows = m // 2 if pairs else m

    def make() -> Any:
        generator = np.random.default_rng(0)
        normal = lambda *shape: generator.standard_normal(shape, np.float32)  # noqa: E731
        quadratic = np.ones(d, np.float32)
        if r:
            quadratic = normal(r, d) / np.float32(np.sqrt(d))
        arrays = (
            unit_rows(n, d, 1), normal(rows, d), normal(rows), quadratic,
            np.float32(0.1) * normal(d), np.float32(0.1) * normal(d),
            normal(n, m),
        )  # fmt: skip
        return tuple(place.tensor(a) for a in arrays)

    return Problem(place, make)


def _truth(arrays: Any, rows: Any, pairs: bool) -> tuple[Any, Any, float]:
    """Return logarithms and products of some rows in float64, and |z| |projection|."""
    x, projection, bias, quadratic, shift, linear = (host(a) for a in arrays[:6])
    z = x[rows] - shift
    product = z @ projection.T
    form = z**2 @ quadratic if quadratic.ndim == 1 else ((z @ quadratic.T) ** 2).sum(1)
    norms = float(
        np.linalg.norm(z, axis=1).max() * np.linalg.norm(projection, axis=1).max()
    )
    signs = [product, -product] if pairs else [product]
    offset = bias + (z @ linear - form / 2)[:, None]
    return np.concatenate([offset + each for each in signs], axis=1), product, norms


def _check_features(
    problem: Problem, pairs: bool, allowed: Allowance, product_alone: bool = False
) -> Callable[[Any], Check]:
    """Compare some rows with float64."""

    def check(result: Any) -> Check:
        rows = some_rows(len(problem.arrays[0]))
        expected, product, norms = _truth(problem.arrays, rows, pairs)
        if product_alone:
            projection, shift = (host(problem.arrays[i]) for i in (1, 4))
            expected = product + projection @ shift
            norms = 2 * float(np.linalg.norm(projection, axis=1).max())
        size = float(np.abs(expected).max())
        error = float(np.abs(host(result)[rows] - expected).max())
        d = problem.arrays[0].shape[1]
        return Check(
            error, 16 * EPS32 * (1 + size + norms) + allowed.error(d, norms, size)
        )

    return check


def _ours(pairs: bool) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        import subquad

        x, projection, bias, quadratic, shift, linear, _ = arrays
        return lambda: subquad.log_features(
            x, projection, bias, quadratic,
            shift=shift, linear=linear, antithetic=pairs,
        )  # fmt: skip

    return setup


def _by_operators(torch: Any, arrays: Any, pairs: bool) -> Any:
    """Return the logarithms by the operators of torch."""
    x, projection, bias, quadratic, shift, linear = arrays[:6]
    z = x - shift
    form = (
        z * z @ quadratic if quadratic.ndim == 1 else (z @ quadratic.T).square().sum(1)
    )
    product = z @ projection.T
    offset = bias + (z @ linear - form / 2)[:, None]
    if not pairs:
        return offset + product
    return torch.cat([offset + product, offset - product], 1)


def _theirs(place: cuda.Place, pairs: bool, rounded: bool) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        torch = place.torch()

        def call() -> Any:
            with cuda.tf32(torch, rounded):
                return _by_operators(torch, arrays, pairs)

        return call

    return setup


def _product_in_torch(place: cuda.Place, rounded: bool) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        torch = place.torch()
        x, projection = arrays[:2]

        def call() -> Any:
            with cuda.tf32(torch, rounded):
                return x @ projection.T

        return call

    return setup


def _product_in_cupy(place: cuda.Place) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        cupy = place.cupy()
        x, projection = (cupy.from_dlpack(a) for a in arrays[:2])
        return lambda: x @ projection.T

    return setup


@register("gpu_log_features", summary=summary, rounds=ROUNDS)
def log_features(options: Options) -> Iterable[Case]:
    """On a GPU: log-features, float32: torch, and the matrix product alone."""
    place = options.device

    def cases() -> Iterator[Case]:
        for n, m, d, r, pairs in _maps_of(options):
            problem = _map_problem(place, n, m, d, r, pairs)
            rows = m // 2 if pairs else m
            alone = _check_features(problem, pairs, IN_THREE_TERMS, True)
            work = 2.0 * n * d * (rows + r)
            yield Case(
                f"n={n} m={m} d={d} r={r}{' pairs' if pairs else ''} float32",
                [
                    problem.peer("subquad torch", _ours(pairs)),
                    problem.peer("torch", _theirs(place, pairs, False)),
                    problem.peer(
                        "torch, TF32 factors",
                        _theirs(place, pairs, True),
                        # The squares of the form are rounded too.
                        check=_check_features(
                            problem, pairs, Allowance(norms=2.0**-8, size=2.0**-8)
                        ),
                    ),
                    problem.peer(
                        "torch, product alone",
                        _product_in_torch(place, False),
                        check=alone,
                    ),
                    problem.peer(
                        "torch, product alone, TF32 factors",
                        _product_in_torch(place, True),
                        check=_check_features(problem, pairs, IN_TF32, True),
                    ),
                    problem.peer(
                        "cupy, product alone",
                        _product_in_cupy(place),
                        "cupy",
                        check=alone,
                    ),
                ],
                _check_features(problem, pairs, IN_THREE_TERMS),
                limit=limits(place, flops=work, moved=4.0 * (n * d + n * m + m * d)),
                overlap=True,
                work=work,
                values={"n": n, "m": m, "d": d, "r": r, "pairs": pairs},
            )

    return finish(place, cases())


# -------- the reverse


def _check_gradient(problem: Problem, pairs: bool) -> Callable[[Any], Check]:
    """Compare some rows with float64."""

    def check(result: Any) -> Check:
        rows = some_rows(len(problem.arrays[0]))
        x, projection, _, quadratic, shift, linear, grad = (
            host(a[rows]) if i in (0, 6) else host(a)
            for i, a in enumerate(problem.arrays)
        )
        z, total, h = x - shift, grad.sum(axis=1), grad
        size = np.abs(grad).sum(axis=1)
        if pairs:
            h = grad[:, : len(projection)] - grad[:, len(projection) :]
        form = np.diag(quadratic) if quadratic.ndim == 1 else quadratic.T @ quadratic
        expected = h @ projection + total[:, None] * (linear - z @ form)
        norms = float(
            (np.abs(h) @ np.abs(projection)).max()
            + (size[:, None] * (np.abs(linear) + np.abs(z) @ np.abs(form))).max()
        )
        error = float(np.abs(host(result)[rows] - expected).max())
        terms = len(projection) + x.shape[1]
        return Check(error, IN_THREE_TERMS.error(terms, norms))

    return check


def _reverse(
    place: cuda.Place, features: Callable[[Any, Any], Any]
) -> Callable[[Any], Call]:
    """Return the reverse of `features(torch, arrays)` through x alone."""

    def setup(arrays: Any) -> Call:
        torch = place.torch()
        leaf = arrays[0].clone().requires_grad_()
        y = features(torch, (leaf, *arrays[1:]))
        return lambda: torch.autograd.grad(y, leaf, arrays[6], retain_graph=True)[0]

    return setup


@register("gpu_log_features_vjp", summary=summary, rounds=ROUNDS)
def log_features_vjp(options: Options) -> Iterable[Case]:
    """On a GPU: the reverse of log-features alone, through x, float32: torch."""
    place = options.device

    def cases() -> Iterator[Case]:
        for n, m, d, r, pairs in _maps_of(options):
            problem = _map_problem(place, n, m, d, r, pairs)
            rows = m // 2 if pairs else m
            work = 2.0 * n * d * (rows + (d if r else 0))
            yield Case(
                f"n={n} m={m} d={d} r={r}{' pairs' if pairs else ''} float32",
                [
                    problem.peer(
                        "subquad torch",
                        _reverse(place, lambda _, a, pairs=pairs: _ours(pairs)(a)()),
                    ),
                    problem.peer(
                        "torch",
                        _reverse(
                            place,
                            lambda torch, a, pairs=pairs: _by_operators(
                                torch, a, pairs
                            ),
                        ),
                    ),
                ],
                _check_gradient(problem, pairs),
                limit=limits(
                    place, flops=work, moved=4.0 * (2 * n * d + n * m + m * d)
                ),
                overlap=True,
                work=work,
                values={"n": n, "m": m, "d": d, "r": r, "pairs": pairs},
            )

    return finish(place, cases())


# -------- the Walsh-Hadamard transform


def _transforms_of(options: Options) -> list[tuple[int, int]]:
    """Return rows and lengths; one of the command line is cut to a power of two."""
    found = [
        (size.n, 1 << ((size.d or 1024).bit_length() - 1)) for size in options.sizes
    ]
    return found or list(_TRANSFORMS)


def _check_transform(problem: Problem) -> Callable[[Any], Check]:
    """Compare some elements of a row with the sums in float64."""

    def check(result: Any) -> Check:
        x, found = host(problem.arrays[0][-1]), host(result[-1])
        places = np.arange(x.size)
        error = 0.0
        for i in some_rows(x.size, 16):
            common, parity = places & i, np.zeros_like(places)
            while common.any():
                parity ^= common & 1
                common >>= 1
            error = max(error, abs(float(found[i] - x @ (1 - 2 * parity))))
        return Check(error, EPS32 * np.log2(2 * x.size) * float(np.abs(x).sum()))

    return check


def _transform_ours(arrays: Any) -> Call:
    import subquad

    return lambda: subquad.hadamard_transform(arrays[0])


def _transform_theirs(arrays: Any) -> Call:
    """A step of the transform at a time, each over all of memory."""
    (x,) = arrays
    n, d = x.shape

    def call() -> Any:
        y, step = x, 1
        while step < d:
            pairs = y.reshape(n, d // (2 * step), 2, step)
            first, second = pairs[:, :, 0], pairs[:, :, 1]
            both = (first + second, first - second)
            y = x.new_empty(n, d // (2 * step), 2, step)
            y[:, :, 0], y[:, :, 1] = both
            y, step = y.reshape(n, d), 2 * step
        return y

    return call


@register("gpu_hadamard_transform", summary=summary, rounds=ROUNDS)
def hadamard_transform(options: Options) -> Iterable[Case]:
    """On a GPU: the Walsh-Hadamard transform, float32: torch, and a copy."""
    place = options.device

    def cases() -> Iterator[Case]:
        for n, d in _transforms_of(options):
            problem = Problem(
                place, lambda n=n, d=d: (place.tensor(unit_rows(n, d, 3)),)
            )
            yield Case(
                f"{n}x{d} float32",
                [
                    problem.peer("subquad torch", _transform_ours),
                    problem.peer("torch", _transform_theirs),
                    problem.peer(
                        "copy",
                        lambda arrays: lambda: arrays[0].clone(),
                        check=lambda result: Check(0.0, 0.0, "a copy"),
                    ),
                ],
                _check_transform(problem),
                limit=limits(place, moved=8.0 * n * d),
                overlap=True,
                values={"n": n, "d": d},
            )

    return finish(place, cases())
