"""Coupled frequencies: every row normal, blocks as they should be, seeds that hold."""

from __future__ import annotations

import numpy as np
import pytest

from subquad import _feature_couplings as couplings
from subquad._feature_couplings import COUPLINGS, coupled_pairs, draw, padded_dimension


def blocks(coupling, d, n_blocks, seed=0):
    """Return many independent blocks of directions, (n_blocks, rows, d)."""
    generator = np.random.Generator(np.random.PCG64(seed))
    if coupling == "simplex":
        return couplings._simplices(generator, n_blocks, d, d)
    if coupling == "hadamard":
        return couplings._hadamard_blocks(generator, n_blocks, d, d, d)
    return couplings.haar(generator, n_blocks, d, d)


def z_score(samples, expected, axis=0):
    """Return how many standard errors the mean is off."""
    error = samples.std(axis=axis) / np.sqrt(samples.shape[axis])
    return np.abs(samples.mean(axis=axis) - expected) / error


# Of some hundred entries, the largest score of a right answer is below 4.5 in all but
# one draw of a thousand; draws are seeded.
MOST = 4.5


@pytest.mark.parametrize("coupling", ["orthogonal", "simplex"])
@pytest.mark.parametrize("d", [2, 5, 8])
def test_directions_are_uniform(coupling, d):
    q = blocks(coupling, d, 20_000)
    assert np.all(z_score(q, 0.0) < MOST)
    assert np.all(z_score(q**2, 1 / d) < MOST)
    assert np.all(z_score(q**4, 3 / (d * (d + 2))) < MOST)


def test_haar_matrices_are_invariant():
    """Traces of powers, which see what single entries do not."""
    q = blocks("orthogonal", 6, 20_000)
    trace = np.trace(q, axis1=-2, axis2=-1)
    square = np.trace(q @ q, axis1=-2, axis2=-1)
    assert z_score(trace, 0.0) < MOST
    assert z_score(trace**2, 1.0) < MOST
    assert z_score(trace**4, 3.0) < MOST
    assert z_score(square, 1.0) < MOST
    off = q[:, 0, 0] * q[:, 1, 1]
    assert z_score(off, 0.0) < MOST


def test_a_factorization_without_signs_fails_that_test():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(20_000, 8, 8)))
    diagonal = np.diagonal(q, axis1=-2, axis2=-1)
    assert np.all(z_score(diagonal[:, :7], 0.0) > 100)
    assert np.all(diagonal[:, :7].mean(0) < -0.2)


def test_fewer_rows_are_uniform_too():
    generator = np.random.Generator(np.random.PCG64(0))
    q = couplings.haar(generator, 20_000, 2, 6)
    assert q.shape == (20_000, 2, 6)
    np.testing.assert_allclose(
        q @ np.swapaxes(q, -1, -2),
        np.broadcast_to(np.eye(2), (20_000, 2, 2)),
        atol=1e-13,
    )
    assert np.all(z_score(q, 0.0) < MOST)
    assert np.all(z_score(q**4, 3 / 48) < MOST)


@pytest.mark.parametrize("d", [2, 3, 8])
def test_simplex_angles(d):
    q = blocks("simplex", d, 50)
    gram = q @ np.swapaxes(q, -1, -2)
    expected = np.full((d, d), -1 / (d - 1))
    np.fill_diagonal(expected, 1.0)
    np.testing.assert_allclose(gram, np.broadcast_to(expected, gram.shape), atol=1e-13)


@pytest.mark.parametrize("d", [16, 64])
def test_hadamard_blocks(d):
    q = blocks("hadamard", d, 2000)
    np.testing.assert_allclose(
        q[:50] @ np.swapaxes(q[:50], -1, -2),
        np.broadcast_to(np.eye(d), (50, d, d)),
        atol=1e-13,
    )
    assert np.all(z_score(q[:, :3].reshape(2000, -1), 0.0) < MOST + 0.5)
    # Three blocks have (3 - (6 p - 4) / p²) / p² where the sphere has 3 / (p (p + 2)).
    fourth = (3 - (6 * d - 4) / d**2) / d**2
    assert np.all(z_score((q[:, :2] ** 4).reshape(2000, -1), fourth) < MOST + 0.5)
    assert abs(fourth * d * (d + 2) / 3 - 1) < 8 / (3 * d**2)


@pytest.mark.parametrize("n", [1, 2, 8, 32])
def test_walsh_hadamard(n):
    matrix = couplings.walsh_hadamard(np.eye(n))
    signs = [[(-1) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
    np.testing.assert_allclose(matrix, np.array(signs) / np.sqrt(n), atol=1e-15)
    rows = np.random.default_rng(0).normal(size=(2, 3, n))
    np.testing.assert_allclose(
        couplings.walsh_hadamard(rows), rows @ matrix, atol=1e-14
    )


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("d", [1, 2, 3, 16, 19])
@pytest.mark.parametrize("n_rows", [0, 1, 7, 16, 45])
def test_draws(coupling, d, n_rows):
    omega = draw(coupling, n_rows, d, 5)
    assert omega.shape == (n_rows, d) and omega.dtype == np.float64
    assert np.all(np.isfinite(omega))
    np.testing.assert_array_equal(omega, draw(coupling, n_rows, d, 5))
    if n_rows:
        assert np.any(omega != draw(coupling, n_rows, d, 6))
    if coupling == "iid" or d == 1:
        assert coupled_pairs(coupling, n_rows, d) == 0
        return
    pairs = 0
    for start in range(0, n_rows, padded_dimension(coupling, d)):
        block = omega[start : start + padded_dimension(coupling, d)]
        size = len(block)
        pairs += size * (size - 1)
        gram = block @ block.T
        norms = np.sqrt(np.diagonal(gram))
        cosines = (gram / norms / norms[:, None])[~np.eye(size, dtype=bool)]
        if coupling == "simplex":
            np.testing.assert_allclose(cosines, -1 / (d - 1), atol=1e-13)
        elif coupling == "orthogonal" or d != 19:
            np.testing.assert_allclose(cosines, 0.0, atol=1e-13)
    assert coupled_pairs(coupling, n_rows, d) == pairs


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("d", [1, 3, 19])
def test_rows_are_normal(coupling, d):
    """Mean, covariance and norms; the padded block has those of 19 dimensions."""
    omega = draw(coupling, 60_000, d, 0).reshape(-1, 60, d)
    # Rows of a block are not independent: scores are of means over several blocks.
    assert np.all(z_score(omega.mean(1), 0.0) < MOST)
    outer = np.einsum("bni,bnj->bij", omega, omega) / 60
    assert np.all(z_score(outer, np.eye(d)) < MOST)
    square = (omega**2).sum(-1)
    assert z_score(square.mean(1), d) < MOST
    assert z_score(((square - d) ** 2).mean(1), 2 * d) < MOST


def test_norms_are_independent_of_directions():
    omega = draw("orthogonal", 40_000, 4, 0)
    norms = np.linalg.norm(omega, axis=1).reshape(-1, 4)
    product = (norms[:, 0] - norms.mean()) * (norms[:, 1] - norms.mean())
    assert z_score(product, 0.0) < MOST


def test_orthogonal_features_are_unbiased_for_one_sided_exponentials():
    """The kernel's mean over whole draws; it leans by a third without the signs."""
    d, s = 8, 0.9
    u = np.full(d, np.sqrt(s / d))
    for coupling in ("orthogonal", "simplex"):
        omega = draw(coupling, 40_000, d, 1)
        estimates = np.exp(omega @ u - s / 2).reshape(-1, d).mean(1)
        assert z_score(estimates, 1.0) < 4
