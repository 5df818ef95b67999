"""What `GaussianNormalizer` has learned: how it starts, grows, merges and is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from . import _dispatch, _kmeans
from ._estimators import (
    Arrays,
    as_labels,
    as_rows,
    as_weights,
    like_of,
    require_finite,
    require_integer,
    seed_of,
)
from ._gaussian_statistics import (
    Sample,
    Statistics,
    batch_statistics,
    factorized,
    fingerprint_of,
)
from ._host import HostArray, from_host, to_host

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]
CovarianceType: TypeAlias = Literal["full", "diag", "low_rank"]
_T = TypeVar("_T")

_DEFAULT_RANK = 16
_AUTO_SAMPLES = 512
_DIAGNOSTIC_SAMPLES = 256


class Settings(NamedTuple):
    """Parameters that must stay as they were when keys were first seen."""

    n_components: int
    covariance_type: CovarianceType
    rank: int | None
    control_samples: int | Literal["auto"]

    def check(self) -> None:
        """Raise ValueError for a parameter that has no meaning."""
        require_integer("n_components", self.n_components, 1)
        if self.covariance_type not in ("full", "diag", "low_rank"):
            message = (
                'covariance_type must be "full", "diag" or "low_rank", got '
                f"{self.covariance_type!r}"
            )
            raise ValueError(message)
        if self.rank is not None:
            if self.covariance_type != "low_rank":
                message = (
                    'rank is for covariance_type="low_rank", got '
                    f"rank={self.rank!r} with {self.covariance_type!r}"
                )
                raise ValueError(message)
            require_integer("rank", self.rank, 1)
        samples: Any = self.control_samples
        if isinstance(samples, str) and samples != "auto":
            message = (
                f'control_samples must be an integer >= 0 or "auto", got {samples!r}'
            )
            raise ValueError(message)
        if not isinstance(samples, str):
            require_integer("control_samples", samples, 0)

    @property
    def sample_size(self) -> int:
        """How many keys are drawn from all components together."""
        if self.control_samples == "auto":
            return _AUTO_SAMPLES
        return self.control_samples or _DIAGNOSTIC_SAMPLES


@dataclass(frozen=True)
class Fitted:
    """A fitted state; never changed, but for what is computed from it when needed.

    Attributes
    ----------
    settings : Settings
    statistics : Statistics
    partition : ndarray of float64, shape (k, d), or None
        Centroids that keys are assigned to, where these were found by k-means.
    seed : int
        Of k-means and of the draws.
    like : array
        An empty array of the library and on the device of the keys.
    """

    settings: Settings
    statistics: Statistics
    partition: Float64 | None
    seed: int
    like: Array
    _cache: dict[str, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        # Casts for one data type or another are made again when needed.
        return {**self.__dict__, "_cache": {}}

    @property
    def n_features(self) -> int:
        """Number of features d."""
        return int(self.statistics.means.shape[1])

    def cached(self, name: str, make: Callable[[], _T]) -> _T:
        """Return what `make` returned when the name was first asked for."""
        if name not in self._cache:
            self._cache[name] = make()
        found: _T = self._cache[name]
        return found

    def learned(self, name: str, make: Callable[[], HostArray]) -> Array:
        """Return an array that users see, in the library of the keys."""
        return self.cached(name, lambda: from_host(np.array(make()), self.like))

    def row(self, name: str, make: Callable[[], HostArray], dtype: Any = None) -> Array:
        """Return numbers (k,) as a row (1, k) of the library and device of the keys.

        They are copied there once: an evaluation that copied them would wait.
        """
        return self.cached(
            f"{name} {dtype}", lambda: from_host(make()[None, :], self.like, dtype)
        )

    def factors(self) -> tuple[Float64, Float64 | None]:
        """Return factors (k, d, r) and diagonal (k, d) or None of the covariances."""
        rank = self.settings.rank
        if rank is None:
            rank = min(self.n_features, _DEFAULT_RANK)
        kind = self.settings.covariance_type
        return self.cached("factors", lambda: factorized(self.statistics, kind, rank))

    def without_labels(self) -> Fitted:
        """Return the state without what is as long as the keys."""
        # An empty batch still tells that keys had weights, which the bound asks for.
        weighted = self.statistics.has_key_weights
        key_weights: tuple[Any, ...] = (np.zeros(0),) if weighted else ()
        return replace(
            self,
            statistics=replace(self.statistics, labels=(), key_weights=key_weights),
        )

    def on_host(self) -> Fitted:
        """Return the state for NumPy queries."""
        return self.cached("host", lambda: replace(self, like=np.zeros(0)))


# -------- learning


def learn(
    known: Fitted | None,
    settings: Settings,
    X: Array,
    labels: Array | None,
    sample_weight: Array | None,
    *,
    max_iter: int,
    random_state: Any,
) -> Fitted:
    """Return the state of the keys known so far, if any, followed by those of X."""
    if known is not None and settings != known.settings:
        message = (
            "parameters must stay as they were in the first call, "
            f"{known.settings}, got {settings}; fit starts anew"
        )
        raise ValueError(message)
    rows = as_rows(X)
    n, d = rows.shape
    _check_features(known, settings, d)
    like = like_of(rows)
    if known is not None:
        _dispatch.backend_for(X=like, means_=known.like)
    k = settings.n_components
    host_labels = None if labels is None else as_labels(labels, n, k)
    weights = None if sample_weight is None else as_weights(sample_weight, n)
    if n == 0:
        if known is not None:
            return known
        message = f"0 sample(s) (shape={(n, d)}) while a minimum of 1 is required."
        raise ValueError(message)
    if known is not None:
        _check_labels(known, labels)
        seed, partition = known.seed, known.partition
        fingerprint = known.statistics.fingerprint
        start = known.statistics.n_seen
    else:
        if weights is not None and not np.any(weights > 0):
            message = "sample_weight must not be zero for all rows"
            raise ValueError(message)
        seed, start = seed_of(random_state), 0
        n_clusters = k if k > 1 and labels is None else None
        fingerprint, partition = _begin(rows, weights, n_clusters, seed, max_iter)
    options: dict[str, Any] = {
        "n_components": k,
        "diagonal": settings.covariance_type == "diag",
        "sample_size": settings.sample_size,
        "seed": seed,
        "fingerprint": fingerprint,
    }
    if _dispatch.library_of(rows).name == "dask":
        from ._backends import dask as graphs

        statistics = graphs.fit_statistics(
            batch_statistics, rows, host_labels, weights, partition, options, start
        )
    else:
        statistics = batch_statistics(
            rows, host_labels, weights, partition, start=start, **options
        )
    if known is not None:
        statistics = known.statistics.merged(statistics, settings.sample_size)
        like = known.like
    return Fitted(settings, statistics, partition, seed, like)


def _check_features(known: Fitted | None, settings: Settings, d: int) -> None:
    if known is not None and d != known.n_features:
        message = (
            f"X has {d} features, but GaussianNormalizer is expecting "
            f"{known.n_features} features as input"
        )
        raise ValueError(message)
    if settings.rank is not None and settings.rank > d:
        message = (
            f"rank must be at most the number of features, {d}, got {settings.rank}"
        )
        raise ValueError(message)


def _check_labels(known: Fitted, labels: Array | None) -> None:
    """Check that components are given as in the first call."""
    if known.settings.n_components == 1:
        return
    if known.partition is not None and labels is not None:
        message = (
            "labels must be left out, as in the first call, which found the components"
        )
        raise ValueError(message)
    if known.partition is None and labels is None:
        message = "labels must be given, as in the first call"
        raise ValueError(message)


def _begin(
    rows: Array,
    weights: Float64 | None,
    n_clusters: int | None,
    seed: int,
    max_iter: int,
) -> tuple[int, Float64 | None]:
    """Return the fingerprint of the first keys, and centroids if k-means finds them."""
    if n_clusters is None:
        first, _ = _taken(rows, np.zeros(1, np.int64))
        return fingerprint_of(first), None
    n = rows.shape[0]
    if n < n_clusters:
        message = (
            f"n_samples={n} should be >= n_components={n_clusters}, or labels be given"
        )
        raise ValueError(message)
    generator = np.random.default_rng(seed)
    present = (
        np.arange(n, dtype=np.int64)
        if weights is None
        else np.flatnonzero(weights > 0).astype(np.int64)
    )
    chosen = present[_kmeans.sample_rows(len(present), n_clusters, generator)]
    first, trained = _taken(rows, chosen)
    xp = _dispatch.namespace_of(trained)
    if not bool(xp.all(xp.isfinite(trained))):
        if _dispatch.library_of(rows).name == "dask":
            from ._backends import dask as graphs

            graphs.require_finite(rows)
        else:
            require_finite(rows)
    partition = _kmeans.train_centroids(
        trained,
        n_clusters,
        weights=None
        if weights is None
        else from_host(weights[chosen], trained, trained.dtype),
        max_iter=max_iter,
        generator=generator,
    )
    return fingerprint_of(first), partition


def _taken(rows: Array, indices: npt.NDArray[np.int64]) -> tuple[HostArray, Array]:
    """Return the first row, in host memory, and those of the indices."""
    if _dispatch.library_of(rows).name == "dask":
        from ._backends import dask as graphs

        return graphs.take_rows(rows, indices)
    xp = _dispatch.namespace_of(rows)
    return to_host(rows[:1, :])[0], xp.take(rows, from_host(indices, rows), axis=0)


def merged(a: Fitted, b: Fitted) -> Fitted:
    """Return the state of the keys of a followed by those of b."""
    for name, of_a, of_b in zip(Settings._fields, a.settings, b.settings, strict=True):
        if of_a != of_b:
            message = f"a and b must have the same {name}, got {of_a!r} and {of_b!r}"
            raise ValueError(message)
    if a.n_features != b.n_features:
        message = (
            "a and b must have the same number of features, got "
            f"{a.n_features} and {b.n_features}"
        )
        raise ValueError(message)
    _dispatch.backend_for(a=a.like, b=b.like)
    same = (
        a.partition is b.partition
        if a.partition is None or b.partition is None
        else np.array_equal(a.partition, b.partition)
    )
    if not same:
        message = (
            "a and b must have the same components: fit both with labels, or "
            "copies of one fitted estimator"
        )
        raise ValueError(message)
    return replace(
        a, statistics=a.statistics.merged(b.statistics, a.settings.sample_size)
    )


# -------- storing


def packed(fitted: Fitted) -> tuple[dict[str, Any], Arrays]:
    """Return a state as numbers by name and arrays by name, without its settings."""
    statistics = fitted.statistics
    header = {
        "seed": fitted.seed,
        "fingerprint": statistics.fingerprint,
        "n_seen": statistics.n_seen,
        "unit": statistics.unit,
        "sum_unit": statistics.sum_unit,
    }
    sample = statistics.sample
    arrays: Arrays = {
        "counts": statistics.weights,
        "rows": statistics.rows,
        "means": statistics.means,
        "scatter": statistics.scatter,
        "radii": statistics.radii,
        "labels": statistics.all_labels(),
        "sample_priorities": sample.priorities,
        "sample_positions": sample.positions,
        "sample_components": sample.components,
        "sample_rows": sample.rows,
        "sample_weights": sample.weights,
    }
    weights = statistics.all_key_weights()
    if weights is not None:
        arrays["key_weights"] = weights
    if fitted.partition is not None:
        arrays["centers"] = fitted.partition
    return header, arrays


def unpacked(
    settings: Settings, header: dict[str, Any], arrays: Arrays, like: Array
) -> Fitted:
    """Return the state that was packed; KeyError where something is missing."""
    statistics = Statistics(
        arrays["counts"],
        arrays["rows"],
        arrays["means"],
        arrays["scatter"],
        arrays["radii"],
        Sample(
            arrays["sample_priorities"],
            arrays["sample_positions"],
            arrays["sample_components"],
            arrays["sample_rows"],
            arrays["sample_weights"],
        ),
        header["n_seen"],
        (arrays["labels"],),
        (arrays.get("key_weights"),),
        header["fingerprint"],
        header["unit"],
        header["sum_unit"],
    )
    return Fitted(settings, statistics, arrays.get("centers"), header["seed"], like)
