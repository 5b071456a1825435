"""What a training learns from a teacher: its outputs, and the states behind its blocks, on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.checkpoint import load_model
from polytrope.models.factors import FactoredLinear, change_beyond, whole_weight
from polytrope.models.matching import NoVariance, feature_error, states_behind
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.train.batches import as_weights
from polytrope.pipeline.stages.train.training_plan import TrainingPlan


@dataclass(frozen=True)
class Perturbation:
    """Factored layers whose products are to stay near the matrices of the teacher.

    Args:
        bound: what every number of a product may be off by.
        layers, wholes: as of `change_beyond`.
    """

    bound: float
    layers: Sequence[nn.Module]
    wholes: Sequence[Tensor]

    def penalty(self) -> Tensor:
        """What is beyond the bound."""
        return change_beyond(self.layers, self.wholes, self.bound)


@dataclass(frozen=True)
class Imitation:
    """The model to be like.

    Args:
        teacher: in evaluation mode, in float32, on the device of the training; the same on every rank.
        weights: of the terms of the loss, as of `DistillationParameters.weights`.
        matched: names of blocks of the model and of the teacher.
        bounded: factored layers that are kept near the teacher's.
    """

    teacher: nn.Module
    weights: Mapping[str, float]
    matched: Sequence[tuple[str, str]]
    bounded: Perturbation | None = None

    def loss(self, engine: Any, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the weighted terms, the first of which is the model's training loss; and the terms, without their
        weights and without gradients.

        The teacher gets the inputs as they are, the model in the type of its weights.

        Args:
            engine: runs the model; `engine.module` is the model.
            inputs, targets: a micro-batch, on the device.

        Raises:
            UserError: what the teacher computes is one number many times, so that no error is relative to it.
        """
        theirs = [there for _, there in self.matched]
        with torch.no_grad(), states_behind(self.teacher, theirs) as wanted:
            target = self.teacher(as_weights(inputs, self.teacher))
        with states_behind(engine.module, [here for here, _ in self.matched]) as states:
            outputs = engine(as_weights(inputs, engine.module))
        compute: dict[str, Callable[[], Tensor]] = {
            "targets": lambda: engine.module.loss(outputs, targets, reduction="mean", training=True),
            "outputs": lambda: output_error(outputs, target) if self._numbers else divergence(outputs, target),
            "features": lambda: state_error(states, wanted, theirs),
        }
        if self.bounded is not None:
            compute["perturbation"] = self.bounded.penalty
        terms = {name: compute[name.partition("/")[2]]() for name in self.weights}
        loss, *others = (weight * terms[name] for name, weight in self.weights.items())
        for term in others:
            loss = loss + term
        return loss, {name: term.detach() for name, term in terms.items()}

    @property
    def _numbers(self) -> bool:
        """Whether outputs are numbers, not logits of classes."""
        return getattr(self.teacher.config, "loss", None) == "mse"


def state_error(states: Sequence[Tensor], wanted: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """Mean squared error of the states behind blocks, relative to the variance of the teacher's.

    Args:
        names: of the teacher's blocks.

    Raises:
        UserError: those of a block are one number many times.
    """
    with varied("features", "leave features out, or use more samples at once (micro_batch_size)"):
        return feature_error(states, wanted, names=names)


@contextmanager
def varied(term: str, hint: str) -> Iterator[None]:
    """Errors relative to a variance of the teacher's, that there may not be.

    Raises:
        UserError: naming the term of `distillation`, for NoVariance inside.
    """
    try:
        yield
    except NoVariance as error:
        raise UserError(f"distillation: {term}: of the teacher, {error}", hint) from error


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the samples of Σ_c p_c (log p_c - log q_c), p = softmax(wanted), q = softmax(logits), in nats.

    (Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, at temperature 1.)

    Args:
        logits, wanted: `[…, classes]`.
    """
    own, other = (values.float().flatten(0, -2).log_softmax(dim=-1) for values in (logits, wanted))
    return F.kl_div(own, other, reduction="batchmean", log_target=True)


def output_error(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of predicted numbers, relative to the variance of those that are wanted.

    Raises:
        UserError: those are all the same, and have none.
    """
    with varied("outputs", "set outputs: 0.0, or use more samples at once (micro_batch_size)"):
        return feature_error([outputs], [wanted], names=["outputs"])


def find_factors(student: nn.Module, teacher: nn.Module) -> tuple[list[FactoredLinear], list[Tensor]]:
    """The factored layers of the model, and the matrices `[outputs, inputs]` of the same layers of the teacher.

    Raises:
        UserError: none of them learns, or the teacher has another layer there.
    """
    layers = {name: module for name, module in student.named_modules() if isinstance(module, FactoredLinear)}
    if not any(weight.requires_grad for layer in layers.values() for weight in layer.parameters()):
        raise UserError(
            "distillation: perturbation: no factor learns, so that nothing would keep it near the teacher's layers",
            "leave it out, or name them under `trainable`",
        )
    wholes = []
    for name, layer in layers.items():
        try:
            whole = whole_weight(teacher.get_submodule(name)).detach()
            if whole.shape != (layer.out_features, layer.in_features):
                raise ValueError(f"one of {whole.shape[1]} inputs and {whole.shape[0]} outputs cannot be compared")
        except (AttributeError, ValueError) as error:
            raise UserError(
                f"distillation: perturbation: the teacher has no layer like `{name}`, of {layer.in_features} inputs "
                f"and {layer.out_features} outputs: {error}",
                "name the model that was factored as the teacher",
            ) from error
        wholes.append(whole)
    return list(layers.values()), wholes


def make_imitation(plan: TrainingPlan, student: nn.Module, device: torch.device) -> Imitation | None:
    """What the plan asks for of the model that learns, which is on the device; None where it has no teacher.

    Raises:
        UserError: as of `find_factors`.
    """
    options = plan.parameters.distillation
    if plan.teacher is None or options is None:
        return None
    teacher = load_model(plan.teacher, device).float().requires_grad_(False)
    bounded = None
    if options.perturbation:
        bounded = Perturbation(options.perturbation_bound, *find_factors(student, teacher))
    return Imitation(teacher, options.weights(), plan.matched, bounded)
