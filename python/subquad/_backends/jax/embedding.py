"""The primitive of embeddings: XLA's own operations around the matrix's product."""

from __future__ import annotations

import jax

from subquad._backends.jax.factors import csr_product
from subquad._dispatch import Array, CompressedRows, KeyStatistics, NullTerm, OwnTerms
from subquad._reference import embedding as reference

# Compiled for shapes alone: steps of any size share these.
_gradient = jax.jit(reference.embedding_gradient, static_argnums=3)
_turned = jax.jit(reference.turned)


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
    if matrix is None:
        pull = scale * rows
    else:
        pull = csr_product(*matrix, rows, None, scale, None)
    gradient, attraction, log_z = _gradient(x, None, pull, 1.0, components, own, null)
    if step != 0.0:
        x = _turned(x, gradient, *reference.cosine_and_sine(step))
    return x, attraction, log_z
