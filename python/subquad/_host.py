"""Small arrays to and from host memory.

Statistics are few numbers beside the data they describe: estimators keep them as
float64 NumPy arrays whatever the library of the data, and hand them out in that
library.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _dispatch

Array: TypeAlias = Any
HostArray: TypeAlias = npt.NDArray[Any]


def to_host(array: Array) -> HostArray:
    """Return an array's values as a NumPy array, in the same memory if possible.

    Values of a floating type that NumPy lacks come as float32. Waits for the device.
    """
    if isinstance(array, np.ndarray):
        return array
    library = _dispatch.library_of(array)
    if library.name == "torch":
        tensor = array.detach()
        if tensor.dtype == library.xp.bfloat16:
            tensor = tensor.float()
        return np.asarray(tensor.cpu().resolve_conj().resolve_neg())
    if library.name == "dask":
        return np.asarray(array.compute())
    if library.name == "cupy":
        return np.asarray(array.get())
    if library.name != "jax":
        try:
            return np.from_dlpack(array)
        except (AttributeError, BufferError, RuntimeError, TypeError):
            pass
    host = np.asarray(array)
    return host.astype(np.float32) if host.dtype.kind == "V" else host


def from_host(array: HostArray, like: Array, dtype: Any = None) -> Array:
    """Return a NumPy array in the library and on the device of `like`.

    Dask arrays are given NumPy companions. 64-bit numbers become 32-bit where the
    library has no others.
    """
    library = _dispatch.library_of(like)
    if library.name in ("numpy", "dask"):
        return array if dtype is None else array.astype(dtype, copy=False)
    if library.name == "jax":
        # Asking JAX for 64-bit numbers while they are off warns, and gives 32-bit ones.
        import jax

        if dtype is None:
            dtype = jax.dtypes.canonicalize_dtype(array.dtype)
        # Inside a traced function the array is a number all the same, and may be kept.
        with jax.ensure_compile_time_eval():
            return library.xp.asarray(array, dtype=dtype)
    # torch refuses negative strides and warns of memory that it must not write to.
    plain = np.array(array, order="C", copy=True)
    return library.xp.asarray(plain, dtype=dtype, device=_dispatch.device_of(like))


def has_float64(like: Array) -> bool:
    """Return whether an array's library computes in float64 on its device."""
    library = _dispatch.library_of(like)
    if library.name == "jax":
        import jax

        return bool(jax.config.jax_enable_x64)
    return not (library.name == "torch" and like.device.type == "mps")
