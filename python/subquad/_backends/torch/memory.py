"""Where torch's tensors lie, and whether kernels may read them as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import array_api_compat.torch as xp
import torch
from torch.autograd import forward_ad

from subquad._backends.compiled import CudaKernels, Kernels, serves_cuda
from subquad._dispatch import Array
from subquad._reference import primitives as reference

Optional: TypeAlias = torch.Tensor | None

is_compiling = torch.compiler.is_compiling


def as_memory(array: Array) -> Array:
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
        return as_memory(array)


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
        return as_memory(array)


_KERNELS: Any = _TorchKernels()
_CUDA_KERNELS: dict[int, Any] = {}
_HALVES = (torch.float16, torch.bfloat16)


def kernels_for(array: torch.Tensor) -> Any:
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
        kernels = kernels_for(array)
    return kernels is not reference


def keeps_half(array: torch.Tensor) -> bool:
    """Return whether 16-bit tensors on a tensor's device need no wider copy."""
    return array.is_cuda and isinstance(
        _CUDA_KERNELS.get(array.device.index), _TorchCudaKernels
    )


def is_plain(*tensors: Optional) -> bool:
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


def has_gradient(*tensors: Optional) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def carries_tangents() -> bool:
    """Return whether tensors may be dual: a forward-mode derivative is at work."""
    return forward_ad._current_level >= 0


def is_direct(*tensors: Optional) -> bool:
    """Return whether kernels may take tensors: plain ones, and nothing asks for
    derivatives.
    """
    return is_plain(*tensors) and not has_gradient(*tensors) and not carries_tangents()


def is_compiling_transforms() -> bool:
    """Return whether torch.compile traces a transform of torch.func.

    It follows no function of ours through these.
    """
    return is_compiling() and is_transformed()


def needs_reference() -> bool:
    """Return whether only torch's own operators give the right derivatives.

    An operator would drop the tangents that tensors carry inside a dual level, and
    torch.compile follows no function of ours through the transforms of torch.func.
    """
    return carries_tangents() or is_compiling_transforms()


def is_transformed() -> bool:
    """Return whether torch.func's grad or vmap is at work.

    These refuse a gradient that is registered with an operator.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type of what is computed from tensors of a type."""
    return torch.float32 if dtype in _HALVES else dtype


def widened(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tensors as torch's own operators are to compute with them."""
    return x.to(wide(x.dtype)), y.to(wide(y.dtype))
