"""One process at a time gives a run to MLflow, and one to the other loggers, whoever started it."""

from __future__ import annotations

import contextlib
import fcntl
import threading
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, patience: float | None, give_up: threading.Event | None = None) -> Iterator[bool]:
    """Hold the lock of a file, which is made; whether it was got. The system lets go of it with the process.

    Args:
        path: the file.
        patience: seconds to wait for another holder; None: until `give_up` is set.
        give_up: ends the wait.
    """
    end = None if patience is None else time.monotonic() + patience
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if (end is not None and time.monotonic() >= end) or (give_up is not None and give_up.is_set()):
                    yield False
                    return
                time.sleep(0.1)
        yield True
