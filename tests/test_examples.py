"""The examples run, at sizes that take seconds."""

from __future__ import annotations

import gzip
import importlib.util
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_character_language_model(capsys):
    pytest.importorskip("torch")
    sizes = "--steps 3 --context 32 --batch 2 --width 32 --layers 1 --tokens 120"
    assert load("character_language_model").main(sizes.split()) == 0
    printed = capsys.readouterr().out
    losses = printed.split("loss on unseen text")[1].splitlines()[1:3]
    assert [line.split()[0] for line in losses] == ["log-domain", "softmax"]
    # Before much is learned a character costs about as much as any other.
    assert all(2.0 < float(line.split()[1]) < 6.0 for line in losses)
    assert "written with the state of constant size" in printed


def test_a_step_is_the_model():
    torch = pytest.importorskip("torch")
    example = load("character_language_model")
    torch.manual_seed(0)
    text = torch.randint(0, 10, (1, 12))
    for kind in (example.LinearAttention, example.SoftmaxAttention):
        model = example.Model(10, kind, 32, 2)
        with torch.no_grad():
            expected = model(text)[0]
            states = model.start()
            for t in range(text.shape[1]):
                logits, states = model.step(text[0, t], states)
                torch.testing.assert_close(logits, expected[t], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ Paramixer


def paramixer(*arguments):
    """Return the example, its options and the task."""
    example = load("paramixer")
    options = example.parser().parse_args(arguments)
    return example, options, example.task_of(options)


def test_paramixer(capsys):
    pytest.importorskip("torch")
    sizes = "--length 16 --width 8 --batch 4 --steps 4 --every 2 --unseen 100"
    for choice in ("--task adding", "--task order --pattern cdil --head mean"):
        arguments = [*sizes.split(), *choice.split()]
        assert load("paramixer").main(arguments) == 0
        printed = capsys.readouterr().out
        table = printed.split("milliseconds a step")[1].splitlines()[1:]
        pattern = "cdil" if "cdil" in choice else "chord"
        assert [line.split()[0] for line in table] == [pattern, "softmax"]


@pytest.mark.parametrize(
    "name, pattern, start, end, wrong",
    # At first the loss of four equally likely answers, log 4, or more than that of the
    # best constant sum, 1/24.
    [("order", "chord", 1.2, 0.5, 20), ("adding", "cdil", 1 / 24, 0.01, 30)],
)
def test_paramixer_learns(name, pattern, start, end, wrong):
    pytest.importorskip("torch")
    sizes = "--length 16 --width 16 --batch 20 --steps 250 --every 250 --unseen 200"
    example, options, task = paramixer(
        "--task", name, "--pattern", pattern, *sizes.split()
    )
    model = example.model_of(pattern, task, options)
    outcome = example.train(model, task, options, report=str)
    assert np.mean(outcome.losses[:20]) > start
    assert np.mean(outcome.losses[-20:]) < end
    assert outcome.error < wrong
    # Nothing of it is left to chance.
    options.steps = 20
    model = example.model_of(pattern, task, options)
    again = example.train(model, task, options, report=str)
    assert again.losses == outcome.losses[:20]


def test_paramixer_block_is_the_product_of_its_networks():
    torch = pytest.importorskip("torch")
    example, _, _ = paramixer()
    torch.manual_seed(0)
    for pattern, residual in (("chord", "step"), ("cdil", "input")):
        block = example.Paramixer(12, 6, pattern, residual)
        x, v = torch.randn(2, 3, 12, 6)
        y = v
        offsets = [0, 1, 2, 4, 8]
        for m in range(4):
            hidden = x @ block.weight_in[m].T + block.bias_in[m]
            hidden = torch.nn.functional.gelu(hidden)
            values = hidden @ block.weight_out[m].T + block.bias_out[m]
            if pattern == "cdil":
                links = [1, 2, 3, 4, -1, -2, -3, -4]
                offsets = [0, *(link * 2**m for link in links)]
            added = y if residual == "step" else v
            y = added + sum(
                values[..., [k]] * y.roll(-offset, 1)
                for k, offset in enumerate(offsets)
            )
        # Four factors, whose results are of size 10 at most.
        torch.testing.assert_close(block(x, v), y, rtol=1e-5, atol=1e-5)


def test_tasks_of_paramixer():
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    example, _, adding = paramixer("--length", "20")
    inputs, targets = adding.draw(generator, 50)
    marked = inputs[..., 1] == 1
    assert (marked.sum(dim=1) == 2).all()
    assert inputs[..., 0].abs().max() <= 1
    sums = (inputs[..., 0] * marked).sum(dim=1)
    torch.testing.assert_close(targets, 0.5 + sums / 4)
    assert not adding.wrong(targets[:, None] + 0.03, targets).any()
    assert adding.wrong(targets[:, None] + 0.05, targets).all()
    order = example.Order(20)
    tokens, classes = order.draw(generator, 50)
    for row, answer in zip(tokens, classes, strict=True):
        first, second = row[row >= 4] - 4
        assert answer == 2 * first + second
    # Errors are those of the same sequences at every step.
    for task in (adding, order):
        assert all(
            torch.equal(a, b)
            for a, b in zip(task.unseen(9), task.unseen(9), strict=True)
        )


def test_images_of_paramixer(tmp_path):
    pytest.importorskip("torch")
    for name, count in (("train", 5), ("t10k", 3)):
        pixels = np.arange(count * 784, dtype=np.uint8).reshape(count, 28, 28)
        header = bytes([0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 28, 0, 0, 0, 28])
        path = tmp_path / f"{name}-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(header + pixels.tobytes()))
        labels = bytes([0, 0, 8, 1, 0, 0, 0, count, *range(count)])
        path = tmp_path / f"{name}-labels-idx1-ubyte.gz"
        path.write_bytes(gzip.compress(labels))
    example, _, task = paramixer("--task", "fashion", "--data", str(tmp_path))
    assert task.length == 784
    images, labels = task.unseen(10)
    assert images.shape == (3, 784, 1)
    assert labels.tolist() == [0, 1, 2]
    assert images[1, 0, 0].item() == pytest.approx(784 % 256 / 255)
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        paramixer("--task", "fashion", "--data", str(tmp_path / "absent"))
    pytest.importorskip("sklearn")
    task = example.digits()
    assert (task.length, len(task.seen[0]) + len(task.others[0])) == (64, 1797)


# -------------------------------------------------------------------------- embeddings


def test_communities(tmp_path, capsys):
    pytest.importorskip("networkx")
    pytest.importorskip("sklearn")
    example = load("communities")
    assert example.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("34 nodes, 78 edges")
    # Two members of the club are between the two groups.
    assert float(printed.split("labels: ")[1]) > 0.7
    # Two cliques, one of which is not in the file of labels.
    cliques = [(f"{c}{i}", f"{c}{j}") for c in "ab" for i in range(6) for j in range(i)]
    lines = [" ".join(pair) for pair in [*cliques, ("a0", "b0")]]
    graph, labels = tmp_path / "edges.gz", tmp_path / "labels.txt"
    graph.write_bytes(gzip.compress("\n".join(lines).encode()))
    labels.write_text("".join(f"b{i} second\n" for i in range(6)))
    given = ["--graph", str(graph), "--labels", str(labels), "--clusters", "2"]
    picture = tmp_path / "graph.png"
    rest = ["--dim", "4", "--epochs", "20", "--seed", "1"]
    if importlib.util.find_spec("matplotlib"):
        rest += ["--picture", str(picture)]
    assert example.main([*given, *rest]) == 0
    printed = capsys.readouterr().out.splitlines()
    members = {frozenset(line.split(": ")[1].split(", ")) for line in printed[1:3]}
    assert members == {frozenset(f"{c}{i}" for i in range(6)) for c in "ab"}
    # Comments are no edges, and a node without a label has none.
    graph.write_bytes(gzip.compress("\n".join(["# a", "# From To", *lines]).encode()))
    labels.write_text("# node label\nb0\n" + labels.read_text())
    assert example.main(given) == 0
    again = capsys.readouterr().out
    assert again.startswith("12 nodes, 31 edges")
    assert "agreement" in again
    with pytest.raises(SystemExit, match="expected 1 to 12, got 13"):
        example.main([*given, "--clusters", "13"])
    graph.write_bytes(gzip.compress(b"# nothing"))
    with pytest.raises(SystemExit, match="no edges"):
        example.main(given)
    if "--picture" in rest:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_words(tmp_path, capsys):
    pytest.importorskip("scipy")
    example = load("words")
    # Words of a kind stand in the same lines.
    generator = np.random.default_rng(0)
    topics = "cat dog cow runs eats sleeps", "car house hat red blue"
    kinds = [topic.split() for topic in topics]
    lines = [" ".join(generator.choice(kinds[i % 2], 8)) for i in range(100)]
    text, scores = tmp_path / "text.txt.gz", tmp_path / "scores.txt"
    text.write_bytes(gzip.compress("\n".join(lines).encode()))
    scores.write_text("cat dog 9\ncat car 1\nred blue 8\nred runs 2\nabsent dog 5\n")
    given = ["--text", str(text), "--similarity", str(scores), "--dim", "8"]
    given += ["--query", "cat", "red", "bird", "--subsample", "1"]
    assert example.main([*given, "--neighbours", "4"]) == 0
    counts, cat, red, bird, correlation = capsys.readouterr().out.splitlines()
    assert counts.startswith("800 words, 11 of them different")
    for line, kind in ((cat, kinds[0]), (red, kinds[1])):
        assert {each.split()[0] for each in line[5:].split(", ")} < set(kind)
    assert bird == "bird: not in the text 5 times"
    assert correlation.endswith(", 4 pairs")
    assert float(correlation.split("correlation ")[1].split(",")[0]) > 0.7
    # A header of known words has no score, and a word is no neighbour of itself.
    scores.write_text("Cat Dog Score\n" + scores.read_text())
    assert example.main([*given, "--neighbours", "99"]) == 0
    _, cat, *_, correlation = capsys.readouterr().out.splitlines()
    assert {each.split()[0] for each in cat[5:].split(", ")} == {
        *(kinds[0] + kinds[1])[1:]
    }
    assert "inf" not in cat
    assert correlation.endswith(", 4 pairs")
    assert len(list(example.sentences(example.manual()))) > 1000


INDEX = """\
Package: editor
Section: editors
Pre-Depends: base
Depends: lib-text (>= 1.0), lib-gui | lib-tui:any

Package: editor-plugin
Section: editors
Depends: editor (= 2.1~rc), absent

Package: lib-text
Section: libs

Package: lib-gui
Section: non-free/libs

Package: lib-tui
Section: libs
Description: is not
 Depends: lib-gui

Package: base
"""


def test_debian_packages(tmp_path, capsys):
    pytest.importorskip("scipy")
    example = load("debian_packages")
    path = tmp_path / "Packages.xz"
    path.write_bytes(lzma.compress(INDEX.encode()))
    query = ["--query", "editor", "absent", "--neighbours", "2", "--dim", "4"]
    assert example.main(["--index", str(path), *query]) == 0
    printed = capsys.readouterr().out
    # The editor's own four, and its plugin's.
    assert printed.startswith("6 packages, 5 dependencies")
    assert "absent: no such package" in printed
    assert "of its own section" in printed
    names, sections, depends = example.read_index(INDEX.splitlines())
    assert dict(zip(names, sections, strict=True))["lib-gui"] == "libs"
    edges, nodes = tmp_path / "edges", tmp_path / "nodes.gz"
    links = np.argwhere(depends.toarray())
    edges.write_text("".join(f"{i} {j}\n" for i, j in links))
    lines = [f"{name}\t{part}\n" for name, part in zip(names, sections, strict=True)]
    nodes.write_bytes(gzip.compress("".join(lines).encode()))
    assert example.main(["--edges", str(edges), "--nodes", str(nodes), *query]) == 0
    again = capsys.readouterr().out
    # Both are read the same, and nothing is left to chance.
    assert again.splitlines()[2:] == printed.splitlines()[2:]
    with pytest.raises(SystemExit, match="--nodes"):
        example.main(["--edges", str(edges)])
    edges.write_text("0 1\n\n0 9\n")
    with pytest.raises(SystemExit, match=r"edge \(0, 9\) among 6 nodes"):
        example.main(["--edges", str(edges), "--nodes", str(nodes)])
    # Fields come in any order.
    turned = "Section: libs\nDepends: b\nPackage: a\n\nPackage: b"
    names, sections, depends = example.read_index(turned.splitlines())
    assert (names, sections) == (["a", "b"], ["libs", ""])
    assert depends.toarray().tolist() == [[0, 1], [0, 0]]
    path.write_bytes(lzma.compress(b"Package: alone\nSection: libs\n"))
    with pytest.raises(SystemExit, match="two packages at least, got 1"):
        example.main(["--index", str(path)])
