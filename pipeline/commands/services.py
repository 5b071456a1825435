"""`polytrope ui`, `sync` and `build-ops`: doors to MLflow and the kernels."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from polytrope.pipeline.commands.common import find_run, open_store, read_run_file
from polytrope.pipeline.errors import EXIT_RUN_FAILED, EXIT_SUCCESS, UserError
from polytrope.pipeline.runs.journal import read
from polytrope.pipeline.runs.record import run_status
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.text import command
from polytrope.pipeline.workflow.references import resolve_environment


def ui(options: argparse.Namespace) -> int:
    """Start MLflow's server on the tracking database of a run and say where the run is; ends with Ctrl-C."""
    from polytrope.pipeline.tracking.process import check_port

    store = open_store(options)
    directory = find_run(store, options.run) if options.run is not None or store.run_directories() else None
    place = mlflow_place(store, directory, options.uri)
    if place.server is not None:
        print(f"the results are on the MLflow server {place.server}{place.page}")
        return EXIT_SUCCESS
    check_port(options.host, options.port)
    return serve(store, place, options.host, options.port)


@dataclass(frozen=True)
class MLflowPlace:
    """Where a run is to be seen.

    Args:
        uri: MLflow's tracking URI.
        server: its address, if it is a server and no database.
        page: of the run below the address; of the list of experiments, if MLflow does not have the run.
    """

    uri: str
    server: str | None
    page: str


def tracking_address(store: Store, run: Path | None, uri: str | None = None) -> str:
    """MLflow's tracking URI: the given one, else the run's own, else the store's."""
    from polytrope.pipeline.tracking.process import tracking_uri

    configured = uri if uri is not None or run is None else _tracking(run).get("uri")
    return str(resolve_environment(tracking_uri(configured, store.local("")), os.environ))


def mlflow_place(store: Store, run: Path | None, uri: str | None = None) -> MLflowPlace:
    """Where MLflow has a run.

    Args:
        store: that holds the run.
        run: its directory.
        uri: instead of the run's own tracking URI.

    Raises:
        UserError: the database is not there.
    """
    from polytrope.pipeline.tracking.cursor import read_cursor
    from polytrope.pipeline.tracking.database import database_file
    from polytrope.pipeline.tracking.overview import TRAINING_VIEW, address
    from polytrope.pipeline.tracking.process import without_password

    tracking = {} if run is None else _tracking(run)
    resolved = tracking_address(store, run, uri)
    sent = run is not None and was_tracked(run) and uri in (None, tracking.get("uri"))
    if run is not None and sent:
        _bring(store, run, resolved, tracking.get("experiment"))
    if resolved.startswith("sqlite:///") and not database_file(resolved).exists():
        raise UserError(
            f"there are no results in {database_file(resolved)}",
            "`polytrope run WORKFLOW` makes some; `--store DIR` or `--uri URI` looks elsewhere",
        )
    page = f"/#/experiments{TRAINING_VIEW}"
    if run is not None:
        cursor = read_cursor(run, resolved)
        if cursor.parent is not None and cursor.experiment is not None:
            page = f"/{address(cursor.experiment, cursor.parent)}"
        elif not sent:
            print(f"polytrope: run {run.name} was not sent there", file=sys.stderr)
    is_server = resolved.startswith(("http://", "https://"))
    return MLflowPlace(resolved, without_password(resolved).rstrip("/") if is_server else None, page)


def _bring(store: Store, run: Path, uri: str, experiment: str | None) -> None:
    """See that MLflow has a run before somebody looks at it there.

    A run that computed nothing ends before it was sent, and one that has just begun is not there at once: the process
    that sends it is waited for, or its work is done here.
    """
    from polytrope.pipeline.tracking import process as mlflow

    if _is_there(run, uri):
        return
    print(f"polytrope: run {run.name} is being sent to MLflow …", file=sys.stderr, flush=True)
    mlflow.check_tracking(uri)
    code, reason = mlflow.EXIT_BUSY, ""
    while code == mlflow.EXIT_BUSY and not _is_there(run, uri) and not mlflow.error_file(run).exists():
        code, reason = mlflow.sync_now(store, run, uri, experiment)
    store.push_run(run.name)
    if code == mlflow.EXIT_REFUSED or not _is_there(run, uri):
        again = command("sync", run.name, store=store.address)
        reason = reason or mlflow.known_failure(run) or "a part was not taken"
        print(f"polytrope: MLflow has not taken all of run {run.name}: {reason}\n  → {again}", file=sys.stderr)


def _is_there(run: Path, uri: str) -> bool:
    """Whether MLflow has all of a run that has ended, or shows one that goes on."""
    from polytrope.pipeline.tracking.cursor import read_cursor

    cursor = read_cursor(run, uri)
    if cursor.parent is None:
        return False
    return run_status(run) in ("pending", "running") or cursor.closed == len(read(run))


def serve(store: Store, place: MLflowPlace, host: str, port: int, ready: Callable[[str], None] | None = None) -> int:
    """MLflow's server on a database, until Ctrl-C. `ready`: called with the page's address once it answers."""
    from polytrope.pipeline.tracking.process import check_tracking, server_command

    subprocess.run([sys.executable, "-m", "polytrope.pipeline.tracking.database", place.uri], check=True)
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.NamedTemporaryFile(prefix="polytrope-mlflow-", suffix=".log", delete=False) as log:
        server = subprocess.Popen(
            server_command(place.uri, store.local("mlflow-artifacts"), host, port),
            env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ},  # processes for features not used here
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    print(f"MLflow: http://{host}:{port}{place.page} (Ctrl-C ends it)\n  its log: {log.name}", flush=True)
    failed = False
    try:
        while ready is not None and server.poll() is None:
            with contextlib.suppress(UserError):
                check_tracking(f"http://{host}:{port}")
                ready(f"http://{host}:{port}{place.page}")
                break
            time.sleep(0.2)
        failed = server.wait() != 0
    except KeyboardInterrupt:
        pass
    finally:
        _end(server)
        if not failed:
            os.unlink(log.name)
    if failed:
        print(f"polytrope: MLflow's server ended with {server.returncode}: see {log.name}", file=sys.stderr)
    return EXIT_RUN_FAILED if failed else EXIT_SUCCESS


def _end(server: subprocess.Popen[bytes]) -> None:
    """MLflow's server waits for connections that a browser keeps open: what does not end in time is killed."""
    import psutil

    try:
        started = psutil.Process(server.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    server.terminate()
    try:
        server.wait(timeout=5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def sync(options: argparse.Namespace) -> int:
    """Send to MLflow and the other loggers what they have not received of one run, or of all."""
    store = open_store(options)
    directories = store.run_directories() if options.all else [find_run(store, options.run)]
    return max((_sync(store, directory) for directory in directories), default=EXIT_SUCCESS)


def _sync(store: Store, directory: Path) -> int:
    from polytrope.pipeline.tracking import process as mlflow
    from polytrope.pipeline.tracking.cursor import read_cursor
    from polytrope.pipeline.tracking.loggers import log_now

    name, tracking = directory.name, _tracking(directory)
    problems = log_now(store, directory) if tracking.get("loggers") else {}
    if problems is None:
        print(f"run {name} is being given to its loggers by another process")
    for logger, problem in (problems or {}).items():
        print(f"polytrope: {logger} has not taken all of run {name}: {problem}", file=sys.stderr)
    logged = EXIT_RUN_FAILED if problems else EXIT_SUCCESS
    if not was_tracked(directory):
        print(f"run {name} was made without MLflow (`tracking.enabled: false`)")
        return logged
    uri = tracking_address(store, directory)
    mlflow.check_tracking(uri)
    code, reason = mlflow.sync_now(store, directory, uri, tracking.get("experiment"))
    store.push_run(name)
    if code == mlflow.EXIT_SENT:
        print(f"run {name} is complete in MLflow")
        return logged
    if code == mlflow.EXIT_UNFINISHED:
        print(f"run {name} goes on; MLflow has what it has done so far")
        return logged
    if code == mlflow.EXIT_BUSY:
        print(f"run {name} is being sent to MLflow by another process")
        return logged
    if code == mlflow.EXIT_REFUSED:
        cursor = read_cursor(directory, uri)
        if cursor.refused:
            print(f"run {name} is in MLflow, but for what the server refused:", file=sys.stderr)
            for line in cursor.refused:
                print(f"  {line}", file=sys.stderr)
        if cursor.postponed:
            print(f"run {name} is in MLflow, but for what could not be uploaded:", file=sys.stderr)
            for item in cursor.postponed:
                print(f"  {item.what}: {item.reason}", file=sys.stderr)
            print("  → try again when its artifact store is well", file=sys.stderr)
        return EXIT_RUN_FAILED
    print(f"polytrope: MLflow has not taken all of run {name}: {reason}", file=sys.stderr)
    print("  → nothing is lost; try again when the server is well", file=sys.stderr)
    return EXIT_RUN_FAILED


def was_tracked(run: Path) -> bool:
    """Whether a run's workflow file lets it be sent to MLflow."""
    return bool(_tracking(run).get("enabled", True))


def _tracking(directory: Path) -> dict[str, Any]:
    workflow = read_run_file(directory).get("workflow") or {}
    return dict(workflow.get("tracking") or {})


def build_ops(options: argparse.Namespace) -> int:
    """Compile the kernels with this machine's compilers."""
    from polytrope.ops.build import build

    result = build(cuda=options.cuda) if options.cuda else build()
    print(f"built {result}")
    return EXIT_SUCCESS
