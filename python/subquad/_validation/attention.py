"""What linear attention asks of its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

from subquad._dispatch import Array, Backend, backend_for, library_of, not_an_array
from subquad._validation.common import (
    broadcast_to,
    check_broadcast,
    check_flag,
    check_segments,
    check_signs,
    check_size,
    common_floats,
    dtype_name,
    is_unknown,
    wrong_rank,
)

# Each of these holds several arrays: their names, and their shapes after the batch.
_SUMS = (
    ("state.key_sums", "(..., 5, d_k)"),
    ("state.value_sums", "(..., 2, d_k, d_v)"),
)
_LOGS = (
    ("state.log_numerator", "(..., d_k, d_v)"),
    ("state.sign_numerator", "(..., d_k, d_v)"),
    ("state.log_denominator", "(..., d_k)"),
)


class AttentionArguments(NamedTuple):
    """Arguments of linear attention as its primitives take them.

    `values` are v, or log_v and sign_v; `state` the arrays of a state, or None for
    each; `batch` is what the batch dimensions of all arrays broadcast to.
    """

    backend: Backend
    log_q: Array | None
    log_k: Array
    values: tuple[Array | None, ...]
    log_decay: Array | None
    key_mask: Array | None
    segments: Array | None
    state: tuple[Array | None, ...]
    causal: bool
    batch: tuple[Any, ...]


def linear_attention_arguments(
    log_q: Array | None,
    log_k: Array,
    v: Array,
    *,
    causal: bool,
    log_decay: Array | None = None,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
    state: tuple[Array | None, ...] = (None, None),
    needs_q: bool = True,
) -> AttentionArguments:
    """Return backend and arguments for `linear_attention` and its states."""
    arrays = {"log_k": log_k, "v": v}
    options = (log_decay, key_mask, segment_ids)
    return _arguments(log_q, arrays, causal, options, _SUMS, state, needs_q)


def log_linear_attention_arguments(
    log_q: Array | None,
    log_k: Array,
    log_v: Array,
    *,
    sign_v: Array | None,
    causal: bool,
    log_decay: Array | None = None,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
    state: tuple[Array | None, ...] = (None, None, None),
) -> AttentionArguments:
    """Return backend and arguments for `log_linear_attention`."""
    arrays = {"log_k": log_k, "log_v": log_v, "sign_v": sign_v}
    options = (log_decay, key_mask, segment_ids)
    return _arguments(log_q, arrays, causal, options, _LOGS, state, True)


def check_empty(empty: object) -> bool:
    """Return whether a row that attends nothing gives NaN."""
    if not isinstance(empty, str) or empty not in ("zero", "nan"):
        message = f"empty must be 'zero' or 'nan', got {empty!r}"
        raise ValueError(message)
    return empty == "nan"


def _arguments(
    log_q: Array | None,
    arrays: dict[str, Any],
    causal: bool,
    options: tuple[Array | None, Array | None, Array | None],
    layouts: tuple[tuple[str, str], ...],
    state: tuple[Array | None, ...],
    needs_q: bool,
) -> AttentionArguments:
    log_decay, key_mask, segment_ids = options
    log_k: Any
    v: Any
    v_name = "v" if "v" in arrays else "log_v"
    log_k, v, sign_v = arrays["log_k"], arrays[v_name], arrays.get("sign_v")
    required = {"log_k": log_k, v_name: v}
    if needs_q:
        required = {"log_q": log_q, **required}
    for name, array in required.items():
        if array is None:
            raise not_an_array(name, None)
    check_flag("causal", causal)
    state_names = [name for name, _ in layouts]
    backend = backend_for(
        log_q=log_q,
        **arrays,
        log_decay=log_decay,
        key_mask=key_mask,
        segment_ids=segment_ids,
        **dict(zip(state_names, state, strict=True)),
    )
    log_k, log_q, v, log_decay, *rest = common_floats(
        ("log_k", "log_q", v_name, "log_decay", *state_names),
        (log_k, log_q, v, log_decay, *state),
    )
    if sign_v is not None:
        sign_v = check_signs("sign_v", sign_v, log_k)

    if len(log_k.shape) < 2:
        raise wrong_rank("log_k", "(..., n, d_k)", log_k.shape)
    n, d_k = log_k.shape[-2:]
    v_layout = "(..., n, d_v)"
    if len(v.shape) < 2:
        raise wrong_rank(v_name, v_layout, v.shape)
    check_size(v_name, v_layout, "n", n, v.shape, -2)
    d_v = v.shape[-1]
    names, batches = ["log_k", v_name], [log_k.shape[:-2], v.shape[:-2]]
    if log_q is not None:
        if len(log_q.shape) < 2:
            raise wrong_rank("log_q", "(..., n_q, d_k)", log_q.shape)
        check_size("log_q", "(..., n_q, d_k)", "d_k", d_k, log_q.shape, -1)
        if causal or segment_ids is not None:
            check_size("log_q", "(..., n, d_k)", "n", n, log_q.shape, -2)
        names.append("log_q")
        batches.append(log_q.shape[:-2])
    if sign_v is not None:
        sign_v = broadcast_to("sign_v", sign_v, tuple(v.shape), f"of {v_name}")
    if log_decay is not None:
        if not causal:
            message = (
                "log_decay needs causal=True: without an order of tokens there is "
                "nothing to decay; got causal=False"
            )
            raise ValueError(message)
        lengths = (n, d_k)
        shape = (*tuple(log_decay.shape)[:-2], *lengths)
        log_decay = broadcast_to("log_decay", log_decay, shape, "(..., n, d_k)")
        names.append("log_decay")
        batches.append(shape[:-2])
    if key_mask is not None:
        if not library_of(key_mask).xp.isdtype(key_mask.dtype, "bool"):
            message = (
                "key_mask must hold booleans, True for keys that are kept, got "
                f"{dtype_name(key_mask.dtype)}"
            )
            raise TypeError(message)
        if len(key_mask.shape) < 1:
            raise wrong_rank("key_mask", "(..., n)", key_mask.shape)
        check_size("key_mask", "(..., n)", "n", n, key_mask.shape, -1)
        names.append("key_mask")
        batches.append(key_mask.shape[:-1])
    lengths_of = {"5": 5, "2": 2, "d_k": d_k, "d_v": d_v}
    for (name, layout), array in zip(layouts, rest, strict=True):
        if array is not None:
            letters = layout.strip("()").split(", ")[1:]
            expected = tuple(lengths_of[letter] for letter in letters)
            _check_state(name, array, layout, expected)
            names.append(name)
            batches.append(array.shape[: -len(expected)])
    batch = check_broadcast(names, batches)
    segments = check_segments(segment_ids, n)
    values = (v, sign_v) if v_name == "log_v" else (v,)
    return AttentionArguments(
        backend,
        log_q,
        log_k,
        values,
        log_decay,
        key_mask,
        segments,
        tuple(rest),
        bool(causal),
        batch,
    )


def _check_state(
    name: str, array: Array, layout: str, expected: tuple[Any, ...]
) -> None:
    shape = tuple(array.shape)
    found = shape[len(shape) - len(expected) :]
    if len(shape) >= len(expected) and all(
        a == b or is_unknown(a, b) for a, b in zip(found, expected, strict=True)
    ):
        return
    sizes = ", ".join(map(str, expected))
    message = f"{name} must have shape {layout} = (..., {sizes}), got shape {shape}"
    raise ValueError(message)
