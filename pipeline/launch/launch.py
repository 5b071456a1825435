"""From a validated workflow to a finished run: the checks before the start, tracking, display, and the last words."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TextIO, cast

from polytrope.pipeline.engine.options import Observer, RunOptions
from polytrope.pipeline.engine.returned import with_stored
from polytrope.pipeline.engine.run import run_workflow
from polytrope.pipeline.errors import EXIT_CANCELLED, EXIT_RUN_FAILED, EXIT_SUCCESS, UserError
from polytrope.pipeline.executors import check_resources
from polytrope.pipeline.launch.environment import changed_versions, record_environment
from polytrope.pipeline.launch.failure import failure_lines, way_on
from polytrope.pipeline.launch.notification import notify
from polytrope.pipeline.launch.progress import Progress, counts, show_event, summary_rows
from polytrope.pipeline.runs.journal import ENDED_STATES, Event, RunState, fold
from polytrope.pipeline.runs.record import check_workflow, workflow_files
from polytrope.pipeline.runs.spool import SpoolReader
from polytrope.pipeline.stage import module_being_loaded
from polytrope.pipeline.store.store import Store, store_error
from polytrope.pipeline.support.files import replace_file, safe_name
from polytrope.pipeline.support.signal_mask import signals_blocked
from polytrope.pipeline.support.streams import Output
from polytrope.pipeline.support.terminal import columns, wrapped
from polytrope.pipeline.support.text import command, complete_commands, count, format_duration
from polytrope.pipeline.tracking.loggers import check_loggers, logger_directory, read_problems, start_loggers
from polytrope.pipeline.tracking.process import check_tracking, failed_sync, start_sync, tracking_uri, wait_for_sync
from polytrope.pipeline.workflow.draw import layout, svg
from polytrope.pipeline.workflow.graph import StageNode, build_graph
from polytrope.pipeline.workflow.references import environment_names, resolve_environment
from polytrope.pipeline.workflow.spec import Workflow

Display = Literal["auto", "quiet", "none"]
REPORT = "report.html"
_SYNC_PATIENCE = 20.0  # seconds without progress that a finished run waits for MLflow
_CACHED_PATIENCE = 1.5  # the same for a run that computed nothing


def launch(
    workflow: Workflow,
    *,
    executor: str | None = None,
    store: str | Path | None = None,
    run_id: str | None = None,
    resume: bool | None = None,
    tracking: bool = True,
    display: Display = "none",
    overrides: Iterable[str] = (),
    options: RunOptions | None = None,
    observer: Observer | None = None,
    graph: dict[str, StageNode] | None = None,
    stream: TextIO | None = None,
) -> RunState:
    """Run a workflow, or go on with a run of it, and return its state also when it fails.

    Args:
        workflow: from `load_workflow`, or made in Python.
        executor: instead of the workflow's.
        store: instead of the workflow's.
        run_id: of a new run, or of the one to go on with; None: a new one with a new id.
        resume: True: the run must exist; False: it must not; None: either.
        tracking: False: nothing is sent to MLflow, nor given to other loggers.
        display: auto: live on a terminal and line by line elsewhere; quiet: failures; none: nothing is printed.
        overrides: what `--set` changed, for the record.
        options: see `RunOptions`.
        observer: called with every journal event.
        graph: of the workflow, if it is built already.
        stream: where to print; by default stdout.

    Returns:
        The final state; `status` is succeeded, failed or cancelled.

    Raises:
        UserError: refused; nothing was started.
    """
    if (module := module_being_loaded()) is not None:
        raise UserError(
            f"the module `{module}` starts a run when it is imported, and it is imported for a stage of that run",
            'put the call below `if __name__ == "__main__":`, or the stage into a module of its own',
        )
    graph = build_graph(workflow) if graph is None else graph
    if not tracking:  # in the run's record too: `ui`, `open`, `sync` and `resume` go by it
        untracked = workflow.tracking.model_copy(update={"enabled": False, "loggers": []})
        workflow = workflow.model_copy(update={"tracking": untracked})
    place = Store(store if store is not None else workflow.store)
    place.create()
    options = options or RunOptions()
    if run_id is not None:
        with _complete_hints(place, run_id):
            _check_run(place, run_id, workflow, graph, options)
    if workflow.tracking.enabled and workflow.tracking.required:
        _check_tracking(workflow, place)
    _check_loggers(workflow)
    _check_resources(workflow, graph, executor or workflow.executor)
    notified = _notified(workflow)
    session = _Session(workflow, graph, place, display, observer, stream)
    record = {
        "argv": sys.argv,
        "overrides": list(overrides),
        "files": {} if "files" in options.record else workflow_files(workflow.source),
        "environment": record_environment(workflow.directory, keep_diff=workflow.tracking.git_diff),
    }
    try:
        with _complete_hints(place, run_id):
            return run_workflow(
                workflow,
                graph,
                place,
                run_id=run_id,
                resume=resume,
                executor=executor,
                observer=session.observe,
                on_start=session.start,
                options=replace(options, record={**record, **options.record}),
            )
    finally:
        session.end()
        if notified is not None and session.directory is not None:
            notify(*notified, session.state, session.directory.name, place.address)


def _notified(workflow: Workflow) -> tuple[str, dict[str, str]] | None:
    """The command of `notify:` with the variables that it names, and these."""
    if workflow.notify is None:
        return None
    try:
        resolved = str(resolve_environment(workflow.notify, os.environ))
        return resolved, {name: os.environ[name] for name in environment_names(workflow.notify)}
    except UserError as error:
        raise UserError(f"{workflow.where('notify')}: {error.message}", error.hint) from None


@contextlib.contextmanager
def _complete_hints(store: Store, run_id: str | None) -> Iterator[None]:
    """Commands in hints of an error name the store that they are for."""
    try:
        yield
    except UserError as error:
        error.hint = complete_commands(error.hint, store.address, run_id)
        raise


def exit_code(state: RunState) -> int:
    """Of the command, for a final state."""
    return {"succeeded": EXIT_SUCCESS, "cancelled": EXIT_CANCELLED}.get(state.status, EXIT_RUN_FAILED)


def _check_run(store: Store, run_id: str, workflow: Workflow, graph: dict[str, StageNode], options: RunOptions) -> None:
    if options.allow_code_change or safe_name(run_id) != run_id:  # a bad name is refused where the run begins
        return
    try:
        store.pull_run(run_id)
    except OSError as error:
        raise store_error(store.address, error) from error
    check_workflow(store.run_directory(run_id), workflow.name, graph.keys())


def _check_tracking(workflow: Workflow, store: Store) -> None:
    uri = tracking_uri(workflow.tracking.uri, store.local(""))
    try:
        check_tracking(resolve_environment(uri, os.environ))
    except UserError as error:
        place = workflow.where("tracking", "uri")
        ways = "or go on and send everything later: `--set tracking.required=false`; or without MLflow: `--no-tracking`"
        raise UserError(f"{place}: {error.message}", f"{error.hint}; {ways}" if error.hint else ways) from None


def _check_loggers(workflow: Workflow) -> None:
    try:
        check_loggers(list(workflow.tracking.loggers))
    except UserError as error:
        raise UserError(f"{workflow.where('tracking', 'loggers')}: {error.message}", error.hint) from None


def _check_resources(workflow: Workflow, graph: dict[str, StageNode], executor: str) -> None:
    try:
        check_resources(graph, executor, workflow.ray_address)
    except UserError as error:
        field = error.message.partition(":")[0]
        place = workflow.where(*field.split(".")) if field.startswith("stages.") else ""
        location = place.removesuffix(field)
        raise UserError(location + error.message, error.hint) from None


class _Session:
    """What accompanies one attempt: the display and the process that feeds MLflow."""

    def __init__(
        self,
        workflow: Workflow,
        graph: dict[str, StageNode],
        store: Store,
        display: Display,
        observer: Observer | None,
        stream: TextIO | None,
    ) -> None:
        self.workflow, self.graph, self.store = workflow, graph, store
        self.display = display
        self.tracked = workflow.tracking.enabled
        self.logger_names = list(workflow.tracking.loggers)
        self.stream = cast(TextIO, Output(stream or sys.stdout))
        self.observer = observer
        self.state = RunState()
        self.directory: Path | None = None
        self.progress: Progress | None = None
        self.sync: Any = None
        self.loggers: Any = None
        self.grown = False  # since the graph was drawn

    def observe(self, event: Event) -> None:
        """Every journal event; those of earlier attempts come before `start`."""
        fold([event], self.state)
        if event.type == "stages_returned":
            self.grown = True
        states = {stage.state for stage in self.state.stages.values()} if self.grown else set()
        if self.grown and self.sync is not None and states <= ENDED_STATES:
            self.grown = False
            self._draw()
        if self.progress is not None:
            show_event(self.progress, event, self.state)
        if self.observer is not None:
            self.observer(event)

    def start(self, directory: Path) -> None:
        """Lease and journal are held: start tracking and the display."""
        self.directory = directory
        self._say_versions(directory)
        if self.tracked:
            self._draw()
            self.sync = start_sync(self.store, directory, self.workflow.tracking)
        if self.logger_names:
            self.loggers = start_loggers(self.store, directory)
        if self.display == "none":
            return
        if self.display != "quiet":
            print(wrapped(self._headline(), columns(self.stream)), file=self.stream, flush=True)
        self.progress = Progress(
            self.graph, SpoolReader(directory / "spool"), stream=self.stream, quiet=self.display == "quiet"
        )
        for name, stage in self.state.stages.items():
            if stage.state in ("succeeded", "cached") and name in self.progress.stages:
                view = self.progress.stages[name]
                view.state, view.duration, view.detail = stage.state, stage.duration, "in an earlier attempt"
        with signals_blocked():  # it has threads
            self.progress.__enter__()

    def _say_versions(self, directory: Path) -> None:
        """At a resume: what is finished was computed with other versions, and stays."""
        changed = changed_versions(directory)
        if not changed:
            return
        shown = "; ".join([*changed[:5], *([f"and {len(changed) - 5} more"] if len(changed) > 5 else [])])
        text = f"finished stages stay, though versions are others than in the attempt before: {shown}"
        if self.display == "none":
            warnings.warn(text, stacklevel=2)
        else:
            print(f"polytrope: {text}", file=sys.stderr, flush=True)

    def _draw(self) -> None:
        """The graph, with the stages that were returned so far: MLflow shows it."""
        assert self.directory is not None
        keys = {name: stage.key for name, stage in self.state.stages.items() if stage.digest}
        with contextlib.suppress(OSError, UserError):  # no run fails for want of a picture
            _, graph = with_stored(self.workflow, self.graph, self.store, keys)
            replace_file(self.directory / "graph.svg", svg(layout(graph)).encode(), durable=False)

    def _headline(self) -> str:
        attempt = "" if self.state.attempt <= 1 else f", attempt {self.state.attempt}"
        return (
            f"run {self.state.run_id}: {self.workflow.name}, {count(len(self.graph), 'stage')}, "
            f"{self.state.executor} executor{attempt}, store {self.store.address}"
        )

    def end(self) -> None:
        """Stop the display, let MLflow catch up, and say what came out."""
        if self.progress is not None:
            if not self.state.done:
                self.progress.interrupt()
            self.progress.__exit__()
        if self.directory is None:  # refused before there was anything to say
            return
        shown = self.display != "none"
        if shown:
            print_summary(self.state, self.store, self.directory, tracked=self.tracked, stream=self.stream)
        if self.loggers is not None:
            self._end_loggers(self.directory, shown)
        if self.sync is None:
            return
        problem = self._missing_in_mlflow(self.directory)
        if problem is not None and shown:
            print(f"MLflow has not received everything: {problem}", file=self.stream)
            print(f"  → {command('sync', self.directory.name, store=self.store.address)}", file=self.stream)

    def _end_loggers(self, directory: Path, shown: bool) -> None:
        """Let them write the last figures; where they are, and what was not taken."""
        self.loggers.stdin.close()  # the run is over, whether or not its journal says so
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.loggers.wait(_SYNC_PATIENCE)
        problems = read_problems(directory)
        code = self.loggers.poll()
        if code != 0:  # `sync` and `resume` begin anew
            why = "is slow and goes on" if code is None else f"failed, see {directory / 'logs' / 'loggers.log'}"
            problems = dict.fromkeys(self.logger_names, why) | problems
        for name in self.logger_names if shown else ():
            place = logger_directory(self.store, name, directory.name)
            print(f"{name}: {problems.get(name) or place}", file=self.stream)
        if problems and shown:
            print(f"  → {command('sync', directory.name, store=self.store.address)}", file=self.stream)

    def _missing_in_mlflow(self, directory: Path) -> str | None:
        """Wait for MLflow; not long if nothing was computed: the process then ends by itself a little later."""
        if all(stage.state in ("cached", "skipped") for stage in self.state.stages.values()):
            return failed_sync(self.sync, directory, _CACHED_PATIENCE)
        return wait_for_sync(self.sync, directory, _SYNC_PATIENCE)


def print_summary(
    state: RunState,
    store: Store,
    directory: Path,
    *,
    tracked: bool,
    stream: TextIO,
) -> None:
    """What failed, why and where, and how to go on; then status, metrics, report, and where to browse."""

    def say(text: str = "") -> None:
        print(wrapped(text, columns(stream)), file=stream)

    took = "" if state.duration is None else f" in {format_duration(state.duration)}"
    stages = counts(stage.state for stage in state.stages.values())
    say()
    if state.status != "succeeded":
        for line in (*failure_lines(state, directory, store), *way_on(state, directory, store)):
            say(line)
        say()
    say(f"run {directory.name} {state.status}{took if state.attempt <= 1 else ''}: {stages}")
    summaries = {name: stage.summary for name, stage in state.stages.items()}
    rows = summary_rows(summaries)
    width = max((len(row[0]) for row in rows), default=0)
    for name, text in rows[:40]:
        say(f"  {name.ljust(width)}  {text}")
    reports = report_stages(state, store)
    for stage in reports:
        words = ["open", directory.name, "report", *([stage] if len(reports) > 1 else [])]
        say(f"report: {command(*words, store=store.address)}")
    if tracked:
        say(f"MLflow: {command('ui', directory.name, store=store.address)}")
    stream.flush()


def report_stages(state: RunState, store: Store) -> list[str]:
    """The stages of a run whose results hold a report."""
    return [name for name, stage in state.stages.items() if stage.digest and has_report(store, stage.key)]


def has_report(store: Store, key: str | None) -> bool:
    """Whether a result that is stored holds a report; nothing but its manifest is read."""
    artifact = store.load(key) if key else None
    return artifact is not None and any(entry["path"] == REPORT for entry in artifact.files)
