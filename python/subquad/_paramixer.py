"""Mixing by factors that the rows make themselves, re-exported by `subquad.factors`."""

from __future__ import annotations

import math
from typing import Any

from subquad._dispatch import Array, namespace_of, not_an_array
from subquad._validation import (
    NetworkArguments,
    as_type_of,
    check_flag,
    check_residual,
    is_unknown,
    network_arguments,
    offsets_of_pattern,
)

# Values of consecutive factors are made together as long as they stay within this.
_GROUP_BYTES = 1 << 24


def paramixer(
    x: Array,
    v: Array,
    weights: Any,
    /,
    *,
    pattern: Any = "chord",
    residual: str = "step",
    circular: bool = True,
    segment_ids: Array | None = None,
    recompute: bool = False,
) -> Array:
    """Mix rows by sparse factors whose values networks make from other rows.

    ``sparse_factor_product(factor_values(x, weights), v, ...)``, without all values at
    once.

    Parameters
    ----------
    x : array of shape (..., n, d)
        Rows that the values are made from. Real floating, of any array library.
    v : array of shape (..., n, d_v)
        Rows that are mixed. Batch dimensions are equal to those of `x` and `weights`,
        or broadcast.
    weights : FactorWeights, or tuple of four arrays
        `weight_in` (..., M, h, d), `bias_in` (..., M, h), `weight_out` (..., M, K, h)
        and `bias_out` (..., M, K): two layers as ``torch.nn.Linear`` has them, of M
        networks stacked.
    pattern : {"chord", "cdil"}, or integers of shape (K,) or (M, K)
        The offsets, as `sparse_factor_product` takes them.
    residual : {"none", "step", "input"}
        What is added to a factor's product: nothing, what it was applied to, or `v`.
    circular : bool
        Whether the first row follows the last.
    segment_ids : int array of shape (n,), optional
        Runs of equal numbers are sequences packed one after another.
    recompute : bool
        Whether gradients by automatic differentiation compute what precedes each factor
        anew, within a group of factors, instead of keeping it.

    Returns
    -------
    array of shape (..., n, d_v)
        The mixed rows, in the type of `v`.

    Raises
    ------
    TypeError
        If an argument is no array, is not of real floating type (offsets,
        `segment_ids`: not integers; a flag: no bool), offsets are not static, `weights`
        is no tuple, or the arrays are of several libraries or on several devices.
    ValueError
        If shapes do not fit, there is no pattern or residual of a name, or K is even
        with ``pattern="cdil"``.

    See Also
    --------
    factor_values : The networks.
    sparse_factor_product : What their values are for.

    Notes
    -----
    O(M n (h (d + K) + K d_v)) time. The values of consecutive factors are made in
    groups of at most 16 MiB, of one factor at least, and applied before the next are
    made: they are never whole, unless a gradient keeps them. One layer of Paramixer
    [1]_ is this function with the rows of a sequence as `x` and a network's result of
    them as `v`; ``residual="input"`` suits the longest sequences, where
    ``residual="step"`` grows. Differentiable in torch and JAX.

    References
    ----------
    .. [1] T. Yu et al., "Paramixer: Parameterizing mixing links in sparse factors works
       better than dot-product self-attention", CVPR, 2022, arXiv:2204.10670.
    .. [2] R. Khalitov et al., "Sparse factorization of square matrices with application
       to neural attention modeling", Neural Networks, 2022, arXiv:2109.08184.
    .. [3] L. Cheng et al., "Classification of long sequential data using circular
       dilated convolutional neural networks", Neurocomputing, 2023, arXiv:2201.02143.

    Examples
    --------
    >>> import numpy as np
    >>> import subquad as sq
    >>> rng = np.random.default_rng(0)
    >>> n, d, h, m = 100, 8, 16, 7
    >>> k = len(sq.chord_offsets(n))
    >>> shapes = [(m, h, d), (m, h), (m, k, h), (m, k)]
    >>> weights = sq.FactorWeights(*(rng.normal(size=s) / 4 for s in shapes))
    >>> x = rng.normal(size=(n, d))
    >>> y = sq.paramixer(x, x, weights)
    >>> values = sq.factor_values(x, weights)
    >>> np.allclose(y, sq.sparse_factor_product(values, x, residual="step"))
    True
    """
    if v is None:
        raise not_an_array("v", None)
    check_residual(residual)
    check_flag("circular", circular)
    check_flag("recompute", recompute)
    call, rows, segments = network_arguments(x, weights, v, segment_ids)
    n_factors, k = call.weights[2].shape[-3:-1]
    offsets = offsets_of_pattern(pattern, [k] * n_factors)
    size = _group_size(call, n_factors)
    is_whole = size >= n_factors
    # Only a call that has all factors can add what the first one is applied to.
    by_one = residual == "input" and not is_whole
    if by_one:
        size = 1
    out: Any = rows
    for start in range(0, max(n_factors, 1), size):
        part = slice(start, start + size)
        values = call.backend.factor_values(call.x, *_of_factors(call.weights, part))
        out, _ = call.backend.sparse_factor_product(
            values,
            out,
            segments,
            offsets[part],
            "none" if by_one else residual,
            bool(circular),
            False,
            False,
            bool(recompute),
        )
        if by_one:
            out = out + rows
    return as_type_of(out, v)


def _group_size(call: NetworkArguments, n_factors: int) -> int:
    """Return how many factors have their values made together."""
    k, n = call.weights[2].shape[-2], call.x.shape[-2]
    sizes = (*call.batch, n, k)
    if is_unknown(*sizes):
        return 1
    itemsize = namespace_of(call.x).finfo(call.x.dtype).bits // 8
    n_bytes = int(math.prod(sizes) * itemsize)
    return min(max(1, _GROUP_BYTES // max(n_bytes, 1)), max(n_factors, 1))


def _of_factors(
    weights: tuple[Array, Array, Array, Array], part: slice
) -> tuple[Array, Array, Array, Array]:
    """Return the weights of consecutive factors."""
    weight_in, bias_in, weight_out, bias_out = weights
    return (
        weight_in[..., part, :, :],
        bias_in[..., part, :],
        weight_out[..., part, :, :],
        bias_out[..., part, :],
    )
