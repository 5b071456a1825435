"""What earlier runs of a workflow tell about its stages: keys for the reasons of a plan, durations for predictions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytrope.pipeline.runs.journal import FILE_NAME, RESULT_STATES, decode, fold, read

_MOST_RUNS = 20  # looked at, newest first


@dataclass(frozen=True)
class Past:
    """How a stage went in an earlier run of the same workflow: its key, and seconds if it ended well.

    `components` of the key may be None: those of a cached stage stand in its artifact.
    """

    run_id: str
    key: str | None
    components: Mapping[str, Any] | None
    duration: float | None
    state: str


def stage_history(
    runs: Iterable[Path], workflow: str, names: Collection[str], *, skip: str | None = None
) -> dict[str, list[Past]]:
    """Node name → its past, newest first; reads only as many runs as it takes to know every name.

    Args:
        runs: the directories of the runs in a store.
        workflow: name of the workflow; other workflows' runs do not count.
        names: nodes that are asked for.
        skip: a run that does not count (the one about to be resumed).
    """
    history: dict[str, list[Past]] = {}
    unknown = set(names)
    for number, directory in enumerate(_newest_first(runs, workflow)):
        if not unknown or number >= _MOST_RUNS:
            break
        if directory.name == skip:
            continue
        for name, stage in fold(read(directory)).stages.items():
            if stage.state in ("pending", "skipped") or name not in names:
                continue
            done = stage.state in RESULT_STATES
            history.setdefault(name, []).append(
                Past(directory.name, stage.key, stage.components, stage.duration if done else None, stage.state)
            )
            if done:
                unknown.discard(name)
    return history


def _newest_first(runs: Iterable[Path], workflow: str) -> Iterator[Path]:
    found: list[tuple[float, Path]] = []
    for directory in runs:
        try:
            with (directory / FILE_NAME).open("rb") as file:
                first = decode(file.readline().rstrip(b"\n"))
        except FileNotFoundError:  # it has not begun
            continue
        if first is not None and first.get("workflow") == workflow:
            found.append((first.time, directory))
    for _, directory in sorted(found, reverse=True):
        yield directory
