"""The scans for tensors of the CPU and of CUDA.

Of each there are three operators: itself, its reverse, and its forward derivative.
Derivatives of any order are made of these three. With J c the derivative along c, and
V g the gradient of g, that of <g, J c> is a product and one more V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from subquad._backends.torch.memory import (
    Optional,
    is_compiling_transforms,
    is_direct,
    kernels_for,
)
from subquad._backends.torch.operators import (
    define,
    filled,
    gradient_shapes,
    mapped_lanes,
    minus,
    only,
    plus,
    saved,
    times,
)
from subquad._dispatch import Array
from subquad._reference import scans as reference

# ------------------------------------------------------------------------- primitives


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
    run = (x, log_sum, remainder, segments, axis, reverse, exclusive)
    if is_compiling_transforms():
        return reference.logcumsumexp(*run, with_state)
    if is_direct(x, log_sum, remainder, segments):
        out, final, rest = kernels_for(x).logcumsumexp(*run, with_state)
    else:
        out, final, rest = _logcumsumexp(*run, with_state)
    return (out, final, rest) if with_state else (out, None, None)


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
    arrays = (x, log_sum, remainder, segments)
    run = (*arrays, axis, reverse, exclusive)
    needs = (needs[0], needs[1] and log_sum is not None)
    if is_compiling_transforms():
        return reference.logcumsumexp_vjp(*run, grad, grad_final, needs)
    if is_direct(*arrays, grad, grad_final):
        found = kernels_for(x).logcumsumexp_vjp(*run, grad, grad_final, needs)
    else:
        found = _logcumsumexp_vjp(*run, grad, grad_final, list(needs))
    gx, gs = only(needs, found)
    return gx, gs


def signed_logcumsumexp(
    x: Array, sign: Array, axis: int, reverse: bool, exclusive: bool
) -> tuple[Array, Array]:
    run = (x, sign, axis, reverse, exclusive)
    if is_compiling_transforms():
        return reference.signed_logcumsumexp(*run)
    if is_direct(x, sign):
        log_abs, out_sign = kernels_for(x).signed_logcumsumexp(*run)
    else:
        log_abs, out_sign = _signed_logcumsumexp(*run)
    return log_abs, out_sign


def signed_logcumsumexp_vjp(
    x: Array,
    sign: Array,
    axis: int,
    reverse: bool,
    exclusive: bool,
    grad: Array,
    needs: tuple[bool, bool],
) -> tuple[Array | None, Array | None]:
    run = (x, sign, axis, reverse, exclusive)
    if is_compiling_transforms():
        return reference.signed_logcumsumexp_vjp(*run, grad, needs)
    if is_direct(x, sign, grad):
        found = kernels_for(x).signed_logcumsumexp_vjp(*run, grad, needs)
    else:
        found = _signed_logcumsumexp_vjp(*run, grad, list(needs))
    gx, gsign = only(needs, found)
    return gx, gsign


def log_linear_recurrence(
    log_a: Array,
    log_b: Array,
    state: Array | None,
    segments: Array | None,
    axis: int,
    reverse: bool,
) -> Array:
    run = (log_a, log_b, state, segments, axis, reverse)
    if is_compiling_transforms():
        return reference.log_linear_recurrence(*run)
    if is_direct(log_a, log_b, state, segments):
        return kernels_for(log_a).log_linear_recurrence(*run)
    return _log_linear_recurrence(*run)


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
    arrays = (log_a, log_b, state, segments)
    run = (*arrays, axis, reverse)
    needs = (*needs[:2], needs[2] and state is not None)
    if is_compiling_transforms():
        return reference.log_linear_recurrence_vjp(*run, grad, needs)
    if is_direct(*arrays, grad):
        found = kernels_for(log_a).log_linear_recurrence_vjp(*run, grad, needs)
    else:
        found = _log_linear_recurrence_vjp(*run, grad, list(needs))
    ga, gb, gs = only(needs, found)
    return ga, gb, gs


# ------------------------------------------------------------- what the operators share


def _kernel(name: str) -> Callable[..., Any]:
    """Return what computes an operator: empty tensors in the place of None."""

    def compute(*arguments: Any) -> Any:
        x = arguments[0]
        found = getattr(kernels_for(x), name)(*arguments)
        return filled(x, found) if isinstance(found, tuple) else found

    return compute


def _tangent(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what computes a forward derivative, for which there is no kernel."""

    def compute(*arguments: Any) -> Any:
        found = function(*arguments)
        if not isinstance(found, tuple):
            return found.contiguous()
        return tuple(array.contiguous() for array in found)

    return compute


def _lanes(x: torch.Tensor, axis: int) -> torch.Tensor:
    shape = tuple(x.shape)
    return x.new_empty(shape[:axis] + shape[axis + 1 :])


def _nothing(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((0,))


def _or_zeros(tangent: Optional, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


def _known(*arrays: Optional) -> bool:
    return any(array is not None for array in arrays)


# ----------------------------------------------------------------------- logcumsumexp
#
# z = (x, state), t = J c: the gradient of <g, J c> in z is c V g - V(g t), and the
# derivative of J c along u is J(c u) - J c J u.

_RUN = (
    "Tensor x, Tensor? log_sum, Tensor? remainder, Tensor? segments, int axis, "
    "bool reverse, bool exclusive"
)
_RUN_LENGTH = 7
_primitive_vjp: Callable[..., Any] = logcumsumexp_vjp


def _v(run: Sequence[Any], g: Optional, g_final: Optional) -> tuple[Optional, Optional]:
    if not _known(g, g_final):
        return None, None
    needs = (True, run[1] is not None)
    gx, gs = _primitive_vjp(*run, g, g_final, needs)
    return gx, gs


def _j(run: Sequence[Any], cx: Optional, cs: Optional) -> tuple[Optional, Optional]:
    if not _known(cx, cs):
        return None, None
    out, final = _logcumsumexp_jvp(*run, cx, cs)
    return out, final


def _change(
    run: Sequence[Any], g: Optional, g_final: Optional, cx: Optional, cs: Optional
) -> tuple[Optional, Optional, Optional, Optional]:
    """Return the gradient of <g, J c> in x and the state, and J c."""
    t, t_final = _j(run, cx, cs)
    gx, gs = _v(run, g, g_final)
    less_x, less_s = _v(run, times(g, t), times(g_final, t_final))
    return (
        minus(times(cx, gx), less_x),
        minus(times(cs, gs), less_s),
        t,
        t_final,
    )


def _of_state(run: Sequence[Any], gs: Optional) -> tuple[Optional, Optional]:
    """Return the gradients of a state's two parts, which are alike."""
    return (
        None if run[1] is None else gs,
        None if run[2] is None else gs,
    )


def _shape(*arguments: Any) -> tuple[torch.Tensor, ...]:
    x, axis, with_state = arguments[0], arguments[4], arguments[7]
    out = x.new_empty(tuple(x.shape))
    if not with_state:
        return out, _nothing(x), _nothing(x)
    return out, _lanes(x, axis), _lanes(x, axis)


def _backward(
    ctx: Any, g: Optional, g_final: Optional, g_rest: Optional
) -> tuple[Any, ...]:
    # What was rounded off the logarithm is not what a derivative is taken in.
    del g_rest
    (*run, with_state), _ = saved(ctx)
    gx, gs = None, None
    g_final = g_final if with_state else None
    if _known(g, g_final):
        needs = ctx.needs_input_grad
        gx, gs = _primitive_vjp(*run, g, g_final, (needs[0], needs[1] or needs[2]))
    return (gx, *_of_state(run, gs), None, None, None, None, None)


def _forward(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
    (*run, with_state), _ = saved(ctx)
    t, t_final = _j(run, tangents[0], plus(tangents[1], tangents[2]))
    return t, t_final if with_state else None, None


def _shape_vjp(*arguments: Any) -> tuple[torch.Tensor, ...]:
    x, log_sum, *_, needs = arguments
    return gradient_shapes((x, log_sum), needs)


def _backward_vjp(ctx: Any, cx: Optional, cs: Optional) -> tuple[Any, ...]:
    (*run, g, g_final, _), _ = saved(ctx)
    hx, hs, t, t_final = _change(run, g, g_final, cx, cs)
    return (
        hx,
        *_of_state(run, hs),
        *(None,) * 4,
        None if g is None else t,
        None if g_final is None else t_final,
        None,
    )


def _forward_vjp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
    (*run, g, g_final, needs), _ = saved(ctx)
    tx, ts = tangents[0], plus(tangents[1], tangents[2])
    hx, hs, _, _ = _change(run, g, g_final, tx, ts)
    gx, gs = _v(run, *tangents[_RUN_LENGTH : _RUN_LENGTH + 2])
    return _asked(needs, (plus(hx, gx), plus(hs, gs)), (run[0], run[1]))


def _asked(
    needs: Sequence[bool], tangents: Sequence[Optional], like: Sequence[Any]
) -> tuple[Optional, ...]:
    """Return the tangents of the gradients that were asked for."""
    return tuple(
        _or_zeros(tangent, array) if needed else None
        for needed, tangent, array in zip(needs, tangents, like, strict=True)
    )


def _shape_jvp(*arguments: Any) -> tuple[torch.Tensor, ...]:
    x, axis = arguments[0], arguments[4]
    return x.new_empty(tuple(x.shape)), _lanes(x, axis)


def _backward_jvp(ctx: Any, g: Optional, g_final: Optional) -> tuple[Any, ...]:
    (*run, cx, cs), _ = saved(ctx)
    hx, hs, _, _ = _change(run, g, g_final, cx, cs)
    gx, gs = _v(run, g, g_final)
    return (
        hx,
        *_of_state(run, hs),
        *(None,) * 4,
        None if cx is None else gx,
        None if cs is None else gs,
    )


def _forward_jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
    (*run, cx, cs), _ = saved(ctx)
    tx, ts = tangents[0], plus(tangents[1], tangents[2])
    more = _j(
        run,
        plus(tangents[_RUN_LENGTH], times(cx, tx)),
        plus(tangents[_RUN_LENGTH + 1], times(cs, ts)),
    )
    less = map(times, _j(run, cx, cs), _j(run, tx, ts))
    return tuple(map(minus, more, less))


_logcumsumexp = define(
    f"logcumsumexp({_RUN}, bool with_state) -> (Tensor, Tensor, Tensor)",
    _kernel("logcumsumexp"),
    _shape,
    _backward,
    lambda call: mapped_lanes(call, 4, 3),
    jvp=_forward,
    constants=(2,),
)
_logcumsumexp_vjp = define(
    f"logcumsumexp_vjp({_RUN}, Tensor? grad, Tensor? grad_final, bool[] needs) "
    "-> (Tensor, Tensor)",
    _kernel("logcumsumexp_vjp"),
    _shape_vjp,
    _backward_vjp,
    lambda call: mapped_lanes(call, 4, 3),
    jvp=_forward_vjp,
)
_logcumsumexp_jvp = define(
    f"logcumsumexp_jvp({_RUN}, Tensor? tangent_x, Tensor? tangent_log_sum) "
    "-> (Tensor, Tensor)",
    _tangent(reference.logcumsumexp_jvp),
    _shape_jvp,
    _backward_jvp,
    lambda call: mapped_lanes(call, 4, 3),
    jvp=_forward_jvp,
)

# ---------------------------------------------------------------- signed_logcumsumexp
#
# With G the gradient of g in the weights w, and t = J c: the gradient of <g, J c> is
# G (w cx + cw) - V(g t) in x and G cx - V(g t) in w.

_SIGNED = "Tensor x, Tensor sign, int axis, bool reverse, bool exclusive"
_SIGNED_LENGTH = 5
_signed_primitive_vjp: Callable[..., Any] = signed_logcumsumexp_vjp


def _signed_v(run: Sequence[Any], g: Optional) -> tuple[Optional, Optional]:
    if g is None:
        return None, None
    gx, gsign = _signed_primitive_vjp(*run, g, (True, True))
    return gx, gsign


def _signed_j(run: Sequence[Any], cx: Optional, cw: Optional) -> Optional:
    if not _known(cx, cw):
        return None
    tangent: torch.Tensor = _signed_logcumsumexp_jvp(*run, cx, cw)
    return tangent


def _signed_change(
    run: Sequence[Any], g: Optional, cx: Optional, cw: Optional
) -> tuple[Optional, Optional, Optional]:
    """Return the gradient of <g, J c> in x and the weights, and J c."""
    t = _signed_j(run, cx, cw)
    _, gw = _signed_v(run, g)
    less_x, less_w = _signed_v(run, times(g, t))
    return (
        minus(times(gw, plus(times(run[1], cx), cw)), less_x),
        minus(times(gw, cx), less_w),
        t,
    )


def _signed_shape(*arguments: Any) -> tuple[torch.Tensor, ...]:
    x = arguments[0]
    return x.new_empty(tuple(x.shape)), x.new_empty(tuple(x.shape))


def _signed_backward(ctx: Any, g: Optional, g_sign: Optional) -> tuple[Any, ...]:
    del g_sign
    run, _ = saved(ctx)
    gx, gsign = None, None
    if g is not None:
        gx, gsign = _signed_primitive_vjp(*run, g, ctx.needs_input_grad[:2])
    return gx, gsign, None, None, None


def _signed_forward(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
    run, _ = saved(ctx)
    return _signed_j(run, *tangents[:2]), None


def _signed_shape_vjp(*arguments: Any) -> tuple[torch.Tensor, ...]:
    x, sign, *_, needs = arguments
    return gradient_shapes((x, sign), needs)


def _signed_backward_vjp(ctx: Any, cx: Optional, cw: Optional) -> tuple[Any, ...]:
    (*run, g, _), _ = saved(ctx)
    hx, hw, t = _signed_change(run, g, cx, cw)
    return hx, hw, None, None, None, t, None


def _signed_forward_vjp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
    (*run, g, needs), _ = saved(ctx)
    hx, hw, _ = _signed_change(run, g, *tangents[:2])
    gx, gw = _signed_v(run, tangents[_SIGNED_LENGTH])
    return _asked(needs, (plus(hx, gx), plus(hw, gw)), run[:2])


def _signed_shape_jvp(*arguments: Any) -> torch.Tensor:
    x: torch.Tensor = arguments[0]
    return x.new_empty(tuple(x.shape))


def _signed_backward_jvp(ctx: Any, g: Optional) -> tuple[Any, ...]:
    (*run, cx, cw), _ = saved(ctx)
    hx, hw, _ = _signed_change(run, g, cx, cw)
    gx, gw = _signed_v(run, g)
    gradients = (None if cx is None else gx, None if cw is None else gw)
    return hx, hw, None, None, None, *gradients


def _signed_forward_jvp(ctx: Any, *tangents: Any) -> Optional:
    (*run, cx, cw), _ = saved(ctx)
    tx, tw = tangents[:2]
    dx, dw = tangents[_SIGNED_LENGTH : _SIGNED_LENGTH + 2]
    more = _signed_j(
        run,
        plus(dx, times(cx, tx)),
        plus(dw, plus(times(tx, cw), times(tw, cx))),
    )
    less = times(_signed_j(run, cx, cw), _signed_j(run, tx, tw))
    return minus(more, less)


_signed_logcumsumexp = define(
    f"signed_logcumsumexp({_SIGNED}) -> (Tensor, Tensor)",
    _kernel("signed_logcumsumexp"),
    _signed_shape,
    _signed_backward,
    lambda call: mapped_lanes(call, 2, None),
    jvp=_signed_forward,
    constants=(1,),
)
_signed_logcumsumexp_vjp = define(
    f"signed_logcumsumexp_vjp({_SIGNED}, Tensor grad, bool[] needs) "
    "-> (Tensor, Tensor)",
    _kernel("signed_logcumsumexp_vjp"),
    _signed_shape_vjp,
    _signed_backward_vjp,
    lambda call: mapped_lanes(call, 2, None),
    jvp=_signed_forward_vjp,
)
_signed_logcumsumexp_jvp = define(
    f"signed_logcumsumexp_jvp({_SIGNED}, Tensor? tangent_x, Tensor? tangent_sign) "
    "-> Tensor",
    _tangent(reference.signed_logcumsumexp_jvp),
    _signed_shape_jvp,
    _signed_backward_jvp,
    lambda call: mapped_lanes(call, 2, None),
    jvp=_signed_forward_jvp,
)

# -------------------------------------------------------------- log_linear_recurrence
#
# With (ga, gb) = V g, T = J c and T' the one before it: <g, J c> changes through the
# shares by ga (ca + T') = A and gb cb = B, which are gradients in a and b themselves,
# and through log h by A' - A - B, with A' the one after: V of that is the rest.

_RECURRENCE = (
    "Tensor log_a, Tensor log_b, Tensor? state, Tensor? segments, int axis, "
    "bool reverse"
)
_RECURRENCE_LENGTH = 6
_recurrence_primitive_vjp: Callable[..., Any] = log_linear_recurrence_vjp


def _recurrence_v(
    run: Sequence[Any], g: Optional
) -> tuple[Optional, Optional, Optional]:
    if g is None:
        return None, None, None
    needs = (True, True, run[2] is not None)
    ga, gb, gs = _recurrence_primitive_vjp(*run, g, needs)
    return ga, gb, gs


def _recurrence_j(
    run: Sequence[Any], ca: Optional, cb: Optional, cs: Optional
) -> Optional:
    if not _known(ca, cb, cs):
        return None
    tangent: torch.Tensor = _log_linear_recurrence_jvp(*run, ca, cb, cs)
    return tangent


def _before(run: Sequence[Any], values: Optional, start: Optional) -> Optional:
    """Return the value before each entry, at first that of the state."""
    if values is None and start is None:
        return None
    *_, axis, reverse = run
    if values is None:
        values = torch.zeros_like(run[0])
    return _shifted(values, start, axis, reverse)


def _after(run: Sequence[Any], values: torch.Tensor) -> torch.Tensor:
    """Return the value after each entry, 0 after the last."""
    *_, axis, reverse = run
    return _shifted(values, None, axis, not reverse)


def _shifted(
    values: torch.Tensor, edge: Optional, axis: int, backwards: bool
) -> torch.Tensor:
    length = values.shape[axis]
    if length == 0:
        return values
    kept = values.narrow(axis, 1 if backwards else 0, length - 1)
    if edge is None:
        edge = torch.zeros_like(values.select(axis, 0))
    first = edge.unsqueeze(axis)
    return torch.cat([kept, first] if backwards else [first, kept], axis)


def _first(run: Sequence[Any], values: torch.Tensor) -> torch.Tensor:
    """Return the entry that follows the state; 0 if there is none."""
    *_, axis, reverse = run
    length = values.shape[axis]
    if length == 0:
        return values.sum(axis)
    return values.select(axis, length - 1 if reverse else 0)


def _recurrence_change(
    run: Sequence[Any],
    g: Optional,
    ca: Optional,
    cb: Optional,
    cs: Optional,
) -> tuple[Optional, Optional, Optional, Optional]:
    """Return the gradient of <g, J c> in log_a, log_b and the state, and J c."""
    t = _recurrence_j(run, ca, cb, cs)
    if g is None or t is None:
        return None, None, None, t
    ga, gb, _ = _recurrence_v(run, g)
    through_a = times(ga, plus(ca, _before(run, t, cs)))
    through_b = times(gb, cb)
    assert through_a is not None
    of_out = minus(_after(run, through_a) - through_a, through_b)
    more_a, more_b, more_s = _recurrence_v(run, of_out)
    return (
        plus(through_a, more_a),
        plus(through_b, more_b),
        None if run[2] is None else plus(_first(run, through_a), more_s),
        t,
    )


def _recurrence_shape(*arguments: Any) -> torch.Tensor:
    log_a: torch.Tensor = arguments[0]
    return log_a.new_empty(tuple(log_a.shape))


def _recurrence_backward(ctx: Any, g: Optional) -> tuple[Any, ...]:
    run, _ = saved(ctx)
    found: tuple[Optional, ...] = (None, None, None)
    if g is not None:
        found = _recurrence_primitive_vjp(*run, g, ctx.needs_input_grad[:3])
    return *found, None, None, None


def _recurrence_forward(ctx: Any, *tangents: Any) -> Optional:
    run, _ = saved(ctx)
    return _recurrence_j(run, *tangents[:3])


def _recurrence_shape_vjp(*arguments: Any) -> tuple[torch.Tensor, ...]:
    log_a, log_b, state, *_, needs = arguments
    return gradient_shapes((log_a, log_b, state), needs)


def _recurrence_backward_vjp(ctx: Any, *moves: Optional) -> tuple[Any, ...]:
    (*run, g, _), _ = saved(ctx)
    *found, t = _recurrence_change(run, g, *moves)
    return *found, None, None, None, t, None


def _recurrence_forward_vjp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
    (*run, g, needs), _ = saved(ctx)
    *changes, _ = _recurrence_change(run, g, *tangents[:3])
    more = _recurrence_v(run, tangents[_RECURRENCE_LENGTH])
    return _asked(needs, [*map(plus, changes, more)], run[:3])


def _recurrence_backward_jvp(ctx: Any, g: Optional) -> tuple[Any, ...]:
    (*run, ca, cb, cs), _ = saved(ctx)
    *found, _ = _recurrence_change(run, g, ca, cb, cs)
    gradients = [
        None if c is None else gradient
        for c, gradient in zip((ca, cb, cs), _recurrence_v(run, g), strict=True)
    ]
    return *found, None, None, None, *gradients


def _recurrence_forward_jvp(ctx: Any, *tangents: Any) -> Optional:
    (*run, ca, cb, cs), _ = saved(ctx)
    ta, tb, ts = tangents[:3]
    da, db, ds = tangents[_RECURRENCE_LENGTH:]
    t, other = _recurrence_j(run, ca, cb, cs), _recurrence_j(run, ta, tb, ts)
    moved_a = minus(plus(ta, _before(run, other, ts)), other)
    moved_b = minus(tb, other)
    return _recurrence_j(
        run,
        plus(da, times(plus(ca, _before(run, t, cs)), moved_a)),
        plus(db, times(cb, moved_b)),
        ds,
    )


_log_linear_recurrence = define(
    f"log_linear_recurrence({_RECURRENCE}) -> Tensor",
    _kernel("log_linear_recurrence"),
    _recurrence_shape,
    _recurrence_backward,
    lambda call: mapped_lanes(call, 4, 3),
    jvp=_recurrence_forward,
)
_log_linear_recurrence_vjp = define(
    f"log_linear_recurrence_vjp({_RECURRENCE}, Tensor grad, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    _kernel("log_linear_recurrence_vjp"),
    _recurrence_shape_vjp,
    _recurrence_backward_vjp,
    lambda call: mapped_lanes(call, 4, 3),
    jvp=_recurrence_forward_vjp,
)
_log_linear_recurrence_jvp = define(
    f"log_linear_recurrence_jvp({_RECURRENCE}, Tensor? tangent_a, "
    "Tensor? tangent_b, Tensor? tangent_state) -> Tensor",
    _tangent(reference.log_linear_recurrence_jvp),
    _recurrence_shape,
    _recurrence_backward_jvp,
    lambda call: mapped_lanes(call, 4, 3),
    jvp=_recurrence_forward_jvp,
)
