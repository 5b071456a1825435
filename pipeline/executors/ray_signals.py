"""SIGTERM while Ray connects: whoever has set a handler for it keeps it.

`ray.init` puts a Python handler in its place that exits at once, and the core worker a native one that aborts. Waiting
until it returns would not do: it may wait long for its cluster, and a signal may come at any moment of that.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator

_INTERVAL = 0.001  # seconds between two looks at the native handler
_STRUCT_SIGACTION = 512  # bytes, at least


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """While the block runs and after it: handlers as they were before. In any thread but the main one, nothing."""
    if threading.current_thread() is not threading.main_thread():  # Ray sets none there
        yield
        return
    library = ctypes.CDLL(None, use_errno=True)
    before, now = (ctypes.create_string_buffer(_STRUCT_SIGACTION) for _ in range(2))
    library.sigaction(signal.SIGTERM, None, before)
    ended = threading.Event()

    def restore() -> None:
        while True:
            library.sigaction(signal.SIGTERM, None, now)
            if now.raw != before.raw:
                library.sigaction(signal.SIGTERM, before, None)
            if ended.wait(_INTERVAL):
                return

    thread = threading.Thread(target=restore, name="polytrope-handlers", daemon=True)
    change = signal.signal
    signal.signal = lambda number, _: signal.getsignal(number)  # type: ignore[assignment]
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        restore()
        signal.signal = change
