"""The `train` stage: train or fine-tune a model with DeepSpeed on the workers the workflow grants.

Parameters and flow; the work is in `polytrope.pipeline.stages.train`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, stage
from polytrope.pipeline.stages.train.parameters import (
    TrainParameters,
)


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
    shard = upstream.get("dataset")
    tokenizer = getattr(shard, "tokenizer", None)
    tokens = getattr(tokenizer, "vocab_size", None)
    rows = parameters.model.vocab_size if parameters.model else None
    if tokens is not None and rows is not None and tokens > rows:
        raise UserError(
            f"train: the dataset's vocabulary ({tokens} tokens) is larger than the model's embedding "
            f"(`model.vocab_size`: {rows})",
            f"set `model.vocab_size` to at least {tokens}, or leave it out",
        )
    length = getattr(shard, "sequence_length", None)
    positions = parameters.model.sequence_length if parameters.model else None
    if isinstance(length, int) and positions is not None and length > positions:
        raise UserError(
            f"train: the dataset's sequences ({length} tokens) are longer than `model.sequence_length` ({positions})",
            f"set `model.sequence_length` to at least {length}, or leave it out",
        )


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
    summary = json.loads((context.output / "training.json").read_text())
    if parameters.register_as and "failure" not in summary:
        context.log_model(".", name=parameters.register_as, alias=parameters.register_alias)
    return {name: value for name, value in summary.items() if isinstance(value, int | float)}
