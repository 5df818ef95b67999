"""Whether JAX arrays can go to the compiled kernels, without an import of JAX.

And what JAX is told once there are arrays of it: handlers, and the classes of states.

`subquad._jax` holds handlers of XLA's foreign function interface. XLA passes over those
that were compiled for a newer version of the interface than its own, in silence until a
call finds no handler: so the versions are compared here.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from subquad._states import STATES

_HEADER = "include/xla/ffi/api/c_api.h"

# Why handlers that were found were not taken after all.
_refused: list[str] = []

# The classes of states that JAX knows.
_registered: set[type] = set()


def status() -> str:
    """Return in a few words how JAX arrays are computed, and if by JAX itself, why."""
    reason = problem()
    if reason:
        return f"array-API code ({reason})"
    return f"compiled kernels (XLA FFI {_version_text(_handlers().VERSION)})"


def problem() -> str:
    """Return why JAX arrays cannot go to the compiled kernels; empty if they can."""
    if _refused:
        return _refused[0]
    try:
        built = _handlers().VERSION
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == _NAME
        return "built without the headers of jaxlib" if missing else str(error)
    return _mismatch(built, _version_of_jaxlib())


def register(jax: Any) -> None:
    """Tell XLA of the handlers.

    Raises
    ------
    ImportError
        If they are of no use to it.
    """
    module = _handlers()
    for name, platforms in module.handlers().items():
        for platform, handler in platforms.items():
            jax.ffi.register_ffi_target(f"subquad_{name}", handler, platform=platform)
    reason = _mismatch(module.VERSION, module.runtime_version())
    if reason:
        raise ImportError(reason)


def register_states(jax: Any) -> None:
    """Tell JAX that states are trees of arrays."""
    for kind in STATES:
        if kind not in _registered:
            jax.tree_util.register_dataclass(
                kind, data_fields=list(kind.field_names()), meta_fields=[]
            )
            _registered.add(kind)


def load() -> ModuleType | None:
    """Return the backend over the compiled kernels, or None: `problem` tells why.

    In both cases states have become trees of arrays.
    """
    register_states(importlib.import_module("jax"))
    if problem():
        return None
    try:
        from subquad._backends import jax
    except Exception as error:  # noqa: BLE001
        # Whatever it is, the reference works.
        _refused.append(f"{type(error).__name__}: {error}")
        return None
    return jax


_NAME = "subquad._jax"


def _handlers() -> Any:
    return importlib.import_module(_NAME)


@functools.cache
def _version_of_jaxlib() -> int:
    """Return 1000 major + minor of its foreign function interface; 0 if unknown."""
    spec = importlib.util.find_spec("jaxlib")
    for place in (spec and spec.submodule_search_locations) or ():
        try:
            text = (Path(place) / _HEADER).read_text(encoding="utf-8")
        except OSError:
            continue
        found = [
            re.search(rf"^#define XLA_FFI_API_{part} (\d+)$", text, re.MULTILINE)
            for part in ("MAJOR", "MINOR")
        ]
        if all(found):
            major, minor = (int(match[1]) for match in found if match)
            return 1000 * major + minor
    return 0


def _mismatch(built: int, found: int) -> str:
    if found == 0 or (built // 1000 == found // 1000 and built <= found):
        return ""
    return (
        f"built for version {_version_text(built)} of XLA's foreign function "
        f"interface, jaxlib has {_version_text(found)}"
    )


def _version_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000}"
