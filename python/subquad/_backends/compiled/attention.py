"""The primitives of attention on compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from subquad._backends.compiled.memory import Memory, _core
from subquad._dispatch import Array
from subquad._reference._common import batch_shape


class AttentionKernels(Memory):
    """The primitives of attention."""

    def linear_attention(
        self,
        log_k: Array,
        v: Array,
        log_q: Array | None,
        log_decay: Array | None,
        key_mask: Array | None,
        segments: Array | None,
        key_sums: Array | None,
        value_sums: Array | None,
        causal: bool,
        empty_is_nan: bool,
        with_log_z: bool,
        with_state: bool,
    ) -> tuple[Array | None, Array | None, Array | None, Array | None]:
        batch = _batch(
            (log_k, 2),
            (v, 2),
            (log_q, 2),
            (log_decay, 2),
            (key_mask, 1),
            (key_sums, 2),
            (value_sums, 3),
        )
        d_k, d_v, dtype = log_k.shape[-1], v.shape[-1], log_k.dtype
        n_q = 0 if log_q is None else log_q.shape[-2]
        is_asked = log_q is not None
        y = self.empty((*batch, n_q, d_v), dtype) if is_asked else None
        log_z = self.empty((*batch, n_q), dtype) if is_asked and with_log_z else None
        keys = self.empty((*batch, 5, d_k), dtype) if with_state else None
        values = self.empty((*batch, 2, d_k, d_v), dtype) if with_state else None
        _core.linear_attention(
            self.ready(log_k),
            self.ready(v),
            self.optional(log_q),
            self.optional(log_decay),
            self._bytes(key_mask),
            self.optional(segments),
            self.optional(key_sums),
            self.optional(value_sums),
            causal,
            empty_is_nan,
            y,
            log_z,
            keys,
            values,
            self._attention_scratch(
                _core.linear_attention_workspace, batch, n_q, log_k, v, causal
            ),
            self.stream,
        )
        return y, log_z, keys, values

    def linear_attention_vjp(
        self,
        log_k: Array,
        v: Array,
        log_q: Array | None,
        log_decay: Array | None,
        key_mask: Array | None,
        segments: Array | None,
        key_sums: Array | None,
        value_sums: Array | None,
        causal: bool,
        y: Array | None,
        grad_y: Array | None,
        grad_log_z: Array | None,
        grad_key_sums: Array | None,
        grad_value_sums: Array | None,
        needs: tuple[bool, bool, bool, bool, bool, bool],
    ) -> tuple[Array | None, ...]:
        batch = _batch(
            (log_k, 2),
            (v, 2),
            (log_q, 2),
            (log_decay, 2),
            (key_mask, 1),
            (key_sums, 2),
            (value_sums, 3),
            (grad_y, 2),
            (grad_log_z, 1),
            (grad_key_sums, 2),
            (grad_value_sums, 3),
        )
        (n, d_k), d_v = log_k.shape[-2:], v.shape[-1]
        n_q = 0 if log_q is None else log_q.shape[-2]
        inputs = (log_k, v, log_q, log_decay, key_sums, value_sums)
        gk, gv, gq, ga, g_keys, g_values = gradients = self._gradients(
            [needed and a is not None for needed, a in zip(needs, inputs, strict=True)],
            batch,
            ((n, d_k), (n, d_v), (n_q, d_k), (n, d_k), (5, d_k), (2, d_k, d_v)),
            log_k.dtype,
        )
        has_y = grad_y is not None
        _core.linear_attention_vjp(
            self.ready(log_k),
            self.ready(v),
            self.optional(log_q),
            self.optional(log_decay),
            self._bytes(key_mask),
            self.optional(segments),
            self.optional(key_sums),
            self.optional(value_sums),
            causal,
            self.optional(y) if has_y else None,
            self.optional(grad_y),
            self.optional(grad_log_z),
            self.optional(grad_key_sums),
            self.optional(grad_value_sums),
            gk,
            gv,
            gq,
            ga,
            g_keys,
            g_values,
            self._attention_scratch(
                _core.linear_attention_vjp_workspace, batch, n_q, log_k, v, causal
            ),
            self.stream,
        )
        return tuple(self._summed(gradients, inputs))

    def log_linear_attention(
        self,
        log_k: Array,
        log_v: Array,
        sign_v: Array | None,
        log_q: Array | None,
        log_decay: Array | None,
        key_mask: Array | None,
        segments: Array | None,
        log_numerator: Array | None,
        sign_numerator: Array | None,
        log_denominator: Array | None,
        causal: bool,
        with_log_z: bool,
        with_state: bool,
    ) -> tuple[Array | None, ...]:
        batch = _batch(
            (log_k, 2),
            (log_v, 2),
            (sign_v, 2),
            (log_q, 2),
            (log_decay, 2),
            (key_mask, 1),
            (log_numerator, 2),
            (sign_numerator, 2),
            (log_denominator, 1),
        )
        d_k, d_v, dtype = log_k.shape[-1], log_v.shape[-1], log_k.dtype
        n_q = 0 if log_q is None else log_q.shape[-2]
        shapes: tuple[tuple[bool, tuple[int, ...]], ...] = (
            (log_q is not None, (n_q, d_v)),
            (log_q is not None, (n_q, d_v)),
            (log_q is not None and with_log_z, (n_q,)),
            (with_state, (d_k, d_v)),
            (with_state, (d_k, d_v)),
            (with_state, (d_k,)),
        )
        results = log_y, sign_y, log_z, log_n, sign_n, log_d = [
            self.empty((*batch, *shape), dtype) if is_asked else None
            for is_asked, shape in shapes
        ]
        _core.log_linear_attention(
            self.ready(log_k),
            self.ready(log_v),
            self.optional(sign_v),
            self.optional(log_q),
            self.optional(log_decay),
            self._bytes(key_mask),
            self.optional(segments),
            self.optional(log_numerator),
            self.optional(sign_numerator),
            self.optional(log_denominator),
            causal,
            log_y,
            sign_y,
            log_z,
            log_n,
            sign_n,
            log_d,
            self._attention_scratch(
                _core.log_linear_attention_workspace, batch, n_q, log_k, log_v, causal
            ),
            self.stream,
        )
        return tuple(results)

    def log_linear_attention_vjp(
        self,
        log_k: Array,
        log_v: Array,
        sign_v: Array | None,
        log_q: Array | None,
        log_decay: Array | None,
        key_mask: Array | None,
        segments: Array | None,
        log_numerator: Array | None,
        sign_numerator: Array | None,
        log_denominator: Array | None,
        causal: bool,
        grad_log_y: Array | None,
        grad_log_z: Array | None,
        grad_log_numerator: Array | None,
        grad_log_denominator: Array | None,
        needs: tuple[bool, bool, bool, bool, bool, bool],
    ) -> tuple[Array | None, ...]:
        batch = _batch(
            (log_k, 2),
            (log_v, 2),
            (sign_v, 2),
            (log_q, 2),
            (log_decay, 2),
            (key_mask, 1),
            (log_numerator, 2),
            (sign_numerator, 2),
            (log_denominator, 1),
            (grad_log_y, 2),
            (grad_log_z, 1),
            (grad_log_numerator, 2),
            (grad_log_denominator, 1),
        )
        (n, d_k), d_v = log_k.shape[-2:], log_v.shape[-1]
        n_q = 0 if log_q is None else log_q.shape[-2]
        inputs = (log_k, log_v, log_q, log_decay, log_numerator, log_denominator)
        gk, gv, gq, ga, gn, gd = gradients = self._gradients(
            [needed and a is not None for needed, a in zip(needs, inputs, strict=True)],
            batch,
            ((n, d_k), (n, d_v), (n_q, d_k), (n, d_k), (d_k, d_v), (d_k,)),
            log_k.dtype,
        )
        size = _core.log_linear_attention_vjp_workspace
        _core.log_linear_attention_vjp(
            self.ready(log_k),
            self.ready(log_v),
            self.optional(sign_v),
            self.optional(log_q),
            self.optional(log_decay),
            self._bytes(key_mask),
            self.optional(segments),
            self.optional(log_numerator),
            self.optional(sign_numerator),
            self.optional(log_denominator),
            causal,
            self.optional(grad_log_y),
            self.optional(grad_log_z),
            self.optional(grad_log_numerator),
            self.optional(grad_log_denominator),
            gk,
            gv,
            gq,
            ga,
            gn,
            gd,
            self._attention_scratch(size, batch, n_q, log_k, log_v, causal),
            self.stream,
        )
        return tuple(self._summed(gradients, inputs))

    def attention_step(
        self,
        log_k: Array,
        v: Array,
        log_q: Array,
        log_decay: Array | None,
        key_sums: Array,
        value_sums: Array,
        recent_keys: Array,
        recent_values: Array,
        recent_count: Array,
        empty_is_nan: bool,
        with_log_z: bool,
    ) -> tuple[Array, Array | None]:
        """Add a token to states, which are changed in place."""
        batch = tuple(key_sums.shape[:-2])
        d_k, d_v = log_k.shape[-1], v.shape[-1]
        y = self.empty((*batch, d_v), log_k.dtype)
        log_z = self.empty(batch, log_k.dtype) if with_log_z else None
        _core.attention_step(
            self.ready(log_k),
            self.ready(v),
            self.ready(log_q),
            self.optional(log_decay),
            key_sums,
            value_sums,
            recent_keys,
            recent_values,
            recent_count,
            empty_is_nan,
            y,
            log_z,
            self.scratch(
                _core.attention_step_workspace(
                    math.prod(batch), d_k, d_v, log_k.dtype.itemsize, self.place
                )
            ),
            self.stream,
        )
        return y, log_z

    def _bytes(self, mask: Array | None) -> Array | None:
        """Return a mask as the bytes that it is."""
        if mask is None:
            return None
        is_bytes = mask.dtype == self.xp.uint8
        return self.ready(mask if is_bytes else mask.view(self.xp.uint8))

    def _attention_scratch(
        self,
        size: Callable[..., int],
        batch: Sequence[int],
        n_q: int,
        log_k: Array,
        v: Array,
        causal: bool,
    ) -> Array:
        n, d_k = log_k.shape[-2:]
        count = size(
            math.prod(batch),
            n_q,
            n,
            d_k,
            v.shape[-1],
            log_k.dtype.itemsize,
            causal,
            self.place,
        )
        return self.scratch(count)


def _batch(*arrays: tuple[Array | None, int]) -> tuple[int, ...]:
    """Broadcast what comes before the last dimensions of each array."""
    return batch_shape(
        *(tuple(a.shape[: a.ndim - core]) for a, core in arrays if a is not None)
    )
