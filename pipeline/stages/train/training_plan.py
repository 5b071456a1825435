"""What every training worker is told: resolved model, sizes, paths; it travels by pickle, on both executors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from polytrope.models import find_architecture
from polytrope.pipeline.data.description import Dataset, read_dataset
from polytrope.pipeline.data.tokenization import same_tokenizer
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext
from polytrope.pipeline.stages.train.deepspeed_config import read_configuration, zero_stage_of
from polytrope.pipeline.stages.train.parameters import TrainParameters, architectures_for


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
    augmentation = parameters.augmentation
    if augmentation is not None and micro == 1 and (augmentation.mixup > 0 or augmentation.cutmix > 0):
        raise UserError(
            "augmentation: mixup and cutmix mix the samples of a micro-batch, and each worker's has only one",
            f"set global_batch_size to at least {2 * workers}, or leave micro_batch_size out",
        )
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
            "zero_stage": zero_stage_of(deepspeed, parameters),
        },
    )


def steps_of_epochs(epochs: float, samples: int, batch: int) -> int:
    """Optimizer steps of so many passes over the samples; 1.1 is eleven tenths, not the nearest binary fraction."""
    return math.ceil(Fraction(repr(epochs)) * samples / batch)


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
    description: Dataset, dataset: Artifact, initial: Artifact | None, parameters: TrainParameters
) -> tuple[str, dict[str, Any]]:
    if initial is not None:
        architecture, model = _read_initial(initial)
    else:
        assert parameters.model is not None  # `check` saw to it
        model = parameters.model.model_dump(exclude_none=True)
        architecture = model.pop("architecture")
        model = expand_preset(architecture, model)
    if find_architecture(architecture).data != description.kind:
        raise UserError(
            f"a {description.kind} dataset (`{dataset.stage}`) cannot train a {architecture}",
            f"use `architecture: {' or '.join(architectures_for(description.kind))}`",
        )
    if description.kind == "text":
        if initial is not None:
            _same_tokenizer(initial, dataset)
        tokens = description.tokenizer.vocab_size
        model.setdefault("vocab_size", -(-tokens // 64) * 64)
        model.setdefault("sequence_length", description.sequence_length)
        fit_text(model, tokens, description.sequence_length)
    else:
        model.setdefault("num_classes", description.classes)
        model.setdefault("in_channels", description.image.channels)
        smallest = min(description.image.height, description.image.width)
        fit_images(model, description.classes, description.image.channels, smallest)
    return architecture, model


def fit_text(model: Mapping[str, Any], tokens: int | None, length: int | None) -> None:
    """Compare a model's settings with a text data set; what is not known yet is None or left out.

    Raises:
        UserError: the vocabulary is larger than the embedding, or the sequences are longer than the context.
    """
    rows, positions = model.get("vocab_size"), model.get("sequence_length")
    if tokens is not None and rows is not None and tokens > rows:
        raise UserError(
            f"the dataset's vocabulary ({tokens} tokens) is larger than the model's embedding "
            f"(`model.vocab_size`: {rows})",
            f"set `model.vocab_size` to at least {tokens}, or leave it out",
        )
    if length is not None and positions is not None and length > positions:
        raise UserError(
            f"the dataset's sequences ({length} tokens) are longer than `model.sequence_length` ({positions})",
            f"shard with a shorter sequence_length, or set `model.sequence_length` to at least {length}",
        )


def fit_images(model: Mapping[str, Any], classes: int | None, channels: int | None, size: int | None) -> None:
    """Compare a ConvNeXt's settings with an image data set; what is not known yet is None or left out.

    Raises:
        UserError: fewer outputs than classes, other channels, or images smaller than what the stages halve them to.
    """
    outputs, taken = model.get("num_classes"), model.get("in_channels")
    if classes is not None and outputs is not None and outputs < classes:
        raise UserError(
            f"the dataset has {classes} classes, the model {outputs} outputs (`model.num_classes`)",
            f"set `model.num_classes` to {classes}, or leave it out",
        )
    if channels is not None and taken is not None and taken != channels:
        raise UserError(
            f"the dataset's images have {channels} channels (`channels`), the model takes {taken} "
            "(`model.in_channels`)",
            f"set `model.in_channels` to {channels}, or leave it out",
        )
    patch, stages = model.get("patch_size", 4), len(model.get("depths", (3, 3, 9, 3)))
    smallest = patch * 2 ** (stages - 1)
    if size is not None and size < smallest:
        raise UserError(
            f"images of {size} × {size} (`image_size`) are too small for a stem of {patch} (`model.patch_size`) and "
            f"{stages} stages (`model.depths`), which take at least {smallest} × {smallest}",
            f"shard larger images, or use a smaller patch_size or fewer stages (for example patch_size: 1, "
            f"{max(1, size.bit_length() - 1)} stages)",
        )


def expand_preset(architecture: str, model: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of `preset` below them.

    Raises:
        UserError: an unknown preset.
    """
    preset = model.pop("preset", None)
    if preset is None:
        return model
    presets = find_architecture(architecture).presets
    if preset not in presets:
        raise UserError(f"unknown `model.preset: {preset}` for {architecture}", f"there are: {', '.join(presets)}")
    return {**presets[preset], **model}


def _read_initial(initial: Artifact) -> tuple[str, dict[str, Any]]:
    from polytrope.models.checkpoint import read_description

    try:
        content = read_description(initial.path)
    except ValueError as error:
        raise UserError(
            f"`initial` ({initial.stage}) holds no model that can be trained: {error}",
            "name a `train`, `convert` or `import_model` stage",
        ) from error
    return str(content["architecture"]), dict(content["config"])


def _same_tokenizer(initial: Artifact, dataset: Artifact) -> None:
    """Token ids of another vocabulary would train on nonsense without any error."""
    own, other = initial.path / "tokenizer.json", dataset.path / "tokenizer.json"
    if own.exists() and not same_tokenizer(own, other):
        raise UserError(
            f"the tokenizer of `{initial.stage}` is not the one of `{dataset.stage}`",
            "fine-tune on a dataset that was sharded with the model's tokenizer",
        )
