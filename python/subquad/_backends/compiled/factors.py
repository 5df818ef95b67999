"""The primitives of sparse factors on compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from subquad._backends.compiled.memory import Memory, _core
from subquad._dispatch import Array, CompressedRows, FactorOffsets, NetworkGradients
from subquad._reference._common import batch_shape
from subquad._reference.factors import csr_transpose

# As the compiled functions number what is added to a factor's product.
RESIDUALS = {"none": 0, "step": 1, "input": 2}


@lru_cache(maxsize=256)
def flat_offsets(offsets: FactorOffsets) -> Any:
    """Return the offsets of all factors one after the other: int64, of NumPy."""
    flat = np.array([offset for row in offsets for offset in row], np.int64)
    flat.flags.writeable = False
    return flat


class FactorKernels(Memory):
    """The primitives of sparse factors."""

    def sparse_factor_product(
        self,
        values: Array,
        x: Array,
        segments: Array | None,
        offsets: FactorOffsets,
        residual: str,
        circular: bool,
        transpose: bool,
        with_intermediates: bool,
        recompute: bool,
    ) -> tuple[Array, Array | None]:
        del recompute
        batch = batch_shape(values.shape[:-3], x.shape[:-2])
        m, n, k = values.shape[-3:]
        d = x.shape[-1]
        out = self.empty((*batch, n, d), x.dtype)
        intermediates = None
        if with_intermediates:
            intermediates = self.empty((*batch, max(m - 1, 0), n, d), x.dtype)
        size = _core.sparse_factor_product_workspace(
            math.prod(batch), m, n, k, d, x.dtype.itemsize, self.place
        )
        self._run(
            _core.sparse_factor_product,
            (values, x, segments),
            flat_offsets(offsets),
            RESIDUALS[residual],
            circular,
            transpose,
            out,
            intermediates,
            self.scratch(size),
        )
        return out, intermediates

    def sparse_factor_product_vjp(
        self,
        grad: Array,
        values: Array,
        x: Array,
        segments: Array | None,
        intermediates: Array | None,
        offsets: FactorOffsets,
        residual: str,
        circular: bool,
        needs: tuple[bool, bool],
    ) -> tuple[Array | None, Array | None]:
        batch = tuple(grad.shape[:-2])
        m, n, k = values.shape[-3:]
        d = x.shape[-1]
        gradients = self._gradients(needs, batch, [(m, n, k), (n, d)], x.dtype)
        size = _core.sparse_factor_product_vjp_workspace(
            math.prod(batch),
            m,
            n,
            k,
            d,
            x.dtype.itemsize,
            intermediates is None,
            self.place,
        )
        self._run(
            _core.sparse_factor_product_vjp,
            (grad, values, x, segments, intermediates),
            flat_offsets(offsets),
            RESIDUALS[residual],
            circular,
            *gradients,
            self.scratch(size),
        )
        grad_values, grad_x = self._summed(gradients, (values, x))
        return grad_values, grad_x

    def factor_values(
        self,
        x: Array,
        weight_in: Array,
        bias_in: Array,
        weight_out: Array,
        bias_out: Array,
    ) -> Array:
        arrays = (x, weight_in, bias_in, weight_out, bias_out)
        batch = batch_shape(
            *(
                array.shape[: array.ndim - core]
                for array, core in zip(arrays, (2, 3, 2, 3, 2), strict=True)
            )
        )
        n, d = x.shape[-2:]
        m, k, h = weight_out.shape[-3:]
        out = self.empty((*batch, m, n, k), x.dtype)
        size = _core.factor_values_workspace(
            math.prod(batch), m, n, d, h, k, x.dtype.itemsize, self.place
        )
        self._run(_core.factor_values, arrays, out, self.scratch(size))
        return out

    def factor_values_vjp(
        self,
        grad: Array,
        x: Array,
        weight_in: Array,
        bias_in: Array,
        weight_out: Array,
        bias_out: Array,
        needs: tuple[bool, bool, bool, bool, bool],
    ) -> NetworkGradients:
        batch = tuple(grad.shape[:-3])
        n, d = x.shape[-2:]
        m, k, h = weight_out.shape[-3:]
        # The kernel sums the gradients of weights over the batches that share them.
        grad_x = self.empty((*batch, n, d), x.dtype) if needs[0] else None
        others = [
            self.empty(tuple(array.shape), x.dtype) if needed else None
            for needed, array in zip(
                needs[1:], (weight_in, bias_in, weight_out, bias_out), strict=True
            )
        ]
        size = _core.factor_values_vjp_workspace(
            math.prod(batch), m, n, d, h, k, x.dtype.itemsize, self.place
        )
        arrays = (grad, x, weight_in, bias_in, weight_out)
        self._run(_core.factor_values_vjp, arrays, grad_x, *others, self.scratch(size))
        (grad_x,) = self._summed((grad_x,), (x,))
        return grad_x, others[0], others[1], others[2], others[3]

    def csr_product(
        self,
        data: Array,
        indices: Array,
        indptr: Array,
        x: Array,
        addend: Array | None,
        scale: float,
        transposed: CompressedRows | None,
    ) -> Array:
        del transposed
        batch = tuple(x.shape[:-2])
        if addend is not None:
            batch = batch_shape(batch, addend.shape[:-2])
        columns, d = x.shape[-2:]
        rows = indptr.shape[0] - 1
        out = self.empty((*batch, rows, d), x.dtype)
        size = _core.csr_product_workspace(
            math.prod(batch),
            rows,
            columns,
            data.shape[0],
            d,
            x.dtype.itemsize,
            self.place,
        )
        arrays = (data, indices, indptr, x, addend)
        self._run(_core.csr_product, arrays, scale, out, self.scratch(size))
        return out

    def csr_product_vjp(
        self,
        grad: Array,
        data: Array,
        indices: Array,
        indptr: Array,
        x: Array,
        addend: Array | None,
        scale: float,
        transposed: CompressedRows | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Array | None, Array | None, Array | None]:
        grad_data = grad_x = None
        if needs[0]:
            grad_data = self._gradient_of_entries(grad, indices, indptr, x)
            if scale != 1:
                grad_data *= scale
        if needs[1]:
            if transposed is None:
                transposed = csr_transpose(data, indices, indptr, x.shape[-2])
            grad_x = self.csr_product(*transposed, grad, None, scale, None)
        grad_addend = grad if needs[2] else None
        grad_x, grad_addend = self._summed((grad_x, grad_addend), (x, addend))
        return grad_data, grad_x, grad_addend

    def _gradient_of_entries(
        self, grad: Array, indices: Array, indptr: Array, x: Array
    ) -> Array:
        """Return what a product's gradient gives to the entries of the matrix."""
        columns, d = x.shape[-2:]
        out = self.empty(tuple(indices.shape), x.dtype)
        size = _core.csr_product_vjp_workspace(
            math.prod(grad.shape[:-2]),
            indptr.shape[0] - 1,
            columns,
            out.shape[0],
            d,
            x.dtype.itemsize,
            self.place,
        )
        arrays = (grad, indices, indptr, x)
        self._run(_core.csr_product_vjp, arrays, out, self.scratch(size))
        return out

    def csr_transpose(
        self, data: Array, indices: Array, indptr: Array, n_columns: int
    ) -> CompressedRows:
        return csr_transpose(data, indices, indptr, n_columns)

    def _run(
        self, function: Callable[..., None], arrays: Sequence[Array | None], *rest: Any
    ) -> None:
        function(*map(self.optional, arrays), *rest, self.stream)
