"""The process that forks the local executor's stages: started once per run, small, so that a stage costs a fork.

It is the parent of all stage processes: it learns their exit status, sees the end of the driver (its socket closes) and
then kills every stage with everything that stage started. Orphans of a stage come back to it (subreaper) and are killed
with the stage's session. A process whose stage left no trace in it (see `traces`) waits for the next stage whose
function was seen to leave none, since a fork is most of the price of a small stage; every other ends with its stage.
Started as `python -m polytrope.pipeline.executors.nursery SOCKET`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Collection, Container
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from polytrope.pipeline.executors.traces import differences, process_state, resident_memory
from polytrope.pipeline.executors.worker import (
    Outcome,
    StageTask,
    dump,
    is_light,
    load_task,
    output_to,
    preload,
    run_task,
)

# First byte of what a stage's process sends. It waits for another stage; it ends, but what it imported may be imported
# before a fork; or not even that.
_CLEAN, _LIGHT, _HEAVY = b"c", b"l", b"h"
_LENGTH = struct.Struct("<Q")  # of what follows
_FRAME = struct.Struct("!i")  # the same in the protocol of `multiprocessing.connection`
_SMALL = 1 << 16  # bytes of a task that surely fit into a channel; a larger one goes with a fork
GRACE = 3.0  # seconds between SIGTERM and SIGKILL
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36


@dataclass
class Child:
    """A stage process and what arrived from it so far. `identifier`: of its stage, None while it waits for one."""

    identifier: int | None
    pid: int
    channel: socket.socket
    uses: str
    task: bytes
    data: bytearray = field(default_factory=bytearray)
    kill_at: float | None = None  # a cancelled one's end by force; infinite when that was done


@dataclass
class Known:
    """What this process knows of modules and stage functions.

    Args:
        modules: its own.
        loaded: stage functions loaded here, so that a fork need not.
        clean: stage functions that left no trace in their process.
    """

    modules: frozenset[str]
    loaded: set[str] = field(default_factory=set)
    clean: set[str] = field(default_factory=set)


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
    outbox = bytearray()  # to the driver, which may be writing itself: neither waits for the other to read
    known = Known(frozenset(sys.modules))
    try:
        while True:
            channels = {child.channel.fileno(): child for child in children.values()}
            deadline = min(
                (child.kill_at for child in children.values() if child.kill_at is not None), default=math.inf
            )
            timeout = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
            full = [driver.fileno()] if outbox else []
            ready, _, _ = select.select([driver.fileno(), read_end, *channels], full, [], timeout)
            for descriptor in ready:
                if descriptor in channels:
                    _receive(channels[descriptor])
                    _continue(outbox, channels[descriptor], children, known)
            if read_end in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(read_end, 4096)
                _reap(outbox, children, known)
            for child in children.values():
                if child.kill_at is not None and time.monotonic() >= child.kill_at:
                    child.kill_at = math.inf
                    kill_tree(child.pid, signal.SIGKILL)
            if driver.fileno() in ready and not _command(driver, outbox, children, (read_end, write_end), known):
                return
            _post(driver, outbox)
    except (BrokenPipeError, ConnectionResetError):
        return  # the driver is gone
    finally:
        for child in children.values():
            kill_tree(child.pid, signal.SIGKILL)
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _report(outbox: bytearray, kind: str, identifier: int, value: int, data: bytes | None) -> None:
    message = dump((kind, identifier, value, data))
    outbox += _FRAME.pack(len(message)) + message


def _post(driver: Connection, outbox: bytearray) -> None:
    """Send as much as the driver's end takes at once."""
    with socket.socket(fileno=os.dup(driver.fileno())) as channel, contextlib.suppress(BlockingIOError):
        while outbox:
            del outbox[: channel.send(outbox, socket.MSG_DONTWAIT)]


def _command(
    driver: Connection, outbox: bytearray, children: dict[int, Child], private: tuple[int, int], known: Known
) -> bool:
    """Follow one command of the driver; False: it is gone."""
    try:
        kind, value = pickle.loads(driver.recv_bytes())
    except (EOFError, ConnectionResetError):
        return False
    if kind == "run":
        identifier, uses, data = value
        child = None
        if uses not in known.clean:
            _dismiss(children)
        elif len(data) < _SMALL:
            child = _give(identifier, uses, data, children)
        if child is None:
            child = _fork(identifier, uses, data, driver, children, private, known)
            children[child.pid] = child
        _report(outbox, "started", identifier, child.pid, None)
    elif kind == "cancel":
        for child in children.values():
            if child.identifier == value and child.kill_at is None:
                child.kill_at = time.monotonic() + GRACE
                kill_tree(child.pid, signal.SIGTERM)
    return True


def _give(identifier: int, uses: str, data: bytes, children: dict[int, Child]) -> Child | None:
    """Hand a task to a process that waits, if there is one."""
    for child in children.values():
        if child.identifier is None:
            try:
                child.channel.sendall(_LENGTH.pack(len(data)) + data)
            except OSError:  # it was killed, or its channel is full: `_reap` will find it
                kill_tree(child.pid, signal.SIGKILL)
                continue
            child.identifier, child.uses, child.task = identifier, uses, data
            return child
    return None


def _dismiss(children: dict[int, Child]) -> None:
    """End the processes that wait, lest they hold memory beside a stage that may need it."""
    for child in children.values():
        if child.identifier is None:
            with contextlib.suppress(OSError):
                child.channel.shutdown(socket.SHUT_WR)


def _fork(
    identifier: int,
    uses: str,
    data: bytes,
    driver: Connection,
    children: dict[int, Child],
    private: tuple[int, int],
    known: Known,
) -> Child:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        ours.setblocking(False)
        return Child(identifier, pid, ours, uses, data)
    status = 1
    try:
        os.setsid()
        prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        driver.close()
        for channel in (ours, *(child.channel for child in children.values())):
            channel.close()
        for descriptor in private:
            os.close(descriptor)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        _serve(theirs, data, known.modules)
        status = 0
    finally:
        os._exit(status)


def _serve(channel: socket.socket, data: bytes, modules: Collection[str]) -> None:
    """Run the task; then others, as long as each leaves this process as it was."""
    before, memory = process_state(modules), resident_memory()
    while data:
        outcome = _run(data)
        kind = _LIGHT if is_light() else _HEAVY
        if kind == _LIGHT and outcome.error is None and not differences(before, process_state(modules), memory):
            kind = _CLEAN
        channel.sendall(kind + _LENGTH.pack(len(body := dump(outcome))) + body)
        data = _next_task(channel) if kind == _CLEAN else b""


def _next_task(channel: socket.socket) -> bytes:
    """Empty: there is none, the nursery has ended."""
    data, length = b"", _LENGTH.size
    while len(data) < length:
        block = channel.recv(length - len(data))
        if not block:
            return b""
        data += block
        if len(data) == _LENGTH.size == length:
            length += _LENGTH.unpack(data)[0]
    return data[_LENGTH.size :]


def _run(data: bytes) -> Outcome:
    task: StageTask = load_task(data)
    with output_to(task.log):
        return run_task(task)


def _receive(child: Child) -> None:
    """Read what is there."""
    with contextlib.suppress(BlockingIOError, ConnectionResetError):
        while block := child.channel.recv(1 << 16):
            child.data += block


def _outcome(child: Child) -> bytes:
    """What the process sent of its stage; empty until that is complete."""
    start = 1 + _LENGTH.size
    if len(child.data) < start or len(child.data) < start + _LENGTH.unpack_from(child.data, 1)[0]:
        return b""
    return bytes(child.data[start:])


def _continue(outbox: bytearray, child: Child, children: dict[int, Child], known: Known) -> None:
    """If the stage is complete and its process waits for another, report the one and keep the other."""
    if child.data[:1] != _CLEAN or not (outcome := _outcome(child)):
        return
    if child.kill_at is not None:  # cancelled meanwhile: `_reap` reports it
        kill_tree(child.pid, signal.SIGKILL)
        return
    _kill_orphans(child.pid, children)
    assert child.identifier is not None
    _report(outbox, "ended", child.identifier, 0, outcome)
    known.clean.add(child.uses)
    child.identifier = None
    child.data.clear()


def _reap(outbox: bytearray, children: dict[int, Child], known: Known) -> None:
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
        child.channel.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        _kill_orphans(pid, children)
        if child.identifier is not None:
            _report(outbox, "ended", child.identifier, status, _outcome(child))
        if child.data[:1] == _LIGHT:
            _preload(child.task, known.loaded)


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


def _kill_orphans(session: int, children: Container[int]) -> None:
    """Kill what a stage left in the session of its process: it came back to the nursery, which did not fork it."""
    try:
        found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if all(int(pid) in children for pid in found):
            return
    except OSError:  # a kernel that does not list children
        pass
    for pid in [pid for pid, _, found in _table() if found == session and pid != session]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
