"""Scans in array-API code: prefix sums of exponentials and recurrences, in logarithms.

Prefixes are merged in log₂ n steps, as sums of any range; no branch depends on data. A
state is one more element before the first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from subquad._dispatch import Array, Namespace, device_of, namespace_of
from subquad._reference._common import primitive, wide_dtype
from subquad._reference._sums import (
    Sums,
    add,
    difference,
    first_of_runs,
    log_abs,
    moved,
    normalised,
    over,
    power,
    product,
    scan,
    signum,
    split,
    terms,
    two_sum,
)


@primitive
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
    """See `subquad.logcumsumexp`: outᵢ = log(e^state + Σ_{j ≤ i} exp xⱼ), or j < i."""
    run = _Run(x, segments, axis, reverse, exclusive)
    prefixes = run.prefixes(run.with_state(x, log_sum, remainder))
    scale, logarithm = log_abs(run.xp, prefixes)
    out = run.result(scale + logarithm, -math.inf)
    if not with_state:
        return out, None, None
    total, rest = two_sum(run.xp, scale[..., -1:], logarithm[..., -1:])
    log_sum, remainder = split(run.xp, total, rest, x.dtype)
    return out, run.lane(log_sum), run.lane(remainder)


@primitive
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
    """See `subquad.vjp.logcumsumexp`: gxⱼ = exp(xⱼ) Σᵢ gᵢ / Sᵢ over the sums that hold
    xⱼ.
    """
    run = _Run(x, segments, axis, reverse, exclusive)
    elements = run.with_state(x, log_sum, remainder)
    grads = run.gradients(grad, grad_final, elements.scale)
    shares = run.shares(run.prefixes(elements), grads)
    gradients = product(run.xp, elements, shares)
    return (
        run.back(gradients[..., 1:]) if needs[0] else None,
        run.lane(gradients[..., :1]) if needs[1] and log_sum is not None else None,
    )


@primitive
def logcumsumexp_jvp(
    x: Array,
    log_sum: Array | None,
    remainder: Array | None,
    segments: Array | None,
    axis: int,
    reverse: bool,
    exclusive: bool,
    tangent_x: Array | None,
    tangent_log_sum: Array | None,
) -> tuple[Array, Array]:
    """Return the tangents of outᵢ and of the final logarithm: Σⱼ tⱼ exp(xⱼ) / Sᵢ."""
    run = _Run(x, segments, axis, reverse, exclusive)
    elements = run.with_state(x, log_sum, remainder)
    tangents = run.join(tangent_x, tangent_log_sum, elements.scale)
    tangent = run.ratio(
        terms(run.xp, elements.scale, elements.value * tangents),
        run.prefixes(elements),
    )
    return run.result(tangent, 0.0), run.lane(tangent[..., -1:])


@primitive
def signed_logcumsumexp(
    x: Array, sign: Array, axis: int, reverse: bool, exclusive: bool
) -> tuple[Array, Array]:
    """See `subquad.signed_logcumsumexp`: log |Sᵢ| and the sign of
    Sᵢ = Σ_{j ≤ i} signⱼ exp(xⱼ), or j < i.
    """
    run = _Run(x, None, axis, reverse, exclusive)
    prefixes = run.prefixes(run.weighted(x, sign))
    scale, logarithm = log_abs(run.xp, prefixes)
    total, _ = normalised(run.xp, prefixes)
    return run.result(scale + logarithm, -math.inf), run.result(
        signum(run.xp, total), 0.0
    )


@primitive
def signed_logcumsumexp_vjp(
    x: Array,
    sign: Array,
    axis: int,
    reverse: bool,
    exclusive: bool,
    grad: Array,
    needs: tuple[bool, bool],
) -> tuple[Array | None, Array | None]:
    """See `subquad.vjp.signed_logcumsumexp`, with Gⱼ = exp(xⱼ) Σᵢ gᵢ / Sᵢ:
    gxⱼ = signⱼ Gⱼ;  g signⱼ = Gⱼ.
    """
    run = _Run(x, None, axis, reverse, exclusive)
    elements = run.weighted(x, sign)
    grads = run.gradients(grad, None, elements.scale)
    shares = run.shares(run.prefixes(elements), grads)
    gx = product(run.xp, elements, shares) if needs[0] else None
    gsign = None
    if needs[1]:
        unsigned = run.with_state(x, None, None)
        gsign = run.back(product(run.xp, unsigned, shares)[..., 1:])
    return None if gx is None else run.back(gx[..., 1:]), gsign


@primitive
def signed_logcumsumexp_jvp(
    x: Array,
    sign: Array,
    axis: int,
    reverse: bool,
    exclusive: bool,
    tangent_x: Array | None,
    tangent_sign: Array | None,
) -> Array:
    """Return the tangent of log |Sᵢ|: Σⱼ exp(xⱼ) (signⱼ txⱼ + t signⱼ) / Sᵢ."""
    run = _Run(x, None, axis, reverse, exclusive)
    weights = run.wide(sign)
    change = run.xp.zeros_like(weights)
    if tangent_x is not None:
        change = _times(run.xp, weights, run.wide(tangent_x))
    if tangent_sign is not None:
        change = change + run.wide(tangent_sign)
    changes = run.before(terms(run.xp, run.wide(x), change))
    tangent = run.ratio(changes, run.prefixes(run.weighted(x, sign)))
    return run.result(tangent, 0.0)


@primitive
def log_linear_recurrence(
    log_a: Array,
    log_b: Array,
    state: Array | None,
    segments: Array | None,
    axis: int,
    reverse: bool,
) -> Array:
    """See `subquad.log_linear_recurrence`: log hₜ, hₜ = exp(aₜ) hₜ₋₁ + exp(bₜ)."""
    run = _Run(log_b, segments, axis, reverse, False)
    return run.result(_recurrence(run, log_a, log_b, state).logs, -math.inf)


@primitive
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
    """See `subquad.vjp.log_linear_recurrence`, with pₜ the share of hₜ₋₁ in hₜ and
    Gₜ = gₜ + pₜ₊₁ Gₜ₊₁:  gaₜ = pₜ Gₜ;  gbₜ = (1 - pₜ) Gₜ;  g state = p₁ G₁.
    """
    run = _Run(log_b, segments, axis, reverse, False)
    xp = run.xp
    recurrence = _recurrence(run, log_a, log_b, state)
    grads = run.wide(grad)
    grads = xp.where(recurrence.is_empty, 0.0, grads)
    # Through a sum that is not finite passes no number, but 0 all the same.
    grads = xp.where(recurrence.is_infinite & (grads != 0.0), math.nan, grads)
    carried = xp.concat(
        [recurrence.kept[..., 1:], xp.zeros_like(grads[..., :1])], axis=-1
    )
    totals = xp.flip(
        scan(
            lambda left, right: _follow(xp, left, right),
            _Linear(xp.flip(carried, axis=-1), xp.flip(grads, axis=-1)),
            None,
            xp,
        ).value,
        axis=-1,
    )
    ga = _times(xp, recurrence.kept, totals)
    return (
        run.back(ga) if needs[0] else None,
        run.back(_times(xp, recurrence.added, totals)) if needs[1] else None,
        None if state is None or not needs[2] else run.lane(_first(xp, ga)),
    )


@primitive
def log_linear_recurrence_jvp(
    log_a: Array,
    log_b: Array,
    state: Array | None,
    segments: Array | None,
    axis: int,
    reverse: bool,
    tangent_a: Array | None,
    tangent_b: Array | None,
    tangent_state: Array | None,
) -> Array:
    """Return the tangent tₜ = pₜ (taₜ + tₜ₋₁) + (1 - pₜ) tbₜ."""
    run = _Run(log_b, segments, axis, reverse, False)
    xp = run.xp
    recurrence = _recurrence(run, log_a, log_b, state)
    zeros = xp.zeros_like(recurrence.kept)
    ta = zeros if tangent_a is None else run.wide(tangent_a)
    tb = zeros if tangent_b is None else run.wide(tangent_b)
    ta = _times(xp, recurrence.kept, ta)
    tb = _times(xp, recurrence.added, tb)
    change = xp.where(
        recurrence.is_infinite & ((ta != 0.0) | (tb != 0.0)), math.nan, ta + tb
    )
    start = run.edge(tangent_state, 0.0, recurrence.kept)
    elements = _Linear(
        xp.concat([xp.zeros_like(start), recurrence.kept], axis=-1),
        xp.concat([start, change], axis=-1),
    )
    tangent = scan(
        lambda left, right: _follow(xp, left, right), elements, None, xp
    ).value
    tangent = xp.where(
        recurrence.is_infinite & (tangent[..., 1:] != 0.0), math.nan, tangent[..., 1:]
    )
    return run.back(xp.where(recurrence.is_empty, 0.0, tangent))


class _Run:
    """How a scan goes: along the last axis, forwards, in the wide type, with one more
    element, the state, before the first.
    """

    def __init__(
        self,
        x: Array,
        segments: Array | None,
        axis: int,
        reverse: bool,
        exclusive: bool,
    ) -> None:
        self.xp: Namespace = namespace_of(x)
        self.dtype = x.dtype
        self.wide_dtype = wide_dtype(self.xp, x)
        self.axis = axis
        self.reverse = reverse
        self.exclusive = exclusive
        if segments is not None and reverse:
            segments = self.xp.flip(segments, axis=0)
        self.firsts = first_of_runs(self.xp, segments)
        self.borders: Array | None = None
        if self.firsts is not None:
            never = self.xp.zeros((1,), dtype=self.xp.bool, device=device_of(x))
            self.borders = self.xp.concat([never, self.firsts], axis=0)

    def wide(self, array: Array) -> Array:
        """Return an array as the scan sees it."""
        moved = self.xp.moveaxis(array, self.axis, -1)
        if self.reverse:
            moved = self.xp.flip(moved, axis=-1)
        return self.xp.astype(moved, self.wide_dtype)

    def back(self, array: Array) -> Array:
        """Return an array as the caller sees it."""
        if self.reverse:
            array = self.xp.flip(array, axis=-1)
        return self.xp.astype(self.xp.moveaxis(array, -1, self.axis), self.dtype)

    def lane(self, entries: Array) -> Array:
        """Return single entries (lanes..., 1) as the caller sees a state."""
        # Indices would make numbers of NumPy's arrays.
        entries = self.xp.reshape(entries, entries.shape[:-1])
        return self.xp.astype(entries, self.dtype)

    def edge(self, values: Array | None, default: float, like: Array) -> Array:
        """Return a state's values, (lanes..., 1)."""
        if values is None:
            return self.xp.full(
                (*like.shape[:-1], 1),
                default,
                dtype=self.wide_dtype,
                device=device_of(like),
            )
        return self.xp.astype(values, self.wide_dtype)[..., None]

    def before(self, elements: Sums) -> Sums:
        """Return elements with an empty one before the first."""
        edge = self.edge(None, 0.0, elements.scale)
        return Sums(
            self.xp.concat([edge - math.inf, elements.scale], axis=-1),
            self.xp.concat([edge, elements.value], axis=-1),
            self.xp.concat([edge, elements.rest], axis=-1),
        )

    def weighted(self, x: Array, weights: Array) -> Sums:
        """Return weights · exp(x) after an empty state."""
        return self.before(terms(self.xp, self.wide(x), self.wide(weights)))

    def with_state(
        self, x: Array, log_sum: Array | None, remainder: Array | None
    ) -> Sums:
        """Return exp(x) after a state."""
        xp = self.xp
        exponents = self.wide(x)
        start = self.edge(log_sum, -math.inf, exponents)
        exponents = xp.concat([start, exponents], axis=-1)
        sums = terms(xp, exponents, xp.ones_like(exponents))
        if remainder is None:
            return sums
        # In the value itself e^remainder - 1 would be rounded away.
        more = xp.expm1(self.edge(remainder, 0.0, exponents))
        more = xp.where(xp.isfinite(start), more, 0.0)
        return sums._replace(
            rest=xp.concat([more, xp.zeros_like(sums.rest[..., 1:])], axis=-1)
        )

    def join(self, values: Array | None, start: Array | None, like: Array) -> Array:
        """Return values of the elements after that of the state; 0 for none."""
        rest = (
            self.xp.zeros_like(like[..., 1:]) if values is None else self.wide(values)
        )
        return self.xp.concat([self.edge(start, 0.0, rest), rest], axis=-1)

    def prefixes(self, elements: Sums) -> Sums:
        """Return the sums over each element and those before it in its run."""
        result: Sums = scan(
            lambda left, right: add(self.xp, left, right),
            elements,
            self.borders,
            self.xp,
        )
        return result

    def result(self, values: Array, empty: float) -> Array:
        """Return what the scan gives of the values of all prefixes."""
        if not self.exclusive:
            return self.back(values[..., 1:])
        values = values[..., :-1]
        if self.firsts is not None:
            values = self.xp.where(self.firsts, empty, values)
        return self.back(values)

    def gradients(
        self, grad: Array | None, grad_final: Array | None, like: Array
    ) -> Array:
        """Return the gradient of each prefix."""
        nothing = self.xp.zeros_like(like[..., :1])
        values = self.xp.zeros_like(like[..., 1:]) if grad is None else self.wide(grad)
        if not self.exclusive:
            grads = self.xp.concat([nothing, values], axis=-1)
        else:
            if self.firsts is not None:
                values = self.xp.where(self.firsts, 0.0, values)
            grads = self.xp.concat([values, nothing], axis=-1)
        if grad_final is None:
            return grads
        final = grads[..., -1:] + self.edge(grad_final, 0.0, values)
        return self.xp.concat([grads[..., :-1], final], axis=-1)

    def shares(self, prefixes: Sums, grads: Array) -> Sums:
        """Return Σᵢ gᵢ / Sᵢ over the sums that hold each element."""
        xp = self.xp
        elements = over(xp, grads, prefixes)
        borders = self.borders
        if borders is not None:
            borders = xp.flip(
                xp.concat([borders[1:], xp.zeros_like(borders[:1])], axis=0), axis=0
            )
        found = scan(
            lambda left, right: add(xp, left, right),
            Sums(*(xp.flip(part, axis=-1) for part in elements)),
            borders,
            xp,
        )
        return Sums(*(xp.flip(part, axis=-1) for part in found))

    def ratio(self, changes: Sums, prefixes: Sums) -> Array:
        """Return prefix sums of changes over those of elements, 0 over empty ones."""
        xp = self.xp
        changed = self.prefixes(changes)
        total, _ = normalised(xp, prefixes)
        change, _ = normalised(xp, changed)
        is_finite = xp.isfinite(total)
        tangent = change / xp.where(total == 0.0, 1.0, total)
        tangent = tangent * power(xp, changed.scale, prefixes.scale)
        tangent = xp.where(is_finite, tangent, math.nan)
        return xp.where((change == 0.0) | (total == 0.0), 0.0, tangent)


class _Linear(NamedTuple):
    """Maps h ↦ factor · h + value."""

    factor: Array
    value: Array


class _LogLinear(NamedTuple):
    """Maps h ↦ exp(log_factor) h + sum."""

    log_factor: Array
    scale: Array
    value: Array
    rest: Array


class _Recurrence(NamedTuple):
    """States of a recurrence and what they are made of.

    logs: log h with the state that went in before the first. kept, added: the shares of
    the state before and of the entry in the state after, 0 where this is empty.
    """

    logs: Array
    kept: Array
    added: Array
    is_empty: Array
    is_infinite: Array


def _recurrence(
    run: _Run, log_a: Array, log_b: Array, state: Array | None
) -> _Recurrence:
    xp = run.xp
    factors, exponents = run.wide(log_a), run.wide(log_b)
    if run.firsts is not None:
        factors = xp.where(run.firsts, -math.inf, factors)
    start = run.edge(state, -math.inf, exponents)
    if state is None and exponents.shape[-1] > 0:
        nothing = xp.full_like(factors[..., :1], -math.inf)
        factors = xp.concat([nothing, factors[..., 1:]], axis=-1)
    exponents = xp.concat([start, exponents], axis=-1)
    sums = terms(xp, exponents, xp.ones_like(exponents))
    elements = _LogLinear(
        xp.concat([xp.zeros_like(start), factors], axis=-1),
        sums.scale,
        sums.value,
        sums.rest,
    )
    found = scan(
        lambda left, right: _follow_log_linear(xp, left, right), elements, None, xp
    )
    scale, logarithm = log_abs(xp, Sums(*found[1:]))
    logs = scale + logarithm
    before, after = logs[..., :-1], logs[..., 1:]
    entry = exponents[..., 1:]
    is_reset = factors == -math.inf
    is_empty = after == -math.inf
    is_infinite = ~xp.isfinite(after) & ~is_empty
    odds = difference(xp, xp.where(is_reset, -math.inf, factors + before), entry)
    kept, added = _sigmoid(xp, odds), _sigmoid(xp, -odds)
    kept = xp.where(is_infinite, 1.0, kept)
    added = xp.where(is_infinite, 1.0, added)
    return _Recurrence(
        logs,
        xp.where(is_empty | is_reset | (before == -math.inf), 0.0, kept),
        xp.where(is_empty | (entry == -math.inf), 0.0, added),
        is_empty,
        is_infinite,
    )


def _sigmoid(xp: Namespace, values: Array) -> Array:
    small = xp.exp(-xp.abs(values))
    return xp.where(values < 0.0, small, 1.0) / (1.0 + small)


def _follow_log_linear(
    xp: Namespace, left: _LogLinear, right: _LogLinear
) -> _LogLinear:
    is_reset = (left.log_factor == -math.inf) | (right.log_factor == -math.inf)
    factor = xp.where(is_reset, -math.inf, left.log_factor + right.log_factor)
    earlier = moved(xp, Sums(*left[1:]), right.log_factor)
    return _LogLinear(factor, *add(xp, earlier, Sums(*right[1:])))


def _follow(xp: Namespace, left: _Linear, right: _Linear) -> _Linear:
    return _Linear(
        left.factor * right.factor,
        right.value + _times(xp, right.factor, left.value),
    )


def _times(xp: Namespace, factor: Array, value: Array) -> Array:
    """Return factor · value, 0 where either is, whatever the other."""
    return xp.where((factor == 0.0) | (value == 0.0), 0.0, factor * value)


def _first(xp: Namespace, values: Array) -> Array:
    """Return the first of values, through which a state acts; 0 if there is none."""
    if values.shape[-1] == 0:
        return xp.sum(values, axis=-1, keepdims=True)
    return values[..., :1]
