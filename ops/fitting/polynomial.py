"""Polynomials: Sobolev least squares and confluent Hermite interpolation in a well-conditioned basis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.triangle import triangle_of

FAMILIES = ("hermite", "chebyshev", "legendre")
Variable = tuple[float, float]  # (shift, scale): polynomials of (x - shift) / scale
_HERMITE_REACH = 5.0


@dataclass(frozen=True)
class Basis:
    """The basis a fit is solved in: Legendre on (low, high), or normalised Hermite polynomials on the whole line.

    Args:
        degree: of the highest polynomial.
        interval: (low, high), or None for the whole line. For `evaluate` also two arrays `[intervals, 1]`: the points
            are then `[intervals, points]`, or the same `[points]` for all.
    """

    degree: int
    interval: tuple[Any, Any] | None

    def evaluate(self, x: Array) -> tuple[Array, Array]:
        """Values and slopes (in x) of all basis functions: two `[*points, degree + 1]`."""
        # One row per function: each step of a recurrence then runs over contiguous memory.
        shape = np.broadcast_shapes(np.shape(x), () if self.interval is None else np.shape(self.interval[0]))
        values, slopes = np.empty((self.degree + 1, *shape)), np.zeros((self.degree + 1, *shape))
        values[0] = 1.0
        if self.interval is None:
            values[1] = x
            for k in range(1, self.degree):  # h_{k+1} = (x h_k - √k h_{k-1}) / √(k+1) for h_k = He_k / √k!
                values[k + 1] = (x * values[k] - math.sqrt(k) * values[k - 1]) / math.sqrt(k + 1)
            for k in range(1, self.degree + 1):
                slopes[k] = math.sqrt(k) * values[k - 1]
            return np.moveaxis(values, 0, -1), np.moveaxis(slopes, 0, -1)
        middle, half = self._affine()
        t = (x - middle) / half
        values[1] = t
        for k in range(1, self.degree):
            values[k + 1] = ((2 * k + 1) * t * values[k] - k * values[k - 1]) / (k + 1)
        for k in range(self.degree):  # P'_{k+1} = P'_{k-1} + (2k + 1) P_k
            slopes[k + 1] = (2 * k + 1) / half * values[k] + (slopes[k - 1] if k > 0 else 0.0)
        return np.moveaxis(values, 0, -1), np.moveaxis(slopes, 0, -1)

    def evaluate_with_tangents(self, x: Array) -> tuple[Array, Array]:
        """As `evaluate`, but outside the interval each basis function goes on along its tangent at the end."""
        if self.interval is None:
            return self.evaluate(x)
        inside = np.clip(x, *self.interval)
        values, slopes = self.evaluate(inside)
        return values + slopes * (x - inside)[..., None], slopes

    def _affine(self) -> tuple[Any, Any]:
        assert self.interval is not None
        low, high = self.interval
        return (low + high) / 2, (high - low) / 2

    def to_family(self, coefficients: Array, family: str, variable: Variable | None = None) -> Array:
        """The same polynomial in the family's basis (Hermite: He_k / k!) or `powers`, of x or (x - shift) / scale.

        The change of basis is done in exact rational arithmetic and rounded once: its matrix is badly conditioned for
        wide intervals and high degrees.
        """
        exact = [Fraction(float(value)) for value in coefficients]
        shift, scale = (Fraction(number) for number in variable or (0.0, 1.0))
        if self.interval is None:
            roots = np.sqrt(np.cumprod([1.0, *range(1, self.degree + 1)]))
            in_hermite = coefficients * roots  # a_k / k! He_k with a_k = c_k √k!
            if family == "hermite" and variable is None:
                return np.asarray(in_hermite, dtype=np.float64)
            powers = [Fraction(0)] * (self.degree + 1)
            for value, row in zip(in_hermite, _rows("hermite", self.degree), strict=True):
                powers = [power + Fraction(float(value)) * entry for power, entry in zip(powers, row, strict=True)]
            powers = of_line(powers, shift, scale)
        else:
            middle, half = (Fraction(float(part)) for part in self._affine())
            in_t = [Fraction(0)] * len(exact)  # powers of t = (x - middle) / half
            for value, row in zip(exact, _rows("legendre", self.degree), strict=True):
                in_t = [power + value * entry for power, entry in zip(in_t, row, strict=True)]
            powers = of_line(in_t, (shift - middle) / half, scale / half)
        if family == "powers":
            return np.array([float(value) for value in powers])
        return np.array([float(value) for value in from_powers(powers, _rows(family, self.degree))])


def of_line(powers: Sequence[Any] | Array, offset: Any, slope: Any) -> list[Any]:
    """The polynomial sum_k powers[k] x^k at x = offset + slope · t, in powers of t; exactly where all are fractions."""
    found = [0 * power for power in powers]
    for power in reversed(powers):  # Horner's rule
        shifted = [0 * power, *found[:-1]]
        found = [offset * here + slope * below for here, below in zip(found, shifted, strict=True)]
        found[0] += power
    return found


def natural_variable(family: str, ends: tuple[float, float] | None) -> Variable | None:
    """(shift, scale) in which a fit on an interval has coefficients of the size of the function; None: x itself.

    Chebyshev and Legendre polynomials get [-1, 1], Hermite polynomials as many standard deviations as a million normal
    numbers reach. Both numbers are of float32, so that no kernel rounds them. It is x on the whole line and for other
    families.
    """
    if ends is None or family not in FAMILIES:
        return None
    low, high = ends
    scale = (high - low) / 2 / (_HERMITE_REACH if family == "hermite" else 1.0)
    return float(np.float32((low + high) / 2)), float(np.float32(scale))


@cache
def _rows(family: str, degree: int) -> tuple[tuple[Fraction, ...], ...]:
    """Row k: the k-th basis function of the family in powers of x, exactly. Hermite: He_k / k!."""
    rows = [[Fraction(1)] + [Fraction(0)] * degree]
    for k in range(degree):
        shifted = [Fraction(0), *rows[k][:-1]]
        before = rows[k - 1] if k else [Fraction(0)] * (degree + 1)
        if family == "hermite":  # h_{k+1} = (x h_k - h_{k-1}) / (k + 1) for h_k = He_k / k!
            a, c = Fraction(1, k + 1), Fraction(1, k + 1)
        elif family == "chebyshev":
            a, c = Fraction(1 if k == 0 else 2), Fraction(1)
        else:
            a, c = Fraction(2 * k + 1, k + 1), Fraction(k, k + 1)
        rows.append([a * s - c * b for s, b in zip(shifted, before, strict=True)])
    return tuple(tuple(row) for row in rows)


def to_exact_powers(coefficients: Array, family: str) -> list[Fraction]:
    """The polynomial with these coefficients in the family's basis, in powers of its variable."""
    rows = _rows(family, len(coefficients) - 1)
    weighed = [[Fraction(float(value)) * entry for entry in row] for value, row in zip(coefficients, rows, strict=True)]
    return [sum(column, Fraction(0)) for column in zip(*weighed, strict=True)]


def from_powers(powers: Sequence[Fraction], rows: Sequence[Sequence[Fraction]]) -> list[Fraction]:
    """Coefficients in the basis whose functions in powers are the rows.

    Solves the triangular system: the highest power belongs to the highest basis function alone.
    """
    rest = list(powers)
    result = [Fraction(0)] * len(rows)
    for k in range(len(rows) - 1, -1, -1):
        result[k] = rest[k] / rows[k][k]
        rest = [value - result[k] * entry for value, entry in zip(rest, rows[k], strict=True)]
    return result


def solve(
    matrix: Array, right: Array, fixed_rows: Array | None = None, fixed: Array | None = None
) -> tuple[Array, float]:
    """Least squares by QR and SVD, columns of length 1, with optional equality constraints; and the condition number.

    Constraints are removed by the null space of their matrix (Golub and Van Loan, Matrix Computations, 6.2.3).

    Raises:
        ValueError: constraints that contradict or repeat each other, or are more than the unknowns.
    """
    if len(matrix) > matrix.shape[1]:
        matrix, right, _ = triangle_of(matrix, right)
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0.0] = 1.0
    scaled = matrix / scale
    if fixed_rows is None or fixed is None or not len(fixed):
        solution, _, _, singular = np.linalg.lstsq(scaled, right, rcond=None)
        return solution / scale, _condition(singular)
    count, unknowns = fixed_rows.shape
    if count > unknowns:
        raise ValueError(f"constraints: {count} conditions for {unknowns} coefficients; raise the degree or drop some")
    constraints = fixed_rows / scale
    lengths = np.linalg.norm(constraints, axis=1)
    orthogonal, triangle = np.linalg.qr((constraints / lengths[:, None]).T, mode="complete")
    triangle = triangle[:count]
    if np.abs(np.diag(triangle)).min() < 1e-12:
        raise ValueError("constraints: two of them contradict or repeat each other")
    particular = np.linalg.solve(triangle.T, fixed / lengths)
    reduced = scaled @ orthogonal
    if count == unknowns:
        return (orthogonal @ particular) / scale, float(np.linalg.cond(triangle))
    free, _, _, singular = np.linalg.lstsq(reduced[:, count:], right - reduced[:, :count] @ particular, rcond=None)
    return (orthogonal @ np.concatenate([particular, free])) / scale, _condition(singular)


def _condition(singular: Array) -> float:
    return float(singular[0] / singular[-1]) if singular[-1] > 0 else float("inf")


def chebyshev_nodes(low: float, high: float, count: int) -> Array:
    """The zeros of T_count on (low, high), ascending."""
    angles = (2 * np.arange(count) + 1) * np.pi / (2 * count)
    return (low + high) / 2 - (high - low) / 2 * np.cos(angles)


def interpolation_conditions(degree: int, points: Array) -> tuple[Array, Array]:
    """Which of the points get a value and which a slope, so that there are degree + 1 conditions.

    Every point has its value matched, and its slope too, except for the middle one if degree is even.

    Raises:
        ValueError: the wrong number of points for the degree.
    """
    needed = degree // 2 + 1
    if len(points) != needed or len(np.unique(points)) != needed:
        raise ValueError(f"nodes: degree {degree} needs {needed} different nodes, got {len(points)}")
    with_slope = np.ones(needed, dtype=bool)
    if degree % 2 == 0:
        with_slope[needed // 2] = False
    return np.ones(needed, dtype=bool), with_slope
