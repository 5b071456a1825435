"""Compositions of polynomials: the last one fitted to the target, those inside approximating the sign ever better.

A single polynomial of degree n is off by about .14 half / n on ReLU, and takes ~ 2 √n products. A composition of odd
polynomials that are each minimax approximations of the sign, on the image of the one before (Lee, Lee, No, Kim,
"Minimax approximation of sign function by composite polynomial for homomorphic comparison", 2021), reaches the same
steepness with products in the order of log n: ReLU(x) = x (1 + sign x) / 2, GELU(x) = x Φ(x), SiLU(x) = x σ(x), tanh.
The last polynomial is not theirs: it is fitted to the target itself, for which the inner ones are only a variable.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from polytrope.ops.circuit import Circuit, Cost, count, depth_of, make_circuit
from polytrope.ops.families import MAX_COMPOSED
from polytrope.ops.fitting.certificate import representable
from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.refinement import Ends
from polytrope.ops.fitting.targets import Target, sample

MAX_DEPTH = 16
_INNER = (3, 7, 15)  # degrees of the polynomials inside: the most that their depths allow
_THRESHOLDS = tuple(np.geomspace(2e-4, 0.6, 24).tolist())  # where the sign begins
_GRID = 801
_FINEST = 12_001
_GROUPS = 512
_FINALISTS = 6  # whose last polynomial is fitted again on finer points, or made minimax
_AS_GOOD = 1.1  # times the smallest error: then the fewest products decide
_LAWSON_STEPS = 150
_ROUNDING = 1e-7  # of the target's root mean square: what float32 does not tell apart
_NOTHING = 1e-13  # a coefficient of this share of the largest is 0
_EVERYWHERE = 0.1  # weight of the domain as such beside measured inputs: nothing may go wild where none was seen


@dataclass(frozen=True)
class Chain:
    """x → P_m(… P_1((x - center) / half)), times x with `gate`.

    Args:
        polynomials: Chebyshev coefficients of P_1 … P_m, float64.
        error: what the fit minimised: the largest error, or the weighted root mean square.
        condition: of the least-squares problem of the last polynomial.
    """

    center: float
    half: float
    gate: bool
    polynomials: tuple[Array, ...]
    error: float
    condition: float

    @property
    def degrees(self) -> tuple[int, ...]:
        return tuple(len(numbers) - 1 for numbers in self.polynomials)

    def evaluate(self, x: Array) -> tuple[Array, Array]:
        """Value and slope."""
        value, slope = _run(self.polynomials, (x - self.center) / self.half)
        slope = slope / self.half
        return (x * value, value + x * slope) if self.gate else (value, slope)

    def circuit(self) -> Circuit:
        return make_circuit([part.tolist() for part in self.polynomials], self.center, self.half, self.gate)

    def cost(self) -> Cost:
        return count(self.circuit())


# Points → what rounding adds to the values of a chain there, as it will run; None: more than is tolerated.
Loss = Callable[[Chain, Array], Array | None]


def half_width(domain: Ends, center: float) -> float:
    """The distance from the center to the farther end."""
    return max(domain[1] - center, center - domain[0])


def parameters(polynomials: Sequence[Array]) -> dict[str, Array]:
    """Chebyshev coefficients of P_1 … P_m by the names that `ops.Composition` learns them under."""
    return {f"polynomial_{number}": part for number, part in enumerate(polynomials, start=1)}


def check_depth(depth: int) -> None:
    """Refuse a multiplicative depth that is not in 1…16.

    Raises:
        ValueError: anything else.
    """
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"depth: expected 1 to {MAX_DEPTH}, got {depth}")


@dataclass(frozen=True)
class _Structure:
    """What is tried.

    Args:
        inner: degrees inside.
        degree: of the last polynomial.
        parity: of the terms of the last polynomial beside a constant or u: 0 even, 1 odd; None: all.
    """

    inner: tuple[int, ...]
    degree: int
    gate: bool
    center: float
    parity: int | None


def fit_chain(
    target: Target,
    domain: Ends,
    depth: int,
    measured: tuple[Array, Array] | None = None,
    at_most: float | None = None,
    dtype: torch.dtype = torch.float32,
    loss: Loss | None = None,
) -> Chain:
    """The best composition of at most this multiplicative depth.

    Args:
        measured: points in the domain and weights (of sum 1): the root mean square error under them is minimised; None:
            the largest error on the domain.
        at_most: of those whose error is at most this, the one of the fewest products; None: of those whose error is
            within a tenth of the smallest and what the format tells apart.
        dtype: the format of the coefficients. Those inside are rounded to it before the last polynomial is fitted.
        loss: counts as an error. Where it is never tolerated, `error` of the chain is infinite.

    Raises:
        ValueError: a depth that is not in 1…16, a domain that is none.
    """
    check_depth(depth)
    problem = _problem(target, domain, None if measured is None else _joined(measured, domain), _GRID, dtype)
    tried = _structures(problem, domain, depth, between=at_most is not None)
    found = sorted((chain for structure in tried for chain in _best(problem, structure)), key=_error_of)
    if at_most is not None and found[0].error <= at_most:
        found = sorted((chain for chain in found if chain.error <= at_most), key=_products_of)
    refine = _refitted if measured is not None else _minimax

    @functools.cache
    def fine(points: int) -> _Problem:
        return _problem(target, domain, measured, points, dtype)

    def refined(chain: Chain) -> Chain:
        points = fine(max(_GRID, _points_for(chain)))
        return _as_run(points, refine(points, chain), loss)

    found = sorted(map(refined, found[:_FINALISTS]), key=_error_of)
    limit = max(found[0].error, _AS_GOOD * found[0].error + _told_apart(problem) if at_most is None else at_most)
    return min((chain for chain in found if chain.error <= limit), key=_products_of)


def _as_run(problem: _Problem, chain: Chain, loss: Loss | None) -> Chain:
    """With what rounding does counted as an error."""
    if loss is None:
        return chain
    off = loss(chain, problem.x)
    if off is None:
        return replace(chain, error=math.inf)
    lost = float(np.abs(off).max()) if problem.uniform else math.sqrt(float(problem.weights @ off**2))
    return replace(chain, error=chain.error + lost if problem.uniform else math.hypot(chain.error, lost))


def _told_apart(problem: _Problem) -> float:
    """How much more error is as good: of the largest, what rounds any result in the format."""
    if problem.uniform:
        return torch.finfo(problem.dtype).eps / 2 * float(np.abs(problem.values).max())
    return _ROUNDING * math.sqrt(float(problem.weights @ problem.values**2))


def _joined(measured: tuple[Array, Array], domain: Ends) -> tuple[Array, Array]:
    """Measured inputs that lie close together as one: enough to find a structure."""
    points, weights = measured
    groups = np.unique(np.floor((points - domain[0]) / (domain[1] - domain[0]) * _GROUPS), return_inverse=True)[1]
    total = np.bincount(groups, weights)
    return np.bincount(groups, weights * points) / total, total


def _error_of(chain: Chain) -> float:
    return chain.error


def _products_of(chain: Chain) -> int:
    return chain.cost().products


def _points_for(chain: Chain) -> int:
    """So many that no oscillation falls between them."""
    return min(_FINEST, 3 * (math.prod(chain.degrees) + chain.gate))


def fit_structure(target: Target, domain: Ends, center: float, degrees: Sequence[int], gate: bool) -> list[Array]:
    """The polynomials of a composition of these degrees that is closest to the target on the domain in mean square."""
    points = max(_GRID, min(_FINEST, 3 * math.prod(degrees)))
    problem = _problem(target, domain, None, points, torch.float64)
    structure = _Structure(tuple(degrees[:-1]), degrees[-1], gate, center, None)
    found = _best(problem, structure)
    if not found:
        raise ValueError(f"degree: {list(degrees)}: fewer polynomials inside are exact in float64 already")
    *inner, last = found[0].polynomials
    return [*inner, np.pad(last, (0, degrees[-1] + 1 - len(last)))]


@dataclass(frozen=True)
class _Problem:
    """Points, weights (of sum 1) and values of the target, what the target is around 0; the coefficients' format."""

    domain: Ends
    x: Array
    weights: Array
    values: Array
    uniform: bool
    symmetry: int | None  # f less a line is even (0) or odd (1) around 0; None: neither
    dtype: torch.dtype


def _problem(
    target: Target, domain: Ends, measured: tuple[Array, Array] | None, points: int, dtype: torch.dtype
) -> _Problem:
    low, high = domain
    x = _grid(low, high, points)
    weights = np.full(len(x), 1.0 / len(x))
    if measured is not None:
        inputs, counts = measured
        uniform = np.gradient(x) / (high - low)
        x, weights = np.concatenate([x, inputs]), np.concatenate([_EVERYWHERE * uniform, counts / counts.sum()])
        order = np.argsort(x, kind="stable")
        x, weights = x[order], weights[order] / weights.sum()
    values = sample(target, x)[0]
    return _Problem(domain, x, weights, values, measured is None, _symmetry(target, min(high, -low)), dtype)


def _grid(low: float, high: float, points: int) -> Array:
    """Dense at both ends and around 0."""
    half = max(high, -low, (high - low) / 2)
    arc = (low + high) / 2 - (high - low) / 2 * np.cos(np.linspace(0.0, np.pi, points))
    near = half * np.geomspace(1e-5, 1.0, _GRID // 2)
    x = np.unique(np.concatenate([arc, near, -near, [0.0]]))
    return np.asarray(x[(x >= low) & (x <= high)])


def _symmetry(target: Target, half: float) -> int | None:
    """Of f less a line on [-half, half]; what is left of a longer side can be continued either way."""
    if half <= 0.0:
        return None
    x = np.linspace(half / 64, half, 64)
    right, left = sample(target, x)[0], sample(target, -x)[0]
    scale = 1e-12 * max(1.0, float(np.abs(right).max()), float(np.abs(left).max()))
    odd, even = (right - left) / 2, (right + left) / 2
    if np.abs(odd - odd[-1] / x[-1] * x).max() <= scale:
        return 0
    return 1 if np.abs(even - even[0]).max() <= scale else None


def _structures(problem: _Problem, domain: Ends, depth: int, between: bool) -> Iterator[_Structure]:
    """Of exactly this depth, as long as there are longer polynomials; `between`: with degrees between powers of two."""
    middle, symmetry = (domain[0] + domain[1]) / 2, problem.symmetry
    around_zero = domain[0] < 0.0 < domain[1]
    for gate in (False, True):
        parity = symmetry if symmetry is None else (1 - symmetry if gate else symmetry)
        for last in range(1, MAX_COMPOSED.bit_length()):
            left = depth - last - gate
            if left < 0:
                continue
            for degree in (1 << last, *([3 << last - 2] if between and last > 1 else [])):
                if left == 0 or depth_of(MAX_COMPOSED) == last:
                    yield _Structure((), degree, gate, middle, parity if middle == 0.0 else None)
                    if around_zero and middle != 0.0 and parity is not None:
                        yield _Structure((), degree, gate, 0.0, parity)
                if around_zero and (gate or parity == 1):
                    for inner in _inner_degrees(left):
                        yield _Structure(inner, degree, gate, 0.0, parity)


def _inner_degrees(depth: int, smallest: int = 0) -> Iterator[tuple[int, ...]]:
    """Not falling, of this depth together, at least one."""
    for degree in _INNER:
        rest = depth - depth_of(degree)
        if degree >= smallest and rest >= 0:
            if rest == 0:
                yield (degree,)
            for others in _inner_degrees(rest, degree):
                yield (degree, *others)


def _best(problem: _Problem, structure: _Structure) -> list[Chain]:
    """The least-squares fits of this structure: the best over the thresholds, if there is one."""
    half = half_width(problem.domain, structure.center)
    u = (problem.x - structure.center) / half
    kept = _kept(structure)
    found: dict[int, Chain] = {}

    def look(indices: Iterable[int]) -> None:
        for index in indices:
            if 0 <= index < len(_THRESHOLDS) and index not in found:
                inner = _rounded_signs(structure.inner, _THRESHOLDS[index], problem.dtype)
                if inner is not None:
                    chain = Chain(structure.center, half, structure.gate, inner, math.inf, math.inf)
                    found[index] = _with_last(problem, chain, _values(inner, u), structure.degree, kept)

    look(range(1, len(_THRESHOLDS), 4) if structure.inner else [0])
    for step in (2, 1) if structure.inner and found else ():
        best = min(found, key=lambda index: found[index].error)
        look((best - step, best + step))
    return [min(found.values(), key=_error_of)] if found else []


def _columns(problem: _Problem, v: Array, degree: int, gate: bool, kept: Array) -> Array:
    columns = np.polynomial.chebyshev.chebvander(v, degree)[:, kept]
    return np.asarray(columns * problem.x[:, None] if gate else columns)


def _kept(structure: _Structure) -> Array:
    """Numbers of the terms of the last polynomial."""
    order = np.arange(structure.degree + 1)
    if structure.parity is None:
        return order
    linear = order == (1 - structure.parity)  # the line, or the constant
    return np.flatnonzero((order % 2 == structure.parity) | linear)


def _with_last(problem: _Problem, chain: Chain, v: Array, degree: int, kept: Array) -> Chain:
    """Least squares of the terms `kept` of the last polynomial; v: what the others make of the points."""
    columns = _columns(problem, v, degree, chain.gate, kept)
    roots = np.sqrt(problem.weights)
    weighted = np.column_stack([columns, problem.values]) * roots[:, None]
    triangle: Array = np.asarray(np.linalg.qr(weighted, mode="r"))
    solution, _, _, singular = np.linalg.lstsq(triangle[:, :-1], triangle[:, -1], rcond=None)
    off = problem.values - columns @ solution
    error = float(np.abs(off).max()) if problem.uniform else math.sqrt(float(problem.weights @ off**2))
    last = np.zeros(degree + 1)
    last[kept] = solution
    last[np.abs(last) <= _NOTHING * np.abs(last).max()] = 0.0
    last = last[: max(1, int(np.flatnonzero(last).max(initial=0))) + 1]
    condition = float(singular[0] / singular[-1]) if singular[-1] > 0 else math.inf
    return replace(chain, polynomials=(*chain.polynomials, last), error=error, condition=condition)


def _terms(chain: Chain) -> Array:
    """Numbers of the terms of the last polynomial that are not 0; of the zero polynomial the constant."""
    last = chain.polynomials[-1]
    return np.flatnonzero(last) if last.any() else np.zeros(1, dtype=np.int64)


def _refitted(problem: _Problem, chain: Chain) -> Chain:
    """With the last polynomial fitted on these points."""
    kept = _terms(chain)
    v = _values(chain.polynomials[:-1], (problem.x - chain.center) / chain.half)
    inner = replace(chain, polynomials=chain.polynomials[:-1])
    return _with_last(problem, inner, v, chain.degrees[-1], kept)


def _minimax(problem: _Problem, chain: Chain) -> Chain:
    """The last polynomial of the smallest largest error at the points, by Lawson's algorithm (1961).

    Weighted least squares whose weights are multiplied by the errors, until only the alternating extremes keep any.
    """
    u = (problem.x - chain.center) / chain.half
    v = _values(chain.polynomials[:-1], u)
    kept = _terms(chain)
    columns = _columns(problem, v, chain.degrees[-1], chain.gate, kept)
    basis, triangle = np.linalg.qr(columns)
    weights = np.full(len(u), 1.0 / len(u))
    best = (math.inf, chain.polynomials[-1][kept])
    for _ in range(_LAWSON_STEPS):
        roots = np.sqrt(weights)
        weighted = basis * roots[:, None]
        try:
            solution = np.linalg.solve(weighted.T @ weighted, weighted.T @ (problem.values * roots))
        except np.linalg.LinAlgError:
            break
        off = np.abs(problem.values - basis @ solution)
        if off.max() < best[0]:
            best = (float(off.max()), np.linalg.solve(triangle, solution))
        if not off.any():
            break
        weights = weights * off
        weights /= weights.sum()
    last = np.zeros_like(chain.polynomials[-1])
    last[kept] = best[1]
    return replace(chain, polynomials=(*chain.polynomials[:-1], last), error=best[0])


def _values(polynomials: Sequence[Array], u: Array) -> Array:
    """Of the composition."""
    for numbers in polynomials:
        u = np.polynomial.chebyshev.chebval(u, numbers)
    return u


def _run(polynomials: Sequence[Array], u: Array) -> tuple[Array, Array]:
    """Value and slope of the composition."""
    value, slope = u, np.ones_like(u)
    for numbers in polynomials:
        slope = slope * np.polynomial.chebyshev.chebval(value, np.polynomial.chebyshev.chebder(numbers))
        value = np.polynomial.chebyshev.chebval(value, numbers)
    return value, slope


@functools.lru_cache(maxsize=4096)
def sign_polynomials(degrees: tuple[int, ...], threshold: float) -> tuple[Array, ...] | None:
    """Odd polynomials whose composition is close to 1 on [threshold, 1] and to -1 on [-1, -threshold].

    Each is a minimax approximation on what the one before makes of that, and scaled so that it stays in [-1, 1].

    Returns:
        Their Chebyshev coefficients, innermost first; None where a shorter composition is exact in float64 already.
    """
    found = []
    for degree in degrees:
        if threshold > 1.0 - 1e-6:
            return None
        numbers, error = odd_minimax(degree, threshold)
        found.append(numbers / (1.0 + error))
        threshold = (1.0 - error) / (1.0 + error)
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def _rounded_signs(degrees: tuple[int, ...], threshold: float, dtype: torch.dtype) -> tuple[Array, ...] | None:
    found = sign_polynomials(degrees, threshold)
    return None if found is None else tuple(representable(numbers, dtype) for numbers in found)


def odd_minimax(degree: int, threshold: float) -> tuple[Array, float]:
    """The odd polynomial closest to 1 on [threshold, 1], and its largest error there, by Remez's exchange algorithm."""
    terms = (degree + 1) // 2
    points = threshold + (1.0 - threshold) * (1.0 - np.cos(np.linspace(0.0, np.pi, 2001))) / 2
    columns = np.polynomial.chebyshev.chebvander(points, degree)[:, 1::2]
    alternating = (-1.0) ** np.arange(terms + 1)
    chosen = np.linspace(0, len(points) - 1, terms + 1).round().astype(int)
    numbers = np.zeros(degree + 1)
    error = math.inf
    for _ in range(60):
        system = np.column_stack([columns[chosen], alternating])
        solution = np.linalg.lstsq(system, np.ones(terms + 1), rcond=None)[0]
        off = 1.0 - columns @ solution[:-1]
        numbers[1::2], error = solution[:-1], float(np.abs(off).max())
        runs = np.split(np.arange(len(points)), np.flatnonzero(np.diff(off >= 0.0)) + 1)
        extremes = [int(run[np.argmax(np.abs(off[run]))]) for run in runs]
        while len(extremes) > terms + 1:  # the smaller one of the ends goes
            extremes.pop(0 if abs(off[extremes[0]]) < abs(off[extremes[-1]]) else -1)
        if len(extremes) < terms + 1 or list(chosen) == extremes:
            break
        chosen = np.array(extremes)
    return numbers, error
