"""The parameters of a sweep: what is varied, how many trials, and how few of them are trained long."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Value = bool | int | float | str


class Range(BaseModel):
    """From `low` to `high`, both included; integers where both are integers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    low: int | float
    high: int | float
    log: bool = Field(False, description="evenly over the orders of magnitude")

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) is not below high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"log: low ({self.low}) is not above 0")
        return self

    def value(self, share: float) -> int | float:
        """At a share in [0, 1) of the range."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        low, high = (self.low, self.high + 1) if whole else (self.low, self.high)  # each integer as likely
        found = low * (high / low) ** share if self.log else low + (high - low) * share
        return min(math.floor(found), int(self.high)) if whole else float(f"{found:.6g}")


class Halving(BaseModel):
    """Successive halving: all trials with the smallest budget, the best share of them with `factor` times as much, …"""

    model_config = ConfigDict(extra="forbid")

    parameter: str = Field(description="what a trial may spend, a parameter of the stage: steps, epochs")
    smallest: int = Field(ge=1, description="its value in the first round")
    factor: int = Field(3, ge=2, description="one in so many trials goes on, with so many times as much")
    rounds: int = Field(ge=2, description="how many, the first included")


class SweepParameters(BaseModel):
    """A search over ranges of a stage's parameters."""

    model_config = ConfigDict(extra="forbid")

    stage: dict[str, Any] = Field(description="the trial, as it would stand in the file: `uses`, `inputs`, `with`, …")
    ranges: dict[str, Range | list[Value]] = Field(
        min_length=1, description="parameter (`learning_rate`, `model.activation.degree`) → {low, high, log} or values"
    )
    trials: int = Field(ge=2, description="how many; more of them later leave the first ones as they are")
    metric: str = Field(description="a figure of `training.json`, such as val/loss")
    mode: Literal["min", "max"] = Field(description="min: the smallest value is best; max: the largest")
    halving: Halving | None = Field(None, description="few trials are trained long; default: all alike")
    sampler: Literal["halton", "tpe"] = Field(
        "halton",
        description="halton: evenly spread, all drawn at once; tpe: Optuna's tree-structured Parzen estimator, which "
        "draws a batch by what the trials before came to (`pip install 'polytrope[optuna]'`)",
    )
    batch: int = Field(4, ge=1, description="of tpe: trials that are drawn at a time; the first batch is halton's")
    failed_trials: int = Field(
        0,
        ge=0,
        description="so many trials may fail after their retries, and are left out; one more ends the search",
    )
    seed: int = Field(0, ge=0, description="of the points that are tried")

    @field_validator("ranges")
    @classmethod
    def _values(cls, ranges: dict[str, Range | list[Value]]) -> dict[str, Range | list[Value]]:
        for name, values in ranges.items():
            if isinstance(values, list) and not values:
                raise ValueError(f"`{name}` has no values")
            if isinstance(values, list):
                for place, value in enumerate(values):
                    if isinstance(value, float) and not math.isfinite(value):
                        raise ValueError(f"`{name}` has a value that is not finite: {value}")
                    if value in values[:place]:  # a trial's value would not tell which of them it is
                        raise ValueError(f"`{name}` has equal values: {values[values.index(value)]} and {value}")
        return ranges

    def budget(self, number: int) -> dict[str, int]:
        """What each trial of a round may spend, by the name of the parameter."""
        halving = self.halving
        return {} if halving is None else {halving.parameter: halving.smallest * halving.factor**number}

    def batches(self) -> list[range]:
        """Numbers of the trials that are drawn at a time."""
        size = self.batch if self.sampler == "tpe" else self.trials
        return [range(start, min(start + size, self.trials)) for start in range(0, self.trials, size)]

    def kept(self, number: int) -> int:
        """How many trials a round has."""
        return self.trials if self.halving is None else max(1, self.trials // self.halving.factor**number)


def trial_name(number: int) -> str:
    """`trial007`."""
    return f"trial{number:03d}"


class NextRoundParameters(BaseModel):
    """A later round of a sweep."""

    model_config = ConfigDict(extra="forbid")

    sweep: SweepParameters = Field(description="the sweep")
    number: int = Field(ge=1, description="of the round, the first being 0")
    trials: dict[str, dict[str, Value]] = Field(description="trial → its values, by parameter")


class DrawParameters(BaseModel):
    """A later batch of a sweep whose sampler learns."""

    model_config = ConfigDict(extra="forbid")

    sweep: SweepParameters = Field(description="the sweep")
    number: int = Field(ge=1, description="of the batch, the first being 0")
    trials: dict[str, dict[str, Value]] = Field(description="trial of the first batch → its values, by parameter")


class OverviewParameters(BaseModel):
    """What an overview of a sweep shows."""

    model_config = ConfigDict(extra="forbid")

    sweep: SweepParameters = Field(description="the sweep")
    trials: dict[str, dict[str, Value]] = Field(description="trial → its values, by parameter")
