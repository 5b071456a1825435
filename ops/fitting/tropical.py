"""Best piecewise-linear fits, and their max-plus form: the tropical and tropical rational families.

Breakpoints are chosen by dynamic programming over a grid (the interpolating broken line costs the sum over its pieces),
then values are solved for by least squares and breakpoints refined by Gauss-Newton steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.refinement import Data, refine
from polytrope.ops.fitting.triangle import triangle_of

_GRID = 120  # candidate breakpoints
_INSERTED = 3  # breakpoints that are added at most to what the dynamic programming chose
_SWEEPS = 4


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


def fit_rational(data: Data, degree: int, kinks: list[float]) -> tuple[BrokenLine, dict[str, Array]]:
    """The best broken line with at most `degree` convex and `degree` concave breakpoints, and its max-plus form.

    Returns:
        The line, and `numerator_slopes`, `numerator_intercepts`, `denominator_slopes`, `denominator_intercepts` of
        max_k (p_k x + c_k) - max_k (q_k x + d_k), each `[degree + 1]`.
    """
    candidates = _candidates(data, kinks)
    line = _refined(_choose_breaks(candidates, data, degree), candidates, data, degree)
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


def fit_convex(data: Data, degree: int) -> tuple[BrokenLine, dict[str, Array]]:
    """The best (√2 / degree) max_k (k x + c_k): slopes are fixed, breakpoints and offset are fitted.

    Starts where the target's slope passes the middle between two neighbouring slopes (the best choice for the slope
    alone), then Gauss-Newton steps. Breakpoints outside the interval are lines that never win.
    """
    x = data.x
    step = math.sqrt(2.0) / degree
    rising = np.maximum.accumulate(data.slope)
    index = np.searchsorted(rising, (np.arange(degree) + 0.5) * step)
    beyond = x[-1] + np.arange(1, degree + 1) * 1e-3 * (x[-1] - x[0])
    breaks = np.where(index < len(x), x[np.minimum(index, len(x) - 1)], beyond)
    changes = np.full(degree, step)

    def model(flat: Array, x: Array) -> tuple[Array, Array, Array, Array]:
        beyond = x[:, :, None] - flat[:, None, 1:]
        passed = (beyond > 0).astype(np.float64)
        value, slope = flat[:, :1] + step * np.maximum(beyond, 0.0).sum(axis=2), step * passed.sum(axis=2)
        # The slope's jump at a break has no derivative there: its part of the Jacobian is that of the value only.
        by_value = np.concatenate([np.ones((*x.shape, 1)), -step * passed], axis=2)
        return value, slope, by_value, np.zeros_like(by_value)

    offset = float(data.weights @ (data.value - BrokenLine(0.0, 0.0, breaks, changes).evaluate(x)[0]))
    start, ends = np.concatenate([[offset], breaks]), np.array([[x[0], x[-1]]])
    flat = refine(model, start[None], ends, data, free_ends=False).parameters[0]
    line = BrokenLine(float(flat[0]), 0.0, np.sort(flat[1:]), changes)
    _, intercepts = line.lines()
    return line, {"coefficients": intercepts / step}


def _candidates(data: Data, kinks: list[float]) -> Array:
    """Grid of possible breakpoints: half of it even, half following the weight, the ends and the kinks."""
    x, cumulative = data.x, np.cumsum(data.weights)
    quantiles = np.interp(np.linspace(0.0, 1.0, _GRID // 2)[1:-1], cumulative / cumulative[-1], x)
    even = np.linspace(x[0], x[-1], _GRID // 2)
    points = np.unique(np.concatenate([even, quantiles, kinks]))
    return np.asarray(points[np.concatenate([[True], np.diff(points) > 1e-7 * (points[-1] - points[0])])])


def _choose_breaks(points: Array, data: Data, degree: int) -> Array:
    """Interior breakpoints of the best interpolating broken line, by dynamic programming.

    State: the last breakpoint, and how many convex and concave ones came before. Whether a breakpoint is convex is the
    sign of the target's second difference there.
    """
    cost = _segment_costs(points, np.interp(points, data.x, data.value), data)
    count = len(points)
    around = np.interp(points, data.x, data.slope)
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


def _segment_costs(points: Array, heights: Array, data: Data) -> Array:
    """`[a, b]`: cost of the straight piece from point a to point b, from prefix sums of moments."""
    x, weights, value, slope = data.x, data.weights, data.value, data.slope

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
    return np.asarray(np.maximum(value_cost + data.derivative_weight * slope_cost, 0.0))


def _refined(breaks: Array, candidates: Array, data: Data, degree: int) -> BrokenLine:
    x, right = data.x, data.right

    def solve(points: Array) -> tuple[BrokenLine, float]:
        beyond = np.subtract.outer(x, points)
        values = np.concatenate([np.ones((len(x), 1)), x[:, None], np.maximum(beyond, 0.0)], axis=1)
        slopes = np.concatenate([np.zeros((len(x), 1)), np.ones((len(x), 1)), (beyond > 0).astype(float)], axis=1)
        triangle, wanted, rest = triangle_of(data.rows(values, slopes), right)
        solution = np.linalg.lstsq(triangle, wanted, rcond=None)[0]
        missed = triangle @ solution - wanted
        return BrokenLine(float(solution[0]), float(solution[1]), points, solution[2:]), rest + float(missed @ missed)

    closest = 0.02 * math.sqrt(float(data.weights @ (x - data.weights @ x) ** 2))  # nearer breaks make a step

    def allowed(line: BrokenLine) -> bool:
        if len(line.breaks) > 1 and np.diff(line.breaks).min() < closest:
            return False
        return int((line.changes > 0).sum()) <= degree and int((line.changes < 0).sum()) <= degree

    def moved(line: BrokenLine, cost: float) -> tuple[BrokenLine, float]:
        """One breakpoint at a time between its neighbours: the cost is continuous but not smooth in them."""
        for width in (0.5, 0.25, 0.12, 0.06, 0.03, 0.015):
            for _ in range(_SWEEPS):
                before_sweep = cost
                for index in range(len(line.breaks)):
                    before, here, after = np.concatenate([[x[0]], line.breaks, [x[-1]]])[index : index + 3]
                    for target in (here - width * (here - before), here + width * (after - here)):
                        points = line.breaks.copy()
                        points[index] = target
                        candidate, candidate_cost = solve(points)
                        if candidate_cost < cost and allowed(candidate):
                            line, cost = candidate, candidate_cost
                if cost > before_sweep * (1 - 1e-3):
                    break
        return line, cost

    best, best_cost = solve(breaks)
    while not allowed(best):  # too many of one sign: the weakest of them goes
        sign = 1.0 if int((best.changes > 0).sum()) > degree else -1.0
        strength = np.where(best.changes * sign > 0, np.abs(best.changes), np.inf)
        best, best_cost = solve(np.delete(best.breaks, int(strength.argmin())))
    best, best_cost = moved(best, best_cost)
    for _ in range(min(_INSERTED, 2 * degree - len(best.breaks))):  # there may be room for more of the other sign
        tried = [solve(np.sort(np.append(best.breaks, point))) for point in candidates[1:-1]]
        possible = [entry for entry in tried if allowed(entry[0])]
        line, cost = min(possible, key=lambda entry: entry[1], default=(best, best_cost))
        if cost >= best_cost * (1 - 1e-3):
            break
        best, best_cost = moved(line, cost)
    return best
