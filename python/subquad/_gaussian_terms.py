"""The Gaussian terms of rows of queries: one a component, with or without own keys."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _dispatch
from ._gaussian_state import Fitted
from ._gaussian_statistics import UNIT, quiet_log
from ._host import from_host, has_float64
from ._reference._common import log_sum_exp

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]


class Evaluation(NamedTuple):
    """Statistics in the data type, library and device of queries."""

    log_counts: Array
    means: Array
    factors: Array
    diagonal: Array | None
    sample_deviations: Array
    sample_weights: Array
    sample_log_weights: Array
    sample_offsets: Array


class Own(NamedTuple):
    """Which fitted key each row is: component, log weight, place in the sample.

    The component is -1 for none, the place -1 for a key outside of the sample.
    """

    component: Array
    log_weight: Array
    place: Array
    include: bool

    def at(self, rows: slice) -> Own:
        return Own(
            self.component[rows], self.log_weight[rows], self.place[rows], self.include
        )


class Terms(NamedTuple):
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


def evaluation(fitted: Fitted, dtype: str) -> Evaluation:
    """Return the statistics in a data type, given by its name in every library."""
    return fitted.cached(dtype, lambda: _evaluation(fitted, dtype))


def _evaluation(fitted: Fitted, dtype: str) -> Evaluation:
    statistics = fitted.statistics
    factors, diagonal = fitted.factors()

    def cast_array(array: Float64) -> Array:
        with np.errstate(over="ignore"):
            return from_host(array.astype(dtype), fitted.like)

    return Evaluation(
        cast_array(quiet_log(statistics.weights)),
        cast_array(statistics.means),
        cast_array(factors),
        None if diagonal is None else cast_array(diagonal),
        cast_array(statistics.sample_deviations()),
        cast_array(statistics.sample.weights),
        cast_array(quiet_log(statistics.sample.weights)),
        from_host(statistics.sample_offsets(), fitted.like),
    )


def own_keys(fitted: Fitted, x: Array, self_index: Array, self_term: str) -> Own:
    """Return which fitted key each row of a matrix of queries is."""
    xp = _dispatch.namespace_of(x)
    components, log_weights, positions, places = _keys(fitted)
    index = xp.astype(self_index, positions.dtype)
    is_key = index >= 0
    index = xp.where(is_key, index, xp.zeros_like(index))
    none = -xp.ones_like(index)
    component = xp.where(is_key, xp.take(components, index), none)
    if log_weights is None:
        wide = xp.float64 if has_float64(x) else xp.float32
        log_weight = xp.zeros(index.shape, dtype=wide, device=_dispatch.device_of(x))
    else:
        log_weight = xp.take(log_weights, index)
    place = xp.searchsorted(positions, index)
    last = xp.full_like(place, positions.shape[0] - 1)
    place = xp.where(place > last, last, place)
    in_sample = is_key & (xp.take(positions, place) == index)
    place = xp.where(in_sample, xp.take(places, place), none)
    return Own(component, log_weight, place, self_term == "include")


def _keys(fitted: Fitted) -> tuple[Array, Array | None, Array, Array]:
    """Return each key's component and log weight, and where the sample's keys are.

    The last two: positions of the sample in the stream, increasing, and the places in
    the sample that belong to them.
    """

    def keys() -> tuple[Array, Array | None, Array, Array]:
        statistics = fitted.statistics
        components = statistics.all_labels().astype(np.int64)
        weights = statistics.all_key_weights()
        log_weights = None
        if weights is not None:
            log_weights = quiet_log(weights)
            # A key without weight is in no component.
            components = np.where(weights > 0, components, -1)
        order = np.argsort(statistics.sample.positions).astype(np.int64)
        return (
            from_host(components, fitted.like),
            None if log_weights is None else from_host(log_weights, fitted.like),
            from_host(statistics.sample.positions[order], fitted.like),
            from_host(order, fitted.like),
        )

    return fitted.cached("keys", keys)


def gaussian_terms(fitted: Fitted, rows: Array, dtype: str, own: Own | None) -> Terms:
    """Return the terms of a matrix of queries, in float64 where the device has it."""
    xp = _dispatch.namespace_of(rows)
    e = evaluation(fitted, dtype)
    backend = _dispatch.backend_for(x=rows)
    mean, variance = backend.gaussian_score_moments(
        rows, e.means, e.factors, e.diagonal
    )
    wide = xp.float64 if has_float64(rows) else xp.float32
    mean, variance = xp.astype(mean, wide), xp.astype(variance, wide)
    statistics = fitted.statistics
    weights = fitted.row("weights", lambda: statistics.weights, wide)
    n_keys = fitted.row("rows", lambda: statistics.rows.astype(np.float64), wide)
    occupied = weights > 0
    log_weights = xp.where(
        occupied, xp.log(xp.where(occupied, weights, 1.0)), -math.inf
    )
    original = mean
    own_terms = is_own = spread = None
    if own is not None:
        components = fitted.row("components", lambda: np.arange(weights.shape[1]))
        is_own = own.component[:, None] == xp.astype(components, own.component.dtype)
        log_own = xp.astype(own.log_weight, wide)
        weight = xp.where(is_own, xp.exp(log_own)[:, None], 0.0)
        square = xp.sum(xp.astype(rows, wide) ** 2, axis=1)
        rest = weights - weight
        emptied = is_own & (rest <= weights * 8.0 * UNIT)
        rest = xp.where(emptied, 0.0, rest)
        divisor = xp.where(rest > 0, rest, 1.0)
        apart = square[:, None] - mean
        mean = xp.where(is_own, mean - weight * apart / divisor, mean)
        spread = apart * apart
        if fitted.settings.covariance_type == "diag":
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
    return Terms(
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


def log_sum(xp: Any, log_terms: Array, own_terms: Array | None) -> Array:
    """Return the logarithm of the sum of all terms of each row."""
    if own_terms is not None:
        log_terms = xp.concat([log_terms, own_terms[:, None]], axis=1)
    return log_sum_exp(xp, log_terms)
