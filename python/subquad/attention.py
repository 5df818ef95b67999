"""Linear attention over log-features: all at once, causal, or token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from subquad._dispatch import Array, backend_for, namespace_of
from subquad._reference import states as _merges
from subquad._states import State, listed, of_states, type_of_state
from subquad._validation import (
    AttentionArguments,
    as_type_of,
    check_empty,
    common_floats,
    linear_attention_arguments,
    log_linear_attention_arguments,
)

__all__ = [
    "AttentionState",
    "LogAttentionState",
    "linear_attention",
    "log_linear_attention",
]

# How many tokens a state holds beside its sums, when it grows token by token.
_RECENT = 16


class AttentionResult(NamedTuple):
    """Attention, the logarithms of the rows' sums, and the state after all tokens."""

    y: Array
    log_z: Array
    state: AttentionState


class AttentionAndNormalizer(NamedTuple):
    """Attention and the logarithms of the rows' sums."""

    y: Array
    log_z: Array


class AttentionAndState(NamedTuple):
    """Attention and the state after all tokens."""

    y: Array
    state: AttentionState


class LogAttentionResult(NamedTuple):
    """Attention in logarithms, those of the rows' sums, and the state after all."""

    log_abs_y: Array
    sign_y: Array
    log_z: Array
    state: LogAttentionState


class LogAttentionAndNormalizer(NamedTuple):
    """Attention in logarithms and those of the rows' sums."""

    log_abs_y: Array
    sign_y: Array
    log_z: Array


class LogAttentionAndState(NamedTuple):
    """Attention in logarithms and the state after all tokens."""

    log_abs_y: Array
    sign_y: Array
    state: LogAttentionState


class LogAttention(NamedTuple):
    """Attention in logarithms."""

    log_abs_y: Array
    sign_y: Array


@listed
@dataclass(frozen=True, eq=False)
class LogAttentionState(State):
    """Sums over keys and values in logarithms, of any range.

    Parameters
    ----------
    log_numerator : array of shape (..., d_k, d_v)
        Logarithms of |Σⱼ exp(log_kⱼ) vⱼ|.
    sign_numerator : array of shape (..., d_k, d_v)
        The signs of these sums, -1, 0 or 1.
    log_denominator : array of shape (..., d_k)
        Logarithms of Σⱼ exp(log_kⱼ), -inf where there were no keys.

    See Also
    --------
    log_linear_attention : Takes such a state and returns one.
    AttentionState : Its counterpart for values that are no logarithms.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> state = sq.LogAttentionState.init((), 2, 3)
    >>> state.log_denominator
    array([-inf, -inf])
    """

    log_numerator: Array
    sign_numerator: Array
    log_denominator: Array

    @classmethod
    def init(
        cls,
        batch_shape: tuple[int, ...],
        d_k: int,
        d_v: int,
        *,
        like: Array | None = None,
    ) -> LogAttentionState:
        """Return the state before any token.

        Parameters
        ----------
        batch_shape : tuple of int
            Batch dimensions.
        d_k : int
            Number of features of the keys.
        d_v : int
            Number of features of the values.
        like : array, optional
            An array of the library, the type and on the device that the state is to
            have. By default NumPy and float64.

        Returns
        -------
        LogAttentionState

        Examples
        --------
        >>> import subquad as sq
        >>> sq.LogAttentionState.init((4,), 2, 3).log_numerator.shape
        (4, 2, 3)
        """
        xp, dtype, device = type_of_state(like)
        place = {"dtype": dtype, "device": device}
        shape = (*batch_shape, d_k, d_v)
        return cls(
            xp.full(shape, -math.inf, **place),
            xp.zeros(shape, **place),
            xp.full((*batch_shape, d_k), -math.inf, **place),
        )


@listed
@dataclass(frozen=True, eq=False)
class AttentionState(State):
    """What linear attention remembers of its past: sums over keys, of constant size.

    Parameters
    ----------
    key_sums : array of shape (..., 5, d_k)
        Per feature: the logarithm M of a scale, what rounding took from it, the sum
        Z = Σⱼ exp(log_kⱼ - M), what rounding took from it, and the sum of the decays.
    value_sums : array of shape (..., 2, d_k, d_v)
        S = Σⱼ exp(log_kⱼ - M) vⱼ, and what rounding took from it.
    recent_keys : array of shape (..., R, d_k), optional
        Tokens that `step` has added and the sums do not hold yet: exp(log_kⱼ - M).
    recent_values : array of shape (..., R, d_v), optional
        Their values.
    recent_count : int array of shape (...), optional
        How many there are.

    See Also
    --------
    linear_attention : Takes a state and returns one.
    LogAttentionState : The same sums in logarithms.

    Notes
    -----
    Keys are decayed to the last token. What rounding takes is kept, so that a sequence
    in any number of parts gives what it gives at once. States with leading batch
    dimensions can be indexed, and `take` picks some of them.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.normal(size=(6, 2)) for _ in range(3))
    >>> state = sq.AttentionState.init((), 2, 2)
    >>> for t in range(6):
    ...     y, state = state.step(q[t], k[t], v[t])
    >>> np.allclose(y, sq.linear_attention(q, k, v, causal=True)[-1])
    True
    """

    key_sums: Array
    value_sums: Array
    recent_keys: Array | None = None
    recent_values: Array | None = None
    recent_count: Array | None = None

    @classmethod
    def init(
        cls,
        batch_shape: tuple[int, ...],
        d_k: int,
        d_v: int,
        *,
        like: Array | None = None,
    ) -> AttentionState:
        """Return the state before any token.

        Parameters
        ----------
        batch_shape : tuple of int
            Batch dimensions, for instance (batch, heads).
        d_k : int
            Number of features of the keys.
        d_v : int
            Number of features of the values.
        like : array, optional
            An array of the library, the type and on the device that the state is to
            have. By default NumPy and float64.

        Returns
        -------
        AttentionState

        Examples
        --------
        >>> import subquad as sq
        >>> sq.AttentionState.init((4,), 2, 3).denominator.shape
        (4, 2)
        """
        xp, dtype, device = type_of_state(like)
        place = {"dtype": dtype, "device": device}
        nothing = xp.zeros((*batch_shape, 4, d_k), **place)
        scale = xp.full((*batch_shape, 1, d_k), -math.inf, **place)
        return cls(
            xp.concat([scale, nothing], axis=-2),
            xp.zeros((*batch_shape, 2, d_k, d_v), **place),
        )

    @property
    def log_scale(self) -> Array:
        """Logarithms of the sums' scale, (..., d_k); -inf for features without keys."""
        return self.key_sums[..., 0, :] + self.key_sums[..., 1, :]

    @property
    def denominator(self) -> Array:
        """Sums of the keys in that scale, (..., d_k)."""
        sums = self.finalize().key_sums
        return sums[..., 2, :] + sums[..., 3, :]

    @property
    def numerator(self) -> Array:
        """Sums of keys times values in that scale, (..., d_k, d_v)."""
        sums = self.finalize().value_sums
        return sums[..., 0, :, :] + sums[..., 1, :, :]

    @property
    def log_decay(self) -> Array:
        """Sums of the decays of all tokens, (..., d_k)."""
        return self.key_sums[..., 4, :]

    def update(
        self,
        log_k: Array,
        v: Array,
        log_decay: Array | None = None,
        key_mask: Array | None = None,
    ) -> AttentionState:
        """Return the state with more tokens.

        Parameters
        ----------
        log_k : array of shape (..., n, d_k)
            Log-features of the keys.
        v : array of shape (..., n, d_v)
            Values.
        log_decay : array of shape (..., n, d_k), optional
            Logarithms of what multiplies the past at each token.
        key_mask : bool array of shape (..., n), optional
            True for keys that are kept.

        Returns
        -------
        AttentionState

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> state = sq.AttentionState.init((), 1, 1)
        >>> state.update(np.zeros((3, 1)), np.ones((3, 1))).denominator
        array([3.])
        """
        call = linear_attention_arguments(
            None,
            log_k,
            v,
            causal=log_decay is not None,
            log_decay=log_decay,
            key_mask=key_mask,
            state=sums_of(self),
            needs_q=False,
        )
        *_, key_sums, value_sums = _linear(call, False, False, True)
        return AttentionState(key_sums, value_sums)

    def step(
        self,
        log_q: Array,
        log_k: Array,
        v: Array,
        log_decay: Array | None = None,
        *,
        empty: Literal["zero", "nan"] = "zero",
    ) -> tuple[Array, AttentionState]:
        """Add a token and attend all tokens so far.

        Parameters
        ----------
        log_q : array of shape (..., d_k)
            Log-features of the query.
        log_k : array of shape (..., d_k)
            Log-features of the key.
        v : array of shape (..., d_v)
            Value.
        log_decay : array of shape (..., d_k), optional
            Logarithms of what multiplies the past.
        empty : {"zero", "nan"}
            What a row gives that attends nothing.

        Returns
        -------
        y : array of shape (..., d_v)
            Attention of the token, in the type of `v`.
        state : AttentionState
            The state with the token.

        Notes
        -----
        O(d_k d_v) time, whatever came before. This state is left as it is.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> state = sq.AttentionState.init((), 1, 1)
        >>> zero = np.zeros(1)
        >>> y, state = state.step(zero, zero, np.array([1.0]))
        >>> y, state = state.step(zero, zero, np.array([2.0]))
        >>> y
        array([1.5])
        """
        empty_is_nan = check_empty(empty)
        y: Any
        call = linear_attention_arguments(
            _token("log_q", log_q),
            _token("log_k", log_k),
            _token("v", v),
            causal=True,
            log_decay=None if log_decay is None else _token("log_decay", log_decay),
            state=(self.key_sums, self.value_sums),
        )
        if not _steps_in_place(call):
            if self.recent_count is not None:
                folded = self.finalize()
                call = call._replace(state=(folded.key_sums, folded.value_sums))
            y, _, *sums = _linear(call, empty_is_nan, False, True)
            state = AttentionState(*sums)
        else:
            state = self._own(call)
            backend: Any = call.backend
            y, _ = backend.attention_step(
                *(
                    None if array is None else array[..., 0, :]
                    for array in (call.log_k, *call.values, call.log_q, call.log_decay)
                ),
                *(array for _, array in state._arrays()),
                empty_is_nan,
                False,
            )
            y = y[..., None, :]
        return as_type_of(y[..., 0, :], v), state

    def _own(self, call: AttentionArguments) -> AttentionState:
        """Return a copy over a call's batch, with room for recent tokens."""
        key_sums, value_sums = call.state
        keys, values, count = self.recent_keys, self.recent_values, self.recent_count
        xp = namespace_of(call.log_k)
        batch, like = call.batch, call.log_k
        value: Any = call.values[0]
        d_k, d_v = like.shape[-1], value.shape[-1]

        def own(array: Array | None, shape: tuple[int, ...], dtype: Any) -> Array:
            place = {"dtype": dtype, "device": like.device}
            if array is None:
                return xp.zeros((*batch, *shape), **place)
            # Kernels change it: in one piece, whatever it was broadcast from.
            copy = xp.empty((*batch, *shape), **place)
            copy[...] = array
            return copy

        room = _RECENT if self.recent_keys is None else self.recent_keys.shape[-2]
        return AttentionState(
            own(key_sums, (5, d_k), like.dtype),
            own(value_sums, (2, d_k, d_v), like.dtype),
            own(keys, (room, d_k), like.dtype),
            own(values, (room, d_v), like.dtype),
            own(count, (), xp.int64),
        )

    def merge(self, other: AttentionState) -> AttentionState:
        """Return the state after the tokens of this one and then those of another.

        Parameters
        ----------
        other : AttentionState
            The state of tokens that come later, whose decays act on this one. Its batch
            dimensions broadcast with those of this one.

        Returns
        -------
        AttentionState

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> start = sq.AttentionState.init((), 1, 1)
        >>> a = start.update(np.zeros((3, 1)), np.ones((3, 1)))
        >>> b = start.update(np.zeros((2, 1)), np.ones((2, 1)))
        >>> sq.AttentionState.merge(a, b).denominator
        array([5.])
        """
        arrays: tuple[Any, ...] = (*sums_of(self), *sums_of(other))
        names = ("key_sums", "value_sums", "other.key_sums", "other.value_sums")
        backend_for(**dict(zip(names, arrays, strict=True)))
        for array, later, tail in zip(arrays[:2], arrays[2:], (2, 3), strict=True):
            mine, others = array.shape[-tail:], later.shape[-tail:]
            if tuple(mine) != tuple(others):
                message = (
                    "other must be a state of the same features: expected sums of "
                    f"shape (..., {', '.join(map(str, mine))}), got shape "
                    f"{tuple(later.shape)}"
                )
                raise ValueError(message)
        return AttentionState(
            *of_states(_merges.merge_attention, *common_floats(names, arrays))
        )

    def finalize(self) -> AttentionState:
        """Return the state with its recent tokens in the sums.

        Returns
        -------
        AttentionState
            Equal to this one, with `key_sums` and `value_sums` alone.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> zero, one = np.zeros(1), np.ones(1)
        >>> y, state = sq.AttentionState.init((), 1, 1).step(zero, zero, one)
        >>> state.finalize().recent_count is None
        True
        """
        if self.recent_count is None:
            return self
        return AttentionState(
            *of_states(
                _merges.fold_recent,
                self.key_sums,
                self.value_sums,
                self.recent_keys,
                self.recent_values,
                self.recent_count,
            )
        )

    def to_log(self) -> LogAttentionState:
        """Return the sums in logarithms.

        Returns
        -------
        LogAttentionState
            Without the decays, which logarithms have taken up.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> state = sq.AttentionState.init((), 1, 1)
        >>> state = state.update(np.full((2, 1), 3.0), np.ones((2, 1)))
        >>> state.to_log().log_denominator
        array([3.69314718])
        """
        return LogAttentionState(*of_states(_merges.attention_to_log, *sums_of(self)))

    @classmethod
    def from_log(cls, state: LogAttentionState) -> AttentionState:
        """Return a state of sums that are given in logarithms.

        Parameters
        ----------
        state : LogAttentionState
            Also that of another implementation, whose states are such logarithms.

        Returns
        -------
        AttentionState
            Its `log_decay` is 0.

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> logs = sq.LogAttentionState(np.zeros((1, 1)), np.ones((1, 1)), np.zeros(1))
        >>> sq.AttentionState.from_log(logs).numerator
        array([[1.]])
        """
        arrays = (state.log_numerator, state.sign_numerator, state.log_denominator)
        names = ("log_numerator", "sign_numerator", "log_denominator")
        backend_for(**dict(zip(names, arrays, strict=True)))
        return cls(
            *of_states(_merges.attention_from_log, *common_floats(names, arrays))
        )


def linear_attention(
    log_q: Array,
    log_k: Array,
    v: Array,
    /,
    *,
    causal: bool = False,
    log_decay: Array | None = None,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
    state: AttentionState | None = None,
    return_state: bool = False,
    return_log_normalizer: bool = False,
    empty: Literal["zero", "nan"] = "zero",
) -> Any:
    """Compute attention with weights Σᵣ exp(log_q[t, r] + log_k[j, r]), in linear time.

    yₜ = Σⱼ wₜⱼ vⱼ / Σⱼ wₜⱼ over all keys j, or those up to t.

    Parameters
    ----------
    log_q : array of shape (..., n_q, d_k)
        Logarithms of the queries' features. Real floating, of any array library; -inf
        is a feature of 0.
    log_k : array of shape (..., n, d_k)
        Logarithms of the keys' features.
    v : array of shape (..., n, d_v)
        Values.
    causal : bool
        Whether token t attends tokens up to t only; then n_q = n.
    log_decay : array of shape (..., n, d_k), optional
        Logarithms of what multiplies the past at each token, or an array that is
        broadcast to that shape: the weight of key j for row t is multiplied by the
        exponential of their sum over (j, t]. -inf forgets a feature. Needs `causal`.
    key_mask : bool array of shape (..., n), optional
        True for keys that are kept. A key that is left out counts for nothing, whatever
        it and its value hold.
    segment_ids : int array of shape (n,), optional
        Runs of equal numbers are sequences of their own, which attend themselves only.
    state : AttentionState, optional
        What was attended before; with segments it belongs to the first sequence.
    return_state : bool
        Whether to return the state after all tokens; with segments of the last
        sequence.
    return_log_normalizer : bool
        Whether to return log Σⱼ wₜⱼ.
    empty : {"zero", "nan"}
        What a row gives that attends nothing.

    Returns
    -------
    array of shape (..., n_q, d_v), or named tuple
        Attention y in the type of `v`. With `return_log_normalizer` or `return_state` a
        named tuple of y, log_z of shape (..., n_q) and state, as far as they were asked
        for.

    Raises
    ------
    TypeError
        If an argument is no array, is not of its kind of type, or the arrays are of
        several libraries or on several devices.
    ValueError
        If shapes do not fit, or `log_decay` comes without `causal`.

    See Also
    --------
    log_linear_attention : The same for values in logarithms.
    AttentionState : What decodes token by token.
    subquad.vjp.linear_attention : The gradients, for libraries without autograd.

    Notes
    -----
    O(n d_k d_v) time; no array of n d_k d_v numbers. Exponents may be of any size: each
    row is relative to its own largest. With the queries and keys of a model as log-
    features this is the attention of [1]_.

    References
    ----------
    .. [1] F. A. Heinsen, "Softmax attention with constant cost per token", 2024,
       arXiv:2404.05843.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.normal(size=(5, 3)) for _ in range(3))
    >>> y = sq.linear_attention(q, k, v, causal=True)
    >>> w = np.tril(np.exp(q) @ np.exp(k).T)
    >>> np.allclose(y, (w / w.sum(axis=1, keepdims=True)) @ v)
    True
    """
    empty_is_nan = check_empty(empty)
    call = linear_attention_arguments(
        log_q,
        log_k,
        v,
        causal=causal,
        log_decay=log_decay,
        key_mask=key_mask,
        segment_ids=segment_ids,
        state=sums_of(state),
    )
    y, log_z, key_sums, value_sums = _linear(
        call,
        empty_is_nan,
        bool(return_log_normalizer),
        bool(return_state),
    )
    y = as_type_of(y, v)
    if not return_state:
        return AttentionAndNormalizer(y, log_z) if return_log_normalizer else y
    final = AttentionState(key_sums, value_sums)
    if return_log_normalizer:
        return AttentionResult(y, log_z, final)
    return AttentionAndState(y, final)


def log_linear_attention(
    log_q: Array,
    log_k: Array,
    log_v: Array,
    /,
    *,
    sign_v: Array | None = None,
    causal: bool = False,
    log_decay: Array | None = None,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
    state: LogAttentionState | AttentionState | None = None,
    return_state: bool = False,
    return_log_normalizer: bool = False,
) -> Any:
    """Compute `linear_attention` of values sign_v exp(log_v), and return logarithms.

    Parameters
    ----------
    log_q : array of shape (..., n_q, d_k)
        Logarithms of the queries' features. Real floating, of any array library.
    log_k : array of shape (..., n, d_k)
        Logarithms of the keys' features.
    log_v : array of shape (..., n, d_v)
        Logarithms of the values' sizes, of any range; -inf is a value of 0.
    sign_v : array of shape (..., n, d_v), optional
        The signs of the values, integer or real floating, or an array that is broadcast
        to that shape; all 1 when left out.
    causal : bool
        Whether token t attends tokens up to t only; then n_q = n.
    log_decay : array of shape (..., n, d_k), optional
        Logarithms of what multiplies the past at each token. Needs `causal`.
    key_mask : bool array of shape (..., n), optional
        True for keys that are kept.
    segment_ids : int array of shape (n,), optional
        Runs of equal numbers are sequences of their own, which attend themselves only.
    state : LogAttentionState or AttentionState, optional
        What was attended before; with segments it belongs to the first sequence.
    return_state : bool
        Whether to return the state after all tokens; with segments of the last
        sequence.
    return_log_normalizer : bool
        Whether to return log Σⱼ wₜⱼ.

    Returns
    -------
    named tuple
        Arrays log_abs_y and sign_y of shape (..., n_q, d_v), and log_z of shape
        (..., n_q) and a LogAttentionState as far as they were asked for: float64 if any
        input is, else float32. An empty row, and a value that cancels, is -inf with
        sign 0.

    Raises
    ------
    TypeError
        If an argument is no array, is not of its kind of type, or the arrays are of
        several libraries or on several devices.
    ValueError
        If shapes do not fit, or `log_decay` comes without `causal`.

    See Also
    --------
    linear_attention : The same for values that are no logarithms.
    subquad.vjp.log_linear_attention : The gradients, for libraries without autograd.

    Notes
    -----
    O(n d_k d_v) time; no array of n d_k d_v numbers.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> q, k = np.zeros((2, 1)), np.zeros((2, 1))
    >>> log_v = np.array([[-1000.0], [-1001.0]])
    >>> sq.log_linear_attention(q, k, log_v).log_abs_y
    array([[-1000.37988549],
           [-1000.37988549]])
    """
    call = log_linear_attention_arguments(
        log_q,
        log_k,
        log_v,
        sign_v=sign_v,
        causal=causal,
        log_decay=log_decay,
        key_mask=key_mask,
        segment_ids=segment_ids,
        state=logs_of(state),
    )
    log_values, signs = call.values
    backend: Any = call.backend
    log_y, sign_y, log_z, *final = backend.log_linear_attention(
        call.log_k,
        log_values,
        signs,
        call.log_q,
        call.log_decay,
        call.key_mask,
        call.segments,
        *call.state,
        call.causal,
        bool(return_log_normalizer),
        bool(return_state),
    )
    if not return_state:
        if return_log_normalizer:
            return LogAttentionAndNormalizer(log_y, sign_y, log_z)
        return LogAttention(log_y, sign_y)
    after = LogAttentionState(*final)
    if return_log_normalizer:
        return LogAttentionResult(log_y, sign_y, log_z, after)
    return LogAttentionAndState(log_y, sign_y, after)


def _linear(
    call: AttentionArguments,
    empty_is_nan: bool,
    with_log_z: bool,
    with_state: bool,
) -> tuple[Array | None, Array | None, Array | None, Array | None]:
    backend: Any = call.backend
    result: tuple[Array | None, Array | None, Array | None, Array | None]
    result = backend.linear_attention(
        call.log_k,
        call.values[0],
        call.log_q,
        call.log_decay,
        call.key_mask,
        call.segments,
        *call.state,
        call.causal,
        empty_is_nan,
        with_log_z,
        with_state,
    )
    return result


def sums_of(state: Any) -> tuple[Array | None, Array | None]:
    """Return the sums of a state, its recent tokens included."""
    if state is None:
        return None, None
    if not isinstance(state, AttentionState):
        message = f"state must be an AttentionState, got {type(state).__name__}"
        raise TypeError(message)
    state = state.finalize()
    return state.key_sums, state.value_sums


def logs_of(
    state: Any,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the logarithms of a state."""
    if state is None:
        return None, None, None
    if isinstance(state, AttentionState):
        state = state.to_log()
    if not isinstance(state, LogAttentionState):
        message = (
            "state must be a LogAttentionState or an AttentionState, got "
            f"{type(state).__name__}"
        )
        raise TypeError(message)
    return state.log_numerator, state.sign_numerator, state.log_denominator


def _token(name: str, array: Array) -> Array:
    """Return a token as a sequence of one."""
    namespace_of(array, name)
    if len(array.shape) < 1:
        message = f"{name} must have shape (..., d), got a number: shape ()"
        raise ValueError(message)
    return array[..., None, :]


def _steps_in_place(call: AttentionArguments) -> bool:
    """Return whether a backend can change a state's own memory."""
    can = getattr(call.backend, "has_attention_step", False)
    return bool(can(call.log_k) if callable(can) else can)
