"""Polynomials that are orthonormal on measured inputs: their recurrence, and a given polynomial in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.polynomial import Variable, from_powers, to_exact_powers
from polytrope.ops.fitting.quadrature import Measure, measured

_ORTHONORMAL = 1e-6  # what is left of rounding where there are enough different inputs is far below


@dataclass(frozen=True)
class Recurrence:
    """p_0 = 1 and √β_{k+1} p_{k+1} = (x - γ_k) p_k - √β_k p_{k-1}, orthonormal on inputs.

    Args:
        gammas: γ_0 … γ_{degree-1}, float64.
        betas: β_1 … β_degree, float64, above 0.
    """

    gammas: Array
    betas: Array

    def parameters(self) -> dict[str, Array]:
        """`scales`, `shifts` and `couplings` `[degree]` of `functional.favard`; the first coupling has no effect."""
        roots = np.sqrt(self.betas)
        return {
            "scales": 1.0 / roots,
            "shifts": -self.gammas / roots,
            "couplings": np.concatenate([[0.0], roots[:-1]]) / roots,
        }

    def evaluate(self, x: Array) -> Array:
        """p_0(x) … p_degree(x): `[*x, degree + 1]`."""
        roots = np.sqrt(self.betas)
        values = [np.ones_like(x)]
        for k, gamma in enumerate(self.gammas):
            before = roots[k - 1] * values[k - 1] if k else 0.0
            values.append(((x - gamma) * values[k] - before) / roots[k])
        return np.stack(values, axis=-1)


def recurrence_of(points: Array, weights: Array, degree: int) -> Recurrence:
    """Stieltjes' procedure: γ_k = ∫ x p_k² and β_{k+1} = ∫ ((x - γ_k) p_k - √β_k p_{k-1})², one degree after the other.

    Gautschi, "Orthogonal Polynomials: Computation and Approximation", 2004, section 2.2.3.

    Args:
        points: `[n]`, float64, different from each other.
        weights: `[n]`, above 0, of sum 1.

    Raises:
        ValueError: fewer different inputs than there are polynomials, or so few more that rounding decides.
    """
    needed = f"an orthonormal basis of degree {degree} needs more than {degree}"
    advice = "take a lower degree or more samples"
    if len(points) <= degree:
        raise ValueError(f"basis: {len(points)} different inputs, and {needed}; {advice}")
    gammas, betas = np.empty(degree), np.empty(degree)
    now, before, root = np.ones_like(points), np.zeros_like(points), 0.0
    for k in range(degree):
        gammas[k] = weights @ (points * now**2)
        following = (points - gammas[k]) * now - root * before
        betas[k] = weights @ following**2
        if not betas[k] > 0.0:
            break
        root = float(np.sqrt(betas[k]))
        now, before = following / root, now
    found = Recurrence(gammas, betas)
    if (betas > 0.0).all():
        values = found.evaluate(points)
        gram = values.T @ (weights[:, None] * values)
        if np.abs(gram - np.eye(degree + 1)).max() <= _ORTHONORMAL:
            return found
    raise ValueError(f"basis: the inputs lie at {len(points)} points that rounding hardly tells apart; {advice}")


def in_measured_basis(
    coefficients: Array,
    family: str,
    measure: Measure,
    interval: tuple[float, float] | None,
    variable: Variable | None,
    dtype: torch.dtype,
) -> dict[str, Array]:
    """A polynomial as parameters of `functional.favard`, whose basis is orthonormal on the inputs in the interval.

    The mean of F² over these inputs is then the sum of squared coefficients. The function is the same: the recurrence
    is rounded to the format first, and the coefficients in it are found in exact arithmetic and rounded once.

    Args:
        coefficients: `[degree + 1]`, in the family's basis of the variable.
        measure: (points, counts). Outside the interval F goes on along tangents, and is none of these polynomials.
        interval: None: the whole line.
        variable: (shift, scale), as of the module; None: x itself.
        dtype: of the module's parameters.

    Raises:
        ValueError: too few different inputs in the interval.
    """
    points, weights = measured(measure)
    if interval is not None:
        inside = (points >= interval[0]) & (points <= interval[1])
        points, weights = points[inside], weights[inside]
    shift, scale = variable or (0.0, 1.0)
    points, places = np.unique((points - shift) / scale, return_inverse=True)
    weights = np.bincount(places, weights, minlength=len(points))
    degree = len(coefficients) - 1
    exact = recurrence_of(points, weights / max(weights.sum(), np.finfo(np.float64).tiny), degree).parameters()
    parameters = {name: torch.from_numpy(value).to(dtype).double().numpy() for name, value in exact.items()}
    rows = _rows(*(parameters[name] for name in ("scales", "shifts", "couplings")))
    powers = to_exact_powers(coefficients, family)
    return {"coefficients": np.array([float(value) for value in from_powers(powers, rows)]), **parameters}


def _rows(scales: Array, shifts: Array, couplings: Array) -> Sequence[Sequence[Fraction]]:
    """Row k: the k-th polynomial in powers of the variable, exactly."""
    degree = len(scales)
    rows = [[Fraction(1)] + [Fraction(0)] * degree]
    for k in range(degree):
        scale, shift, coupling = (Fraction(float(part[k])) for part in (scales, shifts, couplings))
        raised = [Fraction(0), *rows[k][:-1]]
        before = rows[k - 1] if k else [Fraction(0)] * (degree + 1)
        rows.append([scale * r + shift * h - coupling * b for r, h, b in zip(raised, rows[k], before, strict=True)])
    return rows
