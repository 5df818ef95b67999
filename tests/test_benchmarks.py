"""The benchmark harness: wrong results are refused, skipped rows say why."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from _arrays import Carrier, Library

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of this copy", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    cuda,
    embedding,
    factors,
    features,
    gpu,
    harness,
    machine,
    revisions,
)
from benchmarks.registry import (  # noqa: E402
    OPERATIONS,
    Case,
    Check,
    Operation,
    Options,
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


@pytest.fixture(autouse=True)
def fresh_garbage():
    """Collect, as the harness does often, without a walk through all modules."""
    for name in ("torch._dynamo", "jax"):
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    gc.freeze()
    yield
    gc.unfreeze()


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
        "overhead", "accuracy", "log_features", "hadamard_transform", "causal_product",
        "random_feature_attention", "feature_fit", "sparse_factor_product", "paramixer",
        "factor_scaling", "operator_chain", "embedding_step", "edrep",
        "gpu_log_normalizer",
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


# ------------------------------------------------------------------- features

FEATURE_OPERATIONS = (
    "log_features", "log_features_vjp", "trigonometric_features", "hadamard_transform",
    "random_feature_attention", "causal_product", "feature_fit",
)  # fmt: skip


def test_features_pass_their_checks_on_small_sizes(tmp_path):
    out = tmp_path / "out.json"
    done = benchmarks(
        *("--op", ",".join(FEATURE_OPERATIONS), "--sizes", "300x12", "--rounds", "1"),
        *("--json", str(out), "--no-memory", "--peers", "subquad,numpy,plain,sklearn"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    rows = results["rows"]
    ours = [row for row in rows if row["peer"].startswith("subquad")]
    assert {row["op"] for row in ours} == set(FEATURE_OPERATIONS)
    assert {row["status"] for row in ours} == {"ok"}, ours
    # Whoever is not there says so.
    for row in rows:
        is_absent = "missing" in row["reason"] or "compiler" in row["reason"]
        assert row["status"] == "ok" or is_absent, row
    limits = [row for row in ours if row["op"] == "log_features"]
    assert all(row["limit"] == max(row["limit_parts"].values()) for row in limits)
    assert "softmax attention" in results["summaries"]["random_feature_attention"][0]


def test_a_copy_has_a_rate(monkeypatch):
    monkeypatch.setattr(features, "_COPY_BYTES", 2**20)
    rates = machine.Rates(1)
    rate = features.copy_rate(rates)
    assert rate > 0
    # Measured once, and listed with the others.
    assert features.copy_rate(rates) == rates.measured["copy"] == rate


def test_the_plain_causal_product_needs_a_compiler(monkeypatch):
    features._compiled_causal_product.cache_clear()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(Skip, match="compiler failed"):
        features._Product(1, 8).plain(1)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Skip, match="no C"):
        features._Product(1, 8).plain(1)


def test_a_fit_of_other_scales_fails_its_check():
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((2, 50, 4))
    for family in features._STATED:
        check_fit = features._check_fit(x, y, family)
        rho = features._closed_form(x, y, family)
        assert check_fit(rho[::-1]).passed
        assert not check_fit(rho * 1.001).passed


def test_fits_are_compared_with_what_is_stated():
    row = {"case": "c", "peer": "subquad", "median": 3e-3, "values": {"stated": 6e-3}}
    absent = row | {"values": {"stated": None}}
    (line,) = features._against_stated([row, absent, row | {"median": None}])
    assert line == "c, subquad: 3 ms, 0.50 of the 6 ms stated"


# -------------------------------------------------------------------- factors

FACTOR_OPERATIONS = (
    "sparse_factor_product", "sparse_factor_product_kept",
    "sparse_factor_product_training", "factor_values", "factor_values_training",
    "paramixer", "paramixer_training", "csr_product", "operator_chain",
    "factor_scaling", "factor_memory",
)  # fmt: skip


def test_factors_pass_their_checks_on_small_sizes(tmp_path, monkeypatch):
    # What makes times good is not needed where there is none to tell.
    monkeypatch.setattr(harness, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(machine.Rates, "fma_peak", lambda self, itemsize: 1e11)
    out = tmp_path / "out.json"
    sizes = ["--sizes", "100x6", "--rounds", "1", "--no-memory"]
    peers = ["--peers", "subquad,scipy", "--json", str(out)]
    assert harness.main(["--op", ",".join(FACTOR_OPERATIONS), *sizes, *peers]) == 0
    rows = json.loads(out.read_text())["rows"]
    ours = [row for row in rows if row["peer"].startswith("subquad")]
    assert {row["op"] for row in ours} == set(FACTOR_OPERATIONS)
    for row in rows:
        assert row["status"] == "ok" or "torch missing" in row["reason"], row


def test_peers_of_factors_compute_the_same():
    torch = pytest.importorskip("torch")
    chain = factors._Chain("cdil", 2, 20, 3)
    for formula in (chain.rolled, chain.gathered):
        assert chain.check(chain.inference(formula)()).passed
        assert chain.check_training(chain.training(formula)()).passed
    assert chain.check(chain.csr()()).passed
    wrong = lambda *arrays: chain.rolled(*arrays) * 1.0001
    assert not chain.check(chain.inference(wrong)()).passed
    assert not chain.check_training(chain.training(wrong)()).passed
    block = factors._Block("chord", 2, 20, 3)
    assert block.check(block.torch()()).passed
    assert block.check_training(block.torch_training()()).passed
    assert block.check_block(block.inference(block.rolled)()).passed
    found = block.step(block.rolled)()
    assert block.check_step(found).passed
    found[0] *= 1.0001
    assert not block.check_step(found).passed
    assert torch.is_grad_enabled()


def test_offsets_of_the_benchmarks():
    for n in (1, 2, 20, 64):
        chord, cdil = (factors.offsets_of(name, n) for name in ("chord", "cdil"))
        assert len(chord) == len(cdil) == max(1, math.ceil(math.log2(n)))
        assert chord[-1][:3] == (0, 1, 2)[: len(chord[-1])]
        assert cdil[-1][1] == cdil[-1][5] * -1 == 2 ** (len(cdil) - 1)


def test_reads_and_copies_have_rates(monkeypatch):
    rates = machine.Rates(2)
    assert factors.read_rate(rates, 1e5) > 0
    assert factors.copy_rate(rates, 1e5) > 0
    # Measured once, and listed with the others.
    assert set(rates.measured) == {"read 0.0625 MiB", "copy 0.0625 MiB"}
    monkeypatch.setattr(factors, "_quickest", None)
    assert factors.copy_rate(rates, 9e4) == rates.measured["copy 0.0625 MiB"]


def test_a_walk_of_the_benchmarks_has_rows_that_sum_to_one():
    pytest.importorskip("scipy")
    matrix = factors.random_graph(300)
    sums = np.asarray(matrix.sum(axis=1)).ravel()
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(sums[np.diff(matrix.indptr) > 0], 1, rtol=1e-6)
    # Some nodes have many neighbours, some few.
    assert np.diff(matrix.indptr).max() > 30


def test_growth_of_factors_is_drawn_and_told(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")

    def row(pattern, n, power):
        terms = n * n.bit_length() ** power
        values = {"n": n, "pattern": pattern, "terms": terms}
        return {"median": 1e-9 * terms, "values": values}

    rows = [row("cdil", n, 1) for n in (64, 128)] + [row("chord", n, 2) for n in (8, 9)]
    lines = factors._growth(rows)
    assert lines[0].startswith("chord: 1 to 1 ns a term")
    factors._plot_scaling(rows, str(tmp_path / "growth.png"))
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------ embedding

EMBEDDING_OPERATIONS = ("embedding_step", "edrep")


def test_embeddings_pass_their_checks_on_small_sizes(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.setattr(harness, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(machine.Rates, "fma_peak", lambda self, itemsize: 1e11)
    for name in ("read_rate", "copy_rate"):
        monkeypatch.setattr(embedding, name, lambda rates, size: 1e10)
    out = tmp_path / "out.json"
    sizes = ["--sizes", "100x6", "--rounds", "1", "--no-memory"]
    operations = ["--op", ",".join(EMBEDDING_OPERATIONS), "--json", str(out)]
    assert harness.main([*operations, *sizes]) == 0
    results = json.loads(out.read_text())
    rows = results["rows"]
    ours = [row for row in rows if row["peer"].startswith("subquad")]
    assert {row["op"] for row in ours} == set(EMBEDDING_OPERATIONS)
    for row in rows:
        is_absent = row["peer"] in ("torch", "edrep") and "missing" in row["reason"]
        assert row["status"] == "ok" or is_absent, row
    limits = [row["limit"] for row in ours if row["peer"] == "subquad"]
    assert all(limit > 0 for limit in limits)
    if "nmi" in ours[-1]["values"]:
        assert "NMI" in results["summaries"]["edrep"][-1]


def test_wrong_embeddings_are_seen():
    pytest.importorskip("scipy")
    for k in (1, 3):
        epoch = embedding._Epoch(60, 5, k, has_matrix=True)
        out, attraction, log_z = epoch.scipy()()
        assert epoch.check((out, attraction, log_z)).passed
        for wrong in (
            (out * np.float32(1.0001), attraction, log_z),
            (out, attraction + 1e-4, log_z),
            (out, attraction, log_z + 1e-4),
        ):
            assert not epoch.check(wrong).passed
    fit = embedding._Fit(300)
    found = fit.scipy()()
    assert fit.check(found).passed
    assert not fit.check(fit.start).passed
    assert not fit.check(2 * found).passed


def test_the_plain_fit_descends():
    pytest.importorskip("scipy")
    fit = embedding._Fit(300)
    start = fit.start.astype(float)
    losses = [
        embedding.objective(
            fit.walk, 3, embedding.plain_fit(fit.walk, 3, epochs, 1.0, start)
        )
        for epochs in (0, 2, 10, 50)
    ]
    assert losses == sorted(losses, reverse=True)
    np.testing.assert_allclose(
        np.linalg.norm(embedding.plain_fit(fit.walk, 3, 9, 0.8, start), axis=1), 1
    )


# -------------------------------------------------------------------- on a GPU

CARD = cuda.Card("NVIDIA X100 8GB (test)", (9, 0), 4, 1e9, 2**33, "13.0")
GPU_OPERATIONS = {
    "gpu_log_normalizer", "gpu_log_normalizer_vjp", "gpu_gaussian", "gpu_clusters",
    "gpu_fit", "gpu_overhead", "gpu_logcumsumexp", "gpu_logcumsumexp_vjp",
    "gpu_causal_attention", "gpu_causal_attention_vjp", "gpu_attention_step",
    "gpu_log_features", "gpu_log_features_vjp", "gpu_hadamard_transform",
    "gpu_sparse_factor_product", "gpu_sparse_factor_product_training",
    "gpu_factor_values", "gpu_csr_product", "gpu_embedding_step", "gpu_edrep",
}  # fmt: skip


TILED = "torch logsumexp, tiled"


class FakeDevice(cuda.Device):
    """A card whose arrays are those of torch on the CPU."""

    def __init__(self):
        super().__init__(CARD)
        self.timed = []

    def torch(self):
        return pytest.importorskip("torch")

    def tensor(self, a):
        return self.torch().from_numpy(a)

    def timer(self, library):
        def seconds_per_call(call, repeats):
            self.timed.append(library)
            for _ in range(min(repeats, 2)):
                call()
            return 0.25

        return seconds_per_call

    def free_memory(self):
        return 2.0**30

    def release(self):
        pass

    def _copy_rate(self):
        return 1e9

    def replayed(self, call):
        return call


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_card(monkeypatch):
    def find_card():
        raise Skip("no NVIDIA driver")

    monkeypatch.setattr(cuda, "find_card", find_card)


def test_gpu_benchmarks_on_a_fake_device(tmp_path, monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr(cuda, "place", lambda kind: device)
    monkeypatch.setattr(cuda, "clocks", lambda: {"clocks.sm": "1 MHz"})
    out = tmp_path / "out.json"
    arguments = ["--sizes", "200x8", "--rounds", "2", "--peers", "subquad torch,torch"]
    status = harness.main(["--op", "gpu", "--json", str(out), *arguments])
    results = json.loads(out.read_text())
    rows = results["rows"]
    assert status == 0, [row for row in rows if row["status"] != "ok"]
    assert {row["op"] for row in rows} == GPU_OPERATIONS
    assert {row["status"] for row in rows} == {"ok"}
    # Times are those of the device's own timer, never of the host's clock.
    assert {row["median"] for row in rows} == {0.25}
    assert set(device.timed) == {"torch"}
    assert results["machine"]["device"]["slug"] == "nvidia-x100-8gb-test"
    first = rows[0]
    assert set(first) == ROW_KEYS
    # The parts overlap; a product in float32 is three products of the tensor cores.
    clocks = 4 * 1e9
    assert first["limit_parts"] == {
        "product": pytest.approx(3 * 2 * 200 * 200 * 8 / (2048 * clocks)),
        "memory": pytest.approx(4 * 2 * 200 * 8 / 1e9),
        "exp": pytest.approx(200 * 200 / (16 * clocks)),
    }
    assert first["limit"] == max(first["limit_parts"].values())


def test_a_wrong_result_of_a_device_is_not_timed(monkeypatch):
    import subquad

    right = subquad.log_normalizer
    monkeypatch.setattr(subquad, "log_normalizer", lambda x, y: right(x, y) + 1e-3)
    options = Options(1, None, harness.parse_sizes("50x4"), FakeDevice())
    operation = harness.load_operations()["gpu_log_normalizer"]
    for case_ in operation.cases(options):
        ours, theirs = harness.run_case("gpu", case_, 1, ("subquad torch", TILED))
        assert ours["status"] == "failed check"
        assert ours["median"] is None
        assert theirs["status"] == "ok"
        assert theirs["ratio_to_subquad"] is None


def test_without_a_gpu_nothing_is_measured(tmp_path, capsys, no_card):
    out = tmp_path / "out.json"
    assert harness.main(["--op", "gpu", "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert "device" not in results["machine"]
    assert {row["op"] for row in results["rows"]} == GPU_OPERATIONS
    for row in results["rows"]:
        assert row["reason"] == "not measured: no NVIDIA driver"
        for key in ("median", "limit", "error", "ratio_to_limit", "ratio_to_subquad"):
            assert row[key] is None
    assert "no NVIDIA driver" in capsys.readouterr().out


def test_arrays_of_the_cpu_give_no_results(tmp_path):
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as raised:
        harness.main(["--op", "gpu", "--device", "host", "--json", str(out)])
    assert raised.value.code == 2
    assert not out.exists()


def test_cases_after_the_time_are_cut(tmp_path, operation):
    operation(Peer("subquad", returning(1.0)))
    status, results = run(tmp_path, "--seconds", "1e-9")
    assert status == 0
    assert results["rows"][0]["reason"].startswith("cut")


def test_a_peer_with_a_timer_of_its_own():
    calls = []

    def timer(call, repeats):
        calls.append(repeats)
        return 0.5

    peer = Peer("subquad", returning(1.0), timer=timer)
    start = time.perf_counter()
    (row,) = harness.run_case("fake", case(peer), 3)
    assert row["median"] == 0.5
    assert calls == [1] * 4
    # Only the host's clock needs idle workers to fall asleep.
    assert time.perf_counter() - start < 3 * harness.IDLE_SECONDS


def test_names_of_cards():
    assert cuda.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert cuda.slug(" NVIDIA  RTX (A-100)/x ") == "nvidia-rtx-a-100-x"
    assert CARD.architecture == "90"


DRIVER = """
#include <string.h>
#include <stddef.h>
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int* count) { *count = COUNT; return 0; }
int cuDeviceGet(int* device, int which) { *device = which; return 0; }
int cuDriverGetVersion(int* version) { *version = 13010; return 0; }
int cuDeviceGetName(char* name, int size, int device) {
  strncpy(name, "NVIDIA Test", size); return 0; }
int cuDeviceTotalMem_v2(size_t* size, int device) {
  *size = (size_t)5 << 32; return 0; }
int cuDeviceGetAttribute(int* value, int what, int device) {
  *value = what == 13 ? 1980000 : what == 16 ? 132 : what == 75 ? 10 : 3; return 0; }
"""


def driver(directory, init, count):
    compiler = shutil.which("gcc") or pytest.skip("needs gcc")
    source, library = directory / "driver.c", directory / f"driver{init}{count}.so"
    source.write_text(DRIVER)
    command = [compiler, "-shared", "-fPIC", f"-DINIT={init}", f"-DCOUNT={count}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return str(library)


def test_the_driver_names_its_card(tmp_path):
    card = cuda.find_card(driver(tmp_path, 0, 1))
    assert card == cuda.Card("NVIDIA Test", (10, 3), 132, 1.98e9, 5 << 32, "13.1")
    assert card.architecture == "103"
    with pytest.raises(Skip, match="sees no GPU"):
        cuda.find_card(driver(tmp_path, 0, 0))
    with pytest.raises(Skip, match="cuInit returned CUDA error 999"):
        cuda.find_card(driver(tmp_path, 999, 1))
    with pytest.raises(Skip, match="no NVIDIA driver"):
        cuda.find_card(str(tmp_path / "absent.so"))


def test_rates_of_an_unknown_card_are_unknown():
    device = FakeDevice()
    device.card = cuda.Card("other", (7, 5), 4, 1e9, 1, "13.0")
    assert device.rate("tf32") is None
    assert device.rate("exp") == 16 * 4e9
    assert gpu.limits(device, flops=1.0)["product"] is None


def test_table_of_no_card_has_no_figures():
    table = tool("results_table").gpu_page([])
    assert "Not measured" in table
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    rows = [line for line in rows if "subquad" in line or "torch" in line]
    assert len(rows) > 20
    assert all("| not measured | – | – | – | – |" in line for line in rows)


def test_table_of_a_card():
    facts = FakeDevice().facts() | {"found": {}}
    row = {
        "op": "gpu_x", "case": "c", "peer": "subquad torch", "status": "ok",
        "median": 2e-3, "limit": 1e-3, "ratio_to_limit": 2.0, "ratio_to_subquad": 1.0,
        "error": 1e-6,
    }  # fmt: skip
    document = {
        "machine": {"device": facts, "versions": {"torch": "2"}},
        "rows": [row, row | {"peer": "jax", "status": "skipped"}],
        "steps": [
            {"name": "tests", "status": "ok", "seconds": 9.0, "note": "5 passed"}
        ],
    }
    table = tool("results_table").gpu_page([json.loads(json.dumps(document))])
    assert "NVIDIA X100 8GB (test), capability 9.0" in table
    assert "- tests: ok, 9 s; 5 passed" in table
    assert "| c | subquad torch | 2 ms | 1 ms | 50% | 1.00 | 1.0e-06 |" in table
    assert "| c | jax | not measured | – | – | – | – |" in table


def test_make_gpu_without_a_gpu_ends_at_once(capsys, no_card):
    assert tool("gpu").main([]) == 1
    assert "needs an NVIDIA GPU: no NVIDIA driver" in capsys.readouterr().err


def test_make_gpu_stops_what_takes_too_long(tmp_path, monkeypatch):
    gpu_tool = tool("gpu")
    monkeypatch.setattr(gpu_tool, "WORK", tmp_path)
    monkeypatch.setattr(gpu_tool, "GRACE", 0.5)
    sleep = "import subprocess; subprocess.run(['sleep', '600'])"
    # One that ends when it is asked to, and one that does not.
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " + sleep
    python = [sys.executable, "-c"]
    start = time.monotonic()
    ended = gpu_tool.Run(60, dry=True).together(
        {
            "good": [*python, "print('done')"],
            "bad": [*python, "raise SystemExit(3)"],
            "slow": [*python, sleep],
            "deaf": [*python, deaf],
        },
        2.0,
    )
    assert time.monotonic() - start < 10
    assert {name: process.status for name, process in ended.items()} == {
        "good": "ok", "bad": "failed", "slow": "cut", "deaf": "cut"
    }  # fmt: skip
    assert ended["good"].log.read_text().endswith("done\n")
    assert ended["bad"].returncode == 3


def test_make_gpu_goes_on_after_a_failure(tmp_path, capsys, monkeypatch):
    gpu_tool = tool("gpu")
    monkeypatch.setattr(gpu_tool, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_tool, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_tool, "ROOT", tmp_path)
    monkeypatch.setattr(cuda, "find_card", lambda: CARD)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))

    def broken(*_):
        raise RuntimeError("no compiler")

    def measured(run, step, out):
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps({"machine": {}, "rows": [{"median": 1.0}]}))
        (out.parent / "benchmarks.log").write_text("the log")

    def absent(*_):
        raise Skip("no tool")

    monkeypatch.setattr(gpu_tool, "build", broken)
    monkeypatch.setattr(gpu_tool, "tests", lambda *_: None)
    monkeypatch.setattr(gpu_tool, "sanitize", absent)
    monkeypatch.setattr(gpu_tool, "measure", measured)
    assert gpu_tool.main([]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: no compiler" in printed
    results = json.loads((tmp_path / "nvidia-x100-8gb-test.json").read_text())
    assert results["rows"] == [{"median": 1.0}]
    steps = {step["name"]: step["status"] for step in results["steps"]}
    assert steps == {
        "build": "failed", "tests": "ok", "sanitize": "skipped", "benchmarks": "ok"
    }  # fmt: skip
    copies = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert copies == ["gpu.log", "nvidia-x100-8gb-test.json"]
    assert "the log" in (tmp_path / "out" / "gpu.log").read_text()


def test_tests_that_ran_nothing_are_no_success(tmp_path):
    gpu_tool = tool("gpu")
    report = tmp_path / "report.xml"
    process = gpu_tool.Process("ok", 0, tmp_path / "log")
    xml = '<testsuites><testsuite tests="{}" failures="0" errors="0" skipped="{}"/>'
    report.write_text(xml.format(7, 7) + "</testsuites>")
    assert gpu_tool.counted(report, process) == (False, "0 passed, 0 failed, 7 skipped")
    report.write_text(xml.format(9, 2) + "</testsuites>")
    assert gpu_tool.counted(report, process) == (True, "7 passed, 0 failed, 2 skipped")
    assert not gpu_tool.counted(tmp_path / "absent.xml", process)[0]


def test_small_cases_run_on_numpy_arrays():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "sanitize_cases.py")]
        + ["--library", "numpy"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for operation in (
        "log_normalizer", "vjp.log_normalizer", "gaussian_log_normalizer",
        "vjp.gaussian_log_normalizer", "GaussianNormalizer",
    ):  # fmt: skip
        assert f"\ncase {operation} " in "\n" + done.stdout


def test_the_suite_on_a_device():
    """torch on the CPU in the place of a device: which tests run, and that they do."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + ["tests/test_primitives.py", "tests/test_normalizers.py", "tests/test_isa.py"]
        + ["-k", "ties or masked_everything or isa", "-rA"],
        cwd=ROOT,
        env=os.environ | {"SUBQUAD_TEST_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED tests/test_primitives.py::test_the_lowest_index" in done.stdout
    assert "::test_masked_everything[torch]" in done.stdout
    assert "2 passed" in done.stdout


def test_arrays_are_carried_to_a_device_and_back():
    torch = pytest.importorskip("torch")
    carrier = Carrier(Library("torch", torch))
    seen = []

    def inner(x):
        seen.append(type(x))
        return x

    def function(x, *, y):
        seen.extend([type(x), type(y)])
        return carried_inner(x), y + 1, "text"

    carried_inner = carrier.carried(inner)
    first, second, third = carrier.carried(function)(np.ones(2), y=np.zeros(3))
    # A call from within the library is left alone.
    assert seen == [torch.Tensor] * 3
    assert type(first) is type(second) is np.ndarray
    np.testing.assert_array_equal(second, np.ones(3))
    assert third == "text"
    with pytest.raises(AssertionError, match="on the CPU"):
        carrier.carried(lambda x: np.ones(1))(np.ones(1))
