"""torch tensors of the CPU and of CUDA: operators over the compiled kernels.

The operators carry autograd, vmap and shape rules, so that compilers and function
transforms take them as torch's own. A call with plain tensors and no gradient goes to
the kernels directly. Forward-mode derivatives and derivatives of derivatives are those
of the reference in torch's own operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat.torch as xp
import torch
from torch.autograd import forward_ad

from subquad._backends.compiled import CudaKernels, Kernels, serves_cuda
from subquad._dispatch import Array, Own, library_of
from subquad._reference import normalizers as reference
from subquad._reference._common import batch_shape
from subquad._validation import check_range

_Optional = torch.Tensor | None

is_compiling = torch.compiler.is_compiling


def _as_memory(array: Array) -> Array:
    if type(array) is not torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            array = array.detach().as_subclass(torch.Tensor)
    return array.clone() if array.data_ptr() % array.dtype.itemsize else array


class _TorchKernels(Kernels):
    xp = xp
    stream = 0

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        return torch.empty(tuple(shape), dtype=dtype)

    def scratch(self, size: int) -> Array:
        return torch.empty(size, dtype=torch.uint8)

    def ready(self, array: Array) -> Array:
        return _as_memory(array)


class _TorchCudaKernels(CudaKernels):
    xp = xp

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def stream(self) -> int:
        stream: int = torch.cuda.current_stream(self.device).cuda_stream
        return stream

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def scratch(self, size: int) -> Array:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def ready(self, array: Array) -> Array:
        return _as_memory(array)


_KERNELS: Any = _TorchKernels()
_CUDA_KERNELS: dict[int, Any] = {}
_HALVES = (torch.float16, torch.bfloat16)


def _kernels_for(array: torch.Tensor) -> Any:
    """Return what computes on a tensor's device: the reference where no kernel can."""
    if array.is_cpu:
        return _KERNELS
    index = array.device.index
    kernels = _CUDA_KERNELS.get(index)
    if kernels is None:
        kernels = _TorchCudaKernels(array.device) if serves_cuda(index) else reference
        _CUDA_KERNELS[index] = kernels
    return kernels


def takes(array: torch.Tensor) -> bool:
    """Return whether these operators are for a tensor's device.

    What is not known yet while a compiler traces, an operator finds out as it runs.
    """
    place = array.device.type
    if place != "cuda":
        return place in ("cpu", "meta")
    kernels = _CUDA_KERNELS.get(array.device.index)
    if kernels is None and not is_compiling():
        kernels = _kernels_for(array)
    return kernels is not reference


def keeps_half(array: torch.Tensor) -> bool:
    """Return whether 16-bit tensors on a tensor's device need no wider copy."""
    return array.is_cuda and isinstance(
        _CUDA_KERNELS.get(array.device.index), _TorchCudaKernels
    )


def _is_plain(*tensors: _Optional) -> bool:
    """Return whether tensors are memory and nothing else.

    They are not wrapped, traced or negated, and no mode watches what becomes of them.
    """
    if (
        is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        kind = type(tensor)
        if (
            (kind is not torch.Tensor and kind is not torch.nn.Parameter)
            or tensor.is_neg()
            or tensor.layout is not torch.strided
            or not (tensor.is_cpu or tensor.is_cuda)
        ):
            return False
    return True


def _has_gradient(*tensors: _Optional) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def _needs_reference() -> bool:
    """Return whether only torch's own operators give the right derivatives.

    An operator would drop the tangents that tensors carry inside a dual level, and
    torch.compile follows no function of ours through the transforms of torch.func.
    """
    return forward_ad._current_level >= 0 or (is_compiling() and _is_transformed())


def _is_transformed() -> bool:
    """Return whether torch.func's grad or vmap is at work.

    These refuse a gradient that is registered with an operator.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type of what is computed from tensors of a type."""
    return torch.float32 if dtype in _HALVES else dtype


def _widened(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tensors as torch's own operators are to compute with them."""
    return x.to(_wide(x.dtype)), y.to(_wide(y.dtype))


# ------------------------------------------------------------------------- primitives


def log_normalizer(
    x: Array, y: Array, log_weights: Array | None, excluded: Array | None
) -> Array:
    if _needs_reference():
        return reference.log_normalizer(*_widened(x, y), log_weights, excluded)
    if _is_plain(x, y, log_weights, excluded) and not _has_gradient(x, y, log_weights):
        return _log_normalizer(x, y, log_weights, excluded)
    if _is_transformed():
        return _transformable_log_normalizer(*_widened(x, y), log_weights, excluded)
    return _operators.log_normalizer.default(x, y, log_weights, excluded)


def log_normalizer_vjp(
    grad: Array,
    x: Array,
    y: Array,
    log_weights: Array | None,
    excluded: Array | None,
    log_z: Array,
    needs: tuple[bool, bool, bool],
) -> tuple[Array | None, Array | None, Array | None]:
    arrays = (grad, x, y, log_weights, excluded, log_z)
    if _needs_reference():
        return _reference_log_normalizer_vjp(*arrays, needs)
    needs = (*needs[:2], needs[2] and log_weights is not None)
    if _is_plain(*arrays) and not _has_gradient(*arrays):
        gx, gy, gw = _kernels_for(x).log_normalizer_vjp(*arrays, needs)
        return gx, gy, gw
    if _is_transformed():
        found = _transformable_log_normalizer_vjp(
            grad, *_widened(x, y), *arrays[3:], needs
        )
    else:
        found = _operators.log_normalizer_vjp.default(*arrays, list(needs))
    gx, gy, gw = _only(needs, found)
    return gx, gy, gw


def _reference_log_normalizer_vjp(
    grad: Array, x: Array, y: Array, *arguments: Any
) -> tuple[Array | None, Array | None, Array | None]:
    return reference.log_normalizer_vjp(grad, *_widened(x, y), *arguments)


def gaussian_log_normalizer(
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
    own: Own | None,
) -> Array:
    arrays = (x, log_counts, means, factors, diagonal)
    if _needs_reference():
        return reference.gaussian_log_normalizer(*arrays, own)
    extra = () if own is None else own[:2]
    if _is_plain(*arrays, *extra) and not _has_gradient(*arrays, *extra):
        return _kernels_for(x).gaussian_log_normalizer(*arrays, own)
    if own is not None:
        return reference.gaussian_log_normalizer(*arrays, own)
    if _is_transformed():
        return _transformable_gaussian(*arrays)
    return _operators.gaussian_log_normalizer.default(*arrays)


def gaussian_log_normalizer_vjp(
    grad: Array,
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
    log_z: Array,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Array | None, Array | None, Array | None, Array | None, Array | None]:
    arrays = (grad, x, log_counts, means, factors, diagonal, log_z)
    if _needs_reference():
        return reference.gaussian_log_normalizer_vjp(*arrays, needs)
    needs = (*needs[:4], needs[4] and diagonal is not None)
    if _is_plain(*arrays) and not _has_gradient(*arrays):
        gx, gc, gm, gf, gd = _kernels_for(x).gaussian_log_normalizer_vjp(*arrays, needs)
        return gx, gc, gm, gf, gd
    if _is_transformed():
        found = _transformable_gaussian_vjp(*arrays, needs)
    else:
        found = _operators.gaussian_log_normalizer_vjp.default(*arrays, list(needs))
    gx, gc, gm, gf, gd = _only(needs, found)
    return gx, gc, gm, gf, gd


def gaussian_score_moments(
    x: Array, means: Array, factors: Array, diagonal: Array | None
) -> tuple[Array, Array]:
    arrays = (x, means, factors, diagonal)
    if _needs_reference() or not _is_plain(*arrays) or _has_gradient(*arrays):
        return reference.gaussian_score_moments(*arrays)
    mean, variance = _kernels_for(x).gaussian_score_moments(*arrays)
    return mean, variance


def nearest_centroids(
    x: Array, centroids: Array, offsets: Array
) -> tuple[Array, Array]:
    backend: Any = _kernels_for(x) if _is_plain(x, centroids, offsets) else reference
    labels, score = backend.nearest_centroids(x, centroids, offsets)
    return labels, score


def component_sums(
    y: Array, labels: Array, weights: Array | None, k: int
) -> tuple[Array, Array]:
    backend: Any = _kernels_for(y) if _is_plain(y, labels, weights) else reference
    counts, sums = backend.component_sums(y, labels, weights, k)
    return counts, sums


def component_scatter(
    y: Array, labels: Array, weights: Array | None, means: Array, diagonal: bool
) -> tuple[Array, Array]:
    backend: Any = (
        _kernels_for(y) if _is_plain(y, labels, weights, means) else reference
    )
    scatter, radii = backend.component_scatter(y, labels, weights, means, diagonal)
    return scatter, radii


def sample_residuals(
    x: Array,
    deviations: Array,
    weights: Array,
    offsets: Array,
    variance: Array,
    scale: Array,
    shift: Array | None,
    excluded: Array | None,
    quadratic: bool,
) -> tuple[Array, Array, Array]:
    arrays = (x, deviations, weights, offsets, variance, scale, shift, excluded)
    if _needs_reference() or not _is_plain(*arrays) or _has_gradient(*arrays):
        return reference.sample_residuals(*arrays, quadratic)
    log_factor, log_error, third = _kernels_for(x).sample_residuals(*arrays, quadratic)
    return log_factor, log_error, third


def _only(needs: Sequence[bool], found: Sequence[Array]) -> list[Array | None]:
    return [a if needed else None for needed, a in zip(needs, found, strict=True)]


# -------------------------------------------------------------------------- operators

_OPERATORS = torch.library.Library("subquad", "DEF")
_operators: Any = torch.ops.subquad
_OPERATORS.define(
    "log_normalizer(Tensor x, Tensor y, Tensor? log_weights, Tensor? excluded) "
    "-> Tensor"
)
_OPERATORS.define(
    "log_normalizer_vjp(Tensor grad, Tensor x, Tensor y, Tensor? log_weights, "
    "Tensor? excluded, Tensor log_z, bool[] needs) -> (Tensor, Tensor, Tensor)"
)
_OPERATORS.define(
    "gaussian_log_normalizer(Tensor x, Tensor log_counts, Tensor means, "
    "Tensor factors, Tensor? diagonal) -> Tensor"
)
_OPERATORS.define(
    "gaussian_log_normalizer_vjp(Tensor grad, Tensor x, Tensor log_counts, "
    "Tensor means, Tensor factors, Tensor? diagonal, Tensor log_z, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _log_normalizer(
    x: torch.Tensor, y: torch.Tensor, log_weights: _Optional, excluded: _Optional
) -> Any:
    if excluded is not None and excluded.is_cpu:
        # Here values are real, whatever transforms and tracers stood above.
        check_range("self_index", excluded, y.shape[-2], library_of(excluded))
    return _kernels_for(x).log_normalizer(x, y, log_weights, excluded)


def _log_normalizer_vjp(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *arrays, needs = arguments
    kernels = _kernels_for(arrays[1])
    return _filled(arrays[1], kernels.log_normalizer_vjp(*arrays, needs))


def _gaussian_log_normalizer(*arrays: Any) -> Any:
    return _kernels_for(arrays[0]).gaussian_log_normalizer(*arrays, None)


def _gaussian_log_normalizer_vjp(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *arrays, needs = arguments
    kernels = _kernels_for(arrays[1])
    return _filled(arrays[1], kernels.gaussian_log_normalizer_vjp(*arrays, needs))


def _filled(
    like: torch.Tensor, gradients: Sequence[_Optional]
) -> tuple[torch.Tensor, ...]:
    """Put empty tensors in the place of None, which an operator cannot return."""
    dtype = _wide(like.dtype)
    return tuple(
        like.new_empty((0,), dtype=dtype) if g is None else g for g in gradients
    )


for _place in ("CPU", "CUDA"):
    _OPERATORS.impl("log_normalizer", _log_normalizer, _place)
    _OPERATORS.impl("log_normalizer_vjp", _log_normalizer_vjp, _place)
    _OPERATORS.impl("gaussian_log_normalizer", _gaussian_log_normalizer, _place)
    _OPERATORS.impl("gaussian_log_normalizer_vjp", _gaussian_log_normalizer_vjp, _place)


# ----------------------------------------------------------------------- shapes alone


def _result(x: torch.Tensor, *shapes: Sequence[int]) -> torch.Tensor:
    batch = batch_shape(tuple(x.shape[:-2]), *(tuple(shape) for shape in shapes))
    return x.new_empty((*batch, x.shape[-2]), dtype=_wide(x.dtype))


def _log_normalizer_shape(
    x: torch.Tensor, y: torch.Tensor, log_weights: _Optional, excluded: _Optional
) -> torch.Tensor:
    del excluded
    weights = () if log_weights is None else log_weights.shape[:-1]
    return _result(x, y.shape[:-2], weights)


def _gaussian_shape(
    x: torch.Tensor,
    log_counts: torch.Tensor,
    means: torch.Tensor,
    factors: torch.Tensor,
    diagonal: _Optional,
) -> torch.Tensor:
    last = () if diagonal is None else diagonal.shape[:-2]
    return _result(x, log_counts.shape[:-1], means.shape[:-2], factors.shape[:-3], last)


def _gradient_shapes(
    inputs: Sequence[_Optional], needs: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    like = next(a for a in inputs if a is not None)
    dtype = _wide(like.dtype)
    return tuple(
        like.new_empty(
            tuple(a.shape) if needed and a is not None else (0,), dtype=dtype
        )
        for a, needed in zip(inputs, needs, strict=True)
    )


def _log_normalizer_vjp_shape(*arguments: Any) -> tuple[torch.Tensor, ...]:
    _, x, y, log_weights, _, _, needs = arguments
    return _gradient_shapes((x, y, log_weights), needs)


def _gaussian_vjp_shape(*arguments: Any) -> tuple[torch.Tensor, ...]:
    _, *inputs, _, needs = arguments
    return _gradient_shapes(inputs, needs)


# ---------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _log_normalizer_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, y, log_weights, excluded, log_z = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    # Gradients of 16-bit inputs are float32 here: autograd narrows them.
    return (
        *log_normalizer_vjp(grad, x, y, log_weights, excluded, log_z, needs),
        None,
    )


def _gaussian_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    *inputs, log_z = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    x, log_counts, means, factors, diagonal = inputs
    return gaussian_log_normalizer_vjp(
        grad, x, log_counts, means, factors, diagonal, log_z, needs
    )


def _save_vjp(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    del output
    *arrays, needs = inputs
    ctx.save_for_backward(*arrays)
    ctx.needs = tuple(needs)


def _backward_of(vjp: Callable[..., Any], index: int | None) -> Callable[..., Any]:
    """Return the reverse of a reverse, from its reference in torch's own operators.

    `index` is the place of an argument of integers.
    """

    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        arrays = ctx.saved_tensors
        places = [i for i, a in enumerate(arrays) if a is not None and i != index]

        def gradients(*moved: torch.Tensor) -> tuple[torch.Tensor, ...]:
            complete = list(arrays)
            for place, array in zip(places, moved, strict=True):
                complete[place] = array
            return tuple(g for g in vjp(*complete, ctx.needs) if g is not None)

        reverse: Any = torch.func.vjp(gradients, *(arrays[i] for i in places))[1]
        found = reverse(
            tuple(g for g, needed in zip(grads, ctx.needs, strict=True) if needed)
        )
        result: list[Any] = [None] * (len(arrays) + 1)
        for place, array in zip(places, found, strict=True):
            result[place] = array
        return tuple(result)

    return backward


# -------------------------------------------------------------------------------- vmap


def _padded(
    array: _Optional, dim: int | None, core: int, rank: int, stretch: int | None
) -> _Optional:
    """Bring the mapped dimension before `rank` batch dimensions that broadcast.

    Arrays that are not mapped are stretched to `stretch`, or left alone if that is
    None.
    """
    if array is None:
        return None
    if dim is None:
        if stretch is None:
            return array
        array = array.expand(stretch, *array.shape)
    else:
        array = array.movedim(dim, 0)
    missing = rank - (array.ndim - 1 - core)
    front, *rest = array.shape
    return array.reshape(front, *(1,) * missing, *rest) if missing else array


def _batch_rank(
    arrays: Sequence[_Optional], dims: Sequence[int | None], cores: Sequence[int]
) -> int:
    return max(
        a.ndim - core - (dim is not None)
        for a, dim, core in zip(arrays, dims, cores, strict=True)
        if a is not None
    )


def _one_by_one(
    operator: Callable[..., Any],
    size: int,
    dims: Sequence[Any],
    arguments: Sequence[Any],
) -> list[Any]:
    return [
        operator(
            *(
                a if dim is None else a.select(dim, i)
                for a, dim in zip(arguments, dims, strict=True)
            )
        )
        for i in range(size)
    ]


def _flat_dims(dims: Sequence[Any]) -> list[int | None]:
    """Read the mapped dimensions; those of a list of booleans are a list of None."""
    return [dim if isinstance(dim, int) else None for dim in dims]


def _mapped(
    operator: Callable[..., Any], cores: Sequence[int], index: int | None
) -> Callable[..., Any]:
    """Return the vmap rule of a function: the mapped dimension joins the batch."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, int]:
        dims = _flat_dims(in_dims)
        if index is not None and dims[index] is not None:
            # All batches share one index.
            return torch.stack(
                _one_by_one(operator, info.batch_size, dims, arguments)
            ), 0
        arrays = arguments[: len(cores)]
        rank = _batch_rank(arrays, dims[: len(cores)], cores)
        moved = [
            _padded(a, dim, core, rank, None)
            for a, dim, core in zip(arrays, dims, cores, strict=False)
        ]
        return operator(*moved, *arguments[len(cores) :]), 0

    return rule


def _mapped_vjp(
    operator: Callable[..., Any],
    cores: Sequence[int],
    inputs: slice,
    index: int | None,
) -> Callable[..., Any]:
    """Return the vmap rule of a reverse: every gradient has the mapped dimension."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        *arrays, needs = arguments
        dims = _flat_dims(in_dims)[: len(arrays)]
        size = info.batch_size
        out_dims = tuple(0 if needed else None for needed in needs)
        if index is not None and dims[index] is not None:
            parts = _one_by_one(
                lambda *each: operator(*each, needs), size, dims, arrays
            )
            stacked = tuple(
                torch.stack(part) if needed else part[0]
                for part, needed in zip(zip(*parts, strict=True), needs, strict=True)
            )
            return stacked, out_dims
        batched = [i for i in range(len(arrays)) if i != index]
        rank = _batch_rank(
            [arrays[i] for i in batched],
            [dims[i] for i in batched],
            [cores[i] for i in batched],
        )
        moved = list(arrays)
        shapes: list[tuple[int, ...] | None] = [None] * len(arrays)
        for i in batched:
            array, dim = arrays[i], dims[i]
            if array is None:
                continue
            shape = list(array.shape)
            if dim is not None:
                del shape[dim]
            shapes[i] = (size, *shape)
            moved[i] = _padded(array, dim, cores[i], rank, size)
        found = operator(*moved, needs)
        gradients = tuple(
            g.reshape(shape) if needed and shape is not None else g
            for g, needed, shape in zip(found, needs, shapes[inputs], strict=True)
        )
        return gradients, out_dims

    return rule


# The cores are the dimensions of each argument's matrices, after those of the batch.
_EXACT = (2, 2, 1)
_EXACT_VJP = (1, 2, 2, 1, 1, 1)
_GAUSSIAN = (2, 1, 2, 3, 2)
_GAUSSIAN_VJP = (1, 2, 1, 2, 3, 2, 1)
_INDEX = 3
_INDEX_VJP = 4


def _register(
    name: str,
    shape: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
    rule: Callable[..., Any],
) -> None:
    qualified = f"subquad::{name}"
    torch.library.register_fake(qualified, shape, lib=_OPERATORS)
    torch.library.register_autograd(
        qualified, backward, setup_context=save, lib=_OPERATORS
    )
    torch.library.register_vmap(qualified, rule, lib=_OPERATORS)


_log_normalizer_vjp_backward = _backward_of(_reference_log_normalizer_vjp, _INDEX_VJP)
_gaussian_vjp_backward = _backward_of(reference.gaussian_log_normalizer_vjp, None)

_register(
    "log_normalizer",
    _log_normalizer_shape,
    _save,
    _log_normalizer_backward,
    _mapped(_operators.log_normalizer.default, _EXACT, _INDEX),
)
_register(
    "log_normalizer_vjp",
    _log_normalizer_vjp_shape,
    _save_vjp,
    _log_normalizer_vjp_backward,
    _mapped_vjp(
        _operators.log_normalizer_vjp.default, _EXACT_VJP, slice(1, 4), _INDEX_VJP
    ),
)
_register(
    "gaussian_log_normalizer",
    _gaussian_shape,
    _save,
    _gaussian_backward,
    _mapped(_operators.gaussian_log_normalizer.default, _GAUSSIAN, None),
)
_register(
    "gaussian_log_normalizer_vjp",
    _gaussian_vjp_shape,
    _save_vjp,
    _gaussian_vjp_backward,
    _mapped_vjp(
        _operators.gaussian_log_normalizer_vjp.default,
        _GAUSSIAN_VJP,
        slice(1, 6),
        None,
    ),
)


# ------------------------------------------ the same for torch.func's transforms


def _transformable(
    operator: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
    rule: Callable[..., Any],
) -> Any:
    """Return a function that torch.func transforms, with the rules of an operator."""
    members = {
        "forward": operator,
        "setup_context": save,
        "backward": backward,
        "vmap": rule,
    }
    function: Any = type(
        "Transformable",
        (torch.autograd.Function,),
        {name: staticmethod(member) for name, member in members.items()},
    )
    return function.apply


def _complete_log_normalizer_vjp(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return _filled(arguments[1], log_normalizer_vjp(*arguments))


def _complete_gaussian(*arrays: Any) -> Any:
    x, log_counts, means, factors, diagonal = arrays
    return gaussian_log_normalizer(x, log_counts, means, factors, diagonal, None)


def _complete_gaussian_vjp(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return _filled(arguments[1], gaussian_log_normalizer_vjp(*arguments))


_transformable_log_normalizer = _transformable(
    _operators.log_normalizer.default,
    _save,
    _log_normalizer_backward,
    _mapped(log_normalizer, _EXACT, _INDEX),
)
_transformable_log_normalizer_vjp = _transformable(
    _operators.log_normalizer_vjp.default,
    _save_vjp,
    _log_normalizer_vjp_backward,
    _mapped_vjp(_complete_log_normalizer_vjp, _EXACT_VJP, slice(1, 4), _INDEX_VJP),
)
_transformable_gaussian = _transformable(
    _operators.gaussian_log_normalizer.default,
    _save,
    _gaussian_backward,
    _mapped(_complete_gaussian, _GAUSSIAN, None),
)
_transformable_gaussian_vjp = _transformable(
    _operators.gaussian_log_normalizer_vjp.default,
    _save_vjp,
    _gaussian_vjp_backward,
    _mapped_vjp(_complete_gaussian_vjp, _GAUSSIAN_VJP, slice(1, 6), None),
)
