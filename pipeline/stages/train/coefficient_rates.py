"""How fast the coefficients of a learnable activation learn, where `coefficient_learning_rate` does not say."""

from __future__ import annotations

import math

from polytrope.models.response import response
from polytrope.ops import LearnableActivation

# An optimizer step of all coefficients moves the function by this much times the base learning rate, root mean square
# over its interval. docs/activations/study.md has the trainings behind these numbers.
STEP = 50.0
LARGEST = 10.0
WITHOUT_ENDS = 0.1  # where the formula goes on outside, no step is small for all inputs
FINE_TUNING = 0.1  # of the step: settled by one conversion trained on for 20 steps, which a whole step spoiled


def coefficient_multiple(activation: LearnableActivation, fine_tuning: bool = False) -> float:
    """The learning rate of an activation's coefficients, in units of the base rate, rounded to 1, 2 or 5 · 10^k.

    AdamW moves every coefficient by about the learning rate, whatever its gradient: how far that moves the function is
    the matter of the coordinates. With R (`response`), the root mean square over the interval of the norm of F's
    gradient by its coefficients, a step moves F by at most R times the rate; so the rate is `STEP` / R, and the same
    function learns equally fast in any basis. Where no straight lines follow outside the interval, `WITHOUT_ENDS`.

    Args:
        fine_tuning: the model is a trained or converted one: `FINE_TUNING` times that where straight lines follow.
    """
    if activation.accepts_interval and activation.interval is None:
        return WITHOUT_ENDS
    return _rounded(min(LARGEST, STEP / response(activation)) * (FINE_TUNING if fine_tuning else 1.0))


def _rounded(number: float) -> float:
    """The nearest of …, 0.5, 1, 2, 5, 10, …, by ratio."""
    decade = 10.0 ** math.floor(math.log10(number))
    return min((part * decade for part in (1.0, 2.0, 5.0, 10.0)), key=lambda near: abs(math.log(near / number)))
