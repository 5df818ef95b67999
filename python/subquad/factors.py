"""Products of sparse factors: dense maps of n rows in O(n log n) numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from subquad._dispatch import Array
from subquad._host import HostArray
from subquad._operator_chain import OperatorChain
from subquad._paramixer import paramixer
from subquad._validation import (
    ProductArguments,
    as_type_of,
    cdil_row,
    check_count,
    check_flag,
    chord_row,
    csr_arguments,
    csr_transpose_arguments,
    network_arguments,
    product_arguments,
)

__all__ = [
    "FactorWeights",
    "OperatorChain",
    "cdil_offsets",
    "chord_offsets",
    "csr_product",
    "csr_transpose",
    "factor_values",
    "paramixer",
    "sparse_factor_product",
]


class FactorWeights(NamedTuple):
    """The weights of the networks that make the values of M factors.

    Each is that of ``torch.nn.Linear``, of M networks stacked.

    Parameters
    ----------
    weight_in : array of shape (..., M, h, d)
        Weights of the first layers.
    bias_in : array of shape (..., M, h)
        Biases of the first layers.
    weight_out : array of shape (..., M, K, h)
        Weights of the second layers.
    bias_out : array of shape (..., M, K)
        Biases of the second layers.

    See Also
    --------
    factor_values : The networks.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> weights = sq.FactorWeights(
    ...     np.zeros((3, 8, 4)), np.zeros((3, 8)), np.zeros((3, 5, 8)), np.ones((3, 5))
    ... )
    >>> sq.factor_values(np.zeros((10, 4)), weights).shape
    (3, 10, 5)
    """

    weight_in: Array
    bias_in: Array
    weight_out: Array
    bias_out: Array


class ProductAndIntermediates(NamedTuple):
    """A product of sparse factors, and what precedes all factors but the first."""

    out: Array
    intermediates: Array


def chord_offsets(n: int, n_links: int | None = None) -> HostArray:
    """Return the offsets 0, 1, 2, 4, … of the CHORD pattern.

    Parameters
    ----------
    n : int
        Length of the sequences, at least 1.
    n_links : int, optional
        K, how many offsets. By default ceil(log₂ n) + 1: with as many factors as
        ceil(log₂ n) every row reaches every other one.

    Returns
    -------
    ndarray of int64, of shape (K,)
        The offsets.

    Raises
    ------
    TypeError
        If an argument is no integer.
    ValueError
        If an argument is less than 1, or `n_links` is more than 64.

    See Also
    --------
    cdil_offsets : A pattern that changes from factor to factor.
    sparse_factor_product : Takes offsets, or the name of the pattern.

    References
    ----------
    .. [1] R. Khalitov et al., "Sparse factorization of square matrices with application
       to neural attention modeling", Neural Networks, 2022, arXiv:2109.08184.

    Examples
    --------
    >>> import subquad as sq
    >>> sq.chord_offsets(10)
    array([0, 1, 2, 4, 8])
    """
    n = check_count("n", n, 1)
    if n_links is None:
        n_links = (n - 1).bit_length() + 1
    n_links = check_count("n_links", n_links, 1)
    if n_links > 64:
        message = f"n_links must be at most 64, got {n_links}"
        raise ValueError(message)
    return np.array(chord_row(n_links), np.int64)


def cdil_offsets(
    n: int, *, kernel_size: int = 9, n_factors: int | None = None
) -> HostArray:
    """Return the offsets of the CDIL pattern, circular dilated kernels.

    Factor m has 0, 1 … h, -1 … -h times 2^m, with h = (kernel_size - 1) / 2.

    Parameters
    ----------
    n : int
        Length of the sequences, at least 1.
    kernel_size : int
        K, how many offsets a factor has: odd.
    n_factors : int, optional
        M, how many factors. By default ceil(log₂ n): every row reaches every other one.

    Returns
    -------
    ndarray of int64, of shape (M, K)
        The offsets of each factor.

    Raises
    ------
    TypeError
        If an argument is no integer.
    ValueError
        If an argument is less than 1, `kernel_size` is even, or an offset has more than
        64 bits.

    See Also
    --------
    chord_offsets : One pattern for all factors.
    sparse_factor_product : Takes offsets, or the name of the pattern.

    Notes
    -----
    Offsets may exceed n, and coincide modulo n: such terms add up.

    References
    ----------
    .. [1] L. Cheng et al., "Classification of long sequential data using circular
       dilated convolutional neural networks", Neurocomputing, 2023, arXiv:2201.02143.

    Examples
    --------
    >>> import subquad as sq
    >>> sq.cdil_offsets(8, kernel_size=5)
    array([[ 0,  1,  2, -1, -2],
           [ 0,  2,  4, -2, -4],
           [ 0,  4,  8, -4, -8]])
    """
    n = check_count("n", n, 1)
    kernel_size = check_count("kernel_size", kernel_size, 1)
    if kernel_size % 2 == 0:
        message = f"kernel_size must be odd, got {kernel_size}"
        raise ValueError(message)
    if n_factors is None:
        n_factors = (n - 1).bit_length()
    else:
        n_factors = check_count("n_factors", n_factors, 1)
    if (kernel_size // 2) << max(n_factors - 1, 0) >= 2**63:
        message = f"n_factors = {n_factors} makes offsets of more than 64 bits"
        raise ValueError(message)
    rows = [cdil_row(kernel_size, m) for m in range(n_factors)]
    return np.array(rows, np.int64).reshape(n_factors, kernel_size)


def sparse_factor_product(
    values: Array | Sequence[Array],
    x: Array,
    /,
    *,
    pattern: Any = "chord",
    residual: str = "none",
    circular: bool = True,
    transpose: bool = False,
    segment_ids: Array | None = None,
    return_intermediates: bool = False,
    recompute: bool = False,
) -> Any:
    """Multiply rows by a product of sparse square matrices.

    With (W_m v)ᵢ = Σ_k values_mik vⱼ, j = (i + offset_mk) mod n: v₀ = x,
    v_m = W_m v_(m-1) + r_m, and v_M is returned. The first factor is applied first.

    Parameters
    ----------
    values : array of shape (..., M, n, K), or sequence of arrays of shape (..., n, K_m)
        The entries of the factors, in the order of their offsets. Real floating, of any
        array library. Factors that differ in K come in a list, or a tuple.
    x : array of shape (..., n, d)
        Rows. Batch dimensions are equal to those of `values`, or broadcast.
    pattern : {"chord", "cdil"}, or integers of shape (K,) or (M, K)
        The offsets. ``"chord"``: 0, 1, 2, 4, … in every factor. ``"cdil"``: those of
        `cdil_offsets` with K odd as the size of the kernels. Integers (K,) serve all
        factors; a list may hold a row for each factor. Any integers: they are taken
        modulo the length of a sequence, and terms whose rows coincide add up. They lie
        in host memory, and are static where a function is traced: in what
        `torch.compile` traces, numbers in a list or tuple made outside.
    residual : {"none", "step", "input"}
        What is added to a factor's product: r_m = 0, v_(m-1) or x.
    circular : bool
        Whether the first row follows the last. Otherwise terms whose row would lie past
        an end are left out, whatever their values hold.
    transpose : bool
        Whether to apply the transpose of the whole map.
    segment_ids : int array of shape (n,), optional
        Runs of equal numbers are sequences packed one after another: each is circular
        in itself, and nothing crosses a border.
    return_intermediates : bool
        Whether to return v₁ … v_(M-1) too, which `subquad.vjp.sparse_factor_product`
        takes. Not of a transpose, nor of factors in a list.
    recompute : bool
        Whether gradients by automatic differentiation compute v₁ … v_(M-1) anew instead
        of keeping them; factors in a list keep them.

    Returns
    -------
    array of shape (..., n, d), or named tuple
        The product, in the type of `x`; with `return_intermediates` a named tuple of it
        and v₁ … v_(M-1), (..., max(M - 1, 0), n, d), in the type that is computed in.

    Raises
    ------
    TypeError
        If an argument is no array, is not of real floating type (offsets,
        `segment_ids`: not integers; a flag: no bool), offsets are not static, or the
        arrays are of several libraries or on several devices.
    ValueError
        If shapes do not fit, there is no pattern or residual of a name, K is even with
        ``pattern="cdil"``, or intermediates are asked for where there are none.

    See Also
    --------
    chord_offsets, cdil_offsets : The patterns.
    factor_values : Makes values from rows.
    paramixer : Makes values and applies them.
    OperatorChain : Products of sparse matrices of any structure.
    subquad.vjp.sparse_factor_product : The gradients, for libraries without autograd.

    Notes
    -----
    O(M n K d) time and 2 n d numbers of memory beyond the result, times the number of
    batches; no array of n K d numbers and no indices. A gradient takes twice the time,
    and the (M - 1) n d numbers v₁ … v_(M-1), kept or, with `recompute`, computed anew
    by another product. With ceil(log₂ n) factors of a named pattern, for ``"chord"`` of
    ceil(log₂ n) + 1 links and for ``"cdil"`` of 3 or more, each row depends on all rows
    [1]_; with fewer links, as floor(log₂ n) makes, it may not. 16-bit arrays compute in
    float32. torch tensors and JAX arrays are differentiable in values and x.

    In the order of the factors a map without residual is W_M … W₂ W₁, with
    ``residual="step"`` (W_M + I) … (W₁ + I), and with ``residual="input"``
    W_M … W₁ + W_M … W₂ + … + W_M + I. No factors are the identity.

    References
    ----------
    .. [1] R. Khalitov et al., "Sparse factorization of square matrices with application
       to neural attention modeling", Neural Networks, 2022, arXiv:2109.08184.
    .. [2] T. Yu et al., "Paramixer: Parameterizing mixing links in sparse factors works
       better than dot-product self-attention", CVPR, 2022, arXiv:2204.10670.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> x = np.arange(5.0)[:, None]
    >>> values = np.ones((1, 5, 3))
    >>> sq.sparse_factor_product(values, x)[:, 0]
    array([3., 6., 9., 7., 5.])
    >>> sq.sparse_factor_product(values, x, circular=False)[:, 0]
    array([3., 6., 9., 7., 4.])
    """
    call = product_arguments(
        values, x, pattern, residual, circular, transpose, segment_ids
    )
    check_flag("return_intermediates", return_intermediates)
    check_flag("recompute", recompute)
    is_list = isinstance(values, (list, tuple))
    if return_intermediates and (transpose or is_list):
        kind = "values in a list" if is_list else "transpose=True"
        message = f"return_intermediates=True has no meaning with {kind}"
        raise ValueError(message)
    if is_list:
        out, _ = one_by_one(call, residual, circular, transpose)
        return as_type_of(out, x)
    out, intermediates = call.backend.sparse_factor_product(
        call.values[0],
        call.x,
        call.segments,
        call.offsets,
        residual,
        bool(circular),
        bool(transpose),
        bool(return_intermediates),
        bool(recompute),
    )
    out = as_type_of(out, x)
    return ProductAndIntermediates(out, intermediates) if return_intermediates else out


def one_by_one(
    call: ProductArguments, residual: str, circular: bool, transpose: bool
) -> tuple[Array, list[Array]]:
    """Return the product of factors that differ in K, and what each was applied to."""
    first = out = call.x
    applied_to: list[Array] = [None] * len(call.values)
    passed: Array | None = None
    for m in call.order(transpose):
        applied_to[m] = out
        if transpose and residual == "input":
            passed = out if passed is None else passed + out
        out, _ = call.backend.sparse_factor_product(
            call.values[m],
            out,
            call.segments,
            call.offsets[m : m + 1],
            "none" if residual == "input" else residual,
            bool(circular),
            bool(transpose),
            False,
            False,
        )
        if residual == "input" and not transpose:
            out = out + first
    return out if passed is None else passed + out, applied_to


def factor_values(x: Array, weights: Any, /) -> Array:
    """Compute the values of sparse factors from rows, with one network for each factor.

    values_mi = weight_out_m gelu(weight_in_m xᵢ + bias_in_m) + bias_out_m, with
    gelu(z) = z (1 + erf(z / √2)) / 2.

    Parameters
    ----------
    x : array of shape (..., n, d)
        Rows. Real floating, of any array library.
    weights : FactorWeights, or tuple of four arrays
        `weight_in` (..., M, h, d), `bias_in` (..., M, h), `weight_out` (..., M, K, h)
        and `bias_out` (..., M, K): two layers as ``torch.nn.Linear`` has them, of M
        networks stacked.

    Returns
    -------
    array of shape (..., M, n, K)
        The values, in the type of `x`.

    Raises
    ------
    TypeError
        If `weights` is no tuple, an argument is no array or not of real floating type,
        or the arrays are of several libraries or on several devices.
    ValueError
        If there are not four weights, or shapes do not fit.

    See Also
    --------
    sparse_factor_product : Takes the values.
    paramixer : Both at once, for which the values need not be whole.
    subquad.vjp.factor_values : The gradients, for libraries without autograd.

    Notes
    -----
    O(M n h (d + K)) time. No memory of n h numbers, where the library has kernels: they
    pass a tile of rows through both layers. 16-bit arrays compute in float32. torch
    tensors and JAX arrays are differentiable in all arrays.

    References
    ----------
    .. [1] T. Yu et al., "Paramixer: Parameterizing mixing links in sparse factors works
       better than dot-product self-attention", CVPR, 2022, arXiv:2204.10670.
    .. [2] D. Hendrycks and K. Gimpel, "Gaussian error linear units (GELUs)", 2016,
       arXiv:1606.08415.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> one = np.ones((1, 1, 1))
    >>> weights = sq.FactorWeights(one, np.zeros((1, 1)), one, np.zeros((1, 1)))
    >>> sq.factor_values(np.array([[-1.0], [0.0], [1.0]]), weights)[0, :, 0]
    array([-0.15865525,  0.        ,  0.84134475])
    """
    call, _, _ = network_arguments(x, weights)
    return as_type_of(call.backend.factor_values(call.x, *call.weights), x)


def csr_product(
    data: Array,
    indices: Array,
    indptr: Array,
    x: Array,
    /,
    *,
    addend: Array | None = None,
    scale: float = 1.0,
) -> Array:
    """Multiply a sparse matrix in compressed rows by a dense one.

    scale A x + addend, with (A x)ᵢ the sum of data_e x_(indices_e) over e from indptrᵢ
    to indptr_(i+1) - 1.

    Parameters
    ----------
    data : array of shape (nnz,)
        The entries. Real floating, of any array library.
    indices : int array of shape (nnz,)
        The column of each entry, in any order; entries in one place add up.
    indptr : int array of shape (rows + 1,)
        Where each row begins, and the last one ends.
    x : array of shape (..., columns, d)
        Rows that are multiplied.
    addend : array of shape (..., rows, d), optional
        Added to the product. Batch dimensions are equal to those of `x`, or broadcast.
    scale : float
        Multiplies the product.

    Returns
    -------
    array of shape (..., rows, d)
        The result, in the type of `x`.

    Raises
    ------
    TypeError
        If an argument is no array, is not of real floating type (`indices`, `indptr`:
        not integers; `scale`: no real number), or the arrays are of several libraries
        or on several devices.
    ValueError
        If shapes do not fit, or kernels on the CPU find indices out of range.

    See Also
    --------
    csr_transpose : The transpose, in compressed rows.
    OperatorChain : Products of several matrices, as objects of `scipy.sparse`.
    subquad.vjp.csr_product : The gradients, for libraries without autograd.

    Notes
    -----
    O(nnz d) time and no memory beyond the result, times the number of batches. Indices
    of 32 or 64 bits are used as they are. torch tensors and JAX arrays are
    differentiable in data, x and addend; the gradient of x is a product with the
    transpose.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> data, indices = np.array([1.0, 2.0, 3.0]), np.array([0, 2, 1])
    >>> indptr = np.array([0, 2, 2, 3])
    >>> sq.csr_product(data, indices, indptr, np.eye(3))
    array([[1., 0., 2.],
           [0., 0., 0.],
           [0., 3., 0.]])
    """
    call = csr_arguments(data, indices, indptr, x, addend, scale)
    out = call.backend.csr_product(
        call.data, call.indices, call.indptr, call.x, call.addend, call.scale, None
    )
    return as_type_of(out, x)


def csr_transpose(
    data: Array, indices: Array, indptr: Array, n_columns: int, /
) -> tuple[Array, Array, Array]:
    """Return the transpose of a sparse matrix in compressed rows.

    Parameters
    ----------
    data : array of shape (nnz,)
        The entries. Real floating, of any array library.
    indices : int array of shape (nnz,)
        The column of each entry.
    indptr : int array of shape (rows + 1,)
        Where each row begins, and the last one ends.
    n_columns : int
        Number of columns, which are the rows of the transpose.

    Returns
    -------
    tuple of three arrays
        Entries (nnz,), their columns (nnz,) and where rows begin (n_columns + 1,), in
        the types of `data` and of the indices. In a row columns ascend, and entries of
        one place keep their order.

    Raises
    ------
    TypeError
        If an argument is no array, is not of real floating type (`indices`, `indptr`,
        `n_columns`: not integer), or the arrays are of several libraries or on several
        devices.
    ValueError
        If shapes do not fit, `n_columns` is negative, or indices are out of range where
        their values may be looked at (not in torch, nor where a function is traced).

    See Also
    --------
    csr_product : Takes what comes back.

    Notes
    -----
    O(nnz log nnz) time and O(nnz) memory, by a stable sort of the columns.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> data, indices = np.array([1.0, 2.0, 3.0]), np.array([0, 2, 1])
    >>> sq.csr_transpose(data, indices, np.array([0, 2, 2, 3]), 3)
    (array([1., 3., 2.]), array([0, 2, 0]), array([0, 1, 2, 3]))
    """
    backend, indices, indptr, n_columns = csr_transpose_arguments(
        data, indices, indptr, n_columns
    )
    return backend.csr_transpose(data, indices, indptr, n_columns)
