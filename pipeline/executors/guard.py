"""Ends what is left of a private Ray cluster: Ray 2.60 leaves its agents when the driver or the raylet is killed.

Started by the Ray executor as `python -m polytrope.pipeline.executors.guard DRIVER_PID`, with a pipe from the driver as
stdin. It keeps a list of the driver's Ray processes and their descendants. When the pipe closes it kills them at once;
after a goodbye (Ray was shut down) it kills only those that do not end by themselves. Linux only (it reads /proc).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

_INTERVAL = 1.0  # seconds between two looks
_PATIENCE = 3.0  # seconds that processes of a cluster that was shut down may take to end
GOODBYE = b"."


def main() -> None:
    driver = int(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    known: dict[int, str] = {}
    while True:
        _look(driver, known)
        ready, _, _ = select.select([0], [], [], _INTERVAL)
        if ready:
            break
    _look(driver, known)
    if os.read(0, 1) == GOODBYE:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and _living(known):
            time.sleep(0.05)
        if not _living(known):
            return
    for _ in range(2):  # once more: what was just being started
        for pid in _living(known):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        _look(driver, known)


def _living(known: dict[int, str]) -> list[int]:
    return [pid for pid, start in known.items() if _start_time(pid) == start]


def _look(driver: int, known: dict[int, str]) -> None:
    """Add the driver's Ray processes, and all descendants of known ones, to `known` (process → start time)."""
    rows: dict[int, tuple[int, str]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                rows[int(name)] = (int(fields[1]), fields[19])
    for pid, (parent, start) in rows.items():
        if parent == driver and pid not in known and _is_ray(pid):
            known[pid] = start
    found = True
    while found:
        found = False
        for pid, (parent, start) in rows.items():
            if pid not in known and parent in known and rows.get(parent, (0, ""))[1] == known[parent]:
                known[pid] = start
                found = True
    for pid in [pid for pid, start in known.items() if rows.get(pid, (0, ""))[1] != start]:
        del known[pid]


def _is_ray(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(b"/ray/" in part for part in command[:4]) or command[0].startswith(b"ray::")


def _start_time(pid: int) -> str:
    """Clock ticks at which a process started; nothing if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


if __name__ == "__main__":
    main()
