"""Evaluate a fitted state for queries: check them, then block by block of rows."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, Literal, TypeAlias

import numpy as np

from . import _dispatch, _validation
from ._estimators import type_name
from ._gaussian_bound import error_bound
from ._gaussian_estimates import estimate
from ._gaussian_state import Fitted
from ._gaussian_terms import evaluation, own_keys
from ._host import from_host, has_float64, to_host

Array: TypeAlias = Any
SelfTerm: TypeAlias = Literal["include", "exclude"]
Method: TypeAlias = Literal[
    "log_normalizer", "standard_error", "error_estimate", "error_bound"
]

# Rows x samples of the temporaries that the control variate needs at a time.
_MOST_RESIDUALS = 1 << 22


def evaluate(
    fitted: Fitted,
    x: Array,
    self_index: Array | None,
    /,
    *,
    method: Method,
    self_term: SelfTerm,
) -> Array:
    """Return what a method of `GaussianNormalizer` returns for queries (..., n, d)."""
    _validation.check_self_term(self_term, self_index)
    x = checked_queries(fitted, x, "x")
    if self_index is not None:
        self_index = _checked_index(fitted, self_index, x)
    if _dispatch.library_of(x).name == "dask":
        from ._backends import dask as graphs

        # Labels, which are as many as keys, travel to the workers only where they are
        # asked for.
        part = fitted if self_index is not None else fitted.without_labels()
        function = functools.partial(evaluate, method=method, self_term=self_term)
        return graphs.map_rows(function, part, x, self_index)
    if method == "error_bound" and not has_float64(x):
        bound = evaluate(
            fitted.on_host(),
            to_host(x),
            None if self_index is None else to_host(self_index),
            method=method,
            self_term=self_term,
        )
        return from_host(to_host(bound), x, x.dtype)
    with np.errstate(all="ignore"):
        if method == "log_normalizer" and fitted.settings.control_samples == 0:
            return _closed_form(fitted, x, self_index, self_term)
        return _by_rows(method, fitted, x, self_index, self_term)


def checked_queries(fitted: Fitted, x: Array, name: str) -> Array:
    """Return queries of a data type to compute in."""
    library = _dispatch.library_of(x, name)
    if library.name != "dask":
        _dispatch.backend_for(**{name: x, "means_": fitted.like})
    elif _dispatch.library_of(fitted.like).name != "numpy":
        other = _dispatch.library_of(fitted.like).name
        message = (
            f"all arrays of a call must be of one library, got: {name} is dask, "
            f"means_ is {other}; dask queries go with numpy"
        )
        raise TypeError(message)
    (x,) = _validation.common_floats((name,), (x,))
    d = fitted.n_features
    if x.ndim < 2 or x.shape[-1] != d:
        message = (
            f"{name} must have shape (..., n, d) with d = {d}, "
            f"the number of features in fit, got shape {tuple(x.shape)}"
        )
        raise ValueError(message)
    return x


def _checked_index(fitted: Fitted, self_index: Array, x: Array) -> Array:
    library = _dispatch.library_of(self_index, "self_index")
    if _dispatch.library_of(x).name != "dask" or library.name != "numpy":
        _dispatch.backend_for(x=x, self_index=self_index)
    n, m = x.shape[-2], fitted.statistics.n_seen
    index = _validation.check_index("self_index", self_index, n, m)
    if library.name == "torch" and index.device.type == "cpu":
        # A tensor that a transformation of torch wraps has no values to look at.
        with contextlib.suppress(RuntimeError):
            _validation.check_range("self_index", index, m, library)
    return index


def _closed_form(
    fitted: Fitted, x: Array, self_index: Array | None, self_term: SelfTerm
) -> Array:
    xp = _dispatch.namespace_of(x)
    e = evaluation(fitted, type_name(x))
    own = None
    if self_index is not None:
        key = own_keys(fitted, x, self_index, self_term)
        own = (key.component, xp.astype(key.log_weight, x.dtype), key.include)
    backend = _dispatch.backend_for(x=x)
    return backend.gaussian_log_normalizer(
        x, e.log_counts, e.means, e.factors, e.diagonal, own
    )


def _by_rows(
    method: Method,
    fitted: Fitted,
    x: Array,
    self_index: Array | None,
    self_term: SelfTerm,
) -> Array:
    """Evaluate blocks of rows, as many as keep the temporaries small."""
    xp = _dispatch.namespace_of(x)
    dtype = type_name(x)
    rows = xp.reshape(x, (-1, x.shape[-1]))
    own = None
    if self_index is not None:
        key = own_keys(fitted, x, self_index, self_term)
        copies = math.prod(x.shape[:-2])
        own = key._replace(
            component=xp.tile(key.component, (copies,)),
            log_weight=xp.tile(key.log_weight, (copies,)),
            place=xp.tile(key.place, (copies,)),
        )
    n = rows.shape[0]
    statistics = fitted.statistics
    width = len(statistics.sample.weights) + len(statistics.weights)
    size = max(1, _MOST_RESIDUALS // width)
    results = []
    for start in range(0, max(n, 1), size):
        span = slice(start, min(start + size, n))
        block, part = rows[span, :], None if own is None else own.at(span)
        if method == "error_bound":
            results.append(error_bound(fitted, block, dtype, part))
        else:
            results.append(estimate(method, fitted, block, dtype, part))
    result = results[0] if len(results) == 1 else xp.concat(results)
    return xp.reshape(result, x.shape[:-1])
