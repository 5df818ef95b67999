"""Sparse factors of Dask arrays: graphs of blocks of channels and batches.

A product mixes all rows of a sequence: a task has them all, of one chunk of channels,
and the values of its batches. Values are made of chunks of rows.
"""

from __future__ import annotations

import functools
from typing import Any

import dask.array as da
import numpy as np

from subquad._backends.dask.common import (
    FAN_IN,
    Array,
    Index,
    blockwise,
    cut_alike,
    kernels,
    one_task,
    one_thread,
    pick,
    row_gradients,
    stretched,
    sum_to,
    with_components,
)
from subquad._dispatch import CompressedRows, FactorOffsets, NetworkGradients
from subquad._reference import factors as reference

# The dimensions of each argument's matrices, after those of the batch. Names with a "d"
# are whole: factors "dm", rows "dn" of a sequence and links "dk"; "c" are channels.
_VALUES: Index = ("dm", "dn", "dk")
_ROWS: Index = ("dn", "c")
_SEGMENTS: Index = ("dn",)
_INTERMEDIATES: Index = ("dl", "dn", "c")


def sparse_factor_product(
    values: Array,
    x: Array,
    segments: Array | None,
    offsets: FactorOffsets,
    residual: str,
    circular: bool,
    transpose: bool,
    with_intermediates: bool,
    recompute: bool,
    /,
) -> tuple[Array, Array | None]:
    """See `subquad.sparse_factor_product`: chunks of channels, all rows.

    A task holds the values of its batches, and one chunk of channels of all rows.
    """
    del recompute
    inputs, batch = with_components(
        [(values, _VALUES), (x, _ROWS), (segments, _SEGMENTS)]
    )
    flags = (offsets, residual, circular, transpose, with_intermediates)
    aligned = cut_alike(inputs)
    if not with_intermediates:
        function = functools.partial(_product_block, flags=flags)
        return blockwise(function, (*batch, *_ROWS), aligned, x.dtype), None
    index = (*batch, "c")
    function = functools.partial(_steps_block, flags=flags)
    blocks = blockwise(function, index, aligned, x.dtype)
    n = x.shape[-2]
    sizes = {"dl": max(values.shape[-3] - 1, 0), "dn": n}
    return (
        pick(blocks, 0, (*batch, *_ROWS), index, sizes),
        pick(blocks, 1, (*batch, *_INTERMEDIATES), index, sizes),
    )


def _steps_block(
    values: Array, x: Array, segments: Array | None, *, flags: Any
) -> tuple[Array, Array | None]:
    with one_thread():
        function: Any = kernels(x).sparse_factor_product
        found: tuple[Array, Array | None] = function(values, x, segments, *flags, True)
    return found


def _product_block(
    values: Array, x: Array, segments: Array | None, *, flags: Any
) -> Array:
    return _steps_block(values, x, segments, flags=flags)[0]


def sparse_factor_product_vjp(
    grad: Array,
    values: Array,
    x: Array,
    segments: Array | None,
    intermediates: Array | None,
    offsets: FactorOffsets,
    residual: str,
    circular: bool,
    needs: tuple[bool, bool],
    /,
) -> tuple[Array | None, Array | None]:
    """See `subquad.vjp.sparse_factor_product`: that of values summed over chunks of
    channels.
    """
    inputs, batch = with_components(
        [
            (values, _VALUES),
            (x, _ROWS),
            (segments, _SEGMENTS),
            (grad, _ROWS),
            (intermediates, _INTERMEDIATES),
        ]
    )
    aligned = cut_alike(inputs)
    index = (*batch, "c")
    function = functools.partial(
        _product_gradients_block, flags=(offsets, residual, circular), needs=needs
    )
    blocks = blockwise(function, index, aligned, x.dtype)
    m, n, k = values.shape[-3:]
    grad_values = grad_x = None
    if needs[0]:
        part = da.blockwise(
            _pick_of_values,
            (*batch, *_VALUES, "c"),
            blocks,
            index,
            dtype=x.dtype,
            meta=np.empty((0,) * (len(batch) + 4), dtype=x.dtype),
            new_axes={"dm": m, "dn": n, "dk": k},
            adjust_chunks={"c": 1},
            align_arrays=False,
        )
        grad_values = sum_to(part.sum(axis=-1, split_every=FAN_IN), values.shape)
    if needs[1]:
        grad_x = pick(blocks, 1, (*batch, *_ROWS), index, {"dn": n})
        grad_x = sum_to(grad_x, x.shape)
    return grad_values, grad_x


def _product_gradients_block(
    values: Array,
    x: Array,
    segments: Array | None,
    grad: Array,
    intermediates: Array | None,
    *,
    flags: Any,
    needs: tuple[bool, bool],
) -> tuple[Array | None, Array | None]:
    values, x, grad = stretched((values, x, grad), (3, 2, 2))
    with one_thread():
        function: Any = kernels(grad).sparse_factor_product_vjp
        found: tuple[Array | None, Array | None] = function(
            grad, values, x, segments, intermediates, *flags, needs
        )
    return found


def _pick_of_values(block: tuple[Array, Array]) -> Array:
    return block[0][..., None]


# ------------------------------------------------------------------------ the networks

_NETWORK: tuple[Index, ...] = (
    ("n", "d"),
    ("dm", "dh", "d"),
    ("dm", "dh"),
    ("dm", "dk", "dh"),
    ("dm", "dk"),
)


def factor_values(
    x: Array,
    weight_in: Array,
    bias_in: Array,
    weight_out: Array,
    bias_out: Array,
    /,
) -> Array:
    """See `subquad.factor_values`: chunks of rows, all weights."""
    arrays = (x, weight_in, bias_in, weight_out, bias_out)
    inputs, batch = with_components([*zip(arrays, _NETWORK, strict=True)])
    return blockwise(
        _values_block, (*batch, "dm", "n", "dk"), cut_alike(inputs), x.dtype
    )


def _values_block(*arrays: Array) -> Array:
    with one_thread():
        return kernels(arrays[0]).factor_values(*arrays)


def factor_values_vjp(
    grad: Array,
    x: Array,
    weight_in: Array,
    bias_in: Array,
    weight_out: Array,
    bias_out: Array,
    needs: tuple[bool, bool, bool, bool, bool],
    /,
) -> NetworkGradients:
    """See `subquad.vjp.factor_values`: those of weights summed over chunks of rows."""
    arrays = (x, weight_in, bias_in, weight_out, bias_out)
    found = row_gradients(
        functools.partial(_values_gradients_block, needs=needs),
        [*zip(arrays, _NETWORK, strict=True)],
        [(grad, ("dm", "n", "dk"))],
        needs,
    )
    return found[0], found[1], found[2], found[3], found[4]


def _values_gradients_block(
    *arrays: Array, needs: tuple[bool, bool, bool, bool, bool]
) -> NetworkGradients:
    *inputs, grad = stretched(arrays, (*map(len, _NETWORK), 3))
    with one_thread():
        function: Any = kernels(grad).factor_values_vjp
        found: NetworkGradients = function(grad, *inputs, needs)
    return found


# -------------------------------------------------------------------- sparse matrices

_ENTRIES: Index = ("de",)
_STARTS: Index = ("dp",)
_COLUMNS: Index = ("dn", "c")
_PRODUCT: Index = ("dr", "c")


def csr_product(
    data: Array,
    indices: Array,
    indptr: Array,
    x: Array,
    addend: Array | None,
    scale: float,
    transposed: CompressedRows | None,
    /,
) -> Array:
    """See `subquad.csr_product`: chunks of channels and batches, all rows."""
    del transposed
    inputs, batch = with_components(
        [
            (x, _COLUMNS),
            (data, _ENTRIES),
            (indices, _ENTRIES),
            (indptr, _STARTS),
            (addend, _PRODUCT),
        ]
    )
    return blockwise(
        functools.partial(_csr_block, scale=scale),
        (*batch, *_PRODUCT),
        cut_alike(inputs),
        x.dtype,
        new_axes=None if addend is not None else {"dr": indptr.shape[0] - 1},
    )


def _csr_block(
    x: Array,
    data: Array,
    indices: Array,
    indptr: Array,
    addend: Array | None,
    *,
    scale: float,
) -> Array:
    with one_thread():
        return kernels(x).csr_product(data, indices, indptr, x, addend, scale, None)


def csr_product_vjp(
    grad: Array,
    data: Array,
    indices: Array,
    indptr: Array,
    x: Array,
    addend: Array | None,
    scale: float,
    transposed: CompressedRows | None,
    needs: tuple[bool, bool, bool],
    /,
) -> tuple[Array | None, Array | None, Array | None]:
    """See `subquad.vjp.csr_product`: that of data summed over chunks of channels and
    batches.
    """
    grad_data = grad_x = grad_addend = None
    if needs[0]:
        inputs, batch = with_components(
            [
                (grad, _PRODUCT),
                (x, _COLUMNS),
                (indices, _ENTRIES),
                (indptr, _STARTS),
            ]
        )
        part = blockwise(
            functools.partial(_entries_block, scale=scale),
            ("de", *batch, "c"),
            cut_alike(inputs),
            x.dtype,
            adjust_chunks=dict.fromkeys((*batch, "c"), 1),
        )
        axes = tuple(range(1, part.ndim))
        grad_data = part.sum(axis=axes, split_every=FAN_IN)
    if needs[1]:
        if transposed is None:
            transposed = csr_transpose(data, indices, indptr, x.shape[-2])
        grad_x = csr_product(*transposed, grad, None, scale, None)
        grad_x = sum_to(grad_x, x.shape)
    if needs[2] and addend is not None:
        grad_addend = sum_to(grad, addend.shape)
    return grad_data, grad_x, grad_addend


def _entries_block(
    grad: Array, x: Array, indices: Array, indptr: Array, *, scale: float
) -> Array:
    # Of the entries themselves no more than type and number is needed.
    data = np.empty(indices.shape, x.dtype)
    with one_thread():
        function: Any = kernels(x).csr_product_vjp
        found = function(
            grad, data, indices, indptr, x, None, scale, None, (True, False, False)
        )[0]
    return found.reshape(found.shape[0], *(1,) * (grad.ndim - 1))


def csr_transpose(
    data: Array, indices: Array, indptr: Array, n_columns: int, /
) -> CompressedRows:
    """See `subquad.csr_transpose`: one task."""
    first, second, third = one_task(
        functools.partial(_transpose_block, n_columns=n_columns), data, indices, indptr
    )
    return first, second, third


def _transpose_block(
    data: Array, indices: Array, indptr: Array, *, n_columns: int
) -> CompressedRows:
    return reference.csr_transpose(data, indices, indptr, n_columns)
