"""Which threads and processes take the signals that end a run: the main thread of the driver, and no other."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Signals that end a run wait until the block ends; threads that are started in it never take one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
