"""How far a running stage is, by its own words: the one source of the live display, `status`, its watch, and `logs`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polytrope.pipeline.runs.spool import SpoolEvent, SpoolReader
from polytrope.pipeline.support.text import format_duration

_WINDOW = 32  # progress events that the pace is taken from
_SILENCE = 60.0  # seconds without a word that are worth saying
_TAIL = 1 << 18  # bytes at the end of each file that tell how a stage stands


@dataclass
class StageProgress:
    """What one attempt at a stage said last. Times in seconds since the epoch, by the clock of the stage's machine.

    `metrics`: the newest value of each curve. Where nothing was said, `total` is 0 and `message` empty.
    """

    done: float = 0.0
    total: float = 0.0
    message: str = ""
    time: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    _begun: bool = field(default=False, repr=False)
    _points: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW), repr=False)

    def add(self, event: Mapping[str, Any]) -> bool:
        """Take in an event of `EventWriter`; whether it is one for people to see."""
        kind, when = event.get("kind"), event.get("time")
        self.time = when if when is not None else self.time
        if kind == "message":
            self.message = str(event.get("text", ""))
        elif kind == "progress":
            done, total = float(event.get("done", 0)), float(event.get("total", 0))
            if total != self.total or done < self.done:  # its workers were started again
                self._points.clear()
                self._begun = False
            self.done, self.total, self.message = done, total, str(event.get("message", ""))
            # Before its second word a stage may have started processes or read a checkpoint: that is no pace.
            if self._begun and when is not None:
                self._points.append((when, done))
            self._begun = True
        elif kind == "metrics" and event.get("step") is not None:
            values = event.get("values") or {}
            self.metrics.update((name, value) for name, value in values.items() if not name.startswith("system/"))
        return kind in ("message", "progress")

    def seconds_left(self, now: float | None = None) -> float | None:
        """At the pace of its last words; None where they tell none, or it is late by that pace."""
        if len(self._points) < 2:
            return None
        (first, begun), (last, done) = self._points[0], self._points[-1]
        if done <= begun or last <= first:
            return None
        left = (self.total - done) * (last - first) / (done - begun) - self.silence(now)
        return left if left > 0 else None

    def silence(self, now: float | None = None) -> float:
        """Seconds since its last word."""
        return 0.0 if self.time is None else max(0.0, (time.time() if now is None else now) - self.time)

    def text(self, now: float | None = None) -> str:
        """`120/480 · 35 s left · loss 2.310 · 18.2k tokens/s`; "" where nothing was said."""
        left, silence = self.seconds_left(now), self.silence(now)
        parts = [
            f"{_number(self.done)}/{_number(self.total)}" if self.total else "",
            "" if left is None else f"{format_duration(left)} left",
            self.message,
            f"silent for {format_duration(silence)}" if silence > _SILENCE else "",
        ]
        return " · ".join(part for part in parts if part)

    def to_dict(self, now: float | None = None) -> dict[str, Any]:
        """For `--json`."""
        return {
            "done": self.done,
            "total": self.total,
            "message": self.message,
            "seconds_left": self.seconds_left(now),
            "time": self.time,
            "metrics": self.metrics,
        }


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def in_time_order(events: Iterable[SpoolEvent]) -> list[SpoolEvent]:
    """Events of several processes, as they were said."""
    return sorted(events, key=lambda said: float(said.event.get("time") or 0.0))


def read_progress(directory: Path, stage: str, attempt: int) -> StageProgress:
    """How far an attempt is; reads the ends of its files only.

    Args:
        directory: of the run.
        stage: its name in the workflow.
        attempt: number of the attempt.
    """
    progress = StageProgress()
    for said in in_time_order(SpoolReader(directory / "spool", stage=stage, tail=_TAIL).read_new()):
        if said.attempt == attempt:
            progress.add(said.event)
    return progress


def said_lines(events: Iterable[SpoolEvent]) -> list[str]:
    """`12:03:11  120/480 · loss 2.310`: a line per progress and message."""
    lines = []
    for said in in_time_order(events):
        one = StageProgress()
        if one.add(said.event) and (text := one.text(one.time)):
            lines.append(f"{time.strftime('%H:%M:%S', time.localtime(one.time))}  {text}\n")
    return lines
