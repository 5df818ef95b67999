"""torch tensors of the CPU and of CUDA: operators over the compiled kernels.

The operators carry autograd, vmap and shape rules, so that compilers and function
transforms take them as torch's own. A call with plain tensors and no gradient goes to
the kernels directly. Derivatives that are not the gradient alone, in forward mode or of
gradients, are made in torch's own operators where there is no kernel for them.
"""

from __future__ import annotations

from subquad._backends.torch.attention import (
    attention_step,
    has_attention_step,
    linear_attention,
    linear_attention_vjp,
    log_linear_attention,
    log_linear_attention_vjp,
)
from subquad._backends.torch.embedding import embedding_step
from subquad._backends.torch.factors import (
    csr_product,
    csr_product_vjp,
    csr_transpose,
    factor_values,
    factor_values_vjp,
    sparse_factor_product,
    sparse_factor_product_vjp,
)
from subquad._backends.torch.features import (
    hadamard_transform,
    log_features,
    log_features_vjp,
    trigonometric_features,
)
from subquad._backends.torch.memory import is_compiling, keeps_half, takes
from subquad._backends.torch.normalizers import (
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
from subquad._backends.torch.scans import (
    log_linear_recurrence,
    log_linear_recurrence_vjp,
    logcumsumexp,
    logcumsumexp_vjp,
    signed_logcumsumexp,
    signed_logcumsumexp_vjp,
)
from subquad._backends.torch.trees import register_states

__all__ = [
    "attention_step",
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
    "has_attention_step",
    "is_compiling",
    "keeps_half",
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
    "takes",
    "trigonometric_features",
]

register_states()
