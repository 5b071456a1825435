"""What a person sees while a workflow runs: a live table on a terminal, single lines elsewhere, results at the end.

The driver's own display and `polytrope status --watch`, which follows a run of another process, are the same.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from polytrope.pipeline.runs.journal import ENDED_STATES, Event, RunState
from polytrope.pipeline.runs.record import INTERRUPTED
from polytrope.pipeline.runs.spool import SpoolEvent
from polytrope.pipeline.runs.stage_progress import StageProgress, in_time_order
from polytrope.pipeline.support.text import format_duration, metric_text

_WIDE = 100  # columns of a terminal that has room for a bar beside the figures
_BESIDE = 42  # columns for mark, state, time and the beginning of what the stage says
_BESIDE_BAR = 60  # the same with the bar
_SHORTEST_NAME = 16
LINE_INTERVAL = 15.0  # seconds between two progress lines of one stage where there is no terminal
_REFRESH = 0.25  # seconds between two looks at the events of running stages
_MARKS = {
    "pending": ("·", "dim"),
    "running": ("▶", "bold cyan"),
    "retrying": ("↻", "yellow"),
    "succeeded": ("✔", "green"),
    "cached": ("✔", "bright_green"),
    "failed": ("✘", "bold red"),
    "skipped": ("–", "dim"),
    "cancelled": ("■", "yellow"),
    INTERRUPTED: ("■", "bold yellow"),
}


class EventSource(Protocol):
    """`SpoolReader` of `polytrope.pipeline.runs.spool`: (stage, attempt, event) for everything new."""

    def read_new(self) -> Iterable[SpoolEvent]: ...


@dataclass
class StageView:
    """What is known of one stage, for display. Times are of the monotonic clock."""

    name: str
    state: str = "pending"
    attempt: int = 1
    started: float | None = None
    duration: float | None = None
    said: StageProgress = field(default_factory=StageProgress)
    detail: str = ""
    printed: float = field(default=0.0, repr=False)


class Progress:
    """Collects state changes and stage events, and shows them; a thread of its own reads the events.

    Args:
        names: all stages, in order.
        source: where the stages' events come from.
        stream: terminal or file; `Output` where it may end before the run does.
        live: redraw a table (None: if `stream` is a terminal).
        quiet: show failures only.
    """

    def __init__(
        self,
        names: Iterable[str],
        source: EventSource | None = None,
        *,
        stream: TextIO | None = None,
        live: bool | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stages = {name: StageView(name) for name in names}
        self._source = source
        self._stream = stream or sys.stdout
        self._live = (self._stream.isatty() if live is None else live) and not quiet
        self._quiet = quiet
        self._clock = clock
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._display: Any = None

    def __enter__(self) -> Progress:
        if self._live:
            from rich.console import Console
            from rich.live import Live

            self._display = Live(
                console=Console(file=self._stream), get_renderable=self.table, refresh_per_second=4, transient=False
            )
            self._display.start()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=5)
        self.poll()
        if self._display is not None:
            self._display.stop()

    def interrupt(self) -> None:
        """The driver is gone or gives up: nothing runs any more, and the last picture stays on the screen."""
        with self._lock:
            for view in self.stages.values():
                if view.state in ("running", "retrying"):
                    view.state = INTERRUPTED

    def _follow(self) -> None:
        while not self._stop.wait(_REFRESH):
            self.poll()

    def poll(self) -> None:
        """Read and show what the stages have said since the last call."""
        if self._source is not None:
            for stage, attempt, event in in_time_order(self._source.read_new()):
                self.stage_event(stage, attempt, event)

    def stage_state(
        self,
        name: str,
        state: str,
        *,
        attempt: int = 1,
        duration: float | None = None,
        detail: str = "",
        age: float = 0.0,
    ) -> None:
        """A state change. `detail`: error text, reason of a skip, or the run a cached result came from.

        `age`: seconds since it happened.
        """
        with self._lock:
            view = self.stages.setdefault(name, StageView(name))
            if view.state == state and view.attempt == attempt:
                return
            view.state, view.attempt = state, attempt
            if state == "running":
                view.started, view.duration, view.said = self._clock() - age, None, StageProgress()
            if state in ENDED_STATES:
                own = None if view.started is None else self._clock() - view.started
                view.duration = duration if duration is not None else own
            view.detail = detail  # of an earlier attempt: no longer
        if state != "pending" and (not self._quiet or state == "failed"):
            self._line(view, self._state_text(view), age)

    def stage_event(self, name: str, attempt: int, event: Mapping[str, Any]) -> None:
        """An event of `EventWriter`: progress and messages are shown, the rest is for MLflow."""
        with self._lock:
            view = self.stages.setdefault(name, StageView(name))
            if attempt < view.attempt or view.state in ENDED_STATES:
                return
            if not view.said.add(event):
                return
            due = self._clock() - view.printed >= LINE_INTERVAL
        if event.get("kind") == "message" or due:
            self._line(view, view.said.text() or view.state, view.said.silence())

    def _line(self, view: StageView, text: str, age: float) -> None:
        view.printed = self._clock()
        if self._live or (self._quiet and view.state != "failed"):
            return
        when = time.strftime("%H:%M:%S", time.localtime(time.time() - age))
        print(f"{when}  {view.name}: {text}", file=self._stream, flush=True)

    def _state_text(self, view: StageView) -> str:
        text = view.state
        if view.state == "running" and view.attempt > 1:
            text += f" (attempt {view.attempt})"
        if view.state in ("succeeded", "failed") and view.duration is not None:
            text += f" after {format_duration(view.duration)}"
        if view.detail:
            text += f": {view.detail.strip().splitlines()[0]}"  # the whole text ends the run's output, once
        return text

    def table(self) -> Any:
        """The rich table of all stages; of very many, those that are running or went wrong, and counts."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        wide = self._width() >= _WIDE
        table = Table.grid(padding=(0, 1))
        for justify in ("left", "left", "left", "right", *(["left"] if wide else []), "left"):
            table.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.columns[-1].no_wrap = False  # where room is short, it alone gives way
        room = max(_SHORTEST_NAME, self._width() - (_BESIDE_BAR if wide else _BESIDE))
        with self._lock:
            shown, hidden = self._visible()
            for view in shown:
                mark, style = _MARKS.get(view.state, ("?", ""))
                running = view.state in ("running", "retrying")
                seconds = self._clock() - view.started if running and view.started is not None else view.duration
                bar: Any = ""
                if running:
                    total = view.said.total
                    bar = ProgressBar(total=total or None, completed=view.said.done, width=16, pulse=not total)
                detail = view.detail.split("\n")[0] or (view.said.text() if running else view.said.message)
                table.add_row(
                    Text(mark, style=style),
                    Text(_shortened(view.name, room), style="bold" if running else ""),
                    Text(view.state if view.attempt == 1 else f"{view.state} ({view.attempt})", style=style),
                    "" if seconds is None else format_duration(seconds),
                    *([bar] if wide else []),
                    Text(detail, style="red" if view.state == "failed" else "", no_wrap=True, overflow="ellipsis"),
                )
        for state, count in hidden.items():
            table.add_row("", Text(f"… {count} {state}", style="dim"))
        return table

    def _width(self) -> int:
        return self._display.console.width if self._display is not None else _WIDE

    def _visible(self) -> tuple[list[StageView], dict[str, int]]:
        views = list(self.stages.values())
        if len(views) <= 40:
            return views, {}
        important = [view for view in views if view.state in ("running", "retrying", "failed")][:30]
        hidden: dict[str, int] = {}
        for view in views:
            if all(view is not item for item in important):
                hidden[view.state] = hidden.get(view.state, 0) + 1
        return important, hidden


def _shortened(name: str, room: int) -> str:
    """Without its middle: the ends tell branches apart."""
    end = room // 2
    return name if len(name) <= room else f"{name[: room - end - 1]}…{name[-end:]}"


def counts(states: Iterable[str]) -> str:
    """`5 succeeded, 2 cached, 1 failed`, in the order of the life of a stage."""
    found: dict[str, int] = {}
    for state in states:
        found[state] = found.get(state, 0) + 1
    return ", ".join(f"{found[state]} {state}" for state in _MARKS if state in found)


def summary_rows(summaries: Mapping[str, Mapping[str, float]], limit: int = 8) -> list[list[str]]:
    """stage, `name value · name value …` for every stage that returned metrics."""
    rows = []
    for stage, metrics in summaries.items():
        if metrics:
            shown = [f"{name} {metric_text(float(value))}" for name, value in list(metrics.items())[:limit]]
            rows.append([stage, " · ".join(shown) + (" …" if len(metrics) > limit else "")])
    return rows


def show_event(progress: Progress, event: Event, state: RunState, age: float = 0.0) -> None:
    """One journal event on the display. `age`: seconds since it was written."""
    name = event.stage
    if event.type == "stages_returned":
        for further in event.get("stages", []):
            progress.stage_state(further, "pending")
    if name is None or not event.type.startswith("stage_"):
        return
    stage = state.stages[name]
    if event.type == "stage_waiting":
        progress.stage_event(name, 1, {"kind": "message", "text": stage.reason or "waits"})
        return
    detail = ""
    if stage.state == "cached":
        detail = f"from run {stage.hit_from}"
    elif stage.state in ("skipped", "cancelled"):
        detail = stage.reason or ""
    elif stage.state == "retrying":
        detail = f"{_message(stage.error)}; again in {event.get('delay', 0):g} s"
    elif stage.state == "failed":
        detail = _message(stage.error)
    progress.stage_state(
        name, stage.state, attempt=max(1, stage.attempt), duration=stage.duration, detail=detail, age=age
    )


def _message(error: Mapping[str, Any] | None) -> str:
    return str((error or {}).get("message", "")).strip()
