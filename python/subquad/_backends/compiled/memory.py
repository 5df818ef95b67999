"""What compiled kernels need of a library: outputs, scratch memory, ready inputs."""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from subquad._dispatch import Array, Namespace
from subquad._reference._common import sum_to

try:
    from subquad import _core as _core
except ImportError as error:
    message = (
        "subquad._core, the compiled part of subquad, is missing or was built for "
        "another Python: reinstall subquad (python -m pip install --force-reinstall "
        f"subquad). The reason: {error}"
    )
    raise ImportError(message) from error

# Where arrays lie, as the compiled functions number it.
CPU, CUDA = 0, 1

_SERVED: dict[int, bool] = {}


def serves_cuda(device_id: int) -> bool:
    """Return whether kernels run on this CUDA device.

    The first call loads them, so that later ones may be captured in a CUDA graph.

    Raises
    ------
    RuntimeError
        If CUDA works, and the device does not.
    """
    served = _SERVED.get(device_id)
    if served is None:
        served = not _core.cuda_info()["problem"]
        if served:
            try:
                _core.cuda_prepare(device_id)
            except TypeError:
                # The library holds no kernels for this kind of device.
                served = False
        _SERVED[device_id] = served
    return served


# Below this, what the allocator keeps serves well enough.
_LEAST_RECYCLED = 1 << 18


class _Loan:
    """Memory of one array and of its views, which all keep this alive."""

    def __init__(self, block: Array, shape: tuple[int, ...], dtype: Any) -> None:
        self._block = block
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": dtype.str,
            "data": (block.ctypes.data, False),
        }


@dataclass
class _Block:
    """Memory, and whom it was lent to last."""

    memory: Array
    loan: weakref.ref[_Loan]


class RecycledMemory:
    """NumPy memory that is used again within a block of code.

    A loop that drops its large arrays and makes new ones pays for fresh pages each
    time, which the system has to clear: about 0.1 ms a megabyte.
    """

    # Blocks are looked for when one is wanted: a finalizer that gave them back could
    # swallow an interrupt.

    def __init__(self) -> None:
        self._local = threading.local()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Let arrays that this thread makes take the memory of those it dropped."""
        outer = getattr(self._local, "blocks", None)
        self._local.blocks = {}
        try:
            yield
        finally:
            self._local.blocks = outer

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        """Return new memory, or memory that was used before."""
        blocks = getattr(self._local, "blocks", None)
        if blocks is None:
            return np.empty(shape, dtype)
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        if size < _LEAST_RECYCLED:
            return np.empty(shape, dtype)
        known: list[_Block] = blocks.setdefault(size, [])
        block = next((block for block in known if block.loan() is None), None)
        memory = np.empty(size, np.uint8) if block is None else block.memory
        loan = _Loan(memory, tuple(shape), dtype)
        if block is None:
            known.append(_Block(memory, weakref.ref(loan)))
        else:
            block.loan = weakref.ref(loan)
        return np.asarray(loan)


class Memory(ABC):
    """One library's memory of the CPU, or of CUDA."""

    xp: Namespace
    place = CPU

    @property
    @abstractmethod
    def stream(self) -> int:
        """The address of the stream that calls are queued on; 0 for the CPU."""

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        """Return new memory."""

    @abstractmethod
    def scratch(self, size: int) -> Array:
        """Return this many bytes of new memory."""

    @abstractmethod
    def ready(self, array: Array) -> Array:
        """Return an array that the kernels can read: aligned, and its own class."""

    def largest_component(self, offsets: Array, n_samples: int) -> int:
        """Return a bound on the number of samples between two offsets."""
        del n_samples
        sizes = (int(offsets[a + 1] - offsets[a]) for a in range(offsets.shape[0] - 1))
        return max(sizes, default=0)

    def optional(self, array: Array | None) -> Array | None:
        return None if array is None else self.ready(array)

    def _gradients(
        self,
        needs: Sequence[bool],
        batch: tuple[int, ...],
        shapes: Sequence[tuple[int, ...]],
        dtype: Any,
    ) -> list[Array | None]:
        """Allocate the gradients that are wanted, over the whole batch."""
        return [
            self.empty((*batch, *shape), dtype) if needed else None
            for needed, shape in zip(needs, shapes, strict=True)
        ]

    def _summed(
        self, gradients: Sequence[Array | None], inputs: Sequence[Array | None]
    ) -> list[Array | None]:
        """Bring gradients from the shape of the whole batch to their inputs' shapes."""
        return [
            None
            if gradient is None or array is None
            else sum_to(self.xp, gradient, tuple(array.shape))
            for gradient, array in zip(gradients, inputs, strict=True)
        ]
