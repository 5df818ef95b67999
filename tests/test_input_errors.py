"""One test per rule of what is refused, and what the message must say."""

from __future__ import annotations

import numpy as np
import pytest

import subquad as sq
from subquad import GaussianNormalizer

X, Y, LW = np.zeros((4, 3)), np.zeros((5, 3)), np.zeros(5)
INDEX = np.array([0, 1, -1, 4])
LC, MU, F, DIAG = np.zeros(2), np.zeros((2, 3)), np.zeros((2, 3, 2)), np.zeros((2, 3))
GRAD = np.zeros(4)


def says(*words):
    """Regular expression: every word, in any order, case ignored."""
    return r"(?is)" + "".join(rf"(?=.*{word})" for word in words)


def refused(error, words, call):
    with pytest.raises(error, match=says(*words)):
        call()


EXACT = sq.log_normalizer
CLOSED = sq.gaussian_log_normalizer


@pytest.mark.parametrize(
    "dtype", [np.int64, np.int8, np.uint8, np.bool_, np.complex128]
)
def test_data_must_be_real_floating(dtype):
    name = np.dtype(dtype).name
    refused(TypeError, [r"\bx\b", name], lambda: EXACT(X.astype(dtype), Y))
    refused(TypeError, [r"\by\b", name], lambda: EXACT(X, Y.astype(dtype)))
    refused(
        TypeError,
        ["log_weights", name],
        lambda: EXACT(X, Y, log_weights=LW.astype(dtype)),
    )
    args = [X, LC, MU, F]
    for i, argument in enumerate(["x", "log_counts", "means", "factors"]):
        bad = [a.astype(dtype) if i == j else a for j, a in enumerate(args)]
        refused(TypeError, [rf"\b{argument}\b", name], lambda bad=bad: CLOSED(*bad))
    refused(
        TypeError,
        ["diagonal", name],
        lambda: CLOSED(*args, diagonal=DIAG.astype(dtype)),
    )


@pytest.mark.parametrize(
    "bad", [[[1.0, 2.0, 3.0]], 1.0, None, "x", ((1.0,),)], ids=repr
)
def test_data_must_be_arrays(bad):
    refused(TypeError, [r"\bx\b", type(bad).__name__], lambda: EXACT(bad, Y))
    refused(TypeError, [r"\by\b", type(bad).__name__], lambda: EXACT(X, bad))
    refused(TypeError, [r"\bx\b"], lambda: CLOSED(bad, LC, MU, F))
    refused(TypeError, ["means"], lambda: CLOSED(X, LC, bad, F))
    if bad is not None:
        refused(TypeError, ["log_weights"], lambda: EXACT(X, Y, log_weights=bad))
        refused(TypeError, ["self_index"], lambda: EXACT(X, Y, self_index=bad))


def test_object_and_string_arrays():
    refused(TypeError, [r"\bx\b", "object"], lambda: EXACT(X.astype(object), Y))
    refused(TypeError, [r"\bx\b"], lambda: EXACT(X.astype(str), Y))


def test_arrays_are_positional_options_are_keywords():
    with pytest.raises(TypeError):
        EXACT(x=X, y=Y)
    with pytest.raises(TypeError):
        EXACT(X, Y, LW)
    with pytest.raises(TypeError):
        CLOSED(X, log_counts=LC, means=MU, factors=F)
    with pytest.raises(TypeError):
        GaussianNormalizer(1, "full")
    with pytest.raises(TypeError):
        EXACT(X, Y, weights=LW)


def test_rank():
    refused(ValueError, [r"\bx\b", "1"], lambda: EXACT(X[0], Y))
    refused(ValueError, [r"\by\b", "1"], lambda: EXACT(X, Y[0]))
    refused(ValueError, [r"\bx\b"], lambda: EXACT(np.array(1.0), Y))
    refused(ValueError, ["log_weights"], lambda: EXACT(X, Y, log_weights=np.array(0.0)))
    refused(ValueError, [r"\bx\b"], lambda: CLOSED(X[0], LC, MU, F))
    refused(ValueError, ["log_counts"], lambda: CLOSED(X, np.array(0.0), MU, F))
    refused(ValueError, ["means"], lambda: CLOSED(X, LC, MU[0], F))
    refused(ValueError, ["factors"], lambda: CLOSED(X, LC, MU, F[0]))
    refused(ValueError, ["diagonal"], lambda: CLOSED(X, LC, MU, F, diagonal=DIAG[0]))


def test_sizes():
    refused(ValueError, [r"\by\b", "3", "2"], lambda: EXACT(X, Y[:, :2]))
    refused(
        ValueError, ["log_weights", "5", "4"], lambda: EXACT(X, Y, log_weights=LW[:4])
    )
    # One weight for all keys would be a guess.
    refused(
        ValueError, ["log_weights", "5", "1"], lambda: EXACT(X, Y, log_weights=LW[:1])
    )
    refused(ValueError, ["log_counts", "2", "3"], lambda: CLOSED(X, np.zeros(3), MU, F))
    refused(ValueError, ["means", "3", "4"], lambda: CLOSED(X, LC, np.zeros((2, 4)), F))
    refused(
        ValueError,
        ["factors", "3", "4"],
        lambda: CLOSED(X, LC, MU, np.zeros((2, 4, 2))),
    )
    refused(
        ValueError,
        ["factors", "2", "5"],
        lambda: CLOSED(X, LC, MU, np.zeros((5, 3, 2))),
    )
    refused(
        ValueError,
        ["diagonal", "3", "4"],
        lambda: CLOSED(X, LC, MU, F, diagonal=np.zeros((2, 4))),
    )


def test_batches_that_do_not_broadcast():
    refused(
        ValueError,
        [r"\by\b", "2", "3"],
        lambda: EXACT(np.zeros((2, 4, 3)), np.zeros((3, 5, 3))),
    )
    refused(
        ValueError,
        ["log_weights", "2", "3"],
        lambda: EXACT(np.zeros((2, 4, 3)), Y, log_weights=np.zeros((3, 5))),
    )
    refused(
        ValueError,
        ["means", "2", "7"],
        lambda: CLOSED(np.zeros((2, 4, 3)), LC, np.zeros((7, 2, 3)), F),
    )


def test_self_index_type():
    for dtype in (np.float64, np.bool_):
        refused(
            TypeError,
            ["self_index", np.dtype(dtype).name],
            lambda dtype=dtype: EXACT(X, Y, self_index=INDEX.astype(dtype)),
        )


def test_self_index_shape():
    for bad in (INDEX[:3], INDEX[None], np.array(0)):
        refused(
            ValueError, ["self_index", "4"], lambda bad=bad: EXACT(X, Y, self_index=bad)
        )


@pytest.mark.parametrize("value", [5, -2, 2**40, -(2**40)])
@pytest.mark.parametrize("term", ["include", "exclude"])
def test_self_index_range(value, term):
    index = INDEX.copy()
    index[2] = value
    refused(
        ValueError,
        ["self_index", str(value)],
        lambda: EXACT(X, Y, self_index=index, self_term=term),
    )


def test_self_index_range_in_torch():
    torch = pytest.importorskip("torch")
    x, y = torch.zeros(4, 3), torch.zeros(5, 3)
    refused(
        ValueError,
        ["self_index", "5"],
        lambda: EXACT(x, y, self_index=torch.tensor([0, 5, 1, 2]), self_term="exclude"),
    )


@pytest.mark.parametrize("bad", ["excluded", "", None, True, 0])
def test_self_term(bad):
    refused(
        (ValueError, TypeError),
        ["self_term", "include", "exclude"],
        lambda: EXACT(X, Y, self_index=INDEX, self_term=bad),
    )


def test_exclude_needs_self_index():
    refused(ValueError, ["self_index"], lambda: EXACT(X, Y, self_term="exclude"))
    est = GaussianNormalizer().fit(Y)
    refused(
        ValueError, ["self_index"], lambda: est.log_normalizer(X, self_term="exclude")
    )


def test_libraries_do_not_mix():
    torch = pytest.importorskip("torch")
    jnp = pytest.importorskip("jax.numpy")
    tensor, jaxed = torch.zeros(5, 3, dtype=torch.float64), jnp.zeros((5, 3))
    refused(TypeError, ["numpy", "torch"], lambda: EXACT(X, tensor))
    refused(TypeError, ["numpy", "jax"], lambda: EXACT(X, jaxed))
    refused(TypeError, ["torch", "jax"], lambda: EXACT(tensor, jaxed))
    refused(
        TypeError,
        ["numpy", "torch"],
        lambda: EXACT(tensor, tensor, self_index=np.arange(5)),
    )
    refused(TypeError, ["numpy", "torch"], lambda: CLOSED(X, LC, torch.zeros(2, 3), F))


def test_devices_do_not_mix():
    torch = pytest.importorskip("torch")
    x, y = torch.zeros(4, 3), torch.zeros(5, 3, device="meta")
    refused(TypeError, ["cpu", "meta"], lambda: EXACT(x, y))


def test_vjp_gradient():
    refused(
        ValueError, ["grad", "4", "3"], lambda: sq.vjp.log_normalizer(GRAD[:3], X, Y)
    )
    refused(ValueError, ["grad"], lambda: sq.vjp.log_normalizer(np.zeros((2, 4)), X, Y))
    refused(
        TypeError,
        ["grad", "int64"],
        lambda: sq.vjp.log_normalizer(GRAD.astype(int), X, Y),
    )
    refused(
        ValueError, ["out"], lambda: sq.vjp.log_normalizer(GRAD, X, Y, out=np.zeros(3))
    )
    refused(
        ValueError,
        ["grad"],
        lambda: sq.vjp.gaussian_log_normalizer(GRAD[:3], X, LC, MU, F),
    )


# -------------------------------------------------------------------------- features

P, B, ROOT = np.zeros((6, 3)), np.zeros(6), np.zeros((2, 3))
FEATURES = [sq.log_features, sq.trigonometric_features]
each_form = pytest.mark.parametrize("function", FEATURES)


@each_form
@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex128])
def test_arrays_of_features_must_be_real_floating(function, dtype):
    name = np.dtype(dtype).name
    arrays = [X, P, B, ROOT]
    for i, argument in enumerate(["x", "projection", "bias", "quadratic"]):
        bad = [a.astype(dtype) if i == j else a for j, a in enumerate(arrays)]
        refused(TypeError, [rf"\b{argument}\b", name], lambda bad=bad: function(*bad))
    for option in ("shift", "linear"):
        given = {option: np.zeros(3, dtype)}
        refused(
            TypeError, [option, name], lambda given=given: function(*arrays, **given)
        )
    refused(TypeError, [r"\bx\b", name], lambda: sq.hadamard_transform(X.astype(dtype)))


@each_form
@pytest.mark.parametrize("bad", [[[1.0, 2.0]], 1.0, None, "x"], ids=repr)
def test_features_are_of_arrays(function, bad):
    kind = type(bad).__name__
    refused(TypeError, [r"\bx\b", kind], lambda: function(bad, P, B, None))
    refused(TypeError, ["projection", kind], lambda: function(X, bad, B, None))
    refused(TypeError, ["bias", kind], lambda: function(X, P, bad, None))
    refused(TypeError, [r"\bx\b", kind], lambda: sq.hadamard_transform(bad))
    if bad is not None:
        refused(TypeError, ["quadratic", kind], lambda: function(X, P, B, bad))
        refused(TypeError, ["shift"], lambda: function(X, P, B, None, shift=bad))


@each_form
def test_ranks_of_features(function):
    refused(ValueError, [r"\bx\b", "1"], lambda: function(X[0], P, B, None))
    refused(ValueError, ["projection", "1"], lambda: function(X, P[0], B, None))
    refused(ValueError, ["bias", "0"], lambda: function(X, P, np.array(0.0), None))
    for bad in (np.array(0.0), np.zeros((2, 2, 3))):
        refused(
            ValueError,
            ["quadratic", "diagonal", "factor", r"\(\.\.\., d\)"],
            lambda bad=bad: function(X, P, B, bad),
        )
    scalar = np.array(0.0)
    refused(ValueError, ["shift"], lambda: function(X, P, B, None, shift=scalar))
    refused(ValueError, ["linear"], lambda: function(X, P, B, None, linear=scalar))


@each_form
def test_sizes_of_features(function):
    short = np.zeros(2)
    refused(
        ValueError, ["projection", "3", "2"], lambda: function(X, P[:, :2], B, None)
    )
    refused(ValueError, ["bias", "6", "5"], lambda: function(X, P, B[:5], None))
    refused(ValueError, ["quadratic", "3", "2"], lambda: function(X, P, B, short))
    refused(ValueError, ["quadratic", "3", "2"], lambda: function(X, P, B, ROOT[:, :2]))
    refused(
        ValueError, ["shift", "3", "2"], lambda: function(X, P, B, None, shift=short)
    )
    refused(
        ValueError, ["linear", "3", "2"], lambda: function(X, P, B, None, linear=short)
    )
    heads = np.zeros((2, 4, 3))
    refused(
        ValueError,
        ["projection", "2", "5"],
        lambda: function(heads, np.zeros((5, 6, 3)), B, None),
    )
    refused(
        ValueError,
        ["shift", "2", "5"],
        lambda: function(heads, P, B, None, shift=np.zeros((5, 3))),
    )


@pytest.mark.parametrize("bad", [1, 0.0, None, "yes"])
def test_antithetic(bad):
    refused(
        TypeError,
        ["antithetic", "True", "False"],
        lambda: sq.log_features(X, P, B, None, antithetic=bad),
    )


@pytest.mark.parametrize("d", [0, 3, 6, 100])
def test_length_of_a_transform(d):
    refused(
        ValueError,
        [r"\bx\b", "power of two", str(d)],
        lambda: sq.hadamard_transform(np.zeros((2, d))),
    )


def test_rank_of_a_transform():
    refused(ValueError, [r"\bx\b"], lambda: sq.hadamard_transform(np.array(0.0)))


def test_libraries_of_features_do_not_mix():
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(6, 3, dtype=torch.float64)
    for function in FEATURES:
        refused(
            TypeError, ["x", "numpy", "torch"], lambda f=function: f(X, tensor, B, None)
        )
        refused(
            TypeError,
            ["quadratic", "numpy", "torch"],
            lambda f=function: f(X, P, B, tensor),
        )


def test_vjp_gradient_of_features():
    vjp, grad = sq.vjp.log_features, np.zeros((4, 6))
    refused(ValueError, ["grad", "6", "5"], lambda: vjp(grad[:, :5], X, P, B, None))
    refused(
        ValueError, ["grad", "12"], lambda: vjp(grad, X, P, B, None, antithetic=True)
    )
    refused(TypeError, ["grad", "int64"], lambda: vjp(grad.astype(int), X, P, B, None))
    refused(TypeError, ["grad"], lambda: vjp(None, X, P, B, None))
    refused(ValueError, ["out"], lambda: vjp(grad, X, P, B, None, out=grad[:3]))
    transform, x = sq.vjp.hadamard_transform, np.zeros((2, 4))
    refused(ValueError, ["grad", "4", "3"], lambda: transform(x[:, :3], x))
    refused(TypeError, ["grad"], lambda: transform(None, x))


# ------------------------------------------------------------------------- estimator

VALUES, ROWS, ROW_GRAD = np.zeros((2, 6, 3)), np.zeros((6, 4)), np.zeros((6, 4))
PRODUCTS = [
    sq.sparse_factor_product,
    lambda *args, **options: sq.vjp.sparse_factor_product(ROW_GRAD, *args, **options),
]
each_product = pytest.mark.parametrize("product", PRODUCTS, ids=["product", "vjp"])


@each_product
@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex128])
def test_arrays_of_products_must_be_real_floating(product, dtype):
    name = np.dtype(dtype).name
    refused(TypeError, ["values", name], lambda: product(VALUES.astype(dtype), ROWS))
    refused(TypeError, [r"\bx\b", name], lambda: product(VALUES, ROWS.astype(dtype)))
    refused(
        TypeError,
        [r"values\[1\]", name],
        lambda: product([VALUES[0], VALUES[1].astype(dtype)], ROWS),
    )


@each_product
@pytest.mark.parametrize("bad", [1.0, None, "x", [1.0]], ids=repr)
def test_products_are_of_arrays(product, bad):
    kind = r"float" if bad == [1.0] else type(bad).__name__
    refused(TypeError, ["values", kind], lambda: product(bad, ROWS))
    refused(TypeError, [r"\bx\b", type(bad).__name__], lambda: product(VALUES, bad))
    refused(TypeError, [r"values\[1\]"], lambda: product([VALUES[0], bad], ROWS))


@each_product
def test_shapes_of_products(product):
    refused(
        ValueError, ["values", r"M, n, K", "2 dim"], lambda: product(VALUES[0], ROWS)
    )
    refused(ValueError, [r"\bx\b", "1 dim"], lambda: product(VALUES, ROWS[0]))
    refused(
        ValueError, ["values", "n = 6", "n = 5"], lambda: product(VALUES[:, 1:], ROWS)
    )
    refused(
        ValueError,
        [r"values\[1\]", "n = 6", "n = 5"],
        lambda: product([VALUES[0], VALUES[1, 1:]], ROWS),
    )
    refused(ValueError, ["values", "none"], lambda: product([], ROWS))
    refused(
        ValueError,
        ["batch", r"\(3,\)", r"\(5,\)"],
        lambda: product(np.zeros((3, 2, 6, 3)), np.zeros((5, 6, 4))),
    )
    refused(
        ValueError,
        ["segment_ids", r"\(6,\)", r"\(5,\)"],
        lambda: product(VALUES, ROWS, segment_ids=np.zeros(5, int)),
    )
    refused(
        TypeError,
        ["segment_ids", "integers", "float64"],
        lambda: product(VALUES, ROWS, segment_ids=np.zeros(6)),
    )


@each_product
@pytest.mark.parametrize("bad", ["chords", "", "CHORD"])
def test_names_of_patterns(product, bad):
    words = ["pattern", "chord", "cdil", repr(bad)]
    refused(ValueError, words, lambda: product(VALUES, ROWS, pattern=bad))


@each_product
def test_offsets_that_do_not_fit(product):
    def call(pattern, values=VALUES):
        return lambda: product(values, ROWS, pattern=pattern)

    refused(ValueError, ["K = 3", "got 2"], call([0, 1]))
    refused(ValueError, ["K = 3", "factor 1", "got 2"], call([[0, 1, 2], [0, 1]]))
    refused(ValueError, ["M = 2", "got 3 rows"], call(np.zeros((3, 3), int)))
    refused(ValueError, ["M = 2", "got 1 row"], call([[0, 1, 2]]))
    refused(ValueError, ["pattern", "3 dim"], call(np.zeros((1, 2, 3), int)))
    refused(ValueError, ["pattern", "0 dim"], call(np.array(3)))
    refused(ValueError, ["K = 3", "got 0"], call([]))
    refused(ValueError, ["64 bits", str(2**63)], call([0, 1, 2**63]))
    refused(ValueError, ["64 bits"], call(np.array([0, 1, 2**63], np.uint64)))
    lists = [VALUES[0], VALUES[1, :, :2]]
    refused(ValueError, ["K = 2", "factor 1", "got 3"], call([0, 1, 2], lists))
    refused(ValueError, ["odd", "K = 2", "factor 1"], call("cdil", lists))
    even = np.zeros((1, 6, 4))
    refused(ValueError, ["odd", "K = 4"], call("cdil", even))


@each_product
@pytest.mark.parametrize(
    "bad",
    [
        None,
        1.5,
        [0, 1, 2.0],
        [0, True, 2],
        [0, None, 2],
        [[0, 1, 2], [0, 1, "2"]],
        [[0, 1, 2], 3],
        np.zeros(3),
        np.zeros(3, bool),
        {"a": 1},
    ],
    ids=repr,
)
def test_offsets_are_integers(product, bad):
    refused(
        TypeError,
        ["pattern", "integers"],
        lambda: product(VALUES, ROWS, pattern=bad),
    )


def test_offsets_are_static():
    jax = pytest.importorskip("jax")

    @jax.jit
    def traced(pattern):
        return sq.sparse_factor_product(
            jax.numpy.zeros((2, 6, 3)), jax.numpy.zeros((6, 4)), pattern=pattern
        )

    refused(TypeError, ["pattern", "static"], lambda: traced(jax.numpy.arange(3)))


@each_product
@pytest.mark.parametrize("bad", ["steps", "", None, True, 0])
def test_residuals(product, bad):
    refused(
        ValueError,
        ["residual", "'none'", "'step'", "'input'", repr(bad)],
        lambda: product(VALUES, ROWS, residual=bad),
    )
    weights = (np.zeros((2, 5, 4)), np.zeros((2, 5)), np.zeros((2, 3, 5)), VALUES[:, 0])
    refused(
        ValueError,
        ["residual", repr(bad)],
        lambda: sq.paramixer(ROWS, ROWS, weights, residual=bad),
    )


@pytest.mark.parametrize("bad", [1, 0.0, None, "yes"])
def test_flags_of_products(bad):
    for product in PRODUCTS:
        for name in ("circular", "transpose"):
            refused(
                TypeError,
                [name, "True or False", repr(bad)],
                lambda product=product, name=name: product(VALUES, ROWS, **{name: bad}),
            )
    for name in ("return_intermediates", "recompute"):
        refused(
            TypeError,
            [name, "True or False", repr(bad)],
            lambda name=name: PRODUCTS[0](VALUES, ROWS, **{name: bad}),
        )


def test_there_are_no_intermediates():
    product, reverse = PRODUCTS
    options = {"return_intermediates": True}
    words = ["return_intermediates", "transpose"]
    refused(ValueError, words, lambda: product(VALUES, ROWS, transpose=True, **options))
    words = ["return_intermediates", "list"]
    refused(ValueError, words, lambda: product(list(VALUES), ROWS, **options))
    kept = {"intermediates": np.zeros((1, 6, 4))}
    words = ["intermediates", "transpose"]
    refused(ValueError, words, lambda: reverse(VALUES, ROWS, transpose=True, **kept))
    words = ["intermediates", "list"]
    refused(ValueError, words, lambda: reverse(list(VALUES), ROWS, **kept))
    kept = {"intermediates": np.zeros((2, 6, 4))}
    refused(
        ValueError,
        ["intermediates", r"\(2, 6, 4\)"],
        lambda: reverse(VALUES, ROWS, **kept),
    )


def test_vjp_gradient_of_products():
    reverse = sq.vjp.sparse_factor_product
    refused(TypeError, ["grad"], lambda: reverse(None, VALUES, ROWS))
    refused(ValueError, ["grad", r"\(6, 4\)"], lambda: reverse(ROWS[1:], VALUES, ROWS))
    refused(TypeError, ["grad"], lambda: reverse(ROWS.astype(int), VALUES, ROWS))
    refused(
        ValueError,
        [r"\bout\b", r"\(6, 4\)"],
        lambda: reverse(ROWS, VALUES, ROWS, out=ROWS[1:]),
    )


def test_libraries_of_products_do_not_mix():
    torch = pytest.importorskip("torch")
    rows = torch.zeros(6, 4, dtype=torch.float64)
    words = ["numpy", "torch", "values", r"\bx\b"]
    refused(TypeError, words, lambda: sq.sparse_factor_product(VALUES, rows))
    mixed = [VALUES[0], torch.zeros(6, 3)]
    refused(
        TypeError,
        ["numpy", "torch", r"values\[1\]"],
        lambda: sq.sparse_factor_product(mixed, ROWS),
    )
    ids = torch.zeros(6, dtype=torch.int64)
    refused(
        TypeError,
        ["numpy", "torch", "segment_ids"],
        lambda: sq.sparse_factor_product(VALUES, ROWS, segment_ids=ids),
    )


@pytest.mark.parametrize("bad", [0, -3])
def test_sizes_of_patterns_are_positive(bad):
    for name, call in {
        "n": sq.chord_offsets,
        "n_links": lambda n: sq.chord_offsets(5, n),
        "kernel_size": lambda n: sq.cdil_offsets(5, kernel_size=n),
        "n_factors": lambda n: sq.cdil_offsets(5, n_factors=n),
    }.items():
        refused(
            ValueError,
            [rf"\b{name}\b", "at least 1", str(bad)],
            lambda call=call: call(bad),
        )
    refused(ValueError, [r"\bn\b", "at least 1"], lambda: sq.cdil_offsets(bad))


@pytest.mark.parametrize("bad", [1.5, "3", True, None, [4]], ids=repr)
def test_sizes_of_patterns_are_integers(bad):
    refused(TypeError, [r"\bn\b", "integer"], lambda: sq.chord_offsets(bad))
    refused(TypeError, [r"\bn\b", "integer"], lambda: sq.cdil_offsets(bad))
    refused(
        TypeError,
        ["kernel_size", "integer"],
        lambda: sq.cdil_offsets(5, kernel_size=bad),
    )
    if bad is None:
        return
    refused(TypeError, ["n_links", "integer"], lambda: sq.chord_offsets(5, bad))
    refused(
        TypeError, ["n_factors", "integer"], lambda: sq.cdil_offsets(5, n_factors=bad)
    )


def test_patterns_that_cannot_be():
    refused(
        ValueError,
        ["kernel_size", "odd", "4"],
        lambda: sq.cdil_offsets(5, kernel_size=4),
    )
    refused(ValueError, ["n_links", "64"], lambda: sq.chord_offsets(5, 65))
    refused(
        ValueError, ["n_factors", "64 bits"], lambda: sq.cdil_offsets(5, n_factors=64)
    )


NETWORK = (np.zeros((2, 5, 4)), np.zeros((2, 5)), np.zeros((2, 3, 5)), np.zeros((2, 3)))
NETWORK_NAMES = ("weight_in", "bias_in", "weight_out", "bias_out")
NETWORK_CALLS = [
    sq.factor_values,
    lambda x, weights: sq.paramixer(x, ROWS, weights),
    lambda x, weights: sq.vjp.factor_values(np.zeros((2, 6, 3)), x, weights),
]
each_network = pytest.mark.parametrize(
    "call", NETWORK_CALLS, ids=["values", "paramixer", "vjp"]
)


@each_network
def test_weights_are_four_arrays(call):
    for bad in (None, NETWORK[0], "four", {1: 2}):
        words = ["weights", "tuple", type(bad).__name__]
        refused(TypeError, words, lambda bad=bad: call(ROWS, bad))
    for bad in ((), NETWORK[:3], NETWORK * 2):
        words = ["weights", "four", str(len(bad))]
        refused(ValueError, words, lambda bad=bad: call(ROWS, bad))
    for place, name in enumerate(NETWORK_NAMES):
        bad = [*NETWORK[:place], None, *NETWORK[place + 1 :]]
        refused(TypeError, [rf"\b{name}\b"], lambda bad=bad: call(ROWS, bad))
        bad[place] = NETWORK[place].astype(int)
        words = [rf"\b{name}\b", "floating", "int64"]
        refused(TypeError, words, lambda bad=bad: call(ROWS, bad))
    refused(TypeError, [r"\bx\b"], lambda: call(None, NETWORK))


@each_network
def test_shapes_of_weights(call):
    def changed(place, array):
        return lambda: call(ROWS, [*NETWORK[:place], array, *NETWORK[place + 1 :]])

    refused(ValueError, [r"\bx\b", "1 dim"], lambda: call(ROWS[0], NETWORK))
    for place, name in enumerate(NETWORK_NAMES):
        flat = NETWORK[place][0]
        refused(ValueError, [rf"\b{name}\b", "dim"], changed(place, flat))
    refused(ValueError, ["weight_in", "d = 4"], changed(0, np.zeros((2, 5, 3))))
    refused(ValueError, ["bias_in", "M = 2"], changed(1, np.zeros((3, 5))))
    refused(ValueError, ["bias_in", "h = 5"], changed(1, np.zeros((2, 4))))
    refused(ValueError, ["weight_out", "M = 2"], changed(2, np.zeros((3, 3, 5))))
    refused(ValueError, ["weight_out", "h = 5"], changed(2, np.zeros((2, 3, 4))))
    refused(ValueError, ["bias_out", "M = 2"], changed(3, np.zeros((1, 3))))
    refused(ValueError, ["bias_out", "K = 3"], changed(3, np.zeros((2, 4))))
    batched = (np.zeros((3, 2, 5, 4)), np.zeros((2, 2, 5)), *NETWORK[2:])
    refused(ValueError, ["batch", "bias_in"], lambda: call(ROWS, batched))


def test_rows_that_paramixer_mixes():
    def mixed(v, **options):
        return lambda: sq.paramixer(ROWS, v, NETWORK, **options)

    refused(TypeError, [r"\bv\b", "NoneType"], mixed(None))
    refused(TypeError, [r"\bv\b", "int64"], mixed(ROWS.astype(int)))
    refused(ValueError, [r"\bv\b", "1 dim"], mixed(ROWS[0]))
    refused(ValueError, [r"\bv\b", "n = 6", "n = 5"], mixed(ROWS[1:]))
    refused(ValueError, ["pattern", "'x'"], mixed(ROWS, pattern="x"))
    refused(TypeError, ["circular"], mixed(ROWS, circular=1))
    refused(TypeError, ["recompute"], mixed(ROWS, recompute=1))
    refused(ValueError, ["segment_ids"], mixed(ROWS, segment_ids=np.zeros(5, int)))
    batches = np.zeros((3, 6, 4))
    refused(
        ValueError,
        ["batch", r"\bv\b"],
        lambda: sq.paramixer(np.zeros((2, 6, 4)), batches, NETWORK),
    )


def test_vjp_gradient_of_networks():
    reverse = sq.vjp.factor_values
    refused(TypeError, ["grad"], lambda: reverse(None, ROWS, NETWORK))
    refused(ValueError, ["grad", r"\(2, 6, 3\)"], lambda: reverse(ROWS, ROWS, NETWORK))


CSR = (np.zeros(4), np.zeros(4, int), np.array([0, 1, 4, 4]))
CSR_CALLS = [
    sq.csr_product,
    lambda *args, **options: sq.vjp.csr_product(np.zeros((3, 2)), *args, **options),
]


@pytest.mark.parametrize("call", CSR_CALLS, ids=["product", "vjp"])
def test_sparse_matrices(call):
    x = np.zeros((5, 2))

    def changed(place, array):
        matrix = [*CSR[:place], array, *CSR[place + 1 :]]
        return lambda: call(*matrix, x)

    for place, name in enumerate(("data", "indices", "indptr")):
        refused(TypeError, [rf"\b{name}\b"], changed(place, None))
        refused(
            ValueError, [rf"\b{name}\b", "2 dim"], changed(place, CSR[place][:, None])
        )
    refused(TypeError, ["data", "int64"], changed(0, CSR[1]))
    refused(TypeError, ["indices", "integers"], changed(1, CSR[0]))
    refused(TypeError, ["indptr", "integers"], changed(2, np.zeros(4)))
    refused(ValueError, ["indices", "nnz = 4", "nnz = 3"], changed(1, CSR[1][1:]))
    refused(ValueError, ["indptr", "rows"], changed(2, np.zeros(0, int)))
    refused(TypeError, [r"\bx\b"], lambda: call(*CSR, None))
    refused(ValueError, [r"\bx\b", "columns", "1 dim"], lambda: call(*CSR, x[0]))
    for bad in (None, "2", True, 1j, np.zeros(1)):
        refused(TypeError, ["scale"], lambda bad=bad: call(*CSR, x, scale=bad))
    for bad, words in (
        (np.zeros(2), ["dim"]),
        (np.zeros((2, 2)), ["rows = 3"]),
        (np.zeros((3, 1)), ["d = 2"]),
    ):
        refused(
            ValueError, ["addend", *words], lambda bad=bad: call(*CSR, x, addend=bad)
        )
    refused(
        ValueError,
        ["addend", "batch"],
        lambda: call(*CSR, np.zeros((2, 5, 2)), addend=np.zeros((4, 3, 2))),
    )


def test_transposes_of_sparse_matrices():
    for bad in (1.0, None, True):
        words = ["n_columns", "integer"]
        refused(TypeError, words, lambda bad=bad: sq.csr_transpose(*CSR, bad))
    refused(ValueError, ["n_columns", "0", "-1"], lambda: sq.csr_transpose(*CSR, -1))
    refused(TypeError, ["data"], lambda: sq.csr_transpose(CSR[1], *CSR[1:], 3))
    refused(TypeError, ["indices"], lambda: sq.csr_transpose(CSR[0], None, CSR[2], 3))


def fit(*args, X=Y, labels=None, sample_weight=None, **options):
    return GaussianNormalizer(*args, **options).fit(
        X, labels=labels, sample_weight=sample_weight
    )


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", None, True])
def test_n_components(bad):
    refused((ValueError, TypeError), ["n_components"], lambda: fit(bad))


def test_options_of_the_estimator():
    refused(
        ValueError,
        ["covariance_type", "full", "diag", "low_rank"],
        lambda: fit(covariance_type="tied"),
    )
    refused(
        (ValueError, TypeError),
        ["rank"],
        lambda: fit(covariance_type="low_rank", rank=-1),
    )
    refused(
        (ValueError, TypeError),
        ["rank"],
        lambda: fit(covariance_type="low_rank", rank=1.5),
    )
    refused(
        (ValueError, TypeError), ["control_samples"], lambda: fit(control_samples=-1)
    )
    refused(
        (ValueError, TypeError),
        ["control_samples"],
        lambda: fit(control_samples="automatic"),
    )
    refused(
        (ValueError, TypeError), ["control_samples"], lambda: fit(control_samples=1.5)
    )
    refused((ValueError, TypeError), ["max_iter"], lambda: fit(2, max_iter=-1))
    refused(
        (ValueError, TypeError), ["random_state"], lambda: fit(2, random_state="seed")
    )


def test_keys_of_fit():
    refused(ValueError, [r"\bX\b", r"\(3,\)"], lambda: fit(X=np.zeros(3)))
    refused(ValueError, [r"\bX\b", r"\(2, 2, 2\)"], lambda: fit(X=np.zeros((2, 2, 2))))
    refused(ValueError, ["0"], lambda: fit(X=np.zeros((0, 3))))
    refused(ValueError, ["0"], lambda: fit(X=np.zeros((3, 0))))
    refused(ValueError, ["NaN"], lambda: fit(X=np.full((3, 2), np.nan)))
    refused(ValueError, ["inf"], lambda: fit(X=np.full((3, 2), np.inf)))
    refused(ValueError, ["complex"], lambda: fit(X=np.ones((3, 2), complex)))


def test_labels_of_fit():
    good = np.array([0, 1, 0, 1, 1])
    refused(ValueError, ["labels", "5", "4"], lambda: fit(2, labels=good[:4]))
    refused(ValueError, ["labels"], lambda: fit(2, labels=good[None]))
    refused(ValueError, ["labels", "2"], lambda: fit(2, labels=good + 1))
    refused(ValueError, ["labels", "-1"], lambda: fit(2, labels=good - 1))
    refused(
        (ValueError, TypeError),
        ["labels", "float64"],
        lambda: fit(2, labels=good.astype(float)),
    )


def test_weights_of_fit():
    good = np.ones(5)
    refused(
        ValueError, ["sample_weight", "5", "4"], lambda: fit(sample_weight=good[:4])
    )
    refused(ValueError, ["sample_weight"], lambda: fit(sample_weight=-good))
    refused(ValueError, ["sample_weight"], lambda: fit(sample_weight=good * np.nan))
    refused(ValueError, ["sample_weight"], lambda: fit(sample_weight=good * np.inf))
    refused(ValueError, ["sample_weight"], lambda: fit(sample_weight=good * 0))


METHODS = ["log_normalizer", "error_estimate", "standard_error", "error_bound"]


@pytest.mark.parametrize("method", METHODS)
def test_methods_need_a_fit(method):
    est = GaussianNormalizer(control_samples=3)
    with pytest.raises((ValueError, AttributeError), match=says("fit")):
        getattr(est, method)(X)


@pytest.mark.parametrize("method", METHODS)
def test_queries_must_have_the_fitted_features(method):
    est = GaussianNormalizer(control_samples=3).fit(
        np.random.default_rng(0).random((5, 3))
    )
    refused(ValueError, ["2", "3"], lambda: getattr(est, method)(X[:, :2]))
    refused(ValueError, [r"\bx\b"], lambda: getattr(est, method)(X[0]))


def test_partial_fit_must_keep_the_features():
    est = GaussianNormalizer().partial_fit(Y)
    refused(ValueError, ["2", "3"], lambda: est.partial_fit(Y[:, :2]))


def test_self_index_of_the_estimator():
    est = GaussianNormalizer().fit(Y)
    refused(
        ValueError,
        ["self_index", "5"],
        lambda: est.log_normalizer(X, self_index=np.array([0, 5, 1, 2])),
    )
    refused(
        ValueError, ["self_index"], lambda: est.log_normalizer(X, self_index=INDEX[:3])
    )
    refused(
        TypeError,
        ["self_index"],
        lambda: est.log_normalizer(X, self_index=INDEX.astype(float)),
    )
    refused(
        (ValueError, TypeError),
        ["self_term", "include", "exclude"],
        lambda: est.log_normalizer(X, self_index=INDEX, self_term="without"),
    )


def test_queries_of_another_library():
    torch = pytest.importorskip("torch")
    est = GaussianNormalizer().fit(torch.zeros(5, 3, dtype=torch.float64))
    refused(
        TypeError,
        ["numpy", "torch"],
        lambda: est.log_probabilities(X, torch.zeros(5, 3)),
    )
