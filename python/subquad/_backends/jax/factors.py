"""The primitives of sparse factors and of sparse matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from subquad._backends.compiled.factors import RESIDUALS, flat_offsets
from subquad._backends.jax.common import (
    Derivative,
    Kernel,
    Output,
    Plan,
    apply,
    computed,
    differentiate,
    gradients,
    itemsize,
    join_batch,
    listed,
    matrix_batch,
    plain,
    push,
)
from subquad._dispatch import Array, CompressedRows, FactorOffsets, NetworkGradients
from subquad._reference import factors as reference
from subquad._reference._common import sum_to

csr_transpose = reference.csr_transpose

# ----------------------------------------------------------- products of sparse factors


def _offsets(offsets: FactorOffsets) -> dict[str, Any]:
    flat = flat_offsets(offsets)
    return {"offsets": flat} if flat.size else {}


def _plan_product(
    values: Any,
    x: Any,
    segments: Any,
    *,
    offsets: FactorOffsets,
    residual: str,
    circular: bool,
    transpose: bool,
    with_intermediates: bool,
    recompute: bool,
) -> Plan:
    del segments, recompute
    batch = matrix_batch((values, x), (3, 2))
    m, n, k = values.shape[-3:]
    d = x.shape[-1]
    intermediates = None
    if with_intermediates:
        intermediates = plain((*batch, max(m - 1, 0), n, d), x.dtype)
    return Plan(
        [plain((*batch, n, d), x.dtype), intermediates],
        (math.prod(batch), m, n, k, d, itemsize(x)),
        (RESIDUALS[residual], int(circular), int(transpose)),
        _offsets(offsets),
    )


def _plan_product_vjp(
    grad: Any,
    values: Any,
    x: Any,
    segments: Any,
    intermediates: Any,
    *,
    offsets: FactorOffsets,
    residual: str,
    circular: bool,
    needs: Sequence[bool],
) -> Plan:
    del segments
    batch = tuple(grad.shape[:-2])
    m, n, k = values.shape[-3:]
    d = x.shape[-1]
    recompute = int(intermediates is None)
    return Plan(
        gradients(needs, (values, x), (3, 2), batch),
        (math.prod(batch), m, n, k, d, itemsize(x), recompute),
        (RESIDUALS[residual], int(circular)),
        _offsets(offsets),
    )


_PRODUCT = Kernel(
    "sparse_factor_product",
    _plan_product,
    listed(reference.sparse_factor_product),
    "ffi",
)
_PRODUCT_VJP = Kernel(
    "sparse_factor_product_vjp",
    _plan_product_vjp,
    listed(reference.sparse_factor_product_vjp),
    "fffif",
)


def _product_arguments(
    inputs: Sequence[Any], kept: Sequence[Any], grads: Sequence[Any]
) -> Sequence[Any]:
    return (*grads, *inputs, *kept)


def _product_reverse(
    arrays: Sequence[Any],
    *,
    needs: Sequence[bool],
    offsets: FactorOffsets,
    residual: str,
    circular: bool,
    transpose: bool,
) -> list[Array]:
    """Return the gradients that are wanted."""
    grad, grad_intermediates, values, x, segments, intermediates = arrays
    flags = (offsets, residual, circular)
    if grad_intermediates is not None:
        return _reverse_of_all(
            (grad, grad_intermediates), values, x, segments, flags, needs
        )
    found: list[Array] = []
    if needs[0]:
        # The product of g and the transpose's result is that of W g and x.
        left, right = grad, x
        if transpose:
            left, right = jnp.broadcast_to(x, grad.shape), grad
        both = (True, needs[1] and not transpose)
        given = (left, values, right, segments, intermediates)
        pair = sparse_factor_product_vjp(*given, *flags, both)
        found += [part for part in pair if part is not None]
    if len(found) < sum(needs):
        # The values alone tell how a gradient passes.
        back, _ = sparse_factor_product(
            values, grad, segments, *flags, not transpose, False, True
        )
        found.append(sum_to(jnp, back, x.shape))
    return found


def _reverse_of_all(
    grads: tuple[Array | None, Array],
    values: Array,
    x: Array,
    segments: Array | None,
    flags: tuple[FactorOffsets, str, bool],
    needs: Sequence[bool],
) -> list[Array]:
    """Return gradients where intermediates have some too: by the reference."""

    def steps(values: Array, x: Array) -> tuple[Array, Array]:
        found: Any = reference.sparse_factor_product(
            values, x, segments, *flags, False, True, True
        )
        return found  # type: ignore[no-any-return]

    (out, _), pull = jax.vjp(steps, values, x)
    grad = jnp.zeros_like(out) if grads[0] is None else grads[0]
    pair = pull((grad, grads[1]))
    return [part for part, needed in zip(pair, needs, strict=True) if needed]


def _product_tangents(
    inputs: Sequence[Any],
    kept: Sequence[Any],
    tangents: Sequence[Any],
    **parameters: Any,
) -> list[Array]:
    del kept
    if tangents[0] is None:
        values, _, segments = inputs
        return apply(_PRODUCT, (values, tangents[1], segments), **parameters)
    moved = [place for place, t in enumerate(tangents) if t is not None]
    found = push(
        lambda *arrays: _PRODUCT.by_reference(*arrays, **parameters),
        inputs,
        moved,
        [tangents[place] for place in moved],
    )
    return found[1]


def _keeping(moved: Sequence[bool], parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a product that keeps what its reverse needs."""
    keeps = (
        moved[0]
        and not parameters["recompute"]
        and not parameters["transpose"]
        and len(parameters["offsets"]) > 1
    )
    with_intermediates = parameters["with_intermediates"] or keeps
    return {**parameters, "with_intermediates": with_intermediates}


differentiate(
    _PRODUCT,
    Derivative(
        _product_reverse,
        moves=(0, 1),
        results=(0, 1),
        kept=(1,),
        arguments=_product_arguments,
        tangents=_product_tangents,
        parameters=("offsets", "residual", "circular", "transpose"),
        extended=_keeping,
    ),
)
join_batch(_PRODUCT, (3, 2, None))
join_batch(_PRODUCT_VJP, (2, 3, 2, None, 3), gradients=(1, 2), whole=(0, 4))


# ------------------------------------------------------------------------ the networks

_CORES = (2, 3, 2, 3, 2)


def _sizes(batch: Sequence[int], x: Any, weight_out: Any) -> tuple[int, ...]:
    (n, d), (m, k, h) = x.shape[-2:], weight_out.shape[-3:]
    return math.prod(batch), m, n, d, h, k, itemsize(x)


def _plan_values(*arrays: Any) -> Plan:
    x, _, _, weight_out, _ = arrays
    batch = matrix_batch(arrays, _CORES)
    m, k, _ = weight_out.shape[-3:]
    return Plan(
        [plain((*batch, m, x.shape[-2], k), computed(x))], _sizes(batch, x, weight_out)
    )


def _plan_values_vjp(grad: Any, *inputs: Any, needs: Sequence[bool]) -> Plan:
    x, weight_out = inputs[0], inputs[3]
    batch = tuple(grad.shape[:-3])
    outputs: list[Output | None] = []
    for place, (array, needed) in enumerate(zip(inputs, needs, strict=True)):
        # The kernel sums the gradients of weights over the batches that share them.
        shape = array.shape if place else (*batch, *array.shape[-2:])
        whole = Output(shape, array.dtype, array.shape)
        outputs.append(whole if needed else None)
    return Plan(outputs, _sizes(batch, x, weight_out))


_VALUES = Kernel(
    "factor_values", _plan_values, listed(reference.factor_values), "fffff"
)
# Of the second layer's bias nothing but the shape is needed.
_VALUES_VJP = Kernel(
    "factor_values_vjp",
    _plan_values_vjp,
    listed(reference.factor_values_vjp),
    "fffff",
    passed=5,
)


def _values_tangents(
    inputs: Sequence[Any], kept: Sequence[Any], tangents: Sequence[Any]
) -> list[Array]:
    del kept
    moved = [place for place, t in enumerate(tangents) if t is not None]
    found = push(
        _VALUES.by_reference, inputs, moved, [tangents[place] for place in moved]
    )
    return found[1]


differentiate(
    _VALUES,
    Derivative(
        _VALUES_VJP,
        moves=tuple(range(5)),
        results=(0,),
        kept=(),
        arguments=lambda inputs, kept, grads: (*grads, *inputs),
        tangents=_values_tangents,
    ),
)
join_batch(_VALUES, _CORES)
join_batch(_VALUES_VJP, (3, *_CORES), gradients=range(1, 6), whole=(0,))


# -------------------------------------------------------------------- sparse matrices


def _plan_csr(
    data: Any,
    indices: Any,
    indptr: Any,
    x: Any,
    addend: Any,
    *_: Any,
    scale: float,
) -> Plan:
    del indices
    batch = matrix_batch((x, addend), (2, 2))
    (columns, d), rows = x.shape[-2:], indptr.shape[0] - 1
    return Plan(
        [plain((*batch, rows, d), x.dtype)],
        (math.prod(batch), rows, columns, data.shape[0], d, itemsize(x)),
        (),
        {"scale": np.float64(scale)},
    )


def _plan_csr_vjp(grad: Any, indices: Any, indptr: Any, x: Any) -> Plan:
    columns, d = x.shape[-2:]
    nnz = indices.shape[0]
    batch = math.prod(grad.shape[:-2])
    return Plan(
        [plain((nnz,), x.dtype)],
        (batch, indptr.shape[0] - 1, columns, nnz, d, itemsize(x)),
    )


def _csr_by_reference(*arrays: Any, scale: float) -> list[Array]:
    data, indices, indptr, x, addend, *_ = arrays
    return [reference.csr_product(data, indices, indptr, x, addend, scale, None)]


def _csr_vjp_by_reference(
    grad: Array, indices: Array, indptr: Array, x: Array
) -> list[Array]:
    # Of the entries themselves no more than type and number is needed.
    data = jnp.zeros(indices.shape, x.dtype)
    found = reference.csr_product_vjp(
        grad, data, indices, indptr, x, None, 1.0, None, (True, False, False)
    )
    return [part for part in found if part is not None]


# The transposed matrix comes last, for the gradient of x.
_CSR = Kernel("csr_product", _plan_csr, _csr_by_reference, "fffff", passed=5)
_CSR_VJP = Kernel("csr_product_vjp", _plan_csr_vjp, _csr_vjp_by_reference, "ffff")


def _csr_reverse(
    arrays: Sequence[Any], *, needs: Sequence[bool], scale: float
) -> list[Array]:
    """Return the gradients that are wanted."""
    grad, data, indices, indptr, x, addend, *others = arrays
    transposed = None if others[0] is None else tuple(others)
    function: Any = csr_product_vjp
    found = function(grad, data, indices, indptr, x, addend, scale, transposed, needs)
    return [part for part in found if part is not None]


def _csr_tangents(
    inputs: Sequence[Any],
    kept: Sequence[Any],
    tangents: Sequence[Any],
    *,
    scale: float,
) -> list[Array]:
    """Return the tangent: products again, and none by the addend."""
    del kept
    data, indices, indptr, x, addend, *others = inputs
    moved_data, moved_x, moved_addend = tangents
    parts = []
    if moved_data is not None:
        given = (moved_data, indices, indptr, x, None, None, None, None)
        parts += apply(_CSR, given, scale=scale)
    if moved_x is not None:
        given = (data, indices, indptr, moved_x, None, *others)
        parts += apply(_CSR, given, scale=scale)
    if moved_addend is not None:
        parts.append(moved_addend)
    batch = matrix_batch((x, addend), (2, 2))
    shape = (*batch, indptr.shape[0] - 1, x.shape[-1])
    return [jnp.broadcast_to(sum(parts[1:], start=parts[0]), shape)]


def _csr_vjp_reverse(arrays: Sequence[Any], *, needs: Sequence[bool]) -> list[Array]:
    """Return the gradients of what is linear in two arrays of rows."""
    move, grad, indices, indptr, x = arrays
    found = []
    if needs[0]:
        (out,) = apply(_CSR, (move, indices, indptr, x, *(None,) * 4), scale=1.0)
        found.append(sum_to(jnp, jnp.broadcast_to(out, grad.shape), grad.shape))
    if needs[1]:
        back = csr_transpose(move, indices, indptr, x.shape[-2])
        (out,) = apply(_CSR, (*back, grad, *(None,) * 4), scale=1.0)
        found.append(sum_to(jnp, out, x.shape))
    return found


def _csr_vjp_tangents(
    inputs: Sequence[Any], kept: Sequence[Any], tangents: Sequence[Any]
) -> list[Array]:
    del kept
    grad, indices, indptr, x = inputs
    moved_grad, moved_x = tangents
    parts = []
    if moved_grad is not None:
        parts += apply(_CSR_VJP, (moved_grad, indices, indptr, x))
    if moved_x is not None:
        parts += apply(_CSR_VJP, (grad, indices, indptr, moved_x))
    return [sum(parts[1:], start=parts[0])]


differentiate(
    _CSR,
    Derivative(
        _csr_reverse,
        moves=(0, 3, 4),
        results=(0,),
        kept=(),
        arguments=lambda inputs, kept, grads: (*grads, *inputs),
        tangents=_csr_tangents,
        parameters=("scale",),
    ),
)
differentiate(
    _CSR_VJP,
    Derivative(
        _csr_vjp_reverse,
        moves=(0, 3),
        results=(0,),
        kept=(),
        arguments=lambda inputs, kept, grads: (*grads, *inputs),
        tangents=_csr_vjp_tangents,
    ),
)
join_batch(_CSR, (None, None, None, 2, 2, None, None, None))


# ------------------------------------------------------------- the backend's functions


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
    found = apply(
        _PRODUCT,
        (values, x, segments),
        offsets=offsets,
        residual=residual,
        circular=circular,
        transpose=transpose,
        with_intermediates=with_intermediates,
        recompute=recompute,
    )
    return found[0], found[1] if with_intermediates else None


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
    left = iter(
        apply(
            _PRODUCT_VJP,
            (grad, values, x, segments, intermediates),
            offsets=offsets,
            residual=residual,
            circular=circular,
            needs=tuple(needs),
        )
    )
    grad_values, grad_x = (next(left) if needed else None for needed in needs)
    return grad_values, grad_x


def factor_values(
    x: Array, weight_in: Array, bias_in: Array, weight_out: Array, bias_out: Array
) -> Array:
    return apply(_VALUES, (x, weight_in, bias_in, weight_out, bias_out))[0]


def factor_values_vjp(
    grad: Array,
    x: Array,
    weight_in: Array,
    bias_in: Array,
    weight_out: Array,
    bias_out: Array,
    needs: tuple[bool, bool, bool, bool, bool],
) -> NetworkGradients:
    arrays = (grad, x, weight_in, bias_in, weight_out, bias_out)
    left = iter(apply(_VALUES_VJP, arrays, needs=tuple(needs)))
    found = [next(left) if needed else None for needed in needs]
    return found[0], found[1], found[2], found[3], found[4]


def csr_product(
    data: Array,
    indices: Array,
    indptr: Array,
    x: Array,
    addend: Array | None,
    scale: float,
    transposed: CompressedRows | None,
) -> Array:
    arrays = (data, indices, indptr, x, addend, *(transposed or (None,) * 3))
    return apply(_CSR, arrays, scale=float(scale))[0]


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
    grad_data = grad_x = grad_addend = None
    if needs[0]:
        (grad_data,) = apply(_CSR_VJP, (grad, indices, indptr, x))
        if scale != 1:
            grad_data = scale * grad_data
    if needs[1]:
        if transposed is None:
            transposed = csr_transpose(data, indices, indptr, x.shape[-2])
        back = (data, indices, indptr)
        out = csr_product(*transposed, grad, None, scale, back)
        grad_x = sum_to(jnp, out, x.shape)
    if needs[2] and addend is not None:
        grad_addend = sum_to(jnp, grad, addend.shape)
    return grad_data, grad_x, grad_addend
