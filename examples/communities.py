"""Communities of a graph: an embedding of its nodes, and clusters of that.

The mean of a random walk's first steps says which nodes are close to each other, and
`subquad.EDRep` places the nodes on a sphere so that close ones lie close. Communities
are clusters of the rows. Where labels are known, their agreement with the communities
is told: normalised mutual information, 1 where both are the same.

    python examples/communities.py                         # the karate club: a moment
    python examples/communities.py --graph edges.txt --clusters 7
    python examples/communities.py --graph edges.txt --labels labels.txt
    python examples/communities.py --picture karate.png

A graph is a text file of edges, two nodes a line, and a weight where there is one; a
file of labels has a line ``node label`` for each node. Both may be compressed (.gz).

The algorithm: L. Dall'Amico, E. M. Belliardo, "Efficient distributed representations
with linear-time attention scores normalization", arXiv:2303.17475.
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

import subquad as sq


def read_fields(path: Path) -> list[list[str]]:
    """Return the fields of each line that is no comment (# ...)."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        split = (line.split() for line in lines)
        return [fields for fields in split if fields and fields[0][0] != "#"]


def read_graph(path: Path) -> tuple[list[str], Any]:
    """Return the names of nodes and the weights of edges, the same both ways."""
    index: dict[str, int] = {}
    rows, columns, weights = [], [], []
    for first, second, *weight in read_fields(path):
        rows.append(index.setdefault(first, len(index)))
        columns.append(index.setdefault(second, len(index)))
        weights.append(float(weight[0]) if weight else 1.0)
    shape = (len(index),) * 2
    matrix = scipy.sparse.csr_array((weights, (rows, columns)), shape=shape)
    return list(index), (matrix + matrix.T).tocsr()


def karate() -> tuple[list[str], Any, dict[str, str]]:
    """Return the karate club: names, friendships, and who went where."""
    import networkx as nx

    graph = nx.karate_club_graph()
    clubs = {str(node): graph.nodes[node]["club"] for node in graph}
    return list(clubs), nx.to_scipy_sparse_array(graph, weight=None), clubs


def draw(path: Path, embedding: Any, clusters: Any, names: Sequence[str]) -> None:
    """Draw the rows along the two directions in which they differ most."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    centred = embedding - embedding.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    places = centred @ directions[:2].T
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    axes.scatter(*places.T, c=clusters, cmap="tab10", s=2000 / (50 + len(names)))
    if len(names) <= 50:
        for place, name in zip(places, names, strict=True):
            axes.annotate(name, place, fontsize=7)
    axes.set_axis_off()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--graph", type=Path, help="a file of edges (default: karate)")
    result.add_argument("--labels", type=Path, help="a file of nodes and labels")
    result.add_argument(
        "--clusters", type=int, help="how many (default: as there are labels, or 2)"
    )
    result.add_argument("--length", type=int, default=3, help="steps of a walk")
    result.add_argument("--dim", type=int, default=32, help="dimensions")
    result.add_argument("--epochs", type=int, default=50)
    result.add_argument("--picture", type=Path, help="draw the embedding here")
    result.add_argument("--seed", type=int, default=0)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Embed a graph and print its communities."""
    options = parser().parse_args(arguments)
    labels: dict[str, str] = {}
    if options.graph is None:
        names, adjacency, labels = karate()
    else:
        names, adjacency = read_graph(options.graph)
        if not names:
            raise SystemExit(f"{options.graph}: there are no edges")
    if options.labels is not None:
        # A node alone in its line has no label.
        given = read_fields(options.labels)
        labels = {fields[0]: fields[1] for fields in given if len(fields) > 1}
    n_clusters = options.clusters or len(set(labels.values())) or 2
    if not 1 <= n_clusters <= len(names):
        raise SystemExit(f"--clusters: expected 1 to {len(names)}, got {n_clusters}")

    started = time.perf_counter()
    walk = sq.random_walk(adjacency, length=options.length, dtype=np.float32)
    model = sq.EDRep(
        options.dim,
        max_iter=options.epochs,
        learning_rate=1.0,
        random_state=options.seed,
    )
    embedding = model.fit_transform(walk)
    seconds = time.perf_counter() - started
    print(
        f"{len(names)} nodes, {adjacency.nnz // 2} edges: embedded in {seconds:.3f} s, "
        f"loss {model.loss_[0]:.4f} to {model.loss_[-1]:.4f}"
    )

    means = KMeans(n_clusters, n_init=5, random_state=options.seed)
    clusters = means.fit_predict(embedding)
    for cluster in range(n_clusters):
        members = [names[i] for i in np.flatnonzero(clusters == cluster)]
        shown = ", ".join(members[:20]) + (", ..." if len(members) > 20 else "")
        print(f"community {cluster}, {len(members)} nodes: {shown}")
    known = [i for i, name in enumerate(names) if name in labels]
    if known:
        true = [labels[names[i]] for i in known]
        score = normalized_mutual_info_score(true, clusters[known])
        print(f"agreement with the labels: {score:.3f}")
    if options.picture is not None:
        draw(options.picture, embedding, clusters, names)
        print(f"drawn in {options.picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
