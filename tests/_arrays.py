"""One small interface over the array libraries that the tests run on."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

LIBRARIES = {
    "numpy": "numpy",
    "numpy-readonly": "numpy",
    "array_api_strict": "array_api_strict",
    "torch": "torch",
    "jax": "jax.numpy",
    "dask": "dask.array",
}


def uneven_chunks(size: int) -> tuple[int, ...]:
    """Cut `size` into unequal pieces, a piece of one element among them."""
    if size < 4:
        return (size,)
    first = size // 3
    return (first, 1, size - first - 1)


class Library(NamedTuple):
    """An array library: its name in `LIBRARIES` and its namespace."""

    name: str
    namespace: ModuleType

    def asarray(self, a: Any, dtype: Any = None) -> Any:
        return asarray(self, a, dtype)

    def array_type(self) -> type:
        return type(self.asarray(np.zeros(2)))


def asarray(xp: Library, a: Any, dtype: Any = None) -> Any:
    """The NumPy array `a` as an array of `xp`, in memory of its own."""
    a = np.array(a, dtype=dtype)
    if xp.name == "numpy":
        return a
    if xp.name == "numpy-readonly":
        a.flags.writeable = False
        return a
    if xp.name == "torch":
        return xp.namespace.from_numpy(a)
    if xp.name == "dask":
        chunks = tuple(uneven_chunks(size) for size in a.shape)
        return xp.namespace.from_array(a, chunks=chunks)
    return xp.namespace.asarray(a)


def to_numpy(a: Any) -> np.ndarray:
    """An array of any library as NumPy array."""
    if isinstance(a, np.ndarray):
        return a
    if hasattr(a, "detach"):
        return a.detach().resolve_neg().resolve_conj().numpy()
    if hasattr(a, "compute"):
        return np.asarray(a.compute())
    if type(a).__module__.startswith("array_api_strict"):
        return np.asarray(a._array)
    return np.asarray(a)
