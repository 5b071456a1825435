"""What an activation does to the size of a signal: moments under a standard normal distribution."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from polytrope.ops.fitting.curves import Array, Curve
from polytrope.ops.fitting.targets import find_kinks, resolve_target, sample

REACH = 14.0  # standard deviations; the density beyond is below 1e-42


@dataclass(frozen=True)
class Moments:
    """Of F, with z ~ N(0, 1).

    A wide layer with weights of variance 1 / inputs and no bias makes inputs of variance E[F(√q z)²] from inputs of
    variance q. Where value is 1, q = 1 is a fixed point of that map, and slope is the map's slope there: below 1 a
    deviation dies out with depth, above 1 it grows until a deep net without normalisation overflows or falls silent.

    Args:
        value: E[F(z)²].
        derivative: E[F'(z)²]; 1 keeps the size of a gradient that goes back through the layer.
        slope: of q → E[F(√q z)²] at q = 1, which is E[F'² + F F''].
    """

    value: float
    derivative: float
    slope: float


def moments(activation: nn.Module) -> Moments:
    """The moments of an activation with its present parameters.

    In closed form for polynomials without an interval and for PolyNorm (in rows of infinite length), else by quadrature
    of what the module computes in float64, its tangents included.

    Args:
        activation: one of this package with one set of coefficients and not gated, or any elementwise module.

    Raises:
        ValueError: a gated activation, one with groups of channels, or a module that is not elementwise.
    """
    own = getattr(activation, "moments", None)  # those of this package know their own, most in closed form
    if callable(own):
        found = own()
        assert isinstance(found, Moments)
        return found
    return moments_of_curve(*curve_of(activation))


def check_everywhere(activation: nn.Module) -> None:
    """Refuse normal numbers as inputs of what holds on a domain alone.

    Raises:
        ValueError: a composition of polynomials.
    """
    if getattr(activation, "domain", None) is not None:
        raise ValueError("a polynomial for its domain alone, beyond which nothing holds, has no normal distribution")


def curve_of(activation: nn.Module, low: float = -REACH, high: float = REACH) -> tuple[Curve, list[float]]:
    """An elementwise activation in float64 as x → value, slope, and where its slope jumps.

    Args:
        low, high: where kinks are looked for in a module that is not of this package.

    Raises:
        ValueError: a gated activation, one with groups of channels, or a module that is not elementwise.
    """
    if getattr(activation, "glu", False) or getattr(activation, "num_parameters", 1) > 1:
        raise ValueError("only activations with one set of coefficients that are not gated")
    function = resolve_target(activation)
    own = getattr(activation, "kinks", None)
    if callable(own):
        kinks = [*own(), *(getattr(activation, "interval", None) or ())]
    else:
        kinks = find_kinks(function, low, high)
    return (lambda x: sample(function, x)), kinks


def moments_of_module(module: nn.Module, kinks: Sequence[float]) -> Moments:
    """By quadrature over an elementwise module, whose slope jumps at `kinks` only."""
    double = copy.deepcopy(module).double().cpu()
    return moments_of_curve(lambda x: sample(double, x), kinks)


def moments_of_curve(curve: Curve, kinks: Sequence[float] = ()) -> Moments:
    """By quadrature. The map's slope is E[(z² - 1) F²] / 2: the normal density differentiated by its variance."""
    x, density = gaussian_nodes(kinks)
    value, slope = curve(x)
    square = value**2
    return Moments(float(density @ square), float(density @ slope**2), float(density @ ((x * x - 1.0) * square)) / 2)


def moments_of_hermite(coefficients: Array) -> Moments:
    """Of sum_k a_k He_k(x) / k!, in closed form.

    E[F²] = sum_k a_k² / k!, E[F'²] = sum_{k≥1} a_k² / (k-1)!, and E[F F''] = sum_k a_k a_{k+2} / k!, because
    E[He_j He_k] = k! where j = k, else 0, and (He_k / k!)' = He_{k-1} / (k-1)!
    """
    a = np.asarray(coefficients, dtype=np.float64)
    weights = 1.0 / np.array([math.factorial(k) for k in range(len(a))])
    derivative = float(weights[:-1] @ a[1:] ** 2)
    return Moments(float(weights @ a**2), derivative, derivative + float(weights[:-2] @ (a[:-2] * a[2:])))


def gaussian_moments(curve: Curve, kinks: Sequence[float] = ()) -> tuple[float, float, float]:
    """E[G], E[G²], E[G'²] under N(0, 1) of a curve whose slope jumps at `kinks` only."""
    x, density = gaussian_nodes(kinks)
    value, slope = curve(x)
    return float(density @ value), float(density @ value**2), float(density @ slope**2)


def gaussian_nodes(kinks: Sequence[float]) -> tuple[Array, Array]:
    """Points and weights under the normal density: 16-point Gauss-Legendre rules on panels that end at the kinks."""
    inside = [kink for kink in kinks if -REACH < kink < REACH]
    edges = np.unique(np.concatenate([np.linspace(-REACH, REACH, 113), np.asarray(inside, dtype=np.float64)]))
    nodes, weights = _gauss_legendre()
    half = np.diff(edges)[:, None] / 2
    x = (edges[:-1, None] + half) + half * nodes
    density = half * weights * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x.ravel(), density.ravel()


@functools.cache
def _gauss_legendre() -> tuple[Array, Array]:
    nodes, weights = np.polynomial.legendre.leggauss(16)
    return nodes, weights
