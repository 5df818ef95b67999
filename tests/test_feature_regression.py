"""Kernel ridge regression and kernel means on random features."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest

from _arrays import to_numpy
from subquad.features import InaccurateFeaturesWarning, KernelRidge, NadarayaWatson

FAMILIES = ["trigonometric", "positive", "csderf"]
BOTH = [KernelRidge, NadarayaWatson]


def data(seed=0, n=80, d=3, k=None):
    """Rows and a smooth function of them, or k of these."""
    rng = np.random.default_rng(seed)
    X = rng.uniform(-1.5, 1.5, (n, d))
    columns = [np.sin((i + 1) * X[:, 0]) + X[:, 1] * X[:, -1] for i in range(k or 1)]
    return X, columns[0] if k is None else np.column_stack(columns)


def classes_of(y):
    return np.digitize(y, [-0.5, 0.5])


def means(model, X, Xs, ys, weights=None):
    """Kernel means with the model's kernel, densely."""
    K = model.features_.kernel_matrix(Xs, X)
    if weights is not None:
        K = K * weights
    shape = (-1,) + (1,) * (ys.ndim - 1)
    return (K @ ys) / np.reshape(K.sum(1), shape)


def quiet(cls, *args, **options):
    """A model whose first call may say that the trigonometric family is better."""
    return cls(*args, **{"family": "csderf", "random_state": 0, **options})


# ------------------------------------------------------------------- against the dense


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("kind", ["none", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [1.0, 1e-2])
def test_ridge_is_that_of_the_kernel(alpha, family, kind, k):
    ridge = pytest.importorskip("sklearn.kernel_ridge")
    X, y = data(k=k)
    fresh, _ = data(1, 20)
    w = np.random.default_rng(2).uniform(0.2, 2.0, 80) if kind == "weights" else None
    options = {"alpha": alpha, "family": family, "bandwidth": 2.0}
    model = quiet(KernelRidge, 24, **options).fit(X, y, w)
    kernel = model.features_.kernel_matrix
    dense = ridge.KernelRidge(alpha=alpha, kernel="precomputed")
    dense.fit(kernel(X, X), y, sample_weight=w)
    out = model.predict(fresh)
    assert out.shape == ((20,) if k is None else (20, 2))
    assert model.coef_.shape == ((24,) if k is None else (24, 2))
    # Both solve systems whose condition is |K| / alpha, below 1e5 here.
    np.testing.assert_allclose(out, dense.predict(kernel(fresh, X)), rtol=0, atol=1e-9)
    score = ridge.KernelRidge.score(dense, kernel(X, X), y, sample_weight=w)
    np.testing.assert_allclose(model.score(X, y, w), score, atol=1e-9)


def test_ridge_without_penalty_is_least_squares():
    """And the shortest of many solutions where features are more than rows."""
    X, y = data(n=15)
    model = quiet(KernelRidge, 64, alpha=0.0).fit(X, y)
    phi = model.features_.transform(X)
    # ΦᵀΦ has the square of Φ's condition, 1e4, and more dimensions than rows.
    expected = np.linalg.lstsq(phi, y, rcond=1e-7)[0]
    np.testing.assert_allclose(model.predict(X), y, atol=1e-6)
    assert np.linalg.norm(model.coef_) <= np.linalg.norm(expected) * (1 + 1e-6)
    zero = quiet(KernelRidge, 8, alpha=0.0).fit(np.zeros((5, 2)), np.ones(5))
    np.testing.assert_allclose(zero.predict(np.zeros((2, 2))), 1.0)


def test_ridge_learns():
    X, y = data(n=400)
    fresh, truth = data(1, 200)
    model = quiet(KernelRidge, 256, alpha=1e-4).fit(X, y)
    assert model.score(fresh, truth) > 0.99


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("kind", ["none", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_means_are_those_of_the_kernel(family, kind, k):
    X, y = data(k=k)
    fresh, _ = data(1, 20)
    w = np.random.default_rng(2).uniform(0.2, 2.0, 80) if kind == "weights" else None
    model = quiet(NadarayaWatson, 24, family=family, bandwidth=2.0).fit(X, y, w)
    assert not hasattr(model, "classes_")
    expected = means(model, X, fresh, y, w)
    # Of signed features sums may cancel: they are less than 1e4 times their terms.
    tolerance = 1e-10 if family == "trigonometric" else 1e-13
    np.testing.assert_allclose(model.predict(fresh), expected, atol=tolerance)
    with pytest.raises(AttributeError, match="classes"):
        model.predict_proba(fresh)


@pytest.mark.parametrize("family", ["trigonometric", "csderf"])
@pytest.mark.parametrize("kind", ["int", "bool", "str", "object", "list"])
def test_classes(kind, family):
    X, y = data()
    y = {
        "int": lambda: 10 - 5 * classes_of(y),
        "bool": lambda: y > 0,
        "str": lambda: np.array(["c", "a", "bb"])[classes_of(y)],
        "object": lambda: np.array(["c", "a", "bb"], object)[classes_of(y)],
        "list": lambda: [["c", "a", "bb"][i] for i in classes_of(y)],
    }[kind]()
    labels = np.asarray(y)
    model = quiet(NadarayaWatson, 64, family=family, bandwidth=1.5).fit(X, y)
    np.testing.assert_array_equal(model.classes_, np.unique(labels))
    p = model.predict_proba(X)
    assert p.shape == (80, len(model.classes_))
    columns = (labels[:, None] == model.classes_).astype(float)
    tolerance = 1e-9 if family == "trigonometric" else 1e-13
    np.testing.assert_allclose(p, means(model, X, X, columns), atol=tolerance)
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-9)
    predicted = model.predict(X)
    np.testing.assert_array_equal(predicted, model.classes_[p.argmax(1)])
    assert predicted.dtype == labels.dtype
    assert model.score(X, y) == np.mean(predicted == labels) > 0.5


def test_classes_against_the_exact_kernel():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((300, 4)) + 1.5 * np.arange(300)[:, None] % 3
    y = np.arange(300) % 2
    model = quiet(NadarayaWatson, 4096, bandwidth=2.0).fit(X, y)
    squares = ((X[:, None] - X[None]) ** 2).sum(-1)
    K = np.exp(-squares / 8)
    exact = (K @ y) / K.sum(1)
    error = model.predict_proba(X)[:, 1] - exact
    assert np.sqrt(np.mean(error**2)) < 0.05


@pytest.mark.parametrize("distance", [10.0, 1000.0])
def test_means_far_from_all_rows(distance):
    """Where all kernels underflow they are means still, with nothing added."""
    X, y = data()
    model = quiet(NadarayaWatson, 32).fit(X, y)
    far = distance * np.array([[1.0, 2.0, -1.0], [0.0, -3.0, 1.0]])
    out = model.predict(far)
    assert np.isfinite(out).all()
    assert (out >= y.min() - 1e-12).all() and (out <= y.max() + 1e-12).all()
    log_q = model.features_.log_query_features(far)
    log_k = model.features_.log_key_features(X)
    logs = (log_q[:, None, :] + log_k[None]).astype(np.longdouble)
    w = np.exp(logs - logs.max((1, 2), keepdims=True)).sum(-1)
    expected = (w @ y) / w.sum(1)
    size = np.abs(log_q).max()
    np.testing.assert_allclose(
        out, expected.astype(float), atol=8 * size * np.finfo(float).eps
    )


# ------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("cuts", [[40], [1, 2, 50]])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cls", BOTH)
def test_streaming_is_the_whole(cls, weighted, cuts):
    """Features that do not depend on the rows, and any number of batches."""
    X, y = data(k=2)
    w = np.random.default_rng(2).uniform(0.2, 2.0, 80) if weighted else None
    for family in ("trigonometric", "positive"):
        options = {"family": family, "bandwidth": 2.0}
        whole = quiet(cls, 24, **options).fit(X, y, w)
        parts = quiet(cls, 24, **options)
        for rows in np.split(np.arange(80), cuts):
            got = parts.partial_fit(
                X[rows], y[rows], sample_weight=None if w is None else w[rows]
            )
            assert got is parts
        # Signed sums may cancel; the ridge is of condition 1e3.
        np.testing.assert_allclose(parts.predict(X), whole.predict(X), atol=1e-9)


def test_features_stay_those_of_the_first_batch():
    X, y = data()
    model = quiet(KernelRidge, 24).partial_fit(X[:40], y[:40])
    before = model.features_.transform(X)
    model.partial_fit(X[40:], y[40:])
    np.testing.assert_array_equal(model.features_.transform(X), before)
    phi = before
    beta = np.linalg.solve(phi.T @ phi + np.eye(24), phi.T @ y)
    np.testing.assert_allclose(model.coef_, beta, rtol=1e-8, atol=1e-10)


def test_classes_of_later_batches():
    X, y = data()
    labels = classes_of(y)
    order = np.argsort(labels, kind="stable")
    options = {"family": "positive", "bandwidth": 2.0}
    whole = quiet(NadarayaWatson, 24, **options).fit(X, labels)
    parts = quiet(NadarayaWatson, 24, **options)
    for rows in np.split(order, [20, 50]):
        parts.partial_fit(X[rows], labels[rows], classes=[0, 1, 2])
    np.testing.assert_allclose(
        parts.predict_proba(X), whole.predict_proba(X), atol=1e-13
    )
    with pytest.raises(ValueError, match="classes"):
        parts.partial_fit(X, labels + 1)
    with pytest.raises(ValueError, match="classes"):
        parts.partial_fit(X, y)


def test_blocks_are_the_whole(monkeypatch):
    from subquad import _feature_regression

    X, y = data()
    for cls in BOTH:
        whole = quiet(cls, 24).fit(X, y).predict(X)
        with monkeypatch.context() as patch:
            patch.setattr(_feature_regression, "_MOST", 24 * 7)
            blocks = quiet(cls, 24).fit(X, y).predict(X)
        np.testing.assert_allclose(blocks, whole, atol=1e-10)


@pytest.mark.parametrize("cls", BOTH)
def test_fit_forgets_the_past(cls):
    X, y = data()
    model = quiet(cls, 24).fit(X + 5, y)
    expected = quiet(cls, 24).fit(X, y).predict(X)
    np.testing.assert_array_equal(model.fit(X, y).predict(X), expected)
    if cls is NadarayaWatson:
        model.fit(X, classes_of(y))
        assert hasattr(model, "classes_")
        assert not hasattr(model.fit(X, y), "classes_")


# -------------------------------------------------------------------------- libraries


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("family", ["trigonometric", "csderf"])
@pytest.mark.parametrize("cls", BOTH)
def test_every_library(xp, cls, family, dtype):
    X, y = data(k=2)
    X, y = X.astype(dtype), y.astype(dtype)
    w = np.random.default_rng(2).uniform(0.2, 2.0, 80).astype(dtype)
    options = {"family": family, "bandwidth": 2.0}
    here = quiet(cls, 24, **options).fit(X, y, w)
    there = quiet(cls, 24, **options)
    there.fit(xp.asarray(X), xp.asarray(y), xp.asarray(w))
    out = there.predict(xp.asarray(X))
    assert type(out) is xp.array_type()
    assert to_numpy(out).dtype == dtype
    # Ridges and signed sums of condition 1e3 and less.
    tolerance = 2e3 * np.finfo(dtype).eps
    np.testing.assert_allclose(to_numpy(out), here.predict(X), atol=tolerance)
    assert isinstance(there.score(xp.asarray(X), xp.asarray(y)), float)
    # Targets may be on the host.
    host = quiet(cls, 24, **options).fit(xp.asarray(X), y)
    plain = quiet(cls, 24, **options).fit(X, y)
    np.testing.assert_allclose(
        to_numpy(host.predict(xp.asarray(X))), plain.predict(X), atol=tolerance
    )
    if cls is NadarayaWatson:
        labels = classes_of(y[:, 0])
        there.fit(xp.asarray(X), xp.asarray(labels))
        found = there.predict(xp.asarray(X))
        assert type(found) is xp.array_type()
        here.fit(X, labels)
        np.testing.assert_array_equal(to_numpy(found), here.predict(X))
        p = there.predict_proba(xp.asarray(X))
        assert type(p) is xp.array_type()
        assert 0 <= there.score(xp.asarray(X), xp.asarray(labels)) <= 1


def test_string_classes_of_tensors():
    torch = pytest.importorskip("torch")
    X, y = data()
    labels = np.array(["c", "a", "bb"])[classes_of(y)]
    model = quiet(NadarayaWatson, 24).fit(torch.from_numpy(X), labels)
    found = model.predict(torch.from_numpy(X))
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(
        found, quiet(NadarayaWatson, 24).fit(X, labels).predict(X)
    )
    with pytest.raises(TypeError, match="one library"):
        model.predict(X)
    with pytest.raises(TypeError, match="one library"):
        quiet(KernelRidge, 24).fit(X, torch.from_numpy(y))


# ------------------------------------------------------------------- estimator manners


@pytest.mark.parametrize("cls", BOTH)
def test_arguments_are_checked(cls):
    X, y = data()
    for bad, message in (
        ((X, y[:9]), "y must have shape"),
        ((X, None), "requires y"),
        ((X[None], y), "X must be a matrix"),
        ((X, np.where(X[:, 0] > 1, np.nan, y)), "y must be finite"),
        ((X, y, np.full(80, -1.0)), "sample_weight"),
        ((X, y, np.zeros(80)), "sample_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            quiet(cls, 24).fit(*bad)
    model = quiet(cls, 24)
    with pytest.raises(ValueError, match="not fitted"):
        model.predict(X)
    model.fit(X, y)
    with pytest.raises(ValueError, match="features"):
        model.predict(X[:, :2])
    with pytest.raises(ValueError, match="finite"):
        model.predict(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="first call"):
        model.set_params(bandwidth=3.0).partial_fit(X, y)
    with pytest.raises(ValueError, match="first call"):
        model.set_params(bandwidth="scale").partial_fit(X, y[:, None])
    with pytest.raises(ValueError, match="n_components"):
        quiet(cls, 7).fit(X, y)
    assert model.predict(X[:0]).shape == (0,)


def test_alpha_is_checked():
    X, y = data()
    for alpha in (-1.0, np.nan, "1"):
        with pytest.raises(ValueError, match="alpha"):
            quiet(KernelRidge, alpha=alpha).fit(X, y)


@pytest.mark.parametrize("family", ["trigonometric", "csderf"])
@pytest.mark.parametrize("cls", BOTH)
def test_save_and_load(tmp_path, cls, family):
    X, y = data()
    targets = [y, np.column_stack([y, -y])]
    if cls is NadarayaWatson:
        labels = classes_of(y)
        targets += [labels, np.array(["a", "b", "c"], object)[labels]]
    for target in targets:
        model = quiet(cls, 24, family=family).fit(X, target)
        model.save(tmp_path / "model.npz")
        back = cls.load(tmp_path / "model.npz")
        assert back.get_params() == model.get_params()
        np.testing.assert_array_equal(back.predict(X), model.predict(X))
        back.partial_fit(X, target)
        np.testing.assert_array_equal(
            back.predict(X), model.partial_fit(X, target).predict(X)
        )


@pytest.mark.parametrize("cls", BOTH)
def test_copies_and_parameters(cls):
    base = pytest.importorskip("sklearn.base")
    X, y = data()
    model = quiet(cls, 24).fit(X, y)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        np.testing.assert_array_equal(twin.predict(X), model.predict(X))
    twin = base.clone(model)
    assert twin.get_params() == model.get_params()
    assert not hasattr(twin, "features_")
    assert cls().get_params()["kernel"] == "gaussian"
    assert repr(cls(24, scale=2.0)) == f"{cls.__name__}(n_components=24, scale=2.0)"
    assert base.is_regressor(model) == (cls is KernelRidge)


@pytest.mark.parametrize("cls", BOTH)
def test_warns_as_the_features_do(cls):
    X, y = data(d=20)
    with pytest.warns(InaccurateFeaturesWarning, match="too few") as caught:
        cls(24, family="positive", bandwidth=0.2, random_state=0).fit(X, y)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(cls, 128).fit(X, y)


def test_grid_search_in_a_pipeline():
    pytest.importorskip("sklearn")
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    X, y = data(n=120)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), quiet(KernelRidge, 64)),
        {"kernelridge__alpha": [1e-3, 1e3]},
        cv=3,
    )
    assert search.fit(X, y).best_params_ == {"kernelridge__alpha": 1e-3}
