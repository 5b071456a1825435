"""The `measure_speed` stage: how fast models train and answer, and the memory they need, side by side on one machine.

A stage of its own, because what a clock says cannot be reproduced: trainings and evaluations keep equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytrope.pipeline.data.misfits import refuse_misfits
from polytrope.pipeline.data.promised import PromisedSpeed
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, StageContext, stage
from polytrope.pipeline.stages.evaluate.parameters import MeasureSpeedParameters


def check(_parameters: MeasureSpeedParameters, upstream: Mapping[str, Any]) -> None:
    """Refuse a stage without models, before anything starts."""
    if not upstream.get("models"):
        raise UserError("inputs.models: no models", "name at least one: `models: {label: STAGE}`")


def promise(
    _parameters: MeasureSpeedParameters, upstream: Mapping[str, Any], _resources: Resources, _directory: Path
) -> PromisedSpeed:
    """The labels of the times; refuses a model that cannot take the data."""
    refuse_misfits(upstream, tangents=True)
    return PromisedSpeed(tuple(upstream["models"]))


@stage(
    check=check,
    promise=promise,
    measured=True,
)
def measure_speed(
    context: StageContext, dataset: Artifact, models: dict[str, Artifact], parameters: MeasureSpeedParameters
) -> dict[str, float]:
    """Measure training step, throughput, latency and memory of every model and write `speed.json`."""
    from polytrope.pipeline.stages.evaluate.speed import measure_models

    return measure_models(context, dataset, models, parameters)
