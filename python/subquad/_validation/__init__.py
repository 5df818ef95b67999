"""What every public function asks of its arguments.

Messages name the argument, what was expected and what came. Nothing here looks at
values, but for the range of an index that lies in memory anyway.
"""

from subquad._validation.attention import (
    AttentionArguments,
    check_empty,
    linear_attention_arguments,
    log_linear_attention_arguments,
)
from subquad._validation.common import (
    as_result_of,
    as_type_of,
    check_broadcast,
    check_flag,
    check_index,
    check_range,
    check_shape,
    common_floats,
    is_unknown,
)
from subquad._validation.factors import (
    CsrArguments,
    NetworkArguments,
    ProductArguments,
    cdil_row,
    check_count,
    check_residual,
    chord_row,
    csr_arguments,
    csr_transpose_arguments,
    network_arguments,
    offsets_of_pattern,
    product_arguments,
)
from subquad._validation.features import (
    FeatureArguments,
    feature_arguments,
    hadamard_transform_arguments,
)
from subquad._validation.normalizers import (
    check_self_term,
    gaussian_log_normalizer_arguments,
    log_normalizer_arguments,
)
from subquad._validation.scans import (
    RecurrenceArguments,
    ScanArguments,
    log_linear_recurrence_arguments,
    logcumsumexp_arguments,
    signed_logcumsumexp_arguments,
)

__all__ = [
    "AttentionArguments",
    "CsrArguments",
    "FeatureArguments",
    "NetworkArguments",
    "ProductArguments",
    "RecurrenceArguments",
    "ScanArguments",
    "as_result_of",
    "as_type_of",
    "cdil_row",
    "check_broadcast",
    "check_count",
    "check_empty",
    "check_flag",
    "check_index",
    "check_range",
    "check_residual",
    "check_self_term",
    "check_shape",
    "chord_row",
    "common_floats",
    "csr_arguments",
    "csr_transpose_arguments",
    "feature_arguments",
    "gaussian_log_normalizer_arguments",
    "hadamard_transform_arguments",
    "is_unknown",
    "linear_attention_arguments",
    "log_linear_attention_arguments",
    "log_linear_recurrence_arguments",
    "log_normalizer_arguments",
    "logcumsumexp_arguments",
    "network_arguments",
    "offsets_of_pattern",
    "product_arguments",
    "signed_logcumsumexp_arguments",
]
