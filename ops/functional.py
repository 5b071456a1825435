"""The activations as functions: `hermite(x, coefficients)` and its neighbours.

All take float tensors of any shape and strides and return a dense tensor of the same dtype, its dimensions in memory in
the order of x's (channels_last stays channels_last); bfloat16 and float16 are computed in float32 and rounded once.
Coefficients are `[count]` for one function, or `[groups, count]`: then the channels of dimension `dim` fall into that
many equal groups, each with its own. `interval=(lo, hi)` continues the function along its tangents outside; it is of x,
whatever the variable. `variable=(shift, scale)` makes polynomials those of (x - shift) / scale: on a wide or narrow
interval, or one beside 0, they need coefficients of the size of the function only in such a variable. With `glu=True`
the last dimension holds [a, b], and F(a) · b comes back.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from polytrope.ops import cuda, kernels, native
from polytrope.ops.families import MAX_DEGREE, MAX_PIECES, Family, Formula, largest_degree
from polytrope.ops.packing import PLAIN, Packing

Interval = tuple[float, float]
Variable = tuple[float, float]  # (shift, scale)
_WIDEST = 1e37
_SHARES = tuple(1 / math.factorial(k) for k in range(1, MAX_DEGREE + 1))  # of term k
# Parts that must be equally long: the number of the first one, and their names.
_EQUALLY_LONG: dict[Family, tuple[int, tuple[str, ...]]] = {
    Family.FOURIER: (1, ("amplitudes", "frequencies", "phases")),
    Family.HARMONIC: (2, ("cosines", "sines")),
    Family.TROPICAL_RATIONAL: (
        0,
        ("numerator_slopes", "numerator_intercepts", "denominator_slopes", "denominator_intercepts"),
    ),
    Family.RATIONAL_SPLINE: (0, ("knots", "heights", "slopes")),
}


def check_interval(interval: Any, name: str = "interval") -> Interval | None:
    """`(lo, hi)` as floats with lo < hi, or None.

    Raises:
        ValueError: anything else; names the argument.
    """
    if interval is None:
        return None
    if type(interval) is tuple and len(interval) == 2 and type(interval[0]) is type(interval[1]) is float:
        low, high = interval
        if -math.inf < low < high < math.inf:
            return interval  # as modules give it, in every call
    try:
        low, high = (float(end) for end in interval)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected (lo, hi) or None, got {interval!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{name}: expected finite lo < hi, got ({low}, {high})")
    return low, high


def check_domain(domain: Any) -> Interval:
    """`(lo, hi)` as floats with lo < hi, for what is made for these inputs alone.

    Raises:
        ValueError: anything else, None too.
    """
    ends = check_interval(domain, "domain")
    if ends is None:
        raise ValueError("domain: expected (lo, hi), got None")
    return ends


def check_variable(variable: Any) -> Variable | None:
    """`(shift, scale)` as floats whose size float32 can take, scale > 0 and its inverse too, or None.

    Raises:
        ValueError: anything else.
    """
    if variable is None:
        return None
    try:
        shift, scale = (float(number) for number in variable)
    except (TypeError, ValueError):
        raise ValueError(f"variable: expected (shift, scale) or None, got {variable!r}") from None
    if not (abs(shift) <= _WIDEST and 1 / _WIDEST <= scale <= _WIDEST):
        raise ValueError(
            f"variable: expected a shift of at most {_WIDEST:.0e} and a scale from {1 / _WIDEST:.0e} to {_WIDEST:.0e}, "
            f"got ({shift}, {scale})"
        )
    return shift, scale


def check_input(dtype: torch.dtype, shape: torch.Size, glu: bool, groups: int = 1, dim: int = -1) -> int:
    """Refuse an x of this dtype and shape that no activation takes, in a kernel or written in torch.

    Args:
        groups: of channels that have parameters of their own.
        dim: the dimension of x whose channels these are.

    Returns:
        `dim`, negative; -1 for one group.

    Raises:
        TypeError: no floats.
        ValueError: `glu`, and no two halves along the last dimension; groups that do not divide the channels, or lie
            along a dimension that x has not, or with `glu` along another than the last.
    """
    if dtype not in native.DATA_TYPES:
        raise TypeError(f"activations take float tensors (bfloat16, float16, float32, float64), got {dtype}")
    dims = len(shape)
    if glu and (dims == 0 or shape[-1] % 2):
        raise ValueError(f"x: with glu the last dimension holds two halves, got shape {list(shape)}")
    if groups == 1:
        return -1
    if glu and dim not in (-1, dims - 1):
        raise ValueError(f"dim: with glu the groups lie along the last dimension, got {dim}")
    if not -dims <= dim < dims:
        raise ValueError(f"dim: expected {-dims}…{dims - 1} for x of shape {list(shape)}, got {dim}")
    dim = dim if dim < 0 else dim - dims
    channels = shape[dim] // (2 if glu else 1)
    if channels % groups:
        raise ValueError(f"coefficients: {groups} groups do not divide the {channels} channels of dimension {dim}")
    return dim


def hermite(
    x: Tensor,
    coefficients: Tensor,
    *,
    dim: int = -1,
    interval: Interval | None = None,
    variable: Variable | None = None,
    glu: bool = False,
) -> Tensor:
    """sum_k coefficients[k] He_k(x) / k!, probabilists' Hermite polynomials; coefficients `[(groups,) degree + 1]`."""
    return _apply(Family.HERMITE, x, (coefficients,), dim, interval, glu, variable=variable)


def chebyshev(
    x: Tensor,
    coefficients: Tensor,
    *,
    dim: int = -1,
    interval: Interval | None = None,
    variable: Variable | None = None,
    glu: bool = False,
) -> Tensor:
    """sum_k coefficients[k] T_k(x), Chebyshev polynomials of the first kind; coefficients `[(groups,) degree + 1]`."""
    return _apply(Family.CHEBYSHEV, x, (coefficients,), dim, interval, glu, variable=variable)


def legendre(
    x: Tensor,
    coefficients: Tensor,
    *,
    dim: int = -1,
    interval: Interval | None = None,
    variable: Variable | None = None,
    glu: bool = False,
) -> Tensor:
    """sum_k coefficients[k] P_k(x), Legendre polynomials; coefficients `[(groups,) degree + 1]`."""
    return _apply(Family.LEGENDRE, x, (coefficients,), dim, interval, glu, variable=variable)


def polynomial(
    x: Tensor,
    coefficients: Tensor,
    *,
    dim: int = -1,
    interval: Interval | None = None,
    variable: Variable | None = None,
    glu: bool = False,
) -> Tensor:
    """sum_k coefficients[k] x^k; coefficients `[(groups,) degree + 1]`."""
    return _apply(Family.POLYNOMIAL, x, (coefficients,), dim, interval, glu, variable=variable)


def polyrelu(
    x: Tensor, coefficients: Tensor, *, dim: int = -1, interval: Interval | None = None, glu: bool = False
) -> Tensor:
    """sum_k coefficients[k] max(x, 0)^k; coefficients `[(groups,) degree + 1]`."""
    return _apply(Family.POLYRELU, x, (coefficients,), dim, interval, glu)


def tropical(x: Tensor, coefficients: Tensor, *, dim: int = -1, glu: bool = False) -> Tensor:
    """(√2 / degree) max_k (k x + coefficients[k]); the lowest k wins a tie. coefficients `[(groups,) degree + 1]`."""
    return _apply(Family.TROPICAL, x, (coefficients,), dim, None, glu)


def favard(
    x: Tensor,
    coefficients: Tensor,
    scales: Tensor,
    shifts: Tensor,
    couplings: Tensor,
    *,
    dim: int = -1,
    interval: Interval | None = None,
    variable: Variable | None = None,
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
    return _apply(Family.POLYNOMIAL, x, (powers,), dim, interval, glu, variable=variable)


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
    return _apply(Family.FOURIER, x, (bias, amplitudes, frequencies, phases), dim, interval, glu)


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
    return _apply(Family.HARMONIC, x, (bias, frequency, cosines, sines), dim, interval, glu)


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
    parts = (numerator_slopes, numerator_intercepts, denominator_slopes, denominator_intercepts)
    return _apply(Family.TROPICAL_RATIONAL, x, parts, dim, None, glu)


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
    return _apply(Family.RATIONAL, x, (numerator, denominator), dim, interval, glu)


def piecewise_linear(x: Tensor, knots: Tensor, values: Tensor, *, dim: int = -1, glu: bool = False) -> Tensor:
    """Lines through (knots[k], values[k]), the first and the last going on outside.

    knots `[pieces + 1]`, rising, the same for all groups; values `[(groups,) pieces + 1]`. The knots get no gradient.

    Raises:
        ValueError: knots that do not rise, read as those of `rational_spline`.
    """
    _check_rising("knots", knots)
    return rising_lines(x, knots, values, dim=dim, glu=glu)


def rising_lines(x: Tensor, knots: Tensor, values: Tensor, *, dim: int = -1, glu: bool = False) -> Tensor:
    """`piecewise_linear` of knots that are known to rise: they are not read."""
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
    return _apply(Family.PIECEWISE_LINEAR, x, (packed,), dim, None, glu)


def rational_spline(
    x: Tensor, knots: Tensor, heights: Tensor, slopes: Tensor, line: Tensor, *, dim: int = -1, glu: bool = False
) -> Tensor:
    """S(x) - line · x: between two knots S(x) = y + r (s t² + d u) / (s + (d + d' - 2 s) u), u = t (1 - t).

    t goes from 0 to 1, r is the rise of the piece, s its mean slope, d and d' are the slopes at its ends. Outside S
    goes on as a straight line (Durkan et al., "Neural Spline Flows", 2019).

    knots, heights and slopes `[(groups,) pieces + 1]`: knots and heights rise, slopes are above 0; line `[1]` or
    `[groups, 1]`.

    Raises:
        ValueError: knots or heights that do not rise, slopes that are not above 0. What torch.compile or a transform
            of torch.func calls raises the same as a RuntimeError; under vmap and in a tracer they cannot be read.
    """
    for name, part in (("knots", knots), ("line", line)):
        if part.dim() not in (1, 2) or (name == "line" and part.shape[-1] != 1):
            expected = "[1] or [groups, 1]" if name == "line" else "[count] or [groups, count]"
            raise ValueError(f"{name}: expected {expected}, got {list(part.shape)}")
    _check_rising("knots", knots)
    _check_rising("heights", heights)
    _check_positive("slopes", slopes)
    return rising_spline(x, knots, heights, slopes, line, dim=dim, glu=glu)


def rising_spline(
    x: Tensor, knots: Tensor, heights: Tensor, slopes: Tensor, line: Tensor, *, dim: int = -1, glu: bool = False
) -> Tensor:
    """`rational_spline` of numbers that are made to rise: they are not read, which takes time, and waits for a GPU."""
    return _apply(Family.RATIONAL_SPLINE, x, (knots, heights, slopes, line), dim, None, glu)


def polynorm(x: Tensor, coefficients: Tensor, bias: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """bias + sum_k coefficients[k] x^k / rms(x^k), k = 1…degree, root mean squares over the last dimension of x.

    coefficients `[degree]`, bias `[]`; epsilon is added to the mean squares (Zhuo et al., 2024).
    """
    if coefficients.dim() != 1:
        raise ValueError(f"coefficients: expected [degree], got {list(coefficients.shape)}")
    return _apply(Family.POLYNORM, x, (bias, coefficients), -1, None, False, epsilon)


def composition(
    x: Tensor,
    *coefficients: Tensor,
    center: float = 0.0,
    half_width: float = 1.0,
    gate: bool = False,
    dim: int = -1,
    glu: bool = False,
) -> Tensor:
    """P_m(… P_1((x - center) / half_width)), times x with `gate`; P_i = sum_k coefficients[i - 1][k] T_k.

    A polynomial everywhere, without comparisons. coefficients: of each P_i `[(groups,) degree + 1]`, innermost first.
    bfloat16 and float16 are rounded at the end only.
    """
    check_input(x.dtype, x.shape, glu)
    x, factor = x.chunk(2, -1) if glu else (x, None)
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    value = (wide - center) / half_width
    for numbers in coefficients:
        value = _chebyshev_sum(value, numbers, dim, {})
    value = value * wide if gate else value
    return (value if factor is None else value * factor.to(value.dtype)).to(x.dtype)


def _chebyshev_sum(u: Tensor, coefficients: Tensor, dim: int, powers: dict[int, Tensor]) -> Tensor:
    """sum_k coefficients[k] T_k(u) of any degree: split as high · T_m + low where kernels end."""
    degree = coefficients.shape[-1] - 1
    if degree <= MAX_DEGREE:
        return chebyshev(u, coefficients, dim=dim)
    at = 1 << degree.bit_length() - 1
    if not powers:
        powers[MAX_DEGREE] = chebyshev(u, torch.nn.functional.pad(u.new_ones(1), (MAX_DEGREE, 0)))
    while at not in powers:
        last = max(powers)
        powers[2 * last] = 2.0 * powers[last] * powers[last] - 1.0
    above = coefficients[..., at + 1 :]  # T_{m+j} = 2 T_m T_j - T_{m-j}
    high = torch.cat([coefficients[..., at : at + 1], 2.0 * above], -1)
    if degree == at:
        high = torch.nn.functional.pad(high, (0, 1))
    low = coefficients[..., :at] - torch.nn.functional.pad(above.flip(-1), (2 * at - degree, 0))
    return _chebyshev_sum(u, high, dim, powers) * powers[at] + _chebyshev_sum(u, low, dim, powers)


def _check_rising(name: str, numbers: Tensor) -> None:
    """Refuse `[(groups,) count]` of which one is not above the one before it."""
    _check_each(numbers, numbers.detach().diff(dim=-1) > 0, f"{name}: expected rising numbers")


def _check_positive(name: str, numbers: Tensor) -> None:
    """Refuse `[(groups,) count]` of which one is not above 0."""
    _check_each(numbers, numbers.detach() > 0, f"{name}: expected numbers above 0")


def _check_each(numbers: Tensor, holds: Tensor, expected: str) -> None:
    """holds: of each number, or of each number and the next one."""
    if kernels.is_plain(numbers):
        if not bool(holds.all()):
            *group, at = (~holds).nonzero()[0].tolist()
            compared = numbers.shape[-1] - holds.shape[-1] + 1
            got = numbers[tuple(group)][at : at + compared].tolist()
            raise ValueError(f"{expected}, got {' before '.join(map(str, got))}")
    elif kernels.can_assert():
        torch._assert_async(holds.all(), expected)


def _rows(tensor: Tensor) -> Tensor:
    if tensor.dim() not in (1, 2):
        raise ValueError(f"coefficients: expected [count] or [groups, count], got {list(tensor.shape)}")
    return tensor if tensor.dim() == 2 else tensor.unsqueeze(0)


def _apply(
    family: Family,
    x: Tensor,
    parts: tuple[Tensor, ...],
    dim: int,
    interval: Interval | None,
    glu: bool,
    epsilon: float = 0.0,
    variable: Variable | None = None,
) -> Tensor:
    interval, variable = check_interval(interval), check_variable(variable)
    shapes = tuple([part.shape for part in parts])
    if kernels.is_plain(x, *parts):
        dtype, index = x.dtype, x.get_device()  # -1: the CPU
        if index >= 0 or kernels.has_kernel("cpu", None, dtype):
            dtypes = tuple([part.dtype for part in parts])
            strides = None if x.is_contiguous() else x.stride()
            call = _prepare(
                family, index, dtype, x.shape, strides, dtypes, shapes, dim, interval, glu, float(epsilon), variable
            )
            if isinstance(call, native.Call) or (call is not None and cuda.is_verified(call.kind)):
                return kernels.call_directly(x, call, *parts)
    if any(part.is_complex() for part in parts):
        raise TypeError(f"coefficients: expected real numbers, got {', '.join(str(part.dtype) for part in parts)}")
    formula, packing = describe(family, x.dtype, x.shape, shapes, dim, interval, glu, epsilon, variable)
    return kernels.activate(x, parts, packing, formula)


@functools.lru_cache(maxsize=1024)
def _prepare(
    family: Family,
    index: int,
    dtype: torch.dtype,
    shape: torch.Size,
    strides: native.Strides | None,
    part_dtypes: tuple[torch.dtype, ...],
    part_shapes: tuple[torch.Size, ...],
    dim: int,
    interval: Interval | None,
    glu: bool,
    epsilon: float,
    variable: Variable | None,
) -> native.Call | cuda.Call | None:
    """None where the parameters are not of a dtype that kernels read, such as integers, or a GPU has no kernel."""
    if any(part not in native.DATA_TYPES for part in part_dtypes):
        return None
    formula, packing = describe(family, dtype, shape, part_shapes, dim, interval, glu, epsilon, variable)
    if index >= 0:
        return cuda.prepare(formula, packing, index, dtype, shape, part_dtypes, part_shapes, strides)
    return native.prepare(formula, packing, dtype, shape, part_dtypes, part_shapes, strides)


def describe(
    family: Family,
    dtype: torch.dtype,
    shape: torch.Size,
    part_shapes: tuple[torch.Size, ...],
    dim: int,
    interval: Interval | None,
    glu: bool,
    epsilon: float,
    variable: Variable | None = None,
) -> tuple[Formula, Packing]:
    """The formula and the packing for an x and parts of these shapes, which are checked."""
    degree, second_degree, packing = _count(family, part_shapes)
    where = check_input(dtype, shape, glu, packing.groups(part_shapes), dim)
    if family in (Family.PIECEWISE_LINEAR, Family.RATIONAL_SPLINE):
        _check_degree("knots", degree, largest_degree(family.name.lower()), "pieces")
    else:
        _check_degree("coefficients", degree)
    if family == Family.RATIONAL:
        _check_degree("denominator", second_degree)
    if family == Family.POLYNORM and len(shape) == 0:
        raise ValueError("x: polynorm needs at least one dimension, got a scalar")
    return Formula(family, degree, second_degree, interval or (), where, glu, epsilon, variable or ()), packing


def _count(family: Family, shapes: tuple[torch.Size, ...]) -> tuple[int, int, Packing]:
    """Degree, second degree and packing of a family whose parts have these shapes."""
    first, names = _EQUALLY_LONG.get(family, (0, ()))
    counts = [shape[-1] if len(shape) > 0 else 1 for shape in shapes]
    for name, shape in zip(names, shapes[first:], strict=False):
        if shape[-1:] != shapes[first][-1:]:
            raise ValueError(f"{name}: expected {counts[first]} per group, got {list(shape)}")
    degree, second_degree, packing = counts[0] - 1, 0, PLAIN
    if family == Family.FOURIER:
        degree = counts[1]
        packing = Packing(1, (1.0, *_SHARES[:degree], *[1.0] * (2 * degree)))
    elif family == Family.HARMONIC:
        degree = counts[2]
        packing = Packing(2, (1.0, 1.0, *_SHARES[:degree] * 2))
    elif family == Family.RATIONAL:
        second_degree = counts[1]
    elif family == Family.PIECEWISE_LINEAR:
        degree = (counts[0] + 1) // 3
    elif family == Family.POLYNORM:
        degree, packing = counts[1], Packing(1)
    return degree, second_degree, packing


def _check_degree(name: str, degree: int, largest: int = MAX_DEGREE, of: str = "a degree") -> None:
    if not 1 <= degree <= largest:
        raise ValueError(f"{name}: expected {of} from 1 to {largest}, got {degree}")
