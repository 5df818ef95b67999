"""Draws of the frequencies of random features: every row is N(0, I), rows are coupled.

Features stay unbiased whatever couples their rows, as long as each row alone is normal;
couplings that spread the rows evenly lower the variance.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ._reference.features import hadamard_transform

Float64: TypeAlias = npt.NDArray[np.float64]
Coupling: TypeAlias = Literal["iid", "orthogonal", "simplex", "hadamard"]

COUPLINGS: tuple[Coupling, ...] = ("iid", "orthogonal", "simplex", "hadamard")

# The fourth moments of three Hadamard blocks miss those of the sphere by a share of
# about 8 / (3 p²): 1 % at 16 dimensions, 4 % at 8, a third at 2.
_LEAST_HADAMARD = 16


def padded_dimension(coupling: Coupling, d: int) -> int:
    """Return the dimension in which the rows of a block are orthogonal or a simplex."""
    if coupling == "hadamard" and d >= _LEAST_HADAMARD:
        return 1 << (d - 1).bit_length()
    return d


def coupled_pairs(coupling: Coupling, n_rows: int, d: int) -> float:
    """Return the number of ordered pairs of different rows of a block.

    Blocks are independent; the last one may be cut.
    """
    if coupling == "iid" or d == 1:
        return 0.0
    block = padded_dimension(coupling, d)
    full, rest = divmod(n_rows, block)
    return float(full * block * (block - 1) + rest * (rest - 1))


def draw(coupling: Coupling, n_rows: int, d: int, seed: int) -> Float64:
    """Return rows that are each distributed as N(0, I), coupled in blocks.

    Parameters
    ----------
    coupling : {"iid", "orthogonal", "simplex", "hadamard"}
        "iid": independent rows. "orthogonal": the directions of a block of d rows are
        a Haar-distributed orthogonal matrix, their norms independent. "simplex": the
        vertices of a simplex, turned by such a matrix. "hadamard": rows of
        H D H D H D, with random signs D, of the next power of two; close to normal
        rather than normal, and below 16 dimensions the same as "orthogonal". In one
        dimension all are independent.
    n_rows, d : int
    seed : int
        Seed of a PCG64 generator.

    Returns
    -------
    ndarray of float64, shape (n_rows, d)

    Notes
    -----
    Costs O(n_rows d²), "hadamard" O(n_rows d log d). Norms are those of the dimension
    in which a block is drawn, so that a padded block loses nothing when it is cut.

    References
    ----------
    F. Mezzadri, "How to generate random matrices from the classical compact groups",
    Notices of the AMS 54, 2007. F. Yu et al., "Orthogonal random features", NeurIPS
    2016. I. Reid et al., "Simplex random features", ICML 2023.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    if coupling == "iid" or d == 1 or n_rows == 0:
        return generator.standard_normal((n_rows, d))
    block = padded_dimension(coupling, d)
    full, rest = divmod(n_rows, block)
    parts = []
    for n_blocks, rows in ((full, block), (1, rest)):
        if n_blocks and rows:
            if coupling == "simplex":
                directions = _simplices(generator, n_blocks, rows, d)
            elif coupling == "hadamard" and d >= _LEAST_HADAMARD:
                directions = _hadamard_blocks(generator, n_blocks, rows, block, d)
            else:
                directions = haar(generator, n_blocks, rows, d)
            parts.append(np.reshape(directions, (n_blocks * rows, d)))
    norms = np.sqrt(generator.chisquare(block, n_rows))
    return np.concatenate(parts) * norms[:, None]


def haar(generator: np.random.Generator, n_blocks: int, rows: int, d: int) -> Float64:
    """Return the first rows of Haar-distributed orthogonal matrices."""
    # Fewer rows than dimensions cost less than the whole matrix, and are the same.
    gaussian = generator.standard_normal((n_blocks, d, rows))
    q, r = np.linalg.qr(gaussian)
    # Householder reflections fix the signs of R's diagonal, which makes Q lean to one
    # side; a factorization with a positive diagonal is unique, hence invariant.
    signs = np.copysign(1.0, np.diagonal(r, axis1=-2, axis2=-1))
    return cast(Float64, np.swapaxes(q * signs[..., None, :], -1, -2))


def _simplices(
    generator: np.random.Generator, n_blocks: int, rows: int, d: int
) -> Float64:
    vertices = (np.eye(d) - 1.0 / d)[:rows] / math.sqrt(1.0 - 1.0 / d)
    return vertices @ haar(generator, n_blocks, d, d)


def _hadamard_blocks(
    generator: np.random.Generator, n_blocks: int, rows: int, block: int, d: int
) -> Float64:
    signs = 2.0 * generator.integers(0, 2, (3, n_blocks, 1, block)) - 1.0
    directions = np.eye(rows, block)[None]
    for diagonal in signs:
        directions = walsh_hadamard(directions) * diagonal
    return directions[..., :d]


def walsh_hadamard(rows: Float64) -> Float64:
    """Return the Walsh-Hadamard transform of rows, scaled to be orthogonal."""
    return cast(Float64, hadamard_transform(rows) / math.sqrt(rows.shape[-1]))
