"""The `report` stage: one self-contained HTML page, its plots as PNG files, and its figures as JSON.

Parameters and flow; the work is in `polytrope.pipeline.stages.report`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytrope.pipeline.data.promised import (
    PromisedAnalysis,
    PromisedEvaluation,
    PromisedModel,
    PromisedSpeed,
    expect,
    expect_data,
    expect_evaluable,
    expect_model,
)
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, StageContext, stage
from polytrope.pipeline.stages.report.parameters import ReportParameters, group_of
from polytrope.pipeline.support.text import suggest


def check(parameters: ReportParameters, upstream: Mapping[str, Any]) -> None:
    """Refuse a baseline or a control that does not exist, before anything starts."""
    if parameters.control is not None and parameters.group_by is None:
        raise UserError("control: a value of `group_by`, which is not given", "give `group_by: AXIS`")
    models = upstream.get("models") or {}
    if not models:
        return
    if parameters.group_by is None:
        known = list(models)
    else:
        known = sorted({group_of(label, parameters.group_by) for label in models})
    for name, value in (("baseline", parameters.baseline), ("control", parameters.control)):
        if value is not None and value not in known:
            raise UserError(f"{name}: `{value}` is none of the models", f"there are: {', '.join(known)}")


def promise(parameters: ReportParameters, upstream: Mapping[str, Any], _resources: Resources, _directory: Path) -> None:
    """Nothing that others read; refuses inputs of another kind, and labels that were not evaluated."""
    evaluation = expect("inputs.evaluation", upstream["evaluation"], PromisedEvaluation)
    expect_model("inputs.conversion", upstream["conversion"])
    expect_data("inputs.dataset", upstream["dataset"])
    expect("inputs.speed", upstream["speed"], PromisedSpeed)
    expect("inputs.analysis", upstream["analysis"], PromisedAnalysis)
    expect("inputs.circuit", upstream["circuit"], PromisedModel)
    for label, model in upstream["models"].items():
        expect_evaluable(f"inputs.models.{label}", model)
        if evaluation is not None and label not in evaluation.labels:
            raise UserError(
                f"inputs.models.{label}: `{label}` is not a label of the evaluation",
                f"{suggest(label, evaluation.labels)}: give both stages the same `models:`",
            )
    if evaluation is not None and parameters.group_by is None:
        for label in parameters.labels:
            if label not in evaluation.labels:
                raise UserError(f"labels.{label}: the evaluation has no such label", suggest(label, evaluation.labels))


@stage(cpu_only=True, check=check, promise=promise)
def report(
    context: StageContext,
    evaluation: Artifact,
    models: dict[str, Artifact],
    parameters: ReportParameters,
    conversion: Artifact | None = None,
    dataset: Artifact | None = None,
    speed: Artifact | None = None,
    analysis: Artifact | None = None,
    circuit: Artifact | None = None,
) -> dict[str, float]:
    """Write `report.html`, `report.json` and `plots/*.png`, and show them on the workflow's MLflow run."""
    from polytrope.pipeline.stages.report.output import write_report

    others = {"dataset": dataset, "conversion": conversion, "speed": speed, "analysis": analysis, "circuit": circuit}
    return write_report(context, evaluation, models, parameters, others)
