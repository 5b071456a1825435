"""What happens in a run, told in this order: the journal, the state that follows from it, whoever watches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from polytrope.pipeline.engine.options import Observer
from polytrope.pipeline.runs.journal import RESULT_STATES, Event, Journal, RunState, fold
from polytrope.pipeline.store.manifest import StoredArtifact


class EventLog:
    """`state`: folded from all events. `observer`: called with each of them when it is on the disk."""

    def __init__(self, run_id: str, journal: Journal, observer: Observer | None) -> None:
        self.state = RunState(run_id=run_id)
        self._journal = journal
        self._observer = observer
        self._unseen: list[Event] = []  # written to the journal, but perhaps not on the disk yet

    def emit(self, type: str, **payload: Any) -> None:
        """Write to the journal and change the state. Nothing outside follows from it before `sync`."""
        event = self._journal.write(type, **payload)
        fold([event], self.state)
        self._unseen.append(event)

    def emit_stored(self, name: str, artifact: StoredArtifact) -> None:
        """A stage's result was found in the store; nothing if the journal knows this very result."""
        before = self.state.stages.get(name)
        known = before is not None and before.state in RESULT_STATES and before.digest == artifact.digest
        if known and before is not None and before.key == artifact.key:
            return
        result: dict[str, Any] = {"key": artifact.key, "digest": artifact.digest, "summary": artifact.summary}
        if artifact.run_id == self.state.run_id and artifact.stage == name:  # died between commit and journal
            attempt = before.attempt if before else 1
            self.emit(
                "stage_succeeded", stage=name, attempt=attempt, **result, duration=artifact.duration, recovered=True
            )
        else:
            self.emit("stage_cached", stage=name, **result, hit_from=artifact.run_id, duration=artifact.duration)

    def sync(self) -> bool:
        """Make the journal durable, then tell who watches; False: there was nothing new."""
        if not self._unseen:
            return False
        self._journal.sync()
        events, self._unseen = self._unseen, []
        for event in events:
            self._tell(event)
        return True

    def replay(self, events: Iterable[Event]) -> None:
        """Take over the state of the earlier attempts."""
        for event in events:
            fold([event], self.state)
            self._tell(event)

    def _tell(self, event: Event) -> None:
        if self._observer is None:
            return
        try:
            self._observer(event)
        except Exception as error:  # a display that fails must not end days of work
            self._observer = None
            with contextlib.suppress(OSError):
                print(f"polytrope: the progress display failed and is off: {error!r}", file=sys.stderr)
