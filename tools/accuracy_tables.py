"""Write the tables of measured accuracy of scans and attention.

``docs/_generated/scan_gradients.md`` and ``docs/_generated/attention_scales.md``:
float32 results against formulas in long double, ours beside torch's reverse of
`torch.logcumsumexp` and beside the published attention algorithm in torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.attention import published  # noqa: E402

PAGES = ROOT / "docs" / "_generated"
Wide = np.longdouble


def scan_inputs(n: int = 2000) -> Iterator[tuple[str, Any]]:
    """Yield the sequences whose gradients are compared, by name."""
    generator = np.random.default_rng(0)
    normal = generator.standard_normal(n)
    yield "normal", normal
    yield "normal × 100", 100 * normal
    yield "normal × 10⁴", 1e4 * normal
    yield "normal + 10⁴", normal + 1e4
    yield "increasing, 0 … 10⁴", np.linspace(0, 1e4, n)
    yield "alternating ± 10⁴", 1e4 * np.where(np.arange(n) % 2, -1.0, 1.0)
    yield "30 % -inf", np.where(generator.random(n) < 0.3, -np.inf, normal)
    yield "700 leading -inf", np.where(np.arange(n) < 700, -np.inf, normal)
    yield "ties at 3·10³⁸", np.where(np.arange(n) < 3, 3e38, normal)


def scan_gradient(x: Any, grad: Any) -> Any:
    """Return Σ over i ≥ j of g_i exp(x_j - y_i) in long double."""
    x, grad = x.astype(Wide), grad.astype(Wide)
    top = np.maximum.accumulate(x)
    # Beside a reference: at 3e38 no type holds a logarithm of 2 in the sum.
    sums = np.ones(len(x), Wide)
    for i in np.flatnonzero(np.isfinite(top)):
        sums[i] = np.exp(x[: i + 1] - top[i]).sum()
    out = np.zeros(len(x), Wide)
    for j in np.flatnonzero(np.isfinite(x)):
        out[j] = (grad[j:] * np.exp(x[j] - top[j:]) / sums[j:]).sum()
    return out


def relative(found: Any, truth: Any) -> str:
    """Return the largest error in units of the largest entry, or how many are NaN."""
    found = np.asarray(found).astype(Wide)
    missing = int(np.isnan(found).sum())
    if missing:
        return f"NaN in {missing}"
    return f"{float(np.abs(found - truth).max() / np.abs(truth).max()):.1e}"


def scan_table() -> str:
    """Return gradients of log-cumulative sums against long double."""
    import torch

    import subquad as sq

    lines = ["| x, n = 2000 | subquad | torch |", "| --- | --- | --- |"]
    for name, x in scan_inputs():
        x = x.astype(np.float32)
        grad = np.random.default_rng(1).choice([-1.0, 1.0], len(x)).astype(np.float32)
        truth = scan_gradient(x, grad)
        (ours,) = sq.vjp.logcumsumexp(grad, x)
        leaf = torch.from_numpy(x).requires_grad_()
        torch.logcumsumexp(leaf, 0).backward(torch.from_numpy(grad))
        theirs = leaf.grad
        lines.append(
            f"| {name} | {relative(ours, truth)} | {relative(theirs, truth)} |"
        )
    x = np.random.default_rng(2).integers(-8, 8, 2000).astype(np.float32)
    grad = np.random.default_rng(1).standard_normal(2000).astype(np.float32)
    for shift in (1e4, 1e5):
        row = []
        for gradient in (_our_gradient, _torch_gradient):
            moved = gradient(x + np.float32(shift), grad)
            change = np.abs(moved - gradient(x, grad)).max()
            row.append("0" if change == 0 else f"{change:.1e}")
        lines.append(f"| change when all x grow by {shift:.0f} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _our_gradient(x: Any, grad: Any) -> Any:
    import subquad as sq

    return sq.vjp.logcumsumexp(grad, x)[0]


def _torch_gradient(x: Any, grad: Any) -> Any:
    import torch

    leaf = torch.from_numpy(x).requires_grad_()
    torch.logcumsumexp(leaf, 0).backward(torch.from_numpy(grad))
    assert leaf.grad is not None
    return leaf.grad.numpy()


def attention_truth(q: Any, k: Any, v: Any, grad: Any) -> tuple[Any, ...]:
    """Return causal attention and its gradients from every pair, in long double."""
    q, k, v, grad = (a.astype(Wide) for a in (q, k, v, grad))
    n = len(q)
    y = np.zeros((n, v.shape[1]), Wide)
    g_q, g_k, g_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for t in range(n):
        score = q[t] + k[: t + 1]
        weight = np.exp(score - score.max())
        weight /= weight.sum()
        p = weight.sum(axis=1)
        y[t] = p @ v[: t + 1]
        slope = weight * ((v[: t + 1] - y[t]) @ grad[t])[:, None]
        g_q[t] = slope.sum(axis=0)
        g_k[: t + 1] += slope
        g_v[: t + 1] += p[:, None] * grad[t]
    return y, g_q, g_k, g_v


def attention_table() -> str:
    """Return outputs and gradients of attention against long double."""
    import torch

    import subquad as sq

    generator = np.random.default_rng(0)
    n, d_k, d_v = 300, 16, 8
    lines = [
        (
            "| scale of log q, log k | y | grad log q | grad log k | grad v "
            "| y, published | grad log q, published | grad log k, published |"
        ),
        "| --- |" + " --- |" * 7,
    ]
    for scale in (1.0, 4.0, 30.0, 1e3, 1e4):
        q, k = (scale * generator.standard_normal((2, n, d_k))).astype(np.float32)
        v = np.abs(generator.standard_normal((n, d_v))).astype(np.float32)
        grad = generator.standard_normal((n, d_v)).astype(np.float32)
        truth = attention_truth(q, k, v, grad)
        unit = np.abs(grad).max() * np.abs(v).max()
        units = (np.abs(v).max(), unit, unit, np.abs(grad).max())
        y = sq.linear_attention(q, k, v, causal=True)
        ours = (y, *sq.vjp.linear_attention(grad, q, k, v, causal=True))
        leaves = [torch.from_numpy(a).requires_grad_() for a in (q, k, np.log(v))]
        theirs_y = torch.exp(published(*leaves))
        theirs_y.backward(torch.from_numpy(grad))
        theirs = (theirs_y.detach(), leaves[0].grad, leaves[1].grad)
        cells = [
            f"{float(np.abs(np.asarray(a).astype(Wide) - b).max() / u):.1e}"
            for a, b, u in [
                *zip(ours, truth, units, strict=True),
                *zip(theirs, truth[:3], units[:3], strict=True),
            ]
        ]
        lines.append(f"| {scale:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write both pages."""
    for name, table in (
        ("scan_gradients", scan_table()),
        ("attention_scales", attention_table()),
    ):
        (PAGES / f"{name}.md").write_text(table, encoding="utf-8")
        print(f"{name}\n{table}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
