"""Fits of feature families: unbiased, optimal, safe where moments are poor."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import linalg, optimize

import _oracle_features as oracle
from subquad import _feature_families as families
from subquad._feature_families import FAMILIES, fit_geometry
from subquad._feature_maps import fold, fold_trigonometric, symmetric
from subquad._feature_statistics import Moments, moments_of

POSITIVE = [name for name in FAMILIES if name != "trigonometric"]
EPSILON = np.finfo(float).eps


def fitted(name, x, y=None, objective="log", regularization=0.0):
    family = FAMILIES[name] if isinstance(name, str) else name
    first = moments_of(x, False)
    second = first if y is None else moments_of(y, False)
    return fit_geometry(
        family, first, second, objective=objective, regularization=regularization
    )


# ---------------------------------------------------------------- unbiased


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("alpha", [0.0, -0.5])
@pytest.mark.parametrize("name", POSITIVE)
def test_first_and_second_moments_by_quadrature(name, alpha, d):
    t = 0.8
    x, y = oracle.problem(d, seed=d)
    geometry = fitted(name, t * x, t * y)
    # Rows that the fit has not seen.
    x, y = x[:3] + 0.1, y[:4] - 0.2
    omega, weights = oracle.hermite(d)
    log_k = oracle.kernel(t * x, t * y, alpha)
    u = (
        geometry.query_coordinates(t * x)[:, None, :]
        + geometry.key_coordinates(t * y)[None, :, :]
    )
    total = np.log((1 + geometry.rho) / (2 * np.sqrt(geometry.rho))).sum()
    plus = np.exp(total + (geometry.rho * u * u).sum(-1))
    minus = np.exp(total - (u * u).sum(-1))
    for antithetic in (False, True):
        rows = len(omega) * (2 if antithetic else 1)
        maps = fold(geometry, omega, alpha, t, rows, antithetic)
        left, right = (
            oracle.map_logs(m, rows_, antithetic)
            for m, rows_ in zip(maps, (x, y), strict=True)
        )
        # The mean over the nodes would give each the weight 1/n.
        ratios = np.exp(left[:, None] + right[None] - log_k[..., None]) * rows
        if antithetic:
            ratios = (ratios[..., : len(omega)] + ratios[..., len(omega) :]) / 2
        np.testing.assert_allclose(ratios @ weights, 1, rtol=1e-12)
        expected = (plus + minus) / 2 if antithetic else plus
        np.testing.assert_allclose(ratios**2 @ weights, expected, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, -0.5])
@pytest.mark.parametrize("d", [1, 2])
def test_trigonometric_moments_by_quadrature(d, alpha):
    # Cosines cancel where the kernel is small.
    x, y = oracle.problem(d, seed=3, mean=0.5, size=0.25)
    geometry = fitted("trigonometric", x, y)
    omega, weights = oracle.hermite(d)
    rows = len(omega)
    maps = fold_trigonometric(geometry, omega, alpha, 1.0, 2 * rows)
    assert maps[0] is maps[1]
    left, right = oracle.map_waves(maps[0], x), oracle.map_waves(maps[1], y)
    terms = (left[:, None] * right[None]).reshape(len(x), len(y), 2, rows).sum(2)
    ratios = terms * rows / np.exp(oracle.kernel(x, y, alpha))[..., None]
    np.testing.assert_allclose(ratios @ weights, 1, rtol=1e-12)
    s = ((x[:, None] - y[None]) ** 2).sum(-1)
    np.testing.assert_allclose(ratios**2 @ weights, np.cosh(s), rtol=1e-12)
    np.testing.assert_allclose(
        geometry.phi, ((x[:, None] - y[None]) ** 2).mean((0, 1)), rtol=1e-12
    )


@pytest.mark.parametrize("name", ["positive", "sderf", "cderf", "csaderf+"])
def test_pairs_that_share_a_frequency_by_quadrature(name):
    """E[Ẑ Ẑ'] of two pairs of rows, which the error of attention rests on."""
    x, y = oracle.problem(2, seed=5)
    geometry = fitted(name, x, y)
    omega, weights = oracle.hermite(2)
    maps = fold(geometry, omega, 0.0, 1.0, len(omega), False)
    left, right = oracle.map_logs(maps[0], x[:1]), oracle.map_logs(maps[1], y)
    log_k = oracle.kernel(x[:1], y, 0.0)
    ratios = np.exp(left + right - log_k[0][:, None]) * len(omega)
    found = (ratios * weights) @ ratios.T
    u = geometry.query_coordinates(x[:1]) + geometry.key_coordinates(y)
    rho = geometry.rho
    total = np.log((1 + rho) / (2 * np.sqrt(rho))).sum()
    both, square = u[:, None] + u[None], u[:, None] ** 2 + u[None] ** 2
    expected = np.exp(total + ((1 + rho) / 4 * both**2 - square / 2).sum(-1))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("alpha", [0.0, -0.5])
@pytest.mark.parametrize("name", POSITIVE)
def test_maps_are_the_definition(name, alpha, antithetic):
    d, t = 5, 0.7
    x, y = oracle.problem(d, n=20, m=30, seed=1)
    geometry = fitted(name, t * x, t * y, regularization="auto")
    omega = np.random.default_rng(0).normal(size=(6, d))
    maps = fold(geometry, omega, alpha, t, 12 if antithetic else 6, antithetic)
    c, e = geometry.shift_x, geometry.shift_y
    sides = [
        (x, geometry.basis, c, e),
        (y, geometry.inverse_transpose, e, c),
    ]
    for mapping, (rows, basis, shift, other) in zip(maps, sides, strict=True):
        expected = oracle.log_positive(
            t * rows, omega, basis, shift, other, geometry.rho, alpha, antithetic
        )
        # Some thirty operations on logs of size 30.
        np.testing.assert_allclose(
            oracle.map_logs(mapping, rows, antithetic), expected, rtol=0, atol=1e-12
        )
        if mapping.quadratic.ndim == 2:
            assert not np.any(np.tril(mapping.quadratic, -1))
    assert (maps[0].shift is None) == (not FAMILIES[name].centered)


def test_one_set_of_rows_has_one_map():
    x, y = oracle.problem(4, seed=2)
    omega = np.random.default_rng(0).normal(size=(3, 4))
    for name in POSITIVE:
        geometry = fitted(name, x, regularization="auto")
        assert symmetric(geometry)
        maps = fold(geometry, omega, -0.5, 1.0, 3, False)
        assert maps[0] is maps[1]
        assert maps[0].quadratic.ndim == 1
        other = fitted(name, x, y, regularization="auto")
        assert symmetric(other) == (name in ("positive", "oprf", "sderf"))


# ---------------------------------------------------------------- optimal


def objective_of(geometry, x, y) -> float:
    phi = oracle.pair_phi(
        geometry.basis,
        geometry.inverse_transpose,
        geometry.shift_x,
        geometry.shift_y,
        x,
        y,
    )
    return oracle.log_second_moment(geometry.rho, phi)


def skew(values, d):
    matrix = np.zeros((d, d))
    matrix[np.triu_indices(d, 1)] = values
    return matrix - matrix.T


def best_found(basis, shifted, per_dimension, x, y, starts=2) -> float:
    """Return the least mean log second moment that a general optimiser finds."""
    d = x.shape[1]
    sizes = {"identity": 0, "diagonal": d, "orthogonal": d * (d - 1) // 2, "any": d * d}
    n_basis, n_rho = sizes[basis], d if per_dimension else 1

    def value(parameters):
        free, log_rho, shifts = np.split(parameters, [n_basis, n_basis + n_rho])
        if basis == "identity":
            turn = np.eye(d)
        elif basis == "diagonal":
            turn = np.diag(np.exp(free))
        elif basis == "orthogonal":
            turn = linalg.expm(skew(free, d))
        else:
            turn = free.reshape(d, d)
        c, e = shifts.reshape(2, d) if shifted else np.zeros((2, d))
        phi = oracle.pair_phi(turn, np.linalg.inv(turn).T, c, e, x, y)
        return oracle.log_second_moment(np.exp(log_rho) * np.ones(d), phi)

    rng = np.random.default_rng(1)
    best = np.inf
    for _ in range(starts):
        start = 0.3 * rng.normal(size=n_basis + n_rho + (2 * d if shifted else 0))
        if basis == "any":
            start[:n_basis] += np.eye(d).ravel()
        found = optimize.minimize(value, start, method="BFGS", options={"gtol": 1e-7})
        best = min(best, found.fun)
    return best


@pytest.mark.parametrize(
    "name, basis, mean",
    [
        ("oprf", "identity", 1.0),
        ("saderf", "diagonal", 1.0),
        ("saderf+", "diagonal", 1.0),
        ("sderf", "orthogonal", 1.0),
        ("aderf", "any", 1.0),
        ("bderf", "any", 0.0),
        ("csderf", "orthogonal", 1.0),
        ("csaderf+", "diagonal", 1.0),
        ("cderf", "any", 1.0),
    ],
)
def test_closed_forms_are_optimal(name, basis, mean):
    d = 2 if basis == "any" else 3
    x, y = oracle.problem(d, mean=mean, seed=11)
    family = FAMILIES[name]
    found = best_found(basis, family.centered, family.scales == "per_dimension", x, y)
    closed = objective_of(fitted(name, x, y), x, y)
    np.testing.assert_allclose(closed, found, rtol=0, atol=1e-8)
    geometry = fitted(name, x, y)
    np.testing.assert_allclose(
        families.log_second_moment(geometry.rho, geometry.phi), closed, rtol=1e-12
    )


@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_families_improve_on_those_they_contain(seed, mean):
    x, y = oracle.problem(4, mean=mean, seed=seed)
    value = {name: objective_of(fitted(name, x, y), x, y) for name in POSITIVE}
    chains = [
        ("cderf", "bderf", "aderf", "saderf", "oprf", "positive"),
        ("cderf", "csderf", "sderf", "oprf"),
        ("cderf", "csaderf+", "saderf+", "saderf"),
    ]
    for chain in chains:
        for better, worse in itertools.pairwise(chain):
            # Equal where the means vanish, to rounding.
            assert value[better] <= value[worse] + 1e-13
    if mean == 0.0:
        assert value["bderf"] <= value["sderf"] + 1e-13
        np.testing.assert_allclose(value["cderf"], value["bderf"], rtol=1e-12)
    assert value["cderf"] < value["aderf"] - 1e-3


@pytest.mark.parametrize("name", POSITIVE)
def test_phi_is_the_mean_over_pairs(name):
    for mean in (0.0, 2.0):
        x, y = oracle.problem(4, mean=mean, seed=8)
        geometry = fitted(name, x, y)
        expected = oracle.pair_phi(
            geometry.basis,
            geometry.inverse_transpose,
            geometry.shift_x,
            geometry.shift_y,
            x,
            y,
        )
        np.testing.assert_allclose(geometry.phi, expected, rtol=1e-11)
        u = geometry.query_coordinates(x).mean(0) + geometry.key_coordinates(y).mean(0)
        stated = 0.0 if geometry.mean is None else geometry.mean
        np.testing.assert_allclose(u, stated + np.zeros(4), atol=1e-13)


@pytest.mark.parametrize("phi", [1e-12, 1e-3, 0.25, 1.0, 30.0, 1e6])
def test_rho_of_the_mean_log(phi):
    found = optimize.minimize_scalar(
        lambda log_rho: oracle.log_second_moment(np.exp(log_rho), phi),
        bracket=(-1, 0),
        tol=1e-12,
    )
    value = families.log_second_moment(
        families.rho_log(np.array([phi])), np.array([phi])
    )
    assert value <= found.fun + 1e-15
    np.testing.assert_allclose(value, found.fun, rtol=1e-9, atol=1e-15)


def test_rho_keeps_its_digits():
    phi = np.array([0.0, 1e-300, 1e-17, 1e300])
    with np.errstate(all="raise", under="ignore"):
        rho = families.rho_log(phi)
        small = families.kappa(np.array([1.0, 1.0 - 1e-9]))
    np.testing.assert_allclose(rho, [1, 1, 1, 0.5e-300], rtol=1e-12)
    # κ is close to (1 - ρ)² / 8.
    assert small[0] == 0.0
    np.testing.assert_allclose(small[1], 1e-18 / 8, rtol=1e-6)


@pytest.mark.parametrize("scalar", [False, True])
def test_rho_of_the_mean(scalar):
    rng = np.random.default_rng(0)
    variance = np.exp(rng.normal(size=(3, 4)))
    square = np.exp(rng.normal(size=(3, 4)))
    variance[0, 0] = square[1] = square[2, 0] = 0.0

    def log_mean(rho, v, m):
        left = 1 - 2 * rho * v
        if not 0 < rho <= 1 or np.any(left <= 0):
            return np.inf
        return np.sum(
            np.log((1 + rho) / (2 * np.sqrt(rho))) - np.log(left) / 2 + rho * m / left
        )

    rho = families.rho_of_mean(variance, square, scalar)
    for i in range(3):
        columns = [slice(None)] if scalar else range(4)
        for j in columns:
            v, m = variance[i, j], square[i, j]
            r = rho[i, 0] if scalar else rho[i, j]
            least = log_mean(r, v, m)
            for step in (1e-4, 1e-6):
                for other in (r * (1 + step), r * (1 - step)):
                    assert least <= log_mean(other, v, m) + 4 * EPSILON * np.size(v)
    if scalar:
        assert np.all(rho == rho[:, :1])
    else:
        np.testing.assert_allclose(
            rho[1], families.rho_mean(variance[1]), rtol=8 * EPSILON
        )


@pytest.mark.parametrize("name", ["oprf", "saderf+", "bderf", "cderf", "sderf"])
def test_objective_mean_beats_log_on_normal_data(name):
    """The mean second moment of normal rows, by quadrature over u."""
    d = 2
    x, y = oracle.problem(d, mean=0.6, seed=4, size=0.3)
    values = {}
    for objective in ("log", "mean"):
        geometry = fitted(name, x, y, objective=objective)
        mean = np.zeros(d) if geometry.mean is None else geometry.mean
        variance = geometry.phi - mean**2
        nodes, weights = oracle.hermite(1, 80)
        u = mean + np.sqrt(variance) * nodes
        factors = np.exp(geometry.rho * u * u).T @ weights
        values[objective] = np.log(factors).sum() + oracle.log_second_moment(
            geometry.rho, 0.0
        )
    assert values["mean"] < values["log"]


# ---------------------------------------------------------------- poor moments


def test_regularization_follows_the_fewer_rows():
    x, y = oracle.problem(6, n=40, m=25, seed=0)
    auto = fitted("cderf", x, y, regularization="auto")
    given = fitted("cderf", x, y, regularization=0.2 * 6 / 25)
    np.testing.assert_array_equal(auto.basis, given.basis)
    np.testing.assert_array_equal(auto.phi, given.phi)
    x, y = oracle.problem(2, n=9000, m=8000, seed=0)
    auto = fitted("cderf", x, y, regularization="auto")
    np.testing.assert_array_equal(
        auto.phi, fitted("cderf", x, y, regularization=1e-4).phi
    )
    x, y = oracle.problem(6, n=4, m=25, seed=0)
    auto = fitted("cderf", x, y, regularization="auto")
    np.testing.assert_array_equal(
        auto.phi, fitted("cderf", x, y, regularization=0.3).phi
    )


@pytest.mark.parametrize("n, share", [(1, 0.2), (10, 0.02), (300_000, 1e-6)])
def test_regularization_of_variances(n, share):
    rng = np.random.default_rng(0)
    x = Moments(float(n), rng.normal(size=4), n * np.exp(rng.normal(size=4)))
    y = Moments(300_000.0, rng.normal(size=4), 300_000 * np.exp(rng.normal(size=4)))
    auto, given = (
        fit_geometry(FAMILIES["csaderf+"], x, y, objective="log", regularization=value)
        for value in ("auto", share)
    )
    np.testing.assert_allclose(auto.basis, given.basis, rtol=1e-14)


@pytest.mark.parametrize("regularization", ["auto", 0.0])
@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("n, m", [(1, 1), (1, 9), (3, 40), (40, 2)])
def test_fewer_rows_than_dimensions(name, n, m, regularization):
    x, y = oracle.problem(5, n=n, m=m, seed=0)
    with np.errstate(all="raise", under="ignore"):
        geometry = fitted(name, x, y, regularization=regularization)
    check_sound(geometry, 5)
    if 1 in (n, m) and FAMILIES[name].centered and name != "csderf":
        np.testing.assert_array_equal(geometry.basis, np.eye(5))


@pytest.mark.parametrize("name", POSITIVE)
def test_constant_columns(name):
    x, y = oracle.problem(5, n=40, m=50, mean=0.0, seed=0)
    x[:, 1] = 0.0
    y[:, [1, 3]] = 0.0
    for first, second in ((x, y), (x + 2.0, y - 1.0), (x, 0.0 * y), (0.0 * x, 0.0 * y)):
        with np.errstate(all="raise", under="ignore"):
            check_sound(fitted(name, first, second, regularization="auto"), 5)


def check_sound(geometry, d):
    for array in (geometry.basis, geometry.phi, geometry.rho):
        assert np.all(np.isfinite(array))
    assert np.all((geometry.rho > 0) & (geometry.rho <= 1))
    assert np.all(geometry.phi >= 0)
    product = geometry.inverse_transpose @ np.swapaxes(geometry.basis, -1, -2)
    # What rounding of the inverse itself leaves.
    size = np.abs(geometry.inverse_transpose) @ np.abs(
        np.swapaxes(geometry.basis, -1, -2)
    )
    assert np.all(np.abs(product - np.eye(d)) <= 8 * d * EPSILON * np.maximum(size, 1))


def test_ill_conditioned_moments_stay_balanced():
    d = 6
    rng = np.random.default_rng(0)
    scales = 10.0 ** -np.arange(d)
    moments = []
    for _ in range(2):
        q = np.linalg.qr(rng.normal(size=(d, d)))[0]
        moments.append(Moments(1e6, np.zeros(d), 1e6 * (q * scales**1.5) @ q.T))
    geometry = fit_geometry(
        FAMILIES["cderf"], *moments, objective="log", regularization=0.0
    )
    check_sound(geometry, d)
    g, h = geometry.basis, geometry.inverse_transpose
    sigma = geometry.phi / 2
    for matrix, moment in zip((g, h), moments, strict=True):
        balanced = matrix @ moment.covariance @ matrix.T
        scaled = balanced / np.sqrt(sigma[:, None] * sigma)
        # The moments' condition is 10^7.5.
        np.testing.assert_allclose(scaled, np.eye(d), atol=1e7 * EPSILON * 100)


def test_sizes_far_apart():
    x, y = oracle.problem(4, n=30, m=30, seed=0)
    plain = fitted("cderf", x, y, regularization="auto")
    apart = fitted("cderf", 1e-60 * x, 1e60 * y, regularization="auto")
    np.testing.assert_allclose(apart.phi, plain.phi, rtol=1e-12)
    np.testing.assert_allclose(apart.basis, 1e60 * plain.basis, rtol=1e-9)


def test_a_floor_under_phi():
    x, _ = oracle.problem(4, n=50, mean=0.0, seed=0)
    x[:, 0] *= 1e-6
    plain = families.Family("custom", "identity", True, "per_dimension")
    for family in ("sderf", "csderf", plain):
        auto = fitted(family, x, regularization="auto")
        exact = fitted(family, x)
        assert exact.phi.min() < 1e-9 * exact.phi.mean()
        np.testing.assert_allclose(auto.phi.min(), 1e-3 * exact.phi.mean(), rtol=1e-5)


def test_one_set_of_rows_has_an_orthogonal_basis():
    x, y = oracle.problem(5, n=30, seed=0)
    for name in POSITIVE:
        geometry = fitted(name, x, regularization="auto")
        assert geometry.is_orthogonal or geometry.is_diagonal
        product = geometry.basis @ geometry.basis.T
        np.testing.assert_allclose(product, np.eye(5), atol=1e-14)
        assert not fitted("cderf", x, y).is_orthogonal
    x = x - x.mean(0)
    balanced, eigen = fitted("cderf", x), fitted("csderf", x)
    np.testing.assert_allclose(balanced.phi, eigen.phi, rtol=1e-12)
    values = np.linalg.eigvalsh(np.cov(x.T, bias=True))
    np.testing.assert_allclose(np.sort(balanced.phi), 2 * values, rtol=1e-12)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_heads_are_fitted_alone(name, same):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 20, 4)), rng.normal(size=(2, 3, 30, 4))
    # A head that does not vary.
    y[1, 2] = 0.0
    together = fitted(name, x, None if same else y, regularization="auto")
    for index in np.ndindex(2, 3):
        alone = fitted(
            name, x[index], None if same else y[index], regularization="auto"
        )
        for field in dataclasses.fields(alone):
            a, b = getattr(together, field.name), getattr(alone, field.name)
            if isinstance(b, np.ndarray):
                assert a.shape == (2, 3, *b.shape)
                np.testing.assert_allclose(a[index], b, rtol=1e-9, atol=1e-12)
            else:
                assert a is b or a == b


@pytest.mark.parametrize("basis", ["identity", "diagonal", "eigen", "balanced"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("scales", ["one", "scalar", "per_dimension"])
@pytest.mark.parametrize("objective", ["log", "mean"])
def test_every_combination(basis, centered, scales, objective):
    family = families.Family("custom", basis, centered, scales)
    x, y = oracle.problem(3, n=30, m=40, seed=0)
    geometry = fitted(family, x, y, objective, "auto")
    check_sound(geometry, 3)
    if scales == "one":
        assert np.all(geometry.rho == 1)
    if scales == "scalar":
        assert np.all(geometry.rho == geometry.rho[0])
    assert np.any(geometry.shift_x) == centered


def test_diagonal_moments_are_enough_for_diagonal_bases():
    x, y = oracle.problem(4, seed=0)
    full, thin = (
        [moments_of(rows, diagonal) for rows in (x, y)] for diagonal in (False, True)
    )
    for name in ("trigonometric", "positive", "oprf", "saderf", "saderf+", "csaderf+"):
        options = {"objective": "log", "regularization": "auto"}
        a = fit_geometry(FAMILIES[name], *full, **options)
        b = fit_geometry(FAMILIES[name], *thin, **options)
        np.testing.assert_allclose(a.phi, b.phi, rtol=1e-13)
