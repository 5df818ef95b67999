"""Gradients of every function, for libraries without autograd.

``vjp.f(grad, *arrays, out=None, **options)`` returns the products of `grad` with the
derivatives of ``f(*arrays, **options)``: one entry per array that is given, in the
order of the signature, each of its array's shape and type. `out`, f's result, is
computed again where it is left out.
"""

from __future__ import annotations

from typing import Any, Literal

from subquad._dispatch import (
    Array,
    FactorOffsets,
    backend_for,
    device_of,
    namespace_of,
    not_an_array,
)
from subquad._reference._common import sum_to
from subquad._validation import (
    AttentionArguments,
    ProductArguments,
    as_result_of,
    as_type_of,
    check_broadcast,
    check_shape,
    common_floats,
    csr_arguments,
    feature_arguments,
    gaussian_log_normalizer_arguments,
    hadamard_transform_arguments,
    linear_attention_arguments,
    log_linear_attention_arguments,
    log_linear_recurrence_arguments,
    log_normalizer_arguments,
    logcumsumexp_arguments,
    network_arguments,
    product_arguments,
    signed_logcumsumexp_arguments,
)
from subquad.attention import AttentionState, LogAttentionState, logs_of, sums_of
from subquad.factors import FactorWeights, one_by_one
from subquad.scans import LogSumExpState, state_arrays

__all__ = [
    "csr_product",
    "factor_values",
    "gaussian_log_normalizer",
    "hadamard_transform",
    "linear_attention",
    "log_features",
    "log_linear_attention",
    "log_linear_recurrence",
    "log_normalizer",
    "logcumsumexp",
    "signed_logcumsumexp",
    "sparse_factor_product",
]


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


def log_features(
    grad: Array,
    x: Array,
    projection: Array,
    bias: Array,
    quadratic: Array | None,
    /,
    *,
    shift: Array | None = None,
    linear: Array | None = None,
    antithetic: bool = False,
    out: Array | None = None,
) -> tuple[Array, ...]:
    """Compute the gradients of `subquad.log_features`.

    Parameters
    ----------
    grad : array of shape (..., n, m) or (..., n, 2 m)
        Derivative of a number in the result, of the result's shape.
    x : array of shape (..., n, d)
        Points.
    projection : array of shape (..., m, d)
        Random directions.
    bias : array of shape (..., m)
        What a feature has for all points alike.
    quadratic : array of shape (..., d) or (..., r, d), or None
        The diagonal of a quadratic form, or a factor of one.
    shift : array of shape (..., d), optional
        Subtracted from the points.
    linear : array of shape (..., d), optional
        Slope of the points' own term.
    antithetic : bool
        Whether each direction serves twice.
    out : array, optional
        The result of `subquad.log_features`, of which the gradients take nothing.

    Returns
    -------
    tuple of arrays
        The gradients in `x`, `projection` and `bias`, and in `quadratic`, `shift` and
        `linear` where these are given, each of the shape and type of its array: summed
        over dimensions that were broadcast.

    Raises
    ------
    TypeError, ValueError
        As `subquad.log_features`, and if `grad` or `out` has not the result's shape.

    See Also
    --------
    subquad.log_features : The function.

    Notes
    -----
    With h = grad, or of pairs the difference of both, and gᵢ the sum of a row of grad:
    gxᵢ = Σ_m h_im projection_m + gᵢ (linear - Q zᵢ). O(n m d + n r d) time.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> x, projection = np.array([[1.0, 2.0]]), np.array([[0.5, 0.0]])
    >>> gx, *_ = sq.vjp.log_features(
    ...     np.ones((1, 1)), x, projection, np.zeros(1), np.ones(2)
    ... )
    >>> gx
    array([[-0.5, -2. ]])
    """
    if grad is None:
        raise not_an_array("grad", None)
    call = feature_arguments(x, projection, bias, quadratic, shift, linear, antithetic)
    m = (2 if antithetic else 1) * projection.shape[-2]
    grad, _ = _result_like((*call.batch, x.shape[-2], m), grad, out, call.arrays[1])
    _, _, _, diagonal, factor, *_ = call.arrays
    gx, g_projection, g_bias, g_diagonal, g_factor, g_shift, g_linear = (
        call.backend.log_features_vjp(
            grad,
            *call.arrays,
            bool(antithetic),
            (
                True,
                True,
                True,
                diagonal is not None,
                factor is not None,
                shift is not None,
                linear is not None,
            ),
        )
    )
    g_quadratic = g_factor if diagonal is None else g_diagonal
    return _as_inputs(
        (gx, g_projection, g_bias, g_quadratic, g_shift, g_linear),
        (x, projection, bias, quadratic, shift, linear),
    )


def sparse_factor_product(
    grad: Array,
    values: Array,
    x: Array,
    /,
    *,
    pattern: Any = "chord",
    residual: str = "none",
    circular: bool = True,
    transpose: bool = False,
    segment_ids: Array | None = None,
    out: Array | None = None,
    intermediates: Array | None = None,
) -> tuple[Any, Array]:
    """Compute the gradients of `subquad.sparse_factor_product`.

    Parameters
    ----------
    grad : array of shape (..., n, d)
        Derivative of a number in the result, of the result's shape.
    values : array of shape (..., M, n, K), or sequence of arrays of shape (..., n, K_m)
        The entries of the factors.
    x : array of shape (..., n, d)
        Rows.
    pattern : {"chord", "cdil"}, or integers of shape (K,) or (M, K)
        The offsets.
    residual : {"none", "step", "input"}
        What is added to a factor's product.
    circular : bool
        Whether the first row follows the last.
    transpose : bool
        Whether the transpose of the whole map is applied.
    segment_ids : int array of shape (n,), optional
        Runs of equal numbers are sequences packed one after another.
    out : array of shape (..., n, d), optional
        The result of `subquad.sparse_factor_product`, of which the gradients take
        nothing.
    intermediates : array of shape (..., max(M - 1, 0), n, d), optional
        What `subquad.sparse_factor_product` returns with `return_intermediates`;
        computed anew when left out.

    Returns
    -------
    tuple of two
        The gradients in `values`, a list if these are a sequence, and in `x`, each of
        the shape and type of its array: summed over dimensions that were broadcast.

    Raises
    ------
    TypeError, ValueError
        As `subquad.sparse_factor_product`, and if `grad` or `out` has not the result's
        shape, or there are intermediates of other shape, of a transpose or of factors
        in a list.

    See Also
    --------
    subquad.sparse_factor_product : The function.

    Notes
    -----
    With g the gradient of v_m: gᵢ·v_(m-1)ⱼ in values_mik, and W_mᵀ g in v_(m-1) with
    what the residuals add. O(M n K d) time, deterministic: rows are gathered, never
    scattered. The gradient of a transpose in `values` is that of the map itself, with
    `grad` and `x` exchanged; in `x` it is the map itself.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> values, x = np.ones((1, 3, 2)), np.array([[1.0], [2.0], [4.0]])
    >>> g_values, gx = sq.vjp.sparse_factor_product(np.ones((3, 1)), values, x)
    >>> g_values
    array([[[1., 2.],
            [2., 4.],
            [4., 1.]]])
    >>> gx[:, 0]
    array([2., 2., 2.])
    """
    if grad is None:
        raise not_an_array("grad", None)
    call = product_arguments(
        values, x, pattern, residual, circular, transpose, segment_ids
    )
    shape = (*call.batch, *call.x.shape[-2:])
    grad, _ = _result_like(shape, grad, out, call.x)
    is_list = isinstance(values, (list, tuple))
    if intermediates is not None:
        if transpose or is_list:
            kind = "values in a list" if is_list else "transpose=True"
            message = f"intermediates have no meaning with {kind}"
            raise ValueError(message)
        n_kept = max(len(call.offsets) - 1, 0)
        kept = (*call.batch, n_kept, *call.x.shape[-2:])
        intermediates = _grad(
            "intermediates", intermediates, kept, call.x, "shape (..., M - 1, n, d) ="
        )
    flags = (residual, bool(circular), bool(transpose))
    if is_list:
        g_list, gx = _one_by_one_vjp(call, grad, *flags)
        g_list = [_stretched(g, a) for g, a in zip(g_list, values, strict=True)]
        return g_list, _stretched(gx, x)
    arrays = (call.values[0], call.x, intermediates)
    g_values, gx = _product_vjp(call, grad, *arrays, call.offsets, *flags)
    return as_type_of(g_values, values), as_type_of(gx, x)


def _product_vjp(
    call: ProductArguments,
    grad: Array,
    values: Array,
    x: Array,
    intermediates: Array | None,
    offsets: FactorOffsets,
    residual: str,
    circular: bool,
    transpose: bool,
) -> tuple[Array | None, Array | None]:
    """Return the gradients of a product of some factors."""
    backend, segments = call.backend, call.segments
    options = (offsets, residual, circular)
    if not transpose:
        return backend.sparse_factor_product_vjp(
            grad, values, x, segments, intermediates, *options, (True, True)
        )
    # <g, Aᵀ x> = <A g, x>: of the map A itself, with both exchanged.
    xp = namespace_of(x)
    stretched = xp.broadcast_to(x, tuple(grad.shape))
    g_values, _ = backend.sparse_factor_product_vjp(
        stretched, values, grad, segments, None, *options, (True, False)
    )
    gx, _ = backend.sparse_factor_product(
        values, grad, segments, *options, False, False, False
    )
    return g_values, sum_to(xp, gx, tuple(x.shape))


def _one_by_one_vjp(
    call: ProductArguments, grad: Array, residual: str, circular: bool, transpose: bool
) -> tuple[list[Array], Array]:
    """Return the gradients of factors that differ in K, and that of x."""
    _, applied_to = one_by_one(call, residual, circular, transpose)
    found: list[Array] = [None] * len(call.values)
    inner = "none" if residual == "input" else residual
    xp = namespace_of(grad)
    g = grad
    to_input: Array | None = None
    for m in reversed(call.order(transpose)):
        if residual == "input" and not transpose:
            to_input = g if to_input is None else to_input + g
        before = xp.broadcast_to(applied_to[m], tuple(grad.shape))
        row = call.offsets[m : m + 1]
        found[m], g = _product_vjp(
            call, g, call.values[m], before, None, row, inner, circular, transpose
        )
        found[m] = xp.squeeze(found[m], axis=-3)
        if residual == "input" and transpose:
            g = grad + g
    return found, g if to_input is None else to_input + g


def factor_values(
    grad: Array, x: Array, weights: Any, /, *, out: Array | None = None
) -> tuple[Array, FactorWeights]:
    """Compute the gradients of `subquad.factor_values`.

    Parameters
    ----------
    grad : array of shape (..., M, n, K)
        Derivative of a number in the result, of the result's shape.
    x : array of shape (..., n, d)
        Rows.
    weights : FactorWeights, or tuple of four arrays
        The weights of the networks.
    out : array of shape (..., M, n, K), optional
        The result of `subquad.factor_values`, of which the gradients take nothing.

    Returns
    -------
    tuple of array and FactorWeights
        The gradients in `x` and in each of the weights, of the shapes and types of
        these: summed over dimensions that were broadcast.

    Raises
    ------
    TypeError, ValueError
        As `subquad.factor_values`, and if `grad` or `out` has not the result's shape.

    See Also
    --------
    subquad.factor_values : The function.

    Notes
    -----
    O(M n h (d + K)) time. What lies between the layers is computed anew, for a tile of
    rows at a time where the library has kernels.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> one, zero = np.ones((1, 1, 1)), np.zeros((1, 1))
    >>> weights = sq.FactorWeights(one, zero, one, zero)
    >>> gx, g_weights = sq.vjp.factor_values(np.ones((1, 1, 1)), one[0] * 0, weights)
    >>> gx, g_weights.bias_out
    (array([[0.5]]), array([[1.]]))
    """
    if grad is None:
        raise not_an_array("grad", None)
    call, _, _ = network_arguments(x, weights)
    n_factors, k = call.weights[2].shape[-3:-1]
    shape = (*call.batch, n_factors, call.x.shape[-2], k)
    grad, _ = _result_like(shape, grad, out, call.x)
    gradients = call.backend.factor_values_vjp(
        grad, call.x, *call.weights, (True, True, True, True, True)
    )
    gx, *of_weights = _as_inputs(gradients, (x, *weights))
    return gx, FactorWeights(*of_weights)


def csr_product(
    grad: Array,
    data: Array,
    indices: Array,
    indptr: Array,
    x: Array,
    /,
    *,
    addend: Array | None = None,
    scale: float = 1.0,
    out: Array | None = None,
) -> tuple[Array, ...]:
    """Compute the gradients of `subquad.csr_product`.

    Parameters
    ----------
    grad : array of shape (..., rows, d)
        Derivative of a number in the result, of the result's shape.
    data : array of shape (nnz,)
        The entries.
    indices : int array of shape (nnz,)
        The column of each entry.
    indptr : int array of shape (rows + 1,)
        Where each row begins, and the last one ends.
    x : array of shape (..., columns, d)
        Rows that are multiplied.
    addend : array of shape (..., rows, d), optional
        Added to the product.
    scale : float
        Multiplies the product.
    out : array of shape (..., rows, d), optional
        The result of `subquad.csr_product`, of which the gradients take nothing.

    Returns
    -------
    tuple of arrays
        The gradients in `data` and `x`, and in `addend` if it is given, each of the
        shape and type of its array: summed over dimensions that were broadcast.

    Raises
    ------
    TypeError, ValueError
        As `subquad.csr_product`, and if `grad` or `out` has not the result's shape.

    See Also
    --------
    subquad.csr_product : The function.

    Notes
    -----
    scale gᵢ·xⱼ in the entry at (i, j), scale Aᵀ g in x and g in the addend. O(nnz d)
    time, and O(nnz log nnz) to transpose the matrix.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> data, indices = np.array([1.0, 2.0, 3.0]), np.array([0, 2, 1])
    >>> indptr, x = np.array([0, 2, 2, 3]), np.array([[1.0], [2.0], [3.0]])
    >>> g_data, gx = sq.vjp.csr_product(np.ones((3, 1)), data, indices, indptr, x)
    >>> g_data, gx[:, 0]
    (array([1., 3., 2.]), array([1., 3., 2.]))
    """
    if grad is None:
        raise not_an_array("grad", None)
    call = csr_arguments(data, indices, indptr, x, addend, scale)
    grad, _ = _result_like(call.shape, grad, out, call.x)
    gradients = call.backend.csr_product_vjp(
        grad,
        call.data,
        call.indices,
        call.indptr,
        call.x,
        call.addend,
        call.scale,
        None,
        (True, True, addend is not None),
    )
    *others, of_addend = gradients
    if of_addend is not None and of_addend is grad:
        # Nobody writes to a result and changes what came in.
        of_addend = namespace_of(x).astype(of_addend, of_addend.dtype, copy=True)
        gradients = (*others, of_addend)
    return _as_inputs(gradients, (data, x, addend))


def hadamard_transform(
    grad: Array, x: Array, /, *, out: Array | None = None
) -> tuple[Array, ...]:
    """Compute the gradient of `subquad.hadamard_transform`.

    Parameters
    ----------
    grad : array of shape (..., d)
        Derivative of a number in the result, of the result's shape.
    x : array of shape (..., d)
        Rows, of which the gradient takes no more than shape and type.
    out : array of shape (..., d), optional
        The result of `subquad.hadamard_transform`, of which it takes nothing.

    Returns
    -------
    tuple of one array
        The gradient in `x`, of its shape and type.

    Raises
    ------
    TypeError, ValueError
        As `subquad.hadamard_transform`, and if `grad` or `out` has not the result's
        shape.

    See Also
    --------
    subquad.hadamard_transform : The function, which is its own reverse.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> sq.vjp.hadamard_transform(np.array([1.0, 0.0]), np.zeros(2))
    (array([1., 1.]),)
    """
    if grad is None:
        raise not_an_array("grad", None)
    backend, rows = hadamard_transform_arguments(x)
    grad, _ = _result_like(tuple(rows.shape), grad, out, rows)
    return (as_type_of(backend.hadamard_transform(grad), x),)


def logcumsumexp(
    grad: Array | tuple[Array | None, LogSumExpState | Array | None],
    x: Array,
    /,
    *,
    out: Array | None = None,
    axis: int = -1,
    reverse: bool = False,
    exclusive: bool = False,
    state: LogSumExpState | Array | None = None,
    segment_ids: Array | None = None,
) -> tuple[Any, ...]:
    """Compute the gradients of `subquad.logcumsumexp`.

    Parameters
    ----------
    grad : array, or tuple of array and LogSumExpState
        Derivative of a number in the result, of the shape of `x`; with one in the state
        that is returned if that takes part, or its `log_sum`. Either may be None.
    x : array
        Logarithms of the terms.
    out : array, optional
        The result of `subquad.logcumsumexp`. The sums are formed again in any case.
    axis : int
        The axis to sum along.
    reverse : bool
        Whether to sum over j ≥ i.
    exclusive : bool
        Whether to leave i itself out.
    state : LogSumExpState or array, optional
        Logarithms of what was summed before.
    segment_ids : int array of shape (n,), optional
        Runs of equal numbers are sequences of their own.

    Returns
    -------
    tuple
        The gradient in `x`, and that in `state` if it is given, each of its array's
        shape and type. 0 where an entry is -inf.

    Raises
    ------
    TypeError, ValueError
        As `subquad.logcumsumexp`, and if `grad` or `out` has not the result's shape.

    See Also
    --------
    subquad.logcumsumexp : The function.

    Notes
    -----
    gxⱼ = Σ_{i ≥ j} gᵢ exp(xⱼ - outᵢ), from differences of entries: it does not change
    when `x` is shifted. O(n) time and memory.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> sq.vjp.logcumsumexp(np.ones(3), np.array([-np.inf, 1e4, 1e4]))
    (array([0. , 1.5, 0.5]),)
    """
    grad_out, grad_state = _several(grad, 2)
    given = state_arrays(state)
    scan = logcumsumexp_arguments(x, axis, reverse, exclusive, given, segment_ids)
    xp, shape = namespace_of(scan.x), tuple(x.shape)
    g_sum, g_rest = state_arrays(grad_state)
    lanes = scan.x.shape[: scan.axis] + scan.x.shape[scan.axis + 1 :]
    grad_out = _grad("grad", grad_out, shape, scan.x)
    g_sum = _grad("grad[1]", g_sum, tuple(lanes), scan.x)
    # What was rounded off the logarithm is not what a derivative is taken in.
    del g_rest
    if out is not None:
        _grad("out", out, shape, scan.x)
    if grad_out is not None:
        grad_out = xp.reshape(grad_out, scan.x.shape)
    gx, g_state = scan.backend.logcumsumexp_vjp(
        scan.x,
        scan.log_sum,
        scan.remainder,
        scan.segments,
        scan.axis,
        bool(reverse),
        bool(exclusive),
        grad_out,
        g_sum,
        (True, state is not None),
    )
    gx = as_type_of(xp.reshape(gx, shape), x)
    if state is None:
        return (gx,)
    log_sum, remainder = given
    found = _stretched(g_state, log_sum)
    if isinstance(state, LogSumExpState):
        return gx, LogSumExpState(found, _stretched(g_state, remainder))
    return gx, found


def signed_logcumsumexp(
    grad: Array,
    x: Array,
    sign: Array,
    /,
    *,
    out: Any = None,
    axis: int = -1,
    reverse: bool = False,
    exclusive: bool = False,
) -> tuple[Array, ...]:
    """Compute the gradients of `subquad.signed_logcumsumexp`.

    Parameters
    ----------
    grad : array
        Derivative of a number in `log_abs`, of the shape of `x`.
    x : array
        Logarithms of the terms' sizes.
    sign : array
        Their signs or weights.
    out : tuple of arrays, optional
        The result of `subquad.signed_logcumsumexp`. The sums are formed again in any
        case.
    axis : int
        The axis to sum along.
    reverse : bool
        Whether to sum over j ≥ i.
    exclusive : bool
        Whether to leave i itself out.

    Returns
    -------
    tuple of arrays
        The gradients in `x` and, where `sign` is of real floating type, in `sign` as a
        weight, each of its array's shape and type. Sums that cancel pass nothing on.

    Raises
    ------
    TypeError, ValueError
        As `subquad.signed_logcumsumexp`, and if `grad` has not the result's shape.

    See Also
    --------
    subquad.signed_logcumsumexp : The function.

    Notes
    -----
    With sᵢ the sums: gxⱼ = signⱼ exp(xⱼ) Σᵢ gᵢ / sᵢ and g signⱼ = exp(xⱼ) Σᵢ gᵢ / sᵢ.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> x, sign = np.log([3.0, 1.0]), np.array([1.0, -1.0])
    >>> gx, gsign = sq.vjp.signed_logcumsumexp(np.array([0.0, 1.0]), x, sign)
    >>> gx
    array([ 1.5, -0.5])
    """
    del out
    backend, terms, weights, axis = signed_logcumsumexp_arguments(
        x, sign, axis, reverse, exclusive
    )
    if grad is None:
        raise not_an_array("grad", None)
    xp, shape = namespace_of(terms), tuple(x.shape)
    grad = xp.reshape(_grad("grad", grad, shape, terms), terms.shape)
    is_weight = not xp.isdtype(sign.dtype, "integral")
    gx, gsign = backend.signed_logcumsumexp_vjp(
        terms, weights, axis, bool(reverse), bool(exclusive), grad, (True, is_weight)
    )
    gx = as_type_of(xp.reshape(gx, shape), x)
    if not is_weight:
        return (gx,)
    return gx, _stretched(xp.reshape(gsign, shape), sign)


def log_linear_recurrence(
    grad: Array | tuple[Array | None, Array | None],
    log_a: Array,
    log_b: Array,
    /,
    *,
    out: Array | None = None,
    axis: int = -1,
    state: Array | None = None,
    reverse: bool = False,
    segment_ids: Array | None = None,
) -> tuple[Array, ...]:
    """Compute the gradients of `subquad.log_linear_recurrence`.

    Parameters
    ----------
    grad : array or tuple of two arrays
        Derivative of a number in the result, of the result's shape; with one in the
        state that is returned if that takes part. Either may be None.
    log_a : array
        Logarithms of the factors.
    log_b : array
        Logarithms of what is added.
    out : array, optional
        The result of `subquad.log_linear_recurrence`. It is formed again in any case.
    axis : int
        The axis to go along.
    state : array, optional
        Start log x₀.
    reverse : bool
        Whether to go from the last entry to the first.
    segment_ids : int array of shape (n,), optional
        Runs of equal numbers are sequences of their own.

    Returns
    -------
    tuple of arrays
        The gradients in `log_a`, `log_b`, and in `state` if it is given, each of its
        array's shape and type: summed over dimensions that were broadcast.

    Raises
    ------
    TypeError, ValueError
        As `subquad.log_linear_recurrence`, and if `grad` or `out` has not the result's
        shape.

    See Also
    --------
    subquad.log_linear_recurrence : The function.

    Notes
    -----
    With pₜ = aₜ xₜ₋₁ / xₜ and Gₜ = gₜ + pₜ₊₁ Gₜ₊₁ the gradients are pₜ Gₜ, (1 - pₜ) Gₜ
    and p₁ G₁. O(n) time and memory.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> grad, zeros = np.array([0.0, 1.0]), np.zeros(2)
    >>> sq.vjp.log_linear_recurrence(grad, zeros, zeros)
    (array([0. , 0.5]), array([0.5, 0.5]))
    """
    grad_out, grad_state = _several(grad, 2)
    call = log_linear_recurrence_arguments(
        log_a, log_b, axis, state, reverse, segment_ids
    )
    shape, axis = tuple(call.log_a.shape), call.axis
    lanes = shape[:axis] + shape[axis + 1 :]
    xp = namespace_of(call.log_a)
    grad_out = _grad("grad", grad_out, shape, call.log_a)
    grad_state = _grad("grad[1]", grad_state, lanes, call.log_a)
    if out is not None:
        _grad("out", out, shape, call.log_a)
    if grad_out is None:
        grad_out = xp.zeros_like(call.log_a)
    if grad_state is not None and shape[axis]:
        # The state is the last entry.
        edge = 0 if reverse else shape[axis] - 1
        index = xp.reshape(
            xp.arange(shape[axis], device=device_of(grad_out)),
            (-1, *(1,) * (len(shape) - axis - 1)),
        )
        added = xp.expand_dims(grad_state, axis=axis)
        grad_out = xp.where(index == edge, grad_out + added, grad_out)
    gradients = call.backend.log_linear_recurrence_vjp(
        call.log_a,
        call.log_b,
        call.state,
        call.segments,
        axis,
        bool(reverse),
        grad_out,
        (True, True, state is not None),
    )
    if grad_state is not None and state is not None and not shape[axis]:
        gradients = (*gradients[:2], grad_state)
    return tuple(
        _stretched(gradient, array)
        for gradient, array in zip(gradients, (log_a, log_b, state), strict=True)
        if array is not None
    )


def linear_attention(
    grad: Array | tuple[Array | None, Array | None, AttentionState | None],
    log_q: Array,
    log_k: Array,
    v: Array,
    /,
    *,
    out: Array | None = None,
    causal: bool = False,
    log_decay: Array | None = None,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
    state: AttentionState | None = None,
) -> tuple[Any, ...]:
    """Compute the gradients of `subquad.linear_attention`.

    Parameters
    ----------
    grad : array, or tuple of array, array and AttentionState
        Derivatives of a number in y, of the shape (..., n_q, d_v); with those in the
        logarithms of the rows' sums and in the state that is returned, if these take
        part. Each may be None. A state's scale has no derivative.
    log_q : array of shape (..., n_q, d_k)
        Logarithms of the queries' features.
    log_k : array of shape (..., n, d_k)
        Logarithms of the keys' features.
    v : array of shape (..., n, d_v)
        Values.
    out : array of shape (..., n_q, d_v), optional
        The result y of `subquad.linear_attention`; computed when left out, or rounded
        to a narrower type than the gradients are computed in.
    causal : bool
        Whether token t attends tokens up to t only.
    log_decay : array, optional
        Logarithms of what multiplies the past at each token.
    key_mask : bool array of shape (..., n), optional
        True for keys that are kept.
    segment_ids : int array of shape (n,), optional
        Runs of equal numbers are sequences of their own.
    state : AttentionState, optional
        What was attended before.

    Returns
    -------
    tuple
        The gradients in `log_q`, `log_k`, `v`, and in `log_decay` and `state` if these
        are given, each of its array's shape and type: summed over dimensions that were
        broadcast. That in the state is an AttentionState, 0 in its scale.

    Raises
    ------
    TypeError, ValueError
        As `subquad.linear_attention`, and if `grad` or `out` has not the result's
        shape.

    See Also
    --------
    subquad.linear_attention : The function.

    Notes
    -----
    O(n d_k d_v) time; no array of n d_k d_v numbers. Rows that attend nothing have no
    gradients.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> zeros, v = np.zeros((2, 1)), np.array([[1.0], [3.0]])
    >>> gq, gk, gv = sq.vjp.linear_attention(np.ones((2, 1)), zeros, zeros, v)
    >>> gk
    array([[-1.],
           [ 1.]])
    """
    grad_y, grad_log_z, grad_state = _several(grad, 3)
    call = linear_attention_arguments(
        log_q,
        log_k,
        v,
        causal=causal,
        log_decay=log_decay,
        key_mask=key_mask,
        segment_ids=segment_ids,
        state=sums_of(state),
    )
    values: Any = call.values[0]
    rows = (*call.batch, log_q.shape[-2])
    shape = (*rows, values.shape[-1])
    grad_y = _grad("grad", grad_y, shape, call.log_k)
    grad_log_z = _grad("grad[1]", grad_log_z, rows, call.log_k)
    sums = _state_grads(call, grad_state, sums_of(grad_state), ((5,), (2,)))
    # In a narrower type y would be too coarse for the differences v - y.
    is_exact = out is not None and out.dtype == call.log_k.dtype
    y = _grad("out", out, shape, call.log_k)
    backend: Any = call.backend
    arguments = _arguments(call)
    if grad_y is None:
        y = None
    elif not is_exact:
        y = backend.linear_attention(*arguments, False, False, False)[0]
    gradients = backend.linear_attention_vjp(
        *arguments,
        y,
        grad_y,
        grad_log_z,
        *sums,
        (True, True, True, log_decay is not None, *(state is not None,) * 2),
    )
    found = _attention_gradients(gradients, log_q, log_k, v, log_decay)
    if state is None:
        return found
    return (*found, AttentionState(*map(_stretched, gradients[4:], sums_of(state))))


def log_linear_attention(
    grad: Array | tuple[Array | None, Array | None, LogAttentionState | None],
    log_q: Array,
    log_k: Array,
    log_v: Array,
    /,
    *,
    out: Any = None,
    sign_v: Array | None = None,
    causal: bool = False,
    log_decay: Array | None = None,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
    state: LogAttentionState | None = None,
) -> tuple[Any, ...]:
    """Compute the gradients of `subquad.log_linear_attention`.

    Parameters
    ----------
    grad : array, or tuple of array, array and LogAttentionState
        Derivatives of a number in log_abs_y, of the shape (..., n_q, d_v); with those
        in the logarithms of the rows' sums and in the state that is returned, if these
        take part. Each may be None.
    log_q : array of shape (..., n_q, d_k)
        Logarithms of the queries' features.
    log_k : array of shape (..., n, d_k)
        Logarithms of the keys' features.
    log_v : array of shape (..., n, d_v)
        Logarithms of the values' sizes.
    out : tuple of arrays, optional
        The result of `subquad.log_linear_attention`. It is formed again in any case.
    sign_v : array, optional
        The signs of the values.
    causal : bool
        Whether token t attends tokens up to t only.
    log_decay : array, optional
        Logarithms of what multiplies the past at each token.
    key_mask : bool array of shape (..., n), optional
        True for keys that are kept.
    segment_ids : int array of shape (n,), optional
        Runs of equal numbers are sequences of their own.
    state : LogAttentionState, optional
        What was attended before.

    Returns
    -------
    tuple
        The gradients in `log_q`, `log_k`, `log_v`, and in `log_decay` and `state` if
        these are given, each of its array's shape and type. 0 where an entry is -inf;
        a value that cancels passes nothing on.

    Raises
    ------
    TypeError, ValueError
        As `subquad.log_linear_attention`, and if `grad` has not the result's shape.

    See Also
    --------
    subquad.log_linear_attention : The function.

    Notes
    -----
    O(n d_k d_v) time; no array of n d_k d_v numbers.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> zeros = np.zeros((2, 1))
    >>> gq, gk, gv = sq.vjp.log_linear_attention(np.ones((2, 1)), zeros, zeros, zeros)
    >>> gv
    array([[1.],
           [1.]])
    """
    del out
    grad_y, grad_log_z, grad_state = _several(grad, 3)
    call = log_linear_attention_arguments(
        log_q,
        log_k,
        log_v,
        sign_v=sign_v,
        causal=causal,
        log_decay=log_decay,
        key_mask=key_mask,
        segment_ids=segment_ids,
        state=logs_of(state),
    )
    values: Any = call.values[0]
    rows = (*call.batch, log_q.shape[-2])
    grad_y = _grad("grad", grad_y, (*rows, values.shape[-1]), call.log_k)
    grad_log_z = _grad("grad[1]", grad_log_z, rows, call.log_k)
    g_num, _, g_den = logs_of(grad_state)
    sums = _state_grads(call, grad_state, (g_num, g_den), None)
    backend: Any = call.backend
    gradients = backend.log_linear_attention_vjp(
        *_arguments(call),
        grad_y,
        grad_log_z,
        *sums,
        (True, True, True, log_decay is not None, *(state is not None,) * 2),
    )
    found = _attention_gradients(gradients, log_q, log_k, log_v, log_decay)
    if state is None:
        return found
    g_num = _stretched(gradients[4], state.log_numerator)
    g_den = _stretched(gradients[5], state.log_denominator)
    sign = namespace_of(g_num).zeros_like(g_num)
    return (*found, LogAttentionState(g_num, sign, g_den))


def _arguments(call: AttentionArguments) -> tuple[Any, ...]:
    """Return what the primitives of attention and their reverse begin with."""
    return (
        call.log_k,
        *call.values,
        call.log_q,
        call.log_decay,
        call.key_mask,
        call.segments,
        *call.state,
        call.causal,
    )


def _attention_gradients(
    gradients: tuple[Array | None, ...],
    log_q: Array,
    log_k: Array,
    v: Array,
    log_decay: Array | None,
) -> tuple[Array, ...]:
    gk, gv, gq, gdecay = gradients[:4]
    found = (as_type_of(gq, log_q), as_type_of(gk, log_k), as_type_of(gv, v))
    return found if log_decay is None else (*found, _stretched(gdecay, log_decay))


def _state_grads(
    call: AttentionArguments,
    state: object,
    grads: tuple[Array | None, ...],
    parts: tuple[tuple[int, ...], ...] | None,
) -> tuple[Array | None, ...]:
    """Check the gradients of a state that comes out; return them in a call's type."""
    if state is None:
        return grads
    values: Any = call.values[0]
    d_k, d_v = call.log_k.shape[-1], values.shape[-1]
    if parts is None:
        shapes: tuple[tuple[int, ...], ...] = ((d_k, d_v), (d_k,))
    else:
        shapes = ((*parts[0], d_k), (*parts[1], d_k, d_v))
    return tuple(
        _grad("grad[2]", grad, (*call.batch, *shape), call.log_k)
        for grad, shape in zip(grads, shapes, strict=True)
    )


def _several(grad: Any, count: int) -> tuple[Any, ...]:
    """Return the gradients of all results, None for those that take no part."""
    if grad is None:
        raise not_an_array("grad", None)
    if not isinstance(grad, tuple):
        return (grad, *(None,) * (count - 1))
    if len(grad) > count:
        message = f"grad must hold {count} gradients at most, got {len(grad)}"
        raise ValueError(message)
    return (*grad, *(None,) * (count - len(grad)))


def _grad(
    name: str,
    grad: Array | None,
    shape: tuple[Any, ...],
    like: Array,
    layout: str = "the result's shape",
) -> Array | None:
    """Check a gradient, or a result, that may be left out; return it in a type."""
    if grad is None:
        return None
    backend_for(**{name: grad}, x=like)
    common_floats((name,), (grad,))
    check_shape(name, grad, shape, layout)
    return as_type_of(grad, like)


def _stretched(gradient: Any, array: Any) -> Array:
    """Return a gradient in the shape and type of an array that was broadcast."""
    xp = namespace_of(gradient)
    return as_type_of(sum_to(xp, gradient, tuple(array.shape)), array)


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
