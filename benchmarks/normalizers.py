"""Normalizers: exact, reverse, Gaussian; growth with n, tiny calls, and accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.machine import seconds
from benchmarks.registry import Case, Check, Options, Peer, Row, Skip, register

EPS32 = float(np.finfo(np.float32).eps)


def log_normalizer_truth(x: Any, y: Any) -> Any:
    """Return log sum_j exp(x_i . y_j) in float64, keys in blocks."""
    x = np.asarray(x, float)
    total = np.full(len(x), -np.inf)
    step = max(1, 2**24 // max(1, len(x)))
    for start in range(0, len(y), step):
        score = x @ np.asarray(y[start : start + step], float).T
        top = score.max(axis=1)
        part = top + np.log(np.exp(score - top[:, None]).sum(axis=1))
        total = np.logaddexp(total, part)
    return total


def some_rows(n: int, count: int = 64) -> Any:
    """Return up to `count` row numbers spread over `n`."""
    return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))


def _array(result: Any) -> Any:
    return np.asarray(result.detach() if hasattr(result, "detach") else result, float)


def _check_log_normalizer(x: Any, y: Any) -> Callable[[Any], Check]:
    rows = some_rows(len(x))
    truth: list[Any] = []

    def check(result: Any) -> Check:
        if not truth:
            truth.append(log_normalizer_truth(x[rows], y))
        error = np.abs(_array(result)[rows] - truth[0]).max()
        # Rounding of the scores and of the result: both grow with what they round.
        scale = (
            1.0
            + np.abs(truth[0]).max()
            + np.abs(x[rows].astype(float) @ y[:64].T).max()
        )
        return Check(float(error), 16 * float(np.finfo(x.dtype).eps) * float(scale))

    return check


def _ours(x: Any, y: Any) -> Callable[[], Any]:
    import subquad

    return lambda: subquad.log_normalizer(x, y)


def _torch_plain(x: Any, y: Any) -> Callable[[], Any]:
    import torch

    a, b = torch.from_numpy(x), torch.from_numpy(y)
    return lambda: torch.logsumexp(a @ b.T, 1)


def _torch_chunked(x: Any, y: Any, shift: bool) -> Callable[[], Any]:
    """In blocks of rows whose scores stay in cache, every buffer allocated before.

    `shift` subtracts each row's maximum, without which large scores overflow. The block
    size is the quickest of a few.
    """
    import time

    import torch

    a, b = torch.from_numpy(x), torch.from_numpy(y).T
    out = torch.empty(len(x), dtype=a.dtype)

    def run(block: int, buffer: Any, n: int) -> Any:
        for start in range(0, n, block):
            rows = a[start : start + block]
            score = buffer[: len(rows)]
            torch.mm(rows, b, out=score)
            if shift:
                top = score.amax(1)
                score.sub_(top[:, None]).exp_()
                out[start : start + block] = score.sum(1).log_().add_(top)
            else:
                score.exp_()
                out[start : start + block] = score.sum(1).log_()
        return out

    def probe(block: int) -> float:
        buffer = torch.empty(block, len(y), dtype=a.dtype)
        n = min(len(x), 1024)
        run(block, buffer, n)
        start = time.perf_counter()
        run(block, buffer, n)
        return time.perf_counter() - start

    block = min((32, 64, 128, 256), key=probe)
    buffer = torch.empty(block, len(y), dtype=a.dtype)
    return lambda: run(block, buffer, len(x))


def _numpy_chunked(x: Any, y: Any) -> Callable[[], Any]:
    block = 64
    buffer = np.empty((block, len(y)), x.dtype)
    out = np.empty(len(x), x.dtype)

    def call() -> Any:
        for start in range(0, len(x), block):
            rows = x[start : start + block]
            score = np.matmul(rows, y.T, out=buffer[: len(rows)])
            top = score.max(axis=1)
            score -= top[:, None]
            np.exp(score, out=score)
            out[start : start + block] = np.log(score.sum(axis=1)) + top
        return out

    return call


def _scipy_plain(x: Any, y: Any) -> Callable[[], Any]:
    from scipy.special import logsumexp

    return lambda: logsumexp(x @ y.T, axis=1)


def _jax_jit(x: Any, y: Any) -> Callable[[], Any]:
    import jax

    function = jax.jit(lambda a, b: jax.nn.logsumexp(a @ b.T, axis=1))
    a, b = jax.numpy.asarray(x), jax.numpy.asarray(y)
    return lambda: function(a, b).block_until_ready()


@register("log_normalizer")
def log_normalizer(options: Options) -> Iterable[Case]:
    """Exact log sum_j exp(x_i . y_j), n = m = 20000, float32: torch, NumPy, JAX."""
    for n, d in options.grid((20000,), (50, 384)):
        x = data.sphere(n, d, seed=1) * np.float32(2)
        y = data.sphere(n, d, seed=2) * np.float32(2)
        matrix = 4.0 * n * n

        def peer(
            name: str,
            make: Callable[..., Callable[[], Any]],
            *extra: Any,
            bytes_needed: float = 0.0,
            x: Any = x,
            y: Any = y,
        ) -> Peer:
            return Peer(
                name,
                lambda: make(x, y, *extra),
                warm=lambda: make(x[:256], y[:256], *extra),
                bytes_needed=bytes_needed,
            )

        yield Case(
            f"n=m={n} d={d} float32",
            [
                peer("subquad", _ours),
                peer("torch logsumexp", _torch_plain, bytes_needed=3 * matrix),
                peer("torch chunked", _torch_chunked, True),
                peer("torch chunked, no max", _torch_chunked, False),
                peer("numpy chunked", _numpy_chunked),
                peer("scipy logsumexp", _scipy_plain, bytes_needed=4 * matrix),
                peer("jax jit", _jax_jit, bytes_needed=3 * matrix),
            ],
            _check_log_normalizer(x, y),
            limit={
                "tile product": seconds(2.0 * n * n * d, options.rates.tile(d, 4)),
                "exp": seconds(float(n) * n, options.rates.exp(4)),
            },
            work=2.0 * n * n * d,
            memory=True,
            values={"n": n, "m": n, "d": d, "dtype": "float32"},
        )


def _ours_vjp(x: Any, y: Any, grad: Any) -> Callable[[], Any]:
    import subquad

    def call() -> Any:
        log_z = subquad.log_normalizer(x, y)
        return subquad.vjp.log_normalizer(grad, x, y, out=log_z)

    return call


def _torch_vjp(x: Any, y: Any, grad: Any, ours: bool) -> Callable[[], Any]:
    import torch

    if ours:
        import subquad
    a = torch.from_numpy(x).requires_grad_()
    b = torch.from_numpy(y).requires_grad_()
    g = torch.from_numpy(grad)

    def call() -> Any:
        log_z = subquad.log_normalizer(a, b) if ours else torch.logsumexp(a @ b.T, 1)
        return torch.autograd.grad(log_z, (a, b), g)

    return call


def _check_vjp(x: Any, y: Any, grad: Any) -> Callable[[Any], Check]:
    rows = some_rows(len(x))
    truth: list[Any] = []

    def check(result: Any) -> Check:
        if not truth:
            log_z = log_normalizer_truth(x, y)
            wide_x, wide_y = x.astype(float), y.astype(float)
            p = np.exp(wide_x[rows] @ wide_y.T - log_z[rows, None])
            q = np.exp(wide_x @ wide_y[rows].T - log_z[:, None])
            truth.extend(
                [grad[rows, None] * (p @ wide_y), q.T @ (grad[:, None] * wide_x)]
            )
        error = max(
            float(np.abs(_array(got)[rows] - true).max() / np.abs(true).max())
            for got, true in zip(result[:2], truth, strict=True)
        )
        return Check(error, 32 * EPS32)

    return check


@register("log_normalizer_vjp")
def log_normalizer_vjp(options: Options) -> Iterable[Case]:
    """Exact normaliser and its gradients, n = m = 4096, float32: torch autograd."""
    for n, d in options.grid((4096,), (50, 384)):
        x = data.sphere(n, d, seed=1) * np.float32(2)
        y = data.sphere(n, d, seed=2) * np.float32(2)
        grad = np.random.default_rng(3).standard_normal(n).astype(np.float32)
        yield Case(
            f"n=m={n} d={d} float32",
            [
                Peer("subquad", lambda x=x, y=y, g=grad: _ours_vjp(x, y, g)),
                Peer(
                    "subquad torch", lambda x=x, y=y, g=grad: _torch_vjp(x, y, g, True)
                ),
                Peer(
                    "torch autograd",
                    lambda x=x, y=y, g=grad: _torch_vjp(x, y, g, False),
                    bytes_needed=16.0 * n * n,
                ),
            ],
            _check_vjp(x, y, grad),
            # Scores forward, scores again, and a product for each of the gradients.
            limit={
                "tile product": seconds(8.0 * n * n * d, options.rates.tile(d, 4)),
                "exp": seconds(2.0 * n * n, options.rates.exp(4)),
            },
            work=8.0 * n * n * d,
            values={"n": n, "m": n, "d": d, "dtype": "float32"},
        )


@dataclasses.dataclass(frozen=True)
class _Closure:
    """The learned arrays of a Gaussian normaliser: triangular factors, as it has."""

    log_counts: Any
    means: Any
    factors: Any

    @classmethod
    def of(cls, y: Any, labels: Any, k: int) -> _Closure:
        wide = y.astype(float)
        counts, means, factors = [], [], []
        for a in range(k):
            rows = wide[labels == a]
            counts.append(len(rows))
            means.append(rows.mean(axis=0))
            centred = np.zeros((max(rows.shape), y.shape[1]))
            centred[: len(rows)] = (rows - means[-1]) / np.sqrt(len(rows))
            factors.append(np.linalg.qr(centred, mode="r").T)
        return cls(np.log(counts), np.array(means), np.array(factors))

    def cast(self, dtype: Any) -> tuple[Any, Any, Any]:
        return tuple(
            a.astype(dtype) for a in (self.log_counts, self.means, self.factors)
        )  # type: ignore[return-value]


def _numpy_gaussian(x: Any, log_counts: Any, means: Any, factors: Any) -> Any:
    k, d, r = factors.shape
    spread = (x @ factors.transpose(1, 0, 2).reshape(d, k * r)).reshape(len(x), k, r)
    term = log_counts + x @ means.T + 0.5 * np.einsum("nkr,nkr->nk", spread, spread)
    top = term.max(axis=1)
    return top + np.log(np.exp(term - top[:, None]).sum(axis=1))


def _gaussian_numpy_chunked(x: Any, closure: _Closure) -> Callable[[], Any]:
    arrays = closure.cast(x.dtype)
    out = np.empty(len(x), x.dtype)

    def call() -> Any:
        for start in range(0, len(x), 2048):
            out[start : start + 2048] = _numpy_gaussian(
                x[start : start + 2048], *arrays
            )
        return out

    return call


def _gaussian_numpy(x: Any, closure: _Closure) -> Callable[[], Any]:
    arrays = closure.cast(x.dtype)
    return lambda: _numpy_gaussian(x, *arrays)


def _gaussian_torch(x: Any, closure: _Closure) -> Callable[[], Any]:
    import torch

    a = torch.from_numpy(x)
    log_counts, means, factors = (
        torch.from_numpy(each) for each in closure.cast(x.dtype)
    )
    k, d, r = factors.shape
    joined = factors.permute(1, 0, 2).reshape(d, k * r).contiguous()

    def call() -> Any:
        spread = (a @ joined).square_().reshape(len(a), k, r).sum(-1)
        return torch.logsumexp(log_counts + a @ means.T + 0.5 * spread, 1)

    return call


def _gaussian_ours(x: Any, closure: _Closure) -> Callable[[], Any]:
    import subquad

    arrays = closure.cast(x.dtype)
    return lambda: subquad.gaussian_log_normalizer(x, *arrays)


def _fit_and_evaluate(x: Any, k: int) -> Callable[[], Any]:
    import subquad

    def call() -> Any:
        estimator = subquad.GaussianNormalizer(k, random_state=0).fit(x)
        return estimator.log_normalizer(x), estimator

    return call


def _edrep(x: Any, k: int) -> Callable[[], Any]:
    from EDRep import computeZest  # type: ignore[import-not-found]

    rows = np.arange(len(x))
    return lambda: (np.log(computeZest(x, rows, k=k).Zest), None)


def _check_approximation(x: Any, y: Any) -> Callable[[Any], Check]:
    """Compare an estimate with the exact value; ours within its own error bound."""
    rows = some_rows(len(x), 128)
    truth: list[Any] = []

    def check(result: Any) -> Check:
        log_z, estimator = result
        if not truth:
            truth.append(log_normalizer_truth(x[rows], y))
        error = np.abs(_array(log_z)[rows] - truth[0])
        note = f"relative error mean {np.expm1(error).mean():.2g}"
        if estimator is None:
            # What a Gaussian closure of unit rows can be wrong by, 2^3 / (36 sqrt 3).
            return Check(float(error.max()), 0.1284, note)
        bound = np.asarray(estimator.error_bound(x[rows]), float)
        worst = int((error - bound).argmax())
        return Check(float(error[worst]), float(bound[worst]), note)

    return check


def _check_closure(x: Any, closure: _Closure) -> Callable[[Any], Check]:
    rows = some_rows(len(x))

    def check(result: Any) -> Check:
        truth = _numpy_gaussian(
            x[rows].astype(float), closure.log_counts, closure.means, closure.factors
        )
        error = np.abs(_array(result)[rows] - truth).max()
        return Check(float(error), 16 * EPS32 * float(1 + np.abs(truth).max()))

    return check


def gaussian_work(n: int, k: int, d: int) -> float:
    """Return the floating-point operations of `n` rows with triangular factors."""
    return 2.0 * n * k * d * (1 + 0.5 * (d + 1))


@register("gaussian")
def gaussian(options: Options) -> Iterable[Case]:
    """Gaussian normaliser, n = 100000, d = 100, k = 5, float32: edrep, NumPy, torch."""
    k = 5
    for n, d in options.grid((100_000,), (100,)):
        x = data.mixture(n, d)
        peak = options.rates.fma_peak(4)
        evaluation = gaussian_work(n, k, d)
        # Assignment, and the scatter matrices of which one triangle is needed.
        fit = 2.0 * n * k * d + 1.0 * n * d * (d + 1)
        values = {"n": n, "d": d, "k": k, "dtype": "float32"}
        yield Case(
            f"fit+evaluate n={n} d={d} k={k}",
            [
                Peer(
                    "subquad",
                    lambda x=x: _fit_and_evaluate(x, k),
                    warm=lambda x=x: _fit_and_evaluate(x[:2000], k),
                ),
                Peer(
                    "edrep 0.1.2",
                    lambda x=x: _edrep(x, k),
                    warm=lambda x=x: _edrep(x[:2000], k),
                ),
            ],
            _check_approximation(x, x),
            limit={"flops": seconds(fit + evaluation, peak)},
            work=fit + evaluation,
            memory=True,
            values=values,
        )
        nearest = x @ x[:: max(1, n // k)][:k].T
        closure = _Closure.of(x, nearest.argmax(axis=1), k)
        wide = 4.0 * n * k * d

        def peer(
            name: str,
            make: Any,
            bytes_needed: float = 0.0,
            x: Any = x,
            closure: Any = closure,
        ) -> Peer:
            return Peer(
                name,
                lambda: make(x, closure),
                warm=lambda: make(x[:2000], closure),
                bytes_needed=bytes_needed,
            )

        yield Case(
            f"evaluate n={n} d={d} k={k}",
            [
                peer("subquad", _gaussian_ours),
                peer("numpy", _gaussian_numpy, wide),
                peer("numpy chunked", _gaussian_numpy_chunked),
                peer("torch", _gaussian_torch, wide),
            ],
            _check_closure(x, closure),
            limit={"flops": seconds(evaluation, peak)},
            work=evaluation,
            memory=True,
            values=values,
        )


EXACT_MOST = 200_000


def slopes(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """Return, per peer, slope and intercept of log10 seconds over log10 n."""
    fitted = {}
    for peer in dict.fromkeys(row["peer"] for row in rows):
        points = [
            (row["values"]["n"], row["median"])
            for row in rows
            if row["peer"] == peer and row["status"] == "ok"
        ]
        if len(points) > 1:
            slope, start = np.polyfit(*np.log10(np.array(points)).T, 1)
            fitted[peer] = (float(slope), float(start))
    return fitted


def _scaling_summary(rows: list[Row]) -> list[str]:
    return [
        f"  {peer}: seconds ~ n^{slope:.2f}"
        for peer, (slope, _) in slopes(rows).items()
    ]


def _scaling_plot(rows: list[Row], path: str) -> None:
    import matplotlib.pyplot as plt

    from benchmarks.harness import PALETTE

    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    for (peer, (slope, start)), colour in zip(
        slopes(rows).items(), PALETTE, strict=False
    ):
        points = np.array(
            sorted(
                (row["values"]["n"], row["median"])
                for row in rows
                if row["peer"] == peer
            )
        )
        axes.loglog(*points.T, "o", color=colour)
        ends = points[[0, -1], 0]
        axes.loglog(ends, 10**start * ends**slope, color=colour, linewidth=1)
        axes.annotate(
            f"{peer.removeprefix('subquad ')}, slope {slope:.2f}",
            points[-1],
            xytext=(-8, 6),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    axes.set_xlabel("n keys, each also a query")
    axes.set_ylabel("seconds, median")
    axes.set_title(
        f"log normalisers of n rows against n rows, {rows[0]['values']['data']}"
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@register("scaling", summary=_scaling_summary, plot=_scaling_plot, rounds=3)
def scaling(options: Options) -> Iterable[Case]:
    """Seconds over n, 1e3 to 1e6, d = 50, float32: Gaussian (k = 8), exact to 2e5."""
    sizes = [size.n for size in options.sizes] or [
        1000, 3000, 10_000, 30_000, 100_000, 200_000, 400_000, 1_000_000,
    ]  # fmt: skip
    k = 8
    for n in sorted(sizes):
        x, source = data.words(n)
        d = x.shape[1]
        peers = [
            Peer(
                f"subquad gaussian k={k}",
                lambda x=x: _fit_and_evaluate(x, k),
                check=_check_approximation(x, x),
                limit={
                    "flops": seconds(
                        2.0 * n * k * d
                        + 1.0 * n * d * (d + 1)
                        + gaussian_work(n, k, d),
                        options.rates.fma_peak(4),
                    )
                },
            )
        ]
        if n <= EXACT_MOST:
            peers.append(Peer("subquad exact", lambda x=x: _ours(x, x)))
        yield Case(
            f"n={n}",
            peers,
            _check_log_normalizer(x, x),
            limit={
                "tile product": seconds(2.0 * n * n * d, options.rates.tile(d, 4)),
                "exp": seconds(float(n) * n, options.rates.exp(4)),
            },
            values={"n": n, "d": d, "data": source},
        )


@register("overhead")
def overhead(options: Options) -> Iterable[Case]:
    """What a tiny call costs: n = m = 8, d = 8, NumPy and torch."""

    def numpy_lines(x: Any, y: Any) -> Callable[[], Any]:
        def call() -> Any:
            score = x @ y.T
            top = score.max(axis=1)
            return top + np.log(np.exp(score - top[:, None]).sum(axis=1))

        return call

    def torch_ours(x: Any, y: Any) -> Callable[[], Any]:
        import torch

        import subquad

        a, b = torch.from_numpy(x), torch.from_numpy(y)
        return lambda: subquad.log_normalizer(a, b)

    def gaussian_ours(x: Any, y: Any) -> Callable[[], Any]:
        return _gaussian_ours(x, _Closure.of(y, np.zeros(len(y), int), 1))

    for n, d in options.grid((8,), (8,)):
        x, y = data.sphere(n, d, seed=1), data.sphere(n, d, seed=2)
        closure = _Closure.of(y, np.zeros(n, int), 1)

        def peer(
            name: str, make: Any, check: Any = None, x: Any = x, y: Any = y
        ) -> Peer:
            return Peer(name, lambda: make(x, y), check=check)

        yield Case(
            f"n=m={n} d={d} float32",
            [
                peer("subquad numpy", _ours),
                peer("subquad torch", torch_ours),
                peer("subquad gaussian", gaussian_ours, _check_closure(x, closure)),
                peer("numpy lines", numpy_lines),
                peer("scipy logsumexp", _scipy_plain),
                peer("torch logsumexp", _torch_plain),
            ],
            _check_log_normalizer(x, y),
            values={"n": n, "m": n, "d": d},
        )


ORDERS = (1, 2, 5, 8)
CONTROL_SAMPLES = 500
# Relative error of Z, mean and maximum, of the estimator with the right quadratic form
# and k-means labels, for k = 1, 2, 5, 8.
PUBLISHED: dict[str, tuple[tuple[float, float], ...]] = {
    "digits unit": (
        (3.6e-5, 1.7e-4), (2.0e-5, 1.2e-4), (1.7e-5, 7.7e-5), (1.8e-5, 8.2e-5),
    ),
    "digits centred, unit": (
        (1.9e-3, 5.9e-3), (1.1e-3, 3.9e-3), (4.2e-4, 2.1e-3), (1.9e-4, 1.2e-3),
    ),
    "mixture 20000x32 unit": (
        (2.5e-3, 7.4e-3), (4.6e-4, 2.7e-3), (7.7e-5, 5.6e-4), (1.4e-5, 3.4e-5),
    ),
    "sphere 20000x64": (
        (9.1e-6, 2.6e-5), (8.5e-6, 2.5e-5), (7.2e-6, 2.4e-5), (6.1e-6, 2.4e-5),
    ),
    "w2v unit": (
        (9.2e-5, 4.3e-4), (7.4e-5, 4.1e-4), (5.6e-5, 4.0e-4), (5.0e-5, 2.2e-4),
    ),
    "mixture, norm 2": (
        (7.3e-2, 1.9e-1), (4.9e-2, 2.8e-1), (1.3e-2, 1.4e-1), (1.7e-3, 3.6e-3),
    ),
    "digits, norm 2": (
        (2.3e-3, 1.1e-2), (1.4e-3, 8.9e-3), (9.6e-4, 4.9e-3), (9.7e-4, 4.7e-3),
    ),
}  # fmt: skip
SAME_DATA = ("digits unit", "digits centred, unit", "digits, norm 2", "w2v unit")


def _accuracy_data(name: str) -> Any:
    if name.startswith("w2v"):
        raise Skip(
            "data missing: no package at hand ships the 13013 x 300 word2vec table"
        )
    if name.startswith("digits"):
        return data.digits(centred="centred" in name) * (
            2.0 if "norm 2" in name else 1.0
        )
    if name.startswith("mixture"):
        return data.mixture(20000, 32, float) * (2.0 if "norm 2" in name else 1.0)
    return data.sphere(20000, 64, float)


def _estimate(y: Any, queries: Any, k: int, variant: str) -> Callable[[], Any]:
    import subquad

    samples = CONTROL_SAMPLES if variant == "control" else 0
    estimator = subquad.GaussianNormalizer(
        k, control_samples=samples, random_state=0
    ).fit(y)
    index = None if variant == "plain" else queries
    return lambda: (estimator.log_normalizer(y[queries], self_index=index), estimator)


def _accuracy_case(name: str) -> Case:
    try:
        y = _accuracy_data(name)
    except (Skip, ImportError) as error:
        reason = error

        def refuse() -> Callable[[], Any]:
            raise reason

        return Case(name, [Peer("subquad", refuse)], lambda _: Check(0.0, 0.0))
    queries = some_rows(len(y), 3000)
    truth = log_normalizer_truth(y[queries], y)

    def check_for(order: int, variant: str) -> Callable[[Any], Check]:
        mean, most = PUBLISHED[name][order]
        origin = "published" if name in SAME_DATA else "published, other draw"

        def check(result: Any) -> Check:
            log_z, estimator = result
            error = np.asarray(log_z, float) - truth
            relative = np.abs(np.expm1(error))
            index = None if variant == "plain" else queries
            bound = np.asarray(
                estimator.error_bound(y[queries], self_index=index), float
            )
            worst = int((np.abs(error) - bound).argmax())
            note = f"mean {relative.mean():.2g} max {relative.max():.2g}"
            if variant == "plain":
                note += f" ({origin}: {mean:.2g} / {most:.2g})"
            return Check(float(abs(error[worst])), float(bound[worst]), note)

        return check

    def measure(peer: str, result: Any) -> dict[str, Any]:
        relative = np.abs(np.expm1(np.asarray(result[0], float) - truth))
        order = ORDERS.index(int(peer.split("k=")[1].split()[0]))
        mean, most = PUBLISHED[name][order]
        return {
            "mean": float(relative.mean()),
            "max": float(relative.max()),
            "published_mean": mean,
            "published_max": most,
        }

    return Case(
        name,
        [
            Peer(
                f"subquad k={k} {variant}",
                lambda k=k, variant=variant: _estimate(y, queries, k, variant),
                check=check_for(order, variant),
            )
            for order, k in enumerate(ORDERS)
            for variant in ("plain", "self_index", "control")
        ],
        lambda _: Check(0.0, 0.0),
        values={"n": len(y), "d": y.shape[1], "queries": len(queries)},
        measure=measure,
    )


def _accuracy_plot(rows: list[Row], path: str) -> None:
    import matplotlib.pyplot as plt

    from benchmarks.harness import PALETTE

    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, grid = plt.subplots(
        1,
        len(cases),
        figsize=(2.6 * len(cases), 3.2),
        layout="constrained",
        squeeze=False,
    )
    for axes, case in zip(grid[0], cases, strict=True):
        group = [
            row["values"] | {"peer": row["peer"]} for row in rows if row["case"] == case
        ]
        for colour, variant in zip(
            PALETTE, ("plain", "self_index", "control"), strict=False
        ):
            found = [v for v in group if v["peer"].endswith(variant)]
            orders = [int(v["peer"].split("k=")[1].split()[0]) for v in found]
            axes.loglog(
                orders, [v["mean"] for v in found], "o-", color=colour, label=variant
            )
        plain = [v for v in group if v["peer"].endswith("plain")]
        orders = [int(v["peer"].split("k=")[1].split()[0]) for v in plain]
        published = [v["published_mean"] for v in plain]
        axes.loglog(orders, published, "k--", linewidth=1, label="published")
        axes.set_title(case, fontsize=9)
        axes.set_xticks(ORDERS, [str(k) for k in ORDERS])
        axes.minorticks_off()
        axes.set_xlabel("components")
    grid[0, 0].set_ylabel("mean relative error of Z")
    grid[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@register("accuracy", plot=_accuracy_plot, rounds=1)
def accuracy(_: Options) -> Iterable[Case]:
    """Relative error of the Gaussian normaliser beside published figures."""
    for name in PUBLISHED:
        yield _accuracy_case(name)
