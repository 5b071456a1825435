"""The `evaluate` stage: the same figures, on the same validation data, for every model it is given.

Parameters and flow; the work is in `polytrope.pipeline.stages.evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytrope.pipeline.data.misfits import refuse_misfits
from polytrope.pipeline.data.promised import PromisedEvaluation, PromisedImages, PromisedNumbers, PromisedText
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, StageContext, stage
from polytrope.pipeline.stages.evaluate.parameters import NO_QUESTIONS, NO_QUESTIONS_HINT, EvaluateParameters


def check(parameters: EvaluateParameters, upstream: Mapping[str, Any]) -> None:
    """Refuse labels that do not exist and a stride longer than the context, before anything starts."""
    models = upstream.get("models") or {}
    if not models:
        raise UserError("inputs.models: no models", "name at least one: `models: {label: STAGE}`")
    for label, reference in parameters.drift.items():
        for name in (label, reference):
            if name not in models:
                raise UserError(
                    f"drift: `{name}` is not a model of this stage",
                    f"the models are: {', '.join(models)}",
                )


def promise(
    parameters: EvaluateParameters, upstream: Mapping[str, Any], _resources: Resources, _directory: Path
) -> PromisedEvaluation:
    """The labels of the figures; refuses a model that cannot take the data, and a stride longer than the context."""
    data = refuse_misfits(upstream, tangents=True)
    if isinstance(data, PromisedText) and parameters.stride is not None and parameters.stride > data.sequence_length:
        raise UserError(
            f"stride: {parameters.stride} is longer than the dataset's sequences ({data.sequence_length})",
            "a stride of half the sequence length is usual",
        )
    if isinstance(data, PromisedText) and parameters.answers is not None and data.task is None:
        raise UserError(NO_QUESTIONS, NO_QUESTIONS_HINT)
    if isinstance(data, PromisedImages | PromisedNumbers):
        for name in ("stride", "prompt", "answers"):
            if getattr(parameters, name):
                raise UserError(f"{name}: for text, and this dataset holds {data.kind}", "leave it out")
    predicts_numbers = isinstance(data, PromisedNumbers) and data.classes is None
    if parameters.drift and predicts_numbers:
        raise UserError("drift: of probabilities, and this dataset has numbers to predict", "leave it out")
    return PromisedEvaluation(tuple(upstream["models"]), None if data is None else data.kind, predicts_numbers)


@stage(
    check=check,
    promise=promise,
)
def evaluate(
    context: StageContext, dataset: Artifact, models: dict[str, Artifact], parameters: EvaluateParameters
) -> dict[str, float]:
    """Measure every model on the validation split of `dataset` and write `evaluation.json`."""
    from polytrope.pipeline.stages.evaluate.evaluation import evaluate_models

    return evaluate_models(context, dataset, models, parameters)
