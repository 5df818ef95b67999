"""What all graphs of blocks need: aligned inputs, one thread a task, prefixes."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

Array: TypeAlias = Any
Index: TypeAlias = tuple[str, ...]

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


def aligned(
    inputs: list[tuple[Array | None, Index]],
) -> list[tuple[Array | None, Index]]:
    """Cut arrays alike: features stay whole, the rest follows the first that has it."""
    chunks: dict[str, tuple[Any, ...]] = {}
    for a, index in inputs:
        if a is None:
            continue
        for name, pieces in zip(index, a.chunks, strict=True):
            if name == "d":
                chunks[name] = (sum(pieces),)
            elif name not in chunks or chunks[name] == (1,):
                chunks[name] = pieces
    return [(cut(a, index, chunks), index) for a, index in inputs]


def cut(
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
    """Call da.blockwise with arguments of which some are None."""
    arguments: list[Any] = []
    for array, index in inputs:
        arguments += [array, None if array is None else index]
    return da.blockwise(
        function,
        out,
        *arguments,
        dtype=dtype,
        meta=np.empty((0,) * len(out), dtype=dtype),
        concatenate=True,
        align_arrays=False,
        **options,
    )


def as_dask(array: Array) -> Array:
    if isinstance(array, da.Array):
        return array
    return da.from_array(np.asarray(array), chunks=-1)


def sum_to(array: Array, shape: tuple[int, ...]) -> Array:
    """Sum an array over the axes along which `shape` was broadcast."""
    extra = array.ndim - len(shape)
    if extra:
        array = array.sum(axis=tuple(range(extra)))
    axes = tuple(
        axis for axis, size in enumerate(shape) if size == 1 and array.shape[axis] != 1
    )
    return array.sum(axis=axes, keepdims=True) if axes else array


