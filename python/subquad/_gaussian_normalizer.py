"""The estimator `GaussianNormalizer`, re-exported by `subquad.normalizers`."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from . import _dispatch, _kmeans, _validation
from ._host import from_host, has_float64, to_host
from ._reference._common import log_sum_exp

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]
Int64: TypeAlias = npt.NDArray[np.int64]
CovarianceType: TypeAlias = Literal["full", "diag", "low_rank"]
SelfTerm: TypeAlias = Literal["include", "exclude"]

_FORMAT = "subquad.GaussianNormalizer"
_FORMAT_VERSION = 1
_DEFAULT_RANK = 16
_AUTO_SAMPLES = 512
_DIAGNOSTIC_SAMPLES = 256
# With three, two are left to measure a spread by when a row leaves its own key out.
_LEAST_SAMPLES = 3
# Rows x samples of the temporaries that the control variate needs at a time.
_MOST_RESIDUALS = 1 << 22
# Half the spacing of float64: the relative error of one operation.
_UNIT = float(np.finfo(np.float64).eps) / 2
# Third central moments on an interval of width w are at most w^3 / (6 sqrt 3).
_SKEWNESS_BOUND = 1.0 / (36.0 * math.sqrt(3.0))


class NotFittedError(ValueError, AttributeError):
    """An estimator was asked for what only `fit` can tell."""


# -------- the sample of keys


@dataclass(frozen=True)
class _Sample:
    """Keys drawn evenly without replacement, sorted by component.

    Every key has a random priority. The sample is the `size` smallest of all
    priorities, and the smallest three of each component: given how many keys of a
    component are in, each choice of them is equally likely. Samples of parts hold the
    sample of the whole.
    """

    priorities: npt.NDArray[np.uint64]
    positions: Int64
    components: Int64
    rows: Float64
    weights: Float64

    @classmethod
    def empty(cls, n_features: int) -> _Sample:
        return cls(
            np.zeros(0, np.uint64),
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
            np.zeros((0, n_features)),
            np.zeros(0),
        )

    def shifted(self, positions: int) -> _Sample:
        return replace(self, positions=self.positions + positions)

    def joined(self, other: _Sample, n_components: int, size: int) -> _Sample:
        parts = [
            np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("priorities", "positions", "components", "rows", "weights")
        ]
        kept = _smallest(parts[0], parts[1], parts[2], n_components, size)
        return _Sample(*(part[kept] for part in parts))


def _smallest(
    priorities: npt.NDArray[np.uint64],
    positions: Int64,
    components: Int64,
    n_components: int,
    size: int,
) -> Int64:
    """Return the indices of the smallest priorities, of all and of each component."""
    n = len(priorities)
    if n > size:
        chosen = np.argpartition(priorities, size)[:size] if size else np.zeros(0, int)
        have = np.bincount(components[chosen], minlength=n_components)
        extra = [chosen]
        for component in np.flatnonzero(have < _LEAST_SAMPLES):
            members = np.flatnonzero(components == component)
            if len(members) > _LEAST_SAMPLES:
                least = np.argpartition(priorities[members], _LEAST_SAMPLES)
                members = members[least[:_LEAST_SAMPLES]]
            extra.append(members)
        chosen = np.unique(np.concatenate(extra))
    else:
        chosen = np.arange(n)
    order = np.lexsort((positions[chosen], priorities[chosen], components[chosen]))
    return cast(Int64, chosen[order].astype(np.int64))


def _mixed(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Make a counter random: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _stream_key(seed: int, fingerprint: int) -> int:
    word = hashlib.blake2b(
        f"{seed}:{fingerprint}".encode(), digest_size=8, person=b"subquad"
    )
    return int.from_bytes(word.digest(), "little")


def _priorities(stream: int, positions: Int64) -> npt.NDArray[np.uint64]:
    counter = positions.astype(np.uint64) + np.uint64(1)
    return _mixed(np.uint64(stream) + counter * np.uint64(0x9E3779B97F4A7C15))


def _fingerprint(row: npt.NDArray[Any]) -> int:
    """Tell streams of keys apart by their first row, lest equal seeds draw alike."""
    bits = np.ascontiguousarray(row, dtype="<f8").tobytes()
    return int.from_bytes(hashlib.blake2b(bits, digest_size=8).digest(), "little")


# -------- statistics, and their merge


@dataclass(frozen=True)
class _Statistics:
    """What a set of keys leaves behind: a mergeable state in host memory.

    Attributes
    ----------
    weights, rows : ndarray, shape (k,)
        Sum of the weights of each component, and number of keys of positive weight.
    means : ndarray, shape (k, d)
    scatter : ndarray, shape (k, d, d) or (k, d)
        Weighted sums of squares about the means, or their diagonals.
    radii : ndarray, shape (k,)
        Largest distance of a key from its mean.
    sample : _Sample
    n_seen : int
        Number of keys, those of weight zero included.
    labels, key_weights : tuple of ndarray
        Component and weight of every key, in batches; a batch without weights has None.
    fingerprint : int
    unit, sum_unit : float
        Relative error of one operation in the coarsest data type of the keys, and in
        that of long sums over keys.
    """

    weights: Float64
    rows: Int64
    means: Float64
    scatter: Float64
    radii: Float64
    sample: _Sample
    n_seen: int
    labels: tuple[npt.NDArray[Any], ...]
    key_weights: tuple[Float64 | None, ...]
    fingerprint: int
    unit: float
    sum_unit: float

    def merged(self, other: _Statistics, sample_size: int) -> _Statistics:
        """Return the statistics of these keys followed by those of `other`.

        Means and squares as Chan, Golub and LeVeque (1983) merge them.
        """
        total = self.weights + other.weights
        share = np.where(
            total > 0, other.weights / np.where(total > 0, total, 1.0), 0.0
        )
        apart = np.where(
            ((self.weights > 0) & (other.weights > 0))[:, None],
            other.means - self.means,
            0.0,
        )
        means = np.where(
            (self.weights > 0)[:, None],
            self.means + apart * share[:, None],
            other.means,
        )
        between = self.weights * share
        if self.scatter.ndim == 3:
            outer = apart[:, :, None] * apart[:, None, :]
            scatter = self.scatter + other.scatter + between[:, None, None] * outer
        else:
            scatter = self.scatter + other.scatter + between[:, None] * apart * apart
        distance = np.sqrt(np.sum(apart * apart, axis=1))
        radii = np.maximum(
            np.where(self.weights > 0, self.radii + share * distance, 0.0),
            np.where(other.weights > 0, other.radii + (1.0 - share) * distance, 0.0),
        )
        sample = self.sample.joined(
            other.sample.shifted(self.n_seen), len(total), sample_size
        )
        return _Statistics(
            total,
            self.rows + other.rows,
            means,
            scatter,
            radii,
            sample,
            self.n_seen + other.n_seen,
            self.labels + other.labels,
            self.key_weights + other.key_weights,
            self.fingerprint,
            max(self.unit, other.unit),
            max(self.sum_unit, other.sum_unit),
        )


def _batch_statistics(
    rows: Array,
    labels: npt.NDArray[Any] | None,
    weights: Float64 | None,
    partition: Float64 | None,
    *,
    n_components: int,
    diagonal: bool,
    sample_size: int,
    seed: int,
    fingerprint: int,
    start: int,
) -> _Statistics:
    """Return the statistics of a batch of keys at position `start` of its stream."""
    xp = _dispatch.namespace_of(rows)
    backend = _dispatch.backend_for(X=rows)
    n = rows.shape[0]
    unit = float(xp.finfo(rows.dtype).eps) / 2
    if weights is not None:
        info = xp.finfo(rows.dtype)
        positive_weights = weights[weights > 0]
        narrow = positive_weights.size > 0 and (
            positive_weights.min() < float(info.smallest_normal)
            or positive_weights.max() > float(info.max)
        )
        if narrow and has_float64(rows):
            # The kernels take weights in the type of the rows, where these would
            # vanish.
            rows = xp.astype(rows, xp.float64)
        device_weights = from_host(weights, rows, rows.dtype)
        weights = to_host(device_weights).astype(np.float64)
        if not np.all(weights > 0):
            # The sums skip rows without weight, and would not show what these hold.
            require_finite(rows, start)
    else:
        device_weights = None
    if partition is not None:
        device_labels = _kmeans.assign(rows, partition)
    elif labels is None:
        device_labels = from_host(np.zeros(n, np.int64), rows)
    else:
        device_labels = from_host(labels.astype(np.int64), rows)
    counts, sums = backend.component_sums(
        rows, device_labels, device_weights, n_components
    )
    counts, sums = to_host(counts).astype(np.float64), to_host(sums).astype(np.float64)
    if not np.all(np.isfinite(sums)):
        require_finite(rows, start)
    means = sums / np.where(counts > 0, counts, 1.0)[:, None]
    scatter, radii = backend.component_scatter(
        rows, device_labels, device_weights, from_host(means, rows), diagonal
    )
    host_labels = to_host(device_labels)
    if weights is None:
        positions = np.arange(n, dtype=np.int64)
        components = host_labels
    else:
        positions = np.flatnonzero(weights > 0).astype(np.int64)
        components = host_labels[positions]
    priorities = _priorities(_stream_key(seed, fingerprint), positions + start)
    kept = _smallest(priorities, positions, components, n_components, sample_size)
    taken = xp.take(rows, from_host(positions[kept], rows), axis=0)
    sample = _Sample(
        priorities[kept],
        positions[kept],
        components[kept].astype(np.int64),
        to_host(taken).astype(np.float64),
        np.ones(len(kept)) if weights is None else weights[positions[kept]],
    )
    return _Statistics(
        counts,
        np.bincount(components, minlength=n_components).astype(np.int64),
        means,
        to_host(scatter).astype(np.float64),
        to_host(radii).astype(np.float64),
        sample,
        n,
        (host_labels.astype(np.min_scalar_type(n_components - 1)),),
        (weights,),
        fingerprint,
        unit,
        _UNIT if has_float64(rows) else unit,
    )


def require_finite(rows: Array, start: int = 0) -> None:
    """Raise ValueError naming the first row of X that holds NaN or infinity."""
    xp = _dispatch.namespace_of(rows)
    bad = np.flatnonzero(~to_host(xp.all(xp.isfinite(rows), axis=1)))
    if len(bad):
        message = (
            f"X must be finite, but row {start + int(bad[0])} contains NaN or infinity"
        )
        raise ValueError(message)


# -------- evaluation


class _Settings(NamedTuple):
    """Parameters as they were when keys were first seen."""

    n_components: int
    covariance_type: CovarianceType
    rank: int | None
    control_samples: int | Literal["auto"]


class _Evaluation(NamedTuple):
    """Statistics in the data type, library and device of queries."""

    log_counts: Array
    means: Array
    factors: Array
    diagonal: Array | None
    sample_deviations: Array
    sample_weights: Array
    sample_log_weights: Array
    sample_offsets: Array


class _Own(NamedTuple):
    """Which fitted key each row is: component, log weight, place in the sample.

    The component is -1 for none, the place -1 for a key outside of the sample.
    """

    component: Array
    log_weight: Array
    place: Array
    include: bool

    def at(self, rows: slice) -> _Own:
        return _Own(
            self.component[rows], self.log_weight[rows], self.place[rows], self.include
        )


class _Terms(NamedTuple):
    """Gaussian terms (n, k) of rows without their own keys, and own terms (n,)."""

    log_terms: Array
    own_terms: Array | None
    mean: Array
    variance: Array
    original_mean: Array
    log_weights: Array
    weights: Array
    rows: Array
    is_own: Array | None
    spread: Array | None  # what a row's own key added to its component's variance


class _Estimates(NamedTuple):
    """Values of log Z and their estimated errors, arrays (n,)."""

    gaussian: Array
    corrected: Array
    gaussian_error: Array
    standard_error: Array
    fallback_error: Array


def _triangular_factor(covariance: Float64, most_columns: int) -> Float64:
    """Return a lower trapezoidal L with L Lᵀ the covariance, singular or not."""
    if most_columns == len(covariance):
        with contextlib.suppress(np.linalg.LinAlgError):
            return cast(Float64, np.linalg.cholesky(covariance))
    # Correlations, so that features of small scale keep their digits.
    scales = np.sqrt(np.diagonal(covariance))
    divisor = np.where(scales > 0, scales, 1.0)
    values, vectors = np.linalg.eigh(covariance / divisor[:, None] / divisor)
    kept = values[::-1][:most_columns]
    root = vectors[:, ::-1][:, :most_columns] * np.sqrt(np.maximum(kept, 0.0))
    _, triangle = np.linalg.qr((scales[:, None] * root).T)
    return cast(Float64, triangle.T)


def _factorized(
    statistics: _Statistics, covariance_type: str, rank: int
) -> tuple[Float64, Float64 | None]:
    """Return factors (k, d, r) and diagonal (k, d) or None, with Ω = F Fᵀ + diag."""
    k, d = statistics.means.shape
    weights = np.where(statistics.weights > 0, statistics.weights, 1.0)
    if covariance_type == "diag":
        return np.zeros((k, d, 0)), statistics.scatter / weights[:, None]
    covariances = statistics.scatter / weights[:, None, None]
    if covariance_type == "low_rank":
        values, vectors = np.linalg.eigh(covariances)
        top = np.sqrt(np.maximum(values[:, ::-1][:, :rank], 0.0))
        factors = vectors[:, :, ::-1][:, :, :rank] * top[:, None, :]
        explained = np.sum(factors * factors, axis=2)
        variances = np.diagonal(covariances, axis1=1, axis2=2)
        return factors, np.maximum(variances - explained, 0.0)
    triangles = [
        # n keys spread in n - 1 directions at most.
        _triangular_factor(covariance, min(d, max(int(rows) - 1, 0)))
        for covariance, rows in zip(covariances, statistics.rows, strict=True)
    ]
    width = max(triangle.shape[1] for triangle in triangles)
    factors = np.zeros((k, d, width))
    for factor, triangle in zip(factors, triangles, strict=True):
        factor[:, : triangle.shape[1]] = triangle
    return factors, None


def _sampled(statistics: _Statistics) -> tuple[Float64, Int64]:
    """Return the sample less the means, and where each component begins in it."""
    sample = statistics.sample
    deviations = sample.rows - statistics.means[sample.components]
    sizes = np.bincount(sample.components, minlength=len(statistics.weights))
    return deviations, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


# -------- the estimator


class GaussianNormalizer:
    """Softmax normalizers log Σⱼ exp(x·yⱼ) in time independent of the number of keys.

    The keys are split into components. Within one, the scores x·yⱼ have mean x·μ and
    variance xᵀΩx exactly; treated as a normal law, their exponentials add up to n
    exp(x·μ + xᵀΩx / 2). What is lost are the third and higher cumulants.

    Parameters
    ----------
    n_components : int, default=1
        Number of components k. Unless `fit` is given labels, they are found by k-means.
    covariance_type : {"full", "diag", "low_rank"}, default="full"
        What is kept of the covariance Ω of each component. "low_rank" keeps the `rank`
        largest eigenpairs, and the diagonal of what is left of Ω.
    rank : int, optional
        Number of eigenpairs for "low_rank", at most the number of features. By default
        16, or all if there are fewer.
    control_samples : int or "auto", default=0
        Number of keys to draw at `fit`, evenly and without replacement (three of each
        component at least), whose exact scores correct the estimate: each component's
        sum gets the sampled mean of exp(t) - q(t), where t is the centred score and q a
        polynomial whose sum is known from the moments. The corrected sum is unbiased,
        and exact once all keys are drawn. "auto" draws 512, and uses the correction for
        the rows where its standard error is below the estimated error of the Gaussian
        value less the standard error of that estimate.
    max_iter : int, default=25
        Most iterations of a k-means run.
    random_state : int, numpy.random.Generator or None, default=None
        Seed of k-means and of the draws. One integer gives the same result on every
        array library and thread count.

    Attributes
    ----------
    counts_ : array of float64, shape (k,)
        Number of keys of each component, or the sum of their weights.
    log_counts_ : array of float64, shape (k,)
        The logarithms of the counts, -inf for an empty component.
    means_ : array of float64, shape (k, d)
    covariances_ : array of float64, shape (k, d, d), or (k, d) for "diag"
        Moments about the means divided by the counts (not by counts less one). Not
        there for "low_rank".
    factors_ : array of float64, shape (k, d, r)
        Triangular F with Ω = F Fᵀ for "full", and the scaled eigenvectors for
        "low_rank". For "full", `subquad.gaussian_log_normalizer` of the log counts, the
        means and these returns what the estimator does without control samples.
    diagonal_ : array of float64, shape (k, d)
        For "low_rank": what Ω has on its diagonal beyond the factors, at least 0.
    radii_ : array of float64, shape (k,)
        Bounds on the distance of a component's keys from their mean, attained when all
        came in one `fit`.
    labels_ : array of int64, shape (n,)
        Component of every key, in the order they came.
    centers_ : array of float64, shape (k, d)
        Centroids that keys were assigned to, where no labels were given and k > 1.
    n_features_in_ : int
        Number of features d.

    Notes
    -----
    The arrays are of the library of the keys and on their device. Queries must be of
    that library too; Dask keys leave NumPy arrays behind, and Dask queries work with
    NumPy arrays. Queries of float16 and bfloat16 are computed in float32.

    `fit` costs O(n d²) and a query O(k d²), or O(k d) with diagonal covariances,
    O(k d r) with rank r, and O(d s) more with s control samples. Memory: O(k d²), a few
    bytes a key for its label, and O(n) for n queries.

    The relative error of the sum is about a sixth of the scores' third cumulant within
    a component: small where |x||y| is about 1, or where components are tight; see
    `error_estimate` and `error_bound`.

    References
    ----------
    L. Dall'Amico and E. M. Belliardo, "Learning distributed
    representations with efficient SoftMax normalization", arXiv:2303.17475.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> rng = np.random.default_rng(0)
    >>> keys = rng.normal(size=(1000, 8)) / 4
    >>> queries = rng.normal(size=(5, 8)) / 4
    >>> estimator = sq.GaussianNormalizer(n_components=4, random_state=0).fit(keys)
    >>> error = estimator.log_normalizer(queries) - sq.log_normalizer(queries, keys)
    >>> bool(np.all(np.abs(error) < 1e-3))
    True
    >>> bool(np.all(np.abs(error) <= estimator.error_bound(queries)))
    True
    """

    n_features_in_: int
    _statistics: _Statistics
    _settings: _Settings
    _partition: Float64 | None
    _like: Array
    _seed: int
    _cache: dict[str, Any]

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance_type: CovarianceType = "full",
        rank: int | None = None,
        control_samples: int | Literal["auto"] = 0,
        max_iter: int = 25,
        random_state: int | np.random.Generator | None = None,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.rank = rank
        self.control_samples = control_samples
        self.max_iter = max_iter
        self.random_state = random_state

    # -------- fitting

    def fit(
        self,
        X: Array,
        y: Any = None,
        *,
        labels: Array | None = None,
        sample_weight: Array | None = None,
    ) -> GaussianNormalizer:
        """Learn the statistics of the keys.

        Parameters
        ----------
        X : array, shape (n, d)
            Keys, of any array library. Integers become float64, half precision float32.
            Lists and data frames become NumPy arrays. Dask arrays are read once, chunk
            by chunk.
        y : ignored
            There for the conventions of scikit-learn.
        labels : array of int, shape (n,), optional
            Component of each key, in [0, n_components). By default k-means finds them.
        sample_weight : array, shape (n,), optional
            Weights wⱼ >= 0 of Σⱼ wⱼ exp(x·yⱼ). A key of weight 0 is not there, but for
            its label and its place in the order.

        Returns
        -------
        GaussianNormalizer
            The estimator itself.

        Raises
        ------
        ValueError
            If X is not a matrix of finite numbers, there are fewer keys than components
            to find, `labels` or `sample_weight` do not fit X or have values out of
            range, or a parameter has no meaning.
        TypeError
            If X is sparse.

        Notes
        -----
        O(n d²) time; k-means trains on at most 256 n_components of the keys.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.array([[0.0, 1.0], [0.0, 3.0], [2.0, 0.0]])
        >>> estimator = sq.GaussianNormalizer(2).fit(keys, labels=[0, 0, 1])
        >>> estimator.counts_, estimator.means_
        (array([2., 1.]), array([[0., 2.],
               [2., 0.]]))
        """
        self._check_parameters()
        fitted = GaussianNormalizer(**self.get_params())
        fitted._learn(X, labels, sample_weight)
        for name in _STATE:
            setattr(self, name, getattr(fitted, name))
        self._cache = {}
        return self

    def partial_fit(
        self,
        X: Array,
        y: Any = None,
        *,
        labels: Array | None = None,
        sample_weight: Array | None = None,
    ) -> GaussianNormalizer:
        """Add keys to those learned so far.

        The first call without labels fixes the components by k-means on its keys; later
        keys join the nearest. Keys that come in several batches leave the statistics of
        `fit` with the same labels, to rounding, and the same control samples; only the
        radii grow to cover the motion of the means.

        Parameters
        ----------
        X : array, shape (n, d)
            Keys, of the same array library in every call.
        y : ignored
            There for the conventions of scikit-learn.
        labels : array of int, shape (n,), optional
            Component of each key: in all calls or in none, unless there is one
            component.
        sample_weight : array, shape (n,), optional
            Weights of the keys.

        Returns
        -------
        GaussianNormalizer
            The estimator itself.

        Raises
        ------
        ValueError
            As `fit`, and if labels come in some calls only, or the number of features
            changes.
        TypeError
            If X is sparse, or of another library or device than before.

        Notes
        -----
        O(n d² + k d²) time.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(100, 3))
        >>> estimator = sq.GaussianNormalizer()
        >>> for batch in (keys[:30], keys[30:]):
        ...     estimator = estimator.partial_fit(batch)
        >>> np.allclose(estimator.means_, keys.mean(axis=0))
        True
        """
        self._check_parameters()
        self._learn(X, labels, sample_weight)
        return self

    @staticmethod
    def merge(a: GaussianNormalizer, b: GaussianNormalizer) -> GaussianNormalizer:
        """Return the estimator of the keys of both, those of b following those of a.

        Parameters
        ----------
        a, b : GaussianNormalizer
            Fitted with the same parameters (`max_iter` and `random_state` may differ)
            on the same components: with labels, with one component, or as copies of one
            estimator.

        Returns
        -------
        GaussianNormalizer
            A new estimator, with the parameters of a. Its statistics are those of one
            `fit` to rounding; its control samples are drawn as evenly, though not the
            same.

        Raises
        ------
        ValueError
            If the parameters, the number of features or the components differ.
        TypeError
            If an argument is no GaussianNormalizer, or the two hold arrays of different
            libraries or devices.

        Notes
        -----
        O(k d²) time, and O(n) to join the labels.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(100, 3))
        >>> first = sq.GaussianNormalizer().fit(keys[:30])
        >>> second = sq.GaussianNormalizer().fit(keys[30:])
        >>> merged = sq.GaussianNormalizer.merge(first, second)
        >>> np.allclose(merged.covariances_[0], np.cov(keys.T, ddof=0))
        True
        """
        for name, estimator in (("a", a), ("b", b)):
            _require_estimator(name, estimator)
            estimator._require_fitted()
        for name, of_a, of_b in zip(
            _Settings._fields, a._settings, b._settings, strict=True
        ):
            if of_a != of_b:
                message = (
                    f"a and b must have the same {name}, got {of_a!r} and {of_b!r}"
                )
                raise ValueError(message)
        if a.n_features_in_ != b.n_features_in_:
            message = (
                "a and b must have the same number of features, got "
                f"{a.n_features_in_} and {b.n_features_in_}"
            )
            raise ValueError(message)
        _dispatch.backend_for(a=a._like, b=b._like)
        same = (
            a._partition is b._partition
            if a._partition is None or b._partition is None
            else np.array_equal(a._partition, b._partition)
        )
        if not same:
            message = (
                "a and b must have the same components: fit both with labels, or "
                "copies of one fitted estimator"
            )
            raise ValueError(message)
        merged = GaussianNormalizer(**a.get_params())
        merged._settings = a._settings
        merged._partition = a._partition
        merged._like = a._like
        merged._seed = a._seed
        merged._statistics = a._statistics.merged(
            b._statistics, _sample_size(a._settings)
        )
        merged._cache = {}
        merged.n_features_in_ = a.n_features_in_
        return merged

    def _learn(
        self, X: Array, labels: Array | None, sample_weight: Array | None
    ) -> None:
        known = self._is_fitted()
        settings = _Settings(*(getattr(self, name) for name in _Settings._fields))
        if known and settings != self._settings:
            message = (
                "parameters must stay as they were in the first call, "
                f"{self._settings}, got {settings}; fit starts anew"
            )
            raise ValueError(message)
        rows = _as_keys(X)
        n, d = rows.shape
        if known and d != self.n_features_in_:
            message = (
                f"X has {d} features, but GaussianNormalizer is expecting "
                f"{self.n_features_in_} features as input"
            )
            raise ValueError(message)
        if self.rank is not None and self.rank > d:
            message = (
                f"rank must be at most the number of features, {d}, got {self.rank}"
            )
            raise ValueError(message)
        like = _like(rows)
        if known:
            _dispatch.backend_for(X=like, means_=self._like)
        host_labels = (
            None if labels is None else _as_labels(labels, n, self.n_components)
        )
        weights = None if sample_weight is None else _as_weights(sample_weight, n)
        if n == 0:
            if known:
                return
            message = f"0 sample(s) (shape={(n, d)}) while a minimum of 1 is required."
            raise ValueError(message)
        if weights is not None and not known and not np.any(weights > 0):
            message = "sample_weight must not be zero for all rows"
            raise ValueError(message)
        seed = self._seed if known else _seed_of(self.random_state)
        is_dask = _dispatch.library_of(rows).name == "dask"
        partition = self._partition if known else None
        by_distance = self.n_components > 1 and (
            partition is not None or (labels is None and not known)
        )
        if known and self.n_components > 1:
            if partition is not None and labels is not None:
                message = (
                    "labels must be left out, as in the first call, which found the "
                    "components"
                )
                raise ValueError(message)
            if partition is None and labels is None:
                message = "labels must be given, as in the first call"
                raise ValueError(message)
        chosen = np.zeros(1, np.int64)
        if by_distance and partition is None:
            if n < self.n_components:
                message = (
                    f"n_samples={n} should be >= n_components={self.n_components}, "
                    "or labels be given"
                )
                raise ValueError(message)
            generator = np.random.default_rng(seed)
            present = (
                np.arange(n, dtype=np.int64)
                if weights is None
                else np.flatnonzero(weights > 0).astype(np.int64)
            )
            drawn = _kmeans.sample_rows(len(present), self.n_components, generator)
            chosen = present[drawn]
        if is_dask:
            from ._backends import dask as graphs

            first, trained = graphs.take_rows(rows, chosen)
        else:
            xp = _dispatch.namespace_of(rows)
            first, trained = to_host(rows[:1, :])[0], None
            if by_distance and partition is None:
                trained = xp.take(rows, from_host(chosen, rows), axis=0)
        if by_distance and partition is None:
            assert trained is not None
            xp = _dispatch.namespace_of(trained)
            if not bool(xp.all(xp.isfinite(trained))):
                if is_dask:
                    graphs.require_finite(rows)
                else:
                    require_finite(rows)
            partition = _kmeans.train_centroids(
                trained,
                self.n_components,
                weights=None
                if weights is None
                else from_host(weights[chosen], trained, trained.dtype),
                max_iter=self.max_iter,
                generator=generator,
            )
        options: dict[str, Any] = {
            "n_components": self.n_components,
            "diagonal": self.covariance_type == "diag",
            "sample_size": _sample_size(settings),
            "seed": seed,
            "fingerprint": self._statistics.fingerprint
            if known
            else _fingerprint(first),
        }
        start = self._statistics.n_seen if known else 0
        if is_dask:
            batch = graphs.fit_statistics(
                _batch_statistics, rows, host_labels, weights, partition, options, start
            )
        else:
            batch = _batch_statistics(
                rows, host_labels, weights, partition, start=start, **options
            )
        if known:
            batch = self._statistics.merged(batch, _sample_size(settings))
        self._statistics = batch
        self._settings = settings
        self._partition = partition
        self._seed = seed
        self._like = self._like if known else like
        self._cache = {}
        self.n_features_in_ = d

    # -------- what was learned

    @property
    def counts_(self) -> Array:
        return self._learned("counts_", lambda: self._fitted().weights)

    @property
    def log_counts_(self) -> Array:
        return self._learned("log_counts_", lambda: _log(self._fitted().weights))

    @property
    def means_(self) -> Array:
        return self._learned("means_", lambda: self._fitted().means)

    @property
    def covariances_(self) -> Array:
        if self._settings.covariance_type == "low_rank":
            message = (
                "low-rank covariances are kept as factors_ and diagonal_, not as "
                "covariances_"
            )
            raise AttributeError(message)

        def covariances() -> Float64:
            statistics = self._fitted()
            shape = (-1, *(1,) * (statistics.scatter.ndim - 1))
            divisor = np.where(statistics.weights > 0, statistics.weights, 1.0)
            return cast(Float64, statistics.scatter / np.reshape(divisor, shape))

        return self._learned("covariances_", covariances)

    @property
    def factors_(self) -> Array:
        self._require_fitted()
        if self._settings.covariance_type == "diag":
            message = "diagonal covariances are kept as covariances_, not as factors_"
            raise AttributeError(message)
        return self._learned("factors_", lambda: self._host_factors()[0])

    @property
    def diagonal_(self) -> Array:
        self._require_fitted()
        if self._settings.covariance_type != "low_rank":
            message = "only low-rank covariances have a diagonal_"
            raise AttributeError(message)
        return self._learned(
            "diagonal_", lambda: cast(Float64, self._host_factors()[1])
        )

    @property
    def radii_(self) -> Array:
        return self._learned("radii_", lambda: self._fitted().radii)

    @property
    def labels_(self) -> Array:
        return self._learned(
            "labels_",
            lambda: np.concatenate(
                [part.astype(np.int64) for part in self._fitted().labels]
            ),
        )

    @property
    def centers_(self) -> Array:
        self._require_fitted()
        if self._partition is None:
            message = (
                "there are no centers_: the components were given by labels, or are one"
            )
            raise AttributeError(message)
        return self._learned("centers_", lambda: self._partition)

    def _learned(self, name: str, make: Any) -> Array:
        self._require_fitted()
        found = self._cache.get(name)
        if found is None:
            found = from_host(np.array(make()), self._like)
            self._cache[name] = found
        return found

    def _host_factors(self) -> tuple[Float64, Float64 | None]:
        statistics = self._fitted()
        found: tuple[Float64, Float64 | None] | None = self._cache.get("factors")
        if found is None:
            rank = (
                self.n_features_in_
                if self._settings.rank is None
                else self._settings.rank
            )
            if self._settings.rank is None:
                rank = min(rank, _DEFAULT_RANK)
            found = _factorized(statistics, self._settings.covariance_type, rank)
            self._cache["factors"] = found
        return found

    def _is_fitted(self) -> bool:
        return hasattr(self, "n_features_in_")

    def _require_fitted(self) -> None:
        if self._is_fitted():
            return
        kind: type[Exception] = NotFittedError
        if "sklearn" in sys.modules:
            from sklearn import exceptions

            kind = exceptions.NotFittedError
        message = (
            "This GaussianNormalizer instance is not fitted yet. Call 'fit' with "
            "appropriate arguments before using this estimator."
        )
        raise kind(message)

    def _fitted(self) -> _Statistics:
        self._require_fitted()
        return self._statistics

    # -------- evaluation

    def log_normalizer(
        self,
        x: Array,
        *,
        self_index: Array | None = None,
        self_term: SelfTerm = "include",
    ) -> Array:
        """Return estimates of log Σⱼ wⱼ exp(xᵢ·yⱼ) over the fitted keys.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries, of the library of the fitted arrays.
        self_index : array of int, shape (n,), optional
            Which fitted key row i is itself, in the order the keys came (-1: none). Its
            term is then computed exactly, and the others from the statistics without
            it. Batches share it.
        self_term : {"include", "exclude"}, default="include"
            Whether the sum of row i holds its own key; "exclude" needs `self_index`.

        Returns
        -------
        array, shape (..., n)
            In the data type of x; float32 for float16 and bfloat16.

        Raises
        ------
        ValueError
            If x has the wrong shape, or `self_index` the wrong shape or values out of
            range, or `self_term` no meaning.
        TypeError
            If x is not floating, or of another library or device than the fitted
            arrays.
        sklearn.exceptions.NotFittedError
            Before `fit`; a ValueError and AttributeError.

        Notes
        -----
        O(n k d²) time and O(n) memory without control samples.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(500, 6)) / 3
        >>> estimator = sq.GaussianNormalizer().fit(keys)
        >>> log_z = estimator.log_normalizer(keys, self_index=np.arange(500))
        >>> bool(np.max(np.abs(log_z - sq.log_normalizer(keys, keys))) < 0.02)
        True
        """
        return self._evaluate("log_normalizer", x, self_index, self_term)

    def standard_error(
        self,
        x: Array,
        *,
        self_index: Array | None = None,
        self_term: SelfTerm = "include",
    ) -> Array:
        """Return the standard error of log Z that the draw of control samples causes.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries.
        self_index : array of int, shape (n,), optional
            As in `log_normalizer`.
        self_term : {"include", "exclude"}, default="include"
            As in `log_normalizer`.

        Returns
        -------
        array, shape (..., n)
            0 where every key was drawn. With "auto" it is that of the corrected value,
            whether or not that was used.

        Raises
        ------
        ValueError
            Without control samples, and as `log_normalizer`.
        TypeError
            As `log_normalizer`.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(500, 6)) / 3
        >>> estimator = sq.GaussianNormalizer(control_samples=100, random_state=0)
        >>> estimator = estimator.fit(keys)
        >>> estimator.standard_error(keys[:4]).shape
        (4,)
        """
        self._require_fitted()
        if self._settings.control_samples == 0:
            message = "standard_error needs control_samples > 0, got 0"
            raise ValueError(message)
        return self._evaluate("standard_error", x, self_index, self_term)

    def error_estimate(
        self,
        x: Array,
        *,
        self_index: Array | None = None,
        self_term: SelfTerm = "include",
    ) -> Array:
        """Return a prediction of |error of log Z|, which may be exceeded.

        Without control samples it is a sixth of the third cumulant of the scores, the
        first that the Gaussian value leaves out, measured on 256 keys drawn at `fit`.
        With control samples it is the standard error, to which components whose
        correction had to be given up (their corrected sum was not positive) add the
        third cumulant. With "auto" it is the smaller of the two, as is the choice of
        the value.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries.
        self_index : array of int, shape (n,), optional
            As in `log_normalizer`.
        self_term : {"include", "exclude"}, default="include"
            As in `log_normalizer`.

        Returns
        -------
        array, shape (..., n)

        Raises
        ------
        ValueError, TypeError
            As `log_normalizer`.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).exponential(size=(500, 6)) / 4
        >>> estimator = sq.GaussianNormalizer(random_state=0).fit(keys)
        >>> error = estimator.log_normalizer(keys) - sq.log_normalizer(keys, keys)
        >>> estimate = estimator.error_estimate(keys)
        >>> bool(0.5 < np.mean(estimate) / np.mean(np.abs(error)) < 2)
        True
        """
        return self._evaluate("error_estimate", x, self_index, self_term)

    def error_bound(
        self,
        x: Array,
        *,
        self_index: Array | None = None,
        self_term: SelfTerm = "include",
    ) -> Array:
        """Return a bound on |error of log Z| that always holds, rounding included.

        A component's centred scores lie in an interval of width w = 2 r |x|, r its
        radius. With v their variance as kept, the logarithm of its sum is wrong by at
        most b = max(w²/8 - v/2, v/2), and for full covariances by at most w³/(36√3);
        log Z is wrong by at most log Σ Ẑ exp(b) - log Σ Ẑ over the components. It grows
        fast with |x| r, and is of use where that is about 1 or less.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries.
        self_index : array of int, shape (n,), optional
            As in `log_normalizer`.
        self_term : {"include", "exclude"}, default="include"
            As in `log_normalizer`.

        Returns
        -------
        array, shape (..., n)
            For the value of `log_normalizer` with the same arguments.

        Raises
        ------
        ValueError, TypeError
            As `log_normalizer`.

        Notes
        -----
        Computed in float64 whatever the type of x. The rounding of the
        computation in that type is bounded by the standard analysis of inner products
        (Higham, "Accuracy and Stability of Numerical Algorithms", chapter 3), so the
        bound exceeds 0 where the value is exact.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(500, 3)) / 4
        >>> estimator = sq.GaussianNormalizer().fit(keys)
        >>> error = estimator.log_normalizer(keys) - sq.log_normalizer(keys, keys)
        >>> bool(np.all(np.abs(error) <= estimator.error_bound(keys)))
        True
        """
        return self._evaluate("error_bound", x, self_index, self_term)

    def log_probabilities(self, x: Array, y: Array) -> Array:
        """Return xᵢ·yⱼ - log Zᵢ, log probabilities of the softmax over the fitted keys.

        Parameters
        ----------
        x : array of floating type, shape (..., n, d)
            Queries.
        y : array of floating type, shape (..., m, d)
            Keys of interest, fitted ones or not, of the library of x.

        Returns
        -------
        array, shape (..., n, m)

        Raises
        ------
        ValueError, TypeError
            As `log_normalizer`, for both arrays.

        Notes
        -----
        O(n k d² + n m d) time.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(500, 6)) / 4
        >>> estimator = sq.GaussianNormalizer().fit(keys)
        >>> p = np.exp(estimator.log_probabilities(keys[:3], keys))
        >>> bool(np.allclose(p.sum(axis=1), 1.0, atol=0.01))
        True
        """
        log_z = self.log_normalizer(x)
        _dispatch.backend_for(x=x, y=y)
        x, y = _validation.common_floats(("x", "y"), (x, y))
        y, _ = self._queries(y, "y")
        xp = _dispatch.namespace_of(x)
        return xp.matmul(x, xp.matrix_transpose(y)) - log_z[..., None]

    def _evaluate(
        self, method: str, x: Array, self_index: Array | None, self_term: SelfTerm
    ) -> Array:
        self._require_fitted()
        _validation.check_self_term(self_term, self_index)
        queries, dtype = self._queries(x, "x")
        if self_index is not None:
            self_index = self._checked_index(self_index, queries)
        if _dispatch.library_of(queries).name == "dask":
            from ._backends import dask as graphs

            # Labels, which are as many as keys, travel to the workers only where they
            # are asked for.
            part = self if self_index is not None else self._without_labels()
            return graphs.map_rows(part, method, queries, self_index, self_term)
        if method == "error_bound" and not has_float64(queries):
            host = self._on_host()
            index = None if self_index is None else to_host(self_index)
            bound = host._evaluate(method, to_host(queries), index, self_term)
            return from_host(to_host(bound), queries, queries.dtype)
        with np.errstate(all="ignore"):
            if method == "log_normalizer" and self._settings.control_samples == 0:
                return self._gaussian(queries, dtype, self_index, self_term)
            return self._by_rows(method, queries, dtype, self_index, self_term)

    def _queries(self, x: Array, name: str) -> tuple[Array, str]:
        """Return queries of a data type to compute in, and its name."""
        library = _dispatch.library_of(x, name)
        if library.name != "dask":
            _dispatch.backend_for(**{name: x, "means_": self._like})
        elif _dispatch.library_of(self._like).name != "numpy":
            fitted = _dispatch.library_of(self._like).name
            message = (
                f"all arrays of a call must be of one library, got: {name} is dask, "
                f"means_ is {fitted}; dask queries go with numpy"
            )
            raise TypeError(message)
        (x,) = _validation.common_floats((name,), (x,))
        if x.ndim < 2 or x.shape[-1] != self.n_features_in_:
            message = (
                f"{name} must have shape (..., n, d) with d = {self.n_features_in_}, "
                f"the number of features in fit, got shape {tuple(x.shape)}"
            )
            raise ValueError(message)
        return x, _type_name(x)

    def _checked_index(self, self_index: Array, queries: Array) -> Array:
        library = _dispatch.library_of(self_index, "self_index")
        if _dispatch.library_of(queries).name != "dask" or library.name != "numpy":
            _dispatch.backend_for(x=queries, self_index=self_index)
        n, m = queries.shape[-2], self._statistics.n_seen
        index = _validation.check_index("self_index", self_index, n, m)
        if library.name == "torch" and index.device.type == "cpu":
            # A tensor that a transformation of torch wraps has no values to look at.
            with contextlib.suppress(RuntimeError):
                _validation.check_range("self_index", index, m, library)
        return index

    def _gaussian(
        self, x: Array, dtype: str, self_index: Array | None, self_term: SelfTerm
    ) -> Array:
        xp = _dispatch.namespace_of(x)
        e = self._evaluation(dtype)
        own = None
        if self_index is not None:
            key = self._own(x, self_index, self_term)
            own = (key.component, xp.astype(key.log_weight, x.dtype), key.include)
        backend = _dispatch.backend_for(x=x)
        return backend.gaussian_log_normalizer(
            x, e.log_counts, e.means, e.factors, e.diagonal, own
        )

    def _by_rows(
        self,
        method: str,
        x: Array,
        dtype: str,
        self_index: Array | None,
        self_term: SelfTerm,
    ) -> Array:
        """Evaluate blocks of rows, as many as keep the temporaries small."""
        xp = _dispatch.namespace_of(x)
        rows = xp.reshape(x, (-1, x.shape[-1]))
        own = None
        if self_index is not None:
            key = self._own(x, self_index, self_term)
            copies = math.prod(x.shape[:-2])
            own = key._replace(
                component=xp.tile(key.component, (copies,)),
                log_weight=xp.tile(key.log_weight, (copies,)),
                place=xp.tile(key.place, (copies,)),
            )
        n = rows.shape[0]
        width = len(self._statistics.sample.weights) + len(self._statistics.weights)
        size = max(1, _MOST_RESIDUALS // width)
        results = []
        for start in range(0, max(n, 1), size):
            span = slice(start, min(start + size, n))
            part = None if own is None else own.at(span)
            results.append(self._block(method, rows[span, :], dtype, part))
        result = results[0] if len(results) == 1 else xp.concat(results)
        return xp.reshape(result, x.shape[:-1])

    def _block(self, method: str, rows: Array, dtype: str, own: _Own | None) -> Array:
        xp = _dispatch.namespace_of(rows)
        if method == "error_bound":
            bound = self._bound(rows, dtype, own)
            # Rounding to the nearest must not take it below.
            return xp.astype(
                bound * (1.0 + 2.0 * float(xp.finfo(rows.dtype).eps)), rows.dtype
            )
        values = self._estimates(rows, dtype, own)
        choose = self._settings.control_samples == "auto"
        # The third cumulant is measured on the same sample, with about the same
        # standard error.
        error = values.standard_error + values.fallback_error
        uses_gaussian = values.standard_error + error > values.gaussian_error
        if method == "standard_error":
            result = values.standard_error
        elif method == "error_estimate":
            result = error
            if self._settings.control_samples == 0:
                result = values.gaussian_error
            elif choose:
                result = xp.where(uses_gaussian, values.gaussian_error, result)
        else:
            result = values.corrected
            if choose:
                result = xp.where(uses_gaussian, values.gaussian, result)
        return xp.astype(result, rows.dtype)

    def _evaluation(self, dtype: str) -> _Evaluation:
        found: _Evaluation | None = self._cache.get(dtype)
        if found is not None:
            return found
        statistics = self._statistics
        factors, diagonal = self._host_factors()
        deviations, offsets = _sampled(statistics)

        def cast_array(array: Float64) -> Array:
            with np.errstate(over="ignore"):
                return from_host(array.astype(dtype), self._like)

        found = _Evaluation(
            cast_array(_log(statistics.weights)),
            cast_array(statistics.means),
            cast_array(factors),
            None if diagonal is None else cast_array(diagonal),
            cast_array(deviations),
            cast_array(statistics.sample.weights),
            cast_array(_log(statistics.sample.weights)),
            from_host(offsets, self._like),
        )
        self._cache[dtype] = found
        return found

    def _own(self, x: Array, self_index: Array, self_term: SelfTerm) -> _Own:
        xp = _dispatch.namespace_of(x)
        components, log_weights, positions, places = self._keys()
        index = xp.astype(self_index, positions.dtype)
        is_key = index >= 0
        index = xp.where(is_key, index, xp.zeros_like(index))
        none = -xp.ones_like(index)
        component = xp.where(is_key, xp.take(components, index), none)
        if log_weights is None:
            wide = xp.float64 if has_float64(x) else xp.float32
            log_weight = xp.zeros(
                index.shape, dtype=wide, device=_dispatch.device_of(x)
            )
        else:
            log_weight = xp.take(log_weights, index)
        place = xp.searchsorted(positions, index)
        last = xp.full_like(place, positions.shape[0] - 1)
        place = xp.where(place > last, last, place)
        in_sample = is_key & (xp.take(positions, place) == index)
        place = xp.where(in_sample, xp.take(places, place), none)
        return _Own(component, log_weight, place, self_term == "include")

    def _keys(self) -> tuple[Array, Array | None, Array, Array]:
        """Return each key's component and log weight, and where the sample's keys are.

        The last two: positions of the sample in the stream, increasing, and the places
        in the sample that belong to them.
        """
        found: tuple[Array, Array | None, Array, Array] | None = self._cache.get("keys")
        if found is None:
            statistics = self._statistics
            components = np.concatenate(
                [part.astype(np.int64) for part in statistics.labels]
            )
            log_weights = None
            if any(part is not None for part in statistics.key_weights):
                weights = np.concatenate(
                    [
                        np.ones(len(labels)) if part is None else part
                        for part, labels in zip(
                            statistics.key_weights, statistics.labels, strict=True
                        )
                    ]
                )
                log_weights = _log(weights)
                # A key without weight is in no component.
                components = np.where(weights > 0, components, -1)
            order = np.argsort(statistics.sample.positions).astype(np.int64)
            found = (
                from_host(components, self._like),
                None if log_weights is None else from_host(log_weights, self._like),
                from_host(statistics.sample.positions[order], self._like),
                from_host(order, self._like),
            )
            self._cache["keys"] = found
        return found

    def _terms(self, rows: Array, dtype: str, own: _Own | None) -> _Terms:
        xp = _dispatch.namespace_of(rows)
        e = self._evaluation(dtype)
        backend = _dispatch.backend_for(x=rows)
        mean, variance = backend.gaussian_score_moments(
            rows, e.means, e.factors, e.diagonal
        )
        wide = xp.float64 if has_float64(rows) else xp.float32
        mean, variance = xp.astype(mean, wide), xp.astype(variance, wide)
        weights = from_host(self._statistics.weights, rows, wide)[None, :]
        n_keys = from_host(self._statistics.rows.astype(np.float64), rows, wide)[
            None, :
        ]
        occupied = weights > 0
        log_weights = xp.where(
            occupied, xp.log(xp.where(occupied, weights, 1.0)), -math.inf
        )
        original = mean
        own_terms = is_own = spread = None
        if own is not None:
            components = from_host(np.arange(weights.shape[1]), rows)
            is_own = (
                own.component[:, None]
                == xp.astype(components, own.component.dtype)[None, :]
            )
            log_own = xp.astype(own.log_weight, wide)
            weight = xp.where(is_own, xp.exp(log_own)[:, None], 0.0)
            square = xp.sum(xp.astype(rows, wide) ** 2, axis=1)
            rest = weights - weight
            emptied = is_own & (rest <= weights * 8.0 * _UNIT)
            rest = xp.where(emptied, 0.0, rest)
            divisor = xp.where(rest > 0, rest, 1.0)
            apart = square[:, None] - mean
            mean = xp.where(is_own, mean - weight * apart / divisor, mean)
            spread = apart * apart
            if self._settings.covariance_type == "diag":
                # What the key added to the variance of each dimension by itself.
                own_means = xp.take(
                    xp.astype(e.means, wide),
                    xp.where(own.component < 0, 0, own.component),
                    axis=0,
                )
                x = xp.astype(rows, wide)
                spread = xp.sum((x * (x - own_means)) ** 2, axis=1)[:, None]
            left = weights / divisor * (variance - weight * spread / divisor)
            left = xp.where(left < 0, 0.0, left)
            variance = xp.where(is_own, left, variance)
            mean, variance = (
                xp.where(emptied, 0.0, mean),
                xp.where(emptied, 0.0, variance),
            )
            log_weights = xp.where(rest > 0, xp.log(divisor), -math.inf)
            weights = rest
            n_keys = n_keys - xp.astype(is_own, wide)
            if own.include:
                own_terms = xp.where(own.component >= 0, log_own + square, -math.inf)
        log_terms = xp.where(
            log_weights == -math.inf, -math.inf, log_weights + mean + 0.5 * variance
        )
        return _Terms(
            log_terms,
            own_terms,
            mean,
            variance,
            original,
            log_weights,
            weights,
            n_keys,
            is_own,
            spread,
        )

    def _estimates(self, rows: Array, dtype: str, own: _Own | None) -> _Estimates:
        xp = _dispatch.namespace_of(rows)
        e = self._evaluation(dtype)
        terms = self._terms(rows, dtype, own)
        wide = terms.mean.dtype
        shape = terms.mean.shape
        occupied = terms.weights > 0
        scale = xp.where(
            occupied, terms.rows / xp.where(occupied, terms.weights, 1.0), 0.0
        )
        scale = xp.broadcast_to(scale, shape)
        backend = _dispatch.backend_for(x=rows)
        log_factor, log_error, third = backend.sample_residuals(
            rows,
            e.sample_deviations,
            e.sample_weights,
            e.sample_offsets,
            xp.astype(terms.variance, rows.dtype),
            xp.astype(scale, rows.dtype),
            None
            if own is None
            else xp.astype(terms.original_mean - terms.mean, rows.dtype),
            None if own is None else own.place,
            self._settings.covariance_type == "full",
        )
        log_factor, log_error, third = (
            xp.astype(part, wide) for part in (log_factor, log_error, third)
        )
        failed = xp.isnan(log_factor) & ~xp.isnan(terms.log_terms)
        # The correction is not needed where every key is in the sample.
        sizes = np.diff(_sampled(self._statistics)[1]).astype(np.float64)
        incomplete = from_host(sizes < self._statistics.rows, rows)[None, :]
        failed = failed & incomplete
        log_factor = xp.where(failed | ~incomplete | ~occupied, 0.0, log_factor)
        corrected_terms = self._with_complete(
            rows, e, terms, own, terms.log_terms + log_factor
        )
        gaussian = _log_sum(xp, terms.log_terms, terms.own_terms)
        corrected = _log_sum(xp, corrected_terms, terms.own_terms)

        def share(log_z: Array) -> Array:
            absent = terms.log_terms == -math.inf
            difference = xp.where(absent, 0.0, terms.log_terms - log_z[:, None])
            return xp.where(absent, 0.0, xp.exp(difference))

        skew = xp.where(occupied, third, 0.0)
        gaussian_error = xp.abs(xp.sum(share(gaussian) * skew, axis=1)) / 6.0
        fallback = xp.where(failed, xp.abs(skew), 0.0)
        corrected_share = share(corrected)
        fallback_error = xp.sum(corrected_share * fallback, axis=1) / 6.0
        # Sampling from a finite set without replacement: no error is left once all of
        # it is drawn.
        drawn = from_host(sizes, rows, wide)[None, :]
        if own is not None and terms.is_own is not None:
            drawn = drawn - xp.astype(terms.is_own & (own.place >= 0)[:, None], wide)
        some = terms.rows > 0
        missed = xp.where(some, 1.0 - drawn / xp.where(some, terms.rows, 1.0), 0.0)
        missed = xp.sqrt(xp.where(missed < 0, 0.0, missed))
        present = (corrected_share > 0) & (missed > 0) & (log_error > -math.inf)
        exponent = xp.where(
            present, terms.log_terms - corrected[:, None] + log_error, 0.0
        )
        errors = xp.where(present, xp.exp(exponent) * missed, 0.0)
        standard_error = xp.sqrt(xp.sum(errors * errors, axis=1))
        nothing = xp.zeros_like(gaussian)
        invalid = xp.where(xp.isnan(gaussian), gaussian, nothing)
        return _Estimates(
            gaussian,
            corrected,
            gaussian_error + invalid,
            standard_error + invalid,
            fallback_error + invalid,
        )

    def _with_complete(
        self,
        rows: Array,
        e: _Evaluation,
        terms: _Terms,
        own: _Own | None,
        log_terms: Array,
    ) -> Array:
        """Return log terms with exact ones for components wholly in the sample."""
        statistics = self._statistics
        _, offsets = _sampled(statistics)
        complete = (np.diff(offsets) == statistics.rows) & (statistics.rows > 0)
        if not np.any(complete):
            return log_terms
        xp = _dispatch.namespace_of(rows)
        backend = _dispatch.backend_for(x=rows)
        columns = []
        for component in range(len(complete)):
            column = log_terms[:, component]
            if complete[component]:
                start, stop = (
                    int(offset) for offset in offsets[component : component + 2]
                )
                excluded = None
                if own is not None:
                    inside = (own.place >= start) & (own.place < stop)
                    excluded = xp.where(inside, own.place - start, -1)
                exact = backend.log_normalizer(
                    rows,
                    e.sample_deviations[start:stop, :],
                    e.sample_log_weights[start:stop],
                    excluded,
                )
                column = (
                    xp.astype(exact, column.dtype) + terms.original_mean[:, component]
                )
            columns.append(column)
        return xp.stack(columns, axis=1)

    def _bound(self, rows: Array, dtype: str, own: _Own | None) -> Array:
        """Return `error_bound` in float64, of values of the type of the rows."""
        xp = _dispatch.namespace_of(rows)
        statistics = self._statistics
        factors, diagonal = self._host_factors()
        k, d, rank = factors.shape
        x = xp.astype(rows, xp.float64)
        terms = self._terms(x, "float64", own)
        full = self._settings.covariance_type == "full"

        unit = float(xp.finfo(rows.dtype).eps) / 2
        sums = _gamma(statistics.n_seen + d + 16, statistics.sum_unit)
        mean_norms = np.linalg.norm(statistics.means, axis=1)
        # How far the means may be from those of the keys, and with them the centres of
        # the radii.
        drift = sums * (mean_norms + statistics.radii)
        reach = statistics.radii * (1.0 + sums) + drift
        weights = np.where(statistics.weights > 0, statistics.weights, 1.0)
        scatter = statistics.scatter
        if scatter.ndim == 3:
            scatter = np.diagonal(scatter, axis1=1, axis2=2)
        spread = np.sum(scatter, axis=1) / weights
        # The kernels add the squares of 128 keys in the type of the keys, and factor in
        # float64.
        moments = _gamma(136, statistics.unit) + sums + _gamma(4 * d * d + 16, _UNIT)
        factor_norms = np.sqrt(np.sum(factors * factors, axis=(1, 2)))
        part = 0.0 if diagonal is None else 1.0

        def row(values: Any) -> Array:
            return from_host(np.asarray(values, dtype=np.float64), rows)[None, :]

        norm = xp.sqrt(xp.sum(x * x, axis=1))[:, None]
        original_mean = terms.original_mean
        e64 = self._evaluation("float64")
        backend = _dispatch.backend_for(x=x)
        _, variance = backend.gaussian_score_moments(
            x, e64.means, e64.factors, e64.diagonal
        )
        tiny = float(xp.finfo(rows.dtype).smallest_normal) * (d + rank + 4)
        mean_error = norm * (
            _gamma(d + 2, unit) * row(mean_norms) + row(drift)
        ) + tiny * (1.0 + norm)
        root = xp.sqrt(variance)
        projection_error = _gamma(d + 2, unit) * norm * row(factor_norms) + tiny * (
            1.0 + norm
        )
        variance_error = (
            2.0 * root * projection_error
            + projection_error**2
            + _gamma(rank + d * int(part) + 6, unit) * (root + projection_error) ** 2
            + moments * norm**2 * row(spread)
            + 2.0 * (norm * row(drift)) ** 2
            + tiny * (1.0 + norm)
        )
        count_error = sums + unit * (
            xp.abs(row(np.where(statistics.weights > 0, _log(statistics.weights), 0.0)))
            + 4.0
        )
        own_error = None
        vanishing = None
        if own is not None and terms.is_own is not None:
            is_own = terms.is_own
            rest = xp.where(
                is_own & (terms.weights > 0), terms.weights / row(weights), 1.0
            )
            ratio = (1.0 - rest) / rest
            log_own = xp.where(own.component >= 0, own.log_weight, 0.0)[:, None]
            square = norm**2
            square_error = _gamma(d + 2, unit) * square + tiny
            # Relative error of the own key's share of its component.
            share_error = count_error + unit * (xp.abs(log_own) + 4.0)
            rest_error = (1.0 - rest) * share_error / rest
            share_error = 2.0 * (share_error + rest_error)
            # First-order analysis holds while these errors are small.
            unstable = is_own & (rest_error > 0.25)
            apart = xp.abs(square - original_mean)
            apart_error = square_error + mean_error
            root_spread = xp.sqrt(terms.spread)
            own_mean_error = (
                mean_error / rest
                + ratio * square_error
                + ratio * apart * share_error
                + 4.0 * unit * (xp.abs(original_mean) + ratio * apart)
            )
            own_variance_error = (
                variance_error
                + ratio * (2.0 * root_spread * apart_error + apart_error**2)
                + ratio * terms.spread * share_error
                + _gamma(d + 4, unit) * (variance + ratio * terms.spread)
            ) / rest + terms.variance * 2.0 * rest_error
            mean_error = xp.where(is_own, own_mean_error, mean_error)
            mean_error = xp.where(unstable, math.inf, mean_error)
            variance_error = xp.where(is_own, own_variance_error, variance_error)
            count_error = xp.where(is_own, count_error + 2.0 * rest_error, count_error)
            # The kernels leave out a rest that is not told from rounding.
            vanishing = is_own & (rest <= 16.0 * unit)
            own_error = (square_error + 4.0 * unit * (square + xp.abs(log_own)))[:, 0]

        rounding = (
            mean_error
            + 0.5 * variance_error
            + count_error
            + 8.0 * unit * (xp.abs(terms.mean) + 0.5 * terms.variance)
        )
        width = 2.0 * norm * row(reach)
        half = 0.5 * terms.variance
        hoeffding = width**2 / 8.0 - half
        closure = xp.where(hoeffding > half, hoeffding, half)
        if full:
            cubic = _SKEWNESS_BOUND * width**3
            closure = xp.where(cubic < closure, cubic, closure)
        absent = terms.log_terms == -math.inf
        raised = xp.where(absent, -math.inf, terms.log_terms + closure + rounding)
        lowest = terms.log_terms
        if vanishing is not None:
            lowest = xp.where(vanishing, -math.inf, lowest)
        own_raised = None
        if terms.own_terms is not None and own_error is not None:
            own_raised = xp.where(
                terms.own_terms == -math.inf, -math.inf, terms.own_terms + own_error
            )
        log_z = _log_sum(xp, terms.log_terms, terms.own_terms)
        low = _log_sum(xp, lowest, terms.own_terms)
        high = _log_sum(xp, raised, own_raised)
        empty = (high == -math.inf) & (low == -math.inf)
        bound = xp.where(empty, 0.0, high - low)
        size = xp.where(log_z == -math.inf, 0.0, xp.abs(log_z))
        bound = bound + (k + 16.0) * unit + 4.0 * unit * size
        if any(part is not None for part in statistics.key_weights):
            bound = bound + 2.0 * statistics.unit
        # What does not fit the type of the queries may come out infinite.
        largest = float(xp.finfo(rows.dtype).max) / 16.0
        peak = xp.max(
            xp.stack(
                [
                    xp.max(norm * (1.0 + row(mean_norms + factor_norms)), axis=1),
                    xp.max(
                        xp.where(
                            absent, 0.0, variance + norm**2 * float(own is not None)
                        ),
                        axis=1,
                    ),
                    size,
                ]
            ),
            axis=0,
        )
        constants = float(max(mean_norms.max(), factor_norms.max()))
        bound = xp.where((peak > largest) | (constants > largest), math.inf, bound)
        if self._settings.control_samples != 0:
            value = xp.astype(
                self._block("log_normalizer", rows, dtype, own), xp.float64
            )
            moved = xp.abs(value - log_z)
            bound = bound + xp.where((value == log_z) | empty, 0.0, moved)
        has_nan = xp.any(xp.isnan(x), axis=1)
        bound = xp.where(xp.isnan(bound), math.inf, bound)
        return xp.where(has_nan, math.nan, bound)

    # -------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to a file.

        The file is a plain `.npz` archive of arrays without pickled objects. It takes
        the place of an older one only once it is complete.

        Parameters
        ----------
        path : str or path-like
            Name of the file, used as it is.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`; a ValueError and AttributeError.
        OSError
            If the file cannot be written.

        Notes
        -----
        A `random_state` that is a Generator is saved as the seed that was
        drawn from it.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(100, 3))
        >>> sq.GaussianNormalizer(2, random_state=0).fit(keys).save("keys.npz")
        >>> sq.GaussianNormalizer.load("keys.npz")
        GaussianNormalizer(n_components=2, random_state=0)
        """
        statistics = self._fitted()
        parameters = {**self.get_params(), **self._settings._asdict()}
        if isinstance(parameters["random_state"], np.random.Generator):
            parameters["random_state"] = self._seed
        parameters = {
            name: value if value is None or isinstance(value, str) else int(value)
            for name, value in parameters.items()
        }
        header = {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "parameters": parameters,
            "seed": self._seed,
            "fingerprint": statistics.fingerprint,
            "n_seen": statistics.n_seen,
            "unit": statistics.unit,
            "sum_unit": statistics.sum_unit,
        }
        sample = statistics.sample
        arrays: dict[str, npt.NDArray[Any]] = {
            "header": np.array(json.dumps(header)),
            "counts": statistics.weights,
            "rows": statistics.rows,
            "means": statistics.means,
            "scatter": statistics.scatter,
            "radii": statistics.radii,
            "labels": np.concatenate(statistics.labels),
            "sample_priorities": sample.priorities,
            "sample_positions": sample.positions,
            "sample_components": sample.components,
            "sample_rows": sample.rows,
            "sample_weights": sample.weights,
        }
        if any(part is not None for part in statistics.key_weights):
            arrays["key_weights"] = np.concatenate(
                [
                    np.ones(len(labels)) if part is None else part
                    for part, labels in zip(
                        statistics.key_weights, statistics.labels, strict=True
                    )
                ]
            )
        if self._partition is not None:
            arrays["centers"] = self._partition
        target = Path(path)
        handle, temporary = tempfile.mkstemp(
            prefix=target.name, suffix=".part", dir=target.parent
        )
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files that only their owner can read.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, like: Array | None = None
    ) -> GaussianNormalizer:
        """Read an estimator that `save` wrote.

        Parameters
        ----------
        path : str or path-like
            Name of the file.
        like : array, optional
            An array of the library and on the device that the learned arrays are to
            come in. By default NumPy.

        Returns
        -------
        GaussianNormalizer

        Raises
        ------
        ValueError
            If the file was not written by `save`, or by a later version of it.
        OSError
            If the file cannot be read.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> keys = np.random.default_rng(0).normal(size=(100, 3))
        >>> fitted = sq.GaussianNormalizer().fit(keys)
        >>> fitted.save("keys.npz")
        >>> loaded = sq.GaussianNormalizer.load("keys.npz")
        >>> np.array_equal(fitted.log_normalizer(keys), loaded.log_normalizer(keys))
        True
        """
        wrong = f"{os.fspath(path)!r} is not a file that GaussianNormalizer.save wrote"
        with open(path, "rb") as file:
            try:
                with np.load(file, allow_pickle=False) as archive:
                    arrays = dict(archive.items())
                header = json.loads(str(arrays["header"][()]))
                is_ours = header["format"] == _FORMAT
            except Exception as error:
                raise ValueError(wrong) from error
        if not is_ours:
            raise ValueError(wrong)
        if header["version"] > _FORMAT_VERSION:
            message = (
                f"{os.fspath(path)!r} has format version {header['version']}, "
                f"this version of subquad reads up to {_FORMAT_VERSION}"
            )
            raise ValueError(message)
        try:
            loaded = cls(**header["parameters"])
            loaded._settings = _Settings(
                *(getattr(loaded, name) for name in _Settings._fields)
            )
            loaded._seed = header["seed"]
            loaded._partition = arrays.get("centers")
            loaded._statistics = _Statistics(
                arrays["counts"],
                arrays["rows"],
                arrays["means"],
                arrays["scatter"],
                arrays["radii"],
                _Sample(
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
        except (KeyError, TypeError) as error:
            raise ValueError(wrong) from error
        loaded._like = np.zeros(0) if like is None else _like(like)
        loaded._cache = {}
        loaded.n_features_in_ = loaded._statistics.means.shape[1]
        return loaded

    # -------- conventions of scikit-learn

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters of the constructor.

        Parameters
        ----------
        deep : bool
            There for the conventions of scikit-learn; no parameter is an estimator.

        Returns
        -------
        dict

        Examples
        --------
        >>> import subquad as sq
        >>> sq.GaussianNormalizer(3).get_params()["n_components"]
        3
        """
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> GaussianNormalizer:
        """Set parameters of the constructor, for the next `fit`.

        Parameters
        ----------
        **params
            New values by name.

        Returns
        -------
        GaussianNormalizer
            The estimator itself.

        Raises
        ------
        ValueError
            If there is no parameter of a name.

        Examples
        --------
        >>> import subquad as sq
        >>> sq.GaussianNormalizer().set_params(n_components=3)
        GaussianNormalizer(n_components=3)
        """
        for name in params:
            if name not in _PARAMETERS:
                message = (
                    f"Invalid parameter {name!r} for estimator {self!r}. "
                    f"Valid parameters are: {list(_PARAMETERS)}."
                )
                raise ValueError(message)
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name, default in _PARAMETERS.items()
            if getattr(self, name) is not default and getattr(self, name) != default
        ]
        return f"GaussianNormalizer({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            array_api_support=True,
            input_tags=InputTags(),
        )

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        # Casts for one data type or another are made again when needed.
        if "_cache" in state:
            state["_cache"] = {}
        return state

    def _without_labels(self) -> GaussianNormalizer:
        light = copy.copy(self)
        light._cache = {}
        light._statistics = replace(self._statistics, labels=(), key_weights=())
        return light

    def _on_host(self) -> GaussianNormalizer:
        found: GaussianNormalizer | None = self._cache.get("host")
        if found is None:
            found = copy.copy(self)
            found._cache = {}
            found._like = np.zeros(0)
            self._cache["host"] = found
        return found

    def _check_parameters(self) -> None:
        _require_integer("n_components", self.n_components, 1)
        _require_integer("max_iter", self.max_iter, 1)
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
            _require_integer("rank", self.rank, 1)
        samples: Any = self.control_samples
        if isinstance(samples, str) and samples != "auto":
            message = (
                f'control_samples must be an integer >= 0 or "auto", got {samples!r}'
            )
            raise ValueError(message)
        if not isinstance(samples, str):
            _require_integer("control_samples", samples, 0)


_STATE = (
    "_statistics",
    "_settings",
    "_partition",
    "_like",
    "_seed",
    "n_features_in_",
)
_PARAMETERS: dict[str, Any] = {
    "n_components": 1,
    "covariance_type": "full",
    "rank": None,
    "control_samples": 0,
    "max_iter": 25,
    "random_state": None,
}


def _sample_size(settings: _Settings) -> int:
    if settings.control_samples == "auto":
        return _AUTO_SAMPLES
    return settings.control_samples or _DIAGNOSTIC_SAMPLES


# -------- arguments


def _require_estimator(name: str, value: Any) -> None:
    if not isinstance(value, GaussianNormalizer):
        kind = type(value).__qualname__
        message = f"{name} must be a GaussianNormalizer, got {kind}"
        raise TypeError(message)


def _require_integer(name: str, value: Any, least: int) -> None:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < least:
        message = f"{name} must be an integer >= {least}, got {value!r}"
        raise ValueError(message)


def _seed_of(random_state: Any) -> int:
    if random_state is None:
        return int(np.random.default_rng().integers(2**63))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**63))
    is_integer = isinstance(random_state, (int, np.integer))
    if not is_integer or isinstance(random_state, bool) or random_state < 0:
        message = (
            "random_state must be None, an integer >= 0 or a numpy.random.Generator, "
            f"got {random_state!r}"
        )
        raise ValueError(message)
    return int(random_state)


def _type_name(array: Array) -> str:
    """Return the name of an array's data type without its library."""
    return str(array.dtype).rpartition(".")[2]


def _as_keys(X: Any) -> Array:
    """Return X as a matrix of float32 or float64 of its library."""
    if hasattr(X, "tocsr"):
        message = "X must be dense, got a sparse matrix; pass X.toarray()"
        raise TypeError(message)
    known = isinstance(X, np.ndarray) or hasattr(X, "__array_namespace__")
    known = known or type(X).__module__.partition(".")[0] in ("torch", "dask", "cupy")
    rows: Array = X if known and not hasattr(X, "columns") else np.asarray(X)
    library = _dispatch.library_of(rows, "X")
    if rows.ndim != 2:
        message = (
            f"X must be a matrix of shape (n, d), got shape {tuple(rows.shape)}. "
            "Reshape your data using X.reshape(-1, 1) if it has one feature, or "
            "X.reshape(1, -1) if it is one key"
        )
        raise ValueError(message)
    xp = library.xp
    name = _type_name(rows)
    if library.name == "dask" and any(math.isnan(size) for size in rows.shape):
        rows = rows.compute_chunk_sizes()
    if rows.shape[1] == 0:
        message = (
            f"0 feature(s) (shape={tuple(rows.shape)}) while a minimum of 1 is "
            "required."
        )
        raise ValueError(message)
    if name.startswith("complex"):
        message = f"Complex data not supported: X must be real, got dtype {rows.dtype}"
        raise ValueError(message)
    if name in ("float16", "bfloat16"):
        return xp.astype(rows, xp.float32)
    if name in ("float32", "float64"):
        if isinstance(rows, np.ndarray) and not rows.dtype.isnative:
            rows = rows.astype(rows.dtype.newbyteorder("="))
        return rows
    if library.name in ("numpy", "dask"):
        return rows.astype(np.float64)
    return xp.astype(rows, xp.float64 if has_float64(rows) else xp.float32)


def _like(rows: Array) -> Array:
    """Return an empty array that tells the library and device of others."""
    library = _dispatch.library_of(rows)
    if library.name in ("numpy", "dask"):
        return np.zeros(0, dtype=rows.dtype)
    return library.xp.zeros((0,), dtype=rows.dtype, device=_dispatch.device_of(rows))


def _as_labels(labels: Any, n: int, n_components: int) -> npt.NDArray[Any]:
    host = _to_host_or_list(labels)
    if host.ndim != 1 or host.shape[0] != n:
        message = (
            f"labels must have shape ({n},), one for each row of X, got {host.shape}"
        )
        raise ValueError(message)
    if host.dtype.kind not in "iu" and n > 0:
        message = f"labels must be integers, got dtype {host.dtype}"
        raise ValueError(message)
    if n > 0 and (host.min() < 0 or host.max() >= n_components):
        message = (
            f"labels must be in [0, n_components={n_components}), got values in "
            f"[{host.min()}, {host.max()}]"
        )
        raise ValueError(message)
    return host


def _as_weights(sample_weight: Any, n: int) -> Float64:
    host = _to_host_or_list(sample_weight).astype(np.float64)
    if host.shape != (n,):
        message = (
            f"sample_weight must have shape ({n},), one for each row of X, got "
            f"{host.shape}"
        )
        raise ValueError(message)
    bad = np.flatnonzero(~((host >= 0) & np.isfinite(host)))
    if len(bad):
        message = (
            "sample_weight must be finite and not negative, but "
            f"sample_weight[{bad[0]}] is {host[bad[0]]}"
        )
        raise ValueError(message)
    return host


def _to_host_or_list(values: Any) -> npt.NDArray[Any]:
    known = hasattr(values, "__array_namespace__") and not isinstance(
        values, np.ndarray
    )
    if known or type(values).__module__.partition(".")[0] in ("torch", "dask", "cupy"):
        return to_host(values)
    return np.asarray(values)


# -------- numbers


def _log(values: Float64) -> Float64:
    with np.errstate(divide="ignore"):
        return np.log(values)


def _gamma(n_operations: int, unit: float) -> float:
    """Return the bound n u / (1 - n u) on the relative error of that many roundings."""
    product = n_operations * unit
    return product / (1.0 - product) if product < 0.5 else math.inf


def _log_sum(xp: Any, log_terms: Array, own_terms: Array | None) -> Array:
    if own_terms is not None:
        log_terms = xp.concat([log_terms, own_terms[:, None]], axis=1)
    return log_sum_exp(xp, log_terms)
