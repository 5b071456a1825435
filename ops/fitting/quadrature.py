"""Points and weights of a fit: composite Gauss-Legendre rules for a density, or the measured inputs themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.polynomial import legendre

from polytrope.ops.fitting.curves import Array

Measure = tuple[Array, Array]
Weight = str | Callable[[Array], Array] | Measure
Importance = Callable[[Array], Array]
GAUSSIAN_REACH = 14.0  # |x| beyond which even x^32 exp(-x²/2) is below the last digit of its integral
_NODES_PER_PANEL = 64
_PANELS = 12


def measured(weight: Measure) -> tuple[Array, Array]:
    """Points, ascending, and weights of sum 1 of a measured distribution: inputs and how often each was seen.

    Raises:
        ValueError: not two equally long rows of finite numbers, negative counts, or none at all.
    """
    points, counts = (np.asarray(part, dtype=np.float64) for part in weight)
    if points.ndim != 1 or points.shape != counts.shape or not len(points):
        raise ValueError("weight: expected (points, counts), two equally long rows of numbers")
    if not (np.isfinite(points).all() and np.isfinite(counts).all()) or (counts < 0).any() or counts.sum() <= 0:
        raise ValueError("weight: expected finite points with finite, non-negative counts that are not all zero")
    order = np.argsort(points, kind="stable")[counts[np.argsort(points, kind="stable")] > 0]
    return points[order], counts[order] / counts.sum()


def weighed(points: Array, counts: Array, importance: Importance) -> Array:
    """Weights of sum 1: how often each point was seen, times how much it counts.

    Raises:
        ValueError: an importance that is negative, not finite, or zero at all points.
    """
    factors = np.asarray(importance(points), dtype=np.float64)
    if factors.shape != points.shape or not np.isfinite(factors).all() or (factors < 0).any() or factors.max() <= 0:
        raise ValueError("importance: expected finite, non-negative values that are not all zero at the inputs")
    weights: Array = counts * factors
    return np.asarray(weights / weights.sum())


def nodes(
    low: float, high: float, breaks: Sequence[float], weight: str | Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Points and weights that sum to 1, such that weights @ g(points) is the mean of g under `weight`.

    Args:
        breaks: points where a panel must end (kinks of the integrand).
        weight: `uniform`, `gaussian` (the standard normal density) or a function w(x) ≥ 0, not necessarily normalised.

    Raises:
        ValueError: unknown weight; a density that is negative, not finite, or zero at all points.
    """
    edges = np.unique([*np.linspace(low, high, _PANELS + 1), *breaks])
    points, rule = _gauss_legendre()
    halves = np.diff(edges)[:, None] / 2
    x = (edges[:-1, None] + halves + halves * points).ravel()
    quadrature = (halves * rule).ravel()
    if callable(weight):
        density = np.asarray(weight(x), dtype=np.float64)
    elif weight == "uniform":
        density = np.ones_like(x)
    elif weight == "gaussian":
        density = np.exp(-0.5 * x * x)
    else:
        raise ValueError(f"weight: expected uniform, gaussian or a function of an array, got {weight!r}")
    if density.shape != x.shape or not np.isfinite(density).all() or (density < 0).any() or density.max() <= 0:
        raise ValueError("weight: expected finite, non-negative values that are not all zero on the interval")
    total = quadrature * density
    return x, total / total.sum()


@cache
def _gauss_legendre() -> tuple[Array, Array]:
    points, rule = legendre.leggauss(_NODES_PER_PANEL)
    return points, rule
