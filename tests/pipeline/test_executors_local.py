"""Stages share a process where none can tell, and only there."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from test_engine import Place, gone, wait_for

TRACES = (
    "binding", "list", "dictionary", "memory", "environment", "module", "file", "thread", "child", "handler", "umask",
    "limit", "stream",
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def chain(*what: str) -> dict[str, Any]:
    """Stages one after another; the n-th leaves the n-th of these behind."""
    stages: dict[str, Any] = {}
    for number, text in enumerate(what):
        inputs = {"inputs": {"source": f"s{number - 1}"}} if number else {}
        stages[f"s{number}"] = {"uses": "leave", "with": {"what": text}, **inputs}
    return stages


def summaries(place: Place, stages: dict[str, Any]) -> list[dict[str, float]]:
    state = place.run(stages, executor="local")
    assert state.status == "succeeded"
    return [stage.summary for stage in state.stages.values()]


def test_stages_that_leave_no_trace_share_a_process(place: Place) -> None:
    found = summaries(place, chain(*[""] * 8))
    processes = [summary["process"] for summary in found]
    assert len(set(processes[2:])) == 1  # the first one loads the module, which is then loaded before the second fork
    assert os.getpid() not in processes


def test_what_a_stage_leaves_behind_is_met_by_no_other(place: Place) -> None:
    kinds = [kind for trace in TRACES for kind in ("", trace, "")]
    found = summaries(place, chain("", "", *kinds))[2:]
    for trace, (before, dirty, after) in zip(TRACES, zip(*[iter(found)] * 3, strict=True), strict=True):
        assert before["process"] == dirty["process"], f"{trace}: the process before was not clean"
        assert dirty["process"] != after["process"], f"{trace}: was not noticed"
        assert after["found"] == 0


def test_an_orphan_is_killed_when_its_stage_ends_though_the_process_goes_on(place: Place) -> None:
    state = place.run(chain("", "", "", "orphan", ""), executor="local")
    processes = [stage.summary["process"] for stage in state.stages.values()]
    assert processes[2] == processes[3] == processes[4]
    key = state.stages["s3"].key
    assert key is not None
    artifact = place.store.find(key)
    assert artifact is not None
    assert gone([int((artifact.path / "orphan").read_text())])


def test_a_failed_stage_ends_its_process(place: Place) -> None:
    stages = chain("", "", "", "error")
    stages["s3"]["retries"] = 1
    *_, before, after = summaries(place, stages)
    assert before["process"] != after["process"]


def test_a_timeout_ends_a_process_that_has_run_other_stages(place: Place) -> None:
    quick = {f"q{number}": {"uses": "make", "with": {"text": str(number)}} for number in range(6)}
    slow = {"uses": "make", "inputs": {}, "timeout": 1, "retries": 0, "with": {"seconds": 600}}
    state = place.run({**quick, "slow": slow}, executor="local", fields={"fail_fast": False, "concurrency": 1})
    states = [stage.state for stage in state.stages.values()]
    assert states == ["succeeded"] * 6 + ["failed"]
    assert (state.stages["slow"].error or {}).get("kind") == "timeout"


def test_a_process_killed_while_it_waits_harms_no_stage(place: Place) -> None:
    pid_file = place.directory / "pid"
    stages = {
        **chain("", "", ""),
        "report": {"uses": "report_process", "inputs": {"source": "s2"}, "with": {"pid_file": str(pid_file)}},
        "next": {"uses": "leave", "inputs": {"source": "report"}, "with": {"what": ""}},
    }

    def kill() -> None:
        os.kill(int(wait_for(pid_file)), signal.SIGKILL)
        (place.directory / "killed").touch()

    thread = threading.Thread(target=kill)
    thread.start()
    state = place.run(stages, executor="local")
    thread.join()
    assert state.status == "succeeded"
    assert state.stages["next"].attempt == 1
    assert state.stages["next"].summary["process"] != state.stages["s2"].summary["process"]
