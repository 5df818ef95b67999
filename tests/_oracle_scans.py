"""Brute-force oracles of scans and of linear attention, in extended precision.

Every sum is written out over all pairs of entries, O(n²); nothing is carried along.
"""

from __future__ import annotations

import numpy as np

from _oracle import LONG, logsumexp


def pairs(n, segments=None, *, reverse=False, exclusive=False, causal=True):
    """Which entries j the sum at i holds, (n, n)."""
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    if not causal:
        held = np.ones((n, n), bool)
    elif reverse:
        held = j > i if exclusive else j >= i
    else:
        held = j < i if exclusive else j <= i
    if segments is not None:
        run = np.cumsum(np.diff(segments, prepend=segments[:1]) != 0)
        held = held & (run[:, None] == run[None, :])
    return held


def _signed(s, sign):
    """log |Σ sign exp(s)| and its sign along the last axis."""
    with np.errstate(all="ignore"):
        s = np.where(sign == 0, -np.inf, s)
        top = np.max(s, axis=-1, keepdims=True, initial=-np.inf)
        shift = np.where(np.isfinite(top), top, 0)
        total = np.sum(sign * np.exp(s - shift), axis=-1)
        return np.log(np.abs(total)) + shift[..., 0], np.sign(total)


# --------------------------------------------------------------------------- scans


def logcumsumexp(x, axis=-1, segments=None, *, reverse=False, exclusive=False):
    """log Σ exp(x_j) over the j that each i holds."""
    x = np.moveaxis(np.asarray(x, LONG), axis, -1)
    held = pairs(x.shape[-1], segments, reverse=reverse, exclusive=exclusive)
    out = logsumexp(np.where(held, x[..., None, :], -np.inf))
    return np.moveaxis(out, -1, axis)


def logcumsumexp_vjp(grad, x, segments=None, *, reverse=False, exclusive=False):
    """Gradient along the last axis, and its bound in units of epsilon.

    A term g exp(x - y) errs by that of its exponent, of the exponential, the division
    and the sums: 16 and twice the size of the exponent.
    """
    x, grad = np.asarray(x, LONG), np.asarray(grad, LONG)
    held = pairs(x.shape[-1], segments, reverse=reverse, exclusive=exclusive)
    out = logcumsumexp(x, -1, segments, reverse=reverse, exclusive=exclusive)
    held = held & (x[..., None, :] > -np.inf)
    with np.errstate(all="ignore"):
        exponents = np.where(held, x[..., None, :] - out[..., :, None], 0)
    terms = grad[..., :, None] * np.where(held, np.exp(exponents), 0)
    return terms.sum(-2), (np.abs(terms) * (16 + 2 * np.abs(exponents))).sum(-2)


def signed_logcumsumexp(x, sign, *, reverse=False, exclusive=False):
    """log |s_i|, the sign of s_i, and log of the sum of the terms' sizes."""
    x, sign = np.asarray(x, LONG), np.asarray(sign, LONG)
    held = pairs(x.shape[-1], reverse=reverse, exclusive=exclusive)
    s = np.where(held, x[..., None, :], -np.inf)
    log_abs, signs = _signed(s, np.where(held, sign[..., None, :], 0))
    size, _ = _signed(s, np.where(held, np.abs(sign)[..., None, :], 0))
    return log_abs, signs, size


def log_linear_recurrence(log_a, log_b, state=None):
    """log of x_t = a_t x_{t-1} + b_t along the last axis."""
    a, b = np.broadcast_arrays(np.asarray(log_a, LONG), np.asarray(log_b, LONG))
    last = np.full(a.shape[:-1], -np.inf, LONG)
    if state is not None:
        last = last + 0 * last if state is None else np.asarray(state, LONG)
    out = np.empty(a.shape, LONG)
    with np.errstate(all="ignore"):
        for t in range(a.shape[-1]):
            kept = np.where(a[..., t] == -np.inf, -np.inf, a[..., t] + last)
            last = np.logaddexp(kept, b[..., t])
            out[..., t] = last
    return out


# ----------------------------------------------------------------------- attention


def exponents(
    log_q,
    log_k,
    *,
    causal=False,
    log_decay=None,
    key_mask=None,
    segments=None,
):
    """Exponents (..., n_q, n, d_k) of all pairs; -inf where there is no attention."""
    q, k = np.asarray(log_q, LONG), np.asarray(log_k, LONG)
    n = k.shape[-2]
    if key_mask is not None:
        k = np.where(np.asarray(key_mask, bool)[..., None], k, -np.inf)
    e = q[..., :, None, :] + k[..., None, :, :]
    if log_decay is not None:
        decay = np.asarray(log_decay, LONG)
        decay = np.broadcast_to(decay, np.broadcast_shapes(decay.shape, k.shape))
        total = np.zeros((*decay.shape[:-2], n, n, decay.shape[-1]), LONG)
        for t in range(n):
            for j in range(t):
                total[..., t, j, :] = decay[..., j + 1 : t + 1, :].sum(-2)
        e = e + total
    if causal or segments is not None:
        held = pairs(n, segments, causal=causal)
        e = np.where(held[..., None], e, -np.inf)
    return e


def linear_attention(log_q, log_k, v, **options):
    """y (..., n_q, d_v) and log z (..., n_q); empty rows 0 and -inf."""
    e = exponents(log_q, log_k, **options)
    log_w = logsumexp(e)
    log_z = logsumexp(log_w)
    with np.errstate(all="ignore"):
        p = np.exp(log_w - log_z[..., None])
    p = np.where(log_w == -np.inf, 0, p)
    v = np.where((log_w == -np.inf).all(-2)[..., None], 0, np.asarray(v, LONG))
    return p @ v, log_z


def linear_attention_vjp(gy, gz, log_q, log_k, v, **options):
    """Gradients in log_q, log_k, v and log_decay, batches not folded."""
    e = exponents(log_q, log_k, **options)
    y, log_z = linear_attention(log_q, log_k, v, **options)
    v, gy = np.asarray(v, LONG), np.asarray(gy, LONG)
    with np.errstate(all="ignore"):
        p = np.where(e == -np.inf, 0, np.exp(e - log_z[..., None, None]))
    live = (log_z > -np.inf)[..., None]
    gy = np.where(live, gy, 0)
    gz = np.where(live, np.asarray(gz, LONG)[..., None], 0)
    change = gy @ np.swapaxes(v, -1, -2) - (gy * y).sum(-1, keepdims=True) + gz
    w = p * change[..., None]
    return w.sum(-2), w.sum(-3), np.swapaxes(p.sum(-1), -1, -2) @ gy, _decayed(w)


def linear_attention_vjp_size(gy, gz, log_q, log_k, v, **options):
    """Sums of the sizes of what the gradients of linear attention are made of."""
    e = exponents(log_q, log_k, **options)
    y, log_z = linear_attention(log_q, log_k, v, **options)
    gy = np.where((log_z > -np.inf)[..., None], np.abs(gy), 0)
    with np.errstate(all="ignore"):
        p = np.where(e == -np.inf, 0, np.exp(e - log_z[..., None, None]))
    size = gy @ np.swapaxes(np.abs(v), -1, -2) + np.abs(gz)[..., None]
    w = p * (size + (gy * np.abs(y)).sum(-1, keepdims=True))[..., None]
    return _sizes(w, np.swapaxes(p.sum(-1), -1, -2) @ gy)


def _sizes(w, gv):
    """Sizes of gradients from those of the exponents' and the values'.

    The gradient of a decay is a difference of sums over all later rows and keys.
    """
    gq, gk = w.sum(-2), w.sum(-3)
    if gq.shape[-2] != gk.shape[-2]:
        return gq, gk, gv, None
    return gq, gk, gv, np.cumsum((gq + gk)[..., ::-1, :], axis=-2)[..., ::-1, :]


def log_linear_attention_vjp_size(gy, gz, log_q, log_k, log_v, sign_v=None, **options):
    """The same for values in logarithms; a sum that cancels enlarges its part."""
    e = exponents(log_q, log_k, **options)
    log_y, _, log_z, size = log_linear_attention(log_q, log_k, log_v, sign_v, **options)
    log_v = np.asarray(log_v, LONG)
    weight = np.ones_like(log_v) if sign_v is None else np.abs(sign_v)
    alive = log_y > -np.inf
    with np.errstate(all="ignore"):
        p = np.where(e == -np.inf, 0, np.exp(e - log_z[..., None, None]))
        v = weight[..., None, :, :] * np.exp(
            log_v[..., None, :, :] - log_y[..., :, None, :]
        )
        loss = np.where(alive, np.exp(size - log_y), 0)
    gy = np.where(alive, np.abs(gy) * (1 + loss), 0)
    attends = (e > -np.inf).any(-1)[..., None]
    parts = gy[..., :, None, :] * np.where(alive[..., :, None, :] & attends, v, 0)
    change = parts.sum(-1) + (np.abs(gz) + gy.sum(-1))[..., None]
    gv = (p.sum(-1)[..., None] * parts).sum(-3)
    return _sizes(p * change[..., None], gv)


def _decayed(w):
    """Sum over the pairs t >= s > j of gradients of exponents, for each s."""
    n = w.shape[-2]
    out = np.zeros((*w.shape[:-3], n, w.shape[-1]), LONG)
    if w.shape[-3] == n:
        for s in range(n):
            out[..., s, :] = w[..., s:, :s, :].sum((-3, -2))
    return out


def log_linear_attention(log_q, log_k, log_v, sign_v=None, **options):
    """log |y|, the sign of y, log z, and log of Σ w |v| / z."""
    log_w = logsumexp(exponents(log_q, log_k, **options))
    log_z = logsumexp(log_w)
    log_v = np.asarray(log_v, LONG)
    sign = np.ones_like(log_v) if sign_v is None else np.asarray(sign_v, LONG)
    with np.errstate(all="ignore"):
        s = log_w[..., :, :, None] + log_v[..., None, :, :]
    s = np.swapaxes(np.where(log_w[..., None] == -np.inf, -np.inf, s), -1, -2)
    signs = np.swapaxes(
        np.broadcast_to(sign[..., None, :, :], s.swapaxes(-1, -2).shape), -1, -2
    )
    log_abs, out_sign = _signed(s, signs)
    size, _ = _signed(s, np.abs(signs))
    shift = np.where(log_z == -np.inf, 0, log_z)[..., None]
    return log_abs - shift, out_sign, log_z, size - shift


def log_linear_attention_vjp(gy, gz, log_q, log_k, log_v, sign_v=None, **options):
    """Gradients in log_q, log_k, log_v and log_decay, batches not folded."""
    e = exponents(log_q, log_k, **options)
    log_y, sign_y, log_z, _ = log_linear_attention(
        log_q, log_k, log_v, sign_v, **options
    )
    log_v = np.asarray(log_v, LONG)
    sign = np.ones_like(log_v) if sign_v is None else np.asarray(sign_v, LONG)
    with np.errstate(all="ignore"):
        p = np.where(e == -np.inf, 0, np.exp(e - log_z[..., None, None]))
        v = sign[..., None, :, :] * np.exp(
            log_v[..., None, :, :] - log_y[..., :, None, :]
        )
        v = v * sign_y[..., :, None, :]
    alive = log_y > -np.inf
    attends = (e > -np.inf).any(-1)[..., None]
    v = np.where(alive[..., :, None, :] & attends, v, 0)
    gy = np.where(alive, np.asarray(gy, LONG), 0)
    gz = np.where(log_z > -np.inf, np.asarray(gz, LONG), 0)
    parts = gy[..., :, None, :] * v
    change = parts.sum(-1) + (gz - gy.sum(-1))[..., None]
    w = p * change[..., None]
    gv = (p.sum(-1)[..., None] * parts).sum(-3)
    return w.sum(-2), w.sum(-3), gv, _decayed(w)
