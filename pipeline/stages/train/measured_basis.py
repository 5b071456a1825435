"""`activation_basis: measured`: polynomials of an initial model, written in the basis of the inputs that they get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polytrope.models import make_config
from polytrope.models.configurations import MODEL_KINDS, activation_configs
from polytrope.models.convert_options import POLYNOMIALS
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.train.activation_parameters import spelled_out

if TYPE_CHECKING:
    from torch import nn

    from polytrope.pipeline.stages.train.training_plan import TrainingPlan

SAMPLES = 256  # the first training samples, which every worker runs through the model
BATCH = 8  # of them at a time, however many workers there are: the same numbers
_HINT = "leave activation_basis out, or name an `initial` with activations that are polynomials"


def settings_in_measured_basis(architecture: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model once its polynomials are in the basis of their inputs.

    Args:
        settings: as far as they are known; nothing is said of activations that are not.

    Raises:
        UserError: no activation is such a polynomial.
    """
    if "activation" not in settings:
        return dict(settings)
    config = make_config(MODEL_KINDS[architecture].config, settings)
    before = [spelled_out(entry) for entry in activation_configs(config.activation, len(config.activation_widths()))]
    after = [{**entry, "learnable_recurrence": True} if _changes(entry) else entry for entry in before]
    if after == before:
        names = ", ".join(dict.fromkeys(str(entry["name"]) for entry in before))
        raise UserError(
            f"activation_basis: measured is for {', '.join(POLYNOMIALS)} in their own basis, with one set of "
            f"coefficients, and `initial` has {names}",
            _HINT,
        )
    return {**settings, "activation": after}


def _changes(entry: Mapping[str, Any]) -> bool:
    own = not entry.get("learnable_recurrence") and entry.get("num_parameters", 1) == 1
    return entry["name"] in POLYNOMIALS and own


def measure_basis(model: nn.Module, plan: TrainingPlan) -> list[str]:
    """Rewrite the polynomials of the initial model; the names of those that were.

    Raises:
        UserError: there is none, or one gets too few different inputs.
    """
    import numpy as np

    from polytrope.models.measured_basis import write_in_measured_basis
    from polytrope.pipeline.stages.train.modality import make_modality

    modality = make_modality(plan, rank=0, pin=False)
    numbers = np.arange(min(SAMPLES, modality.train_samples))
    batches = (modality.train_batch(numbers[start : start + BATCH])[0] for start in range(0, len(numbers), BATCH))
    try:
        return write_in_measured_basis(model, batches)
    except ValueError as error:
        raise UserError(f"activation_basis: {error}", _HINT) from error
