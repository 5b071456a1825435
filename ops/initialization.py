"""Initial coefficients with E[F(x)²] = E[F'(x)²] = 1 for x ~ N(0, 1) (`variance_preserving`), and the published ones.

Any function G that is not constant can be brought there by F = s (G + o): s² = 1 / E[G'²] settles the slope, and
o² + 2 o E[G] + E[G²] = 1 / s² has a real solution because Var G ≤ E[G'²] (Poincaré's inequality for the normal
distribution). Of its two solutions the smaller |o| is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytrope.ops import reference

Curve = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # x -> G(x), G'(x)


def gaussian_moments(curve: Curve, kinks: Sequence[float] = ()) -> tuple[float, float, float]:
    """E[G], E[G²], E[G'²] under N(0, 1), by 16-point Gauss-Legendre quadrature on panels that end at the kinks."""
    edges = np.unique(np.concatenate([np.linspace(-14.0, 14.0, 113), np.asarray(kinks, dtype=np.float64)]))
    nodes, weights = np.polynomial.legendre.leggauss(16)
    half = np.diff(edges)[:, None] / 2
    x = (edges[:-1, None] + half) + half * nodes
    density = half * weights * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    value, slope = curve(x.ravel())
    density = density.ravel()
    return float(density @ value), float(density @ value**2), float(density @ slope**2)


def scale_and_offset(mean: float, mean_square: float, slope_mean_square: float) -> tuple[float, float]:
    """(s, o) such that s (G + o) preserves the variance, for the moments E[G], E[G²], E[G'²]."""
    scale = 1.0 / math.sqrt(slope_mean_square)
    root = math.sqrt(max(0.0, mean * mean - mean_square + slope_mean_square))
    return scale, (-mean + root if mean >= 0 else -mean - root)


def polynomial(name: str, degree: int, init: str) -> Tensor:
    """Initial coefficients `[degree + 1]`, float64, of a basis of `reference.BASES`.

    `variance_preserving`: with x ~ N(0, 1) and F = sum a_k He_k / k!, E[F²] = sum a_k² / k! and
    E[F'²] = sum_{k≥1} a_k² / (k-1)!. Take a_k = s for k ≥ 1; then E[F'²] = s² sum_{k<n} 1/k! = 1 gives s, and a_0 with
    a_0² = 1 - s² sum_{1≤k≤n} 1/k! makes E[F²] = 1 as well. The sums differ by 1 - 1/n!, so a_0² = s² (1 - 1/n!) ≥ 0.
    `torchortho`: the published init, the same with s² = 1/e, which holds in the limit of infinite degree only.
    """
    total = sum(1.0 / math.factorial(k) for k in range(degree)) if init == "variance_preserving" else math.e
    scale = 1.0 / math.sqrt(total)
    hermite = torch.full((degree + 1,), scale, dtype=torch.float64)
    hermite[0] = scale * math.sqrt(1.0 - 1.0 / math.factorial(degree))
    if name == "hermite":
        return hermite
    # The same function in the other basis: its variances under N(0, 1) do not depend on the basis.
    powers = hermite @ reference.hermite_to_monomial(degree)
    solution: Tensor = torch.linalg.solve(reference.BASES[name](degree).T, powers)
    return solution


def recurrence(name: str, degree: int) -> tuple[Tensor, Tensor]:
    """(scales, couplings) `[degree]`, float64: B_{k+1} = scales[k] x B_k - couplings[k] B_{k-1} of a basis."""
    k = torch.arange(degree, dtype=torch.float64)
    if name == "hermite":  # of He_k / k!
        return 1 / (k + 1), 1 / (k + 1)
    if name == "chebyshev":
        return torch.where(k == 0, 1.0, 2.0).double(), torch.ones_like(k)
    return (2 * k + 1) / (k + 1), k / (k + 1)


def fourier(degree: int, init: str) -> tuple[float, float]:
    """(bias, amplitude) of bias + amplitude sum_k cos(k x - π/4) / k!.

    At the phase π/4, E[cos(jx-φ) cos(kx-φ)] = E[sin(jx-φ) sin(kx-φ)] = exp(-(j-k)²/2) / 2 and
    E[cos(kx-φ)] = exp(-k²/2) / √2. `torchortho`: amplitude 1/√I_0(2), bias amplitude √(1 - 1/n!²).
    """
    factorials = np.array([math.factorial(k) for k in range(1, degree + 1)], dtype=np.float64)
    if init == "torchortho":
        amplitude = 1.0 / math.sqrt(float(np.i0(2.0)))
        return amplitude * math.sqrt(1.0 - 1.0 / factorials[-1] ** 2), amplitude
    k = np.arange(1, degree + 1, dtype=np.float64)
    gram = 0.5 * np.exp(-0.5 * (k[:, None] - k) ** 2)
    mean = float((np.exp(-0.5 * k * k) / math.sqrt(2.0)) @ (1 / factorials))
    mean_square = float((1 / factorials) @ gram @ (1 / factorials))
    slope_mean_square = float((k / factorials) @ gram @ (k / factorials))
    scale, offset = scale_and_offset(mean, mean_square, slope_mean_square)
    return scale * offset, scale


def tropical(degree: int, init: str) -> np.ndarray:
    """Intercepts `[degree + 1]` of (√2 / n) max_k (k x + c_k). `torchortho`: all 1.

    With equal intercepts only the lines 0 and n are ever the largest, and the others never learn. So
    c_k = k t - k² / n + o: line k is the largest between (2k - 1) / n - t and (2k + 1) / n - t. The slope's mean square
    rises with t from 0 to n²; bisection finds the t where it is n² / 2, and o settles E[F²].
    """
    if init == "torchortho":
        return np.ones(degree + 1)
    k = np.arange(degree + 1)
    middle = (2 * k[1:] - 1) / degree

    def slope_mean_square(shift: float) -> float:
        beyond = [0.5 * math.erfc(float(kink - shift) / math.sqrt(2.0)) for kink in middle]  # P(slope ≥ k)
        return float((2 * k[1:] - 1) @ beyond)

    low, high = -10.0, 10.0
    for _ in range(100):
        shift = (low + high) / 2
        low, high = (shift, high) if slope_mean_square(shift) < degree**2 / 2 else (low, shift)
    intercepts = k * shift - k**2 / degree

    def curve(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lines = np.multiply.outer(x, k) + intercepts
        best = lines.argmax(axis=1)
        return lines[np.arange(len(x)), best], best.astype(np.float64)

    _, offset = scale_and_offset(*gaussian_moments(curve, list(middle - shift)))
    return intercepts + offset


def tropical_rational(degree: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Slopes and intercepts of numerator and denominator, `[degree + 1]` each: every line is the largest somewhere.

    The numerator's lines touch x²/2, whose envelope they are, at points spread over (-2, 2); the denominator's touch
    x²/8 at points between. Their difference is brought to variance 1 by scaling all and moving the numerator.
    """
    touch = np.linspace(-2.0, 2.0, degree + 1)
    # Slopes k / n · 4 rather than symmetric ones: the numerator rises, so that F is like a rectifier, not even.
    numerator = (touch + 1.0, -0.5 * touch**2)
    inner = touch * (1.0 - 0.5 / degree)
    denominator = (0.25 * inner, -0.125 * inner**2)
    kinks: list[float] = []
    for slopes, intercepts in (numerator, denominator):
        kinks += list(-np.diff(intercepts) / np.diff(slopes))

    def curve(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, slope = np.zeros_like(x), np.zeros_like(x)
        for sign, (slopes, intercepts) in ((1.0, numerator), (-1.0, denominator)):
            lines = np.multiply.outer(x, slopes) + intercepts
            best = lines.argmax(axis=1)
            value += sign * lines[np.arange(len(x)), best]
            slope += sign * slopes[best]
        return value, slope

    scale, offset = scale_and_offset(*gaussian_moments(curve, kinks))
    return scale * numerator[0], scale * (numerator[1] + offset), scale * denominator[0], scale * denominator[1]


def rational(numerator_degree: int, denominator_degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Numerator `[p + 1]` and denominator `[q]`: s (P / (1 + |B|) + o) with B = x²/2 where q ≥ 2, else 0.

    P = x/2 + x²/2 (+ x³/4 where B is there), as far as the degree goes. B is never negative, so that adding o stays in
    the family: the numerator becomes s (P + o (1 + B)).
    """
    top = np.zeros(numerator_degree + 1)
    bottom = np.zeros(denominator_degree)
    curved = denominator_degree >= 2 and numerator_degree >= 2
    for power, value in ((1, 0.5), (2, 0.5), (3, 0.25)):
        if power <= numerator_degree and (power < 3 or curved):
            top[power] = value
    if curved:
        bottom[1] = 0.5

    def curve(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        powers = np.polynomial.polynomial
        below = powers.Polynomial(np.concatenate([[1.0], bottom]))
        above = powers.Polynomial(top)
        value = above(x) / below(x)
        return value, (above.deriv()(x) - value * below.deriv()(x)) / below(x)

    scale, offset = scale_and_offset(*gaussian_moments(curve))
    top[0] += offset
    if curved:
        top[2] += 0.5 * offset
    return scale * top, bottom


def polyrelu(degree: int) -> np.ndarray:
    """Coefficients `[degree + 1]`: s (sum_k max(x, 0)^k / k! + o)."""
    series = np.array([0.0] + [1.0 / math.factorial(k) for k in range(1, degree + 1)])
    polynomial_ = np.polynomial.polynomial.Polynomial(series)
    moments = gaussian_moments(
        lambda x: (polynomial_(np.maximum(x, 0.0)), np.where(x > 0, polynomial_.deriv()(x), 0.0)), [0.0]
    )
    scale, offset = scale_and_offset(*moments)
    series[0] = offset
    return scale * series


def polynorm(degree: int) -> tuple[np.ndarray, float]:
    """Coefficients `[degree]` of x^k / rms(x^k), all equal, and the bias: exact for infinitely long rows of N(0, 1)."""
    k = np.arange(1, degree + 1)
    sizes = np.array([math.sqrt(_gaussian_power(2 * power)) for power in range(1, degree + 1)])
    cross = np.array([[_gaussian_power(i + j) for j in k] for i in k]) / np.outer(sizes, sizes)
    slopes = np.array([[i * j * _gaussian_power(i + j - 2) for j in k] for i in k]) / np.outer(sizes, sizes)
    mean = float(sum(_gaussian_power(int(power)) / size for power, size in zip(k, sizes, strict=True)))
    scale, offset = scale_and_offset(mean, float(cross.sum()), float(slopes.sum()))
    return np.full(degree, scale), scale * offset


def _gaussian_power(power: np.integer[Any] | int) -> float:
    """E[x^power] under N(0, 1)."""
    return 0.0 if power % 2 else float(math.prod(range(1, power, 2)))


def piecewise_linear(knots: np.ndarray) -> np.ndarray:
    """Values at the knots: GELU there, joined by lines, brought to variance 1."""
    gelu = np.array([0.5 * knot * (1 + math.erf(knot / math.sqrt(2))) for knot in knots])

    def curve(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        piece = np.clip(np.searchsorted(knots, x, side="left") - 1, 0, len(knots) - 2)
        slope = (np.diff(gelu) / np.diff(knots))[piece]
        return gelu[piece] + slope * (x - knots[piece]), slope

    scale, offset = scale_and_offset(*gaussian_moments(curve, list(knots)))
    return scale * (gelu + offset)
