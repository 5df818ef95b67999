"""Running totals in array-API code: how states are merged, folded and converted.

Scales are constants to automatic differentiation, here as in the primitives: nothing
that a state stands for depends on them.
"""

from __future__ import annotations

import math

from subquad._dispatch import Array, Namespace, device_of, namespace_of
from subquad._reference._common import primitive, wide_dtype
from subquad._reference._sums import (
    Sums,
    add,
    constant,
    log_abs,
    power,
    raised,
    signum,
    split,
    terms,
    two_sum,
)


@primitive
def merge_log_sums(
    log_sum: Array, remainder: Array, other_sum: Array, other_remainder: Array
) -> tuple[Array, Array]:
    """Return log(e^a + e^b) and what rounding took from it."""
    xp = namespace_of(log_sum)
    sums = add(
        xp, _log_sums(xp, log_sum, remainder), _log_sums(xp, other_sum, other_remainder)
    )
    scale, logarithm = log_abs(xp, sums)
    total, rest = two_sum(xp, scale, logarithm)
    high, low = split(xp, total, rest, log_sum.dtype)
    shape = scale.shape[:-1]
    return xp.reshape(high, shape), xp.reshape(low, shape)


@primitive
def merge_attention(
    key_sums: Array, value_sums: Array, other_keys: Array, other_values: Array
) -> tuple[Array, Array]:
    """Return the sums of a state and of one after it, whose decays act on the first."""
    xp = namespace_of(key_sums)
    first, second = (
        _wide(xp, key_sums, value_sums),
        _wide(xp, other_keys, other_values),
    )
    forgets = second.decay == -math.inf
    moved = xp.where(forgets, -math.inf, first.scale + second.decay)
    scale = constant(xp.maximum(moved, second.scale))
    left = xp.where(moved == -math.inf, 0.0, power(xp, moved, scale))
    right = xp.where(second.scale == -math.inf, 0.0, power(xp, second.scale, scale))
    decay = xp.where(
        forgets | (first.decay == -math.inf), -math.inf, first.decay + second.decay
    )
    return _narrow(
        xp,
        scale,
        _sum(xp, first.keys, left, second.keys, right),
        decay,
        _sum(xp, first.values, left[..., None], second.values, right[..., None]),
        key_sums.dtype,
    )


@primitive
def fold_recent(
    key_sums: Array,
    value_sums: Array,
    recent_keys: Array,
    recent_values: Array,
    recent_count: Array,
) -> tuple[Array, Array]:
    """Return the sums with the tokens that they do not hold yet."""
    xp = namespace_of(key_sums)
    state = _wide(xp, key_sums, value_sums)
    places = xp.arange(recent_keys.shape[-2], device=device_of(key_sums))
    counts = (places < recent_count[..., None])[..., None]
    # The scale's own remainder has gone into the sums.
    unit = xp.exp(_left(xp, key_sums))
    keys = xp.astype(xp.where(counts, recent_keys, 0.0), unit.dtype)
    keys = keys * unit[..., None, :]
    values = xp.astype(xp.where(counts, recent_values, 0.0), state.scale.dtype)
    none = xp.zeros_like(state.scale)
    products = xp.matrix_transpose(keys) @ values
    one = xp.ones_like(none)
    return _narrow(
        xp,
        state.scale,
        _sum(xp, state.keys, one, (xp.sum(keys, axis=-2), none), one),
        state.decay,
        _sum(
            xp,
            state.values,
            one[..., None],
            (products, xp.zeros_like(products)),
            one[..., None],
        ),
        key_sums.dtype,
    )


@primitive
def attention_to_log(key_sums: Array, value_sums: Array) -> tuple[Array, Array, Array]:
    """Return log |S|, the sign of S and log Z, the scale included."""
    xp = namespace_of(key_sums)
    state = _wide(xp, key_sums, value_sums)
    dtype = key_sums.dtype
    scale, log_z = log_abs(xp, Sums(state.scale, *state.keys))
    wide_scale = xp.broadcast_to(state.scale[..., None], state.values[0].shape)
    value_scale, log_s = log_abs(xp, Sums(wide_scale, *state.values))
    sign = signum(xp, state.values[0] + state.values[1])
    return (
        xp.astype(value_scale + log_s, dtype),
        xp.astype(sign, dtype),
        xp.astype(scale + log_z, dtype),
    )


@primitive
def attention_from_log(
    log_numerator: Array, sign_numerator: Array | None, log_denominator: Array
) -> tuple[Array, Array]:
    """Return the sums of a state in logarithms, whose decays are not known: 0."""
    xp = namespace_of(log_numerator)
    wide = wide_dtype(xp, log_numerator)
    logs = xp.astype(log_numerator, wide)
    scale = xp.astype(log_denominator, wide)
    origin = constant(scale)
    is_empty = origin == -math.inf
    keys = xp.where(is_empty, 0.0, power(xp, scale, origin))
    values = xp.exp(logs - xp.where(is_empty, 0.0, origin)[..., None])
    values = xp.where(is_empty[..., None], 0.0, values)
    if sign_numerator is not None:
        values = values * xp.astype(sign_numerator, wide)
    none = xp.zeros_like(keys)
    return _narrow(
        xp,
        origin,
        (keys, none),
        none,
        (values, xp.zeros_like(values)),
        log_numerator.dtype,
    )


class _Wide:
    """A state in the wide type: its scale as one number."""

    def __init__(
        self,
        scale: Array,
        keys: tuple[Array, Array],
        decay: Array,
        values: tuple[Array, Array],
    ) -> None:
        self.scale = scale
        self.keys = keys
        self.decay = decay
        self.values = values


def _wide(xp: Namespace, key_sums: Array, value_sums: Array) -> _Wide:
    dtype = wide_dtype(xp, key_sums)
    keys, values = xp.astype(key_sums, dtype), xp.astype(value_sums, dtype)
    scale, left = two_sum(xp, keys[..., 0, :], keys[..., 1, :])
    left = constant(left)
    return _Wide(
        constant(scale),
        raised(xp, keys[..., 2, :], keys[..., 3, :], left),
        keys[..., 4, :],
        raised(xp, values[..., 0, :, :], values[..., 1, :, :], left[..., None]),
    )


def _left(xp: Namespace, key_sums: Array) -> Array:
    keys = xp.astype(key_sums, wide_dtype(xp, key_sums))
    return two_sum(xp, keys[..., 0, :], keys[..., 1, :])[1]


def _narrow(
    xp: Namespace,
    scale: Array,
    keys: tuple[Array, Array],
    decay: Array,
    values: tuple[Array, Array],
    dtype: object,
) -> tuple[Array, Array]:
    rows = [
        *split(xp, scale, xp.zeros_like(scale), dtype),
        *split(xp, *keys, dtype),
        xp.astype(decay, dtype),
    ]
    return xp.stack(rows, axis=-2), xp.stack(split(xp, *values, dtype), axis=-3)


def _sum(
    xp: Namespace,
    first: tuple[Array, Array],
    left: Array,
    second: tuple[Array, Array],
    right: Array,
) -> tuple[Array, Array]:
    """Return first · left + second · right; nothing is left of what 0 multiplies."""
    a, b = (xp.where(left == 0.0, 0.0, part * left) for part in first)
    c, d = (xp.where(right == 0.0, 0.0, part * right) for part in second)
    value, lost = two_sum(xp, a, c)
    return value, b + d + lost


def _log_sums(xp: Namespace, log_sum: Array, remainder: Array) -> Sums:
    wide = wide_dtype(xp, log_sum)
    # With a dimension: NumPy makes numbers of arrays that have none.
    scale = xp.astype(log_sum, wide)[..., None]
    sums = terms(xp, scale, xp.ones_like(scale))
    # In the value itself e^remainder - 1 would be rounded away.
    rest = xp.expm1(xp.astype(remainder, wide)[..., None])
    return sums._replace(rest=xp.where(xp.isfinite(scale), rest, 0.0))
