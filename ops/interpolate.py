"""Fit a learnable activation to a given function in closed form, by matching value *and* slope, with a certificate.

`fit` minimises ∫ w(x) (|f - F|² + λ |f' - F'|²) dx (Sobolev least squares) or interpolates value and slope at nodes
(confluent Hermite interpolation). With measured inputs as the weight, the tangent lines outside the interval are part
of what is minimised, and `interval="best"` chooses where they begin. How each family is solved: `fitting.solvers`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from polytrope.ops import families
from polytrope.ops.families import check_degree, largest_degree
from polytrope.ops.fitting import placement, polynomial, quadrature
from polytrope.ops.fitting.certificate import Built, Certificate, Inputs, certify, root_mean_square
from polytrope.ops.fitting.curves import Array, Curve, with_tangents
from polytrope.ops.fitting.measured_basis import in_measured_basis
from polytrope.ops.fitting.refinement import Data, Ends
from polytrope.ops.fitting.solvers import (
    DIRECT,
    LINEAR,
    NESTED,
    NONLINEAR,
    Condition,
    Problem,
    Solution,
    columns_of,
    fit_linear,
    fit_nonlinear,
    interpolate,
    raised,
)
from polytrope.ops.fitting.targets import Target, find_kinks, resolve_target, sample
from polytrope.ops.functional import check_interval
from polytrope.ops.modules import LEARNABLE, LearnableActivation, build_activation

__all__ = ["FAMILIES", "Certificate", "Condition", "Fit", "fit", "fit_to_error", "parameter_count"]

FAMILIES = tuple(name for name in LEARNABLE if name in LINEAR or name in NONLINEAR)
# The families that `auto` chooses from, the fastest first; Chebyshev and Legendre are the polynomials of Hermite again.
FAMILIES_BY_COST = ("hermite", "polyrelu", "tropical", "rational", "tropical_rational", "fourier")
_FEW = 128  # points of a histogram that a search is done on
_ROUNDED_POINTS = 251  # of an interval, at which rounding is measured before anything is certified
_WIDER = tuple(1.5**k for k in range(1, 9))


@dataclass(frozen=True)
class Fit:
    """A fitted activation.

    Args:
        config: for `build_activation`.
        parameters: the module's learnable tensors by name, float64.
        certificate: how good it is, as a module of `dtype`.
        curve: x → value and slope in float64, independent of the module.
        dtype: the floating-point format it is for.
    """

    config: dict[str, Any]
    parameters: dict[str, Array]
    certificate: Certificate = field(repr=False)
    curve: Curve = field(repr=False, compare=False)
    dtype: torch.dtype = torch.float32

    @property
    def coefficients(self) -> Array:
        """All learnable numbers in one row; for a polynomial, its coefficients."""
        return np.concatenate([np.ravel(value) for value in self.parameters.values()])

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The activation module with these parameters; without `dtype` the one that the certificate is of."""
        return built_module(self.config, self.parameters, self.dtype if dtype is None else dtype)


class RoundingError(ValueError):
    """What a formula loses to rounding is too much for what it computes."""


def fit(
    target: str | Target | nn.Module,
    family: str = "hermite",
    degree: int = 8,
    *,
    interval: tuple[float, float] | Literal["best"] | None = (-4.0, 4.0),
    weight: quadrature.Weight = "uniform",
    importance: quadrature.Importance | None = None,
    derivative_weight: float = 1.0,
    constraints: Sequence[str | Condition] = (),
    method: Literal["least_squares", "interpolation"] = "least_squares",
    nodes: Sequence[float] | None = None,
    derivative: Target | None = None,
    tails: bool = True,
    held_out: Array | None = None,
    basis: quadrature.Measure | None = None,
    dtype: torch.dtype = torch.float32,
    rounding_tolerance: float | None = 1e-3,
) -> Fit:
    """The member of a family that is closest to `target` in value and slope.

    Args:
        target: a name (`gelu`, `gelu_tanh`, `relu`, `silu`, `tanh`, …), an elementwise function of a tensor, or an
            activation module.
        family: one of `FAMILIES`.
        degree: 1…16. `rational`: of the numerator, the denominator has one less. Tropical families: lines less one.
            `rational_spline`: pieces, 1…64.
        interval: where to fit. None: the whole line (polynomials with `weight="gaussian"`), or all measured inputs.
            `best`, for measured inputs: where polynomial and tangent lines together fit best.
        weight: `uniform`, `gaussian` (standard normal), a density as a function of an array, or measured inputs as
            (points, counts). Measured inputs outside the interval count as well, with the tangent lines.
        importance: how much a measured input counts beside its count, a function of an array of inputs. It decides
            what is minimised; what is certified is of the inputs as often as they were seen.
        derivative_weight: λ ≥ 0; 0 matches values only.
        constraints: what must hold exactly (polynomials, PolyReLU): `ends` (value and slope at both ends of the
            interval), `end_values`, `origin` (F(0) = f(0)), or pairs (x, "value") and (x, "slope").
        method: `least_squares`, or `interpolation`: value and slope at `nodes` (polynomials).
        nodes: degree // 2 + 1 points; default: Chebyshev nodes. With an even degree the middle one has no slope.
        derivative: f', where autograd cannot give it.
        tails: tangent lines outside the interval, for families that can have them.
        held_out: raw inputs that are not in the weight; the certificate's root mean square counts them too.
        basis: (points, counts): a polynomial is written in polynomials that are orthonormal on these inputs, as far as
            they are in the interval: E[F²] there is the sum of squared coefficients. None: in the family's own.
        dtype: the floating-point format that the module is for: of its parameters and inputs.
        rounding_tolerance: largest rounding error of the formula in this format, relative to the largest |f| on the
            interval, beyond the rounding of any result in it; None: any. With measured inputs a degree that loses more
            is given up for a wider interval, or the best lower degree.

    With measured inputs no degree has a larger root mean square error (under the importance, where there is one) than a
    lower one, tropical, splines and interpolation excepted: where it would have, the lower one is returned, further
    terms 0.

    Raises:
        ValueError: an argument that is not as described; a target that is not finite or not elementwise; more
            constraints than coefficients; a degree too high for the format on this interval.
    """
    degree = check_degree(degree, largest_degree(family))
    if family == "auto":
        raise ValueError("family: auto chooses by an error: fit_to_error(target, 'auto', error)")
    task = _task(
        target,
        interval=interval,
        weight=weight,
        importance=importance,
        derivative_weight=derivative_weight,
        constraints=constraints,
        method=method,
        nodes=nodes,
        derivative=derivative,
        tails=tails,
        held_out=held_out,
        basis=basis,
        dtype=dtype,
        rounding_tolerance=rounding_tolerance,
    )
    _check_family(task, family)
    if not task.is_measured or family not in NESTED:
        return _certified(task, _only(task, family, degree))
    best: _Candidate | None = None
    refusals: dict[int, ValueError] = {}
    for found in _ascending(task, family, degree, refusals):
        best = found
    if best is None:
        raise refusals[degree]
    return _certified(task, best)


def fit_to_error(
    target: str | Target | nn.Module,
    family: str,
    error: float,
    *,
    degrees: Sequence[int] = range(1, 17),
    **options: Any,
) -> Fit:
    """The fit of the smallest degree whose weighted root mean square error is at most `error`.

    Args:
        family: one of `FAMILIES`; or `auto`: of those and of all degrees the fit with the fewest parameters, and of
            equally many the one that is computed fastest.
        options: of `fit`, without the degree.

    Raises:
        ValueError: no degree reaches it; names the best one, and why others were refused. No degrees, or one that is
            not in 1…16.
    """
    task, families = _search(target, family, degrees, options)
    refusals: dict[str, dict[int, ValueError]] = {name: {} for name in families}
    ladders = {name: _ascending(task, name, max(degrees), refusals[name]) for name in families}
    best: _Candidate | None = None
    # In this order every ladder is climbed from its first degree on.
    for _, _, name, degree in sorted(
        (parameter_count(name, degree), rank, name, degree)
        for rank, name in enumerate(families)
        for degree in range(1, max(degrees) + 1)
    ):
        found = next(ladders[name])
        if found is None or degree not in degrees:
            continue
        if found.rms <= error:
            return _certified(task, found)
        if best is None or found.rms < best.rms:
            best = found
    reached = "none can be fitted" if best is None else f"{_named(family, best)} has {best.rms:.3g}"
    raise ValueError(
        f"target error: {family} reaches no error of {error:.3g} up to degree {max(degrees)}: {reached}"
        + "".join(_reasons(name, refusals[name]) for name in families)
    )


def families_to_try(target: str | Target | nn.Module, family: str, degrees: Sequence[int], **options: Any) -> list[str]:
    """The families that `fit_to_error` of these arguments chooses from, the fastest first.

    Raises:
        ValueError: an argument that it refuses.
    """
    return _search(target, family, degrees, options)[1]


def _search(
    target: str | Target | nn.Module, family: str, degrees: Sequence[int], options: dict[str, Any]
) -> tuple[_Task, list[str]]:
    """What is asked for, and the families that can do it."""
    if len(degrees) == 0:
        raise ValueError("degrees: expected at least one, got none")
    for degree in degrees:
        check_degree(degree, largest_degree(family), name="degrees")
    of_fit = inspect.signature(fit).parameters.values()
    defaults = {option.name: option.default for option in of_fit if option.kind is option.KEYWORD_ONLY}
    task = _task(target, **defaults | options)
    families = [name for name in FAMILIES_BY_COST if _can(task, name)] if family == "auto" else [family]
    for name in families:
        _check_family(task, name)
    return task, families


def _reasons(family: str, refusals: dict[int, ValueError]) -> str:
    """The degrees that were refused, and why the first of them was."""
    if not refusals:
        return ""
    first = next(iter(refusals.values()))
    return f"; refused: {family} of degree {', '.join(map(str, refusals))} ({first})"


def _named(family: str, found: _Candidate) -> str:
    degree = f"degree {found.config['degree']}"
    return f"{found.config['name']} of {degree}" if family == "auto" else degree


@dataclass(frozen=True)
class _Task:
    """What is asked for, checked, and the target at the points: the same for all families and degrees.

    Args:
        exact: the target.
        data: at all points, with what is minimised as their weights.
        few: at fewer points, to search on.
        kinks: of the target.
        interval: where to fit; None: the whole line. With `free_ends` the range of the inputs.
        reach: smallest and largest input; None: those of the interval.
        inputs: what errors are certified on.
        unseen_weights: how much the unseen ones among them count when fits are compared, of sum 1; None: all alike.
    """

    exact: Curve
    data: Data
    few: Data
    kinks: list[float]
    interval: Ends | None
    free_ends: bool
    reach: Ends | None
    inputs: Inputs
    unseen_weights: Array | None
    constraints: Sequence[str | Condition]
    method: str
    nodes: Sequence[float] | None
    tails: bool
    basis: quadrature.Measure | None
    dtype: torch.dtype
    rounding_tolerance: float | None

    @property
    def is_measured(self) -> bool:
        return self.reach is not None

    def problem(self, family: str, degree: int, interval: Ends | None) -> Problem:
        data = self.data if family in DIRECT or not self.is_measured else self.few
        return Problem(
            family,
            degree,
            interval,
            self.exact,
            data,
            self.kinks,
            self.tails,
            self.free_ends,
            variable=polynomial.natural_variable(family, interval),
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class _Candidate:
    """A fit before its certificate; `rms` is the certificate's.

    Args:
        missed: by which fits of several degrees are compared: `rms`, under the importance where there is one.
    """

    config: dict[str, Any]
    solution: Solution
    curve: Curve
    built: Built
    kinks: list[float]
    shown: Ends
    rms: float
    missed: float


def _task(
    target: str | Target | nn.Module,
    *,
    interval: tuple[float, float] | Literal["best"] | None,
    weight: quadrature.Weight,
    importance: quadrature.Importance | None,
    derivative_weight: float,
    constraints: Sequence[str | Condition],
    method: str,
    nodes: Sequence[float] | None,
    derivative: Target | None,
    tails: bool,
    held_out: Array | None,
    basis: quadrature.Measure | None,
    dtype: torch.dtype,
    rounding_tolerance: float | None,
) -> _Task:
    """Check the arguments of `fit`, as far as no family is concerned."""
    inputs = quadrature.measured(weight) if isinstance(weight, tuple) else None
    if importance is not None and inputs is None:
        raise ValueError("importance: is of measured inputs; give them as weight=(points, counts)")
    if not (math.isfinite(derivative_weight) and derivative_weight >= 0):
        raise ValueError(f"derivative_weight: expected a number ≥ 0, got {derivative_weight}")
    if method not in ("least_squares", "interpolation"):
        raise ValueError(f"method: expected least_squares or interpolation, got {method!r}")
    ends: Ends | None
    if interval == "best" and (inputs is None or not tails or method != "least_squares"):
        raise ValueError("interval: 'best' needs measured inputs as the weight, tails, and least squares")
    if inputs is not None and (interval is None or interval == "best"):
        ends = check_interval(_widened(float(inputs[0][0]), float(inputs[0][-1])))
    else:
        assert interval != "best"
        ends = check_interval(interval)
    if ends is None and (weight != "gaussian" or method != "least_squares"):
        raise ValueError("interval: None (the whole line) is for polynomials with weight='gaussian' by least squares")
    function = resolve_target(target)

    def exact(x: Array) -> tuple[Array, Array]:
        return sample(function, x, derivative)

    low, high = ends or (-quadrature.GAUSSIAN_REACH, quadrature.GAUSSIAN_REACH)
    if inputs is not None:
        low, high = min(low, float(inputs[0][0])), max(high, float(inputs[0][-1]))
    kinks = find_kinks(function, low, high, derivative)
    if inputs is None:
        assert not isinstance(weight, tuple)
        inputs, reach = quadrature.nodes(low, high, kinks, weight), None
    else:
        reach = (low, high)
    unseen = np.zeros(0) if held_out is None else np.asarray(held_out, dtype=np.float64)
    if reach is not None and len(unseen):
        reach = (min(reach[0], float(unseen.min())), max(reach[1], float(unseen.max())))
    points, counts = inputs
    weights = counts if importance is None else quadrature.weighed(points, counts, importance)
    unseen_weights = None
    if importance is not None and len(unseen):
        unseen_weights = quadrature.weighed(unseen, np.ones_like(unseen), importance)
    data = Data(points, weights, *exact(points), derivative_weight)
    return _Task(
        exact=exact,
        data=data,
        few=data if reach is None else placement.compressed(data, _FEW, exact),
        kinks=kinks,
        interval=ends,
        free_ends=interval == "best",
        reach=reach,
        inputs=Inputs.of(exact, dtype, inputs, unseen),
        unseen_weights=unseen_weights,
        constraints=constraints,
        method=method,
        nodes=nodes,
        tails=tails,
        basis=basis,
        dtype=dtype,
        rounding_tolerance=rounding_tolerance,
    )


def _check_family(task: _Task, family: str) -> None:
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    is_polynomial = family in polynomial.FAMILIES
    if task.interval is None and not is_polynomial:
        raise ValueError("interval: None (the whole line) is for polynomials with weight='gaussian' by least squares")
    if task.basis is not None and not is_polynomial:
        raise ValueError(
            f"basis: orthonormal on inputs are polynomials ({', '.join(polynomial.FAMILIES)}), not {family}"
        )
    if family == "rational_spline" and not task.tails:
        raise ValueError(
            "tails: a rational_spline goes on along straight lines; leave tails out, or fit another family"
        )
    constrained = bool(task.constraints) and family not in LINEAR
    if constrained or (not is_polynomial and (task.method != "least_squares" or task.nodes is not None)):
        raise ValueError(f"constraints, nodes and interpolation are for polynomials, not for {family}")


def _can(task: _Task, family: str) -> bool:
    try:
        _check_family(task, family)
    except ValueError:
        return False
    return True


def _only(task: _Task, family: str, degree: int) -> _Candidate:
    """The fit of this very degree."""
    problem = task.problem(family, degree, task.interval)
    if family not in LINEAR:
        return _candidate(task, problem, fit_nonlinear(problem))
    return _candidate(task, problem, _linear(task, problem))


def _linear(task: _Task, problem: Problem) -> Solution:
    if task.method == "interpolation":
        return interpolate(problem, task.nodes)
    return fit_linear(problem, _conditions(task.constraints, problem.interval))


def _ascending(task: _Task, family: str, highest: int, refusals: dict[int, ValueError]) -> Iterator[_Candidate | None]:
    """For degree 1, 2, … `highest` the best of all fits up to that degree, written with that degree: none is worse than
    the one before. None as long as all were refused; `refusals` gets the reasons.
    """
    is_nested = family in NESTED and task.method != "interpolation"  # whose conditions are those of this very degree
    best: _Candidate | None = None
    for degree, attempt in enumerate(_attempts(task, family, highest), start=1):
        try:
            found = attempt()
            if best is None or found.missed < best.missed or not is_nested:
                best = found
        except ValueError as error:
            refusals[degree] = error
        if best is not None and best.config["degree"] < degree:
            best = _raised(best, degree) if is_nested else None
        yield best


def _attempts(task: _Task, family: str, highest: int) -> Iterator[Callable[[], _Candidate]]:
    """How to fit each degree from 1 on."""
    if family not in LINEAR:
        problem = task.problem(family, highest, task.interval)
        solutions = NONLINEAR[family](problem)
        for degree in range(1, highest + 1):
            try:
                solution = next(solutions)
            except ValueError as error:  # the search has ended with it: so have all further degrees
                for _ in range(degree, highest + 1):
                    yield partial(_refuse, error)
                return
            yield partial(_candidate, task, replace(problem, degree=degree), solution)
        return
    intervals: Sequence[Ends | None] = [task.interval] * (highest + 1)
    if task.free_ends:

        def columns(low: Array, high: Array, x: Array) -> tuple[Array, Array]:
            return columns_of(family, families.MAX_DEGREE, (low, high), tails=True)(x)

        intervals = placement.best_intervals(task.few, task.kinks, columns, highest)
    for degree in range(1, highest + 1):
        yield partial(_robust, task, task.problem(family, degree, intervals[degree]))


def _refuse(error: ValueError) -> _Candidate:
    raise error


def _robust(task: _Task, problem: Problem) -> _Candidate:
    try:
        return _candidate(task, problem, _linear(task, problem))
    except RoundingError:
        if not task.free_ends or problem.interval is None:
            raise
        # Around a kink the best interval shrinks until the format cannot take it: the next wider one that it can.
        middle, half = (problem.interval[0] + problem.interval[1]) / 2, (problem.interval[1] - problem.interval[0]) / 2
        # Never beyond the inputs: what is certified on the interval is to be a statement about them.
        assert task.interval is not None
        least, most = task.interval
        for factor in _WIDER:
            ends = (max(middle - factor * half, least), min(middle + factor * half, most))
            wider = task.problem(problem.family, problem.degree, ends)
            with contextlib.suppress(RoundingError):
                return _candidate(task, wider, _linear(task, wider))
        raise


def _raised(found: _Candidate, degree: int) -> _Candidate:
    """The same function with a higher degree."""
    family = found.config["name"]
    parameters = raised(family, found.solution.parameters, degree)
    return replace(
        found,
        config=found.config | {"degree": degree},
        solution=replace(found.solution, parameters=parameters),
    )


def _candidate(task: _Task, problem: Problem, solution: Solution) -> _Candidate:
    """The solution as a module.

    Raises:
        RoundingError: the format cannot take it.
    """
    ends = solution.interval or problem.interval
    config: dict[str, Any] = {"name": problem.family, "degree": problem.degree}
    if problem.variable is not None:
        config["variable"] = list(problem.variable)
    curve = solution.curve
    if task.tails and ends is not None and LEARNABLE[problem.family].accepts_interval:
        curve = with_tangents(curve, *ends)
        # At or below 0 a PolyReLU is a constant, and so are its tangents: an interval there changes nothing.
        if problem.family != "polyrelu" or ends[1] > 0.0:
            config["interval"] = list(ends)
    if task.basis is not None:
        config["learnable_recurrence"] = True
    module = built_module(config, _parameters(task, config, solution), task.dtype)
    built = Built.of(module, task.dtype)
    # On the whole line the maxima are those within four standard deviations: a polynomial leaves any bound further out.
    shown = ends or (-4.0, 4.0)
    kinks = [kink for kink in (*task.kinks, *module.kinks()) if shown[0] < kink < shown[1]]
    errors = task.inputs.errors(built)
    rms = root_mean_square(errors, task.inputs.weights)
    missed = root_mean_square(errors, task.data.weights, task.unseen_weights)
    found = _Candidate(config, solution, curve, built, kinks, shown, rms, missed)
    if task.rounding_tolerance is not None:
        # On the interval, not at the inputs: where they are all 0, so is a GELU of them.
        x = np.linspace(*shown, _ROUNDED_POINTS)
        lost, largest = (float(np.abs(part).max()) for part in (built.rounding(curve, x), task.exact(x)[0]))
        if not built.tolerates(lost, largest, task.rounding_tolerance):
            raise RoundingError(
                f"degree: {problem.family} of degree {problem.degree} on ({shown[0]:.4g}, {shown[1]:.4g}) loses "
                f"{lost:.2g} to rounding in {str(task.dtype).removeprefix('torch.')}; take a lower degree or another "
                "interval"
            )
    return found


def _certified(task: _Task, found: _Candidate) -> Fit:
    certificate = certify(
        task.exact,
        found.curve,
        found.built,
        found.shown,
        found.kinks,
        (task.data.x, task.inputs.weights),
        found.rms,
        task.reach or found.shown,
        task.data.derivative_weight,
        found.solution.condition,
    )
    return Fit(found.config, _parameters(task, found.config, found.solution), certificate, found.curve, task.dtype)


def _parameters(task: _Task, config: dict[str, Any], solution: Solution) -> dict[str, Array]:
    """Of the module: the solution's, in the basis that is asked for."""
    if task.basis is None:
        return solution.parameters
    ends, variable = config.get("interval"), config.get("variable")
    return in_measured_basis(
        solution.parameters["coefficients"],
        config["name"],
        task.basis,
        None if ends is None else (ends[0], ends[1]),
        None if variable is None else (variable[0], variable[1]),
        task.dtype,
    )


def parameter_count(family: str, degree: int) -> int:
    """Learnable numbers of one activation."""
    if family == "rational_spline":  # whose knots have fixed ends, which the packed ones do not say
        return 3 * degree + 3
    below = degree - 1 if family == "rational" else 0
    return families.parameter_count(families.Formula(families.Family[family.upper()], degree, below))


def _conditions(constraints: Sequence[str | Condition], ends: tuple[float, float] | None) -> list[Condition]:
    """Constraints as (x, value or slope) pairs, each once."""
    named: dict[str, list[Condition]] = {"origin": [(0.0, "value")]}
    if ends is not None:
        named["end_values"] = [(end, "value") for end in ends]
        named["ends"] = named["end_values"] + [(end, "slope") for end in ends]
    result: list[Condition] = []
    for entry in constraints:
        if isinstance(entry, str):
            if entry not in named:
                raise ValueError(f"constraints: expected {', '.join(named)} or (x, 'value' | 'slope'), got {entry!r}")
            result += named[entry]
        elif len(entry) == 2 and entry[1] in ("value", "slope") and math.isfinite(entry[0]):
            result.append((float(entry[0]), entry[1]))
        else:
            raise ValueError(f"constraints: expected (x, 'value' | 'slope'), got {entry!r}")
    return list(dict.fromkeys(result))


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def built_module(config: dict[str, Any], parameters: dict[str, Array], dtype: torch.dtype) -> LearnableActivation:
    """The activation of a configuration, with these parameters in this floating-point format.

    Raises:
        ValueError: parameters that are not those that the module learns.
    """
    module = build_activation(config).to(dtype)
    assert isinstance(module, LearnableActivation)
    own = dict(module.named_parameters())
    if set(own) != set(parameters):
        raise ValueError(f"{config['name']}: the module learns {sorted(own)}, the fit gives {sorted(parameters)}")
    with torch.no_grad():
        for name, value in parameters.items():
            own[name].copy_(torch.from_numpy(np.asarray(value)).reshape(own[name].shape))
    return module
