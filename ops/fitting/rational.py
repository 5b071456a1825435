"""Quotients of polynomials without poles: linearised least squares (Sanathanan-Koerner), then Gauss-Newton steps.

The form is P(x) / (1 + |b_1 x + … + b_q x^q|) with P of degree p: the denominator is at least 1 everywhere. To keep the
quotient smooth on the interval, the fitted sum is kept non-negative there, where the absolute value does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.refinement import Data, Ends, best_of


@dataclass(frozen=True)
class Quotient:
    """Σ numerator[k] x^k / (1 + |Σ denominator[k - 1] x^k|)."""

    numerator: Array
    denominator: Array

    def evaluate(self, x: Array) -> tuple[Array, Array]:
        p, q = len(self.numerator) - 1, len(self.denominator)
        powers, power_slopes = _powers(x, max(p, q))
        top, top_slope = powers[:, : p + 1] @ self.numerator, power_slopes[:, : p + 1] @ self.numerator
        inner = powers[:, 1 : q + 1] @ self.denominator
        sign = np.where(inner < 0, -1.0, 1.0)
        below = 1.0 + np.abs(inner)
        below_slope = sign * (power_slopes[:, 1 : q + 1] @ self.denominator)
        value = top / below
        return value, (top_slope - value * below_slope) / below


def fit_quotient(
    data: Data, degrees: tuple[int, int], intervals: Sequence[Ends], free_ends: bool
) -> tuple[Quotient, Ends, float]:
    """Least squares of value and slope at all points, along tangent lines outside the interval.

    Args:
        degrees: of numerator and denominator.
        intervals: to start from; one, or several with `free_ends`.
        free_ends: the ends of the interval are refined as well.

    Returns:
        The quotient, the interval, and the condition number of the last linearised problem.
    """
    p, q = degrees
    starts, origins = [], []
    for interval in intervals:
        reach = max(abs(end) for end in interval)  # powers of a variable in [-1, 1]
        flats, condition = _starts(data.within(interval), p, q, reach)
        starts += [(partial(_model, p, reach), flat, interval) for flat in flats]
        origins += [(reach, condition)] * len(flats)
    number, solution, ends, _ = best_of(starts, data, free_ends=free_ends)
    reach, condition = origins[number]
    numerator = solution[: p + 1] / reach ** np.arange(p + 1)
    denominator = solution[p + 1 :] / reach ** np.arange(1, q + 1)
    return Quotient(numerator, denominator), ends, condition


def _starts(data: Data, p: int, q: int, reach: float) -> tuple[list[Array], float]:
    """Numerator and denominator in powers of x / reach, from linear problems on the interval."""
    powers, power_slopes = _powers(data.x / reach, max(p, q))
    power_slopes = power_slopes / reach
    top, top_slope = powers[:, : p + 1], power_slopes[:, : p + 1]
    low, low_slope = powers[:, 1 : q + 1], power_slopes[:, 1 : q + 1]
    value, slope = data.value, data.slope
    below, below_slope = np.ones_like(data.x), np.zeros_like(data.x)
    solution, condition = np.zeros(p + 1 + q), 1.0
    best: tuple[float, Array] = (math.inf, solution)
    for _ in range(12):
        # With the last denominator D as weight: (P - f Q) / D and its derivative vanish at an exact fit.
        rows = np.concatenate([top, -value[:, None] * low], axis=1)
        row_slopes = np.concatenate([top_slope, -(slope[:, None] * low + value[:, None] * low_slope)], axis=1)
        first = rows / below[:, None]
        second = row_slopes / below[:, None] - rows * (below_slope / below**2)[:, None]
        matrix = data.rows(first, second)
        right = data.rows(value / below, slope / below - value * below_slope / below**2)
        scale = np.linalg.norm(matrix, axis=0)
        scale[scale == 0.0] = 1.0
        found, _, _, singular = np.linalg.lstsq(matrix / scale, right, rcond=1e-10)
        condition = float(singular[0] / max(singular[-1], 1e-300))
        solution = found / scale
        fitted, fitted_slope, _, _ = _model(p, reach, solution, data.x)
        residual = data.rows(fitted, fitted_slope) - data.right
        cost = float(residual @ residual)
        if cost < best[0]:
            best = (cost, solution)
        inner = low @ solution[p + 1 :]
        below, below_slope = 1.0 + np.abs(inner), np.where(inner < 0, -1.0, 1.0) * (low_slope @ solution[p + 1 :])
    starts = [best[1]]
    for curvature in (0.5, 2.0, 8.0):  # bells 1 + c t²: a fit that never crosses the fold of the absolute value
        bell = np.zeros(q)
        if q >= 2:
            bell[1] = curvature
        root = np.sqrt(data.weights)
        columns = top / (1.0 + low @ bell)[:, None]
        linear = np.linalg.lstsq(columns * root[:, None], value * root, rcond=None)[0]
        starts.append(np.concatenate([linear, bell]))
    return starts, condition


def _model(p: int, reach: float, flat: Array, x: Array) -> tuple[Array, Array, Array, Array]:
    a, b = flat[: p + 1], flat[p + 1 :]
    powers, power_slopes = _powers(x / reach, max(p, len(b)))
    power_slopes = power_slopes / reach
    top, top_slope = powers[:, : p + 1], power_slopes[:, : p + 1]
    low, low_slope = powers[:, 1 : len(b) + 1], power_slopes[:, 1 : len(b) + 1]
    inner = low @ b
    sign = np.where(inner < 0, -1.0, 1.0)
    below, below_slope = 1.0 + np.abs(inner), sign * (low_slope @ b)
    fitted = (top @ a) / below
    fitted_slope = (top_slope @ a - fitted * below_slope) / below
    by_a = top / below[:, None]
    slope_by_a = (top_slope - by_a * below_slope[:, None]) / below[:, None]
    signed, signed_slope = sign[:, None] * low, sign[:, None] * low_slope
    by_b = -(fitted / below)[:, None] * signed
    slope_by_b = (
        -by_b * below_slope[:, None] - fitted[:, None] * signed_slope - fitted_slope[:, None] * signed
    ) / below[:, None]
    by_value, by_slope = np.concatenate([by_a, by_b], axis=1), np.concatenate([slope_by_a, slope_by_b], axis=1)
    return fitted, fitted_slope, by_value, by_slope


def _powers(x: Array, degree: int) -> tuple[Array, Array]:
    values = x[:, None] ** np.arange(degree + 1)
    slopes = np.zeros_like(values)
    slopes[:, 1:] = values[:, :-1] * np.arange(1, degree + 1)
    return values, slopes
