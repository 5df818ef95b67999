"""Arrays on CUDA, from the public functions to the CUDA library, without a GPU.

Which library is loaded holds for a process: scenarios run in processes that load one.
Most of them load the recorder, which has the boundary of the real library and no
kernels.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import _cuda_double as double
import _feature_formulas as features
import subquad as sq
from _oracle import assert_within, sum_to
from subquad import _core

SCENARIOS: dict[str, dict[str, Callable[[], None]]] = {}
MISSING = "/nowhere/libsubquad_cuda.so"


def scenario(library: str, alone: bool = False):
    """Enter a function to run in a process with that library.

    It shares the process with the other scenarios of the library, unless what it leaves
    behind, or finds, would differ.
    """

    def enter(function):
        name = function.__name__
        SCENARIOS.setdefault(f"{library}: {name}" if alone else library, {})[name] = (
            function
        )
        return function

    return enter


def run_scenarios(process):
    """Run the scenarios of a process, and print what went wrong with each."""
    outcomes = {}
    for name, function in SCENARIOS[process].items():
        try:
            _start_anew()
            function()
            outcomes[name] = ""
        except pytest.skip.Exception as skipped:
            outcomes[name] = f"skipped: {skipped}"
        except (Exception, pytest.fail.Exception):  # noqa: BLE001
            outcomes[name] = traceback.format_exc()
    print("\n" + json.dumps(outcomes))


def _start_anew():
    if "recorder" in os.environ.get("SUBQUAD_CUDA_LIBRARY", "") and _is_loaded():
        recorder().reset()
    compiled = sys.modules.get("subquad._backends.compiled")
    if compiled is not None:
        compiled.memory._SERVED.clear()
    double.TRAFFIC.clear()


def _is_loaded():
    return os.environ["SUBQUAD_CUDA_LIBRARY"] in Path("/proc/self/maps").read_text()


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Paths of the libraries that scenarios load, by name."""
    directory = tmp_path_factory.mktemp("libraries")
    paths = {"missing": MISSING, "beside": ""}
    for name in ("recorder", "other version", "incomplete", "broken", "stranger"):
        paths[name] = directory / f"lib_{name.replace(' ', '_')}.so"
    double.compile_recorder(paths["recorder"], sq.__version__)
    double.compile_recorder(paths["other version"], "0.0.0")
    double.compile_c(
        paths["incomplete"],
        f'const char* subquad_version(void) {{ return "{sq.__version__}"; }}',
    )
    double.compile_c(paths["stranger"], "int answer(void) { return 42; }")
    paths["broken"].write_text("no library\n")
    built = sorted(double.ROOT.glob("build/dev/**/libsubquad_cuda_on_host.so"))
    paths["on host"] = built[0] if built else None
    return paths


@pytest.fixture(scope="module")
def outcomes(libraries):
    """Run a process when a test first asks for one of its scenarios."""

    @functools.cache
    def run(process):
        library = libraries[process.partition(":")[0]]
        if library is None:
            pytest.skip("the C++ tests are not built: no kernels on the host")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        environment["SUBQUAD_CUDA_LIBRARY"] = str(library)
        code = f"import test_cuda_boundary as t; t.run_scenarios({process!r})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def recorder():
    return double.Recorder(os.environ["SUBQUAD_CUDA_LIBRARY"])


def on_cuda(shape, dtype=np.float64, device=0, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return double.Array(values.astype(dtype), device)


def arguments(n=4, m=5, d=3, dtype=np.float64, device=0):
    """Return x, y, log_weights, excluded, out and workspace on a device."""
    return [
        on_cuda((n, d), dtype, device),
        on_cuda((m, d), dtype, device),
        on_cuda(m, dtype, device),
        double.Array(np.full(n, -1), device),
        on_cuda(n, dtype, device),
        double.Array(np.zeros(1 << 16, np.uint8), device),
    ]


# -------- the compiled module


@scenario("recorder")
def calls_reach_the_library():
    arrays = arguments(device=1)
    _core.log_normalizer(*arrays, 0xABC0)
    (call,) = recorder().calls()
    assert call.function == "log_normalizer"
    assert call.stream == 0xABC0
    assert call.device_id == 1
    assert [a.place for a in call.arrays] == [(1, 1)] * 6
    assert [a.dtype for a in call.arrays] == (
        ["float64"] * 3 + ["int64", "float64", "uint8"]
    )
    assert [a.shape for a in call.arrays] == [a.shape for a in arrays]
    # No copies: the memory is the caller's.
    assert [a.data for a in call.arrays] == [a.data.ptr for a in arrays]
    assert np.all(arrays[4].get() == 7)


@scenario("recorder")
def every_function_is_forwarded():
    x, y, w, e, out, scratch = arguments()
    counts = on_cuda((5,))
    factors, own, offsets = on_cuda((5, 3, 2)), double.Array(np.zeros(4, int)), e
    square, scatter = on_cuda((4, 5)), on_cuda((5, 3, 3))
    calls = {
        "log_normalizer": (x, y, w, e, out, scratch),
        "log_normalizer_vjp": (out, x, y, w, e, out, x, y, w, scratch),
        "gaussian_log_normalizer": (
            *(x, counts, y, factors, y, own, out, True, out, scratch),
        ),
        "gaussian_log_normalizer_vjp": (
            *(out, x, counts, y, factors, y, out, x, counts, y, factors, y, scratch),
        ),
        "gaussian_score_moments": (x, y, factors, y, square, square, scratch),
        "nearest_centroids": (x, y, w, own, out, scratch),
        "component_sums": (x, own, out, counts, y, scratch),
        "component_scatter": (x, own, out, y, scatter, counts, scratch),
        "sample_residuals": (
            *(x, y, w, offsets, square, square, square, e, True),
            *(square, square, square, scratch),
        ),
    }
    for name, given in calls.items():
        getattr(_core, name)(*given, 5)
        (call,) = recorder().calls()
        arrays = [a for a in given if not isinstance(a, bool)]
        assert call.function == name
        assert call.stream == 5, name
        assert [a.data for a in call.arrays] == [a.data.ptr for a in arrays], name
    sizes = {
        "log_normalizer_vjp": (1, 2, 3, 4, 8),
        "gaussian_log_normalizer": (1, 2, 3, 4, 5, 8),
        "gaussian_log_normalizer_vjp": (1, 2, 3, 4, 5, 8),
        "gaussian_score_moments": (1, 2, 3, 4, 8),
        "nearest_centroids": (1, 2, 3, 8),
        "component_sums": (1, 2, 3, 8),
        "component_scatter": (1, 2, 3, 8, True),
    }
    found = [getattr(_core, f"{name}_workspace")(*s, 1) for name, s in sizes.items()]
    assert found == list(range(11, 18))
    assert _core.component_scatter_workspace(1, 2, 3, 8, False, 1) == 18
    assert _core.sample_residuals_workspace(1, 2, 33, 8, 1) == 33
    assert _core.log_normalizer_workspace(1, 2, 3, 4, 8, 1) == 1020348
    assert _core.log_normalizer_workspace(1, 2, 3, 4, 8, 0) != 1020348
    assert _core.log_normalizer_workspace(1, 2, 3, 4, 8, 2) == 0


@scenario("recorder")
def optional_arrays_are_left_out():
    x, y, _, _, out, scratch = arguments()
    _core.log_normalizer(x, y, None, None, out, scratch, 0)
    (call,) = recorder().calls()
    assert [a is None for a in call.arrays] == [False, False, True, True, False, False]


class Old:
    """A producer from before DLPack 1.0, which knows no versions."""

    def __init__(self, array, device_type=double.KDL_CUDA):
        self.array = array
        self.device_type = device_type
        self.streams = []

    def __dlpack_device__(self):
        return (self.device_type, self.array.device.id)

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        capsule = self.array._host.__dlpack__()
        return double.on_device(capsule, False, self.__dlpack_device__())


@scenario("recorder")
def producers_are_told_not_to_wait():
    given = arguments(device=1)
    _core.log_normalizer(*given, 0)
    exported = double.Array.last_export
    assert exported == {"stream": -1, "max_version": (1, 0)}
    for device_type in (double.KDL_CUDA, double.CUDA_MANAGED):
        old = Old(given[0], device_type)
        recorder().calls()
        _core.log_normalizer(old, *given[1:], 0)
        (call,) = recorder().calls()
        assert old.streams == [-1]
        assert call.arrays[0].place == (1, 1)


@scenario("recorder")
def half_precision():
    x, y, w, e, out, scratch = arguments(dtype=np.float32)
    for code, name in ((2, "float16"), (4, "bfloat16")):
        halves = [
            double.Array(np.zeros(a.shape, np.float16), code=code) for a in (x, y)
        ]
        _core.log_normalizer(*halves, w, e, out, scratch, 0)
        (call,) = recorder().calls()
        types = [a.dtype for a in call.arrays[:3]]
        assert types == [name, name, "float32"]


@scenario("recorder")
def read_only_outputs():
    arrays = arguments()
    arrays[4]._host.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out: .*writable.*read-only"):
        _core.log_normalizer(*arrays, 0)
    arrays = arguments()
    arrays[0]._host.flags.writeable = False
    _core.log_normalizer(*arrays, 0)


@scenario("recorder")
def arrays_of_one_call_lie_in_one_place():
    names = ("x", "y", "log_weights", "excluded", "out", "workspace")
    for place, name in enumerate(names[1:], 1):
        mixed = arguments()
        mixed[place].device = double.Device(1)
        expected = (
            rf"^{name}: expected an array on CUDA device 0, where x is, "
            "got one on CUDA device 1$"
        )
        with pytest.raises(TypeError, match=expected):
            _core.log_normalizer(*mixed, 0)
        mixed[place] = mixed[place]._host
        expected = f"^{name}: .*CUDA device 0, where x is, got one in memory of the CPU"
        with pytest.raises(TypeError, match=expected):
            _core.log_normalizer(*mixed, 0)
        hosts = [a._host for a in arguments()]
        hosts[place] = double.Array(hosts[place], 1)
        expected = (
            rf"^{name}: expected an array in memory of the CPU, where x is, "
            "got one on CUDA device 1$"
        )
        with pytest.raises(TypeError, match=expected):
            _core.log_normalizer(*hosts, 0)
    assert recorder().calls() == []


@scenario("recorder")
def the_library_checks_what_the_cpu_checks():
    arrays = arguments()
    odd = np.zeros(8 * 12 + 4, np.uint8)[4:].view(np.float64)
    if odd.ctypes.data % 8 == 0:
        odd = np.zeros(8 * 12 + 8, np.uint8)[4:-4].view(np.float64)
    with pytest.raises(ValueError, match=r"^x: .*aligned"):
        _core.log_normalizer(double.Array(odd.reshape(4, 3)), *arrays[1:], 0)
    with pytest.raises(TypeError, match=r"^x: .*memory of the CPU"):
        _core.vector_math("exp", on_cuda(4), on_cuda(4))


@scenario("recorder")
def wrong_device_index():
    with pytest.raises(RuntimeError, match="CUDA device 2: invalid device ordinal"):
        _core.log_normalizer(*arguments(device=2), 0)


@scenario("recorder")
def errors_of_the_library():
    kinds = {
        double.INVALID_ARGUMENT: ValueError,
        double.TYPE_ERROR: TypeError,
        double.OUT_OF_MEMORY: MemoryError,
        double.INTERNAL_ERROR: RuntimeError,
        double.DEVICE_ERROR: RuntimeError,
    }
    for status, kind in kinds.items():
        recorder().answer(status, f"what is wrong: {status}")
        with pytest.raises(kind, match=f"^what is wrong: {status}$"):
            _core.log_normalizer(*arguments(), 0)
    recorder().answer(double.OK, "")
    _core.log_normalizer(*arguments(), 0)


@scenario("recorder")
def query_and_prepare():
    assert _core.cuda_info() == {
        "runtime_version": 13000,
        "driver_version": 13010,
        "device_count": 2,
        "architectures": "sm_90 compute_120",
        "problem": "",
    }
    _core.cuda_prepare(1)
    assert recorder().prepared() == [1]
    recorder().answer(double.DEVICE_ERROR, "no such device", prepare=True)
    with pytest.raises(RuntimeError, match="^no such device$"):
        _core.cuda_prepare(9)


# -------- no library, or none that works


def refused(message):
    """Check what the compiled module says of arrays on CUDA, and that others work."""
    with pytest.raises(TypeError, match=message):
        _core.log_normalizer(*arguments(), 0)
    with pytest.raises(TypeError, match=message.replace("^x: ", "^")):
        _core.cuda_prepare(0)
    assert _core.log_normalizer_workspace(1, 2, 3, 4, 8, 1) == 0
    info = _core.cuda_info()
    assert not info["runtime_version"]
    assert not info["architectures"]
    assert re.match(message, f"x: {info['problem']}")
    _core.log_normalizer(*(a._host for a in arguments()), 0)
    computed_by_the_reference()


def computed_by_the_reference():
    """Check that CuPy's arrays are computed all the same, and without a warning."""
    cupy = double.installed_cupy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, y = on_cuda((4, 3)), on_cuda((5, 3), seed=1)
        found = sq.log_normalizer(x, y)
        assert isinstance(found, cupy.ndarray)
        expected = sq.log_normalizer(x._host, y._host)
        assert np.allclose(found.get(), expected, rtol=1e-14)
        half = sq.log_normalizer(x.astype(np.float16), y.astype(np.float16))
        assert half.dtype == np.float32
        assert np.allclose(half.get(), expected, rtol=0.02)
        estimator = sq.GaussianNormalizer(2, random_state=0).fit(y)
        assert isinstance(estimator.log_normalizer(x), cupy.ndarray)


@scenario("missing")
def missing_library():
    refused(rf"^x: this build of subquad has no CUDA library \({MISSING}: no such")


@scenario("beside")
def library_beside_the_module():
    assert os.environ["SUBQUAD_CUDA_LIBRARY"] == ""
    path = str(Path(_core.__file__).parent / "libsubquad_cuda.so")
    problem = _core.cuda_info()["problem"]
    assert path in problem or Path(path).exists()


@scenario("broken")
def unloadable_library():
    refused("^x: the CUDA library of subquad does not load: .*lib_broken.so: file too")


@scenario("stranger")
def library_of_something_else():
    refused("^x: the CUDA library of subquad is of another version: expected .*unknown")


@scenario("other version")
def library_of_another_version():
    refused("^x: the CUDA library of subquad is of another version: .*, got 0.0.0 ")


@scenario("incomplete")
def library_that_lacks_a_function():
    with pytest.raises(RuntimeError, match="lacks subquad_log_normalizer .*incomplete"):
        _core.log_normalizer(*arguments(), 0)
    with pytest.raises(RuntimeError, match="lacks subquad_cuda_query .*incomplete"):
        _core.cuda_info()


@scenario("recorder", alone=True)
def no_driver_or_an_old_one():
    problem = b"the driver serves CUDA 12.4 at most; CUDA 13.0 is needed"
    recorder().info.problem = problem
    computed_by_the_reference()
    assert recorder().calls() == []
    assert recorder().prepared() == []
    assert "CUDA 12.4 at most" in sq.show_config("dicts")["cuda"]["problem"]


@scenario("recorder")
def device_without_kernels():
    recorder().answer(double.TYPE_ERROR, "no kernels for sm_75", prepare=True)
    computed_by_the_reference()
    assert recorder().calls() == []
    assert recorder().prepared() == [0]


@scenario("recorder")
def device_that_fails():
    recorder().answer(double.DEVICE_ERROR, "CUDA device 0: lost", prepare=True)
    double.installed_cupy()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA device 0: lost"):
            sq.log_normalizer(on_cuda((4, 3)), on_cuda((5, 3)))


@scenario("recorder", alone=True)
def calls_on_the_cpu_load_nothing():
    hosts = [a._host for a in arguments()]
    _core.log_normalizer(*hosts, 0)
    sq.log_normalizer(*hosts[:2])
    sq.GaussianNormalizer(2).fit(hosts[1]).log_normalizer(hosts[0])
    with pytest.raises(TypeError, match=r"^y: "):
        _core.log_normalizer(hosts[0], on_cuda((5, 3)), *hosts[2:], 0)
    assert not _is_loaded()
    _core.log_normalizer(*arguments(), 0)
    assert _is_loaded()


@scenario("recorder", alone=True)
def threads_load_it_once():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: _core.log_normalizer(*arguments(), 0), range(64)))
    assert len(recorder().calls()) == 64


# -------- CuPy


@scenario("recorder")
def cupy_device_and_stream():
    cupy = double.installed_cupy()
    x, y = on_cuda((4, 3), device=1), on_cuda((5, 3), device=1)
    with cupy.cuda.Device(1):
        stream = cupy.cuda.Stream(0x77)
    with stream, cupy.cuda.Device(0), cupy.cuda.Stream(0x66):
        found = sq.log_normalizer(x, y)
        assert cupy.cuda.Device().id == 0
    (call,) = recorder().calls()
    assert call.stream == 0x77
    assert {a.place for a in call.arrays if a is not None} == {(1, 1)}
    assert recorder().prepared() == [1]
    assert found.device == cupy.cuda.Device(1)
    assert found.dtype == np.float64
    assert np.all(found.get() == 7)
    workspace = call.arrays[-1]
    assert workspace.shape == (_core.log_normalizer_workspace(1, 4, 5, 3, 8, 1),)
    # The library was asked to load its kernels once for each device.
    sq.log_normalizer(x, y)
    sq.log_normalizer(on_cuda((4, 3)), on_cuda((5, 3)))
    assert recorder().prepared() == [1, 0]
    assert [call.stream for call in recorder().calls()] == [0, 0]


@scenario("recorder")
def cupy_mixtures_are_refused():
    double.installed_cupy()
    x, y = on_cuda((4, 3)), on_cuda((5, 3), device=1)
    with pytest.raises(TypeError, match=r"one device, got: x is cupy on .* 0.* 1"):
        sq.log_normalizer(x, y)
    with pytest.raises(TypeError, match="x is cupy on .* 0.*, y is numpy"):
        sq.log_normalizer(x, y._host)
    assert recorder().calls() == []


@scenario("recorder")
def cupy_half_precision():
    cupy = double.installed_cupy()
    x, y = on_cuda((4, 3), np.float16), on_cuda((5, 3), np.float16)
    w = on_cuda(5, np.float16)
    z = sq.log_normalizer(x, y, log_weights=w)
    (call,) = recorder().calls()
    assert [a.dtype for a in call.arrays if a is not None] == (
        ["float16", "float16", "float32", "float32", "uint8"]
    )
    # Not copied, and the workspace is that of 16-bit elements.
    assert [a.data for a in call.arrays[:2]] == [x.data.ptr, y.data.ptr]
    assert call.arrays[-1].shape == (_core.log_normalizer_workspace(1, 4, 5, 3, 2, 1),)
    assert z.dtype == np.float32

    grad = cupy.asarray(np.ones(4, np.float16))
    gradients = sq.vjp.log_normalizer(grad, x, y, log_weights=w, out=z)
    (call,) = recorder().calls()
    assert [a.dtype for a in call.arrays if a is not None] == (
        ["float32", "float16", "float16"] + ["float32"] * 5 + ["uint8"]
    )
    assert [g.dtype for g in gradients] == [np.float16] * 3
    assert all(np.all(g.get() == 7) for g in gradients)

    # With float32 or float64 arrays beside them they are widened, as everywhere.
    sq.log_normalizer(x, y.astype(np.float32))
    sq.log_normalizer(x, y, log_weights=w.astype(np.float64))
    sq.gaussian_log_normalizer(*(x, w, y, on_cuda((5, 3, 1), np.float16)), diagonal=y)
    single, wide, gaussian = recorder().calls()
    for call, dtype in (
        *((single, "float32"), (wide, "float64"), (gaussian, "float32")),
    ):
        used = {a.dtype for a in call.arrays[:-1] if a is not None}
        assert used == {dtype}


@scenario("recorder")
def cupy_unaligned():
    double.installed_cupy()
    raw = np.zeros(8 * 12 + 8, np.uint8)
    start = 4 if raw.ctypes.data % 8 == 0 else 0
    odd = raw[start : start + 96].view(np.float64).reshape(4, 3)
    assert odd.ctypes.data % 8
    sq.log_normalizer(double.Array(odd), on_cuda((5, 3)))
    (call,) = recorder().calls()
    assert call.arrays[0].data % 8 == 0


@contextlib.contextmanager
def no_traffic():
    double.TRAFFIC.clear()
    yield
    seen = vars(double.TRAFFIC)
    assert seen == {"to_device": 0, "to_host": 0}, seen


@scenario("recorder")
def cupy_operations_wait_for_nothing():
    cupy = double.installed_cupy()
    x, y, w = on_cuda((4, 3)), on_cuda((5, 3)), on_cuda(5)
    index = cupy.asarray(np.arange(4))
    factors = on_cuda((5, 3, 2))
    grad = on_cuda(4)
    with no_traffic():
        sq.log_normalizer(*(x, y), log_weights=w, self_index=index, self_term="exclude")
        sq.vjp.log_normalizer(grad, x, y, log_weights=w)
        sq.gaussian_log_normalizer(x, w, y, factors)
        sq.vjp.gaussian_log_normalizer(grad, x, w, y, factors, diagonal=y)


@scenario("recorder")
def evaluation_waits_for_nothing():
    from subquad._backends import compiled

    cupy = double.installed_cupy()
    x, y = on_cuda((4, 3)), on_cuda((40, 3), seed=1)
    index = cupy.asarray(np.array([0, 3, -1, 7]))
    for settings in (
        {},
        {"control_samples": 8},
        {"control_samples": "auto", "covariance_type": "diag"},
        {"control_samples": 40, "covariance_type": "low_rank", "rank": 2},
    ):
        # Keys are fitted by the reference, since the recorder computes nothing.
        compiled.memory._SERVED[0] = False
        estimator = sq.GaussianNormalizer(2, random_state=0, **settings)
        estimator.fit(y, sample_weight=np.linspace(0.5, 1, 40))
        compiled.memory._SERVED[0] = True
        recorder().calls()

        def evaluate(estimator=estimator, settings=settings):
            for given in (
                {},
                {"self_index": index},
                {"self_index": index, "self_term": "exclude"},
            ):
                estimator.log_normalizer(x, **given)
                if settings.get("control_samples"):
                    estimator.standard_error(x, **given)
                estimator.error_estimate(x, **given)
                estimator.error_bound(x, **given)

        evaluate()
        called = {call.function for call in recorder().calls()}
        assert {"gaussian_score_moments", "sample_residuals"} <= called
        with no_traffic():
            evaluate()


# -------- kernels, where the host executor runs them


@scenario("on host")
def results_are_those_of_the_cpu():
    shapes = ((4, 3), (5, 3), (5,), (5, 3, 2), (5, 3), (4,))
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-5)):
        double.installed_cupy()
        given = [on_cuda(shape, dtype, seed=i) for i, shape in enumerate(shapes)]
        hosts = [a._host for a in given]
        for module in (sq, sq.vjp):
            for values in (given, hosts):
                x, y, w, factors, diagonal, grad = values
                first = () if module is sq else (grad,)
                exact = module.log_normalizer(*first, x, y, log_weights=w)
                gaussian = module.gaussian_log_normalizer(
                    *(*first, x, w, y, factors), diagonal=abs(diagonal)
                )
                found = (exact, gaussian) if module is sq else (*exact, *gaussian)
                if values is given:
                    kept = found
            for a, b in zip(kept, found, strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_allclose(a.get(), b, tolerance, tolerance)


@scenario("on host")
def results_of_half_precision():
    double.installed_cupy()
    x, y = on_cuda((6, 8), np.float16), on_cuda((7, 8), np.float16, seed=1)
    hosts = x._host, y._host
    z = sq.log_normalizer(x, y)
    assert z.dtype == np.float32
    np.testing.assert_allclose(z.get(), sq.log_normalizer(*hosts), 2e-5, 2e-5)
    grad = np.ones(6, np.float32)
    found = sq.vjp.log_normalizer(double.Array(grad), x, y, out=z)
    expected = sq.vjp.log_normalizer(grad, *hosts)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == np.float16
        np.testing.assert_allclose(a.get(), b, 2e-3, 2e-3)


@scenario("on host")
def features_are_those_of_the_cpu():
    double.installed_cupy()
    for form in ("none", "all with diagonal", "all with factor"):
        for dtype in (np.float64, np.float32):
            given = features.case(form, bx=(2,), dtype=dtype)
            grad = np.cos(given.call(sq.log_features, antithetic=True))
            out = given.call(sq.log_features, double.Array, antithetic=True)
            assert_within(out.get(), *features.log_features(given, True))
            out = given.call(sq.trigonometric_features, double.Array)
            assert_within(out.get(), *features.trigonometric_features(given))
            options = {"antithetic": True}
            found = given.call(sq.vjp.log_features, double.Array, grad, **options)
            values, bounds = features.log_features_vjp(grad, given, True)
            for a, value, bound, array in zip(
                found,
                features.public(values),
                features.public(bounds),
                features.public(given),
                strict=True,
            ):
                assert a.dtype == dtype
                value, bound = (sum_to(part, array.shape) for part in (value, bound))
                assert_within(a.get(), value, 2 * bound)
    for d in (1, 8, 256):
        x = np.random.default_rng(0).standard_normal((3, d))
        out = sq.hadamard_transform(double.Array(x))
        assert_within(out.get(), *features.hadamard_transform(x))


@scenario("on host")
def features_of_half_precision():
    double.installed_cupy()
    given = features.case("all with factor", dtype=np.float32)
    half = given._replace(x=given.x.astype(np.float16))
    wide = given._replace(x=half.x.astype(np.float32))
    out = half.call(sq.log_features, double.Array)
    assert out.dtype == np.float32
    assert_within(out.get(), *features.log_features(wide))
    out = half.call(sq.trigonometric_features, double.Array)
    assert_within(out.get(), *features.trigonometric_features(wide))
    grad = np.ones((7, 5), np.float32)
    gx, *others = half.call(sq.vjp.log_features, double.Array, grad)
    expected = wide.call(sq.vjp.log_features, lambda a: a, grad)
    assert gx.dtype == np.float16
    np.testing.assert_allclose(gx.get(), expected[0], 2e-3, 2e-3)
    for a, b in zip(others, expected[1:], strict=True):
        np.testing.assert_allclose(a.get(), b, 2e-5, 2e-5)


@scenario("on host")
def features_wait_for_nothing():
    double.installed_cupy()
    given = features.case("all with factor")
    given = features.Case(*(None if a is None else double.Array(a) for a in given))
    x = double.Array(np.ones((3, 8)))
    given.call(sq.log_features)
    with no_traffic():
        out = given.call(sq.log_features, antithetic=True)
        given.call(sq.trigonometric_features)
        given.call(sq.vjp.log_features, lambda a: a, out, antithetic=True)
        sq.vjp.hadamard_transform(sq.hadamard_transform(x), x)


@scenario("on host")
def factors_are_those_of_the_cpu():
    double.installed_cupy()
    offsets = ((0, 1, 9), (2, -1, -3))
    segments = np.array([1, 1, 1, 0, 0, 5, 5])
    normal = np.random.default_rng(0).standard_normal
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-5)):
        values, x = normal((2, 2, 7, 3)).astype(dtype), normal((7, 5)).astype(dtype)
        grad = normal((2, 7, 5)).astype(dtype)
        for residual in ("none", "step", "input"):
            for given in ({}, {"segment_ids": segments}, {"circular": False}):
                there = {
                    key: double.Array(a) if key == "segment_ids" else a
                    for key, a in given.items()
                }
                options = {"pattern": offsets, "residual": residual}
                for module, arrays in ((sq, (values, x)), (sq.vjp, (grad, values, x))):
                    function = module.sparse_factor_product
                    for turned in (False, True):
                        options["transpose"] = turned
                        agree(
                            function(*map(double.Array, arrays), **options, **there),
                            function(*arrays, **options, **given),
                            tolerance,
                        )
        shapes = ((2, 6, 5), (2, 6), (2, 3, 6), (2, 3))
        weights = [normal(shape).astype(dtype) for shape in shapes]
        there = [double.Array(w) for w in weights]
        out = sq.factor_values(double.Array(x), there)
        agree(out, sq.factor_values(x, weights), tolerance)
        gx, found = sq.vjp.factor_values(out, double.Array(x), there)
        other, expected = sq.vjp.factor_values(out.get(), x, weights)
        agree((gx, *found), (other, *expected), 10 * tolerance)


def agree(found, expected, tolerance):
    if not isinstance(found, tuple):
        found, expected = (found,), (expected,)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.get(), b, tolerance, tolerance)


@scenario("on host")
def sparse_matrices_are_those_of_the_cpu():
    double.installed_cupy()
    normal = np.random.default_rng(0).standard_normal
    indices, indptr = np.array([1, 0, 1, 4, 2, 2]), np.array([0, 3, 3, 6])
    for dtype, tolerance in ((np.float64, 1e-13), (np.float32, 1e-5)):
        data, x = normal(6).astype(dtype), normal((2, 5, 3)).astype(dtype)
        addend = normal((3, 3)).astype(dtype)
        for index in (np.int32, np.int64):
            given = (data, indices.astype(index), indptr.astype(index), x)
            there = [double.Array(a) for a in given]
            options = {"scale": 0.5, "addend": addend}
            out = sq.csr_product(*there, scale=0.5, addend=double.Array(addend))
            agree(out, sq.csr_product(*given, **options), tolerance)
            options["addend"] = double.Array(addend)
            found = sq.vjp.csr_product(out, *there, **options)
            options["addend"] = addend
            expected = sq.vjp.csr_product(out.get(), *given, **options)
            agree(found, expected, 10 * tolerance)


@scenario("on host")
def factors_wait_for_nothing():
    double.installed_cupy()
    values, x = on_cuda((2, 7, 3)), on_cuda((7, 5))
    weights = [on_cuda(s) for s in ((2, 6, 5), (2, 6), (2, 3, 6), (2, 3))]
    data, indices = on_cuda(4), double.Array(np.array([0, 6, 2, 3], np.int32))
    indptr = double.Array(np.array([0, 2, 4], np.int32))
    sq.sparse_factor_product(values, x)
    with no_traffic():
        sq.sparse_factor_product(values, x)
        sq.vjp.sparse_factor_product(x, values, x)
        out = sq.factor_values(x, weights)
        sq.vjp.factor_values(out, x, weights)
        out = sq.csr_product(data, indices, indptr, x)
        sq.vjp.csr_product(out, data, indices, indptr, x)


@scenario("on host")
def estimators_fit_and_evaluate():
    cupy = double.installed_cupy()
    for settings in ({}, {"control_samples": 16}):
        x, y = on_cuda((7, 3)), on_cuda((60, 3), seed=1)
        fitted = sq.GaussianNormalizer(3, random_state=0, **settings).fit(y)
        expected = sq.GaussianNormalizer(3, random_state=0, **settings)
        expected.fit(y._host)
        np.testing.assert_allclose(
            fitted.log_normalizer(x).get(), expected.log_normalizer(x._host), 1e-9
        )
        index = np.arange(7)
        without = fitted.log_normalizer(
            x, self_index=cupy.asarray(index), self_term="exclude"
        )
        np.testing.assert_allclose(
            without.get(),
            expected.log_normalizer(x._host, self_index=index, self_term="exclude"),
            1e-9,
        )
        with no_traffic():
            fitted.log_normalizer(x)


@scenario("recorder")
def configuration():
    from io import StringIO

    out = StringIO()
    with contextlib.redirect_stdout(out):
        sq.show_config()
    line = next(line for line in out.getvalue().splitlines() if "CUDA" in line)
    assert line.split(maxsplit=1)[1] == (
        "built for sm_90 compute_120, runtime 13.0, driver 13.1, 2 devices"
    )


@scenario("missing")
def configuration_without_the_library():
    from io import StringIO

    out = StringIO()
    with contextlib.redirect_stdout(out):
        sq.show_config()
    line = next(line for line in out.getvalue().splitlines() if "CUDA" in line)
    assert "this build of subquad has no CUDA library" in line
    assert line.endswith("arrays on CUDA are computed without kernels")


# -------- torch


@scenario("recorder")
def torch_operators_know_shapes_and_types():
    torch = pytest.importorskip("torch")
    from torch._subclasses import FakeTensorMode

    recorder()
    with FakeTensorMode():
        x = torch.empty(4, 3, device="cuda:1", dtype=torch.float16)
        y = torch.empty(5, 3, device="cuda:1", dtype=torch.float16)
        z = sq.log_normalizer(x, y)
        assert (z.device, z.dtype) == (torch.device("cuda:1"), torch.float32)
        gx, gy = sq.vjp.log_normalizer(z, x, y)
        assert (gx.dtype, gx.shape, gx.device) == (x.dtype, x.shape, x.device)
        assert (gy.dtype, gy.shape, gy.device) == (y.dtype, y.shape, y.device)
        with pytest.raises(TypeError, match="x is torch on cuda:1, y is torch on cuda"):
            sq.log_normalizer(x, y.to("cuda:0"))
        shift = torch.empty(3, device="cuda:1")
        bias = torch.empty(5, device="cuda:1")
        log_x = sq.log_features(x, y, bias, shift, shift=shift, antithetic=True)
        assert (log_x.dtype, log_x.shape) == (torch.float32, (4, 10))
        rows = (log_x, x, y.float(), shift, None, None, None, True)
        gx = torch.ops.subquad.log_features_gradient_of_rows(*rows)
        assert (gx.dtype, gx.shape, gx.device) == (z.dtype, x.shape, x.device)
        waves = sq.trigonometric_features(x, y, bias, None)
        assert (waves.dtype, waves.shape) == (torch.float32, (4, 10))
        rows = sq.hadamard_transform(torch.empty(2, 8, device="cuda:1"))
        assert (rows.shape, rows.device) == ((2, 8), torch.device("cuda:1"))
        weights = ((3, 6, 3), (3, 6), (3, 5, 6), (3, 5))
        weights = [torch.empty(shape, device="cuda:1") for shape in weights]
        values = sq.factor_values(x.float(), weights)
        assert (values.shape, values.device) == ((3, 4, 5), x.device)
        out = sq.sparse_factor_product(values, x)
        assert (out.dtype, out.shape, out.device) == (x.dtype, x.shape, x.device)
        data = torch.empty(7, dtype=torch.float16, device="cuda:1")
        indices = torch.empty(7, dtype=torch.int32, device="cuda:1")
        indptr = torch.empty(3, dtype=torch.int32, device="cuda:1")
        out = sq.csr_product(data, indices, indptr, y)
        assert (out.shape, out.device) == ((2, 3), x.device)
    assert recorder().prepared() == [1]
    for name in (
        "log_normalizer",
        "log_normalizer_vjp",
        "gaussian_log_normalizer",
        "gaussian_log_normalizer_vjp",
        "log_features",
        "log_features_gradient_of_rows",
        "trigonometric_features",
        "hadamard_transform",
        "sparse_factor_product",
        "sparse_factor_product_vjp",
        "factor_values",
        "factor_values_vjp",
        "csr_product",
        "csr_product_gradient_of_data",
    ):
        found = torch._C._dispatch_has_kernel_for_dispatch_key
        assert found(f"subquad::{name}", "CUDA")


@scenario("missing")
def torch_gradients_of_half_precision():
    # This torch has no autograd for CUDA; the rules are those of the operator anywhere.
    torch = pytest.importorskip("torch")
    from torch._subclasses import FakeTensorMode

    import subquad._backends.torch as backend

    with FakeTensorMode():
        x = torch.empty(4, 3, dtype=torch.bfloat16, requires_grad=True)
        y = torch.empty(5, 3, dtype=torch.bfloat16, requires_grad=True)
        w = torch.empty(5, requires_grad=True)
        z = backend.log_normalizer(x, y, w, None)
        assert z.dtype == torch.float32
        grads = torch.autograd.grad(z.sum(), (x, y, w), create_graph=True)
        assert [g.dtype for g in grads] == [x.dtype, x.dtype, torch.float32]
        again = torch.autograd.grad(sum(g.float().sum() for g in grads), (x, y, w))
        assert [g.dtype for g in again] == [x.dtype, x.dtype, torch.float32]


@scenario("recorder", alone=True)
def torch_device_and_stream():
    torch = pytest.importorskip("torch")
    from subquad._backends.torch import memory as backend

    asked, allocated = [], []

    def current_stream(device):
        asked.append(device)
        return types.SimpleNamespace(cuda_stream=0x55)

    def empty(*size, dtype, device):
        allocated.append(device)
        shape = size[0] if isinstance(size[0], tuple) else size
        name = str(dtype).rpartition(".")[2]
        return double.Array(np.zeros(shape, name), device.index)

    torch.cuda.current_stream, torch.empty = current_stream, empty
    backend.as_memory = lambda array: array
    x, y = on_cuda((4, 3), np.float16, 1), on_cuda((5, 3), np.float16, 1)
    device = torch.device("cuda:1")
    tensor = types.SimpleNamespace(is_cpu=False, device=device)
    kernels = backend.kernels_for(tensor)
    z = kernels.log_normalizer(x, y, None, None)
    assert backend.kernels_for(tensor) is kernels
    (call,) = recorder().calls()
    assert (call.stream, call.device_id) == (0x55, 1)
    assert asked == [device]
    assert allocated == [device, device]
    assert (z.dtype, z.device.id) == (np.float32, 1)
    assert np.all(z.get() == 7)
    assert recorder().prepared() == [1]


@scenario("missing")
def torch_without_the_library():
    torch = pytest.importorskip("torch")
    from torch._subclasses import FakeTensorMode

    from subquad import _dispatch
    from subquad._reference import primitives as reference

    with FakeTensorMode():
        x = torch.empty(4, 3, device="cuda", dtype=torch.bfloat16)
        assert _dispatch.backend_for(x=x) is reference
        assert not _dispatch.library_of(x).keeps_half(x)


@pytest.mark.parametrize(
    "process, name", [(p, name) for p, names in SCENARIOS.items() for name in names]
)
def test_scenario(process, name, outcomes):
    outcome = outcomes(process)[name]
    if outcome.startswith("skipped: "):
        pytest.skip(outcome)
    assert not outcome, outcome
