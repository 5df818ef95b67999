"""The epochs of EDRep: operators, statistics of keys, the terms of gradients, the loss.

Nothing here waits for a device within an epoch: statistics stay arrays of the library
of the embedding, in float64 where it has that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _dispatch, _kmeans
from ._dispatch import KeyStatistics, NullTerm, OwnTerms
from ._estimators import as_rows, like_of, require_finite
from ._host import from_host, has_float64, to_host
from ._operator_chain import LastProduct, OperatorChain
from ._validation.common import as_dtype, dtype_name

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]
Gradient: TypeAlias = Literal["source", "symmetric", "full"]

# How often the clusters of the keys are found while an embedding moves with them.
_REFRESHES = 4
# Losses this many epochs apart tell whether there is still progress.
_PATIENCE = 5
# Numbers drawn at once: in float64, whatever the type of the rows.
_DRAWN = 1 << 16


# -------- operators


class Affinities(NamedTuple):
    """An operator that rows are multiplied by.

    Attributes
    ----------
    operator : OperatorChain, dense array, or anything with `shape`, `@` and `.T`
    name : str
        The argument that it was.
    dtype : str
        "float32" or "float64": what it holds, or is taken to hold.
    like : array or None
        An empty array of its library and device; None where it has none.
    """

    operator: Any
    name: str
    dtype: str
    like: Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of rows and columns."""
        return tuple(self.operator.shape)

    @property
    def T(self) -> Affinities:  # noqa: N802
        """The transpose."""
        return self._replace(operator=self.operator.T)

    def astype(self, dtype: str) -> Affinities:
        """Return what multiplies rows of a type."""
        operator = self.operator
        if isinstance(operator, OperatorChain):
            operator = operator.astype(dtype)
        elif self.like is not None:
            operator = as_dtype(_dispatch.namespace_of(operator), operator, dtype)
        return self._replace(operator=operator, dtype=dtype)

    def product(self, rows: Array) -> Array:
        """Return operator @ rows, of the type of the rows."""
        found = self.operator @ rows
        if isinstance(self.operator, OperatorChain):
            return found
        name = f"{self.name} @ rows"
        _dispatch.backend_for(**{name: found}, rows=rows)
        kind = dtype_name(found.dtype)
        if kind.startswith("complex"):
            message = f"{name} must be real, got dtype {kind}"
            raise TypeError(message)
        expected = (self.shape[0], *rows.shape[1:])
        if tuple(found.shape) != expected:
            message = (
                f"{self.name} @ rows must have shape {expected}, got shape "
                f"{tuple(found.shape)}"
            )
            raise ValueError(message)
        return as_dtype(_dispatch.namespace_of(rows), found, dtype_name(rows.dtype))

    def last_product(self, rows: Array) -> LastProduct:
        """Return a matrix or None, others, and a scale: scale * matrix @ others."""
        if isinstance(self.operator, OperatorChain):
            return self.operator._last_product(rows)
        return None, self.product(rows), 1.0


def as_affinities(operator: Any, name: str = "operator") -> Affinities:
    """Return an operator of any kind.

    Raises
    ------
    TypeError
        If it is none.
    ValueError
        If it is a dense array, and no matrix.
    """
    kind = type(operator)
    called = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(operator, (list, tuple)):
        message = (
            f"{name} must be one operator, got a {kind.__qualname__}; "
            "subquad.OperatorChain(matrices) makes one of several sparse matrices, "
            "numpy.asarray of lists of numbers"
        )
        raise TypeError(message)
    if hasattr(operator, "vcount") or (
        hasattr(operator, "nodes") and hasattr(operator, "edges")
    ):
        message = (
            f"{name} must be a matrix or an operator, got the graph {called}; "
            "subquad.embedding.random_walk(graph, length=1) makes an operator of it"
        )
        raise TypeError(message)
    if kind.__module__.partition(".")[0] == "dask":
        message = (
            f"{name} must not be a Dask array: every epoch reads all its rows; compute "
            "it first"
        )
        raise TypeError(message)
    layout = str(getattr(operator, "layout", "torch.strided"))
    if kind.__module__.partition(".")[0] == "torch" and layout != "torch.strided":
        message = (
            f"{name} must be dense where it is of torch, got layout {layout}; sparse "
            "matrices may be those of scipy.sparse"
        )
        raise TypeError(message)
    if not isinstance(operator, OperatorChain) and hasattr(operator, "tocsr"):
        try:
            operator = OperatorChain(operator)
        except (TypeError, ValueError) as error:
            # It names its own argument.
            message = str(error).replace("matrices[0]", name)
            raise type(error)(message) from None
    if isinstance(operator, OperatorChain):
        entries = operator.matrices[0].data
        return Affinities(operator, name, operator.dtype.name, like_of(entries[:0]))
    if _is_dense(operator):
        rows = _constant(as_rows(operator, name))
        require_finite(rows, name=name)
        return Affinities(rows, name, dtype_name(rows.dtype), like_of(rows))
    if all(hasattr(operator, each) for each in ("shape", "T", "__matmul__")):
        # Whatever says that it is narrow is taken at its word.
        narrow = ("float16", "bfloat16", "float32")
        is_narrow = dtype_name(getattr(operator, "dtype", "float64")) in narrow
        return Affinities(operator, name, "float32" if is_narrow else "float64", None)
    message = (
        f"{name} must be an OperatorChain, a sparse matrix, a dense matrix or anything "
        f"with shape, @ and .T, got {called}"
    )
    raise TypeError(message)


def _is_dense(operator: Any) -> bool:
    root = type(operator).__module__.partition(".")[0]
    return (
        hasattr(operator, "__array_namespace__")
        or root in ("torch", "cupy")
        or hasattr(operator, "columns")
        or (hasattr(operator, "__array__") and not hasattr(operator, "__matmul__"))
    )


def _constant(array: Array) -> Array:
    """Return an array that no gradient passes through."""
    return array.detach() if _dispatch.library_of(array).name == "torch" else array


# -------- rows to start from


def random_rows(generator: np.random.Generator, n: int, d: int, dtype: str) -> Array:
    """Return rows drawn evenly from the sphere, alike in both types."""
    rows = np.empty((n, d), dtype)
    size = max(1, _DRAWN // d)
    for start in range(0, n, size):
        drawn = generator.standard_normal((min(size, n - start), d))
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        rows[start : start + size] = drawn
    return rows


def initial_rows(rows: Array, name: str, dtype: str) -> Array:
    """Return the directions of given rows.

    Raises
    ------
    ValueError
        If a row is 0 or not finite.
    """
    rows = _constant(rows)
    xp = _dispatch.namespace_of(rows)
    largest = to_host(xp.max(xp.abs(rows), axis=1))
    bad = np.flatnonzero(~((largest > 0) & np.isfinite(largest)))
    if len(bad):
        what = "is zero" if largest[bad[0]] == 0 else "contains NaN or infinity"
        message = (
            f"{name} must have finite rows that are not zero, but row {bad[0]} {what}"
        )
        raise ValueError(message)
    return as_dtype(xp, _directions(xp, rows), dtype)


def _directions(xp: _dispatch.Namespace, rows: Array) -> Array:
    """Scale rows to unit norm; the direction of 0 is the first axis."""
    largest = xp.max(xp.abs(rows), axis=1, keepdims=True)
    is_zero = largest == 0
    first = rows[:, :1] + 1
    rows = rows / xp.where(is_zero, xp.ones_like(largest), largest)
    rows = rows / xp.where(
        is_zero,
        xp.ones_like(largest),
        xp.sqrt(xp.sum(rows * rows, axis=1, keepdims=True)),
    )
    if rows.shape[1] == 1:
        return xp.where(is_zero, first, rows)
    return xp.concat([xp.where(is_zero, first, rows[:, :1]), rows[:, 1:]], axis=1)


# -------- keys


class Null(NamedTuple):
    """Null weights of the keys.

    Attributes
    ----------
    shares : array of the rows' type, shape (m,), or None
        f, the weights by their sum; None where all are equal.
    total : float
        The sum of the weights.
    """

    shares: Array | None
    total: float


class Clusters(NamedTuple):
    """Clusters of the keys, in the library of the embedding.

    Attributes
    ----------
    labels : array of int64, shape (m,)
    inverse_counts : array of float64, shape (k,)
        1 / n_a, and 1 for an empty cluster.
    log_shares : array of the rows' type, shape (k,)
        log(n_a / m).
    """

    labels: Array
    inverse_counts: Array
    log_shares: Array


class Moments(NamedTuple):
    """Statistics of the keys, in float64.

    Attributes
    ----------
    means, covariances : array, shapes (k, d) and (k, d, d)
        Of each cluster.
    total, null : array, shape (d,)
        1ᵀY and fᵀY.
    """

    means: Array
    covariances: Array
    total: Array
    null: Array


def one_cluster(m: int, like: Array) -> Clusters:
    """Return the cluster of all keys."""
    return clusters_of(from_host(np.zeros(m, np.int64), like), 1, like)


def clusters_of(labels: Array, k: int, like: Array) -> Clusters:
    """Return the clusters that labels tell; waits for the device."""
    counts = np.bincount(to_host(labels), minlength=k).astype(np.float64)
    with np.errstate(divide="ignore"):
        log_shares = np.log(counts / np.sum(counts))
    return Clusters(
        labels,
        from_host(1.0 / np.maximum(counts, 1.0), like, _wide(like)),
        from_host(log_shares, like, like.dtype),
    )


def moments_of(keys: Array, clusters: Clusters, null: Null) -> Moments:
    """Return the statistics of keys, in two passes over them."""
    xp, backend = _dispatch.namespace_of(keys), _dispatch.backend_for(keys=keys)
    labels, inverse = clusters.labels, clusters.inverse_counts
    k = inverse.shape[0]
    _, sums = backend.component_sums(keys, labels, None, k)
    means = sums * inverse[:, None]
    scatter, _ = backend.component_scatter(keys, labels, None, means, False)
    total = sums[0, :] if k == 1 else xp.sum(sums, axis=0)
    if null.shares is None:
        mean = total * (1.0 / keys.shape[0])
    else:
        every = labels if k == 1 else xp.zeros_like(labels)
        _, weighed = backend.component_sums(keys, every, null.shares, 1)
        mean = weighed[0, :]
    return Moments(means, scatter * inverse[:, None, None], total, mean)


def statistics_for(
    rows: Array, clusters: Clusters, moments: Moments, constant: Array
) -> KeyStatistics:
    """Return what the step takes of the keys.

    What is added to every row's gradient is folded into the means: log Z gains x times
    it.
    """
    xp = _dispatch.namespace_of(rows)
    means = moments.means + constant
    return (
        clusters.log_shares,
        xp.astype(means, rows.dtype),
        xp.astype(moments.covariances, rows.dtype),
    )


def _wide(like: Array) -> Any:
    xp = _dispatch.namespace_of(like)
    return xp.float64 if has_float64(like) else like.dtype


# -------- epochs


class Step(NamedTuple):
    """Rows and keys after an epoch, and the loss before it."""

    rows: Array
    keys: Array
    loss: Array


@dataclass
class Epochs:
    """What the epochs of a run share.

    Attributes
    ----------
    affinities : Affinities
        P, of shape (n, m).
    null : Null
    gradient : {"source", "symmetric", "full"}
    symmetric : bool
    like : array
        An empty array of the library, device and type of the rows.
    """

    affinities: Affinities
    null: Null
    gradient: Gradient
    symmetric: bool
    like: Array
    _cache: dict[str, Array] = field(default_factory=dict)

    def step(self, rows: Array, keys: Array, clusters: Clusters, step: float) -> Step:
        """Return rows and keys a step further, 0 for the loss alone."""
        if self.symmetric:
            return self._symmetric_step(rows, clusters, step)
        return self._asymmetric_step(rows, keys, clusters, step)

    def _symmetric_step(self, rows: Array, clusters: Clusters, step: float) -> Step:
        backend = _dispatch.backend_for(rows=rows)
        moments = moments_of(rows, clusters, self.null)
        components = statistics_for(rows, clusters, moments, moments.null)
        own: OwnTerms | None = None
        null: NullTerm | None = None
        share = 1.0
        # Without a step the gradient of the keys is of no use.
        if self.gradient == "source" or step == 0.0:
            matrix, pulled, scale = self.affinities.last_product(rows)
        else:
            # Its attraction is twice that of P, summed over the rows.
            matrix, pulled, scale, share = None, self._pull_of_both(rows), 1.0, 0.5
            null = self._null_term(rows, moments.total)
            if self.gradient == "full":
                own = self._own_terms(rows, clusters, moments, components)
        out, attraction, log_z = backend.embedding_step(
            rows, matrix, pulled, scale, components, own, null, step
        )
        loss = self._sum(log_z) - share * self._sum(attraction)
        return Step(out, out, loss * (1.0 / rows.shape[0]))

    def _asymmetric_step(
        self, rows: Array, keys: Array, clusters: Clusters, step: float
    ) -> Step:
        xp, backend = _dispatch.namespace_of(rows), _dispatch.backend_for(rows=rows)
        n = rows.shape[0]
        moments = moments_of(keys, clusters, self.null)
        _, sums = backend.component_sums(rows, self._zeros(n), None, 1)
        total = sums[0, :]
        components = statistics_for(
            rows, clusters, moments, moments.null + total * (1.0 / n)
        )
        moved = keys
        if step != 0.0:
            null = self._null_term(keys, total + self.null.total * moments.null)
            own = None
            if self.gradient == "full":
                own = self._own_terms(rows, clusters, moments, components)
            moved, _, _ = backend.embedding_step(
                keys, *self._transpose().last_product(rows), None, own, null, step
            )
        out, attraction, log_z = backend.embedding_step(
            rows, *self.affinities.last_product(keys), components, None, None, step
        )
        # log Z holds x·1ᵀX/n of every row, twice the regulariser |1ᵀX|²/(2n).
        loss = (
            self._sum(log_z)
            - self._sum(attraction)
            - (0.5 / n) * xp.sum(total * total)
            + (0.5 * self.null.total) * xp.sum(moments.null * moments.null)
        )
        return Step(out, moved, loss * (1.0 / n))

    def _pull_of_both(self, rows: Array) -> Array:
        """Return P X + Pᵀ X."""
        pull = self.affinities.product(rows)
        if self.affinities.like is None:
            # Some operators write every product to the same memory.
            pull = _dispatch.namespace_of(rows).asarray(pull, copy=True)
        matrix, pulled, scale = self._transpose().last_product(rows)
        if matrix is None:
            return pull + (pulled if scale == 1.0 else scale * pulled)
        backend = _dispatch.backend_for(rows=rows)
        return backend.csr_product(*matrix, pulled, pull, scale, None)

    def _null_term(self, like: Array, vector: Array) -> NullTerm:
        """Return fⱼ and a vector."""
        if self.null.shares is not None:
            shares = self.null.shares
        else:
            m = self.affinities.shape[1]
            shares = self._kept(
                "shares", lambda: from_host(np.full(m, 1.0 / m), like, like.dtype)
            )
        return shares, _dispatch.namespace_of(like).astype(vector, like.dtype)

    def _own_terms(
        self,
        rows: Array,
        clusters: Clusters,
        moments: Moments,
        components: KeyStatistics,
    ) -> OwnTerms:
        """Return what moving a key does to the statistics of its cluster.

        Slopes (1/n_a) Σᵢ Wᵢₐ xᵢxᵢᵀ, and shifts (1/n_a) Σᵢ Wᵢₐ xᵢ less the slopes times
        the mean of the keys.
        """
        xp = _dispatch.namespace_of(rows)
        if self.symmetric and moments.means.shape[0] == 1:
            # Rows are the keys, and all of them are in: the moments about 0.
            first = moments.means
            outer = first[:, :, None] * first[:, None, :]
            slopes = moments.covariances + outer
        else:
            sums, squares = self._weighed_moments(rows, components)
            first = sums * clusters.inverse_counts[:, None]
            slopes = squares * clusters.inverse_counts[:, None, None]
        shifts = first - xp.matmul(slopes, moments.means[:, :, None])[:, :, 0]
        return (
            clusters.labels,
            xp.astype(shifts, rows.dtype),
            xp.astype(slopes, rows.dtype),
        )

    def _weighed_moments(
        self, rows: Array, components: KeyStatistics
    ) -> tuple[Array, Array]:
        """Return Σᵢ Wᵢₐ xᵢ and Σᵢ Wᵢₐ xᵢxᵢᵀ."""
        xp, backend = _dispatch.namespace_of(rows), _dispatch.backend_for(rows=rows)
        zeros = self._zeros(rows.shape[0])
        origin = self._kept(
            "origin", lambda: from_host(np.zeros((1, rows.shape[1])), rows, _wide(rows))
        )
        sums, squares = [], []
        for weights in _responsibilities(rows, components):
            sums.append(backend.component_sums(rows, zeros, weights, 1)[1])
            squares.append(
                backend.component_scatter(rows, zeros, weights, origin, False)[0]
            )
        if len(sums) == 1:
            return sums[0], squares[0]
        return xp.concat(sums, axis=0), xp.concat(squares, axis=0)

    def _transpose(self) -> Affinities:
        transpose: Affinities = self._kept("transpose", lambda: self.affinities.T)
        return transpose

    def _zeros(self, n: int) -> Array:
        return self._kept(
            f"zeros {n}", lambda: from_host(np.zeros(n, np.int64), self.like)
        )

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def _sum(self, values: Array | None) -> Array:
        xp = _dispatch.namespace_of(self.like)
        return xp.sum(values, dtype=_wide(self.like))


def _responsibilities(rows: Array, components: KeyStatistics) -> list[Array | None]:
    """Return Wᵢₐ of all rows for each cluster; None where there is one cluster."""
    log_shares, means, covariances = components
    k = means.shape[0]
    if k == 1:
        return [None]
    xp, backend = _dispatch.namespace_of(rows), _dispatch.backend_for(rows=rows)
    scores: list[Array] = []
    for a in range(k):
        # A step of length 0 against one cluster has its log Z, and nothing else.
        one = slice(a, a + 1)
        cluster = log_shares[one], means[one, :], covariances[one, :, :]
        _, _, score = backend.embedding_step(
            rows, None, rows, 0.0, cluster, None, None, 0.0
        )
        scores.append(score)
    largest = scores[0]
    for score in scores[1:]:
        largest = xp.maximum(largest, score)
    weights = [xp.exp(score - largest) for score in scores]
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    return [weight / total for weight in weights]


# -------- runs


@dataclass
class State:
    """Where a run stands: alone it holds the rows, lest former ones stay in memory.

    Attributes
    ----------
    rows, keys : array, shapes (n, d) and (m, d)
        The same array in the symmetric case.
    clusters : Clusters
    losses : list of float or array
        Before the first epoch, and after each.
    """

    rows: Array
    keys: Array
    clusters: Clusters
    losses: list[Any] = field(default_factory=list)


class Schedule(NamedTuple):
    """How a run goes.

    Attributes
    ----------
    max_iter : int
    learning_rate : float
    n_clusters : int
    first_clusters : int
        The epoch from which on there is more than one cluster.
    tol : float or None
    """

    max_iter: int
    learning_rate: float
    n_clusters: int
    first_clusters: int
    tol: float | None

    def step(self, epoch: int) -> float:
        """Return the length of an epoch's step."""
        return self.learning_rate * (1.0 - epoch / self.max_iter)

    def refreshes(self) -> set[int]:
        """Return the epochs before which clusters are found."""
        if self.n_clusters == 1:
            return set()
        length = self.max_iter - self.first_clusters
        return {
            self.first_clusters + length * r // _REFRESHES for r in range(_REFRESHES)
        }

    def is_over(self, losses: list[Any]) -> bool:
        """Return whether the loss has stopped falling."""
        if self.tol is None:
            return False
        first = 0 if self.n_clusters == 1 else self.first_clusters
        before, last = losses[first:-_PATIENCE], losses[-_PATIENCE:]
        return bool(before) and min(before) - min(last) < self.tol


def run(
    epochs: Epochs,
    state: State,
    schedule: Schedule,
    generator: np.random.Generator,
    report: Callable[[float], None] | None,
) -> Float64:
    """Take a state through its epochs, and return the loss before and after each.

    Raises
    ------
    ValueError
        If the operator is not finite.
    """
    backend = _dispatch.backend_for(rows=epochs.like)
    recycled = getattr(backend, "recycled_memory", contextlib.nullcontext)
    with recycled():
        return _run(epochs, state, schedule, generator, report)


def _run(
    epochs: Epochs,
    state: State,
    schedule: Schedule,
    generator: np.random.Generator,
    report: Callable[[float], None] | None,
) -> Float64:
    on_host = _dispatch.library_of(epochs.like).name == "numpy"
    watched = on_host or schedule.tol is not None or report is not None
    refreshes = schedule.refreshes()
    centroids: Float64 | None = None
    for epoch in range(schedule.max_iter + 1):
        if epoch in refreshes:
            require_finite_losses(epochs, state.losses)
            centroids, labels = _clusters_of_keys(
                state.keys, schedule.n_clusters, centroids, generator
            )
            state.clusters = clusters_of(labels, schedule.n_clusters, epochs.like)
        is_last = epoch == schedule.max_iter
        moved = epochs.step(
            state.rows,
            state.keys,
            state.clusters,
            0.0 if is_last else schedule.step(epoch),
        )
        state.losses.append(float(moved.loss) if watched else moved.loss)
        if epoch == 0:
            require_finite_losses(epochs, state.losses)
        if watched:
            if report is not None:
                report(state.losses[-1])
            if is_last or schedule.is_over(state.losses):
                break
        state.rows, state.keys = moved.rows, moved.keys
        del moved
    return require_finite_losses(epochs, state.losses)


def require_finite_losses(epochs: Epochs, losses: list[Any]) -> Float64:
    """Return losses in host memory.

    Raises
    ------
    ValueError
        If the first is not finite: all that may not be is the operator.
    """
    if not losses or isinstance(losses[0], float):
        found = np.asarray(losses, dtype=np.float64)
    else:
        stacked = _dispatch.namespace_of(losses[0]).stack(losses)
        found = to_host(stacked).astype(np.float64)
    if not np.all(np.isfinite(found)):
        message = (
            f"{epochs.affinities.name} must be finite, and its products within the "
            f"range of {epochs.affinities.dtype}: they contain NaN or infinity"
        )
        raise ValueError(message)
    return found


def _clusters_of_keys(
    keys: Array,
    n_clusters: int,
    start: Float64 | None,
    generator: np.random.Generator,
) -> tuple[Float64, Array]:
    """Return centroids, moved from those to start from if any, and labels."""
    xp = _dispatch.namespace_of(keys)
    m = keys.shape[0]
    chosen = _kmeans.sample_rows(m, n_clusters, generator)
    trained = keys
    if len(chosen) < m:
        trained = xp.take(keys, from_host(chosen, keys), axis=0)
    centroids = _kmeans.train_centroids(
        trained, n_clusters, metric="spherical", start=start, generator=generator
    )
    return centroids, _kmeans.assign(keys, centroids, metric="spherical")


# -------- new rows


def placed_rows(
    affinities: Affinities,
    keys: Array,
    clusters: Clusters,
    null: Null,
    schedule: Schedule,
) -> Array:
    """Return rows of unit norm for their affinities to keys that stay."""
    xp, backend = _dispatch.namespace_of(keys), _dispatch.backend_for(keys=keys)
    pull = affinities.product(keys)
    bad = np.flatnonzero(~to_host(xp.all(xp.isfinite(pull), axis=1)))
    if len(bad):
        message = (
            f"{affinities.name} must be finite, but row {bad[0]} contains NaN or "
            "infinity"
        )
        raise ValueError(message)
    moments = moments_of(keys, clusters, null)
    mean = moments.total * (1.0 / keys.shape[0])
    push = xp.astype(mean + moments.null, keys.dtype)
    components = statistics_for(keys, clusters, moments, moments.null)
    rows = _directions(xp, pull - push)
    for epoch in range(schedule.max_iter):
        rows, _, _ = backend.embedding_step(
            rows, None, pull, 1.0, components, None, None, schedule.step(epoch)
        )
    return rows


def as_null(shares: Float64 | None, total: float, like: Array) -> Null:
    """Return null weights in the library and type of the embedding."""
    if shares is None:
        return Null(None, total)
    return Null(from_host(shares, like, like.dtype), total)
