"""Dask: chunks of any shape, nothing computed early, two processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest

import subquad as sq
from _oracle import check_gaussian, check_log_normalizer, closure

dask = pytest.importorskip("dask", reason="dask is not installed")
da = pytest.importorskip("dask.array", reason="dask.array is not installed")


def _refuse(*args, **kwargs):
    raise AssertionError("a lazy call computed something")


@pytest.fixture
def lazy():
    """Inside, any computation of a dask collection is an error."""
    return lambda: dask.config.set(scheduler=_refuse)


def case(seed=0, n=37, m=53, d=7):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((n, d)),
        rng.standard_normal((m, d)),
        rng.standard_normal(m),
        rng.integers(-1, m, n),
    )


CHUNKS = [
    ((37,), (53,), (7,)),
    ((10, 1, 26), (53,), (7,)),
    ((37,), (1, 30, 22), (7,)),
    ((20, 17), (13, 40), (7,)),
    ((20, 17), (13, 40), (3, 1, 3)),
    ((37,), (53,), (5, 2)),
    ((1,) * 37, (26, 27), (7,)),
]


@pytest.mark.parametrize("rows, keys, features", CHUNKS, ids=str)
def test_chunks(rows, keys, features, lazy):
    x, y, lw, index = case()
    lw[4] = -np.inf
    a = da.from_array(x, chunks=(rows, features))
    b = da.from_array(y, chunks=(keys, features))
    with lazy():
        plain = sq.log_normalizer(a, b)
        full = sq.log_normalizer(
            a,
            b,
            log_weights=da.from_array(lw, chunks=(keys,)),
            self_index=da.from_array(index, chunks=(rows,)),
            self_term="exclude",
        )
    for out in (plain, full):
        assert isinstance(out, da.Array)
        assert out.shape == (37,)
        assert out.dtype == np.float64
    check_log_normalizer(plain.compute(), x, y)
    check_log_normalizer(full.compute(), x, y, lw, index)


def test_arguments_chunked_differently(lazy):
    x, y, lw, index = case()
    with lazy():
        out = sq.log_normalizer(
            da.from_array(x, chunks=((10, 27), (3, 4))),
            da.from_array(y, chunks=((13, 40), (2, 5))),
            log_weights=da.from_array(lw, chunks=((7, 46),)),
            self_index=da.from_array(index, chunks=((36, 1),)),
            self_term="exclude",
        )
    check_log_normalizer(out.compute(), x, y, lw, index)


def test_batches(lazy):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((4, 1, 9, 3)), rng.standard_normal((5, 11, 3))
    lw = rng.standard_normal((4, 5, 11))
    with lazy():
        out = sq.log_normalizer(
            da.from_array(x, chunks=((1, 3), 1, (4, 5), 3)),
            da.from_array(y, chunks=((2, 3), (10, 1), (1, 2))),
            log_weights=da.from_array(lw, chunks=(2, 5, 6)),
        )
    assert out.shape == (4, 5, 9)
    check_log_normalizer(out.compute(), x, y, lw)


def test_empty(lazy):
    with lazy():
        none = sq.log_normalizer(da.zeros((3, 2)), da.zeros((0, 2)))
        nobody = sq.log_normalizer(da.zeros((0, 2)), da.zeros((3, 2)))
    assert (none.compute() == -np.inf).all()
    assert nobody.compute().shape == (0,)


def test_float32_and_masks(lazy):
    x, y, lw, _ = (a.astype(np.float32) for a in case())
    lw[:] = -np.inf
    y[3] = np.nan
    with lazy():
        out = sq.log_normalizer(
            da.from_array(x, chunks=10),
            da.from_array(y, chunks=20),
            log_weights=da.from_array(lw, chunks=20),
        )
    assert out.dtype == np.float32
    assert (out.compute() == -np.inf).all()


def test_huge_scores_in_chunks():
    rng = np.random.default_rng(2)
    x, y = 1e4 * rng.standard_normal((9, 4)), 1e4 * rng.standard_normal((30, 4))
    out = sq.log_normalizer(da.from_array(x, chunks=4), da.from_array(y, chunks=(7, 2)))
    check_log_normalizer(out.compute(), x, y)


@pytest.mark.parametrize("diagonal", [False, True])
def test_gaussian(lazy, diagonal):
    rng = np.random.default_rng(3)
    arrays = [
        rng.standard_normal((19, 5)),
        rng.standard_normal(3),
        rng.standard_normal((3, 5)),
        rng.standard_normal((3, 5, 4)) / 2,
    ]
    options = {"diagonal": rng.random((3, 5))} if diagonal else {}
    with lazy():
        out = sq.gaussian_log_normalizer(
            da.from_array(arrays[0], chunks=((10, 9), (2, 3))),
            da.from_array(arrays[1], chunks=((1, 2),)),
            da.from_array(arrays[2], chunks=((2, 1), (4, 1))),
            da.from_array(arrays[3], chunks=(3, 5, 2)),
            **{key: da.from_array(a, chunks=2) for key, a in options.items()},
        )
    assert out.shape == (19,)
    check_gaussian(out.compute(), *arrays, **options)


def test_small_graphs():
    """The number of tasks grows with the chunks, not with the rows."""
    x = da.zeros((100_000, 8), chunks=(10_000, 8))
    y = da.zeros((50_000, 8), chunks=(10_000, 8))
    out = sq.log_normalizer(x, y)
    assert max(out.chunks[0]) == 10_000
    assert len(out.__dask_graph__()) < 2000


def test_unknown_chunks_are_refused_or_right():
    x, y, _, _ = case()
    a = da.from_array(x, chunks=10)
    a = a[a[:, 0] > -100]
    assert np.isnan(a.shape[0])
    try:
        out = sq.log_normalizer(a, da.from_array(y, chunks=20))
    except ValueError:
        return
    check_log_normalizer(out.compute(), x, y)


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_fit(covariance_type, lazy):
    _, y, _, _ = case()
    labels = np.arange(53) % 3
    est = sq.GaussianNormalizer(3, covariance_type=covariance_type).fit(
        da.from_array(y, chunks=((20, 1, 32), (3, 4))),
        labels=da.from_array(labels, chunks=((50, 3),)),
    )
    x = da.from_array(y[:20], chunks=((9, 11), 7))
    with lazy():
        out = est.log_normalizer(x)
        bound = est.error_bound(x)
    assert isinstance(out, da.Array)
    expected = closure(y[:20], y, labels, 3, None, covariance_type).astype(float)
    np.testing.assert_allclose(out.compute(), expected, atol=1e-12)
    assert (bound.compute() > 0).all()


def test_fit_finds_the_same_partition():
    rng = np.random.default_rng(4)
    y = rng.standard_normal((200, 4)) + 8 * np.eye(4)[rng.integers(0, 4, 200)]
    here = sq.GaussianNormalizer(4, random_state=0).fit(y)
    there = sq.GaussianNormalizer(4, random_state=0).fit(
        da.from_array(y, chunks=(70, 4))
    )
    np.testing.assert_array_equal(np.asarray(there.labels_), here.labels_)


def run_on_a_cluster(tmp_path, body):
    """Run the lines against a cluster of two processes, in a fresh interpreter."""
    script = tmp_path / "cluster.py"
    script.write_text(
        textwrap.dedent(
            """
            import numpy as np, dask.array as da, subquad as sq
            from dask.distributed import Client, LocalCluster

            def main():
                rng = np.random.default_rng(0)
                x, y = rng.standard_normal((90, 6)), rng.standard_normal((130, 6))
                a = da.from_array(x, chunks=(40, 6))
                b = da.from_array(y, chunks=(50, 3))
                with LocalCluster(
                    n_workers=2,
                    threads_per_worker=1,
                    processes=True,
                    dashboard_address=None,
                ) as cluster, Client(cluster):
                    check(x, y, a, b)
                print("passed")
            """
        )
        + "\ndef check(x, y, a, b):\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + '\nif __name__ == "__main__":\n    main()\n'
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_functions_on_two_processes(tmp_path):
    pytest.importorskip("distributed", reason="distributed is not installed")
    run_on_a_cluster(
        tmp_path,
        """
        out = sq.log_normalizer(a, b).compute()
        np.testing.assert_allclose(out, sq.log_normalizer(x, y), rtol=1e-13)
        rng = np.random.default_rng(1)
        mixture = [rng.standard_normal(s) for s in (3, (3, 6), (3, 6, 2))]
        out = sq.gaussian_log_normalizer(a, *map(da.from_array, mixture)).compute()
        np.testing.assert_allclose(
            out, sq.gaussian_log_normalizer(x, *mixture), rtol=1e-12
        )
        """,
    )


def test_fit_on_two_processes(tmp_path):
    pytest.importorskip("distributed", reason="distributed is not installed")
    run_on_a_cluster(
        tmp_path,
        """
        here = sq.GaussianNormalizer(2, random_state=0).fit(y + 6 * (y[:, :1] > 0))
        shifted = da.from_array(y + 6 * (y[:, :1] > 0), chunks=(50, 6))
        there = sq.GaussianNormalizer(2, random_state=0).fit(shifted)
        np.testing.assert_allclose(
            there.log_normalizer(a).compute(), here.log_normalizer(x), rtol=1e-10
        )
        """,
    )
