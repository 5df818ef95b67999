"""Every primitive of `subquad._dispatch.Backend` in array-API code."""

from __future__ import annotations

from subquad._reference.attention import (
    linear_attention,
    linear_attention_vjp,
    log_linear_attention,
    log_linear_attention_vjp,
)
from subquad._reference.embedding import embedding_gradient, embedding_step
from subquad._reference.factors import (
    csr_product,
    csr_product_vjp,
    csr_transpose,
    factor_values,
    factor_values_vjp,
    sparse_factor_product,
    sparse_factor_product_vjp,
)
from subquad._reference.features import (
    gradient_of_rows,
    hadamard_transform,
    log_features,
    log_features_vjp,
    trigonometric_features,
)
from subquad._reference.normalizers import (
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
from subquad._reference.scans import (
    log_linear_recurrence,
    log_linear_recurrence_jvp,
    log_linear_recurrence_vjp,
    logcumsumexp,
    logcumsumexp_jvp,
    logcumsumexp_vjp,
    signed_logcumsumexp,
    signed_logcumsumexp_jvp,
    signed_logcumsumexp_vjp,
)

__all__ = [
    "component_scatter",
    "component_sums",
    "csr_product",
    "csr_product_vjp",
    "csr_transpose",
    "embedding_gradient",
    "embedding_step",
    "factor_values",
    "factor_values_vjp",
    "gaussian_log_normalizer",
    "gaussian_log_normalizer_vjp",
    "gaussian_score_moments",
    "gradient_of_rows",
    "hadamard_transform",
    "linear_attention",
    "linear_attention_vjp",
    "log_features",
    "log_features_vjp",
    "log_linear_attention",
    "log_linear_attention_vjp",
    "log_linear_recurrence",
    "log_linear_recurrence_jvp",
    "log_linear_recurrence_vjp",
    "log_normalizer",
    "log_normalizer_vjp",
    "logcumsumexp",
    "logcumsumexp_jvp",
    "logcumsumexp_vjp",
    "nearest_centroids",
    "sample_residuals",
    "signed_logcumsumexp",
    "signed_logcumsumexp_jvp",
    "signed_logcumsumexp_vjp",
    "sparse_factor_product",
    "sparse_factor_product_vjp",
    "trigonometric_features",
]
