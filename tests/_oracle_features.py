"""Random features from their definitions: what the fits and the predictions must match.

Nothing here shares code with the library: features are evaluated term by term, means
over frequencies are Gauss-Hermite sums, means over pairs of rows are taken pair by
pair.
"""

from __future__ import annotations

import numpy as np


def kernel(x, y, alpha) -> np.ndarray:
    """Return log K of every pair."""
    square = (
        alpha * (x * x).sum(-1)[..., :, None] + alpha * (y * y).sum(-1)[..., None, :]
    )
    return square + x @ np.swapaxes(y, -1, -2)


def log_positive(x, omega, basis, shift, other, rho, alpha, antithetic=False):
    """Return the log-features of one side, (n, m) or (n, 2 m)."""
    a = (1 - 1 / rho) / 8
    v = 1 - 4 * a
    n_components = len(omega) * (2 if antithetic else 1)
    turned = (x - shift) @ basis.T
    row = alpha * (x * x).sum(-1) + x @ other - shift @ other / 2
    row = row - (turned * turned).sum(-1) / 2
    column = (a * omega**2).sum(-1) + np.log(v).sum() / 4 - np.log(n_components) / 2
    product = turned @ (np.sqrt(v) * omega).T
    base = row[:, None] + column
    if antithetic:
        return np.concatenate([base + product, base - product], axis=-1)
    return base + product


def map_logs(mapping, x, antithetic=False):
    """Return what `log_features` must give for a map, (n, n_components)."""
    projection, bias, quadratic, shift, linear = mapping
    z = x if shift is None else x - shift
    if quadratic.ndim == projection.ndim:
        form = ((z @ quadratic.T) ** 2).sum(-1)
    else:
        form = (quadratic * z * z).sum(-1)
    row = -form / 2 + (0 if linear is None else z @ linear)
    product = z @ projection.T
    base = row[:, None] + bias
    if antithetic:
        return np.concatenate([base + product, base - product], axis=-1)
    return base + product


def map_waves(mapping, x):
    """Return what `trigonometric_features` must give for a map."""
    projection, bias, quadratic, shift, linear = mapping
    z = x if shift is None else x - shift
    row = -(quadratic * z * z).sum(-1) / 2 + (0 if linear is None else z @ linear)
    size, angle = np.exp(row[:, None] + bias), z @ projection.T
    return np.concatenate([size * np.cos(angle), size * np.sin(angle)], axis=-1)


def hermite(d, n=100):
    """Return nodes (n^d, d) and weights (n^d,) of N(0, I)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    weights = weights / weights.sum()
    grids = np.meshgrid(*[nodes] * d, indexing="ij")
    products = np.prod(np.meshgrid(*[weights] * d, indexing="ij"), axis=0)
    return np.stack([grid.ravel() for grid in grids], axis=-1), products.ravel()


def pair_phi(basis, inverse, shift_x, shift_y, x, y):
    """Return the mean over all pairs of the squares of u."""
    left, right = (x - shift_x) @ basis.T, (y - shift_y) @ inverse.T
    u = left[:, None, :] + right[None, :, :]
    return (u * u).mean(axis=(0, 1))


def log_second_moment(rho, phi) -> float:
    """Return Σ log((1 + ρ) / (2 √ρ)) + ρ φ."""
    return float(np.sum(np.log((1 + rho) / (2 * np.sqrt(rho))) + rho * phi))


def problem(d, n=7, m=9, mean=1.0, seed=0, size=0.6):
    """Return queries and keys of unequal shapes and, unless `mean` is 0, centres."""
    rng = np.random.default_rng(seed)
    x = size * rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    y = size * rng.normal(size=(m, d)) @ rng.normal(size=(d, d))
    x, y = x - x.mean(0), y - y.mean(0)
    return x + mean * rng.normal(size=d) / 2, y + mean * rng.normal(size=d) / 2
