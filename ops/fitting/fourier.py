"""Sums of cosines: linear least squares for given frequencies, then Gauss-Newton steps for the frequencies too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.refinement import Data, Ends, best_of
from polytrope.ops.fitting.triangle import triangle_of

Start = tuple[float, Array, Ends, float]  # sum of squares, parameters, ends, condition number
_REFINED = 2


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


def fit_cosines(data: Data, degree: int, intervals: Sequence[Ends], free_ends: bool) -> tuple[Cosines, Ends, float]:
    """Least squares of value and slope at all points, along tangent lines outside the interval.

    Starts from the harmonics of several periods (a function that is not periodic wants one longer than the interval);
    the best are refined in all parameters.

    Args:
        intervals: to start from; one, or several with `free_ends`.
        free_ends: the ends of the interval are refined as well.

    Returns:
        The cosines, the interval, and the condition number of the linear problem.
    """
    flat, found, condition, cost = _refined(data, degree, intervals, free_ends)
    if free_ends:  # once more from around where that ended: there are many local minima
        low, high = found
        step = (high - low) / 12
        around = [(low, high), (low - step, high), (low + step, high), (low, high - step), (low, high + step)]
        again = _refined(data, degree, around, free_ends)
        if again[3] < cost:
            flat, found, condition, _ = again
    return Cosines.of(flat), found, condition


def fit_harmonics(data: Data, degree: int, ends: Ends) -> tuple[Cosines, float]:
    """Least squares of value and slope by the harmonics of one frequency; and the condition number.

    The problem is linear once the frequency is given, which is searched for among periods of 1.05 to 4 intervals.
    """
    stretches = list(np.geomspace(1.05, 4.0, 25))
    best = min((_harmonics(data, degree, ends, stretch) for stretch in stretches), key=lambda start: start[0])
    step = (4.0 / 1.05) ** (1 / 24)
    while step > 1.0001:
        step = math.sqrt(step)
        stretch = 2 * math.pi / ((ends[1] - ends[0]) * best[1][2 * degree + 1])
        beside = [_harmonics(data, degree, ends, stretch * factor) for factor in (1 / step, step)]
        best = min([best, *beside], key=lambda start: start[0])
    return Cosines.of(best[1]), best[3]


def _refined(data: Data, degree: int, intervals: Sequence[Ends], free_ends: bool) -> tuple[Array, Ends, float, float]:
    """Parameters, ends, condition number and sum of squares of the best of two starts on each interval."""
    starts = []
    for interval in intervals:
        starts += sorted(_starts(data, degree, interval), key=lambda entry: entry[0])[:_REFINED]
    models = [(_model, flat, ends) for _, flat, ends, _ in starts]
    number, flat, ends, cost = best_of(models, data, free_ends=free_ends, steps=40)
    return flat, ends, starts[number][3], cost


def _starts(data: Data, degree: int, ends: Ends) -> list[Start]:
    """Linear least squares for the harmonics of several periods."""
    return [_harmonics(data, degree, ends, stretch) for stretch in (1.1, 1.5, 2.2, 4.0)]


def _harmonics(data: Data, degree: int, ends: Ends, stretch: float) -> Start:
    """Linear least squares for the harmonics of a period of so many intervals."""
    frequencies = 2 * math.pi / ((ends[1] - ends[0]) * stretch) * np.arange(1, degree + 1)
    inside = np.clip(data.x, *ends)
    values, slopes = _columns(inside, frequencies)
    matrix = data.rows(values + (data.x - inside)[:, None] * slopes, slopes)
    triangle, wanted, rest = triangle_of(matrix, data.right)
    scale = np.linalg.norm(triangle, axis=0)
    scale[scale == 0.0] = 1.0
    solution, _, _, singular = np.linalg.lstsq(triangle / scale, wanted, rcond=1e-8)
    missed = triangle @ (solution / scale) - wanted
    flat = np.concatenate([solution / scale, frequencies])
    return rest + float(missed @ missed), flat, ends, float(singular[0] / max(singular[-1], 1e-300))


def _columns(x: Array, frequencies: Array) -> tuple[Array, Array]:
    """Values and slopes of 1, the cosines and the sines."""
    angle = np.multiply.outer(x, frequencies)
    cos, sin = np.cos(angle), np.sin(angle)
    values = np.concatenate([np.ones((len(x), 1)), cos, sin], axis=1)
    return values, np.concatenate([np.zeros((len(x), 1)), -sin * frequencies, cos * frequencies], axis=1)


def _model(flat: Array, x: Array) -> tuple[Array, Array, Array, Array]:
    current = Cosines.of(flat)
    values, slopes = _columns(x, current.frequencies)
    linear = flat[: len(flat) - len(current.frequencies)]
    cos, sin = np.split(values[:, 1:], 2, axis=1)
    along = -current.cosine * sin + current.sine * cos  # ∂F / ∂ω = x · along
    bend = -(current.cosine * cos + current.sine * sin) * current.frequencies
    by_value = np.concatenate([values, x[:, None] * along], axis=1)
    by_slope = np.concatenate([slopes, along + x[:, None] * bend], axis=1)
    return values @ linear, slopes @ linear, by_value, by_slope
