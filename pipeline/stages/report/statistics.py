"""Means over few repeats: Student's t, confidence intervals, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95 % confidence interval (None for a single value)."""

    mean: float
    half_width: float | None
    count: int


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's confidence interval of the mean of `values` (at least one)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, None, count)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return Interval(mean, error * student_quantile(0.5 + confidence / 2, count - 1), count)


def paired_p_value(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of Student's paired test that the mean difference is 0; None for fewer than two pairs."""
    count = len(differences)
    if count < 2:
        return None
    mean = math.fsum(differences) / count
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (count - 1) / count)
    if error == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return 2.0 * (1.0 - student_cdf(abs(mean) / error, count - 1))


def student_cdf(t: float, degrees: int) -> float:
    """P(T ≤ t) for integer degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    if degrees % 2:
        term, total = cosine, 0.0
        for index in range(1, degrees - 1, 2):
            total += term
            term *= cosine * cosine * (index + 1) / (index + 2)
        return 0.5 + (angle + sine * total) / math.pi
    term, total = 1.0, 1.0
    for index in range(1, degrees - 2, 2):
        term *= cosine * cosine * index / (index + 1)
        total += term
    return 0.5 + 0.5 * sine * total


def student_quantile(probability: float, degrees: int) -> float:
    """t with P(T ≤ t) = probability, by bisection; for probabilities from 0.5 to below 1."""
    if not 0.5 <= probability < 1.0:
        raise ValueError(f"probability must be in [0.5, 1), got {probability}")
    low, high = 0.0, 1.0
    while student_cdf(high, degrees) < probability:
        high *= 2.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if student_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)
