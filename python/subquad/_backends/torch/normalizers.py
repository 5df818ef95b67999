"""The primitives of the normalizers for tensors of the CPU and of CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from subquad._backends.torch.memory import (
    Optional,
    has_gradient,
    is_plain,
    is_transformed,
    kernels_for,
    needs_reference,
    wide,
    widened,
)
from subquad._backends.torch.operators import (
    OPERATORS,
    PLACES,
    backward_of,
    filled,
    gradient_shapes,
    mapped,
    mapped_vjp,
    only,
    register,
    registered,
    save_vjp,
    transformable,
)
from subquad._dispatch import Array, Own, library_of
from subquad._reference import normalizers as reference
from subquad._reference._common import batch_shape
from subquad._validation import check_range

# ------------------------------------------------------------------------- primitives


def log_normalizer(
    x: Array, y: Array, log_weights: Array | None, excluded: Array | None
) -> Array:
    if needs_reference():
        return reference.log_normalizer(*widened(x, y), log_weights, excluded)
    if is_plain(x, y, log_weights, excluded) and not has_gradient(x, y, log_weights):
        return _log_normalizer(x, y, log_weights, excluded)
    if is_transformed():
        return _transformable_log_normalizer(*widened(x, y), log_weights, excluded)
    return registered.log_normalizer.default(x, y, log_weights, excluded)


def log_normalizer_vjp(
    grad: Array,
    x: Array,
    y: Array,
    log_weights: Array | None,
    excluded: Array | None,
    log_z: Array,
    needs: tuple[bool, bool, bool],
) -> tuple[Array | None, Array | None, Array | None]:
    arrays = (grad, x, y, log_weights, excluded, log_z)
    if needs_reference():
        return _reference_log_normalizer_vjp(*arrays, needs)
    needs = (*needs[:2], needs[2] and log_weights is not None)
    if is_plain(*arrays) and not has_gradient(*arrays):
        gx, gy, gw = kernels_for(x).log_normalizer_vjp(*arrays, needs)
        return gx, gy, gw
    if is_transformed():
        found = _transformable_log_normalizer_vjp(
            grad, *widened(x, y), *arrays[3:], needs
        )
    else:
        found = registered.log_normalizer_vjp.default(*arrays, list(needs))
    gx, gy, gw = only(needs, found)
    return gx, gy, gw


def _reference_log_normalizer_vjp(
    grad: Array, x: Array, y: Array, *arguments: Any
) -> tuple[Array | None, Array | None, Array | None]:
    return reference.log_normalizer_vjp(grad, *widened(x, y), *arguments)


def gaussian_log_normalizer(
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
    own: Own | None,
) -> Array:
    arrays = (x, log_counts, means, factors, diagonal)
    if needs_reference():
        return reference.gaussian_log_normalizer(*arrays, own)
    extra = () if own is None else own[:2]
    if is_plain(*arrays, *extra) and not has_gradient(*arrays, *extra):
        return kernels_for(x).gaussian_log_normalizer(*arrays, own)
    if own is not None:
        return reference.gaussian_log_normalizer(*arrays, own)
    if is_transformed():
        return _transformable_gaussian(*arrays)
    return registered.gaussian_log_normalizer.default(*arrays)


def gaussian_log_normalizer_vjp(
    grad: Array,
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
    log_z: Array,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Array | None, Array | None, Array | None, Array | None, Array | None]:
    arrays = (grad, x, log_counts, means, factors, diagonal, log_z)
    if needs_reference():
        return reference.gaussian_log_normalizer_vjp(*arrays, needs)
    needs = (*needs[:4], needs[4] and diagonal is not None)
    if is_plain(*arrays) and not has_gradient(*arrays):
        gx, gc, gm, gf, gd = kernels_for(x).gaussian_log_normalizer_vjp(*arrays, needs)
        return gx, gc, gm, gf, gd
    if is_transformed():
        found = _transformable_gaussian_vjp(*arrays, needs)
    else:
        found = registered.gaussian_log_normalizer_vjp.default(*arrays, list(needs))
    gx, gc, gm, gf, gd = only(needs, found)
    return gx, gc, gm, gf, gd


def gaussian_score_moments(
    x: Array, means: Array, factors: Array, diagonal: Array | None
) -> tuple[Array, Array]:
    arrays = (x, means, factors, diagonal)
    if needs_reference() or not is_plain(*arrays) or has_gradient(*arrays):
        return reference.gaussian_score_moments(*arrays)
    mean, variance = kernels_for(x).gaussian_score_moments(*arrays)
    return mean, variance


def nearest_centroids(
    x: Array, centroids: Array, offsets: Array
) -> tuple[Array, Array]:
    backend: Any = kernels_for(x) if is_plain(x, centroids, offsets) else reference
    labels, score = backend.nearest_centroids(x, centroids, offsets)
    return labels, score


def component_sums(
    y: Array, labels: Array, weights: Array | None, k: int
) -> tuple[Array, Array]:
    backend: Any = kernels_for(y) if is_plain(y, labels, weights) else reference
    counts, sums = backend.component_sums(y, labels, weights, k)
    return counts, sums


def component_scatter(
    y: Array, labels: Array, weights: Array | None, means: Array, diagonal: bool
) -> tuple[Array, Array]:
    backend: Any = kernels_for(y) if is_plain(y, labels, weights, means) else reference
    scatter, radii = backend.component_scatter(y, labels, weights, means, diagonal)
    return scatter, radii


def sample_residuals(
    x: Array,
    deviations: Array,
    weights: Array,
    offsets: Array,
    variance: Array,
    scale: Array,
    shift: Array | None,
    excluded: Array | None,
    quadratic: bool,
) -> tuple[Array, Array, Array]:
    arrays = (x, deviations, weights, offsets, variance, scale, shift, excluded)
    if needs_reference() or not is_plain(*arrays) or has_gradient(*arrays):
        return reference.sample_residuals(*arrays, quadratic)
    log_factor, log_error, third = kernels_for(x).sample_residuals(*arrays, quadratic)
    return log_factor, log_error, third


# -------------------------------------------------------------------------- operators

OPERATORS.define(
    "log_normalizer(Tensor x, Tensor y, Tensor? log_weights, Tensor? excluded) "
    "-> Tensor"
)
OPERATORS.define(
    "log_normalizer_vjp(Tensor grad, Tensor x, Tensor y, Tensor? log_weights, "
    "Tensor? excluded, Tensor log_z, bool[] needs) -> (Tensor, Tensor, Tensor)"
)
OPERATORS.define(
    "gaussian_log_normalizer(Tensor x, Tensor log_counts, Tensor means, "
    "Tensor factors, Tensor? diagonal) -> Tensor"
)
OPERATORS.define(
    "gaussian_log_normalizer_vjp(Tensor grad, Tensor x, Tensor log_counts, "
    "Tensor means, Tensor factors, Tensor? diagonal, Tensor log_z, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _log_normalizer(
    x: torch.Tensor, y: torch.Tensor, log_weights: Optional, excluded: Optional
) -> Any:
    if excluded is not None and excluded.is_cpu:
        # Here values are real, whatever transforms and tracers stood above.
        check_range("self_index", excluded, y.shape[-2], library_of(excluded))
    return kernels_for(x).log_normalizer(x, y, log_weights, excluded)


def _log_normalizer_vjp(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *arrays, needs = arguments
    kernels = kernels_for(arrays[1])
    return filled(arrays[1], kernels.log_normalizer_vjp(*arrays, needs))


def _gaussian_log_normalizer(*arrays: Any) -> Any:
    return kernels_for(arrays[0]).gaussian_log_normalizer(*arrays, None)


def _gaussian_log_normalizer_vjp(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *arrays, needs = arguments
    kernels = kernels_for(arrays[1])
    return filled(arrays[1], kernels.gaussian_log_normalizer_vjp(*arrays, needs))


for _place in PLACES:
    OPERATORS.impl("log_normalizer", _log_normalizer, _place)
    OPERATORS.impl("log_normalizer_vjp", _log_normalizer_vjp, _place)
    OPERATORS.impl("gaussian_log_normalizer", _gaussian_log_normalizer, _place)
    OPERATORS.impl("gaussian_log_normalizer_vjp", _gaussian_log_normalizer_vjp, _place)


# ----------------------------------------------------------------------- shapes alone


def _result(x: torch.Tensor, *shapes: Sequence[int]) -> torch.Tensor:
    batch = batch_shape(tuple(x.shape[:-2]), *(tuple(shape) for shape in shapes))
    return x.new_empty((*batch, x.shape[-2]), dtype=wide(x.dtype))


def _log_normalizer_shape(
    x: torch.Tensor, y: torch.Tensor, log_weights: Optional, excluded: Optional
) -> torch.Tensor:
    del excluded
    weights = () if log_weights is None else log_weights.shape[:-1]
    return _result(x, y.shape[:-2], weights)


def _gaussian_shape(
    x: torch.Tensor,
    log_counts: torch.Tensor,
    means: torch.Tensor,
    factors: torch.Tensor,
    diagonal: Optional,
) -> torch.Tensor:
    last = () if diagonal is None else diagonal.shape[:-2]
    return _result(x, log_counts.shape[:-1], means.shape[:-2], factors.shape[:-3], last)


def _log_normalizer_vjp_shape(*arguments: Any) -> tuple[torch.Tensor, ...]:
    _, x, y, log_weights, _, _, needs = arguments
    return gradient_shapes((x, y, log_weights), needs)


def _gaussian_vjp_shape(*arguments: Any) -> tuple[torch.Tensor, ...]:
    _, *inputs, _, needs = arguments
    return gradient_shapes(inputs, needs)


# ---------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _log_normalizer_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, y, log_weights, excluded, log_z = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    # Gradients of 16-bit inputs are float32 here: autograd narrows them.
    return (
        *log_normalizer_vjp(grad, x, y, log_weights, excluded, log_z, needs),
        None,
    )


def _gaussian_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    *inputs, log_z = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    x, log_counts, means, factors, diagonal = inputs
    return gaussian_log_normalizer_vjp(
        grad, x, log_counts, means, factors, diagonal, log_z, needs
    )


# -------------------------------------------------------------------------------- vmap


# The cores are the dimensions of each argument's matrices, after those of the batch.
_EXACT = (2, 2, 1)
_EXACT_VJP = (1, 2, 2, 1, 1, 1)
_GAUSSIAN = (2, 1, 2, 3, 2)
_GAUSSIAN_VJP = (1, 2, 1, 2, 3, 2, 1)
_INDEX = 3
_INDEX_VJP = 4


_log_normalizer_vjp_backward = backward_of(_reference_log_normalizer_vjp, _INDEX_VJP)
_gaussian_vjp_backward = backward_of(reference.gaussian_log_normalizer_vjp, None)

register(
    "log_normalizer",
    _log_normalizer_shape,
    _save,
    _log_normalizer_backward,
    mapped(registered.log_normalizer.default, _EXACT, _INDEX),
)
register(
    "log_normalizer_vjp",
    _log_normalizer_vjp_shape,
    save_vjp,
    _log_normalizer_vjp_backward,
    mapped_vjp(
        registered.log_normalizer_vjp.default, _EXACT_VJP, range(1, 4), _INDEX_VJP
    ),
)
register(
    "gaussian_log_normalizer",
    _gaussian_shape,
    _save,
    _gaussian_backward,
    mapped(registered.gaussian_log_normalizer.default, _GAUSSIAN, None),
)
register(
    "gaussian_log_normalizer_vjp",
    _gaussian_vjp_shape,
    save_vjp,
    _gaussian_vjp_backward,
    mapped_vjp(
        registered.gaussian_log_normalizer_vjp.default,
        _GAUSSIAN_VJP,
        range(1, 6),
        None,
    ),
)


# ------------------------------------------ the same for torch.func's transforms


def _complete_log_normalizer_vjp(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return filled(arguments[1], log_normalizer_vjp(*arguments))


def _complete_gaussian(*arrays: Any) -> Any:
    x, log_counts, means, factors, diagonal = arrays
    return gaussian_log_normalizer(x, log_counts, means, factors, diagonal, None)


def _complete_gaussian_vjp(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return filled(arguments[1], gaussian_log_normalizer_vjp(*arguments))


_transformable_log_normalizer = transformable(
    registered.log_normalizer.default,
    _save,
    _log_normalizer_backward,
    mapped(log_normalizer, _EXACT, _INDEX),
)
_transformable_log_normalizer_vjp = transformable(
    registered.log_normalizer_vjp.default,
    save_vjp,
    _log_normalizer_vjp_backward,
    mapped_vjp(_complete_log_normalizer_vjp, _EXACT_VJP, range(1, 4), _INDEX_VJP),
)
_transformable_gaussian = transformable(
    registered.gaussian_log_normalizer.default,
    _save,
    _gaussian_backward,
    mapped(_complete_gaussian, _GAUSSIAN, None),
)
_transformable_gaussian_vjp = transformable(
    registered.gaussian_log_normalizer_vjp.default,
    save_vjp,
    _gaussian_vjp_backward,
    mapped_vjp(_complete_gaussian_vjp, _GAUSSIAN_VJP, range(1, 6), None),
)
