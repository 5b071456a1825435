"""How each family is fitted: from data to the parameters of the module and the curve that they make.

Polynomials are solved by SVD in Legendre polynomials of the interval, in float64, and written in the family's basis by
exact rational arithmetic. The other families are linear problems with a few Gauss-Newton steps for what enters
nonlinearly; broken lines are found by dynamic programming; splines go through the function at knots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from polytrope.ops.fitting import fourier, placement, polynomial, quadrature, rational, spline, tropical
from polytrope.ops.fitting.curves import Array, Curve
from polytrope.ops.fitting.refinement import Data, Ends
from polytrope.ops.fitting.targets import Target, find_kinks, resolve_target, sample

Condition = tuple[float, Literal["value", "slope"]]


@dataclass(frozen=True)
class Problem:
    """What to fit to.

    Args:
        family: of `LINEAR` or `NONLINEAR`.
        exact: the target.
        free_ends: the interval is one to start from.
        denominator_degree: of a rational function; default: one less than the numerator's.
        variable: of a polynomial: (shift, scale), the coefficients then are of its basis in (x - shift) / scale.
        dtype: of the module.
    """

    family: str
    degree: int
    interval: Ends | None
    exact: Curve
    data: Data
    kinks: list[float]
    tails: bool
    free_ends: bool
    denominator_degree: int | None = None
    variable: polynomial.Variable | None = None
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Solution:
    """The member of a family that was found.

    Args:
        curve: F and F' inside the interval, float64.
        parameters: of the module, by name.
        condition: condition number of the least-squares matrix (columns of length 1).
        interval: None: that of the problem.
    """

    curve: Curve
    parameters: dict[str, Array]
    condition: float
    interval: Ends | None = None


def interpolate(problem: Problem, nodes: Sequence[float] | None) -> Solution:
    """Confluent Hermite interpolation: the polynomial with the target's values and slopes at the nodes."""
    assert problem.interval is not None
    points = (
        polynomial.chebyshev_nodes(*problem.interval, problem.degree // 2 + 1)
        if nodes is None
        else np.sort(np.asarray(nodes, dtype=np.float64))
    )
    _, with_slope = polynomial.interpolation_conditions(problem.degree, points)
    value, slope = problem.exact(points)
    basis = polynomial.Basis(problem.degree, problem.interval)
    at, slope_at = basis.evaluate(points)
    matrix, right = np.concatenate([at, slope_at[with_slope]]), np.concatenate([value, slope[with_slope]])
    coefficients, condition = polynomial.solve(matrix, right)
    curve = _combination(basis.evaluate, coefficients)
    return Solution(curve, _linear_parameters(problem, coefficients), condition, problem.interval)


def fit_linear(problem: Problem, conditions: list[Condition]) -> Solution:
    """Polynomials and PolyReLU: linear least squares under the conditions."""
    data = problem.data
    columns = columns_of(problem.family, problem.degree, problem.interval, problem.tails)
    inside = data.x if problem.interval is None else np.clip(data.x, *problem.interval)
    if problem.family == "polyrelu" and not (inside > 0).any():  # all powers are 0 there: only the constant tells
        columns = _first_of(columns)
    values, slopes = columns(data.x)
    rows, fixed = None, None
    if conditions:
        points = np.array([x for x, _ in conditions])
        at_value, at_slope = columns(points)
        target_value, target_slope = problem.exact(points)
        is_slope = np.array([kind == "slope" for _, kind in conditions])
        rows = np.where(is_slope[:, None], at_slope, at_value)
        fixed = np.where(is_slope, target_slope, target_value)
    coefficients, condition = polynomial.solve(data.rows(values, slopes), data.right, rows, fixed)
    coefficients = np.pad(coefficients, (0, problem.degree + 1 - len(coefficients)))
    curve = _combination(columns_of(problem.family, problem.degree, problem.interval, tails=False), coefficients)
    return Solution(curve, _linear_parameters(problem, coefficients), condition, problem.interval)


def _first_of(columns: Curve) -> Curve:
    """The first function alone."""

    def first(x: Array) -> tuple[Array, Array]:
        values, slopes = columns(x)
        return values[..., :1], slopes[..., :1]

    return first


def _linear_parameters(problem: Problem, coefficients: Array) -> dict[str, Array]:
    """What the module learns, from coefficients of the functions that `columns_of` gives."""
    if problem.family == "polyrelu":
        assert problem.interval is not None
        basis, written = _positive_basis(problem.degree, problem.interval), "powers"
    else:
        basis, written = polynomial.Basis(problem.degree, problem.interval), problem.family
    return {"coefficients": basis.to_family(coefficients, written, problem.variable)}


def _combination(columns: Curve, coefficients: Array) -> Curve:
    def curve(x: Array) -> tuple[Array, Array]:
        values, slopes = columns(x)  # no `@`: see `triangle_of`
        return np.einsum("xk,k->x", values, coefficients), np.einsum("xk,k->x", slopes, coefficients)

    return curve


def columns_of(family: str, degree: int, interval: tuple[Any, Any] | None, tails: bool) -> Curve:
    """Values and slopes of the functions that a linear family combines, on along their tangents with `tails`.

    Args:
        interval: also of two arrays, see `polynomial.Basis`.
    """
    if family != "polyrelu":
        basis = polynomial.Basis(degree, interval)
        return basis.evaluate_with_tangents if tails else basis.evaluate
    assert interval is not None
    basis = _positive_basis(degree, interval)

    def powers(x: Array) -> tuple[Array, Array]:
        """Polynomials of max(0, x) (PolyCom, 2024)."""
        values, slopes = basis.evaluate(np.maximum(x, 0.0))
        return values, slopes * (x > 0)[..., None]

    def with_tangents(x: Array) -> tuple[Array, Array]:
        inside = np.clip(x, *interval)
        values, slopes = powers(inside)
        return values + slopes * (x - inside)[..., None], slopes

    return with_tangents if tails else powers


def _positive_basis(degree: int, interval: tuple[Any, Any]) -> polynomial.Basis:
    """In which polynomials of max(0, x) are solved, x up to the end of the interval."""
    low, high = interval
    return polynomial.Basis(degree, (0.0 * high, np.maximum(high, 1e-2 * (high - low))))


def imitate(
    target: str | Target,
    family: str,
    degree: int,
    ends: Ends | None,
    denominator_degree: int | None = None,
    variable: polynomial.Variable | None = None,
) -> Solution:
    """The member of a family closest to `target` in value and slope.

    Args:
        ends: of the interval, all points of which count alike; None (polynomials): the whole line, as often as N(0, 1).
        variable: as in `Problem`.

    Raises:
        ValueError: no such target, or one that is not finite or not elementwise there.
    """
    function = resolve_target(target)

    def exact(x: Array) -> tuple[Array, Array]:
        return sample(function, x)

    low, high = ends or (-quadrature.GAUSSIAN_REACH, quadrature.GAUSSIAN_REACH)
    kinks = find_kinks(function, low, high)
    x, weights = quadrature.nodes(low, high, kinks, "uniform" if ends else "gaussian")
    data = Data(x, weights, *exact(x), 1.0)
    problem = Problem(family, degree, ends, exact, data, kinks, True, False, denominator_degree, variable)
    if family in LINEAR:
        return fit_linear(problem, [])
    if family not in NONLINEAR:
        raise ValueError(f"a {family} activation imitates no function")
    return fit_nonlinear(problem)


def fit_nonlinear(problem: Problem) -> Solution:
    """The member of a family of `NONLINEAR` of this very degree."""
    if problem.family == "rational_spline":  # which needs none of a lower degree
        return _fit_rational_spline(problem)
    *_, found = NONLINEAR[problem.family](problem)
    return found


def _fit_tropical(problem: Problem) -> Iterator[Solution]:
    for degree in range(1, problem.degree + 1):
        line, parameters = tropical.fit_convex(problem.data, degree)
        yield Solution(line.evaluate, parameters, 1.0)


def _fit_tropical_rational(problem: Problem) -> Iterator[Solution]:
    for line, parameters in tropical.fit_rationals(problem.exact, problem.data, problem.degree, problem.kinks):
        yield Solution(line.evaluate, parameters, 1.0)


def _fit_fourier(problem: Problem) -> Iterator[Solution]:
    intervals, data, free_ends = _starting_points(problem)
    for cosines, ends, condition in fourier.fit_cosines(data, problem.degree, intervals, free_ends):
        yield Solution(cosines.evaluate, cosines.parameters(), condition, ends)


def _fit_harmonic(problem: Problem) -> Iterator[Solution]:
    assert problem.interval is not None
    cosines, condition = fourier.fit_harmonics(problem.data, problem.degree, problem.interval)
    yield Solution(cosines.evaluate, cosines.harmonic_parameters(), condition)


def _fit_rational(problem: Problem) -> Iterator[Solution]:
    intervals, data, free_ends = _starting_points(problem)
    top = problem.degree
    below = top - 1 if problem.denominator_degree is None else problem.denominator_degree
    degrees = [(degree, max(below - (top - degree), 0)) for degree in range(1, top + 1)]
    for quotient, ends, condition in rational.fit_quotients(data, degrees, intervals, free_ends):
        parameters = {"numerator": quotient.numerator}
        if len(quotient.denominator):
            parameters["denominator"] = quotient.denominator
        yield Solution(quotient.evaluate, parameters, condition, ends)


def _fit_rational_splines(problem: Problem) -> Iterator[Solution]:
    for pieces in range(1, problem.degree + 1):
        yield _fit_rational_spline(replace(problem, degree=pieces))


def _fit_rational_spline(problem: Problem) -> Solution:
    intervals, data, _ = _starting_points(problem)
    curve, ends = spline.fit_spline(problem.exact, data, problem.degree, intervals, problem.dtype)
    return Solution(curve.evaluate, curve.parameters(), 1.0, ends)


def _starting_points(problem: Problem) -> tuple[list[Ends], Data, bool]:
    """Intervals to start from, the points that count, and whether the ends of the intervals are refined."""
    assert problem.interval is not None
    if not problem.free_ends:
        return [problem.interval], problem.data if problem.tails else problem.data.within(problem.interval), False
    around = placement.one_place(problem.data)
    if around is not None:
        return [around], problem.data, False
    return [problem.interval, *placement.starting_intervals(problem.data)], problem.data, True


LINEAR = (*polynomial.FAMILIES, "polyrelu")
# Each gives what it finds for degree 1, 2, … (`harmonic`: for the degree of the problem alone).
NONLINEAR: dict[str, Callable[[Problem], Iterator[Solution]]] = {
    "fourier": _fit_fourier,
    "harmonic": _fit_harmonic,
    "tropical": _fit_tropical,
    "tropical_rational": _fit_tropical_rational,
    "rational": _fit_rational,
    "rational_spline": _fit_rational_splines,
}
# Those that are solved, or written down, once: at all points, where a search takes fewer.
DIRECT = (*LINEAR, "rational_spline")

# Families that contain their members of lower degree; of a tropical activation every degree has slopes of its own, of a
# spline every number of pieces its knots.
NESTED = tuple(family for family in (*LINEAR, *NONLINEAR) if family not in ("tropical", "harmonic", "rational_spline"))


def raised(family: str, parameters: dict[str, Array], degree: int) -> dict[str, Array]:
    """The same function with a higher degree, of a family in `NESTED`: more terms are 0, or lines are there twice."""
    if family == "fourier":
        waves = np.arange(len(parameters["frequencies"]) + 1, degree + 1)
        more = {"amplitudes": 0.0 * waves, "phases": 0.0 * waves, "frequencies": waves * parameters["frequencies"][0]}
        return {name: np.append(value, more[name]) if name in more else value for name, value in parameters.items()}
    lengths = {"coefficients": degree + 1, "numerator": degree + 1, "denominator": degree - 1}
    if family == "rational" and "denominator" not in parameters and degree > 1:
        parameters = parameters | {"denominator": np.zeros(0)}
    mode: Any = "edge" if family == "tropical_rational" else "constant"
    return {
        name: np.pad(value, (0, lengths.get(name, degree + 1) - len(value)), mode=mode)
        for name, value in parameters.items()
    }
