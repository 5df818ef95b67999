"""Attention: causal, its reverse, decoding, memory, and growth with the length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks.machine import seconds
from benchmarks.registry import Case, Check, Options, Peer, Row, register

_D = 64


def _inputs(n: int, heads: int = 1, scale: float = 1.0) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(0)
    log_q, log_k = (
        np.float32(scale) * generator.standard_normal((heads, n, _D), np.float32)
        for _ in range(2)
    )
    return log_q, log_k, generator.standard_normal((heads, n, _D), np.float32)


def _some(n: int) -> Any:
    return np.unique(np.linspace(0, n - 1, min(n, 24)).astype(int))


def _truth_row(log_q: Any, log_k: Any, v: Any, t: int) -> tuple[Any, float]:
    """Return one causal output and its log normaliser in float64."""
    score = log_q[t] + log_k[: t + 1]
    top = score.max()
    weight = np.exp(score - top).sum(axis=1)
    return weight @ v[: t + 1] / weight.sum(), top + math.log(weight.sum())


def _check_causal(log_q: Any, log_k: Any, v: Any) -> Callable[[Any], Check]:
    """Compare a few rows with float64; the bound is relative to the largest |v|."""
    wide = [a[0].astype(float) for a in (log_q, log_k, v)]
    truth: dict[int, Any] = {}

    def check(result: Any) -> Check:
        rows = _some(log_q.shape[1])
        if not truth:
            truth.update({int(t): _truth_row(*wide, int(t))[0] for t in rows})
        found = np.asarray(result, float)[0]
        error = max(np.abs(found[t] - y).max() for t, y in truth.items())
        return Check(float(error / np.abs(v).max()), 2e-6, "of max |v|")

    return check


class _Core:
    """The causal kernel on memory that was touched before."""

    def __init__(self, log_q: Any, log_k: Any, v: Any) -> None:
        from subquad import _core

        self.core = _core
        self.arrays = log_q, log_k, v
        heads, n, d = log_q.shape
        sizes = (heads, n, n, d, v.shape[-1], v.itemsize, True, 0)
        self.y = np.zeros_like(v)
        self.scratch = np.zeros(_core.linear_attention_workspace(*sizes), np.uint8)
        self.vjp_scratch = np.zeros(
            _core.linear_attention_vjp_workspace(*sizes), np.uint8
        )
        self.gradients = [np.zeros_like(a) for a in (log_k, v, log_q)]

    def forward(self) -> Any:
        log_q, log_k, v = self.arrays
        rest = [None] * 5
        self.core.linear_attention(
            log_k, v, log_q, *rest, True, False, self.y, None, None, None,
            self.scratch, 0,
        )  # fmt: skip
        return self.y

    def reverse(self, grad: Any) -> Any:
        log_q, log_k, v = self.arrays
        rest = [None] * 5
        self.core.linear_attention_vjp(
            log_k, v, log_q, *rest, True, self.y, grad, None, None, None,
            *self.gradients, None, None, None, self.vjp_scratch, 0,
        )  # fmt: skip
        return self.gradients


def published(log_q: Any, log_k: Any, log_v: Any) -> Any:
    """The cited algorithm in torch: running log-sums of n d_k d_v entries.

    F. A. Heinsen, arXiv:2404.05843, equations 2, 5 and 6.
    """
    import torch

    log_s = torch.logcumsumexp(log_k[..., None] + log_v[..., None, :], dim=-3)
    log_z = torch.logcumsumexp(log_k, dim=-2)
    numerator = torch.logsumexp(log_q[..., None] + log_s, dim=-2)
    denominator = torch.logsumexp(log_q + log_z, dim=-1, keepdim=True)
    return numerator - denominator


def _torch_published(log_q: Any, log_k: Any, v: Any) -> Callable[[], Any]:
    """Its values are positive: it is given |v|, and checked against that."""
    import torch

    q, k = torch.from_numpy(log_q), torch.from_numpy(log_k)
    log_v = torch.from_numpy(np.log(np.abs(v)))
    return lambda: torch.exp(published(q, k, log_v)).numpy()


def _torch_published_vjp(
    log_q: Any, log_k: Any, v: Any, grad: Any
) -> Callable[[], Any]:
    import torch

    leaves = [
        torch.from_numpy(a).requires_grad_() for a in (log_q, log_k, np.log(np.abs(v)))
    ]
    g = torch.from_numpy(grad)
    out = published(*leaves)
    return lambda: torch.autograd.grad(out, leaves, g, retain_graph=True)


def _torch_softmax(log_q: Any, log_k: Any, v: Any) -> Callable[[], Any]:
    import torch

    q, k, values = (torch.from_numpy(a)[None] for a in (log_q, log_k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, values, is_causal=True).numpy()


def _unchecked(note: str) -> Callable[[Any], Check]:
    return lambda result: Check(0.0, 0.0, note)


def _flops(n: int, tile: int = 32) -> float:
    """Multiply-adds twice: state in, state out, and a triangle of `tile` tokens."""
    return n * (4.0 * _D * _D + tile * 2.0 * _D)


@register("causal_attention")
def causal_attention(options: Options) -> Iterable[Case]:
    """Causal linear attention, 64 x 64, float32: the published algorithm, softmax."""
    for n in (1024, 4096):
        log_q, log_k, v = _inputs(n)
        arrays = (log_q, log_k, v)
        peers = [
            Peer("subquad", lambda a=arrays: _Core(*a).forward),
            Peer(
                "torch, published algorithm",
                lambda a=arrays: _torch_published(*a),
                check=_check_causal(log_q, log_k, np.abs(v)),
                bytes_needed=5.0 * n * _D * _D * 4,
            ),
            Peer(
                "torch softmax attention",
                lambda a=arrays: _torch_softmax(*a),
                check=_unchecked("another function, for its time"),
            ),
        ]
        yield Case(
            f"n={n} float32",
            peers,
            _check_causal(*arrays),
            limit={
                "tile product": seconds(_flops(n), options.rates.tile(_D, 4)),
                "exp": seconds(2.0 * n * _D, options.rates.exp(4)),
            },
            work=_flops(n),
            values={"n": n, "d_k": _D, "d_v": _D},
        )


def _check_gradients(
    log_q: Any, log_k: Any, v: Any, grad: Any
) -> Callable[[Any], Check]:
    """Compare the gradients of the first tokens' queries and the last tokens' keys."""

    def check(result: Any) -> Check:
        g_k, g_v, g_q = (np.asarray(a, float)[0] for a in result)
        q, k, values, g = (a[0].astype(float) for a in (log_q, log_k, v, grad))
        n = len(q)
        error = 0.0
        for t in _some(n):
            score = q[t] + k[: t + 1]
            p = np.exp(score - score.max())
            p /= p.sum()
            centred = (values[: t + 1] - p.sum(axis=1) @ values[: t + 1]) @ g[t]
            error = max(error, np.abs(g_q[t] - centred @ p).max())
        # The last key is seen by the last row alone.
        p_last = p[-1]
        error = max(error, np.abs(g_k[-1] - centred[-1] * p_last).max())
        error = max(error, np.abs(g_v[-1] - p_last.sum() * g[-1]).max())
        scale = np.abs(g).max() * np.abs(values).max()
        return Check(float(error / scale), 1e-5, "of max |grad| max |v|")

    return check


@register("causal_attention_vjp")
def causal_attention_vjp(options: Options) -> Iterable[Case]:
    """The reverse of causal linear attention alone: the published algorithm's."""
    for n in (1024, 4096):
        arrays = _inputs(n)
        grad = np.random.default_rng(1).standard_normal((1, n, _D), np.float32)

        def ours(a: Any = arrays, g: Any = grad) -> Callable[[], Any]:
            core = _Core(*a)
            core.forward()
            return lambda: core.reverse(g)

        work = n * (12.0 * _D * _D + 32 * 5.0 * _D)
        yield Case(
            f"n={n} float32",
            [
                Peer("subquad", ours),
                Peer(
                    "torch, published algorithm",
                    lambda a=arrays, g=grad: _torch_published_vjp(*a, g),
                    check=_unchecked("gradients in log v, for its time"),
                    bytes_needed=9.0 * n * _D * _D * 4,
                ),
            ],
            _check_gradients(*arrays, grad),
            limit={
                "tile product": seconds(work, options.rates.tile(_D, 4)),
                "exp": seconds(2.0 * n * _D, options.rates.exp(4)),
            },
            work=work,
            values={"n": n, "d_k": _D, "d_v": _D},
        )


@register("attention_memory", rounds=1)
def attention_memory(options: Options) -> Iterable[Case]:
    """Memory beyond inputs and outputs at n = 65536, 64 x 64."""
    del options
    n = 65536
    arrays = _inputs(n)
    small = _inputs(256)

    def ours(a: Any) -> Callable[[], Any]:
        import subquad

        log_q, log_k, v = a
        return lambda: subquad.linear_attention(log_q, log_k, v, causal=True)

    def ours_vjp(a: Any) -> Callable[[], Any]:
        import subquad

        log_q, log_k, v = a
        y = subquad.linear_attention(log_q, log_k, v, causal=True)
        return lambda: subquad.vjp.linear_attention(
            v, log_q, log_k, v, causal=True, out=y
        )

    loose = _unchecked("results count as extra memory: 16 MiB, and 48 MiB in reverse")
    yield Case(
        f"n={n} float32",
        [
            Peer("subquad", lambda: ours(arrays), warm=lambda: ours(small)),
            Peer(
                "subquad reverse",
                lambda: ours_vjp(arrays),
                check=loose,
                warm=lambda: ours_vjp(small),
            ),
        ],
        loose,
        memory=True,
        values={"n": n, "d_k": _D, "d_v": _D},
    )


def _decode(states: int) -> Callable[[], Any]:
    """One token for a batch of states that change in place."""
    from subquad import _core

    generator = np.random.default_rng(0)
    log_q, log_k, v = generator.standard_normal((3, states, _D), np.float32)
    key_sums = np.zeros((states, 5, _D), np.float32)
    key_sums[:, 0] = -np.inf
    value_sums = np.zeros((states, 2, _D, _D), np.float32)
    keys, values = np.zeros((2, states, 16, _D), np.float32)
    # Streams that began at different times: their sums take tokens on in turn.
    count = np.zeros(states, np.int64)
    y = np.zeros_like(v)
    size = _core.attention_step_workspace(states, _D, _D, 4, 0)
    scratch = np.zeros(size, np.uint8)

    def call() -> Any:
        _core.attention_step(
            log_k, v, log_q, None, key_sums, value_sums, keys, values, count, False,
            y, None, scratch, 0,
        )  # fmt: skip
        return y, v

    return call


def _decode_torch(states: int) -> Callable[[], Any]:
    """The same sums by two batched products in torch, without any shift."""
    import torch

    generator = np.random.default_rng(0)
    arrays = generator.standard_normal((3, states, _D), np.float32)
    log_q, log_k, v = (torch.from_numpy(a) for a in arrays)
    s = torch.zeros(states, _D, _D)
    z = torch.zeros(states, _D)

    def call() -> Any:
        k = torch.exp(log_k)
        q = torch.exp(log_q)
        s.baddbmm_(k[:, :, None], v[:, None, :])
        z.add_(k)
        num = torch.bmm(q[:, None, :], s)[:, 0]
        return (num / (q * z).sum(1, keepdim=True)).numpy(), v.numpy()

    return call


@register("attention_step")
def attention_step(options: Options) -> Iterable[Case]:
    """One token for a batch of 64 x 64 states: in the caches, and 64 MB of sums."""
    del options

    def check(result: Any) -> Check:
        # Every token of a stream is the same here: so is their mean.
        return Check(float(np.abs(result[0] - result[1]).max()), 1e-5)

    for states in (16, 4096):
        yield Case(
            f"{states} states",
            [
                Peer("subquad", lambda s=states: _decode(s)),
                Peer("torch bmm, no shift", lambda s=states: _decode_torch(s)),
            ],
            check,
            values={"states": states, "tokens": states},
        )


def _plot_scaling(rows: list[Row], path: str) -> None:
    """Write seconds over the number of tokens."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for peer in dict.fromkeys(row["peer"] for row in rows):
        points = sorted(
            (row["values"]["n"], row["median"])
            for row in rows
            if row["peer"] == peer and row["median"]
        )
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", label=peer)
    axes.set(xlabel="tokens", ylabel="seconds", title="Causal attention, 64 × 64")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=144)
    plt.close(figure)


def _slopes(rows: list[Row]) -> list[str]:
    """Fit the growth of each peer over its largest factor of eight."""
    lines = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        points = sorted(
            (row["values"]["n"], row["median"])
            for row in rows
            if row["peer"] == peer and row["median"]
        )
        tail = [p for p in points if points and p[0] * 8 >= points[-1][0]]
        if len(tail) > 1:
            n, t = np.log(np.array(tail)).T
            lines.append(f"{peer}: time grows as n^{np.polyfit(n, t, 1)[0]:.2f}")
    return lines


@register("attention_scaling", summary=_slopes, plot=_plot_scaling, rounds=3)
def attention_scaling(options: Options) -> Iterable[Case]:
    """Time over the number of tokens: softmax, the published algorithm, subquad."""
    sizes = tuple(s.n for s in options.sizes) or tuple(2**k for k in range(8, 18))
    for n in sizes:
        arrays = _inputs(n)
        peers = [Peer("subquad", lambda a=arrays: _Core(*a).forward)]
        if n <= 8192:
            peers.append(
                Peer(
                    "torch, published algorithm",
                    lambda a=arrays: _torch_published(*a),
                    check=_check_causal(arrays[0], arrays[1], np.abs(arrays[2])),
                    bytes_needed=5.0 * n * _D * _D * 4,
                )
            )
        if n <= 32768:
            peers.append(
                Peer(
                    "torch softmax attention",
                    lambda a=arrays: _torch_softmax(*a),
                    check=_unchecked("another function, for its time"),
                )
            )
        yield Case(f"n={n}", peers, _check_causal(*arrays), values={"n": n})
