"""What embeddings ask of their parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from subquad._estimators import is_number, require_integer
from subquad._validation.common import check_flag

_GRADIENTS = ("source", "symmetric", "full")


def check_embedding_parameters(
    *,
    n_components: Any,
    n_clusters: Any,
    max_iter: Any,
    learning_rate: Any,
    symmetric: Any,
    gradient: Any,
    tol: Any,
    progress: Any,
) -> None:
    """Check all parameters that tell something without an operator."""
    require_integer("n_components", n_components, 1)
    require_integer("n_clusters", n_clusters, 1)
    require_integer("max_iter", max_iter, 1)
    if not is_number(learning_rate) or not 0 < learning_rate <= 1:
        message = (
            "learning_rate must be a number above 0 and at most 1, got "
            f"{learning_rate!r}"
        )
        raise ValueError(message)
    check_flag("symmetric", symmetric)
    if not isinstance(gradient, str) or gradient not in _GRADIENTS:
        message = f'gradient must be "source", "symmetric" or "full", got {gradient!r}'
        raise ValueError(message)
    if gradient == "symmetric" and not symmetric:
        message = (
            'gradient="symmetric" adds the gradients of rows and keys, which are the '
            "same with symmetric=True alone, got symmetric=False"
        )
        raise ValueError(message)
    if tol is not None and (not is_number(tol) or tol < 0):
        message = f"tol must be None or a finite number >= 0, got {tol!r}"
        raise ValueError(message)
    check_flag("progress", progress)


def check_operator_shape(shape: tuple[int, ...], symmetric: bool) -> tuple[int, int]:
    """Return the numbers of rows and keys that an operator has."""
    if len(shape) != 2:
        message = (
            "operator must be a matrix of shape (n, m), got "
            f"{len(shape)} dimensions: shape {shape}"
        )
        raise ValueError(message)
    n, m = (int(size) for size in shape)
    if n == 0:
        message = f"0 sample(s) (shape={(n, m)}) while a minimum of 1 is required."
        raise ValueError(message)
    if m == 0:
        message = f"0 feature(s) (shape={(n, m)}) while a minimum of 1 is required."
        raise ValueError(message)
    if symmetric and n != m:
        message = (
            f"operator must be square with symmetric=True, got shape {(n, m)}; "
            "symmetric=False embeds its rows and its columns each by themselves"
        )
        raise ValueError(message)
    return n, m


def check_clusters(n_clusters: int, m: int) -> None:
    """Check that there are as many keys as clusters of them."""
    if n_clusters > m:
        message = (
            f"n_clusters must be at most the number of keys, {m}, got {n_clusters}"
        )
        raise ValueError(message)


def check_null_weights(
    weights: npt.NDArray[Any], m: int
) -> tuple[npt.NDArray[np.float64], float]:
    """Return null weights in float64, and their sum."""
    if weights.shape != (m,):
        message = (
            f"null_weights must have shape (m,) = ({m},), one for each key, got shape "
            f"{weights.shape}"
        )
        raise ValueError(message)
    if weights.dtype.kind not in "fiub":
        message = f"null_weights must hold real numbers, got dtype {weights.dtype}"
        raise ValueError(message)
    wide = weights.astype(np.float64)
    bad = np.flatnonzero(~((wide >= 0) & np.isfinite(wide)))
    if len(bad):
        message = (
            "null_weights must be finite and not negative, but "
            f"null_weights[{bad[0]}] is {wide[bad[0]]}"
        )
        raise ValueError(message)
    with np.errstate(over="ignore"):
        total = float(np.sum(wide))
    if not 0 < total < math.inf:
        message = f"null_weights must have a positive, finite sum, got {total}"
        raise ValueError(message)
    return wide, total


def check_initial_shape(
    name: str, shape: tuple[int, ...], expected: tuple[int, int], letter: str
) -> None:
    """Check the shape of rows to start from."""
    if shape != expected:
        message = (
            f"{name} must have shape ({letter}, n_components) = {expected}, got shape "
            f"{shape}"
        )
        raise ValueError(message)
