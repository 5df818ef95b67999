"""The error bound of the Gaussian normalizer, rounding included."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

from . import _dispatch
from ._gaussian_estimates import estimate
from ._gaussian_state import Fitted
from ._gaussian_statistics import UNIT, quiet_log
from ._gaussian_terms import Own, evaluation, gaussian_terms, log_sum
from ._host import from_host

Array: TypeAlias = Any

# Third central moments on an interval of width w are at most w^3 / (6 sqrt 3).
_SKEWNESS_BOUND = 1.0 / (36.0 * math.sqrt(3.0))


def error_bound(fitted: Fitted, rows: Array, dtype: str, own: Own | None) -> Array:
    """Return bounds for a matrix of queries, in their data type."""
    xp = _dispatch.namespace_of(rows)
    bound = _bound(fitted, rows, dtype, own)
    # Rounding to the nearest must not take it below.
    return xp.astype(bound * (1.0 + 2.0 * float(xp.finfo(rows.dtype).eps)), rows.dtype)


def _bound(fitted: Fitted, rows: Array, dtype: str, own: Own | None) -> Array:
    """Return `error_bound` in float64, of values of the type of the rows."""
    xp = _dispatch.namespace_of(rows)
    statistics = fitted.statistics
    factors, diagonal = fitted.factors()
    k, d, rank = factors.shape
    x = xp.astype(rows, xp.float64)
    terms = gaussian_terms(fitted, x, "float64", own)
    full = fitted.settings.covariance_type == "full"

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
    moments = _gamma(136, statistics.unit) + sums + _gamma(4 * d * d + 16, UNIT)
    factor_norms = np.sqrt(np.sum(factors * factors, axis=(1, 2)))
    part = 0.0 if diagonal is None else 1.0

    def row(values: Any) -> Array:
        return from_host(np.asarray(values, dtype=np.float64), rows)[None, :]

    norm = xp.sqrt(xp.sum(x * x, axis=1))[:, None]
    original_mean = terms.original_mean
    e64 = evaluation(fitted, "float64")
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
        xp.abs(row(np.where(statistics.weights > 0, quiet_log(statistics.weights), 0.0)))
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
    log_z = log_sum(xp, terms.log_terms, terms.own_terms)
    low = log_sum(xp, lowest, terms.own_terms)
    high = log_sum(xp, raised, own_raised)
    empty = (high == -math.inf) & (low == -math.inf)
    bound = xp.where(empty, 0.0, high - low)
    size = xp.where(log_z == -math.inf, 0.0, xp.abs(log_z))
    bound = bound + (k + 16.0) * unit + 4.0 * unit * size
    if statistics.has_key_weights:
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
