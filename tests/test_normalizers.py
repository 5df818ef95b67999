"""The exact normalizer and the functional Gaussian one against brute force."""

from __future__ import annotations

import numpy as np
import pytest

import subquad as sq
from _arrays import to_numpy
from _oracle import (
    check_gaussian,
    check_log_normalizer,
    epsilon,
    gaussian_log_normalizer,
    log_normalizer,
    log_normalizer_tolerance,
    logsumexp,
)

DTYPES = [np.float32, np.float64]

# (n, m, d): empty, single, odd, prime, around every register tile, beyond every block.
SHAPES = [
    (0, 0, 2),
    (0, 5, 3),
    (5, 0, 31),
    (1, 0, 1),
    (3, 4, 0),
    (1, 1, 1),
    (2, 3, 1),
    (1, 7, 2),
    (7, 1, 3),
    (7, 13, 3),
    (11, 12, 31),
    (12, 11, 32),
    (13, 33, 33),
    (6, 16, 64),
    (5, 15, 50),
    (15, 17, 50),
    (16, 31, 3),
    (17, 32, 64),
    (31, 47, 2),
    (32, 48, 33),
    (33, 49, 31),
    (47, 63, 64),
    (48, 64, 50),
    (49, 65, 100),
    (63, 95, 33),
    (64, 96, 64),
    (65, 97, 3),
    (95, 12, 1),
    (96, 13, 31),
    (97, 130, 100),
    (130, 257, 33),
    (257, 130, 64),
    (515, 257, 3),
    (257, 515, 50),
    (23, 37, 300),
    (13, 65, 600),
    (17, 33, 1100),
    (97, 29, 600),
    (1, 5000, 7),
    (5000, 1, 7),
    (3, 4097, 33),
    (4097, 3, 33),
]


def normal(rng, *shape, dtype=np.float64, scale=1.0):
    return (scale * rng.standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_normalizer_matches_oracle(shape, dtype):
    n, m, d = shape
    rng = np.random.default_rng(n + 1000 * m + d)
    x = normal(rng, n, d, dtype=dtype, scale=1 / max(d, 1) ** 0.25)
    y = normal(rng, m, d, dtype=dtype, scale=1 / max(d, 1) ** 0.25)
    out = sq.log_normalizer(x, y)
    assert type(out) is np.ndarray
    assert out.dtype == dtype
    check_log_normalizer(out, x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
def test_all_options_match_oracle(shape, dtype):
    n, m, d = shape
    rng = np.random.default_rng(n + 1000 * m + d + 1)
    x, y = normal(rng, n, d, dtype=dtype), normal(rng, m, d, dtype=dtype)
    lw = normal(rng, m, dtype=dtype, scale=3)
    lw[::5] = -np.inf
    index = rng.integers(-1, m, n)
    out = sq.log_normalizer(x, y, log_weights=lw, self_index=index, self_term="exclude")
    assert out.dtype == dtype
    check_log_normalizer(out, x, y, lw, index)
    # The self term is part of the exact sum anyway.
    out = sq.log_normalizer(x, y, log_weights=lw, self_index=index)
    check_log_normalizer(out, x, y, lw)


@pytest.mark.parametrize("dtype", DTYPES)
def test_typical_error_is_far_below_the_bound(dtype):
    """A dot product in chunks or in FMA order errs like a random walk, not like d."""
    rng = np.random.default_rng(3)
    x, y = (
        normal(rng, 200, 64, dtype=dtype, scale=0.35),
        normal(rng, 300, 64, dtype=dtype, scale=0.35),
    )
    error = np.abs(sq.log_normalizer(x, y) - log_normalizer(x, y))
    assert error.mean() < 4 * epsilon(dtype)


def test_on_every_library(xp):
    rng = np.random.default_rng(5)
    for dtype in DTYPES:
        x, y = normal(rng, 2, 19, 5, dtype=dtype), normal(rng, 23, 5, dtype=dtype)
        lw = normal(rng, 23, dtype=dtype)
        lw[3] = -np.inf
        index = rng.integers(-1, 23, 19)
        args = xp.asarray(x), xp.asarray(y)
        out = sq.log_normalizer(*args)
        assert type(out) is xp.array_type()
        assert to_numpy(out).dtype == dtype
        check_log_normalizer(to_numpy(out), x, y)
        out = sq.log_normalizer(
            *args,
            log_weights=xp.asarray(lw),
            self_index=xp.asarray(index),
            self_term="exclude",
        )
        assert type(out) is xp.array_type()
        check_log_normalizer(to_numpy(out), x, y, lw, index)


@pytest.mark.parametrize("n, m, d", [(0, 3, 2), (3, 0, 2), (0, 0, 2), (1, 1, 1)])
def test_small_and_empty_on_every_library(xp, n, m, d):
    x, y = np.full((n, d), 0.5), np.full((m, d), 2.0)
    out = to_numpy(sq.log_normalizer(xp.asarray(x), xp.asarray(y)))
    check_log_normalizer(out, x, y)
    assert out.shape == (n,)
    if m == 0:
        assert (out == -np.inf).all()


@pytest.mark.parametrize(
    "bx, by, bw",
    [
        ((3,), (3,), None),
        ((3,), (3,), (3,)),
        ((2, 3), (2, 3), (2, 3)),
        ((1,), (3,), ()),
        ((3,), (1,), (1,)),
        ((3,), (), ()),
        ((), (3,), (3,)),
        ((), (), (3,)),
        ((2, 1), (3,), (2, 1)),
        ((2, 1), (1, 3), (2, 3)),
        ((0,), (1,), ()),
        ((), (2, 0), None),
        ((1, 1), (1,), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batches(bx, by, bw, dtype):
    rng = np.random.default_rng(7)
    x = normal(rng, *bx, 37, 5, dtype=dtype)
    y = normal(rng, *by, 41, 5, dtype=dtype)
    lw = None if bw is None else normal(rng, *bw, 41, dtype=dtype)
    out = sq.log_normalizer(x, y, log_weights=lw)
    batch = np.broadcast_shapes(bx, by, () if bw is None else bw)
    assert out.shape == (*batch, 37)
    check_log_normalizer(out, x, y, lw)
    index = rng.integers(-1, 41, 37)
    out = sq.log_normalizer(x, y, log_weights=lw, self_index=index, self_term="exclude")
    check_log_normalizer(out, x, y, lw, index)


def test_batches_on_every_library(xp):
    rng = np.random.default_rng(8)
    x, y, lw = normal(rng, 2, 1, 7, 3), normal(rng, 3, 9, 3), normal(rng, 1, 3, 9)
    out = sq.log_normalizer(xp.asarray(x), xp.asarray(y), log_weights=xp.asarray(lw))
    check_log_normalizer(to_numpy(out), x, y, lw)


def test_stretched_batches_are_the_batches_repeated():
    rng = np.random.default_rng(9)
    x, y = normal(rng, 3, 33, 5), normal(rng, 35, 5)
    together = sq.log_normalizer(x, y)
    for a in range(3):
        np.testing.assert_array_equal(together[a], sq.log_normalizer(x[a], y))


# -------------------------------------------------------------------- memory layout


def _junk(dtype):
    """What must not be read: NaN, or an index out of range."""
    return np.nan if np.dtype(dtype).kind == "f" else 2**40


def _strided(a):
    big = np.full([2 * s for s in a.shape], _junk(a.dtype), a.dtype)
    view = big[tuple(slice(0, 2 * s, 2) for s in a.shape)]
    view[...] = a
    return view


def _transposed(a):
    return np.ascontiguousarray(a.T).T


def _reversed(a):
    flip = tuple(slice(None, None, -1) for _ in a.shape)
    return np.ascontiguousarray(a[flip])[flip]


def _reversed_rows(a):
    return np.ascontiguousarray(a[::-1])[::-1]


def _unaligned(a):
    buffer = np.zeros(a.nbytes + 1, np.uint8)
    view = buffer[1 : 1 + a.nbytes].view(a.dtype).reshape(a.shape)
    view[...] = a
    assert a.size == 0 or not view.flags.aligned
    return view


def _readonly(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def _inner(a):
    """A window of a larger array: contiguous within a row only."""
    big = np.full([s + 3 for s in a.shape], _junk(a.dtype), a.dtype)
    view = big[tuple(slice(1, 1 + s) for s in a.shape)]
    view[...] = a
    return view


LAYOUTS = [
    _strided,
    _transposed,
    _reversed,
    _reversed_rows,
    _unaligned,
    _readonly,
    _inner,
    np.asfortranarray,
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__.lstrip("_"))
def test_layouts_give_the_same_answer(layout, dtype):
    rng = np.random.default_rng(11)
    x, y = normal(rng, 45, 37, dtype=dtype), normal(rng, 53, 37, dtype=dtype)
    lw, index = normal(rng, 53, dtype=dtype), rng.integers(-1, 53, 45)
    options = {"self_term": "exclude"}
    expected = sq.log_normalizer(x, y, log_weights=lw, self_index=index, **options)
    check_log_normalizer(expected, x, y, lw, index)
    out = sq.log_normalizer(
        layout(x),
        layout(y),
        log_weights=layout(lw),
        self_index=layout(index),
        **options,
    )
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__.lstrip("_"))
@pytest.mark.parametrize("n", [1, 3, 8, 9])
def test_layouts_with_few_rows(n, layout, dtype):
    """Few rows may be read another way than many, right if not bit for bit the same."""
    rng = np.random.default_rng(44)
    x, y = normal(rng, n, 37, dtype=dtype), normal(rng, 553, 37, dtype=dtype)
    lw, index = normal(rng, 553, dtype=dtype), rng.integers(-1, 553, n)
    lw[::7] = -np.inf
    y[7] = np.nan
    out = sq.log_normalizer(
        layout(x),
        layout(y),
        log_weights=layout(lw),
        self_index=layout(index),
        self_term="exclude",
    )
    check_log_normalizer(out, x, y, lw, index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stride_zero_inputs(dtype):
    rng = np.random.default_rng(12)
    row, y = normal(rng, 1, 17, dtype=dtype), normal(rng, 29, 17, dtype=dtype)
    x = np.broadcast_to(row, (21, 17))
    np.testing.assert_array_equal(
        sq.log_normalizer(x, y), sq.log_normalizer(x.copy(), y)
    )
    column = np.broadcast_to(normal(rng, 21, 1, dtype=dtype), (21, 17))
    keys = np.broadcast_to(normal(rng, 1, 17, dtype=dtype), (29, 17))
    lw = np.broadcast_to(dtype(0.25), (29,))
    index = np.broadcast_to(np.int64(4), (21,))
    out = sq.log_normalizer(
        column, keys, log_weights=lw, self_index=index, self_term="exclude"
    )
    check_log_normalizer(out, column, keys, lw, index)


def test_layouts_of_torch_tensors():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(13)
    x, y = normal(rng, 45, 37), normal(rng, 53, 37)
    expected = sq.log_normalizer(x, y)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    for a, b in [
        (tx.T.contiguous().T, ty),
        (tx, torch.cat([ty, ty], 1)[:, :37]),
        (torch.stack([tx, tx], -1)[..., 0], torch.stack([ty, ty], 1)[:, 1]),
    ]:
        np.testing.assert_array_equal(sq.log_normalizer(a, b).numpy(), expected)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8])
def test_index_types(dtype):
    rng = np.random.default_rng(14)
    x, y = normal(rng, 9, 3), normal(rng, 11, 3)
    index = np.arange(9).astype(dtype)
    out = sq.log_normalizer(x, y, self_index=index, self_term="exclude")
    check_log_normalizer(out, x, y, None, index)


# --------------------------------------------------------------------- number types


def test_float16_computes_in_float32(xp):
    rng = np.random.default_rng(15)
    x = normal(rng, 9, 3, dtype=np.float16)
    y = normal(rng, 11, 3, dtype=np.float16)
    lw = normal(rng, 11, dtype=np.float16)
    if xp.name == "array_api_strict":
        pytest.skip("the standard knows no float16")
    out = to_numpy(
        sq.log_normalizer(xp.asarray(x), xp.asarray(y), log_weights=xp.asarray(lw))
    )
    assert out.dtype == np.float32
    check_log_normalizer(out, x, y, lw)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_bfloat16_computes_in_float32(library):
    rng = np.random.default_rng(16)
    x, y = normal(rng, 9, 3, dtype=np.float32), normal(rng, 11, 3, dtype=np.float32)
    if library == "torch":
        torch = pytest.importorskip("torch")
        a, b = (torch.from_numpy(v).bfloat16() for v in (x, y))
        x, y = a.float().numpy(), b.float().numpy()
        out = sq.log_normalizer(a, b)
        assert out.dtype == torch.float32
    else:
        jnp = pytest.importorskip("jax.numpy")
        a, b = (jnp.asarray(v, dtype=jnp.bfloat16) for v in (x, y))
        x, y = (np.asarray(v.astype(jnp.float32)) for v in (a, b))
        out = sq.log_normalizer(a, b)
        assert out.dtype == jnp.float32
    check_log_normalizer(to_numpy(out), x, y)


@pytest.mark.parametrize("narrow", [np.float16, np.float32])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_mixed_precision_computes_in_the_wider(which, narrow):
    rng = np.random.default_rng(43)
    arrays = [normal(rng, 9, 3), normal(rng, 11, 3), normal(rng, 11)]
    arrays[which] = arrays[which].astype(narrow)
    x, y, lw = arrays
    out = sq.log_normalizer(x, y, log_weights=lw)
    assert out.dtype == np.float64
    check_log_normalizer(out, x, y, lw)


# ------------------------------------------------------------------ ranges and masks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [1e3, 1e4])
def test_huge_scores(norm, dtype):
    rng = np.random.default_rng(17)
    x, y = normal(rng, 40, 21, dtype=dtype), normal(rng, 50, 21, dtype=dtype)
    x *= (norm / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)
    y *= (norm / np.linalg.norm(y, axis=1, keepdims=True)).astype(dtype)
    for a, b in [(x, y), (np.abs(x), -np.abs(y)), (np.abs(x), np.abs(y)), (x, x)]:
        out = sq.log_normalizer(a, b)
        assert np.isfinite(out).all()
        check_log_normalizer(out, a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_of_very_different_scales(dtype):
    rng = np.random.default_rng(18)
    x, y = normal(rng, 30, 9, dtype=dtype), normal(rng, 300, 9, dtype=dtype)
    y *= np.logspace(-8, 4, 300).astype(dtype)[:, None]
    for order in (slice(None), slice(None, None, -1), rng.permutation(300)):
        out = sq.log_normalizer(x, y[order])
        check_log_normalizer(out, x, y[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_growing_scores(dtype):
    """Every key beats the one before it: the running maximum moves all the time."""
    x = np.ones((3, 1), dtype)
    y = np.arange(2000, dtype=dtype)[:, None]
    for keys in (y, -y, y / 100, y * 50):
        out = sq.log_normalizer(x, keys)
        check_log_normalizer(out, x, keys)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heavy_tails(dtype):
    rng = np.random.default_rng(19)
    x = rng.standard_t(1.2, (60, 5)).astype(dtype)
    y = rng.standard_t(1.2, (70, 5)).astype(dtype)
    check_log_normalizer(sq.log_normalizer(x, y), x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_and_tiny_entries(dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.full((5, 3), tiny, dtype)
    y = np.full((7, 3), 1e10, dtype)
    check_log_normalizer(sq.log_normalizer(x, y), x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 5, 33, 64])
def test_nan_reaches_what_depends_on_it(d, dtype):
    rng = np.random.default_rng(20)
    x, y = normal(rng, 37, d, dtype=dtype), normal(rng, 41, d, dtype=dtype)
    clean = sq.log_normalizer(x, y)
    bad = x.copy()
    bad[17, d - 1] = np.nan
    out = sq.log_normalizer(bad, y)
    assert np.isnan(out[17])
    others = np.arange(37) != 17
    np.testing.assert_array_equal(out[others], clean[others])

    bad = y.copy()
    bad[40, 0] = np.nan
    assert np.isnan(sq.log_normalizer(x, bad)).all()
    # Excluded from row 5 alone, it reaches all rows but this one.
    index = np.full(37, -1)
    index[5] = 40
    out = sq.log_normalizer(x, bad, self_index=index, self_term="exclude")
    assert np.isnan(out[np.arange(37) != 5]).all()
    check_log_normalizer(out, x, bad, None, index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_weight(dtype):
    rng = np.random.default_rng(21)
    x, y = normal(rng, 5, 3, dtype=dtype), normal(rng, 41, 3, dtype=dtype)
    lw = np.zeros(41, dtype)
    lw[8] = np.nan
    assert np.isnan(sq.log_normalizer(x, y, log_weights=lw)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_masked_key_has_no_influence(xp, value):
    rng = np.random.default_rng(22)
    x, y = normal(rng, 37, 5), normal(rng, 41, 5)
    lw = normal(rng, 41)
    lw[[0, 8, 40]] = -np.inf
    expected = to_numpy(
        sq.log_normalizer(xp.asarray(x), xp.asarray(y), log_weights=xp.asarray(lw))
    )
    y[[0, 8, 40]] = value
    out = to_numpy(
        sq.log_normalizer(xp.asarray(x), xp.asarray(y), log_weights=xp.asarray(lw))
    )
    np.testing.assert_array_equal(out, expected)
    check_log_normalizer(out, x, y, lw)
    keep = lw > -np.inf
    check_log_normalizer(out, x, y[keep], lw[keep])


def test_masked_everything(xp):
    x, y = np.ones((5, 3)), np.ones((7, 3))
    y[2] = np.nan
    lw = np.full(7, -np.inf)
    out = sq.log_normalizer(xp.asarray(x), xp.asarray(y), log_weights=xp.asarray(lw))
    assert (to_numpy(out) == -np.inf).all()


def test_excluding_the_only_key(xp):
    x = np.array([[1.0, 2.0], [3.0, 4.0]])
    y = np.array([[1.0, 1.0]])
    out = sq.log_normalizer(
        xp.asarray(x),
        xp.asarray(y),
        self_index=xp.asarray(np.array([0, -1])),
        self_term="exclude",
    )
    check_log_normalizer(to_numpy(out), x, y, None, np.array([0, -1]))
    assert to_numpy(out)[0] == -np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_excluded_key_has_no_influence_on_its_row(xp, value):
    rng = np.random.default_rng(23)
    x, y = normal(rng, 4, 3), normal(rng, 4, 3)
    y[1] = value
    index = np.array([1, 1, -1, 0])
    out = to_numpy(
        sq.log_normalizer(
            xp.asarray(x),
            xp.asarray(y),
            self_index=xp.asarray(index),
            self_term="exclude",
        )
    )
    check_log_normalizer(out, x, y, None, index)
    assert np.isfinite(out[:2]).all()


def test_infinite_entries(xp):
    """Scores as IEEE has them: inf.0 is NaN, a score of inf gives inf unless NaN."""
    x = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 2.0], [0.0, 1.0], [np.inf, 1.0]])
    for row in ([np.inf, 1.0], [-np.inf, 1.0], [np.inf, -np.inf], [np.inf, np.inf]):
        y = np.array([[0.5, 0.25], row, [1.0, -1.0]])
        out = to_numpy(sq.log_normalizer(xp.asarray(x), xp.asarray(y)))
        check_log_normalizer(out, x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m, d", [(13, 33, 33), (37, 70, 31), (5, 97, 64)])
def test_infinite_entries_in_full_tiles(n, m, d, dtype):
    """Padding must not meet an infinity: inf times a padded zero would be NaN."""
    rng = np.random.default_rng(24)
    x, y = (
        np.abs(normal(rng, n, d, dtype=dtype)),
        np.abs(normal(rng, m, d, dtype=dtype)),
    )
    x += dtype(0.1)
    y += dtype(0.1)
    bad = x.copy()
    bad[n - 1, d - 1] = -np.inf
    out = sq.log_normalizer(bad, y)
    check_log_normalizer(out, bad, y)
    assert out[n - 1] == -np.inf
    bad = y.copy()
    bad[m - 1, d - 1] = -np.inf
    out = sq.log_normalizer(x, bad)
    check_log_normalizer(out, x, bad)
    assert np.isfinite(out).all()
    bad[0, 0] = np.inf
    assert (sq.log_normalizer(x, bad) == np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 8, 9, 50])
@pytest.mark.parametrize("sign", [1, -1])
def test_masked_keys_of_infinite_queries(sign, n, dtype):
    """inf times whatever stands in for a masked key is no score of the row."""
    rng = np.random.default_rng(45)
    x = np.abs(normal(rng, n, 5, dtype=dtype)) + dtype(0.1)
    y = np.abs(normal(rng, 48, 5, dtype=dtype)) + dtype(0.1)
    lw = normal(rng, 48, dtype=dtype)
    lw[[0, 17, 47]] = -np.inf
    y[17] = np.nan
    x[0, 3] = sign * np.inf
    out = sq.log_normalizer(x, y, log_weights=lw)
    check_log_normalizer(out, x, y, lw)
    assert out[0] == sign * np.inf


def test_infinite_weights(xp):
    x, y = np.zeros((2, 1)), np.zeros((3, 1))
    lw = np.array([0.0, np.inf, -np.inf])
    out = sq.log_normalizer(xp.asarray(x), xp.asarray(y), log_weights=xp.asarray(lw))
    assert (to_numpy(out) == np.inf).all()


# ----------------------------------------------------------------------- identities


@pytest.mark.parametrize("dtype", DTYPES)
def test_permutations(dtype):
    rng = np.random.default_rng(25)
    x, y = normal(rng, 45, 7, dtype=dtype), normal(rng, 133, 7, dtype=dtype)
    lw = normal(rng, 133, dtype=dtype)
    expected = sq.log_normalizer(x, y, log_weights=lw)
    tolerance = 2 * log_normalizer_tolerance(x, y, lw, dtype=dtype)
    keys, rows = rng.permutation(133), rng.permutation(45)
    out = sq.log_normalizer(x, y[keys], log_weights=lw[keys])
    assert (np.abs(out - expected) <= tolerance).all()
    out = sq.log_normalizer(x[rows], y, log_weights=lw)
    assert (np.abs(out - expected[rows]) <= tolerance[rows]).all()


def test_translation():
    rng = np.random.default_rng(26)
    x, y, c = normal(rng, 45, 7), normal(rng, 133, 7), normal(rng, 7)
    shifted = y + c
    tolerance = log_normalizer_tolerance(x, y, dtype=np.float64)
    tolerance = tolerance + log_normalizer_tolerance(x, shifted, dtype=np.float64)
    # y + c and x.c are rounded too.
    tolerance = tolerance + epsilon(np.float64) * (
        np.abs(x).sum(1) * np.abs(shifted).max() + 7 * np.abs(x) @ np.abs(c)
    )
    error = np.abs(sq.log_normalizer(x, shifted) - sq.log_normalizer(x, y) - x @ c)
    assert (error <= tolerance).all()


@pytest.mark.parametrize("cut", [0, 1, 64, 132, 133])
def test_splitting_the_keys(cut):
    rng = np.random.default_rng(27)
    x, y, lw = normal(rng, 45, 7), normal(rng, 133, 7), normal(rng, 133)
    parts = [
        sq.log_normalizer(x, y[:cut], log_weights=lw[:cut]),
        sq.log_normalizer(x, y[cut:], log_weights=lw[cut:]),
    ]
    whole = sq.log_normalizer(x, y, log_weights=lw)
    tolerance = 2 * log_normalizer_tolerance(x, y, lw, dtype=np.float64)
    assert (np.abs(np.logaddexp(*parts) - whole) <= tolerance).all()


def test_weights_are_repetitions():
    rng = np.random.default_rng(28)
    x, y = normal(rng, 45, 7), normal(rng, 30, 7)
    times = rng.integers(0, 4, 30)
    with np.errstate(divide="ignore"):
        weighted = sq.log_normalizer(x, y, log_weights=np.log(times.astype(float)))
    repeated = sq.log_normalizer(x, np.repeat(y, times, axis=0))
    tolerance = 2 * log_normalizer_tolerance(x, y, dtype=np.float64)
    assert (np.abs(weighted - repeated) <= tolerance).all()


def test_inputs_are_left_alone():
    rng = np.random.default_rng(29)
    x, y, lw = normal(rng, 9, 3), normal(rng, 11, 3), normal(rng, 11)
    before = [a.copy() for a in (x, y, lw)]
    sq.log_normalizer(
        x, y, log_weights=lw, self_index=np.arange(9), self_term="exclude"
    )
    for a, b in zip((x, y, lw), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_memory_is_linear():
    """No score matrix: 20000 x 20000 scores would be 1.6 GB."""
    import tracemalloc

    x = np.zeros((20000, 1), np.float32)
    tracemalloc.start()
    try:
        out = sq.log_normalizer(x, x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(out, np.log(20000), rtol=1e-6)
    assert peak < 32e6


# --------------------------------------------------------- gaussian_log_normalizer


def mixture(rng, k, d, r, *, batch=(), dtype=np.float64, scale=1.0, diagonal=False):
    arrays = [
        rng.uniform(0, 5, (*batch, k)).astype(dtype),
        normal(rng, *batch, k, d, dtype=dtype, scale=scale),
        normal(rng, *batch, k, d, r, dtype=dtype, scale=scale / max(d, 1) ** 0.5),
    ]
    options = {}
    if diagonal:
        options["diagonal"] = rng.uniform(0, scale, (*batch, k, d)).astype(dtype)
    return arrays, options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(
    "n, k, d, r",
    [
        (0, 1, 3, 3),
        (1, 1, 1, 1),
        (5, 2, 3, 0),
        (13, 5, 33, 33),
        (31, 13, 7, 3),
        (17, 40, 5, 5),
        (33, 2, 64, 64),
        (64, 1, 50, 17),
        (65, 5, 31, 1),
        (97, 13, 16, 16),
        (130, 3, 100, 100),
        (19, 1, 300, 29),
        (515, 2, 12, 11),
        (7, 40, 65, 2),
        (5, 0, 3, 3),
    ],
    ids=str,
)
def test_gaussian_matches_oracle(n, k, d, r, diagonal, dtype):
    rng = np.random.default_rng(n + k + d + r)
    x = normal(rng, n, d, dtype=dtype)
    arrays, options = mixture(rng, k, d, r, dtype=dtype, diagonal=diagonal)
    out = sq.gaussian_log_normalizer(x, *arrays, **options)
    assert out.dtype == dtype
    check_gaussian(out, x, *arrays, **options)


def test_gaussian_on_every_library(xp):
    rng = np.random.default_rng(31)
    for dtype in DTYPES:
        for diagonal in (False, True):
            x = normal(rng, 9, 5, dtype=dtype)
            arrays, options = mixture(rng, 3, 5, 4, dtype=dtype, diagonal=diagonal)
            arrays[0][1] = -np.inf
            out = sq.gaussian_log_normalizer(
                xp.asarray(x),
                *map(xp.asarray, arrays),
                **{key: xp.asarray(a) for key, a in options.items()},
            )
            assert type(out) is xp.array_type()
            assert to_numpy(out).dtype == dtype
            check_gaussian(to_numpy(out), x, *arrays, **options)


@pytest.mark.parametrize(
    "bx, bm",
    [
        ((3,), (3,)),
        ((2, 3), (2, 3)),
        ((3,), ()),
        ((), (3,)),
        ((2, 1), (3,)),
        ((0,), ()),
    ],
    ids=str,
)
@pytest.mark.parametrize("diagonal", [False, True])
def test_gaussian_batches(bx, bm, diagonal):
    rng = np.random.default_rng(32)
    x = normal(rng, *bx, 19, 5)
    arrays, options = mixture(rng, 3, 5, 4, batch=bm, diagonal=diagonal)
    out = sq.gaussian_log_normalizer(x, *arrays, **options)
    assert out.shape == (*np.broadcast_shapes(bx, bm), 19)
    check_gaussian(out, x, *arrays, **options)


def test_gaussian_batches_may_differ_between_arguments():
    rng = np.random.default_rng(33)
    x = normal(rng, 2, 1, 19, 5)
    (_, means, factors), _ = mixture(rng, 3, 5, 4)
    lc = normal(rng, 3, 3)
    out = sq.gaussian_log_normalizer(x, lc, means, factors)
    assert out.shape == (2, 3, 19)
    check_gaussian(out, x, lc, means, factors)


def test_gaussian_with_one_component_is_a_polynomial():
    rng = np.random.default_rng(34)
    x = normal(rng, 19, 5)
    (lc, means, factors), _ = mixture(rng, 1, 5, 5)
    omega = factors[0] @ factors[0].T
    expected = lc[0] + x @ means[0] + 0.5 * np.einsum("ij,jk,ik->i", x, omega, x)
    out = sq.gaussian_log_normalizer(x, lc, means, factors)
    np.testing.assert_allclose(out, expected, rtol=1e-13)


def test_gaussian_depends_on_the_covariance_only():
    """Any root of the covariance, triangular or rotated or padded, gives the same."""
    rng = np.random.default_rng(35)
    x = normal(rng, 19, 6)
    (lc, means, factors), _ = mixture(rng, 3, 6, 6)
    expected = sq.gaussian_log_normalizer(x, lc, means, factors)
    omega = factors @ np.swapaxes(factors, -1, -2)
    triangular = np.linalg.cholesky(omega)
    rotation, _ = np.linalg.qr(normal(rng, 6, 6))
    padded = np.concatenate([factors, np.zeros((3, 6, 5))], -1)
    for root in (triangular, factors @ rotation, triangular @ rotation, padded):
        out = sq.gaussian_log_normalizer(x, lc, means, root)
        np.testing.assert_allclose(out, expected, rtol=1e-12)


def test_gaussian_diagonal_is_a_factor():
    rng = np.random.default_rng(36)
    x = normal(rng, 19, 6)
    (lc, means, _), options = mixture(rng, 3, 6, 0, diagonal=True)
    none = np.zeros((3, 6, 0))
    out = sq.gaussian_log_normalizer(x, lc, means, none, **options)
    roots = np.sqrt(options["diagonal"])[..., None] * np.eye(6)
    np.testing.assert_allclose(
        out, sq.gaussian_log_normalizer(x, lc, means, roots), rtol=1e-13
    )
    without = sq.gaussian_log_normalizer(x, lc, means, none)
    np.testing.assert_allclose(without, logsumexp(lc + x @ means.T), rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_gaussian_empty_components(value, dtype):
    """log count -inf: no component, whatever its rows hold."""
    rng = np.random.default_rng(37)
    x = normal(rng, 19, 5, dtype=dtype)
    arrays, options = mixture(rng, 4, 5, 5, dtype=dtype, diagonal=True)
    expected = sq.gaussian_log_normalizer(
        x,
        *[a[[0, 3]] for a in arrays],
        diagonal=options["diagonal"][[0, 3]],
    )
    arrays[0][[1, 2]] = -np.inf
    for a in (*arrays[1:], options["diagonal"]):
        a[[1, 2]] = value
    out = sq.gaussian_log_normalizer(x, *arrays, **options)
    np.testing.assert_allclose(out, expected, rtol=16 * epsilon(dtype))
    arrays[0][:] = -np.inf
    assert (sq.gaussian_log_normalizer(x, *arrays, **options) == -np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_gaussian_huge_norms(scale, dtype):
    rng = np.random.default_rng(38)
    x = normal(rng, 19, 7, dtype=dtype, scale=scale)
    arrays, options = mixture(rng, 5, 7, 7, dtype=dtype, scale=scale, diagonal=True)
    truth = gaussian_log_normalizer(x, *arrays, **options).astype(float)
    assert (truth < np.finfo(dtype).max).all()
    out = sq.gaussian_log_normalizer(x, *arrays, **options)
    assert np.isfinite(out).all()
    check_gaussian(out, x, *arrays, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_nan(dtype):
    rng = np.random.default_rng(39)
    x = normal(rng, 37, 5, dtype=dtype)
    arrays, _ = mixture(rng, 3, 5, 5, dtype=dtype)
    clean = sq.gaussian_log_normalizer(x, *arrays)
    x[17, 2] = np.nan
    out = sq.gaussian_log_normalizer(x, *arrays)
    assert np.isnan(out[17])
    others = np.arange(37) != 17
    np.testing.assert_array_equal(out[others], clean[others])
    arrays[2][1, 0, 0] = np.nan
    assert np.isnan(sq.gaussian_log_normalizer(x, *arrays)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_gaussian_nan_beside_infinity(first, dtype):
    rng = np.random.default_rng(39)
    x = abs(normal(rng, 37, 5, dtype=dtype))
    (log_counts, means, factors), _ = mixture(rng, 3, 5, 0, dtype=dtype)
    means[first, 0], means[(first + 1) % 3, 0] = np.inf, np.nan
    assert np.isnan(sq.gaussian_log_normalizer(x, log_counts, means, factors)).all()
    log_counts[(first + 1) % 3] = -np.inf
    out = sq.gaussian_log_normalizer(x, log_counts, means, factors)
    np.testing.assert_array_equal(out, np.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__.lstrip("_"))
def test_gaussian_layouts(layout, dtype):
    rng = np.random.default_rng(40)
    x = normal(rng, 45, 13, dtype=dtype)
    arrays, options = mixture(rng, 4, 13, 9, dtype=dtype, diagonal=True)
    expected = sq.gaussian_log_normalizer(x, *arrays, **options)
    out = sq.gaussian_log_normalizer(
        layout(x),
        *[layout(a) for a in arrays],
        diagonal=layout(options["diagonal"]),
    )
    np.testing.assert_array_equal(out, expected)


def test_gaussian_half_precision():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(41)
    x = normal(rng, 9, 4, dtype=np.float16)
    arrays, options = mixture(rng, 3, 4, 4, dtype=np.float16, diagonal=True)
    out = sq.gaussian_log_normalizer(x, *arrays, **options)
    assert out.dtype == np.float32
    check_gaussian(out, x, *arrays, **options)
    half = [torch.from_numpy(a.astype(np.float32)).bfloat16() for a in (x, *arrays)]
    out = sq.gaussian_log_normalizer(*half)
    assert out.dtype == torch.float32
    check_gaussian(out.numpy(), *[a.float().numpy() for a in half])
