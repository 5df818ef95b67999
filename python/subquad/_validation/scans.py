"""What the scans ask of their arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

from subquad._dispatch import Array, Backend, backend_for, library_of, not_an_array
from subquad._validation.common import (
    broadcast_to,
    check_axis,
    check_flag,
    check_segments,
    check_signs,
    common_floats,
    is_unknown,
)


class ScanArguments(NamedTuple):
    """Arguments of `logcumsumexp` as its primitive takes them."""

    backend: Backend
    x: Array
    log_sum: Array | None
    remainder: Array | None
    segments: Array | None
    axis: int


class RecurrenceArguments(NamedTuple):
    """Arguments of `log_linear_recurrence` as its primitive takes them."""

    backend: Backend
    log_a: Array
    log_b: Array
    state: Array | None
    segments: Array | None
    axis: int


def logcumsumexp_arguments(
    x: Array,
    axis: int,
    reverse: bool,
    exclusive: bool,
    state: tuple[Array | None, Array | None],
    segment_ids: Array | None,
) -> ScanArguments:
    """Return backend and arguments for `logcumsumexp`; a number comes as one entry."""
    if x is None:
        raise not_an_array("x", None)
    check_flag("reverse", reverse)
    check_flag("exclusive", exclusive)
    log_sum, remainder = state
    backend = backend_for(
        x=x, state=log_sum, remainder=remainder, segment_ids=segment_ids
    )
    x, log_sum, remainder = common_floats(
        ("x", "state", "state"), (x, log_sum, remainder)
    )
    # A number is its own sum.
    axis = check_axis(axis, max(len(x.shape), 1))
    if len(x.shape) == 0:
        x = library_of(x).xp.reshape(x, (1,))
    shape = tuple(x.shape)
    lanes = shape[:axis] + shape[axis + 1 :]
    if log_sum is not None:
        log_sum = broadcast_to("state", log_sum, lanes, _LANES)
    if remainder is not None:
        remainder = broadcast_to("state", remainder, lanes, _LANES)
    segments = check_segments(segment_ids, shape[axis])
    return ScanArguments(backend, x, log_sum, remainder, segments, axis)


def signed_logcumsumexp_arguments(
    x: Array, sign: Array, axis: int, reverse: bool, exclusive: bool
) -> tuple[Backend, Array, Array, int]:
    """Return backend, x, sign and axis for `signed_logcumsumexp`."""
    if x is None or sign is None:
        raise not_an_array("x" if x is None else "sign", None)
    check_flag("reverse", reverse)
    check_flag("exclusive", exclusive)
    backend = backend_for(x=x, sign=sign)
    (x,) = common_floats(("x",), (x,))
    sign = check_signs("sign", sign, x)
    axis = check_axis(axis, max(len(x.shape), 1))
    sign = broadcast_to("sign", sign, tuple(x.shape), "of x")
    if len(x.shape) == 0:
        xp = library_of(x).xp
        x, sign = xp.reshape(x, (1,)), xp.reshape(sign, (1,))
    return backend, x, sign, axis


def log_linear_recurrence_arguments(
    log_a: Array,
    log_b: Array,
    axis: int,
    state: Array | None,
    reverse: bool,
    segment_ids: Array | None,
) -> RecurrenceArguments:
    """Return backend and arguments for `log_linear_recurrence`."""
    if log_a is None or log_b is None:
        raise not_an_array("log_a" if log_a is None else "log_b", None)
    check_flag("reverse", reverse)
    backend = backend_for(
        log_a=log_a, log_b=log_b, state=state, segment_ids=segment_ids
    )
    log_a, log_b, state = common_floats(
        ("log_a", "log_b", "state"), (log_a, log_b, state)
    )
    shape = _together(log_a, log_b)
    log_a = broadcast_to("log_a", log_a, shape, "of the recurrence")
    log_b = broadcast_to("log_b", log_b, shape, "of the recurrence")
    axis = check_axis(axis, len(shape))
    if state is not None:
        state = broadcast_to("state", state, shape[:axis] + shape[axis + 1 :], _LANES)
    segments = check_segments(segment_ids, shape[axis])
    return RecurrenceArguments(backend, log_a, log_b, state, segments, axis)


_LANES = "of the entries without the axis"


def _together(log_a: Array, log_b: Array) -> tuple[Any, ...]:
    """Return the shape that factors and terms broadcast to."""
    a, b = tuple(log_a.shape), tuple(log_b.shape)
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
    shape = []
    for one, other in pairs:
        if one != other and 1 not in (one, other) and not is_unknown(one, other):
            message = (
                "log_a and log_b must have equal shapes, or ones that broadcast, got "
                f"shapes {a} and {b}"
            )
            raise ValueError(message)
        shape.append(other if one == 1 else one)
    return tuple(shape)
