"""Write what a graph of a million nodes takes: ``embedding_scale.md``.

A generated graph of a million nodes and ten million edges, the mean of three steps of
its random walk in 32 dimensions, 30 epochs: seconds, memory beyond the graph, and the
seconds of the three products of an epoch alone, which no epoch goes below.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Sequence
from typing import Any

from tools.embedding._common import (
    Row,
    block_model,
    embed,
    finish,
    machine_note,
    parser,
    study,
    threads_of,
    timed,
)
from tools.embedding.communities import Setting
from tools.features._common import table

SETTING = Setting(length=3, epochs=30, learning_rate=0.8, dim=32)
# A quarter of the nodes has no edge, and is left out: a million and 10 million edges.
NODES, DEGREE = 1_366_000, 14.7
REPEATS = 3


def measure(n: int, c: float, setting: Setting) -> Row:
    """Return what one graph takes."""
    from benchmarks import machine
    from subquad.embedding import random_walk

    graph, seconds = timed(lambda: block_model(n, c=c, c_out=c / 4))
    print(f"{graph.title}: made in {seconds:.0f} s", file=sys.stderr, flush=True)
    adjacency = graph.adjacency
    del graph
    # What is loaded or started by the first call is not the graph's.
    small = block_model(1000).adjacency
    embed(random_walk(small, length=1), setting._replace(epochs=1), 0)
    gc.collect()
    before = machine.resident_baseline()
    walk, walk_seconds = timed(
        functools.partial(random_walk, adjacency, length=setting.length)
    )
    walk_memory = machine.resident_peak() - before
    del adjacency
    gc.collect()
    before = machine.resident_baseline()
    x, fit_seconds = embed(walk, setting, 0)
    extra = machine.resident_peak() - before
    return {
        "nodes": x.shape[0],
        "edges": nnz_of(walk) // 2,
        "seconds_of_walk": walk_seconds,
        "memory_of_walk": walk_memory,
        "seconds": fit_seconds,
        "extra_memory": extra,
        "peak_memory": before + extra,
        "embedding": x.nbytes,
        "gathers": gathers(walk, x) * setting.epochs,
    }


def nnz_of(walk: Any) -> int:
    """Return the number of entries of a walk's step."""
    return int(walk.matrices[0].nnz)


def gathers(walk: Any, x: Any) -> float:
    """Return the seconds that the products of an epoch take: the least of some."""
    return min(timed(lambda: walk @ x)[1] for _ in range(REPEATS))


def page(document: Row) -> str:
    """Return the table: a row for each graph."""
    epochs = f"{document['settings']['epochs']} epochs"
    head = ["", "walk", epochs, "products alone", "beyond the walk", "in all"]
    head += ["of it the embedding"]
    rows = []
    for row in document["rows"]:
        sizes = (row["extra_memory"], row["peak_memory"], row["embedding"])
        rows.append(
            [
                f"{row['nodes']:,} nodes, {row['edges']:,} edges",
                f"{row['seconds_of_walk']:.1f} s",
                f"{row['seconds']:.1f} s",
                f"{row['gathers']:.1f} s",
                *(f"{size / 2**20:,.0f} MiB" for size in sizes),
            ]
        )
    return table(head, rows) + machine_note(document)


def main(arguments: Sequence[str] | None = None) -> int:
    """Embed a large graph and write the page."""
    command = parser(__doc__)
    command.add_argument("--nodes", type=int, default=NODES, help="of degree 0 too")
    command.add_argument("--degree", type=float, default=DEGREE, help="mean of all")
    options = command.parse_args(arguments)
    if options.quick:
        options.nodes = min(options.nodes, 20000)
    threads = threads_of(options)
    row = measure(options.nodes, options.degree, SETTING)
    return finish(study("scale", threads, [row], **SETTING._asdict()), page, options)


if __name__ == "__main__":
    raise SystemExit(main())
