"""Embeddings by other programs, in an interpreter of their own.

``python _peers.py NAME in.npz out.npz '{"seeds": [0], ...}'``: needs NumPy, scipy and
the program's package alone. Importing and compiling is not timed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

Fitted = Callable[[int], Any]


def available() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0))


def graph_of(inputs: Any) -> Any:
    """Return the graph's matrix."""
    import scipy.sparse

    n = len(inputs["indptr"]) - 1
    parts = inputs["data"].astype(float), inputs["indices"], inputs["indptr"]
    return scipy.sparse.csr_array(parts, shape=(n, n))


def walk_of(adjacency: Any) -> Any:
    """Return one step of the random walk; rows without edges stay zero."""
    total = np.asarray(adjacency.sum(axis=1)).ravel()
    walk = adjacency.copy()
    walk.data /= np.repeat(total, np.diff(adjacency.indptr))
    return walk


def edrep(inputs: Any, options: dict[str, Any]) -> Fitted:
    """The published program, on the mean of a walk's first steps."""
    import scipy.sparse
    from EDRep import CreateEmbedding

    walk = scipy.sparse.csr_matrix(walk_of(graph_of(inputs)))
    null = inputs.get("null_weights")
    given = {
        "dim": options["dim"],
        "p0": null,
        "n_epochs": options["epochs"],
        "eta": options["learning_rate"],
    }

    def fit(seed: int) -> Any:
        np.random.seed(seed)  # noqa: NPY002 - it draws from NumPy's global generator
        steps = [walk] * options["length"]
        rest = {"sum_partials": True, "k": 1, "verbose": False, "sym": True}
        return CreateEmbedding(steps, **given, **rest).X

    return fit


def walks(adjacency: Any, steps: int, generator: np.random.Generator) -> Any:
    """Return a walk of uniform steps from each node, which stays where it has no edge.

    Parameters
    ----------
    adjacency : sparse matrix
        Compressed rows; weights do not count.
    steps : int
        Nodes of a walk.
    generator : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    ndarray of shape (n, steps)
        Nodes, row i from node i.
    """
    n = adjacency.shape[0]
    degrees = np.diff(adjacency.indptr)
    found = np.empty((n, steps), np.int64)
    found[:, 0] = np.arange(n)
    for t in range(1, steps):
        at = found[:, t - 1]
        links = adjacency.indptr[at] + (generator.random(n) * degrees[at]).astype(int)
        moves = degrees[at] > 0
        found[:, t] = at
        found[moves, t] = adjacency.indices[links[moves]]
    return found


def skip_gram(sentences: Any, seed: int, **options: Any) -> Any:
    """Return gensim's vectors of skip-grams with negative samples."""
    from gensim.models import Word2Vec

    return Word2Vec(sentences, sg=1, seed=seed, workers=available(), **options).wv


def deepwalk(inputs: Any, options: dict[str, Any]) -> Fitted:
    """Skip-grams of random walks: DeepWalk by NumPy and gensim."""
    import gensim.models  # noqa: F401 - imported before anything is timed

    adjacency = graph_of(inputs)

    def fit(seed: int) -> Any:
        generator = np.random.default_rng(seed)
        texts = [
            list(map(str, walk))
            for _ in range(options["walks"])
            for walk in walks(adjacency, options["steps"], generator).tolist()
        ]
        vectors = skip_gram(
            texts, seed, vector_size=options["dim"], window=options["window"],
            min_count=0,
        )  # fmt: skip
        return vectors[[str(i) for i in range(adjacency.shape[0])]]

    return fit


def fastnode2vec(inputs: Any, options: dict[str, Any]) -> Fitted:
    """The package fastnode2vec with p = q = 1, a walk from each node an epoch."""
    from fastnode2vec import Graph, Node2Vec

    adjacency = graph_of(inputs)

    def embed(matrix: Any, seed: int) -> Any:
        rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        forward = rows < matrix.indices
        ends = rows[forward].tolist(), matrix.indices[forward].tolist()
        graph = Graph(
            [(str(u), str(v)) for u, v in zip(*ends)], directed=False, weighted=False
        )
        model = Node2Vec(
            graph, options["dim"], options["steps"], window=options["window"], p=1.0,
            q=1.0, workers=available(), seed=seed,
        )  # fmt: skip
        model.train(epochs=options["walks"], verbose=False)
        found = np.zeros((matrix.shape[0], options["dim"]), np.float32)
        known = np.flatnonzero(np.diff(matrix.indptr)).tolist()
        found[known] = model.wv[[str(i) for i in known]]
        return found

    # Compiles what is compiled by the first call.
    embed(adjacency[:50, :50].tocsr(), 0)
    return lambda seed: embed(adjacency, seed)


def spectral(inputs: Any, options: dict[str, Any]) -> Fitted:
    """Leading eigenvectors of the normalised Laplacian, by scikit-network."""
    import scipy.sparse
    from sknetwork.embedding import Spectral

    adjacency = scipy.sparse.csr_matrix(graph_of(inputs))

    def fit(seed: int) -> Any:
        np.random.seed(seed)  # noqa: NPY002 - ARPACK's start
        return Spectral(options["dim"]).fit_transform(adjacency)

    return fit


def word2vec(inputs: Any, options: dict[str, Any]) -> Fitted:
    """Skip-grams of a text by gensim, a row for each word that is asked for."""
    import gensim.models  # noqa: F401 - imported before anything is timed

    names = inputs["words"].tolist()
    words = [names[i] for i in inputs["ids"].tolist()]
    ends = inputs["ends"].tolist()
    texts = [words[start:end] for start, end in zip([0, *ends], ends)]
    wanted = inputs["wanted"].tolist()

    def fit(seed: int) -> Any:
        vectors = skip_gram(
            texts, seed, vector_size=options["dim"], window=options["window"],
            min_count=options["min_count"], sample=options["sample"],
            epochs=options["epochs"],
        )  # fmt: skip
        found = np.zeros((len(wanted), options["dim"]), np.float32)
        for i, word in enumerate(wanted):
            if word in vectors:
                found[i] = vectors[word]
        return found

    return fit


PROGRAMS = {
    "edrep": edrep,
    "deepwalk": deepwalk,
    "fastnode2vec": fastnode2vec,
    "spectral": spectral,
    "word2vec": word2vec,
}


def main(arguments: list[str]) -> int:
    """Embed once for each seed."""
    name, given, found, text = arguments
    options = json.loads(text)
    warnings.simplefilter("ignore")
    with np.load(given) as inputs:
        fit = PROGRAMS[name](dict(inputs), options)
    rows, seconds = {}, []
    for i, seed in enumerate(options["seeds"]):
        start = time.perf_counter()
        rows[f"rows_{i}"] = np.asarray(fit(seed))
        seconds.append(time.perf_counter() - start)
    np.savez(found, seconds=np.array(seconds), **rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
