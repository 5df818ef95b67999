"""Every instruction-set level gives the answers of the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import subquad as sq

SCRIPT = r"""
import sys
import numpy as np
from _oracle import *
import subquad as sq
from subquad import GaussianNormalizer

assert sq.get_isa() == sys.argv[1], (sq.get_isa(), sys.argv[1])
rng = np.random.default_rng(0)
saved = {}

def empty(*args, _new=np.empty, **kwargs):
    a = _new(*args, **kwargs)
    a.fill(np.nan if a.dtype.kind == "f" else np.iinfo(a.dtype).max)
    return a

np.empty = empty

for dtype in (np.float32, np.float64):
    name = np.dtype(dtype).name
    for n, m, d in [(1, 1, 1), (5, 7, 3), (12, 32, 32), (13, 33, 33), (6, 17, 64),
                    (97, 130, 31), (64, 96, 100), (3, 515, 300), (130, 5, 600)]:
        x = (rng.standard_normal((n, d)) / d**0.25).astype(dtype)
        y = (rng.standard_normal((m, d)) / d**0.25).astype(dtype)
        lw = rng.standard_normal(m).astype(dtype)
        lw[::3] = -np.inf
        index = rng.integers(-1, m, n)
        grad = rng.standard_normal(n).astype(dtype)
        check_log_normalizer(sq.log_normalizer(x, y), x, y)
        options = dict(log_weights=lw, self_index=index, self_term="exclude")
        out = sq.log_normalizer(x, y, **options)
        check_log_normalizer(out, x, y, lw, index)
        got = sq.vjp.log_normalizer(grad, x, y, **options)
        expected = log_normalizer_vjp(grad, x, y, lw, index)
        for a, (value, bound) in zip(got, expected):
            assert_within(a, value, 2 * bound)
        saved[f"exact-{name}-{n}-{m}-{d}"] = out
    x = (1e4 * rng.standard_normal((9, 5))).astype(dtype)
    check_log_normalizer(sq.log_normalizer(x, x), x, x)
    bad = x.copy(); bad[3, 2] = np.nan
    check_log_normalizer(sq.log_normalizer(bad, x), bad, x)
    bad[3, 2] = np.inf
    check_log_normalizer(sq.log_normalizer(x, bad), x, bad)
    for n, k, d, r in [(1, 1, 1, 1), (13, 5, 33, 33), (31, 13, 7, 3),
                       (33, 2, 64, 64), (97, 40, 5, 0)]:
        x = rng.standard_normal((n, d)).astype(dtype)
        arrays = [a.astype(dtype) for a in (
            rng.standard_normal(k), rng.standard_normal((k, d)),
            rng.standard_normal((k, d, r)) / d**0.5)]
        diagonal = rng.random((k, d)).astype(dtype)
        out = sq.gaussian_log_normalizer(x, *arrays)
        check_gaussian(out, x, *arrays)
        out = sq.gaussian_log_normalizer(x, *arrays, diagonal=diagonal)
        check_gaussian(out, x, *arrays, diagonal)
        saved[f"closed-{name}-{n}-{k}"] = out
    labels = np.arange(200) % 3
    y = (rng.standard_normal((200, 9)) + 6 * np.eye(9)[labels]).astype(dtype)
    x = rng.standard_normal((20, 9)).astype(dtype)
    index = np.arange(200)
    for covariance_type in ("full", "diag"):
        est = GaussianNormalizer(3, covariance_type=covariance_type, random_state=0)
        est.fit(y)
        partition = est.labels_
        assert len({tuple(partition[labels == a]) for a in range(3)}) == 3
        value = closure(x, y, partition, 3, None, covariance_type).astype(float)
        scale = np.abs(x @ y.T).max() + 1
        np.testing.assert_allclose(
            est.log_normalizer(x), value, rtol=0, atol=32 * np.finfo(dtype).eps * scale)
        saved[f"labels-{name}-{covariance_type}"] = partition
np.savez(sys.argv[2], **saved)
"""


def levels():
    from subquad import _core

    return _core.isa_levels()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("isa")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
        "SUBQUAD_NUM_THREADS": "1",
    }
    done = {}
    for level in levels():
        done[level] = subprocess.run(
            [sys.executable, "-c", SCRIPT, level, str(folder / f"{level}.npz")],
            env={**environment, "SUBQUAD_ISA": level},
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )
    return folder, done


def test_every_level_passes(results):
    _, done = results
    assert done
    for level, process in done.items():
        assert process.returncode == 0, f"{level}:\n{process.stderr}"


def test_levels_agree(results):
    folder, done = results
    first, *others = [dict(np.load(folder / f"{level}.npz")) for level in done]
    for other in others:
        for key, value in first.items():
            if key.startswith("labels"):
                np.testing.assert_array_equal(other[key], value, err_msg=key)
            else:
                eps = np.finfo(value.dtype).eps
                np.testing.assert_allclose(
                    other[key], value, rtol=256 * eps, atol=256 * eps, err_msg=key
                )


def test_the_current_level_is_one_of_them():
    assert sq.get_isa() in levels()


def test_setting_the_level():
    before = sq.get_isa()
    try:
        for level in levels():
            sq.set_isa(level)
            assert sq.get_isa() == level
            x = np.ones((5, 3))
            np.testing.assert_allclose(sq.log_normalizer(x, x), 3 + np.log(5))
    finally:
        sq.set_isa(before)
    with pytest.raises(ValueError, match="v9"):
        sq.set_isa("v9")
    assert sq.get_isa() == before


def test_workspaces_serve_every_level():
    """What asks for one may run later, at a level that was selected meanwhile."""
    sizes = {
        "factor_values_workspace": (1, 3, 100, 20, 17, 5, 4, 0),
        "factor_values_vjp_workspace": (1, 3, 100, 20, 17, 5, 4, 0),
        "log_features_workspace": (1, 100, 33, 20, 0, 4, 0),
    }
    from subquad import _core

    before = sq.get_isa()
    try:
        found = set()
        for level in levels():
            sq.set_isa(level)
            found.add(tuple(getattr(_core, f)(*size) for f, size in sizes.items()))
    finally:
        sq.set_isa(before)
    assert len(found) == 1


CHANGES = r"""
import threading
import time
import numpy as np
import subquad as sq
from subquad import _core

levels = _core.isa_levels()
rng = np.random.default_rng(0)
# Rows of 20 numbers: whole vectors at one level, and not at another.
x = rng.standard_normal((500, 7, 20)).astype(np.float32)
values = rng.standard_normal((500, 4, 7, 3)).astype(np.float32)
weights = [rng.standard_normal(s).astype(np.float32)
           for s in [(4, 17, 20), (4, 17), (4, 3, 17), (4, 3)]]
calls = [
    lambda: sq.sparse_factor_product(values, x, pattern=[0, 1, 2]),
    lambda: sq.factor_values(x, weights),
    lambda: sq.log_features(x, weights[0][0], weights[1][0], None),
]
expected = [call() for call in calls]
stop = threading.Event()

def change():
    while not stop.is_set():
        sq.set_isa(levels[0])
        sq.set_isa(levels[-1])

thread = threading.Thread(target=change)
thread.start()
try:
    end = time.monotonic() + 1
    while time.monotonic() < end:
        for call, first in zip(calls, expected):
            np.testing.assert_allclose(call(), first, rtol=1e-3, atol=1e-3)
finally:
    stop.set()
    thread.join()
"""


def test_level_changed_during_calls():
    """A call packs and reads memory at one level from its beginning to its end."""
    run = subprocess.run(
        [sys.executable, "-c", CHANGES],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
