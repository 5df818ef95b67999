"""Sparse factors: products, networks of values, whole blocks, compressed rows."""

from __future__ import annotations

import functools
import math
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.machine import Rates, seconds
from benchmarks.registry import Case, Check, Options, Peer, Row, Skip, register

EPS32 = float(np.finfo(np.float32).eps)
_SIZES = (4096, 16384)
_BATCH = 4
_D = 64
_KERNEL = 9
_PATTERNS = ("chord", "cdil")
# What `residual` is called in the kernels: each factor adds what it was applied to.
_STEP = 1
# Of memory that a rate is measured on.
_LARGEST = 2**27


# --------------------------------------------------------------------------- limits


def copy_rate(rates: Rates, moved: float) -> float:
    """Return bytes per second of a copy that reads and writes `moved` bytes in all.

    In the caches where as much memory is: the sizes are powers of two.
    """
    size = _power_of_two(moved / 2)
    key = f"copy {size / 2**20:g} MiB"
    if key not in rates.measured:
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        call: Callable[[], Any] = lambda: np.copyto(target, source)  # noqa: E731
        try:
            import torch
        except ImportError:
            pass
        else:
            a, b = torch.from_numpy(source), torch.from_numpy(target)
            call = lambda: b.copy_(a)  # noqa: E731
        rates.measured[key] = 2.0 * size / _quickest(call, 1e9 / size)
    rate = rates.measured[key]
    assert rate is not None
    return rate


def read_rate(rates: Rates, size: float) -> float:
    """Return bytes per second that all threads read from `size` bytes, each its own.

    By sums of products, which wait for memory alone.
    """
    count = _power_of_two(size) // 8
    key = f"read {count / 2**17:g} MiB"
    if key not in rates.measured:
        import threadpoolctl

        repeats = max(2, int(1e8 / (8 * count)))
        arrays = np.ones((rates.threads, 2, count), np.float32)

        def work(a: Any) -> None:
            for _ in range(repeats):
                np.dot(a[0], a[1])

        def everybody() -> None:
            workers = [threading.Thread(target=work, args=(a,)) for a in arrays]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

        with threadpoolctl.threadpool_limits(1):
            quickest = _quickest(everybody, 1)
        rates.measured[key] = 8.0 * count * rates.threads * repeats / quickest
    rate = rates.measured[key]
    assert rate is not None
    return rate


def _power_of_two(size: float) -> int:
    return min(_LARGEST, 2 ** max(16, int(math.log2(max(size, 1)))))


def _quickest(call: Callable[[], Any], repeats: float) -> float:
    """Return the shortest of a few times of a call, in blocks of a few calls."""
    count = max(1, min(20, int(repeats / 20)))
    times = []
    for _ in range(12):
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count)
    return min(times)


def _limit(rates: Rates, flops: float, moved: float) -> dict[str, float | None]:
    """Return the parts of a limit; they overlap, so that the larger counts."""
    return {
        "arithmetic": seconds(flops, rates.fma_peak(4)),
        "memory": moved / copy_rate(rates, moved),
    }


# --------------------------------------------------------------------------- checks


def _distance(found: Any, truth: Any) -> float:
    """Return the size of a difference over that of the truth, root mean square."""
    difference = np.asarray(found, float) - truth
    return float(np.sqrt(np.square(difference).sum() / np.square(truth).sum()))


def _loose(check: Callable[[Any], Check], note: str) -> Callable[[Any], Check]:
    """Let a peer of another accuracy be timed, and say how far off it is."""
    return lambda result: Check(check(result).error, math.inf, note)


def _called(call: Callable[[], Any]) -> Callable[[], Any]:
    """Compile what is compiled by the first call, before anything is timed."""
    call()
    return call


def _csr(torch: Any, start: Any, columns: Any, data: Any, shape: Any) -> Any:
    """Return torch's compressed rows, without what it says about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(start, columns, data, shape)


def _normal(shape: Sequence[int], seed: int, scale: float = 1.0) -> Any:
    generator = np.random.default_rng(seed)
    return np.float32(scale) * generator.standard_normal(tuple(shape), np.float32)


# ------------------------------------------------------------------------- products


def offsets_of(pattern: str, n: int) -> tuple[tuple[int, ...], ...]:
    """Return the offsets of ceil(log2 n) factors, in plain Python."""
    n_factors = max(1, math.ceil(math.log2(n)))
    if pattern == "chord":
        return ((0, *(2**k for k in range(n_factors))),) * n_factors
    links = range(1, _KERNEL // 2 + 1)
    row = (0, *links, *(-link for link in links))
    return tuple(tuple(o * 2**m for o in row) for m in range(n_factors))


def _true_products(values: Any, x: Any, offsets: Any) -> list[Any]:
    """Return v_0 ... v_M of one sequence in float64: v + W v, factor by factor."""
    found = [x.astype(float)]
    for rows, weights in zip(offsets, values, strict=True):
        v = found[-1]
        y = v.copy()
        for k, offset in enumerate(rows):
            y += weights[:, k, None].astype(float) * np.roll(v, -offset, 0)
        found.append(y)
    return found


def _true_reverse(
    grad: Any, values: Any, kept: list[Any], offsets: Any
) -> tuple[Any, Any]:
    """Return the gradients of values and x of one sequence in float64."""
    g, grad_values = grad.astype(float), np.zeros(values.shape)
    for m in reversed(range(len(offsets))):
        back = g.copy()
        for k, offset in enumerate(offsets[m]):
            weights = values[m, :, k, None].astype(float)
            rolled = np.roll(kept[m], -offset, 0)
            grad_values[m, :, k] = np.einsum("ic,ic->i", g, rolled)
            back += np.roll(weights * g, offset, 0)
        g = back
    return grad_values, g


def rolled(torch: Any, values: Any, x: Any, offsets: Any) -> Any:
    """The product by torch.roll, one term at a time."""
    v = x
    for m, rows in enumerate(offsets):
        y = v
        for k, offset in enumerate(rows):
            y = y + values[:, m, :, k, None] * torch.roll(v, -offset, 1)
        v = y
    return v


class _Chain:
    """Values, rows and a gradient, and everybody's way to their product."""

    def __init__(self, pattern: str, batch: int, n: int, d: int) -> None:
        self.pattern = pattern
        self.offsets = offsets_of(pattern, n)
        self.flat = np.array(self.offsets, np.int64).ravel()
        # Batch, factors, rows, terms of a row, channels.
        self.sizes = (batch, len(self.offsets), n, len(self.offsets[0]), d)
        self._truth: dict[str, Any] = {}

    @functools.cached_property
    def values(self) -> Any:
        # About the size that freshly initialised networks give them.
        return _normal(self.sizes[:4], 0, 0.2)

    @functools.cached_property
    def x(self) -> Any:
        batch, _, n, _, d = self.sizes
        return _normal((batch, n, d), 1)

    @functools.cached_property
    def grad(self) -> Any:
        batch, _, n, _, d = self.sizes
        return _normal((batch, n, d), 2)

    @property
    def name(self) -> str:
        """The name of a case."""
        batch, _, n, k, d = self.sizes
        return f"{self.pattern} n={n} K={k} batch={batch} d={d} float32"

    # ---- what it costs at least

    @property
    def flops(self) -> float:
        """Multiply-adds, twice."""
        batch, n_factors, n, k, d = self.sizes
        return 2.0 * batch * n_factors * n * k * d

    @property
    def fused_bytes(self) -> float:
        """Values once, rows in and out once."""
        batch, n_factors, n, k, d = self.sizes
        return 4.0 * batch * n * (n_factors * k + 2 * d)

    @property
    def kept_bytes(self) -> float:
        """Rows in and out of every factor."""
        batch, n_factors, n, k, d = self.sizes
        return 4.0 * batch * n * n_factors * (k + 2 * d)

    @property
    def reverse_bytes(self) -> float:
        """Values, rows and gradients in, the gradients of both out."""
        batch, n_factors, n, k, d = self.sizes
        return 4.0 * batch * n * n_factors * (2 * k + 3 * d)

    @property
    def gathered_bytes(self) -> float:
        """A row for every term of a factor."""
        batch, _, n, k, d = self.sizes
        return 4.0 * batch * n * k * d

    def values_of_case(self) -> dict[str, Any]:
        """Return what belongs to the case."""
        batch, n_factors, n, k, d = self.sizes
        return {
            "n": n,
            "batch": batch,
            "factors": n_factors,
            "k": k,
            "d": d,
            "pattern": self.pattern,
        }

    # ---- subquad

    def kernel(self, *, keep: bool = False) -> Callable[[], Any]:
        """The kernel on memory that was touched before."""
        from subquad import _core

        batch, n_factors, n, k, d = self.sizes
        out = np.zeros_like(self.x)
        kept = np.zeros((batch, n_factors - 1, n, d), np.float32) if keep else None
        size = _core.sparse_factor_product_workspace(batch, n_factors, n, k, d, 4, 0)
        scratch = np.zeros(size, np.uint8)

        def call() -> Any:
            _core.sparse_factor_product(
                self.values, self.x, None, self.flat, _STEP, True, False,
                out, kept, scratch, 0,
            )  # fmt: skip
            return out

        return call

    def kernel_training(self, *, recompute: bool = False) -> Callable[[], Any]:
        """Forward and reverse on memory that was touched before."""
        from subquad import _core

        batch, n_factors, n, k, d = self.sizes
        out, grad_x = np.zeros_like(self.x), np.zeros_like(self.x)
        grad_values = np.zeros_like(self.values)
        kept = None if recompute else np.zeros((batch, n_factors - 1, n, d), np.float32)
        sizes = (batch, n_factors, n, k, d, 4)
        forward = _core.sparse_factor_product_workspace(*sizes, 0)
        reverse = _core.sparse_factor_product_vjp_workspace(*sizes, recompute, 0)
        scratch = np.zeros(max(forward, reverse), np.uint8)

        def call() -> Any:
            _core.sparse_factor_product(
                self.values, self.x, None, self.flat, _STEP, True, False,
                out, kept, scratch, 0,
            )  # fmt: skip
            _core.sparse_factor_product_vjp(
                self.grad, self.values, self.x, None, kept, self.flat, _STEP, True,
                grad_values, grad_x, scratch, 0,
            )  # fmt: skip
            return grad_values, grad_x

        return call

    def public(self) -> Callable[[], Any]:
        import subquad

        def call() -> Any:
            return subquad.sparse_factor_product(
                self.values, self.x, pattern=self.pattern, residual="step"
            )

        return call

    def one_thread(self) -> Callable[[], Any]:
        import subquad

        kernel = self.kernel()

        def call() -> Any:
            with subquad.num_threads(1):
                return kernel()

        return call

    # ---- torch

    def ours(self, torch: Any, values: Any, x: Any) -> Any:
        """The product through torch's registered operators."""
        del torch
        import subquad

        return subquad.sparse_factor_product(
            values, x, pattern=self.pattern, residual="step"
        )

    def rolled(self, torch: Any, values: Any, x: Any) -> Any:
        """The product by torch.roll."""
        return rolled(torch, values, x, self.offsets)

    def gathered(self, torch: Any, values: Any, x: Any) -> Any:
        """The published formulation: gather, multiply, scatter, factor by factor."""
        batch, _, n, k, d = self.sizes
        rows = torch.arange(n).repeat_interleave(k)
        target = rows[None, :, None].expand(batch, n * k, d)
        v = x
        for m, offsets in enumerate(self.offsets):
            columns = (torch.arange(n)[:, None] + torch.tensor(offsets)) % n
            terms = v.index_select(1, columns.ravel())
            terms = terms * values[:, m].reshape(batch, n * k, 1)
            v = v + torch.zeros_like(v).scatter_add(1, target, terms)
        return v

    def compiled(self) -> Callable[..., Any]:
        """Return the product by torch.roll through torch.compile, made anew."""
        import torch

        if shutil.which("c++") is None and shutil.which("g++") is None:
            raise Skip("no C++ compiler")
        # It gives up on a function after it was compiled for a few sizes.
        torch._dynamo.reset()
        function = torch.compile(
            lambda values, x: rolled(torch, values, x, self.offsets), dynamic=False
        )
        return lambda _, values, x: function(values, x)

    def inference(self, formula: Callable[..., Any]) -> Callable[[], Any]:
        """Return a call that keeps nothing."""
        import torch

        values, x = torch.from_numpy(self.values), torch.from_numpy(self.x)

        def call() -> Any:
            with torch.no_grad():
                return formula(torch, values, x).numpy()

        return call

    def recorded(self, formula: Callable[..., Any]) -> Callable[[], Any]:
        """Return a call that keeps what its reverse needs."""
        import torch

        values = torch.from_numpy(self.values).requires_grad_()
        x = torch.from_numpy(self.x).requires_grad_()

        def call() -> Any:
            return formula(torch, values, x).detach().numpy()

        return call

    def training(self, formula: Callable[..., Any]) -> Callable[[], Any]:
        """Return a forward and its reverse."""
        import torch

        values = torch.from_numpy(self.values).requires_grad_()
        x = torch.from_numpy(self.x).requires_grad_()
        grad = torch.from_numpy(self.grad)

        def call() -> Any:
            y = formula(torch, values, x)
            return [a.numpy() for a in torch.autograd.grad(y, (values, x), grad)]

        return call

    def csr(self) -> Callable[[], Any]:
        """Each factor as a matrix of compressed rows, the batches on its diagonal."""
        import torch

        batch, n_factors, n, k, d = self.sizes
        start = torch.arange(0, batch * n * k + 1, k, dtype=torch.int32)
        base = n * torch.arange(batch, dtype=torch.int32)[:, None, None]
        x = torch.from_numpy(self.x).reshape(batch * n, d)
        matrices = []
        for m in range(n_factors):
            columns = torch.arange(n)[:, None] + torch.tensor(self.offsets[m])
            columns = (columns % n).to(torch.int32) + base
            data = torch.from_numpy(self.values[:, m].reshape(-1))
            matrices.append(_csr(torch, start, columns.ravel(), data, (batch * n,) * 2))

        def call() -> Any:
            v = x
            for matrix in matrices:
                v = torch.addmm(v, matrix, v)
            return v.reshape(batch, n, d).numpy()

        return call

    # ---- checks, of the last sequence

    def check(self, result: Any) -> Check:
        """Compare some channels, which do not depend on each other."""
        channels = slice(None, None, max(1, self.x.shape[-1] // 4))
        if "product" not in self._truth:
            x = self.x[-1][:, channels]
            self._truth["product"] = _true_products(self.values[-1], x, self.offsets)
        truth = self._truth["product"][-1]
        found = np.asarray(result)[-1][:, channels]
        _, n_factors, _, k, _ = self.sizes
        # The roundings of a factor are independent, and grow as the rows do.
        tolerance = EPS32 * math.sqrt(n_factors * (k + 1))
        return Check(_distance(found, truth), tolerance, "root mean square, relative")

    def check_training(self, result: Any) -> Check:
        """Compare both gradients."""
        if "reverse" not in self._truth:
            kept = _true_products(self.values[-1], self.x[-1], self.offsets)
            self._truth["reverse"] = _true_reverse(
                self.grad[-1], self.values[-1], kept, self.offsets
            )
        _, n_factors, _, k, d = self.sizes
        error = max(
            _distance(found[-1], truth)
            for found, truth in zip(result, self._truth["reverse"], strict=True)
        )
        tolerance = EPS32 * math.sqrt(n_factors * (k + 1) + d)
        return Check(error, tolerance, "root mean square, relative")


def _chains(options: Options) -> Iterable[_Chain]:
    for n, d in options.grid(_SIZES, (_D,)):
        for pattern in _PATTERNS:
            for batch in (_BATCH, 1):
                yield _Chain(pattern, batch, n, d)


def _compiled(
    c: _Chain, run: Callable[[Callable[..., Any]], Callable[[], Any]]
) -> list[Peer]:
    """Return the compiled peer of a batch: compiling takes up to a minute a case."""
    if c.sizes[0] == 1:
        return []
    return [Peer("torch.compile roll", lambda: _called(run(c.compiled())))]


@register("sparse_factor_product")
def sparse_factor_product(options: Options) -> Iterable[Case]:
    """Products of sparse factors, nothing kept: roll, compiled, gather-scatter, CSR."""
    for c in _chains(options):
        peers = [
            Peer("subquad", lambda c=c: c.kernel()),
            Peer("subquad sparse_factor_product", lambda c=c: c.public()),
        ]
        if options.threads > 1:
            peers.append(
                Peer("subquad one thread", lambda c=c: c.one_thread(), limit={})
            )
        peers += [
            *_compiled(c, c.inference),
            Peer("torch CSR", lambda c=c: c.csr()),
            Peer("torch roll", lambda c=c: c.inference(c.rolled)),
            Peer(
                "torch gather, scatter",
                lambda c=c: c.inference(c.gathered),
                bytes_needed=3 * c.gathered_bytes,
            ),
        ]
        yield Case(
            c.name,
            peers,
            c.check,
            limit=_limit(options.rates, c.flops, c.fused_bytes),
            overlap=True,
            work=c.flops,
            values=c.values_of_case(),
        )


@register("sparse_factor_product_kept")
def sparse_factor_product_kept(options: Options) -> Iterable[Case]:
    """The same, and what the reverse needs is kept."""
    for c in _chains(options):
        n_factors = c.sizes[1]
        yield Case(
            c.name,
            [
                Peer("subquad", lambda c=c: c.kernel(keep=True)),
                Peer("subquad torch", lambda c=c: c.recorded(c.ours)),
                *_compiled(c, c.recorded),
                Peer(
                    "torch roll",
                    lambda c=c: c.recorded(c.rolled),
                    bytes_needed=3 * n_factors * c.gathered_bytes,
                ),
                Peer(
                    "torch gather, scatter",
                    lambda c=c: c.recorded(c.gathered),
                    bytes_needed=3 * n_factors * c.gathered_bytes,
                ),
            ],
            c.check,
            limit=_limit(options.rates, c.flops, c.kept_bytes),
            overlap=True,
            work=c.flops,
            values=c.values_of_case(),
        )


@register("sparse_factor_product_training")
def sparse_factor_product_training(options: Options) -> Iterable[Case]:
    """Products of sparse factors forward and in reverse, through values and rows."""
    for c in _chains(options):
        recorded = 3 * c.sizes[1] * c.gathered_bytes
        yield Case(
            c.name,
            [
                Peer("subquad", lambda c=c: c.kernel_training()),
                Peer(
                    "subquad recompute", lambda c=c: c.kernel_training(recompute=True)
                ),
                Peer("subquad torch", lambda c=c: c.training(c.ours)),
                *_compiled(c, c.training),
                Peer(
                    "torch roll",
                    lambda c=c: c.training(c.rolled),
                    bytes_needed=recorded,
                ),
                Peer(
                    "torch gather, scatter",
                    lambda c=c: c.training(c.gathered),
                    bytes_needed=recorded,
                ),
            ],
            c.check_training,
            limit=_limit(options.rates, 3 * c.flops, c.kept_bytes + c.reverse_bytes),
            overlap=True,
            work=3 * c.flops,
            values=c.values_of_case(),
        )


# ------------------------------------------------------------------ networks of values


def _gelu(z: Any) -> tuple[Any, Any]:
    """Return GELU and its derivative in float64."""
    from scipy.special import erf

    cumulative = 0.5 * (1 + erf(z / math.sqrt(2)))
    density = np.exp(-np.square(z) / 2) / math.sqrt(2 * math.pi)
    return z * cumulative, cumulative + z * density


def _true_values(x: Any, weights: Any) -> Any:
    """Return values (M, rows, K) in float64."""
    weight_in, bias_in, weight_out, bias_out = (a.astype(float) for a in weights)
    z = x.astype(float) @ weight_in.transpose(0, 2, 1) + bias_in[:, None]
    return _gelu(z)[0] @ weight_out.transpose(0, 2, 1) + bias_out[:, None]


def _true_values_reverse(grad: Any, x: Any, weights: Any) -> Any:
    """Return the gradient of x's rows in float64, from that of values (M, rows, K)."""
    weight_in, bias_in, weight_out, _ = (a.astype(float) for a in weights)
    z = x.astype(float) @ weight_in.transpose(0, 2, 1) + bias_in[:, None]
    return ((grad @ weight_out * _gelu(z)[1]) @ weight_in).sum(axis=0)


def networks(n_factors: int, d: int, h: int, k: int) -> tuple[Any, ...]:
    """Return weights as torch.nn.Linear draws them, stacked."""
    generator = np.random.default_rng(3)

    def layer(rows: int, columns: int) -> tuple[Any, Any]:
        bound = 1 / math.sqrt(columns)
        shapes = (n_factors, rows, columns), (n_factors, rows)
        weight, bias = (generator.uniform(-bound, bound, s) for s in shapes)
        return weight.astype(np.float32), bias.astype(np.float32)

    return *layer(h, d), *layer(k, h)


def _separate(torch: Any, x: Any, weights: Any) -> list[Any]:
    """Return the values of each factor, by networks of its own."""
    functional = torch.nn.functional
    return [
        functional.linear(
            functional.gelu(functional.linear(x, weight_in, bias_in)),
            weight_out,
            bias_out,
        )
        for weight_in, bias_in, weight_out, bias_out in zip(*weights, strict=True)
    ]


class _Networks:
    """Rows, networks, and a gradient of their values."""

    def __init__(self, pattern: str, batch: int, n: int, d: int) -> None:
        self.offsets = offsets_of(pattern, n)
        self.pattern, self.h = pattern, d
        self.shape = (batch, len(self.offsets), n, len(self.offsets[0]))
        self.x_shape = (batch, n, d)

    @functools.cached_property
    def x(self) -> Any:
        return _normal(self.x_shape, 1)

    @functools.cached_property
    def grad(self) -> Any:
        return _normal(self.shape, 2)

    @functools.cached_property
    def weights(self) -> tuple[Any, ...]:
        _, n_factors, _, k = self.shape
        return networks(n_factors, self.x_shape[-1], self.h, k)

    @property
    def name(self) -> str:
        """The name of a case."""
        batch, n_factors, n, k = self.shape
        d = self.x_shape[-1]
        return f"{self.pattern} n={n} M={n_factors} K={k} d=h={d} batch={batch} float32"

    @property
    def flops(self) -> float:
        """Multiply-adds of both layers, twice."""
        batch, n_factors, n, k = self.shape
        return 2.0 * batch * n_factors * n * self.h * (self.x_shape[-1] + k)

    def kernel(self) -> Callable[[], Any]:
        """The kernel on memory that was touched before."""
        from subquad import _core

        batch, n_factors, n, k = self.shape
        sizes = (batch, n_factors, n, self.x_shape[-1], self.h, k, 4, 0)
        out = np.zeros_like(self.grad)
        scratch = np.zeros(_core.factor_values_workspace(*sizes), np.uint8)

        def call() -> Any:
            _core.factor_values(self.x, *self.weights, out, scratch, 0)
            return out

        return call

    def kernel_training(self) -> Callable[[], Any]:
        """Forward and reverse on memory that was touched before."""
        from subquad import _core

        forward = self.kernel()
        batch, n_factors, n, k = self.shape
        sizes = (batch, n_factors, n, self.x_shape[-1], self.h, k, 4, 0)
        scratch = np.zeros(_core.factor_values_vjp_workspace(*sizes), np.uint8)
        found = [np.zeros_like(a) for a in (self.x, *self.weights)]

        def call() -> Any:
            forward()
            _core.factor_values_vjp(
                self.grad, self.x, *self.weights[:3], *found, scratch, 0
            )
            return found

        return call

    def public(self) -> Callable[[], Any]:
        import subquad

        return lambda: subquad.factor_values(self.x, self.weights)

    def torch(self) -> Callable[[], Any]:
        """Networks of their own; their values stay apart."""
        import torch

        x = torch.from_numpy(self.x)
        weights = [torch.from_numpy(a) for a in self.weights]

        def call() -> Any:
            with torch.no_grad():
                return [a.numpy() for a in _separate(torch, x, weights)]

        return call

    def torch_training(self) -> Callable[[], Any]:
        import torch

        x = torch.from_numpy(self.x).requires_grad_()
        weights = [torch.from_numpy(a) for a in self.weights]
        # Parameters of their own, as separate modules have them.
        layers = [[a[m].clone().requires_grad_() for a in weights]
                  for m in range(self.shape[1])]  # fmt: skip
        grads = [torch.from_numpy(self.grad[:, m]) for m in range(self.shape[1])]
        leaves = [x, *(a for layer in layers for a in layer)]

        def call() -> Any:
            values = _separate(torch, x, list(zip(*layers, strict=True)))
            found = torch.autograd.grad(values, leaves, grads)
            return [found[0].numpy()] + [a.numpy() for a in found[1:5]]

        return call

    def training(self) -> Callable[[], Any]:
        """Through torch's registered operators."""
        import torch

        import subquad

        leaves = [torch.from_numpy(a).requires_grad_() for a in (self.x, *self.weights)]
        grad = torch.from_numpy(self.grad)

        def call() -> Any:
            values = subquad.factor_values(leaves[0], tuple(leaves[1:]))
            return [a.numpy() for a in torch.autograd.grad(values, leaves, grad)]

        return call

    def _rows(self) -> Any:
        n = self.x_shape[1]
        return np.unique(np.linspace(0, n - 1, min(n, 64)).astype(int))

    def check(self, result: Any) -> Check:
        """Compare some rows of the last sequence."""
        rows = self._rows()
        truth = _true_values(self.x[-1, rows], self.weights)
        # Separate networks give a list, which has no array to slice.
        found = (
            np.stack([a[-1, rows] for a in result])
            if isinstance(result, list)
            else result[-1][:, rows]
        )
        terms = self.x_shape[-1] + self.h
        tolerance = EPS32 * math.sqrt(terms)
        return Check(_distance(found, truth), tolerance, "root mean square, relative")

    def check_training(self, result: Any) -> Check:
        """Compare rows of the gradient of x, and those of the first network."""
        rows = self._rows()
        grad = self.grad[-1][:, rows].astype(float)
        truth = _true_values_reverse(grad, self.x[-1, rows], self.weights)
        error = _distance(result[0][-1, rows], truth)
        weight_in, bias_in, weight_out, _ = (a[0].astype(float) for a in self.weights)
        x = self.x.reshape(-1, self.x_shape[-1]).astype(float)
        first = self.grad[:, 0].reshape(len(x), -1).astype(float)
        hidden, slope = _gelu(x @ weight_in.T + bias_in)
        between = first @ weight_out * slope
        parts = (between.T @ x, between.sum(0), first.T @ hidden, first.sum(0))
        for found, part in zip(result[1:], parts, strict=True):
            # All factors, or the first one alone.
            alone = found[0] if found.ndim > part.ndim else found
            error = max(error, _distance(alone, part))
        # Sums over rows are of as many terms, whose parts of the threads add up last.
        terms = x.shape[1] + self.h + self.shape[1] * self.shape[3]
        tolerance = EPS32 * math.sqrt(terms + len(x))
        return Check(error, tolerance, "root mean square, relative")


@register("factor_values")
def factor_values(options: Options) -> Iterable[Case]:
    """Values of factors by two-layer networks, float32: torch's separate networks."""
    for n, d in options.grid(_SIZES, (_D,)):
        for pattern in _PATTERNS:
            p = _Networks(pattern, _BATCH, n, d)
            moved = 4.0 * (p.x.size + p.grad.size)
            yield Case(
                p.name,
                [
                    Peer("subquad", lambda p=p: p.kernel()),
                    Peer("subquad factor_values", lambda p=p: p.public()),
                    Peer("torch Linear, GELU, Linear", lambda p=p: p.torch()),
                ],
                p.check,
                limit=_limit(options.rates, p.flops, moved),
                overlap=True,
                work=p.flops,
                values={"n": n, "d": d, "pattern": pattern},
            )


@register("factor_values_training")
def factor_values_training(options: Options) -> Iterable[Case]:
    """The same forward and in reverse, through rows and weights."""
    for n, d in options.grid(_SIZES, (_D,)):
        for pattern in _PATTERNS:
            p = _Networks(pattern, _BATCH, n, d)
            moved = 4.0 * (3 * p.x.size + 2 * p.grad.size)
            yield Case(
                p.name,
                [
                    Peer("subquad", lambda p=p: p.kernel_training()),
                    Peer("subquad torch", lambda p=p: p.training()),
                    Peer("torch Linear, GELU, Linear", lambda p=p: p.torch_training()),
                ],
                p.check_training,
                # The reverse multiplies by both layers twice.
                limit=_limit(options.rates, 3 * p.flops, moved),
                overlap=True,
                work=3 * p.flops,
                values={"n": n, "d": d, "pattern": pattern},
            )


# ---------------------------------------------------------------------- whole blocks


class _Block(_Networks):
    """Networks that make the values, and rows that these mix."""

    def __init__(self, pattern: str, batch: int, n: int, d: int) -> None:
        super().__init__(pattern, batch, n, d)
        self.v, self.grad_y = _normal(self.x_shape, 4), _normal(self.x_shape, 5)
        self._truth: dict[str, Any] = {}

    @property
    def product_flops(self) -> float:
        """Multiply-adds of the products, twice."""
        return 2.0 * math.prod(self.shape) * self.v.shape[-1]

    def call(self) -> Callable[[], Any]:
        import subquad

        def call() -> Any:
            return subquad.paramixer(
                self.x, self.v, self.weights, pattern=self.pattern, residual="step"
            )

        return call

    def ours(self, torch: Any, x: Any, v: Any, weights: Any) -> Any:
        """The block through torch's registered operators."""
        del torch
        import subquad

        return subquad.paramixer(
            x, v, tuple(weights), pattern=self.pattern, residual="step"
        )

    def rolled(self, torch: Any, x: Any, v: Any, weights: Any) -> Any:
        """Networks of their own, and torch.roll."""
        values = torch.stack(_separate(torch, x, weights), 1)
        return rolled(torch, values, v, self.offsets)

    def inference(self, formula: Callable[..., Any]) -> Callable[[], Any]:
        import torch

        x, v = torch.from_numpy(self.x), torch.from_numpy(self.v)
        weights = [torch.from_numpy(a) for a in self.weights]

        def call() -> Any:
            with torch.no_grad():
                return formula(torch, x, v, weights).numpy()

        return call

    def step(self, formula: Callable[..., Any]) -> Callable[[], Any]:
        """Forward, and the reverse through rows and weights."""
        import torch

        arrays = (self.x, self.v, *self.weights)
        x, v, *weights = (torch.from_numpy(a).requires_grad_() for a in arrays)
        grad = torch.from_numpy(self.grad_y)

        def call() -> Any:
            y = formula(torch, x, v, weights)
            found = torch.autograd.grad(y, (x, v, *weights), grad)
            return [a.numpy() for a in found]

        return call

    def _true_block(self) -> tuple[Any, list[Any]]:
        """Values and products of the last sequence."""
        if not self._truth:
            values = _true_values(self.x[-1], self.weights)
            products = _true_products(values, self.v[-1], self.offsets)
            self._truth["block"] = values, products
        found: tuple[Any, list[Any]] = self._truth["block"]
        return found

    @property
    def _tolerance(self) -> float:
        _, n_factors, _, k = self.shape
        d = self.x_shape[-1]
        # The roundings of the values, and those of the products.
        return EPS32 * math.sqrt((d + self.h) + n_factors * (k + 1) + d)

    def check_block(self, result: Any) -> Check:
        """Compare the last sequence."""
        truth = self._true_block()[1][-1]
        error = _distance(np.asarray(result)[-1], truth)
        return Check(error, self._tolerance, "root mean square, relative")

    def check_step(self, result: Any) -> Check:
        """Compare the gradients of v, and of some rows of x."""
        values, kept = self._true_block()
        if "step" not in self._truth:
            grads = _true_reverse(self.grad_y[-1], values, kept, self.offsets)
            rows = self._rows()
            given = grads[0][:, rows], self.x[-1, rows], self.weights
            self._truth["step"] = _true_values_reverse(*given), grads[1]
        true_x, true_v = self._truth["step"]
        error = max(
            _distance(result[0][-1, self._rows()], true_x),
            _distance(result[1][-1], true_v),
        )
        return Check(error, self._tolerance, "root mean square, relative")


@register("paramixer")
def paramixer(options: Options) -> Iterable[Case]:
    """Networks and products in one call, nothing kept: torch's networks and roll."""
    for n, d in options.grid(_SIZES, (_D,)):
        for pattern in _PATTERNS:
            b = _Block(pattern, _BATCH, n, d)
            work = b.flops + b.product_flops
            yield Case(
                b.name,
                [
                    Peer("subquad", lambda b=b: b.call()),
                    Peer("subquad torch", lambda b=b: b.inference(b.ours)),
                    Peer("torch networks, roll", lambda b=b: b.inference(b.rolled)),
                ],
                b.check_block,
                limit=_limit(options.rates, work, 12.0 * b.x.size),
                overlap=True,
                work=work,
                values={"n": n, "d": d, "pattern": pattern},
            )


@register("paramixer_training")
def paramixer_training(options: Options) -> Iterable[Case]:
    """The same forward and in reverse, through rows and weights."""
    for n, d in options.grid(_SIZES, (_D,)):
        for pattern in _PATTERNS:
            b = _Block(pattern, _BATCH, n, d)
            work = 3 * (b.flops + b.product_flops)
            kept = b.shape[1] * b.v.size
            yield Case(
                b.name,
                [
                    Peer("subquad", lambda b=b: b.step(b.ours)),
                    Peer(
                        "torch networks, roll",
                        lambda b=b: b.step(b.rolled),
                        bytes_needed=12.0 * kept * b.shape[3],
                    ),
                ],
                b.check_step,
                limit=_limit(options.rates, work, 4.0 * (5 * kept + 4 * b.grad.size)),
                overlap=True,
                work=work,
                values={"n": n, "d": d, "pattern": pattern},
            )


# -------------------------------------------------------------------- compressed rows

# In the second cache of a core, in the one that cores share, and beyond.
_GRAPHS = (2048, 32768, 524288)
_STEPS = 3


def random_graph(n: int, degree: float = 14.0, groups: int = 4, seed: int = 0) -> Any:
    """Return the random walk on a graph of groups and uneven degrees, float32.

    Nodes are drawn by the sixth power of a uniform number; three edges of four stay in
    a group. Rows of nodes without edges are empty.
    """
    import scipy.sparse

    generator = np.random.default_rng(seed)
    weight = generator.uniform(3, 12, n) ** 6
    group = generator.integers(groups, size=n)
    count = int(n * degree / 2)
    first = generator.choice(n, count, p=weight / weight.sum())
    second = np.empty_like(first)
    stays = generator.random(count) < 0.75
    second[~stays] = generator.choice(n, int((~stays).sum()), p=weight / weight.sum())
    for g in range(groups):
        members, chosen = np.flatnonzero(group == g), stays & (group[first] == g)
        share = weight[members] / weight[members].sum()
        second[chosen] = generator.choice(members, int(chosen.sum()), p=share)
    ends = (np.concatenate([first, second]), np.concatenate([second, first]))
    matrix = scipy.sparse.csr_array(
        (np.ones(2 * count, np.float32), ends), shape=(n, n)
    )
    matrix.sum_duplicates()
    total = np.repeat(np.asarray(matrix.sum(axis=1)).ravel(), np.diff(matrix.indptr))
    matrix.data /= total
    return matrix


class _Walk:
    """A sparse matrix and dense rows."""

    def __init__(self, matrix: Any, d: int) -> None:
        self.matrix = matrix
        self.x = _normal((matrix.shape[1], d), 6)
        self.columns = slice(None, None, max(1, d // 4))

    @property
    def name(self) -> str:
        """The name of a case."""
        n, d = self.x.shape
        return f"n={n} nnz={self.matrix.nnz} d={d} float32"

    def limit(self, rates: Rates, steps: int) -> dict[str, float | None]:
        """Rows that are gathered, from where all of x is, and what is written."""
        nnz, size = self.matrix.nnz, self.x.nbytes
        gathered = nnz * (8.0 + 4.0 * self.x.shape[1])
        both = gathered / read_rate(rates, size) + size / copy_rate(rates, 2 * size)
        return {"memory": steps * both}

    def kernel(self) -> Callable[[], Any]:
        """The kernel on memory that was touched before."""
        from subquad import _core

        rows, columns = self.matrix.shape
        out = np.zeros((rows, self.x.shape[1]), np.float32)
        a = self.matrix
        sizes = (1, rows, columns, a.nnz, self.x.shape[1], 4, 0)
        scratch = np.zeros(_core.csr_product_workspace(*sizes), np.uint8)

        def call() -> Any:
            _core.csr_product(
                a.data, a.indices, a.indptr, self.x, None, 1.0, out, scratch, 0
            )
            return out

        return call

    def scipy(self) -> Callable[[], Any]:
        return lambda: self.matrix @ self.x

    def torch(self) -> Callable[[], Any]:
        a, x = self._tensors()
        return lambda: (a @ x).numpy()

    def _tensors(self) -> tuple[Any, Any]:
        import torch

        parts = (self.matrix.indptr, self.matrix.indices, self.matrix.data)
        tensors = [torch.from_numpy(part) for part in parts]
        matrix = _csr(torch, *tensors, self.matrix.shape)
        return matrix, torch.from_numpy(self.x)

    def chain(self) -> Callable[[], Any]:
        import subquad

        chain = subquad.OperatorChain(
            [self.matrix] * _STEPS, mean_of_partial_products=True
        )
        return lambda: chain @ self.x

    def scipy_chain(self) -> Callable[[], Any]:
        """Horner's scheme, as the chain has it."""

        def call() -> Any:
            y = self.matrix @ self.x
            for _ in range(_STEPS - 1):
                y = self.matrix @ (self.x + y)
            return y / np.float32(_STEPS)

        return call

    def torch_chain(self) -> Callable[[], Any]:
        a, x = self._tensors()

        def call() -> Any:
            y = a @ x
            for _ in range(_STEPS - 1):
                y = a @ (x + y)
            return (y / _STEPS).numpy()

        return call

    def check(self, result: Any) -> Check:
        """Compare some columns, which do not depend on each other."""
        truth = self.matrix.astype(float) @ self.x[:, self.columns].astype(float)
        return self._compare(result, truth, 1)

    def check_chain(self, result: Any) -> Check:
        """Compare some columns."""
        a, x = self.matrix.astype(float), self.x[:, self.columns].astype(float)
        y = a @ x
        for _ in range(_STEPS - 1):
            y = a @ (x + y)
        return self._compare(result, y / _STEPS, _STEPS)

    def _compare(self, result: Any, truth: Any, steps: int) -> Check:
        longest = int(np.diff(self.matrix.indptr).max())
        found = np.asarray(result)[:, self.columns]
        tolerance = EPS32 * math.sqrt(steps * (longest + 1))
        return Check(_distance(found, truth), tolerance, "root mean square, relative")


def _walks(options: Options) -> Iterable[_Walk]:
    for n in tuple(s.n for s in options.sizes) or _GRAPHS:
        matrix = random_graph(n)
        for d in (32, 128):
            yield _Walk(matrix, d)


@register("csr_product")
def csr_product(options: Options) -> Iterable[Case]:
    """A sparse matrix times dense rows, float32: scipy, torch's compressed rows."""
    for w in _walks(options):
        work = 2.0 * w.matrix.nnz * w.x.shape[1]
        yield Case(
            w.name,
            [
                Peer("subquad", lambda w=w: w.kernel()),
                Peer("scipy", lambda w=w: w.scipy()),
                Peer("torch CSR", lambda w=w: w.torch()),
            ],
            w.check,
            limit=w.limit(options.rates, 1),
            work=work,
            values={"n": w.x.shape[0], "d": w.x.shape[1], "nnz": w.matrix.nnz},
        )


@register("operator_chain")
def operator_chain(options: Options) -> Iterable[Case]:
    """The mean of a walk's first three steps, float32: scipy, torch's rows."""
    for w in _walks(options):
        work = 2.0 * _STEPS * w.matrix.nnz * w.x.shape[1]
        yield Case(
            w.name,
            [
                Peer("subquad", lambda w=w: w.chain()),
                Peer("scipy", lambda w=w: w.scipy_chain()),
                Peer("torch CSR", lambda w=w: w.torch_chain()),
            ],
            w.check_chain,
            limit=w.limit(options.rates, _STEPS),
            work=work,
            values={"n": w.x.shape[0], "d": w.x.shape[1], "nnz": w.matrix.nnz},
        )


# ---------------------------------------------------------------------------- growth


def _plot_scaling(rows: list[Row], path: str) -> None:
    """Write seconds over the number of rows, beside what would be proportional."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    powers = {"cdil": 1, "chord": 2}
    for pattern, power in powers.items():
        points = sorted(
            (row["values"]["n"], row["median"])
            for row in rows
            if row["values"]["pattern"] == pattern and row["median"]
        )
        if not points:
            continue
        n, t = np.array(points).T
        name = "CDIL, 9 links" if pattern == "cdil" else "CHORD, log n + 1 links"
        (line,) = axes.loglog(n, t, marker="o", label=name)
        guide = n * np.log2(n) ** power
        guide *= np.exp(np.mean(np.log(t) - np.log(guide)))
        exponent = "" if power == 1 else "²"
        label = f"∝ n log{exponent} n"
        axes.loglog(n, guide, "--", color=line.get_color(), alpha=0.5, label=label)
    axes.set(
        xlabel="rows n", ylabel="seconds", title="Products of log n factors, d = 16"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=144)
    plt.close(figure)


def _growth(rows: list[Row]) -> list[str]:
    """Say how far each size is from growth in proportion to the number of terms."""
    lines = []
    for pattern in _PATTERNS:
        points = sorted(
            (row["values"]["n"], row["median"] / row["values"]["terms"])
            for row in rows
            if row["values"].get("pattern") == pattern and row["median"]
        )
        if len(points) > 1:
            per_term = [1e9 * each for _, each in points]
            lines.append(
                f"{pattern}: {min(per_term):.3g} to {max(per_term):.3g} ns a term of "
                f"n M K, for n = {points[0][0]} to {points[-1][0]}"
            )
    return lines


@register("factor_scaling", summary=_growth, plot=_plot_scaling, rounds=3)
def factor_scaling(options: Options) -> Iterable[Case]:
    """Time and memory over the number of rows: log n factors, batch 1, d = 16."""
    d = 16
    for n in tuple(s.n for s in options.sizes) or tuple(2**k for k in range(10, 21)):
        for pattern in _PATTERNS:
            c = _Chain(pattern, 1, n, d)
            small = _Chain(pattern, 1, 64, d)
            yield Case(
                f"{pattern} n={n}",
                [
                    Peer(
                        "subquad",
                        lambda c=c: c.public(),
                        warm=lambda c=small: c.public(),
                    )
                ],
                c.check,
                limit=_limit(options.rates, c.flops, c.fused_bytes),
                overlap=True,
                work=c.flops,
                memory=True,
                values=c.values_of_case() | {"terms": c.values.size},
            )


@register("factor_memory", rounds=1)
def factor_memory(options: Options) -> Iterable[Case]:
    """Memory beyond inputs, forward and in reverse, n = 16384, batch 1, d = 64."""
    for n, d in options.grid((16384,), (_D,)):
        for pattern in _PATTERNS:
            c, small = _Chain(pattern, 1, n, d), _Chain(pattern, 1, 64, d)

            def ours(c: _Chain, *, recompute: bool) -> Callable[[], Any]:
                import subquad

                def formula(_: Any, values: Any, x: Any) -> Any:
                    return subquad.sparse_factor_product(
                        values,
                        x,
                        pattern=c.pattern,
                        residual="step",
                        recompute=recompute,
                    )

                return c.training(formula)

            setups: dict[str, Callable[[_Chain], Callable[[], Any]]] = {
                "subquad torch": lambda c, f=ours: f(c, recompute=False),
                "subquad torch, recompute": lambda c, f=ours: f(c, recompute=True),
                "torch roll": lambda c: c.training(c.rolled),
                "torch gather, scatter": lambda c: c.training(c.gathered),
            }
            yield Case(
                c.name,
                [
                    Peer(
                        name,
                        lambda c=c, f=setup: f(c),
                        warm=lambda c=small, f=setup: f(c),
                    )
                    for name, setup in setups.items()
                ],
                c.check_training,
                memory=True,
                values=c.values_of_case(),
            )
