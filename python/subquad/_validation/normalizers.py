"""What the normalizers ask of their arguments."""

from __future__ import annotations

from subquad._dispatch import Array, Backend, backend_for, not_an_array
from subquad._validation.common import (
    check_broadcast,
    check_index,
    check_size,
    common_floats,
    wrong_rank,
)


def log_normalizer_arguments(
    x: Array,
    y: Array,
    log_weights: Array | None,
    self_index: Array | None,
    self_term: str,
) -> tuple[Backend, Array, Array, Array | None, Array | None]:
    """Return backend, x, y, log_weights and excluded for `log_normalizer`."""
    if self_term != "include":
        check_self_term(self_term, self_index)
    if x is None or y is None:
        raise not_an_array("x" if x is None else "y", None)
    backend = backend_for(x=x, y=y, log_weights=log_weights, self_index=self_index)
    names = ("x", "y", "log_weights")
    x, y, log_weights = common_floats(names, (x, y, log_weights), n_halves=2)
    x_shape, y_shape = x.shape, y.shape
    if len(x_shape) < 2:
        raise wrong_rank("x", "(..., n, d)", x_shape)
    if len(y_shape) < 2:
        raise wrong_rank("y", "(..., m, d)", y_shape)
    if y_shape[-1] != x_shape[-1]:
        check_size("y", "(..., m, d)", "d", x_shape[-1], y_shape, -1)
    if len(x_shape) > 2 and len(y_shape) > 2:
        check_broadcast(("x", "y"), (x_shape[:-2], y_shape[:-2]))
    if log_weights is not None:
        shape = log_weights.shape
        if len(shape) < 1:
            raise wrong_rank("log_weights", "(..., m)", shape)
        if shape[-1] != y_shape[-2]:
            check_size("log_weights", "(..., m)", "m", y_shape[-2], shape, -1)
        if len(shape) > 1:
            check_broadcast(names, (x_shape[:-2], y_shape[:-2], shape[:-1]))
    if self_index is None:
        return backend, x, y, log_weights, None
    self_index = check_index("self_index", self_index, x_shape[-2], y_shape[-2])
    if self_term == "include":
        # The sum over all keys holds the row's own key as it is.
        self_index = None
    return backend, x, y, log_weights, self_index


def gaussian_log_normalizer_arguments(
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
) -> tuple[Backend, Array, Array, Array, Array, Array | None]:
    """Return backend and arrays for `gaussian_log_normalizer`."""
    if x is None or log_counts is None or means is None or factors is None:
        required = {
            "x": x,
            "log_counts": log_counts,
            "means": means,
            "factors": factors,
        }
        raise not_an_array(next(k for k, v in required.items() if v is None), None)
    backend = backend_for(
        x=x, log_counts=log_counts, means=means, factors=factors, diagonal=diagonal
    )
    names = ("x", "log_counts", "means", "factors", "diagonal")
    x, log_counts, means, factors, diagonal = common_floats(
        names, (x, log_counts, means, factors, diagonal)
    )
    shape = x.shape
    if len(shape) < 2:
        raise wrong_rank("x", "(..., n, d)", shape)
    d = shape[-1]
    if len(means.shape) < 2:
        raise wrong_rank("means", "(..., k, d)", means.shape)
    if len(log_counts.shape) < 1:
        raise wrong_rank("log_counts", "(..., k)", log_counts.shape)
    if len(factors.shape) < 3:
        raise wrong_rank("factors", "(..., k, d, r)", factors.shape)
    check_size("means", "(..., k, d)", "d", d, means.shape, -1)
    k = means.shape[-2]
    check_size("log_counts", "(..., k)", "k", k, log_counts.shape, -1)
    check_size("factors", "(..., k, d, r)", "d", d, factors.shape, -2)
    check_size("factors", "(..., k, d, r)", "k", k, factors.shape, -3)
    batches = [shape[:-2], log_counts.shape[:-1], means.shape[:-2], factors.shape[:-3]]
    if diagonal is not None:
        if len(diagonal.shape) < 2:
            raise wrong_rank("diagonal", "(..., k, d)", diagonal.shape)
        check_size("diagonal", "(..., k, d)", "d", d, diagonal.shape, -1)
        check_size("diagonal", "(..., k, d)", "k", k, diagonal.shape, -2)
        batches.append(diagonal.shape[:-2])
    check_broadcast(names[: len(batches)], batches)
    return backend, x, log_counts, means, factors, diagonal


def check_self_term(self_term: object, self_index: Array | None) -> None:
    """Check how a row's own key counts: "exclude" needs to know which key that is."""
    if not isinstance(self_term, str) or self_term not in ("include", "exclude"):
        message = f"self_term must be 'include' or 'exclude', got {self_term!r}"
        raise ValueError(message)
    if self_term == "exclude" and self_index is None:
        message = (
            "self_term='exclude' needs self_index, the key that each row is itself; "
            "got self_index=None"
        )
        raise ValueError(message)
