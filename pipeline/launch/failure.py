"""What is said of a run that did not succeed: what failed and why, where, and the command that goes on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytrope.pipeline.runs.journal import RunState, StageState
from polytrope.pipeline.runs.record import changed_workflow_files
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.text import command, complete_commands
from polytrope.pipeline.workflow.code import Code, Finder, find_file
from polytrope.pipeline.workflow.loaded import edited_files

_FINISHED = ("succeeded", "cached")


def failure_lines(state: RunState, directory: Path, store: Store) -> list[str]:
    """A block per failed stage: `STAGE failed: why`, then file:line, hint, log."""
    lines = []
    for stage in state.stages.values():
        if stage.state != "failed":
            continue
        error = stage.error or {}
        lines.append(f"{stage.name} failed: {str(error.get('message', '')).strip()}")
        if place := error.get("place"):
            lines.append(f"  at {place}")
        if hint := error.get("hint"):
            lines.append(f"  → {complete_commands(hint, store.address, directory.name)}")
        if stage.log:
            lines.append(f"  log: {directory / stage.log}")
    return lines


def way_on(state: RunState, directory: Path, store: Store) -> list[str]:
    """The command that goes on with a run, by what was edited since; the first line is the one that fits now.

    `polytrope resume` goes on with the workflow as the run recorded it: an edited file needs a new run, which takes
    over every result that still fits.
    """
    record = read_record(directory)
    again = command("resume", directory.name, store=store.address)
    anew = run_command(record, store)
    name = os.path.basename(record.get("source") or "")
    changed = changed_workflow_files(record.get("files") or {})
    if anew is not None and changed:
        return [
            f"go on: {anew}",
            f"  {os.path.basename(changed[0])} was edited since; it was run as it was before, and so would a resume",
        ]
    edited = edited_code(state, store, record.get("directory") or "")
    if edited:
        label, stage = next(iter(edited.items()))
        lines = [
            f"go on: {again} --allow-code-change",
            f"  {label} was edited since: `{stage}`, which is finished, is computed again",
        ]
    else:
        lines = [f"go on: {again}"]
    if anew is not None:
        lines.append(f"  after an edit of {name}: {anew}")
    return lines


def edited_code(state: RunState, store: Store, directory: str) -> dict[str, str]:
    """File → finished stage whose key has its content, for those that say something else now.

    Args:
        state: of the run.
        store: has the keys of stages that the run took from there.
        directory: of the workflow file. A file that is found neither there nor on this process's path is not judged.
    """
    stages: dict[str, str] = {}
    files: dict[str, str] = {}
    for stage in state.stages.values():
        for label, digest in _code(stage, store).items() if stage.state in _FINISHED else ():
            stages.setdefault(label, stage.name)
            files.setdefault(label, digest)
    before = list(sys.path)
    sys.path += [path for path in (os.getcwd(), directory) if path and path not in before]
    try:
        finder = Finder()
        found = {label: digest for label, digest in files.items() if find_file(label, finder) is not None}
        return {label: stages[label] for label in edited_files(Code(found, dict.fromkeys(found, "")))}
    finally:
        sys.path[:] = before


def _code(stage: StageState, store: Store) -> dict[str, str]:
    components = stage.components
    if components is None and stage.key is not None:
        artifact = store.load(stage.key)
        components = None if artifact is None else artifact.components
    return dict((components or {}).get("code") or {})


def read_record(directory: Path) -> dict[str, Any]:
    """`workflow.json` of a run; {} if it is damaged."""
    try:
        record = json.loads((directory / "workflow.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def run_command(record: Mapping[str, Any], store: Store) -> str | None:
    """`polytrope run` with the file and options of the run; None: it was made in Python."""
    source = record.get("source")
    if not source or not os.path.exists(source):
        return None
    relative = os.path.relpath(source)
    words = ["run", source if relative.startswith("..") else relative]
    for override in record.get("overrides") or []:
        words += ["--set", override]
    return command(*words, *(record.get("run_options") or []), store=store.address)
