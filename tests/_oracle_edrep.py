"""EDRep from its definition, in extended precision.

P is dense, every cluster has a loop of its own, and the objective is evaluated as it is
written down, so that finite differences of it can tell whether a gradient is right.

Beside a gradient stands a bound on its rounding error: each entry is a sum of products,
and in the worst order a sum of c of them, each rounded, is wrong by c u times the sum
of their sizes (u half the machine epsilon), which is the same formula with the absolute
value of everything in it.
"""

from __future__ import annotations

import numpy as np

from _oracle import LONG, epsilon, logsumexp


def unit(rows):
    """Rows scaled to unit norm."""
    rows = np.asarray(rows, LONG)
    return rows / np.sqrt(np.sum(rows * rows, axis=-1, keepdims=True))


class Objective:
    """The loss of rows x and keys y; symmetric: `y` is to be `x` in every call."""

    def __init__(self, p, *, symmetric=True, null_weights=None, labels=None):
        self.p = np.asarray(p, LONG)
        self.n, self.m = self.p.shape
        self.symmetric = symmetric
        weights = np.ones(self.m) if null_weights is None else null_weights
        self.p0 = np.asarray(weights, LONG)
        self.f = self.p0 / np.sum(self.p0)
        self.labels = np.zeros(self.m, int) if labels is None else np.asarray(labels)

    def components(self, y):
        """Label, log of the share, mean and covariance of each cluster with keys."""
        for label in np.unique(self.labels):
            members = np.asarray(y, LONG)[self.labels == label]
            mean = np.sum(members, axis=0) / len(members)
            apart = members - mean
            covariance = apart.T @ apart / len(members)
            yield label, np.log(LONG(len(members)) / self.m), mean, covariance

    def scores(self, x, y):
        return np.stack(
            [
                log_share + x @ mean + np.sum(x * (x @ covariance), axis=1) / 2
                for _, log_share, mean, covariance in self.components(y)
            ],
            axis=1,
        )

    def log_z(self, x, y):
        """Log of the mean of exp(x.y) over the keys, as the components have it."""
        return logsumexp(self.scores(x, y), axis=1)

    def exact_log_z(self, x, y):
        return logsumexp(x @ np.asarray(y, LONG).T, axis=1) - np.log(LONG(self.m))

    def loss(self, x, y):
        """Of all rows together, which is n times what an estimator tells."""
        total = -np.sum(self.p * (x @ y.T)) + np.sum(self.log_z(x, y))
        total += np.sum(x @ (self.f @ y))
        if not self.symmetric:
            of_x, of_y = np.sum(x, axis=0), self.p0 @ y
            total += of_x @ of_x / (2 * self.n)
            total += of_y @ of_y / (2 * np.sum(self.p0))
        return total

    def differences(self, x, y=None, h=1e-5):
        """Gradients in x and in y by central differences; y None: in x as both.

        They are wrong by h^2 times a third derivative, of order 1, and by a rounding
        error of the loss, 1e-18, over h: by 1e-10.
        """

        def value(a, b):
            return self.loss(a, a if y is None else b)

        found = []
        for k, changed in enumerate([x] if y is None else [x, y]):
            gradient = np.zeros(changed.shape, LONG)
            for place in np.ndindex(changed.shape):
                pair = [np.array(x, LONG), np.array(x if y is None else y, LONG)]
                pair[k][place] += LONG(h)
                above = value(*pair)
                pair[k][place] -= 2 * LONG(h)
                gradient[place] = (above - value(*pair)) / (2 * LONG(h))
            found.append(gradient)
        return found[0] if y is None else tuple(found)

    def weights(self, x, y):
        return np.exp(self.scores(x, y) - self.log_z(x, y)[:, None])

    def of_rows(self, x, y):
        """G_X, the gradient in x."""
        w = self.weights(x, y)
        out = -self.p @ y + self.f @ y
        for a, (_, _, mean, covariance) in enumerate(self.components(y)):
            out += w[:, a, None] * (mean + x @ covariance)
        if not self.symmetric:
            out += np.sum(x, axis=0) / self.n
        return out

    def of_keys(self, x, y):
        """G_Y, the gradient in y at fixed counts, means and covariances."""
        out = -self.p.T @ x + self.f[:, None] * np.sum(x, axis=0)
        if not self.symmetric:
            out += self.f[:, None] * (self.p0 @ y)
        return out

    def of_statistics(self, x, y):
        """M, and by label what it is made of: shifts and slopes."""
        w = self.weights(x, y)
        found = {}
        for a, (label, _, mean, _) in enumerate(self.components(y)):
            size = np.sum(self.labels == label)
            slopes = x.T @ (w[:, a, None] * x) / size
            shifts = np.sum(w[:, a, None] * x, axis=0) / size - slopes @ mean
            found[label] = shifts, slopes
        rows = [
            found[label][0] + found[label][1] @ key
            for label, key in zip(self.labels, y, strict=True)
        ]
        return np.stack(rows), found

    def gradients(self, x, y, gradient):
        """What rows and keys go down by; None for keys that are the rows."""
        x_side = self.of_rows(x, y)
        y_side = self.of_keys(x, y)
        if gradient == "full":
            y_side = y_side + self.of_statistics(x, y)[0]
        if not self.symmetric:
            return x_side, y_side
        return (x_side if gradient == "source" else x_side + y_side), None

    def sizes_of_rows(self, x, y):
        """What `of_rows` gives at most, with all the terms' sizes in their place."""
        x, y = np.abs(x), np.abs(y)
        mean, square = np.sum(y, axis=0) / self.m, y.T @ y / self.m
        # A covariance is a difference of two such products, whatever its form.
        every = self.f @ y + mean + np.sum(x, axis=0) / self.n
        return np.abs(self.p) @ y + 2 * x @ square + every

    def sizes_of_keys(self, x, y):
        """The same for G_Y + M."""
        x, y = np.abs(x), np.abs(y)
        mean, slopes = np.sum(y, axis=0) / self.m, x.T @ x / self.m
        total = np.sum(x, axis=0)
        out = np.abs(self.p).T @ x + self.f[:, None] * (total + self.p0 @ y)
        return out + total / self.m + (mean + y) @ slopes

    def sizes(self, x, y):
        """What `gradients` gives at most."""
        rows, keys = self.sizes_of_rows(x, y), self.sizes_of_keys(x, y)
        return (rows + keys, None) if self.symmetric else (rows, keys)


def step(x, gradient, eta):
    """One step on the sphere down a gradient, and the lengths of its tangent part."""
    inward = np.sum(gradient * x, axis=1, keepdims=True)
    tangent = gradient - inward * x
    length = np.sqrt(np.sum(tangent * tangent, axis=1, keepdims=True))
    moves = length > 0
    direction = np.where(moves, tangent / np.where(moves, length, 1), 0)
    out = np.sqrt(1 - LONG(eta) ** 2) * x - LONG(eta) * direction
    return unit(np.where(moves, out, x)), np.where(moves, length, 1)


def step_error(x, gradient, sizes, eta, terms, dtype):
    """Bounds on the distance of a row after one step in `dtype` from where it belongs.

    Sums of `terms` products, and of d of them in the projection. With a gradient wrong
    by e its direction in the tangent plane is wrong by 2 e over its length there; the
    new row rounds in its two terms and its norm, the old one has done so.
    """
    u = epsilon(dtype) / 2
    d = x.shape[1]
    _, length = step(x, gradient, eta)
    wrong = terms * u * np.linalg.norm(sizes.astype(float), axis=1)
    wrong += (2 * d + 8) * u * np.linalg.norm(gradient.astype(float), axis=1)
    return 2 * eta * wrong / length[:, 0].astype(float) + (d + 8) * u


class Run:
    """All epochs of EDRep from a start: every state, and the loss of each.

    `labels` hold from epoch `labels_from` on, and there is one cluster before.
    """

    def __init__(
        self,
        p,
        x,
        y=None,
        *,
        gradient="source",
        learning_rate=0.8,
        max_iter=30,
        labels_from=0,
        **options,
    ):
        self.symmetric = y is None
        self.objective = Objective(p, symmetric=self.symmetric, **options)
        self.gradient = gradient
        self.etas = [learning_rate * (1 - t / max_iter) for t in range(max_iter)]
        labels = self.objective.labels
        self.labels = [labels * (t >= labels_from) for t in range(max_iter + 1)]
        x = unit(x)
        y = x if self.symmetric else unit(y)
        self.states, self.losses = [(x, y)], []
        for t in range(max_iter):
            self.losses.append(self._loss(t, x, y))
            x, y = self.advanced(t, x, y)
            self.states.append((x, y))
        self.losses.append(self._loss(max_iter, x, y))
        self.x, self.y = x, y

    def _loss(self, t, x, y):
        self.objective.labels = self.labels[t]
        return float(self.objective.loss(x, y) / self.objective.n)

    def advanced(self, t, x, y):
        """Return what epoch t makes of a state."""
        self.objective.labels = self.labels[t]
        x_side, y_side = self.objective.gradients(x, y, self.gradient)
        after, _ = step(x, x_side, self.etas[t])
        if self.symmetric:
            return after, after
        return after, step(y, y_side, self.etas[t])[0]

    def errors(self, t, x, y, terms, dtype):
        """Return what `step_error` says of rows and keys in epoch t."""
        self.objective.labels = self.labels[t]
        gradients = self.objective.gradients(x, y, self.gradient)
        return [
            None
            if gradient is None
            else step_error(rows, gradient, sizes, self.etas[t], terms, dtype)
            for rows, gradient, sizes in zip(
                (x, y), gradients, self.objective.sizes(x, y), strict=True
            )
        ]

    def spread(self, terms, dtype, seed=0):
        """How far rows get from where they belong by errors in all steps.

        Every row is pushed in a random direction, as far as one step may be wrong: by
        far more than rounding errors, which do not all add up, do push it.
        """
        rng = np.random.default_rng(seed)
        x, y = self.states[0]
        farthest = 0.0
        for t, (true_x, true_y) in enumerate(self.states[1:]):
            errors = self.errors(t, x, y, terms, dtype)
            x, y = self.advanced(t, x, y)
            x = _pushed(x, errors[0], rng)
            y = x if self.symmetric else _pushed(y, errors[1], rng)
            farthest = max(farthest, distance(x, true_x), distance(y, true_y))
        return farthest


def distance(rows, expected):
    """Of the two rows that are farthest from one another."""
    return float(np.max(np.linalg.norm((rows - expected).astype(float), axis=1)))


def _pushed(rows, errors, rng):
    direction = rng.standard_normal(rows.shape)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return unit(rows + errors[:, None] * direction)


def transformed(
    p, keys, terms, dtype, *, learning_rate, max_iter, null_weights=None, labels=None
):
    """Rows for new affinities to fixed keys, symmetric, and a spread as above."""
    objective = Objective(p, null_weights=null_weights, labels=labels)
    keys = unit(keys)
    start = objective.p @ keys - np.sum(keys, axis=0) / len(keys) - objective.f @ keys
    # The start rounds as a gradient of these sizes does, and is its direction.
    x = unit(start)
    rng = np.random.default_rng(0)
    sizes = objective.sizes_of_rows(x, keys)
    pushed = _pushed(x, step_error(0 * x, start, sizes, 1.0, terms, dtype), rng)
    for t in range(max_iter):
        eta = learning_rate * (1 - t / max_iter)
        x, _ = step(x, objective.of_rows(x, keys), eta)
        gradient = objective.of_rows(pushed, keys)
        sizes = objective.sizes_of_rows(pushed, keys)
        errors = step_error(pushed, gradient, sizes, eta, terms, dtype)
        pushed = _pushed(step(pushed, gradient, eta)[0], errors, rng)
    return x, distance(pushed, x)
