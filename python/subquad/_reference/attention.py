"""Linear attention over log-features in array-API code.

Tokens are taken in chunks. Within a chunk each row meets each key, with the exponents
of all features side by side; what came before the chunk is a state, whose terms are
relative to the largest key of each feature. So nothing overflows, no row loses its
largest term, and no branch depends on data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from subquad._dispatch import Array, Namespace, device_of, namespace_of
from subquad._reference._common import (
    batch_shape,
    blocks,
    join,
    primitive,
    sum_to,
    wide_dtype,
)
from subquad._reference._sums import (
    Sums,
    add,
    constant,
    first_of_runs,
    log_abs,
    moved,
    normalised,
    over,
    power,
    product,
    raised,
    scan,
    signum,
    split,
    terms,
    total,
    two_sum,
)

_Optional: TypeAlias = Array | None

# Pairs of a row and a key exist in arrays of about this many numbers.
_CHUNK_CELLS = 1 << 21
_LONGEST_CHUNK = 64
_LONGEST_BLOCK = 1024


@primitive
def linear_attention(
    log_k: Array,
    v: Array,
    log_q: _Optional,
    log_decay: _Optional,
    key_mask: _Optional,
    segments: _Optional,
    key_sums: _Optional,
    value_sums: _Optional,
    causal: bool,
    empty_is_nan: bool,
    with_log_z: bool,
    with_state: bool,
) -> tuple[_Optional, _Optional, _Optional, _Optional]:
    """See `subquad.linear_attention`: yₜ = Σⱼ wₜⱼ vⱼ / Σⱼ wₜⱼ."""
    others = ((v, 2), (key_sums, 2), (value_sums, 3))
    call = _Call(log_k, log_q, log_decay, key_mask, segments, causal, others)
    xp = call.xp
    values = _Values(xp, call.values(v, 0.0))
    start = _from_sums(call, key_sums, value_sums, values.width)
    rows, states = _forward(call, values, start)
    y = log_z = None
    if rows is not None:
        empty = math.nan if empty_is_nan else 0.0
        y = rows.numerators / rows.safe
        y = call.narrow(xp.where(rows.is_empty[..., None], empty, y))
        log_z = call.narrow(rows.log_z(xp)) if with_log_z else None
    if not with_state:
        return y, log_z, None, None
    return y, log_z, *_to_sums(call, states[-1], key_sums)


@primitive
def linear_attention_vjp(
    log_k: Array,
    v: Array,
    log_q: _Optional,
    log_decay: _Optional,
    key_mask: _Optional,
    segments: _Optional,
    key_sums: _Optional,
    value_sums: _Optional,
    causal: bool,
    y: _Optional,
    grad_y: _Optional,
    grad_log_z: _Optional,
    grad_final_key_sums: _Optional,
    grad_final_value_sums: _Optional,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[_Optional, _Optional, _Optional, _Optional, _Optional, _Optional]:
    """See `subquad.vjp.linear_attention`. With Pₜⱼᵣ = exp(qₜᵣ + kⱼᵣ - log zₜ) and
    Wₜⱼᵣ = Pₜⱼᵣ (gyₜ·(vⱼ - yₜ) + g log zₜ):

    gqₜᵣ = Σⱼ Wₜⱼᵣ;  gkⱼᵣ = Σₜ Wₜⱼᵣ;  gvⱼ = Σₜᵣ Pₜⱼᵣ gyₜ, and the final state's part.
    """
    del y  # Rounded to the type of v, which the differences vⱼ - yₜ would feel.
    others = ((v, 2), (key_sums, 2), (value_sums, 3))
    call = _Call(log_k, log_q, log_decay, key_mask, segments, causal, others)
    xp = call.xp
    # All is the same for values that are moved by a constant, but for rounding.
    plain = call.values(v, 0.0)
    centre = _centre(xp, plain)
    values = _Values(xp, plain - centre)
    start = _from_sums(call, key_sums, value_sums, values.width)
    offset = start.denominators[..., None] * centre
    start = start._replace(
        numerators=_Pair(start.numerators.value - offset, start.numerators.rest)
    )
    rows, states = _forward(call, values, start, keep=True)
    final = states[-1]
    final_grads = call.grad(grad_final_key_sums, (5, call.d_k))
    g_total = final_grads[..., 4, :]
    seed = call.grad(grad_final_value_sums, (2, call.d_k, values.width))[..., 0, :, :]
    seeds = _Seeds(final_grads[..., 2, :] + xp.sum(seed * centre, axis=-1), seed)
    ending = final.denominators * seeds.denominators
    ending = ending + xp.sum(final.numerators.value * seed, axis=-1)
    row_grads = None
    if rows is not None:
        gy = call.grad(grad_y, (call.n_q, values.width))
        row_grads = values.row_gradients(rows, gy, call.grad(grad_log_z, (call.n_q,)))
    found = _backward(call, values, rows, row_grads, states, seeds)
    gs = found.seeds.numerators
    gz = found.seeds.denominators - xp.sum(gs * centre, axis=-1)
    g_state: tuple[_Optional, _Optional] = (None, None)
    if key_sums is not None:
        g_state = _state_gradients(call, key_sums, gz, gs, g_total)
    g_decay = call.decay_gradient(found, ending, g_total, key_sums is not None)
    return (
        call.gradient(found.keys, log_k, needs[0]),
        call.gradient(found.values, v, needs[1]),
        call.gradient(found.queries, log_q, needs[2]),
        call.gradient(g_decay, log_decay, needs[3]),
        call.gradient(g_state[0], key_sums, needs[4]),
        call.gradient(g_state[1], value_sums, needs[5]),
    )


@primitive
def log_linear_attention(
    log_k: Array,
    log_v: Array,
    sign_v: _Optional,
    log_q: _Optional,
    log_decay: _Optional,
    key_mask: _Optional,
    segments: _Optional,
    log_numerator: _Optional,
    sign_numerator: _Optional,
    log_denominator: _Optional,
    causal: bool,
    with_log_z: bool,
    with_state: bool,
) -> tuple[_Optional, _Optional, _Optional, _Optional, _Optional, _Optional]:
    """See `subquad.log_linear_attention`: log |yₜ| and the sign of yₜ, where
    vⱼ = sign_vⱼ exp(log_vⱼ).
    """
    state = ((log_numerator, 2), (sign_numerator, 2), (log_denominator, 1))
    others = ((log_v, 2), (sign_v, 2), *state)
    call = _Call(log_k, log_q, log_decay, key_mask, segments, causal, others)
    xp = call.xp
    values = _log_values(call, log_v, sign_v)
    start = _from_logs(call, values, log_numerator, sign_numerator, log_denominator)
    rows, states = _forward(call, values, start)
    final = states[-1]
    log_y = sign_y = log_z = None
    if rows is not None:
        log_y, sign_y = (call.narrow(part) for part in values.logs(rows))
        log_z = call.narrow(rows.log_z(xp)) if with_log_z else None
    if not with_state:
        return log_y, sign_y, log_z, None, None, None
    scale, logarithm = log_abs(xp, final.numerators)
    value, _ = normalised(xp, final.numerators)
    log_den = final.scale + _safe_log(xp, final.denominators)
    return (
        log_y,
        sign_y,
        log_z,
        call.narrow(scale + logarithm),
        call.narrow(signum(xp, value)),
        call.narrow(log_den),
    )


@primitive
def log_linear_attention_vjp(
    log_k: Array,
    log_v: Array,
    sign_v: _Optional,
    log_q: _Optional,
    log_decay: _Optional,
    key_mask: _Optional,
    segments: _Optional,
    log_numerator: _Optional,
    sign_numerator: _Optional,
    log_denominator: _Optional,
    causal: bool,
    grad_log_y: _Optional,
    grad_log_z: _Optional,
    grad_final_log_numerator: _Optional,
    grad_final_log_denominator: _Optional,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[_Optional, _Optional, _Optional, _Optional, _Optional, _Optional]:
    """See `subquad.vjp.log_linear_attention`. With γₜ = g log yₜ / Σⱼ wₜⱼ vⱼ and
    ηₜ = (g log zₜ - Σ g log yₜ) / zₜ, and Wₜⱼᵣ = exp(qₜᵣ + kⱼᵣ) (γₜ·vⱼ + ηₜ):

    gqₜᵣ = Σⱼ Wₜⱼᵣ;  gkⱼᵣ = Σₜ Wₜⱼᵣ;  g log vⱼ = Σₜ wₜⱼ γₜ vⱼ, and the state's part.
    """
    state = ((log_numerator, 2), (sign_numerator, 2), (log_denominator, 1))
    others = ((log_v, 2), (sign_v, 2), *state)
    call = _Call(log_k, log_q, log_decay, key_mask, segments, causal, others)
    xp = call.xp
    values = _log_values(call, log_v, sign_v)
    start = _from_logs(call, values, log_numerator, sign_numerator, log_denominator)
    rows, states = _forward(call, values, start, keep=True)
    final = states[-1]
    g_num = call.grad(grad_final_log_numerator, (call.d_k, values.width))
    g_den = call.grad(grad_final_log_denominator, (call.d_k,))
    seeds = _Seeds(
        over(xp, g_den, final.denominator_sums), over(xp, g_num, final.numerators)
    )
    value, _ = normalised(xp, final.numerators)
    ending = xp.where(final.denominators == 0.0, 0.0, g_den)
    ending = ending + xp.sum(xp.where(value == 0.0, 0.0, g_num), axis=-1)
    row_grads = None
    if rows is not None:
        gy = call.grad(grad_log_y, (call.n_q, values.width))
        row_grads = values.row_gradients(rows, gy, call.grad(grad_log_z, (call.n_q,)))
    found = _backward(call, values, rows, row_grads, states, seeds)
    g_num = product(xp, start.numerators, found.seeds.numerators)
    g_den = product(xp, start.denominator_sums, found.seeds.denominators)
    has_state = log_denominator is not None
    g_decay = call.decay_gradient(found, ending, None, has_state)
    return (
        call.gradient(found.keys, log_k, needs[0]),
        call.gradient(found.values, log_v, needs[1]),
        call.gradient(found.queries, log_q, needs[2]),
        call.gradient(g_decay, log_decay, needs[3]),
        call.gradient(g_num, log_numerator, needs[4]),
        call.gradient(g_den, log_denominator, needs[5]),
    )


class _State(NamedTuple):
    """Sums over keys: Σⱼ exp(kⱼ - scale), what rounding took, and their values' sums.

    scale, denominators, rest: (B..., d_k). The numerators are kept as `_Values` or
    `_LogValues` keep them.
    """

    scale: Array
    denominators: Array
    rest: Array
    numerators: Any

    @property
    def denominator_sums(self) -> Sums:
        return Sums(self.scale, self.denominators, self.rest)


class _Pair(NamedTuple):
    """Numbers and what rounding took from them."""

    value: Array
    rest: Array


class _Seeds(NamedTuple):
    """Gradients of a state's sums."""

    denominators: Any
    numerators: Any


class _Chunk(NamedTuple):
    """Exponents of some tokens; -inf where nothing is attended.

    Attributes
    ----------
    rows : slice
        Which queries, none where the chunk has keys alone.
    keys : slice
        Which keys, none where it has queries alone.
    pairs : array (B..., rows, keys, d_k) or None
        Of each row and key.
    queries : array (B..., rows, d_k) or None
        Of each row and the state before the chunk, but for the state's scale.
    leaving : array (B..., keys, d_k) or None
        Of each key in the state after the chunk.
    passing : array (B..., d_k) or None
        Of the state before in the state after, but for its scale; None is 0.
    """

    rows: slice
    keys: slice
    pairs: _Optional
    queries: _Optional
    leaving: Any
    passing: _Optional


class _Rows(NamedTuple):
    """What rows sum to: denominators and numerators times exp(-scale).

    scale, denominators: (B..., rows); numerators as `_Values`, `_LogValues` have them.
    """

    scale: Array
    denominators: Array
    numerators: Any

    @property
    def is_empty(self) -> Array:
        is_empty: Array = self.denominators == 0.0
        return is_empty

    @property
    def safe(self) -> Array:
        """Denominators to divide (B..., rows, 1) by, 1 for empty rows."""
        xp = namespace_of(self.denominators)
        return xp.where(self.is_empty, 1.0, self.denominators)[..., None]

    def log_z(self, xp: Namespace) -> Array:
        return xp.where(
            self.is_empty, -math.inf, self.scale + _safe_log(xp, self.denominators)
        )


class _RowGradients(NamedTuple):
    """What comes down on rows: of the numerators and of log z, empty rows none."""

    numerators: Any
    denominators: Array


class _Gradients(NamedTuple):
    queries: _Optional
    keys: Array
    values: Array
    seeds: _Seeds


class _Decayed(NamedTuple):
    """Sums of log-decays since the last reset."""

    total: Array
    is_reset: Array


class _Call:
    """The arrays of a call in the wide type, over the whole batch, and its chunks."""

    def __init__(
        self,
        log_k: Array,
        log_q: _Optional,
        log_decay: _Optional,
        key_mask: _Optional,
        segments: _Optional,
        causal: bool,
        others: Sequence[tuple[_Optional, int]],
    ) -> None:
        self.xp = xp = namespace_of(log_k)
        self.dtype = log_k.dtype
        self.wide_dtype = wide_dtype(xp, log_k)
        self.device = device_of(log_k)
        self.n: int = log_k.shape[-2]
        self.d_k: int = log_k.shape[-1]
        self.n_q: int = 0 if log_q is None else log_q.shape[-2]
        given = [(log_k, 2), (log_q, 2), (log_decay, 2), (key_mask, 1), *others]
        self.batch = batch_shape(
            *(
                tuple(array.shape[: array.ndim - rank])
                for array, rank in given
                if array is not None
            )
        )
        self.in_order = causal or segments is not None
        self.causal = causal
        self.strict = False
        self.queries = None if log_q is None else self.over(log_q, 2)
        self.keys = self.over(log_k, 2)
        if key_mask is not None:
            kept = xp.astype(key_mask, xp.bool)
            kept = xp.broadcast_to(kept, (*self.batch, self.n))
            self.keys = xp.where(kept[..., None], self.keys, -math.inf)
        self.decay = None if log_decay is None else self.over(log_decay, 2)
        self.segments = segments
        self.firsts = first_of_runs(xp, segments)
        self.resets = self._resets()
        self.since = None if self.resets is None else _since(xp, self.resets)

    def _resets(self) -> _Optional:
        """Return where features hold nothing of what came before, (..., n, d_k)."""
        resets = None if self.firsts is None else self.firsts[:, None]
        if self.decay is None:
            return resets
        forgets = self.decay == -math.inf
        return forgets if resets is None else forgets | resets

    def over(self, array: Array, rank: int) -> Array:
        """Return an array in the wide type over the whole batch."""
        wide = self.xp.astype(array, self.wide_dtype)
        return self.xp.broadcast_to(
            wide, (*self.batch, *wide.shape[wide.ndim - rank :])
        )

    def full(self, shape: tuple[int, ...], value: float) -> Array:
        return self.xp.full(
            (*self.batch, *shape), value, dtype=self.wide_dtype, device=self.device
        )

    def narrow(self, array: Array) -> Array:
        return self.xp.astype(array, self.dtype)

    def values(self, v: Array, nothing: float) -> Array:
        """Return values, those of removed keys replaced."""
        is_removed = self.xp.all(self.keys == -math.inf, axis=-1, keepdims=True)
        return self.xp.where(is_removed, nothing, self.over(v, 2))

    def grad(self, grad: _Optional, shape: tuple[int, ...]) -> Array:
        """Return a gradient that came in, 0 where none did."""
        return self.full(shape, 0.0) if grad is None else self.over(grad, len(shape))

    def gradient(self, grad: _Optional, like: _Optional, needed: bool) -> _Optional:
        """Return a gradient in its input's shape."""
        if grad is None or like is None or not needed:
            return None
        return self.narrow(sum_to(self.xp, grad, tuple(like.shape)))

    def flipped(self) -> _Call:
        """Return the call backwards, where each row attends what follows it alone."""
        xp = self.xp
        other = copy.copy(self)
        other.strict = True
        other.keys = xp.flip(self.keys, axis=-2)
        if self.queries is not None:
            other.queries = xp.flip(self.queries, axis=-2)
        other.segments = xp.flip(self.segments, axis=0)
        other.firsts = first_of_runs(xp, other.segments)
        other.resets = other._resets()
        other.since = None if other.resets is None else _since(xp, other.resets)
        return other

    def size(self, cells: int, longest: int) -> int:
        """Return how many tokens, of so many numbers each, fit in a chunk."""
        size = longest
        while size > 8 and math.prod(self.batch) * size * cells > _CHUNK_CELLS:
            size //= 2
        return size

    def chunks(self, values: _Values | _LogValues) -> list[slice]:
        """Return what is taken at a time where rows attend in order."""
        size = _LONGEST_CHUNK
        while size > 8 and self.size(values.cells(self.d_k, size), size) < size:
            size //= 2
        return list(blocks(self.n, size))

    def blocks(self, length: int, values: _Values | _LogValues) -> list[slice]:
        """Return what is taken at a time where each row attends all keys."""
        cells = values.cells(self.d_k, 0)
        return list(blocks(length, self.size(cells, _LONGEST_BLOCK)))

    def chunk(self, span: slice) -> _Chunk:
        """Return the exponents of tokens that attend in order."""
        if span.start == span.stop:
            queries = None if self.queries is None else self.queries[..., span, :]
            return _Chunk(span, span, None, queries, None, None)
        xp = self.xp
        keys = self.keys[..., span, :]
        since = None if self.since is None else self.since[..., span, :]
        index = xp.arange(span.start, span.stop, device=self.device)
        decay = passing = None
        leaving = keys
        if self.decay is not None:
            decay = self._decay_within(span)
            passing = decay[..., -1, :]
            leaving = keys + (passing[..., None, :] - decay)
        if since is not None:
            last = since[..., -1:, :]
            leaving = xp.where(index[:, None] >= last, leaving, -math.inf)
            if passing is None:
                passing = xp.zeros_like(keys[..., 0, :])
            passing = xp.where(last[..., 0, :] < span.start, passing, -math.inf)
        if self.queries is None:
            return _Chunk(span, span, None, None, leaving, passing)

        queries = self.queries[..., span, :]
        pairs = keys[..., None, :, :]
        if decay is not None:
            pairs = pairs + (decay[..., :, None, :] - decay[..., None, :, :])
        pairs = queries[..., :, None, :] + pairs
        earlier = index[:, None] > index if self.strict else index[:, None] >= index
        attends = earlier[..., None]
        if since is not None:
            attends = attends & (since[..., :, None, :] <= index[:, None])
        pairs = xp.where(attends, pairs, -math.inf)
        if decay is not None:
            queries = queries + decay
        if since is not None:
            queries = xp.where(since < span.start, queries, -math.inf)
        return _Chunk(span, span, pairs, queries, leaving, passing)

    def query_chunk(self, span: slice) -> _Chunk:
        """Return queries that attend all keys."""
        assert self.queries is not None
        return _Chunk(span, slice(0, 0), None, self.queries[..., span, :], None, None)

    def key_chunk(self, span: slice) -> _Chunk:
        """Return keys that all queries attend."""
        keys = None if span.start == span.stop else self.keys[..., span, :]
        return _Chunk(slice(0, 0), span, None, None, keys, None)

    def _decay_within(self, span: slice) -> Array:
        """Return the sums of log-decays since the start of a chunk, or a later reset.

        At a reset they start at 0: what was before has no part in what follows.
        """
        xp = self.xp
        assert self.decay is not None and self.resets is not None
        resets = self.resets[..., span, :]
        decay = self.decay[..., span, :]
        resets = xp.broadcast_to(resets, decay.shape)
        return _since_reset(xp, xp.where(resets, 0.0, decay), resets)

    def in_last_run(self) -> tuple[_Optional, _Optional]:
        """Return which tokens are of the last run, (n, 1), and whether that is the
        first one, (); None where all are.
        """
        if self.firsts is None or self.n == 0:
            return None, None
        xp = self.xp
        index = xp.arange(self.n, device=self.device)
        start = xp.max(xp.where(self.firsts, index, 0))
        return (index >= start)[:, None], start == 0

    def total_decay(self, before: _Optional) -> Array:
        """Return the sum of log-decays over the last run, and of the state before."""
        xp = self.xp
        decay = self.full((self.n, self.d_k), 0.0) if self.decay is None else self.decay
        is_last, is_first = self.in_last_run()
        if is_last is not None:
            decay = xp.where(is_last, decay, 0.0)
            before = None if before is None else xp.where(is_first, before, 0.0)
        result = xp.sum(decay, axis=-2)
        return result if before is None else result + before

    def decay_gradient(
        self, found: _Gradients, ending: Array, g_total: _Optional, has_state: bool
    ) -> _Optional:
        """Return gαₜ = Σ_{s ≥ t} (gqₛ - gkₛ) + ending, up to the next reset.

        `ending` is Σ over the final state's sums times their gradients, `g_total` the
        gradient of the final sum of log-decays.
        """
        if self.decay is None:
            return None
        if self.n == 0:
            return self.decay
        xp = self.xp
        assert self.resets is not None
        moves = -found.keys if found.queries is None else found.queries - found.keys
        last = moves[..., -1:, :] + ending[..., None, :]
        moves = xp.concat([moves[..., :-1, :], last], axis=-2)
        resets = xp.broadcast_to(self.resets, moves.shape)
        next_resets = xp.concat(
            [resets[..., 1:, :], xp.zeros_like(resets[..., :1, :])], axis=-2
        )
        result = xp.flip(
            _since_reset(xp, xp.flip(moves, axis=-2), xp.flip(next_resets, axis=-2)),
            axis=-2,
        )
        result = xp.where(resets, 0.0, result)
        if not has_state:
            # The first token decays nothing.
            first = xp.zeros_like(result[..., :1, :])
            result = xp.concat([first, result[..., 1:, :]], axis=-2)
        if g_total is not None:
            counts = self.decay != -math.inf
            is_last, _ = self.in_last_run()
            if is_last is not None:
                counts = counts & is_last
            result = result + xp.where(counts, g_total[..., None, :], 0.0)
        return result


class _Values:
    """Values as numbers."""

    def __init__(self, xp: Namespace, v: Array) -> None:
        self.xp = xp
        self.v = v
        self.width: int = v.shape[-1]

    def flipped(self) -> _Values:
        return _Values(self.xp, self.xp.flip(self.v, axis=-2))

    def cells(self, d_k: int, pairs: int) -> int:
        """Return how many numbers a token takes that is paired with others."""
        return max(d_k * pairs, d_k, self.width)

    def rows(self, chunk: _Chunk, state: _State, weights: _Weights) -> Array:
        """Return the numerators Σⱼ wₜⱼ vⱼ."""
        xp = self.xp
        far = _weighted(
            xp, weights.far, weights.entering != -math.inf, state.numerators.value
        )
        if chunk.pairs is None or weights.near is None:
            return far
        return far + _weighted(
            xp,
            xp.sum(weights.near, axis=-1),
            xp.any(chunk.pairs != -math.inf, axis=-1),
            self.v[..., chunk.keys, :],
        )

    def after(
        self, chunk: _Chunk, numerators: _Pair, factor: Array, keys: Array
    ) -> _Pair:
        """Return the numerators of the state after a chunk."""
        xp = self.xp
        added = _weighted(
            xp,
            xp.matrix_transpose(keys),
            xp.matrix_transpose(chunk.leaving != -math.inf),
            self.v[..., chunk.keys, :],
        )
        factor = factor[..., None]
        value = xp.where(factor == 0.0, 0.0, numerators.value * factor)
        rest = xp.where(factor == 0.0, 0.0, numerators.rest * factor)
        value, lost = two_sum(xp, value, added)
        return _Pair(value, xp.where(xp.isfinite(value), rest + lost, 0.0))

    def both(self, one: _Rows, other: _Rows, factors: tuple[Array, Array]) -> Array:
        """Return the numerators of rows that attend two parts."""
        xp = self.xp
        a, b = (factor[..., None] for factor in factors)
        return xp.where(a == 0.0, 0.0, one.numerators * a) + xp.where(
            b == 0.0, 0.0, other.numerators * b
        )

    def row_gradients(self, rows: _Rows, gy: Array, gz: Array) -> _RowGradients:
        xp = self.xp
        gy = xp.where(rows.is_empty[..., None], 0.0, gy)
        gz = xp.where(rows.is_empty, 0.0, gz)
        y = rows.numerators / rows.safe
        return _RowGradients(gy, gz - xp.sum(xp.where(gy == 0.0, 0.0, gy * y), axis=-1))

    def nothing(self, call: _Call) -> _Seeds:
        return _Seeds(
            call.full((call.d_k,), 0.0), call.full((call.d_k, self.width), 0.0)
        )

    def through_rows(
        self, chunk: _Chunk, state: _State, rows: _Rows, grads: _RowGradients
    ) -> tuple[Array, _Optional, _Optional, _Seeds]:
        """Return the gradients of queries, keys and values, and of the state."""
        xp = self.xp
        weights = _weights(xp, chunk, state, rows)
        gy, gz = grads.numerators, grads.denominators[..., None]
        reaches = weights.entering != -math.inf
        change = gy @ xp.matrix_transpose(state.numerators.value)
        change = change + gz * state.denominators[..., None, :]
        gq = xp.where(reaches, weights.far * change, 0.0)
        seeds = _Seeds(
            xp.sum(xp.where(reaches, weights.far * gz, 0.0), axis=-2),
            xp.matrix_transpose(weights.far) @ gy,
        )
        if chunk.pairs is None or weights.near is None:
            return gq, None, None, seeds
        change = gy @ xp.matrix_transpose(self.v[..., chunk.keys, :]) + gz
        moves = xp.where(
            chunk.pairs == -math.inf, 0.0, weights.near * change[..., None]
        )
        return (
            gq + xp.sum(moves, axis=-2),
            xp.sum(moves, axis=-3),
            xp.matrix_transpose(xp.sum(weights.near, axis=-1)) @ gy,
            seeds,
        )

    def through_state(
        self, chunk: _Chunk, after: _State, seeds: _Seeds
    ) -> tuple[Array, Array]:
        """Return the gradients of keys and values in the state after their chunk."""
        xp = self.xp
        keys = _leaving(xp, chunk, after.scale)
        change = self.v[..., chunk.keys, :] @ xp.matrix_transpose(seeds.numerators)
        change = change + seeds.denominators[..., None, :]
        return (
            xp.where(chunk.leaving == -math.inf, 0.0, keys * change),
            keys @ seeds.numerators,
        )

    def before(
        self, passing: _Optional, before: _State, after: _State, seeds: _Seeds
    ) -> _Seeds:
        """Return the gradients of the state before, from those of the one after."""
        factor = _passing(self.xp, passing, before.scale, after.scale)[1]
        return _Seeds(seeds.denominators * factor, seeds.numerators * factor[..., None])

    def sum(self, one: _Seeds, other: _Seeds) -> _Seeds:
        return _Seeds(
            one.denominators + other.denominators, one.numerators + other.numerators
        )


class _LogValues:
    """Values as logarithms and signs; numerators are sums of any range."""

    def __init__(self, xp: Namespace, log_v: Array, sign: Array) -> None:
        self.xp = xp
        self.log_v = log_v
        self.sign = sign
        self.width: int = log_v.shape[-1]

    def flipped(self) -> _LogValues:
        return _LogValues(
            self.xp, self.xp.flip(self.log_v, axis=-2), self.xp.flip(self.sign, axis=-2)
        )

    def cells(self, d_k: int, pairs: int) -> int:
        """Return how many numbers a token takes that is paired with others."""
        return max(d_k * max(self.width, pairs, 1), self.width * max(pairs, 1))

    def rows(self, chunk: _Chunk, state: _State, weights: _Weights) -> Sums:
        """Return the numerators Σⱼ wₜⱼ vⱼ."""
        xp = self.xp
        far = total(xp, self._far(chunk, state), -2)
        if chunk.pairs is None:
            return far
        return add(xp, far, total(xp, self._near(chunk)[2], -2))

    def _far(self, chunk: _Chunk, state: _State) -> Sums:
        """Return exp(qₜᵣ) Sᵣᵥ for each row, feature and value."""
        assert chunk.queries is not None
        sums = Sums(*(part[..., None, :, :] for part in state.numerators))
        return moved(self.xp, sums, chunk.queries[..., None])

    def _near(self, chunk: _Chunk) -> tuple[Array, Array, Sums]:
        """Return m and s, wₜⱼ = s exp(m), and wₜⱼ vⱼ for each row, key and value."""
        xp = self.xp
        assert chunk.pairs is not None
        peak = _peak(xp, chunk.pairs, (-1,))
        size = xp.sum(power(xp, chunk.pairs, _finite(xp, peak)[..., None]), axis=-1)
        attends = (peak != -math.inf)[..., None]
        exponents = peak[..., None] + self.log_v[..., None, chunk.keys, :]
        weights = size[..., None] * self.sign[..., None, chunk.keys, :]
        return peak, size, terms(xp, xp.where(attends, exponents, -math.inf), weights)

    def _leaving(self, chunk: _Chunk) -> Sums:
        """Return exp(kⱼᵣ) vⱼ for each key, feature and value."""
        xp = self.xp
        leaving = chunk.leaving[..., None]
        exponents = leaving + self.log_v[..., chunk.keys, None, :]
        exponents = xp.where(leaving == -math.inf, -math.inf, exponents)
        weights = xp.broadcast_to(self.sign[..., chunk.keys, None, :], exponents.shape)
        return terms(xp, exponents, weights)

    def after(
        self, chunk: _Chunk, numerators: Sums, factor: Array, keys: Array
    ) -> Sums:
        """Return the numerators of the state after a chunk."""
        del factor, keys
        if chunk.passing is not None:
            numerators = moved(self.xp, numerators, chunk.passing[..., None])
        return add(self.xp, numerators, total(self.xp, self._leaving(chunk), -3))

    def both(self, one: _Rows, other: _Rows, factors: tuple[Array, Array]) -> Sums:
        """Return the numerators of rows that attend two parts."""
        del factors
        return add(self.xp, one.numerators, other.numerators)

    def logs(self, rows: _Rows) -> tuple[Array, Array]:
        """Return log |yₜ| and the sign of yₜ."""
        xp = self.xp
        scale, logarithm = log_abs(xp, rows.numerators)
        value, _ = normalised(xp, rows.numerators)
        log_y = (scale - rows.scale[..., None]) + (logarithm - xp.log(rows.safe))
        return log_y, xp.where(xp.isnan(log_y), math.nan, signum(xp, value))

    def row_gradients(self, rows: _Rows, gy: Array, gz: Array) -> _RowGradients:
        xp = self.xp
        value, _ = normalised(xp, rows.numerators)
        live = xp.where(value == 0.0, 0.0, gy)
        return _RowGradients(
            over(xp, gy, rows.numerators),
            xp.where(rows.is_empty, 0.0, gz - xp.sum(live, axis=-1)),
        )

    def nothing(self, call: _Call) -> _Seeds:
        return _Seeds(
            _no_sums(call, (call.d_k,)), _no_sums(call, (call.d_k, self.width))
        )

    def through_rows(
        self, chunk: _Chunk, state: _State, rows: _Rows, grads: _RowGradients
    ) -> tuple[Array, _Optional, _Optional, _Seeds]:
        """Return the gradients of queries, keys and values, and of the state."""
        xp = self.xp
        assert chunk.queries is not None
        weights = _weights(xp, chunk, state, rows)
        gz = grads.denominators[..., None]
        shares = Sums(*(part[..., None, :] for part in grads.numerators))
        far = weights.far * state.denominators[..., None, :]
        gq = xp.where(weights.entering == -math.inf, 0.0, far * gz)
        gq = gq + xp.sum(product(xp, self._far(chunk, state), shares), axis=-1)
        relative = chunk.queries - rows.scale[..., None]
        size = xp.broadcast_to(gz / rows.safe, relative.shape)
        seeds = _Seeds(
            total(
                xp, moved(xp, Sums(xp.zeros_like(size), size, 0.0 * size), relative), -2
            ),
            total(xp, moved(xp, shares, chunk.queries[..., None]), -3),
        )
        if chunk.pairs is None:
            return gq, None, None, seeds
        peak, size, values = self._near(chunk)
        by_value = product(xp, values, shares)
        to_rows = power(xp, peak, rows.scale[..., None]) * size / rows.safe
        change = xp.where(peak == -math.inf, 0.0, to_rows * gz)
        change = change + xp.sum(by_value, axis=-1)
        part = power(xp, chunk.pairs, _finite(xp, peak)[..., None])
        part = part / xp.where(size == 0.0, 1.0, size)[..., None]
        moves = xp.where(chunk.pairs == -math.inf, 0.0, part * change[..., None])
        return (
            gq + xp.sum(moves, axis=-2),
            xp.sum(moves, axis=-3),
            xp.sum(by_value, axis=-3),
            seeds,
        )

    def through_state(
        self, chunk: _Chunk, after: _State, seeds: _Seeds
    ) -> tuple[Array, Array]:
        """Return the gradients of keys and values in the state after their chunk."""
        del after
        xp = self.xp
        numerators = Sums(*(part[..., None, :, :] for part in seeds.numerators))
        by_value = product(xp, self._leaving(chunk), numerators)
        denominators = Sums(*(part[..., None, :] for part in seeds.denominators))
        keys = terms(xp, chunk.leaving, xp.ones_like(chunk.leaving))
        return (
            xp.sum(by_value, axis=-1) + product(xp, keys, denominators),
            xp.sum(by_value, axis=-2),
        )

    def before(
        self, passing: _Optional, before: _State, after: _State, seeds: _Seeds
    ) -> _Seeds:
        """Return the gradients of the state before, from those of the one after."""
        del before, after
        if passing is None:
            return seeds
        return _Seeds(
            moved(self.xp, seeds.denominators, passing),
            moved(self.xp, seeds.numerators, passing[..., None]),
        )

    def sum(self, one: _Seeds, other: _Seeds) -> _Seeds:
        return _Seeds(
            add(self.xp, one.denominators, other.denominators),
            add(self.xp, one.numerators, other.numerators),
        )


class _Weights(NamedTuple):
    """exp of exponents less their rows' scales.

    near (B..., rows, keys, d_k) or None; far (B..., rows, d_k) and its exponents,
    entering, of the state's features.
    """

    near: _Optional
    far: Array
    entering: Array


def _weights(
    xp: Namespace, chunk: _Chunk, state: _State, rows: _Rows | None
) -> _Weights:
    """Return the weights of a chunk, divided by the denominators of known rows."""
    entering = _entering(xp, chunk, state)
    scale = _row_scale(xp, chunk, entering) if rows is None else rows.scale
    far = xp.exp(entering - scale[..., None])
    near = None
    if chunk.pairs is not None:
        near = xp.exp(chunk.pairs - scale[..., None, None])
        near = xp.where(chunk.pairs == -math.inf, 0.0, near)
    far = xp.where(entering == -math.inf, 0.0, far)
    if rows is not None:
        far = far / rows.safe
        near = None if near is None else near / rows.safe[..., None]
    return _Weights(near, far, entering)


def _entering(xp: Namespace, chunk: _Chunk, state: _State) -> Array:
    assert chunk.queries is not None
    entering = chunk.queries + state.scale[..., None, :]
    return xp.where(chunk.queries == -math.inf, -math.inf, entering)


def _row_scale(xp: Namespace, chunk: _Chunk, entering: Array) -> Array:
    scale = _peak(xp, entering, (-1,))
    if chunk.pairs is not None:
        scale = xp.maximum(scale, _peak(xp, chunk.pairs, (-2, -1)))
    return _finite(xp, scale)


def _rows(
    xp: Namespace, values: _Values | _LogValues, chunk: _Chunk, state: _State
) -> _Rows:
    """Return what the rows of a chunk sum to."""
    weights = _weights(xp, chunk, state, None)
    scale = _row_scale(xp, chunk, weights.entering)
    far = weights.far * state.denominators[..., None, :]
    far = xp.where(weights.entering == -math.inf, 0.0, far)
    denominators = xp.sum(far, axis=-1)
    if weights.near is not None:
        denominators = denominators + xp.sum(weights.near, axis=(-2, -1))
    return _Rows(scale, denominators, values.rows(chunk, state, weights))


def _after(
    xp: Namespace, values: _Values | _LogValues, chunk: _Chunk, state: _State
) -> _State:
    """Return the state after the keys of a chunk."""
    if chunk.leaving is None:
        return state
    kept = state.scale if chunk.passing is None else state.scale + chunk.passing
    if chunk.passing is not None:
        kept = xp.where(chunk.passing == -math.inf, -math.inf, kept)
    scale = constant(xp.maximum(kept, _peak(xp, chunk.leaving, (-2,))))
    factor = _passing(xp, chunk.passing, state.scale, scale)[1]
    keys = _leaving(xp, chunk, scale)
    value = xp.where(factor == 0.0, 0.0, state.denominators * factor)
    rest = xp.where(factor == 0.0, 0.0, state.rest * factor)
    value, lost = two_sum(xp, value, xp.sum(keys, axis=-2))
    rest = xp.where(xp.isfinite(value), rest + lost, 0.0)
    return _State(
        scale, value, rest, values.after(chunk, state.numerators, factor, keys)
    )


def _passing(
    xp: Namespace, passing: _Optional, before: Array, after: Array
) -> tuple[Array, Array]:
    """Return the scale of the state before in the one after, and what it multiplies
    sums with: 0 where nothing is left.
    """
    kept = before
    if passing is not None:
        kept = xp.where(passing == -math.inf, -math.inf, before + passing)
    return kept, xp.where(kept == -math.inf, 0.0, power(xp, kept, after))


def _leaving(xp: Namespace, chunk: _Chunk, scale: Array) -> Array:
    """Return the keys of a chunk in the scale of the state after it."""
    keys = power(xp, chunk.leaving, scale[..., None, :])
    return xp.where(chunk.leaving == -math.inf, 0.0, keys)


def _forward(
    call: _Call,
    values: _Values | _LogValues,
    start: _State,
    keep: bool = False,
) -> tuple[_Rows | None, list[_State]]:
    """Return what all rows sum to, None without queries, and the final state, after
    the states before each chunk if these are kept.
    """
    xp = call.xp
    if call.in_order:
        rows, states = _forward_in_order(call, values, start, keep)
        if rows is not None and not call.causal:
            other = values.flipped()
            back = call.flipped()
            nothing = _nothing(back, other)
            later, _ = _forward_in_order(back, other, nothing, False)
            assert later is not None
            rows = _both(xp, values, rows, _mapped(_flip(xp, -1), _flip(xp, -2), later))
        return rows, states
    state = start
    for span in call.blocks(call.n, values):
        state = _after(xp, values, call.key_chunk(span), state)
    if call.queries is None:
        return None, [start, state]
    parts = [
        _rows(xp, values, call.query_chunk(span), state)
        for span in call.blocks(call.n_q, values)
    ]
    return _joined(xp, parts), [start, state]


def _forward_in_order(
    call: _Call, values: _Values | _LogValues, start: _State, keep: bool
) -> tuple[_Rows | None, list[_State]]:
    xp = call.xp
    states, parts = [start], []
    for span in call.chunks(values):
        chunk = call.chunk(span)
        if call.queries is not None:
            parts.append(_rows(xp, values, chunk, states[-1]))
        state = _after(xp, values, chunk, states[-1])
        states = [*states, state] if keep else [state]
    return _joined(xp, parts) if parts else None, states


def _backward(
    call: _Call,
    values: _Values | _LogValues,
    rows: _Rows | None,
    grads: _RowGradients | None,
    states: Sequence[_State],
    seeds: _Seeds,
) -> _Gradients:
    """Return all gradients, from those of rows and of the final state."""
    xp = call.xp
    if call.in_order:
        found = _backward_in_order(call, values, rows, grads, states, seeds)
        if rows is None or grads is None or call.causal:
            return found
        back, other = call.flipped(), values.flipped()
        _, states = _forward_in_order(back, other, _nothing(back, other), True)
        lines, tables = _flip(xp, -1), _flip(xp, -2)
        later = _backward_in_order(
            back,
            other,
            _mapped(lines, tables, rows),
            _mapped(lines, tables, grads),
            states,
            other.nothing(back),
        )
        assert found.queries is not None and later.queries is not None
        return _Gradients(
            found.queries + tables(later.queries),
            found.keys + tables(later.keys),
            found.values + tables(later.values),
            found.seeds,
        )
    start, state = states
    queries: list[Array] = []
    if rows is not None and grads is not None:
        for span in call.blocks(call.n_q, values):
            gq, _, _, added = values.through_rows(
                call.query_chunk(span),
                state,
                _part(rows, span),
                _part(grads, span),
            )
            queries.append(gq)
            seeds = values.sum(seeds, added)
    keys: list[Array] = []
    tables_of_values: list[Array] = []
    for span in call.blocks(call.n, values):
        chunk = call.key_chunk(span)
        if chunk.leaving is None:
            keys.append(call.full((0, call.d_k), 0.0))
            tables_of_values.append(call.full((0, values.width), 0.0))
        else:
            gk, gv = values.through_state(chunk, state, seeds)
            keys.append(gk)
            tables_of_values.append(gv)
    return _Gradients(
        join(xp, queries, -2) if queries else None,
        join(xp, keys, -2),
        join(xp, tables_of_values, -2),
        values.before(None, start, state, seeds),
    )


def _backward_in_order(
    call: _Call,
    values: _Values | _LogValues,
    rows: _Rows | None,
    grads: _RowGradients | None,
    states: Sequence[_State],
    seeds: _Seeds,
) -> _Gradients:
    xp = call.xp
    queries, keys, tables = [], [], []
    spans = call.chunks(values)
    for place in range(len(spans) - 1, -1, -1):
        span = spans[place]
        chunk = call.chunk(span)
        before, after = states[place], states[place + 1]
        if chunk.leaving is None:
            gk = call.full((0, call.d_k), 0.0)
            gv = call.full((0, values.width), 0.0)
        else:
            gk, gv = values.through_state(chunk, after, seeds)
        seeds = values.before(chunk.passing, before, after, seeds)
        if rows is not None and grads is not None:
            gq, more_k, more_v, added = values.through_rows(
                chunk, before, _part(rows, span), _part(grads, span)
            )
            queries.append(gq)
            if more_k is not None and more_v is not None:
                gk, gv = gk + more_k, gv + more_v
            seeds = values.sum(seeds, added)
        keys.append(gk)
        tables.append(gv)
    return _Gradients(
        join(xp, queries[::-1], -2) if queries else None,
        join(xp, keys[::-1], -2),
        join(xp, tables[::-1], -2),
        seeds,
    )


def _both(
    xp: Namespace, values: _Values | _LogValues, one: _Rows, other: _Rows
) -> _Rows:
    """Return the sums of rows that attend two parts."""
    scales = [xp.where(rows.is_empty, -math.inf, rows.scale) for rows in (one, other)]
    scale = _finite(xp, xp.maximum(*scales))
    a, b = (xp.exp(part - scale) for part in scales)
    return _Rows(
        scale,
        one.denominators * a + other.denominators * b,
        values.both(one, other, (a, b)),
    )


def _joined(xp: Namespace, parts: Sequence[_Rows]) -> _Rows:
    """Return the rows of all chunks."""
    numerators = [part.numerators for part in parts]
    if isinstance(numerators[0], Sums):
        joined: Any = Sums(*(join(xp, column, -2) for column in zip(*numerators)))
    else:
        joined = join(xp, numerators, -2)
    return _Rows(
        join(xp, [part.scale for part in parts], -1),
        join(xp, [part.denominators for part in parts], -1),
        joined,
    )


_Tables = TypeVar("_Tables", _Rows, _RowGradients)


def _mapped(
    line: Callable[[Array], Array], table: Callable[[Array], Array], rows: _Tables
) -> _Tables:
    """Apply functions to what rows have one of, and to what they have a list of."""
    numerators = rows.numerators
    if isinstance(numerators, Sums):
        numerators = Sums(*map(table, numerators))
    else:
        numerators = table(numerators)
    if isinstance(rows, _RowGradients):
        return _RowGradients(numerators, line(rows.denominators))
    return _Rows(line(rows.scale), line(rows.denominators), numerators)


def _part(rows: _Tables, span: slice) -> _Tables:
    return _mapped(
        lambda line: line[..., span], lambda table: table[..., span, :], rows
    )


def _flip(xp: Namespace, axis: int) -> Callable[[Array], Array]:
    return lambda array: xp.flip(array, axis=axis)


def _weighted(xp: Namespace, weights: Array, counts: Array, values: Array) -> Array:
    """Return weights @ values; what is not finite counts where `counts` is true only,
    and there even where a weight is too small to be told from 0.
    """
    dtype = values.dtype
    marks = xp.concat(
        [
            xp.astype(xp.isnan(values), dtype),
            xp.astype(values == math.inf, dtype),
            xp.astype(values == -math.inf, dtype),
        ],
        axis=-1,
    )
    marks = xp.astype(counts, dtype) @ marks
    width = values.shape[-1]
    is_nan = marks[..., :width] > 0.0
    is_above = marks[..., width : 2 * width] > 0.0
    is_below = marks[..., 2 * width :] > 0.0
    result = weights @ xp.where(xp.isfinite(values), values, 0.0)
    result = xp.where(is_above, result + math.inf, result)
    result = xp.where(is_below, result - math.inf, result)
    return xp.where(is_nan, math.nan, result)


def _from_sums(
    call: _Call, key_sums: _Optional, value_sums: _Optional, width: int
) -> _State:
    if key_sums is None or value_sums is None:
        nothing = call.full((call.d_k,), 0.0)
        none = call.full((call.d_k, width), 0.0)
        return _State(nothing - math.inf, nothing, nothing, _Pair(none, none))
    xp = call.xp
    keys, numbers = call.over(key_sums, 2), call.over(value_sums, 3)
    scale, left = two_sum(xp, keys[..., 0, :], keys[..., 1, :])
    # What the type cannot hold of the scale goes into the sums.
    value, rest = raised(xp, keys[..., 2, :], keys[..., 3, :], left)
    numerators = raised(
        xp, numbers[..., 0, :, :], numbers[..., 1, :, :], left[..., None]
    )
    return _State(scale, value, rest, _Pair(*numerators))


def _to_sums(call: _Call, state: _State, key_sums: _Optional) -> tuple[Array, Array]:
    xp = call.xp
    before = None if key_sums is None else call.over(key_sums, 2)[..., 4, :]
    nothing = xp.zeros_like(state.scale)
    scale = split(xp, state.scale, nothing, call.dtype)
    denominators = split(xp, state.denominators, state.rest, call.dtype)
    decay = call.narrow(call.total_decay(before))
    value, rest = state.numerators
    numerators = split(xp, value, rest, call.dtype)
    return xp.stack([*scale, *denominators, decay], axis=-2), xp.stack(
        numerators, axis=-3
    )


def _state_gradients(
    call: _Call, key_sums: Array, gz: Array, gs: Array, g_total: Array
) -> tuple[Array, Array]:
    """Return the gradients of a state's arrays; its scale is a constant."""
    xp = call.xp
    keys = call.over(key_sums, 2)
    _, left = two_sum(xp, keys[..., 0, :], keys[..., 1, :])
    unit = xp.exp(left)
    gz, gs = gz * unit, gs * unit[..., None]
    _, is_first = call.in_last_run()
    if is_first is not None:
        g_total = xp.where(is_first, g_total, 0.0)
    nothing = xp.zeros_like(gz)
    return (
        xp.stack([nothing, nothing, gz, gz, g_total], axis=-2),
        xp.stack([gs, gs], axis=-3),
    )


def _log_values(call: _Call, log_v: Array, sign_v: _Optional) -> _LogValues:
    values = call.values(log_v, -math.inf)
    sign = call.xp.ones_like(values) if sign_v is None else call.over(sign_v, 2)
    return _LogValues(call.xp, values, sign)


def _from_logs(
    call: _Call,
    values: _LogValues,
    log_numerator: _Optional,
    sign_numerator: _Optional,
    log_denominator: _Optional,
) -> _State:
    if log_numerator is None or log_denominator is None:
        return _nothing(call, values)
    xp = call.xp
    logs = call.over(log_numerator, 2)
    sign = (
        xp.ones_like(logs) if sign_numerator is None else call.over(sign_numerator, 2)
    )
    scale = call.over(log_denominator, 1)
    ones = xp.ones_like(scale)
    value = xp.where(scale == -math.inf, 0.0, ones)
    return _State(scale, value, xp.zeros_like(value), terms(xp, logs, sign))


def _nothing(call: _Call, values: _Values | _LogValues) -> _State:
    if isinstance(values, _Values):
        return _from_sums(call, None, None, values.width)
    nothing = call.full((call.d_k,), 0.0)
    return _State(
        nothing - math.inf, nothing, nothing, _no_sums(call, (call.d_k, values.width))
    )


def _no_sums(call: _Call, shape: tuple[int, ...]) -> Sums:
    nothing = call.full(shape, 0.0)
    return Sums(nothing - math.inf, nothing, nothing)


def _centre(xp: Namespace, values: Array) -> Array:
    """Return the mean of the values that are finite, (B..., 1, d_v)."""
    finite = xp.where(xp.isfinite(values), values, 0.0)
    return xp.sum(finite, axis=-2, keepdims=True) / max(values.shape[-2], 1)


def _since(xp: Namespace, resets: Array) -> Array:
    """Return the index of the latest reset up to each token, -1 for none."""
    index = xp.arange(resets.shape[-2], device=device_of(resets))
    found = xp.where(resets, index[:, None], -1)
    return xp.matrix_transpose(
        scan(
            lambda left, right: _Latest(xp.maximum(left.index, right.index)),
            _Latest(xp.matrix_transpose(found)),
            None,
            xp,
        ).index
    )


class _Latest(NamedTuple):
    index: Array


def _since_reset(xp: Namespace, values: Array, resets: Array) -> Array:
    """Return sums of values (..., n, d) from the latest reset on, which begins anew."""

    def merge(left: _Decayed, right: _Decayed) -> _Decayed:
        sums = xp.where(right.is_reset, right.total, left.total + right.total)
        return _Decayed(sums, left.is_reset | right.is_reset)

    elements = _Decayed(xp.matrix_transpose(values), xp.matrix_transpose(resets))
    return xp.matrix_transpose(scan(merge, elements, None, xp).total)


def _peak(xp: Namespace, values: Array, axes: tuple[int, ...]) -> Array:
    """Return the maximum over axes, -inf where there is nothing."""
    if any(values.shape[axis] == 0 for axis in axes):
        return xp.sum(values, axis=axes) - math.inf
    return xp.max(values, axis=axes)


def _finite(xp: Namespace, scale: Array) -> Array:
    """Return a scale to subtract: 0 in the place of -inf."""
    return xp.where(scale == -math.inf, 0.0, scale)


def _safe_log(xp: Namespace, values: Array) -> Array:
    is_zero = values == 0.0
    return xp.where(is_zero, -math.inf, xp.log(xp.where(is_zero, 1.0, values)))
