"""Best piecewise-linear fits, and their max-plus form: the tropical and tropical rational families.

Breakpoints are chosen by dynamic programming over a grid (the interpolating broken line costs the sum over its pieces),
then values are solved for by least squares and breakpoints refined by Gauss-Newton steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from polytrope.ops.fitting.refinement import refine

Array = np.ndarray
_GRID = 120  # candidate breakpoints


@dataclass(frozen=True)
class BrokenLine:
    """offset + slope · x + Σ_k changes[k] · max(0, x - breaks[k]), breaks ascending."""

    offset: float
    slope: float
    breaks: Array
    changes: Array

    def evaluate(self, x: Array) -> tuple[Array, Array]:
        beyond = np.subtract.outer(x, self.breaks)
        value = self.offset + self.slope * x + np.maximum(beyond, 0.0) @ self.changes
        return value, self.slope + (beyond > 0.0).astype(np.float64) @ self.changes

    def lines(self) -> tuple[Array, Array]:
        """Slopes and intercepts of its pieces, left to right. For a convex broken line: F = max of these lines."""
        slopes = self.slope + np.concatenate([[0.0], np.cumsum(self.changes)])
        intercepts = self.offset - np.concatenate([[0.0], np.cumsum(self.changes * self.breaks)])
        return slopes, intercepts


def fit_rational(
    x: Array, weights: Array, value: Array, slope: Array, degree: int, derivative_weight: float, kinks: list[float]
) -> tuple[BrokenLine, dict[str, Array]]:
    """The best broken line with at most `degree` convex and `degree` concave breakpoints, and its max-plus form.

    Returns:
        The line, and `numerator_slopes`, `numerator_intercepts`, `denominator_slopes`, `denominator_intercepts` of
        max_k (p_k x + c_k) - max_k (q_k x + d_k), each `[degree + 1]`.
    """
    candidates = _candidates(x, weights, kinks)
    breaks = _choose_breaks(candidates, x, weights, value, slope, degree, derivative_weight)
    line = _refined(breaks, x, weights, value, slope, derivative_weight, degree)
    convex, concave = line.changes > 0, line.changes < 0
    upper = BrokenLine(line.offset, line.slope, line.breaks[convex], line.changes[convex])
    lower = BrokenLine(0.0, 0.0, line.breaks[concave], -line.changes[concave])
    parameters: dict[str, Array] = {}
    for name, part in (("numerator", upper), ("denominator", lower)):
        slopes, intercepts = part.lines()
        missing = degree + 1 - len(slopes)  # a line that is there twice changes nothing
        parameters[f"{name}_slopes"] = np.concatenate([slopes, np.repeat(slopes[-1:], missing)])
        parameters[f"{name}_intercepts"] = np.concatenate([intercepts, np.repeat(intercepts[-1:], missing)])
    return line, parameters


def fit_convex(
    x: Array, weights: Array, value: Array, slope: Array, degree: int, derivative_weight: float
) -> tuple[BrokenLine, dict[str, Array]]:
    """The best (√2 / degree) max_k (k x + c_k): slopes are fixed, breakpoints and offset are fitted.

    Starts where the target's slope passes the middle between two neighbouring slopes (the best choice for the slope
    alone), then Gauss-Newton steps. Breakpoints outside the interval are lines that never win.
    """
    step = math.sqrt(2.0) / degree
    order = np.argsort(x)
    rising = np.maximum.accumulate(slope[order])
    levels = (np.arange(degree) + 0.5) * step
    index = np.searchsorted(rising, levels)
    beyond = x.max() + np.arange(1, degree + 1) * 1e-3 * (x.max() - x.min())
    breaks = np.where(index < len(x), x[order][np.minimum(index, len(x) - 1)], beyond)
    root, factor = np.sqrt(weights), math.sqrt(derivative_weight)
    changes = np.full(degree, step)

    def residuals(flat: Array) -> tuple[Array, Array]:
        line = BrokenLine(float(flat[0]), 0.0, flat[1:], changes)
        fitted, fitted_slope = line.evaluate(x)
        residual = np.concatenate([(fitted - value) * root, factor * (fitted_slope - slope) * root])
        # The slope's jump at a break has no derivative there: its part of the Jacobian is that of the value only.
        passed = (np.subtract.outer(x, flat[1:]) > 0).astype(np.float64)
        jacobian = np.concatenate([np.ones((len(x), 1)), -step * passed], axis=1) * root[:, None]
        return residual, np.concatenate([jacobian, np.zeros_like(jacobian)])

    offset = float(weights @ (value - BrokenLine(0.0, 0.0, breaks, changes).evaluate(x)[0]))
    flat, _ = refine(residuals, np.concatenate([[offset], breaks]))
    line = BrokenLine(float(flat[0]), 0.0, np.sort(flat[1:]), changes)
    _, intercepts = line.lines()
    return line, {"coefficients": intercepts / step}


def _candidates(x: Array, weights: Array, kinks: list[float]) -> Array:
    """Grid of possible breakpoints: half of it even, half following the weight, the ends and the kinks."""
    order = np.argsort(x)
    cumulative = np.cumsum(weights[order])
    quantiles = np.interp(np.linspace(0.0, 1.0, _GRID // 2)[1:-1], cumulative / cumulative[-1], x[order])
    even = np.linspace(x.min(), x.max(), _GRID // 2)
    points = np.unique(np.concatenate([even, quantiles, kinks]))
    return np.asarray(points[np.concatenate([[True], np.diff(points) > 1e-7 * (points[-1] - points[0])])])


def _choose_breaks(
    points: Array, x: Array, weights: Array, value: Array, slope: Array, degree: int, derivative_weight: float
) -> Array:
    """Interior breakpoints of the best interpolating broken line, by dynamic programming.

    State: the last breakpoint, and how many convex and concave ones came before. Whether a breakpoint is convex is the
    sign of the target's second difference there.
    """
    order = np.argsort(x)
    x, weights, value, slope = x[order], weights[order], value[order], slope[order]
    heights = np.interp(points, x, value)
    cost = _segment_costs(points, heights, x, weights, value, slope, derivative_weight)
    count = len(points)
    around = np.interp(points, x, slope)
    bend = np.zeros(count)
    bend[1:-1] = around[2:] - around[:-2]
    convex = bend >= 0
    best = np.full((count, degree + 1, degree + 1), np.inf)
    origin = np.zeros((count, degree + 1, degree + 1), dtype=np.int64)
    best[0, 0, 0] = 0.0
    for end in range(1, count):
        # `best[start, i, j]` already counts the breakpoint at `start`.
        total = best[:end] + cost[:end, end, None, None]
        chosen = total.argmin(axis=0)
        reached = np.take_along_axis(total, chosen[None], axis=0)[0]
        if end == count - 1:
            best[end], origin[end] = reached, chosen
        elif convex[end]:
            best[end, 1:], origin[end, 1:] = reached[:-1], chosen[:-1]
        else:
            best[end, :, 1:], origin[end, :, 1:] = reached[:, :-1], chosen[:, :-1]
    i, j = np.unravel_index(int(best[-1].argmin()), best[-1].shape)
    breaks: list[float] = []
    current = int(origin[-1, i, j])
    while current > 0:
        breaks.append(float(points[current]))
        previous = int(origin[current, i, j])
        if convex[current]:
            i -= 1
        else:
            j -= 1
        current = previous
    return np.array(breaks[::-1])


def _segment_costs(
    points: Array, heights: Array, x: Array, weights: Array, value: Array, slope: Array, derivative_weight: float
) -> Array:
    """`[a, b]`: cost of the straight piece from point a to point b, from prefix sums of moments."""

    def prefix(terms: Array) -> Array:
        sums = np.concatenate([[0.0], np.cumsum(terms)])
        at = np.searchsorted(x, points)
        return sums[at]

    moments = {
        "1": prefix(weights),
        "x": prefix(weights * x),
        "xx": prefix(weights * x * x),
        "f": prefix(weights * value),
        "fx": prefix(weights * value * x),
        "ff": prefix(weights * value * value),
        "s": prefix(weights * slope),
        "ss": prefix(weights * slope * slope),
    }
    between = {name: sums[None, :] - sums[:, None] for name, sums in moments.items()}
    gaps = points[None, :] - points[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        p = (heights[None, :] - heights[:, None]) / gaps
    p = np.where(gaps > 0, p, 0.0)
    q = heights[:, None] - p * points[:, None]
    value_cost = (
        between["ff"]
        - 2 * p * between["fx"]
        - 2 * q * between["f"]
        + p * p * between["xx"]
        + 2 * p * q * between["x"]
        + q * q * between["1"]
    )
    slope_cost = between["ss"] - 2 * p * between["s"] + p * p * between["1"]
    return np.asarray(np.maximum(value_cost + derivative_weight * slope_cost, 0.0))


def _refined(
    breaks: Array, x: Array, weights: Array, value: Array, slope: Array, derivative_weight: float, degree: int
) -> BrokenLine:
    root, factor = np.sqrt(weights), math.sqrt(derivative_weight)
    right = np.concatenate([value * root, factor * slope * root])

    def matrix(points: Array) -> Array:
        beyond = np.subtract.outer(x, points)
        values = np.concatenate([np.ones((len(x), 1)), x[:, None], np.maximum(beyond, 0.0)], axis=1)
        slopes = np.concatenate([np.zeros((len(x), 1)), np.ones((len(x), 1)), (beyond > 0).astype(float)], axis=1)
        return np.concatenate([values * root[:, None], factor * slopes * root[:, None]])

    def solve(points: Array) -> tuple[BrokenLine, float]:
        columns = matrix(points)
        solution = np.linalg.lstsq(columns, right, rcond=None)[0]
        residual = columns @ solution - right
        return BrokenLine(float(solution[0]), float(solution[1]), points, solution[2:]), float(residual @ residual)

    def allowed(line: BrokenLine) -> bool:
        return int((line.changes > 0).sum()) <= degree and int((line.changes < 0).sum()) <= degree

    best, best_cost = solve(breaks)
    while not allowed(best):  # too many of one sign: the weakest of them goes
        sign = 1.0 if int((best.changes > 0).sum()) > degree else -1.0
        strength = np.where(best.changes * sign > 0, np.abs(best.changes), np.inf)
        best, best_cost = solve(np.delete(best.breaks, int(strength.argmin())))
    # Move one breakpoint at a time between its neighbours: the cost is continuous but not smooth in them.
    for width in (0.5, 0.25, 0.12, 0.06, 0.03, 0.015):
        for index in range(len(best.breaks)):
            around = np.concatenate([[x.min()], best.breaks, [x.max()]])
            here, before, after = around[index + 1], around[index], around[index + 2]
            for target in (here - width * (here - before), here + width * (after - here)):
                points = best.breaks.copy()
                points[index] = target
                line, cost = solve(points)
                if cost < best_cost and allowed(line):
                    best, best_cost = line, cost
    return best
