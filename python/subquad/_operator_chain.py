"""Products of sparse matrices, never multiplied out: re-exported by `subquad.factors`.

Nothing here imports scipy: matrices are recognised by their method `tocsr`, and it is
they that call scipy, or CuPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _dispatch
from ._host import from_host, has_float64
from ._validation.common import (
    as_dtype,
    check_flag,
    check_size,
    common_floats,
    dtype_name,
    wrong_rank,
)

Array: TypeAlias = Any
SparseMatrix: TypeAlias = Any
CompressedRows: TypeAlias = tuple[Array, Array, Array]
# Library, device and type of what is multiplied, and the type of the chain's entries.
Key: TypeAlias = tuple[str, str, str, str]
# Of A, rows, what is added and a scale: scale A rows + what is added.
Multiply: TypeAlias = Callable[["_Matrix", Array, Array | None, float], Array]
# A matrix A, or none, rows and a scale, for scale A rows.
LastProduct: TypeAlias = tuple[CompressedRows | None, Array, float]


class OperatorChain:
    """Product of sparse matrices, or the mean of its partial products.

    With the matrices A₁ … A_L in the order in which they are applied, the operator is
    A_L ⋯ A₂ A₁, or (A₁ + A₂ A₁ + … + A_L ⋯ A₁) / L. Neither is ever formed: `chain @ x`
    multiplies `x` by one matrix after another.

    Parameters
    ----------
    matrices : sequence of sparse matrices
        Matrices or arrays of `scipy.sparse`, or of `cupyx.scipy.sparse`, in any format;
        `matrices[0]` is applied first. Each has as many columns as the one before it
        has rows. Entries that are integers or booleans become float64. One matrix alone
        is a chain of one. What is in compressed rows already is not copied, and must
        not be changed while the chain is in use.
    mean_of_partial_products : bool, default=False
        Take the mean of the partial products; all matrices must have equal numbers of
        rows then.

    Raises
    ------
    TypeError
        If something in `matrices` is not a sparse matrix, or its entries are neither
        float32, float64, integer nor boolean, or `mean_of_partial_products` is not a
        bool.
    ValueError
        If there is no matrix, one does not have two dimensions, or shapes do not fit.

    See Also
    --------
    subquad.csr_product : One product, from the arrays of a matrix.

    Notes
    -----
    A product takes O(nnz d) time for each matrix, nnz its stored entries and d the
    columns of `x`, and the memory of two results. The mean takes no longer where all
    matrices are one object, and in the transpose (Horner's scheme); otherwise each
    partial product is added in a pass of its own. `chain.T` and gradients need the
    transpose of each matrix in compressed rows: it is made once, at their first use,
    and doubles the memory of the matrices.

    The mean of the partial products of L equal matrices D⁻¹A, the steps of a random
    walk on a graph, is the affinity that DeepWalk samples from [1]_ and EDRep embeds
    [2]_.

    `scipy.sparse.linalg.aslinearoperator` takes chains. torch tensors and JAX arrays
    are differentiable in `x`. The entries of the matrices are taken to the library of
    `x` once, without a copy where that is possible.

    References
    ----------
    .. [1] B. Perozzi, R. Al-Rfou, S. Skiena, "DeepWalk: Online Learning of Social
       Representations", KDD, 2014. https://arxiv.org/abs/1403.6652
    .. [2] L. Dall'Amico, E. M. Belliardo, "Efficient distributed representations with
       linear-time attention scores normalization", 2023.
       https://arxiv.org/abs/2303.17475

    Examples
    --------
    Random walks on a path of four nodes: how likely three steps from each node end in
    the first one, and the mean over one, two and three steps:

    >>> import numpy as np
    >>> import scipy.sparse
    >>> import subquad as sq
    >>> adjacency = scipy.sparse.diags_array([np.ones(3)] * 2, offsets=[-1, 1])
    >>> step = scipy.sparse.diags_array(1 / adjacency.sum(axis=1)) @ adjacency
    >>> sq.OperatorChain([step] * 3) @ np.eye(4)[0]
    array([0.   , 0.375, 0.   , 0.25 ])
    >>> walk = sq.OperatorChain([step] * 3, mean_of_partial_products=True)
    >>> (walk @ np.eye(4)[0]).round(3)
    array([0.167, 0.292, 0.083, 0.083])
    >>> walk.T
    <OperatorChain of 3 matrices, transposed mean of partial products: (4, 4), float64>
    """

    # NumPy arrays on the left would take the chain for a scalar otherwise.
    __array_ufunc__ = None
    __slots__ = ("__weakref__", "_dtype", "_matrices", "_mean", "_shape", "_transposed")

    _dtype: np.dtype[Any]
    _matrices: tuple[_Matrix, ...]
    _mean: bool
    _shape: tuple[int, int]
    _transposed: bool

    def __init__(
        self,
        matrices: Sequence[SparseMatrix] | SparseMatrix,
        *,
        mean_of_partial_products: bool = False,
    ) -> None:
        mean = check_flag("mean_of_partial_products", mean_of_partial_products)
        rows = _in_compressed_rows(matrices)
        _check_shapes([matrix.shape for matrix in rows], mean)
        # One object for equal ones: what is made of it later is made once.
        known = {id(matrix): _Matrix(matrix) for matrix in rows}
        self._matrices = tuple(known[id(matrix)] for matrix in rows)
        self._mean = mean
        self._transposed = False
        self._shape = (rows[-1].shape[0], rows[0].shape[1])
        self._dtype = np.result_type(*(matrix.dtype for matrix in rows))

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return self._shape[::-1] if self._transposed else self._shape

    @property
    def ndim(self) -> int:
        """Number of dimensions: 2."""
        return 2

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type that products with `x` of this type, or a narrower one, come back in."""
        return self._dtype

    @property
    def matrices(self) -> tuple[SparseMatrix, ...]:
        """The matrices in compressed rows, the one that is applied first in front."""
        matrices = self._in_order()
        rows = {
            matrix: matrix.rows
            if matrix.rows.dtype == self._dtype
            else matrix.rows.astype(self._dtype)
            for matrix in dict.fromkeys(matrices)
        }
        return tuple(rows[matrix] for matrix in matrices)

    @property
    def T(self) -> Self:  # noqa: N802
        """The transpose, another chain."""
        return self._changed(transposed=not self._transposed)

    def astype(self, dtype: npt.DTypeLike) -> Self:
        """Return this chain with entries of another type.

        Parameters
        ----------
        dtype : float32 or float64
            Type of the entries.

        Returns
        -------
        OperatorChain
            The chain, which shares the positions of all entries with this one.

        Raises
        ------
        TypeError
            If `dtype` is neither float32 nor float64.
        """
        wanted = np.dtype(dtype)
        if wanted not in (np.float32, np.float64):
            message = f"dtype must be float32 or float64, got {wanted}"
            raise TypeError(message)
        return self._changed(dtype=wanted)

    def __matmul__(self, x: Array) -> Array:
        """Multiply rows of numbers by the operator.

        Parameters
        ----------
        x : array of shape (n,), (n, d) or (..., n, d)
            Real floating, of any array library; n is the operator's number of columns.

        Returns
        -------
        array of shape (m,), (m, d) or (..., m, d)
            The product, m the operator's number of rows: float64 if `x` or the chain
            is, else float32.

        Raises
        ------
        TypeError
            If `x` is no array, is not of real floating type, or is not on the device of
            the matrices.
        ValueError
            If the shape of `x` does not fit.
        """
        backend = _dispatch.backend_for(x=x)
        (x,) = common_floats(("x",), (x,))
        if self._dtype == np.float64 and has_float64(x):
            x = as_dtype(_dispatch.namespace_of(x), x, "float64")
        shape = tuple(x.shape)
        if len(shape) == 0:
            raise wrong_rank("x", "(n,) or (..., n, d)", shape)
        is_vector = len(shape) == 1
        layout = "(n,)" if is_vector else "(..., n, d)"
        check_size("x", layout, "n", self.shape[1], shape, -1 if is_vector else -2)
        out = self._apply(backend, x[:, None] if is_vector else x)
        return out[:, 0] if is_vector else out

    def matvec(self, x: Array) -> Array:
        """Return `chain @ x`, under the name that scipy has for a vector's product.

        Parameters
        ----------
        x : array of shape (n,) or (n, 1)
            A vector.

        Returns
        -------
        array of shape (m,) or (m, 1)
            The product.
        """
        return self @ x

    def rmatvec(self, x: Array) -> Array:
        """Return `chain.T @ x`, under the name that scipy has for a vector's product.

        Parameters
        ----------
        x : array of shape (m,) or (m, 1)
            A vector.

        Returns
        -------
        array of shape (n,) or (n, 1)
            The product.
        """
        return self.T @ x

    def matmat(self, x: Array) -> Array:
        """Return `chain @ x`, under the name that scipy has for a matrix's product.

        Parameters
        ----------
        x : array of shape (n, d)
            A matrix.

        Returns
        -------
        array of shape (m, d)
            The product.
        """
        return self @ x

    def rmatmat(self, x: Array) -> Array:
        """Return `chain.T @ x`, under the name that scipy has for a matrix's product.

        Parameters
        ----------
        x : array of shape (m, d)
            A matrix.

        Returns
        -------
        array of shape (n, d)
            The product.
        """
        return self.T @ x

    def __len__(self) -> int:
        """Return the number of matrices."""
        return len(self._matrices)

    def __repr__(self) -> str:
        n = len(self._matrices)
        kind = "mean of partial products" if self._mean else "product"
        return (
            f"<{type(self).__name__} of {n} {'matrix' if n == 1 else 'matrices'}, "
            f"{'transposed ' if self._transposed else ''}{kind}: {self.shape}, "
            f"{self._dtype}>"
        )

    def __copy__(self) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Transposes and copies in other libraries are made anew where they are needed.
        rows = tuple(matrix.rows for matrix in self._matrices)
        return _restored, (type(self), rows, self._mean, self._transposed, self._dtype)

    def _changed(
        self,
        *,
        transposed: bool | None = None,
        dtype: np.dtype[Any] | None = None,
    ) -> Self:
        """Return a chain of the same matrices."""
        other = object.__new__(type(self))
        other._matrices, other._mean = self._matrices, self._mean
        other._shape = self._shape
        other._transposed = self._transposed if transposed is None else transposed
        other._dtype = self._dtype if dtype is None else dtype
        return other

    def _in_order(self) -> list[_Matrix]:
        """Return the matrices that are applied, one after the other."""
        if self._transposed:
            return [matrix.transpose() for matrix in reversed(self._matrices)]
        return list(self._matrices)

    def _apply(self, backend: _dispatch.Backend, x: Array) -> Array:
        """Return the product with x, of the type that is computed in."""
        multiply = self._multiplication(backend, x, self._key_of(x))
        matrix, rows, scale = self._all_but_last(multiply, x)
        return rows if matrix is None else multiply(matrix, rows, None, scale)

    def _last_product(self, x: Array) -> LastProduct:
        """Return what is left to multiply, for kernels that do more with the product.

        Parameters
        ----------
        x : array of shape (n, d)
            Of a type that is computed in, and of the chain's type or a wider one; no
            gradient passes through it.

        Returns
        -------
        matrix : tuple of arrays, or None
            Data, indices and indptr of a matrix A in compressed rows.
        rows : array
        scale : float
            The product is scale * A @ rows, or scale * rows where there is no matrix.
        """
        key = self._key_of(x)
        multiply = self._multiplication(_dispatch.backend_for(x=x), x, key)
        matrix, rows, scale = self._all_but_last(multiply, x)
        if matrix is None:
            return None, rows, scale
        return matrix.arrays_for(x, key), rows, scale

    def _key_of(self, x: Array) -> Key:
        library, device = _dispatch.library_of(x), _dispatch.device_of(x)
        return library.name, str(device), dtype_name(x.dtype), self._dtype.name

    def _multiplication(
        self, backend: _dispatch.Backend, x: Array, key: Key
    ) -> Multiply:
        """Return what multiplies a matrix and rows of the kind of x."""
        backward = _is_differentiated(x)

        def multiply(
            matrix: _Matrix, rows: Array, addend: Array | None, scale: float
        ) -> Array:
            arrays = matrix.arrays_for(rows, key)
            transposed = matrix.transpose().arrays_for(rows, key) if backward else None
            return backend.csr_product(*arrays, rows, addend, scale, transposed)

        return multiply

    def _all_but_last(
        self, multiply: Multiply, x: Array
    ) -> tuple[_Matrix | None, Array, float]:
        """Return A or None, rows and a scale: the product with x is scale A rows."""
        matrices = self._in_order()
        last = len(matrices) - 1
        if not self._mean:
            for matrix in matrices[:last]:
                x = multiply(matrix, x, None, 1.0)
            return matrices[last], x, 1.0
        share = 1.0 / len(matrices)
        if self._transposed or all(matrix is matrices[0] for matrix in matrices):
            # All but the last one are square: B₁ x + B₂ B₁ x + … of the transpose is
            # added up from inside, as x + B (x + B (x + …)).
            rows = x
            for matrix in matrices[:last]:
                rows = multiply(matrix, rows, x, 1.0)
            return matrices[last], rows, share
        rows = total = multiply(matrices[0], x, None, share)
        for matrix in matrices[1:last]:
            rows = multiply(matrix, rows, None, 1.0)
            total = total + rows
        return None, multiply(matrices[last], rows, total, 1.0), 1.0


class _Matrix:
    """A matrix in compressed rows, and what was made of it when it was first needed."""

    def __init__(self, rows: SparseMatrix) -> None:
        self.rows = rows
        self._transpose: _Matrix | None = None
        self._arrays: dict[Key, CompressedRows] = {}

    def transpose(self) -> _Matrix:
        """Return the transpose, whose transpose this is."""
        if self._transpose is None:
            other = _Matrix(self.rows.T.tocsr())
            other._transpose = self
            self._transpose = other
        return self._transpose

    def arrays_for(self, x: Array, key: Key) -> CompressedRows:
        """Return data, indices and indptr in the library of x, data in its type."""
        found = self._arrays.get(key)
        if found is not None:
            return found
        nnz = self.rows.nnz
        data = self.rows.data[:nnz].astype(key[3], copy=False)
        data = data.astype(key[2], copy=False)
        indices, indptr = self.rows.indices[:nnz], self.rows.indptr
        if indices.dtype != indptr.dtype:
            indices, indptr = indices.astype("int64"), indptr.astype("int64")
        arrays = _taken_to(data, x), _taken_to(indices, x), _taken_to(indptr, x)
        return self._arrays.setdefault(key, arrays)


def _taken_to(array: Array, x: Array) -> Array:
    """Return an array of a matrix in the library of x, in the same memory if possible.

    Raises
    ------
    TypeError
        If x lies elsewhere.
    """
    source, target = _dispatch.library_of(array), _dispatch.library_of(x)
    place = _place_of(x)
    here = "cpu" if source.name == "numpy" else f"cuda:{array.device.id}"
    if place not in (None, here):
        message = (
            f"x must lie where the matrices do, on {here}, got an array of "
            f"{target.name} on {place}"
        )
        raise TypeError(message)
    if source.name == target.name:
        return array
    if source.name == "numpy" and target.name != "torch":
        return from_host(array, x)
    if target.name != "torch":
        return target.xp.from_dlpack(array)
    # What is kept serves gradients later, too.
    with target.xp.inference_mode(False):
        try:
            return target.xp.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError):
            # torch takes nothing that is read only.
            if source.name != "numpy":
                raise
            return from_host(array, x)


def _place_of(x: Array) -> str | None:
    """Return "cpu", or the CUDA device, as "cuda:0"; None where it cannot be told."""
    library = _dispatch.library_of(x)
    if library.name in ("numpy", "dask"):
        return "cpu"
    if library.name == "cupy":
        return f"cuda:{x.device.id}"
    if library.name == "torch":
        return str(x.device)
    # What is traced has no device yet, and takes the matrices along as constants.
    if library.name == "jax" and library.is_eager(x):
        device = min(x.devices(), key=lambda each: each.id)
        names = {"cpu": "cpu", "gpu": f"cuda:{device.id}"}
        return names.get(device.platform, str(device))
    return None


def _is_differentiated(x: Array) -> bool:
    """Return whether a gradient of x may be asked for."""
    library = _dispatch.library_of(x)
    if library.name == "torch":
        return bool(x.requires_grad and library.xp.is_grad_enabled())
    return library.name == "jax" and not library.is_eager(x)


def _in_compressed_rows(matrices: object) -> list[SparseMatrix]:
    """Return all matrices in compressed rows, of a type that is computed in."""
    if hasattr(matrices, "tocsr"):
        matrices = [matrices]
    if hasattr(matrices, "shape") or not isinstance(matrices, Iterable):
        raise _not_sparse("matrices", "a sequence of sparse matrices", matrices)
    found = list(matrices)
    if not found:
        message = "matrices must hold at least one matrix, got none"
        raise ValueError(message)
    rows: dict[int, SparseMatrix] = {}
    for i, matrix in enumerate(found):
        if id(matrix) in rows:
            continue
        name = f"matrices[{i}]"
        if not hasattr(matrix, "tocsr"):
            raise _not_sparse(name, "a sparse matrix", matrix)
        if len(matrix.shape) != 2:
            raise wrong_rank(name, "(rows, columns)", tuple(matrix.shape))
        if matrix.dtype.kind in "iub":
            rows[id(matrix)] = matrix.tocsr().astype(np.float64)
        elif matrix.dtype in (np.float32, np.float64):
            rows[id(matrix)] = matrix.tocsr()
        else:
            message = (
                f"{name} must hold float32, float64, integers or booleans, got "
                f"{matrix.dtype}"
            )
            raise TypeError(message)
    return [rows[id(matrix)] for matrix in found]


def _not_sparse(name: str, expected: str, value: object) -> TypeError:
    kind = type(value)
    message = (
        f"{name} must be {expected} of scipy.sparse or cupyx.scipy.sparse, got "
        f"{kind.__module__}.{kind.__qualname__}; scipy.sparse.csr_array makes one of a "
        "dense array"
    )
    return TypeError(message)


def _check_shapes(shapes: list[tuple[int, int]], mean: bool) -> None:
    """Check that each matrix can be applied after the one before it."""
    for i in range(1, len(shapes)):
        if shapes[i][1] != shapes[i - 1][0]:
            message = (
                f"matrices[{i}] must have as many columns as matrices[{i - 1}], which "
                f"is applied before it, has rows: {shapes[i - 1][0]}, got shape "
                f"{shapes[i]}"
            )
            raise ValueError(message)
        if mean and shapes[i][0] != shapes[0][0]:
            message = (
                f"matrices[{i}] must have as many rows as matrices[0], to whose "
                f"product its own is added: {shapes[0][0]}, got shape {shapes[i]}"
            )
            raise ValueError(message)


def _restored(
    kind: type[OperatorChain],
    rows: tuple[SparseMatrix, ...],
    mean: bool,
    transposed: bool,
    dtype: np.dtype[Any],
) -> OperatorChain:
    """Return a chain from what `OperatorChain.__reduce__` kept of it."""
    chain = kind(rows, mean_of_partial_products=mean)
    return chain._changed(transposed=transposed, dtype=dtype)
