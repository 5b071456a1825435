"""`polytrope open` and `ui`: from a finished run to its result in a browser, on the quickstart's store."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from quickstart_support import Run

from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.engine.run import run_workflow
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.tracking.lock import locked
from polytrope.pipeline.tracking.process import free_port
from polytrope.pipeline.workflow.graph import build_graph
from polytrope.pipeline.workflow.spec import Workflow

POLYTROPE = str(Path(sys.executable).with_name("polytrope"))

pytestmark = pytest.mark.timeout(600)


def test_a_run_ends_with_the_commands_that_open_its_results(local_quickstart: Run) -> None:
    report, mlflow = local_quickstart.output.strip().splitlines()[-2:]
    run, store = local_quickstart.state.run_id, local_quickstart.store.address
    assert report == f"report: polytrope open {run} report --store {store}"
    assert mlflow == f"MLflow: polytrope ui {run} --store {store}"
    assert not re.search(r"[0-9a-f]{64}", local_quickstart.output)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "report.html"),
        (["report"], "report.html"),
        (["report", "report"], "report.html"),
        (["artifact", "baseline"], "files"),
        (["card"], None),
    ],
)
def test_what_is_printed_is_there(
    words: list[str], expected: str | None, local_quickstart: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run, store = local_quickstart.state.run_id, local_quickstart.store.address
    given = [run] if words in (["report", "report"], ["card"]) else []  # others may have run in this store since
    assert main(["open", *given, *words, "--print", "--store", store]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.exists()
    assert path.name == (expected or f"{run}.html")
    if words[:1] == ["artifact"]:
        assert path == local_quickstart.artifact("baseline")
    if words == ["card"]:
        assert "Use and limits" in path.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["artifact"], "the stage is missing"),
        (["artifact", "basline"], "did you mean `baseline`?"),
        (["report", "baseline"], "`baseline` made none"),
        (["mlflow"], "no MLflow server shows this run now"),
        (["mlflow", "baseline"], "`baseline` is one word too many"),
        (["RUN", "reports"], "did you mean `report`?"),
    ],
)
def test_what_is_not_there_is_refused_by_name(
    words: list[str], said: str, local_quickstart: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [local_quickstart.state.run_id if word == "RUN" else word for word in words]
    assert main(["open", *words, "--print", "--store", local_quickstart.store.address]) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert output.out == ""


def test_the_browser_gets_the_file_and_without_one_the_line_has_to_do(local_quickstart: Run, tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [POLYTROPE, "open", "report", "--store", local_quickstart.store.address]
    for variables in ({}, {"BROWSER": f"{browser} %s"}):
        assert not (tmp_path / "opened").exists()
        done = subprocess.run(
            command, env={**environment, **variables}, capture_output=True, text=True, timeout=60, check=True
        )
    assert (tmp_path / "opened").read_text().strip() == Path(done.stdout.strip()).as_uri()


def test_a_run_that_mlflow_has_not_received_is_sent_before_it_is_shown(
    local_quickstart: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that computed nothing ends before its copy does, and its reader types `ui` at once."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store(tmp_path / "store")
    stages = {"train": {"uses": "mlflow_stages:train", "with": {"steps": 1}}}
    workflow = Workflow.from_dict({"name": "shown", "executor": "local", "stages": stages}, directory=tmp_path)
    run_workflow(workflow, build_graph(workflow), store, run_id="mine")  # without what sends it
    database = tmp_path / "store" / "mlflow.db"
    shutil.copy(Path(local_quickstart.store.address) / "mlflow.db", database)  # that MLflow would take seconds to make
    command = [POLYTROPE, "ui", "--store", store.address, "--port", str(free_port())]
    with locked(store.run_directory("mine") / "mlflow.lock", 0):  # as the process has it that sends the run
        shown = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert shown.stdout is not None
        assert shown.stderr is not None
        try:
            assert shown.stderr.readline() == "polytrope: run mine is being sent to MLflow …\n"
        except BaseException:
            shown.kill()
            raise
    try:
        ((experiment, run),) = re.findall(r"/experiments/(\d+)/runs/(\w+)", shown.stdout.readline())
    finally:
        shown.terminate()
        shown.communicate(timeout=60)
    sent = MlflowClient(tracking_uri=f"sqlite:///{database}").get_run(run)
    assert sent.info.experiment_id == experiment
    assert sent.info.status == "FINISHED"
    assert sent.data.tags["polytrope.run_id"] == "mine"


def test_ui_does_not_take_another_port_than_it_was_given(
    local_quickstart: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert main(["ui", "--port", str(port), "--store", local_quickstart.store.address]) == 2
    assert f"--port {port}: is used by process {os.getpid()} (" in capsys.readouterr().err
