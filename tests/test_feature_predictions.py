"""Predicted errors of random features: closed forms against integrals and draws."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import special, stats

import _oracle_features as oracle
from subquad import _feature_predictions as predictions
from subquad._feature_couplings import COUPLINGS, draw, padded_dimension
from subquad._feature_families import FAMILIES, fit_geometry, kappa
from subquad._feature_predictions import (
    attention_error,
    log_relative_variance,
    predicted_log_variance,
    predicted_trigonometric_log_variance,
    required_rows,
    required_trigonometric_rows,
    trigonometric_log_relative_variance,
)
from subquad._feature_statistics import moments_of

EPSILON = np.finfo(float).eps
SIZES = [1e-8, 1e-3, 0.1, 1.0, 1.9, 2.1, 16.0, 100.0, 1000.0, 4000.0]


def fitted(name, x, y, objective="log"):
    return fit_geometry(
        FAMILIES[name],
        moments_of(x, False),
        moments_of(y, False),
        objective=objective,
        regularization=0.0,
    )


# ---------------------------------------------------------------- special functions


@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 9, 14, 31, 64, 127, 512, 1023, 1024])
def test_means_of_orthogonal_products(d):
    mpmath = pytest.importorskip("mpmath")
    s = np.array(SIZES)
    excess = predictions.orthogonal_excess(s, d)
    cosine = predictions.orthogonal_cosine(s, d)
    logs = predictions._log_large_mean(s, d)
    opposite = predictions._small_excess(-s[:4], d)
    with mpmath.workdps(60):
        half = mpmath.mpf(d) / 2

        def mean(size):
            z = mpmath.mpf(size) / 2
            function = mpmath.hyp1f1(-half, half, -z, maxprec=10**5, zeroprec=400)
            return mpmath.exp(-z) * function

        exact = [mean(float(value)) for value in s]
        wanted = np.array([float(value - 1) for value in exact])
        wanted_logs = np.array([float(mpmath.log(value)) for value in exact])
        wanted_cosine = np.array(
            [float(mean(-value) * mpmath.exp(-mpmath.mpf(value))) for value in s]
        )
        wanted_opposite = np.array([float(mean(-value) - 1) for value in s[:4]])
    # Sums of up to a hundred terms of one sign; about 1, their rounding is divided by
    # the excess, which is at least s² / (2 d + 4) / 2 where these are summed.
    about_one = 16 * EPSILON * (1 + (d + 2) * (s > 2.0))
    np.testing.assert_array_less(np.abs(excess / wanted - 1), about_one)
    np.testing.assert_allclose(logs, wanted_logs, rtol=0, atol=4 * EPSILON * s.max())
    np.testing.assert_allclose(cosine, wanted_cosine, rtol=0, atol=4 * EPSILON)
    np.testing.assert_allclose(opposite, wanted_opposite, rtol=16 * EPSILON)


@pytest.mark.parametrize(
    "d, cosine", [(2, -1.0), (3, -0.5), (8, 1 / 7), (24, -1 / 23), (64, 1 / 63)]
)
def test_means_at_other_angles(d, cosine):
    nodes, weights = np.polynomial.legendre.leggauss(80)
    radius = 8.0 * (1 + nodes)
    weights = 8.0 * weights * stats.chi.pdf(radius, d)
    a, b = radius[:, None], radius
    square = a * a + b * b + 2 * cosine * a * b
    for s in (0.3, 4.0):
        value = special.hyp0f1(d / 2, square * s / 4) * math.exp(-s)
        found = predictions._excess(np.array([s]), d, cosine) + 1
        np.testing.assert_allclose(found, weights @ value @ weights, rtol=1e-9)


# ---------------------------------------------------------------- pairs of rows


def estimates(geometry, x, y, omega, antithetic):
    """Return estimates of K / K of draws (draws, M, d) of frequencies."""
    u = geometry.query_coordinates(x)[:, None] + geometry.key_coordinates(y)[None]
    rho = geometry.rho
    v = (1 + 1 / rho) / 2
    weight = (omega**2 * (1 - 1 / rho) / 4).sum(-1) + np.log(v).sum() / 2
    base = weight[..., None, None] - (u * u).sum(-1) / 2
    product = np.einsum("smd,ijd->smij", omega * np.sqrt(v), u)
    if antithetic:
        return (np.exp(base + product) + np.exp(base - product)).mean(1) / 2
    return np.exp(base + product).mean(1)


def assert_variance(samples, log_variance, approximate=0.0):
    """Compare with the sample variance, by its own standard error."""
    n = len(samples)
    apart = samples - samples.mean(0)
    variance = (apart**2).mean(0)
    error = np.sqrt(((apart**4).mean(0) - variance**2) / n)
    miss = np.abs(variance - np.exp(log_variance))
    assert np.all(miss <= 4.5 * error + approximate * variance), (
        miss / error,
        np.exp(log_variance) / variance,
    )
    # A test that sees a change of a fifth.
    assert np.all(4.5 * error < 0.2 * variance)


def draws(coupling, n_rows, d, n_draws):
    """Return independent draws (n_draws, n_rows, d), cut within their last block."""
    block = padded_dimension(coupling, d)
    whole = -(-n_rows // block) * block
    omega = draw(coupling, whole * n_draws, d, 7)
    return omega.reshape(n_draws, whole, d)[:, :n_rows]


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("coupling", ["iid", "orthogonal", "simplex"])
@pytest.mark.parametrize("name", ["positive", "oprf", "saderf", "cderf"])
def test_variance_of_coupled_frequencies(name, coupling, antithetic):
    """Blocks of 6, 6 and 3; exact unless each dimension has a scale of its own."""
    d, n_rows = 6, 15
    x, y = oracle.problem(d, n=60, m=60, mean=0.2, seed=2, size=0.07)
    geometry = fitted(name, x, y)
    x, y = x[:3], y[:3]
    found = log_relative_variance(
        geometry,
        geometry.query_coordinates(x),
        geometry.key_coordinates(y),
        n_rows,
        coupling,
        antithetic,
    )
    omega = draws(coupling, n_rows, d, 15_000)
    approximate = 0.15 if name == "cderf" and coupling != "iid" else 0.0
    assert_variance(estimates(geometry, x, y, omega, antithetic), found, approximate)


@pytest.mark.parametrize("antithetic", [False, True])
def test_variance_of_padded_hadamard_blocks(antithetic):
    d, n_rows = 20, 40
    x, y = oracle.problem(d, n=2, m=2, mean=0.1, seed=2, size=0.03)
    geometry = fitted("oprf", x, y)
    found = log_relative_variance(
        geometry,
        geometry.query_coordinates(x),
        geometry.key_coordinates(y),
        n_rows,
        "hadamard",
        antithetic,
    )
    omega = draws("hadamard", n_rows, d, 3_000)
    # Its frequencies are only close to normal: 8 / (3 p²) in the fourth moments.
    assert_variance(estimates(geometry, x, y, omega, antithetic), found, 0.02)


@pytest.mark.parametrize("coupling", ["iid", "orthogonal", "simplex"])
def test_variance_of_the_trigonometric_family(coupling):
    d, n_rows = 6, 15
    x, y = oracle.problem(d, n=3, m=3, mean=0.3, seed=2, size=0.25)
    found = trigonometric_log_relative_variance(x, y, n_rows, coupling)
    omega = draws(coupling, n_rows, d, 20_000)
    apart = x[:, None] - y[None]
    waves = np.cos(np.einsum("smd,ijd->smij", omega, apart)).mean(1)
    assert_variance(waves / np.exp(-(apart**2).sum(-1) / 2), found)


def test_trigonometric_variance_is_the_formula():
    x, y = oracle.problem(4, seed=1)
    s = ((x[:, None] - y[None]) ** 2).sum(-1)
    k = np.exp(-s / 2)
    iid = (1 - k**2) ** 2 / 2
    np.testing.assert_allclose(
        trigonometric_log_relative_variance(x, y, 10, "iid"),
        np.log(iid / k**2 / 10),
        rtol=1e-12,
    )
    both = special.hyp1f1(4, 2, -s / 2) - k**2
    expected = np.log((iid / 10 + (12 + 12 + 2) / 100 * both) / k**2)
    np.testing.assert_allclose(
        trigonometric_log_relative_variance(x, y, 10, "orthogonal"),
        expected,
        rtol=1e-9,
    )


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("name", ["positive", "oprf", "sderf", "cderf"])
def test_variance_of_independent_frequencies_is_the_formula(name, antithetic):
    x, y = oracle.problem(4, seed=1)
    geometry = fitted(name, x, y)
    left, right = geometry.query_coordinates(x), geometry.key_coordinates(y)
    u = left[:, None] + right[None]
    total = kappa(geometry.rho).sum()
    moment = np.exp(total + (geometry.rho * u * u).sum(-1))
    if antithetic:
        moment = (moment + np.exp(total - (u * u).sum(-1))) / 2
    np.testing.assert_allclose(
        log_relative_variance(geometry, left, right, 9, "iid", antithetic),
        np.log((moment - 1) / 9),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_logs_do_not_overflow(coupling, antithetic):
    x, y = oracle.problem(20, seed=1)
    for name in ("positive", "cderf"):
        geometry = fitted(name, x, y)
        left = 1e3 * geometry.query_coordinates(x)
        right = 1e3 * geometry.key_coordinates(y)
        u = left[:, None] + right[None]
        expected = (
            kappa(geometry.rho).sum()
            + (geometry.rho * u * u).sum(-1)
            - math.log(8 * (2 if antithetic else 1))
        )
        with np.errstate(over="raise", invalid="raise"):
            found = log_relative_variance(
                geometry, left, right, 8, coupling, antithetic
            )
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    with np.errstate(over="raise", invalid="raise"):
        found = trigonometric_log_relative_variance(1e3 * x, 1e3 * y, 8, coupling)
    s = 1e6 * ((x[:, None] - y[None]) ** 2).sum(-1)
    np.testing.assert_allclose(found, s - math.log(16), rtol=1e-12)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_exact_estimates(coupling):
    """Positive features know x = -y, cosines x = y."""
    x, _ = oracle.problem(4, seed=1)
    geometry = fitted("positive", x, x)
    with np.errstate(all="raise"):
        for antithetic in (False, True):
            found = log_relative_variance(geometry, x, -x, 6, coupling, antithetic)
            assert np.all(np.diagonal(found) == -np.inf)
        found = trigonometric_log_relative_variance(x, x, 6, coupling)
    # |x|² + |y|² - 2 x·y is 0 to rounding.
    assert np.all(np.diagonal(found) < 2 * math.log(1e-13))


def test_small_variances_keep_their_digits():
    """Var = cosh s - 1 ~ s² / 2 of pairs, and 3 / (d + 2) of that in whole blocks."""
    d, s = 8, 1e-7
    x = np.full((1, d), math.sqrt(s / d) / 2)
    geometry = fitted("positive", x, x)
    for coupling, share in (("iid", 1.0), ("orthogonal", 3 / (d + 2))):
        found = log_relative_variance(geometry, x, x, d, coupling, True)
        expected = math.log(share * s * s / 2 / d)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        waves = trigonometric_log_relative_variance(x, -x, d, coupling)
        np.testing.assert_allclose(waves, expected, rtol=1e-6)


def test_heads_are_predicted_alone():
    rng = np.random.default_rng(0)
    x, y = 0.3 * rng.normal(size=(2, 3, 30, 4)), 0.3 * rng.normal(size=(2, 3, 20, 4))
    v = rng.normal(size=(2, 3, 20, 5))
    for name in ("oprf", "cderf"):
        together = fitted(name, x, y)
        for coupling in COUPLINGS:
            pairs = log_relative_variance(
                together,
                together.query_coordinates(x),
                together.key_coordinates(y),
                7,
                coupling,
                True,
            )
            means = {
                objective: predicted_log_variance(
                    together, 7, coupling, True, objective
                )
                for objective in ("log", "mean")
            }
            errors = attention_error(together, x, y, v, 7, coupling, True)
            assert pairs.shape == (2, 3, 30, 20) and errors.shape == (2, 3, 30)
            for index in ((0, 0), (1, 2)):
                alone = fitted(name, x[index], y[index])
                np.testing.assert_allclose(
                    pairs[index],
                    log_relative_variance(
                        alone,
                        alone.query_coordinates(x[index]),
                        alone.key_coordinates(y[index]),
                        7,
                        coupling,
                        True,
                    ),
                    rtol=1e-9,
                )
                for objective, found in means.items():
                    np.testing.assert_allclose(
                        found[index],
                        predicted_log_variance(alone, 7, coupling, True, objective),
                        rtol=1e-9,
                    )
                np.testing.assert_allclose(
                    errors[index],
                    attention_error(
                        alone, x[index], y[index], v[index], 7, coupling, True
                    ),
                    rtol=1e-7,
                )


# ---------------------------------------------------------------- whole data


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("name", ["oprf", "cderf"])
def test_predicted_log_is_that_of_a_typical_pair(name, coupling, antithetic):
    x, y = oracle.problem(5, seed=1, size=0.3)
    geometry = fitted(name, x, y)
    typical = np.sqrt(geometry.phi)[None]
    np.testing.assert_allclose(
        predicted_log_variance(geometry, 12, coupling, antithetic, "log"),
        log_relative_variance(
            geometry, typical, np.zeros((1, 5)), 12, coupling, antithetic
        )[0, 0],
        rtol=1e-12,
    )


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("coupling", ["iid", "orthogonal", "simplex"])
@pytest.mark.parametrize("name", ["positive", "oprf", "cderf"])
def test_predicted_mean_is_that_of_normal_rows(name, coupling, antithetic):
    d = 5
    x, y = oracle.problem(d, mean=0.5, seed=1, size=0.15)
    geometry = fitted(name, x, y, "mean")
    rng = np.random.default_rng(0)
    mean = np.zeros(d) if geometry.mean is None else geometry.mean
    # φ without its cross terms between dimensions, as it is modelled.
    u = mean + np.sqrt(geometry.phi - mean**2) * rng.normal(size=(40_000, d))
    logs = log_relative_variance(
        geometry, u, np.zeros((1, d)), 10, coupling, antithetic
    )
    found = np.exp(logs[:, 0])
    error = found.std() / np.sqrt(len(found))
    predicted = np.exp(
        predicted_log_variance(geometry, 10, coupling, antithetic, "mean")
    )
    # Coupled, Σ w u² counts by two moments of its distribution.
    approximate = 0.0 if coupling == "iid" else 0.05 * found.mean()
    assert abs(found.mean() - predicted) < 4 * error + approximate


def test_predicted_trigonometric_variance():
    x, y = oracle.problem(5, n=30, m=30, seed=1, mean=0.2, size=0.1)
    geometry = fitted("trigonometric", x, y)
    for coupling in ("iid", "orthogonal"):
        pairs = trigonometric_log_relative_variance(x, y, 10, coupling)
        typical = predicted_trigonometric_log_variance(geometry, 10, coupling, "log")
        mean = predicted_trigonometric_log_variance(geometry, 10, coupling, "mean")
        assert abs(np.mean(pairs) - typical) < 0.7
        assert abs(np.log(np.mean(np.exp(pairs))) - mean) < 0.3
    wide = fitted("trigonometric", 20 * x, y)
    assert predicted_trigonometric_log_variance(wide, 10, "iid", "mean") == np.inf


def test_infinite_means_are_infinite():
    x, y = oracle.problem(5, seed=1, size=2.0)
    positive = fitted("positive", x, y)
    assert np.max(positive.phi - positive.mean**2) > 0.5
    for antithetic in (False, True):
        found = predicted_log_variance(positive, 9, "orthogonal", antithetic, "mean")
        assert found == np.inf
    with pytest.raises(OverflowError, match="infinite"):
        required_rows(positive, 0.1, "iid", False, "mean")
    fine = fitted("cderf", x, y, "mean")
    assert np.isfinite(predicted_log_variance(fine, 9, "orthogonal", True, "mean"))


@pytest.mark.parametrize("objective", ["log", "mean"])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_required_rows_is_the_smallest(coupling, antithetic, objective):
    for d, size in ((5, 0.2), (20, 0.05)):
        x, y = oracle.problem(d, seed=1, size=size, mean=0.2)
        for name in ("oprf", "cderf"):
            geometry = fitted(name, x, y, objective)
            for error in (2.0, 0.3, 0.1):
                found = required_rows(geometry, error, coupling, antithetic, objective)
                block = padded_dimension(coupling, d)
                before = range(max(1, found - block - 1), found)
                goal = 2 * math.log(error)

                def predicted(rows, geometry=geometry):
                    return predicted_log_variance(
                        geometry, rows, coupling, antithetic, objective
                    )

                assert predicted(found) <= goal
                assert all(predicted(rows) > goal for rows in before)


@pytest.mark.parametrize("coupling", ["iid", "orthogonal"])
def test_required_rows_of_cosines(coupling):
    x, y = oracle.problem(8, seed=1, size=0.5)
    geometry = fitted("trigonometric", x, y)
    for error in (30.0, 3.0, 0.5):
        found = required_trigonometric_rows(geometry, error, coupling, "log")
        goal = 2 * math.log(error)

        def predicted(rows):
            return predicted_trigonometric_log_variance(geometry, rows, coupling, "log")

        assert predicted(found) <= goal
        assert found == 1 or predicted(found - 1) > goal


def test_required_rows_of_the_worst_head_and_beyond_floats():
    x, y = oracle.problem(8, seed=1, size=0.3)
    both = fitted("oprf", np.stack([x, 0.3 * x]), np.stack([y, 0.3 * y]))
    alone = fitted("oprf", x, y)
    assert required_rows(both, 0.2, "orthogonal", True, "log") == required_rows(
        alone, 0.2, "orthogonal", True, "log"
    )
    wide = dataclasses.replace(fitted("positive", x, y), phi=np.full(8, 125.0))
    rows = required_rows(wide, 0.5, "orthogonal", False, "log")
    assert isinstance(rows, int)
    # log 2 of exp(1000) / 0.25.
    assert abs(math.log2(rows) - (1000 / math.log(2) + 2)) < 1e-9


# ---------------------------------------------------------------- attention


def attention_problem(seed=0, n=6, m=12, d=3, size=0.5):
    rng = np.random.default_rng(seed)
    x = size * rng.normal(size=(n, d)) + 0.3
    y = size * rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) - 0.2
    return x, y, rng.normal(size=(m, 4)) + 5.0


def exact_attention(x, y, alpha, causal):
    scores = oracle.kernel(x, y, alpha)
    if causal:
        scores = np.where(np.tri(len(x), len(y), dtype=bool), scores, -np.inf)
    return special.softmax(scores, axis=-1)


@pytest.mark.parametrize("alpha", [0.0, -0.5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("name", ["positive", "oprf", "cderf"])
def test_attention_error_is_the_double_sum(name, antithetic, causal, alpha):
    x, y, v = attention_problem()
    geometry = fitted(name, x, y)
    weights = exact_attention(x, y, alpha, causal)
    u = geometry.query_coordinates(x)[:, None] + geometry.key_coordinates(y)[None]
    rho = geometry.rho

    def moment(sign):
        a, b = u[:, :, None], sign * u[:, None]
        forms = (1 + rho) / 4 * (a + b) ** 2 - (a * a + b * b) / 2
        return np.exp(kappa(rho).sum() + forms.sum(-1))

    covariance = moment(1.0) - 1
    if antithetic:
        covariance = (moment(1.0) + moment(-1.0)) / 2 - 1
    apart = v[None] - (weights @ v)[:, None]
    inner = apart @ np.swapaxes(apart, -1, -2)
    pairs = weights[:, :, None] * weights[:, None] * covariance * inner
    expected = np.sqrt(np.maximum(pairs.sum((1, 2)), 0) / 1000)
    reach = np.where(weights > 0, np.sqrt((apart**2).sum(-1)), 0).max(-1)
    found = attention_error(
        geometry, x, y, v, 1000, "iid", antithetic, alpha=alpha, causal=causal
    )
    np.testing.assert_allclose(found, np.minimum(expected, reach), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("coupling", ["iid", "orthogonal"])
def test_attention_error_is_that_of_draws(coupling, antithetic, causal):
    x, y, v = attention_problem(d=4)
    n_rows, n_draws = 96, 600
    geometry = fitted("cderf", x, y)
    omega = draws(coupling, n_rows, 4, n_draws)
    weights = exact_attention(x, y, 0.0, causal)
    ratios = estimates(geometry, x, y, omega, antithetic)
    found = weights * ratios
    outputs = found @ v / found.sum(-1, keepdims=True)
    square = ((outputs - weights @ v) ** 2).sum(-1)
    predicted = attention_error(
        geometry, x, y, v, n_rows, coupling, antithetic, causal=causal
    )
    error = square.std(0) / np.sqrt(n_draws)
    # First order in the relative error of K, which is a tenth here; what blocks share
    # is that of a typical pair.
    approximate = 0.1 if coupling == "iid" else 0.4
    miss = np.abs(square.mean(0) - predicted**2)
    assert np.all(miss <= 4 * error + approximate * predicted**2 + 1e-24)


def test_attention_error_has_a_ceiling():
    x, y, v = attention_problem()
    geometry = fitted("positive", 30 * x, 30 * y)
    with np.errstate(over="raise", invalid="raise"):
        for antithetic in (False, True):
            found = attention_error(geometry, 30 * x, 30 * y, v, 8, "iid", antithetic)
            weights = exact_attention(30 * x, 30 * y, 0.0, False)
            apart = v[None] - (weights @ v)[:, None]
            assert np.all(found <= np.sqrt((apart**2).sum(-1)).max(-1) * (1 + 1e-12))
    assert attention_error(geometry, x, y[:0], v[:0], 8, "iid", True).shape == (6,)
    assert attention_error(geometry, x[:0], y, v, 8, "iid", True).shape == (0,)
    same = attention_error(geometry, x, y, 0 * v + 3.0, 8, "iid", True)
    assert np.all(same == 0)


def test_rows_may_have_more_batch_dimensions_than_the_fit():
    rng = np.random.default_rng(0)
    x, y = 0.3 * rng.normal(size=(2, 3, 8, 4)), 0.3 * rng.normal(size=(2, 3, 9, 4))
    geometry = fitted("cderf", x[0], y[0])
    for coupling in COUPLINGS:
        together, alone = (
            log_relative_variance(
                geometry,
                geometry.query_coordinates(rows),
                geometry.key_coordinates(keys),
                6,
                coupling,
                True,
            )
            for rows, keys in ((x, y), (x[1], y[1]))
        )
        np.testing.assert_allclose(together[1], alone, rtol=1e-12)
