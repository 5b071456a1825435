"""The process that starts the local executor's stages: one per run, small, so that a stage costs a fork.

    driver → nursery → keepers → a stage each → whatever it starts

A keeper forks one stage after another; only code of this package runs in it, and small stage functions are imported
there once. Nursery and keepers adopt orphans (`descendants`), so that nothing a stage starts gets out of their sight: a
keeper reports a stage when nothing of it is left, whatever ended it. Keepers end, with all below them, when the nursery
is killed; a stage is killed with its keeper; the nursery ends all of them when the driver's socket closes. Started as
`python -m polytrope.pipeline.executors.nursery SOCKET`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import pickle
import select
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NoReturn

from polytrope.pipeline.executors.descendants import (
    adopt_orphans,
    end_descendants,
    is_log_filter,
    signal_at_parents_end,
    signal_descendants,
)
from polytrope.pipeline.executors.worker import dump, is_light, load_task, preload, run_logged
from polytrope.pipeline.support.files import write_all

GRACE = 3.0  # seconds between SIGTERM and SIGKILL, and for killed processes to be gone
_LIGHT, _HEAVY = b"l", b"h"  # first byte of what a stage leaves: whether what it imported may be imported before a fork
_STATUS = struct.Struct("<i")  # first bytes of what a keeper sends: how the stage's process ended
_FRAME = struct.Struct("!i")  # length of a message in the protocol of `multiprocessing.connection`
_NURSERY_ENDED = signal.SIGUSR2


@dataclass
class Keeper:
    """A keeper, and the task of its stage (None: it waits for one). `kill_at`: a cancelled stage's end by force."""

    pid: int
    channel: Connection
    identifier: int | None = None
    kill_at: float | None = None


def main() -> None:
    driver = Connection(int(sys.argv[1]))
    adopt_orphans()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the driver decides
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    gc.freeze()
    keepers: dict[int, Keeper] = {}
    outbox = bytearray()  # to the driver, which may be writing itself: neither waits for the other to read
    try:
        while True:
            channels = {keeper.channel.fileno(): keeper for keeper in keepers.values()}
            deadline = min((item.kill_at for item in keepers.values() if item.kill_at is not None), default=math.inf)
            timeout = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
            full = [driver.fileno()] if outbox else []
            ready, _, _ = select.select([driver.fileno(), read_end, *channels], full, [], timeout)
            for descriptor in ready:
                if descriptor in channels:
                    _receive(outbox, channels[descriptor])
            if read_end in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(read_end, 4096)
                _reap(outbox, keepers)
            for keeper in keepers.values():
                if keeper.kill_at is not None and time.monotonic() >= keeper.kill_at:
                    keeper.kill_at = math.inf
                    signal_descendants(keeper.pid, signal.SIGKILL)
            if driver.fileno() in ready and not _command(driver, outbox, keepers, (read_end, write_end)):
                return
            _post(driver, outbox)
    except (BrokenPipeError, ConnectionResetError):
        return  # the driver is gone
    finally:
        end_descendants(GRACE)


def _report(outbox: bytearray, kind: str, identifier: int, value: int, data: bytes | None) -> None:
    message = dump((kind, identifier, value, data))
    outbox += _FRAME.pack(len(message)) + message


def _post(driver: Connection, outbox: bytearray) -> None:
    """Send as much as the driver's end takes at once."""
    with socket.socket(fileno=os.dup(driver.fileno())) as channel, contextlib.suppress(BlockingIOError):
        while outbox:
            del outbox[: channel.send(outbox, socket.MSG_DONTWAIT)]


def _command(driver: Connection, outbox: bytearray, keepers: dict[int, Keeper], private: tuple[int, int]) -> bool:
    """Follow one command of the driver; False: it is gone."""
    try:
        kind, value = pickle.loads(driver.recv_bytes())
    except (EOFError, ConnectionResetError):
        return False
    if kind == "run":
        identifier, data = value
        keeper = _give(data, driver, keepers, private)
        keeper.identifier = identifier
        _report(outbox, "started", identifier, keeper.pid, None)
    elif kind == "cancel":
        for keeper in keepers.values():
            if keeper.identifier == value and keeper.kill_at is None:
                keeper.kill_at = time.monotonic() + GRACE
                signal_descendants(keeper.pid, signal.SIGTERM)
    return True


def _give(data: bytes, driver: Connection, keepers: dict[int, Keeper], private: tuple[int, int]) -> Keeper:
    """Hand a task to a keeper that waits, or to a new one."""
    for keeper in keepers.values():
        if keeper.identifier is None:
            with contextlib.suppress(OSError):  # it was killed: `_reap` will find it
                keeper.channel.send_bytes(data)
                return keeper
    keeper = _fork(driver, keepers.values(), private)
    keepers[keeper.pid] = keeper
    keeper.channel.send_bytes(data)
    return keeper


def _fork(driver: Connection, others: Iterable[Keeper], private: tuple[int, int]) -> Keeper:
    """Start a keeper."""
    ours, theirs = socket.socketpair()
    nursery = os.getpid()
    pid = os.fork()
    if pid:
        theirs.close()
        return Keeper(pid, Connection(ours.detach()))
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        driver.close()
        ours.close()
        for keeper in others:
            keeper.channel.close()
        for descriptor in private:
            os.close(descriptor)
        _keep(Connection(theirs.detach()), nursery)
        status = 0
    finally:
        os._exit(status)


def _keep(nursery: Connection, nursery_pid: int) -> None:
    """The keeper: run stages one after another, each in its own process; tell how it ended when nothing is left."""
    awaited = {signal.SIGCHLD, _NURSERY_ENDED}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)  # they are waited for, and interrupt nothing
    adopt_orphans()
    signal_at_parents_end(_NURSERY_ENDED)
    loaded: set[str] = set()  # stage functions that were imported here
    nothing_left = True
    while nothing_left:
        try:
            data = nursery.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        with _memory() as memory:
            stage = os.fork()
            if not stage:
                _run(data, memory)
            ended = None
            while ended is None and os.getppid() == nursery_pid:
                signal.sigwait(awaited)
                ended = _collect(stage)
            nothing_left = end_descendants(GRACE)
            if ended is None:
                return
            os.lseek(memory, 0, os.SEEK_SET)
            left = os.read(memory, os.fstat(memory).st_size)
        try:
            nursery.send_bytes(_STATUS.pack(ended) + left[1:])
        except BrokenPipeError:
            return
        if ended == 0 and left[:1] == _LIGHT:
            _preload(data, loaded)


@contextlib.contextmanager
def _memory() -> Iterator[int]:
    """A file in memory, where a stage leaves its outcome: whole if the stage ended well, and never in anybody's way."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("outcome")
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryFile() as file:
            yield file.fileno()


def _collect(stage: int) -> int | None:
    """The exit status of the stage among all children that ended."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            found = ended[1] if ended[0] == stage else found
    return found


def _run(data: bytes, memory: int) -> NoReturn:
    """The stage's process."""
    status = 1
    try:
        signal_at_parents_end(signal.SIGKILL)
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, _NURSERY_ENDED})
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        outcome = run_logged(load_task(data))
        write_all(memory, (_LIGHT if is_light() else _HEAVY) + dump(outcome))
        status = 0
    finally:
        os._exit(status)


def _receive(outbox: bytearray, keeper: Keeper) -> None:
    """Report the stage that ended; its keeper waits for another."""
    try:
        data = keeper.channel.recv_bytes()
    except (EOFError, ConnectionResetError):  # it was killed: `_reap` reports its stage
        return
    assert keeper.identifier is not None
    (status,) = _STATUS.unpack_from(data)
    _report(outbox, "ended", keeper.identifier, status, data[_STATUS.size :])
    keeper.identifier = keeper.kill_at = None


def _reap(outbox: bytearray, keepers: dict[int, Keeper]) -> None:
    """Report the stages of killed keepers. What these leave comes to this process, and is ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        keeper = keepers.pop(pid, None)
        if keeper is not None:
            keeper.channel.close()
            if keeper.identifier is not None:
                _report(outbox, "ended", keeper.identifier, status, b"")
        _end_strangers(keepers)


def _end_strangers(keepers: Iterable[int]) -> None:
    """Kill the children of this process that are no keepers; each of them that ends brings its own children here."""
    import psutil

    for child in psutil.Process().children():
        if child.pid not in keepers:
            with contextlib.suppress(psutil.Error):
                if not is_log_filter(child):  # it ends when the rest has
                    child.kill()


def _preload(data: bytes, loaded: set[str]) -> None:
    """Load a small stage that was seen to work, so that its next fork need not: most of the price of a small stage."""
    with contextlib.suppress(Exception):  # then every fork loads it by itself, and tells what is wrong
        task = load_task(data)
        if task.uses not in loaded:
            loaded.add(task.uses)
            preload(task)
            gc.freeze()


if __name__ == "__main__":
    main()
