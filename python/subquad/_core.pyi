"""
Compiled kernels: they fill arrays of the CPU and of CUDA, passed by DLPack.
"""

from __future__ import annotations

import typing

__all__: list[str] = [
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
    "isa_levels",
    "log_normalizer",
    "log_normalizer_vjp",
    "log_normalizer_vjp_workspace",
    "log_normalizer_workspace",
    "measure_rate",
    "nearest_centroids",
    "nearest_centroids_workspace",
    "sample_residuals",
    "sample_residuals_workspace",
    "set_isa",
    "set_num_threads",
    "vector_math",
]

def _dlpack_layout() -> dict[str, tuple[int, tuple[int, ...]]]: ...
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
def isa_levels() -> list[str]: ...
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
def vector_math(name: str, x: typing.Any, out: typing.Any) -> None: ...

_c_functions: typing.Any
