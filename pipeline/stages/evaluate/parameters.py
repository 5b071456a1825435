"""The parameters of the `evaluate` and `measure_speed` stages."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

NO_QUESTIONS = "answers: the lines of this dataset ask no questions"
NO_QUESTIONS_HINT = "use a dataset of `shard` with `source: {kind: symbolic, …}`, or leave it out"


class AnswersParameters(BaseModel):
    """Held-out lines `question ; answer` whose questions the model answers."""

    model_config = ConfigDict(extra="forbid")

    count: int = Field(ge=1, description="lines of the validation split (the first ones that the context holds)")


class EvaluateParameters(BaseModel):
    """What is measured, and on how much of the validation data."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

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
    answers: AnswersParameters | None = Field(
        None,
        description="text of a `symbolic` source: let the model answer held-out questions, taking the most probable "
        "token, and compute whether it is right",
    )
    activation_samples: int = Field(8, ge=0, description="validation samples that measure the activations' inputs")
    calibration_bins: int = Field(15, ge=1, description="confidence bins of the calibration error")
    seed: int = Field(0, ge=0, lt=2**63, description="of sampling")
    threads: int = Field(1, ge=1, description="CPU threads; part of the result's identity")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the forward pass")


class MeasureSpeedParameters(BaseModel):
    """How often, and on batches of which size."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    batch_size: int = Field(8, ge=1, description="samples per training step and per forward pass for throughput")
    rounds: int = Field(5, ge=1, description="measurements of every model; the rounds go over all models in turn")
    steps: int = Field(3, ge=1, description="training steps, and forward passes, per measurement")
    threads: int = Field(1, ge=1, description="CPU threads")
