"""Fits of a PReLU whose channels have slopes of their own: one activation, with coefficients for every channel.

All channels share what a module has once: family, degree, interval, variable. The interval is the best one of the
channel that bends most. How the inputs are distributed is known for all channels together alone, so errors are
bounds, whatever each channel receives of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from polytrope.ops.fitting import quadrature
from polytrope.ops.fitting.certificate import Built, Certificate, Inputs, root_mean_square
from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.targets import Target, sample
from polytrope.ops.interpolate import Fit, RoundingError, families_to_try, fit, parameter_count

CHANNELS = 1  # the dimension of x whose channels they are, as of `nn.PReLU`
_MEANS = (
    "target_mean",
    "fit_mean",
    "fit_mean_square",
    "target_derivative_mean_square",
    "fit_derivative_mean_square",
)


def slopes_of(module: nn.Module) -> Array | None:
    """The slopes of an `nn.PReLU` that has several, float64; None for all other modules."""
    if not isinstance(module, nn.PReLU) or type(module).forward is not nn.PReLU.forward or module.weight.numel() == 1:
        return None
    slopes: Array = module.weight.detach().double().cpu().numpy()
    return slopes


def function_of(slope: float) -> Target:
    """x above 0, slope · x below."""
    return partial(functional.leaky_relu, negative_slope=float(slope))


def steepest(slopes: Array) -> int:
    """The channel that bends most."""
    return int(np.abs(1.0 - slopes).argmax())


def smallest_mean_square(slopes: Array, measure: quadrature.Measure) -> float:
    """The least that E[f²] can be, whatever each channel receives of the measured inputs."""
    x, weights = quadrature.measured(measure)
    return float(weights @ np.where(x > 0, x, float(np.abs(slopes).min()) * x) ** 2)


def fit_channels(
    slopes: Array,
    family: str,
    degree: int,
    *,
    weight: quadrature.Measure,
    held_out: Array,
    derivative_weight: float,
    dtype: torch.dtype,
    **options: Any,
) -> Fit:
    """The member of a family, with coefficients for every channel, that is closest to a PReLU with these slopes.

    Args:
        slopes: `[channels]`.
        weight, held_out: what all channels together receive.
        options: of `interpolate.fit`.

    Returns:
        A fit whose `curve` gives `[..., channels]`.

    Raises:
        ValueError: as of `interpolate.fit`, for any channel.
    """
    distinct, channels = np.unique(slopes, return_inverse=True)
    settings = {
        **options,
        "weight": weight,
        "held_out": held_out,
        "derivative_weight": derivative_weight,
        "dtype": dtype,
    }
    first = steepest(distinct)
    bent = fit(function_of(distinct[first]), family, degree, **settings)
    if "interval" in bent.config:
        settings["interval"] = tuple(bent.config["interval"])
    fits = [
        bent if number == first else fit(function_of(slope), family, degree, **settings)
        for number, slope in enumerate(distinct)
    ]
    config = bent.config | {"num_parameters": len(slopes), "dim": CHANNELS}
    parameters = {name: np.stack([fits[at].parameters[name] for at in channels]) for name in bent.parameters}

    def curve(x: Array) -> tuple[Array, Array]:
        value, slope = zip(*(each.curve(x) for each in fits), strict=True)
        return np.stack(value, axis=-1)[..., channels], np.stack(slope, axis=-1)[..., channels]

    certificate = _joined(distinct, fits, np.bincount(channels) / len(slopes), weight, held_out, derivative_weight)
    return Fit(config, parameters, certificate, curve, dtype)


def fit_channels_to_error(slopes: Array, family: str, error: float, *, degrees: Sequence[int], **options: Any) -> Fit:
    """The fit of the fewest parameters whose root mean square error is at most `error`.

    Args:
        family: one of `interpolate.FAMILIES`, or `auto`.
        degrees: that are tried, ascending.
        options: of `fit_channels`.

    Raises:
        ValueError: no degree reaches it; names the best one. An argument that `interpolate.fit_to_error` refuses.
    """
    bent = function_of(slopes[steepest(slopes)])
    families = families_to_try(bent, family, degrees, **options)
    # One has every slope exactly and needs few parameters: what it needs bounds the search in the others.
    families.sort(key=lambda name: name != "tropical_rational")
    chosen: Fit | None = None
    fewest = math.inf
    best = (math.inf, "none can be fitted")
    for name in families:
        for degree in degrees:
            if parameter_count(name, degree) >= fewest:
                break
            try:
                alone = fit(bent, name, degree, **options)
                found = alone if alone.certificate.rms > error else fit_channels(slopes, name, degree, **options)
            except RoundingError as reason:
                best = min((math.inf, str(reason)), best, key=lambda entry: entry[0])  # of equal ones the last reason
                continue
            rms = found.certificate.rms
            if rms <= error:
                chosen, fewest = found, parameter_count(name, degree)
                break
            best = min(best, (rms, f"{name} of degree {degree} has {rms:.3g} or more"))
    if chosen is not None:
        return chosen
    raise ValueError(
        f"target error: {family} reaches no error of {error:.3g} for every channel up to degree {max(degrees)}: "
        f"{best[1]}"
    )


def channel_of(found: Fit, channel: int) -> Fit:
    """The fit of one channel alone, with the certificate of all."""
    config = {name: value for name, value in found.config.items() if name not in ("num_parameters", "dim")}

    def curve(x: Array) -> tuple[Array, Array]:
        value, slope = found.curve(x)
        return value[..., channel], slope[..., channel]

    return replace(
        found,
        config=config,
        parameters={name: value[channel] for name, value in found.parameters.items()},
        curve=curve,
    )


def _joined(
    slopes: Array,
    fits: Sequence[Fit],
    shares: Array,
    weight: quadrature.Measure,
    held_out: Array,
    derivative_weight: float,
) -> Certificate:
    """Of all channels: the largest of every maximum, and means of the largest error that any channel has at an input.

    A channel's inputs are some of the inputs of all, so the mean over all channels is at most that.

    Args:
        slopes, fits: every one once.
        shares: of the channels that have them.
    """
    points, weights = quadrature.measured(weight)
    worst: Array = np.zeros(len(points) + len(held_out))
    worst_slope: Array = np.zeros(len(points))
    for slope, found in zip(slopes, fits, strict=True):
        exact = partial(sample, function_of(slope))
        off = Inputs.of(exact, found.dtype, (points, weights), held_out).errors(Built.of(found.build(), found.dtype))
        worst = np.maximum(worst, np.abs(off))
        worst_slope = np.maximum(worst_slope, np.abs(found.curve(points)[1] - exact(points)[1]))
    certificates = [found.certificate.to_dict() for found in fits]
    joined = {name: max(each[name] for each in certificates) for name in certificates[0]}
    joined |= {name: float(shares @ [each[name] for each in certificates]) for name in _MEANS}
    joined["rms"] = root_mean_square(worst, weights)
    joined["rms_derivative"] = float(np.sqrt(weights @ worst_slope**2))
    joined["h1_mean_square"] = (
        float(weights @ worst[: len(points)] ** 2) + derivative_weight * joined["rms_derivative"] ** 2
    )
    joined["target_mean_square"] = smallest_mean_square(slopes, weight)
    return Certificate(**joined)
