"""The benchmark harness: wrong results are refused, skipped rows say why."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of this copy", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks import harness, machine, revisions  # noqa: E402
from benchmarks.registry import (  # noqa: E402
    OPERATIONS,
    Case,
    Check,
    Operation,
    Peer,
    Skip,
    register,
)

ROW_KEYS = {
    "op", "case", "peer", "status", "reason", "median", "min", "max", "rounds", "error",
    "tolerance", "note", "limit", "limit_parts", "ratio_to_limit", "ratio_to_subquad",
    "gflops", "extra_memory", "values",
}  # fmt: skip


def returning(value, seconds=0.0):
    def setup():
        def call():
            time.sleep(seconds)
            return value

        return call

    return setup


def raising(error):
    def setup():
        raise error

    return setup


def failing(error):
    def setup():
        def call():
            raise error

        return call

    return setup


def check(result):
    return Check(abs(result - 1.0), 1e-6)


def case(*peers, **options):
    return Case("case", list(peers), check, **options)


@pytest.fixture
def operation(monkeypatch):
    """Register an operation of one case under the name "fake"."""

    def add(*peers, **options):
        fake = Operation("fake", lambda _: [case(*peers, **options)])
        monkeypatch.setitem(OPERATIONS, "fake", fake)

    return add


def run(tmp_path, *arguments):
    out = tmp_path / "out.json"
    status = harness.main(["--op", "fake", "--json", str(out), *arguments])
    return status, json.loads(out.read_text())


@pytest.mark.parametrize("wrong", [1.1, math.nan, math.inf])
def test_a_wrong_result_is_not_timed(tmp_path, capsys, operation, wrong):
    operation(Peer("subquad", returning(wrong)), Peer("right", returning(1.0)))
    status, results = run(tmp_path)
    assert status == 1
    bad, good = results["rows"]
    assert bad["status"] == "failed check"
    assert bad["median"] is None
    assert good["status"] == "ok"
    assert good["median"] > 0
    assert good["ratio_to_subquad"] is None
    printed = capsys.readouterr().out
    assert "FAILED CHECK" in printed
    assert "no timing reported" in printed


def test_an_exception_fails_the_check(tmp_path, operation):
    operation(Peer("subquad", failing(ValueError("broken"))))
    status, results = run(tmp_path)
    assert status == 1
    assert results["rows"][0]["reason"] == "ValueError: broken"


def test_skipped_peers_say_why(tmp_path, capsys, operation):
    operation(
        Peer("absent", raising(ModuleNotFoundError("no", name="absent_package"))),
        Peer("large", returning(1.0), bytes_needed=1e18),
        Peer("full", failing(MemoryError())),
        Peer("data", raising(Skip("no data"))),
        Peer("here", returning(1.0)),
    )
    status, results = run(tmp_path)
    assert status == 0
    reasons = {row["peer"]: row["reason"] for row in results["rows"]}
    assert reasons["absent"] == "package absent_package missing"
    assert reasons["large"].startswith("memory: needs")
    assert reasons["full"].startswith("memory")
    assert reasons["data"] == "no data"
    statuses = [row["status"] for row in results["rows"]]
    assert statuses == ["skipped"] * 4 + ["ok"]
    printed = capsys.readouterr().out
    for reason in reasons.values():
        assert reason in printed


def test_a_case_that_cannot_be_made_is_a_row(tmp_path, monkeypatch):
    def cases(_):
        raise Skip("no data")
        yield

    monkeypatch.setitem(OPERATIONS, "fake", Operation("fake", cases))
    status, results = run(tmp_path)
    assert status == 0
    assert results["rows"][0]["reason"] == "no data"


def test_json_schema(tmp_path, operation):
    operation(
        Peer("subquad", returning(1.0, 0.001)),
        Peer("slow", returning(1.0, 0.003), limit={"rate": None}),
        limit={"flops": 1e-4, "exp": 2e-4},
        work=1e6,
        values={"n": 3},
    )
    status, results = run(tmp_path, "--rounds", "3")
    assert status == 0
    assert results["schema"] == harness.SCHEMA
    assert {"machine", "rates", "summaries"} <= set(results)
    facts = results["machine"]
    assert {"processor", "cores", "threads", "isa", "blas", "versions"} <= set(facts)
    ours, slow = results["rows"]
    assert set(ours) == set(slow) == ROW_KEYS
    assert ours["rounds"] == 3
    assert ours["min"] <= ours["median"] <= ours["max"]
    assert ours["limit"] == pytest.approx(3e-4)
    assert ours["ratio_to_limit"] == pytest.approx(ours["median"] / 3e-4)
    assert ours["gflops"] == pytest.approx(1e-3 / ours["median"])
    assert ours["values"] == {"n": 3}
    # A rate that was not measured makes no limit.
    assert slow["limit"] is None
    assert slow["limit_parts"] == {"rate": None}
    assert slow["ratio_to_subquad"] > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_peers_are_selected_by_their_first_word(tmp_path, operation):
    operation(
        Peer("subquad", returning(1.0)),
        Peer("torch chunked", returning(1.0)),
        Peer("numpy", returning(1.0)),
    )
    _, results = run(tmp_path, "--peers", "subquad,torch")
    assert [row["peer"] for row in results["rows"]] == ["subquad", "torch chunked"]


def test_peers_take_turns():
    order = []

    def noting(name):
        def setup():
            def call():
                time.sleep(0.11)
                order.append(name)
                return 1.0

            return call

        return setup

    harness.run_case("fake", case(Peer("a", noting("a")), Peer("b", noting("b"))), 3)
    # The check, then in each round a call that warms and one that is timed.
    assert "".join(order) == "ab" + "aabb" + "bbaa" + "aabb"


def test_tiny_calls_are_timed_in_blocks():
    calls = []

    def setup():
        def call():
            calls.append(None)
            return 1.0

        return call

    (row,) = harness.run_case("fake", case(Peer("subquad", setup)), 2)
    assert len(calls) > 1000
    assert row["median"] < 1e-4


def test_sizes():
    sizes = harness.parse_sizes("2000,1e5,20000x384")
    assert [(size.n, size.d) for size in sizes] == [
        (2000, None),
        (100000, None),
        (20000, 384),
    ]
    with pytest.raises(SystemExit, match="--sizes"):
        harness.parse_sizes("many")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--op", "nothing"],
        [],
        ["--op", "fake", "--rounds", "0"],
        ["--op", "fake", "--threads", "0"],
    ],
)
def test_wrong_options(arguments, operation):
    operation(Peer("subquad", returning(1.0)))
    with pytest.raises(SystemExit) as raised:
        harness.main(arguments)
    assert raised.value.code == 2


def test_names_are_registered_once(operation):
    operation()
    with pytest.raises(ValueError, match="twice"):
        register("fake")(lambda _: [])


def test_plot(tmp_path, operation):
    pytest.importorskip("matplotlib")
    operation(
        Peer("subquad", returning(1.0)), Peer("b", returning(1.0)), limit={"a": 1e-6}
    )
    status, _ = run(tmp_path, "--plot", str(tmp_path / "figures"))
    assert status == 0
    assert (tmp_path / "figures" / "fake.png").read_bytes().startswith(b"\x89PNG")


def test_rates_without_a_compiled_measurement(monkeypatch):
    monkeypatch.setitem(sys.modules, "subquad._core", None)
    rates = machine.Rates(2)
    assert rates.exp(4) is None
    assert rates.measured == {"exp float32": None}
    assert machine.seconds(1.0, None) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_extra_memory_sees_what_a_call_holds():
    machine.resident_baseline()
    before = machine.resident_baseline()
    block = bytearray(os.urandom(1024) * (32 * 1024))
    peak = machine.resident_peak() - before
    assert 0.9 * len(block) < peak < 3 * len(block)


def git(*arguments, cwd):
    subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_worktree_of_a_revision_comes_and_goes(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    git("init", "-q", cwd=repository)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for text in ("old", "new"):
        (repository / "file").write_text(text)
        git("add", "file", cwd=repository)
        git(*identity, "commit", "-qm", text, cwd=repository)
    monkeypatch.setattr(revisions, "ROOT", repository)
    with revisions.worktree("HEAD~1", tmp_path / "tree") as tree:
        assert (tree / "file").read_text() == "old"
    assert not (tmp_path / "tree").exists()
    with (
        pytest.raises(SystemExit, match="rev-parse"),
        revisions.worktree("nowhere", tmp_path / "tree"),
    ):
        pass


def test_two_revisions_side_by_side(capsys):
    def results(median, status="ok", reason=""):
        row = {"op": "o", "case": "c", "peer": "subquad", "median": median}
        return {"rows": [row | {"status": status, "reason": reason}]}

    collected = {
        "base": [results(2.0), results(4.0), results(3.0)],
        "head": [results(1.0), results(2.0), results(1.5)],
    }
    (row,) = revisions.summarise(collected, "HEAD")
    assert row["base"] == 3.0
    assert row["head"] == 1.5
    assert row["ratio"] == 2.0
    collected["base"] = [results(None, "skipped", "AttributeError: no such function")]
    (row,) = revisions.summarise(collected, "HEAD")
    assert row["ratio"] is None
    assert "no such function" in capsys.readouterr().out


def benchmarks(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_list_names_every_operation():
    done = benchmarks("--list")
    assert done.returncode == 0, done.stderr
    for name in (
        "tile_product", "log_normalizer", "log_normalizer_vjp", "gaussian", "scaling",
        "overhead", "accuracy",
    ):  # fmt: skip
        assert name in done.stdout


def test_every_operation_passes_its_checks_on_small_sizes(tmp_path):
    out = tmp_path / "out.json"
    operations = "log_normalizer,log_normalizer_vjp,gaussian,scaling,overhead"
    done = benchmarks(
        *("--op", operations, "--sizes", "600x12", "--rounds", "1", "--json", str(out)),
        *("--peers", "subquad,numpy", "--no-memory"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    ours = [row for row in rows if row["peer"].startswith("subquad")]
    assert {row["op"] for row in ours} == set(operations.split(","))
    for row in ours:
        assert row["status"] == "ok" or "torch" in row["reason"], row
