"""Sub-quadratic sums of exponentials, in the log domain, for any array library.

Arrays may be NumPy, torch, JAX, Dask or any other array-API arrays; what comes in comes
out.
"""

from subquad import normalizers, vjp
from subquad._config import (
    get_isa,
    get_num_threads,
    num_threads,
    set_isa,
    set_num_threads,
    show_config,
)
from subquad._version import __version__
from subquad.normalizers import (
    GaussianNormalizer,
    gaussian_log_normalizer,
    log_normalizer,
)

__all__ = [
    "GaussianNormalizer",
    "__version__",
    "gaussian_log_normalizer",
    "get_isa",
    "get_num_threads",
    "log_normalizer",
    "normalizers",
    "num_threads",
    "set_isa",
    "set_num_threads",
    "show_config",
    "vjp",
]
