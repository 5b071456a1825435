"""Where a polynomial should end and its tangent lines begin, for inputs of a measured distribution.

A polynomial with tangent lines outside (lo, hi) is still linear in its coefficients, so for given ends the best one
is a linear least-squares problem over *all* inputs. The two ends are found by a pattern search over those problems.
"""

from __future__ import annotations

import math

import numpy as np

from polytrope.ops.fitting.polynomial import Basis

Array = np.ndarray
_SEARCH_POINTS = 384
_STARTS = (0.03, 0.003, 0.0002)  # share of the inputs beyond each end
_SMALLEST_STEP = 0.01  # of the standard deviation


def best_interval(
    x: Array, weights: Array, value: Array, slope: Array, degree: int, derivative_weight: float
) -> tuple[float, float]:
    """The ends (lo, hi) for which the best polynomial with tangent lines has the least Sobolev error.

    Args:
        x: inputs, ascending, with `weights` of sum 1, and the target's `value` and `slope` there.
    """
    if x[-1] - x[0] < 1e-6:
        middle = float(x[0] + x[-1]) / 2
        return middle - 0.5, middle + 0.5
    x, weights, value, slope = compressed(x, weights, value, slope)
    cumulative = np.cumsum(weights) - weights / 2
    deviation = math.sqrt(float(weights @ (x - weights @ x) ** 2))
    found = []
    for share in _STARTS:
        ends = np.interp([share, 1.0 - share], cumulative, x)
        if ends[1] - ends[0] < 0.1 * deviation:
            ends = np.array([ends.mean() - deviation, ends.mean() + deviation])
        found.append(_search(ends, deviation, x, weights, value, slope, degree, derivative_weight))
    low, high = min(found, key=lambda entry: entry[1])[0]
    # Three digits are enough, and make the choice independent of the last bits of the linear algebra.
    digits = 3 - math.floor(math.log10(high - low))
    return round(float(low), digits), round(float(high), digits)


def _search(
    ends: Array, deviation: float, x: Array, weights: Array, value: Array, slope: Array, degree: int, factor: float
) -> tuple[Array, float]:
    best, best_cost = ends, _cost(ends, x, weights, value, slope, degree, factor)
    step = (ends[1] - ends[0]) / 8
    directions = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    while step > _SMALLEST_STEP * deviation:
        improved = False
        for direction in directions:
            candidate = best + step * direction
            if candidate[1] - candidate[0] < 0.2 * deviation or candidate[0] < x[0] or candidate[1] > x[-1]:
                continue
            cost = _cost(candidate, x, weights, value, slope, degree, factor)
            if cost < best_cost * (1 - 1e-6):
                best, best_cost, improved = candidate, cost, True
        if not improved:
            step /= 2
    return best, best_cost


def _cost(ends: Array, x: Array, weights: Array, value: Array, slope: Array, degree: int, factor: float) -> float:
    basis = Basis(degree, (float(ends[0]), float(ends[1])))
    values, slopes = basis.evaluate_with_tangents(x)
    root = np.sqrt(weights)
    matrix, right = values * root[:, None], value * root
    if factor > 0:
        scale = math.sqrt(factor) * root
        matrix, right = np.concatenate([matrix, slopes * scale[:, None]]), np.concatenate([right, slope * scale])
    orthogonal, _ = np.linalg.qr(matrix)
    residual = right - orthogonal @ (orthogonal.T @ right)
    return float(residual @ residual)


def compressed(x: Array, weights: Array, value: Array, slope: Array) -> tuple[Array, Array, Array, Array]:
    """Means of at most 384 groups of neighbouring inputs: half the groups of equal width, half of equal weight."""
    if len(x) <= _SEARCH_POINTS:
        return x, weights, value, slope
    even = np.linspace(x[0], x[-1], _SEARCH_POINTS // 2)
    equal = np.interp(np.linspace(0, 1, _SEARCH_POINTS // 2), np.cumsum(weights), x)
    groups = np.searchsorted(np.unique(np.concatenate([even, equal])), x)
    total = np.bincount(groups, weights)
    filled = total > 0

    def mean(values: Array) -> Array:
        return np.asarray(np.bincount(groups, weights * values)[filled] / total[filled])

    return mean(x), total[filled], mean(value), mean(slope)
