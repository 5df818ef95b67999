"""Normalizers of Dask arrays: graphs of blocks, joined by trees.

Nothing is computed here but by `fit`. Features and components stay whole; rows, keys
and batches may be cut anywhere.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt

from subquad import _dispatch
from subquad._backends.dask.common import (
    FAN_IN,
    Array,
    Index,
    as_dask,
    blockwise,
    cut_alike,
    one_thread,
    row_gradients,
    stretched,
    sum_to,
    with_components,
)

# -------- exact normalizer


def log_normalizer(
    x: Array, y: Array, log_weights: Array | None, excluded: Array | None, /
) -> Array:
    """See `subquad.log_normalizer`.

    Each chunk of rows meets each chunk of keys; a tree adds the logarithms.
    """
    inputs, batch = _pairs(x, y, log_weights, excluded, None, None)
    partial = blockwise(
        functools.partial(_log_normalizer_block, dtype=x.dtype),
        (*batch, "n", "m"),
        inputs,
        x.dtype,
        adjust_chunks={"m": 1},
    )
    return _log_sum_exp(partial)


def _log_normalizer_block(
    x: Array, y: Array, log_weights: Array, excluded: Array, start: Array, *, dtype: Any
) -> Array:
    local = None if excluded is None else _local(excluded, start, y.shape[-2])
    with one_thread():
        backend = _dispatch.backend_for(x=x)
        part = backend.log_normalizer(x, y, log_weights, local)
    return part.astype(dtype, copy=False)[..., None]


def _log_sum_exp(partial: Array) -> Array:
    if partial.numblocks[-1] == 1:
        return partial[..., 0]
    return da.reduction(
        partial,
        chunk=_identity,
        combine=_log_sum_exp_block,
        aggregate=_log_sum_exp_block,
        axis=partial.ndim - 1,
        dtype=partial.dtype,
        split_every=FAN_IN,
        meta=np.empty((0,) * (partial.ndim - 1), dtype=partial.dtype),
    )


def _identity(block: Array, axis: Any, keepdims: bool) -> Array:
    del axis, keepdims
    return block


def _log_sum_exp_block(block: Array, axis: Any, keepdims: bool) -> Array:
    with np.errstate(all="ignore"):
        total = np.logaddexp.reduce(block.astype(np.float64), axis=axis[0])
    if keepdims:
        total = np.expand_dims(total, axis[0])
    return np.asarray(total, dtype=block.dtype)


def log_normalizer_vjp(
    grad: Array,
    x: Array,
    y: Array,
    log_weights: Array | None,
    excluded: Array | None,
    log_z: Array,
    needs: tuple[bool, bool, bool],
    /,
) -> tuple[Array | None, Array | None, Array | None]:
    """See `subquad.vjp.log_normalizer`: pairs of chunks, added by trees."""
    inputs, batch = _pairs(x, y, log_weights, excluded, grad, log_z)
    dtype = x.dtype
    wanted = (needs[0], needs[1], needs[2] and log_weights is not None)
    # One value per pair of chunks: a tuple of what is wanted.
    pairs = blockwise(
        functools.partial(_log_normalizer_vjp_block, needs=wanted),
        (*batch, "n", "m"),
        inputs,
        dtype,
    )
    d = x.shape[-1]
    results: list[Array | None] = []
    for place, (of, is_wanted) in enumerate(
        zip((x, y, log_weights), wanted, strict=True)
    ):
        if not is_wanted:
            results.append(None)
            continue
        kept, summed = ("n", "m") if place == 0 else ("m", "n")
        features = () if place == 2 else ("d",)
        index = (*batch, kept, *features, summed)
        part = da.blockwise(
            functools.partial(_pick, place=place),
            index,
            pairs,
            (*batch, "n", "m"),
            dtype=dtype,
            meta=np.empty((0,) * len(index), dtype=dtype),
            adjust_chunks={summed: 1},
            new_axes={"d": d} if features else None,
            align_arrays=False,
        )
        results.append(sum_to(part.sum(axis=-1, split_every=FAN_IN), of.shape))
    return results[0], results[1], results[2]


def _log_normalizer_vjp_block(
    x: Array,
    y: Array,
    log_weights: Array,
    excluded: Array,
    start: Array,
    grad: Array,
    log_z: Array,
    *,
    needs: tuple[bool, bool, bool],
) -> tuple[Array | None, ...]:
    local = None if excluded is None else _local(excluded, start, y.shape[-2])
    batch = np.broadcast_shapes(
        x.shape[:-2],
        y.shape[:-2],
        () if log_weights is None else log_weights.shape[:-1],
        grad.shape[:-1],
    )
    # Broadcast inputs get gradients of their own for every batch, which the graph adds
    # up.
    x, y = (np.broadcast_to(a, batch + a.shape[-2:]) for a in (x, y))
    if log_weights is not None:
        log_weights = np.broadcast_to(log_weights, batch + log_weights.shape[-1:])
    with one_thread():
        backend = _dispatch.backend_for(x=x)
        return backend.log_normalizer_vjp(
            np.ascontiguousarray(np.broadcast_to(grad, batch + grad.shape[-1:])),
            x,
            y,
            log_weights,
            local,
            np.ascontiguousarray(np.broadcast_to(log_z, batch + log_z.shape[-1:])),
            needs,
        )


def _pick(block: tuple[Array, ...], *, place: int) -> Array:
    return block[place][..., None]


def _local(excluded: Array, start: Array, n_keys: int) -> npt.NDArray[np.int64]:
    """Return excluded keys as indices into a chunk of keys, -1 if in another."""
    local = np.asarray(excluded, dtype=np.int64) - int(start[0])
    inside = (np.asarray(excluded) >= 0) & (local >= 0) & (local < n_keys)
    return np.where(inside, local, -1)


def _pairs(
    x: Array,
    y: Array,
    log_weights: Array | None,
    excluded: Array | None,
    grad: Array | None,
    log_z: Array | None,
) -> tuple[list[tuple[Array | None, Index]], Index]:
    """Return the inputs of a call on pairs of chunks, cut alike, and batch axes."""
    rank = max(
        a.ndim - n_core
        for a, n_core in ((x, 2), (y, 2), (log_weights, 1), (grad, 1), (log_z, 1))
        if a is not None
    )
    batch = tuple(f"b{i}" for i in range(rank))

    def indexed(a: Array | None, core: Index) -> tuple[Array | None, Index]:
        if a is None:
            return None, ()
        return as_dask(a), (*batch[rank - (a.ndim - len(core)) :], *core)

    inputs = [
        indexed(x, ("n", "d")),
        indexed(y, ("m", "d")),
        indexed(log_weights, ("m",)),
        indexed(excluded, ("n",)),
    ]
    if grad is not None:
        inputs += [indexed(grad, ("n",)), indexed(log_z, ("n",))]
    aligned = cut_alike(inputs)
    starts: Array | None = None
    if excluded is not None:
        sizes = as_dask(aligned[1][0]).chunks[-2]
        if math.isnan(sum(sizes)):
            message = (
                "y has chunks of unknown size, so that self_index cannot be found in "
                "it: call y.compute_chunk_sizes() first"
            )
            raise ValueError(message)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    aligned.insert(
        4, (None if starts is None else da.from_array(starts, chunks=1), ("m",))
    )
    return aligned, batch


# -------- Gaussian normalizers


def gaussian_log_normalizer(
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
    own: _dispatch.Own | None,
    /,
) -> Array:
    """See `subquad.gaussian_log_normalizer`: chunks of rows, all components."""
    component, log_weight, include = (None, None, False) if own is None else own
    inputs, batch = with_components(
        [
            (x, ("n", "d")),
            (log_counts, ("k",)),
            (means, ("k", "d")),
            (factors, ("k", "d", "r")),
            (diagonal, ("k", "d")),
        ]
    )
    inputs += [
        (None if a is None else as_dask(a), ("n",)) for a in (component, log_weight)
    ]
    return blockwise(
        functools.partial(_gaussian_block, include=include),
        (*batch, "n"),
        cut_alike(inputs),
        x.dtype,
    )


def _gaussian_block(
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array,
    component: Array,
    log_weight: Array,
    *,
    include: bool,
) -> Array:
    own = None if component is None else (component, log_weight, include)
    with one_thread():
        backend = _dispatch.backend_for(x=x)
        return backend.gaussian_log_normalizer(
            x, log_counts, means, factors, diagonal, own
        )


def gaussian_log_normalizer_vjp(
    grad: Array,
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
    log_z: Array,
    needs: tuple[bool, bool, bool, bool, bool],
    /,
) -> tuple[Array | None, Array | None, Array | None, Array | None, Array | None]:
    """See `subquad.vjp.gaussian_log_normalizer`: summed over chunks of rows."""
    arrays = (x, log_counts, means, factors, diagonal)
    cores: tuple[Index, ...] = (
        ("n", "d"),
        ("k",),
        ("k", "d"),
        ("k", "d", "r"),
        ("k", "d"),
    )
    wanted = tuple(
        need and array is not None for need, array in zip(needs, arrays, strict=True)
    )
    found = row_gradients(
        functools.partial(_gaussian_vjp_block, needs=wanted),
        [*zip(arrays, cores, strict=True)],
        [(grad, ("n",)), (log_z, ("n",))],
        wanted,
    )
    return found[0], found[1], found[2], found[3], found[4]


def _gaussian_vjp_block(
    *arrays: Array, needs: tuple[bool, ...]
) -> tuple[Array | None, ...]:
    *inputs, grad, log_z = stretched(arrays, (2, 1, 2, 3, 2, 1, 1))
    with one_thread():
        function: Callable[..., Any] = _dispatch.backend_for(
            x=inputs[0]
        ).gaussian_log_normalizer_vjp
        gradients: tuple[Array | None, ...] = function(grad, *inputs, log_z, needs)
    return gradients


def gaussian_score_moments(
    x: Array, means: Array, factors: Array, diagonal: Array | None, /
) -> tuple[Array, Array]:
    """Return mean and variance of each row's scores in each component."""
    k = means.shape[0]
    moments = _rows(
        functools.partial(_primitive, "gaussian_score_moments"),
        x,
        [],
        [means, factors, diagonal],
        [(k, x.dtype), (k, x.dtype)],
    )
    return moments[0], moments[1]


def nearest_centroids(
    x: Array, centroids: Array, offsets: Array, /
) -> tuple[Array, Array]:
    """Return argmax_c xᵢ·c + offset_c (the lowest index of equals) and the maximum."""
    nearest = _rows(
        functools.partial(_primitive, "nearest_centroids"),
        x,
        [],
        [centroids, offsets],
        [(None, np.dtype(np.int64)), (None, x.dtype)],
    )
    return nearest[0], nearest[1]


def component_sums(
    y: Array, labels: Array, weights: Array | None, k: int, /
) -> tuple[Array, Array]:
    """Return Σⱼ wⱼ and Σⱼ wⱼ yⱼ over the rows of each component."""
    d = y.shape[1]
    counts, sums = _totals(
        functools.partial(_primitive, "component_sums", last=(k,)),
        y,
        [labels, weights],
        [],
        [(k,), (k, d)],
    )
    return counts.sum(axis=0, split_every=FAN_IN), sums.sum(axis=0, split_every=FAN_IN)


def component_scatter(
    y: Array, labels: Array, weights: Array | None, means: Array, diagonal: bool, /
) -> tuple[Array, Array]:
    """Return Σⱼ wⱼ (yⱼ - μₐ)(yⱼ - μₐ)ᵀ, or its diagonal, and max |yⱼ - μₐ|."""
    k, d = means.shape
    scatter, radii = _totals(
        functools.partial(_primitive, "component_scatter", last=(diagonal,)),
        y,
        [labels, weights],
        [means],
        [(k, d) if diagonal else (k, d, d), (k,)],
    )
    return scatter.sum(axis=0, split_every=FAN_IN), radii.max(
        axis=0, split_every=FAN_IN
    )


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
    /,
) -> tuple[Array, Array, Array]:
    """Return the samples' correction, error and third moment; see the reference."""
    k = variance.shape[1]
    results = _rows(
        functools.partial(_residuals, quadratic=quadratic),
        x,
        [variance, scale, shift, excluded],
        [deviations, weights, offsets],
        [(k, x.dtype)] * 3,
    )
    return results[0], results[1], results[2]


def _residuals(
    x: Array,
    variance: Array,
    scale: Array,
    shift: Array,
    excluded: Array,
    deviations: Array,
    weights: Array,
    offsets: Array,
    *,
    quadratic: bool,
) -> tuple[Array, ...]:
    with one_thread():
        return _dispatch.backend_for(x=x).sample_residuals(
            x, deviations, weights, offsets, variance, scale, shift, excluded, quadratic
        )


def _primitive(
    name: str, *arrays: Array, last: tuple[Any, ...] = ()
) -> tuple[Array, ...]:
    with one_thread():
        function = getattr(_dispatch.backend_for(x=arrays[0]), name)
        results: tuple[Array, ...] = function(*arrays, *last)
    return results


def _row_blocks(
    function: Callable[..., Any],
    x: Array,
    by_row: list[Array | None],
    shared: list[Array | None],
) -> Array:
    """Return an array of one tuple of results per chunk of rows."""
    inputs: list[tuple[Array | None, Index]] = [(as_dask(x), ("n", "d"))]
    for a in by_row:
        # The second axis of what comes by row is components, whole as features are.
        whole = None if a is None else as_dask(a)
        if whole is not None and whole.ndim == 2:
            whole = whole.rechunk({1: -1})
        inputs.append((whole, () if whole is None else ("n", "k")[: whole.ndim]))
    for place, a in enumerate(shared):
        index = tuple(f"s{place}{axis}" for axis in range(0 if a is None else a.ndim))
        inputs.append((None if a is None else as_dask(a).rechunk(-1), index))
    return blockwise(function, ("n",), cut_alike(inputs), x.dtype)


def _rows(
    function: Callable[..., Any],
    x: Array,
    by_row: list[Array | None],
    shared: list[Array | None],
    results: list[tuple[int | None, Any]],
) -> list[Array]:
    blocks = _row_blocks(function, x, by_row, shared)
    arrays = []
    for place, (width, dtype) in enumerate(results):
        index = ("n",) if width is None else ("n", "k")
        arrays.append(
            da.blockwise(
                operator.itemgetter(place),
                index,
                blocks,
                ("n",),
                dtype=dtype,
                meta=np.empty((0,) * len(index), dtype=dtype),
                new_axes=None if width is None else {"k": width},
                align_arrays=False,
            )
        )
    return arrays


def _totals(
    function: Callable[..., Any],
    y: Array,
    by_row: list[Array | None],
    shared: list[Array | None],
    shapes: list[tuple[int, ...]],
) -> list[Array]:
    blocks = _row_blocks(function, y, by_row, shared)
    arrays = []
    for place, shape in enumerate(shapes):
        axes = {f"o{axis}": size for axis, size in enumerate(shape)}
        index = ("n", *axes)
        arrays.append(
            da.blockwise(
                functools.partial(_pick_total, place=place),
                index,
                blocks,
                ("n",),
                dtype=np.float64,
                meta=np.empty((0,) * len(index), dtype=np.float64),
                new_axes=axes,
                adjust_chunks={"n": 1},
                align_arrays=False,
            )
        )
    return arrays


def _pick_total(block: tuple[Array, ...], *, place: int) -> Array:
    return block[place][None]


# -------- estimators


def take_rows(rows: Array, indices: npt.NDArray[np.int64]) -> tuple[Array, Array]:
    """Compute the first row and the rows of the given increasing indices."""
    first, taken = dask.compute(rows[:1], rows[indices])
    return first[0] if len(first) else first, taken


def require_finite(rows: Array) -> None:
    """Raise ValueError naming the first row of X that holds NaN or infinity."""
    bad = np.flatnonzero(~da.isfinite(rows).all(axis=1).compute())
    if len(bad):
        message = f"X must be finite, but row {int(bad[0])} contains NaN or infinity"
        raise ValueError(message)


def fit_statistics(
    function: Callable[..., Any],
    rows: Array,
    labels: npt.NDArray[Any] | None,
    weights: npt.NDArray[Any] | None,
    partition: npt.NDArray[Any] | None,
    options: dict[str, Any],
    start: int,
) -> Any:
    """Compute the statistics of each chunk of keys and merge them by a tree.

    Parameters
    ----------
    function : callable
        Statistics of a batch, with a method ``merged(other, sample_size)``.
    rows : dask.array.Array, shape (n, d)
    labels, weights : ndarray of shape (n,), optional
    partition : ndarray, shape (k, d), optional
    options : dict
        Keyword arguments of the function.
    start : int
        Position of the first row in the stream of keys.
    """
    rows = rows.rechunk({1: -1})
    borders = np.concatenate([[0], np.cumsum(rows.chunks[0])]).astype(int)
    task = dask.delayed(_chunk_statistics, pure=False, traverse=False)
    shared = dask.delayed(partition, traverse=False)
    parts = []
    for block, (begin, end) in zip(
        rows.to_delayed()[:, 0], itertools.pairwise(borders), strict=True
    ):
        if begin == end:
            continue
        parts.append(
            task(
                function,
                block,
                None if labels is None else labels[begin:end],
                None if weights is None else weights[begin:end],
                shared,
                {**options, "start": start + int(begin)},
            )
        )
    merge = dask.delayed(_merge_statistics, pure=False, traverse=False)
    while len(parts) > 1:
        parts = [
            merge(options["sample_size"], *parts[place : place + FAN_IN])
            for place in range(0, len(parts), FAN_IN)
        ]
    return parts[0].compute()


def _chunk_statistics(
    function: Callable[..., Any],
    rows: Array,
    labels: Array | None,
    weights: Array | None,
    partition: Array | None,
    options: dict[str, Any],
) -> Any:
    with one_thread():
        return function(np.asarray(rows), labels, weights, partition, **options)


def _merge_statistics(sample_size: int, *parts: Any) -> Any:
    return functools.reduce(lambda a, b: a.merged(b, sample_size), parts)


def map_rows(
    function: Callable[..., Any], state: Any, x: Array, self_index: Array | None
) -> Array:
    """Return function(state, x, self_index) of every chunk of rows, shape (..., n)."""
    x = x.rechunk({x.ndim - 1: -1})
    batch = tuple(f"b{axis}" for axis in range(x.ndim - 2))
    inputs: list[tuple[Array | None, Index]] = [(x, (*batch, "n", "d"))]
    if self_index is not None:
        inputs.append((as_dask(self_index), ("n",)))
    aligned = cut_alike(inputs)
    arguments = [part for a, index in aligned for part in (a, index)]
    return da.blockwise(
        _map_block,
        (*batch, "n"),
        *arguments,
        concatenate=True,
        align_arrays=False,
        dtype=x.dtype,
        meta=np.empty((0,) * (x.ndim - 1), dtype=x.dtype),
        function=function,
        state=dask.delayed(state, traverse=False),
    )


def _map_block(
    x: Array,
    self_index: Array | None = None,
    *,
    function: Callable[..., Any],
    state: Any,
) -> Array:
    with one_thread():
        return function(state, x, self_index)
