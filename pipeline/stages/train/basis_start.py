"""`activation_basis: measured`: the inputs that decide the basis, and the model that begins in it."""

from __future__ import annotations

import numpy as np
from torch import nn

from polytrope.models.measured_basis import write_in_measured_basis
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.train.measured_basis import HINT
from polytrope.pipeline.stages.train.modality import make_modality
from polytrope.pipeline.stages.train.training_plan import TrainingPlan

SAMPLES = 256  # the first training samples, which every worker runs through the model
BATCH = 8  # of them at a time, however many workers there are: the same numbers


def measure_basis(model: nn.Module, plan: TrainingPlan) -> list[str]:
    """Rewrite the polynomials of the initial model; the names of those that were.

    Raises:
        UserError: there is none, or one gets too few different inputs.
    """
    modality = make_modality(plan, rank=0, pin=False)
    numbers = np.arange(min(SAMPLES, modality.train_samples))
    batches = (modality.train_batch(numbers[start : start + BATCH])[0] for start in range(0, len(numbers), BATCH))
    try:
        return write_in_measured_basis(model, batches)
    except ValueError as error:
        raise UserError(f"activation_basis: {error}", HINT) from error
