"""OperatorChain: products of sparse matrices against the same with dense ones."""

from __future__ import annotations

import copy
import pickle
import sys
import threading

import numpy as np
import pytest

import subquad as sq
from _arrays import DEVICE, to_numpy
from subquad._operator_chain import OperatorChain

scipy_sparse = pytest.importorskip("scipy.sparse")

N = 23
KINDS = ["equal", "different", "rectangular"]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sparse(rows=N, columns=N, seed=0, dtype=np.float64, form="csr", index=np.int32):
    """A matrix with empty rows and columns, in any format."""
    rng = generator(seed)
    dense = rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < 0.2)
    dense[rows // 2] = 0
    matrix = scipy_sparse.csr_array(dense.astype(dtype))
    matrix.indices, matrix.indptr = (
        matrix.indices.astype(index),
        matrix.indptr.astype(index),
    )
    return matrix.asformat(form)


def chain_of(kind, mean, dtype=np.float64, length=3):
    """Matrices, and whether partial products have a mean."""
    if kind == "equal":
        matrices = [sparse(dtype=dtype)] * length
    else:
        matrices = [sparse(seed=i, dtype=dtype) for i in range(length)]
    if kind == "rectangular":
        matrices[0] = sparse(N, 9, seed=7, dtype=dtype)
        if not mean:
            matrices[-1] = sparse(12, N, seed=8, dtype=dtype)
    return OperatorChain(matrices, mean_of_partial_products=mean)


def placed(chain, mean):
    """The same chain, with its matrices where the arrays of `xp` lie."""
    if DEVICE in ("", "cpu"):
        return chain
    reason = "CuPy has the sparse matrices of a device"
    cupyx_sparse = pytest.importorskip("cupyx.scipy.sparse", reason=reason)
    on_device = {
        id(matrix): cupyx_sparse.csr_matrix(scipy_sparse.csr_matrix(matrix))
        for matrix in chain.matrices
    }
    matrices = [on_device[id(matrix)] for matrix in chain.matrices]
    return OperatorChain(matrices, mean_of_partial_products=mean)


def truth(chain, mean):
    """The operator, and the same with all magnitudes, multiplied out."""
    found = []
    for function in (np.asarray, np.abs):
        product, total = None, 0
        for matrix in chain.matrices:
            factor = function(matrix.toarray().astype(np.float64))
            product = factor if product is None else factor @ product
            if mean:
                total = total + product / len(chain)
        found.append(total if mean else product)
    return found


def check(found, dense, magnitudes, x, length):
    """Compare with dense @ x.

    Each of `length` products rounds once for each of at most N terms' products and
    sums, for the scale and for what is added; the dense one in float64 does too.
    """
    found = to_numpy(found)
    eps = np.finfo(found.dtype).eps
    wide = np.asarray(x, np.float64)
    bound = length * (2 * N + 4) * eps * (magnitudes @ np.abs(wide))
    assert found.shape == (dense @ wide).shape
    assert (np.abs(found - dense @ wide) <= bound).all()


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_product_and_transpose_are_the_dense_ones(kind, mean, xp):
    chain = chain_of(kind, mean)
    dense, magnitudes = truth(chain, mean)
    m, n = dense.shape
    assert chain.shape == (m, n)
    assert chain.T.shape == (n, m)
    chain = placed(chain, mean)
    for shape in ((n,), (n, 5), (2, n, 3)):
        x = generator(1).normal(size=shape)
        out = chain @ xp.asarray(x)
        assert isinstance(out, xp.array_type())
        check(out, dense, magnitudes, x, len(chain))
    x = generator(2).normal(size=(m, 4))
    out = chain.T @ xp.asarray(x)
    assert isinstance(out, xp.array_type())
    check(out, dense.T, magnitudes.T, x, len(chain))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_transpose_is_the_adjoint(kind, mean):
    chain = chain_of(kind, mean)
    _, magnitudes = truth(chain, mean)
    m, n = chain.shape
    x, y = generator(3).normal(size=n), generator(4).normal(size=m)
    # The roundings of three products as in `check`, and those of an inner product.
    eps = np.finfo(np.float64).eps
    bound = (3 * (2 * N + 4) + 2 * N) * eps * (np.abs(y) @ magnitudes @ np.abs(x))
    assert abs(y @ (chain @ x) - (chain.T @ y) @ x) <= bound
    np.testing.assert_array_equal(chain.T.T @ x, chain @ x)


@pytest.mark.parametrize("mean", [False, True])
def test_equal_matrices_need_not_be_one_object(mean):
    one = OperatorChain([sparse()] * 3, mean_of_partial_products=mean)
    three = OperatorChain([sparse() for _ in range(3)], mean_of_partial_products=mean)
    dense, magnitudes = truth(one, mean)
    x = generator().normal(size=(N, 2))
    check(one @ x, dense, magnitudes, x, 3)
    check(three @ x, dense, magnitudes, x, 3)


def test_one_matrix_is_a_chain_of_one():
    matrix = sparse(5, 8)
    x = generator().normal(size=(8, 3))
    for chain in (
        OperatorChain(matrix),
        OperatorChain([matrix]),
        OperatorChain(iter([matrix]), mean_of_partial_products=True),
    ):
        assert len(chain) == 1
        np.testing.assert_array_equal(chain @ x, OperatorChain((matrix,)) @ x)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil", "dok", "bsr", "dia"])
def test_formats(form):
    x = generator().normal(size=(N, 2))
    expected = OperatorChain([sparse()]) @ x
    for matrix in (sparse(form=form), scipy_sparse.csr_matrix(sparse()).asformat(form)):
        chain = OperatorChain([matrix])
        assert chain.matrices[0].format == "csr"
        np.testing.assert_allclose(chain @ x, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_index_types(index):
    x = generator().normal(size=(N, 2))
    chain = OperatorChain([sparse(index=index)] * 2)
    assert chain.matrices[0].indices.dtype == index
    np.testing.assert_array_equal(chain @ x, OperatorChain([sparse()] * 2) @ x)
    np.testing.assert_array_equal(chain.T @ x, OperatorChain([sparse()] * 2).T @ x)


def test_repeated_and_unsorted_columns_add_up():
    matrix = scipy_sparse.csr_array(
        (np.array([1.0, 2.0, 4.0, 8.0]), np.array([2, 0, 2, 1]), np.array([0, 3, 4])),
        shape=(2, 3),
    )
    chain = OperatorChain(matrix)
    np.testing.assert_array_equal(chain @ np.eye(3), [[2, 0, 5], [0, 8, 0]])
    np.testing.assert_array_equal(chain.T @ np.eye(2), [[2, 0], [0, 8], [5, 0]])


@pytest.mark.parametrize("dtype", [np.int8, np.uint32, np.int64, np.bool_])
def test_integers_become_float64(dtype):
    matrix = scipy_sparse.csr_array(np.array([[0, 1], [1, 1]], dtype))
    chain = OperatorChain([matrix] * 3)
    assert chain.dtype == np.float64
    assert matrix.dtype == dtype
    np.testing.assert_array_equal(chain @ np.array([0.0, 1.0]), [2, 3])


@pytest.mark.parametrize(
    ("first", "second", "of_x", "expected"),
    [
        ("float32", "float32", "float32", "float32"),
        ("float32", "float32", "float64", "float64"),
        ("float32", "float64", "float32", "float64"),
        ("int32", "float32", "float32", "float64"),
        ("float32", "float32", "float16", "float32"),
    ],
)
def test_types_of_results(first, second, of_x, expected):
    matrices = [sparse().astype(first), sparse(seed=1).astype(second)]
    chain = OperatorChain(matrices)
    x = generator().normal(size=(N, 2)).astype(of_x)
    dense, magnitudes = truth(chain, False)
    for operator, matrix, size in (
        (chain, dense, magnitudes),
        (chain.T, dense.T, magnitudes.T),
    ):
        out = operator @ x
        assert out.dtype == expected
        check(out, matrix, size, x, 2)


def test_astype():
    chain = chain_of("different", True)
    narrow = chain.astype(np.float32)
    x = generator().normal(size=(N, 2)).astype(np.float32)
    assert (chain.dtype, narrow.dtype) == (np.float64, np.float32)
    assert narrow.matrices[1].dtype == np.float32
    assert (narrow @ x).dtype == np.float32
    dense, magnitudes = truth(narrow, True)
    check(narrow @ x, dense, magnitudes, x, 3)
    check(narrow.T @ x, dense.T, magnitudes.T, x, 3)
    np.testing.assert_array_equal(chain.T.astype("f8") @ x, chain.T @ x)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got int64"):
        chain.astype(int)


def test_rows_in_any_memory():
    chain = chain_of("equal", True)
    wide = generator().normal(size=(2 * N, 6))
    x = wide[::-2, ::2]
    expected = chain @ np.ascontiguousarray(x)
    tolerance = {"rtol": 1e-12, "atol": 1e-13}
    np.testing.assert_allclose(chain @ x, expected, **tolerance)
    np.testing.assert_allclose(chain @ np.asfortranarray(x), expected, **tolerance)
    x.flags.writeable = False
    np.testing.assert_allclose(chain @ x, expected, **tolerance)
    batch = np.broadcast_to(x, (3, *x.shape))
    np.testing.assert_allclose(chain @ batch, [expected] * 3, **tolerance)


@pytest.mark.skipif(DEVICE not in ("", "cpu"), reason="it is memory of the CPU")
def test_matrices_in_memory_that_is_read_only(xp):
    matrix = sparse()
    for array in (matrix.data, matrix.indices, matrix.indptr):
        array.flags.writeable = False
    x = generator().normal(size=(N, 2))
    out = OperatorChain([matrix] * 2) @ xp.asarray(x)
    np.testing.assert_allclose(
        to_numpy(out), OperatorChain([sparse()] * 2) @ x, rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("mean", [False, True])
def test_empty(mean):
    chain = OperatorChain(
        [scipy_sparse.csr_array((4, 4))] * 2, mean_of_partial_products=mean
    )
    np.testing.assert_array_equal(chain @ np.ones((4, 3)), np.zeros((4, 3)))
    np.testing.assert_array_equal(chain.T @ np.ones(4), np.zeros(4))
    assert (chain @ np.ones((4, 0))).shape == (4, 0)
    none = OperatorChain([scipy_sparse.csr_array((0, 3))])
    assert (none @ np.ones((3, 2))).shape == (0, 2)
    np.testing.assert_array_equal(none.T @ np.ones((0, 2)), np.zeros((3, 2)))


def test_nan_reaches_the_rows_that_have_it():
    chain = OperatorChain([sparse()])
    x = np.ones(N)
    x[4] = np.nan
    meets = sparse().toarray()[:, 4] != 0
    assert meets.any()
    np.testing.assert_array_equal(np.isnan(chain @ x), meets)


def test_mean_of_steps_of_a_random_walk_keeps_row_sums():
    adjacency = sparse().astype(bool) + scipy_sparse.eye_array(N, dtype=bool)
    step = scipy_sparse.diags_array(1 / adjacency.sum(axis=1)) @ adjacency
    chain = OperatorChain([step] * 5, mean_of_partial_products=True)
    np.testing.assert_allclose(chain @ np.ones(N), 1, rtol=1e-14)


def test_attributes():
    chain = chain_of("rectangular", False)
    assert (chain.shape, chain.ndim, len(chain)) == ((12, 9), 2, 3)
    assert [matrix.shape for matrix in chain.matrices] == [(N, 9), (N, N), (12, N)]
    assert [matrix.shape for matrix in chain.T.matrices] == [(N, 12), (N, N), (9, N)]
    assert repr(chain) == "<OperatorChain of 3 matrices, product: (12, 9), float64>"
    with pytest.raises(AttributeError):
        chain.shape = (1, 1)
    with pytest.raises(TypeError, match="unsupported operand"):
        np.ones((2, 12)) @ chain


def test_nothing_is_copied_or_changed():
    matrix = sparse()
    before = matrix.copy()
    chain = OperatorChain([matrix] * 2)
    chain.T @ np.ones(N)
    assert chain.matrices[0] is chain.matrices[1]
    assert np.shares_memory(chain.matrices[0].data, matrix.data)
    assert (matrix != before).nnz == 0


@pytest.mark.parametrize("mean", [False, True])
def test_pickle_and_copy(mean):
    chain = chain_of("equal", mean).T.astype(np.float32)
    x = generator().normal(size=(N, 2))
    for other in (
        pickle.loads(pickle.dumps(chain)),
        copy.copy(chain),
        copy.deepcopy(chain),
    ):
        assert repr(other) == repr(chain)
        first, second, _ = other.matrices
        assert first is second
        np.testing.assert_array_equal(other @ x, chain @ x)


def test_as_a_linear_operator_of_scipy():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    chain = chain_of("rectangular", False)
    dense, _ = truth(chain, False)
    operator = linalg.aslinearoperator(chain)
    assert (operator.shape, operator.dtype) == (chain.shape, np.float64)
    x, y = generator().normal(size=(9, 2)), generator(1).normal(size=(12, 2))
    np.testing.assert_allclose(operator @ x, chain @ x, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(operator.rmatmat(y), chain.rmatmat(y))
    np.testing.assert_array_equal(chain.matmat(x), chain @ x)
    np.testing.assert_array_equal(operator.rmatvec(y[:, :1]), chain.T @ y[:, :1])
    values = linalg.svds(operator, k=2, return_singular_vectors=False, random_state=0)
    expected = np.linalg.svd(dense, compute_uv=False)[:2]
    np.testing.assert_allclose(np.sort(values)[::-1], expected, rtol=1e-8)


def test_many_threads_share_a_chain():
    chain = chain_of("different", True)
    x = generator().normal(size=(N, 2))
    expected = chain_of("different", True).T @ x
    found = [None] * 8

    def multiply(i):
        found[i] = chain.T @ x

    threads = [threading.Thread(target=multiply, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in found:
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_torch(kind, mean):
    torch = pytest.importorskip("torch")
    chain = chain_of(kind, mean)
    dense, magnitudes = truth(chain, mean)
    m, n = chain.shape
    for shape in ((n,), (2, n, 2)):
        x = torch.from_numpy(generator().normal(size=shape)).requires_grad_()
        out = chain @ x
        grad = generator(1).normal(size=tuple(out.shape))
        out.backward(torch.from_numpy(grad))
        check(x.grad, dense.T, magnitudes.T, grad, len(chain))
    x = torch.from_numpy(generator().normal(size=(n, 1))).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: chain @ rows, (x,))
    assert torch.autograd.gradcheck(
        lambda rows: chain.T @ rows, (torch.ones((m, 1)).double().requires_grad_(),)
    )


def test_torch_takes_the_memory_of_the_matrices():
    torch = pytest.importorskip("torch")
    matrix = sparse()
    chain = OperatorChain([matrix])
    chain @ torch.ones(N, dtype=torch.float64)
    (arrays,) = chain._matrices[0]._arrays.values()
    for array, own in zip(
        arrays, (matrix.data, matrix.indices, matrix.indptr), strict=True
    ):
        assert array.data_ptr() == own.ctypes.data
    with pytest.raises(TypeError, match="x must lie where the matrices do, on cpu"):
        chain @ torch.ones(N, dtype=torch.float64, device="meta")


@pytest.mark.parametrize("mean", [False, True])
def test_jit_and_gradients_of_jax(mean):
    jax = pytest.importorskip("jax")
    chain = chain_of("different", mean)
    dense, magnitudes = truth(chain, mean)
    x = generator().normal(size=(N, 2))
    weights = generator(1).normal(size=(N, 2))

    @jax.jit
    def loss(rows):
        return (weights * (chain @ rows)).sum()

    # The roundings of three products as in `check`, and those of a sum of 2 N terms.
    roundings = 3 * (2 * N + 4) + 4 * N
    sizes = (np.abs(weights) * (magnitudes @ np.abs(x))).sum()
    bound = roundings * np.finfo(np.float64).eps * sizes
    assert abs(float(loss(x)) - (weights * (dense @ x)).sum()) <= bound
    check(jax.grad(loss)(jax.numpy.asarray(x)), dense.T, magnitudes.T, weights, 3)
    # What was made while tracing is of use outside.
    check(chain @ jax.numpy.asarray(x), dense, magnitudes, x, 3)


def test_dask_stays_a_graph():
    da = pytest.importorskip("dask.array")
    chain = chain_of("equal", True)
    dense, magnitudes = truth(chain, True)
    x = generator().normal(size=(N, 6))
    out = chain @ da.from_array(x, chunks=(7, 3))
    assert isinstance(out, da.Array)
    assert out.chunks[1] == (3, 3)
    check(out, dense, magnitudes, x, 3)


def test_importing_does_not_load_scipy():
    # The module itself names no library that may be missing.
    source = sys.modules[OperatorChain.__module__].__file__
    with open(source, encoding="utf-8") as lines:
        assert not any(
            line.strip().startswith(("import scipy", "from scipy")) for line in lines
        )


def test_other_kinds_of_matrices_are_refused():
    matrix = sparse()
    with pytest.raises(TypeError, match="matrices must be a sequence of sparse"):
        OperatorChain(np.eye(3))
    with pytest.raises(TypeError, match=r"matrices\[1\] must be a sparse matrix of"):
        OperatorChain([matrix, np.eye(N)])
    with pytest.raises(TypeError, match=r"got builtins\.int"):
        OperatorChain(3)
    with pytest.raises(ValueError, match="at least one matrix, got none"):
        OperatorChain([])
    with pytest.raises(TypeError, match=r"matrices\[1\] must hold .* got complex128"):
        OperatorChain([matrix, matrix * 1j])
    with pytest.raises(ValueError, match=r"matrices\[0\] must have shape"):
        OperatorChain([scipy_sparse.coo_array(np.ones(3))])
    with pytest.raises(TypeError, match="mean_of_partial_products must be True"):
        OperatorChain([matrix], mean_of_partial_products=1)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"matrices\[1\] must have as many columns"):
        OperatorChain([sparse(4, 5), sparse(5, 3)])
    with pytest.raises(ValueError, match=r"matrices\[1\] must have as many rows"):
        OperatorChain([sparse(4, 5), sparse(3, 4)], mean_of_partial_products=True)
    chain = OperatorChain([sparse(4, 5)])
    with pytest.raises(ValueError, match=r"x must have shape \(n,\) with n = 5"):
        chain @ np.ones(4)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., n, d\)"):
        chain.T @ np.ones((5, 2))
    with pytest.raises(ValueError, match="got 0 dimensions"):
        chain @ np.array(1.0)
    with pytest.raises(TypeError, match="x must be"):
        chain @ np.ones(5, int)
    with pytest.raises(TypeError, match="x must be an array"):
        chain @ [1.0] * 5


def test_what_inference_took_along_serves_gradients():
    torch = pytest.importorskip("torch")
    matrix = sparse()
    chain = OperatorChain([matrix])
    x = torch.ones(N, 2, dtype=torch.float64)
    with torch.inference_mode():
        chain @ x
        chain.T @ x
    x.requires_grad_()
    (grad,) = torch.autograd.grad((chain @ x).sum(), x)
    expected = matrix.T @ np.ones((matrix.shape[0], 2))
    np.testing.assert_allclose(grad.numpy(), expected, rtol=1e-14, atol=1e-14)


def test_entries_of_another_type_are_rounded():
    matrix = scipy_sparse.csr_array(np.array([[1 / 3, 0.0], [0.0, 1 / 7]]))
    chain = OperatorChain(matrix).astype("float32")
    expected = chain.matrices[0] @ np.ones(2)
    np.testing.assert_array_equal(chain @ np.ones(2), expected.astype(np.float32))
    np.testing.assert_array_equal((chain @ np.ones(2))[0], np.float32(1 / 3))


def test_the_package_has_it():
    assert sq.OperatorChain is OperatorChain
