"""Sums of exponentials as numbers of any range, and scans by log-step merges.

A sum is a triple: e^scale (value + rest). The scale is the largest exponent that took
part, the rest what rounding took from the value. An empty sum has scale -inf and value
0; one that holds a term of +inf has an infinite value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from subquad._dispatch import Array, Namespace, device_of, library_of


class Sums(NamedTuple):
    """Sums e^scale (value + rest), elementwise."""

    scale: Array
    value: Array
    rest: Array


def constant(array: Array) -> Array:
    """Return an array that automatic differentiation takes for a constant."""
    name = library_of(array).name
    if name == "torch":
        return array.detach()
    if name == "jax":
        import jax

        return jax.lax.stop_gradient(array)
    return array


def terms(xp: Namespace, exponents: Array, weights: Array) -> Sums:
    """Return weights · exp(exponents); a weight of 0 removes what is there."""
    is_nothing = (weights == 0.0) | (exponents == -math.inf)
    scale = xp.where(is_nothing, -math.inf, exponents)
    value = xp.where(is_nothing, 0.0, weights)
    # 1 and -1 at +inf must not cancel, nor must a weight of 2 count twice.
    largest = xp.where(value < 0.0, -math.inf, value)
    largest = xp.where(value > 0.0, math.inf, largest)
    value = xp.where(scale == math.inf, largest, value)
    value = xp.where(xp.isnan(scale), math.nan, value)
    return Sums(scale, value, xp.zeros_like(value))


def add(xp: Namespace, left: Sums, right: Sums) -> Sums:
    """Return the sums of two."""
    scale = xp.maximum(left.scale, right.scale)
    to_left = power(xp, left.scale, scale)
    to_right = power(xp, right.scale, scale)
    value, rest = two_sum(xp, left.value * to_left, right.value * to_right)
    rest = rest + left.rest * to_left + right.rest * to_right
    rest = xp.where(xp.isfinite(value), rest, 0.0)
    # What cancels leaves no scale behind: smaller terms may follow.
    scale = xp.where(value + rest == 0.0, -math.inf, scale)
    return Sums(scale, value, rest)


def power(xp: Namespace, exponent: Array, scale: Array) -> Array:
    """Return exp(exponent - scale), 1 where these are equal infinities."""
    return xp.exp(difference(xp, exponent, scale))


def difference(xp: Namespace, a: Array, b: Array) -> Array:
    """Return a - b, 0 where these are equal infinities."""
    return xp.where((a == b) & xp.isinf(a), 0.0, a - b)


def signum(xp: Namespace, values: Array) -> Array:
    """Return -1, 0 or 1, NaN for NaN, without an assignment that vmap refuses."""
    return xp.where(values > 0.0, 1.0, xp.where(values < 0.0, -1.0, values))


def two_sum(xp: Namespace, a: Array, b: Array) -> tuple[Array, Array]:
    """Return a + b and what rounding took from it, 0 where that is not finite."""
    total = a + b
    part = total - a
    rest = (a - (total - part)) + (b - part)
    return total, xp.where(xp.isfinite(total), rest, 0.0)


def raised(
    xp: Namespace, value: Array, rest: Array, exponent: Array
) -> tuple[Array, Array]:
    """Return (value + rest) exp(exponent) for a small exponent."""
    more = xp.expm1(exponent)
    return two_sum(xp, value, rest + (value + rest) * more)


def log_abs(xp: Namespace, sums: Sums) -> tuple[Array, Array]:
    """Return scale and log |value + rest| of sums: -inf and 0 for empty ones."""
    total, left = normalised(xp, sums)
    is_zero = total == 0.0
    safe = xp.where(is_zero, 1.0, total)
    logarithm = xp.log(xp.abs(safe)) + left / safe
    is_infinite = xp.isinf(safe)
    logarithm = xp.where(is_infinite, math.inf, logarithm)
    return (
        xp.where(is_zero, -math.inf, sums.scale),
        xp.where(is_zero, 0.0, logarithm),
    )


def normalised(xp: Namespace, sums: Sums) -> tuple[Array, Array]:
    """Return value and rest of sums, the value rounded to the nearest number."""
    total = sums.value + sums.rest
    left = (sums.value - total) + sums.rest
    return total, xp.where(xp.isfinite(total), left, 0.0)


def over(xp: Namespace, numbers: Array, sums: Sums) -> Sums:
    """Return numbers / sums; 0 where either is, NaN over a sum that is not finite."""
    total, _ = normalised(xp, sums)
    counts = (numbers != 0.0) & (total != 0.0)
    is_finite = xp.isfinite(total)
    value = xp.where(is_finite, numbers / xp.where(total == 0.0, 1.0, total), math.nan)
    value = xp.where(counts, value, 0.0)
    scale = xp.where(counts & is_finite, -sums.scale, -math.inf)
    return Sums(scale, value, xp.zeros_like(value))


def product(xp: Namespace, left: Sums, right: Sums) -> Array:
    """Return the product of two sums as a number; 0 where either is."""
    a, _ = normalised(xp, left)
    b, _ = normalised(xp, right)
    value = a * b * xp.exp(left.scale + right.scale)
    return xp.where((a == 0.0) | (b == 0.0), 0.0, value)


def moved(xp: Namespace, sums: Sums, exponent: Array) -> Sums:
    """Return sums times exp(exponent); nothing is left where that is 0."""
    is_nothing = exponent == -math.inf
    return Sums(
        xp.where(is_nothing, -math.inf, sums.scale + exponent),
        xp.where(is_nothing, 0.0, sums.value),
        xp.where(is_nothing, 0.0, sums.rest),
    )


def total(xp: Namespace, sums: Sums, axis: int) -> Sums:
    """Return the sums over an axis."""
    if sums.scale.shape[axis] == 0:
        value = xp.sum(sums.value, axis=axis)
        return Sums(xp.full_like(value, -math.inf), value, value)
    scale = xp.max(sums.scale, axis=axis, keepdims=True)
    factor = power(xp, sums.scale, scale)
    value = xp.sum(sums.value * factor, axis=axis)
    rest = xp.sum(sums.rest * factor, axis=axis)
    scale = xp.squeeze(scale, axis=axis)
    return Sums(xp.where(value + rest == 0.0, -math.inf, scale), value, rest)


def split(xp: Namespace, value: Array, rest: Array, dtype: Any) -> tuple[Array, Array]:
    """Return value + rest as a number of a type and what rounding took from it."""
    total, left = two_sum(xp, value, rest)
    high = xp.astype(total, dtype)
    low = (total - xp.astype(high, total.dtype)) + left
    return high, xp.astype(xp.where(xp.isfinite(high), low, 0.0), dtype)


def scan(
    merge: Callable[[Any, Any], Any],
    elements: Any,
    borders: Array | None,
    xp: Namespace,
) -> Any:
    """Return all prefixes of elements under an associative merge, along the last axis.

    `elements` is a named tuple of arrays of one shape, `borders` (n,) is where a prefix
    starts anew. O(n log n) time, O(n) memory.
    """
    kind = type(elements)
    length = elements[0].shape[-1]
    shift = 1
    while shift < length:
        right = kind(*(part[..., shift:] for part in elements))
        merged = merge(kind(*(part[..., :-shift] for part in elements)), right)
        if borders is not None:
            merged = kind(
                *(
                    xp.where(borders[shift:], new, old)
                    for old, new in zip(merged, right, strict=True)
                )
            )
            borders = xp.concat(
                [borders[:shift], borders[shift:] | borders[:-shift]], axis=0
            )
        elements = kind(
            *(
                xp.concat([part[..., :shift], new], axis=-1)
                for part, new in zip(elements, merged, strict=True)
            )
        )
        shift *= 2
    return elements


def first_of_runs(xp: Namespace, segments: Array | None) -> Array | None:
    """Return where one run of equal numbers follows another, (n,); never at first."""
    if segments is None:
        return None
    none = xp.zeros(
        (min(segments.shape[0], 1),), dtype=xp.bool, device=device_of(segments)
    )
    return xp.concat([none, segments[1:] != segments[:-1]], axis=0)
