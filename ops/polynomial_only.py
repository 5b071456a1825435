"""Fit polynomials without comparisons (`ops.Composition`) to a function on a domain, with a certificate.

What it is for: homomorphic encryption, multi-party computation and verification, which have additions and
multiplications. How: `fitting.composition`; what one costs: `circuit`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from polytrope.ops.fitting import composition, quadrature
from polytrope.ops.fitting.certificate import Built, Inputs, certify
from polytrope.ops.fitting.composition import MAX_DEPTH, Chain, fit_chain
from polytrope.ops.fitting.curves import Array, Curve
from polytrope.ops.fitting.targets import Target, find_kinks, resolve_target, sample
from polytrope.ops.functional import check_domain
from polytrope.ops.interpolate import Fit, RoundingError, built_module
from polytrope.ops.modules import Composition

__all__ = ["MAX_DEPTH", "fit_composition", "fit_composition_to_error"]

_ROUNDING_TOLERANCE = 1e-3  # of the largest |f|


def fit_composition(
    target: str | Target | nn.Module,
    domain: tuple[float, float],
    depth: int,
    *,
    measured: tuple[Array, Array] | None = None,
    held_out: Array | None = None,
    dtype: torch.dtype = torch.float32,
    at_most: float | None = None,
) -> Fit:
    """A composition of polynomials of at most this multiplicative depth that is close to `target` on the domain.

    Args:
        target: as of `interpolate.fit`.
        domain: (lo, hi); the certificate is of it, and has no figures for outside (NaN).
        depth: the most products of two variable factors that follow one another, 1…16.
        measured: inputs as (points, counts), whose root mean square error is minimised, with a tenth of the weight
            spread over the domain; those outside do not count. None: the largest error on the domain is minimised.
        held_out: raw inputs that are not among them; the certificate's root mean square counts those in the domain too.
        dtype: the floating-point format that the module is for.
        at_most: of the chains of this depth with this root mean square error or less, the one of the fewest products;
            None: among the best. What rounding in the format loses is part of the error; a depth at which every chain
            loses more than 1e-3 of the largest |f| on the domain is given up for a lower one.

    Raises:
        ValueError: an argument that is not as described; a target that is not finite on the domain.
        RoundingError: the format cannot take even the shallowest chain.
    """
    composition.check_depth(depth)
    ends = check_domain(domain)
    low, high = ends
    function = resolve_target(target)
    inputs = None if measured is None else _within(quadrature.measured(measured), ends)

    def exact(x: Array) -> tuple[Array, Array]:
        return sample(function, x)

    def build(chain: Chain) -> Built:
        return Built.of(built_module(_config(chain, ends), composition.parameters(chain.polynomials), dtype), dtype)

    def loss(chain: Chain, x: Array) -> Array | None:
        built = build(chain)
        off = built.rounding(chain.evaluate, x)
        lost, largest = (float(np.abs(part).max()) for part in (off, exact(x)[0]))
        return off if built.tolerates(lost, largest, _ROUNDING_TOLERANCE) else None

    for tried in range(depth, 0, -1):
        chain = fit_chain(function, ends, tried, inputs, at_most, dtype, loss)
        if math.isfinite(chain.error):
            break
    else:
        raise RoundingError(
            f"domain: on ({low:.4g}, {high:.4g}) every polynomial loses more than {_ROUNDING_TOLERANCE:.2g} of the "
            f"function to rounding in {str(dtype).removeprefix('torch.')}; take another domain or a wider format"
        )
    kinks = find_kinks(function, low, high)
    points, weights = quadrature.nodes(low, high, kinks, "uniform") if inputs is None else inputs
    unseen = np.zeros(0) if held_out is None else np.asarray(held_out, dtype=np.float64)
    unseen = unseen[(unseen >= low) & (unseen <= high)]
    built = build(chain)
    certificate = certify(
        _only_inside(exact, ends, dtype),
        _only_inside(chain.evaluate, ends, dtype),
        built,
        ends,
        kinks,
        (points, weights),
        Inputs.of(exact, dtype, (points, weights), unseen).root_mean_square(built),
        ends,
        0.0,
        chain.condition,
    )
    return Fit(_config(chain, ends), composition.parameters(chain.polynomials), certificate, chain.evaluate, dtype)


def _config(chain: Chain, domain: tuple[float, float]) -> dict[str, Any]:
    return Composition(chain.degrees, domain=domain, center=chain.center, gate=chain.gate).config()


def fit_composition_to_error(
    target: str | Target | nn.Module,
    domain: tuple[float, float],
    error: float,
    *,
    depth: int = MAX_DEPTH,
    measured: tuple[Array, Array] | None = None,
    held_out: Array | None = None,
    dtype: torch.dtype = torch.float32,
) -> Fit:
    """The fit of the smallest depth whose root mean square error is at most `error`, and the fewest products at that.

    Args:
        depth: the largest one tried.

    Raises:
        ValueError: no depth reaches it; names the best one. A depth that is not in 1…16.
    """
    composition.check_depth(depth)
    best: Fit | None = None
    refused: RoundingError | None = None
    for tried in range(1, depth + 1):
        try:
            found = fit_composition(
                target, domain, tried, measured=measured, held_out=held_out, dtype=dtype, at_most=0.9 * error
            )
        except RoundingError as reason:
            refused = reason
            continue
        if found.certificate.rms <= error:
            return found
        if best is None or found.certificate.rms < best.certificate.rms:
            best = found
    if best is None:
        assert refused is not None
        raise refused
    raise ValueError(
        f"target error: no composition up to depth {depth} reaches {error:.3g}; the best has {best.certificate.rms:.3g}"
    )


def _within(inputs: tuple[Array, Array], domain: tuple[float, float]) -> tuple[Array, Array]:
    points, weights = inputs
    inside = (points >= domain[0]) & (points <= domain[1])
    if not inside.any():
        raise ValueError(
            f"domain: no measured input lies in ({domain[0]:.4g}, {domain[1]:.4g}); they are {points[0]:.4g} … "
            f"{points[-1]:.4g}"
        )
    return points[inside], weights[inside] / weights[inside].sum()


def _only_inside(curve: Curve, domain: tuple[float, float], dtype: torch.dtype) -> Curve:
    """NaN outside, where nothing is asked of either function; the ends rounded to the format are inside."""
    slack = float(torch.finfo(dtype).eps) * max(abs(domain[0]), abs(domain[1]))

    def restricted(x: Array) -> tuple[Array, Array]:
        value, slope = np.full_like(x, np.nan), np.full_like(x, np.nan)
        inside = (x >= domain[0] - slack) & (x <= domain[1] + slack)
        value[inside], slope[inside] = curve(x[inside])
        return value, slope

    return restricted
