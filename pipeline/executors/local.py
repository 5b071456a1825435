"""The local executor: every stage has a process of its own, which the nursery forks. No Ray in the driver."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection, wait

from polytrope.pipeline.executors.base import Capacity, machine_capacity
from polytrope.pipeline.executors.descendants import signal_descendants
from polytrope.pipeline.executors.nursery import GRACE
from polytrope.pipeline.executors.worker import Outcome, StageError, StageTask, dump, dump_task
from polytrope.pipeline.support.faults import worker_dies
from polytrope.pipeline.workflow.graph import StageNode


class LocalExecutor:
    """Starts the nursery with the first task. `wake`: a descriptor that becomes readable when a signal arrived."""

    name = "local"

    def __init__(self, _address: str | None = None, wake: int | None = None) -> None:
        self._capacity = machine_capacity()
        self._wake = wake
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._tasks: dict[int, StageTask] = {}
        self._pids: dict[int, int] = {}
        self._cancelled: set[int] = set()
        self._ended: list[tuple[int, Outcome]] = []

    @property
    def capacity(self) -> Capacity | None:
        return self._capacity

    def prepare(self, nodes: Iterable[StageNode]) -> None:
        """Nothing to connect to."""

    def has_started(self, identifier: int) -> bool:
        return identifier in self._pids

    def submit(self, task: StageTask) -> None:
        self._tasks[task.identifier] = task
        message = dump(("run", (task.identifier, dump_task(task))))
        try:
            self._start().send_bytes(message)
        except (BrokenPipeError, ConnectionResetError):  # it died meanwhile; this task is not lost by it
            del self._tasks[task.identifier]
            self._lose_all()
            self._tasks[task.identifier] = task
            self._start().send_bytes(message)

    def wait(self, timeout: float) -> list[tuple[int, Outcome]]:
        if self._connection is None:
            if not self._ended:
                self._sleep(timeout)
        else:
            sources: list[Connection | int] = [self._connection]
            if self._wake is not None:
                sources.append(self._wake)
            ready = wait(sources, 0 if self._ended else timeout)
            if self._connection in ready:
                self._read()
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, identifier: int) -> None:
        if identifier not in self._tasks:
            return
        self._cancelled.add(identifier)
        if self._connection is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._connection.send_bytes(dump(("cancel", identifier)))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()  # the nursery kills what is left and ends
            self._connection = None
        if self._process is not None:
            try:
                self._process.wait(timeout=2 * GRACE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                self._end_keepers()
            self._process = None
        self._tasks.clear()
        self._pids.clear()

    def _sleep(self, timeout: float) -> None:
        if self._wake is not None:
            wait([self._wake], timeout)
        else:
            time.sleep(timeout)

    def _start(self) -> Connection:
        if self._connection is None:
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "polytrope.pipeline.executors.nursery", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                )
            self._connection = Connection(ours.detach())
        return self._connection

    def _read(self) -> None:
        """All messages of the nursery that have arrived."""
        assert self._connection is not None
        try:
            while self._connection.poll(0):
                kind, identifier, value, data = pickle.loads(self._connection.recv_bytes())
                if kind == "started":
                    self._pids[identifier] = value
                    if worker_dies():
                        os.kill(value, signal.SIGKILL)
                elif identifier in self._tasks:
                    self._finish(identifier, self._outcome(identifier, value, data))
        except (EOFError, ConnectionResetError):
            self._lose_all()

    def _outcome(self, identifier: int, status: int, data: bytes) -> Outcome:
        if identifier in self._cancelled:
            return Outcome(error=StageError("cancelled", "cancelled"))
        if data and os.waitstatus_to_exitcode(status) == 0:
            outcome = pickle.loads(data)
            assert isinstance(outcome, Outcome)
            return outcome
        return Outcome(error=lost_worker(status))

    def _finish(self, identifier: int, outcome: Outcome) -> None:
        del self._tasks[identifier]
        self._pids.pop(identifier, None)
        self._cancelled.discard(identifier)
        self._ended.append((identifier, outcome))

    def _lose_all(self) -> None:
        """The nursery itself was killed: so are its stages."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.wait()
            self._process = None
        self._end_keepers()
        for identifier in list(self._tasks):
            lost = StageError("worker lost", "the process that starts the stages was killed")
            cancelled = StageError("cancelled", "cancelled")
            self._finish(identifier, Outcome(error=cancelled if identifier in self._cancelled else lost))

    def _end_keepers(self) -> None:
        """Wait until those of a nursery that was killed have ended their stages; kill what is left after that."""
        import psutil

        keepers = []
        for pid in self._pids.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                keepers.append(psutil.Process(pid))
        for keeper in psutil.wait_procs(keepers, timeout=2 * GRACE)[1]:
            signal_descendants(keeper.pid, signal.SIGKILL)
            with contextlib.suppress(psutil.NoSuchProcess):
                keeper.kill()


def lost_worker(status: int) -> StageError:
    """What the exit status of a process that sent no outcome means."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return StageError("worker lost", f"the stage's process ended by itself with exit code {code}")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ""
    if name == "SIGKILL":
        hint = "was memory short? `dmesg` tells; a smaller batch or fewer stages at a time (`concurrency:`) need less"
    elif name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"):
        hint = "native code crashed; the end of the stage's log may tell where"
    return StageError("worker lost", f"the stage's process was killed by {name}", hint)
