"""The last words on every stage when nothing runs any more."""

from __future__ import annotations

from polytrope.pipeline.engine.event_log import EventLog
from polytrope.pipeline.engine.options import RunOptions, unknown_names
from polytrope.pipeline.engine.schedule import Schedule
from polytrope.pipeline.runs.journal import DONE_STATES
from polytrope.pipeline.workflow.graph import parent_stage


def end_broken(log: EventLog, message: str) -> None:
    """Journal the end of a run that cannot go on itself: what was running is cancelled, the rest keeps its state."""
    for name, stage in log.state.stages.items():
        if stage.state in ("running", "retrying"):
            log.emit("stage_cancelled", stage=name, reason=message)


def end_stages(
    log: EventLog, schedule: Schedule, options: RunOptions, stopping: tuple[str, str] | None
) -> tuple[str, str | None]:
    """Journal what became of the stages that have not ended; returns (status of the run, why it did not succeed).

    Args:
        log: of the run.
        schedule: what ended, and how.
        options: of this attempt.
        stopping: (status, reason), if it was stopped before its end.
    """
    ended, graph, stages = schedule.ended, schedule.graph, log.state.stages
    failed = [name for name in graph if ended.get(name) == "failed"]
    status, reason = stopping or ("failed" if failed else "succeeded", "")
    if stopping is not None:
        for name in graph:
            if name not in ended:
                log.emit("stage_cancelled", stage=name, reason=reason)
    for name, stage in stages.items():
        if name in graph or stage.state in DONE_STATES:
            continue
        parent = parent_stage(name)
        if ended.get(parent) in DONE_STATES:
            log.emit("stage_skipped", stage=name, reason=f"`{parent}` returned other stages this time")
        elif stage.state != "cancelled":
            log.emit("stage_cancelled", stage=name, reason=f"it is returned by `{parent}`, which has no result")
    for name in unknown_names(graph, options):
        parent = name.partition("/")[0]
        if ended.get(parent) in DONE_STATES:
            text = f"`{name}` was to be computed in any case, but no such stage was returned"
            log.emit("stage_noted", stage=parent, source=f"option {name}", text=text)
    if status == "succeeded":
        unfinished = [name for name, stage in stages.items() if stage.state not in DONE_STATES]
        assert not unfinished, f"stages without an end: {unfinished}"
    return status, f"{', '.join(f'`{name}`' for name in failed)} failed" if failed else reason or None
