"""Fit a learnable activation to a given function in closed form, by matching value *and* slope, with a certificate.

`fit` minimises ∫ w(x) (|f - F|² + λ |f' - F'|²) dx (Sobolev least squares) or interpolates value and slope at nodes
(confluent Hermite interpolation). With measured inputs as the weight, the tangent lines outside the interval are part
of what is minimised, and `interval="best"` chooses where they begin. How each family is solved: `fitting.solvers`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from polytrope.ops.families import check_degree
from polytrope.ops.fitting import placement, polynomial, quadrature
from polytrope.ops.fitting.certificate import Built, Certificate, certify
from polytrope.ops.fitting.curves import Array, Curve, with_tangents
from polytrope.ops.fitting.refinement import Data
from polytrope.ops.fitting.solvers import LINEAR, NONLINEAR, Condition, Problem, columns_of, fit_linear, interpolate
from polytrope.ops.fitting.targets import Target, find_kinks, resolve_target, sample
from polytrope.ops.functional import check_interval
from polytrope.ops.modules import LEARNABLE, build_activation

__all__ = ["FAMILIES", "Certificate", "Condition", "Fit", "fit", "fit_to_error", "parameter_count"]

FAMILIES = tuple(name for name in LEARNABLE if name in LINEAR or name in NONLINEAR)
_ROUNDED = 1.1  # of the error in exact arithmetic: beyond, rounding limits a fit
_WIDER = tuple(1.5**k for k in range(1, 9))


@dataclass(frozen=True)
class Fit:
    """A fitted activation.

    Args:
        config: for `build_activation`.
        parameters: the module's learnable tensors by name, float64.
        certificate: how good it is, as a module of `dtype`.
        curve: x → value and slope in float64, independent of the module.
        dtype: the floating-point format it is for.
    """

    config: dict[str, Any]
    parameters: dict[str, Array]
    certificate: Certificate = field(repr=False)
    curve: Curve = field(repr=False, compare=False)
    dtype: torch.dtype = torch.float32

    @property
    def coefficients(self) -> Array:
        """All learnable numbers in one row; for a polynomial, its coefficients."""
        return np.concatenate([np.ravel(value) for value in self.parameters.values()])

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The activation module with these parameters; without `dtype` the one that the certificate is of."""
        return _build(self.config, self.parameters, self.dtype if dtype is None else dtype)


class RoundingError(ValueError):
    """What a formula loses to rounding is too much for what it computes."""


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
    held_out: Array | None = None,
    dtype: torch.dtype = torch.float32,
    rounding_tolerance: float | None = 1e-3,
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
        held_out: raw inputs that are not in the weight; the certificate's root mean square counts them too.
        dtype: the floating-point format that the module is for: of its parameters and inputs.
        rounding_tolerance: largest rounding error of the formula in this format, relative to the largest |f| on the
            interval, beyond the rounding of any result in it; None: any. With measured inputs, polynomials and PolyReLU
            take fewer terms or a wider interval where these lose less.

    Raises:
        ValueError: an argument that is not as described; a target that is not finite or not elementwise; more
            constraints than coefficients; a degree too high for the format on this interval.
    """
    options: dict[str, Any] = {
        "interval": interval,
        "weight": weight,
        "derivative_weight": derivative_weight,
        "constraints": constraints,
        "method": method,
        "nodes": nodes,
        "derivative": derivative,
        "tails": tails,
        "held_out": held_out,
        "dtype": dtype,
        "rounding_tolerance": rounding_tolerance,
    }
    if not isinstance(weight, tuple) or family not in LINEAR or rounding_tolerance is None:
        return _fit(target, family, degree, **options)
    best: Fit | None = None
    refused: ValueError | None = None
    for terms in range(check_degree(degree), 0, -1):
        try:
            found = _fit(target, family, terms, **options)
        except RoundingError as error:
            refused = refused or error
            continue
        except ValueError:
            if best is None and refused is None:
                raise
            break  # constraints that need more terms
        if best is None or found.certificate.rms < best.certificate.rms:
            padded = {"coefficients": np.pad(found.parameters["coefficients"], (0, degree - terms))}
            best = replace(found, config=found.config | {"degree": degree}, parameters=padded)
        exact = math.sqrt(found.certificate.h1_mean_square)
        if found.certificate.rms <= _ROUNDED * exact:
            break  # rounding is not what limits it, so fewer terms are no better
    if best is None:
        assert refused is not None
        raise refused
    return best


def _fit(
    target: str | Target | nn.Module,
    family: str,
    degree: int,
    *,
    interval: tuple[float, float] | Literal["best"] | None,
    weight: quadrature.Weight,
    derivative_weight: float,
    constraints: Sequence[str | Condition],
    method: str,
    nodes: Sequence[float] | None,
    derivative: Target | None,
    tails: bool,
    held_out: Array | None,
    dtype: torch.dtype,
    rounding_tolerance: float | None,
) -> Fit:
    """As `fit`, with this very degree."""
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
    variable = polynomial.natural_variable(family, ends)
    problem = Problem(family, degree, ends, data, kinks, tails, free_ends=interval == "best", variable=variable)
    if is_polynomial and method == "interpolation":
        solution = interpolate(problem, exact, nodes)
    elif family in LINEAR:
        solution = fit_linear(problem, exact, _conditions(constraints, ends))
    else:
        solution = NONLINEAR[family](problem)
    if solution.interval is not None:
        ends = solution.interval
    low, high = ends or (low, high)
    kinks = [kink for kink in (*kinks, *_folds(solution.parameters)) if low < kink < high]
    config: dict[str, Any] = {"name": family, "degree": degree}
    if variable is not None:
        config["variable"] = list(variable)
    curve = solution.curve
    if tails and ends is not None and LEARNABLE[family].accepts_interval:
        config["interval"] = [low, high]
        curve = with_tangents(curve, low, high)
    module = _build(config, solution.parameters, dtype)

    def evaluate(points: Array) -> Array:
        with torch.no_grad():
            result: Array = module(torch.from_numpy(points).to(dtype)).double().numpy()
        return result

    # On the whole line the maxima are those within four standard deviations: a polynomial leaves any bound further out.
    shown = ends or (-4.0, 4.0)
    unseen = np.zeros(0) if held_out is None else np.asarray(held_out, dtype=np.float64)
    reach = (
        shown
        if inputs is None
        else (float(min(x[0], unseen.min(initial=x[0]))), float(max(x[-1], unseen.max(initial=x[-1]))))
    )
    certificate = certify(
        exact,
        curve,
        Built(evaluate, dtype),
        shown,
        kinks,
        (x, weights),
        unseen,
        reach,
        derivative_weight,
        solution.condition,
    )
    found = Fit(config, solution.parameters, certificate, curve, dtype)
    if rounding_tolerance is None:
        return found
    smallest = float(torch.finfo(dtype).tiny)
    largest = float(np.abs(value[(x >= shown[0]) & (x <= shown[1])]).max(initial=0.0))
    if certificate.rounding_error <= (rounding_tolerance + 2 * torch.finfo(dtype).eps) * largest + smallest:
        return found
    refused = RoundingError(
        f"degree: {family} of degree {degree} on ({shown[0]:.4g}, {shown[1]:.4g}) loses "
        f"{certificate.rounding_error:.2g} to rounding in {str(dtype).removeprefix('torch.')}; take a lower degree or "
        "another interval"
    )
    if interval != "best":
        raise refused
    # Around a kink the best interval shrinks until the format cannot take it: the next wider one that it can.
    middle, half = (low + high) / 2, (high - low) / 2
    for factor in _WIDER:
        with contextlib.suppress(ValueError):
            return _fit(
                target,
                family,
                degree,
                interval=(middle - factor * half, middle + factor * half),
                weight=weight,
                derivative_weight=derivative_weight,
                constraints=constraints,
                method=method,
                nodes=nodes,
                derivative=derivative,
                tails=tails,
                held_out=held_out,
                dtype=dtype,
                rounding_tolerance=rounding_tolerance,
            )
    raise refused


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


def _folds(parameters: dict[str, Array]) -> list[float]:
    """Where the absolute value in a rational function's denominator has its kinks."""
    denominator = parameters.get("denominator")
    if denominator is None:
        return []
    roots = np.roots(np.trim_zeros(np.append(denominator[::-1], 0.0), "f"))
    return sorted(float(root.real) for root in roots if abs(root.imag) <= 1e-6 * max(abs(root), 1e-300))


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
