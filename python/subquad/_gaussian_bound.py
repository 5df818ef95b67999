"""The error bound of the Gaussian normalizer, rounding included."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _dispatch
from ._gaussian_estimates import estimate
from ._gaussian_state import Fitted
from ._gaussian_statistics import UNIT, Statistics
from ._gaussian_terms import Own, Terms, evaluation, gaussian_terms, log_sum

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]

# Third central moments on an interval of width w are at most w^3 / (6 sqrt 3).
_SKEWNESS_BOUND = 1.0 / (36.0 * math.sqrt(3.0))


def error_bound(fitted: Fitted, rows: Array, dtype: str, own: Own | None) -> Array:
    """Return bounds for a matrix of queries, in their data type."""
    xp = _dispatch.namespace_of(rows)
    bound = _bound(fitted, rows, dtype, own)
    # Rounding to the nearest must not take it below.
    return xp.astype(bound * (1.0 + 2.0 * float(xp.finfo(rows.dtype).eps)), rows.dtype)


class _Reach(NamedTuple):
    """How far keys and what is kept of them may be apart: arrays (k,), and numbers.

    Attributes
    ----------
    mean_norms, factor_norms : ndarray
    drift : ndarray
        How far the means may be from those of the keys, and with them the centres of
        the radii.
    radii : ndarray
        Bounds on the distances of the keys from the means of the keys.
    spread : ndarray
        Traces of the covariances.
    sums, moments : float
        Relative errors of sums over keys, and of the covariances.
    """

    mean_norms: Float64
    factor_norms: Float64
    drift: Float64
    radii: Float64
    spread: Float64
    sums: float
    moments: float


def _reach(fitted: Fitted) -> _Reach:
    return fitted.cached("reach", lambda: _found_reach(fitted))


def _found_reach(fitted: Fitted) -> _Reach:
    statistics = fitted.statistics
    factors, _ = fitted.factors()
    d = fitted.n_features
    sums = _gamma(statistics.n_seen + d + 16, statistics.sum_unit)
    mean_norms = np.linalg.norm(statistics.means, axis=1)
    drift = sums * (mean_norms + statistics.radii)
    scatter = statistics.scatter
    if scatter.ndim == 3:
        scatter = np.diagonal(scatter, axis1=1, axis2=2)
    return _Reach(
        mean_norms,
        np.sqrt(np.sum(factors * factors, axis=(1, 2))),
        drift,
        statistics.radii * (1.0 + sums) + drift,
        np.sum(scatter, axis=1) / _divisor(statistics),
        sums,
        # The kernels add the squares of 128 keys in the type of the keys, and factor in
        # float64.
        _gamma(136, statistics.unit) + sums + _gamma(4 * d * d + 16, UNIT),
    )


def _divisor(statistics: Statistics) -> Float64:
    return np.where(statistics.weights > 0, statistics.weights, 1.0)


class _Errors(NamedTuple):
    """Bounds on the errors of the numbers that terms are made of, (n, k) or (n,).

    Attributes
    ----------
    mean, variance, log_count : array
        Of the scores' means and variances, and of the logarithms of counts.
    own : array or None
        Of the own terms.
    vanishing : array or None
        Which components the kernels may leave out, as holding a row's own key alone.
    """

    mean: Array
    variance: Array
    log_count: Array
    own: Array | None = None
    vanishing: Array | None = None


def _errors(
    fitted: Fitted, reach: _Reach, norm: Array, variance: Array, info: Any
) -> _Errors:
    """Return the errors of a computation in a floating type, without own keys."""
    xp = _dispatch.namespace_of(norm)
    factors, diagonal = fitted.factors()
    _, d, rank = factors.shape
    unit = float(info.eps) / 2
    drift = fitted.row("drift", lambda: reach.drift)
    tiny = _tiny(fitted, info) * (1.0 + norm)
    mean = (
        norm
        * (
            _gamma(d + 2, unit) * fitted.row("mean_norms", lambda: reach.mean_norms)
            + drift
        )
        + tiny
    )
    root = xp.sqrt(variance)
    projection = (
        _gamma(d + 2, unit)
        * norm
        * fitted.row("factor_norms", lambda: reach.factor_norms)
        + tiny
    )
    n_squares = rank + (0 if diagonal is None else d)
    squares = (
        2.0 * root * projection
        + projection**2
        + _gamma(n_squares + 6, unit) * (root + projection) ** 2
        + reach.moments * norm**2 * fitted.row("spread", lambda: reach.spread)
        + 2.0 * (norm * drift) ** 2
        + tiny
    )
    log_counts = fitted.row("log_counts", lambda: np.log(_divisor(fitted.statistics)))
    return _Errors(mean, squares, reach.sums + unit * (xp.abs(log_counts) + 4.0))


def _tiny(fitted: Fitted, info: Any) -> float:
    """Return what a sum of products may lose to underflow."""
    rank = int(fitted.factors()[0].shape[2])
    return float(info.smallest_normal) * (fitted.n_features + rank + 4)


def _errors_without_own(
    fitted: Fitted,
    errors: _Errors,
    terms: Terms,
    own: Own,
    norm: Array,
    variance: Array,
    info: Any,
) -> _Errors:
    """Return the errors where rows leave their own keys out of their components."""
    xp = _dispatch.namespace_of(norm)
    unit = float(info.eps) / 2
    d = fitted.n_features
    is_own = terms.is_own
    weights = fitted.row("divisor", lambda: _divisor(fitted.statistics))
    rest = xp.where(is_own & (terms.weights > 0), terms.weights / weights, 1.0)
    ratio = (1.0 - rest) / rest
    log_own = xp.where(own.component >= 0, own.log_weight, 0.0)[:, None]
    square = norm**2
    square_error = _gamma(d + 2, unit) * square + _tiny(fitted, info)
    # Relative error of the own key's share of its component.
    share_error = errors.log_count + unit * (xp.abs(log_own) + 4.0)
    rest_error = (1.0 - rest) * share_error / rest
    share_error = 2.0 * (share_error + rest_error)
    # First-order analysis holds while these errors are small.
    unstable = is_own & (rest_error > 0.25)
    apart = xp.abs(square - terms.original_mean)
    apart_error = square_error + errors.mean
    root_spread = xp.sqrt(terms.spread)
    own_mean = (
        errors.mean / rest
        + ratio * square_error
        + ratio * apart * share_error
        + 4.0 * unit * (xp.abs(terms.original_mean) + ratio * apart)
    )
    own_variance = (
        errors.variance
        + ratio * (2.0 * root_spread * apart_error + apart_error**2)
        + ratio * terms.spread * share_error
        + _gamma(d + 4, unit) * (variance + ratio * terms.spread)
    ) / rest + terms.variance * 2.0 * rest_error
    mean = xp.where(is_own, own_mean, errors.mean)
    return _Errors(
        xp.where(unstable, math.inf, mean),
        xp.where(is_own, own_variance, errors.variance),
        xp.where(is_own, errors.log_count + 2.0 * rest_error, errors.log_count),
        (square_error + 4.0 * unit * (square + xp.abs(log_own)))[:, 0],
        # The kernels leave out a rest that is not told from rounding.
        is_own & (rest <= 16.0 * unit),
    )


def _closure(fitted: Fitted, reach: _Reach, terms: Terms, norm: Array) -> Array:
    """Return bounds on what treating scores as normal does to the terms' logarithms."""
    xp = _dispatch.namespace_of(norm)
    width = 2.0 * norm * fitted.row("radii", lambda: reach.radii)
    half = 0.5 * terms.variance
    hoeffding = width**2 / 8.0 - half
    closure = xp.where(hoeffding > half, hoeffding, half)
    if fitted.settings.covariance_type == "full":
        cubic = _SKEWNESS_BOUND * width**3
        closure = xp.where(cubic < closure, cubic, closure)
    return closure


def _bound(fitted: Fitted, rows: Array, dtype: str, own: Own | None) -> Array:
    """Return `error_bound` in float64, of values of the type of the rows."""
    xp = _dispatch.namespace_of(rows)
    info = xp.finfo(rows.dtype)
    unit = float(info.eps) / 2
    x = xp.astype(rows, xp.float64)
    norm = xp.sqrt(xp.sum(x * x, axis=1))[:, None]
    terms = gaussian_terms(fitted, x, "float64", own)
    e = evaluation(fitted, "float64")
    _, variance = _dispatch.backend_for(x=x).gaussian_score_moments(
        x, e.means, e.factors, e.diagonal
    )
    reach = _reach(fitted)
    errors = _errors(fitted, reach, norm, variance, info)
    if own is not None:
        errors = _errors_without_own(fitted, errors, terms, own, norm, variance, info)
    rounding = (
        errors.mean
        + 0.5 * errors.variance
        + errors.log_count
        + 8.0 * unit * (xp.abs(terms.mean) + 0.5 * terms.variance)
    )
    absent = terms.log_terms == -math.inf
    closure = _closure(fitted, reach, terms, norm)
    raised = xp.where(absent, -math.inf, terms.log_terms + closure + rounding)
    lowest = terms.log_terms
    if errors.vanishing is not None:
        lowest = xp.where(errors.vanishing, -math.inf, lowest)
    own_raised = None
    if terms.own_terms is not None and errors.own is not None:
        own_raised = xp.where(
            terms.own_terms == -math.inf, -math.inf, terms.own_terms + errors.own
        )
    log_z = log_sum(xp, terms.log_terms, terms.own_terms)
    low = log_sum(xp, lowest, terms.own_terms)
    high = log_sum(xp, raised, own_raised)
    empty = (high == -math.inf) & (low == -math.inf)
    bound = xp.where(empty, 0.0, high - low)
    size = xp.where(log_z == -math.inf, 0.0, xp.abs(log_z))
    n_components = fitted.settings.n_components
    bound = bound + (n_components + 16.0) * unit + 4.0 * unit * size
    if fitted.statistics.has_key_weights:
        bound = bound + 2.0 * fitted.statistics.unit
    # What does not fit the type of the queries may come out infinite.
    largest = float(info.max) / 16.0
    constants = fitted.row("constants", lambda: reach.mean_norms + reach.factor_norms)
    square = variance + norm**2 * float(own is not None)
    peak = xp.max(
        xp.stack(
            [
                xp.max(norm * (1.0 + constants), axis=1),
                xp.max(xp.where(absent, 0.0, square), axis=1),
                size,
            ]
        ),
        axis=0,
    )
    is_large = bool(max(reach.mean_norms.max(), reach.factor_norms.max()) > largest)
    bound = xp.where((peak > largest) | is_large, math.inf, bound)
    if fitted.settings.control_samples != 0:
        value = xp.astype(
            estimate("log_normalizer", fitted, rows, dtype, own), xp.float64
        )
        moved = xp.abs(value - log_z)
        bound = bound + xp.where((value == log_z) | empty, 0.0, moved)
    has_nan = xp.any(xp.isnan(x), axis=1)
    bound = xp.where(xp.isnan(bound), math.inf, bound)
    return xp.where(has_nan, math.nan, bound)


def _gamma(n_operations: int, unit: float) -> float:
    """Return the bound n u / (1 - n u) on the relative error of that many roundings."""
    product = n_operations * unit
    return product / (1.0 - product) if product < 0.5 else math.inf
