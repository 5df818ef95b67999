"""What random features ask of their arguments."""

from __future__ import annotations

from typing import NamedTuple

from subquad._dispatch import Array, Backend, backend_for, not_an_array
from subquad._validation.common import (
    check_broadcast,
    check_flag,
    check_size,
    common_floats,
    is_unknown,
    wrong_rank,
)


class FeatureArguments(NamedTuple):
    """What the primitives of random features take, in their order.

    Attributes
    ----------
    backend : Backend
    arrays : tuple
        x, projection, bias, diagonal, factor, shift and linear; of diagonal and factor
        one at most.
    batch : tuple
        What their batch dimensions broadcast to.
    """

    backend: Backend
    arrays: tuple[
        Array,
        Array,
        Array,
        Array | None,
        Array | None,
        Array | None,
        Array | None,
    ]
    batch: tuple[int, ...]


def feature_arguments(
    x: Array,
    projection: Array,
    bias: Array,
    quadratic: Array | None,
    shift: Array | None,
    linear: Array | None,
    antithetic: bool = False,
) -> FeatureArguments:
    """Check the arguments of `log_features` and `trigonometric_features`."""
    check_flag("antithetic", antithetic)
    for name, array in (("x", x), ("projection", projection), ("bias", bias)):
        if array is None:
            raise not_an_array(name, None)
    backend = backend_for(
        x=x,
        projection=projection,
        bias=bias,
        quadratic=quadratic,
        shift=shift,
        linear=linear,
    )
    names = ("x", "projection", "bias", "quadratic", "shift", "linear")
    x, projection, bias, quadratic, shift, linear = common_floats(
        names, (x, projection, bias, quadratic, shift, linear), n_halves=1
    )
    if len(x.shape) < 2:
        raise wrong_rank("x", "(..., n, d)", x.shape)
    d = x.shape[-1]
    if len(projection.shape) < 2:
        raise wrong_rank("projection", "(..., m, d)", projection.shape)
    check_size("projection", "(..., m, d)", "d", d, projection.shape, -1)
    if len(bias.shape) < 1:
        raise wrong_rank("bias", "(..., m)", bias.shape)
    check_size("bias", "(..., m)", "m", projection.shape[-2], bias.shape, -1)
    batches = [x.shape[:-2], projection.shape[:-2], bias.shape[:-1]]
    is_factor = _is_factor(quadratic, projection)
    if quadratic is None:
        batches.append(())
    else:
        layout = "(..., r, d)" if is_factor else "(..., d)"
        check_size("quadratic", layout, "d", d, quadratic.shape, -1)
        batches.append(quadratic.shape[: -2 if is_factor else -1])
    for name, array in (("shift", shift), ("linear", linear)):
        if array is None:
            batches.append(())
            continue
        if len(array.shape) < 1:
            raise wrong_rank(name, "(..., d)", array.shape)
        check_size(name, "(..., d)", "d", d, array.shape, -1)
        batches.append(array.shape[:-1])
    batch = check_broadcast(names, batches)
    diagonal, factor = (None, quadratic) if is_factor else (quadratic, None)
    return FeatureArguments(
        backend, (x, projection, bias, diagonal, factor, shift, linear), batch
    )


def _is_factor(quadratic: Array | None, projection: Array) -> bool:
    """Return whether a form is given by a factor; else by its diagonal, or not at all.

    A factor has as many dimensions as the projection, a diagonal one fewer.
    """
    if quadratic is None:
        return False
    ndim, expected = len(quadratic.shape), len(projection.shape)
    if ndim in (expected, expected - 1):
        return ndim == expected
    message = (
        f"quadratic must have {expected - 1} dimensions, the diagonal (..., d) of a "
        f"form, or {expected}, a factor (..., r, d) of one, next to a projection of "
        f"{expected} dimensions; got shape {tuple(quadratic.shape)}"
    )
    raise ValueError(message)


def hadamard_transform_arguments(x: Array) -> tuple[Backend, Array]:
    """Return backend and x for `hadamard_transform`."""
    if x is None:
        raise not_an_array("x", None)
    backend = backend_for(x=x)
    (x,) = common_floats(("x",), (x,))
    if len(x.shape) < 1:
        raise wrong_rank("x", "(..., d)", x.shape)
    d = x.shape[-1]
    if is_unknown(d) or d < 1 or int(d) & (int(d) - 1):
        message = (
            "x must have shape (..., d) with d a power of two, got "
            f"d = {d}: shape {tuple(x.shape)}"
        )
        raise ValueError(message)
    return backend, x
