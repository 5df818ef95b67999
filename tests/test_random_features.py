"""The estimator of random features: fits, kernels, predictions, life cycle."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest

import subquad as sq
from _arrays import to_numpy
from subquad import RandomFeatures
from subquad.features import InaccurateFeaturesWarning

POSITIVE = [
    "positive",
    "oprf",
    "saderf",
    "sderf",
    "aderf",
    "saderf+",
    "bderf",
    "csderf",
    "csaderf+",
    "cderf",
]
FAMILIES = ["trigonometric", *POSITIVE]
# What brings out every kind of map: none, diagonal, orthogonal, full; with shifts.
KINDS = ["trigonometric", "positive", "saderf", "csderf", "bderf", "cderf"]
COUPLINGS = ["iid", "orthogonal", "simplex", "hadamard"]


def rows_of(seed=0, n=60, d=4, size=0.25, shift=0.1):
    """Rows with correlated features and a mean."""
    rng = np.random.default_rng(seed)
    spread = size * np.linspace(0.5, 1.5, d)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return (rng.standard_normal((n, d)) * spread) @ turn + shift * rng.standard_normal(
        d
    )


def kernel_of(x, y, kernel="softmax", factor=1.0):
    products = np.asarray(x) @ np.asarray(y).T
    if kernel == "softmax":
        return np.exp(factor**2 * products)
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None, :] - 2 * products
    return np.exp(-0.5 * factor**2 * squares)


def log_sum(left, right):
    """log Σₘ exp(leftᵢₘ + rightⱼₘ), in extended precision."""
    terms = left.astype(np.longdouble)[:, None, :] + right.astype(np.longdouble)
    top = terms.max(-1, keepdims=True)
    return (np.log(np.exp(terms - top).sum(-1)) + top[..., 0]).astype(np.float64)


def assert_same_features(a, b, x, rtol=1e-9):
    for name in ("query_features", "key_features"):
        np.testing.assert_allclose(getattr(a, name)(x), getattr(b, name)(x), rtol=rtol)


# --------------------------------------------------------------------- the estimates


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernel_within_the_predicted_error(family, kernel):
    x, y = rows_of(1, 12), rows_of(2, 13)
    features = RandomFeatures(
        8192, family=family, kernel=kernel, coupling="iid", random_state=3
    ).fit(x, keys=y)
    assert features.family_ == family
    error = features.kernel_matrix(x, y) / kernel_of(x, y, kernel) - 1.0
    predicted = np.exp(0.5 * features.log_relative_variance(x, y))
    # All pairs share the projections: 156 errors, which are hardly independent.
    assert (np.abs(error) < 5.0 * predicted).all()
    assert np.sqrt(np.mean((error / predicted) ** 2)) > 0.1


@pytest.mark.parametrize("coupling", ["iid", "orthogonal"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_predicted_variance_is_that_of_many_draws(antithetic, coupling):
    x, y = rows_of(1, 3), rows_of(2, 4)
    fits = [
        RandomFeatures(
            8,
            family="oprf",
            coupling=coupling,
            antithetic=antithetic,
            random_state=seed,
        ).fit(x, keys=y)
        for seed in range(200)
    ]
    error = np.stack([f.kernel_matrix(x, y) for f in fits]) / kernel_of(x, y) - 1.0
    predicted = np.exp(fits[0].log_relative_variance(x, y))
    # A variance of 200 draws with light tails is known to a tenth, and unbiasedness to
    # its square root over 20.
    np.testing.assert_allclose((error**2).mean(0).mean(), predicted.mean(), rtol=0.25)
    assert (np.abs(error.mean(0)) < 5.0 * np.sqrt(predicted / 200)).all()


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
def test_bandwidth_and_scale_multiply_rows(kernel):
    x, y = rows_of(1), rows_of(2)
    options = {"kernel": kernel, "family": "cderf", "random_state": 0}
    plain = RandomFeatures(64, **options).fit(x * 0.35, keys=y * 0.35)
    other = RandomFeatures(64, bandwidth=2.0, scale=0.49, **options).fit(x, keys=y)
    np.testing.assert_allclose(
        other.kernel_matrix(x, y), plain.kernel_matrix(x * 0.35, y * 0.35), rtol=1e-11
    )
    assert other.bandwidth_ == 2.0
    exact = kernel_of(x, y, kernel, 0.35)
    error = other.kernel_matrix(x, y) / exact - 1.0
    assert np.abs(error).max() < 0.2


def test_bandwidth_scale_is_that_of_scikit_learn():
    x = rows_of(1, d=5)
    features = RandomFeatures(64, bandwidth="scale").fit(x)
    np.testing.assert_allclose(
        0.5 / features.bandwidth_**2, 1.0 / (5 * x.var()), rtol=1e-12
    )
    parts = RandomFeatures(64, bandwidth="scale").partial_fit(x[:7]).partial_fit(x[7:])
    np.testing.assert_allclose(parts.bandwidth_, features.bandwidth_, rtol=1e-12)
    y = rows_of(2, 90, d=5)
    features = RandomFeatures(64, bandwidth="scale").fit(x, keys=y)
    np.testing.assert_allclose(
        0.5 / features.bandwidth_**2, 1.0 / (5 * np.concatenate([x, y]).var())
    )
    assert RandomFeatures(64, bandwidth="scale").fit(np.ones((3, 2))).bandwidth_ == (
        np.sqrt(0.5)
    )


def test_bandwidth_median_is_of_distances():
    x, y = rows_of(1), rows_of(2, 40)
    apart = np.linalg.norm(x[:, None] - x[None], axis=-1)[np.triu_indices(60, 1)]
    features = RandomFeatures(64, bandwidth="median").fit(x)
    np.testing.assert_allclose(features.bandwidth_, np.median(apart), rtol=1e-12)
    apart = np.linalg.norm(x[:, None] - y[None], axis=-1)
    features = RandomFeatures(64, bandwidth="median").fit(x, keys=y)
    np.testing.assert_allclose(features.bandwidth_, np.median(apart), rtol=1e-12)
    # A draw of many, the same for the same seed; and later rows change nothing.
    many = rows_of(3, 5000)
    first = RandomFeatures(64, bandwidth="median", random_state=1).fit(many)
    again = RandomFeatures(64, bandwidth="median", random_state=1).partial_fit(many)
    assert first.bandwidth_ == again.bandwidth_
    again.partial_fit(2 * many)
    assert first.bandwidth_ == again.bandwidth_
    apart = np.linalg.norm(many[:300, None] - many[None, 300:600], axis=-1)
    np.testing.assert_allclose(first.bandwidth_, np.median(apart), rtol=0.1)
    assert RandomFeatures(64, bandwidth="median").fit(np.ones((3, 2))).bandwidth_ == 1.0


# ----------------------------------------------------------------------------- maps


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("family", KINDS)
def test_functional_form_takes_the_maps(family, kernel, antithetic):
    x, y = rows_of(1), rows_of(2)
    features = RandomFeatures(
        10, family=family, kernel=kernel, antithetic=antithetic, random_state=0
    ).fit(x, keys=y)
    for which, method in (("query", "query_features"), ("key", "key_features")):
        found = getattr(features, f"{which}_map_")
        arrays, more = found[:3], {"shift": found.shift, "linear": found.linear}
        out = getattr(features, method)(x)
        assert out.shape == (60, 10)
        if family == "trigonometric":
            expected = sq.trigonometric_features(x, *arrays, **more)
        else:
            logs = sq.log_features(x, *arrays, antithetic=antithetic, **more)
            np.testing.assert_array_equal(
                logs, getattr(features, f"log_{which}_features")(x)
            )
            expected = np.exp(logs)
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-15)


def test_learned_attributes():
    x, y = rows_of(1), rows_of(2, 33)
    features = RandomFeatures(12, family="cderf", random_state=0).fit(x, keys=y)
    assert features.basis_.shape == (4, 4)
    assert features.shift_x_.shape == features.shift_y_.shape == (4,)
    assert features.rho_.shape == (4,)
    assert (features.rho_ > 0).all() and (features.rho_ <= 1).all()
    assert features.projection_.shape == (6, 4)
    assert features.n_features_in_ == 4
    assert (features.n_samples_seen_, features.n_keys_seen_) == (60, 33)
    assert isinstance(features.predicted_log_variance_, float)
    np.testing.assert_allclose(features.shift_x_, x.mean(0), atol=1e-12)
    np.testing.assert_allclose(features.shift_y_, y.mean(0), atol=1e-12)
    # Balanced: both covariances become the same diagonal matrix, to the 0.2 d/n that
    # was added to their diagonals.
    turned = features.basis_ @ np.cov(x.T, ddof=0) @ features.basis_.T
    inverse = np.linalg.inv(features.basis_).T
    other = inverse @ np.cov(y.T, ddof=0) @ inverse.T
    np.testing.assert_allclose(turned, other, atol=0.1 * np.trace(turned))


@pytest.mark.parametrize("family", ["positive", "saderf+", "csderf", "cderf"])
def test_one_data_set_has_one_map(family):
    x = rows_of(1)
    features = RandomFeatures(16, family=family, random_state=0).fit(x)
    np.testing.assert_array_equal(
        features.log_query_features(x), features.log_key_features(x)
    )
    np.testing.assert_array_equal(features.transform(x), features.key_features(x))


def test_choices_one_by_one():
    x, y = rows_of(1), rows_of(2)
    made = RandomFeatures(16, family="sderf", centered=True, random_state=0)
    preset = RandomFeatures(16, family="csderf", random_state=0).fit(x, keys=y)
    assert made.fit(x, keys=y).family_ == "csderf"
    np.testing.assert_array_equal(made.log_key_features(x), preset.log_key_features(x))
    odd = RandomFeatures(16, family="cderf", scales="scalar", random_state=0)
    odd.fit(x, keys=y)
    assert odd.family_ == "custom"
    assert (odd.rho_ == odd.rho_[0]).all()
    assert isinstance(odd.predicted_log_variance_, float)
    auto = RandomFeatures(16, basis="diagonal", random_state=0).fit(x, keys=y)
    assert set(auto.predicted_log_variance_) >= {"saderf", "saderf+", "csaderf+"}
    assert "cderf" not in auto.predicted_log_variance_
    several = RandomFeatures(16, basis="diagonal", scales="one").fit(x, keys=y)
    assert set(several.predicted_log_variance_) == {
        "diagonal-one",
        "diagonal-one-centered",
    }
    only = RandomFeatures(16, basis="eigen", centered=False, scales="per_dimension")
    assert only.fit(x, keys=y).family_ == "sderf"


# ------------------------------------------------------------------------------ auto


def test_auto_takes_the_best_positive_family():
    x, y = rows_of(1, 500, 8, 0.5), rows_of(2, 500, 8, 0.5)
    auto = RandomFeatures(64, random_state=0).fit(x, keys=y)
    predictions = auto.predicted_log_variance_
    assert set(predictions) == set(POSITIVE)
    assert predictions[auto.family_] <= min(predictions.values()) + 1e-2
    alone = RandomFeatures(64, family=auto.family_, random_state=0).fit(x, keys=y)
    np.testing.assert_allclose(
        auto.log_key_features(y), alone.log_key_features(y), rtol=1e-12, atol=1e-12
    )
    # One data set, isotropic: nothing is better than what costs least.
    round_ = np.random.default_rng(3).standard_normal((5000, 3)) * 0.3
    assert RandomFeatures(64, random_state=0).fit(round_).family_ == "oprf"


@pytest.mark.parametrize("objective", ["log", "mean"])
@pytest.mark.parametrize("n", [1, 2, 5, 20, 60])
def test_auto_is_not_fooled_by_few_rows(n, objective):
    """Few rows hardly vary in some dimensions, where others will."""
    rng = np.random.default_rng(4)
    spread = np.linspace(0.2, 0.5, 20)
    x, y = rng.standard_normal((2, n, 20)) * spread
    fresh = rng.standard_normal((2, 200, 20)) * spread

    def moment(family):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InaccurateFeaturesWarning)
            features = RandomFeatures(
                256,
                family=family,
                objective=objective,
                coupling="iid",
                antithetic=False,
                random_state=0,
            ).fit(x, keys=y)
        logs = features.log_relative_variance(fresh[0], fresh[1])
        assert np.isfinite(logs).all()
        return logs.mean(), features.family_

    chosen, name = moment("auto")
    # As good, to less than a unit, as what looks at no directions.
    assert chosen <= moment("oprf")[0] + 0.75, name


def test_warns_that_the_trigonometric_family_is_better():
    x = rows_of(1, 300, size=0.05, shift=0.0)
    with pytest.warns(UserWarning, match="trigonometric"):
        auto = RandomFeatures(
            64, kernel="gaussian", antithetic=False, random_state=0
        ).fit(x)
    assert auto.family_ != "trigonometric"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Said once.
        auto.partial_fit(x)
        RandomFeatures(64, kernel="gaussian", family="oprf", antithetic=False).fit(x)
        RandomFeatures(64, antithetic=False).fit(x)


def test_warns_that_features_are_too_few():
    x = 3.0 * np.random.default_rng(0).standard_normal((200, 64))
    message = r"about [\d,.e+]+ features"
    with pytest.warns(InaccurateFeaturesWarning, match=message) as caught:
        features = RandomFeatures(64, family="cderf", random_state=0).fit(x)
    assert caught[0].filename == __file__
    assert features.required_components(1.0) > 10**9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features.partial_fit(x)
        RandomFeatures(64, family="cderf", random_state=0).fit(x / 20)
    with pytest.warns(InaccurateFeaturesWarning, match=r"e\+\d{3,}"):
        RandomFeatures(64, family="positive").fit(10.0 * x)


def test_required_components():
    x, y = rows_of(1, 300), rows_of(2, 300)
    for family in ("trigonometric", "oprf", "cderf"):
        options = {"family": family, "coupling": "iid", "random_state": 0}
        features = RandomFeatures(64, **options).fit(x, keys=y)
        count = features.required_components(0.03)
        assert isinstance(count, int) and count % 2 == 0
        for n, enough in ((count, True), (count - 2, False)):
            exact = RandomFeatures(n, **options).fit(x, keys=y)
            error = np.exp(0.5 * exact.predicted_log_variance_)
            assert (error <= 0.03 * (1 + 1e-9)) == enough
    odd = RandomFeatures(63, family="oprf", antithetic=False).fit(x, keys=y)
    assert odd.required_components(0.5) < odd.required_components(0.05)
    for bad in (0.0, -1.0, np.nan, "small"):
        with pytest.raises(ValueError, match="relative_error"):
            odd.required_components(bad)
    with pytest.warns(InaccurateFeaturesWarning):
        wild = RandomFeatures(64, family="positive", objective="mean").fit(9 * x)
    with pytest.raises(ValueError, match="infinite"):
        wild.required_components(0.1)


# ------------------------------------------------------------------- chunks and merges


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("family", ["auto", *KINDS])
def test_chunks_and_merges_are_the_whole(family, with_keys):
    x, y = rows_of(1, 90), rows_of(2, 80)
    pieces_x, pieces_y = np.split(x, [1, 30, 31]), np.split(y, [40, 41, 60])

    def fit(method, rows, others):
        keys = {"keys": others} if with_keys else {}
        return method(rows, **keys)

    def new(seed=5):
        return RandomFeatures(
            32, family=family, bandwidth="scale", scale=0.05, random_state=seed
        )

    whole = fit(new().fit, x, y)
    chunked, merged = new(), None
    for a, b in zip(pieces_x, pieces_y, strict=True):
        assert fit(chunked.partial_fit, a, b) is chunked
        part = fit(new(5 if merged is None else 6).fit, a, b)
        merged = part if merged is None else RandomFeatures.merge(merged, part)
    for other in (chunked, merged):
        assert other.family_ == whole.family_
        assert other.n_samples_seen_ == 90
        assert other.n_keys_seen_ == (80 if with_keys else 90)
        # Eigenvectors of eigenvalues some hundredths apart, and log-features below 100.
        assert_same_features(other, whole, x)


def test_order_of_rows_changes_nothing():
    x, y = rows_of(1, 200, 6), rows_of(2, 200, 6)
    rng = np.random.default_rng(0)
    for family in ("csderf", "cderf"):
        options = {"family": family, "random_state": 0}
        a = RandomFeatures(32, **options).fit(x, keys=y)
        b = RandomFeatures(32, **options).fit(rng.permutation(x), keys=y[::-1])
        assert_same_features(a, b, x)


def test_directions_without_rows_are_settled():
    """Eigenvectors of equal eigenvalues are any: the same ones are taken each time."""
    x = np.zeros((50, 8))
    x[:, 2:6] = rows_of(1, 50)
    fresh = rows_of(2, 20, 8)
    for family in ("csderf", "cderf"):
        options = {"family": family, "random_state": 0}
        a = RandomFeatures(32, **options).fit(x)
        b = RandomFeatures(32, **options).partial_fit(x[:11]).partial_fit(x[11:])
        assert_same_features(a, b, fresh, rtol=1e-7)


def test_batches_may_be_empty():
    x, y = rows_of(1), rows_of(2)
    whole = RandomFeatures(16, family="cderf", random_state=0).fit(x, keys=y)
    parts = RandomFeatures(16, family="cderf", random_state=0)
    parts.partial_fit(x[:10], keys=y)
    parts.partial_fit(x[:0], keys=y[:0])
    parts.partial_fit(x[10:], keys=y[:0])
    assert parts.n_keys_seen_ == 60
    assert_same_features(parts, whole, x)
    with pytest.raises(ValueError, match="0 sample"):
        RandomFeatures().fit(x[:0])
    with pytest.raises(ValueError, match="keys"):
        RandomFeatures().fit(x, keys=y[:0])
    assert parts.log_query_features(x[:0]).shape == (0, 16)
    assert parts.kernel_matrix(x[:0], y).shape == (0, 60)


def test_merge_and_partial_fit_refuse_what_does_not_fit_together():
    x, y = rows_of(1), rows_of(2)
    base = RandomFeatures(16, family="oprf").fit(x)
    for other in (
        RandomFeatures(32, family="oprf").fit(x),
        RandomFeatures(16, family="sderf").fit(x),
        RandomFeatures(16, family="oprf", bandwidth=2.0).fit(x),
        RandomFeatures(16, family="oprf").fit(x, keys=y),
        RandomFeatures(16, family="oprf").fit(x[:, :3]),
        RandomFeatures(16, family="oprf").fit(x[None]),
    ):
        with pytest.raises(ValueError):
            RandomFeatures.merge(base, other)
    with pytest.raises(TypeError, match="RandomFeatures"):
        RandomFeatures.merge(base, x)
    with pytest.raises(ValueError, match="keys"):
        base.partial_fit(x, keys=y)
    with pytest.raises(ValueError, match="features"):
        base.partial_fit(x[:, :3])
    with pytest.raises(ValueError, match="dimensions"):
        base.partial_fit(x[None])
    with pytest.raises(ValueError, match="first call"):
        base.set_params(n_components=20).partial_fit(x)


# ----------------------------------------------------------------------------- heads


@pytest.mark.parametrize("family", KINDS)
def test_heads_are_fitted_by_themselves(family):
    x = np.stack([rows_of(seed, size=0.2 + 0.1 * seed) for seed in range(3)])
    y = np.stack([rows_of(seed, 50) for seed in range(3, 6)])
    options = {"family": family, "scale": 0.5, "random_state": 0}
    heads = RandomFeatures(16, **options).fit(x, keys=y)
    assert heads.rho_.shape == (3, 4)
    assert heads.projection_.shape == (8, 4)
    assert heads.predicted_log_variance_.shape == (3,)
    assert heads.n_samples_seen_ == 60
    batch = np.random.default_rng(0).standard_normal((2, 3, 7, 4))
    out = heads.query_features(batch)
    assert out.shape == (2, 3, 7, 16)
    for head in range(3):
        alone = RandomFeatures(16, **options).fit(x[head], keys=y[head])
        np.testing.assert_allclose(
            alone.predicted_log_variance_, heads.predicted_log_variance_[head]
        )
        np.testing.assert_allclose(
            out[:, head], alone.query_features(batch[:, head]), rtol=1e-10
        )
        np.testing.assert_allclose(
            heads.kernel_matrix(batch, batch)[1, head],
            alone.kernel_matrix(batch[1, head], batch[1, head]),
            rtol=1e-10,
        )
        np.testing.assert_allclose(
            heads.log_relative_variance(batch, batch)[1, head],
            alone.log_relative_variance(batch[1, head], batch[1, head]),
            rtol=1e-6,
        )
    # Rows of no head go through all of them.
    assert heads.key_features(batch[0, 0]).shape == (3, 7, 16)
    with pytest.raises(ValueError, match="batch"):
        heads.query_features(batch[:, :2])


def test_auto_takes_one_family_for_all_heads():
    x = np.stack([rows_of(seed, 300) for seed in range(3)])
    y = np.stack([rows_of(seed, 300) for seed in range(3, 6)])
    features = RandomFeatures(64, random_state=0).fit(x, keys=y)
    assert isinstance(features.family_, str)
    for value in features.predicted_log_variance_.values():
        assert value.shape == (3,)


# ---------------------------------------------------------------------- range, errors


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("norm", [1.0, 30.0, 1000.0])
def test_kernel_matrix_of_any_norm(norm, kernel, dtype):
    """What the result can hold is right to the rounding of log-features."""
    rng = np.random.default_rng(0)
    x = norm * rng.standard_normal((9, 4)).astype(dtype) / 2
    y = norm * rng.standard_normal((8, 4)).astype(dtype) / 2
    y[:4] = -x[:4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InaccurateFeaturesWarning)
        features = RandomFeatures(
            32, family="sderf", kernel=kernel, random_state=0
        ).fit(x, keys=y)
    logs = log_sum(features.log_query_features(x), features.log_key_features(y))
    out = features.kernel_matrix(x, y)
    assert out.dtype == dtype
    info = np.finfo(dtype)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.exp(logs).astype(dtype)
    # log-features are sums of terms of this size; exponentials round their argument.
    terms = max(1.0, np.abs(features.log_query_features(x)).max())
    # float32 log-features are given: beyond them everything is in float64.
    unit = np.finfo(np.float64).eps if dtype == np.float32 else info.eps
    normal = (expected > info.tiny) & (expected < info.max)
    error = np.abs(out[normal] / expected[normal] - 1.0)
    assert (error <= 8 * terms * unit + 2 * info.eps).all()
    assert (out[expected == np.inf] == np.inf).all()
    assert (out[expected == 0] <= info.tiny).all()


@pytest.mark.skip_xp_backend("dask", reason="its chunks are NumPy arrays by then")
def test_kernel_matrix_where_features_have_nothing_in_common(xp):
    """Products of numbers that underflow are summed in logarithms."""
    from subquad._dispatch import namespace_of
    from subquad._random_features_evaluation import _log_products

    left = np.array([[0.0, -1e4, -2e4], [-1e4, 0.0, -5e3], [3.0, 1.0, 2.0]])
    right = np.array([[-1e4, 0.0, -1e3], [1.0, 0.0, -1.0]])
    a, b = xp.asarray(left), xp.asarray(right)
    with np.errstate(all="ignore"):
        out = _log_products(namespace_of(a), a, b)
    np.testing.assert_allclose(to_numpy(out), log_sum(left, right), rtol=1e-15)


@pytest.mark.parametrize("coupling", ["iid", "orthogonal"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_error_is_that_of_many_draws(causal, coupling):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 40, 4)) / 2
    v = rng.standard_normal((40, 3))
    w = np.tril(kernel_of(q, k)) if causal else kernel_of(q, k)
    exact = w @ v / w.sum(1, keepdims=True)
    squares = 0.0
    for seed in range(60):
        features = RandomFeatures(
            256, family="csderf", coupling=coupling, random_state=seed
        ).fit(q, keys=k)
        y = sq.random_feature_attention(q, k, v, features, causal=causal)
        squares += np.sum((y - exact) ** 2) / 60
    error = features.attention_error(q, k, v, causal=causal)
    assert error.shape == (40,)
    # The delta method, and 60 draws.
    assert 0.6 < squares / np.sum(error**2) < 1.4
    with pytest.raises(ValueError, match="causal"):
        features.attention_error(q[:9], k, v, causal=True)
    with pytest.raises(ValueError, match="v must"):
        features.attention_error(q, k, v[:9])


def test_attention_error_knows_the_coupling():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 40, 16)) / 4
    v = rng.standard_normal((40, 3))
    w = kernel_of(q, k)
    exact = w @ v / w.sum(1, keepdims=True)
    squares = {}
    predicted = {}
    for coupling in ("iid", "orthogonal"):
        squares[coupling] = 0.0
        for seed in range(40):
            features = RandomFeatures(
                64, family="csderf", coupling=coupling, random_state=seed
            ).fit(q, keys=k)
            y = sq.random_feature_attention(q, k, v, features)
            squares[coupling] += np.sum((y - exact) ** 2) / 40
        predicted[coupling] = np.sum(features.attention_error(q, k, v) ** 2)
        # The delta method, and 40 draws; blocks make the squares three times smaller.
        assert 0.7 < squares[coupling] / predicted[coupling] < 1.4
    assert squares["orthogonal"] < 0.5 * squares["iid"]
    assert predicted["orthogonal"] < 0.5 * predicted["iid"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_components": 0},
        {"n_components": 2.5},
        {"n_components": 7},
        {"n_components": 7, "antithetic": False, "family": "trigonometric"},
        {"family": "favor"},
        {"family": ["oprf"]},
        {"kernel": "rbf"},
        {"bandwidth": 0.0},
        {"bandwidth": "mean"},
        {"bandwidth": np.inf},
        {"scale": -1.0},
        {"scale": "auto"},
        {"coupling": "haar"},
        {"antithetic": "yes"},
        {"objective": "worst"},
        {"regularization": -0.1},
        {"regularization": None},
        {"basis": "fourier"},
        {"centered": "no"},
        {"scales": "two"},
        {"family": "trigonometric", "centered": True},
        {"random_state": -1},
    ],
)
def test_parameters_are_checked_by_fit(wrong):
    features = RandomFeatures(**{"n_components": 8, **wrong})
    name = next(iter(wrong))
    if wrong.get("family") == "trigonometric":
        name = "centered" if "centered" in wrong else "n_components"
    with pytest.raises(ValueError, match=name):
        features.fit(rows_of())
    assert not hasattr(features, "n_features_in_")


def test_odd_numbers_without_pairs():
    x = rows_of()
    features = RandomFeatures(7, antithetic=False, family="oprf").fit(x)
    assert features.log_key_features(x).shape == (60, 7)
    assert features.projection_.shape == (7, 4)


def test_arguments_are_checked():
    x, y = rows_of(1), rows_of(2)
    features = RandomFeatures(8, family="cderf", random_state=0).fit(x, keys=y)
    with pytest.raises(TypeError, match="x must be of real floating type"):
        features.log_query_features(np.ones((3, 4), int))
    with pytest.raises(ValueError, match=r"y must have shape \(..., n, d\) with d = 4"):
        features.log_key_features(y[:, :3])
    with pytest.raises(ValueError, match="x must have shape"):
        features.query_features(x[0])
    with pytest.raises(ValueError, match="transform"):
        features.transform(x)
    for bad in (np.nan, np.inf):
        z = x.copy()
        z[7, 2] = bad
        with pytest.raises(ValueError, match="X must be finite, but row 7"):
            RandomFeatures(8).fit(z)
        with pytest.raises(ValueError, match="keys must be finite, but row 7"):
            RandomFeatures(8).fit(x, keys=z)
    with pytest.raises(ValueError, match="keys must have"):
        RandomFeatures(8).fit(x, keys=y[:, :3])
    with pytest.raises(ValueError, match="keys must have"):
        RandomFeatures(8).fit(x, keys=y[None])
    with pytest.raises(ValueError, match="signs"):
        RandomFeatures(8, family="trigonometric").fit(x).log_key_features(x)
    for method in ("log_query_features", "key_features", "transform"):
        with pytest.raises(ValueError, match="not fitted"):
            getattr(RandomFeatures(), method)(x)
    with pytest.raises(AttributeError):
        RandomFeatures().rho_  # noqa: B018


def test_nan_reaches_its_row_only():
    x = rows_of()
    features = RandomFeatures(8, family="cderf", random_state=0).fit(x)
    clean = features.log_query_features(x)
    x[4, 1] = np.nan
    out = features.log_query_features(x)
    assert np.isnan(out[4]).all()
    np.testing.assert_array_equal(np.delete(out, 4, 0), np.delete(clean, 4, 0))
    with pytest.raises(ValueError, match="row 4"):
        features.transform(x)


def test_rows_are_left_alone():
    x, y = rows_of(1), rows_of(2)
    before = x.copy(), y.copy()
    features = RandomFeatures(8, bandwidth="median", random_state=0).fit(x, keys=y)
    features.kernel_matrix(x, y)
    features.attention_error(x, y, y)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


@pytest.mark.parametrize("n, d", [(1, 1), (1, 3), (2, 1), (5, 2)])
@pytest.mark.parametrize("family", ["auto", *FAMILIES])
def test_small_sizes(family, n, d):
    x = np.random.default_rng(0).standard_normal((n, d)) / 2
    for coupling in COUPLINGS:
        features = RandomFeatures(6, family=family, coupling=coupling, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InaccurateFeaturesWarning)
            features.fit(x, keys=x + 1.0)
        assert np.isfinite(features.query_features(x)).all()
        assert np.isfinite(features.kernel_matrix(x, x)).all()


@pytest.mark.parametrize("family", ["auto", *FAMILIES])
def test_constant_rows(family):
    x = np.full((20, 3), 0.2)
    features = RandomFeatures(8, family=family, random_state=0).fit(x)
    assert np.isfinite(features.kernel_matrix(x, x)).all()
    zero = RandomFeatures(8, family=family, random_state=0).fit(0 * x)
    np.testing.assert_allclose(zero.kernel_matrix(0 * x, 0 * x), 1.0, rtol=1e-12)


# -------------------------------------------------------------------------- libraries


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("family", KINDS)
def test_same_features_on_every_library(xp, family, dtype):
    x, y = rows_of(1).astype(dtype), rows_of(2, 50).astype(dtype)
    options = {"family": family, "bandwidth": "median", "random_state": 7}
    here = RandomFeatures(16, **options).fit(x, keys=y)
    there = RandomFeatures(16, **options).fit(xp.asarray(x), keys=xp.asarray(y))
    kind = np.ndarray if xp.name == "dask" else xp.array_type()
    for name in ("projection_", "rho_", "basis_", "shift_x_", "shift_y_"):
        learned = getattr(there, name)
        assert type(learned) is kind
        # Dask sums float32 rows chunk by chunk in float32.
        rough = 1e-5 if dtype == np.float32 else 1e-12
        np.testing.assert_allclose(to_numpy(learned), getattr(here, name), atol=rough)
    np.testing.assert_array_equal(to_numpy(there.projection_), here.projection_)
    # Moments are in float64 on every library here; log-features have terms of about 10.
    tolerance = 64 * np.finfo(dtype).eps
    for method in ("query_features", "key_features"):
        out = getattr(there, method)(xp.asarray(x))
        assert type(out) is xp.array_type()
        assert out.shape == (60, 16)
        assert to_numpy(out).dtype == dtype
        np.testing.assert_allclose(
            to_numpy(out), getattr(here, method)(x), rtol=tolerance, atol=tolerance
        )
    for method in ("kernel_matrix", "log_relative_variance"):
        out = getattr(there, method)(xp.asarray(x), xp.asarray(y))
        assert type(out) is xp.array_type()
        assert to_numpy(out).dtype == dtype
        # A logarithm of small variances has the rounding of 1 beside them.
        np.testing.assert_allclose(
            to_numpy(out), getattr(here, method)(x, y), rtol=tolerance, atol=1e-5
        )
    if family != "trigonometric":
        out = there.attention_error(*(xp.asarray(a) for a in (x, y, y)))
        assert out.shape == (60,)
        np.testing.assert_allclose(
            to_numpy(out), here.attention_error(x, y, y), rtol=1e-4
        )


def test_chunks_of_dask_with_heads():
    da = pytest.importorskip("dask.array")
    x = np.stack([rows_of(seed) for seed in range(3)])
    options = {"family": "cderf", "random_state": 0}
    here = RandomFeatures(16, **options).fit(x)
    chunked = da.from_array(x, chunks=(2, 17, 3))
    there = RandomFeatures(16, **options).fit(chunked)
    out = there.log_key_features(chunked)
    np.testing.assert_allclose(out.compute(), here.log_key_features(x), atol=1e-12)
    out = there.kernel_matrix(chunked, chunked)
    assert isinstance(out, da.Array)
    np.testing.assert_allclose(out.compute(), here.kernel_matrix(x, x), rtol=1e-11)
    np.testing.assert_allclose(
        there.transform(chunked).compute(), here.transform(x), rtol=1e-11
    )


def test_libraries_are_not_mixed():
    torch = pytest.importorskip("torch")
    x = rows_of()
    features = RandomFeatures(8, family="oprf").fit(x)
    with pytest.raises(TypeError, match="one library"):
        features.log_key_features(torch.from_numpy(x))
    with pytest.raises(TypeError, match="one library"):
        features.partial_fit(torch.from_numpy(x))
    with pytest.raises(TypeError, match="one library"):
        RandomFeatures(8).fit(x, keys=torch.from_numpy(x))
    with pytest.raises(TypeError, match="one library"):
        features.kernel_matrix(x, torch.from_numpy(x))


def test_half_precision_computes_in_float32():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(rows_of()).to(torch.bfloat16)
    features = RandomFeatures(8, family="cderf", random_state=0).fit(x)
    out = features.log_key_features(x)
    assert out.dtype == torch.float32
    wide = RandomFeatures(8, family="cderf", random_state=0).fit(x.float())
    np.testing.assert_allclose(
        out.numpy(), wide.log_key_features(x.float()).numpy(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", ["trigonometric", "csderf", "cderf"])
def test_gradients_of_torch(family):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(rows_of(1, 5))
    features = RandomFeatures(8, family=family, kernel="gaussian", random_state=0)
    features.fit(x, keys=torch.from_numpy(rows_of(2)))
    x.requires_grad_()
    assert torch.autograd.gradcheck(features.query_features, x)
    assert torch.autograd.gradcheck(lambda x: features.kernel_matrix(x, x), x)
    if family != "trigonometric":
        assert torch.autograd.gradcheck(features.log_key_features, x)


def test_inside_jit():
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(rows_of(1, 9))
    features = RandomFeatures(8, family="cderf", random_state=0).fit(x)
    for method in (features.log_key_features, features.query_features):
        np.testing.assert_allclose(jax.jit(method)(x), method(x), rtol=1e-11)
    np.testing.assert_allclose(
        jax.jit(features.kernel_matrix)(x, x), features.kernel_matrix(x, x), rtol=1e-11
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_changes_nothing(threads):
    x = rows_of(1, 3000, 16)

    def run():
        features = RandomFeatures(64, bandwidth="median", random_state=0).fit(x)
        return features.log_key_features(x[:500])

    with sq.num_threads(1):
        expected = run()
    with sq.num_threads(threads):
        np.testing.assert_array_equal(run(), expected)


def test_random_state():
    x = rows_of()

    def run(state):
        return RandomFeatures(8, family="cderf", random_state=state).fit(x).projection_

    np.testing.assert_array_equal(run(3), run(3))
    np.testing.assert_array_equal(
        run(np.random.default_rng(3)), run(np.random.default_rng(3))
    )
    assert (run(3) != run(4)).any()
    assert np.isfinite(run(None)).all()


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool])
def test_integers_become_float64(dtype):
    x = np.random.default_rng(0).integers(0, 2, (40, 3)).astype(dtype)
    features = RandomFeatures(8, family="cderf", random_state=0).fit(x)
    out = features.transform(x)
    assert out.dtype == np.float64
    np.testing.assert_array_equal(out, features.transform(x.astype(float)))
    np.testing.assert_array_equal(out, features.transform(x.astype(float).tolist()))


# --------------------------------------------------------------------------- manners


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("family", ["auto", *KINDS])
def test_save_and_load(tmp_path, family, with_keys):
    x, y = rows_of(1), rows_of(2)
    keys = {"keys": y} if with_keys else {}
    features = RandomFeatures(
        np.int64(16), family=family, bandwidth="median", scale=0.5, random_state=3
    ).fit(x, **keys)
    path = tmp_path / "features.npz"
    features.save(path)
    back = RandomFeatures.load(path)
    assert back.get_params() == features.get_params()
    assert back.family_ == features.family_
    assert back.predicted_log_variance_ == features.predicted_log_variance_
    np.testing.assert_array_equal(back.query_features(x), features.query_features(x))
    np.testing.assert_array_equal(back.key_features(x), features.key_features(x))
    more = rows_of(3)
    keys = {"keys": more} if with_keys else {}
    back.partial_fit(more, **keys)
    features.partial_fit(more, **keys)
    np.testing.assert_array_equal(back.key_features(x), features.key_features(x))
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)


def test_load_to_another_library(tmp_path):
    torch = pytest.importorskip("torch")
    x = rows_of()
    features = RandomFeatures(8, family="cderf", random_state=0).fit(x)
    features.save(tmp_path / "features.npz")
    tensor = torch.from_numpy(x)
    back = RandomFeatures.load(tmp_path / "features.npz", like=tensor)
    np.testing.assert_allclose(
        back.log_key_features(tensor).numpy(),
        features.log_key_features(x),
        atol=1e-12,
    )


def test_other_files_are_refused(tmp_path):
    sq.GaussianNormalizer().fit(np.eye(3)).save(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="other"):
        RandomFeatures.load(tmp_path / "other.npz")
    with pytest.raises((ValueError, AttributeError)):
        RandomFeatures().save(tmp_path / "unfitted.npz")


def test_generator_is_saved_as_a_seed(tmp_path):
    x = rows_of()
    features = RandomFeatures(8, random_state=np.random.default_rng(0)).fit(x)
    features.save(tmp_path / "features.npz")
    back = RandomFeatures.load(tmp_path / "features.npz")
    assert isinstance(back.random_state, int)
    np.testing.assert_array_equal(back.transform(x), features.transform(x))
    np.testing.assert_array_equal(back.fit(x).transform(x), features.transform(x))


def test_pickle_and_copy():
    x = rows_of()
    features = RandomFeatures(8, family="cderf", random_state=0).fit(x)
    expected = features.transform(x)
    for twin in (pickle.loads(pickle.dumps(features)), copy.deepcopy(features)):
        np.testing.assert_array_equal(twin.transform(x), expected)


def test_parameters():
    features = RandomFeatures(8, family="cderf", bandwidth="median")
    params = features.get_params()
    assert list(params) == [
        "n_components",
        "family",
        "kernel",
        "bandwidth",
        "scale",
        "coupling",
        "antithetic",
        "objective",
        "regularization",
        "basis",
        "centered",
        "scales",
        "random_state",
    ]
    assert features.set_params(scale=0.5) is features
    assert (
        repr(features) == "RandomFeatures(n_components=8, family='cderf', "
        "bandwidth='median', scale=0.5)"
    )
    assert RandomFeatures(**params).get_params() == params
    base = pytest.importorskip("sklearn.base")
    features.fit(rows_of())
    twin = base.clone(features)
    assert twin.get_params() == features.get_params()
    assert not hasattr(twin, "n_features_in_")


def test_pipeline_with_a_linear_classifier():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline

    data = load_digits()
    model = make_pipeline(
        RandomFeatures(
            512,
            family="csderf",
            kernel="gaussian",
            bandwidth="median",
            random_state=0,
        ),
        RidgeClassifier(alpha=1e-3),
    )
    model.fit(data.data[::2], data.target[::2])
    linear = RidgeClassifier().fit(data.data[::2], data.target[::2])
    score = model.score(data.data[1::2], data.target[1::2])
    assert score > 0.96 > linear.score(data.data[1::2], data.target[1::2])
    names = model[:-1].get_feature_names_out()
    assert len(names) == 512 and names[3] == "randomfeatures3"
