"""What all graphs of blocks need: aligned inputs, one thread a task, prefixes."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

import dask
import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from subquad import _dispatch

Array: TypeAlias = Any
Index: TypeAlias = tuple[str, ...]

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Partial results that one task joins.
FAN_IN = 8


class _OneThread:
    """Keep the kernels on one thread while any task runs.

    The number of threads belongs to the process, and tasks of the threaded scheduler
    overlap: the first to enter remembers it, and the last to leave restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._before = 1

    @contextmanager
    def __call__(self) -> Iterator[None]:
        from subquad import _core

        with self._lock:
            if self._running == 0:
                self._before = _core.get_num_threads()
                _core.set_num_threads(1)
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    _core.set_num_threads(self._before)


one_thread = _OneThread()


def kernels(array: Array) -> Any:
    """Return the backend of a block."""
    return _dispatch.backend_for(block=array)


def quiet(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let infinities and NaN pass a task without warnings."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return call


def cut_alike(
    inputs: list[tuple[Array | None, Index]],
) -> list[tuple[Array | None, Index]]:
    """Cut arrays alike: features stay whole, the rest follows the first that has it."""
    chunks: dict[str, tuple[Any, ...]] = {}
    for a, index in inputs:
        if a is None:
            continue
        for name, pieces in zip(index, a.chunks, strict=True):
            if name.startswith("d"):
                chunks[name] = (sum(pieces),)
            elif name not in chunks or chunks[name] == (1,):
                chunks[name] = pieces
    return [(_cut(a, index, chunks), index) for a, index in inputs]


def _cut(
    a: Array | None, index: Index, chunks: dict[str, tuple[Any, ...]]
) -> Array | None:
    """Cut an array as the chunks of its indices say, repeating batch axes of size 1."""
    if a is None:
        return None
    shape = tuple(
        sum(chunks[name]) if name.startswith("b") and size == 1 else size
        for name, size in zip(index, a.shape, strict=True)
    )
    if shape != a.shape:
        a = da.broadcast_to(a, shape)
    wanted = {
        axis: chunks[name]
        for axis, name in enumerate(index)
        # Sizes not known yet are NaN, which no rechunking can meet.
        if a.chunks[axis] != chunks[name] and not math.isnan(sum(chunks[name]))
    }
    return a.rechunk(wanted) if wanted else a


def blockwise(
    function: Callable[..., Any],
    out: Index,
    inputs: list[tuple[Array | None, Index]],
    dtype: Any,
    **options: Any,
) -> Array:
    """Call da.blockwise with arguments of which some are None.

    The blocks are of the library of the first argument's.
    """
    arguments: list[Any] = []
    for array, index in inputs:
        arguments += [array, None if array is None else index]
    return da.blockwise(
        function,
        out,
        *arguments,
        dtype=dtype,
        meta=meta_from_array(inputs[0][0], len(out), dtype),
        concatenate=True,
        align_arrays=False,
        **options,
    )


def as_dask(array: Array) -> Array:
    if isinstance(array, da.Array):
        return array
    return da.from_array(np.asarray(array), chunks=-1)


def one_task(function: Callable[..., tuple[Array, ...]], *arrays: Array | None) -> Any:
    """Call a function of small arrays, whole ones, in a task that runs later."""
    samples = quiet(function)(
        *(None if a is None else np.ones(a.shape, a.dtype) for a in arrays)
    )
    task = dask.delayed(quiet(function), nout=len(samples))(*arrays)
    return tuple(
        da.from_delayed(part, shape=sample.shape, dtype=sample.dtype)
        for part, sample in zip(task, samples, strict=True)
    )


def sum_to(array: Array, shape: tuple[int, ...]) -> Array:
    """Sum an array over the axes along which `shape` was broadcast."""
    extra = array.ndim - len(shape)
    if extra:
        array = array.sum(axis=tuple(range(extra)))
    axes = tuple(
        axis for axis, size in enumerate(shape) if size == 1 and array.shape[axis] != 1
    )
    return array.sum(axis=axes, keepdims=True) if axes else array


def with_components(
    arrays: list[tuple[Array | None, Index]],
) -> tuple[list[tuple[Array | None, Index]], Index]:
    """Give arrays their batch indices, and make components whole."""
    rank = max(a.ndim - len(core) for a, core in arrays if a is not None)
    batch = tuple(f"b{i}" for i in range(rank))
    inputs: list[tuple[Array | None, Index]] = []
    for array, core in arrays:
        if array is None:
            inputs.append((None, ()))
            continue
        index = (*batch[rank - (array.ndim - len(core)) :], *core)
        whole = {axis: -1 for axis, name in enumerate(index) if name in ("k", "d", "r")}
        inputs.append((as_dask(array).rechunk(whole), index))
    return inputs, batch


def stretched(
    arrays: Sequence[Array | None], cores: Sequence[int]
) -> list[Array | None]:
    """Return blocks over the batch that they broadcast to, contiguous ones.

    `cores` are the dimensions of each block's matrices, after those of the batch.
    """
    batch = np.broadcast_shapes(
        *(
            array.shape[: array.ndim - core]
            for array, core in zip(arrays, cores, strict=True)
            if array is not None
        )
    )
    return [
        None
        if array is None
        else np.ascontiguousarray(
            np.broadcast_to(array, batch + array.shape[array.ndim - core :])
        )
        for array, core in zip(arrays, cores, strict=True)
    ]


def row_gradients(
    function: Callable[..., Any],
    inputs: Sequence[tuple[Array | None, Index]],
    others: Sequence[tuple[Array | None, Index]],
    wanted: Sequence[bool],
) -> list[Array | None]:
    """Return the gradients of inputs from tasks that have a chunk of rows each.

    The first input has rows; what tasks find for the other inputs, which are whole, is
    added up by a tree.

    Parameters
    ----------
    function : callable
        Of the blocks of inputs and others. Returns a tuple, None for what is not
        wanted, over the batch that they broadcast to.
    inputs, others : sequence of tuples
        Arrays, and the names of their dimensions after those of the batch: "n" are
        rows.
    wanted : sequence of bool
        Which gradients.
    """
    first = inputs[0][0]
    assert first is not None
    indexed, batch = with_components([*inputs, *others])
    aligned = cut_alike(indexed)
    blocks = blockwise(function, (*batch, "n"), aligned, first.dtype)
    sizes = {
        name: array.chunks[axis]
        for array, index in aligned
        if array is not None
        for axis, name in enumerate(index)
    }
    results: list[Array | None] = []
    for place, ((array, core), is_wanted) in enumerate(
        zip(inputs, wanted, strict=True)
    ):
        if not is_wanted or array is None:
            results.append(None)
            continue
        index = (*batch, "n", "d") if place == 0 else (*batch, *core, "n")
        part = da.blockwise(
            functools.partial(_pick_gradient, place=place),
            index,
            blocks,
            (*batch, "n"),
            dtype=first.dtype,
            meta=np.empty((0,) * len(index), dtype=first.dtype),
            new_axes={name: sizes[name] for name in core if name != "n"},
            adjust_chunks=None if place == 0 else {"n": 1},
            align_arrays=False,
        )
        if place:
            part = part.sum(axis=-1, split_every=FAN_IN)
        results.append(sum_to(part, array.shape))
    return results


def _pick_gradient(block: tuple[Array, ...], *, place: int) -> Array:
    return block[place] if place == 0 else block[place][..., None]


def pick(
    blocks: Array,
    place: int,
    index: Index,
    of: Index,
    sizes: dict[str, int] | None = None,
    dtype: Any = None,
) -> Array:
    """Return what stands at a place of the tuples that are the blocks of an array."""
    dtype = blocks.dtype if dtype is None else dtype
    new = {name: sizes[name] for name in index if sizes and name not in of}
    return da.blockwise(
        operator.itemgetter(place),
        index,
        blocks,
        of,
        dtype=dtype,
        meta=meta_from_array(blocks, len(index), dtype),
        new_axes=new or None,
        align_arrays=False,
    )


# -------- prefixes


class Part(NamedTuple):
    """What the entries of a chunk, or of several, amount to.

    Attributes
    ----------
    first, last : int or None
        The numbers of the sequences that it begins and ends with, in the order of the
        scan. None where there are no entries.
    breaks : bool
        Whether a sequence ends within.
    sums : Any
        Of the entries of its last sequence, as the merge has them.
    """

    first: int | None
    last: int | None
    breaks: bool
    sums: Any


def part_of(segments: Array | None, n: int, reverse: bool, sums: Any) -> Part:
    """Return the part that a chunk of n entries is."""
    if n == 0:
        return Part(None, None, False, sums)
    if segments is None:
        return Part(0, 0, False, sums)
    first, last = int(segments[0]), int(segments[-1])
    breaks = bool((segments[1:] != segments[:-1]).any())
    return Part(*((last, first) if reverse else (first, last)), breaks, sums)


def given(sums: Any) -> Part:
    """Return a state that comes before the first entry, of whatever sequence."""
    return Part(None, None, False, sums)


def joined(merge: Callable[[Any, Any], Any], left: Part | None, right: Part) -> Part:
    """Return the part that two amount to, one after the other."""
    if left is None:
        return right
    if right.first is None:
        return left
    sums = entering(left, right)
    return Part(
        right.first if left.first is None else left.first,
        right.last,
        left.breaks or right.breaks or not _continues(left, right),
        right.sums if sums is None or right.breaks else merge(sums, right.sums),
    )


def entering(entry: Part | None, part: Part) -> Any:
    """Return the sums with which a part begins, None if its sequence begins in it."""
    return entry.sums if entry is not None and _continues(entry, part) else None


def _continues(left: Part, right: Part) -> bool:
    return left.last is None or right.first is None or left.last == right.first


def prefixes(
    parts: Array,
    axis: int,
    merge: Callable[[Any, Any], Any],
    start: Array | None,
    reverse: bool,
) -> tuple[Array, Array]:
    """Return what comes before each part along an axis, and all of them together.

    `parts` is an array whose blocks are a `Part` each, `start` one of those that come
    first, without the axis. What comes before the first is None where there is no
    start. The merges are a tree of logarithmic depth, the same for the same chunks.
    """
    token = tokenize(parts.name, axis, merge, start, reverse)
    entries, total = f"entries-{token}", f"total-{token}"
    graph: dict[Any, Any] = {}
    totals: dict[Any, Any] = {}
    count = parts.numblocks[axis]
    order = range(count - 1, -1, -1) if reverse else range(count)
    others = parts.numblocks[:axis] + parts.numblocks[axis + 1 :]
    fold = functools.partial(joined, merge)
    for lane in itertools.product(*map(range, others)):
        first: list[Any] = [] if start is None else [(start.name, *lane)]
        places = [(*lane[:axis], place, *lane[axis:]) for place in order]
        nodes = itertools.count()

        def add(left: Any, right: Any, lane: Any = lane, nodes: Any = nodes) -> Any:
            key = (f"merge-{token}", *lane, next(nodes))
            graph[key] = (fold, left, right)
            return key

        found = _inclusive([*first, *((parts.name, *place) for place in places)], add)
        before = found[:-1] if first else [None, *found[:-1]]
        for place, node in zip(places, before, strict=True):
            key = (entries, *place)
            graph[key] = node
        key = (total, *lane)
        totals[key] = found[-1]
    sources = [parts] if start is None else [parts, start]
    layers = HighLevelGraph.from_collections(entries, graph, dependencies=sources)
    chunks = parts.chunks[:axis] + parts.chunks[axis + 1 :]
    entry_array = da.Array(layers, entries, parts.chunks, meta=parts)
    layers = HighLevelGraph.from_collections(total, totals, dependencies=[entry_array])
    meta = meta_from_array(parts, len(chunks))
    return entry_array, da.Array(layers, total, chunks, meta=meta)


def _inclusive(keys: list[Any], add: Callable[[Any, Any], Any]) -> list[Any]:
    """Return the prefixes of keys, each with those before it, in 2 n merges."""
    if len(keys) < 2:
        return keys
    pairs = [add(keys[i], keys[i + 1]) for i in range(0, len(keys) - 1, 2)]
    found = _inclusive(pairs, add)
    result = keys[:1]
    for i in range(1, len(keys)):
        result.append(found[i // 2] if i % 2 else add(found[i // 2 - 1], keys[i]))
    return result


def chain(
    function: Callable[[Any, Any], Any],
    blocks: Array,
    axis: int,
    start: Array | None,
    reverse: bool,
) -> Array:
    """Return function(block, what it returned for the block before) along an axis.

    The first block of a lane is given its block of `start`, or None. With `reverse` the
    last comes first.
    """
    name = f"chain-{tokenize(blocks.name, axis, function, start, reverse)}"
    graph: dict[Any, Any] = {}
    count = blocks.numblocks[axis]
    for place in itertools.product(*map(range, blocks.numblocks)):
        key = (name, *place)
        lane = (*place[:axis], *place[axis + 1 :])
        neighbour = place[axis] + (1 if reverse else -1)
        before: Any = None
        if 0 <= neighbour < count:
            before = (name, *lane[:axis], neighbour, *lane[axis:])
        elif start is not None:
            before = (start.name, *lane)
        graph[key] = (function, (blocks.name, *place), before)
    sources = [blocks] if start is None else [blocks, start]
    layers = HighLevelGraph.from_collections(name, graph, dependencies=sources)
    return da.Array(layers, name, blocks.chunks, meta=blocks)


def edge_blocks(blocks: Array, axis: int, place: int) -> Array:
    """Return the blocks at a place along an axis, without the axis."""
    name = f"edge-{tokenize(blocks.name, axis, place)}"
    lanes = blocks.numblocks[:axis] + blocks.numblocks[axis + 1 :]
    graph: dict[Any, Any] = {}
    for lane in itertools.product(*map(range, lanes)):
        key = (name, *lane)
        graph[key] = (blocks.name, *lane[:axis], place, *lane[axis:])
    layers = HighLevelGraph.from_collections(name, graph, dependencies=[blocks])
    chunks = blocks.chunks[:axis] + blocks.chunks[axis + 1 :]
    return da.Array(layers, name, chunks, meta=meta_from_array(blocks, len(chunks)))
