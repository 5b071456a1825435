"""λ of a power transform by maximum likelihood, from statistics of blocks of rows that are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from polytrope.pipeline.data.description import NumbersTransform, PowerTransform
from polytrope.pipeline.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from polytrope.pipeline.stages.shard.numbers import FileSource, Table

BLOCK_ROWS = 65536  # of one block, whatever `shard_rows` is
_FARTHEST = 1024.0  # from λ = 1
_LEAST_DEVIATION = 1e-9  # of what float64 tells apart, relative to the numbers


@dataclass(frozen=True)
class Moments:
    """Of pairs (a, b): how many, their means, and the sums of (a - mean)² and (a - mean)(b - mean)."""

    count: int
    first: float
    second: float
    squares: float
    products: float

    @classmethod
    def of(cls, a: np.ndarray, b: np.ndarray) -> Moments:
        """Of arrays `[n]`, n ≥ 1."""
        first, second = float(a.mean()), float(b.mean())
        centred = a - first
        return cls(len(a), first, second, float((centred * centred).sum()), float((centred * (b - second)).sum()))

    def merged(self, other: Moments) -> Moments:
        """Of both together. (Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances, 1979)"""
        count = self.count + other.count
        first, second = other.first - self.first, other.second - self.second
        share = other.count / count
        return Moments(
            count,
            self.first + first * share,
            self.second + second * share,
            self.squares + other.squares + first * first * self.count * share,
            self.products + other.products + first * second * self.count * share,
        )


def fit_power(blocks: Sequence[np.ndarray]) -> PowerTransform:
    """λ of the largest likelihood, where what ψ makes of the numbers is normal; its mean and deviation.

    (1-λ) Σ sgn(x) ln(1+|x|) + n/2 ln Var ψ(x) is convex in λ, and its slope is 0 where the covariance of ψ and ∂ψ/∂λ
    over the variance of ψ is the mean of sgn(x) ln(1+|x|).

    Args:
        blocks: of the numbers of one column, float64 `[n]` each, n ≥ 1.

    Raises:
        ValueError: says why there is no such λ.
    """
    import math

    import numpy as np
    from scipy.optimize import brentq

    if min(float(block.min()) for block in blocks) == max(float(block.max()) for block in blocks):
        raise ValueError(f"all its numbers are {float(blocks[0][0]):.9g}")
    rows = sum(len(block) for block in blocks)
    logarithms = math.fsum(float((np.sign(block) * np.log1p(np.abs(block))).sum()) for block in blocks) / rows

    def slope(power: float) -> float:
        merged = moments(blocks, power)
        found = merged.products / merged.squares - logarithms if merged.squares else math.nan
        if not math.isfinite(found):
            raise ValueError(f"its numbers are too far apart, or too close together, for a float64 at λ = {power:.4g}")
        return found

    with np.errstate(over="ignore", invalid="ignore"):
        direction = 1.0 if slope(1.0) < 0 else -1.0
        near, step = 1.0, 1.0
        while slope(1.0 + direction * step) * direction < 0:
            near, step = 1.0 + direction * step, 2.0 * step
            if step > _FARTHEST:
                raise ValueError(f"λ would be more than {_FARTHEST:.0f} from 1")
        power = float(brentq(slope, near, 1.0 + direction * step, xtol=1e-13, rtol=1e-13))
        merged = moments(blocks, power)
    deviation = math.sqrt(merged.squares / merged.count)
    if deviation < _LEAST_DEVIATION * abs(merged.first):
        raise ValueError(f"at λ = {power:.4g} its numbers are too close together for a float64")
    return PowerTransform(power=power, mean=merged.first, deviation=deviation)


def moments(blocks: Sequence[np.ndarray], power: float) -> Moments:
    """Of ψ(x) and ∂ψ/∂λ over all blocks, merged in their order."""
    from polytrope.pipeline.data.power_transform import yeo_johnson

    return reduce(
        Moments.merged, (Moments.of(yeo_johnson(block, power), _power_derivative(block, power)) for block in blocks)
    )


def _power_derivative(x: np.ndarray, power: float) -> np.ndarray:
    """∂ψ/∂λ = L² (t e^t - e^t + 1) / t² with L = ln(1+|x|) and t = λL, or (2-λ)L below 0."""
    import numpy as np

    logarithm = np.log1p(np.abs(x))
    t = np.where(x >= 0, power, 2.0 - power) * logarithm
    series = np.zeros_like(t)  # Σ_k (k+1) t^k / (k+2)!, where the difference would cancel
    factorials = [float((k + 1) / np.prod(np.arange(1.0, k + 3))) for k in range(16)]
    small = np.abs(t) < 0.5
    for factor in reversed(factorials):
        series = series * np.where(small, t, 0.0) + factor
    apart = np.where(small, 1.0, t)
    result: np.ndarray = logarithm**2 * np.where(small, series, (apart * np.exp(apart) - np.expm1(apart)) / apart**2)
    return result


def fit_transform(source: FileSource, table: Table, training: np.ndarray) -> NumbersTransform:
    """The transform of every column of a file, fitted to its training rows; classes have none.

    Blocks have a fixed number of rows: λ is the same, bit by bit, whatever the shards and the number of workers.

    Args:
        training: numbers of the training rows, int64 `[n]`.

    Raises:
        UserError: a column that has no λ, or a row that would become a number float32 does not hold.
    """
    import numpy as np

    from polytrope.pipeline.data.power_transform import transform_columns

    fitted: dict[str, list[PowerTransform] | None] = {"inputs": None, "targets": None}
    for field in fitted if source.classes is None else ("inputs",):
        values = getattr(table, field)
        columns = []
        for number in range(values.shape[1]):
            column = values[training, number].astype(np.float64)
            blocks = [column[start : start + BLOCK_ROWS] for start in range(0, len(column), BLOCK_ROWS)]
            try:
                columns.append(fit_power(blocks))
            except ValueError as error:
                raise UserError(
                    f"source.transform: {_column_name(source, field, number, values.shape[1])}: {error}",
                    "leave the column out, or transform",
                ) from error
        outside = ~np.isfinite(transform_columns(values, columns)).all(axis=1)
        if outside.any():
            row = int(np.flatnonzero(outside)[0])
            raise UserError(
                f"source.transform: row {row} of {source.path} has {field} {values[row].tolist()}, which would become "
                "numbers that float32 does not hold",
                "leave the row out, or transform",
            )
        fitted[field] = columns
    assert fitted["inputs"] is not None
    return NumbersTransform(kind="yeo_johnson", inputs=fitted["inputs"], targets=fitted["targets"])


def _column_name(source: FileSource, field: str, number: int, columns: int) -> str:
    names: list[str] = getattr(source, field)
    if len(names) == columns:
        return f"`{names[number]}` of {source.path}, training rows"
    return f"column {number} of `{', '.join(names)}` of {source.path}, training rows"
