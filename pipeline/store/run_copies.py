"""This machine's copies of the runs in a bucket, in the layout of a store on a disk: drivers and stages write there.

runs/RUN/journal/00000001      in the bucket: an object per flush, put if absent: of two drivers one can go on
runs/RUN/journal.jsonl         here: what these objects say together
runs/RUN/workflow.json, logs/, spool/, …     the same in both
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from polytrope.pipeline.runs.journal import FILE_NAME, Journal
from polytrope.pipeline.runs.lease import LeaseLostError
from polytrope.pipeline.store.bucket import Bucket
from polytrope.pipeline.support.files import remove_tree, replace_file

_START_TIME = 600.0  # seconds that a run may take from its directory to its first object
_REFRESH_INTERVAL = 5.0  # seconds between two looks for what others wrote into a run


class RunCopies:
    """Copies of runs below `directory`/runs."""

    def __init__(self, bucket: Bucket, directory: Path) -> None:
        self.bucket, self.directory = bucket, directory
        self._pushed: dict[str, tuple[int, int]] = {}  # local file → (size, time) as uploaded
        self._pulled: dict[str, str] = {}  # object → tag as downloaded, or as uploaded
        self._refreshed = 0.0

    def settle_journal(self, run_id: str) -> list[int]:
        """Drop from a journal what a dead driver wrote and did not flush; returns the numbers of its objects."""
        return self._pull_journal(run_id, exactly=True)

    def open_journal(self, run_id: str, *, fence: int, guard: Callable[[], None]) -> Journal:
        """The journal of a run for writing; every flush is an object that only one driver can put."""
        numbers = self.settle_journal(run_id)
        next_number = (numbers[-1] if numbers else 0) + 1

        def put(data: bytes) -> None:
            nonlocal next_number
            if not self.bucket.put(journal_part(run_id, next_number), data, absent=True):
                raise LeaseLostError(f"the journal of run {run_id} was taken over by another driver")
            next_number += 1

        return Journal.open(self._run(run_id), fence=fence, guard=guard, sink=put)

    def _pull_journal(self, run_id: str, *, exactly: bool = False) -> list[int]:
        """Bring the copy of a journal up to date; returns the numbers of its objects.

        Args:
            run_id: the run.
            exactly: drop what only the copy has: a driver died before it was flushed.
        """
        names = list(self.bucket.list(f"runs/{run_id}/journal"))
        path = self._run(run_id) / FILE_NAME
        parts = self._run(run_id) / ".journal"
        self.bucket.fetch([(name, target) for name in names if not (target := parts / Path(name).name).exists()])
        data = b"".join((parts / Path(name).name).read_bytes() for name in names)
        local = path.read_bytes() if path.exists() else b""
        if local != data if exactly else not local.startswith(data):
            replace_file(path, data)
        return [int(Path(name).name) for name in names]

    def pull(self, run_id: str) -> None:
        """Copy what the bucket knows of a run and this machine does not."""
        self._pull(f"runs/{run_id}")
        if self._run(run_id).is_dir():
            self._pull_journal(run_id)

    def pull_all(self) -> None:
        """The same for all runs; one that was collected on another machine goes here too."""
        found = self._pull("runs")
        for run_id in found:
            self._pull_journal(run_id)
        for directory in self._run("").iterdir() if self._run("").is_dir() else ():
            if directory.name not in found and time.time() - directory.stat().st_mtime > _START_TIME:
                remove_tree(directory)

    def _pull(self, prefix: str) -> set[str]:
        """Copy the changed files of runs except their journals; returns the ids of all runs that were listed."""
        wanted, runs = [], set()
        for name, info in self.bucket.list(prefix).items():
            run_id, _, rest = name.removeprefix("runs/").partition("/")
            runs.add(run_id)
            path = self.directory / name
            if rest.startswith("journal/"):
                continue
            if path.exists():
                if self._pulled.get(name) == info.tag or _mark(path) == (info.size, _nanoseconds(info.modified)):
                    continue
                if path.stat().st_size >= info.size and rest.startswith(("logs/", "spool/")):
                    continue  # written here, and further than what was uploaded
            wanted.append((name, path, info))
        for name, path, info in wanted:
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                self.bucket.fetch([(name, path)])
                os.utime(path, ns=(_nanoseconds(info.modified),) * 2)  # runs are sorted by these times
                self._pulled[name] = info.tag
                self._pushed[str(path)] = _mark(path)  # what came from there need not go back
        return runs

    def push(self, run_id: str) -> None:
        """Upload what changed in a run's directory here: its record, logs and metrics; and forget what is gone."""
        directory = self._run(run_id)
        changed = {}
        for path in directory.rglob("*"):
            relative = path.relative_to(directory)
            if relative.parts[0].startswith((".", "journal.", "lease-")) or path.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and self._pushed.get(str(path)) != (mark := _mark(path)):
                    changed[path] = f"runs/{run_id}/{relative.as_posix()}", mark
        self._pulled.update(self.bucket.send((path, name) for path, (name, _) in changed.items()))
        self._pushed.update({str(path): mark for path, (_, mark) in changed.items()})
        gone = [Path(name) for name in self._pushed if name.startswith(f"{directory}/") and not os.path.exists(name)]
        self.bucket.delete(path.relative_to(self.directory).as_posix() for path in gone)
        for path in gone:
            del self._pushed[str(path)]

    def refresh(self, run_id: str) -> None:
        """From time to time, for the driver: upload logs and metrics, see what workers and `cancel` wrote."""
        if time.monotonic() - self._refreshed < _REFRESH_INTERVAL:
            return
        self._refreshed = time.monotonic()
        self.push(run_id)
        self._pull(f"runs/{run_id}")

    def _run(self, run_id: str) -> Path:
        return self.directory / "runs" / run_id


def journal_part(run_id: str, number: int) -> str:
    """The object that holds one flush of a journal."""
    return f"runs/{run_id}/journal/{number:08d}"


def _mark(path: Path) -> tuple[int, int]:
    """Changes when the file does."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
