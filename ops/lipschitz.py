"""The largest slope of an activation between two inputs: its Lipschitz constant there."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from torch import nn

from polytrope.ops.moments import curve_of

_GRID = 20_001
_MOST_ROOTS = 512  # of a degree; of n roots the time grows with n³: compositions have degrees of many thousands
Method = Literal["roots", "search"]


class LargestSlope(NamedTuple):
    """max |F'| on an interval.

    Args:
        value: it.
        at: the input where it is reached.
        method: `roots`: of the second derivative of a polynomial of degree 512 or less, exact but for rounding;
            `search`: over 20,001 inputs (8 n of a polynomial of degree n, if that is more) and both sides of every
            kink, which may miss a little.
    """

    value: float
    at: float
    method: Method


def largest_slope(activation: nn.Module, low: float, high: float) -> LargestSlope:
    """The Lipschitz constant of F on [low, high].

    A polynomial is interpolated at as many Chebyshev points as it has coefficients, which gives itself; its slope is
    largest at an end or where the second derivative is 0. Where it goes on along tangents they add the ends' slopes.

    Raises:
        ValueError: low is not below high; an activation that is gated, has groups of channels or is not elementwise.
    """
    if not low < high:
        raise ValueError(f"expected low < high, got {low} and {high}")
    curve, kinks = curve_of(activation, low, high)
    degree = getattr(activation, "polynomial_degree", lambda: None)()
    if degree is None or degree > _MOST_ROOTS:
        sides = [kink + side * 1e-9 * max(1.0, abs(kink)) for kink in kinks for side in (-1, 1) if low < kink < high]
        x = np.concatenate([np.linspace(low, high, max(_GRID, 8 * (degree or 0))), np.clip(sides, low, high)])
        slopes = np.abs(curve(x)[1])
        return LargestSlope(float(slopes.max()), float(x[slopes.argmax()]), "search")
    first, last = getattr(activation, "interval", None) or (low, high)
    start, end = (float(np.clip(point, first, last)) for point in (low, high))
    x = np.array([start, end])
    if degree > 1 and start < end:
        series = np.polynomial.Chebyshev.interpolate(lambda points: curve(points)[0], degree, domain=[start, end])
        roots = series.deriv(2).roots() if degree > 2 else np.empty(0)
        inside = roots.real[np.abs(roots.imag) <= 1e-6 * (end - start)]  # a double root is a pair beside the line
        x = np.concatenate([x, np.clip(inside, start, end)])
    slopes = np.abs(curve(x)[1])
    return LargestSlope(float(slopes.max()), float(x[slopes.argmax()]), "roots")
