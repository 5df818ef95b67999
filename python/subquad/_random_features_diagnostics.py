"""What fitted random features predict of their own errors."""

from __future__ import annotations

import dataclasses
import decimal
import functools
import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _dispatch, _validation
from ._estimators import is_number
from ._feature_families import FAMILIES, Geometry, fit_geometry, log_second_moment
from ._feature_predictions import (
    attention_error,
    log_relative_variance,
    predicted_trigonometric_log_variance,
    required_rows,
    required_trigonometric_rows,
    trigonometric_log_relative_variance,
)
from ._host import from_host, to_host
from ._random_features_evaluation import by_chunks, checked_pair, checked_rows
from ._random_features_state import Fitted

Array: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]

# By how much the logarithm of a variance must be less to be worth a word.
_WORTH = math.log(2.0)


def inaccuracy(fitted: Fitted) -> str | None:
    """Return a warning if the kernel is out of reach of so few features."""
    settings = fitted.settings
    if settings.is_trigonometric:
        return None
    expected = fitted.expectation()
    moment = float(np.max(log_second_moment(expected.rho, expected.phi)))
    if not moment > math.log(settings.n_rows):
        return None
    per_row = 2 if settings.has_pairs else 1
    needed = per_row * decimal.Decimal(moment).exp()
    count = f"{math.ceil(needed):,}" if needed < 10**7 else f"{needed:.1e}"
    return (
        f"n_components={settings.n_components} is too few for the kernel of these "
        "rows: estimates are wrong by as much as they are large, and it would take "
        f"about {count} features to change that; rows of smaller norm, a larger "
        "bandwidth or a smaller scale take fewer"
    )


def trigonometric_advantage(fitted: Fitted) -> str | None:
    """Return a warning if "auto" left out a family that is clearly better."""
    settings = fitted.settings
    n_rows = settings.n_components // 2
    if settings.family != "auto" or settings.kernel != "gaussian" or n_rows == 0:
        return None
    geometry = fit_geometry(
        FAMILIES["trigonometric"],
        *fitted.sides(),
        objective=settings.objective,
        regularization=settings.regularization,
    )
    theirs = predicted_trigonometric_log_variance(
        geometry, n_rows, settings.coupling, settings.objective
    )
    own = fitted.predictions[fitted.family.name]
    gain = float(np.mean(own)) - float(np.mean(theirs))
    if not gain > _WORTH:
        return None
    factor = f"{math.exp(gain):.2g}" if gain < 700.0 else "inf"
    return (
        'family="trigonometric" is predicted to have a relative variance '
        f"{factor} times smaller than {fitted.family.name!r}, the best of the positive "
        'families that "auto" chooses from; its features have signs, which attention '
        "cannot do with"
    )


def required_components(fitted: Fitted, relative_error: float) -> int:
    """Return how many features it takes for a relative error."""
    if not is_number(relative_error) or relative_error <= 0:
        message = f"relative_error must be a finite number > 0, got {relative_error!r}"
        raise ValueError(message)
    settings = fitted.settings
    error = float(relative_error)
    try:
        if settings.is_trigonometric:
            rows = required_trigonometric_rows(
                fitted.geometry, error, settings.coupling, settings.objective
            )
        else:
            rows = required_rows(
                fitted.expectation(),
                error,
                settings.coupling,
                bool(settings.antithetic),
                settings.objective,
            )
    except OverflowError as problem:
        message = (
            "no number of features is enough: the predicted mean relative variance is "
            "infinite"
        )
        raise ValueError(message) from problem
    return int(rows) * (2 if settings.has_pairs else 1)


def log_relative_variances(fitted: Fitted, x: Array, y: Array) -> Array:
    """Return predicted log relative variances, (..., n, m)."""
    x, y = checked_pair(fitted, x, y)
    if _dispatch.library_of(x).name == "dask":
        function = functools.partial(log_relative_variances, fitted)
        return by_chunks(function, fitted, x, y)
    left, right = _scaled(fitted, x), _scaled(fitted, y)
    settings = fitted.settings
    geometry = _over_batch(fitted, left, right)
    with np.errstate(all="ignore"):
        if settings.is_trigonometric:
            logs = trigonometric_log_relative_variance(
                left, right, settings.n_rows, settings.coupling
            )
        else:
            logs = log_relative_variance(
                geometry,
                geometry.query_coordinates(left),
                geometry.key_coordinates(right),
                settings.n_rows,
                settings.coupling,
                bool(settings.antithetic),
            )
    return from_host(np.asarray(logs), x, x.dtype)


def attention_errors(
    fitted: Fitted, q: Array, k: Array, v: Array, causal: bool
) -> Array:
    """Return the predicted error of each row of attention, (..., n)."""
    settings = fitted.settings
    if settings.is_trigonometric:
        message = (
            "trigonometric features have signs: attention needs those of another family"
        )
        raise ValueError(message)
    _validation.check_flag("causal", causal)
    _dispatch.backend_for(q=q, k=k, v=v)
    checked_rows(fitted, q, "q")
    checked_rows(fitted, k, "k")
    first: Any
    first, *_ = _validation.common_floats(("q", "k", "v"), (q, k, v))
    if v.ndim < 2 or v.shape[-2] != k.shape[-2]:
        message = (
            f"v must have shape (..., m, d_v) with m = {k.shape[-2]}, a row for each "
            f"key, got shape {tuple(v.shape)}"
        )
        raise ValueError(message)
    if causal and q.shape[-2] != k.shape[-2]:
        message = (
            f"causal attention needs as many queries as keys, got {q.shape[-2]} and "
            f"{k.shape[-2]}"
        )
        raise ValueError(message)
    _validation.check_broadcast(
        ("q", "k", "v", "projection_"),
        (q.shape[:-2], k.shape[:-2], v.shape[:-2], fitted.heads),
    )
    left, right = _scaled(fitted, q), _scaled(fitted, k)
    errors = attention_error(
        _over_batch(fitted, left, right),
        left,
        right,
        to_host(v).astype(np.float64),
        settings.n_rows,
        settings.coupling,
        bool(settings.antithetic),
        alpha=settings.alpha,
        causal=causal,
    )
    return from_host(np.asarray(errors), first, first.dtype)


def _over_batch(fitted: Fitted, *rows: Float64) -> Geometry:
    """Return the geometry with the scales of every batch element that rows have."""
    geometry = fitted.geometry
    batch = np.broadcast_shapes(fitted.heads, *(part.shape[:-2] for part in rows))
    rho = np.broadcast_to(geometry.rho, (*batch, fitted.n_features))
    return dataclasses.replace(geometry, rho=rho)


def _scaled(fitted: Fitted, rows: Array) -> Float64:
    return fitted.factor * to_host(rows).astype(np.float64)
