"""The operators as plain arithmetic, which a compiler fuses with what stands around them.

Like the kernels (csrc/families.h): parameters become, in float64, the numbers that elements are computed with; values
and slopes are written out from x alone, so that nothing else has to be kept for backward; the gradients of the
parameters follow from sums over elements, which are added in a fixed order; bfloat16 and float16 are computed in
float32 and rounded once. Value, slope and the terms of sums come together: a compiler drops what nobody uses.
"""

# ruff: noqa: ARG005 (all families' functions have one signature)

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from polytrope.ops.families import Family, Formula

_ENOUGH, _MOST = 256, 65536  # elements that are added in the dtype of the arithmetic, before float64 takes over

Numbers = Sequence[Tensor]  # each `[groups]`, or shaped to meet the elements of its group
Rows = Sequence[Sequence[float]]


def version() -> str:
    """Of this arithmetic. It belongs into the keys of compilers' caches, which see the operators only."""
    return _digest()


@functools.cache
def _digest() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def is_lowered(family: int) -> bool:
    """Whether a compiler is given this arithmetic instead of the operator: where that was measured to be faster.

    Tropical and rational functions were not, in a compiled block on a CPU: 1.2 to 1.7 times GELU's time, where their
    operators take 1.1 (benchmarks/compiled.py).
    """
    return family in _FAMILIES


# Asked by the compiler as it traces, see `kernels.has_kernel`.
version._dynamo_marked_constant = is_lowered._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Expansion(NamedTuple):
    """F at each element, its slope, and the terms of the sums that the gradients of the parameters are made of."""

    value: Tensor
    slope: Tensor
    terms: Sequence[Tensor]


class Lowered(NamedTuple):
    """One family, as functions of the degree n; x may be a scaled variable.

    Args:
        prepare: packed parameters -> the numbers that `expand` computes with, float64.
        expand: x and these, in the dtype of the arithmetic -> F there.
        finish: the sums of the terms -> the gradients of the packed parameters, float64.
        end: packed parameters and a place -> the slope there, and its gradients by each parameter.
    """

    prepare: Callable[[Numbers, int], Numbers]
    expand: Callable[[Tensor, Numbers, int], Expansion]
    finish: Callable[[Numbers, int], Numbers]
    end: Callable[[Numbers, float, int], tuple[Tensor, Sequence[float]]]


def forward(x: Tensor, parameters: Tensor, formula: Formula) -> Tensor:
    """F(x), as `polytrope::activation`."""
    groups = len(parameters)
    argument, factor = _halves(x, formula)
    value = _join(_evaluate(_split(argument, groups, formula), parameters, formula).value, groups, formula)
    return (value if factor is None else value * factor).to(x.dtype)


def backward(gradient: Tensor, x: Tensor, parameters: Tensor, formula: Formula) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the parameters, as `polytrope::activation_backward`."""
    # Under other names: what backward computes again would else be found in the forward pass, and kept.
    x, parameters = torch.ops.aten.alias(x), torch.ops.aten.alias(parameters)
    groups = len(parameters)
    argument, factor = _halves(x, formula)
    found = _evaluate(_split(argument, groups, formula), parameters, formula)
    wide = gradient.to(argument.dtype)
    seed = _split(wide if factor is None else wide * factor, groups, formula)
    x_gradient = _join(seed * found.slope, groups, formula)
    if factor is not None:
        x_gradient = torch.cat([x_gradient, wide * _join(found.value, groups, formula)], -1)
    sums = [_sum(seed * term, formula.dim - 1 if groups > 1 else None).reshape(-1) for term in found.terms]
    columns = torch.stack(list(_finish(sums, _columns(parameters), formula)), -1)
    return x_gradient.to(x.dtype), columns.to(parameters.dtype)


def slope(gradient: Tensor, x: Tensor, parameters: Tensor, formula: Formula) -> Tensor:
    """The first of these, as `polytrope::activation_slope`."""
    return backward(gradient, x, parameters, formula)[0]


def _halves(x: Tensor, formula: Formula) -> tuple[Tensor, Tensor | None]:
    """What is activated and the factor, in the dtype of the arithmetic."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    argument, factor = x.chunk(2, -1) if formula.gated else (x, None)
    return argument.to(dtype), None if factor is None else factor.to(dtype)


def _split(x: Tensor, groups: int, formula: Formula) -> Tensor:
    """With the groups along a dimension of their own."""
    return x if groups == 1 else x.unflatten(formula.dim, (groups, x.shape[formula.dim] // groups))


def _join(x: Tensor, groups: int, formula: Formula) -> Tensor:
    return x if groups == 1 else x.flatten(formula.dim - 1, formula.dim)


def _columns(parameters: Tensor) -> Numbers:
    return parameters.double().unbind(-1)


def _places(formula: Formula) -> list[tuple[float, float]]:
    """Each end of the interval, and the variable there."""
    shift, scale = formula.variable or (0.0, 1.0)
    return [(end, (end - shift) / scale) for end in formula.interval]


def _evaluate(x: Tensor, parameters: Tensor, formula: Formula) -> Expansion:
    """With an interval, the last two terms are what lies beyond its ends."""
    family, n = _FAMILIES[Family(formula.family)], formula.degree
    shift, scale = formula.variable or (0.0, 1.0)
    columns = _columns(parameters)
    prepared = list(family.prepare(columns, n))
    count = len(prepared)
    for _, place in _places(formula):
        prepared.append(family.end(columns, place, n)[0] / scale)
    table = torch.stack(prepared, -1).to(x.dtype)
    # Inductor writes to memory what as_strided looks at; it would else prepare the numbers again for each vector.
    table = table.as_strided(table.shape, (len(prepared), 1))
    table = table[0] if len(table) == 1 else table.reshape(len(table), *[1] * -formula.dim, -1)
    numbers = table.unbind(-1)
    inside = x.clamp(*formula.interval) if formula.interval else x
    found = family.expand((inside - shift) * (1.0 / scale) if formula.variable else inside, numbers[:count], n)
    if formula.variable:
        found = found._replace(slope=found.slope * (1.0 / scale))
    if not formula.interval:
        return found
    beyond = [(x - formula.interval[0]).clamp(max=0.0), (x - formula.interval[1]).clamp(min=0.0)]
    return Expansion(found.value + _combined(beyond, numbers[count:]), found.slope, [*found.terms, *beyond])


def _finish(sums: Numbers, columns: Numbers, formula: Formula) -> Numbers:
    """The gradients of the packed parameters from the sums of the terms."""
    family, n = _FAMILIES[Family(formula.family)], formula.degree
    places = _places(formula)
    gradients = family.finish(sums[: len(sums) - len(places)], n)
    for (_, place), total in zip(places, sums[len(sums) - len(places) :], strict=True):
        shares, scaled = family.end(columns, place, n)[1], total / (formula.variable or (0.0, 1.0))[1]
        gradients = [gradient + scaled * share for gradient, share in zip(gradients, shares, strict=True)]
    return gradients


def _sum(terms: Tensor, grouped: int | None) -> Tensor:
    """Over all dimensions but the one of the groups, in float64; its first summands in the dtype of the terms.

    The order is that of the dimensions, from the last: it depends on the shape only, and on which sizes the compiler
    takes as fixed: of the others nobody knows how many summands they are, so that they are left to float64.
    """
    others = [dim for dim in range(terms.dim()) if grouped is None or dim != terms.dim() + grouped]
    first: list[int] = []
    count = 1
    for dim in reversed(others[1:]):  # one stays for the second pass
        size = terms.shape[dim]
        if not isinstance(size, int):
            continue
        count *= size
        if count > _MOST:
            break
        first.append(dim)
        if count >= _ENOUGH:
            break
    if first:
        terms = terms.sum(first, keepdim=True)
    return terms.sum(others, dtype=torch.float64)


def _combined(terms: Numbers, weights: Sequence[Tensor | float]) -> Tensor:
    """sum_k weights[k] terms[k]; at least one weight is not 0."""
    products = [
        term if isinstance(weight, float) and weight == 1.0 else weight * term
        for term, weight in zip(terms, weights, strict=True)
        if not (isinstance(weight, float) and weight == 0.0)
    ]
    return functools.reduce(torch.add, products) if products else torch.zeros_like(terms[0])


class Basis(NamedTuple):
    """What a series is summed in: q_0 = 1, q_1 = x, q_{k+1} = times x q_k - less(k) q_{k-1}.

    Args:
        rows: n -> B_0 … B_n as sums of q_0 … q_n.
        derived: n -> their derivatives as sums of q_0 … q_{n-1}.
    """

    times: float
    less: Callable[[int], float]
    rows: Callable[[int], Rows]
    derived: Callable[[int], Rows]


def _of_powers(rows: Callable[[int], Rows]) -> Basis:
    def derived(n: int) -> Rows:
        return [[(j + 1) * row[j + 1] for j in range(n)] for row in rows(n)]

    return Basis(1.0, lambda k: 0.0, rows, derived)


def _identity(n: int) -> Rows:
    return [[float(k == j) for j in range(n + 1)] for k in range(n + 1)]


def _hermite(n: int) -> Rows:
    """He_k / k! = sum_i (-1)^i / (2^i i! j!) x^j, j = k - 2i."""

    def entry(k: int, j: int) -> float:
        i = (k - j) // 2
        return 0.0 if j > k or (k - j) % 2 else (-0.5) ** i / (math.factorial(i) * math.factorial(j))

    return [[entry(k, j) for j in range(n + 1)] for k in range(n + 1)]


def _derived_chebyshev(n: int) -> Rows:
    """T'_k = 2k (T_{k-1} + T_{k-3} + …), where T_0 counts half."""
    return [[k * (1.0 if j == 0 else 2.0) if j < k and (k - j) % 2 else 0.0 for j in range(n)] for k in range(n + 1)]


def _leading(k: int) -> float:
    """Of P_k; the q_k of Legendre's are P_k divided by it."""
    return math.prod((2 * j - 1) / j for j in range(2, k + 1))


def _legendre(n: int) -> Rows:
    return [[_leading(k) if k == j else 0.0 for j in range(n + 1)] for k in range(n + 1)]


def _derived_legendre(n: int) -> Rows:
    """P'_k = (2k-1) P_{k-1} + (2k-5) P_{k-3} + …"""
    return [[(2 * j + 1) * _leading(j) if j < k and (k - j) % 2 else 0.0 for j in range(n)] for k in range(n + 1)]


_POWERS = _of_powers(_identity)
_HERMITE = _of_powers(_hermite)
_CHEBYSHEV = Basis(2.0, lambda k: 1.0, _identity, _derived_chebyshev)
_LEGENDRE = Basis(1.0, lambda k: k * k / (4.0 * k * k - 1.0), _legendre, _derived_legendre)


def _series(basis: Basis, is_rectified: bool = False) -> Lowered:
    """sum_k p[k] B_k(x), or of max(x, 0)."""

    def prepare(p: Numbers, n: int) -> Numbers:
        rows, derived = basis.rows(n), basis.derived(n)
        of_value = [_combined(p, [row[j] for row in rows]) for j in range(n + 1)]
        return [*of_value, *(_combined(p, [row[j] for row in derived]) for j in range(n))]

    def expand(x: Tensor, t: Numbers, n: int) -> Expansion:
        place = torch.relu(x) if is_rectified else x
        terms = _terms(place, n, basis)
        value, slope = _sum_series(place, t[: n + 1], basis), _sum_series(place, t[n + 1 :], basis)
        return Expansion(value, torch.where(x <= 0, 0.0, slope) if is_rectified else slope, terms)

    def finish(sums: Numbers, n: int) -> Numbers:
        return [_combined(sums, row) for row in basis.rows(n)]

    def end(p: Numbers, place: float, n: int) -> tuple[Tensor, Sequence[float]]:
        if is_rectified and place <= 0:
            shares = [0.0] * (n + 1)
        else:
            q = [1.0, place]
            for k in range(1, n):
                q.append(basis.times * place * q[k] - basis.less(k) * q[k - 1])
            shares = [sum((a * b for a, b in zip(row, q, strict=False)), 0.0) for row in basis.derived(n)]
        return _combined(p, shares), shares

    return Lowered(prepare, expand, finish, end)


def _terms(x: Tensor, n: int, basis: Basis) -> list[Tensor]:
    """q_0 … q_n."""
    terms = [torch.ones_like(x), x]
    for k in range(1, n):
        following = (x if basis.times == 1.0 else basis.times * x) * terms[k]
        terms.append(following - basis.less(k) * terms[k - 1] if basis.less(k) else following)
    return terms


def _sum_series(x: Tensor, t: Numbers, basis: Basis) -> Tensor:
    """sum_k t[k] q_k by Horner's or Clenshaw's rule."""
    last = len(t) - 1
    if last == 0:
        return t[0] * torch.ones_like(x)
    many = x if basis.times == 1.0 else basis.times * x
    after: Tensor | None = None
    following = t[last] * (x if last == 1 else many) + t[last - 1]
    before = t[last]
    for k in range(last - 2, -1, -1):
        after = before
        before, following = following, (x if k == 0 else many) * following + t[k]
        if basis.less(k + 1):
            following = following - basis.less(k + 1) * after
    if not basis.less(1):
        return following
    # Where terms overflow, inf - inf: F is ±inf with the sign of its leading term. (Inductor has no vector isnan.)
    leading = t[last] * (x if last % 2 else x.abs()) * math.inf
    return torch.where(following == following, following, leading)


_FAMILIES: dict[Family, Lowered] = {
    Family.POLYNOMIAL: _series(_POWERS),
    Family.HERMITE: _series(_HERMITE),
    Family.CHEBYSHEV: _series(_CHEBYSHEV),
    Family.LEGENDRE: _series(_LEGENDRE),
    Family.POLYRELU: _series(_POWERS, is_rectified=True),
}
