"""Means over few repeats: Student's t, confidence intervals, paired differences, many comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


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
    error = float(stats.sem(values))
    return Interval(mean, error * float(stats.t.ppf(0.5 + confidence / 2, count - 1)), count)


def paired_p_value(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of Student's paired test that the mean difference is 0; None for fewer than two pairs."""
    if len(differences) < 2:
        return None
    if len(set(differences)) == 1:  # no variance, so no test
        return 1.0 if differences[0] == 0.0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm, 1979), in the order they were given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
