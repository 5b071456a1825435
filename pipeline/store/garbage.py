"""Garbage collection of a store: remove what no run and no alias refers to, and runs that are no longer wanted.

Whoever collects holds the store's lease: meanwhile no run begins, and nothing is imported or named (`Store.alone`,
`Store.begin_run`). Before every removal the lease is looked at again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import read
from polytrope.pipeline.runs.lease import DEFAULT_TTL, LeaseLostError, is_alive
from polytrope.pipeline.store.aliases import read_aliases
from polytrope.pipeline.store.store import Store, store_error
from polytrope.pipeline.support.faults import fault_point

_QUARANTINE_DAYS = 30
_MOVED = re.compile(r"\.(\d{8}-\d{6})-")


@dataclass
class Collected:
    """What was removed, or with `dry_run` would be. `bytes` counts files."""

    runs: list[str] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)  # staging, scratch, quarantine: relative names
    bytes: int = 0

    @property
    def names(self) -> list[str]:
        """All of them, below the store."""
        return [
            *(f"runs/{name}" for name in self.runs),
            *(f"artifacts/{key}" for key in self.artifacts),
            *self.leftovers,
        ]


def collect_garbage(
    store: Store, *, keep_runs: int | None = None, dry_run: bool = False, lease_ttl: float = DEFAULT_TTL
) -> Collected:
    """Remove artifacts that no run or alias names, scratch of finished stages, staging of dead ones, old quarantine.

    Args:
        store: the store.
        keep_runs: forget all but the newest so many ended runs first; None keeps every run.
        dry_run: change nothing.
        lease_ttl: seconds without a heartbeat after which runs no longer wait for this.

    Raises:
        UserError: a run is going on: it could be about to use what looks unused. Or the store broke, or this process
            stood still for so long that others went on without it: then it removes nothing more.
    """
    if keep_runs is not None and keep_runs < 0:
        raise UserError(f"--keep-runs {keep_runs}: it is a number of runs", "0 forgets all that ended")
    try:
        if not store.present:
            return Collected()
        if dry_run:
            return _find(store, keep_runs, _live_runs(store))
        with store.alone("polytrope gc", lease_ttl) as lease:
            if live := _live_runs(store):
                raise UserError(
                    f"run {live[0]} is going on in this store",
                    f"wait for it, or `polytrope cancel {live[0]}`; `polytrope gc --dry-run` works at any time",
                )
            found = _find(store, keep_runs, [])
            for name in found.names:
                fault_point("before a removal")
                lease.check()
                store.remove(name)
            return found
    except LeaseLostError:
        raise UserError(
            "the collection stood still for too long, and was taken for dead: it was broken off", "repeat it"
        ) from None
    except OSError as error:
        raise store_error(store.address, error) from error


def _find(store: Store, keep_runs: int | None, live: list[str]) -> Collected:
    """What could be removed if nothing else happened."""
    store.pull_runs()
    directories = store.run_directories()
    ended = [directory for directory in directories if directory.name not in live]
    forgotten = [] if keep_runs is None else ended[keep_runs:]
    kept = {directory.name for directory in directories} - {directory.name for directory in forgotten}
    needed = {str(event.get("key")) for name in kept for event in read(store.run_directory(name)) if event.get("key")}
    named = {alias.key for alias in read_aliases(store).values()}
    needed.update(named)
    result = Collected()
    result.runs = [directory.name for directory in forgotten]
    result.artifacts = [key for key in store.keys() if key not in needed]  # noqa: SIM118  (a store is not a mapping)
    result.leftovers = [] if live else _leftovers(store, needed, named, set(result.artifacts))
    result.bytes = sum(store.size_of(name) for name in result.names)
    return result


def _live_runs(store: Store) -> list[str]:
    """Runs behind which there is a driver, on whatever host; also those that have not written a word yet."""
    names = store.names("runs")
    with ThreadPoolExecutor(16) as pool:  # of some nothing certain is known: they are watched for a while
        alive = pool.map(lambda name: is_alive(store.run_lease_directory(name)), names)
        return [name for name, answer in zip(names, alive, strict=True) if answer]


def _leftovers(store: Store, needed: set[str], named: set[str], unused: Iterable[str]) -> list[str]:
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
