"""Random features of the Gaussian and the softmax kernel, and their logarithms."""

from __future__ import annotations

from subquad._dispatch import Array
from subquad._kernel_ridge import KernelRidge
from subquad._nadaraya_watson import NadarayaWatson
from subquad._random_feature_attention import random_feature_attention
from subquad._random_features import InaccurateFeaturesWarning, RandomFeatures
from subquad._validation import feature_arguments, hadamard_transform_arguments

__all__ = [
    "InaccurateFeaturesWarning",
    "KernelRidge",
    "NadarayaWatson",
    "RandomFeatures",
    "hadamard_transform",
    "log_features",
    "random_feature_attention",
    "trigonometric_features",
]


def log_features(
    x: Array,
    projection: Array,
    bias: Array,
    quadratic: Array | None,
    /,
    *,
    shift: Array | None = None,
    linear: Array | None = None,
    antithetic: bool = False,
) -> Array:
    """Compute the logarithms of positive random features.

    With zᵢ = xᵢ - shift and a quadratic form Q: zᵢ·projection_m + bias_m + zᵢ·linear -
    ½ zᵢᵀQzᵢ, whatever family the features are of.

    Parameters
    ----------
    x : array of shape (..., n, d)
        Points. Real floating, of any array library.
    projection : array of shape (..., m, d)
        Random directions, one for each feature or, with `antithetic`, for each pair.
    bias : array of shape (..., m)
        What a feature has for all points alike.
    quadratic : array of shape (..., d) or (..., r, d), or None
        The form Q. With one dimension fewer than `projection` it is the diagonal of a
        diagonal Q, with as many a factor R of Q = RᵀR; None is Q = 0.
    shift : array of shape (..., d), optional
        Subtracted from the points before all else; 0 when left out.
    linear : array of shape (..., d), optional
        Slope of the points' own term; 0 when left out.
    antithetic : bool
        Whether each direction serves twice: first all as they are, then all negated.

    Returns
    -------
    array of shape (..., n, m) or (..., n, 2 m)
        The logarithms: float64 if any input is, else float32.

    Raises
    ------
    TypeError
        If an argument is no array, is not of real floating type (`antithetic`: no
        bool), or the arrays are of several libraries or on several devices.
    ValueError
        If shapes do not fit.

    See Also
    --------
    RandomFeatures : Draws and fits what these functions take.
    trigonometric_features : Features that are not positive, and bounded.
    hadamard_transform : Structured directions.
    subquad.linear_attention : What is made of the logarithms of features.
    subquad.vjp.log_features : The gradients, for libraries without autograd.

    Notes
    -----
    O(n m d + n r d) time and no memory beyond the result, times the number of batches.
    Nothing is exponentiated: the logarithms are exact to rounding at any size of the
    points, where features themselves overflow or vanish. Of pairs the products are
    formed once, so that they differ in their signs alone. torch tensors and JAX arrays
    are differentiable in all arrays; derivatives of higher order and in forward mode
    take their libraries' own operations.

    Features of ``exp(x·y)`` are [1]_ exp(x·ω - ½|x|²) / √m with normal ω; those of
    other families have other directions, biases and forms [2]_.

    References
    ----------
    .. [1] K. Choromanski et al., "Rethinking attention with Performers", ICLR, 2021,
       arXiv:2009.14794.
    .. [2] V. Likhosherstov et al., "FAVOR#: Sharp attention kernel approximations via
       new classes of positive random features", 2023, arXiv:2302.00787.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(2, 3)) / 2, rng.normal(size=(2, 3)) / 2
    >>> m = 4096
    >>> projection = rng.normal(size=(m, 3))
    >>> bias, ones = np.full(m, -np.log(2 * m) / 2), np.ones(3)
    >>> parameters = (projection, bias, ones)
    >>> log_x = sq.log_features(x, *parameters, antithetic=True)
    >>> log_y = sq.log_features(y, *parameters, antithetic=True)
    >>> estimate = np.exp(log_x) @ np.exp(log_y).T
    >>> bool(np.abs(estimate / np.exp(x @ y.T) - 1).max() < 0.05)
    True
    """
    call = feature_arguments(x, projection, bias, quadratic, shift, linear, antithetic)
    return call.backend.log_features(*call.arrays, bool(antithetic), False)


def trigonometric_features(
    x: Array,
    projection: Array,
    bias: Array,
    quadratic: Array | None,
    /,
    *,
    shift: Array | None = None,
    linear: Array | None = None,
) -> Array:
    """Compute trigonometric random features, the cosines and sines of projections.

    With zᵢ = xᵢ - shift and a quadratic form Q: exp(bias_m + zᵢ·linear - ½ zᵢᵀQzᵢ)
    times cos(zᵢ·projection_m), and after all of these times sin(zᵢ·projection_m).

    Parameters
    ----------
    x : array of shape (..., n, d)
        Points. Real floating, of any array library.
    projection : array of shape (..., m, d)
        Random directions, one for each pair of features.
    bias : array of shape (..., m)
        Logarithm of what a pair is scaled by, for all points alike.
    quadratic : array of shape (..., d) or (..., r, d), or None
        The form Q. With one dimension fewer than `projection` it is the diagonal of a
        diagonal Q, with as many a factor R of Q = RᵀR; None is Q = 0, as the Gaussian
        kernel has it.
    shift : array of shape (..., d), optional
        Subtracted from the points before all else; 0 when left out.
    linear : array of shape (..., d), optional
        Slope of the points' own term; 0 when left out.

    Returns
    -------
    array of shape (..., n, 2 m)
        The features: float64 if any input is, else float32.

    Raises
    ------
    TypeError
        If an argument is no array, is not of real floating type, or the arrays are of
        several libraries or on several devices.
    ValueError
        If shapes do not fit.

    See Also
    --------
    RandomFeatures : Draws what this function takes.
    log_features : The logarithms of positive features.

    Notes
    -----
    O(n m d + n r d) time and no memory beyond the result, times the number of batches.
    Products of the features of two points are cosines of the difference of their
    projections [1]_: bounded, and of any sign. torch tensors and JAX arrays are
    differentiable in all arrays, by their libraries' own operations.

    References
    ----------
    .. [1] A. Rahimi and B. Recht, "Random features for large-scale kernel machines",
       NIPS, 2007.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> rng = np.random.default_rng(0)
    >>> x, m = rng.normal(size=(4, 3)), 4096
    >>> projection, bias = rng.normal(size=(m, 3)), np.full(m, -np.log(m) / 2)
    >>> features = sq.trigonometric_features(x, projection, bias, None)
    >>> distances = ((x[:, None] - x) ** 2).sum(axis=-1)
    >>> error = features @ features.T - np.exp(-distances / 2)
    >>> bool(np.abs(error).max() < 0.05)
    True
    """
    call = feature_arguments(x, projection, bias, quadratic, shift, linear)
    return call.backend.trigonometric_features(*call.arrays)


def hadamard_transform(x: Array, /) -> Array:
    """Compute the Walsh-Hadamard transform of the last axis.

    outᵢ = Σⱼ (-1)^popcount(i & j) xⱼ, in the natural order and without a scale.

    Parameters
    ----------
    x : array of shape (..., d)
        Rows, d a power of two. Real floating, of any array library.

    Returns
    -------
    array of shape (..., d)
        The transforms: float64 if `x` is, else float32.

    Raises
    ------
    TypeError
        If `x` is no array or not of real floating type.
    ValueError
        If `x` has no axes, or d is no power of two.

    See Also
    --------
    log_features : Random features, whose directions may be structured.
    subquad.vjp.hadamard_transform : The gradient.

    Notes
    -----
    O(d log d) time a row. The matrix of the transform is symmetric, of entries 1 and
    -1, and its square is d times the identity. The transform of rows whose signs were
    drawn at random takes the place of a product with a random orthogonal matrix [1]_.

    References
    ----------
    .. [1] F. X. Yu et al., "Orthogonal random features", NIPS, 2016, arXiv:1610.09072.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> sq.hadamard_transform(np.array([1.0, 0.0, 2.0, 0.0]))
    array([ 3.,  3., -1., -1.])
    """
    backend, x = hadamard_transform_arguments(x)
    return backend.hadamard_transform(x)
