"""Where a function should end and its tangent lines begin, for inputs of a measured distribution.

A polynomial with tangent lines outside (lo, hi) is still linear in its coefficients, so for given ends the best one
is a linear least-squares problem over *all* inputs, and one problem of degree d has those of all lower degrees in it.
The best ends of every degree are found together: first on a grid of intervals (quantiles, and around kinks), then by
Gauss-Newton steps for the ends from the best of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.refinement import Data, Ends

# Ends `[intervals, 1]`, points → values and slopes `[intervals, points, functions]`, tangents included; the first
# k + 1 functions are those of degree k. As many for all searches: their number tells on the last bits.
Columns = Callable[[Array, Array, Array], tuple[Array, Array]]
SHARES = (0.03, 0.003)  # of the inputs beyond each end, to start from
_TURNS = (0.03, 0.003)  # of the target's, likewise
_GRID_SHARES = (0.0, 0.0002, 0.003, 0.03, 0.1, 0.2, 0.35)
_AROUND_KINKS = (0.1, 0.3, 1.0)  # standard deviations
_SMALLEST = 0.2  # width of an interval, in standard deviations: around a kink a fit would become ever steeper
_STARTS = 3  # per degree
_STEPS = 12
_RIDGE = 1e-13  # of columns of length 1: what float64 can tell from dependent ones


def best_intervals(data: Data, kinks: Sequence[float], columns: Columns, degree: int) -> list[Ends]:
    """The ends (lo, hi) for which the best combination of functions with tangent lines has the least Sobolev error.

    Returns:
        Those of degree 0, 1, … `degree`. The error of each is at most that of the one before: what is found for a
        degree is tried for all higher ones.
    """
    around = one_place(data)
    if around is not None:
        return [around] * (degree + 1)
    search = _Search(data, columns, deviation_of(data))
    tried = search.grid(kinks)
    costs = search.costs(tried)
    starts = [(k, ends) for k in range(1, degree + 1) for ends in search.apart(tried, costs[:, k])]
    degrees = np.array([k for k, _ in starts])
    refined = search.refined(np.array([ends for _, ends in starts]), degrees)
    # A degree takes what lower ones led to as well, so that it never depends on how high the search goes.
    tried, costs = np.concatenate([tried, refined]), np.concatenate([costs, search.costs(refined)])
    first = np.concatenate([np.zeros(len(tried) - len(refined), dtype=int), degrees])
    best = [int(np.where(first <= k, costs[:, k], np.inf).argmin()) for k in range(1, degree + 1)]
    again = search.refined(tried[best], np.arange(1, degree + 1))
    every = np.concatenate([tried[best], again])
    costs = search.costs(every)
    first = np.concatenate([np.arange(1, degree + 1)] * 2)
    return [rounded(*every[int(np.where(first <= max(k, 1), costs[:, k], np.inf).argmin())]) for k in range(degree + 1)]


def one_place(data: Data) -> Ends | None:
    """The interval of length 1 around inputs that are all nearly the same: none is the best. None: they are not."""
    low, high = float(data.x[0]), float(data.x[-1])
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return None
    middle = (low + high) / 2
    return middle - 0.5, middle + 0.5


def deviation_of(data: Data) -> float:
    """The standard deviation of the inputs."""
    return math.sqrt(float(data.weights @ (data.x - data.weights @ data.x) ** 2))


def starting_intervals(data: Data) -> list[Ends]:
    """Intervals beyond which a share of the inputs lies, or of the turns of the target's slope, on each side: where a
    target bends tells more than where its inputs are, once some lie far out. None much narrower than the standard
    deviation.
    """
    deviation = deviation_of(data)
    turns = np.abs(np.diff(data.slope))
    middles = (data.x[1:] + data.x[:-1]) / 2
    reached = np.cumsum(turns) - turns / 2
    found = []
    for low, high in [
        *(data.quantiles(share) for share in SHARES),
        *(np.interp([share * turns.sum(), (1.0 - share) * turns.sum()], reached, middles) for share in _TURNS),
    ]:
        middle = (float(low) + float(high)) / 2
        wide = high - low >= 0.1 * deviation
        found.append((float(low), float(high)) if wide else (middle - deviation, middle + deviation))
    return found


def rounded(low: float, high: float) -> Ends:
    """To three digits: they are enough, and make the choice independent of the last bits of the linear algebra."""
    digits = 3 - math.floor(math.log10(high - low))
    return round(float(low), digits), round(float(high), digits)


@dataclass(frozen=True)
class _Search:
    """Least-squares problems of many intervals at once, by normal equations: good to eight digits of an error."""

    data: Data
    columns: Columns
    deviation: float

    def grid(self, kinks: Sequence[float]) -> Array:
        """`[intervals, 2]`: between quantiles, and points around kinks."""
        x = self.data.x
        around = [kink + sign * step * self.deviation for kink in kinks for step in _AROUND_KINKS for sign in (-1, 1)]
        quantiles = [self.data.quantiles(share) for share in _GRID_SHARES]
        ends = [*(end for pair in quantiles for end in pair), *around, float(x[0]), float(x[-1])]
        ends = sorted({float(end) for end in np.clip(ends, x[0], x[-1])})
        pairs = [pair for pair in itertools.combinations(ends, 2) if pair[1] - pair[0] >= _SMALLEST * self.deviation]
        return np.array(pairs or [(x[0], x[-1])])

    def apart(self, tried: Array, costs: Array) -> list[Array]:
        """The best intervals, but of those that nearly agree only one."""
        chosen: list[Array] = []
        for index in np.argsort(costs, kind="stable"):
            if all(np.abs(tried[index] - other).max() > 0.3 * self.deviation for other in chosen):
                chosen.append(tried[index])
            if len(chosen) == _STARTS:
                break
        return chosen

    def costs(self, ends: Array) -> Array:
        """`[intervals, functions]`: the least sum of squares of every degree."""
        return self._costs(*self._normal(*self._rows(ends)))

    def _costs(self, gram: Array, right: Array) -> Array:
        scale = np.sqrt(np.einsum("bkk->bk", gram))
        scale[scale == 0.0] = 1.0
        scaled = gram / scale[:, :, None] / scale[:, None, :] + _RIDGE * np.eye(gram.shape[-1])
        # With L Lᵀ = G and L z = h, the first k numbers of z are the solution of the first k columns.
        lower = np.linalg.cholesky(scaled)
        z = np.linalg.solve(lower, (right / scale)[:, :, None])[:, :, 0]
        return np.asarray(np.maximum(float(self.data.right @ self.data.right) - np.cumsum(z * z, axis=1), 0.0))

    def refined(self, ends: Array, degrees: Array) -> Array:
        """Each interval after Gauss-Newton steps for its ends, at its degree; never worse."""
        ends, degrees, result = ends.copy(), degrees.copy(), ends.copy()
        damping, active = np.full(len(ends), 1e-2), np.arange(len(ends))
        state = [*self._rows(ends)]
        state += self._normal(*state)
        cost = self._costs(*state[2:])[active, degrees]
        for _ in range(_STEPS):
            candidates = self._allowed(ends + self._step(ends, degrees, damping, *state))
            new_state = [*self._rows(candidates)]
            new_state += self._normal(*new_state)
            new = self._costs(*new_state[2:])[np.arange(len(ends)), degrees]
            better = new < cost
            going = np.where(better, cost - new > 1e-4 * cost, damping < 1e4)
            for old, replacement in zip((ends, cost, *state), (candidates, new, *new_state), strict=True):
                old[better] = replacement[better]
            result[active] = ends
            damping = np.where(better, damping / 5, damping * 8)
            if not going.any():
                break
            ends, degrees, cost, damping, active = (part[going] for part in (ends, degrees, cost, damping, active))
            state = [part[going] for part in state]
        return result

    def _rows(self, ends: Array) -> tuple[Array, Array]:
        """Values and slopes of the functions at all points, weighted: two `[intervals, points, functions]`."""
        values, slopes = self.columns(ends[:, :1], ends[:, 1:], self.data.x)
        root = np.sqrt(self.data.weights)[:, None]
        return values * root, slopes * (root * math.sqrt(self.data.derivative_weight))

    def _normal(self, values: Array, slopes: Array) -> tuple[Array, Array]:
        """Aᵀ A `[intervals, functions, functions]` and Aᵀ b `[intervals, functions]`."""
        value, slope = np.split(self.data.right, 2)
        gram = values.swapaxes(1, 2) @ values + slopes.swapaxes(1, 2) @ slopes
        return gram, value @ values + slope @ slopes

    def _step(
        self, ends: Array, degrees: Array, damping: Array, values: Array, slopes: Array, gram: Array, right: Array
    ) -> Array:
        """Gauss-Newton for the ends, the coefficients eliminated.

        Moving an end turns the tangent line about it: F(end) + F'(end) (x - end) changes by F''(end) (x - end).
        """
        data = self.data
        used = np.arange(gram.shape[1]) <= degrees[:, None]
        gram = gram * used[:, :, None] * used[:, None, :]
        coefficients = _solve(gram, right * used)
        low, high = ends[:, :1], ends[:, 1:]
        tiny = 1e-4 * (high - low)
        at_ends = self.columns(low, high, np.concatenate([low, low + tiny, high - tiny, high], axis=1))[1]
        slopes_there = (at_ends @ coefficients[:, :, None])[:, :, 0]
        bends = np.stack([slopes_there[:, 1] - slopes_there[:, 0], slopes_there[:, 3] - slopes_there[:, 2]], 1) / tiny
        root = np.sqrt(data.weights)
        outside = np.stack([data.x < low, data.x > high], axis=1) * bends[:, :, None] * root
        turned = outside * (data.x - ends[:, :, None])
        outside *= math.sqrt(data.derivative_weight)
        value, slope = np.split(data.right, 2)
        beside = (turned @ values + outside @ slopes) * used[:, None, :]
        corner = turned @ turned.swapaxes(1, 2) + outside @ outside.swapaxes(1, 2)
        whole = np.block([[gram, beside.swapaxes(1, 2)], [beside, corner]])
        wanted = np.concatenate([right * used, turned @ value + outside @ slope], axis=1)
        return _solve(whole, wanted, damping)[:, -2:]

    def _allowed(self, ends: Array) -> Array:
        """Within the inputs and not too narrow."""
        low, high = self.data.x[0], self.data.x[-1]
        smallest = min(_SMALLEST * self.deviation, high - low)
        ends = np.clip(ends, low, high)
        lacking = np.maximum(smallest - (ends[:, 1] - ends[:, 0]), 0.0) / 2
        ends = ends + np.stack([-lacking, lacking], axis=1)
        shift = np.maximum(low - ends[:, 0], 0.0) - np.maximum(ends[:, 1] - high, 0.0)
        return np.asarray(ends + shift[:, None])


def _solve(gram: Array, right: Array, damping: Array | None = None) -> Array:
    """Normal equations `[problems, columns, columns]`; the last two columns are damped where there is a damping."""
    scale = np.sqrt(np.einsum("bkk->bk", gram))
    scale[scale == 0.0] = 1.0
    scaled = gram / scale[:, :, None] / scale[:, None, :] + _RIDGE * np.eye(gram.shape[-1])
    diagonal = np.einsum("bkk->bk", scaled)
    diagonal[diagonal < 0.5] = 1.0  # columns of zeros
    if damping is not None:
        diagonal[:, -2:] += damping[:, None]
    return np.asarray(np.linalg.solve(scaled, (right / scale)[:, :, None])[:, :, 0] / scale)


def compressed(data: Data, count: int, exact: Callable[[Array], tuple[Array, Array]]) -> Data:
    """At most `count` points that stand for groups of neighbouring inputs.

    Groups are as wide as (density)^(-1/3): of all groupings the one with the least sum of weight · width² (Panter and
    Dite, 1951). Value and slope are the target's own at the groups' means, so that a perfect fit stays one.
    """
    x, weights = data.x, data.weights
    if len(x) <= count:
        return data
    widths = np.gradient(x)
    shares = np.cumsum(np.cbrt(weights * widths**2))
    groups = np.minimum((shares / shares[-1] * count).astype(int), count - 1)
    total = np.bincount(groups, weights)
    filled = total > 0
    points = np.bincount(groups, weights * x)[filled] / total[filled]
    return Data(points, total[filled], *exact(points), data.derivative_weight)
