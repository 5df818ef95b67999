"""Random features: logarithms, reverse, trigonometric, Hadamard, attention, fits."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.machine import Rates, seconds
from benchmarks.registry import Case, Check, Options, Peer, Row, Skip, register

EPS32 = float(np.finfo(np.float32).eps)
_COMPONENTS = 256
_COPY_BYTES = 2**27


def copy_rate(rates: Rates) -> float | None:
    """Return bytes per second of a copy beyond the caches, read and written ones.

    Where torch is missing, of one thread.
    """
    if "copy" not in rates.measured:
        source = np.ones(_COPY_BYTES, np.uint8)
        target = np.zeros_like(source)
        call: Callable[[], Any] = lambda: np.copyto(target, source)  # noqa: E731
        with contextlib.suppress(ImportError):
            import torch

            a, b = torch.from_numpy(source), torch.from_numpy(target)
            call = lambda: b.copy_(a)  # noqa: E731
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        rates.measured["copy"] = 2.0 * _COPY_BYTES / min(times)
    return rates.measured["copy"]


def _limit(
    rates: Rates, flops: float, moved: float, transcendental: float = 0.0
) -> dict[str, float | None]:
    """Return the parts of a limit; they overlap, so that the larger counts."""
    arithmetic = seconds(flops, rates.fma_peak(4))
    if transcendental and arithmetic is not None:
        extra = seconds(transcendental, rates.exp(4))
        arithmetic = None if extra is None else arithmetic + extra
    return {"arithmetic": arithmetic, "memory": seconds(moved, copy_rate(rates))}


def _loose(check: Callable[[Any], Check], note: str) -> Callable[[Any], Check]:
    """Let a peer of another accuracy be timed, and say how far off it is."""
    return lambda result: Check(check(result).error, math.inf, note)


def _unchecked(note: str) -> Callable[[Any], Check]:
    return lambda result: Check(0.0, 0.0, note)


def _some(n: int, count: int = 64) -> Any:
    return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))


# ------------------------------------------------------------------- log-features


class _Map(NamedTuple):
    """What a fitted object multiplies and adds, None where there is nothing."""

    projection: Any
    bias: Any
    diagonal: Any
    factor: Any
    shift: Any
    linear: Any

    @classmethod
    def of(cls, fitted: Any, dtype: Any = np.float32) -> _Map:
        """Return one side's map of an estimator."""

        def cast(a: Any) -> Any:
            return None if a is None else np.ascontiguousarray(a, dtype)

        projection, quadratic = cast(fitted.projection), cast(fitted.quadratic)
        is_diagonal = quadratic is not None and quadratic.ndim < projection.ndim
        return cls(
            projection,
            cast(fitted.bias),
            quadratic if is_diagonal else None,
            None if is_diagonal else quadratic,
            cast(fitted.shift),
            cast(fitted.linear),
        )

    def row_terms(self, x: Any) -> tuple[Any, Any]:
        """Return the shifted rows and what is added to each of them."""
        z = x if self.shift is None else x - self.shift
        term = np.zeros(len(z), z.dtype)
        if self.diagonal is not None:
            term -= np.square(z) @ self.diagonal / 2
        if self.factor is not None:
            term -= np.square(z @ self.factor.T).sum(axis=1) / 2
        if self.linear is not None:
            term += z @ self.linear
        return z, term

    def truth(self, x: Any, antithetic: bool) -> tuple[Any, Any]:
        """Return rows in float64, and the sum of the sizes of what was added up."""
        wide = _Map(*(None if a is None else a.astype(float) for a in self))
        z, term = wide.row_terms(x.astype(float))
        product, size = z @ wide.projection.T, np.abs(z) @ np.abs(wide.projection).T
        bias = np.broadcast_to(wide.bias, size.shape[1:])
        if antithetic:
            product = np.concatenate([product, -product], axis=1)
            size, bias = np.tile(size, 2), np.tile(bias, 2)
        terms = np.zeros(len(z))
        if wide.diagonal is not None:
            terms += np.square(z) @ np.abs(wide.diagonal) / 2
        if wide.factor is not None:
            terms += np.square(np.abs(z) @ np.abs(wide.factor).T).sum(axis=1) / 2
        if wide.linear is not None:
            terms += np.abs(z) @ np.abs(wide.linear)
        return product + bias + term[:, None], size + np.abs(bias) + terms[:, None]


def _data(n: int, d: int, seed: int = 0, shift: float = 0.5) -> Any:
    """Return rows of unit variance, its spectrum 1/l in axes of their own, float32."""
    generator = np.random.default_rng(seed)
    axes = np.linalg.qr(generator.standard_normal((d, d)))[0]
    variances = 1.0 / np.arange(1.0, d + 1)
    deviations = np.sqrt(variances / variances.sum())
    mean = shift * generator.standard_normal(d) / math.sqrt(d)
    rows = generator.standard_normal((n, d)) * deviations @ axes + mean
    return rows.astype(np.float32)


def _fitted(x: Any, keys: Any = None, **options: Any) -> Any:
    import subquad

    estimator = subquad.RandomFeatures(_COMPONENTS, random_state=0, **options)
    return estimator.fit(x, keys=keys)


def _check_log_features(x: Any, arrays: _Map, antithetic: bool) -> Callable[..., Check]:
    rows = _some(len(x))

    def check(result: Any) -> Check:
        truth, size = arrays.truth(x[rows], antithetic)
        error = np.abs(np.asarray(result)[rows].astype(float) - truth) / size
        # Sums of d products, whose roundings add up like a random walk.
        tolerance = 4 * EPS32 * math.sqrt(x.shape[1])
        return Check(float(error.max()), tolerance, "of the sum of all sizes")

    return check


def _kernel(x: Any, arrays: _Map, antithetic: bool) -> Callable[[], Any]:
    """The kernel on memory that was touched before."""
    from subquad import _core

    (n, d), m = x.shape, len(arrays.projection)
    out = np.zeros((n, m * (1 + antithetic)), x.dtype)
    r = 0 if arrays.factor is None else len(arrays.factor)
    size = _core.log_features_workspace(1, n, m, d, r, x.itemsize, 0)
    scratch = np.zeros(size, np.uint8)

    def call() -> Any:
        _core.log_features(x, *arrays, antithetic, False, out, scratch, 0)
        return out

    return call


def _numpy(x: Any, arrays: _Map, antithetic: bool) -> Callable[[], Any]:
    out = np.zeros((len(x), len(arrays.projection) * (1 + antithetic)), x.dtype)
    m = len(arrays.projection)

    def call() -> Any:
        z, term = arrays.row_terms(x)
        if antithetic:
            product = z @ arrays.projection.T
            np.add(term[:, None], product, out=out[:, :m])
            np.subtract(term[:, None], product, out=out[:, m:])
            out[:, :m] += arrays.bias
            out[:, m:] += arrays.bias
        else:
            np.matmul(z, arrays.projection.T, out=out)
            np.add(out, arrays.bias, out=out)
            np.add(out, term[:, None], out=out)
        return out

    return call


def _matmul(x: Any, arrays: _Map) -> Callable[[], Any]:
    out = np.zeros((len(x), len(arrays.projection)), x.dtype)
    return lambda: np.matmul(x, arrays.projection.T, out=out)


def _torch_formula(x: Any, arrays: _Map, antithetic: bool) -> Any:
    """Return the formula on tensors: one call of addmm, and the row terms."""
    import torch

    projection, bias, diagonal, factor, shift, linear = (
        None if a is None else torch.from_numpy(a) for a in arrays
    )
    z = x if shift is None else x - shift
    term = z.new_zeros(len(z))
    if diagonal is not None:
        term = term - z.square() @ diagonal / 2
    if factor is not None:
        term = term - (z @ factor.T).square().sum(1) / 2
    if linear is not None:
        term = term + z @ linear
    product = z @ projection.T
    if antithetic:
        product = torch.cat([product, -product], 1)
        bias = bias.expand(len(projection)).repeat(2)
    return product + bias + term[:, None]


def _torch(x: Any, arrays: _Map, antithetic: bool) -> Callable[[], Any]:
    import torch

    a = torch.from_numpy(x)
    return lambda: _torch_formula(a, arrays, antithetic).numpy()


def _sklearn(x: Any) -> Callable[[], Any]:
    from sklearn.kernel_approximation import RBFSampler

    sampler = RBFSampler(gamma=0.5, n_components=_COMPONENTS, random_state=0).fit(x)
    return lambda: (sampler.transform(x), sampler)


def _check_sklearn(x: Any) -> Callable[[Any], Check]:
    """Another feature map, held to its own formula."""
    rows = _some(len(x))

    def check(result: Any) -> Check:
        features, sampler = result
        angle = x[rows].astype(float) @ sampler.random_weights_ + sampler.random_offset_
        truth = math.sqrt(2 / _COMPONENTS) * np.cos(angle)
        error = np.abs(features[rows] - truth).max() * math.sqrt(_COMPONENTS / 2)
        size = np.abs(x[rows]) @ np.abs(sampler.random_weights_)
        tolerance = 4 * EPS32 * math.sqrt(x.shape[1]) * float(size.max() + 2 * math.pi)
        return Check(float(error), tolerance, "cosines, of another seed")

    return check


_FAMILIES = (("csderf", False), ("csderf", True), ("cderf", True))


def _problems(options: Options) -> Iterable[tuple[str, Any, Any, _Map, bool]]:
    """Return sizes, rows, a fitted estimator and its map of keys.

    "csderf" has a rotation, so that its quadratic form is diagonal; "cderf", of queries
    and keys that differ, has a full one.
    """
    for n, d in options.grid((65536,), (64,)):
        x = _data(n, d)
        others = _data(max(512, 4 * d), d, seed=1)
        for family, antithetic in _FAMILIES:
            two = {"keys": others} if family == "cderf" else {}
            fitted = _fitted(x, family=family, antithetic=antithetic, **two)
            arrays = _Map.of(fitted.key_map_)
            pairs = ", pairs" if antithetic else ""
            name = f"{n}x{d} -> {_COMPONENTS} {family}{pairs} float32"
            yield name, x, fitted, arrays, antithetic


def _work(x: Any, arrays: _Map) -> float:
    """Multiply-adds, twice, of the products with the projection and the factor."""
    factor = 0 if arrays.factor is None else len(arrays.factor)
    return 2.0 * x.size * (len(arrays.projection) + factor)


@register("log_features")
def log_features(options: Options) -> Iterable[Case]:
    """Log-features of keys, 65536 x 64 -> 256, float32: NumPy, torch, RBFSampler."""
    for name, x, fitted, arrays, antithetic in _problems(options):
        given = (x, arrays, antithetic)
        work = _work(x, arrays)
        yield Case(
            name,
            [
                Peer("subquad", lambda a=given: _kernel(*a)),
                Peer(
                    "subquad log_key_features",
                    lambda f=fitted, x=x: lambda: f.log_key_features(x),
                ),
                Peer("numpy x @ w.T and row terms", lambda a=given: _numpy(*a)),
                Peer(
                    "numpy x @ w.T alone",
                    lambda x=x, a=arrays: _matmul(x, a),
                    check=_unchecked("the product alone"),
                    limit={},
                ),
                Peer("torch", lambda a=given: _torch(*a)),
                Peer(
                    "sklearn RBFSampler.transform",
                    lambda x=x: _sklearn(x),
                    check=_check_sklearn(x),
                    limit={},
                ),
            ],
            _check_log_features(*given),
            limit=_limit(options.rates, work, 4.0 * (x.size + len(x) * _COMPONENTS)),
            overlap=True,
            work=work,
            values={"n": len(x), "d": x.shape[1], "m": _COMPONENTS},
        )


def _kernel_vjp(grad: Any, x: Any, arrays: _Map, antithetic: bool) -> Callable[[], Any]:
    from subquad import _core

    (n, d), m = x.shape, len(arrays.projection)
    grad_x = np.zeros_like(x)
    r = 0 if arrays.factor is None else len(arrays.factor)
    size = _core.log_features_vjp_workspace(1, n, m, d, r, x.itemsize, 0)
    scratch = np.zeros(size, np.uint8)
    projection, _, *rest = arrays

    def call() -> Any:
        _core.log_features_vjp(
            grad, x, projection, *rest, antithetic, grad_x, scratch, 0
        )
        return grad_x

    return call


def _torch_vjp(grad: Any, x: Any, arrays: _Map, antithetic: bool) -> Callable[[], Any]:
    """The reverse alone: the forward is kept."""
    import torch

    a = torch.from_numpy(x).requires_grad_()
    g = torch.from_numpy(grad)
    out = _torch_formula(a, arrays, antithetic)
    return lambda: torch.autograd.grad(out, a, g, retain_graph=True)[0].numpy()


def _check_log_features_vjp(
    grad: Any, x: Any, arrays: _Map, antithetic: bool
) -> Callable[[Any], Check]:
    rows = _some(len(x))

    def check(result: Any) -> Check:
        wide = _Map(*(None if a is None else a.astype(float) for a in arrays))
        g = grad[rows].astype(float)
        h, size = g, np.abs(g)
        if antithetic:
            h = g[:, : len(wide.projection)] - g[:, len(wide.projection) :]
            size = size[:, : len(wide.projection)] + size[:, len(wide.projection) :]
        z = x[rows].astype(float)
        z = z if wide.shift is None else z - wide.shift
        slope, bound = np.zeros_like(z), np.zeros_like(z)
        if wide.linear is not None:
            slope, bound = slope + wide.linear, bound + np.abs(wide.linear)
        if wide.diagonal is not None:
            slope, bound = slope - wide.diagonal * z, bound + np.abs(wide.diagonal * z)
        if wide.factor is not None:
            slope = slope - z @ wide.factor.T @ wide.factor
            bound = bound + np.abs(z) @ np.abs(wide.factor).T @ np.abs(wide.factor)
        truth = h @ wide.projection + g.sum(axis=1)[:, None] * slope
        size = size @ np.abs(wide.projection) + np.abs(g).sum(axis=1)[:, None] * bound
        error = np.abs(np.asarray(result)[rows] - truth) / size
        terms = math.sqrt(g.shape[1] + x.shape[1])
        return Check(float(error.max()), 4 * EPS32 * terms, "of the sum of all sizes")

    return check


@register("log_features_vjp")
def log_features_vjp(options: Options) -> Iterable[Case]:
    """The reverse of log-features through the rows, float32: torch's reverse alone."""
    for name, x, _, arrays, antithetic in _problems(options):
        grad = np.random.default_rng(2).standard_normal(
            (len(x), _COMPONENTS), np.float32
        )
        given = (grad, x, arrays, antithetic)
        # The reverse of the form goes through the factor twice.
        work = 2.0 * _work(x, arrays) - 2.0 * x.size * len(arrays.projection)
        yield Case(
            name,
            [
                Peer("subquad", lambda a=given: _kernel_vjp(*a)),
                Peer("torch autograd", lambda a=given: _torch_vjp(*a)),
            ],
            _check_log_features_vjp(*given),
            limit=_limit(options.rates, work, 4.0 * (2 * x.size + grad.size)),
            overlap=True,
            work=work,
            values={"n": len(x), "d": x.shape[1], "m": _COMPONENTS},
        )


# ------------------------------------------------------------ trigonometric features


def _kernel_trigonometric(x: Any, arrays: _Map) -> Callable[[], Any]:
    from subquad import _core

    (n, d), m = x.shape, len(arrays.projection)
    out = np.zeros((n, 2 * m), x.dtype)
    r = 0 if arrays.factor is None else len(arrays.factor)
    size = _core.log_features_workspace(1, n, m, d, r, x.itemsize, 0)
    scratch = np.zeros(size, np.uint8)

    def call() -> Any:
        _core.trigonometric_features(x, *arrays, out, scratch, 0)
        return out

    return call


def _torch_trigonometric(x: Any, arrays: _Map) -> Callable[[], Any]:
    import torch

    a = torch.from_numpy(x)
    projection = torch.from_numpy(arrays.projection)
    m = len(projection)
    out = torch.zeros(len(a), 2 * m)

    def call() -> Any:
        _, term = arrays.row_terms(x)
        z = a if arrays.shift is None else a - torch.from_numpy(arrays.shift)
        angle = z @ projection.T
        torch.cos(angle, out=out[:, :m])
        torch.sin(angle, out=out[:, m:])
        scale = torch.from_numpy(np.exp(term[:, None] + arrays.bias))
        out.mul_(scale.expand(-1, m).repeat(1, 2))
        return out.numpy()

    return call


def _check_trigonometric(x: Any, arrays: _Map) -> Callable[[Any], Check]:
    rows = _some(len(x))

    def check(result: Any) -> Check:
        wide = _Map(*(None if a is None else a.astype(float) for a in arrays))
        z, term = wide.row_terms(x[rows].astype(float))
        angle = z @ wide.projection.T
        scale = np.exp(term[:, None] + wide.bias) * np.ones_like(angle)
        truth = np.concatenate([scale * np.cos(angle), scale * np.sin(angle)], axis=1)
        # An angle is known as any product, and so is the logarithm of the scale.
        size = 2 + arrays.truth(x[rows], antithetic=False)[1]
        bound = np.tile(scale * size, 2)
        error = np.abs(np.asarray(result)[rows].astype(float) - truth) / bound
        tolerance = 4 * EPS32 * math.sqrt(x.shape[1])
        return Check(float(error.max()), tolerance, "of scale times angle")

    return check


@register("trigonometric_features")
def trigonometric_features(options: Options) -> Iterable[Case]:
    """Cosines and sines, 65536 x 64 -> 256, float32: torch, RBFSampler."""
    for n, d in options.grid((65536,), (64,)):
        x = _data(n, d)
        fitted = _fitted(x, family="trigonometric", kernel="gaussian")
        arrays = _Map.of(fitted.key_map_)
        given = (x, arrays)
        work = _work(x, arrays)
        # A sine and its cosine share what is costly, and count as one exponential.
        turns = float(n * len(arrays.projection))
        moved = 4.0 * (x.size + n * _COMPONENTS)
        yield Case(
            f"{n}x{d} -> {_COMPONENTS} float32",
            [
                Peer("subquad", lambda a=given: _kernel_trigonometric(*a)),
                Peer("torch", lambda a=given: _torch_trigonometric(*a)),
                Peer(
                    "sklearn RBFSampler.transform",
                    lambda x=x: _sklearn(x),
                    check=_check_sklearn(x),
                    limit={},
                ),
            ],
            _check_trigonometric(*given),
            limit=_limit(options.rates, work, moved, turns),
            overlap=True,
            work=work,
            values={"n": n, "d": d, "m": _COMPONENTS},
        )


# ------------------------------------------------------------------ Walsh and Hadamard


def _kernel_hadamard(x: Any) -> Callable[[], Any]:
    from subquad import _core

    out = np.zeros_like(x)
    size = _core.hadamard_transform_workspace(len(x), x.shape[1], x.itemsize, 0)
    scratch = np.zeros(size, np.uint8)

    def call() -> Any:
        _core.hadamard_transform(x, out, scratch, 0)
        return out

    return call


def _scipy_hadamard(x: Any) -> Callable[[], Any]:
    from scipy.linalg import hadamard

    matrix = hadamard(x.shape[1], dtype=np.int8).astype(x.dtype)
    out = np.zeros_like(x)
    return lambda: np.matmul(x, matrix, out=out)


def _numpy_butterflies(x: Any) -> Callable[[], Any]:
    n, d = x.shape
    buffers = np.zeros((2, *x.shape), x.dtype)

    def call() -> Any:
        source, turn, step = x, 0, 1
        while step < d:
            a = source.reshape(n, d // (2 * step), 2, step)
            b = buffers[turn].reshape(a.shape)
            np.add(a[:, :, 0], a[:, :, 1], out=b[:, :, 0])
            np.subtract(a[:, :, 0], a[:, :, 1], out=b[:, :, 1])
            source, turn, step = buffers[turn], 1 - turn, 2 * step
        return source

    return call


def _torch_copy(x: Any) -> Callable[[], Any]:
    """What every transform must do at least; torch's is threaded."""
    import torch

    a = torch.from_numpy(x)
    out = torch.zeros_like(a)
    return lambda: out.copy_(a).numpy()


def _check_hadamard(x: Any) -> Callable[[Any], Check]:
    rows = _some(len(x), 16)

    def check(result: Any) -> Check:
        truth = x[rows].astype(float)
        n, d = truth.shape
        step = 1
        while step < d:
            a = truth.reshape(n, -1, 2, step)
            truth = np.stack([a[:, :, 0] + a[:, :, 1], a[:, :, 0] - a[:, :, 1]], axis=2)
            truth, step = truth.reshape(n, d), 2 * step
        # Every level rounds sums that are at most the sum of all sizes.
        size = np.abs(x[rows]).astype(float).sum(axis=1, keepdims=True)
        error = np.abs(np.asarray(result)[rows] - truth) / size
        levels = max(1.0, math.log2(d))
        return Check(float(error.max()), EPS32 * levels, "of the sum of all sizes")

    return check


@register("hadamard_transform")
def hadamard_transform(options: Options) -> Iterable[Case]:
    """Walsh-Hadamard transforms of rows, float32: a product, butterflies, a copy."""
    sizes = [(s.n, 2 ** int(math.log2(s.d or 256))) for s in options.sizes]
    for rows, d in sizes or [(2**24 // d, d) for d in (64, 256, 1024, 4096)]:
        x = np.random.default_rng(0).standard_normal((rows, d), np.float32)
        levels = math.log2(d)
        check = _check_hadamard(x)
        yield Case(
            f"{rows}x{d} float32",
            [
                Peer("subquad", lambda x=x: _kernel_hadamard(x)),
                Peer(
                    "copy",
                    lambda x=x: _torch_copy(x),
                    check=_unchecked("a copy"),
                    limit={},
                ),
                Peer(
                    "scipy hadamard, numpy matmul",
                    lambda x=x: _scipy_hadamard(x),
                    check=_loose(check, "of the sum of all sizes; d roundings"),
                ),
                Peer("numpy butterflies", lambda x=x: _numpy_butterflies(x)),
            ],
            check,
            # An addition takes the place of a multiply-add, which counts as two.
            limit=_limit(options.rates, 2.0 * x.size * levels, 8.0 * x.size),
            overlap=True,
            work=x.size * levels,
            values={"n": rows, "d": d},
        )


# ---------------------------------------------------------------------- attention

_D_V = 64


def _attention_rows(log_q: Any, log_k: Any, v: Any, rows: Any) -> Any:
    """Return some rows of causal attention over log-features in float64."""
    found = []
    for t in rows:
        score = log_q[t] + log_k[: t + 1]
        weight = np.exp(score - score.max()).sum(axis=1)
        found.append(weight @ v[: t + 1] / weight.sum())
    return np.array(found)


def _softmax_rows(q: Any, k: Any, v: Any, rows: Any) -> Any:
    found = []
    for t in rows:
        score = k[: t + 1] @ q[t] / math.sqrt(q.shape[1])
        weight = np.exp(score - score.max())
        found.append(weight @ v[: t + 1] / weight.sum())
    return np.array(found)


class _Attention:
    """Queries and keys in axes of their own, values that vary slowly, a fitted map."""

    def __init__(self, n: int, d: int, family: str, antithetic: bool) -> None:
        # A score is q . k / sqrt(d), so that rows of this size give those of the data.
        scale = np.float32(d**0.25)
        self.q, self.k = scale * _data(n, d, 0), scale * _data(n, d, 1)
        time_of = np.arange(n)[:, None] / n
        waves = np.random.default_rng(2).uniform(0, 20, (2, _D_V))
        self.v = np.cos(waves[0] * time_of + waves[1]).astype(np.float32)
        # Fitted on other rows of the same distribution: attention never fits.
        calibration = [scale * _data(4096, d, seed) for seed in (0, 1)]
        self.features = _fitted(
            calibration[0],
            calibration[1],
            family=family,
            antithetic=antithetic,
            scale=d**-0.5,
        )
        self.rows = _some(n, 16)

    def call(self) -> Callable[[], Any]:
        import subquad

        arrays = (self.q, self.k, self.v, self.features)
        return lambda: subquad.random_feature_attention(*arrays, causal=True)

    def performer(self) -> Callable[[], Any]:
        """With the same projection, in the layout of the package."""
        import torch

        with contextlib.redirect_stdout(io.StringIO()):
            from performer_pytorch import FastAttention

            d = self.q.shape[1]
            layer = FastAttention(d, _COMPONENTS, causal=True)
        q, k, v = (torch.from_numpy(a)[None, None] for a in (self.q, self.k, self.v))

        def call() -> Any:
            with torch.no_grad():
                return layer(q, k, v)[0, 0].numpy()

        return call

    def torch_softmax(self) -> Callable[[], Any]:
        import torch

        q, k, v = (torch.from_numpy(a)[None, None] for a in (self.q, self.k, self.v))
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(q, k, v, is_causal=True)[0, 0].numpy()

    def check(self, result: Any) -> Check:
        wide_q, wide_k = self.q.astype(float), self.k.astype(float)
        log_q = self.features.log_query_features(wide_q)
        log_k = self.features.log_key_features(wide_k)
        truth = _attention_rows(log_q, log_k, self.v.astype(float), self.rows)
        error = np.abs(np.asarray(result)[self.rows] - truth).max()
        # Logarithms off by e: weights are off by e, outputs by 2 e max |v|.
        size = sum(
            float(
                _Map.of(side, float).truth(rows[self.rows], antithetic=False)[1].max()
            )
            for side, rows in (
                (self.features.query_map_, wide_q),
                (self.features.key_map_, wide_k),
            )
        )
        tolerance = 2 * 4 * EPS32 * math.sqrt(self.q.shape[1]) * size + 2e-6
        return Check(float(error / np.abs(self.v).max()), tolerance, "of max |v|")

    def measure(self, _: str, result: Any) -> dict[str, float]:
        """Return how far every peer is from softmax attention, root mean square."""
        arrays = (a.astype(float) for a in (self.q, self.k, self.v))
        truth = _softmax_rows(*arrays, self.rows)
        error = np.asarray(result)[self.rows] - truth
        return {"softmax_error": float(np.sqrt(np.square(error).mean()))}


def _attention_flops(n: int, m: int, d_v: int, tile: int = 32) -> float:
    """Multiply-adds twice: state in, state out, and a triangle of `tile` tokens."""
    return n * (4.0 * m * d_v + tile * (m + d_v))


def _softmax_errors(rows: list[Row]) -> list[str]:
    """Say how far from softmax attention each peer is."""
    return [
        f"{row['case']}, {row['peer']}: rms difference from softmax attention "
        f"{row['values']['softmax_error']:.2g}"
        for row in rows
        if "softmax_error" in row["values"]
    ]


@register("random_feature_attention", summary=_softmax_errors)
def random_feature_attention(options: Options) -> Iterable[Case]:
    """Causal attention by 256 features, d = d_v = 64: performer-pytorch, softmax."""
    other = _unchecked("another estimate, for its time")
    for n, d in options.grid((8192,), (64,)):
        for family, antithetic in (("cderf", True), ("positive", False)):
            problem = _Attention(n, d, family, antithetic)
            pairs = 2 if antithetic else 1
            product = 2 * 2.0 * n * d * _COMPONENTS / pairs
            if family == "cderf":
                product += 2 * 2.0 * n * d * d
            work = product + _attention_flops(n, _COMPONENTS, _D_V)
            moved = 4.0 * n * (2 * d + 2 * _D_V)
            yield Case(
                f"n={n} {family}{', pairs' if antithetic else ''} float32",
                [
                    Peer("subquad", problem.call),
                    Peer("performer-pytorch", problem.performer, check=other, limit={}),
                    Peer(
                        "torch softmax attention",
                        problem.torch_softmax,
                        check=other,
                        limit={},
                    ),
                ],
                problem.check,
                limit=_limit(options.rates, work, moved, 2.0 * n * _COMPONENTS),
                overlap=True,
                work=work,
                values={"n": n, "d": d, "d_v": _D_V, "m": _COMPONENTS},
                measure=problem.measure,
            )


_CAUSAL_PRODUCT = """
#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

// q, k (heads, n, m); v, out (heads, n, d); state (heads, m, d); sum (heads, m).
extern "C" void causal_product(const float* q, const float* k, const float* v,
                               float* out, float* state, float* sum, int64_t heads,
                               int64_t n, int64_t m, int64_t d, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t h = 0; h < heads; ++h) {
    float* s = state + h * m * d;
    float* z = sum + h * m;
    std::memset(s, 0, sizeof(float) * m * d);
    std::memset(z, 0, sizeof(float) * m);
    for (int64_t t = h * n; t < (h + 1) * n; ++t) {
      for (int64_t r = 0; r < m; ++r) {
        z[r] += k[t * m + r];
        for (int64_t c = 0; c < d; ++c)
          s[r * d + c] += k[t * m + r] * v[t * d + c];
      }
      float* y = out + t * d;
      float total = 0;
      std::memset(y, 0, sizeof(float) * d);
      for (int64_t r = 0; r < m; ++r) {
        total += q[t * m + r] * z[r];
        for (int64_t c = 0; c < d; ++c) y[c] += q[t * m + r] * s[r * d + c];
      }
      for (int64_t c = 0; c < d; ++c) y[c] /= total;
    }
  }
}
"""


@functools.cache
def _compiled_causal_product() -> Any:
    """Compile the textbook loop for this processor."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise Skip("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "product.cpp", Path(folder) / "product.so"
        source.write_text(_CAUSAL_PRODUCT, encoding="utf-8")
        command = [*compiler.split(), "-O3", "-march=native", "-fopenmp", "-fPIC"]
        done = subprocess.run(
            [*command, "-shared", str(source), "-o", str(library)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Skip(f"the C++ compiler failed: {done.stderr.strip()[-200:]}")
        return ctypes.CDLL(str(library)).causal_product


class _Product:
    """Heads of log-features and values, and features as the peers take them."""

    def __init__(self, heads: int, n: int) -> None:
        generator = np.random.default_rng(0)
        shape = (heads, n, _COMPONENTS)
        self.log_q, self.log_k = generator.standard_normal((2, *shape), np.float32)
        self.v = generator.standard_normal((heads, n, _D_V), np.float32)
        self.rows = _some(n, 16)

    def call(self) -> Callable[[], Any]:
        """The kernel on memory that was touched before."""
        from subquad import _core

        heads, n, m = self.log_q.shape
        y = np.zeros_like(self.v)
        size = _core.linear_attention_workspace(heads, n, n, m, _D_V, 4, True, 0)
        scratch = np.zeros(size, np.uint8)
        inputs = (self.log_k, self.v, self.log_q, *[None] * 5)

        def call() -> Any:
            _core.linear_attention(
                *inputs, True, False, y, None, None, None, scratch, 0
            )
            return y

        return call

    def plain(self, threads: int) -> Callable[[], Any]:
        product = _compiled_causal_product()
        heads, n, m = self.log_q.shape
        q, k, out = np.exp(self.log_q), np.exp(self.log_k), np.zeros_like(self.v)
        state, total = np.zeros((heads, m, _D_V), np.float32), np.zeros(heads * m, "f4")
        arrays = (q, k, self.v, out, state, total)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
        sizes = [ctypes.c_int64(size) for size in (heads, n, m, _D_V)]

        def call(_: Any = arrays) -> Any:
            product(*pointers, *sizes, ctypes.c_int(threads))
            return out

        return call

    def fast_transformers(self) -> Callable[[], Any]:
        """The product of the package, and the normaliser as its layer has it."""
        import torch
        from fast_transformers.causal_product import causal_dot_product

        q, k = (torch.from_numpy(np.exp(a))[None] for a in (self.log_q, self.log_k))
        v = torch.from_numpy(self.v)[None]

        def call() -> Any:
            total = torch.einsum("...nd,...nd->...n", q, k.cumsum(-2))
            return (causal_dot_product(q, k, v) / total[..., None])[0].numpy()

        return call

    def check(self, result: Any) -> Check:
        wide = [a[0].astype(float) for a in (self.log_q, self.log_k, self.v)]
        truth = _attention_rows(*wide, self.rows)
        error = np.abs(np.asarray(result)[0, self.rows] - truth).max()
        return Check(float(error / np.abs(self.v).max()), 2e-6, "of max |v|")


@register("causal_product")
def causal_product(options: Options) -> Iterable[Case]:
    """Causal sums over 256 given features, d_v = 64: plain C++, fast-transformers."""
    for n in tuple(s.n for s in options.sizes) or (8192,):
        for heads in (1, 4):
            problem = _Product(heads, n)
            work = heads * _attention_flops(n, _COMPONENTS, _D_V)
            loose = _loose(problem.check, "of max |v|; not held to 2e-6")
            exp = 2.0 * heads * n * _COMPONENTS
            moved = 4.0 * heads * n * (2 * _COMPONENTS + 2 * _D_V)
            yield Case(
                f"heads={heads} n={n} float32",
                [
                    Peer("subquad", problem.call),
                    Peer(
                        "plain C++ causal product",
                        lambda p=problem: p.plain(options.threads),
                        check=loose,
                    ),
                    Peer("fast-transformers", problem.fast_transformers, check=loose),
                ],
                problem.check,
                limit=_limit(options.rates, work, moved, exp),
                overlap=True,
                work=work,
                values={"heads": heads, "n": n, "m": _COMPONENTS, "d_v": _D_V},
            )


# --------------------------------------------------------------------------- fits

# Seconds of sums, eigendecompositions and the singular value decomposition in NumPy,
# one thread, 4096 rows: what the derivation of these families states.
_STATED = {
    "cderf": {64: 6e-3, 128: 13e-3, 256: 44e-3, 512: 211e-3},
    "csderf": {64: 3.7e-3, 128: 8e-3, 256: 24e-3, 512: 87e-3},
    "csaderf+": {64: 1.7e-3, 128: 3.8e-3, 256: 8e-3, 512: 16e-3},
}
_REGULARIZATION = 1e-3


def _regularized(covariance: Any) -> Any:
    d = len(covariance)
    return covariance + _REGULARIZATION * np.trace(covariance) / d * np.eye(d)


def _closed_form(x: Any, y: Any, family: str) -> Any:
    """Return the scales rho in closed form, in plain NumPy."""
    if family == "csaderf+":
        spread = [a.var(axis=0) for a in (x, y)]
        spread = [s + _REGULARIZATION * s.mean() for s in spread]
        phi = 2 * np.sqrt(spread[0] * spread[1])
    else:
        centred = [a - a.mean(axis=0) for a in (x, y)]
        first, second = (a.T @ a / len(a) for a in centred)
        if family == "csderf":
            phi = np.linalg.eigh(first + second)[0]
        else:
            first, second = _regularized(first), _regularized(second)
            (s, q), (t, r) = np.linalg.eigh(first), np.linalg.eigh(second)
            root = np.sqrt(s)[:, None] * (q.T @ r) * np.sqrt(t)
            u, sigma, _ = np.linalg.svd(root)
            # The basis itself, which the fit has to make as well.
            np.sqrt(sigma)[:, None] * (u.T / np.sqrt(s)) @ q.T
            phi = 2 * sigma
    return 2 / (1 + 2 * phi + np.sqrt((1 + 2 * phi) ** 2 + 8 * phi))


def _check_fit(x: Any, y: Any, family: str) -> Callable[[Any], Check]:
    truth: list[Any] = []

    def check(result: Any) -> Check:
        if not truth:
            truth.append(np.sort(_closed_form(x, y, family)))
        rho = np.sort(np.asarray(getattr(result, "rho_", result), float))
        return Check(float(np.abs(rho - truth[0]).max()), 1e-9, "scales rho")

    return check


def _against_stated(rows: list[Row]) -> list[str]:
    """Compare with the stated times."""
    return [
        f"{row['case']}, {row['peer']}: {row['median'] * 1e3:.3g} ms, "
        f"{row['median'] / row['values']['stated']:.2f} of the "
        f"{row['values']['stated'] * 1e3:.3g} ms stated"
        for row in rows
        if row["median"] and row["values"].get("stated")
    ]


@register("feature_fit", summary=_against_stated)
def feature_fit(options: Options) -> Iterable[Case]:
    """Fits of queries and keys, 4096 rows, float64: the closed form in NumPy."""
    import subquad

    for n, d in options.grid((4096,), (64, 128, 256, 512)):
        x, y = _data(n, d, 0).astype(float), _data(n, d, 1).astype(float)
        for family, stated in _STATED.items():

            def ours(x: Any = x, y: Any = y, family: str = family) -> Any:
                estimator = subquad.RandomFeatures(
                    _COMPONENTS,
                    family=family,
                    regularization=_REGULARIZATION,
                    random_state=0,
                )
                return lambda: estimator.fit(x, keys=y)

            yield Case(
                f"{family} n={n} d={d}",
                [
                    Peer("subquad", ours),
                    Peer(
                        "numpy, closed form alone",
                        lambda x=x, y=y, f=family: lambda: _closed_form(x, y, f),
                    ),
                ],
                _check_fit(x, y, family),
                values={"n": n, "d": d, "stated": stated.get(d) if n == 4096 else None},
            )
