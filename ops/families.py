"""The activation families and their numbers, the same as in `csrc/families.h`; what a kernel is told about a call."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import torch

MAX_DEGREE = 16
MAX_PIECES = 64
MAX_COMPOSED = 128  # of one polynomial of a composition, which is split where kernels end


class Family(IntEnum):
    """Which formula; `reference.FORMULAS` holds the definitions, with their packed parameters."""

    POLYNOMIAL = 0
    HERMITE = 1
    CHEBYSHEV = 2
    LEGENDRE = 3
    FOURIER = 4
    HARMONIC = 5
    TROPICAL = 6
    TROPICAL_RATIONAL = 7
    RATIONAL = 8
    POLYRELU = 9
    PIECEWISE_LINEAR = 10
    POLYNORM = 11
    RATIONAL_SPLINE = 12


# Families that may be functions of a scaled variable.
WITH_VARIABLE = (Family.POLYNOMIAL, Family.HERMITE, Family.CHEBYSHEV, Family.LEGENDRE)


def check_degree(degree: Any, largest: int = MAX_DEGREE, name: str = "degree") -> int:
    """An integer in 1…largest.

    Raises:
        ValueError: anything else.
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or not 1 <= degree <= largest:
        raise ValueError(f"{name}: expected an integer from 1 to {largest}, got {degree!r}")
    return degree


def largest_degree(name: str) -> int:
    """Of the elementwise families by name: most pieces of those that have pieces, else the highest degree."""
    return MAX_PIECES if name in ("piecewise_linear", "rational_spline") else MAX_DEGREE


class Formula(NamedTuple):
    """One activation function without its parameters.

    Args:
        family: which.
        degree: n (piecewise linear, rational spline: the number of pieces).
        second_degree: m, of a denominator.
        interval: `()`, or `(lo, hi)`: outside it F goes on along its tangents.
        dim: negative; the dimension of x along which groups of channels have parameters of their own.
        gated: x holds [a, b] along its last dimension, the result is F(a) · b; `dim` is then -1.
        epsilon: what PolyNorm adds to mean squares; no other family has one, and PolyNorm nothing of the above.
        variable: `()`, or `(shift, scale)` of a polynomial: F is its function of (x - shift) / scale.
    """

    family: int
    degree: int
    second_degree: int = 0
    interval: tuple[float, ...] = ()
    dim: int = -1
    gated: bool = False
    epsilon: float = 0.0
    variable: tuple[float, ...] = ()


def parameter_count(formula: Formula) -> int:
    """Packed parameters per group."""
    n, m = formula.degree, formula.second_degree
    return {
        Family.FOURIER: 3 * n + 1,
        Family.HARMONIC: 2 * n + 2,
        Family.TROPICAL_RATIONAL: 4 * (n + 1),
        Family.RATIONAL: n + 1 + m,
        Family.PIECEWISE_LINEAR: 3 * n - 1,
        Family.RATIONAL_SPLINE: 3 * n + 4,
    }.get(Family(formula.family), n + 1)


def result_shape(shape: torch.Size, formula: Formula) -> torch.Size:
    """Of F(x), for an x of this shape."""
    return torch.Size((*shape[:-1], shape[-1] // 2)) if formula.gated else shape
