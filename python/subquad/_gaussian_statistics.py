"""What the Gaussian normalizer keeps of its keys: mergeable statistics, a sample.

Pure functions and values in host memory, in float64 whatever the type of the keys.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from . import _dispatch, _kmeans
from ._estimators import require_finite
from ._host import from_host, has_float64, to_host

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]
Int64: TypeAlias = npt.NDArray[np.int64]

# Half the spacing of float64: the relative error of one operation.
UNIT = float(np.finfo(np.float64).eps) / 2
# With three, two are left to measure a spread by when a row leaves its own key out.
_LEAST_SAMPLES = 3


# -------- the sample of keys


@dataclass(frozen=True)
class Sample:
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
    def empty(cls, n_features: int) -> Sample:
        return cls(
            np.zeros(0, np.uint64),
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
            np.zeros((0, n_features)),
            np.zeros(0),
        )

    def shifted(self, positions: int) -> Sample:
        return replace(self, positions=self.positions + positions)

    def joined(self, other: Sample, n_components: int, size: int) -> Sample:
        parts = [
            np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("priorities", "positions", "components", "rows", "weights")
        ]
        kept = _smallest(parts[0], parts[1], parts[2], n_components, size)
        return Sample(*(part[kept] for part in parts))


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


def fingerprint_of(row: npt.NDArray[Any]) -> int:
    """Tell streams of keys apart by their first row, lest equal seeds draw alike."""
    bits = np.ascontiguousarray(row, dtype="<f8").tobytes()
    return int.from_bytes(hashlib.blake2b(bits, digest_size=8).digest(), "little")


# -------- statistics, and their merge


@dataclass(frozen=True)
class Statistics:
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
    sample : Sample
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
    sample: Sample
    n_seen: int
    labels: tuple[npt.NDArray[Any], ...]
    key_weights: tuple[Float64 | None, ...]
    fingerprint: int
    unit: float
    sum_unit: float

    def merged(self, other: Statistics, sample_size: int) -> Statistics:
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
        return Statistics(
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

    def covariances(self) -> Float64:
        """Return the scatter by weight; that of an empty component is 0."""
        shape = (-1, *(1,) * (self.scatter.ndim - 1))
        divisor = np.where(self.weights > 0, self.weights, 1.0)
        return cast(Float64, self.scatter / np.reshape(divisor, shape))

    def all_labels(self) -> npt.NDArray[Any]:
        """Return the component of every key."""
        return np.concatenate(self.labels)

    def all_key_weights(self) -> Float64 | None:
        """Return the weight of every key, None where no batch had weights."""
        if not self.has_key_weights:
            return None
        return np.concatenate(
            [
                np.ones(len(labels)) if part is None else part
                for part, labels in zip(self.key_weights, self.labels, strict=True)
            ]
        )

    @property
    def has_key_weights(self) -> bool:
        """Whether any batch had weights."""
        return any(part is not None for part in self.key_weights)

    def sample_offsets(self) -> Int64:
        """Return where each component begins in the sample, and where the last ends."""
        sizes = np.bincount(self.sample.components, minlength=len(self.weights))
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def sample_deviations(self) -> Float64:
        """Return the sampled keys less the means of their components."""
        return self.sample.rows - self.means[self.sample.components]


def batch_statistics(
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
) -> Statistics:
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
    sample = Sample(
        priorities[kept],
        positions[kept],
        components[kept].astype(np.int64),
        to_host(taken).astype(np.float64),
        np.ones(len(kept)) if weights is None else weights[positions[kept]],
    )
    return Statistics(
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
        UNIT if has_float64(rows) else unit,
    )


# -------- factors of covariances


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


def factorized(
    statistics: Statistics, covariance_type: str, rank: int
) -> tuple[Float64, Float64 | None]:
    """Return factors (k, d, r) and diagonal (k, d) or None, with Ω = F Fᵀ + diag."""
    k, d = statistics.means.shape
    covariances = statistics.covariances()
    if covariance_type == "diag":
        return np.zeros((k, d, 0)), covariances
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


def quiet_log(values: Float64) -> Float64:
    with np.errstate(divide="ignore"):
        return np.log(values)
