"""What every public function asks of its arguments.

Messages name the argument, what was expected and what came. Nothing here looks at
values, but for the range of an index that lies in memory anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from subquad._dispatch import (
    Array,
    Backend,
    Library,
    Namespace,
    backend_for,
    library_of,
    not_an_array,
)

__all__ = [
    "as_result_of",
    "as_type_of",
    "check_broadcast",
    "check_index",
    "check_range",
    "check_self_term",
    "check_shape",
    "common_floats",
    "gaussian_log_normalizer_arguments",
    "log_normalizer_arguments",
]


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
        raise _wrong_rank("x", "(..., n, d)", x_shape)
    if len(y_shape) < 2:
        raise _wrong_rank("y", "(..., m, d)", y_shape)
    if y_shape[-1] != x_shape[-1]:
        _check_size("y", "(..., m, d)", "d", x_shape[-1], y_shape, -1)
    if len(x_shape) > 2 and len(y_shape) > 2:
        check_broadcast(("x", "y"), (x_shape[:-2], y_shape[:-2]))
    if log_weights is not None:
        shape = log_weights.shape
        if len(shape) < 1:
            raise _wrong_rank("log_weights", "(..., m)", shape)
        if shape[-1] != y_shape[-2]:
            _check_size("log_weights", "(..., m)", "m", y_shape[-2], shape, -1)
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
        raise _wrong_rank("x", "(..., n, d)", shape)
    d = shape[-1]
    if len(means.shape) < 2:
        raise _wrong_rank("means", "(..., k, d)", means.shape)
    if len(log_counts.shape) < 1:
        raise _wrong_rank("log_counts", "(..., k)", log_counts.shape)
    if len(factors.shape) < 3:
        raise _wrong_rank("factors", "(..., k, d, r)", factors.shape)
    _check_size("means", "(..., k, d)", "d", d, means.shape, -1)
    k = means.shape[-2]
    _check_size("log_counts", "(..., k)", "k", k, log_counts.shape, -1)
    _check_size("factors", "(..., k, d, r)", "d", d, factors.shape, -2)
    _check_size("factors", "(..., k, d, r)", "k", k, factors.shape, -3)
    batches = [shape[:-2], log_counts.shape[:-1], means.shape[:-2], factors.shape[:-3]]
    if diagonal is not None:
        if len(diagonal.shape) < 2:
            raise _wrong_rank("diagonal", "(..., k, d)", diagonal.shape)
        _check_size("diagonal", "(..., k, d)", "d", d, diagonal.shape, -1)
        _check_size("diagonal", "(..., k, d)", "k", k, diagonal.shape, -2)
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


def common_floats(
    names: Sequence[str], arrays: Sequence[Array | None], n_halves: int = 0
) -> Sequence[Array | None]:
    """Return arrays in the type they are computed in: float64 if any is, else float32.

    The first is never None. The first `n_halves`, where they are of one 16-bit type
    that the backend takes, and are computed in float32, stay as they are.

    Raises
    ------
    TypeError
        If an array is not of real floating type.
    """
    library = library_of(arrays[0], names[0])
    floats = library.floats
    common: str | None = None
    is_ready = True
    for name, array in zip(names, arrays, strict=False):
        if array is None:
            continue
        known = floats.get(array.dtype)
        if known is None:
            known = _meet_dtype(name, array, floats)
        computed, as_is = known
        if common is None:
            common = computed
        elif computed != common:
            common = "float64"
            is_ready = False
        if not as_is:
            is_ready = False
    if is_ready:
        return arrays
    kept = 0
    if n_halves and common == "float32" and _is_half(arrays[:n_halves], library):
        kept = n_halves
    wide = [
        None if a is None else _as_dtype(library.xp, a, common) for a in arrays[kept:]
    ]
    return [*arrays[:kept], *wide]


def _is_half(arrays: Sequence[Array], library: Library) -> bool:
    """Return whether arrays are of one 16-bit type that their backend takes."""
    first = arrays[0]
    _, as_is = library.floats[first.dtype]
    return (
        not as_is
        and all(array.dtype == first.dtype for array in arrays[1:])
        and library.keeps_half(first)
    )


def as_type_of(array: Array, like: Array) -> Array:
    """Return an array in the data type of another one."""
    if array.dtype == like.dtype:
        return array
    return library_of(array).xp.astype(array, like.dtype)


def as_result_of(array: Array, x: Array) -> Array:
    """Return an array in the data type of what is computed from another one."""
    library = library_of(x)
    return _as_dtype(library.xp, array, library.floats[x.dtype][0])


def check_index(name: str, index: Array, n: int, m: int) -> Array:
    """Check which of m keys each of n rows is, -1 for none.

    Returns the index as 64-bit integers where the library has them.
    """
    library = library_of(index, name)
    if not library.xp.isdtype(index.dtype, "integral"):
        message = f"{name} must hold integers, got {_dtype_name(index.dtype)}"
        raise TypeError(message)
    if len(index.shape) != 1 or (
        index.shape[0] != n and not _is_unknown(index.shape[0], n)
    ):
        message = (
            f"{name} must have shape (n,) = ({n},), one key for each row, "
            f"got shape {tuple(index.shape)}"
        )
        raise ValueError(message)
    if library.is_eager(index):
        check_range(name, index, m, library)
    if library.has_int64:
        index = _as_dtype(library.xp, index, "int64")
    return index


def check_range(name: str, index: Array, m: int, library: Library) -> None:
    """Check that every index lies in [-1, m)."""
    if index.shape[0] == 0:
        return
    if library.name == "jax":
        # Inside a traced function JAX's own minimum would be a tracer.
        index = np.asarray(index)
        lowest, highest = int(index.min()), int(index.max())
    else:
        lowest, highest = int(library.xp.min(index)), int(library.xp.max(index))
    if lowest < -1 or highest >= m:
        wrong = lowest if lowest < -1 else highest
        message = (
            f"{name} must lie between -1 (none) and {m - 1} (the last of {m} keys), "
            f"got {wrong}"
        )
        raise ValueError(message)


def check_broadcast(
    names: Sequence[str], batches: Sequence[tuple[Any, ...]]
) -> tuple[Any, ...]:
    """Return the batch dimensions that several arguments broadcast to."""
    result: list[Any] = []
    for place, (name, batch) in enumerate(zip(names, batches, strict=True)):
        if len(batch) > len(result):
            result[:0] = batch[: len(batch) - len(result)]
        offset = len(result) - len(batch)
        for axis, size in enumerate(batch, start=offset):
            known = result[axis]
            if known == 1:
                result[axis] = size
            elif size != 1 and size != known and not _is_unknown(size, known):
                given = ", ".join(
                    f"{other} has {tuple(shape)}"
                    for other, shape in zip(
                        names[: place + 1], batches[: place + 1], strict=True
                    )
                )
                message = (
                    f"{name}: batch dimensions must be equal to those of the other "
                    f"arguments, or 1, got {given}"
                )
                raise ValueError(message)
    return tuple(result)


def check_shape(name: str, array: Array, expected: tuple[Any, ...]) -> None:
    """Check that an array has the shape of a function's result."""
    shape = tuple(array.shape)
    if len(shape) == len(expected) and all(
        a == b or _is_unknown(a, b) for a, b in zip(shape, expected, strict=True)
    ):
        return
    message = f"{name} must have the result's shape {expected}, got shape {shape}"
    raise ValueError(message)


def _meet_dtype(
    name: str, array: Array, floats: dict[Any, tuple[str, bool]]
) -> tuple[str, bool]:
    """Enter a data type that is seen for the first time."""
    dtype = array.dtype
    plain = _dtype_name(dtype)
    if plain not in ("float16", "bfloat16", "float32", "float64"):
        message = (
            f"{name} must be of real floating type (float16, bfloat16, float32 or "
            f"float64), got {plain}"
        )
        raise TypeError(message)
    computed = "float64" if plain == "float64" else "float32"
    # NumPy alone has types of foreign byte order.
    as_is = plain == computed and getattr(dtype, "isnative", True)
    floats[dtype] = (computed, as_is)
    return computed, as_is


def _dtype_name(dtype: Any) -> str:
    name: str = getattr(dtype, "name", None) or str(dtype)
    return name.rpartition(".")[2]


def _as_dtype(xp: Namespace, array: Array, name: str | None) -> Array:
    dtype = getattr(xp, str(name))
    return array if array.dtype == dtype else xp.astype(array, dtype)


def _is_unknown(*sizes: Any) -> bool:
    """Return whether a size is not known yet: None, or NaN as Dask has it."""
    return any(size is None or size != size for size in sizes)


def _wrong_rank(name: str, expected: str, shape: tuple[Any, ...]) -> ValueError:
    message = (
        f"{name} must have shape {expected}, got {len(shape)} dimension"
        f"{'' if len(shape) == 1 else 's'}: shape {tuple(shape)}"
    )
    return ValueError(message)


def _check_size(
    name: str,
    layout: str,
    letter: str,
    expected: Any,
    shape: tuple[Any, ...],
    axis: int,
) -> None:
    size = shape[axis]
    if size == expected or _is_unknown(size, expected):
        return
    message = (
        f"{name} must have shape {layout} with {letter} = {expected}, got "
        f"{letter} = {size}: shape {tuple(shape)}"
    )
    raise ValueError(message)
