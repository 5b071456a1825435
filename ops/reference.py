"""The definition of every activation family in plain torch, at any dtype: what every kernel is tested against.

`evaluate` is differentiable any number of times, and is what runs where no kernel can be compiled. Parameters come
*packed*: `[groups, count]` float64, in the order that each formula below names. Half precision is computed in float32
(what has higher powers in float64) and rounded once.
"""

# ruff: noqa: ARG001, ARG005 (all formulas have one signature)

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polytrope.ops.families import Family, Formula

Numbers = Sequence[Tensor]


def hermite_to_monomial(degree: int) -> Tensor:
    """`[degree + 1, degree + 1]` float64: row k holds He_k(x) / k! in powers of x (probabilists' Hermite polynomials).

    He_{k+1} = x He_k - k He_{k-1}.
    """
    rows = _three_term_rows(degree, lambda k: (1.0, 0.0, float(k)))
    return rows / torch.tensor([math.factorial(k) for k in range(degree + 1)], dtype=torch.float64)[:, None]


def chebyshev_to_monomial(degree: int) -> Tensor:
    """`[degree + 1, degree + 1]` float64: row k holds T_k(x) in powers of x. T_{k+1} = 2 x T_k - T_{k-1}."""
    return _three_term_rows(degree, lambda k: (1.0 if k == 0 else 2.0, 0.0, 1.0))


def legendre_to_monomial(degree: int) -> Tensor:
    """`[degree + 1, degree + 1]` float64: row k holds P_k(x). (k+1) P_{k+1} = (2k+1) x P_k - k P_{k-1}."""
    return _three_term_rows(degree, lambda k: ((2 * k + 1) / (k + 1), 0.0, k / (k + 1)))


def _three_term_rows(degree: int, recurrence: Callable[[int], tuple[float, float, float]]) -> Tensor:
    """Rows of p_{k+1} = (a x + b) p_k - c p_{k-1}, p_0 = 1, in powers of x."""
    rows = torch.zeros(degree + 1, degree + 1, dtype=torch.float64)
    rows[0, 0] = 1.0
    for k in range(degree):
        a, b, c = recurrence(k)
        rows[k + 1, 1:] += a * rows[k, :-1]
        rows[k + 1] += b * rows[k]
        if k > 0:
            rows[k + 1] -= c * rows[k - 1]
    return rows


BASES: dict[str, Callable[[int], Tensor]] = {
    "hermite": hermite_to_monomial,
    "chebyshev": chebyshev_to_monomial,
    "legendre": legendre_to_monomial,
}


def _horner(x: Tensor, powers: Numbers) -> Tensor:
    value = powers[-1] * torch.ones_like(x)
    for power in reversed(powers[:-1]):
        value = value * x + power
    return value


def _derived(powers: Numbers) -> list[Tensor]:
    return [k * power for k, power in enumerate(powers)][1:] or [torch.zeros_like(powers[0])]


def polynomial(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """sum_k p[k] x^k, k = 0…n, by Horner's rule."""
    return _horner(x, p)


def polynomial_slope(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """Derivative of `polynomial`."""
    return _horner(x, _derived(p))


def _series(x: Tensor, p: Numbers, a: Callable[[int], float], c: Callable[[int], float]) -> Tensor:
    """sum_k p[k] B_k(x) with B_{k+1} = a_k x B_k - c_k B_{k-1}, by Clenshaw's rule; ±∞ where that overflows."""
    following = p[-1] * torch.ones_like(x)
    after = torch.zeros_like(x)
    for k in range(len(p) - 2, -1, -1):
        following, after = a(k) * x * following + p[k] - c(k + 1) * after, following
    leading = p[-1] * (x if len(p) % 2 == 0 else x.abs())
    overflown = following.isnan()  # the factor is not inf elsewhere, where its gradient would be 0 · inf
    return torch.where(overflown, leading * torch.where(overflown, math.inf, 1.0), following)


def hermite(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """sum_k p[k] He_k(x) / k! (probabilists' Hermite polynomials)."""
    return _series(x, p, lambda k: 1 / (k + 1), lambda k: 1 / (k + 1))


def hermite_slope(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """Derivative of `hermite`: (He_k / k!)' = He_{k-1} / (k-1)!"""
    return hermite(x, p[1:], n - 1)


def chebyshev(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """sum_k p[k] T_k(x)."""
    return _series(x, p, lambda k: 1.0 if k == 0 else 2.0, lambda k: 1.0)


def chebyshev_slope(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """Derivative of `chebyshev`: T'_k = 2k (T_{k-1} + T_{k-3} + …), where T_0 counts half."""
    derived = [sum(((1 if i == 0 else 2) * k * p[k] for k in range(i + 1, n + 1, 2)), 0 * p[0]) for i in range(n)]
    return chebyshev(x, derived, n - 1)


def legendre(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """sum_k p[k] P_k(x)."""
    return _series(x, p, lambda k: (2 * k + 1) / (k + 1), lambda k: k / (k + 1))


def legendre_slope(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """Derivative of `legendre`: P'_k = (2k-1) P_{k-1} + (2k-5) P_{k-3} + …"""
    derived = [sum(((2 * i + 1) * p[k] for k in range(i + 1, n + 1, 2)), 0 * p[0]) for i in range(n)]
    return legendre(x, derived, n - 1)


def fourier(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """bias + sum_k A[k] cos(w[k] x - φ[k]); packed: bias, A[n], w[n], φ[n]."""
    value = p[0] * torch.ones_like(x)
    for k in range(1, n + 1):
        value = value + p[k] * torch.cos(p[n + k] * x - p[2 * n + k])
    return value


def fourier_slope(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """Derivative of `fourier`."""
    value = torch.zeros_like(x)
    for k in range(1, n + 1):
        value = value - p[k] * p[n + k] * torch.sin(p[n + k] * x - p[2 * n + k])
    return value


def harmonic(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """bias + sum_k (α[k] cos(k w x) + β[k] sin(k w x)); packed: bias, w, α[n], β[n]."""
    value = p[0] * torch.ones_like(x)
    for k in range(1, n + 1):
        angle = k * (p[1] * x)
        value = value + p[1 + k] * torch.cos(angle) + p[1 + n + k] * torch.sin(angle)
    return value


def harmonic_slope(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """Derivative of `harmonic`."""
    value = torch.zeros_like(x)
    for k in range(1, n + 1):
        angle = k * (p[1] * x)
        value = value + k * p[1] * (p[1 + n + k] * torch.cos(angle) - p[1 + k] * torch.sin(angle))
    return value


def tropical(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """(√2 / n) max_k (k x + p[k]), k = 0…n; the lowest k wins a tie, and F(-∞) = √2 p[0] / n."""
    inside = torch.where(x > 1e30, 1e30, x).detach()  # beyond, lines overflow and would tie
    best, slope, intercept = p[0] + torch.zeros_like(x), torch.zeros_like(x), p[0] + torch.zeros_like(x)
    for k in range(1, n + 1):
        line = k * inside + p[k]
        above = line > best
        best = torch.where(above, line, best)
        slope, intercept = torch.where(above, float(k), slope), torch.where(above, p[k], intercept)
    missing = _nan_among(p)
    # Where the line is flat, ±inf is as good as 0.
    level = torch.where((slope == 0) & torch.isinf(x), torch.zeros_like(x), x)
    value = (slope * level + intercept) * (math.sqrt(2.0) / n * missing)
    return torch.where(torch.isnan(x), x, value)


def _nan_among(numbers: Numbers) -> Tensor:
    """1, or NaN where one of these is, which a maximum would pass over."""
    missing = functools.reduce(torch.logical_or, [torch.isnan(number) for number in numbers])
    return torch.where(missing, math.nan, torch.ones_like(numbers[0].detach()))


def _maximum_of_lines(x: Tensor, slopes: Numbers, intercepts: Numbers) -> Tensor:
    best = slopes[0] * x + intercepts[0]
    for slope, intercept in zip(slopes[1:], intercepts[1:], strict=True):
        line = slope * x + intercept
        best = torch.where(line > best, line, best)
    return best


def tropical_rational(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """max_k (p[k] x + c[k]) - max_k (q[k] x + d[k]), k = 0…n; packed: p, c, q, d. The lowest k wins a tie.

    Beyond ±1e30 it goes on linearly, so that F(±∞) is ±∞ or a finite number.
    """
    count = n + 1
    groups = [p[i * count : (i + 1) * count] for i in range(4)]
    inside = torch.where(x > 1e30, 1e30, torch.where(x < -1e30, -1e30, x))
    value = _maximum_of_lines(inside, groups[0], groups[1]) - _maximum_of_lines(inside, groups[2], groups[3])
    value = value * _nan_among(p)
    far = torch.where(value.abs() > 1e20, value * (x.abs() * 1e-30), value)
    return torch.where(x == inside, value, far)


def rational(x: Tensor, p: Numbers, n: int, m: int) -> Tensor:
    """(sum_k a[k] x^k) / (1 + |sum_j b[j] x^j|), k = 0…n, j = 1…m; packed: a[n + 1], b[m]. It has no poles.

    Computed in float64, whose powers reach further. Where even they would overflow F goes on as its leading terms do,
    which is all that is left of it there; ±∞ too.
    """
    dtype, x, p = x.dtype, x.double(), [number.double() for number in p]
    end = 10.0 ** (280 // max(n, m))
    inside = torch.where(x > end, end, torch.where(x < -end, -end, x))
    value = _horner(inside, p[: n + 1]) / (1 + torch.abs(inside * _horner(inside, p[n + 1 :])))
    is_far = x.abs() > end
    growth = _true_degree(p[: n + 1]) - _true_degree([torch.zeros_like(p[0]), *p[n + 1 :]])
    far = value * torch.where(is_far, x.abs() / end, 1.0) ** growth
    return torch.where(is_far, far, value).to(dtype)


def _true_degree(powers: Numbers) -> Tensor:
    """The degree of a polynomial, without leading zeros."""
    degree = torch.zeros_like(powers[0].detach())
    for k, power in enumerate(powers):
        degree = torch.where(power != 0, float(k), degree)
    return degree


def rational_slope(x: Tensor, p: Numbers, n: int, m: int) -> Tensor:
    """Derivative of `rational`."""
    inner = x * _horner(x, p[n + 1 :])
    inner_slope = _horner(x, _derived([0 * p[0], *p[n + 1 :]]))
    below = 1 + torch.abs(inner)
    value = _horner(x, p[: n + 1]) / below
    return (_horner(x, _derived(p[: n + 1])) - value * torch.sign(inner) * inner_slope) / below


def polyrelu(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """sum_k p[k] max(x, 0)^k (Zhuo et al., "Polynomial composition activations", 2024)."""
    return _horner(torch.relu(x), p)


def polyrelu_slope(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """Derivative of `polyrelu`, 0 at x = 0."""
    return torch.where(x > 0, _horner(torch.relu(x), _derived(p)), torch.zeros_like(x))


def piecewise_linear(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """b[k] + s[k] x on the n pieces between breakpoints t[1] < … < t[n-1]; packed: t[n - 1], b[n], s[n].

    A breakpoint belongs to the piece on its left. Computed in float64, from 0 or the breakpoint nearest to it where all
    lie on one side.
    """
    dtype, x, p = x.dtype, x.double(), [number.double() for number in p]
    breaks, slopes = p[: n - 1], p[2 * n - 1 :]
    anchor = torch.zeros_like(slopes[0]) if n == 1 else torch.minimum(breaks[0].relu(), breaks[-1]).detach()
    intercepts = [
        torch.where(anchor == 0, intercept, intercept + slope * anchor)
        for intercept, slope in zip(p[n - 1 : 2 * n - 1], slopes, strict=True)
    ]
    intercept, slope = intercepts[0] + torch.zeros_like(x), slopes[0] + torch.zeros_like(x)
    for k in range(1, n):
        right = x > breaks[k - 1]
        intercept, slope = torch.where(right, intercepts[k], intercept), torch.where(right, slopes[k], slope)
    flat = (slope == 0) & torch.isinf(x)
    value = torch.where(flat, intercept, slope * torch.where(flat, torch.zeros_like(x), x - anchor) + intercept)
    return value.to(dtype)


def rational_spline(x: Tensor, p: Numbers, n: int, m: int = 0) -> Tensor:
    """S(x) - c x: between two knots S = chord + w s u (p - (p + r) t) / (s + (p + r) u), and lines outside.

    t goes from 0 to 1, u = t (1 - t), w is the width of the piece, s its mean slope, p and r what the slopes at its
    ends are above that: x itself where heights are knots and all slopes 1. Packed: knots[n + 1], heights[n + 1],
    slopes[n + 1], c; a knot belongs to the piece on its left. Computed in float64, as pieces may be narrow, from the
    knot of the piece or from 0, whichever loses less.
    """
    dtype, x, p = x.dtype, x.double(), [number.double() for number in p]
    knots, heights, slopes, line = p[: n + 1], p[n + 1 : 2 * n + 2], p[2 * n + 2 : 3 * n + 3], p[3 * n + 3]
    one, none = torch.ones_like(line), torch.zeros_like(line)

    def row(k: int, chord: Tensor, length: Tensor, *own: Tensor) -> list[Tensor]:
        """Of a line through a knot: its value at an anchor, its slope, the anchor, the knot; and what follows."""
        steep, there = chord - line, heights[k] - line * knots[k]
        reach = torch.maximum(knots[k].abs(), (knots[k] + length).abs())
        from_zero = (heights[k] - chord * knots[k]).abs() + steep.abs() * reach
        loses_nothing = from_zero <= (there.abs() + steep.abs() * length) * (1 + 1e-9)  # equal where it is x itself
        anchor = torch.where(loses_nothing, none, knots[k])
        level = torch.where(loses_nothing, heights[k] - chord * knots[k], there)
        return [level, steep, anchor, knots[k], *own]

    found = [part + torch.zeros_like(x) for part in row(0, slopes[0], none, one, one, none, none)]
    for k in range(n + 1):
        if k < n:
            width = knots[k + 1] - knots[k]
            mean = (heights[k + 1] - heights[k]) / width
            left = slopes[k] - mean
            following = row(k, mean, width, width, mean, left, left + slopes[k + 1] - mean)
        else:
            following = row(n, slopes[n], none, one, one, none, none)
        beyond = x > knots[k]
        found = [torch.where(beyond, new, old) for new, old in zip(following, found, strict=True)]
    level, slope, anchor, knot, width, mean, left, bend = found
    inside = torch.where(x < knots[0], knots[0], torch.where(x > knots[n], knots[n], x))
    t = (inside - knot) / width
    u = t * (1 - t)
    along = torch.where((slope == 0) & torch.isinf(x), torch.zeros_like(x), x - anchor)
    value = level + slope * along + width * mean * u * (left - bend * t) / (mean + bend * u)
    return value.to(dtype)


FORMULAS: dict[Family, Callable[[Tensor, Numbers, int, int], Tensor]] = {
    Family.POLYNOMIAL: polynomial,
    Family.HERMITE: hermite,
    Family.CHEBYSHEV: chebyshev,
    Family.LEGENDRE: legendre,
    Family.FOURIER: fourier,
    Family.HARMONIC: harmonic,
    Family.TROPICAL: tropical,
    Family.TROPICAL_RATIONAL: tropical_rational,
    Family.RATIONAL: rational,
    Family.POLYRELU: polyrelu,
    Family.PIECEWISE_LINEAR: piecewise_linear,
    Family.RATIONAL_SPLINE: rational_spline,
}
IN_FLOAT64 = (Family.PIECEWISE_LINEAR, Family.RATIONAL_SPLINE)  # pieces may be narrow, and far from 0
SLOPES: dict[Family, Callable[[Tensor, Numbers, int, int], Tensor]] = {
    Family.POLYNOMIAL: polynomial_slope,
    Family.HERMITE: hermite_slope,
    Family.CHEBYSHEV: chebyshev_slope,
    Family.LEGENDRE: legendre_slope,
    Family.FOURIER: fourier_slope,
    Family.HARMONIC: harmonic_slope,
    Family.RATIONAL: rational_slope,
    Family.POLYRELU: polyrelu_slope,
}


def evaluate(x: Tensor, parameters: Tensor, formula: Formula) -> Tensor:
    """The activation of x; dtype of x.

    Args:
        x: any shape; with `gated`, the last dimension holds the activated half and the factor.
        parameters: `[groups, parameter_count(formula)]`; groups divide the size of `formula.dim`.
    """
    if formula.family == Family.POLYNORM:
        return polynorm(x, parameters[0], formula.epsilon)
    compute = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    argument, factor = x.chunk(2, dim=-1) if formula.gated else (x, None)
    wide = argument.to(compute)
    groups = len(parameters)
    shaped = parameters if formula.family in IN_FLOAT64 else parameters.to(compute)
    if groups == 1:
        numbers = list(shaped[0].unbind())
    else:
        trailing = -formula.dim
        wide = wide.unflatten(formula.dim, (groups, wide.shape[formula.dim] // groups))
        numbers = list(shaped.reshape(groups, *[1] * trailing, -1).unbind(-1))
    value = _with_tails(wide, numbers, formula)
    if groups > 1:
        value = value.flatten(formula.dim - 1, formula.dim)
    if factor is not None:
        value = value * factor.to(compute)
    return value.to(x.dtype)


def _with_tails(x: Tensor, numbers: Numbers, formula: Formula) -> Tensor:
    family, n, m = Family(formula.family), formula.degree, formula.second_degree
    shift, scale = formula.variable or (0.0, 1.0)
    rate = 1.0 / scale  # the derivative of the formula's variable by x

    def variable(x: Tensor) -> Tensor:
        return (x - shift) * rate if formula.variable else x

    if not formula.interval:
        return FORMULAS[family](variable(x), numbers, n, m)
    low, high = formula.interval
    inside = torch.where(x < low, low, torch.where(x > high, high, x))
    value = FORMULAS[family](variable(inside), numbers, n, m)
    for end, outside in ((low, x < low), (high, x > high)):
        at = variable(x.new_full((), end))
        beyond = torch.where(outside, x - end, 0.0) * rate  # not 0 · ∞ on the other side
        tangent = FORMULAS[family](at, numbers, n, m) + beyond * SLOPES[family](at, numbers, n, m)
        value = torch.where(outside, tangent, value)
    return value


def polynorm(x: Tensor, parameters: Tensor, epsilon: float) -> Tensor:
    """b + sum_k a_k x^k / √(mean(x^2k) + epsilon), means over the last dimension; `parameters`: b, a_1 … a_n.

    With z = x / s it is z^k / √(mean(z^2k) + epsilon / s^2k), whatever s is: one about as large as the largest element,
    and float64, keep powers in range.
    """
    numbers = parameters.double().unbind()
    largest = x.detach().double().abs().amax(-1, keepdim=True) if x.shape[-1] else x.detach().double()[..., :0]
    size = torch.where((largest > 0) & (largest < math.inf), largest, 1.0)
    z = x.double() / size
    value, power = numbers[0] * torch.ones_like(z), torch.ones_like(z)
    for k, number in enumerate(numbers[1:], 1):
        power = power * z
        mean = power.square().mean(-1, keepdim=True)
        value = value + number * power * torch.rsqrt(mean + epsilon * size ** (-2 * k) if epsilon else mean)
    return value.to(x.dtype)
