"""Stages at work: what runs, what it takes of the machine, what waits for its next attempt or for another run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytrope.pipeline.executors.base import Executor, Usage
from polytrope.pipeline.executors.worker import Outcome, StageError, StageTask
from polytrope.pipeline.runs.lease import HolderWatch, Lease
from polytrope.pipeline.workflow.graph import StageNode

_LOOK_AT_HOLDER = 0.2  # seconds between two looks at another run that computes a key


@dataclass
class Attempt:
    """A stage that holds its key: running, or waiting for its next attempt. Times of the monotonic clock.

    Args:
        node: the stage.
        key: its key, held by `lease`.
        components: of the key.
        number: counted over all attempts at the run.
        tries: counted in this attempt at the run.
        staging: where it writes, while it runs.
        running_since: when it was first seen to run; None: it queues for resources.
        timed_out: it was cancelled for that.
        due: when its next attempt may start; for a cancelled one, when that was asked for.
    """

    node: StageNode
    key: str
    components: dict[str, Any]
    lease: Lease
    number: int
    tries: int = 1
    staging: Path | None = None
    running_since: float | None = None
    timed_out: bool = False
    due: float = 0.0


class Attempts:
    """All attempts of a run; the executor runs them.

    `running`: task identifier → attempt. `delayed`: node name → attempt that waits for `due`. `held`: node name →
    (what was seen of the run that computes its key, when to look again).
    """

    def __init__(self, executor: Executor, concurrency: int | None) -> None:
        self.executor = executor
        self.usage = Usage(executor.capacity, concurrency)
        self.running: dict[int, Attempt] = {}
        self.delayed: dict[str, Attempt] = {}
        self.held: dict[str, tuple[HolderWatch, float]] = {}
        self._tasks: list[StageTask] = []
        self._identifiers = 0
        self._prepared = False

    def prepare(self, nodes: Iterable[StageNode]) -> None:
        """Have the executor connect, and refuse what can never run. Before the first attempt."""
        if not self._prepared:
            self.executor.prepare(nodes)
            self._prepared = True

    def prepare_further(self, nodes: Iterable[StageNode]) -> None:
        """The same for stages that came later; nothing if it is not connected yet."""
        if self._prepared:
            self.executor.prepare(nodes)

    def new_identifier(self) -> int:
        """Of the next task."""
        self._identifiers += 1
        return self._identifiers

    def add(self, attempt: Attempt, task: StageTask) -> None:
        """The attempt counts as running; `submit_new` sends its task."""
        attempt.running_since, attempt.timed_out = None, False
        self.running[task.identifier] = attempt
        self.usage.add(attempt.node.resources)
        self._tasks.append(task)

    def submit_new(self) -> None:
        """Send the tasks that were added."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            self.executor.submit(task)

    def drop_new(self) -> list[int]:
        """Identifiers of the tasks that were added and are not sent any more."""
        tasks, self._tasks = self._tasks, []
        return [task.identifier for task in tasks]

    def remove(self, identifier: int) -> Attempt | None:
        """The attempt that ended; None if it was taken already."""
        attempt = self.running.pop(identifier, None)
        if attempt is not None:
            self.usage.remove(attempt.node.resources)
        return attempt

    def hold(self, name: str, watch: HolderWatch) -> None:
        """Another run computes the node's key: look again in a moment."""
        self.held[name] = watch, time.monotonic() + _LOOK_AT_HOLDER

    def delay(self, attempt: Attempt, seconds: float) -> None:
        """Its next attempt starts after so many seconds."""
        attempt.number += 1
        attempt.tries += 1
        attempt.due = time.monotonic() + seconds
        self.delayed[attempt.node.name] = attempt

    def due(self) -> list[Attempt]:
        """The delayed attempts whose time has come."""
        now = time.monotonic()
        return [attempt for attempt in self.delayed.values() if attempt.due <= now]

    def due_to_look(self) -> list[str]:
        """Names of the held nodes to look at again."""
        now = time.monotonic()
        return [name for name, (_, look) in self.held.items() if look <= now]

    def seconds_to_next(self, longest: float) -> float:
        """Until a delay or a timeout ends, at most `longest`."""
        times = [attempt.due for attempt in self.delayed.values()]
        times += [look for _, look in self.held.values()]
        times += [
            attempt.running_since + attempt.node.timeout
            for attempt in self.running.values()
            if attempt.running_since is not None and attempt.node.timeout is not None and not attempt.timed_out
        ]
        now = time.monotonic()
        return max(0.0, min([longest, *(moment - now for moment in times)]))

    def enforce_timeouts(self) -> None:
        """Cancel what has run for longer than its `timeout:`; waiting for resources does not count."""
        now = time.monotonic()
        for identifier, attempt in self.running.items():
            limit = attempt.node.timeout
            if limit is None or attempt.timed_out:
                continue
            if attempt.running_since is None and self.executor.has_started(identifier):
                attempt.running_since = now
            if attempt.running_since is not None and now - attempt.running_since >= limit:
                attempt.timed_out = True
                self.executor.cancel(identifier)

    def cancel_all(self) -> None:
        """Have everything that runs end."""
        for identifier, attempt in self.running.items():
            attempt.due = time.monotonic()
            self.executor.cancel(identifier)

    def release(self) -> None:
        """Let go of the keys of whatever has not ended, whatever else has gone wrong."""
        for attempt in (*self.running.values(), *self.delayed.values()):
            with contextlib.suppress(OSError):
                attempt.lease.release(remove=True)

    def are_stuck(self, patience: float) -> bool:
        """Whether something was cancelled more than `patience` seconds ago and still runs."""
        return bool(self.running) and time.monotonic() - min(item.due for item in self.running.values()) > patience


def why_failed(attempt: Attempt, outcome: Outcome) -> StageError | None:
    """What is to be said of an attempt that ended; None: it did what it should."""
    if attempt.timed_out:
        return StageError(
            "timeout",
            f"did not end within its timeout of {attempt.node.timeout:g} s",
            f"raise it: `--set stages.{attempt.node.spec_name}.timeout=…`",
        )
    if outcome.error is not None and outcome.error.kind == "cancelled":  # not by this driver
        return StageError("worker lost", "the stage's process was ended from outside")
    return outcome.error
