"""SIGINT, SIGTERM and SIGHUP during a run: remembered, so that the driver ends in order instead of dying of them."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Takes over the handlers while it is entered (in the main thread only); what `nohup` ignores stays ignored.

    `received`: the numbers that arrived, in order. `wake`: becomes readable when one arrives.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.wake, self._write = socket.socketpair()
        self.wake.setblocking(False)
        self._write.setblocking(False)
        self._before: dict[int, Any] = {}
        self._descriptor = -1

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._descriptor = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
            for number in _NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)

    def drain(self) -> None:
        """Make `wake` wait for the next signal."""
        with contextlib.suppress(BlockingIOError):
            while self.wake.recv(4096):
                pass

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before or self._descriptor != -1:
            signal.set_wakeup_fd(self._descriptor)
        self.wake.close()
        self._write.close()
