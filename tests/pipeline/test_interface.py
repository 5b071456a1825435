"""`polytrope.run` as a person calls it in Python: files as text, results by stage, failures as exceptions."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import polytrope
from polytrope.pipeline.commands.cli import main

STAGES = '''
"""Stages of this test."""
from polytrope import Artifact, StageContext

def make(context: StageContext, steps: int = 3) -> dict[str, float]:
    """Make."""
    if steps > 9:
        raise ValueError(f"{steps} steps are too many")
    (context.output / "x.txt").write_text("line\\n" * steps)
    (context.output / "report.html").write_text("page")
    return {"lines": steps}

def use(context: StageContext, source: Artifact) -> None:
    """Use."""
'''
WORKFLOW = """\
name: demo
executor: local
params: {steps: 3}
stages:
  make: {uses: "interface_stages:make", with: {steps: "${params.steps}"}, retries: 0}
  never: {uses: "interface_stages:use", inputs: {source: make}, when: params.steps > 5}
  each: {uses: "interface_stages:make", matrix: {n: [1, 2]}, with: {steps: "${matrix.n}"}}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "interface_stages.py").write_text(STAGES)
    (tmp_path / "w.yaml").write_text(WORKFLOW)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLYTROPE_STORE", "elsewhere")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "interface_stages", raising=False)
    return tmp_path


def test_a_run_shows_its_progress_and_gives_results_by_stage(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = polytrope.run("w.yaml", overrides=["params.steps=4"], tracking=False)
    assert "make: succeeded" in capsys.readouterr().out
    for words in (["sync", result.run_id], ["open", result.run_id, "mlflow", "--print"]):  # what is not sent stays so
        main(words)
        assert "was made without MLflow (`tracking.enabled: false`)" in "".join(capsys.readouterr())
    assert not (project / "elsewhere" / "mlflow.db").exists()
    assert repr(result).startswith(f"<run {result.run_id} succeeded in ")
    assert repr(result).endswith(": 3 succeeded, 1 skipped>")
    assert repr(result["make"]) == "<stage make succeeded: lines 4>"
    assert result["make"].metrics == {"lines": 4.0}
    assert (result["make"].path / "x.txt").read_text() == "line\n" * 4
    assert result["make"].path.is_relative_to(project / "elsewhere")  # $POLYTROPE_STORE, as for the command
    assert result["make"].report == result["make"].path / "report.html"
    assert result.report == result["each[n=2]"].report
    assert list(result) == ["make", "never", "each[n=1]", "each[n=2]"]
    with pytest.raises(polytrope.UserError, match=r"`never` has no result, it is skipped: .*steps > 5"):
        _ = result["never"].path
    with pytest.raises(KeyError, match=r"no stage `each`; it has branches: each\[n=1\], each\[n=2\]"):
        _ = result["each"]
    with pytest.raises(KeyError, match="did you mean `make`"):
        _ = result["mak"]

    with pytest.raises(polytrope.RunFailedError, match="make failed: ValueError: 10 steps are too many") as caught:
        polytrope.run(Path("w.yaml"), overrides=["params.steps=10"], tracking=False, display="none")
    assert capsys.readouterr().out == ""
    assert f"polytrope resume {caught.value.result.run_id}" in str(caught.value)
    assert caught.value.result.status == "failed"
    assert caught.value.result["make"].reason == "ValueError: 10 steps are too many"

    with pytest.raises(polytrope.UserError, match="the workflow is loaded already"):
        polytrope.run(polytrope.load_workflow("w.yaml"), overrides=["params.steps=1"])


def test_the_report_is_found_without_fetching_the_results_that_hold_none(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "two.yaml").write_text(
        "name: two\nexecutor: local\nstages:\n"
        '  make: {uses: "interface_stages:make"}\n'
        '  use: {uses: "interface_stages:use", inputs: {source: make}}\n'
    )
    result = polytrope.run("two.yaml", tracking=False, display="none")
    fetched: list[str] = []
    materialize = polytrope.Store.materialize

    def recorded(store: polytrope.Store, key: str, *arguments: Any) -> Path:
        fetched.append(key)
        return materialize(store, key, *arguments)

    monkeypatch.setattr(polytrope.Store, "materialize", recorded)
    assert result["use"].report is None
    assert fetched == []
    assert result.report is not None
    assert result.report.read_text() == "page"
    assert result["use"].path.is_dir()


SCRIPT = """
from polytrope import StageContext, StageSpec, Workflow, run

def make(context: StageContext) -> None:
    (context.output / "x").write_text("x")

run(Workflow(name="mine", stages={"a": StageSpec(uses=%s)}), executor="local", tracking=False)
"""


@pytest.mark.parametrize(
    ("uses", "message"),
    [
        ("make", "stage `__main__:make` is defined in a script or a notebook"),
        ('"looks_back:make"', "the module `looks_back` starts a run when it is imported"),
    ],
)
def test_a_stage_of_the_script_that_runs_it_is_refused_at_once(tmp_path: Path, uses: str, message: str) -> None:
    (tmp_path / "looks_back.py").write_text(SCRIPT % uses)
    done = subprocess.run(
        [sys.executable, "looks_back.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-2]
    assert "→" in done.stderr.splitlines()[-1]


def test_every_public_function_takes_a_path_as_text(tmp_path: Path) -> None:
    places = {*polytrope.PLACES.values(), "polytrope.models.checkpoint", "polytrope.models.formats"}
    found = []
    for place in places:
        module = importlib.import_module(place)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or function.__module__ != place:
                continue
            for parameter in inspect.signature(function).parameters.values():
                kinds = str(parameter.annotation).split(" | ")
                if "Path" in kinds:
                    found.append(f"{place}.{name}: {parameter}")
                    assert "str" in kinds, found[-1]
    assert len(found) >= 8
    model = polytrope.build_model("gpt2", {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 16})
    polytrope.save_model(str(tmp_path / "model"), model)
    assert polytrope.read_model(str(tmp_path / "model")).config == model.config
