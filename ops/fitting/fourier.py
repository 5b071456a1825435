"""Sums of cosines: linear least squares for given frequencies, then Gauss-Newton steps for the frequencies too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.refinement import Data, Ends, Turn, best_of

_STRETCHES = (1.1, 1.5, 2.2, 4.0)  # periods to start from, in intervals
_RIDGE = 1e-13
_LARGE = 1e-10  # weight of the amplitudes' squares: a slow wave of a large amplitude is little more than a parabola


@dataclass(frozen=True)
class Cosines:
    """bias + Σ_k cosine_k cos(ω_k x) + sine_k sin(ω_k x)."""

    bias: float
    cosine: Array
    sine: Array
    frequencies: Array

    @classmethod
    def of(cls, flat: Array) -> Cosines:
        """From bias, cosines, sines, frequencies in one row."""
        degree = (len(flat) - 1) // 3
        return cls(float(flat[0]), *np.split(flat[1:], [degree, 2 * degree]))

    def flat(self) -> Array:
        return np.concatenate([[self.bias], self.cosine, self.sine, self.frequencies])

    def evaluate(self, x: Array) -> tuple[Array, Array]:
        angle = np.multiply.outer(x, self.frequencies)
        cos, sin = np.cos(angle), np.sin(angle)
        value = self.bias + cos @ self.cosine + sin @ self.sine
        slope = cos @ (self.sine * self.frequencies) - sin @ (self.cosine * self.frequencies)
        return value, slope

    def parameters(self) -> dict[str, Array]:
        """As the family writes it: bias + Σ_k amplitudes[k] cos(frequencies[k] x - phases[k]) / k!, k = 1…degree."""
        factorials = np.array([float(math.factorial(k)) for k in range(1, len(self.frequencies) + 1)])
        return {
            "bias": np.array(self.bias),
            "amplitudes": np.hypot(self.cosine, self.sine) * factorials,
            "frequencies": self.frequencies,
            "phases": np.arctan2(self.sine, self.cosine),
        }

    def harmonic_parameters(self) -> dict[str, Array]:
        """As the harmonic form writes it: bias + Σ_k (cosines[k] cos(k ω x) + sines[k] sin(k ω x)) / k!"""
        factorials = np.array([float(math.factorial(k)) for k in range(1, len(self.frequencies) + 1)])
        return {
            "bias": np.array(self.bias),
            "frequency": np.array(self.frequencies[0]),
            "cosines": self.cosine * factorials,
            "sines": self.sine * factorials,
        }


def fit_cosines(
    data: Data, degree: int, intervals: Sequence[Ends], free_ends: bool
) -> Iterator[tuple[Cosines, Ends, float]]:
    """Least squares of value and slope at all points, along tangent lines outside the interval.

    Starts from the harmonics of several periods (a function that is not periodic wants one longer than the interval),
    and from what was found for the degree below with one frequency more; the best are refined in all parameters.

    Args:
        intervals: to start from; one, or several with `free_ends`.
        free_ends: the ends of the interval are refined as well.

    Returns:
        For degree 1, 2, … the cosines, the interval, and the condition number of the linear problem.
    """
    before: Cosines | None = None
    last: Ends = intervals[0]
    for count in range(1, degree + 1):
        tried = list(dict.fromkeys([*intervals, last] if free_ends else intervals))
        unit = 2 * math.pi * np.arange(1, count + 1)
        pairs = [(unit / ((end[1] - end[0]) * stretch), end) for end in tried for stretch in _STRETCHES]
        if before is not None:
            own = np.sort(np.abs(before.frequencies))
            more = (own[-1] * (1 + 1 / count), own[-1] * (1 + 2 / count), own[0] / 2)
            pairs += [(np.append(before.frequencies, frequency), last) for frequency in more]
        frequencies, ends = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
        _, costs, condition = _linear(data, frequencies, ends)
        harmonic = costs[: len(tried) * len(_STRETCHES)].reshape(len(tried), len(_STRETCHES)).argmin(axis=1)
        chosen = [
            *(np.arange(len(tried)) * len(_STRETCHES) + harmonic),
            *range(len(tried) * len(_STRETCHES), len(pairs)),
        ]
        linear, frequencies, last = best_of(
            _model, frequencies[chosen], ends[chosen], data, free_ends=free_ends, ridge=_LARGE
        )
        before = Cosines.of(np.concatenate([linear, frequencies]))
        yield before, last, condition


def fit_harmonics(data: Data, degree: int, ends: Ends) -> tuple[Cosines, float]:
    """Least squares of value and slope by the harmonics of one frequency; and the condition number.

    The problem is linear once the frequency is given, which is searched for among periods of 1.05 to 4 intervals.
    """
    stretches = np.geomspace(1.05, 4.0, 25)
    step = stretches[1] / stretches[0]
    while True:
        frequencies = 2 * math.pi / ((ends[1] - ends[0]) * stretches[:, None]) * np.arange(1, degree + 1)
        flats, costs, condition = _linear(data, frequencies, np.tile(ends, (len(stretches), 1)))
        best = int(costs.argmin())
        if step < 1.0001:
            return Cosines.of(flats[best]), condition
        step = math.sqrt(step)
        stretches = stretches[best] * np.array([1.0, 1 / step, step])


def _linear(data: Data, frequencies: Array, ends: Array) -> tuple[Array, Array, float]:
    """Parameters `[starts, …]` of the best cosines of given frequencies `[starts, degree]` on intervals `[starts, 2]`,
    their sums of squares, and the condition number of the first problem.
    """
    inside = np.clip(data.x, ends[:, :1], ends[:, 1:])
    values, slopes = _columns(inside, frequencies)
    root = np.sqrt(data.weights)[:, None]
    rows = (values + (data.x - inside)[..., None] * slopes) * root, slopes * (root * math.sqrt(data.derivative_weight))
    matrix = np.concatenate(rows, axis=1)
    scale = np.sqrt(np.einsum("brk,brk->bk", matrix, matrix))
    scale[scale == 0.0] = 1.0
    matrix = matrix / scale[:, None]
    gram = matrix.swapaxes(1, 2) @ matrix + _RIDGE * np.eye(matrix.shape[2])
    solution = np.linalg.solve(gram, (data.right @ matrix)[:, :, None])
    missed = (matrix @ solution)[:, :, 0] - data.right
    condition = float(np.sqrt(np.linalg.cond(gram[0])))
    return np.concatenate([solution[:, :, 0] / scale, frequencies], axis=1), (missed**2).sum(axis=1), condition


def _columns(x: Array, frequencies: Array) -> tuple[Array, Array]:
    """Values and slopes of 1, the cosines and the sines: `[starts, points, 1 + 2 · degree]`."""
    count, along = frequencies.shape[1], frequencies[:, None]
    angle = x[:, :, None] * along
    cos, sin = np.cos(angle), np.sin(angle)
    values, slopes = np.empty((2, *x.shape, 1 + 2 * count))
    values[..., 0], slopes[..., 0] = 1.0, 0.0
    values[..., 1 : 1 + count], values[..., 1 + count :] = cos, sin
    np.multiply(sin, -along, out=slopes[..., 1 : 1 + count])
    np.multiply(cos, along, out=slopes[..., 1 + count :])
    return values, slopes


def _model(frequencies: Array, x: Array) -> tuple[Array, Array, Turn]:
    count = frequencies.shape[1]
    values, slopes = _columns(x, frequencies)

    def turn(coefficients: Array, chosen: Array) -> tuple[Array, Array]:
        cosine, sine = coefficients[:, None, 1 : 1 + count], coefficients[:, None, 1 + count :]
        at, cos, sin = x[chosen][..., None], values[chosen][..., 1 : 1 + count], values[chosen][..., 1 + count :]
        along = sine * cos - cosine * sin  # ∂F / ∂ω = x · along
        bend = -(cosine * cos + sine * sin) * frequencies[chosen][:, None]
        return at * along, along + at * bend

    return values, slopes, turn
