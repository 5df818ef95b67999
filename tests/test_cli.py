"""The command line: results, streaming, errors, and interrupted runs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("click", reason="the command line needs click")

from click.testing import CliRunner, Result

import subquad
from subquad import cli


def exact(x, y, *, exclude_self=False):
    score = np.asarray(x, float) @ np.asarray(y, float).T
    if exclude_self:
        np.fill_diagonal(score, -np.inf)
    top = score.max(axis=1)
    return top + np.log(np.exp(score - top[:, None]).sum(axis=1))


def rows(n=700, d=6, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    centres = 0.5 * rng.standard_normal((4, d))
    # Sorted by group: the beginning of the file tells nothing of the rest.
    label = np.sort(rng.integers(4, size=n))
    return (centres[label] + 0.1 * rng.standard_normal((n, d))).astype(dtype)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def save(path: Path, array, name="keys.npy") -> Path:
    np.save(path / name, array)
    return path / name


def leftovers(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.name.endswith(".part")]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("chunk", [1, 97, 700, 5000])
def test_exact(tmp_path, dtype, chunk):
    y = rows(n=120 if chunk == 1 else 700, dtype=dtype)
    out = tmp_path / "z.npy"
    done = run("normalizers", save(tmp_path, y), "-o", out, "--chunk-rows", chunk)
    assert done.exit_code == 0, done.output
    log_z = np.load(out)
    assert log_z.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(
        log_z, exact(y, y), rtol=1e-13 if dtype == np.float64 else 1e-6
    )
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("chunk", [97, 5000])
@pytest.mark.parametrize("method", ["exact", "gaussian"])
def test_exclude_self(tmp_path, method, chunk):
    y = rows(dtype=np.float64)
    out = tmp_path / "z.npy"
    arguments = ["-o", out, "--exclude-self", "--chunk-rows", chunk, "--method", method]
    assert run("normalizers", save(tmp_path, y), *arguments).exit_code == 0
    if method == "exact":
        truth = exact(y, y, exclude_self=True)
        np.testing.assert_allclose(np.load(out), truth, rtol=1e-13)
    else:
        estimator = subquad.GaussianNormalizer().fit(y)
        expected = estimator.log_normalizer(
            y, self_index=np.arange(len(y)), self_term="exclude"
        )
        np.testing.assert_allclose(np.load(out), expected, rtol=1e-11)


def test_queries_and_temperature(tmp_path):
    y = rows()
    x = rows(n=50, dtype=np.float64, seed=1)
    out = tmp_path / "z.npy"
    done = run(
        *("normalizers", save(tmp_path, y), "-o", out, "--temperature", 0.25),
        *("--queries", save(tmp_path, x, "queries.npy"), "--chunk-rows", 33),
    )
    assert done.exit_code == 0, done.output
    log_z = np.load(out)
    assert log_z.dtype == np.float64
    np.testing.assert_allclose(log_z, exact(4 * x, y), rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_self_term_is_exact_at_any_temperature(tmp_path, temperature):
    # One key far from the others: nearly all of its sum is its own term.
    y = np.concatenate([rows(dtype=np.float64), np.full((1, 6), 3.0)])
    out = tmp_path / "z.npy"
    done = run(
        *("normalizers", save(tmp_path, y), "-o", out, "--method", "gaussian"),
        *("--temperature", temperature),
    )
    assert done.exit_code == 0, done.output
    assert np.load(out)[-1] == pytest.approx(54.0 / temperature, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--components", 4],
        ["--components", 4, "--covariance", "diag"],
        ["--components", 2, "--covariance", "low_rank", "--rank", 2],
        ["--components", 4, "--control-samples", 200, "--seed", 3],
    ],
)
def test_gaussian_counts_every_key_once(tmp_path, options):
    y = rows()
    x = np.zeros((3, 6), np.float32)
    out = tmp_path / "z.npy"
    done = run(
        *("normalizers", save(tmp_path, y), "-o", out, "--method", "gaussian"),
        *("--queries", save(tmp_path, x, "queries.npy"), "--chunk-rows", 41, *options),
    )
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(np.load(out), np.log(700), rtol=1e-6)
    assert "predicted error" in done.output


def test_partition_comes_from_the_whole_file(tmp_path):
    y = rows(n=4000, dtype=np.float64)
    errors = {}
    for k in (1, 4):
        out = tmp_path / f"{k}.npy"
        done = run(
            *("normalizers", save(tmp_path, y), "-o", out, "--method", "gaussian"),
            *("--components", k, "--chunk-rows", 300, "--temperature", 0.25),
        )
        assert done.exit_code == 0, done.output
        errors[k] = np.abs(np.load(out) - exact(4 * y, y)).mean()
    assert errors[4] < 0.05 * errors[1]


def test_seed_and_chunks_decide_nothing_else(tmp_path):
    keys = save(tmp_path, rows(n=3000))
    found = []
    for name, extra in {"a": [], "b": [], "c": ["--threads", 1]}.items():
        arguments = ["--method", "gaussian", "--components", 3, "--seed", 5, *extra]
        out = tmp_path / name
        assert run("normalizers", keys, "-o", out, *arguments).exit_code == 0
        found.append(out.read_bytes())
    assert found[0] == found[1] == found[2]


def test_archives_and_layouts(tmp_path):
    y = rows()
    np.savez(tmp_path / "a.npz", emb=y, words=np.array(["a", "b"]))
    save(tmp_path, np.asfortranarray(y), "fortran.npy")
    save(tmp_path, y.astype(">f4"), "swapped.npy")
    out = tmp_path / "z.npy"
    for name in ("a.npz", "fortran.npy", "swapped.npy"):
        done = run("normalizers", tmp_path / name, "-o", out, "--chunk-rows", 100)
        assert done.exit_code == 0, done.output
        np.testing.assert_allclose(np.load(out), exact(y, y), rtol=1e-6)


def test_no_queries_give_an_empty_file(tmp_path):
    queries = save(tmp_path, np.zeros((0, 6), np.float32), "queries.npy")
    for method in ("exact", "gaussian"):
        out = tmp_path / f"{method}.npy"
        done = run(
            *("normalizers", save(tmp_path, rows()), "--queries", queries),
            *("-o", out, "--method", method),
        )
        assert done.exit_code == 0, done.output
        assert np.load(out).shape == (0,)


def test_output_keeps_the_usual_permissions(tmp_path):
    out = tmp_path / "z.npy"
    mask = os.umask(0o022)
    try:
        assert run("normalizers", save(tmp_path, rows()), "-o", out).exit_code == 0
    finally:
        os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o644


def refused(done: Result, code: int, *words: str) -> None:
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.output


def test_unusable_files(tmp_path):
    out = tmp_path / "z.npy"

    def attempt(content, code, *words):
        path = tmp_path / "bad.npy"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content)
        refused(run("normalizers", path, "-o", out), code, *words)
        assert not out.exists()
        assert leftovers(tmp_path) == []

    refused(run("normalizers", tmp_path / "none.npy", "-o", out), 2, "does not exist")
    attempt(b"", 2, "empty")
    attempt(b"word,word\n" * 9, 2, "not a NumPy")
    attempt(b"PK\x03\x04" + b"\0" * 60, 2, "damaged")
    attempt(save(tmp_path, rows()).read_bytes()[:3000], 2, "cut short")
    attempt(np.array([{}], object), 2, "no array of numbers")
    attempt(np.zeros(5), 2, "shape (5,)")
    attempt(np.zeros((2, 3, 4)), 2, "shape (2, 3, 4)")
    attempt(np.zeros((2, 3), int), 2, "int64", "astype")
    attempt(np.zeros((2, 3), complex), 2, "complex128")
    attempt(np.zeros((2, 3), np.longdouble), 2, "float32 or float64")
    attempt(np.zeros((0, 3)), 2, "no keys")
    attempt(np.zeros((3, 0)), 2, "no columns")


@pytest.mark.parametrize("method", ["exact", "gaussian"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_names_the_row_that_is_not_finite(tmp_path, method, value):
    y = rows()
    y[567, 2] = value
    out = tmp_path / "z.npy"
    arguments = ["-o", out, "--method", method, "--chunk-rows", 50]
    done = run("normalizers", save(tmp_path, y), *arguments)
    refused(done, 1, "keys.npy", "row 567", str(np.float32(value)))
    assert not out.exists()
    assert leftovers(tmp_path) == []


def test_mismatched_columns_and_archives(tmp_path):
    keys = save(tmp_path, rows())
    queries = save(tmp_path, np.zeros((3, 7), np.float32), "queries.npy")
    out = tmp_path / "z.npy"
    done = run("normalizers", keys, "--queries", queries, "-o", out)
    refused(done, 2, "queries.npy", "6 columns", "got 7")
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 2)), b=np.zeros((2, 2)))
    refused(run("normalizers", tmp_path / "two.npz", "-o", out), 2, "a, b")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--components", 2], "--method gaussian"),
        (["--method", "gaussian", "--components", 0], "--components"),
        (["--method", "gaussian", "--rank", 2], "low_rank"),
        (["--temperature", 0], "positive"),
        (["--temperature", "nan"], "positive"),
        (["--threads", 0], "--threads"),
        (["--chunk-rows", 0], "--chunk-rows"),
        (["--method", "guess"], "--method"),
    ],
)
def test_wrong_options(tmp_path, arguments, word):
    keys = save(tmp_path, rows())
    done = run("normalizers", keys, "-o", tmp_path / "z.npy", *arguments)
    refused(done, 2, word)


def test_exclude_self_needs_queries_that_are_keys(tmp_path):
    keys = save(tmp_path, rows())
    done = run(
        *("normalizers", keys, "--queries", keys, "-o", tmp_path / "z.npy"),
        "--exclude-self",
    )
    refused(done, 2, "--exclude-self")


def test_more_components_than_keys(tmp_path):
    keys = save(tmp_path, rows(n=5))
    out = tmp_path / "z.npy"
    done = run(
        *("normalizers", keys, "-o", out, "--method", "gaussian", "--components", 9)
    )
    assert "Traceback" not in done.output
    if done.exit_code == 0:
        np.testing.assert_allclose(np.load(out), exact(rows(n=5), rows(n=5)), rtol=1e-3)
    else:
        refused(done, 1)
        assert not out.exists()


def test_unusable_outputs(tmp_path):
    keys = save(tmp_path, rows())
    before = keys.read_bytes()
    refused(run("normalizers", keys, "-o", tmp_path), 2, "directory")
    missing = tmp_path / "missing" / "z.npy"
    refused(run("normalizers", keys, "-o", missing), 2, "no directory")
    refused(run("normalizers", keys, "-o", keys), 2, "replace an input")
    assert keys.read_bytes() == before
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    refused(run("normalizers", keys, "-o", fifo), 2, "plain file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_directory(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    done = run("normalizers", save(tmp_path, rows()), "-o", closed / "z.npy")
    refused(done, 2, "not writable")


def test_full_disk_is_known_at_once(tmp_path, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    out = tmp_path / "z.npy"
    out.write_bytes(b"before")
    done = run("normalizers", save(tmp_path, rows()), "-o", out)
    refused(done, 1, "no room for 2800 bytes", "nothing was written")
    assert out.read_bytes() == b"before"
    assert leftovers(tmp_path) == []


def test_file_size_limit(tmp_path):
    pytest.importorskip("resource")
    keys = save(tmp_path, rows(n=2000))
    # Limits itself, for preexec_fn would fork, which some libraries warn of.
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from subquad.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, "normalizers", keys, "-o", "z.npy"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "no room" in done.stderr
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.npy"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_run_leaves_no_output(tmp_path, number):
    keys = save(tmp_path, rows(n=100_000))
    out = tmp_path / "z.npy"
    out.write_bytes(b"before")
    command = [sys.executable, "-m", "subquad.cli", "normalizers", keys, "-o", out]
    command += ["--chunk-rows", "500"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not leftovers(tmp_path):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(number)
        message = process.communicate(timeout=60)[1]
    # CPython ends by the signal itself where it met the interrupt inside `exec`, which
    # a module that is just being loaded may have called.
    expected = {signal.SIGTERM: (143,), signal.SIGINT: (1, -2), signal.SIGKILL: (-9,)}
    assert process.returncode in expected[number], message
    assert "Traceback" not in message
    assert out.read_bytes() == b"before"
    if number != signal.SIGKILL:
        assert leftovers(tmp_path) == []


def test_config_and_version():
    shown = run("config")
    assert shown.exit_code == 0, shown.output
    assert subquad.__version__ in shown.output
    assert subquad.__version__ in run("--version").output


def test_help_lists_the_commands():
    text = run("--help").output
    for name in ("demo", "normalizers", "config"):
        assert name in text


def test_demo(tmp_path):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure.png"
    done = run("demo", "--quick", "-o", out)
    assert done.exit_code == 0, done.output
    assert out.read_bytes().startswith(b"\x89PNG")
    for word in (
        "exact",
        "k=2",
        "random Fourier",
        "positive orthogonal",
        "Where it stops",
    ):
        assert word in done.output
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_demo_says_what_is_missing(tmp_path, monkeypatch, package):
    for name in list(sys.modules):
        if name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    done = run("demo", "--quick", "-o", tmp_path / "figure.png")
    refused(done, 1, package, "pip install")


def test_without_click_a_message(tmp_path):
    code = "import sys; sys.modules['click'] = None; import subquad.cli"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        'the command line needs click: pip install "subquad[cli]"'
    )


def test_features_of_the_demo_are_unbiased():
    from subquad import _demo

    y = _demo.unit_rows(rows(n=500, d=8))
    queries = np.arange(0, 500, 25)
    truth = exact(y[queries], y)
    for estimate in (_demo._random_fourier, _demo._positive_orthogonal):
        draws = [np.exp(estimate(y, queries, seed)[0] - truth) for seed in range(30)]
        mean, spread = np.mean(draws, axis=0), np.std(draws, axis=0) / 30**0.5
        assert (np.abs(mean - 1) < 5 * spread).all()
    everything = _demo._subsample(y, queries, 0)[0]
    np.testing.assert_allclose(everything, truth, rtol=1e-6)
