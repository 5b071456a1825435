"""`notify:`: a command of the user's hears how each run ended, and cannot change it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_support import workflow_of

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.launch import notification
from polytrope.pipeline.launch.launch import launch
from polytrope.pipeline.runs.journal import RunState
from polytrope.pipeline.workflow.spec import Workflow

TELL = (
    'printf \'{"status": "%s", "run": "%s", "message": "%s", "store": "%s"}\' "$POLYTROPE_STATUS" "$POLYTROPE_RUN" '
    '"$POLYTROPE_MESSAGE" "$POLYTROPE_STORE" > told.json'
)


def with_notify(directory: Path, stages: dict[str, Any], notify: str) -> Workflow:
    return workflow_of(directory, stages).model_copy(update={"notify": notify})


@pytest.mark.parametrize(("uses", "status"), [("make", "succeeded"), ("fail_until", "failed")])
def test_a_command_hears_how_a_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uses: str, status: str
) -> None:
    monkeypatch.chdir(tmp_path)
    stage: dict[str, Any] = {"uses": uses, "retries": 0, "with": {"text": "1"} if uses == "make" else {"attempts": 1}}
    state = launch(with_notify(tmp_path, {"only": stage}, TELL), store="store", run_id="mine", tracking=False)
    assert state.status == status
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["status"] == status
    assert told["run"] == "mine"
    assert told["message"].endswith(f"run mine {status}: 1 {status}")
    assert Path(told["store"]) == tmp_path / "store"


def test_a_command_that_fails_is_named_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stages = {"only": {"uses": "make", "with": {"text": "1"}}}
    notify = "echo the hook is gone >&2; exit 3"
    state = launch(with_notify(tmp_path, stages, notify), store="store", tracking=False, display="none")
    assert state.status == "succeeded"
    assert "notify: `echo the hook is gone >&2; exit 3` ended with 3: the hook is gone" in capsys.readouterr().err


def test_what_is_said_of_a_command_that_fails_shows_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEST_HOOK", "hunter2-hunter2")
    monkeypatch.setattr(notification, "_PATIENCE", 0.5)
    stages = {"only": {"uses": "make", "with": {"text": "1"}}}
    for ending, said in (
        ("exit 3", "ended with 3: no ${env.TEST_HOOK}"),
        ("sleep 99 & echo $! > child; wait", ": no end after 0.5 s"),
    ):
        command = "cat /proc/$$/cmdline > shown; echo no '${env.TEST_HOOK}'; echo ${env.TEST_HOOK} > told; " + ending
        launch(with_notify(tmp_path, stages, command), store="store", tracking=False, display="none")
        error = capsys.readouterr().err
        assert said in error
        assert "hunter2" not in error
        assert (tmp_path / "told").read_text() == "hunter2-hunter2\n"
        assert "hunter2" not in (tmp_path / "shown").read_text()  # by `ps`
    child = int((tmp_path / "child").read_text())
    for _ in range(200):  # its end is not ours to wait for
        if not runs(child):
            break
        time.sleep(0.02)
    assert not runs(child)


def runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_command_leaves_in_the_background_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stages = {"only": {"uses": "make", "with": {"text": "1"}}}
    launch(with_notify(tmp_path, stages, "sleep 99 & echo $! > child"), store="store", tracking=False, display="none")
    assert capsys.readouterr().err == ""
    child = int((tmp_path / "child").read_text())
    assert runs(child)
    os.kill(child, signal.SIGKILL)


def test_ctrl_c_just_after_a_command_ended_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        wait(process, timeout)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        notification.notify("true", {}, RunState(), "mine", "store")


def test_a_variable_that_is_not_set_is_refused_before_anything_starts(tmp_path: Path) -> None:
    workflow = with_notify(tmp_path, {"only": {"uses": "make", "with": {"text": "1"}}}, "curl ${env.NO_SUCH_HOOK}")
    with pytest.raises(UserError, match=r"notify: .*NO_SUCH_HOOK"):
        launch(workflow, store=tmp_path / "store", tracking=False)
    assert not list(tmp_path.glob("store/runs/*"))
