"""The driver of a run: starts stages when their inputs are there, retries, commits, and journals every step.

One thread, one loop. A stage starts, and others learn of a result, only after the journal that says so is on the disk;
an artifact exists by its rename alone. So the process may die at any point: `run_workflow` with the same run id goes
on from there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polytrope.pipeline.engine.attempts import Attempt, Attempts, why_failed
from polytrope.pipeline.engine.ending import end_broken, end_stages
from polytrope.pipeline.engine.event_log import EventLog
from polytrope.pipeline.engine.inputs import skip_reason
from polytrope.pipeline.engine.options import RunOptions, cancelled_by, forced_names
from polytrope.pipeline.engine.results import Results
from polytrope.pipeline.engine.returned import Expansion, expansion, returned_stages
from polytrope.pipeline.engine.schedule import Schedule
from polytrope.pipeline.engine.signals import Signals
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.executors import check_resources
from polytrope.pipeline.executors.base import Executor
from polytrope.pipeline.executors.worker import Outcome, StageError, make_task
from polytrope.pipeline.runs.journal import RunState
from polytrope.pipeline.runs.lease import HolderWatch, Lease, LeaseHeldError, LeaseLostError
from polytrope.pipeline.runs.spool import read_notes
from polytrope.pipeline.store.manifest import OutputChangedError, StoredArtifact
from polytrope.pipeline.store.store import Store, store_error
from polytrope.pipeline.support.files import is_disk_full, safe_name
from polytrope.pipeline.workflow.graph import StageNode
from polytrope.pipeline.workflow.keys import key_components, stage_key
from polytrope.pipeline.workflow.spec import Workflow

_LONGEST_WAIT = 1.0  # seconds between two looks at the lease and at requests to cancel
_LONGEST_DELAY = 60.0  # seconds between two attempts
_CANCEL_PATIENCE = 20.0  # seconds for cancelled stages to end before the executor is closed under them
_RETRIED = ("error", "timeout", "worker lost")  # and "bug" where a stage asks for it


class Driver:
    """One attempt at a run. `run_workflow` makes it; nothing else does.

    Args:
        workflow: may grow by the stages that stages return.
        graph: of the workflow.
        store: where results go.
        lease: of the run.
        log: the journal and what follows from it, with the events of the earlier attempts.
        executor: runs the stages; closed at the end.
        signals: what a person may send meanwhile.
        options: of this attempt.
    """

    def __init__(
        self,
        workflow: Workflow,
        graph: Mapping[str, StageNode],
        store: Store,
        *,
        lease: Lease,
        log: EventLog,
        executor: Executor,
        signals: Signals,
        options: RunOptions,
    ) -> None:
        self.workflow = workflow
        self.store = store
        self.lease = lease
        self.log = log
        self.executor = executor
        self.signals = signals
        self.options = options
        self.run_id = log.state.run_id
        self.directory = store.run_directory(self.run_id)
        self.schedule = Schedule(graph)
        self.results = Results(store, self.run_id, lease)
        self.attempts = Attempts(executor, workflow.concurrency)
        self.forced = forced_names(graph, options)
        self.keys: dict[str, tuple[str, dict[str, Any]]] = {}  # node name → key and its components
        self.stopping: tuple[str, str] | None = None  # (status of the run, reason)
        self.started = time.monotonic()
        self.last_look = 0.0

    # -- from the first event of this attempt to the last -------------------------------------------------------

    def run(self, stages: list[str], on_start: Callable[[Path], None] | None) -> RunState:
        """Drive to the end.

        Args:
            stages: names of all that are known now, with those that stages returned in earlier attempts.
            on_start: called with the run's directory when the attempt is in the journal.
        """
        try:
            try:
                self._begin(stages)
                if on_start is not None:
                    on_start(self.directory)
                self._loop()
                self._finish()
            except OSError as error:
                with contextlib.suppress(OSError):
                    self.lease.check()  # whoever took over cleans up under this driver: that is no fault of the disk
                problem = store_error(self.store.address, error)
                with contextlib.suppress(OSError, LeaseLostError):
                    self.executor.close()
                    self._end_broken(problem.message)
                raise UserError(
                    f"run {self.run_id} had to stop: {problem.message}",
                    f"nothing finished is lost; {'free some space' if is_disk_full(error) else 'mend it'}, then"
                    f" `polytrope resume {self.run_id}`",
                ) from error
            except UserError as error:
                self.executor.close()
                self._end_broken(error.message)
                raise
        finally:
            self.executor.close()
            with contextlib.suppress(OSError):
                self.store.push_run(self.run_id)
            self.results.release()
            self.attempts.release()
        return self.log.state

    def _begin(self, stages: list[str]) -> None:
        state = self.log.state
        common = {"run_id": self.run_id, "workflow": self.workflow.name, "stages": stages}
        if state.started is None:
            self.log.emit("run_started", **common)
        self.log.emit(
            "attempt_started",
            **common,
            attempt=state.attempt + 1,
            executor=self.executor.name,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self._flush()

    def _loop(self) -> None:
        attempts = self.attempts
        while True:
            self._look_around()
            if self.stopping is None:
                self._advance()
            self._flush()
            waiting = attempts.delayed or attempts.held or self.schedule.is_waiting
            if not attempts.running and (self.stopping or not waiting):
                return
            for identifier, outcome in self.executor.wait(attempts.seconds_to_next(_LONGEST_WAIT)):
                self._collect(identifier, outcome)
            if self.stopping is None:
                attempts.enforce_timeouts()

    def _flush(self) -> None:
        """Make the journal durable, then do what it says: tell who watches, start the stages."""
        if not self.log.sync():
            return
        if self.stopping is None:
            self.attempts.submit_new()
        else:
            for identifier in self.attempts.drop_new():
                self._collect(identifier, Outcome(error=StageError("cancelled", "not started")))
        self.results.clean_up_committed()

    def _look_around(self) -> None:
        """Signals, requests to cancel, and whether the lease is still ours."""
        self.signals.drain()
        if self.signals.received and self.stopping is None:
            name = signal.Signals(self.signals.received[0]).name
            self._stop("cancelled", {"SIGINT": "Ctrl-C"}.get(name, name))
        elif len(self.signals.received) > 1 and self.attempts.running:
            self._abandon()
        now = time.monotonic()
        if now - self.last_look < _LONGEST_WAIT:
            return
        self.last_look = now
        self.lease.check()
        self.store.refresh_run(self.run_id)
        for attempt in self.attempts.running.values():
            self._take_notes(attempt.node)
        if self.stopping is None and (by := cancelled_by(self.directory)):
            self.log.emit("cancel_requested", by=by)
            self._stop("cancelled", by)
        if self.stopping is not None and self.attempts.are_stuck(_CANCEL_PATIENCE):
            self._abandon()

    def _stop(self, status: str, reason: str) -> None:
        """Start nothing more, and kill what runs."""
        self.stopping = (status, reason)
        self.attempts.cancel_all()

    def _abandon(self) -> None:
        """Do not wait for cancelled stages any longer."""
        self.executor.close()
        for identifier in list(self.attempts.running):
            self._collect(identifier, Outcome(error=StageError("cancelled", "killed")))

    def _advance(self) -> None:
        """Start whatever can start."""
        for name in self.attempts.due_to_look():
            self._start(self.schedule.graph[name])
        for attempt in self.attempts.due():
            if self.attempts.usage.fits(attempt.node.resources):
                del self.attempts.delayed[attempt.node.name]
                self._submit(attempt)
        while self.stopping is None and (node := self.schedule.next_ready()):
            self._look_up(node)
        while self.stopping is None and (node := self.schedule.next_fitting(self.attempts.usage)):
            self._start(node)
            while self.stopping is None and (ready := self.schedule.next_ready()):  # it was stored meanwhile
                self._look_up(ready)

    # -- before a stage runs ---------------------------------------------------------------------------------------

    def _look_up(self, node: StageNode) -> None:
        """Skip the stage, take it from the store, or queue it."""
        try:
            reason = skip_reason(node, self.schedule.ended, self.results.artifacts, self.workflow.params)
            if reason is not None:
                self.log.emit("stage_skipped", stage=node.name, reason=reason)
                self.schedule.end(node.name, "skipped")
                return
            components = key_components(node, self.results.digests(node))
        except UserError as error:
            self._fail(node, StageError("user", error.message, error.hint, "UserError"), 0)
            return
        key = stage_key(components)
        before = self.log.state.stages.get(node.name)
        if node.skip_on_failure and before and before.left_out and node.name not in self.forced:
            failed_key, failure = before.left_out
            if failed_key == key:  # before the run was resumed
                self._leave_out(node, key, failure, before.attempt)
                return
        self.keys[node.name] = key, components
        artifact = None if node.name in self.forced else self.store.find(key, full=self.options.verify)
        if artifact is None:
            self.schedule.queue(node.name)
        else:
            self._take(node, artifact)

    def _take(self, node: StageNode, artifact: StoredArtifact) -> None:
        """The result is in the store."""
        try:
            expansion = self._expansion(node, returned_stages(self.store, artifact))
        except UserError as error:
            self._fail(node, StageError("user", error.message, error.hint, "UserError"), 0)
            return
        self.log.emit_stored(node.name, artifact)
        self.results.clean_up(artifact.key)
        self._end(node, "cached", artifact, expansion)

    def _start(self, node: StageNode) -> None:
        """Take the key's lease, or wait for whoever computes it, and submit the first attempt."""
        key, components = self.keys[node.name]
        held = self.attempts.held
        watch = held[node.name][0] if node.name in held else HolderWatch()
        try:
            lease = self.results.key_lease(key, watch)
        except LeaseHeldError as error:
            if node.name not in held:
                holder = error.holder.owner.removeprefix("run ")
                self.log.emit("stage_waiting", stage=node.name, key=key, holder=holder)
            self.attempts.hold(node.name, watch)
            return
        waited = held.pop(node.name, None) is not None
        if waited or node.name not in self.forced:
            artifact, problems, moved = self.results.intact_or_away(key, full=self.options.verify)
            if artifact is not None:
                lease.release(remove=True)
                self._take(node, artifact)
                return
            if moved is not None:
                self.log.emit("artifact_quarantined", stage=node.name, key=key, problems=problems, moved=moved)
        self.store.discard_staging(key)
        before = self.log.state.stages.get(node.name)
        self._submit(Attempt(node, key, components, lease, (before.attempt if before else 0) + 1))

    def _submit(self, attempt: Attempt) -> None:
        node = attempt.node
        self.attempts.prepare(self.schedule.graph.values())
        attempt.staging = self.store.staging(attempt.key)
        name = safe_name(node.name)
        task = make_task(
            node,
            identifier=self.attempts.new_identifier(),
            run_id=self.run_id,
            key=attempt.key,
            components=attempt.components,
            attempt=attempt.number,
            inputs=self.results.inputs(node),
            output=attempt.staging,
            scratch=self.store.scratch(attempt.key),
            run_directory=self.directory,
            name=name,
            executor=self.executor.name,
            directory=self.workflow.directory,
            store=self.store.address,
        )
        self.log.emit(
            "stage_started",
            stage=node.name,
            attempt=attempt.number,
            key=attempt.key,
            components=attempt.components,
            resources=asdict(node.resources),
            log=f"logs/{name}/{attempt.number}.log",
        )
        self.attempts.add(attempt, task)

    # -- after it --------------------------------------------------------------------------------------------------

    def _take_notes(self, node: StageNode) -> None:
        """Journal what the stage noted since the last look, in earlier attempts too if their driver was killed."""
        for source, text in read_notes(self.directory / "spool", node.name):
            if source not in self.log.state.stages[node.name].notes:
                self.log.emit("stage_noted", stage=node.name, source=source, text=text)

    def _collect(self, identifier: int, outcome: Outcome) -> None:
        """An attempt has ended: commit, retry, or fail."""
        attempt = self.attempts.remove(identifier)
        if attempt is None:
            return
        node = attempt.node
        self._take_notes(node)
        error = why_failed(attempt, outcome)
        if error is None:
            error = self._commit(attempt, outcome)
        if error is None:
            return
        assert attempt.staging is not None
        self.store.discard(attempt.staging)
        if self.stopping is not None:
            attempt.lease.release(remove=True)
            self.log.emit("stage_cancelled", stage=node.name, attempt=attempt.number, reason=self.stopping[1])
            self.schedule.end(node.name, "cancelled")
            return
        retried = error.kind in _RETRIED or (error.kind == "bug" and node.also_retry_bugs)
        if retried and attempt.tries <= node.retries:
            delay = min(self.options.retry_delay * 2 ** (attempt.tries - 1), _LONGEST_DELAY)
            self.log.emit(
                "stage_retrying", stage=node.name, attempt=attempt.number, error=error.to_dict(), delay=delay,
                retries=node.retries,
            )  # fmt: skip
            self.attempts.delay(attempt, delay)
            return
        attempt.lease.release(remove=True)
        if node.skip_on_failure:
            self._leave_out(node, attempt.key, error.to_dict(), attempt.number)
        else:
            self._fail(node, error, attempt.number)

    def _commit(self, attempt: Attempt, outcome: Outcome) -> StageError | None:
        """Keep what the stage made; or say why it cannot be kept."""
        node = attempt.node
        try:
            expansion = self._expansion(node, outcome.stages)
        except UserError as refused:
            return StageError("user", refused.message, refused.hint, "UserError")
        if node.name in self.forced:
            self.results.fence(attempt)()
            problems = ["replaced: the stage was forced, and gave another result from the same key"]
            moved = self.results.make_way(attempt.key, outcome.entries, problems)
            if moved is not None:
                self.log.emit("artifact_quarantined", stage=node.name, key=attempt.key, problems=problems, moved=moved)
        try:
            artifact = self.results.commit(attempt, outcome)
        except OutputChangedError as changed:
            return StageError("error", str(changed), "does the stage leave a process behind that still writes?")
        self.log.emit(
            "stage_succeeded",
            stage=node.name,
            attempt=attempt.number,
            key=attempt.key,
            digest=artifact.digest,
            summary=artifact.summary,
            duration=outcome.duration,
        )
        self._end(node, "succeeded", artifact, expansion)
        return None

    def _end(self, node: StageNode, state: str, artifact: StoredArtifact, expansion: Expansion | None) -> None:
        """The stage has a result: its followers may be ready, and those that it returned are part of the run."""
        self._expand(node, expansion)
        self.results.artifacts[node.name] = artifact
        self.schedule.end(node.name, state)

    def _expansion(self, node: StageNode, stages: Mapping[str, Any] | None) -> Expansion | None:
        def admit(further: Mapping[str, StageNode]) -> None:
            check_resources(further, self.executor.name, self.workflow.ray_address)
            self.attempts.prepare_further(further.values())

        return expansion(self.workflow, self.schedule.graph, node, stages, admit)

    def _expand(self, node: StageNode, expansion: Expansion | None) -> None:
        if expansion is None:
            return
        self.workflow, graph = expansion
        further = [name for name in graph if name not in self.schedule.graph]
        self.log.emit("stages_returned", stage=node.name, stages=further)
        self.schedule.grow(graph)
        self.forced = forced_names(graph, self.options)
        for name, source in self.schedule.blocked():  # another one may have failed while this one went on
            self.log.emit("stage_cancelled", stage=name, reason=f"it needs `{source}`, which failed")
            self.schedule.end(name, "cancelled")

    def _leave_out(self, node: StageNode, key: str, error: Mapping[str, str], number: int) -> None:
        """It failed, and what needs it goes on without it; so it does when the run is resumed, for the same results."""
        reason = f"it failed (on_failure: skip): {error['message']}"
        self.log.emit("stage_skipped", stage=node.name, attempt=number, key=key, reason=reason, error=dict(error))
        self.schedule.end(node.name, "skipped")

    def _fail(self, node: StageNode, error: StageError, number: int) -> None:
        log = f"logs/{safe_name(node.name)}/{number}.log" if number else None
        self.log.emit("stage_failed", stage=node.name, attempt=number, error=error.to_dict(), log=log)
        self.schedule.end(node.name, "failed")
        for name in self.schedule.behind(node.name):
            if name not in self.schedule.ended:
                self.log.emit("stage_cancelled", stage=name, reason=f"it needs `{node.name}`, which failed")
                self.schedule.end(name, "cancelled")
        if self.workflow.fail_fast and self.stopping is None:
            self._stop("failed", f"`{node.name}` failed")

    # -- the end -----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        for attempt in self.attempts.delayed.values():
            attempt.lease.release(remove=True)
        self.attempts.delayed.clear()
        status, error = end_stages(self.log, self.schedule, self.options, self.stopping)
        self.executor.close()
        self.log.emit("run_finished", status=status, error=error, duration=time.monotonic() - self.started)
        self._flush()

    def _end_broken(self, message: str) -> None:
        """The run cannot go on, for a reason that is no stage's fault."""
        with contextlib.suppress(OSError):
            end_broken(self.log, message)
            self.log.emit("run_finished", status="failed", error=message, duration=time.monotonic() - self.started)
            self._flush()
