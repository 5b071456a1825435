"""Quotients of polynomials without poles: linearised least squares (Sanathanan-Koerner), then Gauss-Newton steps.

The form is P(x) / (1 + |b_1 x + … + b_q x^q|) with P of degree p: the denominator is at least 1 everywhere. To keep the
quotient smooth on the interval, the fitted sum is kept non-negative there, where the absolute value does nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from polytrope.ops.fitting.refinement import refine

Array = np.ndarray


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
    x: Array, weights: Array, value: Array, slope: Array, degrees: tuple[int, int], derivative_weight: float
) -> tuple[Quotient, float]:
    """Least squares of value and slope; also the condition number of the last linearised problem."""
    p, q = degrees
    reach = float(np.abs(x).max())
    t = x / reach  # powers of a variable in [-1, 1]
    powers, power_slopes = _powers(t, max(p, q))
    power_slopes = power_slopes / reach
    root, factor = np.sqrt(weights), math.sqrt(derivative_weight)
    top, top_slope = powers[:, : p + 1], power_slopes[:, : p + 1]
    # Even powers only start the denominator: x^2, x^4, … with non-negative sums.
    low, low_slope = powers[:, 1 : q + 1], power_slopes[:, 1 : q + 1]
    below, below_slope = np.ones_like(x), np.zeros_like(x)
    solution, condition = np.zeros(p + 1 + q), 1.0
    best: tuple[float, Array] = (math.inf, solution)
    for _ in range(12):
        # With the last denominator D as weight: (P - f Q) / D and its derivative vanish at an exact fit.
        rows = np.concatenate([top, -value[:, None] * low], axis=1)
        row_slopes = np.concatenate([top_slope, -(slope[:, None] * low + value[:, None] * low_slope)], axis=1)
        first = rows / below[:, None]
        second = row_slopes / below[:, None] - rows * (below_slope / below**2)[:, None]
        right_first = value / below
        right_second = slope / below - value * below_slope / below**2
        matrix = np.concatenate([first * root[:, None], factor * second * root[:, None]])
        right = np.concatenate([right_first * root, factor * right_second * root])
        scale = np.linalg.norm(matrix, axis=0)
        found, _, _, singular = np.linalg.lstsq(matrix / scale, right, rcond=1e-10)
        condition = float(singular[0] / max(singular[-1], 1e-300))
        solution = found / scale
        inner = low @ solution[p + 1 :]
        residual, _ = _residuals(solution, p, top, top_slope, low, low_slope, value, slope, root, factor)
        cost = float(residual @ residual)
        if cost < best[0]:
            best = (cost, solution)
        below, below_slope = 1.0 + np.abs(inner), np.where(inner < 0, -1.0, 1.0) * (low_slope @ solution[p + 1 :])
    starts = [best[1]]
    for curvature in (0.5, 2.0, 8.0):  # bells 1 + c t²: a fit that never crosses the fold of the absolute value
        bell = np.zeros(q)
        if q >= 2:
            bell[1] = curvature
        under = 1.0 + low @ bell
        columns = top / under[:, None]
        linear = np.linalg.lstsq(columns * root[:, None], value * root, rcond=None)[0]
        starts.append(np.concatenate([linear, bell]))
    refined = [
        refine(lambda flat: _residuals(flat, p, top, top_slope, low, low_slope, value, slope, root, factor), start)
        for start in starts
    ]
    solution = min(refined, key=lambda entry: entry[1])[0]
    numerator = solution[: p + 1] / reach ** np.arange(p + 1)
    denominator = solution[p + 1 :] / reach ** np.arange(1, q + 1)
    return Quotient(numerator, denominator), condition


def _residuals(
    flat: Array,
    p: int,
    top: Array,
    top_slope: Array,
    low: Array,
    low_slope: Array,
    value: Array,
    slope: Array,
    root: Array,
    factor: float,
) -> tuple[Array, Array]:
    a, b = flat[: p + 1], flat[p + 1 :]
    inner = low @ b
    sign = np.where(inner < 0, -1.0, 1.0)
    below, below_slope = 1.0 + np.abs(inner), sign * (low_slope @ b)
    fitted = (top @ a) / below
    fitted_slope = (top_slope @ a - fitted * below_slope) / below
    residual = np.concatenate([(fitted - value) * root, factor * (fitted_slope - slope) * root])
    by_a = top / below[:, None]
    slope_by_a = (top_slope - by_a * below_slope[:, None]) / below[:, None]
    signed, signed_slope = sign[:, None] * low, sign[:, None] * low_slope
    by_b = -(fitted / below)[:, None] * signed
    slope_by_b = (
        -by_b * below_slope[:, None] - fitted[:, None] * signed_slope - fitted_slope[:, None] * signed
    ) / below[:, None]
    first, second = np.concatenate([by_a, by_b], axis=1), np.concatenate([slope_by_a, slope_by_b], axis=1)
    return residual, np.concatenate([first * root[:, None], factor * second * root[:, None]])


def _powers(x: Array, degree: int) -> tuple[Array, Array]:
    values = x[:, None] ** np.arange(degree + 1)
    slopes = np.zeros_like(values)
    slopes[:, 1:] = values[:, :-1] * np.arange(1, degree + 1)
    return values, slopes
