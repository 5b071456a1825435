"""Best piecewise-linear fits, and their max-plus form: the tropical and tropical rational families.

Breakpoints are chosen by dynamic programming over a grid (the interpolating broken line costs the sum over its pieces),
then values are solved for by least squares and breakpoints refined by Gauss-Newton steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from polytrope.ops.fitting.curves import Array, Curve
from polytrope.ops.fitting.refinement import Data
from polytrope.ops.fitting.targets import straight_slopes
from polytrope.ops.fitting.triangle import triangle_of

_GRID = 120  # candidate breakpoints
_INSERTED = 3  # breakpoints that are added at most to what the dynamic programming chose
_SWEEPS = 4
_PAIRED = 3  # of the candidates, every third is paired with every third
_BESIDE = 1e-3  # of the range of points and kinks: how far the pieces go on at least
_RIDGE = 1e-13  # of columns of length 1: what float64 can tell from dependent ones


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


def fit_rationals(
    exact: Curve, data: Data, degree: int, kinks: list[float]
) -> Iterator[tuple[BrokenLine, dict[str, Array]]]:
    """For degree 1, 2, … the best broken line with at most that many convex and as many concave breakpoints, and its
    max-plus form. A target that is such a line is taken as it is.

    Returns:
        The line, and `numerator_slopes`, `numerator_intercepts`, `denominator_slopes`, `denominator_intercepts` of
        max_k (p_k x + c_k) - max_k (q_k x + d_k), each `[degree + 1]`.
    """
    whole = _whole_line(exact, data, kinks)
    enough = degree + 1
    if whole is not None:
        enough = max(int((whole.changes > 0).sum()), int((whole.changes < 0).sum()), 1)
    searched = min(degree, enough - 1)
    candidates = _candidates(data, kinks)
    chosen = _choose_breaks(candidates, data, searched) if searched else []
    for count in range(1, degree + 1):
        if whole is not None and count >= enough:
            line = whole
        else:
            line = _refined(chosen[count - 1], candidates, data, count)
        convex, concave = line.changes > 0, line.changes < 0
        upper = BrokenLine(line.offset, line.slope, line.breaks[convex], line.changes[convex])
        lower = BrokenLine(0.0, 0.0, line.breaks[concave], -line.changes[concave])
        parameters: dict[str, Array] = {}
        for name, part in (("numerator", upper), ("denominator", lower)):
            slopes, intercepts = part.lines()
            missing = count + 1 - len(slopes)  # a line that is there twice changes nothing
            parameters[f"{name}_slopes"] = np.concatenate([slopes, np.repeat(slopes[-1:], missing)])
            parameters[f"{name}_intercepts"] = np.concatenate([intercepts, np.repeat(intercepts[-1:], missing)])
        yield line, parameters


def _whole_line(exact: Curve, data: Data, kinks: list[float]) -> BrokenLine | None:
    """The target where it is made of straight lines between its kinks, as far as the points go; None: it is not."""
    breaks = np.array(kinks)
    low, high = min([data.x[0], *kinks]), max([data.x[-1], *kinks])
    beside = _BESIDE * (high - low if high > low else 1.0)  # a kink may lie beyond the points: inputs are joined there
    low, high = min([data.x[0], *(breaks - beside)]), max([data.x[-1], *(breaks + beside)])
    slopes = straight_slopes(exact, np.array([low, *breaks, high]))
    if slopes is None:
        return None
    changes = np.diff(slopes)
    bent = np.abs(changes) > 1e-9 * np.abs(slopes).max()
    offset = float(exact(np.array([low]))[0][0] - slopes[0] * low)
    return BrokenLine(offset, float(slopes[0]), breaks[bent], changes[bent])


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

    def residuals(flat: Array) -> tuple[Array, Array]:
        line = BrokenLine(float(flat[0]), 0.0, flat[1:], changes)
        # The slope's jump at a break has no derivative there: its part of the Jacobian is that of the value only.
        passed = (np.subtract.outer(x, flat[1:]) > 0).astype(np.float64)
        jacobian = np.concatenate([np.ones((len(x), 1)), -step * passed], axis=1)
        return data.rows(*line.evaluate(x)) - data.right, data.rows(jacobian, np.zeros_like(jacobian))

    offset = float(data.weights @ (data.value - BrokenLine(0.0, 0.0, breaks, changes).evaluate(x)[0]))
    flat = _gauss_newton(residuals, np.concatenate([[offset], breaks]))
    line = BrokenLine(float(flat[0]), 0.0, np.sort(flat[1:]), changes)
    _, intercepts = line.lines()
    return line, {"coefficients": intercepts / step}


def _gauss_newton(residuals: Callable[[Array], tuple[Array, Array]], start: Array) -> Array:
    """The best parameters found from `start` (Levenberg-Marquardt); never worse than the start.

    Args:
        residuals: parameters → residuals `[m]`, Jacobian `[m, parameters]`.
    """
    parameters, damping = start.astype(np.float64), 1e-3
    residual, jacobian = residuals(parameters)
    for _ in range(60):
        scale = np.linalg.norm(jacobian, axis=0)
        scale[scale == 0.0] = 1.0
        gram = (jacobian / scale).T @ (jacobian / scale) + damping * np.eye(len(start))
        candidate = parameters - np.linalg.solve(gram, residual @ jacobian / scale) / scale
        new = residuals(candidate)
        cost, new_cost = float(residual @ residual), float(new[0] @ new[0])
        if new_cost < cost:
            parameters, (residual, jacobian), damping = candidate, new, max(damping / 6, 1e-12)
            if cost - new_cost < 1e-10 * cost:
                break
        elif damping > 1e8:
            break
        else:
            damping *= 5
    return parameters


def _candidates(data: Data, kinks: list[float]) -> Array:
    """Grid of possible breakpoints: half of it even, half following the weight, the ends and the kinks."""
    x, cumulative = data.x, np.cumsum(data.weights)
    quantiles = np.interp(np.linspace(0.0, 1.0, _GRID // 2)[1:-1], cumulative / cumulative[-1], x)
    even = np.linspace(x[0], x[-1], _GRID // 2)
    points = np.unique(np.concatenate([even, quantiles, kinks]))
    return np.asarray(points[np.concatenate([[True], np.diff(points) > 1e-7 * (points[-1] - points[0])])])


def _choose_breaks(points: Array, data: Data, degree: int) -> list[Array]:
    """For degree 1, 2, … the interior breakpoints of the best interpolating broken line, by dynamic programming.

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
    return [_backwards(points, best[-1, : k + 1, : k + 1], origin, convex) for k in range(1, degree + 1)]


def _backwards(points: Array, last: Array, origin: Array, convex: Array) -> Array:
    """The breakpoints that led to the best of the last states."""
    i, j = np.unravel_index(int(last.argmin()), last.shape)
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
    """Breakpoints moved, and more of them where there is room; then the best line with them."""
    x = data.x
    sums = _Sums.of(data)
    closest = 0.02 * math.sqrt(float(data.weights @ (x - data.weights @ x) ** 2))  # nearer breaks make a step

    def costs(tried: Array) -> tuple[Array, Array]:
        """Sums of squares of the best lines with these breakpoints, inf where it is not allowed; their changes."""
        found, changes = sums.costs(tried)
        near = np.diff(tried, axis=1).min(axis=1, initial=np.inf) < closest
        many = np.maximum((changes > 0).sum(axis=1), (changes < 0).sum(axis=1)) > degree
        return np.where(near | many, np.inf, found), changes

    def moved(points: Array, cost: float) -> tuple[Array, float]:
        """Breakpoints between their neighbours: the cost is continuous but not smooth in them."""
        count = len(points)
        for width in (0.4, 0.16, 0.06, 0.02):
            for _ in range(_SWEEPS * max(count, 1)):
                gaps = np.diff(np.concatenate([[x[0]], points, [x[-1]]])) * width
                shifts = np.concatenate([np.diag(-gaps[:-1]), np.diag(gaps[1:])])
                each = costs(points + shifts)[0].reshape(2, count)
                # All that are better alone, together; or the best of them.
                best = each.argmin(axis=0)
                gain = each.min(axis=0) < cost
                if not gain.any():
                    break
                steps = np.where(best == 0, -gaps[:-1], gaps[1:])
                alone = steps * (np.arange(count) == each.min(axis=0).argmin())
                tried = points + np.stack([steps * gain, steps * gain / 2, alone])
                tried = tried[(np.diff(tried, axis=1) > 0).all(axis=1)]
                new = costs(tried)[0]
                before, cost, points = cost, float(new.min()), tried[int(new.argmin())]
                if cost > before * (1 - 1e-3):
                    break
        return points, cost

    points = breaks
    while True:  # too many of one sign: the weakest of them goes
        cost, changes = (part[0] for part in costs(points[None]))
        if np.isfinite(cost) or not len(points):
            break
        sign = 1.0 if int((changes > 0).sum()) > int((changes < 0).sum()) else -1.0
        points = np.delete(points, int(np.where(changes * sign > 0, np.abs(changes), np.inf).argmin()))
    between = candidates[1:-1]
    if degree == 1:  # there are few enough of them
        pairs = np.array(list(itertools.combinations(between[::_PAIRED], 2))).reshape(-1, 2)
        found = costs(pairs)[0]
        if found.min(initial=np.inf) < cost:
            points, cost = pairs[int(found.argmin())], float(found.min())
    points, cost = moved(points, float(cost))
    for _ in range(min(_INSERTED, 2 * degree - len(points))):  # there may be room for more of the other sign
        if not len(between):
            break
        tried = np.sort(np.concatenate([np.tile(points, (len(between), 1)), between[:, None]], axis=1))
        found = costs(tried)[0]
        longer, new = moved(tried[int(found.argmin())], float(found.min()))
        if not new < cost * (1 - 1e-3):
            break
        points, cost = longer, new
    return _line(points, data)


def _line(points: Array, data: Data) -> BrokenLine:
    """The best line with these breakpoints."""
    triangle, wanted, _ = triangle_of(data.rows(*(part[0] for part in _hinges(data.x, points[None]))), data.right)
    solution = np.linalg.lstsq(triangle, wanted, rcond=None)[0]
    return BrokenLine(float(solution[0]), float(solution[1]), points, solution[2:])


@dataclass(frozen=True)
class _Sums:
    """What the normal equations of broken lines are made of: sums over all points from each one on, `[points + 1]`.

    A hinge is a straight line beyond its breakpoint and 0 before, so that no product of two hinges needs the points.
    """

    data: Data
    weight: Array
    x: Array
    square: Array
    value: Array
    product: Array
    slope: Array
    total: float

    @classmethod
    def of(cls, data: Data) -> _Sums:
        x, weights, value, slope = data.x, data.weights, data.value, data.slope

        def beyond(terms: Array) -> Array:
            return np.append(np.cumsum((weights * terms)[::-1])[::-1], 0.0)

        return cls(
            data,
            weight=beyond(np.ones_like(x)),
            x=beyond(x),
            square=beyond(x * x),
            value=beyond(value),
            product=beyond(value * x),
            slope=beyond(slope),
            total=float(weights @ (value**2 + data.derivative_weight * slope**2)),
        )

    def costs(self, points: Array) -> tuple[Array, Array]:
        """Sums of squares of the best lines with the breakpoints `[lines, breaks]`, and their changes of slope."""
        share = self.data.derivative_weight
        lines, count = points.shape
        at = np.searchsorted(self.data.x, points, side="right")  # of the first point beyond
        weight, x, square = self.weight[at], self.x[at], self.square[at]
        gram, right = np.empty((lines, count + 2, count + 2)), np.empty((lines, count + 2))
        gram[:, 0, 0], gram[:, 0, 1] = self.weight[0], self.x[0]
        gram[:, 1, 1] = self.square[0] + share * self.weight[0]
        gram[:, 0, 2:] = x - points * weight
        gram[:, 1, 2:] = square - points * x + share * weight
        last = np.arange(count)
        last = np.maximum(last[:, None], last)  # breakpoints ascend: of two hinges, where the later one begins
        both = points[:, :, None] * points[:, None] + share
        sums = points[:, :, None] + points[:, None]
        gram[:, 2:, 2:] = square[:, last] - sums * x[:, last] + both * weight[:, last]
        gram[:, 1, 0], gram[:, 2:, :2] = gram[:, 0, 1], gram[:, :2, 2:].swapaxes(1, 2)
        right[:, 0], right[:, 1] = self.value[0], self.product[0] + share * self.slope[0]
        right[:, 2:] = self.product[at] - points * self.value[at] + share * self.slope[at]
        scale = np.sqrt(np.maximum(np.einsum("bkk->bk", gram), 0.0))
        scale[scale == 0.0] = 1.0
        scaled = gram / scale[:, :, None] / scale[:, None, :]
        wanted = (right / scale)[:, :, None]
        solution = np.linalg.solve(scaled + _RIDGE * np.eye(count + 2), wanted)
        costs = self.total + (solution * (scaled @ solution - 2 * wanted)).sum(axis=(1, 2))
        return np.maximum(costs, 0.0), solution[:, 2:, 0] / scale[:, 2:]


def _hinges(x: Array, points: Array) -> tuple[Array, Array]:
    """Values and slopes of 1, x and max(0, x - point): two `[lines, points of x, functions]`."""
    beyond = x[None, :, None] - points[:, None]
    one = np.ones((*beyond.shape[:2], 1))
    values = np.concatenate([one, one * x[:, None], np.maximum(beyond, 0.0)], axis=2)
    return values, np.concatenate([0.0 * one, one, (beyond > 0).astype(np.float64)], axis=2)
