"""How a polynomial of a model that is trained starts, and where its tangents begin, where neither is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polytrope.pipeline.stages.train.activation_parameters import IMITATED, named_starts, spelled_out

# Of the starts in docs/activations/study.md the one that gains on text and, at GELU's best base rate, spoils no
# training, also not of degree 3, which on [-4, 4] is no GELU (degree 2 was not trained on [-2, 2]).
INIT = "gelu"
INTERVAL = (-2, 2)
EVERYWHERE = "stable"  # of a polynomial without tangents: deep nets without normalisation stay there
SCALED = ("chebyshev", "legendre")  # made for [-1, 1]: elsewhere their coefficients hardly learn
POLYNOMIALS = ("hermite", *SCALED)


def with_start(entry: str | dict[str, Any], options: Mapping[str, Any]) -> str | dict[str, Any]:
    """`hermite3` as `{name: hermite, degree: 3, init: gelu, interval: [-2, 2]}`. What is said stays, and so do other
    families.

    Without `init` a polynomial starts as GELU, and with `interval: null` as `stable`. Without `interval`, one that
    starts as a function, which it is fitted to on [-2, 2], goes on along its tangents outside. Chebyshev and Legendre
    polynomials with an interval and without `variable` are in the one that takes the interval to [-1, 1].

    Args:
        entry: of `model.activation`.
        options: `model.activation_options`; None: not said. An `init` that the polynomial does not have says nothing.
    """
    settings = spelled_out(entry)
    if not isinstance(settings, dict) or settings.get("name") not in POLYNOMIALS:
        return entry
    common = {name: value for name, value in options.items() if value is not None}
    if common.get("init") not in named_starts(settings["name"]):
        common.pop("init", None)
    said = {**common, **settings}
    found = dict(settings)
    if "init" not in said:
        found["init"] = EVERYWHERE if said.get("interval", INTERVAL) is None else INIT
    if "interval" not in said and said.get("init", INIT) in IMITATED:
        found["interval"] = list(INTERVAL)
    ends = found.get("interval", said.get("interval"))
    if ends is not None and settings["name"] in SCALED and "variable" not in said:
        low, high = ends
        found["variable"] = [(low + high) / 2, (high - low) / 2]
    return entry if found == settings else found
