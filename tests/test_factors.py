"""Products of sparse factors on every array library, against their definition."""

from __future__ import annotations

import numpy as np
import pytest

import subquad as sq
from _arrays import to_numpy
from _oracle import assert_within, gamma
from _oracle_factors import (
    RESIDUALS,
    Chain,
    Networks,
    cdil,
    chord,
    csr_dense,
    dense,
    matrix,
)
from subquad._reference import factors as reference

DTYPES = [np.float32, np.float64]

# Before, at and beyond powers of two, and the blocks of rows of the kernels.
LENGTHS = [1, 2, 8, 16, 31, 33, 64, 100, 129, 1000]

# Duplicates, offsets beyond every length, and one that is a length itself.
LINKS = (0, -3, 100, 100, -1000, 7)
PACKED = [5, 5, 5, 2, 5, 5, 5, 5, 0, 0]


def pattern_of(name, m):
    """What is passed, and the offsets of m factors."""
    if name == "chord":
        return "chord", [chord(5)] * m
    if name == "cdil":
        return "cdil", [cdil(5, factor) for factor in range(m)]
    if name == "one row":
        return np.array(LINKS), [LINKS] * m
    rows = [tuple(o + 2 * factor for o in LINKS[:4]) for factor in range(m)]
    return rows, rows


PATTERNS = ("chord", "cdil", "one row", "rows")


def case(n, rows, d=3, bv=(), bx=(), dtype=np.float64, seed=0):
    """Values of ordinary size in one array, and rows."""
    rng = np.random.default_rng(seed)
    k = len(rows[0]) if rows else 3
    values = rng.standard_normal((*bv, len(rows), n, k)) / max(k, 1) ** 0.5
    x = rng.standard_normal((*bx, n, d))
    return values.astype(dtype), x.astype(dtype)


def split(values):
    return [values[..., m, :, :] for m in range(values.shape[-3])]


def check(out, expected, dtype=np.float64, library=None):
    if library is not None:
        assert type(out) is library.array_type()
    out = to_numpy(out)
    assert out.dtype == dtype
    assert_within(out, *expected)


# -------------------------------------------------------------------------- patterns


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 100, 128, 129])
def test_every_row_reaches_every_other_one(n):
    """In as many factors as there are links besides the first, or fewer."""
    row = sq.chord_offsets(n)
    assert row.dtype == np.int64
    assert tuple(row) == chord(len(row))
    assert len(set(row % n)) == len(row)
    reached = np.arange(n) == 0
    for _ in range(len(row) - 1):
        reached = np.any([np.roll(reached, o) for o in row], axis=0)
    assert reached.all()
    for kernel_size in (3, 5, 9):
        reached = np.arange(n) == 0
        for row in sq.cdil_offsets(n, kernel_size=kernel_size):
            reached = np.any([np.roll(reached, o) for o in row], axis=0)
        assert reached.all()


def test_the_floor_of_the_logarithm_leaves_entries_unreached():
    """Six factors and seven links for n = 100 give 99 % of a dense matrix."""
    n, m = 100, 6
    values = np.ones((m, n, m + 1))
    product = sq.sparse_factor_product(values, np.eye(n))
    assert np.mean(product > 0) == 0.99
    m = len(sq.chord_offsets(n)) - 1
    assert m == 7
    product = sq.sparse_factor_product(np.ones((m, n, m + 1)), np.eye(n))
    assert (product > 0).all()


@pytest.mark.parametrize(
    "n, distinct",
    [
        (256, [9, 9, 9, 9, 9, 8, 4, 2]),
        (64, [9, 9, 9, 8, 4, 2]),
        (100, [9] * 7),
        (1, []),
    ],
)
def test_dilated_kernels(n, distinct):
    offsets = sq.cdil_offsets(n)
    assert offsets.dtype == np.int64
    assert offsets.shape == (len(distinct), 9)
    assert [len(set(row % n)) for row in offsets] == distinct
    for m, row in enumerate(offsets):
        assert tuple(row) == cdil(9, m)


def test_dilated_kernels_reach_all_rows_before_the_last_factors():
    """With 9 links already where 1 + 8 (2^m - 1) ≥ n; two factors are left of 8."""
    n = 256
    for m, whole in ((5, False), (6, True)):
        offsets = sq.cdil_offsets(n, n_factors=m)
        values = np.ones((m, n, 9))
        out = sq.sparse_factor_product(values, np.eye(n)[:, :1], pattern=offsets)
        assert (out > 0).all() == whole


def test_sizes_of_patterns():
    np.testing.assert_array_equal(sq.chord_offsets(5, 2), [0, 1])
    np.testing.assert_array_equal(sq.chord_offsets(np.int64(1)), [0])
    assert sq.chord_offsets(3, 64)[-1] == 2**62
    np.testing.assert_array_equal(
        sq.cdil_offsets(5, kernel_size=3, n_factors=2), [[0, 1, -1], [0, 2, -2]]
    )
    assert sq.cdil_offsets(5, kernel_size=1).shape == (3, 1)


# -------------------------------------------------------------------------- products


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("n", LENGTHS)
def test_lengths(n, name):
    pattern, rows = pattern_of(name, 3)
    values, x = case(n, rows)
    options = [
        (r, c, t) for r in RESIDUALS for c in (True, False) for t in (False, True)
    ]
    for residual, circular, transpose in options if n < 1000 else options[1::3]:
        flags = {"residual": residual, "circular": circular, "transpose": transpose}
        out = sq.sparse_factor_product(values, x, pattern=pattern, **flags)
        check(out, Chain(split(values), x, rows, **flags).product())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("d", [1, 2, 16, 33, 64, 130])
def test_widths(d, m, dtype):
    n = 37
    rows = [chord(7)] * m
    values, x = case(n, rows, d, bx=(2,), dtype=dtype)
    segments = np.repeat([0, 1, 2], [20, 1, 16])
    for residual in RESIDUALS:
        for transpose in (False, True):
            for ids in (None, segments):
                flags = {"residual": residual, "transpose": transpose}
                out = sq.sparse_factor_product(values, x, segment_ids=ids, **flags)
                chain = Chain(split(values), x, rows, segments=ids, **flags)
                check(out, chain.product(), dtype)


def test_sizes_beyond_every_block():
    n, d = 2100, 40
    rows = [chord(12)] * 2
    values, x = case(n, rows, d, dtype=np.float32)
    for circular in (True, False):
        out = sq.sparse_factor_product(values, x, residual="step", circular=circular)
        chain = Chain(split(values), x, rows, residual="step", circular=circular)
        check(out, chain.product(), np.float32)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("transpose", [False, True])
def test_on_every_library(xp, residual, transpose):
    pattern, rows = pattern_of("cdil", 3)
    for ids, circular in ((None, True), (PACKED, transpose)):
        values, x = case(10, rows, bv=(2, 1), bx=(3,))
        flags = {"residual": residual, "circular": circular, "transpose": transpose}
        segments = None if ids is None else xp.asarray(np.array(ids))
        out = sq.sparse_factor_product(
            xp.asarray(values),
            xp.asarray(x),
            pattern=pattern,
            segment_ids=segments,
            **flags,
        )
        chain = Chain(split(values), x, rows, segments=ids, **flags)
        check(out, chain.product(), library=xp)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_dense_matrices(name, circular, residual):
    """The product is that of matrices, and its transpose theirs."""
    n = 23
    pattern, rows = pattern_of(name, 4)
    values, _ = case(n, rows)
    options = {"pattern": pattern, "residual": residual, "circular": circular}
    factors = [matrix(values[m], row, circular=circular) for m, row in enumerate(rows)]
    expected = dense(factors, residual).astype(float)
    sizes = dense([np.abs(factor) for factor in factors], residual).astype(float)
    bound = gamma(4 * (values.shape[-1] + 2), np.float64) * sizes.sum()
    out = sq.sparse_factor_product(values, np.eye(n), **options)
    np.testing.assert_allclose(out, expected, rtol=0, atol=bound)
    out = sq.sparse_factor_product(values, np.eye(n), transpose=True, **options)
    np.testing.assert_allclose(out, expected.T, rtol=0, atol=bound)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_adjoint(residual):
    """<y, A x> = <Aᵀ y, x>, within the roundings of both sides."""
    rows = [cdil(9, m) for m in range(5)]
    values, x = case(50, rows)
    y = np.random.default_rng(1).standard_normal(x.shape)
    options = {"pattern": "cdil", "residual": residual}
    left = (y * sq.sparse_factor_product(values, x, **options)).sum()
    right = (x * sq.sparse_factor_product(values, y, transpose=True, **options)).sum()
    sizes, _ = Chain(
        split(np.abs(values)), np.abs(x), rows, residual=residual
    ).product()
    error = gamma(2 * 5 * 11 + 2 * x.size, np.float64) * (np.abs(y) * sizes).sum()
    assert abs(left - right) <= error


def test_an_offset_of_the_length_is_the_row_itself():
    """Published configurations have such links: they add to the first one."""
    n = 8
    values, x = case(n, [chord(5)])
    assert chord(5)[-1] == n
    folded = values[..., :4].copy()
    folded[..., 0] += values[..., 4]
    out = sq.sparse_factor_product(values, x)
    expected = sq.sparse_factor_product(folded, x)
    _, bound = Chain(split(values), x, [chord(5)]).product()
    np.testing.assert_allclose(out - expected, 0, rtol=0, atol=2 * bound.max())
    cut = sq.sparse_factor_product(values, x, circular=False)
    expected = sq.sparse_factor_product(values[..., :4], x, circular=False)
    np.testing.assert_allclose(cut - expected, 0, rtol=0, atol=2 * bound.max())


@pytest.mark.parametrize("n", [1, 5, 33])
@pytest.mark.parametrize("huge", [2**62, -(2**62) + 1, 2**63 - 1, -(2**63)])
def test_huge_offsets(huge, n):
    rows = [(huge, 1)]
    values, x = case(n, rows)
    for ids in (None, np.arange(n) // 3):
        for circular in (True, False):
            options = {"circular": circular}
            out = sq.sparse_factor_product(
                values, x, pattern=rows, segment_ids=ids, **options
            )
            check(out, Chain(split(values), x, rows, segments=ids, **options).product())


@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
def test_segments_are_sequences_of_their_own(circular, transpose):
    lengths = [1, 4, 16, 3, 30, 1]
    segments = np.repeat([7, 7 - 2**40, 0, 7, 1, 2], lengths)
    rows = [chord(6)] * 3
    values, x = case(sum(lengths), rows)
    options = {"residual": "input", "circular": circular, "transpose": transpose}
    out = sq.sparse_factor_product(values, x, segment_ids=segments, **options)
    ends = np.cumsum(lengths)
    for length, end in zip(lengths, ends, strict=True):
        part = slice(end - length, end)
        alone = Chain(split(values[:, part]), x[part], rows, **options)
        check(out[part], alone.product())


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("transpose", [True, False])
def test_factors_that_differ_in_their_links(xp, residual, transpose):
    rows = [chord(2), chord(5), chord(1), chord(4)]
    factors = [case(12, [row], bv=(2, 1), seed=m)[0] for m, row in enumerate(rows)]
    factors = [values[..., 0, :, :] for values in factors]
    _, x = case(12, rows[:1], bx=(3,))
    out = sq.sparse_factor_product(
        [xp.asarray(values) for values in factors],
        xp.asarray(x),
        residual=residual,
        transpose=transpose,
    )
    chain = Chain(factors, x, rows, residual=residual, transpose=transpose)
    check(out, chain.product(), library=xp)


def test_patterns_of_factors_in_a_list():
    rows = [(0, 5), (1, -2, 3)]
    factors = [case(9, [row], seed=m)[0][0] for m, row in enumerate(rows)]
    _, x = case(9, rows[:1])
    expected = Chain(factors, x, rows).product()
    for pattern in (rows, [list(row) for row in rows], tuple(map(np.array, rows))):
        check(sq.sparse_factor_product(tuple(factors), x, pattern=pattern), expected)
    kernels = [cdil(3, 0), cdil(5, 1)]
    factors = [case(9, [row], seed=m)[0][0] for m, row in enumerate(kernels)]
    expected = Chain(factors, x, kernels).product()
    check(sq.sparse_factor_product(factors, x, pattern="cdil"), expected)
    equal = np.array([[0, 1], [2, -1]])
    values, x = case(9, equal.tolist())
    expected = Chain(split(values), x, equal.tolist()).product()
    check(sq.sparse_factor_product(values, x, pattern=equal), expected)
    check(sq.sparse_factor_product(split(values), x, pattern=equal), expected)


@pytest.mark.parametrize(
    "name", ["numpy", "array_api_strict", "torch", "jax.numpy", "dask.array"]
)
def test_offsets_of_any_library(name):
    namespace = pytest.importorskip(name)
    values, x = case(9, [LINKS])
    expected = Chain(split(values), x, [LINKS]).product()
    for numbers in (np.array(LINKS), np.array([LINKS], np.int32)):
        out = sq.sparse_factor_product(values, x, pattern=namespace.asarray(numbers))
        check(out, expected)
    check(sq.sparse_factor_product(values, x, pattern=list(LINKS)), expected)
    check(sq.sparse_factor_product(values, x, pattern=(LINKS,)), expected)


@pytest.mark.parametrize(
    "bv, bx",
    [((2,), (2,)), ((2,), ()), ((), (3,)), ((2, 1), (3,)), ((1,), (2, 3)), ((0,), ())],
    ids=str,
)
def test_batches(bv, bx):
    rows = [chord(4)] * 2
    values, x = case(11, rows, bv=bv, bx=bx)
    for residual in RESIDUALS:
        for transpose in (False, True):
            options = {"residual": residual, "transpose": transpose}
            out = sq.sparse_factor_product(values, x, **options)
            check(out, Chain(split(values), x, rows, **options).product())


def check_nothing(asarray, residual, transpose):
    options = {"residual": residual, "transpose": transpose}
    _, x = case(5, [])

    def product(values, x):
        arrays = (asarray(values), asarray(x))
        return to_numpy(sq.sparse_factor_product(*arrays, **options))

    np.testing.assert_array_equal(product(np.zeros((0, 5, 3)), x), x)
    out = product(np.zeros((2, 0, 5, 3)), x)
    np.testing.assert_array_equal(out, np.broadcast_to(x, (2, 5, 3)))
    kept = 0 if residual == "none" else x
    np.testing.assert_array_equal(product(np.zeros((2, 5, 0)), x), kept + 0 * x)
    assert product(np.zeros((2, 0, 3)), np.zeros((0, 4))).shape == (0, 4)
    assert product(np.zeros((2, 5, 3)), np.zeros((5, 0))).shape == (5, 0)
    assert product(np.zeros((0, 0, 0)), np.zeros((0, 0))).shape == (0, 0)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("transpose", [False, True])
def test_nothing(residual, transpose):
    """No factors are the identity, no links nothing, no rows no rows."""
    check_nothing(np.asarray, residual, transpose)


def test_nothing_on_every_library(xp):
    check_nothing(xp.asarray, "input", False)


def test_no_rows_in_segments():
    segments = np.zeros(0, int)
    for circular in (True, False):
        out = sq.sparse_factor_product(
            np.zeros((2, 0, 3)),
            np.zeros((0, 4)),
            circular=circular,
            segment_ids=segments,
        )
        assert out.shape == (0, 4)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_intermediates(xp, residual):
    rows = [chord(4)] * 4
    values, x = case(9, rows, bv=(2,))
    arrays = (xp.asarray(values), xp.asarray(x))
    options = {"residual": residual, "return_intermediates": True}
    found = sq.sparse_factor_product(*arrays, **options)
    chain = Chain(split(values), x, rows, residual=residual)
    check(found.out, chain.product(), library=xp)
    check(found.intermediates, chain.intermediates(), library=xp)
    for m in (0, 1):
        arrays = (xp.asarray(values[:, :m]), xp.asarray(x))
        found = sq.sparse_factor_product(*arrays, **options)
        assert tuple(found.intermediates.shape) == (2, 0, 9, 3)


def test_recompute_changes_nothing():
    values, x = case(20, [chord(4)] * 3)
    out = sq.sparse_factor_product(values, x)
    again = sq.sparse_factor_product(values, x, recompute=True)
    np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_types(xp, residual):
    rows = [chord(4)] * 2
    values, x = case(13, rows)
    narrow = {np.float32: (values.astype(np.float32), x.astype(np.float32))}
    # float64 values compute in float64, and the result is of the type of x.
    out = sq.sparse_factor_product(
        xp.asarray(values), xp.asarray(narrow[np.float32][1]), residual=residual
    )
    assert to_numpy(out).dtype == np.float32
    chain = Chain(split(values), narrow[np.float32][1], rows, residual=residual)
    expected, bound = chain.product()
    rounded = np.abs(expected).astype(float) * 2.0**-24
    assert_within(to_numpy(out), expected, bound + rounded)
    if xp.name == "array_api_strict":
        return
    halves = [a.astype(np.float16) for a in (values, x)]
    out = sq.sparse_factor_product(*map(xp.asarray, halves), residual=residual)
    wide = [a.astype(np.float32) for a in halves]
    expected, bound = Chain(split(wide[0]), wide[1], rows, residual=residual).product()
    found = to_numpy(out)
    assert found.dtype == np.float16
    # Half an ulp of a float16, and where it is subnormal half of the least number.
    rounded = np.maximum(np.abs(expected).astype(float) * 2.0**-11, 2.0**-25)
    assert_within(found.astype(float), expected, bound + rounded * (1 + 2.0**-10))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose", [False, True])
def test_strides(dtype, transpose):
    rows = [chord(5)] * 3
    values, x = case(21, rows, 7, bv=(2,), bx=(2,), dtype=dtype)
    options = {"residual": "step", "transpose": transpose, "circular": False}
    expected = sq.sparse_factor_product(values, x, **options)

    def reversed_memory(a):
        return np.flip(np.flip(a).copy())

    def every_other(a):
        return np.repeat(a, 2, axis=-1)[..., ::2]

    def other_rows(a):
        return np.repeat(a, 2, axis=-2)[..., 1::2, :]

    def read_only(a):
        a = a.copy()
        a.flags.writeable = False
        return a

    def unaligned(a):
        raw = np.zeros(a.nbytes + 1, np.uint8)[1:]
        odd = raw.view(dtype).reshape(a.shape)
        odd[...] = a
        return odd

    def links_first(a):
        return np.moveaxis(np.moveaxis(a, -1, 0).copy(), 0, -1)

    for change in (
        reversed_memory,
        every_other,
        other_rows,
        np.asfortranarray,
        read_only,
        unaligned,
        links_first,
    ):
        out = sq.sparse_factor_product(change(values), change(x), **options)
        np.testing.assert_array_equal(out, expected)
    one = np.broadcast_to(x[:, :1], x.shape)
    same = np.broadcast_to(values[:, :1], values.shape)
    out = sq.sparse_factor_product(same, one, **options)
    again = sq.sparse_factor_product(same.copy(), one.copy(), **options)
    np.testing.assert_array_equal(out, again)


def test_inputs_are_left_alone():
    for values, x in (case(9, [chord(3)] * 2), case(9, [])):
        kept = values.copy(), x.copy()
        out = sq.sparse_factor_product(values, x, residual="step")
        assert not np.shares_memory(out, x)
        np.testing.assert_array_equal(values, kept[0])
        np.testing.assert_array_equal(x, kept[1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("transpose", [False, True])
def test_what_is_not_finite_stays_where_it_is_linked(xp, value, transpose):
    rows = [(0, 1, -2)]
    for place in ("x", "values"):
        for circular in (True, False):
            values, x = case(10, rows)
            if place == "x":
                x[3, 1] = value
            else:
                values[0, 9, 1] = value
            options = {"circular": circular, "transpose": transpose}
            out = sq.sparse_factor_product(
                xp.asarray(values), xp.asarray(x), pattern=rows, **options
            )
            check(out, Chain(split(values), x, rows, **options).product())


def test_zero_times_nan_is_nan():
    values, x = np.zeros((1, 4, 2)), np.ones((4, 1))
    x[2] = np.nan
    out = sq.sparse_factor_product(values, x)
    np.testing.assert_array_equal(out[:, 0], [0, np.nan, np.nan, 0])


@pytest.mark.parametrize("transpose", [False, True])
def test_what_is_left_out_is_not_touched(xp, transpose):
    """Values and rows of terms beyond an end may be anything."""
    rows = [(1, -2)]
    values, x = case(6, rows)
    options = {"circular": False, "transpose": transpose}
    ids = np.array([0, 0, 0, 1, 1, 1])
    chain = Chain(split(values), x, rows, segments=ids, **options)
    values[0, [2, 5], 0] = np.nan
    values[0, [0, 1, 3, 4], 1] = np.inf
    out = sq.sparse_factor_product(
        xp.asarray(values),
        xp.asarray(x),
        pattern=rows,
        segment_ids=xp.asarray(ids),
        **options,
    )
    check(out, chain.product())


@pytest.mark.parametrize("threads", [2, 3])
def test_thread_count_changes_nothing(threads):
    values, x = case(700, [chord(11)] * 4, 33, bx=(3,), dtype=np.float32)
    for transpose in (False, True):
        for residual in RESIDUALS:
            options = {"transpose": transpose, "residual": residual}
            with sq.num_threads(1):
                expected = sq.sparse_factor_product(values, x, **options)
            with sq.num_threads(threads):
                out = sq.sparse_factor_product(values, x, **options)
            np.testing.assert_array_equal(out, expected)


# -------------------------------------------------------------------------- networks


def network(m, d, h, k, bw=(), dtype=np.float64, seed=1):
    rng = np.random.default_rng(seed)
    shapes = [(m, h, d), (m, h), (m, k, h), (m, k)]
    scales = [max(d, 1) ** -0.5, 1, max(h, 1) ** -0.5, 1]
    return sq.FactorWeights(
        *(
            (rng.standard_normal((*bw, *shape)) * scale).astype(dtype)
            for shape, scale in zip(shapes, scales, strict=True)
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, d, h, k, m",
    [
        (1, 1, 1, 1, 1),
        (5, 3, 7, 4, 2),
        (33, 32, 32, 6, 3),
        (130, 65, 33, 17, 1),
        (7, 200, 3, 5, 2),
        (7, 3, 200, 5, 2),
        (0, 3, 4, 5, 2),
        (4, 0, 4, 5, 2),
        (4, 3, 0, 5, 2),
        (4, 3, 4, 0, 2),
        (4, 3, 4, 5, 0),
    ],
    ids=str,
)
def test_sizes_of_networks(n, d, h, k, m, dtype):
    x = np.random.default_rng(0).standard_normal((n, d)).astype(dtype)
    weights = network(m, d, h, k, dtype=dtype)
    check(sq.factor_values(x, weights), Networks(x, weights).values(), dtype)


def test_networks_on_every_library(xp):
    x = np.random.default_rng(0).standard_normal((3, 9, 4))
    weights = network(2, 4, 6, 5, bw=(2, 1))
    out = sq.factor_values(xp.asarray(x), tuple(map(xp.asarray, weights)))
    check(out, Networks(x, weights).values(), library=xp)


def test_activations_in_both_tails(xp):
    """exp(-z²/2) and its series lose nothing where values are small, or large."""
    z = np.concatenate([np.linspace(-40, 40, 641), [-1e3, -1e-3, -1e-300, 0.0, 1e3]])
    one, zero = np.ones((1, 1, 1)), np.zeros((1, 1))
    weights = [xp.asarray(a) for a in (one, zero, one, zero)]
    out = to_numpy(sq.factor_values(xp.asarray(z[:, None]), weights))[0, :, 0]
    expected, bound = Networks(z[:, None], (one, zero, one, zero)).values()
    assert_within(out, expected[0, :, 0], bound[0, :, 0])
    # Of what is far left the absolute error vanishes with it.
    assert (np.abs(out[z < -12]) < 1e-30).all()


def test_activations_that_are_not_finite(xp):
    x = np.array([[np.nan], [np.inf], [-np.inf], [1.0]])
    one, zero = np.ones((1, 1, 1)), np.zeros((1, 1))
    weights = [xp.asarray(a) for a in (one, zero, one, zero)]
    out = to_numpy(sq.factor_values(xp.asarray(x), weights))[0, :, 0]
    np.testing.assert_array_equal(out[:3], [np.nan, np.inf, 0.0])
    np.testing.assert_allclose(out[3], 0.8413447460685429, rtol=1e-15)


def test_slopes_of_activations_that_are_not_finite(xp):
    x = np.array([[np.nan], [np.inf], [-np.inf], [0.0]])
    one, zero = np.ones((1, 1, 1)), np.zeros((1, 1))
    weights = [xp.asarray(a) for a in (one, zero, one, zero)]
    grad = xp.asarray(np.ones((1, 4, 1)))
    slopes, _ = sq.vjp.factor_values(grad, xp.asarray(x), weights)
    slopes = to_numpy(slopes)[:, 0]
    np.testing.assert_array_equal(slopes[:3], [np.nan, 1.0, 0.0])
    np.testing.assert_allclose(slopes[3], 0.5, rtol=1e-15)


@pytest.mark.parametrize("place", range(5))
def test_every_array_of_a_network_has_a_batch_of_its_own(place):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((7, 3)), *network(2, 3, 5, 4)]
    arrays[place] = np.stack([arrays[place], 2 * arrays[place]])
    x, *weights = arrays
    check(sq.factor_values(x, weights), Networks(x, weights).values())


@pytest.mark.skip_xp_backend("array_api_strict", reason="has no float16")
def test_types_of_values(xp):
    x = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float16)
    weights = network(2, 3, 5, 4, dtype=np.float32)
    out = to_numpy(sq.factor_values(xp.asarray(x), tuple(map(xp.asarray, weights))))
    assert out.dtype == np.float16
    expected, bound = Networks(x.astype(np.float32), weights).values()
    rounded = np.maximum(np.abs(expected) * 2.0**-11, 2.0**-25) * (1 + 2.0**-10)
    assert_within(out.astype(float), expected, bound + rounded)


def test_strides_of_networks():
    x = np.random.default_rng(0).standard_normal((2, 9, 4))
    weights = network(3, 4, 6, 5, bw=(2,))
    expected = sq.factor_values(x, weights)

    def reversed_memory(a):
        return np.flip(np.flip(a).copy())

    def every_other(a):
        return np.repeat(a, 2, axis=-1)[..., ::2]

    def read_only(a):
        a = a.copy()
        a.flags.writeable = False
        return a

    for change in (reversed_memory, every_other, np.asfortranarray, read_only):
        out = sq.factor_values(change(x), tuple(map(change, weights)))
        np.testing.assert_array_equal(out, expected)


# -------------------------------------------------------------------- sparse matrices


def sparse(rows, columns, nnz, dtype=np.float64, index=np.int64, seed=0):
    """Entries in no order, some of them in one place; some rows are empty."""
    rng = np.random.default_rng(seed)
    kept = rng.permutation(rows)[: max(rows - rows // 3, 1)]
    row = np.sort(rng.choice(kept, nnz)) if nnz else np.zeros(0, int)
    indptr = np.searchsorted(row, np.arange(rows + 1)).astype(index)
    indices = rng.integers(0, max(columns, 1), nnz).astype(index)
    return rng.standard_normal(nnz).astype(dtype), indices, indptr


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, columns, nnz, d",
    [(1, 1, 1, 1), (7, 5, 20, 3), (5, 9, 0, 2), (40, 33, 500, 65), (3, 4, 5, 0)],
    ids=str,
)
def test_sparse_matrices(rows, columns, nnz, d, dtype, index):
    matrix = sparse(rows, columns, nnz, dtype, index)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((columns, d)).astype(dtype)
    addend = rng.standard_normal((2, rows, d)).astype(dtype)
    whole = csr_dense(*matrix, columns)
    # Entries in one place are summed in the dense matrix.
    sizes = csr_dense(np.abs(matrix[0]), *matrix[1:], columns) @ np.abs(x)
    error = gamma(nnz + 4, dtype)
    out = sq.csr_product(*matrix, x)
    check(out, (whole @ x, (error * sizes).astype(float)), dtype)
    out = sq.csr_product(*matrix, x, addend=addend, scale=-0.5)
    bound = error * (sizes / 2 + np.abs(addend))
    check(out, (addend - whole @ x / 2, bound.astype(float)), dtype)


def test_sparse_matrices_on_every_library(xp):
    matrix = sparse(9, 7, 30)
    x = np.random.default_rng(1).standard_normal((2, 7, 3))
    addend = np.ones((9, 3))
    arrays = tuple(map(xp.asarray, matrix))
    out = sq.csr_product(*arrays, xp.asarray(x), addend=xp.asarray(addend), scale=2.0)
    expected = csr_dense(*matrix, 7) @ x * 2 + addend
    sizes = csr_dense(np.abs(matrix[0]), *matrix[1:], 7) @ np.abs(x) * 2 + addend
    check(out, (expected, (gamma(40, np.float64) * sizes).astype(float)), library=xp)


def check_transpose(asarray, rows, columns, nnz, index):
    matrix = sparse(rows, columns, nnz, index=index)
    found = sq.csr_transpose(*map(asarray, matrix), columns)
    data, indices, indptr = map(to_numpy, found)
    assert data.shape == indices.shape == (nnz,)
    assert indptr.shape == (columns + 1,)
    assert indices.dtype == indptr.dtype == index
    expected = csr_dense(*matrix, columns).T
    np.testing.assert_array_equal(csr_dense(data, indices, indptr, rows), expected)
    for row in range(columns):
        assert (np.diff(indices[indptr[row] : indptr[row + 1]]) >= 0).all()


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_transposes_of_sparse_matrices(index):
    for rows, columns, nnz in ((9, 7, 30), (3, 4, 0), (1, 5, 6), (0, 3, 0), (4, 0, 0)):
        check_transpose(np.asarray, rows, columns, nnz, index)


def test_transposes_on_every_library(xp):
    check_transpose(xp.asarray, 9, 7, 30, np.int32)


def test_indices_of_two_types():
    data, indices, indptr = sparse(9, 7, 30)
    x = np.random.default_rng(1).standard_normal((7, 3))
    expected = sq.csr_product(data, indices, indptr, x)
    for index, pointers in ((np.int32, np.int64), (np.uint8, np.int16)):
        mixed = (data, indices.astype(index), indptr.astype(pointers))
        np.testing.assert_array_equal(sq.csr_product(*mixed, x), expected)


def test_what_is_not_finite_stays_in_its_rows(xp):
    data, indices, indptr = np.ones(3), np.array([0, 2, 1]), np.array([0, 2, 2, 3])
    x = np.array([[1.0], [np.nan], [2.0]])
    arrays = map(xp.asarray, (data, indices, indptr, x))
    out = to_numpy(sq.csr_product(*arrays))
    np.testing.assert_array_equal(out[:, 0], [3, 0, np.nan])


# ------------------------------------------------------------------------- reference


def test_the_reference_can_be_traced():
    """Nothing in it depends on numbers: segments and indices may be unknown."""
    jax = pytest.importorskip("jax")
    rows = ((1, -7), (0, 4))
    values, x = case(10, rows)
    matrix = sparse(6, 10, 7)
    weights = network(1, 3, 4, 2)

    def everything(values, x, segments, matrix, weights):
        options = (segments, rows, "input")
        out, _ = reference.sparse_factor_product(
            values, x, *options, True, False, False, False
        )
        back = reference.sparse_factor_product_vjp(
            out, values, x, segments, None, *options[1:], False, (True, True)
        )
        turned = reference.csr_transpose(*matrix, 10)
        mixed = reference.csr_product(*matrix, x, None, 2.0, None)
        return out, back, turned, mixed, reference.factor_values(x, *weights)

    arguments = (values, x, np.array(PACKED), matrix, tuple(weights))
    found = jax.tree.leaves(jax.jit(everything)(*arguments))
    expected = jax.tree.leaves(everything(*arguments))
    for a, b in zip(found, expected, strict=True):
        # A compiler may join a product and a sum, of a few dozen terms each.
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * scale)


def test_entries_that_no_row_holds_count_for_nothing():
    """`indptr` may begin behind the first entry, and end before the last one."""
    data, indices = np.array([10.0, 2.0, 3.0]), np.array([0, 2, 1])
    x, grad = np.arange(6.0).reshape(3, 2), np.ones((3, 2))
    for indptr in ([1, 2, 2, 3], [0, 2, 2, 2], [1, 1, 2, 2], [2, 2, 2, 2]):
        places = np.array(indptr)
        used = np.zeros((3, 3))
        for i in range(3):
            for e in range(places[i], places[i + 1]):
                used[i, indices[e]] += data[e]
        matrix = (data, indices, places)
        np.testing.assert_array_equal(sq.csr_product(*matrix, x), used @ x)
        turned = sq.csr_transpose(*matrix, 3)
        np.testing.assert_array_equal(sq.csr_product(*turned, x), used.T @ x)
        in_data, in_x = sq.vjp.csr_product(grad, *matrix, x)
        np.testing.assert_array_equal(in_x, used.T @ grad)
        kept = (np.arange(3) >= places[0]) & (np.arange(3) < places[-1])
        assert ((in_data != 0) <= kept).all()
        plain = reference.csr_product(*matrix, x, None, 1.0, None)
        np.testing.assert_array_equal(plain, used @ x)
        needs = (True, False, False)
        found = reference.csr_product_vjp(grad, *matrix, x, None, 1.0, None, needs)
        np.testing.assert_array_equal(found[0], in_data)


def test_a_transpose_looks_at_its_indices():
    data = np.ones(3)
    for indices in ([0, -1, 1], [0, 3, 1]):
        with pytest.raises(ValueError, match="indices must be at least 0 and less"):
            sq.csr_transpose(data, np.array(indices), np.array([0, 2, 2, 3]), 3)
    for indptr in ([0, 3, 1, 3], [-1, 0, 1, 3], [0, 1, 2, 4]):
        with pytest.raises(ValueError, match="indptr must not decrease"):
            sq.csr_transpose(data, np.array([0, 2, 1]), np.array(indptr), 3)


def test_indices_of_foreign_byte_order():
    data, x = np.array([1.0, 2.0, 3.0]), np.eye(3)
    indices, indptr = np.array([0, 2, 1], ">i4"), np.array([0, 2, 2, 3], ">i4")
    expected = sq.csr_product(data, indices.astype(int), indptr.astype(int), x)
    np.testing.assert_array_equal(sq.csr_product(data, indices, indptr, x), expected)


def test_a_gradient_is_not_the_array_that_came():
    data, indices, indptr = np.ones(3), np.array([0, 2, 1]), np.array([0, 1, 2, 3])
    grad = np.ones((3, 3))
    x = addend = np.eye(3)
    found = sq.vjp.csr_product(grad, data, indices, indptr, x, addend=addend)
    assert not np.shares_memory(found[2], grad)


def test_numbers_beyond_64_bits():
    x = np.ones((5, 2))
    with pytest.raises(ValueError, match="offsets of 64 bits at most .* K = 65"):
        sq.sparse_factor_product(np.ones((1, 5, 65)), x)
    with pytest.raises(ValueError, match="K = 3 in factor 63"):
        sq.sparse_factor_product(np.ones((70, 5, 3)), x, pattern="cdil")
    matrix = (np.ones(1), np.zeros(1, int), np.array([0, 1]))
    with pytest.raises(ValueError, match="scale must be within the range"):
        sq.csr_product(*matrix, np.ones((1, 1)), scale=10**400)


def test_ranges_are_offsets():
    values, x = np.ones((2, 5, 3)), np.eye(5)
    expected = sq.sparse_factor_product(values, x, pattern=[0, 1, 2])
    for pattern in (range(3), [range(3), range(3)]):
        found = sq.sparse_factor_product(values, x, pattern=pattern)
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(TypeError, match="got ndarray of float64"):
        sq.sparse_factor_product(values, x, pattern=np.arange(3.0))


@pytest.mark.parametrize(
    "offset", [2**31, -(2**31) - 1, 2**40 + 1, -(2**63), 3 * 10**9]
)
def test_remainders_in_32_bits(offset):
    lengths = np.array([1, 2, 3, 7, 1000, 2**20], np.int32)
    found = reference._remainder(np, offset, lengths, 2**20)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [offset % int(n) for n in lengths])
