"""Write the errors of attention by features: ``docs/_generated/attention_errors.md``.

|Â - A| / |A| in the Frobenius norm of attention matrices, the median of some problems:
1024 queries and keys in 64 dimensions, 256 features, variances ∝ 1/l along axes that
are rotated for queries and keys independently.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import subquad as sq
from tools.features._common import (
    Choice,
    decaying,
    haar,
    inaccurate,
    softmax,
    table,
    wants_quick,
    write,
)

CHOICES = (
    Choice("positive"),
    Choice("positive", pairs=True),
    Choice("oprf"),
    Choice("sderf"),
    Choice("aderf"),
    Choice("saderf"),
    Choice("csaderf+", pairs=True),
    Choice("csderf", pairs=True),
    Choice("cderf"),
    Choice("cderf", coupling="simplex"),
    Choice("cderf", pairs=True),
    Choice("cderf", pairs=True, coupling="hadamard"),
)
SETTINGS = ((1.0, 0.0), (1.0, 1.0), (1.5, 1.0), (2.0, 2.0))
DIMENSION, LENGTH, COMPONENTS, PROBLEMS = 64, 1024, 256, 8


def problem(scale: float, mean: float, seed: int, n: int = LENGTH) -> tuple[Any, Any]:
    """Return queries and keys, deviations times `scale` about means of that norm."""
    generator = np.random.default_rng(seed)

    def rows() -> Any:
        centre = generator.standard_normal(DIMENSION)
        centre *= mean / np.linalg.norm(centre)
        return scale * decaying(generator, n, haar(generator, DIMENSION)) + centre

    return rows(), rows()


def fitted(choice: Choice, q: Any, k: Any, m: int, seed: int) -> Any:
    """Return m features fitted to the queries and keys."""
    features = choice.features(m, seed)
    with inaccurate():
        return features.fit(q, keys=k)


def relative_error(found: Any, truth: Any) -> float:
    """Return |found - truth| / |truth|."""
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def errors(
    scale: float, mean: float, seed: int, n: int = LENGTH, m: int = COMPONENTS
) -> list[float]:
    """Return the error of uniform attention and of each choice, for one problem."""
    q, k = problem(scale, mean, seed, n)
    truth = softmax(q @ k.T)
    found = [np.full_like(truth, 1 / n)]
    for choice in CHOICES:
        features = fitted(choice, q, k, m, seed)
        # Values that are the identity give the attention matrix itself.
        found.append(sq.random_feature_attention(q, k, np.eye(n), features))
    return [relative_error(matrix, truth) for matrix in found]


def predictions(
    scale: float, mean: float, seed: int, n: int = LENGTH, m: int = COMPONENTS
) -> list[float]:
    """Return the error that is predicted for each choice, for one problem."""
    q, k = problem(scale, mean, seed, n)
    size = float(np.linalg.norm(softmax(q @ k.T)))
    found = []
    for choice in CHOICES:
        features = fitted(choice, q, k, m, seed)
        by_row = features.attention_error(q, k, np.eye(n))
        found.append(float(np.linalg.norm(by_row)) / size)
    return found


def page(n_problems: int = PROBLEMS) -> str:
    """Return the table: medians over the problems, and predictions for the first."""
    head = ["size, mean", "uniform", *(choice.label for choice in CHOICES)]
    rows = []
    for scale, mean in SETTINGS:
        found = [errors(scale, mean, seed) for seed in range(n_problems)]
        name = f"{scale:g}, {mean:g}"
        rows.append([name, *map(three_digits, np.median(found, axis=0))])
        predicted = map(three_digits, predictions(scale, mean, 0))
        rows.append([f"{name}, predicted", "", *predicted])
    return table(head, rows)


def three_digits(value: float) -> str:
    """Return an error with three digits after the point, fewer if large."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def main() -> int:
    """Write the page."""
    write("attention_errors", page(2 if wants_quick(__doc__) else PROBLEMS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
