"""One step of an embedding from its definition, in extended precision.

The matrix is dense here, and tangents are taken of the row's direction, whatever its
length. Beside every value stands a bound on its rounding error. A dot product of d
terms is wrong by gamma(d) of the sum of its terms' sizes, and what is made of wrong
numbers by these errors times the sizes of what they meet: so the sizes of all terms
pass through the same formulas as the terms.

Of the tangent g' = g - (g.x) x a projection may err by gamma(d) |g| more, as may the
length of x, which is rounded itself: each error e of g' turns its direction by at most
2 |e| / |g'|. The bounds of a row's numbers are therefore bounds of its length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from _oracle import LONG, _perturbed, epsilon, gamma, logsumexp

FORMS = (
    "links",
    "rows",
    "components",
    "own",
    "null",
    "all with links",
    "all with rows",
)


class Case(NamedTuple):
    """The arguments of a step, all but its size."""

    x: Any
    matrix: Any
    rows: Any
    scale: float
    components: Any
    own: Any
    null: Any

    def map(self, change) -> Case:
        """Return a case whose arrays are changed."""

        def changed(value):
            if isinstance(value, tuple):
                return tuple(changed(part) for part in value)
            return change(value) if isinstance(value, np.ndarray) else value

        return Case(*(changed(value) for value in self))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def case(
    form, n=13, m=9, d=5, k=3, c=3, dtype=np.float64, index=np.int64, seed=0
) -> Case:
    """A case of ordinary size: a component, a label and some rows are empty."""
    rng = np.random.default_rng(seed)
    every = form.startswith("all")

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    def symmetric(count):
        factors = rng.standard_normal((count, d, d)) / d**0.5
        return (factors @ np.swapaxes(factors, 1, 2)).astype(dtype)

    matrix, height = None, n
    if form != "rows" and not form.endswith("with rows"):
        height = m
        lengths = rng.integers(0, 6, n)
        lengths[: n // 3 : 2] = 0
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(index)
        indices = rng.integers(0, m, lengths.sum()).astype(index)
        matrix = (normal(len(indices)), indices, indptr)
    components = own = null = None
    if every or form == "components":
        counts = normal(k)
        if k > 1:
            counts[1] = -np.inf
        components = (counts, normal(k, d), symmetric(k))
    if every or form == "own":
        labels = rng.integers(0, c, n)
        labels[labels == c // 2] = 0
        own = (labels, normal(c, d), symmetric(c))
    if every or form == "null":
        null = (normal(n), normal(d))
    x = unit(rng.standard_normal((n, d))).astype(dtype)
    return Case(x, matrix, normal(height, d), 0.75, components, own, null)


def dense(matrix, m, number=LONG):
    """The matrix, and how many entries of a row there are."""
    data, indices, indptr = matrix
    lengths = np.diff(indptr)
    out = np.zeros((len(lengths), m), number)
    np.add.at(out, (np.repeat(np.arange(len(lengths)), lengths), indices), data)
    return out, lengths


class Gradient(NamedTuple):
    """A step's gradient and what comes with it, each with its bound."""

    gradient: tuple[np.ndarray, np.ndarray]
    attraction: tuple[np.ndarray, np.ndarray]
    log_z: tuple[np.ndarray, np.ndarray] | None


def gradient(given: Case) -> Gradient:
    dtype = given.x.dtype
    u = epsilon(dtype) / 2
    x, rows = given.x.astype(LONG), given.rows.astype(LONG)
    d = x.shape[1]
    size_x = np.abs(x)

    if given.matrix is None:
        pull = given.scale * rows
        pull_size, lengths = np.abs(pull), np.zeros(len(x), int)
    else:
        weights, lengths = dense(given.matrix, len(rows))
        data, *where = given.matrix
        sizes, _ = dense((np.abs(data), *where), len(rows))
        pull = given.scale * (weights @ rows)
        pull_size = abs(given.scale) * (sizes @ np.abs(rows))
    # Products, their sum, and the scale, which is rounded as well.
    grown = np.array([gamma(length + 3, dtype) for length in lengths])
    pull_error = grown[:, None] * pull_size
    attraction = (x * pull).sum(1)
    attraction_error = (size_x * (pull_error + gamma(d, dtype) * pull_size)).sum(1)

    total, error, terms, log_z = -pull, pull_error, np.abs(pull), None
    if given.components is not None:
        push, push_error, log_z = _push(x, given.components, dtype)
        total, error, terms = total + push, error + push_error, terms + np.abs(push)
    if given.own is not None:
        labels, shifts, slopes = given.own
        shifts, slopes = shifts.astype(LONG)[labels], slopes.astype(LONG)[labels]
        found = shifts + np.einsum("nd,nde->ne", x, slopes)
        size = np.abs(shifts) + np.einsum("nd,nde->ne", size_x, np.abs(slopes))
        error = error + gamma(d + 1, dtype) * size
        total, terms = total + found, terms + np.abs(found)
    if given.null is not None:
        weights, vector = (array.astype(LONG) for array in given.null)
        found = weights[:, None] * vector
        error = error + u * np.abs(found)
        total, terms = total + found, terms + np.abs(found)
    error = error + 3 * u * terms
    return Gradient((total, error), (attraction, attraction_error), log_z)


def _push(x, components, dtype):
    """The gradient of log Z, its bound, and log Z with its own."""
    u = epsilon(dtype) / 2
    log_counts, means, covariances = (array.astype(LONG) for array in components)
    present = log_counts > -np.inf
    log_counts, means = log_counts[present], means[present]
    covariances = covariances[present]
    k, d = means.shape
    size_x = np.abs(x)

    slopes = np.einsum("nd,kde->nke", x, covariances)
    slope_sizes = np.einsum("nd,kde->nke", size_x, np.abs(covariances))
    mean, mean_size = x @ means.T, size_x @ np.abs(means).T
    half = np.einsum("nd,nkd->nk", x, slopes) / 2
    half_size = np.einsum("nd,nkd->nk", size_x, slope_sizes) / 2
    scores = log_counts + mean + half
    wrong = gamma(d + 3, dtype) * mean_size + gamma(2 * d + 3, dtype) * half_size
    wrong = wrong + 3 * u * (np.abs(log_counts) + np.abs(scores))
    log_z = logsumexp(scores)
    # As `_oracle.log_normalizer_tolerance` has it.
    z_error = _perturbed(scores, wrong) + epsilon(dtype) * (16 + 2 * np.abs(log_z))

    weights = np.exp(scores - log_z[:, None])
    change = wrong + z_error[:, None] + epsilon(dtype) * 8
    relative = np.expm1(change) + gamma(d + k + 2, dtype)
    vectors = means[None] + slopes
    push = np.einsum("nk,nkd->nd", weights, vectors)
    sizes = np.abs(means)[None] + slope_sizes
    error = np.einsum("nk,nkd->nd", relative * weights, sizes)
    return push, error, (log_z, z_error)


def step_from(given: Case, found: Gradient, step: float):
    """The rows after a step, with the bound of each one's error."""
    dtype = given.x.dtype
    d = given.x.shape[1]
    x = unit(given.x.astype(LONG))
    total, error = found.gradient
    # What is left along x after one subtraction is rounding of long doubles alone.
    scale = np.max(np.abs(total), axis=1, keepdims=True, initial=0)
    scale = np.where(scale == 0, 1, scale)
    total, error = total / scale, error / scale
    tangent = total - (total * x).sum(1, keepdims=True) * x
    tangent = tangent - (tangent * x).sum(1, keepdims=True) * x
    length = np.linalg.norm(tangent, axis=1)
    turned = np.sqrt(LONG(1) - LONG(step) ** 2) * x
    turned = turned - step * tangent / np.where(length == 0, 1, length)[:, None]
    turned = turned / np.linalg.norm(turned, axis=1, keepdims=True)

    wrong = np.linalg.norm(error, axis=1)
    wrong = wrong + 3 * gamma(d + 4, dtype) * np.linalg.norm(total, axis=1)
    direction = 2 * wrong / np.where(length == 0, 1, length) + gamma(d + 4, dtype)
    bound = step * direction + 2 * gamma(d + 4, dtype)
    return np.where((length == 0)[:, None], x, turned), bound


def expected(given: Case, step: float):
    """All results of a step: (out, bound), (attraction, bound), (log_z, bound)."""
    with np.errstate(all="ignore"):
        found = gradient(given)
        out, bound = step_from(given, found, step)
    return (out, bound[:, None]), found.attraction, found.log_z
