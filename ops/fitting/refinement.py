"""Levenberg-Marquardt for the few parameters that enter a fit nonlinearly: frequencies, breakpoints, denominators.

Many starts are refined at once, by normal equations. A function has tangent lines outside an interval; its value is
differentiable in the ends of the interval as well, so these can be refined in the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from polytrope.ops.fitting.curves import Array

Ends = tuple[float, float]
# Parameters `[starts, parameters]`, points `[starts, points]` → values, slopes `[starts, points]`, and the derivatives
# of both by the parameters `[starts, points, parameters]`.
Model = Callable[[Array, Array], tuple[Array, Array, Array, Array]]
_TRIED_STEPS = 12  # for every start
_STEPS = 40  # for the best of them
_KEPT = 3
_GAIN = 1e-5  # of a step, below which the refinement of a start ends


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


@dataclass(frozen=True)
class Found:
    """Parameters `[starts, parameters]`, ends `[starts, 2]` and sums of squares `[starts]`."""

    parameters: Array
    ends: Array
    costs: Array

    def take(self, index: Array) -> Found:
        return Found(self.parameters[index], self.ends[index], self.costs[index])


def best_of(model: Model, starts: Array, ends: Array, data: Data, *, free_ends: bool) -> tuple[Array, Ends, float]:
    """The best parameters that any start leads to, their ends and sum of squares; all get a few steps, the best more.

    Args:
        starts: `[starts, parameters]`.
        ends: `[starts, 2]`; with `free_ends` they are refined too, within the range of the points.
    """
    tried = refine(model, starts, ends, data, free_ends=free_ends, steps=_TRIED_STEPS)
    found = tried.take(np.argsort(tried.costs, kind="stable")[:_KEPT])
    found = refine(model, found.parameters, found.ends, data, free_ends=free_ends, steps=_STEPS)
    best = int(found.costs.argmin())
    low, high = found.ends[best]
    return found.parameters[best], (float(low), float(high)), float(found.costs[best])


def refine(model: Model, starts: Array, ends: Array, data: Data, *, free_ends: bool, steps: int = 60) -> Found:
    """What each start leads to; never worse than the start."""
    count = starts.shape[1]
    if free_ends:
        ends = np.clip(ends, data.x[0], data.x[-1])
    flat = np.concatenate([starts, ends], axis=1).astype(np.float64)
    result, costs = flat.copy(), np.full(len(flat), np.inf)
    smallest = 0.05 * (ends[:, 1] - ends[:, 0])
    damping, active = np.full(len(flat), 1e-3), np.arange(len(flat))
    state = _linearised(model, flat, count, data, free_ends)
    costs = state[0].copy()
    for _ in range(steps):
        cost, gram, gradient = state
        scale = np.sqrt(np.einsum("bkk->bk", gram))
        scale[scale <= 1e-12 * scale.max(axis=1, keepdims=True)] = 1.0
        scaled = gram / scale[:, :, None] / scale[:, None, :]
        np.einsum("bkk->bk", scaled)[:] += damping[:, None]
        step = np.linalg.solve(scaled, (gradient / scale)[:, :, None])[:, :, 0] / scale
        candidate = flat.copy()
        candidate[:, : step.shape[1]] -= step
        if free_ends:
            candidate[:, count:] = np.clip(candidate[:, count:], data.x[0], data.x[-1])
        new = _linearised(model, candidate, count, data, free_ends)
        better = (new[0] < cost) & (candidate[:, -1] - candidate[:, -2] >= smallest)
        better &= np.isfinite(new[1]).all(axis=(1, 2))
        going = np.where(better, cost - new[0] > _GAIN * cost, damping < 1e8)
        for old, replacement in zip((flat, *state), (candidate, *new), strict=True):
            old[better] = replacement[better]
        result[active], costs[active] = flat, cost
        damping = np.where(better, np.maximum(damping / 6, 1e-12), damping * 5)
        if not going.any():
            break
        if not going.all():
            flat, damping, active, smallest = (part[going] for part in (flat, damping, active, smallest))
            state = (cost[going], gram[going], gradient[going])
    return Found(result[:, :count], result[:, count:], costs)


def _linearised(
    model: Model, flat: Array, count: int, data: Data, free_ends: bool
) -> tuple[Array, Array, Array]:
    """Sums of squares, Jᵀ J and Jᵀ r of the parameters, and of the ends if they are free."""
    parameters, low, high = flat[:, :count], flat[:, -2:-1], flat[:, -1:]
    x, root, factor = data.x, np.sqrt(data.weights), math.sqrt(data.derivative_weight)
    inside = np.clip(x, low, high)
    beyond = x - inside
    with np.errstate(over="ignore", invalid="ignore"):  # a step too long is not taken
        value, slope, by_value, by_slope = model(parameters, inside)
        missed, missed_slope = root * (value + beyond * slope - data.value), factor * root * (slope - data.slope)
        by_value = (by_value + beyond[:, :, None] * by_slope) * root[:, None]
        by_slope = by_slope * (factor * root)[:, None]
        if free_ends:
            # Moving an end turns the tangent line about it: F(end) + F'(end) (x - end) changes by F''(end) (x - end).
            tiny = 1e-5 * (high - low)
            around = model(parameters, np.concatenate([low - tiny, low + tiny, high - tiny, high + tiny], axis=1))[1]
            bends = np.stack([around[:, 1] - around[:, 0], around[:, 3] - around[:, 2]], axis=1) / (2 * tiny)
            turned = np.stack([x < low, x > high], axis=2) * bends[:, None, :] * root[:, None]
            by_value = np.concatenate([by_value, turned * beyond[:, :, None]], axis=2)
            by_slope = np.concatenate([by_slope, factor * turned], axis=2)
        gram = by_value.swapaxes(1, 2) @ by_value + by_slope.swapaxes(1, 2) @ by_slope
        gradient = (missed[:, None] @ by_value + missed_slope[:, None] @ by_slope)[:, 0]
        cost = (missed**2).sum(axis=1) + (missed_slope**2).sum(axis=1)
    return np.nan_to_num(cost, nan=np.inf), gram, gradient
