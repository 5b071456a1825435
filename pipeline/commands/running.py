"""`polytrope run`, `resume` and `cancel`: drive a run, go on with it, ask its driver to stop."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from polytrope.pipeline.commands.common import (
    find_run,
    open_store,
    read_run_file,
    store_address,
    workflow_of,
)
from polytrope.pipeline.engine.options import CANCEL_FILE, RunOptions
from polytrope.pipeline.errors import EXIT_RUN_FAILED, EXIT_SUCCESS, UserError
from polytrope.pipeline.launch.failure import run_command
from polytrope.pipeline.launch.launch import Display, exit_code, launch
from polytrope.pipeline.runs.record import changed_workflow_files, run_status
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.files import replace_file
from polytrope.pipeline.support.text import command
from polytrope.pipeline.workflow.spec import Workflow


def run(options: argparse.Namespace) -> int:
    """Check, then run to the end."""
    workflow = workflow_of(options)
    state = launch(
        workflow,
        store=store_address(options, workflow),
        run_id=options.run_id,
        display=_display(options),
        overrides=options.overrides,
        options=RunOptions(
            force=frozenset(options.force),
            verify=options.verify,
            faults=options.inject_faults,
            record={"run_options": _given(options)},
        ),
    )
    return exit_code(state)


def _given(options: argparse.Namespace) -> list[str]:
    """The options of `run` that do not decide results, as they were typed."""
    words = [
        word
        for name in ("executor", "ray_address", "concurrency")
        if getattr(options, name) is not None
        for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ]
    return [
        *words,
        *(f"--{name.replace('_', '-')}" for name in ("keep_going", "no_tracking") if getattr(options, name)),
    ]


def _display(options: argparse.Namespace) -> Display:
    return "quiet" if options.quiet else "auto"


def resume(options: argparse.Namespace) -> int:
    """Go on with one run, or with all that ended early."""
    if options.address:
        from polytrope.pipeline.commands import cluster

        return cluster.resume(options)
    store = open_store(options)
    if not options.all:
        return _resume(store, find_run(store, options.run), options)
    waiting = [
        directory
        for directory in reversed(store.run_directories())
        if run_status(directory) in ("failed", "cancelled", "interrupted")
    ]
    if not waiting:
        print(f"there is nothing to resume in {store.address}")
    codes = []
    for directory in waiting:
        try:
            codes.append(_resume(store, directory, options))
        except UserError as error:  # one that cannot go on does not keep the others from it
            print(f"polytrope: {error}", file=sys.stderr)
            codes.append(EXIT_RUN_FAILED)
    return max(codes, default=EXIT_SUCCESS)


def _resume(store: Store, directory: Path, options: argparse.Namespace) -> int:
    record = read_run_file(directory)
    data = dict(record.get("workflow") or {})
    for name in ("ray_address", "concurrency"):
        if getattr(options, name) is not None:
            data[name] = getattr(options, name)
    if options.keep_going:
        data["fail_fast"] = False
    if options.no_tracking:
        data["tracking"] = {**data.get("tracking", {}), "enabled": False}
    source = record.get("source")
    origin = Path(record.get("directory") or Path.cwd())
    workflow = Workflow.from_dict(
        data,
        directory=origin if origin.is_dir() else Path.cwd(),
        source=Path(source) if source else None,
    )
    _say_what_changed(store, directory, record)
    state = launch(
        workflow,
        executor=options.executor or record.get("executor"),
        store=store.address,
        run_id=directory.name,
        resume=True,
        display=_display(options),
        overrides=record.get("overrides", []),
        options=RunOptions(
            force=frozenset(options.force),
            start_from=options.from_stage,
            allow_code_change=options.allow_code_change,
            faults=options.inject_faults,
            record={  # of the workflow that is used, not as they are by now
                "files": record.get("files", {}),
                "run_options": record.get("run_options", []),
            },
        ),
    )
    return exit_code(state)


def _say_what_changed(store: Store, directory: Path, record: dict[str, Any]) -> None:
    """A run goes on with the workflow that it was started with, whatever has become of its files."""
    changed = changed_workflow_files(record.get("files", {}))
    if not changed:
        return
    verb = "has" if len(changed) == 1 else "have"
    print(
        f"polytrope: {', '.join(changed)} {verb} changed since run {directory.name} was started; "
        f"the workflow is used as it was then\n"
        f"  → the new one, in a run of its own that keeps what still fits: {run_command(record, store)}",
        file=sys.stderr,
    )


def cancel(options: argparse.Namespace) -> int:
    """Leave a request in the run's directory; the driver looks for it every second."""
    if options.address:
        from polytrope.pipeline.commands import cluster

        return cluster.cancel(options)
    store = open_store(options)
    directory = find_run(store, options.run)
    if run_status(directory) not in ("running", "pending"):
        print(f"run {directory.name} is {run_status(directory)}: nothing to cancel")
        return EXIT_SUCCESS
    by = f"polytrope cancel by {os.environ.get('USER', 'somebody')} on {socket.gethostname()}"
    replace_file(directory / CANCEL_FILE, json.dumps({"by": by, "time": time.time()}).encode())
    store.push_run(directory.name)
    end = time.monotonic() + options.wait
    while time.monotonic() < end:
        store.pull_run(directory.name)
        if run_status(directory) not in ("running", "pending"):
            again = command("resume", directory.name, store=store.address)
            print(f"run {directory.name} is {run_status(directory)}; go on: {again}")
            return EXIT_SUCCESS
        time.sleep(0.2)
    print(f"run {directory.name} was asked to stop and has not answered within {options.wait:g} s", file=sys.stderr)
    return EXIT_RUN_FAILED
