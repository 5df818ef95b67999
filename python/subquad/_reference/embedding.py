"""Steps of embeddings in array-API code: a primitive of `subquad._dispatch.Backend`.

No branch depends on data, so that tracing compilers run it too; products with the
components' matrices exist in blocks of bounded size.
"""

from __future__ import annotations

import math

from subquad._dispatch import (
    Array,
    CompressedRows,
    KeyStatistics,
    Namespace,
    NullTerm,
    OwnTerms,
    namespace_of,
)
from subquad._reference._common import (
    block_sizes,
    blocks,
    index_range,
    join,
    log_sum_exp,
    primitive,
)
from subquad._reference.factors import csr_product


@primitive
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
    """Turn each row of unit norm by arcsin(step) down its gradient, as `turned` does;
    return it with the attraction and log_z of `embedding_gradient`.
    """
    gradient, attraction, log_z = embedding_gradient(
        x, matrix, rows, scale, components, own, null
    )
    if step != 0.0:
        x = turned(x, gradient, *cosine_and_sine(step))
    return x, attraction, log_z


def cosine_and_sine(step: float) -> tuple[float, float]:
    """Return those of the angle by which rows turn."""
    return math.sqrt((1.0 - step) * (1.0 + step)), step


@primitive
def embedding_gradient(
    x: Array,
    matrix: CompressedRows | None,
    rows: Array,
    scale: float,
    components: KeyStatistics | None,
    own: OwnTerms | None,
    null: NullTerm | None,
) -> tuple[Array, Array, Array | None]:
    """Return the gradient gᵢ of each row, its attraction xᵢ·pullᵢ and its log Zᵢ.

    pull = scale A rows, or scale rows where there is no matrix A; with
    sᵢₐ = log nₐ + xᵢ·μₐ + ½ xᵢᵀCₐxᵢ and log Zᵢ = log Σₐ exp(sᵢₐ):
    gᵢ = -pullᵢ + Σₐ exp(sᵢₐ - log Zᵢ) (μₐ + Cₐxᵢ) + shift_c + slope_c xᵢ + wᵢ null,
    c the label of i. Each group of terms may be absent, log Z with the components.
    """
    xp = namespace_of(x)
    if matrix is None:
        pull = scale * rows
    else:
        pull = csr_product(*matrix, rows, None, scale, None)
    attraction = xp.sum(x * pull, axis=-1)
    gradient = -pull
    log_z = None
    if components is not None:
        push, log_z = _push(xp, x, components)
        gradient = gradient + push
    if own is not None:
        gradient = gradient + _own_terms(xp, x, own)
    if null is not None:
        weights, vector = null
        gradient = gradient + weights[:, None] * vector
    return gradient, attraction, log_z


@primitive
def turned(x: Array, gradient: Array, cosine: float, sine: float) -> Array:
    """Return cosine xᵢ - sine gᵢ'/|gᵢ'| scaled to unit norm, gᵢ' = gᵢ - (gᵢ·xᵢ) xᵢ; xᵢ
    where gᵢ' = 0.
    """
    xp = namespace_of(x)
    # What is left of a gradient nearly along x is mostly rounding along x: a second
    # projection takes that off; where it takes half of the square, nothing but rounding
    # was left.
    first = _scaled(xp, _projected(xp, _scaled(xp, gradient), x))
    second = _projected(xp, first, x)
    tangent = _scaled(xp, second)
    length = _norms(xp, tangent)
    taken = xp.abs(xp.sum(first * x, axis=-1, keepdims=True))
    stays = (length == 0.0) | (taken >= length * _largest(xp, second))
    out = cosine * x - sine * (tangent / xp.where(stays, 1.0, length))
    return xp.where(stays, x, out / _norms(xp, xp.where(stays, 1.0, out)))


def _push(xp: Namespace, x: Array, components: KeyStatistics) -> tuple[Array, Array]:
    """Return Σₐ exp(sᵢₐ - log Zᵢ) (μₐ + Cₐxᵢ) and log Zᵢ: gradient and value."""
    log_counts, means, covariances = components
    # Components without keys have no part in anything, whatever is said of them.
    absent = log_counts == -math.inf
    means = xp.where(absent[:, None], 0.0, means)
    covariances = xp.where(absent[:, None, None], 0.0, covariances)
    push, log_z = [], []
    for row in _row_blocks(xp, x, means):
        points = x[row, :]
        slopes = points[None, :, :] @ covariances  # by component, row and dimension
        means_ = points @ xp.matrix_transpose(means)
        variances = xp.matrix_transpose(xp.sum(slopes * points[None, :, :], axis=-1))
        scores = log_counts[None, :] + means_ + 0.5 * variances
        scores = xp.where(absent[None, :], -math.inf, scores)
        value = log_sum_exp(xp, scores)
        empty = (scores == -math.inf) | (value == -math.inf)[:, None]
        difference = xp.where(empty, 0.0, scores - value[:, None])
        weights = xp.where(empty, 0.0, xp.exp(difference))
        spread = xp.matrix_transpose(weights)[:, :, None] * slopes
        push.append(weights @ means + xp.sum(spread, axis=0))
        log_z.append(value)
    return join(xp, push, 0), join(xp, log_z, 0)


def _own_terms(xp: Namespace, x: Array, own: OwnTerms) -> Array:
    """Return shift_c + slope_c xᵢ for the label c of each row."""
    labels, shifts, slopes = own
    parts = []
    for row in _row_blocks(xp, x, shifts):
        terms = x[None, row, :] @ slopes + shifts[:, None, :]
        index = index_range(xp, slice(0, shifts.shape[0]), labels)
        chosen = (index[:, None] == labels[None, row])[:, :, None]
        parts.append(xp.sum(xp.where(chosen, terms, 0.0), axis=0))
    return join(xp, parts, 0)


def _row_blocks(xp: Namespace, x: Array, vectors: Array) -> list[slice]:
    """Return rows whose products with one matrix a vector are of bounded size."""
    n, d = x.shape
    itemsize = xp.finfo(x.dtype).bits // 8
    size, _ = block_sizes(1, n, 1, max(vectors.shape[0] * d, 1) * itemsize)
    return list(blocks(n, size))


def _scaled(xp: Namespace, rows: Array) -> Array:
    """Divide rows by their largest magnitude: squares neither overflow nor vanish."""
    largest = _largest(xp, rows)
    return rows / xp.where(largest == 0.0, 1.0, largest)


def _largest(xp: Namespace, rows: Array) -> Array:
    return xp.max(xp.abs(rows), axis=-1, keepdims=True)


def _projected(xp: Namespace, rows: Array, x: Array) -> Array:
    return rows - xp.sum(rows * x, axis=-1, keepdims=True) * x


def _norms(xp: Namespace, rows: Array) -> Array:
    return xp.sqrt(xp.sum(rows * rows, axis=-1, keepdims=True))
