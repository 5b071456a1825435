"""Ends what is left of a private Ray cluster: Ray 2.60 leaves its agents when the driver or the raylet is killed.

Started by the Ray executor as `python -m polytrope.pipeline.executors.guard DRIVER_PID`, with a pipe from the driver as
stdin. It keeps a list of the driver's Ray processes and their descendants. When the pipe closes it kills them at once;
after a goodbye (Ray was shut down) it kills only those that do not end by themselves.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

import psutil

_INTERVAL = 1.0  # seconds between two looks
_PATIENCE = 3.0  # seconds that processes of a cluster that was shut down may take to end
GOODBYE = b"."


def main() -> None:
    driver = int(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    known: set[psutil.Process] = set()
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
        for process in _living(known):
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.2)
        _look(driver, known)


def _living(known: set[psutil.Process]) -> list[psutil.Process]:
    living = []
    for process in known:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def _look(driver: int, known: set[psutil.Process]) -> None:
    """Add the driver's Ray processes, and all descendants of known ones, to `known`; forget those that are gone."""
    processes = {process.pid: process for process in psutil.process_iter()}
    children: dict[int, list[psutil.Process]] = {}
    for process in processes.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            children.setdefault(process.ppid(), []).append(process)
    known.intersection_update(processes.values())
    known.update(process for process in children.get(driver, []) if process in known or _is_ray(process))
    parents = list(known)
    while parents:
        further = [child for parent in parents for child in children.get(parent.pid, []) if child not in known]
        known.update(further)
        parents = further


def _is_ray(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return any("/ray/" in part for part in command[:4]) or "".join(command[:1]).startswith("ray::")


if __name__ == "__main__":
    main()
