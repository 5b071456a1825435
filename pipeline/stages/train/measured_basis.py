"""`activation_basis: measured`: which activations of an initial model get the basis of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polytrope.models import make_config
from polytrope.models.configurations import MODEL_KINDS, activation_configs
from polytrope.models.convert_options import POLYNOMIALS
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.train.activation_parameters import spelled_out

HINT = "leave activation_basis out, or name an `initial` with activations that are polynomials"


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
            HINT,
        )
    return {**settings, "activation": after}


def _changes(entry: Mapping[str, Any]) -> bool:
    own = not entry.get("learnable_recurrence") and entry.get("num_parameters", 1) == 1
    return entry["name"] in POLYNOMIALS and own
