"""What a training learns from a teacher: its outputs, and the states behind its blocks, on the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.checkpoint import load_model
from polytrope.models.factors import FactoredLinear, change_beyond, whole_weight
from polytrope.models.matching import feature_error, states_behind
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.train.training_plan import TrainingPlan


@dataclass(frozen=True)
class Perturbation:
    """Factored layers whose products are to stay near the matrices of the teacher.

    Args:
        weight: of the term.
        bound: what every number of a product may be off by.
        layers, wholes: as of `change_beyond`.
    """

    weight: float
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
        outputs, features: weights of the two terms.
        matched: names of blocks of the model and of the teacher.
        bounded: factored layers that are kept near the teacher's.
    """

    teacher: nn.Module
    outputs: float
    features: float
    matched: Sequence[tuple[str, str]]
    bounded: Perturbation | None = None

    def loss(self, engine: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        """The model's training loss with both terms.

        Args:
            engine: runs the model; `engine.module` is the model.
            inputs, targets: a micro-batch, on the device.
        """
        like = next(self.teacher.parameters()).dtype if inputs.is_floating_point() else inputs.dtype
        with torch.no_grad(), states_behind(self.teacher, [there for _, there in self.matched]) as wanted:
            target = self.teacher(inputs.to(like))
        with states_behind(engine.module, [here for here, _ in self.matched]) as states:
            outputs = engine(inputs)
        loss: Tensor = engine.module.loss(outputs, targets, reduction="mean", training=True)
        if self.outputs:
            numbers = getattr(self.teacher.config, "loss", None) == "mse"
            loss = loss + self.outputs * (output_error if numbers else divergence)(outputs, target)
        if self.features:
            loss = loss + self.features * feature_error(states, wanted)
        if self.bounded is not None:
            loss = loss + self.bounded.weight * self.bounded.penalty()
        return loss


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the samples of Σ_c p_c (log p_c - log q_c), p = softmax(wanted), q = softmax(logits), in nats.

    (Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, at temperature 1.)

    Args:
        logits, wanted: `[…, classes]`.
    """
    own, other = (values.float().flatten(0, -2).log_softmax(dim=-1) for values in (logits, wanted))
    return F.kl_div(own, other, reduction="batchmean", log_target=True)


def output_error(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of predicted numbers, relative to the variance of those that are wanted."""
    return feature_error([outputs], [wanted])


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
        found = find_factors(student, teacher)
        bounded = Perturbation(options.perturbation, options.perturbation_bound, *found)
    return Imitation(teacher, options.outputs, options.features, plan.matched, bounded)
