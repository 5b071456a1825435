"""The conversion itself, for the stage and the command: read, calibrate, fit, rate, replace, save."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from polytrope.models import conversion
from polytrope.models.calibration import Calibration
from polytrope.models.conversion import FitOptions, LayerConversion
from polytrope.models.surgery import Activation
from polytrope.pipeline.conversion.data import Batch, forward
from polytrope.pipeline.conversion.record import record


@dataclass(frozen=True)
class Result:
    """Fits of all layers, and the content of `conversion.json`."""

    conversions: list[LayerConversion]
    content: dict[str, Any]

    def metrics(self) -> dict[str, float]:
        """The worst layer's figures."""
        return {
            "layers": float(len(self.conversions)),
            "maximum_error": max(entry.fit.certificate.maximum for entry in self.conversions),
            "rms_error": max(entry.fit.certificate.rms for entry in self.conversions),
        }


def fit_model(
    model: nn.Module,
    activations: Sequence[Activation],
    calibrations: dict[str, Calibration],
    options: FitOptions,
    batch: Batch | None,
) -> Result:
    """Fit all layers, and rate what each costs on `batch`. The model stays as it is.

    Raises:
        ValueError: a layer that cannot be fitted.
    """
    fits = conversion.fit_layers(activations, calibrations, options)
    costs = None if batch is None else conversion.layer_costs(model, fits, batch, forward)
    return Result(fits, record(fits, options, costs))


def save(model: nn.Module, result: Result, output: Path, source: Path) -> None:
    """Replace the activations and write the model to `output`, in the format of `source`, with `conversion.json`."""
    conversion.apply(model, result.conversions)
    if hasattr(model, "architecture"):
        from polytrope.models.checkpoint import save_model

        save_model(output, model, tokenizer=source if source.is_dir() else None)
    else:
        from polytrope.models.formats.huggingface import save_huggingface

        save_huggingface(output, model, activation_configs(result.conversions), source)
    (output / "conversion.json").write_text(json.dumps(result.content, indent=1) + "\n")


def activation_configs(conversions: Sequence[LayerConversion]) -> dict[str, Any]:
    """What `restore_activations` needs."""
    return {entry.name: entry.fit.config for entry in conversions}
