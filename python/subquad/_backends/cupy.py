"""CuPy arrays: the compiled kernels of CUDA, on the array's device and current stream.

Calls return as soon as their kernels are queued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cupy

from subquad._backends.compiled import CudaKernels, serves_cuda
from subquad._dispatch import Array

# Its annotations are partial: what comes from it is Any.


class _CuPyKernels(CudaKernels):
    """The primitives on the current device."""

    xp = cupy

    @property
    def stream(self) -> int:
        stream: int = cupy.cuda.get_current_stream().ptr
        return stream

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        return cupy.empty(tuple(shape), dtype)

    def scratch(self, size: int) -> Array:
        return cupy.empty((size,), cupy.uint8)

    def ready(self, array: Array) -> Array:
        return array.copy() if array.data.ptr % array.dtype.itemsize else array


_KERNELS = _CuPyKernels()

has_attention_step = True


def takes(array: Array) -> bool:
    """Return whether kernels run on an array's device."""
    return serves_cuda(array.device.id)


def _on_device(primitive: Callable[..., Any]) -> Any:
    """Return a primitive that runs on the device of its first array."""

    def guarded(first: Array, *arguments: Any) -> Any:
        with first.device:
            return primitive(first, *arguments)

    return guarded


log_normalizer = _on_device(_KERNELS.log_normalizer)
log_normalizer_vjp = _on_device(_KERNELS.log_normalizer_vjp)
gaussian_log_normalizer = _on_device(_KERNELS.gaussian_log_normalizer)
gaussian_log_normalizer_vjp = _on_device(_KERNELS.gaussian_log_normalizer_vjp)
gaussian_score_moments = _on_device(_KERNELS.gaussian_score_moments)
nearest_centroids = _on_device(_KERNELS.nearest_centroids)
component_sums = _on_device(_KERNELS.component_sums)
component_scatter = _on_device(_KERNELS.component_scatter)
sample_residuals = _on_device(_KERNELS.sample_residuals)
log_features = _on_device(_KERNELS.log_features)
log_features_vjp = _on_device(_KERNELS.log_features_vjp)
trigonometric_features = _on_device(_KERNELS.trigonometric_features)
hadamard_transform = _on_device(_KERNELS.hadamard_transform)
sparse_factor_product = _on_device(_KERNELS.sparse_factor_product)
sparse_factor_product_vjp = _on_device(_KERNELS.sparse_factor_product_vjp)
factor_values = _on_device(_KERNELS.factor_values)
factor_values_vjp = _on_device(_KERNELS.factor_values_vjp)
csr_product = _on_device(_KERNELS.csr_product)
csr_product_vjp = _on_device(_KERNELS.csr_product_vjp)
csr_transpose = _on_device(_KERNELS.csr_transpose)
embedding_step = _on_device(_KERNELS.embedding_step)
logcumsumexp = _on_device(_KERNELS.logcumsumexp)
logcumsumexp_vjp = _on_device(_KERNELS.logcumsumexp_vjp)
signed_logcumsumexp = _on_device(_KERNELS.signed_logcumsumexp)
signed_logcumsumexp_vjp = _on_device(_KERNELS.signed_logcumsumexp_vjp)
log_linear_recurrence = _on_device(_KERNELS.log_linear_recurrence)
log_linear_recurrence_vjp = _on_device(_KERNELS.log_linear_recurrence_vjp)
linear_attention = _on_device(_KERNELS.linear_attention)
linear_attention_vjp = _on_device(_KERNELS.linear_attention_vjp)
log_linear_attention = _on_device(_KERNELS.log_linear_attention)
log_linear_attention_vjp = _on_device(_KERNELS.log_linear_attention_vjp)
attention_step = _on_device(_KERNELS.attention_step)
