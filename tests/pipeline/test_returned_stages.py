"""A stage may return further stages: they are checked, kept, planned, resumed and read like those of the file."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_support import FAST, Place, workflow_of

from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.engine.options import RunOptions
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.stage import StageContext, Stages, stage
from polytrope.pipeline.workflow.graph import build_graph


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


def stages_of(place: Place, texts: list[str], **more: Any) -> dict[str, Any]:
    traces = str(place.directory)
    return {
        "split": {"uses": "split", "with": {"texts": texts, "traces": traces, **more}},
        "all": {"uses": "join", "inputs": {"parts": "split/*"}, "with": {"traces": traces}},
        "first": {"uses": "copy", "inputs": {"source": "split/part0", "extra": "split"}, "with": {"traces": traces}},
    }


def text_of(place: Place, key: str | None) -> str:
    return (place.store.materialize(key or "") / "text").read_text()


def test_what_a_stage_returns_runs_before_those_that_read_it(place: Place) -> None:
    state = place.run(stages_of(place, ["a", "bc"], joined=True))
    assert state.status == "succeeded"
    assert set(state.stages) == {"split", "split/part0", "split/part1", "split/sum", "all", "first"}
    assert {stage.state for stage in state.stages.values()} == {"succeeded"}
    assert state.stages["split"].summary == {"parts": 2.0}
    assert text_of(place, state.stages["split/sum"].key) == "a+bc"
    assert text_of(place, state.stages["all"].key) == "a+bc+a+bc"  # labels part0, part1, sum
    assert text_of(place, state.stages["first"].key) == "aabc"
    assert fold(read(place.store.run_directory(state.run_id))).stages.keys() == state.stages.keys()


def test_stored_stages_come_back_and_only_what_is_new_is_computed(place: Place) -> None:
    place.run(stages_of(place, ["a", "b"]))
    again = place.run(stages_of(place, ["a", "b"]))
    assert {stage.state for stage in again.stages.values()} == {"cached"}
    assert len(again.stages) == 5
    other = place.run(stages_of(place, ["a", "b", "c"]))
    computed = {name for name, stage in other.stages.items() if stage.state == "succeeded"}
    assert computed == {"split", "split/part2", "all", "first"}
    assert place.calls["split/part0"] == 1


def test_a_forced_stage_that_is_not_returned_is_told(place: Place) -> None:
    stages = stages_of(place, ["a", "b"])
    place.run(stages)
    state = place.run(stages, options=dataclasses.replace(FAST, force=frozenset({"split/part1", "split/part7"})))
    assert state.status == "succeeded"
    assert place.calls["split/part1"] == 2
    expected = "`split/part7` was to be computed in any case, but no such stage was returned"
    assert list(state.stages["split"].notes.values()) == [expected]


def test_a_resume_goes_on_in_the_middle_of_them(place: Place) -> None:
    stages = stages_of(place, ["a", "b"])
    stages["all"] = {"uses": "fail_until", "after": ["split/*"], "with": {"attempts": 1}, "retries": 0}
    first = place.run(json.loads(json.dumps(stages)), run_id="run")
    assert first.status == "failed"
    assert first.stages["split/part1"].state == "succeeded"
    calls = place.calls
    state = place.run(stages, run_id="run", resume=True)
    assert state.status == "succeeded"
    assert place.calls["split"] == calls["split"] == 1
    assert [event.type for event in place.events if event.stage == "split/part1"].count("stage_succeeded") == 1
    forced = place.run(stages, RunOptions(force=frozenset(["split/part1"])), run_id="run", resume=True)
    assert forced.status == "succeeded"
    assert place.calls["split/part1"] == 2
    assert place.calls["split/part0"] == 1


def test_other_stages_than_in_the_attempt_before_leave_nothing_unfinished(place: Place) -> None:
    broken = {"uses": "engine_stages:fail_until", "with": {"attempts": 9}, "retries": 0}
    stages = {"split": {"uses": "return_anything", "with": {"value": {"gone": broken}}}}
    assert place.run(stages, run_id="run").status == "failed"
    stages["split"]["with"] = {"value": {"here": {"uses": "engine_stages:make"}}}
    with pytest.raises(UserError, match="`split` is finished, but since then"):
        place.run(stages, run_id="run", resume=True)
    state = place.run(stages, RunOptions(retry_delay=0.01, allow_code_change=True), run_id="run", resume=True)
    assert state.status == "succeeded"
    assert state.stages["split/here"].state == "succeeded"
    assert state.stages["split/gone"].state == "skipped"


def test_returned_stages_may_return_stages(place: Place) -> None:
    stages = stages_of(place, ["a", "b"], deeper=True)
    stages["all"]["inputs"] = {"parts": ["split/inner/*", "split/inner/part1"]}
    del stages["first"]
    state = place.run(stages)
    assert text_of(place, state.stages["all"].key) == "a+b+b"
    assert state.stages["split/inner/part1"].state == "succeeded"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"x": {"uses": "engine_stages:make", "with": {"txt": "a"}}}, "stages.split/x.with.txt: stage .* no parameter"),
        ({"x": {"uses": "engine_stages:make", "rtries": 1}}, "stages.split/x: unknown key `rtries`"),
        ({"x": {"uses": "engine_stages:gone"}}, "stages.split/x.uses: .* no function `gone`"),
        ({"x y": {"uses": "engine_stages:make"}}, "stages.split/x y: the stage name"),
        ({"x": 3}, "stages.split/x: expected `uses:`"),
        ({"x": {"uses": "engine_stages:copy", "inputs": {"source": "y"}}}, "split/x.inputs.source: there is no stage"),
        ({"x": {"uses": "engine_stages:join", "inputs": {"parts": ["last"]}}}, "in a circle: "),
        ({"x": {"uses": "engine_stages:make", "resources": {"gpus": 99}}}, "asks for 99 GPUs"),
        ({}, "stages.last.inputs.source: there is no stage `split/x`: `split` returns none"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_returned_stages_is_said_and_nothing_of_them_kept(
    place: Place, value: dict[str, Any], message: str
) -> None:
    stages = {
        "split": {"uses": "return_anything", "with": {"value": value}},
        "last": {"uses": "copy", "inputs": {"source": "split/x"}},
    }
    state = place.run(stages)
    assert state.status == "failed"
    error = state.stages["split"].error or {}
    assert error["kind"] == "user"
    assert error["message"].startswith("the stages it returned: ")
    assert re.search(message, error["message"]), error["message"]
    assert place.store.keys() == []


def test_references_to_what_can_never_be_returned_are_refused_at_once(place: Place) -> None:
    for inputs, message in (
        ({"parts": "gone/*"}, "there is no stage `gone/"),
        ({"parts": "split/*"}, "`split` has a matrix, so it cannot return stages"),
    ):
        stages = {
            "split": {"uses": "make", "matrix": {"text": ["a", "b"]}, "with": {"text": "${matrix.text}"}},
            "all": {"uses": "join", "inputs": inputs},
        }
        with pytest.raises(UserError, match=message):
            build_graph(workflow_of(place.directory, stages))


@pytest.mark.parametrize(
    "reader", [{"uses": "copy", "inputs": {"source": "split/x"}}, {"uses": "join", "inputs": {"parts": "split/*"}}]
)
def test_a_stage_that_returns_none_is_no_substitute_for_those_that_others_read(
    place: Place, reader: dict[str, Any]
) -> None:
    stages = {"split": {"uses": "make"}, "last": reader}
    for _ in range(2):
        state = place.run(stages)
        assert {name: stage.state for name, stage in state.stages.items()} == {"split": "failed", "last": "cancelled"}
        assert (state.stages["split"].error or {})["message"] == "it returned no stages, but `last` reads some"
    assert place.run({"split": {"uses": "make"}}).status == "succeeded"  # it is stored now
    assert place.run(stages).status == "failed"


@pytest.mark.parametrize("secret", ['pa"ss\\wo\nrd', "uses", "plain-word"])
def test_a_secret_that_a_stage_returns_stays_the_name_of_its_variable(
    place: Place, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("TOKEN", secret)
    value = {"x": {"uses": "engine_stages:measure", "with": {"text": "${env.TOKEN}"}}}
    state = place.run({"split": {"uses": "return_anything", "with": {"value": value}}})
    assert state.status == "succeeded"
    assert state.stages["split/x"].summary == {"length": float(len(secret))}
    kept = json.loads((place.store.materialize(state.stages["split"].key or "") / "returned-stages.json").read_text())
    assert kept == value
    if secret != "uses":
        files = [path for path in Path(place.store.address).rglob("*") if path.is_file()]
        written = json.dumps(secret)[1:-1].encode()
        assert not [path for path in files if secret.encode() in path.read_bytes() or written in path.read_bytes()]


def test_stages_of_an_earlier_attempt_end_with_the_one_that_returned_them(place: Place) -> None:
    broken = {"uses": "engine_stages:fail_until", "with": {"attempts": 9}, "retries": 0}
    stages = {"split": {"uses": "return_anything", "with": {"value": {"gone": broken}}}}
    assert place.run(stages, run_id="run").status == "failed"
    stages["split"]["with"] = {"value": {"x": 3}}
    state = place.run(stages, RunOptions(retry_delay=0.01, allow_code_change=True), run_id="run", resume=True)
    assert {name: stage.state for name, stage in state.stages.items()} == {"split": "failed", "split/gone": "cancelled"}
    assert state.stages["split/gone"].reason == "it is returned by `split`, which has no result"


def test_while_others_go_on_a_returned_stage_behind_a_failed_one_is_cancelled(place: Place) -> None:
    value = {"x": {"uses": "engine_stages:copy", "inputs": {"source": "bad"}}, "y": {"uses": "engine_stages:make"}}
    stages = {
        "bad": {"uses": "fail_until", "with": {"attempts": 1, "how": "user"}},
        "wait": {"uses": "make", "with": {"seconds": 0.5}},
        "split": {"uses": "return_anything", "after": ["wait"], "with": {"value": value}},
        "reader": {"uses": "join", "inputs": {"parts": "split/*"}},
    }
    state = place.run(stages, FAST, fields={"fail_fast": False})
    assert state.status == "failed"
    assert {name: stage.state for name, stage in state.stages.items()} == {
        "bad": "failed", "wait": "succeeded", "split": "succeeded", "split/x": "cancelled", "split/y": "succeeded",
        "reader": "cancelled",
    }  # fmt: skip


def test_plan_explain_status_and_graph_show_them(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    stages = stages_of(place, ["a", "b"])
    file = place.directory / "w.yaml"
    workflow = workflow_of(place.directory, stages, name="w", tracking={"enabled": False})
    file.write_text(yaml.safe_dump(workflow.to_dict()))

    def command(*words: str) -> str:
        assert main([*words, "--store", place.store.address]) == 0
        return capsys.readouterr().out

    before = command("plan", str(file))
    assert "split/part0" not in before
    assert "input parts will be computed" in before
    assert "split/part1: running" in command("run", str(file))
    assert "all 5 stages are stored" in command("plan", str(file))
    more = workflow_of(place.directory, stages_of(place, ["a", "b", "c"]), name="w", tracking={"enabled": False})
    file.write_text(yaml.safe_dump(more.to_dict()))
    assert "may run" in next(line for line in command("plan", str(file)).splitlines() if "input parts is what" in line)
    file.write_text(yaml.safe_dump(workflow.to_dict()))
    assert "split/part1  succeeded" in command("status")
    assert "split/part1" in command("graph", str(file), "--run", fold(read(place.store.run_directories()[0])).run_id)
    key = next(stage for stage in command("explain", str(file), "split/part1").split() if len(stage) == 64)
    artifact = place.store.load(key)
    assert artifact is not None
    place.store.remove(f"artifacts/{key}")
    after = command("explain", str(file), "split/part1")
    assert "its artifact is missing or damaged" in after


@stage(returns=lambda parameters: ({(): ()}, counting(parameters.number, parameters.step, parameters.last)))
def count(context: StageContext, number: int = 0, step: int = 1, last: int = 3) -> Stages:
    """Return itself with the next number, until the last."""
    context.progress(number, last)
    return Stages(counting(number, step, last))


def counting(number: int, step: int, last: int) -> dict[str, Any]:
    given = {"number": number + step, "step": step, "last": last}
    return {"next": {"uses": f"{__name__}:count", "with": given}} if number < last else {}


def test_a_stage_that_returns_itself_is_checked_to_its_end_and_refused_where_there_is_none(tmp_path: Path) -> None:
    def checked(**given: int) -> None:
        build_graph(workflow_of(tmp_path, {"only": {"uses": f"{__name__}:count", "with": given}}))

    checked(last=20)
    for endless in ({"step": 0}, {"last": 10**9}):
        with pytest.raises(
            UserError, match=r"stages\.only/next.*: `test_returned_stages:count` returns itself without"
        ):
            checked(**endless)
