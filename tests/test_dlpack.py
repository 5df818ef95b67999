"""Arrays of any library, as the compiled module borrows them."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref

import numpy as np
import pytest

from subquad import _core

KEYS = np.random.default_rng(0).standard_normal((7, 3))


def log_normalizer(x, y, out=None, **arrays):
    n, d = x.shape
    m = y.shape[0]
    out = np.empty(n, np.float64) if out is None else out
    workspace = np.empty(_core.log_normalizer_workspace(1, n, m, d, 8, 0), np.uint8)
    workspace = arrays.pop("workspace", workspace)
    log_weights = arrays.pop("log_weights", None)
    excluded = arrays.pop("excluded", None)
    assert not arrays
    _core.log_normalizer(x, y, log_weights, excluded, out, workspace, 0)
    return out


def exact(x, y):
    return np.log(np.exp(np.asarray(x) @ np.asarray(y).T).sum(axis=-1))


def copies(array):
    """The same numbers behind other strides."""
    n, d = array.shape
    yield "contiguous", np.ascontiguousarray(array)
    yield "transposed", np.asfortranarray(array)
    yield "reversed", np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]
    wide = np.full((2 * n, 3 * d), np.nan)
    wide[1::2, ::3] = array
    yield "strided", wide[1::2, ::3]
    readonly = array.copy()
    readonly.flags.writeable = False
    yield "read-only", readonly


# ---- the structures -----------------------------------------------------------------


class Version(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32)]


class Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    ]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class ManagedTensor(ctypes.Structure):
    pass


ManagedDeleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(ManagedTensor))
ManagedTensor._fields_ = [
    ("dl_tensor", Tensor),
    ("manager_ctx", ctypes.c_void_p),
    ("deleter", ManagedDeleter),
]


class ManagedTensorVersioned(ctypes.Structure):
    pass


VersionedDeleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(ManagedTensorVersioned))
ManagedTensorVersioned._fields_ = [
    ("version", Version),
    ("manager_ctx", ctypes.c_void_p),
    ("deleter", VersionedDeleter),
    ("flags", ctypes.c_uint64),
    ("dl_tensor", Tensor),
]


class ExchangeApi(ctypes.Structure):
    _fields_ = [
        ("version", Version),
        ("prev_api", ctypes.c_void_p),
        ("managed_tensor_allocator", ctypes.c_void_p),
        ("managed_tensor_from_py_object_no_sync", ctypes.c_void_p),
        ("managed_tensor_to_py_object_no_sync", ctypes.c_void_p),
        ("dltensor_from_py_object_no_sync", ctypes.c_void_p),
        ("current_work_stream", ctypes.c_void_p),
    ]


@pytest.mark.parametrize(
    "name, structure",
    [
        ("tensor", Tensor),
        ("managed_tensor", ManagedTensor),
        ("managed_tensor_versioned", ManagedTensorVersioned),
        ("exchange_api", ExchangeApi),
    ],
)
def test_layout(name, structure):
    offsets = tuple(getattr(structure, field[0]).offset for field in structure._fields_)
    assert _core._dlpack_layout()[name] == (ctypes.sizeof(structure), offsets)


# ---- a producer that exports what it is told ----------------------------------------

CPU, CUDA_HOST, ROCM = 1, 3, 10
READ_ONLY = 1

new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Producer:
    """Exports an array through DLPack as told, and counts what it gets back."""

    def __init__(
        self,
        array,
        *,
        versioned=True,
        device=CPU,
        dtype=None,
        data=None,
        strides=True,
        byte_offset=0,
        flags=0,
        major=1,
        ndim=None,
    ):
        self.array = array
        self.shape = array.shape
        self.versioned = versioned
        self.calls = []
        self.deleted = 0
        size = array.itemsize
        self.lengths = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.steps = (ctypes.c_int64 * array.ndim)(*(s // size for s in array.strides))
        code = {"i": 0, "u": 1, "f": 2, "b": 6}[array.dtype.kind]
        tensor = Tensor(
            array.ctypes.data - byte_offset if data is None else data,
            Device(device, 0),
            array.ndim if ndim is None else ndim,
            DataType(*(dtype or (code, 8 * size, 1))),
            self.lengths,
            self.steps if strides else None,
            byte_offset,
        )
        if versioned:
            deleter = VersionedDeleter(self.delete)
            self.managed = ManagedTensorVersioned(
                Version(major, 0), None, deleter, flags, tensor
            )
        else:
            self.managed = ManagedTensor(tensor, None, ManagedDeleter(self.delete))

    def delete(self, managed):
        self.deleted += 1

    def __dlpack__(self, **keywords):
        self.calls.append(keywords)
        if keywords and not self.versioned:
            raise TypeError("__dlpack__() got an unexpected keyword argument")
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        self.capsule = new_capsule(ctypes.addressof(self.managed), name, None)
        return self.capsule

    def __dlpack_device__(self):
        return (CPU, 0)


@pytest.mark.parametrize("versioned", [True, False])
def test_borrows_once_and_gives_back(versioned):
    x = np.random.default_rng(1).standard_normal((5, 3))
    producer = Producer(x, versioned=versioned)
    assert np.allclose(log_normalizer(producer, KEYS), exact(x, KEYS), rtol=1e-14)
    assert producer.deleted == 1
    asked = [{"max_version": (1, 0)}] if versioned else [{"max_version": (1, 0)}, {}]
    assert producer.calls == asked
    name = "used_dltensor_versioned" if versioned else "used_dltensor"
    assert f'"{name}"' in repr(producer.capsule)


@pytest.mark.parametrize("versioned", [True, False])
def test_no_strides_is_contiguous(versioned):
    x = np.random.default_rng(1).standard_normal((5, 3))
    producer = Producer(x, versioned=versioned, strides=False)
    assert np.allclose(log_normalizer(producer, KEYS), exact(x, KEYS), rtol=1e-14)


def test_byte_offset():
    x = np.random.default_rng(1).standard_normal((5, 3))
    producer = Producer(x, byte_offset=40)
    assert np.allclose(log_normalizer(producer, KEYS), exact(x, KEYS), rtol=1e-14)


def test_pinned_memory_is_memory_of_the_cpu():
    x = np.random.default_rng(1).standard_normal((5, 3))
    producer = Producer(x, device=CUDA_HOST)
    assert np.allclose(log_normalizer(producer, KEYS), exact(x, KEYS), rtol=1e-14)


@pytest.mark.parametrize(
    "told, error, message",
    [
        ({"device": ROCM}, TypeError, "^x: .*CPU or on CUDA.*device type 10"),
        ({"dtype": (2, 16, 1)}, TypeError, "^x: .*float32 or float64, got float16"),
        ({"dtype": (4, 16, 1)}, TypeError, "^x: .*float32 or float64, got bfloat16"),
        ({"dtype": (4, 32, 1)}, TypeError, "^x: .*type code 4 of 32 bits"),
        ({"dtype": (5, 64, 1)}, TypeError, "^x: .*type code 5 of 64 bits"),
        ({"dtype": (2, 32, 2)}, TypeError, "^x: .* 2 lanes"),
        ({"major": 2}, TypeError, "^x: .*major version 1, got 2"),
        ({"data": 0}, ValueError, "^x: .*address of the elements, got none"),
        ({"ndim": 65}, ValueError, "^x: .*dimensions, got 65"),
    ],
)
def test_rejects_and_gives_back(told, error, message):
    producer = Producer(np.zeros((5, 3)), **told)
    with pytest.raises(error, match=message):
        log_normalizer(producer, KEYS)
    assert producer.deleted == 1


def test_first_arguments_go_back_when_a_later_one_is_wrong():
    first, second = Producer(np.zeros((5, 3))), Producer(np.zeros((5, 3)), device=ROCM)
    with pytest.raises(TypeError, match=r"^y: "):
        log_normalizer(first, second)
    assert (first.deleted, second.deleted) == (1, 1)


def test_arguments_go_back_when_the_kernel_refuses():
    producer = Producer(np.zeros((5, 4)))
    with pytest.raises(ValueError, match=r"^[xy]"):
        log_normalizer(producer, KEYS)
    assert producer.deleted == 1


@pytest.mark.parametrize("argument", ["out", "workspace"])
def test_read_only_output(argument):
    arrays = {"out": np.empty(5), "workspace": np.empty(1 << 16, np.uint8)}
    arrays[argument] = Producer(arrays[argument], flags=READ_ONLY)
    with pytest.raises(ValueError, match=rf"^{argument}: .*writable.*read-only"):
        log_normalizer(np.zeros((5, 3)), KEYS, **arrays)


def test_read_only_numpy_output():
    out = np.empty(5)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out: .*writable.*read-only"):
        log_normalizer(np.zeros((5, 3)), KEYS, out=out)


def test_read_only_inputs_of_every_kind():
    x, weights = np.zeros((5, 3)), np.zeros(7)
    excluded = np.full(5, -1)
    for array in (x, weights, excluded):
        array.flags.writeable = False
    out = log_normalizer(x, KEYS, log_weights=weights, excluded=excluded)
    assert np.allclose(out, np.log(7.0), rtol=1e-15)


class Without:
    shape = (5, 3)


class Broken(Without):
    def __dlpack__(self, **keywords):
        return "not a capsule"


class Used(Without):
    def __init__(self):
        self.capsule = Producer(np.zeros((5, 3)))
        self.capsule.__dlpack__()
        log_normalizer(self.capsule, KEYS)

    def __dlpack__(self, **keywords):
        return self.capsule.capsule


class Refuses(Without):
    def __dlpack__(self, **keywords):
        raise BufferError("cannot export this")


class Raises(Without):
    def __dlpack__(self, **keywords):
        raise RuntimeError("of its own")


class RaisesTypeError(Without):
    def __dlpack__(self, **keywords):
        raise TypeError("of its own")


@pytest.mark.parametrize(
    "kind, error, message",
    [
        (
            Without,
            TypeError,
            "^x: expected an array that supports DLPack, got .*Without",
        ),
        (Broken, TypeError, "^x: expected __dlpack__ to return .* got str"),
        (Used, TypeError, "^x: expected __dlpack__ to return an unused"),
        (Refuses, TypeError, "^x: DLPack does not export this .*Refuses"),
        (Raises, RuntimeError, "^of its own"),
        (RaisesTypeError, TypeError, "^of its own"),
    ],
)
def test_rejects_objects(kind, error, message):
    with pytest.raises(error, match=message) as raised:
        log_normalizer(kind(), KEYS)
    if kind is Refuses:
        assert isinstance(raised.value.__cause__, BufferError)


# ---- NumPy --------------------------------------------------------------------------


@pytest.mark.parametrize("x_kind", range(5))
@pytest.mark.parametrize("y_kind", range(5))
def test_strides(x_kind, y_kind):
    x = np.random.default_rng(1).standard_normal((6, 3))
    _, x_copy = list(copies(x))[x_kind]
    _, y_copy = list(copies(KEYS))[y_kind]
    assert np.array_equal(x_copy, x)
    assert np.array_equal(y_copy, KEYS)
    assert np.allclose(log_normalizer(x_copy, y_copy), exact(x, KEYS), rtol=1e-14)


def test_broadcast_rows():
    x = np.broadcast_to(np.array([0.5, -1.0, 2.0]), (6, 3))
    weights = np.broadcast_to(np.float64(0.25), 7)
    out = log_normalizer(x, KEYS, log_weights=weights)
    assert np.allclose(out, exact(x, KEYS) + 0.25, rtol=1e-14)


@pytest.mark.parametrize("step", [2, -1])
def test_strided_output(step):
    x = np.random.default_rng(1).standard_normal((6, 3))
    whole = np.full(12, -7.0)
    out = whole[:12:2] if step == 2 else whole[5::-1]
    log_normalizer(x, KEYS, out=out)
    assert np.allclose(out, exact(x, KEYS), rtol=1e-14)
    assert np.count_nonzero(whole == -7.0) == 6


@pytest.mark.parametrize("argument", ["x", "y", "log_weights", "excluded", "out"])
def test_unaligned(argument):
    arrays = {
        "x": np.zeros((5, 3)),
        "y": KEYS,
        "log_weights": np.zeros(7),
        "excluded": np.full(5, -1),
        "out": np.empty(5),
    }
    array = arrays[argument]
    raw = np.zeros(array.nbytes + 1, np.uint8)
    arrays[argument] = raw[1:].view(array.dtype).reshape(array.shape)
    with pytest.raises(ValueError, match=rf"^{argument}: .*aligned"):
        log_normalizer(**arrays)


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.int64, bool, complex])
def test_element_types(dtype):
    with pytest.raises(TypeError, match=r"^x: "):
        log_normalizer(np.zeros((5, 3), dtype), KEYS)


def test_swapped_bytes():
    with pytest.raises(TypeError, match=r"^x: "):
        log_normalizer(np.zeros((5, 3), ">f8"), KEYS)


@pytest.mark.parametrize(
    "argument", ["y", "log_weights", "excluded", "out", "workspace"]
)
def test_element_types_agree(argument):
    arrays = {
        "y": KEYS.astype(np.float32),
        "log_weights": np.zeros(7, np.float32),
        "excluded": np.zeros(5),
        "out": np.empty(5, np.float32),
        "workspace": np.empty(1 << 16),
    }
    wrong = {"y": KEYS} | {argument: arrays[argument]}
    with pytest.raises(TypeError, match=rf"^{argument}"):
        log_normalizer(np.zeros((5, 3)), **wrong)


def test_leaves_no_reference():
    x, out = np.zeros((5, 3)), np.empty(5)
    log_normalizer(x, KEYS, out=out)
    before = [sys.getrefcount(a) for a in (x, KEYS, out)]
    for _ in range(10):
        log_normalizer(x, KEYS, out=out)
        with pytest.raises(TypeError):
            log_normalizer(x, KEYS.astype(np.float32), out=out)
    assert [sys.getrefcount(a) for a in (x, KEYS, out)] == before


# ---- torch and JAX ------------------------------------------------------------------


def test_torch():
    torch = pytest.importorskip("torch")
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3)
    out = torch.empty(6, dtype=torch.float64)
    log_normalizer(x, torch.from_numpy(KEYS), out=out)
    assert np.allclose(out.numpy(), exact(x, KEYS), rtol=1e-14)
    flipped = x.T.contiguous().T
    log_normalizer(flipped, torch.from_numpy(KEYS), out=out)
    assert np.allclose(out.numpy(), exact(x, KEYS), rtol=1e-14)
    # A subclass goes through its own __dlpack__.
    parameter = torch.nn.Parameter(x)
    with pytest.raises(TypeError, match=r"^x: DLPack does not export this"):
        log_normalizer(parameter, KEYS)


def test_torch_subclass_is_asked_itself():
    torch = pytest.importorskip("torch")

    class Special(torch.Tensor):
        def __dlpack__(self, **keywords):
            raise BufferError("no memory of its own")

    x = torch.zeros((6, 3), dtype=torch.float64).as_subclass(Special)
    with pytest.raises(TypeError, match=r"^x: DLPack does not export this"):
        log_normalizer(x, KEYS)


def test_torch_leaves_no_reference():
    torch = pytest.importorskip("torch")
    x = torch.zeros((6, 3), dtype=torch.float64)
    storage = weakref.ref(x.untyped_storage())
    for _ in range(10):
        log_normalizer(x, KEYS)
    assert sys.getrefcount(x) == 2
    use_count = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    log_normalizer(x, KEYS)
    assert torch._C._storage_Use_Count(x.untyped_storage()._cdata) == use_count
    del x
    gc.collect()
    assert storage() is None


def test_jax_legacy_capsules():
    jax = pytest.importorskip("jax")
    x = jax.numpy.linspace(-1.0, 1.0, 18).reshape(6, 3)
    y = jax.numpy.asarray(KEYS)
    assert x.dtype == np.float64
    assert np.allclose(log_normalizer(x, y), exact(x, KEYS), rtol=1e-14)


class Legacy:
    """NumPy's own capsules of the time before DLPack 1.0."""

    def __init__(self, array):
        self.array = array
        self.shape = array.shape

    def __dlpack__(self):
        return self.array.__dlpack__()


def test_numpy_legacy_capsules():
    x = np.random.default_rng(1).standard_normal((6, 3))
    before = sys.getrefcount(x)
    out = log_normalizer(Legacy(x), Legacy(KEYS[::-1]))
    assert np.allclose(out, exact(x, KEYS), rtol=1e-14)
    assert sys.getrefcount(x) == before
