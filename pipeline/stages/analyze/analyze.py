"""The `analyze` stage: figures in closed form from the parameters of trained models, such as kernels and bounds.

Parameters and flow; the work is in `polytrope.pipeline.stages.analyze`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytrope.pipeline.data.misfits import refuse_misfits
from polytrope.pipeline.data.promised import (
    PromisedAnalysis,
    PromisedImages,
    PromisedModel,
    PromisedNumbers,
    PromisedText,
)
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, StageContext, stage
from polytrope.pipeline.stages.analyze.parameters import AnalyzeParameters, refuse_width


def check(_parameters: AnalyzeParameters, upstream: Mapping[str, Any]) -> None:
    """Refuse a stage without models, before anything starts."""
    if not upstream.get("models"):
        raise UserError("inputs.models: no models", "name at least one: `models: {label: STAGE}`")


def promise(
    parameters: AnalyzeParameters, upstream: Mapping[str, Any], _resources: Resources, _directory: Path
) -> PromisedAnalysis:
    """The labels of the figures; refuses a model that cannot take the data."""
    refuse_misfits(upstream)
    names = tuple(entry.name for entry in parameters.analyses)
    for name in names:
        _refuse_meaningless(name, upstream)
    return PromisedAnalysis(tuple(upstream["models"]), names)


def _refuse_meaningless(name: str, upstream: Mapping[str, Any]) -> None:
    """Refuse an analysis that has nothing to say of this data or these models."""
    data = upstream["dataset"]
    if name == "modular" and isinstance(data, PromisedText | PromisedImages | PromisedNumbers):
        pairs = (
            isinstance(data, PromisedNumbers) and data.classes is not None and data.inputs in (None, 2 * data.classes)
        )
        if not pairs:
            raise UserError(
                "analyses: `modular` is for pairs of numbers and their sums, and the data set holds other samples",
                "use a data set of `shard_numbers` with `source: {kind: modular}`",
            )
    if name == "width":
        for label, model in upstream["models"].items():
            if isinstance(model, PromisedModel):
                refuse_width(f"inputs.models.{label}", model.architecture, model.settings)


@stage(
    cpu_only=True,
    check=check,
    promise=promise,
)
def analyze(
    context: StageContext, dataset: Artifact, models: dict[str, Artifact], parameters: AnalyzeParameters
) -> dict[str, float]:
    """Run the analyses on every model and write `analysis.json` and `plots/*.png`.

    The activations' inputs are measured on the first validation samples of `dataset`.
    """
    from polytrope.pipeline.stages.analyze.analysis import analyze_models

    return analyze_models(context, dataset, models, parameters)
