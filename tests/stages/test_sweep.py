"""`sweep`: trials over ranges as durable stages, few of them trained long, the best one a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from polytrope.pipeline import Workflow, run
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.launch.interface import RunFailedError, RunResult
from polytrope.pipeline.stages.sweep.parameters import SweepParameters
from polytrope.pipeline.stages.sweep.sweep import draw_trials
from polytrope.pipeline.workflow.graph import build_graph

STAGES = '''
"""Stages of this test."""
import json
from pathlib import Path
from typing import Any
from polytrope.pipeline.stage import Artifact, StageContext

def data(context: StageContext) -> None:
    """A data set."""

def train(context: StageContext, dataset: Artifact, rate: float, steps: int, model: Any = None) -> None:
    """The smaller the rate, the better; a large one diverges."""
    if Path("break").exists() and steps > 10:
        raise RuntimeError("broken")
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
        return draw_trials(SweepParameters.model_validate(given))

    few, many = drawn(20), drawn(100)
    assert few == {name: many[name] for name in few}
    assert all(1e-4 <= values["rate"] <= 1e-2 for values in many.values())
    assert sum(values["rate"] < 1e-3 for values in many.values()) in range(47, 54)
    for name, kinds in (("degree", (2, 3, 4)), ("init", ("a", "b"))):
        found = [values[name] for values in many.values()]
        assert all(abs(found.count(kind) - 100 / len(kinds)) < 5 for kind in kinds), name
    assert drawn(20, seed=1) != few


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": {"with": {}}}, "stages.search.with.stage: the trial has no `uses:`"),
        ({"ranges": {"rte": [1, 2]}}, "with.ranges: stage `sweep_test_stages:train` has no parameter `rte`"),
        (
            {"stage": {"uses": "train"}, "ranges": {"seed": [1, 2]}, "metric": "val/los"},
            "with.metric: a training has no figure `val/los`\n.*did you mean `val/loss`",
        ),
        ({"ranges": {"rate": []}}, "`rate` has no values"),
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


def test_a_range_inside_something_that_is_no_mapping_is_refused(project: Path) -> None:
    with pytest.raises(RunFailedError, match="`model` of the trial is 3"):
        start(project, stage={**TRIAL, "with": {"model": 3}})
