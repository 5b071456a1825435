"""Garbage collection of a store: remove what no run refers to, and the runs that are no longer wanted."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.files import remove_tree, rename, unique_name
from polytrope.pipeline.journal import read
from polytrope.pipeline.runs import run_status
from polytrope.pipeline.store import Store

_QUARANTINE_DAYS = 30
_LIVE = ("running",)


@dataclass
class Collected:
    """What was removed, or with `dry_run` would be. `bytes` counts files."""

    runs: list[str] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)  # staging, scratch, quarantine: relative paths
    bytes: int = 0


def collect_garbage(store: Store, *, keep_runs: int | None = None, dry_run: bool = False) -> Collected:
    """Remove artifacts that no run's journal names, scratch of finished stages, staging of dead ones, old quarantine.

    Args:
        store: the store.
        keep_runs: forget all but the newest so many ended runs first; None keeps every run.
        dry_run: change nothing.

    Raises:
        UserError: a run is going on: it could be about to use what looks unused.
    """
    if store.address != str(store.root):
        raise UserError(
            f"gc works on a store in a directory, not on {store.address}",
            "give the bucket a lifecycle rule, or `polytrope export` what is to stay",
        )
    directories = sorted(
        (path.parent for path in store.runs.glob("*/workflow.json")),
        key=lambda path: (path / "workflow.json").stat().st_mtime,
        reverse=True,
    )
    live = [directory.name for directory in directories if run_status(directory) in _LIVE]
    if live and not dry_run:
        raise UserError(
            f"run {live[0]} is going on in this store",
            f"wait for it, or `polytrope cancel {live[0]}`; `polytrope gc --dry-run` works at any time",
        )
    result = Collected()
    ended = [directory for directory in directories if directory.name not in live]
    forgotten = [] if keep_runs is None else ended[keep_runs:]
    for directory in forgotten:
        result.runs.append(directory.name)
        _remove(store, directory, result, dry_run)
    needed = {
        str(event.get("key"))
        for directory in directories
        if directory not in forgotten
        for event in read(directory)
        if event.get("key")
    }
    for key in store.keys():  # noqa: SIM118  (a store is not a mapping)
        if key not in needed:
            result.artifacts.append(key)
            _remove(store, store.artifacts / key, result, dry_run)
            if not dry_run:
                (store.root / "digests" / f"{key}.json").unlink(missing_ok=True)
    for path in _leftovers(store, needed, bool(live)):
        result.leftovers.append(path.relative_to(store.root).as_posix())
        _remove(store, path, result, dry_run)
    return result


def _leftovers(store: Store, needed: set[str], busy: bool) -> list[Path]:
    """Directories beside artifacts and runs that nobody will look at again."""
    found: list[Path] = []
    if busy:
        return found
    for path in sorted(store.root.glob("staging/*")):
        found.append(path)
    for path in sorted(store.root.glob("scratch/*")):
        if path.name not in needed or store.exists(path.name):
            found.append(path)
    for path in sorted(store.root.glob("quarantine/*")):
        if time.time() - path.stat().st_mtime > _QUARANTINE_DAYS * 86400:
            found.append(path)
    for path in sorted(store.root.glob("trash/*")):
        found.append(path)
    return found


def _remove(store: Store, path: Path, result: Collected, dry_run: bool) -> None:
    """Out of sight by one rename, then deleted: a half-deleted artifact is never seen."""
    result.bytes += _size(path)
    if dry_run:
        return
    trash = store.root / "trash"
    trash.mkdir(exist_ok=True)
    target = trash / unique_name()
    rename(path, target)
    remove_tree(target)


def _size(path: Path) -> int:
    return sum(os.lstat(os.path.join(root, name)).st_size for root, _, files in os.walk(path) for name in files)
