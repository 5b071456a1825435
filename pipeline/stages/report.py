"""The `report` stage: one self-contained HTML page, its plots as PNG files, and its figures as JSON.

Parameters and flow; the work is in `polytrope.pipeline.reporting`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, stage


class ReportParameters(BaseModel):
    """What the page says beyond the figures."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field("Results", description="heading of the page")
    description: str = Field("", description="a paragraph below the heading")
    baseline: str | None = Field(
        None, description="label (or group) that the others are compared with; default: the first"
    )
    group_by: str | None = Field(
        None,
        description="matrix axis whose values are compared; the branches that differ in other axes (seed) are repeats: "
        "mean, 95 % confidence interval and paired difference to the baseline",
    )
    labels: dict[str, str] = Field({}, description="label → the name shown on the page")
    command: str = Field("", description="the command that made this run, shown under how to reproduce")
    maximum_layers: int = Field(12, ge=1, description="layers shown in the plots of shapes, evenly chosen")


def check(parameters: ReportParameters, upstream: Mapping[str, Any]) -> None:
    """Refuse a baseline that does not exist, before anything starts."""
    models = upstream.get("models") or {}
    if parameters.baseline is None or not models:
        return
    if parameters.group_by is None:
        known = list(models)
    else:
        known = sorted({group_of(label, parameters.group_by) for label in models})
    if parameters.baseline not in known:
        raise UserError(
            f"report: `baseline: {parameters.baseline}` is none of the models", f"there are: {', '.join(known)}"
        )


def group_of(label: str, axis: str) -> str:
    """The value of a matrix axis in a label: `gelu` for `train[activation=gelu,seed=0]` and `activation`.

    Raises:
        UserError: a label without this axis.
    """
    inside = label.partition("[")[2].rstrip("]")
    for part in inside.split(","):
        name, _, value = part.partition("=")
        if name == axis:
            return value
    raise UserError(
        f"report: `group_by: {axis}`, but `{label}` is not a branch of that axis",
        "give `models:` the stage with the matrix",
    )


@stage(check=check, code=("polytrope.pipeline.reporting",))
def report(
    context: StageContext,
    evaluation: Artifact,
    models: dict[str, Artifact],
    parameters: ReportParameters,
    conversion: Artifact | None = None,
    dataset: Artifact | None = None,
    speed: Artifact | None = None,
) -> dict[str, float]:
    """Write `report.html`, `report.json` and `plots/*.png`, and show them on the workflow's MLflow run."""
    from polytrope.pipeline.reporting.run import write_report

    return write_report(context, evaluation, models, parameters, conversion, dataset, speed)
