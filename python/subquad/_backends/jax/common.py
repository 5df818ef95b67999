"""What all primitives share: their lowerings, derivatives and rules of vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from subquad import _core
from subquad._backends.compiled import CPU, CUDA, serves_cuda
from subquad._dispatch import Array
from subquad._reference._common import batch_shape, sum_to

_DEVICES = {"cpu": CPU, "cuda": CUDA}

Shape: TypeAlias = tuple[int, ...]


class Output(NamedTuple):
    """What a kernel writes.

    `result` is the shape of what is made of it, by sums over dimensions that were
    broadcast.
    """

    shape: Shape
    dtype: Any
    result: Shape


class Plan(NamedTuple):
    """How a kernel is called with given arrays.

    Attributes
    ----------
    outputs : list
        In the order of the C function; None for one that is left out.
    sizes : tuple
        Arguments of the function that tells the size of the workspace.
    numbers : tuple
        The numbers that the C function takes, in its order.
    attributes : dict
        What else it takes, by name.
    """

    outputs: list[Output | None]
    sizes: tuple[int, ...]
    numbers: tuple[int, ...] = ()
    attributes: Mapping[str, Any] = MappingProxyType({})


@dataclass(eq=False)
class Kernel:
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
        Of each input: as it comes ("f"), float64 ("d"), int64 ("i") or a mask ("b").
    limits : Callable
        Of the input arrays: for the place of an index, how many there are to choose
        from. Indices beyond mean none.
    workspace : str, optional
        Name of the function whose workspace it takes; by default its own.
    passed : int, optional
        How many of the inputs, the first ones, the C function takes; by default all.
        The others are for the plan and for derivatives.
    """

    name: str
    plan: Callable[..., Plan]
    by_reference: Callable[..., list[Array]]
    types: str
    limits: Callable[[Sequence[Any]], dict[int, int]] = lambda _: {}
    workspace: str | None = None
    passed: int | None = None

    def __post_init__(self) -> None:
        self.primitive = _define_kernel(self)


# -------------------------------------------------------------------------- primitives


def _define(
    name: str,
    shapes: Callable[..., list[tuple[Shape, Any]]],
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


def _define_kernel(kernel: Kernel) -> Primitive:
    """Return the primitive of a kernel.

    Its operands are the arrays that are `given`. `threads` is there to be compared:
    what was compiled for few threads has a workspace for no more.
    """

    def shapes(
        *operands: Any, given: Sequence[bool], threads: int, **parameters: Any
    ) -> list[tuple[Shape, Any]]:
        del threads
        plan = kernel.plan(*spread(operands, given), **parameters)
        return [
            (output.result, output.dtype)
            for output in plan.outputs
            if output is not None
        ]

    def by_reference(
        *operands: Array, given: Sequence[bool], threads: int, **parameters: Any
    ) -> list[Array]:
        del threads
        return kernel.by_reference(*spread(operands, given), **parameters)

    primitive = _define(kernel.name, shapes, by_reference)
    for platform in _DEVICES:
        rule = functools.partial(_lower, kernel, by_reference, platform)
        mlir.register_lowering(primitive, rule, platform=platform)
    batching.primitive_batchers[primitive] = functools.partial(_one_by_one, primitive)
    return primitive


def _result_type(like: Any, shape: Shape, dtype: Any) -> Any:
    """Return the type of a result of operands that lie in a mesh like that one."""
    if like is None:
        return jax.core.ShapedArray(shape, dtype)
    spec = jax.sharding.PartitionSpec(*(None for _ in shape))
    sharding = jax.sharding.NamedSharding(like.sharding.mesh, spec)
    return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def apply(kernel: Kernel, arrays: Sequence[Any], **parameters: Any) -> list[Any]:
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


def _bind(kernel: Kernel, arrays: Sequence[Any], **parameters: Any) -> list[Any]:
    given = tuple(array is not None for array in arrays)
    found: list[Any] = kernel.primitive.bind(
        *(array for array in arrays if array is not None),
        given=given,
        threads=_core.get_num_threads(),
        **parameters,
    )
    return found


def spread(operands: Sequence[Any], given: Sequence[bool]) -> list[Any]:
    """Put None in the place of each array that is not given."""
    left = iter(operands)
    return [next(left) if is_given else None for is_given in given]


def _lower(
    kernel: Kernel,
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
    kernel: Kernel,
    device: int,
    results: Sequence[tuple[Shape, Any]],
    *operands: Array,
    given: Sequence[bool],
    threads: int,
    **parameters: Any,
) -> list[Array]:
    """Call the handler of a kernel."""
    del threads
    arrays = spread(operands, given)
    plan = kernel.plan(*arrays, **parameters)
    size_of = getattr(_core, f"{kernel.workspace or kernel.name}_workspace")
    size = size_of(*plan.sizes, device)
    outputs = [output for output in plan.outputs if output is not None]
    passed = given[: kernel.passed]
    present = (*passed, *(output is not None for output in plan.outputs), True)
    # The kernels' 64-bit integers and sums are theirs alone where JAX has them off.
    with jax.enable_x64(True):
        limits = kernel.limits(arrays)
        inputs = [
            _as_input(array, kind, device, limits.get(place))
            for place, (array, kind) in enumerate(
                zip(arrays[: kernel.passed], kernel.types, strict=True)
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
            numbers=np.int64(
                sum(number << (16 * place) for place, number in enumerate(plan.numbers))
            ),
            **plan.attributes,
        )
        return [
            sum_to(jnp, array, shape).astype(dtype)
            for array, (shape, dtype) in zip(found[:-1], results, strict=True)
        ]


def _as_input(array: Array, kind: str, device: int, limit: int | None) -> Array:
    if kind == "d":
        return array.astype(np.float64)
    if kind == "f":
        return wide(array) if device == CPU else array
    if kind == "b":
        return array.astype(np.uint8)
    array = array.astype(np.int64)
    if limit is None:
        return array
    return jnp.where((array < 0) | (array >= limit), np.int64(-1), array)


def wide(array: Array) -> Array:
    return array.astype(computed(array))


def computed(array: Any) -> Any:
    """Return the type that floats are computed in: float32 for those of 16 bits."""
    return np.float32 if array.dtype.itemsize == 2 else array.dtype


# ------------------------------------------------------------------------- derivatives


def push(
    function: Callable[..., list[Array]],
    inputs: Sequence[Any],
    places: Sequence[int],
    tangents: Sequence[Any],
) -> tuple[list[Array], list[Array]]:
    """Return values and tangents of a function of which some inputs move."""

    def of_moved(*arrays: Any) -> list[Array]:
        complete = list(inputs)
        for place, array in zip(places, arrays, strict=True):
            complete[place] = array
        return function(*complete)

    values, found = jax.jvp(of_moved, [inputs[i] for i in places], list(tangents))
    return values, found


def _jvp_of(
    function: Callable[..., list[Array]],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    **parameters: Any,
) -> tuple[list[Any], list[Any]]:
    """Return values and tangents of a function of JAX's own operations."""
    moved = [place for place, t in enumerate(tangents) if type(t) is not ad.Zero]
    values, found = push(
        functools.partial(function, **parameters),
        primals,
        moved,
        [tangents[i] for i in moved],
    )
    return values, [
        _no_tangent(value) if t.dtype == jax.dtypes.float0 else t
        for value, t in zip(values, found, strict=True)
    ]


def _no_tangent(value: Any) -> Any:
    return ad.Zero(jax.typeof(value).to_tangent_aval())


@dataclass(frozen=True)
class Derivative:
    """How a kernel is differentiated.

    Attributes
    ----------
    reverse : Kernel or Callable
        Of a list of arrays and static parameters. It takes `needs`, which says what of
        `moves` is wanted.
    moves : tuple of int
        Places of the inputs that have gradients.
    results : tuple of int
        Places of the outputs that have tangents.
    kept : tuple of int
        Places of the outputs that the reverse takes.
    arguments : Callable
        The arrays of the reverse, of the inputs, what is kept, and the gradients of
        the results: None for those that are left out or have no gradient.
    tangents : Callable
        The tangents of the results that are there, by the reference: of the inputs,
        what is kept, the tangents of `moves` (None for 0), and static parameters.
    parameters : tuple of str
        Static parameters that the reverse shares.
    directions : Callable, optional
        The tangents of `moves`, of those of all inputs. By default each its own.
    without : tuple of int
        Places of inputs that leave all to the reference.
    extended : Callable, optional
        Of which of `moves` have tangents and static parameters, returns those with
        which the kernel is called where there are tangents: it may give more outputs
        then, which are kept.
    """

    reverse: Kernel | Callable[..., list[Array]]
    moves: tuple[int, ...]
    results: tuple[int, ...]
    kept: tuple[int, ...]
    arguments: Callable[..., Sequence[Any]]
    tangents: Callable[..., list[Array]]
    parameters: tuple[str, ...] = ()
    directions: Callable[[Sequence[Any]], Sequence[Any]] | None = None
    without: tuple[int, ...] = ()
    extended: Callable[..., dict[str, Any]] | None = None


class _Parts(NamedTuple):
    """The operands of a derivative; None for what is not there.

    `first` is the place of the first tangent.
    """

    inputs: list[Any]
    kept: list[Any]
    tangents: list[Any]
    outputs: list[Output | None]
    first: int


def differentiate(kernel: Kernel, rule: Derivative) -> None:
    """Give a kernel its derivative, a primitive that is linear in tangents.

    The operands of that are those of the kernel, what is kept of its results, and the
    tangents of the inputs that `moved` tells.
    """
    forward = kernel.primitive
    by_default: Any = ad.primitive_jvps[forward]
    reverse = rule.reverse
    if isinstance(reverse, Kernel):
        reverse = functools.partial(_bind, reverse)

    def parts(
        operands: Sequence[Any],
        *,
        given: Sequence[bool],
        moved: Sequence[bool],
        **parameters: Any,
    ) -> _Parts:
        size = sum(given)
        inputs = spread(operands[:size], given)
        outputs = kernel.plan(*inputs, **parameters).outputs
        present = [outputs[place] is not None for place in rule.kept]
        first = size + sum(present)
        kept = spread(operands[size:first], present)
        return _Parts(inputs, kept, spread(operands[first:], moved), outputs, first)

    def shapes(*operands: Any, **parameters: Any) -> list[tuple[Shape, Any]]:
        outputs = parts(operands, **parameters).outputs
        found = (outputs[place] for place in rule.results)
        return [(output.result, output.dtype) for output in found if output is not None]

    def by_reference(
        *operands: Array,
        given: Sequence[bool],
        moved: Sequence[bool],
        **parameters: Any,
    ) -> list[Array]:
        inputs, kept, tangents, *_ = parts(
            operands, given=given, moved=moved, **parameters
        )
        return rule.tangents(inputs, kept, tangents, **parameters)

    def transpose(
        cotangents: Sequence[Any], *operands: Any, **parameters: Any
    ) -> list[Any]:
        inputs, kept, tangents, outputs, first = parts(operands, **parameters)
        result: list[Any] = [None] * len(operands)
        if all(type(grad) is ad.Zero for grad in cotangents):
            return result
        grads = [
            None if type(grad) is ad.Zero else grad
            for grad in spread(
                cotangents, [outputs[place] is not None for place in rule.results]
            )
        ]
        found = iter(
            reverse(
                rule.arguments(inputs, kept, grads),
                needs=tuple(map(ad.is_undefined_primal, tangents)),
                **{name: parameters[name] for name in rule.parameters},
            )
        )
        for place, operand in enumerate(operands[first:], start=first):
            if ad.is_undefined_primal(operand):
                result[place] = next(found).astype(operand.aval.dtype)
        return result

    def batch(
        operands: Sequence[Array], dims: Sequence[int | None], **parameters: Any
    ) -> tuple[list[Array], list[int]]:
        function = functools.partial(by_reference, **parameters)
        found: list[Array] = jax.vmap(function, tuple(dims))(*operands)
        return found, [0] * len(found)

    linear = _define(f"{kernel.name}_jvp", shapes, by_reference)
    ad.primitive_transposes[linear] = transpose
    batching.primitive_batchers[linear] = batch

    def jvp(
        primals: Sequence[Any],
        tangents: Sequence[Any],
        *,
        given: Sequence[bool],
        threads: int,
        **parameters: Any,
    ) -> tuple[list[Any], list[Any]]:
        if any(given[place] for place in rule.without):
            values, found = by_default(
                primals, tangents, given=given, threads=threads, **parameters
            )
            return values, found
        by_input = spread(tangents, given)
        directions = (
            [by_input[place] for place in rule.moves]
            if rule.directions is None
            else rule.directions(by_input)
        )
        moved = tuple(t is not None and type(t) is not ad.Zero for t in directions)
        inputs = spread(primals, given)
        asked = kernel.plan(*inputs, **parameters).outputs
        if rule.extended is not None and any(moved):
            parameters = rule.extended(moved, parameters)
        values = forward.bind(*primals, given=given, threads=threads, **parameters)
        if not any(moved):
            return values, [_no_tangent(value) for value in values]
        outputs = kernel.plan(*inputs, **parameters).outputs
        results = spread(values, [output is not None for output in outputs])
        left = iter(
            linear.bind(
                *primals,
                *(results[place] for place in rule.kept if results[place] is not None),
                *(t for t, is_moved in zip(directions, moved, strict=True) if is_moved),
                given=given,
                moved=moved,
                **parameters,
            )
        )
        directions = [
            None
            if value is None
            else next(left)
            if place in rule.results
            else _no_tangent(value)
            for place, value in enumerate(results)
        ]
        shown = [place for place, output in enumerate(asked) if output is not None]
        return [results[i] for i in shown], [directions[i] for i in shown]

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


def join_batch(
    kernel: Kernel,
    cores: Sequence[int | None],
    gradients: Sequence[int] = (),
    whole: Sequence[int] = (),
) -> None:
    """Have a mapped dimension join the batch.

    `cores` are the dimensions of each argument's matrices, after those of the batch;
    None for an index, which all batches share. `gradients` are the places of the arrays
    whose gradients `needs` asks for. The arrays in the places `whole` must have all
    batches, and no others.
    """
    primitive = kernel.primitive

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
        arrays, axes = spread(operands, given), spread(dims, given)
        size = _mapped_size(arrays, axes, cores)
        if size is None:
            return _one_by_one(primitive, operands, dims, **parameters)
        wanted = [
            place
            for place, needed in zip(gradients, needs, strict=bool(needs))
            if needed
        ]
        rank = max(
            array.ndim - core - (axis is not None)
            for array, axis, core in zip(arrays, axes, cores, strict=True)
            if array is not None and core is not None
        )
        shapes = []
        for place, (array, axis, core) in enumerate(
            zip(arrays, axes, cores, strict=True)
        ):
            has_gradient = place in wanted
            is_stretched = has_gradient or place in whole
            if array is None or core is None or (axis is None and not is_stretched):
                continue
            array = _to_front(array, axis, size)
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


def join_lanes(kernel: Kernel) -> None:
    """Have a mapped dimension become one more that a scan does not run along."""
    primitive = kernel.primitive
    cores = [None if kind == "i" else 0 for kind in kernel.types]

    def rule(
        operands: Sequence[Array],
        dims: Sequence[int | None],
        *,
        given: Sequence[bool],
        axis: int,
        **parameters: Any,
    ) -> tuple[list[Array], list[int]]:
        arrays, axes = spread(operands, given), spread(dims, given)
        size = _mapped_size(arrays, axes, cores)
        if size is None:
            return _one_by_one(
                primitive, operands, dims, given=given, axis=axis, **parameters
            )
        found = primitive.bind(
            *(
                array if core is None else _to_front(array, dim, size)
                for array, dim, core in zip(arrays, axes, cores, strict=True)
                if array is not None
            ),
            given=given,
            axis=axis + 1,
            **parameters,
        )
        return found, [0] * len(found)

    batching.primitive_batchers[primitive] = rule


def _mapped_size(
    arrays: Sequence[Any], axes: Sequence[int | None], cores: Sequence[int | None]
) -> int | None:
    """Return the length of a mapped dimension; None if an index is mapped."""
    mapped = [
        (array.shape[axis], core)
        for array, axis, core in zip(arrays, axes, cores, strict=True)
        if axis is not None
    ]
    if any(core is None for _, core in mapped):
        return None
    return int(mapped[0][0])


def _to_front(array: Array, axis: int | None, size: int) -> Array:
    if axis is None:
        return jnp.broadcast_to(array, (size, *array.shape))
    return jnp.moveaxis(array, axis, 0)


# ------------------------------------------------------------------------------- plans


def matrix_batch(arrays: Iterable[Any], cores: Sequence[int]) -> Shape:
    """Broadcast what comes before the last dimensions of each array."""
    return batch_shape(
        *(
            tuple(array.shape[: array.ndim - core])
            for array, core in zip(arrays, cores, strict=True)
            if array is not None
        )
    )


def plain(shape: Shape, dtype: Any) -> Output:
    return Output(shape, dtype, shape)


def gradients(
    needs: Sequence[bool], inputs: Sequence[Any], cores: Sequence[int], batch: Shape
) -> list[Output | None]:
    """Return the gradients of inputs: written over the whole batch, then summed."""
    return [
        Output(
            (*batch, *array.shape[array.ndim - core :]), computed(array), array.shape
        )
        if needed
        else None
        for needed, array, core in zip(needs, inputs, cores, strict=True)
    ]


def itemsize(array: Any) -> int:
    return int(np.dtype(array.dtype).itemsize)


def listed(function: Callable[..., Any]) -> Callable[..., list[Array]]:
    """Return a function of the reference that takes floats of 16 bits as well.

    It gives a list of the results that are there.
    """

    def call(*arrays: Any, **parameters: Any) -> list[Array]:
        inputs = [
            array
            if array is None or not jnp.issubdtype(array.dtype, np.floating)
            else wide(array)
            for array in arrays
        ]
        found = function(*inputs, **parameters)
        parts = found if isinstance(found, tuple) else (found,)
        return [part for part in parts if part is not None]

    return call
