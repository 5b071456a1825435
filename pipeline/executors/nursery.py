"""The process that forks the local executor's stages: started once per run, small, so that a stage costs a fork.

It is the parent of all stage processes: it learns their exit status, sees the end of the driver (its socket closes) and
then kills every stage with everything that stage started. Orphans of a stage come back to it (subreaper) and are killed
with the stage's session. Started as `python -m polytrope.pipeline.executors.nursery SOCKET`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import select
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from polytrope.pipeline.worker import Outcome, StageTask, dump, is_light, load_task, output_to, preload, run_task

_LIGHT, _HEAVY = b"l", b"h"  # first byte of what a stage's process sends: whether its imports may precede a fork
GRACE = 3.0  # seconds between SIGTERM and SIGKILL
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36


@dataclass
class Child:
    """A stage process and what arrived through its pipe so far."""

    identifier: int
    pid: int
    pipe: int
    task: bytes
    data: bytearray = field(default_factory=bytearray)
    kill_at: float | None = None


def prctl(option: int, value: int) -> None:
    """Linux process control; elsewhere nothing (a killed driver is then noticed by its closed socket only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def main() -> None:
    driver = Connection(int(sys.argv[1]))
    prctl(_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the driver decides
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    gc.freeze()
    children: dict[int, Child] = {}
    loaded: set[str] = set()
    try:
        while True:
            pipes = {child.pipe: child for child in children.values()}
            deadlines = [child.kill_at for child in children.values() if child.kill_at is not None]
            timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            ready, _, _ = select.select([driver.fileno(), read_end, *pipes], [], [], timeout)
            for descriptor in ready:
                if descriptor in pipes:
                    _receive(pipes[descriptor])
            if read_end in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(read_end, 4096)
            _reap(driver, children, loaded)
            for child in children.values():
                if child.kill_at is not None and time.monotonic() >= child.kill_at:
                    child.kill_at = None
                    kill_tree(child.pid, signal.SIGKILL)
            if driver.fileno() in ready and not _command(driver, children, (read_end, write_end)):
                return
    except (BrokenPipeError, ConnectionResetError):
        return  # the driver is gone
    finally:
        for child in children.values():
            kill_tree(child.pid, signal.SIGKILL)
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _command(driver: Connection, children: dict[int, Child], private: tuple[int, int]) -> bool:
    """Follow one command of the driver; False: it is gone."""
    try:
        kind, value = pickle.loads(driver.recv_bytes())
    except (EOFError, ConnectionResetError):
        return False
    if kind == "run":
        identifier, data = value
        child = _fork(identifier, data, driver, children, private)
        children[child.pid] = child
        driver.send_bytes(dump(("started", identifier, child.pid, None)))
    elif kind == "cancel":
        for child in children.values():
            if child.identifier == value and child.kill_at is None:
                child.kill_at = time.monotonic() + GRACE
                kill_tree(child.pid, signal.SIGTERM)
    return True


def _fork(
    identifier: int, data: bytes, driver: Connection, children: dict[int, Child], private: tuple[int, int]
) -> Child:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_end)
        os.set_blocking(read_end, False)
        return Child(identifier, pid, read_end, data)
    status = 1
    try:
        os.setsid()
        prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        driver.close()
        for descriptor in (*private, read_end, *(child.pipe for child in children.values())):
            os.close(descriptor)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        outcome = dump(_run(data))
        _send(write_end, (_LIGHT if is_light() else _HEAVY) + outcome)
        status = 0
    finally:
        os._exit(status)


def _run(data: bytes) -> Outcome:
    task: StageTask = load_task(data)
    with output_to(task.log):
        return run_task(task)


def _send(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _receive(child: Child) -> bool:
    """Read what is there; False at the end of the pipe."""
    while True:
        try:
            block = os.read(child.pipe, 1 << 16)
        except BlockingIOError:
            return True
        if not block:
            return False
        child.data += block


def _reap(driver: Connection, children: dict[int, Child], loaded: set[str]) -> None:
    """Collect ended children; report those that are stages; end what a stage left running."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        child = children.pop(pid, None)
        if child is None:
            continue  # an orphan of a stage
        _receive(child)
        os.close(child.pipe)
        kill_session(pid)
        driver.send_bytes(dump(("ended", child.identifier, status, bytes(child.data[1:]))))
        if child.data[:1] == _LIGHT:
            _preload(child.task, loaded)


def _preload(data: bytes, loaded: set[str]) -> None:
    """Load a small stage that was seen to work, so that its next fork need not: most of the price of a small stage."""
    with contextlib.suppress(Exception):  # then every fork loads it by itself, and tells what is wrong
        task = load_task(data)
        if task.uses not in loaded:
            loaded.add(task.uses)
            preload(task)
            gc.freeze()


def _table() -> list[tuple[int, int, int]]:
    """(process, parent, session) of every process, from /proc."""
    rows = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                rows.append((int(name), int(fields[1]), int(fields[3])))
    return rows


def _descendants(root: int) -> list[int]:
    rows = _table()
    found: list[int] = []
    level = {root}
    while level:
        level = {pid for pid, parent, _ in rows if parent in level and pid not in found}
        found.extend(level)
    return found


def kill_tree(pid: int, number: int) -> None:
    """Signal a stage's process group and all its descendants, those in sessions of their own too."""
    members = _descendants(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
    for member in members:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(member, number)


def kill_session(session: int) -> None:
    """Kill what is left of an ended stage: everything in the session it led."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(session, signal.SIGKILL)
    if _has_children():  # processes that left the group came back to the nursery as orphans
        for pid in [pid for pid, _, found in _table() if found == session]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _has_children() -> bool:
    """Whether this process has any child; one read where the kernel lists them."""
    try:
        return bool(Path(f"/proc/self/task/{os.getpid()}/children").read_text())
    except OSError:
        return True


if __name__ == "__main__":
    main()
