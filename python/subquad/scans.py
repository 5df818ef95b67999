"""Cumulative sums of exponentials and linear recurrences, in logarithms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from subquad._dispatch import Array, backend_for, namespace_of
from subquad._reference import states as _merges
from subquad._states import State, listed, of_states, type_of_state
from subquad._validation import (
    common_floats,
    log_linear_recurrence_arguments,
    logcumsumexp_arguments,
    signed_logcumsumexp_arguments,
)

__all__ = [
    "LogSumExpState",
    "log_linear_recurrence",
    "logcumsumexp",
    "signed_logcumsumexp",
]


class ScanResult(NamedTuple):
    """A scan and the state after its last entry."""

    out: Array
    state: LogSumExpState


class SignedResult(NamedTuple):
    """Sums of any sign: logarithms of their sizes, and their signs."""

    log_abs: Array
    sign: Array


class RecurrenceResult(NamedTuple):
    """A recurrence and its last value."""

    out: Array
    state: Array


@listed
@dataclass(frozen=True, eq=False)
class LogSumExpState(State):
    """The logarithm of a sum of exponentials that grows.

    Parameters
    ----------
    log_sum : array
        The logarithms, -inf where nothing has been added.
    remainder : array
        What rounding took from them: `log_sum` + `remainder` is accurate beyond its
        type, so that a sum in many parts equals the sum at once.

    See Also
    --------
    logcumsumexp : Takes a state and returns one.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> state = sq.LogSumExpState.init()
    >>> for part in np.array([[0.0, 1.0], [2.0, 3.0]]):
    ...     state = state.update(part)
    >>> state.finalize()
    array(3.4401897)
    """

    log_sum: Array
    remainder: Array

    @classmethod
    def init(
        cls, shape: tuple[int, ...] = (), like: Array | None = None
    ) -> LogSumExpState:
        """Return the logarithms of empty sums.

        Parameters
        ----------
        shape : tuple of int
            Shape of the batch of sums.
        like : array, optional
            An array of the library, the type and on the device that the state is to
            have. By default NumPy and float64.

        Returns
        -------
        LogSumExpState

        Examples
        --------
        >>> import subquad as sq
        >>> sq.LogSumExpState.init((2,)).finalize()
        array([-inf, -inf])
        """
        xp, dtype, device = type_of_state(like)
        return cls(
            xp.full(shape, -math.inf, dtype=dtype, device=device),
            xp.zeros(shape, dtype=dtype, device=device),
        )

    def update(self, x: Array, axis: int = -1) -> LogSumExpState:
        """Return the state with more entries.

        Parameters
        ----------
        x : array
            Logarithms of what is added.
        axis : int
            Along which it is summed; the other dimensions are those of the state, to
            which it is broadcast.

        Returns
        -------
        LogSumExpState

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> sq.LogSumExpState.init((2,)).update(np.zeros((3, 2)), axis=0).finalize()
        array([1.09861229, 1.09861229])
        """
        result: ScanResult = logcumsumexp(x, axis=axis, state=self, return_state=True)
        return result.state

    def merge(self, other: LogSumExpState) -> LogSumExpState:
        """Return the logarithms of both sums together.

        Parameters
        ----------
        other : LogSumExpState
            Of a shape that broadcasts with this one's.

        Returns
        -------
        LogSumExpState

        Examples
        --------
        >>> import numpy as np
        >>> import subquad as sq
        >>> parts = [sq.LogSumExpState.init().update(np.ones(n)) for n in (2, 3)]
        >>> sq.LogSumExpState.merge(*parts).finalize()
        array(2.60943791)
        """
        arrays = (self.log_sum, self.remainder, other.log_sum, other.remainder)
        names = ("log_sum", "remainder", "other.log_sum", "other.remainder")
        backend_for(**dict(zip(names, arrays, strict=True)))
        return LogSumExpState(
            *of_states(_merges.merge_log_sums, *common_floats(names, arrays))
        )

    def finalize(self) -> Array:
        """Return the logarithms of the sums.

        Returns
        -------
        array

        Examples
        --------
        >>> import subquad as sq
        >>> sq.LogSumExpState.init().finalize()
        array(-inf)
        """
        return self.log_sum


def logcumsumexp(
    x: Array,
    /,
    *,
    axis: int = -1,
    reverse: bool = False,
    exclusive: bool = False,
    state: LogSumExpState | Array | None = None,
    return_state: bool = False,
    segment_ids: Array | None = None,
) -> Array:
    """Compute log Σ_{j ≤ i} exp(xⱼ) for each i along an axis.

    Parameters
    ----------
    x : array
        Real floating, of any array library. -inf is the logarithm of 0.
    axis : int
        The axis to sum along.
    reverse : bool
        Whether to sum over j ≥ i.
    exclusive : bool
        Whether to leave i itself out; the sum over nothing is -inf.
    state : LogSumExpState or array, optional
        Logarithms of what was summed before, of the shape of `x` without the axis or
        one that is broadcast to it. With segments it belongs to the first sequence.
    return_state : bool
        Whether to return the state after the last entry as well.
    segment_ids : int array of shape (n,), optional
        Runs of equal numbers are sequences of their own: nothing crosses a border.

    Returns
    -------
    array, or tuple of array and LogSumExpState
        The logarithms, of the shape of `x`: float64 if `x` or the state is, else
        float32. With `return_state` a named tuple ``(out, state)``; the state is that
        of the last sequence.

    Raises
    ------
    TypeError
        If an argument is no array, is not of real floating type (`segment_ids`: of
        integers), or the arrays are of several libraries or on several devices.
    ValueError
        If shapes do not fit.
    numpy.exceptions.AxisError
        If there is no such axis; an IndexError and ValueError.

    See Also
    --------
    signed_logcumsumexp : The same for terms of any sign.
    log_linear_recurrence : The same for sums that decay.
    subquad.vjp.logcumsumexp : The gradients, for libraries without autograd.

    Notes
    -----
    O(n) time and memory. Right to 2 units in the last place of max(abs(out), 16),
    however far the entries lie apart. What follows +inf is +inf, NaN reaches what
    follows it. Gradients are 0 where `x` is -inf, and do not change when `x` is
    shifted. A number is its own sum.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> sq.logcumsumexp(np.array([-np.inf, 0.0, 0.0, 10.0]))
    array([       -inf,  0.        ,  0.69314718, 10.0000908 ])

    In two parts:

    >>> x = np.log(np.arange(1.0, 7.0))
    >>> head, state = sq.logcumsumexp(x[:4], return_state=True)
    >>> np.exp(sq.logcumsumexp(x[4:], state=state))
    array([15., 21.])
    """
    scan = logcumsumexp_arguments(
        x, axis, reverse, exclusive, state_arrays(state), segment_ids
    )
    out, log_sum, remainder = scan.backend.logcumsumexp(
        scan.x,
        scan.log_sum,
        scan.remainder,
        scan.segments,
        scan.axis,
        bool(reverse),
        bool(exclusive),
        bool(return_state),
    )
    if len(x.shape) == 0:
        out = namespace_of(out).reshape(out, ())
    if not return_state:
        return out
    return ScanResult(out, LogSumExpState(log_sum, remainder))


def signed_logcumsumexp(
    x: Array,
    sign: Array,
    /,
    *,
    axis: int = -1,
    reverse: bool = False,
    exclusive: bool = False,
) -> SignedResult:
    """Compute log |Σ_{j ≤ i} signⱼ exp(xⱼ)| and the sign of the sum for each i.

    Parameters
    ----------
    x : array
        Logarithms of the terms' sizes. Real floating, of any array library.
    sign : array
        Their signs, -1, 0 or 1, or real weights; integer or real floating, of the shape
        of `x` or one that is broadcast to it. 0 removes a term, whatever `x` holds.
    axis : int
        The axis to sum along.
    reverse : bool
        Whether to sum over j ≥ i.
    exclusive : bool
        Whether to leave i itself out.

    Returns
    -------
    log_abs : array
        Logarithms of the sums' sizes, of the shape of `x`: float64 if `x` is, else
        float32. -inf where a sum is empty or cancels.
    sign : array
        Signs of the sums in the same type; 0 where a sum is empty or cancels.

    Raises
    ------
    TypeError
        If an argument is no array, `x` is not of real floating type, or the arrays are
        of several libraries or on several devices.
    ValueError
        If shapes do not fit.
    numpy.exceptions.AxisError
        If there is no such axis; an IndexError and ValueError.

    See Also
    --------
    logcumsumexp : The same for positive terms.
    subquad.vjp.signed_logcumsumexp : The gradients, for libraries without autograd.

    Notes
    -----
    The sums are carried in float64. Where terms cancel, what is left is as accurate as
    float64 leaves it: 1e-16 of the largest term.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> x, sign = np.array([1.0, 3.0, 3.0, 2.0]), np.array([1, -1, 1, -1])
    >>> log_abs, sign = sq.signed_logcumsumexp(x, sign)
    >>> sign * np.exp(log_abs)
    array([  2.71828183, -17.36725509,   2.71828183,  -4.67077427])
    """
    backend, terms, weights, axis = signed_logcumsumexp_arguments(
        x, sign, axis, reverse, exclusive
    )
    log_abs, out_sign = backend.signed_logcumsumexp(
        terms, weights, axis, bool(reverse), bool(exclusive)
    )
    if len(x.shape) == 0:
        xp = namespace_of(log_abs)
        log_abs, out_sign = xp.reshape(log_abs, ()), xp.reshape(out_sign, ())
    return SignedResult(log_abs, out_sign)


def log_linear_recurrence(
    log_a: Array,
    log_b: Array,
    /,
    *,
    axis: int = -1,
    state: Array | None = None,
    reverse: bool = False,
    return_state: bool = False,
    segment_ids: Array | None = None,
) -> Array:
    """Compute log xₜ of xₜ = aₜ xₜ₋₁ + bₜ from log aₜ and log bₜ.

    Parameters
    ----------
    log_a : array
        Logarithms of the factors. Real floating, of any array library; -inf forgets all
        that came before. Equal to `log_b` in shape, or broadcast with it.
    log_b : array
        Logarithms of what is added; -inf adds nothing.
    axis : int
        The axis to go along, of the broadcast shape.
    state : array, optional
        Start log x₀, of the broadcast shape without the axis or one that is broadcast
        to it. -inf, x₀ = 0, when left out. With segments it belongs to the first
        sequence.
    reverse : bool
        Whether to go from the last entry to the first.
    return_state : bool
        Whether to return the last log x as well.
    segment_ids : int array of shape (n,), optional
        Runs of equal numbers are sequences of their own: nothing crosses a border.

    Returns
    -------
    array, or tuple of arrays
        Logarithms log xₜ, of the broadcast shape: float64 if any input is, else
        float32. With `return_state` a named tuple ``(out, state)``.

    Raises
    ------
    TypeError
        If an argument is no array, is not of real floating type (`segment_ids`: of
        integers), or the arrays are of several libraries or on several devices.
    ValueError
        If shapes do not fit.
    numpy.exceptions.AxisError
        If there is no such axis; an IndexError and ValueError.

    See Also
    --------
    logcumsumexp : The recurrence with all aₜ = 1.
    subquad.vjp.log_linear_recurrence : The gradients, for libraries without autograd.

    Notes
    -----
    O(n) time and memory. States are renormalised as they go, never by a cumulative sum
    of `log_a`, whose rounding grows with it and which a factor of 0 would end [1]_.

    References
    ----------
    .. [1] F. A. Heinsen, "Efficient parallelization of a ubiquitous sequential
       computation", 2023, arXiv:2311.06281.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> a, b = np.array([0.5, 0.5, 0.0, 2.0]), np.array([1.0, 1.0, 1.0, 1.0])
    >>> with np.errstate(divide="ignore"):
    ...     log_a = np.log(a)
    >>> np.exp(sq.log_linear_recurrence(log_a, np.log(b)))
    array([1. , 1.5, 1. , 3. ])
    """
    call = log_linear_recurrence_arguments(
        log_a, log_b, axis, state, reverse, segment_ids
    )
    out = call.backend.log_linear_recurrence(
        call.log_a, call.log_b, call.state, call.segments, call.axis, bool(reverse)
    )
    if not return_state:
        return out
    return RecurrenceResult(out, _last(out, call.axis, bool(reverse), call.state))


def state_arrays(
    state: LogSumExpState | Array | None,
) -> tuple[Array | None, Array | None]:
    """Return the logarithms of a state, and what rounding took from them if known."""
    if isinstance(state, LogSumExpState):
        return state.log_sum, state.remainder
    return state, None


def _last(out: Array, axis: int, reverse: bool, state: Array | None) -> Array:
    """Return the entry where a recurrence ends, its start if there is none."""
    xp = namespace_of(out)
    lanes = (*out.shape[:axis], *out.shape[axis + 1 :])
    if out.shape[axis] == 0:
        if state is not None:
            return state
        return xp.sum(out, axis=axis) - math.inf
    place = slice(0, 1) if reverse else slice(out.shape[axis] - 1, None)
    last = out[(slice(None),) * axis + (place, ...)]
    return xp.reshape(last, lanes)
