"""A run does each stage once, in order, keeps what is done, and ends in a state that says what happened."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from engine_support import FAST, Place, diamond, forge, gone, start_driver, wait_for, workflow_of

from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.engine.options import CANCEL_FILE, RunOptions
from polytrope.pipeline.engine.run import run_workflow
from polytrope.pipeline.errors import RunElsewhereError, UserError
from polytrope.pipeline.runs.journal import Event, RunState, fold, read
from polytrope.pipeline.runs.lease import Lease
from polytrope.pipeline.workflow.graph import build_graph


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_run_computes_every_stage_once_from_its_inputs(place: Place) -> None:
    state = place.run(diamond(place))
    assert state.status == "succeeded"
    assert {name: stage.state for name, stage in state.stages.items()} == dict.fromkeys("abcd", "succeeded")
    assert place.text(state, "d") == "x+c"
    assert state.stages["d"].summary == {"length": 3.0, "parts": 2.0}
    assert place.calls == Counter("abcd")
    assert place.types("d") == ["stage_started", "stage_succeeded"]


def test_a_second_run_takes_everything_from_the_store(place: Place) -> None:
    first = place.run(diamond(place))
    second = place.run(diamond(place))
    assert {stage.state for stage in second.stages.values()} == {"cached"}
    assert {stage.hit_from for stage in second.stages.values()} == {first.run_id}
    assert second.stages["d"].summary == first.stages["d"].summary
    assert place.calls == Counter("abcd")


def test_only_what_a_change_reaches_is_computed_again(place: Place) -> None:
    place.run(diamond(place))
    state = place.run(diamond(place, text="y"))
    assert {name: stage.state for name, stage in state.stages.items()} == {
        "a": "succeeded", "b": "succeeded", "c": "cached", "d": "succeeded",
    }  # fmt: skip
    assert place.text(state, "d") == "y+c"


def test_an_unchanged_result_stops_the_recomputation(place: Place) -> None:
    """A forced stage with the same output leaves its followers cached."""
    place.run(diamond(place))
    state = place.run(diamond(place), RunOptions(force=frozenset({"a"})))
    assert [state.stages[name].state for name in "abcd"] == ["succeeded", "cached", "cached", "cached"]
    state = place.run(diamond(place), RunOptions(start_from="b"))
    assert [state.stages[name].state for name in "abcd"] == ["cached", "succeeded", "cached", "succeeded"]


def test_what_was_hashed_is_not_hashed_again_by_a_driver(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a forced stage that replaces its result nor for the runs after it."""
    stages = {"s": {"uses": "count_calls", "with": {"file": str(place.directory / "count")}}}
    place.run(stages)
    hashed: list[Path] = []
    monkeypatch.setattr("polytrope.pipeline.store.verification.hash_file", hashed.append)
    forced = place.run(stages, options=dataclasses.replace(FAST, force=frozenset({"s"})))
    assert {stage.state for stage in place.run(stages).stages.values()} == {"cached"}
    assert hashed == []
    monkeypatch.undo()
    assert place.text(forced, "s") == "xx"


def test_the_journal_alone_tells_the_state_and_the_record_what_was_run(place: Place) -> None:
    state = place.run(diamond(place), RunOptions(record={"argv": ["run", "x.yaml"]}), run_id="mine", resume=False)
    directory = place.store.run_directory("mine")
    assert fold(read(directory)) == state
    record = json.loads((directory / "workflow.json").read_text())
    assert record["argv"] == ["run", "x.yaml"]
    assert list(record["workflow"]["stages"]) == ["a", "b", "c", "d"]
    assert record["directory"] == str(place.directory)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("error", "error", "ValueError: try 1 of s"),
        ("kill", "worker lost", "killed by SIGKILL"),
        ("exit", "worker lost", "exit code 7"),
    ],
)
def test_a_failure_is_retried_with_its_scratch_kept(place: Place, how: str, kind: str, message: str) -> None:
    stages = {"s": {"uses": "fail_until", "retries": 2, "with": {"attempts": 1, "how": how}}}
    state = place.run(stages)
    assert state.status == "succeeded"
    assert state.stages["s"].attempt == 2
    retrying = next(event for event in place.events if event.type == "stage_retrying")
    assert retrying.get("error")["kind"] == kind
    assert message in retrying.get("error")["message"]
    assert "this is try 2" in (place.store.run_directory(state.run_id) / "logs" / "s" / "2.log").read_text()
    assert not any((Path(place.store.address) / "scratch").iterdir())


def test_what_a_stage_notes_is_in_the_journal_while_it_runs_and_once(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {"s": {"uses": "note_until_journaled", "retries": 0}}
    state = place.run(stages, run_id="noted", resume=False)
    assert place.types("s") == ["stage_started", "stage_noted", "stage_failed"]
    error = state.stages["s"].error
    assert error is not None
    assert error["message"] == "ValueError: not yet"
    place.run(stages, run_id="noted", resume=True)
    assert place.types("s")[-3:] == ["stage_started", "stage_noted", "stage_succeeded"]
    assert fold(read(place.store.run_directory("noted"))).stages["s"].notes == {"1.0": "first try", "2.0": "second try"}
    assert main(["status", "noted", "--store", place.store.address]) == 0
    assert "s: first try\n\ns: second try\n" in capsys.readouterr().out


def test_retries_are_spent_then_the_stage_fails_with_the_last_error(place: Place) -> None:
    state = place.run({"s": {"uses": "fail_until", "retries": 3, "with": {"attempts": 9}}})
    assert state.status == "failed"
    delays = [event.get("delay") for event in place.events if event.type == "stage_retrying"]
    assert delays == [0.01, 0.02, 0.04], "doubled every time"
    error = state.stages["s"].error
    assert error is not None
    assert error["message"] == "ValueError: try 4 of s"
    first_frame = error["traceback"].splitlines()[1]
    assert first_frame.endswith("in fail_until"), "none of the engine's own frames above the stage's"
    assert state.error == "`s` failed"


def test_a_stage_that_may_fail_is_left_out_and_stays_so_when_the_run_is_resumed(place: Place) -> None:
    """What was made without it is not made anew because it might work now: only `force` tries it again."""
    stages = {
        "a": {"uses": "make"},
        "bad": {"uses": "fail_until", "retries": 1, "on_failure": "skip", "with": {"attempts": 3}},
        "behind": {"uses": "copy", "inputs": {"source": "bad"}},
        "both": {"uses": "join", "inputs": {"parts": ["a", "bad"]}},
        "last": {"uses": "fail_until", "inputs": {}, "after": ["both"], "with": {"attempts": 1, "how": "user"}},
    }
    fields = {"fail_fast": True}  # it does not stop the others
    state = place.run(stages, run_id="mine", resume=False, fields=fields)
    assert {name: stage.state for name, stage in state.stages.items()} == {
        "a": "succeeded", "bad": "skipped", "behind": "skipped", "both": "succeeded", "last": "failed",
    }  # fmt: skip
    assert place.types("bad") == ["stage_started", "stage_retrying", "stage_started", "stage_skipped"]
    reason = state.stages["bad"].reason
    assert reason == "it failed (on_failure: skip): ValueError: try 2 of bad"
    assert (state.status, state.error) == ("failed", "`last` failed")
    assert place.text(state, "both") == "x"

    state = place.run(stages, run_id="mine", resume=True, fields=fields)
    assert state.status == "succeeded"
    assert place.types("bad")[4:] == ["stage_skipped"]  # after those of the first attempt
    assert state.stages["bad"].reason == reason
    assert place.types("both").count("stage_started") == 1
    assert fold(read(place.store.run_directory("mine"))) == state

    forced = dataclasses.replace(FAST, force=frozenset({"bad"}))
    state = place.run(stages, forced, run_id="mine", resume=True, fields=fields)
    assert [state.stages[name].state for name in ("bad", "behind", "both")] == ["succeeded"] * 3
    assert state.stages["bad"].attempt == 4


def test_a_mistake_of_the_user_is_not_retried(place: Place) -> None:
    state = place.run({"s": {"uses": "fail_until", "retries": 5, "with": {"attempts": 9, "how": "user"}}})
    error = state.stages["s"].error
    assert error is not None
    assert (error["kind"], error["message"], error["hint"]) == ("user", "the corpus is empty", "give another one")
    assert "stage_retrying" not in place.types("s")


@pytest.mark.parametrize("name", ["NameError", "TypeError", "AttributeError", "ModuleNotFoundError", "AssertionError"])
def test_a_plain_bug_is_retried_only_where_the_stage_asks_for_it(place: Place, name: str) -> None:
    stages = {"s": {"uses": "bug", "retries": 2, "with": {"name": name}}}
    error = place.run(stages).stages["s"].error
    assert error is not None
    assert (error["kind"], error["class"]) == ("bug", name)
    assert "in bug" in error["traceback"]
    assert "stage_retrying" not in place.types("s")
    if name == "TypeError":
        stages["s"]["also_retry_bugs"] = True
        assert place.run(stages).status == "failed"
        assert place.types("s").count("stage_retrying") == 2


def test_a_clock_set_back_makes_no_negative_duration(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, began = time.time, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * (time.monotonic() - began > 0.3))
    state = place.run({"s": {"uses": "make", "with": {"seconds": 0.5}}}, run_id="mine")
    monkeypatch.undo()
    assert state.started is not None
    assert state.ended is not None
    assert state.ended < state.started, "the journal has the clock on the wall"
    assert state.duration is not None
    assert 0.5 <= state.duration < 60
    for event in place.events:
        assert event.get("duration", 0.0) >= 0.0
    assert main(["status", "mine", "--store", place.store.address]) == 0
    assert main(["runs", "--store", place.store.address]) == 0
    assert " -" not in capsys.readouterr().out


def test_a_full_disk_in_a_stage_is_not_retried(place: Place) -> None:
    state = place.run({"s": {"uses": "fill_disk"}})
    error = state.stages["s"].error
    assert error is not None
    assert (error["kind"], state.stages["s"].attempt) == ("store", 1)
    assert "free some space" in error["hint"]


def test_a_timeout_kills_the_stage(place: Place) -> None:
    stages = {"s": {"uses": "fail_until", "retries": 0, "timeout": 0.5, "with": {"attempts": 1, "how": "hang"}}}
    state = place.run(stages)
    error = state.stages["s"].error
    assert error is not None
    assert error["kind"] == "timeout"
    assert "timeout of 0.5 s" in error["message"]


def test_fail_fast_stops_the_others_and_resume_finishes_the_rest(place: Place) -> None:
    stages = {
        "bad": {"uses": "fail_until", "retries": 0, "with": {"attempts": 1}},
        "slow": {"uses": "make", "with": {"seconds": 600, "traces": str(place.directory)}},
        "after": {"uses": "copy", "inputs": {"source": "bad"}},
    }
    state = place.run(stages, fields={"concurrency": 2})
    assert [state.stages[name].state for name in stages] == ["failed", "cancelled", "cancelled"]
    assert state.stages["after"].reason == "it needs `bad`, which failed"
    stages["slow"]["with"]["seconds"] = 0.0
    resumed = place.run(stages, run_id=state.run_id, resume=True)
    assert resumed.status == "succeeded"
    assert resumed.attempt == 2
    assert place.events[0].type == "run_started", "the observer sees the earlier attempts first"


def test_keep_going_finishes_what_does_not_need_the_failed_stage(place: Place) -> None:
    stages = diamond(place)
    stages["a"] = {"uses": "fail_until", "retries": 0, "with": {"attempts": 1}}
    state = place.run(stages, fields={"fail_fast": False})
    assert state.status == "failed"
    assert [state.stages[name].state for name in "abcd"] == ["failed", "cancelled", "succeeded", "cancelled"]
    resumed = place.run(stages, run_id=state.run_id, fields={"fail_fast": False})
    assert [resumed.stages[name].state for name in "abcd"] == ["succeeded"] * 4
    assert place.calls == Counter("bcd")


def test_conditions_skip_a_stage_and_what_needs_it(place: Place) -> None:
    stages = {
        "a": {"uses": "make", "with": {"text": "four"}},
        "b": {"uses": "make", "when": "stages.a.length > 4"},
        "c": {"uses": "copy", "inputs": {"source": "b"}},
        "d": {"uses": "copy", "inputs": {"source": "a", "extra": "b"}},
        "e": {"uses": "join", "inputs": {"parts": ["a", "b"]}},
        "f": {"uses": "make", "when": "${params.wanted}"},
    }
    state = place.run(stages, fields={"params": {"wanted": True}})
    assert state.status == "succeeded"
    assert [state.stages[name].state for name in "abcdef"] == [
        "succeeded", "skipped", "skipped", "succeeded", "succeeded", "succeeded",
    ]  # fmt: skip
    assert "stages.a.length > 4" in str(state.stages["b"].reason)
    assert state.stages["e"].summary["parts"] == 1.0


def test_a_matrix_fans_out_and_in(place: Place) -> None:
    stages = {
        "a": {"uses": "make", "matrix": {"text": ["x", "yy", "z/w"]}, "with": {"text": "${matrix.text}"}},
        "b": {"uses": "copy", "matrix": {"text": ["x", "yy", "z/w"]}, "inputs": {"source": "a"}},
        "c": {"uses": "join", "inputs": {"parts": "b"}},
    }
    state = place.run(stages)
    assert state.status == "succeeded"
    assert place.text(state, "c") == "x+yy+z/w"
    assert len(state.stages) == 7


def test_concurrency_is_limited_and_used(place: Place) -> None:
    stages = {f"s{i}": {"uses": "make", "with": {"seconds": 0.2, "text": str(i)}} for i in range(4)}
    for spec in stages.values():
        spec["resources"] = {"cpus": 0.1}
    for limit in (1, 4):
        place.run(stages, RunOptions(force=frozenset(stages)), fields={"concurrency": limit})
        running = most = 0
        for event in place.events:
            running += {"stage_started": 1, "stage_succeeded": -1}.get(event.type, 0)
            most = max(most, running)
        assert most == limit


def test_cpu_cores_are_never_oversubscribed(place: Place) -> None:
    cores = len(os.sched_getaffinity(0))
    stages = {f"s{i}": {"uses": "make", "with": {"text": str(i)}, "resources": {"cpus": cores}} for i in range(3)}
    place.run(stages)
    order = [event.type for event in place.events if event.stage]
    assert order == ["stage_started", "stage_succeeded"] * 3


@pytest.mark.parametrize("resource", ["gpus", "cpus"])
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_impossible_resources_are_refused_before_anything_starts(place: Place, executor: Any, resource: str) -> None:
    stages = {"s": {"uses": "make", "resources": {resource: 4096}}}
    with pytest.raises(UserError, match=r"stages\.s\.resources: stage `s` asks for 4096 .*, this machine has"):
        place.run(stages, executor=executor)
    assert not Path(place.store.address).exists()


def test_a_changed_stage_is_refused_on_resume_unless_allowed(place: Place) -> None:
    stages = {
        "a": {"uses": "make", "with": {"text": "one"}},
        "b": {"uses": "fail_until", "retries": 0, "with": {"attempts": 1}},
    }
    state = place.run(stages, fields={"concurrency": 1})
    assert [state.stages[name].state for name in "ab"] == ["succeeded", "failed"]
    stages["a"]["with"]["text"] = "two"
    with pytest.raises(UserError, match=r"stage `a` is finished, but since then parameters\.text: one → two"):
        place.run(stages, run_id=state.run_id)
    allowed = place.run(stages, RunOptions(allow_code_change=True), run_id=state.run_id)
    assert allowed.status == "succeeded"
    assert place.text(allowed, "a") == "two"
    assert (place.store.run_directory(state.run_id) / "workflow.1.json").exists()


def test_a_damaged_line_of_an_input_is_no_change_of_the_stage_behind_it(place: Place) -> None:
    state = place.run(diamond(place), run_id="mine")
    calls = place.calls
    journal = place.store.run_directory("mine") / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    (number,) = (n for n, line in enumerate(lines) if b'"stage_succeeded","stage":"a"' in line)
    lines[number] = lines[number].replace(b"digest", b"digesT")
    journal.write_bytes(b"".join(lines))
    again = place.run(diamond(place), run_id="mine")
    assert again.status == "succeeded"
    assert place.calls == calls
    assert {name: stage.digest for name, stage in again.stages.items()} == {
        name: stage.digest for name, stage in state.stages.items()
    }


def test_a_damaged_artifact_is_set_aside_and_computed_again(place: Place) -> None:
    state = place.run(diamond(place))
    key = state.stages["a"].key
    assert key is not None
    path = place.store.materialize(key) / "text"
    path.chmod(0o644)
    path.write_text("X")
    again = place.run(diamond(place))
    assert [again.stages[name].state for name in "abcd"] == ["succeeded", "cached", "cached", "cached"]
    moved = next(event for event in place.events if event.type == "artifact_quarantined")
    assert moved.get("problems") == ["text: its bytes have changed"]
    assert place.text(again, "a") == "x"


def test_a_full_verification_finds_what_the_cache_cannot(place: Place) -> None:
    state = place.run(diamond(place))
    key = state.stages["c"].key
    assert key is not None
    path = place.store.materialize(key) / "text"
    status = path.stat()
    path.chmod(0o644)
    path.write_text("X")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert place.run(diamond(place)).stages["c"].state == "cached"
    assert place.run(diamond(place), RunOptions(verify=True)).stages["c"].state == "succeeded"


def test_two_stages_with_one_key_compute_it_once(place: Place) -> None:
    traces = {"traces": str(place.directory), "seconds": 0.2}
    stages = {name: {"uses": "make", "with": traces, "resources": {"cpus": 0.1}} for name in ("a", "b")}
    state = place.run(stages)
    assert sorted(stage.state for stage in state.stages.values()) == ["cached", "succeeded"]
    assert sum(place.calls.values()) == 1


def test_many_concurrent_runs_compute_everything_once(place: Place) -> None:
    """Single flight: the others wait for the one that computes."""
    states: list[RunState] = []

    def one() -> None:
        other = Place(place.directory)
        states.append(other.run(diamond(place)))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [state.status for state in states] == ["succeeded"] * 8
    assert place.calls == Counter("abcd")
    assert len({state.stages["d"].digest for state in states}) == 1


def test_a_run_that_is_driven_elsewhere_is_refused(place: Place) -> None:
    place.run(diamond(place), run_id="mine")
    lease = Lease.acquire(place.store.run_directory("mine"), "run mine")
    with pytest.raises(RunElsewhereError, match="run mine is driven by process"):
        place.run(diamond(place), run_id="mine")
    lease.release()
    assert place.run(diamond(place), run_id="mine").attempt == 2


def test_a_driver_whose_lease_was_taken_commits_nothing_more(place: Place) -> None:
    def steal(event: Event) -> None:
        if event.type == "stage_started" and event.stage == "b":
            directory = place.store.run_directory("mine")
            forge(directory / "lease-000002", directory / "lease-000001", number=2, owner="thief", token="t")

    workflow = workflow_of(place.directory, diamond(place))
    with pytest.raises(RunElsewhereError, match="taken over by thief"):
        run_workflow(workflow, build_graph(workflow), place.store, run_id="mine", observer=steal)
    state = fold(read(place.store.run_directory("mine")))
    assert state.stages["b"].state == "running"
    assert state.stages["d"].state == "pending"


def test_a_display_that_fails_does_not_end_the_run(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(event: Event) -> None:
        raise BrokenPipeError(event.type)

    workflow = workflow_of(place.directory, diamond(place))
    assert run_workflow(workflow, build_graph(workflow), place.store, observer=broken).status == "succeeded"
    assert "progress display failed" in capsys.readouterr().err


def test_a_request_to_cancel_ends_the_run_and_it_can_be_resumed(place: Place) -> None:
    stages = {"s": {"uses": "make", "with": {"seconds": 600}}, "t": {"uses": "copy", "inputs": {"source": "s"}}}

    def request(event: Event) -> None:
        place.events.append(event)
        if event.type == "stage_started":
            (place.store.run_directory("mine") / CANCEL_FILE).write_text('{"by": "a colleague"}')

    workflow = workflow_of(place.directory, stages)
    state = run_workflow(workflow, build_graph(workflow), place.store, run_id="mine", observer=request)
    assert state.status == "cancelled"
    assert {stage.state for stage in state.stages.values()} == {"cancelled"}
    assert state.stages["s"].reason == "a colleague"
    stages["s"]["with"]["seconds"] = 0
    assert place.run(stages, run_id="mine").status == "succeeded"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_driver_leaves_no_process_and_a_run_that_can_be_resumed(place: Place, number: int) -> None:
    pid_file = place.directory / "pids"
    stages = {
        "s": {"uses": "spawn_and_hang", "with": {"pid_file": str(pid_file), "own_session": True}},
        "t": {"uses": "make"},
    }
    driver = start_driver(place, stages)
    pids = [int(pid) for pid in wait_for(pid_file).split()]
    driver.send_signal(number)
    assert driver.wait(timeout=30) == 130
    assert gone(pids)
    state = fold(read(place.store.run_directory("mine")))
    assert state.status == "cancelled"
    assert state.stages["s"].state == "cancelled"
    stages["s"] = {"uses": "make"}
    assert place.run(stages, run_id="mine").status == "succeeded"


def test_a_killed_driver_takes_its_stages_with_it_and_resume_goes_on(place: Place) -> None:
    pid_file = place.directory / "pids"
    traces = {"traces": str(place.directory)}
    stages = {
        "a": {"uses": "make", "with": traces},
        "s": {"uses": "spawn_and_hang", "inputs": {}, "after": ["a"], "with": {"pid_file": str(pid_file)}},
    }
    driver = start_driver(place, stages)
    pids = [int(pid) for pid in wait_for(pid_file).split()]
    driver.kill()
    driver.wait()
    assert gone(pids)
    assert fold(read(place.store.run_directory("mine"))).status == "running"
    stages["s"] = {"uses": "make", "after": ["a"], "with": {**traces, "text": "s"}}
    state = place.run(stages, run_id="mine")
    assert (state.status, state.attempt) == ("succeeded", 2)
    assert place.calls == Counter(["a", "s"])


def test_a_stage_leaves_no_process_behind(place: Place) -> None:
    pid_file = place.directory / "pid"
    state = place.run({"s": {"uses": "spawn_and_return", "with": {"pid_file": str(pid_file)}}})
    assert state.status == "succeeded"
    assert gone([int(pid_file.read_text())])


def test_secrets_reach_the_stage_but_no_file_of_the_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TOKEN", "hunter2-hunter2")
    stages = {"s": {"uses": "show_environment", "with": {"token": "${env.TEST_TOKEN}", "traces": str(place.directory)}}}
    state = place.run(stages)
    error = state.stages["s"].error
    assert error is not None
    assert error["message"] == "the server refuses ${env.TEST_TOKEN}"
    assert place.calls == Counter(["15"])
    for path in Path(place.store.address).rglob("*"):
        if path.is_file():
            assert b"hunter2" not in path.read_bytes(), path
    assert (
        "connecting with ${env.TEST_TOKEN}"
        in (place.store.run_directory(state.run_id) / "logs" / "s" / "1.log").read_text()
    )


def test_relative_paths_start_at_the_workflow_file(place: Place) -> None:
    (place.directory / "data.txt").write_text("from the file")
    state = place.run({"s": {"uses": "working_directory", "with": {"file": "data.txt"}}})
    assert place.text(state, "s") == "from the file"


def test_an_unwritable_store_is_refused(place: Place) -> None:
    (place.directory / "store").write_text("a file")
    with pytest.raises(UserError, match="cannot be used"):
        place.run(diamond(place))
    assert not place.calls
