"""A run is of one workflow, and goes on with it as it was started: whatever differs now is refused or said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import FILE_NAME, Journal
from polytrope.pipeline.runs.record import changed_workflow_files, check_workflow, workflow_files

POLYTROPE = str(Path(sys.executable).with_name("polytrope"))
STAGES = """
from polytrope.pipeline.stage import StageContext

def make(context: StageContext, text: str = "x") -> None:
    (context.output / "text").write_text(text)
    if text == "bad":
        raise RuntimeError("made to fail")
"""
BASE = """
name: first
executor: local
tracking: {enabled: false}
params: {text: bad}
"""
MAIN = """
include: base.yaml
stages:
  a: {uses: "record_test_stages:make"}
  b: {uses: "record_test_stages:make", with: {text: "${params.text}"}, retries: 0}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "record_test_stages.py").write_text(STAGES)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "w.yaml").write_text(MAIN)
    return tmp_path


def polytrope(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([POLYTROPE, *arguments], cwd=directory, capture_output=True, text=True, check=False)


def test_a_run_goes_on_with_its_own_workflow_only(project: Path) -> None:
    assert polytrope(project, "run", "w.yaml", "-q", "--run-id", "r", "--keep-going").returncode == 1
    journal = project / ".polytrope" / "runs" / "r" / FILE_NAME
    before = journal.read_bytes()

    (project / "other.yaml").write_text(
        BASE.replace("first", "second") + "stages: {c: {uses: record_test_stages:make}}"
    )
    refused = polytrope(project, "run", "other.yaml", "--run-id", "r")
    assert refused.returncode == 2
    assert "run r is of the workflow `first`, not of `second`" in refused.stderr

    (project / "other.yaml").write_text(BASE + "stages: {c: {uses: record_test_stages:make}}")
    refused = polytrope(project, "run", "other.yaml", "--run-id", "r")
    assert refused.returncode == 2
    assert "run r has finished `a`, which this version of the workflow `first` does not have" in refused.stderr
    assert journal.read_bytes() == before

    (project / "base.yaml").write_text("# a comment\n" + BASE)
    silent = polytrope(project, "resume", "r", "-q")
    assert silent.returncode == 1
    assert "changed since" not in silent.stderr

    (project / "base.yaml").write_text(BASE.replace("bad", "good"))
    for _ in range(2):  # it is said every time
        resumed = polytrope(project, "resume", "r", "-q")
        assert resumed.returncode == 1, "it goes on with the workflow as it was"
        assert f"{project / 'base.yaml'} has changed since run r was started" in resumed.stderr
    line = resumed.stderr.partition("that keeps what still fits: ")[2].splitlines()[0]
    assert line == "polytrope run w.yaml --keep-going"
    new = polytrope(project, *line.split()[1:], "-q")
    assert new.returncode == 0, new.stderr
    assert "1 cached" in new.stdout


def finished(directory: Path, *names: str) -> Path:
    journal = Journal.open(directory)
    journal.append("run_started", run_id=directory.name, workflow="w", stages=list(names))
    for name in names:
        journal.append("stage_succeeded", stage=name, key="k", digest="d")
    journal.close()
    return directory


def test_what_a_stage_returned_comes_with_it(tmp_path: Path) -> None:
    run = finished(tmp_path / "r", "a", "t[path=x/y]", "t[path=x/y]/part", "split/part/deep")
    check_workflow(run, "w", {"a", "t[path=x/y]", "split"})
    check_workflow(tmp_path / "none", "w", {"a"})
    with pytest.raises(UserError, match=r"finished `split/part/deep`, which"):
        check_workflow(run, "w", {"a", "t[path=x/y]", "splitter"})


def break_yaml(path: Path) -> None:
    path.write_text("name: [")


@pytest.mark.parametrize("change", [break_yaml, Path.unlink, lambda path: path.write_text("name: other")])
def test_the_file_that_changed_is_named(project: Path, change: Callable[[Path], object]) -> None:
    files = workflow_files(project / "w.yaml")
    assert list(files) == [str(project / "w.yaml"), str(project / "base.yaml")]
    assert changed_workflow_files(files) == []
    change(project / "base.yaml")
    assert changed_workflow_files(files) == [str(project / "base.yaml")]
    (project / "w.yaml").unlink()
    assert changed_workflow_files(files) == [], "another machine"
    assert workflow_files(None) == {}
