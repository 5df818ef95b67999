"""Fixtures shared by all tests: array libraries and poisoned memory."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

# Before any test imports JAX: the CPU only, and float64 as float64.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"
# Every operation is compiled anew for every shape: compiling is all that takes time.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# A test that needs a compiler must not start one process per core.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

sys.path.insert(0, os.path.dirname(__file__))

import numpy as np
import pytest

from _arrays import LIBRARIES, Library


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "skip_xp_backend(name, *, reason): do not run this test with that library",
    )


@pytest.fixture(params=list(LIBRARIES))
def xp(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Every supported array library in turn; see `_arrays.Library`."""
    name = request.param
    for mark in request.node.iter_markers("skip_xp_backend"):
        if mark.args[0] == name:
            pytest.skip(mark.kwargs["reason"])
    module = LIBRARIES[name]
    namespace = pytest.importorskip(module, reason=f"{module} is not installed")
    with poisoned_torch():
        yield Library(name, namespace)


@contextlib.contextmanager
def poisoned_torch() -> Iterator[None]:
    """Have torch, where it is loaded, fill its own uninitialised memory with NaN."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
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


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory holds NaN, so that an output nobody wrote fails the test."""
    empty, empty_like = np.empty, np.empty_like

    def poisoned_empty(*args, **kwargs):
        return _poison(empty(*args, **kwargs))

    def poisoned_empty_like(*args, **kwargs):
        array = empty_like(*args, **kwargs)
        return _poison(array) if type(array) is np.ndarray else array

    targets = {id(empty): poisoned_empty, id(empty_like): poisoned_empty_like}
    for name, module in list(sys.modules.items()):
        if name == "numpy" or name.startswith("subquad"):
            for key, value in list(vars(module).items()):
                if id(value) in targets:
                    monkeypatch.setattr(module, key, targets[id(value)])

    with poisoned_torch():
        yield
