"""What a training learns from a teacher: its outputs, and the states behind its blocks, on the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.checkpoint import load_model
from polytrope.models.matching import feature_error, states_behind
from polytrope.pipeline.stages.train.training_plan import TrainingPlan


@dataclass(frozen=True)
class Imitation:
    """The model to be like.

    Args:
        teacher: in evaluation mode, in float32, on the device of the training; the same on every rank.
        outputs, features: weights of the two terms.
        matched: names of blocks of the model and of the teacher.
    """

    teacher: nn.Module
    outputs: float
    features: float
    matched: Sequence[tuple[str, str]]

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


def make_imitation(plan: TrainingPlan, device: torch.device) -> Imitation | None:
    """What the plan asks for; None where it has no teacher."""
    options = plan.parameters.distillation
    if plan.teacher is None or options is None:
        return None
    teacher = load_model(plan.teacher, device).float().requires_grad_(False)
    return Imitation(teacher, options.outputs, options.features, plan.matched)
