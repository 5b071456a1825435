"""The `measure_speed` stage: how fast models train and answer, and the memory they need, side by side on one machine.

A stage of its own, because what a clock says cannot be reproduced: trainings and evaluations keep equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, stage


class MeasureSpeedParameters(BaseModel):
    """How often, and on batches of which size."""

    model_config = ConfigDict(extra="forbid")

    batch_size: int = Field(8, ge=1, description="samples per training step and per forward pass for throughput")
    rounds: int = Field(5, ge=1, description="measurements of every model; the rounds go over all models in turn")
    steps: int = Field(3, ge=1, description="training steps, and forward passes, per measurement")
    threads: int = Field(1, ge=1, description="CPU threads")


def check(_parameters: MeasureSpeedParameters, upstream: Mapping[str, Any]) -> None:
    """Refuse a stage without models, before anything starts."""
    if not upstream.get("models"):
        raise UserError("measure_speed: no models", "name at least one under `inputs: models: {label: STAGE}`")


@stage(
    check=check,
    measured=True,
    code=(
        "polytrope.pipeline.evaluation.run",
        "polytrope.pipeline.evaluation.speed",
        "polytrope.pipeline.reader",
        "polytrope.models",
        "polytrope.ops",
    ),
)
def measure_speed(
    context: StageContext, dataset: Artifact, models: dict[str, Artifact], parameters: MeasureSpeedParameters
) -> dict[str, float]:
    """Measure training step, throughput, latency and memory of every model and write `speed.json`."""
    from polytrope.pipeline.evaluation.speed import measure_models

    return measure_models(context, dataset, models, parameters)
