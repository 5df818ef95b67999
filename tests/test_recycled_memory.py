"""Memory that a loop uses again: never while anything still refers to it."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

import subquad as sq
from subquad._backends.compiled import recycled_memory

SHAPE = (600, 128)


def address(array):
    return array.__array_interface__["data"][0]


def filled(value):
    array = recycled_memory.empty(SHAPE, np.float64)
    array[...] = value
    return array


def test_dropped_memory_is_used_again():
    with recycled_memory():
        places = set()
        for _ in range(5):
            places.add(address(filled(1.0)))
        assert len(places) == 1
        assert address(recycled_memory.empty((8,), np.float64)) not in places


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[3:7],
        lambda array: array.T,
        lambda array: array.reshape(-1)[::-1],
        memoryview,
        np.from_dlpack,
    ],
    ids=["slice", "transpose", "reversed", "buffer", "dlpack"],
)
def test_a_view_keeps_its_memory(view):
    with recycled_memory():
        kept = view(filled(1.0))
        gc.collect()
        for value in (2.0, 3.0):
            filled(value)
        assert np.all(np.asarray(kept) == 1.0)


def test_arrays_outlive_the_block():
    with recycled_memory():
        kept = filled(1.0)
    other = filled(2.0)
    assert np.all(kept == 1.0)
    assert np.all(other == 2.0)


def test_blocks_nest():
    with recycled_memory():
        outer = filled(1.0)
        with recycled_memory():
            inner = filled(2.0)
        again = filled(3.0)
        assert (outer[0, 0], inner[0, 0], again[0, 0]) == (1.0, 2.0, 3.0)


def test_other_threads_have_their_own():
    with recycled_memory():
        mine = address(filled(1.0))
        theirs = []

        def work():
            kept = filled(2.0)
            theirs.append((address(kept), kept.base is None))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert theirs == [(theirs[0][0], True)]
    assert theirs[0][0] != mine


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64])
def test_arrays_are_as_others(dtype):
    size = (1 << 18) // np.dtype(dtype).itemsize
    with recycled_memory():
        array = recycled_memory.empty((size, 1), dtype)
        assert array.dtype == dtype
        assert array.shape == (size, 1)
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.flags.aligned


def test_embeddings_of_two_runs_are_apart():
    walk = np.roll(np.eye(4100, dtype=np.float32), 1, axis=0)
    first = sq.EDRep(32, max_iter=2, random_state=0).fit_transform(walk)
    before = first.copy()
    sq.EDRep(32, max_iter=2, random_state=1).fit(walk)
    assert np.array_equal(first, before)


def test_nothing_is_kept_afterwards():
    with recycled_memory():
        kept, dropped = filled(1.0), filled(2.0)
        memory = weakref.ref(dropped.base._block)
    del dropped
    assert memory() is None
    assert np.all(kept == 1.0)


def test_interrupts_are_not_swallowed():
    # Python runs them between any two of its instructions, finalizers' included.
    assert not hasattr(type(recycled_memory), "__del__")
    with recycled_memory():
        assert not hasattr(type(filled(1.0).base), "__del__")
