"""The primitive of embeddings, which is not for Dask arrays."""

from __future__ import annotations

from subquad._dispatch import Array, CompressedRows, KeyStatistics, NullTerm, OwnTerms


def embedding_step(
    x: Array,
    matrix: CompressedRows | None,
    rows: Array,
    scale: float,
    components: KeyStatistics | None,
    own: OwnTerms | None,
    null: NullTerm | None,
    step: float,
    /,
) -> tuple[Array, Array, Array | None]:
    """Refuse."""
    del x, matrix, rows, scale, components, own, null, step
    message = (
        "steps of embeddings take no Dask arrays: each reads all rows that the one "
        "before it wrote; compute the arrays first"
    )
    raise TypeError(message)
