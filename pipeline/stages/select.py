"""The `select` stage: the best of several models by one figure, as an artifact that other stages take as a model.

best:
  uses: select
  inputs: {models: train}                      # a fan-in; figures of training.json
  with: {metric: val/loss, mode: min}

With `inputs: {evaluation: evaluate}` the figures are those of `evaluation.json`, such as `metric: top1, mode: max`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.data.evaluation_file import Evaluation, read_evaluation
from polytrope.pipeline.data.promised import PromisedEvaluation, PromisedModel, expect
from polytrope.pipeline.data.records import Record, read_record, write_record
from polytrope.pipeline.data.training_file import figure_of_training, read_training
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import RETURNED_STAGES, Artifact, Resources, StageContext, stage
from polytrope.pipeline.support.text import suggest

SELECTION_FILE = "selection.json"
_EVALUATED = (
    "loss", "perplexity", "bits_per_byte", "r2", "top1", "top5", "calibration_error", "parameters",
)  # fmt: skip
_OF_TEXT = ("perplexity", "bits_per_byte")
_OF_CLASSES = ("top1", "top5", "calibration_error")
_OF_NUMBERS = ("r2",)
_UNTRAINED = "the model was not trained here, so it has no figures of its own"
_EVALUATE_FIRST = "evaluate the models first: `inputs: {models: …, evaluation: EVALUATE_STAGE}`"


class SelectParameters(BaseModel):
    """Which figure decides, and in which direction."""

    model_config = ConfigDict(extra="forbid")

    metric: str = Field(
        description="of each training (`val/loss`), or, where there is an `evaluation` input, of the evaluation: "
        + ", ".join(_EVALUATED)
    )
    mode: Literal["min", "max"] = Field(description="min: the smallest value is best; max: the largest")


class Candidate(Record):
    """A model among which was chosen: its value, or why it has none (`left_out`)."""

    stage: str
    digest: str
    value: float | None = None
    left_out: str | None = None


class Selection(Record):
    """`selection.json`: what was chosen, why, and from what.

    Args:
        chosen: label of the model whose files are beside this one.
        source: the file that `metric` was read from: `training.json` of each, or `evaluation.json`.
        candidates: by label; of equal values the first one is chosen.
        earlier: the choice by which the chosen model had itself become an input.
    """

    format: Literal[1] = 1
    chosen: str
    metric: str
    mode: Literal["min", "max"]
    source: str
    candidates: dict[str, Candidate]
    earlier: Selection | None = None


def check(parameters: SelectParameters, upstream: Mapping[str, Any]) -> None:
    """Refuse an empty choice and a figure that no evaluation has, before anything starts."""
    if not upstream.get("models"):
        raise UserError("inputs.models: no models", "name them: `models: STAGE`, a stage with a matrix, or a list")
    if upstream.get("evaluation") is not None and parameters.metric not in _EVALUATED:
        raise UserError(
            f"metric: an evaluation has no figure `{parameters.metric}`", suggest(parameters.metric, _EVALUATED)
        )


def promise(
    parameters: SelectParameters, upstream: Mapping[str, Any], _resources: Resources, _directory: Path
) -> PromisedModel | None:
    """What is known of all the models alike.

    Raises:
        UserError: an input of another kind; a figure that the evaluation, or the training of a model, will not have.
    """
    evaluation = expect("inputs.evaluation", upstream["evaluation"], PromisedEvaluation)
    if evaluation is not None and evaluation.kind is not None:
        missing = {*_OF_CLASSES, *_OF_TEXT} if evaluation.predicts_numbers else set(_OF_NUMBERS)
        missing |= set(_OF_TEXT) if evaluation.kind != "text" else set()
        if parameters.metric in missing:
            figures = [name for name in _EVALUATED if name not in missing]
            raise UserError(
                f"metric: an evaluation on {evaluation.kind} has no figure `{parameters.metric}`"
                + (" where numbers are predicted" if evaluation.predicts_numbers else ""),
                suggest(parameters.metric, figures),
            )
    models = {
        label: expect(f"inputs.models.{label}", given, PromisedModel) for label, given in upstream["models"].items()
    }
    evaluated = parameters.metric in _EVALUATED
    for label, model in models.items():
        # with an evaluation, `check` refuses what none has
        if model is not None and upstream["evaluation"] is None and parameters.metric not in model.figures:
            if not model.figures:
                raise UserError(f"inputs.models.{label}: {_UNTRAINED}", _EVALUATE_FIRST)
            raise UserError(
                f"metric: the training of `{label}` will have no figure `{parameters.metric}`",
                f"{suggest(parameters.metric, model.figures)}{'; ' + _EVALUATE_FIRST if evaluated else ''}",
            )
    first, *others = models.values()
    return first if all(model == first for model in others) else None


@stage(cpu_only=True, check=check, promise=promise)
def select(
    context: StageContext,
    models: dict[str, Artifact],
    parameters: SelectParameters,
    evaluation: Artifact | None = None,
) -> dict[str, float]:
    """Choose the best of `models` by one figure; the artifact is that model, with `selection.json` beside it."""
    content = None if evaluation is None else read_evaluation(evaluation.path)
    candidates = {label: _candidate(label, model, parameters.metric, content) for label, model in models.items()}
    values = {label: item.value for label, item in candidates.items() if item.value is not None}
    if not values:
        label, first = next(iter(candidates.items()))
        raise UserError(
            f"no model is left to choose from; `{label}`: {first.left_out}", f"look at the stage `{first.stage}`"
        )
    best = min if parameters.mode == "min" else max
    chosen = best(values, key=values.__getitem__)
    source = models[chosen].path
    _copy_model(source, context.output)
    selection = {
        "format": 1,
        "chosen": chosen,
        "metric": parameters.metric,
        "mode": parameters.mode,
        "source": "training.json" if content is None else "evaluation.json",
        "candidates": candidates,
    }
    if (source / SELECTION_FILE).exists():
        selection["earlier"] = read_selection(source)
    write_record(context.output / SELECTION_FILE, Selection.model_validate(selection))
    context.log_artifact(SELECTION_FILE)
    context.log_params({"chosen": chosen})
    left_out = len(candidates) - len(values)
    rest = f", {left_out} left out" if left_out else ""
    context.message(
        f"chose {chosen}: {parameters.metric} {values[chosen]:.6g}, {parameters.mode} of {len(values)}{rest}"
    )
    return {parameters.metric: values[chosen], "compared": len(values), "left_out": left_out}


def read_selection(directory: Path) -> Selection:
    """Read `selection.json`.

    Raises:
        UserError: not there, damaged, or of another version.
    """
    return read_record(directory / SELECTION_FILE, Selection, "name a `select` stage")


def _copy_model(source: Path, target: Path) -> None:
    """All files, without an earlier choice and without the stages that follow the one that made the model.

    Contents only: an artifact is read-only, and the output is still written to.
    """
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and str(name) not in (SELECTION_FILE, RETURNED_STAGES):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def _candidate(label: str, model: Artifact, metric: str, evaluation: Evaluation | None) -> Candidate:
    value, why = _trained(label, model, metric) if evaluation is None else _evaluated(label, model, metric, evaluation)
    fields = {"stage": model.stage, "digest": model.digest, "value": value, "left_out": why}
    return Candidate.model_validate({name: given for name, given in fields.items() if given is not None})


def _trained(label: str, model: Artifact, metric: str) -> tuple[float | None, str | None]:
    """The figure of a training, or why it has none."""
    if read_training(model.path) is None:
        raise UserError(
            f"select: `{label}` (stage `{model.stage}`): {_UNTRAINED}",
            _EVALUATE_FIRST,
        )
    try:
        return figure_of_training(model.path, metric)
    except UserError as error:
        raise UserError(f"select: `{label}`: {error.message}", error.hint) from None


def _evaluated(label: str, model: Artifact, metric: str, evaluation: Evaluation) -> tuple[float | None, str | None]:
    """The figure in an evaluation, which knows the model by the digest of its artifact, or why it has none."""
    found = next((item for item in evaluation.models.values() if item.digest == model.digest), None)
    if found is None:
        raise UserError(
            f"select: `{label}` (stage `{model.stage}`) is not in the evaluation, which has "
            f"{', '.join(f'`{name}`' for name in evaluation.models)}",
            "give `evaluate` and `select` the same `models:`",
        )
    if found.failure is not None:
        return None, found.failure
    figures = [name for name in _EVALUATED if name in found.model_fields_set]
    if metric not in figures:
        raise UserError(f"select: `{label}` has no figure `{metric}` in the evaluation", suggest(metric, figures))
    value = getattr(found, metric)
    return (None, f"{metric} is not finite") if value is None or not math.isfinite(value) else (float(value), None)
