"""Levenberg-Marquardt for the few parameters that enter a fit nonlinearly: frequencies, breakpoints, denominators.

`refine_ends` does it for a function with tangent lines outside an interval. Its value is differentiable in the ends of
the interval as well, so these can be refined in the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.triangle import triangle_of

Ends = tuple[float, float]
Residuals = Callable[[Array], tuple[Array, Array]]  # parameters → residuals [m], Jacobian [m, parameters]
# parameters, points → values, slopes, and the derivatives of both by the parameters
Model = Callable[[Array, Array], tuple[Array, Array, Array, Array]]
_FREED = 4
_GAIN = 1e-6  # of a step, below which the refinement of a start ends


@dataclass(frozen=True)
class Data:
    """What is fitted: points, ascending, with weights of sum 1, values and slopes; λ of the Sobolev norm."""

    x: Array
    weights: Array
    value: Array
    slope: Array
    derivative_weight: float

    def within(self, ends: Ends) -> Data:
        """The points of an interval."""
        inside = (self.x >= ends[0]) & (self.x <= ends[1])
        x, weights, value, slope = (part[inside] for part in (self.x, self.weights, self.value, self.slope))
        return Data(x, weights / max(weights.sum(), 1e-300), value, slope, self.derivative_weight)

    def rows(self, values: Array, slopes: Array) -> Array:
        """Values and slopes at the points, weighted, one below the other: the squares add up to the Sobolev norm."""
        root = np.sqrt(self.weights)
        factor = math.sqrt(self.derivative_weight)
        return np.concatenate([(values.T * root).T, factor * (slopes.T * root).T])

    @property
    def right(self) -> Array:
        """The target in the form of `rows`."""
        return self.rows(self.value, self.slope)

    def quantiles(self, share: float) -> Ends:
        """The ends of the interval that `share` of the weight lies beyond, on each side."""
        middles = np.cumsum(self.weights) - self.weights / 2
        low, high = np.interp([share, 1.0 - share], middles, self.x)
        return float(low), float(high)


def refine(residuals: Residuals, start: Array, steps: int = 60, tolerance: float = 1e-12) -> tuple[Array, float]:
    """The best parameters found from `start`, and their sum of squares; never worse than the start."""
    parameters = start.astype(np.float64)
    residual, jacobian = residuals(parameters)
    cost, damping = float(residual @ residual), 1e-3
    for _ in range(steps):
        scale = np.linalg.norm(jacobian, axis=0)
        scale[scale < 1e-12] = 1.0
        triangle, wanted, _ = triangle_of(jacobian / scale, -residual)
        improved = False
        while damping < 1e10:
            stacked = np.concatenate([triangle, np.sqrt(damping) * np.eye(len(parameters))])
            step = np.linalg.lstsq(stacked, np.concatenate([wanted, np.zeros(len(parameters))]), rcond=None)[0]
            candidate = parameters + step / scale
            new_residual, new_jacobian = residuals(candidate)
            new_cost = float(new_residual @ new_residual)
            if np.isfinite(new_cost) and np.isfinite(new_jacobian).all() and new_cost < cost:
                improved = True
                break
            damping *= 4.0
        if not improved:
            break
        gain = (cost - new_cost) / max(cost, 1e-300)
        parameters, residual, jacobian, cost = candidate, new_residual, new_jacobian, new_cost
        damping = max(damping / 6.0, 1e-12)
        if gain < tolerance:
            break
    return parameters, cost


def refine_ends(
    model: Model, start: Array, ends: Ends, data: Data, *, free_ends: bool, steps: int = 60
) -> tuple[Array, Ends, float]:
    """The best parameters of a function with tangent lines outside `ends`, over all points; with `free_ends` the best
    ends too, within the range of the points. Returns parameters, ends, and the sum of squares.
    """
    if free_ends:
        ends = max(ends[0], float(data.x[0])), min(ends[1], float(data.x[-1]))
    smallest = 0.05 * (ends[1] - ends[0])

    def residuals(flat: Array) -> tuple[Array, Array]:
        parameters, low, high = (flat[:-2], flat[-2], flat[-1]) if free_ends else (flat, *ends)
        if free_ends and (high - low < smallest or low < data.x[0] or high > data.x[-1]):
            return np.full(2 * len(data.x), np.inf), np.full((2 * len(data.x), len(flat)), np.inf)
        inside = np.clip(data.x, low, high)
        beyond = data.x - inside
        value, slope, by_value, by_slope = model(parameters, inside)
        value, by_value = value + beyond * slope, by_value + beyond[:, None] * by_slope
        jacobian = data.rows(by_value, by_slope)
        if free_ends:
            # Moving an end turns the tangent line about it: F(end) + F'(end) (x - end) changes by F''(end) (x - end).
            tiny = 1e-5 * (high - low)
            around = model(parameters, np.array([low - tiny, low + tiny, high - tiny, high + tiny]))[1]
            bends = (around[1] - around[0]) / (2 * tiny), (around[3] - around[2]) / (2 * tiny)
            outside = np.stack([(data.x < low) * bends[0], (data.x > high) * bends[1]], axis=1)
            jacobian = np.concatenate([jacobian, data.rows(beyond[:, None] * outside, outside)], axis=1)
        return data.rows(value, slope) - data.right, jacobian

    flat, cost = refine(residuals, np.concatenate([start, ends]) if free_ends else start, steps, _GAIN)
    if free_ends:
        return flat[:-2], (float(flat[-2]), float(flat[-1])), cost
    return flat, ends, cost


def best_of(
    starts: Sequence[tuple[Model, Array, Ends]], data: Data, *, free_ends: bool, steps: int = 60
) -> tuple[int, Array, Ends, float]:
    """The best of several starts (model, parameters, ends): its number, parameters, ends and sum of squares.

    All are refined for their own ends first, a little. Then the ends of the best few too, both from there and from
    their starts: each way has led to the better minimum.
    """
    found = []
    for number, (model, start, ends) in enumerate(starts):
        flat, _, cost = refine_ends(model, start, ends, data, free_ends=False, steps=15 if free_ends else steps)
        found.append((number, flat, ends, cost))
    found.sort(key=lambda entry: entry[3])
    if free_ends:
        free = [
            (number, *refine_ends(starts[number][0], start, ends, data, free_ends=True, steps=steps))
            for number, flat, ends, _ in found[:_FREED]
            for start in (flat, starts[number][1])
        ]
        found = sorted(free, key=lambda entry: entry[3])
    return found[0]
