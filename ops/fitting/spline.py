"""Rational-quadratic splines from values and slopes of a function at knots: no solver, only the knots are to be found.

Between knots h apart such a curve misses f by about h⁴ |f⁗|, as a cubic does, so under a density w of the inputs the
mean square is least where knots lie as densely as (w f⁗²)^(1/9) (de Boor, "Good approximation by splines with variable
knots", 1973, with a weight). Which interval, and how much of a line keeps the curve rising, the measured error tells.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from polytrope.ops import rational_spline
from polytrope.ops.fitting.curves import Array, Curve, with_tangents
from polytrope.ops.fitting.refinement import Data, Ends

_CELLS = 800  # of an interval, on which density and fourth derivative are known
_BLUR = 10.0  # cells: standard deviation of the normal kernel that smooths both
_NARROWEST = 2 * rational_spline.FLOOR  # piece, as a share of the interval
_MARGINS = (
    0.1,
    1.0,
    3.0,
)  # of the least slope with its line, relative to the steepest slope: the more, the more a cubic


@dataclass(frozen=True)
class RationalQuadratic:
    """S(x) - line · x, with the formula of `polytrope.ops.functional.rational_spline`, between the first and last knot.

    Args:
        knots, heights, slopes: `[pieces + 1]`, float64; of S.
        line: c.
    """

    knots: Array
    heights: Array
    slopes: Array
    line: float

    def evaluate(self, x: Array) -> tuple[Array, Array]:
        """Value and slope."""
        piece = np.clip(np.searchsorted(self.knots, x) - 1, 0, len(self.knots) - 2)
        width, rise = np.diff(self.knots)[piece], np.diff(self.heights)[piece]
        mean, rate, next_rate = rise / width, self.slopes[:-1][piece], self.slopes[1:][piece]
        t = (x - self.knots[:-1][piece]) / width
        u = t * (1.0 - t)
        below = mean + (rate + next_rate - 2.0 * mean) * u
        value = self.heights[:-1][piece] + rise * (mean * t * t + rate * u) / below
        slope = mean**2 * (next_rate * t * t + 2.0 * mean * u + rate * (1.0 - t) ** 2) / below**2
        return value - self.line * x, slope - self.line

    def parameters(self) -> dict[str, Array]:
        """Of the module with this interval."""
        knots, slopes, secants = map(
            torch.from_numpy, (self.knots, self.slopes, np.diff(self.heights) / np.diff(self.knots))
        )
        widths, rates, rises = (part.numpy() for part in rational_spline.free(knots, slopes, secants))
        start = self.heights[:1] - self.knots[:1]
        return {"widths": widths, "start": start, "rises": rises, "slopes": rates, "line": np.array([self.line])}

    def rounded(self, dtype: torch.dtype) -> RationalQuadratic:
        """The same with the module's parameters rounded to a format."""
        numbers = {name: torch.from_numpy(value).to(dtype).double() for name, value in self.parameters().items()}
        line = float(numbers.pop("line"))
        ends = float(self.knots[0]), float(self.knots[-1])
        knots, heights, slopes = (part.numpy() for part in rational_spline.tied(**numbers, interval=ends))
        return RationalQuadratic(knots, heights, slopes, line)


def through(exact: Curve, knots: Array, margin: float) -> RationalQuadratic:
    """The curve with the function's values and slopes at these knots.

    Args:
        margin: what its least slope is at least with its line, relative to the steepest slope.
    """
    value, slope = exact(knots)
    every = np.concatenate([slope, np.diff(value) / np.diff(knots)])
    least = max(margin * float(np.abs(every).max()), 2 * rational_spline.FLOOR)
    line = max(0.0, least - float(every.min()))
    return RationalQuadratic(knots, value + line * knots, slope + line, line)


def fit_spline(
    exact: Curve, data: Data, pieces: int, intervals: Sequence[Ends], dtype: torch.dtype
) -> tuple[RationalQuadratic, Ends]:
    """The curve and the interval, of those given, with the least error over the data.

    Args:
        data: what counts, on the straight lines outside too.
        dtype: of the module, whose parameters are rounded to it.
    """
    places = [(ends, *_density(exact, data, ends)) for ends in intervals]
    tried = [
        (through(exact, _knots(grid, reached, pieces), margin), ends)
        for (ends, grid, reached), margin in itertools.product(places, _MARGINS)
    ]
    return min(tried, key=lambda entry: _missed(entry[0].rounded(dtype), entry[1], data))


def _missed(curve: RationalQuadratic, ends: Ends, data: Data) -> float:
    """The Sobolev norm of the error, squared."""
    value, slope = with_tangents(curve.evaluate, *ends)(data.x)
    errors = (value - data.value) ** 2 + data.derivative_weight * (slope - data.slope) ** 2
    return float(data.weights @ errors)


def _density(exact: Curve, data: Data, ends: Ends) -> tuple[Array, Array]:
    """A grid, and the share of the knots up to each of its points."""
    grid = np.linspace(*ends, _CELLS + 1)
    step = grid[1] - grid[0]
    reach = np.arange(-4 * int(_BLUR), 4 * int(_BLUR) + 1) / _BLUR
    kernel = np.exp(-0.5 * reach**2)
    kernel /= kernel.sum()

    def smooth(x: Array) -> Array:
        return np.convolve(np.pad(x, len(reach) // 2, mode="edge"), kernel, "valid")

    inputs = smooth(np.diff(np.interp(grid, data.x, np.cumsum(data.weights))))
    bends = np.diff(exact(grid)[1]) / step
    fourth = np.abs(smooth(np.gradient(np.gradient(bends, step), step)))
    dense = np.cbrt(np.cbrt(inputs * fourth**2))
    if not dense.max() > 0.0:  # straight, or no input: any knots do
        dense = np.ones_like(dense)
    reached = np.concatenate([[0.0], np.cumsum(dense)])
    return grid, reached / reached[-1]


def _knots(grid: Array, reached: Array, pieces: int) -> Array:
    """As many in each share, and no piece narrower than `_NARROWEST`."""
    inner = np.interp(np.linspace(0.0, 1.0, pieces + 1)[1:-1], reached, grid)
    shares = np.diff(np.concatenate([grid[:1], inner, grid[-1:]])) / (grid[-1] - grid[0])
    shares = _NARROWEST + (1.0 - _NARROWEST * pieces) * shares
    inner = grid[0] + (grid[-1] - grid[0]) * np.cumsum(shares)[:-1]
    return np.concatenate([grid[:1], inner, grid[-1:]])
