"""What a run is: the status as it really is, of which workflow it is, and whether the workflow's files have changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import RESULT_STATES, RunState, fold, read
from polytrope.pipeline.runs.lease import is_held
from polytrope.pipeline.workflow.source import parse_source, read_source

INTERRUPTED = "interrupted"


def run_status(directory: Path) -> str:
    """pending, running, succeeded, failed, cancelled, or interrupted: its driver is gone without having finished."""
    return run_state(directory).status


def run_state(directory: Path) -> RunState:
    """Where a run really stands: of one whose driver is gone nothing is running, whatever the journal said last.

    `status` of the run, and `state` of each stage that was running, is then `interrupted`.
    """
    held = is_held(directory)  # looked at first: a driver that ends meanwhile has written its end
    return as_it_stands(directory, fold(read(directory)), held)


def as_it_stands(directory: Path, state: RunState, held: bool) -> RunState:
    """The state that the journal tells, made true. `held`: whether the run had a driver before its journal was read."""
    if state.status in ("pending", "running") and not (held or is_held(directory)):
        state.status = INTERRUPTED
        for stage in state.stages.values():
            if stage.state in ("running", "retrying"):
                stage.state = INTERRUPTED
    return state


def check_workflow(directory: Path, workflow: str, stages: Collection[str]) -> None:
    """A run is of one workflow for good: another one would hide what the run has finished.

    Args:
        directory: of the run, which need not exist yet.
        workflow: name of the workflow that is about to go on with it.
        stages: its node names.

    Raises:
        UserError: the run is of another workflow, or has finished stages that this one does not have.
    """
    state = fold(read(directory))
    ways = f"`polytrope resume {directory.name}` goes on with it as it was; another `--run-id` starts a new run"
    if state.workflow and state.workflow != workflow:
        raise UserError(f"run {directory.name} is of the workflow `{state.workflow}`, not of `{workflow}`", ways)
    hidden = [
        name
        for name, stage in state.stages.items()
        if stage.state in RESULT_STATES and not any(start in stages for start in _name_and_parents(name))
    ]
    if hidden:
        names = ", ".join(f"`{name}`" for name in hidden[:5])
        raise UserError(
            f"run {directory.name} has finished {names}, which this version of the workflow `{workflow}` does not have",
            f"{ways}, which keeps what still fits",
        )


def _name_and_parents(name: str) -> list[str]:
    """`split/part/x` → itself, `split/part`, `split`: what a stage returned comes with it."""
    parts = name.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]


def workflow_files(source: Path | None) -> dict[str, str]:
    """Path → digest of what it says, of the workflow file and all it includes; {} for a workflow made in Python."""
    return {} if source is None else {str(path): _digest(path) for path in read_source(source).files}


def changed_workflow_files(files: Mapping[str, str]) -> list[str]:
    """Which of them say something else now; [] if the first is not on this machine. Comments do not count."""
    if not files or not Path(next(iter(files))).exists():
        return []
    return [name for name, digest in files.items() if not Path(name).exists() or _digest(Path(name)) != digest]


def _digest(path: Path) -> str:
    data = path.read_bytes()
    try:
        content = parse_source(data.decode(), str(path)).data
        data = json.dumps(content, sort_keys=True, default=str).encode()
    except (UserError, ValueError):
        pass  # no workflow any more: whatever it is, it has changed
    return hashlib.sha256(data).hexdigest()
