"""Scans of Dask arrays: sums of chunks, their prefixes, then a scan of each chunk.

The sums of all chunks are found at once, a tree merges them into what comes before each
chunk, and all chunks are scanned from there at once. Reverses go the same way: the
gradient that later chunks send back through a chunk is linear in what reaches its end,
so that a tree finds what reaches each chunk. Only that tree goes in order, log₂ of the
number of chunks deep.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from subquad._backends.dask.common import (
    Array,
    Index,
    Part,
    blockwise,
    cut_alike,
    entering,
    given,
    kernels,
    one_thread,
    part_of,
    pick,
    prefixes,
    quiet,
)
from subquad._dispatch import namespace_of
from subquad._reference._common import wide_dtype
from subquad._reference._sums import (
    Sums,
    add,
    log_abs,
    moved,
    power,
    split,
    terms,
    total,
    two_sum,
)
from subquad._reference.states import merge_log_sums


class _Linear(NamedTuple):
    """The map h ↦ factor · h + value."""

    factor: Array
    value: Array


class _Decayed(NamedTuple):
    """The map h ↦ exp(log_factor) h + sums."""

    log_factor: Array
    sums: Sums


class _Signed(NamedTuple):
    """Signed sums, and the largest exponent that took part."""

    peak: Array
    sums: Sums


class _Pull(NamedTuple):
    """exp(peak) Σᵢ gᵢ / Sᵢ, where no exponent before exceeds the peak."""

    peak: Array
    value: Array


# -------- logcumsumexp


def logcumsumexp(
    x: Array,
    log_sum: Array | None,
    remainder: Array | None,
    segments: Array | None,
    axis: int,
    reverse: bool,
    exclusive: bool,
    with_state: bool,
    /,
) -> tuple[Array, Array | None, Array | None]:
    """See `subquad.logcumsumexp`: parallel over all chunks."""
    lanes, index = _indices(x, axis)
    x, segments, log_sum, remainder = _cut(
        [(x, index), (segments, ("n",)), (log_sum, lanes), (remainder, lanes)]
    )
    parts, entries, end = _log_sums(
        x, segments, log_sum, remainder, axis, reverse, lanes, index
    )
    del parts
    out = blockwise(
        functools.partial(
            _logcumsumexp_block, axis=axis, reverse=reverse, exclusive=exclusive
        ),
        index,
        [(x, index), (segments, ("n",)), (entries, index)],
        x.dtype,
    )
    if not with_state:
        return out, None, None
    sums = blockwise(_sums_of, lanes, [(end, lanes)], x.dtype)
    return out, pick(sums, 0, lanes, lanes), pick(sums, 1, lanes, lanes)


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
    /,
) -> tuple[Array | None, Array | None]:
    """See `subquad.vjp.logcumsumexp`: parallel over all chunks, which are scanned
    twice backwards.
    """
    lanes, index = _indices(x, axis)
    has_state = log_sum is not None
    x, segments, grad, log_sum, remainder, grad_final = _cut(
        [
            (x, index),
            (segments, ("n",)),
            (grad, index),
            (log_sum, lanes),
            (remainder, lanes),
            (grad_final, lanes),
        ]
    )
    parts, entries, _ = _log_sums(
        x, segments, log_sum, remainder, axis, reverse, lanes, index
    )
    inputs = [
        (x, index),
        (segments, ("n",)),
        (grad, index),
        (parts, index),
        (entries, index),
    ]
    options: dict[str, Any] = {"axis": axis, "reverse": reverse}
    options["exclusive"] = exclusive
    maps = blockwise(
        functools.partial(_log_sums_pull, **options), index, inputs, x.dtype
    )
    reaching, start = _pulled(maps, grad_final, axis, reverse, lanes)
    gx = None
    if needs[0]:
        gx = blockwise(
            functools.partial(_logcumsumexp_vjp_block, **options),
            index,
            [*inputs, (reaching, index)],
            x.dtype,
        )
    return gx, _narrow(start, axis, lanes, x) if needs[1] and has_state else None


def _log_sums(
    x: Array,
    segments: Array | None,
    log_sum: Array | None,
    remainder: Array | None,
    axis: int,
    reverse: bool,
    lanes: Index,
    index: Index,
) -> tuple[Array, Array, Array]:
    """Return the parts of all chunks, what comes before each, and all of them."""
    parts = blockwise(
        functools.partial(_log_sums_part, axis=axis, reverse=reverse),
        index,
        [(x, index), (segments, ("n",))],
        x.dtype,
    )
    start = None
    if log_sum is not None:
        state = [(log_sum, lanes), (remainder, lanes)]
        start = blockwise(_log_sums_given, lanes, state, x.dtype)
    return parts, *prefixes(parts, axis, merge_log_sums_of, start, reverse)


def _log_sums_part(x: Array, segments: Array, *, axis: int, reverse: bool) -> Part:
    with one_thread():
        _, *sums = kernels(x).logcumsumexp(
            x, None, None, segments, axis, reverse, False, True
        )
    return part_of(segments, x.shape[axis], reverse, tuple(sums))


def _log_sums_given(log_sum: Array, remainder: Array) -> Part:
    if remainder is None:
        remainder = namespace_of(log_sum).zeros_like(log_sum)
    return given((log_sum, remainder))


def merge_log_sums_of(
    left: tuple[Array, Array], right: tuple[Array, Array]
) -> tuple[Array, Array]:
    return merge_log_sums(*left, *right)


def _logcumsumexp_block(
    x: Array,
    segments: Array,
    entry: Part | None,
    *,
    axis: int,
    reverse: bool,
    exclusive: bool,
) -> Array:
    part = part_of(segments, x.shape[axis], reverse, None)
    state = entering(entry, part) or (None, None)
    with one_thread():
        return kernels(x).logcumsumexp(
            x, *state, segments, axis, reverse, exclusive, False
        )[0]


def _log_sums_pull(
    x: Array,
    segments: Array,
    grad: Array,
    part: Part,
    entry: Part | None,
    *,
    axis: int,
    reverse: bool,
    exclusive: bool,
) -> Part:
    """Return the gradient in what a chunk begins with, of that in what it ends with."""
    sums = entering(entry, part)
    if sums is None:
        return part._replace(breaks=False, sums=_nothing_of(_kept(part.sums[0], axis)))
    value = None
    if grad is not None:
        with one_thread():
            _, value = kernels(x).logcumsumexp_vjp(
                x, *sums, segments, axis, reverse, exclusive, grad, None, (False, True)
            )
    end = None if part.breaks else merge_log_sums_of(sums, part.sums)
    return _same_run(part, _share(sums, end, value, axis))


@quiet
def _share(
    sums: tuple[Array, Array],
    end: tuple[Array, Array] | None,
    value: Array | None,
    axis: int,
) -> _Linear:
    """Return the map with the share of a sum in one that holds it as its factor."""
    log_sum, remainder = (_kept(part, axis) for part in sums)
    xp = namespace_of(log_sum)
    dtype = wide_dtype(xp, log_sum)
    nothing = xp.zeros_like(log_sum, dtype=dtype)
    value = nothing if value is None else xp.astype(_kept(value, axis), dtype)
    if end is None:
        return _Linear(nothing, value)
    final, rest = (xp.astype(_kept(part, axis), dtype) for part in end)
    log_sum, remainder = xp.astype(log_sum, dtype), xp.astype(remainder, dtype)
    factor = xp.exp((log_sum - final) + (remainder - rest))
    factor = xp.where(xp.isfinite(final), factor, math.nan)
    return _Linear(xp.where(log_sum == -math.inf, 0.0, factor), value)


def _logcumsumexp_vjp_block(
    x: Array,
    segments: Array,
    grad: Array,
    part: Part,
    entry: Part | None,
    reaching: Part | None,
    *,
    axis: int,
    reverse: bool,
    exclusive: bool,
) -> Array:
    xp = namespace_of(x)
    state = entering(entry, part) or (None, None)
    final = None
    if reaching is not None:
        final = xp.squeeze(xp.astype(reaching.sums.value, x.dtype), axis=axis)
    with one_thread():
        return kernels(x).logcumsumexp_vjp(
            x, *state, segments, axis, reverse, exclusive, grad, final, (True, False)
        )[0]


# -------- signed_logcumsumexp


def signed_logcumsumexp(
    x: Array, sign: Array, axis: int, reverse: bool, exclusive: bool, /
) -> tuple[Array, Array]:
    """See `subquad.signed_logcumsumexp`: parallel over all chunks."""
    lanes, index = _indices(x, axis)
    del lanes
    x, sign = _cut([(x, index), (sign, index)])
    _, entries = _signed_sums(x, sign, axis, reverse, index)
    results = blockwise(
        functools.partial(
            _signed_block, axis=axis, reverse=reverse, exclusive=exclusive
        ),
        index,
        [(x, index), (sign, index), (entries, index)],
        x.dtype,
    )
    return pick(results, 0, index, index), pick(results, 1, index, index)


def signed_logcumsumexp_vjp(
    x: Array,
    sign: Array,
    axis: int,
    reverse: bool,
    exclusive: bool,
    grad: Array,
    needs: tuple[bool, bool],
    /,
) -> tuple[Array | None, Array | None]:
    """See `subquad.vjp.signed_logcumsumexp`: parallel over all chunks."""
    _, index = _indices(x, axis)
    x, sign, grad = _cut([(x, index), (sign, index), (grad, index)])
    parts, entries = _signed_sums(x, sign, axis, reverse, index)
    own = blockwise(
        functools.partial(
            _signed_pull, axis=axis, reverse=reverse, exclusive=exclusive
        ),
        index,
        [(x, index), (sign, index), (grad, index), (parts, index), (entries, index)],
        x.dtype,
    )
    pulls = pick(own, 2, index, index)
    reaching, _ = prefixes(pulls, axis, _merge_pulls, None, not reverse)
    results = blockwise(
        _signed_vjp_block,
        index,
        [(x, index), (sign, index), (own, index), (reaching, index)],
        x.dtype,
    )
    return (
        pick(results, 0, index, index) if needs[0] else None,
        pick(results, 1, index, index) if needs[1] else None,
    )


def _signed_sums(
    x: Array, sign: Array, axis: int, reverse: bool, index: Index
) -> tuple[Array, Array]:
    parts = blockwise(
        functools.partial(_signed_part, axis=axis),
        index,
        [(x, index), (sign, index)],
        x.dtype,
    )
    return parts, prefixes(parts, axis, _merge_signed, None, reverse)[0]


@quiet
def _signed_part(x: Array, sign: Array, *, axis: int) -> Part:
    xp = namespace_of(x)
    exponents, weights = _wide(x), _wide(sign)
    # Sums keep the axis: NumPy makes numbers of what has no dimension.
    elements = terms(xp, exponents, weights)
    sums = total(xp, Sums(*(xp.expand_dims(e, axis=axis) for e in elements)), axis + 1)
    finite = xp.where(xp.isfinite(exponents), exponents, -math.inf)
    peak = sums.scale
    if x.shape[axis]:
        peak = xp.max(finite, axis=axis, keepdims=True)
    return part_of(None, x.shape[axis], False, _Signed(peak, sums))


@quiet
def _merge_signed(left: _Signed, right: _Signed) -> _Signed:
    xp = namespace_of(left.peak)
    return _Signed(xp.maximum(left.peak, right.peak), add(xp, left.sums, right.sums))


@quiet
def _signed_block(
    x: Array,
    sign: Array,
    entry: Part | None,
    *,
    axis: int,
    reverse: bool,
    exclusive: bool,
) -> tuple[Array, ...]:
    exponents, weights, count = _after_signed(x, sign, entry, axis, reverse)
    with one_thread():
        results = kernels(x).signed_logcumsumexp(
            exponents, weights, axis, reverse, exclusive
        )
    xp = namespace_of(x)
    return tuple(
        xp.astype(_without(part, count, axis, reverse), x.dtype, copy=False)
        for part in results
    )


def _after_signed(
    x: Array, sign: Array, entry: Part | None, axis: int, reverse: bool
) -> tuple[Array, Array, int]:
    """Return a chunk after entries that amount to what came before, and their number.

    The first of them has weight 0 and the largest exponent before: its gradient is
    what the chunk sends back.
    """
    if entry is None:
        return x, sign, 0
    xp = namespace_of(x)
    peak, sums = _finite(entry.sums.peak), entry.sums.sums
    exponents, weights = (
        xp.concat(parts[::-1] if reverse else parts, axis=axis)
        for parts in (
            [peak, sums.scale, sums.scale],
            [xp.zeros_like(peak), sums.value, sums.rest],
        )
    )
    return (
        _with(exponents, _wide(x), axis, reverse),
        _with(weights, _wide(sign), axis, reverse),
        3,
    )


@quiet
def _signed_pull(
    x: Array,
    sign: Array,
    grad: Array,
    part: Part,
    entry: Part | None,
    *,
    axis: int,
    reverse: bool,
    exclusive: bool,
) -> tuple[Array, Array, Part]:
    """Return the gradients within a chunk, and what it sends back."""
    xp = namespace_of(x)
    exponents, weights, count = _after_signed(x, sign, entry, axis, reverse)
    grads = _wide(grad) if count else grad
    if count:
        nothing = xp.zeros_like(_first(exponents, count, axis, reverse))
        grads = _with(nothing, grads, axis, reverse)
    with one_thread():
        gx, gsign = kernels(x).signed_logcumsumexp_vjp(
            exponents, weights, axis, reverse, exclusive, grads, (True, True)
        )
    if count:
        assert entry is not None
        sent = _first(gsign, 1, axis, reverse)
        pull = _Pull(_finite(entry.sums.peak), sent)
        gx, gsign = (_without(g, count, axis, reverse) for g in (gx, gsign))
    else:
        nothing = xp.zeros_like(part.sums.peak)
        pull = _Pull(nothing, nothing)
    return gx, gsign, part._replace(sums=pull)


@quiet
def _merge_pulls(later: _Pull, earlier: _Pull) -> _Pull:
    xp = namespace_of(later.value)
    more = _times(xp, later.value, xp.exp(earlier.peak - later.peak))
    return _Pull(earlier.peak, earlier.value + more)


@quiet
def _signed_vjp_block(
    x: Array,
    sign: Array,
    own: tuple[Array, Array, Part],
    reaching: Part | None,
) -> tuple[Array, Array]:
    xp = namespace_of(x)
    gx, gsign, _ = own
    if reaching is not None:
        peak, value = reaching.sums
        more = _times(xp, value, xp.exp(_wide(x) - peak))
        gx, gsign = gx + _times(xp, _wide(sign), more), gsign + more
    return xp.astype(gx, x.dtype, copy=False), xp.astype(gsign, x.dtype, copy=False)


# -------- log_linear_recurrence


def log_linear_recurrence(
    log_a: Array,
    log_b: Array,
    state: Array | None,
    segments: Array | None,
    axis: int,
    reverse: bool,
    /,
) -> Array:
    """See `subquad.log_linear_recurrence`: parallel over all chunks."""
    lanes, index = _indices(log_b, axis)
    log_b, log_a, segments, state = _cut(
        [(log_b, index), (log_a, index), (segments, ("n",)), (state, lanes)]
    )
    inputs = [(log_a, index), (log_b, index), (segments, ("n",))]
    _, entries, _ = _decayed_sums(inputs, state, axis, reverse, lanes)
    return blockwise(
        functools.partial(_recurrence_block, axis=axis, reverse=reverse),
        index,
        [*inputs, (entries, index)],
        log_b.dtype,
    )


def log_linear_recurrence_vjp(
    log_a: Array,
    log_b: Array,
    state: Array | None,
    segments: Array | None,
    axis: int,
    reverse: bool,
    grad: Array,
    needs: tuple[bool, bool, bool],
    /,
) -> tuple[Array | None, Array | None, Array | None]:
    """See `subquad.vjp.log_linear_recurrence`: parallel over all chunks, which are gone
    through twice backwards.
    """
    lanes, index = _indices(log_b, axis)
    has_state = state is not None
    log_b, log_a, segments, grad, state = _cut(
        [
            (log_b, index),
            (log_a, index),
            (segments, ("n",)),
            (grad, index),
            (state, lanes),
        ]
    )
    inputs = [(log_a, index), (log_b, index), (segments, ("n",))]
    parts, entries, _ = _decayed_sums(inputs, state, axis, reverse, lanes)
    inputs += [(grad, index), (parts, index), (entries, index)]
    maps = blockwise(
        functools.partial(_recurrence_pull, axis=axis, reverse=reverse),
        index,
        inputs,
        log_b.dtype,
    )
    reaching, start = _pulled(maps, None, axis, reverse, lanes)
    results = blockwise(
        functools.partial(
            _recurrence_vjp_block, axis=axis, reverse=reverse, needs=needs[:2]
        ),
        index,
        [*inputs, (reaching, index)],
        log_b.dtype,
    )
    return (
        pick(results, 0, index, index) if needs[0] else None,
        pick(results, 1, index, index) if needs[1] else None,
        _narrow(start, axis, lanes, log_b) if needs[2] and has_state else None,
    )


def _decayed_sums(
    inputs: list[tuple[Array | None, Index]],
    state: Array | None,
    axis: int,
    reverse: bool,
    lanes: Index,
) -> tuple[Array, Array, Array]:
    log_a: Any
    log_a, index = inputs[0]
    dtype = log_a.dtype
    function = functools.partial(_decayed_part, axis=axis, reverse=reverse)
    parts = blockwise(function, index, inputs, dtype)
    start = None
    if state is not None:
        function = functools.partial(_decayed_given, axis=axis)
        start = blockwise(function, lanes, [(state, lanes)], dtype)
    return parts, *prefixes(parts, axis, _merge_decayed, start, reverse)


@quiet
def _decayed_part(
    log_a: Array, log_b: Array, segments: Array, *, axis: int, reverse: bool
) -> Part:
    xp = namespace_of(log_a)
    factors = _wide(log_a)
    forgets = xp.any(factors == -math.inf, axis=axis, keepdims=True)
    total_factor = xp.sum(factors, axis=axis, keepdims=True)
    factor = xp.where(forgets, -math.inf, total_factor)
    if log_a.shape[axis] == 0:
        logs = xp.full_like(factor, -math.inf)
    else:
        with one_thread():
            out = kernels(log_a).log_linear_recurrence(
                factors, _wide(log_b), None, segments, axis, reverse
            )
        logs = _first(out, 1, axis, not reverse)
    sums = _Decayed(factor, terms(xp, logs, xp.ones_like(logs)))
    return part_of(segments, log_a.shape[axis], reverse, sums)


@quiet
def _decayed_given(state: Array, *, axis: int) -> Part:
    xp = namespace_of(state)
    logs = xp.expand_dims(_wide(state), axis=axis)
    sums = terms(xp, logs, xp.ones_like(logs))
    return given(_Decayed(xp.zeros_like(logs), sums))


@quiet
def _merge_decayed(left: _Decayed, right: _Decayed) -> _Decayed:
    xp = namespace_of(left.log_factor)
    forgets = (left.log_factor == -math.inf) | (right.log_factor == -math.inf)
    factor = xp.where(forgets, -math.inf, left.log_factor + right.log_factor)
    earlier = moved(xp, left.sums, right.log_factor)
    return _Decayed(factor, add(xp, earlier, right.sums))


@quiet
def _recurrence_block(
    log_a: Array,
    log_b: Array,
    segments: Array,
    entry: Part | None,
    *,
    axis: int,
    reverse: bool,
) -> Array:
    part = part_of(segments, log_a.shape[axis], reverse, None)
    arguments, count = _after_decayed(
        log_a, log_b, segments, entering(entry, part), axis, reverse
    )
    with one_thread():
        out = kernels(log_a).log_linear_recurrence(*arguments, axis, reverse)
    return _without(out, count, axis, reverse)


def _after_decayed(
    log_a: Array,
    log_b: Array,
    segments: Array | None,
    sums: _Decayed | None,
    axis: int,
    reverse: bool,
) -> tuple[tuple[Array | None, ...], int]:
    """Return factors, terms, state and segments of a chunk after what came before.

    The state is a rounded logarithm; what rounding took from it is a first factor.
    """
    if sums is None:
        return (log_a, log_b, None, segments), 0
    xp = namespace_of(log_a)
    scale, logarithm = log_abs(xp, sums.sums)
    state, rest = split(xp, *two_sum(xp, scale, logarithm), log_a.dtype)
    state = xp.squeeze(state, axis=axis)
    if log_a.shape[axis] == 0:
        segments = None
    if segments is not None:
        edge = segments[-1:] if reverse else segments[:1]
        segments = _with(edge, segments, 0, reverse)
    return (
        _with(rest, log_a, axis, reverse),
        _with(xp.full_like(rest, -math.inf), log_b, axis, reverse),
        state,
        segments,
    ), 1


@quiet
def _recurrence_pull(
    log_a: Array,
    log_b: Array,
    segments: Array,
    grad: Array,
    part: Part,
    entry: Part | None,
    *,
    axis: int,
    reverse: bool,
) -> Part:
    """Return the gradient in what a chunk begins with, of that in what it ends with."""
    xp = namespace_of(log_a)
    sums = entering(entry, part)
    if sums is None:
        return _same_run(part, _nothing_of(part.sums.log_factor))
    value = _recurrence_reverse(
        log_a, log_b, segments, grad, sums, axis, reverse, (False, False, True)
    )[2]
    value = xp.expand_dims(_wide(value), axis=axis)
    if part.breaks:
        return _same_run(part, _Linear(xp.zeros_like(sums.log_factor), value))
    kept = moved(xp, sums.sums, part.sums.log_factor)
    end = add(xp, kept, part.sums.sums)
    (kept_scale, kept_log), (scale, logarithm) = log_abs(xp, kept), log_abs(xp, end)
    factor = xp.exp(kept_log - logarithm) * power(xp, kept_scale, scale)
    # Gradients that reach what is not finite are 0 or NaN, which any number keeps.
    factor = xp.where(xp.isfinite(scale + logarithm), factor, 1.0)
    factor = xp.where(kept_scale == -math.inf, 0.0, factor)
    return _same_run(part, _Linear(factor, value))


@quiet
def _recurrence_vjp_block(
    log_a: Array,
    log_b: Array,
    segments: Array,
    grad: Array,
    part: Part,
    entry: Part | None,
    reaching: Part | None,
    *,
    axis: int,
    reverse: bool,
    needs: tuple[bool, bool],
) -> tuple[Array | None, Array | None]:
    xp = namespace_of(log_a)
    if reaching is not None and log_a.shape[axis]:
        last = _first(grad, 1, axis, not reverse)
        last = xp.astype(last + reaching.sums.value, grad.dtype)
        grad = _with(last, _without(grad, 1, axis, not reverse), axis, not reverse)
    ga, gb, _ = _recurrence_reverse(
        log_a,
        log_b,
        segments,
        grad,
        entering(entry, part),
        axis,
        reverse,
        (*needs, False),
    )
    return ga, gb


def _recurrence_reverse(
    log_a: Array,
    log_b: Array,
    segments: Array | None,
    grad: Array,
    sums: _Decayed | None,
    axis: int,
    reverse: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Array | None, Array | None, Array | None]:
    arguments, count = _after_decayed(log_a, log_b, segments, sums, axis, reverse)
    if count:
        nothing = namespace_of(grad).zeros_like(
            _first(arguments[0], count, axis, reverse)
        )
        grad = _with(nothing, grad, axis, reverse)
    with one_thread():
        ga, gb, gs = kernels(log_a).log_linear_recurrence_vjp(
            *arguments, axis, reverse, grad, needs
        )
    ga, gb = (
        None if g is None else _without(g, count, axis, reverse) for g in (ga, gb)
    )
    return ga, gb, gs


# -------- what they share


def _indices(x: Array, axis: int) -> tuple[Index, Index]:
    lanes = tuple(f"l{place}" for place in range(x.ndim - 1))
    return lanes, (*lanes[:axis], "n", *lanes[axis:])


def _cut(inputs: list[tuple[Array | None, Index]]) -> list[Array | None]:
    return [array for array, _ in cut_alike(inputs)]


def _pulled(
    maps: Array, grad_final: Array | None, axis: int, reverse: bool, lanes: Index
) -> tuple[Array, Array]:
    """Return the gradients that reach the end of each chunk, and the start of all."""
    start = None
    if grad_final is not None:
        function = functools.partial(_given_gradient, axis=axis)
        start = blockwise(function, lanes, [(grad_final, lanes)], maps.dtype)
    return prefixes(maps, axis, _follow, start, not reverse)


@quiet
def _given_gradient(grad: Array, *, axis: int) -> Part:
    xp = namespace_of(grad)
    value = xp.expand_dims(_wide(grad), axis=axis)
    return given(_Linear(xp.zeros_like(value), value))


@quiet
def _follow(later: _Linear, earlier: _Linear) -> _Linear:
    xp = namespace_of(later.value)
    return _Linear(
        _times(xp, later.factor, earlier.factor),
        earlier.value + _times(xp, earlier.factor, later.value),
    )


def _nothing_of(like: Array) -> _Linear:
    xp = namespace_of(like)
    nothing = xp.zeros_like(like, dtype=wide_dtype(xp, like))
    return _Linear(nothing, nothing)


def _same_run(part: Part, linear: _Linear) -> Part:
    """Return the part of a map: borders are in its factors already."""
    is_empty = part.first is None
    return Part(None, None, False, linear) if is_empty else Part(0, 0, False, linear)


def _narrow(end: Array, axis: int, lanes: Index, like: Array) -> Array:
    function = functools.partial(_value_as, axis=axis, dtype=like.dtype)
    return blockwise(function, lanes, [(end, lanes)], like.dtype)


def _value_as(part: Part, *, axis: int, dtype: Any) -> Array:
    value = part.sums.value
    xp = namespace_of(value)
    return xp.squeeze(xp.astype(value, dtype), axis=axis)


def _sums_of(part: Part) -> Any:
    return part.sums


def _times(xp: Any, factor: Array, value: Array) -> Array:
    """Return factor · value, 0 where either is, whatever the other."""
    return xp.where((factor == 0.0) | (value == 0.0), 0.0, factor * value)


def _wide(array: Array) -> Array:
    xp = namespace_of(array)
    return xp.astype(array, wide_dtype(xp, array), copy=False)


def _finite(exponents: Array) -> Array:
    xp = namespace_of(exponents)
    return xp.where(xp.isfinite(exponents), exponents, 0.0)


def _with(edge: Array, array: Array, axis: int, reverse: bool) -> Array:
    """Return an array after entries that come first in the order of a scan."""
    xp = namespace_of(array)
    return xp.concat([array, edge] if reverse else [edge, array], axis=axis)


def _first(array: Array, count: int, axis: int, reverse: bool) -> Array:
    size = array.shape[axis]
    span = slice(size - count, size) if reverse else slice(0, count)
    return array[(*(slice(None),) * axis, span, ...)]


def _without(array: Array, count: int, axis: int, reverse: bool) -> Array:
    if count == 0:
        return array
    return _first(array, array.shape[axis] - count, axis, not reverse)


def _kept(array: Array, axis: int) -> Array:
    """Return lanes with the axis that they are without."""
    return namespace_of(array).expand_dims(array, axis=axis)
