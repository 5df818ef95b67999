"""The primitives of the scans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.interpreters import ad

from subquad._backends.jax.common import (
    Derivative,
    Kernel,
    Output,
    Plan,
    Shape,
    apply,
    differentiate,
    itemsize,
    join_lanes,
    listed,
    plain,
    spread,
)
from subquad._dispatch import Array
from subquad._reference import scans as reference

# ----------------------------------------------------------------------------- kernels


def _lanes(x: Any, axis: int) -> Shape:
    return (*x.shape[:axis], *x.shape[axis + 1 :])


def _plan(outputs: Sequence[Output | None], x: Any, axis: int, *flags: bool) -> Plan:
    sizes = (math.prod(_lanes(x, axis)), x.shape[axis], itemsize(x))
    return Plan(list(outputs), sizes, (axis, *map(int, flags)))


def _gradients(needs: Sequence[bool], inputs: Sequence[Any]) -> list[Output | None]:
    return [
        plain(array.shape, array.dtype) if needed else None
        for needed, array in zip(needs, inputs, strict=True)
    ]


def _plan_sum(
    x: Any,
    log_sum: Any,
    remainder: Any,
    segments: Any,
    *,
    axis: int,
    reverse: bool,
    exclusive: bool,
    with_state: bool,
) -> Plan:
    del log_sum, remainder, segments
    final = plain(_lanes(x, axis), x.dtype) if with_state else None
    outputs = [plain(x.shape, x.dtype), final, final]
    return _plan(outputs, x, axis, reverse, exclusive)


def _plan_sum_vjp(
    x: Any,
    log_sum: Any,
    *rest: Any,
    axis: int,
    reverse: bool,
    exclusive: bool,
    needs: Sequence[bool],
) -> Plan:
    del rest
    outputs = _gradients(needs, (x, log_sum))
    return _plan(outputs, x, axis, reverse, exclusive)


def _sum_vjp_by_reference(
    x: Array,
    log_sum: Array | None,
    remainder: Array | None,
    segments: Array | None,
    grad: Array | None,
    grad_final: Array | None,
    **parameters: Any,
) -> tuple[Array | None, Array | None]:
    return reference.logcumsumexp_vjp(
        x,
        log_sum,
        remainder,
        segments,
        grad=grad,
        grad_final=grad_final,
        **parameters,
    )


def _plan_signed(
    x: Any, sign: Any, *, axis: int, reverse: bool, exclusive: bool
) -> Plan:
    outputs = _gradients((True, True), (x, sign))
    return _plan(outputs, x, axis, reverse, exclusive)


def _plan_signed_vjp(
    x: Any,
    sign: Any,
    grad: Any,
    *,
    axis: int,
    reverse: bool,
    exclusive: bool,
    needs: Sequence[bool],
) -> Plan:
    del grad
    return _plan(_gradients(needs, (x, sign)), x, axis, reverse, exclusive)


def _signed_vjp_by_reference(
    x: Array, sign: Array, grad: Array, **parameters: Any
) -> tuple[Array | None, Array | None]:
    return reference.signed_logcumsumexp_vjp(x, sign, grad=grad, **parameters)


def _plan_recurrence(
    log_a: Any, log_b: Any, state: Any, segments: Any, *, axis: int, reverse: bool
) -> Plan:
    del log_b, state, segments
    return _plan([plain(log_a.shape, log_a.dtype)], log_a, axis, reverse)


def _plan_recurrence_vjp(
    log_a: Any,
    log_b: Any,
    state: Any,
    segments: Any,
    grad: Any,
    *,
    axis: int,
    reverse: bool,
    needs: Sequence[bool],
) -> Plan:
    del segments, grad
    return _plan(_gradients(needs, (log_a, log_b, state)), log_a, axis, reverse)


def _recurrence_vjp_by_reference(
    log_a: Array,
    log_b: Array,
    state: Array | None,
    segments: Array | None,
    grad: Array,
    **parameters: Any,
) -> tuple[Array | None, ...]:
    return reference.log_linear_recurrence_vjp(
        log_a, log_b, state, segments, grad=grad, **parameters
    )


_SUM = Kernel("logcumsumexp", _plan_sum, listed(reference.logcumsumexp), "fffi")
_SUM_VJP = Kernel(
    "logcumsumexp_vjp", _plan_sum_vjp, listed(_sum_vjp_by_reference), "fffiff"
)
_SIGNED = Kernel(
    "signed_logcumsumexp", _plan_signed, listed(reference.signed_logcumsumexp), "ff"
)
_SIGNED_VJP = Kernel(
    "signed_logcumsumexp_vjp",
    _plan_signed_vjp,
    listed(_signed_vjp_by_reference),
    "fff",
)
_RECURRENCE = Kernel(
    "log_linear_recurrence",
    _plan_recurrence,
    listed(reference.log_linear_recurrence),
    "fffi",
)
_RECURRENCE_VJP = Kernel(
    "log_linear_recurrence_vjp",
    _plan_recurrence_vjp,
    listed(_recurrence_vjp_by_reference),
    "fffif",
)

for _kernel in (_SUM, _SUM_VJP, _SIGNED, _SIGNED_VJP, _RECURRENCE, _RECURRENCE_VJP):
    join_lanes(_kernel)


# ------------------------------------------------------------------------- derivatives


def _with_gradients(
    inputs: Sequence[Any], kept: Sequence[Any], grads: Sequence[Any]
) -> Sequence[Any]:
    del kept
    return (*inputs, *grads)


def _sum_directions(tangents: Sequence[Any]) -> Sequence[Any]:
    """Return the tangents of x and of the state: of its parts together."""
    x, log_sum, remainder, _ = tangents
    if remainder is not None:
        log_sum = ad.add_tangents(log_sum, remainder)
    return x, log_sum


def _sum_tangents(
    inputs: Sequence[Any],
    kept: Sequence[Any],
    tangents: Sequence[Any],
    *,
    axis: int,
    reverse: bool,
    exclusive: bool,
    with_state: bool,
) -> list[Array]:
    del kept
    x, log_sum, remainder, segments = inputs
    tangent, final = reference.logcumsumexp_jvp(
        x, log_sum, remainder, segments, axis, reverse, exclusive, *tangents
    )
    return [tangent, final] if with_state else [tangent]


def _signed_tangents(
    inputs: Sequence[Any],
    kept: Sequence[Any],
    tangents: Sequence[Any],
    *,
    axis: int,
    reverse: bool,
    exclusive: bool,
) -> list[Array]:
    del kept
    x, sign = inputs
    jvp = reference.signed_logcumsumexp_jvp
    return [jvp(x, sign, axis, reverse, exclusive, *tangents)]


def _recurrence_tangents(
    inputs: Sequence[Any],
    kept: Sequence[Any],
    tangents: Sequence[Any],
    *,
    axis: int,
    reverse: bool,
) -> list[Array]:
    del kept
    log_a, log_b, state, segments = inputs
    jvp = reference.log_linear_recurrence_jvp
    return [jvp(log_a, log_b, state, segments, axis, reverse, *tangents)]


differentiate(
    _SUM,
    Derivative(
        _SUM_VJP,
        moves=(0, 1),
        results=(0, 1),
        kept=(),
        arguments=_with_gradients,
        tangents=_sum_tangents,
        parameters=("axis", "reverse", "exclusive"),
        directions=_sum_directions,
    ),
)
differentiate(
    _SIGNED,
    Derivative(
        _SIGNED_VJP,
        moves=(0, 1),
        results=(0,),
        kept=(),
        arguments=_with_gradients,
        tangents=_signed_tangents,
        parameters=("axis", "reverse", "exclusive"),
    ),
)
differentiate(
    _RECURRENCE,
    Derivative(
        _RECURRENCE_VJP,
        moves=(0, 1, 2),
        results=(0,),
        kept=(),
        arguments=_with_gradients,
        tangents=_recurrence_tangents,
        parameters=("axis", "reverse"),
    ),
)


# ------------------------------------------------------------- the backend's functions


def logcumsumexp(
    x: Array,
    log_sum: Array | None,
    remainder: Array | None,
    segments: Array | None,
    axis: int,
    reverse: bool,
    exclusive: bool,
    with_state: bool,
) -> tuple[Array, Array | None, Array | None]:
    found = apply(
        _SUM,
        (x, log_sum, remainder, segments),
        axis=axis,
        reverse=reverse,
        exclusive=exclusive,
        with_state=with_state,
    )
    out, final, rest = spread(found, (True, with_state, with_state))
    return out, final, rest


def logcumsumexp_vjp(
    x: Array,
    log_sum: Array | None,
    remainder: Array | None,
    segments: Array | None,
    axis: int,
    reverse: bool,
    exclusive: bool,
    grad: Array | None,
    grad_final: Array | None,
    needs: tuple[bool, bool],
) -> tuple[Array | None, Array | None]:
    needs = (needs[0], needs[1] and log_sum is not None)
    found = apply(
        _SUM_VJP,
        (x, log_sum, remainder, segments, grad, grad_final),
        axis=axis,
        reverse=reverse,
        exclusive=exclusive,
        needs=needs,
    )
    gx, g_sum = spread(found, needs)
    return gx, g_sum


def signed_logcumsumexp(
    x: Array, sign: Array, axis: int, reverse: bool, exclusive: bool
) -> tuple[Array, Array]:
    out, out_sign = apply(
        _SIGNED, (x, sign), axis=axis, reverse=reverse, exclusive=exclusive
    )
    return out, out_sign


def signed_logcumsumexp_vjp(
    x: Array,
    sign: Array,
    axis: int,
    reverse: bool,
    exclusive: bool,
    grad: Array,
    needs: tuple[bool, bool],
) -> tuple[Array | None, Array | None]:
    found = apply(
        _SIGNED_VJP,
        (x, sign, grad),
        axis=axis,
        reverse=reverse,
        exclusive=exclusive,
        needs=tuple(needs),
    )
    gx, g_sign = spread(found, needs)
    return gx, g_sign


def log_linear_recurrence(
    log_a: Array,
    log_b: Array,
    state: Array | None,
    segments: Array | None,
    axis: int,
    reverse: bool,
) -> Array:
    arrays = (log_a, log_b, state, segments)
    return apply(_RECURRENCE, arrays, axis=axis, reverse=reverse)[0]


def log_linear_recurrence_vjp(
    log_a: Array,
    log_b: Array,
    state: Array | None,
    segments: Array | None,
    axis: int,
    reverse: bool,
    grad: Array,
    needs: tuple[bool, bool, bool],
) -> tuple[Array | None, Array | None, Array | None]:
    needs = (*needs[:2], needs[2] and state is not None)
    arrays = (log_a, log_b, state, segments, grad)
    found = apply(_RECURRENCE_VJP, arrays, axis=axis, reverse=reverse, needs=needs)
    ga, gb, g_state = spread(found, needs)
    return ga, gb, g_state
