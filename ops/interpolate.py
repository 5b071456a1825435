"""Fit a learnable activation to a given function in closed form, by matching value *and* slope, with a certificate.

`fit` minimises ∫ w(x) (|f - F|² + λ |f' - F'|²) dx (Sobolev least squares) or interpolates value and slope at nodes
(confluent Hermite interpolation). With measured inputs as the weight, the tangent lines outside the interval are part
of what is minimised, and `interval="best"` chooses where they begin. Polynomials are solved by SVD in Legendre
polynomials of the interval, in float64, and written in the family's basis by exact rational arithmetic. The other
families are linear problems with a few Gauss-Newton steps for what enters nonlinearly; broken lines are found by
dynamic programming.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from polytrope.ops.families import check_degree
from polytrope.ops.fitting import placement, polynomial, quadrature
from polytrope.ops.fitting.certificate import Certificate, certify
from polytrope.ops.fitting.curves import Array, Curve, with_tangents
from polytrope.ops.fitting.refinement import Data
from polytrope.ops.fitting.solvers import LINEAR, NONLINEAR, Condition, Problem, columns_of, fit_linear, interpolate
from polytrope.ops.fitting.targets import Target, find_kinks, resolve_target, sample
from polytrope.ops.functional import check_interval
from polytrope.ops.modules import LEARNABLE, build_activation

__all__ = ["FAMILIES", "Certificate", "Condition", "Fit", "fit", "fit_to_error", "parameter_count"]

FAMILIES = tuple(name for name in LEARNABLE if name in LINEAR or name in NONLINEAR)
_WIDER = tuple(1.5**k for k in range(1, 9))


@dataclass(frozen=True)
class Fit:
    """A fitted activation.

    Args:
        config: for `build_activation`.
        parameters: the module's learnable tensors by name, float64.
        certificate: how good it is.
        curve: x → value and slope in float64, independent of the module.
    """

    config: dict[str, Any]
    parameters: dict[str, Array]
    certificate: Certificate = field(repr=False)
    curve: Curve = field(repr=False, compare=False)

    @property
    def coefficients(self) -> Array:
        """All learnable numbers in one row; for a polynomial, its coefficients."""
        return np.concatenate([np.ravel(value) for value in self.parameters.values()])

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The activation module with these parameters."""
        return _build(self.config, self.parameters, dtype)


def fit(
    target: str | Target | nn.Module,
    family: str = "hermite",
    degree: int = 8,
    *,
    interval: tuple[float, float] | Literal["best"] | None = (-4.0, 4.0),
    weight: quadrature.Weight = "uniform",
    derivative_weight: float = 1.0,
    constraints: Sequence[str | Condition] = (),
    method: Literal["least_squares", "interpolation"] = "least_squares",
    nodes: Sequence[float] | None = None,
    derivative: Target | None = None,
    tails: bool = True,
    float32_tolerance: float | None = 1e-3,
) -> Fit:
    """The member of a family that is closest to `target` in value and slope.

    Args:
        target: a name (`gelu`, `gelu_tanh`, `relu`, `silu`, `tanh`, …), an elementwise function of a tensor, or an
            activation module.
        family: one of `FAMILIES`.
        degree: 1…16. `rational`: of the numerator, the denominator has one less. Tropical families: lines less one.
        interval: where to fit. None: the whole line (polynomials with `weight="gaussian"`), or all measured inputs.
            `best`, for measured inputs: where polynomial and tangent lines together fit best.
        weight: `uniform`, `gaussian` (standard normal), a density as a function of an array, or measured inputs as
            (points, counts). Measured inputs outside the interval count as well, with the tangent lines.
        derivative_weight: λ ≥ 0; 0 matches values only.
        constraints: what must hold exactly (polynomials, PolyReLU): `ends` (value and slope at both ends of the
            interval), `end_values`, `origin` (F(0) = f(0)), or pairs (x, "value") and (x, "slope").
        method: `least_squares`, or `interpolation`: value and slope at `nodes` (polynomials).
        nodes: degree // 2 + 1 points; default: Chebyshev nodes. With an even degree the middle one has no slope.
        derivative: f', where autograd cannot give it.
        tails: tangent lines outside the interval, for families that can have them.
        float32_tolerance: largest rounding error of the formula in float32, relative to the largest |f| on the interval
            (at least 1); None: any.

    Raises:
        ValueError: an argument that is not as described; a target that is not finite or not elementwise; more
            constraints than coefficients; a degree too high for float32 on this interval.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    degree = check_degree(degree)
    inputs = quadrature.measured(weight) if isinstance(weight, tuple) else None
    if interval == "best":
        if inputs is None or not tails or method != "least_squares":
            raise ValueError("interval: 'best' needs measured inputs as the weight, tails, and least squares")
        ends = None
    elif inputs is not None and interval is None:
        ends = check_interval(_widened(float(inputs[0][0]), float(inputs[0][-1])))
    else:
        ends = check_interval(interval)
    if not (math.isfinite(derivative_weight) and derivative_weight >= 0):
        raise ValueError(f"derivative_weight: expected a number ≥ 0, got {derivative_weight}")
    is_polynomial = family in polynomial.FAMILIES
    if interval is None and ends is None and not (is_polynomial and weight == "gaussian" and method == "least_squares"):
        raise ValueError("interval: None (the whole line) is for polynomials with weight='gaussian' by least squares")
    if not is_polynomial and ((constraints and family not in LINEAR) or method != "least_squares" or nodes is not None):
        raise ValueError(f"constraints, nodes and interpolation are for polynomials, not for {family}")
    if method not in ("least_squares", "interpolation"):
        raise ValueError(f"method: expected least_squares or interpolation, got {method!r}")
    function = resolve_target(target)

    def exact(x: Array) -> tuple[Array, Array]:
        return sample(function, x, derivative)

    if inputs is not None:
        x, weights = inputs
        low, high = ends or _widened(float(x[0]), float(x[-1]))
    else:
        low, high = ends or (-quadrature.GAUSSIAN_REACH, quadrature.GAUSSIAN_REACH)
    kinks = find_kinks(function, low, high, derivative)
    if inputs is None:
        assert not isinstance(weight, tuple)
        x, weights = quadrature.nodes(low, high, kinks, weight)
    value, slope = exact(x)
    data = Data(x, weights, value, slope, derivative_weight)
    if interval == "best":
        ends = (low, high)
        if family in LINEAR:
            ends = placement.best_interval(data, lambda ends: columns_of(family, degree, ends, tails=True))
    if inputs is not None and not is_polynomial:
        data = placement.compressed(data)  # Gauss-Newton steps over every bin of a histogram would take seconds
    problem = Problem(family, degree, ends, data, kinks, tails, free_ends=interval == "best")
    if is_polynomial and method == "interpolation":
        solution = interpolate(problem, exact, nodes)
    elif family in LINEAR:
        solution = fit_linear(problem, exact, _conditions(constraints, ends))
    else:
        solution = NONLINEAR[family](problem)
    if solution.interval is not None:
        ends = solution.interval
    low, high = ends or (low, high)
    kinks = [kink for kink in kinks if low < kink < high]
    config: dict[str, Any] = {"name": family, "degree": degree}
    curve = solution.curve
    if tails and ends is not None and LEARNABLE[family].accepts_interval:
        config["interval"] = [low, high]
        curve = with_tangents(curve, low, high)
    module = _build(config, solution.parameters, torch.float32)

    def rounded(points: Array) -> Array:
        with torch.no_grad():
            result: Array = module(torch.from_numpy(points).float()).double().numpy()
        return result

    # On the whole line the maxima are those within four standard deviations: a polynomial leaves any bound further out.
    shown = ends or (-4.0, 4.0)
    reach = shown if inputs is None else (float(x[0]), float(x[-1]))
    certificate = certify(
        exact, curve, rounded, shown, kinks, (x, weights), reach, derivative_weight, solution.condition
    )
    if float32_tolerance is not None:
        scale = max(1.0, float(np.abs(value[(x >= shown[0]) & (x <= shown[1])]).max(initial=0.0)))
        if not certificate.float32_error <= float32_tolerance * scale:
            message = (
                f"degree: {family} of degree {degree} on ({shown[0]:.4g}, {shown[1]:.4g}) loses "
                f"{certificate.float32_error:.2g} to rounding in float32; take a lower degree or another interval"
            )
            if interval != "best":
                raise ValueError(message)
            # Around a kink the best interval shrinks until float32 cannot take it: the next wider one that it can.
            middle, half = (low + high) / 2, (high - low) / 2
            for factor in _WIDER:
                with contextlib.suppress(ValueError):
                    return fit(
                        target,
                        family,
                        degree,
                        interval=(middle - factor * half, middle + factor * half),
                        weight=weight,
                        derivative_weight=derivative_weight,
                        constraints=constraints,
                        derivative=derivative,
                        float32_tolerance=float32_tolerance,
                    )
            raise ValueError(message)
    return Fit(config, solution.parameters, certificate, curve)


def fit_to_error(
    target: str | Target | nn.Module,
    family: str,
    error: float,
    *,
    degrees: Sequence[int] = range(1, 17),
    **options: Any,
) -> Fit:
    """The fit of the smallest degree whose weighted root mean square error is at most `error`.

    Args:
        options: of `fit`, without the degree.

    Raises:
        ValueError: no degree reaches it; names the best one.
    """
    best: Fit | None = None
    for degree in degrees:
        try:
            candidate = fit(target, family, degree, **options)
        except ValueError:
            if best is None or degree < max(degrees):
                continue  # constraints that need a higher degree
            break  # a degree that float32 cannot take
        if candidate.certificate.rms <= error:
            return candidate
        if best is None or candidate.certificate.rms < best.certificate.rms:
            best = candidate
    reached = "none can be fitted" if best is None else f"degree {best.config['degree']} has {best.certificate.rms:.3g}"
    raise ValueError(f"target error: {family} reaches no error of {error:.3g} up to degree {max(degrees)}: {reached}")


def parameter_count(family: str, degree: int) -> int:
    """Learnable numbers of one activation."""
    return sum(parameter.numel() for parameter in LEARNABLE[family](degree).parameters())


def _conditions(constraints: Sequence[str | Condition], ends: tuple[float, float] | None) -> list[Condition]:
    """Constraints as (x, value or slope) pairs, each once."""
    named: dict[str, list[Condition]] = {"origin": [(0.0, "value")]}
    if ends is not None:
        named["end_values"] = [(end, "value") for end in ends]
        named["ends"] = named["end_values"] + [(end, "slope") for end in ends]
    result: list[Condition] = []
    for entry in constraints:
        if isinstance(entry, str):
            if entry not in named:
                raise ValueError(f"constraints: expected {', '.join(named)} or (x, 'value' | 'slope'), got {entry!r}")
            result += named[entry]
        elif len(entry) == 2 and entry[1] in ("value", "slope") and math.isfinite(entry[0]):
            result.append((float(entry[0]), entry[1]))
        else:
            raise ValueError(f"constraints: expected (x, 'value' | 'slope'), got {entry!r}")
    return list(dict.fromkeys(result))


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _build(config: dict[str, Any], parameters: dict[str, Array], dtype: torch.dtype) -> nn.Module:
    module = build_activation(config).to(dtype)
    own = dict(module.named_parameters())
    if set(own) != set(parameters):
        raise ValueError(f"{config['name']}: the module learns {sorted(own)}, the fit gives {sorted(parameters)}")
    with torch.no_grad():
        for name, value in parameters.items():
            own[name].copy_(torch.from_numpy(np.asarray(value)).reshape(own[name].shape))
    return module
