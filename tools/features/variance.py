"""Write the table of relative variances: ``docs/_generated/variance_table.md``.

The mean over pairs of log(Var / K²) of the estimate by one ω, in closed form: digits
of scikit-learn at four bandwidths, raw and centred, and generated Gaussian rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tools.features._common import Choice, decaying, haar, inaccurate, table, write

CHOICES = (
    Choice("trigonometric", coupling="iid"),
    *(
        Choice(family, pairs, "iid")
        for family, pairs in (
            ("positive", True),
            ("positive", False),
            ("oprf", False),
            ("saderf", False),
            ("sderf", False),
            ("aderf", False),
            ("saderf+", False),
            ("bderf", False),
            ("csaderf+", False),
            ("csderf", False),
            ("cderf", False),
            ("cderf", True),
        )
    ),
)
ROWS = 512
DIMENSION = 64


def digits(n: int = ROWS, *, centred: bool = False, seed: int = 0) -> tuple[Any, Any]:
    """Return two samples of n digits in units of the median distance between them.

    Pixels that are constant in the samples are left out.
    """
    from sklearn.datasets import load_digits

    images = np.asarray(load_digits().data)
    order = np.random.default_rng(seed).permutation(len(images))
    sample = images[order[: 2 * n]]
    sample = sample[:, sample.std(axis=0) > 0]
    x, y = sample[:n], sample[n:]
    squares = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2 * x @ y.T
    median = np.sqrt(np.median(squares))
    centre = sample.mean(axis=0) if centred else 0.0
    return (x - centre) / median, (y - centre) / median


def problems(n: int = ROWS) -> Iterator[tuple[str, Any, Any]]:
    """Yield the rows of the table: name, queries, keys."""
    d = DIMENSION
    for energy in (0.25, 1.0, 4.0, 16.0, 36.0):
        x, y = np.random.default_rng(1).standard_normal((2, n, d))
        size = np.sqrt(energy / d)
        yield f"isotropic, E\\|x\\|² = {energy:g}", size * x, size * y
    for energy in (4.0, 16.0):
        generator = np.random.default_rng(2)
        x, y = np.sqrt(energy) * decaying(generator, 2 * n, haar(generator, d)).reshape(
            2, n, d
        )
        yield f"one covariance, variances ∝ 1/l, E\\|x\\|² = {energy:g}", x, y
    for energy in (4.0, 16.0):
        generator = np.random.default_rng(3)
        x, y = (
            np.sqrt(energy) * decaying(generator, n, haar(generator, d)) for _ in "xy"
        )
        yield f"two covariances, E\\|x\\|² = {energy:g}", x, y
    for energy in (4.0, 16.0, 36.0):
        generator = np.random.default_rng(4)
        x, y = (
            np.sqrt(energy / 2)
            * (
                decaying(generator, n, haar(generator, d))
                + unit(generator.standard_normal(d))
            )
            for _ in "xy"
        )
        yield f"two covariances and means, E\\|x\\|² = {energy:g}", x, y
    for centred in (False, True):
        x, y = digits(n, centred=centred)
        for bandwidth in (2.0, 1.0, 0.5, 0.25):
            name = f"digits{', centred' if centred else ''}, σ = {bandwidth:g} · median"
            yield name, x / bandwidth, y / bandwidth


def unit(x: Any) -> Any:
    """Return a vector divided by its norm."""
    return x / np.linalg.norm(x)


def mean_log_variance(choice: Choice, x: Any, y: Any, **options: Any) -> float:
    """Return the mean over pairs of log(Var / K²) of the estimate by one ω."""
    two = choice.pairs or choice.family == "trigonometric"
    features = choice.features(2 if two else 1, **options)
    with inaccurate():
        features.fit(x, keys=y)
    return float(np.mean(features.log_relative_variance(x, y)))


def page(n: int = ROWS) -> str:
    """Return the table."""
    head = ["", *(c.label.removesuffix(", iid") for c in CHOICES)]
    rows = [
        [name, *(f"{mean_log_variance(c, x, y):.2f}" for c in CHOICES)]
        for name, x, y in problems(n)
    ]
    return table(head, rows)


def main() -> int:
    """Write the page."""
    write("variance_table", page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
