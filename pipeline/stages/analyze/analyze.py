"""The `analyze` stage: figures in closed form from the parameters of trained models, such as kernels and bounds.

Parameters and flow; the work is in `polytrope.pipeline.stages.analyze`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytrope.pipeline.data.misfits import refuse_misfits
from polytrope.pipeline.data.promised import PromisedAnalysis
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, StageContext, stage
from polytrope.pipeline.stages.analyze.parameters import AnalyzeParameters


def check(_parameters: AnalyzeParameters, upstream: Mapping[str, Any]) -> None:
    """Refuse a stage without models, before anything starts."""
    if not upstream.get("models"):
        raise UserError("inputs.models: no models", "name at least one: `models: {label: STAGE}`")


def promise(
    parameters: AnalyzeParameters, upstream: Mapping[str, Any], _resources: Resources, _directory: Path
) -> PromisedAnalysis:
    """The labels of the figures; refuses a model that cannot take the data."""
    refuse_misfits(upstream)
    return PromisedAnalysis(tuple(upstream["models"]), tuple(entry.name for entry in parameters.analyses))


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
