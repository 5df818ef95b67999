"""Write what other ways to embed a graph find, and take: ``embedding_peers.md``.

Normalised mutual information of k-means' clusters with the labels of nodes, mean and
standard deviation over seeds, and the seconds of a fit, walks included. Other programs
run in a process of their own, by ``--peer-python`` where this interpreter has not got
them: edrep; gensim's skip-grams of ten walks of 40 steps from each node (DeepWalk);
fastnode2vec, the same with p = q = 1; scikit-network's spectral embedding in as many
dimensions as there are labels. All others have 32.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from tools.embedding._common import (
    Absent,
    Graph,
    Row,
    brief_seconds,
    csr_parts,
    finish,
    machine_note,
    mean_sd,
    parser,
    run_peer,
    study,
    threads_of,
)
from tools.embedding.communities import OURS, PUBLISHED, graphs, ours, scored
from tools.features._common import table

GRAPHS = ("dcsbm10k", "cora", "football")
WALKS = {"walks": 10, "steps": 40, "window": 5}
PEERS = {
    "edrep 0.1.2": "edrep",
    "DeepWalk, gensim": "deepwalk",
    "fastnode2vec": "fastnode2vec",
    "spectral, scikit-network": "spectral",
}


def measure(graph: Graph, seeds: Sequence[int], peer_python: str | None) -> list[Row]:
    """Return the rows of a graph."""
    rows = [scored(graph, OURS, *ours(graph, PUBLISHED, seeds), seeds)]
    given = PUBLISHED._asdict() | WALKS | {"seeds": list(seeds)}
    n_labels = len(np.unique(graph.labels[graph.labels >= 0]))
    for method, name in PEERS.items():
        dim = n_labels if name == "spectral" else PUBLISHED.dim
        parts = csr_parts(graph.adjacency)
        try:
            found = run_peer(name, parts, peer_python, **given | {"dim": dim})
        except Absent as error:
            print(f"{method}: {error}", file=sys.stderr)
        else:
            rows.append(scored(graph, method, *found, seeds))
    return rows


def page(document: Row) -> str:
    """Return the table: a row for each way, two columns for each graph."""
    names = list(dict.fromkeys(row["graph"] for row in document["rows"]))
    head = ["", *(cell for name in names for cell in (f"{name}: NMI", "time"))]
    cells: dict[str, dict[str, list[str]]] = {}
    for row in document["rows"]:
        time = brief_seconds(float(np.median(row["seconds"])))
        cells.setdefault(row["method"], {})[row["graph"]] = [mean_sd(row["nmi"]), time]
    rows = [
        [method, *(cell for name in names for cell in of.get(name, ["–", "–"]))]
        for method, of in cells.items()
    ]
    return table(head, rows) + machine_note(document)


def main(arguments: Sequence[str] | None = None) -> int:
    """Embed the graphs by everybody and write the page."""
    command = parser(__doc__)
    command.add_argument("--seeds", type=int, default=3)
    options = command.parse_args(arguments)
    threads = threads_of(options)
    folder = options.data / "graphs"
    rows = []
    for graph in graphs(folder if folder.is_dir() else None):
        wanted = ("karate", "football") if options.quick else GRAPHS
        if graph.name in wanted:
            print(graph.title, file=sys.stderr, flush=True)
            n_seeds = 1 if options.quick else options.seeds
            rows += measure(graph, range(n_seeds), options.peer_python)
    settings = PUBLISHED._asdict() | WALKS
    return finish(study("peers", threads, rows, **settings), page, options)


if __name__ == "__main__":
    raise SystemExit(main())
