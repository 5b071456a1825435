"""What an analysis is given of a model: its activations, and what they receive on the validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models import find_architecture
from polytrope.models.activations import describe_activation
from polytrope.models.calibration import Calibration, calibrate
from polytrope.models.checkpoint import activation_modules
from polytrope.models.factors import FactoredLinear
from polytrope.models.inputs import forward
from polytrope.models.parts.evonorm import EvoNorm
from polytrope.models.parts.feedforward import QuadraticLinear
from polytrope.models.surgery import Activation
from polytrope.pipeline.data.analysis_file import InputStatistics
from polytrope.pipeline.data.model_inputs import read_tensors
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.errors import UserError


@dataclass(frozen=True)
class AnalysedActivation:
    """One activation of the model.

    Args:
        name: `block 1`, …
        title: its configuration in words.
        module: it.
        linears: the linear layers of its MLP, before and after; none where it is gated or quadratic, or in an EvoNorm.
        points, weights: its inputs, joined where they are close, and how often each was seen, float64 `[n]`.
        inputs: their statistics.
    """

    name: str
    title: str
    module: nn.Module
    linears: list[nn.Linear]
    points: np.ndarray
    weights: np.ndarray
    inputs: InputStatistics


@dataclass(frozen=True)
class Subject:
    """The model that is analysed.

    Args:
        model: its directory, with what its training has left there.
        network: it, in evaluation mode; not to be changed.
        dataset: directory of the data set.
        activations: what it has of them, first block first.
        samples, batch_size: how many validation samples are used, and how many at a time.
    """

    model: Path
    network: nn.Module
    dataset: Path
    activations: list[AnalysedActivation]
    samples: int = 64
    batch_size: int = 16


def validation_batches(subject: Subject) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs as the model takes them, and targets, of its first `samples` validation samples."""
    reader = open_split(subject.dataset, "validation")
    prepare = find_architecture(str(subject.network.architecture)).prepare
    samples = min(subject.samples, len(reader))
    for start in range(0, samples, subject.batch_size):
        inputs, targets = read_tensors(reader, np.arange(start, min(samples, start + subject.batch_size)))
        yield prepare(inputs), targets


def validation_loss(network: nn.Module, subject: Subject) -> float:
    """Of these samples, per token, image or row: of the subject's network or another one of its inputs."""
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets in validation_batches(subject):
            losses = network(inputs, targets, reduction="none")
            total += float(losses.double().sum())
            count += losses.numel()
    return total / count


def block_outputs(subject: Subject) -> list[Tensor]:
    """What each block gives on these samples, `[vectors, width]` float64.

    A vector is that of a token or a row, and of an image the mean over its pixels.
    """
    found: list[list[Tensor]] = []

    def keep(place: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            vectors = output.mean((-2, -1)) if output.dim() == 4 else output.flatten(0, -2)
            found[place].append(vectors.double())

        return hook

    hooks = []
    for place, block in enumerate(subject.network.blocks):  # type: ignore[arg-type]
        found.append([])
        hooks.append(block.register_forward_hook(keep(place)))
    try:
        with torch.no_grad():
            for inputs, _ in validation_batches(subject):
                subject.network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(outputs) for outputs in found]


def read_activations(model: nn.Module, dataset: Path, samples: int, batch_size: int) -> list[AnalysedActivation]:
    """The activations of a model of this package, first block first, with what they receive.

    Args:
        dataset: its first `samples` validation samples go through the model.

    Raises:
        ValueError: NaN or infinity on the way.
    """
    record = find_architecture(str(model.architecture))
    reader = open_split(dataset, "validation")
    samples = min(samples, len(reader))

    def batches() -> Iterator[Tensor]:
        for start in range(0, samples, batch_size):
            yield record.prepare(read_tensors(reader, np.arange(start, min(samples, start + batch_size)))[0])

    found = [
        Activation(name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if name.rpartition(".")[2] == record.activation
    ]
    calibrations = calibrate(model, found, batches(), forward)
    return [
        _described(f"block {block + 1}", model, activation, calibrations[activation.name])
        for block, activation in zip(activation_modules(model), found, strict=True)
    ]


def activations_of(subject: Subject) -> list[AnalysedActivation]:
    """Of an analysis that is one of activations.

    Raises:
        UserError: the model has none.
    """
    if not subject.activations:
        raise UserError(
            "the model has no activations to analyse: every block has feedforward: mu, or norm: evonorm without one"
        )
    return subject.activations


def _described(name: str, model: nn.Module, activation: Activation, seen: Calibration) -> AnalysedActivation:
    points, weights = seen.measure()
    weights = weights / weights.sum()
    mean = float(weights @ points)
    config = getattr(activation.module, "config", None)
    owner = model.get_submodule(activation.name.rpartition(".")[0])
    return AnalysedActivation(
        name=name,
        title=describe_activation(config() if callable(config) else type(activation.module).__name__),
        module=activation.module,
        linears=_linears(owner),
        points=points,
        weights=weights,
        inputs=InputStatistics(
            count=seen.total,
            mean=mean,
            deviation=float(np.sqrt(weights @ (points - mean) ** 2)),
            minimum=seen.minimum,
            maximum=seen.maximum,
        ),
    )


def _linears(owner: nn.Module) -> list[nn.Linear]:
    """Of an MLP whose slope is at most their norms times the activation's; none where it multiplies inputs, or divides
    what the activation gives."""
    others = any(isinstance(module, QuadraticLinear | EvoNorm) for module in owner.children())
    if getattr(owner, "gated", False) or others:
        return []
    return [
        module.merged() if isinstance(module, FactoredLinear) else module
        for module in owner.children()
        if isinstance(module, nn.Linear | FactoredLinear)
    ]


def spectral_norm(linear: nn.Linear) -> float:
    """The largest singular value of the layer's weight."""
    return float(torch.linalg.matrix_norm(linear.weight.detach().double(), 2))
