"""What every reference needs: quiet arithmetic, blocks, sums over stretched axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from subquad._dispatch import Array, Namespace, device_of, library_of

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Scores are made block by block; this many bytes bound one block.
_BLOCK_BYTES = 1 << 24


def primitive(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let infinities and NaN pass without warnings, and products keep their type."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _arithmetic(args[0]):
            return function(*args, **kwargs)

    return call


def _arithmetic(array: Any) -> AbstractContextManager[Any]:
    library = library_of(array)
    if library.name == "torch":
        if array.device.type == "meta":
            # There is no autocast to switch off.
            return nullcontext()
        autocast: AbstractContextManager[Any] = library.xp.autocast(
            array.device.type, enabled=False
        )
        return autocast
    return np.errstate(all="ignore")


def blocks(length: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover `length`, an empty one if that is 0."""
    for start in range(0, max(length, 1), size):
        yield slice(start, min(start + size, length))


def block_sizes(batch: int, n: int, m: int, itemsize: int) -> tuple[int, int]:
    """Return how many rows and keys make a block of scores of bounded size."""
    cells = max(1, _BLOCK_BYTES // (max(batch, 1) * itemsize))
    keys = min(max(m, 1), max(256, cells // max(1, min(n, 256))))
    keys = min(keys, cells)
    return max(1, min(max(n, 1), cells // keys)), keys


def batch_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Broadcast leading dimensions."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(
        next((size for size in sizes if size != 1), 1)
        for sizes in zip(*padded, strict=True)
    )


def batch_size(*shapes: tuple[int, ...]) -> int:
    """Return the number of matrices that leading dimensions make."""
    return math.prod(batch_shape(*shapes))


def join(xp: Namespace, parts: Iterable[Array], axis: int) -> Array:
    """Concatenate blocks; a single one is returned as it is."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=axis)


def sum_to(xp: Namespace, array: Array, shape: tuple[int, ...]) -> Array:
    """Sum an array over the axes along which `shape` was broadcast."""
    if array.shape == shape:
        return array
    extra = array.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(
        axis
        for axis in range(extra, array.ndim)
        if shape[axis - extra] == 1 and array.shape[axis] != 1
    )
    if axes:
        array = xp.sum(array, axis=axes, keepdims=True)
    return xp.reshape(array, shape) if array.shape != shape else array


def wide_dtype(xp: Namespace, like: Array) -> Any:
    """Return float64, or the widest floating type that the device has."""
    info = xp.__array_namespace_info__()
    known = info.dtypes(kind="real floating", device=device_of(like))
    return known.get("float64", xp.float32)


def index_range(xp: Namespace, span: slice, like: Array) -> Array:
    """Return the indices of a block, of the type and on the device of others."""
    return xp.arange(span.start, span.stop, dtype=like.dtype, device=device_of(like))


def log_sum_exp(xp: Namespace, values: Array) -> Array:
    """Return log Σ exp along the last axis: -inf where the sum is empty or 0."""
    if values.shape[-1] == 0:
        return xp.full(
            values.shape[:-1], -math.inf, dtype=values.dtype, device=device_of(values)
        )
    peak = xp.max(values, axis=-1, keepdims=True)
    # A peak of +inf is met by the largest finite number: no difference of infinities.
    largest = float(xp.finfo(values.dtype).max)
    finite = xp.where(xp.isfinite(peak), peak, 0.0)
    shift = xp.where(peak == math.inf, largest, finite)
    total = xp.sum(xp.exp(values - shift), axis=-1)
    is_zero = total == 0.0
    value = xp.log(xp.where(is_zero, 1.0, total)) + shift[..., 0]
    return xp.where(is_zero, -math.inf, value)
