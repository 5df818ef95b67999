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
