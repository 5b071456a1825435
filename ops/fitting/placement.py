"""Where a function should end and its tangent lines begin, for inputs of a measured distribution.

A polynomial with tangent lines outside (lo, hi) is still linear in its coefficients, so for given ends the best one
is a linear least-squares problem over *all* inputs. The two ends are found by a pattern search over those problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.refinement import Data, Ends
from polytrope.ops.fitting.triangle import triangle_of

# The ends → points → values and slopes `[points, functions]` of the functions that are combined, tangents included.
Columns = Callable[[Ends], Callable[[Array], tuple[Array, Array]]]
SHARES = (0.03, 0.003, 0.0002)  # of the inputs beyond each end, to start from
_SEARCH_POINTS = 384
_SMALLEST_STEP = 0.01  # of the standard deviation


def best_interval(data: Data, columns: Columns) -> Ends:
    """The ends (lo, hi) for which the best combination of functions with tangent lines has the least Sobolev error."""
    x = data.x
    if x[-1] - x[0] <= 1e-6 * max(abs(x[0]), abs(x[-1])):
        middle = float(x[0] + x[-1]) / 2
        return middle - 0.5, middle + 0.5
    data = compressed(data)
    deviation = math.sqrt(float(data.weights @ (data.x - data.weights @ data.x) ** 2))
    found = [_search(np.array(ends), deviation, data, columns) for ends in starting_intervals(data)]
    return rounded(*min(found, key=lambda entry: entry[1])[0])


def starting_intervals(data: Data) -> list[Ends]:
    """Intervals by quantiles, none much narrower than the standard deviation."""
    deviation = math.sqrt(float(data.weights @ (data.x - data.weights @ data.x) ** 2))
    found = []
    for share in SHARES:
        low, high = data.quantiles(share)
        middle = (low + high) / 2
        found.append((low, high) if high - low >= 0.1 * deviation else (middle - deviation, middle + deviation))
    return found


def rounded(low: float, high: float) -> Ends:
    """To three digits: they are enough, and make the choice independent of the last bits of the linear algebra."""
    digits = 3 - math.floor(math.log10(high - low))
    return round(float(low), digits), round(float(high), digits)


def _search(ends: Array, deviation: float, data: Data, columns: Columns) -> tuple[Array, float]:
    def cost(candidate: Array) -> float:
        values, slopes = columns((float(candidate[0]), float(candidate[1])))(data.x)
        return triangle_of(data.rows(values, slopes), data.right)[2]

    best, best_cost = ends, cost(ends)
    step = (ends[1] - ends[0]) / 8
    directions = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    while step > _SMALLEST_STEP * deviation:
        improved = False
        for direction in directions:
            candidate = best + step * direction
            if candidate[1] - candidate[0] < 0.2 * deviation or candidate[0] < data.x[0] or candidate[1] > data.x[-1]:
                continue
            here = cost(candidate)
            if here < best_cost * (1 - 1e-6):
                best, best_cost, improved = candidate, here, True
        if not improved:
            step /= 2
    return best, best_cost


def compressed(data: Data) -> Data:
    """Means of at most 384 groups of neighbouring inputs: half the groups of equal width, half of equal weight."""
    x, weights = data.x, data.weights
    if len(x) <= _SEARCH_POINTS:
        return data
    even = np.linspace(x[0], x[-1], _SEARCH_POINTS // 2)
    equal = np.interp(np.linspace(0, 1, _SEARCH_POINTS // 2), np.cumsum(weights), x)
    groups = np.searchsorted(np.unique(np.concatenate([even, equal])), x)
    total = np.bincount(groups, weights)
    filled = total > 0

    def mean(values: Array) -> Array:
        return np.asarray(np.bincount(groups, weights * values)[filled] / total[filled])

    return Data(mean(x), total[filled], mean(data.value), mean(data.slope), data.derivative_weight)
