"""The command ``subquad embed``: kinds of files, names, outputs, errors."""

from __future__ import annotations

import gzip
import os
import pathlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("click", reason="the command line needs click")
pytest.importorskip("scipy", reason="embed needs scipy")

import scipy.sparse as scipy_sparse
from click.testing import CliRunner, Result

from subquad import _cli_common, _cli_edges, cli
from subquad.embedding import EDRep, random_walk

SMALL = ("--dim", 4, "--epochs", 6, "--walk-length", 2)


def silent(text, total):
    return lambda amount: None


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def leftovers(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.name.endswith(".part")]


def refused(done: Result, code: int, *words: str) -> None:
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.output


def two_groups(n=40, seed=0):
    """Edges inside of two groups of nodes, and few between them."""
    rng = np.random.default_rng(seed)
    ring = np.arange(n)
    half = n // 2
    inside = np.stack([ring, (ring + 1) % half + half * (ring >= half)], axis=1)
    more = rng.integers(half, size=(6 * n, 2))
    more[::2] += half
    return np.concatenate([inside, more, [[0, half]]])


def write(path: Path, edges, name="edges.csv", separator=",") -> Path:
    lines = (separator.join(map(str, edge)) + "\n" for edge in edges)
    (path / name).write_text("".join(lines), encoding="utf-8")
    return path / name


def read(path: Path, text, name="edges.txt", *, directed=False):
    content = text.encode() if isinstance(text, str) else text
    (path / name).write_bytes(content)
    return _cli_edges.read_graph(path / name, directed=directed, start=silent)


def names_of(graph):
    return None if graph.names is None else [name.decode() for name in graph.names]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_as_the_library(tmp_path, dtype):
    edges = two_groups()
    out = tmp_path / "emb.npy"
    done = run("embed", write(tmp_path, edges), "-o", out, *SMALL, "--dtype", dtype)
    assert done.exit_code == 0, done.output
    adjacency = np.zeros((40, 40))
    np.add.at(adjacency, tuple(edges.T), 1)
    adjacency += np.triu(adjacency.T, 1) + np.tril(adjacency.T, -1)
    operator = random_walk(
        scipy_sparse.csr_array(adjacency), length=2, dtype=np.dtype(dtype)
    )
    expected = EDRep(4, max_iter=6, random_state=0).fit(operator).embedding_
    rows = np.load(out)
    assert rows.dtype == dtype
    eps = float(np.finfo(dtype).eps)
    # Walks of other roundings, and six rotations that depend on them.
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e3 * eps)
    assert "loss" in done.output
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "edges.csv",
        "emb.npy",
    ]


def kinds(edges):
    """Return the same graph, written in many ways."""
    comma = "".join(f"{a},{b}\n" for a, b in edges)
    blank = comma.replace(",", " ")
    return {
        "comma.csv": comma,
        "header.csv": "source,target\n" + comma,
        "other_header.csv": "\n# one\nthe one, the other \n" + comma,
        "weights.csv": comma.replace("\n", ",1\n"),
        "weighted_header.csv": "a,b,w\n" + comma.replace("\n", ", 1.0e0\n"),
        "tabs.tsv": comma.replace(",", "\t"),
        "semicolons.csv": comma.replace(",", ";"),
        "blanks.edges": "# a comment\n\n" + blank.replace("\n", " \n "),
        "comments.txt": blank.replace("\n", "\n# more\n", 3) + "\n\n",
        "windows.txt": "\ufeff" + blank.replace("\n", "\r\n"),
        "last_line.txt": blank.rstrip("\n"),
        "packed.csv.gz": gzip.compress(comma.encode()),
    }


@pytest.mark.parametrize("block", [5, 100, 2**21])
def test_kinds_of_text(tmp_path, monkeypatch, block):
    monkeypatch.setattr(_cli_edges, "_BLOCK_BYTES", block)
    edges = two_groups()
    for name, text in kinds(edges).items():
        graph = read(tmp_path, text, name)
        assert graph.names is None, name
        adjacency = graph.adjacency.toarray()
        assert adjacency.shape == (40, 40), name
        assert adjacency.sum() == 2 * len(edges) - (edges[:, 0] == edges[:, 1]).sum()
        assert (adjacency == adjacency.T).all(), name
        for a, b in edges[:5]:
            assert adjacency[a, b] >= 1, name


def test_other_files(tmp_path):
    networkx = pytest.importorskip("networkx")
    edges = two_groups()
    expected = read(tmp_path, kinds(edges)["comma.csv"]).adjacency.toarray()
    scipy_sparse.save_npz(tmp_path / "a.npz", scipy_sparse.coo_matrix(expected))
    plain = networkx.MultiGraph()
    plain.add_nodes_from(range(40))
    plain.add_edges_from(edges.tolist())
    networkx.write_gml(plain, tmp_path / "plain.gml")
    for name in ("a.npz", "plain.gml"):
        graph = _cli_edges.read_graph(tmp_path / name, directed=False, start=silent)
        assert graph.names is None
        assert (graph.adjacency.toarray() == expected).all(), name
    arcs = networkx.DiGraph()
    arcs.add_edge("ä", "b", weight=0.5)
    arcs.add_edge("c", "ä")
    networkx.write_gml(arcs, tmp_path / "arcs.gml")
    graph = _cli_edges.read_graph(tmp_path / "arcs.gml", directed=False, start=silent)
    assert names_of(graph) == ["ä", "b", "c"]
    assert graph.adjacency.toarray().tolist() == [[0, 0.5, 0], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("block", [6, 2**21])
@pytest.mark.parametrize("separator", [" ", "\t", ";", ","])
def test_names_come_in_the_order_of_their_appearance(
    tmp_path, monkeypatch, block, separator
):
    monkeypatch.setattr(_cli_edges, "_BLOCK_BYTES", block)
    lines = [("b", "a"), ("c", "b_1"), ("a", "ü"), ("#x", "c"), ("b", "d")]
    text = "".join(f"{a}{separator}{b}\n" for a, b in lines)
    graph = read(tmp_path, text)
    # A line that starts with # is a comment.
    assert names_of(graph) == ["b", "a", "c", "b_1", "ü", "d"]
    expected = np.zeros((6, 6))
    for a, b in [(0, 1), (2, 3), (1, 4), (0, 5)]:
        expected[a, b] = expected[b, a] = 1
    assert (graph.adjacency.toarray() == expected).all()


@pytest.mark.parametrize("block", [8, 2**21])
def test_integers_with_gaps_and_names_after_integers(tmp_path, monkeypatch, block):
    monkeypatch.setattr(_cli_edges, "_BLOCK_BYTES", block)
    graph = read(tmp_path, "7 5\n5 123456789012345678\n7 0\n", directed=True)
    assert names_of(graph) == ["7", "5", "123456789012345678", "0"]
    assert graph.adjacency.nonzero()[0].tolist() == [0, 0, 1]
    assert graph.adjacency.nonzero()[1].tolist() == [1, 3, 2]
    graph = read(tmp_path, "1 0\n2 1\n0 007\n7 1\n", directed=True)
    assert names_of(graph) == ["1", "0", "2", "007", "7"]
    assert graph.adjacency[4, 0] == 1
    graph = read(tmp_path, "1 2\n2 3\n")
    assert names_of(graph) == ["1", "2", "3"]


def test_quoted_names_and_blanks_in_names(tmp_path):
    text = 'from,to\nNew York , "Paris, Texas"\n"a ""b""",New York\n'
    graph = read(tmp_path, text)
    assert names_of(graph) == ["New York", "Paris, Texas", 'a "b"']
    out = tmp_path / "emb.npy"
    done = run("embed", tmp_path / "edges.txt", "-o", out, *SMALL)
    assert done.exit_code == 0, done.output
    names = (tmp_path / "emb.nodes.txt").read_text(encoding="utf-8")
    assert names == 'New York\nParis, Texas\na "b"\n'


@pytest.mark.parametrize(
    ("first", "below"),
    [
        ("alice,bob,3", "1,2,4"),
        ("from,to,2.5", "from,x,1"),
        ("-1 -2", "1 2"),
        ("007 008", "1 2"),
        ("1.5 2.5", "1 2"),
        ("99999999999999999999 88888888888888888888", "1 2"),
        ("a 99999999999999999999", "1 2"),
    ],
)
def test_a_line_with_a_number_is_no_header(tmp_path, first, below):
    graph = read(tmp_path, f"{first}\n{below}\n")
    fields = first.replace(",", " ").split()
    assert names_of(graph)[:2] == fields[:2]
    assert graph.adjacency.nnz == 4
    assert graph.notes == ()


def test_tells_of_headers_of_other_names(tmp_path):
    assert read(tmp_path, "Source,Target\n0,1\n").notes == ()
    read(tmp_path, "# one\nalice,bob\n0,1\n")
    done = run("embed", tmp_path / "edges.txt", "-o", tmp_path / "emb.npy", *SMALL)
    assert done.exit_code == 0, done.output
    assert "line 2 is taken for a header: 'alice,bob'" in done.stderr


def test_edges_add_up(tmp_path):
    text = "0 1 .5\n1 0 2\n0 0 3\n0 1 1e0\n1 2 0\n"
    adjacency = read(tmp_path, text).adjacency.toarray()
    assert adjacency.tolist() == [[3, 3.5, 0], [3.5, 0, 0], [0, 0, 0]]
    adjacency = read(tmp_path, text, directed=True).adjacency.toarray()
    assert adjacency.tolist() == [[3, 1.5, 0], [2, 0, 0], [0, 0, 0]]
    assert adjacency.dtype == np.float64


def test_weights_are_read_as_python_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    written = ["0", "1.", ".25", "007.50", "1e-3", "+2", "123456789012345678901"]
    for digits in range(1, 18):
        written += [f"{value:.{digits}g}" for value in rng.random(20)]
        written += [f"{value:.{digits}f}" for value in 100 * rng.random(20)]
    for chosen in (written, written[7:], [w for w in written if len(w) < 14]):
        text = "".join(f"{k} {k} {w}\n" for k, w in enumerate(chosen))
        graph = read(tmp_path, text)
        assert graph.adjacency.diagonal().tolist() == [float(w) for w in chosen]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("# nothing\n\n", ["no edges"]),
        ("source,target\n", ["line 1", "header"]),
        ("0\n1\n", ["line 1", "2 or 3 columns", "got 1"]),
        ("0 1 2 3\n", ["line 1", "2 or 3 columns", "got 4"]),
        ("# one\n0,1\n1\n", ["line 3", "expected 2 columns", "got 1"]),
        ("0,1\n1,2,5\n", ["line 2", "expected 2 columns", "got 3"]),
        ("a,b\nc,\n", ["line 2", "target is empty"]),
        ("a,b\n,c\n", ["line 2", "source is empty"]),
        ("a b 1\nb c x\n", ["line 2", "'x' is not a number"]),
        ("0 1 x\n1 2 1\n", ["line 1", "'x' is not a number"]),
        ("0 1 1\n1 2 1_0\n", ["line 2", "'1_0' is not a number"]),
        ("0 1 1\n\n1 2 -1\n", ["line 3", "'-1' is negative"]),
        ("0 1 1\n1 2 nan\n", ["line 2", "'nan' is not finite"]),
        ("0 1 1\n1 2 1e999\n", ["line 2", "not finite"]),
        ("h,k,w\n0,1,1\n1,2,\n", ["line 3", "'' is not a number"]),
        (b"0 1\n\0\0\0\n", ["not text"]),
        (b"0 1\n" + b"x" * 2**20 + b"y\n", ["line 2", "columns"]),
        (b"0 1\n" + b"x" * 2**22, ["line 2", "longer"]),
        (b"\x1f\x8b" + b"0" * 50, ["damaged"]),
        (gzip.compress(b"0 1\n" * 999)[:-9], ["cut short"]),
        (b"PK\x03\x04" + b"\0" * 60, ["damaged"]),
    ],
)
@pytest.mark.parametrize("block", [7, 2**21])
def test_says_what_is_wrong_and_where(tmp_path, monkeypatch, text, words, block):
    monkeypatch.setattr(_cli_edges, "_BLOCK_BYTES", block if len(text) < 999 else 2**19)
    path = tmp_path / "edges.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    refused(run("embed", path, "-o", tmp_path / "emb.npy"), 2, "edges.txt", *words)
    assert [entry.name for entry in tmp_path.iterdir()] == ["edges.txt"]


@pytest.mark.parametrize(
    ("matrix", "options", "words"),
    [
        (np.ones((2, 3)), [], ["square", "(2, 3)"]),
        (np.zeros((2, 2)), [], ["no edges"]),
        (np.ones((2, 2)) * 1j, [], ["complex128"]),
        (np.array([[0, 1], [0, 0]]), [], ["not symmetric", "--directed"]),
        (np.array([[0, 0], [0, -1.0]]), [], ["-1.0", "from 1 to 1"]),
        (np.array([[0, np.nan], [0, 0]]), ["--directed"], ["nan", "from 0 to 1"]),
    ],
)
def test_matrices_that_are_no_graph(tmp_path, matrix, options, words):
    path = tmp_path / "a.npz"
    scipy_sparse.save_npz(path, scipy_sparse.csr_array(matrix))
    done = run("embed", path, "-o", tmp_path / "emb.npy", *options)
    refused(done, 2, "a.npz", *words)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    ("form", "shape", "indices", "indptr"),
    [
        ("csr", (3, 3), [0, 1, 10**8], [0, 1, 2, 3]),
        ("csr", (3, 3), [0, 1, -(10**8)], [0, 1, 2, 3]),
        ("csr", (3, 3), [0, 1, 2], [0, 10**8, 2, 3]),
        ("csc", (3, 3), [0, 1, 2], [0, 3, 1, 3]),
        ("csc", (3, 3), [0, 1, 2], [0, 10**8, 1, 0]),
        ("csr", (3, 3), [0, 1, 2], [0, 2**63 - 1, -2, 3]),
        ("bsr", (6, 6), [0, 1, 10**8], [0, 1, 2, 3]),
        ("bsr", (7, 7), [0, 1, 2], [0, 1, 2, 3]),
    ],
)
def test_damaged_matrices(tmp_path, form, shape, indices, indptr):
    path = tmp_path / "a.npz"
    np.savez(
        path,
        format=form.encode(),
        shape=np.array(shape),
        data=np.ones((3, 2, 2) if form == "bsr" else 3),
        indices=np.array(indices, np.int32),
        indptr=np.array(indptr),
        _is_array=True,
    )
    done = run("embed", path, "-o", tmp_path / "emb.npy", "--directed", *SMALL)
    refused(done, 2, "a.npz", "damaged")


def test_gml_that_is_no_graph(tmp_path):
    pytest.importorskip("networkx")
    path = tmp_path / "a.gml"

    def attempt(text, *words, options=()):
        path.write_text(text, encoding="utf-8")
        done = run("embed", path, "-o", tmp_path / "emb.npy", *options)
        refused(done, 2, "a.gml", *words)

    nodes = "node [ id 0 ] node [ id 1 ]"
    attempt("graph [", "not a graph")
    attempt(f"graph [ {nodes} ]", "no edges")
    edge = "edge [ source 0 target 1 weight -2 ]"
    attempt(f"graph [ {nodes} {edge} ]", "-2", "not negative")
    attempt(f"graph [ {nodes} {edge} ]", "undirected", options=["--directed"])
    attempt(f"graph [ {nodes} {edge.replace('-2', '1' + 400 * '0')} ]", "finite")
    for broken in ("graph 5", "graph [ node 5 ]", "edge 7", "a [ " * 5000):
        attempt(broken, "not a graph")
    attempt('graph [ node [ id "x" label [ a 1 ] ] ]', "not a graph")
    labels = 'node [ id 0 label 1 ] node [ id 1 label "1" ]'
    attempt(f"graph [ {labels} edge [ source 0 target 1 ] ]", "2 nodes", "'1'")


def test_gml_with_labels_that_are_no_names(tmp_path):
    pytest.importorskip("networkx")
    nodes = 'node [ id 5 label "a" ] node [ id 7 label "a" ]'
    path = tmp_path / "a.gml"
    path.write_text(f"graph [ {nodes} edge [ source 7 target 5 ] ]")
    done = run("embed", path, "-o", tmp_path / "emb.npy", *SMALL)
    assert done.exit_code == 0, done.output
    assert "by their ids" in done.stderr
    assert (tmp_path / "emb.nodes.txt").read_text() == "5\n7\n"


def test_directed_and_asymmetric(tmp_path):
    edges = two_groups()
    path = write(tmp_path, edges)
    out, keys = tmp_path / "emb.npy", tmp_path / "keys.npy"
    done = run(
        *("embed", path, "-o", out, *SMALL, "--directed", "--asymmetric"),
        *("--keys", keys, "--gradient", "full", "--clusters", 2),
    )
    assert done.exit_code == 0, done.output
    rows, others = np.load(out), np.load(keys)
    assert rows.shape == others.shape == (40, 4)
    for array in (rows, others):
        norms = np.linalg.norm(array.astype(np.float64), axis=1)
        np.testing.assert_allclose(norms, 1, rtol=0, atol=1e-6)
    assert not np.allclose(rows, others)


def test_seed_decides_and_threads_do_not(tmp_path):
    path = write(tmp_path, two_groups())
    found = []
    for name, extra in {"a": [], "b": ["--threads", 1], "c": ["--seed", 1]}.items():
        out = tmp_path / name
        assert run("embed", path, "-o", out, *SMALL, *extra).exit_code == 0
        found.append(out.read_bytes())
    assert found[0] == found[1] != found[2]


def test_names_are_written_where_they_belong(tmp_path):
    path = write(tmp_path, two_groups())
    out = tmp_path / "emb.npy"
    beside = tmp_path / "emb.nodes.txt"
    numbers = "".join(f"{row}\n" for row in range(40))
    assert run("embed", path, "-o", out, *SMALL).exit_code == 0
    assert not beside.exists()
    asked = tmp_path / "names.txt"
    assert run("embed", path, "-o", out, *SMALL, "--nodes", asked).exit_code == 0
    assert asked.read_text() == numbers
    assert not beside.exists()
    # What needs no names leaves a file alone that may be anybody's.
    beside.write_text("before\n")
    done = run("embed", path, "-o", out, *SMALL)
    assert done.exit_code == 0, done.output
    assert beside.read_text() == "before\n"
    assert "emb.nodes.txt is left as it was" in done.stderr
    named = write(tmp_path, [("a", "b")], "named.csv")
    assert run("embed", named, "-o", out, *SMALL).exit_code == 0
    assert beside.read_text() == "a\nb\n"


def test_outputs_appear_together_or_not_at_all(tmp_path, monkeypatch):
    path = write(tmp_path, [("a", "b"), ("b", "c")])
    replace = pathlib.Path.replace

    def fails(self, target):
        if target.name == "emb.nodes.txt":
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", fails)
    done = run("embed", path, "-o", tmp_path / "emb.npy", *SMALL)
    refused(done, 1, "emb.nodes.txt", "cannot be written")
    assert [entry.name for entry in tmp_path.iterdir()] == ["edges.csv"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_killed_run_leaves_no_output(tmp_path, number):
    path = write(tmp_path, [(f"n{a}", f"n{b}") for a, b in two_groups(2000)])
    out = tmp_path / "emb.npy"
    out.write_bytes(b"before")
    command = [sys.executable, "-m", "subquad.cli", "embed", path, "-o", out]
    command += ["--epochs", "1000000", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not leftovers(tmp_path):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(number)
        message = process.communicate(timeout=60)[1]
    expected = {signal.SIGTERM: (143,), signal.SIGINT: (1, -2)}
    assert process.returncode in expected[number], message
    assert "Traceback" not in message
    assert out.read_bytes() == b"before"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "edges.csv",
        "emb.npy",
    ]


def test_signals_wait_while_files_are_put_in_their_places(tmp_path, monkeypatch):
    path = write(tmp_path, [("a", "b"), ("b", "c")])
    replace = pathlib.Path.replace

    def interrupted(self, target):
        signal.raise_signal(signal.SIGTERM)
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", interrupted)
    done = run("embed", path, "-o", tmp_path / "emb.npy", *SMALL)
    assert done.exit_code == 143
    assert (tmp_path / "emb.nodes.txt").read_text() == "a\nb\nc\n"
    assert np.load(tmp_path / "emb.npy").shape == (3, 4)


def nmi(done: Result) -> float:
    line = next(line for line in done.stdout.splitlines() if line.startswith("NMI"))
    return float(line.split()[1])


def test_labels(tmp_path):
    pytest.importorskip("sklearn")
    edges = two_groups()
    path = write(tmp_path, edges)
    named = write(tmp_path, [(f"n{a}", f"n{b}") for a, b in edges], "named.csv")
    out = tmp_path / "emb.npy"
    groups = np.arange(40) // 20
    labels = tmp_path / "labels.txt"

    def attempt(source, text):
        labels.write_text(text, encoding="utf-8")
        return run(
            *("embed", source, "-o", out, "--labels", labels),
            *("--dim", 8, "--epochs", 30),
        )

    everything = "".join(f"group {group}\n" for group in groups)
    done = attempt(path, everything.replace("group ", "group"))
    assert done.exit_code == 0, done.output
    assert nmi(done) == 1.0
    assert "2 labels of 40 rows" in done.stdout
    some = [("-1", "")[k % 2] if k % 5 == 0 else str(g) for k, g in enumerate(groups)]
    done = attempt(path, "\n".join(some) + "\n")
    assert nmi(done) == 1.0
    assert "2 labels of 32 rows" in done.stdout
    lines = [f"n{k}\tthe {g}" for k, g in enumerate(groups)][::-1]
    lines[3], lines[4] = "n36\t-1", "n35"
    done = attempt(named, "\n".join(["# nodes", *lines, "other\t1"]))
    assert done.exit_code == 0, done.output
    assert nmi(done) == 1.0
    assert "2 labels of 38 rows" in done.stdout
    assert "1 lines name no node" in done.stderr
    lines = [f"{k},{g}" for k, g in enumerate(groups)]
    done = attempt(path, "\n".join(lines))
    assert nmi(done) == 1.0
    # The first node has no label, and a comment may be indented.
    done = attempt(path, "\n".join(["  # nodes", "0", *lines[1:]]))
    assert nmi(done) == 1.0
    assert "2 labels of 39 rows" in done.stdout
    done = attempt(path, "\n".join([" # groups", *map(str, groups)]))
    assert nmi(done) == 1.0
    assert "2 labels of 40 rows" in done.stdout

    out.unlink()
    refused(attempt(path, "0\n1\n"), 2, "each of 40 nodes", "got 2 lines")
    refused(attempt(path, "0 1\n1 0\n0 0\n"), 2, "line 3", "line 1 already")
    refused(attempt(path, "0 1\n1 0 0\n"), 2, "line 2", "got 3 columns")
    refused(attempt(path, "0 1\n1 1\n"), 2, "two labels", "got 1")
    refused(attempt(path, ""), 2, "labels.txt")
    assert not out.exists()


@pytest.mark.parametrize("options", [["--clusters", 2], ["--labels"]])
def test_picture(tmp_path, options):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    path = write(tmp_path, two_groups())
    if options == ["--labels"]:
        labels = tmp_path / "labels.txt"
        labels.write_text("".join(f"{k % 3 - 1}\n" for k in range(40)))
        options = [*options, labels]
    out = tmp_path / "map.png"
    done = run(
        *("embed", path, "-o", tmp_path / "emb.npy", "--picture", out, *SMALL),
        # Threads that wait for each other on a busy machine wait long.
        *(*options, "--threads", 1),
    )
    assert done.exit_code == 0, done.output
    assert out.read_bytes().startswith(b"\x89PNG")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--keys", "k.npy"], "--asymmetric"),
        (["--asymmetric", "--gradient", "symmetric"], "--asymmetric"),
        (["--picture", "p.jpg"], ".png"),
        (["--picture", "p.png", "--dim", 1], "--dim"),
        (["--dim", 0], "--dim"),
        (["--dim", 2**62], "--dim"),
        (["--epochs", 0], "--epochs"),
        (["--learning-rate", 0], "--learning-rate"),
        (["--learning-rate", 1.1], "--learning-rate"),
        (["--gradient", "half"], "--gradient"),
        (["--dtype", "float16"], "--dtype"),
        (["--clusters", 0], "--clusters"),
        (["--nodes", "emb.npy"], "one file"),
        (["--nodes", "edges.csv"], "replace an input"),
        (["--nodes", "missing/names.txt"], "no directory"),
    ],
)
def test_wrong_options(tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [(0, 1)])
    refused(run("embed", "edges.csv", "-o", "emb.npy", *arguments), 2, word)
    assert os.listdir(tmp_path) == ["edges.csv"]


@pytest.mark.parametrize("output", ["/", ".", "..", "x" * 250, "x" * 300])
def test_outputs_that_cannot_be_files(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [("a", "b")])
    refused(run("embed", "edges.csv", "-o", output, *SMALL), 2, output)
    assert os.listdir(tmp_path) == ["edges.csv"]


def test_outputs_beyond_any_disk(tmp_path):
    with (
        pytest.raises(_cli_common.Failed, match="no room"),
        _cli_common.whole_files() as outputs,
    ):
        outputs.array(tmp_path / "emb.npy", (2**31, 2**40), np.float32)
    assert os.listdir(tmp_path) == []


def test_more_clusters_than_nodes(tmp_path):
    path = write(tmp_path, [(0, 1), (1, 2)])
    out = tmp_path / "emb.npy"
    refused(run("embed", path, "-o", out, *SMALL, "--clusters", 9), 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["edges.csv"]


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("scipy", []),
        ("sklearn", ["--labels", "edges.csv"]),
        ("sklearn", ["--picture", "p.png"]),
        ("matplotlib", ["--picture", "p.png"]),
        ("networkx", ["graph.gml"]),
    ],
)
def test_says_what_is_missing(tmp_path, monkeypatch, package, arguments):
    monkeypatch.chdir(tmp_path)
    edges = "graph.gml" if arguments == ["graph.gml"] else "edges.csv"
    write(tmp_path, [("graph", "[", "]")], "graph.gml", " ")
    write(tmp_path, [(0, 1)])
    for name in list(sys.modules):
        if name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    arguments = [] if edges == "graph.gml" else arguments
    done = run("embed", edges, "-o", "emb.npy", *arguments)
    refused(done, 1, package, "pip install")
    assert not (tmp_path / "emb.npy").exists()


def test_help_lists_the_command():
    assert "embed" in run("--help").output
