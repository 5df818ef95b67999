"""Random features of Dask arrays: graphs of blocks of rows and batches.

What does not belong to rows stays whole.
"""

from __future__ import annotations

import functools
from typing import Any

from subquad._backends.dask.common import (
    Array,
    Index,
    as_dask,
    blockwise,
    cut_alike,
    kernels,
    one_thread,
    row_gradients,
    stretched,
    with_components,
)
from subquad._dispatch import FeatureGradients

# The dimensions of each argument's matrices, after those of the batch: rows, dimensions
# of a row, rows of the projection and of a factor.
_INDICES: tuple[Index, ...] = (
    ("n", "d"),
    ("k", "d"),
    ("k",),
    ("d",),
    ("r", "d"),
    ("d",),
    ("d",),
)


def log_features(
    x: Array,
    projection: Array,
    bias: Array,
    diagonal: Array | None,
    factor: Array | None,
    shift: Array | None,
    linear: Array | None,
    antithetic: bool,
    exponentiate: bool,
    /,
) -> Array:
    """See `subquad.log_features`: chunks of rows, all features."""
    arrays = (x, projection, bias, diagonal, factor, shift, linear)
    return _features("log_features", arrays, (antithetic, exponentiate), antithetic)


def trigonometric_features(
    x: Array,
    projection: Array,
    bias: Array,
    diagonal: Array | None,
    factor: Array | None,
    shift: Array | None,
    linear: Array | None,
    /,
) -> Array:
    """See `subquad.trigonometric_features`: chunks of rows, all features."""
    arrays = (x, projection, bias, diagonal, factor, shift, linear)
    return _features("trigonometric_features", arrays, (), True)


def _features(
    name: str, arrays: tuple[Array | None, ...], flags: tuple[bool, ...], pairs: bool
) -> Array:
    inputs, batch = with_components([*zip(arrays, _INDICES, strict=True)])
    x, projection = inputs[0][0], inputs[1][0]
    assert x is not None
    assert projection is not None
    m = (2 if pairs else 1) * projection.shape[-2]
    return blockwise(
        functools.partial(_features_block, name=name, flags=flags),
        (*batch, "n", "f"),
        cut_alike(inputs),
        x.dtype,
        new_axes={"f": m},
    )


def _features_block(*arrays: Array | None, name: str, flags: tuple[bool, ...]) -> Array:
    with one_thread():
        return getattr(kernels(arrays[0]), name)(*arrays, *flags)


def log_features_vjp(
    grad: Array,
    x: Array,
    projection: Array,
    bias: Array,
    diagonal: Array | None,
    factor: Array | None,
    shift: Array | None,
    linear: Array | None,
    antithetic: bool,
    needs: tuple[bool, bool, bool, bool, bool, bool, bool],
    /,
) -> FeatureGradients:
    """See `subquad.vjp.log_features`: summed over chunks of rows."""
    arrays = (x, projection, bias, diagonal, factor, shift, linear)
    wanted = tuple(
        need and array is not None for need, array in zip(needs, arrays, strict=True)
    )
    found = row_gradients(
        functools.partial(_gradients_block, antithetic=antithetic, needs=wanted),
        [*zip(arrays, _INDICES, strict=True)],
        [(grad, ("n", "df"))],
        wanted,
    )
    return found[0], found[1], found[2], found[3], found[4], found[5], found[6]


def _gradients_block(
    *arrays: Array | None, antithetic: bool, needs: tuple[bool, ...]
) -> tuple[Array | None, ...]:
    *inputs, grad = stretched(arrays, (*map(len, _INDICES), 2))
    with one_thread():
        function: Any = kernels(grad).log_features_vjp
        gradients: tuple[Array | None, ...] = function(grad, *inputs, antithetic, needs)
    return gradients


def hadamard_transform(x: Array, /) -> Array:
    """See `subquad.hadamard_transform`: chunks of all but the last axis."""
    index = (*(f"b{axis}" for axis in range(x.ndim - 1)), "d")
    inputs: list[tuple[Array | None, Index]] = [(as_dask(x), index)]
    return blockwise(_transform_block, index, cut_alike(inputs), x.dtype)


def _transform_block(x: Array) -> Array:
    with one_thread():
        return kernels(x).hadamard_transform(x)
