"""What every training worker is told: resolved model, sizes, paths; it travels by pickle, on both executors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from polytrope.pipeline.data.described import dataset_promise, read_model_promise
from polytrope.pipeline.data.description import Dataset, read_dataset
from polytrope.pipeline.data.misfits import misfit
from polytrope.pipeline.data.promised import PromisedModel
from polytrope.pipeline.data.tokenization import same_tokenizer
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext
from polytrope.pipeline.stages.train.batch_statistics import check_batch_statistics
from polytrope.pipeline.stages.train.deepspeed_config import read_configuration, zero_stage_of
from polytrope.pipeline.stages.train.measured_basis import settings_in_measured_basis
from polytrope.pipeline.stages.train.numbers_options import check_of_numbers
from polytrope.pipeline.stages.train.parameters import TrainParameters, check_heeded, split_batch
from polytrope.pipeline.stages.train.teacher import check_factors, check_teacher, matched_blocks


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
        dataset, initial, teacher: directories.
        matched: names of blocks of the model, and of those of the teacher that they are to be like.
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
    teacher: Path | None
    matched: list[tuple[str, str]]
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


def make_plan(
    context: StageContext,
    dataset: Artifact,
    initial: Artifact | None,
    parameters: TrainParameters,
    teacher: Artifact | None = None,
) -> TrainingPlan:
    """Resolve defaults from the dataset, the initial model and the granted resources.

    Raises:
        UserError: sizes that do not divide, a vocabulary or a tokenizer that does not fit, too little data.
    """
    description = read_dataset(dataset.path)
    architecture, model = _resolve_model(description, dataset, initial, parameters)
    workers = context.resources.workers
    micro, accumulation = split_batch(parameters, workers)
    settings = {name: value for name, value in model.items() if name != "activation_options"}
    if parameters.activation_basis is not None:
        settings_in_measured_basis(architecture, settings)  # it refuses a model without
    check_heeded(architecture, settings, parameters)
    check_batch_statistics(architecture, settings, parameters, accumulation)
    check_of_numbers(architecture, settings, parameters)
    matched = []
    if teacher is not None:
        assert parameters.distillation is not None  # `check` saw to it
        imitated = _read_model("teacher", teacher)
        _fits(imitated, teacher, description, dataset)
        before = None if initial is None else _read_model("initial", initial).blocks_before
        student = PromisedModel(architecture, settings, blocks_before=before)
        check_teacher(parameters.distillation, student, imitated, micro)
        matched = matched_blocks(parameters.distillation, student, imitated, None if initial is None else initial.path)
    samples = description.splits["train"].samples
    if samples < 1:
        raise UserError(f"the dataset of `{dataset.stage}` has no training samples", "use a larger corpus")
    if description.splits["validation"].samples < 1:
        raise UserError(
            f"the dataset of `{dataset.stage}` has no validation samples",
            "use a larger corpus, shorter sequences, or a larger validation fraction",
        )
    steps = parameters.steps or steps_of_epochs(parameters.epochs or 0.0, samples, parameters.global_batch_size)
    if parameters.warmup_steps > steps:
        raise UserError(
            f"warmup_steps ({parameters.warmup_steps}) is more than the {steps} steps of {parameters.epochs:g} epochs",
            "warm up for fewer steps, or train longer",
        )
    deepspeed = read_configuration(parameters)  # a stage runs in the workflow's directory
    zero_stage = zero_stage_of(deepspeed, parameters)
    if parameters.distillation is not None:
        check_factors(parameters.distillation, PromisedModel(architecture, settings), zero_stage)
    return TrainingPlan(
        parameters=parameters,
        architecture=architecture,
        model=model,
        dataset=dataset.path,
        initial=initial.path if initial else None,
        teacher=teacher.path if teacher else None,
        matched=matched,
        workers=workers,
        gpus=context.resources.gpus,
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        steps=steps,
        train_samples=samples,
        deepspeed=deepspeed,
        zero_stage=zero_stage,
        skipped_batches=[],
        skip_reasons=[],
        dataset_profile={
            "splits": {name: dict(split) for name, split in description.splits.items()},
            "name": description.name,
        },
        facts={
            "architecture": architecture,
            **({"sequence_length": description.sequence_length} if description.kind == "text" else {}),
            "steps": steps,
            "workers": workers,
            "micro_batch_size": micro,
            "accumulation_steps": accumulation,
            "zero_stage": zero_stage,
        },
    )


def steps_of_epochs(epochs: float, samples: int, batch: int) -> int:
    """Optimizer steps of so many passes over the samples; 1.1 is eleven tenths, not the nearest binary fraction."""
    return math.ceil(Fraction(repr(epochs)) * samples / batch)


def _resolve_model(
    description: Dataset, dataset: Artifact, initial: Artifact | None, parameters: TrainParameters
) -> tuple[str, dict[str, Any]]:
    model = _read_model("initial", initial) if initial is not None else _given(parameters)
    _fits(model, initial, description, dataset)
    settings = dict(model.trained_on(dataset_promise(description)).settings)
    if parameters.model is not None and parameters.model.activation_options is not None:
        settings["activation_options"] = parameters.model.activation_options.model_dump(exclude_none=True)
    return model.architecture, settings


def _given(parameters: TrainParameters) -> PromisedModel:
    assert parameters.model is not None  # `check` saw to it
    return PromisedModel(parameters.model.architecture, parameters.model.settings())


def _fits(model: PromisedModel, origin: Artifact | None, description: Dataset, dataset: Artifact) -> None:
    """Raise `UserError` for a model that cannot take the data, or comes with another tokenizer."""
    found = misfit(model, dataset_promise(description))
    if found is not None:
        raise UserError(f"{found.text} (`{dataset.stage}`)", found.hint)
    if origin is not None and description.kind == "text":
        _same_tokenizer(origin, dataset)


def _read_model(name: str, artifact: Artifact) -> PromisedModel:
    try:
        return read_model_promise(artifact.path)
    except ValueError as error:
        raise UserError(
            f"`{name}` ({artifact.stage}) holds no model that can be trained: {error}",
            "name a `train`, `convert` or `import_model` stage",
        ) from error


def _same_tokenizer(initial: Artifact, dataset: Artifact) -> None:
    """Token ids of another vocabulary would train on nonsense without any error."""
    own, other = initial.path / "tokenizer.json", dataset.path / "tokenizer.json"
    if own.exists() and not same_tokenizer(own, other):
        raise UserError(
            f"the tokenizer of `{initial.stage}` is not the one of `{dataset.stage}`",
            "fine-tune on a dataset that was sharded with the model's tokenizer",
        )
