"""The primitives of the normalizers on compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from subquad._backends.compiled.memory import Memory, _core
from subquad._dispatch import Array, Own
from subquad._reference._common import batch_shape


class NormalizerKernels(Memory):
    """The primitives of the normalizers."""

    def log_normalizer(
        self, x: Array, y: Array, log_weights: Array | None, excluded: Array | None
    ) -> Array:
        *x_batch, n, d = x.shape
        *y_batch, m, _ = y.shape
        if x_batch or y_batch or (log_weights is not None and log_weights.ndim > 1):
            batch = _batch(x_batch, y_batch, log_weights)
            size = math.prod(batch)
        else:
            batch, size = (), 1
        itemsize = x.dtype.itemsize
        out = self.empty((*batch, n), x.dtype if itemsize > 2 else self.xp.float32)
        _core.log_normalizer(
            self.ready(x),
            self.ready(y),
            None if log_weights is None else self.ready(log_weights),
            None if excluded is None else self.ready(excluded),
            out,
            self.scratch(
                _core.log_normalizer_workspace(size, n, m, d, itemsize, self.place)
            ),
            self.stream,
        )
        return out

    def log_normalizer_vjp(
        self,
        grad: Array,
        x: Array,
        y: Array,
        log_weights: Array | None,
        excluded: Array | None,
        log_z: Array,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Array | None, Array | None, Array | None]:
        (n, d), m = x.shape[-2:], y.shape[-2]
        batch = _batch(x.shape[:-2], y.shape[:-2], log_weights)
        gx, gy, gw = self._gradients(
            (*needs[:2], needs[2] and log_weights is not None),
            batch,
            ((n, d), (m, d), (m,)),
            x.dtype if x.dtype.itemsize > 2 else self.xp.float32,
        )
        _core.log_normalizer_vjp(
            self.ready(grad),
            self.ready(x),
            self.ready(y),
            self.optional(log_weights),
            self.optional(excluded),
            self.ready(log_z),
            gx,
            gy,
            gw,
            self.scratch(
                _core.log_normalizer_vjp_workspace(
                    math.prod(batch), n, m, d, x.dtype.itemsize, self.place
                )
            ),
            self.stream,
        )
        gx, gy, gw = self._summed((gx, gy, gw), (x, y, log_weights))
        return gx, gy, gw

    def gaussian_log_normalizer(
        self,
        x: Array,
        log_counts: Array,
        means: Array,
        factors: Array,
        diagonal: Array | None,
        own: Own | None,
    ) -> Array:
        n, d = x.shape[-2:]
        k, r = means.shape[-2], factors.shape[-1]
        batch = _mixture_batch(x, log_counts, means, factors, diagonal)
        out = self.empty((*batch, n), x.dtype)
        component, log_weight, include = (None, None, False) if own is None else own
        _core.gaussian_log_normalizer(
            self.ready(x),
            self.ready(log_counts),
            self.ready(means),
            self.ready(factors),
            self.optional(diagonal),
            self.optional(component),
            self.optional(log_weight),
            include,
            out,
            self.scratch(
                _core.gaussian_log_normalizer_workspace(
                    math.prod(batch), n, k, d, r, x.dtype.itemsize, self.place
                )
            ),
            self.stream,
        )
        return out

    def gaussian_log_normalizer_vjp(
        self,
        grad: Array,
        x: Array,
        log_counts: Array,
        means: Array,
        factors: Array,
        diagonal: Array | None,
        log_z: Array,
        needs: tuple[bool, bool, bool, bool, bool],
    ) -> tuple[Array | None, Array | None, Array | None, Array | None, Array | None]:
        n, d = x.shape[-2:]
        k, r = means.shape[-2], factors.shape[-1]
        batch = _mixture_batch(x, log_counts, means, factors, diagonal)
        gx, gc, gm, gf, gd = self._gradients(
            (*needs[:4], needs[4] and diagonal is not None),
            batch,
            ((n, d), (k,), (k, d), (k, d, r), (k, d)),
            x.dtype,
        )
        _core.gaussian_log_normalizer_vjp(
            self.ready(grad),
            self.ready(x),
            self.ready(log_counts),
            self.ready(means),
            self.ready(factors),
            self.optional(diagonal),
            self.ready(log_z),
            gx,
            gc,
            gm,
            gf,
            gd,
            self.scratch(
                _core.gaussian_log_normalizer_vjp_workspace(
                    math.prod(batch), n, k, d, r, x.dtype.itemsize, self.place
                )
            ),
            self.stream,
        )
        gx, gc, gm, gf, gd = self._summed(
            (gx, gc, gm, gf, gd), (x, log_counts, means, factors, diagonal)
        )
        return gx, gc, gm, gf, gd

    def gaussian_score_moments(
        self, x: Array, means: Array, factors: Array, diagonal: Array | None
    ) -> tuple[Array, Array]:
        n, d = x.shape
        k, _, r = factors.shape
        mean = self.empty((n, k), x.dtype)
        variance = self.empty((n, k), x.dtype)
        size = _core.gaussian_score_moments_workspace(
            n, k, d, r, x.dtype.itemsize, self.place
        )
        _core.gaussian_score_moments(
            self.ready(x),
            self.ready(means),
            self.ready(factors),
            self.optional(diagonal),
            mean,
            variance,
            self.scratch(size),
            self.stream,
        )
        return mean, variance

    def nearest_centroids(
        self, x: Array, centroids: Array, offsets: Array
    ) -> tuple[Array, Array]:
        n, d = x.shape
        k = centroids.shape[0]
        labels = self.empty((n,), self.xp.int64)
        score = self.empty((n,), x.dtype)
        size = _core.nearest_centroids_workspace(n, k, d, x.dtype.itemsize, self.place)
        _core.nearest_centroids(
            self.ready(x),
            self.ready(centroids),
            self.ready(offsets),
            labels,
            score,
            self.scratch(size),
            self.stream,
        )
        return labels, score

    def component_sums(
        self, y: Array, labels: Array, weights: Array | None, k: int
    ) -> tuple[Array, Array]:
        n, d = y.shape
        counts = self.empty((k,), self.xp.float64)
        sums = self.empty((k, d), self.xp.float64)
        size = _core.component_sums_workspace(n, k, d, y.dtype.itemsize, self.place)
        _core.component_sums(
            self.ready(y),
            self.ready(labels),
            self.optional(weights),
            counts,
            sums,
            self.scratch(size),
            self.stream,
        )
        return counts, sums

    def component_scatter(
        self,
        y: Array,
        labels: Array,
        weights: Array | None,
        means: Array,
        diagonal: bool,
    ) -> tuple[Array, Array]:
        n, d = y.shape
        k = means.shape[0]
        scatter = self.empty((k, d) if diagonal else (k, d, d), self.xp.float64)
        radii = self.empty((k,), self.xp.float64)
        size = _core.component_scatter_workspace(
            n, k, d, y.dtype.itemsize, diagonal, self.place
        )
        _core.component_scatter(
            self.ready(y),
            self.ready(labels),
            self.optional(weights),
            self.ready(means),
            scatter,
            radii,
            self.scratch(size),
            self.stream,
        )
        return scatter, radii

    def sample_residuals(
        self,
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
        n, k = variance.shape
        log_factor = self.empty((n, k), x.dtype)
        log_error = self.empty((n, k), x.dtype)
        third = self.empty((n, k), x.dtype)
        largest = self.largest_component(offsets, deviations.shape[0])
        size = _core.sample_residuals_workspace(
            n, x.shape[1], max(largest, 0), x.dtype.itemsize, self.place
        )
        _core.sample_residuals(
            self.ready(x),
            self.ready(deviations),
            self.ready(weights),
            self.ready(offsets),
            self.ready(variance),
            self.ready(scale),
            self.optional(shift),
            self.optional(excluded),
            quadratic,
            log_factor,
            log_error,
            third,
            self.scratch(size),
            self.stream,
        )
        return log_factor, log_error, third


def _batch(
    x_batch: Sequence[int], y_batch: Sequence[int], log_weights: Array | None
) -> tuple[int, ...]:
    weights: tuple[int, ...] = ()
    if log_weights is not None:
        weights = tuple(log_weights.shape[:-1])
    return batch_shape(tuple(x_batch), tuple(y_batch), weights)


def _mixture_batch(
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
) -> tuple[int, ...]:
    return batch_shape(
        tuple(x.shape[:-2]),
        tuple(log_counts.shape[:-1]),
        tuple(means.shape[:-2]),
        tuple(factors.shape[:-3]),
        () if diagonal is None else tuple(diagonal.shape[:-2]),
    )
