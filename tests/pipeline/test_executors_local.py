"""Every stage has a process of its own, and nothing that it starts outlives it, whoever ends it and how."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_support import Place, gone, start_driver, wait_for, workflow_of

from polytrope.pipeline.executors.local import LocalExecutor
from polytrope.pipeline.executors.worker import Outcome, make_task
from polytrope.pipeline.workflow.graph import build_graph


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_a_stage_leaves_behind_is_met_by_no_other(place: Place) -> None:
    stages: dict[str, Any] = {"s0": {"uses": "leave"}}
    stages |= {f"s{number}": {"uses": "leave", "inputs": {"source": f"s{number - 1}"}} for number in range(1, 4)}
    state = place.run(stages, executor="local")
    summaries = [stage.summary for stage in state.stages.values()]
    assert [summary["found"] for summary in summaries] == [0.0] * 4
    assert len({summary["process"] for summary in summaries} - {os.getpid()}) == 4


class Executor:
    """A local executor and tasks for it, one at a time."""

    def __init__(self, place: Place) -> None:
        self.place, self.number = place, 0
        self.executor = LocalExecutor()

    def submit(self, uses: str, **parameters: Any) -> None:
        self.number += 1
        node = build_graph(workflow_of(self.place.directory, {"s": {"uses": uses, "with": parameters}}))["s"]
        directory = self.place.directory / str(self.number)
        task = make_task(
            node, identifier=self.number, run_id="run", key="0" * 64, components={}, attempt=1, inputs={},
            output=directory / "files", scratch=directory / "scratch", run_directory=directory, name="s",
            executor="local", directory=self.place.directory, store=self.place.store.address,
        )  # fmt: skip
        self.executor.submit(task)

    def outcome(self) -> Outcome:
        while not (ended := self.executor.wait(10)):
            pass
        ((identifier, outcome),) = ended
        assert identifier == self.number
        return outcome


@pytest.fixture
def executor(place: Place) -> Iterator[Executor]:
    found = Executor(place)
    yield found
    found.executor.close()


def family(place: Place) -> list[int]:
    """The stage and the four processes that it started: in a session of its own, orphaned, without an environment."""
    pids = [int(pid) for pid in wait_for(place.directory / "pids").split()]
    assert len(pids) == 5
    return pids


@pytest.mark.parametrize(("how", "kind"), [("return", None), ("error", "error")])
def test_a_stage_that_ends_by_itself_leaves_no_process(
    place: Place, executor: Executor, how: str, kind: str | None
) -> None:
    executor.submit("descend", pid_file=str(place.directory / "pids"), how=how)
    error = executor.outcome().error
    assert (error and error.kind) == kind
    assert not any(psutil.pid_exists(pid) for pid in family(place)), "its outcome came before their end"


@pytest.mark.parametrize("victim", ["stage", "keeper", "nursery", "cancelled"])
def test_a_stage_that_is_ended_leaves_no_process(place: Place, executor: Executor, victim: str) -> None:
    executor.submit("descend", pid_file=str(place.directory / "pids"), how="hang")
    while not (place.directory / "pids").exists():
        assert not executor.executor.wait(0.05)
    pids = family(place)
    keeper = psutil.Process(pids[0]).parent()
    assert keeper is not None
    nursery = keeper.parent()
    assert nursery is not None
    if victim == "cancelled":
        executor.executor.cancel(executor.number)
    else:
        {"stage": psutil.Process(pids[0]), "keeper": keeper, "nursery": nursery}[victim].kill()
    error = executor.outcome().error
    assert error is not None
    assert error.kind == ("cancelled" if victim == "cancelled" else "worker lost")
    assert gone([*pids, *([keeper.pid] if victim in ("keeper", "nursery") else [])])
    executor.submit("make")
    assert executor.outcome().error is None, "the next stage has a process again"


def test_a_stage_past_its_timeout_leaves_no_process(place: Place) -> None:
    parameters = {"pid_file": str(place.directory / "pids"), "how": "hang"}
    state = place.run({"s": {"uses": "descend", "with": parameters, "timeout": 0.7, "retries": 0}}, executor="local")
    assert (state.stages["s"].error or {})["kind"] == "timeout"
    assert not any(psutil.pid_exists(pid) for pid in family(place))


def test_a_killed_driver_leaves_no_process(place: Place) -> None:
    driver = start_driver(
        place, {"s": {"uses": "descend", "with": {"pid_file": str(place.directory / "pids"), "how": "hang"}}}
    )
    pids = family(place)
    pids += [child.pid for child in psutil.Process(driver.pid).children(recursive=True)]
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert gone(pids)


def test_many_long_messages_in_both_directions_do_not_meet_head_on(place: Place) -> None:
    stages = {
        f"s{number}": {"uses": "say_much", "with": {"text": "x" * 300_000 + str(number)}, "resources": {"cpus": 0.01}}
        for number in range(60)
    }
    state = place.run(stages, executor="local")
    assert {stage.state for stage in state.stages.values()} == {"succeeded"}
