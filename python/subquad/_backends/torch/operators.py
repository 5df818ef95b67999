"""Operators of torch: what all of them need to carry derivatives, vmap and shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from subquad._backends.torch.memory import (
    Optional,
    carries_tangents,
    is_transformed,
    wide,
)
from subquad._dispatch import Array

OPERATORS = torch.library.Library("subquad", "DEF")
registered: Any = torch.ops.subquad
PLACES = ("CPU", "CUDA")


def only(needs: Sequence[bool], found: Sequence[Array]) -> list[Array | None]:
    return [a if needed else None for needed, a in zip(needs, found, strict=True)]


def filled(
    like: torch.Tensor, gradients: Sequence[Optional]
) -> tuple[torch.Tensor, ...]:
    """Put empty tensors in the place of None, which an operator cannot return."""
    dtype = wide(like.dtype)
    return tuple(
        like.new_empty((0,), dtype=dtype) if g is None else g for g in gradients
    )


def gradient_shapes(
    inputs: Sequence[Optional], needs: Sequence[bool]
) -> tuple[torch.Tensor, ...]:
    like = next(a for a in inputs if a is not None)
    dtype = wide(like.dtype)
    return tuple(
        like.new_empty(
            tuple(a.shape) if needed and a is not None else (0,), dtype=dtype
        )
        for a, needed in zip(inputs, needs, strict=True)
    )


def save_vjp(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    del output
    *arrays, needs = inputs
    ctx.save_for_backward(*arrays)
    ctx.needs = tuple(needs)


def backward_of(vjp: Callable[..., Any], index: int | None) -> Callable[..., Any]:
    """Return the reverse of a reverse, from its reference in torch's own operators.

    `index` is the place of an argument of integers.
    """

    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        arrays = ctx.saved_tensors
        places = [i for i, a in enumerate(arrays) if a is not None and i != index]

        def gradients(*moved: torch.Tensor) -> tuple[torch.Tensor, ...]:
            complete = list(arrays)
            for place, array in zip(places, moved, strict=True):
                complete[place] = array
            return tuple(g for g in vjp(*complete, ctx.needs) if g is not None)

        reverse: Any = torch.func.vjp(gradients, *(arrays[i] for i in places))[1]
        found = reverse(
            tuple(g for g, needed in zip(grads, ctx.needs, strict=True) if needed)
        )
        result: list[Any] = [None] * (len(arrays) + 1)
        for place, array in zip(places, found, strict=True):
            result[place] = array
        return tuple(result)

    return backward


def padded(
    array: Optional, dim: int | None, core: int, rank: int, stretch: int | None
) -> Optional:
    """Bring the mapped dimension before `rank` batch dimensions that broadcast.

    Arrays that are not mapped are stretched to `stretch`, or left alone if that is
    None.
    """
    if array is None:
        return None
    if dim is None:
        if stretch is None:
            return array
        array = array.expand(stretch, *array.shape)
    else:
        array = array.movedim(dim, 0)
    missing = rank - (array.ndim - 1 - core)
    front, *rest = array.shape
    return array.reshape(front, *(1,) * missing, *rest) if missing else array


def batch_rank(
    arrays: Sequence[Optional], dims: Sequence[int | None], cores: Sequence[int]
) -> int:
    return max(
        a.ndim - core - (dim is not None)
        for a, dim, core in zip(arrays, dims, cores, strict=True)
        if a is not None
    )


def one_by_one(
    operator: Callable[..., Any],
    size: int,
    dims: Sequence[Any],
    arguments: Sequence[Any],
) -> list[Any]:
    return [
        operator(
            *(
                a if dim is None else a.select(dim, i)
                for a, dim in zip(arguments, dims, strict=True)
            )
        )
        for i in range(size)
    ]


def flat_dims(dims: Sequence[Any]) -> list[int | None]:
    """Read the mapped dimensions; those of a list of booleans are a list of None."""
    return [dim if isinstance(dim, int) else None for dim in dims]


def mapped(
    operator: Callable[..., Any], cores: Sequence[int], index: int | None
) -> Callable[..., Any]:
    """Return the vmap rule of a function: the mapped dimension joins the batch."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        dims = flat_dims(in_dims)
        if index is not None and dims[index] is not None:
            # All batches share one index.
            return stacked(one_by_one(operator, info.batch_size, dims, arguments))
        arrays = arguments[: len(cores)]
        rank = batch_rank(arrays, dims[: len(cores)], cores)
        moved = [
            padded(a, dim, core, rank, None)
            for a, dim, core in zip(arrays, dims, cores, strict=False)
        ]
        return with_dims(operator(*moved, *arguments[len(cores) :]))

    return rule


def is_filling(array: torch.Tensor) -> bool:
    """Return whether a result with a mapped dimension stands for None."""
    return array.ndim == 1 and array.shape[0] == 0


def with_dims(found: Any) -> tuple[Any, Any]:
    """Return results and their mapped dimensions: the first, none where not asked."""
    if isinstance(found, torch.Tensor):
        return found, 0
    return found, tuple(None if is_filling(array) else 0 for array in found)


def stacked(parts: Sequence[Any]) -> tuple[Any, Any]:
    """Return the results of single calls together, and their mapped dimensions."""
    if isinstance(parts[0], torch.Tensor):
        return torch.stack(list(parts)), 0
    return with_dims(
        tuple(
            column[0] if is_filling(column[0]) else torch.stack(column)
            for column in zip(*parts, strict=True)
        )
    )


def mapped_vjp(
    operator: Callable[..., Any],
    cores: Sequence[int],
    inputs: Sequence[int],
    index: int | None,
) -> Callable[..., Any]:
    """Return the vmap rule of a reverse: every gradient has the mapped dimension.

    `inputs` are the places of the arguments that gradients are of.
    """

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        dims = flat_dims(in_dims)
        size = info.batch_size
        if index is not None and dims[index] is not None:
            return stacked(one_by_one(operator, size, dims, arguments))
        batched = [
            i
            for i, a in enumerate(arguments)
            if i != index and isinstance(a, torch.Tensor)
        ]
        rank = batch_rank(
            [arguments[i] for i in batched],
            [dims[i] for i in batched],
            [cores[i] for i in batched],
        )
        moved = list(arguments)
        shapes: dict[int, tuple[int, ...]] = {}
        for i in batched:
            array, dim = arguments[i], dims[i]
            shape = list(array.shape)
            if dim is not None:
                del shape[dim]
            shapes[i] = (size, *shape)
            moved[i] = padded(array, dim, cores[i], rank, size)
        found = operator(*moved)
        return with_dims(
            tuple(
                g if is_filling(g) else g.reshape(shapes[place])
                for g, place in zip(found, inputs, strict=True)
            )
        )

    return rule


def mapped_lanes(
    operator: Callable[..., Any], axis: int, index: int | None
) -> Callable[..., Any]:
    """Return the vmap rule of a scan: the mapped dimension is one more of the lanes.

    `axis` is the place of the axis among the arguments, `index` that of the segments.
    """

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        dims = flat_dims(in_dims)
        if index is not None and dims[index] is not None:
            return stacked(one_by_one(operator, info.batch_size, dims, arguments))
        moved = list(arguments)
        for i, (array, dim) in enumerate(zip(arguments, dims, strict=True)):
            if i != index and isinstance(array, torch.Tensor):
                moved[i] = (
                    array.expand(info.batch_size, *array.shape)
                    if dim is None
                    else array.movedim(dim, 0)
                )
        moved[axis] += 1
        return with_dims(operator(*moved))

    return rule


def register(
    name: str,
    shape: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
    rule: Callable[..., Any],
) -> None:
    qualified = f"subquad::{name}"
    torch.library.register_fake(qualified, shape, lib=OPERATORS)
    torch.library.register_autograd(
        qualified, backward, setup_context=save, lib=OPERATORS
    )
    torch.library.register_vmap(qualified, rule, lib=OPERATORS)


def transformable(
    operator: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
    rule: Callable[..., Any],
    jvp: Callable[..., Any] | None = None,
) -> Any:
    """Return a function that torch.func transforms, with the rules of an operator."""
    members = {
        "forward": operator,
        "setup_context": save,
        "backward": backward,
        "vmap": rule,
    }
    if jvp is not None:
        members["jvp"] = jvp
    function: Any = type(
        "Transformable",
        (torch.autograd.Function,),
        {name: staticmethod(member) for name, member in members.items()},
    )
    return function.apply


def define(
    schema: str,
    compute: Callable[..., Any],
    shape: Callable[..., Any],
    backward: Callable[..., Any],
    rule: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    jvp: Callable[..., Any] | None = None,
    constants: Sequence[int] = (),
    saved_results: Sequence[int] = (),
    spared: Callable[[Sequence[bool]], Sequence[int]] = lambda _: (),
) -> Callable[..., Any]:
    """Define an operator and return what calls it.

    Parameters
    ----------
    schema : str
        Name, arguments and results.
    compute : callable
        Computes the results where values are real.
    shape : callable
        Returns them without values.
    backward : callable
        Takes a context and the results' gradients, None for 0.
    rule : callable
        Makes the vmap rule of a function.
    jvp : callable, optional
        Takes a context and the arguments' tangents, None for 0.
    constants : sequence of int
        Places of the results that have no gradient.
    saved_results : sequence of int
        Places of the results that `backward` wants.
    spared : callable
        Of which arguments need gradients, returns the places of those tensors that
        `backward` does without: it finds their shapes there.
    """
    name = schema.partition("(")[0]
    OPERATORS.define(schema)
    for place in PLACES:
        OPERATORS.impl(name, compute, place)
    operator: Any = getattr(registered, name).default

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        output = output if isinstance(output, tuple) else (output,)
        fixed = [
            array
            for place, array in enumerate(output)
            if place in constants or is_filling(array)
        ]
        ctx.mark_non_differentiable(*fixed)
        without = spared(ctx.needs_input_grad)
        kept = [
            tuple(value.shape)
            if place in without and isinstance(value, torch.Tensor)
            else value
            for place, value in enumerate(inputs)
        ]
        is_tensor = [isinstance(value, torch.Tensor) for value in kept]
        ctx.is_tensor = is_tensor
        ctx.others = [
            None if is_one else value
            for value, is_one in zip(kept, is_tensor, strict=True)
        ]
        tensors = [
            value for value, is_one in zip(kept, is_tensor, strict=True) if is_one
        ]
        results = [output[place] for place in saved_results]
        ctx.save_for_backward(*tensors, *results)
        if jvp is not None:
            ctx.save_for_forward(*tensors, *results)

    def call(*arguments: Any) -> Any:
        if is_transformed() or carries_tangents():
            return transformed(*arguments)
        return operator(*arguments)

    mapped_rule = rule(call)
    register(name, shape, save, backward, mapped_rule)
    transformed = transformable(operator, save, backward, mapped_rule, jvp)
    return call


def saved(ctx: Any) -> tuple[list[Any], list[torch.Tensor]]:
    """Return a defined operator's arguments and the results that were saved."""
    tensors = list(ctx.saved_tensors)
    count = sum(ctx.is_tensor)
    given = iter(tensors[:count])
    arguments = [
        next(given) if is_one else other
        for is_one, other in zip(ctx.is_tensor, ctx.others, strict=True)
    ]
    return arguments, tensors[count:]


def plus(a: Optional, b: Optional) -> Optional:
    """Return a sum; None is 0."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def minus(a: Optional, b: Optional) -> Optional:
    """Return a difference; None is 0."""
    return a if b is None else plus(a, -b)


def times(a: Optional, b: Optional) -> Optional:
    """Return a product; None is 0."""
    return None if a is None or b is None else a * b
