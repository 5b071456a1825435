"""SIGTERM while Ray connects: whoever has set a handler for it keeps it, and gets what arrives meanwhile.

`ray.init` puts a Python handler in its place that exits at once, and the core worker a native one that aborts. So the
signals wait until it has returned and the handlers are back: in this thread, and in those that Ray starts from it. The
driver's own threads take none (`signal_mask`); Ray's processes do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator

from polytrope.pipeline.support.signal_mask import ENDING, signals_blocked

_STRUCT_SIGACTION = 512  # bytes, at least


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Around `ray.init`. In any thread but the main one, nothing: Ray sets no handlers there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    library = ctypes.CDLL(None, use_errno=True)
    native = {number: ctypes.create_string_buffer(_STRUCT_SIGACTION) for number in ENDING}
    connecting = True

    def unblock() -> None:
        if connecting:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)

    os.register_at_fork(after_in_child=unblock)
    change = signal.signal
    with signals_blocked():
        for number, action in native.items():
            library.sigaction(number, None, action)
        signal.signal = lambda number, _: signal.getsignal(number)  # type: ignore[assignment]
        try:
            yield
        finally:
            connecting = False
            signal.signal = change
            for number, action in native.items():
                library.sigaction(number, action, None)
