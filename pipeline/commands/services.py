"""`polytrope ui`, `sync` and `build-ops`: doors to MLflow and the kernels."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from polytrope.pipeline.commands.common import find_run, open_store, read_run_file
from polytrope.pipeline.errors import EXIT_RUN_FAILED, EXIT_SUCCESS, UserError
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.workflow.references import resolve_environment


def ui(options: argparse.Namespace) -> int:
    """Start MLflow's server on the tracking database of a run and say where it is; ends with Ctrl-C."""
    from polytrope.pipeline.tracking.database import database_file
    from polytrope.pipeline.tracking.process import free_port, server_command, tracking_uri

    store = open_store(options)
    configured = options.uri
    if configured is None and (options.run is not None or store.run_directories()):
        configured = _tracking(find_run(store, options.run)).get("uri")
    uri = resolve_environment(tracking_uri(configured, store.local("")), os.environ)
    if uri.startswith(("http://", "https://")):
        print(f"the results are on the MLflow server {uri}")
        return EXIT_SUCCESS
    if uri.startswith("sqlite:///") and not database_file(uri).exists():
        raise UserError(
            f"there are no results in {database_file(uri)}",
            "`polytrope run WORKFLOW` makes some; `--store DIR` or `--uri URI` looks elsewhere",
        )
    subprocess.run([sys.executable, "-m", "polytrope.pipeline.tracking.database", uri], check=True)
    port = free_port(options.port)
    print(f"MLflow: http://{options.host}:{port} (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, _interrupt)
    server = subprocess.Popen(
        server_command(uri, store.local("mlflow-artifacts"), options.host, port),
        env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ},  # processes for features not used here
    )
    try:
        return EXIT_SUCCESS if server.wait() == 0 else EXIT_RUN_FAILED
    except KeyboardInterrupt:
        return EXIT_SUCCESS
    finally:
        _end(server)


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
    """Send to MLflow what it has not received of one run, or of all."""
    store = open_store(options)
    directories = store.run_directories() if options.all else [find_run(store, options.run)]
    return max((_sync(store, directory) for directory in directories), default=EXIT_SUCCESS)


def _sync(store: Store, directory: Path) -> int:
    from polytrope.pipeline.tracking import process as mlflow
    from polytrope.pipeline.tracking.cursor import read_cursor

    name, tracking = directory.name, _tracking(directory)
    if not tracking.get("enabled", True):
        print(f"run {name} was made without MLflow (`tracking.enabled: false`)")
        return EXIT_SUCCESS
    uri = resolve_environment(mlflow.tracking_uri(tracking.get("uri"), store.local("")), os.environ)
    mlflow.check_tracking(uri)
    code, reason = mlflow.sync_now(store, directory, uri, tracking.get("experiment"))
    store.push_run(name)
    if code == mlflow.EXIT_SENT:
        print(f"run {name} is complete in MLflow")
        return EXIT_SUCCESS
    if code == mlflow.EXIT_UNFINISHED:
        print(f"run {name} goes on; MLflow has what it has done so far")
        return EXIT_SUCCESS
    if code == mlflow.EXIT_BUSY:
        print(f"run {name} is being sent to MLflow by another process")
        return EXIT_SUCCESS
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


def _tracking(directory: Path) -> dict[str, Any]:
    workflow = read_run_file(directory).get("workflow") or {}
    return dict(workflow.get("tracking") or {})


def build_ops(options: argparse.Namespace) -> int:
    """Compile the kernels with this machine's compilers."""
    from polytrope.ops.build import build

    result = build(cuda=options.cuda) if options.cuda else build()
    print(f"built {result}")
    return EXIT_SUCCESS
