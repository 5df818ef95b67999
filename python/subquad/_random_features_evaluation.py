"""Evaluate fitted random features: check the rows, then features and kernels."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, TypeAlias

import numpy as np

from . import _dispatch, _validation
from ._estimators import as_rows, require_finite
from ._feature_maps import FeatureMap
from ._host import has_float64
from ._random_features_state import Fitted, Side
from ._validation.features import FeatureArguments, feature_arguments

Array: TypeAlias = Any

# Numbers that a block of temporaries holds at most.
_MOST = 1 << 22


# -------- features


def log_features(fitted: Fitted, side: Side, x: Array, name: str) -> Array:
    """Return log-features of queries or keys."""
    if fitted.settings.is_trigonometric:
        message = (
            "trigonometric features have signs and no logarithms: use query_features "
            "and key_features, or another family"
        )
        raise ValueError(message)
    return _positive(fitted, side, checked_rows(fitted, x, name), False)


def features_of(fitted: Fitted, side: Side, x: Array, name: str) -> Array:
    """Return features of queries or keys."""
    x = checked_rows(fitted, x, name)
    if not fitted.settings.is_trigonometric:
        return _positive(fitted, side, x, True)
    call = _arguments(fitted, side, x)
    return call.backend.trigonometric_features(*call.arrays)


def _positive(fitted: Fitted, side: Side, x: Array, exponentiate: bool) -> Array:
    call = _arguments(fitted, side, x)
    antithetic = bool(fitted.settings.antithetic)
    return call.backend.log_features(*call.arrays, antithetic, exponentiate)


def _arguments(fitted: Fitted, side: Side, x: Array) -> FeatureArguments:
    """Return what the primitives take: rows and a map in the type of the call."""
    library = _dispatch.library_of(x)
    dtype = "float64" if x.dtype == library.xp.float64 else "float32"
    found: FeatureMap = fitted.map(side, dtype, for_dask=library.name == "dask")
    return feature_arguments(
        x, found.projection, found.bias, found.quadratic, found.shift, found.linear
    )


def transformed(fitted: Fitted, X: Array) -> Array:
    """Return the features of rows that a user may give as a list or a table."""
    if not fitted.is_symmetric:
        message = (
            "transform needs queries and keys of the same features, but fit was given "
            "keys: use query_features and key_features"
        )
        raise ValueError(message)
    return features_of(fitted, "key", accepted_rows(fitted, X), "X")


def accepted_rows(fitted: Fitted, X: Array, who: str = "RandomFeatures") -> Array:
    """Return finite rows of what scikit-learn's conventions let through."""
    rows = as_rows(X, heads=True)
    if rows.shape[-1] != fitted.n_features:
        message = (
            f"X has {rows.shape[-1]} features, but {who} is expecting "
            f"{fitted.n_features} features as input"
        )
        raise ValueError(message)
    if _dispatch.library_of(rows).is_eager(rows):
        require_finite(rows)
    return rows


def checked_rows(fitted: Fitted, x: Array, name: str) -> Array:
    """Return rows of a floating type, of the library that was fitted or Dask's."""
    library = _dispatch.library_of(x, name)
    fitted_library = _dispatch.library_of(fitted.like)
    if library.name != "dask":
        _dispatch.backend_for(**{name: x, "projection_": fitted.like})
    elif fitted_library.name != "numpy":
        message = (
            f"all arrays of a call must be of one library, got: {name} is dask, "
            f"projection_ is {fitted_library.name}; dask rows go with numpy"
        )
        raise TypeError(message)
    _validation.common_floats((name,), (x,))
    d = fitted.n_features
    if x.ndim < 2 or x.shape[-1] != d:
        message = (
            f"{name} must have shape (..., n, d) with d = {d}, "
            f"the number of features in fit, got shape {tuple(x.shape)}"
        )
        raise ValueError(message)
    return x


# -------- kernels


def kernel_matrix(fitted: Fitted, x: Array, y: Array) -> Array:
    """Return the sums of products of features, (..., n, m)."""
    x, y = checked_pair(fitted, x, y)
    if _dispatch.library_of(x).name == "dask":
        return by_chunks(functools.partial(kernel_matrix, fitted), fitted, x, y)
    xp = _dispatch.namespace_of(x)
    if fitted.settings.is_trigonometric:
        left = features_of(fitted, "query", x, "x")
        right = features_of(fitted, "key", y, "y")
        return xp.matmul(left, xp.matrix_transpose(right))
    left = log_features(fitted, "query", x, "x")
    right = log_features(fitted, "key", y, "y")
    wide = xp.float64 if has_float64(x) else xp.float32
    with np.errstate(all="ignore"):
        sums = _log_products(xp, xp.astype(left, wide), xp.astype(right, wide))
        return xp.astype(xp.exp(sums), x.dtype)


def _log_products(xp: Any, left: Array, right: Array) -> Array:
    """Return log Σₘ exp(leftᵢₘ + rightⱼₘ)."""
    top_left, top_right = _largest(xp, left), _largest(xp, right)
    products = xp.matmul(
        xp.exp(left - top_left), xp.matrix_transpose(xp.exp(right - top_right))
    )
    # Terms that are flushed to 0 are each below the smallest normal number.
    info = xp.finfo(left.dtype)
    least = left.shape[-1] * float(info.smallest_normal) / float(info.eps)
    if not _any(xp, products < least):
        return xp.log(products) + top_left + xp.matrix_transpose(top_right)
    m, width = right.shape[-2], left.shape[-1]
    size = max(1, _MOST // max(1, m * width * math.prod(right.shape[:-2])))
    parts = []
    n = left.shape[-2]
    for start in range(0, max(n, 1), size):
        block = left[..., start : min(start + size, n), :]
        terms = block[..., :, None, :] + right[..., None, :, :]
        top = _largest(xp, terms)
        total = xp.sum(xp.exp(terms - top), axis=-1)
        parts.append(xp.log(total) + top[..., 0])
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-2)


def _largest(xp: Any, logs: Array) -> Array:
    top = xp.max(logs, axis=-1, keepdims=True)
    return xp.where(xp.isfinite(top), top, xp.zeros_like(top))


def _any(xp: Any, condition: Array) -> bool:
    """Return whether something is true, or may be: what is traced has no values."""
    library = _dispatch.library_of(condition)
    if library.name in ("torch", "cupy") or library.is_eager(condition):
        with contextlib.suppress(RuntimeError):
            return bool(xp.any(condition))
    return True


def checked_pair(fitted: Fitted, x: Array, y: Array) -> tuple[Array, Array]:
    """Return queries and keys in the type they are computed in."""
    _dispatch.backend_for(x=x, y=y)
    x, y = checked_rows(fitted, x, "x"), checked_rows(fitted, y, "y")
    _validation.check_broadcast(
        ("x", "y", "projection_"), (x.shape[:-2], y.shape[:-2], fitted.heads)
    )
    first, second = _validation.common_floats(("x", "y"), (x, y))
    return first, second


def by_chunks(function: Any, fitted: Fitted, x: Array, y: Array) -> Array:
    """Return function(x, y) of every pair of chunks of rows, (..., n, m)."""
    import dask.array as da

    from ._backends.dask import common as graphs

    shape = np.broadcast_shapes(x.shape[:-2], y.shape[:-2], fitted.heads)
    batch = len(shape)
    names = tuple(f"b{axis}" for axis in range(batch))
    inputs = []
    for rows, core in ((x, ("n", "d")), (y, ("m", "d"))):
        full = da.broadcast_to(rows, (*shape, *rows.shape[-2:]))
        # Heads have maps of their own: chunks hold all of them.
        whole = dict.fromkeys(range(batch), -1) if fitted.heads else {}
        inputs.append((full.rechunk(whole), (*names, *core)))
    return graphs.blockwise(
        graphs.quiet(function), (*names, "n", "m"), graphs.cut_alike(inputs), x.dtype
    )
