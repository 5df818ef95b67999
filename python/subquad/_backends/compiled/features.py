"""The primitives of random features on compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from subquad._backends.compiled.memory import Memory, _core
from subquad._dispatch import Array, FeatureGradients
from subquad._reference._common import batch_shape
from subquad._reference.features import gradients_of_parameters


class FeatureKernels(Memory):
    """The primitives of random features."""

    def log_features(
        self,
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
        out, scratch = self._features(arrays, antithetic)
        flags = (antithetic, exponentiate)
        self._call(_core.log_features, arrays, *flags, out, scratch)
        return out

    def trigonometric_features(
        self,
        x: Array,
        projection: Array,
        bias: Array,
        diagonal: Array | None,
        factor: Array | None,
        shift: Array | None,
        linear: Array | None,
    ) -> Array:
        arrays = (x, projection, bias, diagonal, factor, shift, linear)
        out, scratch = self._features(arrays, True)
        self._call(_core.trigonometric_features, arrays, out, scratch)
        return out

    def log_features_vjp(
        self,
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
            gx = self.gradient_of_rows(
                grad, x, projection, diagonal, factor, shift, linear, antithetic
            )
        (gx,) = self._summed((gx,), (x,))
        parameters = (projection, bias, diagonal, factor, shift, linear)
        return gx, *gradients_of_parameters(grad, x, *parameters, antithetic, needs[1:])

    def gradient_of_rows(
        self,
        grad: Array,
        x: Array,
        projection: Array,
        diagonal: Array | None,
        factor: Array | None,
        shift: Array | None,
        linear: Array | None,
        antithetic: bool,
    ) -> Array:
        """Return the gradient of x over all batches that the arrays broadcast to."""
        batch = tuple(grad.shape[:-2])
        gx = self.empty((*batch, *x.shape[-2:]), projection.dtype)
        n, m, d, r = _sizes(x, projection, factor)
        size = _core.log_features_vjp_workspace(
            math.prod(batch), n, m, d, r, x.dtype.itemsize, self.place
        )
        arrays = (grad, x, projection, diagonal, factor, shift, linear)
        self._call(_core.log_features_vjp, arrays, antithetic, gx, self.scratch(size))
        return gx

    def hadamard_transform(self, x: Array) -> Array:
        out = self.empty(x.shape, x.dtype)
        *batch, d = x.shape
        size = _core.hadamard_transform_workspace(
            math.prod(batch), d, x.dtype.itemsize, self.place
        )
        _core.hadamard_transform(self.ready(x), out, self.scratch(size), self.stream)
        return out

    def _call(
        self, function: Callable[..., None], arrays: Sequence[Array | None], *rest: Any
    ) -> None:
        function(*map(self.optional, arrays), *rest, self.stream)

    def _features(
        self, arrays: tuple[Array | None, ...], pairs: bool
    ) -> tuple[Array, Array]:
        """Allocate features, two for each row of the projection if pairs, and the
        workspace.
        """
        x, projection, _, _, factor, _, _ = arrays
        assert x is not None
        assert projection is not None
        cores = (2, 2, 1, 1, 2, 1, 1)
        batch = batch_shape(
            *(
                tuple(array.shape[: array.ndim - core])
                for array, core in zip(arrays, cores, strict=True)
                if array is not None
            )
        )
        n, m, d, r = _sizes(x, projection, factor)
        size = _core.log_features_workspace(
            math.prod(batch), n, m, d, r, x.dtype.itemsize, self.place
        )
        out = self.empty((*batch, n, 2 * m if pairs else m), projection.dtype)
        return out, self.scratch(size)


def _sizes(
    x: Array, projection: Array, factor: Array | None
) -> tuple[int, int, int, int]:
    """Return n, m, d and r."""
    (n, d), m = x.shape[-2:], projection.shape[-2]
    return n, m, d, 0 if factor is None else factor.shape[-2]
