"""The studies of sparse factors: their machinery, and figures of their tables."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import subquad as sq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.factors import growth  # noqa: E402


@pytest.mark.parametrize(
    ("pattern", "n", "expected"),
    [("chord", 128, (7, 8)), ("chord", 100, (7, 8)), ("cdil", 129, (8, 9))],
)
def test_factors_reach_every_row(
    pattern: str, n: int, expected: tuple[int, int]
) -> None:
    n_factors, k = growth.shape_of(pattern, n)
    assert (n_factors, k) == expected
    # Values that are positive cannot cancel.
    pulse = np.zeros((n, 1))
    pulse[n // 3] = 1
    seen = sq.sparse_factor_product(np.ones((n_factors, n, k)), pulse, pattern=pattern)
    assert (seen > 0).all()


def test_residuals_grow_and_vanish() -> None:
    for pattern in growth.PATTERNS:
        none, step, from_input = (
            growth.growth(pattern, residual, 128) for residual in growth.RESIDUALS
        )
        assert none < 0.5 < from_input < 3 < step


def test_networks_are_drawn_as_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    weights = growth.networks(np.random.default_rng(0), 50, 16, 9)
    layers = [torch.nn.Linear(16, 9) for _ in range(50)]
    for ours, theirs in (
        (weights.weight_out, [layer.weight for layer in layers]),
        (weights.bias_out, [layer.bias for layer in layers]),
    ):
        other = torch.stack(theirs).detach().numpy()
        assert ours.shape == other.shape
        # Uniform numbers of one range: deviations known to a few per cent.
        assert np.abs(ours).max() == pytest.approx(np.abs(other).max(), rel=0.02)
        assert ours.std() == pytest.approx(other.std(), rel=0.1)


def test_condition_numbers() -> None:
    of_random, of_near = (
        growth.condition("chord", residual, size, 64, 5)
        for size, residual in ((1.0, "none"), (0.05, "step"))
    )
    assert of_random > 1e5
    assert of_near < 5


def test_pages() -> None:
    lines = growth.growth_page((16, 32)).splitlines()
    assert len(lines) == 2 + 2
    assert lines[0].count("`") == 2 * len(growth.PATTERNS) * len(growth.RESIDUALS)
    lines = growth.condition_page((8,), 1).splitlines()
    assert len(lines) == 2 + len(growth.DRAWS)


def test_tasks_are_tabled(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from tools.factors import tasks

    assert tasks.main(["--quick", "--tasks", "adding", "order", "digits"]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert rows[0] == "|  | chord | cdil | softmax |"
    names = [row.split("|")[1].strip() for row in rows[2:]]
    assert names == ["adding, n = 32", "order, n = 32", "digits, n = 64"]
    assert all(row.count("%, 4 steps of ") == 3 for row in rows[2:])
