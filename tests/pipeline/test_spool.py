"""What stages say is read once, whole and in order, whoever wrote it and however its process ended."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from polytrope.pipeline.runs.journal import Journal
from polytrope.pipeline.runs.spool import SpoolReader, read_notes
from polytrope.pipeline.stage import NOTES, EventWriter, stage_context


def write_steps(directory: Path, start: int, end: int) -> None:
    writer = EventWriter(directory)
    for step in range(start, end):
        writer.append("metrics", step=step, values={"loss": float(step)})


def steps(reader: SpoolReader) -> list[int]:
    return [said.event["step"] for said in reader.read_new()]


def test_every_event_is_read_once_and_in_order(tmp_path: Path) -> None:
    reader = SpoolReader(tmp_path / "spool")
    assert steps(reader) == []  # nothing has been written yet
    writer = EventWriter(tmp_path / "spool" / "train" / "1")
    for step in range(5):
        writer.append("metrics", step=step, values={})
    assert steps(reader) == [0, 1, 2, 3, 4]
    assert steps(reader) == []
    writer.append("metrics", step=5, values={})
    assert steps(reader) == [5]


def test_attempts_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for attempt in (10, 2, 1):
        EventWriter(tmp_path / "spool" / "train" / str(attempt)).append("message", text=str(attempt))
    assert [said.attempt for said in SpoolReader(tmp_path / "spool").read_new()] == [1, 2, 10]


def test_several_processes_write_at_the_same_time(tmp_path: Path) -> None:
    directory = tmp_path / "spool" / "train" / "1"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_steps, args=(directory, 500 * i, 500 * (i + 1))) for i in range(4)]
    for process in processes:
        process.start()
    reader, found = SpoolReader(tmp_path / "spool"), []
    while any(process.is_alive() for process in processes):
        found += steps(reader)
    found += steps(reader)
    assert sorted(found) == list(range(2000))
    for number in range(4):  # each process' own order is kept
        own = [step for step in found if step // 500 == number]
        assert own == sorted(own)


def test_a_line_that_is_being_written_waits_and_a_torn_one_is_no_event(tmp_path: Path) -> None:
    directory = tmp_path / "spool" / "train" / "1"
    directory.mkdir(parents=True)
    path = directory / "host-1.jsonl"
    line = json.dumps({"kind": "metrics", "time": 1.0, "step": 7, "values": {}})
    path.write_text(line[:20])
    reader = SpoolReader(tmp_path / "spool")
    assert steps(reader) == []
    path.write_text(line + "\n")
    assert steps(reader) == [7]
    with path.open("a") as file:  # a killed writer's rest, then a whole line
        file.write(line[:20] + "\n[1, 2]\nnull\n" + line.replace("7", "8") + "\n")
    assert steps(reader) == [8]


def test_saved_offsets_go_on_where_another_reader_stopped(tmp_path: Path) -> None:
    directory = tmp_path / "spool" / "train" / "1"
    write_steps(directory, 0, 3)
    offsets: dict[str, int] = {}
    assert steps(SpoolReader(tmp_path / "spool", offsets)) == [0, 1, 2]
    saved = json.loads(json.dumps(offsets))
    write_steps(directory, 3, 5)
    assert steps(SpoolReader(tmp_path / "spool", saved)) == [3, 4]


@pytest.mark.parametrize("name", ["train[activation=it's]", "train[text=a b/c]", "plain"])
def test_the_stage_is_named_as_in_the_journal(tmp_path: Path, name: str) -> None:
    from polytrope.pipeline.support.files import safe_name

    journal = Journal.open(tmp_path)
    journal.append("run_started", run_id="r", workflow="w", stages=["other", name])
    journal.close()
    EventWriter(tmp_path / "spool" / safe_name(name) / "1").append("message", text="x")
    (said,) = SpoolReader(tmp_path / "spool").read_new()
    assert said.stage == name


def test_a_note_torn_by_a_crash_costs_that_note_only(tmp_path: Path) -> None:
    context = stage_context(tmp_path / "run" / "spool" / "train" / "1")
    place = tmp_path / "spool" / "train"
    for attempt, texts in ((2, ["third"]), (1, ["first", 'sec"ond'])):
        (place / str(attempt)).mkdir(parents=True)
        context = replace(context, events=EventWriter(place / str(attempt)))
        for text in texts:
            context.note(text)
    assert read_notes(tmp_path / "spool", "train") == [("1.0", "first"), ("1.1", 'sec"ond'), ("2.0", "third")]
    file = place / "1" / NOTES
    file.write_bytes(b'"fir"first"\n"whole"\n"being writt')
    assert read_notes(tmp_path / "spool", "train") == [("1.1", "whole"), ("2.0", "third")]


def test_secrets_are_not_written(tmp_path: Path) -> None:
    secret = 'pa"ss\\word'
    context = replace(stage_context(tmp_path / "stage"), events=EventWriter(tmp_path / "spool", {"TOKEN": secret}))
    context = pickle.loads(pickle.dumps(context))
    context.message(f"with {secret}")
    context.note(f"because of {secret}")
    written = b"".join(path.read_bytes() for path in (tmp_path / "spool").iterdir())
    assert b"ss\\" not in written
    assert written.count(b"${env.TOKEN}") == 3, "the note is a message too"
