"""The conversion itself, for the stage and the command: read, calibrate, fit, rate, replace, save."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from polytrope.models import conversion
from polytrope.models.calibration import Calibration
from polytrope.models.conversion import FitOptions, LayerConversion
from polytrope.models.surgery import Activation
from polytrope.ops import is_learnable_activation
from polytrope.pipeline.stages.convert.calibration_data import Batch, forward
from polytrope.pipeline.stages.convert.conversion_record import record

Layout = Literal["as_read", "own", "huggingface"]


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


def save(
    model: nn.Module, result: Result, output: Path, source: Path, layout: Layout = "as_read", onnx: Batch | None = None
) -> float | None:
    """Replace the activations and write the model to the empty directory `output`, with `conversion.json`.

    Args:
        source: a directory whose tokenizer is copied.
        onnx: inputs to trace `model.onnx` with; None: no such file.

    Returns:
        How far onnxruntime deviates, if `onnx` is given.

    Raises:
        ValueError: a layout that the model cannot have, or no ONNX.
    """
    conversion.apply(model, result.conversions)
    deviation = write_model(model, output, source, layout, onnx)
    (output / "conversion.json").write_text(json.dumps(result.content, indent=1) + "\n", encoding="utf-8")
    return deviation


def write_model(
    model: nn.Module, output: Path, source: Path, layout: Layout = "as_read", onnx: Batch | None = None
) -> float | None:
    """As `save`, for a model whose activations are in their places already."""
    ours = hasattr(model, "architecture")
    if layout == "own" and not ours:
        raise ValueError("format: own is for GPT-2 and ConvNeXt; this architecture is written as huggingface")
    if ours and layout != "huggingface":
        from polytrope.models.checkpoint import save_model

        save_model(output, model, tokenizer=source if source.is_dir() else None)
    else:
        from polytrope.models.formats.huggingface import save_huggingface

        learned = {name: module.config() for name, module in learned_activations(model).items()}  # type: ignore[operator]
        save_huggingface(output, model, learned, source if source.is_dir() else None)
    if onnx is None:
        return None
    from polytrope.models.formats.onnx import save_onnx

    return save_onnx(output / "model.onnx", model, list(onnx.values()), None if ours else list(onnx))


def learned_activations(model: nn.Module) -> dict[str, nn.Module]:
    """The learnable activations of a model by name; one that is used at several places appears once."""
    return {name: module for name, module in model.named_modules() if is_learnable_activation(module)}


def write_tables(output: Path, activations: Mapping[str, nn.Module], calibrations: Mapping[str, Calibration]) -> None:
    """`tables/NAME.json` for every activation, over the range of the inputs it was seen to receive."""
    from polytrope.models.formats.plain import save_table

    (output / "tables").mkdir()
    for name, module in activations.items():
        seen = calibrations[name]
        reach = (seen.minimum, seen.maximum) if seen.minimum < seen.maximum else (seen.minimum - 1, seen.maximum + 1)
        save_table(output / "tables" / f"{name}.json", module, reach)
