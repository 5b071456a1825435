"""The operators as plain arithmetic, which a compiler fuses with what stands around them.

What `reference` defines, with the derivatives written out: from x and the parameters alone, so that nothing else has to
be kept for backward, and with sums over elements that are added in a fixed order. Like the kernels it computes bfloat16
and float16 in float32 and rounds once. All of a formula's derivatives are described together; a compiler drops what
nobody uses.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from polytrope.ops import reference
from polytrope.ops.families import Family, Formula
from polytrope.ops.reference import Numbers

_ENOUGH, _MOST = 256, 65536  # elements that are added in the dtype of the arithmetic, before float64 takes over
_WIDE_DEGREE = 7  # float64 holds this power of every float32
_WIDE_END = 1e40  # beyond every float32; its powers of that degree are finite


def version() -> str:
    """Of this arithmetic. It belongs into the keys of compilers' caches, which see the operators only."""
    return _digest()


@functools.cache
def _digest() -> str:
    sources = [Path(file).read_bytes() for file in (__file__, reference.__file__)]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


class Expansion(NamedTuple):
    """F and its derivatives at each element."""

    value: Tensor
    slope: Tensor  # dF/dx
    shares: Sequence[Tensor]  # dF by each parameter
    share_slopes: Sequence[Tensor]  # the derivatives of these by x; none for families without an interval


class Basis(NamedTuple):
    """B_0 = 1, B_1 = times(0) x, B_{k+1} = times(k) x B_k - less(k) B_{k-1}; B'_{k+1} = rise(k) B_k + keep(k) B'_{k-1}."""

    times: Callable[[int], float]
    less: Callable[[int], float]
    rise: Callable[[int], float]
    keep: Callable[[int], float]


_POWERS = Basis(lambda k: 1.0, lambda k: 0.0, lambda k: k + 1.0, lambda k: 0.0)  # noqa: ARG005
_BASES = {
    Family.POLYNOMIAL: _POWERS,
    Family.POLYRELU: _POWERS,
    Family.HERMITE: Basis(lambda k: 1 / (k + 1), lambda k: 1 / (k + 1), lambda k: 1.0, lambda k: 0.0),  # noqa: ARG005
    Family.CHEBYSHEV: Basis(
        lambda k: 1.0 if k == 0 else 2.0,
        lambda k: 1.0,  # noqa: ARG005
        lambda k: 1.0 if k == 0 else 2.0 * (k + 1),
        lambda k: (k + 1) / (k - 1) if k > 1 else 0.0,
    ),
    Family.LEGENDRE: Basis(
        lambda k: (2 * k + 1) / (k + 1), lambda k: k / (k + 1), lambda k: 2.0 * k + 1, lambda k: float(k > 0)
    ),
}


def is_lowered(family: int, degree: int, second_degree: int, dtype: torch.dtype, device_type: str) -> bool:
    """Whether a compiler is given this arithmetic instead of the operator, for an x like this.

    Rational functions need float64, which has no place on a GPU, and which holds their powers up to some degree only.
    """
    if family == Family.RATIONAL:
        narrow = dtype != torch.float64 and device_type == "cpu"
        return narrow and max(degree, second_degree) <= _WIDE_DEGREE
    return family in _EXPANSIONS


# Asked by the compiler as it traces, see `kernels.has_kernel`; which makes an empty one of a named tuple on the way.
version._dynamo_marked_constant = is_lowered._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward(x: Tensor, parameters: Tensor, formula: Formula) -> Tensor:
    """F(x), as `polytrope::activation`."""
    argument, factor = _halves(x, formula)
    numbers = _numbers(parameters, argument.dtype, formula)
    value = _join(_expand(_split(argument, len(parameters), formula), numbers, formula).value, len(parameters), formula)
    return (value if factor is None else value * factor).to(x.dtype)


def backward(gradient: Tensor, x: Tensor, parameters: Tensor, formula: Formula) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the parameters, as `polytrope::activation_backward`."""
    # Under other names: what backward computes again would else be found in the forward pass, and kept.
    x, parameters = torch.ops.aten.alias(x), torch.ops.aten.alias(parameters)
    groups = len(parameters)
    argument, factor = _halves(x, formula)
    expansion = _expand(_split(argument, groups, formula), _numbers(parameters, argument.dtype, formula), formula)
    wide = gradient.to(argument.dtype)
    seed = _split(wide if factor is None else wide * factor, groups, formula)
    x_gradient = _join(seed * expansion.slope, groups, formula)
    if factor is not None:
        x_gradient = torch.cat([x_gradient, wide * _join(expansion.value, groups, formula)], -1)
    grouped = formula.dim - 1 if groups > 1 else None
    sums = torch.stack([_sum(seed * share, grouped) for share in expansion.shares], -1)
    return x_gradient.to(x.dtype), sums.reshape(parameters.shape).to(parameters.dtype)


def slope(gradient: Tensor, x: Tensor, parameters: Tensor, formula: Formula) -> Tensor:
    """The first of these, as `polytrope::activation_slope`."""
    return backward(gradient, x, parameters, formula)[0]


def _halves(x: Tensor, formula: Formula) -> tuple[Tensor, Tensor | None]:
    """What is activated and the factor, in the dtype of the arithmetic."""
    dtype = torch.float64 if formula.family == Family.RATIONAL else torch.promote_types(x.dtype, torch.float32)
    argument, factor = x.chunk(2, -1) if formula.gated else (x, None)
    return argument.to(dtype), None if factor is None else factor.to(dtype)


def _split(x: Tensor, groups: int, formula: Formula) -> Tensor:
    """With the groups along a dimension of their own."""
    return x if groups == 1 else x.unflatten(formula.dim, (groups, x.shape[formula.dim] // groups))


def _join(x: Tensor, groups: int, formula: Formula) -> Tensor:
    return x if groups == 1 else x.flatten(formula.dim - 1, formula.dim)


def _numbers(parameters: Tensor, dtype: torch.dtype, formula: Formula) -> list[Tensor]:
    """One tensor for each packed parameter: a number, or one for each group, to be multiplied with what was `_split`."""
    numbers = parameters.to(dtype)
    if len(numbers) == 1:
        return list(numbers[0].unbind())
    return list(numbers.reshape(len(numbers), *[1] * -formula.dim, -1).unbind(-1))


def _sum(terms: Tensor, grouped: int | None) -> Tensor:
    """Over all dimensions but the one of the groups, in float64; its first summands in the dtype of the terms.

    The order is that of the dimensions, from the last: it depends on the shape only.
    """
    others = [dim for dim in range(terms.dim()) if grouped is None or dim != terms.dim() + grouped]
    first: list[int] = []
    count = 1
    for dim in reversed(others[1:]):  # one stays for the second pass
        size = terms.shape[dim]
        count *= size if isinstance(size, int) else _ENOUGH  # not known yet: the size of a batch or a sequence
        if count > _MOST:
            break
        first.append(dim)
        if count >= _ENOUGH:
            break
    if first:
        terms = terms.sum(first, keepdim=True)
    return terms.sum(others, dtype=torch.float64)


def _series(x: Tensor, p: Numbers, basis: Basis) -> Expansion:
    """sum_k p[k] B_k(x)."""
    values, slopes = [torch.ones_like(x)], [torch.zeros_like(x)]
    for k in range(len(p) - 1):
        value, slope = _times(basis.times(k), x) * values[k], _times(basis.rise(k), values[k])
        if k > 0 and basis.less(k):
            value = value - _times(basis.less(k), values[k - 1])
        if k > 0 and basis.keep(k):
            slope = slope + _times(basis.keep(k), slopes[k - 1])
        values.append(value)
        slopes.append(slope)
    return Expansion(_weighted(p, values), _weighted(p[1:], slopes[1:]), values, slopes)


def _of_basis(basis: Basis) -> Callable[[Tensor, Numbers, int, int], Expansion]:
    return lambda x, p, n, m: _series(x, p, basis)  # noqa: ARG005 (all have one signature)


def _times(number: float, x: Tensor) -> Tensor:
    return x if number == 1.0 else number * x


def _weighted(weights: Numbers, terms: Sequence[Tensor]) -> Tensor:
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = total + weight * term
    return total


def _polyrelu(x: Tensor, p: Numbers, n: int, m: int) -> Expansion:  # noqa: ARG001 (all have one signature)
    found, is_flat = _series(torch.relu(x), p, _POWERS), x <= 0
    slope, *share_slopes = (torch.where(is_flat, 0.0, s) for s in (found.slope, *found.share_slopes))
    return found._replace(slope=slope, share_slopes=share_slopes)


def _tropical(x: Tensor, p: Numbers, n: int, m: int) -> Expansion:  # noqa: ARG001
    scale = math.sqrt(2.0) / n
    value, _ = _largest([p[0] + torch.zeros_like(x), *(k * x + p[k] for k in range(1, n + 1))])
    inside = x.clamp(max=1e30)  # beyond, lines overflow and would tie
    best, index = _largest([p[0] + torch.zeros_like(x), *(k * inside + p[k] for k in range(1, n + 1))])
    slope = torch.where(best.isnan(), best, index)
    shares = [(index == k).to(x.dtype) * scale for k in range(n + 1)]
    return Expansion(value * scale, slope * scale, shares, [])


def _tropical_rational(x: Tensor, p: Numbers, n: int, m: int) -> Expansion:  # noqa: ARG001
    count = n + 1
    inside = x.clamp(-1e30, 1e30)
    value, slope = torch.zeros_like(x), torch.zeros_like(x)
    shares: list[Tensor] = []
    for side, sign in ((0, 1.0), (2 * count, -1.0)):
        slopes, intercepts = p[side : side + count], p[side + count : side + 2 * count]
        best, index = _largest([a * inside + b for a, b in zip(slopes, intercepts, strict=True)])
        value = value + sign * best
        chosen = slopes[0] + torch.zeros_like(x)
        for k in range(1, count):
            chosen = torch.where(index == k, slopes[k], chosen)
        slope = slope + sign * torch.where(best.isnan(), best, chosen)
        chosen_ones = [(index == k).to(x.dtype) for k in range(count)]
        shares += [sign * one * factor for factor in (inside, 1.0) for one in chosen_ones]
    far = torch.where(value.abs() > 1e20, value * (x.abs() * 1e-30), value)
    return Expansion(torch.where(x == inside, value, far), slope, shares, [])


def _largest(lines: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The largest at each element, NaN where one is, and the number of the first that is as large."""
    best, index = lines[0], torch.zeros_like(lines[0])
    for k, line in enumerate(lines[1:], 1):
        index = torch.where(line > best, float(k), index)
        best = torch.maximum(best, line)
    return best, index


def _rational(x: Tensor, p: Numbers, n: int, m: int) -> Expansion:
    """In float64: x and its powers are finite, but for ±inf, where F has the value of an x beyond every float32."""
    x = x.clamp(-_WIDE_END, _WIDE_END)
    top, bottom = _series(x, p[: n + 1], _POWERS), _series(x, [torch.zeros_like(p[0]), *p[n + 1 :]], _POWERS)
    sign, below = torch.sign(bottom.value), 1.0 / (1.0 + bottom.value.abs())
    value = top.value * below
    below_slope = sign * bottom.slope * below  # of log(1 + |…|)
    slope = top.slope * below - value * below_slope
    shares = [term * below for term in top.shares]
    share_slopes = [(rise - term * below_slope) * below for term, rise in zip(top.shares, top.share_slopes, strict=True)]
    fallen, fallen_slope = sign * value * below, sign * (slope - value * below_slope) * below
    for term, rise in zip(bottom.shares[1:], bottom.share_slopes[1:], strict=True):
        shares.append(-fallen * term)
        share_slopes.append(-(fallen_slope * term + fallen * rise))
    return Expansion(value, slope, shares, share_slopes)


_EXPANSIONS: dict[Family, Callable[[Tensor, Numbers, int, int], Expansion]] = {
    **{family: _of_basis(basis) for family, basis in _BASES.items()},
    Family.POLYRELU: _polyrelu,
    Family.TROPICAL: _tropical,
    Family.TROPICAL_RATIONAL: _tropical_rational,
    Family.RATIONAL: _rational,
}


def _expand(x: Tensor, numbers: Numbers, formula: Formula) -> Expansion:
    family, n, m = Family(formula.family), formula.degree, formula.second_degree
    shift, scale = formula.variable or (0.0, 1.0)
    inside = x.clamp(*formula.interval) if formula.interval else x
    variable = (inside - shift) * (1.0 / scale) if formula.variable else inside
    found = _EXPANSIONS[family](variable, numbers, n, m)
    if family in _BASES and not formula.interval:
        # In an order in which, where terms overflow, F is infinite and not inf - inf. Elsewhere it has no such terms.
        found = found._replace(value=reference.FORMULAS[family](variable, numbers, n, m))
    if formula.variable:
        found = found._replace(
            slope=found.slope * (1.0 / scale), share_slopes=[slope * (1.0 / scale) for slope in found.share_slopes]
        )
    if not formula.interval:
        return found
    beyond = x - inside  # 0 inside
    return found._replace(
        value=found.value + beyond * found.slope,
        shares=[share + beyond * slope for share, slope in zip(found.shares, found.share_slopes, strict=True)],
    )
