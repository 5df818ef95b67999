"""EDRep as an estimator: parameters, operators of all kinds, files, conventions."""

from __future__ import annotations

import copy
import fractions
import pickle
import sys
import tracemalloc
import warnings

import numpy as np
import pytest

import subquad as sq
from _arrays import to_numpy
from subquad import _edrep_epochs
from subquad.embedding import EDRep

sparse = pytest.importorskip("scipy.sparse")


def affinities(n=34, m=34, seed=0):
    """Rows that sum to 1 and hold many zeros."""
    rng = np.random.default_rng(seed)
    links = rng.random((n, m)) * (rng.random((n, m)) < 0.3)
    links[np.arange(n), np.arange(n) % m] = 0.5
    return links / links.sum(axis=1, keepdims=True)


def small(**options):
    return EDRep(**{"n_components": 4, "max_iter": 6, "random_state": 0, **options})


def assert_same(a, b):
    np.testing.assert_array_equal(to_numpy(a.embedding_), to_numpy(b.embedding_))
    np.testing.assert_array_equal(
        to_numpy(a.key_embedding_), to_numpy(b.key_embedding_)
    )
    np.testing.assert_array_equal(to_numpy(a.labels_), to_numpy(b.labels_))
    np.testing.assert_array_equal(a.loss_, b.loss_)


# ------------------------------------------------------------------------ operators


def test_operators_of_every_kind():
    p = affinities()
    linalg = pytest.importorskip("scipy.sparse.linalg")
    expected = small().fit(sparse.csr_array(p))
    for operator in (
        sparse.coo_matrix(p),
        sparse.csc_array(p),
        sq.OperatorChain([sparse.csr_array(p)]),
    ):
        assert_same(small().fit(operator), expected)
    # Dense products round in another order.
    for operator in (p, np.asfortranarray(p), linalg.aslinearoperator(p)):
        found = small().fit(operator)
        np.testing.assert_allclose(
            found.embedding_, expected.embedding_, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("mean", [False, True])
def test_last_product_is_what_the_product_ends_with(mean):
    a, b = (sparse.csr_array(affinities(seed=seed)) for seed in (1, 2))
    x = np.random.default_rng(3).standard_normal((34, 3))
    for matrices in ([a], [a, a, a], [a, b, a]):
        chain = sq.OperatorChain(matrices, mean_of_partial_products=mean)
        for each in (chain, chain.T):
            matrix, rows, scale = each._last_product(x)
            if matrix is None:
                found = scale * rows
            else:
                found = sq.csr_product(*matrix, rows, scale=scale)
            np.testing.assert_array_equal(found, each @ x)


@pytest.mark.parametrize(
    "given, expected",
    [
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.float16, np.float32),
        (np.int8, np.float64),
        (bool, np.float64),
    ],
)
def test_types(given, expected):
    p = (affinities() > 0).astype(given)
    assert small().fit(p).embedding_.dtype == expected
    if given is not np.float16:
        model = small(init=np.eye(34, 4) + 0.1).fit(sparse.csr_array(p))
        assert model.embedding_.dtype == expected


@pytest.mark.skip_xp_backend("dask", reason="refused")
def test_every_library(xp):
    p = affinities(34, 9)
    options = {"n_clusters": 2, "gradient": "full", "symmetric": False, "max_iter": 2}
    here = small(**options).fit(p)
    there = small(**options).fit(xp.asarray(p))
    for name in ("embedding_", "key_embedding_", "labels_"):
        found = getattr(there, name)
        assert type(found) is xp.array_type()
        np.testing.assert_allclose(
            to_numpy(found), getattr(here, name), rtol=0, atol=1e-11
        )
    assert type(there.loss_) is np.ndarray
    np.testing.assert_allclose(there.loss_, here.loss_, rtol=0, atol=1e-11)
    new = there.transform(xp.asarray(p[:5]))
    assert type(new) is xp.array_type()
    np.testing.assert_allclose(to_numpy(new), here.transform(p[:5]), rtol=0, atol=1e-11)


@pytest.mark.skip_xp_backend("dask", reason="refused")
def test_library_of_initial_rows(xp):
    p, rows = affinities(), np.random.default_rng(0).standard_normal((34, 4))
    model = small(init=xp.asarray(rows)).fit(xp.asarray(p))
    assert type(model.embedding_) is xp.array_type()
    np.testing.assert_allclose(
        to_numpy(model.embedding_),
        small(init=rows).fit(p).embedding_,
        rtol=0,
        atol=1e-10,
    )


def test_chain_and_initial_rows_of_torch():
    torch = pytest.importorskip("torch")
    rows = np.random.default_rng(0).standard_normal((34, 4))
    p = sparse.csr_array(affinities())
    start = torch.tensor(rows, requires_grad=True)
    model = small(init=start).fit(p)
    assert isinstance(model.embedding_, torch.Tensor)
    assert not model.embedding_.requires_grad
    np.testing.assert_allclose(
        model.embedding_.numpy(),
        small(init=rows).fit(p).embedding_,
        rtol=0,
        atol=1e-12,
    )
    with pytest.raises(TypeError, match="operator is numpy, init is torch"):
        small(init=start).fit(p.toarray())


def test_start_is_the_same_in_both_types():
    start = np.random.default_rng(7).standard_normal((34, 4))
    given = small(init=start, random_state=7)
    for dtype in (np.float32, np.float64):
        p = affinities().astype(dtype)
        drawn = small(random_state=7).fit(p)
        tolerance = 64 * np.finfo(dtype).eps
        np.testing.assert_allclose(
            drawn.loss_[0], given.fit(p).loss_[0], rtol=0, atol=tolerance
        )


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "operator, kind, text",
    [
        ([np.eye(3)], TypeError, "OperatorChain"),
        ([[1.0, 0.0], [0.0, 1.0]], TypeError, "OperatorChain"),
        (None, TypeError, "operator must be"),
        (np.eye(3)[:2], ValueError, "operator must be square"),
        (sparse.csr_array((2, 3)), ValueError, "operator must be square"),
        (sparse.csr_array((0, 0)), ValueError, "0 sample"),
        (np.ones(3), ValueError, "operator must be"),
        (1j * np.eye(3), ValueError, "operator must be real"),
        (1j * sparse.eye_array(3), TypeError, "operator must hold"),
        (np.full((3, 3), np.nan), ValueError, "operator must be finite"),
        (np.diag([1.0, np.inf, 0.0]), ValueError, "operator must be finite"),
    ],
)
def test_operators_that_are_none(operator, kind, text):
    model = small()
    with pytest.raises(kind, match=text):
        model.fit(operator)
    assert not hasattr(model, "embedding_")


def test_graphs_and_dask_arrays_are_refused():
    networkx = pytest.importorskip("networkx")
    with pytest.raises(TypeError, match="random_walk"):
        small().fit(networkx.path_graph(4))
    dask_array = pytest.importorskip("dask.array")
    with pytest.raises(TypeError, match="every epoch"):
        small().fit(dask_array.eye(4))
    with pytest.raises(TypeError, match="init must not be a Dask array"):
        small(init=dask_array.ones((4, 4))).fit(np.eye(4))


@pytest.mark.parametrize(
    "options, kind",
    [
        ({"n_components": 0}, ValueError),
        ({"n_components": 2.0}, ValueError),
        ({"n_clusters": 0}, ValueError),
        ({"n_clusters": 35}, ValueError),
        ({"max_iter": 0}, ValueError),
        ({"learning_rate": 0.0}, ValueError),
        ({"learning_rate": 1.5}, ValueError),
        ({"learning_rate": np.nan}, ValueError),
        ({"symmetric": "yes"}, TypeError),
        ({"gradient": "both"}, ValueError),
        ({"gradient": "symmetric", "symmetric": False}, ValueError),
        ({"tol": -1.0}, ValueError),
        ({"tol": "auto"}, ValueError),
        ({"progress": 1}, TypeError),
        ({"random_state": -1}, ValueError),
        ({"init": "ones"}, ValueError),
        ({"init": None}, TypeError),
        ({"init": np.ones((34, 3))}, ValueError),
        ({"init": np.ones((34, 4)), "symmetric": False}, ValueError),
        ({"init": [np.ones((34, 4))] * 3, "symmetric": False}, ValueError),
        ({"null_weights": np.ones(33)}, ValueError),
        ({"null_weights": np.zeros(34)}, ValueError),
        ({"null_weights": -np.ones(34)}, ValueError),
        ({"null_weights": np.full(34, np.nan)}, ValueError),
        ({"null_weights": np.full(34, 1e308)}, ValueError),
    ],
)
def test_parameters_without_meaning(options, kind):
    name = next(iter(options))
    with pytest.raises(kind, match=name):
        small(**options).fit(affinities())


def test_zero_and_infinite_initial_rows_are_named():
    rows = np.ones((34, 4))
    rows[3] = 0
    with pytest.raises(ValueError, match="row 3 is zero"):
        small(init=rows).fit(affinities())
    rows[3, 1] = np.inf
    with pytest.raises(ValueError, match="row 3 contains NaN or infinity"):
        small(init=rows).fit(affinities())


def test_transform_checks_its_affinities():
    p = affinities(9, 6)
    model = small(symmetric=False)
    with pytest.raises(ValueError, match="not fitted"):
        model.transform(p)
    model.fit(p)
    with pytest.raises(ValueError, match=r"affinities .* m = 6"):
        model.transform(p[:, :5])
    with pytest.raises(ValueError, match="row 2 contains NaN"):
        model.transform(np.where(np.arange(9)[:, None] == 2, np.nan, p))
    assert model.transform(p[:0]).shape == (0, 4)
    np.testing.assert_allclose(
        np.linalg.norm(model.transform(np.zeros((2, 6))), axis=1), 1, rtol=1e-14
    )


# ------------------------------------------------------------------------- epochs


def test_partial_fit_goes_on():
    p = affinities()
    model = small().partial_fit(p)
    assert_same(model, small().fit(p))
    first = model.loss_.copy()
    model.partial_fit(p)
    again = small(init=small().fit(p).embedding_).fit(p)
    # Rows of unit norm are scaled to it once more.
    np.testing.assert_allclose(model.embedding_, again.embedding_, rtol=0, atol=1e-12)
    assert model.n_iter_ == 12
    assert model.loss_.shape == (13,)
    np.testing.assert_array_equal(model.loss_[:7], first)
    for options in ({"n_components": 3}, {"symmetric": False}):
        other = copy.deepcopy(model).set_params(**options)
        with pytest.raises(ValueError, match=next(iter(options))):
            other.partial_fit(p)
        np.testing.assert_array_equal(other.embedding_, model.embedding_)
    with pytest.raises(ValueError, match=r"operator must have m = 34 columns"):
        model.partial_fit(affinities(9, 9))
    with pytest.raises(ValueError, match="shape of the first call"):
        model.partial_fit(affinities(9, 34))


@pytest.mark.parametrize("n_clusters", [1, 2])
def test_tol_stops_and_keeps_the_rows_of_the_last_loss(n_clusters):
    p = affinities()
    options = {"n_clusters": n_clusters, "learning_rate": 0.1, "max_iter": 60}
    every = small(**options).fit(p)
    model = small(**options, tol=0.02).fit(p)
    first = 0 if n_clusters == 1 else 30
    assert first + 5 <= model.n_iter_ < 60
    losses = model.loss_[first:]
    assert losses[:-5].min() - losses[-5:].min() < 0.02
    np.testing.assert_array_equal(model.loss_, every.loss_[: len(model.loss_)])
    continued = copy.deepcopy(model).set_params(tol=None, learning_rate=1e-9)
    if n_clusters == 1:
        # Its rows are those that its last loss tells of.
        np.testing.assert_allclose(
            continued.partial_fit(p).loss_[len(losses)], losses[-1], rtol=0, atol=1e-7
        )


def test_threads_and_repetition_change_nothing():
    p = sparse.csr_array(affinities(500, 500))
    options = {"n_clusters": 3, "gradient": "full", "null_weights": np.arange(500.0)}
    with sq.num_threads(1):
        expected = small(**options).fit(p)
    for threads in (1, 2, 3):
        with sq.num_threads(threads):
            assert_same(small(**options).fit(p), expected)
    generators = [np.random.default_rng(5) for _ in range(2)]
    assert_same(*(small(random_state=g).fit(p) for g in generators))


def test_arguments_are_left_alone():
    p, rows, weights = affinities(), np.full((34, 4), 2.0), np.arange(34.0)
    rows[:, 1] = np.linspace(-1, 1, 34)
    before = p.copy(), rows.copy(), weights.copy()
    for array in (p, rows, weights):
        array.flags.writeable = False
    model = small(init=rows, null_weights=weights).fit(p)
    for array, old in zip((p, rows, weights), before, strict=True):
        np.testing.assert_array_equal(array, old)
    assert not np.shares_memory(model.embedding_, rows)


def test_memory_of_an_epoch():
    """Beside the rows, the matrix and its copy two arrays of the rows' shape."""
    n, d = 20000, 32
    ring = sparse.diags_array([np.ones(n - 1, np.float32)], offsets=[1], format="csr")
    chain = sq.OperatorChain([ring] * 3, mean_of_partial_products=True)
    model = small(n_components=d, max_iter=3)
    # Once beforehand: modules and threads are there then.
    model.fit(chain)
    del model.embedding_, model.key_embedding_
    tracemalloc.start()
    try:
        model.fit(chain)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Labels are 8 bytes a row, attraction and log Z 4 bytes each.
    assert peak < 3 * 4 * n * d + 16 * n + (1 << 20)


@pytest.mark.parametrize(
    "losses, over",
    [
        ([4.0, 3.0, 2.0, 1.0, 0.5], False),  # none before the last five
        ([4.0, 3.0, 2.9, 2.8, 2.7, 2.6, 2.5], False),
        ([4.0, 1.0, 3.0, 2.5, 2.0, 1.5, 1.2], True),  # falls, but not below the best
        ([4.0, 3.0, 1.0, 5.0, 5.0, 5.0, 5.0], False),  # the best is among the last five
        ([3.0, 2.0, 2.0, 2.0, 2.0, 1.95, 2.0], True),
    ],
)
def test_the_best_loss_of_five_epochs_counts(losses, over):
    schedule = _edrep_epochs.Schedule(30, 0.8, 1, 15, tol=0.1)
    assert schedule.is_over(losses) is over


def test_progress(capsys, monkeypatch):
    pytest.importorskip("rich")
    small(progress=True).fit(affinities())
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "6/6" in shown.err
    assert "loss" in shown.err
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ModuleNotFoundError, match="rich"):
        small(progress=True).fit(affinities())


# ---------------------------------------------------------------------- save and load


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": False, "gradient": "full", "random_state": np.int64(3)},
        {"n_clusters": 3, "null_weights": np.arange(34.0)},
        {"init": np.eye(34, 4) + 0.1, "random_state": np.random.default_rng(1)},
        {"init": (np.eye(34, 4) + 0.1,) * 2, "symmetric": False},
    ],
)
def test_save_and_load(tmp_path, options):
    p = affinities()
    model = small(**options).fit(p)
    path = tmp_path / "model.npz"
    model.save(path)
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
    back = EDRep.load(path)
    assert_same(back, model)
    assert (back.key_embedding_ is back.embedding_) == bool(model.symmetric)
    assert (back.n_iter_, back.n_features_in_) == (6, 34)
    assert repr(back.set_params(random_state=None)) == repr(
        copy.deepcopy(model).set_params(random_state=None)
    )
    np.testing.assert_array_equal(back.transform(p[:3]), model.transform(p[:3]))
    # Life goes on after loading, and in copies.
    for twin in (back, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        twin.partial_fit(p)
    model.partial_fit(p)
    assert_same(back, model)
    assert_same(twin, model)


def test_save_needs_a_fitted_estimator(tmp_path):
    with pytest.raises((ValueError, AttributeError)):
        EDRep().save(tmp_path / "model.npz")
    sq.GaussianNormalizer().fit(np.eye(3)).save(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="other"):
        EDRep.load(tmp_path / "other.npz")


# -------------------------------------------------------------------- estimator manners


def test_parameters():
    model = EDRep(8, tol=0.1)
    assert model.get_params() == {
        "n_components": 8,
        "n_clusters": 1,
        "max_iter": 30,
        "learning_rate": 0.8,
        "symmetric": True,
        "gradient": "source",
        "null_weights": None,
        "tol": 0.1,
        "init": "random",
        "random_state": None,
        "progress": False,
    }
    assert repr(model) == "EDRep(n_components=8, tol=0.1)"
    assert repr(EDRep(init=np.ones((3, 2)), null_weights=np.ones(3))) == (
        "EDRep(null_weights=..., init=...)"
    )
    with pytest.raises(ValueError):
        model.set_params(components=4)


def test_clone():
    base = pytest.importorskip("sklearn.base")
    model = small(null_weights=np.ones(34), init=np.eye(34, 4) + 0.1)
    twin = base.clone(model.fit(affinities()))
    assert not hasattr(twin, "embedding_")
    assert_same(twin.fit(affinities()), model)


# Transforming the fitted rows places them anew among keys that stay; and a list is no
# operator.
CHECKS_OF_OTHER_KINDS = {
    "check_transformer_general",
    "check_transformer_data_not_an_array",
}


def name_of_check(check):
    return getattr(check, "func", check).__name__


def pytest_generate_tests(metafunc):
    if "sklearn_check" not in metafunc.fixturenames:
        return
    checks = []
    try:
        from sklearn.utils.estimator_checks import estimator_checks_generator
    except ImportError:
        pass
    else:
        with warnings.catch_warnings():
            # It notes that the estimator does not inherit from its own base class.
            warnings.simplefilter("ignore", UserWarning)
            for model in (
                EDRep(4, max_iter=3),
                EDRep(4, max_iter=3, symmetric=False),
            ):
                left_out = CHECKS_OF_OTHER_KINDS
                if model.symmetric:
                    # It passes one column of a matrix that is square.
                    left_out = left_out | {"check_n_features_in_after_fitting"}
                checks += [
                    (model, check)
                    for model, check in estimator_checks_generator(model, legacy=True)
                    if name_of_check(check) not in left_out
                ]
    names = [f"{e!r}-{name_of_check(check)}" for e, check in checks]
    metafunc.parametrize("sklearn_check", checks, ids=names)


@pytest.mark.filterwarnings("default")
def test_scikit_learn_check(sklearn_check):
    from unittest import SkipTest

    model, check = sklearn_check
    try:
        check(model)
    except SkipTest as reason:
        pytest.skip(str(reason))


# -------------------------------------------------------------------- corner cases


class Rewriting:
    """An operator that, with its transpose, writes every product to one memory."""

    def __init__(self, p, memory):
        self.p, self.shape, self.dtype, self.memory = p, p.shape, p.dtype, memory

    def __matmul__(self, x):
        return np.matmul(self.p, x, out=self.memory)

    @property
    def T(self):  # noqa: N802
        return Rewriting(self.p.T, self.memory)


@pytest.mark.parametrize("gradient", ["source", "symmetric", "full"])
def test_products_may_share_memory(gradient):
    p = affinities()
    found = small(gradient=gradient).fit(Rewriting(p, np.empty((34, 4))))
    expected = small(gradient=gradient).fit(p)
    np.testing.assert_array_equal(found.embedding_, expected.embedding_)


def test_complex_products_are_refused():
    class Turning:
        shape = (6, 6)
        T = None

        def __matmul__(self, x):
            return 1j * x

    with pytest.raises(TypeError, match="operator @ rows must be real"):
        small().fit(Turning())


def test_null_weights_beyond_the_type():
    p = affinities().astype(np.float32)
    weights = np.full(34, 1e38)
    with pytest.raises(ValueError, match="null_weights must have a sum within"):
        small(symmetric=False, null_weights=weights).fit(p)
    assert small(symmetric=False, null_weights=weights).fit(affinities()).n_iter_ == 6


def test_arrays_stored_one_by_one(tmp_path):
    joblib = pytest.importorskip("joblib")
    p = affinities()
    model = small().fit(p)
    joblib.dump(model, tmp_path / "model.joblib")
    loaded = joblib.load(tmp_path / "model.joblib")
    assert loaded.key_embedding_ is loaded.embedding_
    assert_same(loaded.partial_fit(p), model.partial_fit(p))


def test_saved_beside_other_parameters(tmp_path):
    p = affinities()
    start = np.random.default_rng(5).standard_normal((34, 4))
    model = small(init=start).fit(p).set_params(symmetric=False)
    model.save(tmp_path / "model.npz")
    loaded = EDRep.load(tmp_path / "model.npz")
    np.testing.assert_array_equal(loaded.init, start)
    assert_same(loaded, model)


def test_fractions_are_numbers(tmp_path):
    model = small(learning_rate=fractions.Fraction(1, 2)).fit(affinities())
    model.save(tmp_path / "model.npz")
    assert EDRep.load(tmp_path / "model.npz").learning_rate == 0.5


@pytest.mark.parametrize("d", [2, 3, 8])
def test_a_row_alone_stays(d):
    # Its gradient is along it whatever it is: what is left is rounding.
    for seed in range(20):
        model = EDRep(d, max_iter=3, random_state=seed)
        start = EDRep(d, max_iter=1, learning_rate=1e-9, random_state=seed)
        start = start.fit(np.ones((1, 1))).embedding_
        found = model.fit(np.ones((1, 1))).embedding_
        np.testing.assert_allclose(found, start, rtol=0, atol=1e-8)


def test_sparse_tensors_are_named():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"operator must be dense where it is of torch"):
        small().fit(torch.eye(4).to_sparse())
