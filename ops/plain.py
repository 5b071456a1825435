"""Activations as ordinary tensor operations (add, multiply, clamp, max, cos), for exporters and other runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from polytrope.ops import functional, reference
from polytrope.ops.families import Family
from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.polynomial import of_line
from polytrope.ops.fitting.targets import NAMED

_FAR = 16.0  # beyond it, rational functions are computed in powers of 1/x, as by the kernels


class PlainForm(NamedTuple):
    """An elementwise function of x and of a few constants, for float32.

    Args:
        numbers: the constants by name, float64; they are rounded to float32.
        formula: x, constants → F(x) inside the interval.
        continues: outside the interval of its module, the formula does not hold, and tangents go on.
    """

    numbers: dict[str, Array]
    formula: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    continues: bool


def powers(
    coefficients: Array, interval: tuple[float, float] | None, variable: tuple[float, float] | None = None
) -> PlainForm:
    """sum_k coefficients[k] u^k of the variable u = (x - shift) / scale, x by default.

    In powers of (x - middle) / half of the interval, where float32 loses nothing; without one, of the variable.
    """
    shift, scale = variable or (0.0, 1.0)
    low, high = interval or (shift - scale, shift + scale)
    middle, half = (low + high) / 2, (high - low) / 2
    numbers = {"powers": np.array(of_line(coefficients, (middle - shift) / scale, half / scale))}
    return PlainForm(numbers, partial(_shifted_powers, middle=middle, half=half), interval is not None)


def _shifted_powers(x: Tensor, numbers: Mapping[str, Tensor], middle: float, half: float) -> Tensor:
    return _horner((x - middle) / half, numbers["powers"])


def powers_of_relu(x: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    """sum_k powers[k] max(x, 0)^k."""
    return _horner(torch.relu(x), numbers["powers"])


def quotient(x: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    """(sum_k numerator[k] x^k) / (1 + |sum_j denominator[j] x^(j+1)|), far out in powers of 1/x: none overflows."""
    numerator, denominator = numbers["numerator"], numbers["denominator"]
    n, m = len(numerator) - 1, len(denominator)
    near = x.clamp(-_FAR, _FAR)
    inside = _horner(near, numerator) / (1.0 + (near * _horner(near, denominator)).abs())
    far = torch.where(x.abs() > _FAR, x, torch.full_like(x, _FAR))
    inverse = 1.0 / far
    ratio = _horner(inverse, numerator.flip(0)) / ((inverse**m).abs() + _horner(inverse, denominator.flip(0)).abs())
    scale = far ** (n - m) if n >= m else inverse ** (m - n)  # and x^m / |x|^m
    outside = ratio * (scale * far.sign() if m % 2 else scale)
    return torch.where(x.abs() > _FAR, outside, inside)


def waves(x: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    """bias + sum_k amplitudes[k] cos(frequencies[k] x - phases[k])."""
    angles = x.unsqueeze(-1) * numbers["frequencies"] - numbers["phases"]
    return numbers["bias"] + (numbers["amplitudes"] * torch.cos(angles)).sum(-1)


def largest_line(x: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    """max_k (slopes[k] x + intercepts[k])."""
    return (x.unsqueeze(-1) * numbers["slopes"] + numbers["intercepts"]).max(dim=-1).values


def difference_of_largest_lines(x: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    """`largest_line`, less that of lower_slopes and lower_intercepts."""
    lower = (x.unsqueeze(-1) * numbers["lower_slopes"] + numbers["lower_intercepts"]).max(dim=-1).values
    return largest_line(x, numbers) - lower


def rescaled(base: str, numbers: Mapping[str, Array]) -> PlainForm:
    """gain · f(input_scale · x + input_shift) + offset around the function f of this name."""
    return PlainForm({name: value.reshape(()) for name, value in numbers.items()}, partial(_rescaled, base=base), False)


def _rescaled(x: Tensor, numbers: Mapping[str, Tensor], base: str) -> Tensor:
    return numbers["gain"] * NAMED[base](numbers["input_scale"] * x + numbers["input_shift"]) + numbers["offset"]


def broken_line(knots: Array, heights: Array) -> PlainForm:
    """Lines through (knots[k], heights[k]), the outer ones going on: a line and a bend at each inner knot."""
    slopes = np.diff(heights) / np.diff(knots)
    anchor = np.float32(np.clip(0.0, knots[0], knots[-1])).astype(np.float64)  # far from 0 an offset there is large
    breaks = knots[1:-1].astype(np.float32).astype(np.float64)
    numbers = {
        "anchor": np.array(anchor),
        "offset": np.array(heights[0] + slopes[0] * (anchor - knots[0])),
        "slope": np.array(slopes[0]),
        "breaks": breaks,
        "rests": knots[1:-1] - breaks,
        "changes": np.diff(slopes),
    }
    return PlainForm(numbers, _bent, False)


def _bent(x: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    bent = torch.relu((x.unsqueeze(-1) - numbers["breaks"]) - numbers["rests"]) * numbers["changes"]
    return numbers["offset"] + numbers["slope"] * (x - numbers["anchor"]) + bent.sum(-1)


def apply(
    family: Family,
    x: Tensor,
    parts: tuple[Tensor, ...],
    dim: int,
    interval: tuple[float, float] | None,
    glu: bool,
    epsilon: float = 0.0,
    variable: tuple[float, float] | None = None,
) -> Tensor:
    """What every function of `functional` ends in, without kernels: for a file that does without this package."""
    interval = None if interval is None else (interval[0], interval[1])
    variable = None if variable is None else (variable[0], variable[1])
    shapes = tuple([part.shape for part in parts])
    formula, packing = functional.describe(family, x.dtype, x.shape, shapes, dim, interval, glu, epsilon, variable)
    return reference.evaluate(x, packing.pack(parts, packing.constant(x.device)), formula)


def _horner(x: Tensor, coefficients: Tensor) -> Tensor:
    value = torch.zeros_like(x) + coefficients[-1]
    for index in range(len(coefficients) - 2, -1, -1):
        value = value * x + coefficients[index]
    return value
