"""A stored result is of what its key says: code, files and inputs that change while a run goes on are found out."""

from __future__ import annotations

import dataclasses
import decimal
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_support import FAST, Place, workflow_of

from polytrope.pipeline.engine.run import run_workflow
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import Event, RunState
from polytrope.pipeline.stage import StageContext, load_stage, stage_context
from polytrope.pipeline.workflow.graph import build_graph, resolve_parameters
from polytrope.pipeline.workflow.spec import StageSpec, Workflow, load_workflow

STAGES = """
from pathlib import Path
from polytrope.pipeline.stage import Artifact, StageContext, stage
from {name}_helper import VALUE

def make(context: StageContext, text: str = "x", edit: str = "") -> dict[str, float]:
    (context.output / "text").write_text(text)
    if edit:
        Path(edit).write_text("VALUE = 2\\n")
    return {{"value": VALUE}}

def late(context: StageContext, edit: bool = False, swallow: bool = False) -> dict[str, float]:
    import importlib
    if edit:
        Path(__file__).with_name("{name}_late.py").write_text("VALUE = 3\\n")
    try:
        importlib.import_module("{name}_late")
    except Exception:
        if not swallow:
            raise
    return {{"value": VALUE}}

@stage(reads=["{name}.txt"])
def read(context: StageContext, edit: str = "") -> dict[str, float]:
    if edit:
        Path(edit).write_text("other")
    return {{"length": len(Path(__file__).with_name("{name}.txt").read_text())}}

def spoil(context: StageContext, source: Artifact, how: str, fail: bool = False) -> None:
    import os
    path = source.path / "text"
    source.path.chmod(0o755)
    path.chmod(0o644)
    if how == "replace":
        (source.path / "new").write_text("y")
        os.replace(source.path / "new", path)
    elif how == "add":
        (source.path / "index.lock").write_text("")
    elif how == "remove":
        path.unlink()
    elif how == "in place":
        status = path.stat()
        path.write_text("y" * len(path.read_text()))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif how == "touch":
        path.touch()
    if fail:
        raise ValueError("made to fail")

@stage(parallel=True)
def spread(context: StageContext, edit: str) -> None:
    Path(edit).write_text("VALUE = 2\\n")

def fingerprint_of(parameters: object, directory: Path) -> dict[str, str]:
    return {{"data": (directory / "data.txt").read_text()}}

@stage(fingerprint=fingerprint_of)
def fingerprinted(context: StageContext, edit: bool) -> None:
    if edit:
        Path("data.txt").write_text("other")

def take(context: StageContext, source: Artifact) -> None:
    (context.output / "text").write_text((source.path / "text").read_text())
"""


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Of a module of stages that no other test knows."""
    found = f"results_{abs(hash(request.node.name)) % 10**9}"
    for file, text in {
        f"{found}.py": STAGES.format(name=found),
        f"{found}_helper.py": "VALUE = 1\n",
        f"{found}_late.py": "VALUE = 1\n",
        f"{found}.txt": "data",
    }.items():
        (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def message(state: RunState, stage: str) -> str:
    error = state.stages[stage].error
    assert error is not None
    assert error["kind"] == "user"
    assert state.stages[stage].attempt == 1
    return f"{error['message']} → {error['hint']}"


def run_editing(place: Place, stages: dict[str, Any], after: str, path: Path, text: str) -> RunState:
    """Run, and write a file when a stage has succeeded."""
    workflow = workflow_of(place.directory, stages)

    def edit(event: Event) -> None:
        if event.type == "stage_succeeded" and event.stage == after:
            path.write_text(text)

    return run_workflow(workflow, build_graph(workflow), place.store, options=FAST, observer=edit)


def test_a_changed_helper_is_computed_again_and_named(place: Place, name: str, capsys: Any) -> None:
    from polytrope.pipeline.commands.cli import main

    (place.directory / "w.yaml").write_text(
        f'name: w\nexecutor: local\ntracking: {{enabled: false}}\nstages: {{s: {{uses: "{name}:make"}}}}\n'
    )
    arguments = [str(place.directory / "w.yaml"), "--store", place.store.address]
    assert main(["run", *arguments, "-q"]) == 0
    (place.directory / f"{name}_helper.py").write_text("VALUE = 1  # a comment\n")
    main(["plan", *arguments])
    assert "stored by run" in capsys.readouterr().out
    (place.directory / f"{name}_helper.py").write_text("VALUE = 22\n")
    main(["plan", *arguments])
    assert f"code of {name}_helper.py changed" in capsys.readouterr().out


def test_code_edited_during_a_run_is_refused(place: Place, name: str) -> None:
    helper = place.directory / f"{name}_helper.py"
    stages = {
        "a": {"uses": f"{name}:make", "with": {"edit": str(helper)}},
        "b": {"uses": f"{name}:make", "with": {"text": "y"}, "after": ["a"]},
    }
    state = place.run(stages)
    assert state.stages["a"].summary == {"value": 1.0}  # it had imported what its key says
    found = message(state, "b")
    assert f"the code `{name}_helper.py` is not what it was when the run started" in found
    assert "polytrope resume --allow-code-change" in found
    again = place.run(stages)
    assert [stage.summary for stage in again.stages.values()] == [{"value": 2.0}, {"value": 2.0}]


def test_code_edited_while_a_stage_had_workers_is_refused(place: Place, name: str) -> None:
    helper = place.directory / f"{name}_helper.py"
    state = place.run({"s": {"uses": f"{name}:spread", "with": {"edit": str(helper)}}})
    assert f"the code `{name}_helper.py` was edited while the stage ran" in message(state, "s")
    assert not place.store.keys()


def test_files_behind_a_fingerprint_that_change_while_the_stage_reads_them_are_refused(place: Place, name: str) -> None:
    (place.directory / "data.txt").write_text("data")
    assert place.run({"s": {"uses": f"{name}:fingerprinted", "with": {"edit": False}}}).status == "succeeded"
    state = place.run({"s": {"uses": f"{name}:fingerprinted", "with": {"edit": True}}})
    assert "what `data` of the stage says was read has changed while it ran" in message(state, "s")


def test_a_comment_added_during_a_run_does_no_harm(place: Place, name: str) -> None:
    helper = place.directory / f"{name}_helper.py"
    stages = {"a": {"uses": f"{name}:make"}, "b": {"uses": f"{name}:make", "with": {"text": "y"}, "after": ["a"]}}
    assert run_editing(place, stages, "a", helper, "# a comment\nVALUE = 1\n").status == "succeeded"


@pytest.mark.parametrize("swallow", [False, True])
def test_a_late_import_of_edited_code_is_refused(place: Place, name: str, swallow: bool) -> None:
    (place.directory / f"{name}.py").write_text(STAGES.format(name=name) + f"\ndef unused():\n    import {name}_late\n")
    state = place.run({"s": {"uses": f"{name}:late", "with": {"edit": True, "swallow": swallow}}})
    assert f"the code `{name}_late.py` is not what it was" in message(state, "s")
    assert not place.store.keys()


def test_a_declared_file_is_part_of_the_key(place: Place, name: str) -> None:
    (place.directory / "data").mkdir()
    (place.directory / "data" / "a.csv").write_text("1")
    stages = {"s": {"uses": f"{name}:make", "reads": ["data/**/*.csv"]}, "t": {"uses": f"{name}:read"}}

    def states() -> list[str]:
        return [stage.state for stage in place.run(stages).stages.values()]

    assert states() == ["succeeded", "succeeded"]
    assert states() == ["cached", "cached"]
    (place.directory / "data" / "b.csv").write_text("2")
    (place.directory / f"{name}.txt").write_text("more data")
    node = build_graph(workflow_of(place.directory, stages))
    assert set(node["s"].reads) == {"data/a.csv", "data/b.csv"}
    assert set(node["t"].reads) == {f"{name}:{name}.txt"}
    assert states() == ["succeeded", "succeeded"]
    with pytest.raises(UserError, match=r"stages\.s: reads: there is no file `nothing\.csv`"):
        build_graph(workflow_of(place.directory, {"s": {"uses": f"{name}:make", "reads": ["nothing.csv"]}}))


def test_a_declared_file_edited_during_a_run_is_refused(place: Place, name: str) -> None:
    data = place.directory / f"{name}.txt"
    stages = {"a": {"uses": f"{name}:make"}, "b": {"uses": f"{name}:read", "after": ["a"]}}
    state = run_editing(place, stages, "a", data, "other")
    assert f"the file `{name}:{name}.txt` (`reads:`) is not what it was" in message(state, "b")
    data.write_text("data")
    state = place.run({"s": {"uses": f"{name}:read", "with": {"edit": str(data)}}})
    assert f"the file `{name}:{name}.txt` (`reads:`) is not what it was" in message(state, "s")


SPOILT = {
    "replace": "text: its bytes have changed",
    "in place": "text: its bytes have changed",
    "add": "index.lock: was added",
    "remove": "text: is gone",
}


def test_an_input_changed_by_its_reader_is_refused_and_computed_again(place: Place, name: str) -> None:
    stages: dict[str, Any] = {}
    for number, how in enumerate(SPOILT):
        stages[f"a{number}"] = {"uses": f"{name}:make", "with": {"text": f"x{number}"}}
        stages[f"b{number}"] = {
            "uses": f"{name}:spoil", "inputs": {"source": f"a{number}"}, "with": {"how": how}
        }  # fmt: skip
        stages[f"c{number}"] = {"uses": f"{name}:take", "inputs": {"source": f"a{number}"}}
    state = place.run(stages, fields={"concurrency": 1, "fail_fast": False})
    for number, what in enumerate(SPOILT.values()):
        found = message(state, f"b{number}")
        assert f"the input `source` (of stage `a{number}`) changed while the stage ran" in found
        assert f"its result cannot be kept: {what}" in found
        assert f"`polytrope resume` computes `a{number}` again" in found
        assert "is not what its manifest says" in message(state, f"c{number}")  # who comes later does not believe it
    assert len(place.store.keys()) == len(SPOILT)
    for number in range(len(SPOILT)):
        del stages[f"b{number}"]
    again = place.run(stages)
    assert {stage.state for stage in again.stages.values()} == {"succeeded"}
    assert [place.text(again, f"c{number}") for number in range(len(SPOILT))] == ["x0", "x1", "x2", "x3"]


def test_what_a_failing_stage_did_to_its_input_is_known(place: Place, name: str) -> None:
    """Also where size, time and inode are what they were."""
    stages: dict[str, Any] = {
        "a": {"uses": f"{name}:make"},
        "b": {
            "uses": f"{name}:spoil",
            "inputs": {"source": "a"},
            "with": {"how": "in place", "fail": True},
            "retries": 0,
        },
        "c": {"uses": f"{name}:take", "inputs": {"source": "a"}},
    }
    state = place.run(stages, fields={"concurrency": 1, "fail_fast": False})
    assert (state.stages["b"].error or {})["message"] == "ValueError: made to fail"
    assert "text: its bytes have changed" in message(state, "c")


def test_an_input_that_is_only_touched_does_no_harm(place: Place, name: str) -> None:
    stages = {
        "a": {"uses": f"{name}:make"},
        "b": {"uses": f"{name}:spoil", "inputs": {"source": "a"}, "with": {"how": "touch"}},
    }
    assert place.run(stages).status == "succeeded"


def test_an_input_that_another_run_replaced_is_noticed(place: Place, name: str) -> None:
    from polytrope.pipeline.executors.input_check import InputCheck
    from polytrope.pipeline.stage import Artifact

    state = place.run({"a": {"uses": f"{name}:make"}})
    key = state.stages["a"].key
    assert key is not None
    artifact = place.store.find(key)
    assert artifact is not None
    with pytest.raises(UserError, match="was removed or replaced after this stage was planned"):
        InputCheck(place.store, key, "source", Artifact(place.store.materialize(key), "another digest", "a"))
    check = InputCheck(place.store, key, "source", Artifact(place.store.materialize(key), artifact.digest, "a"))
    check.repeat()
    place.store.quarantine(key, ["replaced"])
    with pytest.raises(UserError, match="text: is gone"):
        check.repeat()


def test_a_reloaded_module_is_computed_anew_and_an_edited_one_is_refused(place: Place, name: str) -> None:
    path = place.directory / f"{name}_session.py"
    text = "from polytrope.pipeline.stage import StageContext\ndef f(context: StageContext) -> dict[str, float]:\n"
    text += "    return {'v': %s}\n"
    path.write_text(text % "1")
    module = importlib.import_module(f"{name}_session")
    stages = {"s": {"uses": f"{name}_session:f"}}
    assert place.run(stages).stages["s"].summary == {"v": 1.0}
    path.write_text(text % "22 + 0")
    with pytest.raises(UserError, match=rf"{name}_session\.py was edited after this process had imported it") as caught:
        place.run(stages)
    assert "importlib.reload" in caught.value.hint
    importlib.reload(module)
    assert place.run(stages).stages["s"].summary == {"v": 22.0}


def test_ray_workers_that_live_on_are_asked_what_they_imported(name: str, tmp_path: Path) -> None:
    """Without Ray: two tasks in one process, of which the second was planned after an edit."""
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from engine_support import Place, workflow_of
from polytrope.pipeline.executors.worker import make_task, run_task
from polytrope.pipeline.workflow.graph import build_graph
root = Path({str(tmp_path)!r})
place = Place(root)
def task(number):
    node = build_graph(workflow_of(root, {{"s": {{"uses": "{name}:make"}}}}))["s"]
    return make_task(node, identifier=number, run_id="run", key="0" * 64, components={{}}, attempt=1, inputs={{}},
        output=root / str(number) / "files", scratch=root / "scratch", run_directory=root, name="s",
        executor="local", directory=root, store=str(root / "store"))
print(run_task(task(1)).error)
(root / "{name}_helper.py").write_text("VALUE = 2\\n")
print(run_task(task(2)).error.message)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "None"
    assert second.startswith(f"the code `{name}_helper.py` is not what it was")


def here(context: StageContext) -> None:
    """A stage."""


def test_functions_that_no_process_can_import_are_refused_by_name(name: str, tmp_path: Path) -> None:
    import functools

    with pytest.raises(ValueError, match=r"functools\.partial\(.*here.* is not a function"):
        StageSpec(uses=functools.partial(here))
    with pytest.raises(ValueError, match="does not stand at the top of its module"):
        StageSpec(uses=lambda context: context)
    with pytest.raises(UserError, match="is defined in a script or a notebook"):
        load_stage("__main__:f")
    (tmp_path / f"{name}_odd.py").write_text("import functools\ng = functools.partial(print, 2)\n")
    with pytest.raises(UserError, match=rf"`{name}_odd:g` is not a function: functools\.partial"):
        load_stage(f"{name}_odd:g")


def test_infinity_survives_the_record_of_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "w.yaml").write_text(
        "name: w\nparams: {limit: .inf, none: null, odd: .nan}\nstages:\n"
        f'  s: {{uses: "{name}:make", matrix: {{m: [-.inf, 1]}}, with: {{text: "${{params.limit}}"}}}}\n'
    )
    workflow = load_workflow(tmp_path / "w.yaml")
    data = json.loads(json.dumps(workflow.to_dict(), allow_nan=False))
    again = Workflow.from_dict(data, directory=tmp_path)
    assert again.params["limit"] == float("inf")
    assert again.params["none"] is None
    assert again.params["odd"] != again.params["odd"]
    assert again.stages["s"].matrix == {"m": [float("-inf"), 1]}
    assert again.stages["s"].parameters == {"text": float("inf")}
    made = Workflow(name="w", stages={"s": StageSpec(uses="x:y", parameters={"p": Path("a"), "t": ({1, 2}, b"x")})})
    assert Workflow.from_dict(made.to_dict(), directory=tmp_path).stages["s"].parameters == made.stages["s"].parameters


@dataclasses.dataclass
class Record:
    texts: list[str]


def test_references_are_replaced_in_every_kind_of_value(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydantic import BaseModel, ConfigDict, Field, SecretStr

    class Inner(BaseModel):
        model_config = ConfigDict(extra="allow")
        text: str = Field("", exclude=True)

    class Larger(Inner):
        pass

    class Outer(BaseModel):
        token: SecretStr
        names: set[str]
        inner: Inner
        plain: Inner = Inner()
        place: Path
        record: Record

    monkeypatch.setenv("RESULT_TOKEN", "hunter2")
    reference = "${env.RESULT_TOKEN}"
    inner = Larger(text=reference, more=reference)  # type: ignore[call-arg]
    outer = Outer(
        token=SecretStr(reference), names={reference, "b"}, inner=inner, place=Path(reference, "x"),
        record=Record([reference]),
    )  # fmt: skip
    resolved: Any = resolve_parameters(outer)
    assert (resolved.place, resolved.record) == (Path("hunter2/x"), Record(["hunter2"]))
    assert resolve_parameters(resolved) is resolved
    assert resolved.token.get_secret_value() == "hunter2"
    assert resolved.names == {"hunter2", "b"}
    assert type(resolved.inner) is Larger
    assert (resolved.inner.text, resolved.inner.more) == ("hunter2", "hunter2")
    assert resolved.model_fields_set == {"token", "names", "inner", "place", "record"}


def events(context: StageContext) -> list[dict[str, Any]]:
    lines = [path.read_text().splitlines() for path in context.events.directory.glob("*.jsonl")]
    return [json.loads(line) for line in lines[0]] if lines else []


def test_what_a_stage_says_is_checked_where_it_says_it(tmp_path: Path) -> None:
    import numpy

    context = stage_context(tmp_path, stage="train[degree=3]")
    context.log_metrics({"loss": numpy.float32(1.5)}, step=numpy.int64(3))  # type: ignore[dict-item, arg-type]
    context.progress(numpy.int64(1), 2)  # type: ignore[arg-type]
    context.log_dataset("d", "1", "s", {"rows": numpy.int64(7), "mean": numpy.float32(0.5), "of": ["a"]})
    context.log_artifact(context.output / "plot.svg")  # type: ignore[arg-type]
    of_one_element = {"vector": numpy.ones(1), "matrix": numpy.full((1, 1), 2), "exact": decimal.Decimal("0.5")}
    context.log_metrics(of_one_element, step=-(2**63))  # type: ignore[arg-type]
    found = events(context)
    assert [event.get("step") for event in found] == [3, None, None, None, -(2**63)]
    assert found[4]["values"] == {"vector": 1.0, "matrix": 2.0, "exact": 0.5}
    assert found[0]["values"] == {"loss": 1.5}
    assert (found[1]["done"], found[1]["total"]) == (1.0, 2.0)
    assert found[2]["profile"] == {"rows": 7, "mean": 0.5, "of": ["a"]}
    assert found[3]["path"] == "plot.svg"
    wrong: list[tuple[Any, str]] = [
        (lambda: context.log_metrics({"accuracy": None}), r"log_metrics: `accuracy`: None is not a number"),  # type: ignore[dict-item]
        (lambda: context.log_metrics({"a": "1"}), r"log_metrics: `a`: '1' \(str\) is not a number"),  # type: ignore[dict-item]
        (lambda: context.log_metrics({1: 1.0}), r"log_metrics: the name of a metric: 1 \(int\) is not a text"),  # type: ignore[dict-item]
        (lambda: context.log_metrics([1.0]), r"log_metrics: \[1\.0\] \(list\) is not a mapping"),  # type: ignore[arg-type]
        (lambda: context.log_metrics({"a": 1.0}, step=1.5), r"log_metrics: step: 1\.5 \(float\) is not an integer"),  # type: ignore[arg-type]
        (lambda: context.log_metrics({"a": 1.0}, step=2**63), r"log_metrics: step: 9223372036854775808 .* 64 bits"),
        (lambda: context.log_metrics({" ": 1.0}), r"log_metrics: the name of a metric is empty: ' '"),
        (lambda: context.log_metrics({"\udce9": 1.0}), r"log_metrics: the name of a metric: '.udce9' holds half of a"),
        (lambda: context.log_metrics({"a": numpy.ones(2)}), r"log_metrics: `a`: array\(.* is not a number"),
        (lambda: context.progress(5, None), r"progress: total: None is not a number"),  # type: ignore[arg-type]
        (lambda: context.progress(float("nan"), 1), r"progress: done: nan is not finite"),
        (lambda: context.log_params({1: 2}), r"log_params: a name: 1 \(int\) is not a text"),  # type: ignore[dict-item]
        (lambda: context.log_dataset("d", None, "s", {}), r"log_dataset: digest: None is not a text"),  # type: ignore[arg-type]
        (
            lambda: context.log_dataset("d", "1", "s", {"x": object()}),
            r"log_dataset: profile `x`: <object .* is not a number",
        ),
        (lambda: context.log_artifact("../x"), r"log_artifact: path: `\.\./x` is not below context\.output"),
        (lambda: context.log_model("m", name=3, alias="a"), r"log_model: name: 3 \(int\) is not a text"),  # type: ignore[arg-type]
    ]
    for say, expected in wrong:
        with pytest.raises(UserError, match=rf"^stage `train\[degree=3\]`: {expected}"):
            say()
    assert len(events(context)) == 5


LOUD = """
import os, sys
from polytrope.pipeline.stage import StageContext
class Odd(Exception):
    def __str__(self): raise RuntimeError("no text")
def s(context: StageContext, how: str) -> dict[str, float]:
    print("said before")
    (context.output / "text").write_text("x")
    if how == "closed": sys.stdout.close(); sys.stderr.close()
    if how == "none": sys.stdout = sys.stderr = None
    if how == "other": sys.stdout = sys.stderr = object()
    if how == "descriptor": os.close(1)
    if how == "str": raise Odd
    if how == "long": raise ValueError("x" * 1_000_000)
    if how == "none and str": sys.stderr = None; raise Odd
    if how == "metric": return {"loss": 1.0, "accuracy": None}
    return {"done": 1}
"""


def test_a_stage_may_do_what_it_likes_with_its_output(place: Place, name: str) -> None:
    (place.directory / f"{name}_loud.py").write_text(LOUD)
    hows = ["closed", "none", "other", "descriptor", "str", "none and str", "metric", "long"]
    stages = {
        how.replace(" ", "_"): {
            "uses": f"{name}_loud:s",
            "with": {"how": how},
            "retries": 0 if "str" in how or how == "long" else 2,
        }
        for how in hows
    }
    state = place.run(stages, fields={"fail_fast": False})
    for stage in ("closed", "none", "other", "descriptor"):
        assert (stage, state.stages[stage].state) == (stage, "succeeded")
        assert state.stages[stage].summary == {"done": 1.0}
    for stage in ("str", "none_and_str"):
        error = state.stages[stage].error
        assert error is not None
        assert (error["kind"], error["class"]) == ("error", "Odd")
        assert error["message"] == "Odd: (its text cannot be shown: RuntimeError)"
    assert message(state, "metric").startswith("stage `metric` returned: `accuracy`: None is not a number")
    long = state.stages["long"].error
    assert long is not None
    assert re.fullmatch(r"ValueError: x+\n… 980,\d+ characters are left out here …\nx+", long["message"])
    assert (place.store.run_directory(state.run_id) / "journal.jsonl").stat().st_size < 100_000
    logs = place.store.run_directory(state.run_id) / "logs"
    for stage in stages:
        assert "said before" in (logs / stage / "1.log").read_text()
    assert "in s" in (logs / "none_and_str" / "1.log").read_text()
