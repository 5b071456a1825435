"""The `train` stage: train or fine-tune a model with DeepSpeed on the workers the workflow grants.

Parameters and flow; the work is in `polytrope.pipeline.stages.train`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytrope.pipeline.data.lineage import Lineage, read_lineage, write_lineage
from polytrope.pipeline.data.training_file import read_training
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, stage
from polytrope.pipeline.stages.train.parameters import ModelParameters, TrainParameters, architectures_for


def check(parameters: TrainParameters, upstream: Mapping[str, Any]) -> None:
    """Refuse what cannot work before anything starts."""
    fine_tuning = upstream.get("initial") is not None
    if parameters.model is None and not fine_tuning:
        raise UserError(
            "train: `model` is missing",
            "describe the model under `with: model:`, or name one under `inputs: initial:` to fine-tune it",
        )
    if parameters.model is not None and fine_tuning:
        raise UserError(
            "train: `model` and an `initial` input", "the architecture comes from `initial`: remove `model`"
        )
    if parameters.model is not None:
        _check_shapes(parameters.model, upstream.get("dataset"))


def _check_shapes(given: ModelParameters, shard: Any) -> None:
    """Compare the model with what the parameters of the stage that makes the data set say; it need not be ours."""
    from polytrope.pipeline.stages.train.training_plan import fit_images, fit_text

    model = given.model_dump(exclude_none=True)
    architecture = model.pop("architecture")
    size, length = getattr(shard, "image_size", None), getattr(shard, "sequence_length", None)
    kind = "images" if isinstance(size, int) else "text" if isinstance(length, int) else None
    if kind is not None and architecture not in architectures_for(kind):
        raise UserError(
            f"train: a {architecture} (`model.architecture`) cannot be trained on {kind}",
            f"use `architecture: {' or '.join(architectures_for(kind))}`, or another dataset",
        )
    if "preset" in model:
        return  # a published size: looking it up would import torch; `make_plan` compares it
    if kind == "text":
        fit_text(model, getattr(getattr(shard, "tokenizer", None), "vocab_size", None), length)
    elif kind == "images":
        digits = getattr(getattr(shard, "source", None), "kind", None) == "digits"
        fit_images(model, 10 if digits else None, getattr(shard, "channels", None), size)


def fingerprint(parameters: TrainParameters, directory: Path) -> dict[str, str]:
    """The DeepSpeed configuration, which is part of the result's identity. Refuses contradictions."""
    import hashlib

    from polytrope.pipeline.stages.train.deepspeed_config import read_configuration

    content = json.dumps(read_configuration(parameters, directory), sort_keys=True)
    return {"deepspeed": hashlib.sha256(content.encode()).hexdigest()}


@stage(
    parallel=True,
    check=check,
    fingerprint=fingerprint,
)
def train(
    context: StageContext,
    dataset: Artifact,
    parameters: TrainParameters,
    initial: Artifact | None = None,
) -> dict[str, float]:
    """Train a model on `dataset`, or fine-tune `initial`, and write the final weights."""
    from polytrope.pipeline.stages.train.training_plan import make_plan
    from polytrope.pipeline.stages.train.workers import run_workers

    check(parameters, {"initial": initial})
    plan = make_plan(context, dataset, initial, parameters)
    context.log_dataset("train", dataset.digest, str(dataset.path), plan.dataset_profile)
    context.log_params(plan.facts)
    run_workers(context, plan)
    training = read_training(context.output)
    assert training is not None  # rank 0 has written it
    samples = training.samples or 0
    lineage = Lineage(samples=samples, tokens=training.tokens)
    if initial is not None:
        lineage = read_lineage(initial.path).then(initial.stage, initial.digest, samples, training.tokens)
    write_lineage(context.output, lineage)
    if parameters.register_as and training.failure is None:
        context.log_model(".", name=parameters.register_as, alias=parameters.register_alias)
    context.log_params(training.counts())
    return training.metrics()
