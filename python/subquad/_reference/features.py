"""Random features in array-API code: primitives of `subquad._dispatch.Backend`.

With z = x - shift, a row's term q = z·linear - ½ (Σ_d diagonal_d z²_d + |factor z|²)
belongs to all features, and bias_m to one. With `antithetic` a row of the projection
serves twice, as it is and negated.
"""

from __future__ import annotations

from typing import NamedTuple

from subquad._dispatch import Array, FeatureGradients, Namespace, namespace_of
from subquad._reference._common import primitive, sum_to


@primitive
def log_features(
    x: Array,
    projection: Array,
    bias: Array,
    diagonal: Array | None,
    factor: Array | None,
    shift: Array | None,
    linear: Array | None,
    antithetic: bool,
    exponentiate: bool,
) -> Array:
    """See `subquad.log_features`: z·projection_m + bias_m + q, exp of it if asked."""
    xp = namespace_of(x)
    z = _shifted(xp, x, projection, shift)
    products = z @ xp.matrix_transpose(projection)
    if antithetic:
        products = xp.concat([products, -products], axis=-1)
        bias = xp.concat([bias, bias], axis=-1)
    out = products + bias[..., None, :]
    term = _row_term(xp, z, diagonal, factor, linear)
    if term is not None:
        out = out + term
    return xp.exp(out) if exponentiate else out


@primitive
def trigonometric_features(
    x: Array,
    projection: Array,
    bias: Array,
    diagonal: Array | None,
    factor: Array | None,
    shift: Array | None,
    linear: Array | None,
) -> Array:
    """See `subquad.trigonometric_features`: exp(bias_m + q) times the cosines, and then
    the sines, of z·projection_m.
    """
    xp = namespace_of(x)
    z = _shifted(xp, x, projection, shift)
    angles = z @ xp.matrix_transpose(projection)
    scales = bias[..., None, :]
    term = _row_term(xp, z, diagonal, factor, linear)
    if term is not None:
        scales = scales + term
    scales = xp.exp(scales)
    return xp.concat([scales * xp.cos(angles), scales * xp.sin(angles)], axis=-1)


@primitive
def log_features_vjp(
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
) -> FeatureGradients:
    """See `subquad.vjp.log_features`."""
    xp = namespace_of(x)
    gx = None
    if needs[0]:
        gx = gradient_of_rows(
            grad, x, projection, diagonal, factor, shift, linear, antithetic
        )
        gx = sum_to(xp, gx, x.shape)
    parameters = (projection, bias, diagonal, factor, shift, linear)
    return gx, *gradients_of_parameters(grad, x, *parameters, antithetic, needs[1:])


@primitive
def gradient_of_rows(
    grad: Array,
    x: Array,
    projection: Array,
    diagonal: Array | None,
    factor: Array | None,
    shift: Array | None,
    linear: Array | None,
    antithetic: bool,
) -> Array:
    """Return the gradient of x over all batches that the arrays broadcast to.

    With gᵢ the sum of a row of `grad`, and h that of pairs with their signs:
    gxᵢ = Σ_m h_im projection_m + gᵢ (linear - diagonal zᵢ - factorᵀ factor zᵢ).
    """
    xp = namespace_of(x)
    sums = _sums(xp, grad, antithetic)
    z = _shifted(xp, x, projection, shift)
    slope = _slope(xp, z, diagonal, factor, linear)
    through_products = sums.signed @ projection
    return through_products if slope is None else through_products + sums.rows * slope


@primitive
def gradients_of_parameters(
    grad: Array,
    x: Array,
    projection: Array,
    bias: Array,
    diagonal: Array | None,
    factor: Array | None,
    shift: Array | None,
    linear: Array | None,
    antithetic: bool,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[
    Array | None, Array | None, Array | None, Array | None, Array | None, Array | None
]:
    """Return the gradients of all arrays but x, each in its array's shape.

    With g and h as in `gradient_of_rows`: Σᵢ h_im zᵢ in the projection, the sum of
    `grad` in the bias, -½ Σᵢ gᵢ zᵢ² in the diagonal, -Σᵢ gᵢ (factor zᵢ) zᵢᵀ in the
    factor, Σᵢ gᵢ zᵢ in `linear`; in the shift minus the sum of x's.
    """
    if not any(needs):
        return (None,) * 6
    xp = namespace_of(x)
    z = _shifted(xp, x, projection, shift)
    sums = _sums(xp, grad, antithetic)
    rows = xp.matrix_transpose(sums.rows)

    gradients: list[Array | None] = [None] * 6
    if needs[0]:
        gradients[0] = xp.matrix_transpose(sums.signed) @ z
    if needs[1]:
        gradients[1] = xp.sum(sums.unsigned, axis=-2)
    if needs[2] and diagonal is not None:
        gradients[2] = -0.5 * (rows @ (z * z))[..., 0, :]
    if needs[3] and factor is not None:
        weighted = sums.rows * (z @ xp.matrix_transpose(factor))
        gradients[3] = -(xp.matrix_transpose(weighted) @ z)
    if needs[4] and shift is not None:
        # The sum of the rows' gradients: these are linear in what is summed here.
        moved = xp.sum(sums.signed, axis=-2, keepdims=True) @ projection
        slope = _slope(xp, rows @ z, diagonal, factor, None)
        if slope is not None:
            moved = moved + slope
        if linear is not None:
            total = xp.sum(sums.rows, axis=-2, keepdims=True)
            moved = moved + total * linear[..., None, :]
        gradients[4] = -moved[..., 0, :]
    if needs[5] and linear is not None:
        gradients[5] = (rows @ z)[..., 0, :]
    found = tuple(
        None if gradient is None or array is None else sum_to(xp, gradient, array.shape)
        for gradient, array in zip(
            gradients, (projection, bias, diagonal, factor, shift, linear), strict=True
        )
    )
    return found  # type: ignore[return-value]


@primitive
def hadamard_transform(x: Array) -> Array:
    """See `subquad.hadamard_transform`: log₂ d steps of sums and differences."""
    xp = namespace_of(x)
    *batch, d = x.shape
    out = xp.astype(x, x.dtype, copy=True)
    width = 1
    while width < d:
        pairs = xp.reshape(out, (*batch, d // (2 * width), 2, width))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        out = xp.stack([first + second, first - second], axis=-2)
        width *= 2
    return xp.reshape(out, (*batch, d))


class _Sums(NamedTuple):
    """What the gradients take of the derivatives in the features.

    Attributes
    ----------
    signed : array of shape (..., n, m)
        By row of the projection: of a pair the difference.
    unsigned : array of shape (..., n, m)
        By entry of the bias: of a pair the sum.
    rows : array of shape (..., n, 1)
        Over all features.
    """

    signed: Array
    unsigned: Array
    rows: Array


def _sums(xp: Namespace, grad: Array, antithetic: bool) -> _Sums:
    signed = unsigned = grad
    if antithetic:
        m = grad.shape[-1] // 2
        positive, negative = grad[..., :m], grad[..., m:]
        signed, unsigned = positive - negative, positive + negative
    return _Sums(signed, unsigned, xp.sum(grad, axis=-1, keepdims=True))


def _shifted(xp: Namespace, x: Array, like: Array, shift: Array | None) -> Array:
    """Return x - shift in the type of the parameters."""
    if x.dtype != like.dtype:
        x = xp.astype(x, like.dtype)
    return x if shift is None else x - shift[..., None, :]


def _row_term(
    xp: Namespace,
    z: Array,
    diagonal: Array | None,
    factor: Array | None,
    linear: Array | None,
) -> Array | None:
    """Return what each row adds to all of its features, (..., n, 1); None for 0."""
    terms = []
    if diagonal is not None:
        terms.append(-0.5 * ((z * z) @ diagonal[..., :, None]))
    if factor is not None:
        projected = z @ xp.matrix_transpose(factor)
        terms.append(-0.5 * xp.sum(projected * projected, axis=-1, keepdims=True))
    if linear is not None:
        terms.append(z @ linear[..., :, None])
    return sum(terms[1:], start=terms[0]) if terms else None


def _slope(
    xp: Namespace,
    z: Array,
    diagonal: Array | None,
    factor: Array | None,
    linear: Array | None,
) -> Array | None:
    """Return the derivative of `_row_term` in z; None for 0."""
    terms = []
    if diagonal is not None:
        terms.append(-(z * diagonal[..., None, :]))
    if factor is not None:
        terms.append(-((z @ xp.matrix_transpose(factor)) @ factor))
    if linear is not None:
        terms.append(linear[..., None, :])
    return sum(terms[1:], start=terms[0]) if terms else None
