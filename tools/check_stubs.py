"""Compare the type stub of the compiled module with the module itself.

``python tools/check_stubs.py`` fails where ``_core.pyi`` and ``_core`` disagree on a
name or on a signature; ``--write`` replaces the stub by the generated one.
"""

from __future__ import annotations

import argparse
import ast
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
STUB = ROOT / "python" / "subquad" / "_core.pyi"


def generate() -> str:
    """Return the stub of the compiled module, in the project's format."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["pybind11-stubgen", "subquad._core", "--output-dir", folder]
        subprocess.run(
            [*command, "--exit-code"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        (generated,) = pathlib.Path(folder).rglob("_core.pyi")
        text = generated.read_text(encoding="utf-8")
    for subcommand in (["check", "--fix", "--exit-zero", "--quiet"], ["format"]):
        text = subprocess.run(
            ["ruff", *subcommand, "--stdin-filename", str(STUB), "-"],
            check=True,
            capture_output=True,
            text=True,
            input=text,
            cwd=ROOT,
        ).stdout
    return text


def signatures(text: str) -> dict[str, list[str]]:
    """Names of the functions and of their arguments, in order."""
    return {
        node.name: [
            argument.arg
            for argument in ast.walk(node.args)
            if isinstance(argument, ast.arg)
        ]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    }


def main() -> int:
    """Check the stub, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the stub")
    options = parser.parse_args()
    generated = generate()
    if options.write:
        STUB.write_text(generated, encoding="utf-8")
        return 0
    expected, found = signatures(generated), signatures(STUB.read_text("utf-8"))
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            print(f"_core.{name}: module {expected.get(name)}, stub {found.get(name)}")
    return int(expected != found)


if __name__ == "__main__":
    sys.exit(main())
