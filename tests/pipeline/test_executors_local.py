"""Stages share a process where none can tell, and only there."""

from __future__ import annotations

import decimal
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_engine import Place, gone, workflow_of

from polytrope.pipeline.executors.local import LocalExecutor
from polytrope.pipeline.executors.worker import Outcome, make_task
from polytrope.pipeline.workflow.graph import build_graph

pytestmark = pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists(),
    reason="this kernel does not list a process's children",
)

TRACES = (
    "binding", "binding, again and again", "list", "dictionary", "class", "cache", "patch", "memory", "environment",
    "module", "forbidden import", "file", "standard input", "thread", "child", "handler", "blocked signal", "timer",
    "umask", "limit", "priority", "stream", "directory of temporary files", "warnings", "log handler", "socket",
    "collector",
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


def test_random_numbers_and_contexts_start_anew_in_every_stage(place: Place) -> None:
    found = summaries(place, chain("", "", "", "seed", "decimal", ""))
    assert len({summary["process"] for summary in found[2:]}) == 1
    assert found[4]["drawn"] != random.Random(0).random()
    assert found[5]["digits"] == decimal.getcontext().prec


class Executor:
    """A local executor and tasks for it, one at a time."""

    def __init__(self, place: Place) -> None:
        self.place, self.number = place, 0
        self.executor = LocalExecutor()

    def submit(self, uses: str = "make", **parameters: Any) -> int:
        """Start a stage; returns its process."""
        self.number += 1
        node = build_graph(workflow_of(self.place.directory, {"s": {"uses": uses, "with": parameters}}))["s"]
        directory = self.place.directory / str(self.number)
        task = make_task(
            node, identifier=self.number, run_id="run", key="0" * 64, components={}, attempt=1, inputs={},
            output=directory / "files", scratch=directory / "scratch", run_directory=directory, name="s",
            executor="local", directory=self.place.directory, store=str(self.place.store.root),
        )  # fmt: skip
        self.executor.submit(task)
        while not self.executor.has_started(self.number):
            assert not self.executor.wait(0.1)
        return self.executor._pids[self.number]

    def outcome(self) -> Outcome:
        while not (ended := self.executor.wait(10)):
            pass
        ((identifier, outcome),) = ended
        assert identifier == self.number
        return outcome

    def warm(self) -> int:
        """The process that waits after three stages."""
        for _ in range(3):
            pid = self.submit()
            assert self.outcome().error is None
        return pid


@pytest.fixture
def executor(place: Place) -> Iterator[Executor]:
    found = Executor(place)
    yield found
    found.executor.close()


def test_cancelling_a_stage_ends_the_process_that_it_shares(executor: Executor) -> None:
    process = executor.warm()
    assert executor.submit(seconds=600) == process
    executor.executor.cancel(executor.number)
    error = executor.outcome().error
    assert error is not None
    assert error.kind == "cancelled"
    assert gone([process])
    assert executor.submit() != process
    assert executor.outcome().error is None


def test_a_process_killed_while_it_waits_harms_no_stage(executor: Executor) -> None:
    process = executor.warm()
    os.kill(process, signal.SIGKILL)
    assert gone([process])
    assert executor.submit() != process
    assert executor.outcome().error is None


def test_a_process_killed_with_a_later_stage_is_a_lost_worker(executor: Executor) -> None:
    process = executor.warm()
    assert executor.submit(seconds=600) == process
    os.kill(process, signal.SIGKILL)
    error = executor.outcome().error
    assert error is not None
    assert error.kind == "worker lost"


def test_waiting_processes_end_when_another_kind_of_stage_starts(executor: Executor) -> None:
    process = executor.warm()
    assert executor.submit("say_much", text="") != process
    assert executor.outcome().error is None
    assert gone([process])


def test_waiting_processes_end_with_the_executor(executor: Executor) -> None:
    process = executor.warm()
    executor.executor.close()
    assert gone([process])


def test_many_long_messages_in_both_directions_do_not_meet_head_on(place: Place) -> None:
    stages = {
        f"s{number}": {"uses": "say_much", "with": {"text": "x" * 300_000 + str(number)}, "resources": {"cpus": 0.01}}
        for number in range(60)
    }
    state = place.run(stages, executor="local")
    assert {stage.state for stage in state.stages.values()} == {"succeeded"}
