"""The driver of a run: starts stages when their inputs are there, retries, commits, and journals every step.

One thread, one loop. A stage starts, and others learn of a result, only after the journal that says so is on the disk;
an artifact exists by its rename alone. So the process may die at any point: `run_workflow` with the same run id goes
on from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from polytrope.pipeline.engine.returned import returned_stages, with_returned, with_stored
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.executors import check_resources, make_executor
from polytrope.pipeline.executors.base import LOOK_AHEAD, Executor, needs
from polytrope.pipeline.executors.worker import Outcome, StageError, StageTask, make_task
from polytrope.pipeline.runs.journal import DONE_STATES, Event, Journal, RunState, fold, read
from polytrope.pipeline.runs.lease import DEFAULT_TTL, HolderWatch, Lease, LeaseHeldError, LeaseLostError
from polytrope.pipeline.runs.spool import read_notes
from polytrope.pipeline.stage import Artifact
from polytrope.pipeline.store.manifest import OutputChangedError, StoredArtifact, artifact_digest, file_rows
from polytrope.pipeline.store.store import Store, store_error
from polytrope.pipeline.support.faults import ENVIRONMENT_VARIABLE, start_faults
from polytrope.pipeline.support.files import replace_file, safe_name
from polytrope.pipeline.workflow.graph import StageNode, condition_holds, parent_stage, readers_of_returned
from polytrope.pipeline.workflow.keys import explain, key_components, stage_key
from polytrope.pipeline.workflow.spec import Workflow

Observer = Callable[[Event], None]
Expansion = tuple[Workflow, Mapping[str, StageNode]]
CANCEL_FILE = "cancel.json"
RECORD_FILE = "workflow.json"
_LONGEST_WAIT = 1.0  # seconds between two looks at the lease and at requests to cancel
_LONGEST_DELAY = 60.0  # seconds between two attempts
_CANCEL_PATIENCE = 20.0  # seconds for cancelled stages to end before the executor is closed under them


class RunElsewhereError(UserError):
    """Another driver holds the run (exit code 3)."""


@dataclass(frozen=True)
class RunOptions:
    """What a person may ask of one attempt.

    Args:
        force: stage or node names that are computed even if their result is stored.
        start_from: like `force` for this stage and everything that depends on it.
        verify: hash every stored artifact again before it is used.
        allow_code_change: resume although the code, parameters or inputs of a finished stage changed.
        faults: a fault plan, see `polytrope.pipeline.support.faults`.
        retry_delay: seconds before the first retry; doubled for every further one.
        lease_ttl: seconds without heartbeat after which another driver may take the run over.
        record: kept in the run's `workflow.json`: argv, overrides, environment record.
    """

    force: frozenset[str] = frozenset()
    start_from: str | None = None
    verify: bool = False
    allow_code_change: bool = False
    faults: str | None = None
    retry_delay: float = 1.0
    lease_ttl: float = DEFAULT_TTL
    record: Mapping[str, Any] = field(default_factory=dict)


def new_run_id() -> str:
    """Sortable by time, unique: `20261123-174501-3f9a2c`."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def run_workflow(
    workflow: Workflow,
    graph: Mapping[str, StageNode],
    store: Store,
    *,
    run_id: str | None = None,
    resume: bool | None = None,
    executor: Literal["local", "ray"] | None = None,
    observer: Observer | None = None,
    on_start: Callable[[Path], None] | None = None,
    options: RunOptions | None = None,
) -> RunState:
    """Run a workflow, or go on with one that ended early, until it succeeded, failed or was cancelled.

    Args:
        workflow: for its name, parameters, `concurrency`, `fail_fast`, `ray_address`.
        graph: from `build_graph`.
        store: where artifacts and the run are kept.
        run_id: of the new run, or of the one to resume; None: a new one.
        resume: True: the run must exist; False: it must not; None: either.
        executor: instead of the workflow's.
        observer: called in this thread with every journal event, after it is durable. On a resume it first gets the
            events of the earlier attempts. If it raises, it is not called again; the run goes on.
        on_start: called with the run's directory when lease and journal exist and before anything starts: the place
            to start tracking and a progress display.
        options: see `RunOptions`.

    Returns:
        The final state: `status` is succeeded, failed or cancelled. After SIGINT, SIGTERM or a request to cancel it is
        cancelled (exit code 130). Every run that did not succeed can be resumed.

    Raises:
        UserError: refused before anything started, or the store broke under the run (which can be resumed then).
        RunElsewhereError: another driver holds the run, or took it over.
    """
    options = options or RunOptions()
    start_faults(options.faults or os.environ.get(ENVIRONMENT_VARIABLE))
    place: Literal["local", "ray"] = executor or workflow.executor
    check_resources(graph, place, workflow.ray_address)
    _check_names(graph, options)
    store.create()
    run_id, directory, exists = _run_directory(store, run_id, resume)
    lease = _acquire_run(store, run_id, options.lease_ttl)
    try:
        try:
            store.settle_journal(run_id)
        except OSError as error:
            raise store_error(store.address, error) from error
        earlier = read(directory)
        if not exists or not earlier:
            _record(directory, run_id, workflow, place, options)
        try:
            # above every earlier fence, also where the lease files of the earlier drivers are lost
            fence = max([lease.number, *(event.fence + 1 for event in earlier[-1:])])
            journal = store.open_journal(run_id, fence=fence, guard=lease.check)
            store.push_run(run_id)
        except OSError as error:
            raise store_error(store.address, error) from error
        with contextlib.closing(journal), _Signals() as signals:
            driver = Driver(workflow, graph, store, run_id, lease, journal, observer, options, place, signals)
            driver.replay(earlier)
            if earlier:
                driver.check_finished()
            if exists and earlier:
                _record(directory, run_id, workflow, place, options)
            store.drop_cancel_request(run_id, CANCEL_FILE)
            return driver.run(on_start)
    except LeaseLostError as error:
        raise RunElsewhereError(
            f"run {run_id}: {error}", f"`polytrope status {run_id}` shows what the other driver does"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            lease.release()


def _check_names(graph: Mapping[str, StageNode], options: RunOptions) -> None:
    known = _stage_names(graph)
    for name in _unknown(graph, options):
        if name.partition("/")[0] not in known:  # `split/part` may be known later
            raise UserError(f"there is no stage `{name}`", f"stages are {', '.join(sorted(known)[:20])}")


def _unknown(graph: Mapping[str, StageNode], options: RunOptions) -> list[str]:
    """Stages that the options name and the graph does not have."""
    start = {options.start_from} if options.start_from else set()
    return sorted((options.force | start) - _stage_names(graph))


def _stage_names(graph: Mapping[str, StageNode]) -> set[str]:
    return {name for node in graph.values() for name in (node.name, node.spec_name)}


def _run_directory(store: Store, run_id: str | None, resume: bool | None) -> tuple[str, Path, bool]:
    """(run id, its directory, whether it existed). A new directory is created here, by exactly one process."""
    identifier = run_id or new_run_id()
    if safe_name(identifier) != identifier:
        raise UserError(f"`{identifier}` cannot be a run id", "use letters, digits, `-` and `_`")
    directory = store.run_directory(identifier)
    try:
        store.pull_run(identifier)
    except OSError as error:
        raise store_error(store.address, error) from error
    exists = directory.is_dir()
    if resume and not exists:
        raise UserError(f"there is no run `{identifier}` in {store.address}", "`polytrope runs` lists them")
    if resume is False and exists:
        raise UserError(f"the run `{identifier}` exists already", f"`polytrope resume {identifier}` goes on with it")
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise store_error(store.address, error) from error
    return identifier, directory, exists


def _acquire_run(store: Store, run_id: str, ttl: float) -> Lease:
    try:
        return Lease.acquire(store.run_lease_directory(run_id), f"run {run_id}", ttl)
    except LeaseHeldError as error:
        holder = error.holder
        raise RunElsewhereError(
            f"run {run_id} is driven by process {holder.pid} on {holder.host}",
            f"`polytrope cancel {run_id}` ends it; a dead driver is replaced {holder.ttl:g} s after its last heartbeat",
        ) from error
    except OSError as error:
        raise store_error(store.address, error) from error


def _record(directory: Path, run_id: str, workflow: Workflow, executor: str, options: RunOptions) -> None:
    """Keep what decides this run beside its journal; the records of earlier attempts stay."""
    record = {
        "format": 1,
        "run_id": run_id,
        "recorded": time.time(),
        "executor": executor,
        "source": None if workflow.source is None else str(workflow.source),
        "directory": str(workflow.directory),
        "workflow": workflow.to_dict(),
        **options.record,
    }
    path = directory / RECORD_FILE
    try:
        if path.exists():
            number = 1
            while (previous := directory / f"workflow.{number}.json").exists():
                number += 1
            os.link(path, previous)
        replace_file(path, json.dumps(record, indent=2, ensure_ascii=False, default=str).encode() + b"\n")
    except OSError as error:
        raise store_error(directory, error) from error


class _Signals:
    """Remembers SIGINT, SIGTERM and SIGHUP instead of dying of them; `wake` becomes readable when one arrives."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.wake, self._write = socket.socketpair()
        self.wake.setblocking(False)
        self._write.setblocking(False)
        self._before: dict[int, Any] = {}
        self._descriptor = -1

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._descriptor = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.wake.recv(4096):
                pass

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before or self._descriptor != -1:
            signal.set_wakeup_fd(self._descriptor)
        self.wake.close()
        self._write.close()


@dataclass
class Attempt:
    """A stage that holds its key: running, or waiting for its next attempt. Times of the monotonic clock."""

    node: StageNode
    key: str
    components: dict[str, Any]
    lease: Lease
    number: int  # over all attempts at the run
    tries: int  # in this attempt at the run
    staging: Path | None = None
    submitted: float = 0.0
    running_since: float | None = None
    timed_out: bool = False
    due: float = 0.0


class Driver:
    """One attempt at a run. `run_workflow` makes it; nothing else does."""

    def __init__(
        self,
        workflow: Workflow,
        graph: Mapping[str, StageNode],
        store: Store,
        run_id: str,
        lease: Lease,
        journal: Journal,
        observer: Observer | None,
        options: RunOptions,
        place: Literal["local", "ray"],
        signals: _Signals,
    ) -> None:
        self.workflow, self.graph, self.store, self.run_id = workflow, graph, store, run_id
        self.lease, self.journal, self.observer, self.options = lease, journal, observer, options
        self.place, self.signals = place, signals
        self.directory = store.run_directory(run_id)
        self.executor: Executor = make_executor(place, workflow.ray_address, signals.wake.fileno())
        self.prepared = False
        self.state = RunState(run_id=run_id)
        self.listed = list(graph)  # with what stages returned in earlier attempts
        self.artifacts: dict[str, StoredArtifact] = {}
        self.digests: dict[str, str] = {}
        self.ended: dict[str, str] = {}  # node name → state, in this attempt
        self.names: list[str] = []
        self.fresh: list[int] = []  # heap of positions: dependencies have ended, the store was not asked yet
        self.queue: list[int] = []  # heap of positions: must run
        self.keys: dict[str, tuple[str, dict[str, Any]]] = {}
        self.active: dict[int, Attempt] = {}
        self.delayed: dict[str, Attempt] = {}
        self.held: dict[str, tuple[HolderWatch, float]] = {}  # another run computes its key: (watch, next look)
        self.unseen: list[Event] = []  # written to the journal, but perhaps not on the disk yet
        self.tasks: list[StageTask] = []  # to be started when the journal is on the disk
        self.committed: list[Attempt] = []  # their scratch and lease go when the next stages have been started
        self.identifiers = 0
        self.used = (0.0, 0.0)
        self.stopping: tuple[str, str] | None = None  # (status of the run, reason)
        self._last_check = 0.0
        self._set_graph(graph)

    def _set_graph(self, graph: Mapping[str, StageNode]) -> None:
        """At the start, and whenever a stage returned further ones."""
        fresh, queue = ([self.names[position] for position in heap] for heap in (self.fresh, self.queue))
        self.graph = graph
        self.open = [node for node in graph.values() if node.open]
        self.names = list(graph)
        self.position = {name: index for index, name in enumerate(graph)}
        self.fresh, self.queue = (sorted(self.position[name] for name in names) for names in (fresh, queue))
        self.followers: dict[str, list[str]] = {name: [] for name in graph}
        self.missing: dict[str, int] = {}
        for name, node in graph.items():
            self.missing[name] = sum(self.ended.get(source) not in DONE_STATES for source in node.dependencies)
            for dependency in node.dependencies:
                self.followers[dependency].append(name)
        self.forced = _forced(graph, self.options)
        self.safe_names = {name: safe_name(name) for name in graph}

    # -- journal -----------------------------------------------------------------------------------------------

    def emit(self, type: str, **payload: Any) -> None:
        """Write to the journal and change the state. Nothing outside follows from it before `_flush`."""
        event = self.journal.write(type, **payload)
        fold([event], self.state)
        self.unseen.append(event)

    def _flush(self) -> None:
        """Make the journal durable, then do what it says: tell who watches, start the stages."""
        if not self.unseen:
            return
        self.journal.sync()
        events, self.unseen = self.unseen, []
        for event in events:
            self._observe(event)
        tasks, self.tasks = self.tasks, []
        for task in tasks:
            if self.stopping is None:
                self.executor.submit(task)
            else:
                self._collect(task.identifier, Outcome(error=StageError("cancelled", "not started")))
        committed, self.committed = self.committed, []
        for attempt in committed:
            self.store.remove_scratch(attempt.key)
            attempt.lease.release(remove=True)

    def _observe(self, event: Event) -> None:
        if self.observer is None:
            return
        try:
            self.observer(event)
        except Exception as error:  # a display that fails must not end days of work
            self.observer = None
            with contextlib.suppress(OSError):
                print(f"polytrope: the progress display failed and is off: {error!r}", file=sys.stderr)

    def replay(self, events: Iterable[Event]) -> None:
        """Take over the state of the earlier attempts."""
        for event in events:
            fold([event], self.state)
            self._observe(event)

    def check_finished(self) -> None:
        """Bring back what finished stages returned, and refuse to resume if one of all these has changed since."""
        done = {name: stage.key for name, stage in self.state.stages.items() if stage.state in ("succeeded", "cached")}
        try:
            _, graph = with_stored(self.workflow, self.graph, self.store, done)
        except UserError:
            if not self.options.allow_code_change:
                raise
            self.listed = list(dict.fromkeys([*self.graph, *self.state.stages]))
            return
        self.listed = list(graph)
        if not self.options.allow_code_change:
            self._refuse_changes(graph)

    def _refuse_changes(self, graph: Mapping[str, StageNode]) -> None:
        """Refuse other code, parameters or inputs than a finished stage was computed with."""
        digests: dict[str, str] = {}
        for name, node in graph.items():
            before = self.state.stages.get(name)
            if before is None or before.state not in ("succeeded", "cached") or before.key is None:
                continue
            digests[name] = before.digest or ""
            components = key_components(node, self._input_digests(node, digests))
            if stage_key(components) == before.key:
                continue
            stored = self.store.load(before.key)
            old = before.components or (stored.components if stored else {})
            unknown = {label for label in node.inputs if any(item not in digests for item in _sources(node, label))}
            inputs = {label: old.get("inputs", {}).get(label) for label in unknown}
            if stage_key({**components, "inputs": {**components["inputs"], **inputs}}) == before.key:
                continue  # only that an input is not known to be finished: its line in the journal was damaged
            changes = explain(old, components) or ["its key changed"]
            raise UserError(
                f"run {self.run_id} cannot go on as it was: stage `{name}` is finished, but since then "
                + "; ".join(changes[:5]),
                "`--allow-code-change` computes it again; `polytrope run` starts a new run that keeps what still fits",
            )

    # -- the loop ----------------------------------------------------------------------------------------------

    def run(self, on_start: Callable[[Path], None] | None) -> RunState:
        """Everything from the first event of this attempt to the last."""
        try:
            try:
                common = {"run_id": self.run_id, "workflow": self.workflow.name, "stages": self.listed}
                if self.state.started is None:
                    self.emit("run_started", **common)
                self.emit(
                    "attempt_started",
                    **common,
                    attempt=self.state.attempt + 1,
                    executor=self.place,
                    host=socket.gethostname(),
                    pid=os.getpid(),
                )
                self._flush()
                if on_start is not None:
                    on_start(self.directory)
                for name, count in self.missing.items():
                    if count == 0:
                        heappush(self.fresh, self.position[name])
                self._loop()
                self._finish()
            except OSError as error:
                with contextlib.suppress(OSError):
                    self.lease.check()  # whoever took over cleans up under this driver: that is no fault of the disk
                problem = store_error(self.store.address, error)
                with contextlib.suppress(OSError, LeaseLostError):
                    self.executor.close()
                    self._finish_broken(problem.message)
                raise UserError(
                    f"run {self.run_id} had to stop: {problem.message}",
                    f"nothing finished is lost; mend it, then `polytrope resume {self.run_id}`",
                ) from error
            except UserError as error:
                self.executor.close()
                self._finish_broken(error.message)
                raise
        finally:
            self.executor.close()
            with contextlib.suppress(OSError):
                self.store.push_run(self.run_id)
            for attempt in (*self.active.values(), *self.delayed.values(), *self.committed):
                with contextlib.suppress(OSError):
                    attempt.lease.release(remove=True)
        return self.state

    def _loop(self) -> None:
        while True:
            self._look_around()
            if self.stopping is None:
                self._advance()
            self._flush()
            if not self.active and (self.stopping or not (self.delayed or self.held or self.queue or self.fresh)):
                return
            for identifier, outcome in self.executor.wait(self._timeout()):
                self._collect(identifier, outcome)
            self._enforce_timeouts()

    def _timeout(self) -> float:
        now = time.monotonic()
        times = [attempt.due for attempt in self.delayed.values()]
        times += [look for _, look in self.held.values()]
        times += [
            attempt.running_since + attempt.node.timeout
            for attempt in self.active.values()
            if attempt.running_since is not None and attempt.node.timeout is not None and not attempt.timed_out
        ]
        return max(0.0, min([_LONGEST_WAIT, *(moment - now for moment in times)]))

    def _look_around(self) -> None:
        """Signals, requests to cancel, and whether the lease is still ours."""
        self.signals.drain()
        if self.signals.received and self.stopping is None:
            name = signal.Signals(self.signals.received[0]).name
            self._stop("cancelled", {"SIGINT": "Ctrl-C"}.get(name, name))
        elif len(self.signals.received) > 1 and self.active:
            self._abandon()
        now = time.monotonic()
        if now - self._last_check < _LONGEST_WAIT:
            return
        self._last_check = now
        self.lease.check()
        self.store.refresh_run(self.run_id)
        for attempt in self.active.values():
            self._take_notes(attempt.node)
        if self.stopping is None and (self.directory / CANCEL_FILE).exists():
            by = "polytrope cancel"
            with contextlib.suppress(OSError, ValueError):
                by = str(json.loads((self.directory / CANCEL_FILE).read_text()).get("by", by))
            self.emit("cancel_requested", by=by)
            self._stop("cancelled", by)
        if self.stopping is not None and self.active:
            oldest = min(attempt.due for attempt in self.active.values())
            if now - oldest > _CANCEL_PATIENCE:
                self._abandon()

    def _stop(self, status: str, reason: str) -> None:
        """Start nothing more, and kill what runs."""
        self.stopping = (status, reason)
        for identifier, attempt in self.active.items():
            attempt.due = time.monotonic()
            self.executor.cancel(identifier)

    def _abandon(self) -> None:
        """Do not wait for cancelled stages any longer."""
        self.executor.close()
        for identifier in list(self.active):
            self._collect(identifier, Outcome(error=StageError("cancelled", "killed")))

    def _advance(self) -> None:
        """Start whatever can start."""
        now = time.monotonic()
        for name in [name for name, (_, look) in self.held.items() if look <= now]:
            self._start(self.graph[name])
        for name in [name for name, attempt in self.delayed.items() if attempt.due <= now]:
            if self._fits(self.graph[name]):
                self._submit(self.delayed.pop(name))
        while self.fresh and self.stopping is None:
            self._look_up(self.graph[self.names[heappop(self.fresh)]])
        postponed: list[int] = []
        while self.queue and self.stopping is None and self._has_room() and len(postponed) < LOOK_AHEAD:
            position = heappop(self.queue)
            node = self.graph[self.names[position]]
            if self._fits(node):
                self._start(node)
            else:
                postponed.append(position)
        for position in postponed:
            heappush(self.queue, position)
        if self.fresh:
            self._advance()

    def _has_room(self) -> bool:
        limit = self.workflow.concurrency
        if limit is not None and len(self.active) >= limit:
            return False
        capacity = self.executor.capacity
        return capacity is None or not self.active or self.used[0] < capacity.cpus

    def _fits(self, node: StageNode) -> bool:
        limit = self.workflow.concurrency
        if limit is not None and len(self.active) >= limit:
            return False
        capacity = self.executor.capacity
        return capacity is None or capacity.holds(self.used, node.resources)

    # -- one stage ---------------------------------------------------------------------------------------------

    def _input_digests(self, node: StageNode, digests: Mapping[str, str]) -> dict[str, str | dict[str, str] | None]:
        """Digest of every input; None for an absent optional one; a skipped branch of a fan-in is left out."""
        result: dict[str, str | dict[str, str] | None] = {}
        for label, value in node.inputs.items():
            if isinstance(value, dict):
                result[label] = {branch: digests[name] for branch, name in value.items() if name in digests}
            else:
                result[label] = digests.get(value) if value else None
        return result

    def _inputs(self, node: StageNode) -> dict[str, Artifact | dict[str, Artifact] | None]:
        def artifact(name: str) -> Artifact:
            stored = self.artifacts[name]
            return Artifact(stored.path, stored.digest, name)

        result: dict[str, Artifact | dict[str, Artifact] | None] = {}
        for label, value in node.inputs.items():
            if isinstance(value, dict):
                result[label] = {branch: artifact(name) for branch, name in value.items() if name in self.artifacts}
            else:
                result[label] = artifact(value) if value in self.artifacts else None
        return result

    def _look_up(self, node: StageNode) -> None:
        """Skip the stage, take it from the store, or queue it."""
        try:
            reason = self._skip_reason(node)
            if reason is not None:
                self.emit("stage_skipped", stage=node.name, reason=reason)
                self._end(node, "skipped")
                return
            components = key_components(node, self._input_digests(node, self.digests))
        except UserError as error:
            self._fail(node, StageError("user", error.message, error.hint, "UserError"), 0)
            return
        key = stage_key(components)
        self.keys[node.name] = key, components
        artifact = None if node.name in self.forced else self.store.find(key, full=self.options.verify)
        if artifact is None:
            heappush(self.queue, self.position[node.name])
        else:
            self._take(node, artifact)

    def _skip_reason(self, node: StageNode) -> str | None:
        for label, value in node.inputs.items():
            required = node.definition.inputs.get(label) == "required"
            if required and isinstance(value, str) and self.ended.get(value) == "skipped":
                return f"its input {label} comes from `{value}`, which was skipped"
        summaries = {name: artifact.summary for name, artifact in self.artifacts.items()} if node.when else {}
        if condition_holds(node, self.workflow.params, summaries):
            return None
        return f"`when: {node.when}` does not hold"

    def _expansion(self, node: StageNode, stages: Mapping[str, Any] | None) -> Expansion | None:
        """The workflow and its graph with the stages that `node` returned.

        Raises:
            UserError: something is wrong with them, or there are none and others read them.
        """
        if node.name in self.workflow.returned:  # it came with them
            return None
        if stages is None:
            readers = readers_of_returned(self.workflow, self.open, node.name)
            if readers:
                hint = f"return `Stages({{name: {{uses: …}}}})`, or let `{readers[0]}` read `{node.name}` itself"
                raise UserError(f"it returned no stages, but `{readers[0]}` reads some", hint)
            return None
        try:
            workflow, graph = with_returned(self.workflow, self.graph, node, stages)
            further = {name: item for name, item in graph.items() if name not in self.graph}
            check_resources(further, self.place, workflow.ray_address)
            if self.prepared:
                self.executor.prepare(further.values())
        except UserError as error:
            raise UserError(f"the stages it returned: {error.message}", error.hint) from None
        return workflow, graph

    def _expand(self, node: StageNode, expansion: Expansion | None) -> None:
        """`node` has ended, and its further stages are now part of the run."""
        if expansion is None:
            return
        self.workflow, graph = expansion
        further = [name for name in graph if name not in self.graph]
        self.emit("stages_returned", stage=node.name, stages=further)
        self._set_graph(graph)
        for name in graph:  # another one may have failed while this one went on
            if name in self.ended:
                continue
            failed = [
                source for source in graph[name].dependencies if self.ended.get(source) in ("failed", "cancelled")
            ]
            if failed:
                self.emit("stage_cancelled", stage=name, reason=f"it needs `{failed[0]}`, which failed")
                self.ended[name] = "cancelled"

    def _take(self, node: StageNode, artifact: StoredArtifact) -> None:
        """The result is in the store."""
        try:
            expansion = self._expansion(node, returned_stages(self.store, artifact))
        except UserError as error:
            self._fail(node, StageError("user", error.message, error.hint, "UserError"), 0)
            return
        before = self.state.stages.get(node.name)
        known = before is not None and before.state in ("succeeded", "cached") and before.digest == artifact.digest
        if not (known and before is not None and before.key == artifact.key):
            result = {"key": artifact.key, "digest": artifact.digest, "summary": artifact.summary}
            if artifact.run_id == self.run_id and artifact.stage == node.name:  # died between commit and journal
                number = before.attempt if before else 1
                self.emit(
                    "stage_succeeded",
                    stage=node.name,
                    attempt=number,
                    **result,
                    duration=artifact.duration,
                    recovered=True,
                )
            else:
                self.emit(
                    "stage_cached", stage=node.name, **result, hit_from=artifact.run_id, duration=artifact.duration
                )
        self._clean_up(artifact.key)
        self._expand(node, expansion)
        self._end(node, "cached", artifact)

    def _clean_up(self, key: str) -> None:
        """Remove what a driver left that died between its commit and its cleaning up."""
        if not (self.store.has_scratch(key) or self.store.has_key_lease(key)):
            return
        with contextlib.suppress(LeaseHeldError):  # somebody computes it again on purpose
            lease = self._key_lease(key, watch=False)
            self.store.remove_scratch(key)
            self.store.discard_staging(key)
            lease.release(remove=True)

    def _key_lease(self, key: str, watch: bool | HolderWatch) -> Lease:
        return Lease.acquire(
            self.store.key_lease_directory(key),
            f"run {self.run_id}",
            heartbeat=False,
            watch=watch,
            via=(self.store.lease_root, f"runs/{self.run_id}", self.lease.record.token),
        )

    def _start(self, node: StageNode) -> None:
        """Take the key's lease, or wait for whoever computes it, and submit the first attempt."""
        key, components = self.keys[node.name]
        watch = self.held[node.name][0] if node.name in self.held else HolderWatch()
        try:
            lease = self._key_lease(key, watch)
        except LeaseHeldError as error:
            if node.name not in self.held:
                self.emit("stage_waiting", stage=node.name, key=key, holder=error.holder.owner.removeprefix("run "))
            self.held[node.name] = watch, time.monotonic() + 0.2
            return
        waited = self.held.pop(node.name, None) is not None
        if self.store.exists(key) and (waited or node.name not in self.forced):
            problems = self.store.verify(key, full=self.options.verify)
            artifact = None if problems else self.store.find(key)
            if artifact is not None:
                lease.release(remove=True)
                self._take(node, artifact)
                return
            moved = self.store.quarantine(key, problems)
            if moved is not None:
                self.emit("artifact_quarantined", stage=node.name, key=key, problems=problems, moved=str(moved))
        self.store.discard_staging(key)
        before = self.state.stages.get(node.name)
        self._submit(Attempt(node, key, components, lease, (before.attempt if before else 0) + 1, 1))

    def _submit(self, attempt: Attempt) -> None:
        node = attempt.node
        if not self.prepared:
            self.executor.prepare(self.graph.values())
            self.prepared = True
        attempt.staging = self.store.staging(attempt.key)
        self.identifiers += 1
        name = self.safe_names[node.name]
        task = make_task(
            node,
            identifier=self.identifiers,
            run_id=self.run_id,
            key=attempt.key,
            components=attempt.components,
            attempt=attempt.number,
            inputs=self._inputs(node),
            output=attempt.staging,
            scratch=self.store.scratch(attempt.key),
            run_directory=self.directory,
            name=name,
            executor=self.place,
            directory=self.workflow.directory,
            store=self.store.address,
        )
        self.emit(
            "stage_started",
            stage=node.name,
            attempt=attempt.number,
            key=attempt.key,
            components=attempt.components,
            resources=asdict(node.resources),
            log=f"logs/{name}/{attempt.number}.log",
        )
        attempt.submitted, attempt.running_since, attempt.timed_out = time.monotonic(), None, False
        self.active[self.identifiers] = attempt
        cpus, gpus = needs(node.resources)
        self.used = (self.used[0] + cpus, self.used[1] + gpus)
        self.tasks.append(task)

    def _enforce_timeouts(self) -> None:
        now = time.monotonic()
        for identifier, attempt in self.active.items():
            limit = attempt.node.timeout
            if limit is None or attempt.timed_out or self.stopping is not None:
                continue
            if attempt.running_since is None and self.executor.has_started(identifier):
                attempt.running_since = now
            if attempt.running_since is not None and now - attempt.running_since >= limit:
                attempt.timed_out = True
                self.executor.cancel(identifier)

    def _take_notes(self, node: StageNode) -> None:
        """Journal what the stage noted since the last look, in earlier attempts too if their driver was killed."""
        for source, text in read_notes(self.directory / "spool", node.name):
            if source not in self.state.stages[node.name].notes:
                self.emit("stage_noted", stage=node.name, source=source, text=text)

    def _collect(self, identifier: int, outcome: Outcome) -> None:
        """An attempt has ended: commit, retry, or fail."""
        attempt = self.active.pop(identifier, None)
        if attempt is None or attempt.staging is None:
            return
        node = attempt.node
        self._take_notes(node)
        cpus, gpus = needs(node.resources)
        self.used = (self.used[0] - cpus, self.used[1] - gpus)
        error = outcome.error
        if error is None and not attempt.timed_out:
            try:
                expansion = self._expansion(node, outcome.stages)
            except UserError as refused:
                error = StageError("user", refused.message, refused.hint, "UserError")
        if error is None and not attempt.timed_out:
            try:
                self._commit(attempt, outcome, expansion)
                return
            except OutputChangedError as changed:
                error = StageError("error", str(changed), "does the stage leave a process behind that still writes?")
        self.store.discard(attempt.staging)
        if attempt.timed_out:
            error = StageError(
                "timeout",
                f"did not end within its timeout of {node.timeout:g} s",
                f"raise it: `--set stages.{node.spec_name}.timeout=…`",
            )
        assert error is not None
        if self.stopping is not None:
            attempt.lease.release(remove=True)
            self.emit("stage_cancelled", stage=node.name, attempt=attempt.number, reason=self.stopping[1])
            self.ended[node.name] = "cancelled"
            return
        if error.kind == "cancelled":
            error = StageError("worker lost", "the stage's process was ended from outside")
        if error.kind in ("error", "timeout", "worker lost") and attempt.tries <= node.retries:
            delay = min(self.options.retry_delay * 2 ** (attempt.tries - 1), _LONGEST_DELAY)
            self.emit(
                "stage_retrying", stage=node.name, attempt=attempt.number, error=error.to_dict(), delay=delay,
                retries=node.retries,
            )  # fmt: skip
            attempt.number += 1
            attempt.tries += 1
            attempt.due = time.monotonic() + delay
            self.delayed[node.name] = attempt
            return
        attempt.lease.release(remove=True)
        self._fail(node, error, attempt.number)

    def _commit(self, attempt: Attempt, outcome: Outcome, expansion: Expansion | None) -> None:
        node, staging = attempt.node, attempt.staging
        assert staging is not None

        def fence() -> None:
            self.lease.check()
            attempt.lease.check()

        if node.name in self.forced:
            self._make_way(attempt, outcome, fence)
        artifact = self.store.commit(
            attempt.key,
            staging,
            components=attempt.components,
            summary=outcome.summary,
            stage=node.name,
            run_id=self.run_id,
            duration=outcome.duration,
            fence=fence,
            entries=outcome.entries,
        )
        self.emit(
            "stage_succeeded",
            stage=node.name,
            attempt=attempt.number,
            key=attempt.key,
            digest=artifact.digest,
            summary=artifact.summary,
            duration=outcome.duration,
        )
        self.committed.append(attempt)
        self._expand(node, expansion)
        self._end(node, "succeeded", artifact)

    def _make_way(self, attempt: Attempt, outcome: Outcome, fence: Callable[[], None]) -> None:
        """A forced stage replaces its stored result, unless the new one is the same."""
        stored = self.store.find(attempt.key)
        digest = artifact_digest(file_rows(outcome.entries))
        if self.store.exists(attempt.key) and (stored is None or stored.digest != digest):
            fence()
            problems = ["replaced: the stage was forced, and gave another result from the same key"]
            moved = self.store.quarantine(attempt.key, problems)
            self.emit(
                "artifact_quarantined", stage=attempt.node.name, key=attempt.key, problems=problems, moved=str(moved)
            )

    def _end(self, node: StageNode, state: str, artifact: StoredArtifact | None = None) -> None:
        """The stage has a result or is skipped: its followers may be ready."""
        self.ended[node.name] = state
        if artifact is not None:
            self.artifacts[node.name], self.digests[node.name] = artifact, artifact.digest
        for follower in self.followers[node.name]:
            self.missing[follower] -= 1
            if self.missing[follower] == 0 and follower not in self.ended:
                heappush(self.fresh, self.position[follower])

    def _fail(self, node: StageNode, error: StageError, number: int) -> None:
        log = f"logs/{self.safe_names[node.name]}/{number}.log" if number else None
        self.emit("stage_failed", stage=node.name, attempt=number, error=error.to_dict(), log=log)
        self.ended[node.name] = "failed"
        for name in self._dependents(node.name):
            if name not in self.ended:
                self.emit("stage_cancelled", stage=name, reason=f"it needs `{node.name}`, which failed")
                self.ended[name] = "cancelled"
        if self.workflow.fail_fast and self.stopping is None:
            self._stop("failed", f"`{node.name}` failed")

    def _dependents(self, name: str) -> Iterator[str]:
        """All nodes behind this one, in order."""
        found = {name}
        for other in self.names[self.position[name] + 1 :]:
            if found.intersection(self.graph[other].dependencies):
                found.add(other)
                yield other

    # -- the end -----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        for attempt in self.delayed.values():
            attempt.lease.release(remove=True)
        self.delayed.clear()
        failed = [name for name in self.names if self.ended.get(name) == "failed"]
        if self.stopping is not None:
            status, reason = self.stopping
            for name in self.names:
                if name not in self.ended:
                    self.emit("stage_cancelled", stage=name, reason=reason)
        else:
            status, reason = ("failed", "") if failed else ("succeeded", "")
        for name, stage in self.state.stages.items():
            if name in self.graph or stage.state in DONE_STATES:
                continue
            parent = parent_stage(name)
            if self.ended.get(parent) in DONE_STATES:
                self.emit("stage_skipped", stage=name, reason=f"`{parent}` returned other stages this time")
            elif stage.state != "cancelled":
                self.emit("stage_cancelled", stage=name, reason=f"it is returned by `{parent}`, which has no result")
        for name in _unknown(self.graph, self.options):
            parent = name.partition("/")[0]
            if self.ended.get(parent) in DONE_STATES:
                text = f"`{name}` was to be computed in any case, but no such stage was returned"
                self.emit("stage_noted", stage=parent, source=f"option {name}", text=text)
        if status == "succeeded":
            unfinished = [name for name, stage in self.state.stages.items() if stage.state not in DONE_STATES]
            assert not unfinished, f"stages without an end: {unfinished}"
        error = f"{', '.join(f'`{name}`' for name in failed)} failed" if failed else reason or None
        self.executor.close()
        self.emit("run_finished", status=status, error=error)
        self._flush()

    def _finish_broken(self, message: str) -> None:
        """The run cannot go on, for a reason that is no stage's fault."""
        with contextlib.suppress(OSError):
            for name, stage in self.state.stages.items():
                if stage.state in ("running", "retrying"):
                    self.emit("stage_cancelled", stage=name, reason=message)
            self.emit("run_finished", status="failed", error=message)
            self._flush()


def _sources(node: StageNode, label: str) -> list[str]:
    """Names of the nodes behind one input."""
    value = node.inputs[label]
    return list(value.values()) if isinstance(value, dict) else [value] if value else []


def _forced(graph: Mapping[str, StageNode], options: RunOptions) -> set[str]:
    """Names of the nodes that are computed in any case."""
    forced = {name for name, node in graph.items() if name in options.force or node.spec_name in options.force}
    start = options.start_from
    behind = {name for name, node in graph.items() if start in (name, node.spec_name)} if start else set()
    for name, node in graph.items():
        if behind.intersection(node.dependencies):
            behind.add(name)
    return forced | behind
