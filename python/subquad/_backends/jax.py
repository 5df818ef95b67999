"""JAX arrays: primitives of JAX, which XLA hands over to the compiled kernels.

Every primitive has two lowerings: on the CPU and on CUDA a call of a handler in
`subquad._jax`, elsewhere the reference. The derivative of a normalizer is a primitive
too, linear in the tangents: its transpose is the compiled reverse, and where tangents
are wanted themselves (forward mode) it is the transposed reference. Derivatives of all
else, and those of derivatives, are those of the reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from subquad import _core
from subquad._backends import jax_targets
from subquad._backends.compiled import CPU, CUDA, serves_cuda
from subquad._dispatch import Array, Own
from subquad._reference import normalizers as reference
from subquad._reference._common import batch_shape, sum_to

jax_targets.register(jax)

_DEVICES = {"cpu": CPU, "cuda": CUDA}

_Shape = tuple[int, ...]


class _Output(NamedTuple):
    """What a kernel writes.

    `result` is the shape of what is made of it, by sums over dimensions that were
    broadcast.
    """

    shape: _Shape
    dtype: Any
    result: _Shape


class _Plan(NamedTuple):
    """How a kernel is called with given arrays.

    Attributes
    ----------
    outputs : list
        In the order of the C function; None for one that is left out.
    sizes : tuple
        Arguments of the function that tells the size of the workspace.
    flag : int
        The number that the C function takes.
    """

    outputs: list[_Output | None]
    sizes: tuple[int, ...]
    flag: int = 0


@dataclass(eq=False)
class _Kernel:
    """A function of the C ABI, and the primitive that calls it.

    Attributes
    ----------
    name : str
    plan : Callable
        Of its input arrays (None for those left out), which need no more than shapes
        and types, and static parameters.
    by_reference : Callable
        The same computed by the reference: a list of results.
    types : str
        Of each input: as it comes ("f"), float64 ("d") or int64 ("i").
    limits : Callable
        Of the input arrays: for the place of an index, how many there are to choose
        from. Indices beyond mean none.
    """

    name: str
    plan: Callable[..., _Plan]
    by_reference: Callable[..., list[Array]]
    types: str
    limits: Callable[[Sequence[Any]], dict[int, int]] = lambda _: {}

    def __post_init__(self) -> None:
        self.primitive = _define_kernel(self)


# -------------------------------------------------------------------------- primitives


def _define(
    name: str,
    shapes: Callable[..., list[tuple[_Shape, Any]]],
    by_reference: Callable[..., list[Array]],
) -> Primitive:
    primitive = Primitive(f"subquad_{name}")
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))

    def abstract(*operands: Any, **parameters: Any) -> list[Any]:
        like = next((a for a in operands if not a.sharding.mesh.empty), None)
        return [
            _result_type(like, shape, jax.dtypes.canonicalize_dtype(dtype))
            for shape, dtype in shapes(*operands, **parameters)
        ]

    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(
        primitive, mlir.lower_fun(by_reference, multiple_results=True)
    )
    ad.primitive_jvps[primitive] = functools.partial(_jvp_of, by_reference)
    return primitive


def _define_kernel(kernel: _Kernel) -> Primitive:
    """Return the primitive of a kernel.

    Its operands are the arrays that are `given`. `threads` is there to be compared:
    what was compiled for few threads has a workspace for no more.
    """

    def shapes(
        *operands: Any, given: Sequence[bool], threads: int, **parameters: Any
    ) -> list[tuple[_Shape, Any]]:
        del threads
        plan = kernel.plan(*_spread(operands, given), **parameters)
        return [
            (output.result, output.dtype)
            for output in plan.outputs
            if output is not None
        ]

    def by_reference(
        *operands: Array, given: Sequence[bool], threads: int, **parameters: Any
    ) -> list[Array]:
        del threads
        return kernel.by_reference(*_spread(operands, given), **parameters)

    primitive = _define(kernel.name, shapes, by_reference)
    for platform in _DEVICES:
        rule = functools.partial(_lower, kernel, by_reference, platform)
        mlir.register_lowering(primitive, rule, platform=platform)
    batching.primitive_batchers[primitive] = functools.partial(_one_by_one, primitive)
    return primitive


def _result_type(like: Any, shape: _Shape, dtype: Any) -> Any:
    """Return the type of a result of operands that lie in a mesh like that one."""
    if like is None:
        return jax.core.ShapedArray(shape, dtype)
    spec = jax.sharding.PartitionSpec(*(None for _ in shape))
    sharding = jax.sharding.NamedSharding(like.sharding.mesh, spec)
    return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def _apply(kernel: _Kernel, arrays: Sequence[Any], **parameters: Any) -> list[Any]:
    """Compute the results of a kernel: what the backend's functions do."""
    types = [None if array is None else jax.typeof(array) for array in arrays]
    meshes = [t.sharding.mesh for t in types if t is not None]
    if not all(mesh.empty for mesh in meshes):
        if not all(map(_runs_kernels, meshes)):
            return kernel.by_reference(*arrays, **parameters)
        arrays = _varying_alike(arrays, types)
    return _bind(kernel, arrays, **parameters)


def _runs_kernels(mesh: Any) -> bool:
    """Return whether what JAX runs once in this mesh runs on one device.

    XLA cuts its own operations over the devices; a kernel it would run on each of them,
    for all of the data.
    """
    return bool(
        mesh.empty
        or mesh.are_all_axes_manual
        or (mesh.size == 1 and mesh.are_all_axes_auto)
    )


def _varying_alike(arrays: Sequence[Any], types: Sequence[Any]) -> list[Any]:
    """Have arrays inside of `jax.shard_map` vary over the same axes, as operands must.

    Then gradients of arrays that devices share are sums over the devices.
    """
    varying = [
        frozenset() if t is None else frozenset(t.manual_axis_type.varying)
        for t in types
    ]
    every = frozenset[str]().union(*varying)
    return [
        array
        if array is None or axes == every
        else jax.lax.pcast(array, tuple(every - axes), to="varying")
        for array, axes in zip(arrays, varying, strict=True)
    ]


def _bind(kernel: _Kernel, arrays: Sequence[Any], **parameters: Any) -> list[Any]:
    given = tuple(array is not None for array in arrays)
    found: list[Any] = kernel.primitive.bind(
        *(array for array in arrays if array is not None),
        given=given,
        threads=_core.get_num_threads(),
        **parameters,
    )
    return found


def _spread(operands: Sequence[Any], given: Sequence[bool]) -> list[Any]:
    """Put None in the place of each array that is not given."""
    left = iter(operands)
    return [next(left) if is_given else None for is_given in given]


def _lower(
    kernel: _Kernel,
    by_reference: Callable[..., list[Array]],
    platform: str,
    ctx: Any,
    *operands: Any,
    **parameters: Any,
) -> Any:
    if platform == "cuda" and not _serves_cuda():
        function = by_reference
    else:
        results = [(aval.shape, aval.dtype) for aval in ctx.avals_out]
        function = functools.partial(_call, kernel, _DEVICES[platform], results)
    return mlir.lower_fun(function, multiple_results=True)(ctx, *operands, **parameters)


@functools.cache
def _serves_cuda() -> bool:
    """Return whether kernels run on all CUDA devices that JAX has."""
    if _core.cuda_info()["problem"]:
        return False
    devices = jax.local_devices(backend="cuda")
    return all(serves_cuda(device.local_hardware_id) for device in devices)


def _call(
    kernel: _Kernel,
    device: int,
    results: Sequence[tuple[_Shape, Any]],
    *operands: Array,
    given: Sequence[bool],
    threads: int,
    **parameters: Any,
) -> list[Array]:
    """Call the handler of a kernel."""
    del threads
    arrays = _spread(operands, given)
    plan = kernel.plan(*arrays, **parameters)
    size = getattr(_core, f"{kernel.name}_workspace")(*plan.sizes, device)
    outputs = [output for output in plan.outputs if output is not None]
    present = (*given, *(output is not None for output in plan.outputs), True)
    # The kernels' 64-bit integers and sums are theirs alone where JAX has them off.
    with jax.enable_x64(True):
        limits = kernel.limits(arrays)
        inputs = [
            _as_input(array, kind, device, limits.get(place))
            for place, (array, kind) in enumerate(
                zip(arrays, kernel.types, strict=True)
            )
            if array is not None
        ]
        shapes = [
            *(jax.ShapeDtypeStruct(output.shape, output.dtype) for output in outputs),
            jax.ShapeDtypeStruct((size,), np.uint8),
        ]
        found = jax.ffi.ffi_call(f"subquad_{kernel.name}", shapes)(
            *inputs,
            present=np.int64(sum(bit << place for place, bit in enumerate(present))),
            flag=np.int64(plan.flag),
        )
        return [
            sum_to(jnp, array, shape).astype(dtype)
            for array, (shape, dtype) in zip(found[:-1], results, strict=True)
        ]


def _as_input(array: Array, kind: str, device: int, limit: int | None) -> Array:
    if kind == "d":
        return array.astype(np.float64)
    if kind == "f":
        return _wide(array) if device == CPU else array
    array = array.astype(np.int64)
    if limit is None:
        return array
    return jnp.where((array < 0) | (array >= limit), np.int64(-1), array)


def _wide(array: Array) -> Array:
    return array.astype(_computed(array))


def _computed(array: Any) -> Any:
    """Return the type that floats are computed in: float32 for those of 16 bits."""
    return np.float32 if array.dtype.itemsize == 2 else array.dtype


# ------------------------------------------------------------------------- derivatives


def _jvp_of(
    function: Callable[..., list[Array]],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    **parameters: Any,
) -> tuple[list[Any], list[Any]]:
    """Return values and tangents of a function of JAX's own operations."""
    moved = [place for place, t in enumerate(tangents) if type(t) is not ad.Zero]

    def of_moved(*arrays: Any) -> list[Array]:
        complete = list(primals)
        for place, array in zip(moved, arrays, strict=True):
            complete[place] = array
        return function(*complete, **parameters)

    values, found = jax.jvp(
        of_moved, [primals[i] for i in moved], [tangents[i] for i in moved]
    )
    return values, [
        _no_tangent(value) if t.dtype == jax.dtypes.float0 else t
        for value, t in zip(values, found, strict=True)
    ]


def _no_tangent(value: Any) -> Any:
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def _differentiate(kernel: _Kernel, reverse: _Kernel) -> None:
    """Give a normalizer its derivative, a primitive that is linear in tangents.

    The operands of that are those arrays of the normalizer that its reverse takes, its
    result, and the tangents of the arrays that `moved` tells.
    """
    forward = kernel.primitive
    count = len(reverse.types) - 2
    by_default: Any = ad.primitive_jvps[forward]

    def parts(operands: Sequence[Any], given: Sequence[bool]) -> tuple[Any, Any, Any]:
        size = sum(given)
        return _spread(operands[:size], given), operands[size], operands[size + 1 :]

    def shapes(
        *operands: Any, given: Sequence[bool], moved: Sequence[bool]
    ) -> list[tuple[_Shape, Any]]:
        del moved
        _, out, _ = parts(operands, given)
        return [(out.shape, out.dtype)]

    def by_reference(
        *operands: Array, given: Sequence[bool], moved: Sequence[bool]
    ) -> list[Array]:
        arrays, out, tangents = parts(operands, given)

        def pullback(grad: Array) -> list[Array]:
            gradients = reverse.by_reference(grad, *arrays, out, needs=moved)
            return [
                gradient.astype(tangent.dtype)
                for gradient, tangent in zip(gradients, tangents, strict=True)
            ]

        return list(jax.linear_transpose(pullback, out)(list(tangents)))

    def transpose(
        cotangents: Sequence[Any],
        *operands: Any,
        given: Sequence[bool],
        moved: Sequence[bool],
    ) -> list[Any]:
        arrays, out, tangents = parts(operands, given)
        wanted = [ad.is_undefined_primal(tangent) for tangent in tangents]
        result: list[Any] = [None] * len(operands)
        (grad,) = cotangents
        if type(grad) is ad.Zero:
            return result
        needs = tuple(need is True for need in _spread(wanted, moved))
        found = iter(_bind(reverse, (grad, *arrays, out), needs=needs))
        first = len(operands) - len(tangents)
        for place, is_wanted in enumerate(wanted, start=first):
            if is_wanted:
                result[place] = next(found).astype(operands[place].aval.dtype)
        return result

    def batch(
        operands: Sequence[Array], dims: Sequence[int | None], **parameters: Any
    ) -> tuple[list[Array], list[int]]:
        function = functools.partial(by_reference, **parameters)
        return jax.vmap(function, tuple(dims))(*operands), [0]

    linear = _define(f"{kernel.name}_jvp", shapes, by_reference)
    ad.primitive_transposes[linear] = transpose
    batching.primitive_batchers[linear] = batch

    def jvp(
        primals: Sequence[Any],
        tangents: Sequence[Any],
        *,
        given: Sequence[bool],
        **parameters: Any,
    ) -> tuple[list[Any], list[Any]]:
        if any(given[count:]):
            values, found = by_default(primals, tangents, given=given, **parameters)
            return values, found
        (out,) = forward.bind(*primals, given=given, **parameters)
        # An index is no place where a derivative could be asked for.
        directions = [
            direction
            for direction, kind in zip(
                _spread(tangents, given)[:count], kernel.types, strict=False
            )
            if kind == "f"
        ]
        moved = tuple(t is not None and type(t) is not ad.Zero for t in directions)
        if not any(moved):
            return [out], [_no_tangent(out)]
        tangent: list[Any] = linear.bind(
            *primals,
            out,
            *(t for t, is_moved in zip(directions, moved, strict=True) if is_moved),
            given=given[:count],
            moved=moved,
        )
        return [out], tangent

    ad.primitive_jvps[forward] = jvp


# -------------------------------------------------------------------------------- vmap


def _one_by_one(
    primitive: Primitive,
    operands: Sequence[Array],
    dims: Sequence[int | None],
    **parameters: Any,
) -> tuple[list[Array], list[int]]:
    mapped = [
        jnp.moveaxis(array, dim, 0)
        for array, dim in zip(operands, dims, strict=True)
        if dim is not None
    ]

    def one(parts: Sequence[Array]) -> list[Array]:
        left = iter(parts)
        return primitive.bind(  # type: ignore[no-any-return]
            *(
                array if dim is None else next(left)
                for array, dim in zip(operands, dims, strict=True)
            ),
            **parameters,
        )

    found = jax.lax.map(one, mapped)
    return found, [0] * len(found)


def _join_batch(
    primitive: Primitive, cores: Sequence[int | None], whole: Sequence[int] = ()
) -> None:
    """Have a mapped dimension join the batch.

    `cores` are the dimensions of each argument's matrices, after those of the batch;
    None for an index, which all batches share. The arrays in the places `whole` must
    have all batches, and no others.
    """

    def rule(
        operands: Sequence[Array],
        dims: Sequence[int | None],
        *,
        given: Sequence[bool],
        needs: Sequence[bool] = (),
        **parameters: Any,
    ) -> tuple[list[Array], list[int]]:
        if needs:
            parameters["needs"] = needs
        parameters["given"] = given
        arrays, axes = _spread(operands, given), _spread(dims, given)
        if any(
            core is None and axis is not None
            for core, axis in zip(cores, axes, strict=True)
        ):
            return _one_by_one(primitive, operands, dims, **parameters)
        size = next(
            array.shape[axis]
            for array, axis in zip(arrays, axes, strict=True)
            if axis is not None
        )
        rank = max(
            array.ndim - core - (axis is not None)
            for array, axis, core in zip(arrays, axes, cores, strict=True)
            if array is not None and core is not None
        )
        shapes = []
        for place, (array, axis, core) in enumerate(
            zip(arrays, axes, cores, strict=True)
        ):
            # The gradients of `needs` are those of the arrays after the first.
            has_gradient = 0 < place <= len(needs) and needs[place - 1]
            is_stretched = has_gradient or place in whole
            if array is None or core is None or (axis is None and not is_stretched):
                continue
            if axis is None:
                array = jnp.broadcast_to(array, (size, *array.shape))
            else:
                array = jnp.moveaxis(array, axis, 0)
            if has_gradient:
                shapes.append(array.shape)
            missing = rank - (array.ndim - 1 - core)
            arrays[place] = jnp.reshape(
                array, (size, *(1,) * missing, *array.shape[1:])
            )
        found = primitive.bind(
            *(array for array in arrays if array is not None), **parameters
        )
        if needs:
            found = [
                jnp.reshape(array, shape)
                for array, shape in zip(found, shapes, strict=True)
            ]
        return found, [0] * len(found)

    batching.primitive_batchers[primitive] = rule


# ----------------------------------------------------------------------------- kernels


def _matrix_batch(*arrays: Any, cores: Sequence[int]) -> _Shape:
    return batch_shape(
        *(
            tuple(array.shape[: array.ndim - core])
            for array, core in zip(arrays, cores, strict=True)
            if array is not None
        )
    )


def _plain(shape: _Shape, dtype: Any) -> _Output:
    return _Output(shape, dtype, shape)


def _gradients(
    needs: Sequence[bool], inputs: Sequence[Any], cores: Sequence[int], batch: _Shape
) -> list[_Output | None]:
    """Return the gradients of inputs: written over the whole batch, then summed."""
    return [
        _Output(
            (*batch, *array.shape[array.ndim - core :]), _computed(array), array.shape
        )
        if needed
        else None
        for needed, array, core in zip(needs, inputs, cores, strict=True)
    ]


def _itemsize(array: Any) -> int:
    return int(np.dtype(array.dtype).itemsize)


def _plan_exact(x: Any, y: Any, log_weights: Any, excluded: Any) -> _Plan:
    del excluded
    batch = _matrix_batch(x, y, log_weights, cores=(2, 2, 1))
    (n, d), m = x.shape[-2:], y.shape[-2]
    return _Plan(
        [_plain((*batch, n), _computed(x))], (math.prod(batch), n, m, d, _itemsize(x))
    )


def _plan_exact_vjp(
    grad: Any,
    x: Any,
    y: Any,
    log_weights: Any,
    excluded: Any,
    log_z: Any,
    *,
    needs: Sequence[bool],
) -> _Plan:
    del excluded
    batch = _matrix_batch(grad, x, y, log_weights, log_z, cores=(1, 2, 2, 1, 1))
    (n, d), m = x.shape[-2:], y.shape[-2]
    return _Plan(
        _gradients(needs, (x, y, log_weights), (2, 2, 1), batch),
        (math.prod(batch), n, m, d, _itemsize(x)),
    )


def _plan_gaussian(
    x: Any,
    log_counts: Any,
    means: Any,
    factors: Any,
    diagonal: Any,
    own_component: Any,
    own_log_weight: Any,
    *,
    include: bool,
) -> _Plan:
    del own_component, own_log_weight
    inputs = (x, log_counts, means, factors, diagonal)
    batch = _matrix_batch(*inputs, cores=(2, 1, 2, 3, 2))
    (n, d), (k, r) = x.shape[-2:], (means.shape[-2], factors.shape[-1])
    return _Plan(
        [_plain((*batch, n), x.dtype)],
        (math.prod(batch), n, k, d, r, _itemsize(x)),
        int(include),
    )


def _plan_gaussian_vjp(grad: Any, *arrays: Any, needs: Sequence[bool]) -> _Plan:
    *inputs, log_z = arrays
    cores = (2, 1, 2, 3, 2)
    batch = _matrix_batch(grad, *inputs, log_z, cores=(1, *cores, 1))
    x, _, means, factors, _ = inputs
    (n, d), (k, r) = x.shape[-2:], (means.shape[-2], factors.shape[-1])
    return _Plan(
        _gradients(needs, inputs, cores, batch),
        (math.prod(batch), n, k, d, r, _itemsize(x)),
    )


def _plan_moments(x: Any, means: Any, factors: Any, diagonal: Any) -> _Plan:
    del means, diagonal
    (n, d), (k, _, r) = x.shape, factors.shape
    return _Plan([_plain((n, k), x.dtype)] * 2, (n, k, d, r, _itemsize(x)))


def _plan_nearest(x: Any, centroids: Any, offsets: Any) -> _Plan:
    del offsets
    (n, d), k = x.shape, centroids.shape[0]
    return _Plan(
        [_plain((n,), np.int64), _plain((n,), x.dtype)], (n, k, d, _itemsize(x))
    )


def _plan_sums(y: Any, labels: Any, weights: Any, *, k: int) -> _Plan:
    del labels, weights
    n, d = y.shape
    return _Plan(
        [_plain((k,), np.float64), _plain((k, d), np.float64)],
        (n, k, d, _itemsize(y)),
    )


def _plan_scatter(
    y: Any, labels: Any, weights: Any, means: Any, *, diagonal: bool
) -> _Plan:
    del labels, weights
    (n, d), k = y.shape, means.shape[0]
    return _Plan(
        [
            _plain((k, d) if diagonal else (k, d, d), np.float64),
            _plain((k,), np.float64),
        ],
        (n, k, d, _itemsize(y), diagonal),
    )


def _plan_residuals(
    x: Any,
    deviations: Any,
    weights: Any,
    offsets: Any,
    variance: Any,
    *rest: Any,
    quadratic: bool,
) -> _Plan:
    del weights, offsets, rest
    # How many samples a component has is not known while JAX traces: at most all.
    n, d = x.shape
    return _Plan(
        [_plain(variance.shape, x.dtype)] * 3,
        (n, d, deviations.shape[0], _itemsize(x)),
        int(quadratic),
    )


def _listed(function: Callable[..., Any]) -> Callable[..., list[Array]]:
    """Return a function of the reference that takes floats of 16 bits as well.

    It gives a list of its results.
    """

    def listed(*arrays: Any, **parameters: Any) -> list[Array]:
        wide = [
            array
            if array is None or not jnp.issubdtype(array.dtype, np.floating)
            else _wide(array)
            for array in arrays
        ]
        found = function(*wide, **parameters)
        parts = found if isinstance(found, tuple) else (found,)
        return [part for part in parts if part is not None]

    return listed


def _gaussian_by_reference(*arrays: Any, include: bool) -> Array:
    x, log_counts, means, factors, diagonal, component, log_weight = arrays
    own = None if component is None else (component, log_weight, include)
    return reference.gaussian_log_normalizer(
        x, log_counts, means, factors, diagonal, own
    )


_EXACT = _Kernel(
    "log_normalizer",
    _plan_exact,
    _listed(reference.log_normalizer),
    "fffi",
    lambda arrays: {3: arrays[1].shape[-2]},
)
_EXACT_VJP = _Kernel(
    "log_normalizer_vjp",
    _plan_exact_vjp,
    _listed(reference.log_normalizer_vjp),
    "ffffif",
    lambda arrays: {4: arrays[2].shape[-2]},
)
_GAUSSIAN = _Kernel(
    "gaussian_log_normalizer",
    _plan_gaussian,
    _listed(_gaussian_by_reference),
    "fffffif",
    lambda arrays: {5: arrays[2].shape[-2]},
)
_GAUSSIAN_VJP = _Kernel(
    "gaussian_log_normalizer_vjp",
    _plan_gaussian_vjp,
    _listed(reference.gaussian_log_normalizer_vjp),
    "fffffff",
)

_MOMENTS = _Kernel(
    "gaussian_score_moments",
    _plan_moments,
    _listed(reference.gaussian_score_moments),
    "ffff",
)
_NEAREST = _Kernel(
    "nearest_centroids", _plan_nearest, _listed(reference.nearest_centroids), "fff"
)
_SUMS = _Kernel("component_sums", _plan_sums, _listed(reference.component_sums), "fif")
_SCATTER = _Kernel(
    "component_scatter",
    _plan_scatter,
    _listed(reference.component_scatter),
    "fifd",
)
_RESIDUALS = _Kernel(
    "sample_residuals",
    _plan_residuals,
    _listed(reference.sample_residuals),
    "fffifffi",
    lambda arrays: {7: arrays[1].shape[0]},
)

_differentiate(_EXACT, _EXACT_VJP)
_differentiate(_GAUSSIAN, _GAUSSIAN_VJP)

_join_batch(_EXACT.primitive, (2, 2, 1, None))
_join_batch(_EXACT_VJP.primitive, (1, 2, 2, 1, None, 1))
_join_batch(_GAUSSIAN.primitive, (2, 1, 2, 3, 2, None, None))
_join_batch(_GAUSSIAN_VJP.primitive, (1, 2, 1, 2, 3, 2, 1), whole=(0, 1, 6))


# ------------------------------------------------------------- the backend's functions


def log_normalizer(
    x: Array, y: Array, log_weights: Array | None, excluded: Array | None
) -> Array:
    return _apply(_EXACT, (x, y, log_weights, excluded))[0]


def log_normalizer_vjp(
    grad: Array,
    x: Array,
    y: Array,
    log_weights: Array | None,
    excluded: Array | None,
    log_z: Array,
    needs: tuple[bool, bool, bool],
) -> tuple[Array | None, Array | None, Array | None]:
    needs = (*needs[:2], needs[2] and log_weights is not None)
    arrays = (grad, x, y, log_weights, excluded, log_z)
    gx, gy, gw = _spread(_apply(_EXACT_VJP, arrays, needs=needs), needs)
    return gx, gy, gw


def gaussian_log_normalizer(
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
    own: Own | None,
) -> Array:
    component, log_weight, include = (None, None, False) if own is None else own
    arrays = (x, log_counts, means, factors, diagonal, component, log_weight)
    return _apply(_GAUSSIAN, arrays, include=bool(include))[0]


def gaussian_log_normalizer_vjp(
    grad: Array,
    x: Array,
    log_counts: Array,
    means: Array,
    factors: Array,
    diagonal: Array | None,
    log_z: Array,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Array | None, Array | None, Array | None, Array | None, Array | None]:
    needs = (*needs[:4], needs[4] and diagonal is not None)
    arrays = (grad, x, log_counts, means, factors, diagonal, log_z)
    gx, gc, gm, gf, gd = _spread(_apply(_GAUSSIAN_VJP, arrays, needs=needs), needs)
    return gx, gc, gm, gf, gd


def gaussian_score_moments(
    x: Array, means: Array, factors: Array, diagonal: Array | None
) -> tuple[Array, Array]:
    mean, variance = _apply(_MOMENTS, (x, means, factors, diagonal))
    return mean, variance


def nearest_centroids(
    x: Array, centroids: Array, offsets: Array
) -> tuple[Array, Array]:
    labels, score = _apply(_NEAREST, (x, centroids, offsets))
    return labels, score


def component_sums(
    y: Array, labels: Array, weights: Array | None, k: int
) -> tuple[Array, Array]:
    counts, sums = _apply(_SUMS, (y, labels, weights), k=k)
    return counts, sums


def component_scatter(
    y: Array, labels: Array, weights: Array | None, means: Array, diagonal: bool
) -> tuple[Array, Array]:
    arrays = (y, labels, weights, means)
    scatter, radii = _apply(_SCATTER, arrays, diagonal=diagonal)
    return scatter, radii


def sample_residuals(
    x: Array,
    deviations: Array,
    weights: Array,
    offsets: Array,
    variance: Array,
    scale: Array,
    shift: Array | None,
    excluded: Array | None,
    quadratic: bool,
) -> tuple[Array, Array, Array]:
    arrays = (x, deviations, weights, offsets, variance, scale, shift, excluded)
    log_factor, log_error, third = _apply(_RESIDUALS, arrays, quadratic=quadratic)
    return log_factor, log_error, third
