"""Threads, instruction set, and what this installation consists of."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal, overload

from subquad._version import __version__

__all__ = [
    "get_isa",
    "get_num_threads",
    "num_threads",
    "set_isa",
    "set_num_threads",
    "show_config",
]

_LIBRARIES = {
    "numpy": "numpy",
    "torch": "torch",
    "dask": "dask.array",
    "jax": "jax",
    "cupy": "cupy",
}


def _core() -> Any:
    # The module that loads the kernels says what to do where they are missing.
    return import_module("subquad._backends.compiled")._core


def set_num_threads(n_threads: int, /) -> None:
    """Set how many threads a call may use.

    Results do not depend on it. The start value is that of the environment variable
    ``SUBQUAD_NUM_THREADS``, else of ``OMP_NUM_THREADS``, else the number of processors
    that the process may use.

    Parameters
    ----------
    n_threads : int
        At least 1. It holds for the whole process.

    Raises
    ------
    ValueError
        If `n_threads` is less than 1.

    See Also
    --------
    num_threads : The same for the length of a block.

    Examples
    --------
    >>> import subquad as sq
    >>> before = sq.get_num_threads()
    >>> sq.set_num_threads(1)
    >>> sq.get_num_threads()
    1
    >>> sq.set_num_threads(before)
    """
    _core().set_num_threads(n_threads)


def get_num_threads() -> int:
    """Return how many threads a call may use now.

    Returns
    -------
    int
        1 after a fork and inside a parallel region, whatever was set.

    Examples
    --------
    >>> import subquad as sq
    >>> sq.get_num_threads() >= 1
    True
    """
    number: int = _core().get_num_threads()
    return number


@contextmanager
def num_threads(n_threads: int, /) -> Iterator[None]:
    """Set how many threads calls inside a ``with`` block may use.

    Parameters
    ----------
    n_threads : int
        At least 1. It holds for the whole process: blocks in several Python threads
        should not overlap.

    Raises
    ------
    ValueError
        If `n_threads` is less than 1.

    Examples
    --------
    >>> import subquad as sq
    >>> with sq.num_threads(1):
    ...     sq.get_num_threads()
    1
    """
    before = get_num_threads()
    set_num_threads(n_threads)
    try:
        yield
    finally:
        set_num_threads(before)


def set_isa(level: str, /) -> None:
    """Set the instruction set of the compiled kernels.

    The widest one that the processor has is chosen at the start, up to that of the
    environment variable ``SUBQUAD_ISA``.

    Parameters
    ----------
    level : str
        "v2", "v3" or "v4", levels of x86-64, or "neon". It holds for the whole process.

    Raises
    ------
    ValueError
        If the processor or this build does not have it.

    Examples
    --------
    >>> import subquad as sq
    >>> sq.set_isa(sq.get_isa())
    """
    _core().set_isa(level)


def get_isa() -> str:
    """Return the instruction set of the compiled kernels.

    Returns
    -------
    str
        "v2", "v3" or "v4", levels of x86-64, or "neon".

    Examples
    --------
    >>> import subquad as sq
    >>> sq.get_isa() in ("v2", "v3", "v4", "neon")
    True
    """
    level: str = _core().get_isa()
    return level


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(
    mode: Literal["stdout", "dicts"] = "stdout",
) -> dict[str, Any] | None:
    """Print version, instruction sets, threads, CUDA and the array libraries at hand.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        "dicts" returns a dictionary instead of printing.

    Returns
    -------
    dict or None
        The configuration, if asked for.

    Raises
    ------
    ValueError
        If `mode` is neither.

    Examples
    --------
    >>> import subquad as sq
    >>> sq.show_config(mode="dicts")["version"] == sq.__version__
    True
    """
    if mode not in ("stdout", "dicts"):
        message = f"mode must be 'stdout' or 'dicts', got {mode!r}"
        raise ValueError(message)
    from subquad._backends import jax_targets

    core = _core()
    config = {
        "version": __version__,
        "isa": core.get_isa(),
        "isa_levels": list(core.isa_levels()),
        "threads": core.get_num_threads(),
        "cuda": dict(core.cuda_info()),
        "jax": jax_targets.status() if _is_installed("jax") else None,
        "libraries": [
            name for name, module in _LIBRARIES.items() if _is_installed(module)
        ],
        "build": dict(core.build_config()),
    }
    if mode == "dicts":
        return config
    build = config["build"]
    lines = {
        "subquad": config["version"],
        "instruction set": f"{config['isa']} (of {', '.join(config['isa_levels'])})",
        "threads": config["threads"],
        "CUDA": _cuda_line(config["cuda"]),
        "JAX": config["jax"] or "not installed",
        "libraries": ", ".join(config["libraries"]),
        "build": ", ".join(
            f"{key} {value}"
            for key, value in build.items()
            if key not in ("version", "isa_levels")
        ),
    }
    for key, value in lines.items():
        print(f"{key:16} {value}")  # noqa: T201
    return None


def _cuda_line(info: dict[str, Any]) -> str:
    """Say in a line what there is of CUDA."""
    parts = []
    if info["runtime_version"]:
        parts.append(f"built for {info['architectures']}")
        parts.append(f"runtime {_cuda_version(info['runtime_version'])}")
    if info["driver_version"]:
        parts.append(f"driver {_cuda_version(info['driver_version'])}")
    if info["problem"]:
        parts.append(info["problem"])
        parts.append("arrays on CUDA are computed without kernels")
        return "; ".join(parts)
    n_devices = info["device_count"]
    parts.append(f"{n_devices} device{'' if n_devices == 1 else 's'}")
    return ", ".join(parts)


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
