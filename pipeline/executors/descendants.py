"""All that a process has started, directly or through others: adopted, signalled, and ended whole.

On Linux a process may adopt orphans (child subreaper): whatever its descendants do (a session of their own, an end of
their parent, another environment), they stay its descendants, and when it has no child it has none of them either.
Elsewhere an orphan gets away. The filters between stages and their logs are signalled last: they end by themselves when
nobody prints to them any more, and have the last words of a killed stage to write.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from polytrope.pipeline.support import log_filter

if TYPE_CHECKING:  # its import would be half the price of a nursery, which seldom needs it
    import psutil

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


def has_children() -> bool:
    """Whether this process has any child, living or ended; costs next to nothing."""
    if not hasattr(os, "waitid"):  # macOS
        return True
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def living_descendants(pid: int | None = None) -> list[psutil.Process]:
    """Everything below a process (None: this one), without what has ended and only waits to be collected."""
    import psutil

    living = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
    return living


def signal_descendants(pid: int, number: int) -> None:
    """Send a signal to everything below a process that is no log filter, not to itself."""
    import psutil

    for process in living_descendants(pid):
        with contextlib.suppress(psutil.Error):
            if not is_log_filter(process):
                process.send_signal(number)


def is_log_filter(process: psutil.Process) -> bool:
    """Whether it stands between a stage and its log."""
    return log_filter.__file__ in process.cmdline()


def kill_descendants(patience: float, spared: Collection[int] = ()) -> bool:
    """Kill everything below this process but `spared`, also what is just being started.

    Its own children are left to be collected by whoever started them.

    Args:
        patience: seconds after which it gives up: a process can be stuck in the kernel.
        spared: process ids.

    Returns:
        Whether none is left.
    """
    import psutil

    deadline = time.monotonic() + patience
    while found := [process for process in living_descendants() if process.pid not in spared]:
        overdue = time.monotonic() >= deadline
        for process in found:
            with contextlib.suppress(psutil.Error):
                if overdue or not is_log_filter(process):
                    process.kill()
        if overdue:
            return False
        time.sleep(0.002)
    return True


def end_descendants(patience: float) -> bool:
    """Kill everything below this process and collect all its children; as `kill_descendants`."""
    deadline = time.monotonic() + patience
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        kill_descendants(deadline - time.monotonic())
        if time.monotonic() >= deadline:
            return False
