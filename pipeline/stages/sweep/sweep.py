"""The `sweep` stage: it returns its trials as stages, each durable and resumable by itself, and what follows them.

search:
  uses: sweep
  with:
    stage: {uses: train, inputs: {dataset: shard}, with: {model: {n_layer: 2}, on_divergence: record}}
    ranges: {learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}, weight_decay: [0, 0.1]}
    trials: 9
    metric: val/loss
    mode: min
    halving: {parameter: steps, smallest: 100, rounds: 3}     # 9 × 100, 3 × 300, 1 × 900 steps

`search/best` is then the model of the best trial, `search/overview` a table and a plot of all.

With `sampler: tpe` the trials come in batches: `search/batch1` draws its own by what those before came to, and returns
them as `search/batch1/trial004`, ….
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Collection, Mapping
from typing import Any, Literal

from polytrope.pipeline.data.training_file import DISTILLATION_TERMS, figure_names, figure_of_training
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, Stages, load_stage, stage
from polytrope.pipeline.stages.sweep.parameters import (
    DrawParameters,
    NextRoundParameters,
    OverviewParameters,
    SweepParameters,
    Value,
    trial_name,
)
from polytrope.pipeline.support.text import suggest

_NEXT, _DRAW, _OVERVIEW = (
    f"polytrope.pipeline.stages.sweep.sweep:{name}" for name in ("next_round", "draw_batch", "overview")
)
Places = dict[tuple[str, ...], tuple[str, ...]]
_TRIALS_FILE = "trials.json"


def check(parameters: SweepParameters, _upstream: Mapping[str, Any]) -> None:
    """Refuse a trial without a function, names it does not have, and rounds that nobody reaches."""
    uses = parameters.stage.get("uses")
    if not isinstance(uses, str):
        raise UserError("stage: the trial has no `uses:`", "for example `stage: {uses: train, inputs: …, with: …}`")
    model = load_stage(uses).parameters_model
    budget = [] if parameters.halving is None else [parameters.halving.parameter]
    for name in [*parameters.ranges, *budget]:
        first = name.partition(".")[0]
        if first not in model.model_fields and model.model_config.get("extra") != "allow":
            field = f"ranges.{name}" if name in parameters.ranges else "halving.parameter"
            raise UserError(f"{field}: stage `{uses}` has no parameter `{first}`", suggest(first, model.model_fields))
    kinds: tuple[Literal["text", "images", "numbers"], ...] = ("text", "images", "numbers")
    figures = {name for kind in kinds for name in figure_names(kind, fit=True, terms=DISTILLATION_TERMS)}
    if uses == "train" and parameters.metric not in figures:
        raise UserError(f"metric: a training has no figure `{parameters.metric}`", suggest(parameters.metric, figures))
    if parameters.sampler == "tpe" and importlib.util.find_spec("optuna") is None:
        raise UserError("sampler: tpe is Optuna's, which is not installed", "`pip install 'polytrope[optuna]'`")
    if parameters.sampler == "tpe" and parameters.halving is not None:
        raise UserError(
            "sampler: tpe learns from trials that are trained alike, and halving trains few of them long",
            "leave one of them out",
        )
    if parameters.failed_trials >= parameters.trials:
        raise UserError(
            f"failed_trials: {parameters.failed_trials} of {parameters.trials} trials are all of them",
            f"at most {parameters.trials - 1}",
        )
    if (halving := parameters.halving) is not None:
        needed = halving.factor ** (halving.rounds - 1)
        if parameters.trials < needed:
            raise UserError(
                f"trials: {parameters.trials} are too few for {halving.rounds} rounds, each of which takes one in "
                f"{halving.factor} of the trials before",
                f"at least {needed}, or fewer rounds",
            )


def returned(parameters: SweepParameters) -> tuple[Places, dict[str, Any]]:
    """What a sweep returns: the trials, which stand in its parameter `stage` but for what varies, and what follows."""
    places: Places = {(): ("with", "stage")}
    places |= {("with", *name.split(".")): ("with", "ranges", name) for name in parameters.ranges}
    if parameters.halving is not None:
        places["with", *parameters.halving.parameter.split(".")] = ("with", "halving", "smallest")
    return places, _stages(parameters, _first_trials(parameters))


def returned_later(parameters: NextRoundParameters) -> tuple[Places, dict[str, Any]]:
    """What a later round may return; its trials stand where those of the round before do."""
    trials = parameters.trials.items()
    return {(): ()}, {name: _trial(parameters.sweep, parameters.number, values) for name, values in trials}


@stage(cpu_only=True, check=check, returns=returned)
def sweep(context: StageContext, parameters: SweepParameters) -> Stages:
    """Draw the trials' parameters and return them as stages, with the rounds that follow, `best` and `overview`."""
    trials = _first_trials(parameters)
    _write_trials(context, trials)
    return Stages(_stages(parameters, trials), {"trials": len(trials)})


def _first_trials(parameters: SweepParameters) -> dict[str, dict[str, Value]]:
    """Those that are drawn before any has been trained."""
    return draw_trials(parameters, parameters.batches()[0])


def _stages(parameters: SweepParameters, trials: Mapping[str, dict[str, Value]]) -> dict[str, Any]:
    """The first trials, what draws or chooses further ones, the choice of the best, and the overview."""
    stages: dict[str, Any] = {name: _trial(parameters, 0, values) for name, values in trials.items()}
    rounds = 1 if parameters.halving is None else parameters.halving.rounds
    last: Any = {name: name for name in trials}
    everything: dict[str, str] = {f"round0/{name}": name for name in trials}
    common = {"sweep": parameters.model_dump(mode="json", exclude_unset=True), "trials": trials}
    for number in range(1, rounds):
        name = f"round{number}"
        stages[name] = {"uses": _NEXT, "inputs": {"models": last}, "with": {**common, "number": number}}
        last = f"{name}/*"
        everything[name] = last
    draws: dict[str, str] = {}
    for number in range(1, len(parameters.batches())):
        name = f"batch{number}"
        earlier = {"models": dict(last), **({"draws": dict(draws)} if draws else {})}
        stages[name] = {"uses": _DRAW, "inputs": earlier, "with": {**common, "number": number}}
        draws[name] = name
        last[name] = everything[f"round0/{name}"] = f"{name}/*"
    stages["best"] = {
        "uses": "select",
        "inputs": {"models": last},
        "with": {"metric": parameters.metric, "mode": parameters.mode},
        **({"after": ["overview"]} if parameters.failed_trials else {}),  # which counts those that failed
    }
    stages["overview"] = {
        "uses": _OVERVIEW,
        "inputs": {"models": everything, **({"draws": draws} if draws else {})},
        "with": common,
    }
    return stages


@stage(cpu_only=True, returns=returned_later)
def next_round(context: StageContext, models: dict[str, Artifact], parameters: NextRoundParameters) -> Stages:
    """Choose the best trials of the round before and return them with a larger budget, trained from the start."""
    sweep, number = parameters.sweep, parameters.number
    _check_failed(sweep, sweep.kept(number - 1), models)
    found = {name: figure_of_training(model.path, sweep.metric) for name, model in models.items()}
    values = {name: value for name, (value, _) in found.items() if value is not None}
    if not values:
        name, (_, why) = next(iter(found.items()))
        raise UserError(f"no trial of round {number - 1} has a {sweep.metric}; `{name}`: {why}", "look at its training")
    ranked = sorted(values, key=values.__getitem__, reverse=sweep.mode == "max")
    chosen = ranked[: sweep.kept(number)]
    context.message(f"{len(chosen)} of {len(models)} go on: {', '.join(chosen)}")
    return Stages(
        {name: _trial(sweep, number, parameters.trials[name]) for name in chosen},
        {"trials": len(chosen), f"best/{sweep.metric}": values[ranked[0]]},
    )


def drawn_later(parameters: DrawParameters) -> tuple[Places, dict[str, Any]]:
    """The trials that a later batch will have, with other values of the same ranges."""
    numbers = parameters.sweep.batches()[parameters.number]
    return {(): ()}, {
        name: _trial(parameters.sweep, 0, values) for name, values in draw_trials(parameters.sweep, numbers).items()
    }


@stage(cpu_only=True, returns=drawn_later)
def draw_batch(
    context: StageContext, models: dict[str, Artifact], draws: dict[str, Artifact], parameters: DrawParameters
) -> Stages:
    """Draw the next trials by what those before came to, and return them."""
    from polytrope.pipeline.stages.sweep.learning import draw_by_results

    sweep = parameters.sweep
    values = _values(parameters.trials, draws)
    found = {label.split("/")[-1]: figure_of_training(model.path, sweep.metric)[0] for label, model in models.items()}
    numbers = sweep.batches()[parameters.number]
    _check_failed(sweep, numbers.start, found)
    earlier = [name for name in map(trial_name, range(numbers.start)) if name in found]
    drawn = draw_by_results(sweep, [(values[name], found[name]) for name in earlier], numbers)
    _write_trials(context, drawn)
    return Stages({name: _trial(sweep, 0, given) for name, given in drawn.items()}, {"trials": len(drawn)})


@stage(cpu_only=True)
def overview(
    context: StageContext, models: dict[str, Artifact], draws: dict[str, Artifact], parameters: OverviewParameters
) -> dict[str, float]:
    """Write `sweep.json`, a row per trial and round, and `sweep.png`: one line per trial through all its parameters."""
    from polytrope.pipeline.stages.sweep.coordinates import draw_coordinates

    sweep, values = parameters.sweep, _values(parameters.trials, draws)
    rows = []
    for label, model in models.items():
        round_name, *_, name = label.split("/")
        value, why = figure_of_training(model.path, sweep.metric)
        row = {"trial": name, "round": int(round_name.removeprefix("round")), **values[name]}
        rows.append({**row, sweep.metric: value, **({"left_out": why} if why else {})})
    ended = {label.split("/")[-1] for label in models if label.startswith("round0/")}
    _check_failed(sweep, len(values), ended)
    for name in (name for name in values if name not in ended):
        rows.append({"trial": name, "round": 0, **values[name], sweep.metric: None, "left_out": "it failed"})
    (context.output / "sweep.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (context.output / "sweep.png").write_bytes(draw_coordinates(rows, list(sweep.ranges), sweep.metric, sweep.mode))
    context.log_artifact("sweep.json", parent=True)
    context.log_artifact("sweep.png", parent=True)
    return {"rows": len(rows), "left_out": sum("left_out" in row for row in rows)}


def _check_failed(sweep: SweepParameters, expected: int, found: Collection[str]) -> None:
    """Refuse to go on with fewer trials than `failed_trials` allows."""
    if (failed := expected - len(found)) > sweep.failed_trials:
        raise UserError(
            f"{failed} of {expected} trials failed, and failed_trials allows {sweep.failed_trials}",
            "`polytrope status` says why; mend the cause and resume with them by `--force`, or raise failed_trials",
        )


def _write_trials(context: StageContext, trials: Mapping[str, Mapping[str, Value]]) -> None:
    (context.output / _TRIALS_FILE).write_text(json.dumps(trials, indent=1) + "\n", encoding="utf-8")


def _values(first: Mapping[str, dict[str, Value]], draws: Mapping[str, Artifact]) -> dict[str, dict[str, Value]]:
    """Trial → its values, of the first trials and of those that were drawn later."""
    values = dict(first)
    for draw in draws.values():
        values |= json.loads((draw.path / _TRIALS_FILE).read_bytes())
    return values


def draw_trials(parameters: SweepParameters, numbers: range) -> dict[str, dict[str, Value]]:
    """Trial → its values. Points of Halton's sequence: evenly spread, and the first ones stay when more are drawn."""
    from scipy.stats import qmc

    shares = qmc.Halton(len(parameters.ranges), seed=parameters.seed).random(numbers.stop)
    trials = {}
    for number in numbers:
        point = shares[number]
        values: dict[str, Value] = {}
        for share, (name, given) in zip(map(float, point), parameters.ranges.items(), strict=True):
            values[name] = given[int(share * len(given))] if isinstance(given, list) else given.value(share)
        trials[trial_name(number)] = values
    return trials


def _trial(sweep: SweepParameters, number: int, values: Mapping[str, Value]) -> dict[str, Any]:
    """The stage of a trial in a round."""
    spec = copy.deepcopy(sweep.stage)
    if sweep.failed_trials:
        spec.setdefault("on_failure", "skip")
    given = spec["with"] = dict(spec.get("with") or {})
    for name, value in {**values, **sweep.budget(number)}.items():
        *path, last = name.split(".")
        place = given
        for part in path:
            inner = place.get(part)
            if inner is not None and not isinstance(inner, dict):
                raise UserError(
                    f"ranges: `{name}`, but `{part}` of the trial is {inner!r}",
                    f"write it as a mapping: `{part}: {{…}}`",
                )
            place[part] = place = dict(inner or {})
        place[last] = value
    return spec
