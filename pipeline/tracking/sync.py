"""The process that copies a run to MLflow: `python -m polytrope.pipeline.tracking.sync RUN_DIRECTORY [--follow]`.

One process at a time copies a run (`mlflow.lock`). With --follow it goes on until the run ends or its driver is gone,
whatever the server does; `mlflow.error` of the run holds the last failure while there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.record import run_status
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.files import replace_file
from polytrope.pipeline.tracking.copy import Copy
from polytrope.pipeline.tracking.cursor import CURSOR_FILE, read_cursor
from polytrope.pipeline.tracking.database import ensure_database
from polytrope.pipeline.tracking.lock import locked
from polytrope.pipeline.tracking.process import (
    EXIT_BUSY,
    EXIT_FAILED,
    EXIT_REFUSED,
    EXIT_SENT,
    EXIT_UNFINISHED,
    busy_file,
    error_file,
    log_file,
    tracking_uri,
    without_password,
)
from polytrope.pipeline.workflow.references import resolve_environment
from polytrope.pipeline.workflow.spec import TrackingSpec

_LOCK_FILE = "mlflow.lock"
_POLL_SECONDS = 0.5
_LONGEST_DELAY = 30.0  # seconds between two tries
_LOCK_PATIENCE = 5.0  # seconds that `polytrope sync` waits for another process that copies the same run
_REPAIR_SECONDS = 5.0  # that a finished run spends on the copies of others
_log = logging.getLogger("polytrope.mlflow")


def copy_once(store: Store, run_directory: Path, uri: str, experiment: str = "") -> int:
    """Bring MLflow up to date with a run, whatever its state; returns the exit code of this process.

    Raises:
        Exception: whatever the server answered.
    """
    with locked(run_directory / _LOCK_FILE, _LOCK_PATIENCE) as held:
        if not held:
            return EXIT_BUSY
        ensure_database(uri, busy_file(run_directory))
        copy = Copy(store, run_directory, uri, experiment)
        copy.advance()
        code = _end(copy)
        error_file(run_directory).unlink(missing_ok=True)
        return code


def _end(copy: Copy) -> int:
    """Close a copy whose run has ended or lost its driver; a run that goes on is left to its own process."""
    if copy.complete:
        copy.close()
    elif not _is_driven(copy.directory):
        copy.interrupt()
    else:
        return EXIT_UNFINISHED
    return EXIT_REFUSED if copy.cursor.refused or copy.cursor.postponed else EXIT_SENT


def _is_driven(run_directory: Path) -> bool:
    """Whether a driver is alive; one that is just ending gets a moment to do so."""
    for _ in range(20):
        if run_status(run_directory) == "interrupted":
            return False
        time.sleep(0.1)
    return True


def follow(store: Store, run_directory: Path, uri: str, experiment: str, orphaned: threading.Event) -> int:
    """Copy a run until it ends; until then, every failure of the server is waited out.

    Args:
        store: that holds the run.
        run_directory: of the run.
        uri: MLflow's tracking URI.
        experiment: its name; "": the workflow's.
        orphaned: set when the driver is gone: one last pass, then the end.

    Raises:
        Exception: the server failed in that last pass.
    """
    delay, copy = 1.0, None
    others = _unfinished(store, run_directory, uri)
    with locked(run_directory / _LOCK_FILE, None, orphaned) as held:
        while held:
            gone = orphaned.is_set()
            try:
                if copy is None:
                    ensure_database(uri, busy_file(run_directory))
                    copy = Copy(store, run_directory, uri, experiment)
                moved = copy.advance()
                if copy.complete or gone:
                    code = _end(copy)
                    error_file(run_directory).unlink(missing_ok=True)
                    _repair_all(store, others, uri)
                    return code
                error_file(run_directory).unlink(missing_ok=True)
                delay = 1.0
                if not moved:
                    _repair(store, next(others, None), uri)
                    orphaned.wait(_POLL_SECONDS)
            except Exception as error:
                _note(run_directory, error)
                if gone:
                    raise
                _log.warning("MLflow failed, next try in %.0f s\n%s", delay, traceback.format_exc())
                copy = None  # from the cursor again, and the server is asked what it has
                orphaned.wait(delay)
                delay = min(_LONGEST_DELAY, 2 * delay)
    return EXIT_BUSY


def _note(run_directory: Path, error: Exception) -> None:
    with contextlib.suppress(OSError):
        replace_file(error_file(run_directory), " ".join(str(error).split())[:500].encode(), durable=False)


# -- runs that nobody finished -----------------------------------------------------------------------------------------


def _unfinished(store: Store, run_directory: Path, uri: str) -> Iterator[Path]:
    """Other runs of the store whose copies were cut short (a machine that died, a server that was away)."""
    for directory in reversed(store.run_directories()):
        if directory != run_directory and needs_copy(store, directory, uri):
            yield directory


def needs_copy(store: Store, directory: Path, uri: str) -> bool:
    """Whether a run that has ended, in whatever way, was meant for this server and is not complete there."""
    try:
        if not log_file(directory).exists():
            return False  # it was never to be copied
        record = json.loads((directory / "workflow.json").read_bytes())
        tracking = TrackingSpec.model_validate(record["workflow"].get("tracking") or {})
        configured = resolve_environment(tracking_uri(tracking.uri, store.local("")), os.environ)
        if without_password(configured) != uri:
            return False
        cursor = read_cursor(directory, uri)
        if cursor.parent is None and (directory / CURSOR_FILE).exists():
            return False  # another server has it
        return not cursor.complete and run_status(directory) not in ("pending", "running")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError) as error:  # what is wrong with it
        _log.warning("run %s cannot be looked at, so it is not completed in MLflow: %s", directory.name, error)
        return False


def _repair(store: Store, directory: Path | None, uri: str) -> None:
    """Complete another run; what goes wrong there does not matter here."""
    if directory is None:
        return
    try:
        record = json.loads((directory / "workflow.json").read_bytes())
        copy_once(store, directory, uri, (record["workflow"].get("tracking") or {}).get("experiment") or "")
    except Exception:
        _log.warning("run %s stays incomplete in MLflow\n%s", directory.name, traceback.format_exc())


def _repair_all(store: Store, others: Iterator[Path], uri: str) -> None:
    """Use the moment at the end, when nothing else is to be done, but do not keep the driver waiting."""
    end = time.monotonic() + _REPAIR_SECONDS
    for directory in others:
        if time.monotonic() > end:
            return
        _repair(store, directory, uri)


def _watch_parent(orphaned: threading.Event) -> None:
    while os.read(0, 1):
        pass
    orphaned.set()


def main() -> int:
    """The command; its exit codes are those of `polytrope.pipeline.tracking.process`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("--store", required=True, help="its address")
    parser.add_argument("--follow", action="store_true", help="until the run ends")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    store = Store(options.store)
    uri, experiment = os.environ["MLFLOW_TRACKING_URI"], os.environ.get("POLYTROPE_EXPERIMENT", "")
    if options.follow:
        orphaned = threading.Event()
        threading.Thread(target=_watch_parent, args=(orphaned,), daemon=True).start()
        return follow(store, options.run_directory, uri, experiment, orphaned)
    try:
        return copy_once(store, options.run_directory, uri, experiment)
    except Exception as error:
        _note(options.run_directory, error)
        _log.debug("", exc_info=True)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
