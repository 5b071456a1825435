"""Levenberg-Marquardt for the few parameters that enter a fit nonlinearly: frequencies, denominators, ends.

Many starts are refined at once, by normal equations. The parameters that enter linearly are eliminated (variable
projection: Golub and Pereyra, 1973, with Kaufman's step): the path of the others alone is far straighter. A function
has tangent lines outside an interval; its value is differentiable in the ends of the interval as well, so these can be
refined in the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from polytrope.ops.fitting.curves import Array

Ends = tuple[float, float]
# Coefficients of the columns `[chosen, columns]`, which starts are chosen → the derivatives of value and slope by the
# nonlinear parameters, two `[chosen, points, parameters]`.
Turn = Callable[[Array, Array], tuple[Array, Array]]
# Nonlinear parameters `[starts, parameters]`, points `[starts, points]` → values and slopes of the columns that are
# combined, two `[starts, points, columns]`, and the derivatives of the combination.
Model = Callable[[Array, Array], tuple[Array, Array, Turn]]
_TRIED_STEPS = 4  # for every start, its ends fixed
_KEPT = 3
_KEPT_OF_FEW = 8  # where few columns are combined: steps cost little there, and minima lie far apart
_FEW_COLUMNS = 7
_MIDDLE_STEPS = 5  # for the best of them, from there and from their starts
_MIDDLE_STEPS_OF_FEW = 8
_LAST = 2
_LAST_OF_FEW = 4
_STEPS = 14
_RIDGE = 1e-13  # of columns of length 1: what float64 can tell from dependent ones
_GAIN = 1e-4  # of a step, below which the refinement of a start ends


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

    @cached_property
    def right(self) -> Array:
        """The target in the form of `rows`."""
        return self.rows(self.value, self.slope)

    @cached_property
    def roots(self) -> tuple[Array, Array]:
        """What `rows` multiplies values and slopes by: two `[points, 1]`."""
        root = np.sqrt(self.weights)[:, None]
        return root, math.sqrt(self.derivative_weight) * root

    def quantiles(self, share: float) -> Ends:
        """The ends of the interval that `share` of the weight lies beyond, on each side."""
        middles = np.cumsum(self.weights) - self.weights / 2
        low, high = np.interp([share, 1.0 - share], middles, self.x)
        return float(low), float(high)


def best_of(
    model: Model, starts: Array, ends: Array, data: Data, *, free_ends: bool, ridge: float = 0.0
) -> tuple[Array, Array, Ends]:
    """The best coefficients, nonlinear parameters and ends that any start leads to.

    Args:
        starts: nonlinear parameters `[starts, parameters]`.
        ends: `[starts, 2]`; with `free_ends` they are refined too, within the range of the points.
        ridge: weight of the coefficients' sum of squares, for columns that nearly depend on each other.
    """
    flat = np.concatenate([starts, np.clip(ends, data.x[0], data.x[-1]) if free_ends else ends], axis=1)
    tried = _refined(model, flat, data, free_ends=False, ridge=ridge, steps=_TRIED_STEPS)
    few = tried.coefficients.shape[1] <= _FEW_COLUMNS
    order = np.argsort(tried.costs, kind="stable")[: _KEPT_OF_FEW if few else _KEPT]
    flat = tried.flat[order]
    if free_ends:  # each way has led to the better minimum
        both = np.concatenate([tried.flat[order], np.concatenate([starts, ends], axis=1)[order]])
        middle_steps = _MIDDLE_STEPS_OF_FEW if few else _MIDDLE_STEPS
        middle = _refined(model, both, data, free_ends=True, ridge=ridge, steps=middle_steps)
        flat = middle.flat[np.argsort(middle.costs, kind="stable")[: _LAST_OF_FEW if few else _LAST]]
    found = _refined(model, flat, data, free_ends=free_ends, ridge=ridge, steps=_STEPS)
    best = int(found.costs.argmin())
    parameters, (low, high) = found.flat[best, :-2], found.flat[best, -2:]
    return found.coefficients[best], parameters, (float(low), float(high))


@dataclass(frozen=True)
class _State:
    """Where every start has come to.

    Args:
        flat: nonlinear parameters and ends.
        coefficients: the best for them.
        costs: sums of squares.
        gram, gradient: JᵀJ and Jᵀr of the free parameters, the coefficients eliminated.
    """

    flat: Array
    coefficients: Array
    costs: Array
    gram: Array
    gradient: Array

    def take(self, index: Array) -> _State:
        return _State(*(part[index] for part in vars(self).values()))

    def put(self, index: Array, other: _State) -> None:
        for old, new in zip(vars(self).values(), vars(other).values(), strict=True):
            old[index] = new


def _refined(model: Model, flat: Array, data: Data, *, free_ends: bool, ridge: float, steps: int) -> _State:
    """What each start leads to; never worse than the start."""
    smallest = 0.05 * (flat[:, -1] - flat[:, -2])
    damping, active = np.full(len(flat), 1e-3), np.arange(len(flat))
    state = _Trial.of(model, flat, data, ridge).linearised(active, free_ends)
    result = state.take(active)
    for _ in range(steps):
        scale = np.sqrt(np.maximum(np.einsum("bkk->bk", state.gram), 0.0))
        scale[scale <= 1e-12 * scale.max(axis=1, initial=0.0, keepdims=True)] = 1.0
        scaled = state.gram / scale[:, :, None] / scale[:, None, :]
        np.einsum("bkk->bk", scaled)[:] += damping[:, None]
        step = np.linalg.solve(scaled, (state.gradient / scale)[:, :, None])[:, :, 0] / scale
        candidates = state.flat.copy()
        candidates[:, : step.shape[1]] -= step
        if free_ends:
            candidates[:, -2:] = np.clip(candidates[:, -2:], data.x[0], data.x[-1])
        trial = _Trial.of(model, candidates, data, ridge)
        better = (trial.costs < state.costs) & (candidates[:, -1] - candidates[:, -2] >= smallest)
        before = state.costs.copy()
        if better.any():  # most steps are too long: what the next one needs is computed for the others alone
            chosen = np.flatnonzero(better)
            new = trial.linearised(chosen, free_ends)
            sound = np.isfinite(new.costs)
            better[chosen[~sound]] = False
            state.put(better, new.take(sound))
            result.put(active, state)
        going = np.where(better, before - state.costs > _GAIN * before, damping < 1e6)
        damping = np.where(better, np.maximum(damping / 8, 1e-12), damping * 6)
        if not going.any():
            break
        if not going.all():
            damping, active, smallest, state = damping[going], active[going], smallest[going], state.take(going)
    return result


@dataclass(frozen=True)
class _Trial:
    """Starts with the best coefficients for them.

    Args:
        flat: nonlinear parameters and ends.
        beyond: how far each point lies beyond the ends, `[starts, points, 1]`.
        at, slope_at: the columns in the form of `Data.rows`: two `[starts, points, columns]`.
        turn: of the model there.
        scale, inverse: lengths of the columns, and the inverse of their gram matrix once they are divided by these.
        missed, missed_slope: F less the target, in the same form.
        costs: sums of squares; inf where they cannot be told.
    """

    model: Model
    data: Data
    flat: Array
    beyond: Array
    at: Array
    slope_at: Array
    turn: Turn
    scale: Array
    inverse: Array
    coefficients: Array
    missed: Array
    missed_slope: Array
    costs: Array

    @classmethod
    def of(cls, model: Model, flat: Array, data: Data, ridge: float) -> _Trial:
        root, slope_root = data.roots
        value, slope = data.right[: len(data.x)], data.right[len(data.x) :]
        inside = np.clip(data.x, flat[:, -2:-1], flat[:, -1:])
        beyond = (data.x - inside)[:, :, None]
        with np.errstate(all="ignore"):  # a step too long is not taken
            columns, column_slopes, turn = model(flat[:, :-2], inside)
            at = (columns + beyond * column_slopes) * root
            slope_at = column_slopes * slope_root
            gram = at.swapaxes(1, 2) @ at + slope_at.swapaxes(1, 2) @ slope_at
            gram += ridge * np.eye(gram.shape[1])
            scale = np.sqrt(np.einsum("bkk->bk", gram))
            usable = np.isfinite(gram).all(axis=(1, 2))
            scale[(scale == 0.0) | ~usable[:, None]] = 1.0
            gram[~usable] = 0.0
            scaled = gram / scale[:, :, None] / scale[:, None, :]
            inverse = np.linalg.inv(scaled + _RIDGE * np.eye(gram.shape[1]))
            right = np.where(usable[:, None], value @ at + slope @ slope_at, 0.0)
            coefficients = (inverse @ (right / scale)[:, :, None])[:, :, 0] / scale
            missed = (at @ coefficients[:, :, None])[:, :, 0] - value
            missed_slope = (slope_at @ coefficients[:, :, None])[:, :, 0] - slope
            size = ridge * (coefficients**2).sum(axis=1)
            costs = (missed**2).sum(axis=1) + (missed_slope**2).sum(axis=1) + size
        costs = np.where(usable & np.isfinite(costs), costs, np.inf)
        return cls(
            model=model,
            data=data,
            flat=flat,
            beyond=beyond,
            at=at,
            slope_at=slope_at,
            turn=turn,
            scale=scale,
            inverse=inverse,
            coefficients=coefficients,
            missed=missed,
            missed_slope=missed_slope,
            costs=costs,
        )

    def linearised(self, chosen: Array, free_ends: bool) -> _State:
        """The state of some of the starts; its costs are inf where it cannot be told."""
        x, (root, slope_root) = self.data.x, self.data.roots
        flat, coefficients = self.flat[chosen], self.coefficients[chosen]
        at, slope_at, beyond = self.at[chosen], self.slope_at[chosen], self.beyond[chosen]
        with np.errstate(all="ignore"):
            by_value, by_slope = self.turn(coefficients, chosen)
            by_value = (by_value + beyond * by_slope) * root
            by_slope = by_slope * slope_root
            if free_ends:
                # Moving an end turns the tangent about it: F(end) + F'(end) (x - end) changes by F''(end) (x - end).
                low, high = flat[:, -2:-1], flat[:, -1:]
                tiny = 1e-5 * (high - low)
                ends = np.concatenate([low - tiny, low + tiny, high - tiny, high + tiny], axis=1)
                slopes = (self.model(flat[:, :-2], ends)[1] @ coefficients[:, :, None])[:, :, 0]
                bends = np.stack([slopes[:, 1] - slopes[:, 0], slopes[:, 3] - slopes[:, 2]], axis=1) / (2 * tiny)
                turned = np.stack([x < low, x > high], axis=2) * bends[:, None, :] * root
                by_value = np.concatenate([by_value, turned * beyond], axis=2)
                by_slope = np.concatenate([by_slope, math.sqrt(self.data.derivative_weight) * turned], axis=2)
            # What the coefficients can make up for is no part of the step.
            shared = at.swapaxes(1, 2) @ by_value + slope_at.swapaxes(1, 2) @ by_slope
            shared = shared / self.scale[chosen][:, :, None]
            gram = by_value.swapaxes(1, 2) @ by_value + by_slope.swapaxes(1, 2) @ by_slope
            gram = gram - shared.swapaxes(1, 2) @ (self.inverse[chosen] @ shared)
            gradient = (self.missed[chosen][:, None] @ by_value + self.missed_slope[chosen][:, None] @ by_slope)[:, 0]
        costs = self.costs[chosen]
        bad = ~(np.isfinite(gram).all(axis=(1, 2)) & np.isfinite(gradient).all(axis=1) & np.isfinite(costs))
        costs[bad], gram[bad], gradient[bad] = np.inf, 0.0, 0.0
        return _State(flat, coefficients, costs, gram, gradient)
