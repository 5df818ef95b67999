"""
Compiled kernels: they fill arrays of the CPU and of CUDA, passed by DLPack.
"""

from __future__ import annotations

import typing

__all__: list[str] = [
    "attention_step",
    "attention_step_workspace",
    "build_config",
    "component_scatter",
    "component_scatter_workspace",
    "component_sums",
    "component_sums_workspace",
    "cuda_info",
    "cuda_prepare",
    "gaussian_log_normalizer",
    "gaussian_log_normalizer_vjp",
    "gaussian_log_normalizer_vjp_workspace",
    "gaussian_log_normalizer_workspace",
    "gaussian_score_moments",
    "gaussian_score_moments_workspace",
    "get_isa",
    "get_num_threads",
    "hadamard_transform",
    "hadamard_transform_workspace",
    "isa_levels",
    "linear_attention",
    "linear_attention_vjp",
    "linear_attention_vjp_workspace",
    "linear_attention_workspace",
    "log_features",
    "log_features_vjp",
    "log_features_vjp_workspace",
    "log_features_workspace",
    "log_linear_attention",
    "log_linear_attention_vjp",
    "log_linear_attention_vjp_workspace",
    "log_linear_attention_workspace",
    "log_linear_recurrence",
    "log_linear_recurrence_vjp",
    "log_linear_recurrence_vjp_workspace",
    "log_linear_recurrence_workspace",
    "log_normalizer",
    "log_normalizer_vjp",
    "log_normalizer_vjp_workspace",
    "log_normalizer_workspace",
    "logcumsumexp",
    "logcumsumexp_vjp",
    "logcumsumexp_vjp_workspace",
    "logcumsumexp_workspace",
    "measure_rate",
    "nearest_centroids",
    "nearest_centroids_workspace",
    "sample_residuals",
    "sample_residuals_workspace",
    "set_isa",
    "set_num_threads",
    "signed_logcumsumexp",
    "signed_logcumsumexp_vjp",
    "signed_logcumsumexp_vjp_workspace",
    "signed_logcumsumexp_workspace",
    "trigonometric_features",
    "vector_math",
]

def _dlpack_layout() -> dict[str, tuple[int, tuple[int, ...]]]: ...
def attention_step(
    log_k: typing.Any,
    v: typing.Any,
    log_q: typing.Any,
    log_decay: typing.Any,
    key_sums: typing.Any,
    value_sums: typing.Any,
    recent_keys: typing.Any,
    recent_values: typing.Any,
    recent_count: typing.Any,
    empty_is_nan: bool,
    y: typing.Any,
    log_z: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def attention_step_workspace(
    batch: typing.SupportsInt | typing.SupportsIndex,
    d_k: typing.SupportsInt | typing.SupportsIndex,
    d_v: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def build_config() -> dict[str, typing.Any]: ...
def component_scatter(
    y: typing.Any,
    labels: typing.Any,
    weights: typing.Any,
    means: typing.Any,
    scatter: typing.Any,
    radii: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def component_scatter_workspace(
    n: typing.SupportsInt | typing.SupportsIndex,
    k: typing.SupportsInt | typing.SupportsIndex,
    d: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    diagonal: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def component_sums(
    y: typing.Any,
    labels: typing.Any,
    weights: typing.Any,
    counts: typing.Any,
    sums: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def component_sums_workspace(
    n: typing.SupportsInt | typing.SupportsIndex,
    k: typing.SupportsInt | typing.SupportsIndex,
    d: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def cuda_info() -> dict[str, typing.Any]: ...
def cuda_prepare(device_id: typing.SupportsInt | typing.SupportsIndex) -> None: ...
def gaussian_log_normalizer(
    x: typing.Any,
    log_counts: typing.Any,
    means: typing.Any,
    factors: typing.Any,
    diagonal: typing.Any,
    own_component: typing.Any,
    own_log_weight: typing.Any,
    include_own: bool,
    out: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def gaussian_log_normalizer_vjp(
    grad: typing.Any,
    x: typing.Any,
    log_counts: typing.Any,
    means: typing.Any,
    factors: typing.Any,
    diagonal: typing.Any,
    log_z: typing.Any,
    grad_x: typing.Any,
    grad_log_counts: typing.Any,
    grad_means: typing.Any,
    grad_factors: typing.Any,
    grad_diagonal: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def gaussian_log_normalizer_vjp_workspace(
    batch: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    k: typing.SupportsInt | typing.SupportsIndex,
    d: typing.SupportsInt | typing.SupportsIndex,
    r: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def gaussian_log_normalizer_workspace(
    batch: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    k: typing.SupportsInt | typing.SupportsIndex,
    d: typing.SupportsInt | typing.SupportsIndex,
    r: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def gaussian_score_moments(
    x: typing.Any,
    means: typing.Any,
    factors: typing.Any,
    diagonal: typing.Any,
    mean: typing.Any,
    variance: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def gaussian_score_moments_workspace(
    n: typing.SupportsInt | typing.SupportsIndex,
    k: typing.SupportsInt | typing.SupportsIndex,
    d: typing.SupportsInt | typing.SupportsIndex,
    r: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def get_isa() -> str: ...
def get_num_threads() -> int: ...
def hadamard_transform(
    x: typing.Any,
    out: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def hadamard_transform_workspace(
    batch: typing.SupportsInt | typing.SupportsIndex,
    d: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def isa_levels() -> list[str]: ...
def linear_attention(
    log_k: typing.Any,
    v: typing.Any,
    log_q: typing.Any,
    log_decay: typing.Any,
    key_mask: typing.Any,
    segments: typing.Any,
    key_sums: typing.Any,
    value_sums: typing.Any,
    causal: bool,
    empty_is_nan: bool,
    y: typing.Any,
    log_z: typing.Any,
    final_key_sums: typing.Any,
    final_value_sums: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def linear_attention_vjp(
    log_k: typing.Any,
    v: typing.Any,
    log_q: typing.Any,
    log_decay: typing.Any,
    key_mask: typing.Any,
    segments: typing.Any,
    key_sums: typing.Any,
    value_sums: typing.Any,
    causal: bool,
    y: typing.Any,
    grad_y: typing.Any,
    grad_log_z: typing.Any,
    grad_final_key_sums: typing.Any,
    grad_final_value_sums: typing.Any,
    grad_log_k: typing.Any,
    grad_v: typing.Any,
    grad_log_q: typing.Any,
    grad_log_decay: typing.Any,
    grad_key_sums: typing.Any,
    grad_value_sums: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def linear_attention_vjp_workspace(
    batch: typing.SupportsInt | typing.SupportsIndex,
    n_q: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    d_k: typing.SupportsInt | typing.SupportsIndex,
    d_v: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    causal: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def linear_attention_workspace(
    batch: typing.SupportsInt | typing.SupportsIndex,
    n_q: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    d_k: typing.SupportsInt | typing.SupportsIndex,
    d_v: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    causal: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def log_features(
    x: typing.Any,
    projection: typing.Any,
    bias: typing.Any,
    diagonal: typing.Any,
    factor: typing.Any,
    shift: typing.Any,
    linear: typing.Any,
    antithetic: bool,
    exponentiate: bool,
    out: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def log_features_vjp(
    grad: typing.Any,
    x: typing.Any,
    projection: typing.Any,
    diagonal: typing.Any,
    factor: typing.Any,
    shift: typing.Any,
    linear: typing.Any,
    antithetic: bool,
    grad_x: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def log_features_vjp_workspace(
    batch: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    m: typing.SupportsInt | typing.SupportsIndex,
    d: typing.SupportsInt | typing.SupportsIndex,
    r: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def log_features_workspace(
    batch: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    m: typing.SupportsInt | typing.SupportsIndex,
    d: typing.SupportsInt | typing.SupportsIndex,
    r: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def log_linear_attention(
    log_k: typing.Any,
    log_v: typing.Any,
    sign_v: typing.Any,
    log_q: typing.Any,
    log_decay: typing.Any,
    key_mask: typing.Any,
    segments: typing.Any,
    log_numerator: typing.Any,
    sign_numerator: typing.Any,
    log_denominator: typing.Any,
    causal: bool,
    log_y: typing.Any,
    sign_y: typing.Any,
    log_z: typing.Any,
    final_log_numerator: typing.Any,
    final_sign_numerator: typing.Any,
    final_log_denominator: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def log_linear_attention_vjp(
    log_k: typing.Any,
    log_v: typing.Any,
    sign_v: typing.Any,
    log_q: typing.Any,
    log_decay: typing.Any,
    key_mask: typing.Any,
    segments: typing.Any,
    log_numerator: typing.Any,
    sign_numerator: typing.Any,
    log_denominator: typing.Any,
    causal: bool,
    grad_log_y: typing.Any,
    grad_log_z: typing.Any,
    grad_final_log_numerator: typing.Any,
    grad_final_log_denominator: typing.Any,
    grad_log_k: typing.Any,
    grad_log_v: typing.Any,
    grad_log_q: typing.Any,
    grad_log_decay: typing.Any,
    grad_log_numerator: typing.Any,
    grad_log_denominator: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def log_linear_attention_vjp_workspace(
    batch: typing.SupportsInt | typing.SupportsIndex,
    n_q: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    d_k: typing.SupportsInt | typing.SupportsIndex,
    d_v: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    causal: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def log_linear_attention_workspace(
    batch: typing.SupportsInt | typing.SupportsIndex,
    n_q: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    d_k: typing.SupportsInt | typing.SupportsIndex,
    d_v: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    causal: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def log_linear_recurrence(
    log_a: typing.Any,
    log_b: typing.Any,
    state: typing.Any,
    segments: typing.Any,
    axis: typing.SupportsInt | typing.SupportsIndex,
    reverse: bool,
    out: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def log_linear_recurrence_vjp(
    log_a: typing.Any,
    log_b: typing.Any,
    state: typing.Any,
    segments: typing.Any,
    axis: typing.SupportsInt | typing.SupportsIndex,
    reverse: bool,
    grad: typing.Any,
    grad_log_a: typing.Any,
    grad_log_b: typing.Any,
    grad_state: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def log_linear_recurrence_vjp_workspace(
    lanes: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def log_linear_recurrence_workspace(
    lanes: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def log_normalizer(
    x: typing.Any,
    y: typing.Any,
    log_weights: typing.Any,
    excluded: typing.Any,
    out: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def log_normalizer_vjp(
    grad: typing.Any,
    x: typing.Any,
    y: typing.Any,
    log_weights: typing.Any,
    excluded: typing.Any,
    log_z: typing.Any,
    grad_x: typing.Any,
    grad_y: typing.Any,
    grad_log_weights: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def log_normalizer_vjp_workspace(
    batch: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    m: typing.SupportsInt | typing.SupportsIndex,
    d: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def log_normalizer_workspace(
    batch: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    m: typing.SupportsInt | typing.SupportsIndex,
    d: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def logcumsumexp(
    x: typing.Any,
    log_sum: typing.Any,
    remainder: typing.Any,
    segments: typing.Any,
    axis: typing.SupportsInt | typing.SupportsIndex,
    reverse: bool,
    exclusive: bool,
    out: typing.Any,
    final_log_sum: typing.Any,
    final_remainder: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def logcumsumexp_vjp(
    x: typing.Any,
    log_sum: typing.Any,
    remainder: typing.Any,
    segments: typing.Any,
    axis: typing.SupportsInt | typing.SupportsIndex,
    reverse: bool,
    exclusive: bool,
    grad: typing.Any,
    grad_final: typing.Any,
    grad_x: typing.Any,
    grad_log_sum: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def logcumsumexp_vjp_workspace(
    lanes: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def logcumsumexp_workspace(
    lanes: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def measure_rate(
    name: str,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    depth: typing.SupportsInt | typing.SupportsIndex = 1,
    seconds: typing.SupportsFloat | typing.SupportsIndex = 0.1,
) -> float: ...
def nearest_centroids(
    x: typing.Any,
    centroids: typing.Any,
    offsets: typing.Any,
    labels: typing.Any,
    score: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def nearest_centroids_workspace(
    n: typing.SupportsInt | typing.SupportsIndex,
    k: typing.SupportsInt | typing.SupportsIndex,
    d: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def sample_residuals(
    x: typing.Any,
    deviations: typing.Any,
    weights: typing.Any,
    offsets: typing.Any,
    variance: typing.Any,
    scale: typing.Any,
    shift: typing.Any,
    excluded: typing.Any,
    quadratic: bool,
    log_factor: typing.Any,
    log_error: typing.Any,
    third: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def sample_residuals_workspace(
    n: typing.SupportsInt | typing.SupportsIndex,
    d: typing.SupportsInt | typing.SupportsIndex,
    largest: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def set_isa(level: str) -> None: ...
def set_num_threads(n_threads: typing.SupportsInt | typing.SupportsIndex) -> None: ...
def signed_logcumsumexp(
    x: typing.Any,
    sign: typing.Any,
    axis: typing.SupportsInt | typing.SupportsIndex,
    reverse: bool,
    exclusive: bool,
    out: typing.Any,
    out_sign: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def signed_logcumsumexp_vjp(
    x: typing.Any,
    sign: typing.Any,
    axis: typing.SupportsInt | typing.SupportsIndex,
    reverse: bool,
    exclusive: bool,
    grad: typing.Any,
    grad_x: typing.Any,
    grad_sign: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def signed_logcumsumexp_vjp_workspace(
    lanes: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def signed_logcumsumexp_workspace(
    lanes: typing.SupportsInt | typing.SupportsIndex,
    n: typing.SupportsInt | typing.SupportsIndex,
    itemsize: typing.SupportsInt | typing.SupportsIndex,
    device: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def trigonometric_features(
    x: typing.Any,
    projection: typing.Any,
    bias: typing.Any,
    diagonal: typing.Any,
    factor: typing.Any,
    shift: typing.Any,
    linear: typing.Any,
    out: typing.Any,
    workspace: typing.Any,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def vector_math(name: str, x: typing.Any, out: typing.Any) -> None: ...

_c_functions: typing.Any
