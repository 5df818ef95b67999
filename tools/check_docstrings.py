"""Validate the docstrings of all public objects with numpydoc.

The checks stand in ``[tool.numpydoc_validation]`` of ``pyproject.toml``: "all" and
those that are left out. Public is what a public module lists in ``__all__``, with the
public methods of classes; learned attributes are described in the class's docstring.
"""

from __future__ import annotations

import importlib
import inspect
import pathlib
import sys
import tomllib
from collections.abc import Iterator

from numpydoc.validate import validate

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULES = [
    "subquad",
    "subquad.attention",
    "subquad.embedding",
    "subquad.factors",
    "subquad.features",
    "subquad.normalizers",
    "subquad.scans",
    "subquad.vjp",
]


def public_names() -> Iterator[str]:
    """Yield the qualified names of all public objects, each object once."""
    seen = set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            documented = inspect.isclass(value) or inspect.isroutine(value)
            if not documented or id(value) in seen:
                continue
            seen.add(id(value))
            yield f"{module_name}.{name}"
            if inspect.isclass(value):
                for member, attribute in vars(value).items():
                    if not member.startswith("_") and inspect.isroutine(attribute):
                        yield f"{module_name}.{name}.{member}"


def main() -> int:
    """Print what is wrong; return 1 where something is."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        checks = tomllib.load(file)["tool"]["numpydoc_validation"]["checks"]
    left_out = set(checks) - {"all"}
    problems = [
        f"{name}: {code} {text}"
        for name in public_names()
        for code, text in validate(name)["errors"]
        if code not in left_out
    ]
    print(*problems, sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
