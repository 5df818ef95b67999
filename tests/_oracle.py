"""Brute-force oracles, written from the formulas in extended precision.

Beside every value stands a bound on the rounding error that an honest implementation
may commit, so that no test needs a tolerance of its own. Write u for half the machine
epsilon, the error of one operation. A dot product of d terms, in whatever order, with
or without fused multiply-add, is wrong by at most d u sum|x_k y_k| (to first order). If
every score s_j is wrong by at most B_j, the log-sum-exp is wrong by at most
logsumexp(s + B) - logsumexp(s), or the same with -B.
"""

from __future__ import annotations

import numpy as np

LONG = np.longdouble
_ROUNDING = 16  # units of epsilon for exp, the sum and its rescaling, and the log


def epsilon(dtype) -> float:
    return float(np.finfo(dtype).eps)


def gamma(n: int, dtype) -> float:
    """Relative error of a sum of n rounded products."""
    nu = n * epsilon(dtype) / 2
    return nu / (1 - nu)


def logsumexp(s: np.ndarray, axis: int = -1) -> np.ndarray:
    """log sum exp, the empty sum -inf, IEEE for infinities and NaN."""
    s = np.asarray(s)
    if s.shape[axis] == 0:
        shape = list(s.shape)
        del shape[axis]
        return np.full(shape, -np.inf, dtype=s.dtype)
    with np.errstate(all="ignore"):
        top = np.max(s, axis=axis, keepdims=True)
        shift = np.where(np.isfinite(top), top, 0)
        total = np.log(np.sum(np.exp(s - shift), axis=axis)) + np.squeeze(shift, axis)
        return np.where(np.isinf(np.squeeze(top, axis)), np.squeeze(top, axis), total)


def _perturbed(s: np.ndarray, bound: np.ndarray, axis: int = -1) -> np.ndarray:
    """How far the log-sum-exp moves when each score moves by its bound."""
    with np.errstate(all="ignore"):
        z = logsumexp(s, axis)
        up = logsumexp(s + bound, axis) - z
        down = z - logsumexp(s - bound, axis)
        return np.where(np.isfinite(z), np.maximum(up, down), 0)


# ---------------------------------------------------------------- exact normalizer


def scores(x, y, log_weights=None, excluded=None) -> np.ndarray:
    """x_i.y_j + log w_j; -inf where the key is removed, whatever its row holds."""
    x, y = np.asarray(x, LONG), np.asarray(y, LONG)
    with np.errstate(all="ignore"):
        s = x @ np.swapaxes(y, -1, -2)
        if log_weights is not None:
            lw = np.asarray(log_weights, LONG)[..., None, :]
            s = np.where(lw == -np.inf, -np.inf, s + lw)
    s = np.array(s)
    if excluded is not None:
        for i, j in enumerate(np.asarray(excluded)):
            if j >= 0:
                s[..., i, j] = -np.inf
    return s


def score_error(x, y, log_weights=None, excluded=None, *, dtype) -> np.ndarray:
    """Bound on the error of one score, its weight and its shift by the maximum."""
    x, y = np.asarray(x, LONG), np.asarray(y, LONG)
    d = x.shape[-1]
    u = epsilon(dtype) / 2
    with np.errstate(all="ignore"):
        s = scores(x, y, log_weights, excluded)
        size = np.abs(x).astype(float) @ np.swapaxes(np.abs(y), -1, -2).astype(float)
        if s.shape[-1]:
            top = np.max(s, axis=-1, keepdims=True)
        else:
            top = np.zeros((*s.shape[:-1], 1), LONG)
        bound = gamma(d, dtype) * size + 2 * u * np.abs(s) + 4 * u * np.abs(s - top)
        return np.where(np.isfinite(s) & np.isfinite(bound), bound, 0)


def log_normalizer(x, y, log_weights=None, excluded=None) -> np.ndarray:
    """log sum_j exp(x_i.y_j + log w_j) over j != excluded_i."""
    return logsumexp(scores(x, y, log_weights, excluded))


def log_normalizer_tolerance(x, y, log_weights=None, excluded=None, *, dtype):
    """Bound on the rounding error of log_normalizer computed in dtype."""
    s = scores(x, y, log_weights, excluded)
    z = logsumexp(s)
    bound = score_error(x, y, log_weights, excluded, dtype=dtype)
    finite = np.where(np.isfinite(z), np.abs(z), 0)
    return _perturbed(s, bound) + epsilon(dtype) * (_ROUNDING + 2 * finite)


def check_log_normalizer(out, x, y, log_weights=None, excluded=None, *, dtype=None):
    """Assert that `out` equals the oracle up to the bound; the dtype is that of out."""
    dtype = out.dtype if dtype is None else dtype
    expected = log_normalizer(x, y, log_weights, excluded)
    tolerance = log_normalizer_tolerance(x, y, log_weights, excluded, dtype=dtype)
    assert_within(out, expected, tolerance)


def assert_within(out, expected, tolerance) -> None:
    """|out - expected| <= tolerance; infinities and NaN in the same places."""
    out = np.asarray(out)
    assert out.shape == expected.shape, (out.shape, expected.shape)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(
        np.where(finite, 0, out).astype(float),
        np.where(finite, 0, expected).astype(float),
    )
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(out - expected), 0).astype(float)
    bad = ~(error <= np.broadcast_to(tolerance, error.shape))
    if bad.any():
        where = np.argwhere(bad)[0]
        at = tuple(where)
        raise AssertionError(
            f"{bad.sum()} of {bad.size} values are wrong; first at {at}: "
            f"got {out[at]!r}, expected {float(expected[at])!r}, error "
            f"{error[at]:.3g}, allowed "
            f"{float(np.broadcast_to(tolerance, error.shape)[at]):.3g}; "
            f"largest error {np.nanmax(error):.3g}"
        )


def log_normalizer_vjp(grad, x, y, log_weights=None, excluded=None):
    """Gradients and their error bounds: ((gx, ex), (gy, ey), (glw, elw)).

    The arrays keep the broadcast batch shape; `sum_to` folds them.
    """
    dtype = np.asarray(x).dtype
    s = scores(x, y, log_weights, excluded)
    z = logsumexp(s)[..., None]
    eps = epsilon(dtype)
    with np.errstate(all="ignore"):
        p = np.where(np.isfinite(s), np.exp(s - z), 0)
        relative = score_error(x, y, log_weights, excluded, dtype=dtype)
        relative = (
            relative
            + log_normalizer_tolerance(x, y, log_weights, excluded, dtype=dtype)[
                ..., None
            ]
        )
        relative = np.expm1(relative) + eps * (
            8 + 4 * np.abs(np.where(p > 0, s - z, 0))
        )
    # exp(s - z) below the smallest normal number may be rounded to zero.
    tiny = np.finfo(dtype).tiny
    x, y = np.asarray(x, LONG), np.asarray(y, LONG)
    live_x = np.where(p.any(-1)[..., None], x, 0)
    live_y = np.where(p.any(-2)[..., None], y, 0)
    g = np.asarray(grad, LONG)
    # A row that attends nothing has zero gradient, whatever comes from above.
    g = np.where(p.any(-1), g, 0)[..., None]
    n, m = s.shape[-2:]
    gp = g * p
    slack = np.abs(g) * tiny * (s > -np.inf)
    t = lambda a: np.swapaxes(a, -1, -2)
    gx, gy, glw = gp @ live_y, t(gp) @ live_x, gp.sum(-2)
    # The bounds themselves need few digits.
    size = np.abs(gp).astype(float)
    err = (np.abs(gp) * relative + slack).astype(float)
    live_x, live_y = np.abs(live_x).astype(float), np.abs(live_y).astype(float)
    ex = (err + gamma(m, dtype) * size) @ live_y
    ey = t(err + gamma(n, dtype) * size) @ live_x
    elw = (err + gamma(n, dtype) * size).sum(-2)
    return (gx, ex), (gy, ey), (glw, elw)


def sum_to(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo broadcasting: sum over the axes that were stretched or added."""
    a = np.asarray(a)
    a = a.sum(tuple(range(a.ndim - len(shape))))
    for axis, size in enumerate(shape):
        if size == 1 and a.shape[axis] != 1:
            a = a.sum(axis, keepdims=True)
        elif a.shape[axis] == 1 and size != 1:
            a = np.broadcast_to(a, shape)
    return a


# ------------------------------------------------------------- Gaussian normalizer


def gaussian_terms(x, log_counts, means, factors, diagonal=None, dtype=np.float64):
    """Per component log n + m + v/2 and the bound on its rounding error."""
    x, lc = np.asarray(x, LONG), np.asarray(log_counts, LONG)
    mu, f = np.asarray(means, LONG), np.asarray(factors, LONG)
    d, r = f.shape[-2:]
    u = epsilon(dtype) / 2
    t = lambda a: np.swapaxes(a, -1, -2)
    with np.errstate(all="ignore"):
        m = x @ t(mu)
        m_err = gamma(d, dtype) * (np.abs(x) @ t(np.abs(mu)))
        xa = x[..., None, :, :]  # (..., 1, n, d) against factors (..., k, d, r)
        p = xa @ f
        p_err = gamma(d, dtype) * (np.abs(xa) @ np.abs(f))
        v = t((p**2).sum(-1))
        v_err = t(
            (2 * np.abs(p) * p_err + p_err**2).sum(-1)
            + gamma(r + 2, dtype) * (p**2).sum(-1)
        )
        if diagonal is not None:
            extra = (x**2) @ t(np.asarray(diagonal, LONG))
            v = v + extra
            v_err = v_err + gamma(d + 3, dtype) * extra
        lc = lc[..., None, :]
        term = np.where(lc == -np.inf, -np.inf, lc + m + v / 2)
        bound = m_err + v_err / 2 + 4 * u * (np.abs(lc) + np.abs(m) + v / 2)
        top = np.max(term, -1, keepdims=True) if term.shape[-1] else 0
        bound = bound + 4 * u * np.abs(term - top)
        bound = np.where(np.isfinite(term) & np.isfinite(bound), bound, 0)
    return term, bound


def gaussian_log_normalizer(x, log_counts, means, factors, diagonal=None):
    return logsumexp(gaussian_terms(x, log_counts, means, factors, diagonal)[0])


def check_gaussian(out, x, log_counts, means, factors, diagonal=None):
    """Assert that `out` equals the oracle up to the rounding of its dtype."""
    term, bound = gaussian_terms(x, log_counts, means, factors, diagonal, out.dtype)
    z = logsumexp(term)
    finite = np.where(np.isfinite(z), np.abs(z), 0)
    tolerance = _perturbed(term, bound) + epsilon(out.dtype) * (_ROUNDING + 2 * finite)
    assert_within(out, z, tolerance)


def gaussian_vjp(grad, x, log_counts, means, factors, diagonal=None):
    """Gradients in x, log_counts, means, factors (and diagonal), batch not folded."""
    x, mu, f = (np.asarray(a, LONG) for a in (x, means, factors))
    term = gaussian_terms(x, log_counts, means, factors, diagonal)[0]
    z = logsumexp(term)[..., None]
    with np.errstate(all="ignore"):
        share = np.where(np.isfinite(term), np.exp(term - z), 0)
    share = np.asarray(grad, LONG)[..., None] * share
    t = lambda a: np.swapaxes(a, -1, -2)
    xa = x[..., None, :, :]
    weighted = t(share)[..., None] * xa  # (..., k, n, d)
    omega_x = (xa @ f) @ t(f)
    gx = share @ mu + (t(share)[..., None] * omega_x).sum(-3)
    if diagonal is not None:
        gx = gx + (share @ np.asarray(diagonal, LONG)) * x
    out = [gx, share.sum(-2), t(share) @ x, t(weighted) @ xa @ f]
    if diagonal is not None:
        out.append(t(share) @ (x**2) / 2)
    return tuple(out)


# ---------------------------------------------------------------- Gaussian closure


def moments(y, labels, k, weights=None):
    """Counts, means and ddof=0 covariances of each component, in long double."""
    y = np.asarray(y, LONG)
    m, d = y.shape
    labels = np.zeros(m, int) if labels is None else np.asarray(labels)
    w = np.ones(m, LONG) if weights is None else np.asarray(weights, LONG)
    counts, means, covs = (
        np.zeros(k, LONG),
        np.zeros((k, d), LONG),
        np.zeros((k, d, d), LONG),
    )
    for a in range(k):
        rows = (labels == a) & (w > 0)
        counts[a] = w[rows].sum()
        if counts[a] > 0:
            means[a] = (w[rows, None] * y[rows]).sum(0) / counts[a]
            c = y[rows] - means[a]
            covs[a] = (w[rows, None] * c).T @ c / counts[a]
    return counts, means, covs


def closure(x, y, labels=None, k=1, weights=None, covariance_type="full"):
    """log sum_a n_a exp(x.mu_a + x' Omega_a x / 2), every statistic by brute force."""
    counts, means, covs = moments(y, labels, k, weights)
    x = np.asarray(x, LONG)
    if covariance_type == "diag":
        covs = covs * np.eye(covs.shape[-1], dtype=LONG)
    terms = np.full((len(x), k), -np.inf, LONG)
    for a in range(k):
        if counts[a] > 0:
            v = ((x @ covs[a]) * x).sum(-1)
            terms[:, a] = np.log(counts[a]) + x @ means[a] + v / 2
    return logsumexp(terms)


def leave_one_out(y, i, labels=None, k=1, weights=None, covariance_type="full"):
    """The closure of key i as query, refitted without row i."""
    y = np.asarray(y, LONG)
    keep = np.arange(len(y)) != i
    labels = np.zeros(len(y), int) if labels is None else np.asarray(labels)
    w = None if weights is None else np.asarray(weights)[keep]
    return closure(y[i : i + 1], y[keep], labels[keep], k, w, covariance_type)[0]
