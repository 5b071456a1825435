"""The parameters of the `report` stage: what the page says beyond the figures."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.errors import UserError


class ReportParameters(BaseModel):
    """What the page says beyond the figures."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

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
        f"group_by: {axis}: `{label}` is not a branch of that axis",
        "give `models:` the stage with the matrix",
    )
