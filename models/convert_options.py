"""The options of a conversion for Python, the command and the stage, and which exclude each other; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What `conversion.fit_options` takes.
FIT_OPTIONS = frozenset(
    {"family", "degree", "target_error", "coverage", "weight", "derivative_weight", "constraints"}
    | {"polynomial_only", "depth", "domain", "domain_margin"}
)
_WHY_NOT_POLYNOMIAL = {
    "fourier": "is made of cosines",
    "rational": "divides",
    "tropical": "compares",
    "tropical_rational": "compares",
    "polyrelu": "compares x with 0",
}
_OF_POLYNOMIALS: dict[str, Any] = {"depth": None, "domain": None, "domain_margin": 0.25}
_OF_TAILS: dict[str, Any] = {"coverage": None, "derivative_weight": 0.01, "constraints": []}
_OF_OTHERS: dict[str, Any] = {"degree": None, "weight": "measured"} | _OF_TAILS
_POLYNOMIALS = ("hermite", "chebyshev", "legendre")


def replacement(family: str | None, polynomial_only: bool) -> str:
    """The family of the new activations."""
    return "composition" if polynomial_only else family or "hermite"


def check_polynomial_only(polynomial_only: bool, given: Mapping[str, Any]) -> None:
    """Refuse options that mean nothing beside `polynomial_only`, or without it.

    Args:
        given: the other options by name; those that are absent or have their defaults were not given.

    Raises:
        ValueError: the first of them, and what to use instead.
    """
    if not polynomial_only:
        for name, default in _OF_POLYNOMIALS.items():
            if given.get(name, default) != default:
                raise ValueError(f"{name} is for polynomial_only")
        return
    family = given.get("family")
    if family is not None:
        why = _WHY_NOT_POLYNOMIAL.get(family)
        reason = f"{why}, so it is no polynomial" if why else "is one basis of what is fitted anyway"
        raise ValueError(f"family {family} {reason}; leave family out")
    for name, default in _OF_OTHERS.items():
        if given.get(name, default) != default:
            instead = {"degree": "use depth", "coverage": "use domain"}.get(name, "leave it out")
            raise ValueError(f"{name} is for other conversions; {instead}")


def check_weight(weight: str, given: Mapping[str, Any]) -> None:
    """Refuse what means nothing beside `weight: normal`, which is a projection on polynomials of the whole line.

    Args:
        given: the other options by name; those that are absent or have their defaults were not given.

    Raises:
        ValueError: the first of them, and what to use instead.
    """
    if weight not in ("measured", "normal"):
        raise ValueError(f"weight: expected measured or normal, got {weight!r}")
    if weight == "measured":
        return
    family = given.get("family")
    if family is not None and family not in _POLYNOMIALS:
        raise ValueError(f"weight normal projects on polynomials, not on family {family}; leave family out")
    for name, default in _OF_TAILS.items():
        if given.get(name, default) != default:
            raise ValueError(f"{name} is not for weight normal, which has no interval and no slopes; leave it out")


def check_keep(keep: int | None, output_error: float | None, rated_samples: int) -> None:
    """Refuse ways to keep activations that exclude each other, or that have no costs to go by.

    Raises:
        ValueError: says which.
    """
    if keep is None and output_error is None:
        return
    name = "keep" if output_error is None else "output_error"
    if keep is not None and output_error is not None:
        raise ValueError("keep and output_error: both say how many activations stay as they are; give one of them")
    if not rated_samples:
        raise ValueError(f"{name} goes by what every activation costs, and rated_samples is 0; give some")
