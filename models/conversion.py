"""Fit learnable activations to the calibrated activations of a model, and put them in their places."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models.calibration import Calibration
from polytrope.models.convert_options import check_basis, check_polynomial_only, check_weight, replacement
from polytrope.models.inputs import counted, mask_of
from polytrope.models.modes import measuring, wrapped_forward
from polytrope.models.sensitivity import Sensitivity
from polytrope.models.surgery import Activation, replace_module, replaced
from polytrope.ops.channels import (
    channel_of,
    fit_channels,
    fit_channels_to_error,
    function_of,
    slopes_of,
    smallest_mean_square,
    steepest,
)
from polytrope.ops.families import MAX_DEGREE, check_degree, largest_degree
from polytrope.ops.fitting.targets import Target, find_kinks, resolve_target, sample
from polytrope.ops.interpolate import FAMILIES, Fit, fit, fit_to_error
from polytrope.ops.moments import REACH, gaussian_nodes
from polytrope.ops.polynomial_only import MAX_DEPTH, fit_composition, fit_composition_to_error

_CHUNK = 1 << 20


@dataclass(frozen=True)
class FitOptions:
    """How every layer is fitted.

    Args:
        family, degree: of the new activations; family `auto`, with a target error: what needs the fewest parameters.
        target_error: instead of `degree`, which is then the largest one tried: the smallest degree whose error is at
            most this. The error is the root mean square over the measured inputs, relative to that of the target.
        coverage: share of the inputs inside the fitted interval; None: the interval of the smallest error over all
            inputs, those on the tangent lines outside included.
        weight: `measured` inputs, or `normal`: the normal distribution of their mean and deviation, under which a
            polynomial without tangents is the projection (Peng et al., "AutoReP", 2023).
        derivative_weight: λ of the Sobolev norm, for inputs in units of their standard deviation.
        constraints: as of `fit`: `ends`, `end_values`, `origin`.
        basis: of polynomials: that of the `family`, or the one that is orthonormal on the `measured` inputs in the
            interval (`ops.fitting.measured_basis`): the same function, and the recurrence learns as well.
        polynomial_only: instead of all of the above but `target_error`: compositions of polynomials without tangents.

    Raises:
        ValueError: one that is not as described.
    """

    family: str = "hermite"
    degree: int = 8
    target_error: float | None = None
    coverage: float | None = None
    weight: str = "measured"
    derivative_weight: float = 0.01
    constraints: tuple[str, ...] = ()
    polynomial_only: PolynomialOnly | None = None
    basis: str = "family"

    def __post_init__(self) -> None:
        known = (*FAMILIES, "auto")
        if self.polynomial_only is None and self.family not in known:
            raise ValueError(f"family: expected one of {', '.join(known)}, got {self.family!r}")
        check_degree(self.degree, largest_degree(self.family))
        if self.target_error is None and self.family == "auto":
            raise ValueError("family: auto chooses by target_error; give it (0.01 is 1 %), or name a family")
        if self.target_error is not None and not 0 < self.target_error < math.inf:
            raise ValueError(f"target_error: expected a number > 0, got {self.target_error!r}")
        if self.coverage is not None and not 0.5 < self.coverage <= 1:
            raise ValueError(f"coverage: expected a share above 0.5, at most 1, got {self.coverage!r}")
        if not 0 <= self.derivative_weight < math.inf:
            raise ValueError(f"derivative_weight: expected a number ≥ 0, got {self.derivative_weight!r}")

    @property
    def goes_by_effect(self) -> bool:
        """Whether an input counts by how much an error there moves the model's output. A target error is a mean over
        the inputs as they are, and so is what normal weights and certified ranges are made for.
        """
        return self.polynomial_only is None and self.target_error is None and self.weight == "measured"

    def title(self) -> str:
        """What is fitted, for people."""
        only = self.polynomial_only
        projected = ", projected under a normal distribution" if self.weight == "normal" else ""
        return (
            f"{self.family} of degree {self.degree}{projected}"
            if only is None
            else f"polynomials of depth {only.depth}"
        )


@dataclass(frozen=True)
class PolynomialOnly:
    """How compositions of polynomials are fitted.

    Args:
        depth: multiplicative depth of every activation; with a target error the largest one tried.
        domain: (lo, hi) of every activation; None: the extremes of the measured inputs, widened.
        margin: by how much of their distance, on each side.

    Raises:
        ValueError: one that cannot be.
    """

    depth: int = 6
    domain: tuple[float, float] | None = None
    margin: float = 0.25

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= MAX_DEPTH:
            raise ValueError(f"depth: expected 1 to {MAX_DEPTH}, got {self.depth}")
        if self.domain is not None and not (-math.inf < self.domain[0] < self.domain[1] < math.inf):
            raise ValueError(f"domain: expected (lo, hi) with lo < hi, both finite, got {self.domain}")
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"domain_margin: expected a share of at least 0, got {self.margin}")


def fit_options(
    *,
    family: str | None,
    degree: int | None,
    target_error: float | None,
    coverage: float | None,
    weight: str,
    derivative_weight: float,
    constraints: Sequence[str],
    basis: str,
    polynomial_only: bool,
    depth: int | None,
    domain: tuple[float, float] | None,
    domain_margin: float,
) -> FitOptions:
    """The options as they are given in Python, on the command line and in a workflow; None: not given.

    Args:
        family, degree, target_error, coverage, weight, derivative_weight, constraints, basis: as of `FitOptions`.
        polynomial_only: compositions of polynomials; depth, domain, domain_margin: of them, as of `PolynomialOnly`.

    Raises:
        ValueError: an option that is not as described or does not go with another.
    """
    given = {
        "family": family,
        "degree": degree,
        "coverage": coverage,
        "weight": weight,
        "derivative_weight": derivative_weight,
        "constraints": list(constraints),
        "basis": basis,
        "depth": depth,
        "domain": domain,
        "domain_margin": domain_margin,
    }
    check_polynomial_only(polynomial_only, given)
    check_weight(weight, given)
    check_basis(basis, family)
    if degree is None:
        degree = 8 if target_error is None else MAX_DEGREE
    if depth is None:
        depth = 6 if target_error is None else MAX_DEPTH
    return FitOptions(
        replacement(family, polynomial_only),
        degree,
        target_error,
        coverage,
        weight,
        derivative_weight,
        tuple(constraints),
        PolynomialOnly(depth, domain, domain_margin) if polynomial_only else None,
        basis,
    )


@dataclass(frozen=True)
class LayerConversion:
    """One activation, what it receives, and the fit that can replace it.

    Args:
        sensitivity: how much the fit counted each input; None: all alike.
    """

    name: str
    module: nn.Module
    calibration: Calibration
    fit: Fit
    sensitivity: Sensitivity | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """Where the fit holds; tangent lines outside, or nothing. A family without tails: the measured range."""
        config, measured = self.fit.config, (self.calibration.minimum, self.calibration.maximum)
        low, high = config.get("interval") or config.get("domain") or measured
        return float(low), float(high)

    @property
    def relative_error(self) -> float:
        """Root mean square error over the measured inputs, relative to that of the target; see `_size`."""
        certificate = self.fit.certificate
        return certificate.rms / _size(certificate.target_mean_square, self.fit.dtype)

    @property
    def weighted_error(self) -> float:
        """The same with every input counted as the fit counted it; where channels have their own functions, of
        `one_function`.
        """
        if self.sensitivity is None:
            return self.relative_error
        points, counts = self.calibration.measure()
        weights = counts * self.sensitivity(points)
        weights = weights / weights.sum()
        target, one = self.one_function()
        values, _ = sample(target, points)
        with torch.no_grad():
            fitted = one.build(torch.float64)(torch.from_numpy(points)).numpy()
        return math.sqrt(weights @ (fitted - values) ** 2) / _size(float(weights @ values**2), self.fit.dtype)

    def one_function(self) -> tuple[Target, Fit]:
        """The target and the fit as functions of a number; where channels have their own, those of the one that bends
        most.
        """
        slopes = slopes_of(self.module)
        if slopes is None:
            return resolve_target(self.module), self.fit
        channel = steepest(slopes)
        return resolve_target(function_of(slopes[channel])), channel_of(self.fit, channel)


def fit_layer(
    activation: Activation, calibration: Calibration, options: FitOptions, sensitivity: Sensitivity | None = None
) -> LayerConversion:
    """The fit of one activation; the model stays as it is.

    Args:
        sensitivity: how much each input counts, where the options go by effect; None: all alike.

    Raises:
        ValueError: the layer's name and what `fit` refuses, or a target error that no degree reaches.
    """
    if options.polynomial_only is not None:
        return _fit_polynomials(activation, calibration, options.polynomial_only, options.target_error)
    measure = calibration.measure()
    interval: Any = "best"
    sensitivity = sensitivity if options.goes_by_effect else None
    if options.weight == "normal":
        return _project(activation, calibration, options)
    if options.coverage is not None:
        tail = (1.0 - options.coverage) / 2
        interval = (calibration.quantile(tail), calibration.quantile(1.0 - tail))
        if interval[0] >= interval[1]:
            interval = (interval[0] - 0.5, interval[1] + 0.5)
    settings: dict[str, Any] = {
        "interval": interval,
        "weight": measure,
        "importance": sensitivity,
        "derivative_weight": options.derivative_weight * _variance(measure),
        "constraints": options.constraints,
        "held_out": calibration.held_out,
        "basis": measure if options.basis == "measured" else None,
        "dtype": calibration.dtype,
    }
    return replace(_fit(activation, calibration, options, settings), sensitivity=sensitivity)


def _fit(
    activation: Activation, calibration: Calibration, options: FitOptions, settings: dict[str, Any]
) -> LayerConversion:
    """Of the degree that is asked for, or of the smallest one with the target error."""
    try:
        found = _fitted(activation.module, options, settings)
    except ValueError as error:
        raise type(error)(f"activation `{activation.name}`: {error}") from error
    return LayerConversion(activation.name, activation.module, calibration, found)


def _project(activation: Activation, calibration: Calibration, options: FitOptions) -> LayerConversion:
    """sum_k E[f(μ + s z) h_k(z)] h_k((x - μ) / s): least squares under N(μ, s²), a polynomial on the whole line."""
    points, counts = calibration.measure()
    weights = counts / counts.sum()
    mean = float(weights @ points)
    deviation = math.sqrt(_variance((points, counts)))
    z, density = gaussian_nodes([(kink - mean) / deviation for kink in _kinks(activation, mean, deviation)])
    return _fit(
        activation,
        calibration,
        options,
        {
            "interval": (calibration.minimum, calibration.maximum)
            if calibration.minimum < calibration.maximum
            else (mean - deviation, mean + deviation),
            "weight": (mean + deviation * z, density),
            "derivative_weight": 0.0,
            "tails": False,
            "held_out": calibration.held_out,
            "basis": (points, counts) if options.basis == "measured" else None,
            "dtype": calibration.dtype,
        },
    )


def _kinks(activation: Activation, mean: float, deviation: float) -> list[float]:
    slopes = slopes_of(activation.module)
    target = resolve_target(activation.module if slopes is None else function_of(slopes[steepest(slopes)]))
    return find_kinks(target, mean - REACH * deviation, mean + REACH * deviation)


def _fitted(module: nn.Module, options: FitOptions, settings: dict[str, Any]) -> Fit:
    slopes = slopes_of(module)
    if options.target_error is None:
        if slopes is None:
            return fit(module, options.family, options.degree, **settings)
        return fit_channels(slopes, options.family, options.degree, **settings)
    error = options.target_error * _size(_mean_square(module, settings["weight"]), settings["dtype"])
    degrees = range(1 if options.family == "auto" else min(2, options.degree), options.degree + 1)
    if slopes is None:
        return fit_to_error(module, options.family, error, degrees=degrees, **settings)
    return fit_channels_to_error(slopes, options.family, error, degrees=degrees, **settings)


def _variance(measure: tuple[np.ndarray, np.ndarray]) -> float:
    """Of the inputs; 1 where all are the same."""
    points, counts = measure
    weights = counts / counts.sum()
    return float(weights @ (points - weights @ points) ** 2) or 1.0


def _fit_polynomials(
    activation: Activation, calibration: Calibration, options: PolynomialOnly, target_error: float | None
) -> LayerConversion:
    if slopes_of(activation.module) is not None:
        raise ValueError(
            f"activation `{activation.name}`: polynomial_only: its channels have slopes of their own, and a "
            f"composition is one function for all of them; leave it out: exclude=['{activation.name}'] (--exclude)"
        )
    low, high = calibration.minimum, calibration.maximum
    margin = options.margin * (high - low) if high > low else 0.5
    domain = options.domain or (low - margin, high + margin)
    measure = calibration.measure()
    settings: dict[str, Any] = {
        "measured": measure,
        "held_out": calibration.held_out,
        "dtype": calibration.dtype,
    }
    try:
        if target_error is None:
            found = fit_composition(activation.module, domain, options.depth, **settings)
        else:
            error = target_error * _size(_mean_square(activation.module, measure), calibration.dtype)
            found = fit_composition_to_error(activation.module, domain, error, depth=options.depth, **settings)
    except ValueError as error:
        raise type(error)(f"activation `{activation.name}`: {error}") from error
    return LayerConversion(activation.name, activation.module, calibration, found)


def _mean_square(module: nn.Module, measure: tuple[np.ndarray, np.ndarray]) -> float:
    slopes = slopes_of(module)
    if slopes is not None:
        return smallest_mean_square(slopes, measure)
    points, counts = measure
    values, _ = sample(resolve_target(module), points)
    return float(counts @ values**2) / float(counts.sum())


def _size(mean_square: float, dtype: torch.dtype) -> float:
    """What the errors of an activation are relative to: the target's root mean square over the measured inputs; 1 where
    the format cannot tell that from 0, as of a ReLU that receives nothing positive: errors are what they are then.
    """
    size = math.sqrt(mean_square)
    return size if size >= torch.finfo(dtype).tiny else 1.0


def fit_layers(
    activations: Iterable[Activation],
    calibrations: Mapping[str, Calibration],
    options: FitOptions,
    effects: Mapping[str, Sensitivity] | None = None,
) -> list[LayerConversion]:
    """Fits of all activations, in order; see `fit_layer`. One by one: threads wait for the GIL, and take longer.

    Args:
        effects: as of `sensitivity.sensitivities`; None: all inputs count alike.
    """
    return [
        fit_layer(activation, calibrations[activation.name], options, (effects or {}).get(activation.name))
        for activation in activations
    ]


def apply(model: nn.Module, conversions: Sequence[LayerConversion]) -> None:
    """Put the fitted activations in their places, in the floating-point format that their certificates are of."""
    for conversion in conversions:
        replace_module(model, conversion.name, conversion.fit.build())


def layer_costs(
    model: nn.Module,
    conversions: Sequence[LayerConversion],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Tensor],
    *,
    walk: Callable[[Sequence[tuple[str, nn.Module]]], Iterable[tuple[str, nn.Module]]] = iter,
) -> dict[str, float]:
    """How far the model's output moves when only this layer is converted: |difference| / |output|, per layer.

    Padding does not count.
    One batch after the other: two outputs of one of them are all that is held. The model is as it was afterwards.

    Args:
        walk: gives the layers, once for every batch, and may say how far it is.

    Raises:
        ValueError: the model does not call the new module where it called the old one; names it.
    """
    difference = {conversion.name: 0.0 for conversion in conversions}
    size = 0.0
    modules = {conversion.name: conversion.fit.build() for conversion in conversions}
    with measuring(model):
        for batch in batches:
            mask = mask_of(model, batch)
            with _counting({conversion.name: conversion.module for conversion in conversions}) as before:
                original = counted(forward(model, batch), mask)
            size += _squares(original)
            for name, module in walk(list(modules.items())):
                with replaced(model, name, module), _counting({name: module}) as after:
                    moved = counted(forward(model, batch), mask)
                _check_effect(before, after, "before its conversion")
                difference[name] += _squares(moved, original)
    return {name: math.sqrt(moved / size) if size else math.inf if moved else 0.0 for name, moved in difference.items()}


def _squares(here: Tensor, there: Tensor | None = None) -> float:
    """|here - there|², summed in float64 part by part: logits are large."""
    parts = here.flatten().split(_CHUNK)  # type: ignore[no-untyped-call]
    if there is None:
        return sum(float(part.double().square().sum()) for part in parts)
    others = there.flatten().split(_CHUNK)  # type: ignore[no-untyped-call]
    return sum(
        float((part.double() - other.double()).square().sum()) for part, other in zip(parts, others, strict=True)
    )


def prove(
    model: nn.Module, names: Sequence[str], batch: Any, forward: Callable[[nn.Module, Any], Any]
) -> dict[str, int]:
    """How often a forward pass in evaluation mode without gradients calls each converted activation; it must be as
    often as in training mode, where no fused code stands in for the modules.

    In training mode are the modules that are not random and keep no statistics; the model is as it was afterwards.

    Raises:
        ValueError: one that is called less often, or never: its conversion has no effect.
    """
    modules = {name: model.get_submodule(name) for name in names}
    with measuring(model):
        with _counting(modules) as evaluating:
            forward(model, batch)
        for module in model.modules():
            module.training = not (isinstance(module, _CHANGED_BY_TRAINING) or _keeps_numbers(module))
        with _counting(modules) as training, torch.random.fork_rng():
            forward(model, batch)
    _check_effect(training, evaluating, "in training mode")
    return evaluating


_CHANGED_BY_TRAINING = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


def _keeps_numbers(module: nn.Module) -> bool:
    """Whether it has statistics of its own, whatever its class: training would change them."""
    return any(buffer.is_floating_point() for buffer in module.buffers(recurse=False))


@contextmanager
def _counting(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """How often each module's forward runs."""
    counts = dict.fromkeys(modules, 0)

    def counted(name: str, module: nn.Module) -> Callable[..., Any]:
        function = module.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **keywords)

        return forward

    with wrapped_forward(modules.items(), counted):
        yield counts


def _check_effect(wanted: Mapping[str, int], found: Mapping[str, int], where: str) -> None:
    for name, count in found.items():
        if count == 0 or count < wanted[name]:
            raise ValueError(
                f"activation `{name}`: converted without effect: the model calls it {count} times in evaluation mode, "
                f"{wanted[name]} times {where}; something else of the model computes the old activation. Leave it out "
                "by name, or let its owner call the module"
            )
