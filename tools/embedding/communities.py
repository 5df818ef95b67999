"""Write how well clusters of embeddings agree with the communities of graphs.

``docs/_generated/embedding_communities.md``: normalised mutual information with the
labels of nodes, mean and standard deviation over seeds, and seconds of a fit; the same
settings by the published program edrep where it is found, and the gradient in full on
shorter walks. Graphs:
networkx's karate club, generated ones, those of the folder ``--data``, if any, and the
nouns of WordNet, from ``--wordnet``, by default where Debian's package has them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tools.embedding._common import (
    WORDNET,
    Absent,
    Graph,
    Row,
    block_model,
    brief_seconds,
    csr_parts,
    embed,
    finish,
    karate,
    machine_note,
    mean_sd,
    nmi,
    nouns,
    parser,
    read_graph,
    run_peer,
    study,
    threads_of,
)
from tools.features._common import table

REAL = (
    "dolphins",
    "polbooks",
    "football",
    "cora",
    "planetoid_cora",
    "planetoid_pubmed",
)
GENERATED = {"dcsbm10k": 10000, "dcsbm30k": 30000}
LARGE = 5000


class Setting(NamedTuple):
    """Steps of a walk, epochs, size of the first step, dimensions, gradient."""

    length: int
    epochs: int
    learning_rate: float
    dim: int
    gradient: str = "source"


# That of the published experiments, and one for the gradient in full.
PUBLISHED, FULL = Setting(3, 50, 1.0, 32), Setting(2, 50, 1.0, 32, "full")
OURS, PEER, OURS_FULL = "EDRep", "edrep 0.1.2", "EDRep, full, L = 2"


def graphs(folder: Path | None, wordnet: Path | None = None) -> Iterator[Graph]:
    """Yield the graphs that there are."""
    yield karate()
    for name in REAL if folder is not None else ():
        graph = read_graph(folder, name)
        if graph is not None:
            yield graph
    for name, n in GENERATED.items():
        graph = None if folder is None else read_graph(folder, name)
        yield graph or block_model(n)._replace(name=name)
    if wordnet is not None and (wordnet / "data.noun").is_file():
        yield nouns(wordnet)


def ours(graph: Graph, setting: Setting, seeds: Sequence[int]) -> Any:
    """Return the embeddings of a graph, and the seconds of each."""
    from subquad.embedding import random_walk

    walk = random_walk(graph.adjacency, length=setting.length)
    return zip(
        *(embed(walk, setting, seed, gradient=setting.gradient) for seed in seeds)
    )


def scored(
    graph: Graph, method: str, found: Any, seconds: Any, seeds: Sequence[int]
) -> Row:
    """Return a row of the results."""
    return {
        "graph": graph.title,
        "method": method,
        "nmi": [nmi(x, graph.labels, seed) for x, seed in zip(found, seeds)],
        "seconds": list(seconds),
    }


def measure(graph: Graph, seeds: Sequence[int], peer_python: str | None) -> list[Row]:
    """Return the rows of a graph."""
    rows = []
    for method, setting in ((OURS, PUBLISHED), (OURS_FULL, FULL)):
        found = ours(graph, setting, seeds)
        rows.append(scored(graph, method, *found, seeds))
    try:
        found = run_peer(
            "edrep",
            csr_parts(graph.adjacency),
            peer_python,
            seeds=list(seeds),
            length=PUBLISHED.length,
            epochs=PUBLISHED.epochs,
            learning_rate=PUBLISHED.learning_rate,
            dim=PUBLISHED.dim,
        )
    except Absent as error:
        print(f"{PEER}: {error}", file=sys.stderr)
    else:
        rows.append(scored(graph, PEER, *found, seeds))
    return rows


def page(document: Row) -> str:
    """Return the table: a row for each graph."""
    methods = list(dict.fromkeys(row["method"] for row in document["rows"]))
    head = ["", *(name for m in methods for name in (f"{m}: NMI", "time"))]
    cells: dict[str, dict[str, list[str]]] = {}
    for row in document["rows"]:
        time = brief_seconds(float(np.median(row["seconds"])))
        cells.setdefault(row["graph"], {})[row["method"]] = [mean_sd(row["nmi"]), time]
    rows = [
        [graph, *(cell for m in methods for cell in of.get(m, ["–", "–"]))]
        for graph, of in cells.items()
    ]
    return table(head, rows) + machine_note(document)


def main(arguments: Sequence[str] | None = None) -> int:
    """Embed all graphs and write the page."""
    command = parser(__doc__)
    command.add_argument("--seeds", type=int, help="(default: 10, 6 of large graphs)")
    command.add_argument("--wordnet", type=Path, default=WORDNET, help="a folder")
    options = command.parse_args(arguments)
    threads = threads_of(options)
    folder = options.data / "graphs"
    rows = []
    for graph in graphs(folder if folder.is_dir() else None, options.wordnet):
        n = graph.adjacency.shape[0]
        if options.quick and n > 1000:
            continue
        n_seeds = options.seeds or (2 if options.quick else 10 if n < LARGE else 6)
        print(graph.title, file=sys.stderr, flush=True)
        rows += measure(graph, range(n_seeds), options.peer_python)
    settings = {"published": PUBLISHED._asdict(), "full": FULL._asdict()}
    return finish(study("communities", threads, rows, **settings), page, options)


if __name__ == "__main__":
    raise SystemExit(main())
