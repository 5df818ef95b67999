"""Write what the three gradients of EDRep find: ``embedding_gradients.md``.

Generated graphs of four groups, easy to nearly impossible to tell apart: normalised
mutual information of k-means' clusters with the groups, and the loss with the exact
normaliser. Mean and standard deviation over graphs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.embedding._common import (
    Graph,
    Row,
    block_model,
    embed,
    finish,
    machine_note,
    mean_sd,
    nmi,
    parser,
    study,
    threads_of,
)
from tools.embedding.communities import PUBLISHED
from tools.features._common import table

GRADIENTS = ("source", "symmetric", "full")
LINKS_OUTSIDE = (4.0, 5.0, 6.0, 6.5, 7.0)
DEGREE = 10.0


def strength(c_out: float) -> float:
    """Return how far a graph is above the threshold at which groups can be found, 1."""
    # E θ² of the sixth power of a uniform number from 3 to 12, over its mean.
    moments = [(12.0**p - 3.0**p) / (9 * p) for p in (7, 13)]
    return (DEGREE - c_out) * math.sqrt(moments[1] / moments[0] ** 2 / DEGREE)


def exact_loss(walk: Any, x: Any) -> float:
    """Return cross-entropy - log n and the regulariser, with the exact log Z."""
    import subquad as sq

    x = np.asarray(x, float)
    attraction = (x * (walk @ x)).sum(axis=1)
    log_z = sq.log_normalizer(x, x) - math.log(len(x))
    return float(np.mean(log_z - attraction + x @ x.mean(axis=0)))


def measure(graph: Graph, c_out: float, seed: int) -> list[Row]:
    """Return a row for each gradient."""
    from subquad.embedding import random_walk

    walk = random_walk(graph.adjacency, length=PUBLISHED.length)
    rows = []
    for gradient in GRADIENTS:
        x, seconds = embed(walk, PUBLISHED, seed, gradient=gradient)
        rows.append(
            {
                "c_out": c_out,
                "gradient": gradient,
                "nmi": nmi(x, graph.labels, seed),
                "loss": exact_loss(walk, x),
                "seconds": seconds,
            }
        )
    return rows


def page(document: Row) -> str:
    """Return the table: a row for each number of links between groups."""
    head = ["links outside, strength"]
    head += [f"`{g}`: {what}" for what in ("NMI", "loss") for g in GRADIENTS]
    rows = []
    for c_out in dict.fromkeys(row["c_out"] for row in document["rows"]):
        of = [row for row in document["rows"] if row["c_out"] == c_out]
        cells = [f"{c_out:g}, {strength(c_out):.2f}"]
        for what in ("nmi", "loss"):
            for gradient in GRADIENTS:
                values = [row[what] for row in of if row["gradient"] == gradient]
                mean = f"{np.mean(values):.4f}".replace("-", "−")
                cells.append(mean_sd(values) if what == "nmi" else mean)
        rows.append(cells)
    return table(head, rows) + machine_note(document)


def main(arguments: Sequence[str] | None = None) -> int:
    """Embed generated graphs and write the page."""
    command = parser(__doc__)
    command.add_argument("--nodes", type=int, default=10000)
    command.add_argument("--graphs", type=int, default=3)
    options = command.parse_args(arguments)
    if options.quick:
        options.nodes, options.graphs = 1000, 1
    threads = threads_of(options)
    rows = []
    for c_out in LINKS_OUTSIDE[:: 2 if options.quick else 1]:
        for seed in range(options.graphs):
            print(f"c_out = {c_out:g}, graph {seed}", file=sys.stderr, flush=True)
            graph = block_model(options.nodes, c=DEGREE, c_out=c_out, seed=seed)
            rows += measure(graph, c_out, seed)
    settings = PUBLISHED._asdict() | {"nodes": options.nodes, "graphs": options.graphs}
    return finish(study("gradients", threads, rows, **settings), page, options)


if __name__ == "__main__":
    raise SystemExit(main())
