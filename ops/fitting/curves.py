"""Functions as curves, x → value and slope in float64, and how they go on outside an interval."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Curve = Callable[[Array], tuple[Array, Array]]  # x → value, slope


def with_tangents(curve: Curve, low: float, high: float) -> Curve:
    """The curve inside [low, high], its tangents outside."""
    _, end_slopes = curve(np.array([low, high]))

    def extended(x: Array) -> tuple[Array, Array]:
        value, slope = curve(np.clip(x, low, high))
        value = value + end_slopes[0] * np.minimum(x - low, 0.0) + end_slopes[1] * np.maximum(x - high, 0.0)
        return value, np.where(x < low, end_slopes[0], np.where(x > high, end_slopes[1], slope))

    return extended
