"""Options of a training that a model of numbers does not have: refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polytrope.models.configurations import MODEL_KINDS
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.train.parameters import TrainParameters


def predicts_numbers(settings: Mapping[str, Any]) -> bool:
    """Whether a model with these settings, as far as they are known, has no classes to be right about."""
    return settings.get("loss") == "mse"


def check_of_numbers(architecture: str, settings: Mapping[str, Any], parameters: TrainParameters) -> None:
    """Refuse what is for other models.

    Args:
        architecture, settings: of the model, as far as they are known.

    Raises:
        UserError: naming the parameter.
    """
    if MODEL_KINDS[architecture].data != "numbers":
        return
    if parameters.augmentation is not None:
        given = ", ".join(sorted(f"`{name}`" for name in parameters.augmentation.model_fields_set))
        raise UserError(f"augmentation: {given}: for images, and the model takes numbers", "leave it out")
    if parameters.loss is not None and predicts_numbers(settings):
        raise UserError(
            f"loss: {parameters.loss.name} is for classes, and the model predicts numbers (loss: mse)",
            "leave it out, or use a data set with classes",
        )
    if parameters.activation_checkpointing == "mlp":
        raise UserError(
            "activation_checkpointing: mlp is for two layers around each activation, and an mlp has one",
            "use block, or leave it out",
        )
