"""`run_workflow`: everything before the first stage (checks, lease, journal, record), then the driver."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from polytrope.pipeline.engine.changes import check_finished
from polytrope.pipeline.engine.driver import Driver
from polytrope.pipeline.engine.event_log import EventLog
from polytrope.pipeline.engine.options import CANCEL_FILE, Observer, RunOptions, check_names, checked_run_id
from polytrope.pipeline.engine.signals import Signals
from polytrope.pipeline.errors import RunElsewhereError, UserError
from polytrope.pipeline.executors import check_resources, make_executor
from polytrope.pipeline.runs.journal import RunState, read
from polytrope.pipeline.runs.lease import Lease, LeaseHeldError, LeaseLostError
from polytrope.pipeline.store.store import RECORD_FILE, Store, store_error
from polytrope.pipeline.support.faults import ENVIRONMENT_VARIABLE, start_faults
from polytrope.pipeline.support.files import replace_file
from polytrope.pipeline.support.signal_mask import signals_blocked
from polytrope.pipeline.workflow.graph import StageNode
from polytrope.pipeline.workflow.spec import Workflow


def run_workflow(
    workflow: Workflow,
    graph: Mapping[str, StageNode],
    store: Store,
    *,
    run_id: str | None = None,
    resume: bool | None = None,
    executor: str | None = None,
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
    place = executor or workflow.executor
    check_resources(graph, place, workflow.ray_address)
    check_names(graph, options)
    store.create()
    run_id, directory, exists = _run_directory(store, run_id, resume)
    lease = _acquire_run(store, run_id, options.lease_ttl)
    try:
        try:
            store.begin_run(run_id)
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
        with contextlib.closing(journal), Signals() as signals:
            log = EventLog(run_id, journal, observer)
            log.replay(earlier)
            stages = list(graph)
            if earlier:
                stages = check_finished(workflow, graph, store, log.state, allowed=options.allow_code_change)
            if exists and earlier:
                _record(directory, run_id, workflow, place, options)
            store.drop_cancel_request(run_id, CANCEL_FILE)
            driver = Driver(
                workflow,
                graph,
                store,
                lease=lease,
                log=log,
                executor=make_executor(place, workflow.ray_address, signals.wake.fileno()),
                signals=signals,
                options=options,
            )
            return driver.run(stages, on_start)
    except LeaseLostError as error:
        raise RunElsewhereError(
            f"run {run_id}: {error}", f"`polytrope status {run_id}` shows what the other driver does"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            lease.release()


def _run_directory(store: Store, run_id: str | None, resume: bool | None) -> tuple[str, Path, bool]:
    """(run id, its directory, whether it existed). A new directory is created here, by exactly one process."""
    identifier = checked_run_id(run_id)
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
        with signals_blocked():  # its heartbeat has a thread
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
