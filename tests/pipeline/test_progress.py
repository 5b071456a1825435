"""The display: single lines without a terminal, a live table on one, nothing lost and nothing twice."""

import io
from collections.abc import Iterable

from rich.console import Console

from polytrope.pipeline.launch.progress import LINE_INTERVAL, Progress, counts, summary_rows
from polytrope.pipeline.runs.spool import SpoolEvent
from polytrope.pipeline.support.text import metric_text


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Source:
    def __init__(self, *events: SpoolEvent) -> None:
        self.events = list(events)

    def read_new(self) -> Iterable[SpoolEvent]:
        events, self.events = self.events, []
        return events


def lines(stream: io.StringIO) -> list[str]:
    return [line.split("  ", 1)[1] for line in stream.getvalue().splitlines()]


def progress_event(done: float, message: str = "loss 2.31") -> SpoolEvent:
    return SpoolEvent("train", 1, {"kind": "progress", "done": done, "total": 10, "message": message})


def test_without_a_terminal_each_state_change_is_one_line() -> None:
    stream, clock = io.StringIO(), Clock()
    display = Progress(["shard", "train"], stream=stream, clock=clock)
    display.stage_state("shard", "cached", detail="from run r1")
    display.stage_state("train", "running")
    clock.now += 12
    display.stage_state("train", "succeeded")
    assert lines(stream) == ["shard: cached: from run r1", "train: running", "train: succeeded after 12 s"]


def test_the_same_state_twice_is_one_line() -> None:
    stream = io.StringIO()
    display = Progress(["train"], stream=stream)
    display.stage_state("train", "running")
    display.stage_state("train", "running")
    display.stage_state("train", "running", attempt=2)
    assert lines(stream) == ["train: running", "train: running (attempt 2)"]


def test_progress_lines_come_at_most_every_interval_and_messages_at_once() -> None:
    stream, clock = io.StringIO(), Clock()
    source = Source()
    display = Progress(["train"], source, stream=stream, clock=clock)
    display.stage_state("train", "running")
    for second in range(int(LINE_INTERVAL) + 1):
        clock.now += 1
        source.events = [progress_event(second)]
        display.poll()
    source.events = [SpoolEvent("train", 1, {"kind": "message", "text": "checkpoint at step 5"})]
    display.poll()
    assert lines(stream) == ["train: running", "train: 14/10 · loss 2.31", "train: 15/10 · checkpoint at step 5"]


def test_events_of_an_earlier_attempt_or_after_the_end_are_not_shown() -> None:
    stream = io.StringIO()
    display = Progress(["train"], stream=stream)
    display.stage_state("train", "running", attempt=2)
    display.stage_event("train", 1, {"kind": "message", "text": "old"})
    display.stage_state("train", "failed", attempt=2, detail="lost worker")
    display.stage_event("train", 2, {"kind": "message", "text": "late"})
    assert "old" not in stream.getvalue()
    assert "late" not in stream.getvalue()
    assert "lost worker" in stream.getvalue()


def test_quiet_shows_failures_only() -> None:
    stream = io.StringIO()
    display = Progress(["a", "b"], stream=stream, quiet=True)
    display.stage_state("a", "succeeded")
    display.stage_state("b", "failed", detail="no space left")
    assert [line.split(":")[0] for line in lines(stream)] == ["b"]


def rendered(display: Progress) -> str:
    console = Console(file=io.StringIO(), width=140, force_terminal=False)
    console.print(display.table())
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_live_table_has_a_line_per_stage_with_bar_and_message() -> None:
    clock = Clock()
    display = Progress(["shard", "train", "report"], stream=io.StringIO(), live=True, clock=clock)
    display.stage_state("shard", "succeeded", duration=2.0)
    display.stage_state("train", "running")
    clock.now += 65
    display.stage_event(*progress_event(5, "loss 2.31 · 18.2k tokens/s"))
    text = rendered(display)
    assert len(text.splitlines()) == 3
    assert "1 min 05 s" in text
    assert "━" in text
    assert "loss 2.31 · 18.2k tokens/s" in text


def test_of_very_many_stages_only_the_interesting_ones_are_shown() -> None:
    display = Progress([f"s{index}" for index in range(500)], stream=io.StringIO(), live=True)
    display.stage_state("s77", "failed", detail="broken")
    text = rendered(display)
    assert "s77" in text
    assert "… 499 pending" in text


def test_live_display_starts_and_ends_cleanly() -> None:
    stream = io.StringIO()
    source = Source()
    with Progress(["train"], source, stream=stream, live=True) as display:
        display.stage_state("train", "running")
        source.events = [progress_event(5)]
    assert display.stages["train"].said.done == 5
    assert "train" in stream.getvalue()


def test_figures_are_short() -> None:
    assert [metric_text(value) for value in (1234567.0, 2.34567, 1e-7, float("nan"))] == [
        "1,234,567",
        "2.346",
        "1e-07",
        "nan",
    ]
    assert counts(["cached", "failed", "cached"]) == "2 cached, 1 failed"
    assert summary_rows({"a": {"loss": 2.5, "steps": 10.0}, "b": {}}) == [["a", "loss 2.5 · steps 10"]]


def test_a_traceback_is_not_repeated_with_every_attempt() -> None:
    stream = io.StringIO()
    display = Progress(["train"], stream=stream)
    display.stage_state("train", "retrying", detail="TrainingError: no\nTraceback …\n  File …")
    assert lines(stream) == ["train: retrying: TrainingError: no"]


def test_an_error_of_an_earlier_attempt_is_gone_when_the_stage_succeeds() -> None:
    display = Progress(["train"], stream=io.StringIO())
    display.stage_state("train", "retrying", detail="lost worker")
    display.stage_state("train", "running", attempt=2)
    display.stage_state("train", "succeeded", attempt=2)
    assert display.stages["train"].detail == ""
