"""What several commands share: opening the store, finding a run, printing tables and JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.store.store import Store, store_error
from polytrope.pipeline.support.terminal import coloured, columns, table, wrapped
from polytrope.pipeline.support.text import suggest
from polytrope.pipeline.workflow.spec import Workflow, load_workflow

DEFAULT_STORE = ".polytrope"


def workflow_of(options: argparse.Namespace) -> Workflow:
    """The workflow file with `--set`, `--executor` and the other options applied."""
    overrides = list(options.overrides)
    for name in ("executor", "ray_address", "concurrency"):
        value = getattr(options, name, None)
        if value is not None:
            overrides.append(f"{name}={json.dumps(value)}")
    if getattr(options, "keep_going", False):
        overrides.append("fail_fast=false")
    if getattr(options, "no_tracking", False):
        overrides.append("tracking.enabled=false")
    return load_workflow(options.workflow, overrides)


def store_address(options: argparse.Namespace, workflow: Workflow | None = None) -> str:
    """`--store`, else what the workflow says, else $POLYTROPE_STORE, else `.polytrope`."""
    if options.store is not None:
        return str(options.store)
    if workflow is not None and "store" in workflow.model_fields_set:
        return workflow.store
    return os.environ.get("POLYTROPE_STORE", DEFAULT_STORE)


def print_json(value: Any) -> None:
    """As people read it; escaped where stdout cannot show it, for programs take a `?` for what is there."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2, default=str)
    print(text)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Left-aligned columns, on a terminal folded to its width and coloured by state."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    print(*table(cells, columns(sys.stdout), coloured(sys.stdout)), sep="\n")


def say(text: str) -> None:
    """Lines for a person, on a terminal folded to its width."""
    print(wrapped(text, columns(sys.stdout)))


def open_store(options: argparse.Namespace, workflow: Workflow | None = None) -> Store:
    """The store a command works on; nothing is created in it."""
    store = Store(store_address(options, workflow))
    try:
        store.pull_runs()
    except OSError as error:
        raise store_error(store.address, error) from error
    return store


def find_run(store: Store, text: str | None) -> Path:
    """The directory of the run whose id is, or starts with, `text`; without `text` the newest run."""
    directories = store.run_directories()
    if not directories:
        raise UserError(
            f"there are no runs in {store.address}", "`polytrope run WORKFLOW` makes one; `--store DIR` looks elsewhere"
        )
    if text is None:
        return directories[0]
    exact = [directory for directory in directories if directory.name == text]
    matching = exact or [directory for directory in directories if text and directory.name.startswith(text)]
    if len(matching) == 1:
        return matching[0]
    names = [directory.name for directory in matching or directories]
    if matching:
        raise UserError(f"`{text}` is the start of {len(matching)} runs", "one of " + ", ".join(names[:5]))
    raise UserError(f"there is no run `{text}` in {store.address}", suggest(text, names[:20]))


def read_run_file(directory: Path) -> dict[str, Any]:
    """`workflow.json` of a run: resolved workflow, arguments, environment record."""
    try:
        data = json.loads((directory / "workflow.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"run {directory.name}: workflow.json cannot be read: {error}") from None
    return data if isinstance(data, dict) else {}
