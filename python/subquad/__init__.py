"""Sub-quadratic sums of exponentials, in the log domain, for any array library.

Arrays may be NumPy, torch, JAX, Dask or any other array-API arrays; what comes in comes
out.
"""

from subquad import attention, normalizers, scans, vjp
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
    "GaussianNormalizer",
    "LogAttentionState",
    "LogSumExpState",
    "__version__",
    "attention",
    "gaussian_log_normalizer",
    "get_isa",
    "get_num_threads",
    "linear_attention",
    "log_linear_attention",
    "log_linear_recurrence",
    "log_normalizer",
    "logcumsumexp",
    "normalizers",
    "num_threads",
    "scans",
    "set_isa",
    "set_num_threads",
    "show_config",
    "signed_logcumsumexp",
    "vjp",
]
