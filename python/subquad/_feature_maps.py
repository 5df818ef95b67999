"""Fold a geometry and its frequencies into what the feature kernels take.

Values in host memory, in float64; batch dimensions in front.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ._feature_families import Geometry

Float64: TypeAlias = npt.NDArray[np.float64]


class FeatureMap(NamedTuple):
    """The arguments of `log_features` or `trigonometric_features` after the rows.

    With z = x - shift, a log-feature is z·projection + bias + z·linear - Q(z) / 2.

    Attributes
    ----------
    projection : ndarray, shape (..., m, d)
    bias : ndarray, shape (..., m)
    quadratic : ndarray, shape (..., d) or (..., d, d)
        The diagonal of Q, or an upper triangular R with Q = Rᵀ R.
    shift, linear : ndarray, shape (..., d), or None
        None where they are 0.
    """

    projection: Float64
    bias: Float64
    quadratic: Float64
    shift: Float64 | None
    linear: Float64 | None


def fold(
    geometry: Geometry,
    omega: Float64,
    alpha: float,
    t: float,
    n_components: int,
    antithetic: bool,
) -> tuple[FeatureMap, FeatureMap]:
    """Return the maps of queries and of keys.

    Parameters
    ----------
    geometry : Geometry
        Of the rows times `t`.
    omega : ndarray of float64, shape (m, d)
        Frequencies, N(0, I); m is half of `n_components` with pairs.
    alpha : float
        0 for the kernel exp(x·y), -1/2 for the Gaussian.
    t : float
        What rows are multiplied by.
    n_components : int
        Number of features.
    antithetic : bool
        Use every frequency with both signs.

    Returns
    -------
    query_map, key_map : FeatureMap

    Notes
    -----
    Costs O(m d² + d³); less where the basis is diagonal.
    """
    assert n_components == omega.shape[0] * (2 if antithetic else 1)
    sides = (
        (geometry.basis, geometry.shift_x, geometry.shift_y),
        (geometry.inverse_transpose, geometry.shift_y, geometry.shift_x),
    )
    # v = (1 + 1/ρ) / 2 and a = (1 - 1/ρ) / 8.
    inflation = 1.0 + 0.5 * (1.0 - geometry.rho) / geometry.rho
    damping = -0.125 * (1.0 - geometry.rho) / geometry.rho
    weight = 0.25 * np.sum(np.log(inflation), axis=-1) - 0.5 * math.log(n_components)
    common = (damping @ (omega * omega).T) + weight[..., None]
    scaled = t * omega * np.sqrt(inflation)[..., None, :]
    maps = []
    for basis, shift, other in sides:
        if geometry.is_diagonal:
            diagonal = np.diagonal(basis, axis1=-2, axis2=-1)
            projection = scaled * diagonal[..., None, :]
        else:
            projection = scaled @ basis
        constant = np.sum((alpha * shift + 0.5 * other) * shift, axis=-1)
        linear = t * (other + 2.0 * alpha * shift)
        maps.append(
            FeatureMap(
                projection,
                common + constant[..., None],
                _quadratic(geometry, basis, alpha, t),
                _unless_zero(shift / t),
                _unless_zero(linear),
            )
        )
    if symmetric(geometry):
        return maps[0], maps[0]
    return maps[0], maps[1]


def _quadratic(geometry: Geometry, basis: Float64, alpha: float, t: float) -> Float64:
    """Return t² (GᵀG - 2 α I), as a diagonal or a triangular factor."""
    if geometry.is_orthogonal:
        return np.full(geometry.rho.shape, t * t * (1.0 - 2.0 * alpha))
    if geometry.is_diagonal:
        diagonal = np.diagonal(basis, axis1=-2, axis2=-1)
        return t * t * (diagonal * diagonal - 2.0 * alpha)
    # From G itself, as GᵀG would square its condition.
    stacked = basis
    if alpha != 0.0:
        ridge = math.sqrt(-2.0 * alpha) * np.eye(basis.shape[-1])
        stacked = np.concatenate([basis, np.broadcast_to(ridge, basis.shape)], axis=-2)
    return t * cast(Float64, np.linalg.qr(stacked, mode="r"))


def _unless_zero(row: Float64) -> Float64 | None:
    return row if np.any(row) else None


def fold_trigonometric(
    geometry: Geometry, omega: Float64, alpha: float, t: float, n_components: int
) -> tuple[FeatureMap, FeatureMap]:
    """Return the map of queries and of keys, which is the same, as `fold` does.

    Both sides are shifted by `geometry.shift_x`, as their difference must stay.
    """
    assert n_components == 2 * omega.shape[0]
    shift = geometry.shift_x
    batch, d = shift.shape[:-1], shift.shape[-1]
    growth = 2.0 * alpha + 1.0
    constant = 0.5 * growth * np.sum(shift * shift, axis=-1)
    bias = constant[..., None] - 0.5 * math.log(omega.shape[0])
    both = FeatureMap(
        np.broadcast_to(t * omega, (*batch, *omega.shape)).copy(),
        np.broadcast_to(bias, (*batch, omega.shape[0])).copy(),
        np.full((*batch, d), -growth * t * t),
        _unless_zero(shift / t),
        _unless_zero(t * growth * shift),
    )
    return both, both


def symmetric(geometry: Geometry) -> bool:
    """Return whether queries and keys have the same map."""
    return (
        geometry.is_orthogonal
        or np.array_equal(geometry.basis, geometry.inverse_transpose)
    ) and np.array_equal(geometry.shift_x, geometry.shift_y)
