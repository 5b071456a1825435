"""`speed.json`: what the `measure_speed` stage measured."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from polytrope.pipeline.data.records import OpenRecord, Record, read_record, write_record

SPEED_FILE = "speed.json"


class SpeedProtocol(OpenRecord):
    """How it was measured: the stage's parameters, on which device, `units` tokens, images, rows (`unit`) per batch."""

    device: str
    unit: Literal["tokens", "images", "rows"]
    units: int
    batch_size: int
    rounds: int
    steps: int
    threads: int


class Speed(Record):
    """The figures of every model by name: `step_milliseconds`, `training_throughput`, …

    `failures`: models that could not be measured, and why.
    """

    format: Literal[1] = 1
    protocol: SpeedProtocol
    models: dict[str, dict[str, float]]
    failures: dict[str, str] | None = None


def write_speed(directory: Path, speed: Speed) -> None:
    """Write `speed.json`."""
    write_record(directory / SPEED_FILE, speed)


def read_speed(directory: Path) -> Speed:
    """Read `speed.json`.

    Raises:
        UserError: not there, damaged, or of another version.
    """
    return read_record(directory / SPEED_FILE, Speed, "name a `measure_speed` stage")
