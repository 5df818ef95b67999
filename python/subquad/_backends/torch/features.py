"""Random features for tensors of the CPU and of CUDA.

Derivatives in forward mode, of derivatives and of the trigonometric features are those
of the reference in torch's own operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from subquad._backends.torch.memory import (
    Optional,
    is_direct,
    kernels_for,
    needs_reference,
    wide,
)
from subquad._backends.torch.operators import define, mapped, saved
from subquad._dispatch import Array, FeatureGradients
from subquad._reference import features as reference
from subquad._reference._common import batch_shape, sum_to

# ------------------------------------------------------------------------- primitives


def log_features(
    x: Array,
    projection: Array,
    bias: Array,
    diagonal: Array | None,
    factor: Array | None,
    shift: Array | None,
    linear: Array | None,
    antithetic: bool,
    exponentiate: bool,
) -> Array:
    arrays = (x, projection, bias, diagonal, factor, shift, linear)
    if needs_reference():
        return reference.log_features(*arrays, antithetic, exponentiate)
    if is_direct(*arrays):
        return kernels_for(x).log_features(*arrays, antithetic, exponentiate)
    out = _log_features(*arrays, antithetic)
    return torch.exp(out) if exponentiate else out


def log_features_vjp(
    grad: Array,
    x: Array,
    projection: Array,
    bias: Array,
    diagonal: Array | None,
    factor: Array | None,
    shift: Array | None,
    linear: Array | None,
    antithetic: bool,
    needs: tuple[bool, bool, bool, bool, bool, bool, bool],
) -> FeatureGradients:
    gx = None
    if needs[0]:
        row = (grad, x, projection, diagonal, factor, shift, linear)
        if needs_reference():
            gx = reference.gradient_of_rows(*row, antithetic)
        elif is_direct(*row):
            gx = kernels_for(x).gradient_of_rows(*row, antithetic)
        else:
            gx = _gradient_of_rows(*row, antithetic)
        gx = sum_to(torch, gx, tuple(x.shape))
    parameters = (projection, bias, diagonal, factor, shift, linear)
    return gx, *reference.gradients_of_parameters(
        grad, x, *parameters, antithetic, needs[1:]
    )


def trigonometric_features(
    x: Array,
    projection: Array,
    bias: Array,
    diagonal: Array | None,
    factor: Array | None,
    shift: Array | None,
    linear: Array | None,
) -> Array:
    arrays = (x, projection, bias, diagonal, factor, shift, linear)
    if needs_reference():
        return reference.trigonometric_features(*arrays)
    if is_direct(*arrays):
        return kernels_for(x).trigonometric_features(*arrays)
    return _trigonometric_features(*arrays)


def hadamard_transform(x: Array) -> Array:
    if needs_reference():
        return reference.hadamard_transform(x)
    if is_direct(x):
        return kernels_for(x).hadamard_transform(x)
    return _hadamard_transform(x)


# -------------------------------------------------------------------------- operators

# The dimensions of each argument's matrices, after those of the batch.
_CORES = (2, 2, 1, 1, 2, 1, 1)
_GRADIENT_CORES = (2, 2, 2, 1, 2, 1, 1)


def _kernel(name: str) -> Callable[..., Any]:
    """Return what computes an operator."""

    def compute(*arguments: Any) -> Any:
        return getattr(kernels_for(arguments[0]), name)(*arguments)

    return compute


def _shape(*arguments: Any) -> torch.Tensor:
    *arrays, antithetic = arguments
    x, projection = arrays[:2]
    batch = batch_shape(
        *(
            tuple(array.shape[: array.ndim - core])
            for array, core in zip(arrays, _CORES, strict=True)
            if array is not None
        )
    )
    m = (2 if antithetic else 1) * projection.shape[-2]
    out: torch.Tensor = x.new_empty((*batch, x.shape[-2], m), dtype=wide(x.dtype))
    return out


def _backward(ctx: Any, grad: Optional) -> tuple[Any, ...]:
    (*arrays, antithetic), _ = saved(ctx)
    if grad is None:
        return (None,) * 8
    reverse: Callable[..., Any] = log_features_vjp
    # Gradients of 16-bit inputs are float32 here: autograd narrows them.
    return (*reverse(grad, *arrays, antithetic, ctx.needs_input_grad[:7]), None)


def _gradient_shape(*arguments: Any) -> torch.Tensor:
    grad, x = arguments[:2]
    gx: torch.Tensor = grad.new_empty((*grad.shape[:-2], *x.shape[-2:]))
    return gx


def _gradient_backward(ctx: Any, move: Optional) -> tuple[Any, ...]:
    (*arrays, antithetic), _ = saved(ctx)
    found = _reversed(reference.gradient_of_rows, arrays, (antithetic,), move)
    return (*found, None)


def _reversed(
    function: Callable[..., Any],
    arrays: Sequence[Optional],
    flags: Sequence[bool],
    grad: Optional,
) -> list[Optional]:
    """Return gradients of all arrays by the reverse of torch's own operators."""
    result: list[Optional] = [None] * len(arrays)
    if grad is None:
        return result
    places = [place for place, array in enumerate(arrays) if array is not None]

    def of_given(*given: torch.Tensor) -> Any:
        complete = list(arrays)
        for place, array in zip(places, given, strict=True):
            complete[place] = array
        return function(*complete, *flags)

    reverse: Any = torch.func.vjp(of_given, *(arrays[place] for place in places))[1]
    for place, array in zip(places, reverse(grad), strict=True):
        result[place] = array
    return result


def _gradient_rule(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the vmap rule of the gradient, which takes `grad` for every batch."""
    rule = mapped(call, _GRADIENT_CORES, None)

    def stretched(
        info: Any, in_dims: Any, grad: torch.Tensor, *others: Any
    ) -> tuple[Any, Any]:
        dim, *dims = in_dims
        if dim is None:
            dim, grad = 0, grad.expand(info.batch_size, *grad.shape)
        found: tuple[Any, Any] = rule(info, (dim, *dims), grad, *others)
        return found

    return stretched


def _trigonometric_shape(*arrays: Any) -> torch.Tensor:
    return _shape(*arrays, True)


def _trigonometric_backward(ctx: Any, grad: Optional) -> tuple[Any, ...]:
    arrays, _ = saved(ctx)
    return tuple(_reversed(reference.trigonometric_features, arrays, (), grad))


def _transform_backward(ctx: Any, grad: Optional) -> Optional:
    del ctx
    return None if grad is None else hadamard_transform(grad)


_ARRAYS = "Tensor? diagonal, Tensor? factor, Tensor? shift, Tensor? linear"

_log_features = define(
    f"log_features(Tensor x, Tensor projection, Tensor bias, {_ARRAYS}, "
    "bool antithetic) -> Tensor",
    lambda *arguments: kernels_for(arguments[0]).log_features(*arguments, False),
    _shape,
    _backward,
    lambda call: mapped(call, _CORES, None),
)
_gradient_of_rows = define(
    f"log_features_gradient_of_rows(Tensor grad, Tensor x, Tensor projection, "
    f"{_ARRAYS}, bool antithetic) -> Tensor",
    _kernel("gradient_of_rows"),
    _gradient_shape,
    _gradient_backward,
    _gradient_rule,
)
_trigonometric_features = define(
    f"trigonometric_features(Tensor x, Tensor projection, Tensor bias, {_ARRAYS}) "
    "-> Tensor",
    _kernel("trigonometric_features"),
    _trigonometric_shape,
    _trigonometric_backward,
    lambda call: mapped(call, _CORES, None),
)
_hadamard_transform = define(
    "hadamard_transform(Tensor x) -> Tensor",
    _kernel("hadamard_transform"),
    lambda x: x.new_empty(tuple(x.shape)),
    _transform_backward,
    lambda call: mapped(call, (1,), None),
)
