"""Loggers besides MLflow: `python -m polytrope.pipeline.tracking.loggers RUN_DIRECTORY --store STORE [--follow]`.

A process beside the driver gives what journal and spool say to every logger of the workflow. It begins each time from
the first event, into a place that it empties first: whatever died before, nothing is missing, nothing is there twice.
One process at a time does so (`loggers.lock`).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import Event, JournalReader, RunState, fold
from polytrope.pipeline.runs.spool import SpoolEvent, SpoolReader
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.files import remove_tree, replace_file
from polytrope.pipeline.tracking.lock import locked
from polytrope.pipeline.tracking.names import flatten

_POLL_SECONDS = 0.5
_LOCK_PATIENCE = 5.0  # seconds that `polytrope sync` waits for the process of a run that goes on
_EXIT_BUSY = 4  # another process is at it
_log = logging.getLogger("polytrope.loggers")


class Logger(Protocol):
    """Where the figures of a run go. Steps of one curve only ever rise; times are seconds since the epoch."""

    def parameters(self, stage: str, values: Mapping[str, str]) -> None:
        """What decides a stage; may come more than once."""

    def metrics(self, stage: str, values: Mapping[str, float], step: int, moment: float) -> None:
        """A point of each curve."""

    def result(self, stage: str, values: Mapping[str, float], moment: float) -> None:
        """The figures of a stage that has ended well."""

    def close(self) -> None:
        """Write what is still in memory."""


class LoggedRun(NamedTuple):
    """What a logger is made of: where it writes, and of what."""

    directory: Path
    workflow: str
    run_id: str


class LoggerKind(NamedTuple):
    """`module:class` of a logger, made of a `LoggedRun`, and the package that it needs."""

    make: str
    package: str


LOGGERS = {
    "tensorboard": LoggerKind("polytrope.pipeline.tracking.tensorboard_logger:TensorBoard", "tensorboardX"),
    "wandb": LoggerKind("polytrope.pipeline.tracking.wandb_logger:WeightsAndBiases", "wandb"),
}


def check_loggers(names: list[str]) -> None:
    """Refuse those whose package is not installed.

    Raises:
        UserError: naming it.
    """
    for name in names:
        package = LOGGERS[name].package
        if importlib.util.find_spec(package) is None:
            raise UserError(f"`{name}` needs the package {package}", f"pip install 'polytrope[{name}]'")


def logger_directory(store: Store, name: str, run_id: str) -> Path:
    """Where a logger writes."""
    return store.local(name) / run_id


def problem_file(run_directory: Path) -> Path:
    """Holds {logger: why it fell out}."""
    return run_directory / "loggers.json"


def start_loggers(store: Store, run_directory: Path) -> subprocess.Popen[bytes]:
    """Start the process for a run that begins or goes on; it ends after the run, or when its stdin closes."""
    log = run_directory / "logs" / "loggers.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [*_command(store, run_directory), "--follow"],
            stdin=subprocess.PIPE,  # nobody writes to it: it closes with this process at the latest, whatever ends it
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def log_now(store: Store, run_directory: Path) -> dict[str, str] | None:
    """Give all that a run has said to its loggers; logger → why it fell out. None: another process is at it."""
    done = subprocess.run(_command(store, run_directory), check=False)
    if done.returncode == _EXIT_BUSY:
        return None
    done.check_returncode()
    return read_problems(run_directory)


def read_problems(run_directory: Path) -> dict[str, str]:
    """Logger → why it fell out."""
    path = problem_file(run_directory)
    return dict(json.loads(path.read_bytes())) if path.exists() else {}


def _command(store: Store, run_directory: Path) -> list[str]:
    return [sys.executable, "-m", "polytrope.pipeline.tracking.loggers", str(run_directory), "--store", store.address]


@dataclass
class _Feed:
    """A run, as the loggers are told of it. A logger that raises is told no more; the others are."""

    store: Store
    directory: Path
    loggers: dict[str, Logger]
    problems: dict[str, str] = field(default_factory=dict)
    state: RunState = field(default_factory=RunState)
    _latest: dict[tuple[str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._journal = JournalReader(self.directory)
        self._spool = SpoolReader(self.directory / "spool")

    def advance(self) -> None:
        """Tell what is new."""
        ended: list[Event] = []
        for event in self._journal.read_new():  # first: what a stage said comes before its end
            fold([event], self.state)
            if event.type == "stage_started":
                self._tell("parameters", event.stage, flatten((event.get("components") or {}).get("parameters", {})))
            if event.type in ("stage_succeeded", "stage_cached"):
                ended.append(event)
        for said in self._spool.read_new():
            self._say(said)
        for event in ended:
            if event.type == "stage_cached":
                self._repeat(event)
            self._tell("result", event.stage, event.get("summary") or {}, event.time)

    def _say(self, said: SpoolEvent) -> None:
        event = said.event
        if event["kind"] == "params":
            self._tell("parameters", said.stage, event["values"])
        elif event["kind"] == "metrics" and event.get("step") is not None:
            step = int(event["step"])
            values = {name: value for name, value in event["values"].items() if self._is_new(said.stage, name, step)}
            if values:
                self._tell("metrics", said.stage, values, step, event["time"])

    def _is_new(self, stage: str, name: str, step: int) -> bool:
        """A training that was resumed says some steps again."""
        latest = self._latest.get((stage, name))
        if latest is not None and step <= latest:
            return False
        self._latest[stage, name] = step
        return True

    def _repeat(self, event: Event) -> None:
        """A stage from the store has the curves of the run that computed it."""
        artifact = self.store.load(event.get("key"))
        if artifact is None or event.stage is None:
            return
        self._tell("parameters", event.stage, flatten(artifact.components.get("parameters", {})))
        source = str(event.get("hit_from"))
        self.store.pull_run(source)
        for said in SpoolReader(self.store.run_directory(source) / "spool", stage=artifact.stage).read_new():
            self._say(said._replace(stage=event.stage))

    def _tell(self, what: str, *arguments: Any) -> None:
        for name, logger in list(self.loggers.items()):
            try:
                getattr(logger, what)(*arguments)
            except Exception as error:
                self.fail(name, error)

    def fail(self, name: str, error: Exception) -> None:
        """Go on without it, and say why."""
        _log.warning("%s fails and is left out\n%s", name, traceback.format_exc())
        self.loggers.pop(name, None)
        self.problems[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        replace_file(problem_file(self.directory), json.dumps(self.problems).encode(), durable=False)

    def close(self) -> None:
        self._tell("close")


def _make(feed: _Feed, workflow: str, names: list[str]) -> Iterator[tuple[str, Logger]]:
    for name in names:
        try:
            directory = logger_directory(feed.store, name, feed.directory.name)
            remove_tree(directory)
            directory.mkdir(parents=True)
            module, _, constructor = LOGGERS[name].make.partition(":")
            run = LoggedRun(directory, workflow, feed.directory.name)
            yield name, getattr(importlib.import_module(module), constructor)(run)
        except Exception as error:
            feed.fail(name, error)


def main() -> int:
    """The command. It fails only if the run's files cannot be read, or if another process is at it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("--store", required=True, help="its address")
    parser.add_argument("--follow", action="store_true", help="until the run ends")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    orphaned = threading.Event()
    if options.follow:
        threading.Thread(target=_watch_parent, args=(orphaned,), daemon=True).start()
    patience = None if options.follow else _LOCK_PATIENCE
    with locked(options.run_directory / "loggers.lock", patience, orphaned) as held:
        if not held:
            return _EXIT_BUSY
        _log_run(Store(options.store), options.run_directory, orphaned if options.follow else None)
    return 0


def _log_run(store: Store, directory: Path, orphaned: threading.Event | None) -> None:
    """From the first event on; `orphaned`: until the run ends or its driver is gone; None: what there is now."""
    record = json.loads((directory / "workflow.json").read_bytes())["workflow"]
    problem_file(directory).unlink(missing_ok=True)
    feed = _Feed(store, directory, {})
    feed.loggers.update(_make(feed, str(record["name"]), list(record["tracking"].get("loggers", []))))
    while True:
        last = orphaned is None or orphaned.is_set()  # looked at first: what was said until then is told
        feed.advance()
        if last or feed.state.done:
            break
        time.sleep(_POLL_SECONDS)
    feed.close()


def _watch_parent(orphaned: threading.Event) -> None:
    while os.read(0, 1):
        pass
    orphaned.set()


if __name__ == "__main__":
    sys.exit(main())
