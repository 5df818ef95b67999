"""Sparse factors for tensors of the CPU and of CUDA.

The gradients of a product of sparse factors and of the networks have operators; their
own derivatives, and all in forward mode, are those of the reference in torch's own
operators. The derivatives of a sparse matrix's product are such products again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from subquad._backends.torch.memory import (
    Optional,
    has_gradient,
    is_direct,
    is_transformed,
    kernels_for,
    needs_reference,
)
from subquad._backends.torch.operators import (
    define,
    filled,
    gradient_shapes,
    is_filling,
    mapped,
    mapped_vjp,
    one_by_one,
    only,
    saved,
    stacked,
)
from subquad._dispatch import Array, CompressedRows, FactorOffsets, NetworkGradients
from subquad._reference import factors as reference
from subquad._reference._common import batch_shape, sum_to

csr_transpose = reference.csr_transpose

# ------------------------------------------------------------------------- primitives


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
    if needs_reference():
        return reference.sparse_factor_product(
            values,
            x,
            segments,
            offsets,
            residual,
            circular,
            transpose,
            with_intermediates,
            recompute,
        )
    if is_direct(values, x):
        out, intermediates = kernels_for(values).sparse_factor_product(
            values,
            x,
            segments,
            offsets,
            residual,
            circular,
            transpose,
            with_intermediates,
            recompute,
        )
        return out, intermediates
    if with_intermediates and (has_gradient(values, x) or is_transformed()):
        return _one_after_the_other(values, x, segments, offsets, residual, circular)
    keeps = not (transpose or recompute or len(offsets) < 2) and has_gradient(values)
    out, intermediates = _product(
        values,
        x,
        segments,
        _flat(offsets),
        residual,
        circular,
        transpose,
        with_intermediates or keeps,
    )
    return out, intermediates if with_intermediates else None


def _one_after_the_other(
    values: Array,
    x: Array,
    segments: Array | None,
    offsets: FactorOffsets,
    residual: str,
    circular: bool,
) -> tuple[Array, Array]:
    """Return the product and intermediates that gradients pass through."""
    v = x.expand(*batch_shape(values.shape[:-3], x.shape[:-2]), *x.shape[-2:])
    first, steps = v, []
    for m, row in enumerate(offsets):
        v, _ = sparse_factor_product(
            values[..., m : m + 1, :, :],
            v,
            segments,
            (row,),
            "step" if residual == "step" else "none",
            circular,
            False,
            False,
            False,
        )
        if residual == "input":
            v = v + first
        steps.append(v)
    if len(steps) < 2:
        return v, first.new_empty((*first.shape[:-2], 0, *first.shape[-2:]))
    return v, torch.stack(steps[:-1], -3)


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
    arrays = (grad, values, x, segments, intermediates)
    flags = (residual, circular)
    if needs_reference():
        return reference.sparse_factor_product_vjp(*arrays, offsets, *flags, needs)
    if is_direct(grad, values, x, intermediates):
        grad_values, grad_x = kernels_for(values).sparse_factor_product_vjp(
            *arrays, offsets, *flags, needs
        )
        return grad_values, grad_x
    found = _product_vjp(*arrays, _flat(offsets), *flags, list(needs))
    grad_values, grad_x = only(needs, found)
    return grad_values, grad_x


def factor_values(
    x: Array, weight_in: Array, bias_in: Array, weight_out: Array, bias_out: Array
) -> Array:
    arrays = (x, weight_in, bias_in, weight_out, bias_out)
    if needs_reference():
        return reference.factor_values(*arrays)
    if is_direct(*arrays):
        return kernels_for(x).factor_values(*arrays)
    return _values(*arrays)


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
    if needs_reference():
        return reference.factor_values_vjp(*arrays, needs)
    if is_direct(*arrays):
        found = kernels_for(x).factor_values_vjp(*arrays, needs)
    else:
        found = only(needs, _values_vjp(*arrays, list(needs)))
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
    arrays = (data, indices, indptr, x, addend)
    if needs_reference():
        return reference.csr_product(*arrays, scale, transposed)
    if is_direct(data, x, addend):
        return kernels_for(x).csr_product(*arrays, scale, transposed)
    return _csr(*arrays, float(scale), *(transposed or (None, None, None)))


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
    grad_data = grad_x = None
    if needs[0]:
        grad_data = _csr_gradient(grad, indices, indptr, x)
        if scale != 1:
            grad_data = scale * grad_data
    if needs[1]:
        shape = tuple(x.shape)
        grad_x = _through_rows(grad, data, indices, indptr, shape, scale, transposed)
    grad_addend = None
    if needs[2] and addend is not None:
        grad_addend = sum_to(torch, grad, tuple(addend.shape))
    return grad_data, grad_x, grad_addend


def _through_rows(
    grad: Array,
    data: Array,
    indices: Array,
    indptr: Array,
    shape: tuple[int, ...],
    scale: float,
    transposed: CompressedRows | None,
) -> Array:
    """Return the gradient of the rows that a matrix was multiplied with."""
    if transposed is None or has_gradient(data):
        transposed = csr_transpose(data, indices, indptr, shape[-2])
    back = (data, indices, indptr)
    return sum_to(
        torch, csr_product(*transposed, grad, None, scale, back), tuple(shape)
    )


def _csr_gradient(grad: Array, indices: Array, indptr: Array, x: Array) -> Array:
    """Return what a product's gradient gives to the entries of the matrix."""
    if needs_reference():
        return _gradient_by(reference, grad, indices, indptr, x)
    if is_direct(grad, x):
        return _gradient_by(kernels_for(x), grad, indices, indptr, x)
    return _csr_vjp(grad, indices, indptr, x)


def _gradient_by(
    backend: Any, grad: Array, indices: Array, indptr: Array, x: Array
) -> Array:
    # Of the entries themselves no more than type and number is needed.
    data = x.new_empty(tuple(indices.shape))
    return backend.csr_product_vjp(
        grad, data, indices, indptr, x, None, 1.0, None, (True, False, False)
    )[0]


# ------------------------------------------------------------ operators of the product


def _flat(offsets: FactorOffsets) -> list[int]:
    return [offset for row in offsets for offset in row]


def _rows(offsets: Sequence[int], values: torch.Tensor) -> FactorOffsets:
    """Return the offsets of each factor."""
    m, _, k = values.shape[-3:]
    return tuple(tuple(offsets[i * k : (i + 1) * k]) for i in range(m))


def _compute_product(
    values: torch.Tensor,
    x: torch.Tensor,
    segments: Optional,
    offsets: list[int],
    *flags: Any,
) -> Any:
    out, intermediates = kernels_for(values).sparse_factor_product(
        values, x, segments, _rows(offsets, values), *flags, False
    )
    return filled(values, (out, intermediates))


def _product_shape(
    values: torch.Tensor, x: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, ...]:
    batch = batch_shape(tuple(values.shape[:-3]), tuple(x.shape[:-2]))
    out = x.new_empty((*batch, *x.shape[-2:]))
    intermediates = None
    if others[-1]:
        m = max(values.shape[-3] - 1, 0)
        intermediates = x.new_empty((*batch, m, *x.shape[-2:]))
    return filled(values, (out, intermediates))


def _product_backward(ctx: Any, grad: Optional, _: Any) -> tuple[Any, ...]:
    arguments, (kept,) = saved(ctx)
    values, x, segments, offsets, residual, circular, transpose, _ = arguments
    needs = ctx.needs_input_grad[:2]
    grad_values = grad_x = None
    rows = _rows(offsets, values)
    given = (segments, rows, residual, circular)
    if grad is None:
        pass
    elif not needs[0]:
        # The values alone tell how a gradient passes: here x is its shape.
        back = sparse_factor_product(values, grad, *given, not transpose, False, True)
        grad_x = sum_to(torch, back[0], tuple(x))
    elif transpose:
        # The product of g and the transpose's result is that of W g and x.
        grad_values, _ = sparse_factor_product_vjp(
            x.expand_as(grad), values, grad, segments, None, *given[1:], (True, False)
        )
        if needs[1]:
            back = sparse_factor_product(values, grad, *given, False, False, True)
            grad_x = sum_to(torch, back[0], tuple(x.shape))
    else:
        intermediates = None if is_filling(kept) else kept
        grad_values, grad_x = sparse_factor_product_vjp(
            grad, values, x, segments, intermediates, *given[1:], needs
        )
    return (grad_values, grad_x, *(None,) * 6)


def _compute_product_vjp(
    grad: torch.Tensor,
    values: torch.Tensor,
    x: torch.Tensor,
    segments: Optional,
    intermediates: Optional,
    offsets: list[int],
    *flags: Any,
) -> Any:
    *others, needs = flags
    found = kernels_for(values).sparse_factor_product_vjp(
        grad,
        values,
        x,
        segments,
        intermediates,
        _rows(offsets, values),
        *others,
        tuple(needs),
    )
    return filled(values, found)


def _product_vjp_shape(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return gradient_shapes(arguments[1:3], arguments[-1])


def _product_vjp_backward(ctx: Any, *moves: Optional) -> tuple[Any, ...]:
    arguments, _ = saved(ctx)
    grad, values, x, segments, _, offsets, residual, circular, needs = arguments
    flags = (_rows(offsets, values), residual, circular, tuple(needs))
    function: Any = reference.sparse_factor_product_vjp

    def gradients(*moved: torch.Tensor) -> Any:
        return function(*moved, segments, None, *flags)

    found = _reversed(gradients, (grad, values, x), moves)
    return (*found, *(None,) * 6)


def _reversed(
    function: Callable[..., tuple[Optional, ...]],
    arrays: Sequence[torch.Tensor],
    moves: Sequence[Optional],
) -> tuple[Optional, ...]:
    """Return gradients of all arrays by the reverse of torch's own operators."""
    places = [place for place, move in enumerate(moves) if move is not None]
    if not places:
        return (None,) * len(arrays)

    def of_moved(*given: torch.Tensor) -> tuple[Any, ...]:
        found = function(*given)
        return tuple(found[place] for place in places)

    reverse: Any = torch.func.vjp(of_moved, *arrays)[1]
    found: tuple[Optional, ...] = reverse(tuple(moves[place] for place in places))
    return found


_product = define(
    "sparse_factor_product(Tensor values, Tensor x, Tensor? segments, int[] offsets, "
    "str residual, bool circular, bool transpose, bool with_intermediates) "
    "-> (Tensor, Tensor)",
    _compute_product,
    _product_shape,
    _product_backward,
    lambda call: mapped(call, (3, 2, 1), 2),
    constants=(1,),
    saved_results=(1,),
    spared=lambda needs: () if needs[0] else (1,),
)
_product_vjp = define(
    "sparse_factor_product_vjp(Tensor grad, Tensor values, Tensor x, Tensor? segments, "
    "Tensor? intermediates, int[] offsets, str residual, bool circular, bool[] needs) "
    "-> (Tensor, Tensor)",
    _compute_product_vjp,
    _product_vjp_shape,
    _product_vjp_backward,
    lambda call: mapped_vjp(call, (2, 3, 2, 1, 3), (1, 2), 3),
    spared=lambda _: (4,),
)

# ----------------------------------------------------------- operators of the networks

_CORES = (2, 3, 2, 3, 2)


def _values_shape(*arrays: torch.Tensor) -> torch.Tensor:
    batch = batch_shape(
        *(
            tuple(array.shape[: array.ndim - core])
            for array, core in zip(arrays, _CORES, strict=True)
        )
    )
    x, _, _, weight_out, _ = arrays
    m, k, _ = weight_out.shape[-3:]
    out: torch.Tensor = x.new_empty((*batch, m, x.shape[-2], k))
    return out


def _values_backward(ctx: Any, grad: Optional) -> tuple[Optional, ...]:
    arrays, _ = saved(ctx)
    if grad is None:
        return (None,) * 5
    reverse: Callable[..., Any] = factor_values_vjp
    return tuple(reverse(grad, *arrays, ctx.needs_input_grad))


def _compute_values_vjp(*arguments: Any) -> Any:
    *arrays, needs = arguments
    found = kernels_for(arrays[0]).factor_values_vjp(*arrays, tuple(needs))
    return filled(arrays[0], found)


def _values_vjp_backward(ctx: Any, *moves: Optional) -> tuple[Optional, ...]:
    (*arrays, needs), _ = saved(ctx)
    function: Any = reference.factor_values_vjp
    found = _reversed(lambda *given: function(*given, tuple(needs)), arrays, moves)
    return (*found, None)


_NETWORKS = (
    "Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, Tensor bias_out"
)
_values = define(
    f"factor_values({_NETWORKS}) -> Tensor",
    lambda *arrays: kernels_for(arrays[0]).factor_values(*arrays),
    _values_shape,
    _values_backward,
    lambda call: mapped(call, _CORES, None),
)
_values_vjp = define(
    f"factor_values_vjp(Tensor grad, {_NETWORKS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _compute_values_vjp,
    lambda grad, *rest: gradient_shapes(rest[:-1], rest[-1]),
    _values_vjp_backward,
    lambda call: mapped_vjp(call, (3, *_CORES), range(1, 6), None),
)

# ---------------------------------------------------- operators of the sparse matrices


def _compute_csr(*arguments: Any) -> Any:
    *given, data, indices, indptr = arguments
    transposed = None if data is None else (data, indices, indptr)
    return kernels_for(given[0]).csr_product(*given, transposed)


def _csr_shape(*arguments: Any) -> torch.Tensor:
    _, _, indptr, x, addend, *_ = arguments
    batch = tuple(x.shape[:-2])
    if addend is not None:
        batch = batch_shape(batch, tuple(addend.shape[:-2]))
    out: torch.Tensor = x.new_empty((*batch, indptr.shape[0] - 1, x.shape[-1]))
    return out


def _csr_backward(ctx: Any, grad: Optional) -> tuple[Optional, ...]:
    arguments, _ = saved(ctx)
    data, indices, indptr, x, addend, scale, *others = arguments
    needs_data, _, _, needs_x, needs_addend, *_ = ctx.needs_input_grad
    grad_data = grad_x = grad_addend = None
    if grad is not None and needs_data:
        grad_data = scale * _csr_gradient(grad, indices, indptr, x)
    if grad is not None and needs_x:
        shape = tuple(x.shape) if needs_data else x
        has_other = not needs_data and others[0] is not None
        transposed = tuple(others) if has_other else None
        grad_x = _through_rows(grad, data, indices, indptr, shape, scale, transposed)
    if grad is not None and needs_addend:
        grad_addend = sum_to(torch, grad, tuple(addend))
    return (grad_data, None, None, grad_x, grad_addend, *(None,) * 4)


def _csr_spared(needs: Sequence[bool]) -> tuple[int, ...]:
    # The transposed matrix is of no use where the matrix itself has a gradient.
    return (4, 6, 7, 8) if needs[0] else (3, 4)


def _csr_vjp_backward(ctx: Any, move: Optional) -> tuple[Optional, ...]:
    (grad, indices, indptr, x), _ = saved(ctx)
    needs_grad, _, _, needs_x = ctx.needs_input_grad
    grad_grad = grad_x = None
    if move is not None and needs_grad:
        out = csr_product(move, indices, indptr, x, None, 1.0, None)
        grad_grad = out.expand(grad.shape)
    if move is not None and needs_x:
        shape = tuple(x.shape)
        grad_x = _through_rows(grad, move, indices, indptr, shape, 1.0, None)
    return grad_grad, None, None, grad_x


def _csr_rule(
    call: Callable[..., Any], rows: Sequence[int], structure: Sequence[int]
) -> Callable[..., Any]:
    """Return the vmap rule of a function: mapped rows join the batch.

    `rows` are the places of matrices of rows, `structure` those of what all batches
    share.
    """

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        if any(in_dims[place] is not None for place in structure):
            return stacked(one_by_one(call, info.batch_size, in_dims, arguments))
        moved = list(arguments)
        found = mapped(
            lambda *given: _with(call, moved, rows, given), (2,) * len(rows), None
        )
        result: tuple[Any, Any] = found(
            info, [in_dims[i] for i in rows], *(arguments[i] for i in rows)
        )
        return result

    return rule


def _with(
    call: Callable[..., Any],
    arguments: list[Any],
    places: Sequence[int],
    given: Sequence[Any],
) -> Any:
    for place, array in zip(places, given, strict=True):
        arguments[place] = array
    return call(*arguments)


def _csr_vjp_rule(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the vmap rule of the gradient, which sums over all batches."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        return stacked(one_by_one(call, info.batch_size, in_dims, arguments))

    return rule


_csr = define(
    "csr_product(Tensor data, Tensor indices, Tensor indptr, Tensor x, Tensor? addend, "
    "float scale, Tensor? data_transposed, Tensor? indices_transposed, "
    "Tensor? indptr_transposed) -> Tensor",
    _compute_csr,
    _csr_shape,
    _csr_backward,
    lambda call: _csr_rule(call, (3, 4), (0, 1, 2, 6, 7, 8)),
    spared=_csr_spared,
)
_csr_vjp = define(
    "csr_product_gradient_of_data(Tensor grad, Tensor indices, Tensor indptr, "
    "Tensor x) -> Tensor",
    lambda *arrays: _gradient_by(kernels_for(arrays[0]), *arrays),
    lambda grad, indices, indptr, x: x.new_empty(tuple(indices.shape)),
    _csr_vjp_backward,
    _csr_vjp_rule,
)
