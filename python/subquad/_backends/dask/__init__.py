"""The primitives for Dask arrays: graphs of blocks, joined by merges.

Nothing is computed here but by `fit`. Every task runs the backend of its blocks on one
thread: Dask decides how many tasks run at a time.
"""

from __future__ import annotations

from subquad._backends.dask.attention import (
    linear_attention,
    linear_attention_vjp,
    log_linear_attention,
    log_linear_attention_vjp,
)
from subquad._backends.dask.embedding import embedding_step
from subquad._backends.dask.factors import (
    csr_product,
    csr_product_vjp,
    csr_transpose,
    factor_values,
    factor_values_vjp,
    sparse_factor_product,
    sparse_factor_product_vjp,
)
from subquad._backends.dask.features import (
    hadamard_transform,
    log_features,
    log_features_vjp,
    trigonometric_features,
)
from subquad._backends.dask.normalizers import (
    component_scatter,
    component_sums,
    fit_statistics,
    gaussian_log_normalizer,
    gaussian_log_normalizer_vjp,
    gaussian_score_moments,
    log_normalizer,
    log_normalizer_vjp,
    map_rows,
    nearest_centroids,
    require_finite,
    sample_residuals,
    take_rows,
)
from subquad._backends.dask.scans import (
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
    "fit_statistics",
    "gaussian_log_normalizer",
    "gaussian_log_normalizer_vjp",
    "gaussian_score_moments",
    "hadamard_transform",
    "has_attention_step",
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
    "map_rows",
    "nearest_centroids",
    "require_finite",
    "sample_residuals",
    "signed_logcumsumexp",
    "signed_logcumsumexp_vjp",
    "sparse_factor_product",
    "sparse_factor_product_vjp",
    "take_rows",
    "trigonometric_features",
]

# A token at a time changes arrays in place: here its state is one of a sequence of one.
has_attention_step = False
