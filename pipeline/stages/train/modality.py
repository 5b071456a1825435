"""What differs between training on text, images and numbers: how samples become batches, what validation measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models import find_architecture
from polytrope.pipeline.data.description import UNITS
from polytrope.pipeline.data.order import sample_indices
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.stages.train.augment import augment, mix
from polytrope.pipeline.stages.train.batches import Batch, rank_slice, text_batch
from polytrope.pipeline.stages.train.training_plan import TrainingPlan


@dataclass(frozen=True)
class Modality:
    """Data of one rank.

    Args:
        train_step: the micro-batches of a global batch of the stream, by its number.
        train_batch, validation_batch: samples by index, none of them augmented.
        train_samples, validation_samples: how many there are.
        measure: sums over such a batch, by metric name, of the first `counted` samples.
        unit: what throughput counts: `tokens`, `images` or `rows`.
        flops_per_unit: floating-point operations of forward and backward per token, image or row, for MFU.
    """

    train_step: Callable[[int], list[Batch]]
    train_batch: Callable[[np.ndarray], Batch]
    train_samples: int
    validation_batch: Callable[[np.ndarray], Batch]
    validation_samples: int
    measure: Callable[[nn.Module, Batch, int], dict[str, Tensor]]
    unit: str
    flops_per_unit: Callable[[Any], float]


def make_modality(plan: TrainingPlan, rank: int, pin: bool) -> Modality:
    """What fits the architecture. `pin`: put batches into page-locked memory, for asynchronous copies."""
    train, validation = open_split(plan.dataset, "train"), open_split(plan.dataset, "validation")
    kind = find_architecture(plan.architecture).data
    data = _DATA[kind]

    def train_step(batch: int) -> list[Batch]:
        size = plan.parameters.global_batch_size
        indices = np.asarray(sample_indices(plan.parameters.seed, batch * size, size, plan.train_samples))
        positions = np.arange(batch * size, (batch + 1) * size)
        parts = zip(
            np.split(rank_slice(indices, rank, plan.workers), plan.accumulation_steps),
            np.split(rank_slice(positions, rank, plan.workers), plan.accumulation_steps),
            strict=True,
        )
        batches = [data.load(train, part, plan, part_positions) for part, part_positions in parts]
        return [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in batches] if pin else batches

    return Modality(
        train_step=train_step,
        train_batch=lambda indices: data.load(train, indices, plan, None),
        train_samples=plan.train_samples,
        validation_batch=lambda indices: data.load(validation, indices, plan, None),
        validation_samples=len(validation),
        measure=data.measure,
        unit=UNITS[kind],
        flops_per_unit=lambda model: data.flops(model, train),
    )


@dataclass(frozen=True)
class _Data:
    """What one kind of data needs. `load`: samples by index, with their positions in the stream where they are
    training samples. `flops`: see `Modality.flops_per_unit`."""

    load: Callable[[Any, np.ndarray, TrainingPlan, np.ndarray | None], Batch]
    measure: Callable[[nn.Module, Batch, int], dict[str, Tensor]]
    flops: Callable[[Any, Any], float]


def _load_text(reader: Any, indices: np.ndarray, _plan: TrainingPlan, _positions: np.ndarray | None) -> Batch:
    return text_batch(reader.samples(indices))


def _load_images(reader: Any, indices: np.ndarray, plan: TrainingPlan, positions: np.ndarray | None) -> Batch:
    """Images `[samples, channels, height, width]` float and classes; augmented if they have `positions`."""
    prepare = find_architecture(plan.architecture).prepare
    pixels, labels = reader.images(indices)
    images, classes = torch.from_numpy(pixels).float() / 255.0, torch.from_numpy(np.asarray(labels, dtype=np.int64))
    options = plan.parameters.augmentation
    if positions is None or options is None:
        return prepare(images), classes
    images = prepare(augment(images, options, plan.parameters.seed, positions))
    if options.mixup or options.cutmix:
        number = int(plan.model["num_classes"])
        return mix(images, classes, options, number, plan.parameters.seed, int(positions[0]))
    return images, classes


def _load_numbers(reader: Any, indices: np.ndarray, plan: TrainingPlan, _positions: np.ndarray | None) -> Batch:
    rows, targets = reader.numbers(indices)
    return find_architecture(plan.architecture).prepare(torch.from_numpy(rows)), torch.from_numpy(targets)


def _measure_text(model: nn.Module, batch: Batch, counted: int) -> dict[str, Tensor]:
    inputs, targets = batch
    targets = targets.clone()
    targets[counted:] = -100
    return {"loss": model(inputs, targets, reduction="sum"), "count": (targets != -100).sum()}


def _measure_images(model: nn.Module, batch: Batch, counted: int) -> dict[str, Tensor]:
    inputs, targets = batch
    logits = model(inputs)[:counted].float()
    targets = targets[:counted]
    return {
        "loss": nn.functional.cross_entropy(logits, targets, reduction="sum"),
        "accuracy": (logits.argmax(dim=-1) == targets).sum(),
        "count": torch.tensor(counted),
    }


def _measure_numbers(model: nn.Module, batch: Batch, counted: int) -> dict[str, Tensor]:
    inputs, targets = batch
    if not targets.is_floating_point():
        return _measure_images(model, batch, counted)
    losses = model(inputs, targets, reduction="none")[:counted]
    return {"loss": losses.sum(), "count": torch.tensor(counted)}


# By what an architecture takes.
_DATA: dict[str, _Data] = {
    "text": _Data(_load_text, _measure_text, lambda model, _: float(model.flops_per_token())),
    "images": _Data(
        _load_images,
        _measure_images,
        lambda model, reader: float(model.flops_per_image(*reader.fields["pixels"].shape[1:])),
    ),
    "numbers": _Data(_load_numbers, _measure_numbers, lambda model, _: float(model.flops_per_row())),
}
