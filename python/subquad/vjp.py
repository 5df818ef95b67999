"""Gradients of every function, for libraries without autograd.

``vjp.f(grad, *arrays, out=None, **options)`` returns the products of `grad` with the
derivatives of ``f(*arrays, **options)``: one entry per array that is given, in the
order of the signature, each of its array's shape and type. `out`, f's result, is
computed again where it is left out.
"""

from __future__ import annotations

from typing import Literal

from subquad._dispatch import Array, backend_for, not_an_array
from subquad._validation import (
    as_result_of,
    as_type_of,
    check_broadcast,
    check_shape,
    common_floats,
    gaussian_log_normalizer_arguments,
    log_normalizer_arguments,
)

__all__ = ["gaussian_log_normalizer", "log_normalizer"]


def log_normalizer(
    grad: Array,
    x: Array,
    y: Array,
    /,
    log_weights: Array | None = None,
    *,
    out: Array | None = None,
    self_index: Array | None = None,
    self_term: Literal["include", "exclude"] = "include",
) -> tuple[Array, ...]:
    """Compute the gradients of `subquad.log_normalizer`.

    Parameters
    ----------
    grad : array of shape (..., n)
        Derivative of a number in the result, of the result's shape.
    x : array of shape (..., n, d)
        Queries.
    y : array of shape (..., m, d)
        Keys.
    log_weights : array of shape (..., m), optional
        Logarithms of the keys' weights.
    out : array of shape (..., n), optional
        The result of `subquad.log_normalizer`; computed when left out.
    self_index : int array of shape (n,), optional
        Which key is row i itself, -1 for none.
    self_term : {"include", "exclude"}
        Whether a row's own key takes part in its sum.

    Returns
    -------
    tuple of arrays
        The gradients in `x` and `y`, and in `log_weights` if these are given, each of
        the shape and type of its array: summed over dimensions that were broadcast.
        Removed and excluded keys have none.

    Raises
    ------
    TypeError, ValueError
        As `subquad.log_normalizer`, and if `grad` or `out` has not the result's shape.

    See Also
    --------
    subquad.log_normalizer : The function.

    Notes
    -----
    With Pᵢⱼ = wⱼ exp(xᵢ·yⱼ) / Zᵢ the gradients are gᵢ Σⱼ Pᵢⱼ yⱼ, Σᵢ gᵢ Pᵢⱼ xᵢ and
    Σᵢ gᵢ Pᵢⱼ. O(n m d) time; no matrix of scores.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> x = np.array([[1.0, 0.0], [0.0, 2.0]])
    >>> y = np.array([[1.0, 1.0], [0.0, 0.0], [2.0, -1.0]])
    >>> gx, gy = sq.vjp.log_normalizer(np.ones(2), x, y)
    >>> gx
    array([[ 1.57521038, -0.42051248],
           [ 0.89856581,  0.85093709]])
    """
    if grad is None:
        raise not_an_array("grad", None)
    inputs = (x, y, log_weights)
    backend, x, y, log_weights, excluded = log_normalizer_arguments(
        x, y, log_weights, self_index, self_term
    )
    batches = [x.shape[:-2], y.shape[:-2]]
    if log_weights is not None:
        batches.append(log_weights.shape[:-1])
    batch = check_broadcast(("x", "y", "log_weights")[: len(batches)], batches)
    shape = (*batch, x.shape[-2])
    grad, out = _result_like(shape, grad, out, x)
    if out is None:
        out = backend.log_normalizer(x, y, log_weights, excluded)
    gradients = backend.log_normalizer_vjp(
        grad,
        x,
        y,
        log_weights,
        excluded,
        out,
        (True, True, log_weights is not None),
    )
    return _as_inputs(gradients, inputs)


def gaussian_log_normalizer(
    grad: Array,
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    /,
    *,
    diagonal: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, ...]:
    """Compute the gradients of `subquad.gaussian_log_normalizer`.

    Parameters
    ----------
    grad : array of shape (..., n)
        Derivative of a number in the result, of the result's shape.
    x : array of shape (..., n, d)
        Queries.
    log_counts : array of shape (..., k)
        Logarithm of each component's number of keys.
    means : array of shape (..., k, d)
        Means of the components.
    factors : array of shape (..., k, d, r)
        Factors of the covariances.
    diagonal : array of shape (..., k, d), optional
        Variances of single dimensions.
    out : array of shape (..., n), optional
        The result of `subquad.gaussian_log_normalizer`; computed when left out.

    Returns
    -------
    tuple of arrays
        The gradients in `x`, `log_counts`, `means` and `factors`, and in `diagonal` if
        it is given, each of the shape and type of its array: summed over dimensions
        that were broadcast. Empty components have none.

    Raises
    ------
    TypeError, ValueError
        As `subquad.gaussian_log_normalizer`, and if `grad` or `out` has not the
        result's shape.

    See Also
    --------
    subquad.gaussian_log_normalizer : The function.

    Notes
    -----
    With Rᵢₐ = gᵢ times the share of component a in Zᵢ the gradients are
    Σₐ Rᵢₐ (μₐ + FₐFₐᵀxᵢ + diagonalₐ xᵢ), Σᵢ Rᵢₐ, Σᵢ Rᵢₐ xᵢ, (Σᵢ Rᵢₐ xᵢxᵢᵀ) Fₐ and
    ½ Σᵢ Rᵢₐ xᵢ². O(n k d r) time.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> x = np.array([[1.0, 2.0]])
    >>> means, factors = np.array([[0.5, 0.0]]), np.eye(2)[None]
    >>> gx, *_ = sq.vjp.gaussian_log_normalizer(
    ...     np.ones(1), x, np.zeros(1), means, factors
    ... )
    >>> gx
    array([[1.5, 2. ]])
    """
    if grad is None:
        raise not_an_array("grad", None)
    inputs = (x, log_counts, means, factors, diagonal)
    backend, x, log_counts, means, factors, diagonal = (
        gaussian_log_normalizer_arguments(x, log_counts, means, factors, diagonal)
    )
    names = ("x", "log_counts", "means", "factors", "diagonal")
    batches = [
        x.shape[:-2],
        log_counts.shape[:-1],
        means.shape[:-2],
        factors.shape[:-3],
    ]
    if diagonal is not None:
        batches.append(diagonal.shape[:-2])
    shape = (*check_broadcast(names[: len(batches)], batches), x.shape[-2])
    grad, out = _result_like(shape, grad, out, x)
    if out is None:
        out = backend.gaussian_log_normalizer(
            x, log_counts, means, factors, diagonal, None
        )
    gradients = backend.gaussian_log_normalizer_vjp(
        grad,
        x,
        log_counts,
        means,
        factors,
        diagonal,
        out,
        (True, True, True, True, diagonal is not None),
    )
    return _as_inputs(gradients, inputs)


def _result_like(
    shape: tuple[int, ...], grad: Array, out: Array | None, x: Array
) -> tuple[Array, Array | None]:
    """Check `grad` and `out` against the result of `x`; return them in its type."""
    backend_for(grad=grad, out=out, x=x)
    common_floats(("grad", "out"), (grad, out))
    check_shape("grad", grad, shape)
    if out is not None:
        check_shape("out", out, shape)
        out = as_result_of(out, x)
    return as_result_of(grad, x), out


def _as_inputs(
    gradients: tuple[Array | None, ...], inputs: tuple[Array | None, ...]
) -> tuple[Array, ...]:
    """Return the gradients of the arrays that were given, in their types."""
    return tuple(
        as_type_of(gradient, array)
        for gradient, array in zip(gradients, inputs, strict=True)
        if array is not None
    )
