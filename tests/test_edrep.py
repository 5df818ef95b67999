"""EDRep against its definition, finite differences of its loss, and known groups."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import subquad as sq
from _arrays import DEVICE, to_numpy
from _oracle import epsilon
from _oracle_edrep import Objective, Run, distance, step, transformed, unit
from subquad._kmeans import assign, train_centroids
from subquad._reference.embedding import embedding_gradient
from subquad.embedding import EDRep, random_walk

scipy_sparse = pytest.importorskip("scipy.sparse")
scipy_linalg = pytest.importorskip("scipy.sparse.linalg")

N, M, D, EPOCHS = 31, 22, 5, 10
# Products of sums of at most N products each, at most four within one another.
TERMS = 4 * (N + 8)
KINDS = [
    ("source", True),
    ("symmetric", True),
    ("full", True),
    ("source", False),
    ("full", False),
]


def generator(seed=0):
    return np.random.default_rng(seed)


def affinities(n=N, m=M, seed=0):
    """Rows that add up to 1, but for one that is empty."""
    rng = generator(seed)
    p = rng.random((n, m)) * (rng.random((n, m)) < 0.3)
    p[n // 2] = 0
    total = p.sum(axis=1, keepdims=True)
    return p / np.where(total > 0, total, 1)


def case(symmetric, seed=0, dtype=np.float64):
    """Affinities and a start: of the rows, and of the keys where they have one."""
    rng = generator(seed + 10)
    m = N if symmetric else M
    x = rng.standard_normal((N, D)).astype(dtype)
    y = None if symmetric else rng.standard_normal((m, D)).astype(dtype)
    return affinities(m=m, seed=seed).astype(dtype), x, y


def started(x, y=None, **options):
    """An estimator that starts from given rows."""
    options = {"max_iter": EPOCHS, **options}
    init = x if y is None else (x, y)
    d = np.shape(x)[1]
    return EDRep(d, init=init, symmetric=y is None, **options)


def assert_follows(found, run, terms=TERMS, most=1e-9):
    """Rows, keys and losses are those of a run, within what rounding may do to them.

    A loss is wrong by the sums it is made of, and by what it changes where rows are
    moved by `spread`: at most by its gradient, whose rows are no longer than 4.
    """
    dtype = to_numpy(found.embedding_).dtype
    spread = run.spread(terms, dtype)
    assert dtype == np.float32 or spread < most
    for rows, expected in ((found.embedding_, run.x), (found.key_embedding_, run.y)):
        rows = to_numpy(rows)
        assert rows.shape == expected.shape
        assert rows.dtype == dtype
        assert distance(rows, expected) <= spread
        assert_unit(rows)
    assert found.loss_.dtype == np.float64
    assert found.loss_.shape == (len(run.losses),)
    wrong = np.abs(found.loss_ - np.array(run.losses))
    assert np.max(wrong) <= 8 * spread + 4 * terms * epsilon(dtype)


def assert_unit(rows):
    rows = to_numpy(rows)
    lengths = np.linalg.norm(rows.astype(np.longdouble), axis=1)
    assert np.max(np.abs(lengths - 1)) <= 4 * epsilon(rows.dtype)


def block_model(n=300, groups=3, inside=0.15, between=0.01, seed=0):
    """Edges within groups, and few between them; every node has one."""
    rng = generator(seed)
    labels = np.sort(np.arange(n) % groups)
    chance = np.where(labels[:, None] == labels, inside, between)
    upper = np.triu(rng.random((n, n)) < chance, 1)
    upper[np.arange(n - 1), np.arange(1, n)] |= labels[:-1] == labels[1:]
    return scipy_sparse.csr_array((upper | upper.T).astype(float)), labels


def walk_matrix(adjacency, dtype=np.float64):
    adjacency = adjacency.toarray()
    return (adjacency / adjacency.sum(axis=1, keepdims=True)).astype(dtype)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_gradients_are_those_of_the_loss(k, symmetric):
    p, x, y = case(symmetric)
    p, x = p[:13], unit(x[:13])
    p = p[:, :13] if symmetric else p
    y = x if symmetric else unit(y)
    m = len(y)
    labels = generator(3).integers(0, k, m)
    p0 = generator(4).random(m)
    objective = Objective(p, symmetric=symmetric, null_weights=p0, labels=labels)
    if symmetric:
        slopes = (objective.differences(x),)
    else:
        slopes = objective.differences(x, y)

    def wide(*arrays):
        return tuple(np.asarray(a).astype(np.float64) for a in arrays)

    _, log_shares, means, covariances = zip(*objective.components(y), strict=True)
    shift = objective.f @ y
    if not symmetric:
        shift = shift + np.sum(x, axis=0) / len(x)
    components = wide(log_shares, np.stack(means) + shift, covariances)
    _, statistics = objective.of_statistics(x, y)
    shifts, slopes_of = zip(*[statistics[c] for c in sorted(statistics)], strict=True)
    own = (labels.astype(np.int64), *wide(shifts, slopes_of))
    vector = np.sum(x, axis=0)
    if symmetric:
        both = (objective.p + objective.p.T) @ x
        null = wide(objective.f, vector)
        # What every row gets is no part of the normaliser: it is told apart here.
        asked = [(x, both, wide(log_shares, means, covariances), own, null, shift)]
    else:
        null = wide(objective.f, vector + objective.p0 @ y)
        plain = wide(log_shares, means, covariances)
        asked = [
            (x, objective.p @ y, plain, None, None, shift),
            (y, objective.p.T @ x, None, own, null, 0),
        ]
    for (rows, pulled, terms, of_keys, of_null, rest), expected in zip(
        asked, slopes, strict=True
    ):
        gradient, attraction, log_z = embedding_gradient(
            *wide(rows), None, *wide(pulled), 1.0, terms, of_keys, of_null
        )
        error = np.max(np.abs(gradient + rest - expected))
        assert error <= 1e-7 * np.max(np.abs(expected))
        assert np.allclose(
            attraction, np.sum(rows * pulled, axis=1).astype(float), 1e-14, 1e-14
        )
        if terms is None:
            assert log_z is None
        else:
            np.testing.assert_allclose(
                log_z, objective.log_z(x, y).astype(float), 1e-14, 1e-14
            )
    # One component: a vector that every row gets is part of the mean.
    if k == 1:
        pulled = objective.p @ y
        gradient, _, _ = embedding_gradient(
            *wide(x), None, *wide(pulled), 1.0, components, None, None
        )
        expected = objective.of_rows(x, y)
        assert np.max(np.abs(gradient - expected)) <= TERMS * epsilon(np.float64)


@pytest.mark.parametrize(("gradient", "symmetric"), KINDS)
def test_an_epoch_goes_down_the_gradient(gradient, symmetric):
    """A full step takes a row to where its gradient points away from."""
    p, x, y = case(symmetric)
    found = started(x, y, gradient=gradient, learning_rate=1.0, max_iter=1).fit(p)
    x = unit(x)
    y = x if symmetric else unit(y)
    objective = Objective(p, symmetric=symmetric)
    if gradient == "full":
        expected = objective.differences(x, None if symmetric else y)
        expected = (expected,) if symmetric else expected
    else:
        expected = objective.gradients(x, y, gradient)
    sides = zip(
        (x, y), (found.embedding_, found.key_embedding_), expected, strict=False
    )
    for before, after, slope in sides:
        if slope is not None:
            turned, length = step(before, slope, 1.0)
            apart = np.linalg.norm((after - turned).astype(float), axis=1)
            # What differences are wrong by, over the length of the tangent part.
            assert np.all(apart * length[:, 0] <= 1e-7 * np.max(np.abs(slope)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("gradient", "symmetric"), KINDS)
def test_one_epoch_is_as_exact_as_its_type(gradient, symmetric, dtype):
    for seed, eta in ((0, 0.3), (1, 0.9)):
        p, x, y = case(symmetric, seed, dtype)
        p0 = (0.1 + generator(seed).random(p.shape[1])).astype(dtype)
        options = {"gradient": gradient, "learning_rate": eta, "max_iter": 1}
        found = started(x, y, null_weights=p0, **options).fit(p)
        run = Run(p, x, y, null_weights=p0, **options)
        bounds = run.errors(0, *run.states[0], TERMS, dtype)
        for rows, expected, bound in zip(
            (found.embedding_, found.key_embedding_),
            (run.x, run.y),
            bounds,
            strict=True,
        ):
            assert rows.dtype == dtype
            if bound is not None:
                apart = np.linalg.norm((rows - expected).astype(float), axis=1)
                assert np.all(apart <= bound)


# ---------------------------------------------------------------- trajectories


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("gradient", "symmetric"), KINDS)
def test_runs_and_losses_are_the_definition_s(gradient, symmetric, dtype, weighted):
    """All epochs; rows and keys of an asymmetric one start from the same state."""
    p, x, y = case(symmetric, dtype=dtype)
    p0 = generator(5).random(p.shape[1]).astype(dtype) if weighted else None
    if weighted:
        p0[3] = 0
    found = started(x, y, gradient=gradient, null_weights=p0).fit(
        scipy_sparse.csr_array(p)
    )
    run = Run(p, x, y, gradient=gradient, null_weights=p0, max_iter=EPOCHS)
    assert_follows(found, run)
    assert found.embedding_.dtype == dtype
    assert found.n_iter_ == EPOCHS
    assert found.n_features_in_ == p.shape[1]
    assert (found.key_embedding_ is found.embedding_) == symmetric
    assert found.labels_.dtype == np.int64
    assert found.labels_.shape == (p.shape[1],)
    assert not np.any(found.labels_)


@pytest.mark.parametrize(("gradient", "symmetric"), KINDS)
def test_square_and_asymmetric_or_narrow(gradient, symmetric):
    """As many keys as rows, which are others all the same; d = 2."""
    rng = generator(1)
    p = affinities(12, 12, seed=3)
    x = rng.standard_normal((12, 2))
    y = None if symmetric else rng.standard_normal((12, 2))
    found = started(x, y, gradient=gradient, max_iter=4).fit(p)
    assert_follows(found, Run(p, x, y, gradient=gradient, max_iter=4))


@pytest.mark.parametrize(("gradient", "symmetric"), KINDS)
def test_runs_with_clusters_are_the_definition_s(gradient, symmetric):
    """One cluster for half of the epochs, then three.

    Groups of keys are so far apart that k-means finds the same in all epochs. Shares of
    the components, wrong by twice what scores are, and sums over a third of the rows,
    multiply the bound: by less than 16.
    """
    rng = generator(2)
    groups = np.arange(N) % 3
    x = 4 * np.eye(3, D)[groups] + 0.3 * rng.standard_normal((N, D))
    p = (groups[:, None] == groups) + 0.05 * rng.random((N, N))
    p /= p.sum(axis=1, keepdims=True)
    y = None if symmetric else x + 0.2 * rng.standard_normal((N, D))
    options = {"gradient": gradient, "learning_rate": 0.1, "max_iter": 6}
    found = started(x, y, n_clusters=3, random_state=0, **options).fit(p)
    run = Run(p, x, y, labels=groups, labels_from=3, **options)
    pairs = set(zip(found.labels_.tolist(), groups.tolist(), strict=True))
    assert len(pairs) == 3
    assert_follows(found, run, 16 * TERMS)


# ---------------------------------------------------------------- operators


class Lazy:
    """An operator that has what is asked for and nothing else."""

    def __init__(self, p):
        self.shape, self._p = p.shape, p

    def __matmul__(self, x):
        return self._p @ x

    @property
    def T(self):  # noqa: N802
        return Lazy(self._p.T)


def chains(kind):
    """A chain, and the same multiplied out."""
    if kind == "rectangular":
        parts = [affinities(9, M, 1), affinities(17, 9, 2), affinities(N, 17, 3)]
    elif kind == "equal":
        parts = [affinities(N, N, 1)] * 3
    else:
        parts = [affinities(N, N, seed) for seed in range(3)]
    mean = kind in ("equal", "different")
    kept = {id(part): scipy_sparse.csr_array(part) for part in parts}
    chain = sq.OperatorChain(
        [kept[id(part)] for part in parts], mean_of_partial_products=mean
    )
    products = [parts[0]]
    for part in parts[1:]:
        products.append(part @ products[-1])
    return chain, sum(products) / len(products) if mean else products[-1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["product", "rectangular", "equal", "different"])
def test_chains_are_their_explicit_matrix(kind, transposed):
    chain, p = chains(kind)
    if transposed:
        chain, p = chain.T, p.T
    n, m = p.shape
    rng = generator(4)
    x, y = rng.standard_normal((n, D)), rng.standard_normal((m, D))
    settings = [("full", False)]
    if n == m:
        settings += [("source", True), ("full", True)]
    for gradient, symmetric in settings:
        start = (x,) if symmetric else (x, y)
        options = {"gradient": gradient, "max_iter": 5}
        found = started(*start, **options).fit(chain)
        # Four sums within one another for each of three matrices.
        assert_follows(found, Run(p, *start, **options), 3 * TERMS)


@pytest.mark.parametrize("symmetric", [True, False])
def test_any_form_of_an_operator(symmetric):
    p, x, y = case(symmetric)
    run = Run(p, x, y, gradient="full", max_iter=EPOCHS)
    coordinates = scipy_sparse.coo_array(p)
    coordinates.coords = tuple(index.astype(np.int64) for index in coordinates.coords)
    for operator in (
        p,
        np.asfortranarray(p),
        scipy_sparse.csc_array(p),
        scipy_sparse.csr_matrix(p),
        coordinates,
        sq.OperatorChain(scipy_sparse.csr_array(p)),
        Lazy(p),
        scipy_linalg.aslinearoperator(p),
    ):
        found = started(x, y, gradient="full").fit(operator)
        assert_follows(found, run)


def test_the_type_is_the_operator_s():
    p, x, _ = case(symmetric=True)
    for given, expected in (
        (np.float16, np.float32),
        (np.float32, np.float32),
        (np.int64, np.float64),
        (np.float64, np.float64),
    ):
        operator = (4 * p).astype(given)
        found = started(x, max_iter=2).fit(operator)
        assert found.embedding_.dtype == expected
        assert_follows(found, Run(operator, x, max_iter=2))
    found = EDRep(3, max_iter=2).fit(scipy_sparse.csr_array(p, dtype=np.float32))
    assert found.embedding_.dtype == np.float32


@pytest.mark.skip_xp_backend("dask", reason="an error, tested below")
@pytest.mark.parametrize("symmetric", [True, False])
def test_on_every_library(xp, symmetric):
    p, x, y = case(symmetric)
    start = [xp.asarray(a) for a in (x, y) if a is not None]
    run = Run(p, x, y, gradient="full", max_iter=EPOCHS)
    operators = [xp.asarray(p)]
    if DEVICE in ("", "cpu"):
        operators.append(scipy_sparse.csr_array(p))
    for operator in operators:
        found = started(*start, gradient="full").fit(operator)
        assert isinstance(found.embedding_, xp.array_type())
        assert isinstance(found.key_embedding_, xp.array_type())
        assert isinstance(found.loss_, np.ndarray)
        assert_follows(found, run)
    # The library of a dense operator, and the same random start in all of them.
    found = EDRep(D, max_iter=3, symmetric=symmetric, random_state=0)
    rows = found.fit_transform(operators[0])
    assert isinstance(rows, xp.array_type())
    rng = generator(0)
    drawn = rng.standard_normal((N, D))
    keys = None if symmetric else rng.standard_normal((M, D))
    assert_follows(found, Run(p, drawn, keys, max_iter=3))


# ---------------------------------------------------------------- clusters


@pytest.mark.parametrize(("gradient", "symmetric"), KINDS)
def test_clusters_improve_the_normaliser(gradient, symmetric):
    adjacency, _ = block_model(90)
    p = walk_matrix(adjacency)
    options = {"gradient": gradient, "symmetric": symmetric, "random_state": 0}
    found = EDRep(6, n_clusters=3, max_iter=12, **options).fit(p)
    assert found.labels_.dtype == np.int64
    assert set(np.unique(found.labels_)) <= {0, 1, 2}
    assert np.all(np.isfinite(found.loss_))
    assert found.loss_[-1] <= found.loss_[0]
    assert_unit(found.embedding_)
    assert_unit(found.key_embedding_)
    x, y = (
        np.asarray(a, np.longdouble) for a in (found.embedding_, found.key_embedding_)
    )
    errors = []
    for labels in (found.labels_, None):
        objective = Objective(p, labels=labels)
        errors.append(
            np.mean(np.abs(objective.log_z(x, y) - objective.exact_log_z(x, y)))
        )
    assert errors[0] <= errors[1]
    # The last loss is that of what the estimator gives.
    loss = Objective(p, symmetric=symmetric, labels=found.labels_).loss(x, y) / len(x)
    assert abs(found.loss_[-1] - loss) <= 4 * (90 + 8) * epsilon(np.float64)


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_clusters_than_distinct_rows(symmetric):
    """Rows of two kinds stay of two kinds; what has no keys has no weight."""
    kind = np.arange(12) % 2
    p = (kind[:, None] == kind) / 6
    x = np.eye(2, 3)[kind] + 0.1
    start = (x,) if symmetric else (x, x[::-1])
    for clusters in (5, 12):
        found = started(*start, n_clusters=clusters, gradient="full", random_state=0)
        found.fit(p)
        assert np.all(np.isfinite(found.embedding_))
        assert np.all(np.isfinite(found.loss_))
        assert_unit(found.embedding_)
        assert np.all((found.labels_ >= 0) & (found.labels_ < clusters))


def test_a_cluster_for_every_row_is_exact():
    p, x, _ = case(symmetric=True)
    found = started(x, n_clusters=N, max_iter=4, random_state=0).fit(p)
    rows = np.asarray(found.embedding_, np.longdouble)
    objective = Objective(p, labels=found.labels_)
    expected = objective.loss(rows, rows) / N
    assert abs(found.loss_[-1] - expected) <= TERMS * epsilon(np.float64)


# ---------------------------------------------------------------- stopping, going on


def stops_after(losses, tol, first=5):
    """How many epochs are done where the last five must have gained `tol`."""
    for t in range(max(5, first), len(losses)):
        if not np.min(losses[t - 4 : t + 1]) <= np.min(losses[: t - 4]) - tol:
            return t
    return len(losses) - 1


@pytest.mark.parametrize("tol", [0.01, 0.1, 1e3])
def test_tol_stops_early(tol):
    adjacency, _ = block_model(90)
    p = walk_matrix(adjacency)
    options = {"max_iter": 60, "random_state": 0}
    whole = EDRep(4, **options).fit(p)
    assert whole.n_iter_ == 60
    found = EDRep(4, tol=tol, **options).fit(p)
    assert found.loss_.shape == (found.n_iter_ + 1,)
    assert found.n_iter_ == stops_after(whole.loss_, tol) < 60
    np.testing.assert_array_equal(found.loss_, whole.loss_[: found.n_iter_ + 1])
    # Not before clusters had their turn.
    found = EDRep(4, tol=1e3, n_clusters=2, **options).fit(p)
    assert 30 <= found.n_iter_ < 60


@pytest.mark.parametrize("clusters", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_partial_fit_goes_on(symmetric, clusters):
    p, x, y = case(symmetric)
    options = {"gradient": "full", "n_clusters": clusters, "random_state": 3}
    found = started(x, y, **options)
    assert found.partial_fit(p) is found
    first = started(x, y, **options).fit(p)
    np.testing.assert_array_equal(found.embedding_, first.embedding_)
    np.testing.assert_array_equal(found.loss_, first.loss_)
    found.partial_fit(p)
    assert found.n_iter_ == 2 * EPOCHS
    assert found.loss_.shape == (2 * EPOCHS + 1,)
    np.testing.assert_array_equal(found.loss_[: EPOCHS + 1], first.loss_)
    assert_unit(found.embedding_)
    if clusters > 1:
        assert np.all(np.isfinite(found.loss_))
        return
    keys = None if symmetric else first.key_embedding_
    run = Run(p, first.embedding_, keys, gradient="full", max_iter=EPOCHS)
    spread = run.spread(TERMS, np.float64)
    for rows, expected in ((found.embedding_, run.x), (found.key_embedding_, run.y)):
        assert np.max(np.abs(rows - expected)) <= spread
    assert np.max(np.abs(found.loss_[EPOCHS:] - np.array(run.losses))) <= 8 * spread + (
        4 * TERMS * epsilon(np.float64)
    )
    # fit begins anew.
    np.testing.assert_array_equal(found.fit(p).loss_, first.loss_)


# ---------------------------------------------------------------- new rows


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_transform_is_the_definition_s(dtype):
    p, x, _ = case(symmetric=True, dtype=dtype)
    p0 = (0.1 + generator(2).random(N)).astype(dtype)
    found = started(x, null_weights=p0, max_iter=4).fit(p)
    new = affinities(7, N, 8).astype(dtype)
    options = {"learning_rate": 0.8, "max_iter": 4, "null_weights": p0}
    expected, spread = transformed(new, found.embedding_, TERMS, dtype, **options)
    assert dtype == np.float32 or spread < 1e-9
    dense = found.transform(new)
    assert dense.dtype == dtype
    assert distance(dense, expected) <= spread
    sparse = found.transform(scipy_sparse.csr_array(new))
    assert distance(sparse, expected) <= spread
    assert_unit(dense)
    # A row does not depend on what it comes with.
    alone = found.transform(scipy_sparse.csr_array(new[2:3]))
    np.testing.assert_array_equal(alone, sparse[2:3])
    assert found.transform(new[:0]).shape == (0, D)


@pytest.mark.parametrize(("gradient", "symmetric"), KINDS)
@pytest.mark.parametrize("clusters", [1, 3])
def test_transform_takes_known_rows_to_where_they_are(gradient, symmetric, clusters):
    adjacency, _ = block_model(90, inside=0.3)
    p = walk_matrix(adjacency)
    found = EDRep(
        6,
        n_clusters=clusters,
        gradient=gradient,
        symmetric=symmetric,
        random_state=0,
    ).fit(p)
    rows = found.transform(p)
    assert_unit(rows)
    assert np.min(np.sum(rows * found.embedding_, axis=1)) > 0.9
    sparse = found.transform(scipy_sparse.csr_array(p))
    assert np.min(np.sum(rows * sparse, axis=1)) > 1 - 1e-12


def test_transform_of_a_row_that_nothing_pulls():
    """It starts on the first axis where keys cancel out, and stays if that is best."""
    found = started(np.eye(2) + 0.1, max_iter=3).fit(np.eye(2))
    found.key_embedding_ = np.array([[1.0, 0.0], [-1.0, 0.0]])
    rows = found.transform(np.zeros((3, 2)))
    np.testing.assert_array_equal(rows, np.eye(1, 2) + np.zeros((3, 1)))


# ---------------------------------------------------------------- reproducible


def test_the_same_for_every_number_of_threads():
    """Bit by bit, with rows enough for each thread."""
    adjacency, _ = block_model(1500, 5, 0.02, 0.001)
    walk = random_walk(adjacency, length=2, dtype=np.float32)
    for options in (
        {"n_clusters": 3},
        {"gradient": "full"},
        {"symmetric": False, "gradient": "full"},
    ):
        found = []
        for threads in (1, 2, 1):
            with sq.num_threads(threads):
                model = EDRep(8, max_iter=4, random_state=5, **options).fit(walk)
            found.append(model)
            assert model.embedding_.dtype == np.float32
        for other in found[1:]:
            np.testing.assert_array_equal(other.embedding_, found[0].embedding_)
            np.testing.assert_array_equal(other.key_embedding_, found[0].key_embedding_)
            np.testing.assert_array_equal(other.loss_, found[0].loss_)
            np.testing.assert_array_equal(other.labels_, found[0].labels_)


def test_random_states():
    p, _, _ = case(symmetric=False)

    def rows(state):
        return EDRep(3, symmetric=False, max_iter=2, random_state=state).fit_transform(
            p
        )

    np.testing.assert_array_equal(rows(1), rows(1))
    assert np.max(np.abs(rows(1) - rows(2))) > 0.1
    rng = np.random.default_rng(1)
    np.testing.assert_array_equal(rows(np.random.default_rng(1)), rows(rng))
    assert np.max(np.abs(rows(rng) - rows(rng))) > 0.1
    assert np.max(np.abs(rows(None) - rows(None))) > 0.1


def test_arguments_are_left_alone():
    p, x, y = case(symmetric=False)
    p0 = np.ones(M)
    kept = [a.copy() for a in (p, x, y, p0)]
    for a in (p, x, y, p0):
        a.flags.writeable = False
    found = started(x, y, gradient="full", n_clusters=2, null_weights=p0).fit(p)
    found.partial_fit(p)
    found.transform(p)
    for a, b in zip((p, x, y, p0), kept, strict=True):
        np.testing.assert_array_equal(a, b)
    assert found.embedding_ is not x


def test_strides():
    p, x, _ = case(symmetric=True)
    run = Run(p, x, max_iter=3)
    for given in (
        np.asfortranarray(x),
        np.repeat(x, 2, axis=1)[::-1, ::2][::-1],
        x[:, ::-1].copy()[:, ::-1],
    ):
        assert_follows(started(given, max_iter=3).fit(p), run)
    for given in (p[::-1].copy()[::-1], p[:, ::-1].copy()[:, ::-1]):
        assert_follows(started(x, max_iter=3).fit(given), run)


def test_files(tmp_path):
    p, x, y = case(symmetric=False)
    found = started(
        x, y, n_clusters=2, random_state=0, null_weights=np.arange(1.0, M + 1)
    )
    found.fit(p)
    path = tmp_path / "rows.npz"
    found.save(path)
    loaded = EDRep.load(path)
    for name in ("embedding_", "key_embedding_", "labels_", "loss_"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(found, name))
    assert loaded.n_iter_ == found.n_iter_
    assert loaded.n_features_in_ == M
    np.testing.assert_array_equal(loaded.transform(p), found.transform(p))
    found.partial_fit(p)
    loaded.partial_fit(p)
    np.testing.assert_array_equal(loaded.loss_, found.loss_)


def test_conventions_of_estimators():
    model = EDRep(7, gradient="full", tol=0.1)
    assert repr(model) == "EDRep(n_components=7, gradient='full', tol=0.1)"
    assert model.get_params() == {
        "n_components": 7,
        "n_clusters": 1,
        "max_iter": 30,
        "learning_rate": 0.8,
        "symmetric": True,
        "gradient": "full",
        "null_weights": None,
        "tol": 0.1,
        "init": "random",
        "random_state": None,
        "progress": False,
    }
    sklearn = pytest.importorskip("sklearn")
    assert sklearn.clone(model).get_params() == model.get_params()
    assert EDRep().n_components == 128
    assert EDRep(3, max_iter=1).fit(np.eye(4), None).embedding_.shape == (4, 3)


# ---------------------------------------------------------------- edges


def test_nodes_without_affinities_are_pushed_alone():
    """A row of zeros, a column of zeros and an operator of nothing but zeros."""
    p, x, _ = case(symmetric=True)
    p[:, 4] = 0
    p[4] = 0
    for operator in (p, np.zeros_like(p)):
        found = started(x, gradient="full").fit(scipy_sparse.csr_array(operator))
        assert_follows(found, Run(operator, x, gradient="full", max_iter=EPOCHS))


@pytest.mark.parametrize(("gradient", "symmetric"), KINDS)
def test_one_row(gradient, symmetric):
    found = EDRep(3, gradient=gradient, symmetric=symmetric, max_iter=3)
    found.fit(np.ones((1, 1)))
    assert_unit(found.embedding_)
    assert np.all(np.isfinite(found.loss_))


def test_one_dimension():
    """The sphere has two points there, and no way between them."""
    p, x, _ = case(symmetric=True)
    found = started(x[:, :1], max_iter=3, gradient="full").fit(p)
    np.testing.assert_array_equal(found.embedding_, np.sign(x[:, :1]))


def test_a_row_that_is_where_it_is_pulled_to_stays():
    """No part of the gradient is left in the tangent plane."""
    p = np.ones((4, 4)) / 4
    x = np.tile([[0.6, 0.8, 0.0]], (4, 1))
    found = started(x, max_iter=3).fit(p)
    assert_unit(found.embedding_)
    np.testing.assert_allclose(np.abs(found.embedding_ @ x[0]), 1, rtol=1e-12)


# ---------------------------------------------------------------- errors


P = np.eye(4)
X = np.ones((4, 3)) + np.eye(4, 3)


def wrong(value, place, shape=(4, 3)):
    found = np.ones(shape)
    found[place] = value
    return found


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_components": 0}, ValueError, "n_components"),
        ({"n_components": 2.5}, ValueError, "n_components.*2.5"),
        ({"n_clusters": 0}, ValueError, "n_clusters"),
        ({"n_clusters": 5}, ValueError, "n_clusters.*5"),
        ({"n_clusters": True}, ValueError, "n_clusters.*True"),
        ({"max_iter": 0}, ValueError, "max_iter.*0"),
        ({"max_iter": 1.0}, ValueError, "max_iter.*1.0"),
        ({"learning_rate": 0}, ValueError, "learning_rate.*0"),
        ({"learning_rate": 1.5}, ValueError, "learning_rate.*1.5"),
        ({"learning_rate": -0.1}, ValueError, "learning_rate.*0.1"),
        ({"learning_rate": np.nan}, ValueError, "learning_rate.*nan"),
        ({"learning_rate": "fast"}, ValueError, "learning_rate.*fast"),
        ({"symmetric": 1}, TypeError, "symmetric"),
        ({"gradient": "steep"}, ValueError, "gradient.*source.*steep"),
        ({"gradient": "symmetric", "symmetric": False}, ValueError, "gradient"),
        ({"null_weights": np.ones(3)}, ValueError, "null_weights.*4.*3"),
        ({"null_weights": np.ones((4, 1))}, ValueError, "null_weights"),
        ({"null_weights": np.zeros(4)}, ValueError, "null_weights"),
        ({"null_weights": np.array([1, -1, 1, 1.0])}, ValueError, "null_weights"),
        ({"null_weights": np.array([1, np.nan, 1, 1])}, ValueError, "null_weights"),
        ({"null_weights": np.array([1, np.inf, 1, 1])}, ValueError, "null_weights"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"tol": np.nan}, ValueError, "tol"),
        ({"tol": "small"}, ValueError, "tol.*small"),
        ({"init": "zeros"}, ValueError, "init.*random.*zeros"),
        ({"init": np.ones((3, 3))}, ValueError, r"init.*\(4, 3\).*\(3, 3\)"),
        ({"init": np.ones((4, 2))}, ValueError, r"init.*\(4, 3\).*\(4, 2\)"),
        ({"init": np.ones(4)}, ValueError, "init"),
        ({"init": np.eye(4, 3)}, ValueError, "init.*row 3"),
        ({"init": wrong(np.nan, (2, 1))}, ValueError, "init"),
        ({"init": wrong(np.inf, (2, 1))}, ValueError, "init"),
        ({"init": (X, X)}, (TypeError, ValueError), "init"),
        ({"init": (X, X, X), "symmetric": False}, (TypeError, ValueError), "init"),
        ({"init": X, "symmetric": False}, (TypeError, ValueError), "init"),
        ({"init": (X, np.eye(4, 3)), "symmetric": False}, ValueError, "init.*row 3"),
        ({"init": (X, X[:3]), "symmetric": False}, ValueError, "init"),
        ({"init": 3}, ValueError, "init"),
        ({"random_state": "seed"}, ValueError, "random_state.*seed"),
        ({"progress": "yes"}, TypeError, "progress"),
    ],
)
def test_wrong_parameters(options, error, message):
    options = {"n_components": 3, "max_iter": 2, **options}
    model = EDRep(**options)
    with pytest.raises(error, match=message):
        model.fit(P)
    assert not hasattr(model, "embedding_")


@pytest.mark.parametrize(
    ("operator", "error", "message"),
    [
        ([scipy_sparse.csr_array(P)], TypeError, "OperatorChain"),
        ((scipy_sparse.csr_array(P),) * 2, TypeError, "OperatorChain"),
        (P.tolist(), TypeError, "OperatorChain"),
        (None, TypeError, "operator"),
        ("graph", TypeError, "operator"),
        (np.ones(4), ValueError, "operator"),
        (np.ones((2, 4, 4)), ValueError, "operator"),
        (np.ones((4, 3)), ValueError, r"operator.*symmetric.*\(4, 3\)|square"),
        (scipy_sparse.csr_array(np.ones((4, 3))), ValueError, r"\(4, 3\)"),
        (wrong(np.nan, (1, 2), (4, 4)), ValueError, "operator"),
        (scipy_sparse.csr_array(wrong(np.nan, (1, 2), (4, 4))), ValueError, "operator"),
        (wrong(np.inf, (1, 2), (4, 4)), ValueError, "operator"),
        (Lazy(wrong(np.nan, (1, 2), (4, 4))), ValueError, "operator"),
        (np.eye(4, dtype=complex), ValueError, "operator.*complex"),
        (np.zeros((0, 0)), ValueError, r"0 .* minimum of 1"),
        (scipy_sparse.csr_array((0, 0)), ValueError, r"0 .* minimum of 1"),
    ],
)
def test_wrong_operators(operator, error, message):
    with pytest.raises(error, match=message):
        EDRep(3, max_iter=2).fit(operator)


def test_graphs_are_not_operators():
    networkx = pytest.importorskip("networkx")
    with pytest.raises(TypeError, match="random_walk"):
        EDRep(3).fit(networkx.path_graph(4))


def test_dask_is_refused():
    dask = pytest.importorskip("dask.array")
    with pytest.raises(TypeError, match=r"(?i)dask"):
        EDRep(3).fit(dask.from_array(P))
    with pytest.raises(TypeError, match=r"(?i)dask"):
        started(dask.from_array(X)).fit(P)


def test_libraries_are_not_mixed():
    torch = pytest.importorskip("torch")
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(TypeError):
        started(strict.asarray(X), max_iter=2).fit(torch.eye(4))
    with pytest.raises(TypeError):
        started(strict.asarray(X), torch.asarray(X), max_iter=2).fit(P)


def test_wrong_rows_to_transform():
    model = started(X, max_iter=2)
    with pytest.raises((ValueError, AttributeError), match="fit"):
        model.transform(P)
    model.fit(P)
    for new in (np.ones((2, 3)), scipy_sparse.csr_array(np.ones((2, 5))), np.ones(4)):
        with pytest.raises(ValueError, match="affinities"):
            model.transform(new)
    with pytest.raises(TypeError, match="affinities"):
        model.transform("rows")
    with pytest.raises(ValueError, match="affinities"):
        model.transform(wrong(np.nan, (1, 2), (2, 4)))
    with pytest.raises(ValueError, match=r"operator.*\(4, 4\)|shape|rows"):
        model.partial_fit(np.eye(5))


def test_progress_is_shown(capsys, monkeypatch):
    started(X, max_iter=2).fit(P)
    assert capsys.readouterr() == ("", "")
    pytest.importorskip("rich")
    started(X, max_iter=2, progress=True).fit(P)
    shown = capsys.readouterr()
    assert "loss" in shown.out + shown.err
    for name in [*filter(lambda n: n.split(".")[0] == "rich", sys.modules), "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install.*rich|subquad\[cli\]"):
        started(X, max_iter=2, progress=True).fit(P)


# ---------------------------------------------------------------- quality


def groups_of(rows, k):
    rng = np.random.default_rng(0)
    centroids = train_centroids(rows, k, metric="spherical", generator=rng)
    return assign(rows, centroids, metric="spherical")


def agreement(found, labels):
    metrics = pytest.importorskip("sklearn.metrics")
    return metrics.normalized_mutual_info_score(labels, found)


@pytest.mark.parametrize(("gradient", "symmetric"), KINDS)
def test_finds_the_groups_of_a_block_model(gradient, symmetric):
    adjacency, labels = block_model()
    walk = random_walk(adjacency, length=3)
    found = EDRep(8, gradient=gradient, symmetric=symmetric, random_state=0).fit(walk)
    assert agreement(groups_of(found.embedding_, 3), labels) == 1
    assert agreement(groups_of(found.key_embedding_, 3), labels) == 1
    assert found.loss_[-1] < found.loss_[0] - 0.1


@pytest.mark.parametrize("seed", range(3))
def test_finds_the_clubs_of_karate(seed):
    networkx = pytest.importorskip("networkx")
    graph = networkx.karate_club_graph()
    clubs = [graph.nodes[node]["club"] for node in graph]
    found = EDRep(8, random_state=seed).fit_transform(random_walk(graph, length=3))
    assert agreement(groups_of(found, 2), clubs) >= 0.8
