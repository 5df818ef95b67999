"""Fixtures shared by all tests: array libraries and poisoned memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))

import numpy as np
import pytest

from _arrays import (
    CARRIED_MODULES,
    CARRIERS,
    DEVICE,
    LIBRARIES,
    Carrier,
    Library,
    why_unusable,
)

# Before any test imports JAX: float64 as float64, and without a GPU the CPU only.
os.environ["JAX_ENABLE_X64"] = "1"
if DEVICE == "cuda":
    # Several processes share the memory of one card.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Bounds are stated for products in full precision, which is not JAX's default on a
    # GPU.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    # cuBLAS is deterministic, which `poisoned_torch` asks for, with this alone.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    if DEVICE == "host":
        built = Path(__file__).parent.parent / "build" / "dev"
        for path in built.rglob("libsubquad_cuda_on_host.so"):
            os.environ.setdefault("SUBQUAD_CUDA_LIBRARY", str(path))
    if "OMP_NUM_THREADS" not in os.environ:
        # On arrays this small the threads of torch and of BLAS wait for one another
        # longer than they compute; those of the library are what is tested.
        os.environ["OMP_NUM_THREADS"] = "1"
        processors = len(os.sched_getaffinity(0))
        os.environ.setdefault("SUBQUAD_NUM_THREADS", str(processors))
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Operations are compiled anew for every shape: compiling is all that takes time.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    # Without the newer emitters it takes half of that. XLA ends the process where it
    # does not know a flag.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("jaxlib").startswith("0.10."):
            os.environ.setdefault(
                "XLA_FLAGS",
                "--xla_cpu_use_fusion_emitters=false"
                " --xla_cpu_parallel_codegen_split_count=1",
            )
# A test that needs a compiler must not start one process per core.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# What a test does with other libraries, processes or the compiled module itself was
# tested on the CPU, and a device changes nothing about it.
_ABOUT_THE_HOST = re.compile(
    r"\b(torch|jax|jnp|dask|sklearn|sklearn_check|subprocess|monkeypatch|tracemalloc"
    r"|_core|pickle|save|num_threads|hypothesis|flags|__array_interface__)\b"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    # Without pytest-timeout its settings would be unknown ones, which are errors.
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "limit of one test, by pytest-timeout")
        parser.addini("timeout_method", "how pytest-timeout stops a test")


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "skip_xp_backend(name, *, reason): do not run this test with that library",
        "cuda: needs an NVIDIA GPU, and SUBQUAD_TEST_DEVICE=cuda",
        "carried: its NumPy arrays are computed on a device (set by itself)",
        "timeout(seconds): limit of this test, by pytest-timeout",
    ):
        config.addinivalue_line("markers", marker)
    if DEVICE == "cuda":
        # The machines that have a card have other versions than constraints.txt.
        for category in (
            "DeprecationWarning",
            "FutureWarning",
            "PendingDeprecationWarning",
        ):
            config.addinivalue_line("filterwarnings", f"default::{category}")
        config.addinivalue_line(
            "filterwarnings", "ignore:.*deterministic.*:UserWarning"
        )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """On a device, leave out what has nothing to do with it."""
    kept, left = [], []
    for item in items:
        for_card = item.get_closest_marker("cuda") is not None
        if not DEVICE and for_card:
            item.add_marker(pytest.mark.skip(reason="SUBQUAD_TEST_DEVICE is unset"))
        elif DEVICE and _is_carried(item):
            item.add_marker(pytest.mark.carried)
        elif DEVICE and not (
            DEVICE == "cuda" if for_card else "xp" in getattr(item, "fixturenames", ())
        ):
            left.append(item)
            continue
        kept.append(item)
    if left:
        items[:] = kept
        config.hook.pytest_deselected(items=left)


def _is_carried(item: pytest.Item) -> bool:
    return (
        isinstance(item, pytest.Function)
        and item.module.__name__.rpartition(".")[2] in CARRIED_MODULES
        and "xp" not in item.fixturenames
        and _ABOUT_THE_HOST.search(inspect.getsource(item.function)) is None
    )


def _library(name: str) -> Library:
    module = LIBRARIES[name]
    namespace = pytest.importorskip(
        module, reason=f"{module} is not installed", exc_type=ImportError
    )
    if name == "cuda-on-host":
        namespace = namespace.installed_cupy()
    reason = why_unusable(name, namespace)
    if reason is not None:
        pytest.skip(reason)
    library = Library(name, namespace)
    if DEVICE in ("cuda", "host"):
        _require_kernels(library)
    return library


def _require_kernels(library: Library) -> None:
    """Fail where the reference would pass the tests in the kernels' place."""
    from subquad import _core, _dispatch

    backend = _dispatch.backend_for(x=library.asarray(np.zeros((1, 1))))
    module = getattr(backend, "__name__", type(backend).__module__)
    if module.startswith("subquad._reference"):
        problem = _core.cuda_info()["problem"]
        pytest.fail(f"{library.name} is computed without kernels: {problem}")


@pytest.fixture(params=list(LIBRARIES))
def xp(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Every supported array library in turn; see `_arrays.Library`."""
    name = request.param
    for mark in request.node.iter_markers("skip_xp_backend"):
        if mark.args[0] == name:
            pytest.skip(mark.kwargs["reason"])
    library = _library(name)
    with poisoned_memory_of_libraries():
        yield library


@pytest.fixture(autouse=True)
def carried(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Have the library compute a test's NumPy arrays on the device."""
    if request.node.get_closest_marker("carried") is None:
        yield
        return
    import subquad
    from subquad import _dispatch
    from subquad._backends import compiled

    here = (
        name
        for name in CARRIERS
        if name in LIBRARIES and importlib.util.find_spec(LIBRARIES[name])
    )
    carrier = Carrier(_library(next(here)))

    def primitive(name):
        def call(first, *args):
            return getattr(_dispatch.backend_for(first=first), name)(first, *args)

        return call

    if request.module.__name__.endswith(("test_primitives", "test_embedding_step")):
        for name in [name for name in vars(_dispatch.Backend) if name[0] != "_"]:
            monkeypatch.setattr(compiled, name, carrier.carried(primitive(name)))
    for owner, name in (
        (subquad, "log_normalizer"),
        (subquad, "gaussian_log_normalizer"),
        (subquad, "log_features"),
        (subquad, "trigonometric_features"),
        (subquad, "hadamard_transform"),
        (subquad, "sparse_factor_product"),
        (subquad, "factor_values"),
        (subquad, "csr_product"),
        (subquad.vjp, "log_normalizer"),
        (subquad.vjp, "gaussian_log_normalizer"),
        (subquad.vjp, "log_features"),
        (subquad.vjp, "hadamard_transform"),
        (subquad.vjp, "sparse_factor_product"),
        (subquad.vjp, "factor_values"),
        (subquad.vjp, "csr_product"),
    ):
        monkeypatch.setattr(owner, name, carrier.carried(getattr(owner, name)))
    estimator = subquad.GaussianNormalizer
    for name, value in list(vars(estimator).items()):
        if name[0] == "_":
            continue
        if inspect.isfunction(value):
            monkeypatch.setattr(estimator, name, carrier.carried(value))
        elif isinstance(value, property):
            monkeypatch.setattr(estimator, name, property(carrier.carried(value.fget)))
    with poisoned_memory_of_libraries():
        yield


@contextlib.contextmanager
def poisoned_torch() -> Iterator[None]:
    """Have torch, where it is loaded, fill its own uninitialised memory with NaN."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    # Of torch's own operators on a GPU not all have a deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _poison(array: np.ndarray) -> np.ndarray:
    """Fill with NaN, or with all bits set, which a float view reads as NaN."""
    if array.dtype.kind in "fc":
        array.fill(np.nan)
    elif array.dtype.kind in "iu":
        array.fill(np.iinfo(array.dtype).max)
    return array


@contextlib.contextmanager
def poisoned_allocators(library: str, *users: str) -> Iterator[None]:
    """Have `empty` and `empty_like` of a library, where it is loaded, give NaN."""
    namespace = sys.modules.get(library)
    if namespace is None:
        yield
        return
    empty, empty_like = namespace.empty, namespace.empty_like

    def poisoned_empty(*args, **kwargs):
        return _poison(empty(*args, **kwargs))

    def poisoned_empty_like(*args, **kwargs):
        array = empty_like(*args, **kwargs)
        return _poison(array) if type(array) is namespace.ndarray else array

    targets = {id(empty): poisoned_empty, id(empty_like): poisoned_empty_like}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name == library or name.startswith(users):
                for key, value in list(vars(module).items()):
                    if id(value) in targets:
                        patch.setattr(module, key, targets[id(value)])
        yield


@contextlib.contextmanager
def poisoned_memory_of_libraries() -> Iterator[None]:
    """Poison what a test's libraries allocate; those loaded within it as well."""
    with poisoned_torch(), poisoned_allocators("cupy", "subquad", "array_api_compat"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN, so that an output nobody wrote fails the test."""
    with poisoned_allocators("numpy", "subquad"), poisoned_torch():
        yield
