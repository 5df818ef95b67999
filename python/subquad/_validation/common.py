"""What the arguments of all public functions are checked for."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from subquad._dispatch import Array, Library, Namespace, library_of


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
        None if a is None else as_dtype(library.xp, a, common) for a in arrays[kept:]
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
    return as_dtype(library.xp, array, library.floats[x.dtype][0])


def check_index(name: str, index: Array, n: int, m: int) -> Array:
    """Check which of m keys each of n rows is, -1 for none.

    Returns the index as 64-bit integers where the library has them.
    """
    check_integers(name, index)
    library = library_of(index, name)
    if len(index.shape) != 1 or (
        index.shape[0] != n and not is_unknown(index.shape[0], n)
    ):
        message = (
            f"{name} must have shape (n,) = ({n},), one key for each row, "
            f"got shape {tuple(index.shape)}"
        )
        raise ValueError(message)
    if library.is_eager(index):
        check_range(name, index, m, library)
    return as_int64(index, library)


def check_integers(name: str, array: Array) -> None:
    """Check that an array holds integers."""
    if not library_of(array, name).xp.isdtype(array.dtype, "integral"):
        message = f"{name} must hold integers, got {dtype_name(array.dtype)}"
        raise TypeError(message)


def as_int64(array: Array, library: Library) -> Array:
    """Return integers of 64 bits, where the library has them."""
    return as_dtype(library.xp, array, "int64") if library.has_int64 else array


def check_segments(segment_ids: Array | None, n: int) -> Array | None:
    """Check the sequences' numbers of n entries; return 64-bit integers or None."""
    if segment_ids is None:
        return None
    check_integers("segment_ids", segment_ids)
    shape = tuple(segment_ids.shape)
    if len(shape) != 1 or (shape[0] != n and not is_unknown(shape[0], n)):
        message = (
            f"segment_ids must have shape (n,) = ({n},), the number of each entry's "
            f"sequence, got shape {shape}"
        )
        raise ValueError(message)
    return as_int64(segment_ids, library_of(segment_ids))


def check_flag(name: str, value: object) -> bool:
    """Check an option that is true or false."""
    if not isinstance(value, (bool, np.bool_)):
        message = f"{name} must be True or False, got {value!r}"
        raise TypeError(message)
    return bool(value)


def check_axis(axis: Any, ndim: int) -> int:
    """Return an axis as a number from 0 on.

    Raises
    ------
    numpy.exceptions.AxisError
        If there is no such axis: a ValueError and IndexError.
    """
    try:
        axis = operator.index(axis)
    except TypeError:
        message = f"axis must be an integer, got {axis!r}"
        raise TypeError(message) from None
    if not -ndim <= axis < ndim:
        raise np.exceptions.AxisError(axis, ndim)
    return int(axis % ndim)


def check_signs(name: str, sign: Array, like: Array) -> Array:
    """Return signs or weights in the floating type of another array."""
    library = library_of(sign, name)
    if library.xp.isdtype(sign.dtype, "integral"):
        return library.xp.astype(sign, like.dtype)
    (sign,) = common_floats((name,), (sign,))
    return as_type_of(sign, like)


def broadcast_to(name: str, array: Array, shape: tuple[Any, ...], layout: str) -> Array:
    """Return an array stretched to a shape, whose layout an error tells."""
    given = tuple(array.shape)
    if given == shape:
        return array
    padded = (1,) * (len(shape) - len(given)) + given
    if len(padded) != len(shape) or any(
        a not in (1, b) and not is_unknown(a, b)
        for a, b in zip(padded, shape, strict=True)
    ):
        message = (
            f"{name} must have shape {layout} = {shape}, or one that is broadcast to "
            f"it, got shape {given}"
        )
        raise ValueError(message)
    return library_of(array).xp.broadcast_to(array, shape)


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
            elif size != 1 and size != known and not is_unknown(size, known):
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


def check_shape(
    name: str,
    array: Array,
    expected: tuple[Any, ...],
    layout: str = "the result's shape",
) -> None:
    """Check that an array has a shape, that of a function's result as a rule."""
    shape = tuple(array.shape)
    if len(shape) == len(expected) and all(
        a == b or is_unknown(a, b) for a, b in zip(shape, expected, strict=True)
    ):
        return
    message = f"{name} must have {layout} {expected}, got shape {shape}"
    raise ValueError(message)


def _meet_dtype(
    name: str, array: Array, floats: dict[Any, tuple[str, bool]]
) -> tuple[str, bool]:
    """Enter a data type that is seen for the first time."""
    dtype = array.dtype
    plain = dtype_name(dtype)
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


def dtype_name(dtype: Any) -> str:
    name: str = getattr(dtype, "name", None) or str(dtype)
    return name.rpartition(".")[2]


def as_dtype(xp: Namespace, array: Array, name: str | None) -> Array:
    dtype = getattr(xp, str(name))
    return array if array.dtype == dtype else xp.astype(array, dtype)


def is_unknown(*sizes: Any) -> bool:
    """Return whether a size is not known yet: None, or NaN as Dask has it."""
    return any(size is None or size != size for size in sizes)


def wrong_rank(name: str, expected: str, shape: tuple[Any, ...]) -> ValueError:
    message = (
        f"{name} must have shape {expected}, got {len(shape)} dimension"
        f"{'' if len(shape) == 1 else 's'}: shape {tuple(shape)}"
    )
    return ValueError(message)


def check_size(
    name: str,
    layout: str,
    letter: str,
    expected: Any,
    shape: tuple[Any, ...],
    axis: int,
) -> None:
    size = shape[axis]
    if size == expected or is_unknown(size, expected):
        return
    message = (
        f"{name} must have shape {layout} with {letter} = {expected}, got "
        f"{letter} = {size}: shape {tuple(shape)}"
    )
    raise ValueError(message)
