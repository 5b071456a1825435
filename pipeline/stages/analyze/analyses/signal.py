"""What every activation does to the size of signals and of differences: moments, map of variances, Lipschitz constant.

Seconds on a quickstart model: the map of variances takes 60 quadratures per layer. The bound is of a block's MLP on the
inputs that were seen: a polynomial has no Lipschitz constant elsewhere, and attention and norms are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from polytrope.ops import moments
from polytrope.ops.lipschitz import largest_slope
from polytrope.ops.moments import curve_of
from polytrope.ops.variance_map import variance_map
from polytrope.pipeline.data.analysis_file import (
    FixedVariance,
    MomentFigures,
    SignalFigures,
    SignalLayer,
    SlopeBound,
    Symmetry,
    VarianceCurve,
)
from polytrope.pipeline.stages.analyze.parameters import SignalOptions
from polytrope.pipeline.stages.analyze.subject import AnalysedActivation, spectral_norm

_REACH = 3.0  # symmetries are looked for up to there,
_SCALE = 2.5  # and at that multiple


def analyse_signal(activations: Sequence[AnalysedActivation], _options: SignalOptions) -> SignalFigures:
    """All figures of each activation; those that cannot be had are left out, and `missing` says why."""
    return SignalFigures(layers=[_layer(entry) for entry in activations])


def _layer(entry: AnalysedActivation) -> SignalLayer:
    figures: dict[str, object] = {}
    missing: list[str] = []
    try:
        curve, _ = curve_of(entry.module, entry.inputs.minimum, entry.inputs.maximum)
        value, slope = curve(entry.points)
        figures["measured"] = MomentFigures(
            value=float(entry.weights @ value**2), derivative=float(entry.weights @ slope**2)
        )
        if entry.inputs.minimum < entry.inputs.maximum:
            figures["slope"] = _slope_bound(entry)
        if _holds_beyond(entry):
            figures["symmetry"] = _symmetry(entry)
    except ValueError as error:
        missing.append(str(error))
    try:
        if getattr(entry.module, "domain", None) is None:
            found = moments(entry.module)
            figures["standard"] = MomentFigures(value=found.value, derivative=found.derivative, slope=found.slope)
        figures["variance_map"] = _variance_curve(entry)
    except ValueError as error:
        missing.append(str(error))
    if missing:
        figures["missing"] = "; ".join(dict.fromkeys(missing))
    return SignalLayer.model_validate(
        {"name": entry.name, "activation": entry.title, "inputs": entry.inputs, **figures}
    )


def _slope_bound(entry: AnalysedActivation) -> SlopeBound:
    low, high = entry.inputs.minimum, entry.inputs.maximum
    found = largest_slope(entry.module, low, high)
    interval = getattr(entry.module, "interval", None)
    tails = None
    if interval is not None:
        left, right = curve_of(entry.module)[0](np.array(interval))[1]
        tails = (float(left), float(right))
    norms = [spectral_norm(linear) for linear in entry.linears]
    return SlopeBound(
        constant=found.value,
        at=found.at,
        low=low,
        high=high,
        method=found.method,
        tails=tails,
        linear_norms=norms,
        bound=found.value * math.prod(norms) if norms else None,
    )


def _holds_beyond(entry: AnalysedActivation) -> bool:
    """Whether it means something wherever symmetries are looked for; a polynomial does on its domain alone."""
    low, high = getattr(entry.module, "domain", None) or (-math.inf, math.inf)
    return low <= -_SCALE * _REACH and high >= _SCALE * _REACH


def _symmetry(entry: AnalysedActivation) -> Symmetry:
    curve, _ = curve_of(entry.module)
    x = np.linspace(-_REACH, _REACH, 601)
    value = curve(x)[0]
    mirrored, scaled = curve(-x)[0], curve(_SCALE * x)[0]

    def residual(found: np.ndarray, expected: np.ndarray) -> float:
        return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-9))

    return Symmetry(
        odd=residual(mirrored, -value), even=residual(mirrored, value), scaling=residual(scaled, _SCALE * value)
    )


def _variance_curve(entry: AnalysedActivation) -> VarianceCurve:
    found = variance_map(entry.module)
    return VarianceCurve(
        variances=found.variances.tolist(),
        images=found.images.tolist(),
        fixed_points=[
            FixedVariance(variance=point.variance, slope=point.slope, basin=point.basin) for point in found.fixed_points
        ],
        keeps_all=found.keeps_all,
    )
