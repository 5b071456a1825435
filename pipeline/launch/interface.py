"""`run()` for Python and notebooks: it shows the progress, raises when a run fails, and gives its results by stage."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from polytrope.pipeline.engine.options import Observer, RunOptions
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.launch.failure import failure_lines, way_on
from polytrope.pipeline.launch.launch import REPORT, Display, has_report, launch
from polytrope.pipeline.launch.progress import counts
from polytrope.pipeline.runs.journal import RESULT_STATES, RunState, StageState
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.text import format_duration, suggest
from polytrope.pipeline.workflow.spec import Workflow, load_workflow


@dataclass(frozen=True, repr=False)
class StageResult:
    """What a stage came to.

    Args:
        name: with its branch: `train[degree=3]`.
        state: succeeded, cached, skipped, failed, cancelled, pending.
        metrics: that it returned.
        digest: of its artifact; None without one.
        reason: why it was skipped or failed.
    """

    name: str
    state: str
    metrics: dict[str, float]
    digest: str | None
    reason: str | None
    _key: str | None = field(default=None)
    _store: Store | None = field(default=None)

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value:.6g}" for name, value in self.metrics.items())
        return f"<stage {self.name} {self.state}{': ' if figures else ''}{figures}>"

    @property
    def path(self) -> Path:
        """The directory with its files, read-only.

        Raises:
            UserError: it has no result.
        """
        if self._store is None or self._key is None:
            why = f": {self.reason}" if self.reason else ""
            raise UserError(f"the stage `{self.name}` has no result, it is {self.state}{why}")
        return self._store.materialize(self._key)

    @property
    def report(self) -> Path | None:
        """Its `report.html`; None if it has none."""
        return self.path / REPORT if self._store is not None and has_report(self._store, self._key) else None


@dataclass(frozen=True, repr=False)
class RunResult:
    """A run that has ended: `result["train"].path`, `.metrics`; `for name in result`.

    Args:
        run_id: for `polytrope status RUN` and the other commands.
        status: succeeded, failed or cancelled.
        duration: seconds.
        store: its address.
        stages: by name, branches with theirs.
    """

    run_id: str
    status: str
    duration: float | None
    store: str
    stages: dict[str, StageResult]

    def __repr__(self) -> str:
        took = "" if self.duration is None else f" in {format_duration(self.duration)}"
        return f"<run {self.run_id} {self.status}{took}: {counts(stage.state for stage in self.stages.values())}>"

    def __getitem__(self, name: str) -> StageResult:
        if name not in self.stages:
            branches = [item for item in self.stages if item.startswith(f"{name}[")]
            hint = f"it has branches: {', '.join(branches)}" if branches else suggest(name, self.stages)
            raise KeyError(f"no stage `{name}`; {hint}")
        return self.stages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    @property
    def report(self) -> Path | None:
        """The page that the `report` stage wrote: the last one, if there are several; None if there is none."""
        return next((stage.report for stage in reversed(self.stages.values()) if stage.report is not None), None)


class RunFailedError(RuntimeError):
    """A run that did not succeed. `result`: what it came to until then."""

    def __init__(self, message: str, result: RunResult) -> None:
        super().__init__(message)
        self.result = result


def run(
    workflow: Workflow | str | Path,
    *,
    overrides: Iterable[str] = (),
    executor: str | None = None,
    store: str | Path | None = None,
    run_id: str | None = None,
    resume: bool | None = None,
    tracking: bool = True,
    display: Display = "auto",
    options: RunOptions | None = None,
    observer: Observer | None = None,
) -> RunResult:
    """Run a workflow to its end, or go on with a run of it.

    Args:
        workflow: a file, or what `load_workflow` returned, or one made in Python.
        overrides: as `--set`: `params.steps=100`; of a file only.
        executor: instead of the workflow's: ray or local.
        store: instead of the workflow's, or of $POLYTROPE_STORE where it names none.
        run_id: of a new run, or of the one to go on with; None: a new one with a new id.
        resume: True: the run must exist; False: it must not; None: either.
        tracking: False: nothing is sent to MLflow.
        display: auto: live on a terminal, line by line elsewhere; quiet: failures; none: nothing is printed.
        options: see `RunOptions`.
        observer: called with every journal event.

    Raises:
        UserError: refused; nothing was started.
        RunFailedError: a stage failed, or the run was cancelled; its `result` has what came out until then.
    """
    overrides = list(overrides)
    if not isinstance(workflow, Workflow):
        workflow = load_workflow(workflow, overrides)
    elif overrides:
        raise UserError(
            f"run: overrides={overrides!r}, but the workflow is loaded already", "give them to `load_workflow`"
        )
    if store is None and "store" not in workflow.model_fields_set:
        store = os.environ.get("POLYTROPE_STORE")
    state = launch(
        workflow,
        executor=executor,
        store=store,
        run_id=run_id,
        resume=resume,
        tracking=tracking,
        display=display,
        overrides=overrides,
        options=options,
        observer=observer,
    )
    place = Store(workflow.store if store is None else store)
    result = RunResult(
        run_id=state.run_id,
        status=state.status,
        duration=state.duration,
        store=place.address,
        stages={name: _stage_result(stage, place) for name, stage in state.stages.items()},
    )
    if state.status != "succeeded":
        raise RunFailedError("\n".join(_what_failed(state, place)), result)
    return result


def _stage_result(stage: StageState, store: Store) -> StageResult:
    has_result = stage.state in RESULT_STATES
    return StageResult(
        name=stage.name,
        state=stage.state,
        metrics=dict(stage.summary),
        digest=stage.digest,
        reason=str((stage.error or {}).get("message") or stage.reason or "") or None,
        _key=stage.key if has_result else None,
        _store=store,
    )


def _what_failed(state: RunState, store: Store) -> Iterator[str]:
    directory = store.run_directory(state.run_id)
    yield f"run {state.run_id} {state.status}"
    yield from failure_lines(state, directory, store)
    yield from way_on(state, directory, store)
