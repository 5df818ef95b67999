"""Normalizers in array-API code: every primitive of `subquad._dispatch.Backend`.

No branch depends on data, so that tracing compilers run it too; scores exist in blocks
of bounded size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from subquad._dispatch import Array, Namespace, Own, device_of, namespace_of
from subquad._reference._common import (
    batch_size,
    block_sizes,
    blocks,
    index_range,
    join,
    log_sum_exp,
    primitive,
    sum_to,
    wide_dtype,
)


@primitive
def log_normalizer(
    x: Array, y: Array, log_weights: Array | None, excluded: Array | None
) -> Array:
    """See `subquad.log_normalizer`: log Σⱼ exp(xᵢ·yⱼ + log wⱼ) over j ≠ excludedᵢ."""
    xp = namespace_of(x)
    y = _without_removed(xp, y, log_weights)
    n, m = x.shape[-2], y.shape[-2]
    rows, keys = block_sizes(_batch(x, y, log_weights), n, m, _itemsize(xp, x))
    return join(
        xp,
        (
            _combined(
                xp,
                [
                    log_sum_exp(xp, _scores(xp, x, y, log_weights, excluded, row, key))
                    for key in blocks(m, keys)
                ],
            )
            for row in blocks(n, rows)
        ),
        -1,
    )


@primitive
def log_normalizer_vjp(
    grad: Array,
    x: Array,
    y: Array,
    log_weights: Array | None,
    excluded: Array | None,
    log_z: Array,
    needs: tuple[bool, bool, bool],
) -> tuple[Array | None, Array | None, Array | None]:
    """See `subquad.vjp.log_normalizer`, with Pᵢⱼ = exp(xᵢ·yⱼ + log wⱼ - log Zᵢ):

    gxᵢ = gᵢ Σⱼ Pᵢⱼ yⱼ;  gyⱼ = Σᵢ gᵢ Pᵢⱼ xᵢ;  g log wⱼ = Σᵢ gᵢ Pᵢⱼ.
    """
    xp = namespace_of(x)
    x_shape, y_shape = x.shape, y.shape
    y = _without_removed(xp, y, log_weights)
    # Rows and keys that are not finite act through P alone: where P is 0 they were left
    # out.
    x_finite, y_finite = _finite(xp, x), _finite(xp, y)
    needs_x, needs_y, needs_weights = needs
    n, m = x.shape[-2], y.shape[-2]
    rows, keys = block_sizes(_batch(x, y, log_weights), n, m, _itemsize(xp, x))
    key_blocks = list(blocks(m, keys))
    gx: list[Array] = []
    gy: list[list[Array]] = [[] for _ in key_blocks]
    gw: list[list[Array]] = [[] for _ in key_blocks]
    for row in blocks(n, rows):
        parts = []
        for place, key in enumerate(key_blocks):
            scores = _scores(xp, x, y, log_weights, excluded, row, key)
            weighted = _weighted(xp, scores, log_z[..., row], grad[..., row])
            if needs_x:
                parts.append(weighted @ y_finite[..., key, :])
            if needs_y:
                gy[place].append(xp.matrix_transpose(weighted) @ x_finite[..., row, :])
            if needs_weights:
                gw[place].append(xp.sum(weighted, axis=-2))
        if needs_x:
            gx.append(_total(parts))
    return (
        sum_to(xp, join(xp, gx, -2), x_shape) if needs_x else None,
        sum_to(xp, join(xp, map(_total, gy), -2), y_shape) if needs_y else None,
        sum_to(xp, join(xp, map(_total, gw), -1), log_weights.shape)
        if needs_weights and log_weights is not None
        else None,
    )


@primitive
def gaussian_log_normalizer(
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
    own: Own | None,
) -> Array:
    """See `subquad.gaussian_log_normalizer`: log Σₐ exp(log nₐ + mᵢₐ + vᵢₐ/2), where
    mᵢₐ = xᵢ·μₐ and vᵢₐ = |Fₐᵀxᵢ|² + Σ_d x²_id diagonalₐ_d.

    Where row i is itself a key, of weight w in component a, that component is replaced
    by the one without it (ρ = w/nₐ, s = |xᵢ|²): n' = nₐ(1 - ρ), m' = (m - ρs)/(1 - ρ),
    v' = max(0, (v - ρq/(1 - ρ))/(1 - ρ)), where q is (s - m)² or, with a diagonal
    alone, Σ_d x²_id (x_id - μₐ_d)².
    """
    xp = namespace_of(x)
    by_dimension = means if diagonal is not None and factors.shape[-1] == 0 else None
    parts = []
    for row, terms, means_, variances in _gaussian_blocks(
        xp, x, log_counts, means, factors, diagonal
    ):
        if own is not None:
            terms = _with_own_term(
                xp, x, log_counts, own, row, terms, means_, variances, by_dimension
            )
        parts.append(log_sum_exp(xp, terms))
    return join(xp, parts, -1)


@primitive
def gaussian_log_normalizer_vjp(
    grad: Array,
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
    log_z: Array,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Array | None, Array | None, Array | None, Array | None, Array | None]:
    """See `subquad.vjp.gaussian_log_normalizer`, with
    Rᵢₐ = gᵢ exp(log nₐ + mᵢₐ + vᵢₐ/2 - log Zᵢ):

    gxᵢ = Σₐ Rᵢₐ (μₐ + FₐFₐᵀxᵢ + xᵢ·diagonalₐ);  g log nₐ = Σᵢ Rᵢₐ;  gμₐ = Σᵢ Rᵢₐ xᵢ;
    gFₐ = (Σᵢ Rᵢₐ xᵢxᵢᵀ) Fₐ;  g diagonalₐ = ½ Σᵢ Rᵢₐ xᵢ².
    """
    xp = namespace_of(x)
    arrays = (x, log_counts, means, factors, diagonal)
    x_finite, means_finite = _finite(xp, x), _finite(xp, means)
    factors_finite = _finite(xp, factors)
    diagonal_finite = None if diagonal is None else _finite(xp, diagonal)
    gx: list[Array] = []
    totals: list[list[Array]] = [[], [], [], []]
    for row, terms, _, _ in _gaussian_blocks(
        xp, x, log_counts, means, factors, diagonal
    ):
        weighted = _weighted(xp, terms, log_z[..., row], grad[..., row])
        rows = x_finite[..., row, :]
        transposed = xp.matrix_transpose(weighted)
        projected = []
        if needs[0] or needs[3]:
            # (..., k, rows, r): R times the projection on each component's factors
            projected = [
                transposed[..., :, :, None] * (rows[..., None, :, :] @ factors_finite)
            ]
        if needs[0]:
            value = weighted @ means_finite
            back = projected[0] @ xp.matrix_transpose(factors_finite)
            value = value + xp.sum(back, axis=-3)
            if diagonal_finite is not None:
                value = value + rows * (weighted @ diagonal_finite)
            gx.append(value)
        if needs[1]:
            totals[0].append(xp.sum(weighted, axis=-2))
        if needs[2]:
            totals[1].append(transposed @ rows)
        if needs[3]:
            rows_transposed = xp.matrix_transpose(rows)[..., None, :, :]
            totals[2].append(rows_transposed @ projected[0])
        if needs[4] and diagonal is not None:
            totals[3].append(0.5 * (transposed @ (rows * rows)))
    results = [
        join(xp, gx, -2) if needs[0] else None,
        *(_total(parts) if parts else None for parts in totals),
    ]
    gradients = tuple(
        None if result is None or array is None else sum_to(xp, result, array.shape)
        for result, array in zip(results, arrays, strict=True)
    )
    return gradients  # type: ignore[return-value]


@primitive
def gaussian_score_moments(
    x: Array, means: Array, factors: Array, diagonal: Array | None
) -> tuple[Array, Array]:
    """Return mean xᵢ·μₐ and variance |Fₐᵀxᵢ|² + Σ_d x²_id diagonalₐ_d of row i's scores
    in component a.
    """
    xp = namespace_of(x)
    size = _gaussian_rows(xp, x, means, factors)
    parts = [
        _moments(xp, x[..., row, :], means, factors, diagonal)
        for row in blocks(x.shape[-2], size)
    ]
    return (
        join(xp, (part[0] for part in parts), -2),
        join(xp, (part[1] for part in parts), -2),
    )


@primitive
def nearest_centroids(
    x: Array, centroids: Array, offsets: Array
) -> tuple[Array, Array]:
    """Return argmax_c xᵢ·c + offset_c (the lowest index of equals) and the maximum."""
    xp = namespace_of(x)
    n, k = x.shape[0], centroids.shape[0]
    size, _ = block_sizes(1, n, 1, k * _itemsize(xp, x))
    labels, best = [], []
    for row in blocks(n, size):
        scores = x[row, :] @ xp.matrix_transpose(centroids) + offsets
        labels.append(xp.argmax(scores, axis=-1))
        best.append(xp.max(scores, axis=-1))
    return join(xp, labels, 0), join(xp, best, 0)


@primitive
def component_sums(
    y: Array, labels: Array, weights: Array | None, k: int
) -> tuple[Array, Array]:
    """Return Σⱼ wⱼ and Σⱼ wⱼ yⱼ over the rows of each component."""
    xp = namespace_of(y)
    wide = wide_dtype(xp, y)
    counts, sums = [], []
    for row in _member_blocks(y, k):
        member = _membership(xp, labels, weights, row, k, wide)
        values = _without_weightless(xp, y[row, :], weights, row)
        counts.append(xp.sum(member, axis=0))
        sums.append(xp.matrix_transpose(member) @ xp.astype(values, wide))
    return _total(counts), _total(sums)


@primitive
def component_scatter(
    y: Array, labels: Array, weights: Array | None, means: Array, diagonal: bool
) -> tuple[Array, Array]:
    """Return Σⱼ wⱼ (yⱼ - μₐ)(yⱼ - μₐ)ᵀ (its diagonal alone if asked) and max |yⱼ - μₐ|
    over the rows of each component.
    """
    xp = namespace_of(y)
    k = means.shape[0]
    wide = wide_dtype(xp, y)
    scatter, radii = [], []
    for row in _member_blocks(y, k):
        member = _membership(xp, labels, weights, row, k, wide)
        values = xp.astype(_without_weightless(xp, y[row, :], weights, row), wide)
        deviations = values - xp.take(means, labels[row], axis=0)
        squares = deviations * deviations
        if diagonal:
            scatter.append(xp.matrix_transpose(member) @ squares)
        else:
            scatter.append(
                xp.stack(
                    [
                        xp.matrix_transpose(deviations * member[:, a : a + 1])
                        @ deviations
                        for a in range(k)
                    ]
                )
            )
        lengths = xp.sqrt(xp.sum(squares, axis=-1))
        reach = xp.where(member != 0.0, lengths[:, None], 0.0)
        if reach.shape[0] > 0:
            radii.append(xp.max(reach, axis=0))
    if not radii:
        radii.append(xp.zeros((k,), dtype=wide, device=device_of(y)))
    return _total(scatter), xp.max(xp.stack(radii), axis=0)


@primitive
def sample_residuals(
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
    """Return what a component's samples say of its Gaussian value: log of the corrected
    over the Gaussian value, log of its standard error, and the scores' third moment.

    With t = xᵢ·devⱼ + shiftᵢₐ and rⱼ = wⱼ (e^{t - v/2} - q(t)), q = 1 + t or 1 - v/2 +
    t + t²/2: the factor is 1 + scaleᵢₐ mean r, its error scaleᵢₐ sd(r)/√s, the third
    moment Σ w t³ / Σ w.
    """
    xp = namespace_of(x)
    n, k = variance.shape
    bounds = _static_offsets(offsets)
    samples = deviations.shape[0]
    size, _ = block_sizes(1, n, 1, max(samples, 1) * _itemsize(xp, x))
    results: tuple[list[Array], list[Array], list[Array]] = ([], [], [])
    for row in blocks(n, size):
        columns: tuple[list[Array], list[Array], list[Array]] = ([], [], [])
        for a in range(k):
            span = slice(0, samples) if bounds is None else slice(*bounds[a : a + 2])
            index = xp.arange(span.start, span.stop, device=device_of(x))
            valid = (index >= offsets[a]) & (index < offsets[a + 1])
            valid = xp.broadcast_to(
                valid[None, :], (row.stop - row.start, span.stop - span.start)
            )
            if excluded is not None:
                valid = valid & (index[None, :] != excluded[row][:, None])
            t = x[row, :] @ xp.matrix_transpose(deviations[span, :])
            if shift is not None:
                t = t + shift[row, a][:, None]
            for column, value in zip(
                columns,
                _residuals(
                    xp,
                    t,
                    valid,
                    weights[span],
                    variance[row, a],
                    scale[row, a],
                    quadratic,
                ),
                strict=True,
            ):
                column.append(value)
        for result, column in zip(results, columns, strict=True):
            result.append(xp.stack(column, axis=-1))
    return join(xp, results[0], 0), join(xp, results[1], 0), join(xp, results[2], 0)


def _residuals(
    xp: Namespace,
    t: Array,
    valid: Array,
    weights: Array,
    variance: Array,
    scale: Array,
    quadratic: bool,
) -> tuple[Array, Array, Array]:
    """Return `sample_residuals` for one component: t and valid are (rows, samples)."""
    t = xp.where(valid, t, 0.0)
    w = xp.where(valid, weights[None, :], 0.0)
    number = xp.astype(xp.sum(xp.astype(valid, t.dtype), axis=-1), t.dtype)
    at_least_one = xp.where(number > 0.0, number, 1.0)
    half = 0.5 * variance[:, None]
    exponent = t - half
    # Large exponents are kept below 1 by a common factor e^c, which returns as a
    # logarithm; small ones need none.
    if t.shape[-1] == 0:
        peak = xp.zeros_like(scale)
    else:
        peak = xp.max(xp.where(valid, exponent, 0.0), axis=-1)
    c = xp.where((peak > 1.0) & xp.isfinite(peak), peak, 0.0)
    control = 1.0 + t
    if quadratic:
        control = control - half + 0.5 * t * t
    small = xp.exp(-c)
    r = w * (xp.exp(exponent - c[:, None]) - control * small[:, None])
    r = xp.where(valid, r, 0.0)
    mean = xp.sum(r, axis=-1) / at_least_one
    delta = scale * mean
    is_positive = small + delta > 0.0
    direct = c == 0.0
    near = xp.log1p(xp.where(direct & is_positive, delta, 0.0))
    far = c + xp.log(xp.where(direct | ~is_positive, 1.0, small + delta))
    log_factor = xp.where(direct, near, far)
    log_factor = xp.where(is_positive, log_factor, math.nan)

    centred = xp.where(valid, r - mean[:, None], 0.0)
    has_error = number > 1.0
    degrees = xp.where(has_error, number - 1.0, 1.0)
    # Scaled by the largest deviation, so that squares neither overflow nor vanish.
    if t.shape[-1] == 0:
        largest = xp.zeros_like(scale)
    else:
        largest = xp.max(xp.abs(centred), axis=-1)
    has_error = has_error & ~(largest == 0.0)
    unit = xp.where(largest == 0.0, 1.0, largest)
    ratio = centred / unit[:, None]
    spread = xp.sum(ratio * ratio, axis=-1) / (degrees * at_least_one)
    log_error = (
        c
        + xp.log(unit)
        + 0.5 * xp.log(xp.where(has_error, spread, 1.0))
        + _safe_log(xp, scale)
    )
    log_error = xp.where(has_error, log_error, -math.inf)

    mass = xp.sum(w, axis=-1)
    third = xp.sum(w * t * t * t, axis=-1) / xp.where(mass == 0.0, 1.0, mass)
    return log_factor, log_error, third


def _safe_log(xp: Namespace, values: Array) -> Array:
    is_zero = values == 0.0
    return xp.where(is_zero, -math.inf, xp.log(xp.where(is_zero, 1.0, values)))


def _static_offsets(offsets: Array) -> list[int] | None:
    """Return offsets as integers, or None where a compiler is tracing them."""
    try:
        return [int(offsets[a]) for a in range(offsets.shape[0])]
    except (TypeError, RuntimeError):
        return None


def _itemsize(xp: Namespace, array: Array) -> int:
    bits: int = xp.finfo(array.dtype).bits
    return bits // 8


def _batch(x: Array, y: Array, log_weights: Array | None) -> int:
    shapes = [x.shape[:-2], y.shape[:-2]]
    if log_weights is not None:
        shapes.append(log_weights.shape[:-1])
    return batch_size(*shapes)


def _total(parts: list[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _combined(xp: Namespace, parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else log_sum_exp(xp, xp.stack(parts, axis=-1))


def _finite(xp: Namespace, array: Array) -> Array:
    return xp.where(xp.isfinite(array), array, 0.0)


def _without_removed(xp: Namespace, y: Array, log_weights: Array | None) -> Array:
    """Blank keys of weight 0, whose rows may hold anything but reach no gradient."""
    if log_weights is None:
        return y
    return xp.where((log_weights == -math.inf)[..., None], 0.0, y)


def _scores(
    xp: Namespace,
    x: Array,
    y: Array,
    log_weights: Array | None,
    excluded: Array | None,
    row: slice,
    key: slice,
) -> Array:
    scores = x[..., row, :] @ xp.matrix_transpose(y[..., key, :])
    if log_weights is not None:
        weights = log_weights[..., None, key]
        scores = xp.where(weights == -math.inf, -math.inf, scores + weights)
    if excluded is not None:
        own = excluded[row][:, None] == index_range(xp, key, excluded)[None, :]
        scores = xp.where(own, -math.inf, scores)
    return scores


def _weighted(xp: Namespace, scores: Array, log_z: Array, grad: Array) -> Array:
    """Return gᵢ exp(score - log Zᵢ), 0 where a term is absent or the sum is empty."""
    log_z = log_z[..., None]
    absent = (scores == -math.inf) | (log_z == -math.inf)
    difference = xp.where(absent, 0.0, scores - log_z)
    return xp.where(absent, 0.0, grad[..., None] * xp.exp(difference))


def _moments(
    xp: Namespace,
    rows: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
) -> tuple[Array, Array]:
    mean = rows @ xp.matrix_transpose(means)
    projection = rows[..., None, :, :] @ factors
    variance = xp.matrix_transpose(xp.sum(projection * projection, axis=-1))
    if diagonal is not None:
        variance = variance + (rows * rows) @ xp.matrix_transpose(diagonal)
    return mean, variance


def _gaussian_rows(
    xp: Namespace,
    x: Array,
    means: Array,
    factors: Array,
    log_counts: Array | None = None,
) -> int:
    """Return how many rows have projections on all factors that are of bounded size."""
    shapes = [x.shape[:-2], means.shape[:-2], factors.shape[:-3]]
    if log_counts is not None:
        shapes.append(log_counts.shape[:-1])
    width = max(1, means.shape[-2]) * max(1, factors.shape[-1])
    size, _ = block_sizes(batch_size(*shapes), x.shape[-2], 1, width * _itemsize(xp, x))
    return size


def _gaussian_blocks(
    xp: Namespace,
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
) -> Iterator[tuple[slice, Array, Array, Array]]:
    """Yield rows, terms log nₐ + m + v/2, means m and variances v, (..., rows, k)."""
    size = _gaussian_rows(xp, x, means, factors, log_counts)
    removed = log_counts == -math.inf
    means = xp.where(removed[..., None], 0.0, means)
    factors = xp.where(removed[..., None, None], 0.0, factors)
    if diagonal is not None:
        diagonal = xp.where(removed[..., None], 0.0, diagonal)
    for row in blocks(x.shape[-2], size):
        mean, variance = _moments(xp, x[..., row, :], means, factors, diagonal)
        terms = log_counts[..., None, :] + mean + 0.5 * variance
        yield (
            row,
            xp.where(removed[..., None, :], -math.inf, terms),
            mean,
            variance,
        )


def _with_own_term(
    xp: Namespace,
    x: Array,
    log_counts: Array,
    own: Own,
    row: slice,
    terms: Array,
    mean: Array,
    variance: Array,
    means: Array | None,
) -> Array:
    """Take each row's own key out of its component, and add it as a term if asked.

    `means` is given where the variance is that of each dimension by itself: the key
    then added to it the sum of its own squared deviations, not that of its score.
    """
    component, log_weight, include = own
    k = log_counts.shape[-1]
    rows = x[..., row, :]
    component = component[row]
    own_weight = log_weight[row]
    square = xp.sum(rows * rows, axis=-1)
    index = index_range(xp, slice(0, k), component)
    is_own = component[:, None] == index[None, :]
    counts = log_counts[..., None, :]
    is_own = is_own & (counts > -math.inf)
    share = xp.exp(xp.where(is_own, own_weight[:, None] - counts, -math.inf))
    rest = 1.0 - share
    is_emptied = is_own & (rest <= 4.0 * float(xp.finfo(terms.dtype).eps))
    rest = xp.where(is_emptied, 1.0, rest)
    share = xp.where(is_emptied, 0.0, share)
    deviation = square[..., None] - mean
    new_mean = (mean - share * square[..., None]) / rest
    if means is None:
        spread = deviation * deviation
    else:
        own_means = xp.take(means, xp.where(component < 0, 0, component), axis=-2)
        spread = xp.sum((rows * (rows - own_means)) ** 2, axis=-1)[..., None]
    new_variance = (variance - share * spread / rest) / rest
    new_variance = xp.where(new_variance < 0.0, 0.0, new_variance)
    replaced = counts + xp.log(rest) + new_mean + 0.5 * new_variance
    terms = xp.where(is_own, xp.where(is_emptied, -math.inf, replaced), terms)
    if include:
        own_term = xp.where(component >= 0, own_weight + square, -math.inf)
        own_term = xp.broadcast_to(own_term, terms.shape[:-1])
        terms = xp.concat([terms, own_term[..., None]], axis=-1)
    return terms


def _member_blocks(y: Array, k: int) -> Iterator[slice]:
    size, _ = block_sizes(1, y.shape[0], 1, 8 * max(k, y.shape[-1], 1))
    return blocks(y.shape[0], size)


def _membership(
    xp: Namespace,
    labels: Array,
    weights: Array | None,
    row: slice,
    k: int,
    dtype: object,
) -> Array:
    index = index_range(xp, slice(0, k), labels)
    member = xp.astype(labels[row][:, None] == index[None, :], dtype)
    if weights is None:
        return member
    return member * xp.astype(weights[row], dtype)[:, None]


def _without_weightless(
    xp: Namespace, rows: Array, weights: Array | None, row: slice
) -> Array:
    if weights is None:
        return rows
    return xp.where((weights[row] == 0.0)[:, None], 0.0, rows)
