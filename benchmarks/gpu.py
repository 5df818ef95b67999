"""The same on a GPU, beside torch, CuPy and JAX, and what the card could do at most.

Cases and peers are listed on every machine. Arrays are made when a peer is set up,
which raises `Skip` where there is no GPU: rows without a figure then.

Products in float32 accuracy are counted as the three TF32 products they are made of.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import cuda
from benchmarks.machine import seconds
from benchmarks.registry import Case, Check, Options, Peer, Row, register

Array = Any
Call = Callable[[], Any]

TF32_TERMS = 3
ROUNDS = 5
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float64": 8}
# Of what the tensor cores multiply: how many products, at which rate.
PRODUCTS = {
    "float32": (TF32_TERMS, "tf32"),
    "bfloat16": (1, "bf16"),
    "float64": (1, "float64"),
}
EPS32 = float(np.finfo(np.float32).eps)
EPS64 = float(np.finfo(np.float64).eps)
# Rows of scores at a time, of the peers that need the scores in memory.
TILES = (128, 512, 2048, 8192)


def host(result: Any) -> Any:
    """Return an array of any library as float64 NumPy array."""
    if hasattr(result, "detach"):
        return result.detach().double().cpu().numpy()
    if type(result).__module__.startswith("cupy"):
        return result.get().astype(float)
    return np.asarray(result, float)


def unit_rows(n: int, d: int, seed: int, norm: float = 2.0) -> Any:
    """Return `n` isotropic rows of the given norm, float32, drawn in float32."""
    x = np.random.default_rng(seed).standard_normal((n, d), np.float32)
    x *= np.float32(norm) / np.linalg.norm(x, axis=1, keepdims=True)
    return x


def some_rows(n: int, count: int = 64) -> Any:
    """Return up to `count` row numbers spread over `n`."""
    return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))


def product_seconds(
    place: cuda.Place, dtype: str, flops: float
) -> dict[str, float | None]:
    """Return the time of matrix products on the tensor cores."""
    terms, kind = PRODUCTS[dtype]
    return {"product": seconds(terms * flops, place.rate(kind))}


def bytes_seconds(place: cuda.Place, amount: float) -> dict[str, float | None]:
    """Return the time of `amount` bytes, read or written once."""
    return {"memory": seconds(amount, place.rate("copy"))}


def limits(
    place: cuda.Place,
    dtype: str = "float32",
    *,
    flops: float = 0.0,
    exps: float = 0.0,
    moved: float = 0.0,
) -> dict[str, float | None]:
    """Return the times of the parts; {} where nothing is measured."""
    if not place.measures:
        return {}
    parts = product_seconds(place, dtype, flops) | bytes_seconds(place, moved)
    if exps:
        parts["exp"] = seconds(exps, place.rate("exp"))
    return parts


def split_error(d: int, norms: float) -> float:
    """Bound the error of a product of `d` terms in three TF32 products."""
    return (d + 12) * 2.0**-21 * norms


@dataclasses.dataclass(frozen=True)
class Allowance:
    """What scores may be wrong by, besides the roundings of a float32 product.

    Parts of the error of three TF32 products, of |x| |y|, and of the result.
    """

    split: float = 0.0
    norms: float = 0.0
    size: float = 0.0

    def error(self, d: int, norms: float, size: float = 0.0) -> float:
        """Return the largest error of `d` terms."""
        return (
            self.split * split_error(d, norms) + self.norms * norms + self.size * size
        )


EXACTLY = Allowance()
IN_THREE_TERMS = Allowance(split=1.0)
IN_TF32 = Allowance(norms=2.0**-9)
# Scores and results are rounded.
IN_BFLOAT16 = Allowance(norms=2.0**-8, size=2.0**-8)


class Problem:
    """Arrays that the peers of a case share; the first one makes them."""

    def __init__(self, place: cuda.Place, make: Callable[[], Any]) -> None:
        self.place = place
        self._make = make

    @functools.cached_property
    def arrays(self) -> Any:
        self.place.torch()
        return self._make()

    def peer(
        self,
        name: str,
        setup: Callable[[Any], Call],
        library: str = "torch",
        check: Callable[[Any], Check] | None = None,
        **options: Any,
    ) -> Peer:
        return Peer(
            name,
            lambda: setup(self.arrays),
            check=check,
            timer=self.place.timer(library),
            **options,
        )


def finish(place: cuda.Place, cases: Iterable[Case]) -> Iterator[Case]:
    """Give a case's memory back before the next."""
    for case in cases:
        yield case
        del case
        place.release()


def sizes_of(
    options: Options, default: Sequence[tuple[int, int, int, str]]
) -> list[tuple[int, int, int, str]]:
    """Return (n, m, d, dtype) to run; sizes of the command line stand for n and m."""
    if not options.sizes:
        return list(default)
    found = [
        (size.n, size.n, size.d or d, dtype)
        for size in options.sizes
        for _, _, d, dtype in default
    ]
    return list(dict.fromkeys(found))


# -------- exact sums


def _truth(torch: Any, x: Array, y: Array) -> Array:
    """Return log sum_j exp(x_i . y_j) in float64, rows in tiles."""
    tile = max(1, 2**27 // max(1, len(y)))
    y = y.double()
    return torch.cat(
        [
            torch.logsumexp(x[start : start + tile].double() @ y.T, 1)
            for start in range(0, len(x), tile)
        ]
    )


def check_exact(
    place: cuda.Place,
    problem: Problem,
    dtype: str,
    allowed: Allowance,
) -> Callable[[Any], Check]:
    """Compare some rows with float64."""
    truth: list[Any] = []
    eps = EPS64 if dtype == "float64" else EPS32

    def check(result: Any) -> Check:
        x, y = problem.arrays
        rows = some_rows(len(x))
        if not truth:
            chosen = x[place.tensor(rows)]
            norms = float(chosen.double().norm(dim=1).max()) * float(
                y.double().norm(dim=1).max()
            )
            truth.extend([host(_truth(place.torch(), chosen, y)), norms])
        expected, norms = truth
        error = float(np.abs(host(result)[rows] - expected).max())
        size = float(np.abs(expected).max())
        rounding = 16 * eps * (1.0 + size + norms)
        return Check(error, rounding + allowed.error(x.shape[1], norms, size))

    return check


def _tiles(place: cuda.Place, n: int, m: int, itemsize: int) -> list[int]:
    """Return the numbers of rows whose scores, and two copies of them, fit."""
    fit = [
        tile
        for tile in dict.fromkeys((*TILES, n))
        if tile <= n and 3.0 * tile * m * itemsize < 0.5 * place.free_memory()
    ]
    return fit or [min(n, TILES[0])]


def _best_tile(
    place: cuda.Place,
    library: str,
    run: Callable[[int, int], Any],
    n: int,
    tiles: Sequence[int],
) -> int:
    """Return the tile of the shortest time a row, from a few tiles of each."""
    timer = place.timer(library)
    if timer is None:
        return tiles[-1]

    def probe(tile: int) -> float:
        rows = min(n, 4 * tile)
        run(tile, rows)
        assert timer is not None
        return timer(lambda: run(tile, rows), 1) / rows

    return min(tiles, key=probe)


def _exact_ours(arrays: Any) -> Call:
    import subquad

    x, y = arrays
    return lambda: subquad.log_normalizer(x, y)


def _exact_torch(
    place: cuda.Place, chosen: dict[str, int], name: str, *, rounded: bool = False
) -> Callable[[Any], Call]:
    """`torch.logsumexp(x @ y.T, 1)` in the tile of rows that is quickest."""

    def setup(arrays: Any) -> Call:
        torch = place.torch()
        x, y = arrays
        n, m = len(x), len(y)
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        out = torch.empty(n, dtype=exact, device=x.device)

        def run(tile: int, rows: int) -> Any:
            with cuda.tf32(torch, rounded):
                for start in range(0, rows, tile):
                    score = x[start : min(start + tile, rows)] @ y.T
                    out[start : start + len(score)] = torch.logsumexp(score, 1)
            return out

        tile = _best_tile(place, "torch", run, n, _tiles(place, n, m, x.element_size()))
        chosen[name] = tile
        return lambda: run(tile, n)

    return setup


def _exact_cupy(
    place: cuda.Place, chosen: dict[str, int], name: str
) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        cupy = place.cupy()
        x, y = (cupy.from_dlpack(a) for a in arrays)
        n, m = len(x), len(y)
        out = cupy.empty(n, x.dtype)

        def run(tile: int, rows: int) -> Any:
            for start in range(0, rows, tile):
                score = x[start : min(start + tile, rows)] @ y.T
                top = score.max(axis=1)
                score -= top[:, None]
                cupy.exp(score, out=score)
                out[start : start + len(score)] = cupy.log(score.sum(axis=1)) + top
            return out

        tile = _best_tile(place, "cupy", run, n, _tiles(place, n, m, x.itemsize))
        chosen[name] = tile
        return lambda: run(tile, n)

    return setup


def _exact_jax(
    place: cuda.Place, chosen: dict[str, int], name: str
) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        jax = place.jax()
        x, y = (jax.numpy.asarray(a.cpu().numpy()) for a in arrays)
        n, d = x.shape
        tile = next(tile for tile in (1024, 64, 1) if n % tile == 0)
        chosen[name] = tile

        def block(rows: Any, keys: Any) -> Any:
            score = jax.numpy.matmul(rows, keys.T, precision="highest")
            return jax.nn.logsumexp(score, axis=1)

        function = jax.jit(
            lambda x, y: jax.lax.map(
                lambda rows: block(rows, y), x.reshape(n // tile, tile, d)
            ).reshape(n)
        )
        return lambda: function(x, y)

    return setup


def _in_cupy(place: cuda.Place) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        import subquad

        cupy = place.cupy()
        x, y = (cupy.from_dlpack(a) for a in arrays)
        return lambda: subquad.log_normalizer(x, y)

    return setup


def _in_jax(place: cuda.Place) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        import subquad

        jax = place.jax()
        x, y = (jax.numpy.asarray(a.cpu().numpy()) for a in arrays)
        function = jax.jit(lambda x, y: subquad.log_normalizer(x, y))
        return lambda: function(x, y)

    return setup


EXACT = (
    (65536, 65536, 64, "float32"),
    (65536, 65536, 128, "float32"),
    (65536, 65536, 64, "bfloat16"),
    (32768, 32768, 64, "float64"),
    (16, 2**20, 64, "float32"),
)


def exact_problem(place: cuda.Place, n: int, m: int, d: int, dtype: str) -> Problem:
    def make() -> Any:
        torch = place.torch()
        return tuple(
            place.tensor(unit_rows(rows, d, seed)).to(getattr(torch, dtype))
            for rows, seed in ((n, 1), (m, 2))
        )

    return Problem(place, make)


def summary(rows: list[Row]) -> list[str]:
    """Return how many times longer each peer takes, case by case."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        measured = [
            row for row in rows if row["case"] == case and row["ratio_to_subquad"]
        ]
        if len(measured) > 1:
            peers = ", ".join(
                f"{row['peer']} {row['ratio_to_subquad']:.2f} x"
                for row in measured
                if row["ratio_to_subquad"] != 1
            )
            lines.append(f"  {case}: {peers}")
    return lines


@register("gpu_log_normalizer", summary=summary, rounds=ROUNDS)
def log_normalizer(options: Options) -> Iterable[Case]:
    """On a GPU: exact log sum_j exp(x_i . y_j): torch, CuPy, JAX in tiles of rows."""
    place = options.device

    def cases() -> Iterator[Case]:
        for n, m, d, dtype in sizes_of(options, EXACT):
            problem = exact_problem(place, n, m, d, dtype)
            chosen: dict[str, int] = {}
            check = functools.partial(check_exact, place, problem, dtype)
            tiled = "torch logsumexp, tiled"
            peers = [
                problem.peer("subquad torch", _exact_ours),
                problem.peer(
                    tiled,
                    _exact_torch(place, chosen, tiled),
                    # Its scores are rounded to bfloat16.
                    check=check(IN_BFLOAT16) if dtype == "bfloat16" else None,
                ),
            ]
            if dtype == "float32":
                rounded = "torch, TF32 factors"
                peers += [
                    problem.peer("subquad cupy", _in_cupy(place), "cupy"),
                    problem.peer("subquad jax", _in_jax(place), "jax"),
                    problem.peer(
                        rounded,
                        _exact_torch(place, chosen, rounded, rounded=True),
                        check=check(IN_TF32),
                    ),
                    problem.peer(
                        "cupy tiled", _exact_cupy(place, chosen, "cupy tiled"), "cupy"
                    ),
                    problem.peer(
                        "jax jit, tiled",
                        _exact_jax(place, chosen, "jax jit, tiled"),
                        "jax",
                    ),
                ]
            work = 2.0 * n * m * d
            yield Case(
                f"n={n} m={m} d={d} {dtype}",
                peers,
                check(IN_THREE_TERMS if dtype == "float32" else EXACTLY),
                limit=limits(
                    place,
                    dtype,
                    flops=work,
                    # In float64 an exponential is multiply-adds.
                    exps=0.0 if dtype == "float64" else float(n) * m,
                    moved=float(ITEMSIZE[dtype]) * (n + m) * d,
                ),
                overlap=True,
                work=work,
                values={"n": n, "m": m, "d": d, "dtype": dtype},
                measure=lambda peer, _, chosen=chosen: (
                    {"tile": chosen[peer]} if peer in chosen else {}
                ),
            )

    return finish(place, cases())


# -------- the reverse


def _gradients_ours(place: cuda.Place) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        import subquad

        torch = place.torch()
        x, y, grad = arrays
        a, b = (v.clone().requires_grad_() for v in (x, y))
        return lambda: torch.autograd.grad(subquad.log_normalizer(a, b), (a, b), grad)

    return setup


def _gradients_torch(
    place: cuda.Place, chosen: dict[str, int], name: str
) -> Callable[[Any], Call]:
    """Autograd of each tile of rows in turn, the gradients of the keys added up."""

    def setup(arrays: Any) -> Call:
        torch = place.torch()
        x, y, grad = arrays
        b = y.clone().requires_grad_()
        gx = torch.empty_like(x)

        def run(tile: int, rows: int) -> Any:
            gy = torch.zeros_like(y)
            for start in range(0, rows, tile):
                part = slice(start, min(start + tile, rows))
                a = x[part].detach().requires_grad_()
                ga, gb = torch.autograd.grad(
                    torch.logsumexp(a @ b.T, 1), (a, b), grad[part]
                )
                gx[part] = ga
                gy += gb
            return gx, gy

        tiles = _tiles(place, len(x), 2 * len(y), 4)
        tile = _best_tile(place, "torch", run, len(x), tiles)
        chosen[name] = tile
        return lambda: run(tile, len(x))

    return setup


def check_gradients(place: cuda.Place, problem: Problem) -> Callable[[Any], Check]:
    """Compare some rows of both gradients with float64, relative to the largest."""
    truth: list[Any] = []

    def check(result: Any) -> Check:
        torch = place.torch()
        x, y, grad = problem.arrays
        rows = place.tensor(some_rows(len(x)))
        if not truth:
            log_z = _truth(torch, x, y)
            a, b, g = (v.double() for v in (x, y, grad))
            p = torch.exp(a[rows] @ b.T - log_z[rows, None])
            q = torch.exp(a @ b[rows].T - log_z[:, None])
            norms = float(a.norm(dim=1).max() * b.norm(dim=1).max())
            truth.extend(
                [host(g[rows, None] * (p @ b)), host(q.T @ (g[:, None] * a)), norms]
            )
        *expected, norms = truth
        error = max(
            float(np.abs(host(got[rows]) - true).max() / np.abs(true).max())
            for got, true in zip(result, expected, strict=True)
        )
        # The weights err by what the scores and their logarithm do.
        return Check(error, 32 * EPS32 + 2 * split_error(x.shape[1], norms))

    return check


@register("gpu_log_normalizer_vjp", summary=summary, rounds=ROUNDS)
def log_normalizer_vjp(options: Options) -> Iterable[Case]:
    """On a GPU: the exact sum and its gradients: torch autograd in tiles of rows."""
    place = options.device

    def cases() -> Iterator[Case]:
        for n, _, d, dtype in sizes_of(options, ((32768, 32768, 64, "float32"),)):

            def make(n: int = n, d: int = d) -> Any:
                grad = np.random.default_rng(3).standard_normal(n, np.float32)
                return tuple(
                    place.tensor(a)
                    for a in (unit_rows(n, d, 1), unit_rows(n, d, 2), grad)
                )

            problem = Problem(place, make)
            chosen: dict[str, int] = {}
            tiled = "torch autograd, tiled"
            # Scores forward, scores again, and a product for each of the gradients.
            work = 8.0 * n * n * d
            yield Case(
                f"n=m={n} d={d} {dtype}",
                [
                    problem.peer("subquad torch", _gradients_ours(place)),
                    problem.peer(tiled, _gradients_torch(place, chosen, tiled)),
                ],
                check_gradients(place, problem),
                limit=limits(
                    place, flops=work, exps=2.0 * n * n, moved=4.0 * 6 * n * d
                ),
                overlap=True,
                work=work,
                values={"n": n, "m": n, "d": d, "dtype": dtype},
                measure=lambda peer, _, chosen=chosen: (
                    {"tile": chosen[peer]} if peer in chosen else {}
                ),
            )

    return finish(place, cases())


# -------- Gaussian evaluation, and what learns it


def _gaussian_arrays(place: cuda.Place, n: int, d: int, k: int) -> Any:
    rng = np.random.default_rng(4)
    arrays = (
        unit_rows(n, d, 5),
        rng.standard_normal(k, np.float32),
        rng.standard_normal((k, d), np.float32) / np.float32(d**0.5),
        rng.standard_normal((k, d, d), np.float32) / np.float32(2 * d**0.5),
    )
    return tuple(place.tensor(a) for a in arrays)


def _gaussian_ours(arrays: Any) -> Call:
    import subquad

    return lambda: subquad.gaussian_log_normalizer(*arrays)


def _gaussian_torch(place: cuda.Place) -> Callable[[Any], Call]:
    def setup(arrays: Any) -> Call:
        torch = place.torch()
        x, log_counts, means, factors = arrays
        k, d, r = factors.shape
        joined = factors.permute(1, 0, 2).reshape(d, k * r).contiguous()

        def call() -> Any:
            spread = (x @ joined).square_().reshape(len(x), k, r).sum(-1)
            return torch.logsumexp(log_counts + x @ means.T + 0.5 * spread, 1)

        return call

    return setup


def _gaussian_products(place: cuda.Place, *, rounded: bool) -> Callable[[Any], Call]:
    """The matrix products of an evaluation, and nothing else."""

    def setup(arrays: Any) -> Call:
        torch = place.torch()
        x, _, _, factors = arrays
        outs = [torch.empty_like(x) for _ in factors]

        def call() -> Any:
            with cuda.tf32(torch, rounded):
                for factor, out in zip(factors, outs, strict=True):
                    torch.matmul(x, factor, out=out)
            return outs

        return call

    return setup


def _check_products(
    place: cuda.Place, problem: Problem, allowed: Allowance
) -> Callable[[Any], Check]:
    def check(result: Any) -> Check:
        x, _, _, factors = problem.arrays
        rows = place.tensor(some_rows(len(x)))
        wide = x[rows].double()
        error = max(
            float((out[rows].double() - wide @ factor.double()).abs().max())
            for out, factor in zip(result, factors, strict=True)
        )
        norms = float(wide.norm(dim=1).max() * factors.double().norm(dim=1).max())
        d = x.shape[1]
        return Check(error, 4 * EPS32 * d * norms + allowed.error(d, norms))

    return check


def _check_gaussian(place: cuda.Place, problem: Problem) -> Callable[[Any], Check]:
    def check(result: Any) -> Check:
        x, log_counts, means, factors = problem.arrays
        chosen = some_rows(len(x))
        wide = x[place.tensor(chosen)].double()
        mu, f = means.double(), factors.double()
        spread = (wide[None] @ f).square().sum(-1).T
        term = log_counts.double() + wide @ mu.T + 0.5 * spread
        truth = place.torch().logsumexp(term, 1)
        error = np.abs(host(result)[chosen] - host(truth)).max()
        # Each of the products x.F enters squared, halved: |x F| times its error.
        sizes = wide.norm(dim=1).max() * f.norm(dim=1)
        bound = float((sizes * split_error(x.shape[1], 1.0) * sizes).sum(-1).max())
        bound += split_error(x.shape[1], float(wide.norm(dim=1).max() * mu.norm()))
        return Check(float(error), bound + 16 * EPS32 * float(1 + term.abs().max()))

    return check


def gaussian_summary(rows: list[Row]) -> list[str]:
    """Return the evaluation over its matrix products, besides the peers' ratios."""
    lines = summary(rows)
    for row in rows:
        if row["peer"] == "torch products alone" and row["ratio_to_subquad"]:
            lines.append(
                f"  {row['case']}: evaluation takes "
                f"{1 / row['ratio_to_subquad']:.2f} of its products in torch"
            )
    return lines


@register("gpu_gaussian", summary=gaussian_summary, rounds=ROUNDS)
def gaussian(options: Options) -> Iterable[Case]:
    """On a GPU: Gaussian evaluation, k = 8: torch, and its products alone."""
    place, k = options.device, 8

    def cases() -> Iterator[Case]:
        for n, _, d, dtype in sizes_of(options, ((2**20, 0, 64, "float32"),)):
            make = functools.partial(_gaussian_arrays, place, n, d, k)
            problem = Problem(place, make)
            work = 2.0 * n * k * d * (d + 1)
            products = functools.partial(_gaussian_products, place)
            check = functools.partial(_check_products, place, problem)
            yield Case(
                f"evaluate n={n} d={d} r={d} k={k}",
                [
                    problem.peer("subquad torch", _gaussian_ours),
                    problem.peer(
                        "torch products alone",
                        products(rounded=False),
                        check=check(EXACTLY),
                    ),
                    problem.peer(
                        "torch products, TF32",
                        products(rounded=True),
                        check=check(IN_TF32),
                    ),
                    problem.peer("torch", _gaussian_torch(place)),
                ],
                _check_gaussian(place, problem),
                limit=limits(
                    place, flops=work, exps=float(n) * k, moved=4.0 * n * (d + 1)
                ),
                overlap=True,
                work=work,
                values={"n": n, "d": d, "r": d, "k": k, "dtype": dtype},
            )

    return finish(place, cases())


def _backend(array: Array) -> Any:
    from subquad import _dispatch

    return _dispatch.backend_for(x=array)


def _check_assignment(place: cuda.Place, problem: Problem) -> Callable[[Any], Check]:
    def check(result: Any) -> Check:
        x, centroids, offsets = problem.arrays
        labels = result[0] if isinstance(result, tuple) else result
        chosen = place.tensor(some_rows(len(x), 1024))
        wide, keys = x[chosen].double(), centroids.double()
        score = wide @ keys.T + offsets.double()
        found = score.gather(1, labels[chosen][:, None])[:, 0]
        error = float((score.max(1).values - found).max())
        norms = float(wide.norm(dim=1).max() * keys.norm(dim=1).max())
        scale = norms + float(offsets.abs().max())
        # cdist works with squares, of twice the size.
        return Check(error, 2 * split_error(x.shape[1], norms) + 16 * EPS32 * scale)

    return check


def _assignment_peers(place: cuda.Place, problem: Problem) -> list[Peer]:
    def ours(arrays: Any) -> Call:
        backend = _backend(arrays[0])
        return lambda: backend.nearest_centroids(*arrays)

    def products(arrays: Any) -> Call:
        torch = place.torch()
        x, centroids, offsets = arrays
        return lambda: torch.addmm(offsets, x, centroids.T).argmax(1)

    def distances(arrays: Any) -> Call:
        torch = place.torch()
        x, centroids, _ = arrays
        return lambda: torch.cdist(x, centroids).argmin(1)

    return [
        problem.peer("subquad torch", ours),
        problem.peer("torch addmm, argmax", products),
        problem.peer("torch cdist, argmin", distances),
    ]


def _check_statistics(place: cuda.Place, problem: Problem) -> Callable[[Any], Check]:
    truth: list[Any] = []

    def check(result: Any) -> Check:
        torch = place.torch()
        y, labels, means = problem.arrays
        if not truth:
            wide = y.double()
            sums = torch.zeros_like(means, dtype=torch.float64)
            sums.index_add_(0, labels, wide)
            scatter = torch.stack(
                [
                    (rows - mean).T @ (rows - mean)
                    for a, mean in enumerate(means.double())
                    for rows in (wide[labels == a],)
                ]
            )
            truth.extend([host(sums), host(scatter)])
        error = max(
            float(np.abs(host(got) - true).max() / np.abs(true).max())
            for got, true in zip(result, truth, strict=True)
        )
        # Like the CPU's: products in float32, and sums whose roundings average out.
        return Check(error, 2e-5 + split_error(y.shape[1], 1.0))

    return check


def _statistics_peers(place: cuda.Place, problem: Problem) -> list[Peer]:
    def ours(arrays: Any) -> Call:
        y, labels, means = arrays
        backend = _backend(y)
        wide = means.double()

        def call() -> Any:
            _, sums = backend.component_sums(y, labels, None, len(means))
            scatter, _ = backend.component_scatter(y, labels, None, wide, False)
            return sums, scatter

        return call

    def theirs(arrays: Any) -> Call:
        torch = place.torch()
        y, labels, means = arrays

        def call() -> Any:
            sums = torch.zeros_like(means).index_add_(0, labels, y)
            centred = y - means[labels]
            parts = []
            for a in range(len(means)):
                rows = centred * (labels == a)[:, None]
                parts.append(rows.T @ rows)
            return sums, torch.stack(parts)

        return call

    return [
        problem.peer("subquad torch", ours),
        problem.peer("torch index_add, masked products", theirs),
    ]


@register("gpu_clusters", summary=summary, rounds=ROUNDS)
def clusters(options: Options) -> Iterable[Case]:
    """On a GPU: k-means assignment, and sums and scatter of components: torch."""
    place = options.device

    def assignment(n: int, d: int, k: int) -> Any:
        centroids = unit_rows(k, d, 7)
        offsets = -0.5 * np.square(centroids).sum(axis=1)
        return tuple(place.tensor(a) for a in (unit_rows(n, d, 6), centroids, offsets))

    def statistics(n: int, d: int, k: int) -> Any:
        labels = np.random.default_rng(8).integers(0, k, n)
        means = unit_rows(k, d, 9, 0.1)
        return tuple(place.tensor(a) for a in (unit_rows(n, d, 6), labels, means))

    def cases() -> Iterator[Case]:
        for n, _, d, dtype in sizes_of(options, ((2**20, 0, 64, "float32"),)):
            k = 64
            problem = Problem(place, functools.partial(assignment, n, d, k))
            values = {"n": n, "d": d, "dtype": dtype}
            yield Case(
                f"assign n={n} d={d} k={k}",
                _assignment_peers(place, problem),
                _check_assignment(place, problem),
                limit=limits(place, flops=2.0 * n * k * d, moved=4.0 * n * (d + 3)),
                overlap=True,
                work=2.0 * n * k * d,
                values=values | {"k": k},
            )
            k = 8
            problem = Problem(place, functools.partial(statistics, n, d, k))
            work = 2.0 * n * d * d
            yield Case(
                f"statistics n={n} d={d} k={k}",
                _statistics_peers(place, problem),
                _check_statistics(place, problem),
                # Rows are read for the means, and again for the scatter about them.
                limit=limits(place, flops=work, moved=2.0 * n * (4 * d + 8)),
                overlap=True,
                work=work,
                values=values | {"k": k},
            )

    return finish(place, cases())


def _check_fit(place: cuda.Place, problem: Problem) -> Callable[[Any], Check]:
    def check(estimator: Any) -> Check:
        (y,) = problem.arrays
        rows = place.tensor(some_rows(len(y), 32))
        x = y[rows]
        error = np.abs(
            host(estimator.log_normalizer(x)) - host(_truth(place.torch(), x, y))
        )
        bound = host(estimator.error_bound(x))
        worst = int((error - bound).argmax())
        return Check(float(error[worst]), float(bound[worst]), "within its own bound")

    return check


@register("gpu_fit", rounds=3)
def fit(options: Options) -> Iterable[Case]:
    """On a GPU: GaussianNormalizer.fit, k = 8: k-means on a sample, then statistics."""
    place, k = options.device, 8

    def ours(arrays: Any) -> Call:
        import subquad

        (y,) = arrays
        return lambda: subquad.GaussianNormalizer(k, random_state=0).fit(y)

    def cases() -> Iterator[Case]:
        for n, _, d, dtype in sizes_of(options, ((2**20, 0, 64, "float32"),)):
            problem = Problem(
                place, lambda n=n, d=d: (place.tensor(unit_rows(n, d, 10)),)
            )
            yield Case(
                f"fit n={n} d={d} k={k}",
                [problem.peer("subquad torch", ours)],
                _check_fit(place, problem),
                # Assignment, means and scatter read the rows once each.
                limit=limits(place, flops=2.0 * n * d * (k + d), moved=3.0 * 4 * n * d),
                overlap=True,
                values={"n": n, "d": d, "k": k, "dtype": dtype},
            )

    return finish(place, cases())


# -------- small calls


def overhead_summary(rows: list[Row]) -> list[str]:
    """Return the peers' ratios, and whether a library of later concepts is here."""
    found = importlib.util.find_spec("fla") is not None
    state = "present" if found else "absent"
    return [*summary(rows), f"  flash-linear-attention: {state}"]


@register("gpu_overhead", summary=overhead_summary, rounds=ROUNDS)
def overhead(options: Options) -> Iterable[Case]:
    """On a GPU: a call too small to matter, and its replay from a CUDA graph."""
    place = options.device

    def replayed(setup: Callable[[Any], Call]) -> Callable[[Any], Call]:
        return lambda arrays: place.replayed(setup(arrays))

    def theirs(arrays: Any) -> Call:
        torch = place.torch()
        x, y = arrays
        return lambda: torch.logsumexp(x @ y.T, 1)

    def cases() -> Iterator[Case]:
        n, d = 64, 16
        problem = exact_problem(place, n, n, d, "float32")
        ours = _exact_ours
        yield Case(
            f"small n=m={n} d={d}",
            [
                problem.peer("subquad torch", ours),
                problem.peer("subquad torch, graph", replayed(ours)),
                problem.peer("subquad cupy", _in_cupy(place), "cupy"),
                problem.peer("subquad jax, jit", _in_jax(place), "jax"),
                problem.peer("torch", theirs),
                problem.peer("torch, graph", replayed(theirs)),
            ],
            check_exact(place, problem, "float32", IN_THREE_TERMS),
            values={"n": n, "m": n, "d": d, "dtype": "float32"},
        )

    return finish(place, cases())
