"""Products of sparse factors from their definition, in extended precision.

The row of every term is found one by one; a transpose scatters where the library
gathers. Beside every value stands a bound on its rounding error: with the sizes of all
terms in the place of the terms, a chain of M factors of K terms each is wrong by at
most gamma(M (K + 2)) of what it gives.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from _oracle import LONG, gamma

RESIDUALS = ("none", "step", "input")


def chord(n_links):
    return tuple([0, *(2**k for k in range(n_links - 1))][:n_links])


def cdil(kernel_size, factor):
    half = (kernel_size - 1) // 2
    steps = [0, *range(1, half + 1), *(-step for step in range(1, half + 1))]
    return tuple(step * 2**factor for step in steps)


def runs(n, segments=None):
    """First row and length of the sequence that each row is in."""
    ids = np.zeros(n) if segments is None else np.asarray(segments)
    found, start = [], 0
    while start < n:
        stop = start
        while stop < n and ids[stop] == ids[start]:
            stop += 1
        found += [(start, stop - start)] * (stop - start)
        start = stop
    return tuple(found)


@functools.lru_cache(maxsize=512)
def places(sequences, row, circular):
    """The row of every term, and whether there is one: two arrays (n, K)."""
    place = np.zeros((len(sequences), len(row)), int)
    inside = np.ones(place.shape, bool)
    for i, (start, length) in enumerate(sequences):
        for k, offset in enumerate(row):
            j = i - start + offset
            if circular:
                j %= length
            elif not 0 <= j < length:
                inside[i, k], j = False, 0
            place[i, k] = start + j
    return place, inside


def apply(values, v, where):
    place, inside = where
    terms = np.where(inside[..., None], values[..., None] * v[..., place, :], 0)
    return terms.sum(-2)


def apply_transposed(values, v, where):
    place, inside = where
    shape = np.broadcast_shapes(values.shape[:-2], v.shape[:-2])
    out = np.zeros((*shape, *v.shape[-2:]), v.dtype)
    rows_first = np.moveaxis(out, -2, 0)
    for k in range(place.shape[1]):
        rows = np.nonzero(inside[:, k])[0]
        terms = values[..., rows, k, None] * v[..., rows, :]
        np.add.at(rows_first, place[rows, k], np.moveaxis(terms, -2, 0))
    return out


class Chain:
    """A product of factors; `offsets` has a row for each, and so has `values`."""

    def __init__(
        self,
        values,
        x,
        offsets,
        *,
        residual="none",
        circular=True,
        transpose=False,
        segments=None,
    ):
        self.dtype = np.result_type(x, *values)
        self.values = [np.asarray(a, LONG) for a in values]
        self.x = np.asarray(x, LONG)
        self.residual, self.transpose = residual, transpose
        sequences = runs(x.shape[-2], segments)
        self.where = [places(sequences, tuple(row), circular) for row in offsets]
        terms = sum(a.shape[-1] + 2 for a in self.values)
        self.error = functools.partial(self._error, terms)

    def _error(self, terms, more=0):
        return gamma(terms + more, self.dtype)

    def _steps(self, values, v):
        steps, first = [v], v
        for factor, where in zip(values, self.where, strict=True):
            v = apply(factor, steps[-1], where)
            if self.residual != "none":
                v = v + (first if self.residual == "input" else steps[-1])
            steps.append(v)
        return steps

    def _back(self, values, g):
        """The gradients of v_M … v_0, and that of x."""
        found, passed = [g], np.zeros_like(g)
        for factor, where in zip(values[::-1], self.where[::-1], strict=True):
            passed = passed + g
            moved = apply_transposed(factor, g, where)
            g = moved + g if self.residual == "step" else moved
            found.append(g)
        return found, g + passed if self.residual == "input" else g

    def _map(self, values, v):
        return (
            self._back(values, v)[1] if self.transpose else self._steps(values, v)[-1]
        )

    def _stretched(self, array):
        batch = np.broadcast_shapes(
            *(a.shape[:-2] for a in self.values), self.x.shape[:-2]
        )
        return np.broadcast_to(array, (*batch, *array.shape[-2:]))

    def product(self):
        """The product and a bound on its error."""
        sizes = [np.abs(a) for a in self.values]
        with np.errstate(invalid="ignore"):
            out = self._map(self.values, self._stretched(self.x))
            size = self._map(sizes, self._stretched(np.abs(self.x)))
            return out, _finite(self.error() * size)

    def intermediates(self):
        """What precedes all factors but the first, and bounds."""
        sizes = [np.abs(a) for a in self.values]
        steps = self._steps(self.values, self._stretched(self.x))[1:-1]
        bounds = self._steps(sizes, self._stretched(np.abs(self.x)))[1:-1]
        return np.stack(steps, -3), _finite(self.error() * np.stack(bounds, -3))

    def gradients(self, grad):
        """Those of all values and of x over the whole batch, and bounds."""
        sizes = [np.abs(a) for a in self.values]
        with np.errstate(invalid="ignore"):
            found = self._gradients(self.values, self.x, np.asarray(grad, LONG))
            bounds = self._gradients(sizes, np.abs(self.x), np.abs(LONG(1) * grad))
            # Both factors of a product are chains themselves.
            error = self.error(more=grad.shape[-1] + 2)
            return found, [_finite(error * bound) for bound in bounds]

    def _gradients(self, values, x, grad):
        x = self._stretched(x)
        if self.transpose:
            # Of <grad, Aᵀ x> = <A grad, x>: what A is applied to, and its gradient.
            before, after, gx = grad, x, self._steps(values, grad)[-1]
        else:
            before, after, gx = x, grad, self._back(values, grad)[1]
        steps = self._steps(values, before)
        grads = self._back(values, after)[0][::-1]
        found = []
        for m, (place, inside) in enumerate(self.where):
            dots = (grads[m + 1][..., :, None, :] * steps[m][..., place, :]).sum(-1)
            found.append(np.where(inside, dots, 0))
        return [*found, gx]


def _finite(bound):
    return np.where(np.isfinite(bound), bound, 0).astype(float)


def matrix(values, row, *, circular=True, segments=None):
    """One factor (n, K) as a dense matrix."""
    n = values.shape[0]
    place, inside = places(runs(n, segments), tuple(row), circular)
    out = np.zeros((n, n), LONG)
    for i in range(n):
        for k in range(len(row)):
            if inside[i, k]:
                out[i, place[i, k]] += values[i, k]
    return out


def dense(matrices, residual):
    """The matrix of a chain."""
    identity = np.eye(len(matrices[0]), dtype=LONG)
    out = identity
    for factor in matrices:
        added = {"none": 0, "step": out, "input": identity}[residual]
        out = factor @ out + added
    return out


# ------------------------------------------------------------------------- networks

_ERF = np.vectorize(math.erf, otypes=[float])


def erf(z):
    """To the accuracy of a double."""
    return _ERF(np.asarray(z, float)) if np.size(z) else np.zeros(np.shape(z))


def gelu(z):
    return z * (1 + erf(z / math.sqrt(2))) / 2


def gelu_slope(z):
    density = np.exp(-(np.asarray(z, float) ** 2) / 2) / math.sqrt(2 * math.pi)
    return (1 + erf(z / math.sqrt(2))) / 2 + z * density


def turned(a):
    return np.swapaxes(a, -1, -2)


class Networks:
    """The values that networks make, in double precision, and bounds on errors.

    What goes into an activation is wrong by gamma(d + 1) of the sizes of its terms; the
    activation has a slope of at most 1.13, and adds a few roundings of its own size. In
    double precision this oracle itself is wrong as much: hence the factor 2.
    """

    def __init__(self, x, weights):
        self.dtype = np.result_type(x, *weights)
        self.x = np.asarray(x, float)[..., None, :, :]
        self.weight_in, self.bias_in, self.weight_out, self.bias_out = (
            np.asarray(a, float) for a in weights
        )
        self.z = self.x @ turned(self.weight_in) + self.bias_in[..., None, :]
        self.size = (
            np.abs(self.x) @ turned(np.abs(self.weight_in))
            + np.abs(self.bias_in)[..., None, :]
        )

    def _gamma(self, terms):
        return 2 * gamma(terms, self.dtype)

    def values(self):
        d, h = self.weight_in.shape[-1], self.weight_in.shape[-2]
        out = gelu(self.z) @ turned(self.weight_out) + self.bias_out[..., None, :]
        # The size of an activation is at most that of what goes into it.
        sizes = self.size @ turned(np.abs(self.weight_out))
        sizes = sizes + np.abs(self.bias_out)[..., None, :]
        return out, self._gamma(2 * d + h + 16) * sizes

    def gradients(self, grad):
        """Those of x and of the weights over the whole batch, and bounds."""
        grad = np.asarray(grad, float)
        n, (h, d) = self.x.shape[-2], self.weight_in.shape[-2:]
        k = self.weight_out.shape[-2]
        activated, slope = gelu(self.z), gelu_slope(self.z)
        found = self._gradients(
            grad, self.x, self.weight_in, self.weight_out, activated, slope
        )
        # The slope changes by at most 0.8 with what goes into the activation.
        sizes = self._gradients(
            np.abs(grad),
            np.abs(self.x),
            np.abs(self.weight_in),
            np.abs(self.weight_out),
            self.size,
            1.13 + self.size,
        )
        error = self._gamma(2 * d + 2 * h + k + n + 32)
        n_factors = self.weight_in.shape[-3]
        return found, [(error + gamma(n_factors, self.dtype)) * s for s in sizes]

    @staticmethod
    def _gradients(grad, x, weight_in, weight_out, activated, slope):
        through = (grad @ weight_out) * slope
        return [
            (through @ weight_in).sum(-3),
            turned(through) @ x,
            through.sum(-2),
            turned(grad) @ activated,
            grad.sum(-2),
        ]


def csr_dense(data, indices, indptr, n_columns):
    """A sparse matrix as a dense one."""
    out = np.zeros((len(indptr) - 1, n_columns), LONG)
    for row in range(len(indptr) - 1):
        for e in range(indptr[row], indptr[row + 1]):
            out[row, indices[e]] += data[e]
    return out
