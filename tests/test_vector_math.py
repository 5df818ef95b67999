"""Errors of the vector mathematics, at every instruction-set level this machine runs.

A level is chosen when the library is loaded, so every check runs in a process of its
own.  With SUBQUAD_EXHAUSTIVE=1 each function also meets every float32 there is.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest

_core = pytest.importorskip("subquad._core")

BUDGET = 1.0  # units in the last place
FUNCTIONS = ("exp", "log", "log1p", "exp2_bounded")
DTYPES = (np.float32, np.float64)
LENGTHS = (0, 1, 2, 15, 16, 17, 33)


def evaluate(name: str, x: np.ndarray) -> np.ndarray:
    """The kernel's values; what lies around them in memory must not change."""
    guarded = np.full(x.size + 16, np.nan, x.dtype)
    out = guarded[8 : 8 + x.size]
    guarded[:8] = guarded[8 + x.size :] = -77
    _core.vector_math(name, x, out)
    assert (guarded[:8] == -77).all()
    assert (guarded[8 + x.size :] == -77).all()
    return out


def greatest_argument(name: str, dtype: type) -> float:
    """Where the promise of a function ends."""
    if name != "exp2_bounded":
        return np.inf
    return 120.0 if dtype == np.float32 else 1000.0


def truth(name: str, x: np.ndarray, dtype: type, wide: type) -> np.ndarray:
    with np.errstate(all="ignore"):
        x = x.astype(wide)
        if name != "exp2_bounded":
            return getattr(np, name)(x)
        # Beyond half a step under the least normal exponent, 0 is promised.
        return np.where(x <= np.finfo(dtype).minexp - 0.5, wide(0), np.exp2(x))


def ulps(got: np.ndarray, expected: np.ndarray, dtype: type) -> np.ndarray:
    """|got - expected| in units in the last place of dtype at expected.

    Infinity counts as the power of two after the greatest number.  Wrong NaNs count as
    infinite errors.
    """
    wide = expected.dtype.type
    info = np.finfo(dtype)
    with np.errstate(all="ignore"):
        beyond = np.ldexp(wide(1), info.maxexp)
        value = np.clip(got.astype(wide), -beyond, beyond)
        aim = np.clip(expected, -beyond, beyond)
        _, exponent = np.frexp(aim)
        exponent = np.clip(exponent, info.minexp + 1, info.maxexp)
        error = np.abs(value - aim) / np.ldexp(wide(1), exponent - info.nmant - 1)
        error = np.where(np.isnan(error), np.inf, error)
    error[np.isnan(got) & np.isnan(expected)] = 0
    return error


def check_ulps(name: str, x: np.ndarray, wide: type = np.longdouble) -> float:
    dtype = x.dtype.type
    x = x[~(x > greatest_argument(name, dtype))]
    if not x.size:
        return 0.0
    error = ulps(evaluate(name, x), truth(name, x, dtype, wide), dtype)
    worst = int(error.argmax())
    assert error[worst] <= BUDGET, (name, dtype, float(x[worst]), float(error[worst]))
    return float(error[worst])


def sweep(dtype: type) -> np.ndarray:
    """Equally spaced bit patterns, and the ranges where something happens."""
    if dtype == np.float32:
        patterns = np.arange(0, 2**32, 16411, dtype=np.uint64).astype(np.uint32)
        low, high = -105.0, 89.5
    else:
        stride = np.uint64(0x00004331BDDE82D1)
        patterns = np.arange(250_000, dtype=np.uint64) * stride
        low, high = -747.0, 711.0
    lines = [
        np.linspace(low, high, 100_001),
        np.linspace(low, 0.8 * low, 20_001),
        np.linspace(1.5 * low, -1.5 * low, 100_001),
        np.linspace(-1, 1, 100_001),
        np.linspace(0.25, 4, 100_001),
        np.linspace(-1e-3, 1e-3, 20_001),
        1 + np.linspace(-1e-3, 1e-3, 20_001),
        np.arange(2 * np.finfo(dtype).minexp, 2 * np.finfo(dtype).maxexp) / 2,
    ]
    return np.concatenate([patterns.view(dtype), *(a.astype(dtype) for a in lines)])


def check_sweep(name: str) -> None:
    for dtype in DTYPES:
        worst = check_ulps(name, sweep(dtype))
        print(f"{name} {np.dtype(dtype).name} {_core.get_isa()}: {worst:.4f} ulp")


def check_every_float32(name: str) -> None:
    worst = 0.0
    block = 2**15  # what the caches hold
    for start in range(0, 2**32, block):
        patterns = np.arange(start, start + block, dtype=np.uint64).astype(np.uint32)
        # float64 is wrong by 2**-28 of these units at most.
        worst = max(worst, check_ulps(name, patterns.view(np.float32), np.float64))
    print(f"{name} every float32 {_core.get_isa()}: {worst:.4f} ulp")


def special_values(name: str, dtype: type) -> list[tuple[float, float]]:
    info = np.finfo(dtype)
    tiny, least, greatest = info.smallest_subnormal, info.tiny, info.max
    inf, nan = np.inf, np.nan
    if name == "exp":
        underflow, overflow = (-104, 89) if dtype == np.float32 else (-746, 710)
        return [
            (0.0, 1.0), (-0.0, 1.0), (tiny, 1.0), (-tiny, 1.0), (inf, inf), (-inf, 0.0),
            (nan, nan), (greatest, inf), (-greatest, 0.0), (underflow, 0.0),
            (overflow, inf),
        ]  # fmt: skip
    if name == "log":
        return [
            (1.0, 0.0), (0.0, -inf), (-0.0, -inf), (inf, inf), (-inf, nan), (-1.0, nan),
            (-tiny, nan), (-greatest, nan), (nan, nan),
        ]  # fmt: skip
    if name == "log1p":
        return [
            (0.0, 0.0), (-0.0, -0.0), (tiny, tiny), (-tiny, -tiny), (least, least),
            (-least, -least), (-1.0, -inf), (np.nextafter(dtype(-1), dtype(-2)), nan),
            (-greatest, nan), (inf, inf), (-inf, nan), (nan, nan),
        ]  # fmt: skip
    bottom = info.minexp
    return [
        (0.0, 1.0), (-0.0, 1.0), (1.0, 2.0), (-1.0, 0.5), (bottom, least),
        (bottom - 0.5, 0.0), (bottom - 1.0, 0.0), (bottom - 2.0, 0.0), (-greatest, 0.0),
        (-inf, 0.0), (nan, nan),
    ]  # fmt: skip


def check_special_values(name: str) -> None:
    for dtype in DTYPES:
        for argument, expected in special_values(name, dtype):
            for position in range(33):
                x = np.ones(33, dtype)
                ordinary = evaluate(name, x)
                x[position] = argument
                got = evaluate(name, x)
                ordinary[position] = expected
                np.testing.assert_array_equal(got, ordinary, strict=True)
                if not np.isnan(expected):
                    assert np.signbit(got[position]) == np.signbit(expected)


def check_lengths(name: str) -> None:
    """An element has the same bits in every length and at every alignment."""
    for dtype in DTYPES:
        memory = np.linspace(0.01, 30, 80).astype(dtype)
        for length in LENGTHS:
            for offset in range(4):
                x = memory[offset : offset + length]
                one_by_one = [evaluate(name, x[i : i + 1]) for i in range(length)]
                expected = np.concatenate([np.empty(0, dtype), *one_by_one])
                np.testing.assert_array_equal(evaluate(name, x), expected, strict=True)
                if length:
                    check_ulps(name, x)


def check_gelu(_: str) -> None:
    """Far into the negative tail; the derivative relative to its terms' magnitudes."""
    line = np.linspace(-15.5, 15.5, 40_001)
    x = np.concatenate([line, line / 8, line * 1e-6, [0.0, -0.0]]).astype(np.float32)
    z = x.astype(np.float64)
    # float64 is wrong by 2**-20 of the units of float32 at most, through z**2.
    probability = np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in z])
    slope = z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    error = ulps(evaluate("gelu", x), z * probability, np.float32)
    assert error[z >= 0].max() <= 3.5
    assert error[z < 0].max() <= 12
    info = np.finfo(np.float32)
    found = evaluate("gelu_derivative", x).astype(np.float64)
    bound = 2.5 * float(info.eps) * (probability + np.abs(slope))
    bound += 3 * float(info.smallest_subnormal)
    assert (np.abs(found - (probability + slope)) <= bound).all()
    for dtype in DTYPES:
        special = np.array([np.inf, -np.inf, np.nan, 0.0], dtype)
        expected = np.array([np.inf, 0.0, np.nan, 0.0], dtype)
        np.testing.assert_array_equal(evaluate("gelu", special), expected)
        expected = np.array([1.0, 0.0, np.nan, 0.5], dtype)
        np.testing.assert_array_equal(evaluate("gelu_derivative", special), expected)


def run_at(level: str, check: str, *names: str) -> None:
    process = subprocess.run(
        [sys.executable, __file__, check, *names],
        env={**os.environ, "SUBQUAD_ISA": level},
        capture_output=True,
        text=True,
        check=False,
    )
    print(process.stdout)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("level", _core.isa_levels())
@pytest.mark.parametrize("check", ["sweep", "special_values", "lengths"])
def test_level(check: str, level: str) -> None:
    run_at(level, check, *FUNCTIONS)


@pytest.mark.parametrize("level", _core.isa_levels())
def test_gelu(level: str) -> None:
    run_at(level, "gelu", "gelu")


@pytest.mark.skipif(
    os.environ.get("SUBQUAD_EXHAUSTIVE") != "1",
    reason="minutes for each function; SUBQUAD_EXHAUSTIVE=1 asks for it",
)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("level", _core.isa_levels())
def test_every_float32(level: str, name: str) -> None:
    run_at(level, "every_float32", name)


def test_rejects_unknown_function() -> None:
    x = np.ones(3)
    with pytest.raises(ValueError, match="name"):
        _core.vector_math("sine", x, np.empty(3))


def main() -> None:
    check, *names = sys.argv[1:]
    assert _core.get_isa() == os.environ["SUBQUAD_ISA"]
    run = {
        "sweep": check_sweep,
        "special_values": check_special_values,
        "lengths": check_lengths,
        "gelu": check_gelu,
        "every_float32": check_every_float32,
    }[check]
    for name in names:
        run(name)


if __name__ == "__main__":
    main()
