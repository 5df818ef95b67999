"""Which packages of Debian are alike: an embedding of what depends on what.

A package is linked to those that it depends on. Packages whose random walks along these
links meet the same others lie close to each other in `subquad.EDRep`'s embedding: those
near an editor are its plugins and other editors. Sixty thousand packages take a few
seconds.

    python examples/debian_packages.py                   # of this system's apt-cache
    python examples/debian_packages.py --index Packages.xz --query emacs gimp
    python examples/debian_packages.py --edges depends.edges.gz --nodes depends.nodes.gz

An index is what ``apt-cache dumpavail`` prints, and what mirrors call Packages (.gz and
.xz are read too). A file of edges has two numbers a line, and that of nodes the name
and the section of each number, separated by a tab.

Where sections are known, it is told how often a package's nearest neighbour is of its
own section.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import lzma
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

import subquad as sq

_NAME = re.compile(r"(?:^|[,|])\s*([a-z0-9][a-z0-9+.-]*)")


class Packages(NamedTuple):
    """Names and sections, and a matrix whose row i has what package i depends on."""

    names: list[str]
    sections: list[str]
    depends: Any


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file, compressed or not."""
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "rt", encoding="utf-8", errors="replace") as lines:
        return lines.read().splitlines()


def matrix_of(links: Iterable[tuple[int, int]], n: int) -> Any:
    """Return the matrix of links, each of weight 1."""
    ends = np.array(sorted(set(links)), dtype=np.int64).reshape(-1, 2)
    ones = np.ones(len(ends), np.float32)
    return scipy.sparse.csr_array((ones, ends.T), shape=(n, n))


def read_index(lines: Iterable[str]) -> Packages:
    """Return the packages of an index: stanzas of ``Field: value`` lines."""
    index: dict[str, int] = {}
    sections: list[str] = []
    wanted: list[tuple[int, str]] = []
    stanza: dict[str, str] = {}
    for line in itertools.chain(lines, [""]):
        if line.strip():
            field, _, value = line.partition(": ")
            stanza[field] = value
            continue
        if "Package" in stanza:
            current = index.setdefault(stanza["Package"], len(index))
            if current == len(sections):
                sections.append("")
            if "Section" in stanza:
                # "non-free/games" is about games as well.
                sections[current] = stanza["Section"].rpartition("/")[2]
            for field in ("Depends", "Pre-Depends"):
                # "a (>= 1) | b, c:any": alternatives count as well.
                found = _NAME.findall(stanza.get(field, ""))
                wanted += [(current, name) for name in found]
        stanza = {}
    links = ((i, index[name]) for i, name in wanted if name in index)
    return Packages(list(index), sections, matrix_of(links, len(index)))


def read_edges(edges: Path, nodes: Path) -> Packages:
    """Return the packages of a list of edges between numbered nodes."""
    fields = [line.partition("\t") for line in lines_of(nodes)]
    split = (line.split() for line in lines_of(edges))
    links = [(int(ends[0]), int(ends[1])) for ends in split if ends]
    for link in links:
        if not 0 <= min(link) <= max(link) < len(fields):
            raise SystemExit(f"{edges}: edge {link} among {len(fields)} nodes")
    depends = matrix_of(links, len(fields))
    return Packages([name for name, _, _ in fields], [s for *_, s in fields], depends)


def packages_of(options: argparse.Namespace) -> Packages:
    """Return the packages that the command line names."""
    if options.edges is not None:
        if options.nodes is None:
            raise SystemExit("--edges: needs --nodes, the names of the packages")
        return read_edges(options.edges, options.nodes)
    if options.index is not None:
        return read_index(lines_of(options.index))
    try:
        found = subprocess.run(
            ["apt-cache", "dumpavail"], capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"apt-cache dumpavail: {error}; give --index FILE") from None
    return read_index(found.stdout.decode(errors="replace").splitlines())


def nearest(embedding: Any, rows: Any, count: int) -> Any:
    """Return the rows of the largest cosines with each of some rows."""
    cosines = embedding[rows] @ embedding.T
    cosines[np.arange(len(rows)), rows] = -np.inf
    best = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(cosines, best, axis=1), axis=1)
    return np.take_along_axis(best, order, axis=1)


def agreement(embedding: Any, sections: list[str], seed: int) -> tuple[float, float]:
    """Return how often neighbours share a section, and how often any two packages do.

    Of at most a thousand packages whose section is known.
    """
    codes = np.unique(sections, return_inverse=True)[1]
    known = np.flatnonzero(np.array(sections) != "")
    rows = np.random.default_rng(seed).permutation(known)[:1000]
    neighbour = nearest(embedding, rows, 1)[:, 0]
    shares = np.bincount(codes[known]) / len(known)
    return float(np.mean(codes[neighbour] == codes[rows])), float((shares**2).sum())


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--index", type=Path, help="a file of stanzas, .gz and .xz too")
    result.add_argument("--edges", type=Path, help="a file of pairs of numbers")
    result.add_argument("--nodes", type=Path, help="names and sections of the numbers")
    result.add_argument(
        "--query", nargs="+", default=["vim", "gimp", "python3-numpy", "gcc", "apache2"]
    )
    result.add_argument("--neighbours", type=int, default=6, help="of each package")
    result.add_argument("--length", type=int, default=3, help="steps of a walk")
    result.add_argument("--dim", type=int, default=64, help="dimensions")
    result.add_argument("--epochs", type=int, default=30)
    result.add_argument("--seed", type=int, default=0)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Embed packages and print neighbours."""
    options = parser().parse_args(arguments)
    names, sections, depends = packages_of(options)
    n = len(names)
    if n < 2:
        raise SystemExit(f"expected two packages at least, got {n}")
    print(f"{n} packages, {depends.nnz} dependencies")

    started = time.perf_counter()
    # Walks go both ways: to what is needed, and to who else needs it.
    walk = sq.random_walk(depends + depends.T, length=options.length, dtype=np.float32)
    model = sq.EDRep(options.dim, max_iter=options.epochs, random_state=options.seed)
    embedding = model.fit_transform(walk)
    print(f"embedded in {time.perf_counter() - started:.2f} s")

    index = {name: i for i, name in enumerate(names)}
    count = min(options.neighbours, n - 1)
    for name in options.query:
        if name not in index:
            print(f"{name}: no such package")
            continue
        (near,) = nearest(embedding, np.array([index[name]]), count)
        print(f"{name}: " + ", ".join(names[i] for i in near))
    if any(sections):
        same, by_chance = agreement(embedding, sections, options.seed)
        print(
            f"of its own section: the nearest of {100 * same:.0f} % of packages, any "
            f"other of {100 * by_chance:.0f} %"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
