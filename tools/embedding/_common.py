"""What the studies share: graphs, scores, other programs' embeddings, results."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tools.features._common import PAGES, ROOT

RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT.parent / "shared" / "data"
WORDNET = Path("/usr/share/wordnet")
PEERS = Path(__file__).with_name("_peers.py")
Row = dict[str, Any]
Arrays = dict[str, Any]


# ---------------------------------------------------------------------------- graphs


class Graph(NamedTuple):
    """Symmetric weights of edges, and a label of each node, -1 where none is known."""

    name: str
    adjacency: Any
    labels: Any

    @property
    def title(self) -> str:
        """The heading of a row."""
        n, nnz = self.adjacency.shape[0], self.adjacency.nnz
        return f"{self.name}, {n} nodes, {nnz // 2} edges"


def block_model(
    n: int, *, c: float = 10.0, c_out: float = 4.0, groups: int = 4, seed: int = 0
) -> Graph:
    """Return a graph of equal groups and uneven degrees, without its lone nodes.

    Of n nodes, i and j are linked with probability θ_i θ_j c_in / n in one group and
    θ_i θ_j c_out / n in two; θ is the sixth power of a uniform number from 3 to 12,
    over its mean, and c_in such that nodes have c neighbours on average.
    """
    generator = np.random.default_rng(seed)
    theta = generator.uniform(3, 12, n) ** 6
    theta /= theta.mean()
    labels = generator.permutation(n) % groups
    c_in = groups * c - (groups - 1) * c_out
    members = [np.flatnonzero(labels == g).astype(np.int32) for g in range(groups)]
    shares = [np.cumsum(theta[each]) for each in members]

    def ends(group: int, count: int) -> Any:
        drawn = generator.random(count)
        drawn *= shares[group][-1]
        places = np.searchsorted(shares[group], drawn, side="right")
        # Rounding may take a number to the end itself.
        return members[group][np.minimum(places, len(members[group]) - 1)]

    pairs = [(a, b) for a in range(groups) for b in range(a, groups)]
    first, second = [], []
    for a, b in pairs:
        rate = (c_in / 2 if a == b else c_out) / n
        count = generator.poisson(rate * shares[a][-1] * shares[b][-1])
        first.append(ends(a, count))
        second.append(ends(b, count))
    adjacency, kept = _symmetric(np.concatenate(first), np.concatenate(second), n)
    return Graph(f"blocks {n}", adjacency, labels[kept])


def _symmetric(first: Any, second: Any, n: int) -> tuple[Any, Any]:
    """Return unit weights both ways, without loops and lone nodes, and who is kept."""
    import scipy.sparse

    differ = first != second
    first, second = first[differ], second[differ]
    degrees = np.bincount(first, minlength=n) + np.bincount(second, minlength=n)
    kept = np.flatnonzero(degrees)
    renumbered = np.zeros(n, np.int32)
    renumbered[kept] = np.arange(len(kept), dtype=np.int32)
    first, second = renumbered[first], renumbered[second]
    both = np.concatenate([first, second]), np.concatenate([second, first])
    del first, second, differ
    ones = np.ones(len(both[0]), np.float32)
    matrix = scipy.sparse.coo_array((ones, both), shape=(len(kept),) * 2).tocsr()
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix, kept


def karate() -> Graph:
    """Return the karate club of networkx, without its weights."""
    import networkx as nx

    graph = nx.karate_club_graph()
    adjacency = nx.to_scipy_sparse_array(graph, weight=None, dtype=np.float32)
    clubs = [graph.nodes[node]["club"] for node in graph]
    return Graph("karate", adjacency, np.unique(clubs, return_inverse=True)[1])


def nouns(folder: Path) -> Graph:
    """Return the nouns of WordNet, linked to what they are kinds or instances of.

    Labels are the 26 files in which lexicographers keep them.
    """
    import scipy.sparse

    synsets = [line.split(" ") for line in wordnet_lines(folder, "noun")]
    row = {fields[0]: i for i, fields in enumerate(synsets)}
    ends = []
    for i, fields in enumerate(synsets):
        # Offset, file, type, number of words, the words and their senses, number of
        # pointers, and of each its kind, offset, part of speech and words.
        first = 5 + 2 * int(fields[3], 16)
        pointers = fields[first : first + 4 * int(fields[first - 1])]
        ends += [
            (i, row[target])
            for kind, target in zip(pointers[::4], pointers[1::4], strict=True)
            if kind in ("@", "@i")
        ]
    n, pairs = len(synsets), np.array(ends, dtype=np.int32)
    ones = np.ones(len(pairs), np.float32)
    adjacency = scipy.sparse.coo_array((ones, pairs.T), shape=(n, n)).tocsr()
    adjacency = adjacency + adjacency.T
    adjacency.data[:] = 1
    return Graph("WordNet's nouns", adjacency, np.array([int(f[1]) for f in synsets]))


def wordnet_lines(folder: Path, part: str) -> list[str]:
    """Return the synsets of one part of speech, a line each."""
    lines = (folder / f"data.{part}").read_text("utf-8").splitlines()
    # Lines that begin with blanks are the licence.
    return [line for line in lines if not line.startswith(" ")]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, compressed or not."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        return lines.read().splitlines()


def read_graph(folder: Path, name: str) -> Graph | None:
    """Return a graph of a folder, None where it is not there.

    Files are ``name.edges.gz``, ``u v`` a line, and ``name.labels.gz``, or ``name.npz``
    with the parts of compressed rows and `lab`.
    """
    import scipy.sparse

    arrays, edges = folder / f"{name}.npz", folder / f"{name}.edges.gz"
    if arrays.is_file():
        with np.load(arrays) as parts:
            rows = parts["data"], parts["indices"], parts["indptr"]
            adjacency = scipy.sparse.csr_array(rows, shape=tuple(parts["shape"]))
            return Graph(name, adjacency.astype(np.float32), parts["lab"])
    if not edges.is_file():
        return None
    labels = np.array(read_lines(folder / f"{name}.labels.gz"), dtype=int)
    ends = np.array([line.split()[:2] for line in read_lines(edges)], dtype=np.int32)
    ones, n = np.ones(len(ends), np.float32), len(labels)
    adjacency = scipy.sparse.coo_array((ones, ends.T), shape=(n, n)).tocsr()
    adjacency = adjacency + adjacency.T
    adjacency.data[:] = 1
    return Graph(name, adjacency, labels)


# ---------------------------------------------------------------------------- scores


def unit_rows(x: Any) -> Any:
    """Return rows divided by their norms; a zero row stays."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)


def nmi(embedding: Any, labels: Any, seed: int = 0) -> float:
    """Return the normalised mutual information of k-means' clusters with labels.

    Rows of unit norm; as many clusters as there are labels, the best inertia of five
    starts; only nodes with a label count.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    known = labels >= 0
    k = len(np.unique(labels[known]))
    means = KMeans(n_clusters=k, n_init=5, random_state=seed)
    rows = unit_rows(np.asarray(embedding)[known])
    return float(normalized_mutual_info_score(labels[known], means.fit_predict(rows)))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns, and its seconds."""
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def mean_sd(values: Sequence[float]) -> str:
    """Return a mean and a standard deviation, that of the values themselves."""
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def brief_seconds(value: float) -> str:
    """Return seconds with two digits, in the unit that suits them."""
    if value >= 1:
        return f"{value:.2g} s" if value < 100 else f"{value:.0f} s"
    return f"{1e3 * value:.2g} ms" if value < 0.1 else f"{1e3 * value:.0f} ms"


def embed(operator: Any, setting: Any, seed: int, **options: Any) -> tuple[Any, float]:
    """Return the embedding of an operator by EDRep, and its seconds."""
    from subquad.embedding import EDRep

    model = EDRep(
        setting.dim,
        max_iter=setting.epochs,
        learning_rate=setting.learning_rate,
        random_state=seed,
        **options,
    )
    return timed(lambda: model.fit_transform(operator))


# ------------------------------------------------------------------- other programs


class Absent(Exception):  # noqa: N818 - an outcome, not a failure
    """A package is neither here nor in the other interpreter."""


def run_peer(
    name: str, inputs: Mapping[str, Any], python: str | None = None, **options: Any
) -> tuple[list[Any], list[float]]:
    """Return what another program makes of the inputs, and its seconds, for each seed.

    It runs in a process of its own, by this interpreter or the one that is given, on
    the processors that this process may use.

    Raises
    ------
    Absent
        If its package is missing there.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(given, **inputs)
        command = [python or sys.executable, "-P", str(PEERS), name]
        done = subprocess.run(
            [*command, str(given), str(found), json.dumps(options)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [""]
            if "ModuleNotFoundError" in lines[-1]:
                raise Absent(lines[-1])
            raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
        with np.load(found) as arrays:
            seconds = arrays["seconds"].tolist()
            return [arrays[f"rows_{i}"] for i in range(len(seconds))], seconds


def csr_parts(adjacency: Any) -> Arrays:
    """Return what a peer takes for a graph."""
    return {
        "data": adjacency.data,
        "indices": adjacency.indices,
        "indptr": adjacency.indptr,
    }


def package_folder(package: str, python: str | None = None) -> Path:
    """Return the folder of a package, here or in another interpreter.

    Raises
    ------
    Absent
        If it is in neither.
    """
    found = importlib.util.find_spec(package)
    if found is not None and found.origin is not None:
        return Path(found.origin).parent
    if python is not None:
        code = f"import importlib.util as u; print(u.find_spec({package!r}).origin)"
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return Path(done.stdout.strip()).parent
    raise Absent(f"package {package} missing")


# --------------------------------------------------------------------------- results


def machine_facts(threads: int) -> Row:
    """Return what times depend on."""
    from benchmarks import machine

    return machine.facts(threads)


def study(name: str, threads: int, rows: Sequence[Row], **settings: Any) -> Row:
    """Return the results of a study as they are stored."""
    return {
        "study": name,
        "machine": machine_facts(threads),
        "settings": settings,
        "rows": list(rows),
    }


def finish(
    document: Row, page: Callable[[Row], str], options: argparse.Namespace
) -> int:
    """Store results and write the page that they make, or only show it."""
    text = page(document)
    name = f"embedding_{document['study']}"
    print(f"{name}\n\n{text}")
    if not options.quick:
        body = json.dumps(document, indent=1) + "\n"
        (RESULTS / f"{name}.json").write_text(body, encoding="utf-8")
        (PAGES / f"{name}.md").write_text(text, encoding="utf-8")
    return 0


def machine_note(document: Row) -> str:
    """Return a line that says what times depend on."""
    machine = document["machine"]
    threads = machine["threads"]
    return (
        f"\nMeasured on {machine['processor']}, "
        f"{threads} {'thread' if threads == 1 else 'threads'}.\n"
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a command line with what all studies take."""
    result = argparse.ArgumentParser(
        description=(description or "").strip().partition("\n")[0]
    )
    result.add_argument(
        "--quick", action="store_true", help="a try that writes nothing"
    )
    result.add_argument("--data", type=Path, default=DATA, help="folder of real data")
    result.add_argument(
        "--peer-python",
        metavar="PATH",
        help="interpreter that has the packages which this one has not",
    )
    result.add_argument("--threads", type=int, help="of everybody (default: all)")
    return result


def threads_of(options: argparse.Namespace) -> int:
    """Return the number of threads, and let this process have no more."""
    from benchmarks import machine

    threads = options.threads or machine.available_processors()
    machine.limit_affinity(threads)
    return threads
