"""Choose what computes a call from the types of its arrays.

Every array type is looked up once; later calls pay for one dictionary look-up per
array. A backend is anything with the primitives of `Backend`: the compiled kernels for
NumPy and CuPy, registered operators for torch, graph builders for Dask, and the
array-API reference otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, cast

import array_api_compat
import array_api_compat.numpy
import numpy as np

Array: TypeAlias = Any
Namespace: TypeAlias = Any
Own: TypeAlias = tuple[Array, Array, bool]
FeatureGradients: TypeAlias = tuple[
    Array | None,
    Array | None,
    Array | None,
    Array | None,
    Array | None,
    Array | None,
    Array | None,
]
# Of every factor, the offset of each of its links: static, and known everywhere.
FactorOffsets: TypeAlias = tuple[tuple[int, ...], ...]
# The entries of a matrix in compressed rows, their columns, and where rows begin.
CompressedRows: TypeAlias = tuple[Array, Array, Array]
# Of an embedding's step: log counts, means and covariances of components; labels, and
# by label a vector and a matrix; weights of rows, and their vector.
KeyStatistics: TypeAlias = tuple[Array, Array, Array]
OwnTerms: TypeAlias = tuple[Array, Array, Array]
NullTerm: TypeAlias = tuple[Array, Array]
NetworkGradients: TypeAlias = tuple[
    Array | None, Array | None, Array | None, Array | None, Array | None
]


def _always(_: Array) -> bool:
    return True


def _never(_: Array) -> bool:
    return False


class Backend(Protocol):
    """The primitives that public functions are made of.

    Arguments are validated and of one library, device and floating type (float32 or
    float64); optional arrays may be None. Leading batch dimensions broadcast in the
    normalizers, in features, in factors, in attention and in their gradients; scans
    take arrays of one shape, states without the axis; the other primitives take plain
    matrices. Segments are 64-bit integers where the library has them, masks booleans;
    the indices of sparse matrices are of 32 or 64 bits. Gradients are in the shapes of
    their inputs, None where they are not needed.

    A backend whose arrays may be changed in place can have `has_attention_step`, true
    or a function of an array, and `attention_step`, which adds a token to a state's own
    arrays. One whose allocator does not keep memory for large arrays can have
    `recycled_memory`, which makes a context in which what was dropped is used again.

    Where a library keeps 16-bit types (`Library.keeps_half`), x and y of
    `log_normalizer` and `log_normalizer_vjp`, and x of the features, may be of one,
    beside float32 arrays; results are float32 then.
    """

    def log_normalizer(
        self, x: Array, y: Array, log_weights: Array | None, excluded: Array | None, /
    ) -> Array: ...

    def log_normalizer_vjp(
        self,
        grad: Array,
        x: Array,
        y: Array,
        log_weights: Array | None,
        excluded: Array | None,
        log_z: Array,
        needs: tuple[bool, bool, bool],
        /,
    ) -> tuple[Array | None, Array | None, Array | None]: ...

    def gaussian_log_normalizer(
        self,
        x: Array,
        log_counts: Array,
        means: Array,
        factors: Array,
        diagonal: Array | None,
        own: Own | None,
        /,
    ) -> Array: ...

    def gaussian_log_normalizer_vjp(
        self,
        grad: Array,
        x: Array,
        log_counts: Array,
        means: Array,
        factors: Array,
        diagonal: Array | None,
        log_z: Array,
        needs: tuple[bool, bool, bool, bool, bool],
        /,
    ) -> tuple[
        Array | None, Array | None, Array | None, Array | None, Array | None
    ]: ...

    def gaussian_score_moments(
        self, x: Array, means: Array, factors: Array, diagonal: Array | None, /
    ) -> tuple[Array, Array]: ...

    def nearest_centroids(
        self, x: Array, centroids: Array, offsets: Array, /
    ) -> tuple[Array, Array]: ...

    def component_sums(
        self, y: Array, labels: Array, weights: Array | None, k: int, /
    ) -> tuple[Array, Array]: ...

    def component_scatter(
        self,
        y: Array,
        labels: Array,
        weights: Array | None,
        means: Array,
        diagonal: bool,
        /,
    ) -> tuple[Array, Array]: ...

    def sample_residuals(
        self,
        x: Array,
        deviations: Array,
        weights: Array,
        offsets: Array,
        variance: Array,
        scale: Array,
        shift: Array | None,
        excluded: Array | None,
        quadratic: bool,
        /,
    ) -> tuple[Array, Array, Array]: ...

    def log_features(
        self,
        x: Array,
        projection: Array,
        bias: Array,
        diagonal: Array | None,
        factor: Array | None,
        shift: Array | None,
        linear: Array | None,
        antithetic: bool,
        exponentiate: bool,
        /,
    ) -> Array: ...

    def log_features_vjp(
        self,
        grad: Array,
        x: Array,
        projection: Array,
        bias: Array,
        diagonal: Array | None,
        factor: Array | None,
        shift: Array | None,
        linear: Array | None,
        antithetic: bool,
        needs: tuple[bool, bool, bool, bool, bool, bool, bool],
        /,
    ) -> FeatureGradients: ...

    def trigonometric_features(
        self,
        x: Array,
        projection: Array,
        bias: Array,
        diagonal: Array | None,
        factor: Array | None,
        shift: Array | None,
        linear: Array | None,
        /,
    ) -> Array: ...

    def hadamard_transform(self, x: Array, /) -> Array: ...

    # `with_intermediates`: they are wanted as a result. `recompute`: whether a reverse
    # that the library makes by itself computes them anew or has kept them.
    def sparse_factor_product(
        self,
        values: Array,
        x: Array,
        segments: Array | None,
        offsets: FactorOffsets,
        residual: str,
        circular: bool,
        transpose: bool,
        with_intermediates: bool,
        recompute: bool,
        /,
    ) -> tuple[Array, Array | None]: ...

    def sparse_factor_product_vjp(
        self,
        grad: Array,
        values: Array,
        x: Array,
        segments: Array | None,
        intermediates: Array | None,
        offsets: FactorOffsets,
        residual: str,
        circular: bool,
        needs: tuple[bool, bool],
        /,
    ) -> tuple[Array | None, Array | None]: ...

    def factor_values(
        self,
        x: Array,
        weight_in: Array,
        bias_in: Array,
        weight_out: Array,
        bias_out: Array,
        /,
    ) -> Array: ...

    def factor_values_vjp(
        self,
        grad: Array,
        x: Array,
        weight_in: Array,
        bias_in: Array,
        weight_out: Array,
        bias_out: Array,
        needs: tuple[bool, bool, bool, bool, bool],
        /,
    ) -> NetworkGradients: ...

    # `transposed` is the same matrix, for the gradient of x: no derivative passes
    # through it. Where it is None it is made of the matrix when it is needed.
    def csr_product(
        self,
        data: Array,
        indices: Array,
        indptr: Array,
        x: Array,
        addend: Array | None,
        scale: float,
        transposed: CompressedRows | None,
        /,
    ) -> Array: ...

    def csr_product_vjp(
        self,
        grad: Array,
        data: Array,
        indices: Array,
        indptr: Array,
        x: Array,
        addend: Array | None,
        scale: float,
        transposed: CompressedRows | None,
        needs: tuple[bool, bool, bool],
        /,
    ) -> tuple[Array | None, Array | None, Array | None]: ...

    def csr_transpose(
        self, data: Array, indices: Array, indptr: Array, n_columns: int, /
    ) -> CompressedRows: ...

    # Of the optional groups each is whole or None. The third result is None without
    # components; the first is x itself where `step` is 0.
    def embedding_step(
        self,
        x: Array,
        matrix: CompressedRows | None,
        rows: Array,
        scale: float,
        components: KeyStatistics | None,
        own: OwnTerms | None,
        null: NullTerm | None,
        step: float,
        /,
    ) -> tuple[Array, Array, Array | None]: ...

    def logcumsumexp(
        self,
        x: Array,
        log_sum: Array | None,
        remainder: Array | None,
        segments: Array | None,
        axis: int,
        reverse: bool,
        exclusive: bool,
        with_state: bool,
        /,
    ) -> tuple[Array, Array | None, Array | None]: ...

    def logcumsumexp_vjp(
        self,
        x: Array,
        log_sum: Array | None,
        remainder: Array | None,
        segments: Array | None,
        axis: int,
        reverse: bool,
        exclusive: bool,
        grad: Array | None,
        grad_final: Array | None,
        needs: tuple[bool, bool],
        /,
    ) -> tuple[Array | None, Array | None]: ...

    def signed_logcumsumexp(
        self, x: Array, sign: Array, axis: int, reverse: bool, exclusive: bool, /
    ) -> tuple[Array, Array]: ...

    def signed_logcumsumexp_vjp(
        self,
        x: Array,
        sign: Array,
        axis: int,
        reverse: bool,
        exclusive: bool,
        grad: Array,
        needs: tuple[bool, bool],
        /,
    ) -> tuple[Array | None, Array | None]: ...

    def log_linear_recurrence(
        self,
        log_a: Array,
        log_b: Array,
        state: Array | None,
        segments: Array | None,
        axis: int,
        reverse: bool,
        /,
    ) -> Array: ...

    def log_linear_recurrence_vjp(
        self,
        log_a: Array,
        log_b: Array,
        state: Array | None,
        segments: Array | None,
        axis: int,
        reverse: bool,
        grad: Array,
        needs: tuple[bool, bool, bool],
        /,
    ) -> tuple[Array | None, Array | None, Array | None]: ...

    def linear_attention(
        self,
        log_k: Array,
        v: Array,
        log_q: Array | None,
        log_decay: Array | None,
        key_mask: Array | None,
        segments: Array | None,
        key_sums: Array | None,
        value_sums: Array | None,
        causal: bool,
        empty_is_nan: bool,
        with_log_z: bool,
        with_state: bool,
        /,
    ) -> tuple[Array | None, Array | None, Array | None, Array | None]: ...

    def linear_attention_vjp(
        self,
        log_k: Array,
        v: Array,
        log_q: Array | None,
        log_decay: Array | None,
        key_mask: Array | None,
        segments: Array | None,
        key_sums: Array | None,
        value_sums: Array | None,
        causal: bool,
        y: Array | None,
        grad_y: Array | None,
        grad_log_z: Array | None,
        grad_final_key_sums: Array | None,
        grad_final_value_sums: Array | None,
        needs: tuple[bool, bool, bool, bool, bool, bool],
        /,
    ) -> tuple[
        Array | None,
        Array | None,
        Array | None,
        Array | None,
        Array | None,
        Array | None,
    ]: ...

    def log_linear_attention(
        self,
        log_k: Array,
        log_v: Array,
        sign_v: Array | None,
        log_q: Array | None,
        log_decay: Array | None,
        key_mask: Array | None,
        segments: Array | None,
        log_numerator: Array | None,
        sign_numerator: Array | None,
        log_denominator: Array | None,
        causal: bool,
        with_log_z: bool,
        with_state: bool,
        /,
    ) -> tuple[
        Array | None,
        Array | None,
        Array | None,
        Array | None,
        Array | None,
        Array | None,
    ]: ...

    def log_linear_attention_vjp(
        self,
        log_k: Array,
        log_v: Array,
        sign_v: Array | None,
        log_q: Array | None,
        log_decay: Array | None,
        key_mask: Array | None,
        segments: Array | None,
        log_numerator: Array | None,
        sign_numerator: Array | None,
        log_denominator: Array | None,
        causal: bool,
        grad_log_y: Array | None,
        grad_log_z: Array | None,
        grad_final_log_numerator: Array | None,
        grad_final_log_denominator: Array | None,
        needs: tuple[bool, bool, bool, bool, bool, bool],
        /,
    ) -> tuple[
        Array | None,
        Array | None,
        Array | None,
        Array | None,
        Array | None,
        Array | None,
    ]: ...


@dataclass(eq=False, frozen=True)
class Library:
    """What is known of an array type.

    Attributes
    ----------
    name : str
        As it appears in error messages.
    namespace : Callable
        Returns the array-API namespace.
    backend : Callable
        The backend of a given array of this type.
    has_devices : bool
        Whether two arrays may lie on different devices.
    is_eager : Callable
        Whether the values of a given array may be looked at.
    has_int64 : bool
        Whether indices can be made 64-bit integers.
    keeps_half : Callable
        Whether the backend of a given array takes it in float16 or bfloat16.
    floats : dict
        Of each floating data type met, the name of the type it is computed in, and
        whether it is computed in as it is.
    """

    name: str
    namespace: Callable[[], Namespace]
    backend: Callable[[Array], Backend]
    has_devices: bool
    is_eager: Callable[[Array], bool]
    has_int64: bool = True
    keeps_half: Callable[[Array], bool] = _never
    floats: dict[Any, tuple[str, bool]] = field(default_factory=dict)

    @property
    def xp(self) -> Namespace:
        """The array-API namespace."""
        return self.namespace()


_LIBRARIES: dict[type, Library] = {}
_OTHERS: dict[str, Library] = {}
_BACKENDS: dict[str, Backend] = {}


def backend_for(**arrays: Array | None) -> Backend:
    """Return the backend of a call's arrays, given by argument name.

    None stands for an argument left out.

    Raises
    ------
    TypeError
        If an argument is no array, or the arrays are of several libraries or on several
        devices.
    """
    library: Library | None = None
    first: Array = None
    for name, array in arrays.items():
        if array is None:
            continue
        found = _LIBRARIES.get(type(array))
        if found is None:
            found = _meet(name, array)
        if library is None:
            library, first = found, array
        elif found is not library or (
            found.has_devices and array.device != first.device
        ):
            raise TypeError(_mixture(arrays))
    if library is None:
        message = "at least one array is needed"
        raise TypeError(message)
    return library.backend(first)


def library_of(array: Array, name: str = "array") -> Library:
    """Return what is known of an array's type."""
    found = _LIBRARIES.get(type(array))
    return _meet(name, array) if found is None else found


def namespace_of(array: Array, name: str = "array") -> Namespace:
    """Return the array-API namespace of an array."""
    found = _LIBRARIES.get(type(array))
    return (_meet(name, array) if found is None else found).xp


def device_of(array: Array) -> Any:
    """Return the device for companions of an array; None is the library's choice."""
    return array.device if library_of(array).has_devices else None


def not_an_array(name: str, value: object) -> TypeError:
    """Return the error for an argument that should have been an array."""
    message = (
        f"{name} must be an array (NumPy, CuPy, torch, JAX, Dask or any array-API "
        f"library), got {_type_name(type(value))}"
    )
    return TypeError(message)


def _mixture(arrays: dict[str, Array | None]) -> str:
    parts = []
    for name, array in arrays.items():
        if array is None:
            continue
        library = library_of(array, name)
        place = f" on {array.device}" if library.has_devices else ""
        parts.append(f"{name} is {library.name}{place}")
    return (
        "all arrays of a call must be of one library and on one device, got: "
        + ", ".join(parts)
    )


def _meet(name: str, array: Array) -> Library:
    """Enter a type that is seen for the first time."""
    kind = type(array)
    if isinstance(array, np.ndarray):
        if isinstance(array, (np.matrix, np.ma.MaskedArray)):
            message = (
                f"{name} must be a plain array, got {_type_name(kind)}; "
                "pass its values as numpy.ndarray"
            )
            raise TypeError(message)
        library = _NUMPY
    elif _is_torch(array):
        library = _TORCH
    elif _root(kind) == "dask" and kind.__name__ == "Array":
        library = _DASK
    else:
        library = _other(name, array)
    _LIBRARIES[kind] = library
    return library


def _is_torch(array: Array) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _type_name(kind: type) -> str:
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


# Backends are loaded when they are first called: one may work where another does not.
# The first call may be one that torch.compile traces: it follows import statements, and
# can store in a table what stands in this module, but not a module met while tracing.


def _compiled(_: Array) -> Backend:
    return _BACKENDS.get("compiled") or _load_compiled()


def _load_compiled() -> Backend:
    from subquad._backends import compiled

    return _BACKENDS.setdefault("compiled", cast(Backend, compiled))


def _graphs(_: Array) -> Backend:
    return _BACKENDS.get("dask") or _load_graphs()


def _load_graphs() -> Backend:
    from subquad._backends import dask

    return _BACKENDS.setdefault("dask", cast(Backend, dask))


def _reference(_: Array) -> Backend:
    from subquad._reference import primitives

    return cast(Backend, primitives)


def _registered_or_reference(array: Array) -> Backend:
    # "meta" tensors have shapes only, which the registered operators know as well.
    place = array.device.type
    if place == "cpu" or place == "meta":
        return _BACKENDS.get("torch") or _load_registered()
    if place == "cuda":
        registered: Any = _BACKENDS.get("torch") or _load_registered()
        if registered.takes(array):
            return cast(Backend, registered)
    return _reference(array)


def _registered_keep_half(array: Array) -> bool:
    registered: Any = _BACKENDS.get("torch") or _load_registered()
    kept: bool = registered.keeps_half(array)
    return kept


def _load_registered() -> Backend:
    from subquad._backends import torch as registered

    backend = cast(Backend, registered)
    if not registered.is_compiling():
        _BACKENDS["torch"] = backend
    return backend


def _cupy_or_reference(array: Array) -> Backend:
    cupy: Any = _BACKENDS.get("cupy") or _load_cupy()
    return cast(Backend, cupy) if cupy.takes(array) else _reference(array)


def _cupy_keeps_half(array: Array) -> bool:
    cupy: Any = _BACKENDS.get("cupy") or _load_cupy()
    kept: bool = cupy.takes(array)
    return kept


def _load_cupy() -> Backend:
    from subquad._backends import cupy

    return _BACKENDS.setdefault("cupy", cast(Backend, cupy))


def _numpy_namespace() -> Namespace:
    return array_api_compat.numpy


def _torch_namespace() -> Namespace:
    import array_api_compat.torch

    return array_api_compat.torch


def _dask_namespace() -> Namespace:
    import array_api_compat.dask.array

    return array_api_compat.dask.array


_NUMPY = Library("numpy", _numpy_namespace, _compiled, False, _always)
# Wrapped, fake and traced tensors look like all others: the operators look at values
# where these are real.
_TORCH = Library(
    "torch",
    _torch_namespace,
    _registered_or_reference,
    True,
    _never,
    keeps_half=_registered_keep_half,
)
_DASK = Library("dask", _dask_namespace, _graphs, False, _never)


def _primitives_or_reference(array: Array) -> Backend:
    return _BACKENDS.get("jax") or _load_primitives(array)


def _load_primitives(array: Array) -> Backend:
    from subquad._backends import jax_targets

    primitives = jax_targets.load()
    backend = _reference(array) if primitives is None else primitives
    return _BACKENDS.setdefault("jax", cast(Backend, backend))


def _primitives_keep_half(array: Array) -> bool:
    return _primitives_or_reference(array) is not _reference(array)


def _other(name: str, array: Array) -> Library:
    """Describe a library by its array-API namespace."""
    kind = type(array)
    refused = isinstance(array, (np.generic, bool, int, float, complex))
    try:
        xp = None if refused else array_api_compat.array_namespace(array)
    except TypeError:
        xp = None
    if xp is None:
        raise not_an_array(name, array)

    library_name = "jax" if array_api_compat.is_jax_namespace(xp) else _root(kind)
    library = _OTHERS.get(library_name)
    if library is not None:
        return library
    if library_name == "jax":
        from jax.core import Tracer

        # JAX moves uncommitted arrays itself, and narrows int64 where 64-bit types are
        # off.
        library = Library(
            "jax",
            lambda: xp,
            _primitives_or_reference,
            has_devices=False,
            is_eager=lambda array: not isinstance(array, Tracer),
            has_int64=False,
            keeps_half=_primitives_keep_half,
        )
    elif array_api_compat.is_cupy_namespace(xp):
        # The values of CuPy's arrays are known only once the device has finished.
        library = Library(
            library_name,
            lambda: xp,
            _cupy_or_reference,
            True,
            _never,
            keeps_half=_cupy_keeps_half,
        )
    else:
        library = Library(library_name, lambda: xp, _reference, True, _always)
    return _OTHERS.setdefault(library_name, library)
