"""The register tile with what follows it, against plain matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks.machine import seconds
from benchmarks.registry import Case, Check, Options, Peer, register

ROWS = 4096
DEPTHS = (32, 50, 64, 100, 128, 300, 384)
SQUARE = 3000


def _tile(x: Any, y: Any, offsets: Any) -> Callable[[], Any]:
    from subquad import _core

    n, d = x.shape
    labels = np.empty(n, np.int64)
    score = np.empty(n, x.dtype)
    size = _core.nearest_centroids_workspace(n, len(y), d, x.itemsize)
    workspace = np.empty(size, np.uint8)

    def call() -> Any:
        _core.nearest_centroids(x, y, offsets, labels, score, workspace)
        return labels, score

    return call


def _matmul(x: Any, y: Any) -> Callable[[], Any]:
    out = np.empty((len(x), len(y)), x.dtype)
    return lambda: np.matmul(x, y.T, out=out)


def _check_tile(x: Any, y: Any, offsets: Any) -> Callable[[Any], Check]:
    rows = np.linspace(0, len(x) - 1, 64).astype(int)

    def check(result: Any) -> Check:
        labels, score = result
        truth = x[rows].astype(float) @ y.astype(float).T + offsets
        size = np.abs(x[rows]).astype(float) @ np.abs(y).astype(float).T + np.abs(
            offsets
        )
        chosen = truth[np.arange(len(rows)), labels[rows]]
        wrong = np.maximum(np.abs(score[rows] - chosen), truth.max(axis=1) - chosen)
        scale = float(np.finfo(x.dtype).eps)
        return Check(
            float((wrong / size.max(axis=1)).max()), 4 * scale * np.sqrt(x.shape[1])
        )

    return check


def _check_matmul(x: Any, y: Any) -> Callable[[Any], Check]:
    rows = np.linspace(0, len(x) - 1, 16).astype(int)

    def check(result: Any) -> Check:
        truth = x[rows].astype(float) @ y.astype(float).T
        size = np.abs(x[rows]).astype(float) @ np.abs(y).astype(float).T
        wrong = float((np.abs(result[rows] - truth) / size).max())
        return Check(wrong, 4 * float(np.finfo(x.dtype).eps) * np.sqrt(x.shape[1]))

    return check


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return GFLOP/s over those of the peers, case by case.

    Of the tile alone (packed panels in cache, a maximum as epilogue), and of the whole
    operation with its packing and its argmax.
    """
    lines = [
        "GFLOP/s of the tile alone: over NumPy square, FMA peak in registers;",
        "of the whole operation: over NumPy same shapes, NumPy square, FMA peak",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["peer"]: row for row in rows if row["case"] == case}
        rates = {peer: row["gflops"] for peer, row in found.items()}
        ours = rates.get("subquad")
        if not ours:
            continue
        texts = [
            f"{ours / rates[peer]:.2f}" if rates.get(peer) else "-"
            for peer in list(rates)[1:]
        ]
        limit = found["subquad"]["ratio_to_limit"]
        texts.append("not measured" if limit is None else f"{1 / limit:.2f}")
        tile = found["subquad"]["values"].get("tile_gflops")
        alone = "not measured"
        square = rates.get(f"numpy {SQUARE}^3")
        if tile and square and limit is not None:
            peak = ours * limit
            alone = f"{tile:8.1f}   {tile / square:.2f}, {tile / peak:.2f}"
        lines.append(f"  {case:<16} {alone}; {ours:8.1f}   " + ", ".join(texts))
    return lines


@register("tile_product", summary=summary)
def tile_product(options: Options) -> Iterable[Case]:
    """The register tile with an argmax epilogue, 4096 x 4096: NumPy's products."""
    rng = np.random.default_rng(0)
    depths = [size.d or size.n for size in options.sizes] or DEPTHS
    for dtype in (np.float32, np.float64):
        itemsize = np.dtype(dtype).itemsize
        square = rng.standard_normal((SQUARE, SQUARE)).astype(dtype)
        # Not the same twice: of a matrix and its own transpose NumPy computes half.
        other = rng.standard_normal((SQUARE, SQUARE)).astype(dtype)
        for d in depths:
            x = rng.standard_normal((ROWS, d)).astype(dtype)
            y = rng.standard_normal((ROWS, d)).astype(dtype)
            offsets = rng.standard_normal(ROWS).astype(dtype)
            peak = options.rates.fma_peak(itemsize)
            tile = options.rates.tile(d, itemsize)
            work = 2.0 * ROWS * ROWS * d
            cube = 2.0 * SQUARE**3
            yield Case(
                f"d={d} {np.dtype(dtype).name}",
                [
                    Peer("subquad", lambda x=x, y=y, o=offsets: _tile(x, y, o)),
                    Peer(
                        "numpy matmul",
                        lambda x=x, y=y: _matmul(x, y),
                        check=_check_matmul(x, y),
                    ),
                    Peer(
                        f"numpy {SQUARE}^3",
                        lambda a=square, b=other: _matmul(a, b),
                        check=_check_matmul(square, other),
                        work=cube,
                        limit={"fma": seconds(cube, peak)},
                    ),
                ],
                _check_tile(x, y, offsets),
                limit={"fma": seconds(work, peak)},
                work=work,
                values={
                    "n": ROWS,
                    "m": ROWS,
                    "d": d,
                    "dtype": np.dtype(dtype).name,
                    "tile_gflops": None if tile is None else tile / 1e9,
                },
            )
