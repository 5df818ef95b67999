"""The compiled kernels of `subquad._core` for NumPy arrays.

`Kernels` serves every library with memory of the CPU or of CUDA: the library allocates
outputs and scratch memory, the kernels fill them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from subquad._backends.compiled.attention import AttentionKernels
from subquad._backends.compiled.embedding import EmbeddingKernels
from subquad._backends.compiled.factors import FactorKernels
from subquad._backends.compiled.features import FeatureKernels
from subquad._backends.compiled.memory import (
    CPU,
    CUDA,
    RecycledMemory,
    _core,
    serves_cuda,
)
from subquad._backends.compiled.normalizers import NormalizerKernels
from subquad._backends.compiled.scans import ScanKernels
from subquad._dispatch import Array

__all__ = ["CPU", "CUDA", "CudaKernels", "Kernels", "_core", "serves_cuda"]

has_attention_step = True
recycled_memory = RecycledMemory()


class Kernels(
    NormalizerKernels,
    FeatureKernels,
    FactorKernels,
    EmbeddingKernels,
    ScanKernels,
    AttentionKernels,
):
    """The primitives over one library's memory of the CPU, or of CUDA."""


class CudaKernels(Kernels):
    """The primitives over one library's memory of CUDA."""

    place = CUDA

    def largest_component(self, offsets: Array, n_samples: int) -> int:
        # Looking at the offsets would wait for the device.
        del offsets
        return n_samples


class _NumPyKernels(Kernels):
    xp = np
    stream = 0

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        return recycled_memory.empty(shape, dtype)

    def scratch(self, size: int) -> Array:
        return recycled_memory.empty((size,), np.uint8)

    def ready(self, array: Array) -> Array:
        return array if array.flags.aligned else array.copy()


_KERNELS = _NumPyKernels()

log_normalizer = _KERNELS.log_normalizer
log_normalizer_vjp = _KERNELS.log_normalizer_vjp
gaussian_log_normalizer = _KERNELS.gaussian_log_normalizer
gaussian_log_normalizer_vjp = _KERNELS.gaussian_log_normalizer_vjp
gaussian_score_moments = _KERNELS.gaussian_score_moments
nearest_centroids = _KERNELS.nearest_centroids
component_sums = _KERNELS.component_sums
component_scatter = _KERNELS.component_scatter
sample_residuals = _KERNELS.sample_residuals
log_features = _KERNELS.log_features
log_features_vjp = _KERNELS.log_features_vjp
trigonometric_features = _KERNELS.trigonometric_features
hadamard_transform = _KERNELS.hadamard_transform
sparse_factor_product = _KERNELS.sparse_factor_product
sparse_factor_product_vjp = _KERNELS.sparse_factor_product_vjp
factor_values = _KERNELS.factor_values
factor_values_vjp = _KERNELS.factor_values_vjp
csr_product = _KERNELS.csr_product
csr_product_vjp = _KERNELS.csr_product_vjp
csr_transpose = _KERNELS.csr_transpose
embedding_step = _KERNELS.embedding_step
logcumsumexp = _KERNELS.logcumsumexp
logcumsumexp_vjp = _KERNELS.logcumsumexp_vjp
signed_logcumsumexp = _KERNELS.signed_logcumsumexp
signed_logcumsumexp_vjp = _KERNELS.signed_logcumsumexp_vjp
log_linear_recurrence = _KERNELS.log_linear_recurrence
log_linear_recurrence_vjp = _KERNELS.log_linear_recurrence_vjp
linear_attention = _KERNELS.linear_attention
linear_attention_vjp = _KERNELS.linear_attention_vjp
log_linear_attention = _KERNELS.log_linear_attention
log_linear_attention_vjp = _KERNELS.log_linear_attention_vjp
attention_step = _KERNELS.attention_step
