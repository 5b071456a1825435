"""`conversion.json`: what became of every layer, with certificates, curves, and advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from polytrope.models.changes import Left
from polytrope.models.conversion import FitOptions, LayerConversion, fit_layer
from polytrope.models.convert import target_name
from polytrope.models.surgery import Activation
from polytrope.ops import circuit
from polytrope.ops.families import largest_degree
from polytrope.ops.fitting.targets import broken_line
from polytrope.ops.polynomial_only import MAX_DEPTH
from polytrope.pipeline.data.conversion_file import Advice, ConversionRecord
from polytrope.pipeline.data.converted_layers import ConvertedLayer
from polytrope.pipeline.data.records import finite

_CURVE_POINTS = 161


def describe(conversion: LayerConversion) -> ConvertedLayer:
    """One entry of `conversion.json`: certificate and curves, over all but one in 10,000 inputs and the interval."""
    calibration = conversion.calibration
    low = min(conversion.interval[0], calibration.quantile(0.00005))
    high = max(conversion.interval[1], calibration.quantile(0.99995))
    margin = (high - low) / 20
    if "domain" in conversion.fit.config:  # outside of it a polynomial is anything
        low, high = conversion.interval
        margin = 0.0
    x = np.linspace(low - margin, high + margin, _CURVE_POINTS)
    inputs = torch.from_numpy(x)
    function, one = conversion.one_function()
    with torch.no_grad():
        fitted, target = one.build(torch.float64)(inputs), function(inputs)
    content = {
        "name": conversion.name,
        "target": target_name(conversion.module),
        "family": conversion.fit.config["name"],
        "degree": conversion.fit.config["degree"],
        "interval": list(conversion.interval),
        "config": conversion.fit.config,
        "coefficients": conversion.fit.coefficients.tolist(),
        "relative_error": conversion.relative_error,
        "inputs": calibration.summary(),
        "certificate": finite(conversion.fit.certificate.to_dict()),  # outside of a domain nothing is certified
        "curve": {
            "x": x.tolist(),
            "target": target.tolist(),
            "fit": fitted.tolist(),
            "density": calibration.density(x).tolist(),
        },
    }
    return ConvertedLayer.model_validate(content)


def record(
    conversions: Sequence[LayerConversion],
    options: FitOptions | None,
    costs: Mapping[str, float],
    left: Sequence[Left],
) -> ConversionRecord:
    """The whole of `conversion.json`.

    Args:
        options: of the fits; None: no activation was replaced.
        costs: as of `layer_costs`; empty: not measured, so that there is no advice.
        left: as of `select_activations`.
    """
    return ConversionRecord(
        format=1,
        layers=[describe(conversion) for conversion in conversions],
        advice=advise(conversions, costs, options) if costs and options is not None else None,
        left=list(left),
    )


def advise(conversions: Sequence[LayerConversion], costs: Mapping[str, float], options: FitOptions) -> list[Advice]:
    """Layers by what their conversion costs, the dearest first, and what a higher degree would bring.

    `cost`: how far the model's output moves when only this layer is converted, relative to the output. `share`: of the
    sum of squares, which is what the costs add up to if they are independent.
    """
    total = sum(cost**2 for cost in costs.values()) or 1.0
    ranked = sorted(conversions, key=lambda conversion: (-costs[conversion.name], conversion.name))
    entries: list[Advice] = []
    for rank, conversion in enumerate(ranked, start=1):
        cost = costs[conversion.name]
        entry: dict[str, Any] = {
            "rank": rank,
            "name": conversion.name,
            "cost": cost,
            "share": cost**2 / total,
            "relative_error": conversion.relative_error,
            "degree": conversion.fit.config["degree"],
        }
        if rank <= 3:
            entry["advice"] = _suggestion(conversion, entry["share"], options)
        entries.append(Advice.model_validate(entry))
    return entries


def _exact_degree(conversion: LayerConversion) -> int | None:
    """Of the tropical rational activation that is this function, where it is one and the fit is not exact already."""
    if conversion.relative_error < 1e-6:
        return None
    function, _ = conversion.one_function()
    bends = broken_line(function, conversion.calibration.minimum, conversion.calibration.maximum)
    return None if bends is None else max(sum(bend > 0 for bend in bends), sum(bend < 0 for bend in bends), 1)


def _suggestion(conversion: LayerConversion, share: float, options: FitOptions) -> str:
    opening = f"{share:.0%} of what the conversion costs"
    only = options.polynomial_only
    exact = _exact_degree(conversion) if only is None else None
    if exact is not None:
        return (
            f"{opening}; this function is made of straight lines: tropical_rational of degree {exact} has it exactly, "
            "as a piecewise linear activation with its knots would"
        )
    if only is not None:
        depth = circuit.count(conversion.fit.build().circuit()).depth + 1  # type: ignore[operator]
        what = f"depth {depth}"
        changed: dict[str, Any] = {"polynomial_only": replace(only, depth=depth)} if depth <= MAX_DEPTH else {}
    else:
        degree = int(conversion.fit.config["degree"]) + 2
        what = f"degree {degree}"
        family = conversion.fit.config["name"]
        changed = {"family": family, "degree": degree} if degree <= largest_degree(family) else {}
    if not changed:
        return f"{opening}; leave this layer as it is if that is too much"
    higher = replace(options, target_error=None, **changed)
    try:
        activation = Activation(conversion.name, conversion.module)
        better = fit_layer(activation, conversion.calibration, higher, conversion.sensitivity)
    except ValueError:
        return f"{opening}; {what} cannot be fitted, leave this layer as it is if that is too much"
    weighted = " weighted by effect" if conversion.sensitivity is not None else ""  # as the fits are
    before, after = conversion.weighted_error, better.weighted_error
    if after >= before:
        return f"{opening}; {what} does not lower its error{weighted} of {before:.2g}"
    return f"{opening}; {what} would lower its error{weighted} from {before:.2g} to {after:.2g}"
