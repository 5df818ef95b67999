"""Logarithms of sums of exponentials, exact and from Gaussian mixtures of the keys."""

from __future__ import annotations

from typing import Literal

from subquad._dispatch import Array
from subquad._validation import (
    gaussian_log_normalizer_arguments,
    log_normalizer_arguments,
)

__all__ = ["GaussianNormalizer", "gaussian_log_normalizer", "log_normalizer"]


def log_normalizer(
    x: Array,
    y: Array,
    /,
    *,
    log_weights: Array | None = None,
    self_index: Array | None = None,
    self_term: Literal["include", "exclude"] = "include",
) -> Array:
    """Compute log Σⱼ wⱼ exp(xᵢ·yⱼ) exactly, without a matrix of scores.

    Parameters
    ----------
    x : array of shape (..., n, d)
        Queries. Real floating, of any array library.
    y : array of shape (..., m, d)
        Keys, of the same library and on the same device. Batch dimensions are equal or
        broadcast.
    log_weights : array of shape (..., m), optional
        Logarithms of the keys' weights; 0 when left out. -inf removes a key, whatever
        its row holds.
    self_index : int array of shape (n,), optional
        Which key is row i itself, -1 for none. The same for all batches.
    self_term : {"include", "exclude"}
        Whether a row's own key takes part in its sum; "exclude" needs `self_index`.

    Returns
    -------
    array of shape (..., n)
        The logarithms: float64 if any input is, else float32. -inf where the sum is
        empty, +inf where a score is, NaN where a score is.

    Raises
    ------
    TypeError
        If an argument is no array, is not of real floating type (`self_index`: of
        integers), or the arrays are of several libraries or on several devices.
    ValueError
        If shapes do not fit, `self_index` leaves [-1, m) (looked at on the CPU, outside
        of tracing), or ``self_term="exclude"`` comes without `self_index`.

    See Also
    --------
    gaussian_log_normalizer : The same from a mixture of Gaussians, in linear time.
    subquad.vjp.log_normalizer : The gradients, for libraries without autograd.

    Notes
    -----
    O(n m d) time and O(n) memory beyond the inputs, times the number of batches.
    float16 and bfloat16 are computed in float32, and come back in float32. torch
    tensors and JAX arrays are differentiable in `x`, `y` and `log_weights`; derivatives
    of higher order and in forward mode take O(n m) memory. Arrays without kernels of
    their own are computed in blocks by their library itself.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> x = np.array([[1.0, 0.0], [0.0, 2.0]])
    >>> y = np.array([[1.0, 1.0], [0.0, 0.0], [2.0, -1.0]])
    >>> sq.log_normalizer(x, y)
    array([2.40760596, 2.14293163])
    >>> np.log(np.exp(x @ y.T).sum(axis=1))
    array([2.40760596, 2.14293163])

    Every row a key, and left out of its own sum:

    >>> sq.log_normalizer(y, y, self_index=np.arange(3), self_term="exclude")
    array([1.31326169, 0.69314718, 1.31326169])
    """
    backend, x, y, log_weights, excluded = log_normalizer_arguments(
        x, y, log_weights, self_index, self_term
    )
    return backend.log_normalizer(x, y, log_weights, excluded)


def gaussian_log_normalizer(
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    /,
    *,
    diagonal: Array | None = None,
) -> Array:
    """Compute log Σₐ nₐ E[exp(xᵢ·y)], y normal with mean μₐ and covariance FₐFₐᵀ.

    The log normalizer of keys that are described by a mixture of Gaussians:
    log Σₐ exp(log nₐ + xᵢ·μₐ + ½ xᵢᵀ(FₐFₐᵀ + diag(diagonalₐ))xᵢ).

    Parameters
    ----------
    x : array of shape (..., n, d)
        Queries. Real floating, of any array library.
    log_counts : array of shape (..., k)
        Logarithm of each component's number (or total weight) of keys. -inf is an empty
        component, whatever its mean and factors hold.
    means : array of shape (..., k, d)
        Means of the keys of each component.
    factors : array of shape (..., k, d, r)
        Matrices Fₐ whose FₐFₐᵀ are the covariances: Cholesky factors, other square
        roots or low-rank ones; r may be 0.
    diagonal : array of shape (..., k, d), optional
        Variances of single dimensions, added to the covariances' diagonals.

    Returns
    -------
    array of shape (..., n)
        The logarithms: float64 if any input is, else float32. -inf where all components
        are empty.

    Raises
    ------
    TypeError
        If an argument is no array, is not of real floating type, or the arrays are of
        several libraries or on several devices.
    ValueError
        If shapes do not fit.

    See Also
    --------
    GaussianNormalizer : Fits such a mixture to keys.
    log_normalizer : The exact sum over given keys.
    subquad.vjp.gaussian_log_normalizer : The gradients.

    Notes
    -----
    O(n k d r) time and O(n) memory beyond the inputs, times the number of batches: the
    keys themselves take no part. Exact in the limit of many normal keys; else the
    score's cumulants of third and higher order are dropped in each component [1]_.
    torch tensors are differentiable in all arrays.

    References
    ----------
    .. [1] L. Dall'Amico and E. M. Belliardo, "Learning distributed representations with
       efficient SoftMax normalization", TMLR, 2025, arXiv:2303.17475.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> rng = np.random.default_rng(0)
    >>> keys = rng.normal(size=(1000, 3)) / 4
    >>> x = rng.normal(size=(2, 3))
    >>> factor = np.linalg.cholesky(np.cov(keys.T, ddof=0))
    >>> log_z = sq.gaussian_log_normalizer(
    ...     x, np.log([1000.0]), keys.mean(axis=0)[None], factor[None]
    ... )
    >>> bool(np.abs(log_z - sq.log_normalizer(x, keys)).max() < 1e-2)
    True
    """
    backend, x, log_counts, means, factors, diagonal = (
        gaussian_log_normalizer_arguments(x, log_counts, means, factors, diagonal)
    )
    return backend.gaussian_log_normalizer(
        x, log_counts, means, factors, diagonal, None
    )


# The estimator stands on the functions above.
from subquad._gaussian_normalizer import GaussianNormalizer  # noqa: E402
