"""random_walk, cooccurrence and temporal_walk against dense matrices and loops."""

from __future__ import annotations

import collections
import math
import os
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest

from subquad import _affinities
from subquad._operator_chain import OperatorChain
from subquad.embedding import Vocabulary, cooccurrence, random_walk, temporal_walk

scipy_sparse = pytest.importorskip("scipy.sparse")

N = 17
FORMATS = ["csr", "csc", "coo", "lil", "dok", "bsr", "dia"]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def graph(directed=True, seed=0):
    """Weights below and above 1, loops, a node that no edge leaves, and one alone."""
    rng = generator(seed)
    dense = rng.exponential(size=(N, N)) * (rng.random((N, N)) < 0.25)
    dense[0, :] = dense[1, 1:4] = 0.0
    dense[1, 2], dense[4, 4] = 1e-3, 0.7
    if not directed:
        dense = dense + dense.T
    dense[3, :] = dense[:, 3] = 0.0
    return dense


def stochastic(dense):
    """Each row divided by its sum, by loops."""
    dense = dense.astype(np.float64)
    out = np.zeros_like(dense)
    for i in range(len(dense)):
        total = math.fsum(dense[i])
        for j in range(len(dense)):
            if dense[i, j] != 0:
                out[i, j] = dense[i, j] / total
    return out


def mean_of_partial_products(matrices):
    """(A₁ + A₂ A₁ + …) / L."""
    product = total = matrices[0]
    for matrix in matrices[1:]:
        product = matrix @ product
        total = total + product
    return total / len(matrices)


def mean_of_powers(dense, length):
    return mean_of_partial_products([stochastic(dense)] * length)


def as_matrix(chain):
    """The operator multiplied out, in its own type."""
    return chain @ np.eye(chain.shape[1], dtype=chain.dtype)


def check(chain, expected, dtype=np.float64):
    """Compare the operator with a dense one, entry by entry.

    No number is negative, so that errors stay relative ones. A step rounds once for
    each of n terms of a row's sum, for the quotient, and for the type it is stored in;
    its product once for each of n products and of n sums; the mean for its scale and
    its sum. The dense one does no more.
    """
    n, length = chain.shape[0], len(chain)
    bound = 2 * length * (3 * n + 4) * np.finfo(dtype).eps
    found = as_matrix(chain)
    assert chain.dtype == found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=bound, atol=0)


# -------- random_walk


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_walk_is_the_mean_of_powers(length, directed):
    dense = graph(directed)
    step = stochastic(dense)
    expected = sum(np.linalg.matrix_power(step, k) for k in range(1, length + 1))
    chain = random_walk(dense, length=length)
    check(chain, expected / length)
    assert isinstance(chain, OperatorChain)
    assert len(chain) == length
    assert len({id(matrix) for matrix in chain.matrices}) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_are_zero_or_add_up_to_one(dtype):
    dense = graph().astype(dtype)
    step = random_walk(scipy_sparse.csr_array(dense), length=1).matrices[0].toarray()
    # Every entry is rounded by half an eps, and so is their sum: that of the weights,
    # and the quotient, by eps of float64.
    bound = np.finfo(dtype).eps / 2 + 2 * N * np.finfo(np.float64).eps
    sums = [math.fsum(row) for row in step]
    for i in range(N):
        wanted = 1.0 if dense[i].any() else 0.0
        assert abs(sums[i] - wanted) <= (bound if wanted else 0.0)
    assert sums[0] == sums[3] == 0


@pytest.mark.parametrize("kind", ["array", "matrix"])
@pytest.mark.parametrize("form", FORMATS)
def test_formats(form, kind):
    dense = graph()
    matrix = getattr(scipy_sparse, f"{form}_{kind}")(dense)
    before = matrix.copy()
    check(random_walk(matrix, length=3), mean_of_powers(dense, 3))
    assert matrix.format == form
    np.testing.assert_array_equal(matrix.toarray(), before.toarray())


@pytest.mark.parametrize("form", ["csr", "coo", "dense"])
@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint8, np.int64])
def test_other_types_become_float64(dtype, form):
    dense = (generator().random((N, N)) < 0.8).astype(dtype)
    dense[2, :] = np.array(100).astype(dtype)
    expected = mean_of_powers(dense, 2)
    if form == "dense":
        check(random_walk(dense, length=2), expected)
        # scipy.sparse has no halves.
        check(random_walk(dense.astype(np.float16), length=2), expected)
    else:
        matrix = scipy_sparse.csr_array(dense).asformat(form)
        check(random_walk(matrix, length=2), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("own", [np.float32, np.float64, np.longdouble])
def test_type_of_the_operator(own, dtype):
    dense = graph().astype(own)
    plain = np.float32 if own is np.float32 else np.float64
    for matrix in (dense, scipy_sparse.csr_array(dense), scipy_sparse.coo_array(dense)):
        assert random_walk(matrix, length=1).dtype == plain
        chain = random_walk(matrix, length=2, dtype=dtype)
        check(chain, mean_of_powers(dense, 2), dtype)
    # Integers are no reason to be wide where narrow is asked for.
    ones = scipy_sparse.csr_array(np.ones((3, 3), np.int32))
    assert random_walk(ones, length=1, dtype="float32").matrices[0].dtype == np.float32


def test_a_dense_adjacency_in_any_memory():
    dense = graph()
    wide = np.zeros((2 * N, 3 * N))
    wide[::-2, ::3] = dense
    view = wide[::-2, ::3]
    view.flags.writeable = False
    with pytest.warns(PendingDeprecationWarning):
        old = np.asmatrix(dense)
    for array in (view, np.asfortranarray(dense), old, dense.astype(">f8")):
        found = as_matrix(random_walk(array, length=2))
        np.testing.assert_array_equal(found, as_matrix(random_walk(dense, length=2)))


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_sorted_rows_share_their_positions_alone(index):
    matrix = scipy_sparse.csr_array(graph())
    matrix.indices = matrix.indices.astype(index)
    matrix.indptr = matrix.indptr.astype(index)
    for array in (matrix.data, matrix.indices, matrix.indptr):
        array.flags.writeable = False
    before = matrix.copy()
    step = random_walk(matrix, length=2).matrices[0]
    if index == np.int32:
        assert np.shares_memory(step.indices, matrix.indices)
        assert np.shares_memory(step.indptr, matrix.indptr)
    assert not np.shares_memory(step.data, matrix.data)
    assert (matrix != before).nnz == 0


def test_unsorted_rows_are_not_sorted_and_not_shared():
    ordered = scipy_sparse.csr_array(graph())
    data, indices = ordered.data.copy(), ordered.indices.copy()
    for start, stop in zip(ordered.indptr[:-1], ordered.indptr[1:], strict=True):
        data[start:stop] = data[start:stop][::-1]
        indices[start:stop] = indices[start:stop][::-1]
    matrix = scipy_sparse.csr_array((data, indices, ordered.indptr), shape=(N, N))
    chain = random_walk(matrix, length=2)
    np.testing.assert_array_equal(chain.matrices[0].indices, indices)
    assert not matrix.has_sorted_indices
    # scipy sorts in place where it needs to; products must not notice.
    matrix.max(axis=1)
    matrix.sort_indices()
    check(chain, mean_of_powers(graph(), 2))


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8])
def test_parallel_edges_add_up(dtype, is_sorted):
    # 100 + 100 would wrap in eight bits; -1 + 3 is an edge of weight 2.
    columns = [1, 1, 2, 1, 1] if is_sorted else [1, 2, 1, 1, 1]
    values = [100, 100, 50, -1, 3] if is_sorted else [100, 50, 100, -1, 3]
    indptr = [0, 3, 5, 5]
    data = np.array(values, dtype)
    matrix = scipy_sparse.csr_array((data, columns, indptr), shape=(3, 3))
    triplets = scipy_sparse.coo_array((data, ([0, 0, 0, 1, 1], columns)), shape=(3, 3))
    for adjacency in (matrix, triplets):
        chain = random_walk(adjacency, length=1)
        np.testing.assert_array_equal(
            as_matrix(chain),
            np.array([[0, 0.8, 0.2], [0, 1, 0], [0, 0, 0]], chain.dtype),
        )
        assert chain.dtype == (dtype if dtype != np.int8 else np.float64)
    np.testing.assert_array_equal(matrix.data, data)
    np.testing.assert_array_equal(matrix.indices, columns)


def test_explicit_zeros():
    matrix = scipy_sparse.csr_array(
        (np.array([0.0, 2.0, 0.0, 0.0, -0.0]), [1, 2, 0, 2, 1], [0, 2, 4, 5]),
        shape=(3, 3),
    )
    chain = random_walk(matrix, length=1)
    np.testing.assert_array_equal(as_matrix(chain), [[0, 0, 1], [0, 0, 0], [0, 0, 0]])
    assert matrix.nnz == 5


def test_entries_behind_the_last_row_are_no_part_of_it():
    matrix = scipy_sparse.csr_array(np.array([[0.0, 3.0], [1.0, 0.0]]))
    matrix.data = np.append(matrix.data, [np.nan, -1.0])
    matrix.indices = np.append(matrix.indices, np.array([77, 78], np.int32))
    chain = random_walk(matrix, length=1)
    np.testing.assert_array_equal(as_matrix(chain), [[0, 1], [1, 0]])


@pytest.mark.parametrize("n", [0, 1])
def test_small_graphs(n):
    for adjacency in (np.zeros((n, n)), scipy_sparse.csr_array((n, n))):
        chain = random_walk(adjacency, length=3)
        assert chain.shape == (n, n)
        np.testing.assert_array_equal(chain @ np.ones((n, 2)), np.zeros((n, 2)))
    loop = random_walk(np.full((1, 1), 5e-324), length=3)
    np.testing.assert_allclose(as_matrix(loop), [[1.0]], rtol=1e-15)


def test_memory():
    n, links = 1 << 15, 128
    rng = generator()
    columns = np.arange(links, dtype=np.int32) * (n // links)
    columns = columns + rng.integers(0, n // links, (n, links), dtype=np.int32)
    matrix = scipy_sparse.csr_array(
        (np.ones(n * links, np.float32), columns.ravel(), np.arange(n + 1) * links),
        shape=(n, n),
    )
    assert matrix.has_canonical_format
    tracemalloc.start()
    try:
        chain = random_walk(matrix, length=3)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The entries stay, with what a node has. Before that: in float64, to be added up;
    # then entries and rows in 4 bytes, and a block's quotients, sums and rows.
    assert kept <= 4 * n * links + 100 * n
    assert peak <= 8 * n * links + 100 * n + 40 * _affinities._BLOCK
    np.testing.assert_array_equal(chain.matrices[0].data, np.float32(1 / links))


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("directed", [False, True])
def test_graphs_of_networkx(directed, multi):
    nx = pytest.importorskip("networkx")
    name = f"{'Multi' if multi else ''}{'Di' if directed else ''}Graph"
    graph = getattr(nx, name)()
    # Rows are in the order of the nodes, whatever they are called.
    graph.add_nodes_from(["d", "a", "c", "b", ("alone", 1)])
    graph.add_edge("a", "b", weight=0.25)
    graph.add_edge("d", "a", weight=2)
    graph.add_edge("b", "b", weight=np.float32(0.5))
    graph.add_edge("c", "a")
    graph.add_edge("b", "d", weight=True)
    dense = np.zeros((5, 5))
    edges = [(1, 3, 0.25), (0, 1, 2.0), (3, 3, 0.5), (2, 1, 1.0), (3, 0, 1.0)]
    if multi:
        graph.add_edge("a", "b", weight=3.0)
        edges.append((1, 3, 3.0))
    for i, j, weight in edges:
        dense[i, j] += weight
        if not directed and i != j:
            dense[j, i] += weight
    check(random_walk(graph, length=3), mean_of_powers(dense, 3))
    expected = nx.to_scipy_sparse_array(graph, weight="weight", dtype=np.float64)
    found = as_matrix(random_walk(graph, length=2))
    np.testing.assert_array_equal(found, as_matrix(random_walk(expected, length=2)))
    frozen = nx.subgraph_view(graph)
    np.testing.assert_array_equal(found, as_matrix(random_walk(frozen, length=2)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("directed", [False, True])
def test_graphs_of_igraph(directed, weighted):
    igraph = pytest.importorskip("igraph")
    edges = [(0, 1), (3, 0), (2, 2), (0, 1), (1, 3)]
    weights = [0.5, 2, 1.5, 0.25, None]
    graph = igraph.Graph(n=5, edges=edges, directed=directed)
    if weighted:
        graph.es["weight"] = weights
    dense = np.zeros((5, 5))
    for (i, j), weight in zip(edges, weights, strict=True):
        weight = weight if weighted and weight is not None else 1.0
        dense[i, j] += weight
        if not directed and i != j:
            dense[j, i] += weight
    check(random_walk(graph, length=3), mean_of_powers(dense, 3))
    assert random_walk(igraph.Graph(n=2), length=1).matrices[0].nnz == 0


def test_graphs_without_nodes():
    nx = pytest.importorskip("networkx")
    assert random_walk(nx.Graph(), length=2).shape == (0, 0)


@pytest.mark.parametrize("weight", ["1", None, 1j, [1.0]])
def test_weights_of_graphs_are_numbers(weight):
    nx = pytest.importorskip("networkx")
    graph = nx.path_graph(3)
    graph.edges[1, 2]["weight"] = weight
    with pytest.raises(TypeError) as raised:
        random_walk(graph, length=1)
    assert str(raised.value) == (
        f"adjacency must have real numbers as weights of its edges, got {weight!r}"
    )
    graph.edges[1, 2]["weight"] = -3
    with pytest.raises(ValueError, match="got -3.0 from node 1 to node 2"):
        random_walk(graph, length=1)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", ["csr", "coo", "dense"])
def test_weights_are_finite_and_not_negative(form, value):
    dense = graph()
    dense[5, 7] = value
    adjacency = (
        dense if form == "dense" else scipy_sparse.csr_array(dense).asformat(form)
    )
    message = (
        "adjacency must have weights that are finite and not negative, got "
        rf"{value} from node 5 to node 7"
    )
    with pytest.raises(ValueError) as raised:
        random_walk(adjacency, length=1)
    assert str(raised.value) == message


def test_sums_of_weights_are_finite():
    dense = np.array([[0.0, 1.0, 0.0], [1e308, 0.0, 1e308], [0.0, 0.0, 1e308]])
    message = "adjacency must have weights whose sum float64 holds, those of node 1 add"
    with pytest.raises(ValueError, match=message):
        random_walk(dense, length=1)
    # Halves of the largest numbers are no trouble, and those of float32 never are.
    dense[1] /= 4
    np.testing.assert_array_equal(
        as_matrix(random_walk(dense, length=1))[1], [0.5, 0, 0.5]
    )
    narrow = np.full((2, 2), np.finfo(np.float32).max)
    np.testing.assert_array_equal(as_matrix(random_walk(narrow, length=1)), 0.5)


@pytest.mark.parametrize(
    ("adjacency", "error", "message"),
    [
        (
            [[0, 1], [1, 0]],
            TypeError,
            "adjacency must be a sparse matrix of .* or a gr",
        ),
        (None, TypeError, "networkx or igraph, got builtins.NoneType"),
        (OperatorChain([scipy_sparse.eye_array(2)]), TypeError, "OperatorChain"),
        (np.ones((2, 3)), ValueError, r"must be square, with .* got shape \(2, 3\)"),
        (scipy_sparse.csr_array((3, 2)), ValueError, "must be square"),
        (np.ones(3), ValueError, r"must have shape \(n, n\), got 1 dimension"),
        (scipy_sparse.coo_array(np.ones(3)), ValueError, "got 1 dimension"),
        (np.ones((2, 2), complex), TypeError, "must hold real numbers, got complex128"),
        (np.full((2, 2), None), TypeError, "must hold real numbers, got object"),
        (scipy_sparse.eye_array(2, dtype="c8"), TypeError, "got complex64"),
    ],
)
def test_what_is_no_adjacency(adjacency, error, message):
    with pytest.raises(error, match=message):
        random_walk(adjacency, length=1)


@pytest.mark.parametrize("length", [0, -1, 1.0, True, "2", None])
def test_length_is_a_positive_integer(length):
    with pytest.raises(ValueError, match="length must be an integer >= 1, got"):
        random_walk(np.eye(2), length=length)
    assert len(random_walk(np.eye(2), length=np.int64(2))) == 2


def test_type_is_one_that_is_computed_in():
    message = "dtype must be float32, float64 or None, got float16"
    with pytest.raises(TypeError, match=message):
        random_walk(np.eye(2), length=1, dtype=np.float16)
    with pytest.raises(TypeError, match=message):
        cooccurrence(["a"], window=1, dtype=np.float16)
    with pytest.raises(TypeError, match=message):
        temporal_walk([(0, 1, 0)], dtype=np.float16)


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    nx = pytest.importorskip("networkx")
    for what, call in (
        ("a dense adjacency", lambda: random_walk(np.eye(2), length=1)),
        ("a graph", lambda: random_walk(nx.path_graph(2), length=1)),
        ("cooccurrence", lambda: cooccurrence(["a"], window=1)),
        ("temporal_walk", lambda: temporal_walk([(0, 1, 0)])),
    ):
        with pytest.raises(ModuleNotFoundError) as raised:
            call()
        assert str(raised.value) == f"{what} needs scipy: pip install scipy"


# -------- matrices of a device, without one


class DeviceRows:
    """As cupyx.scipy.sparse.csr_matrix, over arrays of the stand-in of CuPy."""

    format = "csr"

    def __init__(self, arrays, shape):
        self.data, self.indices, self.indptr = arrays
        assert {type(array).__module__ for array in arrays} == {"cupy"}
        self.shape = shape

    def on_host(self):
        arrays = (self.data._host, self.indices._host, self.indptr._host)
        return scipy_sparse.csr_matrix(tuple(map(np.copy, arrays)), shape=self.shape)

    dtype = property(lambda self: self.data.dtype)
    nnz = property(lambda self: int(self.indptr._host[-1]))
    has_canonical_format = property(lambda self: self.on_host().has_canonical_format)
    has_sorted_indices = property(lambda self: self.on_host().has_sorted_indices)

    def tocsr(self):
        return self

    def tocoo(self, copy=True):
        row = self.on_host().tocoo().row
        return types.SimpleNamespace(row=type(self.data)(row))

    def astype(self, dtype):
        arrays = (self.data.astype(dtype), self.indices.copy(), self.indptr.copy())
        return DeviceRows(arrays, self.shape)

    def sum_duplicates(self):
        summed = self.on_host()
        summed.sum_duplicates()
        arrays = (summed.data, summed.indices, summed.indptr)
        self.data, self.indices, self.indptr = map(type(self.data), arrays)


def walks_on_a_device():
    import _cuda_double as double

    double.installed_cupy()
    # The recorder of traffic sees single numbers; arrays must not come home at all.
    del double.Array.get
    dense = graph()
    ordered = scipy_sparse.csr_matrix(dense.astype(np.float32))
    unordered = scipy_sparse.csr_matrix(
        (
            ordered.data[::-1].copy(),
            ordered.indices[::-1].copy(),
            ordered.nnz - ordered.indptr[::-1],
        ),
        shape=(N, N),
    )
    doubled = scipy_sparse.csr_matrix(
        (
            np.repeat(ordered.data, 2),
            np.repeat(ordered.indices, 2),
            2 * ordered.indptr,
        ),
        shape=(N, N),
    )
    for matrix, weights in (
        (ordered, dense),
        (unordered, dense[::-1]),
        (doubled, dense),
    ):
        arrays = map(double.Array, (matrix.data, matrix.indices, matrix.indptr))
        adjacency = DeviceRows(tuple(arrays), matrix.shape)
        double.TRAFFIC.clear()
        chain = random_walk(adjacency, length=2)
        assert double.TRAFFIC.to_device == 0
        step = chain._matrices[0].rows
        assert isinstance(step, DeviceRows)
        assert step.dtype == np.float32
        shared = np.shares_memory(step.indices._host, adjacency.indices._host)
        assert shared == (matrix is ordered)
        # One rounding to float32 of the weights, one of the quotients.
        expected = stochastic(weights.astype(np.float32).astype(np.float64))
        np.testing.assert_allclose(
            step.on_host().toarray(), expected, rtol=np.finfo(np.float32).eps
        )


def graphs_are_not_imported():
    random_walk(np.eye(3), length=2)
    temporal_walk([(0, 1, 0.0)])
    assert not {"networkx", "igraph", "cupy"} & set(sys.modules)


def test_what_needs_a_process_of_its_own():
    functions = (graphs_are_not_imported, walks_on_a_device)
    calls = "; ".join(f"tests.{function.__name__}()" for function in functions)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "SUBQUAD_CUDA_LIBRARY": "/nowhere/libsubquad_cuda.so",
        "SUBQUAD_TEST_DEVICE": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", f"import test_affinities as tests; {calls}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# -------- cooccurrence


def text(n, n_words=9, seed=0):
    """Words, some much more frequent than others."""
    rng = generator(seed)
    return [f"w{int(n_words * rng.random() ** 2)}" for _ in range(n)]


def sentences_of(words, seed=0):
    """The same words in sentences, some of them empty."""
    rng = generator(seed)
    found, start = [], 0
    while start < len(words):
        size = int(rng.integers(0, 8))
        found.append(words[start : start + size])
        start += size
    return [[], *found, []]


def counted(sentences, window, symmetric, rows):
    """How often each word is at most `window` behind each, by loops."""
    counts = np.zeros((len(rows), len(rows)))
    for sentence in sentences:
        for t, word in enumerate(sentence):
            for distance in range(1, window + 1):
                if t + distance < len(sentence):
                    behind = sentence[t + distance]
                    counts[rows[word], rows[behind]] += 1
                    if symmetric:
                        counts[rows[behind], rows[word]] += 1
    return counts


def vocabulary_of(words, min_count=1):
    """Words in order of falling counts, those that came first in front."""
    counts = collections.Counter(words)
    chosen = sorted(
        (word for word in counts if counts[word] >= min_count),
        key=lambda word: (-counts[word], words.index(word)),
    )
    return chosen, [counts[word] for word in chosen]


def check_text(found, sentences, window, symmetric, min_count=1):
    """Compare an operator and its vocabulary with loops.

    Counts are whole numbers, so that each share is rounded once, here and there.
    """
    operator, vocabulary = found
    words = [word for sentence in sentences for word in sentence]
    chosen, counts = vocabulary_of(words, min_count)
    assert vocabulary.words == chosen
    assert vocabulary.counts.dtype == np.int64
    np.testing.assert_array_equal(vocabulary.counts, counts)
    assert vocabulary.index == {word: row for row, word in enumerate(chosen)}
    kept = [[w for w in sentence if w in vocabulary.index] for sentence in sentences]
    pairs = counted(kept, window, symmetric, vocabulary.index)
    assert len(operator) == 1
    assert operator.dtype == np.float64
    np.testing.assert_array_equal(operator.matrices[0].toarray(), stochastic(pairs))


@pytest.fixture(params=[None, 1, 7], ids=lambda size: f"blocks of {size}")
def blocks(request, monkeypatch):
    """Blocks of a few tokens, and of a few pairs more."""
    if request.param is not None:
        monkeypatch.setattr(_affinities, "_BLOCK", request.param)
        monkeypatch.setattr(_affinities, "_PAIRS", request.param + 4)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 40, 10**30])
def test_counts_at_every_distance(window, symmetric, blocks):
    words = text(61)
    loops = min(window, 60)
    found = cooccurrence(words, window=window, symmetric=symmetric)
    check_text(found, [words], loops, symmetric)
    parts = sentences_of(words)
    found = cooccurrence(parts, window=window, symmetric=symmetric)
    check_text(found, parts, loops, symmetric)


@pytest.mark.parametrize("min_count", [2, 4, 8])
def test_rare_words_go_first(min_count, blocks):
    words = text(73, n_words=30)
    found = cooccurrence(words, window=2, min_count=min_count)
    check_text(found, [words], 2, True, min_count)
    parts = sentences_of(words)
    found = cooccurrence(parts, window=3, min_count=min_count, symmetric=False)
    check_text(found, parts, 3, False, min_count)


def test_many_sizes_of_what_is_merged(monkeypatch):
    monkeypatch.setattr(_affinities, "_BLOCK", 16)
    monkeypatch.setattr(_affinities, "_PAIRS", 16)
    words = text(700, n_words=60)
    check_text(cooccurrence(words, window=3), [words], 3, True)


def test_an_iterator_is_read_once():
    words = text(50)
    parts = sentences_of(words)
    expected = cooccurrence(words, window=2)

    def same(found, wanted):
        difference = found[0].matrices[0] - wanted[0].matrices[0]
        return (
            abs(difference).sum() == 0
            and found[1].words == wanted[1].words
            and {type(word) for word in found[1].words} == {str}
        )

    once = iter(words)
    assert same(cooccurrence(once, window=2), expected)
    assert next(once, None) is None
    assert same(cooccurrence([words], window=2), expected)
    assert same(cooccurrence(np.array(words), window=2), expected)
    assert same(cooccurrence((word for word in words), window=2), expected)
    nested = ((word for word in part) for part in parts)
    assert same(cooccurrence(nested, window=2), cooccurrence(parts, window=2))
    tuples = [tuple(part) for part in parts]
    assert same(cooccurrence(tuples, window=2), cooccurrence(parts, window=2))


def test_a_window_past_the_text():
    operator, vocabulary = cooccurrence(["a"], window=5)
    assert operator.shape == (1, 1)
    assert operator.matrices[0].nnz == 0
    assert vocabulary.words == ["a"]
    operator, _ = cooccurrence([["a"], ["b"], []], window=5)
    np.testing.assert_array_equal(as_matrix(operator), np.zeros((2, 2)))
    operator, _ = cooccurrence(["a", "b"], window=5, symmetric=False)
    np.testing.assert_array_equal(as_matrix(operator), [[0, 1], [0, 0]])


def test_type_of_the_counts():
    operator, vocabulary = cooccurrence(text(40), window=2, dtype=np.float32)
    assert isinstance(vocabulary, Vocabulary)
    assert operator.dtype == operator.matrices[0].dtype == np.float32
    wide, _ = cooccurrence(text(40), window=2)
    np.testing.assert_array_equal(
        operator.matrices[0].toarray(), wide.matrices[0].toarray().astype(np.float32)
    )


def thinned(sentences, subsample, rng, min_count=1):
    """Sentences with each token kept as `subsample` has it, by loops."""
    words = [word for sentence in sentences for word in sentence]
    chosen, counts = vocabulary_of(words, min_count)
    total = sum(counts)
    kept = {
        word: min(1.0, math.sqrt(subsample * (total / count)))
        for word, count in zip(chosen, counts, strict=True)
    }
    return [
        [word for word in sentence if word in kept and rng.random() < kept[word]]
        for sentence in sentences
    ]


@pytest.mark.parametrize("min_count", [1, 3])
@pytest.mark.parametrize("flat", [False, True])
def test_pairs_of_what_subsampling_keeps(flat, min_count, blocks):
    words = text(120, n_words=20)
    parts = [words] if flat else sentences_of(words)
    options = {"window": 3, "subsample": 0.02, "min_count": min_count}
    operator, vocabulary = cooccurrence(
        words if flat else parts, random_state=5, **options
    )
    left = thinned(parts, 0.02, generator(5), min_count)
    assert 20 < sum(map(len, left)) < 100
    pairs = counted(left, 3, True, vocabulary.index)
    np.testing.assert_array_equal(operator.matrices[0].toarray(), stochastic(pairs))
    chosen, counts = vocabulary_of(words, min_count)
    assert vocabulary.words == chosen
    np.testing.assert_array_equal(vocabulary.counts, counts)


def test_subsampling_is_reproducible():
    words = text(400)

    def shares(**options):
        operator, _ = cooccurrence(words, window=1, **options)
        return operator.matrices[0].toarray()

    first = shares(subsample=0.01, random_state=3)
    np.testing.assert_array_equal(shares(subsample=0.01, random_state=3), first)
    assert (shares(subsample=0.01, random_state=4) != first).any()
    rng = generator(3)
    second = shares(subsample=0.01, random_state=rng)
    assert (shares(subsample=0.01, random_state=rng) != second).any()
    np.testing.assert_array_equal(
        shares(subsample=0.01, random_state=generator(3)), second
    )
    # Where every word is rarer than a share of the text, nothing is dropped.
    for whole in (1.0, 10**400 / 10**399, 1e308):
        np.testing.assert_array_equal(shares(subsample=whole), shares())


def test_rates_of_subsampling():
    # Behind each word that stays is one that may go: what is kept of it follows them.
    n = {"often": 4000, "seldom": 1000}
    order = generator().permutation(np.repeat(list(n), list(n.values())))
    words = [word for i, middle in enumerate(order) for word in (f"_{i}", middle)]
    subsample = 1e-3
    operator, vocabulary = cooccurrence(
        words, window=1, subsample=subsample, symmetric=False, random_state=1
    )
    matrix = operator.matrices[0]
    for word, count in n.items():
        kept = np.count_nonzero(
            matrix[[vocabulary.index[f"_{i}"] for i in np.flatnonzero(order == word)]][
                :, [vocabulary.index[word]]
            ].toarray()
        )
        rate = math.sqrt(subsample * len(words) / count)
        assert abs(kept / count - rate) <= 5 * math.sqrt(rate * (1 - rate) / count)


def test_text_in_which_nothing_is_left():
    for nothing in ([], iter(()), [[]], [[], []]):
        with pytest.raises(ValueError, match="at least one word, got none"):
            cooccurrence(nothing, window=1)
    message = (
        "tokens must hold a word at least min_count = 3 times, the most frequent of 2 "
        "is there 2 times"
    )
    with pytest.raises(ValueError, match=message):
        cooccurrence(["a", "b", "a"], window=1, min_count=3)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ("a text", "one str: split it into words"),
        (b"a text", "one bytes: split it into words"),
        (7, "int"),
        (None, "NoneType"),
        (["a", 7], "int 7"),
        (["a", None], "NoneType None"),
        (["a", ("b",)], "tuple ('b',)"),
        (["a", ["b"]], "words of unhashable type: 'list'"),
        ([["a"], "b"], "str 'b' as tokens[1]"),
        ([["a"], b"b"], "bytes b'b' as tokens[1]"),
        ([["a"], 7], "int 7 as tokens[1]"),
        ([7, 8], "int 7 as tokens[0]"),
        ([["a"], [["b"]]], "words of unhashable type: 'list'"),
        ([["a"], [b"b"]], "bytes b'b'"),
    ],
)
def test_what_is_no_text(tokens, found):
    with pytest.raises(TypeError) as raised:
        cooccurrence(tokens, window=1)
    assert str(raised.value) == (
        "tokens must be an iterable of strings, or of sentences that are iterables of "
        f"strings, got {found}"
    )


def test_errors_of_an_iterator_come_through():
    def broken():
        yield "a"
        raise TypeError("of the caller's own")

    with pytest.raises(TypeError, match="of the caller's own"):
        cooccurrence(broken(), window=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be an integer >= 1, got 0"),
        ({"window": 1.5}, ValueError, "window must be an integer >= 1"),
        ({"min_count": 0}, ValueError, "min_count must be an integer >= 1"),
        ({"subsample": 0}, ValueError, "subsample must be a positive number or None"),
        ({"subsample": np.nan}, ValueError, "subsample must be a positive number"),
        ({"subsample": "1"}, ValueError, "subsample must be a positive number"),
        ({"symmetric": 1}, TypeError, "symmetric must be True or False, got 1"),
        ({"random_state": -1}, ValueError, "random_state must be None, an integer"),
    ],
)
def test_parameters_of_cooccurrence(options, error, message):
    with pytest.raises(error, match=message):
        cooccurrence(["a", "b"], **{"window": 1, **options})


# -------- temporal_walk


def meetings(n_events=40, n=7, weighted=True, seed=0):
    rng = generator(seed)
    ends = rng.integers(0, n, (n_events, 2))
    times = rng.integers(-6, 9, n_events) / 2
    columns = [ends, times[:, None]]
    if weighted:
        columns.append(rng.exponential(size=(n_events, 1)))
    return np.hstack(columns)


def walk_through_time(events, interval, n, directed):
    """The mean of partial products, the latest snapshot first, by loops."""
    events = [(*event, 1.0)[:4] for event in events]
    start = min(time for _, _, time, _ in events)
    snapshots = {}
    for source, target, time, weight in events:
        key = time if interval is None else math.floor((time - start) / interval)
        adjacency = snapshots.setdefault(key, np.eye(n))
        adjacency[int(source), int(target)] += weight
        if not directed and source != target:
            adjacency[int(target), int(source)] += weight
    latest_first = [stochastic(snapshots[key]) for key in sorted(snapshots)[::-1]]
    return latest_first, mean_of_partial_products(latest_first)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("interval", [None, 0.5, 1.7, 4, 1e9])
def test_walk_through_snapshots(interval, weighted, directed):
    events = meetings(weighted=weighted)
    matrices, expected = walk_through_time(events, interval, 7, directed)
    chain = temporal_walk(events, interval=interval, directed=directed)
    assert len(chain) == len(matrices)
    for found, matrix in zip(chain.matrices, matrices, strict=True):
        np.testing.assert_allclose(found.toarray(), matrix, rtol=1e-14)
    check(chain, expected)
    np.testing.assert_allclose(chain @ np.ones(7), 1, rtol=1e-13)


def test_events_in_any_form_and_order():
    events = meetings()
    expected = as_matrix(temporal_walk(events, interval=1.0))
    # The order in which equal events are added up is the order they come in.
    rtol = 2 * len(events) * np.finfo(np.float64).eps
    for form in (events[::-1], events.tolist(), tuple(map(tuple, events))):
        found = as_matrix(temporal_walk(form, interval=1.0))
        np.testing.assert_allclose(found, expected, rtol=rtol)
    strided = np.zeros((80, 8))[::-2, ::2]
    strided[:] = events
    strided.flags.writeable = False
    np.testing.assert_array_equal(
        as_matrix(temporal_walk(strided, interval=1.0)), expected
    )
    whole = [(0, 1, 3), (1, 2, 5), (0, 1, 5)]
    np.testing.assert_array_equal(
        as_matrix(temporal_walk(whole)), as_matrix(temporal_walk(np.array(whole, "f4")))
    )


def test_nodes_without_events_stay():
    chain = temporal_walk([(1, 2, 0.0)], n_nodes=5)
    expected = np.eye(5)
    expected[1:3, 1:3] = 0.5
    np.testing.assert_array_equal(as_matrix(chain), expected)
    assert temporal_walk([(3, 3, 0)]).shape == (4, 4)
    narrow = temporal_walk([(0, 1, 0.0)], dtype=np.float32)
    assert narrow.matrices[0].dtype == np.float32


def test_snapshots_begin_with_the_first_event():
    def n_matrices(times, interval):
        return len(temporal_walk([(0, 1, t) for t in times], interval=interval))

    assert n_matrices([10.0, 14.9, 15.0], 5.0) == 2
    assert n_matrices([10.0, 14.9, 14.99], 5.0) == 1
    assert n_matrices([-3, -2, -1, 0, 1], 2) == 3
    # Empty intervals are left out, however many they are.
    assert n_matrices([0.0, 1e15, 1e15 + 1], 1.0) == 3
    assert n_matrices([0.0, 1e300], 1e-3) == 2
    # Nanoseconds since 1970 have more digits than float64.
    now = 1_700_000_000_000_000_001
    assert n_matrices([now, now + 1, now + 2, now + 3], 2) == 2
    assert n_matrices([now, now + 1, now + 2, now + 3], 2.0) == 2
    assert n_matrices([now, now + 1], None) == 2
    lowest, highest = -(2**63), 2**63 - 1
    assert n_matrices([lowest, highest], 2**63) == 2
    assert n_matrices([lowest, highest], 2**70) == 1
    assert n_matrices([lowest, highest], None) == 2


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ((-1, 0, 0, 1), "a source that is an integer >= 0, got -1.0"),
        ((0.5, 0, 0, 1), "a source that is an integer >= 0, got 0.5"),
        ((np.nan, 0, 0, 1), "a source that is an integer >= 0, got nan"),
        ((0, np.inf, 0, 1), "a target that is an integer >= 0, got inf"),
        ((0, 5, 0, 1), "a target below n_nodes = 5, got 5.0"),
        ((7, 0, 0, 1), "a source below n_nodes = 5, got 7.0"),
        ((0, 1, np.nan, 1), "a time that is finite, got nan"),
        ((0, 1, -np.inf, 1), "a time that is finite, got -inf"),
        ((0, 1, 0, 0), "a weight that is positive and finite, got 0.0"),
        ((0, 1, 0, -2), "a weight that is positive and finite, got -2.0"),
        ((0, 1, 0, np.inf), "a weight that is positive and finite, got inf"),
        ((0, 1, 0, np.nan), "a weight that is positive and finite, got nan"),
    ],
)
def test_invalid_events_are_named(event, message):
    events = np.ones((6, 4))
    events[3] = event
    with pytest.raises(ValueError) as raised:
        temporal_walk(events, n_nodes=5)
    assert str(raised.value) == f"events[3] must have {message}"


@pytest.mark.parametrize(
    ("events", "options", "error", "message"),
    [
        (
            [],
            {},
            ValueError,
            r"must have shape \(e, 3\) or \(e, 4\), .* got shape \(0,\)",
        ),
        (np.ones((2, 2)), {}, ValueError, r"got shape \(2, 2\)"),
        (np.ones((2, 5)), {}, ValueError, r"got shape \(2, 5\)"),
        ([(0, 1, 0), (0, 1, 0, 1)], {}, ValueError, "got rows of unequal lengths"),
        (np.ones((0, 3)), {}, ValueError, "at least one event, got none"),
        ([("a", "b", 0)], {}, TypeError, "events must hold real numbers, got <U"),
        ([(0, 1, 0j)], {}, TypeError, "events must hold real numbers, got complex128"),
        (
            [(0, 1, 0)],
            {"interval": 0},
            ValueError,
            "interval must be a positive number",
        ),
        ([(0, 1, 0)], {"interval": np.inf}, ValueError, "or None, got inf"),
        ([(0, 1, 0)], {"interval": "1h"}, ValueError, "or None, got '1h'"),
        ([(0, 1, 0)], {"n_nodes": 0}, ValueError, "n_nodes must be an integer >= 1"),
        (
            [(0, 1, 0)],
            {"n_nodes": 1},
            ValueError,
            r"events\[0\] must have a target bel",
        ),
        ([(0, 1, 0)], {"directed": 0}, TypeError, "directed must be True or False"),
        (
            [(0, 1, -1e308), (0, 1, 1e308)],
            {"interval": 1e-9},
            ValueError,
            "must span a number of intervals that float64 holds, got times from -1e",
        ),
        (
            [(0, 1, 0, 1e308), (0, 1, 0, 1e308)],
            {},
            ValueError,
            "events must have weights whose sum float64 holds, those of node 0",
        ),
    ],
)
def test_what_are_no_events(events, options, error, message):
    with pytest.raises(error, match=message):
        temporal_walk(events, **options)


@pytest.mark.parametrize("tokens", [[None, "a", "b"], [None, ["a"]]])
def test_none_is_no_word(tokens):
    with pytest.raises(TypeError, match="tokens"):
        cooccurrence(tokens, window=1)
