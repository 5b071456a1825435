"""The `evaluate` stage: the same figures, on the same validation data, for every model it is given.

Parameters and flow; the work is in `polytrope.pipeline.evaluation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, stage


class EvaluateParameters(BaseModel):
    """What is measured, and on how much of the validation data."""

    model_config = ConfigDict(extra="forbid")

    samples: int | None = Field(None, ge=1, description="validation samples to use (the first ones); default: all")
    batch_size: int = Field(16, ge=1, description="samples per forward pass")
    stride: int | None = Field(
        None,
        ge=1,
        description="text: slide the window by this many tokens and score only the new ones, so that every token has "
        "at least sequence_length - stride tokens before it; default: score each block on its own",
    )
    drift: dict[str, str] = Field(
        {},
        description="label → label of its reference: also report the KL divergence between their predictions and the "
        "cosine between the outputs of their blocks (on `activation_samples`)",
    )
    prompt: str = Field("", description="text: what the sampled text continues; empty: the start of a document")
    sample_tokens: int = Field(120, ge=0, description="text: length of the sampled text, 0 for none")
    temperature: float = Field(0.8, ge=0, description="text: of sampling; 0 takes the most probable token")
    top_k: int | None = Field(50, ge=1, description="text: sample among the k most probable tokens")
    activation_samples: int = Field(8, ge=0, description="validation samples that measure the activations' inputs")
    calibration_bins: int = Field(15, ge=1, description="confidence bins of the calibration error")
    seed: int = Field(0, ge=0, description="of sampling")
    threads: int = Field(1, ge=1, description="CPU threads; part of the result's identity")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the forward pass")


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
    code=(
        "polytrope.pipeline.evaluation",
        "polytrope.pipeline.reader",
        "polytrope.pipeline.tokenization",
        "polytrope.models",
        "polytrope.ops",
    ),
)
def evaluate(
    context: StageContext, dataset: Artifact, models: dict[str, Artifact], parameters: EvaluateParameters
) -> dict[str, float]:
    """Measure every model on the validation split of `dataset` and write `evaluation.json`."""
    from polytrope.pipeline.evaluation.run import evaluate_models

    return evaluate_models(context, dataset, models, parameters)
