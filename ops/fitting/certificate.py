"""What is known about a fit: errors of value and slope on and off the interval, conditioning, moments."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from polytrope.ops.fitting.curves import Array, Curve

_CELLS = 4000
_ROUNDING_MARGIN = 2.0  # rounding is measured at thousands of points; between them it may be a little more


@dataclass(frozen=True)
class Certificate:
    """How good a fit F of f is, F as the module computes it in its floating-point format, inputs in that format too.

    Maxima of values are bounds over all inputs, not only over sample points. In a format of 16 bits every one of them
    is computed. In float32 they are bounds of F in exact arithmetic, which add what the slope at the ends of a grid
    cell allows inside it, and twice the largest rounding measured. Everything else is of F in exact arithmetic; means
    are under the weight of the fit, without an importance of the inputs.

    Args:
        maximum: of |F - f| on the interval.
        rms: root mean square of |F - f| over the inputs, or over those held out if that is more.
        maximum_derivative, rms_derivative: of |F' - f'| on the interval.
        maximum_outside, maximum_derivative_outside: the same maxima up to one interval length beyond each end, or
            as far as there are measured inputs.
        h1_mean_square: the mean of |F - f|² + λ |F' - f'|²: what the fit minimised, where all inputs count alike.
        condition: condition number of the least-squares matrix in the basis it was solved in (columns of length 1).
        rounding_error: largest |F in its format - F in float64| measured on the interval.
        target_mean, fit_mean: E[f], E[F].
        target_mean_square, fit_mean_square: E[f²], E[F²].
        target_derivative_mean_square, fit_derivative_mean_square: E[f'²], E[F'²].
    """

    maximum: float
    rms: float
    maximum_derivative: float
    rms_derivative: float
    maximum_outside: float
    maximum_derivative_outside: float
    h1_mean_square: float
    condition: float
    rounding_error: float
    target_mean: float
    fit_mean: float
    target_mean_square: float
    fit_mean_square: float
    target_derivative_mean_square: float
    fit_derivative_mean_square: float

    def to_dict(self) -> dict[str, float]:
        """As JSON-ready numbers."""
        return asdict(self)


@dataclass(frozen=True)
class Built:
    """A fit as it will run.

    Args:
        evaluate: x → F(x), computed by the module; x are numbers of its format.
        dtype: the format.
    """

    evaluate: Callable[[Array], Array]
    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> Built:
        """An elementwise module whose parameters are of this format."""

        def evaluate(points: Array) -> Array:
            with torch.no_grad():
                result: Array = module(torch.from_numpy(points).to(dtype)).double().numpy()
            return result

        return cls(evaluate, dtype)

    def rounding(self, fitted: Curve, x: Array) -> Array:
        """F as run less F in float64, at the numbers of the format nearest to x."""
        points = representable(x, self.dtype)
        return np.asarray(self.evaluate(points) - fitted(points)[0])

    def tolerates(self, lost: float, largest: float, tolerance: float) -> bool:
        """Whether a formula may lose that much to rounding.

        Args:
            largest: of |f|, what the tolerance is relative to; beside it stands what rounds any result in this format.
        """
        limits = torch.finfo(self.dtype)
        return lost <= (tolerance + 2 * limits.eps) * largest + float(limits.tiny)

    def every_number(self, low: float, high: float) -> Array | None:
        """All numbers of the format from low to high, if it has 16 bits."""
        if self.dtype.itemsize != 2:
            return None
        numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(self.dtype).double().numpy()
        return np.unique(numbers[(numbers >= low) & (numbers <= high)])


@dataclass(frozen=True)
class Inputs:
    """What a fit is measured on, as the format holds it.

    Args:
        points: first those of the fit, then raw inputs that it has not seen.
        value: the target's, there.
        weights: of the points of the fit, of sum 1.
    """

    points: Array
    value: Array
    weights: Array

    @classmethod
    def of(cls, target: Curve, dtype: torch.dtype, nodes: tuple[Array, Array], held_out: Array) -> Inputs:
        points = representable(np.concatenate([nodes[0], held_out]), dtype)
        return cls(points, target(points)[0], nodes[1])

    def errors(self, built: Built) -> Array:
        """F - f at all points, as run."""
        return np.asarray(built.evaluate(self.points) - self.value)

    def root_mean_square(self, built: Built) -> float:
        """Of these errors."""
        return root_mean_square(self.errors(built), self.weights)


def root_mean_square(error: Array, weights: Array, unseen_weights: Array | None = None) -> float:
    """Of errors at all points of `Inputs`: over those of the fit, or over the unseen ones if that is more.

    Args:
        error: `[points + unseen]`.
        weights: `[points]`, of sum 1.
        unseen_weights: `[unseen]`, of sum 1; None: all alike.
    """
    count = len(weights)
    counted = weights > 1e-30 * weights.max()  # far out it is nothing, and a polynomial may be anything
    seen = float(np.sqrt(weights[counted] @ error[:count][counted] ** 2))
    if count == len(error):
        return seen
    squares = error[count:] ** 2
    unseen = float(np.sqrt(np.mean(squares) if unseen_weights is None else unseen_weights @ squares))
    return max(seen, unseen)


def certify(
    target: Curve,
    fitted: Curve,
    built: Built,
    interval: tuple[float, float],
    kinks: list[float],
    nodes: tuple[Array, Array],
    rms: float,
    reach: tuple[float, float],
    derivative_weight: float,
    condition: float,
) -> Certificate:
    """Measure everything of a `Certificate`.

    Args:
        target, fitted: f and F with their slopes, in float64.
        kinks: where f' or F' jumps; grid points are put on both sides of each, and between them.
        nodes: points and weights (of sum 1) of the fit.
        rms: of `root_mean_square`.
        reach: smallest and largest measured input, or the interval again.
    """
    low, high = interval
    length = high - low
    x, weights = nodes
    grid = _grid(low, high, kinks)
    left = np.linspace(min(low - length, reach[0]), low, _CELLS // 4 + 1)
    right = np.linspace(high, max(high + length, reach[1]), _CELLS // 4 + 1)
    # Everything in one call: with a few hundred points each, the calls themselves are what takes time.
    ends = np.cumsum([len(part) for part in (grid, left, right)])
    everywhere = np.concatenate([grid, left, right, x])
    value, slope = (np.split(part, ends) for part in target(everywhere))
    fit_value, fit_slope = (np.split(part, ends) for part in fitted(everywhere))
    error, error_slope = (
        [fit - exact for fit, exact in zip(fits, exacts, strict=True)]
        for fits, exacts in ((fit_value, value), (fit_slope, slope))
    )
    inside, *outside = (
        _bounds(points, part, part_slope)
        for points, part, part_slope in zip((grid, left, right), error[:3], error_slope[:3], strict=True)
    )
    rounding = np.split(built.rounding(fitted, everywhere[: ends[2]]), ends[:2])
    every = built.every_number(float(left[0]), float(right[-1]))
    if every is None:
        share = float(torch.finfo(built.dtype).eps)
        maxima = [
            bound[0] + _ROUNDING_MARGIN * float(np.abs(off).max()) + share * float(np.abs(values).max())
            for bound, off, values in zip((inside, *outside), rounding, fit_value[:3], strict=True)
        ]
    else:
        errors = np.abs(built.evaluate(every) - target(every)[0])
        within = (every >= low) & (every <= high)
        maxima = [float(errors[part].max(initial=0.0)) for part in (within, every < low, every > high)]
    exact_rms, rms_derivative = (float(np.sqrt(weights @ part[3] ** 2)) for part in (error, error_slope))
    return Certificate(
        maximum=maxima[0],
        rms=rms,
        maximum_derivative=inside[1],
        rms_derivative=rms_derivative,
        maximum_outside=max(maxima[1:]),
        maximum_derivative_outside=max(pair[1] for pair in outside),
        h1_mean_square=exact_rms**2 + derivative_weight * rms_derivative**2,
        condition=float(condition),
        rounding_error=float(np.abs(rounding[0]).max()),
        target_mean=float(weights @ value[3]),
        fit_mean=float(weights @ fit_value[3]),
        target_mean_square=float(weights @ value[3] ** 2),
        fit_mean_square=float(weights @ fit_value[3] ** 2),
        target_derivative_mean_square=float(weights @ slope[3] ** 2),
        fit_derivative_mean_square=float(weights @ fit_slope[3] ** 2),
    )


def representable(x: Array, dtype: torch.dtype) -> Array:
    """The numbers of the format nearest to x."""
    rounded: Array = torch.from_numpy(np.ascontiguousarray(x)).to(dtype).double().numpy()
    return rounded


def _grid(low: float, high: float, kinks: list[float]) -> Array:
    tiny = 1e-9 * (high - low)
    # Between two kinks that are one but for rounding, the slope of either may be anything.
    apart = [pair for pair in itertools.pairwise(sorted(kinks)) if pair[1] - pair[0] > 2 * tiny]
    between = [(left + right) / 2 for left, right in apart]
    sides = [point for kink in kinks for point in (kink - tiny, kink + tiny)] + between
    sides = [point for point in sides if low < point < high]
    return np.unique(np.concatenate([np.linspace(low, high, _CELLS + 1), sides]))


def _bounds(grid: Array, error: Array, error_slope: Array) -> tuple[float, float]:
    """Bounds of |e| and |e'| between the first and the last grid point, from e and e' at the points.

    Between two points of distance h, |e'| exceeds its larger end by at most h² max |e‴| / 8. Second differences of e'
    are h² e‴: the larger of the two at a cell is taken twice, as e‴ changes from cell to cell. Half of the change over
    the cell is taken where that is more, for a kink inside. Then |e| ≤ its larger end + h / 2 · max |e'|; or + h · max
    |e'| where e changes by more than that over the cell: it jumps inside, and each side goes on from its own end.
    """
    change = np.abs(np.diff(error_slope))
    curvature = np.pad(np.abs(np.diff(error_slope, 2)), 1, mode="edge")
    beyond = np.maximum(0.5 * change, 0.25 * np.maximum(curvature[1:], curvature[:-1]))
    slopes = np.maximum(np.abs(error_slope[1:]), np.abs(error_slope[:-1])) + beyond
    steepest = np.diff(grid) * slopes
    reach = np.where(np.abs(np.diff(error)) > steepest, steepest, 0.5 * steepest)
    values = np.maximum(np.abs(error[1:]), np.abs(error[:-1])) + reach
    return float(values.max()), float(slopes.max())
