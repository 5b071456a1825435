"""Fit learnable activations to the calibrated activations of a model, and put them in their places."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models.calibration import Calibration
from polytrope.models.surgery import Activation, replace_module
from polytrope.ops.interpolate import Fit, fit, fit_to_error


@dataclass(frozen=True)
class FitOptions:
    """How every layer is fitted.

    Args:
        family, degree: of the new activations.
        target_error: instead of `degree`, which is then the largest one tried: the smallest degree whose error is at
            most this. The error is the root mean square over the measured inputs, relative to that of the target.
        coverage: share of the inputs inside the fitted interval; None: the interval of the smallest error over all
            inputs, those on the tangent lines outside included.
        derivative_weight: λ of the Sobolev norm.
        constraints: as of `fit`: `ends`, `end_values`, `origin`.
    """

    family: str = "hermite"
    degree: int = 8
    target_error: float | None = None
    coverage: float | None = None
    derivative_weight: float = 0.01
    constraints: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerConversion:
    """One activation, what it receives, and the fit that can replace it."""

    name: str
    module: nn.Module
    calibration: Calibration
    fit: Fit

    @property
    def interval(self) -> tuple[float, float]:
        """Where the fit holds; tangent lines outside. A family without tails: the measured range."""
        low, high = self.fit.config.get("interval") or (self.calibration.minimum, self.calibration.maximum)
        return float(low), float(high)

    @property
    def relative_error(self) -> float:
        """Root mean square error over the measured inputs, relative to that of the target."""
        certificate = self.fit.certificate
        return certificate.rms / math.sqrt(max(certificate.target_mean_square, 1e-300))


def fit_layer(activation: Activation, calibration: Calibration, options: FitOptions) -> LayerConversion:
    """The fit of one activation; the model stays as it is.

    Raises:
        ValueError: the layer's name and what `fit` refuses, or a target error that no degree reaches.
    """
    measure = calibration.measure()
    interval: Any = "best"
    if options.coverage is not None:
        tail = (1.0 - options.coverage) / 2
        interval = (calibration.quantile(tail), calibration.quantile(1.0 - tail))
        if interval[0] >= interval[1]:
            interval = (interval[0] - 0.5, interval[1] + 0.5)
    settings = {
        "interval": interval,
        "weight": measure,
        "derivative_weight": options.derivative_weight,
        "constraints": options.constraints,
    }
    try:
        if options.target_error is None:
            found = fit(activation.module, options.family, options.degree, **settings)  # type: ignore[arg-type]
        else:
            scale = _root_mean_square(activation.module, measure)
            degrees = range(min(2, options.degree), options.degree + 1)
            error = options.target_error * scale
            found = fit_to_error(activation.module, options.family, error, degrees=degrees, **settings)
    except ValueError as error:
        raise ValueError(f"activation `{activation.name}`: {error}") from error
    return LayerConversion(activation.name, activation.module, calibration, found)


def _root_mean_square(module: nn.Module, measure: tuple[np.ndarray, np.ndarray]) -> float:
    points, counts = measure
    with torch.no_grad():
        values = copy.deepcopy(module).double()(torch.from_numpy(points)).numpy()
    return math.sqrt(float(counts @ values**2) / float(counts.sum()))


def fit_layers(
    activations: Sequence[Activation], calibrations: Mapping[str, Calibration], options: FitOptions
) -> list[LayerConversion]:
    """Fits of all activations, in order; see `fit_layer`."""
    return [fit_layer(activation, calibrations[activation.name], options) for activation in activations]


def apply(model: nn.Module, conversions: Sequence[LayerConversion]) -> None:
    """Put the fitted activations in their places, in the model's floating-point format."""
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    built = [conversion.fit.build(torch.float32 if first is None else first.dtype) for conversion in conversions]
    for conversion, module in zip(conversions, built, strict=True):
        replace_module(model, conversion.name, module)


def layer_costs(
    model: nn.Module,
    conversions: Sequence[LayerConversion],
    batch: Any,
    forward: Callable[[nn.Module, Any], Tensor],
) -> dict[str, float]:
    """How far the model's output moves when only this layer is converted: |difference| / |output|, per layer.

    The model is as it was afterwards.
    """
    training = model.training
    model.eval()
    costs: dict[str, float] = {}
    try:
        with torch.no_grad():
            original = forward(model, batch).double()
            for conversion in conversions:
                replace_module(model, conversion.name, conversion.fit.build())
                try:
                    moved = forward(model, batch).double()
                finally:
                    replace_module(model, conversion.name, conversion.module)
                costs[conversion.name] = float((moved - original).norm() / original.norm())
    finally:
        model.train(training)
    return costs
