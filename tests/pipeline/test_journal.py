"""The journal survives what a crash or a bad disk does to it, and folds into the state of the run."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from polytrope.pipeline.runs.journal import Journal, JournalReader, fold, read
from polytrope.pipeline.support import faults


def write_run(directory: Path) -> None:
    journal = Journal.open(directory, fence=1)
    journal.append("run_started", run_id="r", workflow="w", stages=["a", "b"])
    journal.append("attempt_started", attempt=1, executor="local", host="h", pid=1)
    journal.append("stage_started", stage="a", attempt=1, key="k", components={"uses": "m:f"}, log="logs/a/1.log")
    journal.append("stage_succeeded", stage="a", attempt=1, key="k", digest="d", summary={"loss": 1.5}, duration=2.0)
    journal.append("stage_started", stage="b", attempt=1, key="l", components={})
    journal.close()


def test_what_was_appended_is_read_back_in_order(tmp_path: Path) -> None:
    write_run(tmp_path)
    events = read(tmp_path)
    assert [event.type for event in events] == [
        "run_started", "attempt_started", "stage_started", "stage_succeeded", "stage_started",
    ]  # fmt: skip
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert events[3].get("summary") == {"loss": 1.5}
    assert events[3].stage == "a"


def test_no_journal_reads_as_no_events(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    assert fold(read(tmp_path)).status == "pending"


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_last_line_is_removed_and_kept_aside(tmp_path: Path, kept: int) -> None:
    write_run(tmp_path)
    path = tmp_path / "journal.jsonl"
    data = path.read_bytes()
    last = data[:-1].rfind(b"\n") + 1
    torn = data[last:][:kept]
    path.write_bytes(data[:last] + torn)
    assert len(read(tmp_path)) == 4
    journal = Journal.open(tmp_path, fence=2)
    journal.append("run_finished", status="failed")
    assert [event.type for event in read(tmp_path)][3:] == ["stage_succeeded", "run_finished"]
    assert (tmp_path / f"journal.torn-{last}").read_bytes() == torn


def test_every_flipped_byte_is_noticed_and_costs_one_line_at_most(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "journal.jsonl"
    data = path.read_bytes()
    whole = read(tmp_path)
    for position in range(0, len(data) - 1, 7):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        path.write_bytes(bytes(damaged))
        found = read(tmp_path)
        assert all(event in whole for event in found), "a damaged line was taken for an event"
        assert len(found) >= len(whole) - (2 if data[position : position + 1] == b"\n" else 1)


def test_damaged_lines_are_reported_once(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b"stage_started", b"stage_stXrted")
    path.write_bytes(b"\n".join(lines))
    for _ in range(2):
        Journal.open(tmp_path, fence=2).close()
    reports = [event for event in read(tmp_path) if event.type == "journal_damaged"]
    assert [report.get("lines") for report in reports] == [[3]]


def test_what_a_fenced_driver_still_writes_does_not_count(tmp_path: Path) -> None:
    stale = Journal.open(tmp_path, fence=1)
    stale.append("run_started", run_id="r", workflow="w", stages=["a"])
    current = Journal.open(tmp_path, fence=2)
    current.append("attempt_started", attempt=2, executor="local")
    stale.append("run_finished", status="failed")
    assert [event.type for event in read(tmp_path)] == ["run_started", "attempt_started"]


def test_the_guard_stops_a_write(tmp_path: Path) -> None:
    def lost() -> None:
        raise RuntimeError("lost")

    journal = Journal.open(tmp_path, guard=lost)
    with pytest.raises(RuntimeError, match="lost"):
        journal.append("run_started")
    assert read(tmp_path) == []


def test_a_full_disk_leaves_the_journal_whole(tmp_path: Path) -> None:
    write_run(tmp_path)
    journal = Journal.open(tmp_path, fence=2)
    faults.start_faults("error:2:ENOSPC")
    try:
        with pytest.raises(OSError, match="No space"):
            journal.append("stage_failed", stage="b")
    finally:
        faults.start_faults(None)
    assert len(read(tmp_path)) == 5
    journal.append("stage_failed", stage="b", error={})
    assert fold(read(tmp_path)).stages["b"].state == "failed"


def test_a_reader_follows_a_journal_that_is_being_written(tmp_path: Path) -> None:
    reader = JournalReader(tmp_path)
    assert reader.read_new() == []
    write_run(tmp_path)
    assert len(reader.read_new()) == 5
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(b'{"half')
    assert reader.read_new() == []
    journal = Journal.open(tmp_path, fence=1)
    journal.append("run_finished", status="succeeded")
    assert [event.type for event in reader.read_new()] == ["run_finished"]


def test_the_state_of_a_run_is_a_fold_over_its_events(tmp_path: Path) -> None:
    write_run(tmp_path)
    state = fold(read(tmp_path))
    assert (state.status, state.run_id, state.workflow, state.attempt) == ("running", "r", "w", 1)
    a, b = state.stages["a"], state.stages["b"]
    assert (a.state, a.digest, a.summary, a.duration) == ("succeeded", "d", {"loss": 1.5}, 2.0)
    assert (b.state, b.key) == ("running", "l")
    journal = Journal.open(tmp_path, fence=2)
    journal.append("attempt_started", attempt=2, executor="local")
    state = fold(read(tmp_path))
    assert (state.stages["a"].state, state.stages["b"].state) == ("succeeded", "pending")
    journal.append("stage_retrying", stage="b", attempt=2, error={"message": "lost"}, delay=1)
    assert fold(read(tmp_path)).stages["b"].state == "retrying"
    journal.append("stage_skipped", stage="b", reason="when")
    journal.append("run_finished", status="succeeded")
    state = fold(read(tmp_path))
    assert (state.stages["b"].state, state.status, state.done) == ("skipped", "succeeded", True)


def test_a_hundred_thousand_events_are_read_completely(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    journal.append("run_started", run_id="r", workflow="w", stages=[])
    line = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(line * 100_000)
    started = time.perf_counter()
    assert len(read(tmp_path)) == 100_000
    print(f"read 100,000 events in {time.perf_counter() - started:.2f} s")
    assert os.path.getsize(tmp_path / "journal.jsonl") == len(line) * 100_000
