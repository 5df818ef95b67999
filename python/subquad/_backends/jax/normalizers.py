"""The primitives of the normalizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from subquad._backends.jax.common import (
    Derivative,
    Kernel,
    Plan,
    apply,
    computed,
    differentiate,
    gradients,
    itemsize,
    join_batch,
    listed,
    matrix_batch,
    plain,
    spread,
)
from subquad._dispatch import Array, Own
from subquad._reference import normalizers as reference


def _plan_exact(x: Any, y: Any, log_weights: Any, excluded: Any) -> Plan:
    del excluded
    batch = matrix_batch((x, y, log_weights), cores=(2, 2, 1))
    (n, d), m = x.shape[-2:], y.shape[-2]
    return Plan(
        [plain((*batch, n), computed(x))], (math.prod(batch), n, m, d, itemsize(x))
    )


def _plan_exact_vjp(
    grad: Any,
    x: Any,
    y: Any,
    log_weights: Any,
    excluded: Any,
    log_z: Any,
    *,
    needs: Sequence[bool],
) -> Plan:
    del excluded
    batch = matrix_batch((grad, x, y, log_weights, log_z), cores=(1, 2, 2, 1, 1))
    (n, d), m = x.shape[-2:], y.shape[-2]
    return Plan(
        gradients(needs, (x, y, log_weights), (2, 2, 1), batch),
        (math.prod(batch), n, m, d, itemsize(x)),
    )


def _plan_gaussian(
    x: Any,
    log_counts: Any,
    means: Any,
    factors: Any,
    diagonal: Any,
    own_component: Any,
    own_log_weight: Any,
    *,
    include: bool,
) -> Plan:
    del own_component, own_log_weight
    inputs = (x, log_counts, means, factors, diagonal)
    batch = matrix_batch(inputs, cores=(2, 1, 2, 3, 2))
    (n, d), (k, r) = x.shape[-2:], (means.shape[-2], factors.shape[-1])
    return Plan(
        [plain((*batch, n), x.dtype)],
        (math.prod(batch), n, k, d, r, itemsize(x)),
        (int(include),),
    )


def _plan_gaussian_vjp(grad: Any, *arrays: Any, needs: Sequence[bool]) -> Plan:
    *inputs, log_z = arrays
    cores = (2, 1, 2, 3, 2)
    batch = matrix_batch((grad, *inputs, log_z), cores=(1, *cores, 1))
    x, _, means, factors, _ = inputs
    (n, d), (k, r) = x.shape[-2:], (means.shape[-2], factors.shape[-1])
    return Plan(
        gradients(needs, inputs, cores, batch),
        (math.prod(batch), n, k, d, r, itemsize(x)),
    )


def _plan_moments(x: Any, means: Any, factors: Any, diagonal: Any) -> Plan:
    del means, diagonal
    (n, d), (k, _, r) = x.shape, factors.shape
    return Plan([plain((n, k), x.dtype)] * 2, (n, k, d, r, itemsize(x)))


def _plan_nearest(x: Any, centroids: Any, offsets: Any) -> Plan:
    del offsets
    (n, d), k = x.shape, centroids.shape[0]
    return Plan([plain((n,), np.int64), plain((n,), x.dtype)], (n, k, d, itemsize(x)))


def _plan_sums(y: Any, labels: Any, weights: Any, *, k: int) -> Plan:
    del labels, weights
    n, d = y.shape
    return Plan(
        [plain((k,), np.float64), plain((k, d), np.float64)],
        (n, k, d, itemsize(y)),
    )


def _plan_scatter(
    y: Any, labels: Any, weights: Any, means: Any, *, diagonal: bool
) -> Plan:
    del labels, weights
    (n, d), k = y.shape, means.shape[0]
    return Plan(
        [
            plain((k, d) if diagonal else (k, d, d), np.float64),
            plain((k,), np.float64),
        ],
        (n, k, d, itemsize(y), diagonal),
    )


def _plan_residuals(
    x: Any,
    deviations: Any,
    weights: Any,
    offsets: Any,
    variance: Any,
    *rest: Any,
    quadratic: bool,
) -> Plan:
    del weights, offsets, rest
    # How many samples a component has is not known while JAX traces: at most all.
    n, d = x.shape
    return Plan(
        [plain(variance.shape, x.dtype)] * 3,
        (n, d, deviations.shape[0], itemsize(x)),
        (int(quadratic),),
    )


def _gaussian_by_reference(*arrays: Any, include: bool) -> Array:
    x, log_counts, means, factors, diagonal, component, log_weight = arrays
    own = None if component is None else (component, log_weight, include)
    return reference.gaussian_log_normalizer(
        x, log_counts, means, factors, diagonal, own
    )


_EXACT = Kernel(
    "log_normalizer",
    _plan_exact,
    listed(reference.log_normalizer),
    "fffi",
    lambda arrays: {3: arrays[1].shape[-2]},
)
_EXACT_VJP = Kernel(
    "log_normalizer_vjp",
    _plan_exact_vjp,
    listed(reference.log_normalizer_vjp),
    "ffffif",
    lambda arrays: {4: arrays[2].shape[-2]},
)
_GAUSSIAN = Kernel(
    "gaussian_log_normalizer",
    _plan_gaussian,
    listed(_gaussian_by_reference),
    "fffffif",
    lambda arrays: {5: arrays[2].shape[-2]},
)
_GAUSSIAN_VJP = Kernel(
    "gaussian_log_normalizer_vjp",
    _plan_gaussian_vjp,
    listed(reference.gaussian_log_normalizer_vjp),
    "fffffff",
)

_MOMENTS = Kernel(
    "gaussian_score_moments",
    _plan_moments,
    listed(reference.gaussian_score_moments),
    "ffff",
)
_NEAREST = Kernel(
    "nearest_centroids", _plan_nearest, listed(reference.nearest_centroids), "fff"
)
_SUMS = Kernel("component_sums", _plan_sums, listed(reference.component_sums), "fif")
_SCATTER = Kernel(
    "component_scatter",
    _plan_scatter,
    listed(reference.component_scatter),
    "fifd",
)
_RESIDUALS = Kernel(
    "sample_residuals",
    _plan_residuals,
    listed(reference.sample_residuals),
    "fffifffi",
    lambda arrays: {7: arrays[1].shape[0]},
)


def _derivative(
    reverse: Kernel, moves: tuple[int, ...], count: int, without: tuple[int, ...] = ()
) -> Derivative:
    """Return the derivative of a normalizer whose reverse takes `count` inputs."""

    def arguments(
        inputs: Sequence[Any], kept: Sequence[Any], grads: Sequence[Any]
    ) -> Sequence[Any]:
        return (*grads, *inputs[:count], *kept)

    def tangents(
        inputs: Sequence[Any],
        kept: Sequence[Any],
        tangents: Sequence[Any],
        **parameters: Any,
    ) -> list[Array]:
        del parameters
        needs = [tangent is not None for tangent in tangents]
        moved = [tangent for tangent in tangents if tangent is not None]

        def pullback(grad: Array) -> list[Array]:
            gradients = reverse.by_reference(
                *arguments(inputs, kept, [grad]), needs=needs
            )
            return [
                gradient.astype(tangent.dtype)
                for gradient, tangent in zip(gradients, moved, strict=True)
            ]

        return list(jax.linear_transpose(pullback, *kept)(moved))

    return Derivative(reverse, moves, (0,), (0,), arguments, tangents, without=without)


differentiate(_EXACT, _derivative(_EXACT_VJP, (0, 1, 2), 4))
differentiate(_GAUSSIAN, _derivative(_GAUSSIAN_VJP, (0, 1, 2, 3, 4), 5, without=(5, 6)))

join_batch(_EXACT, (2, 2, 1, None))
join_batch(_EXACT_VJP, (1, 2, 2, 1, None, 1), (1, 2, 3))
join_batch(_GAUSSIAN, (2, 1, 2, 3, 2, None, None))
join_batch(_GAUSSIAN_VJP, (1, 2, 1, 2, 3, 2, 1), (1, 2, 3, 4, 5), whole=(0, 1, 6))


# ------------------------------------------------------------- the backend's functions


def log_normalizer(
    x: Array, y: Array, log_weights: Array | None, excluded: Array | None
) -> Array:
    return apply(_EXACT, (x, y, log_weights, excluded))[0]


def log_normalizer_vjp(
    grad: Array,
    x: Array,
    y: Array,
    log_weights: Array | None,
    excluded: Array | None,
    log_z: Array,
    needs: tuple[bool, bool, bool],
) -> tuple[Array | None, Array | None, Array | None]:
    needs = (*needs[:2], needs[2] and log_weights is not None)
    arrays = (grad, x, y, log_weights, excluded, log_z)
    gx, gy, gw = spread(apply(_EXACT_VJP, arrays, needs=needs), needs)
    return gx, gy, gw


def gaussian_log_normalizer(
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
    own: Own | None,
) -> Array:
    component, log_weight, include = (None, None, False) if own is None else own
    arrays = (x, log_counts, means, factors, diagonal, component, log_weight)
    return apply(_GAUSSIAN, arrays, include=bool(include))[0]


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
    needs = (*needs[:4], needs[4] and diagonal is not None)
    arrays = (grad, x, log_counts, means, factors, diagonal, log_z)
    gx, gc, gm, gf, gd = spread(apply(_GAUSSIAN_VJP, arrays, needs=needs), needs)
    return gx, gc, gm, gf, gd


def gaussian_score_moments(
    x: Array, means: Array, factors: Array, diagonal: Array | None
) -> tuple[Array, Array]:
    mean, variance = apply(_MOMENTS, (x, means, factors, diagonal))
    return mean, variance


def nearest_centroids(
    x: Array, centroids: Array, offsets: Array
) -> tuple[Array, Array]:
    labels, score = apply(_NEAREST, (x, centroids, offsets))
    return labels, score


def component_sums(
    y: Array, labels: Array, weights: Array | None, k: int
) -> tuple[Array, Array]:
    counts, sums = apply(_SUMS, (y, labels, weights), k=k)
    return counts, sums


def component_scatter(
    y: Array, labels: Array, weights: Array | None, means: Array, diagonal: bool
) -> tuple[Array, Array]:
    arrays = (y, labels, weights, means)
    scatter, radii = apply(_SCATTER, arrays, diagonal=diagonal)
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
    log_factor, log_error, third = apply(_RESIDUALS, arrays, quadratic=quadratic)
    return log_factor, log_error, third
