"""Write how products of factors grow, and how well they are conditioned.

``docs/_generated/factor_growth.md``: the size of a product over that of its rows,
values from networks as ``torch.nn.Linear`` draws them.
``docs/_generated/factor_conditioning.md``: condition numbers of dense products.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import subquad as sq
from tools.features._common import table, write

PATTERNS = ("chord", "cdil")
RESIDUALS = ("none", "step", "input")
WIDTH = 32
# Size of normal values, and the residual that they come with.
DRAWS = ((1.0, "none"), (0.2, "step"), (0.05, "step"), (0.2, "input"))


def shape_of(pattern: str, n: int) -> tuple[int, int]:
    """Return the factors of a pattern that reach every row, and their entries a row."""
    if pattern == "chord":
        k = len(sq.chord_offsets(n))
        return k - 1, k
    n_factors, k = sq.cdil_offsets(n).shape
    return n_factors, k


def networks(
    generator: np.random.Generator, n_factors: int, width: int, k: int
) -> sq.FactorWeights:
    """Return weights and biases as torch.nn.Linear draws them."""

    def layer(columns: int, *shape: int) -> Any:
        bound = 1 / math.sqrt(columns)
        return generator.uniform(-bound, bound, (n_factors, *shape))

    return sq.FactorWeights(
        layer(width, width, width),
        layer(width, width),
        layer(width, k, width),
        layer(width, k),
    )


def growth(pattern: str, residual: str, n: int, seed: int = 0) -> float:
    """Return |y| / |v| of normal rows and fresh networks."""
    generator = np.random.default_rng(seed)
    n_factors, k = shape_of(pattern, n)
    x, v = generator.standard_normal((2, n, WIDTH))
    weights = networks(generator, n_factors, WIDTH, k)
    y = sq.paramixer(x, v, weights, pattern=pattern, residual=residual)
    return float(np.linalg.norm(y) / np.linalg.norm(v))


def condition(pattern: str, residual: str, size: float, n: int, draws: int) -> float:
    """Return the median condition number of dense products of normal values."""
    generator = np.random.default_rng(0)
    n_factors, k = shape_of(pattern, n)
    found = []
    for _ in range(draws):
        values = size * generator.standard_normal((n_factors, n, k))
        dense = sq.sparse_factor_product(
            values, np.eye(n), pattern=pattern, residual=residual
        )
        found.append(np.linalg.cond(dense))
    return float(np.median(found))


def growth_page(lengths: tuple[int, ...] = (128, 1024, 16384)) -> str:
    """Return the table of growth."""
    head = ["rows", *(f"{p}, `{r}`" for p in PATTERNS for r in RESIDUALS)]
    rows = [
        [str(n), *(f"{growth(p, r, n):.2g}" for p in PATTERNS for r in RESIDUALS)]
        for n in lengths
    ]
    return table(head, rows)


def condition_page(lengths: tuple[int, ...] = (16, 64, 256), draws: int = 9) -> str:
    """Return the table of condition numbers."""
    head = ["values, residual", *(f"{p}, n = {n}" for p in PATTERNS for n in lengths)]
    rows = [
        [
            f"{size:g}, `{residual}`",
            *(
                f"{condition(p, residual, size, n, draws):.1e}"
                for p in PATTERNS
                for n in lengths
            ),
        ]
        for size, residual in DRAWS
    ]
    return table(head, rows)


def main() -> int:
    """Write the pages."""
    write("factor_growth", growth_page())
    write("factor_conditioning", condition_page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
