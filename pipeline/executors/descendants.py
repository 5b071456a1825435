"""All that a process has started, directly or through others: adopted, signalled, and ended whole.

On Linux a process may adopt orphans (child subreaper): whatever its descendants do (a session of their own, an end of
their parent, another environment), they stay its descendants, and when it has no child it has none of them either.
Elsewhere an orphan gets away.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of prctl


def adopt_orphans() -> None:
    """From now on orphans among this process's descendants become its children."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def signal_at_parents_end(number: int) -> None:
    """Have this process get a signal when its parent has ended (Linux)."""
    _prctl(_SET_PARENT_DEATH_SIGNAL, number)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def signal_descendants(pid: int, number: int) -> None:
    """Send a signal to everything below a process, not to itself."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)


def end_descendants(patience: float) -> bool:
    """Kill everything below this process, also what is just being started, and collect its children.

    Args:
        patience: seconds after which it gives up: a process can be stuck in the kernel.

    Returns:
        Whether none is left.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        signal_descendants(os.getpid(), signal.SIGKILL)
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
