"""Initial coefficients, in float64 numpy, which no mode or default of torch reaches.

`variance_preserving`: E[F(x)²] = E[F'(x)²] = 1 for x ~ N(0, 1). Any function G that is not constant can be brought
there by F = s (G + o): s² = 1 / E[G'²] settles the slope, and o² + 2 o E[G] + E[G²] = 1 / s² has a real solution
because Var G ≤ E[G'²] (Poincaré's inequality for the normal distribution). Of its two solutions the smaller |o| is
taken. With an interval, G is what runs: the tangents outside are part of it.
`stable`: the same moments, with signs that make the map of variances contract (`moments.Moments.slope`).
`torchortho`: the published coefficients.
`siren`: sin(30 x). (Sitzmann et al., Implicit Neural Representations with Periodic Activation Functions, 2020)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from polytrope.ops.fitting.curves import Array, Curve, with_tangents
from polytrope.ops.fitting.polynomial import Variable, of_line
from polytrope.ops.moments import gaussian_moments

Ends = tuple[float, float]
SIREN_FREQUENCY = 30.0


def scale_and_offset(
    mean: float, mean_square: float, slope_mean_square: float, *, positive: bool = False
) -> tuple[float, float]:
    """(s, o) such that s (G + o) preserves the variance, for the moments E[G], E[G²], E[G'²].

    Args:
        positive: of the two solutions take the one with E[G + o] ≥ 0, not the one with the smaller |o|.
    """
    scale = 1.0 / math.sqrt(slope_mean_square)
    root = math.sqrt(max(0.0, mean * mean - mean_square + slope_mean_square))
    return scale, (-mean + root if mean >= 0 or positive else -mean - root)


def normalize(
    curve: Curve, interval: Ends | None, kinks: Sequence[float] = (), *, positive: bool = False
) -> tuple[float, float]:
    """`scale_and_offset` of the curve with its tangents outside the interval.

    Raises:
        ValueError: it is constant there.
    """
    if interval is None:
        return scale_and_offset(*gaussian_moments(curve, kinks), positive=positive)
    moments = gaussian_moments(with_tangents(curve, *interval), [*kinks, *interval])
    if moments[2] < 1e-20:
        raise ValueError(f"interval: expected one where the initial function is not constant, got {list(interval)}")
    return scale_and_offset(*moments, positive=positive)


def polynomial(
    name: str, degree: int, init: str, interval: Ends | None = None, variable: Variable | None = None
) -> Array:
    """Initial coefficients `[degree + 1]` of the Hermite, Chebyshev or Legendre basis.

    With the variable (shift, scale) they are of the basis in (x - shift) / scale: the function is the same in any.

    `variance_preserving`: with x ~ N(0, 1) and F = sum a_k He_k / k!, E[F²] = sum a_k² / k! and
    E[F'²] = sum_{k≥1} a_k² / (k-1)!. Take a_k = s for k ≥ 1; then E[F'²] = s² sum_{k<n} 1/k! = 1 gives s, and a_0 with
    a_0² = 1 - s² sum_{1≤k≤n} 1/k! makes E[F²] = 1 as well. The sums differ by 1 - 1/n!, so a_0² = s² (1 - 1/n!) ≥ 0.
    `stable`: the same magnitudes with the signs + + - - + + - - …, on which neither moment depends. The slope of
    q → E[F(√q x)²] at q = 1, which is 1 + sum a_k a_{k+2} / k!, is then 1 - t instead of 1 + t with
    t = s² (√(1 - 1/n!) + sum_{1≤k≤n-2} 1/k!) for n ≥ 2. As n grows, F tends to √2 cos(x - π/4), not exp(x - 1).
    At n = 2 that map has another fixed point at 1 + √8 / 3 = 1.94, and so has that of every quadratic with these
    moments whose map contracts: what fluctuations carry beyond it is lost, unless tangents outside a narrow interval
    move it away (docs/activations/polynomials.md).
    `torchortho`: the published init, all positive with s² = 1/e, which holds in the limit of infinite degree only.
    """
    total = math.e if init == "torchortho" else sum(1.0 / math.factorial(k) for k in range(degree))
    scale = 1.0 / math.sqrt(total)
    hermite = np.full(degree + 1, scale)
    hermite[0] = scale * math.sqrt(1.0 - 1.0 / math.factorial(degree))
    if init == "stable":
        hermite *= np.where(np.arange(degree + 1) % 4 < 2, 1.0, -1.0)
    if interval is not None and init != "torchortho":
        hermite = _with_tails(hermite / scale, interval)
    if name == "hermite" and variable is None:
        return hermite
    # The same function in the other basis: its moments do not depend on the basis.
    powers = hermite @ to_powers("hermite", degree)
    if variable is not None:
        powers = np.array(of_line(powers, *variable))
    solution: Array = np.linalg.solve(to_powers(name, degree).T, powers)
    return solution


def _with_tails(shape: Array, interval: Ends) -> Array:
    """Hermite coefficients s (shape + o) that preserve the variance with tangents outside the interval.

    E[G] is 0 without tails and of either sign with them; F's mean is positive, as without.
    """
    factorials = np.array([math.factorial(k) for k in range(len(shape))], dtype=np.float64)
    series = np.polynomial.HermiteE(np.concatenate([[0.0], shape[1:]]) / factorials)
    derived = series.deriv()
    scale, offset = normalize(lambda x: (series(x), derived(x)), interval, positive=True)
    return scale * np.concatenate([[offset], shape[1:]])


@functools.cache
def to_powers(name: str, degree: int) -> Array:
    """`[degree + 1, degree + 1]`, to be read only: row k holds He_k / k!, T_k or P_k in powers of x."""
    convert, shares = {
        "hermite": (np.polynomial.hermite_e.herme2poly, [1 / math.factorial(k) for k in range(degree + 1)]),
        "chebyshev": (np.polynomial.chebyshev.cheb2poly, [1.0] * (degree + 1)),
        "legendre": (np.polynomial.legendre.leg2poly, [1.0] * (degree + 1)),
    }[name]
    rows = np.zeros((degree + 1, degree + 1))
    for k, share in enumerate(shares):
        row = share * convert(np.eye(k + 1)[k])
        rows[k, : len(row)] = row
    rows.flags.writeable = False
    return rows


def to_hermite(powers: Array) -> Array:
    """Coefficients of He_k / k! for those of 1, x, x², …"""
    hermite: Array = np.linalg.solve(to_powers("hermite", len(powers) - 1).T, powers)
    return hermite


def recurrence(name: str, degree: int) -> tuple[Array, Array]:
    """(scales, couplings) `[degree]`: B_{k+1} = scales[k] x B_k - couplings[k] B_{k-1} of a basis."""
    k = np.arange(degree, dtype=np.float64)
    if name == "hermite":  # of He_k / k!
        return 1 / (k + 1), 1 / (k + 1)
    if name == "chebyshev":
        return np.where(k == 0, 1.0, 2.0), np.ones_like(k)
    return (2 * k + 1) / (k + 1), k / (k + 1)


def fourier(degree: int, init: str, interval: Ends | None = None) -> tuple[float, float]:
    """(bias, amplitude) of bias + amplitude sum_k cos(k x - π/4) / k!.

    At the phase π/4, E[cos(jx-φ) cos(kx-φ)] = E[sin(jx-φ) sin(kx-φ)] = exp(-(j-k)²/2) / 2 and
    E[cos(kx-φ)] = exp(-k²/2) / √2. `torchortho`: amplitude 1/√I_0(2), bias amplitude √(1 - 1/n!²).
    """
    factorials = np.array([math.factorial(k) for k in range(1, degree + 1)], dtype=np.float64)
    if init == "torchortho":
        amplitude = 1.0 / math.sqrt(float(np.i0(2.0)))
        return amplitude * math.sqrt(1.0 - 1.0 / factorials[-1] ** 2), amplitude
    k = np.arange(1, degree + 1, dtype=np.float64)
    if interval is not None:

        def curve(x: Array) -> tuple[Array, Array]:
            angle = np.multiply.outer(x, k) - math.pi / 4
            return np.cos(angle) @ (1 / factorials), np.sin(angle) @ (-k / factorials)

        scale, offset = normalize(curve, interval)
        return scale * offset, scale
    gram = 0.5 * np.exp(-0.5 * (k[:, None] - k) ** 2)
    mean = float((np.exp(-0.5 * k * k) / math.sqrt(2.0)) @ (1 / factorials))
    mean_square = float((1 / factorials) @ gram @ (1 / factorials))
    slope_mean_square = float((k / factorials) @ gram @ (k / factorials))
    scale, offset = scale_and_offset(mean, mean_square, slope_mean_square)
    return scale * offset, scale


def tropical(degree: int, init: str) -> Array:
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

    def curve(x: Array) -> tuple[Array, Array]:
        lines = np.multiply.outer(x, k) + intercepts
        best = lines.argmax(axis=1)
        return lines[np.arange(len(x)), best], best.astype(np.float64)

    _, offset = scale_and_offset(*gaussian_moments(curve, list(middle - shift)))
    return intercepts + offset


def tropical_rational(degree: int) -> tuple[Array, Array, Array, Array]:
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

    def curve(x: Array) -> tuple[Array, Array]:
        value, slope = np.zeros_like(x), np.zeros_like(x)
        for sign, (slopes, intercepts) in ((1.0, numerator), (-1.0, denominator)):
            lines = np.multiply.outer(x, slopes) + intercepts
            best = lines.argmax(axis=1)
            value += sign * lines[np.arange(len(x)), best]
            slope += sign * slopes[best]
        return value, slope

    scale, offset = scale_and_offset(*gaussian_moments(curve, kinks))
    return scale * numerator[0], scale * (numerator[1] + offset), scale * denominator[0], scale * denominator[1]


def rational(numerator_degree: int, denominator_degree: int, interval: Ends | None = None) -> tuple[Array, Array]:
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

    def curve(x: Array) -> tuple[Array, Array]:
        powers = np.polynomial.polynomial
        below = powers.Polynomial(np.concatenate([[1.0], bottom]))
        above = powers.Polynomial(top)
        value = above(x) / below(x)
        return value, (above.deriv()(x) - value * below.deriv()(x)) / below(x)

    scale, offset = normalize(curve, interval)
    top[0] += offset
    if curved:
        top[2] += 0.5 * offset
    return scale * top, bottom


def polyrelu(degree: int, interval: Ends | None = None) -> Array:
    """Coefficients `[degree + 1]`: s (sum_k max(x, 0)^k / k! + o)."""
    series = np.array([0.0] + [1.0 / math.factorial(k) for k in range(1, degree + 1)])
    polynomial_ = np.polynomial.polynomial.Polynomial(series)

    def curve(x: Array) -> tuple[Array, Array]:
        return polynomial_(np.maximum(x, 0.0)), np.where(x > 0, polynomial_.deriv()(x), 0.0)

    scale, offset = normalize(curve, interval, [0.0])
    series[0] = offset
    return scale * series


def polynorm(degree: int) -> tuple[Array, float]:
    """Coefficients `[degree]` of x^k / rms(x^k), all equal, and the bias: exact for infinitely long rows of N(0, 1)."""
    k = range(1, degree + 1)
    sizes = polynorm_sizes(degree)
    cross = np.array([[_gaussian_power(i + j) for j in k] for i in k]) / np.outer(sizes, sizes)
    slopes = np.array([[i * j * _gaussian_power(i + j - 2) for j in k] for i in k]) / np.outer(sizes, sizes)
    mean = float(sum(_gaussian_power(power) / size for power, size in zip(k, sizes, strict=True)))
    scale, offset = scale_and_offset(mean, float(cross.sum()), float(slopes.sum()))
    return np.full(degree, scale), scale * offset


def polynorm_sizes(degree: int) -> Array:
    """rms(x^k), k = 1…degree, of an infinitely long row of N(0, 1)."""
    return np.array([math.sqrt(_gaussian_power(2 * power)) for power in range(1, degree + 1)])


def _gaussian_power(power: int) -> float:
    """E[x^power] under N(0, 1)."""
    return 0.0 if power % 2 else float(math.prod(range(1, power, 2)))


def piecewise_linear(knots: Array) -> Array:
    """Values at the knots: GELU there, joined by lines, brought to variance 1."""
    gelu = np.array([0.5 * knot * (1 + math.erf(knot / math.sqrt(2))) for knot in knots])

    def curve(x: Array) -> tuple[Array, Array]:
        piece = np.clip(np.searchsorted(knots, x, side="left") - 1, 0, len(knots) - 2)
        slope = (np.diff(gelu) / np.diff(knots))[piece]
        return gelu[piece] + slope * (x - knots[piece]), slope

    scale, offset = normalize(curve, (float(knots[0]), float(knots[-1])), list(knots))
    return scale * (gelu + offset)


def composition(degree: int, center: float, half: float, gate: bool) -> Array:
    """Chebyshev coefficients `[degree + 1]` in u = (x - center) / half, for the last polynomial of a composition.

    The others start as u; this one as the Hermite start of degree 3 at most. With a gate F(x) = x: both moments are 1.
    """
    start = np.zeros(degree + 1)
    if gate:
        start[0] = 1.0
        return start
    order = min(degree, 3)
    powers = polynomial("hermite", order, "variance_preserving") @ to_powers("hermite", order)
    start[: order + 1] = np.linalg.solve(to_powers("chebyshev", order).T, np.array(of_line(powers, center, half)))
    return start
