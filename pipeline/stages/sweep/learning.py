"""Points of a sweep that earlier results decide: Optuna's tree-structured Parzen estimator, without a study on disk."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from polytrope.pipeline.stages.sweep.parameters import Range, SweepParameters, Value, trial_name


def draw_by_results(
    sweep: SweepParameters, results: Sequence[tuple[Mapping[str, Value], float | None]], numbers: range
) -> dict[str, dict[str, Value]]:
    """Trial → its values: a function of the sweep, its seed, and the results (of one version of Optuna).

    Args:
        sweep: its ranges, mode, seed.
        results: values and figure of the trials so far, in their order; None: it diverged, which counts as bad.
        numbers: of the trials to draw.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=0, multivariate=True, constant_liar=True, seed=sweep.seed + numbers.start
        )
    direction = {"min": "minimize", "max": "maximize"}[sweep.mode]
    study = optuna.create_study(sampler=sampler, direction=direction)
    distributions = {name: _distribution(given) for name, given in sweep.ranges.items()}
    study.add_trials([_past(sweep, distributions, values, figure) for values, figure in results])
    drawn = {}
    for number in numbers:
        found = study.ask(distributions).params
        drawn[trial_name(number)] = {name: _value(given, found[name]) for name, given in sweep.ranges.items()}
    return drawn


def _past(
    sweep: SweepParameters,
    distributions: dict[str, BaseDistribution],
    values: Mapping[str, Value],
    figure: float | None,
) -> FrozenTrial:
    params = {name: _point(given, values[name]) for name, given in sweep.ranges.items()}
    if figure is None:
        return create_trial(state=TrialState.PRUNED, params=params, distributions=distributions)
    return create_trial(value=figure, params=params, distributions=distributions)


def _distribution(given: Range | list[Value]) -> BaseDistribution:
    """Values of a list by their places: Optuna takes no two that are equal."""
    if isinstance(given, list):
        return CategoricalDistribution(tuple(range(len(given))))
    if isinstance(given.low, int) and isinstance(given.high, int):
        return IntDistribution(given.low, given.high, log=given.log)
    return FloatDistribution(given.low, given.high, log=given.log)


def _point(given: Range | list[Value], value: Value) -> Value:
    """A value of a trial as a point of the distribution; what was rounded out of the range is at its end."""
    if isinstance(given, list):
        return given.index(value)
    return min(max(value, given.low), given.high)  # type: ignore[type-var]


def _value(given: Range | list[Value], point: Value) -> Value:
    """The inverse, a number with six digits."""
    if isinstance(given, list):
        return given[int(point)]
    return point if isinstance(point, int) else float(f"{point:.6g}")
