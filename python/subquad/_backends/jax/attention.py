"""The primitives of attention.

A state's scale is a constant to derivatives, forward and reverse: nothing that a state
stands for depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jax import lax
from jax import numpy as jnp

from subquad._backends.jax.common import (
    Derivative,
    Kernel,
    Output,
    Plan,
    Shape,
    apply,
    differentiate,
    gradients,
    itemsize,
    join_batch,
    listed,
    matrix_batch,
    plain,
    push,
    spread,
)
from subquad._dispatch import Array
from subquad._reference import attention as reference

# Dimensions of each input after those of the batch; None for segments.
_CORES = (2, 2, 2, 2, 1, None, 2, 3)
_LOG_CORES = (2, 2, 2, 2, 2, 1, None, 2, 2, 1)
# Those of what the reverse takes beside: y and gradients.
_CORES_BESIDE = (2, 2, 1, 2, 3)
_LOG_CORES_BESIDE = (2, 1, 2, 1)

# Places of the inputs that have gradients.
_MOVES = (0, 1, 2, 3, 6, 7)
_LOG_MOVES = (0, 1, 3, 4, 7, 9)

# ----------------------------------------------------------------------------- kernels


def _batch(inputs: Sequence[Any], cores: Sequence[int | None]) -> Shape:
    counted = [
        (array, core)
        for array, core in zip(inputs, cores, strict=True)
        if core is not None
    ]
    arrays, lengths = zip(*counted, strict=True)
    return matrix_batch(arrays, lengths)


def _outputs(
    shapes: Sequence[tuple[bool, Shape]], batch: Shape, dtype: Any
) -> list[Output | None]:
    return [
        plain((*batch, *shape), dtype) if is_asked else None
        for is_asked, shape in shapes
    ]


def _gradients(
    needs: Sequence[bool],
    inputs: Sequence[Any],
    places: Sequence[int],
    cores: Sequence[int | None],
    batch: Shape,
) -> list[Output | None]:
    tails = [cores[place] or 0 for place in places]
    return gradients(needs, [inputs[place] for place in places], tails, batch)


def _sizes(
    batch: Shape, log_k: Any, v: Any, log_q: Any, causal: bool
) -> tuple[int, ...]:
    n_q = 0 if log_q is None else log_q.shape[-2]
    return (
        math.prod(batch),
        n_q,
        *log_k.shape[-2:],
        v.shape[-1],
        itemsize(log_k),
        int(causal),
    )


def _plan(
    *inputs: Any, causal: bool, empty_is_nan: bool, with_log_z: bool, with_state: bool
) -> Plan:
    log_k, v, log_q, *_ = inputs
    batch = _batch(inputs, _CORES)
    d_k, d_v = log_k.shape[-1], v.shape[-1]
    n_q = 0 if log_q is None else log_q.shape[-2]
    is_asked = log_q is not None
    shapes = (
        (is_asked, (n_q, d_v)),
        (is_asked and with_log_z, (n_q,)),
        (with_state, (5, d_k)),
        (with_state, (2, d_k, d_v)),
    )
    return Plan(
        _outputs(shapes, batch, log_k.dtype),
        _sizes(batch, log_k, v, log_q, causal),
        (int(causal), int(empty_is_nan)),
    )


def _plan_vjp(*inputs: Any, causal: bool, needs: Sequence[bool]) -> Plan:
    cores = (*_CORES, *_CORES_BESIDE)
    batch = _batch(inputs, cores)
    log_k, v, log_q, *_ = inputs
    return Plan(
        _gradients(needs, inputs, _MOVES, cores, batch),
        _sizes(batch, log_k, v, log_q, causal),
        (int(causal),),
    )


def _plan_log(*inputs: Any, causal: bool, with_log_z: bool, with_state: bool) -> Plan:
    log_k, log_v, _, log_q, *_ = inputs
    batch = _batch(inputs, _LOG_CORES)
    d_k, d_v = log_k.shape[-1], log_v.shape[-1]
    n_q = 0 if log_q is None else log_q.shape[-2]
    is_asked = log_q is not None
    shapes = (
        (is_asked, (n_q, d_v)),
        (is_asked, (n_q, d_v)),
        (is_asked and with_log_z, (n_q,)),
        (with_state, (d_k, d_v)),
        (with_state, (d_k, d_v)),
        (with_state, (d_k,)),
    )
    return Plan(
        _outputs(shapes, batch, log_k.dtype),
        _sizes(batch, log_k, log_v, log_q, causal),
        (int(causal),),
    )


def _plan_log_vjp(*inputs: Any, causal: bool, needs: Sequence[bool]) -> Plan:
    cores = (*_LOG_CORES, *_LOG_CORES_BESIDE)
    batch = _batch(inputs, cores)
    log_k, log_v, _, log_q, *_ = inputs
    return Plan(
        _gradients(needs, inputs, _LOG_MOVES, cores, batch),
        _sizes(batch, log_k, log_v, log_q, causal),
        (int(causal),),
    )


def _by_reference(*inputs: Any, **parameters: Any) -> tuple[Array | None, ...]:
    function: Any = reference.linear_attention
    *rows, keys, values = function(*_with_constant_scale(inputs), **parameters)
    if keys is not None:
        change = _change_of_scale(keys)
        keys = _constant_in(keys)
        keys, values = _in_scale(keys, values, change)
    return (*rows, keys, values)


def _vjp_by_reference(
    *inputs: Any, causal: bool, needs: Sequence[bool]
) -> tuple[Array | None, ...]:
    count = len(_CORES)
    forward, beside = _with_constant_scale(inputs[:count]), inputs[count:]
    *rows, keys, values = beside
    if keys is not None or values is not None:
        final: Any = reference.linear_attention
        options = (causal, False, False, True)
        last = final(*forward[:2], None, *forward[3:], *options)[2]
        keys, values = _in_scale(keys, values, _change_of_scale(last))
    function: Any = reference.linear_attention_vjp
    found: tuple[Array | None, ...]
    found = function(*forward, causal, *rows, keys, values, needs)
    return found


def _with_constant_scale(inputs: Sequence[Any]) -> list[Any]:
    *others, keys, values = inputs
    if keys is not None:
        keys = _constant_in(keys)
    return [*others, keys, values]


def _constant_in(keys: Array) -> Array:
    """Return the sums over keys with a scale that is a constant."""
    scale = lax.stop_gradient(keys[..., :2, :])
    return jnp.concat([scale, keys[..., 2:, :]], axis=-2)


def _change_of_scale(keys: Array) -> Array:
    """Return 1 that changes as the scale does, which in the reference follows keys."""
    scale = keys[..., 0, :] + keys[..., 1, :]
    change = scale - lax.stop_gradient(scale)
    return jnp.exp(jnp.where(jnp.isfinite(scale), change, 0.0))


def _in_scale(
    keys: Array | None, values: Array | None, change: Array
) -> tuple[Array | None, Array | None]:
    """Return sums, or their gradients, in the scale that is a constant."""
    if keys is not None:
        one = jnp.ones_like(change)
        keys = keys * jnp.stack([one, one, change, change, one], axis=-2)
    if values is not None:
        values = values * change[..., None, :, None]
    return keys, values


def _log_vjp_by_reference(
    *inputs: Any, causal: bool, needs: Sequence[bool]
) -> tuple[Array | None, ...]:
    count = len(_LOG_CORES)
    function: Any = reference.log_linear_attention_vjp
    found: tuple[Array | None, ...]
    found = function(*inputs[:count], causal, *inputs[count:], needs)
    return found


_LINEAR = Kernel("linear_attention", _plan, listed(_by_reference), "ffffbiff")
_LINEAR_VJP = Kernel(
    "linear_attention_vjp", _plan_vjp, listed(_vjp_by_reference), "ffffbifffffff"
)
_LOG = Kernel(
    "log_linear_attention",
    _plan_log,
    listed(reference.log_linear_attention),
    "fffffbifff",
)
_LOG_VJP = Kernel(
    "log_linear_attention_vjp",
    _plan_log_vjp,
    listed(_log_vjp_by_reference),
    "fffffbifffffff",
)

join_batch(_LINEAR, _CORES)
join_batch(_LINEAR_VJP, (*_CORES, *_CORES_BESIDE), _MOVES)
join_batch(_LOG, _LOG_CORES)
join_batch(_LOG_VJP, (*_LOG_CORES, *_LOG_CORES_BESIDE), _LOG_MOVES)


# ------------------------------------------------------------------------- derivatives


def _arguments(
    inputs: Sequence[Any], kept: Sequence[Any], grads: Sequence[Any]
) -> Sequence[Any]:
    return (*inputs, None if grads[0] is None else kept[0], *grads)


def _log_arguments(
    inputs: Sequence[Any], kept: Sequence[Any], grads: Sequence[Any]
) -> Sequence[Any]:
    del kept
    return (*inputs, *grads)


def _tangents_of(
    kernel: Kernel, moves: Sequence[int], results: Sequence[int]
) -> Callable[..., list[Array]]:
    def tangents(
        inputs: Sequence[Any],
        kept: Sequence[Any],
        tangents: Sequence[Any],
        **parameters: Any,
    ) -> list[Array]:
        del kept

        def function(*arrays: Any) -> list[Array]:
            return kernel.by_reference(*arrays, **parameters)

        moved = {
            place: tangent
            for place, tangent in zip(moves, tangents, strict=True)
            if tangent is not None
        }
        _, found = push(function, inputs, list(moved), list(moved.values()))
        outputs = kernel.plan(*inputs, **parameters).outputs
        by_output = spread(found, [output is not None for output in outputs])
        return [by_output[i] for i in results if by_output[i] is not None]

    return tangents


_RESULTS = (0, 1, 2, 3)
_LOG_RESULTS = (0, 2, 3, 5)

differentiate(
    _LINEAR,
    Derivative(
        _LINEAR_VJP,
        moves=_MOVES,
        results=_RESULTS,
        kept=(0,),
        arguments=_arguments,
        tangents=_tangents_of(_LINEAR, _MOVES, _RESULTS),
        parameters=("causal",),
    ),
)
differentiate(
    _LOG,
    Derivative(
        _LOG_VJP,
        moves=_LOG_MOVES,
        results=_LOG_RESULTS,
        kept=(),
        arguments=_log_arguments,
        tangents=_tangents_of(_LOG, _LOG_MOVES, _LOG_RESULTS),
        parameters=("causal",),
    ),
)


# ------------------------------------------------------------- the backend's functions


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
    found = apply(
        _LINEAR,
        (log_k, v, log_q, log_decay, key_mask, segments, key_sums, value_sums),
        causal=causal,
        empty_is_nan=empty_is_nan,
        with_log_z=with_log_z,
        with_state=with_state,
    )
    is_asked = log_q is not None
    present = (is_asked, is_asked and with_log_z, with_state, with_state)
    y, log_z, keys, values = spread(found, present)
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
    grad_key_sums: Array | None,
    grad_value_sums: Array | None,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Array | None, ...]:
    inputs = (log_k, v, log_q, log_decay, key_mask, segments, key_sums, value_sums)
    grads = (grad_y, grad_log_z, grad_key_sums, grad_value_sums)
    asked = _given(needs, inputs, _MOVES)
    arrays = _arguments(inputs, (y,), grads)
    return tuple(spread(apply(_LINEAR_VJP, arrays, causal=causal, needs=asked), asked))


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
) -> tuple[Array | None, ...]:
    state = (log_numerator, sign_numerator, log_denominator)
    found = apply(
        _LOG,
        (log_k, log_v, sign_v, log_q, log_decay, key_mask, segments, *state),
        causal=causal,
        with_log_z=with_log_z,
        with_state=with_state,
    )
    is_asked = log_q is not None
    rows = (is_asked, is_asked, is_asked and with_log_z)
    return tuple(spread(found, (*rows, *(with_state,) * 3)))


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
    grad_log_numerator: Array | None,
    grad_log_denominator: Array | None,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Array | None, ...]:
    state = (log_numerator, sign_numerator, log_denominator)
    inputs = (log_k, log_v, sign_v, log_q, log_decay, key_mask, segments, *state)
    grads = (grad_log_y, grad_log_z, grad_log_numerator, grad_log_denominator)
    asked = _given(needs, inputs, _LOG_MOVES)
    arrays = _log_arguments(inputs, (), grads)
    return tuple(spread(apply(_LOG_VJP, arrays, causal=causal, needs=asked), asked))


def _given(
    needs: Sequence[bool], inputs: Sequence[Any], places: Sequence[int]
) -> tuple[bool, ...]:
    """Return what is needed of the inputs that are there."""
    return tuple(
        bool(needed) and inputs[place] is not None
        for needed, place in zip(needs, places, strict=True)
    )
