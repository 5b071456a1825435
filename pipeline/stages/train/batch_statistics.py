"""A norm over the batch, and what splits a batch: refused, so that its statistics are those of a global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polytrope.models import make_config
from polytrope.models.configurations import MODEL_KINDS, NO_ACTIVATION
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.train.parameters import TrainParameters


def check_batch_statistics(
    architecture: str, settings: Mapping[str, Any], parameters: TrainParameters, accumulation: int
) -> None:
    """Refuse a training whose norms would see less than a global batch, or see it twice.

    Args:
        architecture, settings: of the model, as far as they are known.
        accumulation: forward passes per step.

    Raises:
        UserError: naming the parameter.
    """
    if parameters.linearize:
        return  # its norms take their running statistics
    config = make_config(MODEL_KINDS[architecture].config, settings)
    norm = config.norm_settings()
    if norm.over_batch:
        taking = f"norm: {norm.name}"
    elif part := next((part for part in config.feedforward_settings() if part.over_batch), None):
        taking = f"feedforward: {part.config()}"
    else:
        return
    if accumulation > 1:
        raise UserError(
            f"micro_batch_size: {parameters.micro_batch_size} splits the batch of a worker into {accumulation}, and "
            f"{taking} takes its statistics over the whole",
            "leave micro_batch_size out, or use fewer samples per batch or more workers",
        )
    if parameters.activation_checkpointing == "block":
        raise UserError(
            f"activation_checkpointing: block would compute the statistics of {taking} twice per step",
            "leave it out"
            if architecture == "mlp" or config.activation == NO_ACTIVATION
            else "use activation_checkpointing: mlp",
        )
    if parameters.global_batch_size < 2:
        raise UserError(
            f"global_batch_size: {parameters.global_batch_size} sample has no statistics for {taking}",
            "use at least 2",
        )
