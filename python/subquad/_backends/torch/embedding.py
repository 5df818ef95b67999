"""The primitive of embeddings for tensors of the CPU and of CUDA."""

from __future__ import annotations

from typing import Any

from subquad._backends.torch.memory import is_plain, kernels_for
from subquad._dispatch import Array, CompressedRows, KeyStatistics, NullTerm, OwnTerms
from subquad._reference import embedding as reference


def embedding_step(
    x: Array,
    matrix: CompressedRows | None,
    rows: Array,
    scale: float,
    components: KeyStatistics | None,
    own: OwnTerms | None,
    null: NullTerm | None,
    step: float,
) -> tuple[Array, Array, Array | None]:
    groups = (matrix, components, own, null)
    arrays = (array for group in groups if group is not None for array in group)
    backend: Any = kernels_for(x) if is_plain(x, rows, *arrays) else reference
    out, attraction, log_z = backend.embedding_step(
        x, matrix, rows, scale, components, own, null, step
    )
    return out, attraction, log_z
