"""Products of sparse factors in array-API code: primitives of `_dispatch.Backend`.

With j the row that lies o_mk rows after row i of its sequence, factor m is
(W_m v)ᵢ = Σ_k values_mik vⱼ. No array has n K d entries: rows are gathered for one k
after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from subquad._dispatch import (
    Array,
    CompressedRows,
    FactorOffsets,
    Namespace,
    NetworkGradients,
    device_of,
    namespace_of,
)
from subquad._reference._common import batch_shape, primitive, sum_to
from subquad._reference._sums import first_of_runs

# Coefficients of the Chebyshev series of (1 + 2 t) exp(t²) erfc(t), t ≥ 0, in
# (t - a) / (t + a) with this a. What is left out sums to less than 2^-53.
_CENTRE = 3.75
_SERIES = (
    1.1775789345674017,
    -0.004590054580646478,
    -0.08424913336651792,
    0.05920993999819189,
    -0.026658668435305753,
    0.009074997670705265,
    -0.002413163540417608,
    0.0004907758365258086,
    -6.916973302501207e-05,
    4.13902798607301e-06,
    7.74038306619849e-07,
    -2.1886401049234397e-07,
    1.076499946567091e-08,
    4.521959811218287e-09,
    -7.754400208831351e-10,
    -6.318088340886684e-11,
    2.86879501093067e-11,
    1.9455868545777347e-13,
    -9.65469674843344e-13,
    3.25254814814874e-14,
    3.3478119482868056e-14,
    -1.864562880419313e-15,
    -1.2507950530688648e-15,
    7.418235256624044e-17,
)


@primitive
def sparse_factor_product(
    values: Array,
    x: Array,
    segments: Array | None,
    offsets: FactorOffsets,
    residual: str,
    circular: bool,
    transpose: bool,
    with_intermediates: bool,
    recompute: bool,
) -> tuple[Array, Array | None]:
    """See `subquad.sparse_factor_product`: v_M, and v_1 … v_(M-1) where asked for.

    What a reverse keeps is up to the library's automatic differentiation.
    """
    del recompute
    xp = namespace_of(values)
    sequences = _Sequences(xp, x, segments, circular)
    first = _stretched(xp, values, x)
    if not offsets:
        # A result of its own all the same.
        first = xp.astype(first, first.dtype, copy=True)
    if transpose:
        return _transposed(sequences, values, first, offsets, residual), None
    steps = _steps(sequences, values, first, offsets, residual)
    if not with_intermediates:
        return steps[-1], None
    shape = (*first.shape[:-2], 0, *first.shape[-2:])
    return steps[-1], _stacked(xp, steps[1:-1], shape, first, -3)


@primitive
def sparse_factor_product_vjp(
    grad: Array,
    values: Array,
    x: Array,
    segments: Array | None,
    intermediates: Array | None,
    offsets: FactorOffsets,
    residual: str,
    circular: bool,
    needs: tuple[bool, bool],
) -> tuple[Array | None, Array | None]:
    """See `subquad.vjp.sparse_factor_product`, without a transpose.

    With g the gradient of v_m and v = v_(m-1): gᵢ·vⱼ in values_mik; in v_(m-1) W_mᵀ g
    and what the residuals add.
    """
    xp = namespace_of(values)
    sequences = _Sequences(xp, x, segments, circular)
    first = _stretched(xp, values, x)
    n_factors = len(offsets)
    before = [first]
    if needs[0] and intermediates is not None:
        before += [intermediates[..., m, :, :] for m in range(n_factors - 1)]
    elif needs[0]:
        before = _steps(sequences, values, first, offsets[:-1], residual)
    batch = batch_shape(grad.shape[:-2], first.shape[:-2])
    grad = xp.broadcast_to(grad, (*batch, *first.shape[-2:]))

    grads: list[Array] = []
    to_input = None
    for m in reversed(range(n_factors)):
        if needs[0]:
            columns = []
            for offset in offsets[m]:
                shift = sequences.after(offset)
                dots = shift.kept(grad) * shift.rows(before[m])
                columns.append(xp.sum(dots, axis=-1))
            grads.append(_stacked(xp, columns, (*grad.shape[:-1], 0), grad, -1))
        if residual == "input":
            to_input = grad if to_input is None else to_input + grad
        back = _apply_transposed(sequences, values[..., m, :, :], grad, offsets[m])
        grad = grad + back if residual == "step" else back
    if to_input is not None:
        grad = to_input + grad
    grad_values = None
    if needs[0]:
        grad_values = _stacked(xp, grads[::-1], values.shape, values, -3)
        grad_values = sum_to(xp, grad_values, tuple(values.shape))
    return grad_values, sum_to(xp, grad, tuple(x.shape)) if needs[1] else None


@primitive
def factor_values(
    x: Array, weight_in: Array, bias_in: Array, weight_out: Array, bias_out: Array
) -> Array:
    """See `subquad.factor_values`: one factor's network after the other."""
    xp = namespace_of(x)
    weights = (weight_in, bias_in, weight_out, bias_out)
    values = []
    for m in range(weight_in.shape[-3]):
        network = _Network(*(_of_factor(weights, m)))
        z = _hidden(xp, x, network)
        activated = _gelu(xp, z)
        out = activated @ xp.matrix_transpose(network.weight_out)
        values.append(out + network.bias_out[..., None, :])
    batch = batch_shape(
        x.shape[:-2],
        weight_in.shape[:-3],
        bias_in.shape[:-2],
        weight_out.shape[:-3],
        bias_out.shape[:-2],
    )
    shape = (*batch, 0, x.shape[-2], weight_out.shape[-2])
    return _stacked(xp, values, shape, x, -3)


@primitive
def factor_values_vjp(
    grad: Array,
    x: Array,
    weight_in: Array,
    bias_in: Array,
    weight_out: Array,
    bias_out: Array,
    needs: tuple[bool, bool, bool, bool, bool],
) -> NetworkGradients:
    """See `subquad.vjp.factor_values`; what lies between the layers is made anew.

    With h = gelu(z) and p = (grad · weight_out) gelu'(z): p · weight_in in x, pᵀ x and
    the sum of p in the first layer, gradᵀ h and the sum of grad in the second.
    """
    xp = namespace_of(x)
    weights = (weight_in, bias_in, weight_out, bias_out)
    grad_x = None
    parts: tuple[list[Array], ...] = ([], [], [], [])
    for m in range(weight_in.shape[-3]):
        network = _Network(*(_of_factor(weights, m)))
        g = grad[..., m, :, :]
        z = _hidden(xp, x, network)
        if needs[3]:
            parts[2].append(xp.matrix_transpose(g) @ _gelu(xp, z))
        if needs[4]:
            parts[3].append(xp.sum(g, axis=-2))
        if not any(needs[:3]):
            continue
        through = (g @ network.weight_out) * _gelu_derivative(xp, z)
        if needs[0]:
            back = through @ network.weight_in
            grad_x = back if grad_x is None else grad_x + back
        if needs[1]:
            parts[0].append(xp.matrix_transpose(through) @ x)
        if needs[2]:
            parts[1].append(xp.sum(through, axis=-2))
    if needs[0]:
        grad_x = xp.zeros_like(x) if grad_x is None else grad_x
        grad_x = sum_to(xp, grad_x, tuple(x.shape))
    found: list[Array | None] = []
    for need, part, array, axis in zip(
        needs[1:], parts, weights, (-3, -2, -3, -2), strict=True
    ):
        gradient = None
        if need:
            gradient = _stacked(xp, part, array.shape, array, axis)
            gradient = sum_to(xp, gradient, tuple(array.shape))
        found.append(gradient)
    return grad_x, *found  # type: ignore[return-value]


@primitive
def csr_product(
    data: Array,
    indices: Array,
    indptr: Array,
    x: Array,
    addend: Array | None,
    scale: float,
    transposed: CompressedRows | None,
) -> Array:
    """See `subquad.csr_product`: scale A x + addend, by log-step sums within rows.

    O(nnz d log nnz) time: how many entries a row has is not looked at.
    """
    del transposed
    xp = namespace_of(data)
    rows = _row_of_entries(xp, indptr, data.shape[0])
    terms = data[:, None] * xp.take(x, indices, axis=-2)
    shift = 1
    while shift < data.shape[0]:
        same = (rows[shift:] == rows[:-shift])[:, None]
        sums = terms[..., shift:, :] + xp.where(same, terms[..., :-shift, :], 0.0)
        terms = xp.concat([terms[..., :shift, :], sums], axis=-2)
        shift *= 2
    starts, ends = indptr[:-1], indptr[1:]
    if data.shape[0]:
        # The last entry of a row has its sum; an empty row takes another's, and drops
        # it.
        last = xp.where(ends > starts, ends - 1, 0)
        out = xp.take(terms, last, axis=-2)
        out = xp.where((ends > starts)[:, None], out, 0.0)
    else:
        shape = (*x.shape[:-2], starts.shape[0], x.shape[-1])
        out = xp.zeros(shape, dtype=x.dtype, device=device_of(x))
    if scale != 1.0:
        out = scale * out
    return out if addend is None else out + addend


@primitive
def csr_product_vjp(
    grad: Array,
    data: Array,
    indices: Array,
    indptr: Array,
    x: Array,
    addend: Array | None,
    scale: float,
    transposed: CompressedRows | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Array | None, Array | None, Array | None]:
    """See `subquad.vjp.csr_product`: scale gᵢ·xⱼ of entry (i, j), scale Aᵀ g and g."""
    xp = namespace_of(data)
    grad_data = grad_x = grad_addend = None
    if needs[0]:
        rows = _row_of_entries(xp, indptr, data.shape[0])
        inside = (rows >= 0) & (rows < indptr.shape[0] - 1)
        rows = xp.where(inside, rows, 0)
        dots = xp.take(grad, rows, axis=-2) * xp.take(x, indices, axis=-2)
        axes = tuple(axis for axis in range(dots.ndim) if axis != dots.ndim - 2)
        grad_data = xp.where(inside, scale * xp.sum(dots, axis=axes), 0.0)
    if needs[1]:
        if transposed is None:
            transposed = csr_transpose(data, indices, indptr, x.shape[-2])
        grad_x = csr_product(*transposed, grad, None, scale, None)
        grad_x = sum_to(xp, grad_x, tuple(x.shape))
    if needs[2] and addend is not None:
        grad_addend = sum_to(xp, grad, tuple(addend.shape))
    return grad_data, grad_x, grad_addend


@primitive
def csr_transpose(
    data: Array, indices: Array, indptr: Array, n_columns: int
) -> CompressedRows:
    """See `subquad.csr_transpose`: entries in the order of columns, rows in theirs."""
    xp = namespace_of(data)
    rows = _row_of_entries(xp, indptr, data.shape[0])
    inside = (rows >= 0) & (rows < indptr.shape[0] - 1)
    # What is in no row comes last, and is in no column.
    place = xp.where(inside, indices, n_columns)
    order = xp.argsort(place, stable=True)
    columns = xp.arange(n_columns + 1, dtype=indptr.dtype, device=device_of(indptr))
    starts = xp.searchsorted(xp.take(place, order), columns)
    return (
        xp.take(data, order),
        xp.take(xp.where(inside, rows, 0), order),
        xp.astype(starts, indptr.dtype),
    )


class _Shift:
    """The rows that lie an offset after each row, those of other sequences left out."""

    def __init__(
        self, xp: Namespace, by: int, index: Array | None, inside: Array | None
    ) -> None:
        self._xp = xp
        self._by = by
        self._index = index
        self._inside = inside

    def rows(self, array: Array) -> Array:
        """Return these rows of an array (..., n, d); 0 where there is none."""
        if self._index is not None:
            return self.kept(self._xp.take(array, self._index, axis=-2))
        return self._xp.roll(array, -self._by, axis=-2) if self._by else array

    def kept(self, array: Array) -> Array:
        """Return an array (..., n, d) with 0 in place of rows that have none."""
        if self._inside is None:
            return array
        # Not by a product: what is left out may be infinite.
        return self._xp.where(self._inside[:, None], array, 0.0)


class _Sequences:
    """Where rows lie in their sequences."""

    def __init__(
        self, xp: Namespace, x: Array, segments: Array | None, circular: bool
    ) -> None:
        self._xp = xp
        self._n = x.shape[-2]
        self._circular = circular
        # One circular sequence needs no index.
        self._index: Array | None = None
        if circular and segments is None:
            return
        index = xp.arange(self._n, device=device_of(x))
        self._index = index
        self._start, self._stop = xp.zeros_like(index), xp.full_like(index, self._n)
        first = first_of_runs(xp, segments)
        if first is not None:
            is_last = xp.concat([first[1:], first[:1]], axis=0)
            self._start = _latest(xp, xp.where(first, index, 0), xp.maximum)
            ends = xp.flip(xp.where(is_last, index + 1, self._n), axis=0)
            self._stop = xp.flip(_latest(xp, ends, xp.minimum), axis=0)

    def after(self, offset: int) -> _Shift:
        """Return the rows that lie `offset` after each row, before it if negative."""
        xp, n, index = self._xp, self._n, self._index
        if index is None:
            return _Shift(xp, offset % n if n else 0, None, None)
        if self._circular:
            length = self._stop - self._start
            place = _remainder(xp, offset, length, n) + (index - self._start)
            return _Shift(xp, 0, self._start + place % length, None)
        # Beyond both ends nothing changes, and a sum stays within the type's range.
        other = index + max(-n, min(offset, n))
        inside = (other >= self._start) & (other < self._stop)
        return _Shift(xp, 0, xp.where(inside, other, index), inside)


def _remainder(xp: Namespace, offset: int, length: Array, n: int) -> Array:
    """Return an offset modulo lengths of at most n, whatever their type can hold."""
    if -(2**31) <= offset < 2**31:
        return xp.full_like(length, offset) % length
    # Digit by digit, so that no number exceeds 31 bits where the lengths have 32.
    bits = max(1, 30 - n.bit_length())
    digits, left = [], abs(offset)
    while left:
        digits.append(left & ((1 << bits) - 1))
        left >>= bits
    rest = xp.zeros_like(length)
    for digit in reversed(digits):
        rest = (rest * (1 << bits) + digit) % length
    return rest if offset >= 0 else (-rest) % length


def _latest(
    xp: Namespace, numbers: Array, better: Callable[[Array, Array], Array]
) -> Array:
    """Return the running maxima, or minima, of numbers (n,) by log steps."""
    shift = 1
    while shift < numbers.shape[0]:
        found = better(numbers[shift:], numbers[:-shift])
        numbers = xp.concat([numbers[:shift], found], axis=0)
        shift *= 2
    return numbers


def _steps(
    sequences: _Sequences,
    values: Array,
    first: Array,
    offsets: FactorOffsets,
    residual: str,
) -> list[Array]:
    """Return v_0 and what follows each factor."""
    steps = [first]
    for m, row in enumerate(offsets):
        product = _apply(sequences, values[..., m, :, :], steps[-1], row)
        if residual == "step":
            product = product + steps[-1]
        elif residual == "input":
            product = product + first
        steps.append(product)
    return steps


def _transposed(
    sequences: _Sequences,
    values: Array,
    x: Array,
    offsets: FactorOffsets,
    residual: str,
) -> Array:
    """Return the transpose of the map from v_0 to v_M, applied to x."""
    passed = None
    for m in reversed(range(len(offsets))):
        if residual == "input":
            passed = x if passed is None else passed + x
        back = _apply_transposed(sequences, values[..., m, :, :], x, offsets[m])
        x = back + x if residual == "step" else back
    return x if passed is None else passed + x


def _apply(
    sequences: _Sequences, values: Array, v: Array, offsets: tuple[int, ...]
) -> Array:
    """Return W v for the values (..., n, K) of one factor."""
    xp = namespace_of(v)
    total = None
    for k, offset in enumerate(offsets):
        shift = sequences.after(offset)
        term = shift.kept(values[..., k : k + 1]) * shift.rows(v)
        total = term if total is None else total + term
    return xp.zeros_like(v) if total is None else total


def _apply_transposed(
    sequences: _Sequences, values: Array, v: Array, offsets: tuple[int, ...]
) -> Array:
    """Return Wᵀ v for the values (..., n, K) of one factor."""
    xp = namespace_of(v)
    total = None
    for k, offset in enumerate(offsets):
        shift = sequences.after(-offset)
        term = shift.rows(values[..., k : k + 1]) * shift.rows(v)
        total = term if total is None else total + term
    return xp.zeros_like(v) if total is None else total


class _Network(NamedTuple):
    """The two layers of one factor's network."""

    weight_in: Array
    bias_in: Array
    weight_out: Array
    bias_out: Array


def _of_factor(weights: tuple[Array, ...], m: int) -> tuple[Array, ...]:
    weight_in, bias_in, weight_out, bias_out = weights
    return (
        weight_in[..., m, :, :],
        bias_in[..., m, :],
        weight_out[..., m, :, :],
        bias_out[..., m, :],
    )


def _hidden(xp: Namespace, x: Array, network: _Network) -> Array:
    """Return what goes into the activation."""
    return x @ xp.matrix_transpose(network.weight_in) + network.bias_in[..., None, :]


def _gelu(xp: Namespace, z: Array) -> Array:
    """Return z (1 + erf(z / √2)) / 2; 0 at -inf."""
    # The probability is 0 long before.
    return xp.where(z < -64.0, -64.0, z) * _normal_probability(xp, z)


def _gelu_derivative(xp: Namespace, z: Array) -> Array:
    """Return (1 + erf(z / √2)) / 2 + z exp(-z²/2) / √(2π); 0 at -inf and 1 at inf."""
    z = xp.where(z < -64.0, -64.0, xp.where(z > 64.0, 64.0, z))
    density = xp.exp(-0.5 * (z * z)) * (1.0 / math.sqrt(2.0 * math.pi))
    return _normal_probability(xp, z) + z * density


def _normal_probability(xp: Namespace, z: Array) -> Array:
    """Return (1 + erf(z / √2)) / 2 to rounding, in both tails, and differentiable.

    The tail is exp(-z²/2) times a series in a bounded variable.
    """
    is_negative = z < 0.0
    t = xp.where(is_negative, -z, z) * math.sqrt(0.5)
    # The tail is 0 long before, and an infinity has no quotient.
    t = xp.where(t > 64.0, 64.0, t)
    place = (t - _CENTRE) / (t + _CENTRE)
    last = before = xp.zeros_like(place)
    for coefficient in _SERIES[:0:-1]:
        last, before = 2.0 * place * last - before + coefficient, last
    series = place * last - before + _SERIES[0]
    tail = 0.5 * xp.exp(-0.5 * (z * z)) * series / (1.0 + 2.0 * t)
    return xp.where(is_negative, tail, 1.0 - tail)


def _row_of_entries(xp: Namespace, indptr: Array, n_entries: int) -> Array:
    """Return the row that each entry of a sparse matrix is in.

    -1 is before the first one, and as many as there are rows behind the last one.
    """
    entries = xp.arange(n_entries, dtype=indptr.dtype, device=device_of(indptr))
    rows = xp.searchsorted(indptr, entries, side="right")
    return xp.astype(rows, indptr.dtype) - 1


def _stretched(xp: Namespace, values: Array, x: Array) -> Array:
    """Return x with the batch dimensions that it and the values broadcast to."""
    batch = batch_shape(values.shape[:-3], x.shape[:-2])
    return xp.broadcast_to(x, (*batch, *x.shape[-2:]))


def _stacked(
    xp: Namespace,
    parts: list[Array],
    empty: tuple[int, ...],
    like: Array,
    axis: int,
) -> Array:
    """Stack arrays along a new axis; no arrays make an array of a given shape."""
    if parts:
        return xp.stack(parts, axis=axis)
    return xp.zeros(empty, dtype=like.dtype, device=device_of(like))
