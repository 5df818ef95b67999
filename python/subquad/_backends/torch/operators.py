"""Operators of torch: what all of them need to carry derivatives, vmap and shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from subquad._backends.torch.memory import Optional, wide

OPERATORS = torch.library.Library("subquad", "DEF")
registered: Any = torch.ops.subquad


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

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, int]:
        dims = flat_dims(in_dims)
        if index is not None and dims[index] is not None:
            # All batches share one index.
            return torch.stack(
                one_by_one(operator, info.batch_size, dims, arguments)
            ), 0
        arrays = arguments[: len(cores)]
        rank = batch_rank(arrays, dims[: len(cores)], cores)
        moved = [
            padded(a, dim, core, rank, None)
            for a, dim, core in zip(arrays, dims, cores, strict=False)
        ]
        return operator(*moved, *arguments[len(cores) :]), 0

    return rule


def mapped_vjp(
    operator: Callable[..., Any],
    cores: Sequence[int],
    inputs: slice,
    index: int | None,
) -> Callable[..., Any]:
    """Return the vmap rule of a reverse: every gradient has the mapped dimension."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        *arrays, needs = arguments
        dims = flat_dims(in_dims)[: len(arrays)]
        size = info.batch_size
        out_dims = tuple(0 if needed else None for needed in needs)
        if index is not None and dims[index] is not None:
            parts = one_by_one(
                lambda *each: operator(*each, needs), size, dims, arrays
            )
            stacked = tuple(
                torch.stack(part) if needed else part[0]
                for part, needed in zip(zip(*parts, strict=True), needs, strict=True)
            )
            return stacked, out_dims
        batched = [i for i in range(len(arrays)) if i != index]
        rank = batch_rank(
            [arrays[i] for i in batched],
            [dims[i] for i in batched],
            [cores[i] for i in batched],
        )
        moved = list(arrays)
        shapes: list[tuple[int, ...] | None] = [None] * len(arrays)
        for i in batched:
            array, dim = arrays[i], dims[i]
            if array is None:
                continue
            shape = list(array.shape)
            if dim is not None:
                del shape[dim]
            shapes[i] = (size, *shape)
            moved[i] = padded(array, dim, cores[i], rank, size)
        found = operator(*moved, needs)
        gradients = tuple(
            g.reshape(shape) if needed and shape is not None else g
            for g, needed, shape in zip(found, needs, shapes[inputs], strict=True)
        )
        return gradients, out_dims

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
) -> Any:
    """Return a function that torch.func transforms, with the rules of an operator."""
    members = {
        "forward": operator,
        "setup_context": save,
        "backward": backward,
        "vmap": rule,
    }
    function: Any = type(
        "Transformable",
        (torch.autograd.Function,),
        {name: staticmethod(member) for name, member in members.items()},
    )
    return function.apply
