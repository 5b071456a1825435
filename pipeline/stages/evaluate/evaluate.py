"""The `evaluate` stage: the same figures, on the same validation data, for every model it is given.

Parameters and flow; the work is in `polytrope.pipeline.stages.evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, stage
from polytrope.pipeline.stages.evaluate.parameters import EvaluateParameters


def check(parameters: EvaluateParameters, upstream: Mapping[str, Any]) -> None:
    """Refuse labels that do not exist and a stride longer than the context, before anything starts."""
    models = upstream.get("models") or {}
    if not models:
        raise UserError("evaluate: no models", "name at least one under `inputs: models: {label: STAGE}`")
    for label, reference in parameters.drift.items():
        for name in (label, reference):
            if name not in models:
                raise UserError(
                    f"evaluate: `drift` names `{name}`, which is not a model of this stage",
                    f"the models are: {', '.join(models)}",
                )
    length = getattr(upstream.get("dataset"), "sequence_length", None)
    if isinstance(length, int) and parameters.stride is not None and parameters.stride > length:
        raise UserError(
            f"evaluate: `stride` ({parameters.stride}) is longer than the dataset's sequences ({length})",
            "a stride of half the sequence length is usual",
        )


@stage(
    check=check,
)
def evaluate(
    context: StageContext, dataset: Artifact, models: dict[str, Artifact], parameters: EvaluateParameters
) -> dict[str, float]:
    """Measure every model on the validation split of `dataset` and write `evaluation.json`."""
    from polytrope.pipeline.stages.evaluate.evaluation import evaluate_models

    return evaluate_models(context, dataset, models, parameters)
