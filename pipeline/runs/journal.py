"""The journal of a run: an append-only, checksummed, fsynced file of events, and the state of the run folded from it.

`runs/RUN/journal.jsonl` holds one JSON object per line, the last field of which is the CRC-32 of what stands before it:

    {"sequence":3,"time":1790000000.1,"fence":1,"type":"stage_started","stage":"train",…,"checksum":"9f3c01aa"}

A line that a crash cut short is removed at the next open (and kept beside the journal); a line damaged later is skipped
by every reader and reported. `fence` is the number of the driver's lease: what a driver writes after another one took
the run over does not count.

Types and their fields beside `stage`:

- `run_started` workflow, stages (names in order) · `attempt_started` attempt, executor, host, pid
- `stage_started` attempt, key, components, resources, log · `stage_waiting` key, holder
- `stages_returned` stages (names of those that it returned)
- `stage_noted` source (attempt and line), text (out of the ordinary, and why: a training that was rolled back)
- `stage_retrying` attempt, error, delay · `stage_succeeded` attempt, key, digest, summary, duration
- `stage_cached` key, digest, hit_from (run id), summary, duration (of the original)
- `stage_failed` attempt, error, log · `stage_cancelled` reason
- `stage_skipped` reason; where it failed (`on_failure: skip`) also attempt, key, error
- `artifact_quarantined` key, problems · `cancel_requested` by · `journal_damaged` lines
- `run_finished` status (succeeded, failed, cancelled), error, duration (seconds of this attempt)

`time` is the clock on the wall, for people: it may jump. Every `duration` is of a clock that cannot.

`error` is {"kind": user|bug|error|timeout|worker lost|store, "class", "message", "hint", "traceback", "place"}.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.faults import fault_point
from polytrope.pipeline.support.files import replace_file, sync_directory, write_all

FILE_NAME = "journal.jsonl"
_CHECKSUM = b',"checksum":"'
_TAIL = len(_CHECKSUM) + len('xxxxxxxx"}')

RESULT_STATES = frozenset({"succeeded", "cached"})  # of a stage: its result is in the store
DONE_STATES = RESULT_STATES | {"skipped"}
ENDED_STATES = DONE_STATES | {"failed", "cancelled"}


class Event(NamedTuple):
    """One line of the journal. `data` holds the fields that belong to the type. `time`: seconds since the epoch."""

    sequence: int
    time: float
    fence: int
    type: str
    data: dict[str, Any]

    @property
    def stage(self) -> str | None:
        name = self.data.get("stage")
        return None if name is None else str(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self.data.get(name, default)


def encode(event: Event) -> bytes:
    head = {"sequence": event.sequence, "time": event.time, "fence": event.fence, "type": event.type, **event.data}
    body = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")[:-1]
    return body + _CHECKSUM + b'%08x"}\n' % zlib.crc32(body)


def decode(line: bytes) -> Event | None:
    """The event of one line (without its newline), None if the line is damaged."""
    return decode_lines([line])[0]


def decode_lines(lines: Sequence[bytes]) -> list[Event | None]:
    """An event per line, None for a damaged one. Parsed together: a fraction of the price of each alone."""
    with _no_collection():
        bodies = [line[:-_TAIL] if _intact(line) else b"" for line in lines]
        try:
            values = json.loads(b"[" + b",".join([body + b"}" if body else b"null" for body in bodies]) + b"]")
            if len(values) != len(lines):
                raise ValueError
            return [_event(value) for value in values]
        except ValueError:  # a checksum that fits by chance
            return [_event(_parsed(body)) for body in bodies]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector: events are none, and it would look at a hundred thousand of them many times."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _intact(line: bytes) -> bool:
    return line[-_TAIL:] == _CHECKSUM + b'%08x"}' % zlib.crc32(line[:-_TAIL])


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body + b"}")
    except ValueError:
        return None


def _event(data: Any) -> Event | None:
    try:
        return Event(data.pop("sequence"), data.pop("time"), data.pop("fence"), data.pop("type"), data)
    except (KeyError, AttributeError, TypeError):
        return None


class JournalReader:
    """Follows a journal that another process may be writing: `read_new` returns what came since the last call."""

    def __init__(self, directory: Path) -> None:
        self.path = Path(directory) / FILE_NAME
        self.damaged: list[int] = []  # numbers of the damaged lines
        self.end = 0  # bytes consumed: everything up to the last newline
        self._lines = 0
        self._fence = 0

    def read_new(self) -> list[Event]:
        """New events in order; [] if there are none or no journal yet. A line without its end is left for later."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.end)
                data = file.read()
        except FileNotFoundError:
            return []
        except IsADirectoryError:
            raise UserError(
                f"{self.path} is a directory and no journal: what the run did is not known",
                f"put the journal back, or move {self.path.parent} out of the store",
            ) from None
        complete = data.rfind(b"\n") + 1
        events = []
        for event in decode_lines(data[:complete].split(b"\n")[:-1]):
            self._lines += 1
            if event is None:
                self.damaged.append(self._lines)
            elif event.fence >= self._fence:
                self._fence = event.fence
                events.append(event)
        self.end += complete
        return events


def read(directory: Path) -> list[Event]:
    """All valid events of a run, in order; [] if there is no journal."""
    return JournalReader(directory).read_new()


class Journal:
    """The writing end, held by the driver of a run.

    Args:
        directory: of the run.
        fence: number of the driver's lease.
        guard: called before every write; raises if the lease is lost.
        sink: makes bytes durable elsewhere; the file is a copy then.
    """

    def __init__(
        self,
        directory: Path,
        *,
        fence: int = 0,
        guard: Callable[[], None] | None = None,
        sink: Callable[[bytes], None] | None = None,
    ) -> None:
        self.path = Path(directory) / FILE_NAME
        self.fence = fence
        self.guard = guard
        self.sink = sink
        self._unsent = bytearray()
        self._descriptor = -1
        self._end = 0
        self._sequence = 0

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        fence: int = 0,
        guard: Callable[[], None] | None = None,
        sink: Callable[[bytes], None] | None = None,
    ) -> Journal:
        """Open for appending; creates the file, removes a torn last line, reports damaged ones in an event."""
        journal = cls(directory, fence=fence, guard=guard, sink=sink)
        journal.path.parent.mkdir(parents=True, exist_ok=True)
        existed = journal.path.exists()
        journal._descriptor = os.open(journal.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if not existed:
            sync_directory(journal.path.parent)
        data = journal.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if len(data) > end:
            replace_file(journal.path.with_name(f"journal.torn-{end}"), data[end:])
            os.ftruncate(journal._descriptor, end)
            os.fsync(journal._descriptor)
        lines = data[:end].split(b"\n")[:-1]
        intact = [_intact(line) for line in lines]
        reports = decode_lines([line for line in lines if b'"type":"journal_damaged"' in line])
        known = {number for report in reports if report is not None for number in report.get("lines", [])}
        newest = decode_lines([line for line, good in zip(lines, intact, strict=True) if good][-100:])
        journal._end = end
        journal._sequence = max((event.sequence for event in newest if event is not None), default=0)
        if new := [number for number, good in enumerate(intact, 1) if not good and number not in known]:
            journal.append("journal_damaged", lines=new)
        return journal

    def append(self, type: str, **payload: Any) -> Event:
        """Write one event and flush it to the disk before returning.

        Raises:
            OSError: the disk is full or gone.
        """
        if self.guard is not None:
            self.guard()
        event = self.write(type, **payload)
        self._flush()
        return event

    def write(self, type: str, **payload: Any) -> Event:
        """Write one event; nothing may rely on it before `sync`, which flushes many at the price of one.

        Raises:
            OSError: the disk is full or gone; the journal is left as it was before the call.
        """
        event = Event(self._sequence + 1, time.time(), self.fence, type, payload)
        data = encode(event)
        try:
            write_all(self._descriptor, data)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            raise
        self._sequence += 1
        self._end += len(data)
        if self.sink is not None:
            self._unsent += data
        return event

    def sync(self) -> None:
        """Prove that the lease is still held, then flush what was written to the disk."""
        if self.guard is not None:
            self.guard()
        self._flush()

    def _flush(self) -> None:
        if self.sink is not None:
            if self._unsent:
                self.sink(bytes(self._unsent))
                self._unsent.clear()
            return
        fault_point("before journal fsync")
        os.fsync(self._descriptor)
        fault_point("after journal fsync")

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass
class StageState:
    """Where one stage stands. Times in seconds since the epoch; `duration` in seconds (of the original, if cached)."""

    name: str
    state: str = "pending"
    attempt: int = 0
    key: str | None = None
    digest: str | None = None
    error: dict[str, Any] | None = None
    hit_from: str | None = None
    summary: dict[str, float] = field(default_factory=dict)
    duration: float | None = None
    started: float | None = None
    ended: float | None = None
    reason: str | None = None  # why skipped or cancelled, what it waits for
    left_out: tuple[str, dict[str, Any]] | None = None  # key and error with which it failed and was skipped for it
    components: dict[str, Any] | None = None  # of the key, where the stage was started
    log: str | None = None  # relative to the run's directory
    notes: dict[str, str] = field(default_factory=dict)  # attempt and line → text


@dataclass
class RunState:
    """Where a run stands, folded from its events.

    `status` is pending, running, succeeded, failed or cancelled. A run whose driver was killed still says running
    here; `polytrope.pipeline.runs.record.run_status` looks at the lease too and says interrupted.
    """

    status: str = "pending"
    workflow: str = ""
    attempt: int = 0
    executor: str = ""
    host: str = ""
    pid: int = 0
    started: float | None = None
    ended: float | None = None
    duration: float | None = None  # seconds that the last attempt took
    error: str | None = None
    stages: dict[str, StageState] = field(default_factory=dict)
    run_id: str = ""

    @property
    def done(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")

    def count(self, *states: str) -> int:
        return sum(stage.state in states for stage in self.stages.values())


def fold(events: Iterable[Event], state: RunState | None = None) -> RunState:
    """The state after these events; with `state`, that state brought forward (it is changed and returned)."""
    state = RunState() if state is None else state
    with _no_collection():
        for event in events:
            _apply(state, event)
    return state


def _apply(state: RunState, event: Event) -> None:
    data = event.data
    match event.type:
        case "run_started":
            state.run_id = data.get("run_id", "")
            state.workflow = data.get("workflow", "")
            state.started = event.time
            state.status = "running"
            for name in data.get("stages", []):
                state.stages.setdefault(name, StageState(name))
        case "attempt_started":
            state.status, state.ended, state.duration, state.error = "running", None, None, None
            state.attempt = data.get("attempt", state.attempt + 1)
            state.run_id = data.get("run_id", state.run_id)
            state.executor, state.host, state.pid = data.get("executor", ""), data.get("host", ""), data.get("pid", 0)
            state.started = event.time if state.started is None else state.started
            if "stages" in data:  # the stages of this attempt, in order
                state.stages = {name: state.stages.get(name, StageState(name)) for name in data["stages"]}
            for stage in state.stages.values():
                if stage.state not in RESULT_STATES:
                    stage.state, stage.reason, stage.error, stage.ended = "pending", None, None, None
        case "stages_returned":  # by a stage, while the run goes on
            for name in data.get("stages", []):
                state.stages.setdefault(name, StageState(name))
        case "run_finished":
            state.status, state.ended, state.error = data.get("status", "failed"), event.time, data.get("error")
            state.duration = data.get("duration")
            if state.duration is None and state.started is not None:  # written before this was recorded
                state.duration = max(0.0, event.time - state.started)
        case _:
            name = data.get("stage")
            if name is not None and event.type.startswith("stage_"):
                _apply_stage(state.stages.setdefault(name, StageState(name)), event)


def _apply_stage(stage: StageState, event: Event) -> None:
    data = event.data
    stage.attempt = data.get("attempt", stage.attempt)
    stage.key = data.get("key", stage.key)
    match event.type:
        case "stage_started":
            stage.state, stage.started, stage.ended, stage.reason = "running", event.time, None, None
            stage.digest, stage.hit_from = None, None
            stage.components, stage.log = data.get("components", stage.components), data.get("log", stage.log)
        case "stage_waiting":
            stage.reason = f"waits for run {data.get('holder')}, which computes the same"
        case "stage_noted":
            stage.notes[str(data.get("source"))] = str(data.get("text"))
        case "stage_retrying":
            stage.state, stage.error = "retrying", data.get("error")
        case "stage_succeeded" | "stage_cached":
            stage.state = event.type.removeprefix("stage_")
            stage.digest, stage.summary = data.get("digest"), data.get("summary") or {}
            stage.duration, stage.hit_from = data.get("duration"), data.get("hit_from")
            stage.ended, stage.error, stage.reason = event.time, None, None
        case "stage_failed":
            stage.state, stage.error, stage.ended = "failed", data.get("error"), event.time
            stage.log = data.get("log", stage.log)
        case "stage_skipped" | "stage_cancelled":
            stage.state = event.type.removeprefix("stage_")
            stage.reason, stage.ended = data.get("reason"), event.time
            if (error := data.get("error")) is not None:
                stage.left_out, stage.error = (str(stage.key), error), None
