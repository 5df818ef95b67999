"""Families of positive random features: each is a rule that fits one construction.

Every family estimates x·y through an exact change of variables, u = G (x - c) +
G⁻ᵀ (y - e), and a scale ρ of each dimension of u. A family is a choice of how G, c and
ρ follow from the first and second moments of the two sides. Values in host memory, in
float64; batch dimensions in front.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ._feature_statistics import Moments

Float64: TypeAlias = npt.NDArray[np.float64]
Basis: TypeAlias = Literal["identity", "diagonal", "eigen", "balanced"]
Scales: TypeAlias = Literal["one", "scalar", "per_dimension"]
Objective: TypeAlias = Literal["log", "mean"]

_EPSILON = float(np.finfo(np.float64).eps)
# A dimension that hardly varies would keep ρ = 1, where rows that were not seen have a
# variance of exp(u²).
_LEAST_PHI = 1e-3
_BISECTIONS = 60


@dataclass(frozen=True)
class Family:
    """A rule that fits positive features to moments.

    Attributes
    ----------
    name : str
    basis : {"identity", "diagonal", "eigen", "balanced"}
        What G is: the identity; a diagonal matrix, or any matrix, that makes both sides
        equally long; or the eigenvectors of the second moment of x + y.
    centered : bool
        Subtract the means.
    scales : {"one", "scalar", "per_dimension"}
        Whether ρ is 1, one number or one for each dimension.
    """

    name: str
    basis: Basis
    centered: bool
    scales: Scales


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("trigonometric", "identity", False, "one"),
        Family("positive", "identity", False, "one"),
        Family("oprf", "identity", False, "scalar"),
        Family("saderf", "diagonal", False, "scalar"),
        Family("sderf", "eigen", False, "per_dimension"),
        Family("aderf", "balanced", False, "scalar"),
        Family("saderf+", "diagonal", False, "per_dimension"),
        Family("bderf", "balanced", False, "per_dimension"),
        Family("csderf", "eigen", True, "per_dimension"),
        Family("csaderf+", "diagonal", True, "per_dimension"),
        Family("cderf", "balanced", True, "per_dimension"),
    )
}


@dataclass(frozen=True)
class Geometry:
    """The change of variables of fitted features.

    Attributes
    ----------
    basis, inverse_transpose : ndarray of float64, shape (..., d, d)
        G and G⁻ᵀ.
    shift_x, shift_y : ndarray of float64, shape (..., d)
        c and e.
    rho : ndarray of float64, shape (..., d)
    phi : ndarray of float64, shape (..., d)
        Mean of the squares of u = G (x - c) + G⁻ᵀ (y - e) over all pairs; of x - y for
        the trigonometric family.
    is_orthogonal : bool
        Whether G is orthogonal by construction, so that G⁻ᵀ = G.
    is_diagonal : bool
        Whether G is diagonal by construction.
    mean : ndarray of float64, shape (..., d), or None
        Mean of u, None for 0.
    """

    basis: Float64
    inverse_transpose: Float64
    shift_x: Float64
    shift_y: Float64
    rho: Float64
    phi: Float64
    is_orthogonal: bool
    is_diagonal: bool
    mean: Float64 | None = None

    def query_coordinates(self, x: Float64) -> Float64:
        """Return G (x - c), the part of queries in u."""
        return _apply(self.basis, x - self.shift_x[..., None, :])

    def key_coordinates(self, y: Float64) -> Float64:
        """Return G⁻ᵀ (y - e), the part of keys in u."""
        return _apply(self.inverse_transpose, y - self.shift_y[..., None, :])


def _apply(matrix: Float64, rows: Float64) -> Float64:
    return rows @ np.swapaxes(matrix, -1, -2)


# -------- scales


def rho_log(phi: Float64) -> Float64:
    """Return the ρ that minimises κ(ρ) + ρ φ, the mean log of the second moment."""
    one = 1.0 + 2.0 * phi
    return 2.0 / (one + np.hypot(one, np.sqrt(8.0 * phi)))


def rho_mean(phi: Float64) -> Float64:
    """Return the ρ that minimises the mean second moment, where u is N(0, φ)."""
    return 1.0 / (1.0 + 4.0 * phi)


def kappa(rho: Float64) -> Float64:
    """Return log((1 + ρ) / (2 √ρ)), the log of the second moment at u = 0."""
    root = np.sqrt(rho)
    apart = (1.0 - rho) / (1.0 + root)
    return cast(Float64, np.log1p(apart * apart / (2.0 * root)))


def log_second_moment(rho: Float64, phi: Float64) -> Float64:
    """Return Σ κ(ρ) + ρ φ over the last axis: log E[Ẑ²] / K² of one frequency."""
    return cast(Float64, np.sum(kappa(rho) + rho * phi, axis=-1))


def rho_of_mean(variance: Float64, square: Float64, scalar: bool) -> Float64:
    """Return the ρ that minimises the mean second moment, where u is normal.

    Parameters
    ----------
    variance, square : ndarray of float64, shape (..., d)
        Variance of u, and the square of its mean.
    scalar : bool
        One ρ for all dimensions.

    Returns
    -------
    ndarray of float64, shape (..., d)

    Notes
    -----
    The mean is Π (1 + ρ) / (2 √ρ) (1 - 2 ρ v)^(-1/2) exp(ρ m² / (1 - 2 ρ v)). The
    derivative of its log is a decreasing function of ρ less an increasing one, and
    vanishes once.
    """

    def total(values: Float64) -> Float64:
        return np.sum(values, axis=-1, keepdims=True) if scalar else values

    d = variance.shape[-1] if scalar else 1
    most = np.max(variance, axis=-1, keepdims=True) if scalar else variance
    with np.errstate(divide="ignore"):
        high = np.minimum(1.0, 0.5 / most)
        low = np.minimum(0.25 / most, 0.25 * d / total(2.0 * variance + 4.0 * square))
        low = np.minimum(1.0 / 3.0, low)
    # In logs, as the bracket may span orders of magnitude.
    low, high = np.log(low), np.log(high)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        rho = np.exp(middle)
        left = 1.0 - 2.0 * rho * variance
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            pull = np.where(left > 0.0, (variance + square / left) / left, np.inf)
        is_below = d * (1.0 - rho) / (2.0 * rho * (1.0 + rho)) > total(pull)
        low = np.where(is_below, middle, low)
        high = np.where(is_below, high, middle)
    return cast(Float64, np.broadcast_to(np.exp(low), variance.shape).copy())


# -------- fits


def fit_geometry(
    family: Family,
    x: Moments,
    y: Moments,
    *,
    objective: Objective,
    regularization: Literal["auto"] | float,
) -> Geometry:
    """Return the geometry that a family gives to moments.

    Parameters
    ----------
    family : Family
    x, y : Moments
        Of queries and keys, divided by the bandwidth; the same object where there is
        one set of rows. Full ones for the bases "eigen" and "balanced".
    objective : {"log", "mean"}
        Whether the scales minimise the mean log of the second moment of the estimate,
        or the log of its mean as if u were normal.
    regularization : "auto" or float
        What second moments gain before they are inverted, as a share of their mean
        diagonal. "auto" follows the number of rows, and keeps φ above a thousandth of
        its mean.

    Returns
    -------
    Geometry

    Notes
    -----
    Costs O(d³) for "eigen" and "balanced", O(d) otherwise, and O(d²) to return G. Where
    one side does not vary at all, nothing can be balanced, and G is the identity.

    References
    ----------
    V. Likhosherstov et al., "FAVOR#: Sharp attention kernel approximations via new
    classes of positive random features", NeurIPS 2023 (arXiv 2302.00787).
    """
    if family.name == "trigonometric":
        return _trigonometric_geometry(x, y)
    is_same = x is y
    is_auto = regularization == "auto"
    if family.basis in ("identity", "diagonal"):
        x, y = x.to_diagonal(), y.to_diagonal()
    zero = np.zeros_like(x.mean)
    if family.centered:
        shift_x, shift_y = x.mean, y.mean
        mean_x = mean_y = zero
        first, second = x.covariance, y.covariance
    else:
        shift_x = shift_y = zero
        mean_x, mean_y = x.mean, y.mean
        first, second = x.second_moment, y.second_moment
    share = _share(family.basis, regularization, min(x.count, y.count), zero.shape[-1])
    if family.basis in ("identity", "diagonal"):
        basis, inverse, phi = _diagonal_basis(family.basis, first, second, share)
        if is_same:
            # Equal sides are balanced as they are, and to the last digit.
            basis = inverse = np.ones_like(phi)
        a, b = basis * mean_x, inverse * mean_y
        basis, inverse = _diagonal_matrix(basis), _diagonal_matrix(inverse)
    elif is_same:
        basis, phi = _eigenbasis(family.basis, first, mean_x, share)
        inverse = basis
        a = b = _turned(basis, mean_x)
    elif family.basis == "eigen":
        both = first + second
        if not family.centered:
            cross = mean_x[..., :, None] * mean_y[..., None, :]
            both = both + cross + np.swapaxes(cross, -1, -2)
        phi, vectors = np.linalg.eigh(both)
        basis = inverse = np.swapaxes(vectors, -1, -2)
        a, b = _turned(basis, mean_x), _turned(basis, mean_y)
        # Its eigenvalues are φ whole.
        phi = phi - 2.0 * a * b
    else:
        basis, inverse, phi = _balanced_basis(first, second, share)
        a, b = _turned(basis, mean_x), _turned(inverse, mean_y)
    phi = np.maximum(phi + 2.0 * a * b, 0.0)
    if is_auto:
        phi = np.maximum(phi, _LEAST_PHI * np.mean(phi, axis=-1, keepdims=True))
    mean = None if family.centered else a + b
    return Geometry(
        basis,
        inverse,
        shift_x,
        shift_y,
        _fitted_rho(family.scales, objective, phi, mean),
        phi,
        is_same or family.basis in ("identity", "eigen"),
        family.basis in ("identity", "diagonal"),
        mean,
    )


def _trigonometric_geometry(x: Moments, y: Moments) -> Geometry:
    x, y = x.to_diagonal(), y.to_diagonal()
    zero = np.zeros_like(x.mean)
    apart = x.mean - y.mean
    phi = x.covariance + y.covariance + apart * apart
    identity = _diagonal_matrix(zero + 1.0)
    return Geometry(identity, identity, zero, zero, zero + 1.0, phi, True, True, apart)


def _share(
    basis: Basis, regularization: Literal["auto"] | float, count: float, d: int
) -> float:
    """Return what is added to second moments, as a share of their mean diagonal."""
    if regularization != "auto":
        return float(regularization)
    # Few rows leave single variances, and far more so the eigenvalues of whole moments,
    # many times too small.
    n = max(count, 1.0)
    if basis == "diagonal":
        return min(max(0.2 / n, 1e-6), 0.3)
    return min(max(0.2 * d / n, 1e-4), 0.3)


def _fitted_rho(
    scales: Scales, objective: Objective, phi: Float64, mean: Float64 | None
) -> Float64:
    if scales == "one":
        return np.ones_like(phi)
    is_scalar = scales == "scalar"
    if objective == "log":
        if is_scalar:
            phi = np.broadcast_to(np.mean(phi, axis=-1, keepdims=True), phi.shape)
        return rho_log(phi)
    if not is_scalar and mean is None:
        return rho_mean(phi)
    square = np.zeros_like(phi) if mean is None else mean * mean
    return rho_of_mean(np.maximum(phi - square, 0.0), square, is_scalar)


def _diagonal_matrix(diagonal: Float64) -> Float64:
    return diagonal[..., :, None] * np.eye(diagonal.shape[-1])


def _turned(basis: Float64, row: Float64) -> Float64:
    return (basis @ row[..., None])[..., 0]


def _diagonal_basis(
    basis: Basis, first: Float64, second: Float64, share: float
) -> tuple[Float64, Float64, Float64]:
    if basis == "identity":
        one = np.ones_like(first)
        return one, one, first + second
    first = first + share * np.mean(first, axis=-1, keepdims=True)
    second = second + share * np.mean(second, axis=-1, keepdims=True)
    varies = (first > 0.0) & (second > 0.0)
    scale = (
        np.where(varies, first, 1.0) ** -0.25 * np.where(varies, second, 1.0) ** 0.25
    )
    inverse = 1.0 / scale
    root = 2.0 * np.sqrt(first) * np.sqrt(second)
    return scale, inverse, np.where(varies, root, first + second)


def _eigenbasis(
    basis: Basis, moment: Float64, mean: Float64, share: float
) -> tuple[Float64, Float64]:
    """Return the basis of one set of rows, and φ without what the mean adds."""
    if basis == "eigen":
        moment = moment + mean[..., :, None] * mean[..., None, :]
    values, vectors = np.linalg.eigh(moment)
    turned = np.swapaxes(vectors, -1, -2)
    if basis == "eigen":
        along = _turned(turned, mean)
        return turned, 2.0 * (values - along * along)
    size = np.trace(moment, axis1=-2, axis2=-1)[..., None] / moment.shape[-1]
    return turned, 2.0 * (values + share * size)


def _balanced_basis(
    first: Float64, second: Float64, share: float
) -> tuple[Float64, Float64, Float64]:
    """Return G, H = G⁻ᵀ and 2 σ with G M₁ Gᵀ = H M₂ Hᵀ = diag σ.

    With M = L Lᵀ and L₁ᵀ L₂ = U Σ Vᵀ these are G = Σ^(-1/2) Vᵀ L₂ᵀ and
    H = Σ^(-1/2) Uᵀ L₁ᵀ: no moment is ever inverted.
    """
    d = first.shape[-1]
    sizes = [
        np.trace(m, axis1=-2, axis2=-1)[..., None, None] / d for m in (first, second)
    ]
    varies = (sizes[0] > 0.0) & (sizes[1] > 0.0)
    scaled = [
        np.where(varies, moment / np.where(varies, size, 1.0), np.eye(d))
        for moment, size in zip((first, second), sizes, strict=True)
    ]
    shares = np.where(varies, share, 0.0)
    roots, left, sigma, right = _balanced(scaled, shares)
    # Moments that are singular to rounding have no balanced basis.
    least = 8.0 * d * _EPSILON
    is_poor = sigma[..., -1:, None] <= least * sigma[..., :1, None]
    if np.any(is_poor):
        shares = np.where(is_poor, np.maximum(shares, least), shares)
        roots, left, sigma, right = _balanced(scaled, shares)
    shrink = 1.0 / np.sqrt(sigma)[..., :, None]
    basis = shrink * (right @ np.swapaxes(roots[1], -1, -2))
    inverse = shrink * np.swapaxes(roots[0] @ left, -1, -2)
    # Small singular values are wrong by the rounding of the largest, and features are
    # unbiased only as far as H is G⁻ᵀ: Newton's iteration makes it so.
    gap = np.eye(d) - inverse @ np.swapaxes(basis, -1, -2)
    for _ in range(3):
        if np.max(np.abs(gap), initial=0.0) <= 8.0 * d * _EPSILON:
            break
        inverse = inverse + gap @ inverse
        gap = np.eye(d) - inverse @ np.swapaxes(basis, -1, -2)
    safe = [np.where(varies, size, 1.0) for size in sizes]
    ratio = (safe[1] / safe[0]) ** 0.25
    alone = np.diagonal(first + second, axis1=-2, axis2=-1)
    phi = 2.0 * sigma * np.sqrt(safe[0] * safe[1])[..., 0]
    return (
        np.where(varies, ratio * basis, np.eye(d)),
        np.where(varies, inverse / ratio, np.eye(d)),
        np.where(varies[..., 0], phi, alone),
    )


def _balanced(
    moments: list[Float64], shares: Float64
) -> tuple[list[Float64], Float64, Float64, Float64]:
    """Return roots of the moments, and the singular values of their product."""
    ridge = shares * np.eye(moments[0].shape[-1])
    roots = [_root(moment + ridge) for moment in moments]
    left, sigma, right = np.linalg.svd(np.swapaxes(roots[0], -1, -2) @ roots[1])
    return roots, left, sigma, right


def _root(moment: Float64) -> Float64:
    """Return L with L Lᵀ the moment."""
    with contextlib.suppress(np.linalg.LinAlgError):
        return cast(Float64, np.linalg.cholesky(moment))
    values, vectors = np.linalg.eigh(moment)
    least = _EPSILON * values[..., -1:]
    return cast(Float64, vectors * np.sqrt(np.maximum(values, least))[..., None, :])
