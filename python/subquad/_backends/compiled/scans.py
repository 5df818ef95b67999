"""The primitives of the scans on compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

from subquad._backends.compiled.memory import Memory, _core
from subquad._dispatch import Array


class ScanKernels(Memory):
    """The primitives of the scans."""

    def logcumsumexp(
        self,
        x: Array,
        log_sum: Array | None,
        remainder: Array | None,
        segments: Array | None,
        axis: int,
        reverse: bool,
        exclusive: bool,
        with_state: bool,
    ) -> tuple[Array, Array | None, Array | None]:
        lanes = _lanes(x, axis)
        out = self.empty(tuple(x.shape), x.dtype)
        final = self.empty(lanes, x.dtype) if with_state else None
        rest = self.empty(lanes, x.dtype) if with_state else None
        _core.logcumsumexp(
            self.ready(x),
            self.optional(log_sum),
            self.optional(remainder),
            self.optional(segments),
            axis,
            reverse,
            exclusive,
            out,
            final,
            rest,
            self._scan_scratch(_core.logcumsumexp_workspace, x, axis, lanes),
            self.stream,
        )
        return out, final, rest

    def logcumsumexp_vjp(
        self,
        x: Array,
        log_sum: Array | None,
        remainder: Array | None,
        segments: Array | None,
        axis: int,
        reverse: bool,
        exclusive: bool,
        grad: Array | None,
        grad_final: Array | None,
        needs: tuple[bool, bool],
    ) -> tuple[Array | None, Array | None]:
        lanes = _lanes(x, axis)
        gx = self.empty(tuple(x.shape), x.dtype) if needs[0] else None
        needed = needs[1] and log_sum is not None
        gs = self.empty(lanes, x.dtype) if needed else None
        _core.logcumsumexp_vjp(
            self.ready(x),
            self.optional(log_sum),
            self.optional(remainder),
            self.optional(segments),
            axis,
            reverse,
            exclusive,
            self.optional(grad),
            self.optional(grad_final),
            gx,
            gs,
            self._scan_scratch(_core.logcumsumexp_vjp_workspace, x, axis, lanes),
            self.stream,
        )
        return gx, gs

    def signed_logcumsumexp(
        self, x: Array, sign: Array, axis: int, reverse: bool, exclusive: bool
    ) -> tuple[Array, Array]:
        lanes = _lanes(x, axis)
        out = self.empty(tuple(x.shape), x.dtype)
        out_sign = self.empty(tuple(x.shape), x.dtype)
        _core.signed_logcumsumexp(
            self.ready(x),
            self.ready(sign),
            axis,
            reverse,
            exclusive,
            out,
            out_sign,
            self._scan_scratch(_core.signed_logcumsumexp_workspace, x, axis, lanes),
            self.stream,
        )
        return out, out_sign

    def signed_logcumsumexp_vjp(
        self,
        x: Array,
        sign: Array,
        axis: int,
        reverse: bool,
        exclusive: bool,
        grad: Array,
        needs: tuple[bool, bool],
    ) -> tuple[Array | None, Array | None]:
        lanes = _lanes(x, axis)
        gx, gs = (self.empty(tuple(x.shape), x.dtype) if n else None for n in needs)
        _core.signed_logcumsumexp_vjp(
            self.ready(x),
            self.ready(sign),
            axis,
            reverse,
            exclusive,
            self.ready(grad),
            gx,
            gs,
            self._scan_scratch(_core.signed_logcumsumexp_vjp_workspace, x, axis, lanes),
            self.stream,
        )
        return gx, gs

    def log_linear_recurrence(
        self,
        log_a: Array,
        log_b: Array,
        state: Array | None,
        segments: Array | None,
        axis: int,
        reverse: bool,
    ) -> Array:
        lanes = _lanes(log_a, axis)
        out = self.empty(tuple(log_a.shape), log_a.dtype)
        size = _core.log_linear_recurrence_workspace
        _core.log_linear_recurrence(
            self.ready(log_a),
            self.ready(log_b),
            self.optional(state),
            self.optional(segments),
            axis,
            reverse,
            out,
            self._scan_scratch(size, log_a, axis, lanes),
            self.stream,
        )
        return out

    def log_linear_recurrence_vjp(
        self,
        log_a: Array,
        log_b: Array,
        state: Array | None,
        segments: Array | None,
        axis: int,
        reverse: bool,
        grad: Array,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Array | None, Array | None, Array | None]:
        lanes = _lanes(log_a, axis)
        shape = tuple(log_a.shape)
        ga = self.empty(shape, log_a.dtype) if needs[0] else None
        gb = self.empty(shape, log_a.dtype) if needs[1] else None
        needed = needs[2] and state is not None
        gs = self.empty(lanes, log_a.dtype) if needed else None
        size = _core.log_linear_recurrence_vjp_workspace
        _core.log_linear_recurrence_vjp(
            self.ready(log_a),
            self.ready(log_b),
            self.optional(state),
            self.optional(segments),
            axis,
            reverse,
            self.ready(grad),
            ga,
            gb,
            gs,
            self._scan_scratch(size, log_a, axis, lanes),
            self.stream,
        )
        return ga, gb, gs

    def _scan_scratch(
        self, size: Callable[..., int], x: Array, axis: int, lanes: tuple[int, ...]
    ) -> Array:
        """Return the workspace of a scan, of the bytes that `size` tells."""
        count = size(math.prod(lanes), x.shape[axis], x.dtype.itemsize, self.place)
        return self.scratch(count)


def _lanes(x: Array, axis: int) -> tuple[int, ...]:
    shape = tuple(x.shape)
    return shape[:axis] + shape[axis + 1 :]
