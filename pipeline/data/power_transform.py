"""The power transform of Yeo and Johnson: what makes columns of numbers as normal as one exponent can, and its inverse.

(Yeo and Johnson, A New Family of Power Transformations to Improve Normality or Symmetry, 2000)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polytrope.pipeline.data.description import NumbersDataset, PowerTransform
from polytrope.pipeline.errors import UserError


def yeo_johnson(x: np.ndarray, power: float) -> np.ndarray:
    """ψ(x), float64 of the same shape: ((1 + x)^λ - 1) / λ for x ≥ 0, -((1 - x)^(2-λ) - 1) / (2-λ) below 0, and the
    logarithms that these tend to; it rises from -∞ or 1/(λ-2) to ∞ or -1/λ, with ψ(0) = 0 and ψ'(0) = 1.

    Args:
        x: float64.
        power: λ; 1 leaves x as it is.
    """
    logarithm = np.log1p(np.abs(x))
    above = logarithm * _relative_expm1(power * logarithm)
    below = -logarithm * _relative_expm1((2.0 - power) * logarithm)
    result: np.ndarray = np.where(x >= 0, above, below)
    return result


def _relative_expm1(t: np.ndarray) -> np.ndarray:
    """(e^t - 1) / t, and 1 at 0."""
    result = np.ones_like(t)
    with np.errstate(over="ignore"):
        np.divide(np.expm1(t), t, out=result, where=t != 0)
    return result


def inverse_yeo_johnson(y: np.ndarray, power: float) -> np.ndarray:
    """The x with ψ(x) = y, float64 of the same shape; NaN for a y that ψ never reaches."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        result: np.ndarray = np.where(y >= 0, _inverse_above(y, power), -_inverse_above(-y, 2.0 - power))
    return result


def _inverse_above(y: np.ndarray, power: float) -> np.ndarray:
    reached = power * y > -1.0
    logarithm = np.log1p(power * y) / power if power else y
    return np.where(reached, np.expm1(logarithm), np.nan)


def transform_columns(rows: np.ndarray, columns: Sequence[PowerTransform]) -> np.ndarray:
    """Rows `[n, columns]` as float32, each column transformed, with the mean 0 and the variance 1 that the rows had by
    which it was fitted."""
    result = np.empty(rows.shape, dtype=np.float32)
    with np.errstate(over="ignore"):
        for number, column in enumerate(columns):
            transformed = yeo_johnson(rows[:, number].astype(np.float64), column.power)
            result[:, number] = (transformed - column.mean) / column.deviation
    return result


def restore_targets(dataset: NumbersDataset, predictions: np.ndarray) -> np.ndarray:
    """What a model predicts for a data set, in the numbers that its file has: float64 `[n, targets]`.

    NaN stands for a prediction beyond what any number becomes. The inverse of a mean is the median of what it predicts
    where errors are symmetric, and not its mean.

    Args:
        dataset: as `description.read_dataset` gives it.
        predictions: `[n, targets]`.

    Raises:
        UserError: its targets are not transformed.
    """
    columns = None if dataset.transform is None else dataset.transform.targets
    if columns is None:
        raise UserError(f"the targets of `{dataset.name}` are not transformed", "take predictions as they are")
    restored = [
        inverse_yeo_johnson(predictions[:, number].astype(np.float64) * column.deviation + column.mean, column.power)
        for number, column in enumerate(columns)
    ]
    return np.stack(restored, axis=1)
