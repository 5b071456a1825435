"""What is known about a fit: errors of value and slope on and off the interval, conditioning, moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from polytrope.ops.fitting.curves import Array, Curve

_CELLS = 4000


@dataclass(frozen=True)
class Certificate:
    """How good a fit F of f is.

    Maxima are bounds over the whole interval, not only over sample points: each adds what the slope at the ends of a
    grid cell allows inside it. Root mean squares and moments are under the weight of the fit.

    Args:
        maximum, rms: of |F - f| on the interval.
        maximum_derivative, rms_derivative: of |F' - f'| on the interval.
        maximum_outside, maximum_derivative_outside: the same maxima up to one interval length beyond each end, or
            as far as there are measured inputs.
        h1_mean_square: rms² + λ rms_derivative², what the fit minimised.
        condition: condition number of the least-squares matrix in the basis it was solved in (columns of length 1).
        float32_error: largest |F in float32 - F in float64| on the interval: rounding of the family's formula.
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
    float32_error: float
    target_mean: float
    fit_mean: float
    target_mean_square: float
    fit_mean_square: float
    target_derivative_mean_square: float
    fit_derivative_mean_square: float

    def to_dict(self) -> dict[str, float]:
        """As JSON-ready numbers."""
        return asdict(self)


def certify(
    target: Curve,
    fitted: Curve,
    rounded: Callable[[Array], Array],
    interval: tuple[float, float],
    kinks: list[float],
    nodes: tuple[Array, Array],
    reach: tuple[float, float],
    derivative_weight: float,
    condition: float,
) -> Certificate:
    """Measure everything of a `Certificate`.

    Args:
        target, fitted: f and F with their slopes, in float64.
        rounded: F as computed in float32.
        kinks: where f' jumps; grid points are put on both sides of each.
        nodes: points and weights (of sum 1) of the fit.
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
    rms = float(np.sqrt(weights @ error[3] ** 2))
    rms_derivative = float(np.sqrt(weights @ error_slope[3] ** 2))
    return Certificate(
        maximum=inside[0],
        rms=rms,
        maximum_derivative=inside[1],
        rms_derivative=rms_derivative,
        maximum_outside=max(pair[0] for pair in outside),
        maximum_derivative_outside=max(pair[1] for pair in outside),
        h1_mean_square=rms**2 + derivative_weight * rms_derivative**2,
        condition=float(condition),
        float32_error=float(np.abs(rounded(grid) - fit_value[0]).max()),
        target_mean=float(weights @ value[3]),
        fit_mean=float(weights @ fit_value[3]),
        target_mean_square=float(weights @ value[3] ** 2),
        fit_mean_square=float(weights @ fit_value[3] ** 2),
        target_derivative_mean_square=float(weights @ slope[3] ** 2),
        fit_derivative_mean_square=float(weights @ fit_slope[3] ** 2),
    )


def _grid(low: float, high: float, kinks: list[float]) -> Array:
    tiny = 1e-9 * (high - low)
    sides = [point for kink in kinks for point in (kink - tiny, kink + tiny) if low < point < high]
    return np.unique(np.concatenate([np.linspace(low, high, _CELLS + 1), sides]))


def _bounds(grid: Array, error: Array, error_slope: Array) -> tuple[float, float]:
    """Bounds of |e| and |e'| between the first and the last grid point, from e and e' at the points.

    Between two points of distance h, |e'| exceeds its larger end by at most h² max |e‴| / 8. Second differences of e'
    are h² e‴: the larger of the two at a cell is taken twice, as e‴ changes from cell to cell. Half of the change over
    the cell is taken where that is more, for a kink inside. Then |e| ≤ its larger end + h / 2 · max |e'|.
    """
    change = np.abs(np.diff(error_slope))
    curvature = np.pad(np.abs(np.diff(error_slope, 2)), 1, mode="edge")
    beyond = np.maximum(0.5 * change, 0.25 * np.maximum(curvature[1:], curvature[:-1]))
    slopes = np.maximum(np.abs(error_slope[1:]), np.abs(error_slope[:-1])) + beyond
    values = np.maximum(np.abs(error[1:]), np.abs(error[:-1])) + 0.5 * np.diff(grid) * slopes
    return float(values.max()), float(slopes.max())
