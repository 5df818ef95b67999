"""Threads and instruction sets of the compiled module."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from subquad import _core

PROCESSORS = len(os.sched_getaffinity(0))


def log_normalizer(x, y, log_weights=None, excluded=None):
    n, d = x.shape
    m = y.shape[0]
    out = np.empty(n, x.dtype)
    size = _core.log_normalizer_workspace(1, n, m, d, x.itemsize, 0)
    workspace = np.empty(size, np.uint8)
    _core.log_normalizer(x, y, log_weights, excluded, out, workspace, 0)
    return out


def problem(n, m, d, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((n, d)).astype(dtype),
        rng.standard_normal((m, d)).astype(dtype),
    )


def run(code, timeout=120, **environment):
    """Run Python code with those variables; the text that it prints."""
    base = {
        name: value
        for name, value in os.environ.items()
        if name not in {"SUBQUAD_ISA", "SUBQUAD_NUM_THREADS", "OMP_NUM_THREADS"}
    }
    base["PYTHONPATH"] = os.pathsep.join(
        [os.path.dirname(__file__), base.get("PYTHONPATH", "")]
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=base | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


GET_THREADS = "from subquad import _core; print(_core.get_num_threads())"


@pytest.fixture
def threads():
    """Give back the number of threads that was set before the test."""
    before = _core.get_num_threads()
    yield
    _core.set_num_threads(before)


def test_set_and_get(threads):
    _core.set_num_threads(1)
    assert _core.get_num_threads() == 1
    _core.set_num_threads(PROCESSORS)
    assert _core.get_num_threads() == PROCESSORS


def test_never_more_than_processors(threads):
    _core.set_num_threads(PROCESSORS + 3)
    assert _core.get_num_threads() == PROCESSORS


@pytest.mark.parametrize("n_threads", [0, -1])
def test_set_rejects(threads, n_threads):
    before = _core.get_num_threads()
    with pytest.raises(ValueError, match=f"n_threads: .*at least 1, got {n_threads}"):
        _core.set_num_threads(n_threads)
    assert _core.get_num_threads() == before


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, PROCESSORS),
        ({"SUBQUAD_NUM_THREADS": "1"}, 1),
        ({"SUBQUAD_NUM_THREADS": ""}, PROCESSORS),
        ({"SUBQUAD_NUM_THREADS": str(PROCESSORS + 7)}, PROCESSORS),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1,4"}, 1),
        ({"SUBQUAD_NUM_THREADS": str(PROCESSORS), "OMP_NUM_THREADS": "1"}, PROCESSORS),
        ({"SUBQUAD_NUM_THREADS": "1", "OMP_NUM_THREADS": "2"}, 1),
    ],
)
def test_environment(environment, expected):
    assert run(GET_THREADS, **environment) == str(expected)


def test_affinity_mask():
    one = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    assert run(one + GET_THREADS) == "1"


@pytest.mark.parametrize("value", ["0", "-2", "two", "2.5", "1,2", "99999999999"])
def test_bad_number_in_environment(value):
    code = (
        "try:\n"
        "    from subquad import _core\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    message = run(code, SUBQUAD_NUM_THREADS=value)
    assert f"SUBQUAD_NUM_THREADS: expected a positive integer, got '{value}'" in message


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(777, 1300, 40), (3, 40000, 17), (5000, 3, 8)])
def test_same_bits_for_every_number_of_threads(threads, dtype, shape):
    x, y = problem(*shape, dtype)
    _core.set_num_threads(1)
    expected = log_normalizer(x, y)
    for n_threads in (2, 4):
        _core.set_num_threads(n_threads)
        for _ in range(3):
            assert np.array_equal(log_normalizer(x, y), expected)


FORK = """
import os, sys
import numpy as np
from subquad import _core
from test_threads import log_normalizer, problem

x, y = problem(1500, 2000, 32)
expected = log_normalizer(x, y)
for attempt in range(3):
    child = os.fork()
    if child == 0:
        same = np.array_equal(log_normalizer(x, y), expected)
        _core.set_num_threads(2)
        os._exit(0 if same and _core.get_num_threads() == 1 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert np.array_equal(log_normalizer(x, y), expected)
print(_core.get_num_threads())
"""


def test_fork():
    assert run(FORK, timeout=60) == str(PROCESSORS)


MANY_CALLERS = """
import os, threading, time
import numpy as np
from subquad import _core
from test_threads import log_normalizer, problem

def alive():
    return len(os.listdir("/proc/self/task"))

x, y = problem(600, 2500, 32)
expected = log_normalizer(x, y)
before = alive()
callers = 16
barrier = threading.Barrier(callers + 1)
wrong = []

def call():
    barrier.wait()
    for _ in range(8):
        if not np.array_equal(log_normalizer(x, y), expected):
            wrong.append(1)

threads = [threading.Thread(target=call) for _ in range(callers)]
for thread in threads:
    thread.start()
barrier.wait()
most = 0
while any(thread.is_alive() for thread in threads):
    most = max(most, alive())
    time.sleep(0.0005)
assert not wrong
print(before, most)
"""


def test_many_callers_share_the_processors():
    before, most = map(int, run(MANY_CALLERS).split())
    extra = PROCESSORS - 1
    # The pools of those that run now, and as many threads again in pools kept for
    # later; the main thread's pool was there before.
    assert most <= before + 16 + 2 * extra


def test_extra_threads_are_used():
    code = (
        "import os\n"
        "from test_threads import log_normalizer, problem\n"
        "x, y = problem(1500, 2000, 32)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "log_normalizer(x, y)\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    assert int(run(code)) == PROCESSORS - 1
    assert int(run(code, SUBQUAD_NUM_THREADS="1")) == 0


@pytest.fixture
def isa():
    """Give back the instruction set that was in use before the test."""
    before = _core.get_isa()
    yield
    _core.set_isa(before)


def test_levels(isa):
    levels = _core.isa_levels()
    assert levels == ["neon"] or levels == ["v2", "v3", "v4"][: len(levels)]
    x, y = problem(50, 70, 9, np.float64)
    expected = np.log(np.exp(x @ y.T).sum(axis=1))
    for level in levels:
        _core.set_isa(level)
        assert _core.get_isa() == level
        assert np.allclose(log_normalizer(x, y), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("level", ["v9", "", "V3", "avx2"])
def test_set_isa_rejects(isa, level):
    before = _core.get_isa()
    with pytest.raises(ValueError, match=f"level: expected one of .*, got '{level}'"):
        _core.set_isa(level)
    assert _core.get_isa() == before


@pytest.mark.parametrize("level", _core.isa_levels())
def test_isa_of_environment(level):
    code = (
        "import numpy as np\n"
        "from subquad import _core\n"
        "from test_threads import log_normalizer, problem\n"
        "x, y = problem(333, 444, 21)\n"
        "exact = np.log(np.exp(x.astype(np.float64) @ y.T).sum(axis=1))\n"
        "assert np.allclose(log_normalizer(x, y), exact, rtol=1e-6)\n"
        "print(_core.get_isa())\n"
    )
    assert run(code, SUBQUAD_ISA=level) == level


def test_bad_isa_in_environment():
    code = (
        "try:\n"
        "    from subquad import _core\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    message = run(code, SUBQUAD_ISA="avx512")
    assert "SUBQUAD_ISA: expected one of" in message
    assert "got 'avx512'" in message
