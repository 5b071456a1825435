"""Quotients of polynomials without poles: linearised least squares (Sanathanan-Koerner), then Gauss-Newton steps.

The form is P(x) / (1 + |b_1 x + … + b_q x^q|) with P of degree p: the denominator is at least 1 everywhere. To keep the
quotient smooth on the interval, the fitted sum is kept non-negative there, where the absolute value does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.refinement import Data, Ends, Turn, best_of

_LINEARISED = 6  # problems from a start on
# Denominators 1 + c u², u in [-1, 1] on an interval: fits that never cross the fold of the absolute value.
_BELLS = (0.5, 2.0, 8.0)
_BELLED = 3  # the last intervals, where they are tried; of a higher degree the very last, of the degree below
_BELLED_DEGREE = 4
_RIDGE = 1e-12


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


def fit_quotients(
    data: Data, degrees: Sequence[tuple[int, int]], intervals: Sequence[Ends], free_ends: bool
) -> Iterator[tuple[Quotient, Ends, float]]:
    """Least squares of value and slope at all points, along tangent lines outside the interval.

    Args:
        degrees: of numerators and denominators, ascending; every quotient starts from the one before as well.
        intervals: to start from; one, or several with `free_ends`.
        free_ends: the ends of the interval are refined as well.

    Returns:
        For each of the degrees the quotient, the interval, and the condition number of its last linearised problem.
    """
    reach = max(abs(end) for end in intervals[0])  # powers of a variable in [-1, 1]
    below, last = np.zeros(0), intervals[0]
    for p, q in degrees:
        ends = np.array([*intervals, last] if free_ends else intervals)
        starts, condition = _starts(data, p, q, reach, ends)
        rounded = ends[-_BELLED:] if q <= _BELLED_DEGREE else ends[-1:]
        starts = np.concatenate([starts, *(_bells(end, q, reach) for end in rounded), _padded(below, q)])
        belled = np.repeat(rounded, len(_BELLS) if q >= 2 else 0, axis=0)
        ends = np.concatenate([ends, belled, [last]])
        numerator, below, last = best_of(partial(_model, p, reach), starts, ends, data, free_ends=free_ends)
        in_x = numerator / reach ** np.arange(p + 1), below / reach ** np.arange(1, q + 1)
        yield Quotient(*in_x), last, condition


def _starts(data: Data, p: int, q: int, reach: float, ends: Array) -> tuple[Array, float]:
    """Denominators `[starts, q]` in powers of x / reach: from linear problems, one for every interval; and the
    condition number of the last problem on the first.
    """
    u = data.x / reach
    powers, power_slopes = _powers(u, max(p, q))
    power_slopes = power_slopes / reach
    top, top_slope = powers[:, : p + 1], power_slopes[:, : p + 1]
    low, low_slope = powers[:, 1 : q + 1], power_slopes[:, 1 : q + 1]
    value, slope = data.value, data.slope
    inside = (data.x >= ends[:, :1]) & (data.x <= ends[:, 1:])
    root = np.sqrt(data.weights * inside)[:, :, None]
    factor = np.sqrt(data.derivative_weight)
    below, below_slope = np.ones(inside.shape), np.zeros(inside.shape)
    rows = np.concatenate([top, -value[:, None] * low], axis=1)
    row_slopes = np.concatenate([top_slope, -(slope[:, None] * low + value[:, None] * low_slope)], axis=1)
    least, best = np.full(len(ends), np.inf), np.zeros((len(ends), q))
    condition = 1.0
    for _ in range(_LINEARISED if q else 1):
        # With the last denominator D as weight: (P - f Q) / D and its derivative vanish at an exact fit.
        share, turn = 1.0 / below[:, :, None], (below_slope / below**2)[:, :, None]
        matrix = np.concatenate([rows * share * root, factor * root * (row_slopes * share - rows * turn)], axis=1)
        weighted = value[:, None] * share * root, factor * root * (slope[:, None] * share - value[:, None] * turn)
        solution, condition = _least_squares(matrix, np.concatenate(weighted, axis=1)[:, :, 0])
        numerator, denominator = solution[:, : p + 1], solution[:, p + 1 :]
        inner = denominator @ low.T
        below = 1.0 + np.abs(inner)
        below_slope = np.where(inner < 0, -1.0, 1.0) * (denominator @ low_slope.T)
        # The absolute value folds what is negative: the quotient that the problem meant is lost there.
        fitted = numerator @ top.T / below
        fitted_slope = (numerator @ top_slope.T - fitted * below_slope) / below
        missed = ((fitted - value) ** 2 + data.derivative_weight * (fitted_slope - slope) ** 2) * root[:, :, 0] ** 2
        cost = missed.sum(axis=1)
        better = cost < least
        least[better], best[better] = cost[better], denominator[better]
    return best, condition


def _bells(ends: Array, q: int, reach: float) -> Array:
    """Denominators `[starts, q]` in powers of x / reach, as wide as an interval."""
    bells = np.zeros((len(_BELLS) if q >= 2 else 0, q))
    if q >= 2:
        bells[:, 1] = np.array(_BELLS) * (reach / np.abs(ends).max()) ** 2
    return bells


def _padded(below: Array, q: int) -> Array:
    """The denominator of a lower degree: `[1, q]`."""
    return np.pad(below, (0, q - len(below)))[None]


def _least_squares(matrix: Array, right: Array) -> tuple[Array, float]:
    """Of `[problems, rows, columns]` by normal equations: these are only starts. And the first one's condition."""
    scale = np.sqrt(np.einsum("brk,brk->bk", matrix, matrix))
    scale[scale == 0.0] = 1.0
    scaled = matrix / scale[:, None]
    gram = scaled.swapaxes(1, 2) @ scaled + _RIDGE * np.eye(matrix.shape[2])
    solution = np.linalg.solve(gram, (right[:, None] @ scaled)[:, 0, :, None])[:, :, 0] / scale
    return solution, float(np.sqrt(np.linalg.cond(gram[0])))


def _model(p: int, reach: float, flat: Array, x: Array) -> tuple[Array, Array, Turn]:
    """Powers over the denominator, for the denominators `flat`."""
    q = flat.shape[1]
    powers, power_slopes = _powers(x / reach, max(p, q))
    power_slopes = power_slopes / reach
    low, low_slope = powers[..., 1 : q + 1], power_slopes[..., 1 : q + 1]
    inner = (low @ flat[:, :, None])[..., 0]
    sign = np.where(inner < 0, -1.0, 1.0)
    share = (1.0 / (1.0 + np.abs(inner)))[..., None]
    turned = (sign * (low_slope @ flat[:, :, None])[..., 0])[..., None] * share  # D' / D
    values = powers[..., : p + 1] * share
    slopes = power_slopes[..., : p + 1] * share - values * turned

    def turn(coefficients: Array, chosen: Array) -> tuple[Array, Array]:
        fitted, fitted_slope = values[chosen] @ coefficients[:, :, None], slopes[chosen] @ coefficients[:, :, None]
        part, along = low[chosen], -sign[chosen][..., None] * share[chosen]
        bent = fitted * low_slope[chosen] + (fitted_slope - fitted * turned[chosen]) * part
        return along * fitted * part, along * bent

    return values, slopes, turn


def _powers(u: Array, degree: int) -> tuple[Array, Array]:
    values, slopes = np.empty((*u.shape, degree + 1)), np.empty((*u.shape, degree + 1))
    values[..., 0], slopes[..., 0] = 1.0, 0.0
    for k in range(degree):
        values[..., k + 1] = values[..., k] * u
        slopes[..., k + 1] = (k + 1) * values[..., k]
    return values, slopes
