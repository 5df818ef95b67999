"""JAX arrays: primitives of JAX, which XLA hands over to the compiled kernels.

Every primitive has two lowerings: on the CPU and on CUDA a call of a handler in
`subquad._jax`, elsewhere the reference. The derivative of a normalizer, of a scan, of
sparse factors and of attention is a primitive too, linear in the tangents: its
transpose is the compiled reverse, and where tangents are wanted themselves (forward
mode) it is the reference, but for those that are such a product again.
Derivatives of all else, and those of derivatives, are those of the reference.
"""

from __future__ import annotations

import jax

from subquad._backends import jax_targets
from subquad._backends.jax.attention import (
    linear_attention,
    linear_attention_vjp,
    log_linear_attention,
    log_linear_attention_vjp,
)
from subquad._backends.jax.embedding import embedding_step
from subquad._backends.jax.factors import (
    csr_product,
    csr_product_vjp,
    csr_transpose,
    factor_values,
    factor_values_vjp,
    sparse_factor_product,
    sparse_factor_product_vjp,
)
from subquad._backends.jax.features import (
    hadamard_transform,
    log_features,
    log_features_vjp,
    trigonometric_features,
)
from subquad._backends.jax.normalizers import (
    component_scatter,
    component_sums,
    gaussian_log_normalizer,
    gaussian_log_normalizer_vjp,
    gaussian_score_moments,
    log_normalizer,
    log_normalizer_vjp,
    nearest_centroids,
    sample_residuals,
)
from subquad._backends.jax.scans import (
    log_linear_recurrence,
    log_linear_recurrence_vjp,
    logcumsumexp,
    logcumsumexp_vjp,
    signed_logcumsumexp,
    signed_logcumsumexp_vjp,
)

__all__ = [
    "component_scatter",
    "component_sums",
    "csr_product",
    "csr_product_vjp",
    "csr_transpose",
    "embedding_step",
    "factor_values",
    "factor_values_vjp",
    "gaussian_log_normalizer",
    "gaussian_log_normalizer_vjp",
    "gaussian_score_moments",
    "hadamard_transform",
    "linear_attention",
    "linear_attention_vjp",
    "log_features",
    "log_features_vjp",
    "log_linear_attention",
    "log_linear_attention_vjp",
    "log_linear_recurrence",
    "log_linear_recurrence_vjp",
    "log_normalizer",
    "log_normalizer_vjp",
    "logcumsumexp",
    "logcumsumexp_vjp",
    "nearest_centroids",
    "sample_residuals",
    "signed_logcumsumexp",
    "signed_logcumsumexp_vjp",
    "sparse_factor_product",
    "sparse_factor_product_vjp",
    "trigonometric_features",
]

jax_targets.register(jax)
