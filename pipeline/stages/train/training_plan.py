"""What every training worker is told: resolved model, sizes, paths. Plain JSON, equal on both executors."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, EventWriter, Resources, StageContext
from polytrope.pipeline.stages.train.deepspeed_config import read_configuration, zero_stage_of
from polytrope.pipeline.stages.train.parameters import TrainParameters


class Diverged(ArithmeticError):
    """NaN, infinity or a gradient spike. `batch`: number of the global batch in the stream of data."""

    def __init__(self, message: str, batch: int) -> None:
        super().__init__(message)
        self.batch = batch


@dataclass(frozen=True)
class TrainingPlan:
    """A training, resolved.

    Args:
        parameters: of the stage.
        architecture, model: what `build_model` takes.
        dataset, initial: directories.
        workers, gpus: number of workers, and of GPUs for each (0: CPU).
        micro_batch_size, accumulation_steps: global batch = micro batch × workers × accumulation.
        steps: optimizer steps.
        deepspeed: the configuration, as far as the stage does not fill it in.
        zero_stage: what is sharded over the workers.
        skipped_batches, skip_reasons: global batches of the stream that are left out (`on_divergence: rollback`).
        dataset_profile, facts: for MLflow.
    """

    parameters: TrainParameters
    architecture: str
    model: dict[str, Any]
    dataset: Path
    initial: Path | None
    workers: int
    gpus: float
    micro_batch_size: int
    accumulation_steps: int
    steps: int
    train_samples: int
    deepspeed: dict[str, Any]
    zero_stage: int
    skipped_batches: list[int]
    skip_reasons: list[str]
    dataset_profile: dict[str, Any]
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        content = dataclasses.asdict(dataclasses.replace(self, parameters=None))  # type: ignore[arg-type]
        content["parameters"] = self.parameters.model_dump(mode="json")
        content["dataset"] = str(self.dataset)
        content["initial"] = None if self.initial is None else str(self.initial)
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainingPlan:
        return cls(
            **{
                **content,
                "parameters": TrainParameters.model_validate(content["parameters"]),
                "dataset": Path(content["dataset"]),
                "initial": None if content["initial"] is None else Path(content["initial"]),
            }
        )


def context_to_json(context: StageContext) -> dict[str, Any]:
    """The stage context for a worker process."""
    return {
        "stage": context.stage,
        "run_id": context.run_id,
        "key": context.key,
        "attempt": context.attempt,
        "output": str(context.output),
        "scratch_directory": str(context.scratch_directory),
        "executor": context.executor,
        "resources": dataclasses.asdict(context.resources),
        "events": str(context.events.directory),
    }


def context_from_json(content: dict[str, Any]) -> StageContext:
    """The stage context in a worker process: it writes events of its own to the same place."""
    return StageContext(
        **{
            **content,
            "output": Path(content["output"]),
            "scratch_directory": Path(content["scratch_directory"]),
            "resources": Resources(**content["resources"]),
            "events": EventWriter(Path(content["events"])),
        }
    )


def make_plan(
    context: StageContext, dataset: Artifact, initial: Artifact | None, parameters: TrainParameters
) -> TrainingPlan:
    """Resolve defaults from the dataset, the initial model and the granted resources.

    Raises:
        UserError: sizes that do not divide, a vocabulary or a tokenizer that does not fit, too little data.
    """
    description = read_dataset(dataset.path)
    architecture, model = _resolve_model(description, dataset, initial, parameters)
    workers = context.resources.workers
    micro, accumulation = _split_batch(parameters, workers)
    samples = int(description["splits"]["train"]["samples"])
    if samples < 1:
        raise UserError(f"the dataset of `{dataset.stage}` has no training samples", "use a larger corpus")
    if int(description["splits"]["validation"]["samples"]) < 1:
        raise UserError(
            f"the dataset of `{dataset.stage}` has no validation samples",
            "use a larger corpus, shorter sequences, or a larger validation fraction",
        )
    steps = parameters.steps or math.ceil(float(parameters.epochs or 0) * samples / parameters.global_batch_size)
    deepspeed = read_configuration(parameters)  # a stage runs in the workflow's directory
    return TrainingPlan(
        parameters=parameters,
        architecture=architecture,
        model=model,
        dataset=dataset.path,
        initial=initial.path if initial else None,
        workers=workers,
        gpus=context.resources.gpus,
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        steps=steps,
        train_samples=samples,
        deepspeed=deepspeed,
        zero_stage=zero_stage_of(deepspeed, parameters),
        skipped_batches=[],
        skip_reasons=[],
        dataset_profile={"splits": description["splits"], "name": description.get("name", "")},
        facts={
            "architecture": architecture,
            "steps": steps,
            "workers": workers,
            "micro_batch_size": micro,
            "accumulation_steps": accumulation,
            "zero_stage": zero_stage_of(deepspeed, parameters),
        },
    )


def read_dataset(directory: Path) -> dict[str, Any]:
    """The content of `dataset.json`."""
    try:
        content: dict[str, Any] = json.loads((directory / "dataset.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{directory} is no dataset: dataset.json cannot be read: {error}", "`dataset` must name a `shard` stage"
        ) from error
    return content


def _split_batch(parameters: TrainParameters, workers: int) -> tuple[int, int]:
    if parameters.global_batch_size % workers:
        raise UserError(
            f"global_batch_size ({parameters.global_batch_size}) must be a multiple of resources.workers ({workers})",
            f"for example global_batch_size: {workers * max(1, round(parameters.global_batch_size / workers))}",
        )
    per_worker = parameters.global_batch_size // workers
    micro = parameters.micro_batch_size or per_worker
    if per_worker % micro:
        raise UserError(
            f"global_batch_size ({parameters.global_batch_size}) must be a multiple of micro_batch_size ({micro}) × "
            f"resources.workers ({workers})",
            f"one worker sees {per_worker} samples per step: choose a micro_batch_size that divides this",
        )
    return micro, per_worker // micro


def _resolve_model(
    description: dict[str, Any], dataset: Artifact, initial: Artifact | None, parameters: TrainParameters
) -> tuple[str, dict[str, Any]]:
    kind = description.get("kind", "text")
    if initial is not None:
        architecture, model = _read_initial(initial)
    else:
        assert parameters.model is not None  # `check` saw to it
        model = parameters.model.model_dump(exclude_none=True)
        architecture = model.pop("architecture")
        model = _expand_preset(architecture, model)
    wanted = "gpt2" if kind == "text" else "convnext"
    if architecture != wanted:
        raise UserError(
            f"a {kind} dataset (`{dataset.stage}`) cannot train a {architecture}", f"use `architecture: {wanted}`"
        )
    if kind == "text":
        if initial is not None:
            _same_tokenizer(initial, dataset)
        tokens, length = int(description["tokenizer"]["vocab_size"]), int(description["sequence_length"])
        model.setdefault("vocab_size", -(-tokens // 64) * 64)
        model.setdefault("sequence_length", length)
        if tokens > model["vocab_size"]:
            raise UserError(
                f"the dataset's vocabulary ({tokens} tokens) is larger than the model's embedding "
                f"({model['vocab_size']} rows)",
                f"set `model.vocab_size` to at least {tokens}, or leave it out",
            )
        if length > model["sequence_length"]:
            raise UserError(
                f"the dataset's sequences ({length}) are longer than the model's context ({model['sequence_length']})",
                "shard with a shorter sequence_length, or set `model.sequence_length`",
            )
    else:
        model.setdefault("num_classes", int(description["classes"]))
        model.setdefault("in_channels", int(description["image"]["channels"]))
    return architecture, model


def _expand_preset(architecture: str, model: dict[str, Any]) -> dict[str, Any]:
    preset = model.pop("preset", None)
    if preset is None:
        return model
    from polytrope.models import convnext, gpt2

    presets: dict[str, Any] = dict(gpt2.PRESETS if architecture == "gpt2" else convnext.PRESETS)
    if preset not in presets:
        raise UserError(f"unknown `model.preset: {preset}` for {architecture}", f"there are: {', '.join(presets)}")
    return {**presets[preset], **model}


def _read_initial(initial: Artifact) -> tuple[str, dict[str, Any]]:
    try:
        content = json.loads((initial.path / "model.json").read_text())
        return str(content["architecture"]), dict(content["config"])
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(
            f"`initial` ({initial.stage}) holds no model: {error}", "name a `train` or `convert` stage"
        ) from error


def _same_tokenizer(initial: Artifact, dataset: Artifact) -> None:
    """Token ids of another vocabulary would train on nonsense without any error."""
    entries = [
        json.loads((directory / name).read_text()).get("tokenizer")
        for directory, name in ((initial.path, "model.json"), (dataset.path, "dataset.json"))
    ]
    files = [directory / "tokenizer.json" for directory in (initial.path, dataset.path)]
    contents = [path.read_bytes() if path.exists() else b"" for path in files]
    if entries[0] is not None and (entries[0] != entries[1] or contents[0] != contents[1]):
        raise UserError(
            f"the tokenizer of `{initial.stage}` is not the one of `{dataset.stage}`",
            "fine-tune on a dataset that was sharded with the model's tokenizer",
        )
