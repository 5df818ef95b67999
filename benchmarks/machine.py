"""Facts about the machine, its memory and rates, and equal threads for everybody."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import sys
from typing import Any


def limit_affinity(threads: int) -> None:
    """Restrict the process to `threads` processors, before any library counts them.

    The only cap that every peer respects (XLA has no run-time setting).
    """
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        if threads < len(allowed):
            os.sched_setaffinity(0, allowed[:threads])


def available_processors() -> int:
    """Count the processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def equal_threads(threads: int) -> contextlib.ExitStack:
    """Give every library the same number of threads, until the result closes."""
    stack = contextlib.ExitStack()
    with contextlib.suppress(ImportError):
        import threadpoolctl

        stack.enter_context(threadpoolctl.threadpool_limits(threads))
    with contextlib.suppress(ImportError):
        import torch

        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
    with contextlib.suppress(ImportError, AttributeError):
        import subquad

        stack.enter_context(subquad.num_threads(threads))
    return stack


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _blas() -> str | None:
    with contextlib.suppress(ImportError):
        # threadpoolctl sees what is loaded.
        import numpy as np  # noqa: F401
        import threadpoolctl

        for library in threadpoolctl.threadpool_info():
            if library.get("user_api") == "blas":
                return " ".join(
                    str(library[key])
                    for key in ("internal_api", "version", "architecture")
                    if library.get(key)
                )
    return None


_PACKAGES = (
    "subquad", "numpy", "scipy", "torch", "jax", "edrep", "cupy-cuda13x",
    "flash-linear-attention", "scikit-learn", "performer-pytorch",
    "pytorch-fast-transformers",
)  # fmt: skip


def facts(threads: int) -> dict[str, Any]:
    """Return what a timing depends on."""
    isa = None
    with contextlib.suppress(ImportError, AttributeError):
        import subquad

        isa = subquad.get_isa()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "available": available_processors(),
        "threads": threads,
        "isa": isa,
        "python": platform.python_version(),
        "platform": sys.platform,
        "blas": _blas(),
        "versions": {name: _version(name) for name in _PACKAGES if _version(name)},
    }


def line(machine: dict[str, Any]) -> str:
    """Return the facts as one line."""
    versions = ", ".join(
        f"{name} {number}" for name, number in machine["versions"].items()
    )
    return (
        f"machine: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, isa {machine['isa'] or 'unknown'}, "
        f"Python {machine['python']}, BLAS {machine['blas'] or 'unknown'}, {versions}"
    )


def device_line(machine: dict[str, Any]) -> str:
    """Return the facts of the GPU as one line."""
    device = machine["device"]
    found = ", ".join(f"{name} {value}" for name, value in device["found"].items())
    major, minor = device["capability"]
    return (
        f"device: {device['name']}, capability {major}.{minor}, "
        f"{device['multiprocessors']} multiprocessors, up to "
        f"{device['clock'] / 1e6:.0f} MHz, {device['memory'] / 2**30:.0f} GiB, "
        f"driver for CUDA {device['driver']}"
        + (f"; as found: {found}" if found else "")
    )


def available_memory() -> float:
    """Return the bytes that can still be allocated, infinity where nobody says."""
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/meminfo", encoding="utf-8") as lines:
            for entry in lines:
                if entry.startswith("MemAvailable"):
                    limits.append(1024.0 * int(entry.split()[1]))
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as limit:
            with open("/sys/fs/cgroup/memory.current", encoding="utf-8") as current:
                limits.append(float(limit.read()) - float(current.read()))
    return min(limits, default=float("inf"))


def _status(field: str) -> float:
    with open("/proc/self/status", encoding="utf-8") as lines:
        for entry in lines:
            if entry.startswith(field + ":"):
                return 1024.0 * int(entry.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def resident_baseline() -> float:
    """Give free heap back, start the peak anew and return the resident bytes of now."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as control:
        control.write("5")
    return _status("VmRSS")


def resident_peak() -> float:
    """Return the largest resident size since `resident_baseline`, in bytes."""
    return _status("VmHWM")


class Rates:
    """What the processor can do, measured when asked: the best of a few, all threads.

    A limit built on these is a time that nothing goes below, hence not the median.
    Each is None where the compiled module has no such measurement.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.measured: dict[str, float | None] = {}

    def _rate(self, key: str, name: str, itemsize: int, depth: int = 1) -> float | None:
        try:
            from subquad._core import measure_rate
        except ImportError:
            return self.measured.setdefault(key, None)
        best = max(measure_rate(name, itemsize, depth, 0.05) for _ in range(3))
        self.measured[key] = max(best, self.measured.get(key) or 0.0)
        return self.measured[key]

    def fma_peak(self, itemsize: int) -> float | None:
        """Return flop/s of multiply-adds that never leave the registers."""
        return self._rate(f"fma float{8 * itemsize}", "multiply_adds", itemsize)

    def exp(self, itemsize: int) -> float | None:
        """Return exponentials per second."""
        return self._rate(f"exp float{8 * itemsize}", "exponentials", itemsize)

    def tile(self, d: int, itemsize: int) -> float | None:
        """Return flop/s of the register tile at inner dimension `d`."""
        key = f"tile d={d} float{8 * itemsize}"
        return self._rate(key, "tile_products", itemsize, d)


def seconds(amount: float, rate: float | None) -> float | None:
    """Return amount / rate, None where the rate was not measured."""
    return None if rate is None else amount / rate
