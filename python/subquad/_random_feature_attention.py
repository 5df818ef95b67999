"""Attention on fitted random features, re-exported by `subquad.features`."""

from __future__ import annotations

from typing import Any, TypeAlias

from ._random_features import RandomFeatures, require_features
from .attention import AttentionState, linear_attention

Array: TypeAlias = Any


def random_feature_attention(
    q: Array,
    k: Array,
    v: Array,
    features: RandomFeatures,
    /,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    state: AttentionState | None = None,
    return_state: bool = False,
) -> Any:
    """Compute softmax attention approximately, in linear time.

    `linear_attention` of the log-features of queries and keys: yₜ = Σⱼ wₜⱼ vⱼ / Σⱼ wₜⱼ
    with unbiased estimates wₜⱼ of exp(scale qₜ·kⱼ).

    Parameters
    ----------
    q : array of shape (..., n_q, d)
        Queries. Real floating, of the library that the features were fitted to.
    k : array of shape (..., n, d)
        Keys.
    v : array of shape (..., n, d_v)
        Values.
    features : RandomFeatures
        Fitted already, with ``scale=1/√d`` as a rule: nothing is fitted to what is
        attended, or the past would learn of the future. Not trigonometric. Leading
        dimensions of a fit by head broadcast with those of q and k.
    causal : bool
        Whether token t attends tokens up to t only; then n_q = n.
    key_mask : bool array of shape (..., n), optional
        True for keys that are kept. A key that is left out counts for nothing, whatever
        it and its value hold.
    state : AttentionState, optional
        What was attended before, with the same features.
    return_state : bool
        Whether to return the state after all tokens.

    Returns
    -------
    array of shape (..., n_q, d_v), or named tuple
        Attention y in the type of `v`; with `return_state` a named tuple of y and
        state.

    Raises
    ------
    TypeError
        If `features` is no RandomFeatures, or an argument is no array of its kind of
        type, or the arrays are of several libraries or on several devices.
    ValueError
        If shapes do not fit, or the features are trigonometric.
    sklearn.exceptions.NotFittedError
        If `features` is not fitted; a ValueError and AttributeError.

    See Also
    --------
    linear_attention : What this is, on log-features.
    RandomFeatures.attention_error : The error to expect.
    AttentionState.step : Decodes token by token, on log-features too.

    Notes
    -----
    O(n M (d + d_v)) time with M features. No epsilon is added anywhere: rows are those
    of the dense computation with the same features to rounding, whatever the norms, and
    a row depends on nothing but its own keys. Differentiable in q, k and v in torch and
    JAX.

    References
    ----------
    .. [1] K. Choromanski et al., "Rethinking attention with Performers", ICLR, 2021,
       arXiv:2009.14794.
    .. [2] V. Likhosherstov et al., "FAVOR#: Sharp attention kernel approximations via
       new classes of positive random features", NeurIPS, 2023, arXiv:2302.00787.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> rng = np.random.default_rng(0)
    >>> calibration = rng.normal(size=(2, 1000, 8))
    >>> features = sq.RandomFeatures(512, scale=8**-0.5, random_state=0)
    >>> features = features.fit(calibration[0], keys=calibration[1])
    >>> q, k, v = rng.normal(size=(3, 50, 8))
    >>> y = sq.random_feature_attention(q, k, v, features, causal=True)
    >>> w = np.tril(np.exp(q @ k.T / np.sqrt(8)))
    >>> exact = (w / w.sum(axis=1, keepdims=True)) @ v
    >>> bool(np.linalg.norm(y - exact) < 0.3 * np.linalg.norm(exact))
    True
    """
    require_features("features", features)
    return linear_attention(
        features.log_query_features(q),
        features.log_key_features(k),
        v,
        causal=causal,
        key_mask=key_mask,
        state=state,
        return_state=return_state,
    )
