"""`transform: yeo_johnson` of a file of numbers: one λ for each column, in the data set's record, and its inverse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from polytrope.pipeline.data.description import NumbersDataset, read_dataset
from polytrope.pipeline.data.power_transform import inverse_yeo_johnson, restore_targets, yeo_johnson
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Resources, stage_context
from polytrope.pipeline.stages.shard.numbers import FileSource, Table
from polytrope.pipeline.stages.shard.numbers_transform import Moments, fit_power, fit_transform, moments
from polytrope.pipeline.stages.shard.parameters import ShardNumbersParameters
from polytrope.pipeline.stages.shard.shard_numbers import shard_numbers


def run_stage(directory: Path, workers: int = 1, shard_rows: int = 16384, **source: Any) -> Path:
    context = stage_context(directory, stage="numbers", resources=Resources(workers=workers))
    source = {"kind": "file", "path": "rows.npz", "transform": "yeo_johnson", **source}
    shard_numbers(context, ShardNumbersParameters.model_validate({"source": source, "shard_rows": shard_rows}))
    return context.output


def read(dataset: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    reader = open_split(dataset, split)
    return reader.numbers(np.arange(len(reader)))


def described(directory: Path) -> NumbersDataset:
    dataset = read_dataset(directory)
    assert isinstance(dataset, NumbersDataset)
    return dataset


@pytest.mark.parametrize("power", [-1.5, -1e-9, 0.0, 0.3, 1.0, 1.7, 2.0, 2.0 + 1e-9, 4.0])
def test_the_function_and_its_inverse(power: float) -> None:
    x = np.concatenate([-np.logspace(-8, 2, 40), [0.0], np.logspace(-8, 2, 40)])
    y = yeo_johnson(x, power)
    np.testing.assert_allclose(y, stats.yeojohnson(x, power), rtol=1e-7)  # scipy's is the plainer formula
    if abs(power) > 0.1 and abs(power - 2) > 0.1:
        np.testing.assert_allclose(y[x >= 1e-2], ((1 + x[x >= 1e-2]) ** power - 1) / power, rtol=1e-12)
        np.testing.assert_allclose(y[x <= -1e-2], -((1 - x[x <= -1e-2]) ** (2 - power) - 1) / (2 - power), rtol=1e-12)
    np.testing.assert_allclose(inverse_yeo_johnson(y, power), x, rtol=1e-9 if abs(power - 1) < 2 else 1e-6)
    if power < 0:
        assert math.isnan(inverse_yeo_johnson(np.array([-1.01 / power]), power)[0])
    if power > 2:
        assert math.isnan(inverse_yeo_johnson(np.array([1.01 / (2 - power)]), power)[0])


def test_the_power_is_scipy_s_whatever_the_blocks() -> None:
    generator = np.random.default_rng(0)
    x = generator.gamma(2.0, size=20_000) - 0.5
    assert stats.skew(x) == pytest.approx(1.42, abs=0.03)
    whole = fit_power([x])
    transformed = yeo_johnson(x, whole.power)
    assert abs(stats.skew(transformed)) < 0.02
    assert (transformed.mean(), transformed.std()) == pytest.approx((whole.mean, whole.deviation), rel=1e-12)
    assert whole.power == pytest.approx(stats.yeojohnson(x)[1], abs=2e-7)  # its search ends at 1e-8
    likelihoods = [stats.yeojohnson_llf(power, x) for power in (whole.power, stats.yeojohnson(x)[1])]
    assert likelihoods[0] >= likelihoods[1] - 1e-9
    cuts = np.sort(generator.integers(1, len(x), size=6))
    seven = fit_power(np.split(x, cuts))
    assert (seven.power, seven.mean, seven.deviation) == pytest.approx(
        (whole.power, whole.mean, whole.deviation), rel=1e-11
    )
    for skewed in (-x, 50.0 * x, x**3, 1e-3 * x, np.exp(x)):
        assert fit_power([skewed]).power == pytest.approx(stats.yeojohnson(skewed)[1], rel=1e-5, abs=1e-5)


def test_merged_moments_are_those_of_all() -> None:
    a, b = np.random.default_rng(1).normal(1e3, 1.0, size=(2, 999))
    whole = Moments.of(a, b)
    parts = [Moments.of(*part) for part in zip(np.split(a, [1, 300]), np.split(b, [1, 300]), strict=True)]
    merged = parts[0].merged(parts[1]).merged(parts[2])
    assert merged.count == 999
    assert (merged.squares, merged.products) == pytest.approx((a.var() * 999, np.cov(a, b, bias=True)[0, 1] * 999))
    assert (merged.first, merged.second) == pytest.approx((whole.first, whole.second), rel=1e-14)


@pytest.mark.parametrize("power", [-2.0, -1e-3, 0.0, 0.7, 1.999, 3.0])
def test_the_slope_of_the_likelihood(power: float) -> None:
    x = np.random.default_rng(2).normal(0.5, 1.5, size=400)
    found = moments([x], power)
    logarithms = (np.sign(x) * np.log1p(np.abs(x))).mean()
    step = 1e-4
    numeric = (stats.yeojohnson_llf(power + step, x) - stats.yeojohnson_llf(power - step, x)) / (2 * step)
    assert len(x) * (logarithms - found.products / found.squares) == pytest.approx(numeric, rel=1e-5, abs=1e-4)


def test_the_reader_applies_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(3)
    inputs = np.stack([generator.gamma(1.0, size=500), -generator.gamma(2.0, size=500)], axis=1)
    targets = np.exp(generator.normal(size=500))
    np.savez("rows.npz", inputs=inputs, targets=targets, labels=np.arange(500) % 3)
    first = run_stage(tmp_path / "a")
    second = run_stage(tmp_path / "b", workers=2, shard_rows=97)
    dataset = described(first)
    assert dataset.transform is not None
    assert dataset.transform == described(second).transform  # bit by bit
    for split in ("train", "validation"):
        for ours, theirs in zip(read(first, split), read(second, split), strict=True):
            assert ours.dtype == np.float32
            assert np.array_equal(ours, theirs)
    raw = run_stage(tmp_path / "raw", transform=None)
    assert described(raw).transform is None
    assert described(raw).digest != dataset.digest
    before, after = read(raw, "train"), read(first, "train")
    for number in (0, 1):
        column = before[0][:, number].astype(np.float64)
        transformed, power = stats.yeojohnson(column)
        assert dataset.transform.inputs[number].power == pytest.approx(power, abs=1e-6)
        np.testing.assert_allclose(after[0][:, number], stats.zscore(transformed), atol=1e-5)
    # the held-out rows have the transform of the training rows
    column = dataset.transform.inputs[0]
    held_out = stats.yeojohnson(read(raw, "validation")[0][:, 0].astype(np.float64), column.power)
    np.testing.assert_allclose(
        read(first, "validation")[0][:, 0], (held_out - column.mean) / column.deviation, atol=1e-6
    )
    restored = restore_targets(dataset, read(first, "validation")[1])
    np.testing.assert_allclose(restored, read(raw, "validation")[1], rtol=1e-5)

    classes = run_stage(tmp_path / "classes", targets=["labels"], classes=3)
    assert set(read(classes, "train")[1].tolist()) == {0, 1, 2}
    with pytest.raises(UserError, match="targets of `numbers` are not transformed"):
        restore_targets(described(classes), np.zeros((1, 1)))


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (np.stack([np.arange(40.0), np.full(40, 2.5)], 1), r"column 1 of `inputs` of rows.npz.*all .* are 2.5"),
        (np.r_[np.arange(39.0), np.nan], r"source.inputs: row 39 of .* float32 does not hold"),
        (1e6 + np.exp(np.linspace(0, 5, 40)) / 32, r"`inputs` of rows.npz, training rows: .*too close together"),
    ],
)  # fmt: skip
def test_columns_that_have_none_are_refused(
    inputs: np.ndarray, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("rows.npz", inputs=inputs, targets=np.arange(40.0))
    with pytest.raises(UserError, match=expected):
        run_stage(tmp_path / "refused")


def test_a_held_out_row_that_becomes_too_large_is_refused() -> None:
    inputs = np.r_[20.0 - np.random.default_rng(4).gamma(2.0, size=39), 1e30].astype(np.float32)[:, None]
    with pytest.raises(UserError, match=r"source.transform: row 39 of a.npz has inputs .* float32 does not hold"):
        fit_transform(FileSource(kind="file", path="a.npz"), Table(inputs, inputs), np.arange(39))
