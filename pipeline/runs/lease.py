"""Leases: at most one process at a time drives a run or computes a key, on one host or on many that share a directory.

A lease is a file `lease-NUMBER` in a directory; the highest number holds. Files are created with `link`, which is
atomic on NFS as well, and only their creator ever rewrites them. The number is the fencing token: whoever finds a
higher one has lost the lease, and must not commit any more (`Lease.check`).

A holder renews its file by a heartbeat. It is taken for dead when its process is gone (same host) or when its heartbeat
stood still for `ttl` seconds *as watched here*: clocks of different hosts are never compared, and a clock that jumps
does no harm. A key's lease has no heartbeat of its own: it points to the lease of the run that holds it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import threading
import time
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from polytrope.pipeline.support.files import create_file, is_disk_full, replace_file, unique_name

DEFAULT_TTL = 15.0  # seconds
_KEPT = 3  # older numbers that stay, so that a slow contender sees them
_FILE = re.compile(r"lease-(\d+)")


class LeasePlace(Protocol):
    """Where the files of one lease are; `create` writes only what does not exist."""

    def names(self) -> list[str]:
        """Names that start with `lease-`, and maybe others."""

    def read(self, name: str) -> bytes | None:
        """The content of a file, None if there is none."""

    def create(self, name: str, data: bytes) -> bool:
        """False if there is such a file, or if the place went away in this moment."""

    def replace(self, name: str, data: bytes) -> None: ...

    def remove(self, name: str) -> None:
        """Nothing happens if there is no such file."""

    def drop(self) -> None:
        """Remove the place itself if it is empty."""

    def __truediv__(self, name: str) -> LeasePlace: ...


@dataclass(frozen=True)
class LeaseDirectory:
    """A place for a lease: a directory, made when it is needed (but not those above it: they may have been moved)."""

    path: Path

    def __truediv__(self, name: str) -> LeaseDirectory:
        return LeaseDirectory(self.path / name)

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS: replaced in this very moment
                raise
            return None

    def create(self, name: str, data: bytes) -> bool:
        try:
            self.path.mkdir(exist_ok=True)
        except FileExistsError:
            if self.path.exists() and not self.path.is_dir():
                raise
            return False  # removed, and maybe made again, by other contenders in this very moment
        try:
            return create_file(self.path / name, data, durable=False)
        except FileNotFoundError:  # the directory was removed by a holder that released it
            return False
        except OSError:  # the disk is full: nothing of this try stays
            self.drop()
            raise

    def replace(self, name: str, data: bytes) -> None:
        replace_file(self.path / name, data, durable=False)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def drop(self) -> None:
        with contextlib.suppress(OSError):  # another contender is already in it
            self.path.rmdir()


def _place(directory: LeasePlace | Path) -> LeasePlace:
    return LeaseDirectory(directory) if isinstance(directory, Path) else directory


class LeaseLostError(RuntimeError):
    """Another process took the lease over; this one must stop without committing anything."""


class LeaseHeldError(RuntimeError):
    """Somebody else holds the lease. `holder` tells who."""

    def __init__(self, holder: LeaseRecord) -> None:
        super().__init__(f"held by {holder.describe()}")
        self.holder = holder


@dataclass(frozen=True)
class LeaseRecord:
    """What a lease file says. `beat` counts heartbeats; `via` is the run directory whose lease vouches for this one."""

    number: int
    owner: str
    token: str
    host: str
    process: str
    pid: int
    beat: int
    renewed: float
    ttl: float
    released: bool = False
    via: str | None = None
    via_token: str = ""

    def describe(self) -> str:
        return f"{self.owner} (process {self.pid} on {self.host})"


Liveness = Literal["free", "dead", "alive", "unknown"]


@cache
def _machine() -> str:
    """Names this boot of this machine and this process namespace: only there can a process id be looked up."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            parts.append(
                os.readlink(path) if path.endswith("ns/pid") else Path(path).read_text(encoding="utf-8").strip()
            )
    return "/".join(parts)


def _process_start(pid: int, processes: Path = Path("/proc")) -> str | None:
    """Start time of a process in clock ticks, None if there is no such process (or it is a zombie).

    "" if that cannot be known: no /proc, or one that hides the processes of other users (`hidepid`).
    """
    try:
        fields = (processes / str(pid) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return ""


@cache
def _own_identity(pid: int) -> str:
    return f"{_machine()} {pid} {_process_start(pid)}"


def _process_is_gone(record: LeaseRecord) -> bool:
    """Whether that is certain; else the heartbeat decides."""
    machine, pid, start = record.process.rsplit(" ", 2)
    if machine != _machine():
        return False
    found = _process_start(int(pid))
    return found is None or ("" not in (found, start) and found != start)


def _parse(data: bytes | None) -> LeaseRecord | None:
    """The record in a lease file; None if there is none, or if its bytes are not those written."""
    try:
        fields: dict[str, Any] = json.loads(data or b"")
        checksum = fields.pop("checksum")
        record = LeaseRecord(**fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return record if checksum == _checksum(fields) else None


def _encode(record: LeaseRecord) -> bytes:
    data = vars(record)
    return json.dumps({**data, "checksum": _checksum(data)}).encode()


def _checksum(data: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())


def _name(number: int) -> str:
    return f"lease-{number:06d}"


def _numbers(place: LeasePlace) -> list[int]:
    return sorted(int(match.group(1)) for name in place.names() if (match := _FILE.fullmatch(name)))


def current(directory: LeasePlace | Path) -> LeaseRecord | None:
    """The record of the highest number, None if nobody ever held this lease."""
    place = _place(directory)
    numbers = _numbers(place)
    return _parse(place.read(_name(numbers[-1]))) if numbers else None


def liveness(record: LeaseRecord | None, root: LeasePlace | Path | None = None) -> Liveness:
    """What can be said about a holder at once. `unknown`: its heartbeat must be watched (`Lease.acquire` does).

    Args:
        record: the one with the highest number.
        root: where a relative `via` starts.
    """
    if record is None or record.released:
        return "free"
    if record.via is not None:
        holder = current((root or Path()) / record.via)
        if holder is None or holder.token != record.via_token or holder.released:
            return "dead"
        return liveness(holder)
    if _process_is_gone(record):
        return "dead"
    age = time.time() - record.renewed
    return "alive" if 0 <= age < record.ttl else "unknown"


def is_held(directory: LeasePlace | Path) -> bool:
    """Whether somebody seems to be alive behind this lease (a stopped holder counts as alive for its `ttl`)."""
    return liveness(current(directory)) == "alive"


def is_alive(directory: LeasePlace | Path) -> bool:
    """Like `is_held`, but a holder of whom nothing certain is known (another host) is watched for up to its `ttl`."""
    holder = current(directory)
    state = liveness(holder)
    return state == "alive" or (
        state == "unknown" and holder is not None and not _is_dead(True, _place(directory), holder, None)
    )


class HolderWatch:
    """Watches a holder's heartbeat with this process's own clock, a glance per call."""

    def __init__(self) -> None:
        self._seen: tuple[int, int] | None = None
        self._since = 0.0
        self.moved = False

    def stands_still(self, directory: LeasePlace, holder: LeaseRecord, root: LeasePlace | None = None) -> bool:
        """Whether the heartbeat has not moved for the holder's `ttl` seconds of calls, or its run has let go."""
        now = current((root or Path()) / holder.via) if holder.via is not None else current(directory)
        if now is None or now.released or (holder.via is not None and now.token != holder.via_token):
            return True
        if self._seen != (now.number, now.beat):
            self.moved = self._seen is not None
            self._seen, self._since = (now.number, now.beat), time.monotonic()
        return time.monotonic() - self._since >= now.ttl


class Lease:
    """A lease that this process holds. Make one with `Lease.acquire`."""

    def __init__(self, directory: LeasePlace, record: LeaseRecord) -> None:
        self.directory = directory
        self.record = record
        self._written = _encode(record)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost = False
        self._lock = threading.Lock()

    @property
    def number(self) -> int:
        """The fencing token: grows with every holder of this directory."""
        return self.record.number

    @classmethod
    def acquire(
        cls,
        directory: LeasePlace | Path,
        owner: str,
        ttl: float = DEFAULT_TTL,
        *,
        heartbeat: bool = True,
        watch: bool | HolderWatch = True,
        via: tuple[LeasePlace | Path, str, str] | None = None,
    ) -> Lease:
        """Take the lease, or take it over from a dead holder.

        Args:
            directory: created if need be.
            owner: shown to others, such as `run 20261123-…`.
            ttl: seconds without heartbeat after which others may take over.
            heartbeat: renew in a thread every `ttl / 3` seconds until `release`.
            watch: a holder of whom nothing certain is known is watched for up to `ttl` seconds; a `HolderWatch`: only
                what it saw in earlier calls counts; False: refused at once.
            via: (root, run directory below it, token of its lease) that vouch for this lease instead of a heartbeat.

        Raises:
            LeaseHeldError: the holder is alive, or another process won the race.
        """
        place, root = _place(directory), _place(via[0]) if via else None
        for _ in range(100):
            numbers = _numbers(place)
            data = place.read(_name(numbers[-1])) if numbers else None
            if data is None and numbers:
                continue  # removed since it was listed: others have moved on
            holder = _parse(data)
            state = liveness(holder, root)
            if state == "unknown" and holder is not None and _is_dead(watch, place, holder, root):
                state = "dead"
            if holder is not None and state in ("alive", "unknown"):
                raise LeaseHeldError(holder)
            record = LeaseRecord(
                number=(numbers[-1] if numbers else 0) + 1,
                owner=owner,
                token=unique_name(),
                host=socket.gethostname(),
                process=_own_identity(os.getpid()),
                pid=os.getpid(),
                beat=0,
                renewed=time.time(),
                ttl=ttl,
                via=via[1] if via else None,
                via_token=via[2] if via else "",
            )
            seen = current(place) if numbers else None
            if (seen and seen.token) != (holder and holder.token):
                continue  # somebody moved meanwhile
            if place.create(_name(record.number), _encode(record)) and _numbers(place)[-1:] == [record.number]:
                lease = cls(place, record)
                for number in numbers[: 1 - _KEPT]:
                    place.remove(_name(number))
                if heartbeat and via is None:
                    lease._start_heartbeat()
                return lease
        winner = current(place)
        if winner is None:
            raise OSError(f"cannot create a lease in {place}")
        raise LeaseHeldError(winner)

    def check(self) -> None:
        """Prove from the disk that the lease is still held.

        Raises:
            LeaseLostError: another process took over.
        """
        if self._lost or _numbers(self.directory)[-1:] != [self.number] or not self._is_on_disk():
            self._lost = True
            winner = current(self.directory)
            raise LeaseLostError(
                f"the lease {self.directory} was taken over" + (f" by {winner.describe()}" if winner else "")
            )

    def _is_on_disk(self) -> bool:
        data = self.directory.read(_name(self.number))
        if data == self._written:  # the usual case, without parsing
            return True
        record = _parse(data)
        return record is not None and record.token == self.record.token

    @property
    def lost(self) -> bool:
        try:
            self.check()
        except LeaseLostError:
            return True
        return False

    def release(self, *, remove: bool = False) -> None:
        """Let go, so that others need not wait. `remove`: delete the directory too, if its numbers need not be kept."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.lost:
            return
        if not remove:
            try:
                self._renew(released=True)
                return
            except OSError as error:
                if not is_disk_full(error):
                    raise
        # also where there is no space to say that it is released: no number at all says so too, to every earlier holder
        for number in _numbers(self.directory):
            self.directory.remove(_name(number))
        self.directory.drop()

    def _renew(self, *, released: bool = False) -> None:
        with self._lock:
            record = replace(self.record, beat=self.record.beat + 1, renewed=time.time(), released=released)
            data = _encode(record)  # the file of this number is written by this process only
            self.directory.replace(_name(self.number), data)
            self.record, self._written = record, data

    def _start_heartbeat(self) -> None:
        self._thread = threading.Thread(target=self._beat, name="polytrope-lease", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(self.record.ttl / 3):
            with contextlib.suppress(OSError):  # a full disk must not end a run; `check` decides what may be committed
                if self.lost:
                    return
                self._renew()


def _is_dead(watch: bool | HolderWatch, directory: LeasePlace, holder: LeaseRecord, root: LeasePlace | None) -> bool:
    if isinstance(watch, HolderWatch):
        return watch.stands_still(directory, holder, root)
    patient = HolderWatch()
    deadline = time.monotonic() + holder.ttl * 1.5
    while watch and time.monotonic() < deadline:
        if patient.stands_still(directory, holder, root):
            return True
        if patient.moved:
            return False
        time.sleep(min(0.2, holder.ttl / 20))
    return False
