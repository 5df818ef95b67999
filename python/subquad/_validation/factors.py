"""What sparse factors and their networks ask of their arguments."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from subquad._dispatch import (
    Array,
    Backend,
    FactorOffsets,
    backend_for,
    library_of,
    not_an_array,
)
from subquad._validation.common import (
    as_int64,
    check_broadcast,
    check_flag,
    check_integers,
    check_segments,
    check_size,
    common_floats,
    dtype_name,
    is_unknown,
    wrong_rank,
)

RESIDUALS = ("none", "step", "input")
_VALUES = "(..., M, n, K)"
_LARGEST = 2**63


class ProductArguments(NamedTuple):
    """What a product of sparse factors takes.

    Attributes
    ----------
    backend : Backend
    values : tuple of arrays
        One array (..., M, n, K), or of factors that came one by one several
        (..., 1, n, K_m).
    x : array of shape (..., n, d)
    segments : array of shape (n,), or None
    offsets : tuple of tuples of int
        Of every factor.
    batch : tuple
        What the batch dimensions broadcast to.
    """

    backend: Backend
    values: tuple[Array, ...]
    x: Array
    segments: Array | None
    offsets: FactorOffsets
    batch: tuple[Any, ...]

    def order(self, transpose: bool) -> Sequence[int]:
        """Return the factors that came one by one as they are applied."""
        factors = range(len(self.values))
        return factors[::-1] if transpose else factors


class NetworkArguments(NamedTuple):
    """What the networks that make values take.

    Attributes
    ----------
    backend : Backend
    x : array of shape (..., n, d)
    weights : tuple of arrays
        (..., M, h, d), (..., M, h), (..., M, K, h) and (..., M, K).
    batch : tuple
        What the batch dimensions broadcast to.
    """

    backend: Backend
    x: Array
    weights: tuple[Array, Array, Array, Array]
    batch: tuple[Any, ...]


class CsrArguments(NamedTuple):
    """What a product with a matrix in compressed rows takes.

    Attributes
    ----------
    backend : Backend
    data, indices, indptr, x, addend : array
    scale : float
    shape : tuple
        Of the product.
    """

    backend: Backend
    data: Array
    indices: Array
    indptr: Array
    x: Array
    addend: Array | None
    scale: float
    shape: tuple[Any, ...]


def product_arguments(
    values: Array | Sequence[Array],
    x: Array,
    pattern: Any,
    residual: str,
    circular: bool,
    transpose: bool,
    segment_ids: Array | None,
) -> ProductArguments:
    """Check the arguments of `sparse_factor_product`."""
    check_residual(residual)
    check_flag("circular", circular)
    check_flag("transpose", transpose)
    is_list = isinstance(values, (list, tuple))
    arrays: list[Any] = list(values) if is_list else [values]
    if not arrays:
        message = "values must hold one array (..., n, K) for each factor, got none"
        raise ValueError(message)
    if is_list:
        names = [f"values[{m}]" for m in range(len(arrays))]
    else:
        names = ["values"]
    for name, array in zip((*names, "x"), (*arrays, x), strict=True):
        if array is None:
            raise not_an_array(name, None)
    backend = backend_for(
        **dict(zip(names, arrays, strict=True)), x=x, segment_ids=segment_ids
    )
    floats: Any = common_floats((*names, "x"), (*arrays, x))
    *arrays, x = floats
    if len(x.shape) < 2:
        raise wrong_rank("x", "(..., n, d)", x.shape)
    n, layout = x.shape[-2], "(..., n, K)" if is_list else _VALUES
    for place, (name, array) in enumerate(zip(names, arrays, strict=True)):
        if len(array.shape) < (2 if is_list else 3):
            raise wrong_rank(name, layout, array.shape)
        check_size(name, layout, "n", n, array.shape, -2)
        if is_list:
            arrays[place] = library_of(array).xp.expand_dims(array, axis=-3)
    batch = check_broadcast(
        (*names, "x"), [*(a.shape[:-3] for a in arrays), x.shape[:-2]]
    )
    segments = check_segments(segment_ids, n)
    counts = [_known("values", "K", a.shape[-1]) for a in arrays]
    if not is_list:
        counts = counts * _known("values", "M", arrays[0].shape[-3])
    offsets = offsets_of_pattern(pattern, counts)
    return ProductArguments(backend, tuple(arrays), x, segments, offsets, batch)


def network_arguments(
    x: Array, weights: Any, v: Array | None = None, segment_ids: Array | None = None
) -> tuple[NetworkArguments, Array | None, Array | None]:
    """Check x and weights of networks; return them with v and segments, if given.

    All arrays have one type then.
    """
    if not isinstance(weights, (tuple, list)):
        message = (
            "weights must be a tuple (weight_in, bias_in, weight_out, bias_out), such "
            f"as FactorWeights, got {type(weights).__name__}"
        )
        raise TypeError(message)
    if len(weights) != 4:
        message = (
            "weights must hold four arrays, weight_in, bias_in, weight_out and "
            f"bias_out, got {len(weights)}"
        )
        raise ValueError(message)
    names = ("weight_in", "bias_in", "weight_out", "bias_out")
    for name, array in (("x", x), *zip(names, weights, strict=True)):
        if array is None:
            raise not_an_array(name, None)
    weight_in, bias_in, weight_out, bias_out = weights
    backend = backend_for(
        x=x,
        v=v,
        weight_in=weight_in,
        bias_in=bias_in,
        weight_out=weight_out,
        bias_out=bias_out,
        segment_ids=segment_ids,
    )
    floats: Any = common_floats(("x", *names, "v"), (x, *weights, v))
    x, *found, v = floats
    weight_in, bias_in, weight_out, bias_out = found
    layouts = ("(..., M, h, d)", "(..., M, h)", "(..., M, K, h)", "(..., M, K)")
    if len(x.shape) < 2:
        raise wrong_rank("x", "(..., n, d)", x.shape)
    for name, layout, array in zip(names, layouts, found, strict=True):
        if len(array.shape) < layout.count(","):
            raise wrong_rank(name, layout, array.shape)
    n_factors, h, k = (
        weight_in.shape[-3],
        weight_in.shape[-2],
        weight_out.shape[-2],
    )
    check_size("weight_in", layouts[0], "d", x.shape[-1], weight_in.shape, -1)
    check_size("bias_in", layouts[1], "M", n_factors, bias_in.shape, -2)
    check_size("bias_in", layouts[1], "h", h, bias_in.shape, -1)
    check_size("weight_out", layouts[2], "M", n_factors, weight_out.shape, -3)
    check_size("weight_out", layouts[2], "h", h, weight_out.shape, -1)
    check_size("bias_out", layouts[3], "M", n_factors, bias_out.shape, -2)
    check_size("bias_out", layouts[3], "K", k, bias_out.shape, -1)
    batch = check_broadcast(
        ("x", *names),
        [
            x.shape[:-2],
            weight_in.shape[:-3],
            bias_in.shape[:-2],
            weight_out.shape[:-3],
            bias_out.shape[:-2],
        ],
    )
    segments = None
    if v is not None:
        if len(v.shape) < 2:
            raise wrong_rank("v", "(..., n, d_v)", v.shape)
        check_size("v", "(..., n, d_v)", "n", x.shape[-2], v.shape, -2)
        check_broadcast(("x", "v"), (batch, v.shape[:-2]))
        segments = check_segments(segment_ids, x.shape[-2])
    call = NetworkArguments(
        backend, x, (weight_in, bias_in, weight_out, bias_out), batch
    )
    return call, v, segments


def csr_arguments(
    data: Array,
    indices: Array,
    indptr: Array,
    x: Array,
    addend: Array | None,
    scale: Any,
) -> CsrArguments:
    """Check the arguments of `csr_product`."""
    for name, array in (
        ("data", data),
        ("indices", indices),
        ("indptr", indptr),
        ("x", x),
    ):
        if array is None:
            raise not_an_array(name, None)
    if isinstance(scale, (bool, np.bool_)) or not isinstance(scale, numbers.Real):
        message = f"scale must be a real number, got {scale!r}"
        raise TypeError(message)
    backend = backend_for(data=data, indices=indices, indptr=indptr, x=x, addend=addend)
    data, x, addend = common_floats(("data", "x", "addend"), (data, x, addend))
    indices, indptr = _structure(data, indices, indptr)
    if len(x.shape) < 2:
        raise wrong_rank("x", "(..., columns, d)", x.shape)
    rows = indptr.shape[0] - 1
    batch: tuple[Any, ...] = tuple(x.shape[:-2])
    if addend is not None:
        layout = "(..., rows, d)"
        if len(addend.shape) < 2:
            raise wrong_rank("addend", layout, addend.shape)
        check_size("addend", layout, "rows", rows, addend.shape, -2)
        check_size("addend", layout, "d", x.shape[-1], addend.shape, -1)
        batch = check_broadcast(("x", "addend"), (batch, addend.shape[:-2]))
    try:
        scale = float(scale)
    except OverflowError:
        message = "scale must be within the range of float64, got a number beyond it"
        raise ValueError(message) from None
    shape = (*batch, rows, x.shape[-1])
    return CsrArguments(backend, data, indices, indptr, x, addend, scale, shape)


def csr_transpose_arguments(
    data: Array, indices: Array, indptr: Array, n_columns: Any
) -> tuple[Backend, Array, Array, int]:
    """Return backend, indices, indptr and n_columns for `csr_transpose`."""
    for name, array in (("data", data), ("indices", indices), ("indptr", indptr)):
        if array is None:
            raise not_an_array(name, None)
    backend = backend_for(data=data, indices=indices, indptr=indptr)
    common_floats(("data",), (data,))
    indices, indptr = _structure(data, indices, indptr)
    n_columns = check_count("n_columns", n_columns, 0)
    if library_of(data).is_eager(data):
        _check_places(np.asarray(indices), np.asarray(indptr), n_columns)
    return backend, indices, indptr, n_columns


def _check_places(indices: Any, indptr: Any, n_columns: int) -> None:
    """Check where entries stand, in arrays whose values may be looked at."""
    if indices.size and not 0 <= indices.min() <= indices.max() < n_columns:
        message = (
            f"indices must be at least 0 and less than n_columns = {n_columns}, got "
            f"numbers from {indices.min()} to {indices.max()}"
        )
        raise ValueError(message)
    if indptr[0] < 0 or indptr[-1] > indices.size or (np.diff(indptr) < 0).any():
        message = (
            "indptr must not decrease, from at least 0 to at most nnz = "
            f"{indices.size}, got numbers from {indptr[0]} to {indptr[-1]}"
        )
        raise ValueError(message)


def _structure(data: Array, indices: Array, indptr: Array) -> tuple[Array, Array]:
    """Check where entries stand; return both arrays as int32, or both as int64."""
    check_integers("indices", indices)
    check_integers("indptr", indptr)
    if len(data.shape) != 1:
        raise wrong_rank("data", "(nnz,)", data.shape)
    if len(indices.shape) != 1:
        raise wrong_rank("indices", "(nnz,)", indices.shape)
    check_size("indices", "(nnz,)", "nnz", data.shape[0], indices.shape, 0)
    if len(indptr.shape) != 1:
        raise wrong_rank("indptr", "(rows + 1,)", indptr.shape)
    if indptr.shape[0] == 0:
        message = "indptr must have shape (rows + 1,), got shape (0,)"
        raise ValueError(message)
    library = library_of(indices)
    plain = (library.xp.int32, library.xp.int64)
    if indices.dtype == indptr.dtype and indices.dtype in plain:
        return indices, indptr
    if library.has_int64:
        return as_int64(indices, library), as_int64(indptr, library)
    xp = library.xp
    wide = xp.result_type(indices.dtype, indptr.dtype, xp.int32)
    return xp.astype(indices, wide), xp.astype(indptr, wide)


def check_residual(residual: object) -> None:
    """Check the name of a residual."""
    if not isinstance(residual, str) or residual not in RESIDUALS:
        message = f"residual must be 'none', 'step' or 'input', got {residual!r}"
        raise ValueError(message)


def check_count(name: str, value: Any, least: int) -> int:
    """Check a number of things."""
    is_integer = not isinstance(value, (bool, np.bool_))
    try:
        number = operator.index(value) if is_integer else least
    except TypeError:
        is_integer = False
    if not is_integer:
        message = f"{name} must be an integer, got {value!r}"
        raise TypeError(message)
    if number < least:
        message = f"{name} must be at least {least}, got {number}"
        raise ValueError(message)
    return number


def chord_row(n_links: int) -> tuple[int, ...]:
    """Return the offsets 0, 1, 2, 4, … of a row."""
    return (0, *[1 << k for k in range(n_links - 1)])[:n_links]


def cdil_row(kernel_size: int, factor: int) -> tuple[int, ...]:
    """Return the offsets 0, 1 … h, -1 … -h of a row, times 2^factor."""
    half = kernel_size // 2
    row = (*range(half + 1), *range(-1, -half - 1, -1))
    return tuple([offset << factor for offset in row])


def offsets_of_pattern(pattern: Any, counts: Sequence[Any]) -> FactorOffsets:
    """Return the offsets of factors that have so many values in a row.

    Raises
    ------
    TypeError
        If a pattern that is no name holds other things than integers, or integers that
        are not known yet.
    ValueError
        If there is no pattern of that name, or its sizes do not fit.
    """
    if isinstance(pattern, str):
        return _named(pattern, counts)
    found = _given(pattern, len(counts))
    if len(found) != len(counts):
        message = (
            "pattern must hold offsets (K,) for all factors, or one row of them for "
            f"each of M = {len(counts)} factors, got {len(found)} row"
            f"{'' if len(found) == 1 else 's'}"
        )
        raise ValueError(message)
    for m, (row, count) in enumerate(zip(found, counts, strict=True)):
        if len(row) != count:
            message = (
                f"pattern must have one offset for each of K = {count} values in a "
                f"row of factor {m}, got {len(row)}"
            )
            raise ValueError(message)
    return found


def _named(pattern: str, counts: Sequence[int]) -> FactorOffsets:
    if pattern == "chord":
        rows = {count: chord_row(count) for count in set(counts)}
        return _in_64_bits(pattern, tuple([rows[count] for count in counts]))
    if pattern == "cdil":
        for m, count in enumerate(counts):
            if count % 2 == 0:
                message = (
                    "values must have an odd K for pattern 'cdil', got K = "
                    f"{count} in factor {m}"
                )
                raise ValueError(message)
        found = tuple([cdil_row(count, m) for m, count in enumerate(counts)])
        return _in_64_bits(pattern, found)
    message = f"pattern must be 'chord', 'cdil' or offsets, got {pattern!r}"
    raise ValueError(message)


def _in_64_bits(pattern: str, found: FactorOffsets) -> FactorOffsets:
    for m, row in enumerate(found):
        if row and max(row) >= _LARGEST:
            message = (
                f"values must have offsets of 64 bits at most for pattern {pattern!r}, "
                f"got K = {len(row)} in factor {m}"
            )
            raise ValueError(message)
    return found


def _given(pattern: Any, n_factors: int) -> FactorOffsets:
    """Return the rows of offsets that are given; one serves for all factors."""
    if isinstance(pattern, (list, tuple, range)):
        if pattern and all(_has_length(row) for row in pattern):
            return tuple([_row(f"pattern[{m}]", row) for m, row in enumerate(pattern)])
        return (_row("pattern", pattern),) * n_factors
    array = _on_host("pattern", pattern)
    if array.ndim not in (1, 2):
        raise wrong_rank("pattern", "(K,) or (M, K)", array.shape)
    rows = array.tolist()
    if array.ndim == 2:
        return tuple([tuple(row) for row in rows])
    return (tuple(rows),) * n_factors


def _has_length(row: Any) -> bool:
    return isinstance(row, (list, tuple, range)) or len(getattr(row, "shape", ())) == 1


def _row(name: str, row: Any) -> tuple[int, ...]:
    """Return the offsets of one row as Python's integers."""
    if isinstance(row, (list, tuple, range)):
        return tuple([_offset(name, offset) for offset in row])
    return tuple(_on_host(name, row).tolist())


def _offset(name: str, offset: Any) -> int:
    if isinstance(offset, (bool, np.bool_)):
        message = f"{name} must hold integers, got {offset!r}"
        raise TypeError(message)
    try:
        number = operator.index(offset)
    except (TypeError, RuntimeError):
        raise _not_offsets(name, offset) from None
    if not -_LARGEST <= number < _LARGEST:
        raise _too_large(name, number)
    return number


def _on_host(name: str, pattern: Any) -> Any:
    """Return offsets of any library, which are known and in host memory, in NumPy."""
    try:
        array = np.asarray(pattern)
    except (TypeError, ValueError, RuntimeError, BufferError, AttributeError):
        raise _not_offsets(name, pattern) from None
    if array.dtype.kind not in "iu":
        raise _not_offsets(name, pattern)
    if array.dtype == np.uint64 and array.size and array.max() >= _LARGEST:
        raise _too_large(name, array.max())
    return array


def _too_large(name: str, offset: Any) -> ValueError:
    return ValueError(f"{name} must hold integers of 64 bits, got {offset}")


def _not_offsets(name: str, pattern: Any) -> TypeError:
    came = type(pattern).__name__
    if getattr(pattern, "dtype", None) is not None:
        came = f"{came} of {dtype_name(pattern.dtype)}"
    message = (
        f"{name} must be 'chord', 'cdil' or integers in host memory, which are static "
        "(known before a function is traced, and no arrays that it is traced with), "
        f"got {came}"
    )
    return TypeError(message)


def _known(name: str, letter: str, size: Any) -> int:
    if is_unknown(size):
        message = f"{name} must have a known {letter}, got {size}"
        raise ValueError(message)
    return int(size)
