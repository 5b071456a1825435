"""`sweep`: trials over ranges as durable stages, few of them trained long, the best one a model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from polytrope import Workflow, run
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.launch.interface import RunFailedError, RunResult
from polytrope.pipeline.stage import Artifact, stage_context
from polytrope.pipeline.stages.sweep import learning
from polytrope.pipeline.stages.sweep.learning import draw_by_results
from polytrope.pipeline.stages.sweep.parameters import DrawParameters, SweepParameters, trial_name
from polytrope.pipeline.stages.sweep.sweep import draw_batch, draw_trials
from polytrope.pipeline.workflow import graph
from polytrope.pipeline.workflow.graph import build_graph
from polytrope.pipeline.workflow.spec import load_workflow

STAGES = '''
"""Stages of this test."""
import json
from pathlib import Path
from typing import Any
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, stage

def data(context: StageContext) -> None:
    """A data set."""

def check(parameters: Any, upstream: Any) -> None:
    if parameters.steps > 200:
        raise UserError(f"steps: at most 200, got {parameters.steps}", "fewer")

@stage(check=check)
def train(context: StageContext, dataset: Artifact, rate: float, steps: int, model: Any = None) -> None:
    """The smaller the rate, the better; a large one diverges."""
    if Path("break").exists() and steps > 10:
        raise RuntimeError("broken")
    if Path("small").exists() and rate > float(Path("small").read_text()):
        raise RuntimeError("no memory")
    with open("calls", "a") as calls:
        print(steps, file=calls)
    training = {"format": 1, "architecture": "gpt2", "parameters": 1, "steps": steps, "val/loss": rate + 1 / steps}
    if rate > 0.1:
        training["failure"] = "diverged at step 1"
    (context.output / "training.json").write_text(json.dumps(training))
    (context.output / "weights").write_text(f"{rate} {steps} {model}")
'''
TRIAL: dict[str, Any] = {
    "uses": "sweep_test_stages:train",
    "inputs": {"dataset": "data"},
    "with": {"model": {"kind": "x"}},
    "retries": 0,
}
SWEEP: dict[str, Any] = {
    "stage": TRIAL,
    "ranges": {"rate": {"low": 0.001, "high": 1.0, "log": True}, "model.degree": [3, 5]},
    "trials": 6,
    "metric": "val/loss",
    "mode": "min",
    "halving": {"parameter": "steps", "smallest": 10, "factor": 3, "rounds": 2},
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sweep_test_stages.py").write_text(STAGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sweep_test_stages", raising=False)
    return tmp_path


def start(project: Path, **settings: Any) -> RunResult:
    again = {"uses": TRIAL["uses"], "inputs": {"dataset": "search/best"}, "with": {"rate": 0, "steps": 1}}
    stages = {
        "data": {"uses": "sweep_test_stages:data"},
        "search": {"uses": "sweep", "with": {**SWEEP, **settings}},
        "again": again,
    }
    workflow = Workflow.from_dict({"name": "search", "executor": "local", "stages": stages}, directory=project)
    return run(workflow, store=project / "store", tracking=False, display="none")


def test_the_best_trials_go_on_and_all_of_it_is_durable(project: Path) -> None:
    (project / "break").touch()
    with pytest.raises(RunFailedError, match=r"search/round1/trial\d+ failed: RuntimeError: broken"):
        start(project)
    (project / "break").unlink()
    result = start(project)
    trials = json.loads((result["search"].path / "trials.json").read_text())
    assert {result[f"search/{name}"].state for name in trials} == {"cached"}  # of the run that failed
    best, second = sorted(trials, key=lambda name: float(trials[name]["rate"]))[:2]
    gone_on = {name for name in result if name.startswith("search/round1/")}
    assert gone_on == {f"search/round1/{best}", f"search/round1/{second}"}
    values = trials[best]
    model = {"kind": "x", "degree": values["model.degree"]}
    assert (result["search/best"].path / "weights").read_text() == f"{values['rate']} 30 {model}"
    assert result["again"].state == "succeeded"
    calls = (project / "calls").read_text().split()
    assert sorted(calls, key=int) == ["1", *["10"] * 6, *["30"] * 2]

    rows = json.loads((result["search/overview"].path / "sweep.json").read_text())
    assert len(rows) == 8
    diverged = [row for row in rows if row["rate"] > 0.1]
    assert diverged
    assert all(row["val/loss"] is None and row["left_out"] == "diverged at step 1" for row in diverged)
    assert (result["search/overview"].path / "sweep.png").read_bytes().startswith(b"\x89PNG")

    more = start(project, trials=7)  # the first six are drawn again, and stored
    assert [more[f"search/trial00{n}"].state for n in range(7)] == ["cached"] * 6 + ["succeeded"]


def test_trials_are_spread_over_their_ranges_and_stay_when_more_are_drawn() -> None:
    ranges = {"rate": {"low": 1e-4, "high": 1e-2, "log": True}, "degree": {"low": 2, "high": 4}, "init": ["a", "b"]}

    def drawn(number: int, **settings: Any) -> dict[str, dict[str, Any]]:
        given = {**SWEEP, "ranges": ranges, "trials": number, **settings}
        return draw_trials(SweepParameters.model_validate(given), range(number))

    few, many = drawn(20), drawn(100)
    assert few == {name: many[name] for name in few}
    assert all(1e-4 <= values["rate"] <= 1e-2 for values in many.values())
    assert sum(values["rate"] < 1e-3 for values in many.values()) in range(47, 54)
    for name, kinds in (("degree", (2, 3, 4)), ("init", ("a", "b"))):
        found = [values[name] for values in many.values()]
        assert all(abs(found.count(kind) - 100 / len(kinds)) < 5 for kind in kinds), name
    assert drawn(20, seed=1) != few


def test_later_batches_are_drawn_by_what_the_trials_before_came_to(project: Path) -> None:
    settings = {"trials": 12, "sampler": "tpe", "halving": None}
    settings["stage"] = {**TRIAL, "with": {**TRIAL["with"], "steps": 20}}
    (project / "break").touch()
    with pytest.raises(RunFailedError, match="RuntimeError: broken"):
        start(project, **settings)
    (project / "break").unlink()
    result = start(project, **settings)
    batches = [f"search{name}" for name in ("", "/batch1", "/batch2")]
    trials = [json.loads((result[name].path / "trials.json").read_text()) for name in batches]
    assert [list(found) for found in trials] == [[f"trial{n:03d}" for n in range(m, m + 4)] for m in (0, 4, 8)]
    stages = {f"{name}/{trial}" for name, found in zip(batches, trials, strict=True) for trial in found}
    assert {result[name].state for name in stages} == {"succeeded"}
    rates = [[float(values["rate"]) for values in found.values()] for found in trials]
    assert all(0.001 <= rate <= 1 for batch in rates for rate in batch)
    assert max(rates[2]) < 0.1 < max(rates[0])  # small ones are good, large ones diverge
    best = min(rate for batch in rates for rate in batch)
    assert (result["search/best"].path / "weights").read_text().startswith(f"{best} 20 ")
    rows = json.loads((result["search/overview"].path / "sweep.json").read_text())
    assert {row["trial"]: row["rate"] for row in rows} == {
        name: values["rate"] for found in trials for name, values in found.items()
    }

    settings = {**settings, "trials": 13, "sampler": "tpe"}
    more = start(project, **settings)
    assert {more[name].state for name in stages} == {"cached"}  # the same history, the same points
    assert more["search/batch3/trial012"].state == "succeeded"


def test_trials_that_fail_are_left_out_up_to_a_limit(project: Path) -> None:
    settings: dict[str, Any] = {"trials": 12, "sampler": "tpe", "halving": None}
    settings["stage"] = {**TRIAL, "with": {**TRIAL["with"], "steps": 20}}
    (project / "small").write_text("0.05")  # larger rates have no memory
    with pytest.raises(RunFailedError, match="RuntimeError: no memory"):
        start(project, **settings)
    rates = [
        values["rate"]
        for values in draw_trials(SweepParameters.model_validate({**SWEEP, **settings}), range(4)).values()
    ]
    many = sum(float(rate) > 0.05 for rate in rates)
    assert many >= 2
    with pytest.raises(RunFailedError, match=rf"{many} of 4 trials failed, and failed_trials allows {many - 1}"):
        start(project, **settings, failed_trials=many - 1)

    result = start(project, **settings, failed_trials=8)
    rows = json.loads((result["search/overview"].path / "sweep.json").read_text())
    failed = {row["trial"]: row for row in rows if row.get("left_out") == "it failed"}
    assert len(rows) == 12
    assert many <= len(failed) <= 8
    assert all(row["rate"] > 0.05 and row["val/loss"] is None for row in failed.values())
    skipped = {name.split("/")[-1] for name in result if result[name].state == "skipped"}
    assert skipped == set(failed)
    assert {str(result[name].reason) for name in result if result[name].state == "skipped"} == {
        "it failed (on_failure: skip): RuntimeError: no memory"
    }
    best = min(row["rate"] for row in rows if row["trial"] not in failed)
    assert (result["search/best"].path / "weights").read_text().startswith(f"{best} 20 ")
    again = start(project, **settings, failed_trials=8)  # fails in the same trials, draws the same
    assert {again[name].state for name in again if name.split("/")[-1] not in failed} == {"cached"}


def test_rounds_go_on_without_the_trials_that_fail(project: Path) -> None:
    (project / "small").write_text("0.05")
    result = start(project, failed_trials=5)
    trials = json.loads((result["search"].path / "trials.json").read_text())
    fine = sorted((name for name in trials if trials[name]["rate"] <= 0.05), key=lambda name: trials[name]["rate"])
    assert 0 < len(fine) < 6
    assert {name for name in result if name.startswith("search/round1/")} == {f"search/round1/{n}" for n in fine[:2]}
    assert (result["search/best"].path / "weights").read_text().startswith(f"{trials[fine[0]]['rate']} 30 ")


def test_results_are_told_in_the_order_of_the_trials(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float | None] = []

    def drawn(sweep: SweepParameters, results: Any, numbers: range) -> Any:
        told.extend(figure for _, figure in results)
        return draw_by_results(sweep, results, numbers)

    monkeypatch.setattr(learning, "draw_by_results", drawn)
    sweep = SweepParameters.model_validate({**SWEEP, "halving": None, "trials": 1003, "sampler": "tpe", "batch": 1002})
    sweep.failed_trials = 1000
    models = {}
    for number in (1001, 102, 1000, 999):  # the others failed
        directory = project / trial_name(number)
        directory.mkdir()
        training = {"format": 1, "architecture": "gpt2", "parameters": 1, "steps": 1, "val/loss": number}
        (directory / "training.json").write_text(json.dumps(training))
        models[directory.name] = Artifact(directory, "digest", directory.name)
    parameters = DrawParameters(sweep=sweep, number=1, trials=draw_trials(sweep, sweep.batches()[0]))
    assert list(draw_batch(stage_context(project / "draw"), models, {}, parameters).stages) == ["trial1002"]
    assert told == [102, 999, 1000, 1001]


def test_many_batches_are_checked_in_as_few_graphs_as_two(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        graphs.append(1)
        return build_graph(*arguments, **options)

    monkeypatch.setattr(graph, "build_graph", counted)
    settings = {"trials": 12, "batch": 1, "sampler": "tpe", "halving": None}
    settings["stage"] = {**TRIAL, "with": {**TRIAL["with"], "steps": 201}}
    stages = {"data": {"uses": "sweep_test_stages:data"}, "search": {"uses": "sweep", "with": {**SWEEP, **settings}}}
    with pytest.raises(UserError, match=r"stages\.search/trial000\.with\.steps: at most 200, got 201"):
        graph.build_graph(Workflow.from_dict({"name": "search", "stages": stages}, directory=project))
    stages["search"]["with"]["stage"]["with"]["steps"] = 200
    graphs.clear()
    graph.build_graph(Workflow.from_dict({"name": "search", "stages": stages}, directory=project))
    assert len(graphs) == 3  # of the file, with the first trial and all draws, and with what they draw


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "tpe"}, "with.sampler: tpe learns from trials that are trained alike"),
        ({"sampler": "optuna"}, "with.sampler: expected halton or tpe, got 'optuna'"),
        ({"stage": {"with": {}}}, "stages.search.with.stage: the trial has no `uses:`"),
        ({"ranges": {"rte": [1, 2]}}, "with.ranges.rte: stage `sweep_test_stages:train` has no parameter `rte`"),
        (
            {"stage": {"uses": "train"}, "ranges": {"seed": [1, 2]}, "metric": "val/los"},
            "with.metric: a training has no figure `val/los`\n.*did you mean `val/loss`",
        ),
        ({"ranges": {"rate": []}}, "`rate` has no values"),
        ({"ranges": {"rate": [0.1, 3, 3]}}, "with.ranges: `rate` has equal values: 3 and 3"),
        ({"ranges": {"rate": [True, 0.5, 1]}}, "with.ranges: `rate` has equal values: True and 1"),
        ({"ranges": {"rate": [0.5, math.nan]}}, "with.ranges: `rate` has a value that is not finite: nan"),
        ({"failed_trials": 6}, "with.failed_trials: 6 of 6 trials are all of them"),
        ({"trials": 2}, "with.trials: 2 are too few for 2 rounds, each of which takes one in 3"),
        ({"halving": {**SWEEP["halving"], "parameter": "step"}}, "with.halving.parameter: .* has no parameter `step`"),
        ({"ranges": {"rate": {"low": 2, "high": 1}}}, r"low \(2\) is not below high \(1\)"),
        ({"ranges": {"rate": {"low": 0, "high": 1, "log": True}}}, r"log: low \(0\) is not above 0"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_anything_starts(
    project: Path, settings: dict[str, Any], message: str
) -> None:
    stages = {"search": {"uses": "sweep", "with": {**SWEEP, **settings}}}
    with pytest.raises(UserError, match=message):
        build_graph(Workflow.from_dict({"name": "search", "stages": stages}, directory=project))


def test_a_sweep_that_waits_for_returned_stages_is_checked_when_they_are_there(project: Path) -> None:
    waiting = {"uses": "sweep", "after": ["data/*"], "with": {**SWEEP, "sampler": "tpe"}}  # with halving
    stages = {"data": {"uses": "sweep_test_stages:data"}, "search": waiting}
    nodes = build_graph(Workflow.from_dict({"name": "search", "stages": stages}, directory=project))
    assert set(nodes) == {"data", "search"}


FILE = """\
name: search
stages:
  data: {uses: sweep_test_stages:data}
  search:
    uses: sweep
    with:
      stage:
        uses: sweep_test_stages:train
        inputs:
          dataset: data
        with:
          model: {kind: x}
          rate: 1
      ranges: {rate: [0.1, 0.2], model.degree: [3, 5]}
      trials: 3
      metric: val/loss
      mode: min
      halving: {parameter: steps, smallest: 10, rounds: 2}
  use: {uses: sweep_test_stages:train, inputs: {dataset: search/best}, with: {rate: 1, steps: 1}}
"""


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        ("model: {kind: x}", "stpes: 3", r":12: stages\.search/trial000\.with\.stpes: .*\n.*did you mean `steps`"),
        ("[0.1, 0.2]", "[0.1, many]", r":14: stages\.search/trial001\.with\.rate: expected a number, got 'many'"),
        ("dataset: data", "dataset: dta", r":10: stages\.search/trial000\.inputs\.dataset: there is no stage `dta`"),
        ("          dataset: data", "          {}", r"stages\.search/trial000: the input `dataset` .* is missing"),
        ("uses: sweep_test_stages:train\n        i", "nouses: 1\n        i", r":7: .*the trial has no `uses:`"),
        ("        with:\n          m", "        wiht:\n          m", r"stages\.search/trial000: unknown key `wiht`"),
        ("model: {kind: x}", "model: 3", r":\d+: stages\.search\.with\.ranges: .* `model` of the trial is 3"),
        ("search/best", "search/bst", r":19: stages\.use\.inputs\.dataset: .* `search/bst`: .*\n.*`search/best`"),
        ("  use: {uses: sweep_test_stages:train, inputs: {dataset: search/best}, with: {rate: 1, steps: 1}}\n",
         "    matrix: {x: [1]}\n", r":19: stages\.search\.matrix: a stage with a matrix cannot return stages"),
        ("smallest: 10", "smallest: 100", r":18: stages\.search/round1/trial000\.with\.steps: at most 200, got 300"),
    ],
)  # fmt: skip
def test_the_trials_are_checked_before_anything_starts(project: Path, written: str, instead: str, message: str) -> None:
    assert FILE.count(written) == 1
    (project / "w.yaml").write_text(FILE)
    build_graph(load_workflow(project / "w.yaml"))
    (project / "w.yaml").write_text(FILE.replace(written, instead))
    with pytest.raises(UserError, match=message):
        build_graph(load_workflow(project / "w.yaml"))
