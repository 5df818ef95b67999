"""Estimates of log Z from Gaussian terms: control variates, complete components."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from . import _dispatch
from ._gaussian_state import Fitted
from ._gaussian_terms import Own, Terms, evaluation, gaussian_terms, log_sum

Array: TypeAlias = Any
Estimated: TypeAlias = Literal["log_normalizer", "standard_error", "error_estimate"]


class _Estimates(NamedTuple):
    """Values of log Z and their estimated errors, arrays (n,)."""

    gaussian: Array
    corrected: Array
    gaussian_error: Array
    standard_error: Array
    fallback_error: Array


def estimate(
    method: Estimated, fitted: Fitted, rows: Array, dtype: str, own: Own | None
) -> Array:
    """Return a value or its error for a matrix of queries, in their data type."""
    xp = _dispatch.namespace_of(rows)
    values = _estimates(fitted, rows, dtype, own)
    choose = fitted.settings.control_samples == "auto"
    # The third cumulant is measured on the same sample, with about the same
    # standard error.
    error = values.standard_error + values.fallback_error
    uses_gaussian = values.standard_error + error > values.gaussian_error
    if method == "standard_error":
        result = values.standard_error
    elif method == "error_estimate":
        result = error
        if fitted.settings.control_samples == 0:
            result = values.gaussian_error
        elif choose:
            result = xp.where(uses_gaussian, values.gaussian_error, result)
    else:
        result = values.corrected
        if choose:
            result = xp.where(uses_gaussian, values.gaussian, result)
    return xp.astype(result, rows.dtype)


def _estimates(fitted: Fitted, rows: Array, dtype: str, own: Own | None) -> _Estimates:
    xp = _dispatch.namespace_of(rows)
    e = evaluation(fitted, dtype)
    terms = gaussian_terms(fitted, rows, dtype, own)
    wide = terms.mean.dtype
    shape = terms.mean.shape
    occupied = terms.weights > 0
    scale = xp.where(occupied, terms.rows / xp.where(occupied, terms.weights, 1.0), 0.0)
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
        fitted.settings.covariance_type == "full",
    )
    log_factor, log_error, third = (
        xp.astype(part, wide) for part in (log_factor, log_error, third)
    )
    failed = xp.isnan(log_factor) & ~xp.isnan(terms.log_terms)
    # The correction is not needed where every key is in the sample.
    statistics = fitted.statistics
    sizes = np.diff(statistics.sample_offsets()).astype(np.float64)
    incomplete = fitted.row("incomplete", lambda: sizes < statistics.rows)
    failed = failed & incomplete
    log_factor = xp.where(failed | ~incomplete | ~occupied, 0.0, log_factor)
    corrected_terms = _with_complete(
        fitted, rows, dtype, terms, own, terms.log_terms + log_factor
    )
    gaussian = log_sum(xp, terms.log_terms, terms.own_terms)
    corrected = log_sum(xp, corrected_terms, terms.own_terms)

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
    drawn = fitted.row("drawn", lambda: sizes, wide)
    if own is not None and terms.is_own is not None:
        drawn = drawn - xp.astype(terms.is_own & (own.place >= 0)[:, None], wide)
    some = terms.rows > 0
    missed = xp.where(some, 1.0 - drawn / xp.where(some, terms.rows, 1.0), 0.0)
    missed = xp.sqrt(xp.where(missed < 0, 0.0, missed))
    present = (corrected_share > 0) & (missed > 0) & (log_error > -math.inf)
    exponent = xp.where(present, terms.log_terms - corrected[:, None] + log_error, 0.0)
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
    fitted: Fitted,
    rows: Array,
    dtype: str,
    terms: Terms,
    own: Own | None,
    log_terms: Array,
) -> Array:
    """Return log terms with exact ones for components wholly in the sample."""
    statistics = fitted.statistics
    offsets = statistics.sample_offsets()
    complete = (np.diff(offsets) == statistics.rows) & (statistics.rows > 0)
    if not np.any(complete):
        return log_terms
    e = evaluation(fitted, dtype)
    xp = _dispatch.namespace_of(rows)
    backend = _dispatch.backend_for(x=rows)
    columns = []
    for component in range(len(complete)):
        column = log_terms[:, component]
        if complete[component]:
            start, stop = (int(offset) for offset in offsets[component : component + 2])
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
            column = xp.astype(exact, column.dtype) + terms.original_mean[:, component]
        columns.append(column)
    return xp.stack(columns, axis=1)
