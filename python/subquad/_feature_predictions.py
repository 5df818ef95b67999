"""How far random features will be off, in closed form and in logs.

A frequency estimates K(x, y) with the relative second moment exp(Σ κ(ρ) + Σ ρ u²);
frequencies that are coupled in blocks add what their products have in common. Values in
host memory, in float64; batch dimensions in front.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ._feature_couplings import Coupling, coupled_pairs, padded_dimension
from ._feature_families import Geometry, Objective, kappa

Float64: TypeAlias = npt.NDArray[np.float64]
Forms: TypeAlias = tuple[Float64, Float64, Float64]

# Above this log, one is less than the rounding of the exponential.
_LARGE = 40.0
# Powers of what is larger overflow between two checks; nothing is left of c there.
_LARGEST = 1e30
# Above this log, an exponential is left as it is: what it is compared with is larger.
_LARGE_LOG = 700.0
_MOST_TERMS = 1 << 17
_MOST_AT_ONCE = 1 << 16
_NODES = 12


# -------- products of two coupled frequencies


def orthogonal_excess(s: Float64, d: int) -> Float64:
    """Return c(s) - 1 for c(s) = exp(-s/2) ₁F₁(-d/2; d/2; -s/2), s ≥ 0.

    c is the mean of exp(ω₁·u + ω₂·u - s), s = |u|², of orthogonal frequencies, where
    independent ones have 1. Relative accuracy for small s.
    """
    return np.expm1(_log_mean(np.asarray(s, np.float64), d))


def _log_mean(s: Float64, d: int) -> Float64:
    """Return log c(s), s ≥ 0."""
    result = np.empty(s.shape)
    small = s <= 2.0
    result[small] = np.log1p(_small_excess(s[small], d))
    result[~small] = _log_large_mean(s[~small], d)
    return result


def _small_excess(s: Float64, d: int) -> Float64:
    """Return the Taylor series of exp(-2 z) ₁F₁(d; d/2; z) - 1, z = s/2 of any sign."""
    z = 0.5 * s
    total = np.zeros_like(z)
    # From z g'' + (d/2 + 3 z) g' + 2 z g = 0; both are a coefficient times a power.
    before, term = np.ones_like(z), np.zeros_like(z)
    for k in range(1, 64):
        before, term = (
            term,
            -z * (3.0 * k * term + 2.0 * z * before) / ((k + 1.0) * (k + 0.5 * d)),
        )
        total = total + term
        # A single term may vanish by chance.
        rest = np.maximum(np.abs(term), np.abs(before))
        if not np.any(rest > 1e-18 * np.abs(total)):
            break
    return total


def _log_large_mean(s: Float64, d: int) -> Float64:
    """Return log c(s), s > 0, by series of positive terms."""
    z = np.minimum(0.5 * s, _LARGEST)
    half = 0.5 * d
    if d % 2 == 0:
        # A polynomial of degree d/2.
        return _log_series(z, lambda k: (half - k) / ((half + k) * (k + 1.0))) - z
    result = np.empty(s.shape)
    far = z > max(60.0, 4.0 * d)
    near = ~far
    result[near] = (
        _log_series(z[near], lambda k: (d + k) / ((half + k) * (k + 1.0)))
        - 2.0 * z[near]
    )
    # Its asymptotic series ends; what is left out is smaller than exp(-z).
    w = 1.0 / z[far]
    total = term = np.ones_like(w)
    for k in range(d - 1):
        term = term * w * ((half - k) * (d - 1.0 - k) / (k + 1.0))
        total = total + term
    result[far] = (
        np.log(total)
        + (math.lgamma(half) - math.lgamma(d))
        + half * np.log(z[far])
        - z[far]
    )
    return result


def _log_series(z: Float64, ratio: Callable[[float], float]) -> Float64:
    total, scale = _series(z, ratio)
    return cast(Float64, np.log(total) + scale)


def _series(z: Float64, ratio: Callable[[float], float]) -> tuple[Float64, Float64]:
    """Return Σ t_k with t_0 = 1, t_(k+1) = ratio(k) z t_k, as a number and a log scale.

    Terms rise, fall and then shrink ever faster.
    """
    term, total, scale = np.ones_like(z), np.ones_like(z), np.zeros_like(z)
    most = float(np.max(z, initial=0.0))
    for k in range(_MOST_TERMS):
        step = ratio(float(k))
        term = term * (step * z)
        total = total + term
        if k % 4 == 3 or step == 0.0:
            left = 1.0 - abs(step) * most
            if left > 0.0 and not np.any(np.abs(term) > 1e-18 * left * np.abs(total)):
                break
            size = np.maximum(np.abs(term), np.abs(total))
            if np.max(size, initial=0.0) > 1e150:
                size = np.where(size > 1e100, size, 1.0)
                term, total, scale = term / size, total / size, scale + np.log(size)
    return total, scale


def orthogonal_cosine(s: Float64, d: int) -> Float64:
    """Return the mean ₁F₁(d; d/2; -s/2) of cos(ω₁·δ) cos(ω₂·δ), s = |δ|² ≥ 0.

    For orthogonal frequencies; accurate to rounding beside 1.
    """
    half = 0.5 * d
    z = np.asarray(0.5 * s, np.float64)
    # exp(-z) ₁F₁(-d/2; d/2; z): its terms never add up to more than exp(z).
    total, scale = _series(z, lambda k: (k - half) / ((half + k) * (k + 1.0)))
    return total * np.exp(scale - z)


@functools.cache
def _angles(d: int) -> tuple[Float64, Float64]:
    """Return a quadrature of h = 2 r₁ r₂ / (r₁² + r₂²) for two norms χ(d).

    With h = sin θ = √(1 - x²), the density of θ is sin(θ)^(d-1).
    """
    if d < 24:
        # Functions of h are not smooth in x, where it still counts.
        nodes, weights = np.polynomial.legendre.leggauss(2 * _NODES)
        theta = 0.25 * math.pi * (1.0 + nodes)
        weights = weights * np.sin(theta) ** (d - 1.0)
        return np.sin(theta), weights / np.sum(weights)
    # Golub and Welsch: the recurrence of the Gegenbauer polynomials.
    k = np.arange(1.0, _NODES)
    shape = 0.5 * (d - 1.0)
    off = k * (k + 2.0 * shape - 1.0) / (4.0 * (k + shape) * (k + shape - 1.0))
    x, vectors = np.linalg.eigh(np.diag(np.sqrt(off), -1))
    # Both signs of x have the same h.
    half = x > 0.0
    return np.sqrt(1.0 - x[half] ** 2), 2.0 * vectors[0, half] ** 2


def _excess(s: Float64, d: int, cosine: float) -> Float64:
    """Return what `orthogonal_excess` does, at an angle between the frequencies."""
    if cosine == 0.0:
        return orthogonal_excess(s, d)

    def at(h: Float64) -> Float64:
        grown = cosine * h * s[..., None]
        log_mean = grown + _log_mean(s[..., None] + grown, d)
        return np.expm1(np.minimum(log_mean, _LARGE_LOG))

    return _mean_over_angles(at, s, d)


def _mean_over_angles(
    function: Callable[[Float64], Float64], like: Float64, d: int
) -> Float64:
    """Return the mean of a function of the angles, which adds an axis to `like`."""
    nodes, weights = _angles(d)
    step = max(1, _MOST_AT_ONCE // max(like.size, 1))
    result = np.zeros_like(like)
    for start in range(0, len(nodes), step):
        part = slice(start, start + step)
        result = result + function(nodes[part]) @ weights[part]
    return result


def _cosine_mean(s: Float64, d: int, cosine: float) -> Float64:
    """Return what `orthogonal_cosine` does, at an angle between the frequencies."""
    if cosine == 0.0:
        return orthogonal_cosine(s, d)

    def at(h: Float64) -> Float64:
        turned = cosine * h
        both = [
            orthogonal_cosine(s[..., None] * (1.0 + sign * turned), d)
            for sign in (1.0, -1.0)
        ]
        return 0.5 * (both[0] + both[1])

    return _mean_over_angles(at, s, d)


def _cosine(coupling: Coupling, d: int) -> float:
    """Return the cosine between the frequencies of a block."""
    return -1.0 / (d - 1.0) if coupling == "simplex" and d > 1 else 0.0


def _normal_log_mean(
    shrink: Float64, spread: Float64, along: Float64, d: int, cosine: float
) -> Float64:
    """Return log c of frequencies with w = 1/v, with normal cosines of their angles.

    From Σ w, Σ w², and u, w: `spread` is Σ w² + 2 Σ w² u², `along` is Σ w u², `shrink`
    is Σ w. c is the density of the cosine under the tilted frequencies N(u √w, w), by
    that under N(0, I).
    """
    length = shrink + along
    miss = along - cosine * length
    return (
        np.log(length)
        - 0.5 * np.log(d * spread)
        - 0.5 * miss * miss / spread
        + 0.5 * d * cosine * cosine
    )


def _scaled_excess(
    rho: Float64, forms: Forms, n_axes: int, d: int, cosine: float
) -> Float64:
    """Return c - 1 of coupled frequencies, exact where ρ is one number.

    `forms` are Σ u², Σ w u² and Σ w² u², with `n_axes` axes behind the batch. Where ρ
    differs, the exact c of a matched isotropic pair, times the ratio of both in the
    approximation that cosines are normal.
    """
    s, along, along_squares = forms
    if np.all(rho == rho[..., :1]) and rho.shape[-1] == d:
        return _excess(s, d, cosine)
    w = _shrinkage(rho)
    # A block that was padded has dimensions with w = 1 and u = 0.
    padding = float(d - rho.shape[-1])
    axes = (..., *(None,) * n_axes)
    sums = np.asarray(np.sum(w, axis=-1) + padding)[axes]
    squares = np.asarray(np.sum(w * w, axis=-1) + padding)[axes]
    matched = along * sums / squares
    excess = _excess(matched, d, cosine)
    change = np.expm1(
        _normal_log_mean(sums, squares + 2.0 * along_squares, along, d, cosine)
        - _normal_log_mean(
            np.full_like(matched, d), d + 2.0 * matched, matched, d, cosine
        )
    )
    return excess + (1.0 + excess) * change


def _shrinkage(rho: Float64) -> Float64:
    """Return w = 1/v, the variances of frequencies under the tilted measure."""
    return 2.0 * rho / (1.0 + rho)


# -------- the variance of all frequencies


def _log_single(log_plus: Float64, log_minus: Float64 | None) -> Float64:
    """Return the log of the relative variance of one frequency, or of one pair.

    `log_plus` and `log_minus` are the logs of the second moments exp(Σ κ + Σ ρ u²) and
    exp(Σ κ - Σ u²), or of their means.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        if log_minus is None:
            value = np.expm1(np.minimum(log_plus, _LARGE))
            tail = log_plus
        else:
            middle = 0.5 * (log_plus + log_minus)
            apart = 0.5 * (log_plus - log_minus)
            # exp(middle) cosh(apart) - 1: no digits are lost where nothing is scaled.
            value = (
                np.expm1(np.minimum(middle, _LARGE))
                + 0.5 * np.exp(np.minimum(log_plus, _LARGE)) * np.expm1(-apart) ** 2
            )
            tail = log_plus - math.log(2.0) + np.log1p(np.exp(-2.0 * apart))
        return cast(
            Float64,
            np.where(log_plus > _LARGE - 2.0, tail, np.log(np.maximum(value, 0.0))),
        )


def _log_total(
    log_single: Float64, excess: Float64, n_rows: int, coupling: Coupling, d: int
) -> Float64:
    """Return the log of the relative variance of the mean over coupled frequencies."""
    pairs = coupled_pairs(coupling, n_rows, d) / n_rows
    return _log_joint(
        log_single, excess, pairs, padded_dimension(coupling, d)
    ) - math.log(n_rows)


def _log_joint(
    log_single: Float64, excess: Float64, pairs: Float64 | float, block: int
) -> Float64:
    if not np.any(pairs):
        return log_single
    with np.errstate(over="ignore", invalid="ignore"):
        change = pairs * excess * np.exp(-log_single)
    # Where c is approximate the sum could come out negative. Of exact ones, the least
    # is that of pairs at u = 0.
    change = np.maximum(change, 1.0 / (block + 2.0) - 1.0)
    certain = np.isneginf(log_single) | ~np.isfinite(change)
    return log_single + np.log1p(np.where(certain, 0.0, change))


def _coupled_dimension(coupling: Coupling, d: int) -> tuple[int, float]:
    block = padded_dimension(coupling, d)
    return block, _cosine(coupling, block)


def _pair_excess(
    rho: Float64,
    forms: Forms,
    n_axes: int,
    d: int,
    coupling: Coupling,
    antithetic: bool,
) -> Float64:
    block, cosine = _coupled_dimension(coupling, d)
    excess = _scaled_excess(rho, forms, n_axes, block, cosine)
    if antithetic and cosine != 0.0:
        excess = 0.5 * (excess + _scaled_excess(rho, forms, n_axes, block, -cosine))
    return excess


def _forms(weights: Float64, x: Float64, y: Float64) -> Float64:
    """Return Σ weights (x + y)² of every pair."""
    weights = weights[..., None, :]
    square = np.sum(weights * x * x, axis=-1)[..., :, None]
    square = square + np.sum(weights * y * y, axis=-1)[..., None, :]
    cross = (weights * x) @ np.swapaxes(y, -1, -2)
    # Rounding may leave less than nothing where y = -x.
    return cast(Float64, np.maximum(square + 2.0 * cross, 0.0))


def log_relative_variance(
    geometry: Geometry,
    query_coordinates: Float64,
    key_coordinates: Float64,
    n_rows: int,
    coupling: Coupling,
    antithetic: bool,
) -> Float64:
    """Return log Var(K̂) / K² of every pair.

    Parameters
    ----------
    geometry : Geometry
    query_coordinates : ndarray of float64, shape (..., n, d)
        `geometry.query_coordinates` of the rows times t.
    key_coordinates : ndarray of float64, shape (..., m, d)
    n_rows : int
        Number of frequencies; with pairs there are twice as many features.
    coupling : {"iid", "orthogonal", "simplex", "hadamard"}
    antithetic : bool

    Returns
    -------
    ndarray of float64, shape (..., n, m)
        -inf where the estimate is exact.

    Notes
    -----
    Exact for "iid", and for "orthogonal" and "simplex" where ρ is one number; otherwise
    what coupled frequencies share is approximate. Costs O(n m d) time, O(n m) memory.
    """
    x, y = query_coordinates, key_coordinates
    rho, d = geometry.rho, x.shape[-1]
    total = np.sum(kappa(rho), axis=-1)[..., None, None]
    is_one = bool(np.all(rho == 1.0))
    s = _forms(np.ones_like(rho), x, y)
    log_plus = total + (s if is_one else _forms(rho, x, y))
    log_single = _log_single(log_plus, total - s if antithetic else None)
    if coupling == "iid" or d == 1:
        return log_single - math.log(n_rows)
    w = _shrinkage(rho)
    forms = (s, s, s) if is_one else (s, _forms(w, x, y), _forms(w * w, x, y))
    excess = _pair_excess(rho, forms, 2, d, coupling, antithetic)
    return _log_total(log_single, excess, n_rows, coupling, d)


def trigonometric_log_relative_variance(
    x: Float64, y: Float64, n_rows: int, coupling: Coupling
) -> Float64:
    """Return log Var(K̂) / K² of every pair for cosines and sines.

    Parameters
    ----------
    x : ndarray of float64, shape (..., n, d)
        Rows times t.
    y : ndarray of float64, shape (..., m, d)
    n_rows : int
        Number of frequencies, half the number of features.
    coupling : {"iid", "orthogonal", "simplex", "hadamard"}

    Returns
    -------
    ndarray of float64, shape (..., n, m)
    """
    d = x.shape[-1]
    square = np.sum(x * x, axis=-1)[..., :, None] + np.sum(y * y, axis=-1)[..., None, :]
    s = np.maximum(square - 2.0 * (x @ np.swapaxes(y, -1, -2)), 0.0)
    return _log_total(
        _log_single(s, -s), _trigonometric_excess(s, d, coupling), n_rows, coupling, d
    )


def _trigonometric_excess(s: Float64, d: int, coupling: Coupling) -> Float64:
    """Return E cos cos / K² - 1 of two frequencies of a block."""
    if coupling == "iid" or d == 1:
        return np.zeros_like(s)
    block, cosine = _coupled_dimension(coupling, d)
    result = np.empty_like(s)
    small = s <= 1.0
    if cosine == 0.0:
        result[small] = _small_excess(-s[small], block)
    else:
        near = s[small]

        def at(h: Float64) -> Float64:
            total = np.zeros((*near.shape, len(h)))
            for sign in (1.0, -1.0):
                grown = sign * cosine * h * near[..., None]
                opposite = _small_excess(-(near[..., None] + grown), block)
                total = total + 0.5 * np.expm1(np.log1p(opposite) - grown)
            return total

        result[small] = _mean_over_angles(at, near, block)
    # Beyond, nothing is left beside the variance of one frequency.
    far = np.minimum(s[~small], _LARGE_LOG)
    result[~small] = _cosine_mean(far, block, cosine) * np.exp(far) - 1.0
    result[s > _LARGE_LOG] = -1.0
    return result


# -------- predictions for the data of a fit


def predicted_log_variance(
    geometry: Geometry,
    n_rows: int,
    coupling: Coupling,
    antithetic: bool,
    objective: Objective,
) -> Float64:
    """Return the log of the relative variance Var(K̂) / K² to expect.

    Parameters
    ----------
    geometry : Geometry
    n_rows : int
        Number of frequencies; with pairs there are twice as many features.
    coupling : {"iid", "orthogonal", "simplex", "hadamard"}
    antithetic : bool
    objective : {"log", "mean"}
        "log": of a pair whose u² are their means φ, so that the log of the second
        moment is its mean. "mean": the log of the mean, where u is normal.

    Returns
    -------
    ndarray of float64, shape (...)
        With "mean", +inf where the mean is.
    """
    log_single, excess = _expected(geometry, coupling, antithetic, objective)
    return _log_total(log_single, excess, n_rows, coupling, geometry.rho.shape[-1])


def predicted_trigonometric_log_variance(
    geometry: Geometry, n_rows: int, coupling: Coupling, objective: Objective
) -> Float64:
    """Return what `predicted_log_variance` does, for the trigonometric geometry.

    With "mean", as if the dimensions of x - y were independent.
    """
    log_single, excess = _expected_trigonometric(geometry, coupling, objective)
    return _log_total(log_single, excess, n_rows, coupling, geometry.rho.shape[-1])


def _mean_and_variance(geometry: Geometry) -> tuple[Float64, Float64]:
    """Return the square of the mean of u, and its variance."""
    if geometry.mean is None:
        return np.zeros_like(geometry.phi), geometry.phi
    square = geometry.mean * geometry.mean
    return square, np.maximum(geometry.phi - square, 0.0)


def _log_mean_exp(
    factor: Float64 | float, square: Float64, variance: Float64
) -> Float64:
    """Return the log of the mean of exp(factor u²) over normal u, summed."""
    left = 1.0 - 2.0 * factor * variance
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(
            left > 0.0, factor * square / left - 0.5 * np.log(left), np.inf
        )
    return cast(Float64, np.sum(terms, axis=-1))


def _expected(
    geometry: Geometry, coupling: Coupling, antithetic: bool, objective: Objective
) -> tuple[Float64, Float64]:
    """Return the log variance of one frequency, and the excess of two in a block."""
    rho, phi = geometry.rho, geometry.phi
    total = np.sum(kappa(rho), axis=-1)
    if objective == "log":
        log_plus = total + np.sum(rho * phi, axis=-1)
        log_minus = total - np.sum(phi, axis=-1)
    else:
        square, variance = _mean_and_variance(geometry)
        log_plus = total + _log_mean_exp(rho, square, variance)
        log_minus = total + _log_mean_exp(-1.0, square, variance)
    log_single = _log_single(log_plus, log_minus if antithetic else None)
    if coupling == "iid" or rho.shape[-1] == 1:
        return log_single, np.zeros_like(log_single)
    w = _shrinkage(rho)
    size, weights = _sizes(geometry, objective, w)
    s, along, squares = (
        np.sum(form * phi, axis=-1)[..., None] * size
        for form in (np.ones_like(w), w, w * w)
    )
    excess = _pair_excess(
        rho, (s, along, squares), 1, rho.shape[-1], coupling, antithetic
    )
    return log_single, cast(Float64, np.sum(weights * excess, axis=-1))


def _expected_trigonometric(
    geometry: Geometry, coupling: Coupling, objective: Objective
) -> tuple[Float64, Float64]:
    s = np.sum(geometry.phi, axis=-1)
    if objective == "log":
        log_single = _log_single(s, -s)
    else:
        square, variance = _mean_and_variance(geometry)
        log_single = _log_single(
            _log_mean_exp(1.0, square, variance), _log_mean_exp(-1.0, square, variance)
        )
    size, weights = _sizes(geometry, objective, np.ones_like(geometry.phi))
    excess = _trigonometric_excess(
        s[..., None] * size, geometry.phi.shape[-1], coupling
    )
    return log_single, cast(Float64, np.sum(weights * excess, axis=-1))


def _sizes(
    geometry: Geometry, objective: Objective, w: Float64
) -> tuple[Float64, Float64]:
    """Return nodes and weights for Σ w u² beside its mean: 1, or a gamma distribution.

    The gamma distribution with its variance, where u is normal.
    """
    batch = geometry.phi.shape[:-1]
    if objective == "log":
        return np.ones((*batch, 1)), np.ones((*batch, 1))
    square, variance = _mean_and_variance(geometry)
    mean = np.sum(w * geometry.phi, axis=-1)
    spread = np.sum(
        w * w * (2.0 * variance * variance + 4.0 * variance * square), axis=-1
    )
    varies = spread > 0.0
    shape = np.where(varies, mean, 1.0) ** 2 / np.where(varies, spread, 1.0)
    # Golub and Welsch: the recurrence of the generalized Laguerre polynomials.
    k = np.arange(_NODES, dtype=np.float64)
    matrix = np.zeros((*batch, _NODES, _NODES))
    index = np.arange(_NODES)
    matrix[..., index, index] = 2.0 * k / shape[..., None] + 1.0
    off = np.sqrt(k[1:] * (k[1:] - 1.0 + shape[..., None])) / shape[..., None]
    matrix[..., index[1:], index[:-1]] = off
    nodes, vectors = np.linalg.eigh(matrix)
    nodes = np.where(varies[..., None], np.maximum(nodes, 0.0), 1.0)
    return nodes, cast(Float64, vectors[..., 0, :] ** 2)


def required_rows(
    geometry: Geometry,
    relative_error: float,
    coupling: Coupling,
    antithetic: bool,
    objective: Objective,
) -> int:
    """Return the smallest number of frequencies whose predicted error is small enough.

    Parameters
    ----------
    geometry : Geometry
    relative_error : float
        Largest √Var(K̂) / K, in every batch element.
    coupling, antithetic, objective
        As in `predicted_log_variance`.

    Returns
    -------
    int

    Raises
    ------
    OverflowError
        If the variance is not finite.

    Notes
    -----
    Above 2⁵³ the number is as exact as a float64.
    """
    log_single, excess = _expected(geometry, coupling, antithetic, objective)
    return _required(
        log_single, excess, relative_error, coupling, geometry.rho.shape[-1]
    )


def required_trigonometric_rows(
    geometry: Geometry, relative_error: float, coupling: Coupling, objective: Objective
) -> int:
    """Return what `required_rows` does, for the trigonometric geometry."""
    log_single, excess = _expected_trigonometric(geometry, coupling, objective)
    return _required(
        log_single, excess, relative_error, coupling, geometry.rho.shape[-1]
    )


def _required(
    log_single: Float64, excess: Float64, error: float, coupling: Coupling, d: int
) -> int:
    return max(
        _required_once(float(single), float(over), 2.0 * math.log(error), coupling, d)
        for single, over in zip(np.ravel(log_single), np.ravel(excess), strict=True)
    )


def _required_once(
    log_single: float, excess: float, log_goal: float, coupling: Coupling, d: int
) -> int:
    if log_single == math.inf or math.isnan(log_single):
        message = "no number of features is enough: the predicted variance is infinite"
        raise OverflowError(message)
    if log_single <= log_goal:
        return 1
    block = 1 if coupling == "iid" or d == 1 else padded_dimension(coupling, d)
    single = np.asarray(log_single)

    def log_variance(rows: Float64) -> Float64:
        rest = rows % block
        pairs = ((rows - rest) * (block - 1.0) + rest * (rest - 1.0)) / rows
        return _log_joint(single, np.asarray(excess), pairs, block) - np.log(rows)

    # Whole blocks gain, or lose, the most: the answer is at most a block from that of
    # whole blocks, where all is 1 / rows.
    whole = float(_log_joint(single, np.asarray(excess), block - 1.0, block))
    least = min(log_single, whole) - log_goal
    if least > math.log(2.0**52):
        exponent = max(int(least / math.log(2.0)) - 52, 0)
        return math.ceil(math.exp(least - exponent * math.log(2.0))) << exponent
    first = max(1.0, math.floor(math.exp(least)) - 1.0)
    while True:
        rows = first + np.arange(2.0 * block + 2.0)
        enough = np.flatnonzero(log_variance(rows) <= log_goal)
        if enough.size:
            return int(rows[enough[0]])
        first = float(rows[-1]) + 1.0


# -------- attention


def attention_error(
    geometry: Geometry,
    x: Float64,
    y: Float64,
    values: Float64,
    n_rows: int,
    coupling: Coupling,
    antithetic: bool,
    *,
    alpha: float = 0.0,
    causal: bool = False,
) -> Float64:
    """Return the root mean square error to expect in each row of attention.

    Parameters
    ----------
    geometry : Geometry
    x : ndarray of float64, shape (..., n, d)
        Queries times t.
    y : ndarray of float64, shape (..., m, d)
        Keys times t.
    values : ndarray of float64, shape (..., m, d_v)
    n_rows : int
        Number of frequencies; with pairs there are twice as many features.
    coupling : {"iid", "orthogonal", "simplex", "hadamard"}
    antithetic : bool
    alpha : float
        0 for the kernel exp(x·y), -1/2 for the Gaussian.
    causal : bool
        Let query i attend to keys 0 to i.

    Returns
    -------
    ndarray of float64, shape (..., n)

    Notes
    -----
    To first order in the error of the kernel, and never more than the distance to the
    farthest value. Coupled frequencies count through what they change in the variances
    of a row's estimates. Costs O(m (n + m) (d + d_v) + n m²) time, O(m² + n m)
    memory.
    """
    rho, m = geometry.rho, y.shape[-2]
    left, right = geometry.query_coordinates(x), geometry.key_coordinates(y)
    # x·y = x~·y~ + e·x + c·y - c·e, of which keys differ in two.
    scores = (
        left @ np.swapaxes(right, -1, -2)
        + (
            np.sum(y * geometry.shift_x[..., None, :], axis=-1)
            + alpha * np.sum(y * y, axis=-1)
        )[..., None, :]
    )
    if m == 0:
        return np.zeros(scores.shape[:-1])
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:]) > 0.0, scores, -np.inf)
    scores = scores - np.max(scores, axis=-1, keepdims=True)
    log_attention = scores - np.log(np.sum(np.exp(scores), axis=-1, keepdims=True))
    # Differences of values are all that counts; near their mean they keep their digits.
    values = values - np.mean(values, axis=-2, keepdims=True)
    outputs = np.exp(log_attention) @ values
    # E[Ẑ_j Ẑ_k] = exp(Σ κ + Σ ρ (u_j² + u_k²) / 2 - Σ r (u_j - u_k)² / 2), with
    # r = (1 + ρ) / 2; the covariance is less by 1, which adds up to 0 over keys.
    half = 0.5 * (1.0 + rho)
    tilt = log_attention + 0.5 * _forms(rho, left, right)
    square, scale = _spread(
        tilt, np.exp(-0.5 * _forms(half, right, -right)), values, outputs
    )
    if antithetic:
        # The same with -u_k for u_k.
        own = np.sum(half[..., None, :] * right * right, axis=-1)[..., None, :]
        other, other_scale = _spread(
            tilt + own - _forms(half, left, right),
            np.exp(-0.5 * _forms(half, right, right)),
            values,
            outputs,
        )
        top = np.maximum(scale, other_scale)
        square = 0.5 * (
            square * np.exp(scale - top) + other * np.exp(other_scale - top)
        )
        scale = top
    with np.errstate(divide="ignore"):
        log_square = np.log(np.maximum(square, 0.0)) + scale - math.log(n_rows)
    log_square = log_square + np.sum(kappa(rho), axis=-1)[..., None]
    distance = (
        np.sum(values * values, axis=-1)[..., None, :]
        - 2.0 * (outputs @ np.swapaxes(values, -1, -2))
        + np.sum(outputs * outputs, axis=-1)[..., :, None]
    )
    distance = np.where(np.isneginf(scores), 0.0, np.maximum(distance, 0.0))
    if coupling != "iid" and x.shape[-1] > 1:
        # As a row's own variances change; the rest follows them closely.
        with np.errstate(divide="ignore"):
            weights = 2.0 * log_attention + np.log(distance)
        both: tuple[Coupling, Coupling] = (coupling, "iid")
        coupled, alone = (
            _log_sum(
                weights
                + log_relative_variance(geometry, left, right, n_rows, each, antithetic)
            )
            for each in both
        )
        log_square = log_square + coupled - alone
    with np.errstate(over="ignore"):
        error = np.exp(0.5 * log_square)
    return cast(Float64, np.minimum(error, np.sqrt(np.max(distance, axis=-1))))


def _log_sum(logs: Float64) -> Float64:
    """Return log Σ exp over the last axis, 0 where nothing is left."""
    top = np.max(logs, axis=-1)
    is_some = np.isfinite(top)
    safe = np.where(is_some, top, 0.0)
    total = np.where(is_some, np.sum(np.exp(logs - safe[..., None]), axis=-1), 1.0)
    result: Float64 = np.log(total) + safe
    return result


def _spread(
    log_tilted: Float64, kernel: Float64, values: Float64, outputs: Float64
) -> tuple[Float64, Float64]:
    """Return Σ_jk t_ij t_ik kernel_jk (v_j - o_i)·(v_k - o_i), and its log scale."""
    peak = np.max(log_tilted, axis=-1, keepdims=True)
    tilted = np.exp(log_tilted - peak)
    smooth = tilted * (tilted @ kernel)
    gram = kernel * (values @ np.swapaxes(values, -1, -2))
    square = (
        np.sum(tilted * (tilted @ gram), axis=-1)
        - 2.0 * np.sum((smooth @ values) * outputs, axis=-1)
        + np.sum(smooth, axis=-1) * np.sum(outputs * outputs, axis=-1)
    )
    return square, 2.0 * peak[..., 0]
