"""CUDA without a GPU: arrays that say they are on a device, a CuPy made of them.

An array's memory is the host's, which nobody may know: what leaves it for the host, or
enters it from there, is counted, and implicit conversions are refused, as CuPy does.
Its DLPack capsule is NumPy's with the device replaced. The recorder is a CUDA library
without kernels, built from the boundary's own sources, that writes down its calls.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import operator
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from subquad import _core

KDL_CUDA = 2
CUDA_MANAGED = 13

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def on_device(
    capsule: Any, versioned: bool, device: tuple[int, int], code: int | None = None
) -> Any:
    """Write another device, and another type code, into a new DLPack capsule."""
    layout = _core._dlpack_layout()
    kind, place = (
        ("managed_tensor_versioned", 4) if versioned else ("managed_tensor", 0)
    )
    name = b"dltensor_versioned" if versioned else b"dltensor"
    tensor = _pointer(capsule, name) + layout[kind][1][place]
    offsets = layout["tensor"][1]
    (ctypes.c_int32 * 2).from_address(tensor + offsets[1])[:] = device
    if code is not None:
        ctypes.c_uint8.from_address(tensor + offsets[3]).value = code
    return capsule


class Traffic:
    """How often values crossed between host and device."""

    def __init__(self) -> None:
        self.to_device = 0
        self.to_host = 0

    def clear(self) -> None:
        self.to_device = self.to_host = 0


TRAFFIC = Traffic()


class Device:
    """As cupy.cuda.Device: a context in which new arrays lie there."""

    current = 0

    def __init__(self, device: int | Device | None = None) -> None:
        if isinstance(device, Device):
            device = device.id
        self.id = Device.current if device is None else device

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __enter__(self) -> Device:
        self._before = Device.current
        Device.current = self.id
        return self

    def __exit__(self, *_: object) -> None:
        Device.current = self._before

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"


class Stream:
    """As cupy.cuda.Stream: current for the device that it was made on."""

    current: ClassVar[dict[int, Stream]] = {}

    def __init__(self, ptr: int = 0) -> None:
        self.ptr = ptr
        self.device = Device.current

    def __enter__(self) -> Stream:
        self._before = get_current_stream(self.device)
        Stream.current[self.device] = self
        return self

    def __exit__(self, *_: object) -> None:
        Stream.current[self.device] = self._before


def get_current_stream(device_id: int | None = None) -> Stream:
    device = Device.current if device_id is None else device_id
    return Stream.current.get(device) or Stream()


class Array:
    """An array on a device, in the place of cupy.ndarray."""

    __array_priority__ = 100
    last_export: ClassVar[dict[str, Any]] = {}

    def __init__(self, host: Any, device: int | None = None, code: int | None = None):
        self._host = np.asarray(host)
        self.device = Device(device)
        # The DLPack type code where NumPy lacks the type.
        self._code = code

    dtype = property(lambda self: self._host.dtype)
    shape = property(lambda self: self._host.shape)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    T = property(lambda self: wrap(self._host.T, self))
    mT = property(  # noqa: N815
        lambda self: wrap(np.matrix_transpose(self._host), self)
    )

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self._host.ctypes.data)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (KDL_CUDA, self.device.id)

    def __dlpack__(self, *, stream: int | None = None, max_version: Any = None) -> Any:
        Array.last_export = {"stream": stream, "max_version": max_version}
        versioned = max_version is not None
        capsule = (
            self._host.__dlpack__(max_version=(1, 0))
            if versioned
            else self._host.__dlpack__()
        )
        return on_device(capsule, versioned, self.__dlpack_device__(), self._code)

    def get(self) -> np.ndarray:
        TRAFFIC.to_host += 1
        return self._host.copy()

    def __array__(self, *_: Any, **__: Any) -> Any:
        message = "Implicit conversion to a NumPy array is not allowed."
        raise TypeError(message)

    def _number(self, kind: type) -> Any:
        TRAFFIC.to_host += 1
        return kind(self._host)

    def __bool__(self) -> bool:
        return self._number(bool)

    def __int__(self) -> int:
        return self._number(int)

    def __index__(self) -> int:
        return self._number(operator.index)

    def __float__(self) -> float:
        return self._number(float)

    def __len__(self) -> int:
        return len(self._host)

    def __getitem__(self, key: Any) -> Array:
        return wrap(self._host[_bare(key)], self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._host[_bare(key)] = _bare(value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(self._host, name)
        if not callable(method):
            return method
        return functools.partial(_applied, method, self)

    def __repr__(self) -> str:
        return f"array of {self.dtype} {self.shape} on {self.device}"


Array.__module__, Array.__name__ = "cupy", "ndarray"


def _operator(name: str) -> Any:
    def applied(self: Array, *others: Any) -> Any:
        return _applied(getattr(self._host, name), self, *others)

    return applied


for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
):
    for _side in ("", "r", "i"):
        setattr(Array, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert"):
    setattr(Array, f"__{_name}__", _operator(f"__{_name}__"))


def wrap(value: Any, like: Array | None) -> Any:
    """Return NumPy's results as arrays on a device."""
    if isinstance(value, (np.ndarray, np.generic)):
        return Array(value, None if like is None else like.device.id)
    if isinstance(value, tuple):
        parts = [wrap(v, like) for v in value]
        kind = type(value)
        return kind(*parts) if hasattr(value, "_fields") else kind(parts)
    if isinstance(value, list):
        return [wrap(v, like) for v in value]
    return value


def _bare(value: Any) -> Any:
    """Return what NumPy is to compute with; its own arrays are not taken."""
    if isinstance(value, Array):
        return value._host
    if isinstance(value, np.ndarray):
        message = "Unsupported type <class 'numpy.ndarray'>"
        raise TypeError(message)
    if isinstance(value, (tuple, list)):
        parts = [_bare(v) for v in value]
        return type(value)(parts)
    if isinstance(value, slice):
        return value
    return value


def _arrays(values: Any) -> Iterator[Array]:
    for value in values:
        if isinstance(value, Array):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _arrays(value)


def _applied(function: Any, *arguments: Any, **keywords: Any) -> Any:
    found = list(_arrays([*arguments, *keywords.values()]))
    if len({array.device for array in found}) > 1:
        message = f"Array device must be same: got {[a.device for a in found]}"
        raise ValueError(message)
    if isinstance(getattr(function, "__self__", None), np.ndarray):
        # A method of NumPy's array, bound to the memory of the first argument.
        arguments = arguments[1:]
    result = function(
        *(_bare(a) for a in arguments), **{k: _bare(v) for k, v in keywords.items()}
    )
    return wrap(result, found[0] if found else None)


def _asarray(a: Any, dtype: Any = None, **keywords: Any) -> Array:
    keywords.pop("blocking", None)
    if isinstance(a, Array):
        if dtype is None or a.dtype == np.dtype(dtype):
            return a if not keywords.get("copy") else Array(a._host.copy())
        return Array(a._host.astype(dtype))
    if isinstance(a, np.ndarray):
        TRAFFIC.to_device += 1
    return Array(np.array(a, dtype=dtype, copy=True))


def stand_in() -> types.ModuleType:
    """Return a module to take CuPy's place."""
    cupy = types.ModuleType("cupy")
    for name in dir(np):
        value = getattr(np, name)
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        if isinstance(value, type) or not callable(value):
            setattr(cupy, name, value)
        else:
            setattr(cupy, name, functools.partial(_applied, value))
    for name in ("finfo", "iinfo", "result_type", "can_cast", "dtype", "isdtype"):
        setattr(cupy, name, getattr(np, name))
    for name in ("linalg", "fft"):
        part = types.ModuleType(f"cupy.{name}")
        for inner in getattr(np, name).__all__:
            setattr(
                part,
                inner,
                functools.partial(_applied, getattr(np, name).__dict__[inner]),
            )
        setattr(cupy, name, part)
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    cupy.ndarray = Array
    cupy.array = cupy.asarray = _asarray
    cupy.cuda = types.ModuleType("cupy.cuda")
    cupy.cuda.device = types.ModuleType("cupy.cuda.device")
    cupy.cuda.Device = cupy.cuda.device.Device = Device
    cupy.cuda.Stream = Stream
    cupy.cuda.get_current_stream = get_current_stream
    cupy.__all__ = [name for name in vars(cupy) if not name.startswith("_")]
    return cupy


def installed_cupy() -> types.ModuleType:
    """Return the stand-in, which is where `import cupy` finds it from now on."""
    known = sys.modules.get("cupy")
    if known is not None:
        return known
    cupy = stand_in()
    parts = (cupy, cupy.cuda, cupy.cuda.device, cupy.linalg, cupy.fft)
    sys.modules.update({part.__name__: part for part in parts})
    return cupy


# -------- a CUDA library that writes down its calls

ROOT = Path(__file__).resolve().parent.parent


class _SeenArray(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("present", "dtype", "device")),
        *((name, ctypes.c_int32) for name in ("device_id", "ndim")),
        ("shape", ctypes.c_int64 * 4),
        ("data", ctypes.c_void_p),
    )


class _SeenCall(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_char * 64),
        ("stream", ctypes.c_void_p),
        ("device_id", ctypes.c_int32),
        ("n_arrays", ctypes.c_int32),
        ("arrays", _SeenArray * 16),
    )


class _Info(ctypes.Structure):
    _fields_ = (
        *((f"{name}_version", ctypes.c_int32) for name in ("runtime", "driver")),
        ("device_count", ctypes.c_int32),
        ("architectures", ctypes.c_char * 64),
        ("problem", ctypes.c_char * 256),
    )


class Call:
    """One call of the recorder: its function, stream, device and arrays.

    The arrays are None where left out, the workspace is the last one.
    """

    def __init__(self, seen: _SeenCall) -> None:
        self.function = seen.function.decode()
        self.stream = seen.stream or 0
        self.device_id = seen.device_id
        self.arrays = []
        for array in seen.arrays[: seen.n_arrays]:
            if not array.present:
                self.arrays.append(None)
                continue
            self.arrays.append(
                types.SimpleNamespace(
                    dtype=DTYPES[array.dtype],
                    place=(array.device, array.device_id),
                    shape=tuple(array.shape[: array.ndim]),
                    data=array.data or 0,
                )
            )


DTYPES = ("float32", "float64", "int64", "uint8", "float16", "bfloat16", "int32")
OK, INVALID_ARGUMENT, TYPE_ERROR, OUT_OF_MEMORY, INTERNAL_ERROR, DEVICE_ERROR = range(6)


class Recorder:
    """The recorder as this process has it loaded."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)

    def _variable(self, kind: Any, name: str) -> Any:
        return kind.in_dll(self._library, f"recorder_{name}")

    def calls(self) -> list[Call]:
        """Return the calls since this was last asked."""
        n = self._variable(ctypes.c_int32, "n_calls")
        found = self._variable(_SeenCall * 256, "calls")[: n.value]
        n.value = 0
        return [Call(seen) for seen in found]

    def prepared(self) -> list[int]:
        """Return the devices whose kernels were asked to be loaded."""
        n = self._variable(ctypes.c_int32, "n_prepared").value
        return self._variable(ctypes.c_int32 * 16, "prepared")[:n]

    def reset(self) -> None:
        self._variable(ctypes.c_int32, "n_calls").value = 0
        self._variable(ctypes.c_int32, "n_prepared").value = 0
        self.answer(OK, "")
        self.answer(OK, "", prepare=True)

    def answer(self, status: int, message: str, *, prepare: bool = False) -> None:
        name = "prepare_status" if prepare else "status"
        self._variable(ctypes.c_int32, name).value = status
        self._variable(ctypes.c_char * 512, "message").value = message.encode()

    @property
    def info(self) -> _Info:
        return self._variable(_Info, "info")


def compile_recorder(path: Path, version: str) -> None:
    """Build the recorder."""
    includes = (
        "cpp/include",
        "cpp/src",
        "cpp/src/kernels",
        "cpp/src/cuda",
        "cpp/tests",
    )
    command = [
        shutil.which("g++") or "c++",
        *("-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-w"),
        *("-DSUBQUAD_FOR_CUDA", f'-DRECORDER_VERSION="{version}"'),
        *(f"-I{ROOT / include}" for include in includes),
        *(ROOT / "cpp/tests/cuda_recorder.cpp", ROOT / "cpp/src/c_api_normalizers.cpp"),
        *("-o", path),
    ]
    subprocess.run([str(part) for part in command], check=True)


def compile_c(path: Path, text: str) -> None:
    source = path.with_suffix(".c")
    source.write_text(text)
    compiler = shutil.which("cc") or "gcc"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", path], check=True)
