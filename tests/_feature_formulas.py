"""Random features by their formulas in extended precision, with bounds on rounding.

Write u for half the machine epsilon. Every term of a logarithm is a product of at most
four factors, one of them z = x - shift with an error of u, and what is summed of it has
d addends, or r sums of d where a factor is squared. A logarithm joins four such terms
and the bias. So its error is at most (2 d + r + 10) u times the sum of all addends'
sizes, to first order. In gradients a sum over features or over rows comes on top.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from _oracle import LONG, epsilon, gamma


class Case(NamedTuple):
    """Arguments in the order of the primitives; of diagonal and factor one at most."""

    x: np.ndarray
    projection: np.ndarray
    bias: np.ndarray
    diagonal: np.ndarray | None = None
    factor: np.ndarray | None = None
    shift: np.ndarray | None = None
    linear: np.ndarray | None = None

    @property
    def quadratic(self):
        return self.diagonal if self.factor is None else self.factor

    def call(self, function, convert=lambda a: a, *before, **options):
        """Call a public function with converted arrays."""
        quadratic = None if self.quadratic is None else convert(self.quadratic)
        for name in ("shift", "linear"):
            if getattr(self, name) is not None:
                options[name] = convert(getattr(self, name))
        arrays = map(convert, (*before, *self[:3]))
        return function(*arrays, quadratic, **options)

    @property
    def dtype(self):
        return self.projection.dtype


# What of the optional arguments is given.
FORMS = {
    "none": (),
    "diagonal": ("diagonal",),
    "factor": ("factor",),
    "shift": ("shift",),
    "all with diagonal": ("diagonal", "shift", "linear"),
    "all with factor": ("factor", "shift", "linear"),
}


def case(form="none", *, n=7, m=5, d=4, r=3, bx=(), bp=(), dtype=np.float64, seed=0):
    """Arrays of ordinary size; bx are the batch dimensions of x, bp of all else."""
    rng = np.random.default_rng(seed)
    given = FORMS[form]

    def normal(*shape):
        return (rng.standard_normal(shape) / max(d, 1) ** 0.25).astype(dtype)

    x, projection, bias = normal(*bx, n, d), normal(*bp, m, d), normal(*bp, m)
    found = {"diagonal": normal(*bp, d) ** 2, "factor": normal(*bp, r, d)}
    found |= {"shift": normal(*bp, d), "linear": normal(*bp, d)}
    return Case(x, projection, bias, **{name: found[name] for name in given})


def _wide(arrays):
    return [None if a is None else np.asarray(a, LONG) for a in arrays]


def _sizes(*arrays):
    return [None if a is None else np.abs(a) for a in arrays]


def _turned(a):
    return np.swapaxes(a, -1, -2)


def _terms(arrays, size):
    """Products, biases and the row's term; of all addends the sizes if asked."""
    x, projection, bias, diagonal, factor, shift, linear = _wide(arrays)
    z = x if shift is None else x - shift[..., None, :]
    minus = LONG(1 if size else -1)
    if size:
        z, projection, bias, diagonal, factor, linear = _sizes(
            z, projection, bias, diagonal, factor, linear
        )
    row = np.zeros((*z.shape[:-1], 1), LONG)
    if diagonal is not None:
        row = row + minus * (z * z) @ diagonal[..., :, None] / 2
    if factor is not None:
        row = row + minus * ((z @ _turned(factor)) ** 2).sum(-1, keepdims=True) / 2
    if linear is not None:
        row = row + z @ linear[..., :, None]
    return z @ _turned(projection), bias[..., None, :], row


def _error(case, more=0):
    d = case.x.shape[-1]
    r = 0 if case.factor is None else case.factor.shape[-2]
    return gamma(2 * d + r + 10 + more, case.dtype)


def log_features(case, antithetic=False):
    """The logarithms, and bounds on their errors in the type of the case."""
    with np.errstate(all="ignore"):
        products, bias, row = _terms(case, size=False)
        sizes = sum(_terms(case, size=True))
        out = products + bias + row
        if antithetic:
            out = np.concatenate([out, -products + bias + row], axis=-1)
            sizes = np.concatenate([sizes, sizes], axis=-1)
        bound = _error(case) * sizes
    return out, np.where(np.isfinite(bound), bound, 0).astype(float)


def exponentials(case, antithetic=False):
    """The features themselves: exp adds its own error of a few ulp."""
    out, bound = log_features(case, antithetic)
    value = np.exp(out)
    return value, (value * (np.expm1(bound) + 4 * epsilon(case.dtype))).astype(float)


def trigonometric_features(case):
    """The features, whose angles and scales are wrong as logarithms are."""
    angles, bias, row = _terms(case, size=False)
    sizes = sum(_terms(case, size=True))
    scales = np.exp(bias + row)
    out = np.concatenate([scales * np.cos(angles), scales * np.sin(angles)], axis=-1)
    with np.errstate(invalid="ignore"):
        error = 2 * _error(case) * sizes + 8 * epsilon(case.dtype)
        bound = np.where(scales == 0, 0, scales * error)
    return out, np.concatenate([bound, bound], axis=-1).astype(float)


def log_features_vjp(grad, case, antithetic=False):
    """The gradients of what is given, and bounds, over the whole batch: two lists."""
    grad = np.asarray(grad, LONG)
    values = _gradients(grad, case, antithetic, size=False)
    sizes = _gradients(np.abs(grad), case, antithetic, size=True)
    (n, d), m = case.x.shape[-2:], case.projection.shape[-2]
    # A shift's sums over rows, features and dimensions are in one another.
    error = _error(case, more=n + 2 * m + d)
    return values, [None if s is None else (error * s).astype(float) for s in sizes]


def _gradients(grad, case, antithetic, size):
    x, projection, _, diagonal, factor, shift, linear = _wide(case)
    z = x if shift is None else x - shift[..., None, :]
    minus = LONG(1 if size else -1)
    if size:
        z, projection, diagonal, factor, linear = _sizes(
            z, projection, diagonal, factor, linear
        )
    total = grad.sum(-1, keepdims=True)
    signed = unsigned = grad
    if antithetic:
        first, second = np.split(grad, 2, axis=-1)
        signed, unsigned = first + minus * second, first + second
    slope = np.zeros_like(z)
    if diagonal is not None:
        slope = slope + minus * z * diagonal[..., None, :]
    if factor is not None:
        slope = slope + minus * (z @ _turned(factor)) @ factor
    if linear is not None:
        slope = slope + linear[..., None, :]
    gx = signed @ projection + total * slope
    found = [gx, _turned(signed) @ z, unsigned.sum(-2), None, None, None, None]
    if diagonal is not None:
        found[3] = minus * (total * z * z).sum(-2) / 2
    if factor is not None:
        found[4] = minus * _turned(total * (z @ _turned(factor))) @ z
    if shift is not None:
        found[5] = minus * gx.sum(-2)
    if linear is not None:
        found[6] = (total * z).sum(-2)
    return found


def public(gradients):
    """Gradients in the order of `vjp.log_features`, those that are given."""
    gx, projection, bias, diagonal, factor, shift, linear = gradients
    found = (gx, projection, bias, factor if diagonal is None else diagonal)
    return [a for a in (*found, shift, linear) if a is not None]


def hadamard_transform(x):
    """The transform by its matrix, and a bound: log d sums of two terms."""
    x = np.asarray(x)
    d = x.shape[-1]
    index = np.arange(d)
    signs = 1 - 2 * (np.bitwise_count(index[:, None] & index) % 2).astype(int)
    out = x.astype(LONG) @ signs.astype(LONG)
    sizes = np.abs(x).astype(LONG).sum(-1, keepdims=True)
    error = gamma(max(d.bit_length() - 1, 0), x.dtype)
    return out, np.broadcast_to(error * sizes, out.shape).astype(float)
