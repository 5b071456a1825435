"""The activations as functions: `hermite(x, coefficients)` and its neighbours.

All take float tensors of any shape and strides and return a contiguous tensor of the same dtype; bfloat16 and float16
are computed in float32 and rounded once. Coefficients are `[count]` for one function, or `[groups, count]`: then the
channels of dimension `dim` fall into that many equal groups, each with its own. `interval=(lo, hi)` continues the
function along its tangents outside. With `glu=True` the last dimension holds [a, b], and F(a) · b comes back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from polytrope.ops.families import MAX_DEGREE, MAX_PIECES, Family, Formula
from polytrope.ops.kernels import activate_parts, normalized_powers
from polytrope.ops.packing import PLAIN, Packing

Interval = tuple[float, float]
_SHARES = tuple(1 / math.factorial(k) for k in range(1, MAX_DEGREE + 1))  # of term k


def check_interval(interval: Any) -> Interval | None:
    """`(lo, hi)` as floats with lo < hi, or None.

    Raises:
        ValueError: anything else.
    """
    if interval is None:
        return None
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError):
        raise ValueError(f"interval: expected (lo, hi) or None, got {interval!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"interval: expected finite lo < hi, got ({low}, {high})")
    return low, high


def hermite(
    x: Tensor, coefficients: Tensor, *, dim: int = -1, interval: Interval | None = None, glu: bool = False
) -> Tensor:
    """sum_k coefficients[k] He_k(x) / k!, probabilists' Hermite polynomials; coefficients `[(groups,) degree + 1]`."""
    return _series(Family.HERMITE, x, coefficients, dim, interval, glu)


def chebyshev(
    x: Tensor, coefficients: Tensor, *, dim: int = -1, interval: Interval | None = None, glu: bool = False
) -> Tensor:
    """sum_k coefficients[k] T_k(x), Chebyshev polynomials of the first kind; coefficients `[(groups,) degree + 1]`."""
    return _series(Family.CHEBYSHEV, x, coefficients, dim, interval, glu)


def legendre(
    x: Tensor, coefficients: Tensor, *, dim: int = -1, interval: Interval | None = None, glu: bool = False
) -> Tensor:
    """sum_k coefficients[k] P_k(x), Legendre polynomials; coefficients `[(groups,) degree + 1]`."""
    return _series(Family.LEGENDRE, x, coefficients, dim, interval, glu)


def polynomial(
    x: Tensor, coefficients: Tensor, *, dim: int = -1, interval: Interval | None = None, glu: bool = False
) -> Tensor:
    """sum_k coefficients[k] x^k; coefficients `[(groups,) degree + 1]`."""
    return _series(Family.POLYNOMIAL, x, coefficients, dim, interval, glu)


def polyrelu(
    x: Tensor, coefficients: Tensor, *, dim: int = -1, interval: Interval | None = None, glu: bool = False
) -> Tensor:
    """sum_k coefficients[k] max(x, 0)^k; coefficients `[(groups,) degree + 1]`."""
    return _series(Family.POLYRELU, x, coefficients, dim, interval, glu)


def tropical(x: Tensor, coefficients: Tensor, *, dim: int = -1, glu: bool = False) -> Tensor:
    """(√2 / degree) max_k (k x + coefficients[k]); the lowest k wins a tie. coefficients `[(groups,) degree + 1]`."""
    return _series(Family.TROPICAL, x, coefficients, dim, None, glu)


def favard(
    x: Tensor,
    coefficients: Tensor,
    scales: Tensor,
    shifts: Tensor,
    couplings: Tensor,
    *,
    dim: int = -1,
    interval: Interval | None = None,
    glu: bool = False,
) -> Tensor:
    """sum_k coefficients[k] B_k(x) with B_{k+1} = (scales[k] x + shifts[k]) B_k - couplings[k] B_{k-1}, all learnable.

    By Favard's theorem every sequence of orthogonal polynomials is of this form. coefficients `[(groups,) degree + 1]`,
    the others `[(groups,) degree]`; couplings[0] has no effect.
    """
    weights, scale, shift, coupling = (_rows(tensor) for tensor in (coefficients, scales, shifts, couplings))
    degree = weights.shape[-1] - 1
    for name, tensor in (("scales", scale), ("shifts", shift), ("couplings", coupling)):
        if tensor.shape[-1] != degree:
            raise ValueError(
                f"{name}: expected {degree} per group for {degree + 1} coefficients, got {tensor.shape[-1]}"
            )
    wide = torch.float64
    weights, scale, shift, coupling = weights.to(wide), scale.to(wide), shift.to(wide), coupling.to(wide)
    now = torch.nn.functional.pad(torch.ones_like(weights[:, :1]), (0, degree))
    before = torch.zeros_like(now)
    powers = weights[:, :1] * now
    for k in range(degree):
        times_x = torch.nn.functional.pad(now[:, :-1], (1, 0))
        now, before = scale[:, k : k + 1] * times_x + shift[:, k : k + 1] * now - coupling[:, k : k + 1] * before, now
        powers = powers + weights[:, k + 1 : k + 2] * now
    return _series(Family.POLYNOMIAL, x, powers, dim, interval, glu)


def fourier(
    x: Tensor,
    bias: Tensor,
    amplitudes: Tensor,
    frequencies: Tensor,
    phases: Tensor,
    *,
    dim: int = -1,
    interval: Interval | None = None,
    glu: bool = False,
) -> Tensor:
    """bias + sum_k amplitudes[k] cos(frequencies[k] x - phases[k]) / k!, k = 1…degree.

    bias `[]` or `[groups]`; amplitudes, frequencies and phases `[(groups,) degree]`.
    """
    degree = amplitudes.shape[-1]
    _check_counts(degree, frequencies=frequencies, phases=phases)
    packing = Packing(1, (1.0, *_SHARES[:degree], *[1.0] * (2 * degree)))
    parts = (bias, amplitudes, frequencies, phases)
    return _apply(Formula(Family.FOURIER, degree), x, parts, packing, dim, interval, glu)


def harmonic(
    x: Tensor,
    bias: Tensor,
    frequency: Tensor,
    cosines: Tensor,
    sines: Tensor,
    *,
    dim: int = -1,
    interval: Interval | None = None,
    glu: bool = False,
) -> Tensor:
    """bias + sum_k (cosines[k] cos(k w x) + sines[k] sin(k w x)) / k!, k = 1…degree, w = frequency.

    A single sine and cosine is computed for any degree.

    bias and frequency `[]` or `[groups]`; cosines and sines `[(groups,) degree]`.
    """
    degree = cosines.shape[-1]
    _check_counts(degree, sines=sines)
    packing = Packing(2, (1.0, 1.0, *_SHARES[:degree] * 2))
    parts = (bias, frequency, cosines, sines)
    return _apply(Formula(Family.HARMONIC, degree), x, parts, packing, dim, interval, glu)


def tropical_rational(
    x: Tensor,
    numerator_slopes: Tensor,
    numerator_intercepts: Tensor,
    denominator_slopes: Tensor,
    denominator_intercepts: Tensor,
    *,
    dim: int = -1,
    glu: bool = False,
) -> Tensor:
    """max_k (p_k x + c_k) - max_k (q_k x + d_k); the lowest k wins a tie. All parameters `[(groups,) degree + 1]`."""
    count = numerator_slopes.shape[-1]
    _check_counts(
        count,
        numerator_intercepts=numerator_intercepts,
        denominator_slopes=denominator_slopes,
        denominator_intercepts=denominator_intercepts,
    )
    parts = (numerator_slopes, numerator_intercepts, denominator_slopes, denominator_intercepts)
    return _apply(Formula(Family.TROPICAL_RATIONAL, count - 1), x, parts, PLAIN, dim, None, glu)


def rational(
    x: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    *,
    dim: int = -1,
    interval: Interval | None = None,
    glu: bool = False,
) -> Tensor:
    """(sum_k numerator[k] x^k) / (1 + |sum_j denominator[j] x^(j+1)|): no poles.

    numerator `[(groups,) p + 1]`, denominator `[(groups,) q]`.
    """
    if denominator.shape[-1] == 0:
        return polynomial(x, numerator, dim=dim, interval=interval, glu=glu)
    formula = Formula(Family.RATIONAL, numerator.shape[-1] - 1, denominator.shape[-1])
    _check_degree("denominator", formula.second_degree)
    return _apply(formula, x, (numerator, denominator), PLAIN, dim, interval, glu)


def piecewise_linear(x: Tensor, knots: Tensor, values: Tensor, *, dim: int = -1, glu: bool = False) -> Tensor:
    """Lines through (knots[k], values[k]), the first and the last going on outside.

    knots `[pieces + 1]`, rising, the same for all groups; values `[(groups,) pieces + 1]`. The knots get no gradient.
    """
    pieces = knots.shape[-1] - 1
    if not 1 <= pieces <= MAX_PIECES:
        raise ValueError(f"knots: expected 2 to {MAX_PIECES + 1}, got {pieces + 1}")
    heights = _rows(values).double()
    if heights.shape[-1] != pieces + 1:
        raise ValueError(f"values: expected {pieces + 1} per group for {pieces + 1} knots, got {heights.shape[-1]}")
    places = knots.detach().double()
    slopes = heights.diff(dim=-1) / places.diff()
    intercepts = heights[:, :-1] - slopes * places[:-1]
    packed = torch.cat([places[1:-1].expand(len(heights), -1), intercepts, slopes], dim=-1)
    return _apply(Formula(Family.PIECEWISE_LINEAR, pieces), x, (packed,), PLAIN, dim, None, glu)


def polynorm(x: Tensor, coefficients: Tensor, bias: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """bias + sum_k coefficients[k] x^k / rms(x^k), k = 1…degree, root mean squares over the last dimension of x.

    coefficients `[degree]`, bias `[]`; epsilon is added to the mean squares (Zhuo et al., 2024).
    """
    _check_float(x)
    if coefficients.dim() != 1:
        raise ValueError(f"coefficients: expected [degree], got {list(coefficients.shape)}")
    _check_degree("coefficients", len(coefficients))
    if x.dim() == 0:
        raise ValueError("x: polynorm needs at least one dimension, got a scalar")
    return normalized_powers(x, torch.cat([bias.reshape(1), coefficients]).double(), epsilon)


def _series(family: Family, x: Tensor, rows: Tensor, dim: int, interval: Interval | None, glu: bool) -> Tensor:
    degree = rows.shape[-1] - 1 if rows.dim() else 0
    return _apply(Formula(family, degree), x, (rows,), PLAIN, dim, interval, glu)


def _rows(tensor: Tensor) -> Tensor:
    if tensor.dim() not in (1, 2):
        raise ValueError(f"coefficients: expected [count] or [groups, count], got {list(tensor.shape)}")
    return tensor if tensor.dim() == 2 else tensor.unsqueeze(0)


def _check_counts(count: int, **parts: Tensor) -> None:
    for name, tensor in parts.items():
        if tensor.shape[-1:] != (count,):
            raise ValueError(f"{name}: expected {count} per group, got {list(tensor.shape)}")


def _check_degree(name: str, degree: int) -> None:
    if not 1 <= degree <= MAX_DEGREE:
        raise ValueError(f"{name}: expected a degree from 1 to {MAX_DEGREE}, got {degree}")


def _check_float(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"activations take float tensors (bfloat16, float16, float32, float64), got {x.dtype}")


def _apply(
    formula: Formula,
    x: Tensor,
    parts: tuple[Tensor, ...],
    packing: Packing,
    dim: int,
    interval: Interval | None,
    glu: bool,
) -> Tensor:
    _check_float(x)
    groups = packing.groups(parts)
    if formula.family != Family.PIECEWISE_LINEAR:
        _check_degree("coefficients", formula.degree)
    if glu:
        if x.dim() == 0 or x.shape[-1] % 2:
            raise ValueError(f"x: with glu the last dimension holds two halves, got shape {list(x.shape)}")
        if groups > 1 and dim not in (-1, x.dim() - 1):
            raise ValueError(f"dim: with glu the groups lie along the last dimension, got {dim}")
    if groups > 1:
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim: expected {-x.dim()}…{x.dim() - 1} for x of shape {list(x.shape)}, got {dim}")
        dim = dim if dim < 0 else dim - x.dim()
        channels = x.shape[dim] // (2 if glu else 1)
        if channels % groups:
            raise ValueError(f"coefficients: {groups} groups do not divide the {channels} channels of dimension {dim}")
    ends = check_interval(interval) or ()
    chosen = formula._replace(interval=ends, dim=dim if groups > 1 else -1, gated=glu)
    return activate_parts(x, parts, packing, chosen)
