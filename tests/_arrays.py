"""One small interface over the array libraries that the tests run on.

`SUBQUAD_TEST_DEVICE` chooses them. Unset: every library on the CPU. "cuda": those that
keep arrays on an NVIDIA GPU. "host": the stand-in of a CUDA array in `_cuda_double`,
whose kernels run on the host. "cpu": torch on the CPU, in the place of a device, which
tests the choice of tests and `carried`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

DEVICE = os.environ.get("SUBQUAD_TEST_DEVICE", "")

_LIBRARIES_OF_DEVICE = {
    "": {
        "numpy": "numpy",
        "numpy-readonly": "numpy",
        "array_api_strict": "array_api_strict",
        "torch": "torch",
        "jax": "jax.numpy",
        "dask": "dask.array",
    },
    "cuda": {"torch-cuda": "torch", "cupy": "cupy", "jax-cuda": "jax.numpy"},
    "host": {"cuda-on-host": "_cuda_double"},
    "cpu": {"torch": "torch"},
}
if DEVICE not in _LIBRARIES_OF_DEVICE:
    raise ValueError(
        f"SUBQUAD_TEST_DEVICE must be cuda, host, cpu or unset, got {DEVICE!r}"
    )
LIBRARIES = _LIBRARIES_OF_DEVICE[DEVICE]


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
    if xp.name == "torch-cuda":
        return xp.namespace.from_numpy(a).cuda()
    if xp.name == "dask":
        chunks = tuple(uneven_chunks(size) for size in a.shape)
        return xp.namespace.from_array(a, chunks=chunks)
    return xp.namespace.asarray(a)


def to_numpy(a: Any) -> np.ndarray:
    """An array of any library as NumPy array; it has to be where `DEVICE` says."""
    if isinstance(a, np.ndarray):
        return a
    if hasattr(a, "detach"):
        assert a.is_cuda or DEVICE != "cuda", "a result on the CPU"
        return a.detach().resolve_neg().resolve_conj().cpu().numpy()
    if hasattr(a, "compute"):
        return np.asarray(a.compute())
    if type(a).__module__.startswith("array_api_strict"):
        return np.asarray(a._array)
    if type(a).__module__.startswith("cupy"):
        return a.get()
    if hasattr(a, "to_numpy"):
        return a.to_numpy()
    if DEVICE == "cuda":
        assert {device.platform for device in a.devices()} == {"gpu"}, a.devices()
    return np.asarray(a)


def why_unusable(name: str, namespace: ModuleType) -> str | None:
    """Why a library that is installed has no device here; None where it has one."""
    if name == "torch-cuda" and not namespace.cuda.is_available():
        return "torch finds no CUDA device"
    if name == "cupy":
        try:
            found = namespace.cuda.runtime.getDeviceCount()
        except namespace.cuda.runtime.CUDARuntimeError as error:
            return f"CuPy finds no CUDA device: {error}"
        return None if found else "CuPy finds no CUDA device"
    if name == "jax-cuda":
        import jax

        if jax.default_backend() != "gpu":
            return "JAX finds no CUDA device"
    return None


# Modules of tests that are written with NumPy arrays: on a device, what they pass to
# the library is carried there, and what comes back is carried home.
CARRIED_MODULES = (
    "test_attention",
    "test_embedding_step",
    "test_features",
    "test_gaussian_normalizer",
    "test_normalizers",
    "test_primitives",
    "test_scans",
    "test_vjp",
)
# The first of these that is there carries.
CARRIERS = ("cupy", "torch-cuda", "cuda-on-host", "torch")


def _like(value: Any, parts: list[Any]) -> Any:
    """Return parts in a tuple or list of the kind of another one."""
    if hasattr(value, "_fields"):
        return type(value)(*parts)
    return type(value)(parts)


class Carrier:
    """Functions of NumPy arrays from functions of a library's arrays."""

    def __init__(self, xp: Library) -> None:
        self.xp = xp
        # The library calls its own public functions: those calls are left alone.
        self.inside = False

    def there(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return _like(value, [self.there(part) for part in value])
        if type(value) is np.ndarray:
            try:
                return self.xp.asarray(value)
            # What the library has no type for stays, and is refused with its message.
            except (TypeError, ValueError):
                return value
        return value

    def home(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return _like(value, [self.home(part) for part in value])
        assert type(value) is not np.ndarray, "a result on the CPU"
        return to_numpy(value) if type(value) is self.xp.array_type() else value

    def carried(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if self.inside:
                return function(*args, **options)
            args = tuple(self.there(value) for value in args)
            options = {key: self.there(value) for key, value in options.items()}
            self.inside = True
            try:
                return self.home(function(*args, **options))
            finally:
                self.inside = False

        return call
