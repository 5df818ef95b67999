"""The primitive of embeddings on compiled kernels."""

from __future__ import annotations

from subquad._backends.compiled.memory import Memory, _core
from subquad._dispatch import Array, CompressedRows, KeyStatistics, NullTerm, OwnTerms


class EmbeddingKernels(Memory):
    """The primitive of embeddings."""

    def embedding_step(
        self,
        x: Array,
        matrix: CompressedRows | None,
        rows: Array,
        scale: float,
        components: KeyStatistics | None,
        own: OwnTerms | None,
        null: NullTerm | None,
        step: float,
    ) -> tuple[Array, Array, Array | None]:
        n, d = x.shape
        entries, indices, indptr = matrix or (None, None, None)
        log_counts, means, covariances = components or (None, None, None)
        labels, shifts, slopes = own or (None, None, None)
        null_weights, vector = null or (None, None)
        out = None if step == 0.0 else self.empty((n, d), x.dtype)
        attraction = self.empty((n,), x.dtype)
        log_z = None if components is None else self.empty((n,), x.dtype)
        size = _core.embedding_step_workspace(
            n,
            rows.shape[0],
            0 if entries is None else entries.shape[0],
            d,
            0 if means is None else means.shape[0],
            0 if shifts is None else shifts.shape[0],
            x.dtype.itemsize,
            self.place,
        )
        _core.embedding_step(
            self.ready(x),
            self.optional(entries),
            self.optional(indices),
            self.optional(indptr),
            self.ready(rows),
            scale,
            self.optional(log_counts),
            self.optional(means),
            self.optional(covariances),
            self.optional(labels),
            self.optional(shifts),
            self.optional(slopes),
            self.optional(null_weights),
            self.optional(vector),
            step,
            out,
            attraction,
            log_z,
            self.scratch(size),
            self.stream,
        )
        return x if out is None else out, attraction, log_z
