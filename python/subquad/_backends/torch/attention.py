"""Attention for tensors of the CPU and of CUDA.

Forward-mode derivatives and derivatives of derivatives are those of the reference in
torch's own operators. The scale of a state is a constant in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from subquad._backends.torch.memory import (
    Optional,
    carries_tangents,
    is_direct,
    is_plain,
    kernels_for,
    needs_reference,
)
from subquad._backends.torch.operators import (
    define,
    filled,
    gradient_shapes,
    mapped,
    mapped_vjp,
    only,
    saved,
)
from subquad._dispatch import Array
from subquad._reference import attention as reference
from subquad._reference import states
from subquad._reference._common import batch_shape

# ------------------------------------------------------------------------- primitives


def linear_attention(
    log_k: Array,
    v: Array,
    log_q: Array | None,
    log_decay: Array | None,
    key_mask: Array | None,
    segments: Array | None,
    key_sums: Array | None,
    value_sums: Array | None,
    causal: bool,
    empty_is_nan: bool,
    with_log_z: bool,
    with_state: bool,
) -> tuple[Array | None, Array | None, Array | None, Array | None]:
    arrays = (log_k, v, log_q, log_decay, key_mask, segments, key_sums, value_sums)
    arguments = (*arrays, causal, empty_is_nan, with_log_z, with_state)
    if needs_reference():
        found = _constant_scales(*arguments)
    elif is_direct(*arrays):
        found = kernels_for(log_k).linear_attention(*arguments)
    else:
        found = _linear_attention(*arguments)
    has_rows = log_q is not None
    asked = (has_rows, has_rows and with_log_z, with_state, with_state)
    y, log_z, keys, values = only(asked, found)
    return y, log_z, keys, values


def linear_attention_vjp(
    log_k: Array,
    v: Array,
    log_q: Array | None,
    log_decay: Array | None,
    key_mask: Array | None,
    segments: Array | None,
    key_sums: Array | None,
    value_sums: Array | None,
    causal: bool,
    y: Array | None,
    grad_y: Array | None,
    grad_log_z: Array | None,
    grad_final_key_sums: Array | None,
    grad_final_value_sums: Array | None,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[
    Array | None, Array | None, Array | None, Array | None, Array | None, Array | None
]:
    arrays = (log_k, v, log_q, log_decay, key_mask, segments, key_sums, value_sums)
    grads = (grad_y, grad_log_z, grad_final_key_sums, grad_final_value_sums)
    return _gradients(_LINEAR, (*arrays, causal), (y,), grads, needs)


def log_linear_attention(
    log_k: Array,
    log_v: Array,
    sign_v: Array | None,
    log_q: Array | None,
    log_decay: Array | None,
    key_mask: Array | None,
    segments: Array | None,
    log_numerator: Array | None,
    sign_numerator: Array | None,
    log_denominator: Array | None,
    causal: bool,
    with_log_z: bool,
    with_state: bool,
) -> tuple[
    Array | None, Array | None, Array | None, Array | None, Array | None, Array | None
]:
    state = (log_numerator, sign_numerator, log_denominator)
    arrays = (log_k, log_v, sign_v, log_q, log_decay, key_mask, segments, *state)
    arguments = (*arrays, causal, with_log_z, with_state)
    if needs_reference():
        found = reference.log_linear_attention(*arguments)
    elif is_direct(*arrays):
        found = kernels_for(log_k).log_linear_attention(*arguments)
    else:
        found = _log_linear_attention(*arguments)
    has_rows = log_q is not None
    asked = (has_rows, has_rows, has_rows and with_log_z, *(with_state,) * 3)
    log_y, sign_y, log_z, numerator, sign, denominator = only(asked, found)
    return log_y, sign_y, log_z, numerator, sign, denominator


def log_linear_attention_vjp(
    log_k: Array,
    log_v: Array,
    sign_v: Array | None,
    log_q: Array | None,
    log_decay: Array | None,
    key_mask: Array | None,
    segments: Array | None,
    log_numerator: Array | None,
    sign_numerator: Array | None,
    log_denominator: Array | None,
    causal: bool,
    grad_log_y: Array | None,
    grad_log_z: Array | None,
    grad_final_log_numerator: Array | None,
    grad_final_log_denominator: Array | None,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[
    Array | None, Array | None, Array | None, Array | None, Array | None, Array | None
]:
    state = (log_numerator, sign_numerator, log_denominator)
    arrays = (log_k, log_v, sign_v, log_q, log_decay, key_mask, segments, *state)
    grads = (
        grad_log_y,
        grad_log_z,
        grad_final_log_numerator,
        grad_final_log_denominator,
    )
    return _gradients(_LOG_LINEAR, (*arrays, causal), (), grads, needs)


def has_attention_step(array: Array) -> bool:
    """Return whether a token may be added to states in place."""
    return is_plain(array) and not carries_tangents()


def attention_step(
    log_k: Array,
    v: Array,
    log_q: Array,
    log_decay: Array | None,
    key_sums: Array,
    value_sums: Array,
    recent_keys: Array,
    recent_values: Array,
    recent_count: Array,
    empty_is_nan: bool,
    with_log_z: bool,
) -> tuple[Array, Array | None]:
    token = (log_k, v, log_q, log_decay)
    state = (key_sums, value_sums, recent_keys, recent_values, recent_count)
    if is_direct(*token, *state):
        y, log_z = kernels_for(log_k).attention_step(
            *token, *state, empty_is_nan, with_log_z
        )
        return y, log_z
    folded = states.fold_recent(*state)
    sequence = [None if array is None else array[..., None, :] for array in token]
    attend: Callable[..., Any] = linear_attention
    y, log_z, keys, values = attend(
        *sequence, None, None, *folded, True, empty_is_nan, with_log_z, True
    )
    key_sums.copy_(keys)
    value_sums.copy_(values)
    recent_count.zero_()
    return y[..., 0, :], None if log_z is None else log_z[..., 0]


# ------------------------------------------------- derivatives in torch's own operators


class _Form(NamedTuple):
    """What tells the two forms of attention apart.

    Attributes
    ----------
    name : str
        Of its operators.
    function : callable
        The results that have derivatives, from all arguments up to `causal` and
        whether log z and the state are asked for.
    inputs : tuple of int
        Places of the arguments that have derivatives.
    length : int
        How many arguments there are, `causal` the last.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[int, ...]
    length: int


def _constant_scales(*arguments: Any) -> tuple[Optional, ...]:
    """Return what the reference does, the scales of states as constants."""
    *arrays, causal, empty_is_nan, with_log_z, with_state = arguments
    *before, key_sums, value_sums = arrays
    attend: Callable[..., Any] = reference.linear_attention
    y, log_z, keys, values = attend(
        *before,
        _with_constant_scale(key_sums),
        value_sums,
        causal,
        empty_is_nan,
        with_log_z,
        with_state,
    )
    return y, log_z, keys, values


def _with_constant_scale(key_sums: Optional) -> Optional:
    if key_sums is None:
        return None
    return torch.cat([key_sums[..., :2, :].detach(), key_sums[..., 2:, :]], dim=-2)


def _linear_results(*arguments: Any) -> tuple[Optional, ...]:
    *given, with_log_z, with_state = arguments
    return _constant_scales(*given, False, with_log_z, with_state)


def _log_results(*arguments: Any) -> tuple[Optional, ...]:
    log_y, _, log_z, numerator, _, denominator = reference.log_linear_attention(
        *arguments
    )
    return log_y, log_z, numerator, denominator


_LINEAR = _Form("linear_attention_vjp", _linear_results, (0, 1, 2, 3, 6, 7), 9)
_LOG_LINEAR = _Form("log_linear_attention_vjp", _log_results, (0, 1, 3, 4, 7, 9), 11)


def _gradients(
    form: _Form,
    call: tuple[Any, ...],
    y: tuple[Optional, ...],
    grads: tuple[Optional, ...],
    needs: Sequence[bool],
) -> tuple[
    Array | None, Array | None, Array | None, Array | None, Array | None, Array | None
]:
    """Return the gradients of a call of attention from those of its results."""
    needs = [
        needed and call[place] is not None
        for needed, place in zip(needs, form.inputs, strict=True)
    ]
    arguments = (*call, *y, *grads)
    if needs_reference():
        found = _reversed(form, call, grads, needs)
    elif is_direct(*(a for a in arguments if not isinstance(a, bool))):
        kernels = kernels_for(call[0])
        found = getattr(kernels, form.name)(*arguments, tuple(needs))
    else:
        found = _REVERSES[form.name](*arguments, needs)
    gk, gv, gq, gdecay, g_first, g_second = only(needs, found)
    return gk, gv, gq, gdecay, g_first, g_second


def _reversed(
    form: _Form,
    call: Sequence[Any],
    grads: Sequence[Optional],
    needs: Sequence[bool],
) -> list[Optional]:
    """Return gradients that can be differentiated again."""
    places = [place for place, needed in zip(form.inputs, needs, strict=True) if needed]
    known = [grad is not None for grad in grads]

    def results(*moved: torch.Tensor) -> tuple[Any, ...]:
        complete = list(call)
        for place, array in zip(places, moved, strict=True):
            complete[place] = array
        found = form.function(*complete, known[1], known[2] or known[3])
        return tuple(a for a, is_known in zip(found, known, strict=True) if is_known)

    reverse: Any = torch.func.vjp(results, *(call[place] for place in places))[1]
    gradients = iter(reverse(tuple(grad for grad in grads if grad is not None)))
    return [next(gradients) if needed else None for needed in needs]


def _backward_vjp(form: _Form) -> Callable[..., Any]:
    """Return the reverse of a reverse."""

    def backward(ctx: Any, *moves: Optional) -> tuple[Any, ...]:
        arguments, _ = saved(ctx)
        needs = arguments[-1]
        first_grad = len(arguments) - 5
        places = [
            place
            for place in (*form.inputs, *range(first_grad, len(arguments) - 1))
            if arguments[place] is not None
        ]

        def gradients(*moved: torch.Tensor) -> tuple[torch.Tensor, ...]:
            complete = list(arguments)
            for place, array in zip(places, moved, strict=True):
                complete[place] = array
            found = _reversed(
                form, complete[: form.length], complete[first_grad:-1], needs
            )
            return tuple(g for g in found if g is not None)

        pair: Any = torch.func.vjp(gradients, *(arguments[place] for place in places))
        reached, reverse = pair
        asked = [move for move, needed in zip(moves, needs, strict=True) if needed]
        found = reverse(
            tuple(
                torch.zeros_like(gradient) if move is None else move
                for gradient, move in zip(reached, asked, strict=True)
            )
        )
        result: list[Any] = [None] * len(arguments)
        for place, array in zip(places, found, strict=True):
            result[place] = array
        return tuple(result)

    return backward


# -------------------------------------------------------------------------- operators


def _kernel(name: str) -> Callable[..., Any]:
    """Return what computes an operator: empty tensors in the place of None."""

    def compute(*arguments: Any) -> tuple[torch.Tensor, ...]:
        log_k = arguments[0]
        return filled(log_k, getattr(kernels_for(log_k), name)(*arguments))

    return compute


def _batch(arguments: Sequence[Any], cores: Sequence[int], index: int) -> Any:
    return batch_shape(
        *(
            tuple(array.shape[: array.ndim - core])
            for place, (array, core) in enumerate(zip(arguments, cores, strict=False))
            if array is not None and place != index
        )
    )


def _empty(
    like: torch.Tensor, batch: tuple[int, ...], shapes: Sequence[tuple[Any, ...] | None]
) -> tuple[torch.Tensor, ...]:
    return tuple(
        like.new_empty((0,) if shape is None else (*batch, *shape)) for shape in shapes
    )


# The cores are the dimensions of each argument's matrices, after those of the batch.
_CORES = (2, 2, 2, 2, 1, 1, 2, 3)
_CORES_VJP = (*_CORES, 0, 2, 2, 1, 2, 3)
_SEGMENTS = 5
_LOG_CORES = (2, 2, 2, 2, 2, 1, 1, 2, 2, 1)
_LOG_CORES_VJP = (*_LOG_CORES, 0, 2, 1, 2, 1)
_LOG_SEGMENTS = 6


def _shape(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *arrays, _, _, with_log_z, with_state = arguments
    log_k, v, log_q = arrays[:3]
    d_k, d_v = log_k.shape[-1], v.shape[-1]
    n_q = None if log_q is None else log_q.shape[-2]
    return _empty(
        log_k,
        _batch(arrays, _CORES, _SEGMENTS),
        (
            None if n_q is None else (n_q, d_v),
            (n_q,) if n_q is not None and with_log_z else None,
            (5, d_k) if with_state else None,
            (2, d_k, d_v) if with_state else None,
        ),
    )


def _log_shape(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *arrays, _, with_log_z, with_state = arguments
    log_k, log_v, _, log_q = arrays[:4]
    d_k, d_v = log_k.shape[-1], log_v.shape[-1]
    n_q = None if log_q is None else log_q.shape[-2]
    rows = None if n_q is None else (n_q, d_v)
    table = (d_k, d_v) if with_state else None
    return _empty(
        log_k,
        _batch(arrays, _LOG_CORES, _LOG_SEGMENTS),
        (
            rows,
            rows,
            (n_q,) if n_q is not None and with_log_z else None,
            table,
            table,
            (d_k,) if with_state else None,
        ),
    )


def _shape_vjp(form: _Form) -> Callable[..., Any]:
    def shape(*arguments: Any) -> tuple[torch.Tensor, ...]:
        *_, needs = arguments
        return gradient_shapes([arguments[place] for place in form.inputs], needs)

    return shape


def _backward(
    ctx: Any,
    gy: Optional,
    gz: Optional,
    g_keys: Optional,
    g_values: Optional,
) -> tuple[Any, ...]:
    (*call, _, with_log_z, with_state), (y,) = saved(ctx)
    grads = (
        None if call[2] is None else gy,
        gz if with_log_z else None,
        *((g_keys, g_values) if with_state else (None, None)),
    )
    result: list[Any] = [None] * (len(call) + 3)
    needs = [ctx.needs_input_grad[place] for place in _LINEAR.inputs]
    if any(grad is not None for grad in grads):
        found = _gradients(
            _LINEAR, tuple(call), (None if grads[0] is None else y,), grads, needs
        )
        for place, gradient in zip(_LINEAR.inputs, found, strict=True):
            result[place] = gradient
    return tuple(result)


def _log_backward(
    ctx: Any,
    gy: Optional,
    g_sign: Optional,
    gz: Optional,
    g_numerator: Optional,
    g_final_sign: Optional,
    g_denominator: Optional,
) -> tuple[Any, ...]:
    del g_sign, g_final_sign
    (*call, with_log_z, with_state), _ = saved(ctx)
    grads = (
        None if call[3] is None else gy,
        gz if with_log_z else None,
        *((g_numerator, g_denominator) if with_state else (None, None)),
    )
    result: list[Any] = [None] * (len(call) + 2)
    needs = [ctx.needs_input_grad[place] for place in _LOG_LINEAR.inputs]
    if any(grad is not None for grad in grads):
        found = _gradients(_LOG_LINEAR, tuple(call), (), grads, needs)
        for place, gradient in zip(_LOG_LINEAR.inputs, found, strict=True):
            result[place] = gradient
    return tuple(result)


_CALL = (
    "Tensor log_k, Tensor v, Tensor? log_q, Tensor? log_decay, Tensor? key_mask, "
    "Tensor? segments, Tensor? key_sums, Tensor? value_sums, bool causal"
)
_LOG_CALL = (
    "Tensor log_k, Tensor log_v, Tensor? sign_v, Tensor? log_q, Tensor? log_decay, "
    "Tensor? key_mask, Tensor? segments, Tensor? log_numerator, "
    "Tensor? sign_numerator, Tensor? log_denominator, bool causal"
)
_SIX = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

_linear_attention = define(
    f"linear_attention({_CALL}, bool empty_is_nan, bool with_log_z, bool with_state) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _kernel("linear_attention"),
    _shape,
    _backward,
    lambda call: mapped(call, _CORES, _SEGMENTS),
    saved_results=(0,),
)
_log_linear_attention = define(
    f"log_linear_attention({_LOG_CALL}, bool with_log_z, bool with_state) -> {_SIX}",
    _kernel("log_linear_attention"),
    _log_shape,
    _log_backward,
    lambda call: mapped(call, _LOG_CORES, _LOG_SEGMENTS),
    constants=(1, 4),
)
_REVERSES = {
    _LINEAR.name: define(
        f"linear_attention_vjp({_CALL}, Tensor? y, Tensor? grad_y, "
        "Tensor? grad_log_z, Tensor? grad_final_key_sums, "
        f"Tensor? grad_final_value_sums, bool[] needs) -> {_SIX}",
        _kernel("linear_attention_vjp"),
        _shape_vjp(_LINEAR),
        _backward_vjp(_LINEAR),
        lambda call: mapped_vjp(call, _CORES_VJP, _LINEAR.inputs, _SEGMENTS),
    ),
    _LOG_LINEAR.name: define(
        f"log_linear_attention_vjp({_LOG_CALL}, Tensor? grad_log_y, "
        "Tensor? grad_log_z, Tensor? grad_final_log_numerator, "
        f"Tensor? grad_final_log_denominator, bool[] needs) -> {_SIX}",
        _kernel("log_linear_attention_vjp"),
        _shape_vjp(_LOG_LINEAR),
        _backward_vjp(_LOG_LINEAR),
        lambda call: mapped_vjp(
            call, _LOG_CORES_VJP, _LOG_LINEAR.inputs, _LOG_SEGMENTS
        ),
    ),
}
