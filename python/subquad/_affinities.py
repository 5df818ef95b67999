"""Affinities to embed, as chains of sparse matrices: re-exported by `embedding`.

scipy is imported where a matrix has to be made; matrices that come in are worked on by
their own methods, and stay on their device. Graphs of networkx and igraph are
recognised by where their class comes from.
"""

from __future__ import annotations

import array
import importlib
import itertools
import numbers
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _dispatch
from ._estimators import is_number, require_integer, seed_of
from ._operator_chain import OperatorChain
from ._validation.common import check_flag, wrong_rank

Array: TypeAlias = Any
SparseMatrix: TypeAlias = Any
Module: TypeAlias = Any
Float64: TypeAlias = npt.NDArray[np.float64]
Int32: TypeAlias = npt.NDArray[np.int32]
Int64: TypeAlias = npt.NDArray[np.int64]

# Entries, or tokens, whose temporaries are alive at a time.
_BLOCK = 1 << 20
# Pairs of words that are sorted at a time.
_PAIRS = 1 << 22


class Vocabulary(NamedTuple):
    """The words that `cooccurrence` counted, the most frequent one first.

    Parameters
    ----------
    words : list of str
        The word of each row, in order of falling counts; of equally frequent words the
        one that came first.
    counts : ndarray of int64, shape (n,)
        How often each occurs in the text, whatever subsampling left of it.
    index : dict of str to int
        The row of each word.

    See Also
    --------
    cooccurrence : The operator over these words.

    Examples
    --------
    >>> from subquad.embedding import cooccurrence
    >>> text = "to be or not to be".split()
    >>> _, vocabulary = cooccurrence(text, window=2)
    >>> vocabulary.words, vocabulary.counts
    (['to', 'be', 'or', 'not'], array([2, 2, 1, 1]))
    >>> vocabulary.index["be"]
    1
    """

    words: list[str]
    counts: Int64
    index: dict[str, int]  # type: ignore[assignment]


def random_walk(
    adjacency: Any, /, *, length: int, dtype: npt.DTypeLike | None = None
) -> OperatorChain:
    """Return the mean of the first steps of a random walk on a graph.

    With A the adjacency and D the diagonal matrix of the sums of its rows, the operator
    is the mean of D⁻¹A, (D⁻¹A)², …, (D⁻¹A)^length: entry (i, j) is how likely a walk
    from node i is in node j after a number of steps drawn from 1 to `length`.

    Parameters
    ----------
    adjacency : sparse matrix, ndarray of shape (n, n), or graph
        Weights of the edges from the node of the row to that of the column, finite and
        not negative: a matrix or array of `scipy.sparse` or `cupyx.scipy.sparse` in any
        format, a NumPy array, or a graph of networkx or igraph. The edges of a graph
        weigh what their attribute "weight" says, 1 where there is none; its nodes keep
        their order; an undirected edge leads both ways, from a node to itself once.
        Parallel edges add up.
    length : int
        Number of steps.
    dtype : float32, float64 or None, default=None
        Type of the operator's entries. None takes that of an adjacency of one of these
        types, and float64 otherwise.

    Returns
    -------
    OperatorChain of shape (n, n)
        `length` times one matrix, on the device of the adjacency. Rows of nodes without
        outgoing edges are zero, all others have sum 1.

    Raises
    ------
    TypeError
        If `adjacency` is nothing of the above or does not hold real numbers, or `dtype`
        is neither float32 nor float64.
    ValueError
        If `adjacency` is not square, a weight is negative or not finite, the weights of
        a row add up to more than float64 holds, or `length` is below 1.
    ModuleNotFoundError
        If a NumPy array or a graph is given and scipy is not installed.

    See Also
    --------
    temporal_walk : Walks along edges that come and go.
    subquad.OperatorChain : What is returned.

    Notes
    -----
    Takes O(n + nnz) time. In compressed rows with sorted columns an adjacency shares
    their positions with the operator, and must not be changed while that is in use:
    the entries alone are new. Sums of rows, and quotients, are computed in float64.

    This operator is what DeepWalk [1]_ samples when a window of `length` slides over
    walks without end, as far as a node's context lies ahead of it; on an undirected
    graph what lies behind it looks the same [2]_.

    References
    ----------
    .. [1] B. Perozzi, R. Al-Rfou, S. Skiena, "DeepWalk: Online Learning of Social
       Representations", KDD, 2014. https://arxiv.org/abs/1403.6652
    .. [2] J. Qiu, Y. Dong, H. Ma, J. Li, K. Wang, J. Tang, "Network Embedding as Matrix
       Factorization: Unifying DeepWalk, LINE, PTE, and node2vec", WSDM, 2018.
       https://arxiv.org/abs/1710.02971

    Examples
    --------
    On a path of three nodes a walk that starts at an end is in the middle after one
    step, and at either end after two:

    >>> import numpy as np
    >>> from subquad.embedding import random_walk
    >>> path = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    >>> walk = random_walk(path, length=2)
    >>> walk
    <OperatorChain of 2 matrices, mean of partial products: (3, 3), float64>
    >>> walk @ np.eye(3)
    array([[0.25, 0.5 , 0.25],
           [0.25, 0.5 , 0.25],
           [0.25, 0.5 , 0.25]])
    """
    require_integer("length", length, 1)
    own = getattr(adjacency, "dtype", None)
    # An absent type would be equal to float64.
    own = own if isinstance(own, np.dtype) and own in _FLOATS else _FLOAT64
    wanted = _float_type(dtype, own)
    step = _row_stochastic(_adjacency(adjacency), wanted, "adjacency")
    return OperatorChain([step] * int(length), mean_of_partial_products=True)


def cooccurrence(
    tokens: Iterable[str] | Iterable[Iterable[str]],
    /,
    *,
    window: int,
    min_count: int = 1,
    subsample: float | None = None,
    symmetric: bool = True,
    random_state: int | np.random.Generator | None = None,
    dtype: npt.DTypeLike | None = None,
) -> tuple[OperatorChain, Vocabulary]:
    """Return how likely words stand near each other in a text, and the words.

    Every two words that are at most `window` apart are counted once. Entry (i, j) of
    the operator is the share of word j among all that were counted with word i.

    Parameters
    ----------
    tokens : iterable of str, or iterable of iterables of str
        The words of a text in their order, or its sentences: no pair crosses from one
        to another. It is read once, and may be an iterator.
    window : int
        Largest distance of two words that are counted; neighbours have distance 1.
    min_count : int, default=1
        Words that occur less often are dropped before anything else.
    subsample : float or None, default=None
        Thin out frequent words: of N words in all, each occurrence of one that occurs c
        times is kept with probability sqrt(subsample N / c), at most 1 [1]_. Words that
        are dropped bring their neighbours closer together.
    symmetric : bool, default=True
        Count a pair for both of its words. False counts it for the first one: the
        operator leads from a word to those that follow it.
    random_state : int, numpy.random.Generator or None, default=None
        Source of what `subsample` drops.
    dtype : float32, float64 or None, default=None
        Type of the operator's entries; None is float64.

    Returns
    -------
    operator : OperatorChain of shape (n, n)
        One matrix. Rows of words that were counted with no other are zero, all others
        have sum 1.
    vocabulary : Vocabulary
        `words`, `counts` and `index` of the n words.

    Raises
    ------
    TypeError
        If `tokens` is a string, or anything but strings, or iterables of strings alone,
        or `dtype` is neither float32 nor float64, or `symmetric` is not a bool.
    ValueError
        If no word is left, or a parameter has no valid value.
    ModuleNotFoundError
        If scipy is not installed.

    See Also
    --------
    random_walk : The affinities of nodes of a graph.

    Notes
    -----
    Takes O(N window) time, but for the sorting of some million pairs at a time. Of the
    text 4 bytes a token are kept, and each different word once; counts take 12 bytes
    for each different pair, and up to four times that while they are added up.

    `vocabulary.counts ** 0.75` are the weights that word2vec draws its noise with, for
    `null_weights` of `EDRep`. Factorising counts like these is what word2vec does
    without forming them [2]_.

    References
    ----------
    .. [1] T. Mikolov, I. Sutskever, K. Chen, G. Corrado, J. Dean, "Distributed
       Representations of Words and Phrases and their Compositionality", NIPS, 2013.
       https://arxiv.org/abs/1310.4546
    .. [2] O. Levy, Y. Goldberg, "Neural Word Embedding as Implicit Matrix
       Factorization", NIPS, 2014.
       https://papers.nips.cc/paper/5477-neural-word-embedding-as-implicit-matrix-factorization

    Examples
    --------
    >>> import numpy as np
    >>> from subquad.embedding import cooccurrence
    >>> sentences = [["a", "b", "a"], ["b", "c"]]
    >>> operator, vocabulary = cooccurrence(sentences, window=1)
    >>> vocabulary.words
    ['a', 'b', 'c']
    >>> (operator @ np.eye(3)).round(3)
    array([[0.   , 1.   , 0.   ],
           [0.667, 0.   , 0.333],
           [0.   , 1.   , 0.   ]])
    """
    require_integer("window", window, 1)
    require_integer("min_count", min_count, 1)
    if subsample is not None and not (is_number(subsample) and subsample > 0):
        message = f"subsample must be a positive number or None, got {subsample!r}"
        raise ValueError(message)
    symmetric = check_flag("symmetric", symmetric)
    wanted = _float_type(dtype, _FLOAT64)
    generator = np.random.default_rng(seed_of(random_state))
    sparse = _scipy_sparse("cooccurrence")
    ids, ends, seen = _numbered(tokens)
    counts = _word_counts(ids, len(seen))
    frequent = np.flatnonzero(counts >= min_count)
    if not len(frequent):
        message = (
            f"tokens must hold a word at least min_count = {min_count} times, the most "
            f"frequent of {len(seen)} is there {counts.max()} times"
        )
        raise ValueError(message)
    # A stable sort: equally frequent words stay in the order of their first occurrence.
    chosen = frequent[np.argsort(-counts[frequent], kind="stable")]
    counts = counts[chosen]
    words = [seen[i] for i in chosen]
    rows = np.full(len(seen), -1, dtype=np.int32)
    rows[chosen] = np.arange(len(chosen), dtype=np.int32)
    kept = None
    if subsample is not None:
        # From 1 on nothing is dropped, and nothing overflows below.
        share = min(float(subsample), 1.0) * (counts.sum() / counts)
        kept = np.minimum(np.sqrt(share), 1.0)
    ids, ends = _thinned(ids, ends, rows, kept, generator)
    pairs = _pair_counts(ids, ends, len(words), int(window), sparse)
    if symmetric:
        pairs = pairs + pairs.T.tocsr()
    operator = OperatorChain([_row_stochastic(pairs, wanted, "tokens")])
    index = {word: row for row, word in enumerate(words)}
    return operator, Vocabulary(words, counts, index)


def temporal_walk(
    events: npt.ArrayLike,
    /,
    *,
    interval: float | None = None,
    n_nodes: int | None = None,
    directed: bool = False,
    dtype: npt.DTypeLike | None = None,
) -> OperatorChain:
    """Return the mean of lazy random walks through the snapshots of a temporal graph.

    Each snapshot t has an adjacency A_t, the sum of its events, and a step
    P_t = D_t⁻¹ (A_t + I) of a walk that may stay where it is, D_t being the sums of the
    rows of A_t + I. With T snapshots the operator is the mean of P_T, P_(T-1) P_T, …,
    P_1 P_2 ⋯ P_T: entry (i, j) is how likely a walk that starts in node i, at a
    snapshot drawn at random, and follows time, is in node j after the last snapshot.

    Parameters
    ----------
    events : array-like of shape (e, 3) or (e, 4)
        Source, target, time and, where there is a fourth column, weight of each event,
        in any order. Nodes are whole numbers from 0 on, times any finite numbers,
        weights positive. Equal events of a snapshot add up.
    interval : float or None, default=None
        Duration of a snapshot: an event at time t belongs to snapshot
        floor((t - t_min) / interval), t_min the earliest time. Intervals without events
        are left out. None makes a snapshot of each different time.
    n_nodes : int or None, default=None
        Number of nodes, by default one more than the largest number of one.
    directed : bool, default=False
        Whether events lead from source to target alone, not both ways.
    dtype : float32, float64 or None, default=None
        Type of the operator's entries; None is float64.

    Returns
    -------
    OperatorChain of shape (n_nodes, n_nodes)
        The matrices of all snapshots, the latest in front. All rows have sum 1.

    Raises
    ------
    TypeError
        If `events` does not hold real numbers, `dtype` is neither float32 nor float64,
        or `directed` is not a bool.
    ValueError
        If `events` is empty or has another shape, an event has no valid source, target,
        time or weight, weights add up to more than float64 holds, or `interval` or
        `n_nodes` has no valid value.
    ModuleNotFoundError
        If scipy is not installed.

    See Also
    --------
    random_walk : Walks on a graph that stays as it is.

    Notes
    -----
    Takes O(e log e + n T) time, and as much memory as e + n T entries of sparse
    matrices: every snapshot lets every node stay. Where events have many different
    times, `interval` keeps T small.

    Embedding this operator gives distances between temporal graphs [1]_.

    References
    ----------
    .. [1] L. Dall'Amico, A. Barrat, C. Cattuto, "An embedding-based distance for
       temporal graphs", Nature Communications 15, 2024.
       https://doi.org/10.1038/s41467-024-54280-4

    Examples
    --------
    Node 0 meets node 1 before that meets node 2, which node 0 can reach by way of it;
    node 2 cannot reach node 0:

    >>> import numpy as np
    >>> from subquad.embedding import temporal_walk
    >>> walk = temporal_walk([(0, 1, 0.0), (1, 2, 1.0)])
    >>> walk.shape, len(walk)
    ((3, 3), 2)
    >>> walk @ np.eye(3)
    array([[0.75 , 0.125, 0.125],
           [0.25 , 0.375, 0.375],
           [0.   , 0.5  , 0.5  ]])
    """
    directed = check_flag("directed", directed)
    wanted = _float_type(dtype, _FLOAT64)
    if interval is not None and not (is_number(interval) and interval > 0):
        message = f"interval must be a positive number or None, got {interval!r}"
        raise ValueError(message)
    if n_nodes is not None:
        require_integer("n_nodes", n_nodes, 1)
    sparse = _scipy_sparse("temporal_walk")
    table = _event_table(events)
    sources = _nodes(table[:, 0], "source", n_nodes)
    targets = _nodes(table[:, 1], "target", n_nodes)
    times = table[:, 2]
    _require(np.isfinite(times), times, "time that is finite")
    weights = np.ones(len(table))
    if table.shape[1] == 4:
        valid = np.isfinite(table[:, 3]) & (table[:, 3] > 0)
        _require(valid, table[:, 3], "weight that is positive and finite")
        weights = table[:, 3].astype(np.float64)
    n = int(max(sources.max(), targets.max())) + 1 if n_nodes is None else int(n_nodes)
    snapshots = _snapshots(times, interval)
    order = np.argsort(snapshots, kind="stable")
    bounds = np.searchsorted(snapshots[order], np.arange(snapshots.max() + 2))
    nodes = np.arange(n)
    matrices = []
    for start, stop in reversed(list(itertools.pairwise(bounds))):
        here = order[start:stop]
        lazy = _edges_to_rows(
            n,
            np.concatenate([sources[here], nodes]),
            np.concatenate([targets[here], nodes]),
            np.concatenate([weights[here], np.ones(n)]),
            directed,
            sparse,
        )
        matrices.append(_row_stochastic(lazy, wanted, "events"))
    return OperatorChain(matrices, mean_of_partial_products=True)


# -------- rows that add up to 1

_FLOAT64 = np.dtype(np.float64)
_FLOATS = (np.dtype(np.float32), _FLOAT64)


def _float_type(dtype: npt.DTypeLike | None, own: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that is asked for, or that of the data."""
    if dtype is None:
        return own
    wanted = np.dtype(dtype)
    if wanted not in _FLOATS:
        message = f"dtype must be float32, float64 or None, got {wanted}"
        raise TypeError(message)
    return wanted


def _scipy_sparse(what: str) -> Module:
    try:
        return importlib.import_module("scipy.sparse")
    except ModuleNotFoundError as error:
        message = f"{what} needs scipy: pip install scipy"
        raise ModuleNotFoundError(message, name=error.name) from None


def _row_stochastic(
    matrix: SparseMatrix, wanted: np.dtype[Any], name: str
) -> SparseMatrix:
    """Return a matrix in compressed rows with every row divided by its sum.

    Its positions are shared with the result. Rows whose sum is 0 stay as they are.
    """
    data, indices, indptr = matrix.data, matrix.indices, matrix.indptr
    xp = _dispatch.namespace_of(data)
    device = _dispatch.device_of(data)
    ones = xp.ones((matrix.shape[1], 1), dtype=xp.float64, device=device)
    wide = data.astype(np.float64, copy=False)
    backend = _dispatch.backend_for(data=wide)
    sums = backend.csr_product(wide, indices, indptr, ones, None, 1.0, None)[:, 0]
    del wide
    if sums.shape[0] and not bool(xp.all(xp.isfinite(sums))):
        row = int(xp.nonzero(~xp.isfinite(sums))[0][0])
        message = (
            f"{name} must have weights whose sum float64 holds, those of node {row} "
            "add up to more"
        )
        raise ValueError(message)
    sums = xp.where(sums > 0, sums, 1.0)
    row_of = matrix.tocoo(copy=False).row
    out = xp.empty(data.shape, dtype=wanted, device=device)
    for start in range(0, data.shape[0], _BLOCK):
        block = slice(start, start + _BLOCK)
        out[block] = data[block] / sums[row_of[block]]
    return type(matrix)((out, indices, indptr), shape=matrix.shape)


# -------- graphs


def _adjacency(adjacency: Any) -> SparseMatrix:
    """Return the weights of a graph's edges in compressed rows."""
    library = {kind.__module__.partition(".")[0] for kind in type(adjacency).__mro__}
    if "networkx" in library:
        return _checked_weights(_rows_of_networkx(adjacency))
    if "igraph" in library:
        return _checked_weights(_rows_of_igraph(adjacency))
    is_dense = isinstance(adjacency, np.ndarray)
    if not is_dense and not hasattr(adjacency, "tocsr"):
        kind = type(adjacency)
        message = (
            "adjacency must be a sparse matrix of scipy.sparse or cupyx.scipy.sparse, "
            "a two-dimensional NumPy array, or a graph of networkx or igraph, got "
            f"{kind.__module__}.{kind.__qualname__}"
        )
        raise TypeError(message)
    shape = tuple(adjacency.shape)
    if len(shape) != 2:
        raise wrong_rank("adjacency", "(n, n)", shape)
    if shape[0] != shape[1]:
        message = (
            "adjacency must be square, with a row and a column for each node, got "
            f"shape {shape}"
        )
        raise ValueError(message)
    if adjacency.dtype.kind not in "biuf":
        message = f"adjacency must hold real numbers, got {adjacency.dtype}"
        raise TypeError(message)
    own = adjacency.dtype in _FLOATS
    if is_dense:
        dense = adjacency if own else adjacency.astype(np.float64)
        return _checked_weights(
            _scipy_sparse("a dense adjacency").csr_array(np.asarray(dense))
        )
    # Integers and booleans would wrap where parallel edges are added up.
    if not own and (adjacency.format != "csr" or adjacency.dtype.kind == "f"):
        adjacency = adjacency.astype(np.float64)
    rows = adjacency.tocsr()
    nnz = rows.nnz
    if rows.data.shape[0] != nnz:
        rows = type(rows)(
            (rows.data[:nnz], rows.indices[:nnz], rows.indptr), shape=shape
        )
    return _checked_weights(rows)


def _checked_weights(rows: SparseMatrix) -> SparseMatrix:
    """Return an adjacency without negative weights, which nobody else will reorder."""
    if rows.nnz == 0 or rows.dtype.kind == "b":
        lowest = 0.0
    else:
        lowest = float(rows.data.min())
    if not rows.has_canonical_format:
        if rows.has_sorted_indices or not lowest >= 0:
            rows = rows.astype(np.float64)
            rows.sum_duplicates()
            lowest = float(rows.data.min())
        else:
            # What sorts the columns of the matrix in place must not reach the result.
            rows = type(rows)(
                (rows.data, rows.indices.copy(), rows.indptr.copy()), shape=rows.shape
            )
    if lowest >= 0 and (rows.nnz == 0 or float(rows.data.max()) < np.inf):
        return rows
    xp = _dispatch.namespace_of(rows.data)
    entry = int(xp.nonzero(~(xp.isfinite(rows.data) & (rows.data >= 0)))[0][0])
    row = int(rows.tocoo(copy=False).row[entry])
    message = (
        "adjacency must have weights that are finite and not negative, got "
        f"{rows.data[entry]} from node {row} to node {rows.indices[entry]}"
    )
    raise ValueError(message)


def _rows_of_networkx(graph: Any) -> SparseMatrix:
    index = {node: i for i, node in enumerate(graph)}
    edges = list(graph.edges(data="weight", default=1))
    sources = np.fromiter((index[u] for u, _, _ in edges), np.int64, len(edges))
    targets = np.fromiter((index[v] for _, v, _ in edges), np.int64, len(edges))
    weights = _weights_of_edges([weight for _, _, weight in edges])
    sparse = _scipy_sparse("a graph")
    directed = bool(graph.is_directed())
    return _edges_to_rows(len(index), sources, targets, weights, directed, sparse)


def _rows_of_igraph(graph: Any) -> SparseMatrix:
    edges = np.array(graph.get_edgelist(), dtype=np.int64).reshape(-1, 2)
    if "weight" in graph.es.attributes():
        values = [1 if weight is None else weight for weight in graph.es["weight"]]
        weights = _weights_of_edges(values)
    else:
        weights = np.ones(len(edges))
    sparse = _scipy_sparse("a graph")
    directed = bool(graph.is_directed())
    sources, targets = edges[:, 0], edges[:, 1]
    return _edges_to_rows(graph.vcount(), sources, targets, weights, directed, sparse)


def _weights_of_edges(values: list[Any]) -> Float64:
    for kind in set(map(type, values)):
        if not issubclass(kind, (numbers.Real, np.bool_)):
            message = (
                "adjacency must have real numbers as weights of its edges, got "
                f"{next(value for value in values if type(value) is kind)!r}"
            )
            raise TypeError(message)
    return np.array(values, dtype=np.float64)


def _edges_to_rows(
    n: int,
    sources: Int64,
    targets: Int64,
    weights: Float64,
    directed: bool,
    sparse: Module,
) -> SparseMatrix:
    """Return edges in compressed rows, those between the same two nodes added up."""
    if not directed:
        apart = sources != targets
        sources, targets, weights = (
            np.concatenate([sources, targets[apart]]),
            np.concatenate([targets, sources[apart]]),
            np.concatenate([weights, weights[apart]]),
        )
    return sparse.coo_array((weights, (sources, targets)), shape=(n, n)).tocsr()


# -------- text


class _Numbers(dict[str, int]):
    """The number of each word, a new one where it is seen for the first time."""

    def __missing__(self, word: object) -> int:
        if not isinstance(word, str):
            raise _not_words(f"{type(word).__name__} {word!r}")
        number = self[word] = len(self)
        return number


def _not_words(found: str) -> TypeError:
    message = (
        "tokens must be an iterable of strings, or of sentences that are iterables of "
        f"strings, got {found}"
    )
    return TypeError(message)


def _numbered(
    tokens: Iterable[str] | Iterable[Iterable[str]],
) -> tuple[Int32, Int64 | None, list[str]]:
    """Return the number of every token, the ends of sentences, and all words."""
    if isinstance(tokens, (str, bytes)):
        raise _not_words(f"one {type(tokens).__name__}: split it into words")
    if not isinstance(tokens, Iterable):
        raise _not_words(type(tokens).__name__)
    numbers_of = _Numbers()
    ids = array.array("i")
    ends: array.array[int] | None = None
    items: Iterator[Any] = iter(tokens)
    nothing = object()
    first = next(items, nothing)
    if isinstance(first, str):
        _extend(ids, numbers_of, itertools.chain([first], items))
    elif first is not nothing:
        ends = array.array("q")
        for i, sentence in enumerate(itertools.chain([first], items)):
            if isinstance(sentence, (str, bytes)) or not isinstance(sentence, Iterable):
                found = f"{type(sentence).__name__} {sentence!r} as tokens[{i}]"
                raise _not_words(found)
            _extend(ids, numbers_of, sentence)
            ends.append(len(ids))
    if not ids:
        message = "tokens must hold at least one word, got none"
        raise ValueError(message)
    bounds = None if ends is None else np.frombuffer(ends, np.int64)
    return np.frombuffer(ids, np.int32), bounds, [str(word) for word in numbers_of]


def _extend(ids: array.array[int], numbers_of: _Numbers, words: Iterable[Any]) -> None:
    """Append the numbers of words."""
    try:
        ids.extend(map(numbers_of.__getitem__, words))
    except TypeError as error:
        if not str(error).startswith("unhashable type"):
            raise
        raise _not_words(f"words of {error}") from None


def _word_counts(ids: Int32, n_words: int) -> Int64:
    counts = np.zeros(n_words, dtype=np.int64)
    for start in range(0, len(ids), _BLOCK):
        counts += np.bincount(ids[start : start + _BLOCK], minlength=n_words)
    return counts


def _thinned(
    ids: Int32,
    ends: Int64 | None,
    rows: Int32,
    kept: Float64 | None,
    generator: np.random.Generator,
) -> tuple[Int32, Int64 | None]:
    """Return the rows of the words that stay, in the place of the tokens.

    `rows` has the row of every word, -1 for those that are dropped, `kept` the
    probability that a token of a row is kept.
    """
    n = 0
    new_ends = None if ends is None else np.zeros_like(ends)
    for start in range(0, len(ids), _BLOCK):
        block = rows[ids[start : start + _BLOCK]]
        stays = block >= 0
        if kept is not None:
            chances = kept[block[stays]]
            stays[stays] = generator.random(len(chances)) < chances
        if ends is not None and new_ends is not None:
            first = np.searchsorted(ends, start, side="left")
            last = np.searchsorted(ends, start + len(block), side="right")
            before = np.concatenate([[0], np.cumsum(stays)])
            new_ends[first:last] = n + before[ends[first:last] - start]
        block = block[stays]
        ids[n : n + len(block)] = block
        n += len(block)
    return ids[:n], new_ends


def _pair_counts(
    ids: Int32, ends: Int64 | None, n_words: int, window: int, sparse: Module
) -> SparseMatrix:
    """Return how often each word is at most `window` behind each, in compressed rows.

    Pairs are counted some million at a time; what was counted is merged with what is at
    most twice as large, so that each count is moved O(log(number of pairs)) times.
    """
    n = len(ids)
    longest = n if ends is None else int(np.diff(ends, prepend=0).max())
    runs: list[SparseMatrix] = []
    waiting: list[Int64] = []
    n_waiting = 0
    for distance in range(1, min(window, longest - 1) + 1):
        for start in range(0, n - distance, _BLOCK):
            stop = min(start + _BLOCK, n - distance)
            pairs = ids[start:stop].astype(np.int64) * n_words
            pairs += ids[start + distance : stop + distance]
            if ends is not None:
                pairs = pairs[_in_one_sentence(ends, start, stop, distance)]
            waiting.append(pairs)
            n_waiting += len(pairs)
            if n_waiting >= _PAIRS:
                runs.append(_counted(waiting, n_words, sparse))
                waiting, n_waiting = [], 0
                while len(runs) > 1 and runs[-2].nnz <= 2 * runs[-1].nnz:
                    runs[-2:] = [runs[-2] + runs[-1]]
    total = _counted(waiting, n_words, sparse)
    while runs:
        total = runs.pop() + total
    return total


def _in_one_sentence(
    ends: Int64, start: int, stop: int, distance: int
) -> npt.NDArray[np.bool_]:
    """Return whether tokens start … stop - 1 have a sentence with those behind them."""
    size = stop + distance - start
    first = np.searchsorted(ends, start, side="right")
    last = np.searchsorted(ends, start + size, side="left")
    sentence = np.cumsum(np.bincount(ends[first:last] - start, minlength=size))
    same: npt.NDArray[np.bool_] = sentence[:-distance] == sentence[distance:]
    return same


def _counted(pairs: list[Int64], n_words: int, sparse: Module) -> SparseMatrix:
    """Return how often each pair, row * n_words + column, is there."""
    if not pairs:
        return sparse.csr_array((n_words, n_words), dtype=np.int64)
    found, counts = np.unique(np.concatenate(pairs), return_counts=True)
    rows, columns = np.divmod(found, n_words)
    indptr = np.searchsorted(rows, np.arange(n_words + 1))
    shape = (n_words, n_words)
    return sparse.csr_array((counts, columns, indptr), shape=shape)


# -------- events


def _event_table(events: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return events as numbers, integers as they are."""
    expected = "(e, 3) or (e, 4), of source, target, time and weight of each event"
    try:
        table = np.asarray(events)
    except ValueError:
        message = f"events must have shape {expected}, got rows of unequal lengths"
        raise ValueError(message) from None
    if table.ndim != 2 or table.shape[1] not in (3, 4):
        message = f"events must have shape {expected}, got shape {table.shape}"
        raise ValueError(message)
    if table.dtype.kind not in "iuf":
        message = f"events must hold real numbers, got {table.dtype}"
        raise TypeError(message)
    if not len(table):
        message = "events must hold at least one event, got none"
        raise ValueError(message)
    return table.astype(np.float64, copy=False) if table.dtype.kind == "f" else table


def _require(
    valid: npt.NDArray[np.bool_], values: npt.NDArray[Any], expected: str
) -> None:
    """Check that all events have a valid value."""
    if valid.all():
        return
    event = int(np.argmin(valid))
    message = f"events[{event}] must have a {expected}, got {values[event]}"
    raise ValueError(message)


def _nodes(values: npt.NDArray[Any], role: str, n_nodes: int | None) -> Int64:
    """Return the nodes of a column."""
    valid = (values >= 0) & (values < 2.0**63)
    if values.dtype.kind == "f":
        valid &= values == np.floor(values)
    _require(valid, values, f"{role} that is an integer >= 0")
    if n_nodes is not None:
        _require(values < n_nodes, values, f"{role} below n_nodes = {n_nodes}")
    return values.astype(np.int64)


def _snapshots(times: npt.NDArray[Any], interval: float | None) -> Int64:
    """Return the number of each event's snapshot, without gaps."""
    if interval is None:
        return np.unique(times, return_inverse=True)[1]
    if times.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            numbers_of = np.floor((times - times.min()) / float(interval))
    else:
        # Differences of 64-bit integers fit into unsigned ones, where they wrap.
        elapsed = times.astype(np.uint64) - times.min().astype(np.uint64)
        if isinstance(interval, (int, np.integer)):
            # None is further apart than unsigned integers reach.
            step = int(interval)
            numbers_of = elapsed // np.uint64(step) if step < 2**64 else 0 * elapsed
        else:
            numbers_of = np.floor(elapsed / float(interval))
    if not np.isfinite(numbers_of).all():
        message = (
            "events must span a number of intervals that float64 holds, got times "
            f"from {times.min()} to {times.max()} and interval = {interval!r}"
        )
        raise ValueError(message)
    return np.unique(numbers_of, return_inverse=True)[1]
