"""The studies of embeddings: their machinery, and their tables."""

from __future__ import annotations

import bz2
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import subquad as sq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

scipy_sparse = pytest.importorskip("scipy.sparse")

from tools.embedding import (  # noqa: E402
    _common,
    _peers,
    communities,
    gradients,
    peers,
    scale,
    words,
)

if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of this copy", allow_module_level=True)


# ---------------------------------------------------------------------------- graphs


def test_block_model_has_the_degrees_and_links_that_are_asked_for() -> None:
    c, c_out, n = 12.0, 3.0, 8000
    graph = _common.block_model(n, c=c, c_out=c_out, seed=1)
    a, labels = graph.adjacency, graph.labels
    assert a.shape == (len(labels),) * 2
    assert (a != a.T).nnz == 0
    assert a.diagonal().max() == 0
    assert set(a.data.tolist()) == {1.0}
    degrees = np.diff(a.indptr)
    assert degrees.min() == 1
    # 48,000 edges, give or take their root, less some that were drawn twice.
    assert a.nnz / n == pytest.approx(c, rel=0.03)
    rows = np.repeat(labels, degrees)
    outside = float(np.mean(rows != labels[a.indices]))
    assert outside == pytest.approx(3 * c_out / 4 / c, rel=0.05)
    # E θ² of the expected degrees.
    spread = float(np.sum(degrees.astype(float) ** 2) / n - a.nnz / n) / c**2
    assert spread == pytest.approx(2.826, rel=0.1)
    again = _common.block_model(n, c=c, c_out=c_out, seed=1)
    assert (again.adjacency != a).nnz == 0
    np.testing.assert_array_equal(again.labels, labels)


def test_strength_is_one_at_the_threshold() -> None:
    assert gradients.strength(4.0) == pytest.approx(3.19, abs=0.01)
    assert gradients.strength(10.0) == 0


def test_graphs_are_read(tmp_path: Path) -> None:
    edges = b"0 1\n1 2\n0 1\n"
    (tmp_path / "g.edges.gz").write_bytes(gzip.compress(edges))
    (tmp_path / "g.labels.gz").write_bytes(gzip.compress(b"5\n-1\n7\n0\n"))
    graph = _common.read_graph(tmp_path, "g")
    assert graph is not None
    expected = np.zeros((4, 4))
    expected[[0, 1, 1, 2], [1, 0, 2, 1]] = 1
    np.testing.assert_array_equal(graph.adjacency.toarray(), expected)
    assert graph.labels.tolist() == [5, -1, 7, 0]
    assert graph.title == "g, 4 nodes, 2 edges"
    parts = _common.csr_parts(graph.adjacency)
    np.savez(tmp_path / "h.npz", **parts, shape=(4, 4), lab=graph.labels)
    other = _common.read_graph(tmp_path, "h")
    assert other is not None
    np.testing.assert_array_equal(other.adjacency.toarray(), expected)
    assert _common.read_graph(tmp_path, "absent") is None


def test_agreement_is_that_of_nodes_with_labels() -> None:
    pytest.importorskip("sklearn")
    labels = np.repeat([0, 1, -1], 10)
    rows = np.eye(3)[labels] * np.linspace(1, 9, 30)[:, None]
    assert _common.nmi(rows, labels) == pytest.approx(1)
    rows[20:] = np.random.default_rng(0).standard_normal((10, 3))
    assert _common.nmi(rows, labels) == pytest.approx(1)


# ------------------------------------------------------------------- other programs


def test_walks_follow_edges() -> None:
    graph = _common.block_model(300)
    lone = scipy_sparse.block_diag([graph.adjacency, np.zeros((1, 1))]).tocsr()
    walks = _peers.walks(lone, 9, np.random.default_rng(0))
    assert walks.shape == (lone.shape[0], 9)
    np.testing.assert_array_equal(walks[:, 0], np.arange(lone.shape[0]))
    for t in range(8):
        assert np.all(lone[walks[:-1, t], walks[:-1, t + 1]] == 1)
    assert set(walks[-1]) == {lone.shape[0] - 1}
    same = _peers.graph_of(_common.csr_parts(graph.adjacency))
    # Sums of up to 50 equal parts of one.
    steps = _peers.walk_of(same).sum(axis=1)
    np.testing.assert_allclose(steps, 1, rtol=50 * np.finfo(float).eps)


def test_peers_run_in_a_process_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    code = _common.PEERS.read_text(encoding="utf-8").replace(
        "PROGRAMS = {",
        "PROGRAMS = {\n    'twice': lambda i, o: lambda s: 2 * i['a'] + s,",
    )
    program.write_text(code, encoding="utf-8")
    monkeypatch.setattr(_common, "PEERS", program)
    found, seconds = _common.run_peer("twice", {"a": np.arange(3)}, seeds=[0, 5])
    assert [rows.tolist() for rows in found] == [[0, 2, 4], [5, 7, 9]]
    assert len(seconds) == 2
    with pytest.raises(RuntimeError, match="KeyError"):
        _common.run_peer("twice", {"b": np.arange(3)}, seeds=[0])
    program.write_text("import no_such_package\n", encoding="utf-8")
    with pytest.raises(_common.Absent, match="no_such_package"):
        _common.run_peer("twice", {}, seeds=[0])
    with pytest.raises(_common.Absent, match="no_such_package"):
        _common.package_folder("no_such_package", sys.executable)
    assert _common.package_folder("json", sys.executable).name == "json"


# ----------------------------------------------------------------------------- words


MARKUP = """{{Infobox|name={{nested|x}}}}
'''Anarchism''' is a [[political philosophy|philosophy]] of [[society]].&lt;ref name="a"
&gt;not this&lt;/ref&gt; [[File:x.jpg|thumb|A [[caption]] here]] It is old.
{| class="wikitable"
| cell || other
|}
== Heading ==
See [http://example.org a page].
[[de:Anarchismus]]
"""


def test_articles_lose_their_markup(tmp_path: Path) -> None:
    path = tmp_path / "dump.xml.bz2"
    page = f'<page><text xml:space="preserve">{MARKUP}</text></page>'
    path.write_bytes(bz2.compress(page.encode()))
    text = words.wikipedia(path)
    assert [" ".join(sentence) for sentence in text.sentences] == [
        "anarchism is a philosophy of society it is old",
        "see a page",
    ]
    assert text.title == "wikipedia, 12 words"


def test_nouns_are_linked_to_what_they_are(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    lines = [
        "  1 the licence",
        "00000001 03 n 01 entity 0 001 ~ 00000005 n 0000 | all there is",
        "00000005 05 n 02 dog 0 hound 1 002 @ 00000001 n 0000 ~ 00000009 n 0000 | it",
        "00000009 05 n 01 Rex 0 002 @i 00000005 n 0000 + 00000001 v 0101 | a dog",
    ]
    (tmp_path / "data.noun").write_text("\n".join(lines), encoding="utf-8")
    graph = _common.nouns(tmp_path)
    assert graph.adjacency.toarray().tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    assert graph.labels.tolist() == [3, 5, 5]


def test_glosses_follow_their_words(tmp_path: Path) -> None:
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("  1 This software\n")
    noun = (
        "00001740 03 n 02 entity 0 living_thing 0 001 ~ 00001930 n 0000 | that which "
        'is; "an example"\n'
    )
    adjective = "00001741 00 a 01 able(p) 0 000 | having power\n"
    (tmp_path / "data.noun").write_text(f"  1 This software\n{noun}")
    (tmp_path / "data.adj").write_text(adjective)
    assert words.glosses(tmp_path).sentences == [
        ["entity", "that", "which", "is", "an", "example"],
        ["able", "having", "power"],
    ]


def test_bigrams_count_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "bigrams.txt"
    path.write_text("\ufeffa b 3\nb a 4\nb c 5\nc c 6\n", encoding="utf-8")
    names, matrix = words.bigrams(path)
    assert names == ["a", "b", "c"]
    expected = [[0, 7, 0], [7, 0, 5], [0, 5, 12]]
    np.testing.assert_array_equal(matrix.toarray(), expected)


def test_correlation_of_ranks() -> None:
    rows = np.array([[1.0, 0], [2, 1], [0, 3], [-1, 0]])
    index = dict(zip("abcd", range(4), strict=True))
    pairs = words.pairs_of(
        ["# a heading", "A b 9", "a\tc 5", "a d 1", "a x 3", "A b 9"]
    )
    assert len(pairs) == 4
    assert words.spearman(rows, index, pairs) == (pytest.approx(1), 3)
    assert words.spearman(rows, index, pairs[:2]) == (None, 2)


def test_words_of_a_text_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "OF_TEXTS", words.OF_TEXTS._replace(epochs=2, dim=4))
    monkeypatch.setattr(words, "run_peer", absent)
    text = words.Text("text", [list("abcab"), list("abc")] * 5)
    pairs = [("a", "b", 1.0), ("a", "c", 2.0), ("b", "c", 3.0)]
    rows = words.measure_text(text, {"set": pairs}, range(2), None)
    assert [row["method"] for row in rows] == ["EDRep", "EDRep, two steps"]
    assert rows[0]["scores"]["set"]["pairs"] == 3
    page = words.page({"rows": rows, "machine": MACHINE})
    assert page.splitlines()[2].startswith("| text, 40 words | EDRep | ")


# ---------------------------------------------------------------------------- tables

MACHINE = {"processor": "a machine", "threads": 2}


def absent(*arguments: Any, **options: Any) -> Any:
    raise _common.Absent("missing")


def small(n: int, **options: Any) -> _common.Graph:
    return _common.block_model(200, seed=n % 7)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write where nothing is lost, and let no other program run."""
    monkeypatch.setattr(_common, "RESULTS", tmp_path)
    monkeypatch.setattr(_common, "PAGES", tmp_path)
    for module in (communities, peers):
        monkeypatch.setattr(module, "run_peer", absent)
    setting = communities.PUBLISHED._replace(epochs=3, dim=6)
    for module in (communities, peers, gradients):
        monkeypatch.setattr(module, "PUBLISHED", setting)
    monkeypatch.setattr(communities, "FULL", setting)
    monkeypatch.setattr(communities, "WORDNET", tmp_path / "absent")
    monkeypatch.setattr(scale, "SETTING", setting)
    monkeypatch.setattr(communities, "block_model", small)
    monkeypatch.setattr(gradients, "block_model", small)
    return tmp_path


@pytest.mark.parametrize(
    "study, arguments, n_rows",
    [
        (communities, ["--seeds", "1"], 3),
        (peers, ["--seeds", "1"], 1),
        (gradients, ["--graphs", "1"], 5),
        (scale, ["--nodes", "300"], 1),
    ],
)
def test_pages_are_made_of_results(
    study: Any, arguments: list[str], n_rows: int, written: Path
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("networkx")
    folder = ["--data", str(written / "absent")]
    assert study.main([*folder, *arguments, "--quick"]) == 0
    assert not list(written.iterdir())
    assert study.main([*folder, *arguments]) == 0
    page, results = sorted(written.iterdir(), key=lambda path: path.suffix)[::-1]
    document = json.loads(results.read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    assert study.page(document) == text
    assert document["study"] == study.__name__.rpartition(".")[2]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + n_rows
    assert len({line.count(" | ") for line in lines}) == 1


def test_exact_loss_is_that_of_the_formula() -> None:
    graph = _common.block_model(120)
    walk = sq.embedding.random_walk(graph.adjacency, length=2)
    x = _common.unit_rows(np.random.default_rng(0).standard_normal((120, 3)))
    x = x[: graph.adjacency.shape[0]]
    p = np.eye(len(x))
    p = np.stack([walk @ row for row in p], axis=1)
    scores = x @ x.T
    log_z = np.log(np.exp(scores).mean(axis=1))
    expected = np.mean(log_z - (p * scores).sum(axis=1) + scores.mean(axis=1))
    assert gradients.exact_loss(walk, x) == pytest.approx(expected, rel=1e-12)


def test_durations() -> None:
    assert _common.brief_seconds(0.0123) == "12 ms"
    assert _common.brief_seconds(0.456) == "456 ms"
    assert _common.brief_seconds(4.56) == "4.6 s"
    assert _common.brief_seconds(456.0) == "456 s"
    assert _common.mean_sd([1.0, 2.0]) == "1.500 ± 0.500"
