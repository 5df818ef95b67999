"""Sub-quadratic sums of exponentials, in the log domain, for any array library.

Arrays may be NumPy, torch, JAX, Dask or any other array-API arrays; what comes in comes
out.
"""

from subquad import attention, embedding, factors, features, normalizers, scans, vjp
from subquad._config import (
    get_isa,
    get_num_threads,
    num_threads,
    set_isa,
    set_num_threads,
    show_config,
)
from subquad._version import __version__
from subquad.attention import (
    AttentionState,
    LogAttentionState,
    linear_attention,
    log_linear_attention,
)
from subquad.embedding import (
    EDRep,
    Vocabulary,
    cooccurrence,
    random_walk,
    temporal_walk,
)
from subquad.factors import (
    FactorWeights,
    OperatorChain,
    cdil_offsets,
    chord_offsets,
    csr_product,
    csr_transpose,
    factor_values,
    paramixer,
    sparse_factor_product,
)
from subquad.features import (
    InaccurateFeaturesWarning,
    KernelRidge,
    NadarayaWatson,
    RandomFeatures,
    hadamard_transform,
    log_features,
    random_feature_attention,
    trigonometric_features,
)
from subquad.normalizers import (
    GaussianNormalizer,
    gaussian_log_normalizer,
    log_normalizer,
)
from subquad.scans import (
    LogSumExpState,
    log_linear_recurrence,
    logcumsumexp,
    signed_logcumsumexp,
)

__all__ = [
    "AttentionState",
    "EDRep",
    "FactorWeights",
    "GaussianNormalizer",
    "InaccurateFeaturesWarning",
    "KernelRidge",
    "LogAttentionState",
    "LogSumExpState",
    "NadarayaWatson",
    "OperatorChain",
    "RandomFeatures",
    "Vocabulary",
    "__version__",
    "attention",
    "cdil_offsets",
    "chord_offsets",
    "cooccurrence",
    "csr_product",
    "csr_transpose",
    "embedding",
    "factor_values",
    "factors",
    "features",
    "gaussian_log_normalizer",
    "get_isa",
    "get_num_threads",
    "hadamard_transform",
    "linear_attention",
    "log_features",
    "log_linear_attention",
    "log_linear_recurrence",
    "log_normalizer",
    "logcumsumexp",
    "normalizers",
    "num_threads",
    "paramixer",
    "random_feature_attention",
    "random_walk",
    "scans",
    "set_isa",
    "set_num_threads",
    "show_config",
    "signed_logcumsumexp",
    "sparse_factor_product",
    "temporal_walk",
    "trigonometric_features",
    "vjp",
]
