"""What random features keep of their data: first and second moments, mergeable.

Values in host memory, in float64 whatever the type of the data; batch dimensions in
front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _dispatch
from ._host import from_host, to_host

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Mean and scatter of rows, batch by batch: a mergeable state.

    Attributes
    ----------
    count : float
        Number of rows of each batch element.
    mean : ndarray of float64, shape (..., d)
    scatter : ndarray of float64, shape (..., d, d) or (..., d)
        Sums of squares about the mean, or their diagonals.
    """

    count: float
    mean: Float64
    scatter: Float64

    @property
    def is_diagonal(self) -> bool:
        """Whether only the diagonal of the scatter is kept."""
        return self.scatter.ndim == self.mean.ndim

    @property
    def covariance(self) -> Float64:
        """Scatter by count; 0 where there are no rows."""
        return self.scatter / max(self.count, 1.0)

    @property
    def second_moment(self) -> Float64:
        """Mean of x xᵀ, or its diagonal."""
        return self.covariance + self._outer(self.mean)

    def _outer(self, rows: Float64) -> Float64:
        if self.is_diagonal:
            return rows * rows
        return rows[..., :, None] * rows[..., None, :]

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows.

        Means and squares as Chan, Golub and LeVeque (1983) merge them.
        """
        total = self.count + other.count
        if total == 0.0:
            return self
        apart = other.mean - self.mean
        share = other.count / total
        # Either weight is exact where one side is empty.
        mean = (self.count / total) * self.mean + share * other.mean
        scatter = self.scatter + other.scatter + self.count * share * self._outer(apart)
        return Moments(total, mean, scatter)

    def scaled(self, factor: float) -> Moments:
        """Return the moments of the rows times a number."""
        return Moments(self.count, factor * self.mean, factor**2 * self.scatter)

    def to_diagonal(self) -> Moments:
        """Return the moments without their covariances."""
        if self.is_diagonal:
            return self
        diagonal = np.diagonal(self.scatter, axis1=-2, axis2=-1)
        return Moments(self.count, self.mean, diagonal)


def moments_of(rows: Array, diagonal: bool) -> Moments:
    """Return the moments of rows of any library.

    Parameters
    ----------
    rows : array of float32 or float64, shape (..., n, d)
    diagonal : bool
        Keep the variances alone.

    Returns
    -------
    Moments

    Notes
    -----
    Two passes over the rows, O(n d²) operations or O(n d); waits for the device.
    """
    xp = _dispatch.namespace_of(rows)
    backend = _dispatch.backend_for(X=rows)
    *batch, n, d = rows.shape
    n_batches = int(np.prod(batch, dtype=np.int64))
    if n_batches == 0 or n == 0:
        shape = (*batch, d) if diagonal else (*batch, d, d)
        return Moments(float(n), np.zeros((*batch, d)), np.zeros(shape))
    flat = rows if len(batch) == 0 else xp.reshape(rows, (n_batches * n, d))
    labels = from_host(np.repeat(np.arange(n_batches, dtype=np.int64), n), flat)
    _, sums = backend.component_sums(flat, labels, None, n_batches)
    means = to_host(sums).astype(np.float64) / n
    scatter, _ = backend.component_scatter(
        flat, labels, None, from_host(means, flat), diagonal
    )
    host_scatter = to_host(scatter).astype(np.float64)
    return Moments(
        float(n),
        np.reshape(means, (*batch, d)),
        np.reshape(host_scatter, (*batch, *host_scatter.shape[1:])),
    )
