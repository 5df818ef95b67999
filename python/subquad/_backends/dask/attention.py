"""Linear attention over Dask arrays: states of chunks of tokens, and their prefixes.

The states of all chunks are found at once and merged by a tree; then each chunk of rows
attends what came before it, a state, and itself. Features and values stay whole, tokens
and batches may be cut anywhere.

Reverses: without an order of tokens all chunks go at once. Causal ones go through the
chunks of a sequence from the last to the first, each once, with the gradient of the
state between them; batches go at once. With segments and no order all that is large
goes at once, and the gradients of states in order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import dask.array as da

from subquad._backends.dask.common import (
    Array,
    Index,
    Part,
    blockwise,
    chain,
    cut_alike,
    edge_blocks,
    entering,
    given,
    joined,
    kernels,
    one_thread,
    part_of,
    pick,
    prefixes,
    quiet,
    sum_to,
)
from subquad._dispatch import device_of, namespace_of
from subquad._reference._common import batch_shape, wide_dtype
from subquad._reference._sums import Sums, add, log_abs, moved, power, split, terms
from subquad._reference.states import merge_attention

_Grads = tuple[Array | None, Array | None]


class _Tokens(NamedTuple):
    """A chunk of tokens, or all of them."""

    log_k: Array
    v: Array
    sign_v: Array | None
    log_q: Array | None
    log_decay: Array | None
    key_mask: Array | None
    segments: Array | None


# Their place: they alone have no batch.
_SEGMENTS = _Tokens._fields.index("segments")


class _LogSums(NamedTuple):
    """Sums over keys in logarithms, and the sum of log-decays."""

    log_decay: Array
    numerators: Sums
    denominators: Sums


class _Kind(NamedTuple):
    """What differs between values as numbers and values in logarithms.

    Attributes
    ----------
    state : tuple of tuple of str
        Dimensions of a state's arrays after the batch; those that a state has no
        gradient in are left out of `grads`.
    rows : tuple of tuple of str
        Dimensions of the results after the batch and the tokens.
    run : callable
        (tokens, state, causal, empty_is_nan, with_log_z, with_state) -> rows, state.
    reverse : callable
        (tokens, state, causal, y, grads, grads of the final state, needs) -> gradients
        of log_k, v, log_q, log_decay and the state's arrays.
    sums : callable
        (state, sum of log-decays or None) -> sums in the wide type, which lose nothing.
    merge : callable
        (sums, later sums) -> sums.
    narrow : callable
        (sums, type) -> state.
    share : callable
        (sums, sums that hold them, gradients of those) -> gradients of the first.
    seed : callable
        Gradients that come down on a final state -> those that count.
    """

    state: tuple[Index, ...]
    rows: tuple[Index, ...]
    grads: tuple[int, int]
    run: Callable[..., tuple[tuple[Array | None, ...], tuple[Array, ...] | None]]
    reverse: Callable[..., tuple[Array | None, ...]]
    sums: Callable[..., Any]
    merge: Callable[[Any, Any], Any]
    narrow: Callable[[Any, Any], tuple[Array, ...]]
    share: Callable[[Any, Any, _Grads], _Grads]
    seed: Callable[[Array | None, Array | None], _Grads]


# -------- the primitives


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
    /,
) -> tuple[Array | None, Array | None, Array | None, Array | None]:
    """See `subquad.linear_attention`: parallel over all chunks."""
    call = _Call(
        _LINEAR,
        _Tokens(log_k, v, None, log_q, log_decay, key_mask, segments),
        (key_sums, value_sums),
        causal,
    )
    y, log_z = call.attended(empty_is_nan, with_log_z)
    if not with_state:
        return y, log_z, None, None
    keys, values = call.final_state()
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
    /,
) -> tuple[Array | None, ...]:
    """See `subquad.vjp.linear_attention`: causal, in order from the last chunk."""
    return _reversed(
        _LINEAR,
        _Tokens(log_k, v, None, log_q, log_decay, key_mask, segments),
        (key_sums, value_sums),
        causal,
        (y, grad_y, grad_log_z),
        (grad_final_key_sums, grad_final_value_sums),
        needs,
    )


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
    /,
) -> tuple[Array | None, ...]:
    """See `subquad.log_linear_attention`: parallel over all chunks."""
    call = _Call(
        _LOGARITHMIC,
        _Tokens(log_k, log_v, sign_v, log_q, log_decay, key_mask, segments),
        (log_numerator, sign_numerator, log_denominator),
        causal,
    )
    rows = call.attended(False, with_log_z)
    return (*rows, *(call.final_state() if with_state else (None,) * 3))


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
    /,
) -> tuple[Array | None, ...]:
    """See `subquad.vjp.log_linear_attention`: causal, in order from the last chunk."""
    return _reversed(
        _LOGARITHMIC,
        _Tokens(log_k, log_v, sign_v, log_q, log_decay, key_mask, segments),
        (log_numerator, sign_numerator, log_denominator),
        causal,
        (None, grad_log_y, grad_log_z),
        (grad_final_log_numerator, grad_final_log_denominator),
        needs,
    )


def _reversed(
    kind: _Kind,
    tokens: _Tokens,
    state: tuple[Array | None, ...],
    causal: bool,
    rows: tuple[Array | None, Array | None, Array | None],
    grads_final: _Grads,
    needs: tuple[bool, ...],
) -> tuple[Array | None, ...]:
    """Return the gradients of all inputs, summed over what was broadcast."""
    call = _Call(kind, tokens, state, causal, rows, grads_final)
    if call.causal:
        found = call.causal_gradients()
    elif call.in_order:
        found = call.segment_gradients()
    else:
        found = call.gradients()
    inputs = (
        tokens.log_k,
        tokens.v,
        tokens.log_q,
        tokens.log_decay,
        *(state[place] for place in kind.grads),
    )
    return tuple(
        None if g is None or a is None or not needed else sum_to(g, a.shape)
        for g, a, needed in zip(found, inputs, needs, strict=True)
    )


# -------- graphs


class _Call:
    """The arrays of a call, cut alike and over the whole batch."""

    def __init__(
        self,
        kind: _Kind,
        tokens: _Tokens,
        state: tuple[Array | None, ...],
        causal: bool,
        rows: Sequence[Array | None] = (None, None, None),
        grads_final: _Grads = (None, None),
    ) -> None:
        self.kind = kind
        self.causal = causal
        self.in_order = causal or tokens.segments is not None
        self.dtype = tokens.log_k.dtype
        self.sizes = {"d": tokens.log_k.shape[-1], "dv": tokens.v.shape[-1]}
        self.sizes.update(d5=5, d2=2)
        row = "n" if self.in_order else "m"
        cores: list[Index] = [("n", "d"), ("n", "dv"), ("n", "dv"), (row, "d")]
        cores += [("n", "d"), ("n",), ("n",)]
        cores += kind.state
        cores += [(row, "dv"), (row, "dv"), (row,)]
        cores += [kind.state[place] for place in kind.grads]
        arrays = [*tokens, *state, *rows, *grads_final]
        # Segments have no batch.
        batches = [
            () if a is None or place == _SEGMENTS else a.shape[: a.ndim - len(core)]
            for place, (a, core) in enumerate(zip(arrays, cores, strict=True))
        ]
        shape = batch_shape(*batches)
        self.batch = tuple(f"b{place}" for place in range(len(shape)))
        inputs = [
            (a, (*self.batch[len(shape) - len(batch) :], *core))
            for a, batch, core in zip(arrays, batches, cores, strict=True)
        ]
        whole = _over_batch(cut_alike(inputs), self.batch, shape)
        self.tokens = _Tokens(*whole[:7])
        self.token_inputs = [
            (a, core if place == _SEGMENTS else (*self.batch, *core))
            for place, (a, core) in enumerate(zip(whole[:7], cores[:7], strict=True))
        ]
        count = 7 + len(state)
        self.state = whole[7:count]
        self.row_inputs = [
            (a, (*self.batch, *core))
            for a, core in zip(
                whole[count : count + 3], cores[count : count + 3], strict=True
            )
        ]
        self.grads_final = whole[count + 3 :]
        self.along = (*self.batch, "n")
        self.axis = len(self.batch)
        self.start = None
        if self.state[0] is not None:
            self.start = self.blocks(_given, self.batch, self.state_inputs(self.state))
        self.parts = self.part_blocks(False)
        self.entries, self.total = self.before(self.parts, self.start, False)

    def blocks(
        self,
        function: Callable[..., Any],
        index: Index,
        inputs: list[tuple[Array | None, Index]],
        **options: Any,
    ) -> Array:
        """Return an array of what a function gives of the blocks of others."""
        bound = functools.partial(function, kind=self.kind, **options)
        return blockwise(bound, index, inputs, self.dtype)

    def state_inputs(
        self, arrays: Sequence[Array | None], places: Sequence[int] | None = None
    ) -> list[tuple[Array | None, Index]]:
        places = range(len(arrays)) if places is None else places
        return [
            (a, (*self.batch, *self.kind.state[place]))
            for a, place in zip(arrays, places, strict=True)
        ]

    def part_blocks(self, heads: bool) -> Array:
        inputs = list(self.token_inputs)
        # What the queries are does not matter to a state.
        inputs[3] = (None, ())
        return self.blocks(_part, self.along, inputs, heads=heads)

    def before(
        self, parts: Array, start: Array | None, reverse: bool
    ) -> tuple[Array, Array]:
        return prefixes(parts, self.axis, self.kind.merge, start, reverse)

    def of_rows(self, blocks: Array, of: Index, place: int) -> Array:
        return self.picked(blocks, place, (*of, *self.kind.rows[place]), of)

    def picked(self, blocks: Array, place: int, index: Index, of: Index) -> Array:
        return pick(blocks, place, index, of, self.sizes)

    def attended(
        self, empty_is_nan: bool, with_log_z: bool
    ) -> tuple[Array | None, ...]:
        """Return the rows."""
        kind, q = self.kind, self.tokens.log_q
        count = len(kind.rows)
        if q is None:
            return (None,) * count
        options = {"empty_is_nan": empty_is_nan, "with_log_z": with_log_z}
        if not self.in_order:
            index = (*self.batch, "m")
            inputs = [self.token_inputs[3], (self.total, self.batch)]
            rows = self.blocks(_rows_of_all, index, inputs, **options)
        else:
            index = self.along
            later = None
            if not self.causal:
                later, _ = self.before(self.part_blocks(True), None, True)
            rows = self.blocks(
                _rows_in_order,
                index,
                [*self.token_inputs, (self.entries, index), (later, index)],
                causal=self.causal,
                **options,
            )
        found = [self.of_rows(rows, index, place) for place in range(count)]
        return tuple(found) if with_log_z else (*found[:-1], None)

    def final_state(self) -> list[Array]:
        inputs = [(self.total, self.batch)]
        states = self.blocks(_narrowed, self.batch, inputs, dtype=self.dtype)
        return [
            self.picked(states, place, (*self.batch, *core), self.batch)
            for place, core in enumerate(self.kind.state)
        ]

    def final_grads(self) -> Array | None:
        """Return the gradients of the final state, a pair a block."""
        if all(grad is None for grad in self.grads_final):
            return None
        inputs = self.state_inputs(self.grads_final, self.kind.grads)
        if self.grads_final[0] is None:
            # The library of blocks is that of the first argument.
            return self.blocks(_seeds_flipped, self.batch, inputs[::-1])
        return self.blocks(_seeds, self.batch, inputs)

    def of_state(self, blocks: Array, place: int) -> list[Array | None]:
        """Return the gradients of the state that went in, a pair in each block."""
        batch = self.batch
        pairs = self.blocks(
            _state_grads,
            batch,
            [(blocks, batch), (self.start, batch)],
            place=place,
            dtype=self.dtype,
        )
        return [
            self.picked(pairs, place, (*batch, *self.kind.state[which]), batch)
            for place, which in enumerate(self.kind.grads)
        ]

    def of_tokens(self, blocks: Array) -> list[Array | None]:
        """Return the gradients of log_k, v, log_q and log_decay."""
        widths: tuple[Index, ...] = (("d",), ("dv",), ("d",), ("d",))
        arrays = (self.tokens.log_k, self.tokens.v, *self.tokens[3:5])
        return [
            None
            if a is None
            else self.picked(blocks, place, (*self.along, *width), self.along)
            for place, (a, width) in enumerate(zip(arrays, widths, strict=True))
        ]

    def causal_gradients(self) -> list[Array | None]:
        inputs = [*self.token_inputs, (self.entries, self.along), *self.row_inputs]
        packed = self.blocks(_packed, self.along, inputs)
        found = chain(
            functools.partial(
                _causal_vjp,
                kind=self.kind,
                has_decay=self.tokens.log_decay is not None,
            ),
            packed,
            self.axis,
            self.final_grads(),
            True,
        )
        state: list[Array | None] = [None, None]
        if self.start is not None:
            first = edge_blocks(found, self.axis, 0)
            state = self.of_state(first, 4)
        return [*self.of_tokens(found), *state]

    def gradients(self) -> list[Array | None]:
        """Return the gradients where all rows attend all keys."""
        of_all = self.final_grads()
        gq = None
        if self.tokens.log_q is not None:
            index = (*self.batch, "m")
            inputs = [
                self.token_inputs[3],
                (self.total, self.batch),
                *self.row_inputs,
            ]
            found = self.blocks(_row_vjp, index, inputs)
            gq = self.picked(found, 0, (*index, "d"), index)
            sent = self.blocks(_pair_of, index, [(found, index)], place=1)
            _, of_all = prefixes(
                self.blocks(_grads_part, index, [(sent, index)]),
                self.axis,
                _added,
                None
                if of_all is None
                else self.blocks(_grads_given, self.batch, [(of_all, self.batch)]),
                False,
            )
            of_all = self.blocks(_sums_of, self.batch, [(of_all, self.batch)])
        inputs = list(self.token_inputs)
        inputs[3] = (None, ())
        inputs += [(self.parts, self.along), (self.total, self.batch)]
        inputs.append((of_all, self.batch))
        keys = self.blocks(_key_vjp, self.along, inputs)
        gk, gv = (
            self.picked(keys, place, (*self.along, width), self.along)
            for place, width in enumerate(("d", "dv"))
        )
        state: list[Array | None] = [None, None]
        if self.start is not None and of_all is not None:
            arrays = (self.start, self.total, of_all)
            shares = self.blocks(
                _start_vjp, self.batch, [(a, self.batch) for a in arrays]
            )
            state = self.of_state(shares, 0)
        return [gk, gv, gq, None, *state]

    def segment_gradients(self) -> list[Array | None]:
        """Return the gradients where rows attend all keys of their sequence."""
        along = self.along
        heads = self.part_blocks(True)
        later, _ = self.before(heads, None, True)
        inputs = [
            *self.token_inputs,
            (self.parts, along),
            (heads, along),
            (self.entries, along),
            (later, along),
        ]
        own = self.blocks(_segment_vjp, along, [*inputs, *self.row_inputs])
        reaching = []
        for place, parts, entries, start in (
            (3, self.parts, self.entries, self.final_grads()),
            (4, heads, later, None),
        ):
            links = [(parts, along), (entries, along), (own, along)]
            reaching.append(
                chain(
                    functools.partial(_sent_back, kind=self.kind, place=place),
                    self.blocks(_packed, along, links),
                    self.axis,
                    start,
                    place == 3,
                )
            )
        found = self.blocks(
            _segment_keys_vjp,
            along,
            [*inputs, (own, along), *((part, along) for part in reaching)],
        )
        state: list[Array | None] = [None, None]
        if self.start is not None:
            first = edge_blocks(reaching[0], self.axis, 0)
            state = self.of_state(first, 0)
        gk, gv, gq, _ = self.of_tokens(found)
        return [gk, gv, gq, None, *state]


def _over_batch(
    inputs: list[tuple[Array | None, Index]], batch: Index, shape: tuple[int, ...]
) -> list[Array | None]:
    """Repeat arrays over the whole batch, in views."""
    chunks: dict[str, Any] = {
        name: (size,) for name, size in zip(batch, shape, strict=True)
    }
    for a, index in inputs:
        if a is not None:
            for name, pieces in zip(index, a.chunks, strict=True):
                if name in chunks and sum(pieces) != 1:
                    chunks[name] = pieces
    result: list[Array | None] = []
    for place, (a, index) in enumerate(inputs):
        core = tuple(name for name in index if name not in batch)
        if a is None or place == _SEGMENTS:
            result.append(a)
            continue
        rank = len(core)
        if a.shape[: a.ndim - rank] != shape:
            a = da.broadcast_to(
                a,
                (*shape, *a.shape[a.ndim - rank :]),
                chunks=(
                    *(chunks[name] for name in batch),
                    *a.chunks[a.ndim - rank :],
                ),
            )
        result.append(a)
    return result


# -------- blocks


def _packed(*blocks: Any, kind: _Kind) -> tuple[Any, ...]:
    del kind
    return blocks


def _seeds(first: Array | None, second: Array | None, *, kind: _Kind) -> _Grads:
    return kind.seed(first, second)


def _seeds_flipped(second: Array, first: Array | None, *, kind: _Kind) -> _Grads:
    return kind.seed(first, second)


def _pair_of(block: tuple[Any, ...], *, kind: _Kind, place: int) -> Any:
    del kind
    return block[place]


def _sums_of(part: Part, *, kind: _Kind) -> Any:
    del kind
    return part.sums


def _grads_part(grads: _Grads, *, kind: _Kind) -> Part:
    del kind
    return Part(0, 0, False, grads)


def _grads_given(grads: _Grads, *, kind: _Kind) -> Part:
    del kind
    return given(grads)


def _given(*state: Array, kind: _Kind) -> Part:
    return given(kind.sums(state, None))


def _narrowed(part: Part, *, kind: _Kind, dtype: Any) -> tuple[Array, ...]:
    return tuple(_cast(a, dtype) for a in kind.narrow(part.sums, dtype))


def _part(*arrays: Any, kind: _Kind, heads: bool) -> Part:
    """Return the state of a chunk's last sequence, or with `heads` of its first."""
    chunk = _Tokens(*arrays)
    head, tail = _borders(chunk)
    tokens = _span(chunk, 0, head) if heads else _span(chunk, tail, None)
    with one_thread():
        _, state = kind.run(
            tokens._replace(segments=None),
            None,
            tokens.log_decay is not None,
            False,
            False,
            True,
        )
    sums = kind.sums(state, _decays(tokens))
    return part_of(chunk.segments, chunk.log_k.shape[-2], heads, sums)


def _borders(tokens: _Tokens) -> tuple[int, int]:
    """Return where the first sequence ends and where the last one begins."""
    n, segments = tokens.log_k.shape[-2], tokens.segments
    if segments is None or n < 2:
        return n, 0
    xp = namespace_of(segments)
    places = xp.nonzero(segments[1:] != segments[:-1])[0]
    if places.shape[0] == 0:
        return n, 0
    return int(places[0]) + 1, int(places[-1]) + 1


def _span(tokens: _Tokens, start: int, stop: int | None) -> _Tokens:
    """Return some of the tokens."""
    span = slice(start, stop)
    return _Tokens(
        *(None if a is None else a[..., span, :] for a in tokens[:5]),
        *(None if a is None else a[..., span] for a in tokens[5:]),
    )


def _span_of_rows(
    rows: Sequence[Array | None], start: int, stop: int | None
) -> tuple[Array | None, ...]:
    span = slice(start, stop)
    return (
        *(None if a is None else a[..., span, :] for a in rows[:2]),
        None if rows[2] is None else rows[2][..., span],
    )


@quiet
def _decays_of(log_decay: Array) -> Array:
    xp = namespace_of(log_decay)
    forgets = xp.any(log_decay == -math.inf, axis=-2)
    total = xp.sum(log_decay, axis=-2, dtype=wide_dtype(xp, log_decay))
    return xp.where(forgets, -math.inf, total)


def _decays(tokens: _Tokens) -> Array:
    if tokens.log_decay is not None:
        return _decays_of(tokens.log_decay)
    k = tokens.log_k
    xp = namespace_of(k)
    shape = (*k.shape[:-2], k.shape[-1])
    return xp.zeros(shape, dtype=wide_dtype(xp, k), device=device_of(k))


def _no_keys(like: Array, width: int) -> Array:
    xp = namespace_of(like)
    shape = (*like.shape[:-2], 0, width)
    return xp.zeros(shape, dtype=like.dtype, device=device_of(like))


def _rows_of_all(
    log_q: Array, total: Part, *, kind: _Kind, empty_is_nan: bool, with_log_z: bool
) -> tuple[Array | None, ...]:
    state = kind.narrow(total.sums, log_q.dtype)
    tokens = _only_rows(log_q, state)
    with one_thread():
        return kind.run(tokens, state, False, empty_is_nan, with_log_z, False)[0]


def _only_rows(log_q: Array, state: tuple[Array, ...]) -> _Tokens:
    """Return rows that attend a state alone."""
    k, v = _no_keys(log_q, log_q.shape[-1]), _no_keys(log_q, _width(state))
    return _Tokens(k, v, None, log_q, None, None, None)


def _width(state: tuple[Array, ...]) -> int:
    """Return the number of values that a state has of each feature."""
    width: int = max(state[:2], key=lambda array: array.ndim).shape[-1]
    return width


def _rows_in_order(
    *arrays: Any, kind: _Kind, causal: bool, empty_is_nan: bool, with_log_z: bool
) -> tuple[Array | None, ...]:
    tokens = _Tokens(*arrays[:7])
    entry, later = arrays[7:]
    xp = namespace_of(tokens.log_k)
    found = []
    for piece, span in _pieces(kind, tokens, entry, later):
        del span
        with one_thread():
            rows, _ = kind.run(
                piece.tokens,
                piece.state,
                causal,
                empty_is_nan,
                with_log_z,
                False,
            )
        found.append(rows)
    if len(found) == 1:
        return found[0]
    return tuple(
        None if parts[0] is None else xp.concat(parts, axis=-2 if wide else -1)
        for parts, wide in zip(
            zip(*found, strict=True), (len(core) for core in kind.rows), strict=True
        )
    )


class _Piece(NamedTuple):
    """Tokens that begin with a state: that of tokens before, after, or both."""

    tokens: _Tokens
    before: Any
    after: Any
    state: tuple[Array, ...] | None


def _pieces(
    kind: _Kind, tokens: _Tokens, entry: Part | None, later: Part | None
) -> list[tuple[_Piece, tuple[int, int]]]:
    """Cut a chunk where a state belongs to its last sequence and not to its first."""
    n, segments = tokens.log_k.shape[-2], tokens.segments
    before = entering(entry, part_of(segments, n, False, None))
    after = entering(later, part_of(segments, n, True, None))
    dtype = tokens.log_k.dtype

    def piece(
        start: int, stop: int, before: Any, after: Any
    ) -> tuple[_Piece, tuple[int, int]]:
        known = [sums for sums in (before, after) if sums is not None]
        state = (
            kind.narrow(functools.reduce(kind.merge, known), dtype) if known else None
        )
        return _Piece(_span(tokens, start, stop), before, after, state), (start, stop)

    _, tail = _borders(tokens)
    if after is None or tail == 0:
        return [piece(0, n, before, after)]
    return [piece(0, tail, before, None), piece(tail, n, None, after)]


def _causal_vjp(
    packed: tuple[Any, ...], carried: Any, *, kind: _Kind, has_decay: bool
) -> Any:
    tokens, entry, rows = _Tokens(*packed[:7]), packed[7], packed[8:]
    if carried is not None and len(carried) == 5:
        carried = carried[4]
    n = tokens.log_k.shape[-2]
    sums = entering(entry, part_of(tokens.segments, n, False, None))
    state = None if sums is None else kind.narrow(sums, tokens.log_k.dtype)
    y, *grads = rows
    with one_thread():
        *found, first, second = kind.reverse(
            tokens,
            state,
            True,
            y,
            grads,
            (None, None) if carried is None else carried,
            (
                True,
                True,
                tokens.log_q is not None,
                has_decay,
                *(state is not None,) * 2,
            ),
        )
    sent: Any = None if state is None else (first, second)
    if n == 0:
        sent = carried if carried is not None else sent
    return (*found, sent)


def _row_vjp(
    log_q: Array, total: Part, *rows: Array | None, kind: _Kind
) -> tuple[Array, _Grads]:
    state = kind.narrow(total.sums, log_q.dtype)
    y, *grads = rows
    with one_thread():
        _, _, gq, _, first, second = kind.reverse(
            _only_rows(log_q, state),
            state,
            False,
            y,
            grads,
            (None, None),
            (False, False, True, False, True, True),
        )
    assert gq is not None
    return gq, (first, second)


def _key_vjp(*arrays: Any, kind: _Kind) -> tuple[Array | None, Array | None]:
    tokens, (part, total, grads) = _Tokens(*arrays[:7]), arrays[7:]
    return _through_state(kind, tokens, part.sums, total.sums, grads)


def _through_state(
    kind: _Kind, tokens: _Tokens, sums: Any, total: Any, grads: _Grads | None
) -> tuple[Array | None, Array | None]:
    """Return the gradients of keys and values through sums that hold theirs."""
    shared = (None, None) if grads is None else kind.share(sums, total, grads)
    with one_thread():
        gk, gv, *_ = kind.reverse(
            tokens._replace(log_q=None, segments=None),
            None,
            False,
            None,
            (None, None),
            shared,
            (True, True, False, False, False, False),
        )
    return gk, gv


def _start_vjp(
    start: Part, total: Part, grads: _Grads, *, kind: _Kind
) -> tuple[_Grads]:
    return (kind.share(start.sums, total.sums, grads),)


def _state_grads(
    block: tuple[Any, ...], start: Part, *, kind: _Kind, place: int, dtype: Any
) -> list[Array]:
    """Return the gradients of a state, 0 where none came down."""
    state = kind.narrow(start.sums, dtype)
    pair = (None, None) if block[place] is None else block[place]
    return [
        _cast(namespace_of(like).zeros_like(like) if g is None else g, dtype)
        for g, like in zip(pair, (state[which] for which in kind.grads), strict=True)
    ]


def _cast(array: Array, dtype: Any) -> Array:
    return namespace_of(array).astype(array, dtype, copy=False)


def _added(one: _Grads, other: _Grads) -> _Grads:
    first, second = (
        b if a is None else a if b is None else a + b
        for a, b in zip(one, other, strict=True)
    )
    return first, second


def _segment_vjp(*arrays: Any, kind: _Kind) -> tuple[Any, ...]:
    """Return the gradients within a chunk, and those of the states before and after."""
    tokens = _Tokens(*arrays[:7])
    part, head, entry, later = arrays[7:11]
    del part, head
    rows = arrays[11:]
    xp = namespace_of(tokens.log_k)
    found: list[tuple[Array | None, ...]] = []
    sent: list[_Grads | None] = [None, None]
    for piece, (start, stop) in _pieces(kind, tokens, entry, later):
        y, *grads = _span_of_rows(rows, start, stop)
        has_state = piece.state is not None
        with one_thread():
            gk, gv, gq, _, first, second = kind.reverse(
                piece.tokens,
                piece.state,
                False,
                y,
                grads,
                (None, None),
                (True, True, tokens.log_q is not None, False, has_state, has_state),
            )
        found.append((gk, gv, gq))
        both = piece.before is not None and piece.after is not None
        merged = kind.merge(piece.before, piece.after) if both else None
        for place, sums in enumerate((piece.before, piece.after)):
            if sums is not None:
                pair = (first, second)
                sent[place] = kind.share(sums, merged, pair) if both else pair
    joint = (
        parts[0] if len(parts) == 1 or parts[0] is None else xp.concat(parts, axis=-2)
        for parts in zip(*found, strict=True)
    )
    return (*joint, *sent)


def _sent_back(
    packed: tuple[Part, Part | None, tuple[Any, ...]],
    received: Any,
    *,
    kind: _Kind,
    place: int,
) -> Any:
    """Return the gradients of what a chunk begins with, and of what it ends with."""
    part, entry, own = packed
    reached = received.start if isinstance(received, _Sent) else received
    if part.first is None:
        return _Sent(reached, reached)
    sums = entering(entry, part)
    if sums is None:
        return _Sent(None, reached)
    sent = own[place]
    if reached is not None and not part.breaks:
        through = kind.share(sums, kind.merge(sums, part.sums), reached)
        sent = through if sent is None else _added(sent, through)
    return _Sent(sent, reached)


class _Sent(NamedTuple):
    start: Any
    end: Any


def _segment_keys_vjp(*arrays: Any, kind: _Kind) -> tuple[Array | None, ...]:
    tokens = _Tokens(*arrays[:7])
    part, head, entry, later, own, before, after = arrays[7:]
    gk, gv, gq, *_ = own
    ends = _borders(tokens)
    n = tokens.log_k.shape[-2]
    for tail, of, entered, sent in (
        (True, part, entry, before.end),
        (False, head, later, after.end),
    ):
        if sent is None or n == 0:
            continue
        start, stop = (ends[1], n) if tail else (0, ends[0])
        total = joined(kind.merge, entered, of).sums
        more_k, more_v = _through_state(
            kind, _span(tokens, start, stop), of.sums, total, sent
        )
        gk, gv = (
            _plus(array, more, start, stop)
            for array, more in ((gk, more_k), (gv, more_v))
        )
    return gk, gv, gq


def _plus(array: Array, more: Array, start: int, stop: int) -> Array:
    xp = namespace_of(array)
    pieces = [array[..., :start, :], array[..., start:stop, :] + more]
    return xp.concat([*pieces, array[..., stop:, :]], axis=-2)


# -------- values as numbers


def _run(
    tokens: _Tokens,
    state: tuple[Array, ...] | None,
    causal: bool,
    empty_is_nan: bool,
    with_log_z: bool,
    with_state: bool,
) -> tuple[tuple[Array | None, ...], tuple[Array, ...] | None]:
    k, v, _, q, *options = tokens
    y, log_z, *final = kernels(k).linear_attention(
        k,
        v,
        q,
        *options,
        *(state or (None, None)),
        causal,
        empty_is_nan,
        with_log_z,
        with_state,
    )
    return (y, log_z), tuple(final) if with_state else None


def _reverse(
    tokens: _Tokens,
    state: tuple[Array, ...] | None,
    causal: bool,
    y: Array | None,
    grads: Sequence[Array | None],
    grads_final: Sequence[Array | None],
    needs: tuple[bool, ...],
) -> tuple[Array | None, ...]:
    k, v, _, q, *options = tokens
    final = [None if g is None else _cast(g, k.dtype) for g in grads_final]
    backend = kernels(k)
    found: tuple[Array | None, ...] = backend.linear_attention_vjp(
        k, v, q, *options, *(state or (None, None)), causal, y, *grads, *final, needs
    )
    return found


@quiet
def _sums(state: tuple[Array, Array], decays: Array | None) -> tuple[Array, Array]:
    """Return a state in the wide type, in which the sum of log-decays is exact too."""
    xp = namespace_of(state[0])
    keys, values = (_cast(part, wide_dtype(xp, part)) for part in state)
    if decays is not None:
        keys = xp.concat([keys[..., :4, :], decays[..., None, :]], axis=-2)
    return keys, values


def _merge(left: tuple[Array, Array], right: tuple[Array, Array]) -> Any:
    return merge_attention(*left, *right)


@quiet
def _narrow(sums: tuple[Array, Array], dtype: Any) -> tuple[Array, Array]:
    keys, values = sums
    xp = namespace_of(keys)
    rows = [
        *split(xp, keys[..., 0, :], keys[..., 1, :], dtype),
        *split(xp, keys[..., 2, :], keys[..., 3, :], dtype),
        _cast(keys[..., 4, :], dtype),
    ]
    pair = split(xp, values[..., 0, :, :], values[..., 1, :, :], dtype)
    return xp.stack(rows, axis=-2), xp.stack(pair, axis=-3)


@quiet
def _share(
    sums: tuple[Array, Array], total: tuple[Array, Array], grads: _Grads
) -> _Grads:
    """Move gradients to the scale of sums that are a part of others."""
    xp = namespace_of(sums[0])
    mine, all_keys = sums[0], total[0]
    factor = power(xp, mine[..., 0, :], all_keys[..., 0, :])
    factor = factor * xp.exp(mine[..., 1, :] - all_keys[..., 1, :])
    factor = xp.where(mine[..., 0, :] == -math.inf, 0.0, factor)[..., None, :]
    g_keys, g_values = grads
    if g_keys is not None:
        moved_keys = g_keys[..., :4, :] * factor
        g_keys = xp.concat(
            [moved_keys, _cast(g_keys[..., 4:, :], moved_keys.dtype)], axis=-2
        )
    if g_values is not None:
        g_values = g_values * factor[..., None]
    return g_keys, g_values


def _seed(g_keys: Array | None, g_values: Array | None) -> _Grads:
    """Return gradients in which what rounding took counts as what it was taken from."""
    if g_keys is not None:
        xp = namespace_of(g_keys)
        sums, decay = g_keys[..., 2:3, :], g_keys[..., 4:, :]
        scale = xp.zeros_like(g_keys[..., :2, :])
        g_keys = xp.concat([scale, sums, sums, decay], axis=-2)
    if g_values is not None:
        sums = g_values[..., :1, :, :]
        g_values = namespace_of(g_values).concat([sums, sums], axis=-3)
    return g_keys, g_values


_LINEAR = _Kind(
    (("d5", "d"), ("d2", "d", "dv")),
    (("dv",), ()),
    (0, 1),
    _run,
    _reverse,
    _sums,
    _merge,
    _narrow,
    _share,
    _seed,
)


# -------- values in logarithms


def _run_logs(
    tokens: _Tokens,
    state: tuple[Array, ...] | None,
    causal: bool,
    empty_is_nan: bool,
    with_log_z: bool,
    with_state: bool,
) -> tuple[tuple[Array | None, ...], tuple[Array, ...] | None]:
    del empty_is_nan
    dtype = tokens.log_k.dtype
    # Rounded logarithms between chunks would add errors that one call has not.
    if state is not None or with_state:
        tokens = _widened(tokens)
    k, v, sign, q, *options = tokens
    backend = kernels(k)
    found = backend.log_linear_attention(
        k,
        v,
        sign,
        q,
        *options,
        *(state or (None, None, None)),
        causal,
        with_log_z,
        with_state,
    )
    rows = tuple(None if part is None else _cast(part, dtype) for part in found[:3])
    return rows, found[3:] if with_state else None


def _widened(tokens: _Tokens) -> _Tokens:
    k, v, *others = tokens[:5]
    wide = wide_dtype(namespace_of(k), k)
    sign, q, decay = (None if a is None else _cast(a, wide) for a in others)
    return _Tokens(_cast(k, wide), _cast(v, wide), sign, q, decay, *tokens[5:])


def _reverse_logs(
    tokens: _Tokens,
    state: tuple[Array, ...] | None,
    causal: bool,
    y: Array | None,
    grads: Sequence[Array | None],
    grads_final: Sequence[Array | None],
    needs: tuple[bool, ...],
) -> tuple[Array | None, ...]:
    del y
    dtype = tokens.log_k.dtype
    all_grads = [*grads, *grads_final]
    if state is not None or any(g is not None for g in grads_final):
        tokens = _widened(tokens)
        wide = tokens.log_k.dtype
        all_grads = [None if g is None else _cast(g, wide) for g in all_grads]
    k, v, sign, q, *options = tokens
    backend = kernels(k)
    found = backend.log_linear_attention_vjp(
        k,
        v,
        sign,
        q,
        *options,
        *(state or (None, None, None)),
        causal,
        *all_grads,
        needs,
    )
    return (*(None if g is None else _cast(g, dtype) for g in found[:4]), *found[4:])


@quiet
def _log_sums(state: tuple[Array, ...], decays: Array | None) -> _LogSums:
    log_numerator, sign, log_denominator = state
    xp = namespace_of(log_numerator)
    wide = wide_dtype(xp, log_numerator)
    numerator, denominator = _cast(log_numerator, wide), _cast(log_denominator, wide)
    sign = xp.ones_like(numerator) if sign is None else _cast(sign, wide)
    if decays is None:
        decays = xp.zeros_like(denominator)
    return _LogSums(
        decays,
        terms(xp, numerator, sign),
        terms(xp, denominator, xp.ones_like(denominator)),
    )


@quiet
def _merge_logs(left: _LogSums, right: _LogSums) -> _LogSums:
    xp = namespace_of(left.log_decay)
    forgets = (left.log_decay == -math.inf) | (right.log_decay == -math.inf)
    decay = xp.where(forgets, -math.inf, left.log_decay + right.log_decay)
    passing = right.log_decay
    return _LogSums(
        decay,
        add(xp, moved(xp, left.numerators, passing[..., None]), right.numerators),
        add(xp, moved(xp, left.denominators, passing), right.denominators),
    )


@quiet
def _narrow_logs(sums: _LogSums, dtype: Any) -> tuple[Array, Array, Array]:
    """Return a state in logarithms, in the wide type: blocks are computed in it."""
    del dtype
    xp = namespace_of(sums.log_decay)
    (scale, logs), (of_keys, key_logs) = (log_abs(xp, part) for part in sums[1:])
    sign = xp.sign(sums.numerators.value + sums.numerators.rest)
    return scale + logs, sign, of_keys + key_logs


@quiet
def _share_logs(sums: _LogSums, total: _LogSums, grads: _Grads) -> _Grads:
    """Return g log |part| = g log |total| · part / total, 0 where either is."""
    xp = namespace_of(sums.log_decay)
    found: list[Array | None] = []
    for part, whole, grad in zip(sums[1:], total[1:], grads, strict=True):
        if grad is None:
            found.append(None)
            continue
        (one, log_one), (all_of, log_all) = log_abs(xp, part), log_abs(xp, whole)
        sign = xp.sign(part.value + part.rest) * xp.sign(whole.value + whole.rest)
        ratio = sign * xp.exp(log_one - log_all) * power(xp, one, all_of)
        found.append(xp.where((sign == 0.0) | (grad == 0.0), 0.0, grad * ratio))
    return found[0], found[1]


def _both(g_numerator: Array | None, g_denominator: Array | None) -> _Grads:
    return g_numerator, g_denominator


_LOGARITHMIC = _Kind(
    (("d", "dv"), ("d", "dv"), ("d",)),
    (("dv",), ("dv",), ()),
    (0, 2),
    _run_logs,
    _reverse_logs,
    _log_sums,
    _merge_logs,
    _narrow_logs,
    _share_logs,
    _both,
)
