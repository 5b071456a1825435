"""What is known about a fit: errors of value and slope on and off the interval, conditioning, moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

Array = np.ndarray
Curve = Callable[[Array], tuple[Array, Array]]  # x → value, slope
_CELLS = 4000


@dataclass(frozen=True)
class Certificate:
    """How good a fit F of f is.

    Maxima are bounds over the whole interval, not only over sample points: each adds what the slope at the ends of a
    grid cell allows inside it. Root mean squares and moments are under the weight of the fit.

    Args:
        maximum, rms: of |F - f| on the interval.
        maximum_derivative, rms_derivative: of |F' - f'| on the interval.
        maximum_outside, maximum_derivative_outside: the same maxima up to one interval length beyond each end.
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
    derivative_weight: float,
    condition: float,
) -> Certificate:
    """Measure everything of a `Certificate`.

    Args:
        target, fitted: f and F with their slopes, in float64.
        rounded: F as computed in float32.
        kinks: where f' jumps; grid points are put on both sides of each.
        nodes: points and weights (of sum 1) of the fit.
    """
    low, high = interval
    length = high - low
    grid = _grid(low, high, kinks)
    maximum, maximum_derivative = _bounds(grid, target, fitted)
    outside = [
        _bounds(np.linspace(start, stop, _CELLS // 4), target, fitted)
        for start, stop in ((low - length, low), (high, high + length))
    ]
    x, weights = nodes
    (value, slope), (fit_value, fit_slope) = target(x), fitted(x)
    rms = float(np.sqrt(weights @ (fit_value - value) ** 2))
    rms_derivative = float(np.sqrt(weights @ (fit_slope - slope) ** 2))
    return Certificate(
        maximum=maximum,
        rms=rms,
        maximum_derivative=maximum_derivative,
        rms_derivative=rms_derivative,
        maximum_outside=max(pair[0] for pair in outside),
        maximum_derivative_outside=max(pair[1] for pair in outside),
        h1_mean_square=rms**2 + derivative_weight * rms_derivative**2,
        condition=float(condition),
        float32_error=float(np.abs(rounded(grid) - fitted(grid)[0]).max()),
        target_mean=float(weights @ value),
        fit_mean=float(weights @ fit_value),
        target_mean_square=float(weights @ value**2),
        fit_mean_square=float(weights @ fit_value**2),
        target_derivative_mean_square=float(weights @ slope**2),
        fit_derivative_mean_square=float(weights @ fit_slope**2),
    )


def _grid(low: float, high: float, kinks: list[float]) -> Array:
    tiny = 1e-9 * (high - low)
    sides = [point for kink in kinks for point in (kink - tiny, kink + tiny) if low < point < high]
    return np.unique(np.concatenate([np.linspace(low, high, _CELLS + 1), sides]))


def _bounds(grid: Array, target: Curve, fitted: Curve) -> tuple[float, float]:
    """Bounds of |F - f| and |F' - f'| between the first and the last grid point.

    In a cell of width h, |e| ≤ max at its ends + h / 2 · max |e'|; for e', half of its change over the cell is added.
    """
    (value, slope), (fit_value, fit_slope) = target(grid), fitted(grid)
    error, error_slope = np.abs(fit_value - value), fit_slope - slope
    change = 0.5 * np.abs(np.diff(error_slope))
    ends = np.maximum(np.abs(error_slope[1:]), np.abs(error_slope[:-1])) + change
    cells = np.maximum(error[1:], error[:-1]) + 0.5 * np.diff(grid) * ends
    return float(cells.max()), float(ends.max())
