"""The options of a conversion for Python, the command and the stage, and which exclude each other; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What `conversion.fit_options` takes.
FIT_OPTIONS = frozenset(
    {"family", "degree", "target_error", "coverage", "derivative_weight", "constraints"}
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
_OF_OTHERS: dict[str, Any] = {"degree": None, "coverage": None, "derivative_weight": 0.01, "constraints": []}


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
