"""Garbage collection of a store: remove what no run and no alias refers to, and runs that are no longer wanted."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.runs.lease import is_alive
from polytrope.pipeline.store.aliases import read_aliases
from polytrope.pipeline.store.store import Store, store_error

_QUARANTINE_DAYS = 30
_MOVED = re.compile(r"\.(\d{8}-\d{6})-")


@dataclass
class Collected:
    """What was removed, or with `dry_run` would be. `bytes` counts files."""

    runs: list[str] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)  # staging, scratch, quarantine: relative names
    bytes: int = 0


def collect_garbage(store: Store, *, keep_runs: int | None = None, dry_run: bool = False) -> Collected:
    """Remove artifacts that no run or alias names, scratch of finished stages, staging of dead ones, old quarantine.

    Args:
        store: the store; of one on S3 the runs must have been pulled.
        keep_runs: forget all but the newest so many ended runs first; None keeps every run.
        dry_run: change nothing.

    Raises:
        UserError: a run is going on: it could be about to use what looks unused. Or the store broke.
    """
    if keep_runs is not None and keep_runs < 0:
        raise UserError(f"--keep-runs {keep_runs}: it is a number of runs", "0 forgets all that ended")
    try:
        return _collect(store, keep_runs, dry_run)
    except OSError as error:
        raise store_error(store.address, error) from error


def _collect(store: Store, keep_runs: int | None, dry_run: bool) -> Collected:
    directories = sorted(
        (path.parent for path in store.runs.glob("*/workflow.json")),
        key=lambda path: (path / "workflow.json").stat().st_mtime,
        reverse=True,
    )
    live = [directory.name for directory in directories if _is_live(store, directory)]
    if live and not dry_run:
        raise UserError(
            f"run {live[0]} is going on in this store",
            f"wait for it, or `polytrope cancel {live[0]}`; `polytrope gc --dry-run` works at any time",
        )
    result = Collected()
    ended = [directory for directory in directories if directory.name not in live]
    forgotten = [] if keep_runs is None else ended[keep_runs:]
    needed = {
        str(event.get("key"))
        for directory in directories
        if directory not in forgotten
        for event in read(directory)
        if event.get("key")
    }
    named = {alias.key for alias in read_aliases(store).values()}
    needed.update(named)
    result.runs = [directory.name for directory in forgotten]
    result.artifacts = [key for key in store.keys() if key not in needed]  # noqa: SIM118  (a store is not a mapping)
    result.leftovers = [] if live else _leftovers(store, needed, named, set(result.artifacts))
    names = [f"runs/{name}" for name in result.runs] + [f"artifacts/{key}" for key in result.artifacts]
    for name in (*names, *result.leftovers):
        result.bytes += store.size_of(name)
        if not dry_run:
            store.remove(name)
    return result


def _is_live(store: Store, directory: Path) -> bool:
    """Whether a driver is behind the run, on whatever host."""
    return not fold(read(directory)).done and is_alive(store.run_lease_directory(directory.name))


def _leftovers(store: Store, needed: set[str], named: set[str], unused: set[str]) -> list[str]:
    """Names beside artifacts and runs that nobody will look at again."""
    found = [f"staging/{name}" for name in store.names("staging")]
    found += [name for name in store.uncommitted() if name.split("/")[1] not in unused]
    found += [f"scratch/{key}" for key in store.names("scratch") if key not in needed or store.exists(key)]
    old = [name for name in store.names("quarantine") if _is_old(name)]  # what an alias named may be among them
    found += [f"quarantine/{name}" for name in old if name.partition(".")[0] not in named]
    return found + [f"trash/{name}" for name in store.names("trash")]


def _is_old(name: str) -> bool:
    """Whether what is in quarantine under this name was put there long ago."""
    match = _MOVED.search(name)
    if match is None:
        return False
    moved = time.mktime(time.strptime(match.group(1), "%Y%m%d-%H%M%S"))
    return time.time() - moved > _QUARANTINE_DAYS * 86400
