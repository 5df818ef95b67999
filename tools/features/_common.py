"""What the studies share: families by column, features, pages."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import subquad as sq
from subquad.features import InaccurateFeaturesWarning

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "_generated"


class Choice(NamedTuple):
    """One way to draw features: a column of a table."""

    family: str
    pairs: bool = False
    coupling: str = "orthogonal"

    @property
    def label(self) -> str:
        """The column's heading."""
        sign = " ±" if self.pairs else ""
        coupling = "" if self.coupling == "orthogonal" else f", {self.coupling}"
        return f"{self.family}{sign}{coupling}"

    def features(self, n_components: int, seed: int = 0, **options: Any) -> Any:
        """Return the estimator, which has yet to be fitted."""
        return sq.RandomFeatures(
            n_components,
            family=self.family,
            coupling=self.coupling,
            antithetic=self.pairs,
            random_state=seed,
            **options,
        )


@contextlib.contextmanager
def inaccurate() -> Iterator[None]:
    """Let features be as inaccurate as they are: the tables say how much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InaccurateFeaturesWarning)
        yield


def haar(generator: np.random.Generator, d: int) -> Any:
    """Return a rotation, uniform over all of them."""
    q, r = np.linalg.qr(generator.standard_normal((d, d)))
    return q * np.sign(np.diag(r))


def decaying(generator: np.random.Generator, n: int, rotation: Any) -> Any:
    """Return Gaussian rows of variances ∝ 1/l along rotated axes, E|x|² = 1."""
    d = len(rotation)
    variances = 1 / np.arange(1, d + 1)
    axes = np.sqrt(variances / variances.sum())[:, None] * rotation
    return generator.standard_normal((n, d)) @ axes


def softmax(scores: Any) -> Any:
    """Return the exponentials of each row, divided by their sum."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def package_file(package: str, name: str) -> Path:
    """Return a file that a package installs, without importing the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"package {package} is not installed")
    return Path(found.origin).parent / name


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column of text and the rest of numbers."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def write(name: str, text: str) -> None:
    """Write a page and show it."""
    (PAGES / f"{name}.md").write_text(text, encoding="utf-8")
    print(f"{name}\n\n{text}")


def wants_quick(description: str | None) -> bool:
    """Return whether the command line asks for a short run."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    return bool(parser.parse_args().quick)
