"""The primitives of random features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax import numpy as jnp

from subquad._backends.jax.common import (
    Derivative,
    Kernel,
    Plan,
    apply,
    computed,
    differentiate,
    itemsize,
    join_batch,
    listed,
    matrix_batch,
    plain,
    push,
)
from subquad._dispatch import Array, FeatureGradients
from subquad._reference import features as reference
from subquad._reference._common import sum_to

_CORES = (2, 2, 1, 1, 2, 1, 1)
_GRADIENT_CORES = (2, 2, 2, 1, 2, 1, 1)


def _sizes(batch: Sequence[int], x: Any, projection: Any, factor: Any) -> Any:
    (n, d), m = x.shape[-2:], projection.shape[-2]
    r = 0 if factor is None else factor.shape[-2]
    return math.prod(batch), n, m, d, r, itemsize(x)


def _plan(*arrays: Any, antithetic: bool, exponentiate: bool) -> Plan:
    x, projection, _, _, factor, _, _ = arrays
    batch = matrix_batch(arrays, _CORES)
    m = (2 if antithetic else 1) * projection.shape[-2]
    return Plan(
        [plain((*batch, x.shape[-2], m), computed(x))],
        _sizes(batch, x, projection, factor),
        (int(antithetic), int(exponentiate)),
    )


def _plan_gradient(*arrays: Any, antithetic: bool) -> Plan:
    grad, x, projection, _, factor, _, _ = arrays
    batch = grad.shape[:-2]
    return Plan(
        [plain((*batch, *x.shape[-2:]), computed(x))],
        _sizes(batch, x, projection, factor),
        (int(antithetic),),
    )


def _plan_trigonometric(*arrays: Any) -> Plan:
    return Plan(*_plan(*arrays, antithetic=True, exponentiate=False)[:2])


def _plan_transform(x: Any) -> Plan:
    *batch, d = x.shape
    return Plan([plain(x.shape, x.dtype)], (math.prod(batch), d, itemsize(x)))


_FEATURES = Kernel("log_features", _plan, listed(reference.log_features), "fffffff")
_GRADIENT = Kernel(
    "log_features_vjp", _plan_gradient, listed(reference.gradient_of_rows), "fffffff"
)
_TRIGONOMETRIC = Kernel(
    "trigonometric_features",
    _plan_trigonometric,
    listed(reference.trigonometric_features),
    "fffffff",
    workspace="log_features",
)
_TRANSFORM = Kernel(
    "hadamard_transform", _plan_transform, listed(reference.hadamard_transform), "f"
)


# ------------------------------------------------------------------------- derivatives


def _reverse(
    arrays: Sequence[Any],
    *,
    needs: Sequence[bool],
    antithetic: bool,
    exponentiate: bool,
) -> list[Array]:
    """Return the gradients that are wanted."""
    grad, *inputs, out = arrays
    if exponentiate:
        grad = grad * out
    found = _gradients(grad, *inputs, antithetic=antithetic, needs=needs)
    return [gradient for gradient in found if gradient is not None]


def _with_gradient(
    inputs: Sequence[Any], kept: Sequence[Any], grads: Sequence[Any]
) -> Sequence[Any]:
    return (*grads, *inputs, *kept)


def _tangents(
    inputs: Sequence[Any],
    kept: Sequence[Any],
    tangents: Sequence[Any],
    **parameters: Any,
) -> list[Array]:
    del kept
    moved = [place for place, t in enumerate(tangents) if t is not None]
    found = push(
        lambda *arrays: _FEATURES.by_reference(*arrays, **parameters),
        inputs,
        moved,
        [tangents[place] for place in moved],
    )
    return found[1]


def _transform_tangents(
    inputs: Sequence[Any], kept: Sequence[Any], tangents: Sequence[Any]
) -> list[Array]:
    del inputs, kept
    return _TRANSFORM.by_reference(*tangents)


def _transform_reverse(arrays: Sequence[Any], *, needs: Sequence[bool]) -> list[Array]:
    del needs
    return apply(_TRANSFORM, arrays)


differentiate(
    _FEATURES,
    Derivative(
        _reverse,
        moves=tuple(range(7)),
        results=(0,),
        kept=(0,),
        arguments=_with_gradient,
        tangents=_tangents,
        parameters=("antithetic", "exponentiate"),
    ),
)
differentiate(
    _TRANSFORM,
    Derivative(
        _transform_reverse,
        moves=(0,),
        results=(0,),
        kept=(),
        arguments=lambda inputs, kept, grads: grads,
        tangents=_transform_tangents,
    ),
)

join_batch(_FEATURES, _CORES)
join_batch(_GRADIENT, _GRADIENT_CORES, whole=(0,))
join_batch(_TRIGONOMETRIC, _CORES)
join_batch(_TRANSFORM, (1,))


# ------------------------------------------------------------- the backend's functions


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
    return apply(_FEATURES, arrays, antithetic=antithetic, exponentiate=exponentiate)[0]


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
        arrays = (grad, x, projection, diagonal, factor, shift, linear)
        gx = sum_to(jnp, apply(_GRADIENT, arrays, antithetic=antithetic)[0], x.shape)
    parameters = (projection, bias, diagonal, factor, shift, linear)
    return gx, *reference.gradients_of_parameters(
        grad, x, *parameters, antithetic, needs[1:]
    )


_gradients: Any = log_features_vjp


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
    return apply(_TRIGONOMETRIC, arrays)[0]


def hadamard_transform(x: Array) -> Array:
    return apply(_TRANSFORM, (x,))[0]
