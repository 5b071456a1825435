"""Sums of cosines: linear least squares for given frequencies, then Gauss-Newton steps for the frequencies too."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from polytrope.ops.fitting.refinement import refine

Array = np.ndarray


@dataclass(frozen=True)
class Cosines:
    """bias + Σ_k cosine_k cos(ω_k x) + sine_k sin(ω_k x)."""

    bias: float
    cosine: Array
    sine: Array
    frequencies: Array

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


def fit_cosines(
    x: Array,
    weights: Array,
    value: Array,
    slope: Array,
    degree: int,
    derivative_weight: float,
    interval: tuple[float, float],
    free_frequencies: bool = True,
) -> tuple[Cosines, float]:
    """Least squares of value and slope at the points `x`; also the condition number of the linear problem.

    Starts from the harmonics of several periods (a function that is not periodic wants one longer than the interval);
    the best are refined in all parameters.
    """
    root = np.sqrt(weights)
    right = np.concatenate([value * root, math.sqrt(derivative_weight) * slope * root])
    length = interval[1] - interval[0]

    def linear(frequencies: Array) -> tuple[Cosines, float, float]:
        matrix = _matrix(x, root, frequencies, derivative_weight)
        scale = np.linalg.norm(matrix, axis=0)
        solution, _, _, singular = np.linalg.lstsq(matrix / scale, right, rcond=1e-11)
        solution = solution / scale
        residual = matrix @ solution - right
        cosines = Cosines(float(solution[0]), solution[1 : degree + 1], solution[degree + 1 :], frequencies)
        condition = float(singular[0] / max(singular[-1], 1e-300))
        return cosines, float(residual @ residual), condition

    harmonics = np.arange(1, degree + 1)
    starts = [linear(2 * math.pi / (length * stretch) * harmonics) for stretch in (1.1, 1.5, 2.2)]
    starts.sort(key=lambda entry: entry[1])
    best, best_cost, condition = starts[0]
    if not free_frequencies:
        return best, condition

    def residuals(flat: Array) -> tuple[Array, Array]:
        current = Cosines(
            float(flat[0]), flat[1 : degree + 1], flat[degree + 1 : 2 * degree + 1], flat[2 * degree + 1 :]
        )
        fitted, fitted_slope = current.evaluate(x)
        factor = math.sqrt(derivative_weight)
        residual = np.concatenate([(fitted - value) * root, factor * (fitted_slope - slope) * root])
        angle = np.multiply.outer(x, current.frequencies)
        cos, sin = np.cos(angle), np.sin(angle)
        along = -current.cosine * sin + current.sine * cos  # ∂F / ∂ω = x · along
        bend = -(current.cosine * cos + current.sine * sin) * current.frequencies
        frequency_value = x[:, None] * along
        frequency_slope = along + x[:, None] * bend
        jacobian = np.concatenate(
            [
                _matrix(x, root, current.frequencies, derivative_weight),
                np.concatenate([frequency_value * root[:, None], factor * frequency_slope * root[:, None]]),
            ],
            axis=1,
        )
        return residual, jacobian

    for start, _, _ in starts[:2]:
        flat = np.concatenate([[start.bias], start.cosine, start.sine, start.frequencies])
        found, cost = refine(residuals, flat, steps=40)
        if cost < best_cost:
            best_cost = cost
            best = Cosines(
                float(found[0]), found[1 : degree + 1], found[degree + 1 : 2 * degree + 1], found[2 * degree + 1 :]
            )
    return best, condition


def _matrix(x: Array, root: Array, frequencies: Array, derivative_weight: float) -> Array:
    angle = np.multiply.outer(x, frequencies)
    cos, sin = np.cos(angle), np.sin(angle)
    values = np.concatenate([np.ones((len(x), 1)), cos, sin], axis=1)
    slopes = np.concatenate([np.zeros((len(x), 1)), -sin * frequencies, cos * frequencies], axis=1)
    factor = math.sqrt(derivative_weight)
    return np.concatenate([values * root[:, None], factor * slopes * root[:, None]])
