"""Embeddings: one epoch, and the whole fit of a graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks.data import sphere
from benchmarks.factors import EPS32, copy_rate, random_graph, read_rate
from benchmarks.machine import Rates, seconds
from benchmarks.registry import Case, Check, Options, Peer, Row, register

# A graph of 30,000 nodes without those of degree 0, and one that no cache holds.
_SIZES = ((20703, (32,)), (200000, (32, 128)))
_STEP = 0.5
# Of the whole fit: steps of a walk, epochs, the first step's size, dimensions.
LENGTH, EPOCHS, RATE, DIM = 3, 50, 1.0, 32


# ------------------------------------------------------------------------- one epoch


class _Epoch:
    """Unit rows, an affinity or its product with them, and everybody's next rows."""

    def __init__(self, n: int, d: int, k: int, *, has_matrix: bool) -> None:
        self.n, self.d, self.k, self.has_matrix = n, d, k, has_matrix
        self._truth: tuple[Any, ...] | None = None

    @functools.cached_property
    def x(self) -> Any:
        return sphere(self.n, self.d, seed=1)

    @functools.cached_property
    def matrix(self) -> Any:
        return random_graph(self.n)

    @functools.cached_property
    def rows(self) -> Any:
        """What the matrix is applied to, or the affinity's product with x."""
        given = sphere(self.n, self.d, seed=2)
        return given if self.has_matrix else self.matrix @ given

    @functools.cached_property
    def components(self) -> tuple[Any, Any, Any]:
        """Logarithms of shares, means and covariances of the keys."""
        parts = np.array_split(self.x.astype(float), self.k)
        counts = np.array([len(part) for part in parts], float)
        means = np.stack([part.mean(axis=0) for part in parts])
        covariances = np.stack([np.cov(part, rowvar=False, ddof=0) for part in parts])
        found = np.log(counts / self.n), means, covariances.reshape(self.k, self.d, -1)
        return tuple(a.astype(np.float32) for a in found)  # type: ignore[return-value]

    @property
    def name(self) -> str:
        """The name of a case."""
        nnz = f" nnz={self.matrix.nnz}" if self.has_matrix else ", rows given"
        components = "" if self.k == 1 else f" k={self.k}"
        return f"n={self.n} d={self.d}{components}{nnz} float32"

    @property
    def flops(self) -> float:
        """Multiply-adds of covariances and of what is gathered, twice."""
        gathered = self.matrix.nnz if self.has_matrix else 0
        return 2.0 * self.d * (self.n * self.k * self.d + gathered)

    def limit(self, rates: Rates) -> dict[str, float | None]:
        """Products with covariances, and rows from where all of them are."""
        size = self.x.nbytes
        streamed = 2 if self.has_matrix else 3
        memory = streamed * size / copy_rate(rates, 2 * size)
        if self.has_matrix:
            gathered = self.matrix.nnz * (8.0 + 4.0 * self.d)
            memory += gathered / read_rate(rates, size)
        arithmetic = seconds(2.0 * self.n * self.k * self.d**2, rates.fma_peak(4))
        return {"arithmetic": arithmetic, "memory": memory}

    # ---- subquad

    def kernel(self) -> Callable[[], Any]:
        """The kernel on memory that was touched before."""
        from subquad import _core

        a = self.matrix if self.has_matrix else None
        csr = (None,) * 3 if a is None else (a.data, a.indices, a.indptr)
        nnz = 0 if a is None else a.nnz
        sizes = (self.n, self.n, nnz, self.d, self.k, 0, 4, 0)
        scratch = np.zeros(_core.embedding_step_workspace(*sizes), np.uint8)
        out = np.zeros_like(self.x)
        attraction, log_z = np.zeros((2, self.n), np.float32)

        def call() -> Any:
            _core.embedding_step(
                self.x, *csr, self.rows, 1.0, *self.components, None, None, None,
                None, None, _STEP, out, attraction, log_z, scratch, 0,
            )  # fmt: skip
            return out, attraction, log_z

        return call

    def one_thread(self) -> Callable[[], Any]:
        import subquad

        kernel = self.kernel()

        def call() -> Any:
            with subquad.num_threads(1):
                return kernel()

        return call

    # ---- peers

    def scipy(self) -> Callable[[], Any]:
        """The formulas by NumPy and scipy, in float32."""
        shares, means, covariances = self.components
        keep = np.float32(math.sqrt(1 - _STEP**2))

        def call() -> Any:
            x = self.x
            pull = self.matrix @ self.rows if self.has_matrix else self.rows
            turned = [x @ c for c in covariances]
            logs = np.stack(
                [
                    share + x @ mean + np.einsum("id,id->i", x, t) / 2
                    for share, mean, t in zip(shares, means, turned)
                ],
                axis=1,
            )
            top = logs.max(axis=1, keepdims=True)
            weights = np.exp(logs - top)
            total = weights.sum(axis=1, keepdims=True)
            weights /= total
            gradient = weights @ means - pull
            for a, t in enumerate(turned):
                t *= weights[:, a, None]
                gradient += t
            gradient -= np.einsum("id,id->i", gradient, x)[:, None] * x
            gradient *= np.float32(_STEP) / np.linalg.norm(
                gradient, axis=1, keepdims=True
            )
            attraction = np.einsum("id,id->i", x, pull)
            return keep * x - gradient, attraction, (top + np.log(total))[:, 0]

        return call

    def torch(self) -> Callable[[], Any]:
        """The same by torch."""
        import torch

        from benchmarks.factors import _csr

        tensors = [torch.from_numpy(a) for a in (self.x, self.rows, *self.components)]
        x, rows, *components = tensors
        matrix = None
        if self.has_matrix:
            parts = (self.matrix.indptr, self.matrix.indices, self.matrix.data)
            csr = [torch.from_numpy(part) for part in parts]
            matrix = _csr(torch, *csr, self.matrix.shape)

        def call() -> Any:
            found = torch_step(torch, x, matrix, rows, components)
            return tuple(a.numpy() for a in found)

        return call

    # ---- checks

    def truth(self) -> tuple[Any, Any, Any, float]:
        """Next rows, attractions and log Z of some rows in float64, and a condition.

        The condition is how much larger the terms of a gradient are than its tangent
        part: that part's direction errs by so many roundings.
        """
        if self._truth is None:
            picked = self._picked()
            x = self.x[picked].astype(float)
            pull = self.rows[picked].astype(float)
            if self.has_matrix:
                pull = self.matrix[picked].astype(float) @ self.rows.astype(float)
            shares, means, covariances = (a.astype(float) for a in self.components)
            turned = np.einsum("id,ade->aie", x, covariances)
            logs = shares + x @ means.T + np.einsum("id,aid->ia", x, turned) / 2
            log_z = np.log(np.exp(logs).sum(axis=1))
            weights = np.exp(logs - log_z[:, None])
            pushed = weights @ means + np.einsum("ia,aid->id", weights, turned)
            gradient = pushed - pull
            gradient -= (gradient * x).sum(axis=1, keepdims=True) * x
            size = np.linalg.norm(gradient, axis=1, keepdims=True)
            terms = np.linalg.norm(pull, axis=1) + np.linalg.norm(pushed, axis=1)
            out = math.sqrt(1 - _STEP**2) * x - _STEP * gradient / size
            condition = float(np.sqrt(np.mean((terms / size[:, 0]) ** 2)))
            self._truth = out, (x * pull).sum(axis=1), log_z, condition
        return self._truth  # type: ignore[return-value]

    def _picked(self) -> Any:
        """Rows that have a direction to go."""
        known = np.flatnonzero(np.diff(self.matrix.indptr))
        return known[:: max(1, len(known) // 500)]

    def check(self, result: Any) -> Check:
        """Compare some rows, root mean square."""
        *truth, condition = self.truth()
        picked = self._picked()
        # Of rows of unit norm, and of numbers of size 1.
        error = max(
            float(
                np.sqrt(np.square(np.asarray(found)[picked] - true).sum() / len(true))
            )
            for found, true in zip(result, truth)
        )
        # Sums of as many terms as the longest row has, and d.
        longest = int(np.diff(self.matrix.indptr).max()) if self.has_matrix else 1
        roundings = math.sqrt(longest + self.k * self.d + 8)
        tolerance = EPS32 * roundings * (1 + _STEP * condition)
        return Check(error, tolerance, "root mean square")


def torch_step(torch: Any, x: Any, matrix: Any, rows: Any, components: Any) -> Any:
    """Return next rows, attractions and log Z, by torch on any device."""
    shares, means, covariances = components
    with torch.no_grad():
        pull = rows if matrix is None else matrix @ rows
        turned = torch.matmul(x, covariances)
        forms = (turned * x).sum(dim=-1).T
        logs = shares + x @ means.T + forms / 2
        weights = logs.softmax(dim=1)
        gradient = torch.einsum("ia,aid->id", weights, turned)
        gradient += weights @ means
        gradient -= pull
        gradient -= (gradient * x).sum(dim=1, keepdim=True) * x
        gradient /= gradient.norm(dim=1, keepdim=True)
        out = math.sqrt(1 - _STEP**2) * x - _STEP * gradient
        return out, (x * pull).sum(dim=1), logs.logsumexp(dim=1)


def _epochs(options: Options) -> Iterable[_Epoch]:
    sizes = _SIZES
    if options.sizes:
        sizes = tuple((s.n, (s.d,) if s.d else (32, 128)) for s in options.sizes)
    for n, dims in sizes:
        for d in dims:
            for has_matrix in (True, False):
                yield _Epoch(n, d, 1, has_matrix=has_matrix)
        yield _Epoch(n, dims[0], 8, has_matrix=True)


@register("embedding_step")
def embedding_step(options: Options) -> Iterable[Case]:
    """One epoch of rows on the sphere, float32: NumPy and scipy, torch."""
    for e in _epochs(options):
        peers = [Peer("subquad", lambda e=e: e.kernel())]
        if options.threads > 1:
            peers.append(
                Peer("subquad one thread", lambda e=e: e.one_thread(), limit={})
            )
        peers += [
            Peer("scipy", lambda e=e: e.scipy()),
            Peer("torch", lambda e=e: e.torch()),
        ]
        yield Case(
            e.name,
            peers,
            e.check,
            limit=e.limit(options.rates),
            work=e.flops,
            values={"n": e.n, "d": e.d, "k": e.k},
        )


# ----------------------------------------------------------------------- whole fits


def plain_fit(walk: Any, length: int, epochs: int, rate: float, start: Any) -> Any:
    """The same algorithm in a few lines of NumPy and scipy, in the type of `start`.

    Parameters
    ----------
    walk : sparse matrix
        One step of a walk, compressed rows.
    length : int
        Steps whose mean is embedded.
    epochs : int
        Number of epochs.
    rate : float
        Size of the first step, at most 1.
    start : ndarray of shape (n, d)
        Unit rows to start from.

    Returns
    -------
    ndarray of shape (n, d)
        The embedding.
    """
    x = start
    share = x.dtype.type(1 / length)
    for epoch in range(epochs):
        step = rate * (1 - epoch / epochs)
        pull = walk @ x
        for _ in range(length - 1):
            pull += x
            pull = walk @ pull
        mean = x.mean(axis=0)
        covariance = x.T @ x / len(x) - np.outer(mean, mean)
        # The keys' mean, and the null model's, which is the same.
        gradient = x @ covariance
        gradient += 2 * mean
        pull *= share
        gradient -= pull
        gradient -= np.einsum("id,id->i", gradient, x)[:, None] * x
        norms = np.linalg.norm(gradient, axis=1, keepdims=True)
        np.divide(gradient, norms, out=gradient, where=norms > 0)
        gradient *= x.dtype.type(step)
        x = x.dtype.type(math.sqrt(1 - step**2)) * x
        x -= gradient
    return x


def objective(walk: Any, length: int, x: Any) -> float:
    """Return the loss of rows with one cluster, in float64."""
    x = np.asarray(x, float)
    pull = walk @ x
    for _ in range(length - 1):
        pull = walk @ (x + pull)
    mean = x.mean(axis=0)
    centred = x - mean
    covariance = centred.T @ centred / len(x)
    log_z = x @ mean + np.einsum("id,de,ie->i", x, covariance, x, optimize=True) / 2
    attraction = (x * pull).sum(axis=1) / length
    return float(np.mean(log_z + x @ mean - attraction))


class _Fit:
    """A generated graph, and everybody's embedding of it."""

    def __init__(self, n: int) -> None:
        self.n = n

    @functools.cached_property
    def graph(self) -> Any:
        from tools.embedding._common import block_model

        return block_model(self.n)

    @functools.cached_property
    def walk(self) -> Any:
        walk = self.graph.adjacency.copy()
        degrees = np.diff(walk.indptr)
        walk.data = (1 / np.repeat(degrees, degrees)).astype(np.float32)
        return walk

    @functools.cached_property
    def start(self) -> Any:
        return sphere(self.walk.shape[0], DIM, seed=3)

    @functools.cached_property
    def loss(self) -> float:
        """Where the same algorithm gets to in float64, from another start."""
        start = sphere(self.walk.shape[0], DIM, np.float64, seed=4)
        found = plain_fit(self.walk.astype(float), LENGTH, EPOCHS, RATE, start)
        return objective(self.walk, LENGTH, found)

    @property
    def name(self) -> str:
        """The name of a case."""
        n, nnz = self.walk.shape[0], self.walk.nnz
        return f"n={n} nnz={nnz} d={DIM} L={LENGTH} T={EPOCHS}"

    def limit(self, rates: Rates) -> dict[str, float | None]:
        """Every epoch's gathers, and the products with and for the covariance."""
        n, size = self.walk.shape[0], self.start.nbytes
        gathered = self.walk.nnz * (8.0 + 4.0 * DIM) / read_rate(rates, size)
        written = size / copy_rate(rates, 2 * size)
        # A covariance is symmetric: half of it is computed.
        flops = 3.0 * n * DIM**2
        return {
            "arithmetic": seconds(EPOCHS * flops, rates.fma_peak(4)),
            "memory": EPOCHS * LENGTH * (gathered + written),
        }

    def ours(self, n_threads: int | None = None) -> Callable[[], Any]:
        import subquad
        from subquad.embedding import EDRep

        chain = subquad.OperatorChain(
            [self.walk] * LENGTH, mean_of_partial_products=True
        )
        model = EDRep(DIM, max_iter=EPOCHS, learning_rate=RATE, random_state=0)

        def call() -> Any:
            if n_threads is None:
                return model.fit_transform(chain)
            with subquad.num_threads(n_threads):
                return model.fit_transform(chain)

        return call

    def scipy(self) -> Callable[[], Any]:
        return lambda: plain_fit(self.walk, LENGTH, EPOCHS, RATE, self.start)

    def edrep(self) -> Callable[[], Any]:
        """The published program."""
        import scipy.sparse
        from EDRep import CreateEmbedding

        steps = [scipy.sparse.csr_matrix(self.walk.astype(float))] * LENGTH
        options = {"n_epochs": EPOCHS, "eta": RATE, "k": 1, "sym": True}
        return lambda: (
            CreateEmbedding(steps, DIM, sum_partials=True, verbose=False, **options).X
        )

    def check(self, result: Any) -> Check:
        """Compare the loss: starts and roundings differ, and where they lead to."""
        found = np.asarray(result)
        norms = np.linalg.norm(found, axis=1)
        if np.abs(norms - 1).max() > 1e-3:
            return Check(math.inf, 0.0, "rows are not of unit norm")
        error = abs(objective(self.walk, LENGTH, found) / self.loss - 1)
        # Starts change it by 2e-3 on graphs of 200 nodes, and by less on larger ones.
        return Check(error, 0.01, "loss, relative, of another start")

    def measure(self, peer: str, result: Any) -> dict[str, Any]:
        """Return how well clusters of the rows agree with the graph's groups."""
        del peer
        from tools.embedding._common import nmi

        try:
            return {"nmi": nmi(result, self.graph.labels)}
        except ImportError:
            return {}


def _agreement(rows: list[Row]) -> list[str]:
    """Say how well clusters agree with the groups of the graph."""
    return [
        f"{row['case']}, {row['peer']}: NMI {row['values']['nmi']:.4f}"
        for row in rows
        if "nmi" in row["values"]
    ]


@register("edrep", summary=_agreement)
def edrep(options: Options) -> Iterable[Case]:
    """The whole embedding of a graph, float32: the published program, NumPy, scipy."""
    for n in tuple(s.n for s in options.sizes) or (30000,):
        f, small = _Fit(n), _Fit(500)
        peers = [Peer("subquad", lambda f=f: f.ours(), warm=lambda f=small: f.ours())]
        if options.threads > 1:
            peers.append(
                Peer("subquad one thread", lambda f=f: f.ours(1),
                     warm=lambda f=small: f.ours(1), limit={})
            )  # fmt: skip
        peers += [
            Peer("scipy", lambda f=f: f.scipy(), warm=lambda f=small: f.scipy()),
            Peer("edrep", lambda f=f: f.edrep(), warm=lambda f=small: f.edrep()),
        ]
        yield Case(
            f.name,
            peers,
            f.check,
            limit=f.limit(options.rates),
            memory=True,
            values={"n": f.walk.shape[0], "nnz": f.walk.nnz},
            measure=f.measure,
        )
