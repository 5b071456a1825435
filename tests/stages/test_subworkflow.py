"""`subworkflow`: stages decided at run time, durable like all others."""

import json
import sys
from pathlib import Path

import pytest

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.launch.launch import launch
from polytrope.pipeline.workflow.graph import build_graph
from polytrope.pipeline.workflow.spec import Workflow, load_workflow

STAGES = '''
"""Stages of this test."""
import json
from polytrope.pipeline.stage import Artifact, StageContext

def design(context: StageContext, count: int) -> None:
    """Decide at run time how many stages follow."""
    stages = {f"part{i}": {"uses": "subworkflow_stages:part", "with": {"number": i}} for i in range(count)}
    stages["total"] = {"uses": "subworkflow_stages:total", "inputs": {"parts": list(stages)}}
    (context.output / "workflow.yaml").write_text(json.dumps({"name": "inner", "stages": stages}))

def part(context: StageContext, number: int) -> dict[str, float]:
    """One part."""
    (context.output / "number.txt").write_text(str(number))
    return {"number": number}

def total(context: StageContext, parts: dict[str, Artifact]) -> dict[str, float]:
    """The sum of all parts."""
    value = sum(int((part.path / "number.txt").read_text()) for part in parts.values())
    (context.output / "total.txt").write_text(str(value))
    return {"total": value}
'''
USES = "polytrope.pipeline.stages.subworkflow:subworkflow"  # its former name; `subworkflow` today


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "subworkflow_stages.py").write_text(STAGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "subworkflow_stages", raising=False)
    return tmp_path


def outer(count: int) -> Workflow:
    stages = {
        "design": {"uses": "subworkflow_stages:design", "with": {"count": count}},
        "explore": {"uses": USES, "inputs": {"workflow": "design"}, "retries": 0},
    }
    return Workflow.from_dict({"name": "outer", "stages": stages}, directory=Path.cwd())


def test_a_stage_decides_what_follows_and_what_was_computed_is_not_computed_again(project: Path) -> None:
    state = launch(outer(3), executor="local", tracking=False)
    assert state.status == "succeeded", state.stages["explore"].error
    assert state.stages["explore"].summary["total/total"] == 3.0
    again = launch(outer(4), executor="local", tracking=False)
    key = again.stages["explore"].key or ""
    assert (project / ".polytrope" / "artifacts" / key / "files" / "total" / "total.txt").read_text() == "6"
    inner = load_inner(project, again.run_id)
    assert [inner[f"part{number}"] for number in range(4)] == ["cached"] * 3 + ["succeeded"]


def load_inner(project: Path, run_id: str) -> dict[str, str]:
    from polytrope.pipeline.runs.journal import fold, read

    (directory,) = (project / ".polytrope" / "runs").glob(f"{run_id}-*")
    return {name: stage.state for name, stage in fold(read(directory)).stages.items()}


def test_a_skipped_stage_is_said_to_leave_nothing_and_refused_where_it_was_asked_for(project: Path) -> None:
    stages = {
        "one": {"uses": "subworkflow_stages:part", "with": {"number": 1}},
        "other": {"uses": "subworkflow_stages:part", "with": {"number": 2}, "when": "1 > 2"},
    }
    (project / "inner.yaml").write_text(json.dumps({"name": "inner", "stages": stages}))
    said: dict[str, tuple[str, list[str]]] = {}
    for name, outputs in (("default", []), ("asked", ["one", "other"])):
        explore = {"uses": "subworkflow", "with": {"path": "inner.yaml", "outputs": outputs}, "retries": 0}
        workflow = Workflow.from_dict({"name": name, "stages": {"explore": explore}}, directory=Path.cwd())
        state = launch(workflow, executor="local", tracking=False).stages["explore"]
        said[name] = (str((state.error or {}).get("message")), list(state.notes.values()))
    assert len(said["default"][1]) == 1
    assert said["default"][1][0].startswith("the inner stage `other` was skipped (")
    assert said["asked"][0].startswith("outputs: the inner stage `other` was skipped (")


def test_a_workflow_file_is_checked_before_anything_starts(project: Path) -> None:
    part = {"uses": "subworkflow_stages:part", "with": {"number": 1}}
    (project / "inner.yaml").write_text(json.dumps({"name": "inner", "stages": {"part": part}}))
    (project / "w.yaml").write_text(f"name: w\nstages:\n  a: {{uses: '{USES}', with: {{path: inner.yaml}}}}\n")
    before = build_graph(load_workflow("w.yaml"))["a"].fingerprint
    changed = build_graph(load_workflow("w.yaml", ["stages.a.with.set=[stages.part.with.number=2]"]))["a"].fingerprint
    assert before != changed
    for override, message in (
        ("stages.a.with.outputs=[prat]", "has no stage `prat`"),
        ("stages.a.with.path=gone.yaml", "no workflow file"),
        ("stages.a.with.set=[stages.part.with.number=x]", "stages.part.with.number"),
        ("stages.a.with.path=null", "give either the parameter `path` or the input `workflow`"),
    ):
        with pytest.raises(UserError, match=message):
            build_graph(load_workflow("w.yaml", [override]))


def test_what_decides_whether_an_inner_stage_runs_is_in_the_key(project: Path) -> None:
    stages = {
        "one": {"uses": "subworkflow_stages:part", "with": {"number": 1}},
        "other": {"uses": "subworkflow_stages:part", "with": {"number": 2}, "when": "params.both"},
    }
    explore = {"uses": "subworkflow", "with": {"path": "inner.yaml"}, "retries": 0}
    workflow = Workflow.from_dict({"name": "w", "stages": {"explore": explore}}, directory=Path.cwd())
    for params, condition, kept in (
        ({"both": False}, "params.both", {"one"}),
        ({"both": True}, "params.both", {"one", "other"}),
        ({"both": True}, "not params.both", {"one"}),
    ):
        stages["other"]["when"] = condition
        (project / "inner.yaml").write_text(json.dumps({"name": "inner", "params": params, "stages": stages}))
        state = launch(workflow, executor="local", tracking=False)
        files = project / ".polytrope" / "artifacts" / (state.stages["explore"].key or "") / "files"
        assert {path.name for path in files.iterdir()} == kept


def test_what_failed_inside_and_was_left_out_leaves_no_result(project: Path) -> None:
    stages = {
        "bad": {"uses": "subworkflow_stages:broken", "on_failure": "skip", "retries": 0},
        "one": {"uses": "subworkflow_stages:part", "with": {"number": 1}},
        "total": {"uses": "subworkflow_stages:total", "inputs": {"parts": ["one", "bad"]}},
    }
    (project / "subworkflow_stages.py").write_text(
        STAGES + '\ndef broken(context: StageContext) -> None:\n    """Fail."""\n    raise RuntimeError("no memory")\n'
    )
    (project / "inner.yaml").write_text(json.dumps({"name": "inner", "stages": stages}))
    explore = {"uses": "subworkflow", "with": {"path": "inner.yaml"}, "retries": 0}
    workflow = Workflow.from_dict({"name": "w", "stages": {"explore": explore}}, directory=Path.cwd())
    state = launch(workflow, executor="local", tracking=False)
    assert state.status == "failed"
    message = (state.stages["explore"].error or {})["message"]
    assert message.startswith("the inner stage `bad` failed and was left out (it failed (on_failure: skip): ")
    assert message.endswith("no memory), so the result of `explore` would not be what its key says")
